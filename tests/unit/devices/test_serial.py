"""Constants from the PC16550D data sheet, written out again."""

from __future__ import annotations

import pytest

from bunshin.devices.serial import Serial
from bunshin.errors import StateError
from bunshin.irq import IrqLine

RBR = THR = DLL = 0
IER = DLM = 1
IIR = FCR = 2
LCR, MCR, LSR, MSR, SCR = 3, 4, 5, 6, 7
READY = 0x0B  # DTR, RTS, OUT2


class Port(Serial):
    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.levels: list[bool] = []
        super().__init__(IrqLine(self.levels.append), self.sent.append)

    def out(self, offset: int, value: int) -> None:
        self.write(offset, 1, value)

    def inp(self, offset: int) -> int:
        return self.read(offset, 1)


@pytest.fixture
def port() -> Port:
    return Port()


def test_after_reset(port: Port) -> None:
    assert [port.inp(offset) for offset in range(8)] == [0, 0, 0x01, 0, 0, 0x60, 0xB0, 0]


def test_sends(port: Port) -> None:
    port.out(THR, 0x41)
    assert port.sent == [b"A"]
    assert port.inp(LSR) == 0x60


def test_divisor_latch(port: Port) -> None:
    port.out(LCR, 0x83)
    port.out(DLL, 0x01)
    port.out(DLM, 0x02)
    assert (port.inp(DLL), port.inp(DLM)) == (1, 2)
    port.out(LCR, 0x03)
    assert port.sent == []
    assert port.inp(IER) == 0


def test_transmitter_interrupt_as_linux_tests_it(port: Port) -> None:
    """serial8250_do_startup: THRE must come back each time it is enabled."""
    port.out(MCR, READY)
    for _ in range(2):
        port.out(IER, 0x02)
        assert port.irq.level
        assert port.inp(IIR) == 0x02
        assert not port.irq.level
        assert port.inp(IIR) == 0x01
        port.out(IER, 0)
    port.out(IER, 0x02)
    port.inp(IIR)
    port.out(THR, 0)
    assert port.inp(IIR) == 0x02


def test_enabling_again_without_disabling_makes_no_interrupt(port: Port) -> None:
    port.out(IER, 0x02)
    port.inp(IIR)
    port.out(IER, 0x03)
    assert port.inp(IIR) == 0x01


def test_receiver_interrupt_and_trigger_level(port: Port) -> None:
    port.out(MCR, READY)
    port.out(FCR, 0x81)  # FIFO on, trigger at 8
    port.out(IER, 0x01)
    port.push(b"1234567")
    assert port.inp(IIR) == 0xCC  # fewer than the level: character timeout
    port.push(b"8")
    assert port.inp(IIR) == 0xC4
    assert port.irq.level
    assert bytes(port.inp(RBR) for _ in range(8)) == b"12345678"
    assert not port.irq.level
    assert port.inp(IIR) == 0xC1
    assert port.inp(RBR) == 0


def test_interrupts_by_urgency(port: Port) -> None:
    port.out(MCR, READY)
    port.push(b"x")
    port.out(IER, 0x0F)
    assert port.inp(IIR) == 0x04
    port.inp(RBR)
    assert port.inp(IIR) == 0x02


def test_no_interrupt_without_out2(port: Port) -> None:
    port.out(MCR, 0x03)
    port.out(IER, 0x02)
    assert port.levels == []
    port.out(MCR, READY)
    assert port.levels == [True]


def test_more_than_the_fifo_waits_outside(port: Port) -> None:
    port.out(MCR, READY)
    port.out(FCR, 0x01)
    data = bytes(range(100))
    port.push(data)
    assert port.waiting == 84
    got = bytearray()
    while port.inp(LSR) & 1:
        got.append(port.inp(RBR))
    assert bytes(got) == data
    assert port.inp(LSR) == 0x60  # no overrun


def test_nothing_comes_before_rts(port: Port) -> None:
    port.push(b"typed early")
    port.out(FCR, 0x07)
    assert port.inp(LSR) == 0x60
    port.out(IER, 0x01)
    port.out(MCR, READY)
    assert port.irq.level
    assert port.inp(RBR) == ord("t")


