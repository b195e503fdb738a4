"""Registers as GDB sees them. Offsets in the XSAVE area: SDM volume 1, 10.5.1 and 13.4."""

from __future__ import annotations

import xml.etree.ElementTree as tree
from collections.abc import Callable
from typing import Any

import pytest

from bunshin.debug.registers import Description, Refused, code_bits

Processor = Callable[..., dict[str, Any]]


def value(description: Description, state: dict[str, Any], name: str) -> int:
    number = [register.name for register in description.registers].index(name)
    return int.from_bytes(description.read(state, number), "little")


def put(description: Description, state: dict[str, Any], name: str, value: int) -> None:
    number = [register.name for register in description.registers].index(name)
    size = description.registers[number].bits // 8
    description.write(state, number, value.to_bytes(size, "little"))


@pytest.mark.parametrize("bits", [32, 64])
def test_the_description(bits: int) -> None:
    description = Description(bits)
    root = tree.fromstring(description.xml)
    registers = root.findall("feature/reg")
    assert [int(r.get("regnum", "")) for r in registers] == list(range(len(registers)))
    assert [r.get("name") for r in registers] == [r.name for r in description.registers]
    assert [int(r.get("bitsize", "")) for r in registers] == [r.bits for r in description.registers]
    # The orders that GDB numbers the general registers in.
    first = [r.get("name") for r in registers[:9]]
    if bits == 64:
        assert first == ["rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", "r8"]
    else:
        assert first == ["eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi", "eip"]
    names = {r.name for r in description.registers}
    assert {"eflags", "cs", "st7", "fop", "mxcsr", "xmm7", "ymm7h", "fs_base", "cr3", "efer"} <= names
    assert len(names) == len(description.registers)
    # Every type is GDB's own or defined before it is used.
    known = {"int", "int32", "int64", "uint128", "data_ptr", "code_ptr", "i387_ext"}
    for feature in root.findall("feature"):
        here = known | {str(child.get("id")) for child in feature if child.tag != "reg"}
        assert {r.get("type") for r in feature.findall("reg")} <= here


def test_values(processor: Processor) -> None:
    d, s = Description(64), processor()
    assert value(d, s, "rbx") == s["gpr"][3]
    assert value(d, s, "rsp") == s["gpr"][4]
    assert value(d, s, "r15") == s["gpr"][15]
    assert value(d, s, "rip") == 0xFFFF_FFFF_8100_0000
    assert value(d, s, "eflags") == 0x246
    assert (value(d, s, "es"), value(d, s, "cs"), value(d, s, "gs")) == (0, 8, 40)
    assert (value(d, s, "fs_base"), value(d, s, "gs_base")) == (0x4000, 0x5000)
    assert (value(d, s, "efer"), value(d, s, "k_gs_base")) == (0xD01, 0x7777)
    assert value(d, s, "xmm3") == int.from_bytes(b"\4" * 16, "little")
    assert value(d, s, "ymm3h") == int.from_bytes(b"\x83" * 16, "little")
    assert value(d, s, "mxcsr") == 0x1F80
    assert value(d, s, "st0") == 0x3FFF << 64 | 1 << 63
    assert (value(d, s, "fctrl"), value(d, s, "fstat"), value(d, s, "fop")) == (0x37F, 0x3800, 0x123)
    assert (value(d, s, "fioff"), value(d, s, "fiseg")) == (0x2222_3333, 0x1111)
    # Physical 7 holds 1.0 (valid, 0), physical 0 holds 0.0 (zero, 1), the rest is empty (3).
    assert value(d, s, "ftag") == 0b00_11_11_11_11_11_11_01


