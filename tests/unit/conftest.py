"""A native module in Python: guests are generators that yield exits and get replies."""

from __future__ import annotations

import mmap
import queue
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from struct import pack
from types import SimpleNamespace
from typing import Any

import pytest

from bunshin import engine

Guest = Callable[[], Generator[Any, Any, None]]
KINDS = SimpleNamespace(
    PIO_IN=0, PIO_OUT=1, MMIO_READ=2, MMIO_WRITE=3, HYPERCALL=4, DEBUG=5, KICKED=6, SHUTDOWN=7,
    FAILED=8,
)  # fmt: skip


NOTHING: dict[str, Any] = {
    "refusal": None, "trouble": None, "machine": False, "long_mode": False, "instruction_ns": 0.0,
    "cmpxchg16b": False, "xsave": None, "slots": 0, "cpus": 0, "took_us": 40,
}  # fmt: skip
RUNS = NOTHING | {"machine": True, "long_mode": True, "slots": 32764, "cpus": 1024}
FIGURES: dict[str, dict[str, Any]] = {
    "no node": NOTHING | {"refusal": "kvm-absent"},
    "no permission": NOTHING | {"refusal": "kvm-permission"},
    "another node": NOTHING | {"refusal": "kvm"},
    "healthy": RUNS | {"instruction_ns": 0.34, "cmpxchg16b": True, "xsave": True, "took_us": 3900},
    # A nested host of the emulating kind, as it was measured.
    "emulated": RUNS | {
        "instruction_ns": 553.2, "took_us": 4082,
        "trouble": "KVM on this host cannot emulate an instruction at rip 0x8030 "
        "(bytes f0 48 0f c7 0e 0f 94 c0 22 46 08 5b e6 82 e6)",
    },
}  # fmt: skip
"""Figures of `_native.probe_kvm` on several kinds of host."""


class FakeEngineError(Exception):
    """As `_native.EngineError`."""


class FakeRegion(mmap.mmap):
    """As `_native.Region`; pages cost nothing until they are touched."""

    def __new__(cls, length: int) -> FakeRegion:
        return super().__new__(cls, -1, length)


class FakeVcpu:
    """Runs a generator; one that has ended waits as in HLT, for a kick."""

    def __init__(self, engine: FakeEngine, guest: Guest | None) -> None:
        self.engine = engine
        self.guest = guest() if guest else None
        self.kicks: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.thread: int | None = None
        self.loaded: dict[str, Any] = {}
        self.due = False
        self.length = 0
        self.pages: dict[int, int] = {}
        self.skipped: list[int] = []
        self.running = False

    def run(self, reply: Any = None) -> Any:
        self._answer(reply)
        if not self.kicks.empty():
            self.kicks.get()
            if reply is not None:
                self.kept = reply
            return KINDS.KICKED, 0, 0, None
        exit = None if self.guest is None else self._next(reply)
        if exit is None:
            self.guest = None
            self.running = True
            self.kicks.get()
            self.running = False
            return KINDS.KICKED, 0, 0, None
        self.due = exit[0] in (KINDS.PIO_IN, KINDS.MMIO_READ, KINDS.HYPERCALL)
        self.length = exit[2] * exit[3] if exit[0] == KINDS.PIO_IN and exit[3] > 1 else 0
        return exit

    def serve(self, dispatch: FakeDispatch, reply: Any = None) -> Any:
        """As the real one where no access is plain: every exit goes to the bus."""
        return self.run(reply)

    def complete(self, reply: Any = None) -> None:
        self._answer(reply)
        if self.guest is not None:
            self.kept = reply

    def state(self) -> dict[str, Any]:
        assert not self.due, "the last exit is not complete"
        assert self.thread in (None, threading.get_ident()), "another thread's processor"
        return dict(self.loaded)

    def set_state(self, state: dict[str, Any]) -> None:
        self.loaded = state

    def skip_time(self, ticks: int) -> None:
        assert self.thread in (None, threading.get_ident()), "another thread's processor"
        self.skipped.append(ticks)

    def kick(self) -> None:
        self.kicks.put(None)

    def translate(self, gva: int) -> int | None:
        page = self.pages.get(gva >> 12)
        return None if page is None else page << 12 | gva & 0xFFF

    def stats(self) -> dict[str, int]:
        if self.running:
            raise FakeEngineError("busy", "in use by another thread")
        return {"blocks": 7}

    def _next(self, reply: Any) -> Any:
        assert self.guest is not None
        if not hasattr(self, "started"):
            self.started = True
            return next(self.guest, None)
        if reply is None:
            reply = self.__dict__.pop("kept", None)
        self.__dict__.pop("kept", None)
        try:
            return self.guest.send(reply)
        except StopIteration:
            return None

    def _answer(self, reply: Any) -> None:
        if self.thread is None:
            self.thread = threading.get_ident()
        assert self.thread == threading.get_ident(), "another thread's processor"
        if self.due:
            assert reply is not None, "an exit was not answered"
            assert not self.length or len(reply) == self.length, "a string was not answered whole"
        self.due = False


