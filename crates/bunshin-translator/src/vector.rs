//! The guest's FPU and vector state on the way out of translated code and back in.
//!
//! XSAVEOPT and XRSTOR are microcode: some 120 and 250 cycles, of which an exit to a
//! device would spend half its time. Ordinary stores and loads do the same in 60 where
//! x87 is not in use, which is nearly always; XGETBV with ecx = 1 tells what is. The
//! layout in memory is XSAVE's either way, and components that are not in XSTATE_BV
//! hold their initial values (`Vcpu::blank_initial`), so they may be loaded all the same.
//!
//! What is not in use is left alone on the way back: upper halves that were loaded, even
//! with zeros, make instructions of SSE several times slower, since they must keep them.
//!
//! XSAVEOPT leaves out what has not changed since XRSTOR from the same place. Loads by
//! hand are none of its business, so after those it must be XSAVE.
use crate::cpu::at;
use crate::host;
use iced_x86::code_asm::*;
use iced_x86::IcedError;

const X87: u32 = 1;
const SSE: u32 = 2;
const AVX: u32 = 4;
/// Opmasks and ZMM16 to ZMM31; upper halves of ZMM0 to ZMM15; both.
const EVEX: u32 = 0xa0;
const HIGH: u32 = 0x40;
const AVX512: u32 = EVEX | HIGH;
const FXSAVE_MXCSR: u32 = 24;
const XSTATE_BV: u32 = 512;
const XMM: [AsmRegisterXmm; 16] =
    [xmm0, xmm1, xmm2, xmm3, xmm4, xmm5, xmm6, xmm7, xmm8, xmm9, xmm10, xmm11, xmm12, xmm13, xmm14, xmm15];
const YMM: [AsmRegisterYmm; 16] =
    [ymm0, ymm1, ymm2, ymm3, ymm4, ymm5, ymm6, ymm7, ymm8, ymm9, ymm10, ymm11, ymm12, ymm13, ymm14, ymm15];
const ZMM: [AsmRegisterZmm; 32] = [
    zmm0, zmm1, zmm2, zmm3, zmm4, zmm5, zmm6, zmm7, zmm8, zmm9, zmm10, zmm11, zmm12, zmm13, zmm14, zmm15,
    zmm16, zmm17, zmm18, zmm19, zmm20, zmm21, zmm22, zmm23, zmm24, zmm25, zmm26, zmm27, zmm28, zmm29, zmm30,
    zmm31,
];
const K: [AsmRegisterK; 8] = [k0, k1, k2, k3, k4, k5, k6, k7];

/// What the host has for the purpose.
#[derive(Clone, Copy)]
pub struct Means {
    /// Components that belong to the guest.
    pub mask: u64,
    pub xsaveopt: bool,
    /// XGETBV tells which components are in use.
    pub in_use: bool,
}

impl Means {
    /// Those of this host.
    pub fn of_host() -> Self {
        let mask = host::xsave_mask();
        // The opmasks are saved whole, by an instruction of AVX512BW.
        let whole = mask & u64::from(AVX512) == 0 || host::has_avx512bw();
        Self { mask, xsaveopt: host::has_xsaveopt(), in_use: whole && host::has_xgetbv_in_use() }
    }

    fn wide(self) -> bool {
        self.mask & u64::from(AVX512) != 0
    }
}

/// `gs:[XSAVE + offset]`.
fn area(offset: usize) -> AsmMemoryOperand {
    ptr(u64::from(at::XSAVE) + offset as u64).gs()
}

fn component(n: usize, each: usize, register: usize) -> AsmMemoryOperand {
    area(host::component(n).0 + each * register)
}

fn mask_registers(a: &mut CodeAssembler, means: Means) -> Result<(), IcedError> {
    a.mov(eax, means.mask as u32)?;
    a.mov(edx, (means.mask >> 32) as u32)
}

/// Code that puts the state into the XSAVE area and leaves the processor as C code
/// expects it. Changes rax, rcx, rdx and flags.
pub fn save(means: Means) -> Vec<u8> {
    written(|a| {
        let (mut full, mut done) = (a.create_label(), a.create_label());
        let (mut no_evex, mut narrow) = (a.create_label(), a.create_label());
        if means.in_use {
            a.mov(ecx, 1)?;
            a.xgetbv()?;
            a.test(al, X87 as i32)?;
            a.jne(full)?;
            a.and(eax, (means.mask as u32 & !X87) as i32)?;
            a.or(eax, SSE as i32)?;
            a.stmxcsr(area(FXSAVE_MXCSR as usize))?;
            for (n, &register) in XMM.iter().enumerate() {
                a.vmovups(component(1, 16, n), register)?;
            }
            if means.wide() {
                a.test(eax, EVEX as i32)?;
                a.je(no_evex)?;
                a.or(eax, EVEX as i32)?;
                for (n, &register) in K.iter().enumerate() {
                    a.kmovq(component(5, 8, n), register)?;
                }
                for (n, &register) in ZMM[16..].iter().enumerate() {
                    a.vmovups(component(7, 64, n), register)?;
                }
                a.set_label(&mut no_evex)?;
            }
            a.test(eax, (AVX | HIGH) as i32)?;
            a.je(narrow)?;
            a.or(eax, AVX as i32)?;
            for (n, &register) in YMM.iter().enumerate() {
                a.vextractf128(component(2, 16, n), register, 1)?;
            }
            if means.wide() {
                a.test(eax, HIGH as i32)?;
                a.je(narrow)?;
                for (n, &register) in ZMM[..16].iter().enumerate() {
                    a.vextracti64x4(component(6, 32, n), register, 1)?;
                }
            }
            a.set_label(&mut narrow)?;
            a.mov(area(XSTATE_BV as usize), rax)?;
            a.jmp(done)?;
        }
        a.set_label(&mut full)?;
        let (mut plain, mut saved) = (a.create_label(), a.create_label());
        mask_registers(a, means)?;
        if means.xsaveopt {
            a.cmp(dword_ptr(u64::from(at::BY_HAND)).gs(), 0)?;
            a.jne(plain)?;
            a.xsaveopt64(area(0))?;
            a.jmp(saved)?;
        }
        a.set_label(&mut plain)?;
        a.xsave64(area(0))?;
        a.set_label(&mut saved)?;
        // FNINIT is slow, and an x87 state that is not in use needs none.
        a.test(byte_ptr(u64::from(at::XSAVE + XSTATE_BV)).gs(), X87 as i32)?;
        a.je(done)?;
        a.fninit()?;
        a.set_label(&mut done)?;
        a.push(0x1f80)?;
        a.ldmxcsr(ptr(rsp))?;
        a.add(rsp, 8)?;
        a.vzeroupper()
    })
}

