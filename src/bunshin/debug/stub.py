"""GDB's commands: a packet comes in, its answer goes out.

Processors are threads, numbered from 1. All of them stop when one does. While they run,
no packet is answered; `Stub.stopped` and `Stub.interrupted` make the answer that GDB waits
for. Breakpoints of software and of hardware are the same here: neither writes into the
guest.

Spec: "Debugging with GDB", E.2 to E.8. A packet that cannot be understood gets an error
(`E01`), one that nobody here knows an empty answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import monitor
from .packets import LONGEST, from_hex, number
from .registers import Description, Refused, State, code_bits
from .target import NO_INTERRUPTS, NO_TIMERS, Points, Stop, Target

SIGINT, SIGTRAP, SIGSEGV = 2, 5, 11
EINVAL, EFAULT = b"E16", b"E0e"
BAD = b"E01"
MOST_MEMORY = LONGEST // 2 - 16
"""Bytes that one `m` can ask for."""
WATCH_KINDS = {b"2": "write", b"3": "read", b"4": "access"}
ACCESSES = {"write": b"watch", "read": b"rwatch", "access": b"awatch"}


@dataclass
class Running:
    """What a resuming packet asked for: the answer comes later."""

    steps: set[int]
    runs: set[int]


class Gone(Exception):
    """The debugger says goodbye. `answer` is sent first, if it is not None."""

    def __init__(self, answer: bytes | None, kill: bool = False) -> None:
        super().__init__()
        self.answer = answer
        self.kill = kill


class Stub:
    """One debugger's view of a target.

    Attributes:
        points: what it has asked to stop for.
        running: the target runs, and the debugger waits.
        acknowledges: packets are acknowledged with `+`.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.description = Description(target.bits)
        self.points = Points()
        self.running = False
        self.acknowledges = True
        self.physical = False
        self.sstep = 1 | NO_INTERRUPTS | NO_TIMERS
        self._cpu = 0  # of registers and memory (Hg)
        self._resumed = -1  # of `c` and `s` (Hc), -1 for all
        self._why = b"T05thread:1;"
        self._tells_breakpoints = False
        # Stops of several processors at once are told one after the other.
        self._later: list[Stop] = []
        self._going = Running(set(), set())
        self._states: dict[int, State] = {}

    # Events ---------------------------------------------------------------------------

    def stopped(self, stops: list[Stop]) -> bytes:
        """The target stands still because of `stops`: the answer to what resumed it."""
        first, *others = stops
        # A breakpoint is met again, and a step is asked for again; an access is over.
        self._later += [stop for stop in others if stop.why in ACCESSES]
        return self._stand(self._reply(first), first.cpu)

    def interrupted(self) -> bytes:
        """The target stands still because the debugger wanted it."""
        return self._stand(b"T%02xthread:%x;" % (SIGINT, self._cpu + 1), self._cpu)

    def crashed(self, cpu: int = 0) -> bytes:
        """The guest has come to a bad end, and can still be looked at."""
        return self._stand(b"T%02xthread:%x;" % (SIGSEGV, cpu + 1), cpu)

    def _stand(self, reply: bytes, cpu: int) -> bytes:
        self.running = False
        self._cpu = cpu
        self._states.clear()
        self._why = reply
        return reply

    def _reply(self, stop: Stop) -> bytes:
        reply = b"T%02xthread:%x;" % (SIGTRAP, stop.cpu + 1)
        if stop.why in ACCESSES:
            return reply + b"%s:%x;" % (ACCESSES[stop.why], stop.gva)
        if stop.why == "breakpoint" and self._tells_breakpoints:
            return reply + b"swbreak:;"
        return reply

    # Packets --------------------------------------------------------------------------

    def handle(self, packet: bytes) -> bytes | None:
        """Answer a packet; None when the target runs now and the answer comes later.

        Raises:
            Gone: the debugger has detached itself or wants the guest killed.
        """
        try:
            return self._handle(packet)
        except Refused:
            return EINVAL
        except (ValueError, IndexError):
            return BAD

    def _handle(self, packet: bytes) -> bytes | None:
        for name, handler in self._PLAIN.items():
            if packet.startswith(name):
                return handler(self, packet[len(name) :])
        return b""

    def _why_stopped(self, rest: bytes) -> bytes:
        return self._why

    # Registers

    def state(self, cpu: int) -> State:
        """A processor's registers, asked for once between two runs."""
        if cpu not in self._states:
            self._states[cpu] = self.target.state(cpu)
        return self._states[cpu]

    def _change(self, change: Callable[[State], None]) -> bytes:
        state = self.state(self._cpu)
        # Whatever goes wrong: what is kept must be what the processor has.
        del self._states[self._cpu]
        change(state)
        self.target.set_state(self._cpu, state)
        return b"OK"

    def _read_all(self, rest: bytes) -> bytes:
        return self.description.read_all(self.state(self._cpu)).hex().encode()

    def _write_all(self, rest: bytes) -> bytes:
        data = from_hex(rest)
        return self._change(lambda state: self.description.write_all(state, data))

    def _read_one(self, rest: bytes) -> bytes:
        return self.description.read(self.state(self._cpu), number(rest)).hex().encode()

    def _write_one(self, rest: bytes) -> bytes:
        which, _, value = rest.partition(b"=")
        index, data = number(which), from_hex(value)
        return self._change(lambda state: self.description.write(state, index, data))

    # Memory

    def _read_memory(self, rest: bytes) -> bytes:
        address, length = _range(rest)
        if length > MOST_MEMORY:
            return BAD
        data = self.target.read(self._cpu, address, length, self.physical)
        return data.hex().encode() if data or not length else EFAULT

    def _write_memory(self, rest: bytes) -> bytes:
        where, _, text = rest.partition(b":")
        return self._store(where, from_hex(text))

    def _write_binary(self, rest: bytes) -> bytes:
        where, _, data = rest.partition(b":")
        return self._store(where, data)

    def _store(self, where: bytes, data: bytes) -> bytes:
        address, length = _range(where)
        if length != len(data) or address + length > 1 << 64:
            return BAD
        return b"OK" if self.target.write(self._cpu, address, data, self.physical) else EFAULT

    # Breakpoints

    def _insert(self, rest: bytes) -> bytes:
        return self._point(rest, set.add, set.add)

    def _remove(self, rest: bytes) -> bytes:
        return self._point(rest, set.discard, set.discard)

    def _point(
        self,
        rest: bytes,
        one: Callable[[set[int], int], None],
        other: Callable[[set[tuple[int, int, str]], tuple[int, int, str]], None],
    ) -> bytes:
        # Conditions and commands, which may follow, were not offered.
        kind, where = rest[:1], rest[2:].partition(b";")[0]
        if rest[1:2] != b",":
            return BAD
        address, length = _range(where)
        if kind in (b"0", b"1"):
            one(self.points.breakpoints, address)
            return b"OK"
        if kind in WATCH_KINDS:
            if not length or address + length > 1 << 64:
                return BAD
            other(self.points.watchpoints, (address, length, WATCH_KINDS[kind]))
            return b"OK"
        return b""

    # Running

    def _continue(self, rest: bytes) -> bytes | None:
        return self._go_from(rest, step=False)

    def _step(self, rest: bytes) -> bytes | None:
        return self._go_from(rest, step=True)

    def _continue_signal(self, rest: bytes) -> bytes | None:
        # Signals are nothing that a processor could be sent.
        return self._go_from(rest.partition(b";")[2], step=False)

    def _step_signal(self, rest: bytes) -> bytes | None:
        return self._go_from(rest.partition(b";")[2], step=True)

    def _go_from(self, where: bytes, step: bool) -> bytes | None:
        if where:
            address = number(where)
            size = self.description.registers[self.description.program_counter].bits // 8
            data = (address & (1 << 8 * size) - 1).to_bytes(size, "little")
            self._change(lambda state: self.description.write(state, self.description.program_counter, data))
        everyone = set(range(self.target.cpus))
        one = {self._cpu if self._resumed < 0 else self._resumed}
        return self._go(one, everyone - one) if step else self._go(set(), everyone)

    def _actions(self, rest: bytes) -> bytes | None:
        steps: set[int] = set()
        runs: set[int] = set()
        left = set(range(self.target.cpus))
        actions = rest.split(b";")
        if not rest or len(actions) > 4 * self.target.cpus + 4:
            return BAD
        for action in actions:
            what, _, thread = action.partition(b":")
            # The first action that fits a thread is its own.
            who = left & (self._threads(thread) if thread else left)
            left -= who
            if what[:1] in (b"s", b"S"):
                steps |= who
            elif what[:1] in (b"c", b"C"):
                runs |= who
            else:
                return BAD
            if what[:1] in (b"C", b"S"):
                number(what[1:])
            elif len(what) != 1:
                return BAD
        return self._go(steps, runs) if steps or runs else BAD

    def _go(self, steps: set[int], runs: set[int]) -> bytes | None:
        for stop in self._later:
            if stop.cpu in steps | runs:
                self._later.remove(stop)
                return self._stand(self._reply(stop), stop.cpu)
        self._states.clear()
        self.target.resume(steps, runs, self.points, not self.sstep & NO_INTERRUPTS)
        self.running = True
        return None

    # Threads

    def _threads(self, text: bytes) -> set[int]:
        """The processors that a thread number means: `-1` all, `0` any."""
        if text == b"-1":
            return set(range(self.target.cpus))
        thread = number(text)
        if thread == 0:
            return {self._cpu}
        if thread > self.target.cpus:
            raise ValueError(f"there is no thread {thread}")
        return {thread - 1}

    def _choose(self, rest: bytes) -> bytes:
        what, text = rest[:1], rest[1:]
        cpus = self._threads(text)
        if what == b"g":
            self._cpu = min(cpus)
        elif what == b"c":
            self._resumed = min(cpus) if len(cpus) == 1 and text != b"0" else -1
        else:
            return BAD
        return b"OK"

    def _alive(self, rest: bytes) -> bytes:
        self._threads(rest)
        return b"OK"

    def _current(self, rest: bytes) -> bytes:
        return b"QC%x" % (self._cpu + 1)

    def _list(self, rest: bytes) -> bytes:
        return b"m" + b",".join(b"%x" % (cpu + 1) for cpu in range(self.target.cpus))

    def _list_more(self, rest: bytes) -> bytes:
        return b"l"

    def _extra(self, rest: bytes) -> bytes:
        return self._title(min(self._threads(rest))).encode().hex().encode()

    def _title(self, cpu: int) -> str:
        state = self.state(cpu)
        if state.get("waits_for_sipi"):
            doing = "waits to be started"
        elif state["halted"]:
            doing = "halted"
        else:
            ring = 0 if not state["cr0"] & 1 else state["segments"][2]["access"] >> 5 & 3
            doing = f"{'user' if ring == 3 else 'kernel'} code, {code_bits(state)} bits"
        return f"CPU {cpu}, {doing}"

    # Questions

    def _supported(self, rest: bytes) -> bytes:
        self._tells_breakpoints = b"swbreak+" in rest.removeprefix(b":").split(b";")
        return (
            b"PacketSize=%x;QStartNoAckMode+;qXfer:features:read+;qXfer:threads:read+;"
            b"vContSupported+;swbreak+;hwbreak+" % (LONGEST - 16)
        )

    def _no_acknowledgements(self, rest: bytes) -> bytes:
        self.acknowledges = False
        return b"OK"

    def _features(self, rest: bytes) -> bytes:
        annex, _, part = rest.partition(b":")
        if annex != b"target.xml":
            return b"E00"
        return _slice(self.description.xml, part)

    def _thread_list(self, rest: bytes) -> bytes:
        lines = ['<?xml version="1.0"?>', "<threads>"]
        for cpu in range(self.target.cpus):
            lines.append(
                f'<thread id="{cpu + 1:x}" core="{cpu}" name="CPU {cpu}">{self._title(cpu)}</thread>'
            )
        return _slice("\n".join([*lines, "</threads>\n"]).encode(), rest.removeprefix(b":"))

    def _monitor(self, rest: bytes) -> bytes:
        command = from_hex(rest).decode("utf-8", "replace")
        return monitor.run(self, self._cpu, command).encode().hex().encode() or b"OK"

    def _ask_physical(self, rest: bytes) -> bytes:
        return b"1" if self.physical else b"0"

    def _set_physical(self, rest: bytes) -> bytes:
        self.physical = bool(number(rest))
        return b"OK"

    def _ask_step_bits(self, rest: bytes) -> bytes:
        return b"ENABLE=1,NOIRQ=%x,NOTIMER=%x" % (NO_INTERRUPTS, NO_TIMERS)

    def _ask_step(self, rest: bytes) -> bytes:
        return b"0x%x" % self.sstep

    def _set_step(self, rest: bytes) -> bytes:
        self.sstep = number(rest.removeprefix(b"0x"))
        return b"OK"

    # Goodbyes

    def _detach(self, rest: bytes) -> bytes:
        raise Gone(b"OK")

    def _kill(self, rest: bytes) -> bytes:
        raise Gone(None, kill=True)

    def _kill_politely(self, rest: bytes) -> bytes:
        raise Gone(b"OK", kill=True)

    # The first that a packet starts with.
    _PLAIN: dict[bytes, Callable[[Stub, bytes], bytes | None]] = {  # noqa: RUF012
        b"?": _why_stopped,
        b"g": _read_all,
        b"G": _write_all,
        b"p": _read_one,
        b"P": _write_one,
        b"m": _read_memory,
        b"M": _write_memory,
        b"X": _write_binary,
        b"Z": _insert,
        b"z": _remove,
        b"c": _continue,
        b"C": _continue_signal,
        b"s": _step,
        b"S": _step_signal,
        b"vCont?": lambda stub, rest: b"vCont;c;C;s;S",
        b"vCont;": _actions,
        b"H": _choose,
        b"T": _alive,
        b"qCRC:": lambda stub, rest: b"",
        b"qC": _current,
        b"qfThreadInfo": _list,
        b"qsThreadInfo": _list_more,
        b"qThreadExtraInfo,": _extra,
        b"qSupported": _supported,
        b"QStartNoAckMode": _no_acknowledgements,
        b"qXfer:features:read:": _features,
        b"qXfer:threads:read:": _thread_list,
        b"qAttached": lambda stub, rest: b"1",
        b"qRcmd,": _monitor,
        b"qSymbol": lambda stub, rest: b"OK",
        b"qqemu.PhyMemMode": _ask_physical,
        b"Qqemu.PhyMemMode:": _set_physical,
        b"qqemu.sstepbits": _ask_step_bits,
        b"qqemu.sstep": _ask_step,
        b"Qqemu.sstep=": _set_step,
        b"vKill": _kill_politely,
        b"k": _kill,
        b"D": _detach,
    }


def _range(text: bytes) -> tuple[int, int]:
    """`address,length`, both hexadecimal."""
    address, _, length = text.partition(b",")
    return number(address), number(length)


def _slice(data: bytes, text: bytes) -> bytes:
    """A part of a document, behind `m`, or `l` if it is the last."""
    at, length = _range(text)
    part = data[at : at + min(length, MOST_MEMORY)]
    return (b"m" if at + len(part) < len(data) else b"l") + part
