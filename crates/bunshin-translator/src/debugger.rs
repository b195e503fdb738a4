//! What the owner stops this processor for: breakpoints, watchpoints, steps
//! (`bunshin_core::debug`). The guest has debug registers of its own (`interp/debug.rs`).
//!
//! A breakpoint costs nothing but where it is: translations near it are dropped when it
//! comes or goes, and the new ones leave in front of its instruction, with every flag as
//! it is. Pages that are watched get no entry in the TLB's tables, as those with the
//! guest's own breakpoints on data. Steps do not use translations at all.
use crate::block::Key;
use crate::interp::debug::OWNER;
use crate::interp::Done;
use crate::mmu::{Kind, Trap};
use crate::vcpu::{mode, Vcpu};
use bunshin_core::debug::{Access, Debugging, Stop, Watchpoint};
use bunshin_core::{Exit, Reply};
use iced_x86::Instruction;
use std::sync::atomic::Ordering;

/// The owner's wishes, and what has come of them.
#[derive(Default)]
pub struct Debugger {
    /// Sorted.
    pub breakpoints: Vec<u64>,
    watchpoints: Vec<Watchpoint>,
    step: bool,
    interrupts: bool,
    /// `Vcpu::executed` at which to stop, and whether to stop at every block's end.
    pub until: Option<u64>,
    pub early: bool,
    /// What the present instruction accessed, if `Vcpu::met` says that it did.
    seen: Option<Watchpoint>,
    /// The owner is to be told at the next boundary.
    stop: Option<Watchpoint>,
    /// Since this was last cleared, an instruction was completed or an event delivered.
    pub stepped: bool,
}

impl Debugger {
    /// There is a breakpoint on the instruction at linear address `at`.
    pub fn breaks_at(&self, at: u64) -> bool {
        !self.breakpoints.is_empty() && self.breakpoints.binary_search(&at).is_ok()
    }

    pub fn is_watching(&self) -> bool {
        !self.watchpoints.is_empty()
    }

    /// Runs are single steps.
    pub fn steps(&self) -> bool {
        self.step
    }

    /// Interrupts wait until the owner lets the processor run.
    pub fn holds_interrupts(&self) -> bool {
        self.step && !self.interrupts
    }

    /// A watchpoint that hears of accesses of `kind` in `[va, va + size)`.
    pub fn watches(&self, va: u64, size: u64, kind: Kind) -> Option<Watchpoint> {
        let hit = |w: &&Watchpoint| {
            let heard = match w.access {
                Access::Read => kind == Kind::Read,
                Access::Write => kind == Kind::Write,
                Access::Any => kind != Kind::Fetch,
            };
            // Without sums, which could pass the end of the address space.
            heard && (va.wrapping_sub(w.gva) < w.length || w.gva.wrapping_sub(va) < size)
        };
        self.watchpoints.iter().find(hit).copied()
    }

    /// The exit of an access that was watched.
    pub fn take_stop(&mut self) -> Option<Exit> {
        self.stop.take().map(|w| Exit::Debug { stop: Stop::Watchpoint(w) })
    }
}

impl Vcpu {
    /// Stop for this from now on. `d` was checked.
    pub fn set_debug(&mut self, d: &Debugging) {
        let mut breakpoints = d.breakpoints.clone();
        breakpoints.sort_unstable();
        breakpoints.dedup();
        let old = std::mem::replace(&mut self.debugger.breakpoints, breakpoints);
        let new = &self.debugger.breakpoints;
        let changed: Vec<u64> = old
            .iter()
            .filter(|&at| new.binary_search(at).is_err())
            .chain(new.iter().filter(|&at| old.binary_search(at).is_err()))
            .copied()
            .collect();
        if !changed.is_empty() {
            self.forget_near(&changed);
        }
        if self.debugger.watchpoints != d.watchpoints {
            self.debugger.watchpoints.clone_from(&d.watchpoints);
            self.flush_tlb_all();
        }
        self.debugger.step = d.step;
        self.debugger.interrupts = d.interrupts;
        let counted = self.counting();
        self.debugger.until = d.count.map(|n| self.executed.saturating_add(n));
        self.debugger.early = d.early;
        self.started = self.executed;
        if counted != self.counting() {
            self.select_region();
        }
        self.debugger.stepped = false;
        self.debugger.stop = None;
        // A run that goes on counting is to look for events as if it had never stopped.
        self.look |= d.count.is_none();
        self.left = None;
    }

