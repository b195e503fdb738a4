"""The build against packages and an apt made here."""

from __future__ import annotations

import hashlib
import io
import lzma
import tarfile
from pathlib import Path

import pytest

from bunshin.errors import ImageError
from bunshin.images import apt, tiny
from bunshin.images.progress import Progress

BUSYBOX = b"\x7fELF...\0[\0[[\0ash\0busybox\0cat\0sh\0\0..."
APT = """#!/bin/sh
case "$*" in
"show --no-all-versions linux-image-cloud-amd64")
    echo "Package: linux-image-cloud-amd64
Version: 9
Size: 1
SHA256: 0
Depends: linux-image-9.9.9-1-cloud-amd64 (= 9)

Package: old" ;;
"show --no-all-versions linux-image-9.9.9-1-cloud-amd64")
    echo "Package: linux-image-9.9.9-1-cloud-amd64
Version: 9
Size: {kernel_size}
SHA256: {kernel_sha}" ;;
"show --no-all-versions busybox-static")
    echo "Package: busybox-static
Version: 1:1
Size: {busybox_size}
SHA256: {busybox_sha}" ;;
*download*linux*)
    {fail}
    echo "dlstatus:1:50.0:Retrieving"
    cp {directory}/kernel.deb . ;;
*download*busybox*) cp {directory}/busybox.deb . ;;
*) echo "N: Unable to locate package" >&2; exit 100 ;;
esac
"""


def deb(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo("./" + name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    data = lzma.compress(out.getvalue())
    return f"!<arch>\n{'data.tar.xz':<48}{len(data):<10}`\n".encode() + data


class Mirror:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.kernel = deb(
            {
                "boot/vmlinuz-9.9.9": b"kernel",
                "lib/modules/9/kernel/drivers/misc/pvpanic/pvpanic.ko": b"core",
                "lib/modules/9/kernel/drivers/misc/pvpanic/pvpanic-mmio.ko.xz": lzma.compress(b"io"),
            }
        )
        self.busybox = deb({"usr/bin/busybox": BUSYBOX})
        self.fail = ":"
        self.change = b""

    def open(self) -> None:
        (self.directory / "kernel.deb").write_bytes(self.kernel + self.change)
        (self.directory / "busybox.deb").write_bytes(self.busybox)
        script = APT.format(
            directory=self.directory,
            fail=self.fail,
            kernel_size=len(self.kernel),
            kernel_sha=hashlib.sha256(self.kernel).hexdigest(),
            busybox_size=len(self.busybox),
            busybox_sha=hashlib.sha256(self.busybox).hexdigest().upper(),
        )
        for name in ("apt-get", "apt-cache"):
            path = self.directory / name
            path.write_text(script)
            path.chmod(0o755)


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mirror:
    (tmp_path / "mirror").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'mirror'}:/usr/bin:/bin")
    monkeypatch.setenv("BUNSHIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(apt, "_own", [])
    return Mirror(tmp_path / "mirror")


def build(tmp_path: Path) -> tuple[Path, list[str], dict[str, str]]:
    target = tmp_path / "image"
    said: list[str] = []
    target.mkdir()
    facts = tiny.build(str(target), Progress("tiny", said.append))
    return target, said, facts


def test_build(mirror: Mirror, tmp_path: Path) -> None:
    mirror.open()
    target, said, facts = build(tmp_path)
    assert sorted(path.name for path in target.iterdir()) == ["initrd", "kernel"]
    assert (target / "kernel").read_bytes() == b"kernel"
    initrd = (target / "initrd").read_bytes()
    for piece in (BUSYBOX, b"core", b"io", b"insmod", b"bin/cat\0", b"TRAILER!!!"):
        assert piece in initrd
    assert facts["append"].startswith("console=ttyS0 ")
    assert facts["source"] == "linux-image-9.9.9-1-cloud-amd64 9, busybox-static 1:1"
    assert all(line.startswith("tiny: ") for line in said)
    assert "downloading linux-image-9.9.9-1-cloud-amd64 9 (0.0 MB)" in said[1]


def test_a_download_that_was_changed_on_the_way(mirror: Mirror, tmp_path: Path) -> None:
    mirror.change = b"!"
    mirror.open()
    with pytest.raises(ImageError, match="apt's index says"):
        build(tmp_path)


def test_no_network(mirror: Mirror, tmp_path: Path) -> None:
    mirror.fail = 'echo "E: Failed to fetch http://x Could not resolve" >&2; exit 100'
    mirror.open()
    with pytest.raises(ImageError, match=r"Failed to fetch http://x Could not resolve; .*--initrd"):
        build(tmp_path)


def test_no_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ImageError, match=r"no apt-cache here.*--kernel FILE and --initrd FILE"):
        build(tmp_path)


def test_apt_without_an_index(mirror: Mirror, tmp_path: Path) -> None:
    mirror.open()
    (mirror.directory / "apt-cache").write_text("#!/bin/sh\nexit 100\n")
    with pytest.raises(ImageError, match="apt-get update may help"):
        build(tmp_path)


def test_apt_with_an_index_of_our_own(mirror: Mirror, tmp_path: Path) -> None:
    """The system has no package lists; `apt-get update` into the cache brings some."""
    mirror.open()
    cache, get = mirror.directory / "apt-cache", mirror.directory / "apt-get"
    cache.rename(mirror.directory / "lists")
    get.rename(mirror.directory / "fetch")
    cache.write_text(f'#!/bin/sh\n[ "$1" = -o ] || exit 100\nshift 6\nexec {mirror.directory}/lists "$@"\n')
    get.write_text(f'#!/bin/sh\n[ "$1" = update ] && exit 0\nexec {mirror.directory}/fetch "$@"\n')
    for tool in (cache, get):
        tool.chmod(0o755)
    target, said, _ = build(tmp_path)
    assert (target / "kernel").read_bytes() == b"kernel"
    assert any("package lists" in line for line in said)
    assert (tmp_path / "cache" / "apt" / "lists" / "partial").is_dir()


def test_packages_that_are_not_as_expected(mirror: Mirror, tmp_path: Path) -> None:
    mirror.kernel = deb({"boot/config": b"x"})
    mirror.open()
    with pytest.raises(ImageError, match="has no boot/vmlinuz"):
        build(tmp_path)


def test_applets() -> None:
    assert tiny.applets(BUSYBOX) == ["[", "[[", "ash", "busybox", "cat", "sh"]
    for bad in (b"", b"\0[\0[[\0", b"\0[\0[[\0cat\0\0", b"\0[\0[[\0sh\0../x\0\0"):
        with pytest.raises(ImageError, match="no list of applets"):
            tiny.applets(bad)


def test_show_knows_nothing(mirror: Mirror) -> None:
    mirror.open()
    assert apt.show("nonsense") is None
