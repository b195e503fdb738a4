"""The host's terminal in raw mode, given back on every way out.

Three nets, one below the other: `restore` when the run ends, a hook in the
signal handlers, and a guard process that gives the terminal back when bunshin
dies without a word (SIGKILL, a crash). Job control works: SIGTSTP gives the
terminal back and stops, SIGCONT takes it again when in the foreground.
"""

import os
import signal
import termios
from collections.abc import Callable
from types import FrameType
from typing import Any

from . import signals

IFLAG, OFLAG, CFLAG, LFLAG, CC = 0, 1, 2, 3, 6  # places in termios' list


class Terminal:
    """The terminal behind file descriptor `source`, if there is one.

    Build it before the machine: the guard is a fork and must not hold guest RAM.
    """

    def __init__(self, source: int | None, target: int) -> None:
        self.source = -1 if source is None else source
        self.present = False
        self.raw = False
        self.changed: Callable[[], object] = lambda: None
        self._entered = False
        self._guard: tuple[int, int] | None = None
        try:
            self._saved = termios.tcgetattr(self.source)
        except (OSError, termios.error, ValueError):
            return
        self.present = True
        self._raw_attributes = self._make_raw(keep_output=not os.isatty(target))
        self._guard = _start_guard(self.source, self._saved)
        signals.hooks.append(self.restore)
        # Writing the settings back from the background must not stop us.
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        signal.signal(signal.SIGTSTP, self._stop)
        signal.signal(signal.SIGCONT, self._continue)

    def _make_raw(self, keep_output: bool) -> list[Any]:
        attributes = termios.tcgetattr(self.source)
        attributes[IFLAG] &= ~(
            termios.BRKINT | termios.ICRNL | termios.INLCR | termios.INPCK | termios.ISTRIP | termios.IXON
        )
        if not keep_output:  # otherwise somebody else writes to this terminal
            attributes[OFLAG] &= ~termios.OPOST
        attributes[CFLAG] = attributes[CFLAG] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
        attributes[LFLAG] &= ~(termios.ECHO | termios.ICANON | termios.IEXTEN | termios.ISIG)
        attributes[CC][termios.VMIN] = 1
        attributes[CC][termios.VTIME] = 0
        return attributes

    def enter(self) -> None:
        """Take the terminal, if there is one and bunshin is in its foreground."""
        if self.present:
            self._entered = True
            self._take()

    def _take(self) -> None:
        try:
            if os.tcgetpgrp(self.source) != os.getpgrp():
                return
            self._tell_guard(b"r")
            termios.tcsetattr(self.source, termios.TCSANOW, self._raw_attributes)
            self.raw = True
        except (OSError, termios.error):
            pass  # the window is gone; reading will say so

    def restore(self) -> None:
        """Give the terminal back as it was found. May be called at any time, again too."""
        if self.raw:
            try:
                termios.tcsetattr(self.source, termios.TCSANOW, self._saved)
            except (OSError, termios.error):
                pass  # the window is gone
            self.raw = False
            self._tell_guard(b"c")

    def close(self) -> None:
        """Give the terminal back for good."""
        self.restore()
        if self._guard is None:
            return
        pid, pipe = self._guard
        self._guard = None
        signals.hooks.remove(self.restore)
        for signum in (signal.SIGTTOU, signal.SIGTSTP, signal.SIGCONT):
            signal.signal(signum, signal.SIG_DFL)
        os.close(pipe)
        try:
            os.waitpid(pid, 0)
        except ChildProcessError:
            pass

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        self.restore()
        os.kill(os.getpid(), signal.SIGSTOP)

    def _continue(self, signum: int, frame: FrameType | None) -> None:
        if self._entered:
            self._take()
            self.changed()

    def _tell_guard(self, word: bytes) -> None:
        if self._guard is not None:
            try:
                os.write(self._guard[1], word)
            except OSError:
                pass  # somebody ended the guard; the other nets hold


def _start_guard(source: int, saved: list[Any]) -> tuple[int, int]:
    """Fork the guard; return its pid and the pipe whose end it waits for."""
    reader, writer = os.pipe()
    old = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
        if pid == 0:
            _guard(source, reader, saved)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)
    os.close(reader)
    return pid, writer


def _guard(source: int, reader: int, saved: list[Any]) -> None:
    """The guard's whole life: all signals stay blocked, nothing but two descriptors stays open."""
    try:
        first = 0
        for kept in (*sorted((source, reader)), 1024):
            if first < kept:  # an empty range would close everything
                os.closerange(first, kept)
            first = kept + 1
        raw = False
        while word := os.read(reader, 1):
            raw = word == b"r"
        if raw:
            termios.tcsetattr(source, termios.TCSANOW, saved)
    finally:
        os._exit(0)
