"""The real command line in front of a toy machine: run as a program by the tests here.

The toy's guest echoes what is typed. A line that names a kind of outcome ends the
run so; `flood` prints without end, `break` fails as a broken engine would,
`typed` tells how many bytes came, `arguments` what the machine was built from.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from threading import Condition, Thread
from types import SimpleNamespace
from typing import Any

import bunshin
from bunshin.cli import main
from bunshin.errors import EngineError
from bunshin.machine import Outcome

KINDS = ("power-off", "panic", "reset", "triple-fault", "failed")


class Toy:
    """What `bunshin.cli.run` uses of a Machine."""

    def __init__(self, console: Callable[[bytes], object], **arguments: Any) -> None:
        self.arguments = arguments
        self.put = console
        self.console = SimpleNamespace(write=self.type)
        self.board = SimpleNamespace(com1=SimpleNamespace(waiting=0))
        self.changed = Condition()
        self.outcome: Outcome | None = None
        self.error: Exception | None = None
        self.typed = 0
        self.line = b""
        self.queue: list[bytes] = []
        self.status = "running"
        self.engine_warning = "KVM is slow here" if arguments.get("engine") == "kvm" else None
        self.clock = SimpleNamespace(after=self.after)
        self.due: list[tuple[int, Callable[[], None]]] = []

    def after(self, delay_ns: int, action: Callable[[], None]) -> None:
        self.due.append((delay_ns, action))

    def switch_engine(self, name: str) -> None:
        if name == "kvm":
            raise EngineError("engine-switch", "KVM cannot keep it")
        self.put(b"moved to " + name.encode() + b"\r\n")

    def start(self, paused: bool = False) -> None:
        for _, action in sorted(self.due, key=lambda due: due[0]):
            action()
        Thread(target=self.guest, daemon=True).start()

    def type(self, data: bytes) -> None:
        with self.changed:
            self.queue.append(data)
            self.changed.notify_all()

    def guest(self) -> None:
        self.put(b"toy\r\n> ")
        while True:
            with self.changed:
                while not self.queue:
                    self.changed.wait()
                data = self.queue.pop(0)
            for value in data:
                self.typed += 1
                byte = bytes([value])
                if byte in b"\r\n":
                    self.put(b"\r\n")
                    self.command(self.line.decode(errors="replace"))
                    self.line = b""
                else:
                    self.put(byte if value >= 32 else b"^" + bytes([value + 64]))
                    self.line += byte

    def command(self, line: str) -> None:
        if line in KINDS:
            with self.changed:
                self.outcome = Outcome(line, f"the toy met a {line}")
                if line == "failed":
                    self.error = EngineError("toy", "the toy engine broke")
                self.changed.notify_all()
        elif line == "flood":
            while self.outcome is None:
                self.put(b"0123456789abcdef" * 64)
        elif line == "typed":
            self.put(b"%d\r\n> " % self.typed)
        elif line == "arguments":
            self.put(repr(sorted(self.arguments.items())).encode() + b"\r\n> ")
        else:
            self.put(b"> ")

    def wait(self, timeout: float | None = None) -> Outcome:
        with self.changed:
            while self.outcome is None:
                if timeout is not None:
                    return Outcome("timeout")
                self.changed.wait()
            if self.error is not None:
                raise self.error
            return self.outcome

    def stats(self) -> dict[str, int]:
        return {"exits.pio-out": 7, "engine.blocks": 12}

    def close(self) -> None:
        with self.changed:
            self.outcome = self.outcome or Outcome("stopped")


if __name__ == "__main__":
    bunshin.Machine = Toy  # type: ignore[misc, assignment]
    sys.exit(main())
