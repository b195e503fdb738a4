//! The interrupt controllers and the PIT, for engines that run in user space:
//! what KVM keeps in the kernel. [`Chips`] is the shell (one lock, clocks,
//! routing, kicks); `lapic`, `ioapic`, `pic` and `pit` are pure registers.
//!
//! | where                    | what                                        |
//! |--------------------------|---------------------------------------------|
//! | gpa APIC_BASE (FEE00000) | local APIC of the accessing processor       |
//! | gpa FEC00000             | IOAPIC                                      |
//! | MSR 1B, 6E0, 800..8FF    | APIC_BASE, TSC deadline, x2APIC             |
//! | ports 20 21 A0 A1 4D0 4D1| PIC                                         |
//! | ports 40..43 61          | PIT                                         |
//!
//! GSI 0 (the PIT's) is PIC IRQ 0 and IOAPIC pin 2, GSI 1 and 3..15 are the PIC
//! IRQ and the pin of the same number, 16..23 pins only; GSI 2 is the cascade
//! and has no device. The PIC's INTR is LINT0 of every processor.
//!
//! Not modelled: SMI, system NMI through LINT1, more than 255 processors,
//! extended destination IDs of MSIs, lowest priority's focus processor (the
//! lowest PPR wins, then the lowest ID).
//! Hostile guest: loops are bounded by the number of processors and pins,
//! absent registers read zero or all ones, timers have a minimal period. A
//! saved state is checked before any of it is taken.
mod ioapic;
mod lapic;
pub mod pic;
pub mod pit;

use crate::clock::Clock;
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use ioapic::Ioapic;
pub use lapic::Lapic;
use lapic::{Effect, LINT0, MODE_NMI};
pub use pic::Pic;
pub use pit::Pit;

/// Periodic timers fire at most this often, in nanoseconds.
pub const MIN_PERIOD_NS: u64 = 50_000;
/// First gpa of the IOAPIC's page.
pub const IOAPIC_GPA: u64 = 0xFEC0_0000;
/// First gpa of the local APIC's page after reset.
pub const LAPIC_GPA: u64 = 0xFEE0_0000;
/// The local APIC timer's clock before the divider.
pub const BUS_HZ: u64 = 1_000_000_000;

const MSR_APIC_BASE: u32 = 0x1B;
const MSR_TSC_DEADLINE: u32 = 0x6E0;
const MAX_CPUS: u32 = 255;

/// The instruction must raise a general-protection fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gp;

/// One moment on both clocks.
#[derive(Debug, Clone, Copy)]
struct Now {
    ns: u64,
    /// The guest's time-stamp counter.
    tsc: u64,
}

/// An interrupt message on its way to local APICs.
#[derive(Debug, Clone, Copy)]
struct Message {
    dest: u32,
    broadcast: bool,
    logical: bool,
    /// 0 fixed, 1 lowest priority, 4 NMI, 5 INIT, 6 start-up.
    mode: u8,
    vector: u8,
    level: bool,
}

/// A set of processors.
#[derive(Debug, Clone, Copy, Default)]
struct Cpus([u64; 4]);

impl Cpus {
    fn insert(&mut self, cpu: usize) {
        self.0[cpu / 64] |= 1 << (cpu % 64);
    }

    fn pop(&mut self) -> Option<usize> {
        let word = (0..4).find(|&i| self.0[i] != 0)?;
        let bit = self.0[word].trailing_zeros();
        self.0[word] &= self.0[word] - 1;
        Some(word * 64 + bit as usize)
    }
}

/// What a processor was told by its last kick.
#[derive(Debug, Clone, Copy)]
struct Told {
    pending: bool,
    deadline_ns: u64,
}

const TOLD_NOTHING: Told = Told { pending: false, deadline_ns: u64::MAX };

/// All bits of an access of `size` bytes.
fn ones(size: u8) -> u64 {
    !0 >> (64 - 8 * u32::from(size.clamp(1, 8)))
}

