//! Random cases for the system judges. (seed, index) names one case for ever.
//!
//! A case is generated along the way that it takes if nothing faults: each
//! slot knows the privilege level and operand size that the one before meant
//! to leave. Control never goes back, so that every case ends.
use super::case::{at, flat, system, SystemCase};
use super::layout::*;
use crate::random::Random;

mod instructions;
pub use instructions::MSRS;

/// What to generate beyond what QEMU 7.2 can judge.
#[derive(Debug, Clone, Copy, Default)]
pub struct Choice {
    /// Breakpoints on data, of some of which QEMU 7.2 dies.
    pub watch: bool,
    /// INVPCID, which QEMU 7.2 lacks.
    pub invpcid: bool,
}

/// Where the processor is meant to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Mode {
    ring: u64,
    bits: u32,
}

/// A case under construction.
struct Draft<'a> {
    random: &'a mut Random,
    choice: Choice,
    case: SystemCase,
    mode: Mode,
    /// Slot that SYSCALL leads to.
    lstar: usize,
    code: Vec<u8>,
}

/// First of the case's own descriptors with a fixed meaning: 32-bit supervisor
/// code, conforming 64-bit code, conforming 32-bit code, 32-bit user code that
/// cannot be read.
const CS32: u64 = OWN;
const CONFORMING: u64 = OWN + 8;
const CONFORMING32: u64 = OWN + 16;
const GATE: u64 = OWN + 0x20;
/// The first that is random.
const RANDOM: usize = OWN as usize / 8 + 6;

/// QEMU marks a page as accessed by the load of an instruction that then may
/// not store: where that can be, it is accessed already.
fn accessed(entry: u64) -> u64 {
    if entry & 2 == 0 {
        entry | 0x20
    } else {
        entry
    }
}

/// Make one case.
pub fn case(seed: u64, index: u64, choice: Choice) -> SystemCase {
    let mut random = Random::for_case(seed ^ 0x7379_7374_656d, index);
    let (ring, bits) = random.pick(&[(0, 64), (0, 64), (0, 64), (3, 64), (3, 64), (3, 64), (3, 32), (0, 32)]);
    let lstar = 1 + random.below(SLOTS as u64) as usize;
    let mut draft = Draft {
        random: &mut random,
        choice,
        case: SystemCase { seed, index, ..SystemCase::default() },
        mode: Mode { ring, bits },
        lstar,
        code: Vec::new(),
    };
    draft.registers();
    draft.control();
    draft.descriptors();
    draft.pages();
    let count = 4 + draft.random.below(SLOTS as u64 - 3) as usize;
    while draft.case.slots.len() < count {
        draft.slot();
    }
    draft.case
}

