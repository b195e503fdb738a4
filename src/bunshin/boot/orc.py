"""The tables by which Linux unwinds its own stacks (ORC), as DWARF call frame information.

Kernels are built without frame pointers; without these tables a debugger finds the
caller of the innermost function at best. Two tables lie in the kernel's data, found by
the symbols `__start_orc_unwind_ip` and `__start_orc_unwind`:

    ip      s32, the distance from this very place to the code that the entry is for,
            up to the address of the next; sorted
    entry   s16 sp_offset, s16 bp_offset, u16 of sp_reg(0-3) bp_reg(4-7) type(8-9)
            end(10); from Linux 6.4 on type(8-10) signal(11)

Which of the two forms it is, the commonest type tells: calls are 0 in the old one and 2
in the new one. The caller's stack pointer is the register sp_reg plus sp_offset; what is
called has its return address below that, and an interrupted one its registers (pt_regs)
there. Spec: Linux arch/x86/include/asm/orc_types.h, arch/x86/kernel/unwind_orc.c; DWARF
version 4, 6.4.

The kernel is untrusted: tables that cannot be understood give nothing.
"""

from __future__ import annotations

from array import array
from collections import Counter
from itertools import pairwise
from struct import pack, unpack_from

# Registers as DWARF numbers them.
_RDX, _RDI, _RBP, _RSP, _R10, _R13, _RETURN = 1, 5, 6, 7, 10, 13, 16
_UNDEFINED, _PREVIOUS_SP, _BP, _BP_INDIRECT, _SP_INDIRECT = 0, 1, 4, 8, 9
_BASES = {2: _RDX, 3: _RDI, 4: _RBP, 5: _RSP, 6: _R10, 7: _R13, 8: _RBP, 9: _RSP}
# Offsets in pt_regs, and of ip and sp in the part of it that the processor pushes.
_REGS_BP, _REGS_IP, _REGS_SP, _FRAME_SP = 32, 128, 152, 24
_CALL, _REGS, _PARTIAL, _END = range(4)
_OLD = {0: _CALL, 1: _REGS, 2: _PARTIAL}
_NEW = {0: _END, 1: _END, 2: _CALL, 3: _REGS, 4: _PARTIAL}
_ROWS = 64
"""Most rows of one description: a debugger goes through them one by one."""
MOST = 1 << 22


def frames(ips: memoryview, ips_at: int, entries: memoryview) -> bytes:
    """The section `.debug_frame` for the tables; `ips_at` is the address of the first.

    Empty when the tables are none.
    """
    count = len(ips) // 4
    if not 0 < count <= MOST or len(entries) < 6 * count:
        return b""
    distances = array("i", bytes(ips[: 4 * count]))
    places = [(ips_at + 4 * n + distance) % (1 << 64) for n, distance in enumerate(distances)]
    if any(a > b for a, b in pairwise(places)):
        return b""
    raw = [bytes(entries[6 * n : 6 * n + 6]) for n in range(count)]
    common = Counter(entry[5] & 7 for entry in raw).most_common(1)[0][0]
    kinds = _OLD if common == 0 else _NEW
    rules = {entry: _rule(entry, kinds) for entry in set(raw)}
    return _write(places, raw, rules)


_Rule = tuple[bool, bytes]
"""Whether the frame is an interrupt's, and the instructions that describe it."""


