"""Guest RAM: where it lies in guest-physical space, and copies in and out.

    0                      RAM below the hole, up to 3 GiB
    0xC000_0000            the hole: devices, IOAPIC, LAPIC, firmware
    0x1_0000_0000          the rest of RAM

The guest may write any byte of RAM at any moment, so what was read once must not be
read again and expected to be the same.
"""

from __future__ import annotations

from collections.abc import Callable
from mmap import mmap
from typing import TYPE_CHECKING, Any

from .errors import ConfigError

if TYPE_CHECKING:
    from ._native import Engine, Region

HOLE = 0xC000_0000
"""First gpa that is never RAM (3 GiB)."""
HIGH = 0x1_0000_0000
"""First gpa of the RAM that did not fit below the hole (4 GiB)."""


def layout(size: int) -> list[tuple[int, int]]:
    """Split `size` bytes of RAM into `(gpa, length)` ranges around the hole."""
    if size <= HOLE:
        return [(0, size)]
    return [(0, HOLE), (HIGH, size - HOLE)]


class Memory:
    """The RAM of one machine."""

    def __init__(self, engine: Engine, new_region: Callable[[int], Region], size: int) -> None:
        """Reserve `size` bytes and map them.

        Raises:
            _native.EngineError: the host gave no memory.
        """
        self.size = size
        self.ranges = layout(size)
        self._engine = engine
        self._regions: list[Any] = []
        for gpa, length in self.ranges:
            region = new_region(length)
            engine.map(gpa, region, 0, length)
            self._regions.append(region)

    @property
    def low_end(self) -> int:
        """End of the RAM below the hole."""
        return self.ranges[0][1]

    def contains(self, gpa: int, length: int) -> bool:
        """Whether all of `[gpa, gpa + length)` is RAM."""
        return any(base <= gpa and gpa + length <= base + size and length >= 0 for base, size in self.ranges)

    def read(self, gpa: int, length: int) -> bytes:
        """Copy `length` bytes out of RAM.

        Raises:
            ConfigError: part of the range is not RAM.
        """
        self._check(gpa, length)
        return self._engine.read(gpa, length) if length else b""

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Copy `data` into RAM; translations of code that it changes are dropped.

        Raises:
            ConfigError: part of the range is not RAM.
        """
        self._check(gpa, len(data))
        if data:
            self._engine.write(gpa, bytes(data))

    def load(self, gpa: int, data: bytes | bytearray | memoryview | mmap) -> None:
        """As `write`, for a machine that has not run yet: no copy on the way."""
        self._check(gpa, len(data))
        for (base, length), region in zip(self.ranges, self._regions, strict=True):
            if base <= gpa < base + length:
                memoryview(region)[gpa - base : gpa - base + len(data)] = data

    def close(self) -> None:
        """Let go of the host memory; nothing is RAM any more."""
        self.ranges, self._regions = [], []
        del self._engine

    def _check(self, gpa: int, length: int) -> None:
        if not self.contains(gpa, length):
            ram = " and ".join(f"{base:#x}..{base + size:#x}" for base, size in self.ranges)
            where = ram or "no place: the machine is closed"
            raise ConfigError(
                "not-ram",
                f"{length} bytes at gpa {gpa:#x} are not all RAM, which is at {where}",
            )
