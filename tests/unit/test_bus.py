from __future__ import annotations

from typing import Any

import pytest

from bunshin.bus import Bus, Range
from bunshin.errors import ConfigError, EngineError


class Recorder:
    """Answers each byte with its own offset and remembers what came."""

    def __init__(self, width: int = 8) -> None:
        self.width = width
        self.seen: list[tuple[Any, ...]] = []

    def read(self, offset: int, size: int) -> int:
        self.seen.append(("r", offset, size))
        return int.from_bytes(bytes(offset + at & 0xFF for at in range(size)), "little")

    def write(self, offset: int, size: int, value: int) -> None:
        self.seen.append(("w", offset, size, value))


class Broken:
    def read(self, offset: int, size: int) -> int:
        return 1 // 0

    def write(self, offset: int, size: int, value: int) -> None:
        raise KeyError("gone")


def test_absent_addresses() -> None:
    bus = Bus()
    for size, ones in ((1, 0xFF), (2, 0xFFFF), (4, 0xFFFF_FFFF)):
        assert bus.port_in(0x80, size) == ones
        assert bus.mmio_read(0xD000_0000, size) == ones
        bus.port_out(0x80, size, 1)
        bus.mmio_write(0xD000_0000, size, 1)
    assert bus.mmio_read(0xD000_0000, 8) == 0xFFFF_FFFF_FFFF_FFFF


def test_offsets_and_sizes() -> None:
    bus, device = Bus(), Recorder()
    bus.add_ports(0x100, 8, device)
    bus.add_mmio(0xD000_0000, 0x1000, device)
    assert bus.port_in(0x104, 2) == 0x0504
    bus.port_out(0x106, 1, 0x12)
    assert bus.mmio_read(0xD000_0010, 8) == 0x1716151413121110
    bus.mmio_write(0xD000_0FF8, 8, 5)
    assert device.seen == [("r", 4, 2), ("w", 6, 1, 0x12), ("r", 0x10, 8), ("w", 0xFF8, 8, 5)]


def test_wider_than_the_device_is_split() -> None:
    bus, device = Bus(), Recorder(width=1)
    bus.add_ports(0x3F8, 8, device)
    assert bus.port_in(0x3F8, 4) == 0x03020100
    bus.port_out(0x3FA, 2, 0xBBAA)
    assert device.seen[4:] == [("w", 2, 1, 0xAA), ("w", 3, 1, 0xBB)]


def test_straddling_the_end_and_the_start() -> None:
    bus, device = Bus(), Recorder()
    bus.add_ports(0x100, 2, device)
    bus.add_mmio(0x1000, 2, device)
    assert bus.port_in(0x101, 2) == 0xFF01
    assert bus.port_in(0x0FF, 2) == 0x00FF
    assert bus.mmio_read(0x0FFE, 4) == 0x0100FFFF
    bus.mmio_write(0x1001, 4, 0x44332211)
    assert device.seen[-1] == ("w", 1, 1, 0x11)


def test_two_devices_in_one_page() -> None:
    bus, one, two = Bus(), Recorder(), Recorder()
    bus.add_mmio(0x1000, 16, one)
    bus.add_mmio(0x1010, 16, two)
    for _ in range(3):
        bus.mmio_read(0x1004, 4)
        bus.mmio_read(0x1014, 4)
    assert one.seen == two.seen == [("r", 4, 4)] * 3
    assert bus.mmio_read(0x1020, 4) == 0xFFFF_FFFF


def test_end_of_the_port_space() -> None:
    bus, device = Bus(), Recorder()
    bus.add_ports(0xFFFF, 1, device)
    assert bus.port_in(0xFFFF, 2) == 0xFF00


def test_strings() -> None:
    bus, device = Bus(), Recorder()
    bus.add_ports(0x100, 4, device)
    bus.port_out(0x100, 2, b"\x01\x02\x03\x04")
    assert device.seen == [("w", 0, 2, 0x0201), ("w", 0, 2, 0x0403)]
    assert bus.port_in(0x102, 1, 3) == b"\x02\x02\x02"
    assert bus.port_in(0x500, 4, 2) == b"\xff" * 8


