//! MOVS, STOS, LODS, SCAS, CMPS with and without repeat prefixes.
//!
//! Repeated ones run page by page and leave registers exact at every stop, so
//! faults, device pages and events can interrupt them anywhere.
use super::{Done, Flow};
use crate::cpu::{AF, CF, OF, PF, SF, TF, ZF};
use crate::mmu::{Kind, Trap};
use crate::vcpu::Vcpu;
use iced_x86::{Code, Instruction, Mnemonic as M, OpKind, Register};
use std::sync::atomic::Ordering;

/// MOVSD and CMPSD are also names of SSE2 instructions.
pub fn is_string(i: &Instruction) -> bool {
    (0..i.op_count()).any(|n| {
        matches!(
            i.op_kind(n),
            OpKind::MemoryESDI
                | OpKind::MemoryESEDI
                | OpKind::MemoryESRDI
                | OpKind::MemorySegSI
                | OpKind::MemorySegESI
                | OpKind::MemorySegRSI
        )
    })
}

/// Arithmetic flags of `a - b` at `size` bytes.
pub fn sub_flags(a: u64, b: u64, size: usize) -> u32 {
    let bits = 8 * size as u32;
    let mask = if bits == 64 { u64::MAX } else { (1 << bits) - 1 };
    let (a, b) = (a & mask, b & mask);
    let r = a.wrapping_sub(b) & mask;
    let sign = 1u64 << (bits - 1);
    let mut f = 0;
    if a < b {
        f |= CF;
    }
    if (r as u8).count_ones() % 2 == 0 {
        f |= PF;
    }
    if (a ^ b ^ r) & 0x10 != 0 {
        f |= AF;
    }
    if r == 0 {
        f |= ZF;
    }
    if r & sign != 0 {
        f |= SF;
    }
    if (a ^ b) & (a ^ r) & sign != 0 {
        f |= OF;
    }
    f
}

/// Copy `n` elements upwards as the processor does, overlaps included.
///
/// # Safety
/// Both ranges are guest RAM inside one page each.
unsafe fn movs(from: u64, to: u64, n: u64, size: usize) {
    // SAFETY: the caller's.
    unsafe {
        match size {
            1 => {
                core::arch::asm!("rep movsb", inout("rcx") n => _, inout("rsi") from => _, inout("rdi") to => _, options(nostack))
            }
            2 => {
                core::arch::asm!("rep movsw", inout("rcx") n => _, inout("rsi") from => _, inout("rdi") to => _, options(nostack))
            }
            4 => {
                core::arch::asm!("rep movsd", inout("rcx") n => _, inout("rsi") from => _, inout("rdi") to => _, options(nostack))
            }
            _ => {
                core::arch::asm!("rep movsq", inout("rcx") n => _, inout("rsi") from => _, inout("rdi") to => _, options(nostack))
            }
        }
    }
}

/// # Safety
/// The range is guest RAM inside one page.
unsafe fn stos(to: u64, value: u64, n: u64, size: usize) {
    // SAFETY: the caller's.
    unsafe {
        match size {
            1 => {
                core::arch::asm!("rep stosb", inout("rcx") n => _, in("rax") value, inout("rdi") to => _, options(nostack))
            }
            2 => {
                core::arch::asm!("rep stosw", inout("rcx") n => _, in("rax") value, inout("rdi") to => _, options(nostack))
            }
            4 => {
                core::arch::asm!("rep stosd", inout("rcx") n => _, in("rax") value, inout("rdi") to => _, options(nostack))
            }
            _ => {
                core::arch::asm!("rep stosq", inout("rcx") n => _, in("rax") value, inout("rdi") to => _, options(nostack))
            }
        }
    }
}

struct Operands {
    size: usize,
    mask: u64,
    counter: Register,
    /// Segment of the source.
    seg: usize,
    rep: bool,
    /// Stop when ZF differs from this (SCAS, CMPS).
    until: Option<bool>,
}

fn operands(i: &Instruction) -> Operands {
    let m = i.mnemonic();
    let size = match m {
        M::Movsb | M::Stosb | M::Lodsb | M::Scasb | M::Cmpsb => 1,
        M::Movsw | M::Stosw | M::Lodsw | M::Scasw | M::Cmpsw => 2,
        M::Movsd | M::Stosd | M::Lodsd | M::Scasd | M::Cmpsd => 4,
        _ => 8,
    };
    let wide = (0..i.op_count())
        .find_map(|n| match i.op_kind(n) {
            OpKind::MemoryESDI | OpKind::MemorySegSI => Some(2),
            OpKind::MemoryESEDI | OpKind::MemorySegESI => Some(4),
            OpKind::MemoryESRDI | OpKind::MemorySegRSI => Some(8),
            _ => None,
        })
        .unwrap_or(8);
    let (mask, counter) = match wide {
        2 => (0xffff, Register::CX),
        4 => (0xffff_ffff, Register::ECX),
        _ => (u64::MAX, Register::RCX),
    };
    let compares =
        matches!(m, M::Scasb | M::Scasw | M::Scasd | M::Scasq | M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq);
    Operands {
        size,
        mask,
        counter,
        seg: Vcpu::segment_index(i.memory_segment()),
        rep: i.has_rep_prefix() || i.has_repne_prefix(),
        until: compares.then(|| !i.has_repne_prefix()),
    }
}

