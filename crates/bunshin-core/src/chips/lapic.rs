//! Local APIC: xAPIC registers at APIC_BASE, x2APIC registers as MSRs.
//!
//! Spec: Intel SDM volume 3, chapter "Advanced Programmable Interrupt
//! Controller" (APIC). Offsets in the page; x2APIC MSR = 0x800 + offset / 16.
//!
//! | offset      | register                | x2APIC                          |
//! |-------------|-------------------------|---------------------------------|
//! | 0x020       | ID, bits 24..31         | 32 bits                         |
//! | 0x030       | version (0x00050014)    | same                            |
//! | 0x080       | TPR                     | same                            |
//! | 0x090/0x0C0 | APR, RRD (zero)         | #GP                             |
//! | 0x0A0       | PPR, read only          | same                            |
//! | 0x0B0       | EOI, write only         | nonzero: #GP                    |
//! | 0x0D0/0x0E0 | LDR, DFR                | LDR read only, DFR #GP          |
//! | 0x0F0       | spurious vector         | same                            |
//! | 0x100..170  | ISR                     | same                            |
//! | 0x180..1F0  | TMR                     | same                            |
//! | 0x200..270  | IRR                     | same                            |
//! | 0x280       | ESR                     | nonzero write: #GP              |
//! | 0x300/0x310 | ICR                     | 0x830 holds 64 bits, 0x831 #GP  |
//! | 0x320..370  | LVT timer, thermal, performance, LINT0, LINT1, error         ||
//! | 0x380/0x390 | initial, current count  | same                            |
//! | 0x3E0       | divide configuration    | same                            |
//! | 0x3F0       | reserved                | self IPI, write only            |
//!
//! The timer's bus clock is 1 GHz: one tick before the divider is 1 ns.
//!
//! Not modelled: CMCI, thermal and performance events (their LVTs only hold
//! bits), SMI, a writable ID, directed EOI (SVR bit 12), focus checking, APR
//! arbitration, remote IRR of the LINT pins, SDM's two-deep queue per vector.
//! Where hardware leaves LVT LINT0 masked after reset, the bootstrap processor
//! starts with ExtINT unmasked, as firmware leaves it (KVM does the same).
//!
//! A hostile guest could ask for a period of 1 ns: periodic deadlines are at
//! least [`super::MIN_PERIOD_NS`] apart and missed ones are merged. Vectors below 16
//! only set an ESR bit.
use super::{Gp, Now};
use serde::{Deserialize, Serialize};

mod timer;

/// Reset value of the APIC_BASE MSR without BSP: at 0xFEE00000, enabled.
const BASE_RESET: u64 = 0xFEE0_0000 | BASE_ENABLE;
const BASE_BSP: u64 = 1 << 8;
const BASE_X2: u64 = 1 << 10;
const BASE_ENABLE: u64 = 1 << 11;
/// Bits of APIC_BASE that may be set: 52 bits of address, EN, EXTD, BSP.
const BASE_VALID: u64 = 0x000F_FFFF_FFFF_F000 | BASE_ENABLE | BASE_X2 | BASE_BSP;

const VERSION: u32 = 0x0005_0014;
const SVR_ENABLE: u32 = 1 << 8;
const SVR_VALID: u32 = 0x1FF;
const MASKED: u32 = 1 << 16;
/// Delivery mode NMI, as in every message and LVT.
pub(super) const MODE_NMI: u8 = 4;
const MODE_EXTINT: u32 = 7;

const ESR_SEND_ILLEGAL: u32 = 1 << 5;
const ESR_RECEIVE_ILLEGAL: u32 = 1 << 6;
const ESR_REGISTER: u32 = 1 << 7;

const TIMER: usize = 0;
/// Index of LVT LINT0.
pub(super) const LINT0: usize = 3;
const ERROR: usize = 5;
/// Writable bits of each LVT, in order of offset.
const LVT_VALID: [u32; 6] = [0x700FF, 0x107FF, 0x107FF, 0x1A7FF, 0x1A7FF, 0x100FF];

/// Length of [`Lapic::page`] in bytes.
pub(super) const PAGE_LENGTH: usize = 0x400;

/// What a register write asks of the rest of the chipset.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Effect {
    /// Nothing beyond this APIC.
    None,
    /// A level-triggered vector ended: tell the IOAPIC.
    Eoi(u8),
    /// Send what [`Lapic::icr`] says.
    Ipi,
    /// Became able to accept interrupts: held level lines may come again.
    Enabled,
}

