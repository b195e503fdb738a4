"""The yardstick on bunshin, on QEMU's translator and on the host, side by side.

    python bench/run.py [--quick] [--only SECTION] [--runs N] [--json FILE]

    section  measures
    boot     boot to power-off: processor time, wall time, memory
    cpu      19 processor kernels
    sys      10 figures of the system: calls, faults, processes, pipes
    real     real programs: gzip, xz, openssl, a shell loop, python3
    exits    an exit to a device in Python and back
    smp      two busy processors against one

The same static program runs natively and as part of one initramfs under the
same kernel in both guests, in turn within one call (A B C A B C), so that noise
of the machine hits all alike. Printed are medians over the rounds, corrected
for processor time that the host gave to others, and ratios: those hold on a
shared machine, absolute times do not. At the end stands what was promised.

All figures go to bench/out/results.json. When the run was whole, docs/bench.svg is
drawn from them; a quick run or one of some sections never touches that picture.
"""

from __future__ import annotations

import argparse
import json
import os
import platform as host
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import graph
import payload
import smp
import summary
from measure import Figure, Run, run
from summary import GUESTS, MEANS, PLATFORMS, SECTIONS

from bunshin import images
from bunshin.errors import BunshinError

LIMIT = 1800.0
"""Seconds after which a run is hung; a boot that does nothing else is sooner."""
BOOT_LIMIT = 120.0
PICTURE = payload.HERE.parent / "docs" / "bench.svg"
RESULTS = payload.OUT / "results.json"


@dataclass
class Setup:
    """The guest that all platforms run, and how to start each."""

    kernel: Path
    base: Path
    """The initramfs that the yardstick's archive goes behind."""
    platforms: list[str]
    engine: str = "translator"
    notes: list[str] = field(default_factory=list)

    def command(self, platform: str, initrd: Path, cpus: int = 1) -> list[str]:
        """The command line that boots `initrd` and ends with the guest."""
        if platform == "bunshin":
            return [
                *(sys.executable, "-m", "bunshin.cli", "run", "--engine", self.engine),
                *("--kernel", str(self.kernel), "--initrd", str(initrd)),
                *("--append", payload.APPEND, "--memory", "512M", "--cpus", str(cpus)),
            ]
        accel = "tcg" if cpus == 1 else "tcg,thread=multi"
        return [
            *("qemu-system-x86_64", "-M", "pc", "-accel", accel, "-cpu", "max", "-m", "512"),
            *("-smp", str(cpus), "-nodefaults", "-no-user-config", "-display", "none"),
            *("-serial", "stdio", "-no-reboot"),
            *("-kernel", str(self.kernel), "-initrd", str(initrd), "-append", payload.APPEND),
        ]


