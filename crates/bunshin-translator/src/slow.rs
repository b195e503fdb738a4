//! One instruction at a time: accesses that cross pages, touch devices or
//! translated code, operands too large to probe, gathers, single-stepping.
//!
//! The instruction itself still runs on the host processor: its operand is
//! copied to a bounce buffer, a snippet with the same instruction runs on that,
//! and the result is copied back. Nothing of the guest changes before all of
//! it can.
use crate::cpu::*;
use crate::elements::{element_mask, gather, masked_bytes, masked_move};
use crate::insn::{decode, reads, shape, writes};
use crate::interp::address::natural;
use crate::interp::{self, Done, Flow};
use crate::mmu::{gp, ud, Exception, Kind, Trap, PF_};
use crate::vcpu::{mode, Vcpu};
use crate::xstate::{is_xrstor, is_xsave, xsave, Upper};
use iced_x86::{
    CpuidFeature, EncodingKind, Instruction, InstructionInfoFactory, MemorySize, Mnemonic as M, OpAccess,
    OpKind, Register,
};
use std::sync::atomic::Ordering;

impl Vcpu {
    /// Fetch and decode the instruction at rip.
    pub fn fetch(&mut self) -> Result<Instruction, Exception> {
        let rip = self.cpu().rip;
        if rip > self.code_limit() {
            return Err(Exception::gp());
        }
        let i = self.fetch_unlimited(rip)?;
        if !self.cpu().code64() && i.next_ip() > self.code_limit() + 1 {
            return Err(Exception::gp());
        }
        Ok(i)
    }

    fn fetch_unlimited(&mut self, rip: u64) -> Result<Instruction, Exception> {
        let va = self.linear_rip(rip);
        let mut b = [0u8; 15];
        let first = (4096 - (va & 0xfff)).min(15) as usize;
        let who = self.fetcher();
        let (Some(h), _) = self.access(va, 1, Kind::Fetch, who)? else { return Err(Exception::gp()) };
        // SAFETY: bytes of one page of guest RAM.
        unsafe { std::ptr::copy_nonoverlapping(h as *const u8, b.as_mut_ptr(), first) };
        let bits = mode::bits(self.mode());
        let i = decode(&b[..first], bits, rip);
        if first == 15 || i.code() != iced_x86::Code::INVALID {
            self.bytes = b;
            return Ok(i);
        }
        let next = va.wrapping_add(first as u64);
        let (Some(h), _) = self.access(next, 1, Kind::Fetch, who)? else { return Err(Exception::gp()) };
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(h as *const u8, b[first..].as_mut_ptr(), 15 - first) };
        self.bytes = b;
        Ok(decode(&b, bits, rip))
    }

    /// Bytes of instruction `i`, which lies at rip; None if another one does by now.
    fn bytes_of(&mut self, i: &Instruction) -> Result<Option<[u8; 15]>, Trap> {
        let again = self.fetch()?;
        Ok((again == *i && again.len() == i.len()).then_some(self.bytes))
    }

    pub fn run_snippet(&mut self, bytes: &[u8], i: &Instruction, operand: u64) -> Result<(), Trap> {
        let code = self.snippet(bytes, i);
        self.cpu_mut().tmp = operand;
        self.cpu_mut().resume = code;
        let pending = self.cpu().pending.swap(0, Ordering::AcqRel);
        loop {
            self.run_code();
            match self.cpu().exit {
                exit::SNIPPET => break,
                exit::EVENT => {
                    // A kick came in between; keep it for later.
                    self.cpu().pending.store(0, Ordering::Release);
                    self.again = true;
                }
                exit::FAULT => {
                    self.restore_pending(pending);
                    let n = self.cpu().fault_vector as u8;
                    let e = match n {
                        crate::mmu::GP => Exception::gp(),
                        PF_ => {
                            let a = self.cpu().fault_addr;
                            self.fail(format!("snippet for `{i}` touched host address {a:#x}"));
                            Exception::gp()
                        }
                        n => Exception::new(n),
                    };
                    return Err(e.into());
                }
                n => {
                    self.fail(format!("snippet for `{i}` ended with code {n}"));
                    return Err(gp());
                }
            }
        }
        self.restore_pending(pending);
        Ok(())
    }

    /// Run from `cpu.resume` until an exit.
    pub fn run_code(&mut self) {
        self.in_code = true;
        let (cpu, me) = (&raw mut *self.cpu_mut(), &raw mut *self);
        // SAFETY: the stub keeps the C ABI; `cpu.resume` is code in the cache. It does
        // not look at its second argument, which tells the compiler that the
        // functions which stubs call change this processor.
        unsafe {
            let enter: extern "C" fn(*mut Cpu, *mut Self) =
                std::mem::transmute(self.stubs.enter as *const ());
            enter(cpu, me);
        }
        self.in_code = false;
        self.blank_initial();
    }

    fn restore_pending(&mut self, before: u32) {
        if before != 0 || std::mem::take(&mut self.again) {
            self.cpu().pending.store(1, Ordering::Release);
        }
    }
}