def test_a_value_is_cut_to_its_size() -> None:
    class Negative(Recorder):
        def read(self, offset: int, size: int) -> int:
            return -1

    bus = Bus()
    bus.add_ports(1, 1, Negative())
    assert bus.port_in(1, 1) == 0xFF


@pytest.mark.parametrize(("base", "length"), [(0x108, 1), (0xFF, 2), (0x100, 8), (0x90, 0x200)])
def test_overlap(base: int, length: int) -> None:
    bus = Bus()
    bus.add_ports(0x100, 9, Recorder(), "first")
    bus.add_mmio(0x100, 9, Recorder(), "first")
    for add in (bus.add_ports, bus.add_mmio):
        with pytest.raises(ConfigError, match=r"second.*overlaps first"):
            add(base, length, Recorder(), "second")
    # What failed has left nothing behind.
    assert len(bus.devices()) == 2


@pytest.mark.parametrize(("base", "length"), [(-1, 2), (0, 0), (0xFFFF, 2), (5, -1)])
def test_outside_the_port_space(base: int, length: int) -> None:
    with pytest.raises(ConfigError):
        Bus().add_ports(base, length, Recorder())


def test_remove() -> None:
    bus, device, other = Bus(), Recorder(), Recorder()
    bus.add_ports(0x100, 4, device)
    bus.add_ports(0x104, 4, other)
    bus.add_mmio(0x1000, 4, device)
    bus.mmio_read(0x1000, 4)
    bus.remove(device)
    assert bus.port_in(0x100, 1) == 0xFF
    assert bus.mmio_read(0x1000, 4) == 0xFFFF_FFFF
    assert bus.port_in(0x104, 1) == 0
    with pytest.raises(ConfigError, match="not on the bus"):
        bus.remove(device)


def test_a_broken_device_is_named() -> None:
    bus = Bus()
    bus.add_ports(0x100, 4, Broken(), "thermometer")
    with pytest.raises(EngineError, match=r"thermometer: read\(0x2, 1\) raised ZeroDivisionError"):
        bus.port_in(0x102, 1)
    with pytest.raises(EngineError, match=r"thermometer: write\(0x0, 4, 0x7\) raised KeyError"):
        bus.port_out(0x100, 4, 7)


def test_counts() -> None:
    bus, device = Bus(), Recorder()
    bus.add_ports(0x100, 4, device, "one")
    bus.add_mmio(0x100, 4, device, "one")
    bus.port_in(0x100, 1)
    bus.mmio_read(0x100, 1)
    bus.port_out(0x102, 2, 0)
    assert bus.counts() == {"one": (2, 1)}


def test_a_dispatch_knows_who_sits_where() -> None:
    class Dispatch:
        def __init__(self) -> None:
            self.ports: list[str] = []
            self.mmio: list[str] = []
            self.ranges: list[Range] = []

        def replace(self, ports: list[Range], mmio: list[Range]) -> None:
            self.ports = [entry.name for entry in ports]
            self.mmio = [entry.name for entry in mmio]
            self.ranges = ports + mmio

        def counts(self) -> list[tuple[Range, int, int]]:
            return [(entry, 10, 1) for entry in self.ranges]

    bus, dispatch, device = Bus(), Dispatch(), Recorder()
    bus.add_ports(0x100, 4, device, "one")
    bus.serve_by(dispatch)
    assert (dispatch.ports, dispatch.mmio) == (["one"], [])
    bus.add_mmio(0x1000, 4, Recorder(), "two")
    assert (dispatch.ports, dispatch.mmio) == (["one"], ["two"])
    bus.port_in(0x100, 1)
    assert bus.counts() == {"one": (11, 1), "two": (10, 1)}
    bus.remove(device)
    assert (dispatch.ports, dispatch.mmio) == ([], ["two"])
