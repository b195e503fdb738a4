"""What `monitor COMMAND` does in GDB's prompt: words in, lines out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from .registers import EFER, GPRS, State, code_bits, msr
from .target import NO_INTERRUPTS

if TYPE_CHECKING:
    from .stub import Stub

HELP = """\
monitor help                 this list
monitor info                 every processor: what it executes, and where
monitor registers            control registers, segments and tables of this processor
monitor translate ADDRESS    the page tables' way from a virtual to the physical address
monitor gpa ADDRESS [BYTES]  physical memory (hexadecimal, at most 4096 bytes)
monitor stepirq on|off       let interrupts in while stepping (off at first)
"""
MOST_BYTES = 4096
_P, _W, _U, _PS, _G, _A, _D, _NX = 1, 2, 4, 0x80, 0x100, 0x20, 0x40, 1 << 63
_ADDRESS = 0x000F_FFFF_FFFF_F000
_PG, _PAE, _PSE = 1 << 31, 1 << 5, 1 << 4


def run(stub: Stub, cpu: int, command: str) -> str:
    """Perform a command for processor `cpu`; what it says ends with a new line."""
    words = command.split()
    name = words[0] if words else "help"
    try:
        handler = _COMMANDS[name]
    except KeyError:
        return f"there is no command {name[:40]!r}; 'monitor help' lists them\n"
    try:
        return handler(stub, cpu, words[1:])
    except (ValueError, IndexError) as error:
        return f"{name}: {error}; 'monitor help' tells what it takes\n"


def _number(words: list[str], index: int, default: int | None = None) -> int:
    if index >= len(words) and default is not None:
        return default
    value = int(words[index], 16 if not words[index].startswith("0x") else 0)
    if not 0 <= value < 1 << 64:
        raise ValueError(f"{words[index][:20]} has more than 64 bits")
    return value


def _help(stub: Stub, cpu: int, words: list[str]) -> str:
    return HELP


def _info(stub: Stub, cpu: int, words: list[str]) -> str:
    lines = []
    for index in range(stub.target.cpus):
        state = stub.state(index)
        segment = state["segments"][1]
        doing = "halted" if state["halted"] else "running"
        if state.get("waits_for_sipi"):
            doing = "not started"
        lines.append(
            f"{'*' if index == cpu else ' '} CPU {index}: {doing}, {code_bits(state)}-bit code, "
            f"cs {segment['selector']:#06x} rip {state['rip']:#x} cr3 {state['cr3']:#x}\n"
        )
    return "".join(lines)


def _registers(stub: Stub, cpu: int, words: list[str]) -> str:
    state = stub.state(cpu)
    lines = [f"{name} {state[name]:#x}" for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "xcr0", "rflags")]
    lines.append(f"efer {msr(state, EFER):#x}")
    for name, segment in zip(("es", "cs", "ss", "ds", "fs", "gs"), state["segments"], strict=True):
        lines.append(_segment(name, segment))
    lines += [_segment("ldt", state["ldt"]), _segment("tr", state["tr"])]
    for name in ("gdt", "idt"):
        lines.append(f"{name} base {state[name]['base']:#x} limit {state[name]['limit']:#x}")
    lines.append("dr " + " ".join(f"{value:#x}" for value in state["dr"]))
    lines += [f"{name} {value:#x}" for name, value in zip(GPRS, state["gpr"], strict=True)]
    return "\n".join(lines) + "\n"


def _segment(name: str, segment: dict[str, int]) -> str:
    return (
        f"{name} {segment['selector']:#06x} base {segment['base']:#x} limit {segment['limit']:#x} "
        f"access {segment['access']:#x}"
    )


def _translate(stub: Stub, cpu: int, words: list[str]) -> str:
    gva = _number(words, 0)
    lines = _walk(stub, stub.state(cpu), gva)
    gpa = stub.target.translate(cpu, gva)
    lines.append(f"gva {gva:#x} " + ("is not mapped" if gpa is None else f"is gpa {gpa:#x}"))
    return "\n".join(lines) + "\n"


def _walk(stub: Stub, state: State, gva: int) -> list[str]:
    """The entries on the way, one line each: SDM volume 3, chapter 4."""
    if not state["cr0"] & _PG:
        return ["paging is off"]
    long = bool(msr(state, EFER) & 1 << 10)
    wide = long or bool(state["cr4"] & _PAE)
    names = ("pml4e", "pdpte", "pde", "pte")[0 if long else 1 if wide else 2 :]
    bits, size = (9, 8) if wide else (10, 4)
    table = state["cr3"] & (_ADDRESS if long else ~0x1F & 0xFFFF_FFFF if wide else ~0xFFF & 0xFFFF_FFFF)
    lines: list[str] = []
    for level, name in zip(range(len(names), 0, -1), names, strict=True):
        at = 12 + bits * (level - 1)
        index = gva >> at & (1 << bits) - 1
        gpa = table + size * index
        data = stub.target.read(0, gpa, size, True)
        if len(data) != size:
            return [*lines, f"{name} at gpa {gpa:#x} is not in RAM"]
        entry = int.from_bytes(data, "little")
        lines.append(f"{name}[{index:#x}] at gpa {gpa:#x}: {entry:#018x} {_flags(entry)}")
        large = entry & _PS and level in (2, 3) and (wide or state["cr4"] & _PSE)
        if not entry & _P or large:
            return lines
        table = entry & _ADDRESS
    return lines


def _flags(entry: int) -> str:
    names = (
        (_P, "present"), (_W, "writable"), (_U, "user"), (_A, "accessed"), (_D, "dirty"),
        (_PS, "large"), (_G, "global"), (_NX, "no-execute"),
    )  # fmt: skip
    return " ".join(name for bit, name in names if entry & bit)


def _gpa(stub: Stub, cpu: int, words: list[str]) -> str:
    gpa, length = _number(words, 0), _number(words, 1, 64)
    data = stub.target.read(cpu, gpa, min(length, MOST_BYTES), True)
    if not data and length:
        return f"gpa {gpa:#x} is not RAM\n"
    lines = []
    for at in range(0, len(data), 16):
        row = data[at : at + 16]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in row)
        lines.append(f"{gpa + at:012x}  {row.hex(' '):47}  {text}\n")
    return "".join(lines)


def _step_interrupts(stub: Stub, cpu: int, words: list[str]) -> str:
    if words != ["on"] and words != ["off"]:
        raise ValueError("expected on or off")
    stub.sstep = stub.sstep & ~NO_INTERRUPTS | (NO_INTERRUPTS if words == ["off"] else 0)
    return f"interrupts {'are let in' if words == ['on'] else 'wait'} while stepping\n"


_COMMANDS: dict[str, Callable[[Stub, int, list[str]], str]] = {
    "help": _help,
    "info": _info,
    "registers": _registers,
    "translate": _translate,
    "gpa": _gpa,
    "stepirq": _step_interrupts,
}
