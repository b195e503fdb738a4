"""Everything bunshin raises on purpose.

    BunshinError            slug for programs, one sentence for people
    ├── ConfigError         the user's: an option, a size, a call at the wrong time
    ├── ImageError          a file's: a kernel, an initrd, a disk, a package
    ├── StateError          a snapshot's: a saved state that cannot be loaded
    ├── EngineError         the host's: memory, the engine, a device's own bug
    ├── GuestError          the guest's: caught in the device, never past it
    └── Timeout             what was waited for did not come (also a TimeoutError)

The sentence says where, what was found and what was expected.
"""

from __future__ import annotations


class BunshinError(Exception):
    """Base of every error that bunshin raises on purpose.

    Attributes:
        slug: a stable word for programs, for example `memory-size`.
        sentence: one sentence for people; also `str(error)`.
    """

    def __init__(self, slug: str, sentence: str) -> None:
        super().__init__(slug, sentence)
        self.slug = slug
        self.sentence = sentence

    def __str__(self) -> str:
        return self.sentence


class ConfigError(BunshinError):
    """The caller asked for something that cannot be."""


class ImageError(BunshinError):
    """A file is missing, damaged or of the wrong kind."""


class StateError(BunshinError):
    """A saved state does not fit what it is loaded into."""


class EngineError(BunshinError):
    """The host, the engine or a device's own code failed; the guest is not to blame."""


class GuestError(BunshinError):
    """The guest did what no driver should; the device catches this and goes on."""


class Timeout(BunshinError, TimeoutError):
    """What was waited for did not come in time.

    Attributes:
        tail: the last bytes of console output seen while waiting.
    """

    def __init__(self, slug: str, sentence: str, tail: bytes = b"") -> None:
        super().__init__(slug, sentence)
        self.tail = tail
