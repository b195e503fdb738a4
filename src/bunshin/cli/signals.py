"""Signals that ask bunshin to end become one exception.

The handler first runs the hooks (a raw terminal is given back there), so that
nothing that happens on the way out can leave the terminal unusable. A second
signal ends the process at once.
"""

import os
import signal
from collections.abc import Callable
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

hooks: list[Callable[[], None]] = []
_seen = False


class Interrupted(BaseException):
    """A signal asked for the end; `status` is what the process returns."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.status = 128 + signum


def install() -> None:
    """Catch the ending signals, except those that the parent chose to ignore (nohup)."""
    global _seen
    _seen = False
    for signum in ENDING:
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, _end)


def _end(signum: int, frame: FrameType | None) -> None:
    global _seen
    for hook in hooks:
        hook()
    if _seen:
        os._exit(128 + signum)
    _seen = True
    raise Interrupted(signum)
