"""A processor's state as GDB sees it: numbers, names, sizes and types of registers.

GDB learns all of this from a description in XML, whose features have standard names
(`org.gnu.gdb.i386.core`, `.sse`, `.avx`, `.segments`); control registers are a feature of
our own. The order of the table is the order of the packet `g` and of the numbers in `p`.
Values are little-endian. Spec: "Debugging with GDB", G.5; SDM volume 1, 10.5.1 and 13.4
for the layout of the XSAVE area.

Outside 64-bit code the general registers show their low 32 bits, as in QEMU. Not
modelled: AVX-512, loading a segment of protected mode by its selector alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

State = dict[str, Any]
"""A processor's state, the fields of CpuState by name; `xsave` is a bytearray here."""

EFER, KERNEL_GS_BASE = 0xC000_0080, 0xC000_0102
GPRS = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)))
"""General registers as `CpuState` orders them."""
_ORDER = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", *(f"r{n}" for n in range(8, 16)))
_SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs")
_CR0_PE = 1
_VM = 1 << 17
_LMA = 1 << 10
_LONG = 1 << 13
# Offsets in the XSAVE area, and bits of its header.
_MXCSR, _ST, _XMM, _PRESENT, _YMM_HIGH = 24, 32, 160, 512, 576
_X87, _SSE, _AVX = 1, 2, 4
_MXCSR_BITS = 0xFFFF


class Refused(ValueError):
    """A value that the register does not take."""


@dataclass(frozen=True)
class Register:
    """One register: what it is called and how it is read and written.

    Attributes:
        bits: size of its value; a multiple of 8.
        kind: its type in the description.
        group: the group that `info registers` lists it in.
    """

    name: str
    bits: int
    kind: str
    group: str
    read: Callable[[State], int]
    write: Callable[[State, int], None]


def msr(state: State, index: int) -> int:
    """The value of a model-specific register, 0 if the state does not have it."""
    return int(dict(state["msrs"]).get(index, 0))


def set_msr(state: State, index: int, value: int) -> None:
    """Change a model-specific register of the state."""
    state["msrs"] = [(number, value if number == index else old) for number, old in state["msrs"]]


def is_long(state: State) -> bool:
    """Whether the processor executes 64-bit code."""
    return bool(msr(state, EFER) & _LMA and state["segments"][1]["access"] & _LONG)


def code_bits(state: State) -> int:
    """Size of the code segment: 16, 32 or 64."""
    if is_long(state):
        return 64
    return 32 if state["segments"][1]["access"] & 1 << 14 else 16


def _gpr(name: str, bits: int) -> Register:
    index = GPRS.index(name)
    shown = name if bits == 64 else "e" + name[1:]

    def read(state: State) -> int:
        value: int = state["gpr"][index]
        return value if bits == 64 and is_long(state) else value & 0xFFFF_FFFF

    def write(state: State, value: int) -> None:
        old = state["gpr"][index]
        wide = bits == 64 and is_long(state)
        state["gpr"][index] = value if wide else old & ~0xFFFF_FFFF | value & 0xFFFF_FFFF

    kind = ("data_ptr" if name in {"rbp", "rsp"} else "int") + ("" if name in {"rbp", "rsp"} else str(bits))
    return Register(shown, bits, kind, "general", read, write)


def _plain(name: str, bits: int, kind: str, group: str = "general", field: str = "") -> Register:
    key = field or name

    def read(state: State) -> int:
        return int(state[key]) & (1 << bits) - 1

    def write(state: State, value: int) -> None:
        state[key] = value

    return Register(name, bits, kind, group, read, write)


def _selector(name: str) -> Register:
    index = _SEGMENTS.index(name)

    def write(state: State, value: int) -> None:
        segment = state["segments"][index]
        if value & 0xFFFF == segment["selector"]:
            return
        if state["cr0"] & _CR0_PE and not state["rflags"] & _VM:
            raise Refused(f"{name}: a selector alone makes no segment of protected mode")
        segment["selector"] = value & 0xFFFF
        segment["base"] = (value & 0xFFFF) << 4

    return Register(
        name, 32, "int32", "general", lambda state: int(state["segments"][index]["selector"]), write
    )


