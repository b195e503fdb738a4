//! Instructions that KVM cannot emulate, performed by the translator.
//!
//! KVM ends a run with an emulation failure and the processor's state before the
//! instruction. The translator takes the registers over, performs the instruction (an
//! exception that it raises is delivered), and gives them back. The local APIC, the
//! other interrupt controllers and the clocks stay with KVM; an instruction that needs
//! them is one that KVM must do, and if it cannot, nobody can: the run fails, and the
//! sentence says so.
//!
//! What failed will fail again a few instructions on (STAC, the copy, CLAC), so the
//! translator goes on for a while: to user mode, which KVM runs well where it emulates
//! supervisor code, or to an instruction that is KVM's, or for [`MOST`] instructions.
use crate::vcpu::Processor;
use bunshin_core::chips::{IOAPIC_GPA, LAPIC_GPA};
use bunshin_core::{CpuState, EngineError, Exit, Reply, Result, Vcpu};
use bunshin_kvm::Failure;
use iced_x86::{Instruction, Mnemonic};

/// Instructions performed in one go, at most: kicks and interrupts wait meanwhile. KVM
/// performs one in half a microsecond where it emulates, a rescue takes fifty.
const MOST: u64 = 32;
const APIC_BASE: u32 = 0x1B;
const TSC_DEADLINE: u32 = 0x6E0;
/// Setting these writes to guest memory.
const KVMCLOCK: [u32; 2] = [0x4B56_4D00, 0x4B56_4D01];

/// What was rescued, and what is being.
#[derive(Default)]
pub struct Rescue {
    /// The state as KVM gave it, while an instruction waits for its owner.
    lent: Option<CpuState>,
    /// Instructions performed since.
    done: u64,
    rescues: u64,
    instructions: u64,
}

impl Rescue {
    /// An instruction waits for the owner's answer.
    pub fn under_way(&self) -> bool {
        self.lent.is_some()
    }

    pub fn stats(&self) -> [(&'static str, u64); 2] {
        [("rescues", self.rescues), ("rescued_instructions", self.instructions)]
    }
}

/// Instructions that have to do with what KVM keeps, and that it can emulate.
fn is_kvms(next: &Instruction) -> bool {
    use Mnemonic as M;
    let ports = matches!(
        next.mnemonic(),
        M::In | M::Out | M::Insb | M::Insw | M::Insd | M::Outsb | M::Outsw | M::Outsd
    );
    ports || matches!(next.mnemonic(), M::Rdmsr | M::Wrmsr | M::Hlt | M::Mwait | M::Vmcall | M::Vmmcall)
}

fn no_such(what: &str) -> EngineError {
    EngineError::new("engine", format!("there is no {what} to rescue with"))
}

impl Processor {
    /// Run in KVM, over the instructions that it cannot emulate.
    pub fn run_rescued(&mut self, reply: Reply) -> Exit {
        let mut reply = reply;
        if self.rescue.under_way() {
            if let Some(exit) = self.complete_rescue(reply) {
                return exit;
            }
            if let Some(exit) = &self.fatal {
                return exit.clone();
            }
            reply = Reply::None;
        }
        loop {
            let Some(kvm) = &mut self.kvm else {
                return Exit::Failed { reason: no_such("processor").message };
            };
            let exit = kvm.run(std::mem::take(&mut reply));
            if !matches!(exit, Exit::Failed { .. }) {
                return exit;
            }
            match kvm.take_failure() {
                Some(failure) if failure.emulation => {
                    if let Some(exit) = self.rescue(&failure) {
                        return exit;
                    }
                }
                _ => {
                    self.fatal = Some(exit.clone());
                    return exit;
                }
            }
        }
    }

    /// Get past an emulation failure. An exit: the owner is needed for that.
    fn rescue(&mut self, failure: &Failure) -> Option<Exit> {
        match self.lend() {
            Ok(()) => {
                self.rescue.done = 0;
                self.go_on()
            }
            Err(e) => {
                self.rescue.lent = None;
                let reason = format!("{}; the translator cannot help: {}", failure.reason, e.message);
                self.end(Exit::Failed { reason })
            }
        }
    }

