"""What lies where when the first instruction runs.

Offsets from Xen's start_info.h and Linux's zero-page.rst, written out again.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path
from struct import pack, pack_into, unpack_from
from typing import Any

import pytest

from bunshin import boot
from bunshin.config import MachineConfig
from bunshin.errors import BunshinError, ConfigError, ImageError
from bunshin.memory import layout

Elf = Callable[..., bytes]
MIB, GIB = 1 << 20, 1 << 30
FIRMWARE = (0xE_0000, b"RSD PTR " + bytes(100))


class Ram(dict[int, bytes]):
    """What was put where; overlaps and stores outside RAM are refused."""

    def __init__(self, size: int) -> None:
        self.ranges = layout(size)

    def put(self, gpa: int, data: Any) -> None:
        end = gpa + len(data)
        assert any(base <= gpa and end <= base + size for base, size in self.ranges)
        for base, old in self.items():
            assert end <= base or base + len(old) <= gpa, f"{gpa:#x} overlaps {base:#x}"
        self[gpa] = bytes(data)

    def at(self, gpa: int, length: int) -> bytes:
        for base, data in self.items():
            if base <= gpa and gpa + length <= base + len(data):
                return data[gpa - base : gpa - base + length]
        raise AssertionError(f"nothing at {gpa:#x}")


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., tuple[dict[str, Any], Ram]]:
    def load(
        kernel: bytes, initrd: bytes | None = None, append: str = "quiet", size: int = 64 * MIB,
        boot_by: str = "auto",
    ) -> tuple[dict[str, Any], Ram]:  # fmt: skip
        (tmp_path / "kernel").write_bytes(kernel)
        if initrd is not None:
            (tmp_path / "initrd").write_bytes(initrd)
        config = MachineConfig(
            kernel=str(tmp_path / "kernel"),
            initrd=None if initrd is None else str(tmp_path / "initrd"),
            append=append,
            memory=size,
            boot=boot_by,
        )
        ram = Ram(size)
        return boot.load(config, ram.ranges, FIRMWARE, ram.put), ram

    return load


def bzimage(inner: bytes, xloadflags: int = 1) -> bytes:
    payload = gzip.compress(inner)
    out = bytearray(0xA00)
    out[0x1F1] = 4
    pack_into("<H", out, 0x1FE, 0xAA55)
    out[0x201] = 0x6A
    out[0x202:0x206] = b"HdrS"
    pack_into("<H", out, 0x206, 0x20F)
    out[0x211] = 0x81
    pack_into("<IIBxHI", out, 0x22C, 0x7FFF_FFFF, 0x20_0000, 1, xloadflags, 100)
    pack_into("<II", out, 0x248, 0x300, len(payload))
    pack_into("<QI", out, 0x258, 0x100_0000, 0x10_0000)
    return bytes(out) + bytes(0x300) + payload


def test_pvh(load: Any, elf: Elf) -> None:
    state, ram = load(elf(memsz=MIB), initrd=b"initrd!", append="quiet panic=-1")
    assert state["rip"] == 0x100_0040
    assert state["cr0"] == 0x11
    assert (state["cr3"], state["cr4"], state["rflags"]) == (0, 0, 2)
    es, cs, *others = state["segments"]
    assert cs == {"selector": 8, "base": 0, "limit": 0xFFFF_FFFF, "access": 0xC09B}
    for data in (es, *others):
        assert data == {"selector": 0x18, "base": 0, "limit": 0xFFFF_FFFF, "access": 0xC093}
    assert state["tr"]["limit"] == 0x67
    assert state["msrs"] == [(0xC000_0080, 0)]
    info = ram.at(state["gpr"][3], 56)
    magic, version, _, modules, modlist, cmdline, rsdp, memmap, entries = unpack_from("<4I4QI", info)
    assert (magic, version, modules) == (0x336E_C578, 1, 1)
    assert ram.at(cmdline, 15) == b"quiet panic=-1\0"
    assert ram.at(rsdp, 8) == b"RSD PTR "
    gpa, size, _, _ = unpack_from("<4Q", ram.at(modlist, 32))
    assert ram.at(gpa, size) == b"initrd!"
    assert gpa == 64 * MIB - 4096
    assert [unpack_from("<QQI", ram.at(memmap + 24 * n, 24)) for n in range(entries)] == [
        (0, 0x9_FC00, 1),
        (0x9_FC00, 0x400, 2),
        (0xE_0000, 0x1000, 2),
        (0x10_0000, 63 * MIB, 1),
    ]


def test_pvh_with_memory_above_4_gib(load: Any, elf: Elf) -> None:
    state, ram = load(elf(), initrd=b"x", size=5 * GIB)
    memmap, entries = unpack_from("<QI", ram.at(state["gpr"][3], 56), 40)
    last = unpack_from("<QQI", ram.at(memmap + 24 * (entries - 1), 24))
    assert last == (4 * GIB, 2 * GIB, 1)
    modlist = unpack_from("<Q", ram.at(state["gpr"][3], 56), 16)[0]
    assert unpack_from("<Q", ram.at(modlist, 8))[0] == 2 * GIB - 4096


def test_pvh_without_initrd(load: Any, elf: Elf) -> None:
    state, ram = load(elf())
    assert unpack_from("<II", ram.at(state["gpr"][3], 56), 12) == (0, 0)


def test_pvh_of_a_32_bit_kernel(load: Any, elf: Elf) -> None:
    assert load(elf(bits=32))[0]["rip"] == 0x100_0040


def test_bzimage_is_unpacked_for_pvh(load: Any, elf: Elf) -> None:
    inner = elf()
    state, ram = load(bzimage(inner))
    assert state["rip"] == 0x100_0040
    assert ram.at(0x100_0000, 64) == b"\x90" * 64


def check_long_mode(state: dict[str, Any], ram: Ram) -> bytes:
    assert state["cr0"] & 0x8000_0001 == 0x8000_0001
    assert state["cr4"] == 0x20
    assert state["msrs"] == [(0xC000_0080, 0x500)]
    assert state["segments"][1]["selector"] == 0x10
    assert state["segments"][1]["access"] == 0xA09B
    for gva in (0, 0x7123, 0x100_0000, 0x7FFF_F123, 0xFFFF_FFFF):
        table = state["cr3"]
        for shift in (39, 30):
            (entry,) = unpack_from("<Q", ram.at(table + 8 * (gva >> shift & 0x1FF), 8))
            assert entry & 0x81 == 1
            table = entry & ~0xFFF
        (entry,) = unpack_from("<Q", ram.at(table + 8 * (gva >> 21 & 0x1FF), 8))
        assert entry & 0x83 == 0x83
        assert (entry & ~0x1F_FFFF) | (gva & 0x1F_FFFF) == gva
    return ram.at(state["gpr"][6], 4096)


def test_linux64_of_a_bzimage(load: Any, elf: Elf) -> None:
    state, ram = load(bzimage(elf()), initrd=b"abc", boot_by="linux64")
    params = check_long_mode(state, ram)
    assert state["rip"] == 0x100_0200
    assert unpack_from("<Q", params, 0x70)[0] == 0xE_0000
    assert params[0x1E8] == 4
    assert params[0x202:0x206] == b"HdrS"
    assert params[0x210] == 0xFF
    assert params[0x211] == 0x01
    gpa, size = unpack_from("<II", params, 0x218)
    assert ram.at(gpa, size) == b"abc"
    assert ram.at(unpack_from("<I", params, 0x228)[0], 6) == b"quiet\0"
    assert unpack_from("<QQI", params, 0x2D0) == (0, 0x9_FC00, 1)


def test_linux64_of_a_vmlinux(load: Any, elf: Elf) -> None:
    state, ram = load(elf(pvh=None))
    params = check_long_mode(state, ram)
    assert state["rip"] == 0x100_0000
    assert unpack_from("<H", params, 0x1FE)[0] == 0xAA55
    assert params[0x202:0x206] == b"HdrS"


def test_bzimage_without_note_goes_by_linux64(load: Any, elf: Elf) -> None:
    assert load(bzimage(elf(pvh=None)))[0]["rip"] == 0x100_0200


def check_protected_mode(state: dict[str, Any], ram: Ram) -> bytes:
    """Linux boot.rst, 32-bit Boot Protocol: __BOOT_CS 0x10, __BOOT_DS 0x18, flat."""
    assert (state["cr0"] & 0x8000_0001, state["cr4"], state["rflags"]) == (1, 0, 2)
    es, cs, ss, ds, *_ = state["segments"]
    assert (cs["selector"], cs["access"]) == (0x10, 0xC09B)
    assert {segment["selector"] for segment in (es, ss, ds)} == {0x18}
    assert (state["gpr"][3], state["gpr"][5], state["gpr"][7]) == (0, 0, 0)
    return ram.at(state["gpr"][6], 4096)


def test_linux32_of_a_vmlinux(load: Any, elf: Elf) -> None:
    state, ram = load(elf(pvh=None, bits=32), initrd=b"abc")
    params = check_protected_mode(state, ram)
    assert state["rip"] == 0x100_0000
    assert params[0x202:0x206] == b"HdrS"
    gpa, size = unpack_from("<II", params, 0x218)
    assert ram.at(gpa, size) == b"abc"


def test_linux32_of_a_bzimage(load: Any, elf: Elf) -> None:
    image = bytearray(bzimage(elf(bits=32), xloadflags=0))
    state, ram = load(bytes(image), boot_by="linux32")
    check_protected_mode(state, ram)
    assert state["rip"] == 0x100_0000
    image[0xD00:0xD04] = b"\x89LZO"
    state, ram = load(bytes(image))
    check_protected_mode(state, ram)


def test_a_32_bit_bzimage_without_note_is_unpacked(load: Any, elf: Elf) -> None:
    state, ram = load(bzimage(elf(pvh=None, bits=32), xloadflags=0))
    check_protected_mode(state, ram)
    assert ram.at(0x100_0000, 64) == b"\x90" * 64


def test_gdt_matches_the_selectors(load: Any, elf: Elf) -> None:
    for kernel in (elf(), elf(pvh=None), elf(pvh=None, bits=32)):
        state, ram = load(kernel)
        gdt = ram.at(state["gdt"]["base"], state["gdt"]["limit"] + 1)
        for segment in (*state["segments"], state["tr"]):
            (entry,) = unpack_from("<Q", gdt, segment["selector"])
            assert entry >> 40 & 0xF0FF == segment["access"]


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"pvh": None, "boot_by": "pvh"}, ImageError, "has no PVH entry"),
        ({"bits": 32, "boot_by": "linux64"}, ImageError, "32-bit kernel, its 64-bit entry"),
        ({"bits": 64, "boot_by": "linux32"}, ImageError, "64-bit kernel, its 32-bit entry"),
        ({"size": 16 * MIB}, ConfigError, "needs memory up to 17 MiB, the machine has 16"),
        ({"memsz": 100 * MIB}, ConfigError, "needs memory up to 116 MiB"),
        ({"paddr": 0x8000}, ConfigError, "1 MiB or above"),
        ({"initrd": bytes(48 * MIB)}, ConfigError, "48 MiB do not fit"),
        ({"initrd": bytes(65 * MIB)}, ConfigError, "larger than the machine's memory"),
        ({"initrd": b""}, ImageError, "the file is empty"),
        ({"append": "x" * 2048}, ConfigError, "has 2048 bytes, the kernel takes 2047"),
        ({"append": "a\0b"}, ConfigError, "NUL"),
        ({"append": "a\nb"}, ConfigError, "line break"),
    ],
)
def test_what_does_not_fit(
    load: Any, elf: Elf, options: dict[str, Any], kind: type[BunshinError], words: str
) -> None:
    of_elf = {key: options.pop(key) for key in ("pvh", "bits", "memsz", "paddr") if key in options}
    with pytest.raises(kind, match=words):
        load(elf(**of_elf), **options)


def test_limits_of_a_bzimage(load: Any, elf: Elf) -> None:
    with pytest.raises(ConfigError, match="the kernel takes 100"):
        load(bzimage(elf()), append="x" * 101, boot_by="linux64")
    with pytest.raises(ImageError, match="no 64-bit entry"):
        load(bzimage(elf(), xloadflags=0), boot_by="linux64")


def test_a_damaged_bzimage_is_not_booted(load: Any, elf: Elf) -> None:
    good = bzimage(elf())
    with pytest.raises(ImageError, match="gzip"):
        load(good[:0xD10] + bytes(20) + good[0xD24:])


def test_an_unknown_packing_is_left_to_the_guest(load: Any, elf: Elf) -> None:
    image = bytearray(bzimage(elf()))
    image[0xD00:0xD04] = b"\x89LZO"
    assert load(bytes(image))[0]["rip"] == 0x100_0200
    with pytest.raises(ImageError, match="lzo"):
        load(bytes(image), boot_by="pvh")
    assert pack("<I", 1)


def test_a_program_without_a_payload(load: Any, elf: Elf) -> None:
    """memtest86+ has Linux's header and nothing to unpack."""
    image = bytearray(bzimage(elf(), xloadflags=0))
    pack_into("<II", image, 0x248, 0, 0)
    state, ram = load(bytes(image))
    check_protected_mode(state, ram)
    with pytest.raises(ImageError):
        load(bytes(image), boot_by="pvh")
