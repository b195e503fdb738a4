"""The socket that GDB connects to, and the thread that serves it.

    machine.start(paused=True)
    with GdbServer(machine, "localhost:1234"):
        machine.wait()

One debugger at a time: a second connection is closed at once. The guest stops when a
debugger connects. It runs on when the debugger detaches itself or vanishes; a machine that
was started paused and never let run stays where it is, for the next one. When the guest
comes to a bad end (a triple fault, a panic, a failure of the engine), the debugger can
still look at it, and hears of the end when it wants to go on.

Whoever can connect owns the guest. So it listens to this host only, unless another
address is asked for.
"""

from __future__ import annotations

import os
import selectors
import socket
import stat
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .. import boot
from ..errors import BunshinError, ConfigError, ImageError
from . import packets
from .packets import Decoder, Packet, Signal
from .stub import Gone, Stub
from .target import MachineTarget, Stop

if TYPE_CHECKING:
    from ..machine import Machine

PORT = 1234
"""Where `-s` listens, as QEMU does."""
CHUNK = 65536
PATIENCE = 5.0
"""Seconds that a debugger has to take an answer before it counts as vanished."""
FAREWELL = 0.5
"""Seconds that it has to hang up after a goodbye."""
BAD_ENDS = {"triple-fault", "panic", "failed"}
STATUS = {"power-off": 0, "stopped": 0, "failed": 1, "panic": 3, "reset": 4, "triple-fault": 5}
"""What GDB shows as the guest's exit code: the statuses of `bunshin run`."""


@dataclass(frozen=True)
class Address:
    """Where to listen: a host and port, or the path of a Unix socket."""

    host: str = "localhost"
    port: int = PORT
    path: str | None = None

    def __str__(self) -> str:
        if self.path is not None:
            return self.path
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str | int) -> Address:
    """An address from `1234`, `host:1234`, `[::1]:1234`, `unix:path`, or QEMU's `tcp::1234`.

    Raises:
        ConfigError: it is none.
    """
    given = str(text)
    kind, _, rest = given.partition(":")
    if kind == "unix" and rest:
        return Address(path=rest)
    where = rest if kind == "tcp" else given
    host, _, port = where.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host, port = where, ""
    if not (port.isascii() and port.isdigit()) or int(port) > 65535:
        raise ConfigError(
            "gdb-address", f"gdb: {given!r} is not an address such as 1234, host:1234 or unix:path"
        )
    return Address(host or "localhost", int(port))


