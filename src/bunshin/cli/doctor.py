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
    say("/dev/kvm", kvm())
    native(troubles)
    engine(troubles)
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
    """Whether /dev/kvm is there and answers; bunshin does not use it yet."""
    try:
        fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return "absent; the translator does not need it"
    except OSError as error:
        return f"there, but {error.strerror}; the translator does not need it"
    try:
        import fcntl

        version = fcntl.ioctl(fd, 0xAE00)  # KVM_GET_API_VERSION
    except OSError as error:
        return f"opens, but refuses to talk ({error.strerror}); the translator does not need it"
    finally:
        os.close(fd)
    return f"there, API version {version}; this version of bunshin has no engine that uses it"


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
        name, why = choose("auto")
        say("engine", f"{name}: {why}")
        create(name, 1)
    except BunshinError as error:
        if str(error) not in troubles:
            troubles.append(str(error))


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
