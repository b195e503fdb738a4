"""What several guest tests need: every engine of this host, and GDB.

KVM has limits of its own. They are named here, each with its reason, and a test that meets
one must fail, or the list is wrong; where KVM runs supervisor code in hardware it may pass.
GDB is the host's own, or Debian's, unpacked into the cache.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache as once
from pathlib import Path
from typing import Any

import pytest

from bunshin import engine as engines
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


END_OF_RAM, NOWHERE, LAPIC, IOAPIC = 32 << 20, 0xD000_0000, 0xFEE0_0000, 0xFEC0_0000
FXSAVE, FXRSTOR = b"\x0f\xae\x07", b"\x0f\xae\x0f"
TABLES = (b"\x0f\x01\x07\x0f\x01\x0f", b"\x0f\x01\x17")
"""SGDT and SIDT; LGDT."""
X87 = (b"\xd9\xe8\xdb\x3f\xdb\x2f", b"\xdd\x37\xdd\x27")
ENTER = b"\x89\xfc\x89\xfd\xc8\x10\x00\x1f"

REPEATS = "KVM's emulator repeats an instruction for ever whose operand of many bytes is a device"
CHIPS = "KVM's emulator does not know the instruction, and only KVM has the interrupt controller it accesses"
HYPERCALL = "this kind of KVM repeats VMCALL for ever"


def limit(test: str, params: dict[str, Any]) -> str | None:
    """What KVM does otherwise in a test."""
    if test == "test_hypercalls_have_no_effect":
        return HYPERCALL
    if test == "test_nonsense_in_descriptor_tables":
        return CHIPS if (params["limit"], params["base"]) == (0xFFFF, LAPIC) else None
    if test == "test_odd_accesses_outside_ram":
        code, place = params["code"], params["place"]
        if (code in (FXSAVE, FXRSTOR) and place % 16 == 0) or (code in TABLES and place > END_OF_RAM - 16):
            return REPEATS
        if (code in X87 and place > NOWHERE) or (code == ENTER and place == LAPIC + 8):
            return CHIPS
    return None


@once
def kvm() -> engines.Choice | str:
    """What the probe says of KVM on this host; a sentence where there is none to test."""
    found = engines.figures()
    return engines.decide(found).reason if found["refusal"] is not None else engines.decide(found)


@pytest.fixture(params=["translator", "kvm"])
def each_engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Machines that leave the choice of their engine open get this one."""
    name: str = request.param
    if name == "kvm":
        here = kvm()
        if isinstance(here, str):
            pytest.skip(here)
        callspec = getattr(request.node, "callspec", None)
        reason = limit(request.node.originalname, callspec.params if callspec else {})
        if reason is not None:
            request.applymarker(pytest.mark.xfail(reason=reason, strict=here.name != "kvm"))
    choose = engines.choose
    monkeypatch.setattr(engines, "choose", lambda asked="auto": choose(name if asked == "auto" else asked))
    return name
