//! Segment registers, descriptor tables, and the instructions that inspect them.
//! SDM volume 3, chapters 3 and 5.
use super::{Done, Flow};
use crate::cpu::{Seg, VM};
use crate::mmu::{ud, Exception, Kind, Trap, Who, GP, NP, SS};
use crate::vcpu::Vcpu;
use iced_x86::{Instruction, Mnemonic as M, OpKind, Register};

/// A raw 8-byte descriptor.
#[derive(Clone, Copy, Debug)]
pub struct Descriptor(pub u64);

impl Descriptor {
    pub fn seg(self, selector: u16) -> Seg {
        let d = self.0;
        let raw = ((d & 0xffff) | ((d >> 32) & 0xf_0000)) as u32;
        Seg {
            base: ((d >> 16) & 0xff_ffff) | ((d >> 32) & 0xff00_0000),
            limit: if d & (1 << 55) != 0 { (raw << 12) | 0xfff } else { raw },
            access: ((d >> 40) & 0xf0ff) as u32,
            selector,
            _pad: [0; 3],
        }
    }
    pub fn present(self) -> bool {
        self.0 & (1 << 47) != 0
    }
    pub fn dpl(self) -> u8 {
        ((self.0 >> 45) & 3) as u8
    }
    /// Type field, four bits.
    pub fn kind(self) -> u8 {
        ((self.0 >> 40) & 15) as u8
    }
    /// Code or data rather than system.
    pub fn ordinary(self) -> bool {
        self.0 & (1 << 44) != 0
    }
    pub fn code(self) -> bool {
        self.ordinary() && self.kind() & 8 != 0
    }
    pub fn conforming(self) -> bool {
        self.kind() & 4 != 0
    }
    pub fn long(self) -> bool {
        self.0 & (1 << 53) != 0
    }
    pub fn big(self) -> bool {
        self.0 & (1 << 54) != 0
    }
}

pub fn fault(vector: u8, selector: u16) -> Trap {
    Exception::with(vector, u32::from(selector & !3)).into()
}

impl Vcpu {
    /// The descriptor of `selector` and its linear address; `vector` if it lies
    /// outside its table.
    pub fn descriptor(&mut self, selector: u16, vector: u8) -> Result<(Descriptor, u64), Trap> {
        let c = self.cpu();
        let (base, limit) = if selector & 4 != 0 {
            if c.ldt.unusable() || c.ldt.selector & !3 == 0 {
                return Err(fault(vector, selector));
            }
            (c.ldt.base, c.ldt.limit)
        } else {
            (c.gdt_base, c.gdt_limit)
        };
        let off = u32::from(selector & !7);
        if off + 7 > limit {
            return Err(fault(vector, selector));
        }
        let va = base.wrapping_add(u64::from(off));
        Ok((Descriptor(self.load(va, 8, Who::System)?), va))
    }

    /// Set the accessed bit of an ordinary descriptor.
    pub fn mark_accessed(&mut self, d: Descriptor, va: u64) -> Result<(), Trap> {
        if d.0 & (1 << 40) == 0 {
            // The byte that the bit is in: others may change the rest.
            self.store(va.wrapping_add(5), 1, d.0 >> 40 & 0xff | 1, Who::System)?;
        }
        Ok(())
    }

    /// Load a segment register in real-address or virtual-8086 mode. The former keeps
    /// limit and rights, which makes big real mode.
    pub fn put_real(&mut self, n: usize, selector: u16) {
        let mut s = self.cpu().seg[n];
        if self.cpu().eflags & VM != 0 {
            (s.limit, s.access) = (0xffff, 0xf3);
        } else if s.unusable() {
            (s.limit, s.access) = (0xffff, 0x93);
        } else if n == 1 {
            // Code may be written, at level 0.
            s.access = s.access & !0x7f | 0x13;
        }
        (s.selector, s.base) = (selector, u64::from(selector) << 4);
        self.put_segment(n, s);
    }

