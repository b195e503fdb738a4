//! Task switches through a TSS, 32- and 16-bit. SDM volume 3, chapter 7.
use super::segment::{fault, Descriptor};
use crate::cpu::*;
use crate::mmu::{Exception, Kind, Trap, Who, CR0_PG, GP, NP, SS, TS};
use crate::vcpu::Vcpu;

/// What made the switch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum How {
    Jump,
    /// CALL, interrupt or exception: the new task can return.
    Nested,
    /// IRET with NT set.
    Return,
}

/// Offsets in a TSS.
struct Layout {
    /// Bytes of a register.
    size: u64,
    ip: u64,
    flags: u64,
    gpr: u64,
    segments: u64,
    /// Distance of segment selectors, and how many there are: ES CS SS DS FS GS.
    step: u64,
    count: u64,
    ldt: u64,
    /// Smallest limit.
    limit: u32,
}

const WIDE: Layout = Layout {
    size: 4,
    ip: 0x20,
    flags: 0x24,
    gpr: 0x28,
    segments: 0x48,
    step: 4,
    count: 6,
    ldt: 0x60,
    limit: 0x67,
};
const NARROW: Layout = Layout {
    size: 2,
    ip: 0xe,
    flags: 0x10,
    gpr: 0x12,
    segments: 0x22,
    step: 2,
    count: 4,
    ldt: 0x2a,
    limit: 0x2b,
};
const CR3: u64 = 0x1c;
const DEBUG: u64 = 0x64;
/// Order of GPRs in a TSS is that of their numbers, segments likewise.
const SEGMENTS: [usize; 6] = [0, 1, 2, 3, 4, 5];
const BUSY: u64 = 2 << 40;

fn layout(wide: bool) -> &'static Layout {
    if wide {
        &WIDE
    } else {
        &NARROW
    }
}

impl Vcpu {
    /// Switch to the task of `selector`; `rip` and `flags` are what the old one goes on
    /// with. Gives true for a 32-bit TSS.
    ///
    /// Faults before the commit point happen in the old task; those of the new task's
    /// own segments happen in the new one.
    pub fn switch_task(&mut self, selector: u16, how: How, rip: u64, flags: u64) -> Result<bool, Trap> {
        let vector = if how == How::Return { TS } else { GP };
        if selector & 4 != 0 || selector & !3 == 0 {
            return Err(fault(vector, selector));
        }
        let (d, d_at) = self.descriptor(selector, vector)?;
        let busy = how == How::Return;
        if d.ordinary() || d.kind() & !8 != if busy { 3 } else { 1 } {
            return Err(fault(vector, selector));
        }
        if !d.present() {
            return Err(fault(NP, selector));
        }
        let wide = d.kind() & 8 != 0;
        let (new, l) = (d.seg(selector), layout(wide));
        if new.limit < l.limit {
            return Err(fault(TS, selector));
        }
        let old = self.cpu().tr;
        let from = layout(old.access & 8 != 0);
        // Everything that can page-fault is looked at before anything changes.
        self.check(old.base + from.ip, (from.ldt - from.ip) as usize, Kind::Write, Who::System)?;
        self.check(new.base, l.limit as usize + 1, Kind::Read, Who::System)?;
        if how == How::Nested {
            self.check(new.base, 2, Kind::Write, Who::System)?;
        }
        let t = |v: &mut Self, off: u64, n: u64| v.load(new.base + off, n as usize, Who::System);
        let (ip, new_flags) = (t(self, l.ip, l.size)?, t(self, l.flags, l.size)?);
        let mut gpr = [0; 8];
        for (n, g) in gpr.iter_mut().enumerate() {
            *g = t(self, l.gpr + l.size * n as u64, l.size)?;
        }
        let mut selectors = [0u16; 6];
        for n in 0..l.count {
            selectors[n as usize] = t(self, l.segments + l.step * n, 2)? as u16;
        }
        let ldt = t(self, l.ldt, 2)? as u16;
        let cr3 = if wide { t(self, CR3, 4)? } else { 0 };

        // The old task's state.
        let saved = if how == How::Return { flags & !NT } else { flags };
        self.poke_system(old.base + from.ip, from.size, rip)?;
        self.poke_system(old.base + from.flags, from.size, saved)?;
        for n in 0..8u64 {
            let x = self.cpu().gpr[n as usize];
            self.poke_system(old.base + from.gpr + from.size * n, from.size, x)?;
        }
        for n in 0..from.count {
            let s = self.cpu().seg[SEGMENTS[n as usize]].selector;
            self.poke_system(old.base + from.segments + from.step * n, 2, s.into())?;
        }
        if how != How::Nested {
            let (o, o_at) = self.descriptor(old.selector, TS)?;
            self.poke_system(o_at, 8, o.0 & !BUSY)?;
        }
        if how == How::Nested {
            self.poke_system(new.base, 2, old.selector.into())?;
        }
        if !busy {
            self.poke_system(d_at, 8, d.0 | BUSY)?;
        }

        // The commit point.
        let real = new_flags & VM != 0 && wide;
        let f = if how == How::Nested { new_flags | NT } else { new_flags };
        let c = self.cpu_mut();
        c.tr = Seg { access: new.access | 2, ..new };
        c.cr0 |= 8;
        c.set_rflags((if wide { f } else { f & 0xffff } & !(VIF | VIP)) | 2);
        c.rip = ip;
        for (n, g) in gpr.into_iter().enumerate() {
            c.gpr[n] = if wide { g } else { g | 0xffff_0000 };
        }
        c.dr[7] &= !super::debug::LOCAL;
        self.arm_breakpoints();
        if wide && self.cpu().cr0 & CR0_PG != 0 {
            self.cpu_mut().cr3 = cr3;
            self.load_pdptes()?;
            self.switch_address_space(false);
        }
        self.load_task_segments(selectors, ldt, real)?;
        if ip > self.code_limit() {
            return Err(Exception::gp().into());
        }
        self.select_region();
        Ok(wide)
    }