class FakeEngine:
    """RAM and a list of what happened on the interrupt lines."""

    def __init__(self, native: FakeNative, name: str, cpus: int, movable: bool) -> None:
        if native.refuse:
            raise FakeEngineError("no-bmi2", "the host's processor lacks BMI2")
        self.native = native
        self.name = name
        self.cpus = cpus
        self.movable = movable
        self.slots: list[tuple[int, FakeRegion, int]] = []
        self.levels: list[tuple[int, bool]] = []
        self.tsc = 0
        native.engines.append(self)

    def switch(self, name: str) -> None:
        assert all(vcpu.thread is None or not vcpu.running for vcpu in self.native.vcpus)
        if not self.movable:
            raise FakeEngineError("engine-switch", "the guest was told of AVX")
        self.name = name

    def host_tsc(self) -> int:
        return self.tsc

    def map(self, gpa: int, region: FakeRegion, offset: int, length: int) -> None:
        self.slots.append((gpa, region, length))

    def read(self, gpa: int, length: int) -> bytes:
        for base, region, size in self.slots:
            if base <= gpa and gpa + length <= base + size:
                return bytes(region[gpa - base : gpa - base + length])
        raise FakeEngineError("not-ram", f"gpa {gpa:#x}")

    def write(self, gpa: int, data: bytes) -> None:
        for base, region, size in self.slots:
            if base <= gpa and gpa + len(data) <= base + size:
                region[gpa - base : gpa - base + len(data)] = data
                return
        raise FakeEngineError("not-ram", f"gpa {gpa:#x}")

    def set_a20(self, open: bool) -> None:
        pass

    def set_irq(self, gsi: int, level: bool) -> None:
        self.levels.append((gsi, level))

    def vcpu(self, index: int) -> FakeVcpu:
        guests = self.native.guests
        vcpu = FakeVcpu(self, guests[index] if index < len(guests) else None)
        self.native.vcpus.append(vcpu)
        return vcpu


class FakeDispatch:
    """Knows who sits where and answers nothing."""

    def __init__(self) -> None:
        self.places: tuple[list[Any], list[Any]] = ([], [])

    def replace(self, ports: list[Any], mmio: list[Any]) -> None:
        self.places = ports, mmio

    def counts(self) -> list[tuple[Any, int, int]]:
        return []

    def exits(self) -> dict[int, int]:
        return {}


class FakeNative:
    """As the module `bunshin._native`; `guests` holds what each processor runs."""

    EngineError = FakeEngineError
    Region = FakeRegion
    Dispatch = FakeDispatch

    def __init__(self) -> None:
        self.guests: list[Guest] = []
        self.engines: list[FakeEngine] = []
        self.vcpus: list[FakeVcpu] = []
        self.refuse = False
        self.perf_maps: list[tuple[str, list[tuple[int, str]]]] = []
        vars(self).update(vars(KINDS))

    def perf_map(self, path: str, symbols: list[tuple[int, str]]) -> None:
        self.perf_maps.append((path, symbols))

    def probe_kvm(self) -> dict[str, Any]:
        return FIGURES["no node"]

    def Engine(self, name: str, cpus: int = 1, movable: bool = False) -> FakeEngine:
        return FakeEngine(self, name, cpus, movable)


@pytest.fixture
def figures() -> dict[str, dict[str, Any]]:
    """`FIGURES`."""
    return FIGURES


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> FakeNative:
    """The fake in the place of the native module."""
    fake = FakeNative()
    monkeypatch.setattr(engine, "native", lambda: fake)
    monkeypatch.setattr(engine, "figures", fake.probe_kvm)
    return fake


def make_elf(
    pvh: int | None = 0x100_0040,
    paddr: int = 0x100_0000,
    data: bytes = b"\x90" * 64,
    memsz: int | None = None,
    entry: int = 0x100_0000,
    bits: int = 64,
) -> bytes:
    """An ELF kernel with one segment and, with `pvh`, a note."""
    wide = bits == 64
    note = b""
    if pvh is not None:
        desc = pvh.to_bytes(8 if wide else 4, "little")
        # Another vendor's note of the same type comes first and must not be taken.
        note = pack("<III4sI", 4, 4, 18, b"Odd\0", 0xDEAD) + pack("<III4s", 4, len(desc), 18, b"Xen\0")
        note += desc
    head, entry_size = (64, 56) if wide else (52, 32)
    count = 2 if note else 1
    note_at = head + entry_size * count
    data_at = note_at + len(note)
    memsz = len(data) if memsz is None else memsz
    ident = b"\x7fELF" + bytes([2 if wide else 1, 1, 1]) + bytes(9)
    if wide:
        out = ident + pack("<HHIQQQIHHHHHH", 2, 62, 1, entry, 64, 0, 0, 64, 56, count, 0, 0, 0)
        out += pack("<IIQQQQQQ", 1, 7, data_at, 0xFFFF_FFFF_8100_0000, paddr, len(data), memsz, 4096)
        if note:
            out += pack("<IIQQQQQQ", 4, 4, note_at, 0, 0, len(note), len(note), 4)
    else:
        out = ident + pack("<HHIIIIIHHHHHH", 2, 3, 1, entry, 52, 0, 0, 52, 32, count, 0, 0, 0)
        out += pack("<8I", 1, data_at, 0xC100_0000, paddr, len(data), memsz, 7, 4096)
        if note:
            out += pack("<8I", 4, note_at, 0, 0, len(note), len(note), 4, 4)
    return out + note + data


@pytest.fixture
def elf() -> Callable[..., bytes]:
    """`make_elf`."""
    return make_elf


@pytest.fixture
def kernel(tmp_path: Path) -> str:
    """The path of a kernel that can be loaded."""
    path = tmp_path / "vmlinux"
    path.write_bytes(make_elf())
    return str(path)