/// All registers of one local APIC, and the events latched for its processor.
/// Plain state: times are nanoseconds of CLOCK_MONOTONIC, wires come in as parameters.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lapic {
    pub(super) id: u32,
    pub(super) base: u64,
    tpr: u8,
    ldr: u32,
    dfr: u32,
    svr: u32,
    isr: [u32; 8],
    tmr: [u32; 8],
    irr: [u32; 8],
    esr: u32,
    esr_pending: u32,
    /// Destination in the upper half: all 32 bits (x2APIC) or bits 56..63.
    pub(super) icr: u64,
    lvt: [u32; 6],
    tmict: u32,
    tdcr: u32,
    /// The count runs (one-shot and periodic).
    armed: bool,
    /// When the count last was at its initial value.
    start_ns: u64,
    /// Guest TSC value, 0 when disarmed.
    tsc_deadline: u64,
    pub(super) nmi: bool,
    pub(super) init: bool,
    pub(super) sipi: Option<u8>,
    /// Takes start-up IPIs.
    pub(super) wait_sipi: bool,
}

/// Whether a register has to do with the timer: only then does time matter.
pub(super) fn timed(offset: u32) -> bool {
    matches!(offset & 0xFF0, 0x0F0 | 0x320 | 0x380 | 0x390 | 0x3E0)
}

fn highest(bits: &[u32; 8]) -> Option<u8> {
    let word = (0..8).rev().find(|&i| bits[i] != 0)?;
    Some((word as u8) * 32 + 31 - bits[word].leading_zeros() as u8)
}

fn put(bits: &mut [u32; 8], vector: u8, on: bool) {
    let (word, bit) = (usize::from(vector >> 5), 1 << (vector & 31));
    if on {
        bits[word] |= bit;
    } else {
        bits[word] &= !bit;
    }
}

fn has(bits: &[u32; 8], vector: u8) -> bool {
    bits[usize::from(vector >> 5)] >> (vector & 31) & 1 == 1
}

impl Lapic {
    /// The APIC of processor `id` after power-up.
    pub(super) fn new(id: u32) -> Self {
        let bsp = id == 0;
        Self {
            id,
            base: BASE_RESET | if bsp { BASE_BSP } else { 0 },
            tpr: 0,
            ldr: 0,
            dfr: !0,
            svr: 0xFF,
            isr: [0; 8],
            tmr: [0; 8],
            irr: [0; 8],
            esr: 0,
            esr_pending: 0,
            icr: 0,
            lvt: [MASKED, MASKED, MASKED, if bsp { MODE_EXTINT << 8 } else { MASKED }, MASKED, MASKED],
            tmict: 0,
            tdcr: 0,
            armed: false,
            start_ns: 0,
            tsc_deadline: 0,
            nmi: false,
            init: false,
            sipi: None,
            wait_sipi: !bsp,
        }
    }

    /// INIT: power-up state except ID, APIC_BASE and a SIPI that came since.
    pub(super) fn take_init(&mut self) -> bool {
        if !self.init {
            return false;
        }
        let (base, sipi) = (self.base, self.sipi);
        *self = Self { base, sipi, ..Self::new(self.id) };
        true
    }

    /// Bootstrap processor.
    pub(super) fn bsp(&self) -> bool {
        self.base & BASE_BSP != 0
    }

    /// APIC_BASE enables it.
    pub(super) fn present(&self) -> bool {
        self.base & BASE_ENABLE != 0
    }

    /// In x2APIC mode.
    pub(super) fn x2(&self) -> bool {
        self.base & BASE_X2 != 0
    }

    /// Accepts fixed interrupts.
    pub(super) fn enabled(&self) -> bool {
        self.present() && self.svr & SVR_ENABLE != 0
    }

    /// The page its registers answer at, None when they do not.
    pub(super) fn mmio_page(&self) -> Option<u64> {
        (self.present() && !self.x2()).then_some(self.base & !0xFFF & BASE_VALID)
    }

    /// The PIC's INTR reaches this processor as ExtINT.
    pub(super) fn takes_pic(&self) -> bool {
        if self.present() {
            self.lvt[LINT0] & MASKED == 0 && self.lvt[LINT0] >> 8 & 7 == MODE_EXTINT
        } else {
            self.id == 0
        }
    }

    fn ldr(&self) -> u32 {
        if self.x2() {
            (self.id >> 4) << 16 | 1 << (self.id & 15)
        } else {
            self.ldr
        }
    }

