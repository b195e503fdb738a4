"""Linux's unwind tables as DWARF: every kind of entry, unwound by a small interpreter of
call frame information. DWARF version 4, 6.4 and 7.23; Linux arch/x86/kernel/unwind_orc.c.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from struct import pack, unpack_from

import pytest

from bunshin.boot import orc

BASE = 0xFFFF_FFFF_8200_0000
"""Where the first table lies."""
CODE = 0xFFFF_FFFF_8100_0000
UNDEFINED, PREV_SP, DX, DI, BP, SP, R10, R13, BP_INDIRECT, SP_INDIRECT = range(10)
RBP, RSP, RETURN = 6, 7, 16
Memory = dict[int, int]


def entry(
    sp_reg: int, sp_offset: int, bp_reg: int = UNDEFINED, bp_offset: int = 0, kind: int = 0, end: int = 0
) -> bytes:
    """The form of Linux 6.1."""
    return pack("<hhH", sp_offset, bp_offset, sp_reg | bp_reg << 4 | kind << 8 | end << 10)


def tables(entries: list[tuple[int, bytes]]) -> tuple[memoryview, memoryview]:
    """Both tables for entries at addresses of code."""
    ips = b"".join(pack("<i", at - (BASE + 4 * n)) for n, (at, _) in enumerate(entries))
    return memoryview(ips), memoryview(b"".join(row for _, row in entries))


@dataclass
class Frame:
    """What a caller's registers are; None for unknown."""

    cfa: int
    ip: int | None
    bp: int | None
    interrupted: bool


@dataclass
class Reader:
    """Numbers in DWARF's forms."""

    data: bytes
    at: int = 0

    def fixed(self, form: str) -> int:
        (value,) = unpack_from("<" + form, self.data, self.at)
        self.at += {"B": 1, "H": 2, "I": 4, "Q": 8}[form]
        return int(value)

    def leb(self, signed: bool = False) -> int:
        value = shift = 0
        while True:
            byte = self.fixed("B")
            value |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                return value - (1 << shift) if signed and byte & 0x40 else value

    def bytes(self, length: int) -> bytes:
        self.at += length
        return self.data[self.at - length : self.at]


@dataclass
class Unwinder:
    """Descriptions by address, as a debugger has them."""

    section: bytes
    common: dict[int, tuple[str, bytes]] = field(default_factory=dict)

    def find(self, pc: int) -> tuple[int, str, bytes] | None:
        """Start, augmentation and instructions (those of the common part first) for `pc`."""
        reader = Reader(self.section)
        while reader.at < len(self.section):
            start = reader.at
            length = reader.fixed("I")
            assert length % 8 == 4, "records are aligned"
            end = reader.at + length
            parent = reader.fixed("I")
            if parent == 0xFFFF_FFFF:
                assert reader.fixed("B") == 1
                text = self.section[reader.at : self.section.index(b"\0", reader.at)].decode()
                reader.at += len(text) + 1
                assert (reader.leb(), reader.leb(signed=True), reader.fixed("B")) == (1, -8, RETURN)
                self.common[start] = text, self.section[reader.at : end]
            else:
                first, size = reader.fixed("Q"), reader.fixed("Q")
                if first <= pc < first + size:
                    text, initial = self.common[parent]
                    return first, text, initial + self.section[reader.at : end]
            reader.at = end
        return None

    def unwind(self, pc: int, registers: dict[int, int], memory: Memory) -> Frame | None:
        """The caller's frame; None where there is no description."""
        found = self.find(pc)
        if found is None:
            return None
        at, text, code = found
        reader = Reader(code)
        frame: tuple[str, int, int] | tuple[str, bytes] = ("none", b"")
        rules: dict[int, tuple[str, int | bytes]] = {}
        while reader.at < len(code):
            op = reader.fixed("B")
            if op & 0xC0 == 0x40 or op in (2, 3, 4):
                step = op & 0x3F if op & 0xC0 else reader.fixed({2: "B", 3: "H", 4: "I"}[op])
                at += step
                if at > pc:
                    break
            elif op & 0xC0 == 0x80:
                rules[op & 0x3F] = ("offset", -8 * reader.leb())
            elif op == 0:
                pass
            elif op == 0x07:
                rules[reader.leb()] = ("undefined", 0)
            elif op == 0x08:
                rules[reader.leb()] = ("same", 0)
            elif op == 0x0C:
                frame = ("register", reader.leb(), reader.leb())
            elif op == 0x0F:
                frame = ("expression", reader.bytes(reader.leb()))
            elif op == 0x10:
                which = reader.leb()
                rules[which] = ("expression", reader.bytes(reader.leb()))
            else:
                raise AssertionError(f"instruction {op:#x}")
        if frame[0] == "register":
            assert len(frame) == 3
            cfa = registers[frame[1]] + frame[2]
        else:
            assert isinstance(frame[1], bytes)
            cfa = evaluate(frame[1], registers, memory, [])

        def value(register: int) -> int | None:
            kind, argument = rules.get(register, ("same", 0))
            if kind == "undefined":
                return None
            if kind == "same":
                return registers[register]
            if isinstance(argument, bytes):
                return memory[evaluate(argument, registers, memory, [cfa])]
            return memory[cfa + argument]

        return Frame(cfa, value(RETURN), value(RBP), "S" in text)


