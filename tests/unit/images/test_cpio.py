from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from bunshin.images.cpio import Archive


def archive() -> bytes:
    out = Archive()
    out.directory("bin")
    out.file("bin/a", b"12345", 0o755)
    out.link("bin/b", "a")
    out.character_device("console", 5, 1)
    return out.finish()


def test_layout() -> None:
    data = archive()
    assert len(data) % 512 == 0
    at, names = 0, []
    while True:
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        name = data[at + 110 : at + 110 + fields[11] - 1]
        names.append((name, oct(fields[1]), fields[6], fields[9:11]))
        at += 110 + fields[11]
        at += -at % 4 + fields[6]
        at += -at % 4
        if name == b"TRAILER!!!":
            break
    assert names == [
        (b"bin", "0o40755", 0, [0, 0]),
        (b"bin/a", "0o100755", 5, [0, 0]),
        (b"bin/b", "0o120777", 1, [0, 0]),
        (b"console", "0o20600", 0, [5, 1]),
        (b"TRAILER!!!", "0o0", 0, [0, 0]),
    ]


@pytest.mark.skipif(not shutil.which("busybox"), reason="needs busybox")
def test_busybox_unpacks_it(tmp_path: Path) -> None:
    listing = subprocess.run(
        ["busybox", "cpio", "-tv"], input=archive(), capture_output=True, check=True, cwd=tmp_path
    ).stdout.decode()
    assert "bin/b -> a" in listing
    assert "crw-------" in listing
