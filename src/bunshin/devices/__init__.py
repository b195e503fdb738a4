"""Devices, one file each, and the base class for your own.

A device answers `read` and `write` at offsets from wherever it was put on the bus.
What the guest can see of it is one dataclass, `state`; everything else is a wire
passed in when it is built. The bus holds `lock` around every access.
"""

from __future__ import annotations

from threading import RLock
from typing import Any, ClassVar

from ..irq import IrqLine
from ..state import Packed, pack, unpack


class Device:
    """Something on the bus. Subclass it, say where it sits, answer reads and writes:

        class Dice(Device):
            mmio = range(0xD000_0000, 0xD000_1000)

            def read(self, offset: int, size: int) -> int:
                return random.randint(1, 6)

        Machine(image="tiny", devices=[Dice()])

    Attributes:
        ports: the ports it answers at, or None.
        mmio: the guest-physical addresses it answers at, or None.
        gsi: the interrupt controller's input that `irq` is wired to, or None.
        width: widest access in bytes; wider ones arrive as single bytes.
        irq: its interrupt line.
        lock: held by the bus around every access, so that of several processors one is
            in the device at a time; take it on other threads.
        state: what the guest can see, a dataclass, or None.
        VERSION: version of `state`; raise it when the fields change.
    """

    ports: range | None = None
    mmio: range | None = None
    gsi: int | None = None
    width: int = 8
    name: str = ""
    state: Any = None
    VERSION: ClassVar[int] = 1

    irq: IrqLine
    lock: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        self = super().__new__(cls)
        self.irq = IrqLine()
        self.lock = RLock()
        return self

    def read(self, offset: int, size: int) -> int:
        """Answer a load of `size` bytes at `offset`; all ones unless overridden."""
        return (1 << 8 * size) - 1

    def write(self, offset: int, size: int, value: int) -> None:
        """Take a store of `size` bytes at `offset`; ignored unless overridden."""

    def reset(self) -> None:
        """Go back to the state after power-on."""
        if self.state is not None:
            self.state = type(self.state)()
        self.irq.lower()

    def save(self) -> Packed | None:
        """A copy of the state, or None for a device without one."""
        if self.state is None:
            return None
        with self.lock:
            return pack(self._title(), self.VERSION, self.state)

    def load(self, packed: Any) -> None:
        """Take over a saved state, without making an edge on the line.

        Raises:
            StateError: it is not a state of this device.
        """
        state = unpack(self._title(), self.VERSION, type(self.state), packed)
        self.check(state)
        with self.lock:
            self.state = state
            self.irq.restore(self.level())

    def check(self, state: Any) -> None:
        """Raise StateError for values that this device could never have."""

    def level(self) -> bool:
        """The level that `irq` has in the present state."""
        return False

    def _title(self) -> str:
        return self.name or type(self).__name__.lower()
