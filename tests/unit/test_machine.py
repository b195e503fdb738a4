from __future__ import annotations

import threading
from collections.abc import Generator
from typing import Any

import pytest

from bunshin import ConfigError, Device, EngineError, ImageError, Machine, Timeout
from bunshin.machine import Outcome

IN, OUT, READ, WRITE, HYPERCALL, SHUTDOWN, FAILED = 0, 1, 2, 3, 4, 7, 8
Program = Generator[Any, Any, None]
POWER_OFF = (OUT, 0x604, 2, 0x2000 | 5 << 10)


def say(text: bytes) -> Program:
    for byte in text:
        status = yield IN, 0x3FD, 1, 1
        assert status & 0x20
        yield OUT, 0x3F8, 1, byte


def hello() -> Program:
    yield from say(b"hello\n")
    yield POWER_OFF


def idle() -> Program:
    yield from say(b"ready")
    yield OUT, 0x3FC, 1, 0x0B


def test_runs_to_power_off(native: Any, kernel: str) -> None:
    native.guests = [hello]
    seen: list[bytes] = []
    with Machine(kernel, console=seen.append) as machine:
        assert machine.status == "built"
        machine.start()
        outcome = machine.wait(10)
        assert outcome == Outcome("power-off", "the guest entered ACPI state S5")
        assert machine.status == "ended"
        assert machine.console.read() == b"hello\n"
        stats = machine.stats()
    assert b"".join(seen) == b"hello\n"
    assert stats["exits.pio-out"] == 7
    assert stats["exits.pio-in"] == 6
    assert stats["device.com1.reads"] == stats["device.com1.writes"] == 6
    assert stats["engine.blocks"] == 7
    assert machine.status == "closed"
    assert machine.stats() == stats
    assert threading.active_count() == 1


def test_run(native: Any, kernel: str) -> None:
    native.guests = [hello]
    with Machine(kernel) as machine:
        assert machine.run(10).kind == "power-off"
    native.guests = [idle]
    with Machine(kernel) as machine:
        assert machine.run(0.05).kind == "timeout"
        assert machine.wait().kind == "stopped"


@pytest.mark.parametrize(
    ("exit", "kind"),
    [
        ((OUT, 0x60C, 1, 1), "reset"),
        ((OUT, 0x64, 1, 0xFE), "reset"),
        ((SHUTDOWN, 0, 0, "page fault at 0x0"), "triple-fault"),
        ((FAILED, 0, 0, "out of code cache"), "failed"),
    ],
)
def test_other_ends(native: Any, kernel: str, exit: Any, kind: str) -> None:
    native.guests = [lambda: (yield exit)]
    with Machine(kernel) as machine:
        outcome = machine.start().wait(10)
    assert outcome.kind == kind
    if isinstance(exit[3], str):
        assert outcome.detail == exit[3]


def test_panic_tells_the_kernels_own_words(native: Any, kernel: str) -> None:
    def guest() -> Program:
        yield from say(b"[    1.2] Kernel panic - not syncing: no init\r\nCPU: 0\r\n")
        events = yield IN, 0x505, 1, 1
        assert events & 1
        yield OUT, 0x505, 1, 1

    native.guests = [guest]
    with Machine(kernel) as machine:
        outcome = machine.start().wait(10)
    assert outcome == Outcome("panic", "[    1.2] Kernel panic - not syncing: no init")


def test_the_console_talks_both_ways(native: Any, kernel: str) -> None:
    def echo() -> Program:
        yield OUT, 0x3FC, 1, 0x0B
        yield from say(b"> ")
        while True:
            status = yield IN, 0x3FD, 1, 1
            if status & 1:
                byte = yield IN, 0x3F8, 1, 1
                yield OUT, 0x3F8, 1, byte
                if byte == ord("!"):
                    yield POWER_OFF

    native.guests = [echo]
    with Machine(kernel) as machine:
        machine.console.write("early ")
        machine.start()
        assert machine.console.expect("> early ", timeout=10)
        machine.console.write("hello!")
        machine.console.expect("hello!", timeout=10)
        assert machine.console.pending == 0
        assert machine.wait(10).kind == "power-off"
        with pytest.raises(Timeout, match="run ended"):
            machine.console.expect("more", timeout=10)


