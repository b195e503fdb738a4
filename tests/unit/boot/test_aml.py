"""Encodings from ACPI 6.5, chapter 20, written out by hand."""

from __future__ import annotations

import pytest

from bunshin.boot import aml


@pytest.mark.parametrize(
    ("value", "encoded"),
    [(0, "00"), (1, "01"), (5, "0a05"), (0x1234, "0b3412"), (0x12345, "0c45230100"),
     (1 << 40, "0e0000000000010000")],
)  # fmt: skip
def test_integers(value: int, encoded: str) -> None:
    assert aml.integer(value).hex() == encoded


@pytest.mark.parametrize(
    ("length", "encoded"),
    [(0, "01"), (62, "3f"), (63, "4104"), (0xFFD, "4fff"), (0xFFE, "810001"),
     (0xFFFFC, "8fffff"), (0xFFFFD, "c1000001")],
)  # fmt: skip
def test_package_lengths(length: int, encoded: str) -> None:
    assert aml.package_length(length).hex() == encoded


def test_names() -> None:
    assert aml.name_seg("A") == b"A___"
    assert aml.name_seg("\\_SB") == b"\\_SB_"
    assert aml.eisa_id("PNP0501").hex() == "0c41d00501"
    assert aml.string("QEMU0001") == b"\x0dQEMU0001\0"


def test_resources() -> None:
    out = aml.resources(aml.io(0x3F8, 8), aml.irq_no_flags(4))
    assert out.hex() == "11100a0d" + "4701f803f8030108" + "221000" + "7900"


def test_containers() -> None:
    assert aml.package(aml.integer(5), aml.integer(0)) == b"\x12\x05\x02\x0a\x05\x00"
    assert aml.device("A", aml.named("B", aml.integer(1))) == b"\x5b\x82\x0bA___\x08B___\x01"
    assert aml.scope("\\_SB_", b"x") == b"\x10\x07\\_SB_x"


def test_too_large() -> None:
    with pytest.raises(ValueError, match="AML"):
        aml.integer(1 << 64)
    with pytest.raises(ValueError, match="AML"):
        aml.package_length(1 << 28)
