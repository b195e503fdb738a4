//! Stack instructions that are not translated, and old oddities.
use super::{Done, Flow};
use crate::cpu::*;
use crate::mmu::{Exception, Kind, Trap, Who, DE};
use crate::vcpu::Vcpu;
use iced_x86::{Code, Instruction, Mnemonic as M, OpKind};

impl Vcpu {
    /// Mask of the stack pointer's size.
    pub fn stack_mask(&self) -> u64 {
        let c = self.cpu();
        if c.code64() {
            u64::MAX
        } else if c.seg[2].big() {
            0xffff_ffff
        } else {
            0xffff
        }
    }

    /// Linear address of `size` bytes on the stack; #SS(0) where its segment ends.
    pub fn stack_at(&self, sp: u64, size: usize, kind: Kind) -> Result<u64, Trap> {
        self.segment_at(2, sp & self.stack_mask(), size, kind)
    }

    fn set_sp(&mut self, sp: u64) {
        let m = self.stack_mask();
        let g = &mut self.cpu_mut().gpr[4];
        *g = if m == 0xffff { (*g & !m) | (sp & m) } else { sp & m };
    }

    /// Push `size` bytes.
    pub fn push(&mut self, size: usize, value: u64) -> Result<(), Trap> {
        let sp = self.cpu().gpr[4].wrapping_sub(size as u64);
        let va = self.stack_at(sp, size, Kind::Write)?;
        let who = self.data_access();
        self.store(va, size, value, who).map_err(Trap::on_stack)?;
        self.set_sp(sp);
        Ok(())
    }

    /// Value `offset` bytes above the top.
    pub fn peek(&mut self, offset: u64, size: usize) -> Result<u64, Trap> {
        let va = self.stack_at(self.cpu().gpr[4].wrapping_add(offset), size, Kind::Read)?;
        let who = self.data_access();
        self.load(va, size, who).map_err(Trap::on_stack)
    }

    /// Move the stack pointer up.
    pub fn drop_stack(&mut self, by: u64) {
        let sp = self.cpu().gpr[4].wrapping_add(by);
        self.set_sp(sp);
    }

    /// The same in a stack of size `mask`.
    pub fn drop_stack_by(&mut self, by: u64, mask: u64) {
        let sp = self.cpu().gpr[4];
        self.move_stack_by(sp, mask, by);
    }

    pub fn set_stack(&mut self, sp: u64) {
        self.set_sp(sp);
    }

    /// The stack pointer was `sp` and moves up, in a stack of size `mask`.
    pub fn move_stack_by(&mut self, sp: u64, mask: u64, by: u64) {
        let up = sp.wrapping_add(by) & mask;
        self.cpu_mut().gpr[4] = if mask == 0xffff { (sp & !mask) | up } else { up };
    }
}

fn size(i: &Instruction) -> usize {
    i.stack_pointer_increment().unsigned_abs() as usize
}

pub fn push(v: &mut Vcpu, i: &Instruction) -> Done {
    let value = v.operand(i, 0)?;
    v.push(size(i), value)?;
    Ok(Flow::Next)
}

pub fn pop(v: &mut Vcpu, i: &Instruction) -> Done {
    let n = size(i);
    let value = v.peek(0, n)?;
    let old = v.cpu().gpr[4];
    // The address of a memory operand uses the stack pointer after the pop.
    v.drop_stack(n as u64);
    if i.op0_kind() == OpKind::Memory {
        if let Err(e) = v.set_operand(i, 0, n, value) {
            v.cpu_mut().gpr[4] = old;
            return Err(e);
        }
    } else {
        v.set_reg(i.op0_register(), value);
    }
    Ok(Flow::Next)
}

pub fn leave(v: &mut Vcpu, i: &Instruction) -> Done {
    let n = match i.code() {
        Code::Leavew => 2,
        Code::Leaved => 4,
        _ => 8,
    };
    let bp = v.cpu().gpr[5];
    let va = v.stack_at(bp, n, Kind::Read)?;
    let who = v.data_access();
    let value = v.load(va, n, who).map_err(Trap::on_stack)?;
    v.set_stack(bp.wrapping_add(n as u64));
    let g = &mut v.cpu_mut().gpr[5];
    *g = if n == 2 { (*g & !0xffff) | value } else { value };
    Ok(Flow::Next)
}

