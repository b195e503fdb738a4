"""Choosing an engine, and the one door to the native module.

`auto` takes KVM where it is worth it. That `/dev/kvm` is there proves nothing: there are
nested hosts whose KVM emulates supervisor code, a thousand times slower than hardware, and
ends at instructions that kernels need. So a throwaway machine is measured first
(`_native.probe_kvm`, some milliseconds, once for a process), and `decide` draws the
conclusion from its figures. `direct` is the translator with user code run natively where
that pays (experimental: docs/design/direct-execution.md).

Everything that needs `bunshin._native` asks `native()`, so that nothing is loaded before
it is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import ConfigError, EngineError

if TYPE_CHECKING:
    from ._native import Engine

AVAILABLE = ("kvm", "translator", "direct")
"""Names of the engines."""
SLOW_NS = 50.0
"""Nanoseconds of a simple instruction in supervisor mode, from which on KVM does not run
it in hardware: that takes about one, and emulation some five hundred."""
FEW_SLOTS = 8
"""Pieces of memory that a machine may need."""


class Choice(NamedTuple):
    """An engine, why it, and what speaks against it if somebody wanted it all the same."""

    name: str
    reason: str
    warning: str | None = None


def native() -> Any:
    """The module `bunshin._native`.

    Raises:
        EngineError: it is not installed or does not load here.
    """
    try:
        from . import _native
    except ImportError as error:
        raise EngineError(
            "native-missing",
            f"the native engine bunshin._native does not load: {error}; "
            "it is built for x86-64 Linux by `pip install`",
        ) from error
    return _native


@cache
def figures() -> Mapping[str, Any]:
    """What KVM on this host is worth, measured at the first call; see `_native.probe_kvm`."""
    result: dict[str, Any] = native().probe_kvm()
    return result


def decide(found: Mapping[str, Any]) -> Choice:
    """The engine that figures of `_native.probe_kvm` speak for, and why. Nothing is measured here."""
    against = _against(found)
    if against is not None:
        return Choice("translator", against)
    return Choice(
        "kvm",
        "KVM runs supervisor code at the speed of hardware here, "
        f"{found['instruction_ns']:.1f} ns an instruction",
    )


def _against(found: Mapping[str, Any]) -> str | None:
    """What speaks against KVM, as a sentence."""
    trouble = found["trouble"]
    refusals = {
        "kvm-absent": "this host has no /dev/kvm",
        "kvm-permission": "you may not open /dev/kvm",
    }
    if found["refusal"] is not None:
        return refusals.get(found["refusal"], "/dev/kvm does not answer as KVM does")
    if not found["machine"]:
        return f"KVM on this host makes no machine: {trouble}"
    if not found["long_mode"]:
        return f"KVM on this host runs no 64-bit code: {trouble or 'it stood still'}"
    lacks = [
        name
        for name, there in (("CMPXCHG16B", found["cmpxchg16b"]), ("XRSTOR", found["xsave"] is not False))
        if not there
    ]
    # After a failure nothing was tried any more.
    fails = f" and fails at {lacks[0]}, which kernels need" if lacks else ""
    if found["instruction_ns"] > SLOW_NS:
        return (
            f"KVM on this host emulates supervisor code: an instruction takes "
            f"{found['instruction_ns']:.0f} ns where hardware takes about 1{fails}"
        )
    if lacks:
        return f"KVM on this host{fails.removeprefix(' and')}: {trouble or 'it gave a wrong result'}"
    if trouble:
        return f"KVM on this host did not finish a guest of a few instructions: {trouble}"
    if found["slots"] < FEW_SLOTS:
        return f"KVM on this host takes only {found['slots']} pieces of memory"
    return None


def choose(name: str = "auto") -> Choice:
    """Pick an engine.

    Raises:
        ConfigError: there is no engine of that name.
        EngineError: the native module does not load.
    """
    if name == "auto":
        return decide(figures())
    if name == "kvm":
        return Choice(name, "it was asked for", _against(figures()))
    if name in AVAILABLE:
        return Choice(name, "it was asked for")
    there = ", ".join(("auto", *AVAILABLE))
    raise ConfigError("engine-unknown", f"engine: {name!r} is unknown; there are: {there}")


def create(name: str, cpus: int, movable: bool = False) -> Engine:
    """Build the engine called `name`; a `movable` machine can go to the others later.

    Raises:
        EngineError: the host lacks something that the engine needs.
    """
    module = native()
    try:
        engine: Engine = module.Engine(name, cpus, movable=movable)
    except module.EngineError as error:
        raise from_native(error) from error
    return engine


@contextmanager
def native_errors() -> Iterator[None]:
    """Turn the native module's errors into this package's."""
    kind: type[BaseException] = native().EngineError
    try:
        yield
    except kind as error:
        raise from_native(error) from error


def from_native(error: BaseException) -> EngineError:
    """The same error in this package's tree; native ones carry (slug, sentence)."""
    if isinstance(error, EngineError):
        return error
    if len(error.args) == 2:
        return EngineError(str(error.args[0]), str(error.args[1]))
    return EngineError("engine", str(error) or type(error).__name__)
