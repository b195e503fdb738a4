from __future__ import annotations

from bunshin.devices.pvpanic import Pvpanic


def test_events() -> None:
    told: list[None] = []
    device = Pvpanic(lambda: told.append(None))
    assert device.read(0, 1) == 3
    device.write(0, 1, 0)
    device.write(0, 1, 2)
    assert told == []
    device.write(0, 1, 1)
    assert len(told) == 1
