"""What a machine is made of, checked before anything is built."""

from __future__ import annotations

import os
from dataclasses import dataclass

from .errors import ConfigError

MIB = 1 << 20
SMALLEST = 16 * MIB
"""Least memory that a Linux kernel can start in."""
MAX_CPUS = 64
"""Most virtual processors that the translator runs, a host thread each."""
BOOTS = ("auto", "pvh", "linux64", "linux32")
_UNITS = {"": MIB, "K": 1 << 10, "M": MIB, "G": 1 << 30, "T": 1 << 40}


def parse_size(text: str | int) -> int:
    """Memory size in bytes from `512M`, `1G`, `262144K`; a bare number is MiB.

    Raises:
        ConfigError: not a size, not whole pages, less than 16 MiB, or more than
            the host could address.
    """
    given = str(text).strip()
    digits = given.rstrip("KMGTkmgtiB") if given else ""
    unit = given[len(digits) :].upper().removesuffix("IB").removesuffix("B")
    if not (digits.isascii() and digits.isdigit()) or unit not in _UNITS:
        raise ConfigError(
            "memory-size",
            f"memory: {given!r} is not a size such as 512M, 1G or 262144K",
        )
    size = int(digits) * _UNITS[unit]
    limit = 1 << address_bits()
    if size < SMALLEST:
        raise ConfigError("memory-size", f"memory: {given} is too small, Linux needs at least 16M to start")
    if size > limit:
        raise ConfigError(
            "memory-size",
            f"memory: {given} is more than this host can address ({limit >> 40}T)",
        )
    if size % 4096:
        raise ConfigError("memory-size", f"memory: {given} is not a multiple of 4K")
    return size


def address_bits() -> int:
    """Bits of a host-physical address, at most 46 (user space holds 47 in all)."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("address sizes"):
                    return min(int(line.split(":")[1].split()[0]), 46)
    except (OSError, ValueError, IndexError):
        pass
    return 46


@dataclass(frozen=True)
class MachineConfig:
    """A checked description of one machine.

    Attributes:
        kernel: path of a bzImage or an ELF vmlinux.
        initrd: path of an initramfs, or None.
        append: kernel command line.
        memory: guest RAM in bytes.
        cpus: number of virtual processors.
        engine: `auto` or the name of an engine.
        boot: `auto`, `pvh`, `linux64` or `linux32`.
    """

    kernel: str
    initrd: str | None = None
    append: str = ""
    memory: int = 512 * MIB
    cpus: int = 1
    engine: str = "auto"
    boot: str = "auto"

    @classmethod
    def check(
        cls,
        *,
        kernel: str | os.PathLike[str] | None,
        initrd: str | os.PathLike[str] | None = None,
        append: str = "",
        memory: str | int = "512M",
        cpus: int = 1,
        engine: str = "auto",
        boot: str = "auto",
    ) -> MachineConfig:
        """Build a config from what a user wrote.

        Raises:
            ConfigError: one sentence that names the option.
        """
        if kernel is None:
            raise ConfigError("kernel-missing", "kernel: nothing to boot, name a kernel or an image")
        if type(cpus) is not int or not 1 <= cpus <= MAX_CPUS:
            raise ConfigError("cpus", f"cpus: found {cpus!r}, expected 1 to {MAX_CPUS}")
        if boot not in BOOTS:
            raise ConfigError("boot", f"boot: {boot!r} is not one of {', '.join(BOOTS)}")
        return cls(
            kernel=os.fspath(kernel),
            initrd=None if initrd is None else os.fspath(initrd),
            append=append,
            memory=parse_size(memory),
            cpus=cpus,
            engine=engine,
            boot=boot,
        )
