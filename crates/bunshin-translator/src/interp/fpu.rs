//! When x87, MMX and vector instructions may run: CR0.EM, MP and TS, CR4.OSFXSR and
//! OSXSAVE, XCR0. SDM volume 3, 2.5 and chapter 13.
//!
//! The mode bits say what is shut off; an instruction that this concerns becomes a
//! call of `ask`, all others are translated as ever.
use super::{Done, Flow};
use crate::mmu::{Exception, Trap, UD};
use crate::vcpu::{mode, Vcpu};
use iced_x86::{CpuidFeature as F, EncodingKind, Instruction, Mnemonic as M, OpKind, Register};

/// Device not available.
const NM: u8 = 7;

const CR0_MP: u64 = 2;
const CR0_EM: u64 = 4;
const CR0_TS: u64 = 8;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXSAVE: u64 = 1 << 18;
/// SSE and AVX in XCR0, and those with the three of AVX-512.
const XCR0_AVX: u64 = 6;
const XCR0_AVX512: u64 = 0xe6;

/// All mode bits that shut something off.
pub const SHUT: u32 = mode::NO_FPU | mode::NO_SSE | mode::NO_AVX | mode::NO_AVX512;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Class {
    Other,
    X87,
    /// WAIT.
    Wait,
    /// MMX, and what works on its registers.
    Mmx,
    Sse,
    Avx,
    Avx512,
    /// FXSAVE and FXRSTOR.
    Save,
    /// XSAVE and its kin.
    Xsave,
}

fn class(i: &Instruction) -> Class {
    let register = |is: fn(Register) -> bool| {
        (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && is(i.op_register(n)))
    };
    let vector = |r: Register| r.is_vector_register();
    match i.code().encoding() {
        EncodingKind::VEX => match i.mnemonic() {
            M::Vzeroupper | M::Vzeroall | M::Vldmxcsr | M::Vstmxcsr => return Class::Avx,
            _ if register(|r| r.is_k()) => return Class::Avx512,
            _ if register(vector) => return Class::Avx,
            _ => return Class::Other,
        },
        EncodingKind::EVEX => return Class::Avx512,
        EncodingKind::Legacy | EncodingKind::D3NOW => {}
        _ => return Class::Other,
    }
    match i.mnemonic() {
        M::Wait => Class::Wait,
        M::Fxsave | M::Fxsave64 | M::Fxrstor | M::Fxrstor64 => Class::Save,
        M::Xsave
        | M::Xsave64
        | M::Xsaveopt
        | M::Xsaveopt64
        | M::Xsavec
        | M::Xsavec64
        | M::Xsaves
        | M::Xsaves64
        | M::Xrstor
        | M::Xrstor64
        | M::Xrstors
        | M::Xrstors64 => Class::Xsave,
        M::Ldmxcsr | M::Stmxcsr => Class::Sse,
        M::Emms | M::Femms => Class::Mmx,
        _ if register(vector) => Class::Sse,
        _ if register(|r| r.is_mm()) => Class::Mmx,
        _ if i.cpuid_features().iter().any(|f| matches!(f, F::FPU | F::FPU287 | F::FPU387)) => Class::X87,
        _ => Class::Other,
    }
}

/// The instruction must `ask` first in mode `m`.
pub fn asks(i: &Instruction, m: u32) -> bool {
    // Most instructions are none of these: no need to look closer.
    if i.code().encoding() == EncodingKind::Legacy && m & (mode::NO_FPU | mode::NO_SSE) == 0 {
        return false;
    }
    let shut = match class(i) {
        Class::Other => 0,
        Class::X87 | Class::Wait | Class::Mmx | Class::Save | Class::Xsave => mode::NO_FPU,
        Class::Sse => mode::NO_FPU | mode::NO_SSE,
        Class::Avx => mode::NO_FPU | mode::NO_AVX,
        Class::Avx512 => mode::NO_FPU | mode::NO_AVX512,
    };
    m & shut != 0
}

impl Vcpu {
    /// Bits of `SHUT` in the present state.
    pub fn shut(&self) -> u32 {
        let c = self.cpu();
        let xcr0 = if c.cr4 & CR4_OSXSAVE != 0 { c.xcr0 } else { 0 };
        let mut m = 0;
        if c.cr0 & (CR0_EM | CR0_TS) != 0 {
            m |= mode::NO_FPU;
        }
        if c.cr4 & CR4_OSFXSR == 0 {
            m |= mode::NO_SSE;
        }
        if xcr0 & XCR0_AVX != XCR0_AVX {
            m |= mode::NO_AVX;
        }
        if xcr0 & XCR0_AVX512 != XCR0_AVX512 {
            m |= mode::NO_AVX512;
        }
        m
    }

    /// #NM or #UD where the instruction must not run now.
    pub fn check_fpu(&self, i: &Instruction) -> Result<(), Trap> {
        let m = self.shut();
        if m == 0 {
            return Ok(());
        }
        let cr0 = self.cpu().cr0;
        let (emulated, switched) = (cr0 & CR0_EM != 0, cr0 & CR0_TS != 0);
        let (unknown, absent) = match class(i) {
            Class::Other => (false, false),
            Class::X87 | Class::Save => (false, emulated || switched),
            Class::Wait => (false, switched && cr0 & CR0_MP != 0),
            Class::Mmx => (emulated, switched),
            Class::Sse => (emulated || m & mode::NO_SSE != 0, switched),
            Class::Avx => (m & mode::NO_AVX != 0, switched),
            Class::Avx512 => (m & mode::NO_AVX512 != 0, switched),
            Class::Xsave => (self.cpu().cr4 & CR4_OSXSAVE == 0, switched),
        };
        match (unknown, absent) {
            (true, _) => Err(Exception::new(UD).into()),
            (_, true) => Err(Exception::new(NM).into()),
            _ => Ok(()),
        }
    }
}

/// In front of an instruction that needs no more than to be asked for.
pub fn ask(v: &mut Vcpu, i: &Instruction) -> Done {
    v.check_fpu(i)?;
    Ok(Flow::Next)
}
