"""The bus: which device answers at which port and at which guest-physical address.

Ports are looked up in a dict, one entry a port. MMIO ranges are found by bisection
and remembered by page, since drivers touch the same page again and again. Sizes are
1, 2, 4 or 8 bytes, values are little-endian.

Several processors may be on the bus at once. A device's lock is held around every
access to it, and a split access holds it for one byte at a time.

What the guest sees: absent addresses read as all ones and swallow writes. An access
wider than the device, or one that straddles the end of a range, is split into bytes,
each answered by whoever sits there. A device that fails (its own bug, not the
guest's doing) ends the run with an error that names it.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from threading import Lock, RLock
from typing import Any, Protocol

from .errors import BunshinError, ConfigError, EngineError

ONES = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFF_FFFF, 8: 0xFFFF_FFFF_FFFF_FFFF}
"""All ones by size: what nobody answers, and the mask of what a device answers."""
PORTS = 0x1_0000
MMIO_END = 1 << 52
_CACHED_PAGES = 4096


class Target(Protocol):
    """What the bus asks of a device. `width` (default 8) and `lock` are optional."""

    def read(self, offset: int, size: int) -> int: ...
    def write(self, offset: int, size: int, value: int) -> None: ...


class Dispatch(Protocol):
    """What answers accesses in the bus's place: `bunshin._native.Dispatch`."""

    def replace(self, ports: list[Range], mmio: list[Range]) -> None: ...
    def counts(self) -> list[tuple[Range, int, int]]: ...


class Range:
    """One device at one place."""

    __slots__ = ("base", "end", "lock", "name", "read", "reads", "target", "width", "write", "writes")

    def __init__(self, base: int, length: int, target: Target, name: str) -> None:
        self.base = base
        self.end = base + length
        self.target = target
        self.name = name
        self.read = target.read
        self.write = target.write
        self.width: int = getattr(target, "width", 8)
        self.lock: Any = getattr(target, "lock", None) or RLock()
        self.reads = self.writes = 0

    def __lt__(self, other: Range) -> bool:
        return self.base < other.base

    def failed(self, error: BaseException, offset: int, size: int, value: int | None) -> BaseException:
        """What to raise when the device's `read`, or `write` of `value`, raised `error`."""
        if isinstance(error, BunshinError) or not isinstance(error, Exception):
            return error
        call = f"read({offset:#x}, {size})" if value is None else f"write({offset:#x}, {size}, {value:#x})"
        failure = EngineError(
            "device-failed", f"device {self.name}: {call} raised {type(error).__name__}: {error}"
        )
        failure.__cause__ = error
        return failure


