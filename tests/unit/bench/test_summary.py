"""What is made of the yardstick's results: ratios, promises, and a picture only of a whole run."""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "bench"))

import graph
import measure
import payload
import smp
import summary


def figures(names: list[str], unit: str, value: float) -> dict[str, dict[str, Any]]:
    return {name: {"value": value, "unit": unit} for name in names}


@pytest.fixture
def results() -> dict[str, Any]:
    """A whole run: kernels twice as slow as native, the system three times, QEMU ten times."""
    cpu = [*summary.INTEGER, "fp_scalar", *summary.VECTOR, "memcpy_16m"]
    changing = ["chase_32m", "smc_patch", "jit_fresh"]
    sections: dict[str, Any] = {
        "boot": {"user": {"bunshin": [0.9, 1.0, 5.0], "qemu": [2.0, 2.5, 2.6]}},
        "cpu": {
            platform: {**figures(cpu, "MiB/s", 100 / times), **figures(changing, "ns", 100 * times)}
            for platform, times in (("native", 1), ("bunshin", 2), ("qemu", 10))
        },
        "sys": {
            platform: figures(summary.SYSTEM, "ns", 1000 * times)
            for platform, times in (("native", 1), ("bunshin", 3), ("qemu", 10))
        },
        "real": {
            platform: figures([*summary.REAL, *summary.SHORT], "s", times)
            for platform, times in (("native", 1), ("bunshin", 2.4), ("qemu", 10))
        },
        "exits": {"out": 0.4, "mmio read": 0.5},
        "smp": {"native": 2.0, "bunshin": 1.9, "qemu": 1.8},
    }
    about = {"version": 1, "made": "2030-01-02T03:04:05+00:00", "commit": "abc", "host": "A <Processor>"}
    return {**about, "cpus": 2, "kernel": "vmlinuz", "quick": False, "rounds": 3, "sections": sections}


def test_rates_and_costs(results: dict[str, Any]) -> None:
    assert summary.slower(results, "cpu", "bunshin", "sha256") == pytest.approx(2)
    assert summary.slower(results, "sys", "qemu", "syscall") == pytest.approx(10)
    assert summary.slower(results, "cpu", "bunshin", "absent") is None
    assert summary.slower(results, "absent", "bunshin", "sha256") is None


def test_a_mean_of_a_part_is_no_mean(results: dict[str, Any]) -> None:
    results["sections"]["cpu"]["bunshin"]["sha256"]["value"] = 100 / 512
    found = summary.mean(results, "cpu", "bunshin", summary.INTEGER)
    assert found == pytest.approx(math.exp((7 * math.log(2) + math.log(512)) / 8))
    del results["sections"]["cpu"]["bunshin"]["div64"]
    assert summary.mean(results, "cpu", "bunshin", summary.INTEGER) is None


def test_promises(results: dict[str, Any]) -> None:
    rows = {row.name: row for row in summary.promises(results)}
    assert rows["boot to power-off, user CPU, share of QEMU's"].value == pytest.approx(1.0 / 2.5)
    assert rows["integer, geometric mean"].met is False
    assert rows["system, geometric mean"].value == pytest.approx(3)
    assert rows["real programs, geometric mean"].met is True
    assert rows["smc_patch"].value == pytest.approx(0.2)
    assert rows["pipe_rt"].qemu == pytest.approx(10)
    assert rows["exit to a Python device and back, the worst of four kinds"].value == 0.5
    assert rows["two busy processors, work against one"].met is True
    empty = {"version": 1, "sections": {}}
    assert all(row.met is None for row in summary.promises(empty))


def test_a_whole_run_is_drawn(results: dict[str, Any]) -> None:
    assert summary.missing(results) == []
    root = ElementTree.fromstring(graph.draw(results))
    text = "\n".join("".join(element.itertext()) for element in root.iter())
    for word in (
        "sha256",
        "geometric mean",
        "python3_start",
        "1.00 s",
        "2.50 s",
        "0.50 µs",
        "1.90x",
        "native",
    ):
        assert word in text
    assert "A <Processor>" in text
    assert "2030-01-02 at abc" in text
    assert "prefers-color-scheme: dark" in text
    # Everything stands inside the picture.
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for element in root.iter():
        for name, limit in (("x", width), ("cx", width), ("x2", width), ("y", height), ("cy", height)):
            assert 0 <= float(element.attrib.get(name, 0)) <= limit


def lacking(change: str, results: dict[str, Any]) -> dict[str, Any]:
    broken = copy.deepcopy(results)
    sections = broken["sections"]
    match change:
        case "quick":
            broken["quick"] = True
        case "version":
            broken["version"] = 0
        case "smp":
            sections["smp"]["bunshin"] = {"unavailable": "this version runs 1"}
        case "qemu":
            del sections["sys"]["qemu"]
        case "boot":
            del sections["boot"]["user"]["qemu"]
        case "figure":
            del sections["real"]["native"]["xz"]
        case _:
            del sections[change]
    return broken


@pytest.mark.parametrize("change", ["quick", "version", "smp", "qemu", "boot", "figure", "exits", "cpu"])
def test_a_part_of_a_run_is_never_drawn(change: str, results: dict[str, Any]) -> None:
    broken = lacking(change, results)
    assert summary.missing(broken)
    with pytest.raises(ValueError, match="not whole"):
        graph.draw(broken)


def test_the_picture_in_the_readme_comes_from_a_file(results: dict[str, Any], tmp_path: Path) -> None:
    source, target = tmp_path / "results.json", tmp_path / "bench.svg"
    source.write_text("{}")
    assert graph.main([str(source), str(target)]) == 1
    assert graph.main([str(tmp_path / "absent"), str(target)]) == 1
    assert graph.main([]) == 2
    assert not target.exists()


def test_two_processors() -> None:
    def run(**values: float) -> measure.Run:
        return measure.Run(figures={name: measure.Figure(value, "s", 1.0) for name, value in values.items()})

    done = run(processors=2, one0=1.0, two0=1.0, one1=1.0, two1=2.0)
    assert smp.speedups(done, pairs=2) == [2.0, 1.0]
    assert smp.median([[2.0, 1.0], [1.5]]) == 1.5
    for broken in (run(processors=1, one0=1, two0=1), run(one0=1, two0=1), run(processors=2, one0=1)):
        with pytest.raises(payload.Unavailable):
            smp.speedups(broken, pairs=1)


def test_a_busy_host_is_taken_off() -> None:
    assert measure.Figure(100, "MiB/s", 0.5).corrected() == 200
    assert measure.Figure(100, "ns", 0.5).corrected() == 50
    assert measure.Figure(100, "ns", 0.01).corrected() == 20
    assert measure.Figure(100, "s", 0.5, used=70).corrected() == 70
