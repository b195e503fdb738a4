"""Runs one program and reads the yardstick's lines as they come.

Every line is stamped with the processor time that the process had used by then,
so that each figure can be corrected for time that the host gave to others. For
commands that run natively the yardstick tells their processor time itself.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from payload import BEGIN, END

TICK = os.sysconf("SC_CLK_TCK")
FLOOR = 0.2
"""A smaller share of a processor is not explained by a busy host."""


@dataclass
class Figure:
    """One `name value unit` line."""

    value: float
    unit: str
    share: float
    """Share of one processor that the process got while it was measured."""
    used: float | None = None
    """Seconds of processor time that a native command used."""

    @property
    def rate(self) -> bool:
        """Higher is better."""
        return self.unit.endswith("/s")

    def corrected(self) -> float:
        """The value with a whole processor."""
        if self.used is not None:
            return self.used
        share = min(max(self.share, FLOOR), 1.0)
        return self.value / share if self.rate else self.value * share


@dataclass
class Run:
    """What one process printed and used."""

    figures: dict[str, Figure] = field(default_factory=dict)
    sums: dict[str, str] = field(default_factory=dict)
    user: float = 0.0
    system: float = 0.0
    wall: float = 0.0
    peak_mib: float = 0.0
    status: int = 0
    complete: bool = False
    text: str = ""


def run(command: list[str], limit: float, cwd: Path | None = None, framed: bool = True) -> Run:
    """Run `command` to its end, at most `limit` seconds.

    Args:
        framed: figures count only between a guest's BEGIN and END lines.
    """
    result = Run(complete=not framed)
    inside = not framed
    text: list[str] = []
    began = time.monotonic()
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=cwd
    )
    timer = threading.Timer(limit, process.send_signal, (signal.SIGKILL,))
    timer.start()
    assert process.stdout is not None
    before = (time.monotonic(), 0.0)
    for raw in process.stdout:
        now = (time.monotonic(), _used(process.pid))
        line = raw.decode(errors="replace").strip("\r\n")
        text.append(line)
        words = line.split()
        if line == BEGIN:
            inside = True
        elif line == END:
            result.complete = True
            inside = False
        elif inside and len(words) == 3 and words[2] == "sum":
            result.sums[words[0]] = words[1]
        elif inside and len(words) == 3 and words[0].endswith("_user"):
            # Printed with the line before it, so the stamp says nothing; what a guest
            # believes to have used is not what it got.
            figure = result.figures.get(words[0].removesuffix("_user"))
            if not framed and figure is not None and _number(words[1]):
                figure.used = float(words[1])
        elif inside and len(words) == 3 and _number(words[1]):
            share = (now[1] - before[1]) / max(now[0] - before[0], 1e-9)
            result.figures[words[0]] = Figure(float(words[1]), words[2], share)
        before = now
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = result.status = os.waitstatus_to_exitcode(status)
    timer.cancel()
    result.wall = time.monotonic() - began
    result.user, result.system = usage.ru_utime, usage.ru_stime
    result.peak_mib = usage.ru_maxrss / 1024
    result.text = "\n".join(text)
    return result


def _number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _used(pid: int) -> float:
    """User and system seconds of a process, its children and those that it waited for."""
    ticks = 0
    pids = [str(pid)]
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            pids += thread.read_text().split()
    for one in pids:
        with suppress(OSError):
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(int(fields[i]) for i in (11, 12, 13, 14))
    return ticks / TICK
