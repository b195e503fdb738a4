"""What the figures of `Machine.stats` mean, and a table of them.

Counts begin with the machine and are summed over its processors. Times are taken
from the host's time-stamp counter; those of parts that run too often to be timed
every time are sampled (one run in 13 or 61 stands for all), so they are estimates.
"""

from __future__ import annotations

from collections.abc import Mapping

FIGURES = {
    "translation": {
        "engine.blocks": "blocks translated",
        "engine.instructions_translated": "guest instructions in them",
        "engine.hot_blocks": "blocks translated again, since samples found them frequent",
        "engine.revived": "dropped blocks that fitted again, but for constants",
        "engine.host_bytes": "bytes of host code made of them",
        "engine.code_cache_used": "bytes of the code cache in use now",
        "engine.code_cache_size": "bytes that it has",
        "engine.cache_flushes": "times it was full and everything was dropped",
        "engine.links": "jumps linked from block to block",
        "engine.lookups": "indirect jumps that missed the jump cache",
    },
    "memory": {
        "engine.walks": "walks through the guest's page tables",
        "engine.tlb_load": "misses of single loads in translated code",
        "engine.tlb_store": "misses of single stores in translated code",
        "engine.tlb_group": "misses of checks that several accesses share",
        "engine.tlb_fetch": "walks for code",
        "engine.tlb_helper": "misses of accesses that the engine makes for the guest",
        "engine.tlb_slow": "misses that no entry can serve: devices, code, two pages",
        "engine.slow_steps": "instructions performed one at a time for such reasons",
    },
    "invalidation": {
        "engine.code_writes": "stores into pages with translated code",
        "engine.pages_dropped": "pages whose blocks were dropped for that",
        "engine.killed": "blocks in them",
        "engine.cr3_writes": "switches of address spaces",
        "engine.tlb_flushes": "flushes of the TLB, or of one address space in it",
        "engine.invlpg": "single pages invalidated",
    },
    "events": {
        "engine.interrupts": "interrupts delivered",
        "engine.exceptions": "exceptions delivered",
        "engine.page_faults": "page faults among them",
        "engine.events": "times that translated code was stopped to look for events",
        "engine.exclusive_sections": "times that all other processors stood still for one",
        "engine.halts": "times that HLT waited",
    },
    "direct execution": {
        "engine.direct_sandboxes": "processes made to run user code in",
        "engine.direct_traps": "times that user code stopped there",
        "engine.direct_fills": "pages mapped there",
        "engine.direct_calls": "SYSCALL",
        "engine.direct_steps": "instructions that the translator performed for it",
        "engine.direct_unguarded": "code not run there, since it could show the host",
        "engine.direct_losses": "processes that user code destroyed",
    },
    "instructions performed by helpers": {
        "engine.helpers": "all of them",
        "engine.helpers.port": "IN and OUT",
        "engine.helpers.string": "string instructions",
        "engine.helpers.stack": "PUSHF, POPF, and PUSH and POP of odd kinds",
        "engine.helpers.segment": "segment registers and descriptor tables",
        "engine.helpers.entry": "SYSCALL, SYSRET, INT, IRET and their kin",
        "engine.helpers.branch": "far and 16-bit branches, LOOP",
        "engine.helpers.system": "control registers, interrupt flag, FS and GS bases",
        "engine.helpers.msr": "model-specific registers, time-stamp counter",
        "engine.helpers.cpuid": "CPUID",
        "engine.helpers.invalidate": "INVLPG, INVPCID, WBINVD",
        "engine.helpers.halt": "HLT and MWAIT",
        "engine.helpers.context": "XSAVE, XRSTOR, FXSAVE and their kin",
        "engine.helpers.other": "the rest",
    },
    "engines": {
        "engine.kvm_entries": "times that KVM was entered",
        "engine.rescues": "times that the translator went on where KVM could not",
        "engine.rescued_instructions": "instructions performed so",
        "engine.switches": "moves to another engine, by processor",
    },
    "devices": {
        "engine.port_accesses": "IN and OUT, interrupt controllers included",
        "engine.device_accesses": "loads and stores outside RAM, interrupt controllers included",
        "exits.pio-in": "IN that left to Python",
        "exits.pio-out": "OUT that left to Python",
        "exits.mmio-read": "loads that left to Python",
        "exits.mmio-write": "stores that left to Python",
        "exits.hypercall": "VMCALL and VMMCALL",
        "exits.debug": "stops for a debugger",
        "exits.kicked": "stops because somebody wanted something of a processor",
        "exits.shutdown": "triple faults",
        "exits.failed": "failures of the engine",
        "device.NAME.reads": "reads of the device of that name",
        "device.NAME.writes": "writes to it",
    },
    "time by part": {
        "time.total_ns": "processors running, all of what follows",
        "time.guest_code_ns": "in translated code or in KVM: the rest of the total",
        "time.translating_ns": "translating",
        "time.lookup_ns": "looking up blocks for jumps (sampled)",
        "time.tlb_ns": "misses of the TLB, page faults delivered there too (sampled)",
        "time.helpers_ns": "helpers (sampled)",
        "time.slow_path_ns": "single instructions, see engine.slow_steps (sampled)",
        "time.direct_ns": "user code run directly, with the ways there and back",
        "time.events_ns": "interrupts, timers, kicks",
        "time.devices_ns": "devices in Python, and waiting for the interpreter (sampled)",
        "time.halted_ns": "waiting in HLT",
    },
}
"""Meaning of every figure by section; NAME stands for any device's name."""


def complete(stats: dict[str, int]) -> None:
    """Add the figures that follow from others."""
    if "time.total_ns" in stats:
        known = sum(
            value for name, value in stats.items() if name.startswith("time.") and name != "time.total_ns"
        )
        stats["time.guest_code_ns"] = max(stats["time.total_ns"] - known, 0)


def table(stats: Mapping[str, int]) -> str:
    """The figures in sections, as `name  value  meaning`; those that are zero are left out."""
    rows: list[tuple[str, str, str] | str] = []
    left = {name: value for name, value in stats.items() if value}
    for section, figures in FIGURES.items():
        found: list[tuple[str, str, str]] = []
        for figure, meaning in figures.items():
            for name in _named(figure, left):
                found.append((name, _readable(name, left.pop(name)), meaning))
        if found:
            rows += [section, *found]
    rest = [(name, _readable(name, value), "") for name, value in sorted(left.items())]
    if rest:
        rows += ["others", *rest]
    cells = [row for row in rows if isinstance(row, tuple)]
    widths = [max((len(row[i]) for row in cells), default=0) for i in (0, 1)]
    return "\n".join(
        row if isinstance(row, str) else f"  {row[0]:{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]}".rstrip()
        for row in rows
    )


def _named(figure: str, names: Mapping[str, int]) -> list[str]:
    """The names that `figure` speaks of."""
    before, any_name, after = figure.partition("NAME")
    if not any_name:
        return [figure] if figure in names else []
    return sorted(name for name in names if name.startswith(before) and name.endswith(after))


def _readable(name: str, value: int) -> str:
    return f"{value / 1e9:.3f} s" if name.endswith("_ns") else f"{value:,}"
