"""Guests of a few bytes that do what no guest should: each run ends cleanly.

A guest is an ELF file built here. With a PVH note it starts in 32-bit protected mode
with flat segments, paging off and no IDT; without one, by the 64-bit Linux protocol,
in long mode over identity page tables of the first 4 GiB. So the first exception is
the last one, a triple fault, unless the guest brings an IDT. Machine code is written
out by hand; bytes without a comment are explained by the function that makes them.

What is checked: the outcome is one of those that a guest can cause, the process lives
on and does not grow, and whatever runs for ever can be stopped.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from struct import pack
from typing import Any

import pytest

from bunshin import Machine

pytestmark = pytest.mark.usefixtures("each_engine")

LOAD = 0x10_0000
END_OF_RAM = 32 << 20
STACK, DATA, IDT, HANDLER = 0x16_0000, 0x18_0000, 0x18_1000, 0x18_2000
PAGE_TABLES, GDT, IDT_POINTER = 0x9000, 0x500, DATA + 0x10
LAPIC, IOAPIC, NOWHERE = 0xFEE0_0000, 0xFEC0_0000, 0xD000_0000
CODE64, STACK_SEGMENT = 0x10, 0x18
POWER_OFF_PORT, POWER_OFF = 0x605, 0x34  # the high byte of PM1a_CNT: SLP_EN, SLP_TYP 5
ENDS = {"triple-fault", "timeout", "power-off", "reset", "panic", "failed"}
MIB = 1 << 20

Segments = dict[int, bytes]


def elf(segments: Segments, long: bool) -> bytes:
    """An ELF kernel with `segments` by gpa, entered at LOAD."""
    note = b"" if long else pack("<III4sI", 4, 4, 18, b"Xen\0", LOAD)
    count = len(segments) + 1
    note_at = 64 + 56 * count
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    out = ident + pack("<HHIQQQIHHHHHH", 2, 62, 1, LOAD, 64, 0, 0, 64, 56, count, 0, 0, 0)
    out += pack("<IIQQQQQQ", 4, 4, note_at, 0, 0, len(note), len(note), 4)
    at = note_at + len(note)
    for gpa, data in segments.items():
        out += pack("<IIQQQQQQ", 1, 7, at, gpa, gpa, len(data), len(data), 1)
        at += len(data)
    return out + note + b"".join(segments.values())


@dataclass
class Run:
    """How a guest's run went."""

    kind: str
    detail: str
    output: bytes
    stats: dict[str, int]


Hostile = Callable[..., Run]


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Machine]:
    """Make a machine with a guest in it: its code, or all its segments by gpa."""

    def build(guest: bytes | Segments, long: bool = False) -> Machine:
        path = tmp_path / "guest"
        path.write_bytes(elf({LOAD: guest} if isinstance(guest, bytes) else guest, long))
        return Machine(path, memory="32M")

    return build


@pytest.fixture
def hostile(build: Callable[..., Machine], request: pytest.FixtureRequest) -> Hostile:
    """Run a guest to its end, at most `timeout` seconds."""

    def run(guest: bytes | Segments, long: bool = False, timeout: float = 30) -> Run:
        with build(guest, long) as machine:
            # A guest that is known to hang needs less to show it.
            hangs = request.node.get_closest_marker("xfail") is not None
            outcome = machine.run(min(timeout, 2) if hangs else timeout)
            assert outcome.kind in ENDS
            assert outcome.detail
            assert "panicked at" not in outcome.detail, outcome.detail
            assert machine.registers.keys() >= {"rip", "cr0"}
            return Run(outcome.kind, outcome.detail, machine.console.read(), machine.stats())

    return run