    /// The trap that the new task asked for with the T bit of its TSS.
    pub fn after_task_switch(&mut self) -> Result<(), Trap> {
        let tr = self.cpu().tr;
        if tr.access & 8 != 0 && self.load(tr.base + DEBUG, 1, Who::System)? & 1 != 0 {
            return Err(self.debug_exception(super::debug::BT).into());
        }
        Ok(())
    }

    /// Segment registers and LDT of a new task: #TS, or #NP and #SS, of the new task.
    fn load_task_segments(&mut self, selectors: [u16; 6], ldt: u16, real: bool) -> Result<(), Trap> {
        // Until they are loaded they cannot be used, but their selectors show.
        let cpl = if real { 3 } else { (selectors[1] & 3) as u8 };
        for n in SEGMENTS {
            let access = 0x1_0000 | if n == 2 { u32::from(cpl) << 5 } else { 0 };
            self.put_segment(n, Seg { selector: selectors[n], access, ..Seg::default() });
        }
        self.cpu_mut().cpl = cpl;
        self.cpu_mut().ldt = Seg { selector: ldt, access: 0x1_0000, ..Seg::default() };
        self.select_region();
        if ldt & !3 != 0 {
            if ldt & 4 != 0 {
                return Err(fault(TS, ldt));
            }
            let (d, _) = self.descriptor(ldt, TS)?;
            if d.ordinary() || d.kind() != 2 || !d.present() {
                return Err(fault(TS, ldt));
            }
            self.cpu_mut().ldt = d.seg(ldt);
        }
        if real {
            for n in SEGMENTS {
                self.put_real(n, selectors[n]);
            }
            return Ok(());
        }
        let (cs, ss) = (selectors[1], selectors[2]);
        let at = |s: u16| if s & !3 == 0 { Err(fault(TS, s)) } else { Ok(()) };
        at(cs)?;
        let (d, va) = self.descriptor(cs, TS)?;
        if !d.code() || if d.conforming() { d.dpl() > cpl } else { d.dpl() != cpl } {
            return Err(fault(TS, cs));
        }
        self.take_task_segment(1, cs, (d, va), NP)?;
        at(ss)?;
        let (d, va) = self.descriptor(ss, TS)?;
        let right = d.ordinary() && !d.code() && d.kind() & 2 != 0;
        if !right || d.dpl() != cpl || (ss & 3) as u8 != cpl {
            return Err(fault(TS, ss));
        }
        self.take_task_segment(2, ss, (d, va), SS)?;
        for n in [0, 3, 4, 5] {
            let s = selectors[n];
            if s & !3 == 0 {
                continue;
            }
            let (d, va) = self.descriptor(s, TS)?;
            let reach = d.code() && d.conforming() || d.dpl() >= cpl.max((s & 3) as u8);
            if !d.ordinary() || d.code() && d.kind() & 2 == 0 || !reach {
                return Err(fault(TS, s));
            }
            self.take_task_segment(n, s, (d, va), NP)?;
        }
        Ok(())
    }

    fn take_task_segment(
        &mut self,
        n: usize,
        selector: u16,
        (d, va): (Descriptor, u64),
        absent: u8,
    ) -> Result<(), Trap> {
        if !d.present() {
            return Err(fault(absent, selector));
        }
        self.mark_accessed(d, va)?;
        let mut s = d.seg(selector);
        s.access |= 1;
        self.put_segment(n, s);
        Ok(())
    }

    /// Store to a system structure, even in a page that holds translations.
    fn poke_system(&mut self, va: u64, size: u64, value: u64) -> Result<(), Trap> {
        self.write_as(va, &value.to_le_bytes()[..size as usize], Who::System)
    }
}
