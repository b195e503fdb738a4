"""GDB for the tests that need it: the host's own, or Debian's, unpacked into the cache."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from bunshin.images import apt, cache
from bunshin.images.progress import Progress

LIBRARIES = ("lib", "usr/lib", "lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu")


@dataclass
class Gdb:
    """A GDB that can be run."""

    program: str
    environment: dict[str, str]

    def batch(self, commands: str, *words: str, timeout: float = 120) -> str:
        """Run commands, a line each; what GDB said, errors included."""
        with tempfile.NamedTemporaryFile("w", suffix=".gdb") as script:
            script.write("set pagination off\nset confirm off\nset height 0\nset width 0\n" + commands)
            script.flush()
            done = subprocess.run(
                [self.program, "-nx", "-batch", "-x", script.name, *words],
                env={**os.environ, **self.environment, "LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=timeout,
                check=False,
            )
        return done.stdout


def unpacked(home: Path) -> None:
    """Put gdb-minimal, and what it needs that is not installed here, below `home`."""
    progress = Progress("gdb")

    def wanted() -> list[str]:
        command = ["apt-get", *apt._own, "-s", "-q", "install", "--no-install-recommends", "gdb-minimal"]
        said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        return re.findall(r"^Inst (\S+)", said, re.M)

    names = wanted()
    if not names and apt.refresh(progress):
        names = wanted()
    assert names, "apt knows no gdb-minimal"
    for name in names:
        package = apt.show(name)
        assert package is not None, name
        with tempfile.TemporaryDirectory(dir=home) as work:
            path = apt.download(package, work, progress)
            subprocess.run(["dpkg-deb", "-x", path, str(home)], check=True)


@pytest.fixture(scope="session")
def gdb() -> Gdb:
    """The host's GDB, or one fetched with apt as the images are: the tests always run."""
    program = shutil.which("gdb")
    if program is not None:
        return Gdb(program, {})
    home = Path(cache.root()) / "tools" / "gdb"
    if not home.exists():
        home.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home.parent) as work:
            unpacked(Path(work))
            shutil.copytree(work, home, symlinks=True)
    paths = ":".join(str(home / part) for part in LIBRARIES)
    return Gdb(str(home / "usr/bin/gdb"), {"LD_LIBRARY_PATH": paths})
