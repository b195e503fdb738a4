"""The programs in examples/, the README's Python and a session typed line by line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("tiny")

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
README = re.findall(r"(?ms)^```python\n(.*?)^```", (ROOT / "README.md").read_text())
PROMISES = {
    "boot.py": r"Linux tiny \d+\.\d+\.\d+-\S*amd64 .* x86_64 GNU/Linux\npower-off\n",
    "device.py": "".join(rf"the guest reads {n} degrees\n" for n in (20, 21, 22)),
    "insight.py": r"(?s)translation\n  engine\.blocks +[\d,]+  .*\ntime by part\n  time\.total_ns +\d.*",
}
"""What each example prints."""


def run(*words: str) -> str:
    """What a Python program prints; it must end well and say nothing else."""
    command = [sys.executable, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_every_example_has_a_promise() -> None:
    assert {path.name for path in EXAMPLES} == set(PROMISES)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_does_what_it_promises(path: Path) -> None:
    assert re.fullmatch(PROMISES[path.name], run(str(path)))
    assert path.read_text().startswith('"""')


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_fits_into_thirty_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 30


@pytest.mark.parametrize("code", README, ids=range(len(README)))
def test_the_readme_runs(code: str) -> None:
    said = run("-c", code)
    if "print" in code:
        assert re.match(r"Linux tiny .*\n", said)
        assert "power-off" in said


class Session:
    """`python -i`: one line in, what it prints up to the next prompt out."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-i", "-q"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._answer()

    def _answer(self) -> str:
        assert self.process.stdout
        text = b""
        while not text.endswith((b">>> ", b"... ")):
            new = os.read(self.process.stdout.fileno(), 65536)
            assert new, text
            text += new
        return text.decode()[:-4].strip()

    def type(self, line: str) -> str:
        """Type one line and return the answer."""
        assert self.process.stdin
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()
        return self._answer()


@pytest.fixture
def session() -> Iterator[Session]:
    """An interpreter that is ended after the test."""
    session = Session()
    with session.process:
        yield session
        session.process.kill()


def test_a_session_typed_line_by_line(session: Session) -> None:
    assert session.type("from bunshin import Device, Machine") == ""
    assert session.type("class Answer(Device):") == ""
    assert session.type("    mmio = range(0xD000_0000, 0xD000_1000)") == ""
    assert session.type("    def read(self, offset, size): return 42") == ""
    assert session.type("") == ""
    assert session.type("m = Machine(image='tiny', devices=[Answer()])") == ""
    assert session.type("m.status") == "'built'"
    assert "Machine object" in session.type("m.start()")
    assert "tiny:" in session.type("m.console.expect('tiny:.*# ')")
    # The guest runs while the person thinks.
    assert session.type("m.console.write('devmem 0xd0000000\\n')") == ""
    assert session.type("m.console.expect(r'\\n(0x[0-9A-F]{8})\\r')[1]") == "'0x0000002A'"
    assert session.type("m.pause()") == ""
    assert session.type("hex(m.registers['cr0'] >> 31)") == "'0x1'"
    assert session.type("m.memory.write(0x1000, b'hello'); m.memory.read(0x1000, 5)") == "b'hello'"
    assert session.type("m.resume()") == ""
    # A mistake is told and nothing is lost.
    assert re.search(r"ConfigError: .*not all RAM", session.type("m.memory.read(1 << 40, 1)"))
    answer = session.type("m.console.expect('never', 0.1)")
    assert re.search(r"Timeout: console: 'never' was not printed within 0\.1 s", answer)
    assert session.type("m.stats()['device.answer.reads']") == "1"
    assert session.type("m.console.write('poweroff -f\\n')") == ""
    assert session.type("m.wait(60).kind") == "'power-off'"
    assert session.type("m.close(); m.status") == "'closed'"
    # Help speaks to people.
    assert "Wait until the regular expression" in session.type("help(m.console.expect)")


def test_leaving_a_session_ends_its_machines(session: Session) -> None:
    session.type("from bunshin import Machine")
    session.type("m = Machine(image='tiny').start()")
    session.type("n = Machine(image='tiny').start()")
    out, _ = session.process.communicate(b"exit()\n", timeout=60)
    assert (session.process.returncode, out) == (0, b"")