/// The whole chipset as saved. Plain data; times count on the clock whose value
/// at the copy was `clock_ns`, and go on from there when it is loaded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChipsState {
    /// The clock when the copy was made.
    pub clock_ns: u64,
    /// Local APIC of each processor, by index; empty where they come with the
    /// processors' own states.
    pub lapics: Vec<Lapic>,
    /// The IOAPIC.
    pub ioapic: Ioapic,
    /// The two 8259A.
    pub pic: Pic,
    /// The 8254.
    pub pit: Pit,
}

struct Inner {
    clock: Arc<Clock>,
    lapics: Vec<Lapic>,
    ioapic: Ioapic,
    pic: Pic,
    pit: Pit,
    /// Level of the PIC's INTR.
    intr: bool,
    tsc_hz: u64,
    /// Guest TSC less host TSC, for each processor.
    tsc_offsets: Vec<i64>,
    told: Vec<Told>,
    /// Processors whose interrupts may have changed under this lock.
    touched: Cpus,
    /// Processors whose next deadline may have changed under this lock.
    timed: Cpus,
    /// Processors that got an NMI, INIT or SIPI under this lock.
    alarmed: Cpus,
}

impl Inner {
    /// Now, as `cpu` sees it.
    fn now(&self, cpu: u32) -> Now {
        Now { ns: self.clock.now_ns(), tsc: self.tsc(cpu) }
    }

    fn tsc(&self, cpu: u32) -> u64 {
        let offset = self.tsc_offsets.get(cpu as usize).copied().unwrap_or(0);
        self.clock.tsc().wrapping_add_signed(offset)
    }

    fn lapic(&mut self, cpu: u32) -> Option<&mut Lapic> {
        self.lapics.get_mut(cpu as usize)
    }

    /// The time, where the register at `offset` needs it: reading clocks costs
    /// more than an EOI.
    fn now_for(&mut self, cpu: u32, offset: u32) -> Now {
        if lapic::timed(offset) {
            self.time(cpu);
            self.now(cpu)
        } else {
            Now { ns: 0, tsc: 0 }
        }
    }

    /// The interrupts of `cpu` may have changed.
    fn touch(&mut self, cpu: u32) {
        if (cpu as usize) < self.lapics.len() {
            self.touched.insert(cpu as usize);
        }
    }

    /// The interrupts and the deadline of `cpu` may have changed.
    fn time(&mut self, cpu: u32) {
        if (cpu as usize) < self.lapics.len() {
            self.touched.insert(cpu as usize);
            self.timed.insert(cpu as usize);
        }
    }

    fn pending(&self, cpu: usize) -> bool {
        let lapic = &self.lapics[cpu];
        self.intr && lapic.takes_pic() || lapic.deliverable().is_some()
    }

    fn deadline_ns(&self, cpu: usize, now: Now) -> Option<u64> {
        let lapic = self.lapics[cpu].deadline_ns(now, self.tsc_hz);
        let pit = if cpu == 0 { self.pit.deadline_ns() } else { None };
        lapic.into_iter().chain(pit).min()
    }

    /// Compare with what the processors were told; who must be kicked.
    fn settle(&mut self) -> Cpus {
        let mut kicks = std::mem::take(&mut self.alarmed);
        let mut touched = std::mem::take(&mut self.touched);
        while let Some(cpu) = touched.pop() {
            let pending = self.pending(cpu);
            let was = std::mem::replace(&mut self.told[cpu].pending, pending);
            if pending && !was {
                kicks.insert(cpu);
            }
        }
        let mut timed = std::mem::take(&mut self.timed);
        if timed.0 == [0; 4] {
            return kicks;
        }
        while let Some(cpu) = timed.pop() {
            let now = self.now(cpu as u32);
            let deadline_ns = self.deadline_ns(cpu, now).unwrap_or(u64::MAX);
            let was = std::mem::replace(&mut self.told[cpu].deadline_ns, deadline_ns);
            if deadline_ns < was {
                kicks.insert(cpu);
            }
        }
        kicks
    }

