//! How to compute the arithmetic flags again.
//!
//! Probes change the host's flags. Where the instruction that set the guest's
//! last was a comparison, a logical operation or an addition of a constant, and
//! its registers still hold what they held, one or two instructions bring the
//! flags back, so that probes in between need not keep them.
use crate::asm::{Asm, Label};
use crate::flags::{Effect, ALL};
use crate::insn::gpr_number;
use crate::revive::{patchable, Patch};
use crate::translate::Homes;
use iced_x86::{Instruction, Mnemonic as M, OpKind};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Source {
    Reg(u8),
    Imm(i32),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    /// CMP or TEST of what the registers hold.
    Cmp(Source),
    Test(Source),
    /// The register holds the sum (difference) with a constant, and has moved
    /// by `shift` since.
    Add(i32),
    Sub(i32),
}

/// The flags as a function of registers that have not changed.
#[derive(Clone, Copy, Debug)]
pub struct Recipe {
    kind: Kind,
    reg: u8,
    wide: bool,
    shift: i64,
    /// Where its constant stands in the guest's code, from the block's start, if
    /// that may change.
    constant: Option<u16>,
}

fn register(i: &Instruction, n: u32, homes: &Homes) -> Option<(u8, bool)> {
    if i.op_kind(n) != OpKind::Register {
        return None;
    }
    let r = i.op_register(n);
    let (g, _) = gpr_number(r).filter(|g| !g.1 && homes.of(g.0).is_some())?;
    (r.size() >= 4).then_some((g, r.size() == 8))
}

impl Recipe {
    /// The recipe for the flags that `i` has just set.
    /// `offset` is its distance from the block's start.
    pub fn of(i: &Instruction, effect: &Effect, homes: &Homes, offset: u16) -> Option<Self> {
        if effect.kills != ALL || i.op_count() != 2 {
            return None;
        }
        let (reg, wide) = register(i, 0, homes)?;
        let constant = matches!(
            i.op_kind(1),
            OpKind::Immediate8
                | OpKind::Immediate32
                | OpKind::Immediate8to32
                | OpKind::Immediate8to64
                | OpKind::Immediate32to64
        )
        .then(|| i.immediate(1) as i32);
        let source = || match (constant, register(i, 1, homes)) {
            (Some(v), _) => Some(Source::Imm(v)),
            (None, Some((r, w))) if w == wide => Some(Source::Reg(r)),
            _ => None,
        };
        let small = |v: i32| v.unsigned_abs() < 1 << 30;
        let kind = match i.mnemonic() {
            M::Cmp => Kind::Cmp(source()?),
            M::Test => Kind::Test(source()?),
            // The result tells all, and CF and OF are clear.
            M::And | M::Or | M::Xor => Kind::Test(Source::Reg(reg)),
            M::Add => Kind::Add(constant.filter(|&v| small(v))?),
            M::Sub => Kind::Sub(constant.filter(|&v| small(v))?),
            _ => return None,
        };
        let constant = patchable(i).map(|(at, _)| offset.wrapping_add(at));
        Some(Self { kind, reg, wide, shift: 0, constant })
    }

    /// What is left of it after an instruction that leaves the flags alone,
    /// writes the registers `writes`, and moves the stack pointer by `stack`.
    pub fn after(mut self, writes: u16, stack: Option<i64>) -> Option<Self> {
        let mut lost = writes;
        if let (Some(by), 4) = (stack, self.reg) {
            if matches!(self.kind, Kind::Add(_) | Kind::Sub(_)) {
                self.shift += by;
                lost &= !(1 << 4);
            }
        }
        let mut mine = 1u16 << self.reg;
        if let Kind::Cmp(Source::Reg(r)) | Kind::Test(Source::Reg(r)) = self.kind {
            mine |= 1 << r;
        }
        (lost & mine == 0 && self.shift.unsigned_abs() < 1 << 30).then_some(self)
    }

    /// It reads guest register `n`.
    pub fn uses(&self, n: u8) -> bool {
        let other = matches!(self.kind, Kind::Cmp(Source::Reg(r)) | Kind::Test(Source::Reg(r)) if r == n);
        self.reg == n || other
    }

    /// Set the host's flags; may change `scratch`.
    pub fn emit(&self, a: &mut Asm, scratch: u8, homes: &Homes, patches: &mut Vec<(Label, Patch)>) {
        let reg = homes.of(self.reg).unwrap_or_default();
        let w = if self.wide { 0x48 } else { 0x40 };
        let pair = |a: &mut Asm, op: u8, other: u8| {
            let other = homes.of(other).unwrap_or_default();
            a.b(&[w | ((other >> 3) << 2) | (reg >> 3), op, 0xc0 | ((other & 7) << 3) | (reg & 7)]);
        };
        // A constant in its full length, so that another can take its place.
        let mut put = |a: &mut Asm, v: i64, negated, plus| {
            if let Some(guest) = self.constant {
                patches.push((a.here(), Patch { guest, host: 0, size: 4, negated, plus }));
            }
            a.d(v as u32);
        };
        let op = |a: &mut Asm, op: u8, slash: u8, reg: u8| {
            a.b(&[w | (reg >> 3), op, 0xc0 | (slash << 3) | (reg & 7)]);
        };
        match self.kind {
            Kind::Cmp(Source::Reg(r)) => pair(a, 0x39, r),
            Kind::Test(Source::Reg(r)) => pair(a, 0x85, r),
            Kind::Cmp(Source::Imm(v)) => {
                op(a, 0x81, 7, reg);
                put(a, v.into(), false, 0);
            }
            Kind::Test(Source::Imm(v)) => {
                op(a, 0xf7, 0, reg);
                put(a, v.into(), false, 0);
            }
            Kind::Add(v) => {
                a.lea_disp32(self.wide, scratch, reg);
                put(a, -i64::from(v) - self.shift, true, -self.shift as i32);
                op(a, 0x81, 0, scratch);
                put(a, v.into(), false, 0);
            }
            Kind::Sub(v) => {
                a.lea_disp32(self.wide, scratch, reg);
                put(a, i64::from(v) - self.shift, false, -self.shift as i32);
                op(a, 0x81, 5, scratch);
                put(a, v.into(), false, 0);
            }
        }
    }
}