/// Any instruction at all.
pub fn any(v: &mut Vcpu, i: &Instruction) -> Done {
    v.check_fpu(i)?;
    let h = interp::helper(i);
    if h.run as usize != any as fn(&mut Vcpu, &Instruction) -> Done as usize {
        return (h.run)(v, i);
    }
    if locked(i) && !v.exclusive && !v.crew.single() {
        // The operand goes through the bounce buffer.
        return v.exclusively(|v| any(v, i));
    }
    match i.mnemonic() {
        M::Nop
        | M::Prefetchnta
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetchw
        | M::Prefetch
        | M::Prefetchwt1
        | M::Endbr32
        | M::Endbr64
        | M::Cldemote
        | M::Pause
        | M::Prefetchit0
        | M::Prefetchit1 => return Ok(Flow::Next),
        M::Reservednop if i.op0_kind() == OpKind::Memory => return Ok(Flow::Next),
        M::Clflush | M::Clflushopt | M::Clwb => {
            let (va, who) = (v.operand_at(i, 0, 1, Kind::Read)?, v.data_access());
            v.load(va, 1, who)?;
            return Ok(Flow::Next);
        }
        M::Lea => return lea(v, i),
        M::Rdrand | M::Rdseed if v.debugger.until.is_some() => return crate::count::random(v, i),
        M::Cld | M::Std => {
            v.cpu_mut().df = u8::from(i.mnemonic() == M::Std);
            return Ok(Flow::Next);
        }
        M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu => return masked_bytes(v, i),
        M::Clzero => return Err(ud()),
        _ => {}
    }
    if i.flow_control() == iced_x86::FlowControl::ConditionalBranch {
        let taken = condition(v.cpu().arith(), i.condition_code() as u8 - 1);
        if taken {
            v.reachable(i.near_branch_target())?;
        }
        v.cpu_mut().rip = if taken { i.near_branch_target() } else { i.next_ip() };
        return Ok(Flow::Jump);
    }
    if shape(i.code()).vsib {
        return gather(v, i);
    }
    generic(v, i)
}

fn condition(f: u32, cc: u8) -> bool {
    let b = |m: u32| f & m != 0;
    let r = match cc >> 1 {
        0 => b(OF),
        1 => b(CF),
        2 => b(ZF),
        3 => b(CF | ZF),
        4 => b(SF),
        5 => b(PF),
        6 => b(SF) != b(OF),
        _ => b(ZF) || b(SF) != b(OF),
    };
    r != (cc & 1 != 0)
}

fn lea(v: &mut Vcpu, i: &Instruction) -> Done {
    let x = v.operand_offset(i, 0);
    v.set_reg(i.op0_register(), x);
    Ok(Flow::Next)
}

/// Nothing may come between its load and its store.
fn locked(i: &Instruction) -> bool {
    i.has_lock_prefix() || i.mnemonic() == M::Xchg && i.op0_kind() == OpKind::Memory
}

