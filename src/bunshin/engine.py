"""Choosing an engine, and the one door to the native module.

This version has one engine, the translator. Everything that needs `bunshin._native`
asks `native()`, so that nothing is loaded before it is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import ConfigError, EngineError

if TYPE_CHECKING:
    from ._native import Engine

AVAILABLE = ("kvm", "translator")
"""Names of the engines in this version."""


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


def choose(name: str = "auto") -> tuple[str, str]:
    """Pick an engine: `(name, reason)`.

    Raises:
        ConfigError: there is no engine of that name in this version.
    """
    if name == "auto":
        return "translator", "it is the only engine of this version and needs no /dev/kvm"
    if name in AVAILABLE:
        return name, "it was asked for"
    there = ", ".join(("auto", *AVAILABLE))
    if name == "kvm":
        raise ConfigError("engine-absent", f"engine: this version has no KVM engine; there are: {there}")
    raise ConfigError("engine-unknown", f"engine: {name!r} is unknown; there are: {there}")


def create(name: str, cpus: int) -> Engine:
    """Build the engine called `name`.

    Raises:
        EngineError: the host lacks something that the engine needs.
    """
    module = native()
    try:
        engine: Engine = module.Engine(name, cpus)
    except module.EngineError as error:
        raise from_native(error) from error
    return engine


def from_native(error: BaseException) -> EngineError:
    """The same error in this package's tree; native ones carry (slug, sentence)."""
    if isinstance(error, EngineError):
        return error
    if len(error.args) == 2:
        return EngineError(str(error.args[0]), str(error.args[1]))
    return EngineError("engine", str(error) or type(error).__name__)
