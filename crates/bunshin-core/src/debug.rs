//! What an owner may want to stop a processor for, unseen by the guest.
//!
//! Nothing of it shows in the guest's memory, debug registers or flags, so that a guest
//! with a debugger of its own may be debugged. It has the shape of what KVM offers
//! (`KVM_SET_GUEST_DEBUG`): an engine that holds breakpoints in the host's debug
//! registers refuses more of them than there are.
use crate::error::{EngineError, Result};

/// Most breakpoints and most watchpoints that any engine takes.
pub const MOST: usize = 4096;

/// Which accesses of a watched range count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Loads.
    Read,
    /// Stores.
    Write,
    /// Both.
    Any,
}

/// A range of guest-virtual (linear) addresses, in whatever address space is current.
/// Accesses that instructions make count; those by which the processor reads its own
/// tables or writes an interrupt's frame do not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Watchpoint {
    /// First address.
    pub gva: u64,
    /// Bytes, at least 1.
    pub length: u64,
    /// Loads, stores or both.
    pub access: Access,
}

/// Everything that a processor is to stop for; the default is nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Debugging {
    /// Linear addresses of instructions. The processor stops before such an instruction,
    /// also if it is the first of a run; only a step executes it.
    pub breakpoints: Vec<u64>,
    /// The processor stops behind an instruction that makes such an access.
    pub watchpoints: Vec<Watchpoint>,
    /// Execute one instruction, breakpoint or not, or deliver the exception that it
    /// raises, and stop. A processor that waits in HLT waits for its interrupt first.
    /// Of a repeated string instruction, one element counts at least.
    pub step: bool,
    /// Deliver interrupts while stepping, each a step of its own. Otherwise they wait.
    pub interrupts: bool,
    /// Stop after exactly so many instructions, or when the processor halts, and say
    /// [`Stop::Step`]. With `step` they are executed one by one, else as always, with
    /// interrupts as always; there an instruction counts that was attempted, a repeated
    /// string instruction once, and an interrupt does not.
    pub count: Option<u64>,
    /// With `count`: stop earlier, where the engine comes to the end of what it
    /// executes in one piece; [`crate::Vcpu::executed`] tells where that is.
    pub early: bool,
}

impl Debugging {
    /// Refuse what makes no sense: a slug `debug` and a sentence.
    pub fn check(&self) -> Result<()> {
        let bad = |what: String| Err(EngineError::new("debug", what));
        let most = self.breakpoints.len().max(self.watchpoints.len());
        if most > MOST {
            return bad(format!("{most} breakpoints or watchpoints, at most {MOST} can be set"));
        }
        for w in &self.watchpoints {
            if w.length == 0 || w.gva.checked_add(w.length - 1).is_none() {
                let (gva, length) = (w.gva, w.length);
                return bad(format!("a watchpoint of {length} bytes at {gva:#x} is no range of addresses"));
            }
        }
        Ok(())
    }
}

/// Why a processor stopped for its owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// In front of the instruction at this linear address.
    Breakpoint(u64),
    /// Behind an instruction that made such an access.
    Watchpoint(Watchpoint),
    /// A step is done.
    Step,
}
