"""Two executions of one machine, side by side: where do they differ first?

    translated   runs as always, in exact counts      \\  the same kernel, the same devices,
    stepped      runs each instruction by itself       /  the same time, the same interrupts

Devices exist once: the first side's exits are answered by the board and logged, and the
other side must come to the same exits. Time stands still within a quantum and goes on by a
nanosecond for each instruction. docs/design/lockstep.md has the reasons. One processor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .. import boot
from .. import engine as engines
from ..board.small import SmallBoard
from ..bus import Bus
from ..clock import Clock
from ..errors import EngineError
from ..irq import IrqLines
from ..memory import Memory
from .registers import GPRS, code_bits

if TYPE_CHECKING:
    from ..config import MachineConfig

QUANTUM = 1000
"""Instructions between two moments of the scripted time."""
SLEEP_NS, LONG_SLEEP_NS = 50_000, 1_000_000
"""What time goes on by while the processor halts, first and after a while."""
PATIENCE_NS = 5_000_000_000
"""A processor that halts for so long waits for nothing."""
MEMORY_EVERY = 1 << 16
"""Instructions after which all of RAM is compared."""
CHEAP = 3_000_000
"""Instructions that may be run again for every single one of a block."""

Exit = tuple[int, int, int, Any]
State = dict[str, Any]


@dataclass
class Answered:
    """An exit of the guest, what it was answered, and the interrupt lines that this moved."""

    exit: Exit
    reply: int | bytes | None
    lines: list[tuple[int, bool]]


@dataclass
class Log:
    """What came from outside, enough to run it all again."""

    exits: list[Answered] = field(default_factory=list)
    # Lines that moved when time went on, by the time it went on to.
    ticks: dict[int, list[tuple[int, bool]]] = field(default_factory=dict)
    output: bytearray = field(default_factory=bytearray)
    end: tuple[str, str] | None = None


class Apart(Exception):
    """The sides have come to different exits."""


class ScriptedClock(Clock):
    """Guest time as the script has it."""

    def __init__(self) -> None:
        super().__init__()
        self.ns = 0
        self._due: list[tuple[int, int, Any]] = []

    def now_ns(self) -> int:
        return self.ns

    def wall_ns(self) -> int:
        return 1_704_067_200_000_000_000 + self.ns

    def after(self, delay_ns: int, action: Callable[[], None]) -> Any:
        from ..clock import Timer

        timer = Timer(self.ns + max(delay_ns, 0), action)
        self._due.append((timer.due_ns, len(self._due), timer))
        return timer

    def move(self, ns: int) -> None:
        """It is `ns` now: run what is due."""
        self.ns = ns
        for entry in sorted(e for e in self._due if e[0] <= ns):
            self._due.remove(entry)
            if entry[2].action is not None:
                entry[2].action()


class World:
    """The board, as the first side sees it; everything is logged."""

    def __init__(self, native: Any, log: Log) -> None:
        self.log = log
        self._native = native
        self._moved: list[tuple[int, bool]] = []
        self.clock = ScriptedClock()
        self.bus = Bus()
        lines = IrqLines(lambda gsi, level: self._moved.append((gsi, level)))
        self.board = SmallBoard(self.bus, lines, self.clock, log.output.extend, self._ended)

    def _ended(self, kind: str, detail: str) -> None:
        self.log.end = self.log.end or (kind, detail)

    def answer(self, exit: Exit) -> None:
        """Let a device answer; the answer is the log's last."""
        kind, address, size, value = exit
        native, reply = self._native, None
        if kind == native.PIO_OUT:
            self.bus.port_out(address, size, value)
        elif kind == native.PIO_IN:
            reply = self.bus.port_in(address, size, value)
        elif kind == native.MMIO_READ:
            reply = self.bus.mmio_read(address, size)
        elif kind == native.MMIO_WRITE:
            self.bus.mmio_write(address, size, value)
        elif kind == native.HYPERCALL:
            reply = -1000 & 0xFFFF_FFFF_FFFF_FFFF
        self.log.exits.append(Answered(exit, reply, self._take()))

    def move(self, ns: int) -> None:
        """Time goes on."""
        self.clock.move(ns)
        moved = self._take()
        if moved:
            self.log.ticks[ns] = moved

    def _take(self) -> list[tuple[int, bool]]:
        moved, self._moved = self._moved, []
        return moved


