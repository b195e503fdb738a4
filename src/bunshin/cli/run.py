"""`bunshin run`: boot a machine and connect its console to this terminal."""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from . import complain, status
from .attend import ENDED, QUIT, READER_GONE, TERMINAL_CLOSED, TIMEOUT, Output, Waker, attend
from .options import Option, UsageError, Values, Verb, count, one_of, seconds
from .terminal import Terminal

if TYPE_CHECKING:
    from bunshin import Machine
    from bunshin.debug.server import GdbServer

LAST_WORDS = 0.2
"""Seconds that a slow reader gets for output that is left when bunshin ends the machine."""
ENGINES = {"tcg": "translator"}
"""QEMU's words for what we call otherwise."""


def moment(value: str) -> tuple[float, str]:
    """A time and an engine: `5:kvm`, `1.5s:translator`."""
    when, colon, engine = value.rpartition(":")
    if not colon or engine not in ("kvm", "translator"):
        raise ValueError("is not TIME:kvm or TIME:translator, such as 5:kvm")
    return seconds(when), engine


VERB = Verb(
    "run",
    "Boot a machine and connect its serial console to this terminal. IMAGE is a guest that "
    "bunshin builds itself on first use; the default is 'tiny': Debian's cloud kernel with "
    "busybox. With --kernel, boot that instead.",
    operands=("IMAGE",),
    options=(
        Option(
            ("--kernel",),
            "FILE",
            "Boot this Linux kernel: a bzImage, or an uncompressed ELF vmlinux.",
            hidden=("-kernel",),
        ),
        Option(("--initrd",), "FILE", "Give the kernel this initramfs.", hidden=("-initrd",)),
        Option(
            ("--append",),
            "TEXT",
            "The kernel's command line, 'console=ttyS0' unless given; with an IMAGE, words "
            "added to the image's own.",
            hidden=("-append",),
        ),
        Option(
            ("--memory", "-m"),
            "SIZE",
            "Guest memory, such as 512M or 2G; a plain number is MiB. Default 512M.",
        ),
        Option(
            ("--cpus",),
            "N",
            "Virtual processors, at most 64; each is a thread of the host. Default 1.",
            count,
            hidden=("-smp",),
        ),
        Option(
            ("--engine",),
            "NAME",
            "What runs the guest's instructions: 'kvm', 'translator', or 'auto' (the default): "
            "KVM where it runs at the speed of hardware, the translator elsewhere; 'bunshin "
            "doctor' tells. 'direct', an experiment, is the translator with user code run natively.",
            hidden=("-accel",),
        ),
        Option(
            ("--switch-at",),
            "TIME:ENGINE",
            "Move the running guest to 'kvm' or 'translator' after this time; may be given several times.",
            moment,
            many=True,
        ),
        Option(
            ("--console",),
            "WHERE",
            "The serial console: 'stdio' (the default), 'none', or 'file:PATH'.",
        ),
        Option(
            ("--gdb",),
            "WHERE",
            "Serve GDB there: a port of this host, HOST:PORT, or 'unix:PATH'. Whoever can "
            "connect owns the guest. In GDB: 'target remote WHERE'.",
            hidden=("-gdb",),
        ),
        Option(("-s",), None, "Short for '--gdb 1234'."),
        Option(("-S",), None, "Wait for GDB before the first instruction; needs --gdb or -s."),
        Option(
            ("--timeout",),
            "TIME",
            "End the machine after this time: seconds, or 90s, 2m, 1h.",
            seconds,
        ),
        Option(
            ("--stats",),
            "FORMAT",
            "At the end, print on stderr what was translated, missed, dropped and left to "
            "devices, and the time of each part: a 'table' that says what every figure "
            "means, or 'json'.",
            one_of("table", "json"),
            bare="table",
        ),
        Option(
            ("--perf-map",),
            None,
            "Write /tmp/perf-PID.map, so that Linux's 'perf' shows guest functions.",
        ),
        Option(
            ("--symbols",),
            "FILE",
            "Names for --perf-map: a System.map, a copy of the guest's /proc/kallsyms, or an "
            "ELF file; otherwise the kernel's own.",
        ),
    ),
    notes=f"""\
The QEMU spellings -kernel, -initrd, -append, -m, -smp, -accel and -gdb work too.

keys, when stdin is a terminal:
  Ctrl-A x                 end the machine
  Ctrl-A h                 show this list
  Ctrl-A Ctrl-A            send Ctrl-A to the guest
  everything else, Ctrl-C too, goes to the guest
The end of piped input does not end the guest.

{status.explain()}""",
)


ENDINGS = {
    "power-off": status.OK,
    "panic": status.PANIC,
    "reset": status.RESET,
    "triple-fault": status.TRIPLE_FAULT,
    "failed": status.HOST,
    "stopped": status.OK,
}


