"""Packages of the distribution, by `apt-cache` and `apt-get download`: no root needed.

What is downloaded is checked against the SHA-256 in apt's own signed index. Where
the system's index is missing, as in fresh containers, `refresh` fetches one into the
user's cache directory with the system's sources and keys.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass

from ..errors import ImageError
from .cache import HINT, digest, root
from .progress import Progress

_PATIENCE = ("-o", "Acquire::http::Timeout=20", "-o", "Acquire::https::Timeout=20")


@dataclass(frozen=True)
class Package:
    """A package that apt can download. `length` in bytes."""

    name: str
    version: str
    length: int
    sha256: str
    depends: str


_own: list[str] = []
"""Options that make apt use the index in the cache directory, once there is one."""


def refresh(progress: Progress) -> bool:
    """Fetch the distribution's package lists into the cache directory.

    Returns:
        True if there are new lists to look in.
    """
    if _own:
        return False
    home = os.path.join(root(), "apt")
    for part in ("lists/partial", "archives/partial"):
        os.makedirs(os.path.join(home, part), exist_ok=True)
    options = [
        "-o", f"Dir::State::lists={home}/lists", "-o", f"Dir::Cache={home}",
        # Root's apt would fetch as another user, who cannot write here.
        "-o", "APT::Sandbox::User=root",
    ]  # fmt: skip
    progress.step("fetching the distribution's package lists")
    done = subprocess.run(
        [_tool("apt-get"), "update", "-q=2", "-o", "Acquire::Retries=1", *_PATIENCE, *options],
        env={**os.environ, "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    if done.returncode != 0:
        shutil.rmtree(home, ignore_errors=True)
        return False
    _own.extend(options)
    return True


def show(name: str) -> Package | None:
    """What apt would download for `name`; None when it knows no such package.

    Raises:
        ImageError: there is no apt here.
    """
    text = _run("apt-cache", *_own, "show", "--no-all-versions", name)
    fields: dict[str, str] = {}
    for line in text.split("\n\n")[0].splitlines():
        key, colon, value = line.partition(":")
        if colon and not line.startswith(" "):
            fields[key] = value.strip()
    try:
        return Package(
            fields["Package"],
            fields["Version"],
            int(fields["Size"]),
            fields["SHA256"].lower(),
            fields.get("Depends", ""),
        )
    except (KeyError, ValueError):
        return None


def download(package: Package, directory: str, progress: Progress) -> str:
    """Download a package into `directory` and check it; returns its path.

    Raises:
        ImageError: no network, no room, or not what the index promised.
    """
    progress.step(f"downloading {package.name} {package.version} ({package.length / 1e6:.1f} MB)")
    command = [
        _tool("apt-get"), "download", "-q=2", "-o", "APT::Status-Fd=1",
        "-o", "Acquire::Retries=1", *_PATIENCE, *_own, f"{package.name}={package.version}",
    ]  # fmt: skip
    complaint = ""
    before = set(os.listdir(directory))
    with subprocess.Popen(
        command,
        cwd=directory,
        env={**os.environ, "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        try:
            for line in process.stdout or ():
                status = re.match(r"dlstatus:\d+:([\d.]+):", line)
                if status:
                    progress.part(float(status[1]) / 100)
                elif line.startswith("E: ") and not complaint:
                    complaint = line[3:].strip()
        except BaseException:
            process.kill()
            raise
    new = [name for name in os.listdir(directory) if name not in before and name.endswith(".deb")]
    if process.returncode != 0 or len(new) != 1:
        why = complaint or f"apt-get ended with status {process.returncode}"
        raise ImageError("image-download", f"image: {package.name} could not be downloaded: {why}; {HINT}")
    path = os.path.join(directory, new[0])
    found = digest(path)
    if found != package.sha256:
        raise ImageError(
            "image-download",
            f"image: {package.name} has SHA-256 {found}, apt's index says {package.sha256}; {HINT}",
        )
    return path


def _run(tool: str, *arguments: str) -> str:
    result = subprocess.run(
        [_tool(tool), *arguments],
        env={**os.environ, "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    return result.stdout


def _tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise ImageError(
            "image-no-apt",
            f"image: there is no {name} here to get a kernel and busybox with; {HINT}",
        )
    return path
