"""NS16550A serial port (UART).

    offset  read                  write                 with LCR bit 7 (DLAB)
    0       RBR received byte     THR byte to send      DLL divisor, low byte
    1       IER interrupt enable  IER                   DLM divisor, high byte
    2       IIR interrupt source  FCR FIFO control
    3       LCR line control      LCR
    4       MCR modem control     MCR
    5       LSR line status       ignored
    6       MSR modem status      ignored
    7       SCR scratch           SCR

Spec: National Semiconductor PC16550D, June 1995, sections 8.1 to 8.11.

A byte written is sent at once, so the transmitter is always empty and its interrupt
(THRE) is due whenever it is enabled or a byte has just gone. Reading IIR while it
shows THRE takes it away. Linux's 8250 driver checks both at startup.

Received bytes wait in a host-side backlog until the guest raises RTS, as a far end
with hardware flow control would, so nothing typed early is lost to the FIFO reset of
an opening driver. On a PC the line is gated by OUT2 (MCR bit 3).

Not modelled: the line's speed and format, parity and framing errors, break, the
character timeout as a time (a partly filled FIFO reports it at once), and changes of
the modem inputs, which are always on.

Hostile guest: can only make the sink receive bytes as fast as it writes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ..errors import StateError
from ..irq import IrqLine
from . import Device

IER_RDI, IER_THRI, IER_RLSI, IER_MSI = 1, 2, 4, 8
IIR_NONE, IIR_MSI, IIR_THRI, IIR_RDI, IIR_RLSI, IIR_TIMEOUT = 0x01, 0x00, 0x02, 0x04, 0x06, 0x0C
IIR_FIFO = 0xC0
FCR_ENABLE, FCR_CLEAR_RX, FCR_CLEAR_TX = 1, 2, 4
LCR_DLAB = 0x80
MCR_DTR, MCR_RTS, MCR_OUT1, MCR_OUT2, MCR_LOOP = 1, 2, 4, 8, 16
LSR_DR, LSR_OE, LSR_THRE, LSR_TEMT = 0x01, 0x02, 0x20, 0x40
MSR_CTS, MSR_DSR, MSR_RI, MSR_DCD = 0x10, 0x20, 0x40, 0x80
FIFO = 16
BACKLOG = 1 << 20
"""Bytes that wait on the host until the guest takes them, at most."""
_TRIGGER = (1, 4, 8, 14)


@dataclass
class SerialState:
    """Everything the guest can see of the port."""

    dll: int = 0x0C
    dlm: int = 0
    ier: int = 0
    fcr: int = 0
    lcr: int = 0
    mcr: int = 0
    scr: int = 0
    msr_delta: int = 0
    overrun: bool = False
    thre_pending: bool = False
    rx: bytearray = field(default_factory=bytearray)


class Serial(Device):
    """One port. Guest sees: a 16550A whose far end is always there."""

    width = 1
    name = "serial"
    state: SerialState

    def __init__(
        self,
        irq: IrqLine | None = None,
        sink: Callable[[bytes], object] | None = None,
    ) -> None:
        """Wire the port: `irq` is its line, `sink` takes each byte that it sends."""
        if irq is not None:
            self.irq = irq
        self.state = SerialState()
        self._sink = sink
        self._backlog = bytearray()

    def push(self, data: bytes) -> bool:
        """Let the far end send `data`; any thread.

        Returns:
            False when more than `BACKLOG` bytes would wait then: nothing was taken.
        """
        with self.lock:
            if len(self._backlog) + len(data) > BACKLOG:
                return False
            self._backlog += data
            self._fill()
            self._update()
            return True

    @property
    def waiting(self) -> int:
        """Bytes the far end still holds back."""
        return len(self._backlog)

    def read(self, offset: int, size: int) -> int:
        s = self.state
        if offset == 5:
            status = LSR_THRE | LSR_TEMT | (LSR_DR if s.rx else 0)
            if s.overrun:
                status |= LSR_OE
                s.overrun = False
                self._update()
            return status
        if offset == 0:
            if s.lcr & LCR_DLAB:
                return s.dll
            if not s.rx:
                return 0
            byte = s.rx.pop(0)
            self._fill()
            self._update()
            return byte
        if offset == 1:
            return s.dlm if s.lcr & LCR_DLAB else s.ier
        if offset == 2:
            source = self._source()
            if source == IIR_THRI:
                s.thre_pending = False
                self._update()
            return source | (IIR_FIFO if s.fcr & FCR_ENABLE else 0)
        if offset == 3:
            return s.lcr
        if offset == 4:
            return s.mcr
        if offset == 6:
            value = self._modem() | s.msr_delta
            s.msr_delta = 0
            self._update()
            return value
        return s.scr

    def write(self, offset: int, size: int, value: int) -> None:
        s = self.state
        if offset == 0:
            if s.lcr & LCR_DLAB:
                s.dll = value
                return
            if s.mcr & MCR_LOOP:
                self._receive(value)
            elif self._sink is not None:
                self._sink(value.to_bytes(1, "little"))
            s.thre_pending = True
        elif offset == 1:
            if s.lcr & LCR_DLAB:
                s.dlm = value
                return
            if value & IER_THRI and not s.ier & IER_THRI:
                s.thre_pending = True
            s.ier = value & 0x0F
        elif offset == 2:
            if (value ^ s.fcr) & FCR_ENABLE or value & FCR_CLEAR_RX:
                s.rx.clear()
            if value & FCR_CLEAR_TX:
                s.thre_pending = True
            s.fcr = value & (0xC0 | FCR_ENABLE) if value & FCR_ENABLE else 0
            self._fill()
        elif offset == 3:
            s.lcr = value
        elif offset == 4:
            before = self._modem()
            s.mcr = value & 0x1F
            self._modem_changed(before)
            self._fill()
        elif offset == 7:
            s.scr = value
        self._update()

    def reset(self) -> None:
        super().reset()
        self._backlog.clear()

    def level(self) -> bool:
        return bool(self.state.mcr & MCR_OUT2) and self._source() != IIR_NONE

    def check(self, state: SerialState) -> None:
        registers = (state.dll, state.dlm, state.lcr, state.scr)
        if (
            any(not 0 <= value <= 0xFF for value in registers)
            or not 0 <= state.ier <= 0x0F
            or not 0 <= state.mcr <= 0x1F
            or state.fcr & ~(0xC0 | FCR_ENABLE)
            or state.msr_delta & ~0x0F
            or len(state.rx) > (FIFO if state.fcr & FCR_ENABLE else 1)
        ):
            raise StateError("state-invalid", f"saved state of {self.name}: register out of range")

    def _source(self) -> int:
        """The most urgent enabled interrupt, as IIR shows it."""
        s = self.state
        if s.ier & IER_RLSI and s.overrun:
            return IIR_RLSI
        if s.ier & IER_RDI and s.rx:
            full = len(s.rx) >= _TRIGGER[s.fcr >> 6] or not s.fcr & FCR_ENABLE
            return IIR_RDI if full else IIR_TIMEOUT
        if s.ier & IER_THRI and s.thre_pending:
            return IIR_THRI
        if s.ier & IER_MSI and s.msr_delta:
            return IIR_MSI
        return IIR_NONE

    def _update(self) -> None:
        self.irq.set(self.level())

    def _receive(self, byte: int) -> None:
        s = self.state
        if len(s.rx) < (FIFO if s.fcr & FCR_ENABLE else 1):
            s.rx.append(byte)
        else:
            s.overrun = True
            if not s.fcr & FCR_ENABLE:
                s.rx[0] = byte

    def _fill(self) -> None:
        """Move what the far end holds back into the receiver, while there is room."""
        s = self.state
        if not self._backlog or not s.mcr & MCR_RTS or s.mcr & MCR_LOOP:
            return
        room = (FIFO if s.fcr & FCR_ENABLE else 1) - len(s.rx)
        if room > 0:
            s.rx += self._backlog[:room]
            del self._backlog[:room]

    def _modem(self) -> int:
        mcr = self.state.mcr
        if not mcr & MCR_LOOP:
            return MSR_CTS | MSR_DSR | MSR_DCD
        value = MSR_CTS if mcr & MCR_RTS else 0
        value |= MSR_DSR if mcr & MCR_DTR else 0
        value |= MSR_RI if mcr & MCR_OUT1 else 0
        return value | (MSR_DCD if mcr & MCR_OUT2 else 0)

    def _modem_changed(self, before: int) -> None:
        now = self._modem()
        changed = (before ^ now) >> 4
        # Bit 2 (TERI) only tells of a ring signal that ended.
        if changed & 4 and now & MSR_RI:
            changed &= ~4
        self.state.msr_delta |= changed