def _base(name: str, bits: int) -> Register:
    index = _SEGMENTS.index(name[:2])

    def write(state: State, value: int) -> None:
        state["segments"][index]["base"] = value

    def read(state: State) -> int:
        return int(state["segments"][index]["base"]) & (1 << bits) - 1

    return Register(name, bits, f"int{bits}", "general", read, write)


def _model_specific(name: str, index: int, kind: str) -> Register:
    return Register(
        name,
        64,
        kind,
        "system",
        lambda state: msr(state, index),
        lambda state, value: set_msr(state, index, value),
    )


def _area(
    name: str, bits: int, kind: str, group: str, at: int, length: int, part: int, initial: int = 0
) -> Register:
    """A register that lies in the XSAVE area, `length` bytes at `at`, of component `part`."""

    def read(state: State) -> int:
        area: bytearray = state["xsave"]
        if not area[_PRESENT] & part or at + length > len(area):
            return initial
        return int.from_bytes(area[at : at + length], "little")

    def write(state: State, value: int) -> None:
        area: bytearray = state["xsave"]
        if value == read(state):
            return
        if at + length > len(area) or not (state["xcr0"] | 3) & part:
            raise Refused(f"{name}: the guest has not turned this state on")
        use(area, part)
        area[at : at + length] = (value & (1 << 8 * length) - 1).to_bytes(length, "little")

    return Register(name, bits, kind, group, read, write)


def use(area: bytearray, part: int) -> None:
    """Bring the components `part` of an XSAVE area from their initial state into use."""
    for bit, start, length in ((_X87, 0, _MXCSR), (_SSE, _XMM, 256), (_AVX, _YMM_HIGH, 256)):
        if part & bit and not area[_PRESENT] & bit:
            area[start : start + length] = bytes(length)
            if bit == _X87:
                area[0:2] = (0x37F).to_bytes(2, "little")
                area[_ST:_XMM] = bytes(_XMM - _ST)
            area[_PRESENT] |= bit


def _tag_word() -> Register:
    def read(state: State) -> int:
        area: bytearray = state["xsave"]
        if not area[_PRESENT] & _X87:
            return 0xFFFF
        top = area[3] >> 3 & 7
        word = 0
        for physical in range(8):
            place = _ST + 16 * ((physical - top) & 7)
            word |= _tag(area, place, area[4] >> physical & 1) << 2 * physical
        return word

    def write(state: State, value: int) -> None:
        if value == read(state):
            return
        use(state["xsave"], _X87)
        state["xsave"][4] = sum(1 << n for n in range(8) if value >> 2 * n & 3 != 3)

    return Register("ftag", 32, "int", "float", read, write)


def _tag(area: bytearray, place: int, used: int) -> int:
    """Valid 0, zero 1, special 2, empty 3: SDM volume 1, 8.1.7."""
    if not used:
        return 3
    mantissa = int.from_bytes(area[place : place + 8], "little")
    exponent = int.from_bytes(area[place + 8 : place + 10], "little") & 0x7FFF
    if exponent == 0 and mantissa == 0:
        return 1
    return 0 if exponent not in (0, 0x7FFF) and mantissa >> 63 else 2


def _mxcsr() -> Register:
    def read(state: State) -> int:
        # XRSTOR loads it whatever the header says.
        return int.from_bytes(state["xsave"][_MXCSR : _MXCSR + 4], "little")

    def write(state: State, value: int) -> None:
        if value & ~_MXCSR_BITS:
            raise Refused(f"mxcsr: {value:#x} has reserved bits")
        state["xsave"][_MXCSR : _MXCSR + 4] = value.to_bytes(4, "little")

    return Register("mxcsr", 32, "i386_mxcsr", "vector", read, write)