def main(values: Values) -> int:
    """Run one machine to its end."""
    arguments = machine_arguments(values)
    gdb = gdb_address(values)
    source, target = open_console(values.console or "stdio")
    waker = Waker()
    output = Output(target, waker)
    # Before the machine: the terminal's guard is a fork and must not hold guest RAM.
    terminal = Terminal(source, target)
    machine = server = None
    try:
        from bunshin import Machine

        machine = Machine(console=output.put, **arguments)
        if machine.engine_warning:
            complain(f"warning: {machine.engine_warning}")
        for when, engine in values.switch_at or ():
            machine.clock.after(int(when * 1e9), partial(switch, machine, engine))
        machine.start(paused=gdb is not None)
        if gdb is not None:
            server = open_gdb(machine, gdb, stopped=bool(values.S))
        if terminal.present:
            print("Ctrl-A x ends the machine, Ctrl-A h shows help.", file=sys.stderr, flush=True)
        terminal.enter()
        reason = attend(Typing(machine), machine.wait, terminal, output, waker, source, values.timeout)
        output.drain(LAST_WORDS)
        terminal.restore()
        end_line(output)
        code = explain_end(reason, machine, values.timeout)
        if server is not None and reason == ENDED:
            linger(server)
        if values.stats:
            print_stats(machine.stats(), values.stats)
        return code
    finally:
        terminal.close()
        output.close()
        if machine is not None:
            machine.close()
        if server is not None:
            server.close()
        waker.close()


def switch(machine: Machine, engine: str) -> None:
    """Move the machine; one that stays where it was is told of and runs on."""
    from bunshin.errors import BunshinError

    try:
        machine.switch_engine(engine)
        if machine.engine_warning:
            complain(f"warning: {machine.engine_warning}")
    except BunshinError as error:
        if machine.status == "running":
            complain(f"--switch-at: {error}")


class Typing:
    """The guest's serial console as the attending loop sees it."""

    def __init__(self, machine: Machine) -> None:
        self.write = machine.console.write
        self._port = machine.board.com1

    @property
    def pending(self) -> int:
        """Bytes typed that the guest has not taken yet."""
        return self._port.waiting


def explain_end(reason: str, machine: Machine, timeout: float | None) -> int:
    """Say why it ended, if that needs a word; return the exit status."""
    if reason == QUIT:
        return status.OK
    if reason == TIMEOUT:
        complain(f"timeout: the guest still ran after {timeout:g} s")
        return status.TIMEOUT
    if reason == READER_GONE:
        return status.READER_GONE
    if reason == TERMINAL_CLOSED:
        return status.HANGUP
    outcome = machine.wait(0)
    code = ENDINGS[outcome.kind]
    if code != status.OK:
        complain(f"{outcome.kind}: {outcome.detail}")
    return code


def gdb_address(values: Values) -> str | None:
    """Where GDB is served, if it is."""
    where = values.gdb or ("1234" if values.s else None)
    if values.S and where is None:
        raise UsageError("-S waits for GDB: say where with --gdb or -s")
    if where is not None:
        from bunshin.debug.server import parse_address

        parse_address(where)
    return where


def open_gdb(machine: Machine, where: str, stopped: bool) -> GdbServer:
    """Serve GDB for a machine that was started paused."""
    from bunshin.debug.server import GdbServer

    server = GdbServer(machine, where)
    waits = ", the guest waits" if stopped else ""
    print(f"GDB: target remote {server.address}{waits}", file=sys.stderr, flush=True)
    if not stopped:
        machine.resume()
    return server


def linger(server: GdbServer) -> None:
    """A guest that came to a bad end stays for the debugger that looks at it."""
    if server.attached and server.ended_badly:
        complain("the debugger has the guest until it goes on or leaves")
        server.linger()


def end_line(output: Output) -> None:
    """Leave the shell's prompt a line of its own."""
    if output.was_terminal and output.last != b"\n":
        try:
            os.write(output.fd, b"\n")
        except OSError:
            pass  # the terminal is gone


def print_stats(stats: dict[str, int], form: str) -> None:
    """The figures on stderr: a table, or one line of JSON."""
    if form == "json":
        import json

        print(json.dumps(stats), file=sys.stderr)
        return
    from bunshin.stats import table

    print(table(stats), file=sys.stderr)


def machine_arguments(values: Values) -> dict[str, Any]:
    """What `Machine` is built from, as far as it was said."""
    image = values.operands[0] if values.operands else None
    if values.kernel is not None and image is not None:
        raise UsageError(f"choose one: the image {image!r} or --kernel {values.kernel!r}")
    if values.kernel is None and values.initrd is not None and image is None:
        raise UsageError("--initrd needs --kernel")
    if values.symbols is not None and not values.perf_map:
        raise UsageError("--symbols needs --perf-map")
    engine = values.engine
    names = ("kernel", "initrd", "append", "memory", "cpus")
    arguments = {name: getattr(values, name) for name in names}
    arguments["engine"] = ENGINES.get(engine, engine)
    arguments["image"] = image or ("tiny" if values.kernel is None else None)
    if values.switch_at:
        arguments["movable"] = True
    if values.perf_map:
        arguments["perf_map"] = values.symbols or True
    if values.kernel is not None and values.append is None:
        arguments["append"] = "console=ttyS0"
    return {name: value for name, value in arguments.items() if value is not None}


def open_console(where: str) -> tuple[int | None, int]:
    """File descriptors of the console: input (None for none) and output."""
    kind, _, path = where.partition(":")
    if kind == "file" and path:
        return None, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    if where == "none":
        return None, os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    if where != "stdio":
        raise UsageError(f"--console: {where!r} is not 'stdio', 'none' or 'file:PATH'")
    return (
        0 if _is_open(0) else None,
        1 if _is_open(1) else os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC),
    )


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
