"""pvpanic: one port by which a dying kernel says that it died.

    offset  read                                    write
    0       events that are understood (bits 0, 1)  bit 0 panicked, bit 1 crash kernel loaded

Spec: QEMU docs/specs/pvpanic.rst. ACPI knows it as QEMU0001, Linux's pvpanic-mmio
driver binds to it. Hostile guest: can claim a panic and so end its own run.
"""

from __future__ import annotations

from collections.abc import Callable

from . import Device

PANICKED, CRASH_LOADED = 1, 2


class Pvpanic(Device):
    """Guest sees: a port that understands both events."""

    width = 1
    name = "pvpanic"

    def __init__(self, panicked: Callable[[], object]) -> None:
        """Wire the port: `panicked` is called when the guest says so."""
        self._panicked = panicked

    def read(self, offset: int, size: int) -> int:
        return PANICKED | CRASH_LOADED

    def write(self, offset: int, size: int, value: int) -> None:
        # A guest with a crash kernel goes on to run it.
        if value & PANICKED:
            self._panicked()
