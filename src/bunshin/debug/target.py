"""A machine as the stub uses it: registers, memory, and who runs.

The stub speaks to a `Target`, so that it can be tried without a machine. `MachineTarget`
is the real one. Between `interrupt` and `resume` the machine is paused: its processors
stand still, and so does the guest's time.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from ..errors import ConfigError, EngineError
from . import registers
from .registers import State

if TYPE_CHECKING:
    from ..machine import Machine

PAGE = 4096
NO_INTERRUPTS, NO_TIMERS = 2, 4
"""Bits of QEMU's `sstep`; time stands still between steps here, whatever the second says."""


@dataclass(frozen=True)
class Stop:
    """A processor came to something that was asked for.

    Attributes:
        why: `breakpoint`, `step`, or the watchpoint that was met: `read`, `write`, `access`.
        gva: of the instruction or of the watchpoint's first byte.
    """

    cpu: int
    why: str
    gva: int = 0


Watch = tuple[int, int, str]
"""`(gva, length, kind)`; kind is `read`, `write` or `access`."""


Wanted = tuple[list[int], list[Watch], bool, bool]
"""What `Vcpu.set_debug` takes."""


@dataclass
class Points:
    """What all processors stop for."""

    breakpoints: set[int] = field(default_factory=set)
    watchpoints: set[Watch] = field(default_factory=set)


class Target(Protocol):
    """What the stub needs. Calls other than `interrupt` are for a stopped target."""

    cpus: int
    bits: int

    def state(self, cpu: int) -> State:
        """Registers of a processor, to be changed at will; `xsave` is a bytearray."""

    def set_state(self, cpu: int, state: State) -> None:
        """Put changed registers back. Raises ValueError when the engine refuses them."""

    def read(self, cpu: int, address: int, length: int, physical: bool) -> bytes:
        """As much as can be read from `address` on: maybe less than `length`, maybe nothing."""

    def write(self, cpu: int, address: int, data: bytes, physical: bool) -> bool:
        """Write all of it, or nothing and return False."""

    def translate(self, cpu: int, gva: int) -> int | None:
        """The gpa behind a gva of that processor."""

    def resume(self, steps: Collection[int], runs: Collection[int], points: Points, interrupts: bool) -> None:
        """Let some processors step and others run, all others stand still.

        Raises:
            ValueError: the engine cannot stop for all of `points`; nothing runs then.
        """

    def interrupt(self) -> None:
        """Stop all processors."""


class MachineTarget:
    """A machine that is looked at by a debugger."""

    def __init__(self, machine: Machine, bits: int) -> None:
        self.machine = machine
        self.cpus = machine.config.cpus
        self.bits = bits
        # What each processor was told last, so that it is told changes only.
        self._told: dict[int, Wanted | None] = {}

    def state(self, cpu: int) -> State:
        state = self.machine.cpu_registers(cpu)
        state["xsave"] = bytearray(state["xsave"])
        state["gpr"] = list(state["gpr"])
        return state

    def set_state(self, cpu: int, state: State) -> None:
        named = {registers.EFER, registers.KERNEL_GS_BASE}
        changed = {
            **state,
            "xsave": bytes(state["xsave"]),
            # What goes on with time stays as it is.
            "tsc": 0,
            "lapic": b"",
            "msrs": [(index, value) for index, value in state["msrs"] if index in named],
        }
        try:
            self.machine.on_cpu(cpu, lambda vcpu: vcpu.set_state(changed))
        except EngineError as error:
            raise ValueError(str(error)) from error

    def translate(self, cpu: int, gva: int) -> int | None:
        return self.machine.on_cpu(cpu, lambda vcpu: vcpu.translate(gva))

    def read(self, cpu: int, address: int, length: int, physical: bool) -> bytes:
        parts = []
        for gpa, size in self._pieces(cpu, address, length, physical):
            try:
                if gpa is None:
                    break
                parts.append(self.machine.memory.read(gpa, size))
            except ConfigError:
                break  # a device, or nothing: reading it could change it
        return b"".join(parts)

    def write(self, cpu: int, address: int, data: bytes, physical: bool) -> bool:
        memory = self.machine.memory
        pieces = self._pieces(cpu, address, len(data), physical)
        if any(gpa is None or not memory.contains(gpa, size) for gpa, size in pieces):
            return False
        at = 0
        for gpa, size in pieces:
            assert gpa is not None
            memory.write(gpa, data[at : at + size])
            at += size
        return True

    def _pieces(self, cpu: int, address: int, length: int, physical: bool) -> list[tuple[int | None, int]]:
        """The gpa and length of every page's part; None for a gpa that is not mapped."""
        end = min(address + length, 1 << 64)
        parts = []
        while address < end:
            size = min(end - address, PAGE - address % PAGE)
            parts.append((address, size))
            address += size
        if physical:
            return list(parts)
        return self.machine.on_cpu(cpu, lambda vcpu: [(vcpu.translate(at), size) for at, size in parts])

    def resume(self, steps: Collection[int], runs: Collection[int], points: Points, interrupts: bool) -> None:
        places = sorted(points.breakpoints), sorted(points.watchpoints)
        for cpu in {*steps, *runs}:
            wanted = (*places, cpu in steps, interrupts)
            # A step is asked for anew each time: what is left of one before is over.
            if cpu in steps or self._told.get(cpu) != wanted:
                self._told[cpu] = None
                self._tell(cpu, wanted)
                self._told[cpu] = wanted
        self.machine.hold(set(range(self.cpus)) - {*steps, *runs})
        self.machine.resume()

    def _tell(self, cpu: int, wanted: Wanted) -> None:
        try:
            self.machine.on_cpu(cpu, lambda vcpu: vcpu.set_debug(*wanted))
        except EngineError as error:
            raise ValueError(str(error)) from error

    def interrupt(self) -> None:
        if self.machine.status == "running":
            self.machine.pause()

    def forget(self) -> None:
        """Stop for nothing any more."""
        for cpu in self._told:
            self._tell(cpu, ([], [], False, False))
        self._told.clear()
        self.machine.hold(())
