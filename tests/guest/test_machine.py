"""The Python API on a booted Linux: the image `tiny`, run by the real engine.

Most tests talk to one machine that stays booted; those that end, break or race a
machine boot their own.
"""

from __future__ import annotations

import itertools
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from struct import pack, unpack
from typing import Any

import pytest

from bunshin import BunshinError, ConfigError, Device, EngineError, Machine, Outcome, Timeout
from bunshin.stats import FIGURES, table

pytestmark = pytest.mark.usefixtures("tiny")

PROMPT = r"tiny:[^\n]*# "
RESERVED, RESERVED_LENGTH = 0x1000_0000, 0x1_0000
"""RAM that the kernel leaves alone (`memmap=`), so that /dev/mem may touch it."""
APPEND = f"memmap={RESERVED_LENGTH:#x}${RESERVED:#x}"
CR0_PE, CR0_PG = 1 << 0, 1 << 31
MIB = 1 << 20
TIMES = ("tsc", "msrs", "lapic")
"""Fields of the state that go on while a processor stands still."""


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
        # The quotes keep the terminal's echo from looking like the output.
        self.machine.console.write(f"echo be''gin-{n}; {command}; echo en''d-{n}\n")
        found = self.machine.console.expect(rf"(?s)begin-{n}\r\n(.*?)end-{n}\r\n.*?{PROMPT}")
        return found[1].replace("\r\n", "\n")

    def uptime(self) -> float:
        """Seconds since the guest booted, to 10 ms."""
        return float(self.sh("cat /proc/uptime").split()[0])


def ended(machine: Machine) -> Outcome:
    """How the run ended; it must end."""
    outcome = machine.wait(60)
    assert outcome.kind != "timeout", machine.console.tail()
    return outcome


