//! The processor page: everything that translated code reaches through `gs`.
//!
//! ```text
//! gs + 0          Cpu (this struct), the same host pages in every region
//! gs + TAG_R      64 Ki negated page addresses, loads      \
//! gs + TAG_W      64 Ki negated page addresses, stores      | one set a region
//! gs + HOST       64 Ki host page addresses                 | (mmu.rs)
//! gs + JC         64 Ki code addresses by low bits of rip  |
//! gs + SLOT_T     8 Ki page addresses that hot code met     |
//! gs + SLOT_D     last, negated, and their way to the host |
//! gs + OVER_RIP   2 Ki targets that the jump cache missed   |
//! gs + OVER_CODE  (overflow.rs), and their code            /
//! ```
use std::mem::offset_of;
use std::sync::atomic::AtomicU32;

pub const TAG_R: u32 = 0x1_0000;
pub const TAG_W: u32 = 0x9_0000;
pub const HOST: u32 = 0x11_0000;
pub const JC: u32 = 0x19_0000;
pub const SLOT_T: u32 = 0x21_0000;
pub const SLOT_D: u32 = 0x22_0000;
pub const OVER_RIP: u32 = 0x23_0000;
pub const OVER_CODE: u32 = 0x23_8000;
/// Slots of a region: the pages that single places in hot code met last.
pub const SLOTS: usize = 0x2000;
/// `SLOT_T` of an empty slot: it fits addresses only that are not canonical,
/// which the host processor refuses, as the guest's would.
/// Of a bound it is the least number.
pub const NO_PAGE: u64 = 1 << 63;
/// `SLOT_D` of a slot whose tag is no page but a bound.
pub const IS_BOUND: u64 = u64::MAX;
/// Bytes of address space that a region takes.
pub const REGION: usize = 0x24_0000;
/// Bytes of the processor page and its neighbours (XSAVE area, bounce buffer).
pub const CPU_BYTES: usize = 0x1_0000;

pub const CF: u32 = 1;
pub const PF: u32 = 4;
pub const AF: u32 = 0x10;
pub const ZF: u32 = 0x40;
pub const SF: u32 = 0x80;
pub const TF: u64 = 0x100;
pub const IF: u64 = 0x200;
pub const DF: u64 = 0x400;
pub const OF: u32 = 0x800;
pub const IOPL: u64 = 0x3000;
pub const NT: u64 = 0x4000;
pub const RF: u64 = 0x1_0000;
pub const VM: u64 = 0x2_0000;
pub const AC: u64 = 0x4_0000;
pub const VIF: u64 = 0x8_0000;
pub const VIP: u64 = 0x10_0000;
pub const ID: u64 = 0x20_0000;
/// The six arithmetic flags.
pub const ARITH: u32 = CF | PF | AF | ZF | SF | OF;

/// Why translated code came back (`Cpu::exit`).
pub mod exit {
    /// `rip` has no translation yet; `arg` is the exit site to link, or NO_SITE.
    pub const TRANSLATE: u32 = 1;
    /// The instruction around host address `host_pc` needs `slow.rs`.
    pub const SLOW: u32 = 2;
    /// The host processor faulted at `host_pc` (`fault_*`).
    pub const FAULT: u32 = 3;
    /// Helper `arg` wants to run outside translated code.
    pub const HELPER: u32 = 4;
    /// An asynchronous event; `rip` is exact.
    pub const EVENT: u32 = 5;
    /// A snippet of `slow.rs` ran to its end.
    pub const SNIPPET: u32 = 6;
}

/// `arg` of an exit that nothing should be linked to.
pub const NO_SITE: u32 = u32::MAX;

#[derive(Clone, Copy, Default)]
#[repr(C)]
pub struct Seg {
    pub base: u64,
    pub limit: u32,
    pub access: u32,
    pub selector: u16,
    pub _pad: [u16; 3],
}

impl Seg {
    pub fn dpl(&self) -> u8 {
        ((self.access >> 5) & 3) as u8
    }
    pub fn unusable(&self) -> bool {
        self.access & 0x1_0000 != 0
    }
    pub fn long(&self) -> bool {
        self.access & 0x2000 != 0
    }
    pub fn big(&self) -> bool {
        self.access & 0x4000 != 0
    }
}

/// Samples that are collected before translated code is left for them.
pub const SAMPLES: usize = 4;