def evaluate(expression: bytes, registers: dict[int, int], memory: Memory, stack: list[int]) -> int:
    reader = Reader(expression)
    while reader.at < len(expression):
        op = reader.fixed("B")
        if 0x70 <= op < 0x90:
            stack.append(registers[op - 0x70] + reader.leb(signed=True))
        elif op == 0x06:
            stack.append(memory[stack.pop()])
        elif op == 0x11:
            stack.append(reader.leb(signed=True))
        elif op == 0x22:
            stack.append(stack.pop() + stack.pop())
        else:
            raise AssertionError(f"operation {op:#x}")
    return stack[-1]


REGISTERS = {RSP: 0x1000, RBP: 0x2000, 1: 0x3000, 5: 0x4000, 10: 0x5000, 13: 0x6000, RETURN: 0}
FILLER = entry(SP, 8)
"""Most entries are calls: by that the form is known."""


def caller(row: bytes, memory: Memory, filler: bytes = FILLER) -> Frame:
    section = orc.frames(
        *with_base([(CODE, filler), (CODE + 16, row), (CODE + 32, filler), (CODE + 48, filler)])
    )
    frame = Unwinder(section).unwind(CODE + 20, REGISTERS, memory)
    assert frame is not None
    return frame


def with_base(entries: list[tuple[int, bytes]]) -> tuple[memoryview, int, memoryview]:
    ips, rows = tables(entries)
    return ips, BASE, rows


@pytest.mark.parametrize(
    ("row", "memory", "cfa", "ip", "bp"),
    [
        (entry(SP, 8), {0x1000: 7}, 0x1008, 7, 0x2000),
        (entry(SP, 300, PREV_SP, -16), {0x1000 + 292: 7, 0x1000 + 284: 9}, 0x1000 + 300, 7, 9),
        (entry(SP, 24, PREV_SP, -20), {0x1010: 7, 0x1004: 9}, 0x1018, 7, 9),
        (entry(BP, 16, BP, -8), {0x2008: 7, 0x1FF8: 9}, 0x2010, 7, 9),
        (entry(R10, 0), {0x4FF8: 7}, 0x5000, 7, 0x2000),
        (entry(R13, 0), {0x5FF8: 7}, 0x6000, 7, 0x2000),
        (entry(DI, 8), {0x4000: 7}, 0x4008, 7, 0x2000),
        (entry(DX, 8), {0x3000: 7}, 0x3008, 7, 0x2000),
        (entry(BP, -16), {0x1FE8: 7}, 0x1FF0, 7, 0x2000),
        (entry(SP_INDIRECT, 8), {0x1000: 0x8000, 0x8000: 7}, 0x8008, 7, 0x2000),
        (entry(BP_INDIRECT, -8), {0x1FF8: 0x8000, 0x7FF8: 7}, 0x8000, 7, 0x2000),
    ],
)
def test_calls(row: bytes, memory: Memory, cfa: int, ip: int, bp: int) -> None:
    frame = caller(row, memory)
    assert (frame.cfa, frame.ip, frame.bp) == (cfa, ip, bp)


