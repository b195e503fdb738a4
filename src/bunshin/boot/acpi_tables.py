"""ACPI tables of a board: RSDP, RSDT, XSDT, FADT, FACS, DSDT, MADT.

Spec: ACPI 6.5, section 5.2 (5.2.5 RSDP, 5.2.7 RSDT, 5.2.8 XSDT, 5.2.9 FADT, 5.2.10
FACS, 5.2.12 MADT). The hardware is not "reduced": there are a PIC, a PIT, PM1 blocks
and an SCI. There is no legacy mode, so SMI_CMD is 0 and the system starts in ACPI
mode. IAPC_BOOT_ARCH says that there are legacy devices (the UART), no VGA, no
keyboard controller worth looking for, and a CMOS clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import pack, pack_into

from . import aml

BASE = 0xE_0000
"""gpa of the RSDP: the first place where a guest that was told nothing looks."""
LENGTH = 0x1_0000
"""Bytes from BASE that belong to the tables."""
LAPIC, IOAPIC = 0xFEE0_0000, 0xFEC0_0000
OEM, OEM_TABLE, CREATOR = b"BUNSHN", b"BUNSHIN ", b"BNSH"

_LEGACY, _NO_VGA, _NO_ASPM = 1 << 0, 1 << 2, 1 << 4
_WBINVD, _PROC_C1, _SLP_BUTTON, _FIX_RTC = 1 << 0, 1 << 2, 1 << 5, 1 << 6
_TMR_VAL_EXT, _RESET_REG_SUP = 1 << 8, 1 << 10


@dataclass(frozen=True)
class Hardware:
    """What the tables tell of. Ports; `com1` and `rtc` are (port, gsi)."""

    cpus: int
    sci: int
    pm1_event: int
    pm1_control: int
    pm_timer: int
    reset: int
    reset_value: int
    slp_typ_s5: int
    century: int
    com1: tuple[int, int]
    rtc: tuple[int, int]
    pvpanic: int


def checksum(data: bytes | bytearray) -> int:
    """The byte that makes all bytes of a table add up to 0."""
    return -sum(data) & 0xFF


def table(signature: bytes, revision: int, body: bytes) -> bytes:
    """A system description table: header, body, checksum."""
    out = bytearray(
        pack(
            "<4sIBB6s8sI4sI",
            signature, 36 + len(body), revision, 0, OEM, OEM_TABLE, 1, CREATOR, 1,
        )
        + body
    )  # fmt: skip
    out[9] = checksum(out)
    return bytes(out)


def build(hardware: Hardware, base: int = BASE) -> bytes:
    """All tables as one block to put at gpa `base`; the RSDP comes first."""
    block = bytearray(36)

    def put(data: bytes, align: int = 16) -> int:
        block.extend(bytes(-len(block) % align))
        at = base + len(block)
        block.extend(data)
        return at

    facs = put(pack("<4sIIIIQB31x", b"FACS", 64, 0, 0, 0, 0, 2), 64)
    dsdt_at = put(dsdt(hardware))
    fadt_at = put(fadt(hardware, facs, dsdt_at))
    madt_at = put(madt(hardware))
    tables = (fadt_at, madt_at)
    rsdt = put(table(b"RSDT", 1, b"".join(pack("<I", at) for at in tables)))
    xsdt = put(table(b"XSDT", 1, b"".join(pack("<Q", at) for at in tables)))
    block[:36] = rsdp(rsdt, xsdt)
    if len(block) > LENGTH:
        raise ValueError(f"ACPI tables of {len(block)} bytes")
    return bytes(block)


def rsdp(rsdt: int, xsdt: int) -> bytes:
    """The root pointer, revision 2."""
    out = bytearray(pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, OEM, 2, rsdt, 36, xsdt, 0))
    out[8] = checksum(out[:20])
    out[32] = checksum(out)
    return bytes(out)


def fadt(hardware: Hardware, facs: int, dsdt_at: int) -> bytes:
    """The fixed description, revision 6.5."""
    body = bytearray(276 - 36)

    def put(offset: int, layout: str, *values: int) -> None:
        pack_into("<" + layout, body, offset - 36, *values)

    def gas(offset: int, port: int, bits: int, access: int) -> None:
        put(offset, "BBBBQ", 1, bits, 0, access, port)

    put(36, "II", facs, dsdt_at)
    put(46, "H", hardware.sci)
    put(56, "I", hardware.pm1_event)
    put(64, "I", hardware.pm1_control)
    put(76, "I", hardware.pm_timer)
    put(88, "BBxB", 4, 2, 4)
    put(96, "HH", 0xFFFF, 0xFFFF)
    put(108, "B", hardware.century)
    put(109, "H", _LEGACY | _NO_VGA | _NO_ASPM)
    flags = _WBINVD | _PROC_C1 | _SLP_BUTTON | _FIX_RTC | _TMR_VAL_EXT | _RESET_REG_SUP
    put(112, "I", flags)
    gas(116, hardware.reset, 8, 1)
    put(128, "B", hardware.reset_value)
    put(131, "B", 5)
    # X_FIRMWARE_CTRL stays 0: only one of the two may be set. X_DSDT wins over DSDT.
    put(140, "Q", dsdt_at)
    gas(148, hardware.pm1_event, 32, 2)
    gas(172, hardware.pm1_control, 16, 2)
    gas(208, hardware.pm_timer, 32, 3)
    return table(b"FACP", 6, bytes(body))


def madt(hardware: Hardware) -> bytes:
    """Processors and interrupt controllers."""
    out = pack("<II", LAPIC, 1)
    for cpu in range(hardware.cpus):
        out += pack("<BBBBI", 0, 8, cpu, cpu, 1)
    out += pack("<BBBBII", 1, 12, 0, 0, IOAPIC, 0)
    # The PIT's line 0 arrives at input 2; the SCI is level-triggered, active high.
    out += pack("<BBBBIH", 2, 10, 0, 0, 2, 0)
    out += pack("<BBBBIH", 2, 10, 0, hardware.sci, hardware.sci, 0x000D)
    out += pack("<BBBHB", 4, 6, 0xFF, 0, 1)
    return table(b"APIC", 5, out)


def dsdt(hardware: Hardware) -> bytes:
    """The devices that a guest cannot find by itself, and how to enter S5."""
    present = aml.named("_STA", aml.integer(0xF))
    com1, com1_irq = hardware.com1
    rtc, rtc_irq = hardware.rtc
    s5 = aml.integer(hardware.slp_typ_s5)
    devices = [
        aml.device(
            "COM1",
            aml.named("_HID", aml.eisa_id("PNP0501")),
            aml.named("_UID", aml.integer(1)),
            present,
            aml.named("_CRS", aml.resources(aml.io(com1, 8), aml.irq_no_flags(com1_irq))),
        ),
        aml.device(
            "RTC_",
            aml.named("_HID", aml.eisa_id("PNP0B00")),
            present,
            aml.named("_CRS", aml.resources(aml.io(rtc, 2), aml.irq_no_flags(rtc_irq))),
        ),
        aml.device(
            "PEVT",
            aml.named("_HID", aml.string("QEMU0001")),
            present,
            aml.named("_CRS", aml.resources(aml.io(hardware.pvpanic, 1))),
        ),
    ]
    body = aml.named("\\_S5_", aml.package(s5, s5, aml.integer(0), aml.integer(0)))
    body += aml.scope("\\_SB_", *devices)
    return table(b"DSDT", 2, body)
