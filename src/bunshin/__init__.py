"""bunshin: a hypervisor to import.

    from bunshin import Machine

    with Machine(image="tiny") as machine:
        machine.start()
        machine.console.expect("# ")
        machine.console.write("uname -a\\n")
        print(machine.console.expect("# ").string)

Public names are loaded when they are first used, so that the import itself is quick.
"""

from __future__ import annotations

# Type checkers know this name; importing `typing` for it would cost more than the rest.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from . import images as images
    from .config import parse_size as parse_size
    from .console import Console as Console
    from .devices import Device as Device
    from .errors import (
        BunshinError as BunshinError,
    )
    from .errors import (
        ConfigError as ConfigError,
    )
    from .errors import (
        EngineError as EngineError,
    )
    from .errors import (
        GuestError as GuestError,
    )
    from .errors import (
        ImageError as ImageError,
    )
    from .errors import (
        StateError as StateError,
    )
    from .errors import (
        Timeout as Timeout,
    )
    from .irq import IrqLine as IrqLine
    from .machine import Machine as Machine
    from .machine import Outcome as Outcome

__version__ = "0.1.0"

_WHERE = {
    "BunshinError": "errors",
    "ConfigError": "errors",
    "Console": "console",
    "Device": "devices",
    "EngineError": "errors",
    "GuestError": "errors",
    "ImageError": "errors",
    "IrqLine": "irq",
    "Machine": "machine",
    "Outcome": "machine",
    "StateError": "errors",
    "Timeout": "errors",
    "parse_size": "config",
}

__all__ = [
    "BunshinError",
    "ConfigError",
    "Console",
    "Device",
    "EngineError",
    "GuestError",
    "ImageError",
    "IrqLine",
    "Machine",
    "Outcome",
    "StateError",
    "Timeout",
    "__version__",
    "images",
    "parse_size",
]


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name == "images":
        return import_module(".images", __name__)
    if name in _WHERE:
        value: object = getattr(import_module(f".{_WHERE[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
