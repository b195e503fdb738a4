"""The image `tiny` booted through the command line, by pipe and by terminal."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.usefixtures("tiny")

Command = Callable[..., subprocess.CompletedProcess[bytes]]
Terminal = Callable[..., Any]

RELEASE = rb"\d+\.\d+\.\d+-[\w.+-]*amd64"
PROMPT = rb"[#$] (\x1b\[6n)?$"  # busybox asks the terminal where its cursor is
CTRL_A, CTRL_C = b"\x01", b"\x03"


# Pipes ---------------------------------------------------------------------------


def test_a_script_on_stdin(command: Command) -> None:
    done = command("run", typed=b"uname -r\npoweroff -f\n")
    assert re.search(rb"^" + RELEASE + rb"\r?$", done.stdout, re.MULTILINE), done.stdout
    assert done.returncode == 0
    assert done.stderr == b""


def test_long_piped_input_arrives_whole(command: Command) -> None:
    payload = b"".join(b"line %d of what is piped into the guest\n" % n for n in range(500))
    script = b"stty -echo; head -c %d | md5sum; poweroff -f\n" % len(payload)
    done = command("run", typed=script + payload)
    assert hashlib.md5(payload).hexdigest().encode() in done.stdout
    assert done.returncode == 0


def test_the_end_of_input_does_not_end_the_guest(command: Command) -> None:
    done = command("run", typed=b"sleep 2; echo still-$((40+2)); poweroff -f\n")
    assert b"still-42" in done.stdout
    assert done.returncode == 0


def test_timeout(command: Command) -> None:
    done = command("run", "--timeout", "3")
    assert done.returncode == 124
    assert done.stderr.startswith(b"bunshin: ")
    assert done.stderr.count(b"\n") == 1


def test_reset_is_told(command: Command) -> None:
    done = command("run", typed=b"reboot -f\n")
    assert done.returncode == 4
    assert b"reset" in done.stderr


def test_panic_is_told(command: Command) -> None:
    done = command("run", typed=b"echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger\n")
    assert b"Kernel panic - not syncing" in done.stdout
    assert done.returncode == 3
    assert b"panic" in done.stderr


def test_console_to_a_file(command: Command, tmp_path: Path) -> None:
    log = tmp_path / "boot.log"
    done = command("run", "--console", f"file:{log}", "--timeout", "60", "--append", NO_INIT)
    assert b"Kernel panic - not syncing" in log.read_bytes()
    assert done.stdout == b""
    # Without an init nobody loads the driver that tells of the panic before the reset.
    assert done.returncode in {3, 4}


NO_INIT = "console=ttyS0 rdinit=/absent root=/dev/absent panic=1"


def test_console_none(command: Command) -> None:
    done = command("run", "--console", "none", "--timeout", "2")
    assert (done.stdout, done.returncode) == (b"", 124)


def test_stats_go_to_stderr(command: Command) -> None:
    done = command("run", "--stats", typed=b"poweroff -f\n")
    assert done.returncode == 0
    assert re.search(rb"^  engine.blocks +[\d,]+  blocks translated$", done.stderr, re.MULTILINE)
    done = command("run", "--stats=json", typed=b"poweroff -f\n")
    figures = json.loads(done.stderr)
    assert figures["engine.blocks"] > 10_000
    assert figures["time.guest_code_ns"] > 0


def test_a_reader_that_leaves_ends_it_quietly() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "bunshin.cli", "run"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout
    assert process.stderr
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait(60) == 141
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.stdin
    process.stdin.close()


# Terminals -----------------------------------------------------------------------


def test_a_session(terminal: Terminal) -> None:
    session = terminal("run")
    session.expect(PROMPT)
    assert session.settings() != session.before
    session.send(b"uname -a\r")
    line = session.expect(rb"Linux .*\n")
    assert re.search(RELEASE, line)
    assert b"Debian" in line

    session.expect(PROMPT)
    session.send(CTRL_A + b"h")
    session.expect(rb"Ctrl-A x")
    session.expect(rb"to the guest\.\r\n")
    session.send(b"echo rea''dy; cat\r")
    session.expect(rb"ready\r\n")
    session.send(CTRL_A + CTRL_A + b"-here\r")
    session.expect(rb"\^A-here\r\n\x01-here")
    session.send(CTRL_C)
    session.expect(PROMPT)
    session.send(b"echo asl''eep; sleep 1000\r")
    session.expect(rb"asleep\r\n")
    session.send(CTRL_C)
    session.expect(PROMPT)

    session.send(b"poweroff -f\r")
    assert session.wait() == 0
    assert session.settings() == session.before


def test_ctrl_a_x_gives_the_terminal_back(terminal: Terminal) -> None:
    session = terminal("run")
    session.expect(PROMPT)
    session.send(CTRL_A + b"x")
    assert session.wait() == 0
    assert session.settings() == session.before


def test_ctrl_a_x_works_before_the_guest_listens(terminal: Terminal) -> None:
    session = terminal("run")
    session.expect(rb"\n")
    session.send(b"typed early" * 10 + CTRL_A + b"x")
    assert session.wait() == 0
    assert session.settings() == session.before


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_give_the_terminal_back(terminal: Terminal, signum: int) -> None:
    session = terminal("run")
    session.expect(PROMPT)
    os.kill(session.pid, signum)
    assert session.wait() == 128 + signum
    assert session.settings() == session.before
    assert "Traceback" not in session.text()


def test_kill_gives_the_terminal_back(terminal: Terminal) -> None:
    session = terminal("run")
    session.expect(PROMPT)
    os.kill(session.pid, signal.SIGKILL)
    assert session.wait() == 128 + signal.SIGKILL
    deadline = time.monotonic() + 20
    while session.settings() != session.before and time.monotonic() < deadline:
        os.sched_yield()
    assert session.settings() == session.before


def test_a_window_that_closes_ends_it(terminal: Terminal) -> None:
    session = terminal("run")
    session.expect(PROMPT)
    for fd in (session.slave, session.master):
        os.close(fd)
    session.slave = session.master = -1
    assert session.wait() == 128 + signal.SIGHUP


def test_timeout_gives_the_terminal_back(terminal: Terminal) -> None:
    session = terminal("run", "--timeout", "2")
    assert session.wait() == 124
    assert session.settings() == session.before
