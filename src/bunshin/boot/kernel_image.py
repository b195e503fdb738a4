"""Linux kernels as files: bzImage, and the vmlinux inside or beside it.

bzImage: a real-mode part of (setup_sects + 1) sectors with the setup header at
0x1F1, then the protected-mode part, which holds a compressed vmlinux ("payload").
Spec: Linux Documentation/arch/x86/boot.rst, protocol 2.08 and later for the payload.

vmlinux: an ELF executable whose PT_LOAD segments go to their physical addresses. A
PVH note (name "Xen", type 18 PHYS32_ENTRY) names the 32-bit entry point.
Spec: System V gABI, chapters 4 and 5; Xen public/elfnote.h.

Files are untrusted: every offset and size is checked, and unpacking stops at a limit.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from stat import S_ISREG
from struct import error as struct_error
from struct import unpack_from

from ..errors import ImageError

LARGEST = 1 << 30
"""No kernel is larger, packed or unpacked (bytes)."""
PHYS32_ENTRY = 18
Data = bytes | mmap.mmap
XLF_KERNEL_64 = 1
_LZ4_BLOCK = 8 << 20


@dataclass(frozen=True)
class Segment:
    """A piece of the kernel: `data` goes to gpa `paddr`, zeroes follow up to `memsz`."""

    paddr: int
    vaddr: int
    data: memoryview
    memsz: int


@dataclass(frozen=True)
class Vmlinux:
    """An ELF kernel, taken apart.

    Attributes:
        bits: 32 or 64.
        entry: physical entry point.
        pvh_entry: physical PVH entry point, or None.
        end: first gpa after the kernel and its zeroed memory.
    """

    path: str
    bits: int
    entry: int
    pvh_entry: int | None
    segments: tuple[Segment, ...]

    @property
    def start(self) -> int:
        return min(segment.paddr for segment in self.segments)

    @property
    def end(self) -> int:
        return max(segment.paddr + segment.memsz for segment in self.segments)


@dataclass(frozen=True)
class BzImage:
    """A bzImage, taken apart.

    Attributes:
        header: the setup header, file offsets 0x1F1 up to its end.
        code: the protected-mode part.
        payload: the compressed vmlinux inside `code`.
    """

    path: str
    header: bytes
    version: int
    code: memoryview
    payload: memoryview
    entry_64: bool
    cmdline_size: int
    initrd_max: int
    alignment: int
    relocatable: bool
    preferred: int
    init_size: int

    @property
    def packing(self) -> str:
        """How the payload is compressed: `lz4`, `gzip`, ..., `lzo`, `none` or `unknown`;
        `absent` when there is none, as in programs that only look like a kernel.
        """
        if not self.payload:
            return "absent"
        return _packing(bytes(self.payload[:6]))[0]

    def vmlinux(self) -> Vmlinux:
        """Unpack the kernel inside.

        Raises:
            ImageError: an unknown or damaged compression, or not an ELF kernel.
        """
        return parse_elf(decompress(self.payload, self.path), self.path)


def read_file(path: str, what: str, largest: int = LARGEST) -> Data:
    """A whole file, mapped where that can be; the file must not shrink meanwhile.

    Raises:
        ImageError: it cannot be read, is empty or has more than `largest` bytes.
    """
    data: Data
    try:
        with open(path, "rb") as file:
            if S_ISREG(os.fstat(file.fileno()).st_mode) and os.fstat(file.fileno()).st_size:
                data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            else:
                data = file.read(largest + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ImageError(f"{what}-unreadable", f"{what} {path}: {reason}") from error
    if not data:
        raise ImageError(f"{what}-empty", f"{what} {path}: the file is empty")
    if len(data) > largest:
        raise ImageError(
            f"{what}-too-large", f"{what} {path}: larger than {largest >> 20} MiB, the most allowed"
        )
    return data


def parse(data: Data, path: str) -> BzImage | Vmlinux:
    """Tell what kind of kernel `data` is and take it apart.

    Raises:
        ImageError: neither a bzImage nor an ELF kernel for x86, or damaged.
    """
    if data[:4] == b"\x7fELF":
        return parse_elf(data, path)
    if data[0x202:0x206] == b"HdrS":
        return parse_bzimage(data, path)
    raise _bad(
        path,
        f"found {data[:4].hex(' ')} at offset 0 and {data[0x202:0x206].hex(' ') or 'nothing'} at "
        "0x202, expected an ELF kernel (7f 45 4c 46) or a bzImage (48 64 72 53 at 0x202)",
    )


def parse_bzimage(data: Data, path: str) -> BzImage:
    """Take a bzImage apart. Raises ImageError."""
    if len(data) < 0x268:
        raise _bad(path, f"the setup header ends at {len(data):#x}, expected at least 0x268 bytes")
    (boot_flag,) = unpack_from("<H", data, 0x1FE)
    if boot_flag != 0xAA55:
        raise _bad(path, f"found {boot_flag:#06x} at 0x1fe, expected the boot flag 0xaa55")
    (version,) = unpack_from("<H", data, 0x206)
    if version < 0x208:
        raise _bad(
            path,
            f"boot protocol {version >> 8}.{version & 0xFF:02} at 0x206, expected 2.08 or later",
        )
    code_at = ((data[0x1F1] or 4) + 1) * 512
    offset, length = unpack_from("<II", data, 0x248)
    payload_at = code_at + offset
    if code_at >= len(data):
        raise _bad(path, f"the protected-mode part at {code_at:#x} is past the end {len(data):#x}")
    if payload_at + length > len(data) or 0 < length < 8:
        raise _bad(
            path,
            f"the compressed kernel at {payload_at:#x}..{payload_at + length:#x} does not fit the "
            f"file of {len(data):#x} bytes, which may be truncated",
        )
    view = memoryview(data)
    xloadflags = unpack_from("<H", data, 0x236)[0] if version >= 0x20C else 0
    return BzImage(
        path=path,
        header=data[0x1F1 : min(0x202 + data[0x201], 0x290)],
        version=version,
        code=view[code_at:],
        payload=view[payload_at : payload_at + length],
        entry_64=bool(xloadflags & XLF_KERNEL_64),
        cmdline_size=unpack_from("<I", data, 0x238)[0],
        initrd_max=unpack_from("<I", data, 0x22C)[0],
        alignment=unpack_from("<I", data, 0x230)[0],
        relocatable=bool(data[0x234]),
        preferred=unpack_from("<Q", data, 0x258)[0] if version >= 0x20A else 0x10_0000,
        init_size=unpack_from("<I", data, 0x260)[0] if version >= 0x20A else 0,
    )


def decompress(payload: memoryview, path: str) -> bytes:
    """Unpack a bzImage's payload, whose last four bytes tell the unpacked size.

    Raises:
        ImageError: unknown compression, damaged data, or another size than told.
    """
    head = bytes(payload[:6])
    name, unpack = _packing(head)
    if unpack is None:
        raise _bad(
            path,
            f"the kernel inside starts with {head.hex(' ')} ({name}), expected gzip, bzip2, lzma, "
            "xz, lz4 or zstd",
        )
    (told,) = unpack_from("<I", payload, len(payload) - 4)
    if not 0 < told <= LARGEST:
        raise _bad(path, f"the kernel inside claims to unpack to {told} bytes (limit {LARGEST})")
    try:
        out = unpack(payload if name == "gzip" else payload[:-4], told)
    except ImageError:
        raise
    except Exception as error:
        # Every library has its own error; what they say is the same to the user.
        raise _bad(path, f"the {name} data of the kernel inside is damaged: {error}") from error
    if len(out) != told:
        raise _bad(path, f"the {name} kernel inside unpacked to {len(out)} bytes, expected {told}")
    return out


def _packing(head: bytes) -> tuple[str, Callable[[memoryview, int], bytes] | None]:
    for magic, name, unpack in _FORMATS:
        if head.startswith(magic):
            return name, unpack
    return "unknown", None


def _gzip(data: memoryview, limit: int) -> bytes:
    import zlib

    return zlib.decompressobj(31).decompress(data, limit + 1)


def _lzma(data: memoryview, limit: int) -> bytes:
    import lzma

    return lzma.LZMADecompressor(memlimit=1 << 28).decompress(data, limit + 1)


def _bzip2(data: memoryview, limit: int) -> bytes:
    import bz2

    return bz2.BZ2Decompressor().decompress(data, limit + 1)


def _zstd(data: memoryview, limit: int) -> bytes:
    import zstandard

    reader = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(data)
    parts, total = [], 0
    while total <= limit:
        part = reader.read(min(1 << 24, limit + 1 - total))
        if not part:
            break
        parts.append(part)
        total += len(part)
    return b"".join(parts)


def _lz4(data: memoryview, limit: int) -> bytes:
    """The legacy frame: blocks of at most 8 MiB, each after its packed size."""
    import lz4.block

    parts: list[bytes] = []
    at, total = 4, 0
    while at + 4 <= len(data) and total <= limit:
        (size,) = unpack_from("<I", data, at)
        at += 4
        if size == 0x184C2102:
            continue
        if size == 0 or at + size > len(data):
            raise ValueError(f"block of {size} bytes at {at:#x} of {len(data):#x}")
        part: bytes = lz4.block.decompress(data[at : at + size], uncompressed_size=_LZ4_BLOCK)
        parts.append(part)
        total += len(part)
        at += size
    return b"".join(parts)


_FORMATS: tuple[tuple[bytes, str, Callable[[memoryview, int], bytes] | None], ...] = (
    (b"\x02\x21\x4c\x18", "lz4", _lz4),
    (b"\x28\xb5\x2f\xfd", "zstd", _zstd),
    (b"\xfd7zXZ\x00", "xz", _lzma),
    (b"\x1f\x8b", "gzip", _gzip),
    (b"\x5d\x00\x00", "lzma", _lzma),
    (b"BZh", "bzip2", _bzip2),
    (b"\x7fELF", "none", lambda data, limit: bytes(data[:limit])),
    (b"\x89LZO", "lzo", None),
)


def parse_elf(data: Data, path: str) -> Vmlinux:
    """Take an ELF kernel apart.

    Raises:
        ImageError: not a static x86 executable, or a table or segment that lies
            outside the file.
    """
    try:
        return _parse_elf(data, path)
    except struct_error as error:
        raise _bad(path, f"the ELF header is cut off after {len(data):#x} bytes") from error


def _parse_elf(data: Data, path: str) -> Vmlinux:
    if data[:4] != b"\x7fELF":
        raise _bad(path, f"found {data[:4].hex(' ')} at offset 0, expected ELF (7f 45 4c 46)")
    wide = data[4:5] == b"\x02"
    if data[4:6] not in (b"\x01\x01", b"\x02\x01"):
        raise _bad(path, f"ELF class and byte order {data[4:6].hex(' ')}, expected 01 01 or 02 01")
    kind, machine = unpack_from("<HH", data, 16)
    if machine != (62 if wide else 3):
        raise _bad(path, f"ELF machine {machine}, expected {62 if wide else 3} (x86)")
    if kind not in (2, 3):
        raise _bad(path, f"ELF type {kind}, expected an executable (2)")
    entry, table = unpack_from("<QQ" if wide else "<II", data, 24)
    entry_size, count = unpack_from("<HH", data, 54 if wide else 42)
    if entry_size != (56 if wide else 32) or count == 0:
        raise _bad(path, f"{count} ELF program headers of {entry_size} bytes")
    if table + count * entry_size > len(data):
        raise _bad(path, f"the ELF program headers at {table:#x} are past the end {len(data):#x}")
    segments: list[Segment] = []
    pvh_entry = None
    view = memoryview(data)
    for index in range(count):
        at = table + index * entry_size
        if wide:
            header = unpack_from("<IIQQQQQQ", data, at)
            p_type, _, offset, vaddr, paddr, filesz, memsz, align = header
        else:
            header = unpack_from("<8I", data, at)
            p_type, offset, vaddr, paddr, filesz, memsz, _, align = header
        if p_type not in (1, 4):
            continue
        if offset + filesz > len(data):
            raise _bad(
                path,
                f"ELF segment {index} at {offset:#x}..{offset + filesz:#x} lies past the end of "
                f"the file ({len(data):#x})",
            )
        if p_type == 4:
            found = _note(view[offset : offset + filesz], 8 if align == 8 else 4)
            pvh_entry = found if found is not None else pvh_entry
        elif memsz:
            if filesz > memsz or memsz > LARGEST or paddr >= 1 << 46:
                raise _bad(
                    path,
                    f"ELF segment {index} has {filesz:#x} bytes in the file and {memsz:#x} in "
                    f"memory at {paddr:#x}",
                )
            segments.append(Segment(paddr, vaddr, view[offset : offset + filesz], memsz))
    if not segments:
        raise _bad(path, "the ELF file has nothing to load")
    return Vmlinux(path, 64 if wide else 32, _physical(entry, segments), pvh_entry, tuple(segments))


def _physical(entry: int, segments: list[Segment]) -> int:
    """Entry points may be physical (Linux) or virtual (some other kernels)."""
    for segment in segments:
        if segment.paddr <= entry < segment.paddr + segment.memsz:
            return entry
    for segment in segments:
        if segment.vaddr <= entry < segment.vaddr + segment.memsz:
            return entry - segment.vaddr + segment.paddr
    return entry


def _note(notes: memoryview, align: int) -> int | None:
    """The PVH entry point among `notes`."""
    at = 0
    while at + 12 <= len(notes):
        name_size, desc_size, kind = unpack_from("<III", notes, at)
        name_at = at + 12
        desc_at = name_at + -(-name_size // align) * align
        at = desc_at + -(-desc_size // align) * align
        name = bytes(notes[name_at : name_at + min(name_size, 4)])
        if kind == PHYS32_ENTRY and name == b"Xen\0" and desc_size in (4, 8):
            desc = bytes(notes[desc_at : desc_at + desc_size])
            if len(desc) == desc_size:
                return int.from_bytes(desc, "little") & 0xFFFF_FFFF
    return None


def _bad(path: str, what: str) -> ImageError:
    return ImageError("kernel-format", f"kernel {path}: {what}")