    /// Whether a message for `dest` is for this APIC.
    pub(super) fn matches(&self, dest: u32, logical: bool) -> bool {
        if !logical {
            return self.id == dest;
        }
        let ldr = self.ldr();
        if self.x2() {
            return ldr >> 16 == dest >> 16 && ldr & dest & 0xFFFF != 0;
        }
        let ldr = ldr >> 24;
        if dest > 0xFF {
            false
        } else if self.dfr >> 28 == 0xF {
            ldr & dest != 0
        } else {
            ldr >> 4 == dest >> 4 && ldr & dest & 0xF != 0
        }
    }

    fn error(&mut self, bit: u32) {
        self.esr_pending |= bit;
        let lvt = self.lvt[ERROR];
        // An illegal vector here would report itself for ever.
        if lvt & MASKED == 0 && lvt & 0xFF >= 16 && self.enabled() {
            put(&mut self.irr, lvt as u8, true);
            put(&mut self.tmr, lvt as u8, false);
        }
    }

    /// Take a fixed interrupt; false when this APIC does not accept any.
    pub(super) fn accept(&mut self, vector: u8, level: bool) -> bool {
        if !self.enabled() {
            return false;
        }
        if vector < 16 {
            self.error(ESR_RECEIVE_ILLEGAL);
        } else {
            put(&mut self.irr, vector, true);
            put(&mut self.tmr, vector, level);
        }
        true
    }

    /// Deliver a local interrupt through its LVT; true when it was an NMI.
    pub(super) fn deliver_local(&mut self, which: usize) -> bool {
        let lvt = self.lvt[which];
        if lvt & MASKED != 0 || !self.present() {
            return false;
        }
        let mode = if which == TIMER || which == ERROR { 0 } else { (lvt >> 8 & 7) as u8 };
        match mode {
            0 => {
                self.accept(lvt as u8, false);
                false
            }
            MODE_NMI => {
                self.nmi = true;
                true
            }
            _ => false,
        }
    }

    /// Processor priority.
    pub(super) fn ppr(&self) -> u8 {
        let in_service = highest(&self.isr).unwrap_or(0);
        if self.tpr >> 4 >= in_service >> 4 {
            self.tpr
        } else {
            in_service & 0xF0
        }
    }

    /// The vector that would be taken now.
    pub(super) fn deliverable(&self) -> Option<u8> {
        let vector = highest(&self.irr)?;
        (self.present() && vector >> 4 > self.ppr() >> 4).then_some(vector)
    }

    /// Move the deliverable vector into service.
    pub(super) fn ack(&mut self) -> Option<u8> {
        let vector = self.deliverable()?;
        put(&mut self.irr, vector, false);
        put(&mut self.isr, vector, true);
        Some(vector)
    }

    fn eoi(&mut self) -> Effect {
        let Some(vector) = highest(&self.isr) else { return Effect::None };
        put(&mut self.isr, vector, false);
        if has(&self.tmr, vector) {
            Effect::Eoi(vector)
        } else {
            Effect::None
        }
    }

    /// CR8.
    pub(super) fn cr8(&self) -> u64 {
        u64::from(self.tpr >> 4)
    }

    /// Write CR8.
    pub(super) fn set_cr8(&mut self, value: u64) {
        self.tpr = (value as u8 & 0xF) << 4;
    }

    // Registers -----------------------------------------------------------

    fn read_register(&mut self, offset: u32, now: Now) -> Option<u32> {
        let index = (offset >> 4 & 7) as usize;
        Some(match offset {
            0x020 if self.x2() => self.id,
            0x020 => self.id << 24,
            0x030 => VERSION,
            0x080 => u32::from(self.tpr),
            0x0A0 => u32::from(self.ppr()),
            0x0D0 => self.ldr(),
            0x0F0 => self.svr,
            0x100..=0x170 => self.isr[index],
            0x180..=0x1F0 => self.tmr[index],
            0x200..=0x270 => self.irr[index],
            0x280 => self.esr,
            0x300 => self.icr as u32,
            0x320..=0x370 => self.lvt[index - 2],
            0x380 => self.tmict,
            0x390 => {
                self.tick(now);
                self.current_count(now)
            }
            0x3E0 => self.tdcr,
            // Registers of the xAPIC only.
            0x090 | 0x0B0 | 0x0C0 if !self.x2() => 0,
            0x0E0 if !self.x2() => self.dfr,
            0x310 if !self.x2() => (self.icr >> 32) as u32,
            _ => return None,
        })
    }