@pytest.mark.parametrize("offset", [0, 8, 200])
def test_interrupts(offset: int) -> None:
    # pt_regs: bp at 32, ip at 128, sp at 152.
    at = 0x1000 + offset
    frame = caller(entry(SP, offset, kind=1), {at + 32: 9, at + 128: 7, at + 152: 0x9000})
    assert frame == Frame(0x9000, 7, 9, True)
    # What the processor pushed: ip at 0, sp at 24.
    frame = caller(entry(SP, offset, kind=2), {at: 7, at + 24: 0x9000})
    assert frame == Frame(0x9000, 7, 0x2000, True)
    assert not caller(entry(SP, 8), {0x1000: 7}).interrupted


@pytest.mark.parametrize(
    "row", [entry(UNDEFINED, 0), entry(SP, 8, end=1), entry(SP, 8, kind=3), entry(14, 8)]
)
def test_the_outermost_frame(row: bytes) -> None:
    assert caller(row, {}).ip is None


def test_the_newer_form() -> None:
    # From Linux 6.4 on: type 2 is a call, 3 and 4 an interrupt, 0 nothing, 1 the end.
    filler = entry(SP, 8, kind=2)
    assert caller(entry(SP, 16, kind=2), {0x1008: 7}, filler).ip == 7
    regs = {0x1000 + 32: 9, 0x1000 + 128: 7, 0x1000 + 152: 0x9000}
    assert caller(entry(SP, 0, kind=3), regs, filler) == Frame(0x9000, 7, 9, True)
    partial = pack("<hhH", 0, 0, SP | 4 << 8)
    assert caller(partial, {0x1000: 7, 0x1018: 0x9000}, filler) == Frame(0x9000, 7, 0x2000, True)
    for kind in (0, 1):
        assert caller(entry(SP, 8, kind=kind), {}, filler).ip is None


def test_every_address_finds_its_own_entry() -> None:
    entries = []
    at = CODE
    for n in range(500):
        # Distances of every size that DWARF has a form for.
        entries.append((at, entry(SP, 8 + 8 * (n % 50), kind=n % 97 == 5)))
        at += (1, 5, 0x3F, 0x40, 0xFF, 0x100, 0xFFFF, 0x1_0000)[n % 8]
    section = orc.frames(*with_base([*entries, (at, FILLER)]))
    unwinder = Unwinder(section)
    ends = [start for start, _ in entries[1:]] + [at]
    memory = {n: n for n in range(0x1000, 0x1000 + 800, 8)}
    for (start, row), end in zip(entries, ends, strict=True):
        (offset,) = unpack_from("<h", row)
        for pc in (start, end - 1):
            frame = unwinder.unwind(pc, REGISTERS, memory)
            assert frame is not None
            interrupted = bool(row[5] & 3)
            assert frame.interrupted == interrupted
            assert frame.cfa == (0x1000 + offset + 152 if interrupted else 0x1000 + offset)
    assert unwinder.find(CODE - 1) is None
    assert unwinder.find(at) is None


def test_nonsense() -> None:
    ips, rows = tables([(CODE, FILLER), (CODE + 16, FILLER)])
    assert orc.frames(memoryview(b""), BASE, rows) == b""
    assert orc.frames(ips, BASE, rows[:-1]) == b""
    backwards, rows = tables([(CODE + 16, FILLER), (CODE, FILLER)])
    assert orc.frames(backwards, BASE, rows) == b""
