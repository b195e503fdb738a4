"""Draws results of the yardstick: bunshin beside QEMU's translator and the host.

    python bench/graph.py RESULTS.json PICTURE.svg

One SVG, written by hand and readable on light and dark pages: how many times slower
than native each figure is, on a logarithmic scale, and beside it what has no native
counterpart. Results of a quick or partial run are refused: a picture that lacks
something must not look as if it were whole.
"""

from __future__ import annotations

import json
import math
import sys
from html import escape
from pathlib import Path

import summary
from summary import GUESTS, Results

WIDTH = 880
LEFT, RIGHT = 190, 720
"""Where the scale begins and ends."""
COLUMNS = {"bunshin": 778, "qemu": 856}
"""Right ends of the numbers."""
ROW, TOP = 18, 190
NAMES = {"bunshin": "bunshin", "qemu": "QEMU's translator (TCG)"}
TICKS = (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)

GROUPS: list[tuple[str, str, list[str], bool]] = [
    ("Integer", "cpu", summary.INTEGER, True),
    (
        "Vectors and memory",
        "cpu",
        ["fp_scalar", *summary.VECTOR, "memcpy_16m", "chase_32m"],
        False,
    ),
    ("Code that changes", "cpu", ["smc_patch", "jit_fresh"], False),
    ("System", "sys", summary.SYSTEM, True),
    ("Real programs", "real", summary.REAL, True),
]
"""Title, section, figures, and whether their mean is drawn too."""

STYLE = """
svg { color-scheme: light dark; }
.page { fill: #ffffff; } .text { fill: #1f2328; } .faint { fill: #59636e; }
.grid { stroke: #d1d9e0; } .native { stroke: #1f2328; } .link { stroke: #b4bcc5; }
.bunshin { fill: #0969da; } .qemu { fill: #bc4c00; }
@media (prefers-color-scheme: dark) {
  .page { fill: #0d1117; } .text { fill: #f0f6fc; } .faint { fill: #9198a1; }
  .grid { stroke: #2b323b; } .native { stroke: #f0f6fc; } .link { stroke: #4a525c; }
  .bunshin { fill: #58a6ff; } .qemu { fill: #f0883e; }
}
text { font: 12px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
.small { font-size: 11px; } .strong { font-weight: 600; } .title { font-size: 17px; font-weight: 600; }
"""


