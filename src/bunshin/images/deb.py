"""Debian packages: an `ar` archive with a compressed tar of the files inside.

    "!<arch>\\n", then members: 60 bytes of header (name 16, date 12, uid 6, gid 6,
    mode 8, length 10, "`\\n"), data, a pad byte when the length is odd.
    debian-binary, control.tar.*, data.tar.{xz,zst,gz}

Spec: deb(5), ar(5). The file was checked against the distribution's SHA-256, still
every length is checked here, and nothing is written by names from the archive.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

from ..errors import ImageError

LARGEST = 1 << 30
"""No file wanted from a package is larger (bytes)."""


class _Slice(io.RawIOBase):
    """Part of a file, as a stream."""

    def __init__(self, file: IO[bytes], length: int, seen: Callable[[int], object]) -> None:
        self._file = file
        self._left = length
        self._seen = seen

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(min(len(buffer), self._left))
        buffer[: len(data)] = data
        self._left -= len(data)
        self._seen(len(data))
        return len(data)


def files(
    path: str, wanted: Callable[[str], bool], seen: Callable[[int], object] = lambda count: None
) -> Iterator[tuple[str, bytes]]:
    """The regular files in a package whose name `wanted` accepts, as (name, data).

    Names come without the leading `./`. `seen` is told of packed bytes as they are read.

    Raises:
        ImageError: the package is damaged or packed in an unknown way.
    """
    try:
        with _data(path, seen) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                name = member.name.removeprefix("./")
                if not member.isfile() or not wanted(name):
                    continue
                if member.size > LARGEST:
                    raise ImageError("package", f"package {path}: {name} has {member.size} bytes")
                content = tar.extractfile(member)
                if content is not None:
                    yield name, content.read()
    except ImageError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the host's trouble, not the file's
        # Every library has its own error for damaged data.
        raise ImageError("package", f"package {path}: damaged: {error}") from error


@contextmanager
def _data(path: str, seen: Callable[[int], object]) -> Iterator[IO[bytes]]:
    """The unpacked data.tar as a stream."""
    with open(path, "rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise ImageError("package", f"package {path}: does not start with '!<arch>'")
        while header := file.read(60):
            if len(header) != 60 or header[58:] != b"`\n":
                raise ImageError("package", f"package {path}: damaged member header")
            name = header[:16].decode("ascii", "replace").strip().rstrip("/")
            length = int(header[48:58])
            if name.startswith("data.tar"):
                yield _unpack(path, name, _Slice(file, length, seen))
                return
            file.seek(length + length % 2, io.SEEK_CUR)
    raise ImageError("package", f"package {path}: has no data.tar")


def _unpack(path: str, name: str, packed: _Slice) -> IO[bytes]:
    buffered: Any = io.BufferedReader(packed, 1 << 20)
    if name.endswith(".xz"):
        import lzma

        return lzma.open(buffered)
    if name.endswith(".gz"):
        import gzip

        unpacked: Any = gzip.GzipFile(fileobj=buffered)
        return io.BufferedReader(unpacked, 1 << 20)
    if name.endswith(".zst"):
        import zstandard

        stream: Any = zstandard.ZstdDecompressor().stream_reader(buffered)
        return io.BufferedReader(stream, 1 << 20)
    if name == "data.tar":
        return buffered  # type: ignore[no-any-return]
    raise ImageError("package", f"package {path}: {name} is packed in an unknown way")
