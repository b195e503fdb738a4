"""The GDB stub on real machines: a small guest by hand-made packets, and Debian's kernel by
stock GDB.
"""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from struct import pack
from subprocess import CompletedProcess
from typing import Protocol

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bunshin import ConfigError, Machine
from bunshin.boot import symbol_file
from bunshin.debug.packets import Decoder, Packet, encode
from bunshin.debug.server import GdbServer, parse_address

PATIENCE = 60
LOAD, STACK, DATA = 0x10_0000, 0x16_0000, 0x18_0000
LOOP, STORE, CALL, FUNCTION = LOAD + 5, LOAD + 8, LOAD + 16, LOAD + 23
COUNTER = (
    b"\xbc" + pack("<I", STACK)  # mov esp,STACK
    + b"\x48\xff\xc0"  # LOOP: inc rax
    + b"\x48\x89\x04\x25" + pack("<I", DATA)  # STORE: mov [DATA],rax
    + b"\xe8\x02\x00\x00\x00"  # CALL: call FUNCTION
    + b"\xeb\xee"  # jmp LOOP
    + b"\x48\x83\xc3\x02\xc3"  # FUNCTION: add rbx,2; ret
)  # fmt: skip
POWER_OFF = b"\x66\xba\x05\x06\xb0\x34\xee\xeb\xfe"  # mov dx,0x605; mov al,0x34; out dx,al; jmp $
UD2 = b"\x0f\x0b"
RAX, RBX, RSP, RIP = 0, 1, 7, 16


def elf(code: bytes, pvh: bool = False) -> bytes:
    """A kernel of `code` at LOAD, entered in long mode, or with a PVH note in 32-bit mode."""
    note = pack("<III4sI", 4, 4, 18, b"Xen\0", LOAD) if pvh else b""
    at = 64 + 56 * 2
    out = b"\x7fELF\x02\x01\x01" + bytes(9)
    out += pack("<HHIQQQIHHHHHH", 2, 62, 1, LOAD, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    out += pack("<IIQQQQQQ", 4, 4, at, 0, 0, len(note), len(note), 4)
    out += pack("<IIQQQQQQ", 1, 7, at + len(note), LOAD, LOAD, len(code), len(code), 1)
    return out + note + code


class Client:
    """GDB's end of the connection, packet by packet."""

    def __init__(self, server: GdbServer) -> None:
        if server.address.path is not None:
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.connect(server.address.path)
        else:
            self.socket = socket.create_connection((server.address.host, server.address.port))
        self.socket.settimeout(PATIENCE)
        self._decoder = Decoder()
        self._packets: list[bytes] = []

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, packet: str | bytes) -> None:
        self.socket.sendall(encode(packet.encode() if isinstance(packet, str) else packet))

    def receive(self) -> str:
        """The next packet; it is acknowledged."""
        while not self._packets:
            data = self.socket.recv(65536)
            assert data, "the stub has hung up"
            self._packets += [item.data for item in self._decoder.feed(data) if isinstance(item, Packet)]
        self.socket.sendall(b"+")
        return self._packets.pop(0).decode("latin-1")

    def __call__(self, packet: str | bytes) -> str:
        self.send(packet)
        return self.receive()

    def interrupt(self) -> str:
        """Ctrl-C."""
        self.socket.sendall(b"\x03")
        return self.receive()

    def register(self, number: int) -> int:
        return int.from_bytes(bytes.fromhex(self(f"p{number:x}")), "little")

    def set_register(self, number: int, value: int) -> None:
        assert self(f"P{number:x}=" + value.to_bytes(8, "little").hex()) == "OK"

    def gone(self) -> bool:
        """The stub has hung up."""
        return self.socket.recv(1) == b""


class Start(Protocol):
    """Start a guest with a stub."""

    def __call__(
        self, code: bytes, paused: bool = ..., pvh: bool = ..., bits: int | None = ...
    ) -> GdbServer: ...


