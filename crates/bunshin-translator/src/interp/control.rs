//! Far transfers, system calls, interrupts and exceptions, IRET.
//! SDM volume 3, chapter 6. Not modelled: task gates, call gates to inner
//! levels in 32-bit mode, virtual-8086 mode.
use super::segment::{fault, Descriptor};
use super::{Done, Flow};
use crate::cpu::*;
use crate::mmu::{canonical, ud, Exception, Trap, Who, BP, BR, DB, DE, DF_, GP, NP, OF_, PF_, SS, TS};
use crate::vcpu::Vcpu;
use iced_x86::{Code, Instruction, Mnemonic as M, OpKind, Register};
use std::sync::atomic::Ordering;

/// Where an event comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Source {
    /// Hardware interrupt or exception.
    Hardware,
    /// INT n, INT3, INTO: the gate's DPL counts.
    Software,
}

fn flat(selector: u16, access: u32) -> Seg {
    Seg { selector, base: 0, limit: u32::MAX, access, _pad: [0; 3] }
}

impl Vcpu {
    /// Deliver an exception, a double fault if that fails, shutdown if that fails too.
    pub fn deliver(&mut self, e: Exception) {
        self.counters.exceptions += 1;
        self.counters.page_faults += u64::from(e.vector == PF_);
        self.cpu_mut().shadow = 0;
        let first = e;
        let mut e = e;
        if let (PF_, Some(a)) = (e.vector, e.address) {
            self.cpu_mut().cr2 = a;
        }
        for level in 0..3 {
            let rf = if matches!(e.vector, DB | 2 | DF_) { 0 } else { RF };
            match self.event(e.vector, e.error, Source::Hardware, self.cpu().rip, rf) {
                Ok(()) => return,
                Err(Trap::Fault(second)) if level < 2 => {
                    let contributory = |v: u8| matches!(v, DE | TS | NP | SS | GP);
                    if e.vector == DF_ {
                        break;
                    }
                    let double = contributory(e.vector) && contributory(second.vector)
                        || e.vector == PF_ && (contributory(second.vector) || second.vector == PF_);
                    if let (PF_, Some(a)) = (second.vector, second.address) {
                        self.cpu_mut().cr2 = a;
                    }
                    e = if double { Exception::with(DF_, 0) } else { second };
                }
                // A stack in a page with translated code is allowed, if odd.
                Err(Trap::Device) if self.in_code => {
                    self.deferred = Some(first);
                    return;
                }
                Err(_) => break,
            }
        }
        let c = self.cpu();
        let m = format!(
            "triple fault: exception {} (error {:#x}) at rip {:#x} could not be delivered, nor exception {} after it; rsp {:#x} cr2 {:#x} cr3 {:#x}",
            first.vector,
            first.error.unwrap_or(0),
            c.rip,
            e.vector,
            c.gpr[4],
            c.cr2,
            c.cr3
        );
        self.shut_down(m);
    }

    /// IRET lets NMIs through again; one may have come meanwhile.
    fn unblock_nmi(&mut self) {
        if std::mem::take(&mut self.cpu_mut().nmi_blocked) != 0 {
            self.cpu().pending.store(1, Ordering::Release);
        }
    }

    /// Deliver an external interrupt or NMI at the current instruction boundary.
    pub fn interrupt_now(&mut self, vector: u8) {
        let rip = self.cpu().rip;
        if let Err(t) = self.event(vector, None, Source::Hardware, rip, 0) {
            match t {
                Trap::Fault(e) => self.deliver(e),
                _ => self.shut_down(format!(
                    "interrupt {vector} at rip {rip:#x} could not be delivered: its tables or stack are no RAM"
                )),
            }
        }
    }

