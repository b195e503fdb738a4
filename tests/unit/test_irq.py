from __future__ import annotations

from bunshin.irq import IrqLine, IrqLines


def test_only_changes_reach_the_controller() -> None:
    seen: list[tuple[int, bool]] = []
    line = IrqLines(lambda gsi, level: seen.append((gsi, level))).line(4)
    line.lower()
    line.raise_()
    line.raise_()
    line.lower()
    line.pulse()
    assert seen == [(4, True), (4, False), (4, True), (4, False)]


def test_shared_input_is_high_while_any_pin_is() -> None:
    seen: list[tuple[int, bool]] = []
    lines = IrqLines(lambda gsi, level: seen.append((gsi, level)))
    one, two = lines.line(9), lines.line(9)
    one.raise_()
    two.raise_()
    one.lower()
    assert seen == [(9, True)]
    two.lower()
    assert seen == [(9, True), (9, False)]


def test_restore_makes_no_edge() -> None:
    seen: list[bool] = []
    line = IrqLine(seen.append)
    line.restore(True)
    assert line.level
    assert seen == []
    line.lower()
    assert seen == [False]


def test_unconnected_line_passes_its_level_on_later() -> None:
    line = IrqLine()
    line.raise_()
    seen: list[bool] = []
    line.connect(seen.append)
    assert seen == [True]


def test_disconnect() -> None:
    seen: list[int] = []
    lines = IrqLines(lambda gsi, level: seen.append(gsi))
    line = lines.line(1)
    lines.disconnect()
    line.raise_()
    assert seen == []
