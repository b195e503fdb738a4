from __future__ import annotations

from typing import Any

import pytest

from bunshin.config import MachineConfig, parse_size
from bunshin.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512M", 512 << 20),
        ("1G", 1 << 30),
        ("262144K", 256 << 20),
        ("262144k", 256 << 20),
        ("64", 64 << 20),
        (64, 64 << 20),
        ("2GiB", 2 << 30),
        ("2GB", 2 << 30),
        (" 16M ", 16 << 20),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "M", "12Q", "0", "-1", "1M", "15M", "1.5G", "1e9", "512MM", "0x10M", "1 G", "99999999T", "16385K",
     "\u0661\u0662M", "²G", "B", "iB", "G512"],
)  # fmt: skip
def test_bad_sizes(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_size(text)
    assert caught.value.slug == "memory-size"
    assert str(caught.value).startswith("memory: ")
    assert "\n" not in str(caught.value)


def test_checks() -> None:
    assert MachineConfig.check(kernel="k").memory == 512 << 20
    assert MachineConfig.check(kernel="k", cpus=64).cpus == 64
    wrongs: list[dict[str, Any]] = [
        {"kernel": None},
        {"kernel": "k", "cpus": 0},
        {"kernel": "k", "cpus": 65},
        {"kernel": "k", "cpus": True},
        {"kernel": "k", "boot": "bios"},
        {"kernel": "k", "memory": "1M"},
    ]
    for wrong in wrongs:
        with pytest.raises(ConfigError):
            MachineConfig.check(**wrong)