class GdbServer:
    """Serves GDB for one machine that was started, until `close`.

    Attributes:
        address: where it listens; a port of 0 has become a free one.
    """

    def __init__(
        self, machine: Machine, address: str | int | Address = PORT, bits: int | None = None
    ) -> None:
        """Listen, and serve whoever comes.

        Args:
            address: as `parse_address` takes it.
            bits: 32 or 64, what GDB is told that the processors are; otherwise it depends
                on the kernel.
        Raises:
            ConfigError: no such address, or one that cannot be listened to; the machine was
                not started, or has a debugger.
        """
        if machine.status in {"built", "closed"}:
            raise ConfigError("machine-state", f"gdb: this machine is {machine.status}")
        self.machine = machine
        self._bits = bits
        wanted = address if isinstance(address, Address) else parse_address(address)
        machine.debug(self._on_stop)
        try:
            self._listener, self.address = _listen(wanted)
        except BaseException:
            machine.debug(None)
            raise
        self._listener.setblocking(False)
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._events: deque[Stop] = deque()
        self._closing = False
        self._connection: socket.socket | None = None
        self._stub: Stub | None = None
        self._target: MachineTarget | None = None
        self._decoder = Decoder()
        self._last = b""
        self._was_run = False
        self._ended = threading.Event()
        self._free = threading.Event()
        self._free.set()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._reader, selectors.EVENT_READ)
        threading.Thread(target=self._watch_end, name="bunshin-gdb-end", daemon=True).start()
        self._thread = threading.Thread(target=self._serve, name="bunshin-gdb", daemon=True)
        self._thread.start()

    def __enter__(self) -> GdbServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def attached(self) -> bool:
        """A debugger is connected."""
        return not self._free.is_set()

    @property
    def ended_badly(self) -> bool:
        """The guest has come to an end that is worth a look."""
        return self.machine.status == "ended" and self._outcome() in BAD_ENDS

    def linger(self, timeout: float | None = None) -> None:
        """Wait until no debugger looks at the ended machine any more."""
        self._free.wait(timeout)

    def close(self) -> None:
        """Say goodbye to the debugger, let the guest run on and stop listening."""
        self._closing = True
        self._ring()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # The thread -----------------------------------------------------------------------

    def _watch_end(self) -> None:
        try:
            self.machine.wait()
        except BunshinError:
            pass  # whoever asks the machine how it ended is told
        self._ended.set()
        self._ring()

    def _on_stop(self, cpu: int, why: str, gva: int) -> None:
        """A processor has stopped; on its own thread."""
        self._events.append(Stop(cpu, why, gva))
        self._ring()

    def _ring(self) -> None:
        try:
            os.write(self._writer, b"!")
        except OSError:
            pass  # full, so it rings already; or closed

    def _serve(self) -> None:
        try:
            while not self._closing:
                for key, _ in self._selector.select():
                    if key.fileobj == self._reader:
                        os.read(self._reader, CHUNK)
                    elif key.fileobj is self._listener:
                        self._accept()
                    elif key.fileobj is self._connection:
                        self._receive()
                self._take_events()
        finally:
            self._goodbye()

    def _goodbye(self) -> None:
        if self._stub is not None and self._stub.running:
            self._send(self._exit_packet())
        self._hang_up(resume=True)
        self.machine.debug(None)
        self._selector.close()
        self._listener.close()
        if self.address.path is not None:
            try:
                os.unlink(self.address.path)
            except OSError:
                pass  # somebody else has taken it away
        os.close(self._reader)
        os.close(self._writer)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        if self._connection is not None or self.machine.status == "closed":
            connection.close()
            return
        connection.setblocking(True)
        connection.settimeout(PATIENCE)
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._free.clear()
        self._connection = connection
        self._selector.register(connection, selectors.EVENT_READ)
        self._decoder = Decoder()
        self._events.clear()
        try:
            self._was_run = self._was_run or self.machine.status == "running"
            self._target = MachineTarget(self.machine, self._bits or _kernel_bits(self.machine))
            self._target.interrupt()
            self._stub = Stub(self._target)
        except BunshinError:
            self._hang_up(resume=True)

    def _receive(self) -> None:
        connection = self._connection
        assert connection is not None
        try:
            data = connection.recv(CHUNK)
        except OSError:
            data = b""
        if not data:
            return self._hang_up(resume=True)
        try:
            for item in self._decoder.feed(data):
                if self._connection is None:
                    return None
                if isinstance(item, Packet):
                    self._packet(item.data)
                else:
                    self._signal(item)
        except packets.TooLong:
            self._hang_up(resume=True)

    def _signal(self, signal: Signal) -> None:
        stub = self._stub
        assert stub is not None
        if signal.kind == "break" and stub.running:
            self._halt()
            # A stop that came first is what it is told of.
            self._take_events()
            if stub.running:
                self._send(stub.interrupted())
        elif signal.kind == "bad" and stub.acknowledges:
            self._raw(b"-")
        elif signal.kind == "-":
            self._raw(self._last)

    def _packet(self, data: bytes) -> None:
        stub, target = self._stub, self._target
        assert stub is not None
        assert target is not None
        if stub.acknowledges:
            self._raw(b"+")
        if stub.running:
            return  # nobody asks while the guest runs
        try:
            reply = stub.handle(data)
        except Gone as gone:
            if gone.answer is not None:
                self._send(gone.answer)
            if gone.kill:
                self.machine.stop()
            self._was_run = True
            self._hang_up(resume=True)
            return
        except BunshinError as error:
            # The machine has ended, or was closed.
            if self.machine.status in {"ended", "closed"} and error.slug == "machine-state":
                self._leave()
                return
            reply = b"E01"
        if reply is None:
            self._was_run = True
        else:
            self._send(reply)

    def _take_events(self) -> None:
        """Tell a debugger that waits what has happened."""
        if self._stub is None or not self._stub.running:
            self._events.clear()
            return
        if self._ended.is_set():
            if self.ended_badly:
                self._send(self._stub.crashed())
            else:
                self._leave()
        elif self._events:
            # More of them may have stopped by the time that all stand still.
            self._halt()
            stops = [self._events.popleft() for _ in range(len(self._events))]
            self._send(self._stub.stopped(stops))

    def _halt(self) -> None:
        assert self._target is not None
        try:
            self._target.interrupt()
        except ConfigError:
            pass  # it has ended just now

    # The connection -------------------------------------------------------------------

    def _outcome(self) -> str:
        try:
            return self.machine.wait(0).kind
        except BunshinError:
            return "failed"

    def _exit_packet(self) -> bytes:
        return b"W%02x" % STATUS.get(self._outcome(), 0)

    def _leave(self) -> None:
        """The guest has ended, and that is the last that the debugger hears."""
        self._send(self._exit_packet())
        self._hang_up(resume=False)

    def _send(self, data: bytes) -> None:
        self._last = packets.encode(data)
        self._raw(self._last)

    def _raw(self, data: bytes) -> None:
        if self._connection is not None:
            try:
                self._connection.sendall(data)
            except OSError:
                self._hang_up(resume=True)

    def _hang_up(self, resume: bool) -> None:
        """The debugger is gone: the guest runs on, if it ever ran."""
        connection, target = self._connection, self._target
        if connection is None:
            return
        self._connection = self._stub = self._target = None
        self._selector.unregister(connection)
        _part(connection)
        try:
            if target is not None and self.machine.status in {"running", "paused"}:
                target.interrupt()
                target.forget()
                if resume and self._was_run:
                    self.machine.resume()
        except BunshinError:
            pass  # it has ended meanwhile
        finally:
            self._free.set()


