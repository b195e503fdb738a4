from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from bunshin.errors import StateError
from bunshin.state import pack, unpack


@dataclass
class Sample:
    number: int
    flag: bool = False
    data: bytearray = field(default_factory=bytearray)
    values: list[int] = field(default_factory=list)


GOOD = {"number": 3, "flag": True, "data": b"xy", "values": [1, 2]}


def test_round_trip() -> None:
    packed = pack("sample", 2, Sample(3, True, bytearray(b"xy"), [1, 2]))
    assert packed == {"name": "sample", "version": 2, "fields": GOOD}
    again = unpack("sample", 2, Sample, packed)
    assert again == Sample(3, True, bytearray(b"xy"), [1, 2])
    assert type(again.data) is bytearray


def test_fields_gained_since_take_their_default() -> None:
    old = {"name": "sample", "version": 1, "fields": {"number": 1}}
    assert unpack("sample", 2, Sample, old) == Sample(1)


@pytest.mark.parametrize(
    "packed",
    [
        None,
        [],
        {},
        {"name": "sample", "version": 1, "fields": None},
        {"name": "other", "version": 1, "fields": GOOD},
        {"name": "sample", "version": 3, "fields": GOOD},
        {"name": "sample", "version": 0, "fields": GOOD},
        {"name": "sample", "version": "1", "fields": GOOD},
        {"name": "sample", "version": 1, "fields": {}},
        {"name": "sample", "version": 1, "fields": {**GOOD, "number": "3"}},
        {"name": "sample", "version": 1, "fields": {**GOOD, "number": True}},
        {"name": "sample", "version": 1, "fields": {**GOOD, "flag": 1}},
        {"name": "sample", "version": 1, "fields": {**GOOD, "values": [1, "2"]}},
        {"name": "sample", "version": 1, "fields": {**GOOD, "extra": 1}},
    ],
)
def test_untrusted(packed: Any) -> None:
    with pytest.raises(StateError, match="saved state of sample"):
        unpack("sample", 2, Sample, packed)