class Side:
    """One of the two executions.

    Attributes:
        count: instructions executed.
        end: why it cannot go on: a sentence, or None.
    """

    def __init__(self, name: str, config: MachineConfig, stepped: bool, plant: str | None = None) -> None:
        native = engines.native()
        self.name = name
        self.stepped = stepped
        self._native = native
        self.engine = native.Engine("translator", 1, plant)
        self.engine.set_time(0)
        self.regions: list[Any] = []
        self.memory = Memory(self.engine, self._region, config.memory)
        self.vcpu = self.engine.vcpu(0)
        self.count = 0
        self.end: str | None = None
        self._exits = 0

    def _region(self, length: int) -> Any:
        region = self._native.Region(length)
        self.regions.append(region)
        return region

    def run(self, count: int, log: Log, world: World | None, early: bool = False) -> None:
        """Execute so many instructions; `world` answers what the log has no answer for.

        Raises:
            Apart: it comes to another exit than the log has.
        """
        native = self._native
        self.vcpu.set_debug([], [], self.stepped, True, count, early)
        reply: int | bytes | None = None
        while True:
            exit = self.vcpu.run(reply)
            kind, value = exit[0], exit[3]
            if kind == native.DEBUG:
                break
            if kind in (native.SHUTDOWN, native.FAILED):
                self.end = str(value)
                break
            if self._exits == len(log.exits):
                if world is None:
                    raise Apart(f"{self.name} comes to {tell(exit)}, the other side to no exit")
                world.answer(exit)
            answered = log.exits[self._exits]
            if answered.exit != exit:
                raise Apart(f"{self.name} comes to {tell(exit)}, the other side to {tell(answered.exit)}")
            self._exits += 1
            reply = answered.reply
            self.set_lines(answered.lines)
            if log.end is not None and self._exits == len(log.exits):
                self.end = log.end[1]
                self.vcpu.complete(reply)
                break
        self.count = self.vcpu.executed()

    @property
    def exits(self) -> int:
        """How many it came to."""
        return self._exits

    def set_lines(self, lines: list[tuple[int, bool]]) -> None:
        """Move interrupt lines."""
        for gsi, level in lines:
            self.engine.set_irq(gsi, level)

    def state(self) -> State:
        """Its registers."""
        state: State = self.vcpu.state()
        return state

    def forget_code(self) -> None:
        """Make it translate afresh what it comes to next."""
        state = self.state()
        base = 0 if code_bits(state) == 64 else state["segments"][1]["base"]
        gpa = self.vcpu.translate(state["rip"] + base & 0xFFFF_FFFF_FFFF_FFFF)
        if gpa is not None and self.memory.contains(gpa & ~4095, 4096):
            self.memory.write(gpa & ~4095, self.memory.read(gpa & ~4095, 4096))

    def code(self, state: State) -> str:
        """The instruction that it comes to next, with its address and bytes."""
        ip = state["rip"]
        base = 0 if code_bits(state) == 64 else state["segments"][1]["base"]
        code = b""
        while len(code) < 15:
            at = ip + base + len(code) & 0xFFFF_FFFF_FFFF_FFFF
            gpa = self.vcpu.translate(at)
            size = min(15 - len(code), 4096 - at % 4096)
            if gpa is None or not self.memory.contains(gpa, size):
                break
            code += self.memory.read(gpa, size)
        if not code:
            return f"{ip:#x}: no code there"
        text, length = self._native.disassemble(code, code_bits(state), ip)
        return f"{ip:#x}: {code[:length].hex(' ')}: {text}"


def tell(exit: Exit) -> str:
    """An exit for people."""
    kind, address, size, value = exit
    name = engines_exit_names().get(kind, str(kind))
    return f"{name} {address:#x} size {size}" + ("" if value is None else f" value {value!r}")


def engines_exit_names() -> dict[int, str]:
    """Names of exits by number."""
    from .. import exits

    return exits.by_number(engines.native())


# States -------------------------------------------------------------------------------

# Parts of the XSAVE area by the bit that says that they are in use: offset and length.
_PARTS = {
    1: [(0, 24), (32, 128)],
    2: [(160, 256)],
    4: [(576, 256)],
    32: [(1088, 64)],
    64: [(1152, 512)],
    128: [(1664, 1024)],
}
_NAMES = {
    0: "x87",
    32: "x87",
    160: "xmm",
    576: "upper halves of ymm",
    1088: "opmasks",
    1152: "upper halves of zmm",
    1664: "zmm16 to zmm31",
}


