"""`bunshin run` in front of a toy machine: terminals, pipes, signals, exit statuses."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TOY = (sys.executable, str(Path(__file__).with_name("toy.py")), "run")
PROMPT = rb"> $"

Command = Callable[..., subprocess.CompletedProcess[bytes]]


@pytest.fixture
def toy(command: Command) -> Command:
    """Run the toy with piped input."""
    return lambda *words, **options: command(*words, program=TOY, patience=30, **options)


@pytest.fixture
def session(terminal: Callable[..., Any]) -> Callable[..., Any]:
    """Start the toy on a terminal and wait for its prompt."""

    def start(*words: str) -> Any:
        started = terminal(*words, program=TOY)
        started.expect(PROMPT, 30)
        return started

    return start


def popen(*words: str) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    return subprocess.Popen([*TOY, *words], stdin=pipe, stdout=pipe, stderr=pipe)


# Pipes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "code", "said"),
    [
        ("power-off", 0, ""),
        ("panic", 3, "bunshin: panic: the toy met a panic\n"),
        ("reset", 4, "bunshin: reset: the toy met a reset\n"),
        ("triple-fault", 5, "bunshin: triple-fault: the toy met a triple-fault\n"),
        ("failed", 7, "bunshin: the toy engine broke\n"),
    ],
)
def test_outcomes(toy: Command, kind: str, code: int, said: str) -> None:
    done = toy(typed=f"hello\n{kind}\n".encode())
    assert done.returncode == code
    assert done.stderr.decode() == said
    assert done.stdout.startswith(b"toy\r\n> hello\r\n> ")
    assert done.stdout.endswith(kind.encode() + b"\r\n")


def test_piped_input_is_not_searched_for_ctrl_a(toy: Command) -> None:
    done = toy(typed=b"a\x01x\x01\x01b\npower-off\n")
    assert b"a^Ax^A^Ab" in done.stdout
    assert done.returncode == 0


def test_the_end_of_input_is_not_the_end_of_the_guest(toy: Command) -> None:
    done = toy("--timeout", "0.5", typed=b"hello\n")
    assert done.stdout.endswith(b"hello\r\n> ")
    assert done.returncode == 124
    assert done.stderr == b"bunshin: timeout: the guest still ran after 0.5 s\n"


def test_no_input_at_all(toy: Command) -> None:
    done = toy("--timeout", "0.3", preexec=lambda: os.close(0))
    assert done.returncode == 124


def test_no_output_at_all(toy: Command) -> None:
    done = toy(typed=b"power-off\n", preexec=lambda: os.close(1))
    assert done.returncode == 0


def test_arguments_as_typed(toy: Command) -> None:
    script = b"arguments\npower-off\n"
    assert b"[('engine', 'translator'), ('image', 'tiny')]" in toy("-accel", "tcg", typed=script).stdout
    words = ["-kernel", "K", "-initrd", "I", "-append", "a b", "-m", "1G", "-smp", "2"]
    expected = b"[('append', 'a b'), ('cpus', 2), ('initrd', 'I'), ('kernel', 'K'), ('memory', '1G')]"
    assert expected in toy(*words, typed=script).stdout
    assert b"[('append', 'console=ttyS0'), ('kernel', 'K')]" in toy("--kernel=K", typed=script).stdout


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["tiny", "--kernel", "K"], "choose one"),
        (["--initrd", "I"], "--initrd needs --kernel"),
        (["--console", "screen"], "--console: 'screen' is not"),
        (["--console", "file:"], "--console: 'file:' is not"),
        (["--timeout", "soon"], "--timeout: 'soon' is not a time"),
        (["--memry", "1G"], "did you mean '--memory'?"),
        (["--switch-at", "kvm"], "--switch-at: 'kvm' is not TIME:kvm or TIME:translator"),
        (["--switch-at", "5:xen"], "--switch-at: '5:xen' is not"),
        (["--switch-at", "soon:kvm"], "is not a time"),
    ],
)
def test_usage(toy: Command, words: list[str], part: str) -> None:
    done = toy(*words)
    assert done.returncode == 2
    assert part in done.stderr.decode()
    assert done.stderr.startswith(b"bunshin: ")
    assert done.stderr.count(b"\n") == 1
    assert done.stdout == b""


def test_moves_are_made_in_their_order(toy: Command) -> None:
    done = toy("--switch-at", "2:kvm", "--switch-at=1.5s:translator", typed=b"arguments\npower-off\n")
    assert done.stdout.startswith(b"moved to translator\r\ntoy\r\n")
    assert b"('movable', True)" in done.stdout
    assert done.stderr.decode() == "bunshin: --switch-at: KVM cannot keep it\n"
    assert done.returncode == 0


def test_an_engine_that_is_asked_for_in_vain_warns(toy: Command) -> None:
    done = toy("--engine", "kvm", typed=b"power-off\n")
    assert done.stderr.decode() == "bunshin: warning: KVM is slow here\n"
    assert done.returncode == 0


def test_console_file(toy: Command, tmp_path: Path) -> None:
    log = tmp_path / "log"
    done = toy("--console", f"file:{log}", "--timeout", "0.3", typed=b"power-off\n")
    assert done.returncode == 124  # a file has no keyboard
    assert log.read_bytes() == b"toy\r\n> "
    assert done.stdout == b""


def test_console_file_that_cannot_be(toy: Command, tmp_path: Path) -> None:
    done = toy("--console", f"file:{tmp_path}/absent/log")
    assert done.returncode == 7
    assert done.stderr.decode() == f"bunshin: {tmp_path}/absent/log: No such file or directory\n"


def test_console_none(toy: Command) -> None:
    done = toy("--console", "none", "--timeout", "0.3", typed=b"power-off\n")
    assert (done.returncode, done.stdout) == (124, b"")


def test_stats(toy: Command) -> None:
    done = toy("--stats", typed=b"power-off\n")
    assert done.stderr.decode().splitlines() == [
        "translation",
        "  engine.blocks  12  blocks translated",
        "devices",
        "  exits.pio-out   7  OUT that left to Python",
    ]
    assert toy("--stats=table", typed=b"power-off\n").stderr == done.stderr
    done = toy("--stats=json", typed=b"power-off\n")
    assert json.loads(done.stderr) == {"engine.blocks": 12, "exits.pio-out": 7}
    assert done.stderr.count(b"\n") == 1


def test_a_reader_that_leaves() -> None:
    process = popen()
    assert process.stdout is not None
    assert process.stdout.read(3) == b"toy"
    process.stdout.close()  # nothing more is printed, and still it ends
    assert process.wait(30) == 141
    assert process.stderr is not None
    assert process.stderr.read() == b""


def test_a_reader_that_leaves_a_flood() -> None:
    process = popen()
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"flood\n")
    process.stdin.flush()
    process.stdout.read(100_000)
    process.stdout.close()
    assert process.wait(30) == 141


def test_a_reader_that_does_not_read_slows_the_guest_and_fills_no_memory() -> None:
    process = popen()
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"flood\n")
    process.stdin.flush()
    pipe = process.stdout.fileno()
    room = fcntl.fcntl(pipe, fcntl.F_GETPIPE_SZ)
    wait_until(lambda: waiting(pipe) > room - 4096)
    wait_until(lambda: state(process.pid) == "S")
    assert memory_peak_kib(process.pid) < 64 * 1024
    process.terminate()
    assert process.wait(30) == 143


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_on_a_pipe(signum: int) -> None:
    process = popen()
    assert process.stdout is not None
    process.stdout.read(3)
    process.send_signal(signum)
    assert process.wait(30) == 128 + signum
    assert process.stderr is not None
    assert process.stderr.read() == b""


def test_nohup_is_respected() -> None:
    process = subprocess.Popen(
        ["nohup", *TOY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.read(3)
    process.send_signal(signal.SIGHUP)
    process.communicate(b"power-off\n", timeout=30)
    assert process.returncode == 0


# Terminals -----------------------------------------------------------------------


def test_terminal_is_raw_and_given_back(session: Callable[..., Any]) -> None:
    s = session()
    assert s.settings() != s.before
    s.send(b"ab\x03\x1a\x04c\r")  # Ctrl-C, Ctrl-Z, Ctrl-D belong to the guest
    s.expect(rb"ab\^C\^Z\^Dc\r\n> $")
    s.send(b"power-off\r")
    assert s.wait() == 0
    assert s.settings() == s.before


def test_keys(session: Callable[..., Any]) -> None:
    s = session()
    s.send(b"a\x01")
    s.send(b"\x01b\r")
    s.expect(rb"a\^Ab\r\n> $")
    s.send(b"\x01h")
    s.expect(rb"Ctrl-A x .*\r\n.*\r\n.*Ctrl-A Ctrl-A")
    s.send(b"\x01x")
    assert s.wait() == 0
    assert s.settings() == s.before


def test_the_prompt_after_it_has_its_own_line(session: Callable[..., Any]) -> None:
    s = session()
    s.send(b"unfinished\x01x")
    assert s.wait() == 0
    assert s.seen.endswith(b"\n")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_on_a_terminal(session: Callable[..., Any], signum: int) -> None:
    s = session()
    os.kill(s.pid, signum)
    assert s.wait() == 128 + signum
    assert s.settings() == s.before
    assert "Traceback" not in s.text()


def test_a_flood_can_be_ended(session: Callable[..., Any]) -> None:
    s = session()
    s.send(b"flood\r")
    s.expect(rb"89abcdef")
    s.send(b"\x01x")
    assert s.wait() == 0
    assert s.settings() == s.before


def test_sigkill_gives_the_terminal_back(session: Callable[..., Any]) -> None:
    s = session()
    os.kill(s.pid, signal.SIGKILL)
    assert s.wait() == 128 + signal.SIGKILL
    wait_until(lambda: s.settings() == s.before)


def test_a_failure_gives_the_terminal_back(session: Callable[..., Any]) -> None:
    s = session()
    s.send(b"failed\r")
    assert s.wait() == 7
    assert s.settings() == s.before
    assert "the toy engine broke" in s.text()


def test_stop_and_continue(session: Callable[..., Any]) -> None:
    s = session()
    os.kill(s.pid, signal.SIGTSTP)
    wait_until(lambda: state(s.pid) == "T")
    assert s.settings() == s.before
    os.kill(s.pid, signal.SIGCONT)
    wait_until(lambda: s.settings() != s.before)
    s.send(b"x\x03y\r")
    s.expect(rb"x\^Cy\r\n> $")
    s.send(b"power-off\r")
    assert s.wait() == 0
    assert s.settings() == s.before


def test_a_window_that_closes(session: Callable[..., Any]) -> None:
    s = session()
    for fd in (s.slave, s.master):
        os.close(fd)
    s.slave = s.master = -1
    assert s.wait() == 128 + signal.SIGHUP


def test_output_elsewhere_leaves_the_terminal_its_newlines(
    session: Callable[..., Any], terminal: Callable[..., Any], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    shell = ("sh", "-c", 'exec "$@" > ' + str(log), "sh", *TOY)
    s = terminal(program=shell)
    wait_until(lambda: log.exists() and b"> " in log.read_bytes())
    assert s.settings()[1] == s.before[1]
    s.send(b"\x01x")
    assert s.wait() == 0


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait for something that sends no event."""
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        os.sched_yield()


def state(pid: int) -> str:
    """A process's state as in proc(5), T for stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def waiting(fd: int) -> int:
    """Bytes that could be read from a pipe now."""
    return int.from_bytes(fcntl.ioctl(fd, termios.FIONREAD, bytes(4)), "little")


def memory_peak_kib(pid: int) -> int:
    """The most memory that a process had at a time (not what its parent had, as in rusage)."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmHWM:")[2].split()[0])
