"""Just enough of an AML assembler to write a DSDT by hand.

Spec: ACPI 6.5, chapter 20 (AML), section 6.4 (resource descriptors).
"""

from __future__ import annotations

from struct import pack


def name_seg(name: str) -> bytes:
    """A path such as `\\_SB_` or `COM1`: one segment, padded to four characters."""
    root = b"\\" if name.startswith("\\") else b""
    return root + name.removeprefix("\\").ljust(4, "_").encode("ascii")


def package_length(length: int) -> bytes:
    """PkgLength for a body of `length` bytes; the length counts itself."""
    for extra in range(4):
        total = length + 1 + extra
        if extra == 0 and total < 0x40:
            return bytes([total])
        if extra and total < 1 << (4 + 8 * extra):
            return bytes([extra << 6 | total & 0xF]) + (total >> 4).to_bytes(extra, "little")
    raise ValueError(f"AML package of {length} bytes")


def integer(value: int) -> bytes:
    """ZeroOp, OneOp or the shortest constant."""
    if value in (0, 1):
        return bytes([value])
    for prefix, size in ((0x0A, 1), (0x0B, 2), (0x0C, 4), (0x0E, 8)):
        if value < 1 << 8 * size:
            return bytes([prefix]) + value.to_bytes(size, "little")
    raise ValueError(f"AML integer {value:#x}")


def string(text: str) -> bytes:
    """A string constant."""
    return b"\x0d" + text.encode("ascii") + b"\0"


def eisa_id(text: str) -> bytes:
    """A compressed identifier such as `PNP0501`, as an integer."""
    a, b, c = (ord(letter) - 0x40 for letter in text[:3])
    number = a << 26 | b << 21 | c << 16 | int(text[3:], 16)
    return b"\x0c" + number.to_bytes(4, "big")


def named(name: str, value: bytes) -> bytes:
    """`Name (name, value)`."""
    return b"\x08" + name_seg(name) + value


def package(*elements: bytes) -> bytes:
    """`Package () { elements }`."""
    body = bytes([len(elements)]) + b"".join(elements)
    return b"\x12" + package_length(len(body)) + body


def scope(name: str, *body: bytes) -> bytes:
    """`Scope (name) { body }`."""
    content = name_seg(name) + b"".join(body)
    return b"\x10" + package_length(len(content)) + content


def device(name: str, *body: bytes) -> bytes:
    """`Device (name) { body }`."""
    content = name_seg(name) + b"".join(body)
    return b"\x5b\x82" + package_length(len(content)) + content


def resources(*descriptors: bytes) -> bytes:
    """`ResourceTemplate () { descriptors }`, a buffer that ends in an end tag."""
    content = b"".join(descriptors) + b"\x79\x00"
    body = integer(len(content)) + content
    return b"\x11" + package_length(len(body)) + body


def io(base: int, length: int) -> bytes:
    """`IO (Decode16, base, base, 1, length)`."""
    return pack("<BBHHBB", 0x47, 1, base, base, 1, length)


def irq_no_flags(irq: int) -> bytes:
    """`IRQNoFlags () {irq}`: edge-triggered, active high, exclusive."""
    return pack("<BH", 0x22, 1 << irq)


def memory32_fixed(base: int, length: int) -> bytes:
    """`Memory32Fixed (ReadWrite, base, length)`."""
    return pack("<BHBII", 0x86, 9, 1, base, length)