impl Vcpu {
    /// Operand size in bytes that the encoding and mode give.
    pub fn operand_bytes(&self, i: &Instruction) -> usize {
        match i.code().op_code().operand_size() {
            16 => 2,
            32 => 4,
            64 => 8,
            _ => {
                if self.cpu().code64() {
                    8
                } else if self.cpu().seg[1].big() {
                    4
                } else {
                    2
                }
            }
        }
    }
}

pub fn enter(v: &mut Vcpu, i: &Instruction) -> Done {
    let n = v.operand_bytes(i);
    let n = if v.cpu().code64() && n == 4 { 8 } else { n };
    let alloc = u64::from(i.immediate16());
    let level = u64::from(i.immediate8_2nd() & 31);
    let (sp0, bp0) = (v.cpu().gpr[4], v.cpu().gpr[5]);
    let r = (|| {
        v.push(n, bp0)?;
        let frame = v.cpu().gpr[4];
        let mut bp = bp0;
        for _ in 1..level {
            bp = bp.wrapping_sub(n as u64);
            let va = v.stack_at(bp, n, Kind::Read)?;
            let who = v.data_access();
            let x = v.load(va, n, who).map_err(Trap::on_stack)?;
            v.push(n, x)?;
        }
        if level > 0 {
            v.push(n, frame)?;
        }
        v.drop_stack(alloc.wrapping_neg());
        // The processor checks that the new top can be written.
        let va = v.stack_at(v.cpu().gpr[4], 1, Kind::Write)?;
        v.check_alignment(va, n, n)?;
        let who = v.data_access();
        v.access(va, 1, Kind::Write, who).map_err(Exception::on_stack)?;
        let g = &mut v.cpu_mut().gpr[5];
        *g = if n == 2 { (*g & !0xffff) | (frame & 0xffff) } else { frame };
        Ok(Flow::Next)
    })();
    if r.is_err() {
        v.cpu_mut().gpr[4] = sp0;
        v.cpu_mut().gpr[5] = bp0;
    }
    r
}

pub fn pusha(v: &mut Vcpu, i: &Instruction) -> Done {
    let n = if i.mnemonic() == M::Pusha { 2 } else { 4 };
    let sp0 = v.cpu().gpr[4];
    for r in 0..8 {
        let value = if r == 4 { sp0 } else { v.cpu().gpr[r] };
        if let Err(e) = v.push(n, value) {
            v.cpu_mut().gpr[4] = sp0;
            return Err(e);
        }
    }
    Ok(Flow::Next)
}

pub fn popa(v: &mut Vcpu, i: &Instruction) -> Done {
    let n = if i.mnemonic() == M::Popa { 2 } else { 4 };
    // A fault leaves what is loaded by then.
    for k in 0..8 {
        let x = v.peek((k * n) as u64, n)?;
        let r = 7 - k;
        if r != 4 {
            let g = &mut v.cpu_mut().gpr[r];
            *g = if n == 2 { (*g & !0xffff) | x } else { x };
        }
    }
    v.drop_stack(8 * n as u64);
    Ok(Flow::Next)
}

pub fn pushf(v: &mut Vcpu, i: &Instruction) -> Done {
    let c = v.cpu();
    let n = size(i);
    let mut f = c.rflags() & !(RF | VM);
    if c.eflags & VM != 0 && c.iopl() < 3 {
        if c.cr4 & CR4_VME == 0 || n != 2 {
            return Err(Exception::gp().into());
        }
        f = (f & !IF) | IOPL | if f & VIF != 0 { IF } else { 0 };
    }
    v.push(n, f)?;
    Ok(Flow::Next)
}