def cpu_threads() -> set[threading.Thread]:
    """The threads of all virtual processors."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("bunshin-cpu")}


@pytest.fixture(scope="module")
def booted(tiny: dict[str, str]) -> Iterator[Linux]:
    """One booted machine for all tests that leave it as it was."""
    with Machine(image="tiny", append=APPEND) as machine:
        yield Linux(machine)


@pytest.fixture
def linux(booted: Linux) -> Iterator[Linux]:
    """The booted machine, running again after the test, whatever happened in it."""
    yield booted
    if booted.machine.status == "paused":
        booted.machine.resume()


def code_state(machine: Machine) -> dict[str, Any]:
    """The registers without those that count time."""
    return {name: value for name, value in machine.registers.items() if name not in TIMES}


# The console -------------------------------------------------------------------------


def test_expect_takes_what_it_matched_and_leaves_the_rest(linux: Linux) -> None:
    console = linux.machine.console
    console.write("echo first''-word second''-word; echo third''-word\n")
    match = console.expect(r"(first)-word (\w+)-")
    assert (match[1], match[2]) == ("first", "second")
    assert console.expect(b"word\r\nthird-").start() == 0
    assert console.expect(re.compile(PROMPT))


def test_read_takes_everything(linux: Linux) -> None:
    console = linux.machine.console
    console.write("echo one''-piece\n")
    data = b""
    while b"one-piece\r\n" not in data:
        new = console.read(timeout=60)
        assert new, data
        data += new
    console.write("\n")
    console.expect(PROMPT)


def test_bytes_that_are_no_text_pass_both_ways(linux: Linux) -> None:
    data = bytes(range(0x80, 0x100))
    console = linux.machine.console
    console.write("stty -echo; head -c 128 | md5sum; stty echo; head -c 0\n")
    console.expect(r"\n")
    console.write(data)
    console.write("\n")
    assert console.expect(r"[0-9a-f]{32}")
    console.expect(PROMPT)
    console.write(r"printf 'raw:\377\376\200:raw\n'" + "\n")
    assert console.expect(rb"raw:(...):raw\r\n")[1] == b"\xff\xfe\x80"
    console.expect(PROMPT)


def test_long_input_arrives_whole(linux: Linux) -> None:
    text = "".join(f"{n:07d}\n" for n in range(300))
    linux.machine.console.write("cat > /tmp/long <<'END'\n" + text + "END\n")
    assert linux.sh("tail -n 1 /tmp/long; wc -l < /tmp/long").split() == ["0000299", "300"]
    assert linux.machine.console.pending == 0


def test_expect_gives_up_with_the_last_output(linux: Linux) -> None:
    linux.sh("echo last''-words")
    with pytest.raises(Timeout, match=r"'never'.*0\.2 s.*last-words") as caught:
        linux.machine.console.expect("never", timeout=0.2)
    assert b"last-words" in caught.value.tail
    assert isinstance(caught.value, TimeoutError)


# Looking inside ----------------------------------------------------------------------


def test_registers(linux: Linux) -> None:
    state = linux.machine.registers
    assert state["cr0"] & (CR0_PE | CR0_PG) == CR0_PE | CR0_PG
    assert 0 <= state["rip"] < 1 << 47 or 0xFFFF_8000_0000_0000 <= state["rip"] < 1 << 64
    assert len(state["gpr"]) == 16
    assert state["cr3"] & ~0xFFF < linux.machine.memory.size
    assert linux.machine.cpu_registers(0).keys() == state.keys()


def test_registers_of_a_processor_that_is_not_there(linux: Linux) -> None:
    for cpu in (-1, 1):
        with pytest.raises(ConfigError, match=f"cpu {cpu}"):
            linux.machine.cpu_registers(cpu)


def test_a_busy_guest_can_be_looked_at(linux: Linux) -> None:
    linux.machine.console.write("echo bu''sy; while :; do :; done\n")
    linux.machine.console.expect(r"busy\r\n")
    seen: set[int] = set()
    while len(seen) < 10:
        seen.add(linux.machine.registers["rip"])
    linux.machine.console.write(b"\x03")
    linux.machine.console.expect(PROMPT)


def test_guest_memory_written_here_is_read_there(linux: Linux) -> None:
    words = [secrets.randbits(32) for _ in range(4)]
    linux.machine.memory.write(RESERVED, pack("<4I", *words))
    for at, word in enumerate(words):
        assert int(linux.sh(f"devmem {RESERVED + 4 * at:#x}"), 16) == word


def test_guest_memory_written_there_is_read_here(linux: Linux) -> None:
    last = RESERVED + RESERVED_LENGTH - 0x1000
    linux.sh(f"devmem {last:#x} 64 0x1122334455667788")
    assert unpack("<Q", linux.machine.memory.read(last, 8)) == (0x1122_3344_5566_7788,)
    large = linux.machine.memory.read(RESERVED, RESERVED_LENGTH)
    assert large[-0x1000:-0xFF8] == bytes.fromhex("8877665544332211")


def test_memory_has_ends(linux: Linux) -> None:
    memory = linux.machine.memory
    assert memory.size == 512 * MIB
    assert memory.read(memory.size, 0) == b""
    assert len(memory.read(memory.size - 1, 1)) == 1
    for gpa, length in ((memory.size - 1, 2), (memory.size, 1), (-1, 1), (0, -1), (1 << 64, 1)):
        with pytest.raises(ConfigError, match="not all RAM"):
            memory.read(gpa, length)
    with pytest.raises(ConfigError, match="not all RAM"):
        memory.write(memory.size - 2, b"abc")


def test_read_virtual(linux: Linux) -> None:
    symbol = linux.sh("grep ' linux_banner$' /proc/kallsyms")
    banner = linux.sh("cat /proc/version").encode()
    assert linux.machine.read_virtual(int(symbol.split()[0], 16), len(banner)) == banner


def test_read_virtual_across_pages(linux: Linux) -> None:
    start = int(linux.sh("grep ' _text$' /proc/kallsyms").split()[0], 16)
    code = linux.machine.read_virtual(start + 0xFF0, 0x2020)
    assert code[:16] == linux.machine.read_virtual(start + 0xFF0, 16)
    assert code[16:] == linux.machine.read_virtual(start + 0x1000, 0x2010)


def test_read_virtual_of_nothing(linux: Linux) -> None:
    for gva in (0xFFFF_FFFF_FFFF_F000, 0x8000_0000_0000_0000, 1 << 64, -4096):
        with pytest.raises(BunshinError):
            linux.machine.read_virtual(gva, 8)


def test_stats_count_exits_and_accesses(linux: Linux) -> None:
    before = linux.machine.stats()
    linux.sh("echo 0123456789")
    after = linux.machine.stats()
    for name in ("exits.pio-out", "device.com1.writes", "engine.interrupts"):
        assert after[name] > before[name] > 0
    assert after["device.com1.writes"] - before["device.com1.writes"] >= 10
    assert all(after[name] >= count for name, count in before.items() if not name.startswith("time."))


def test_every_figure_has_its_meaning(linux: Linux) -> None:
    figures = linux.machine.stats()
    known = {name for section in FIGURES.values() for name in section}
    generic = {re.sub(r"^device\..*\.", "device.NAME.", name) for name in figures}
    assert generic <= known
    shown = table(figures)
    assert "others" not in shown
    for name, value in figures.items():
        assert (f"  {name} " in shown) == (value != 0)


def test_the_parts_make_the_whole(linux: Linux) -> None:
    before = linux.machine.stats()
    began = time.monotonic_ns()
    linux.sh("i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; sleep 1")
    after = linux.machine.stats()
    took = time.monotonic_ns() - began
    spent = {name: after[name] - before[name] for name in after if name.startswith("time.")}
    total = spent.pop("time.total_ns")
    assert 0.7 * took < total < 1.1 * took
    assert abs(sum(spent.values()) - total) < 0.2 * total
    assert spent["time.halted_ns"] > 0.8e9
    assert spent["time.guest_code_ns"] > 0
    assert spent["time.devices_ns"] > 0


# Standing still ----------------------------------------------------------------------


def test_pause_and_resume(linux: Linux) -> None:
    machine = linux.machine
    began, up = time.monotonic(), linux.uptime()
    machine.pause()
    paused = time.monotonic()
    assert machine.status == "paused"
    first = code_state(machine)
    time.sleep(0.5)  # not to wait for something: guest time must stand still meanwhile
    assert code_state(machine) == first
    stood = time.monotonic() - paused
    machine.resume()
    assert machine.status == "running"
    ran = linux.uptime() - up
    assert ran < time.monotonic() - began - stood + 0.02
    assert linux.sh("sleep 0.1; echo slept") == "slept\n"


def test_a_paused_machine_takes_input_later(linux: Linux) -> None:
    console = linux.machine.console
    linux.machine.pause()
    linux.machine.pause()
    console.write("echo af''ter # more than the serial port's own buffer holds\n")
    assert console.pending > 0
    assert linux.machine.memory.read(RESERVED, 1)
    linux.machine.resume()
    linux.machine.resume()
    console.expect(r"after\r\n")
    console.expect(PROMPT)


def test_pause_while_it_computes(linux: Linux) -> None:
    linux.machine.console.write("echo bu''sy; while :; do :; done\n")
    linux.machine.console.expect(r"busy\r\n")
    for _ in range(20):
        linux.machine.pause()
        assert code_state(linux.machine) == code_state(linux.machine)
        linux.machine.resume()
    linux.machine.console.write(b"\x03")
    linux.machine.console.expect(PROMPT)


def test_an_idle_guest_costs_next_to_nothing(linux: Linux) -> None:
    linux.sh("sync")
    before = time.process_time()
    time.sleep(2)  # the measured time
    assert time.process_time() - before < 0.3


def test_an_idle_guest_of_512_mib_fits_into_200_mib() -> None:
    done = script(
        """
        from bunshin import Machine
        with Machine(image="tiny", memory="512M") as machine:
            machine.start()
            machine.console.expect("tiny:.*# ")
            machine.console.write("sleep 1; echo id''le\\n")
            machine.console.expect("idle")
            # Not ru_maxrss: that one is inherited from the process that forked.
            print(*(line for line in open("/proc/self/status") if line.startswith("VmHWM")))
        """
    )
    kib = re.search(r"VmHWM:\s+(\d+) kB", done.stdout)
    assert kib, done.stderr
    assert int(kib[1]) <= 200 * 1024


# Devices -----------------------------------------------------------------------------


class Register(Device):
    """One 32-bit register that remembers."""

    mmio = range(0xD000_0000, 0xD000_1000)

    def __init__(self) -> None:
        self.value = 0x1234_5678
        self.writes: list[tuple[int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        return self.value

    def write(self, offset: int, size: int, value: int) -> None:
        self.writes.append((offset, size, value))
        self.value = value


def test_a_device_joins_and_leaves_a_running_machine(linux: Linux) -> None:
    device = Register()
    machine = linux.machine
    assert int(linux.sh("devmem 0xd0000000"), 16) == 0xFFFF_FFFF
    machine.bus.add_mmio(0xD000_0000, 0x1000, device, "register")
    assert int(linux.sh("devmem 0xd0000000"), 16) == 0x1234_5678
    for width, value in ((8, 0xAB), (16, 0xABCD), (32, 0x89AB_CDEF), (64, 0x0123_4567_89AB_CDEF)):
        linux.sh(f"devmem 0xd0000008 {width} {value:#x}")
        assert device.writes[-1] == (8, width // 8, value)
    stats = machine.stats()
    assert (stats["device.register.reads"], stats["device.register.writes"]) == (1, 4)
    machine.bus.remove(device)
    assert int(linux.sh("devmem 0xd0000000"), 16) == 0xFFFF_FFFF


def test_a_device_that_fails_ends_the_run_with_its_name() -> None:
    class Broken(Device):
        mmio = range(0xD000_0000, 0xD000_1000)

        def read(self, offset: int, size: int) -> int:
            raise KeyError("no such register")

    with Machine(image="tiny", devices=[Broken()]) as machine:
        Linux(machine)
        machine.console.write("devmem 0xd0000010\n")
        with pytest.raises(EngineError, match=r"device broken: read\(0x10, 4\).*no such register"):
            machine.wait(60)
        assert machine.status == "ended"
        assert machine.registers["cr0"] & CR0_PG


# Ends --------------------------------------------------------------------------------


def test_the_end_of_the_block_closes_the_machine() -> None:
    before = cpu_threads()
    with Machine(image="tiny") as machine:
        assert machine.status == "built"
        machine.start()
        machine.console.expect(r"\n")
        assert machine.status == "running"
        assert len(cpu_threads() - before) == 1
    assert machine.status == "closed"
    assert cpu_threads() == before
    assert machine.wait() == Outcome("stopped", "stop was called")


def test_an_exception_in_the_block_closes_the_machine_and_goes_on() -> None:
    before = cpu_threads()
    with pytest.raises(ZeroDivisionError), Machine(image="tiny") as machine:
        machine.start()
        machine.console.expect(r"\n")
        raise ZeroDivisionError
    assert machine.status == "closed"
    assert cpu_threads() == before


def test_a_closed_machine_says_so(tiny: dict[str, str]) -> None:
    with Machine(image="tiny") as machine:
        machine.start()
        machine.console.expect(r"\n")
    uses: list[Callable[[], object]] = [
        machine.start,
        machine.run,
        machine.pause,
        machine.resume,
        lambda: machine.registers,
        lambda: machine.read_virtual(0xFFFF_FFFF_8100_0000, 8),
        lambda: machine.memory.read(0, 1),
        lambda: machine.memory.write(0, b"x"),
    ]
    for use in uses:
        with pytest.raises(ConfigError, match=r"closed|ended"):
            use()
    with pytest.raises(Timeout, match="ended"):
        machine.console.expect("never")
    assert machine.stats()["exits.pio-out"] > 0
    for again in (machine.stop, machine.close, machine.press_power_button):
        again()
    machine.console.write("nobody listens")


def test_a_machine_that_was_never_started_says_so() -> None:
    with Machine(image="tiny") as machine:
        uses: list[Callable[[], object]] = [
            machine.wait,
            machine.pause,
            machine.resume,
            lambda: machine.registers,
        ]
        for use in uses:
            with pytest.raises(ConfigError, match="started|built"):
                use()
        machine.memory.write(0x1000, b"before the start")
        assert machine.memory.read(0x1000, 6) == b"before"


def test_start_twice(linux: Linux) -> None:
    with pytest.raises(ConfigError, match="was started"):
        linux.machine.start()


def test_power_off() -> None:
    pieces: list[bytes] = []
    with Machine(image="tiny", console=pieces.append) as machine:
        Linux(machine)
        machine.console.write("exit\n")
        with pytest.raises(Timeout, match="power-off"):
            machine.console.expect("never", timeout=None)
        assert machine.wait() == Outcome("power-off", "the guest entered ACPI state S5")
        assert re.search(rb"Linux \S+ on tiny, made by bunshin", b"".join(pieces))
        # An ended machine can still be looked at, until it is closed.
        assert machine.registers["cr0"] & CR0_PG
        assert len(machine.memory.read(0, 4096)) == 4096


def test_reset() -> None:
    with Machine(image="tiny") as machine:
        Linux(machine)
        machine.console.write("reboot -f\n")
        assert ended(machine).kind == "reset"


def test_panic() -> None:
    with Machine(image="tiny") as machine:
        Linux(machine)
        machine.console.write("echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger\n")
        outcome = ended(machine)
    assert outcome.kind == "panic"
    assert "Kernel panic - not syncing: sysrq triggered crash" in outcome.detail


def test_timeout() -> None:
    with Machine(image="tiny") as machine:
        outcome = machine.run(timeout=0.2)
        assert outcome.kind == "timeout"
        assert "0.2 s" in outcome.detail
        assert machine.status == "ended"
        assert machine.wait().kind == "stopped"


def test_wait_can_be_asked_again(linux: Linux) -> None:
    assert linux.machine.wait(0).kind == "timeout"
    assert linux.machine.wait(0.01).kind == "timeout"
    assert linux.machine.status == "running"


def test_stop_from_another_thread() -> None:
    with Machine(image="tiny") as machine:
        machine.start()
        machine.console.expect(r"\n")
        stopper = threading.Thread(target=machine.stop)
        stopper.start()
        assert ended(machine).kind == "stopped"
        stopper.join()
        assert machine.status == "ended"


def test_stop_from_a_device() -> None:
    machine: Machine

    class Bell(Device):
        mmio = range(0xD000_0000, 0xD000_1000)

        def write(self, offset: int, size: int, value: int) -> None:
            machine.stop()

    with Machine(image="tiny", devices=[Bell()]) as machine:
        Linux(machine)
        machine.console.write("devmem 0xd0000000 32 1\n")
        assert ended(machine).kind == "stopped"


def test_two_machines_at_once() -> None:
    with Machine(image="tiny") as one, Machine(image="tiny", memory="256M") as two:
        one.start()
        two.start()
        shells = [Linux.__new__(Linux), Linux.__new__(Linux)]
        for shell, machine in zip(shells, (one, two), strict=True):
            machine.console.expect(PROMPT)
            shell.machine, shell._number = machine, itertools.count()
        for shell, name in zip(shells, ("first", "second"), strict=True):
            shell.sh(f"echo {name} > /tmp/name")
        one.pause()
        assert shells[1].sh("cat /tmp/name") == "second\n"
        one.resume()
        assert shells[0].sh("cat /tmp/name") == "first\n"
        totals = [int(shell.sh("head -n 1 /proc/meminfo").split()[1]) for shell in shells]
        assert totals[0] > totals[1] + 200_000
        one.stop()
        assert one.wait().kind == "stopped"
        two.console.write("exit\n")
        assert ended(two).kind == "power-off"


# Whole programs ----------------------------------------------------------------------


def script(text: str, *, interrupt: bytes = b"") -> subprocess.CompletedProcess[str]:
    """Run Python code of its own; with `interrupt`, Ctrl-C once it has printed that line."""
    lines = text.strip("\n").splitlines()
    indent = len(lines[0]) - len(lines[0].lstrip())
    code = "\n".join(line[indent:] for line in lines)
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        seen = b""
        if interrupt:
            assert process.stdout is not None
            seen = process.stdout.readline()
            assert seen.strip() == interrupt
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    text = (seen + out).decode()
    return subprocess.CompletedProcess(command, process.returncode, text, err.decode())


@pytest.mark.parametrize("blocked", ["machine.wait()", "machine.console.expect('never', None)"])
def test_ctrl_c_ends_a_program_that_waits(blocked: str) -> None:
    done = script(
        f"""
        from bunshin import Machine
        try:
            with Machine(image="tiny") as machine:
                machine.start()
                print("waiting", flush=True)
                {blocked}
        except KeyboardInterrupt:
            print("closed:", machine.status)
        """,
        interrupt=b"waiting",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "closed: closed"


def test_a_program_that_forgets_to_close_ends() -> None:
    done = script(
        """
        from bunshin import Machine
        machine = Machine(image="tiny").start()
        machine.console.expect("# ")
        print("over")
        """
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "over\n", "")


def test_machines_leave_no_files_or_memory_behind(tmp_path: Path) -> None:
    def cycle() -> tuple[int, int, int]:
        with Machine(image="tiny") as machine:
            machine.start()
            machine.console.expect(r"\n")
        status = Path("/proc/self/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+)", status)
        assert found
        return len(os.listdir("/proc/self/fd")), threading.active_count(), int(found[1])

    files, threads, resident = cycle()
    for _ in range(3):
        last = cycle()
    assert last[:2] == (files, threads)
    assert last[2] - resident < 30 * 1024
