"""Lockstep: small guests that agree, and planted faults found at the exact instruction.

Guests are 64-bit code at LOAD, entered by Linux's protocol over identity page tables of
the first 4 GiB, with an IDT of their own. The code is written by hand; labels are found by
searching for the bytes behind them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from struct import pack
from subprocess import CompletedProcess

import pytest

from bunshin.config import MachineConfig
from bunshin.debug import lockstep
from bunshin.debug.lockstep import Report, differences, normal

LOAD, STACK, DATA, IDT, HANDLER, POINTER = 0x10_0000, 0x16_0000, 0x18_0000, 0x18_1000, 0x18_2000, 0x18_3000
PAGE_TABLE = 0x19_0000
"""A page table for the 2 MiB at MAPPED."""
MAPPED = 0x4000_0000 - 0x20_0000
CODE64 = 0x10
END = b"\x66\xba\x05\x06\xb0\x34\xee\xeb\xfe"  # mov dx,0x605; mov al,0x34; out dx,al; jmp $

Segments = dict[int, bytes]


def u32(value: int) -> bytes:
    return pack("<I", value & 0xFFFF_FFFF)


def u64(value: int) -> bytes:
    return pack("<Q", value)


def elf(segments: Segments) -> bytes:
    """An ELF kernel with `segments` by gpa, entered at LOAD in long mode."""
    at = 64 + 56 * (len(segments) + 1)
    out = b"\x7fELF\x02\x01\x01" + bytes(9)
    out += pack("<HHIQQQIHHHHHH", 2, 62, 1, LOAD, 64, 0, 0, 64, 56, len(segments) + 1, 0, 0, 0)
    out += pack("<IIQQQQQQ", 4, 4, at, 0, 0, 0, 0, 4)
    for gpa, data in segments.items():
        out += pack("<IIQQQQQQ", 1, 7, at, gpa, gpa, len(data), len(data), 1)
        at += len(data)
    return out + b"".join(segments.values())


def gate(handler: int) -> bytes:
    return pack("<HHHHII", handler & 0xFFFF, CODE64, 0x8E00, handler >> 16, 0, 0)


START = b"\xbc" + u32(STACK) + b"\x0f\x01\x1c\x25" + u32(POINTER)  # mov esp,STACK; lidt [POINTER]


def guest(code: bytes, handler: bytes = b"\x48\xcf") -> Segments:
    """`code` behind START, with an IDT whose vectors all lead to `handler` (iretq)."""
    return {
        LOAD: START + code,
        POINTER: pack("<HQ", 0xFFF, IDT),
        IDT: gate(HANDLER) * 256,
        HANDLER: handler,
    }


Lockstep = Callable[..., Report]


@pytest.fixture
def run(tmp_path: Path) -> Lockstep:
    """Run a guest in lockstep, with a planted fault or without."""

    def run(
        segments: Segments, plant: str | None = None, instructions: int = 100_000, grain: int = 1000
    ) -> Report:
        path = tmp_path / "guest"
        path.write_bytes(elf(segments))
        config = MachineConfig.check(kernel=path, memory="16M")
        return lockstep.run(config, instructions, plant, grain)

    return run


def at(code: bytes, piece: bytes) -> int:
    """The address of `piece` in `code` behind START."""
    assert code.count(piece) == 1
    return LOAD + len(START) + code.index(piece)


# Sums in a loop, with memory, the stack, flags across instructions and a string.
WORK = (
    b"\xb9\x10\x27\x00\x00"  # mov ecx,10000
    b"\x31\xc0\x31\xdb"  # xor eax,eax; xor ebx,ebx
    b"\x48\xff\xc0"  # again: inc rax
    b"\x48\x01\xc3"  # add rbx,rax
    b"\x48\x83\xd2\x00"  # adc rdx,0
     b"\x48\x89\x1c\x25" + u32(DATA)  # mov [DATA],rbx
    + b"\x53\x48\x0f\xba\xe3\x03\x5e"  # push rbx; bt rbx,3; pop rsi
    + b"\x48\x19\xff"  # sbb rdi,rdi
    + b"\xff\xc9\x75\xe4"  # dec ecx; jnz again
    + b"\xb9\x40\x00\x00\x00\xbf" + u32(DATA)  # mov ecx,64; mov edi,DATA
    + b"\xf3\x48\xab"  # rep stosq
    + b"\x0f\x31"  # rdtsc
    + b"\x48\x0f\xc7\xf0"  # rdrand rax
)  # fmt: skip


def pit(count: int, mode: int) -> bytes:
    """The PIT interrupts at vector 0x28 after `count` times 838 ns; in mode 2 again and again."""
    ports = (
        (0x20, 0x11), (0x21, 0x28), (0x21, 4), (0x21, 1), (0xA1, 0xFF), (0x21, 0xFE),
        (0x43, 0x30 | mode << 1), (0x40, count & 0xFF), (0x40, count >> 8),
    )  # fmt: skip
    # mov al,value; out port,al
    return b"".join(b"\xb0" + bytes([value]) + b"\xe6" + bytes([port]) for port, value in ports)


# Interrupts at 1 kHz, while a loop counts.
TIMER = (
    pit(0x4A9, 2)
    + b"\xfb\xb9\xa0\x86\x01\x00"  # sti; mov ecx,100000
    + b"\x48\xff\xc0\xff\xc9\x75\xf9"  # again: inc rax; dec ecx; jnz again
    + b"\xf4\xf4\xfa"  # hlt; hlt; cli
)  # fmt: skip
# push rax; mov al,0x20; out 0x20,al; pop rax; inc rbx; iretq
EOI = b"\x50\xb0\x20\xe6\x20\x58\x48\xff\xc3\x48\xcf"


def test_a_guest_agrees_to_its_end(run: Lockstep) -> None:
    report = run(guest(WORK + END))
    assert report.agreed, report
    assert "S5" in report.end
    # mov, xor, xor; 10000 turns of 9; mov, mov; stos, once; and what follows.
    assert report.count >= 3 + 10_000 * 9 + 8


def test_time_and_interrupts_come_to_both(run: Lockstep) -> None:
    report = run(guest(TIMER + END, EOI), instructions=1_000_000)
    assert report.agreed, report
    assert "S5" in report.end
    # The same once more is the same.
    assert run(guest(TIMER + END, EOI), instructions=1_000_000).count == report.count


def test_a_guest_that_sleeps_for_ever_ends(run: Lockstep) -> None:
    report = run(guest(b"\xfa\xf4"))  # cli; hlt
    assert report.agreed
    assert "nothing wakes it" in report.end


def test_a_triple_fault_comes_to_both(run: Lockstep) -> None:
    report = run({LOAD: b"\x0f\x0b"})
    assert report.agreed
    assert "triple fault" in report.end


def test_sti_at_the_end_of_a_page(run: Lockstep) -> None:
    """Its shadow reaches over the page's end: the interrupt comes behind HLT, not before."""
    setup = pit(2, 0) + b"\xb9\x4c\x04\x00\x00\xff\xc9\x75\xfc"  # wait; IF is clear
    room = 4096 - len(START) - len(setup) - 1
    code = setup + b"\x90" * room + b"\xfb" + b"\xf4\xfa" + END
    # What is on the stack is where HLT ended: the handler notes it.
    handler = b"\x48\x8b\x0c\x24" + EOI  # mov rcx,[rsp]
    report = run(guest(code, handler))
    assert report.agreed, report
    assert "S5" in report.end