pub fn popf(v: &mut Vcpu, i: &Instruction) -> Done {
    let n = size(i);
    let new = v.peek(0, n)?;
    if v.cpu().eflags & VM != 0 && v.cpu().iopl() < 3 {
        v.check_virtual_flags(new, n)?;
        v.drop_stack(n as u64);
        v.write_virtual_flags(new);
    } else {
        v.drop_stack(n as u64);
        v.write_flags(new, n, false);
        if v.cpu().cpl == 3 {
            // AC is part of the mode.
            v.select_region();
        }
    }
    v.cpu_mut().rip = i.next_ip();
    Ok(Flow::Jump)
}

/// CR4.VME.
const CR4_VME: u64 = 1;

impl Vcpu {
    /// POPF and IRET of a virtual-8086 program that IOPL does not trust: allowed with
    /// CR4.VME, unless a virtual interrupt waits or a trap is asked for.
    pub fn check_virtual_flags(&self, new: u64, size: usize) -> Result<(), Trap> {
        let c = self.cpu();
        if c.cr4 & CR4_VME == 0 || size != 2 || new & TF != 0 || new & IF != 0 && c.eflags & VIP != 0 {
            return Err(Exception::gp().into());
        }
        Ok(())
    }

    /// IF of such flags goes to VIF.
    pub fn write_virtual_flags(&mut self, new: u64) {
        let mask = (u64::from(ARITH) | DF | NT) & 0xffff;
        let old = self.cpu().rflags() & !(mask | VIF);
        let f = old | (new & mask) | if new & IF != 0 { VIF } else { 0 };
        self.cpu_mut().set_rflags(f);
    }

    /// POPF and IRET: change what the privilege level may change.
    pub fn write_flags(&mut self, new: u64, size: usize, iret: bool) {
        let c = self.cpu();
        let (cpl, iopl) = (c.cpl, c.iopl());
        let mut mask = u64::from(ARITH) | TF | DF | NT | AC | ID;
        // RF matters to breakpoints on code only, and makes the next instruction slow.
        if iret && self.armed.code {
            mask |= RF;
        }
        if iret && cpl == 0 {
            mask |= VIF | VIP;
        }
        if cpl == 0 {
            mask |= IOPL;
        }
        if cpl <= iopl {
            mask |= IF;
        }
        if size == 2 {
            mask &= 0xffff;
        }
        let old = c.rflags();
        let mut f = (old & !mask) | (new & mask);
        if !iret || !self.armed.code {
            f &= !RF;
        }
        self.cpu_mut().set_rflags(f);
        self.access_check_from(old);
    }

    /// After a change of RFLAGS from `old`: user pages that supervisor code
    /// reached while AC was set are closed to it again.
    pub fn access_check_from(&mut self, old: u64) {
        if old & AC != 0 && self.cpu().ac == 0 {
            self.regions.all[0].flush_kuser();
            self.cpu_mut().kuser = 0;
        }
    }
}

pub fn xlat(v: &mut Vcpu, i: &Instruction) -> Done {
    let off = v.cpu().gpr[3].wrapping_add(v.cpu().gpr[0] & 0xff);
    let off = match i.memory_base().size() {
        2 => off & 0xffff,
        4 => off & 0xffff_ffff,
        _ => off,
    };
    let va = v.segment_at(Vcpu::segment_index(i.memory_segment()), off, 1, Kind::Read)?;
    let who: Who = v.data_access();
    let x = v.load(va, 1, who)?;
    let g = &mut v.cpu_mut().gpr[0];
    *g = (*g & !0xff) | x;
    Ok(Flow::Next)
}

fn szp(x: u8) -> u32 {
    u32::from(x & 0x80) | if x == 0 { ZF } else { 0 } | if x.count_ones() % 2 == 0 { PF } else { 0 }
}