impl Draft<'_> {
    /// An address, mostly in the case's pages, but never in the page table: the
    /// TLB would keep what was there.
    fn pointer(&mut self) -> u64 {
        let address = self.any_pointer();
        if (TABLE - 0x40..TABLE + 0x1000).contains(&address) {
            DATA + (address & 0x7f)
        } else {
            address
        }
    }

    fn any_pointer(&mut self) -> u64 {
        match self.random.below(20) {
            0 => self.random.integer(),
            1 => WINDOW + (2 + self.random.below(18)) * 0x1000,
            2 | 3 => LARGE_PAGE + self.random.below(120),
            4..=6 => {
                let page = WINDOW + 0x1000 * (2 + self.random.below(14));
                page - 1 - self.random.below(8)
            }
            _ => {
                let count = if self.random.one_in(3) { 14 } else { 4 };
                let page = DATA + 0x1000 * self.random.below(count);
                let at = if self.random.one_in(4) {
                    0xfc0 + self.random.below(0x39)
                } else {
                    self.random.below(0x70)
                };
                page + at
            }
        }
    }

    fn flags(&mut self) -> u64 {
        let mut flags = 2 | (self.random.next() & 0x8d5);
        for (bit, rarity) in [(9, 2), (12, 4), (13, 4), (10, 6), (18, 6), (14, 20), (8, 30), (21, 6)] {
            if self.random.one_in(rarity) {
                flags |= 1 << bit;
            }
        }
        flags
    }

    fn registers(&mut self) {
        for i in 0..16 {
            self.case.words[i] = if self.random.one_in(3) { self.random.integer() } else { self.pointer() };
            if self.mode.bits != 64 {
                self.case.words[i] &= 0xffff_ffff;
            }
        }
        // SYSRET takes flags from r11: without VM, VIF and VIP, see `compare::exempt`.
        self.case.words[11] &= !0x1a_0000;
        let user = self.mode.ring == 3;
        let (cs, ss) = match (user, self.mode.bits) {
            (true, 64) => (USER_CS, USER_SS),
            (true, _) => (USER_CS32, USER_SS),
            (false, 64) => (KERNEL_CS, KERNEL_SS),
            (false, _) => (CS32, KERNEL_SS),
        };
        let rflags = self.flags();
        let stack = if user { STACK3 } else { STACK0 };
        let edge = self.random.pick(&[0x800, 0x800, 0x800, 0x7f8, 0x801, 0x840]);
        for (name, value) in [
            ("rip", if user { CODE_USER } else { CODE_SUPERVISOR }),
            ("cs", cs),
            ("ss", ss),
            ("rflags", rflags),
            ("rsp", stack + edge),
        ] {
            self.case.set(name, value);
        }
        for name in ["ds", "es", "fs", "gs"] {
            let value = if self.random.one_in(3) { 0 } else { USER_SS };
            self.case.set(name, value);
        }
        for name in ["fs_base", "gs_base", "kernel_gs_base"] {
            let value = match self.random.below(4) {
                0 => 0,
                1 => DATA,
                2 => self.random.below(1 << 47),
                _ => HALF | self.random.below(1 << 46),
            };
            self.case.set(name, value);
        }
    }

    fn control(&mut self) {
        let mut cr4 = CR4;
        for (bit, rarity) in [(2, 4), (3, 4), (7, 2), (8, 4), (11, 4), (16, 2), (17, 4), (20, 3), (21, 3)] {
            if self.random.one_in(rarity) {
                cr4 |= 1 << bit;
            }
        }
        let mut cr0 = CR0;
        if self.random.one_in(4) {
            cr0 &= !(1 << 16);
        }
        let mut efer = EFER;
        if self.random.one_in(8) {
            efer &= !1;
        }
        let root = self.random.below(2) as usize;
        let pcid = if cr4 >> 17 & 1 == 1 { root as u64 + 1 } else { 0 };
        let syscall = CODE_SUPERVISOR + self.lstar as u64 * SLOT;
        // With the arithmetic flags and DF, since QEMU's SYSCALL clears them anyway.
        let mask = 0xcd5 | self.random.pick(&[0x4_0700, 0, 0x4_7700, 0x200]);
        let xcr0 = self.random.pick(&[7, 7, 3, 1]);
        let idt = u64::from(self.random.one_in(2));
        let cr8 = self.random.below(16);
        for (name, value) in [
            ("cr0", cr0),
            ("cr3", TABLES[root] | pcid),
            ("cr4", cr4),
            ("cr8", cr8),
            ("efer", efer),
            ("xcr0", xcr0),
            ("lstar", syscall),
            ("cstar", syscall),
            ("sfmask", mask),
            ("sysenter_cs", KERNEL_CS),
            ("sysenter_esp", STACK0 + 0x800),
            ("sysenter_eip", syscall),
            ("idt", idt),
        ] {
            self.case.set(name, value);
        }
        if self.random.one_in(3) {
            let breakpoint = at("breakpoint");
            for n in 0..4 {
                self.case.words[breakpoint + n] = self.breakpoint(n as u64);
            }
            let dr7 = self.dr7();
            self.case.set("dr7", dr7);
        }
        let tss = at("tss");
        // Bits that let ports through; the last byte stays all ones.
        for word in &mut self.case.words[tss + 13..tss + 23] {
            if self.random.one_in(2) {
                *word = self.random.next();
            }
        }
        if self.random.one_in(8) {
            // RSP0 that is not aligned.
            let rsp0 = STACK0 + 0xc00 - self.random.below(16);
            self.case.words[tss] = self.case.words[tss] & 0xffff_ffff | rsp0 << 32;
            self.case.words[tss + 1] = rsp0 >> 32;
        }
    }

    /// Is breakpoint `n` for code in this case?
    fn for_code(&self, n: u64) -> bool {
        n / 2 == self.lstar as u64 % 2
    }

    /// What breakpoint `n` may wait for: a slot of the case, or the last quadword of a
    /// page. QEMU has stores that are not aligned meet what lies below them in their
    /// page, and loads all of the aligned pieces that they are made of.
    fn breakpoint(&mut self, n: u64) -> u64 {
        if self.for_code(n) {
            self.random.pick(&[CODE_USER, CODE_SUPERVISOR]) + SLOT * self.random.below(SLOTS as u64)
        } else {
            WINDOW + 0x1000 * (3 + self.random.below(14)) - 8
        }
    }

    /// Breakpoints on code, stores and accesses, without general detect.
    fn dr7(&mut self) -> u64 {
        let mut value = 0x400 | self.random.below(4) << 8;
        for n in 0..4 {
            if self.random.one_in(2) && (self.for_code(n) || self.choice.watch) {
                value |= 1 << (2 * n + self.random.below(2));
            }
            let data = self.random.pick(&[9, 11]);
            value |= if self.for_code(n) { 0 } else { data } << (16 + 4 * n);
        }
        value
    }

    fn descriptors(&mut self) {
        let gdt = at("gdt");
        for (selector, access) in
            [(CS32, 0xc09b), (CONFORMING, 0xa09f), (CONFORMING32, 0xc09f), (OWN + 0x18, 0xc0f9)]
        {
            self.case.words[gdt + selector as usize / 8] = flat(access);
        }
        let target = CODE_SUPERVISOR + self.lstar as u64 * SLOT;
        let gate = target & 0xffff | KERNEL_CS << 16 | 0xec << 40 | (target >> 16 & 0xffff) << 48;
        self.case.words[gdt + GATE as usize / 8] = gate;
        self.case.words[gdt + GATE as usize / 8 + 1] = target >> 32;
        for i in RANDOM..32 {
            self.case.words[gdt + i] = self.descriptor();
        }
        let ldt = at("ldt");
        for i in 0..8 {
            self.case.words[ldt + i] = self.descriptor();
        }
    }

    /// A segment of any type, half of them flat.
    fn descriptor(&mut self) -> u64 {
        match self.random.below(12) {
            0 => 0,
            1 => system(HALF + TSS_OTHER, 0x67, self.random.pick(&[9, 11, 2])),
            _ => {
                let kind = self.random.below(16);
                // QEMU marks no code segment as accessed, nor a stack that IRET loads.
                let kind = if kind & 8 != 0 || kind & 2 != 0 { kind | 1 } else { kind };
                let dpl = self.random.pick(&[0, 3, 3, 1, 2]);
                let present = u64::from(!self.random.one_in(8)) << 7;
                // L and D together are reserved for code.
                let size = self.random.pick(&[0xc000, 0xc000, 0xa000]);
                let size = if kind & 8 == 0 { 0xc000 } else { size };
                let mut descriptor = flat(0x10 | kind | dpl << 5 | present | size);
                if self.random.one_in(2) {
                    // QEMU looks at no limit where code and data are used: most, and all of
                    // code, have room for what a case does.
                    let (low, page) = match (kind & 0xc, self.random.below(4)) {
                        (4, _) | (0, 0) => (self.random.below(0x1_0000), self.random.below(2)),
                        _ => (0x1_1000 + self.random.below(0xe_0000), 1),
                    };
                    descriptor &= !0x8f_0000_0000_ffff;
                    descriptor |= low & 0xffff | (low & 0xf_0000) << 32 | page << 55;
                } else if kind & 0xc == 4 {
                    // Expanding down with a limit of all ones leaves nothing.
                    descriptor &= !(4 << 40);
                }
                descriptor
            }
        }
    }

    fn entry(&mut self) -> u64 {
        let frame = match self.random.below(10) {
            0..=7 => PAGES + 0x1000 * self.random.below(4),
            _ => LARGE,
        };
        let mut entry = frame | 0x67;
        // P W U PWT PCD A D, NX, and a bit that is reserved.
        for (bit, rarity) in [(0, 10), (1, 3), (2, 3), (5, 2), (6, 2)] {
            if self.random.one_in(rarity) {
                entry &= !(1 << bit);
            }
        }
        for (bit, rarity) in [(63, 3), (9, 8), (50, 30), (3, 10), (4, 10)] {
            if self.random.one_in(rarity) {
                entry |= 1 << bit;
            }
        }
        accessed(entry)
    }

    fn pages(&mut self) {
        let pt = at("pt");
        for root in 0..2 {
            for i in (4..6).chain(9..ENTRIES) {
                self.case.words[pt + root * ENTRIES + i] = self.entry();
            }
            for i in [0, 1, 2, 3, 6, 7] {
                // Accessed and dirty of the rest.
                if self.random.one_in(2) {
                    self.case.words[pt + root * ENTRIES + i] &= !(self.random.pick(&[0x20, 0x40, 0x60]));
                }
            }
            let large = at("large") + root;
            for (bit, rarity) in [(0, 12), (1, 4), (2, 3), (5, 2), (6, 2)] {
                if self.random.one_in(rarity) {
                    self.case.words[large] &= !(1 << bit);
                }
            }
            for (bit, rarity) in [(63, 3), (14, 20), (51, 30)] {
                if self.random.one_in(rarity) {
                    self.case.words[large] |= 1 << bit;
                }
            }
            self.case.words[large] = accessed(self.case.words[large]);
            for name in ["pml4", "pdpt", "pd"] {
                let word = at(name) + root;
                // Accessed; rarely not for users.
                for (bit, rarity) in [(5, 2), (2, 25)] {
                    if self.random.one_in(rarity) {
                        self.case.words[word] &= !(1 << bit);
                    }
                }
            }
        }
    }

    /// Address of the slot after the one under construction, for a ring.
    fn next(&self, ring: u64) -> u64 {
        let base = if ring == 3 { CODE_USER } else { CODE_SUPERVISOR };
        base + (self.case.slots.len() as u64 + 1) * SLOT
    }

    fn slot(&mut self) {
        self.code.clear();
        let mode = self.mode;
        self.instruction();
        if self.code.len() > SLOT as usize {
            // Too long a combination of operands.
            self.code.clear();
            self.code.push(0x90);
            self.mode = mode;
        }
        self.case.slots.push(std::mem::take(&mut self.code));
        self.case.bits.push(mode.bits);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_name_gives_the_same_case() {
        for index in [0, 7, 1_000_000] {
            let text = |seed| case(seed, index, Choice::default()).to_text("");
            assert_eq!(text(5), text(5));
            assert_ne!(text(5), text(6));
        }
    }
}
