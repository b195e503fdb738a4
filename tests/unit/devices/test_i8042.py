from __future__ import annotations

import pytest

from bunshin.devices.i8042 import I8042
from bunshin.errors import StateError


class Chip(I8042):
    def __init__(self) -> None:
        self.resets: list[None] = []
        self.gate: list[bool] = [True]
        super().__init__(lambda: self.resets.append(None), self.gate.append, lambda: self.gate[-1])

    def order(self, command: int) -> int | None:
        self.command.write(0, 1, command)
        return self.data.read(0, 1) if self.command.read(0, 1) & 1 else None


def test_self_test() -> None:
    chip = Chip()
    assert chip.command.read(0, 1) == 0x04
    assert chip.order(0xAA) == 0x55
    assert chip.command.read(0, 1) & 1 == 0
    assert chip.order(0xAB) == 0
    assert chip.order(0xA9) == 0
    assert chip.order(0xD0) == 0x03


def test_command_byte() -> None:
    chip = Chip()
    assert chip.order(0x60) is None
    chip.data.write(0, 1, 0x65)
    assert chip.order(0x20) == 0x65
    chip.order(0xAD)
    chip.order(0xA7)
    assert chip.order(0x20) == 0x75
    chip.order(0xAE)
    chip.order(0xA8)
    assert chip.order(0x20) == 0x45


@pytest.mark.parametrize("command", [0xFE, 0xF0])
def test_pulses_reset(command: int) -> None:
    chip = Chip()
    chip.order(command)
    assert len(chip.resets) == 1


def test_output_port_resets() -> None:
    chip = Chip()
    chip.order(0xFF)
    chip.order(0xD1)
    chip.data.write(0, 1, 0x03)
    chip.data.write(0, 1, 0x00)
    assert chip.resets == []
    chip.order(0xD1)
    chip.data.write(0, 1, 0x02)
    assert len(chip.resets) == 1


def test_state() -> None:
    chip = Chip()
    chip.order(0x60)
    packed = chip.save()
    assert packed is not None
    other = Chip()
    other.load(packed)
    other.data.write(0, 1, 0x11)
    assert other.order(0x20) == 0x11
    packed["fields"]["output"] = 256
    with pytest.raises(StateError):
        other.load(packed)


def test_the_a20_gate() -> None:
    chip = Chip()
    chip.order(0xD1)
    chip.data.write(0, 1, 0x01)
    assert chip.gate == [True, False]
    assert chip.order(0xD0) == 0x01
    chip.order(0xDF)
    assert chip.order(0xD0) == 0x03
    chip.order(0xDD)
    assert chip.gate == [True, False, True, False]
    assert chip.resets == []
