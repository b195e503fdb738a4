"""A machine's life: built, started, paused, resumed, ended, closed.

    built ── start ──> running <── pause / resume ──> paused
                          │
                          └── the guest ends it, or stop ──> ended ── close ──> closed

Each virtual processor has one thread that runs it and answers its exits. Whoever
wants something else of a processor (pause, its registers, the end) leaves word in
`_Cpu`, kicks it, and the thread sees to it between two runs. Ended machines keep
their threads until `close`, so that registers and memory can still be looked at.
"""

from __future__ import annotations

import atexit
import os
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from threading import Condition, RLock, Thread, current_thread
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from . import boot as booting
from . import engine as engines
from . import exits, stats
from .board.small import SmallBoard, attach, check_gsi
from .bus import Bus
from .clock import Clock
from .config import MachineConfig
from .console import REMEMBERED, Console
from .devices import Device
from .errors import BunshinError, ConfigError, EngineError, Timeout
from .irq import IrqLine, IrqLines
from .memory import Memory

if TYPE_CHECKING:
    from ._native import Vcpu

T = TypeVar("T")

DebugListener = Callable[[int, str, int], object]
"""`(cpu, why, gva)` as the exit DEBUG has them; called on the processor's thread."""

_PATIENCE = 1.0
"""Seconds that `stats` waits for a processor held up in a device."""
_NO_HYPERCALL = -1000 & 0xFFFF_FFFF_FFFF_FFFF
"""What an unknown hypercall returns: -ENOSYS of KVM's hypercall interface."""


PERF_MAP = "/tmp/perf-{}.map"
"""Where `perf` looks for the names of a process's code."""

_open: weakref.WeakSet[Machine] = weakref.WeakSet()
"""Machines that were started; closed at exit, since their threads are daemons."""


@atexit.register
def _close_all() -> None:
    for machine in list(_open):
        machine._close(_PATIENCE)


# The threads stay behind in the parent.
os.register_at_fork(after_in_child=_open.clear)


@dataclass(frozen=True)
class Outcome:
    """How a run ended, or that it has not.

    Attributes:
        kind: `power-off`, `reset`, `panic`, `triple-fault`, `failed` (the engine),
            `stopped` (by `stop`), or `timeout` (the machine still runs).
        detail: one sentence for people.
    """

    kind: str
    detail: str = ""


class _Cpu:
    """One virtual processor and its thread's mailbox."""

    def __init__(self, index: int, vcpu: Vcpu) -> None:
        self.index = index
        self.vcpu = vcpu
        self.thread: Thread | None = None
        self.parked = False
        # Stands still while the others may run.
        self.held = False
        # Ticks of the host's time-stamp counter that the guest shall not notice.
        self.skip = 0
        self.calls: list[Callable[[], None]] = []
        self.counts: list[int] = []
        self.stats: dict[str, int] = {}


