"""Processor states to enter a kernel with, and what lies in low memory for it.

    0x0500   global descriptor table
    0x6000   PVH start info, modules, memory map
    0x7000   Linux boot_params ("zero page")
    0x9000   page tables for the 64-bit entry: PML4, PDPT, 4 page directories
    0x20000  kernel command line
    0x9FC00  top of conventional memory
    0xE0000  ACPI tables

Segments and access rights as in `CpuState` (crates/bunshin-core/src/state.rs).
"""

from __future__ import annotations

from collections.abc import Callable
from mmap import mmap
from struct import pack
from typing import Any

from ..errors import ConfigError

GDT = 0x500
START_INFO = 0x6000
BOOT_PARAMS = 0x7000
PAGE_TABLES = 0x9000
CMDLINE, CMDLINE_MAX = 0x2_0000, 0x1_0000
LOW_END, LOW_RESERVED = 0x9_FC00, 0xA_0000
KERNEL_MIN = 0x10_0000

CR0_PE, CR0_ET, CR0_NE, CR0_WP, CR0_PG = 1 << 0, 1 << 4, 1 << 5, 1 << 16, 1 << 31
CR4_PAE = 1 << 5
EFER, EFER_LME, EFER_LMA = 0xC000_0080, 1 << 8, 1 << 10
CODE32, CODE64, DATA, TSS = 0x08, 0x10, 0x18, 0x20
BOOT_CODE = 0x10
"""__BOOT_CS of Linux's 32-bit protocol, which has __BOOT_DS at DATA."""
_ACCESS_CODE32, _ACCESS_CODE64, _ACCESS_DATA, _ACCESS_TSS = 0xC09B, 0xA09B, 0xC093, 0x008B
_UNUSABLE = 1 << 16

CpuState = dict[str, Any]
"""The fields of CpuState by name, as `Vcpu.set_state` takes them."""


def gdt() -> bytes:
    """Null, 32-bit code, 64-bit code, data, TSS: what the selectors above name."""
    return _gdt(_ACCESS_CODE64)


def linux_gdt32() -> bytes:
    """As `gdt`, with 32-bit code at BOOT_CODE too."""
    return _gdt(_ACCESS_CODE32)


def _gdt(third: int) -> bytes:
    def flat(access: int) -> int:
        return 0xFFFF | (access & 0xFF) << 40 | 0xF << 48 | (access >> 12) << 52

    tss = 0x67 | _ACCESS_TSS << 40
    return pack("<6Q", 0, flat(_ACCESS_CODE32), flat(third), flat(_ACCESS_DATA), tss, 0)


def _state(code: int, code_access: int) -> CpuState:
    def segment(selector: int, access: int, limit: int = 0xFFFF_FFFF) -> dict[str, int]:
        return {"selector": selector, "base": 0, "limit": limit, "access": access}

    data = segment(DATA, _ACCESS_DATA)
    return {
        "gpr": [0] * 16,
        "rip": 0,
        "rflags": 2,
        # es cs ss ds fs gs
        "segments": [data, segment(code, code_access), data, data, data, data],
        "ldt": segment(0, 0x82 | _UNUSABLE, 0xFFFF),
        "tr": segment(TSS, _ACCESS_TSS, 0x67),
        "gdt": {"base": GDT, "limit": len(gdt()) - 1},
        "idt": {"base": 0, "limit": 0},
        "cr0": CR0_PE | CR0_ET,
        "cr2": 0,
        "cr3": 0,
        "cr4": 0,
        "cr8": 0,
        "xcr0": 1,
        "dr": [0, 0, 0, 0, 0xFFFF_0FF0, 0x400],
        "msrs": [(EFER, 0)],
        "xsave": b"",
        "lapic": b"",
        "tsc": 0,
        "halted": False,
        "interrupt_shadow": False,
        "nmi_blocked": False,
    }


def protected_mode(rip: int, code: int = CODE32) -> CpuState:
    """32-bit protected mode, flat segments, paging off; `code` selects a 32-bit segment."""
    state = _state(code, _ACCESS_CODE32)
    state["rip"] = rip
    return state


def long_mode(rip: int) -> CpuState:
    """64-bit mode over identity page tables at PAGE_TABLES."""
    state = _state(CODE64, _ACCESS_CODE64)
    state["rip"] = rip
    state["cr0"] = CR0_PE | CR0_ET | CR0_NE | CR0_WP | CR0_PG
    state["cr3"] = PAGE_TABLES
    state["cr4"] = CR4_PAE
    state["msrs"] = [(EFER, EFER_LME | EFER_LMA)]
    return state


def page_tables() -> bytes:
    """Identity mapping of the first 4 GiB in 2 MiB pages."""
    table = 0x1000
    out = pack("<Q4088x", PAGE_TABLES + table | 3)
    out += pack("<4Q4064x", *(PAGE_TABLES + (2 + at) * table | 3 for at in range(4)))
    return out + pack("<2048Q", *(at << 21 | 0x83 for at in range(2048)))


def memory_map(ranges: list[tuple[int, int]], firmware: tuple[int, int]) -> list[tuple[int, int, int]]:
    """The e820 map as (gpa, length, type): 1 RAM, 2 reserved."""
    (_, low), *high = ranges
    start, length = firmware
    return [
        (0, LOW_END, 1),
        (LOW_END, LOW_RESERVED - LOW_END, 2),
        (start, length, 2),
        (KERNEL_MIN, low - KERNEL_MIN, 1),
        *((gpa, size, 1) for gpa, size in high),
    ]


def encode_cmdline(text: str, largest: int) -> bytes:
    """The command line with its final NUL.

    Raises:
        ConfigError: it is too long for the kernel or has a NUL or line break.
    """
    data = text.encode("utf-8", "surrogateescape")
    largest = min(largest, CMDLINE_MAX - 1)
    if len(data) > largest:
        raise ConfigError(
            "cmdline-too-long",
            f"append: the command line has {len(data)} bytes, the kernel takes {largest}",
        )
    if b"\0" in data or b"\n" in data:
        raise ConfigError("cmdline-control", "append: the command line has a NUL or a line break")
    return data + b"\0"


def place_initrd(length: int, kernel_end: int, low_end: int, highest: int) -> int:
    """A gpa for the initrd: as high as the kernel can reach, on a page.

    Raises:
        ConfigError: it does not fit between the kernel and the end of memory.
    """
    top = min(low_end, highest + 1)
    gpa = top - length & ~0xFFF
    if gpa < kernel_end:
        raise ConfigError(
            "initrd-too-large",
            f"initrd: {_mib(length)} MiB do not fit into memory above the kernel, which ends at "
            f"{_mib(kernel_end)} MiB of {_mib(low_end)}; give the machine more memory",
        )
    return gpa


def check_kernel(start: int, end: int, low_end: int, path: str) -> None:
    """Raise ConfigError when a kernel does not fit into memory."""
    if start < KERNEL_MIN:
        raise ConfigError(
            "kernel-address", f"kernel {path}: wants to be at {start:#x}, expected 1 MiB or above"
        )
    if end > low_end:
        raise ConfigError(
            "kernel-too-large",
            f"kernel {path}: needs memory up to {_mib(end)} MiB, the machine has {_mib(low_end)}",
        )


def _mib(length: int) -> int:
    return -(-length // (1 << 20))


Load = Callable[[int, bytes | bytearray | memoryview | mmap], None]
"""Copies bytes to a gpa."""