@pytest.mark.parametrize(
    "behind",
    [
        b"\xeb\x00",  # jmp behind it
        b"\xe8\x00\x00\x00\x00\x5a",  # call behind it; pop rdx
        b"\x74\x00",  # jz behind it
        b"\xff\xe6",  # jmp rsi
        b"\x0f\x20\xdf\x0f\x22\xdf",  # mov rdi,cr3; mov cr3,rdi
        b"\x0f\x01\x3b",  # invlpg [rbx]
        b"\x0f\x22\xdf",  # mov cr3,rdi
        b"\x90",  # nop
    ],
)
def test_an_interrupt_that_waits_comes_behind_one_instruction_after_sti(run: Lockstep, behind: bytes) -> None:
    wait = b"\xb9\x4c\x04\x00\x00\xff\xc9\x75\xfc"  # mov ecx,1100; again: dec ecx; jnz again
    before = pit(2, 0) + wait + b"\x0f\x20\xdf\xbb" + u32(DATA)  # mov rdi,cr3; mov ebx,DATA
    target = LOAD + len(START) + len(before) + 5 + 1 + len(behind)
    before += b"\xbe" + u32(target)  # mov esi,target
    # The handler notes where it came from, and what had been counted by then.
    handler = b"\x4c\x8b\x04\x24\x49\x89\xc1" + EOI  # mov r8,[rsp]; mov r9,rax
    code = before + b"\xfb" + behind + b"\x48\xff\xc0" * 20 + END  # sti; ...; inc rax
    report = run(guest(code, handler), grain=0)
    assert report.agreed, report
    assert "S5" in report.end