def main() -> int:
    """Run the sections that were asked for."""
    options = parse()
    payload.OUT.mkdir(exist_ok=True)
    # What an earlier run left is not this run's, should this one stop half-way.
    RESULTS.unlink(missing_ok=True)
    try:
        setup = prepare(options)
        sections: summary.Results = {}
        results = {**about(setup, options), "sections": sections}
        for note in setup.notes:
            print(note)
        for section in options.only or SECTIONS:
            print(f"\n== {section} ==", flush=True)
            measure = {"boot": boot, "exits": exits, "smp": two_processors}.get(section)
            if measure is not None:
                sections[section] = measure(setup, options)
            else:
                sections[section] = compare(setup, section, options)
    except (payload.Unavailable, BunshinError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    for path in (RESULTS, *([Path(options.json)] if options.json else [])):
        path.write_text(json.dumps(results, indent=1) + "\n")
    conclude(results)
    return 0


def conclude(results: summary.Results) -> None:
    """Print what was promised, and draw the picture if the run was whole."""
    print("\n== what was promised ==")
    rows = [["", "bunshin", "qemu", "promise", ""]]
    for row in summary.promises(results):
        sign = "at least" if row.at_least else "at most"
        shown = ["-" if value is None else f"{value:.3g}" for value in (row.value, row.qemu)]
        verdict = {True: "kept", False: "MISSED", None: "not measured"}[row.met]
        rows.append([row.name, *shown, f"{sign} {row.limit:g} {row.unit}".strip(), verdict])
    table(rows)
    lacks = summary.missing(results)
    if results["engine"] != "translator":
        print(f"{PICTURE.name} is not drawn: it shows the translator.")
        return
    if lacks:
        more = f" and {len(lacks) - 3} more" if len(lacks) > 3 else ""
        print(f"{PICTURE.name} is not drawn, since this is not a whole run: {', '.join(lacks[:3])}{more}.")
        return
    PICTURE.write_text(graph.draw(results))
    print(f"drew {PICTURE}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=SECTIONS, action="append", help="one section, may be repeated")
    parser.add_argument("--quick", action="store_true", help="one round, two boots, shorter repetitions")
    parser.add_argument("--runs", type=int, help="rounds of each section (default 3)")
    parser.add_argument("--pairs", type=int, help="boots of each guest (default 5)")
    parser.add_argument("--without", choices=PLATFORMS, action="append", default=[], help="leave one out")
    parser.add_argument("--kernel", type=Path, help="a bzImage; default: that of the image 'tiny'")
    parser.add_argument("--initrd", type=Path, help="a busybox initramfs; default: that of 'tiny'")
    parser.add_argument(
        "--engine",
        choices=("translator", "direct"),
        default="translator",
        help="bunshin's engine in the sections with a guest (default translator)",
    )
    parser.add_argument("--json", metavar="FILE", help="also write all figures here")
    options = parser.parse_args()
    options.runs = options.runs or (1 if options.quick else 3)
    options.pairs = options.pairs or (2 if options.quick else 5)
    return options


def prepare(options: argparse.Namespace) -> Setup:
    kernel, initrd = options.kernel, options.initrd
    if kernel is None or initrd is None:
        tiny = images.get("tiny")
        kernel, initrd = kernel or Path(tiny.kernel), initrd or Path(tiny.initrd)
    platforms = [platform for platform in PLATFORMS if platform not in options.without]
    setup = Setup(kernel, initrd, platforms, options.engine)
    if "qemu" in platforms and shutil.which("qemu-system-x86_64") is None:
        platforms.remove("qemu")
        setup.notes.append("QEMU is not installed (apt-get install qemu-system-x86): no column for it.")
    load = os.getloadavg()[0]
    if load > 0.5:
        setup.notes.append(f"The machine is busy (load {load:.1f}): ratios may suffer, times will.")
    return setup


def about(setup: Setup, options: argparse.Namespace) -> summary.Results:
    """When, where and with what this run was made."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=payload.HERE,
        capture_output=True,
        text=True,
        check=False,
    )
    model = host.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "version": summary.VERSION,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": described.stdout.strip(),
        "host": model,
        "cpus": len(os.sched_getaffinity(0)),
        "engine": setup.engine,
        "kernel": release(setup.kernel),
        "quick": options.quick,
        "rounds": options.runs,
        "busy": round(os.getloadavg()[0], 2),
    }


def release(kernel: Path) -> str:
    """The release of a kernel file, such as 6.1.0-56-cloud-amd64; else the file's name."""
    data = kernel.read_bytes()
    if data[0x202:0x206] == b"HdrS":  # a bzImage says where it has it
        data = data[int.from_bytes(data[0x20E:0x210], "little") + 0x200 :]
        found = re.match(rb"(\d[\x21-\x7e]*)", data)
    else:
        found = re.search(rb"Linux version (\d[\x21-\x7e]*)", data)
    return found[1].decode() if found else kernel.name


# Boot to power-off ---------------------------------------------------------------


def boot(setup: Setup, options: argparse.Namespace) -> dict[str, object]:
    """Boot to an init that powers off at once, the guests in turn."""
    initrd = payload.initramfs("boot", "", setup.base)
    guests = [guest for guest in GUESTS if guest in setup.platforms]
    runs: dict[str, list[Run]] = {guest: [] for guest in guests}
    for guest in guests:  # once unmeasured: files in the page cache, images unpacked
        start(setup, guest, initrd, BOOT_LIMIT)
    for _ in range(options.pairs):
        for guest in guests:
            runs[guest].append(start(setup, guest, initrd, BOOT_LIMIT))
    rows = [["", *guests, *(["bunshin/qemu"] if len(guests) == 2 else [])]]
    summary: dict[str, object] = {}
    for name in ("user", "system", "wall", "peak_mib"):
        medians = [statistics.median(getattr(r, name) for r in runs[guest]) for guest in guests]
        unit = "" if name == "peak_mib" else " s"
        label = {"peak_mib": "peak MiB", "user": "user CPU", "system": "system CPU"}.get(name, name)
        row = [label, *(f"{m:.2f}{unit}" if unit else f"{m:.0f}" for m in medians)]
        if len(guests) == 2:
            row.append(f"{medians[0] / medians[1]:.2f}" if medians[1] else "-")
        rows.append(row)
        summary[name] = {guest: [round(getattr(r, name), 4) for r in runs[guest]] for guest in guests}
    print(f"boot to power-off, median of {options.pairs}")
    table(rows)
    return summary


def start(setup: Setup, guest: str, initrd: Path, limit: float = LIMIT, cpus: int = 1) -> Run:
    """One guest from start to power-off."""
    result = run(setup.command(guest, initrd, cpus), limit)
    if result.status != 0 or not result.complete:
        tail = "\n".join(result.text.splitlines()[-15:])
        raise payload.Unavailable(f"the {guest} guest did not finish (status {result.status}):\n{tail}")
    return result


# Figures -------------------------------------------------------------------------


def compare(
    setup: Setup, section: str, options: argparse.Namespace
) -> dict[str, dict[str, dict[str, object]]]:
    """One section of the yardstick on every platform, `options.runs` times in turn."""
    if section == "real":
        script = payload.REAL_SCRIPT.replace("$PYTHON", payload.REAL_PROGRAMS[-1])
        script = script.replace("$PRIME", payload.MERSENNE_PRIME)
        script = script.replace("$MB", "4" if options.quick else "16")
    else:
        # `exec`: the processor time that is read must be the benchmark's own.
        script = f"exec bench -t {0.1 if options.quick else 0.2} -r 3 {section}"
    guest_script = f"export BENCH_SELF=/bin/bench\n{script.removeprefix('exec ')}\n"
    initrd = payload.initramfs(section, guest_script, setup.base, real=section == "real")
    rounds: dict[str, list[Run]] = {platform: [] for platform in setup.platforms}
    for number in range(options.runs):
        for platform in setup.platforms:
            progress(f"{section}: round {number + 1} of {options.runs}, {platform}")
            if platform == "native":
                rounds[platform].append(native(script))
            else:
                rounds[platform].append(start(setup, platform, initrd))
    progress("")
    # Natively the system section also waits, which is no sign of a busy host.
    values = {
        platform: medians(runs, correct=platform != "native" or section != "sys")
        for platform, runs in rounds.items()
    }
    report(section, values)
    for platform, runs in rounds.items():
        if platform == "native" and section == "real":
            continue  # a script with children, whose time is not read
        shares = [figure.share for r in runs for figure in r.figures.values()]
        print(f"{platform} had {statistics.median(shares):.0%} of a processor (median)")
    check_sums({platform: runs[0].sums for platform, runs in rounds.items()})
    return as_json(values)


def native(script: str) -> Run:
    """The section's script on the host."""
    bench = payload.build_bench()
    with tempfile.TemporaryDirectory(prefix="bunshin-bench-") as folder:
        prefix = f"PATH={bench.parent}:$PATH; export LC_ALL=C BENCH_SELF={bench}\n"
        result = run(["sh", "-c", prefix + script], LIMIT, cwd=Path(folder), framed=False)
    if result.status != 0:
        raise payload.Unavailable(f"the benchmark failed on the host:\n{result.text}")
    return result


# Exits and processors ------------------------------------------------------------


def exits(setup: Setup, options: argparse.Namespace) -> dict[str, float]:
    """Microseconds of an exit to a device in Python and back, by kind."""
    count = 30_000 if options.quick else 200_000
    found: list[dict[str, float]] = []
    for number in range(options.runs):
        progress(f"exits: round {number + 1} of {options.runs}")
        script = [sys.executable, str(payload.HERE / "exits.py"), "--json"]
        script += ["--rounds", "3", "--count", str(count)]
        done = subprocess.run(script, capture_output=True, text=True, timeout=LIMIT, check=False)
        if done.returncode:
            raise payload.Unavailable(f"exits could not be measured:\n{done.stderr}")
        found.append(json.loads(done.stdout))
    progress("")
    result = {name: round(statistics.median(one[name] for one in found), 3) for name in found[0]}
    print("exit to a Python device and back, processor time")
    table([["", "us"], *([name, f"{value:.2f}"] for name, value in result.items())])
    return result


def two_processors(setup: Setup, options: argparse.Namespace) -> dict[str, object]:
    """Work of two busy processors against one, by platform."""
    prepared = native(f"exec bench -t 0.2 -r 1 {smp.KERNEL}")
    script = smp.script(smp.iterations(prepared, 0.2 if options.quick else 1.0))
    initrd = payload.initramfs("smp", f"export BENCH_SELF=/bin/bench\n{script}", setup.base)
    found: dict[str, list[list[float]]] = {platform: [] for platform in setup.platforms}
    refused: dict[str, str] = {}
    for number in range(options.runs):
        for platform in setup.platforms:
            if platform in refused:
                continue
            progress(f"smp: round {number + 1} of {options.runs}, {platform}")
            try:
                if platform == "native":
                    done = native(script)
                else:
                    done = start(setup, platform, initrd, cpus=2)
                found[platform].append(smp.speedups(done))
            except payload.Unavailable as error:
                refused[platform] = str(error).splitlines()[-1]
    progress("")
    result: dict[str, object] = {}
    rows = [["", "two against one"]]
    for platform, runs in found.items():
        if platform in refused:
            result[platform] = {"unavailable": refused[platform]}
            rows.append([platform, f"not available: {refused[platform]}"])
        else:
            result[platform] = round(smp.median(runs), 3)
            rows.append([platform, f"{smp.median(runs):.2f}"])
    table(rows)
    return result


Values = dict[str, tuple[float, str, bool]]


def medians(runs: list[Run], correct: bool) -> Values:
    """Name -> (median over the runs, unit, higher is better)."""
    result: Values = {}
    for name in runs[0].figures:
        found: list[Figure] = [r.figures[name] for r in runs if name in r.figures]
        value = statistics.median(f.corrected() if correct else f.value for f in found)
        result[name] = (value, found[0].unit, found[0].rate)
    return result


def report(section: str, values: dict[str, Values]) -> None:
    """Print figures and how many times slower than native each guest is."""
    platforms = list(values)
    base = "native" if "native" in values else None
    results: summary.Results = {"sections": {section: as_json(values)}}
    head = ["", "unit"]
    for platform in platforms:
        head += [platform] if platform == base or base is None else [platform, "x native"]
    rows = [head]
    for name, (_, unit, _) in values[platforms[0]].items():
        row = [name, unit]
        for platform in platforms:
            found = values[platform].get(name)
            row.append("-" if found is None else f"{found[0]:.4g}")
            if base is not None and platform != base:
                row.append(times(summary.slower(results, section, platform, name)))
        rows.append(row)
    for title, (where, names) in MEANS.items():
        if base is None or where != section:
            continue
        row = [title, ""]
        for platform in platforms:
            row.append("")
            if platform != base:
                row.append(times(summary.mean(results, section, platform, names)))
        rows.append(row)
    table(rows)


def times(ratio: float | None) -> str:
    """A ratio as it is printed."""
    return "-" if ratio is None else f"{ratio:.2f}"


def as_json(values: dict[str, Values]) -> dict[str, dict[str, dict[str, object]]]:
    """Figures by platform and name, without what follows from their unit."""
    return {
        platform: {name: {"value": value, "unit": unit} for name, (value, unit, _) in figures.items()}
        for platform, figures in values.items()
    }


def check_sums(sums: dict[str, dict[str, str]]) -> None:
    """Say whether all platforms computed the same."""
    names = {name for found in sums.values() for name in found}
    for name in sorted(names):
        found = {platform: got.get(name, "missing") for platform, got in sums.items()}
        agree = len(set(found.values())) == 1 and "BAD" not in found.values()
        print(f"checksum {name}: " + ("the same everywhere" if agree else f"DIFFERENT: {found}"))


def progress(text: str) -> None:
    """Say on a terminal what runs now; an empty text takes it away."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def table(rows: list[list[str]]) -> None:
    """Print rows in columns, the first one flush left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [
            row[0].ljust(widths[0]),
            *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
        ]
        print("  ".join(cells).rstrip())
    sys.stdout.flush()


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
