"""Running the command as a person does: as a process, on pipes or on a terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import pytest

COMMAND = (sys.executable, "-m", "bunshin.cli")
PATIENCE = 90.0
"""Seconds until something that must come is given up; a busy host is slow."""


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The caller's environment without what would change the command's words."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("BUNSHIN_")}
    return {**kept, **(extra or {})}


def run_command(
    *words: str,
    typed: bytes = b"",
    patience: float = PATIENCE,
    env: Mapping[str, str] | None = None,
    preexec: Callable[[], object] | None = None,
    program: Sequence[str] = COMMAND,
) -> subprocess.CompletedProcess[bytes]:
    """Run `bunshin WORDS...` with piped input that ends; check that it shows no traceback."""
    done = subprocess.run(
        [*program, *words],
        input=typed,
        capture_output=True,
        timeout=patience,
        env=environment(env),
        preexec_fn=preexec,
        check=False,
    )
    assert b"Traceback" not in done.stderr, done.stderr.decode()
    return done


class TerminalSession:
    """`bunshin` as the foreground process of a terminal of its own."""

    def __init__(self, *words: str, program: Sequence[str] = COMMAND) -> None:
        self.seen = b""
        self._at = 0
        # The slave stays open here: its settings can be read before and after.
        self.master, self.slave = pty.openpty()
        self.before = termios.tcgetattr(self.slave)
        self._report, report = os.pipe()
        hold, self._hold = os.pipe()
        self._leader = os.fork()
        if self._leader == 0:
            try:
                for fd in (self.master, self._report, self._hold):
                    os.close(fd)
                _lead(self.slave, report, hold, [*program, *words])
            finally:
                os._exit(99)
        os.close(report)
        os.close(hold)
        self.pid = int.from_bytes(os.read(self._report, 4), "little")
        self.status: int | None = None

    def expect(self, pattern: bytes, patience: float = PATIENCE) -> bytes:
        """Wait until the output after the last match has `pattern`; return that match."""
        deadline = time.monotonic() + patience
        while True:
            found = re.compile(pattern).search(self.seen, self._at)
            if found:
                self._at = found.end()
                return found[0]
            left = deadline - time.monotonic()
            ready = left > 0 and select.select([self.master], [], [], left)[0]
            try:
                data = os.read(self.master, 65536) if ready else b""
            except OSError:
                data = b""
            if not data:
                raise AssertionError(f"{pattern!r} did not come after:\n{self.text()}")
            self.seen += data

    def text(self) -> str:
        """What came since the last match."""
        return self.seen[self._at :].decode(errors="replace")

    def send(self, data: bytes) -> None:
        """Type."""
        os.write(self.master, data)

    def settings(self) -> list[Any]:
        """The terminal's settings now."""
        return termios.tcgetattr(self.slave)

    def wait(self, patience: float = PATIENCE) -> int:
        """Read on until the process has ended; return its exit status as a shell shows it."""
        deadline = time.monotonic() + patience
        watched = [fd for fd in (self.master, self._report) if fd >= 0]
        while self.status is None:
            ready = select.select(watched, [], [], max(deadline - time.monotonic(), 0))[0]
            if not ready:
                raise AssertionError(f"bunshin did not end; it said:\n{self.text()}")
            if self.master in ready:
                self.seen += os.read(self.master, 65536)
            if self._report in ready:
                code = os.waitstatus_to_exitcode(int.from_bytes(os.read(self._report, 4), "little"))
                self.status = code if code >= 0 else 128 - code
        return self.status

    def close(self) -> None:
        """End what is left and give the terminal back."""
        if self.status is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        for fd in (self.master, self.slave, self._report, self._hold):
            if fd >= 0:
                os.close(fd)
        os.waitpid(self._leader, 0)


def _lead(slave: int, report: int, hold: int, command: list[str]) -> None:
    """The shell's part: lead the session, put bunshin in the foreground, stay until it is over."""
    os.login_tty(slave)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        os.tcsetpgrp(0, os.getpid())
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        signal.signal(signal.SIGTTOU, signal.SIG_DFL)
        os.execvpe(command[0], command, environment())
    os.write(report, pid.to_bytes(4, "little"))
    status = os.waitpid(pid, 0)[1]
    os.write(report, status.to_bytes(4, "little"))
    os.read(hold, 1)
    os._exit(0)


@pytest.fixture
def command() -> Callable[..., subprocess.CompletedProcess[bytes]]:
    """`run_command`."""
    return run_command


@pytest.fixture
def terminal() -> Iterator[Callable[..., TerminalSession]]:
    """Start sessions that are ended after the test."""
    sessions: list[TerminalSession] = []

    def start(*words: str, **options: Any) -> TerminalSession:
        sessions.append(TerminalSession(*words, **options))
        return sessions[-1]

    yield start
    for session in sessions:
        session.close()


@pytest.fixture(scope="session")
def tiny() -> dict[str, str]:
    """The image `tiny`, built before the first test that needs it: its kernel and initrd."""
    from bunshin import images

    image = images.get("tiny")
    return {"kernel": image.kernel, "initrd": image.initrd}