def _x87() -> list[Register]:
    table = [_area(f"st{n}", 80, "i387_ext", "float", _ST + 16 * n, 10, _X87) for n in range(8)]
    for name, at, length, initial in (
        ("fctrl", 0, 2, 0x37F),
        ("fstat", 2, 2, 0),
        ("ftag", 0, 0, 0),
        ("fiseg", 12, 4, 0),
        ("fioff", 8, 4, 0),
        ("foseg", 20, 4, 0),
        ("fooff", 16, 4, 0),
        ("fop", 6, 2, 0),
    ):
        table.append(
            _tag_word() if name == "ftag" else _area(name, 32, "int", "float", at, length, _X87, initial)
        )
    return table


Feature = tuple[str, list[Register]]


def features(bits: int) -> list[Feature]:
    """Everything that GDB is told of a processor of `bits` (32 or 64), in order."""
    count = 16 if bits == 64 else 8
    names = _ORDER if bits == 64 else GPRS[:8]
    pc, flags = ("rip", "eflags") if bits == 64 else ("eip", "eflags")
    core = [_gpr(name, bits) for name in names]
    core.append(_plain(pc, bits, "code_ptr", field="rip"))
    core.append(_plain(flags, 32, "i386_eflags", field="rflags"))
    core += [_selector(name) for name in ("cs", "ss", "ds", "es", "fs", "gs")]
    core += _x87()
    sse = [_area(f"xmm{n}", 128, "vec128", "vector", _XMM + 16 * n, 16, _SSE) for n in range(count)]
    sse.append(_mxcsr())
    avx = [_area(f"ymm{n}h", 128, "uint128", "vector", _YMM_HIGH + 16 * n, 16, _AVX) for n in range(count)]
    control = [
        _plain("cr0", bits, "cr0_flags", "system"),
        _plain("cr2", bits, f"int{bits}", "system"),
        _plain("cr3", bits, f"int{bits}", "system"),
        _plain("cr4", bits, "cr4_flags", "system"),
        _plain("cr8", bits, f"int{bits}", "system"),
        _model_specific("efer", EFER, "efer_flags"),
    ]
    if bits == 64:
        control.append(_model_specific("k_gs_base", KERNEL_GS_BASE, "int64"))
    bases = [_base("fs_base", bits), _base("gs_base", bits)]
    # GDB knows these two of 64-bit processors only.
    segments = "org.gnu.gdb.i386.segments" if bits == 64 else "org.bunshin.x86.segments"
    return [
        ("org.gnu.gdb.i386.core", core),
        ("org.gnu.gdb.i386.sse", sse),
        (segments, bases),
        ("org.gnu.gdb.i386.avx", avx),
        ("org.bunshin.x86.control", control),
    ]


_FLAGS = {
    "i386_eflags": (
        4,
        "CF,0 PF,2 AF,4 ZF,6 SF,7 TF,8 IF,9 DF,10 OF,11 NT,14 RF,16 VM,17 AC,18 VIF,19 VIP,20 ID,21",
    ),
    "i386_mxcsr": (4, "IE,0 DE,1 ZE,2 OE,3 UE,4 PE,5 DAZ,6 IM,7 DM,8 ZM,9 OM,10 UM,11 PM,12 FZ,15"),
    "cr0_flags": (0, "PE,0 MP,1 EM,2 TS,3 ET,4 NE,5 WP,16 AM,18 NW,29 CD,30 PG,31"),
    "cr4_flags": (
        0,
        (
            "VME,0 PVI,1 TSD,2 DE,3 PSE,4 PAE,5 MCE,6 PGE,7 PCE,8 OSFXSR,9 OSXMMEXCPT,10 UMIP,11 LA57,12 "
            "VMXE,13 SMXE,14 FSGSBASE,16 PCIDE,17 OSXSAVE,18 SMEP,20 SMAP,21 PKE,22 CET,23"
        ),
    ),
    "efer_flags": (8, "SCE,0 LME,8 LMA,10 NXE,11 SVME,12 LMSLE,13 FFXSR,14 TCE,15"),
}
_VEC128 = (
    ("v4f", "ieee_single", 4, "v4_float"),
    ("v2d", "ieee_double", 2, "v2_double"),
    ("v16i8", "int8", 16, "v16_int8"),
    ("v8i16", "int16", 8, "v8_int16"),
    ("v4i32", "int32", 4, "v4_int32"),
    ("v2i64", "int64", 2, "v2_int64"),
)