def test_pause_stops_the_guest_and_its_time(native: Any, kernel: str) -> None:
    def counter() -> Program:
        while True:
            yield OUT, 0x80, 1, 0

    native.guests = [counter, counter]
    with Machine(kernel, cpus=2) as machine:
        machine.start()
        native.engines[0].tsc = 1000
        machine.pause()
        assert machine.status == "paused"
        native.engines[0].tsc = 2500
        before, time = machine.stats().get("exits.pio-out", 0), machine.clock.now_ns()
        assert machine.registers["rip"] == 0x100_0040
        assert machine.stats().get("exits.pio-out", 0) == before
        assert machine.clock.now_ns() == time
        machine.pause()
        machine.resume()
        machine.resume()
        while machine.stats().get("exits.pio-out", 0) == before:
            machine.registers  # noqa: B018
        while not all(vcpu.skipped for vcpu in native.vcpus):
            machine.cpu_registers(1)
        skipped = [vcpu.skipped for vcpu in native.vcpus]
        assert skipped == [[1500], [1500]], "the counters stand still too, and go on together"
        machine.pause()
        machine.stop()
        assert machine.wait(10).kind == "stopped"
        assert machine.registers["rip"] == 0x100_0040
        with pytest.raises(ConfigError, match="machine is ended"):
            machine.resume()


def test_registers_and_memory_of_a_sleeping_guest(native: Any, kernel: str) -> None:
    native.guests = [idle]
    with Machine(kernel) as machine:
        machine.start()
        machine.console.expect("ready", timeout=10)
        native.vcpus[0].pages = {0x7F000: 0x300, 0x7F001: 0x310}
        machine.memory.write(0x300FFE, b"ab")
        machine.memory.write(0x310000, b"cd")
        assert machine.read_virtual(0x7F000FFE, 4) == b"abcd"
        with pytest.raises(ConfigError, match="gva 0x7f002000 is not mapped"):
            machine.read_virtual(0x7F001FFE, 4)
        with pytest.raises(ConfigError, match="cpu 1"):
            machine.cpu_registers(1)


def test_a_device_of_ones_own(native: Any, kernel: str) -> None:
    class Adder(Device):
        mmio = range(0xD000_0000, 0xD000_1000)
        ports = range(0x200, 0x202)
        gsi = 5
        total = 0

        def read(self, offset: int, size: int) -> int:
            self.irq.lower()
            return self.total + offset

        def write(self, offset: int, size: int, value: int) -> None:
            self.total += value
            self.irq.raise_()

    answers: list[int] = []

    def guest() -> Program:
        yield WRITE, 0xD000_0000, 4, 40
        answers.append((yield READ, 0xD000_0002, 4, None))
        yield OUT, 0x200, 1, 1
        answers.append((yield IN, 0x201, 1, 1))
        answers.append((yield READ, 0xE000_0000, 2, None))
        answers.append((yield HYPERCALL, 5, 0, None))
        yield POWER_OFF

    native.guests = [guest]
    with Machine(kernel, devices=[Adder()]) as machine:
        assert machine.start().wait(10).kind == "power-off"
    assert answers == [42, 42, 0xFFFF, 2**64 - 1000]
    assert native.engines[0].levels == [(5, True), (5, False)] * 2


@pytest.mark.parametrize(
    ("exit", "call"),
    [
        ((READ, 0xD000_0010, 4, None), r"read\(0x10, 4\)"),
        ((IN, 0x201, 1, 1), r"read\(0x1, 1\)"),
        ((IN, 0x201, 1, 5), r"read\(0x1, 1\)"),
    ],
)
def test_a_broken_device_ends_the_run_with_its_name(native: Any, kernel: str, exit: Any, call: str) -> None:
    class Broken(Device):
        mmio = range(0xD000_0000, 0xD000_1000)
        ports = range(0x200, 0x202)

        def read(self, offset: int, size: int) -> int:
            raise RuntimeError("smoke")

    native.guests = [lambda: (yield exit)]
    with Machine(kernel, devices=[Broken()]) as machine:
        machine.start()
        with pytest.raises(EngineError, match=rf"device broken: {call}.*smoke") as caught:
            machine.wait(10)
        assert isinstance(caught.value.__cause__, RuntimeError)
        assert machine.registers["rip"] == 0x100_0040
        with pytest.raises(Timeout, match="failed"):
            machine.console.expect("login", timeout=10)


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ({}, "neither `ports` nor `mmio`"),
        ({"ports": range(0x3F8, 0x400)}, "overlaps com1"),
        ({"mmio": range(5, 5)}, "not inside"),
        ({"ports": range(0x200, 0x201), "gsi": 24}, "gsi 24 is not one of 0 to 23"),
    ],
)
def test_badly_placed_devices(native: Any, kernel: str, place: Any, sentence: str) -> None:
    device = Device()
    for name, value in place.items():
        setattr(device, name, value)
    with pytest.raises(ConfigError, match=sentence):
        Machine(kernel, devices=[device])


