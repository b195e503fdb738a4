"""The small board: what a headless Linux needs and nothing else.

    ports          device            gsi
    0x60 0x64      i8042 (reset)
    0x70 0x71      RTC               8
    0x92           A20 gate, reset
    0x3F8..0x3FF   COM1              4
    0x505          pvpanic
    0x600..0x60F   ACPI PM, reset    9, level, active high

The engine itself owns the PIC (0x20 0x21 0xA0 0xA1 0x4D0 0x4D1), the PIT (0x40..0x43
and 0x61), the IOAPIC at gpa 0xFEC00000 and the LAPICs at 0xFEE00000.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..boot import acpi_tables
from ..bus import Bus
from ..clock import Clock
from ..devices import Device
from ..devices.acpi_pm import LENGTH, RESET_OFFSET, RESET_VALUE, SLP_TYP_S5, AcpiPm
from ..devices.i8042 import I8042
from ..devices.port92 import Port92
from ..devices.pvpanic import Pvpanic
from ..devices.rtc import CENTURY, Rtc
from ..devices.serial import Serial
from ..errors import ConfigError
from ..irq import IrqLines

COM1, COM1_GSI = 0x3F8, 4
RTC, RTC_GSI = 0x70, 8
PORT92 = 0x92
PVPANIC = 0x505
PM, SCI = 0x600, 9
GSIS = 24
"""Inputs of the engine's IOAPIC."""


class SmallBoard:
    """The devices, wired.

    Attributes:
        com1, rtc, i8042, port92, pm, pvpanic: the devices.
    """

    def __init__(
        self,
        bus: Bus,
        lines: IrqLines,
        clock: Clock,
        output: Callable[[bytes], object],
        ended: Callable[[str, str], object],
        gate_a20: Callable[[bool], object] = lambda open_: None,
    ) -> None:
        """Build and wire the devices.

        `output` takes what COM1 sends; `ended(kind, detail)` is told when the guest
        turns itself off, resets itself or panics; `gate_a20` opens and closes the A20
        gate of the processors.
        """
        self.com1 = Serial(lines.line(COM1_GSI), output)
        self.com1.name = "com1"
        self.rtc = Rtc(lines.line(RTC_GSI), clock)
        self.port92 = Port92(gate_a20, lambda: ended("reset", "the guest reset itself by port 0x92"))
        self.i8042 = I8042(
            lambda: ended("reset", "the guest pulled the keyboard controller's reset line"),
            self.port92.a20,
            lambda: self.port92.state.a20,
        )
        self.pm = AcpiPm(
            lines.line(SCI),
            clock,
            lambda: ended("power-off", "the guest entered ACPI state S5"),
            lambda: ended("reset", "the guest wrote the ACPI reset register"),
        )
        self.pvpanic = Pvpanic(lambda: ended("panic", "the guest's kernel panicked"))
        bus.add_ports(0x60, 1, self.i8042.data)
        bus.add_ports(0x64, 1, self.i8042.command)
        bus.add_ports(RTC, 2, self.rtc)
        bus.add_ports(PORT92, 1, self.port92)
        bus.add_ports(COM1, 8, self.com1)
        bus.add_ports(PVPANIC, 1, self.pvpanic)
        bus.add_ports(PM, LENGTH, self.pm)

    def devices(self) -> list[Device]:
        """Every device that has a state, in a fixed order."""
        return [self.com1, self.rtc, self.i8042, self.port92, self.pm]

    def firmware(self, cpus: int) -> tuple[int, bytes]:
        """The ACPI tables as `(gpa, bytes)`; the RSDP comes first."""
        hardware = acpi_tables.Hardware(
            cpus=cpus,
            sci=SCI,
            pm1_event=PM,
            pm1_control=PM + 4,
            pm_timer=PM + 8,
            reset=PM + RESET_OFFSET,
            reset_value=RESET_VALUE,
            slp_typ_s5=SLP_TYP_S5,
            century=CENTURY,
            com1=(COM1, COM1_GSI),
            rtc=(RTC, RTC_GSI),
            pvpanic=PVPANIC,
        )
        return acpi_tables.BASE, acpi_tables.build(hardware)


def attach(devices: Iterable[Device], bus: Bus, lines: IrqLines) -> None:
    """Put a user's devices where they say they sit.

    Raises:
        ConfigError: one says nothing, overlaps another, or names a line that the
            board does not have.
    """
    for device in devices:
        title = device.name or type(device).__name__.lower()
        if device.ports is None and device.mmio is None:
            raise ConfigError("device-place", f"device {title} has neither `ports` nor `mmio` to sit at")
        if device.ports is not None:
            bus.add_ports(device.ports.start, len(device.ports), device, title)
        if device.mmio is not None:
            bus.add_mmio(device.mmio.start, len(device.mmio), device, title)
        if device.gsi is not None:
            device.irq.connect(lines.drive(check_gsi(device.gsi, title)))


def check_gsi(gsi: int, title: str = "irq") -> int:
    """Return `gsi` if the board has that input.

    Raises:
        ConfigError: it does not.
    """
    if type(gsi) is not int or not 0 <= gsi < GSIS:
        raise ConfigError("gsi", f"{title}: gsi {gsi!r} is not one of 0 to {GSIS - 1}")
    return gsi
