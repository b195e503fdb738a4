"""The cache of built images: whole or absent, and safe for several processes at once.

    <cache>/images/tiny.lock           held while the image is built or replaced
    <cache>/images/tiny/kernel
    <cache>/images/tiny/initrd
    <cache>/images/tiny/manifest.json  lengths and SHA-256 of both, made last
    <cache>/images/tiny.tmp-*          a build under way, renamed when it is whole

A file whose length, inode and modification time are those in the manifest is taken as
whole; otherwise it is hashed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import ImageError
from . import Image
from .progress import Progress

FILES = ("kernel", "initrd")
_MANIFEST = "manifest.json"
HINT = "bring your own with --kernel FILE and --initrd FILE"

Build = Callable[[str, Progress], dict[str, str]]
"""Makes FILES in a directory; returns `append` and `source`."""


def root() -> str:
    """Directory of the cache; it need not exist."""
    chosen = os.environ.get("BUNSHIN_CACHE")
    if chosen:
        return os.path.abspath(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "bunshin")


def get(name: str, recipe: int, build: Build, progress: Progress) -> Image:
    """The whole image, built by `build` if need be. Raises ImageError."""
    directory = os.path.join(root(), "images")
    image, _ = _look(directory, name, recipe)
    if image is not None:
        return image
    try:
        os.makedirs(directory, exist_ok=True)
        with _locked(os.path.join(directory, f"{name}.lock"), progress):
            # Another process may have built it while this one waited.
            image, why = _look(directory, name, recipe)
            if image is not None:
                return image
            if why:
                progress.line(f"{why}, building it again")
            return _build(directory, name, recipe, build, progress)
    except OSError as error:
        where = error.filename or directory
        raise ImageError(
            "image-build", f"image {name}: {where}: {error.strerror or error}; {HINT}"
        ) from error
    finally:
        progress.clear()


def find(name: str, recipe: int) -> Image | None:
    """The image if it is there and whole."""
    return _look(os.path.join(root(), "images"), name, recipe)[0]


def remove(name: str) -> bool:
    """Take the image out of the cache; whether it was there."""
    directory = os.path.join(root(), "images")
    target = os.path.join(directory, name)
    if not os.path.isdir(target):
        return False
    try:
        with _locked(os.path.join(directory, f"{name}.lock"), None):
            shutil.rmtree(target)
    except OSError as error:
        raise ImageError(
            "image-remove", f"image {name}: {error.filename or target}: {error.strerror}"
        ) from error
    return True


def digest(path: str) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _build(directory: str, name: str, recipe: int, build: Build, progress: Progress) -> Image:
    for entry in os.listdir(directory):
        if entry.startswith(f"{name}.tmp-"):
            # The lock is ours, so whoever made this is gone.
            shutil.rmtree(os.path.join(directory, entry), ignore_errors=True)
    work = tempfile.mkdtemp(prefix=f"{name}.tmp-", dir=directory)
    try:
        os.chmod(work, 0o755)
        facts = build(work, progress)
        manifest: dict[str, Any] = {"recipe": recipe, **facts, "files": {}}
        for file in FILES:
            path = os.path.join(work, file)
            _sync(path)
            manifest["files"][file] = {"sha256": digest(path), **_stat(path)}
        _write_manifest(work, manifest)
        target = os.path.join(directory, name)
        if os.path.lexists(target):
            os.rename(target, os.path.join(work, "old"))
        os.rename(work, target)
        shutil.rmtree(os.path.join(target, "old"), ignore_errors=True)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    image, why = _look(directory, name, recipe)
    if image is None:
        raise ImageError("image-build", f"image {name}: {why or 'vanished'} after it was built")
    return image


def _look(directory: str, name: str, recipe: int) -> tuple[Image | None, str]:
    """The image, or why not ("" when it was never built)."""
    target = os.path.join(directory, name)
    try:
        with open(os.path.join(target, _MANIFEST), encoding="utf-8") as file:
            manifest = json.load(file)
        if manifest["recipe"] != recipe:
            return None, "made by another version of bunshin"
        length, moved = 0, False
        for file_name in FILES:
            path, told = os.path.join(target, file_name), manifest["files"][file_name]
            found = _stat(path)
            length += found["length"]
            if any(told[key] != value for key, value in found.items()):
                if found["length"] != told["length"] or digest(path) != told["sha256"]:
                    return None, f"{path} is damaged"
                told.update(found)
                moved = True
        image = Image(
            name,
            os.path.join(target, "kernel"),
            os.path.join(target, "initrd"),
            str(manifest["append"]),
            str(manifest["source"]),
            length,
        )
    except FileNotFoundError as error:
        return None, f"{error.filename} is missing" if os.path.isdir(target) else ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, f"{os.path.join(target, _MANIFEST)} is damaged"
    if moved:
        try:
            _write_manifest(target, manifest)
        except OSError:
            pass  # a cache that cannot be written is hashed each time
    return image, ""


def _stat(path: str) -> dict[str, int]:
    stat = os.stat(path)
    return {"length": stat.st_size, "mtime_ns": stat.st_mtime_ns, "inode": stat.st_ino}


def _write_manifest(directory: str, manifest: dict[str, Any]) -> None:
    path = os.path.join(directory, _MANIFEST)
    temporary = f"{path}.{os.getpid()}"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(manifest, file, indent=1)
    _sync(temporary)
    os.replace(temporary, path)


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _locked(path: str, progress: Progress | None) -> Iterator[None]:
    import fcntl

    with open(path, "w", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if progress is not None:
                progress.step("another process is building it, waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