    /// Give a message to one APIC; true when it accepts.
    fn deliver_to(&mut self, cpu: usize, m: Message) -> bool {
        let lapic = &mut self.lapics[cpu];
        let alarm = match m.mode {
            0 | 1 => {
                let accepted = lapic.accept(m.vector, m.level);
                self.touched.insert(cpu);
                return accepted;
            }
            MODE_NMI if lapic.present() => !std::mem::replace(&mut lapic.nmi, true),
            5 => {
                lapic.sipi = None;
                !std::mem::replace(&mut lapic.init, true)
            }
            6 if !lapic.bsp() && (lapic.wait_sipi || lapic.init) => {
                lapic.sipi.replace(m.vector) != Some(m.vector)
            }
            _ => return false,
        };
        if alarm {
            self.alarmed.insert(cpu);
        }
        true
    }

    /// Send a message to whom it names; true when one APIC accepts.
    fn deliver(&mut self, m: Message) -> bool {
        if m.mode == 1 {
            let named = (0..self.lapics.len()).filter(|&i| {
                let lapic = &self.lapics[i];
                lapic.enabled() && (m.broadcast || lapic.matches(m.dest, m.logical))
            });
            let chosen = named.min_by_key(|&i| self.lapics[i].ppr());
            return chosen.is_some_and(|i| self.deliver_to(i, m));
        }
        let mut accepted = false;
        for i in 0..self.lapics.len() {
            if m.broadcast || self.lapics[i].matches(m.dest, m.logical) {
                accepted |= self.deliver_to(i, m);
            }
        }
        accepted
    }

    fn ipi(&mut self, cpu: usize) {
        let lapic = &self.lapics[cpu];
        let (icr, x2) = (lapic.icr, lapic.x2());
        let dest = (icr >> 32) as u32;
        let dest = if x2 { dest } else { dest >> 24 };
        let m = Message {
            dest,
            broadcast: dest == if x2 { !0 } else { 0xFF },
            logical: icr >> 11 & 1 == 1,
            mode: (icr >> 8 & 7) as u8,
            vector: icr as u8,
            level: false,
        };
        // INIT level de-assert only synchronises arbitration IDs.
        if m.mode == 5 && icr >> 14 & 3 == 2 {
            return;
        }
        match icr >> 18 & 3 {
            0 => {
                self.deliver(m);
            }
            1 => {
                if m.mode == 0 {
                    self.deliver_to(cpu, m);
                }
            }
            all => {
                let (mode, but) =
                    (if m.mode == 1 { 0 } else { m.mode }, if all == 3 { cpu } else { usize::MAX });
                for i in (0..self.lapics.len()).filter(|&i| i != but) {
                    self.deliver_to(i, Message { mode, ..m });
                }
            }
        }
    }

    fn apply(&mut self, cpu: usize, effect: Effect) {
        match effect {
            Effect::None => {}
            Effect::Ipi => self.ipi(cpu),
            Effect::Eoi(vector) => {
                self.ioapic.eoi(vector);
                self.serve_levels();
            }
            Effect::Enabled => self.serve_levels(),
        }
        self.touched.insert(cpu);
    }

    fn serve(&mut self, pin: u32) {
        let message = self.ioapic.message(pin);
        if self.deliver(message) {
            self.ioapic.accepted(pin);
        }
    }

    fn serve_levels(&mut self) {
        for pin in 0..ioapic::PINS {
            if self.ioapic.waiting(pin) {
                self.serve(pin);
            }
        }
    }

