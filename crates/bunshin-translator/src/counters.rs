//! What a processor did so far: counts, and the time that its parts took.
//!
//! `src/bunshin/stats.py` says to people what each figure means. Parts that run too
//! often to be timed every time are sampled ([`Sampled`]); nothing here costs more
//! than an increment where translated code waits for it.
use bunshin_core::clock;
use iced_x86::{Instruction, Mnemonic as M};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// What happened so far.
        #[derive(Default, Debug, Clone)]
        pub struct Counters {
            $($(#[$doc])* pub $name: u64,)*
            /// Calls of helpers, by family.
            pub families: [u64; Family::NAMES.len()],
        }
        impl Counters {
            /// Name and value of every counter.
            pub fn list(&self) -> Vec<(&'static str, u64)> {
                let mut all = vec![$((stringify!($name), self.$name),)*];
                all.extend(Family::NAMES.into_iter().zip(self.families));
                all
            }
        }
    };
}

counters! {
    /// Blocks translated.
    blocks,
    instructions_translated,
    host_bytes,
    /// Blocks translated again because samples found them frequent.
    hot_blocks,
    /// Dropped blocks that fitted again.
    revived,
    /// Page walks.
    walks,
    /// Misses of single loads and stores in translated code.
    tlb_load,
    tlb_store,
    /// Misses of shared checks.
    tlb_group,
    /// Page walks for code.
    tlb_fetch,
    /// Entries made for accesses that Rust performs.
    tlb_helper,
    /// Misses that the table cannot serve.
    tlb_slow,
    tlb_flushes,
    invlpg,
    cr3_writes,
    /// Indirect jumps that missed the jump cache.
    lookups,
    links,
    /// Blocks dropped because their code changed.
    killed,
    /// Pages whose blocks were all dropped.
    pages_dropped,
    code_writes,
    cache_flushes,
    /// Instructions performed one at a time.
    slow_steps,
    exceptions,
    /// Those of them that are page faults.
    page_faults,
    interrupts,
    /// Events that stopped translated code.
    events,
    /// Times that all other processors stood still for this one.
    exclusive_sections,
    helpers,
    halts,
    /// Processes made for direct execution.
    direct_sandboxes,
    /// Times that guest code in them stopped.
    direct_traps,
    /// Those that were for a page to be mapped, for a system call, and for an instruction
    /// that the translator performs.
    direct_fills,
    direct_calls,
    direct_steps,
    /// Times that code could not be run directly for instructions that show the host.
    direct_unguarded,
    /// Sandboxes that guest code has destroyed.
    direct_losses,
    port_accesses,
    device_accesses,
}

/// Kinds of instructions that Rust performs.
#[derive(Clone, Copy)]
#[repr(u8)]
pub enum Family {
    Port,
    String,
    Stack,
    Segment,
    /// Into the kernel and out of it.
    Entry,
    Branch,
    /// Control registers, interrupt flag, bases.
    System,
    Msr,
    Cpuid,
    Invalidate,
    Halt,
    /// Saving and restoring the state of FPU and vector unit.
    Context,
    Other,
}

impl Family {
    /// Names of their counters, in order.
    pub const NAMES: [&'static str; 13] = [
        "helpers.port",
        "helpers.string",
        "helpers.stack",
        "helpers.segment",
        "helpers.entry",
        "helpers.branch",
        "helpers.system",
        "helpers.msr",
        "helpers.cpuid",
        "helpers.invalidate",
        "helpers.halt",
        "helpers.context",
        "helpers.other",
    ];