    fn end(&mut self, exit: Exit) -> Option<Exit> {
        self.rescue.lent = None;
        self.fatal = Some(exit.clone());
        Some(exit)
    }

    /// Give the translator the registers.
    fn lend(&mut self) -> Result<()> {
        let kvm = self.kvm.as_mut().ok_or_else(|| no_such("processor"))?;
        let (state, times) = (kvm.state(), kvm.times());
        let mut lent = state.clone();
        lent.tsc = 0;
        lent.lapic = Vec::new();
        lent.waits_for_sipi = false;
        lent.nmi_pending = false;
        lent.msrs.retain(|m| !matches!(m.0, APIC_BASE | TSC_DEADLINE));
        lent.msrs.iter_mut().filter(|m| KVMCLOCK.contains(&m.0)).for_each(|m| m.1 = 0);
        self.translator()?.borrow(&lent, &times)?;
        self.rescue.lent = Some(state);
        self.rescue.rescues += 1;
        Ok(())
    }

    /// Perform instructions from the present one on, then give the registers back.
    fn go_on(&mut self) -> Option<Exit> {
        while self.rescue.done < MOST {
            let Some(translator) = &mut self.translator else { break };
            if self.rescue.done > 0 {
                let next = translator.next_instruction();
                if translator.in_user_mode() || next.is_none_or(|next| is_kvms(&next)) {
                    break;
                }
            }
            self.rescue.done += 1;
            self.rescue.instructions += 1;
            if let Some(exit) = translator.step() {
                return self.needs_owner(exit);
            }
        }
        self.give_back()
    }

    /// An exit in the middle of a rescue.
    fn needs_owner(&mut self, exit: Exit) -> Option<Exit> {
        let chip = |gpa: u64| matches!(gpa & !0xFFF, LAPIC_GPA | IOAPIC_GPA);
        match exit {
            Exit::MmioRead { gpa, .. } | Exit::MmioWrite { gpa, .. } if chip(gpa) => {
                if self.rescue.done > 1 {
                    // It has not happened, and KVM can do it.
                    self.rescue.instructions -= 1;
                    return self.give_back();
                }
                let reason = format!(
                    "KVM on this host cannot emulate an instruction that accesses an interrupt \
                     controller at gpa {gpa:#x}, and the translator has none of KVM's"
                );
                self.end(Exit::Failed { reason })
            }
            Exit::Failed { .. } | Exit::Shutdown { .. } => self.end(exit),
            other => Some(other),
        }
    }

    /// The owner's answer to an exit in the middle of a rescue.
    pub fn complete_rescue(&mut self, reply: Reply) -> Option<Exit> {
        let exit = self.translator.as_mut().and_then(|t| t.complete(reply).or_else(|| t.fatal()));
        match exit {
            Some(exit) => self.needs_owner(exit),
            None => self.give_back(),
        }
    }

    /// Give KVM the registers back.
    fn give_back(&mut self) -> Option<Exit> {
        let (Some(before), Some(translator), Some(kvm)) =
            (self.rescue.lent.take(), &mut self.translator, &mut self.kvm)
        else {
            return None;
        };
        let mut after = translator.give_back();
        for m in &mut after.msrs {
            // The chips and the clocks are KVM's.
            let chips = matches!(m.0, APIC_BASE | TSC_DEADLINE | 0x10) || KVMCLOCK.contains(&m.0);
            if let Some(own) = before.msrs.iter().find(|own| own.0 == m.0).filter(|_| chips) {
                m.1 = own.1;
            }
        }
        match kvm.put_back(&before, &after) {
            Ok(()) => None,
            Err(e) => self.end(Exit::Failed { reason: e.message }),
        }
    }
}
