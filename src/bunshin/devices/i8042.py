"""Keyboard controller of the PC/AT, as far as a board without a keyboard needs it.

    port  read                                write
    0x60  output buffer                       data for the last command
    0x64  status: bit 0 output full,          command
          bit 2 passed self test, bit 3 last write was a command

Commands: 0x20 read command byte, 0x60 write it, 0xAA self test (answers 0x55),
0xA7 A8 AD AE disable and enable a port, 0xA9 AB test a port (answers 0), 0xD0 read
output port, 0xD1 write it (bit 0 low resets, bit 1 is the A20 gate), 0xDD DF close and
open the gate, 0xF0..0xFF pulse output lines (bit 0 low resets: 0xFE).

Spec: Intel 8042 as in the IBM PC/AT Technical Reference (1984), section 1,
"Keyboard Controller". Not modelled: keyboard, mouse, interrupts, password. The
firmware tables say that there is no keyboard controller, so Linux does not look for
one and only uses the reset line.

Hostile guest: can reset itself and close its own A20 gate, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import StateError
from . import Device

STATUS_OBF, STATUS_SYS, STATUS_CMD = 0x01, 0x04, 0x08
OUT_RESET, OUT_A20 = 0x01, 0x02


@dataclass
class I8042State:
    """Everything the guest can see of the controller."""

    command_byte: int = 0x30
    output: int = 0
    output_full: bool = False
    last_was_command: bool = False
    pending: int = 0


class _Port(Device):
    """One of the two ports; the controller sits behind both."""

    width = 1

    def __init__(self, owner: I8042, base: int) -> None:
        self.lock = owner.lock
        self.name = owner.name
        self._owner = owner
        self._base = base

    def read(self, offset: int, size: int) -> int:
        return self._owner.read(self._base, size)

    def write(self, offset: int, size: int, value: int) -> None:
        self._owner.write(self._base, size, value)


class I8042(Device):
    """The controller: offset 0 is port 0x60, offset 4 is port 0x64.

    Ports 0x61 to 0x63 are not its own, so it is put on the bus as `data` and
    `command`.
    """

    width = 1
    name = "i8042"
    state: I8042State

    def __init__(
        self,
        reset: Callable[[], object],
        a20: Callable[[bool], object] = lambda open_: None,
        a20_open: Callable[[], bool] = lambda: True,
    ) -> None:
        """Wire the controller: `reset` is the processor's reset line, `a20` moves the A20
        gate and `a20_open` tells where it stands.
        """
        self.state = I8042State()
        self._reset = reset
        self._a20 = a20
        self._a20_open = a20_open
        self.data = _Port(self, 0)
        self.command = _Port(self, 4)

    def read(self, offset: int, size: int) -> int:
        s = self.state
        if offset == 0:
            s.output_full = False
            return s.output
        if offset == 4:
            return (
                STATUS_SYS | (STATUS_OBF if s.output_full else 0) | (STATUS_CMD if s.last_was_command else 0)
            )
        return 0xFF

    def write(self, offset: int, size: int, value: int) -> None:
        s = self.state
        if offset == 0:
            s.last_was_command = False
            if s.pending == 0x60:
                s.command_byte = value
            elif s.pending == 0xD1:
                self._a20(bool(value & OUT_A20))
                if not value & OUT_RESET:
                    self._reset()
            s.pending = 0
        elif offset == 4:
            s.last_was_command = True
            s.pending = value if value in (0x60, 0xD1) else 0
            if value == 0x20:
                self._answer(s.command_byte)
            elif value == 0xAA:
                self._answer(0x55)
            elif value in (0xA9, 0xAB):
                self._answer(0x00)
            elif value == 0xD0:
                self._answer(OUT_RESET | (OUT_A20 if self._a20_open() else 0))
            elif value in (0xDD, 0xDF):
                self._a20(value == 0xDF)
            elif value in (0xA7, 0xA8):
                s.command_byte = s.command_byte & ~0x20 | (0x20 if value == 0xA7 else 0)
            elif value in (0xAD, 0xAE):
                s.command_byte = s.command_byte & ~0x10 | (0x10 if value == 0xAD else 0)
            elif value >= 0xF0 and not value & 1:
                self._reset()

    def check(self, state: I8042State) -> None:
        for value in (state.command_byte, state.output, state.pending):
            if not 0 <= value <= 0xFF:
                raise StateError("state-invalid", f"saved state of {self.name}: register out of range")

    def _answer(self, value: int) -> None:
        self.state.output = value
        self.state.output_full = True
