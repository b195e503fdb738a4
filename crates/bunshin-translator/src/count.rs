//! Runs of exactly so many instructions, for those who compare executions
//! (docs/design/lockstep.md).
//!
//! Translations of such runs (`mode::COUNTED`) are not linked, so that every block comes
//! back here, and note in `cpu.begun` which of their instructions has begun. A block that
//! is longer than what is left to run is made once more, cut to that length
//! (`mode::CUT`), and thrown away after it ran.
use crate::interp::{Done, Flow};
use crate::translate::Version;
use crate::vcpu::Vcpu;
use bunshin_core::debug::Stop;
use bunshin_core::Exit;
use iced_x86::Instruction;
use std::sync::atomic::Ordering;

/// Something that the translator does wrong on purpose, so that those who judge it can
/// be tried.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Plant {
    /// CMC does nothing.
    WrongFlag,
    /// Bit 3 of the address of a page fault is inverted.
    FaultAddress,
    /// Stores into code leave its translations alone.
    StaleCode,
    /// INVLPG does nothing.
    StaleTlb,
    /// Nobody looks for interrupts behind STI.
    LostWindow,
}

impl Plant {
    /// All of them by name.
    pub const ALL: [(&'static str, Plant); 5] = [
        ("wrong-flag", Plant::WrongFlag),
        ("fault-address", Plant::FaultAddress),
        ("stale-code", Plant::StaleCode),
        ("stale-tlb", Plant::StaleTlb),
        ("lost-window", Plant::LostWindow),
    ];
}

const DONE: Exit = Exit::Debug { stop: Stop::Step };

impl Vcpu {
    /// Translated instructions are counted.
    pub fn counting(&self) -> bool {
        self.debugger.until.is_some() && !self.debugger.steps()
    }

    /// An exit that leaves no trace in the run after it.
    pub fn counted_stop(&mut self, e: &Exit) -> bool {
        let counted = *e == DONE && self.debugger.until.is_some();
        self.resumed &= counted;
        counted
    }

    /// `eventful`; on the way from one block to the next nobody asks whether interrupts
    /// wait, since whatever opens a window for them looks itself.
    pub fn eventful_after(&self, resumed: bool) -> bool {
        let c = self.cpu();
        self.eventful()
            && !(resumed && self.counting() && c.pending.load(Ordering::Relaxed) == 0 && c.halted == 0)
    }

    /// The instruction that `cpu.begun` counts last was not executed.
    pub fn not_begun(&mut self) {
        let c = self.cpu_mut();
        c.begun = c.begun.saturating_sub(1);
    }

    /// A block was left for good: add up what was executed of it.
    pub fn tally(&mut self) {
        let begun = u64::from(std::mem::take(&mut self.cpu_mut().begun));
        if begun != 0 {
            self.executed += begun - u64::from(std::mem::take(&mut self.unfinished));
        }
        if let Some(id) = self.cut.take() {
            self.kill(id);
        }
    }

    /// An instruction outside of blocks was performed, if it was.
    pub fn count_step(&mut self) {
        let done = std::mem::take(&mut self.debugger.stepped);
        if done && self.counting() && self.cpu().begun == 0 {
            self.executed += u64::from(!std::mem::take(&mut self.unfinished));
        }
    }

    /// Enough was executed.
    pub fn counted_enough(&self) -> bool {
        let d = &self.debugger;
        d.until.is_some_and(|until| self.executed >= until) || d.early && self.executed > self.started
    }

    /// At the end of a block or instruction: the exit if enough was executed.
    pub fn spent(&mut self) -> Option<Exit> {
        self.tally();
        if let Some(e) = &self.fatal {
            return Some(e.clone());
        }
        if !self.counted_enough() {
            return None;
        }
        // It belongs to the instruction that met it.
        if let Some(e) = self.deferred.take() {
            self.deliver(e);
        }
        Some(self.debugger.take_stop().unwrap_or(DONE))
    }

    /// The processor halts in a run that counts: time is its owner's.
    pub fn halted_stop(&mut self) -> Option<Exit> {
        self.debugger.until?;
        self.tally();
        // What ends HLT comes from outside.
        self.look = true;
        Some(DONE)
    }

    /// The block to enter next, not longer than what is left.
    pub fn counted_block(&mut self, rip: u64, alone: bool) -> Option<u32> {
        if self.cache_full() {
            self.flush_code();
        }
        let left = self.debugger.until.map_or(0, |until| until.saturating_sub(self.executed));
        let mut version = if alone { Version::Alone } else { Version::First };
        let found = match self.find_block(rip, alone) {
            Some(id) => Ok(id),
            None => self.translate(rip, &mut version),
        };
        let found = match found {
            Ok(id) if u64::from(self.blocks.all[id as usize].count) > left => {
                self.cut_at = Some(left as usize);
                let cut = self.translate(rip, &mut version);
                self.cut_at = None;
                self.cut = cut.ok();
                cut
            }
            found => found,
        };
        match found {
            Ok(id) => Some(id),
            Err(e) => {
                self.deliver(e);
                self.executed += 1;
                None
            }
        }
    }

    /// Walk and translate afresh for the next instruction.
    pub fn forget_tables(&mut self) {
        let user = self.user_region;
        self.regions.all[0].flush();
        self.regions.all[user].flush();
        self.cpu_mut().kuser = 0;
    }
}

/// RDRAND and RDSEED: the same numbers in every run.
pub fn random(v: &mut Vcpu, i: &Instruction) -> Done {
    v.draws += 1;
    // SplitMix64.
    let mut x = v.draws.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    v.set_reg(i.op0_register(), x ^ x >> 31);
    v.cpu_mut().set_arith(crate::cpu::CF);
    Ok(Flow::Next)
}
