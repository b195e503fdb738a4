"""`bunshin doctor`: what this host offers and which engine bunshin would take."""

import os
import platform

from . import status
from .options import Values, Verb, wrap

VERB = Verb(
    "doctor",
    "Tell what this host offers, which engine bunshin would take, and why. The exit status is "
    "0 when machines can run here and 7 when they cannot.",
)

LABEL = 14


def main(values: Values) -> int:
    """Print the report; any trouble found is said where it was found."""
    from bunshin import __version__

    troubles: list[str] = []
    say("bunshin", f"{__version__}, Python {platform.python_version()}")
    say("system", f"{platform.system()} {platform.release()} on {platform.machine()}")
    say("processor", f"{processor()}, {len(os.sched_getaffinity(0))} to use here")
    say("memory", memory())
    native(troubles)
    say("/dev/kvm", kvm())
    engine(troubles)
    if not troubles:
        say("direct", direct())
    for trouble in troubles:
        say("trouble", trouble)
    say("verdict", "machines cannot run here" if troubles else "machines can run here")
    return status.HOST if troubles else status.OK


def say(label: str, text: str) -> None:
    """One line of the report, wrapped below itself."""
    lines = wrap(text, LABEL)
    print(label.ljust(LABEL) + lines[0].lstrip())
    for line in lines[1:]:
        print(line)


def processor() -> str:
    """The processor's own name."""
    return _field("/proc/cpuinfo", "model name") or "unknown processor"


def memory() -> str:
    """Total and available, and what a limit on this process takes away."""
    import resource

    parts = []
    for name, label in (("MemTotal", "in all"), ("MemAvailable", "available")):
        value = _field("/proc/meminfo", name)
        if value:
            parts.append(f"{int(value.split()[0]) / (1 << 20):.1f} GiB {label}")
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        parts.append(f"but this process may address {limit / (1 << 30):.1f} GiB only (ulimit -v)")
    return ", ".join(parts) or "unknown"


def kvm() -> str:
    """What a throwaway machine in KVM showed."""
    from bunshin.engine import figures
    from bunshin.errors import EngineError

    try:
        found = figures()
    except EngineError:
        return "not looked at"
    refusal = {"kvm-absent": "absent", "kvm-permission": "there, but you may not open it"}
    if found["refusal"] is not None:
        return refusal.get(found["refusal"], "there, but it does not answer as KVM does")
    parts = ["makes machines" if found["machine"] else "makes no machines"]
    if found["instruction_ns"]:
        parts.append(f"{found['instruction_ns']:.1f} ns a supervisor instruction")
    for name, works in (("CMPXCHG16B", found["cmpxchg16b"]), ("XSAVE", found["xsave"])):
        if works is not None and found["machine"]:
            parts.append(f"{name} {'works' if works else 'fails'}")
    return ", ".join(parts) + f" (looked for {found['took_us'] / 1000:.1f} ms)"


def native(troubles: list[str]) -> None:
    """What the native engine says of the processor."""
    from bunshin.engine import native as load
    from bunshin.errors import EngineError

    try:
        module = load()
    except EngineError as error:
        troubles.append(str(error))
        return
    features: dict[str, bool] = module.host_features()
    say("features", " ".join(name for name, there in features.items() if there) or "none")
    absent = [name for name, there in features.items() if not there]
    if absent:
        say("absent", " ".join(absent))
    say("time stamps", f"{module.tsc_hz() / 1e6:.0f} MHz")


def engine(troubles: list[str]) -> None:
    """Which engine `--engine auto` takes: asked of the engine, not guessed."""
    from bunshin.engine import choose, create
    from bunshin.errors import BunshinError

    try:
        choice = choose("auto")
        say("engine", f"{choice.name}: {choice.reason}")
        create(choice.name, 1)
    except BunshinError as error:
        if str(error) not in troubles:
            troubles.append(str(error))


def direct() -> str:
    """Whether `--engine direct` is possible here, and what it lacks: tried, not guessed."""
    from bunshin.engine import from_native
    from bunshin.engine import native as load

    module = load()
    try:
        breakpoints = module.direct_execution()
    except module.EngineError as error:
        return f"no --engine direct: {from_native(error)}"
    if breakpoints:
        return "--engine direct (experimental) is possible"
    paranoid = _text("/proc/sys/kernel/perf_event_paranoid")
    return (
        "--engine direct (experimental) is possible, but the host gives no breakpoints "
        f"(perf_event_paranoid is {paranoid or 'unknown'}): code next to what may be CPUID is translated"
    )


def _text(path: str) -> str:
    """What a file below /proc says, or nothing."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""


def _field(path: str, name: str) -> str:
    """The value of the first `name: value` line of a file below /proc."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                key, _, value = line.partition(":")
                if key.strip() == name:
                    return value.strip()
    except OSError:
        pass
    return ""