@pytest.fixture
def guest(tmp_path: Path) -> Iterator[Start]:
    """Guests of a few bytes, each with a stub."""
    open_: list[Machine | GdbServer] = []

    def start(code: bytes, paused: bool = True, pvh: bool = False, bits: int | None = None) -> GdbServer:
        path = tmp_path / f"guest{len(open_)}"
        path.write_bytes(elf(code, pvh))
        machine = Machine(path, memory="32M")
        open_.append(machine)
        machine.start(paused=True)
        server = GdbServer(machine, 0, bits=bits)
        open_.append(server)
        if not paused:
            machine.resume()
        return server

    yield start
    for thing in reversed(open_):
        thing.close()


def counted(server: GdbServer) -> int:
    return int.from_bytes(server.machine.memory.read(DATA, 8), "little")


def runs(server: GdbServer) -> bool:
    """The guest counts on."""
    before, deadline = counted(server), time.monotonic() + PATIENCE
    while counted(server) == before:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)
    return True


@contextmanager
def stands(server: GdbServer) -> Iterator[None]:
    """The guest does not count from the end of this on."""
    yield
    before = counted(server)
    time.sleep(0.05)
    assert counted(server) == before
    assert server.machine.status == "paused"


def free(server: GdbServer) -> None:
    """Wait until the stub has noticed that its debugger is gone."""
    server.linger(PATIENCE)
    assert not server.attached


# A small guest ------------------------------------------------------------------------


def test_a_whole_session(guest: Start) -> None:
    server = guest(COUNTER)
    with Client(server) as client:
        assert client("qSupported:swbreak+").startswith("PacketSize=")
        assert client("?") == "T05thread:1;"
        assert client.register(RIP) == LOAD
        assert client(f"m{LOAD:x},5") == COUNTER[:5].hex()
        assert client(f"Z0,{FUNCTION:x},1") == "OK"
        for turn in (1, 2, 3):
            assert client("c") == "T05thread:1;swbreak:;"
            assert (client.register(RIP), client.register(RAX)) == (FUNCTION, turn)
            # GDB goes over a breakpoint by a step without any.
            assert client(f"z0,{FUNCTION:x},1") == "OK"
            assert client("vCont;s:1") == "T05thread:1;"
            assert client.register(RIP) == FUNCTION + 4
            assert client(f"Z0,{FUNCTION:x},1") == "OK"
        assert client(f"z0,{FUNCTION:x},1") == "OK"
        assert client(f"Z2,{DATA:x},8") == "OK"
        assert client("c") == f"T05thread:1;watch:{DATA:x};"
        assert client.register(RIP) == CALL
        assert client(f"m{DATA:x},8") == (4).to_bytes(8, "little").hex()
        assert client(f"z2,{DATA:x},8") == "OK"
        client.set_register(RAX, 1_000_000)
        client.set_register(RIP, LOOP)
        assert client("vCont;s") == "T05thread:1;"
        assert client.register(RAX) == 1_000_001
        client.send("c")
        assert runs(server)
        with stands(server):
            assert client.interrupt() == "T02thread:1;"
        assert client("D") == "OK"
        assert client.gone()
    assert runs(server)
    assert server.machine.memory.read(LOAD, len(COUNTER)) == COUNTER


