"""Carries bytes between the host's stdin and stdout and the guest's console.

One loop in the main thread waits for whatever comes first: typed or piped
input, guest output, the end of the machine, the time limit. Nothing here
blocks, so signals are served at once; a reader that is slower than the guest
slows the guest down instead of filling memory.
"""

import os
import select
import signal
import threading
import time
from collections.abc import Callable
from typing import Protocol

from . import keys
from .terminal import Terminal

OUTPUT_LIMIT = 256 * 1024  # bytes that wait for a slow reader before the guest does
INPUT_LIMIT = 4096  # piped bytes that wait for the guest before the pipe does
TYPE_AHEAD = 65536  # typed bytes that wait for the guest before more are dropped
LOOK_AGAIN = 0.02  # seconds until a guest that was behind with its input is looked at again
CHUNK = 4096  # PIPE_BUF: a write of this size does not block once poll has said so
GATHER = 0.002  # seconds in which a burst of guest output goes out together

READER_GONE = "reader gone"
TERMINAL_CLOSED = "terminal closed"
QUIT = "quit"
TIMEOUT = "timeout"
ENDED = "ended"


class Console(Protocol):
    """The guest's serial console, as far as this file needs it."""

    def write(self, data: bytes) -> None:
        """Queue input for the guest; any thread."""

    @property
    def pending(self) -> int:
        """Bytes queued and not yet taken by the guest."""


class Waker:
    """A pipe that makes `poll` return; `ring` may be called anywhere, in a signal handler too.

    Signals ring as well: the kernel may hand one to another thread, and the main
    thread, which runs Python's handlers, would sleep on in `poll`.
    """

    def __init__(self) -> None:
        self.reader, self._writer = os.pipe()
        os.set_blocking(self.reader, False)
        os.set_blocking(self._writer, False)
        self._rung = False
        self._before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)

    def ring(self) -> None:
        """Make the loop go round."""
        if not self._rung:
            self._rung = True
            try:
                os.write(self._writer, b"!")
            except OSError:
                pass  # full, so it rings already; or closed, so nobody listens

    def clear(self) -> None:
        """The loop goes round now; what rings from here on counts for the next one."""
        try:
            os.read(self.reader, 64)
        except BlockingIOError:
            pass
        # After the read: a ring in between would be read away and still count.
        self._rung = False

    def close(self) -> None:
        """Give the pipe back."""
        signal.set_wakeup_fd(self._before)
        os.close(self.reader)
        os.close(self._writer)


class Output:
    """Guest output on its way to `fd`."""

    def __init__(self, fd: int, waker: Waker) -> None:
        self.fd = fd
        self.was_terminal = os.isatty(fd)
        self.last = b"\n"
        self._waker = waker
        self._buffer = bytearray()
        self._room = threading.Condition()
        self._closed = False

    def put(self, data: bytes) -> None:
        """Take guest output; waits while the reader is `OUTPUT_LIMIT` behind. Any thread but the loop's."""
        with self._room:
            while len(self._buffer) >= OUTPUT_LIMIT and not self._closed:
                self._room.wait()
            if not self._closed:
                self._buffer += data
        self._waker.ring()

    def say(self, text: str) -> None:
        """Bunshin's own words, between the guest's."""
        with self._room:
            self._buffer += text.replace("\n", "\r\n").encode()

    def __len__(self) -> int:
        return len(self._buffer)

    def write_some(self) -> None:
        """Write what poll has said can be written. Raises OSError when the reader is gone."""
        with self._room:
            chunk = bytes(self._buffer[:CHUNK])
            if not chunk:
                return
            written = os.write(self.fd, chunk)
            self.last = chunk[written - 1 : written] or self.last
            del self._buffer[:written]
            self._room.notify_all()

    def drain(self, seconds: float) -> None:
        """Write what is left if the reader takes it in time."""
        deadline = time.monotonic() + seconds
        poll = select.poll()
        poll.register(self.fd, select.POLLOUT)
        while self._buffer and (left := deadline - time.monotonic()) > 0:
            if poll.poll(left * 1000):
                try:
                    self.write_some()
                except OSError:
                    return

    def close(self) -> None:
        """Let go of the guest if it waits; later output is dropped."""
        with self._room:
            self._closed = True
            self._room.notify_all()


def attend(
    console: Console,
    wait: Callable[[], object],
    terminal: Terminal,
    output: Output,
    waker: Waker,
    source: int | None,
    timeout: float | None,
) -> str:
    """Serve the console until something ends it.

    Args:
        wait: returns when the machine has ended by itself.
        source: where input comes from, None for no input.
        timeout: seconds.
    Returns:
        ENDED, QUIT, TIMEOUT, READER_GONE or TERMINAL_CLOSED. Output that the
        guest had made before ENDED has been written.
    """
    done = threading.Event()

    def watch() -> None:
        try:
            wait()
        except Exception:
            pass  # whoever asks the machine how it ended is told
        done.set()
        waker.ring()

    threading.Thread(target=watch, name="bunshin-wait", daemon=True).start()
    deadline = None if timeout is None else time.monotonic() + timeout
    terminal.changed = waker.ring  # it came back to the foreground
    typed = keys.Keys()
    written_at = 0.0
    while True:
        ended = done.is_set()
        if ended and not output:
            return ENDED
        now = time.monotonic()
        if deadline is not None and now >= deadline:
            return TIMEOUT
        limits = [] if deadline is None else [deadline - now]
        gathering = len(output) and now - written_at < GATHER and not ended
        # Who is listened to changes with every round, so it is said anew.
        poll = select.poll()
        poll.register(output.fd, select.POLLOUT if output and not gathering else 0)
        if gathering:
            limits.append(written_at + GATHER - now)
        else:
            poll.register(waker.reader, select.POLLIN)
        if source is not None and (terminal.raw or not terminal.present):
            if terminal.present or console.pending < INPUT_LIMIT:
                poll.register(source, select.POLLIN)
            else:
                limits.append(LOOK_AGAIN)
        events = dict(poll.poll(min(limits) * 1000 + 1 if limits else None))

        if waker.reader in events:
            waker.clear()
        if events.get(output.fd):
            try:
                output.write_some()
            except OSError:
                return _reader_gone(output)
            if events[output.fd] & (select.POLLERR | select.POLLHUP | select.POLLNVAL):
                return _reader_gone(output)
            written_at = time.monotonic()
        if source is not None and source in events:
            data = _read(source)
            if terminal.present:
                if not data:
                    return TERMINAL_CLOSED
                data, commands = typed.feed(data)
                for command in commands:
                    if command == keys.QUIT:
                        return QUIT
                    output.say(keys.HELP_TEXT)
                if console.pending > TYPE_AHEAD:
                    data = b""
            elif not data:
                source = None  # the end of the input is not the end of the guest
            if data:
                console.write(data)


def _reader_gone(output: Output) -> str:
    return TERMINAL_CLOSED if output.was_terminal else READER_GONE


def _read(source: int) -> bytes:
    try:
        return os.read(source, CHUNK)
    except OSError:  # a terminal that went away, or a descriptor that was never open
        return b""
