from __future__ import annotations

from bunshin.board.small import SmallBoard
from bunshin.bus import Bus
from bunshin.clock import Clock
from bunshin.irq import IrqLines


def test_wiring() -> None:
    bus, ends = Bus(), []
    levels: list[tuple[int, bool]] = []
    output: list[bytes] = []
    gates: list[bool] = []
    board = SmallBoard(
        bus,
        IrqLines(lambda gsi, level: levels.append((gsi, level))),
        Clock(),
        output.append,
        lambda kind, detail: ends.append(kind),
        gates.append,
    )
    bus.port_out(0x3F8, 1, 0x41)
    bus.port_out(0x3FC, 1, 0x08)
    bus.port_out(0x3F9, 1, 0x02)
    assert output == [b"A"]
    bus.port_out(0x602, 2, 0x0100)
    board.pm.press_power_button()
    assert levels == [(4, True), (9, True)]
    bus.port_out(0x70, 1, 0x0D)
    assert bus.port_in(0x71, 1) == 0x80
    bus.port_out(0x64, 1, 0xAA)
    assert bus.port_in(0x60, 1) == 0x55
    bus.port_out(0x92, 1, 0x00)
    bus.port_out(0x64, 1, 0xD0)
    assert (bus.port_in(0x60, 1), gates) == (0x01, [False])
    bus.port_out(0x64, 1, 0xDF)
    assert (bus.port_in(0x92, 1), gates) == (0x02, [False, True])
    # The engine's own: nobody else may sit there.
    for port in (0x20, 0x21, 0xA0, 0xA1, 0x40, 0x43, 0x61):
        assert bus.port_in(port, 1) == 0xFF
    bus.port_out(0x64, 1, 0xFE)
    bus.port_out(0x604, 2, 0x3400)
    bus.port_out(0x60C, 1, 1)
    bus.port_out(0x505, 1, 1)
    bus.port_out(0x92, 1, 0x03)
    assert ends == ["reset", "power-off", "reset", "panic", "reset"]


def test_pci_probing_does_not_reset() -> None:
    ends: list[str] = []
    bus = Bus()
    SmallBoard(bus, IrqLines(lambda gsi, level: None), Clock(), bytes, lambda kind, _: ends.append(kind))
    for value in (0x8000_0000, 0x8000_0600, 0xFFFF_FFFF):
        bus.port_out(0xCF8, 4, value)
        assert bus.port_in(0xCF8, 4) == 0xFFFF_FFFF
    assert ends == []


def test_states_round_trip() -> None:
    board = SmallBoard(Bus(), IrqLines(lambda gsi, level: None), Clock(), bytes, lambda *_: None)
    states = [device.save() for device in board.devices()]
    assert [state["name"] for state in states if state] == ["com1", "rtc", "i8042", "port92", "acpi-pm"]
    for device, state in zip(board.devices(), states, strict=True):
        device.load(state)
