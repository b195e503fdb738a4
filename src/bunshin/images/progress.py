"""Tells people how the building of an image goes: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable

_WIDTH = 28


class Progress:
    """One build's messages; step after step."""

    def __init__(self, name: str, say: Callable[[str], object] | None = None) -> None:
        self._name = name
        self._say = say
        self._terminal = say is None and sys.stderr is not None and sys.stderr.isatty()
        self._shown = False
        self._last = -1

    def step(self, text: str) -> None:
        """A new step begins."""
        self.clear()
        self._last = -1
        self._text = text
        if self._terminal:
            self._draw(f"{self._name}: {text}")
        else:
            self.line(text)

    def part(self, fraction: float) -> None:
        """How far the step is, from 0 to 1; only a terminal shows it."""
        cells = int(min(max(fraction, 0.0), 1.0) * _WIDTH)
        if self._terminal and cells != self._last:
            self._last = cells
            bar = "#" * cells + "." * (_WIDTH - cells)
            self._draw(f"{self._name}: {self._text} [{bar}] {fraction:4.0%}")

    def line(self, text: str) -> None:
        """A line that stays."""
        self.clear()
        if self._say is not None:
            self._say(f"{self._name}: {text}")
        elif sys.stderr is not None:
            sys.stderr.write(f"{self._name}: {text}\n")
            sys.stderr.flush()

    def clear(self) -> None:
        """Take the bar away."""
        if self._shown:
            self._shown = False
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def _draw(self, text: str) -> None:
        self._shown = True
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()
