from __future__ import annotations

import errno
import multiprocessing
import os
from pathlib import Path

import pytest

from bunshin import images
from bunshin.errors import ConfigError, ImageError
from bunshin.images import cache, tiny
from bunshin.images.progress import Progress


class Builds:
    """A build that counts itself."""

    def __init__(self) -> None:
        self.count = 0
        self.fail: BaseException | None = None

    def __call__(self, directory: str, progress: Progress) -> dict[str, str]:
        self.count += 1
        Path(directory, "kernel").write_bytes(b"kernel")
        if self.fail:
            raise self.fail
        Path(directory, "initrd").write_bytes(b"initrd")
        return {"append": "quiet", "source": "a 1, b 2"}


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Builds:
    fake = Builds()
    monkeypatch.setattr(tiny, "build", fake)
    monkeypatch.setenv("BUNSHIN_CACHE", str(tmp_path / "cache"))
    return fake


def test_built_once(builds: Builds) -> None:
    assert images.find("tiny") is None
    image = images.get("tiny")
    assert images.get("tiny") == images.find("tiny") == image
    assert builds.count == 1
    assert Path(image.kernel).read_bytes() == b"kernel"
    assert (image.append, image.source, image.length) == ("quiet", "a 1, b 2", 12)
    assert images.remove("tiny")
    assert not images.remove("tiny")
    assert images.find("tiny") is None


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "manifest", "recipe", "garbage"])
def test_damage_is_found_and_mended(builds: Builds, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    image = images.get("tiny")
    initrd = Path(image.initrd)
    manifest = initrd.parent / "manifest.json"
    if damage == "flip":
        initrd.write_bytes(b"initrX")
    elif damage == "cut":
        initrd.write_bytes(b"init")
    elif damage == "gone":
        initrd.unlink()
    elif damage == "manifest":
        manifest.unlink()
    elif damage == "garbage":
        manifest.write_text("[1")
    else:
        monkeypatch.setattr(tiny, "RECIPE", tiny.RECIPE + 1)
    assert images.find("tiny") is None
    said: list[str] = []
    assert images.get("tiny", said.append) == image
    assert builds.count == 2
    assert initrd.read_bytes() == b"initrd"
    assert len(said) == 1
    assert "building it again" in said[0]
    assert sorted(os.listdir(initrd.parent)) == ["initrd", "kernel", "manifest.json"]


def test_a_touched_file_is_hashed_not_rebuilt(builds: Builds) -> None:
    image = images.get("tiny")
    os.utime(image.kernel, ns=(1, 1))
    assert images.get("tiny") == image
    assert builds.count == 1


@pytest.mark.parametrize(
    "error", [ImageError("x", "no network"), OSError(errno.ENOSPC, "No space left on device")]
)
def test_nothing_half_built_remains(builds: Builds, tmp_path: Path, error: Exception) -> None:
    builds.fail = error
    with pytest.raises(ImageError, match=r"no network|No space left on device; bring your own"):
        images.get("tiny")
    assert os.listdir(tmp_path / "cache/images") == ["tiny.lock"]
    builds.fail = None
    assert images.get("tiny")


def test_an_interrupted_build_is_cleared_away(builds: Builds, tmp_path: Path) -> None:
    left = tmp_path / "cache/images/tiny.tmp-dead"
    left.mkdir(parents=True)
    (left / "kernel").write_bytes(b"half")
    builds.fail = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        images.get("tiny")
    assert os.listdir(tmp_path / "cache/images") == ["tiny.lock"]


def test_a_cache_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("BUNSHIN_CACHE", str(tmp_path / "file"))
    with pytest.raises(ImageError, match="--kernel"):
        images.get("tiny")


def _get(count: str) -> None:
    def build(directory: str, progress: Progress) -> dict[str, str]:
        with open(count, "a", encoding="ascii") as file:
            file.write("x")
        return Builds()(directory, progress)

    tiny.build = build
    assert Path(images.get("tiny").initrd).read_bytes() == b"initrd"


def test_two_processes_at_once(builds: Builds, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    count = tmp_path / "count"
    workers = [context.Process(target=_get, args=(str(count),)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert count.read_text() == "x"


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUNSHIN_CACHE", "/x/y")
    assert cache.root() == "/x/y"
    monkeypatch.delenv("BUNSHIN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert cache.root() == "/c/bunshin"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache.root() == "/home/me/.cache/bunshin"


def test_names() -> None:
    assert images.names() == ("tiny",)
    assert "busybox" in images.about("tiny")
    for call in (images.get, images.find, images.remove, images.about):
        with pytest.raises(ConfigError, match="'huge' is unknown; there are: tiny"):
            call("huge")
