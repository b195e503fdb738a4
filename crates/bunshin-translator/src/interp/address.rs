//! Where operands lie: offsets, segments with their limits and rights, linear
//! addresses. SDM volume 3, 5.3 to 5.6.
//!
//! Translated code trusts data segments that are flat (base 0, 4 GiB, writable;
//! `mode::LIMITED` says that one is not) and otherwise compares every offset with
//! `Cpu::reach_r` or `reach_w`. What does not fit comes here, to fault or to be a
//! rarity such as a segment that expands down.
use super::address_size;
use crate::cpu::{Seg, VM};
use crate::mmu::{canonical, Exception, Kind, Trap, GP, SS};
use crate::vcpu::{mode, Vcpu};
use iced_x86::{Instruction, Register};

/// Access rights of a flat segment that matter, and their values: present,
/// ordinary, data, expand-up, writable, usable.
const FLAT_MASK: u32 = 0x1_009e;
const FLAT: u32 = 0x92;

const CR0_AM: u64 = 1 << 18;
/// Alignment check.
const AC_: u8 = 17;

/// What operands of a size are aligned to where that is checked, SDM volume 3, table
/// 6-7; for long ones what Zen 4 does.
pub fn natural(size: usize) -> usize {
    match size {
        2 | 4 | 8 => size,
        14 | 94 => 2,
        6 | 28 | 108 | 512 => 4,
        10 => 8,
        16 | 32 | 64 => 16,
        _ => 1,
    }
}

impl Seg {
    /// Base 0, 4 GiB, readable and writable: nothing to check.
    pub fn flat(&self) -> bool {
        self.base == 0 && self.limit == u32::MAX && self.access & FLAT_MASK == FLAT
    }

    /// Lowest and highest offset of the segment.
    pub fn range(&self) -> (u64, u64) {
        if self.access & 0x1c == 0x14 {
            // Data that expands down: the limit is what lies below it.
            let top = if self.big() { 0xffff_ffff } else { 0xffff };
            (u64::from(self.limit) + 1, top)
        } else {
            (0, self.limit.into())
        }
    }

    /// Its type allows `kind` in protected mode.
    fn allows(&self, kind: Kind) -> bool {
        let code = self.access & 8 != 0;
        match kind {
            Kind::Write => !code && self.access & 2 != 0,
            _ => !code || self.access & 2 != 0,
        }
    }

    /// Minus the bytes that translated code may access from offset 0 on, for loads
    /// and stores; zero where each access must be looked at.
    fn reach(&self, real: bool) -> [u64; 2] {
        let (low, high) = self.range();
        if self.unusable() || low != 0 {
            return [0; 2];
        }
        [Kind::Read, Kind::Write].map(|k| if real || self.allows(k) { (high + 1).wrapping_neg() } else { 0 })
    }
}

impl Vcpu {
    pub fn segment_index(r: Register) -> usize {
        match r {
            Register::ES => 0,
            Register::CS => 1,
            Register::SS => 2,
            Register::FS => 4,
            Register::GS => 5,
            _ => 3,
        }
    }

    /// Load a segment register with its hidden part.
    pub fn put_segment(&mut self, n: usize, s: Seg) {
        let real = self.real_mode();
        let c = self.cpu_mut();
        c.seg[n] = s;
        c.seg_base[n] = s.base;
        [c.reach_r[n], c.reach_w[n]] = s.reach(real);
    }

    /// Work out again what translated code may reach: CR0.PE changed, or the state.
    pub fn refresh_reach(&mut self) {
        let real = self.real_mode();
        let c = self.cpu_mut();
        for n in 0..6 {
            [c.reach_r[n], c.reach_w[n]] = c.seg[n].reach(real);
        }
    }

    /// Real-address or virtual-8086 mode: selectors are bases.
    pub fn real_mode(&self) -> bool {
        self.cpu().cr0 & 1 == 0 || self.cpu().eflags & VM != 0
    }

    /// Highest offset that code may have.
    pub fn code_limit(&self) -> u64 {
        if self.cpu().code64() {
            u64::MAX
        } else {
            self.cpu().seg[1].limit.into()
        }
    }

    /// Base that a segment adds in the current mode.
    pub fn base_of(&self, seg: usize) -> u64 {
        let c = self.cpu();
        match seg {
            4 | 5 => c.seg_base[seg],
            _ if c.code64() => 0,
            _ => c.seg[seg].base,
        }
    }

    /// Linear address of offset `off` in segment `seg`, unchecked.
    pub fn linear(&self, seg: usize, off: u64) -> u64 {
        let v = self.base_of(seg).wrapping_add(off);
        if self.cpu().code64() {
            v
        } else {
            v & 0xffff_ffff
        }
    }

