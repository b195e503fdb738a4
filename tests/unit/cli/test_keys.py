"""Ctrl-A: commands, itself, and everything else untouched."""

import pytest

from bunshin.cli.keys import HELP, QUIT, Keys


@pytest.mark.parametrize(
    ("typed", "sent", "commands"),
    [
        (b"ls\r", b"ls\r", []),
        (b"\x03\x04\x1a\x00\xff", b"\x03\x04\x1a\x00\xff", []),
        (b"\x01\x01", b"\x01", []),
        (b"\x01\x01x", b"\x01x", []),
        (b"a\x01hb", b"ab", [HELP]),
        (b"\x01?", b"", [HELP]),
        (b"a\x01xrest", b"a", [QUIT]),
        (b"\x01X", b"", [QUIT]),
        (b"\x01qb", b"b", []),
    ],
)
def test_typed(typed: bytes, sent: bytes, commands: list[str]) -> None:
    assert Keys().feed(typed) == (sent, commands)
    keys = Keys()  # the same, byte by byte
    parts = []
    for value in typed:
        parts.append(keys.feed(bytes([value])))
        if parts[-1][1] == [QUIT]:
            break
    assert b"".join(part[0] for part in parts) == sent
    assert [command for part in parts for command in part[1]] == commands