class Machine:
    """A virtual machine with one kernel to run.

        with Machine(image="tiny") as machine:
            machine.start()
            machine.console.expect("# ")
            machine.console.write("poweroff -f\\n")
            print(machine.wait(60))

    Attributes:
        config: the checked configuration.
        engine_name, engine_reason: which engine runs it, and why.
        engine_warning: what speaks against an engine that was asked for or moved to, or None.
        console: the far end of COM1.
        memory: guest RAM, read and written by gpa.
        bus: ports and MMIO; devices can be added and removed at any time.
        board: the devices that every machine has.
        clock: guest time.
    """

    def __init__(
        self,
        kernel: str | os.PathLike[str] | None = None,
        initrd: str | os.PathLike[str] | None = None,
        append: str | None = None,
        memory: str | int = "512M",
        engine: str = "auto",
        cpus: int = 1,
        image: str | None = None,
        devices: Iterable[Device] = (),
        console: Any = None,
        boot: str = "auto",
        perf_map: bool | str | os.PathLike[str] = False,
        movable: bool = False,
    ) -> None:
        """Build a machine; nothing runs before `start`.

        Args:
            kernel: a bzImage or an ELF kernel.
            initrd: an initramfs.
            append: the kernel command line, `console=ttyS0` unless given; with an image
                it is added to the image's own.
            memory: such as `512M` or `1G`; a bare number is MiB.
            engine: `auto`, `kvm`, `translator`, or `direct` (experimental).
            cpus: number of virtual processors, 1 to 64, a host thread each; more of them
                than the host has cores make a guest slower, not faster.
            image: name of an image to boot, such as `tiny`, in place of a kernel.
            devices: your own devices, put where their `ports` and `mmio` say.
            console: a callable or binary file that gets all console output too.
            boot: `auto`, `pvh`, `linux64` or `linux32`.
            perf_map: write /tmp/perf-PID.map, from which Linux's `perf` names translated
                code by guest functions: those that the kernel names itself (True), or those
                of a System.map, a copy of /proc/kallsyms or an ELF file (its path). One map
                serves the whole process.
            movable: tell the guest only of what all engines of this host keep, so that
                `switch_engine` can move it; one that begins in KVM always is.
        Raises:
            ConfigError: one sentence that names the option.
            ImageError: the image cannot be had.
            EngineError: the host lacks memory or what the engine needs.
        """
        self._closed = False
        self._threads: list[_Cpu] = []
        self._final: dict[str, int] | None = None
        self.engine_name, self.engine_reason, self.engine_warning = engines.choose(engine)
        if image is not None:
            kernel, initrd, append = _from_image(image, kernel, initrd, append, memory, cpus, boot)
        self.config = MachineConfig.check(
            kernel=kernel,
            initrd=initrd,
            append="console=ttyS0" if append is None else append,
            memory=memory,
            cpus=cpus,
            engine=engine,
            boot=boot,
        )
        self._native = engines.native()
        if perf_map is not False:
            self._map_for_perf(perf_map)
        self._lock = Condition(RLock())
        self._state = "built"
        self._outcome: Outcome | None = None
        self._error: BaseException | None = None
        # True whenever a processor's thread must look up from its loop.
        self._attention = False
        self._paused_at = 0
        self._on_debug: DebugListener | None = None
        self._engine = engines.create(self.engine_name, self.config.cpus, movable)
        self.clock = Clock(self._failed)
        try:
            with engines.native_errors():
                self.memory = Memory(self._engine, self._native.Region, self.config.memory)
                self._threads = [_Cpu(index, self._engine.vcpu(index)) for index in range(self.config.cpus)]
            self._dispatch = self._native.Dispatch()
            self.bus = Bus()
            self.bus.serve_by(self._dispatch)
            self._lines = IrqLines(self._engine.set_irq)
            self.console = Console(self._type, lambda: self.board.com1.waiting, console)
            self.board = SmallBoard(
                self.bus,
                self._lines,
                self.clock,
                self.console.feed,
                self._guest_ended,
                self._gate_a20,
            )
            attach(devices, self.bus, self._lines)
        except BaseException:
            self.clock.close()
            raise

    def __enter__(self) -> Machine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def start(self, paused: bool = False) -> Machine:
        """Load the kernel and let the processors run, or with `paused` wait for `resume`.

        Raises:
            ImageError: a file that cannot be read or is not what it should be.
            ConfigError: something does not fit, or the machine was started before.
        """
        with self._lock:
            if self._state != "built" or self._closed:
                raise ConfigError("machine-state", "start: this machine was started or closed")
            with engines.native_errors():
                state = booting.load(
                    self.config,
                    self.memory.ranges,
                    self.board.firmware(self.config.cpus),
                    self.memory.load,
                )
                self._threads[0].vcpu.set_state(state)
            self._state = "paused" if paused else "running"
            self._attention = paused
            _open.add(self)
            if paused:
                self._paused_at = self._engine.host_tsc()
            else:
                self.clock.resume()
            for cpu in self._threads:
                name = f"bunshin-cpu{cpu.index}"
                cpu.thread = Thread(target=self._run, args=(cpu,), name=name, daemon=True)
                cpu.thread.start()
        return self

    def wait(self, timeout: float | None = None) -> Outcome:
        """Wait until the run has ended, at most `timeout` seconds.

        Returns:
            How it ended; `Outcome("timeout")` when it has not.
        Raises:
            BunshinError: a device failed, or the engine did.
            ConfigError: the machine was never started.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            if self._state == "built":
                raise ConfigError("machine-state", "wait: this machine was not started")
            while self._outcome is None:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return Outcome("timeout", f"the machine still runs after {timeout} s")
                self._lock.wait(left)
            if self._error is not None:
                raise self._error
            return self._outcome

    def run(self, timeout: float | None = None) -> Outcome:
        """`start`, `wait` and, if it still runs, `stop`."""
        self.start()
        outcome = self.wait(timeout)
        if outcome.kind == "timeout":
            self.stop()
        return outcome

    def pause(self) -> None:
        """Stop all processors and guest time; returns when they stand.

        Raises:
            ConfigError: the machine is not running.
        """
        with self._lock:
            if self._state == "paused":
                return
            if self._state != "running":
                raise ConfigError("machine-state", f"pause: this machine is {self._state}")
            self._not_from_inside("pause")
            self._stand("paused")
            self._paused_at = self._engine.host_tsc()
            self.clock.pause()

    def resume(self) -> None:
        """Let a paused machine run on.

        Raises:
            ConfigError: the machine is not paused.
        """
        with self._lock:
            if self._state == "running":
                return
            if self._state != "paused":
                raise ConfigError("machine-state", f"resume: this machine is {self._state}")
            # The same for all, so that their counters agree as before.
            lost = self._engine.host_tsc() - self._paused_at
            for cpu in self._threads:
                cpu.skip += lost
            self.clock.resume()
            self._state = "running"
            self._attention = self._wanted()
            self._lock.notify_all()

    def switch_engine(self, name: str) -> None:
        """Let another engine run the machine; returns when it does.

        Registers, interrupt controllers and clocks go over, memory and devices stay. It
        takes some milliseconds; the guest's time goes on meanwhile.

        Args:
            name: `kvm`, `translator` or `auto`; nothing happens where that is the engine.
        Raises:
            ConfigError: no such engine, or the machine has ended.
            EngineError: this host does not have that engine, or it cannot keep what the
                guest was told of its processor (see `movable`). The machine goes on as
                it was.
        """
        name, _, warning = engines.choose(name)
        with self._lock:
            if self._closed or self._state not in ("built", "running", "paused"):
                raise ConfigError("machine-state", f"switch_engine: this machine is {self.status}")
            self._not_from_inside("switch_engine")
            running = self._state == "running"
            if running:
                self._stand("switching")
                if self._state != "switching":
                    raise ConfigError("machine-state", f"switch_engine: this machine is {self.status}")
            try:
                with engines.native_errors():
                    self._engine.switch(name)
                self.engine_name, self.engine_reason = name, "the machine was moved to it"
                self.engine_warning = warning
            finally:
                if running:
                    self._state = "running"
                    self._attention = self._wanted()
                    self._lock.notify_all()

    def _not_from_inside(self, call: str) -> None:
        if any(cpu.thread is current_thread() for cpu in self._threads):
            raise ConfigError("machine-state", f"{call}: called by a device of this machine")

    def _stand(self, state: str) -> None:
        """Go over to `state` and wait until all processors stand; the lock is held."""
        self._state = state
        self._wake()
        while not all(cpu.parked for cpu in self._threads):
            self._lock.wait()

    def stop(self) -> None:
        """End the run; any thread, any number of times. `close` lets go of the rest."""
        self._end("stopped", "stop was called")

    def close(self) -> None:
        """End the run and let go of threads, memory and engine."""
        self._close(None)

    def _close(self, patience: float | None) -> None:
        self.stop()
        with self._lock:
            self._closed = True
            self._wake()
        for cpu in self._threads:
            if cpu.thread is not None and cpu.thread is not current_thread():
                cpu.thread.join(patience)
        self.clock.close()
        _open.discard(self)
        if self._final is None:
            self._final = self._count()
            self._lines.disconnect()
            self.memory.close()
            self._threads = []
            del self._engine

    @property
    def status(self) -> str:
        """`built`, `running`, `paused`, `switching` (a moment), `ended` or `closed`."""
        return "closed" if self._closed else self._state

    @property
    def registers(self) -> dict[str, Any]:
        """The first processor's state, the fields of CpuState by name."""
        return self.cpu_registers(0)

    def cpu_registers(self, cpu: int) -> dict[str, Any]:
        """The state of processor `cpu`; a running one stands still for the copy."""
        return self.on_cpu(cpu, lambda vcpu: vcpu.state())

    def read_virtual(self, gva: int, length: int, cpu: int = 0) -> bytes:
        """Copy guest memory by the addresses that processor `cpu` uses now.

        Raises:
            ConfigError: part of the range is not mapped, or is not RAM.
        """

        def read(vcpu: Vcpu) -> bytes:
            parts, at, end = [], gva, gva + length
            while at < end:
                size = min(end - at, 4096 - at % 4096)
                gpa = vcpu.translate(at) if 0 <= at < 1 << 64 else None
                if gpa is None:
                    raise ConfigError("not-mapped", f"gva {at:#x} is not mapped")
                parts.append(self.memory.read(gpa, size))
                at += size
            return b"".join(parts)

        return self.on_cpu(cpu, read)

    def debug(self, listener: DebugListener | None) -> None:
        """Tell `listener` what processors stop for by `Vcpu.set_debug`.

        A processor that stops stands still from then on, while the others run, until
        `hold` lets it go. Without a listener it runs on.

        Raises:
            ConfigError: there is a listener already.
        """
        with self._lock:
            if listener is not None and self._on_debug is not None:
                raise ConfigError("debug", "this machine has a debugger already")
            self._on_debug = listener

    def hold(self, cpus: Iterable[int]) -> None:
        """Let these processors stand still while the machine runs, and no others."""
        with self._lock:
            held = set(cpus)
            for cpu in self._threads:
                cpu.held = cpu.index in held
            self._wake()

    def on_cpu(self, index: int, action: Callable[[Vcpu], T], timeout: float | None = None) -> T:
        """Call `action` with processor `index` of the engine, on its thread, while it stands still.

        Raises:
            ConfigError: there is no such processor, or the machine does not live.
            Timeout: the thread was held up in a device for `timeout` seconds.
        """
        if self._state == "built" or self._closed:
            raise ConfigError("machine-state", f"this machine is {self.status}")
        if not 0 <= index < len(self._threads):
            raise ConfigError("cpu", f"cpu {index}: this machine has {len(self._threads)}")
        cpu = self._threads[index]
        done: list[T] = []
        failed: list[BaseException] = []

        def call() -> None:
            try:
                with engines.native_errors():
                    done.append(action(cpu.vcpu))
            except BaseException as error:
                failed.append(error)
            self._lock.notify_all()

        with self._lock:
            if self._closed:
                raise ConfigError("machine-state", "this machine is closed")
            if cpu.thread is current_thread():
                raise ConfigError("machine-state", "called by a device of this machine")
            cpu.calls.append(call)
            self._attention = True
            cpu.vcpu.kick()
            self._lock.notify_all()
            while not done and not failed:
                if self._closed and cpu.parked:
                    raise ConfigError("machine-state", "this machine was closed")
                if not self._lock.wait(timeout) and timeout is not None:
                    raise Timeout("cpu-busy", f"cpu {index} did not answer within {timeout} s")
        if failed:
            raise failed[0]
        return done[0]

    def irq(self, gsi: int) -> IrqLine:
        """A new interrupt line on input `gsi` of the interrupt controller.

        Raises:
            ConfigError: the board has no such input.
        """
        return self._lines.line(check_gsi(gsi))

    def press_power_button(self) -> None:
        """Ask the guest to turn itself off, by ACPI."""
        self.board.pm.press_power_button()

    def stats(self) -> dict[str, int]:
        """Figures by name; `bunshin.stats.FIGURES` says what each means.

        `exits.<kind>` counts exits, `device.<name>.reads` and `.writes` accesses,
        `engine.<name>` is the engine's own, `time.<part>_ns` the time of the parts; all
        summed over the processors. What has not happened may be missing. A closed
        machine still tells its last.
        """
        return self._count() if self._final is None else dict(self._final)

    def _count(self) -> dict[str, int]:
        names = exits.by_number(self._native)
        result: dict[str, int] = {}
        for cpu in self._threads:
            for kind, count in enumerate(cpu.counts):
                if count:
                    key = f"exits.{names.get(kind, str(kind))}"
                    result[key] = result.get(key, 0) + count
        for kind, count in self._dispatch.exits().items():
            if count:
                key = f"exits.{names.get(kind, str(kind))}"
                result[key] = result.get(key, 0) + count
        for name, accesses in self.bus.counts().items():
            for direction, count in zip(("reads", "writes"), accesses, strict=True):
                if count:
                    result[f"device.{name}.{direction}"] = count
        for cpu in self._threads:
            for name, count in self._engine_stats(cpu).items():
                key = name if name.startswith("time.") else f"engine.{name}"
                result[key] = result.get(key, 0) + count
        stats.complete(result)
        return result

    def _engine_stats(self, cpu: _Cpu) -> dict[str, int]:
        """A processor's own counters; its last known ones while it cannot be asked."""

        def ask(vcpu: Vcpu) -> None:
            cpu.stats = vcpu.stats()

        try:
            if cpu.thread is None or self._closed or cpu.thread is current_thread():
                ask(cpu.vcpu)
            elif all(other.thread is not current_thread() for other in self._threads):
                self.on_cpu(cpu.index, ask, _PATIENCE)
        except (self._native.EngineError, BunshinError):
            pass  # busy in a device, or broken
        return cpu.stats

    def _run(self, cpu: _Cpu) -> None:
        """Run one processor until the machine is closed."""
        try:
            self._loop(cpu)
        except BaseException as error:
            self._failed(error)
            self._park(cpu)

    def _loop(self, cpu: _Cpu) -> None:
        native, bus, vcpu = self._native, self.bus, cpu.vcpu
        serve, dispatch, complete = vcpu.serve, self._dispatch, vcpu.complete
        pio_in, pio_out = native.PIO_IN, native.PIO_OUT
        mmio_read, mmio_write = native.MMIO_READ, native.MMIO_WRITE
        port_in, port_out = bus.port_in, bus.port_out
        counts = cpu.counts = [0] * (max(getattr(native, name) for name in exits.NAMES) + 1)
        reply: int | bytes | None = None
        while True:
            exit = None
            if self._attention:
                exit = complete(reply)
                reply = None
                if exit is None and not self._park(cpu):
                    return
            # Plain accesses to devices are answered inside; what comes here is the rest.
            kind, address, size, value = exit or serve(dispatch, reply)
            counts[kind] += 1
            reply = None
            try:
                if kind == pio_out:
                    port_out(address, size, value)
                elif kind == pio_in:
                    reply = port_in(address, size, value)
                elif kind == mmio_read:
                    reply = bus.mmio_read(address, size)
                elif kind == mmio_write:
                    bus.mmio_write(address, size, value)
                elif kind == native.HYPERCALL:
                    reply = _NO_HYPERCALL
                elif kind == native.DEBUG:
                    self._stop_cpu(cpu, value, address)
                elif kind == native.SHUTDOWN:
                    self._end("triple-fault", str(value))
                elif kind == native.FAILED:
                    self._end("failed", str(value))
            except BaseException as error:
                self._failed(error)
                # The state can only be looked at once the exit has its answer.
                reply = bytes(size * value) if kind == pio_in and value > 1 else 0

    def _park(self, cpu: _Cpu) -> bool:
        """Stand still as long as somebody wants it; False when the thread must end."""
        with self._lock:
            while True:
                while cpu.calls:
                    cpu.calls.pop(0)()
                if self._closed:
                    cpu.parked = True
                    self._lock.notify_all()
                    return False
                if self._state == "running" and not cpu.held:
                    if cpu.skip:
                        cpu.vcpu.skip_time(cpu.skip)
                        cpu.skip = 0
                    cpu.parked = False
                    self._attention = self._wanted()
                    return True
                if not cpu.parked:
                    # Once: two that stand still would wake each other for ever.
                    cpu.parked = True
                    self._lock.notify_all()
                self._lock.wait()

    def _wanted(self) -> bool:
        """Whether some processor must still look up from its loop; the lock is held."""
        return any(cpu.calls or (cpu.held and not cpu.parked) for cpu in self._threads)

    def _wake(self) -> None:
        """Make every processor's thread look up; the lock is held."""
        self._attention = True
        for cpu in self._threads:
            if cpu.thread is not None:
                cpu.vcpu.kick()
        self._lock.notify_all()

    def _stop_cpu(self, cpu: _Cpu, why: str, gva: int) -> None:
        with self._lock:
            listener = self._on_debug
            if listener is None:
                return  # it was asked for by somebody who has gone
            cpu.held = True
            self._attention = True
        listener(cpu.index, why, gva)

    def _guest_ended(self, kind: str, detail: str) -> None:
        if kind == "panic":
            # A call trace stands between the message and the end.
            lines = self.console.tail(REMEMBERED).decode("utf-8", "replace").splitlines()
            found = (line for line in reversed(lines) if "Kernel panic - " in line)
            detail = next(found, detail).strip()
        self._end(kind, detail)

    def _failed(self, error: BaseException) -> None:
        if isinstance(error, self._native.EngineError):
            error = engines.from_native(error)
        elif not isinstance(error, BunshinError):
            cause = error
            error = EngineError("internal", f"{type(cause).__name__}: {cause}")
            error.__cause__ = cause
        with self._lock:
            if self._outcome is None:
                self._error = error
            self._end("failed", str(error))

    def _end(self, kind: str, detail: str) -> None:
        with self._lock:
            if self._outcome is None:
                self._outcome = Outcome(kind, detail)
                self._state = "ended"
                self.clock.pause()
                self._wake()
        self.console.end(kind)

    def _map_for_perf(self, symbols: bool | str | os.PathLike[str]) -> None:
        from .boot.symbols import from_file, from_kernel

        if isinstance(symbols, bool):
            names = from_kernel(self.config.kernel)
        else:
            names = from_file(os.fspath(symbols))
        with engines.native_errors():
            self._native.perf_map(PERF_MAP.format(os.getpid()), names)

    def _type(self, data: bytes) -> bool:
        return self.board.com1.push(data)

    def _gate_a20(self, open_: bool) -> None:
        # By way of the machine: the board must not keep a closed engine's memory.
        self._engine.set_a20(open_)


def _from_image(
    name: str,
    kernel: str | os.PathLike[str] | None,
    initrd: str | os.PathLike[str] | None,
    append: str | None,
    memory: str | int,
    cpus: int,
    boot: str,
) -> tuple[str, str | os.PathLike[str] | None, str]:
    if kernel is not None:
        raise ConfigError("kernel-and-image", "image: name an image or a kernel, not both")
    # Everything cheap is checked before an image is built.
    MachineConfig.check(kernel="", memory=memory, cpus=cpus, boot=boot)
    from . import images

    image = images.get(name)
    line = f"{image.append} {append}" if append else image.append
    return image.kernel, image.initrd if initrd is None else initrd, line
