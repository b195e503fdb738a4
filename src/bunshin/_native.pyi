"""The engine boundary as Python sees it. Conversions only; see ARCHITECTURE.md."""

import os
from typing import Any, Final, Protocol, Self, final

from typing_extensions import Buffer

__all__ = [
    "DEBUG",
    "FAILED",
    "HYPERCALL",
    "KICKED",
    "MMIO_READ",
    "MMIO_WRITE",
    "PIO_IN",
    "PIO_OUT",
    "SHUTDOWN",
    "Dispatch",
    "Engine",
    "EngineError",
    "Region",
    "Vcpu",
    "__version__",
    "direct_execution",
    "disassemble",
    "host_features",
    "perf_map",
    "probe_kvm",
    "tsc_hz",
]

class EngineError(Exception):
    """The host or the engine refused; `args == (slug, sentence)`.

    Slugs of this module, besides the engine's own: `engine-name`, `not-ram`,
    `memory-size`, `memory-map`, `host-memory`, `debug`; `busy` (another thread uses the
    vcpu), `wrong-thread`, `reply` (not what the last exit wants), `incomplete`
    (the last exit has no answer yet), `cpu-state`, `engine-panic`.
    """

@final
class Region(Buffer):
    """A block of zero-filled host memory that can be mapped as guest RAM.

    Supports the buffer protocol (writable): `memoryview(region)` is a live view.
    """

    def __new__(cls, length: int) -> Self:
        """Reserve `length` bytes, a multiple of 4096. Raises EngineError."""
    def __len__(self) -> int: ...
    def difference(self, other: Region, start: int = 0) -> int | None:
        """The first offset at or behind `start` where two regions of the same length differ.

        Raises EngineError (`memory-size`) when the lengths differ.
        """

PIO_IN: Final[int]
PIO_OUT: Final[int]
MMIO_READ: Final[int]
MMIO_WRITE: Final[int]
HYPERCALL: Final[int]
DEBUG: Final[int]
KICKED: Final[int]
SHUTDOWN: Final[int]
FAILED: Final[int]

_Exit = tuple[int, int, int, Any]
"""`(kind, address, size, value)`.

PIO_IN      port, size, count (int)            reply: int, or bytes when count > 1
PIO_OUT     port, size, int, or bytes when several elements
MMIO_READ   gpa, size, None                    reply: int
MMIO_WRITE  gpa, size, int
HYPERCALL   number, 0, None                    reply: int
DEBUG       gva, 0, why (str): `breakpoint` before the instruction at gva; `read`, `write`
            or `access` behind one that did so to the watchpoint that begins at gva;
            `step` (gva 0)
KICKED      0, 0, None
SHUTDOWN    0, 0, sentence (str)
FAILED      0, 0, sentence (str)
"""

@final
class Engine:
    """Processors, memory map and interrupt controllers of one machine."""

    def __new__(cls, name: str, cpus: int = 1, plant: str | None = None, movable: bool = False) -> Self:
        """Create the engine called `name` ("kvm", "translator", "direct"). Raises EngineError.

        The guest of a `movable` one, and of "kvm", is told only of what both engines
        keep: it can `switch`. With `plant` the translator does something wrong, for trying
        those who judge engines: `wrong-flag`, `fault-address`, `stale-code`, `stale-tlb` or
        `lost-window`.
        """
    def switch(self, name: str) -> None:
        """Let the engine `name` run the machine; all processors stand, their exits complete.

        Raises EngineError: it cannot be had, or cannot keep what the guest was told; the
        machine is as it was then.
        """
    @property
    def name(self) -> str: ...
    @property
    def tsc_hz(self) -> int: ...
    def host_tsc(self) -> int:
        """The host's time-stamp counter now."""
    def map(self, gpa: int, region: Region, offset: int, length: int, readonly: bool = False) -> None: ...
    def unmap(self, gpa: int, length: int) -> None: ...
    def read(self, gpa: int, length: int) -> bytes:
        """Copy out of guest RAM. Raises EngineError where it is not RAM."""
    def write(self, gpa: int, data: Buffer) -> None:
        """Copy into guest RAM (ROM too) and drop translations of changed code."""
    def set_irq(self, gsi: int, level: bool) -> None: ...
    def set_a20(self, open: bool) -> None:
        """Open or close the A20 gate: closed, bit 20 of every gpa is forced to 0."""
    def set_time(self, ns: int | None) -> None:
        """Let the guest's clocks stand at `ns` nanoseconds; None: run with the host's.

        Raises EngineError (`time`): this engine's time cannot be scripted.
        """
    def send_msi(self, address: int, data: int) -> None: ...
    def doorbell(self, address: int, size: int, value: int | None, event: int) -> None: ...
    def take_dirty(self, gpa: int, length: int) -> bytes: ...
    def vcpu(self, index: int) -> Vcpu: ...

class _Range(Protocol):
    """One device at one place: the addresses `[base, end)`, accesses up to `width` bytes.

    `lock` (with `acquire` and `release`) is held around every call. When `read` or
    `write` raises, `failed` says what `Vcpu.serve` is to raise.
    """

    base: int
    end: int
    width: int
    lock: Any
    def read(self, offset: int, size: int, /) -> int: ...
    def write(self, offset: int, size: int, value: int, /) -> object: ...
    def failed(self, error: BaseException, offset: int, size: int, value: int | None, /) -> BaseException: ...

