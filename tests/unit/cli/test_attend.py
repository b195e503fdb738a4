"""What wakes the loop between the terminal and the machine."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator

import pytest

from bunshin.cli.attend import Waker


@pytest.fixture
def waker() -> Iterator[Waker]:
    waker = Waker()
    yield waker
    waker.close()


def rings(waker: Waker) -> bool:
    return bool(select.select([waker.reader], [], [], 0)[0])


def test_rings_until_cleared(waker: Waker) -> None:
    assert not rings(waker)
    waker.ring()
    waker.ring()
    assert rings(waker)
    waker.clear()
    assert not rings(waker)


def test_a_ring_while_it_is_cleared_does_not_silence_it(
    waker: Waker, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = os.read

    def late(fd: int, length: int) -> bytes:
        waker.ring()  # another thread, just before the pipe is emptied
        return read(fd, length)

    waker.ring()
    with monkeypatch.context() as patch:
        patch.setattr(os, "read", late)
        waker.clear()
    waker.ring()
    assert rings(waker)
