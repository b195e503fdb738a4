"""The command line: `bunshin VERB ...`.

`main` finds the verb, loads only its file, and turns every way out into one
sentence on stderr and a documented exit status. Set BUNSHIN_DEBUG=1 to see the
traceback behind the sentence.
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from . import signals, status
from .options import UsageError, closest, entry, explain, parse

VERBS = {
    "run": "boot a machine and connect its console to this terminal",
    "image": "list, build and remove guest images",
    "symbols": "write a kernel's symbols to a file for GDB",
    "lockstep": "run a machine twice, side by side, and find where the two differ",
    "doctor": "tell what this host offers and which engine bunshin would take",
    "help": "explain a verb",
}

EXAMPLES = """
examples:
  bunshin run                      a Debian guest, ready in seconds; Ctrl-A x quits
  bunshin run --kernel vmlinuz --initrd initrd.img --append console=ttyS0
  echo 'uname -a; poweroff -f' | bunshin run
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status."""
    signals.install()
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code = _dispatch(words)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except signals.Interrupted as interrupted:
        return interrupted.status
    except BrokenPipeError:
        _forget_stdout()
        return status.READER_GONE
    except SystemExit:
        raise
    except BaseException as error:  # a panic in the engine is no Exception
        if os.environ.get("BUNSHIN_DEBUG", "0") not in {"", "0"}:
            import traceback

            traceback.print_exc()
        return _explain_failure(error)


def _dispatch(words: list[str]) -> int:
    if not words:
        print(overview(), file=sys.stderr)
        return status.USAGE
    name, rest = words[0], words[1:]
    if name in {"--help", "-h"} or (name == "help" and not rest):
        print(overview())
        return status.OK
    if name in {"--version", "-V", "version"}:
        from bunshin import __version__

        print(f"bunshin {__version__}")
        return status.OK
    if name == "help":
        name, rest = rest[0], ["--help"]
    if name not in VERBS or name == "help":
        kind = "option" if name.startswith("-") else "verb"
        known = ["--help", "--version"] if kind == "option" else list(VERBS)
        raise UsageError(f"unknown {kind} {name!r}{closest(name, known)}")
    module = import_module(f".{name}", __package__)
    try:
        values = parse(module.VERB, rest)
        if values.help:
            print(explain(module.VERB))
            return status.OK
        code: int = module.main(values)
    except UsageError as error:
        raise UsageError(f"{error} (see 'bunshin help {name}')") from error
    return code


def overview() -> str:
    """What `bunshin --help` prints."""
    lines = ["usage: bunshin VERB [options]", "", "verbs:"]
    for name, summary in VERBS.items():
        lines += entry(f"  {name}", summary)
    lines += entry("  --version", "print the version")
    return "\n".join([*lines, "", "'bunshin help VERB' explains a verb's options.", EXAMPLES.rstrip()])


def complain(sentence: str) -> None:
    """Say one sentence on stderr."""
    try:
        print(f"bunshin: {sentence}", file=sys.stderr, flush=True)
    except (OSError, AttributeError):
        pass  # nobody listens there either


def _explain_failure(error: BaseException) -> int:
    """Complain about an error; return its exit status."""
    if isinstance(error, UsageError):
        complain(str(error))
        return status.USAGE
    from bunshin import errors

    for kind, code in (
        (errors.ConfigError, status.USAGE),
        (errors.ImageError, status.IMAGE),
        (errors.StateError, status.STATE),
        (errors.EngineError, status.HOST),
        (errors.Timeout, status.TIMEOUT),
    ):
        if isinstance(error, kind):
            complain(str(error))
            return code
    if isinstance(error, ModuleNotFoundError) and error.name == "bunshin._native":
        complain("the engine is not built yet; 'make build' in the source tree builds it")
        return status.HOST
    if isinstance(error, MemoryError):
        complain("the host has not enough memory for this")
        return status.HOST
    if isinstance(error, OSError):
        complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        return status.HOST
    words = " ".join(str(error).split())
    complain(
        f"internal error, please report it: {type(error).__name__}: {words} (BUNSHIN_DEBUG=1 shows where)"
    )
    return status.INTERNAL


def _forget_stdout() -> None:
    """Keep Python from complaining at exit that stdout's reader is gone."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)
