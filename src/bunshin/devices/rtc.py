"""MC146818 real-time clock with 114 bytes of CMOS memory, always in UTC.

    port  offset  meaning
    0x70  0       index (bits 0-6; bit 7 masked NMI on the PC and is ignored)
    0x71  1       the register with that index

    index      register                 index     register
    0x00 0x01  seconds, seconds alarm   0x0A      A: UIP, divider, rate
    0x02 0x03  minutes, minutes alarm   0x0B      B: SET PIE AIE UIE SQWE DM 24/12 DSE
    0x04 0x05  hours, hours alarm       0x0C      C: IRQF PF AF UF; reading clears
    0x06       day of week, Sunday 1    0x0D      D: VRT, the battery is good
    0x07 0x08  day of month, month      0x0E..7F  CMOS memory
    0x09       year                     0x32      century (named by the FADT)

Spec: Motorola MC146818A data sheet (1984), "Address Map", "Registers". The time is
the host's wall clock plus an offset that the guest's setting of the time changes.
Flags are worked out when somebody looks; a timer runs only while an interrupt that
has not fired yet is enabled.

Not modelled: years before 1970 and after 2099, daylight saving, square wave, a day of
week of the guest's own, and the 1.984 ms of the update itself (the time changes at
once, UIP announces it 244 µs ahead).

Hostile guest: the fastest periodic rate is 8192 Hz and the next tick waits until
register C is read, so the timer cannot be made to spin.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from ..clock import Clock, Timer
from ..errors import StateError
from ..irq import IrqLine
from . import Device

SECOND = 1_000_000_000
UIP_NS = 244_000
A_UIP, B_SET, B_PIE, B_AIE, B_UIE, B_DM, B_24 = 0x80, 0x80, 0x40, 0x20, 0x10, 0x04, 0x02
C_IRQF, C_PF, C_AF, C_UF = 0x80, 0x40, 0x20, 0x10
D_VRT = 0x80
CENTURY = 0x32
_TIME = {0x00: 0, 0x02: 1, 0x04: 2, 0x07: 3, 0x08: 4, 0x09: 5, CENTURY: 6}
_MAX_NS = (1 << 63) - 1
FIRST_YEAR, LAST_YEAR = 1970, 2099
"""Years that can be set; nanoseconds since 1970 then fit into 63 bits."""


@dataclass
class RtcState:
    """Everything the guest can see of the clock."""

    index: int = 0
    reg_a: int = 0x26
    reg_b: int = B_24
    flags: int = 0
    alarm: list[int] = field(default_factory=lambda: [0, 0, 0])
    offset_ns: int = 0
    seen_ns: int = 0
    held: list[int] = field(default_factory=list)
    cmos: bytearray = field(default_factory=lambda: bytearray(128))


class Rtc(Device):
    """Guest sees: a clock with a good battery that shows UTC."""

    width = 1
    name = "rtc"
    state: RtcState

    def __init__(self, irq: IrqLine, clock: Clock) -> None:
        """Wire the clock: `irq` is line 8 on a PC, `clock` tells the wall time."""
        self.irq = irq
        self._clock = clock
        self._timer: Timer | None = None
        self.state = RtcState(seen_ns=clock.wall_ns())

    def read(self, offset: int, size: int) -> int:
        s = self.state
        if offset == 0:
            return s.index
        index = s.index
        if index in _TIME:
            return self._encode(index, self._fields()[_TIME[index]])
        if index in (1, 3, 5):
            return s.alarm[index >> 1]
        if index == 0x06:
            return (time.gmtime(self._now() // SECOND).tm_wday + 1) % 7 + 1
        if index == 0x0A:
            left = SECOND - self._now() % SECOND
            return s.reg_a | (A_UIP if left <= UIP_NS and self._running() else 0)
        if index == 0x0B:
            return s.reg_b
        if index == 0x0C:
            self._advance()
            value = s.flags | (C_IRQF if s.flags & s.reg_b & 0x70 else 0)
            s.flags = 0
            self._update()
            return value
        if index == 0x0D:
            return D_VRT
        return s.cmos[index]

    def write(self, offset: int, size: int, value: int) -> None:
        s = self.state
        if offset == 0:
            s.index = value & 0x7F
            return
        index = s.index
        if index in _TIME:
            fields = self._fields()
            fields[_TIME[index]] = self._decode(index, value)
            if s.reg_b & B_SET:
                s.held = fields
            else:
                self._set(fields)
        elif index in (1, 3, 5):
            self._advance()
            s.alarm[index >> 1] = value
        elif index == 0x0A:
            self._advance()
            s.reg_a = value & 0x7F
        elif index == 0x0B:
            self._advance()
            if value & B_SET:
                value &= ~B_UIE
                if not s.reg_b & B_SET:
                    s.held = self._fields()
            elif s.reg_b & B_SET:
                self._set(s.held)
                s.held = []
            s.reg_b = value
        elif index >= 0x0E:
            s.cmos[index] = value
        self._update()

    def reset(self) -> None:
        """RESET clears the interrupt enables; time and CMOS live on the battery."""
        self.state.reg_b &= ~(B_PIE | B_AIE | B_UIE)
        self.state.flags = 0
        self._update()

    def level(self) -> bool:
        return bool(self.state.flags & self.state.reg_b & 0x70)

    def check(self, state: RtcState) -> None:
        bytes_ = (state.index << 1, state.reg_a << 1, state.reg_b, *state.alarm)
        if (
            any(not 0 <= value <= 0xFF for value in bytes_)
            or state.flags & ~0x70
            or len(state.alarm) != 3
            or len(state.cmos) != 128
            or (len(state.held) != 7 if state.reg_b & B_SET else state.held)
            or any(not 0 <= value <= 0xFF for value in state.held)
            or abs(state.offset_ns) > _MAX_NS
            or not 0 <= state.seen_ns <= _MAX_NS
        ):
            raise StateError("state-invalid", f"saved state of {self.name}: register out of range")

    def load(self, packed: object) -> None:
        super().load(packed)
        with self.lock:
            self._schedule()

    def _now(self) -> int:
        return self._clock.wall_ns() + self.state.offset_ns

    def _running(self) -> bool:
        return not self.state.reg_b & B_SET and self.state.reg_a & 0x70 == 0x20

    def _fields(self) -> list[int]:
        """Seconds, minutes, hours, day, month, year in the century, century; binary."""
        if self.state.reg_b & B_SET and self.state.held:
            return list(self.state.held)
        now = time.gmtime(self._now() // SECOND)
        century, year = divmod(now.tm_year, 100)
        return [
            min(now.tm_sec, 59), now.tm_min, now.tm_hour, now.tm_mday, now.tm_mon, year,
            century & 0xFF,
        ]  # fmt: skip

    def _set(self, fields: list[int]) -> None:
        """Let the clock run on from `fields`; nonsense counts over as the calendar does."""
        second, minute, hour, day, month, year, century = fields
        year = min(max(century * 100 + year, FIRST_YEAR), LAST_YEAR)
        days = _days(year, min(max(month, 1), 12), day)
        wall = self._clock.wall_ns()
        self._advance()
        seconds = days * 86400 + hour * 3600 + minute * 60 + second
        # Setting the time starts a new second, as the divider's reset does.
        self.state.offset_ns = seconds * SECOND - wall
        self.state.seen_ns = max(seconds * SECOND, 0)

    def _encode(self, index: int, value: int) -> int:
        b = self.state.reg_b
        pm = 0
        if index in (4, 5) and not b & B_24:
            pm = 0x80 if value >= 12 else 0
            value = value % 12 or 12
        if not b & B_DM:
            value = value // 10 % 10 << 4 | value % 10
        return value & 0xFF | pm

    def _decode(self, index: int, value: int) -> int:
        b = self.state.reg_b
        pm = 0
        if index in (4, 5) and not b & B_24:
            pm, value = value & 0x80, value & 0x7F
        if not b & B_DM:
            value = (value >> 4) * 10 + (value & 0x0F)
        if index in (4, 5) and not b & B_24:
            value = value % 12 + (12 if pm else 0)
        return value

    def _period_ns(self) -> int:
        rate = self.state.reg_a & 0x0F
        if rate == 0:
            return 0
        return SECOND * (1 << (rate + 6 if rate <= 2 else rate - 1)) // 32768

    def _next_alarm(self, after: int) -> int | None:
        """First second later than `after` that the alarm matches; None for never."""
        second, minute, hour = (
            None if value >= 0xC0 else self._decode(index, value)
            for index, value in zip((1, 3, 5), self.state.alarm, strict=True)
        )
        at = after + 1
        for _ in range(24 + 60 + 60 + 3):
            if hour is not None and at // 3600 % 24 != hour:
                at = (at // 3600 + 1) * 3600
            elif minute is not None and at // 60 % 60 != minute:
                at = (at // 60 + 1) * 60
            elif second is not None and at % 60 != second:
                at += 1
            else:
                return at
        return None

    def _advance(self) -> None:
        """Set the flags of everything that happened since the last look."""
        s = self.state
        now, before = self._now(), s.seen_ns
        s.seen_ns = max(now, 0)
        period = self._period_ns()
        if period and now // period > before // period:
            s.flags |= C_PF
        if now // SECOND > before // SECOND and self._running():
            s.flags |= C_UF
            alarm = self._next_alarm(before // SECOND)
            if alarm is not None and alarm <= now // SECOND:
                s.flags |= C_AF

    def _update(self) -> None:
        self.irq.set(self.level())
        self._schedule()

    def _schedule(self) -> None:
        """Set the timer to the next enabled event whose flag is not up yet."""
        s = self.state
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        wanted = s.reg_b & 0x70 & ~s.flags
        if not wanted:
            return
        now = self._now()
        due: list[int] = []
        period = self._period_ns()
        if wanted & C_PF and period:
            due.append((now // period + 1) * period)
        if self._running():
            if wanted & C_UF:
                due.append((now // SECOND + 1) * SECOND)
            alarm = self._next_alarm(now // SECOND) if wanted & C_AF else None
            if alarm is not None:
                due.append(alarm * SECOND)
        if due:
            self._timer = self._clock.after(min(due) - now, self._tick)

    def _tick(self) -> None:
        with self.lock:
            self._advance()
            self._update()


def _days(year: int, month: int, day: int) -> int:
    """Days from 1970-01-01 to a date of the Gregorian calendar."""
    year -= month <= 2
    month_days = (153 * (month + (-3 if month > 2 else 9)) + 2) // 5 + day - 1
    return year * 365 + year // 4 - year // 100 + year // 400 + month_days - 719468
