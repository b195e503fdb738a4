"""A thermometer in ten lines of Python, read by a running Linux guest."""

import itertools

from bunshin import Device, Machine


class Thermometer(Device):
    """One 32-bit register: the temperature in degrees, one more at each read."""

    mmio = range(0xD000_0000, 0xD000_1000)

    def __init__(self) -> None:
        self.degrees = itertools.count(20)

    def read(self, offset: int, size: int) -> int:
        return next(self.degrees) if offset == 0 else 0


with Machine(image="tiny", devices=[Thermometer()]) as machine:
    machine.start()
    machine.console.expect("tiny:.*# ")
    for _ in range(3):
        machine.console.write("devmem 0xd0000000\n")
        value = machine.console.expect(r"\n(0x[0-9A-F]{8})\r")[1]
        print(f"the guest reads {int(value, 16)} degrees")