fn generic(v: &mut Vcpu, i: &Instruction) -> Done {
    if i.mnemonic() == M::Mov && (0..2).any(|n| i.op_kind(n) == OpKind::Memory) {
        return plain(v, i);
    }
    // Another processor may have changed the instruction since it was translated:
    // what lies there now is performed instead.
    let Some(bytes) = v.bytes_of(i)? else { return Ok(Flow::Jump) };
    let bytes = &bytes[..i.len()];
    let has_mem = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
    if !has_mem {
        v.run_snippet(bytes, i, 0)?;
        return Ok(Flow::Next);
    }
    let m = i.mnemonic();
    let who = v.data_access();
    let access = {
        let mut f = InstructionInfoFactory::new();
        let info = f.info(i);
        (0..i.op_count())
            .find(|&n| i.op_kind(n) == OpKind::Memory)
            .map_or(OpAccess::None, |n| info.op_access(n))
    };
    let kind = if writes(access) { Kind::Write } else { Kind::Read };
    let mut behind = 0;
    if interp::bit_string(i) {
        let size = i.op1_register().size();
        let off = v.reg(i.op1_register());
        let off = match size {
            2 => i64::from(off as i16) >> 4,
            4 => i64::from(off as i32) >> 5,
            _ => off as i64 >> 6,
        };
        behind = (off * size as i64) as u64;
        if size == 2 {
            let va = v.operand_at(i, behind, size, kind)?;
            return bit16(v, i, va);
        }
    }
    if is_xsave(m) || is_xrstor(m) {
        let va = v.operand_at(i, 0, 576, if is_xsave(m) { Kind::Write } else { Kind::Read })?;
        return xsave(v, i, bytes, va);
    }
    let size = match i.memory_size() {
        MemorySize::Unknown => 0,
        s => s.size(),
    };
    if size == 0 || access == OpAccess::None {
        v.run_snippet(bytes, i, v.cpu().bounce.0.as_ptr() as u64)?;
        return Ok(Flow::Next);
    }
    if waits(i) {
        // An exception that the FPU has pending comes before those of the operand.
        v.run_snippet(&[0x9b], &decode(&[0x9b], 64, i.ip()), 0)?;
    }
    let elements = element_mask(v, i);
    let (mask, n) = elements.unwrap_or((1, size));
    let va = if mask != 0 { v.operand_anywhere(i, behind, size, kind)? } else { v.operand_behind(i, behind) };
    // EVEX elements past 4 GiB leave a segment of 32-bit code, others wrap.
    let narrow = !v.cpu().code64() && i.op_mask() == Register::None;
    let wrap = if narrow { 0xffff_ffff } else { u64::MAX };
    // VEX's masked moves compute the address of each element, which wraps as addresses do.
    let each = masked_move(m);
    let place = |v: &Vcpu, at: usize| {
        if each {
            v.operand_behind(i, behind.wrapping_add(at as u64))
        } else {
            va.wrapping_add(at as u64) & wrap
        }
    };
    let parts = (0..size / n).filter(|k| mask >> k & 1 != 0).map(|k| k * n);
    if size == 512 {
        v.check_end(va, 2)?;
    }
    if mask != 0 {
        let (length, align) = match elements {
            Some(_) if masked_move(m) => (n, 1),
            Some(_) => (n, n),
            None => (size, natural(size)),
        };
        // FXSAVE and FXRSTOR want both, and this one first.
        if size == 512 {
            v.check_alignment(va, length, align)?;
        }
        if misaligned(v, i, va, size) {
            return Err(gp());
        }
        v.check_alignment(va, length, align)?;
    }
    // What long operands look at before the rest: so many bytes of the start,
    // and the last one.
    let (first, last) = match n {
        64 if writes(access) => (32, false),
        10 => (8, false),
        14 | 94 => (2, true),
        28 | 108 => (4, true),
        512 => (0, true),
        _ => (0, false),
    };
    if first > 0 {
        v.check(va, first, kind, who)?;
    }
    if last {
        v.check(v.operand_behind(i, size as u64 - 1), 1, kind, who)?;
    }
    if writes(access) {
        for at in parts.clone() {
            v.check(place(v, at), n, Kind::Write, who)?;
        }
    }
    let mut buffer = [0u8; 512];
    let buffer = &mut buffer[..size];
    // A store that does not happen after all (an x87 exception) copies back what was there.
    for at in parts.clone() {
        let (from, to) = (place(v, at), &mut buffer[at..at + n]);
        v.check_end(from, n)?;
        if reads(access) || v.access(from, 1, Kind::Read, who)?.0.is_some() {
            v.read_as(from, to, who)?;
        }
    }
    let off = (va & 63) as usize;
    v.cpu_mut().bounce.0[off..off + size].copy_from_slice(buffer);
    let operand = v.cpu().bounce.0.as_ptr() as u64 + off as u64;
    let image = matches!(m, M::Fxsave | M::Fxsave64 | M::Fxrstor | M::Fxrstor64);
    let upper = (image && !v.cpu().code64()).then(|| Upper::new(v));
    v.run_snippet(bytes, i, operand)?;
    if let Some(upper) = upper {
        if writes(access) {
            let old: Vec<u8> = buffer.to_vec();
            upper.keep_memory(2, false, &old, &mut v.cpu_mut().bounce.0[off..off + size]);
        } else {
            upper.keep_registers(v);
        }
    }
    if writes(access) {
        buffer.copy_from_slice(&v.cpu().bounce.0[off..off + size]);
        // Host addresses of the last x87 instruction are none of the guest's business.
        match m {
            M::Fxsave | M::Fxsave64 => buffer[6..24].fill(0),
            M::Fnstenv | M::Fnsave if size == 28 || size == 108 => buffer[12..26].fill(0),
            M::Fnstenv | M::Fnsave => buffer[6..14].fill(0),
            _ => {}
        }
        for at in parts {
            v.write_as(place(v, at), &buffer[at..at + n], who)?;
        }
    }
    Ok(Flow::Next)
}