def test_what_is_not_in_use_is_as_after_reset(processor: Processor) -> None:
    d, s = Description(64), processor()
    s["xsave"][512] = 0
    assert (value(d, s, "fctrl"), value(d, s, "ftag"), value(d, s, "st0")) == (0x37F, 0xFFFF, 0)
    assert (value(d, s, "xmm3"), value(d, s, "ymm3h")) == (0, 0)
    put(d, s, "xmm3", 5)
    assert (value(d, s, "xmm3"), value(d, s, "xmm4"), s["xsave"][512]) == (5, 0, 2)
    put(d, s, "st2", 7)
    assert (value(d, s, "st2"), value(d, s, "st0"), value(d, s, "fctrl")) == (7, 0, 0x37F)
    assert value(d, s, "mxcsr") == 0x1F80


@pytest.mark.parametrize("bits", [32, 64])
def test_everything_written_is_read(processor: Processor, bits: int) -> None:
    d = Description(bits)
    for number, register in enumerate(d.registers):
        s = processor(bits)
        if register.name in {"cs", "ss", "ds", "es", "fs", "gs"}:
            continue
        new = bytes(n + 1 for n in range(register.bits // 8))
        if register.name == "mxcsr":
            new = b"\x80\x3f\0\0"
        elif register.name == "efer":
            new = b"\x01\x05" + bytes(6)  # LMA stays: the width of registers hangs on it
        elif register.name in {"fctrl", "fstat", "fop"}:
            new = b"\x12\x13\0\0"
        elif register.name == "ftag":
            new = b"\xfd\xff\0\0"  # physical 0 in use, and 0.0
            s["xsave"][32:48] = bytes(16)
            s["xsave"][48:64] = bytes(16)
        before = {other: d.read(s, other) for other in range(len(d.registers))}
        d.write(s, number, new)
        assert d.read(s, number) == new, register.name
        changed = {d.registers[n].name for n in before if d.read(s, n) != before[n]}
        # The tags follow from the registers and from the top of their stack.
        assert changed - {"ftag"} <= {register.name}


def test_outside_64_bit_code_registers_have_32_bits(processor: Processor) -> None:
    d = Description(64)
    for bits in (16, 32):
        s = processor(bits)
        assert code_bits(s) == bits
        assert value(d, s, "rbx") == s["gpr"][3] & 0xFFFF_FFFF
        s["gpr"][3] = 0x1234_5678_9ABC_DEF0
        put(d, s, "rbx", 0xFFFF_FFFF_0000_0001)
        assert s["gpr"][3] == 0x1234_5678_0000_0001
    assert code_bits(processor()) == 64


def test_segments(processor: Processor) -> None:
    d, s = Description(64), processor()
    put(d, s, "cs", 8)
    with pytest.raises(Refused):
        put(d, s, "cs", 0x33)
    s["cr0"] = 0x10
    put(d, s, "ds", 0x1234)
    assert (s["segments"][3]["selector"], s["segments"][3]["base"]) == (0x1234, 0x1_2340)
    put(d, s, "fs_base", 0xABC)
    assert s["segments"][4]["base"] == 0xABC


def test_what_cannot_be_written(processor: Processor) -> None:
    d, s = Description(64), processor()
    with pytest.raises(Refused):
        put(d, s, "mxcsr", 0x1_0000)
    s["xcr0"] = 3
    with pytest.raises(Refused):
        put(d, s, "ymm0h", 1)
    s["xsave"] = s["xsave"][:576]
    assert value(d, s, "ymm0h") == 0
    with pytest.raises(Refused):
        d.write(s, 0, b"1234")
    with pytest.raises(IndexError):
        d.read(s, 1000)
    with pytest.raises(Refused):
        d.write_all(s, b"")


@pytest.mark.parametrize("bits", [32, 64])
def test_all_at_once(processor: Processor, bits: int) -> None:
    d, s = Description(bits), processor(bits)
    everything = bytearray(d.read_all(s))
    assert len(everything) == d.length
    other = processor(bits)
    # Segments stay as they are, AVX is off: untouched values are not written.
    other["xcr0"] = 3
    everything[0] ^= 0xFF
    d.write_all(other, bytes(everything))
    s["gpr"][0] ^= 0xFF
    assert d.read_all(other) == d.read_all(s)
