"""What the results of a run say: ratios, means, and the figures that stand in the README.

Results are JSON as `run.py` writes it:

    version, made, commit, host, cpus, kernel, quick, rounds, busy
    sections.boot            user|system|wall|peak_mib -> guest -> [values]
    sections.cpu|sys|real    platform -> name -> {value, unit}
    sections.exits           name -> microseconds
    sections.smp             platform -> speedup, or {"unavailable": sentence}

Nothing here measures; a figure that is not there is None, never a guess.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

VERSION = 1
INTEGER = ["int_mix", "sha256", "quicksort", "rec_str", "interp", "fib_calls", "icall", "div64"]
VECTOR = ["fp_sse2", "fp_avx2", "simd_int", "memcpy_l1"]
SYSTEM = ["syscall", "pipe_rt", "pagefault", "mmap_unmap", "fork_wait", "fork_exec", "signal", "segv"]
REAL = ["gzip", "gunzip", "xz", "unxz", "openssl_sha", "openssl_aes", "openssl_prime"]
REAL += ["sh_loop", "python3"]
SHORT = ["python3_start"]
"""Drawn, but in no mean: a few milliseconds, most of them spent on translating."""
MEANS = {
    "integer, geometric mean": ("cpu", INTEGER),
    "system, geometric mean": ("sys", SYSTEM),
    "real programs, geometric mean": ("real", REAL),
}
SECTIONS = ("boot", "cpu", "sys", "real", "exits", "smp")
PLATFORMS = ("native", "bunshin", "qemu")
GUESTS = ("bunshin", "qemu")

Results = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One promised figure: at most (or at least) `limit`."""

    name: str
    value: float | None
    limit: float
    unit: str
    at_least: bool = False
    qemu: float | None = None
    """The same figure of QEMU's translator."""

    @property
    def met(self) -> bool | None:
        """Whether it is; None when it was not measured."""
        if self.value is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def is_rate(unit: str) -> bool:
    """Higher is better."""
    return unit.endswith("/s")


def slower(results: Results, section: str, platform: str, name: str) -> float | None:
    """How many times slower than native `name` is on `platform`."""
    figures = results["sections"].get(section, {})
    found, base = (figures.get(p, {}).get(name) for p in (platform, "native"))
    if not found or not base or not found["value"] or not base["value"]:
        return None
    ratio: float = base["value"] / found["value"]
    return ratio if is_rate(found["unit"]) else 1 / ratio


def mean(results: Results, section: str, platform: str, names: list[str]) -> float | None:
    """Geometric mean of `slower`; None when one of them is missing."""
    ratios = [slower(results, section, platform, name) for name in names]
    if not ratios or any(ratio is None for ratio in ratios):
        return None
    return math.exp(statistics.fmean(math.log(ratio) for ratio in ratios if ratio is not None))


def value_us(results: Results, section: str, platform: str, name: str) -> float | None:
    """A cost in microseconds; the yardstick gives nanoseconds."""
    found = results["sections"].get(section, {}).get(platform, {}).get(name)
    return None if not found or found["unit"] != "ns" else float(found["value"]) / 1000


def boot_seconds(results: Results, guest: str) -> float | None:
    """Median user CPU of a boot to power-off."""
    found = results["sections"].get("boot", {}).get("user", {}).get(guest)
    return statistics.median(found) if found else None


def smp(results: Results, platform: str) -> float | None:
    """Work of two busy processors against one."""
    found = results["sections"].get("smp", {}).get(platform)
    return found if isinstance(found, float | int) else None


def promises(results: Results) -> list[Row]:
    """The figures that the translator is measured by."""
    rows = []
    ours, theirs = (boot_seconds(results, guest) for guest in GUESTS)
    share = ours / theirs if ours and theirs else None
    rows.append(
        Row("boot to power-off, user CPU, share of QEMU's", share, 0.45, "", qemu=1 if theirs else None)
    )
    limits = {"cpu": 1.8, "sys": 3.0, "real": 2.5}
    for title, (section, names) in MEANS.items():
        found = [mean(results, section, guest, names) for guest in GUESTS]
        rows.append(Row(title, found[0], limits[section], "x native", qemu=found[1]))
    for name in VECTOR:
        found = [slower(results, "cpu", guest, name) for guest in GUESTS]
        rows.append(Row(name, found[0], 1.6, "x native", qemu=found[1]))
    for section, name, limit in (
        ("cpu", "smc_patch", 1.5),
        ("cpu", "jit_fresh", 1.5),
        ("sys", "pipe_rt", 25),
    ):
        found = [value_us(results, section, guest, name) for guest in GUESTS]
        rows.append(Row(name, found[0], limit, "us", qemu=found[1]))
    exits = results["sections"].get("exits") or {}
    worst = max(exits.values()) if exits else None
    rows.append(Row("exit to a Python device and back, the worst of four kinds", worst, 0.6, "us"))
    two = [smp(results, guest) for guest in GUESTS]
    rows.append(
        Row("two busy processors, work against one", two[0], 1.8, "times", at_least=True, qemu=two[1])
    )
    return rows


def missing(results: Results) -> list[str]:
    """What keeps the results from being whole, one sentence part each; empty when nothing does."""
    if results.get("version") != VERSION:
        return [f"results of version {results.get('version')!r}, expected {VERSION}"]
    lacks = ["a quick run"] if results.get("quick") else []
    sections = results.get("sections", {})
    lacks += [f"no section {section}" for section in SECTIONS if not sections.get(section)]
    for guest in GUESTS:
        if sections.get("boot") and boot_seconds(results, guest) is None:
            lacks.append(f"no boot of {guest}")
    for section, names in (("cpu", INTEGER + VECTOR), ("sys", SYSTEM), ("real", REAL)):
        for platform in PLATFORMS if sections.get(section) else ():
            have = sections[section].get(platform, {})
            lacks += [f"no {name} of {platform}" for name in names if not have.get(name)]
    for platform in PLATFORMS if sections.get("smp") else ():
        if smp(results, platform) is None:
            lacks.append(f"no two processors of {platform}")
    return lacks