def resident() -> int:
    """Bytes of this process in memory."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) << 10


# Pieces of machine code, the same in 32-bit and in 64-bit mode unless they say --------


def u16(value: int) -> bytes:
    return pack("<H", value)


def u32(value: int) -> bytes:
    return pack("<I", value & 0xFFFF_FFFF)


def u64(value: int) -> bytes:
    return pack("<Q", value & 0xFFFF_FFFF_FFFF_FFFF)


def eax(value: int) -> bytes:
    return b"\xb8" + u32(value)  # mov eax,value


def ebx(value: int) -> bytes:
    return b"\xbb" + u32(value)  # mov ebx,value


def ecx(value: int) -> bytes:
    return b"\xb9" + u32(value)  # mov ecx,value


def esp(value: int) -> bytes:
    return b"\xbc" + u32(value)  # mov esp,value


def esi(value: int) -> bytes:
    return b"\xbe" + u32(value)  # mov esi,value


def edi(value: int) -> bytes:
    return b"\xbf" + u32(value)  # mov edi,value


def rax(value: int) -> bytes:
    return b"\x48\xb8" + u64(value)  # mov rax,value (64-bit only)


def out8(port: int, value: int) -> bytes:
    return b"\x66\xba" + u16(port) + b"\xb0" + bytes([value]) + b"\xee"  # mov dx; mov al; out dx,al


def store32(gpa: int, value: int) -> bytes:
    return ebx(gpa) + b"\xc7\x03" + u32(value)  # mov ebx,gpa; mov dword [ebx],value


def say(text: bytes) -> bytes:
    return b"".join(out8(0x3F8, byte) for byte in text)


def forever(code: bytes) -> bytes:
    """`code` again and again; the jump back spans 32 bits."""
    return code + b"\xe9" + u32(-len(code) - 5)


def times(count: int, code: bytes) -> bytes:
    """`code`, `count` times over; it must keep ecx."""
    # again: code; dec ecx; jnz again
    tail = b"\xff\xc9\x0f\x85"
    return ecx(count) + code + tail + u32(-len(code) - len(tail) - 4)


STOP = b"\xfa\xf4\xeb\xfd"  # cli; again: hlt; jmp again
UD2 = b"\x0f\x0b"
NO_IDT = b"\x31\xc0\x50\x50\x0f\x01\x1c\x24"  # xor eax,eax; push; push; lidt [esp]
THROUGH = say(b"through\n") + out8(POWER_OFF_PORT, POWER_OFF) + STOP
READ_PORTS = b"\xec\x66\xed\xed"  # in al,dx; in ax,dx; in eax,dx
WRITE_PORTS = b"\xee\x66\xef\xef"  # out dx,al; out dx,ax; out dx,eax
RANDOM = b"\x69\xed\x6d\x4e\xc6\x41\x81\xc5\x39\x30\x00\x00\x89\xe8\xc1\xc8\x0d"
"""imul ebp,ebp,0x41c64e6d; add ebp,0x3039; mov eax,ebp; ror eax,13"""
LOAD_IDT = b"\x0f\x01\x1c\x25" + u32(IDT_POINTER)  # lidt [IDT_POINTER] (64-bit only)


def gate(handler: int, stack: int = 0) -> bytes:
    """A 64-bit interrupt gate; `stack` is an index into the TSS."""
    low, middle, high = handler & 0xFFFF, handler >> 16 & 0xFFFF, handler >> 32
    return pack("<HHHHII", low, CODE64, 0x8E00 | stack, middle, high, 0)


def with_idt(code: bytes, handler: bytes = b"\x48\xcf", target: int = HANDLER) -> Segments:
    """A 64-bit guest whose 256 vectors all lead to `handler`, iretq by default."""
    return {
        LOAD: esp(STACK) + LOAD_IDT + code,
        IDT_POINTER: u16(0xFFF) + u64(IDT),
        IDT: gate(target) * 256,
        HANDLER: handler,
    }


# Short lives -------------------------------------------------------------------------


def test_a_guest_that_says_something(hostile: Hostile) -> None:
    for long in (False, True):
        run = hostile(esp(STACK) + THROUGH, long)
        assert (run.kind, run.output) == ("power-off", b"through\n")


@pytest.mark.parametrize("long", [False, True])
def test_triple_fault_at_once(hostile: Hostile, each_engine: str, long: bool) -> None:
    run = hostile(UD2, long)
    assert run.kind == "triple-fault"
    # KVM does not tell which exception it was.
    told = {"translator": f"exception 6 (error 0x0) at rip {LOAD:#x}", "kvm": "processor 0 shut down"}
    assert told[each_engine] in run.detail


NOWHERES = (END_OF_RAM - 2, END_OF_RAM, NOWHERE, IOAPIC, LAPIC, 0xFFFF_FFF0, 0xFFFF_FFFF)


@pytest.mark.parametrize("target", NOWHERES)
def test_jump_into_nowhere(hostile: Hostile, target: int) -> None:
    jump = eax(target) + b"\xff\xe0"  # jmp eax
    assert hostile(jump).kind == "triple-fault"
    assert hostile(jump, long=True).kind == "triple-fault"


FAR = (1 << 32, (1 << 46) - 4096, (1 << 47) - 1, 1 << 47, 1 << 63, (1 << 64) - (1 << 47), -1)


@pytest.mark.parametrize("target", FAR)
def test_jump_far_away(hostile: Hostile, target: int) -> None:
    assert hostile(rax(target) + b"\xff\xe0", long=True).kind == "triple-fault"  # jmp rax


@pytest.mark.parametrize("target", FAR[1:])
def test_a_stack_far_away(hostile: Hostile, target: int) -> None:
    code = rax(target) + b"\x48\x89\xc4\xcc"  # mov rsp,rax; int3
    assert hostile(with_idt(code), long=True).kind == "triple-fault"


@pytest.mark.parametrize("place", [END_OF_RAM - 1, END_OF_RAM - 16, NOWHERE, LAPIC + 8, IOAPIC])
@pytest.mark.parametrize(
    "code",
    [
        b"\xf0\x0f\xc7\x0f",  # lock cmpxchg8b [edi]
        b"\xf0\xff\x07",  # lock inc dword [edi]
        b"\x0f\xab\x07",  # bts [edi],eax
        b"\x0f\xae\x07",  # fxsave [edi]
        b"\x0f\xae\x0f",  # fxrstor [edi]
        b"\xd9\xe8\xdb\x3f\xdb\x2f",  # fld1; fstp tbyte [edi]; fld tbyte [edi]
        b"\xdd\x37\xdd\x27",  # fnsave [edi]; frstor [edi]
        b"\x0f\x11\x07\x0f\x10\x07",  # movups [edi],xmm0; movups xmm0,[edi]
        b"\x66\x0f\xf7\xc1",  # maskmovdqu xmm0,xmm1
        b"\x0f\x01\x07\x0f\x01\x0f",  # sgdt [edi]; sidt [edi]
        b"\x0f\xb2\x27",  # lss esp,[edi]
        b"\x0f\x01\x17",  # lgdt [edi]
        b"\xff\x2f",  # jmp far [edi]
        b"\xff\x27",  # jmp [edi]
        b"\x8f\x07\xff\x37",  # pop [edi]; push [edi]
        b"\x89\xfc\x60\x61",  # mov esp,edi; pusha; popa (invalid in 64-bit mode)
        b"\x89\xfc\x89\xfd\xc8\x10\x00\x1f",  # mov esp,edi; mov ebp,edi; enter 16,31
        b"\xc5\xfc\x11\x07",  # vmovups [edi],ymm0
    ],
)
def test_odd_accesses_outside_ram(hostile: Hostile, place: int, code: bytes) -> None:
    # mov eax,cr4; or eax,0x600; mov cr4,eax: let SSE through
    sse = b"\x0f\x20\xe0\x0d\x00\x06\x00\x00\x0f\x22\xe0"
    for long in (False, True):
        run = hostile(sse + esp(STACK) + edi(place) + eax(0x1234) + code + THROUGH, long)
        assert run.kind in {"triple-fault", "power-off"}


def test_hypercalls_have_no_effect(hostile: Hostile) -> None:
    vmcall = b"\x0f\x01\xc1"
    code = times(1000, RANDOM + vmcall + b"\x83\xf8\xff\x74\x00")  # cmp eax,-1; je +0
    assert hostile(code + THROUGH).output == b"through\n"


# 16-bit code, which this version does not know ------------------------------------------


SIXTEEN = b"\xb8\x34\x12\x8e\xd8\xa1\x00\x00\xf4\xeb\xfd"  # mov ax; mov ds,ax; mov ax,[0]; hlt; jmp


def test_16_bit_protected_mode(hostile: Hostile) -> None:
    table = bytes(8) + u64(0x000F_9A10_0000_FFFF) + u64(0x00CF_9200_0000_FFFF)
    pointer = u16(len(table) - 1) + u32(DATA + 0x100)
    code = esp(STACK) + b"\x0f\x01\x15" + u32(DATA)  # lgdt [DATA]
    far = b"\xea" + u32(0x1000) + u16(8)  # jmp 8:0x1000, a 16-bit segment with base 1 MiB
    guest = {LOAD: code + far, LOAD + 0x1000: SIXTEEN, DATA: pointer, DATA + 0x100: table}
    hostile(guest, timeout=0.3)


@pytest.mark.parametrize("long", [False, True])
def test_real_mode(hostile: Hostile, long: bool) -> None:
    # mov eax,cr0; and eax,0x7ffffffe; mov cr0,eax; jmp 0:0x1000
    real = b"\x0f\x20\xc0\x25\xfe\xff\xff\x7f\x0f\x22\xc0" + b"\xea" + u32(0x1000) + u16(0)
    hostile(esp(STACK) + real, long, timeout=0.3)


def test_virtual_8086_mode(hostile: Hostile) -> None:
    frame = (0, 0, 0, 0, 0, 0x1000, 0x2_0002, 0x1000, 0)  # gs fs ds es ss esp eflags cs eip
    push = b"".join(b"\x68" + u32(value) for value in frame)
    hostile(esp(STACK) + push + b"\xcf", timeout=0.3)  # iretd


# Ports and controllers -----------------------------------------------------------------


def test_every_port_is_read(hostile: Hostile) -> None:
    # The string forms need edi, the ports dx: mov edi,DATA; mov edx,ecx
    strings = edi(DATA) + b"\x6c\x66\x6d\x6d"  # insb; insw; insd
    run = hostile(esp(STACK) + times(0x1_0000, b"\x89\xca" + READ_PORTS + strings) + THROUGH)
    assert (run.kind, run.output[-8:]) == ("power-off", b"through\n")


ENDING = {0x505: "panic", 0x604: "power-off", 0x60C: "reset", 0x64: "reset"}


def test_every_port_is_written(hostile: Hostile) -> None:
    """From each port that can end the run on to the next one."""
    strings = esi(DATA) + b"\x6e\x66\x6f\x6f"  # outsb; outsw; outsd
    first = 0xFFFF
    while True:
        # mov edx,ecx; then random values; ecx counts down
        code = times(first, b"\x89\xca" + RANDOM + WRITE_PORTS + strings)
        code = b"\xbd" + u32(first) + code  # mov ebp,first
        with_data = {LOAD: esp(STACK) + code + THROUGH, DATA: random.Random(first).randbytes(64)}
        # Half a million exits; a KVM that emulates takes its time for what lies between.
        run = hostile(with_data, timeout=180)
        if run.output.endswith(b"through\n"):
            break
        assert run.kind in ENDING.values()
        # Go on below the highest of these ports; one that was not to blame is met again.
        first = max(port for port in ENDING if port < first) - 4


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "store",
    [
        b"\x89\x03",  # mov [ebx],eax
        b"\x88\x03\x66\x89\x43\x02",  # mov [ebx],al; mov [ebx+2],ax
        b"\x48\x89\x03",  # mov [rbx],rax
        b"\x87\x03\x0f\xc1\x43\x04",  # xchg [ebx],eax; xadd [ebx+4],eax
    ],
)
def test_random_values_into_lapic_and_ioapic(hostile: Hostile, seed: int, store: bytes) -> None:
    """64-bit code; whatever interrupts come of it, the handler returns."""
    # sti; mov ebx,eax; and ebx,0xff8; add ebx,LAPIC; store; mov eax,[ebx]
    lapic = b"\xfb" + RANDOM + b"\x89\xc3\x81\xe3\xf8\x0f\x00\x00\x81\xc3" + u32(LAPIC)
    # mov ebx,eax; and ebx,0x3f; mov [IOAPIC],ebx by way of edi; mov [edi+0x10],eax
    ioapic = RANDOM + b"\x89\xc3\x83\xe3\x3f" + edi(IOAPIC) + b"\x89\x1f" + RANDOM + b"\x89\x47\x10"
    body = lapic + RANDOM + store + b"\x8b\x03" + ioapic
    code = b"\xbd" + u32(seed) + times(3000, body) + THROUGH  # mov ebp,seed
    hostile(with_idt(code), long=True, timeout=2)


# Nonsense in system registers ------------------------------------------------------------


def to_cr(number: int) -> bytes:
    return bytes([0x0F, 0x22, 0xC0 | number << 3])  # mov cr<number>,rax


def wrmsr(msr: int, value: int) -> bytes:
    return ecx(msr) + eax(value) + b"\xba" + u32(value >> 32) + b"\x0f\x30"  # mov edx; wrmsr


def load_table(opcode: bytes, base: int, limit: int) -> bytes:
    """Push ten bytes and load GDTR or IDTR from them (64-bit only)."""
    # sub rsp,16; mov word [rsp],limit; mov rax,base; mov [rsp+2],rax
    head = b"\x48\x83\xec\x10\x66\xc7\x04\x24" + u16(limit)
    return head + rax(base) + b"\x48\x89\x44\x24\x02" + opcode


LGDT, LIDT = b"\x0f\x01\x14\x24", b"\x0f\x01\x1c\x24"
# mov ds,ax; mov ss,ax; mov fs,ax; push ax's selector and a place; retfq
USE_GDT = b"\xb8\x18\x00\x00\x00\x8e\xd8\x8e\xd0\x8e\xe0\x6a\x10\x68" + u32(LOAD) + b"\x48\xcb"
ODD = (0, 1, 0xFFFF_FFFF, 1 << 63, (1 << 64) - 1, 0x5555_5555_5555_5555, LAPIC, NOWHERE, 1 << 45)
EFER, APIC_BASE = 0xC000_0080, 0x1B


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize("register", [0, 2, 3, 4, 8])
def test_nonsense_in_control_registers(hostile: Hostile, register: int, value: int) -> None:
    code = rax(value) + to_cr(register) + b"\x8b\x04\x25" + u32(LOAD)  # mov eax,[LOAD]
    hostile(esp(STACK) + code + THROUGH, long=True, timeout=2)
    code = eax(value) + to_cr(register) + b"\xa1" + u32(LOAD)
    hostile(esp(STACK) + code + THROUGH, timeout=2)


@pytest.mark.parametrize("value", ODD)
@pytest.mark.parametrize("msr", [EFER, APIC_BASE, 0xC000_0100, 0xC000_0082, 0x277, 0x2FF, 0x6E0])
def test_nonsense_in_msrs(hostile: Hostile, msr: int, value: int) -> None:
    after = b"\x64\x8b\x04\x25" + u32(LOAD)  # mov eax,fs:[LOAD]
    hostile(esp(STACK) + wrmsr(msr, value) + after + THROUGH, long=True, timeout=2)


def test_bit_63_of_cr3_is_reserved_without_pcids(hostile: Hostile, each_engine: str) -> None:
    run = hostile(rax(PAGE_TABLES | 1 << 63) + to_cr(3) + THROUGH, long=True)
    assert run.kind == "triple-fault"
    assert {"translator": "exception 13", "kvm": "shut down"}[each_engine] in run.detail


def test_every_msr_range_read_and_written(hostile: Hostile) -> None:
    """Each #GP skips the two bytes of RDMSR or WRMSR."""
    # add qword [rsp+8],2 (the error code lies at [rsp]); add rsp,8; iretq
    skip = b"\x48\x83\x44\x24\x08\x02\x48\x83\xc4\x08\x48\xcf"
    body = b""
    for base in (0, 0x4000_0000, 0x4B56_4D00, 0xC000_0000, 0xC001_0000):
        # mov esi,ecx; and esi,0xfff; lea ecx,[rsi+base]; rdmsr; wrmsr; lea ecx,[rsi]
        body += b"\x89\xcf\x89\xce\x81\xe6\xff\x0f\x00\x00\x8d\x8e" + u32(base)
        # EFER and APIC_BASE stay; all else gets back what it had: rdmsr; wrmsr; mov ecx,edi
        body += b"\x0f\x32\x0f\x30\x89\xf9"
    run = hostile(with_idt(times(0x1000, body) + THROUGH, skip), long=True)
    assert run.output == b"through\n", run.detail