def normal(state: State) -> State:
    """The state with what is the same in the same form."""
    area = bytearray(state["xsave"])
    present = area[512]
    for bit, places in _PARTS.items():
        for at, length in places:
            if not present & bit:
                area[at : at + length] = bytes(len(area[at : at + length]))
                if at == 0:
                    area[0:2] = b"\x7f\x03"
    # Addresses of the last x87 instruction, and the header.
    area[6:24] = bytes(18)
    area[512:576] = bytes(64)
    return {**state, "xsave": bytes(area)}


def differences(a: State, b: State) -> list[tuple[str, str, str]]:
    """`(what, one side's, the other's)` for everything that differs."""
    found = []
    for name, x in normal(a).items():
        y = normal(b)[name]
        if x == y:
            continue
        if name == "gpr":
            found += [
                (GPRS[n], f"{p:#x}", f"{q:#x}") for n, (p, q) in enumerate(zip(x, y, strict=True)) if p != q
            ]
        elif name == "segments":
            names = ("es", "cs", "ss", "ds", "fs", "gs")
            found += [(names[n], str(p), str(q)) for n, (p, q) in enumerate(zip(x, y, strict=True)) if p != q]
        elif name == "msrs":
            found += [
                (f"msr {p[0]:#x}", f"{p[1]:#x}", f"{q[1]:#x}") for p, q in zip(x, y, strict=True) if p != q
            ]
        elif isinstance(x, bytes):
            at = next(n for n in range(len(x)) if x[n] != y[n])
            title = (
                next((t for start, t in sorted(_NAMES.items(), reverse=True) if at >= start), name)
                if name == "xsave"
                else name
            )
            found.append(
                (f"{title}, byte {at:#x} of {name}", x[at : at + 16].hex(" "), y[at : at + 16].hex(" "))
            )
        elif isinstance(x, int) and not isinstance(x, bool):
            found.append((name, f"{x:#x}", f"{y:#x}"))
        else:
            found.append((name, str(x), str(y)))
    return found


# The pair -----------------------------------------------------------------------------


class Pair:
    """Both sides from their first instruction on, up to wherever they agree."""

    def __init__(self, config: MachineConfig, log: Log, plant: str | None, replay: bool) -> None:
        self.log = log
        self.world = None if replay else World(engines.native(), log)
        self.translated = Side("translated", config, stepped=False, plant=plant)
        self.stepped = Side("stepped", config, stepped=True)
        self.sides = (self.translated, self.stepped)
        firmware = World(engines.native(), Log()).board.firmware(1)
        for side in self.sides:
            side.vcpu.set_state(boot.load(config, side.memory.ranges, firmware, side.memory.load))
        self.slept = 0
        self._halted = 0

    @property
    def count(self) -> int:
        """Instructions that both have executed."""
        return self.stepped.count

    @property
    def ended(self) -> str | None:
        """Why it is over."""
        return self.translated.end or self.stepped.end

    def quantum(self, early: bool = False, most: int = QUANTUM) -> None:
        """Run both to the end of the quantum, or less: `most`, or with `early` one block.

        Raises:
            Apart: they came to different exits.
        """
        before = self.translated.count
        left = min(QUANTUM - before % QUANTUM, most)
        self.translated.run(left, self.log, self.world, early)
        target = self.translated.count if early and not self.translated.end else before + left
        self.stepped.run(target - self.stepped.count, self.log, None)
        if self.stepped.exits != self.translated.exits:
            raise Apart(
                f"translated has come to {self.translated.exits} exits, stepped to {self.stepped.exits}"
            )
        if not self.ended:
            self._pass_time(before)

    def _pass_time(self, before: int) -> None:
        if self.count == before:
            # Halted: time goes on without instructions.
            sleep = SLEEP_NS if self._halted < LONG_SLEEP_NS else LONG_SLEEP_NS
            self.slept += sleep
            self._halted += sleep
            if self._halted > PATIENCE_NS:
                for side in self.sides:
                    side.end = "the processor halts, and nothing wakes it"
        elif self.count % QUANTUM == 0:
            self._halted = 0
        else:
            return
        ns = self.count + self.slept
        if self.world is not None:
            self.world.move(ns)
        for side in self.sides:
            side.engine.set_time(ns)
            side.set_lines(self.log.ticks.get(ns, []))

    def compare(self, memory: bool) -> list[tuple[str, str, str]]:
        """What differs now: `(what, translated, stepped)`."""
        a, b = self.translated, self.stepped
        found = []
        if a.end is None and b.end is None and a.count != b.count:
            found.append(("instructions executed", str(a.count), str(b.count)))
        if (a.end is None) != (b.end is None):
            found.append(("end", str(a.end), str(b.end)))
        found += differences(a.state(), b.state())
        if memory:
            found += self._memory()
        return found

    def _memory(self, most: int = 8) -> list[tuple[str, str, str]]:
        found: list[tuple[str, str, str]] = []
        a, b = self.translated, self.stepped
        for (gpa, _), x, y in zip(a.memory.ranges, a.regions, b.regions, strict=True):
            at: int | None = 0
            while len(found) < most and at is not None:
                at = x.difference(y, at)
                if at is not None:
                    at &= ~7
                    values = [bytes(memoryview(r)[at : at + 8]).hex(" ") for r in (x, y)]
                    found.append((f"memory at gpa {gpa + at:#x}", values[0], values[1]))
                    at += 8
        return found

    def close(self) -> None:
        """Let go of memory and engines."""
        if self.world is not None:
            self.world.clock.close()
        for side in self.sides:
            side.memory.close()