def _part(connection: socket.socket) -> None:
    """Close a connection so that what was said last arrives: the other side closes first,
    if it does so soon.
    """
    try:
        connection.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + FAREWELL
        while (left := deadline - time.monotonic()) > 0:
            connection.settimeout(left)
            if not connection.recv(CHUNK):
                break
    except OSError:
        pass  # it is gone, or stays
    connection.close()


def _kernel_bits(machine: Machine) -> int:
    try:
        return boot.kernel_bits(machine.config.kernel)
    except ImageError:
        return 64


def _listen(address: Address) -> tuple[socket.socket, Address]:
    if address.path is not None:
        _remove_stale(address.path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(address.path)
            # The guest belongs to whoever can connect.
            os.chmod(address.path, stat.S_IRUSR | stat.S_IWUSR)
            listener.listen(1)
        except OSError as error:
            listener.close()
            raise ConfigError("gdb-address", f"gdb: {address}: {error.strerror}") from error
        return listener, address
    try:
        (family, kind, protocol, _, where), *_ = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        raise ConfigError("gdb-address", f"gdb: host {address.host!r}: {error.strerror}") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(where)
        listener.listen(1)
    except OSError as error:
        listener.close()
        raise ConfigError("gdb-address", f"gdb: {address}: {error.strerror}") from error
    return listener, Address(address.host, listener.getsockname()[1])


def _remove_stale(path: str) -> None:
    """Take away a socket that nobody listens to any more."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
    except OSError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        except OSError:
            pass