@pytest.mark.parametrize("base", [0, 1, LAPIC, NOWHERE, END_OF_RAM - 8, 1 << 40, 1 << 60])
@pytest.mark.parametrize("limit", [0, 7, 0xFFFF])
def test_nonsense_in_descriptor_tables(hostile: Hostile, base: int, limit: int) -> None:
    for load, use in ((LGDT, USE_GDT), (LIDT, b"\xcc\xcd\x80\x0f\x0b"), (LGDT, b"\xcc")):
        run = hostile(with_idt(load_table(load, base, limit) + use), long=True, timeout=0.3)
        assert run.kind in {"triple-fault", "timeout"}


@pytest.mark.parametrize("descriptor", [0, 0x89, 0x8B, 0x82, 0x80, 0x9B, 0xFF, 0x85, 0xEE])
def test_nonsense_in_tr_and_ldtr(hostile: Hostile, descriptor: int) -> None:
    for base in (0, LAPIC, NOWHERE):
        low = 0x67 | (base & 0xFF_FFFF) << 16 | descriptor << 40 | (base >> 24) << 56
        # mov [GDT+0x20],low; mov eax,0x20
        code = rax(low) + b"\x48\x89\x04\x25" + u32(GDT + 0x20) + eax(0x20)
        for load in (b"\x0f\x00\xd8", b"\x0f\x00\xd0"):  # ltr ax; lldt ax
            # mov dx,0x80; in al,dx; int3
            guest = with_idt(code + load + b"\x66\xba\x80\x00\xec\xcc" + THROUGH)
            guest[IDT] = gate(HANDLER, stack=1) * 256
            hostile(guest, long=True, timeout=0.3)