    /// The PIC changed: look at INTR, which is LINT0 of every processor.
    fn pic_changed(&mut self) {
        let was = std::mem::replace(&mut self.intr, self.pic.output());
        if was == self.intr {
            return;
        }
        for cpu in 0..self.lapics.len() {
            if self.intr && self.lapics[cpu].deliver_local(LINT0) {
                self.alarmed.insert(cpu);
            }
            self.touched.insert(cpu);
        }
    }

    fn set_irq(&mut self, gsi: u32, level: bool) {
        let pin = match gsi {
            0 => 2,
            1 | 3..=23 => gsi,
            _ => return,
        };
        if gsi < 16 {
            self.pic.set_line(gsi, level);
            self.pic_changed();
        }
        if self.ioapic.set_line(pin, level) {
            self.serve(pin);
        }
    }

    fn tick(&mut self, cpu: u32, now: Now) {
        if let Some(lapic) = self.lapic(cpu) {
            lapic.tick(now);
            self.time(cpu);
        }
        if cpu == 0 && self.pit.tick(now.ns) {
            self.set_irq(0, true);
            self.set_irq(0, false);
        }
    }
}

/// The interrupt controllers and the PIT of one machine, behind one lock.
///
/// Processors are named by index, which is their APIC ID; an index that does
/// not exist has no interrupts. Engines ask [`Chips::pending`] after a kick,
/// after each [`Chips::ack`], and whenever the guest begins to accept
/// interrupts; a processor that was told is not kicked again.
pub struct Chips {
    /// What the chips, and the processors' counters, take for the time.
    pub clock: Arc<Clock>,
    inner: Mutex<Inner>,
    kick: Box<dyn Fn(u32) + Send + Sync>,
}

