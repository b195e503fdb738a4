from __future__ import annotations

from bunshin.devices.port92 import Port92


def port() -> tuple[Port92, list[bool], list[None]]:
    gates: list[bool] = []
    resets: list[None] = []
    return Port92(gates.append, lambda: resets.append(None)), gates, resets


def test_the_gate() -> None:
    device, gates, resets = port()
    assert device.read(0, 1) == 0x02
    device.write(0, 1, 0x00)
    device.write(0, 1, 0x00)
    device.write(0, 1, 0x02)
    assert (gates, resets) == ([False, True], [])
    device.a20(False)
    assert device.read(0, 1) == 0x00


def test_reset_is_an_edge() -> None:
    device, _, resets = port()
    device.write(0, 1, 0x03)
    device.write(0, 1, 0x03)
    assert len(resets) == 1
    assert device.read(0, 1) == 0x03
    device.write(0, 1, 0x02)
    device.write(0, 1, 0x03)
    assert len(resets) == 2


def test_a_loaded_state_moves_the_gate() -> None:
    device, _, resets = port()
    device.write(0, 1, 0x00)
    other, other_gates, _ = port()
    other.load(device.save())
    assert other_gates == [False]
    other.reset()
    assert (other_gates, resets) == ([False, True], [])