def _types(registers: Iterable[Register], bits: int) -> list[str]:
    """Definitions of the types that these registers use and GDB does not know."""
    lines = []
    used = {register.kind for register in registers}
    if "vec128" in used:
        lines += [f'<vector id="{name}" type="{kind}" count="{n}"/>' for name, kind, n, _ in _VEC128]
        lines.append('<union id="vec128">')
        lines += [f'<field name="{field}" type="{name}"/>' for name, _, _, field in _VEC128]
        lines += ['<field name="uint128" type="uint128"/>', "</union>"]
    for kind, (size, bits_text) in _FLAGS.items():
        if kind in used:
            lines.append(f'<flags id="{kind}" size="{size or bits // 8}">')
            for word in bits_text.split():
                name, _, bit = word.rpartition(",")
                lines.append(f'<field name="{name}" start="{bit}" end="{bit}"/>')
            lines.append("</flags>")
    return lines


class Description:
    """The registers of one kind of processor.

    Attributes:
        bits: 32 or 64.
        registers: in the order of their numbers.
        xml: what `qXfer:features:read:target.xml` gives.
        program_counter, stack_pointer, frame_pointer: their numbers, which stop replies carry.
    """

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.registers: list[Register] = []
        architecture = "i386:x86-64" if bits == 64 else "i386"
        lines = [
            '<?xml version="1.0"?>',
            '<!DOCTYPE target SYSTEM "gdb-target.dtd">',
            "<target>",
            f"<architecture>{architecture}</architecture>",
        ]
        for name, registers in features(bits):
            lines.append(f'<feature name="{name}">')
            lines += _types(registers, bits)
            for register in registers:
                number = len(self.registers)
                lines.append(
                    f'<reg name="{register.name}" bitsize="{register.bits}" regnum="{number}" '
                    f'type="{register.kind}" group="{register.group}"/>'
                )
                self.registers.append(register)
            lines.append("</feature>")
        lines.append("</target>")
        self.xml = ("\n".join(lines) + "\n").encode()
        numbers = {register.name: n for n, register in enumerate(self.registers)}
        prefix = "r" if bits == 64 else "e"
        self.program_counter = numbers[prefix + "ip"]
        self.stack_pointer = numbers[prefix + "sp"]
        self.frame_pointer = numbers[prefix + "bp"]

    @property
    def length(self) -> int:
        """Bytes of the packet `g`."""
        return sum(register.bits for register in self.registers) // 8

    def read(self, state: State, number: int) -> bytes:
        """The value of a register.

        Raises:
            IndexError: there is no such register.
        """
        register = self.registers[number]
        return register.read(state).to_bytes(register.bits // 8, "little")

    def read_all(self, state: State) -> bytes:
        """All values, one behind the other."""
        return b"".join(self.read(state, number) for number in range(len(self.registers)))

    def write(self, state: State, number: int, data: bytes) -> None:
        """Change a register in `state`.

        Raises:
            IndexError: there is no such register.
            ValueError: `data` has not its size, or it does not take that value.
        """
        register = self.registers[number]
        if len(data) * 8 != register.bits:
            raise Refused(f"{register.name}: {len(data)} bytes, expected {register.bits // 8}")
        register.write(state, int.from_bytes(data, "little"))

    def write_all(self, state: State, data: bytes) -> None:
        """Change all registers in `state`; those that stay as they are are not touched.

        Raises:
            ValueError: as `write`.
        """
        if len(data) != self.length:
            raise Refused(f"{len(data)} bytes of registers, expected {self.length}")
        at = 0
        for number, register in enumerate(self.registers):
            end = at + register.bits // 8
            if data[at:end] != self.read(state, number):
                self.write(state, number, data[at:end])
            at = end
