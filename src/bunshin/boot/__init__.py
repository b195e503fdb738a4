"""From files to a machine that is about to run its first instruction."""

from __future__ import annotations

from ..config import MachineConfig
from ..errors import ConfigError, ImageError
from . import linux, pvh
from .entry import CpuState, Load
from .kernel_image import BzImage, Data, Vmlinux, parse, read_file


def load(
    config: MachineConfig,
    ranges: list[tuple[int, int]],
    firmware: tuple[int, bytes],
    put: Load,
) -> CpuState:
    """Load kernel, initrd and firmware tables, and return the first processor's state.

    `ranges` is RAM as (gpa, length), `firmware` is (gpa, tables), `put` copies bytes
    to a gpa. With `boot="auto"` a kernel with a PVH entry is unpacked on the host and
    entered there; others are entered by Linux's protocol for their bits, 32-bit ones
    unpacked on the host as well.

    Raises:
        ImageError: a file that cannot be read or is not what it should be.
        ConfigError: something does not fit into memory, or the kernel has no entry
            of the kind that was asked for.
    """
    kernel = parse(read_file(config.kernel, "kernel"), config.kernel)
    initrd = None if config.initrd is None else _read_initrd(config.initrd, ranges[0][1])
    gpa, tables = firmware
    put(gpa, tables)
    where = (gpa, len(tables) + 0xFFF & ~0xFFF)
    if config.boot in {"auto", "pvh"}:
        unpacked = _unpacked(kernel, required=config.boot == "pvh")
        if unpacked is not None and unpacked.pvh_entry is not None:
            return pvh.load(unpacked, initrd, config.append, ranges, where, put)
        if unpacked is not None and unpacked.bits == 32:
            kernel = unpacked
    wide = kernel.entry_64 if isinstance(kernel, BzImage) else kernel.bits == 64
    bits = {"linux64": 64, "linux32": 32}.get(config.boot, 64 if wide else 32)
    return linux.load(kernel, initrd, config.append, ranges, where, put, bits)


def kernel_bits(path: str) -> int:
    """32 or 64: what a kernel file is made for.

    Raises:
        ImageError: it cannot be read or is no kernel.
    """
    kernel = parse(read_file(path, "kernel"), path)
    if isinstance(kernel, BzImage):
        return 64 if kernel.entry_64 else 32
    return kernel.bits


def _read_initrd(path: str, low_end: int) -> Data:
    try:
        return read_file(path, "initrd", low_end)
    except ImageError as error:
        if error.slug != "initrd-too-large":
            raise
        raise ConfigError(
            error.slug, f"initrd {path}: is larger than the machine's memory ({low_end >> 20} MiB)"
        ) from None


def _unpacked(kernel: BzImage | Vmlinux, required: bool) -> Vmlinux | None:
    """The kernel as it lies in memory, with a PVH entry if that is required; None when
    it can only unpack itself.
    """
    if isinstance(kernel, Vmlinux):
        vmlinux = kernel
    elif kernel.packing in {"lzo", "absent"} and not required:
        # LZO is the one compression of Linux that we cannot unpack; the guest can.
        return None
    else:
        vmlinux = kernel.vmlinux()
    if vmlinux.pvh_entry is None and required:
        raise ImageError("kernel-no-pvh", f"kernel {kernel.path}: has no PVH entry note")
    return vmlinux
