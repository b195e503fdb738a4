from __future__ import annotations

import gzip
import io
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from bunshin.errors import ImageError
from bunshin.images import deb


def data_tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in (("./boot/vmlinuz-1", b"kernel" * 1000), ("./usr/x", b"no")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("./boot/vmlinuz")
        link.type = tarfile.SYMTYPE
        link.linkname = "/etc/passwd"
        tar.addfile(link)
    return out.getvalue()


def package(member: str, data: bytes) -> bytes:
    out = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), (member, data)):
        header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n"
        out += header.encode() + content + b"\n" * (len(content) % 2)
    return out


@pytest.mark.parametrize(
    ("member", "pack"),
    [
        ("data.tar.xz", lzma.compress),
        ("data.tar.gz", gzip.compress),
        ("data.tar.zst", zstandard.ZstdCompressor().compress),
        ("data.tar", bytes),
    ],
)
def test_reads(tmp_path: Path, member: str, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "x.deb"
    packed = pack(data_tar())
    path.write_bytes(package(member, packed))
    seen: list[int] = []
    found = list(deb.files(str(path), lambda name: name.startswith("boot/"), seen.append))
    assert found == [("boot/vmlinuz-1", b"kernel" * 1000)]
    assert 0 < sum(seen) <= len(packed)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a package",
        package("data.tar.lz", b"?"),
        package("data.tar.xz", b"?"),
        package("data.tar.gz", b"?"),
        package("data.tar.zst", b"?"),
        package("data.tar.xz", lzma.compress(b"x" * 2000)),
        package("data.tar.xz", lzma.compress(data_tar())[:120]),
        package("data.tar", data_tar()[:3000]),
        package("none", b""),
        package("data.tar", b"")[:70],
        package("data.tar", b"").replace(b"100644", b"1\xff0644").replace(b"4         `", b"x         `"),
    ],
)
def test_damaged(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.deb"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=r"x\.deb"):
        list(deb.files(str(path), lambda name: True))
