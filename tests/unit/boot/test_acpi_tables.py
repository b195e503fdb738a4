"""Offsets from ACPI 6.5, section 5.2, written out again."""

from __future__ import annotations

from struct import unpack_from

from bunshin.boot import acpi_tables

BASE = 0xE_0000
HARDWARE = acpi_tables.Hardware(
    cpus=2, sci=9, pm1_event=0x600, pm1_control=0x604, pm_timer=0x608, reset=0x60C, reset_value=1,
    slp_typ_s5=5, century=0x32, com1=(0x3F8, 4), rtc=(0x70, 8), pvpanic=0x505,
)  # fmt: skip


def tables() -> dict[bytes, bytes]:
    """Every table by signature, found as an operating system finds them."""
    block = acpi_tables.build(HARDWARE)
    assert block[:8] == b"RSD PTR "
    assert sum(block[:20]) & 0xFF == 0
    assert sum(block[:36]) & 0xFF == 0
    (revision,) = unpack_from("<B", block, 15)
    rsdt, length, xsdt = unpack_from("<IIQ", block, 16)
    assert (revision, length) == (2, 36)

    def at(gpa: int) -> bytes:
        offset = gpa - BASE
        (size,) = unpack_from("<I", block, offset + 4)
        table = block[offset : offset + size]
        assert len(table) == size
        if table[:4] != b"FACS":
            assert sum(table) & 0xFF == 0, table[:4]
        return table

    root, wide = at(rsdt), at(xsdt)
    entries = unpack_from(f"<{(len(wide) - 36) // 8}Q", wide, 36)
    assert unpack_from(f"<{(len(root) - 36) // 4}I", root, 36) == entries
    found = {b"RSDT": root, b"XSDT": wide}
    for gpa in entries:
        found[at(gpa)[:4]] = at(gpa)
    facs, dsdt = unpack_from("<II", found[b"FACP"], 36)
    assert facs % 64 == 0
    found[b"FACS"], found[b"DSDT"] = at(facs), at(dsdt)
    assert unpack_from("<Q", found[b"FACP"], 140)[0] == dsdt
    return found


def test_all_tables_are_found() -> None:
    assert set(tables()) == {b"RSDT", b"XSDT", b"FACP", b"FACS", b"DSDT", b"APIC"}


def test_fadt() -> None:
    fadt = tables()[b"FACP"]
    assert len(fadt) == 276
    assert unpack_from("<H", fadt, 46)[0] == 9
    assert unpack_from("<IBB", fadt, 48) == (0, 0, 0)  # no SMI command: ACPI from the start
    assert unpack_from("<I", fadt, 56)[0] == 0x600
    assert unpack_from("<I", fadt, 64)[0] == 0x604
    assert unpack_from("<I", fadt, 76)[0] == 0x608
    assert (fadt[88], fadt[89], fadt[91]) == (4, 2, 4)
    assert fadt[108] == 0x32
    assert unpack_from("<H", fadt, 109)[0] == 0x15  # legacy, no VGA, no ASPM; no 8042
    (flags,) = unpack_from("<I", fadt, 112)
    assert flags & 1 << 10  # reset register
    assert not flags & 1 << 20  # not hardware-reduced
    assert unpack_from("<BBBBQ", fadt, 116) == (1, 8, 0, 1, 0x60C)
    assert fadt[128] == 1
    assert unpack_from("<BBBBQ", fadt, 148) == (1, 32, 0, 2, 0x600)
    assert unpack_from("<BBBBQ", fadt, 172) == (1, 16, 0, 2, 0x604)
    assert unpack_from("<BBBBQ", fadt, 208) == (1, 32, 0, 3, 0x608)


def test_madt() -> None:
    madt = tables()[b"APIC"]
    assert unpack_from("<II", madt, 36) == (0xFEE0_0000, 1)
    entries, at = [], 44
    while at < len(madt):
        entries.append(madt[at : at + madt[at + 1]])
        at += madt[at + 1]
    assert [entry[0] for entry in entries] == [0, 0, 1, 2, 2, 4]
    assert [unpack_from("<BBI", entry, 2) for entry in entries[:2]] == [(0, 0, 1), (1, 1, 1)]
    assert unpack_from("<BBII", entries[2], 2) == (0, 0, 0xFEC0_0000, 0)
    assert unpack_from("<BBIH", entries[3], 2) == (0, 0, 2, 0)
    assert unpack_from("<BBIH", entries[4], 2) == (0, 9, 9, 0xD)


def test_many_processors_fit() -> None:
    many = acpi_tables.Hardware(**{**vars(HARDWARE), "cpus": 255})
    assert len(acpi_tables.build(many)) < 0x1_0000


def test_dsdt_names() -> None:
    dsdt = tables()[b"DSDT"]
    for name in (b"\\_S5_", b"\\_SB_", b"COM1", b"RTC_", b"PEVT", b"QEMU0001"):
        assert name in dsdt