impl Chips {
    /// The chipset of a machine with `cpus` processors (1 to 255) after reset.
    ///
    /// `kick(cpu)` is called, outside the lock, whenever an interrupt, NMI, INIT
    /// or SIPI may have become deliverable to `cpu`, or its next deadline moved
    /// earlier; also from the processor's own accesses.
    pub fn new(cpus: u32, tsc_hz: u64, kick: Box<dyn Fn(u32) + Send + Sync>) -> Arc<Chips> {
        let cpus = cpus.clamp(1, MAX_CPUS);
        let clock = Arc::new(Clock::default());
        let inner = Inner {
            clock: clock.clone(),
            lapics: (0..cpus).map(Lapic::new).collect(),
            ioapic: Ioapic::new(),
            pic: Pic::default(),
            pit: Pit::new(),
            intr: false,
            tsc_hz,
            tsc_offsets: vec![0; cpus as usize],
            told: vec![TOLD_NOTHING; cpus as usize],
            touched: Cpus::default(),
            timed: Cpus::default(),
            alarmed: Cpus::default(),
        };
        Arc::new(Chips { clock, inner: Mutex::new(inner), kick })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Change something, then kick who must know.
    fn change<R>(&self, f: impl FnOnce(&mut Inner) -> R) -> R {
        let mut inner = self.lock();
        let result = f(&mut inner);
        let mut kicks = inner.settle();
        drop(inner);
        while let Some(cpu) = kicks.pop() {
            (self.kick)(cpu as u32);
        }
        result
    }

    /// Guest TSC of `cpu` = host RDTSC + `offset`.
    pub fn set_tsc_offset(&self, cpu: u32, offset: i64) {
        self.change(|inner| {
            if let Some(own) = inner.tsc_offsets.get_mut(cpu as usize) {
                *own = offset;
                inner.time(cpu);
            }
        });
    }

    /// Let everything of `cpu` that counts on the host's clock be due `ns` later:
    /// its local APIC's timer, and the PIT for processor 0.
    pub fn delay(&self, cpu: u32, ns: i64) {
        self.change(|inner| {
            let to = |time: u64| time.saturating_add_signed(ns);
            if let Some(lapic) = inner.lapic(cpu) {
                lapic.rebase(to);
                inner.time(cpu);
            }
            if cpu == 0 {
                inner.pit.rebase(to);
            }
        });
    }

    /// Drive an interrupt line; `level` says whether the device asserts it.
    /// GSIs that do not exist are ignored.
    pub fn set_irq(&self, gsi: u32, level: bool) {
        self.change(|inner| inner.set_irq(gsi, level));
    }

    /// Deliver a message-signalled interrupt. Spec: SDM 3, "Message Signalled
    /// Interrupts". Addresses outside 0xFEExxxxx are ignored.
    pub fn send_msi(&self, address: u64, data: u32) {
        if address >> 20 != 0xFEE {
            return;
        }
        let dest = (address >> 12 & 0xFF) as u32;
        let mode = (data >> 8 & 7) as u8;
        let hint = address >> 3 & 1 == 1;
        let m = Message {
            dest,
            broadcast: dest == 0xFF,
            logical: address >> 2 & 1 == 1,
            mode: if mode == 0 && hint { 1 } else { mode },
            vector: data as u8,
            level: data >> 15 & 1 == 1,
        };
        // A message cannot be a start-up; a de-asserted level is no interrupt.
        if m.mode != 6 && (!m.level || data >> 14 & 1 == 1) {
            self.change(|inner| inner.deliver(m));
        }
    }

    /// Whether a port belongs to the chipset.
    pub fn owns_port(port: u16) -> bool {
        matches!(port, 0x20 | 0x21 | 0xA0 | 0xA1 | 0x40..=0x43 | 0x61 | 0x4D0 | 0x4D1)
    }

    /// IN; wider accesses are made of bytes, absent ones all ones.
    pub fn pio_read(&self, port: u16, size: u8) -> u32 {
        self.change(|inner| {
            let mut value = 0;
            for i in 0..size.clamp(1, 4) {
                let at = port.wrapping_add(u16::from(i));
                let byte = if matches!(at, 0x40..=0x61) {
                    inner.pit.read(at, inner.clock.now_ns())
                } else {
                    inner.pic.read(at)
                };
                value |= u32::from(byte) << (8 * i);
            }
            inner.pic_changed();
            value
        })
    }

    /// OUT; wider accesses are made of bytes.
    pub fn pio_write(&self, port: u16, size: u8, value: u32) {
        self.change(|inner| {
            for i in 0..size.clamp(1, 4) {
                let (at, byte) = (port.wrapping_add(u16::from(i)), (value >> (8 * i)) as u8);
                if matches!(at, 0x40..=0x61) {
                    inner.pit.write(at, byte, inner.clock.now_ns());
                    inner.time(0);
                } else {
                    inner.pic.write(at, byte);
                }
            }
            inner.pic_changed();
        });
    }

    /// Load from a chip's page by `cpu`; None when the gpa is not a chip's.
    pub fn mmio_read(&self, cpu: u32, gpa: u64, size: u8) -> Option<u64> {
        let (page, offset) = (gpa & !0xFFF, (gpa & 0xFFF) as u32);
        if page == IOAPIC_GPA {
            return Some(u64::from(self.lock().ioapic.read(offset)) & ones(size));
        }
        if self.is_elsewhere(cpu, page) {
            return None;
        }
        self.change(|inner| {
            let now = inner.now_for(cpu, offset);
            let Some(lapic) = inner.lapic(cpu).filter(|lapic| lapic.mmio_page() == Some(page)) else {
                return (page == LAPIC_GPA).then(|| ones(size));
            };
            let value = lapic.read(offset, size, now);
            inner.touch(cpu);
            Some(value)
        })
    }

    /// Store to a chip's page by `cpu`; false when the gpa is not a chip's.
    pub fn mmio_write(&self, cpu: u32, gpa: u64, size: u8, value: u64) -> bool {
        let (page, offset) = (gpa & !0xFFF, (gpa & 0xFFF) as u32);
        if self.is_elsewhere(cpu, page) {
            return false;
        }
        self.change(|inner| {
            if page == IOAPIC_GPA {
                inner.ioapic.write(offset, value as u32);
                inner.serve_levels();
                return true;
            }
            let now = inner.now_for(cpu, offset);
            let Some(lapic) = inner.lapic(cpu).filter(|lapic| lapic.mmio_page() == Some(page)) else {
                return page == LAPIC_GPA;
            };
            let effect = lapic.write(offset, size, value, now);
            inner.apply(cpu as usize, effect);
            true
        })
    }

    /// No chip that `cpu` sees lies in `page`: told without bringing timers up to date,
    /// since every access to a device of the owner's asks.
    fn is_elsewhere(&self, cpu: u32, page: u64) -> bool {
        let lapic = || self.lock().lapic(cpu).is_some_and(|lapic| lapic.mmio_page() == Some(page));
        page != IOAPIC_GPA && page != LAPIC_GPA && !lapic()
    }

    /// Whether a gpa lies in a chip's page (of any processor).
    pub fn owns_gpa(&self, gpa: u64) -> bool {
        let page = gpa & !0xFFF;
        page == IOAPIC_GPA
            || page == LAPIC_GPA
            || self.lock().lapics.iter().any(|lapic| lapic.mmio_page() == Some(page))
    }

    /// RDMSR by `cpu`; None when the register is not the chipset's.
    pub fn msr_read(&self, cpu: u32, index: u32) -> Option<Result<u64, Gp>> {
        if !owns_msr(index) {
            return None;
        }
        Some(self.change(|inner| {
            let now = inner.now_for(cpu, msr_offset(index));
            inner.touch(cpu);
            let lapic = inner.lapic(cpu).ok_or(Gp)?;
            match index {
                MSR_APIC_BASE => Ok(lapic.base),
                MSR_TSC_DEADLINE => Ok(lapic.tsc_deadline(now)),
                _ => lapic.read_x2(index, now),
            }
        }))
    }

    /// WRMSR by `cpu`; None when the register is not the chipset's.
    pub fn msr_write(&self, cpu: u32, index: u32, value: u64) -> Option<Result<(), Gp>> {
        if !owns_msr(index) {
            return None;
        }
        Some(self.change(|inner| {
            let now = inner.now_for(cpu, msr_offset(index));
            let lapic = inner.lapic(cpu).ok_or(Gp)?;
            let mut effect = Effect::None;
            match index {
                MSR_APIC_BASE => lapic.set_base(value)?,
                MSR_TSC_DEADLINE => lapic.set_tsc_deadline(value, now),
                _ => effect = lapic.write_x2(index, value, now)?,
            }
            inner.apply(cpu as usize, effect);
            Ok(())
        }))
    }

    /// Restore APIC_BASE or the TSC deadline from a saved state: no transition
    /// rules, no dependence on the timer's mode. Restore APIC_BASE before the
    /// page. Other registers of ours are part of the page and ignored here.
    pub fn load_msr(&self, cpu: u32, index: u32, value: u64) -> Result<(), String> {
        self.change(|inner| {
            inner.time(cpu);
            let lapic = inner.lapic(cpu).ok_or_else(|| no_cpu(cpu))?;
            match index {
                MSR_APIC_BASE => lapic.load_base(value)?,
                MSR_TSC_DEADLINE => lapic.load_tsc_deadline(value),
                _ => {}
            }
            Ok(())
        })
    }

    /// MOV from CR8.
    pub fn cr8(&self, cpu: u32) -> u64 {
        self.lock().lapic(cpu).map_or(0, |lapic| lapic.cr8())
    }

    /// MOV to CR8; bits above 3 are ignored.
    pub fn set_cr8(&self, cpu: u32, value: u64) {
        self.change(|inner| {
            if let Some(lapic) = inner.lapic(cpu) {
                lapic.set_cr8(value);
                inner.touch(cpu);
            }
        });
    }

    /// Whether a maskable interrupt is deliverable to `cpu`: above its priority,
    /// or from the PIC (through LINT0, or with the APIC off).
    pub fn pending(&self, cpu: u32) -> bool {
        let inner = self.lock();
        (cpu as usize) < inner.lapics.len() && inner.pending(cpu as usize)
    }

    /// Take the interrupt: its vector. None when none is deliverable.
    pub fn ack(&self, cpu: u32) -> Option<u8> {
        self.change(|inner| {
            let lapic = inner.lapics.get_mut(cpu as usize)?;
            if inner.intr && lapic.takes_pic() {
                let vector = inner.pic.ack();
                inner.pic_changed();
                inner.touch(cpu);
                return Some(vector);
            }
            let vector = lapic.ack();
            // No deadline moved: only what was told about interrupts.
            let pending = inner.pending(cpu as usize);
            inner.told[cpu as usize].pending = pending;
            vector
        })
    }

    /// Whether an NMI is pending.
    pub fn nmi(&self, cpu: u32) -> bool {
        self.lock().lapic(cpu).is_some_and(|lapic| lapic.nmi)
    }

    /// Let an NMI wait, or not: part of a saved state.
    pub fn set_nmi_pending(&self, cpu: u32, pending: bool) {
        self.change(|inner| {
            if let Some(lapic) = inner.lapic(cpu) {
                lapic.nmi = pending;
                if pending {
                    inner.alarmed.insert(cpu as usize);
                }
            }
        });
    }

    /// Take a pending NMI.
    pub fn take_nmi(&self, cpu: u32) -> bool {
        self.lock().lapic(cpu).is_some_and(|lapic| std::mem::take(&mut lapic.nmi))
    }

    /// Whether `cpu` has an INIT to take or waits for a start-up IPI.
    pub fn starting(&self, cpu: u32) -> bool {
        self.lock().lapic(cpu).is_some_and(|lapic| lapic.init || lapic.wait_sipi)
    }

    /// Let `cpu` wait for a start-up IPI, or not: part of a saved state.
    pub fn set_waits_for_sipi(&self, cpu: u32, waits: bool) {
        self.change(|inner| {
            if let Some(lapic) = inner.lapic(cpu) {
                lapic.wait_sipi = waits;
                inner.touch(cpu);
            }
        });
    }

    /// Take a pending INIT: the local APIC is reset, the caller resets the rest.
    /// All but the bootstrap processor then wait for [`Chips::take_sipi`].
    pub fn take_init(&self, cpu: u32) -> bool {
        self.change(|inner| {
            let taken = inner.lapic(cpu).is_some_and(Lapic::take_init);
            if taken {
                inner.time(cpu);
            }
            taken
        })
    }

    /// Take a start-up IPI: execution begins at vector << 12. Only a processor
    /// that waits for one has any.
    pub fn take_sipi(&self, cpu: u32) -> Option<u8> {
        let mut inner = self.lock();
        let lapic = inner.lapic(cpu).filter(|lapic| lapic.wait_sipi && !lapic.init)?;
        let vector = lapic.sipi.take()?;
        lapic.wait_sipi = false;
        Some(vector)
    }

    /// Whether `cpu` waits for a start-up IPI.
    pub fn waits_for_sipi(&self, cpu: u32) -> bool {
        self.lock().lapic(cpu).is_some_and(|lapic| lapic.wait_sipi)
    }

    /// When [`Chips::tick`] has something to do next, CLOCK_MONOTONIC: the local
    /// APIC's timer, and the PIT for processor 0.
    pub fn next_deadline_ns(&self, cpu: u32) -> Option<u64> {
        let mut inner = self.lock();
        if cpu as usize >= inner.lapics.len() {
            return None;
        }
        let deadline = inner.deadline_ns(cpu as usize, inner.now(cpu));
        inner.told[cpu as usize].deadline_ns = deadline.unwrap_or(u64::MAX);
        deadline
    }

    /// Fire what is due by `now_ns` (CLOCK_MONOTONIC). Periods that were missed
    /// are merged into one interrupt and the phase is kept.
    pub fn tick(&self, cpu: u32, now_ns: u64) {
        self.change(|inner| inner.tick(cpu, Now { ns: now_ns, tsc: inner.tsc(cpu) }));
    }

    /// The local APIC's registers as in the manual, 1 KiB, as KVM gives them.
    pub fn lapic_page(&self, cpu: u32) -> Vec<u8> {
        let mut inner = self.lock();
        let now = inner.now(cpu);
        inner.lapic(cpu).map_or_else(|| vec![0; lapic::PAGE_LENGTH], |lapic| lapic.page(now))
    }

    /// Restore the registers from a page of [`Chips::lapic_page`]. The message
    /// says what is malformed; nothing has changed then.
    pub fn set_lapic_page(&self, cpu: u32, page: &[u8]) -> Result<(), String> {
        self.change(|inner| {
            let now = inner.now(cpu);
            inner.lapic(cpu).ok_or_else(|| no_cpu(cpu))?.load_page(page, now)?;
            inner.time(cpu);
            Ok(())
        })
    }

    /// Copy the whole chipset.
    pub fn state(&self) -> ChipsState {
        let inner = self.lock();
        ChipsState {
            clock_ns: inner.clock.now_ns(),
            lapics: inner.lapics.clone(),
            ioapic: inner.ioapic.clone(),
            pic: inner.pic.clone(),
            pit: inner.pit.clone(),
        }
    }

    /// Replace the whole chipset: levels come back without edges, timers go on
    /// where they were. The TSC offsets stay. The message says what is
    /// malformed; nothing has changed then.
    pub fn set_state(&self, state: &ChipsState) -> Result<(), String> {
        let mut state = state.clone();
        self.change(|inner| {
            let keep = state.lapics.is_empty();
            if keep {
                state.lapics = inner.lapics.clone();
            }
            if state.lapics.len() != inner.lapics.len() {
                return Err(format!(
                    "chipset: state of {} processors, the machine has {}",
                    state.lapics.len(),
                    inner.lapics.len()
                ));
            }
            let now = inner.clock.now_ns();
            let to = |ns: u64| now.saturating_sub(state.clock_ns.saturating_sub(ns));
            for (index, lapic) in state.lapics.iter_mut().enumerate() {
                if lapic.id as usize != index {
                    return Err(format!("local APIC {index}: its ID is {}", lapic.id));
                }
                lapic.check()?;
                if !keep {
                    lapic.rebase(to);
                }
            }
            state.ioapic.check()?;
            state.pic.check()?;
            state.pit.check()?;
            state.pit.rebase(to);
            inner.lapics = state.lapics;
            inner.ioapic = state.ioapic;
            inner.pic = state.pic;
            inner.pit = state.pit;
            inner.intr = inner.pic.output();
            for cpu in 0..inner.lapics.len() {
                inner.told[cpu] = TOLD_NOTHING;
                inner.time(cpu as u32);
                let lapic = &inner.lapics[cpu];
                if lapic.nmi || lapic.init || lapic.sipi.is_some() {
                    inner.alarmed.insert(cpu);
                }
            }
            Ok(())
        })
    }
}

fn owns_msr(index: u32) -> bool {
    matches!(index, MSR_APIC_BASE | MSR_TSC_DEADLINE | 0x800..=0x8FF)
}

/// The page offset that stands for a register: APIC_BASE can stop the timer,
/// so it and the TSC deadline are timer registers.
fn msr_offset(index: u32) -> u32 {
    if index < 0x800 {
        0x380
    } else {
        (index & 0xFF) << 4
    }
}

fn no_cpu(cpu: u32) -> String {
    format!("local APIC {cpu}: the machine has no such processor")
}

#[cfg(test)]
mod tests;