    fn event(
        &mut self,
        vector: u8,
        error: Option<u32>,
        source: Source,
        rip: u64,
        rf: u64,
    ) -> Result<(), Trap> {
        let ext = u32::from(source == Source::Hardware);
        if self.real_mode() {
            return self.event_real(vector, rip);
        }
        let bad = |v: u8, n: u32| -> Trap { Exception::with(v, n).into() };
        let code = u32::from(vector) * 8 + 2;
        let long = self.cpu().long_mode();
        let width = if long { 16 } else { 8 };
        let off = u64::from(vector) * width;
        if off + width - 1 > u64::from(self.cpu().idt_limit) {
            return Err(bad(GP, code + ext));
        }
        let at = self.cpu().idt_base.wrapping_add(off);
        let low = self.load(at, 8, Who::System)?;
        let high = if long { self.load(at.wrapping_add(8), 8, Who::System)? } else { 0 };
        let gate = Descriptor(low);
        let trap = match gate.kind() {
            14 => false,
            15 => true,
            6 if !long => false,
            7 if !long => true,
            _ => return Err(bad(GP, code + ext)),
        };
        if gate.ordinary() || source == Source::Software && gate.dpl() < self.cpu().cpl {
            return Err(bad(GP, code + ext));
        }
        if !gate.present() {
            return Err(bad(NP, code + ext));
        }
        let wide32 = gate.kind() >= 14;
        let selector = (low >> 16) as u16;
        let mut target = (low & 0xffff) | (low >> 32 & 0xffff_0000) | (high << 32);
        if !long {
            target &= 0xffff_ffff;
            if !wide32 {
                target &= 0xffff;
            }
        }
        if selector & !3 == 0 {
            return Err(bad(GP, ext));
        }
        let (d, d_at) = self.descriptor(selector, GP)?;
        let cpl = self.cpu().cpl;
        if !d.code() || d.dpl() > cpl || long && (!d.long() || d.big()) {
            return Err(bad(GP, u32::from(selector & !3) + ext));
        }
        if !d.present() {
            return Err(bad(NP, u32::from(selector & !3) + ext));
        }
        let new_cpl = if d.conforming() { cpl } else { d.dpl() };
        if long && !canonical(target) {
            return Err(bad(GP, ext));
        }
        let c = self.cpu();
        let old = (c.seg[1].selector, c.seg[2].selector, c.gpr[4], c.rflags());
        let flags = old.3 | rf;
        if long {
            let ist = (low >> 32) & 7;
            let sp = if ist != 0 {
                self.tss64(0x24 + 8 * (ist - 1))?
            } else if new_cpl < cpl {
                self.tss64(4 + 8 * u64::from(new_cpl))?
            } else {
                old.2
            };
            if !canonical(sp) {
                return Err(bad(SS, ext));
            }
            let frame = sp & !15;
            let mut words = [0u64; 6];
            let mut n = 0;
            if let Some(e) = error {
                words[0] = u64::from(e);
                n = 1;
            }
            words[n..n + 5].copy_from_slice(&[rip, old.0.into(), flags, old.2, old.1.into()]);
            n += 5;
            let to = frame.wrapping_sub(8 * n as u64);
            let who = if new_cpl == 3 { Who::User } else { Who::System };
            let mut bytes = [0u8; 48];
            for (k, w) in words[..n].iter().enumerate() {
                bytes[8 * k..8 * k + 8].copy_from_slice(&w.to_le_bytes());
            }
            self.write_as(to, &bytes[..8 * n], who)?;
            self.cpu_mut().gpr[4] = to;
            if new_cpl != cpl {
                self.cpu_mut().seg[2] = Seg {
                    selector: u16::from(new_cpl),
                    access: 0x1_0000 | u32::from(new_cpl) << 5,
                    ..Seg::default()
                };
            }
        } else {
            let n = if wide32 { 4 } else { 2 };
            let mut words = vec_of(error, rip, old.0, flags);
            if new_cpl < cpl {
                let (ss, sp) = self.tss32(new_cpl)?;
                let seg = self.inner_stack(ss, new_cpl)?;
                words.push(old.2);
                words.push(u64::from(old.1));
                let sp = if seg.big() { sp } else { sp & 0xffff };
                let to =
                    sp.wrapping_sub((n * words.len()) as u64) & if seg.big() { 0xffff_ffff } else { 0xffff };
                self.store_words(seg.base.wrapping_add(to), &words, n)?;
                let c = self.cpu_mut();
                c.seg[2] = seg;
                c.seg_base[2] = seg.base;
                c.gpr[4] = to;
            } else {
                let mask = self.stack_mask();
                let to = old.2.wrapping_sub((n * words.len()) as u64) & mask;
                self.store_words(self.linear(2, to), &words, n)?;
                self.set_stack(to);
            }
        }
        self.mark_accessed(d, d_at)?;
        let mut s = d.seg(selector);
        s.access |= 1;
        s.selector = (selector & !3) | u16::from(new_cpl);
        let c = self.cpu_mut();
        c.seg[1] = s;
        c.seg_base[1] = s.base;
        c.cpl = new_cpl;
        c.rip = target;
        c.eflags &= !(TF | NT | RF | VM);
        if !trap {
            c.iflag = 0;
        }
        if vector == 2 {
            c.nmi_blocked = 1;
        }
        self.select_region();
        Ok(())
    }