def test_breakpoints_and_steps_on_each_engine(guest: Start, each_engine: str) -> None:
    server = guest(COUNTER)
    assert server.machine.engine_name == each_engine
    with Client(server) as client:
        client("qSupported:swbreak+")
        for turn in (1, 2):
            assert client(f"Z0,{FUNCTION:x},1") == "OK"
            assert client("c") == "T05thread:1;swbreak:;"
            assert (client.register(RIP), client.register(RAX)) == (FUNCTION, turn)
            assert client(f"z0,{FUNCTION:x},1") == "OK"
            for place in (FUNCTION + 4, LOAD + 21, LOOP, STORE):
                assert client("s") == "T05thread:1;"
                assert client.register(RIP) == place
        assert client(f"m{DATA:x},8") == (2).to_bytes(8, "little").hex()
        # KVM has four registers for all of them.
        for place in range(5):
            assert client(f"Z1,{LOAD + 0x1000 + place:x},1") == "OK"
        if each_engine == "kvm":
            assert client("c") == "E01"
        for place in range(5):
            assert client(f"z1,{LOAD + 0x1000 + place:x},1") == "OK"
        client.send("c")
        assert runs(server)
        with stands(server):
            assert client.interrupt() == "T02thread:1;"
        client.set_register(RAX, 1_000_000_000)
        client.set_register(RIP, LOOP)
        client.send("c")
        assert runs(server)
        client.interrupt()
        assert client.register(RAX) > 1_000_000_000
        assert client("D") == "OK"
    assert runs(server)


def test_a_running_guest_stops_for_its_debugger(guest: Start) -> None:
    server = guest(COUNTER, paused=False)
    assert runs(server)
    with Client(server) as client:
        with stands(server):
            assert client("?") == "T05thread:1;"
        assert client(f"Z2,{STACK - 8:x},1") == "OK"
        assert client("c") == f"T05thread:1;watch:{STACK - 8:x};"
        assert client.register(RIP) == FUNCTION
        assert client.register(RSP) == STACK - 8


def test_code_that_is_patched(guest: Start) -> None:
    server = guest(COUNTER, paused=False)
    assert runs(server)
    with Client(server) as client:
        # add rbx,2 becomes add rbx,3
        assert client(f"M{FUNCTION + 3:x},1:03") == "OK"
        assert client(f"Z0,{CALL:x},1") == "OK"
        client("c")
        before = client.register(RBX)
        assert client(f"z0,{CALL:x},1") == "OK"
        client("s")
        assert client(f"Z0,{CALL:x},1") == "OK"
        client("c")
        assert client.register(RBX) == before + 3


def test_memory_that_is_none(guest: Start) -> None:
    with Client(guest(COUNTER)) as client:
        assert client("mffff800000000000,8") == "E0e"
        # Mapped, but a device's.
        assert client("mfee00000,4") == "E0e"
        assert client("Mfee00000,4:00000000") == "E0e"
        assert client(f"m{(32 << 20) - 4:x},8") == bytes(4).hex()
        assert client("Qqemu.PhyMemMode:1") == "OK"
        assert client(f"m{LOAD:x},2") == COUNTER[:2].hex()


@pytest.mark.parametrize("stopped", [True, False])
def test_a_debugger_that_vanishes(guest: Start, stopped: bool) -> None:
    server = guest(COUNTER, paused=False)
    with Client(server) as client:
        client(f"Z0,{FUNCTION:x},1")
        client(f"Z2,{DATA:x},8")
        client("c")
        if not stopped:
            client(f"z0,{FUNCTION:x},1")
            client(f"z2,{DATA:x},8")
            client(f"Z2,{DATA + 0x1000:x},8")
            client.send("c")
    free(server)
    assert runs(server)
    # Nothing is left of it, and there may be another.
    with Client(server) as client:
        client.send("c")
        assert runs(server)
        assert client.interrupt() == "T02thread:1;"


def test_a_guest_that_never_ran_waits_for_the_next_debugger(guest: Start) -> None:
    server = guest(COUNTER, paused=True)
    with stands(server):
        with Client(server) as client:
            assert client.register(RIP) == LOAD
        free(server)
    with Client(server) as client:
        assert client.register(RIP) == LOAD
        client.send("c")
        assert runs(server)
    free(server)
    assert runs(server)


