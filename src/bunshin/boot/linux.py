"""The 64- and 32-bit Linux boot protocols: ESI or RSI points to `boot_params`.

A 64-bit kernel is entered in long mode, a 32-bit one in protected mode with paging off.

Fields of boot_params that are filled in here:

    0x070 acpi_rsdp_addr  0x0C0 ext_ramdisk_image  0x1E8 e820_entries  0x1F1 setup header
    0x2D0 e820_table (20 bytes an entry)

A bzImage is entered in its protected-mode part (32-bit: at its start, 64-bit: at 0x200)
and unpacks itself; a vmlinux is entered at its ELF entry point.

Spec: Linux Documentation/arch/x86/boot.rst, "32-bit Boot Protocol" and "64-bit Boot
Protocol", and zero-page.rst.
"""

from __future__ import annotations

from struct import pack, pack_into

from ..errors import ImageError
from .entry import (
    BOOT_CODE,
    BOOT_PARAMS,
    CMDLINE,
    GDT,
    PAGE_TABLES,
    CpuState,
    Load,
    check_kernel,
    encode_cmdline,
    gdt,
    linux_gdt32,
    long_mode,
    memory_map,
    page_tables,
    place_initrd,
    protected_mode,
)
from .kernel_image import BzImage, Data, Vmlinux

ENTRY_64 = 0x200
LOADED_HIGH, CAN_USE_HEAP = 0x01, 0x80
CMDLINE_SIZE = 2047
INITRD_MAX = 0x7FFF_FFFF


def load(
    kernel: BzImage | Vmlinux,
    initrd: Data | None,
    append: str,
    ranges: list[tuple[int, int]],
    firmware: tuple[int, int],
    put: Load,
    bits: int,
) -> CpuState:
    """Put everything into memory and return the state to start with.

    `bits` is the mode to enter the kernel in, 32 or 64; other arguments as for `pvh.load`.

    Raises:
        ConfigError: something does not fit.
        ImageError: the kernel has no entry for that mode.
    """
    low_end = ranges[0][1]
    params = bytearray(4096)
    largest, highest = CMDLINE_SIZE, INITRD_MAX
    if isinstance(kernel, BzImage):
        if bits == 64 and not kernel.entry_64:
            raise ImageError("kernel-not-64", f"kernel {kernel.path}: has no 64-bit entry (xloadflags bit 0)")
        start = kernel.preferred
        end = start + max(kernel.init_size, len(kernel.code))
        check_kernel(start, end, low_end, kernel.path)
        put(start, kernel.code)
        rip = start + (ENTRY_64 if bits == 64 else 0)
        params[0x1F1 : 0x1F1 + len(kernel.header)] = kernel.header
        largest = kernel.cmdline_size or 255
        highest = min(highest, kernel.initrd_max or highest)
    else:
        if kernel.bits != bits:
            raise ImageError(
                f"kernel-not-{bits}",
                f"kernel {kernel.path}: is a {kernel.bits}-bit kernel, its {bits}-bit entry was asked for",
            )
        start, end, rip = kernel.start, kernel.end, kernel.entry
        check_kernel(start, end, low_end, kernel.path)
        for segment in kernel.segments:
            put(segment.paddr, segment.data)
        pack_into("<H", params, 0x1FE, 0xAA55)
        pack_into("<4sH", params, 0x202, b"HdrS", 0x20F)
        pack_into("<I", params, 0x230, 0x20_0000)
        pack_into("<I", params, 0x238, CMDLINE_SIZE)
    cmdline = encode_cmdline(append, largest)
    params[0x210] = 0xFF
    params[0x211] = (params[0x211] | LOADED_HIGH) & ~CAN_USE_HEAP
    pack_into("<I", params, 0x214, start & 0xFFFF_FFFF)
    pack_into("<I", params, 0x228, CMDLINE)
    if initrd is not None:
        gpa = place_initrd(len(initrd), end, low_end, highest)
        put(gpa, initrd)
        pack_into("<II", params, 0x218, gpa, len(initrd))
    entries = memory_map(ranges, firmware)
    params[0x1E8] = len(entries)
    for at, (gpa, length, kind) in enumerate(entries):
        params[0x2D0 + 20 * at : 0x2D0 + 20 * (at + 1)] = pack("<QQI", gpa, length, kind)
    pack_into("<Q", params, 0x070, firmware[0])
    put(BOOT_PARAMS, params)
    put(CMDLINE, cmdline)
    if bits == 64:
        put(GDT, gdt())
        put(PAGE_TABLES, page_tables())
        state = long_mode(rip)
    else:
        put(GDT, linux_gdt32())
        state = protected_mode(rip, BOOT_CODE)
    state["gpr"][6] = BOOT_PARAMS
    return state