/// Code that takes the state out of the XSAVE area. Changes rax, rcx, rdx and flags.
pub fn load(means: Means) -> Vec<u8> {
    written(|a| {
        let (mut full, mut done) = (a.create_label(), a.create_label());
        let (mut no_avx512, mut no_avx) = (a.create_label(), a.create_label());
        if means.in_use {
            // x87 of the guest's, or left behind by C code: only XRSTOR has it all.
            a.mov(ecx, 1)?;
            a.xgetbv()?;
            a.mov(ecx, eax)?;
            a.mov(rax, area(XSTATE_BV as usize))?;
            a.or(ecx, eax)?;
            a.test(cl, X87 as i32)?;
            a.jne(full)?;
            a.test(al, SSE as i32)?;
            a.je(full)?;
            a.mov(dword_ptr(u64::from(at::BY_HAND)).gs(), 1)?;
            a.ldmxcsr(area(FXSAVE_MXCSR as usize))?;
            // These clear what lies above, and the processor knows that it is clear: only
            // then are instructions of SSE fast, which must keep it.
            for (n, &register) in XMM.iter().enumerate() {
                a.vmovups(register, component(1, 16, n))?;
            }
            if means.wide() {
                // In use by the guest, or left behind by C code.
                a.test(ecx, AVX512 as i32)?;
                a.je(no_avx512)?;
                for (n, &register) in K.iter().enumerate() {
                    a.kmovq(register, component(5, 8, n))?;
                }
                for (n, &register) in ZMM[16..].iter().enumerate() {
                    a.vmovups(register, component(7, 64, n))?;
                }
                a.set_label(&mut no_avx512)?;
            }
            a.test(eax, (AVX | HIGH) as i32)?;
            a.je(no_avx)?;
            for (n, &register) in YMM.iter().enumerate() {
                a.vinsertf128(register, register, component(2, 16, n), 1)?;
            }
            if means.wide() {
                a.test(eax, HIGH as i32)?;
                a.je(no_avx)?;
                for (n, &register) in ZMM[..16].iter().enumerate() {
                    a.vinserti64x4(register, register, component(6, 32, n), 1)?;
                }
            }
            a.set_label(&mut no_avx)?;
            a.jmp(done)?;
        }
        a.set_label(&mut full)?;
        a.mov(dword_ptr(u64::from(at::BY_HAND)).gs(), 0)?;
        mask_registers(a, means)?;
        a.xrstor64(area(0))?;
        a.set_label(&mut done)?;
        a.zero_bytes()
    })
}

/// Bytes that run anywhere: all jumps are relative, all addresses absolute behind gs.
fn written(write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).expect("64-bit code can be assembled");
    write(&mut a).expect("the instructions exist");
    a.assemble(0).expect("and can be encoded")
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions, Mnemonic};

    #[test]
    fn every_host_gets_code_that_can_be_run() {
        for bits in 0..8 {
            let wide = if host::xsave_mask() & 0xe0 == 0xe0 { 0xe0 } else { 0 };
            let mask = if bits & 4 != 0 { 7 | wide } else { 7 };
            let means = Means { mask, xsaveopt: bits & 1 != 0, in_use: bits & 2 != 0 };
            for (bytes, whole) in [(save(means), Mnemonic::Xsave64), (load(means), Mnemonic::Xrstor64)] {
                let code: Vec<_> = Decoder::new(64, &bytes, DecoderOptions::NONE).into_iter().collect();
                assert!(code.iter().all(|i| !i.is_invalid()));
                assert!(code.iter().any(|i| i.mnemonic() == whole));
                let by_hand = code.iter().filter(|i| i.mnemonic() == Mnemonic::Vmovups).count();
                let registers = if mask & 0xe0 != 0 { 32 } else { 16 };
                assert_eq!(by_hand, if means.in_use { registers } else { 0 });
                // Jumps stay inside, or end just behind it.
                let end = bytes.len() as u64;
                assert!(code.iter().all(|i| i.near_branch_target() <= end));
            }
        }
    }
}