    /// Load ES, SS, DS, FS or GS.
    pub fn load_segment(&mut self, n: usize, selector: u16) -> Result<(), Trap> {
        if self.real_mode() {
            self.put_real(n, selector);
            return Ok(());
        }
        let cpl = self.cpu().cpl;
        let rpl = (selector & 3) as u8;
        if selector & !3 == 0 {
            let ok = n != 2 || (self.cpu().code64() && cpl < 3 && rpl == cpl);
            if !ok {
                return Err(Exception::gp().into());
            }
            // AMD keeps the base of a null FS or GS, Intel clears it; cleared here.
            self.put_segment(
                n,
                Seg {
                    selector,
                    access: 0x1_0000 | if n == 2 { u32::from(cpl) << 5 } else { 0 },
                    ..Seg::default()
                },
            );
            return Ok(());
        }
        let (d, va) = self.descriptor(selector, GP)?;
        let ok = if n == 2 {
            rpl == cpl && d.ordinary() && !d.code() && d.kind() & 2 != 0 && d.dpl() == cpl
        } else {
            d.ordinary()
                && (!d.code() || d.kind() & 2 != 0)
                && (d.code() && d.conforming() || d.dpl() >= rpl.max(cpl))
        };
        if !ok {
            return Err(fault(GP, selector));
        }
        if !d.present() {
            return Err(fault(if n == 2 { SS } else { NP }, selector));
        }
        self.mark_accessed(d, va)?;
        let mut s = d.seg(selector);
        s.access |= 1;
        self.put_segment(n, s);
        Ok(())
    }
}

pub fn mov(v: &mut Vcpu, i: &Instruction) -> Done {
    if i.op0_kind() == OpKind::Register && i.op0_register().is_segment_register() {
        let n = Vcpu::segment_index(i.op0_register());
        if n == 1 {
            return Err(ud());
        }
        let sel = v.operand(i, 1)? as u16;
        v.load_segment(n, sel)?;
        v.after_segment_load();
        v.shade(n);
        v.cpu_mut().rip = i.next_ip();
        return Ok(Flow::Jump);
    }
    let sel = u64::from(v.cpu().seg[Vcpu::segment_index(i.op1_register())].selector);
    let size = if i.op0_kind() == OpKind::Register { i.op0_register().size() } else { 2 };
    v.set_operand(i, 0, size, sel)?;
    Ok(Flow::Next)
}

pub fn push(v: &mut Vcpu, i: &Instruction) -> Done {
    let sel = u64::from(v.cpu().seg[Vcpu::segment_index(i.op0_register())].selector);
    let size = i.stack_pointer_increment().unsigned_abs() as usize;
    v.push(size, sel)?;
    Ok(Flow::Next)
}

pub fn pop(v: &mut Vcpu, i: &Instruction) -> Done {
    let n = Vcpu::segment_index(i.op0_register());
    let size = i.stack_pointer_increment().unsigned_abs() as usize;
    let sel = v.peek(0, size)? as u16;
    // POP SS moves the old stack's pointer.
    let mask = v.stack_mask();
    v.load_segment(n, sel)?;
    v.drop_stack_by(size as u64, mask);
    v.after_segment_load();
    v.shade(n);
    v.cpu_mut().rip = i.next_ip();
    Ok(Flow::Jump)
}

/// LDS and its kin.
pub fn load_far(v: &mut Vcpu, i: &Instruction) -> Done {
    let size = i.op0_register().size();
    let va = v.operand_at(i, 0, size + 2, Kind::Read)?;
    let who = v.data_access();
    let off = v.load(va, size, who)?;
    let sel = v.load(va.wrapping_add(size as u64), 2, who)? as u16;
    let n = match i.mnemonic() {
        M::Les => 0,
        M::Lss => 2,
        M::Lds => 3,
        M::Lfs => 4,
        _ => 5,
    };
    v.load_segment(n, sel)?;
    v.set_reg(i.op0_register(), off);
    v.after_segment_load();
    v.cpu_mut().rip = i.next_ip();
    Ok(Flow::Jump)
}

