"""Guest time: a monotonic clock that stands still while the machine is paused, the
wall clock, and timers.

Timers run on one thread that is started when the first timer is set and waits on a
condition; nothing polls. All times are integers in nanoseconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from heapq import heappop, heappush
from threading import Condition, Thread, current_thread


class Timer:
    """A one-shot timer; `cancel` may be called at any time from any thread."""

    __slots__ = ("action", "due_ns")

    def __init__(self, due_ns: int, action: Callable[[], None]) -> None:
        self.due_ns = due_ns
        self.action: Callable[[], None] | None = action

    def cancel(self) -> None:
        """Never run the action, unless it is running already."""
        self.action = None

    def __lt__(self, other: Timer) -> bool:
        return self.due_ns < other.due_ns


class Clock:
    """Time as one machine sees it; stopped until `resume` is called."""

    def __init__(self, failed: Callable[[Exception], None] | None = None) -> None:
        self._failed = failed
        self._before_ns = 0
        self._since_ns: int | None = None
        self._timers: list[Timer] = []
        self._condition = Condition()
        self._thread: Thread | None = None
        self._closed = False

    def now_ns(self) -> int:
        """Nanoseconds the machine has run, pauses left out."""
        since = self._since_ns
        if since is None:
            return self._before_ns
        return self._before_ns + time.monotonic_ns() - since

    def wall_ns(self) -> int:
        """Nanoseconds since 1970-01-01 00:00 UTC, as the host tells it."""
        return time.time_ns()

    def pause(self) -> None:
        """Stop the clock and hold timers back."""
        with self._condition:
            self._before_ns = self.now_ns()
            self._since_ns = None

    def resume(self) -> None:
        """Let the clock run on."""
        with self._condition:
            if self._since_ns is None:
                self._since_ns = time.monotonic_ns()
            self._condition.notify()

    def after(self, delay_ns: int, action: Callable[[], None]) -> Timer:
        """Run `action` on the timer thread once `delay_ns` of guest time has passed."""
        with self._condition:
            timer = Timer(self.now_ns() + max(delay_ns, 0), action)
            heappush(self._timers, timer)
            if self._thread is None and not self._closed:
                self._thread = Thread(target=self._run, name="bunshin-timers", daemon=True)
                self._thread.start()
            else:
                self._condition.notify()
        return timer

    def close(self) -> None:
        """Drop all timers and join the thread."""
        with self._condition:
            self._closed = True
            self._timers.clear()
            self._condition.notify()
            thread = self._thread
        if thread is not None and thread is not current_thread():
            thread.join()

    def _run(self) -> None:
        while True:
            with self._condition:
                while not self._closed:
                    while self._timers and self._timers[0].action is None:
                        heappop(self._timers)
                    if self._since_ns is None or not self._timers:
                        self._condition.wait()
                        continue
                    wait_ns = self._timers[0].due_ns - self.now_ns()
                    if wait_ns <= 0:
                        break
                    self._condition.wait(wait_ns / 1e9)
                if self._closed:
                    return
                action = heappop(self._timers).action
            if action is not None:
                try:
                    action()
                except Exception as error:
                    if self._failed is not None:
                        self._failed(error)
