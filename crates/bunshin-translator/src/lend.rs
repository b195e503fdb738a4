//! Single instructions for another engine: it lends the state of one of its processors,
//! without the interrupt controllers, which stay where they are.
use crate::engine::TranslatorVcpu;
use crate::signals;
use crate::vcpu::Vcpu;
use bunshin_core::{CpuState, Exit, Result, Times};

impl TranslatorVcpu {
    /// Take over a state to perform instructions of. Its local APIC and its kvmclock
    /// are not touched.
    ///
    /// # Errors
    /// The state cannot be this engine's.
    pub fn borrow(&mut self, state: &CpuState, times: &Times) -> Result<()> {
        self.0.foreign = true;
        self.0.visit(|v| {
            v.cpu_mut().tsc_offset = times.tsc_offset;
            v.set_state(state)
        })
    }

    /// Perform one instruction, or deliver the event that waits. An exit wants its
    /// answer by `complete`.
    pub fn step(&mut self) -> Option<Exit> {
        // Faults of copied instructions find their way by that.
        self.0.attach();
        let exit = self.0.visit(|v| match v.incoming.take() {
            Some(event) => {
                v.take_event(&event);
                None
            }
            None => v.step(),
        });
        signals::leave();
        let exit = exit.or_else(|| self.0.fatal.clone());
        if let Some(e) = &exit {
            self.0.owe(e);
        }
        exit
    }

    /// What `step` or `complete` could not go on from.
    pub fn fatal(&self) -> Option<Exit> {
        self.0.fatal.clone()
    }

    /// The state after that. The local APIC's part of it means nothing.
    pub fn give_back(&mut self) -> CpuState {
        self.0.visit(Vcpu::state)
    }

    /// It runs at privilege level 3.
    pub fn in_user_mode(&self) -> bool {
        self.0.cpu().cpl == 3
    }

    /// The instruction that is next; none where it cannot be fetched.
    pub fn next_instruction(&mut self) -> Option<iced_x86::Instruction> {
        self.0.visit(|v| v.fetch().ok())
    }
}
