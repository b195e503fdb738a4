from __future__ import annotations

import pytest

from bunshin import errors

KINDS = [
    errors.ConfigError,
    errors.ImageError,
    errors.StateError,
    errors.EngineError,
    errors.GuestError,
    errors.Timeout,
]


@pytest.mark.parametrize("kind", KINDS)
def test_slug_and_sentence(kind: type[errors.BunshinError]) -> None:
    error = kind("some-slug", "disk.img: found 3, expected 4")
    assert isinstance(error, errors.BunshinError)
    assert error.slug == "some-slug"
    assert str(error) == error.sentence == "disk.img: found 3, expected 4"


def test_timeout_is_a_timeout_error() -> None:
    error = errors.Timeout("late", "too late", b"login: ")
    assert isinstance(error, TimeoutError)
    assert error.tail == b"login: "
    assert str(error) == "too late"
