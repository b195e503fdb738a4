"""The far end of a machine's serial port: what it printed, and typing into it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from threading import Condition
from typing import Any, overload

from .errors import ConfigError, Timeout

KEPT = 4 << 20
"""Unread bytes kept; older ones are dropped."""
REMEMBERED = 16 << 10
"""Bytes that `tail` can give at most."""


class Console:
    """Reads, writes and waits for text. All methods may be called from any thread."""

    def __init__(
        self,
        push: Callable[[bytes], object],
        waiting: Callable[[], int] = lambda: 0,
        copy: Any = None,
    ) -> None:
        """`push` types into the guest, `waiting` tells how much it has not taken yet.

        `push` answers False when it has no room for that.
        `copy` gets all output too: a callable that takes bytes, or a binary file.
        """
        self._push = push
        self._waiting = waiting
        self._copy, self._flush = _sink(copy)
        self._unread = bytearray()
        self._tail = bytearray()
        self._ended: str | None = None
        self._waiters = 0
        self._condition = Condition()

    def write(self, text: str | bytes) -> None:
        """Type `text` (str as UTF-8); the guest takes it as fast as it can.

        Returns at once: what the guest has not taken yet waits, `pending` tells how much.

        Raises:
            ConfigError: more than 1 MiB would wait then; nothing of `text` was typed.
        """
        data = text.encode() if isinstance(text, str) else bytes(text)
        if self._push(data) is False:
            raise ConfigError(
                "console-full",
                f"console: no room for {len(data)} more bytes, since {self.pending} wait for the guest; "
                "write in pieces and let `pending` go down in between",
            )

    @property
    def pending(self) -> int:
        """Bytes written and not yet taken by the guest."""
        return self._waiting()

    def read(self, timeout: float | None = 0) -> bytes:
        """Everything printed and not read yet.

        With nothing there, wait for the first byte at most `timeout` seconds (None
        for ever). Empty bytes: nothing came, or the run has ended.
        """
        with self._condition:
            if not self._unread and self._ended is None and timeout != 0:
                self._wait(lambda: bool(self._unread), timeout)
            data = bytes(self._unread)
            self._unread.clear()
            return data

    @overload
    def expect(self, pattern: str | re.Pattern[str], timeout: float | None = 60) -> re.Match[str]: ...
    @overload
    def expect(self, pattern: bytes | re.Pattern[bytes], timeout: float | None = 60) -> re.Match[bytes]: ...
    def expect(self, pattern: Any, timeout: float | None = 60) -> Any:
        """Wait until the regular expression `pattern` matches what was printed.

        Everything up to the end of the match counts as read, the rest stays.

        Returns:
            The match; what came before it is `match.string[:match.start()]`.
        Raises:
            Timeout: no match within `timeout` seconds (None for ever), or the run
                ended first; `tail` holds the last output.
        """
        compiled = re.compile(pattern)
        as_text = isinstance(compiled.pattern, str)
        found: list[Any] = []

        def look() -> bool:
            # surrogateescape keeps the way back to bytes exact.
            text: Any = self._unread.decode("utf-8", "surrogateescape") if as_text else bytes(self._unread)
            match = compiled.search(text)
            if match is None:
                return False
            end = text[: match.end()]
            length = len(end.encode("utf-8", "surrogateescape")) if as_text else len(end)
            del self._unread[:length]
            found.append(match)
            return True

        with self._condition:
            if not look():
                self._wait(look, timeout)
            if found:
                return found[0]
            tail = self.tail()
            shown = tail[-200:].decode("utf-8", "replace")
            if self._ended is not None:
                why = f"the run ended ({self._ended}) before {compiled.pattern!r} was printed"
                raise Timeout("console-ended", f"console: {why}; last output: {shown!r}", tail)
            why = f"{compiled.pattern!r} was not printed within {timeout} s"
            raise Timeout("console-timeout", f"console: {why}; last output: {shown!r}", tail)

    def tail(self, length: int = 400) -> bytes:
        """The last `length` bytes of output at most, read or not."""
        return bytes(self._tail[-length:])

    def feed(self, data: bytes) -> None:
        """Take output; called by the machine."""
        with self._condition:
            self._unread += data
            if len(self._unread) > KEPT:
                del self._unread[: len(self._unread) - KEPT]
            self._tail += data
            if len(self._tail) > 2 * REMEMBERED:
                del self._tail[:-REMEMBERED]
            if self._waiters:
                self._condition.notify_all()
        if self._copy is not None:
            self._copy(data)
            if self._flush is not None:
                self._flush()

    def end(self, why: str) -> None:
        """No more output will come; wakes everybody who waits."""
        with self._condition:
            self._ended = why
            self._condition.notify_all()

    def _wait(self, done: Callable[[], bool], timeout: float | None) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        self._waiters += 1
        try:
            while self._ended is None:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return
                self._condition.wait(left)
                if done():
                    return
        finally:
            self._waiters -= 1


def _sink(copy: Any) -> tuple[Callable[[bytes], object] | None, Callable[[], object] | None]:
    if copy is None:
        return None, None
    if hasattr(copy, "write"):
        return copy.write, getattr(copy, "flush", None)
    return copy, None
