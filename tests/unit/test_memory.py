from __future__ import annotations

from typing import Any

import pytest

from bunshin.errors import ConfigError
from bunshin.memory import Memory, layout

GIB = 1 << 30


def test_layout() -> None:
    assert layout(GIB) == [(0, GIB)]
    assert layout(3 * GIB) == [(0, 3 * GIB)]
    assert layout(5 * GIB) == [(0, 3 * GIB), (4 * GIB, 2 * GIB)]


def test_reads_and_writes(native: Any) -> None:
    engine = native.Engine("translator")
    memory = Memory(engine, native.Region, 16 << 20)
    memory.write(0x1000, b"abc")
    memory.load(0x1003, memoryview(b"def"))
    assert memory.read(0x0FFF, 8) == b"\0abcdef\0"
    assert memory.read(5, 0) == b""
    for gpa, length in (((16 << 20) - 1, 2), (-1, 2), (1 << 40, 1), (0, -1)):
        with pytest.raises(ConfigError, match="not all RAM"):
            memory.read(gpa, length)
    memory.close()
    with pytest.raises(ConfigError, match="no place"):
        memory.read(0, 1)