@dataclass(frozen=True)
class Shape:
    """In what pieces both run: blocks, or at most so many instructions."""

    early: bool = False
    most: int = QUANTUM

    @classmethod
    def of(cls, grain: int) -> Shape:
        """The shape of a grain, as `run` takes it."""
        return cls(early=grain == 0, most=min(grain, QUANTUM) or QUANTUM)


@dataclass
class Report:
    """How a run in lockstep ended.

    Attributes:
        count: instructions that both executed and agreed on.
        end: why it was over, where they never differed.
        instruction: where they differ first: address, bytes, text.
        whole: the difference needs the block as it was translated; this instruction was
            the last to write what differs.
        found: `(what, translated, stepped)` behind it.
        before: registers before it.
    """

    count: int
    end: str = ""
    instruction: str = ""
    whole: bool = False
    found: list[tuple[str, str, str]] = field(default_factory=list)
    before: State = field(default_factory=dict)
    output: bytes = b""

    @property
    def agreed(self) -> bool:
        """They never differed."""
        return not self.found

    def __str__(self) -> str:
        if self.agreed:
            return f"agreed for {self.count} instructions: {self.end}"
        lines = [f"after {self.count} instructions:", f"  {self.instruction}"]
        if self.whole:
            lines.append("  (of a block that differs only as it was translated before, as a whole)")
        lines += [f"  {what}: translated {a}, stepped {b}" for what, a, b in self.found]
        lines.append("before it:")
        lines += _registers(self.before)
        return "\n".join(lines)


def _registers(state: State) -> Iterator[str]:
    pairs = [*zip(GPRS, state["gpr"], strict=True), ("rip", state["rip"]), ("rflags", state["rflags"])]
    pairs += [(name, state[name]) for name in ("cr0", "cr2", "cr3", "cr4")]
    for at in range(0, len(pairs), 4):
        yield "  " + " ".join(f"{name:>6} {value:016x}" for name, value in pairs[at : at + 4])


def run(
    config: MachineConfig,
    instructions: int,
    plant: str | None = None,
    grain: int = QUANTUM,
    progress: Callable[[int], object] = lambda count: None,
) -> Report:
    """Run a machine in lockstep for so many instructions, or to its end.

    Args:
        grain: registers are compared after so many instructions, at most `QUANTUM`; 0 for
            every block that the translated side executes in one piece. What differs in
            between and is gone again is not seen.
    Raises:
        BunshinError: the kernel cannot be loaded, or an engine fails.
    """
    native = engines.native()
    try:
        return _run(config, instructions, plant, Shape.of(grain), progress)
    except native.EngineError as error:
        raise engines.from_native(error) from error


def _run(
    config: MachineConfig,
    instructions: int,
    plant: str | None,
    shape: Shape,
    progress: Callable[[int], object],
) -> Report:
    log = Log()
    pair = Pair(config, log, plant, replay=False)
    good = 0  # agreed so far, memory included
    try:
        while True:
            differs, compared = False, pair.count // MEMORY_EVERY
            try:
                pair.quantum(shape.early, shape.most)
                last = pair.ended is not None or pair.count >= instructions
                memory = last or pair.count // MEMORY_EVERY != compared
                differs = bool(pair.compare(memory))
                if memory and not differs:
                    good = pair.count
            except Apart:
                differs = True
            progress(pair.count)
            if differs:
                break
            if last:
                end = pair.ended or "that was all that was asked for"
                return Report(pair.count, end, output=bytes(log.output))
    finally:
        pair.close()
    report = Finder(config, log, plant, shape, good).find()
    report.output = bytes(log.output)
    return report


