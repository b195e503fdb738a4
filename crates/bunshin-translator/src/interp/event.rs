//! Interrupts and exceptions through the IDT or the real-mode vector table.
//! SDM volume 3, chapter 6, and 20.3 for virtual-8086 mode.
use super::segment::{fault, Descriptor};
use crate::cpu::*;
use crate::mmu::{canonical, Exception, Trap, Who, DB, DE, DF_, GP, NP, PF_, SS, TS};
use crate::vcpu::Vcpu;

/// x87 floating-point error.
const MF: u8 = 16;
const CR0_NE: u64 = 1 << 5;
const FERR_IRQ: u32 = 13;

/// Where an event comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Source {
    /// Hardware interrupt or exception.
    Hardware,
    /// INT n, INT3, INTO: the gate's DPL counts.
    Software,
}

/// A stack that is being filled before anything is committed.
pub struct NewStack {
    pub seg: Seg,
    pub sp: u64,
    /// Bytes of one push.
    pub size: usize,
    /// Error code of the #SS that its end raises.
    pub error: u32,
    pub who: Who,
}

impl NewStack {
    fn mask(&self) -> u64 {
        if self.seg.big() {
            0xffff_ffff
        } else {
            0xffff
        }
    }

    /// Push one word; the processor's stack pointer stays as it is.
    pub fn push(&mut self, v: &mut Vcpu, value: u64) -> Result<(), Trap> {
        let to = self.sp.wrapping_sub(self.size as u64) & self.mask();
        let (low, high) = self.seg.range();
        if to < low || to + self.size as u64 - 1 > high {
            return Err(Exception::with(SS, self.error).into());
        }
        let va = self.seg.base.wrapping_add(to) & 0xffff_ffff;
        v.write_as(va, &value.to_le_bytes()[..self.size], self.who)?;
        self.sp = (self.sp & !self.mask()) | to;
        Ok(())
    }

    /// Make it the processor's.
    pub fn commit(self, v: &mut Vcpu) {
        v.put_segment(2, self.seg);
        v.cpu_mut().gpr[4] = self.sp;
    }
}