    fn event_real(&mut self, vector: u8, rip: u64) -> Result<(), Trap> {
        let c = self.cpu();
        let at = c.idt_base + 4 * u64::from(vector);
        if 4 * u32::from(vector) + 3 > c.idt_limit {
            return Err(Exception::with(GP, 0).into());
        }
        let entry = self.load(at, 4, Who::System)?;
        let (flags, cs, sp) = (self.cpu().rflags(), self.cpu().seg[1].selector, self.cpu().gpr[4]);
        let words = [rip, u64::from(cs), flags];
        let to = sp.wrapping_sub(6) & 0xffff;
        self.store_words(self.linear(2, to), &words, 2)?;
        self.set_stack(to);
        let c = self.cpu_mut();
        c.seg[1].selector = (entry >> 16) as u16;
        c.seg[1].base = (entry >> 16) << 4;
        c.seg_base[1] = c.seg[1].base;
        c.rip = entry & 0xffff;
        c.iflag = 0;
        c.ac = 0;
        c.eflags &= !(TF | RF);
        self.select_region();
        Ok(())
    }

    fn store_words(&mut self, va: u64, words: &[u64], n: usize) -> Result<(), Trap> {
        let mut bytes = [0u8; 64];
        for (k, w) in words.iter().enumerate() {
            bytes[n * k..n * k + n].copy_from_slice(&w.to_le_bytes()[..n]);
        }
        self.write_as(va, &bytes[..n * words.len()], Who::System)
    }

    fn tss64(&mut self, off: u64) -> Result<u64, Trap> {
        let tr = self.cpu().tr;
        if tr.unusable() || off + 7 > u64::from(tr.limit) {
            return Err(fault(TS, tr.selector));
        }
        self.load(tr.base.wrapping_add(off), 8, Who::System)
    }

    /// SS and ESP for a privilege level from a 32- or 16-bit TSS.
    fn tss32(&mut self, cpl: u8) -> Result<(u16, u64), Trap> {
        let tr = self.cpu().tr;
        let wide = tr.access & 8 != 0;
        let off = if wide { 4 + 8 * u64::from(cpl) } else { 2 + 4 * u64::from(cpl) };
        if tr.unusable() || off + 7 > u64::from(tr.limit) {
            return Err(fault(TS, tr.selector));
        }
        let n = if wide { 4 } else { 2 };
        let sp = self.load(tr.base.wrapping_add(off), n, Who::System)?;
        let ss = self.load(tr.base.wrapping_add(off + n as u64), 2, Who::System)?;
        Ok((ss as u16, sp))
    }