# Page tables in the wrong places ----------------------------------------------------------


@pytest.mark.parametrize("place", [LAPIC, IOAPIC, NOWHERE, END_OF_RAM, 1 << 40, PAGE_TABLES])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_page_tables_that_are_no_memory(hostile: Hostile, place: int, level: int) -> None:
    """The entry at `level` that maps this code, or CR3 itself, leads to `place`."""
    entry = PAGE_TABLES + 0x1000 * (level - 1)
    # mov [entry],rax
    code = rax(place | 3) + (b"\x48\x89\x04\x25" + u32(entry) if level else to_cr(3))
    # mov rax,cr3; mov cr3,rax; mov eax,[LOAD + 64 MiB]; mov [LOAD],eax
    code += b"\x0f\x20\xd8\x0f\x22\xd8" + b"\x8b\x04\x25" + u32(LOAD + (64 << 20))
    code += b"\x89\x04\x25" + u32(LOAD)
    run = hostile(esp(STACK) + code + STOP, long=True, timeout=0.3)
    assert run.kind in {"triple-fault", "timeout"}


def test_page_tables_that_change_under_the_code(hostile: Hostile) -> None:
    """Random bits in all entries, in random order, with INVLPG now and then."""
    # mov ebx,eax; and ebx,0x5ff8; add ebx,PAGE_TABLES; random; xor [ebx],eax; invlpg [ebx]
    body = RANDOM + b"\x89\xc3\x81\xe3\xf8\x5f\x00\x00\x81\xc3" + u32(PAGE_TABLES)
    body += RANDOM + b"\x25\xff\x01\x00\x00\x31\x03\x0f\x01\x3b"
    for seed in range(20):
        code = b"\xbd" + u32(seed) + times(100_000, body)
        hostile(esp(STACK) + code + STOP, long=True, timeout=1)