def test_several_processors(native: Any, kernel: str) -> None:
    def second() -> Program:
        yield from say(b"second")
        yield POWER_OFF

    native.guests = [idle, second]
    with Machine(kernel, cpus=2) as machine:
        assert machine.start().wait(10).kind == "power-off"
        assert machine.cpu_registers(1) == {}
    assert threading.active_count() == 1


def test_moving_to_another_engine(native: Any, kernel: str) -> None:
    native.guests = [idle, idle]
    with Machine(kernel, cpus=2, movable=True) as machine:
        machine.switch_engine("kvm")
        machine.start()
        machine.console.expect("ready", timeout=10)
        assert (machine.engine_name, native.engines[0].name) == ("kvm", "kvm")
        machine.switch_engine("translator")
        assert machine.engine_reason == "the machine was moved to it"
        assert machine.status == "running"
        machine.pause()
        machine.switch_engine("kvm")
        assert machine.status == "paused"
        native.engines[0].tsc += 500
        machine.resume()
        for cpu in range(2):
            machine.cpu_registers(cpu)
        assert [vcpu.skipped for vcpu in native.vcpus] == [[500], [500]]
        with pytest.raises(ConfigError, match="'xen' is unknown; there are: auto, kvm"):
            machine.switch_engine("xen")
    with pytest.raises(ConfigError, match="this machine is closed"):
        machine.switch_engine("kvm")


def test_a_refused_move_leaves_the_machine_running(native: Any, kernel: str) -> None:
    native.guests = [idle]
    with Machine(kernel) as machine:
        machine.start()
        machine.console.expect("ready", timeout=10)
        with pytest.raises(EngineError, match="the guest was told of AVX"):
            machine.switch_engine("kvm")
        assert (machine.status, machine.engine_name) == ("running", "translator")
        machine.pause()
        machine.resume()