    fn inner_stack(&mut self, ss: u16, cpl: u8) -> Result<Seg, Trap> {
        if ss & !3 == 0 || (ss & 3) as u8 != cpl {
            return Err(fault(TS, ss));
        }
        let (d, va) = self.descriptor(ss, TS)?;
        if !d.ordinary() || d.code() || d.kind() & 2 == 0 || d.dpl() != cpl {
            return Err(fault(TS, ss));
        }
        if !d.present() {
            return Err(fault(SS, ss));
        }
        self.mark_accessed(d, va)?;
        Ok(d.seg(ss))
    }

    /// Load CS for a far transfer at the same level, and jump.
    fn far(&mut self, selector: u16, offset: u64, pushes: Option<(usize, u64)>) -> Result<(), Trap> {
        if self.real_mode() {
            if let Some((n, ret)) = pushes {
                let cs = u64::from(self.cpu().seg[1].selector);
                self.push(n, cs)?;
                self.push(n, ret)?;
            }
            let c = self.cpu_mut();
            c.seg[1].selector = selector;
            c.seg[1].base = u64::from(selector) << 4;
            c.seg_base[1] = c.seg[1].base;
            c.rip = offset & 0xffff_ffff;
            self.select_region();
            return Ok(());
        }
        if selector & !3 == 0 {
            return Err(Exception::gp().into());
        }
        let (d, va) = self.descriptor(selector, GP)?;
        let cpl = self.cpu().cpl;
        let (mut d, mut va, mut selector, mut offset) = (d, va, selector, offset);
        if !d.ordinary() && d.kind() == 12 && d.dpl() >= cpl.max((selector & 3) as u8) {
            // A call gate to the same level.
            if !d.present() {
                return Err(fault(NP, selector));
            }
            let high = if self.cpu().long_mode() { self.load(va + 8, 8, Who::System)? } else { 0 };
            offset = (d.0 & 0xffff) | (d.0 >> 32 & 0xffff_0000) | (high << 32);
            selector = (d.0 >> 16) as u16;
            (d, va) = self.descriptor(selector, GP)?;
            if d.dpl() != cpl && !d.conforming() {
                return Err(fault(GP, selector));
            }
        }
        let rpl = (selector & 3) as u8;
        let ok = d.code() && if d.conforming() { d.dpl() <= cpl } else { rpl <= cpl && d.dpl() == cpl };
        if !ok || self.cpu().long_mode() && d.long() && d.big() {
            return Err(fault(GP, selector));
        }
        if !d.present() {
            return Err(fault(NP, selector));
        }
        let to64 = self.cpu().long_mode() && d.long();
        if to64 && !canonical(offset) {
            return Err(Exception::gp().into());
        }
        if let Some((n, ret)) = pushes {
            let sp = self.cpu().gpr[4];
            let cs = u64::from(self.cpu().seg[1].selector);
            self.push(n, cs)?;
            if let Err(e) = self.push(n, ret) {
                self.cpu_mut().gpr[4] = sp;
                return Err(e);
            }
        }
        self.mark_accessed(d, va)?;
        let mut s = d.seg(selector);
        s.access |= 1;
        s.selector = (selector & !3) | u16::from(cpl);
        let c = self.cpu_mut();
        c.seg[1] = s;
        c.seg_base[1] = s.base;
        c.rip = if to64 { offset } else { offset & 0xffff_ffff };
        self.select_region();
        Ok(())
    }