def _rule(entry: bytes, kinds: dict[int, int]) -> _Rule:
    sp_offset, bp_offset, word = unpack_from("<hhH", entry)
    sp_reg, bp_reg = word & 15, word >> 4 & 15
    kind = kinds.get(word >> 8 & (3 if kinds is _OLD else 7), _END)
    if sp_reg not in _BASES or kind == _END or (kinds is _OLD and word >> 10 & 1):
        return False, bytes((0x0C, _RSP, 8, 0x07, _RETURN))  # no caller
    indirect = sp_reg in (_BP_INDIRECT, _SP_INDIRECT)
    base = _BASES[sp_reg]
    if indirect:
        inner, outer = (0, sp_offset) if sp_reg == _SP_INDIRECT else (sp_offset, 0)
        address = _at(base, inner) + b"\x06"  # deref

        def place(offset: int) -> bytes:
            return address + b"\x11" + _signed(outer + offset) + b"\x22"  # consts, plus
    else:

        def place(offset: int) -> bytes:
            return _at(base, sp_offset + offset)

    if kind == _CALL:
        if indirect or sp_offset < 0:
            frame = _expression(0x0F, None, place(0))
        else:
            frame = b"\x0c" + _unsigned(base) + _unsigned(sp_offset)
        # From one stack to another: debuggers want callers above, but for interrupts.
        return indirect, frame + bytes((0x80 | _RETURN, 1)) + _frame_pointer(bp_reg, bp_offset)
    sp, ip = (_REGS_SP, _REGS_IP) if kind == _REGS else (_FRAME_SP, 0)
    code = _expression(0x0F, None, place(sp) + b"\x06") + _expression(0x10, _RETURN, place(ip))
    if kind == _REGS:
        return True, code + _expression(0x10, _RBP, place(_REGS_BP))
    return True, code + _frame_pointer(bp_reg, bp_offset)


def _frame_pointer(bp_reg: int, bp_offset: int) -> bytes:
    if bp_reg == _PREVIOUS_SP:
        if bp_offset <= 0 and bp_offset % 8 == 0:
            return bytes((0x80 | _RBP,)) + _unsigned(-bp_offset // 8)
        return _expression(0x10, _RBP, b"\x11" + _signed(bp_offset) + b"\x22")
    if bp_reg == _BP:
        return _expression(0x10, _RBP, _at(_RBP, bp_offset))
    return bytes((0x08, _RBP))  # as it is


def _at(register: int, offset: int) -> bytes:
    return bytes((0x70 + register,)) + _signed(offset)  # breg


def _expression(code: int, register: int | None, expression: bytes) -> bytes:
    which = b"" if register is None else _unsigned(register)
    return bytes((code,)) + which + _unsigned(len(expression)) + expression


def _unsigned(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _signed(value: int) -> bytes:
    out = bytearray()
    while not -0x40 <= value < 0x40:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value & 0x7F)
    return bytes(out)


def _common(augmentation: bytes) -> bytes:
    """What all descriptions share: factors of 1 and -8, the return address, and that
    nobody knows what the registers were that a function need not keep.
    """
    unknown = b"".join(bytes((0x07, n)) for n in (0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13, 14, 15))
    body = b"\xff\xff\xff\xff\x01" + augmentation + b"\0\x01\x78" + bytes((_RETURN,)) + unknown
    return _record(body)


def _record(body: bytes) -> bytes:
    body += bytes(-len(body) - 4 & 7)
    return pack("<I", len(body)) + body


def _write(places: list[int], raw: list[bytes], rules: dict[bytes, _Rule]) -> bytes:
    plain, interrupted = _common(b""), _common(b"S")
    out = [plain, interrupted]
    parents = {False: 0, True: len(plain)}
    start, at, rows = places[0], places[0], 0
    code = bytearray()
    kind, last = rules[raw[0]]
    code += last

    def finish(end: int) -> None:
        if end > start:
            out.append(_record(pack("<IQQ", parents[kind], start, end - start) + code))

    for place, entry in zip(places[1:], raw[1:], strict=True):
        new_kind, rule = rules[entry]
        if rule == last and new_kind == kind:
            continue
        if new_kind != kind or rows == _ROWS or place - at > 0xFFFF_FFFF:
            finish(place)
            start, rows, kind = place, 0, new_kind
            code = bytearray(rule)
        else:
            code += _advance(place - at) + rule
            rows += 1
        at, last = place, rule
    finish(places[-1])
    return b"".join(out)


def _advance(distance: int) -> bytes:
    if distance == 0:
        return b""
    if distance < 0x40:
        return bytes((0x40 | distance,))
    if distance < 0x100:
        return bytes((0x02, distance))
    return b"\x03" + pack("<H", distance) if distance < 0x1_0000 else b"\x04" + pack("<I", distance)