# Code that changes itself ------------------------------------------------------------------


@pytest.mark.parametrize(
    "store",
    [
        b"\x89\x07",  # mov [edi],eax
        b"\xab",  # stosd
        b"\xf3\xaa",  # rep stosb
        b"\xf3\xa4",  # rep movsb
        b"\xa5",  # movsd
        b"\x93\x87\x07\x90",  # xchg eax,ebx; xchg [edi],eax; nop
        b"\x0f\xc1\x07",  # xadd [edi],eax
        b"\xf0\x09\x07",  # lock or [edi],eax
        b"\x31\xc0\x0f\xb1\x1f",  # xor eax,eax; cmpxchg [edi],ebx
        b"\x0f\xc3\x07",  # movnti [edi],eax
        b"\x66\x0f\x6e\xc0\x66\x0f\x7e\x07",  # movd xmm0,eax; movd [edi],xmm0
        b"\xdb\x06\xdb\x1f",  # fild dword [esi]; fistp dword [edi]
        b"\x50\x8f\x07",  # push eax; pop [edi] (64-bit: eight bytes)
        # xchg edi,esp; lea esp,[esp+8]; push eax; xchg edi,esp; nop
        b"\x87\xfc\x8d\x64\x24\x08\x50\x87\xfc\x90",
    ],
)
@pytest.mark.parametrize("long", [False, True])
def test_the_next_instruction_is_rewritten(hostile: Hostile, store: bytes, long: bool) -> None:
    """`store` puts eight bytes or fewer of 0x5A over the zeroes behind it."""
    new = 0x5A5A_5A5A
    sse = b"\x0f\x20\xe0\x0d\x00\x06\x00\x00\x0f\x22\xe0"  # let SSE through, as above
    if store.startswith(b"\x87\xfc") and not long:
        store = store.replace(b"\x24\x08", b"\x24\x04")
    head = sse + esp(STACK) + eax(new) + ebx(new) + ecx(4) + esi(DATA)
    target = LOAD + len(head) + 5 + len(store) + 1
    # mov edx,0 (rewritten); four bytes that may be overwritten too: test al,0x5a twice
    code = head + edi(target) + store + b"\xba\x00\x00\x00\x00" + b"\x90\x90\x90\x90"
    if b"\x50" in store and long:
        code = code[:-4] + b"\xa8\x00\xa8\x00"
    # cmp edx,new; jne +2 over to ud2
    code += b"\x81\xfa" + u32(new) + b"\x74\x02\x0f\x0b"
    run = hostile({LOAD: code + THROUGH, DATA: u32(new)}, long)
    assert run.output == b"through\n", run.detail


