"""The A20 gate from the guest's side: both ports move it, and memory answers.

The guest is an ELF file built here, entered by PVH at 1 MiB in 32-bit protected mode
without paging. It works at 2 MiB, where bit 20 of addresses is 0, since code above the
gate would vanish with it.
"""

from __future__ import annotations

from pathlib import Path
from struct import pack

import pytest

from bunshin import Machine

pytestmark = pytest.mark.usefixtures("each_engine")

ENTRY, WORK = 0x10_0000, 0x20_0000
BELOW, ABOVE = 0x20_0500, 0x30_0500
COM1, KEYBOARD, KEYBOARD_COMMAND, SYSTEM_CONTROL = 0x3F8, 0x60, 0x64, 0x92
POWER_OFF = (0x605, 0x34)  # the high byte of PM1a_CNT: SLP_EN, SLP_TYP 5


def out(port: int, value: int) -> bytes:
    return b"\x66\xba" + pack("<H", port) + b"\xb0" + bytes([value]) + b"\xee"  # mov dx; mov al; out


def store(gpa: int, value: bytes) -> bytes:
    return b"\xc6\x05" + pack("<I", gpa) + value  # mov byte [gpa],value


# mov al,[ABOVE]; mov dx,COM1; out dx,al
TELL = b"\xa0" + pack("<I", ABOVE) + b"\x66\xba" + pack("<H", COM1) + b"\xee"


def elf(segments: dict[int, bytes]) -> bytes:
    note = pack("<III4sI", 4, 4, 18, b"Xen\0", ENTRY)
    count = len(segments) + 1
    at = 52 + 32 * count
    out = b"\x7fELF\x01\x01\x01" + bytes(9)
    out += pack("<HHIIIIIHHHHHH", 2, 3, 1, ENTRY, 52, 0, 0, 52, 32, count, 0, 0, 0)
    out += pack("<8I", 4, at, 0, 0, len(note), len(note), 4, 4)
    at += len(note)
    for gpa, data in segments.items():
        out += pack("<8I", 1, at, gpa, gpa, len(data), len(data), 7, 1)
        at += len(data)
    return out + note + b"".join(segments.values())


def test_both_ports_move_the_gate(tmp_path: Path) -> None:
    work = store(BELOW, b"b") + store(ABOVE, b"a") + TELL
    work += out(SYSTEM_CONTROL, 0x00) + TELL
    work += out(KEYBOARD_COMMAND, 0xDF) + TELL
    work += out(KEYBOARD_COMMAND, 0xD1) + out(KEYBOARD, 0x01) + TELL
    work += out(SYSTEM_CONTROL, 0x02) + TELL
    work += out(*POWER_OFF) + b"\xfa\xf4"  # cli; hlt
    path = tmp_path / "guest"
    # mov ebx,WORK; jmp ebx
    path.write_bytes(elf({ENTRY: b"\xbb" + pack("<I", WORK) + b"\xff\xe3", WORK: work}))
    with Machine(kernel=path, memory="32M") as machine:
        assert machine.run(30).kind == "power-off"
        assert machine.console.read() == b"ababa"
