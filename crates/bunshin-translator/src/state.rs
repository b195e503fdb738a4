//! Architectural state in and out, and reset.
use crate::cpu::*;
use crate::mmu::{Exception, PF_};
use crate::msr::SAVED;
use crate::vcpu::{Owed, Vcpu};
use bunshin_core::state::{Event, EventKind, Segment, Table};
use bunshin_core::{CpuState, EngineError, Result};

fn out(s: &Seg, base: u64) -> Segment {
    Segment { selector: s.selector, base, limit: s.limit, access: s.access }
}

fn into(s: &Segment) -> Seg {
    Seg { base: s.base, limit: s.limit, access: s.access, selector: s.selector, _pad: [0; 3] }
}

fn initial_xsave(x: &mut [u8; 4096]) {
    x.fill(0);
    x[0..2].copy_from_slice(&0x37fu16.to_le_bytes());
    x[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    // x87 and SSE are present, so that their control words load.
    x[512] = 3;
}

impl Vcpu {
    /// The state after RESET#.
    pub fn reset(&mut self) {
        let index = self.index;
        let c = self.cpu_mut();
        c.gpr = [0; 16];
        c.gpr[2] = 0x600;
        c.rip = 0xfff0;
        c.set_rflags(2);
        for n in 0..6 {
            c.seg[n] = Seg { limit: 0xffff, access: 0x93, ..Seg::default() };
            c.seg_base[n] = 0;
        }
        c.seg[1] = Seg { selector: 0xf000, base: 0xffff_0000, limit: 0xffff, access: 0x9b, _pad: [0; 3] };
        c.seg_base[1] = 0xffff_0000;
        c.ldt = Seg { limit: 0xffff, access: 0x1_0082, ..Seg::default() };
        c.tr = Seg { limit: 0xffff, access: 0x8b, ..Seg::default() };
        (c.gdt_base, c.gdt_limit, c.idt_base, c.idt_limit) = (0, 0xffff, 0, 0xffff);
        (c.cr0, c.cr2, c.cr3, c.cr4, c.xcr0, c.efer) = (0x6000_0010, 0, 0, 0, 1, 0);
        (c.star, c.lstar, c.cstar, c.sfmask, c.sysenter, c.kernel_gs_base) = (0, 0, 0, 0, [0; 3], 0);
        c.dr = [0, 0, 0, 0, 0, 0, 0xffff_0ff0, 0x400];
        (c.cpl, c.shadow, c.nmi_blocked, c.halted) = (0, 0, 0, 0);
        initial_xsave(&mut c.xsave.0);
        self.msrs = crate::msr::Msrs { tsc_aux: index.into(), ..Default::default() };
        self.msrs.tsc_aux = 0;
        self.settle();
    }

    /// Take INIT and a start-up IPI; false while there is nothing but to wait for
    /// one. SDM volume 3, 9.1 and 9.4.
    pub fn start_up(&mut self) -> bool {
        if self.chips.take_init(self.index) {
            self.init();
        }
        if let Some(vector) = self.chips.take_sipi(self.index) {
            let c = self.cpu_mut();
            let base = u64::from(vector) << 12;
            c.seg[1].selector = u16::from(vector) << 8;
            (c.seg[1].base, c.seg_base[1]) = (base, base);
            c.rip = 0;
            c.halted = 0;
            self.select_region();
        }
        !self.chips.starting(self.index)
    }

    /// INIT: as RESET#, but caches, the FPU, XCR0, most model-specific registers and
    /// the time-stamp counter stay as they are (SDM volume 3, table 9-1).
    fn init(&mut self) {
        let c = self.cpu();
        let (caching, xcr0, xsave) = (c.cr0 & 0x6000_0000, c.xcr0, c.xsave.0);
        let kept = (c.star, c.lstar, c.cstar, c.sfmask, c.sysenter, c.kernel_gs_base);
        let msrs = self.msrs.clone();
        self.reset();
        let c = self.cpu_mut();
        c.cr0 = 0x10 | caching;
        (c.xcr0, c.xsave.0) = (xcr0, xsave);
        (c.star, c.lstar, c.cstar, c.sfmask, c.sysenter, c.kernel_gs_base) = kept;
        self.msrs = msrs;
        self.answers.clear();
        self.deferred = None;
    }

    /// Everything derived from control registers.
    fn settle(&mut self) {
        // A state whose entries are bad maps nothing.
        if self.load_pdptes().is_err() {
            self.pdptes = [0; 4];
        }
        self.arm_breakpoints();
        self.met = 0;
        self.refresh_reach();
        self.flush_tlb_all();
        for r in &mut self.regions.all {
            r.owner = None;
            r.mode = u32::MAX;
        }
        self.switch_address_space(true);
    }

    /// Copy the state. What INIT and start-up IPIs have come are taken before.
    pub fn state(&mut self) -> CpuState {
        if self.chips.starting(self.index) {
            self.start_up();
        }
        let nmi_pending = self.chips.nmi(self.index);
        let event =
            self.deferred.map(|e| Event { kind: EventKind::Exception, vector: e.vector, error: e.error });
        let lapic = self.chips.lapic_page(self.index);
        let cr8 = self.chips.cr8(self.index);
        let mut msrs: Vec<(u32, u64)> = SAVED.iter().filter_map(|&n| Some((n, self.read_msr(n)?))).collect();
        for n in [0x1b, 0x6e0] {
            if let Some(Ok(x)) = self.chips.msr_read(self.index, n) {
                msrs.push((n, x));
            }
        }
        msrs.sort_unstable();
        let c = self.cpu();
        let mut segments = [Segment::default(); 6];
        for (n, s) in segments.iter_mut().enumerate() {
            *s = out(&c.seg[n], c.seg_base[n]);
        }
        CpuState {
            gpr: c.gpr,
            rip: c.rip,
            rflags: c.rflags(),
            segments,
            ldt: out(&c.ldt, c.ldt.base),
            tr: out(&c.tr, c.tr.base),
            gdt: Table { base: c.gdt_base, limit: c.gdt_limit as u16 },
            idt: Table { base: c.idt_base, limit: c.idt_limit as u16 },
            cr0: c.cr0,
            cr2: self.deferred.filter(|e| e.vector == PF_).and_then(|e| e.address).unwrap_or(c.cr2),
            cr3: c.cr3,
            cr4: c.cr4,
            cr8,
            xcr0: c.xcr0,
            dr: [c.dr[0], c.dr[1], c.dr[2], c.dr[3], c.dr[6], c.dr[7]],
            msrs,
            xsave: c.xsave.0.to_vec(),
            lapic,
            tsc: self.tsc(),
            halted: c.halted != 0,
            interrupt_shadow: c.shadow != 0,
            nmi_blocked: c.nmi_blocked != 0,
            waits_for_sipi: self.chips.waits_for_sipi(self.index),
            nmi_pending,
            event: event.or(self.incoming),
        }
    }

    /// Go to the handler of an event that came with a state.
    pub fn take_event(&mut self, e: &Event) {
        self.cpu_mut().halted = 0;
        match e.kind {
            EventKind::Interrupt | EventKind::Nmi => self.interrupt_now(e.vector),
            EventKind::Exception => {
                self.deliver(Exception { vector: e.vector, error: e.error, address: None });
            }
        }
    }

    pub fn set_state(&mut self, s: &CpuState) -> Result<()> {
        let bad = |what: String| EngineError::new("state", what);
        if !s.xsave.is_empty() && (s.xsave.len() < 576 || s.xsave.len() > 4096) {
            return Err(bad(format!("xsave area of {} bytes, expected 0 or 576 to 4096", s.xsave.len())));
        }
        if s.cr0 & 1 == 0 && s.cr0 & (1 << 31) != 0 {
            return Err(bad(format!("cr0 {:#x} has paging without protection", s.cr0)));
        }
        if s.xcr0 & !crate::host::xsave_mask() != 0 || s.xcr0 & 1 == 0 && s.xcr0 != 0 {
            return Err(bad(format!("xcr0 {:#x} is not possible on this host", s.xcr0)));
        }
        self.answers.clear();
        self.outbox.clear();
        self.owed = None::<Owed>;
        self.left = None;
        self.deferred = None;
        self.waiting = None;
        self.incoming = s.event;
        self.look = true;
        self.fatal = None;
        let c = self.cpu_mut();
        c.gpr = s.gpr;
        c.rip = s.rip;
        c.set_rflags(s.rflags);
        for n in 0..6 {
            c.seg[n] = into(&s.segments[n]);
            c.seg_base[n] = s.segments[n].base;
        }
        c.ldt = into(&s.ldt);
        c.tr = into(&s.tr);
        (c.gdt_base, c.gdt_limit) = (s.gdt.base, s.gdt.limit.into());
        (c.idt_base, c.idt_limit) = (s.idt.base, s.idt.limit.into());
        (c.cr0, c.cr2, c.cr3, c.cr4) = (s.cr0, s.cr2, s.cr3, s.cr4);
        c.xcr0 = if s.xcr0 == 0 { 1 } else { s.xcr0 };
        c.dr = [s.dr[0], s.dr[1], s.dr[2], s.dr[3], 0, 0, s.dr[4], s.dr[5]];
        c.cpl = if s.cr0 & 1 == 0 {
            0
        } else if s.rflags & VM != 0 {
            3
        } else {
            ((s.segments[2].access >> 5) & 3) as u8
        };
        c.shadow = s.interrupt_shadow.into();
        c.nmi_blocked = s.nmi_blocked.into();
        c.halted = s.halted.into();
        if s.xsave.is_empty() {
            initial_xsave(&mut c.xsave.0);
        } else {
            c.xsave.0.fill(0);
            c.xsave.0[..s.xsave.len()].copy_from_slice(&s.xsave);
            // What would make XRSTOR fault is not state.
            let mask = crate::host::xsave_mask();
            for (k, b) in c.xsave.0[512..520].iter_mut().enumerate() {
                *b &= (mask >> (8 * k)) as u8;
            }
            c.xsave.0[520..576].fill(0);
            let mxcsr = u32::from_le_bytes(c.xsave.0[24..28].try_into().unwrap()) & 0xffff;
            c.xsave.0[24..28].copy_from_slice(&mxcsr.to_le_bytes());
        }
        self.saved = u64::MAX;
        self.blank_initial();
        // EFER's LMA follows from the rest, so it is set past the usual checks.
        for &(n, x) in &s.msrs {
            if n == crate::msr::EFER {
                let lma = if x & 0x100 != 0 && s.cr0 & (1 << 31) != 0 { 0x400 } else { 0 };
                self.cpu_mut().efer = (x & 0x901) | lma;
            } else if n == 0x1b {
                self.chips.load_msr(self.index, n, x).map_err(bad)?;
            } else if n != 0x6e0 && n != 0x10 {
                self.write_msr(n, x).ok_or_else(|| {
                    EngineError::new("state", format!("model-specific register {n:#x} does not take {x:#x}"))
                })?;
            }
        }
        if !s.lapic.is_empty() {
            self.chips.set_lapic_page(self.index, &s.lapic).map_err(bad)?;
        }
        for &(n, x) in &s.msrs {
            if n == 0x6e0 {
                self.chips.load_msr(self.index, n, x).map_err(bad)?;
            }
        }
        self.chips.set_cr8(self.index, s.cr8 & 15);
        self.chips.set_waits_for_sipi(self.index, s.waits_for_sipi);
        self.chips.set_nmi_pending(self.index, s.nmi_pending);
        if s.tsc != 0 {
            let offset = s.tsc.wrapping_sub(self.chips.clock.tsc());
            self.set_tsc_offset(offset);
        }
        self.settle();
        Ok(())
    }
}