    /// Return to `selector:offset` with new flags and stack, as RETF and IRET do.
    fn outward(&mut self, selector: u16, offset: u64, sp: Option<(u16, u64)>) -> Result<(), Trap> {
        if selector & !3 == 0 {
            return Err(Exception::gp().into());
        }
        let (d, va) = self.descriptor(selector, GP)?;
        let cpl = self.cpu().cpl;
        let rpl = (selector & 3) as u8;
        let ok = d.code() && rpl >= cpl && if d.conforming() { d.dpl() <= rpl } else { d.dpl() == rpl };
        if !ok {
            return Err(fault(GP, selector));
        }
        if !d.present() {
            return Err(fault(NP, selector));
        }
        let to64 = self.cpu().long_mode() && d.long();
        if to64 && !canonical(offset) {
            return Err(Exception::gp().into());
        }
        let stack = match sp {
            Some((ss, rsp)) => {
                let seg = if ss & !3 == 0 {
                    if !(to64 && rpl != 3) {
                        return Err(Exception::gp().into());
                    }
                    Seg { selector: ss, access: 0x1_0000 | u32::from(rpl) << 5, ..Seg::default() }
                } else {
                    let (sd, sva) = self.descriptor(ss, GP)?;
                    if (ss & 3) as u8 != rpl
                        || !sd.ordinary()
                        || sd.code()
                        || sd.kind() & 2 == 0
                        || sd.dpl() != rpl
                    {
                        return Err(fault(GP, ss));
                    }
                    if !sd.present() {
                        return Err(fault(SS, ss));
                    }
                    self.mark_accessed(sd, sva)?;
                    sd.seg(ss)
                };
                Some((seg, rsp))
            }
            None => None,
        };
        self.mark_accessed(d, va)?;
        let mut s = d.seg(selector);
        s.access |= 1;
        let outer = rpl > cpl;
        let c = self.cpu_mut();
        c.seg[1] = s;
        c.seg_base[1] = s.base;
        c.cpl = rpl;
        c.rip = if to64 { offset } else { offset & 0xffff_ffff };
        if let Some((seg, rsp)) = stack {
            c.seg[2] = seg;
            c.seg_base[2] = seg.base;
            let mask = self.stack_mask();
            let g = &mut self.cpu_mut().gpr[4];
            *g = if mask == 0xffff { (*g & !0xffff) | (rsp & 0xffff) } else { rsp & mask };
        }
        if outer {
            // Data segments of the inner level do not survive.
            for n in [0, 3, 4, 5] {
                let c = self.cpu_mut();
                let seg = c.seg[n];
                let conforming = seg.access & 0x1c == 0x1c;
                if seg.unusable() {
                    // The level in a null selector goes, the base stays.
                    c.seg[n].selector = 0;
                }
                if !seg.unusable() && seg.dpl() < rpl && !conforming && seg.access & 0x10 != 0 {
                    c.seg[n] = Seg { access: 0x1_0000, ..Seg::default() };
                    c.seg_base[n] = 0;
                }
            }
        }
        self.select_region();
        Ok(())
    }
}

/// Words of a 32-bit frame from the lowest address up.
fn vec_of(error: Option<u32>, rip: u64, cs: u16, flags: u64) -> Vec<u64> {
    let mut w: Vec<u64> = Vec::with_capacity(8);
    w.extend(error.map(u64::from));
    w.extend_from_slice(&[rip, cs.into(), flags]);
    w
}