    fn write_register(&mut self, offset: u32, value: u32, now: Now) -> Effect {
        match offset {
            0x080 => self.tpr = value as u8,
            0x0B0 => return self.eoi(),
            0x0D0 if !self.x2() => self.ldr = value & 0xFF00_0000,
            0x0E0 if !self.x2() => self.dfr = value | 0x0FFF_FFFF,
            0x0F0 => {
                let was = self.enabled();
                self.svr = value & SVR_VALID;
                if value & SVR_ENABLE == 0 {
                    self.tick(now);
                    self.lvt.iter_mut().for_each(|lvt| *lvt |= MASKED);
                } else if !was {
                    return Effect::Enabled;
                }
            }
            0x280 => self.esr = std::mem::take(&mut self.esr_pending),
            0x300 => {
                self.icr = self.icr & !0xFFFF_FFFF | u64::from(value & 0x000C_CFFF);
                return self.sent();
            }
            0x310 if !self.x2() => self.icr = self.icr & 0xFFFF_FFFF | u64::from(value & 0xFF00_0000) << 32,
            0x320..=0x370 => self.write_lvt((offset >> 4 & 7) as usize - 2, value, now),
            0x380 if self.timer_mode() < 2 => {
                self.tick(now);
                self.tmict = value;
                self.armed = value != 0;
                self.start_ns = now.ns;
            }
            0x3E0 => {
                self.tick(now);
                let left = self.current_count(now);
                self.tdcr = value & 0xB;
                self.start_ns =
                    now.ns.saturating_sub(u64::from(self.tmict.saturating_sub(left)) * self.divider());
            }
            // Read only, reserved for us, or without effect in this mode.
            0x020 | 0x030 | 0x090..=0x0C0 | 0x100..=0x270 | 0x380 | 0x390 => {}
            _ => self.error(ESR_REGISTER),
        }
        Effect::None
    }

    /// An IPI leaves, unless its vector is illegal.
    fn sent(&mut self) -> Effect {
        if self.icr >> 8 & 7 < 2 && self.icr & 0xFF < 16 {
            self.error(ESR_SEND_ILLEGAL);
            return Effect::None;
        }
        Effect::Ipi
    }

    /// Load from its page; bytes outside a register read zero.
    pub(super) fn read(&mut self, offset: u32, size: u8, now: Now) -> u64 {
        let Some(value) = self.read_register(offset & 0xFF0, now) else {
            self.error(ESR_REGISTER);
            return 0;
        };
        let shift = (offset & 0xF) * 8;
        u64::from(value.checked_shr(shift).unwrap_or(0)) & super::ones(size)
    }

    /// Store to its page; other than aligned 4-byte stores do nothing.
    pub(super) fn write(&mut self, offset: u32, size: u8, value: u64, now: Now) -> Effect {
        if size != 4 || offset & 0xF != 0 {
            return Effect::None;
        }
        self.write_register(offset, value as u32, now)
    }

    /// RDMSR 0x800..0x8FF.
    pub(super) fn read_x2(&mut self, index: u32, now: Now) -> Result<u64, Gp> {
        if !self.x2() {
            return Err(Gp);
        }
        let offset = (index & 0xFF) << 4;
        if offset == 0x300 {
            return Ok(self.icr);
        }
        self.read_register(offset, now).map(u64::from).ok_or(Gp)
    }

    /// WRMSR 0x800..0x8FF.
    pub(super) fn write_x2(&mut self, index: u32, value: u64, now: Now) -> Result<Effect, Gp> {
        let offset = (index & 0xFF) << 4;
        let valid: u64 = match offset {
            0x080 => 0xFF,
            0x0B0 | 0x280 => 0,
            0x0F0 => u64::from(SVR_VALID),
            0x300 => 0xFFFF_FFFF_000C_DFFF,
            // Delivery status and remote IRR are read-only, not reserved: writes pass.
            0x320..=0x370 => u64::from(LVT_VALID[(offset >> 4 & 7) as usize - 2]) | 0x5000,
            0x380 => 0xFFFF_FFFF,
            0x3E0 => 0xB,
            0x3F0 => 0xFF,
            _ => return Err(Gp),
        };
        if !self.x2() || value & !valid != 0 {
            return Err(Gp);
        }
        match offset {
            0x300 => {
                self.icr = value & !(1 << 12);
                Ok(self.sent())
            }
            0x3F0 => {
                if value < 16 {
                    self.error(ESR_SEND_ILLEGAL);
                } else {
                    self.accept(value as u8, false);
                }
                Ok(Effect::None)
            }
            _ => Ok(self.write_register(offset, value as u32, now)),
        }
    }

