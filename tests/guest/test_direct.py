"""Linux with its user code run directly, where the host can: `--engine direct`."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator

import pytest

from bunshin import Machine
from bunshin.cli import doctor

pytestmark = pytest.mark.usefixtures("tiny")

PROMPT = r"tiny:[^\n]*# "
COMPLAINTS = re.compile(r"cut here|[Oo]ops|BUG:|stall|lockup|segfault|general protection")
ZEROS = hashlib.sha256(bytes(8 << 20)).hexdigest()
SUM = "head -c 8388608 /dev/zero | sha256sum"


@pytest.fixture(params=[1, 2])
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    if doctor.direct().startswith("no"):
        pytest.skip(doctor.direct())
    with Machine(image="tiny", engine="direct", cpus=request.param) as machine:
        machine.start()
        machine.console.expect(PROMPT)
        yield machine


def sh(machine: Machine, command: str) -> str:
    """What `command` prints."""
    machine.console.write(f"echo be''gin; {command}; echo en''d\n")
    return machine.console.expect(rf"(?s)begin\r\n(.*?)end\r\n.*?{PROMPT}")[1].replace("\r\n", "\n")


def test_programs_at_once(machine: Machine) -> None:
    jobs = " & ".join(f"(i=0; while [ $i -lt 60000 ]; do i=$((i+1)); done; {SUM}; : {n})" for n in range(3))
    assert sh(machine, f"{jobs} & wait").split("\n").count(f"{ZEROS}  -") == 3
    stats = machine.stats()
    assert stats["engine.direct_traps"] > 0
    assert stats["engine.direct_losses"] == 0
    assert not COMPLAINTS.search(sh(machine, "dmesg"))


def test_a_pause_does_not_end_it(machine: Machine) -> None:
    machine.pause()
    time.sleep(0.3)
    machine.resume()
    before = machine.stats()["time.direct_ns"]
    sums = sh(machine, f"i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done; {SUM}")
    assert ZEROS in sums
    after = machine.stats()
    assert after["time.direct_ns"] - before > 50_000_000
    assert after["engine.direct_losses"] == 0