pub fn load_table(v: &mut Vcpu, i: &Instruction) -> Done {
    v.supervisor()?;
    let long = v.cpu().code64();
    let va = v.operand_at(i, 0, if long { 10 } else { 6 }, Kind::Read)?;
    let who = v.data_access();
    let limit = v.load(va, 2, who)? as u32;
    let base = v.load(va.wrapping_add(2), if long { 8 } else { 4 }, who)?;
    if long && !crate::mmu::canonical(base) {
        return Err(Exception::gp().into());
    }
    let base = if i.code().op_code().operand_size() == 16 { base & 0xff_ffff } else { base };
    let c = v.cpu_mut();
    if i.mnemonic() == M::Lgdt {
        (c.gdt_base, c.gdt_limit) = (base, limit);
    } else {
        (c.idt_base, c.idt_limit) = (base, limit);
    }
    Ok(Flow::Next)
}

pub fn store_table(v: &mut Vcpu, i: &Instruction) -> Done {
    v.umip()?;
    let c = v.cpu();
    let (base, limit) =
        if i.mnemonic() == M::Sgdt { (c.gdt_base, c.gdt_limit) } else { (c.idt_base, c.idt_limit) };
    let n = if c.code64() { 10 } else { 6 };
    let mut b = [0; 10];
    b[..2].copy_from_slice(&(limit as u16).to_le_bytes());
    b[2..].copy_from_slice(&base.to_le_bytes());
    let va = v.operand_at(i, 0, n, Kind::Write)?;
    let who = v.data_access();
    v.write_as(va, &b[..n], who)?;
    Ok(Flow::Next)
}

/// LLDT, LTR.
pub fn load_system(v: &mut Vcpu, i: &Instruction) -> Done {
    if v.real_mode() {
        return Err(ud());
    }
    v.supervisor()?;
    let sel = v.operand(i, 0)? as u16;
    let ldt = i.mnemonic() == M::Lldt;
    if sel & !3 == 0 {
        if !ldt {
            return Err(Exception::gp().into());
        }
        v.cpu_mut().ldt = Seg { selector: sel, access: 0x1_0000, ..Seg::default() };
        return Ok(Flow::Next);
    }
    if sel & 4 != 0 {
        return Err(fault(GP, sel));
    }
    let (d, va) = v.descriptor(sel, GP)?;
    let right = if ldt { d.kind() == 2 } else { d.kind() == 9 || d.kind() == 1 && !v.cpu().long_mode() };
    if d.ordinary() || !right {
        return Err(fault(GP, sel));
    }
    if !d.present() {
        return Err(fault(NP, sel));
    }
    let mut s = d.seg(sel);
    if v.cpu().long_mode() {
        if u64::from(sel | 7) + 8 > u64::from(v.cpu().gdt_limit) {
            return Err(fault(GP, sel));
        }
        let upper = v.load(va + 8, 8, Who::System)?;
        if upper >> 40 & 0x1f != 0 {
            return Err(fault(GP, sel));
        }
        s.base |= upper << 32;
        if !crate::mmu::canonical(s.base) {
            return Err(fault(GP, sel));
        }
    }
    if ldt {
        v.cpu_mut().ldt = s;
    } else {
        v.store(va, 8, d.0 | 2 << 40, Who::System)?;
        s.access |= 2;
        v.cpu_mut().tr = s;
    }
    Ok(Flow::Next)
}

/// SLDT, STR, SMSW.
pub fn store_system(v: &mut Vcpu, i: &Instruction) -> Done {
    if v.real_mode() && i.mnemonic() != M::Smsw {
        return Err(ud());
    }
    v.umip()?;
    let c = v.cpu();
    let value = match i.mnemonic() {
        M::Sldt => u64::from(c.ldt.selector),
        M::Str => u64::from(c.tr.selector),
        _ => c.cr0,
    };
    let size = if i.op0_kind() == OpKind::Register { i.op0_register().size() } else { 2 };
    v.set_operand(i, 0, size, value)?;
    Ok(Flow::Next)
}

