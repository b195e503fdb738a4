from __future__ import annotations

import io
import re
import threading

import pytest

from bunshin.console import Console
from bunshin.errors import ConfigError, Timeout


def console() -> tuple[Console, list[bytes]]:
    typed: list[bytes] = []
    return Console(typed.append), typed


def test_write() -> None:
    far, typed = console()
    far.write("h\u00e9\n")
    far.write(b"\x03")
    assert typed == [b"h\xc3\xa9\n", b"\x03"]


def test_write_has_a_limit() -> None:
    taken: list[bytes] = []

    def push(data: bytes) -> bool:
        if len(data) > 3:
            return False
        taken.append(data)
        return True

    far = Console(push, lambda: 7)
    far.write("abc")
    with pytest.raises(ConfigError, match="no room for 4 more bytes, since 7 wait"):
        far.write("abcd")
    assert taken == [b"abc"]


def test_read_takes_what_is_there() -> None:
    far, _ = console()
    far.feed(b"one")
    assert far.read() == b"one"
    assert far.read() == b""
    assert far.read(timeout=0.01) == b""
    threading.Timer(0.01, far.feed, (b"two",)).start()
    assert far.read(timeout=10) == b"two"


def test_expect_leaves_the_rest() -> None:
    far, _ = console()
    far.feed("caf\u00e9 login: rest".encode())
    match = far.expect(r"(\w+) login: ", timeout=0)
    assert match[1] == "caf\u00e9"
    assert far.read() == b"rest"


def test_expect_bytes_and_compiled() -> None:
    far, _ = console()
    far.feed(b"\xff\xfe ok 42\n")
    assert far.expect(rb"ok (\d+)", timeout=0)[1] == b"42"
    far.feed(b"\xffx yes")
    assert far.expect(re.compile("yes"), timeout=0)
    assert far.read() == b""


def test_expect_waits_across_pieces() -> None:
    far, _ = console()

    def feed() -> None:
        for byte in "prompt\u00a7 # ".encode():
            far.feed(bytes([byte]))

    threading.Timer(0.01, feed).start()
    assert far.expect("\u00a7 # ", timeout=10).string.startswith("prompt")


def test_expect_times_out_with_the_tail() -> None:
    far, _ = console()
    far.feed(b"Kernel panic")
    with pytest.raises(Timeout, match=r"'login' was not printed within 0.01 s.*Kernel panic") as caught:
        far.expect("login", timeout=0.01)
    assert caught.value.tail == b"Kernel panic"
    assert far.read() == b"Kernel panic"


def test_expect_ends_with_the_run() -> None:
    far, _ = console()
    threading.Timer(0.01, far.end, ("power-off",)).start()
    with pytest.raises(Timeout, match=r"run ended \(power-off\)") as caught:
        far.expect("login", timeout=10)
    assert caught.value.slug == "console-ended"
    far.feed(b"login")
    assert far.expect("login")


def test_copies() -> None:
    file = io.BytesIO()
    seen: list[bytes] = []
    Console(lambda data: None, copy=file).feed(b"a")
    Console(lambda data: None, copy=seen.append).feed(b"b")
    assert file.getvalue() == b"a"
    assert seen == [b"b"]


def test_old_output_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bunshin.console.KEPT", 10)
    far, _ = console()
    far.feed(b"0123456789abc")
    assert far.read() == b"3456789abc"
