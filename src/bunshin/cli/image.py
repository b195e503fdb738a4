"""`bunshin image`: the guests that bunshin builds itself, in the cache."""

from __future__ import annotations

from . import status
from .options import UsageError, Values, Verb, closest, entry

ACTIONS = ("list", "build", "remove")

VERB = Verb(
    "image",
    "Guests that bunshin builds from the distribution's own packages and keeps in its cache: "
    "'list' shows all and what is built, 'build' makes one ready (so that 'run' works offline), "
    "'remove' takes it out of the cache.",
    operands=("list|build|remove", "IMAGE"),
    notes="""\
The cache is $BUNSHIN_CACHE, or 'bunshin' in $XDG_CACHE_HOME, or ~/.cache/bunshin.""",
)


def main(values: Values) -> int:
    """Do one of the three."""
    from bunshin import images

    action, *rest = values.operands or ["list"]
    if action not in ACTIONS:
        raise UsageError(f"{action!r} is not one of list, build, remove{closest(action, ACTIONS)}")
    if action == "list":
        for name in rest or images.names():
            image = images.find(name)
            print("\n".join(entry(name, images.about(name))))
            made = f"built, {image.length >> 20} MiB, from {image.source}" if image else "not built yet"
            print("\n".join(entry("", made)))
        return status.OK
    if not rest:
        raise UsageError(f"which image? 'bunshin image {action} {images.names()[0]}'")
    if action == "build":
        image = images.get(rest[0])
        print(f"{image.name} is ready: {image.length >> 20} MiB, from {image.source}")
    elif images.remove(rest[0]):
        print(f"{rest[0]} is removed")
    else:
        print(f"{rest[0]} was not built")
    return status.OK