/// CALL, JMP, RET in the forms that are not translated.
pub fn transfer(v: &mut Vcpu, i: &Instruction) -> Done {
    let n = v.operand_bytes(i);
    match (i.mnemonic(), i.op0_kind()) {
        (M::Call | M::Jmp, OpKind::FarBranch16 | OpKind::FarBranch32) => {
            let off = if i.op0_kind() == OpKind::FarBranch16 {
                i.far_branch16().into()
            } else {
                u64::from(i.far_branch32())
            };
            let push = (i.mnemonic() == M::Call).then_some((n, i.next_ip()));
            v.far(i.far_branch_selector(), off, push)?;
        }
        (M::Call | M::Jmp, OpKind::Memory) if i.is_call_far_indirect() || i.is_jmp_far_indirect() => {
            let va = v.operand_address(i);
            let who = v.data_access();
            let size = Vcpu::operand_size(i).saturating_sub(2).clamp(2, 8);
            let off = v.load(va, size, who)?;
            let sel = v.load(va.wrapping_add(size as u64), 2, who)? as u16;
            let push = (i.mnemonic() == M::Call).then_some((size, i.next_ip()));
            v.far(sel, off, push)?;
        }
        (M::Call | M::Jmp, k) => {
            let near = matches!(k, OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64);
            let mut to = if near { i.near_branch_target() } else { v.operand(i, 0)? };
            let n = match i.code() {
                Code::Call_rel16 | Code::Call_rm16 | Code::Jmp_rel16 | Code::Jmp_rel8_16 | Code::Jmp_rm16 => {
                    2
                }
                Code::Call_rel32_32
                | Code::Call_rm32
                | Code::Jmp_rel32_32
                | Code::Jmp_rel8_32
                | Code::Jmp_rm32 => 4,
                _ => 8,
            };
            if n == 2 {
                to &= 0xffff;
            }
            v.reachable(to)?;
            if i.mnemonic() == M::Call {
                v.push(n, i.next_ip())?;
            }
            v.cpu_mut().rip = to;
        }
        (M::Ret, _) => {
            let n = i.code().op_code().operand_size() as usize / 8;
            let n = if n == 0 { v.operand_bytes(i) } else { n };
            let to = v.peek(0, n)?;
            v.reachable(to)?;
            v.drop_stack(n as u64 + if i.op_count() > 0 { i.immediate16().into() } else { 0 });
            v.cpu_mut().rip = to;
        }
        _ => {
            // RETF
            let sel = v.peek(n as u64, n)? as u16;
            let off = v.peek(0, n)?;
            let extra = if i.op_count() > 0 { u64::from(i.immediate16()) } else { 0 };
            if v.real_mode() {
                v.drop_stack(2 * n as u64 + extra);
                v.far(sel, off, None)?;
                return Ok(Flow::Jump);
            }
            let rpl = (sel & 3) as u8;
            if rpl != v.cpu().cpl {
                let ss = v.peek(3 * n as u64 + extra, n)? as u16;
                let sp = v.peek(2 * n as u64 + extra, n)?;
                v.outward(sel, off, Some((ss, sp.wrapping_add(extra))))?;
            } else {
                let sp = v.cpu().gpr[4];
                v.outward(sel, off, None)?;
                v.cpu_mut().gpr[4] = sp;
                v.drop_stack(2 * n as u64 + extra);
            }
        }
    }
    Ok(Flow::Jump)
}

impl Vcpu {
    /// A near branch may go to `to`.
    fn reachable(&self, to: u64) -> Result<(), Trap> {
        if self.cpu().code64() && !canonical(to) {
            return Err(Exception::gp().into());
        }
        Ok(())
    }
}

/// LOOP and JCXZ with counters that translated code does not handle.
pub fn counted(v: &mut Vcpu, i: &Instruction) -> Done {
    let wide = match i.code() {
        Code::Jcxz_rel8_16
        | Code::Jcxz_rel8_32
        | Code::Loop_rel8_16_CX
        | Code::Loop_rel8_32_CX
        | Code::Loope_rel8_16_CX
        | Code::Loope_rel8_32_CX
        | Code::Loopne_rel8_16_CX
        | Code::Loopne_rel8_32_CX => Register::CX,
        Code::Jrcxz_rel8_16
        | Code::Jrcxz_rel8_64
        | Code::Loop_rel8_16_RCX
        | Code::Loope_rel8_16_RCX
        | Code::Loopne_rel8_16_RCX
        | Code::Loop_rel8_64_RCX
        | Code::Loope_rel8_64_RCX
        | Code::Loopne_rel8_64_RCX => Register::RCX,
        _ => Register::ECX,
    };
    let zf = v.cpu().arith() & ZF != 0;
    let taken = match i.mnemonic() {
        M::Jcxz | M::Jecxz | M::Jrcxz => v.reg(wide) == 0,
        m => {
            let c = v.reg(wide).wrapping_sub(1);
            v.set_reg(wide, c);
            v.reg(wide) != 0
                && match m {
                    M::Loope => zf,
                    M::Loopne => !zf,
                    _ => true,
                }
        }
    };
    let rip = if taken { i.near_branch_target() } else { i.next_ip() };
    v.cpu_mut().rip = rip;
    Ok(Flow::Jump)
}