def test_a_second_debugger_is_refused(guest: Start) -> None:
    server = guest(COUNTER)
    with Client(server) as first:
        assert first("?") == "T05thread:1;"
        with Client(server) as second:
            assert second.gone()
        assert first.register(RIP) == LOAD
    free(server)
    with Client(server) as third:
        assert third("?") == "T05thread:1;"
    with pytest.raises(ConfigError, match="debugger already"):
        GdbServer(server.machine, 0)


def test_wrong_sums_and_noise(guest: Start) -> None:
    with Client(guest(COUNTER)) as client:
        client.socket.sendall(b"$g#00noise\xff\x00-+")
        assert client("?") == "T05thread:1;"
        # What was asked for again is said again.
        client.socket.sendall(b"-")
        assert client.receive() == "T05thread:1;"
        assert client("QStartNoAckMode") == "OK"
        client.send("?")
        assert client.socket.recv(100) == encode(b"T05thread:1;")


def test_a_packet_without_end_ends_the_connection(guest: Start) -> None:
    server = guest(COUNTER, paused=False)
    with Client(server) as client:
        client("?")
        with pytest.raises(OSError):
            while True:
                client.socket.sendall(b"$" + b"m" * 4096)
    free(server)
    assert runs(server)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(
    st.lists(
        st.binary(max_size=20)
        | st.sampled_from(
            [b"g", b"?", b"vCont;c", b"s", b"vCont;s:1", b"G00", b"Z0,100017,1", b"Z2,180000,8"]
        ),
        max_size=10,
    )
)
def test_whatever_comes_the_guest_lives(one: GdbServer, packets: list[bytes]) -> None:
    with Client(one) as client:
        client("?")
        for packet in packets:
            # Killing it is what these are for.
            if packet[:1] != b"k" and packet[:5] != b"vKill":
                client.send(packet)
    free(one)
    with Client(one) as client:
        client.set_register(RIP, LOAD)
        client.send("c")
        assert runs(one)
        assert client.interrupt() == "T02thread:1;"
        assert client("D") == "OK"
    free(one)


@pytest.fixture
def one(guest: Start) -> GdbServer:
    """A guest that runs."""
    return guest(COUNTER, paused=False)


def test_the_end_of_the_guest(guest: Start) -> None:
    with Client(guest(POWER_OFF)) as client:
        assert client("c") == "W00"
        assert client.gone()


def test_a_bad_end_can_be_looked_at(guest: Start) -> None:
    server = guest(UD2)
    with Client(server) as client:
        assert client("c") == "T0bthread:1;"
        assert server.ended_badly
        assert client.register(RIP) == LOAD
        assert client(f"m{LOAD:x},2") == UD2.hex()
        assert client("s") == "W05"
        assert client.gone()
    server.linger(PATIENCE)
    assert server.machine.wait(0).kind == "triple-fault"


def test_kill(guest: Start) -> None:
    server = guest(COUNTER)
    with Client(server) as client:
        client.send("k")
        assert server.machine.wait(PATIENCE).kind == "stopped"


def test_a_machine_that_is_closed_says_goodbye(guest: Start) -> None:
    server = guest(COUNTER)
    with Client(server) as client:
        client.send("c")
        assert runs(server)
        server.machine.close()
        assert client.receive() == "W00"
        assert client.gone()


def test_a_unix_socket(guest: Start, tmp_path: Path) -> None:
    machine = guest(COUNTER).machine
    machine.debug(None)  # the one that the fixture made
    path = tmp_path / "gdb"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    with GdbServer(machine, f"unix:{path}") as server, Client(server) as client:
        assert path.stat().st_mode & 0o777 == 0o600
        assert client("?") == "T05thread:1;"
    assert not path.exists()


def test_addresses() -> None:
    for text, host, port in (
        ("1234", "localhost", 1234),
        (":1", "localhost", 1),
        ("tcp::1234", "localhost", 1234),
        ("tcp:0.0.0.0:5", "0.0.0.0", 5),
        ("example:99", "example", 99),
        ("[::1]:7", "::1", 7),
    ):
        address = parse_address(text)
        assert (address.host, address.port, address.path) == (host, port, None)
    assert parse_address("unix:/a:b").path == "/a:b"
    for text in ("", "x", "65536", "-1", "host:", "a:b:c", "unix:", "tcp:", "1.5", "²"):
        with pytest.raises(ConfigError, match="gdb"):
            parse_address(text)


