"""The ELF file that a debugger gets: System V ABI, chapter 4."""

from __future__ import annotations

from struct import pack, unpack_from
from typing import Any

import pytest

from bunshin.boot import symbol_file
from bunshin.boot.kernel_image import Segment, Vmlinux
from bunshin.errors import ImageError

TEXT, DATA, INIT = 0xFFFF_FFFF_8100_0000, 0xFFFF_FFFF_8200_0000, 0xFFFF_FFFF_8300_0000
SYMBOLS = [
    (0, "A", "__per_cpu_start"),
    (0x20, "D", "cpu_number"),
    (0x1C0, "A", "current_task"),
    (TEXT, "T", "_text"),
    (TEXT, "T", "_stext"),
    (TEXT + 0x100, "t", "hidden"),
    (TEXT + 0x180, "T", "shown"),
    (TEXT + 0x800, "T", "_etext"),
    (DATA + 8, "D", "jiffies"),
    (DATA + 0x10, "b", "static_one"),
    (INIT, "T", "_sinittext"),
    (INIT + 0x10, "T", "start_kernel"),
    (INIT + 0x100, "T", "_einittext"),
    (INIT + 0x200, "d", "init_data"),
]


def kernel(bits: int = 64, data: bytes = b"") -> Vmlinux:
    mask = 0xFFFF_FFFF if bits == 32 else (1 << 64) - 1
    places = [(TEXT, 0x1000), (DATA, 0x1000), (0, 0x100), (INIT, 0x1000)]
    segments = [
        Segment(paddr=0, vaddr=at & mask, data=memoryview(data if at == DATA else b""), memsz=size)
        for at, size in places
    ]
    return Vmlinux(path="vmlinux", bits=bits, entry=0, segments=tuple(segments), pvh_entry=None)


def sections(data: bytes, bits: int) -> dict[str, dict[str, Any]]:
    """The sections by name, parsed."""
    wide = bits == 64
    (table,) = unpack_from("<Q" if wide else "<I", data, 40 if wide else 32)
    size, count, names = unpack_from("<HHH", data, 58 if wide else 46)
    form = "<IIQQQQIIQQ" if wide else "<10I"
    keys = ("name", "kind", "flags", "address", "offset", "length", "link", "info", "align", "entry")
    rows = [dict(zip(keys, unpack_from(form, data, table + n * size), strict=True)) for n in range(count)]
    for number, row in enumerate(rows):
        at = rows[names]["offset"] + row["name"]
        row["title"] = data[at : data.index(b"\0", at)].decode()
        row["number"] = number
        row["data"] = data[row["offset"] : row["offset"] + row["length"]] if row["kind"] != 8 else b""
    return {row["title"]: row for row in rows}


@pytest.mark.parametrize("bits", [64, 32])
def test_symbols_belong_to_sections(bits: int) -> None:
    wide = bits == 64
    mask = (1 << bits) - 1
    data = symbol_file.build(kernel(bits), [(a & mask, k, n) for a, k, n in SYMBOLS])
    assert data[:6] == b"\x7fELF" + bytes([2 if wide else 1, 1])
    assert unpack_from("<HH", data, 16) == (2, 62 if wide else 3)
    found = sections(data, bits)
    text, init = found[".text"], found[".init.text"]
    assert (text["address"], text["length"], text["flags"]) == (TEXT & mask, 0x800, 6)
    assert (init["address"], init["length"], init["flags"]) == (INIT & mask, 0x100, 6)
    # Sections cover the segments, but for the per-processor one, and hold nothing.
    places = sorted((s["address"], s["length"]) for s in found.values() if s["flags"] & 2)
    assert places == [
        (TEXT & mask, 0x800), (TEXT + 0x800 & mask, 0x800), (DATA & mask, 0x1000),
        (INIT & mask, 0x100), (INIT + 0x100 & mask, 0xF00),
    ]  # fmt: skip
    assert all(s["kind"] == 8 for s in found.values() if s["flags"] & 2)
    table, strings = found[".symtab"], found[".strtab"]
    assert table["link"] == strings["number"]
    step = 24 if wide else 16
    assert (table["entry"], table["length"]) == (step, step * (len(SYMBOLS) + 1))
    symbols = {}
    for number, at in enumerate(range(0, table["length"], step)):
        if wide:
            name, info, _, section, value, size = unpack_from("<IBBHQQ", table["data"], at)
        else:
            name, value, size, info, _, section = unpack_from("<IIIBBH", table["data"], at)
        title = strings["data"][name : strings["data"].index(b"\0", name)].decode()
        symbols[title] = (value, size, info, section)
        # Local ones come first.
        assert (info >> 4 == 0) == (number < table["info"])
    assert symbols[""] == (0, 0, 0, 0)
    assert symbols["hidden"] == (TEXT + 0x100 & mask, 0x80, 2, text["number"])
    assert symbols["shown"] == (TEXT + 0x180 & mask, 0x680, 0x12, text["number"])
    assert symbols["start_kernel"] == (INIT + 0x10 & mask, 0xF0, 0x12, init["number"])
    assert symbols["jiffies"] == (DATA + 8 & mask, 8, 0x11, found[".data"]["number"])
    assert symbols["static_one"] == (DATA + 0x10 & mask, 0xFF0, 1, found[".data"]["number"])
    for name in ("__per_cpu_start", "cpu_number", "current_task"):
        assert symbols[name][1:] == (0, symbols[name][2], 0xFFF1)


def test_unwind_tables_come_along() -> None:
    ips = pack("<ii", TEXT - DATA, TEXT + 0x10 - DATA - 4)
    tables = [
        (DATA, "R", "__start_orc_unwind_ip"), (DATA + 8, "R", "__stop_orc_unwind_ip"),
        (DATA + 8, "R", "__start_orc_unwind"), (DATA + 20, "R", "__stop_orc_unwind"),
    ]  # fmt: skip
    vmlinux = kernel(data=ips + pack("<hhH", 8, 0, 5) * 2)
    found = sections(symbol_file.build(vmlinux, SYMBOLS + tables), 64)
    assert pack("<QQ", TEXT, 0x10) in found[".debug_frame"]["data"]
    # A kernel that tells nothing sensible has none, and that is all.
    odd = [(address + 0x10_0000, kind, name) for address, kind, name in tables]
    assert ".debug_frame" not in sections(symbol_file.build(vmlinux, SYMBOLS + odd), 64)


def test_a_kernel_without_symbols(kernel: str) -> None:
    with pytest.raises(ImageError, match="names no symbols"):
        symbol_file.write(kernel)
