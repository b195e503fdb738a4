from __future__ import annotations

import threading

from bunshin.clock import Clock


def test_stands_still_until_resumed() -> None:
    clock = Clock()
    assert clock.now_ns() == 0
    clock.resume()
    first = clock.now_ns()
    assert clock.now_ns() >= first
    clock.pause()
    stopped = clock.now_ns()
    assert clock.now_ns() == stopped
    clock.close()


def test_timers_run_in_order() -> None:
    clock, done = Clock(), threading.Event()
    order: list[int] = []

    def last() -> None:
        order.append(2)
        done.set()

    clock.after(2_000_000, last)
    clock.after(1_000_000, lambda: order.append(1))
    clock.after(0, lambda: order.append(0)).cancel()
    clock.resume()
    assert done.wait(10)
    assert order == [1, 2]
    clock.close()


def test_a_failing_timer_is_told() -> None:
    failed, told = threading.Event(), []

    def tell(error: Exception) -> None:
        told.append(error)
        failed.set()

    clock = Clock(tell)
    clock.resume()
    clock.after(0, lambda: divmod(1, 0) and None)
    assert failed.wait(10)
    assert isinstance(told[0], ZeroDivisionError)
    clock.close()
