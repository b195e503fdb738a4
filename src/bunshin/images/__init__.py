"""Guest images that bunshin makes itself, from the distribution's own packages.

An image is built on first use into the cache and used from there ever after, offline
too. The cache is `$BUNSHIN_CACHE`, or `bunshin` in `$XDG_CACHE_HOME`, or
`~/.cache/bunshin`. Nothing of it needs root.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import ConfigError

_ABOUT = {"tiny": "the distribution's Linux kernel with a busybox shell in memory"}


@dataclass(frozen=True)
class Image:
    """What a machine needs to boot an image.

    Attributes:
        name: such as `tiny`.
        kernel, initrd: paths in the cache.
        append: the kernel command line.
        source: the packages it was made from, with versions.
        length: bytes on disk.
    """

    name: str
    kernel: str
    initrd: str
    append: str
    source: str
    length: int


def names() -> tuple[str, ...]:
    """Names of all images that `get` can build."""
    return tuple(_ABOUT)


def about(name: str) -> str:
    """One line on what an image is. Raises ConfigError for an unknown name."""
    _known(name)
    return _ABOUT[name]


def get(name: str, say: Callable[[str], object] | None = None) -> Image:
    """The image called `name`, built if it is not in the cache or damaged there.

    Progress goes to stderr, a bar on a terminal and lines elsewhere; or, as lines, to
    `say`.

    Raises:
        ConfigError: there is no image of that name.
        ImageError: it cannot be built here; nothing half-built remains.
    """
    _known(name)
    from . import cache, progress, tiny

    return cache.get(name, tiny.RECIPE, tiny.build, progress.Progress(name, say))


def find(name: str) -> Image | None:
    """The image called `name` if it is in the cache and whole; builds nothing."""
    _known(name)
    from . import cache, tiny

    return cache.find(name, tiny.RECIPE)


def remove(name: str) -> bool:
    """Take an image out of the cache; whether it was there."""
    _known(name)
    from . import cache

    return cache.remove(name)


def _known(name: str) -> None:
    if name not in _ABOUT:
        raise ConfigError("image-unknown", f"image: {name!r} is unknown; there are: {', '.join(_ABOUT)}")
