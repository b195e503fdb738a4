from __future__ import annotations

import io
import sys

import pytest

from bunshin.images.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    progress = Progress("tiny")
    progress.step("downloading")
    progress.part(0.5)
    progress.line("done")
    progress.clear()
    assert stderr.getvalue() == "tiny: downloading\ntiny: done\n"


def test_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    progress = Progress("tiny")
    progress.step("downloading")
    for at in range(101):
        progress.part(at / 100)
    progress.line("done")
    out = stderr.getvalue()
    assert "[##############..............]  50%" in out
    assert out.endswith("\r\x1b[Ktiny: done\n")
    assert out.count("\r") == 31