class Picture:
    """The elements of an SVG, from top to bottom."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def text(self, x: float, y: float, text: str, kind: str = "text", anchor: str = "start") -> None:
        place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
        self.parts.append(f'<text class="{kind}" {place}>{escape(text)}</text>')

    def line(self, kind: str, x: float, y: float, to_x: float, to_y: float, width: float = 1) -> None:
        ends = f'x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}"'
        self.parts.append(f'<line class="{kind}" {ends} stroke-width="{width}"/>')

    def dot(self, kind: str, x: float, y: float, size: float, hint: str) -> None:
        # Not only the colour tells them apart: one is round, the other a square.
        title = f"<title>{escape(hint)}</title>"
        if kind == "bunshin":
            self.parts.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{size}">{title}</circle>')
        else:
            place = f'x="{x - size:.1f}" y="{y - size:.1f}" width="{2 * size}" height="{2 * size}"'
            self.parts.append(f'<rect class="{kind}" {place}>{title}</rect>')

    def bar(self, kind: str, x: float, y: float, width: float, height: float) -> None:
        place = f'x="{x:.1f}" y="{y:.1f}" width="{max(width, 1):.1f}" height="{height:.1f}" rx="2"'
        self.parts.append(f'<rect class="{kind}" {place}/>')


class Scale:
    """Logarithmic, from a little below the smallest ratio to a little above the largest."""

    def __init__(self, ratios: list[float]) -> None:
        low, high = min([*ratios, 1.0]) / 1.15, max([*ratios, 10.0]) * 1.1
        self._from, self._width = math.log(low), math.log(high / low)
        self.ticks = [tick for tick in TICKS if low <= tick <= high]

    def __call__(self, ratio: float) -> float:
        return LEFT + (RIGHT - LEFT) * (math.log(ratio) - self._from) / self._width


def draw(results: Results) -> str:
    """The picture of a whole run.

    Raises:
        ValueError: the results lack something; the text says what.
    """
    lacks = summary.missing(results)
    if lacks:
        raise ValueError(f"these results are not whole: {', '.join(lacks)}")
    rows = list(_rows(results))
    scale = Scale([ratio for _, _, ratios in rows for ratio in ratios.values()])
    picture, below = Picture(), Picture()
    _head(picture, results)
    y, ends = _plot(picture, rows, scale)
    for tick in scale.ticks:
        kind, width = ("native", 1.5) if tick == 1 else ("grid", 1)
        below.line(kind, scale(tick), TOP - 8, scale(tick), ends, width)
        picture.text(scale(tick), TOP - 14, "native" if tick == 1 else f"{tick:g}x", "small faint", "middle")
    picture.text(24, y, f"{results['host']}, {results['cpus']} processors; kernel {results['kernel']}; "
                 f"made {results['made'][:10]} at {results['commit']}; medians of {results['rounds']} rounds",
                 "small faint")  # fmt: skip
    height = y + 14
    size = f'width="{WIDTH}" height="{height:.0f}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" {size} role="img">',
        "<title>bunshin, QEMU's translator and the host side by side</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="page" {size}/>',
        *below.parts,
        *picture.parts,
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _rows(results: Results) -> list[tuple[str, str, dict[str, float]]]:
    """`(kind, label, ratio by guest)`; kinds are `group`, `figure` and `mean`."""
    rows: list[tuple[str, str, dict[str, float]]] = []
    for title, section, names, with_mean in GROUPS:
        rows.append(("group", title, {}))
        for name in names:
            found = {guest: summary.slower(results, section, guest, name) for guest in GUESTS}
            rows.append(("figure", name, {g: ratio for g, ratio in found.items() if ratio is not None}))
        if with_mean:
            found = {guest: summary.mean(results, section, guest, names) for guest in GUESTS}
            rows.append(("mean", "geometric mean", {g: r for g, r in found.items() if r is not None}))
        for name in summary.SHORT if section == "real" else ():
            found = {guest: summary.slower(results, section, guest, name) for guest in GUESTS}
            rows.append(("figure", f"{name}, in no mean", {g: r for g, r in found.items() if r is not None}))
    return rows


def _head(picture: Picture, results: Results) -> None:
    picture.text(24, 32, "How much slower than the host itself", "text title")
    for guest, y in zip(GUESTS, (54, 72), strict=True):
        picture.dot(guest, 30, y - 4, 4.5, NAMES[guest])
        picture.text(42, y, NAMES[guest])
    for y, words in (
        (100, "Times slower than native, one processor;"),
        (116, "logarithmic: further left is better."),
    ):
        picture.text(24, y, words, "faint")
    # What has no native counterpart.
    x = 430
    picture.text(x, 32, "Boot to power-off, user CPU", "text strong")
    seconds = {guest: summary.boot_seconds(results, guest) or 0.0 for guest in GUESTS}
    longest = max(seconds.values())
    for guest, y in zip(GUESTS, (42, 60), strict=True):
        width = 170 * seconds[guest] / longest
        picture.bar(guest, x, y, width, 13)
        picture.text(x + width + 8, y + 11, f"{seconds[guest]:.2f} s")
    picture.text(x, 96, "Two busy processors against one", "text strong")
    for guest, y in zip(GUESTS, (106, 124), strict=True):
        times = summary.smp(results, guest) or 0.0
        width = 170 * times / 2
        picture.bar(guest, x, y, width, 13)
        picture.text(x + width + 8, y + 11, f"{times:.2f}x")
    exits = results["sections"]["exits"]
    picture.text(690, 32, "Exit to a Python device", "text strong")
    for number, (name, value) in enumerate(exits.items()):
        picture.text(690, 52 + 18 * number, name)
        picture.text(COLUMNS["qemu"], 52 + 18 * number, f"{value:.2f} µs", "text", "end")


def _plot(
    picture: Picture, rows: list[tuple[str, str, dict[str, float]]], scale: Scale
) -> tuple[float, float]:
    """Draw the rows; where the next text may stand, and where the last row ends."""
    for guest, x in COLUMNS.items():
        picture.text(x, TOP - 14, "bunshin" if guest == "bunshin" else "TCG", f"{guest} small strong", "end")
    y = float(TOP)
    for kind, label, ratios in rows:
        if kind == "group":
            y += 12
            picture.text(24, y + 5, label, "text strong")
            y += ROW
            continue
        strong = " strong" if kind == "mean" else ""
        picture.text(LEFT - 14, y + 4, label, f"text{strong}", "end")
        if len(ratios) == 2:
            picture.line("link", scale(ratios["bunshin"]), y, scale(ratios["qemu"]), y, 2)
        for guest, ratio in reversed(ratios.items()):
            size = 5.5 if kind == "mean" else 4
            picture.dot(guest, scale(ratio), y, size, f"{label}: {NAMES[guest]} {ratio:.2f}x native")
        for guest, ratio in ratios.items():
            picture.text(COLUMNS[guest], y + 4, f"{ratio:.3g}" if ratio >= 100 else f"{ratio:.2f}",
                         f"{guest}{strong}", "end")  # fmt: skip
        y += ROW
    return y + 26, y


def main(arguments: list[str]) -> int:
    """Draw what a file has."""
    if len(arguments) != 2:
        print((__doc__ or "").split("\n\n")[1].strip(), file=sys.stderr)
        return 2
    try:
        Path(arguments[1]).write_text(draw(json.loads(Path(arguments[0]).read_text())))
    except (OSError, ValueError) as error:
        print(f"graph: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