#[repr(C, align(64))]
pub struct Cpu {
    /// Guest registers; r8-r11 are always here, the others at exits.
    pub gpr: [u64; 16],
    /// Arithmetic flags as LAHF and SETO give them: AH | AL.
    pub lazy: u32,
    /// Non-zero: leave translated code soon.
    pub pending: AtomicU32,
    pub rip: u64,
    /// IF as a byte, since CLI and STI are frequent.
    pub iflag: u8,
    /// AC, for STAC and CLAC.
    pub ac: u8,
    /// Direction flag.
    pub df: u8,
    /// Interrupts wait for IF (iflag) to be set.
    pub irq_waiting: u8,
    pub exit: u32,
    pub arg: u32,
    /// In runs that count: instructions of the present block that have begun.
    pub begun: u32,
    /// Entries that supervisor code made for user pages while AC was set.
    pub kuser: u32,
    pub host_pc: u64,
    pub host_rsp: u64,
    /// Region whose base belongs in gs.
    pub region: u64,
    /// Where execution resumes (host address).
    pub resume: u64,
    /// r10 while a miss is served.
    pub group: u64,
    /// rax, rcx, rdx and the flags while a slot is filled.
    pub refill: [u64; 4],
    /// r8 to r10 and the limit so far while a bound is found.
    pub bound: [u64; 4],
    /// Host addresses that timer signals found hot, and how many.
    pub samples: [u64; SAMPLES],
    pub sampled: u32,
    pub tmp: u64,
    pub tmp2: u64,
    pub mask63: u64,
    /// Bits of an address above the offset in its page.
    pub pages: u64,
    pub mask31: u64,
    /// Bit 63.
    pub sign: u64,
    /// What to add to the address of an operand that lies outside its segment, and
    /// inside it: the first is an address that no table holds.
    pub astray: [u64; 2],
    /// `Seg::reach` of every segment for loads and stores, in 16- and 32-bit code.
    pub reach_r: [u64; 6],
    pub reach_w: [u64; 6],
    pub fault_vector: u32,
    pub fault_flags: u32,
    pub fault_addr: u64,
    /// Guest registers whose host registers hot code uses otherwise.
    pub away: [u64; 16],
    /// r8 to r10 at a fault.
    pub scratch: [u64; 3],
    /// The vector state was last loaded without XRSTOR.
    pub by_hand: u32,
    /// Process in which user code runs directly at the moment, or 0: kicks go on to it.
    pub sandbox: AtomicU32,
    /// The Vcpu that owns this page.
    pub vcpu: u64,
    pub fn_fill: u64,
    pub fn_lookup: u64,
    pub fn_link: u64,
    pub fn_helper: u64,
    pub fault_stub: u64,
    pub xcr0_mask: u64,
    pub tsc_offset: u64,
    pub seg_base: [u64; 6],
    pub kernel_gs_base: u64,
    pub seg: [Seg; 6],
    pub ldt: Seg,
    pub tr: Seg,
    pub gdt_base: u64,
    pub idt_base: u64,
    pub gdt_limit: u32,
    pub idt_limit: u32,
    /// NT, IOPL, RF, VM, ID, TF, VIF, VIP.
    pub eflags: u64,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub xcr0: u64,
    pub efer: u64,
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub sfmask: u64,
    pub sysenter: [u64; 3],
    pub dr: [u64; 8],
    pub cpl: u8,
    pub shadow: u8,
    pub nmi_blocked: u8,
    pub halted: u8,
    /// How often each slot had to change its page.
    pub refills: [u32; SLOTS],
    pub xmm: [u128; 16],
    pub xsave: XsaveArea,
    pub bounce: Bounce,
}

#[repr(C, align(64))]
pub struct XsaveArea(pub [u8; 4096]);

/// Operand of an instruction that `slow.rs` runs; keeps the low 6 bits of its address.
#[repr(C, align(64))]
pub struct Bounce(pub [u8; 8192]);

macro_rules! offsets {
    ($($name:ident = $($field:ident).+ $(+ $extra:expr)?;)*) => {
        $(pub const $name: u32 = (offset_of!(Cpu, $($field).+) $(+ $extra)?) as u32;)*
    };
}

/// Offsets for emitted code.
pub mod at {
    use super::*;
    offsets! {
        GPR = gpr; LAZY = lazy; PENDING = pending; RIP = rip; IFLAG = iflag; AC = ac; DF = df;
        IRQ_WAITING = irq_waiting; BEGUN = begun; EXIT = exit; ARG = arg; KUSER = kuser; HOST_PC = host_pc;
        HOST_RSP = host_rsp; REGION_BASE = region; RESUME = resume; GROUP = group; REFILL = refill;
        SCRATCH = scratch; BOUND = bound; AWAY = away; TMP = tmp; BY_HAND = by_hand; TMP2 = tmp2; REFILLS = refills;
        VCPU = vcpu; FN_FILL = fn_fill; FN_LOOKUP = fn_lookup;
        FN_LINK = fn_link; FN_HELPER = fn_helper; SEG_BASE = seg_base; XMM = xmm; XSAVE = xsave;
        TSC_OFFSET = tsc_offset; KERNEL_GS_BASE = kernel_gs_base;
        MASK63 = mask63; PAGES = pages; MASK31 = mask31; SHADOW = shadow;
        SIGN = sign; ASTRAY = astray; REACH_R = reach_r; REACH_W = reach_w;
    }
    pub fn gpr(n: u8) -> u32 {
        GPR + 8 * u32::from(n)
    }
    pub fn away(n: u8) -> u32 {
        AWAY + 8 * u32::from(n)
    }
    pub fn seg_base(n: u8) -> u32 {
        SEG_BASE + 8 * u32::from(n)
    }
}

const _: () = assert!(size_of::<Cpu>() <= CPU_BYTES);

impl Cpu {
    /// The six arithmetic flags in RFLAGS positions.
    pub fn arith(&self) -> u32 {
        ((self.lazy >> 8) & 0xd5) | if self.lazy & 1 != 0 { OF } else { 0 }
    }

    pub fn set_arith(&mut self, f: u32) {
        self.lazy = ((f & 0xd5) << 8) | u32::from(f & OF != 0);
    }

    pub fn rflags(&self) -> u64 {
        u64::from(self.arith())
            | 2
            | self.eflags
            | if self.iflag != 0 { IF } else { 0 }
            | if self.ac != 0 { AC } else { 0 }
            | if self.df != 0 { DF } else { 0 }
    }

    pub fn set_rflags(&mut self, f: u64) {
        self.set_arith(f as u32);
        self.iflag = u8::from(f & IF != 0);
        self.ac = u8::from(f & AC != 0);
        self.df = u8::from(f & DF != 0);
        self.eflags = f & (TF | IOPL | NT | RF | VM | VIF | VIP | ID);
    }

    pub fn iopl(&self) -> u8 {
        ((self.eflags >> 12) & 3) as u8
    }

    pub fn long_mode(&self) -> bool {
        self.efer & 0x400 != 0
    }

    /// 64-bit code segment in long mode.
    pub fn code64(&self) -> bool {
        self.long_mode() && self.seg[1].long()
    }
}