def test_code_that_changes_itself_in_a_loop(hostile: Hostile) -> None:
    """Each round sees its own new immediate; the process does not keep them all."""
    before = resident()
    # inc byte [target]; mov al,0 (rewritten); cmp al,[target]; je +2; ud2
    target = LOAD + 5 + 5 + 6 + 1
    body = b"\xfe\x05" + u32(target) + b"\xb0\x00" + b"\x3a\x05" + u32(target) + b"\x74\x02" + UD2
    code = esp(STACK) + times(200_000, body)
    assert hostile(code + THROUGH).output == b"through\n"
    assert resident() - before < 150 * MIB


# Guests that run for ever --------------------------------------------------------------------


HUGE = ecx(-1)
ENDLESS = {
    "jmp": b"",
    "pause": b"\xf3\x90",
    "hlt with interrupts off": b"\xfa\xf4",
    "hlt with interrupts on": b"\xfb\xf4",
    "mov ss": b"\x8c\xd0\x8e\xd0",
    "sti": b"\xfb",
    "sti; cli": b"\xfb\xfa",
    "cpuid": b"\x0f\xa2",
    "wbinvd": b"\x0f\x09",
    "reload cr3": b"\x0f\x20\xd8\x0f\x22\xd8",
    "in": b"\xec",
    "vmcall": b"\x0f\x01\xc1",
    "push": b"\x50",
    "call": b"\xe8\x00\x00\x00\x00",
    "rep movsb": HUGE + esi(0x20_0000) + edi(0x30_0000) + b"\xf3\xa4",
    "rep stosb to nowhere": HUGE + edi(NOWHERE) + b"\xf3\xaa",
    "rep stosd to the LAPIC": HUGE + edi(LAPIC) + b"\xf3\xab",
    "rep lodsb from nowhere": HUGE + esi(NOWHERE) + b"\xf3\xac",
    "rep cmpsb nowhere": HUGE + esi(NOWHERE) + edi(NOWHERE) + b"\xf3\xa6",
    "rep outsb": b"\x66\xba\xf8\x03" + HUGE + esi(0x20_0000) + b"\xf3\x6e",
    "rep outsd": b"\x66\xba\x80\x00" + HUGE + esi(0x20_0000) + b"\xf3\x6f",
    "rep insb": b"\x66\xba\xf8\x03" + HUGE + edi(0x20_0000) + b"\xf3\x6c",
    "rep insd to nowhere": b"\x66\xba\x80\x00" + HUGE + edi(NOWHERE) + b"\xf3\x6d",
    "rep outsd from nowhere": b"\x66\xba\x80\x00" + HUGE + esi(NOWHERE) + b"\xf3\x6f",
    "the LAPIC's timer": b"\xbb" + u32(LAPIC + 0x390) + b"\x8b\x03",
    "locked, nowhere": b"\xbb" + u32(NOWHERE) + b"\xf0\xff\x03",
    "a megabyte of nop": b"\x90" * MIB,
}
ENDLESS_64 = {
    "ud2 and back": UD2,
    "int3 and back": b"\xcc",
    "int and back": b"\xcd\x80",
    "division by zero and back": b"\x31\xc9\xf7\xf1",
    "single steps": b"\x68\x02\x01\x00\x00\x9d\x90\x90",  # push 0x102; popfq
    "a stack that is a device": esp(NOWHERE + 0x1000) + b"\xcc",
}


