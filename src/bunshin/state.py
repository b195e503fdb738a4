"""Device states with a name and a version, as plain data.

A state is a dataclass of ints, bools, bytes, strings and lists of ints. `pack` turns
it into a dict that any format can carry; `unpack` treats what it is given as
untrusted and checks the name, the version, the fields and their types.
"""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from .errors import StateError

S = TypeVar("S")

Packed = dict[str, Any]
"""`{"name": str, "version": int, "fields": {...}}`"""


def pack(name: str, version: int, state: object) -> Packed:
    """Copy the dataclass `state` into plain data."""
    values = {}
    for field in fields(state):  # type: ignore[arg-type]
        value = getattr(state, field.name)
        if isinstance(value, (bytearray, memoryview)):
            value = bytes(value)
        elif isinstance(value, list):
            value = list(value)
        values[field.name] = value
    return {"name": name, "version": version, "fields": values}


def unpack(name: str, version: int, cls: type[S], packed: Any) -> S:
    """Build a `cls` from what `pack` made, in this version or an older one.

    Fields that `cls` has gained since, with a default, take that default.

    Raises:
        StateError: another device's state, a newer version, a field that is
            missing, unknown or of the wrong type.
    """

    def bad(what: str) -> StateError:
        return StateError("state-invalid", f"saved state of {name}: {what}")

    if not isinstance(packed, dict) or not isinstance(packed.get("fields"), dict):
        raise bad(f"found {type(packed).__name__} where name, version and fields were expected")
    if packed.get("name") != name:
        raise bad(f"found the state of {packed.get('name')!r}")
    found = packed.get("version")
    if type(found) is not int or not 1 <= found <= version:
        raise bad(f"found version {found!r}, expected 1 to {version}")
    values = dict(packed["fields"])
    hints = get_type_hints(cls)
    result: dict[str, Any] = {}
    for field in fields(cls):  # type: ignore[arg-type]
        if field.name not in values:
            if field.default is MISSING and field.default_factory is MISSING:
                raise bad(f"field {field.name} is missing")
            continue
        value = values.pop(field.name)
        if not _fits(value, hints[field.name]):
            raise bad(f"field {field.name} is {value!r:.60}, not of type {field.type}")
        result[field.name] = bytearray(value) if hints[field.name] is bytearray else value
    if values:
        raise bad(f"field {min(values, key=str)!r} is unknown")
    return cls(**result)


def _fits(value: object, hint: Any) -> bool:
    if hint is int:
        return type(value) is int
    if hint is bytearray:
        return isinstance(value, (bytes, bytearray))
    if get_origin(hint) is list:
        (item,) = get_args(hint)
        return isinstance(value, list) and all(_fits(element, item) for element in value)
    return isinstance(value, hint)