    /// #GP(0), or #SS(0), unless `size` bytes at `off` lie in segment `seg` and its
    /// rights allow `kind`. The end of a flat segment is left to `check_end`.
    pub fn check_segment(&self, seg: usize, off: u64, size: usize, kind: Kind) -> Result<(), Trap> {
        let c = self.cpu();
        let s = &c.seg[seg];
        if c.code64() || s.flat() && self.mode() & mode::LIMITED == 0 {
            return Ok(());
        }
        let (low, high) = s.range();
        let last = off + (size as u64).max(1) - 1;
        if s.unusable() || !self.real_mode() && !s.allows(kind) || off < low || last > high {
            return Err(Exception::with(if seg == 2 { SS } else { GP }, 0).into());
        }
        Ok(())
    }

    /// Accesses must be aligned: CR0.AM, and AC at level 3.
    pub fn aligned(&self) -> bool {
        let c = self.cpu();
        c.ac != 0 && c.cpl == 3 && c.cr0 & CR0_AM != 0
    }

    /// Linear address of `size` bytes at offset `off` of segment `seg`, which must
    /// allow that.
    pub fn segment_at(&self, seg: usize, off: u64, size: usize, kind: Kind) -> Result<u64, Trap> {
        self.check_segment(seg, off, size, kind)?;
        let va = self.linear(seg, off);
        self.check_alignment(va, size, natural(size))?;
        Ok(va)
    }

    /// The operand at `va` is a multiple of `align`, if that is checked; where it runs into
    /// the non-canonical hole or out of the address space another fault comes first.
    pub fn check_alignment(&self, va: u64, size: usize, align: usize) -> Result<(), Trap> {
        if self.aligned() && va & (align as u64 - 1) != 0 && canonical(va) && self.check_end(va, size).is_ok()
        {
            return Err(Exception::with(AC_, 0).into());
        }
        Ok(())
    }

    /// Offset `extra` bytes behind that of the explicit memory operand, in its segment.
    pub fn operand_offset(&self, i: &Instruction, extra: u64) -> u64 {
        let value = |r: Register| if r.is_gpr() { self.reg(r) } else { 0 };
        let scaled = value(i.memory_index()).wrapping_mul(u64::from(i.memory_index_scale()));
        let off = i
            .memory_displacement64()
            .wrapping_add(value(i.memory_base()))
            .wrapping_add(scaled)
            .wrapping_add(extra);
        let off = match address_size(i) {
            2 => off & 0xffff,
            4 => off & 0xffff_ffff,
            _ => off,
        };
        if self.cpu().code64() {
            off
        } else {
            off & 0xffff_ffff
        }
    }

    /// Linear address of the explicit memory operand, unchecked.
    pub fn operand_address(&self, i: &Instruction) -> u64 {
        self.operand_behind(i, 0)
    }

    /// Linear address `extra` bytes behind that of the explicit memory operand, unchecked.
    pub fn operand_behind(&self, i: &Instruction, extra: u64) -> u64 {
        self.linear(Self::segment_index(i.memory_segment()), self.operand_offset(i, extra))
    }

    /// Linear address of `size` bytes of the explicit memory operand, `extra` bytes
    /// behind its start; its segment must allow that.
    pub fn operand_at(&self, i: &Instruction, extra: u64, size: usize, kind: Kind) -> Result<u64, Trap> {
        let seg = Self::segment_index(i.memory_segment());
        self.segment_at(seg, self.operand_offset(i, extra), size, kind)
    }

    /// The same without a look at its alignment.
    pub fn operand_anywhere(
        &self,
        i: &Instruction,
        extra: u64,
        size: usize,
        kind: Kind,
    ) -> Result<u64, Trap> {
        let (seg, off) = (Self::segment_index(i.memory_segment()), self.operand_offset(i, extra));
        self.check_segment(seg, off, size, kind)?;
        Ok(self.linear(seg, off))
    }

    /// An operand that runs into the non-canonical hole, or out of a segment
    /// that spans all, faults before its pages do.
    pub fn check_end(&self, va: u64, length: usize) -> Result<(), Trap> {
        let last = va.wrapping_add(length as u64).wrapping_sub(1);
        let out = if self.cpu().code64() {
            !canonical(last)
        } else {
            self.mode() & (mode::BASED | mode::LIMITED) == 0 && last >> 32 != 0
        };
        if out {
            return Err(Exception::not_canonical(last).into());
        }
        Ok(())
    }
}