def test_a_port_that_is_taken(guest: Start) -> None:
    server = guest(COUNTER)
    server.machine.debug(None)
    with pytest.raises(ConfigError, match="in use"):
        GdbServer(server.machine, server.address.port)
    with pytest.raises(ConfigError, match="machine"):
        GdbServer(Machine(server.machine.config.kernel, memory="32M"), 0)


# Stock GDB ----------------------------------------------------------------------------


class GdbProgram(Protocol):
    def batch(self, commands: str, *words: str, timeout: float = ...) -> str: ...


def test_gdb_on_a_small_guest(guest: Start, gdb: GdbProgram) -> None:
    said = gdb.batch(f"""\
        target remote {guest(COUNTER).address}
        info registers rip cr0 efer
        break *{FUNCTION:#x}
        continue
        x/2i $pc
        stepi
        delete
        watch *(long*){DATA:#x}
        continue
        set var $rax = 41
        set var *(long*){DATA:#x} = 7
        print $rip
        continue
        print $rax
        monitor translate {DATA:#x}
        info threads
        print $st0
        print $xmm1.uint128
        detach
    """)
    assert re.search(r"cr0 .*\[ .*PE.*PG \]", said), said
    assert re.search(r"efer .*LMA", said)
    assert re.search(r"=> 0x100017:\s+add +\$0x2,%rbx\n +0x10001b:\s+ret", said)
    assert "Old value = 1\nNew value = 2" in said
    assert "Old value = 7\nNew value = 42" in said
    assert f"gva {DATA:#x} is gpa {DATA:#x}" in said
    assert re.search(r'\* 1 +Thread 1 "CPU 0" \(CPU 0, kernel code, 64 bits\)', said)
    assert said.rstrip().endswith("detached]")


def test_gdb_on_a_32_bit_guest(guest: Start, gdb: GdbProgram) -> None:
    # inc eax; inc eax; jmp; as 64-bit code these bytes would be prefixes.
    server = guest(b"\x40\x40\xeb\xfc", pvh=True, bits=32)
    said = gdb.batch(f"""\
        target remote {server.address}
        x/3i $pc
        stepi 3
        info registers eip eax cr0
        set var $eax = 0x7fffffff
        stepi
        print $eax
        print $eflags
        detach
    """)
    assert re.search(r"=> 0x100000:\s+inc +%eax\n +0x100001:\s+inc +%eax\n +0x100002:\s+jmp", said), said
    assert re.search(r"eip +0x100000", said)
    assert re.search(r"eax +0x2 ", said)
    assert "= -2147483648" in said
    assert re.search(r"= \[.*SF.*OF.*\]", said)