    /// WRMSR APIC_BASE: SDM "Extended XAPIC (x2APIC)", state transitions.
    pub(super) fn set_base(&mut self, value: u64) -> Result<(), Gp> {
        if value & !BASE_VALID != 0 {
            return Err(Gp);
        }
        let (enable, x2) = (value & BASE_ENABLE != 0, value & BASE_X2 != 0);
        if x2 && (!enable || !self.present()) || enable && !x2 && self.x2() {
            return Err(Gp);
        }
        let base = value & !BASE_BSP | self.base & BASE_BSP;
        if self.present() && !enable {
            let Self { nmi, init, sipi, wait_sipi, .. } = *self;
            *self = Self { nmi, init, sipi, wait_sipi, ..Self::new(self.id) };
        } else if x2 && !self.x2() {
            self.icr &= 0xFFFF_FFFF;
        }
        self.base = base;
        Ok(())
    }

    // Saved state ---------------------------------------------------------

    /// Restore APIC_BASE from a saved state: no transition rules.
    pub(super) fn load_base(&mut self, value: u64) -> Result<(), String> {
        let (base, was) = (value & !BASE_BSP | self.base & BASE_BSP, self.base);
        self.base = base;
        self.check().inspect_err(|_| self.base = was)
    }

    /// The registers as in the manual, 1 KiB.
    pub(super) fn page(&mut self, now: Now) -> Vec<u8> {
        let mut page = vec![0; PAGE_LENGTH];
        for offset in (0..PAGE_LENGTH).step_by(16) {
            let value = match offset as u32 {
                0x0E0 => self.dfr,
                0x310 => (self.icr >> 32) as u32,
                other => self.read_register(other, now).unwrap_or(0),
            };
            page[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
        }
        page
    }

    /// Restore the registers from a page; the mode is that of APIC_BASE. The
    /// TSC deadline, NMI, INIT and SIPI are not in the page and stay.
    pub(super) fn load_page(&mut self, page: &[u8], now: Now) -> Result<(), String> {
        if page.len() != PAGE_LENGTH {
            return Err(format!("local APIC {}: page of {} bytes, expected 1024", self.id, page.len()));
        }
        let at = |offset: usize| {
            u32::from_le_bytes([page[offset], page[offset + 1], page[offset + 2], page[offset + 3]])
        };
        let words = |offset: usize| -> [u32; 8] { std::array::from_fn(|i| at(offset + 16 * i)) };
        let id = if self.x2() { at(0x20) } else { at(0x20) >> 24 };
        if id != self.id {
            return Err(format!("local APIC {}: page holds ID {id}", self.id));
        }
        let mut new = Self {
            tpr: at(0x80) as u8,
            ldr: if self.x2() { 0 } else { at(0xD0) },
            dfr: at(0xE0) | 0x0FFF_FFFF,
            svr: at(0xF0),
            isr: words(0x100),
            tmr: words(0x180),
            irr: words(0x200),
            esr: at(0x280),
            icr: u64::from(at(0x310)) << 32 | u64::from(at(0x300) & !(1 << 12)),
            lvt: std::array::from_fn(|i| at(0x320 + 16 * i) & !0x5000),
            tmict: at(0x380),
            tdcr: at(0x3E0),
            ..self.clone()
        };
        let left = at(0x390);
        new.armed = new.tmict != 0 && new.timer_mode() < 2 && (left != 0 || new.timer_mode() == 1);
        new.start_ns = now.ns.saturating_sub(u64::from(new.tmict.saturating_sub(left)) * new.divider());
        new.check()?;
        *self = new;
        Ok(())
    }

    /// Whether a state that came from outside can be this APIC's.
    pub(super) fn check(&self) -> Result<(), String> {
        let bad = |what: &str, value: u64| {
            Err(format!("local APIC {}: {what} {value:#x} has reserved bits", self.id))
        };
        if self.base & !BASE_VALID != 0 || self.x2() && !self.present() || self.bsp() != (self.id == 0) {
            return bad("APIC_BASE", self.base);
        }
        for (name, bits) in [("ISR", &self.isr), ("IRR", &self.irr)] {
            if bits[0] & 0xFFFF != 0 {
                return bad(name, u64::from(bits[0]));
            }
        }
        if self.svr & !SVR_VALID != 0 {
            return bad("spurious vector", u64::from(self.svr));
        }
        if self.tdcr & !0xB != 0 {
            return bad("divide configuration", u64::from(self.tdcr));
        }
        if let Some(i) = (0..6).find(|&i| self.lvt[i] & !LVT_VALID[i] != 0) {
            return bad("LVT", u64::from(self.lvt[i]));
        }
        if self.armed && self.tmict == 0 {
            return Err(format!("local APIC {}: the timer runs with an initial count of 0", self.id));
        }
        Ok(())
    }

    /// Move its times to another clock.
    pub(super) fn rebase(&mut self, to: impl Fn(u64) -> u64) {
        self.start_ns = to(self.start_ns);
    }
}

#[cfg(test)]
mod tests;
