"""Packets of GDB's remote protocol, and the bytes that they travel as.

    $data#cc    a packet; cc is the sum of data modulo 256 in hexadecimal
    + -         received well, received badly, until both sides agree to do without
    0x03        the user pressed Ctrl-C

In data, `}` precedes a byte that is sent with bit 5 flipped: `$`, `#`, `}` and, from the
stub, `*`, which GDB would take for a repetition. Spec: "Debugging with GDB", E.1.

Whatever bytes come, `Decoder` yields packets and nothing else; nonsense between packets
is skipped, as GDB itself does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

LONGEST = 0x1_0000
"""Bytes of data that a packet may have here; `PacketSize` promises less than that."""
INTERRUPT = 0x03
_START, _END, _ESCAPE = 0x24, 0x23, 0x7D
_ESCAPED = frozenset(b"$#}*")


@dataclass(frozen=True)
class Packet:
    """A packet whose sum was right: its data, escapes undone."""

    data: bytes


@dataclass(frozen=True)
class Signal:
    """A single byte with a meaning: `+`, `-`, `break` (Ctrl-C) or `bad` (a wrong sum)."""

    kind: str


class TooLong(ValueError):
    """A packet that never ends."""


class Decoder:
    """Bytes in, packets out; keeps what is not complete yet."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[Packet | Signal]:
        """Take some bytes; yield what they complete.

        Raises:
            TooLong: a packet is longer than `LONGEST`.
        """
        self._rest += data
        while self._rest:
            first = self._rest[0]
            if first == _START:
                end = self._rest.find(_END, 1, LONGEST + 2)
                if end < 0 and len(self._rest) > LONGEST + 1:
                    raise TooLong(f"a packet of more than {LONGEST} bytes")
                if end < 0 or len(self._rest) < end + 3:
                    return
                body = bytes(self._rest[1:end])
                told = bytes(self._rest[end + 1 : end + 3])
                del self._rest[: end + 3]
                yield Packet(unescape(body)) if told.lower() == checksum(body) else Signal("bad")
                continue
            del self._rest[0]
            if first == INTERRUPT:
                yield Signal("break")
            elif first in b"+-":
                yield Signal(chr(first))


def checksum(body: bytes) -> bytes:
    """Two hexadecimal digits."""
    return b"%02x" % (sum(body) & 0xFF)


def encode(data: bytes) -> bytes:
    """The packet that carries `data`."""
    body = bytearray()
    for byte in data:
        if byte in _ESCAPED:
            body += bytes((_ESCAPE, byte ^ 0x20))
        else:
            body.append(byte)
    return b"$" + body + b"#" + checksum(bytes(body))


def unescape(body: bytes) -> bytes:
    """Data as it was before escaping; a lone escape at the end means nothing."""
    if _ESCAPE not in body:
        return body
    data = bytearray()
    escaped = False
    for byte in body:
        if escaped:
            data.append(byte ^ 0x20)
            escaped = False
        elif byte == _ESCAPE:
            escaped = True
        else:
            data.append(byte)
    return bytes(data)


def number(text: bytes) -> int:
    """A hexadecimal number of at most 64 bits.

    Raises:
        ValueError: it is none.
    """
    if not 1 <= len(text) <= 16 or not all(byte in b"0123456789abcdefABCDEF" for byte in text):
        raise ValueError(f"{text[:20]!r} is no number")
    return int(text, 16)


def from_hex(text: bytes) -> bytes:
    """Bytes from pairs of hexadecimal digits.

    Raises:
        ValueError: they are none.
    """
    if any(byte not in b"0123456789abcdefABCDEF" for byte in text):
        raise ValueError("not hexadecimal")
    return bytes.fromhex(text.decode("ascii"))