impl Vcpu {
    /// Deliver an exception, a double fault if that fails, shutdown if that fails too.
    pub fn deliver(&mut self, e: Exception) {
        if e.vector == MF && self.cpu().cr0 & CR0_NE == 0 {
            return self.report_x87();
        }
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

    /// An x87 error the way of the PC/AT: FERR# raises IRQ 13, and the instruction that
    /// met it waits for an interrupt. Such errors come from outside translated code.
    fn report_x87(&mut self) {
        // The PIC looks for an edge; the port that would lower the line is a board's.
        self.chips.set_irq(FERR_IRQ, false);
        self.chips.set_irq(FERR_IRQ, true);
        self.cpu_mut().halted = 1;
    }

    /// Deliver an external interrupt or NMI at the current instruction boundary.
    pub fn interrupt_now(&mut self, vector: u8) {
        self.debugger.stepped = true;
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

    /// Go to the handler of `vector`. `rip` is where it returns to, `rf` is RF or 0,
    /// for the flags that it finds.
    pub fn event(
        &mut self,
        vector: u8,
        error: Option<u32>,
        source: Source,
        rip: u64,
        rf: u64,
    ) -> Result<(), Trap> {
        // A stack may be a device, if oddly; what it is given waits for the owner.
        let may_exit = std::mem::replace(&mut self.may_exit, !self.in_code);
        let done = self.enter_handler(vector, error, source, rip, rf);
        self.may_exit = may_exit;
        done
    }

    fn enter_handler(
        &mut self,
        vector: u8,
        error: Option<u32>,
        source: Source,
        rip: u64,
        rf: u64,
    ) -> Result<(), Trap> {
        let ext = u32::from(source == Source::Hardware);
        // HLT may have been what an exception follows.
        self.cpu_mut().halted = 0;
        if vector == DB {
            // General detect would catch the handler itself.
            self.cpu_mut().dr[7] &= !super::debug::GD;
            self.msrs.debugctl &= !3;
        }
        if self.cpu().cr0 & 1 == 0 {
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
        let (trap, task) = match gate.kind() {
            14 => (false, false),
            15 => (true, false),
            6 if !long => (false, false),
            7 if !long => (true, false),
            5 if !long => (false, true),
            _ => return Err(bad(GP, code + ext)),
        };
        if gate.ordinary() || source == Source::Software && gate.dpl() < self.cpu().cpl {
            return Err(bad(GP, code + ext));
        }
        if !gate.present() {
            return Err(bad(NP, code + ext));
        }
        let selector = (low >> 16) as u16;
        if task {
            return self.event_task(selector, error, rip, rf, ext);
        }
        let wide32 = gate.kind() >= 14;
        let mut target = (low & 0xffff) | (low >> 32 & 0xffff_0000) | (high << 32);
        if !long {
            target &= if wide32 { 0xffff_ffff } else { 0xffff };
        }
        if selector & !3 == 0 {
            return Err(bad(GP, ext));
        }
        let (d, d_at) = self.descriptor(selector, GP).map_err(|t| t.external(ext))?;
        let cpl = self.cpu().cpl;
        let from86 = self.cpu().eflags & VM != 0;
        let new_cpl = if d.conforming() { cpl } else { d.dpl() };
        if !d.code() || d.dpl() > cpl || long && (!d.long() || d.big()) || from86 && new_cpl != 0 {
            return Err(bad(GP, u32::from(selector & !3) + ext));
        }
        if !d.present() {
            return Err(bad(NP, u32::from(selector & !3) + ext));
        }
        let mut s = d.seg(selector);
        if long && !canonical(target) || !long && target > u64::from(s.limit) {
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
                let access = 0x1_0000 | u32::from(new_cpl) << 5;
                self.put_segment(2, Seg { selector: new_cpl.into(), access, ..Seg::default() });
            }
        } else {
            let inner = new_cpl < cpl;
            let size = if wide32 { 4 } else { 2 };
            let mut stack = if inner {
                let (ss, sp) = self.tss32(new_cpl).map_err(|t| t.external(ext))?;
                let seg = self.inner_stack(ss, new_cpl).map_err(|t| t.external(ext))?;
                NewStack { seg, sp, size, error: u32::from(ss & !3) + ext, who: Who::System }
            } else {
                let who = if new_cpl == 3 { Who::User } else { Who::System };
                NewStack { seg: self.cpu().seg[2], sp: old.2, size, error: ext, who }
            };
            if from86 {
                for n in [5, 4, 3, 0] {
                    let selector = self.cpu().seg[n].selector;
                    stack.push(self, selector.into())?;
                }
            }
            if inner {
                stack.push(self, old.1.into())?;
                stack.push(self, old.2)?;
            }
            for word in [flags, old.0.into(), rip] {
                stack.push(self, word)?;
            }
            if let Some(e) = error {
                stack.push(self, e.into())?;
            }
            if from86 {
                self.cpu_mut().eflags &= !VM;
                for n in [0, 3, 4, 5] {
                    self.put_segment(n, Seg { access: 0x1_0000, ..Seg::default() });
                }
            }
            stack.commit(self);
        }
        self.mark_accessed(d, d_at)?;
        s.access |= 1;
        s.selector = (selector & !3) | u16::from(new_cpl);
        self.put_segment(1, s);
        let c = self.cpu_mut();
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

    /// The vector leads through a task gate; what is pushed goes to the new task's stack.
    fn event_task(
        &mut self,
        selector: u16,
        error: Option<u32>,
        rip: u64,
        rf: u64,
        ext: u32,
    ) -> Result<(), Trap> {
        let f = self.cpu().rflags() | rf;
        let wide =
            self.switch_task(selector, super::task::How::Nested, rip, f).map_err(|t| t.external(ext))?;
        if let Some(e) = error {
            self.push(if wide { 4 } else { 2 }, e.into())?;
        }
        self.after_task_switch()
    }

    fn event_real(&mut self, vector: u8, rip: u64) -> Result<(), Trap> {
        let c = self.cpu();
        let at = c.idt_base + 4 * u64::from(vector);
        if 4 * u32::from(vector) + 3 > c.idt_limit {
            return Err(Exception::with(GP, 0).into());
        }
        let entry = self.load(at, 4, Who::System)?;
        let flags = self.cpu().rflags();
        self.enter_8086(entry, flags, rip)?;
        let c = self.cpu_mut();
        c.iflag = 0;
        c.ac = 0;
        c.eflags &= !(TF | RF);
        self.select_region();
        Ok(())
    }

    /// Push FLAGS, CS and IP, and go to the far pointer `entry`.
    fn enter_8086(&mut self, entry: u64, flags: u64, rip: u64) -> Result<(), Trap> {
        let who = self.data_access();
        let c = self.cpu();
        let mut stack = NewStack { seg: c.seg[2], sp: c.gpr[4], size: 2, error: 0, who };
        if entry & 0xffff > self.code_limit() {
            return Err(Exception::gp().into());
        }
        for word in [flags, self.cpu().seg[1].selector.into(), rip] {
            stack.push(self, word)?;
        }
        self.cpu_mut().gpr[4] = stack.sp;
        self.put_real(1, (entry >> 16) as u16);
        self.cpu_mut().rip = entry & 0xffff;
        Ok(())
    }

    /// INT n in virtual-8086 mode. True if it is done; else it goes through the IDT.
    pub fn int_8086(&mut self, vector: u8, rip: u64) -> Result<bool, Trap> {
        let trusted = self.cpu().iopl() == 3;
        let redirected = self.cpu().cr4 & 1 != 0 && self.redirects(vector)?;
        if !redirected {
            return if trusted { Ok(false) } else { Err(Exception::gp().into()) };
        }
        let entry = self.load(4 * u64::from(vector), 4, Who::User)?;
        let mut flags = self.cpu().rflags();
        if !trusted {
            let virtual_if = if flags & VIF != 0 { IF } else { 0 };
            flags = (flags & !IF) | virtual_if | IOPL;
        }
        self.enter_8086(entry, flags, rip)?;
        let c = self.cpu_mut();
        if trusted {
            c.iflag = 0;
        } else {
            c.eflags &= !VIF;
        }
        c.eflags &= !TF;
        self.select_region();
        Ok(true)
    }

    /// The TSS's bitmap leaves `vector` to the 8086 program.
    fn redirects(&mut self, vector: u8) -> Result<bool, Trap> {
        let tr = self.cpu().tr;
        if tr.unusable() || tr.access & 8 == 0 || tr.limit < 0x67 {
            return Err(Exception::gp().into());
        }
        let map = self.load(tr.base + 0x66, 2, Who::System)?;
        let at = map.wrapping_sub(32) + u64::from(vector >> 3);
        if map < 32 || at > u64::from(tr.limit) {
            return Err(Exception::gp().into());
        }
        Ok(self.load(tr.base + at, 1, Who::System)? >> (vector & 7) & 1 == 0)
    }

    /// A stack pointer from the 64-bit TSS.
    pub fn tss64(&mut self, off: u64) -> Result<u64, Trap> {
        let tr = self.cpu().tr;
        if tr.unusable() || off + 7 > u64::from(tr.limit) {
            return Err(fault(TS, tr.selector));
        }
        self.load(tr.base.wrapping_add(off), 8, Who::System)
    }

    /// SS and ESP for a privilege level from a 32- or 16-bit TSS.
    pub fn tss32(&mut self, cpl: u8) -> Result<(u16, u64), Trap> {
        let tr = self.cpu().tr;
        let wide = tr.access & 8 != 0;
        let n = if wide { 4 } else { 2 };
        let off = if wide { 4 + 8 * u64::from(cpl) } else { 2 + 4 * u64::from(cpl) };
        if tr.unusable() || off + n + 1 > u64::from(tr.limit) {
            return Err(fault(TS, tr.selector));
        }
        let sp = self.load(tr.base.wrapping_add(off), n as usize, Who::System)?;
        let ss = self.load(tr.base.wrapping_add(off + n), 2, Who::System)?;
        Ok((ss as u16, sp))
    }

    /// The stack segment of an inner level.
    pub fn inner_stack(&mut self, ss: u16, cpl: u8) -> Result<Seg, Trap> {
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
}

impl Trap {
    /// Set the EXT bit in the error code of a fault that hardware caused.
    pub fn external(self, ext: u32) -> Self {
        match self {
            Trap::Fault(e) if e.vector != PF_ => {
                Trap::Fault(Exception { error: e.error.map(|n| n | ext), ..e })
            }
            t => t,
        }
    }
}