def test_processors_that_stand_still_do_not_wake_each_other(
    native: Any, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    native.guests = [idle, idle, idle]
    with Machine(kernel, cpus=3) as machine:
        machine.start()
        woken = []
        notify = machine._lock.notify_all

        def count() -> None:
            woken.append(threading.current_thread())
            notify()

        monkeypatch.setattr(machine._lock, "notify_all", count)
        machine.pause()
        for cpu in [0, 1, 2] * 10:
            machine.cpu_registers(cpu)
        # One to ask and one to answer each, and each processor once.
        assert len(woken) <= 2 * 30 + 3 + 1


def test_stop_from_another_thread(native: Any, kernel: str) -> None:
    native.guests = [idle]
    with Machine(kernel) as machine:
        machine.start()
        threading.Timer(0.01, machine.stop).start()
        assert machine.wait(10).kind == "stopped"
        machine.stop()


def test_stats_of_a_sleeping_guest_and_of_a_stuck_one(
    native: Any, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    native.guests = [idle]
    with Machine(kernel) as machine:
        machine.start()
        machine.console.expect("ready", timeout=10)
        assert machine.stats()["engine.blocks"] == 7
    monkeypatch.setattr("bunshin.machine._PATIENCE", 0.01)
    stuck, free = threading.Event(), threading.Event()

    def copy(data: bytes) -> None:
        stuck.set()
        free.wait(10)

    with Machine(kernel, console=copy) as machine:
        machine.start()
        assert stuck.wait(10)
        assert "engine.blocks" not in machine.stats()
        free.set()


def test_wait_without_an_end(native: Any, kernel: str) -> None:
    native.guests = [idle]
    with Machine(kernel) as machine:
        machine.start()
        assert machine.wait(0).kind == "timeout"
        assert machine.wait(0.01).kind == "timeout"


def test_calls_at_the_wrong_time(native: Any, kernel: str) -> None:
    native.guests = [hello]
    machine = Machine(kernel)
    for call in (machine.wait, machine.pause, machine.resume, lambda: machine.registers):
        with pytest.raises(ConfigError):
            call()
    machine.start()
    with pytest.raises(ConfigError, match="was started"):
        machine.start()
    machine.wait(10)
    with pytest.raises(ConfigError):
        machine.pause()
    machine.close()
    machine.close()
    for late in (machine.start, machine.pause, lambda: machine.registers):
        with pytest.raises(ConfigError):
            late()
    assert machine.wait().kind == "power-off"


def test_a_device_cannot_wait_for_its_own_machine(native: Any, kernel: str) -> None:
    class Pauser(Device):
        ports = range(0x200, 0x201)

        def read(self, offset: int, size: int) -> int:
            machine.pause()
            return 0

    native.guests = [lambda: (yield IN, 0x200, 1, 1)]
    with Machine(kernel, devices=[Pauser()]) as machine:
        machine.start()
        with pytest.raises(ConfigError, match="called by a device"):
            machine.wait(10)


def test_interrupt_lines(native: Any, kernel: str) -> None:
    with Machine(kernel) as machine:
        machine.irq(7).pulse()
        with pytest.raises(ConfigError):
            machine.irq(24)
    assert native.engines[0].levels == [(7, True), (7, False)]


def test_power_button(native: Any, kernel: str) -> None:
    def guest() -> Program:
        yield OUT, 0x602, 2, 0x0100
        yield from say(b"ready")

    native.guests = [guest]
    with Machine(kernel) as machine:
        machine.start()
        machine.console.expect("ready", timeout=10)
        machine.press_power_button()
    assert native.engines[0].levels == [(9, True)]


def test_bad_configurations(native: Any, kernel: str) -> None:
    wrongs: list[dict[str, Any]] = [
        {},
        {"kernel": kernel, "image": "tiny"},
        {"kernel": kernel, "memory": "12Q"},
        {"kernel": kernel, "engine": "tcg"},
        {"kernel": kernel, "cpus": 0},
        {"image": "huge"},
        {"image": "tiny", "memory": "1M"},
    ]
    for arguments in wrongs:
        with pytest.raises(ConfigError):
            Machine(**arguments)
    native.refuse = True
    with pytest.raises(EngineError, match="BMI2"):
        Machine(kernel)


def test_a_missing_kernel(native: Any) -> None:
    with Machine("/nonexistent/vmlinuz") as machine:
        with pytest.raises(ImageError, match="kernel /nonexistent/vmlinuz: No such file"):
            machine.start()
        assert machine.status == "built"


def test_closing_without_starting(native: Any, kernel: str) -> None:
    machine = Machine(kernel)
    machine.close()
    with pytest.raises(ConfigError):
        machine.start()


# Under a debugger ---------------------------------------------------------------------

DEBUG = 5
BREAKPOINT = (DEBUG, 0x1234, 0, "breakpoint")


def test_a_machine_that_starts_paused(native: Any, kernel: str) -> None:
    native.guests = [hello]
    with Machine(kernel) as machine:
        machine.start(paused=True)
        assert machine.status == "paused"
        native.engines[-1].tsc = 1000
        assert machine.wait(0.05).kind == "timeout"
        assert machine.console.read() == b""
        # It stands, and can be looked at.
        assert machine.cpu_registers(0)["rip"] is not None
        machine.resume()
        assert machine.wait(10).kind == "power-off"
        assert machine.console.read() == b"hello\n"
    # No time had passed for it.
    assert native.vcpus[-1].skipped == [1000]


def test_a_processor_that_stops_stands_while_others_run(native: Any, kernel: str) -> None:
    turns = threading.Semaphore(0)

    def stops() -> Program:
        yield BREAKPOINT
        yield from say(b"on")
        yield POWER_OFF

    def runs() -> Program:
        while True:
            yield OUT, 0x80, 1, 0
            turns.release()

    native.guests = [stops, runs]
    seen: list[tuple[int, str, int]] = []
    told = threading.Event()

    def listen(cpu: int, why: str, gva: int) -> None:
        seen.append((cpu, why, gva))
        told.set()

    with Machine(kernel, cpus=2) as machine:
        machine.debug(listen)
        with pytest.raises(ConfigError, match="debugger already"):
            machine.debug(listen)
        machine.start()
        assert told.wait(10)
        assert seen == [(0, "breakpoint", 0x1234)]
        while turns.acquire(blocking=False):
            pass
        assert turns.acquire(timeout=10)
        assert machine.console.read() == b""
        machine.pause()
        machine.hold({1})
        machine.resume()
        # Now it is the other way round.
        assert machine.wait(10).kind == "power-off"
        assert machine.console.read() == b"on"


def test_a_processor_that_is_held_does_not_run(native: Any, kernel: str) -> None:
    native.guests = [hello]
    with Machine(kernel) as machine:
        machine.start(paused=True)
        machine.hold({0})
        machine.resume()
        assert machine.wait(0.05).kind == "timeout"
        machine.pause()
        machine.hold(())
        machine.resume()
        assert machine.wait(10).kind == "power-off"


def test_a_stop_that_nobody_asked_for_is_passed_over(native: Any, kernel: str) -> None:
    def guest() -> Program:
        yield BREAKPOINT
        yield from hello()

    native.guests = [guest]
    with Machine(kernel) as machine:
        assert machine.start().wait(10).kind == "power-off"
