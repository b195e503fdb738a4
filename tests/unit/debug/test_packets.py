"""The bytes of GDB's remote protocol: appendix E.1 of its manual, and whatever else comes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bunshin.debug.packets import (
    LONGEST,
    Decoder,
    Packet,
    Signal,
    TooLong,
    encode,
    from_hex,
    number,
    unescape,
)


def decoded(data: bytes) -> list[Packet | Signal]:
    return list(Decoder().feed(data))


def test_a_packet() -> None:
    # The manual's own example of a sum: "$OK#9a".
    assert encode(b"OK") == b"$OK#9a"
    assert decoded(b"$OK#9a") == [Packet(b"OK")]
    assert decoded(b"$OK#9A") == [Packet(b"OK")]
    assert decoded(b"$#00") == [Packet(b"")]


def test_signals_stand_between_packets() -> None:
    assert decoded(b"+$OK#9a\x03-") == [Signal("+"), Packet(b"OK"), Signal("break"), Signal("-")]


def test_noise_between_packets_is_skipped() -> None:
    assert decoded(b"\x00zzz\xff#12$OK#9a") == [Packet(b"OK")]


def test_a_wrong_sum() -> None:
    assert decoded(b"$OK#9b$OK#9a") == [Signal("bad"), Packet(b"OK")]
    assert decoded(b"$OK#zz") == [Signal("bad")]


def test_escapes() -> None:
    # 0x7d stands before '#' ^ 0x20, '$' ^ 0x20, '}' ^ 0x20 and '*' ^ 0x20.
    assert encode(b"#$}*")[1:-3] == b"}\x03}\x04}]}\n"
    assert unescape(b"}\x03}\x04}]}\n") == b"#$}*"
    assert unescape(b"a}") == b"a"


def test_a_byte_in_the_middle_of_a_packet_is_part_of_it() -> None:
    assert decoded(encode(b"X\x03+-")) == [Packet(b"X\x03+-")]


def test_a_packet_without_end() -> None:
    decoder = Decoder()
    with pytest.raises(TooLong):
        for _ in range(LONGEST // 1000 + 2):
            assert list(decoder.feed(b"$" * 1000)) == []


def test_the_longest_packet() -> None:
    assert decoded(encode(b"a" * LONGEST)) == [Packet(b"a" * LONGEST)]
    with pytest.raises(TooLong):
        decoded(encode(b"a" * (LONGEST + 1)))


@given(st.lists(st.binary(max_size=60)), st.integers(1, 7))
def test_packets_survive_any_cut(packets: list[bytes], size: int) -> None:
    wire = b"".join(map(encode, packets))
    decoder = Decoder()
    found = [item for at in range(0, len(wire), size) for item in decoder.feed(wire[at : at + size])]
    assert found == [Packet(data) for data in packets]


@given(st.lists(st.binary(max_size=40) | st.sampled_from([b"$", b"#", b"+", b"\x03", b"}"])))
def test_any_bytes_at_all(pieces: list[bytes]) -> None:
    decoder = Decoder()
    for piece in pieces:
        for item in decoder.feed(piece):
            assert isinstance(item, (Packet, Signal))


@pytest.mark.parametrize("text", [b"", b"g", b"-1", b"0x1", b" 1", b"1_0", b"1" * 17, b"\xb2"])
def test_no_number(text: bytes) -> None:
    with pytest.raises(ValueError):
        number(text)


def test_numbers() -> None:
    assert number(b"1f") == 0x1F
    assert number(b"FFFFffffFFFFffff") == (1 << 64) - 1
    assert from_hex(b"00fF") == b"\x00\xff"
    for text in (b"0", b"0g", b"00 ff"):
        with pytest.raises(ValueError):
            from_hex(text)
