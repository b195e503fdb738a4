"""System control port A of the PS/2: the A20 gate and a fast reset.

    port  read, write
    0x92  bit 0 a change to 1 resets the processor, bit 1 A20 gate (1: open)

While the gate is closed, bit 20 of physical addresses is forced to 0, as on the first
PCs. The keyboard controller has a line of its own to the same gate; here the last one
to speak decides.

Spec: IBM Personal System/2 Hardware Interface Technical Reference, "System Control
Port A (Hex 0092)". Not modelled: watchdog, security lock, disk lights. The gate is
open after power-on, as firmware would leave it.

Hostile guest: can close its own gate and reset itself, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from . import Device

RESET, A20 = 0x01, 0x02


@dataclass
class Port92State:
    """Everything the guest can see of the port."""

    a20: bool = True
    reset: bool = False


class Port92(Device):
    """Guest sees: the gate's position, whoever set it."""

    width = 1
    name = "port92"
    state: Port92State

    def __init__(self, gate: Callable[[bool], object], reset: Callable[[], object]) -> None:
        """Wire the port: `gate` opens and closes A20, `reset` is the processor's line."""
        self.state = Port92State()
        self._gate = gate
        self._reset = reset

    def read(self, offset: int, size: int) -> int:
        return (A20 if self.state.a20 else 0) | (RESET if self.state.reset else 0)

    def write(self, offset: int, size: int, value: int) -> None:
        self.a20(bool(value & A20))
        before, self.state.reset = self.state.reset, bool(value & RESET)
        if self.state.reset and not before:
            self._reset()

    def a20(self, open_: bool) -> None:
        """Move the gate: also the keyboard controller's line."""
        with self.lock:
            if self.state.a20 != open_:
                self.state.a20 = open_
                self._gate(open_)

    def load(self, packed: Any) -> None:
        super().load(packed)
        self._gate(self.state.a20)

    def reset(self) -> None:
        super().reset()
        self._gate(self.state.a20)