const SI: usize = 6;
const DI: usize = 7;

fn advance(v: &mut Vcpu, o: &Operands, r: usize, by: u64) {
    let down = v.cpu().df != 0;
    let g = &mut v.cpu_mut().gpr[r];
    let x = if down { g.wrapping_sub(by) } else { g.wrapping_add(by) };
    *g = match o.mask {
        0xffff => (*g & !0xffff) | (x & 0xffff),
        m => x & m,
    };
}

/// Elements up to the end of the page, upwards.
fn room(va: u64, size: usize) -> u64 {
    (4096 - (va & 0xfff)) / size as u64
}

/// Repeated MOVS and STOS of 64-bit code on flat segments: bytes of an element, and
/// whether it moves.
fn flat(i: &Instruction) -> Option<(u64, bool)> {
    use Code::*;
    let (size, moves) = match i.code() {
        Movsb_m8_m8 => (1, true),
        Movsw_m16_m16 => (2, true),
        Movsd_m32_m32 => (4, true),
        Movsq_m64_m64 => (8, true),
        Stosb_m8_AL => (1, false),
        Stosw_m16_AX => (2, false),
        Stosd_m32_EAX => (4, false),
        Stosq_m64_RAX => (8, false),
        _ => return None,
    };
    let flat = i.op0_kind() == OpKind::MemoryESRDI
        && i.has_rep_prefix()
        && !(moves && matches!(i.memory_segment(), Register::FS | Register::GS));
    flat.then_some((size, moves))
}

/// The frequent case: upwards over pages that are in the table. Stops before whatever
/// else there is.
fn sweep(v: &mut Vcpu, size: u64, moves: bool) {
    let region = &v.regions.all[v.region];
    let c = v.cpu();
    let value = c.gpr[0];
    let (mut left, mut from, mut to) = (c.gpr[1], c.gpr[SI], c.gpr[DI]);
    let shift = size.trailing_zeros();
    while left != 0 {
        let room = |va: u64| 4096 - (va & 0xfff);
        let most = left.min(4096).wrapping_mul(size).min(room(to));
        // Whole elements up to the next page end of either operand.
        let done = (if moves { most.min(room(from)) } else { most }) & !(size - 1);
        if done == 0 {
            break;
        }
        let a = if moves { region.probe(from, done, false) } else { Some(0) };
        let (Some(a), Some(b)) = (a, region.probe(to, done, true)) else { break };
        let n = done >> shift;
        // SAFETY: the table has all of it.
        unsafe {
            if moves {
                movs(a, b, n, size as usize);
            } else {
                stos(b, value, n, size as usize);
            }
        }
        left -= n;
        to = to.wrapping_add(done);
        if moves {
            from = from.wrapping_add(done);
        }
        if v.cpu().pending.load(Ordering::Relaxed) != 0 {
            break;
        }
    }
    let c = v.cpu_mut();
    (c.gpr[1], c.gpr[SI], c.gpr[DI]) = (left, from, to);
}

pub fn string(v: &mut Vcpu, i: &Instruction) -> Done {
    if let Some((size, moves)) = flat(i) {
        let c = v.cpu();
        if c.code64() && c.df == 0 && c.eflags & TF == 0 && !v.watching() && !v.aligned() {
            sweep(v, size, moves);
            if v.cpu().gpr[1] == 0 {
                return Ok(Flow::Next);
            }
        }
    }
    let o = operands(i);
    if !o.rep {
        one(v, i, &o)?;
        return Ok(Flow::Next);
    }
    let traced = v.cpu().eflags & TF != 0;
    loop {
        let left = v.reg(o.counter);
        if left == 0 {
            return Ok(Flow::Next);
        }
        let done = match bulk(v, i, &o, if traced { 1 } else { left })? {
            0 => {
                let stop = one(v, i, &o)?;
                let c = v.reg(o.counter).wrapping_sub(1);
                v.set_reg(o.counter, c);
                if stop {
                    return Ok(Flow::Next);
                }
                1
            }
            n => {
                v.set_reg(o.counter, left - n);
                n
            }
        };
        if left == done {
            return Ok(Flow::Next);
        }
        // Device accesses of one step leave before the next step.
        if traced
            || v.met != 0
            || !v.outbox.is_empty()
            || !v.answers.is_empty()
            || v.cpu().pending.load(Ordering::Relaxed) != 0
        {
            v.cpu_mut().rip = i.ip();
            v.unfinished = true;
            return Ok(Flow::Jump);
        }
    }
}