class Finder:
    """Finds the instruction, by running again from the start."""

    def __init__(self, config: MachineConfig, log: Log, plant: str | None, shape: Shape, good: int) -> None:
        self._config, self._log, self._plant = config, log, plant
        self._shape, self._good = shape, good

    def find(self) -> Report:
        """The report of the first difference."""
        quantum = self._quantum()
        start, length, blocks = self._block(quantum)
        cut: int | None
        if start < CHEAP:
            cut = next((n for n in range(1, length) if self._differs(quantum, blocks, n)), length)
        else:
            cut, high = 1, length
            while cut < high:
                middle = (cut + high) // 2
                if self._differs(quantum, blocks, middle):
                    high = middle
                else:
                    cut = middle + 1
        if cut == length and not self._differs(quantum, blocks, length, afresh=True):
            cut = None
        return self._report(quantum, blocks, cut, length)

    def _pair(self, steps: int) -> Pair:
        """Both sides after so many calls of `quantum`."""
        pair = Pair(self._config, self._log, self._plant, replay=True)
        for _ in range(steps):
            pair.quantum(self._shape.early, self._shape.most)
        return pair

    def _quantum(self) -> int:
        """How many calls of `quantum` end in agreement, memory included."""
        pair = Pair(self._config, self._log, self._plant, replay=True)
        steps = 0
        try:
            while pair.ended is None:
                pair.quantum(self._shape.early, self._shape.most)
                if pair.compare(memory=pair.count > self._good):
                    break
                steps += 1
        except Apart:
            pass
        finally:
            pair.close()
        return steps

    def _block(self, quantum: int) -> tuple[int, int, int]:
        """Where the block begins that ends differently: its start, its length in
        instructions, and how many blocks of the quantum come before it.
        """
        pair = self._pair(quantum)
        blocks = 0
        try:
            while True:
                start, step = pair.count, pair.translated.count
                try:
                    pair.quantum(early=True)
                    if pair.compare(memory=True):
                        break
                except Apart:
                    break
                if pair.ended is not None:
                    raise EngineError(
                        "lockstep", "the difference did not come again: something is not repeatable"
                    )
                blocks += 1
            return start, max(pair.translated.vcpu.executed() - step, 1), blocks
        finally:
            pair.close()

    def _at(self, quantum: int, blocks: int) -> Pair:
        pair = self._pair(quantum)
        for _ in range(blocks):
            pair.quantum(early=True)
        return pair

    def _differs(self, quantum: int, blocks: int, n: int, afresh: bool = False) -> bool:
        """Whether the block differs that is cut after `n` instructions, which makes it afresh;
        the whole block is only made so if that is asked for.
        """
        pair = self._at(quantum, blocks)
        try:
            if afresh:
                pair.translated.forget_code()
            pair.quantum(most=n)
            return bool(pair.compare(memory=True))
        except Apart:
            return True
        finally:
            pair.close()

    def _report(self, quantum: int, blocks: int, cut: int | None, length: int) -> Report:
        pair = self._at(quantum, blocks)
        try:
            start = pair.count
            found: list[tuple[str, str, str]] = []
            try:
                if cut is None:
                    pair.quantum(early=True)
                else:
                    if cut == length:
                        pair.translated.forget_code()
                    pair.quantum(most=cut)
            except Apart as apart:
                found.append(("exits", str(apart), ""))
            found += pair.compare(memory=True)
        finally:
            pair.close()
        # The stepped side shows the way to the instruction itself.
        guide = self._at(quantum, blocks)
        try:
            states = [guide.stepped.state()]
            codes = [guide.stepped.code(states[0])]
            for _ in range(1, cut or length):
                guide.stepped.run(1, guide.log, None)
                states.append(guide.stepped.state())
                codes.append(guide.stepped.code(states[-1]))
        except Apart:
            pass  # it went as far as it could
        finally:
            guide.close()
        at = len(states) - 1 if cut is not None else _last_writer(states, found)
        return Report(start + at, "", codes[at], cut is None, found, states[at])


def _last_writer(states: list[State], found: list[tuple[str, str, str]]) -> int:
    """Which instruction wrote last what differs at the end; `states` are those before
    each instruction. The earliest, if several registers differ; else the last one.
    """
    names = {what for what, _, _ in found}
    writers = []
    for register, name in enumerate(GPRS):
        changes = [
            n for n in range(len(states) - 1) if states[n]["gpr"][register] != states[n + 1]["gpr"][register]
        ]
        if name in names and changes:
            writers.append(changes[-1])
    return min(writers, default=len(states) - 1)
