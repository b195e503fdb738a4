"""Whatever a guest writes, no device raises, answers too much or forgets how to be saved."""

from __future__ import annotations

import random

import pytest

from bunshin.board.small import SmallBoard
from bunshin.bus import Bus
from bunshin.clock import Clock
from bunshin.irq import IrqLines

PORTS = [0x60, 0x64, 0x70, 0x71, 0x92, 0x505, *range(0x3F8, 0x400), *range(0x5FE, 0x612)]


@pytest.mark.parametrize("seed", range(20))
def test_random_accesses(seed: int) -> None:
    rng, bus, clock, other_clock = random.Random(seed), Bus(), Clock(), Clock()
    clock.resume()
    board = SmallBoard(bus, IrqLines(lambda gsi, level: None), clock, bytes, lambda *_: None)
    fresh = SmallBoard(Bus(), IrqLines(lambda gsi, level: None), other_clock, bytes, lambda *_: None)
    for step in range(3000):
        port, size = rng.choice(PORTS), rng.choice((1, 1, 1, 2, 4))
        if rng.random() < 0.4:
            assert 0 <= int(bus.port_in(port, size)) < 1 << 8 * size
        elif rng.random() < 0.9:
            bus.port_out(port, size, rng.getrandbits(8 * size))
        else:
            board.com1.push(rng.randbytes(rng.randrange(40)))
        if step % 100 == 0:
            # Every state that a guest can reach can be saved and loaded.
            for device, other in zip(board.devices(), fresh.devices(), strict=True):
                saved = device.save()
                other.load(saved)
                assert other.save() == saved
    clock.close()
    other_clock.close()
