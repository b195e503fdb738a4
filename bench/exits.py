"""What one exit to a device in Python costs, there and back.

    python bench/exits.py [--count N] [--rounds N] [--json]

A guest of a few bytes does nothing but touch one device: OUT and IN at a port, stores
and loads at a guest-physical address. The device is as trivial as a device can be, so
what is measured is the way: out of translated code, over the engine's boundary, the
bus, the device's method, and back into translated code. Processor time and not wall
time, since a busy host must not be taken for a slow engine; the time of a machine
that does the same loop without the access is taken off.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from struct import pack

from bunshin import Device, Machine

LOAD = 0x10_0000
PORT = 0xC00
GPA = 0xD000_0000
POWER_OFF = b"\xba\x05\x06\x00\x00" + b"\xb0\x34" + b"\xee"  # mov edx,0x605; mov al,0x34; out dx,al
COUNT = 100_000

LOOPS = {
    "out": b"\xee",  # out dx,al
    "in": b"\xec",  # in al,dx
    "mmio write": b"\x89\x03",  # mov [rbx],eax
    "mmio read": b"\x8b\x03",  # mov eax,[rbx]
}
"""The instruction that exits, by the name of what it measures."""


class Trivial(Device):
    """Answers zero and takes everything."""

    ports = range(PORT, PORT + 1)
    mmio = range(GPA, GPA + 0x1000)
    name = "trivial"

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        pass


def kernel(instruction: bytes, count: int) -> bytes:
    """An ELF file, entered in long mode: `count` times `instruction`, then power off."""
    body = instruction + b"\xff\xc9"  # dec ecx
    code = b"\xb9" + pack("<I", count) + b"\xba" + pack("<I", PORT) + b"\xbb" + pack("<I", GPA)
    code += body + b"\x75" + pack("<b", -len(body) - 2) + POWER_OFF + b"\xf4\xeb\xfd"
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    header = ident + pack("<HHIQQQIHHHHHH", 2, 62, 1, LOAD, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    return header + pack("<IIQQQQQQ", 1, 7, 120, LOAD, LOAD, len(code), len(code), 1) + code


def seconds(path: Path) -> float:
    """Processor time of this process for one run of the guest at `path`."""
    with Machine(path, memory="32M", devices=[Trivial()]) as machine:
        before = time.process_time()
        outcome = machine.run(120)
        used = time.process_time() - before
    if outcome.kind != "power-off":
        raise RuntimeError(f"the guest ended with {outcome.kind}: {outcome.detail}")
    return used


def measure(count: int, rounds: int) -> dict[str, float]:
    """Microseconds for each kind of exit, medians over `rounds`."""
    found: dict[str, list[float]] = {name: [] for name in LOOPS}
    with tempfile.TemporaryDirectory(prefix="bunshin-exits-") as folder:
        paths = {}
        for name, instruction in {"": b"\x90", **LOOPS}.items():
            paths[name] = Path(folder) / (name or "empty")
            paths[name].write_bytes(kernel(instruction, count))
        for _ in range(rounds):
            empty = seconds(paths[""])
            for name in LOOPS:
                found[name].append((seconds(paths[name]) - empty) / count * 1e6)
    return {name: statistics.median(times) for name, times in found.items()}


def main() -> int:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=COUNT, help="exits in a run")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each kind")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    figures = measure(options.count, options.rounds)
    if options.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"exit {name:10}  {value:.2f} us")
    return 0


if __name__ == "__main__":
    sys.exit(main())
