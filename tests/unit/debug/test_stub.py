"""GDB's commands, tried on a target without a machine: appendix E of its manual."""

from __future__ import annotations

import re
import xml.etree.ElementTree as tree
from collections.abc import Callable, Collection
from copy import deepcopy
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bunshin.debug.packets import LONGEST
from bunshin.debug.stub import Gone, Stub
from bunshin.debug.target import Points, Stop

RAM = 0x1_0000
VIRTUAL = 0xFFFF_8000_0000_0000
"""Where RAM is mapped; nothing else is."""


class FakeTarget:
    """Some processors, RAM, and a note of what was asked of them."""

    def __init__(self, state: Callable[..., dict[str, Any]], cpus: int, bits: int) -> None:
        self.cpus = cpus
        self.bits = bits
        self.states = [state(bits) for _ in range(cpus)]
        self.ram = bytearray(range(256)) * (RAM // 256)
        self.resumed: list[tuple[set[int], set[int], Points, bool]] = []
        self.refuses = False

    def state(self, cpu: int) -> dict[str, Any]:
        return deepcopy(self.states[cpu])

    def set_state(self, cpu: int, state: dict[str, Any]) -> None:
        if state["cr0"] == 0xBAD:
            raise ValueError("the engine does not like it")
        self.states[cpu] = deepcopy(state)

    def translate(self, cpu: int, gva: int) -> int | None:
        gpa = gva - VIRTUAL
        return gpa if 0 <= gpa < RAM else None

    def read(self, cpu: int, address: int, length: int, physical: bool) -> bytes:
        at = address if physical else self.translate(cpu, address)
        return b"" if at is None or at >= RAM else bytes(self.ram[at : at + length])

    def write(self, cpu: int, address: int, data: bytes, physical: bool) -> bool:
        at = address if physical else self.translate(cpu, address)
        if at is None or at + len(data) > RAM:
            return False
        self.ram[at : at + len(data)] = data
        return True

    def resume(self, steps: Collection[int], runs: Collection[int], points: Points, interrupts: bool) -> None:
        if self.refuses:
            raise ValueError("more than the engine can hold")
        self.resumed.append((set(steps), set(runs), deepcopy(points), interrupts))

    def interrupt(self) -> None:
        pass


class Session:
    """A stub, its target and the answers as text."""

    def __init__(self, state: Callable[..., dict[str, Any]], cpus: int = 1, bits: int = 64) -> None:
        self.target = FakeTarget(state, cpus, bits)
        self.stub = Stub(self.target)

    def __call__(self, packet: str | bytes) -> str | None:
        answer = self.stub.handle(packet.encode() if isinstance(packet, str) else packet)
        return None if answer is None else answer.decode("latin-1")

    @property
    def resumed(self) -> tuple[set[int], set[int], Points, bool]:
        """What ran last."""
        assert self.stub.running
        return self.target.resumed[-1]


@pytest.fixture
def gdb(processor: Callable[..., dict[str, Any]]) -> Session:
    """One processor."""
    return Session(processor)


@pytest.fixture
def two(processor: Callable[..., dict[str, Any]]) -> Session:
    """Two processors."""
    return Session(processor, cpus=2)


def test_what_nobody_knows_gets_an_empty_answer(gdb: Session) -> None:
    for packet in (
        "",
        "!",
        "vMustReplyEmpty",
        "qTStatus",
        "qCRC:0,10",
        "Zfoo",
        "b",
        "R00",
        "vFile:open",
        "~",
    ):
        assert gdb(packet) in {"", "E01"}, packet
    assert gdb("vMustReplyEmpty") == ""
    assert gdb("qCRC:0,10") == ""


def test_how_it_begins(gdb: Session) -> None:
    answer = gdb("qSupported:multiprocess+;swbreak+;xmlRegisters=i386")
    assert answer is not None
    features = dict(word.partition("=")[::2] for word in answer.split(";"))
    assert int(features["PacketSize"], 16) <= LONGEST
    assert {"qXfer:features:read+", "QStartNoAckMode+", "vContSupported+"} <= features.keys()
    assert gdb("?") == "T05thread:1;"
    assert gdb("qAttached") == "1"
    assert gdb("vCont?") == "vCont;c;C;s;S"
    assert gdb.stub.acknowledges
    assert gdb("QStartNoAckMode") == "OK"
    assert not gdb.stub.acknowledges


def test_registers(gdb: Session) -> None:
    state = gdb.target.states[0]
    everything = gdb("g")
    assert everything is not None
    assert len(everything) == 2 * gdb.stub.description.length
    assert everything[:16] == state["gpr"][0].to_bytes(8, "little").hex()
    assert gdb("p10") == state["rip"].to_bytes(8, "little").hex()
    assert gdb("P10=8877665544332211") == "OK"
    assert gdb.target.states[0]["rip"] == 0x1122_3344_5566_7788
    assert gdb("G" + everything) == "OK"
    assert gdb.target.states[0]["rip"] == 0xFFFF_FFFF_8100_0000
    assert gdb("g") == everything


def test_registers_that_are_none(gdb: Session) -> None:
    for packet in ("p", "pzz", "p1000", "P0", "P0=00", "P1000=00", "G00", "Gxx", "P0=xx"):
        assert gdb(packet) in {"E01", "E16"}, packet
    names = [register.name for register in gdb.stub.description.registers]
    cr0 = names.index("cr0")
    assert gdb(f"P{cr0:x}=ad0b000000000000") == "E01"
    # What the processor did not take is not shown either.
    assert gdb(f"p{cr0:x}") == gdb.target.states[0]["cr0"].to_bytes(8, "little").hex()


def test_memory(gdb: Session) -> None:
    assert gdb(f"m{VIRTUAL + 0x10:x},4") == "10111213"
    assert gdb(f"M{VIRTUAL:x},2:abcd") == "OK"
    assert gdb(b"X%x,3:\x01\x02\x03" % (VIRTUAL + 8)) == "OK"
    assert gdb(f"X{VIRTUAL:x},0:") == "OK"
    assert gdb.target.ram[:12].hex() == "abcd0203040506070102030b"
    # What can be read of a range that goes too far, and nothing of one outside.
    assert gdb(f"m{VIRTUAL + RAM - 2:x},8") == "feff"
    assert gdb("m0,8") == "E0e"
    assert gdb("M0,1:00") == "E0e"
    for packet in (
        "m",
        "m0",
        "m0,",
        "m,1",
        "m0,fffffff",
        "M0,2:00",
        "M0,1:0",
        "M0,1",
        "X0,1:",
        "mffffffffffffffff0,1",
    ):
        assert gdb(packet) == "E01", packet


def test_physical_memory(gdb: Session) -> None:
    assert gdb("qqemu.PhyMemMode") == "0"
    assert gdb("Qqemu.PhyMemMode:1") == "OK"
    assert gdb("qqemu.PhyMemMode") == "1"
    assert gdb("m20,2") == "2021"
    assert gdb(f"m{VIRTUAL:x},2") == "E0e"
    assert gdb("Qqemu.PhyMemMode:0") == "OK"
    assert gdb("m20,2") == "E0e"


def test_breakpoints_and_watchpoints(gdb: Session) -> None:
    for packet in ("Z0,1000,1", "Z1,2000,1", "Z2,3000,8", "Z3,4000,1", "Z4,5000,100", "z1,2000,1", "z0,77,1"):
        assert gdb(packet) == "OK", packet
    assert gdb("c") is None
    steps, runs, points, interrupts = gdb.resumed
    assert (steps, runs, interrupts) == (set(), {0}, False)
    assert points.breakpoints == {0x1000}
    assert points.watchpoints == {(0x3000, 8, "write"), (0x4000, 1, "read"), (0x5000, 0x100, "access")}
    for packet in ("Z0", "Z0,", "Z0,1", "Z2,1,0", "Z2,ffffffffffffffff,2", "Z0;1,1", "Zq,1,1"):
        assert gdb(packet) in {"E01", ""}, packet
    assert gdb("Z5,1,1") == ""


def test_conditions_that_were_not_offered_are_left_out(gdb: Session) -> None:
    assert gdb("Z0,1000,1;X1,22") == "OK"
    assert gdb.stub.points.breakpoints == {0x1000}


def test_the_engine_may_refuse(gdb: Session) -> None:
    gdb.target.refuses = True
    assert gdb("c") == "E01"
    assert not gdb.stub.running


def test_stops(gdb: Session) -> None:
    gdb("c")
    assert gdb.stub.stopped([Stop(0, "breakpoint", 0x1000)]) == b"T05thread:1;"
    gdb("qSupported:swbreak+;hwbreak+")
    gdb("c")
    assert gdb.stub.stopped([Stop(0, "breakpoint", 0x1000)]) == b"T05thread:1;swbreak:;"
    for why, word in (("write", "watch"), ("read", "rwatch"), ("access", "awatch")):
        gdb("c")
        assert gdb.stub.stopped([Stop(0, why, 0xABC)]) == f"T05thread:1;{word}:abc;".encode()
    gdb("s")
    assert gdb.stub.stopped([Stop(0, "step")]) == b"T05thread:1;"
    gdb("c")
    assert gdb.stub.interrupted() == b"T02thread:1;"
    assert gdb("?") == "T02thread:1;"
    gdb("c")
    assert gdb.stub.crashed() == b"T0bthread:1;"


def test_going_on_elsewhere(gdb: Session) -> None:
    assert gdb("c1234") is None
    assert gdb.target.states[0]["rip"] == 0x1234
    gdb.stub.interrupted()
    assert gdb("s1235") is None
    assert gdb.target.states[0]["rip"] == 0x1235
    gdb.stub.interrupted()
    assert gdb("C05;1236") is None
    assert gdb.target.states[0]["rip"] == 0x1236
    gdb.stub.interrupted()
    assert gdb("cxyz") == "E01"


def test_stepping_with_interrupts(gdb: Session) -> None:
    assert gdb("qqemu.sstepbits") == "ENABLE=1,NOIRQ=2,NOTIMER=4"
    assert gdb("qqemu.sstep") == "0x7"
    assert gdb("Qqemu.sstep=5") == "OK"
    gdb("s")
    assert gdb.resumed[3]


def test_threads(two: Session) -> None:
    two.target.states[1].update(halted=True, gpr=[0x55] * 16)
    two.target.states[0]["halted"] = False
    assert two("qfThreadInfo") == "m1,2"
    assert two("qsThreadInfo") == "l"
    assert two("qC") == "QC1"
    assert two("T2") == "OK"
    for packet in ("T3", "Hg3", "Hx1", "H", "Hg", "T", "qThreadExtraInfo,3", "T-2"):
        assert two(packet) == "E01", packet
    titles = [bytes.fromhex(two(f"qThreadExtraInfo,{n}") or "").decode() for n in (1, 2)]
    assert titles == ["CPU 0, kernel code, 64 bits", "CPU 1, halted"]
    assert two("Hg2") == "OK"
    assert two("p0") == "5500000000000000"
    assert two("Hg0") == "OK"
    assert two("qC") == "QC2"
    assert two("Hg-1") == "OK"
    listed = two("qXfer:threads:read::0,fff")
    assert listed is not None
    root = tree.fromstring(listed[1:])
    assert [(t.get("id"), t.get("name"), t.text) for t in root] == [
        ("1", "CPU 0", "CPU 0, kernel code, 64 bits"),
        ("2", "CPU 1", "CPU 1, halted"),
    ]


@pytest.mark.parametrize(
    ("actions", "steps", "runs"),
    [
        ("c", set(), {0, 1}),
        ("s:1;c", {0}, {1}),
        ("s:2", {1}, set()),
        ("c:2", set(), {1}),
        ("s:1;s:2", {0, 1}, set()),
        ("c:1;s:1;s:2", {1}, {0}),
        ("C05:1;S05:2", {1}, {0}),
        ("c:-1", set(), {0, 1}),
    ],
)
def test_who_runs(two: Session, actions: str, steps: set[int], runs: set[int]) -> None:
    assert two(f"vCont;{actions}") is None
    assert two.resumed[:2] == (steps, runs)


@pytest.mark.parametrize(
    "actions", ["", ";", "x", "c:3", "cc", "r1,2", "t", "C", "Szz", "c:p1.1", ";".join("c" * 99)]
)
def test_nobody_runs(two: Session, actions: str) -> None:
    assert two(f"vCont;{actions}") == "E01"
    assert not two.stub.running


def test_old_commands_and_their_thread(two: Session) -> None:
    assert two("Hc2") == "OK"
    assert two("s") is None
    assert two.resumed[:2] == ({1}, {0})
    two.stub.interrupted()
    assert two("Hc-1") == "OK"
    assert two("c") is None
    assert two.resumed[:2] == (set(), {0, 1})


def test_several_stops_at_once(two: Session) -> None:
    two("c")
    stops = [Stop(1, "breakpoint", 0x10), Stop(0, "write", 0x20)]
    assert two.stub.stopped(stops) == b"T05thread:2;"
    assert two("qC") == "QC2"
    # Only the second runs: the other's news wait.
    assert two("vCont;s:2") is None
    assert two.stub.stopped([Stop(1, "step")]) == b"T05thread:2;"
    resumed = len(two.target.resumed)
    assert two("c") == "T05thread:1;watch:20;"
    assert len(two.target.resumed) == resumed
    assert two("c") is None


def test_the_description_comes_in_pieces(gdb: Session) -> None:
    whole, at = "", 0
    while True:
        part = gdb(f"qXfer:features:read:target.xml:{at:x},100")
        assert part is not None
        whole += part[1:]
        at += 0x100
        if part[0] == "l":
            break
        assert part[0] == "m"
    assert whole.encode("latin-1") == gdb.stub.description.xml
    assert gdb("qXfer:features:read:other.xml:0,100") == "E00"
    assert gdb("qXfer:features:read:target.xml:") == "E01"
    assert gdb("qXfer:features:read:target.xml:ffffffff,10") == "l"


def test_goodbyes(gdb: Session) -> None:
    for packet, answer, kill in (
        ("D", b"OK", False),
        ("D;1", b"OK", False),
        ("k", None, True),
        ("vKill;1", b"OK", True),
    ):
        with pytest.raises(Gone) as gone:
            gdb(packet)
        assert (gone.value.answer, gone.value.kill) == (answer, kill)


def say(gdb: Session, command: str) -> str:
    answer = gdb("qRcmd," + command.encode().hex())
    assert answer is not None
    return bytes.fromhex(answer).decode()


def test_monitor(two: Session) -> None:
    assert all(word in say(two, "help") for word in ("info", "translate", "gpa", "stepirq"))
    assert say(two, "") == say(two, "help")
    for state in two.target.states:
        state.update(halted=False, ldt=state["segments"][0], tr=state["segments"][1], dr=[0] * 6)
        state.update(gdt={"base": 0x1000, "limit": 0x7F}, idt={"base": 0x2000, "limit": 0xFFF})
    assert re.fullmatch(r"\* CPU 0: running, 64-bit code,.*\n  CPU 1: .*\n", say(two, "info"))
    assert "gdt base 0x1000 limit 0x7f" in say(two, "registers")
    assert say(two, "gpa 0x41 3").split() == ["000000000041", "41", "42", "43", "ABC"]
    assert len(say(two, "gpa 0 100000").splitlines()) == 256
    assert "not RAM" in say(two, "gpa 0xfee00000")
    assert "interrupts are let in" in say(two, "stepirq on")
    assert two("qqemu.sstep") == "0x5"
    assert "interrupts wait" in say(two, "stepirq off")
    assert "no command 'what'" in say(two, "what is this")
    for command in ("gpa", "gpa zz", "translate", "translate 11111111111111111", "stepirq maybe", "gpa -1"):
        assert "monitor help" in say(two, command), command
    assert two("qRcmd,xx") == "E01"


def test_monitor_shows_the_page_tables(gdb: Session) -> None:
    state = gdb.target.states[0]
    state.update(cr0=1 << 31, cr3=0x1000)
    for gpa, entry in ((0x1800, 0x2027), (0x2000, 0x3023), (0x3000, 0x8000_0000_0000_41E3)):
        gdb.target.ram[gpa : gpa + 8] = entry.to_bytes(8, "little")
    lines = say(gdb, f"translate {VIRTUAL + 0x123:x}").splitlines()
    assert lines == [
        "pml4e[0x100] at gpa 0x1800: 0x0000000000002027 present writable user accessed",
        "pdpte[0x0] at gpa 0x2000: 0x0000000000003023 present writable accessed",
        "pde[0x0] at gpa 0x3000: 0x80000000000041e3 present writable accessed dirty large global no-execute",
        "gva 0xffff800000000123 is gpa 0x123",
    ]
    assert say(gdb, "translate 1000").splitlines()[-1] == "gva 0x1000 is not mapped"
    state["cr3"] = 0x8000_0000
    gdb.stub.interrupted()
    assert "is not in RAM" in say(gdb, "translate 0")
    state["cr0"] = 0
    gdb.stub.interrupted()
    assert "paging is off" in say(gdb, "translate 0")


def test_a_32_bit_guest(processor: Callable[..., dict[str, Any]]) -> None:
    gdb = Session(processor, bits=32)
    assert gdb("p8") == "00000081"
    assert gdb("P8=78563412") == "OK"
    assert gdb.target.states[0]["rip"] == 0x1234_5678
    everything = gdb("g")
    assert everything is not None
    assert gdb("G" + everything) == "OK"


WORDS = """
    vCont; vCont? qSupported: qXfer:features:read: qXfer:threads:read: target.xml: qRcmd, qqemu.
    Qqemu.PhyMemMode: Qqemu.sstep= qThreadExtraInfo, vKill; s:1 c:2 -1 10 ffffffffffffffff
    10000000000000000 p1.1
"""
PIECES = [*"?gGpPmMXZzcCsSHTDk!R01,;:=", *WORDS.split(), b"translate 0".hex(), b"gpa 0 10".hex(), "ff" * 40]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(
    st.lists(
        st.lists(st.sampled_from(PIECES).map(str.encode) | st.binary(max_size=6), max_size=8), max_size=12
    )
)
def test_any_packets_at_all(processor: Callable[..., dict[str, Any]], packets: list[list[bytes]]) -> None:
    """Whatever comes is answered, and afterwards the stub still works."""
    gdb = Session(processor, cpus=2)
    for state in gdb.target.states:
        state.update(halted=False)
    for pieces in packets:
        packet = b"".join(pieces)
        try:
            answer = gdb.stub.handle(packet)
        except Gone:
            continue
        if answer is None:
            assert gdb.stub.running
            gdb.stub.interrupted()
        else:
            assert len(answer) < LONGEST
    assert gdb("Hg1") == "OK"
    assert re.fullmatch("[0-9a-f]+", gdb("g") or "")
