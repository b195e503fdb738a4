from __future__ import annotations

from array import array
from pathlib import Path
from struct import pack

import pytest

from bunshin.boot import kallsyms, symbols
from bunshin.errors import ImageError

BASE = 0xFFFF_FFFF_8100_0000
NAMES = ["Tstart", *(f"tfunction_{n}" for n in range(600)), "Dsome_data", "Tlast", "Apercpu"]
LONG = "t" + "long_" * 40
TOKENS = [chr(n) if chr(n).isalnum() or chr(n) == "_" else f"<{n}>" for n in range(256)]
TOKENS[1] = "function_"


def packed(name: str) -> bytes:
    """A name by tokens; one of its pieces has its own."""
    data = name.replace("function_", "\1").encode()
    length = len(data)
    return (bytes([length]) if length < 128 else bytes([length & 127 | 128, length >> 7])) + data


def tables(order: str, names: list[str] = NAMES, word: int = 8) -> bytes:
    """The tables as kernels before 6.4 (`old`) and from then on (`new`) lay them out."""

    def aligned(data: bytes) -> bytes:
        return data + bytes(-len(data) % word)

    stream, markers = b"", array("I")
    for number, name in enumerate(names):
        if number % 256 == 0:
            markers.append(len(stream))
        stream += packed(name)
    table, index = b"", array("H")
    for token in TOKENS:
        index.append(len(table))
        table += token.encode() + b"\0"
    if word == 8:
        offsets = array("i", (-1 - 16 * n for n in range(len(names))))
        offsets[-1] = 0x1234
        where = aligned(offsets.tobytes()) + pack("<Q", BASE)
    else:
        where = array("I", (16 * n for n in range(len(names)))).tobytes() + pack("<I", 0xC100_0000)
    head = aligned(pack("<I", len(names))) + aligned(stream) + aligned(markers.tobytes())
    head += aligned(bytes(3 * len(names)))
    head += aligned(table) + aligned(index.tobytes())
    return where + head if order == "old" else head + where


@pytest.mark.parametrize("order", ["old", "new"])
@pytest.mark.parametrize("before", [0, 8, 4096])
def test_kallsyms_are_found_and_unpacked(order: str, before: int) -> None:
    names = [*NAMES[:300], LONG, *NAMES[300:]]
    data = b"0\0" * (before // 2) + tables(order, names) + b"9\0" * 100
    found = kallsyms.find(memoryview(data))
    assert [kind + name for _, kind, name in found] == names
    assert found[0][0] == BASE
    assert found[7][0] == BASE + 7 * 16
    assert found[-1] == (0x1234, "A", "percpu")


@pytest.mark.parametrize("order", ["old", "new"])
@pytest.mark.parametrize("before", [0, 4, 12])
def test_kallsyms_of_32_bit_kernels(order: str, before: int) -> None:
    found = kallsyms.find(memoryview(bytes(before) + tables(order, word=4)))
    assert [kind + name for _, kind, name in found] == NAMES
    assert found[0][0] == 0xC100_0000
    assert found[7][0] == 0xC100_0070


def test_offsets_without_negative_ones_are_distances() -> None:
    data = tables("new")
    size = 4 * len(NAMES)
    at = len(data) - 8 - (size + 7 & ~7)
    data = data[:at] + array("i", range(0, size, 4)).tobytes() + data[at + size :]
    assert kallsyms.find(memoryview(data))[3][0] == BASE + 12


def test_damaged_kallsyms_are_none() -> None:
    data = tables("old")
    assert kallsyms.find(memoryview(b"")) == []
    for cut in range(0, len(data), 97):
        assert kallsyms.find(memoryview(data[:cut])) == []
    base_at = len(array("i", NAMES and range(len(NAMES))).tobytes()) + 7 & ~7
    for at in (base_at + 7, base_at + 8, base_at + 0x20, data.index(b"0\x001\x002\0") - 1):
        broken = bytearray(data)
        broken[at] ^= 0x55
        assert kallsyms.find(memoryview(bytes(broken))) == [], hex(at)


def test_lines(tmp_path: Path) -> None:
    path = tmp_path / "System.map"
    path.write_text(
        "ffffffff81000040 T second\n0000000000000100 A percpu\nffffffff81000000 t first\n"
        "ffffffffc0000000 t in_module\t[module]\nnonsense T x\n\nffffffff82000000 D data\n"
    )
    assert symbols.from_file(str(path)) == [
        (BASE, "first"),
        (BASE + 0x40, "second"),
        (0xFFFF_FFFF_C000_0000, "in_module"),
    ]


@pytest.mark.parametrize(
    ("text", "slug"),
    [
        ("", "symbols-empty"),
        ("hello\n", "symbols-none"),
        ("0000000000000000 T a\n0000000000000000 T b\n", "symbols-hidden"),
    ],
)
def test_files_that_name_nothing(tmp_path: Path, text: str, slug: str) -> None:
    path = tmp_path / "map"
    path.write_text(text)
    with pytest.raises(ImageError) as caught:
        symbols.from_file(str(path))
    assert caught.value.slug == slug
    with pytest.raises(ImageError):
        symbols.from_file(str(tmp_path / "absent"))


def elf_with_symbols(wide: bool) -> bytes:
    """An ELF file with sections and no segments: code, data, symbols, their names."""
    names = b"\0first\0data\0second\0odd name\0"
    values = [(1, 0x1000, 2, 1), (7, 0x2000, 1, 2), (12, 0x1040, 0, 1), (19, 0x1050, 2, 1), (1, 0x3000, 2, 0)]
    symtab = bytes(24 if wide else 16)
    for name, value, kind, section in values:
        if wide:
            symtab += pack("<IBBHQQ", name, 16 | kind, 0, section, value, 4)
        else:
            symtab += pack("<IIIBBH", name, value, 4, 16 | kind, 0, section)
    head = 64 if wide else 52
    sections = [(0, 0, 0, 0, 0), (1, 6, 0, 0, 0), (1, 3, 0, 0, 0)]
    sections += [(2, 0, head, len(symtab), 4), (3, 0, head + len(symtab), len(names), 0)]
    table_at = head + len(symtab) + len(names)
    ident = b"\x7fELF" + bytes([2 if wide else 1, 1, 1]) + bytes(9)
    if wide:
        out = ident + pack("<HHIQQQIHHHHHH", 2, 62, 1, 0, 0, table_at, 0, 64, 56, 0, 64, len(sections), 0)
        table = b"".join(pack("<IIQQQQIIQQ", 0, k, f, 0, o, s, li, 0, 0, 0) for k, f, o, s, li in sections)
    else:
        out = ident + pack("<HHIIIIIHHHHHH", 2, 3, 1, 0, 0, table_at, 0, 52, 32, 0, 40, len(sections), 0)
        table = b"".join(pack("<10I", 0, k, f, 0, o, s, li, 0, 0, 0) for k, f, o, s, li in sections)
    return out + symtab + names + table


@pytest.mark.parametrize("wide", [True, False])
def test_elf_symbol_tables(tmp_path: Path, wide: bool) -> None:
    path = tmp_path / "vmlinux"
    data = elf_with_symbols(wide)
    path.write_bytes(data)
    assert symbols.from_file(str(path)) == [(0x1000, "first"), (0x1040, "second")]
    assert symbols.from_kernel(str(path)) == [(0x1000, "first"), (0x1040, "second")]
    for cut in range(20, len(data) - 40, 7):
        path.write_bytes(data[:cut])
        with pytest.raises(ImageError):
            symbols.from_file(str(path))
