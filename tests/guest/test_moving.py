"""Guests that move between engines while they run.

The guest computes a checksum over memory that it keeps changing, while its local APIC's
timer ticks: whatever a move loses shows in the sum, in the registers that it checks at
the end, in its ticks, or in a time-stamp counter that goes back.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from struct import pack, unpack

import pytest

from bunshin import Machine
from bunshin import engine as engines

LOAD, HANDLER, STATE, IDT, RAM = 0x10_0000, 0x10_0100, 0x17_0000, 0x17_1000, 32 << 20
SUM, TURNS, MOST, STOP, BROKEN, TICKS, IDT_POINTER = 0x00, 0x08, 0x10, 0x18, 0x20, 0x28, 0x40
CODE64 = 0x10
MOVES = 24
"""Moves of one guest in this suite; `python test_moving.py 1000` makes so many."""

GUEST = bytes.fromhex(
    "bc00001600"  # mov esp,0x160000
    "0f011c2540001700"  # lidt [STATE+IDT_POINTER]
    "0f20e0 0d00060000 0f22e0"  # mov rax,cr4; or eax,0x600; mov cr4,rax
    "b878563412 660f6ed8 d9e8"  # mov eax,0x12345678; movd xmm3,eax; fld1
    "bb0000e0fe"  # mov ebx,LAPIC
    "c783f0000000ff010000"  # mov dword [rbx+0xf0],0x1ff: enabled
    "c783e00300000b000000"  # mov dword [rbx+0x3e0],0xb: not divided
    "c7832003000020000200"  # mov dword [rbx+0x320],0x20020: periodic, vector 0x20
    "c7838003000040420f00"  # mov dword [rbx+0x380],1000000: 1 ms
    "fb 4531c0 4531c9"  # sti; xor r8d,r8d; xor r9d,r9d
    "49ba157c4a7fb979379e 4531e4"  # mov r10,0x9e3779b97f4a7c15; xor r12d,r12d
    # outer: the time-stamp counter must not go back
    "0f31 48c1e220 4809d0"  # rdtsc; shl rdx,32; or rax,rdx
    "4c39e0 7308 48ff042520001700"  # cmp rax,r12; jae later; inc qword [STATE+BROKEN]
    "4989c4"  # later: mov r12,rax
    "be00001800 b900040000"  # mov esi,0x180000; mov ecx,1024
    "488b06 4c01c0 49c1c107 4931c1"  # inner: mov rax,[rsi]; add rax,r8; rol r9,7; xor r9,rax
    "4d0fafca 488d0480 4c31c8"  # imul r9,r10; lea rax,[rax+rax*4]; xor rax,r9
    "488906 83c608 ffc9 75de"  # mov [rsi],rax; add esi,8; dec ecx; jnz inner
    "49ffc0 4c3b042510001700 730a"  # inc r8; cmp r8,[STATE+MOST]; jae done
    "803c251800170000 74a4"  # cmp byte [STATE+STOP],0; je outer
    "fa 660f7ed8 3d78563412 7506"  # done: cli; movd eax,xmm3; cmp eax,0x12345678; jne lost
    "d9e8 dff1 7408"  # fld1; fcomip st1; jz kept
    "48ff042520001700"  # lost: inc qword [STATE+BROKEN]
    "4c890c2500001700 4c89042508001700"  # kept: mov [STATE+SUM],r9; mov [STATE+TURNS],r8
    "66ba0506 b034 ee f4"  # mov dx,0x605; mov al,0x34; out dx,al; hlt
).ljust(HANDLER - LOAD, b"\x90") + bytes.fromhex(
    "50 48ff042528001700"  # push rax; inc qword [STATE+TICKS]
    "b80000e0fe c780b000000000000000"  # mov eax,LAPIC; mov dword [rax+0xb0],0: end of interrupt
    "58 48cf"  # pop rax; iretq
)  # fmt: skip


def gate(handler: int) -> bytes:
    """A 64-bit interrupt gate."""
    return pack("<HHHHII", handler & 0xFFFF, CODE64, 0x8E00, handler >> 16 & 0xFFFF, handler >> 32, 0)


def elf(code: bytes) -> bytes:
    """An ELF kernel without a PVH note, which starts in long mode at LOAD."""
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    head = ident + pack("<HHIQQQIHHHHHH", 2, 62, 1, LOAD, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    return head + pack("<IIQQQQQQ", 1, 7, 120, LOAD, LOAD, len(code), len(code), 1) + code


def summing(path: Path, most: int) -> bytes:
    """Write the guest to `path`, to end after `most` turns at the latest."""
    state = pack("<QQQQQQ", 0, 0, most, 0, 0, 0).ljust(IDT_POINTER, b"\0")
    state += (pack("<H", 0xFFF) + pack("<Q", IDT)).ljust(IDT - STATE - IDT_POINTER, b"\0")
    path.write_bytes(elf(GUEST.ljust(STATE - LOAD, b"\0") + state + gate(HANDLER) * 256))
    return state


def field(machine: Machine, offset: int) -> int:
    """One of the guest's figures."""
    value: int = unpack("<Q", machine.memory.read(STATE + offset, 8))[0]
    return value


def sum_without_moves(path: Path, turns: int) -> int:
    """What the guest computes in so many turns when it stays in the translator."""
    summing(path, turns)
    with Machine(path, memory=RAM >> 20, engine="translator") as machine:
        assert machine.run(300).kind == "power-off"
        assert field(machine, TURNS) == turns
        return field(machine, SUM)


def move_at_random(path: Path, moves: int, seed: int, longest: float = 0.01) -> tuple[int, int, int]:
    """Run the guest and move it so many times; its sum, turns and ticks."""
    chance = random.Random(seed)
    summing(path, 1 << 62)
    with Machine(path, memory=RAM >> 20, engine="kvm") as machine:
        machine.start()
        for n in range(moves):
            time.sleep(chance.uniform(0, longest))
            machine.switch_engine(("translator", "kvm")[n % 2])
        assert machine.engine_name == ("kvm", "translator")[moves % 2]
        ticks = field(machine, TICKS)
        while field(machine, TICKS) == ticks:
            assert machine.wait(0.01).kind == "timeout", machine.wait(0)
        machine.memory.write(STATE + STOP, b"\1")
        outcome = machine.wait(120)
        assert outcome.kind == "power-off", outcome
        assert machine.stats()["engine.switches"] == moves
        assert field(machine, BROKEN) == 0, "registers lost, or the time-stamp counter went back"
        return field(machine, SUM), field(machine, TURNS), field(machine, TICKS)


@pytest.fixture
def movable() -> None:
    """Skip where there is no KVM to move to."""
    found = engines.figures()
    if found["refusal"] is not None:
        pytest.skip(engines.decide(found).reason)


@pytest.mark.usefixtures("movable")
def test_a_sum_survives_moves_at_random_moments(tmp_path: Path) -> None:
    got, turns, ticks = move_at_random(tmp_path / "guest", MOVES, seed=turns_seed())
    assert turns > 1
    assert ticks > 1
    assert got == sum_without_moves(tmp_path / "guest", turns)


def turns_seed() -> int:
    """Another one in every run, shown when a test fails."""
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    return seed


if __name__ == "__main__":
    import sys
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        place, count = Path(folder) / "guest", int(sys.argv[1])
        started = time.monotonic()
        result, done, heard = move_at_random(place, count, turns_seed())
        took = time.monotonic() - started
        same = result == sum_without_moves(place, done)
        verdict = "right" if same else "WRONG"
        print(f"{count} moves in {took:.1f} s, {done} turns, {heard} ticks, the sum is {verdict}")
        sys.exit(not same)
