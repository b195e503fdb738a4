"""A processor's state for everything that looks at one."""

from __future__ import annotations

from collections.abc import Callable
from struct import pack, pack_into
from typing import Any

import pytest

EFER = 0xC000_0080
CODE16, CODE32, CODE64 = 0x9B, 0xC09B, 0xA09B


def segment(access: int, selector: int = 0x10, base: int = 0) -> dict[str, int]:
    return {"selector": selector, "base": base, "limit": 0xFFFF_FFFF, "access": access}


def state(bits: int = 64) -> dict[str, Any]:
    """A processor's state, every register different."""
    code = {16: CODE16, 32: CODE32, 64: CODE64}[bits]
    area = bytearray(1088)
    pack_into("<HHBxHQQI", area, 0, 0x37F, 0x3800, 0x81, 0x123, 0x1111_2222_3333, 0x4444_5555, 0x1F80)
    # st0 is physical 7, st1 physical 0: 1.0 and 0.0.
    area[32:42] = pack("<QH", 1 << 63, 0x3FFF)
    for n in range(16):
        area[160 + 16 * n : 176 + 16 * n] = bytes([n + 1]) * 16
        area[576 + 16 * n : 592 + 16 * n] = bytes([0x80 | n]) * 16
    area[512] = 7
    return {
        "gpr": [0x1111_0000_0000_0000 * (n % 15) + n for n in range(16)],
        "rip": 0xFFFF_FFFF_8100_0000,
        "rflags": 0x246,
        "segments": [segment(code if n == 1 else 0xC093, 8 * n, 0x1000 * n) for n in range(6)],
        "cr0": 0x8005_0033,
        "cr2": 2,
        "cr3": 3,
        "cr4": 0x6B0,
        "cr8": 8,
        "xcr0": 7,
        "msrs": [(0x10, 5), (EFER, 0xD01 if bits == 64 else 0), (0xC000_0102, 0x7777)],
        "xsave": area,
    }


@pytest.fixture
def processor() -> Callable[..., dict[str, Any]]:
    """`state`."""
    return state
