//! Which arithmetic flags an instruction reads and surely overwrites.
//!
//! A probe of the software TLB changes the host's flags, so before each memory
//! access the translator must know whether the guest's flags are still wanted.
use iced_x86::{Code, FlowControl, Instruction, Mnemonic as M, OpKind, RflagsBits};

/// OF SF ZF AF CF PF in iced's numbering.
pub const ALL: u32 =
    RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;

/// Effect of one instruction on the arithmetic flags.
#[derive(Clone, Copy, Debug, Default)]
pub struct Effect {
    pub reads: u32,
    /// May change.
    pub writes: u32,
    /// Overwritten whatever the operands are.
    pub kills: u32,
}

impl Effect {
    /// Flags live before the instruction, given those live after it.
    pub fn live_before(&self, after: u32) -> u32 {
        (after & !self.kills) | self.reads
    }
}

/// A shift or rotate count that may be zero at run time, or is.
fn count_may_be_zero(i: &Instruction) -> bool {
    let count = match i.mnemonic() {
        M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shl | M::Sal | M::Shr | M::Sar => 1,
        M::Shld | M::Shrd => 2,
        _ => return false,
    };
    match i.op_kind(count) {
        OpKind::Immediate8 => i.immediate8() & 0x1f == 0,
        OpKind::Register => true,
        _ => false,
    }
}

/// The effect of `i` on the arithmetic flags.
pub fn effect(i: &Instruction) -> Effect {
    // A division that faults shows the flags to its handler.
    let divides = matches!(i.mnemonic(), M::Div | M::Idiv);
    let reads = if divides { ALL } else { i.rflags_read() & ALL };
    let sure = (i.rflags_written() | i.rflags_cleared() | i.rflags_set()) & ALL;
    let mut e = Effect { reads, writes: sure | (i.rflags_undefined() & ALL), kills: sure };
    if e.writes == 0 && matches!(i.mnemonic(), M::Rcl | M::Rcr) && !count_may_be_zero(i) {
        // Whole turns change nothing, but processors compute OF.
        e = Effect { reads: RflagsBits::CF, writes: RflagsBits::CF | RflagsBits::OF, kills: 0 };
    }
    if e.writes != 0 {
        match i.mnemonic() {
            // AF is declared undefined here; processors clear it.
            M::And | M::Or | M::Xor | M::Test => e.kills = ALL,
            _ if count_may_be_zero(i) => e.kills = 0,
            _ if i.has_rep_prefix() || i.has_repne_prefix() => e.kills = 0,
            _ => {}
        }
    }
    e
}

/// Flags that code starting with `next()` may read before overwriting them.
/// `next` gives None where it cannot look further.
pub fn live_ahead(mut next: impl FnMut() -> Option<Instruction>) -> u32 {
    let (mut live, mut open) = (0, ALL);
    for _ in 0..10 {
        let Some(i) = next() else { return live | open };
        if i.code() == Code::INVALID {
            return live | open;
        }
        let e = effect(&i);
        live |= e.reads & open;
        open &= !e.kills;
        if open == 0 {
            return live;
        }
        match i.flow_control() {
            FlowControl::Next => {}
            _ => return live | open,
        }
    }
    live | open
}
