from __future__ import annotations

from bunshin.stats import FIGURES, complete, table


def test_table() -> None:
    shown = table(
        {
            "time.total_ns": 1_234_567_890,
            "device.com1.writes": 1_000_000,
            "device.rtc.writes": 3,
            "engine.halts": 0,
            "engine.blocks": 7,
            "engine.new": 5,
        }
    )
    assert shown.splitlines() == [
        "translation",
        "  engine.blocks               7  blocks translated",
        "devices",
        "  device.com1.writes  1,000,000  writes to it",
        "  device.rtc.writes           3  writes to it",
        "time by part",
        "  time.total_ns         1.235 s  processors running, all of what follows",
        "others",
        "  engine.new                  5",
    ]
    assert table({}) == ""


def test_guest_code_is_what_is_left() -> None:
    stats = {"time.total_ns": 100, "time.halted_ns": 30, "time.devices_ns": 10, "engine.blocks": 1000}
    complete(stats)
    assert stats["time.guest_code_ns"] == 60
    # Sampled times may add up to more than all.
    stats = {"time.total_ns": 100, "time.halted_ns": 101}
    complete(stats)
    assert stats["time.guest_code_ns"] == 0
    nothing: dict[str, int] = {}
    complete(nothing)
    assert nothing == {}


def test_every_meaning_fits_on_a_line() -> None:
    names = [name for figures in FIGURES.values() for name in figures]
    assert len(names) == len(set(names))
    assert all(meaning and len(meaning) < 70 for figures in FIGURES.values() for meaning in figures.values())