/// LAR, LSL, VERR, VERW: never fault on the selector, they answer in ZF.
pub fn inspect(v: &mut Vcpu, i: &Instruction) -> Done {
    if v.real_mode() {
        return Err(ud());
    }
    let m = i.mnemonic();
    let two = matches!(m, M::Lar | M::Lsl);
    let sel = v.operand(i, u32::from(two))? as u16;
    let cpl = v.cpu().cpl;
    let rpl = (sel & 3) as u8;
    let found = if sel & !3 == 0 {
        None
    } else {
        match v.descriptor(sel, GP) {
            Ok((d, va)) => Some((d, va)),
            Err(Trap::Fault(e)) if e.vector == GP => None,
            Err(e) => return Err(e),
        }
    };
    let long = v.cpu().long_mode();
    let good = found.filter(|(d, _)| {
        let reach = d.code() && d.conforming() || d.dpl() >= cpl.max(rpl);
        if d.ordinary() {
            reach
                && match m {
                    M::Verr => !d.code() || d.kind() & 2 != 0,
                    M::Verw => !d.code() && d.kind() & 2 != 0,
                    _ => true,
                }
        } else {
            let kind = match m {
                M::Lar if long => matches!(d.kind(), 2 | 9 | 11 | 12),
                M::Lar => matches!(d.kind(), 1 | 2 | 3 | 4 | 5 | 9 | 11 | 12),
                M::Lsl if long => matches!(d.kind(), 2 | 9 | 11),
                M::Lsl => matches!(d.kind(), 1 | 2 | 3 | 9 | 11),
                _ => false,
            };
            kind && d.dpl() >= cpl.max(rpl)
        }
    });
    if let (Some((d, _)), true) = (good, two) {
        let value = if m == M::Lar { (d.0 >> 32) & 0x00ff_ff00 } else { u64::from(d.seg(sel).limit) };
        v.set_reg(i.op0_register(), value);
    }
    let f = v.cpu().arith() & !crate::cpu::ZF;
    v.cpu_mut().set_arith(f | if good.is_some() { crate::cpu::ZF } else { 0 });
    Ok(Flow::Next)
}

pub fn arpl(v: &mut Vcpu, i: &Instruction) -> Done {
    if v.real_mode() {
        return Err(ud());
    }
    let to = v.operand(i, 0)?;
    let from = v.reg(match i.op1_register() {
        Register::None => Register::AX,
        r => r,
    });
    let f = v.cpu().arith() & !crate::cpu::ZF;
    if to & 3 < from & 3 {
        v.set_operand(i, 0, 2, (to & !3) | (from & 3))?;
        v.cpu_mut().set_arith(f | crate::cpu::ZF);
    } else {
        v.cpu_mut().set_arith(f);
    }
    Ok(Flow::Next)
}

impl Vcpu {
    /// #GP(0) unless at privilege level 0.
    pub fn supervisor(&self) -> Result<(), Trap> {
        if self.cpu().cpl == 0 {
            Ok(())
        } else {
            Err(Exception::gp().into())
        }
    }

    /// #GP(0) for SGDT and its kin in user mode under CR4.UMIP.
    pub fn umip(&self) -> Result<(), Trap> {
        if self.cpu().cpl != 0 && self.cpu().cr4 & (1 << 11) != 0 {
            return Err(Exception::gp().into());
        }
        Ok(())
    }

    /// Nothing interrupts between a load of SS and the instruction after it. A second
    /// load of SS has no such effect.
    fn shade(&mut self, n: usize) {
        if n == 2 {
            self.cpu_mut().shadow = super::debug::AFTER_SS;
        }
    }

    /// Translations may depend on the bases of DS, ES and SS.
    pub fn after_segment_load(&mut self) {
        if !self.cpu().code64() {
            self.select_region();
        }
    }
}
