//! Far transfers: CALL and JMP to code, gates and tasks, RETF, IRET.
//! SDM volume 3, 5.8, and 20.2 for virtual-8086 mode.
use super::event::NewStack;
use super::segment::{fault, Descriptor};
use super::task::How;
use super::{Done, Flow};
use crate::cpu::*;
use crate::mmu::{canonical, Exception, Trap, Who, GP, NP, SS};
use crate::vcpu::Vcpu;
use iced_x86::{Instruction, Mnemonic as M, OpKind};
use std::sync::atomic::Ordering;

/// A far CALL pushes words of `size` bytes, the last of them `ret`.
#[derive(Clone, Copy)]
struct Return {
    size: usize,
    ret: u64,
}

/// Where a call gate leads.
#[derive(Clone, Copy)]
struct Gate {
    selector: u16,
    offset: u64,
    /// Bytes of what it pushes.
    size: usize,
    /// Words to copy between stacks.
    parameters: u64,
}

fn gp() -> Trap {
    Exception::gp().into()
}

impl Vcpu {
    /// CALL or JMP to `selector:offset`; `next` follows it.
    fn far(&mut self, selector: u16, offset: u64, call: Option<Return>, next: u64) -> Result<(), Trap> {
        if self.real_mode() {
            if offset > self.code_limit() {
                return Err(gp());
            }
            self.push_return(call)?;
            self.put_real(1, selector);
            self.cpu_mut().rip = offset;
            self.select_region();
            return Ok(());
        }
        if selector & !3 == 0 {
            return Err(gp());
        }
        let (d, va) = self.descriptor(selector, GP)?;
        let cpl = self.cpu().cpl;
        let rpl = (selector & 3) as u8;
        if d.ordinary() {
            let ok = d.code() && if d.conforming() { d.dpl() <= cpl } else { rpl <= cpl && d.dpl() == cpl };
            if !ok {
                return Err(fault(GP, selector));
            }
            self.check_code(d, selector, offset)?;
            self.push_return(call)?;
            return self.enter_code(d, va, selector, cpl, offset);
        }
        let long = self.cpu().long_mode();
        if d.dpl() < cpl.max(rpl) {
            return Err(fault(GP, selector));
        }
        let how = if call.is_some() { How::Nested } else { How::Jump };
        match d.kind() {
            1 | 9 if !long => {
                let f = self.cpu().rflags();
                self.switch_task(selector, how, next, f)?;
                self.after_task_switch()
            }
            5 if !long => {
                if !d.present() {
                    return Err(fault(NP, selector));
                }
                let f = self.cpu().rflags();
                self.switch_task((d.0 >> 16) as u16, how, next, f)?;
                self.after_task_switch()
            }
            12 => self.call_gate(d, va, selector, call.is_some(), next),
            4 if !long => self.call_gate(d, va, selector, call.is_some(), next),
            _ => Err(fault(GP, selector)),
        }
    }

    /// Push CS and the return address; the stack pointer stays where that faults.
    fn push_return(&mut self, call: Option<Return>) -> Result<(), Trap> {
        let Some(Return { size, ret }) = call else { return Ok(()) };
        let sp = self.cpu().gpr[4];
        let cs = u64::from(self.cpu().seg[1].selector);
        self.push(size, cs)?;
        self.push(size, ret).inspect_err(|_| self.cpu_mut().gpr[4] = sp)
    }

    /// `offset` may be executed in the code segment `d`, which is present.
    fn check_code(&self, d: Descriptor, selector: u16, offset: u64) -> Result<(), Trap> {
        let long = self.cpu().long_mode() && d.long();
        if long && d.big() {
            return Err(fault(GP, selector));
        }
        if !d.present() {
            return Err(fault(NP, selector));
        }
        let inside = if long { canonical(offset) } else { offset <= u64::from(d.seg(selector).limit) };
        if inside {
            Ok(())
        } else {
            Err(gp())
        }
    }

    fn enter_code(&mut self, d: Descriptor, va: u64, selector: u16, cpl: u8, rip: u64) -> Result<(), Trap> {
        self.mark_accessed(d, va)?;
        let mut s = d.seg(selector);
        s.access |= 1;
        s.selector = (selector & !3) | u16::from(cpl);
        self.put_segment(1, s);
        self.cpu_mut().cpl = cpl;
        self.cpu_mut().rip = rip;
        self.select_region();
        Ok(())
    }