pub fn iret(v: &mut Vcpu, i: &Instruction) -> Done {
    let n = match i.mnemonic() {
        M::Iretq => 8,
        M::Iretd => 4,
        _ => 2,
    };
    if v.cpu().eflags & NT != 0 && !v.real_mode() {
        // A task return; in long mode NT makes IRET fault.
        return Err(Exception::gp().into());
    }
    let flags = v.peek(2 * n as u64, n)?;
    let cs = v.peek(n as u64, n)? as u16;
    let rip = v.peek(0, n)?;
    if v.real_mode() {
        v.drop_stack(3 * n as u64);
        v.far(cs, rip, None)?;
        v.write_flags(flags, n, true);
        v.unblock_nmi();
        return Ok(Flow::Jump);
    }
    if flags & VM != 0 && v.cpu().cpl == 0 && !v.cpu().long_mode() {
        return Err(Exception::gp().into());
    }
    let rpl = (cs & 3) as u8;
    let cpl = v.cpu().cpl;
    let sp0 = v.cpu().gpr[4];
    let long = v.cpu().code64();
    let stack = if long || rpl > cpl {
        let ss = v.peek(4 * n as u64, n)? as u16;
        let sp = v.peek(3 * n as u64, n)?;
        Some((ss, sp))
    } else {
        None
    };
    // Flags are written with the rights of the old level.
    v.outward(cs, rip, stack)?;
    let new_cpl = v.cpu().cpl;
    v.cpu_mut().cpl = cpl;
    v.write_flags(flags, n, true);
    v.cpu_mut().cpl = new_cpl;
    if stack.is_none() {
        v.cpu_mut().gpr[4] = sp0;
        v.drop_stack(3 * n as u64);
    }
    v.unblock_nmi();
    Ok(Flow::Jump)
}

pub fn int(v: &mut Vcpu, i: &Instruction) -> Done {
    let (vector, source) = match i.mnemonic() {
        M::Int3 => (BP, Source::Software),
        M::Int1 => (DB, Source::Hardware),
        M::Into => {
            if v.cpu().arith() & OF == 0 {
                return Ok(Flow::Next);
            }
            (OF_, Source::Software)
        }
        _ => (i.immediate8(), Source::Software),
    };
    v.event(vector, None, source, i.next_ip(), 0)?;
    Ok(Flow::Jump)
}

pub fn bound(v: &mut Vcpu, i: &Instruction) -> Done {
    let n = i.op0_register().size();
    let va = v.operand_address(i);
    let who = v.data_access();
    let sext = |x: u64| if n == 2 { i64::from(x as i16) } else { i64::from(x as i32) };
    let (low, high) = (v.load(va, n, who)?, v.load(va.wrapping_add(n as u64), n, who)?);
    let x = sext(v.reg(i.op0_register()));
    if x < sext(low) || x > sext(high) {
        return Err(Exception::new(BR).into());
    }
    Ok(Flow::Next)
}

pub fn syscall(v: &mut Vcpu, i: &Instruction) -> Done {
    let c = v.cpu_mut();
    if c.efer & 1 == 0 {
        return Err(ud());
    }
    let flags = c.rflags();
    let next = i.next_ip();
    let long = c.long_mode();
    if long {
        c.gpr[1] = next;
        c.gpr[11] = flags & !RF;
        c.rip = if c.code64() { c.lstar } else { c.cstar };
        c.set_rflags(flags & !c.sfmask & !RF);
    } else {
        c.gpr[1] = next & 0xffff_ffff;
        c.rip = c.star & 0xffff_ffff;
        c.set_rflags(flags & !(VM | IF | RF));
    }
    let cs = (c.star >> 32) as u16 & !3;
    c.seg[1] = flat(cs, if long { 0xa09b } else { 0xc09b });
    c.seg[2] = flat(cs + 8, 0xc093);
    c.seg_base[1] = 0;
    c.seg_base[2] = 0;
    c.cpl = 0;
    v.access_check_from(flags);
    v.select_region();
    Ok(Flow::Jump)
}

