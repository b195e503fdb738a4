"""`bunshin lockstep`: run a machine twice, side by side, and find where the two differ."""

from __future__ import annotations

import sys
from typing import Any

from . import status
from .options import Option, UsageError, Values, Verb, one_of


def number(value: str) -> int:
    """A count such as 5000, 100k or 20M."""
    digits, factor = value, 1
    if value[-1:] in {"k", "M", "G"}:
        digits, factor = value[:-1], {"k": 10**3, "M": 10**6, "G": 10**9}[value[-1]]
    if not (digits.isascii() and digits.isdigit()):
        raise ValueError("is not a count such as 5000, 100k or 20M")
    return int(digits) * factor


VERB = Verb(
    "lockstep",
    "Run a machine twice, side by side: once as always, by translated code, and once one "
    "instruction at a time. Registers, memory and device accesses are compared on the way; "
    "at the first difference, the instruction is found and shown. Without a kernel, the "
    "image 'tiny' is run.",
    operands=("IMAGE",),
    options=(
        Option(("--kernel",), "FILE", "Run this kernel, or another program in that form."),
        Option(("--initrd",), "FILE", "Give the kernel this initramfs."),
        Option(("--append",), "TEXT", "The kernel's command line, 'console=ttyS0' unless given."),
        Option(("--memory", "-m"), "SIZE", "Guest memory, such as 64M; little is faster. Default 128M."),
        Option(
            ("--instructions", "-n"),
            "COUNT",
            "End after so many instructions, such as 500k or 20M. Default 10M.",
            number,
        ),
        Option(
            ("--grain",),
            "COUNT",
            "Compare registers after so many instructions, at most 1000, which is the "
            "default; 0 for every translated block.",
            number,
        ),
        Option(
            ("--plant",),
            "FAULT",
            "Let the translated side do something wrong, to see it found: wrong-flag, "
            "fault-address, stale-code, stale-tlb or lost-window.",
            one_of("wrong-flag", "fault-address", "stale-code", "stale-tlb", "lost-window"),
        ),
    ),
    notes="""\
Time stands still while instructions run and goes on by a nanosecond for each, so every
run is the same. One processor; about half a million instructions a second.

exit status: 0 if the two agreed, 1 if they differ""",
)


def main(values: Values) -> int:
    """Run both, and tell."""
    from bunshin.config import MachineConfig
    from bunshin.debug import lockstep

    report = lockstep.run(
        MachineConfig.check(**arguments(values)),
        10_000_000 if values.instructions is None else values.instructions,
        values.plant,
        lockstep.QUANTUM if values.grain is None else values.grain,
        _progress(),
    )
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    sys.stdout.write(report.output.decode("utf-8", "replace"))
    if report.output and not report.output.endswith(b"\n"):
        print()
    print(report)
    return status.OK if report.agreed else 1


def arguments(values: Values) -> dict[str, Any]:
    """What the machine is made of."""
    image = values.operands[0] if values.operands else None
    if values.kernel is not None and image is not None:
        raise UsageError(f"choose one: the image {image!r} or --kernel {values.kernel!r}")
    if values.kernel is None and values.initrd is not None and image is None:
        raise UsageError("--initrd needs --kernel")
    memory = values.memory or "128M"
    if values.kernel is not None:
        append = "console=ttyS0" if values.append is None else values.append
        return {"kernel": values.kernel, "initrd": values.initrd, "append": append, "memory": memory}
    from bunshin import images

    found = images.get(image or "tiny")
    append = " ".join(filter(None, (found.append, values.append)))
    return {
        "kernel": found.kernel,
        "initrd": values.initrd or found.initrd,
        "append": append,
        "memory": memory,
    }


def _progress() -> Any:
    """Count on a terminal, and nowhere else."""
    if not sys.stderr.isatty():
        return lambda count: None
    last = 0

    def show(count: int) -> None:
        nonlocal last
        if count - last >= 100_000:
            last = count
            print(f"\r{count:,} instructions", end="", file=sys.stderr, flush=True)

    return show
