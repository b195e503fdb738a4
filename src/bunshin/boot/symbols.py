"""Names of a guest kernel's functions, for those who look at it from outside.

Three sources: lists of lines `address type name` as in System.map and /proc/kallsyms,
the symbol table of an ELF file, and the table that every Linux kernel carries for its
own backtraces (`kallsyms.py`). Addresses are as linked: a kernel that is entered by
PVH, as here, does not move itself.

Files are untrusted; what cannot be understood raises ImageError.
"""

from __future__ import annotations

from struct import error as struct_error
from struct import unpack_from

from ..errors import ImageError
from . import kallsyms
from .kernel_image import Data, Vmlinux, parse, read_file

Symbols = list[tuple[int, str]]
SHT_SYMTAB = 2
STT_NOTYPE, STT_FUNC = 0, 2
SHF_EXECINSTR = 4
_CODE = frozenset("tTwW")


def from_file(path: str) -> Symbols:
    """Functions named by a System.map, a copy of /proc/kallsyms or an ELF file.

    Returns:
        `(address, name)`, sorted.
    Raises:
        ImageError: the file cannot be read or names no functions.
    """
    data = read_file(path, "symbols")
    found = _elf(data, path) if data[:4] == b"\x7fELF" else _lines(data)
    if not found:
        raise ImageError("symbols-none", f"symbols {path}: names no functions")
    if not found[-1][0]:
        raise ImageError("symbols-hidden", f"symbols {path}: all addresses are zero; read it as root")
    return found


def from_kernel(path: str) -> Symbols:
    """Functions of a kernel file, by its symbol table or by what it carries itself.

    Returns:
        `(address, name)`, sorted; empty when it has neither.
    Raises:
        ImageError: it is no kernel.
    """
    data = read_file(path, "kernel")
    found = _elf(data, path) if data[:4] == b"\x7fELF" else []
    if found:
        return found
    names = of_kernel(path)[1]
    return sorted((address, name) for address, kind, name in names if kind in _CODE)


def of_kernel(path: str) -> tuple[Vmlinux | None, kallsyms.Found]:
    """A kernel file, unpacked, and all the symbols that it carries itself.

    Returns:
        The kernel, None where only the guest can unpack it; `(address, type, name)` in
        the table's order, empty when there is no table.
    Raises:
        ImageError: it is no kernel.
    """
    kernel = parse(read_file(path, "kernel"), path)
    if not isinstance(kernel, Vmlinux) and kernel.packing == "lzo":
        return None, []  # only the guest itself can unpack that
    vmlinux = kernel if isinstance(kernel, Vmlinux) else kernel.vmlinux()
    for segment in vmlinux.segments:
        names = kallsyms.find(segment.data)
        if names:
            return vmlinux, names
    return vmlinux, []


def _lines(data: Data) -> Symbols:
    found: Symbols = []
    for line in bytes(data).decode("ascii", "replace").splitlines():
        words = line.split()
        if len(words) >= 3 and words[1] in _CODE:
            try:
                found.append((int(words[0], 16), words[2]))
            except ValueError:
                continue
    return sorted(found)


def _elf(data: Data, path: str) -> Symbols:
    try:
        return _symbol_table(data)
    except struct_error as error:
        raise ImageError("symbols-format", f"symbols {path}: the ELF tables are cut off") from error


def _symbol_table(data: Data) -> Symbols:
    wide = data[4:5] == b"\x02"
    (table,) = unpack_from("<Q" if wide else "<I", data, 40 if wide else 32)
    entry_size, count = unpack_from("<HH", data, 58 if wide else 46)
    sections = []
    for index in range(count if table else 0):
        at = table + index * entry_size
        if wide:
            _, kind, flags, _, offset, size, link = unpack_from("<IIQQQQI", data, at)
        else:
            _, kind, flags, _, offset, size, link = unpack_from("<7I", data, at)
        sections.append((kind, flags, offset, size, link))
    found: Symbols = []
    for kind, _, offset, size, link in sections:
        if kind != SHT_SYMTAB or link >= len(sections):
            continue
        _, _, names_at, names_size, _ = sections[link]
        names = bytes(data[names_at : names_at + names_size])
        step = 24 if wide else 16
        for at in range(offset, offset + size, step):
            if wide:
                name, info, _, section, value = unpack_from("<IBBHQ", data, at)
            else:
                name, value, _, info, _, section = unpack_from("<IIIBBH", data, at)
            if info & 15 not in (STT_NOTYPE, STT_FUNC) or not 0 < section < len(sections):
                continue
            if value and sections[section][1] & SHF_EXECINSTR:
                word = names[name : max(names.find(b"\0", name), name)].decode("ascii", "replace")
                if word and " " not in word:
                    found.append((value, word))
    return sorted(found)