pub fn sysret(v: &mut Vcpu, i: &Instruction) -> Done {
    let c = v.cpu();
    if c.efer & 1 == 0 || c.cr0 & 1 == 0 {
        return Err(ud());
    }
    v.supervisor()?;
    let c = v.cpu_mut();
    let old = c.rflags();
    let base = (c.star >> 48) as u16;
    let wide = i.mnemonic() == M::Sysretq;
    if wide {
        // AMD's processors fault in user mode, at the target.
        if !canonical(c.gpr[1]) && !crate::host::amd() {
            return Err(Exception::gp().into());
        }
        c.rip = c.gpr[1];
        c.seg[1] = flat((base + 16) | 3, 0xa0fb);
    } else {
        c.rip = c.gpr[1] & 0xffff_ffff;
        c.seg[1] = flat(base | 3, 0xc0fb);
    }
    c.seg[2] = flat((base + 8) | 3, 0xc0f3);
    c.seg_base[1] = 0;
    c.seg_base[2] = 0;
    c.cpl = 3;
    if c.long_mode() {
        let f = c.gpr[11] & 0x3c_7fd7 | 2;
        c.set_rflags(f & !RF & !VM);
    } else {
        c.iflag = 1;
    }
    v.access_check_from(old);
    v.select_region();
    Ok(Flow::Jump)
}

pub fn sysenter(v: &mut Vcpu, _: &Instruction) -> Done {
    let c = v.cpu_mut();
    // AMD's processors have it outside long mode only.
    if crate::host::amd() && c.long_mode() {
        return Err(Exception::ud().into());
    }
    if c.cr0 & 1 == 0 || c.sysenter[0] & 0xfffc == 0 {
        return Err(Exception::gp().into());
    }
    let long = c.long_mode();
    let cs = c.sysenter[0] as u16 & !3;
    c.eflags &= !(VM | RF);
    c.iflag = 0;
    c.gpr[4] = if long { c.sysenter[1] } else { c.sysenter[1] & 0xffff_ffff };
    c.rip = if long { c.sysenter[2] } else { c.sysenter[2] & 0xffff_ffff };
    c.seg[1] = flat(cs, if long { 0xa09b } else { 0xc09b });
    c.seg[2] = flat(cs + 8, 0xc093);
    c.seg_base[1] = 0;
    c.seg_base[2] = 0;
    c.cpl = 0;
    v.select_region();
    Ok(Flow::Jump)
}

pub fn sysexit(v: &mut Vcpu, i: &Instruction) -> Done {
    if crate::host::amd() && v.cpu().long_mode() {
        v.supervisor()?;
        return Err(Exception::ud().into());
    }
    let c = v.cpu();
    if c.cr0 & 1 == 0 || c.sysenter[0] & 0xfffc == 0 {
        return Err(Exception::gp().into());
    }
    v.supervisor()?;
    let c = v.cpu_mut();
    let cs = c.sysenter[0] as u16;
    let wide = i.mnemonic() == M::Sysexitq;
    if wide {
        if !canonical(c.gpr[1]) || !canonical(c.gpr[2]) {
            return Err(Exception::gp().into());
        }
        c.gpr[4] = c.gpr[1];
        c.rip = c.gpr[2];
        c.seg[1] = flat((cs + 32) | 3, 0xa0fb);
        c.seg[2] = flat((cs + 40) | 3, 0xc0f3);
    } else {
        c.gpr[4] = c.gpr[1] & 0xffff_ffff;
        c.rip = c.gpr[2] & 0xffff_ffff;
        c.seg[1] = flat((cs + 16) | 3, 0xc0fb);
        c.seg[2] = flat((cs + 24) | 3, 0xc0f3);
    }
    c.seg_base[1] = 0;
    c.seg_base[2] = 0;
    c.cpl = 3;
    v.select_region();
    Ok(Flow::Jump)
}