/// As many elements as can go at once; 0: use `one`.
fn bulk(v: &mut Vcpu, i: &Instruction, o: &Operands, left: u64) -> Result<u64, Trap> {
    if v.cpu().df != 0 || v.watching() || v.aligned() {
        return Ok(0);
    }
    let who = v.data_access();
    let size = o.size as u64;
    match i.mnemonic() {
        M::Movsb | M::Movsw | M::Movsd | M::Movsq => {
            let (si, di) = (v.cpu().gpr[SI] & o.mask, v.cpu().gpr[DI] & o.mask);
            let (from, to) = (v.linear(o.seg, si), v.linear(0, di));
            let n = left.min(room(from, o.size)).min(room(to, o.size));
            if n == 0 || !fits(v, o, (o.seg, si), n, Kind::Read) || !fits(v, o, (0, di), n, Kind::Write) {
                return Ok(0);
            }
            let (Some(a), _) = v.access(from, n * size, Kind::Read, who)? else { return Ok(0) };
            let (Some(b), _) = v.access(to, n * size, Kind::Write, who)? else { return Ok(0) };
            // SAFETY: both ranges were just translated.
            unsafe { movs(a, b, n, o.size) };
            advance(v, o, SI, n * size);
            advance(v, o, DI, n * size);
            Ok(n)
        }
        M::Stosb | M::Stosw | M::Stosd | M::Stosq => {
            let di = v.cpu().gpr[DI] & o.mask;
            let to = v.linear(0, di);
            let n = left.min(room(to, o.size));
            if n == 0 || !fits(v, o, (0, di), n, Kind::Write) {
                return Ok(0);
            }
            let (Some(b), _) = v.access(to, n * size, Kind::Write, who)? else { return Ok(0) };
            // SAFETY: just translated.
            unsafe { stos(b, v.cpu().gpr[0], n, o.size) };
            advance(v, o, DI, n * size);
            Ok(n)
        }
        _ => Ok(0),
    }
}

/// `n` elements from an offset on neither wrap around nor leave their segment.
fn fits(v: &Vcpu, o: &Operands, (seg, off): (usize, u64), n: u64, kind: Kind) -> bool {
    let length = n * o.size as u64;
    off.checked_add(length - 1).is_some_and(|last| last <= o.mask)
        && v.check_segment(seg, off, length as usize, kind).is_ok()
}

/// One element; true if a compare ends the repetition.
fn one(v: &mut Vcpu, i: &Instruction, o: &Operands) -> Result<bool, Trap> {
    let who = v.data_access();
    let (si, di) = (v.cpu().gpr[SI] & o.mask, v.cpu().gpr[DI] & o.mask);
    let (from, to) = (v.linear(o.seg, si), v.linear(0, di));
    let source = |v: &Vcpu| v.check_segment(o.seg, si, o.size, Kind::Read);
    let target = |v: &Vcpu, kind: Kind| v.check_segment(0, di, o.size, kind);
    // Faults of the operand that comes first come before what is wrong with the other.
    let aligned = |v: &Vcpu, va: u64| v.check_alignment(va, o.size, o.size);
    let size = o.size as u64;
    let acc = match o.size {
        1 => Register::AL,
        2 => Register::AX,
        4 => Register::EAX,
        _ => Register::RAX,
    };
    match i.mnemonic() {
        M::Movsb | M::Movsw | M::Movsd | M::Movsq => {
            source(v)?;
            aligned(v, from)?;
            let x = v.load(from, o.size, who)?;
            target(v, Kind::Write)?;
            aligned(v, to)?;
            v.store(to, o.size, x, who)?;
            advance(v, o, SI, size);
            advance(v, o, DI, size);
        }
        M::Stosb | M::Stosw | M::Stosd | M::Stosq => {
            target(v, Kind::Write)?;
            aligned(v, to)?;
            let x = v.reg(acc);
            v.store(to, o.size, x, who)?;
            advance(v, o, DI, size);
        }
        M::Lodsb | M::Lodsw | M::Lodsd | M::Lodsq => {
            source(v)?;
            aligned(v, from)?;
            let x = v.load(from, o.size, who)?;
            v.set_reg(acc, x);
            advance(v, o, SI, size);
        }
        m => {
            let two = matches!(m, M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq);
            if two {
                source(v)?;
            }
            target(v, Kind::Read)?;
            // Which address faults first shows in CR2; so do AMD's processors.
            if m != M::Cmpsb || !i.has_rep_prefix() {
                aligned(v, to)?;
                v.check(to, o.size, Kind::Read, who)?;
            }
            if two {
                aligned(v, from)?;
            }
            let a = if two { v.load(from, o.size, who)? } else { v.reg(acc) };
            let b = v.load(to, o.size, who)?;
            if two {
                advance(v, o, SI, size);
            }
            advance(v, o, DI, size);
            let f = sub_flags(a, b, o.size);
            v.cpu_mut().set_arith(f);
            return Ok(o.rep && o.until.is_some_and(|z| (f & ZF != 0) != z));
        }
    }
    Ok(false)
}
