"""The PVH entry: 32-bit protected mode straight into an uncompressed kernel.

EBX points to `hvm_start_info`, version 1:

    0x00 magic 0x336ec578   0x04 version 1          0x08 flags
    0x0C number of modules  0x10 module list        0x18 command line
    0x20 RSDP               0x28 memory map         0x30 entries of the memory map

Spec: Xen docs/misc/pvh.pandoc, xen/include/public/arch-x86/hvm/start_info.h.
"""

from __future__ import annotations

from struct import pack

from .entry import (
    CMDLINE,
    GDT,
    START_INFO,
    CpuState,
    Load,
    check_kernel,
    encode_cmdline,
    gdt,
    memory_map,
    place_initrd,
    protected_mode,
)
from .kernel_image import Data, Vmlinux

MAGIC = 0x336E_C578
CMDLINE_SIZE = 2047
"""COMMAND_LINE_SIZE of Linux on x86, without the NUL."""
INITRD_MAX = 0x7FFF_FFFF
_MODULES, _MAP = START_INFO + 0x40, START_INFO + 0x80


def load(
    kernel: Vmlinux,
    initrd: Data | None,
    append: str,
    ranges: list[tuple[int, int]],
    firmware: tuple[int, int],
    put: Load,
) -> CpuState:
    """Put everything into memory and return the state to start with.

    `ranges` is RAM as (gpa, length), `firmware` the ACPI tables as (gpa, length), with
    the RSDP first.

    Raises:
        ConfigError: something does not fit.
        ImageError: never here; the kernel was checked when it was parsed.
    """
    entry = kernel.pvh_entry
    assert entry is not None
    low_end = ranges[0][1]
    cmdline = encode_cmdline(append, CMDLINE_SIZE)
    check_kernel(kernel.start, kernel.end, low_end, kernel.path)
    for segment in kernel.segments:
        put(segment.paddr, segment.data)
    modules = b""
    if initrd is not None:
        gpa = place_initrd(len(initrd), kernel.end, low_end, INITRD_MAX)
        put(gpa, initrd)
        modules = pack("<4Q", gpa, len(initrd), 0, 0)
        put(_MODULES, modules)
    entries = memory_map(ranges, firmware)
    put(_MAP, b"".join(pack("<QQII", gpa, length, kind, 0) for gpa, length, kind in entries))
    put(CMDLINE, cmdline)
    put(GDT, gdt())
    put(
        START_INFO,
        pack(
            "<4I4QII",
            MAGIC, 1, 0, 1 if modules else 0,
            _MODULES if modules else 0, CMDLINE, firmware[0], _MAP, len(entries), 0,
        ),
    )  # fmt: skip
    state = protected_mode(entry)
    state["gpr"][3] = START_INFO
    return state
