"""Linux on several processors, run by the real engine.

What the processors themselves must get right is tested closer to them, in the
engine's crate; here is what an operating system and the Python API see of it.
"""

from __future__ import annotations

import itertools
import re
import threading
import time
from collections.abc import Iterator

import pytest

from bunshin import ConfigError, Device, Machine, Outcome

pytestmark = pytest.mark.usefixtures("tiny")

PROMPT = r"tiny:[^\n]*# "
COMPLAINTS = re.compile(r"cut here|[Oo]ops|BUG:|stall|lockup|[Uu]nstable|hung")
COUNTER = 0xD000_0000


class Counter(Device):
    """Each read gives the next number; badly, so that it needs the bus's lock."""

    mmio = range(COUNTER, COUNTER + 8)

    def __init__(self) -> None:
        self.count = 0

    def read(self, offset: int, size: int) -> int:
        count = self.count
        time.sleep(0)  # lets another thread have the interpreter
        self.count = count + 1
        return count


class Linux:
    """A booted machine and its shell."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._number = itertools.count()
        machine.start()
        machine.console.expect(PROMPT)

    def sh(self, command: str) -> str:
        """What `command` prints."""
        n = next(self._number)
        self.machine.console.write(f"echo be''gin-{n}; {command}; echo en''d-{n}\n")
        found = self.machine.console.expect(rf"(?s)begin-{n}\r\n(.*?)end-{n}\r\n.*?{PROMPT}")
        return found[1].replace("\r\n", "\n")


def ended(machine: Machine) -> Outcome:
    """How the run ended; it must end."""
    outcome = machine.wait(60)
    assert outcome.kind != "timeout", machine.console.tail()
    return outcome


@pytest.fixture(scope="module")
def counter() -> Counter:
    return Counter()


@pytest.fixture(scope="module")
def linux(tiny: dict[str, str], counter: Counter) -> Iterator[Linux]:
    """Two processors, booted once for all tests that leave the machine as it was."""
    with Machine(image="tiny", cpus=2, devices=[counter]) as machine:
        linux = Linux(machine)
        yield linux
        assert not COMPLAINTS.search(linux.sh("dmesg")), "the kernel complains"


BUSY = "(while :; do :; done) &"


def test_linux_finds_them(linux: Linux) -> None:
    assert linux.sh("nproc") == "2\n"
    cpuinfo = linux.sh("cat /proc/cpuinfo")
    for name, values in (("processor", ["0", "1"]), ("apicid", ["0", "1"]), ("core id", ["0", "1"])):
        assert re.findall(rf"^{name}\s*: (\d+)$", cpuinfo, re.M) == values
    for name, value in (("physical id", "0"), ("siblings", "2"), ("cpu cores", "2")):
        assert re.findall(rf"^{name}\s*: (\d+)$", cpuinfo, re.M) == [value] * 2
    caches = linux.sh("cat /sys/devices/system/cpu/cpu1/cache/index*/shared_cpu_list 2>/dev/null")
    assert set(caches.split()) <= {"1", "0-1"}
    assert linux.sh("cat /sys/devices/system/clocksource/clocksource0/current_clocksource") in (
        "tsc\n",
        "kvm-clock\n",
    )


def test_both_work(linux: Linux) -> None:
    for cpu in range(2):
        assert linux.sh(f"taskset {1 << cpu} sh -c 'cut -d\" \" -f39 /proc/self/stat'") == f"{cpu}\n"
    # Processes, pipes and memory of their own on both at once.
    work = "i=0; while [ $i -lt 60 ]; do echo $i | sha256sum | cut -c1-4; i=$((i+1)); done | sha256sum"
    alone = linux.sh(work)
    together = linux.sh(f"for n in 1 2 3 4; do ({work}) & done; wait").splitlines()
    assert [line for line in together if re.match("[0-9a-f]{64}", line)] == alone.splitlines() * 4


def test_offline_and_online_again(linux: Linux) -> None:
    online = "/sys/devices/system/cpu/cpu1/online"
    for _ in range(5):
        assert linux.sh(f"echo 0 > {online}; nproc").splitlines()[-1] == "1"
        assert linux.sh(f"echo 1 > {online}; nproc").splitlines()[-1] == "2"
    assert linux.sh("taskset 2 echo here") == "here\n"


def test_a_device_asked_by_both(linux: Linux, counter: Counter) -> None:
    before = counter.count
    ask = f"i=0; while [ $i -lt 100 ]; do devmem {COUNTER:#x}; i=$((i+1)); done"
    found = linux.sh(f"for cpu in 1 2; do taskset $cpu sh -c '{ask}' & done; wait")
    answers = [int(line, 16) for line in found.splitlines() if line.startswith("0x")]
    assert sorted(answers) == list(range(before, before + 200))


def test_registers_of_each(linux: Linux) -> None:
    first, second = (linux.machine.cpu_registers(cpu) for cpu in range(2))
    assert first["cr0"] & 1 << 31
    assert second["cr0"] & 1 << 31
    assert not second["waits_for_sipi"]
    # Each has its own area for what is per processor.
    kernel_bases = {max(s["segments"][5]["base"], dict(s["msrs"])[0xC000_0102]) for s in (first, second)}
    assert len(kernel_bases) == 2
    text = linux.sh("grep ' linux_banner$' /proc/kallsyms").split()
    if text and int(text[0], 16):
        banner = linux.machine.read_virtual(int(text[0], 16), 14, cpu=1)
        assert banner == b"Linux version "
    with pytest.raises(ConfigError, match="cpu 2"):
        linux.machine.cpu_registers(2)


def test_paused_while_both_are_busy(linux: Linux) -> None:
    linux.sh(f"for n in 1 2; do {BUSY} done")
    for _ in range(5):
        linux.machine.pause()
        first = [linux.machine.cpu_registers(cpu)["gpr"] for cpu in range(2)]
        assert first == [linux.machine.cpu_registers(cpu)["gpr"] for cpu in range(2)]
        linux.machine.resume()
        assert linux.sh("echo on") == "on\n"
    # Both counters still agree: the kernel would drop one that does not.
    assert "tsc" in linux.sh("cat /sys/devices/system/clocksource/*/available_clocksource")
    linux.sh("kill $(jobs -p); wait 2>/dev/null")


def test_time_is_the_same_on_both(linux: Linux) -> None:
    script = "for n in 1 2 3 4 5 6 7 8; do for cpu in 1 2; do taskset $cpu cat /proc/uptime; done; done"
    for _ in range(3):
        linux.machine.pause()
        linux.machine.resume()
        uptimes = [float(line.split()[0]) for line in linux.sh(script).splitlines()]
        assert uptimes == sorted(uptimes)


def test_written_from_outside_while_both_run(linux: Linux) -> None:
    linux.sh(f"for n in 1 2; do {BUSY} done")
    end = linux.machine.memory.low_end
    # What nobody uses: written as it is. Running code is dropped and comes back.
    for gpa in range(1 << 20, end, (end - (1 << 20)) // 64 & ~0xFFF):
        linux.machine.pause()
        linux.machine.memory.write(gpa, linux.machine.memory.read(gpa, 4096))
        linux.machine.resume()
    assert linux.sh("echo on") == "on\n"
    linux.sh("kill $(jobs -p); wait 2>/dev/null")


# The end, wherever it comes from ------------------------------------------------------


def busy(machine: Machine) -> Linux:
    linux = Linux(machine)
    linux.sh(f"for n in 1 2; do {BUSY} done")
    return linux


def test_stopped_while_both_are_busy(tiny: dict[str, str]) -> None:
    before = set(threading.enumerate())
    with Machine(image="tiny", cpus=2) as machine:
        busy(machine)
        machine.stop()
        assert ended(machine).kind == "stopped"
        assert [machine.cpu_registers(cpu)["cr0"] & 1 for cpu in range(2)] == [1, 1]
    assert set(threading.enumerate()) == before


@pytest.mark.parametrize(
    ("command", "kind"),
    [("poweroff -f", "power-off"), ("reboot -f", "reset"), ("echo c > /proc/sysrq-trigger", "panic")],
)
def test_ended_by_the_second(tiny: dict[str, str], command: str, kind: str) -> None:
    with Machine(image="tiny", cpus=2) as machine:
        linux = busy(machine)
        linux.machine.console.write(f"taskset 2 sh -c '{command}'\n")
        assert ended(machine).kind == kind


def test_more_than_the_host_has(tiny: dict[str, str]) -> None:
    with Machine(image="tiny", cpus=5) as machine:
        linux = Linux(machine)
        assert linux.sh("nproc") == "5\n"
        assert len(set(linux.sh("for c in 1 2 4 8 10; do taskset $c echo $c; done").split())) == 5
        assert not COMPLAINTS.search(linux.sh("dmesg"))
        machine.console.write("poweroff -f\n")
        assert ended(machine).kind == "power-off"
