"""Accesses to devices by a guest of a few bytes: those that the engine's dispatch answers
by itself and those that go back to the bus must look the same to device and guest."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from struct import pack
from typing import Any

import pytest

from bunshin import Device, EngineError, Machine
from bunshin.bus import Bus
from bunshin.engine import native

pytestmark = pytest.mark.usefixtures("each_engine")

LOAD, PORT, GPA, RESULTS = 0x10_0000, 0xC00, 0xD000_0000, 0x18_0000
POWER_OFF = b"\xba\x05\x06\x00\x00\xb0\x34\xee\xf4"  # mov edx,0x605; mov al,0x34; out dx,al; hlt
ANSWER = 0x8877_6655_4433_2211


class Recorder(Device):
    """Remembers what came; answers with more bits than anybody asked for."""

    ports = range(PORT, PORT + 8)
    mmio = range(GPA, GPA + 0x10)
    name = "recorder"

    def __init__(self, width: int = 8) -> None:
        self.width = width
        self.seen: list[tuple[int, ...]] = []

    def read(self, offset: int, size: int) -> int:
        self.seen.append((offset, size))
        return ANSWER | 1 << 70

    def write(self, offset: int, size: int, value: int) -> None:
        self.seen.append((offset, size, value))


Guest = Callable[..., Machine]


@pytest.fixture
def guest(tmp_path: Path) -> Guest:
    """Make a machine that runs `code` in long mode: edx PORT, rbx GPA, rdi RESULTS; then power off."""

    def build(code: bytes, *devices: Device) -> Machine:
        code = b"\xba" + pack("<I", PORT) + b"\xbb" + pack("<I", GPA) + b"\xbf" + pack("<I", RESULTS) + code
        code += POWER_OFF
        path = tmp_path / "guest"
        ident = b"\x7fELF\x02\x01\x01" + bytes(9)
        head = ident + pack("<HHIQQQIHHHHHH", 2, 62, 1, LOAD, 64, 0, 0, 64, 56, 1, 0, 0, 0)
        path.write_bytes(
            head + pack("<IIQQQQQQ", 1, 7, 120, LOAD, LOAD, len(code), len(code), 1) + code,
        )
        return Machine(path, memory="32M", devices=devices)

    return build


def store(code: bytes) -> bytes:
    """`code`, then rax to the next result."""
    return b"\xb8\xff\xff\xff\xff" + code + b"\x48\xab"  # mov eax,-1; ...; stosq


READS = [
    (b"\xec", (0, 1)),  # in al,dx
    (b"\x66\xed", (0, 2)),  # in ax,dx
    (b"\xed", (0, 4)),  # in eax,dx
    (b"\x8a\x03", (0, 1)),  # mov al,[rbx]
    (b"\x66\x8b\x43\x02", (2, 2)),  # mov ax,[rbx+2]
    (b"\x8b\x43\x04", (4, 4)),  # mov eax,[rbx+4]
    (b"\x48\x8b\x43\x08", (8, 8)),  # mov rax,[rbx+8]
    (b"\x0f\xb6\x03", (0, 1)),  # movzx eax,byte [rbx]
    (b"\x48\x8b\x43\x0c", None),  # mov rax,[rbx+12]: half of it beyond the device
    (b"\x48\x33\x03", (0, 8)),  # xor rax,[rbx]
]


def expected(code: bytes, size: int) -> int:
    if code == b"\x48\x33\x03":
        return ANSWER ^ 0xFFFF_FFFF
    kept = 0xFFFF_FFFF if size < 4 and code[0] != 0x0F else 0
    return (kept >> 8 * size << 8 * size) | ANSWER & (1 << 8 * size) - 1


@pytest.mark.parametrize("width", [8, 1])
def test_reads(guest: Guest, width: int) -> None:
    device = Recorder(width)
    with guest(b"".join(store(code) for code, _ in READS), device) as machine:
        assert machine.run(30).kind == "power-off"
        found = memoryview(machine.memory.read(RESULTS, 8 * len(READS))).cast("Q")
        accesses = machine.stats()["device.recorder.reads"]
    wanted: list[tuple[int, ...]] = []
    for (code, access), value in zip(READS, found, strict=True):
        if access is None:
            assert value == 0xFFFF_FFFF_1111_1111 if width == 1 else value >> 32 == 0xFFFF_FFFF
            wanted += [(offset, 1) for offset in range(12, 16)]
            continue
        offset, size = access
        if width == 1:
            wanted += [(offset + at, 1) for at in range(size)]
        else:
            wanted.append(access)
            assert value == expected(code, size), code.hex()
    assert device.seen == wanted
    assert accesses == len(wanted)


def test_writes(guest: Guest) -> None:
    device = Recorder()
    code = b"\x48\xb8" + pack("<Q", ANSWER)  # mov rax,ANSWER
    code += b"\xee\x66\xef\xef"  # out dx,al; out dx,ax; out dx,eax
    code += b"\x88\x03\x66\x89\x43\x02\x89\x43\x04\x48\x89\x43\x08"  # mov [rbx],al ... mov [rbx+8],rax
    code += b"\xc7\x03\x78\x56\x34\x12"  # mov dword [rbx],0x12345678
    code += b"\x48\x89\x43\x0c"  # mov [rbx+12],rax: half of it behind the device
    with guest(code, device) as machine:
        assert machine.run(30).kind == "power-off"
        stats = machine.stats()
    plain = [
        *((0, 1, 0x11), (0, 2, 0x2211), (0, 4, 0x4433_2211)),
        *((0, 1, 0x11), (2, 2, 0x2211), (4, 4, 0x4433_2211), (8, 8, ANSWER), (0, 4, 0x1234_5678)),
    ]
    assert device.seen == [*plain, *((12 + at, 1, 0x11 + 0x11 * at) for at in range(4))]
    assert stats["device.recorder.writes"] == len(device.seen)
    assert stats["exits.mmio-write"] == 6


def test_strings_go_through_the_bus(guest: Guest) -> None:
    device = Recorder()
    code = b"\xbe" + pack("<I", LOAD) + b"\xb9\x04\x00\x00\x00\xf3\x6e"  # mov esi,LOAD; mov ecx,4; rep outsb
    code += b"\xb9\x03\x00\x00\x00\xf3\x66\x6d"  # mov ecx,3; rep insw
    with guest(code, device) as machine:
        assert machine.run(30).kind == "power-off"
        assert machine.memory.read(RESULTS, 6) == b"\x11\x22" * 3
    sent = [0xBA, *pack("<I", PORT)[:3]]
    assert device.seen == [*((0, 1, byte) for byte in sent), *[(0, 2)] * 3]


@pytest.mark.parametrize(
    ("code", "call"),
    [
        (b"\xec", r"read\(0x0, 1\) raised KeyError"),
        (b"\x89\x43\x04", r"write\(0x4, 4, 0x7\) raised ValueError"),
    ],
)
def test_a_failing_device_ends_the_run_and_leaves_the_state(guest: Guest, code: bytes, call: str) -> None:
    class Broken(Recorder):
        def read(self, offset: int, size: int) -> int:
            raise KeyError("gone")

        def write(self, offset: int, size: int, value: int) -> None:
            raise ValueError("no")

    with guest(b"\xb8\x07\x00\x00\x00" + code, Broken()) as machine:
        with pytest.raises(EngineError, match=f"device recorder: {call}") as caught:
            machine.run(30)
        assert isinstance(caught.value.__cause__, KeyError | ValueError)
        # The access is over: the state can be asked for and stands behind it.
        assert machine.registers["rip"] == LOAD + 15 + 5 + len(code)


def test_an_answer_that_is_no_number_names_the_device(guest: Guest) -> None:
    class Shy(Recorder):
        def read(self, offset: int, size: int) -> Any:
            return None

    with (
        guest(b"\xec", Shy()) as machine,
        pytest.raises(EngineError, match=r"device recorder: read\(0x0, 1\) raised TypeError"),
    ):
        machine.run(30)


def test_the_lock_is_held_around_every_access(guest: Guest) -> None:
    class Careful(Recorder):
        def read(self, offset: int, size: int) -> int:
            free: list[bool] = []
            other = threading.Thread(target=lambda: free.append(self.lock.acquire(blocking=False)))
            other.start()
            other.join()
            return int(free[0])

    with guest(store(b"\xec") + store(b"\x8b\x03"), Careful()) as machine:
        assert machine.run(30).kind == "power-off"
        assert machine.memory.read(RESULTS, 16) == pack("<QQ", 0xFFFF_FF00, 0)


def test_a_device_may_change_the_bus_and_stop_the_machine(guest: Guest) -> None:
    class Leaving(Recorder):
        machine: Machine

        def read(self, offset: int, size: int) -> int:
            self.machine.bus.remove(self)
            return 5

        def write(self, offset: int, size: int, value: int) -> None:
            self.machine.stop()

    device = Leaving()
    with guest(store(b"\xec") + store(b"\xec"), device) as machine:
        device.machine = machine
        assert machine.run(30).kind == "power-off"
        assert machine.memory.read(RESULTS, 16) == pack("<QQ", 0xFFFF_FF05, 0xFFFF_FFFF)
    device = Leaving()
    with guest(b"\xee\xeb\xfe", device) as machine:  # out dx,al; jmp $
        device.machine = machine
        assert machine.run(30).kind == "stopped"


def test_a_machine_with_its_devices_can_be_forgotten(guest: Guest) -> None:
    class Knowing(Recorder):
        machine: Machine

    device = Knowing()
    machine = guest(b"", device)
    device.machine = machine
    gone = weakref.ref(machine)
    del machine, device
    gc.collect()
    assert gone() is None


def test_ranges_must_not_overlap() -> None:
    bus, module = Bus(), native()
    bus.add_ports(0, 4, Recorder())
    bus.add_mmio(2, 4, Recorder())
    port, page = bus._ports[0], bus._ranges[0]
    dispatch = module.Dispatch()
    with pytest.raises(module.EngineError, match="overlap"):
        dispatch.replace([port, page], [])
    with pytest.raises(AttributeError):
        dispatch.replace([object()], [])
    assert dispatch.counts() == []
    before = sys.getrefcount(port)
    dispatch.replace([port], [])
    dispatch.replace([], [])
    assert sys.getrefcount(port) == before


def test_a_page_that_was_a_devices_can_become_memory(guest: Guest) -> None:
    device = Recorder()
    load = b"\x8b\x03"  # mov eax,[rbx]
    # The entry of the page directory for GPA, by way of CR3, into rsi.
    code = b"\x0f\x20\xd8\x48\x25\x00\xf0\xff\xff"  # mov rax,cr3; and rax,~0xfff
    code += b"\x48\x8b\x00\x48\x25\x00\xf0\xff\xff"  # mov rax,[rax]; and rax,~0xfff
    code += b"\x48\x8b\x40\x18\x48\x25\x00\xf0\xff\xff"  # mov rax,[rax+3*8]; and rax,~0xfff
    code += b"\x48\x8d\xb0" + pack("<I", 8 * 128)  # lea rsi,[rax+8*128]
    code += b"\xc7\x04\x25" + pack("<II", 0x20_0000, 0x1234_5678)  # mov dword [0x200000],0x12345678
    point = b"\x48\xc7\x06" + pack("<I", 0x20_0083)  # mov qword [rsi],0x200083
    back = b"\xb8" + pack("<I", GPA | 0x83) + b"\x48\x89\x06"  # mov eax,GPA|0x83; mov [rsi],rax
    flushes = [
        b"\x0f\x01\x3b",  # invlpg [rbx]
        b"\x0f\x20\xd8\x0f\x22\xd8",  # mov rax,cr3; mov cr3,rax
        b"\x0f\x20\xe0\x48\x0f\xba\xf8\x07\x0f\x22\xe0",  # mov rax,cr4; btc rax,7; mov cr4,rax
    ]
    for flush in flushes:
        code += store(load) + store(load) + point + flush + store(load)
        code += b"\xff\x03"  # inc dword [rbx]: memory now
        code += back + flush + store(load)
    with guest(code, device) as machine:
        assert machine.run(30).kind == "power-off"
        found = memoryview(machine.memory.read(RESULTS, 4 * 8 * len(flushes))).cast("Q").tolist()
        answer = ANSWER & 0xFFFF_FFFF
        assert found == [value for at in range(3) for value in (answer, answer, 0x1234_5678 + at, answer)]
    assert len(device.seen) == 3 * len(flushes)
