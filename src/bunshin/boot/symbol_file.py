"""A file that gives a debugger what a stock kernel knows of itself: an ELF file with a
symbol table, and call frame information made of the kernel's own unwind tables.

It holds neither code nor data: those a debugger reads from the guest. Sections exist so
that symbols have something to belong to; where the kernel's are is told by its symbols
(`_text`, `_etext`, `_sinittext`, `_einittext`) and its segments. Per-processor variables,
whose addresses are offsets, are absolute symbols.

Spec: System V ABI, chapter 4 (ELF). Not modelled: types, lines.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from struct import pack

from ..errors import ImageError
from . import orc
from .kallsyms import Found
from .kernel_image import Vmlinux
from .symbols import of_kernel

_EM = {64: 62, 32: 3}
_SHF_WRITE, _SHF_ALLOC, _SHF_EXECINSTR = 1, 2, 4
_SHT_PROGBITS, _SHT_SYMTAB, _SHT_STRTAB, _SHT_NOBITS = 1, 2, 3, 8
_SHN_ABS = 0xFFF1
_OBJECT, _FUNC = 1, 2
_CODE = frozenset("tTwW")


@dataclass
class _Section:
    name: str
    kind: int
    flags: int = 0
    address: int = 0
    data: bytes = b""
    length: int = 0
    link: int = 0
    info: int = 0
    entry: int = 0


def write(kernel: str) -> bytes:
    """The symbol file for a kernel file.

    Raises:
        ImageError: it is no kernel, or one without symbols.
    """
    vmlinux, symbols = of_kernel(kernel)
    if not symbols or vmlinux is None:
        raise ImageError("symbols-none", f"kernel {kernel}: names no symbols (CONFIG_KALLSYMS)")
    return build(vmlinux, symbols)


def build(vmlinux: Vmlinux, symbols: Found) -> bytes:
    """The symbol file for an unpacked kernel and its symbols."""
    named = {name: address for address, _, name in symbols}
    sections = _places(vmlinux, named)
    table, names, local = _table(vmlinux.bits, symbols, sections)
    frames = _frames(vmlinux, named)
    if frames:
        sections.append(_Section(".debug_frame", _SHT_PROGBITS, data=frames))
    wide = vmlinux.bits == 64
    # The string table comes behind this one; both counts start behind the empty section.
    sections.append(
        _Section(
            ".symtab",
            _SHT_SYMTAB,
            data=table,
            link=len(sections) + 2,
            info=local,
            entry=24 if wide else 16,
        )
    )
    sections.append(_Section(".strtab", _SHT_STRTAB, data=names))
    return _elf(vmlinux, sections)


def _places(vmlinux: Vmlinux, named: dict[str, int]) -> list[_Section]:
    """Sections without contents, in order of address."""
    code = [
        (start, end, name)
        for name, first, last in ((".text", "_text", "_etext"), (".init.text", "_sinittext", "_einittext"))
        if (start := named.get(first, 0)) < (end := named.get(last, 0))
    ]
    sections = []
    for number, segment in enumerate(vmlinux.segments):
        at, end = segment.vaddr, segment.vaddr + segment.memsz
        if at < 4096:
            continue  # per-processor variables
        for start, stop, name in code:
            if at <= start and stop <= end:
                if at < start:
                    sections.append(_nothing(f".data.{number}", at, start, _SHF_WRITE))
                sections.append(_nothing(name, start, stop, _SHF_EXECINSTR))
                at = stop
        if at < end:
            sections.append(
                _nothing(f".data.{number}" if at != segment.vaddr else ".data", at, end, _SHF_WRITE)
            )
    return sections


def _nothing(name: str, start: int, end: int, flags: int) -> _Section:
    return _Section(name, _SHT_NOBITS, _SHF_ALLOC | flags, start, length=end - start)


def _table(bits: int, symbols: Found, sections: list[_Section]) -> tuple[bytes, bytes, int]:
    """Symbol table, string table, and how many symbols are local."""
    names = bytearray(b"\0")
    # A kernel's size of a symbol is what lies between it and the next.
    places = sorted({address for address, _, _ in symbols})
    behind = dict(pairwise(places))
    rows: list[tuple[bool, bytes]] = []
    for address, kind, name in symbols:
        section, end = _SHN_ABS, 0
        if kind not in "aA":
            for number, place in enumerate(sections, 1):
                if place.address <= address < place.address + place.length:
                    section, end = number, place.address + place.length
                    break
        length = min(behind.get(address, end), end) - address if section != _SHN_ABS else 0
        is_global = kind.isupper()
        info = is_global << 4 | (_FUNC if kind in _CODE else _OBJECT)
        at = len(names)
        names += name.encode("ascii", "replace") + b"\0"
        if bits == 64:
            row = pack("<IBBHQQ", at, info, 0, section, address, max(length, 0))
        else:
            row = pack("<IIIBBH", at, address & 0xFFFF_FFFF, max(length, 0), info, 0, section)
        rows.append((is_global, row))
    rows.sort(key=lambda row: row[0])
    local = 1 + sum(not is_global for is_global, _ in rows)
    empty = bytes(24 if bits == 64 else 16)
    return empty + b"".join(row for _, row in rows), bytes(names), local


def _frames(vmlinux: Vmlinux, named: dict[str, int]) -> bytes:
    ips = _bytes(vmlinux, named, "orc_unwind_ip")
    entries = _bytes(vmlinux, named, "orc_unwind")
    if vmlinux.bits != 64 or ips is None or entries is None:
        return b""
    return orc.frames(ips, named["__start_orc_unwind_ip"], entries)


def _bytes(vmlinux: Vmlinux, named: dict[str, int], table: str) -> memoryview | None:
    start, end = named.get(f"__start_{table}", 0), named.get(f"__stop_{table}", 0)
    for segment in vmlinux.segments:
        at = start - segment.vaddr
        if start < end and at >= 0 and at + end - start <= len(segment.data):
            return segment.data[at : at + end - start]
    return None


def _elf(vmlinux: Vmlinux, sections: list[_Section]) -> bytes:
    wide = vmlinux.bits == 64
    sections = [_Section("", 0), *sections, _Section(".shstrtab", _SHT_STRTAB)]
    names = bytearray()
    offsets = []
    for section in sections:
        offsets.append(len(names))
        names += section.name.encode() + b"\0"
    sections[-1].data = bytes(names)
    head = 64 if wide else 52
    body = bytearray()
    table = bytearray()
    for section, name in zip(sections, offsets, strict=True):
        body += bytes(-(head + len(body)) & 7)
        at, length = head + len(body), section.length or len(section.data)
        body += section.data
        table += pack(
            "<IIQQQQIIQQ" if wide else "<10I",
            name,
            section.kind,
            section.flags,
            section.address,
            at if section.kind else 0,
            length,
            section.link,
            section.info,
            8 if section.data else 0,
            section.entry,
        )
    body += bytes(-(head + len(body)) & 7)
    ident = b"\x7fELF" + bytes((2 if wide else 1, 1, 1)) + bytes(9)
    header = pack(
        "<HHIQQQIHHHHHH" if wide else "<HHIIIIIHHHHHH",
        2,
        _EM[vmlinux.bits],
        1,
        0,
        0,
        head + len(body),
        0,
        head,
        0,
        0,
        64 if wide else 40,
        len(sections),
        len(sections) - 1,
    )
    return ident + header + bytes(body) + bytes(table)
