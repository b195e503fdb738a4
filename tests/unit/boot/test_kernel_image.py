"""Offsets from Linux Documentation/arch/x86/boot.rst, written out again."""

from __future__ import annotations

import bz2
import gzip
import lzma
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from struct import pack, pack_into
from typing import Any

import lz4.block
import pytest
import zstandard

from bunshin.boot.kernel_image import BzImage, Vmlinux, parse, parse_elf, read_file
from bunshin.errors import ImageError

Elf = Callable[..., bytes]


def lz4_legacy(data: bytes) -> bytes:
    out = b"\x02\x21\x4c\x18"
    for at in range(0, len(data), 8 << 20):
        packed = lz4.block.compress(data[at : at + (8 << 20)], store_size=False)
        out += pack("<I", len(packed)) + packed
    return out


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "xz": lambda data: lzma.compress(data, check=lzma.CHECK_CRC32),
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    "bzip2": bz2.compress,
    "lz4": lz4_legacy,
    "zstd": zstandard.ZstdCompressor().compress,
    "none": bytes,
}


def bzimage(payload: bytes, version: int = 0x20F, xloadflags: int = 1, sects: int = 4) -> bytes:
    out = bytearray((sects + 1) * 512)
    out[0x1F1] = sects
    pack_into("<H", out, 0x1FE, 0xAA55)
    out[0x200:0x202] = b"\xeb\x6a"
    out[0x202:0x206] = b"HdrS"
    pack_into("<H", out, 0x206, version)
    pack_into("<I", out, 0x22C, 0x7FFF_FFFF)
    pack_into("<I", out, 0x230, 0x20_0000)
    out[0x234] = 1
    pack_into("<H", out, 0x236, xloadflags)
    pack_into("<I", out, 0x238, 2047)
    pack_into("<II", out, 0x248, 0x240, len(payload))
    pack_into("<Q", out, 0x258, 0x100_0000)
    pack_into("<I", out, 0x260, 0x20_0000)
    return bytes(out) + bytes(0x240) + payload + bytes(16)


def packed(kind: str, data: bytes) -> bytes:
    out = PACKERS[kind](data)
    return out if kind == "gzip" else out + pack("<I", len(data))


@pytest.mark.parametrize("kind", PACKERS)
def test_every_compression(kind: str, elf: Elf) -> None:
    inner = elf(data=random.Random(1).randbytes(1 << 10) * (9 << 10))
    image = parse(bzimage(packed(kind, inner)), "bz")
    assert isinstance(image, BzImage)
    assert image.packing == kind
    assert (image.version, image.entry_64, image.preferred) == (0x20F, True, 0x100_0000)
    assert (image.cmdline_size, image.initrd_max, image.init_size) == (2047, 0x7FFF_FFFF, 0x20_0000)
    kernel = image.vmlinux()
    assert kernel.pvh_entry == 0x100_0040
    assert bytes(kernel.segments[0].data) == inner[-(9 << 20) :]


@pytest.mark.parametrize("kind", [kind for kind in PACKERS if kind != "none"])
def test_damage(kind: str, elf: Elf) -> None:
    good = packed(kind, elf(data=random.Random(2).randbytes(100_000)))
    for payload in (
        good[:5000] + good[-4:],
        good[:4] + bytes(len(good) - 8) + good[-4:],
        good[:3000] + bytes(64) + good[3064:],
        good[:-4] + pack("<I", 5),
        good[:-4] + pack("<I", 0xFFFF_FFFF),
        good[:-4] + bytes(4),
    ):
        image = parse(bzimage(payload), "bz")
        assert isinstance(image, BzImage)
        # zstd and lz4 frames carry no checksum here, so damage may keep the size.
        lenient = kind in ("zstd", "lz4")
        with suppress(ImageError) if lenient else pytest.raises(ImageError, match="kernel bz: "):
            image.vmlinux()


@pytest.mark.parametrize("kind", ["gzip", "xz", "lzma", "bzip2", "zstd"])
def test_bombs_are_stopped(kind: str) -> None:
    out = PACKERS[kind](bytes(16 << 20))
    image = parse(bzimage(out[:-4] + pack("<I", 1000) if kind == "gzip" else out + pack("<I", 1000)), "bz")
    assert isinstance(image, BzImage)
    with pytest.raises(ImageError, match="expected 1000"):
        image.vmlinux()