@pytest.fixture(scope="module")
def symbols(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the kernel of `tiny` knows of itself, as a file for GDB."""
    path = tmp_path_factory.mktemp("symbols") / "vmlinux.sym"
    path.write_bytes(symbol_file.write(tiny["kernel"]))
    return str(path)


def test_symbols_by_command(
    tiny: dict[str, str], symbols: str, tmp_path: Path, command: Callable[..., CompletedProcess[bytes]]
) -> None:
    path = tmp_path / "out.sym"
    done = command("symbols", tiny["kernel"], "--output", str(path))
    assert (done.returncode, done.stdout) == (0, b"")
    assert str(path).encode() in done.stderr
    assert path.read_bytes() == Path(symbols).read_bytes()
    for words, status in (([str(tmp_path / "none")], 6), ([symbols], 6), (["nothing"], 2), (["a", "b"], 2)):
        done = command("symbols", *words, "-o", str(tmp_path / "no"))
        assert done.returncode == status, done.stderr
        assert done.stderr.count(b"\n") == 1
    assert not (tmp_path / "no").exists()


def test_gdb_on_the_kernel(gdb: GdbProgram, symbols: str) -> None:
    """Break by symbol, backtrace, step, finish, watch a variable, continue; two processors."""
    with Machine(image="tiny", cpus=2) as machine:
        machine.start(paused=True)
        with GdbServer(machine, 0) as server:
            said = gdb.batch(
                f"""\
                target remote {server.address}
                break start_kernel
                continue
                backtrace
                info threads
                stepi
                stepi
                info symbol $pc
                break vfs_open
                continue
                echo --bt\\n
                backtrace
                echo --finish\\n
                finish
                delete
                watch *(unsigned long*)&jiffies
                continue
                echo --bt\\n
                backtrace
                continue
                delete
                break do_sys_openat2 if $rdi != 0
                continue
                echo --bt\\n
                backtrace
                info threads
                x/s &linux_banner
                detach
                """,
                symbols,
            )
        machine.console.expect("# ", PATIENCE)
        machine.console.write("echo one''-piece; poweroff -f\n")
        machine.console.expect("one-piece", PATIENCE)
        assert machine.wait(PATIENCE).kind == "power-off"
    assert "hit Breakpoint 1, " in said, said
    assert re.search(r"#0 .* in start_kernel \(\)\n#1 .* in secondary_startup_64", said), said
    assert re.search(r'1 +Thread 1 "CPU 0" \(CPU 0, kernel code, 64 bits\)', said)
    assert re.search(r'2 +Thread 2 "CPU 1" \(CPU 1, waits to be started\)', said)
    first, opened, ticked, called = said.split("--bt\n")
    assert "hit Breakpoint 2, " in first
    opened, _, finished = opened.partition("--finish\n")
    frames = re.findall(r"#\d+ +0x\w+ in (\w+) \(\)", opened)
    assert frames[0] == "vfs_open", said
    assert frames[1] in finished
    assert {"kthread", "kernel_init"} & set(frames), said
    assert frames[-1].startswith("ret_from_fork"), said
    values = [int(v) for v in re.findall(r"(?:Old|New) value = (\d+)", said)]
    assert len(values) == 4
    assert values == sorted(values), said
    # From the timer's interrupt into what it interrupted; GDB calls a frame so whose caller
    # may be on another stack.
    assert re.search(r"in __sysvec_apic_timer_interrupt \(\)\n#\d+ +<signal handler called>\n", ticked), said
    assert re.search(r"<signal handler called>\n#\d+ +0xffffffff8\w+ in \w+ \(\)\n", ticked), said
    assert "Backtrace stopped" not in said, said
    # From a system call into user space.
    assert re.search(r"#0 .* in do_sys_openat2 \(\)(?:\n.*)+in do_syscall_64 \(\)", called), said
    assert "Linux version " in called
    assert "detached]" in called


def test_the_command_line(
    gdb: GdbProgram, symbols: str, tiny: dict[str, str], terminal: Callable[..., Session]
) -> None:
    session = terminal(
        "run", "-S", "--gdb", "localhost:0", "--kernel", tiny["kernel"], "--initrd", tiny["initrd"]
    )
    found = re.search(rb"target remote (\S+:\d+)", session.expect(rb"target remote \S+:\d+, the guest waits"))
    assert found
    said = gdb.batch(
        f"target remote {found[1].decode()}\nhbreak panic\nbreak start_kernel\ncontinue\ndetach\n", symbols
    )
    assert "in start_kernel ()" in said, said
    session.expect(rb"# ")
    session.send(b"poweroff -f\n")
    assert session.wait() == 0


class Session(Protocol):
    def expect(self, pattern: bytes) -> bytes: ...
    def send(self, data: bytes) -> None: ...
    def wait(self) -> int: ...