    /// Through the call gate `d` that `selector` names.
    fn call_gate(
        &mut self,
        d: Descriptor,
        va: u64,
        selector: u16,
        call: bool,
        next: u64,
    ) -> Result<(), Trap> {
        if !d.present() {
            return Err(fault(NP, selector));
        }
        let (long, cpl) = (self.cpu().long_mode(), self.cpu().cpl);
        let mut offset = (d.0 & 0xffff) | (d.0 >> 32 & 0xffff_0000);
        let mut size = 4;
        if long {
            let high = self.load(va + 8, 8, Who::System)?;
            if high >> 40 & 0x1f != 0 {
                return Err(fault(GP, selector));
            }
            offset |= high << 32;
            size = 8;
        } else if d.kind() == 4 {
            offset &= 0xffff;
            size = 2;
        }
        let g = Gate { selector: (d.0 >> 16) as u16, offset, size, parameters: d.0 >> 32 & 31 };
        if g.selector & !3 == 0 {
            return Err(gp());
        }
        let (code, code_at) = self.descriptor(g.selector, GP)?;
        if !code.code()
            || code.dpl() > cpl
            || long && (!code.long() || code.big())
            || !call && !code.conforming() && code.dpl() != cpl
        {
            return Err(fault(GP, g.selector));
        }
        if !code.present() {
            return Err(fault(NP, g.selector));
        }
        if call && !code.conforming() && code.dpl() < cpl {
            let stack = self.inner_call(g, code.dpl(), next)?;
            self.check_code(code, g.selector, g.offset)?;
            match stack {
                Some(stack) => stack.commit(self),
                None => {
                    let sp = self.tss64(4 + 8 * u64::from(code.dpl()))?.wrapping_sub(32);
                    let access = 0x1_0000 | u32::from(code.dpl()) << 5;
                    self.put_segment(2, Seg { selector: code.dpl().into(), access, ..Seg::default() });
                    self.cpu_mut().gpr[4] = sp;
                }
            }
            return self.enter_code(code, code_at, g.selector, code.dpl(), g.offset);
        }
        self.check_code(code, g.selector, g.offset)?;
        self.push_return(call.then_some(Return { size, ret: next }))?;
        self.enter_code(code, code_at, g.selector, cpl, g.offset)
    }

    /// Fill the stack of level `dpl` for a call from the current, outer level: the old
    /// stack pointer, parameters, the return address. None in long mode, where it
    /// is the frame of 32 bytes below the stack pointer of the TSS.
    fn inner_call(&mut self, g: Gate, dpl: u8, next: u64) -> Result<Option<NewStack>, Trap> {
        let c = self.cpu();
        let (cs, ss, sp) = (c.seg[1].selector, c.seg[2].selector, c.gpr[4]);
        if c.long_mode() {
            let to = self.tss64(4 + 8 * u64::from(dpl))?;
            if !canonical(to) {
                return Err(Exception::with(SS, 0).into());
            }
            let mut bytes = [0; 32];
            for (k, w) in [next, cs.into(), sp, ss.into()].iter().enumerate() {
                bytes[8 * k..8 * k + 8].copy_from_slice(&w.to_le_bytes());
            }
            self.write_as(to.wrapping_sub(32), &bytes, Who::System)?;
            return Ok(None);
        }
        let (new_ss, new_sp) = self.tss32(dpl)?;
        let seg = self.inner_stack(new_ss, dpl)?;
        let error = u32::from(new_ss & !3);
        let mut stack = NewStack { seg, sp: new_sp, size: g.size, error, who: Who::System };
        stack.push(self, ss.into())?;
        stack.push(self, sp)?;
        for n in (0..g.parameters).rev() {
            let word = self.peek(n * g.size as u64, g.size)?;
            stack.push(self, word)?;
        }
        stack.push(self, cs.into())?;
        stack.push(self, next)?;
        Ok(Some(stack))
    }