# Planted faults -----------------------------------------------------------------------

STORE_CODE = 0x12_0000


def wrong_flag() -> tuple[Segments, int]:
    code = b"\x31\xc0\xb9\x64\x00\x00\x00\xff\xc9\x75\xfc\xf8\xf5\x48\x11\xc0" + END
    # xor eax,eax; mov ecx,100; again: dec ecx; jnz again; clc; cmc; adc rax,rax
    return guest(code), at(code, b"\xf5")


def fault_address() -> tuple[Segments, int]:
    # Address 2^45 + 0x123 is not mapped; the handler looks at CR2 and goes on behind it.
    address = (1 << 45) + 0x123
    code = b"\x48\xbb" + u64(address) + b"\x48\x8b\x03" + END  # mov rbx,address; mov rax,[rbx]
    # mov rdx,cr2; add rsp,8; add qword [rsp],3; iretq
    handler = b"\x0f\x20\xd2\x48\x83\xc4\x08\x48\x83\x04\x24\x03\x48\xcf"
    return guest(code, handler), at(code, b"\x48\x8b\x03")


def stale_code() -> tuple[Segments, int]:
    # A function that returns 1 is changed to return 2.
    call = b"\xbb" + u32(STORE_CODE) + b"\xff\xd3"  # mov ebx,STORE_CODE; call rbx
    code = call + b"\xc6\x43\x01\x02" + b"\xff\xd3\x90" + END  # mov byte [rbx+1],2; call rbx
    segments = guest(code)
    segments[STORE_CODE] = b"\xb8\x01\x00\x00\x00\xc3"  # mov eax,1; ret
    return segments, STORE_CODE


def stale_tlb() -> tuple[Segments, int]:
    # The page at MAPPED leads to DATA, then to DATA + 4096, after INVLPG.
    entry = PAGE_TABLE
    code = (
        b"\x48\xc7\x04\x25" + u32(DATA) + u32(0x11)  # mov qword [DATA],0x11
        + b"\x48\xc7\x04\x25" + u32(DATA + 0x800) + u32(0x22)  # mov qword [DATA+0x800],0x22
        + b"\x0f\x20\xda"  # mov rdx,cr3
        + b"\x48\x8b\x12\x48\x81\xe2" + u32(0xFFFF_F000 - (1 << 32))  # mov rdx,[rdx]; and rdx,~0xfff
        + b"\x48\x8b\x12\x48\x81\xe2" + u32(0xFFFF_F000 - (1 << 32))  # mov rdx,[rdx]; and rdx,~0xfff
        + b"\x48\xc7\x82" + u32(8 * 511) + u32(entry | 3)  # mov qword [rdx+8*511],PAGE_TABLE|3
        + b"\x48\xc7\x04\x25" + u32(entry) + u32(DATA | 3)  # the first page: DATA
        + b"\xbb" + u32(MAPPED)  # mov ebx,MAPPED
        + b"\x0f\x01\x3b"  # invlpg [rbx]: the large page that was there
        + b"\x0f\x20\xd8\x0f\x22\xd8"  # mov rax,cr3; mov cr3,rax
        + b"\x48\x8b\x0b"  # mov rcx,[rbx]
        + b"\x48\xc7\x04\x25" + u32(entry) + u32(DATA + 0x1000 | 3)
        + b"\x0f\x01\x3b"  # invlpg [rbx]
        + b"\x48\x8b\x33"  # mov rsi,[rbx]
        + END
    )  # fmt: skip
    return guest(code), at(code, b"\x48\x8b\x33")


