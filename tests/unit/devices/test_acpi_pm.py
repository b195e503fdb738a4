"""Offsets and bits from ACPI 6.5, section 4.8.3, written out again."""

from __future__ import annotations

import pytest

from bunshin.clock import Clock
from bunshin.devices.acpi_pm import AcpiPm
from bunshin.errors import StateError
from bunshin.irq import IrqLine


class Block(AcpiPm):
    def __init__(self) -> None:
        self.levels: list[bool] = []
        self.ends: list[str] = []
        self.now = 0
        clock = Clock()
        clock.now_ns = lambda: self.now  # type: ignore[method-assign]
        super().__init__(
            IrqLine(self.levels.append),
            clock,
            lambda: self.ends.append("off"),
            lambda: self.ends.append("reset"),
        )


def test_power_button_raises_the_sci() -> None:
    block = Block()
    block.press_power_button()
    assert block.levels == []
    block.write(2, 2, 0x0100)
    assert block.levels == [True]
    assert block.read(0, 2) == 0x0100
    assert block.read(0, 4) == 0x0100_0100
    block.write(0, 2, 0x0001)
    assert block.levels == [True]
    block.write(0, 2, 0x0100)
    assert block.levels == [True, False]
    assert block.read(0, 2) == 0


def test_unknown_events_cannot_be_enabled() -> None:
    block = Block()
    block.write(2, 2, 0xFFFF)
    assert block.read(2, 2) == 0x0721


def test_control() -> None:
    block = Block()
    assert block.read(4, 2) == 0x0001
    block.write(4, 2, 0x1400)
    assert block.read(4, 2) == 0x1401
    assert block.ends == []
    block.write(4, 2, 0x3400)
    assert block.ends == ["off"]
    assert block.read(4, 2) == 0x1401


def test_other_sleeping_states_do_nothing() -> None:
    block = Block()
    for kind in range(8):
        if kind != 5:
            block.write(4, 2, 0x2000 | kind << 10)
    assert block.ends == []


def test_by_bytes() -> None:
    block = Block()
    block.write(4, 1, 0)
    block.write(5, 1, 0x34)
    assert block.ends == ["off"]


def test_timer() -> None:
    block = Block()
    block.now = 1_000_000_000
    assert block.read(8, 4) == 3579545
    assert block.read(8, 2) == 3579545 & 0xFFFF
    assert block.read(10, 1) == 3579545 >> 16 & 0xFF
    block.now = 1 << 62
    assert 0 <= block.read(8, 4) <= 0xFFFF_FFFF
    block.write(8, 4, 0)
    assert block.read(6, 2) == block.read(12, 4) == 0


def test_reset_register() -> None:
    block = Block()
    block.write(0xC, 1, 0x00)
    assert block.ends == []
    block.write(0xC, 1, 0x01)
    assert block.ends == ["reset"]


def test_state() -> None:
    block = Block()
    block.write(2, 2, 0x0100)
    block.press_power_button()
    packed = block.save()
    other = Block()
    other.load(packed)
    assert other.levels == []
    assert other.irq.level
    other.write(0, 2, 0x0100)
    assert other.levels == [False]
    assert packed is not None
    for change in ({"sts": 2}, {"en": 2}, {"cnt": 0x2001}):
        with pytest.raises(StateError):
            other.load({**packed, "fields": {**packed["fields"], **change}})