def endless_guests() -> list[Any]:
    guests: list[Any] = []
    for name, code in ENDLESS.items():
        guest = esp(STACK) + say(b"up\n") + forever(code)
        guests.append(pytest.param(guest, False, id=name))
        guests.append(pytest.param(guest, True, id=f"{name}, 64-bit"))
    for name, code in ENDLESS_64.items():
        guests.append(pytest.param(with_idt(say(b"up\n") + forever(code)), True, id=name))
    return guests


@pytest.mark.parametrize(("guest", "long"), endless_guests())
def test_endless_guests_can_be_stopped(
    build: Callable[..., Machine], guest: bytes | Segments, long: bool
) -> None:
    before = resident()
    with build(guest, long) as machine:
        machine.start()
        machine.console.expect("up\n")
        assert machine.wait(0.05).kind == "timeout"
        # A processor that runs can be looked at, stopped for a while, and ended.
        assert machine.registers["cr0"] & 1
        machine.pause()
        machine.resume()
        assert machine.wait(0.01).kind == "timeout"
        machine.stop()
        assert machine.wait().kind == "stopped"
    assert resident() - before < 150 * MIB


@pytest.mark.parametrize("long", [False, True])
def test_waiting_for_nothing_costs_nothing(build: Callable[..., Machine], long: bool) -> None:
    with build(esp(STACK) + say(b"up\n") + STOP, long) as machine:
        machine.start()
        machine.console.expect("up\n")
        began = time.process_time()
        assert machine.wait(0.5).kind == "timeout"
        assert time.process_time() - began < 0.2
        machine.stop()
        assert machine.wait().kind == "stopped"