    pub fn of(i: &Instruction) -> Self {
        use Family::*;
        let segment = (0..i.op_count()).any(|n| i.op_register(n).is_segment_register());
        match i.mnemonic() {
            M::In | M::Out | M::Insb | M::Insw | M::Insd | M::Outsb | M::Outsw | M::Outsd => Port,
            M::Syscall | M::Sysret | M::Sysretq | M::Sysenter | M::Sysexit | M::Sysexitq => Entry,
            M::Int | M::Int1 | M::Int3 | M::Into | M::Iret | M::Iretd | M::Iretq => Entry,
            M::Call | M::Jmp | M::Ret | M::Retf | M::Loop | M::Loope | M::Loopne => Branch,
            M::Jcxz | M::Jecxz | M::Jrcxz => Branch,
            M::Mov | M::Push | M::Pop if segment => Segment,
            M::Lgdt | M::Lidt | M::Sgdt | M::Sidt | M::Lldt | M::Ltr | M::Sldt | M::Str => Segment,
            M::Lar | M::Lsl | M::Verr | M::Verw | M::Les | M::Lds | M::Lss | M::Lfs | M::Lgs => Segment,
            M::Arpl => Segment,
            M::Push | M::Pop | M::Leave | M::Enter | M::Pusha | M::Pushad | M::Popa | M::Popad => Stack,
            M::Pushf | M::Pushfd | M::Pushfq | M::Popf | M::Popfd | M::Popfq => Stack,
            M::Mov | M::Cli | M::Sti | M::Clac | M::Stac | M::Swapgs | M::Lmsw | M::Smsw | M::Clts => System,
            M::Rdfsbase | M::Rdgsbase | M::Wrfsbase | M::Wrgsbase | M::Xgetbv | M::Xsetbv => System,
            M::Rdmsr | M::Wrmsr | M::Rdtsc | M::Rdtscp | M::Rdpid | M::Rdpmc => Msr,
            M::Cpuid => Cpuid,
            M::Invlpg | M::Invpcid | M::Invd | M::Wbinvd | M::Wbnoinvd => Invalidate,
            M::Hlt | M::Monitor | M::Mwait => Halt,
            M::Fxsave | M::Fxsave64 | M::Fxrstor | M::Fxrstor64 | M::Xsave | M::Xsave64 => Context,
            M::Xsaveopt | M::Xsaveopt64 | M::Xsavec | M::Xsavec64 | M::Xsaves | M::Xsaves64 => Context,
            M::Xrstor | M::Xrstor64 | M::Xrstors | M::Xrstors64 => Context,
            M::Fnstenv | M::Fldenv | M::Fnsave | M::Frstor => Context,
            M::Movsb | M::Movsw | M::Movsd | M::Movsq | M::Stosb | M::Stosw | M::Stosd | M::Stosq => String,
            M::Lodsb | M::Lodsw | M::Lodsd | M::Lodsq | M::Scasb | M::Scasw | M::Scasd | M::Scasq => String,
            M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq => String,
            _ => Other,
        }
    }
}

/// Time of something frequent: one call in `PERIOD` is timed and stands for all.
/// The period is a prime, so that it falls into step with no loop of the guest.
#[derive(Default, Debug)]
pub struct Sampled<const PERIOD: u32> {
    left: u32,
    ticks: u64,
}

impl<const PERIOD: u32> Sampled<PERIOD> {
    /// At the start; the result is for `stop`.
    #[inline]
    pub fn start(&mut self) -> Option<u64> {
        if self.left == 0 {
            self.left = PERIOD - 1;
            return Some(clock::rdtsc());
        }
        self.left -= 1;
        None
    }

    #[inline]
    pub fn stop(&mut self, started: Option<u64>) {
        if let Some(t) = started {
            self.ticks += (clock::rdtsc() - t) * u64::from(PERIOD);
        }
    }
}

/// Ticks of the time-stamp counter that the parts took.
#[derive(Default, Debug)]
pub struct Times {
    /// Translating.
    pub translating: u64,
    /// Misses of the TLB.
    pub fill: Sampled<61>,
    /// Looking up blocks for jumps.
    pub find: Sampled<61>,
    /// Helpers that translated code calls.
    pub inside: Sampled<61>,
    /// Helpers outside translated code.
    pub outside: Sampled<13>,
    /// Single instructions.
    pub slow: Sampled<13>,
    /// Interrupts and other events, without HLT.
    pub events: u64,
    /// User code running directly, with the ways there and back.
    pub direct: u64,
    /// Waiting in HLT.
    pub halted: u64,
}

impl Times {
    /// Name and nanoseconds of every part.
    pub fn list(&self) -> Vec<(&'static str, u64)> {
        let hz = u128::from(clock::tsc_hz());
        let parts = [
            ("time.translating_ns", self.translating),
            ("time.tlb_ns", self.fill.ticks),
            ("time.lookup_ns", self.find.ticks),
            ("time.helpers_ns", self.inside.ticks + self.outside.ticks),
            ("time.slow_path_ns", self.slow.ticks),
            ("time.events_ns", self.events),
            ("time.direct_ns", self.direct),
            ("time.halted_ns", self.halted),
        ];
        let ns = |ticks: u64| (u128::from(ticks) * 1_000_000_000 / hz) as u64;
        parts.into_iter().map(|(name, ticks)| (name, ns(ticks))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_in_a_period_is_timed_and_stands_for_all() {
        let mut sampled = Sampled::<13>::default();
        let timed = (0..130).filter(|_| {
            let started = sampled.start();
            sampled.stop(started);
            started.is_some()
        });
        assert_eq!(timed.count(), 10);
        assert_eq!(sampled.ticks % 13, 0);
        assert!(sampled.ticks > 0);
    }

    #[test]
    fn families_have_their_names_in_order() {
        assert_eq!(Family::NAMES[Family::Port as usize], "helpers.port");
        assert_eq!(Family::NAMES[Family::Cpuid as usize], "helpers.cpuid");
        assert_eq!(Family::NAMES[Family::Other as usize], "helpers.other");
    }
}