/// MOV between memory and a general register or an immediate: what drivers use on
/// devices, so it goes without a snippet.
fn plain(v: &mut Vcpu, i: &Instruction) -> Done {
    let store = i.op0_kind() == OpKind::Memory;
    let (size, who) = (i.memory_size().size(), v.data_access());
    let va = v.operand_at(i, 0, size, if store { Kind::Write } else { Kind::Read })?;
    if store {
        let x = v.operand(i, 1)?;
        v.store(va, size, x, who)?;
    } else {
        let x = v.load(va, size, who)?;
        v.set_reg(i.op0_register(), x);
    }
    Ok(Flow::Next)
}

/// x87 or MMX, and not one that ignores pending exceptions.
fn waits(i: &Instruction) -> bool {
    let mmx = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_mm());
    let x87 = |f: &CpuidFeature| matches!(f, CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387);
    mmx || i.code().cpuid_features().iter().any(x87) && !format!("{:?}", i.mnemonic()).starts_with("Fn")
}

/// The instruction wants its operand aligned and it is not; that fault comes
/// before those of paging.
fn misaligned(v: &Vcpu, i: &Instruction, va: u64, size: usize) -> bool {
    let strict = match i.mnemonic() {
        M::Movups
        | M::Movupd
        | M::Movdqu
        | M::Lddqu
        | M::Pcmpestri
        | M::Pcmpestrm
        | M::Pcmpistri
        | M::Pcmpistrm
        | M::Pcmpestri64
        | M::Pcmpestrm64 => false,
        // AMD's do not check; elsewhere the host still does, after the pages.
        M::Sha1msg1
        | M::Sha1msg2
        | M::Sha1nexte
        | M::Sha1rnds4
        | M::Sha256msg1
        | M::Sha256msg2
        | M::Sha256rnds2 => false,
        M::Fxsave | M::Fxsave64 | M::Fxrstor | M::Fxrstor64 => return va & 15 != 0,
        M::Vmovaps
        | M::Vmovapd
        | M::Vmovdqa
        | M::Vmovdqa32
        | M::Vmovdqa64
        | M::Vmovntdq
        | M::Vmovntps
        | M::Vmovntpd
        | M::Vmovntdqa
        | M::Cmpxchg16b
        | M::Movaps
        | M::Movapd
        | M::Movdqa
        | M::Movntdq
        | M::Movntps
        | M::Movntpd
        | M::Movntdqa => true,
        // MXCSR.MM, which AMD has, excuses the others.
        _ => size == 16 && i.code().encoding() == EncodingKind::Legacy && v.cpu().xsave.0[26] & 2 == 0,
    };
    strict && va & (size as u64 - 1) != 0
}

/// BT and its kin with a 16-bit register offset.
fn bit16(v: &mut Vcpu, i: &Instruction, va: u64) -> Done {
    let who = v.data_access();
    let bit = v.reg(i.op1_register()) & 15;
    if i.mnemonic() != M::Bt {
        v.check(va, 2, Kind::Write, who)?;
    }
    let x = v.load(va, 2, who)?;
    let y = match i.mnemonic() {
        M::Bts => x | 1 << bit,
        M::Btr => x & !(1 << bit),
        M::Btc => x ^ 1 << bit,
        _ => x,
    };
    if i.mnemonic() != M::Bt {
        v.store(va, 2, y, who)?;
    }
    let f = v.cpu().arith() & !CF;
    v.cpu_mut().set_arith(f | u32::from(x >> bit & 1 != 0));
    Ok(Flow::Next)
}