# Garbage -----------------------------------------------------------------------------------


SLOT, SLOTS, GARBAGE = 64, 256, 0x20_0000


def survivor(seed: int) -> Segments:
    """64-bit garbage in many pieces: each exception, and an NMI every few ms, leads on to the next.

    The NMI is the PIT's, through pin 2 of the IOAPIC. The handlers' stack comes from
    the TSS, which lies at gpa 0: IST1 stands at 0x24.
    """
    setup = b"\x48\xc7\x04\x25\x24\x00\x00\x00" + u32(STACK)  # mov qword [0x24],STACK
    setup += b"\x0f\x20\xe0\x0d\x00\x06\x04\x00\x0f\x22\xe0"  # CR4: OSFXSR OSXMMEXCPT OSXSAVE
    setup += b"\x31\xc9\x0f\x01\xd0\x83\xc8\x07\x0f\x01\xd1"  # xgetbv; or eax,7; xsetbv: AVX
    for index, value in ((0x14, 0x400), (0x15, 0)):
        setup += store32(IOAPIC, index) + store32(IOAPIC + 0x10, value)
    setup += store32(LAPIC + 0xF0, 0x1FF)
    setup += out8(0x43, 0x34) + out8(0x40, 0x50) + out8(0x40, 0x10)  # mode 2, 4176 ticks: 3.5 ms
    handler = esp(STACK - 0x1_0000)
    # mov ebx,[DATA]; inc ebx; mov [DATA],ebx; cmp ebx,SLOTS; jb +len(off); off
    off = out8(POWER_OFF_PORT, POWER_OFF) + STOP
    handler += b"\x8b\x1c\x25" + u32(DATA) + b"\xff\xc3\x89\x1c\x25" + u32(DATA)
    handler += b"\x81\xfb" + u32(SLOTS) + b"\x72" + bytes([len(off)]) + off
    # imul ebx,ebx,SLOT; add ebx,GARBAGE; a frame for iretq, which ends the NMI too
    handler += b"\x69\xdb" + u32(SLOT) + b"\x81\xc3" + u32(GARBAGE)
    handler += b"\x6a" + bytes([STACK_SEGMENT]) + b"\x68" + u32(STACK - 0x1_0000)
    handler += b"\x6a\x02\x6a" + bytes([CODE64]) + b"\x53\x48\xcf"
    return {
        **with_idt(setup + UD2, handler),
        IDT: gate(HANDLER, stack=1) * 256,
        DATA: u32(-1),
        GARBAGE: random.Random(seed).randbytes(SLOT * SLOTS),
    }


class TestGarbage:
    """The whole lot may not make the process grow by more than 50 MiB."""

    before = 0

    @pytest.mark.parametrize("seed", range(25))
    def test_32_bit(self, hostile: Hostile, seed: int) -> None:
        TestGarbage.before = TestGarbage.before or resident()
        code = esp(STACK) + random.Random(seed).randbytes(1 << 16)
        hostile(code, timeout=2)
        assert resident() - TestGarbage.before < 50 * MIB

    @pytest.mark.parametrize("seed", range(25))
    def test_64_bit(self, hostile: Hostile, each_engine: str, seed: int) -> None:
        TestGarbage.before = TestGarbage.before or resident()
        run = hostile(survivor(seed), long=True, timeout=2)
        if each_engine == "translator":
            assert run.stats["engine.exceptions"] > 1
        assert resident() - TestGarbage.before < 50 * MIB
