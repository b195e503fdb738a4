from __future__ import annotations

from bunshin import Device


class Bare(Device):
    """Needs no `super().__init__()`."""

    def __init__(self, value: int) -> None:
        self.value = value


def test_defaults() -> None:
    device = Bare(3)
    assert device.read(0, 4) == 0xFFFF_FFFF
    device.write(0, 4, 1)
    device.irq.pulse()
    device.reset()
    assert device.save() is None
    with device.lock:
        assert device.value == 3