def test_without_fifo_one_byte_at_a_time(port: Port) -> None:
    port.out(MCR, READY)
    port.push(b"ab")
    assert port.inp(RBR) == ord("a")
    assert port.inp(RBR) == ord("b")


def test_fifo_identification_and_reset(port: Port) -> None:
    port.out(FCR, 0x01)
    assert port.inp(IIR) & 0xC0 == 0xC0
    port.out(MCR, READY)
    port.push(b"abc")
    port.out(FCR, 0x03)
    assert port.inp(LSR) & 1 == 0
    port.push(b"abc")
    port.out(FCR, 0x00)
    assert port.inp(IIR) & 0xC0 == 0
    assert port.inp(LSR) & 1 == 0


def test_loopback_as_linux_tests_it(port: Port) -> None:
    """autoconfig: MCR = LOOP | OUT2 | RTS must show as DCD and CTS."""
    port.out(MCR, 0x10 | 0x0A)
    assert port.inp(MSR) & 0xF0 == 0x90
    port.out(THR, 0x55)
    assert port.sent == []
    assert port.inp(LSR) & 1
    assert port.inp(RBR) == 0x55


def test_overrun_in_loopback(port: Port) -> None:
    port.out(MCR, 0x1F)
    port.out(IER, 0x04)
    port.out(THR, 1)
    port.out(THR, 2)
    assert port.inp(IIR) == 0x06
    assert port.irq.level
    assert port.inp(LSR) & 0x02
    assert port.inp(LSR) & 0x02 == 0
    assert not port.irq.level


def test_modem_changes_are_told_once(port: Port) -> None:
    port.out(MCR, 0x18)  # loop, OUT2: CTS, DSR fall, DCD stays
    assert port.inp(MSR) == 0x80 | 0x03
    assert port.inp(MSR) == 0x80
    port.out(MCR, 0x1C)  # OUT1: RI on, not told
    assert port.inp(MSR) == 0xC0
    port.out(MCR, 0x18)  # RI ended: TERI
    assert port.inp(MSR) == 0x84


def test_reserved_bits(port: Port) -> None:
    port.out(IER, 0xFF)
    port.out(MCR, 0xFF)
    port.out(SCR, 0xA5)
    assert (port.inp(IER), port.inp(MCR), port.inp(SCR)) == (0x0F, 0x1F, 0xA5)


def test_save_and_load(port: Port) -> None:
    port.out(MCR, READY)
    port.out(FCR, 0x01)
    port.out(IER, 0x01)
    port.push(b"abc")
    packed = port.save()
    other = Port()
    other.load(packed)
    assert other.levels == []
    assert other.irq.level
    assert bytes(other.inp(RBR) for _ in range(3)) == b"abc"
    assert other.levels == [False]
    assert packed is not None
    assert packed["fields"]["rx"] == b"abc"


@pytest.mark.parametrize(
    "change",
    [{"ier": 0x10}, {"mcr": 0x20}, {"fcr": 2}, {"rx": b"ab"}, {"dll": 256}, {"lcr": -1},
     {"msr_delta": 16}],
)  # fmt: skip
def test_impossible_states(port: Port, change: dict[str, object]) -> None:
    packed = port.save()
    assert packed is not None
    packed["fields"].update(change)
    with pytest.raises(StateError):
        port.load(packed)


def test_reset(port: Port) -> None:
    port.out(MCR, READY)
    port.out(IER, 0x02)
    port.reset()
    assert port.levels == [True, False]
    assert port.inp(IER) == 0


def test_what_waits_for_the_guest_has_a_limit() -> None:
    port = Serial()
    assert port.push(bytes(1 << 20))
    assert not port.push(b"x")
    assert port.waiting == 1 << 20
    assert port.push(b"")
    port.write(4, 1, 2)  # RTS: the receiver takes one byte
    assert port.waiting == (1 << 20) - 1
    assert port.push(b"x")
    assert not port.push(b"x")
