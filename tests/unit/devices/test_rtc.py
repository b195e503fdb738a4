"""Constants from the MC146818A data sheet, written out again."""

from __future__ import annotations

import calendar
import threading

import pytest

from bunshin.clock import Clock
from bunshin.devices.rtc import Rtc
from bunshin.errors import StateError
from bunshin.irq import IrqLine

SECOND = 1_000_000_000
# 2024-02-29 23:59:58 UTC, a Thursday
START = calendar.timegm((2024, 2, 29, 23, 59, 58)) * SECOND


class HandClock(Clock):
    """Time moves when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.wall = START
        self.due: list[tuple[int, object]] = []

    def wall_ns(self) -> int:
        return self.wall

    def after(self, delay_ns, action):  # type: ignore[no-untyped-def]
        timer = super().after(1 << 60, action)
        self.due.append((self.wall + delay_ns, timer))
        return timer

    def move(self, delta_ns: int) -> None:
        """Go on, running timers as they come due."""
        end = self.wall + delta_ns
        while True:
            live = [(at, t) for at, t in self.due if t.action is not None and at <= end]  # type: ignore[attr-defined]
            if not live:
                break
            at, timer = min(live, key=lambda pair: pair[0])
            self.due.remove((at, timer))
            self.wall = max(at, self.wall)
            timer.action()  # type: ignore[attr-defined]
        self.wall = end


class Chip(Rtc):
    def __init__(self) -> None:
        self.hand = HandClock()
        self.levels: list[bool] = []
        super().__init__(IrqLine(self.levels.append), self.hand)

    def get(self, index: int) -> int:
        self.write(0, 1, index)
        return self.read(1, 1)

    def put(self, index: int, value: int) -> None:
        self.write(0, 1, index)
        self.write(1, 1, value)

    def time(self) -> list[int]:
        return [self.get(index) for index in (0x32, 9, 8, 7, 4, 2, 0)]


@pytest.fixture
def rtc():  # type: ignore[no-untyped-def]
    chip = Chip()
    yield chip
    chip.hand.close()
    assert threading.active_count() == 1


def test_time_in_bcd(rtc: Chip) -> None:
    assert rtc.time() == [0x20, 0x24, 0x02, 0x29, 0x23, 0x59, 0x58]
    assert rtc.get(6) == 5
    rtc.hand.move(2 * SECOND)
    assert rtc.time() == [0x20, 0x24, 0x03, 0x01, 0x00, 0x00, 0x00]


def test_time_in_binary_and_twelve_hours(rtc: Chip) -> None:
    rtc.put(0x0B, 0x06)
    assert rtc.time() == [20, 24, 2, 29, 23, 59, 58]
    rtc.put(0x0B, 0x04)
    assert rtc.get(4) == 0x80 | 11
    rtc.put(0x0B, 0x00)
    assert rtc.get(4) == 0x80 | 0x11
    rtc.hand.move(2 * SECOND)
    assert rtc.get(4) == 0x12


def test_setting_the_time(rtc: Chip) -> None:
    rtc.put(0x0B, 0x82)
    for index, value in ((9, 0x99), (8, 0x12), (7, 0x31), (4, 0x23), (2, 0x59), (0, 0x59)):
        rtc.put(index, value)
    rtc.put(0x32, 0x19)
    rtc.hand.move(5 * SECOND)
    assert rtc.time() == [0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59]
    rtc.put(0x0B, 0x02)
    rtc.hand.move(SECOND)
    assert rtc.time() == [0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00]
    assert rtc.get(6) == 7


def test_setting_one_field_without_stopping(rtc: Chip) -> None:
    rtc.put(2, 0x30)
    assert rtc.time()[5] == 0x30
    assert rtc.time()[4] == 0x23


def test_nonsense_dates_do_not_raise(rtc: Chip) -> None:
    rtc.put(0x0B, 0x82)
    for index in (0, 2, 4, 7, 8, 9, 0x32):
        rtc.put(index, 0xFF)
    rtc.put(0x0B, 0x02)
    for index in range(128):
        assert 0 <= rtc.get(index) <= 0xFF
    rtc.put(0x0B, 0x86)
    for index in (0, 2, 4, 7, 8, 9, 0x32):
        rtc.put(index, 0)
    rtc.put(0x0B, 0x06)
    for index in range(128):
        assert 0 <= rtc.get(index) <= 0xFF


def test_update_in_progress(rtc: Chip) -> None:
    assert rtc.get(0x0A) == 0x26
    rtc.hand.move(SECOND - 200_000)
    assert rtc.get(0x0A) == 0xA6
    rtc.hand.move(200_000)
    assert rtc.get(0x0A) == 0x26


def test_battery_and_cmos(rtc: Chip) -> None:
    assert rtc.get(0x0D) == 0x80
    rtc.put(0x0F, 0x0A)
    rtc.put(0x7F, 0x55)
    assert (rtc.get(0x0F), rtc.get(0x7F)) == (0x0A, 0x55)
    rtc.write(0, 1, 0x80 | 0x0F)  # NMI bit
    assert rtc.read(1, 1) == 0x0A


def test_flags_without_interrupts(rtc: Chip) -> None:
    assert rtc.get(0x0C) == 0
    rtc.hand.move(SECOND)
    assert rtc.get(0x0C) & 0x50 == 0x50  # PF, UF
    assert rtc.get(0x0C) == 0
    assert rtc.levels == []


def test_update_interrupt(rtc: Chip) -> None:
    rtc.put(0x0B, 0x12)
    rtc.hand.move(SECOND)
    assert rtc.levels == [True]
    assert rtc.get(0x0C) & 0x90 == 0x90
    assert rtc.levels == [True, False]
    rtc.hand.move(SECOND)
    assert rtc.levels == [True, False, True]


def test_periodic_interrupt_waits_until_it_is_read(rtc: Chip) -> None:
    rtc.put(0x0A, 0x26)  # 1024 Hz
    rtc.put(0x0B, 0x42)
    rtc.hand.move(SECOND // 2)
    assert rtc.levels == [True]
    assert rtc.get(0x0C) & 0xC0 == 0xC0
    rtc.hand.move(976_562)
    assert rtc.levels == [True, False, True]


@pytest.mark.parametrize(("rate", "hertz"), [(1, 256), (2, 128), (3, 8192), (15, 2)])
def test_rates(rtc: Chip, rate: int, hertz: int) -> None:
    rtc.put(0x0A, 0x20 | rate)
    assert rtc._period_ns() == SECOND // hertz


def test_alarm(rtc: Chip) -> None:
    rtc.put(1, 0x05)
    rtc.put(3, 0x00)
    rtc.put(5, 0xC0)  # any hour
    rtc.put(0x0B, 0x22)
    rtc.hand.move(6 * SECOND)
    assert rtc.levels == []
    rtc.hand.move(SECOND)
    assert rtc.levels == [True]
    assert rtc.get(0x0C) & 0xA0 == 0xA0
    rtc.hand.move(3599 * SECOND)
    assert rtc.levels == [True, False]
    rtc.hand.move(SECOND)
    assert rtc.levels == [True, False, True]


def test_alarm_that_never_comes(rtc: Chip) -> None:
    rtc.put(5, 0x99)
    rtc.put(0x0B, 0x22)
    rtc.hand.move(3 * 86400 * SECOND)
    assert rtc.levels == []


def test_reset_keeps_time_and_memory(rtc: Chip) -> None:
    rtc.put(0x20, 7)
    rtc.put(0x0B, 0x72)
    rtc.reset()
    assert rtc.get(0x0B) == 0x02
    assert rtc.get(0x20) == 7


def test_save_and_load(rtc: Chip) -> None:
    rtc.put(2, 0x30)
    rtc.put(0x40, 9)
    packed = rtc.save()
    assert packed is not None
    other = Chip()
    other.load(packed)
    assert other.time() == rtc.time()
    assert other.get(0x40) == 9
    assert other.levels == []
    for change in (
        {"index": 128}, {"cmos": b""}, {"alarm": [0]}, {"held": [1]}, {"flags": 1}, {"reg_a": 128},
        {"offset_ns": 1 << 70}, {"seen_ns": -1},
    ):  # fmt: skip
        with pytest.raises(StateError):
            other.load({**packed, "fields": {**packed["fields"], **change}})
    other.hand.close()
