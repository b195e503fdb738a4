"""initramfs archives: cpio in the "newc" format.

Each entry: "070701", thirteen 8-digit hex fields (inode, mode, uid, gid, links, mtime,
length, device numbers, length of the name with its NUL, 0), name, data; name and data
are padded to four bytes. The entry "TRAILER!!!" ends the archive.

Spec: Linux Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import stat


class Archive:
    """An archive in the making; everything belongs to root and is dated 1970."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._inode = 0

    def directory(self, name: str, mode: int = 0o755) -> None:
        """Add a directory; parents must come first."""
        self._entry(name, stat.S_IFDIR | mode)

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        """Add a regular file."""
        self._entry(name, stat.S_IFREG | mode, data)

    def link(self, name: str, target: str) -> None:
        """Add a symbolic link."""
        self._entry(name, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, name: str, major: int, minor: int, mode: int = 0o600) -> None:
        """Add a device node."""
        self._entry(name, stat.S_IFCHR | mode, device=(major, minor))

    def finish(self) -> bytes:
        """The whole archive."""
        self._inode = -1
        self._entry("TRAILER!!!", 0)
        archive = b"".join(self._parts)
        return archive + bytes(-len(archive) % 512)

    def _entry(self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        encoded = name.encode() + b"\0"
        fields = (
            self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded), 0,
        )  # fmt: skip
        header = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        self._parts.append(header + bytes(-len(header) % 4))
        self._parts.append(data + bytes(-len(data) % 4))