@pytest.mark.parametrize("start", [b"\x89LZO", b"nope"])
def test_unknown_compression(start: bytes) -> None:
    image = parse(bzimage(start + bytes(100)), "bz")
    assert isinstance(image, BzImage)
    with pytest.raises(ImageError, match="expected gzip, bzip2"):
        image.vmlinux()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d[:0x240], "setup header ends"),
        (lambda d: d[:0x1FE] + b"\0\0" + d[0x200:], "boot flag"),
        (lambda d: d[:0x206] + b"\x05\x02" + d[0x208:], "boot protocol 2.05"),
        (lambda d: d[:0x600], "is past the end"),
        (lambda d: d[:-1000], "may be truncated"),
        (lambda d: d[:0x248] + b"\xff" * 8 + d[0x250:], "may be truncated"),
        (lambda d: b"garbage" * 1000, "expected an ELF kernel"),
        (lambda d: b"x", "found 78 at offset 0 and nothing at 0x202"),
    ],
)
def test_bad_bzimages(change: Callable[[bytes], bytes], words: str) -> None:
    good = bzimage(packed("gzip", random.Random(4).randbytes(5000)))
    with pytest.raises(ImageError, match=words) as caught:
        parse(change(good), "/boot/bz")
    assert str(caught.value).startswith("kernel /boot/bz: ")


def unpack(data: bytes) -> Vmlinux:
    image = parse(data, "bz")
    assert isinstance(image, BzImage)
    return image.vmlinux()


def test_every_truncation_of_a_bzimage(elf: Elf) -> None:
    good = bzimage(packed("gzip", elf(data=bytes(200))))
    for length in range(len(good) - 16):
        with pytest.raises(ImageError):
            unpack(good[:length])


@pytest.mark.parametrize("bits", [32, 64])
def test_elf(elf: Elf, bits: int) -> None:
    kernel = parse(elf(bits=bits, memsz=0x5000), "vmlinux")
    assert isinstance(kernel, Vmlinux)
    assert kernel.bits == bits
    assert (kernel.start, kernel.end) == (0x100_0000, 0x100_5000)
    assert (kernel.entry, kernel.pvh_entry) == (0x100_0000, 0x100_0040)


def test_elf_without_note(elf: Elf) -> None:
    assert parse_elf(elf(pvh=None), "v").pvh_entry is None


def test_virtual_entry_point(elf: Elf) -> None:
    assert parse_elf(elf(entry=0xFFFF_FFFF_8100_0010), "v").entry == 0x100_0010


@pytest.mark.parametrize("bits", [32, 64])
def test_every_truncation_of_an_elf(elf: Elf, bits: int) -> None:
    good = elf(bits=bits)
    for length in range(len(good)):
        with pytest.raises(ImageError):
            parse(good[:length], "v")


def test_flipped_bytes_never_escape(elf: Elf) -> None:
    good, rng = elf(), random.Random(3)
    for _ in range(3000):
        bad = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        try:
            parse(bytes(bad), "v")
        except ImageError:
            pass


@pytest.mark.parametrize(
    ("offset", "value", "words"),
    [
        (4, b"\x03", "class and byte order"),
        (5, b"\x02", "class and byte order"),
        (18, b"\xb7\x00", "ELF machine 183"),
        (16, b"\x01\x00", "ELF type 1"),
        (54, b"\x20\x00", "program headers of 32 bytes"),
        (56, b"\x00\x00", "0 ELF program headers"),
        (64, b"\x02\x00\x00\x00", "nothing to load"),
        (72, b"\xff\xff\xff\xff\xff\xff\xff\x7f", "past the end"),
        (104, bytes(7) + b"\x01", "in memory at"),
        (88, bytes(7) + b"\x01", "in memory at"),
    ],
)
def test_bad_elfs(elf: Elf, offset: int, value: bytes, words: str) -> None:
    good = elf()
    bad = good[:offset] + value + good[offset + len(value) :]
    with pytest.raises(ImageError, match=words):
        parse(bad, "v")


def test_read_file(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    large = tmp_path / "large"
    large.write_bytes(bytes(11))
    cases: list[tuple[Any, str]] = [
        (tmp_path / "none", "kernel-unreadable"),
        (tmp_path, "kernel-unreadable"),
        ("a\0b", "kernel-unreadable"),
        (empty, "kernel-empty"),
        (large, "kernel-too-large"),
    ]
    for path, slug in cases:
        with pytest.raises(ImageError) as caught:
            read_file(str(path), "kernel", 10)
        assert caught.value.slug == slug
    assert bytes(read_file(str(large), "kernel", 11)) == bytes(11)