@final
class Dispatch:
    """Which device answers at which port and gpa, for `Vcpu.serve`; one for a machine."""

    def __new__(cls) -> Self: ...
    def replace(self, ports: list[Any], mmio: list[Any]) -> None:
        """Take over the ranges (see `_Range`) of the port space and of the MMIO space.

        Ranges that stay keep their counts. Raises EngineError (`overlap`).
        """
    def counts(self) -> list[tuple[Any, int, int]]:
        """`(range, reads, writes)` of every range, as far as they were answered here."""
    def exits(self) -> dict[int, int]:
        """Exits answered here, by kind."""

@final
class Vcpu:
    """One virtual processor; `run` and `complete` belong to one thread."""

    def run(self, reply: int | bytes | None = None) -> _Exit:
        """Answer the last exit and run until the next one; the GIL is released.

        Raises EngineError (`reply`) when the exit wants an answer of another
        shape and (`busy`, `wrong-thread`) from a second thread; nothing ran then.
        An answer to an exit that wants none is ignored. A panic in the engine is
        a FAILED exit, now and ever after.
        """
    def serve(self, dispatch: Dispatch, reply: int | bytes | None = None) -> _Exit:
        """Run as `run` does, and answer exits to the devices of `dispatch` by calling them.

        Returns the first exit that is not one plain access to one device: strings,
        accesses that are wider than the device or straddle its end, absent addresses,
        and everything that is no access. When a device raises, its access has been
        answered with 0 by the time the error arrives here.
        """
    def complete(self, reply: int | bytes | None = None) -> _Exit | None:
        """Answer the last exit and finish its instruction without running on.

        An exit that comes back belongs to the same instruction and wants its answer too;
        after None the state can be taken.
        """
    def state(self) -> dict[str, Any]:
        """The architectural state: the fields of CpuState by name.

        Raises EngineError (`incomplete`) while the last exit has no answer.
        """
    def set_state(self, state: dict[str, Any]) -> None:
        """Replace the state; an exit that waited for its answer is forgotten.

        A `tsc` of 0, an empty `lapic` and model-specific registers that are not named
        leave what they stand for as it is.

        Raises EngineError (`cpu-state`) when it does not have those fields.
        """
    def set_debug(
        self,
        breakpoints: list[int] = ...,
        watchpoints: list[tuple[int, int, str]] = ...,
        step: bool = False,
        interrupts: bool = False,
        count: int | None = None,
        early: bool = False,
    ) -> None:
        """From the next run on, come back with DEBUG for this and for nothing else.

        The guest does not notice: neither its memory nor its debug registers are used.

        Args:
            breakpoints: gva (linear) of instructions; `run` stops before one, also if it is
                the first of the run.
            watchpoints: `(gva, length in bytes, "read" | "write" | "access")`; `run` stops
                behind the instruction that does so.
            step: execute one instruction, whatever breakpoint is on it, and stop.
            interrupts: deliver interrupts while stepping; otherwise they wait.
            count: stop with `step` after so many instructions, or when the processor halts.
                With `step` they are executed one by one, otherwise as always. One counts
                that was attempted, a repeated string instruction once, interrupts do not.
            early: with `count`, stop where the engine comes to the end of what it executes
                in one piece.
        Raises:
            EngineError: `debug`: more than the engine can hold, or no range of addresses.
        """
    def executed(self) -> int:
        """Instructions executed in runs with a `count`, ever."""
    def skip_time(self, ticks: int) -> None:
        """Take ticks of `Engine.host_tsc` out of the guest's time, all its clocks and timers."""
    def kick(self) -> None:
        """Make `run` return KICKED soon; any thread."""
    def translate(self, gva: int) -> int | None:
        """gva to gpa whatever its rights, None where unmapped; the guest does not notice."""
    def stats(self) -> dict[str, int]: ...

def tsc_hz() -> int:
    """Rate of the host's time-stamp counter in Hz."""

def disassemble(code: bytes, bits: int, ip: int) -> tuple[str, int]:
    """The first instruction of code of 16, 32 or 64 bits as text, and its length in bytes."""

def probe_kvm() -> dict[str, Any]:
    """What KVM on this host is worth, measured with a throwaway machine in some milliseconds.

    refusal         why /dev/kvm does not open: `kvm-absent`, `kvm-permission`, `kvm`; or None
    trouble         a sentence: why there was no machine, or why its guest ended early; or None
    machine         it made a machine with memory, processor and interrupt controllers (bool)
    long_mode       the guest's first instruction in long mode was executed (bool)
    instruction_ns  nanoseconds of a simple instruction in supervisor mode; 0.0 unless measured
    cmpxchg16b      it works there (bool)
    xsave           XSAVE and XRSTOR do; None where they are not offered
    slots, cpus     pieces of memory and processors that KVM takes
    took_us         microseconds that it took
    """

def perf_map(path: str | os.PathLike[str], symbols: list[tuple[int, str]]) -> None:
    """Write names of translated code to `path` from now on, as perf's JIT maps want them.

    For the whole process; machines that exist already are not named. `symbols` is the
    guest's: address and name of supervisor code. Raises EngineError (`perf-map`).
    """

def direct_execution() -> bool:
    """Whether the host gives breakpoints for direct execution.

    Raises:
        EngineError: it is not possible here; the sentence says why.
    """

def host_features() -> dict[str, bool]:
    """What the translator needs of the host processor, by name: bmi2, fsgsbase, avx2, ..."""

__version__: Final[str]
