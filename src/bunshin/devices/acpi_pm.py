"""ACPI fixed hardware: events, control, power-management timer, reset register.

    offset  size  name       meaning
    0x0     2     PM1a_STS   events that happened; write ones to clear
    0x2     2     PM1a_EN    events that raise the SCI
    0x4     2     PM1a_CNT   bit 0 SCI_EN, bits 10-12 SLP_TYP, bit 13 SLP_EN
    0x8     4     PM_TMR     3.579545 MHz counter, 32 bits, read only
    0xC     1     RESET      writing 0x01 resets the machine

Spec: ACPI 6.5, sections 4.8.3.1 PM1 event registers, 4.8.3.2 PM1 control, 4.8.3.3
PM timer, 4.8.3.6 reset register. The machine has no legacy mode (SMI_CMD is 0), so
SCI_EN always reads 1. S5 is SLP_TYP 5.

Not modelled: sleeping states other than S5, the timer's carry event (TMR_STS), the
global lock, GPE blocks, the RTC wake event.

Hostile guest: can turn itself off or reset itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..clock import Clock
from ..errors import StateError
from ..irq import IrqLine
from . import Device

TIMER_HZ = 3_579_545
LENGTH = 0x10
STS_PWRBTN = 0x0100
STS_ALL = 0x8731
EN_ALL = 0x0721
CNT_SCI_EN, CNT_SLP_EN = 0x0001, 0x2000
SLP_TYP_S5 = 5
RESET_OFFSET, RESET_VALUE = 0xC, 0x01


@dataclass
class AcpiPmState:
    """Everything the guest can see of the block, but for the time."""

    sts: int = 0
    en: int = 0
    cnt: int = CNT_SCI_EN


class AcpiPm(Device):
    """Guest sees: ACPI hardware that is always in ACPI mode."""

    name = "acpi-pm"
    state: AcpiPmState

    def __init__(
        self,
        irq: IrqLine,
        clock: Clock,
        power_off: Callable[[], object],
        reset: Callable[[], object],
    ) -> None:
        """Wire the block: `irq` is the SCI, the callables end the run."""
        self.irq = irq
        self.state = AcpiPmState()
        self._clock = clock
        self._power_off = power_off
        self._reset = reset

    def press_power_button(self) -> None:
        """Tell the guest that somebody wants it off; any thread."""
        with self.lock:
            self.state.sts |= STS_PWRBTN
            self._update()

    def read(self, offset: int, size: int) -> int:
        if offset == 8 and size == 4:
            return self._timer()
        value = 0
        for at in range(size):
            value |= self._byte(offset + at) << 8 * at
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        s = self.state
        for at in range(size):
            byte, where = value >> 8 * at & 0xFF, offset + at
            if where in (0, 1):
                s.sts &= ~(byte << 8 * where)
            elif where in (2, 3):
                shift = 8 * (where - 2)
                s.en = (s.en & ~(0xFF << shift) | byte << shift) & EN_ALL
            elif where in (4, 5):
                shift = 8 * (where - 4)
                s.cnt = s.cnt & ~(0xFF << shift) | byte << shift
                if where == 5 and s.cnt & CNT_SLP_EN:
                    if s.cnt >> 10 & 7 == SLP_TYP_S5:
                        self._power_off()
                    s.cnt &= ~CNT_SLP_EN
                s.cnt = s.cnt & 0x1C02 | CNT_SCI_EN
            elif where == RESET_OFFSET and byte == RESET_VALUE:
                self._reset()
        self._update()

    def level(self) -> bool:
        return bool(self.state.sts & self.state.en)

    def check(self, state: AcpiPmState) -> None:
        if state.sts & ~STS_ALL or state.en & ~EN_ALL or state.cnt & ~0x1C03:
            raise StateError("state-invalid", f"saved state of {self.name}: register out of range")

    def _update(self) -> None:
        self.irq.set(self.level())

    def _timer(self) -> int:
        return self._clock.now_ns() * TIMER_HZ // 1_000_000_000 & 0xFFFF_FFFF

    def _byte(self, offset: int) -> int:
        s = self.state
        if offset < 2:
            return s.sts >> 8 * offset & 0xFF
        if offset < 4:
            return s.en >> 8 * (offset - 2) & 0xFF
        if offset < 6:
            return s.cnt >> 8 * (offset - 4) & 0xFF
        if 8 <= offset < 12:
            return self._timer() >> 8 * (offset - 8) & 0xFF
        return 0
