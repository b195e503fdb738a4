"""Why a virtual processor came back to its owner: the engine's exit kinds by name.

The numbers belong to `bunshin._native` and are looked up there on first use, so
that `import bunshin` does not load the engine.
"""

from __future__ import annotations

from typing import Any

NAMES = (
    "PIO_IN",
    "PIO_OUT",
    "MMIO_READ",
    "MMIO_WRITE",
    "HYPERCALL",
    "DEBUG",
    "KICKED",
    "SHUTDOWN",
    "FAILED",
)
"""Every exit kind, as spelled in `bunshin._native`."""


def by_number(native: Any) -> dict[int, str]:
    """Map the numbers of `native` to lower-case names such as `pio-in`."""
    return {getattr(native, name): name.lower().replace("_", "-") for name in NAMES}


def __getattr__(name: str) -> Any:
    if name in NAMES:
        from . import _native

        return getattr(_native, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
