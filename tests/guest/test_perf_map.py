"""`--perf-map`: the file that perf reads, and perf's own opinion where it is installed."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = b"i=0; while [ $i -lt 30000 ]; do i=$((i+1)); done; cat /proc/kallsyms > /dev/null; poweroff -f\n"


def boot(*before: str, options: tuple[str, ...] = ()) -> tuple[int, subprocess.CompletedProcess[bytes]]:
    """Run the guest with a map; the process of bunshin, and what became of it."""
    command = [*before, sys.executable, "-c", "import os; print(os.getpid(), flush=True); "]
    command[-1] += "import sys; from bunshin.cli import main; sys.exit(main())"
    done = subprocess.run(
        [*command, "run", "--perf-map", *options],
        input=COMMANDS,
        capture_output=True,
        timeout=200,
        check=False,
    )
    return int(done.stdout.split()[0]), done


@pytest.mark.usefixtures("tiny")
def test_the_map_names_guest_functions() -> None:
    pid, done = boot()
    path = Path(f"/tmp/perf-{pid}.map")
    try:
        assert done.returncode == 0, done.stderr
        lines = path.read_text().splitlines()
    finally:
        path.unlink(missing_ok=True)
    parsed = [re.fullmatch(r"([0-9a-f]+) ([0-9a-f]+) (\S.*)", line) for line in lines]
    assert all(parsed)
    names = {found[3] for found in parsed if found}
    assert {"guest:start_kernel", "guest:do_syscall_64", "guest:entry_SYSCALL_64"} <= names
    assert {"[bunshin] enter", "[bunshin] miss", "[bunshin] helper"} <= names
    assert any(name.startswith("user:0x") for name in names)
    # No two lines speak of the same byte, since nothing was flushed.
    ranges = sorted((int(f[1], 16), int(f[2], 16)) for f in parsed if f)
    assert all(a + length <= b for (a, length), (b, _) in itertools.pairwise(ranges))
    assert all(length > 0 for _, length in ranges)


@pytest.mark.usefixtures("tiny")
def test_symbols_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "System.map"
    path.write_text("ffffffff81000000 T all_of_it\n")
    pid, done = boot(options=("--symbols", str(path)))
    written = Path(f"/tmp/perf-{pid}.map")
    try:
        assert done.returncode == 0, done.stderr
        assert " guest:all_of_it\n" in written.read_text()
    finally:
        written.unlink(missing_ok=True)
    pid, done = boot(options=("--symbols", str(tmp_path / "absent")))
    assert done.returncode == 6
    assert not Path(f"/tmp/perf-{pid}.map").exists()


@pytest.mark.usefixtures("tiny")
def test_perf_shows_guest_functions(tmp_path: Path) -> None:
    perf = shutil.which("perf")
    data = str(tmp_path / "perf.data")
    if perf is None:
        pytest.skip("perf is not installed")
    if subprocess.run([perf, "record", "-o", data, "true"], capture_output=True, check=False).returncode:
        pytest.skip("perf may not count here")
    pid, done = boot(perf, "record", "-F", "997", "-o", data)
    try:
        assert done.returncode == 0, done.stderr
        report = subprocess.run(
            [perf, "report", "-i", data, "--stdio", "-s", "symbol"],
            capture_output=True,
            text=True,
            timeout=200,
            check=True,
        )
    finally:
        Path(f"/tmp/perf-{pid}.map").unlink(missing_ok=True)
    assert re.search(r"\[\.\] guest:[a-z_]\w+", report.stdout), report.stdout[:2000]
    assert "[.] user:0x" in report.stdout
