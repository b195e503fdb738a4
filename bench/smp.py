"""Two busy processors against one: the same work, once alone and twice at the same time.

The figure is how much more work two do in the same time, 2.0 at best. It cannot be
corrected for a busy host, since processors that wait for each other look the same as a
host that has no time; natively measured beside it, it tells what the host itself gives.
"""

from __future__ import annotations

import statistics

import payload
from measure import Run

KERNEL = "int_mix"
PAIRS = 5
"""Measurements within one run."""


def script(count: int, pairs: int = PAIRS) -> str:
    """Shell lines: `count` iterations by one process, and by two at once, `pairs` times."""
    work = f"bench work {KERNEL} {count}"
    lines = ['echo "processors $(nproc) count"']
    for pair in range(pairs):
        lines.append(f"bench time one{pair} {work}")
        lines.append(f"bench time two{pair} sh -c '{work} & {work}; wait'")
    return "\n".join(lines) + "\n"


def iterations(native: Run, seconds: float) -> int:
    """How many iterations take about `seconds` natively; `native` ran the kernel once."""
    return max(int(native.figures[KERNEL].value * seconds), 1)


def speedups(run: Run, pairs: int = PAIRS) -> list[float]:
    """Work of two against one, for every pair.

    Raises:
        Unavailable: the guest did not have two processors, or did not finish.
    """
    count = run.figures.get("processors")
    if count is None or count.value < 2:
        found = "no" if count is None else f"{count.value:g}"
        raise payload.Unavailable(f"two processors were asked for, the guest had {found}")
    try:
        return [
            2 * run.figures[f"one{pair}"].value / run.figures[f"two{pair}"].value for pair in range(pairs)
        ]
    except KeyError as missing:
        raise payload.Unavailable(f"the guest did not measure {missing}") from None


def median(runs: list[list[float]]) -> float:
    """The figure of several runs."""
    return statistics.median(value for run in runs for value in run)