    /// Return to `selector:offset` with a new stack, as RETF and IRET do.
    fn outward(&mut self, selector: u16, offset: u64, sp: Option<(u16, u64)>) -> Result<(), Trap> {
        if selector & !3 == 0 {
            return Err(gp());
        }
        let (d, va) = self.descriptor(selector, GP)?;
        let cpl = self.cpu().cpl;
        let rpl = (selector & 3) as u8;
        let ok = d.code() && rpl >= cpl && if d.conforming() { d.dpl() <= rpl } else { d.dpl() == rpl };
        if !ok {
            return Err(fault(GP, selector));
        }
        let to64 = self.cpu().long_mode() && d.long();
        self.check_code(d, selector, offset)?;
        let stack = match sp {
            Some((ss, rsp)) => {
                let seg = if ss & !3 == 0 {
                    if !(to64 && rpl != 3) {
                        return Err(gp());
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
        self.enter_code(d, va, selector, rpl, offset)?;
        if let Some((seg, rsp)) = stack {
            self.put_segment(2, seg);
            let mask = self.stack_mask();
            let g = &mut self.cpu_mut().gpr[4];
            *g = if mask == 0xffff { (*g & !0xffff) | (rsp & 0xffff) } else { rsp & mask };
        }
        if rpl > cpl {
            // Data segments of the inner level do not survive.
            for n in [0, 3, 4, 5] {
                let seg = self.cpu().seg[n];
                let conforming = seg.access & 0x1c == 0x1c;
                if seg.unusable() {
                    // The level in a null selector goes, the base stays.
                    self.cpu_mut().seg[n].selector = 0;
                }
                if !seg.unusable() && seg.dpl() < rpl && !conforming && seg.access & 0x10 != 0 {
                    // The base stays: 64-bit code still uses that of FS and GS.
                    let base = self.cpu().seg_base[n];
                    self.put_segment(n, Seg { access: 0x1_0000, base, ..Seg::default() });
                }
            }
        }
        self.select_region();
        Ok(())
    }

    /// Pop IP and CS of `n` bytes each in real-address or virtual-8086 mode.
    fn return_8086(&mut self, n: usize, drop: u64) -> Result<(), Trap> {
        let cs = self.peek(n as u64, n)? as u16;
        let rip = self.peek(0, n)?;
        if rip > self.code_limit() {
            return Err(gp());
        }
        self.drop_stack(drop);
        self.put_real(1, cs);
        self.cpu_mut().rip = rip;
        self.select_region();
        Ok(())
    }

    /// IRET ends the handler of an NMI: another one may wait.
    fn unblock_nmi(&mut self) {
        let c = self.cpu_mut();
        if std::mem::take(&mut c.nmi_blocked) != 0 {
            c.pending.store(1, Ordering::Release);
        }
    }

    /// IRET in virtual-8086 mode.
    fn iret_8086(&mut self, n: usize) -> Result<(), Trap> {
        let flags = self.peek(2 * n as u64, n)?;
        if self.cpu().iopl() == 3 {
            self.return_8086(n, 3 * n as u64)?;
            self.write_flags(flags, n, true);
        } else {
            self.check_virtual_flags(flags, n)?;
            self.return_8086(n, 3 * n as u64)?;
            self.write_virtual_flags(flags);
        }
        Ok(())
    }

    /// IRET from level 0 to virtual-8086 mode.
    fn iret_to_8086(&mut self, rip: u64, cs: u16, flags: u64) -> Result<(), Trap> {
        let mut words = [0; 6];
        for (k, w) in words.iter_mut().enumerate() {
            *w = self.peek(12 + 4 * k as u64, 4)?;
        }
        let [esp, ss, es, ds, fs, gs] = words;
        self.write_flags(flags, 4, true);
        let c = self.cpu_mut();
        c.eflags = (c.eflags & !(VIF | VIP)) | VM | (flags & (VIF | VIP));
        c.cpl = 3;
        for (n, s) in [es, u64::from(cs), ss, ds, fs, gs].into_iter().enumerate() {
            self.put_real(n, s as u16);
        }
        let c = self.cpu_mut();
        c.gpr[4] = esp;
        c.rip = rip & 0xffff;
        self.select_region();
        Ok(())
    }
}

/// CALL, JMP, RETF between segments.
pub fn transfer(v: &mut Vcpu, i: &Instruction) -> Done {
    let n = v.operand_bytes(i);
    let call = i.mnemonic() == M::Call;
    match (i.mnemonic(), i.op0_kind()) {
        (M::Call | M::Jmp, OpKind::FarBranch16 | OpKind::FarBranch32) => {
            let off = if i.op0_kind() == OpKind::FarBranch16 {
                i.far_branch16().into()
            } else {
                u64::from(i.far_branch32())
            };
            let push = call.then_some(Return { size: n, ret: i.next_ip() });
            v.far(i.far_branch_selector(), off, push, i.next_ip())?;
        }
        (M::Call | M::Jmp, _) => {
            let size = Vcpu::operand_size(i).saturating_sub(2).clamp(2, 8);
            let va = v.operand_at(i, 0, size + 2, crate::mmu::Kind::Read)?;
            let who = v.data_access();
            let off = v.load(va, size, who)?;
            let sel = v.load(va.wrapping_add(size as u64), 2, who)? as u16;
            let push = call.then_some(Return { size, ret: i.next_ip() });
            v.far(sel, off, push, i.next_ip())?;
        }
        _ => {
            // RETF
            let extra = if i.op_count() > 0 { u64::from(i.immediate16()) } else { 0 };
            if v.real_mode() {
                v.return_8086(n, 2 * n as u64 + extra)?;
                return Ok(Flow::Jump);
            }
            let sel = v.peek(n as u64, n)? as u16;
            let off = v.peek(0, n)?;
            let rpl = (sel & 3) as u8;
            if rpl != v.cpu().cpl {
                let ss = v.peek(3 * n as u64 + extra, n)? as u16;
                let sp = v.peek(2 * n as u64 + extra, n)?;
                v.outward(sel, off, Some((ss, sp.wrapping_add(extra))))?;
            } else {
                let (sp, mask) = (v.cpu().gpr[4], v.stack_mask());
                v.outward(sel, off, None)?;
                v.move_stack_by(sp, mask, 2 * n as u64 + extra);
            }
        }
    }
    Ok(Flow::Jump)
}

pub fn iret(v: &mut Vcpu, i: &Instruction) -> Done {
    let n = match i.mnemonic() {
        M::Iretq => 8,
        M::Iretd => 4,
        _ => 2,
    };
    if v.cpu().eflags & VM != 0 {
        v.iret_8086(n)?;
        v.unblock_nmi();
        return Ok(Flow::Jump);
    }
    if v.real_mode() {
        let flags = v.peek(2 * n as u64, n)?;
        v.return_8086(n, 3 * n as u64)?;
        v.write_flags(flags, n, true);
        v.unblock_nmi();
        return Ok(Flow::Jump);
    }
    if v.cpu().eflags & NT != 0 {
        if v.cpu().long_mode() {
            return Err(gp());
        }
        let tr = v.cpu().tr;
        let back = v.load(tr.base, 2, Who::System)? as u16;
        let f = v.cpu().rflags();
        v.switch_task(back, How::Return, i.next_ip(), f)?;
        v.unblock_nmi();
        v.after_task_switch()?;
        return Ok(Flow::Jump);
    }
    let flags = v.peek(2 * n as u64, n)?;
    let cs = v.peek(n as u64, n)? as u16;
    let rip = v.peek(0, n)?;
    let cpl = v.cpu().cpl;
    if n == 4 && flags & VM != 0 && cpl == 0 && !v.cpu().long_mode() {
        v.iret_to_8086(rip, cs, flags)?;
        v.unblock_nmi();
        return Ok(Flow::Jump);
    }
    let (sp0, mask) = (v.cpu().gpr[4], v.stack_mask());
    // Another level's stack is read before CS is looked at, even where an inner level
    // is refused then.
    let stack = if v.cpu().code64() || (cs & 3) as u8 != cpl {
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
    if flags & AC != 0 {
        v.select_region();
    }
    if stack.is_none() {
        v.move_stack_by(sp0, mask, 3 * n as u64);
    }
    v.unblock_nmi();
    Ok(Flow::Jump)
}
