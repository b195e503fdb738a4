//! The whole architectural state of one virtual processor, the same for every
//! engine: that is what lets a running guest move between engines.
use serde::{Deserialize, Serialize};

/// A segment register with its hidden part.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Visible selector.
    pub selector: u16,
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes, already scaled by the granularity bit.
    pub limit: u32,
    /// Descriptor bits 40..55 as in the second descriptor dword bits 8..23:
    /// type(0-3) S(4) DPL(5-6) P(7) AVL(12) L(13) D/B(14) G(15). Bit 16 set: unusable.
    pub access: u32,
}

/// GDTR or IDTR.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// What kind of event waits to be delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EventKind {
    /// An external interrupt that its controller has handed over.
    Interrupt,
    /// A non-maskable interrupt.
    Nmi,
    /// A fault or trap, with its error code where the vector has one. CR2 and DR6 tell
    /// of it already.
    Exception,
}

/// An event that was on its way to its handler when the state was copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// What it is.
    pub kind: EventKind,
    /// Index into the interrupt descriptor table.
    pub vector: u8,
    /// Error code.
    pub error: Option<u32>,
}

/// A processor's clocks, counted on the host's time-stamp counter: of no use on
/// another host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Times {
    /// The guest's time-stamp counter less the host's.
    pub tsc_offset: u64,
    /// The guest's system time (kvmclock), nanoseconds.
    pub system_ns: u64,
    /// The host's time-stamp counter at that time.
    pub at: u64,
}

/// Registers, segments, control and model-specific registers, FPU and vector
/// state, local APIC and pending events of one virtual processor.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuState {
    /// rax rcx rdx rbx rsp rbp rsi rdi r8..r15, in encoding order.
    pub gpr: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// es cs ss ds fs gs, in encoding order.
    pub segments: [Segment; 6],
    /// Local descriptor table.
    pub ldt: Segment,
    /// Task register.
    pub tr: Segment,
    /// Global descriptor table.
    pub gdt: Table,
    /// Interrupt descriptor table.
    pub idt: Table,
    /// Control registers 0, 2, 3, 4, 8.
    pub cr0: u64,
    /// Page-fault linear address.
    pub cr2: u64,
    /// Page-table base.
    pub cr3: u64,
    /// Extensions.
    pub cr4: u64,
    /// Task priority.
    pub cr8: u64,
    /// Extended control register 0.
    pub xcr0: u64,
    /// Debug registers 0..3, 6, 7.
    pub dr: [u64; 6],
    /// Model-specific registers as (index, value), sorted by index.
    pub msrs: Vec<(u32, u64)>,
    /// XSAVE area in standard (non-compacted) form.
    #[serde(with = "serde_bytes")]
    pub xsave: Vec<u8>,
    /// Local APIC registers, 1 KiB page as in the manual.
    #[serde(with = "serde_bytes")]
    pub lapic: Vec<u8>,
    /// Time-stamp counter at the moment of the copy.
    pub tsc: u64,
    /// The processor waits in HLT.
    pub halted: bool,
    /// One-instruction interrupt shadow after STI or MOV SS.
    pub interrupt_shadow: bool,
    /// NMIs are blocked until IRET.
    pub nmi_blocked: bool,
    /// The processor does nothing before a start-up IPI.
    #[serde(default)]
    pub waits_for_sipi: bool,
    /// An NMI that waits until it may be delivered.
    #[serde(default)]
    pub nmi_pending: bool,
    /// An event to deliver before the next instruction.
    #[serde(default)]
    pub event: Option<Event>,
}

/// Index into [`CpuState::segments`].
pub mod seg {
    /// ES.
    pub const ES: usize = 0;
    /// CS.
    pub const CS: usize = 1;
    /// SS.
    pub const SS: usize = 2;
    /// DS.
    pub const DS: usize = 3;
    /// FS.
    pub const FS: usize = 4;
    /// GS.
    pub const GS: usize = 5;
}
