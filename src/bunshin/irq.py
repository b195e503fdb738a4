"""Interrupt lines: from a device's pin to an input (gsi) of the interrupt controller.

Several pins may share one gsi; the input is high while any of them is high, as on
a board with wired-OR lines. Whether a level or an edge counts is the controller's
business, set up by the guest.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock


class IrqLine:
    """A device's end of an interrupt line.

    A line that was never connected does nothing, so a device can be built and
    tested before it is on a board.
    """

    __slots__ = ("_drive", "level")

    def __init__(self, drive: Callable[[bool], None] | None = None) -> None:
        self._drive = drive
        self.level = False

    def connect(self, drive: Callable[[bool], None]) -> None:
        """Solder the line to `drive(level)`; a level that is already high is passed on."""
        self._drive = drive
        if self.level:
            drive(True)

    def set(self, level: bool) -> None:
        """Drive the line; nothing happens when it has that level already."""
        if level != self.level:
            self.level = level
            if self._drive is not None:
                self._drive(level)

    def raise_(self) -> None:
        """Drive the line high."""
        self.set(True)

    def lower(self) -> None:
        """Drive the line low."""
        self.set(False)

    def pulse(self) -> None:
        """Low to high to low: one interrupt on an edge-triggered input."""
        self.set(True)
        self.set(False)

    def restore(self, level: bool) -> None:
        """Take over a saved level without making an edge.

        The engine's interrupt controller carries its own saved inputs; driving
        the line here would deliver the same interrupt twice.
        """
        self.level = level


class IrqLines:
    """All lines of one machine, wired to `set_irq(gsi, level)` of its engine."""

    def __init__(self, set_irq: Callable[[int, bool], None]) -> None:
        self._set_irq = set_irq
        self._high: dict[int, set[int]] = {}
        self._pins = 0
        self._lock = Lock()

    def line(self, gsi: int) -> IrqLine:
        """A new pin on input `gsi`."""
        return IrqLine(self.drive(gsi))

    def drive(self, gsi: int) -> Callable[[bool], None]:
        """A new pin on input `gsi`, as the function that drives it."""
        with self._lock:
            self._pins += 1
            pin = self._pins
            high = self._high.setdefault(gsi, set())

        def drive(level: bool) -> None:
            with self._lock:
                before = bool(high)
                if level:
                    high.add(pin)
                else:
                    high.discard(pin)
                if bool(high) != before:
                    self._set_irq(gsi, level)

        return drive

    def disconnect(self) -> None:
        """Cut all lines off the engine; driving them does nothing from now on."""
        with self._lock:
            self._set_irq = lambda gsi, level: None