/// Flags of the sum or difference of two bytes.
fn byte_flags(x: u8, y: u8, add: bool) -> u32 {
    let z = if add { x.wrapping_add(y) } else { x.wrapping_sub(y) };
    let carry = if add { z < x } else { x < y };
    let overflow = if add { !(x ^ y) & (x ^ z) } else { (x ^ y) & (x ^ z) };
    szp(z)
        | if carry { CF } else { 0 }
        | if (x ^ y ^ z) & 0x10 != 0 { AF } else { 0 }
        | if overflow & 0x80 != 0 { OF } else { 0 }
}

/// BCD adjustments. The flags that the manuals declare undefined are what
/// AMD's Zen 4 computes: AAA and AAS add and subtract all of 0106h, AAD adds.
pub fn decimal(v: &mut Vcpu, i: &Instruction) -> Done {
    let f = v.cpu().arith();
    let ax = v.cpu().gpr[0] as u16;
    let (al, ah) = (ax as u8, (ax >> 8) as u8);
    let adjust = al & 15 > 9 || f & AF != 0;
    let adjusted = if adjust { AF | CF } else { 0 };
    let (new, flags) = match i.mnemonic() {
        M::Aaa | M::Aas => {
            let add = i.mnemonic() == M::Aaa;
            let by = if adjust { 0x106 } else { 0 };
            let (w, overflow) = if add {
                (ax.wrapping_add(by), !(ax ^ by) & (ax ^ ax.wrapping_add(by)))
            } else {
                (ax.wrapping_sub(by), (ax ^ by) & (ax ^ ax.wrapping_sub(by)))
            };
            let fl = szp(w as u8) & PF
                | u32::from(w >> 8) & SF
                | if w == 0 { ZF } else { 0 }
                | if overflow & 0x8000 != 0 { OF } else { 0 };
            (w & 0xff0f, adjusted | fl)
        }
        M::Daa | M::Das => {
            let add = i.mnemonic() == M::Daa;
            let carry = al > 0x99 || f & CF != 0;
            let by = if adjust { 6 } else { 0 } + if carry { 0x60 } else { 0 };
            let x = if add { al.wrapping_add(by) } else { al.wrapping_sub(by) };
            let borrow = !add && adjust && al < 6;
            let fl = byte_flags(al, by, add) & (SF | ZF | PF | OF);
            let carry = if carry || borrow { CF } else { 0 };
            (u16::from(ah) << 8 | u16::from(x), fl | (adjusted & AF) | carry)
        }
        M::Aam => {
            let n = i.immediate8();
            if n == 0 {
                return Err(Exception::new(DE).into());
            }
            let x = al % n;
            (u16::from(al / n) << 8 | u16::from(x), szp(x))
        }
        M::Aad => {
            let more = ah.wrapping_mul(i.immediate8());
            (u16::from(al.wrapping_add(more)), byte_flags(al, more, true))
        }
        _ => {
            // SALC
            let x = if f & CF != 0 { 0xff } else { 0 };
            (u16::from(ah) << 8 | x, f)
        }
    };
    let c = v.cpu_mut();
    c.gpr[0] = (c.gpr[0] & !0xffff) | u64::from(new);
    c.set_arith(flags);
    Ok(Flow::Next)
}

/// One-byte INC and DEC of 16- and 32-bit code, whose encodings are REX elsewhere.
pub fn inc_dec(v: &mut Vcpu, i: &Instruction) -> Done {
    let r = i.op0_register();
    let x = v.reg(r);
    let bits = 8 * r.size() as u32;
    let mask = u64::MAX >> (64 - bits);
    let inc = i.mnemonic() == M::Inc;
    let y = if inc { x.wrapping_add(1) } else { x.wrapping_sub(1) } & mask;
    let sign = 1 << (bits - 1);
    let mut f = v.cpu().arith() & CF;
    f |= szp(y as u8) & PF;
    f |= if y == 0 { ZF } else { 0 } | if y & sign != 0 { SF } else { 0 };
    f |= if (x ^ y) & 0x10 != 0 { AF } else { 0 };
    f |= if inc && y == sign || !inc && x == sign { OF } else { 0 };
    v.set_reg(r, y);
    v.cpu_mut().set_arith(f);
    Ok(Flow::Next)
}
