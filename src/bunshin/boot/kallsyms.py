"""The symbols that a Linux kernel carries for its own backtraces (CONFIG_KALLSYMS).

Names are packed by 256 tokens, the commonest pieces of names; a piece that is one
character is its own token. The tables lie together in read-only data, and nothing
says where, so they are recognised by their shape:

    kallsyms_num_syms      u32, like all tables on a multiple of the word, 8 bytes
    kallsyms_names         a length (1 byte, or 2 with the top bit of the first set),
                           then so many tokens, for every symbol; the first character
                           of a name is its type, as in /proc/kallsyms
    kallsyms_markers       u32, the offset in names of every 256th symbol
    kallsyms_seqs_of_names 3 bytes for every symbol, in later kernels
    kallsyms_token_table   256 strings that end with 0
    kallsyms_token_index   256 u16, their offsets
    kallsyms_offsets       s32 for every symbol   \\  before num_syms in kernels
    kallsyms_relative_base u64                    /   before 6.4

Spec: Linux scripts/kallsyms.c. A negative offset is -1 - (address - relative_base);
the others are per-processor addresses, or distances from relative_base where there is
no negative one. In 32-bit kernels all is aligned to 4 and the base has 4 bytes. Not
modelled: kernels without a relative base.

The kernel is untrusted: every step is checked, and nonsense means that none is found.
"""

from __future__ import annotations

from array import array

Found = list[tuple[int, str, str]]
_DIGITS = b"".join(b"%d\0" % digit for digit in range(10))
FEWEST, MOST = 256, 1 << 20
"""No kernel has fewer or more symbols."""
LONGEST = 512
"""Characters of a name, and so tokens, at most."""
TYPES = frozenset("ABDGRSTVWabdgrstvw")
KERNEL = {8: 0xFFFF_8000_0000_0000, 4: 0x1000_0000}
"""Kernel addresses lie above, by the size of a word."""


def find(data: memoryview) -> Found:
    """The symbols in a piece of a kernel: `(address, type, name)`, in the table's order.

    Empty when there is no table, or none that can be understood.
    """
    raw = bytes(data)
    at = raw.find(_DIGITS)
    while at >= 0:
        tokens = _tokens(raw, at)
        if tokens is not None:
            start, index, words = tokens
            for word in (8, 4) if index % 8 == 0 else (4,):
                found = _table(raw, start, index, words, word)
                if found:
                    return found
        at = raw.find(_DIGITS, at + 1)
    return []


def _tokens(raw: bytes, digits: int) -> tuple[int, int, list[str]] | None:
    """Start of the token table around `digits`, start of the index, and the tokens."""
    start = digits
    for _ in range(ord("0")):
        start = raw.rfind(b"\0", max(start - 64, 0), start - 1) + 1
        if start == 0:
            return None
    # The first token has no zero before it to be recognised by, but an alignment.
    for begin in range(start, max(start - 8, -1), -1):
        words: list[str] = []
        offsets: list[int] = []
        at = begin
        while len(words) < 256:
            end = raw.find(b"\0", at, at + 64)
            if end < 0:
                break
            offsets.append(at - begin)
            words.append(raw[at:end].decode("latin-1"))
            at = end + 1
        if len(words) < 256:
            continue
        for index in {_up(at, 4), _up(at, 8)}:
            if raw[index : index + 512] == array("H", offsets).tobytes():
                return begin, index, words
    return None


def _table(raw: bytes, tokens: int, index: int, words: list[str], word: int) -> Found:
    counts = memoryview(raw)[: tokens & ~7].cast("Q" if word == 8 else "I")
    for number in range(len(counts) - 1, -1, -1):
        count = counts[number]
        if FEWEST <= count <= MOST:
            names = _names(raw, word * (number + 1), tokens, count, words, word)
            if names:
                return _addresses(raw, word * number, index + 512, names, word)
    return []


def _up(at: int, word: int) -> int:
    """The next multiple of `word`."""
    return at + word - 1 & -word


def _names(raw: bytes, start: int, end: int, count: int, words: list[str], word: int) -> list[str] | None:
    """The `count` names at `start`, if the markers behind them agree."""
    at = start
    names = []
    markers = array("I")
    for number in range(count):
        if number % 256 == 0:
            markers.append(at - start)
        if at + 2 > end:
            return None
        length = raw[at]
        at += 1
        if length & 0x80:
            length = length & 0x7F | raw[at] << 7
            at += 1
        if length > LONGEST:
            return None
        name = "".join([words[token] for token in raw[at : at + length]])
        if name[:1] not in TYPES:
            return None
        names.append(name)
        at += length
    at = _up(at, word)
    return names if raw[at : at + 4 * len(markers)] == markers.tobytes() else None


def _addresses(raw: bytes, num_syms: int, behind: int, names: list[str], word: int) -> Found:
    size = 4 * len(names)
    old = num_syms - word
    for base_at, offsets_at in ((old, old - _up(size, word)), (_up(behind + size, word), behind)):
        if offsets_at < 0 or base_at + word > len(raw):
            continue
        base = int.from_bytes(raw[base_at : base_at + word], "little")
        if base < KERNEL[word] or base & 0xFFF:
            continue
        # 32-bit kernels have no per-processor addresses among them.
        offsets = array("i" if word == 8 else "I", raw[offsets_at : offsets_at + size])
        split = min(offsets) < 0
        found = []
        for name, offset in zip(names, offsets, strict=True):
            if split:
                address = base - 1 - offset if offset < 0 else offset
            else:
                address = base + offset
            found.append((address, name[:1], name[1:]))
        return found
    return []