def lost_window() -> tuple[Segments, int]:
    # The PIT's interrupt waits, STI lets it in behind the next instruction.
    setup = pit(2, 0)
    wait = b"\xb9\x4c\x04\x00\x00\xff\xc9\x75\xfc"  # mov ecx,1100; again: dec ecx; jnz again
    code = (
        setup + wait + b"\xfb\x48\x31\xc0\x48\xff\xc0\x48\xff\xc0" + END
    )  # sti; xor rax,rax; inc rax; inc rax
    return guest(code, EOI), at(code, b"\x48\xff\xc0\x48\xff\xc0")


PLANTED = {
    "wrong-flag": wrong_flag,
    "fault-address": fault_address,
    "stale-code": stale_code,
    "stale-tlb": stale_tlb,
    "lost-window": lost_window,
}


@pytest.mark.parametrize("plant", PLANTED)
def test_planted_faults_are_found_at_their_instruction(run: Lockstep, plant: str) -> None:
    segments, place = PLANTED[plant]()
    sound = run(segments, grain=0)
    assert sound.agreed, sound
    assert "S5" in sound.end
    report = run(segments, plant, grain=0)
    assert not report.agreed
    assert report.instruction.startswith(f"{place:#x}: "), report
    # What was translated from older bytes is right when it is made afresh.
    assert report.whole == (plant == "stale-code")
    assert report.before["rip"] == place
    assert report.found
    assert str(report).count("\n") > 4


@pytest.mark.parametrize("plant", ["wrong-flag", "fault-address", "stale-tlb"])
def test_faults_that_leave_a_trace_are_found_at_any_grain(run: Lockstep, plant: str) -> None:
    segments, place = PLANTED[plant]()
    for grain in (1, 7, 1000):
        report = run(segments, plant, grain=grain)
        assert report.instruction.startswith(f"{place:#x}: "), report


def test_the_command_line(tmp_path: Path, command: Callable[..., CompletedProcess[bytes]]) -> None:
    path = tmp_path / "guest"
    path.write_bytes(elf(wrong_flag()[0]))
    words = ("lockstep", "--kernel", str(path), "-m", "16M", "--grain", "0")
    done = command(*words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"agreed for 2")
    done = command(*words, "--plant", "wrong-flag")
    assert done.returncode == 1
    assert b": f5: cmc\n" in done.stdout
    assert b"rflags: translated 0x" in done.stdout
    for bad in (("--plant", "nothing"), ("-n", "many"), ("--grain", "-1"), ("tiny",)):
        done = command(*words, *bad)
        assert done.returncode in {2, 7}, done.stderr
        assert done.stderr.count(b"\n") == 1


def test_a_boot_agrees(tiny: dict[str, str]) -> None:
    config = MachineConfig.check(
        kernel=tiny["kernel"], initrd=tiny["initrd"], memory="128M", append="console=ttyS0 tsc=reliable"
    )
    report = lockstep.run(config, 2_000_000)
    assert report.agreed, report
    assert report.count == 2_000_000


def test_states_in_normal_form() -> None:
    state = {
        "gpr": [0] * 16,
        "rip": 0,
        "rflags": 2,
        "xsave": bytes(2688),
        "msrs": [(1, 2)],
        "segments": [{}] * 6,
    }
    used = bytearray(2688)
    # x87 and SSE in use, and as after reset; an address of the last x87 instruction.
    used[0:2] = b"\x7f\x03"
    used[8] = 0x55
    used[512] = 3
    assert differences(state, {**state, "xsave": bytes(used)}) == []
    assert normal(state)["xsave"][:2] == b"\x7f\x03"
    used[160] = 1
    other = {**state, "xsave": bytes(used), "rip": 1, "gpr": [0] * 15 + [7], "msrs": [(1, 3)]}
    found = differences(state, other)
    assert [what for what, _, _ in found] == ["r15", "rip", "xmm, byte 0xa0 of xsave", "msr 0x1"]