class Bus:
    """The port space and the MMIO space of one machine."""

    def __init__(self) -> None:
        self._change = Lock()
        self._ports: dict[int, Range] = {}
        self._ranges: list[Range] = []
        self._bases: list[int] = []
        self._pages: dict[int, Range] = {}
        self._all: list[Range] = []
        self._dispatch: Dispatch | None = None

    def serve_by(self, dispatch: Dispatch) -> None:
        """Let `dispatch` know who sits where, now and after every change.

        It answers plain accesses without coming here: those of one element, not wider
        than the device and inside one range. All others are for the bus.
        """
        with self._change:
            self._dispatch = dispatch
            self._tell_dispatch()

    def add_ports(self, base: int, length: int, device: Target, name: str = "") -> None:
        """Put `device` at the ports `[base, base + length)`.

        Raises:
            ConfigError: outside the port space, or a device is there already.
        """
        new = self._range("ports", base, length, PORTS, device, name)
        with self._change:
            for port in range(base, base + length):
                if port in self._ports:
                    raise self._taken("port", new, self._ports[port])
            self._ports = {**self._ports, **dict.fromkeys(range(base, base + length), new)}
            self._all.append(new)
            self._tell_dispatch()

    def add_mmio(self, base: int, length: int, device: Target, name: str = "") -> None:
        """Put `device` at the guest-physical addresses `[base, base + length)`.

        RAM wins over a device: where RAM is mapped the device is never asked.

        Raises:
            ConfigError: outside the address space, or a device is there already.
        """
        new = self._range("gpa", base, length, MMIO_END, device, name)
        with self._change:
            for old in self._ranges:
                if old.base < new.end and new.base < old.end:
                    raise self._taken("gpa", new, old)
            ranges = self._ranges.copy()
            insort(ranges, new)
            self._replace(ranges)
            self._all.append(new)
            self._tell_dispatch()

    def remove(self, device: Target) -> None:
        """Take `device` off everywhere it sits.

        Raises:
            ConfigError: it sits nowhere.
        """
        with self._change:
            if all(old.target is not device for old in self._all):
                raise ConfigError("bus-absent", f"{_name(device)} is not on the bus")
            self._ports = {p: r for p, r in self._ports.items() if r.target is not device}
            self._replace([r for r in self._ranges if r.target is not device])
            self._all = [r for r in self._all if r.target is not device]
            self._tell_dispatch()

    def devices(self) -> list[tuple[str, Target]]:
        """Every device with its name, each once, in the order they were added."""
        seen: dict[int, tuple[str, Target]] = {}
        for entry in self._all:
            seen.setdefault(id(entry.target), (entry.name, entry.target))
        return list(seen.values())

    def counts(self) -> dict[str, tuple[int, int]]:
        """Reads and writes by device name since the device was added.

        An access that is split into bytes counts as so many.
        """
        found = [(entry, entry.reads, entry.writes) for entry in self._all]
        if self._dispatch is not None:
            found += self._dispatch.counts()
        result: dict[str, tuple[int, int]] = {}
        for entry, reads, writes in found:
            before = result.get(entry.name, (0, 0))
            result[entry.name] = before[0] + reads, before[1] + writes
        return result

    def port_in(self, port: int, size: int, count: int = 1) -> int | bytes:
        """Answer IN; bytes when `count` > 1 (a string instruction)."""
        if count != 1:
            return b"".join(int(self.port_in(port, size)).to_bytes(size, "little") for _ in range(count))
        entry = self._ports.get(port)
        if entry is not None and size <= entry.width and port + size <= entry.end:
            return self._ask(entry, port, size)
        if entry is None and size == 1:
            return 0xFF
        return self._split_in(self._ports.get, port, size, PORTS - 1)

    def port_out(self, port: int, size: int, value: int | bytes) -> None:
        """Carry out OUT; bytes for several elements (a string instruction)."""
        if isinstance(value, bytes):
            for at in range(0, len(value), size):
                self.port_out(port, size, int.from_bytes(value[at : at + size], "little"))
            return
        entry = self._ports.get(port)
        if entry is not None and size <= entry.width and port + size <= entry.end:
            self._tell(entry, port, size, value)
        elif entry is not None or size > 1:
            self._split_out(self._ports.get, port, size, value, PORTS - 1)

    def mmio_read(self, gpa: int, size: int) -> int:
        """Answer a load outside RAM."""
        entry = self._find(gpa)
        if entry is not None and size <= entry.width and gpa + size <= entry.end:
            return self._ask(entry, gpa, size)
        return self._split_in(self._find, gpa, size, MMIO_END - 1)

    def mmio_write(self, gpa: int, size: int, value: int) -> None:
        """Carry out a store outside RAM."""
        entry = self._find(gpa)
        if entry is not None and size <= entry.width and gpa + size <= entry.end:
            self._tell(entry, gpa, size, value)
        else:
            self._split_out(self._find, gpa, size, value, MMIO_END - 1)

    def _find(self, gpa: int) -> Range | None:
        """The device at one address; a page that only one device touches is cached."""
        entry = self._pages.get(gpa >> 12)
        if entry is not None and entry.base <= gpa < entry.end:
            return entry
        at = bisect_right(self._bases, gpa) - 1
        found = self._ranges[at] if at >= 0 else None
        if found is None or gpa >= found.end:
            return None
        if len(self._pages) < _CACHED_PAGES:
            self._pages[gpa >> 12] = found
        return found

    def _ask(self, entry: Range, address: int, size: int) -> int:
        try:
            with entry.lock:
                entry.reads += 1
                return entry.read(address - entry.base, size) & ONES[size]
        except Exception as error:
            failure = entry.failed(error, address - entry.base, size, None)
            raise failure from failure.__cause__

    def _tell(self, entry: Range, address: int, size: int, value: int) -> None:
        try:
            with entry.lock:
                entry.writes += 1
                entry.write(address - entry.base, size, value)
        except Exception as error:
            failure = entry.failed(error, address - entry.base, size, value)
            raise failure from failure.__cause__

    def _split_in(self, find: Any, address: int, size: int, last: int) -> int:
        value = 0
        for at in range(size):
            entry = find((address + at) & last)
            byte = 0xFF if entry is None else self._ask(entry, (address + at) & last, 1)
            value |= byte << 8 * at
        return value

    def _split_out(self, find: Any, address: int, size: int, value: int, last: int) -> None:
        for at in range(size):
            entry = find((address + at) & last)
            if entry is not None:
                self._tell(entry, (address + at) & last, 1, value >> 8 * at & 0xFF)

    def _replace(self, ranges: list[Range]) -> None:
        self._ranges = ranges
        self._bases = [entry.base for entry in ranges]
        self._pages = {}

    def _tell_dispatch(self) -> None:
        """Hand over the ranges; the lock on changes is held."""
        if self._dispatch is not None:
            ports = list(dict.fromkeys(self._ports.values()))
            self._dispatch.replace(ports, self._ranges.copy())

    def _range(self, space: str, base: int, length: int, end: int, device: Target, name: str) -> Range:
        if length <= 0 or base < 0 or base + length > end:
            raise ConfigError(
                "bus-range",
                f"{name or _name(device)}: {space} {base:#x} + {length:#x} is not inside 0..{end:#x}",
            )
        return Range(base, length, device, name or _name(device))

    @staticmethod
    def _taken(space: str, new: Range, old: Range) -> ConfigError:
        return ConfigError(
            "bus-overlap",
            f"{new.name} at {space} {new.base:#x}..{new.end - 1:#x} overlaps {old.name} "
            f"at {old.base:#x}..{old.end - 1:#x}",
        )


def _name(device: Target) -> str:
    return getattr(device, "name", "") or type(device).__name__.lower()