    /// Drop the translations that may contain the instructions at linear addresses
    /// `places`, or have looked ahead at them.
    fn forget_near(&mut self, places: &[u64]) {
        // A base of CS stands between an offset and its linear address.
        let near = |key: &Key| {
            key.mode & mode::BASED != 0
                || places.iter().any(|at| (key.va >> 12).wrapping_sub(at >> 12).wrapping_add(1) <= 2)
        };
        self.graves.retain(|key, _| !near(key));
        for id in 0..self.blocks.all.len() as u32 {
            if near(&self.blocks.all[id as usize].key) {
                self.kill(id);
            }
        }
    }

    /// Note whether the owner watches an access of the present instruction.
    pub fn note_owners(&mut self, va: u64, size: u64, kind: Kind) {
        if let Some(w) = self.debugger.watches(va, size, kind) {
            self.debugger.seen = Some(w);
            self.met |= OWNER;
        }
    }

    /// The present instruction is complete, and made an access that is watched.
    pub fn stop_for_owner(&mut self) {
        self.debugger.stop = self.debugger.seen.take();
        self.cpu().pending.store(1, Ordering::Release);
    }

    /// The exit in front of the instruction at rip, if the owner stops there.
    pub fn owners_breakpoint(&self) -> Option<Exit> {
        let at = self.linear_rip(self.cpu().rip);
        self.debugger.breaks_at(at).then_some(Exit::Debug { stop: Stop::Breakpoint(at) })
    }

    /// Interrupts that would be delivered now wait, but they end HLT.
    pub fn hold_interrupts(&mut self) {
        let c = self.cpu();
        let (open, nmi_open) = (c.iflag != 0, c.nmi_blocked == 0);
        let waiting = self.chips.pending(self.index);
        let wakes = waiting && open || nmi_open && self.chips.nmi(self.index);
        let c = self.cpu_mut();
        c.irq_waiting = waiting.into();
        if wakes {
            c.halted = 0;
        }
        // For the run that delivers them.
        self.look = true;
    }

    /// Run until one instruction is done or one event delivered.
    pub fn run_one(&mut self, reply: Reply) -> Exit {
        self.left = None;
        if self.owed.is_some() {
            self.answer(reply);
            if let Some(e) = self.step() {
                return e;
            }
        }
        loop {
            if let Some(e) = &self.fatal {
                return e.clone();
            }
            if let Some(e) = self.outbox.pop_front() {
                return e;
            }
            if self.debugger.until.is_some() {
                if std::mem::take(&mut self.debugger.stepped) {
                    self.executed += u64::from(!std::mem::take(&mut self.unfinished));
                }
                if let Some(e) = self.spent() {
                    return e;
                }
                self.forget_tables();
            } else if std::mem::take(&mut self.debugger.stepped) {
                return self.debugger.take_stop().unwrap_or(Exit::Debug { stop: Stop::Step });
            }
            if let Some(e) = self.events() {
                return e;
            }
            if self.debugger.until.is_some() {
                // An interrupt is no instruction.
                self.debugger.stepped = false;
            }
            if self.cpu().halted != 0 || self.debugger.stepped {
                continue;
            }
            let e = match self.code_breakpoint() {
                Some(e) => {
                    self.deliver(e);
                    self.debugger.stepped = true;
                    None
                }
                None => self.step(),
            };
            if let Some(e) = e {
                return e;
            }
        }
    }
}

/// In front of an instruction with a breakpoint.
pub fn at_owners_breakpoint(v: &mut Vcpu, i: &Instruction) -> Done {
    let at = v.linear_rip(i.ip());
    Err(Trap::Exit(Exit::Debug { stop: Stop::Breakpoint(at) }))
}
