//! The chipset as a processor and a board see it. Numbers are written again
//! from the SDM and the datasheets.
use super::*;
use crate::clock;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

const LAPIC: u64 = 0xFEE0_0000;
const IOAPIC: u64 = 0xFEC0_0000;
const SVR: u64 = LAPIC + 0xF0;
const EOI: u64 = LAPIC + 0xB0;
const ICR: u64 = LAPIC + 0x300;
const ICR_HIGH: u64 = LAPIC + 0x310;
const LVT_TIMER: u64 = LAPIC + 0x320;
const LVT_LINT0: u64 = LAPIC + 0x350;

struct Machine {
    chips: Arc<Chips>,
    kicks: Arc<Vec<AtomicU32>>,
}

impl Machine {
    /// Software-enabled local APICs.
    fn new(cpus: u32) -> Self {
        let m = Self::reset(cpus);
        for cpu in 0..cpus {
            m.write(cpu, SVR, 0x1FF);
        }
        m
    }

    fn reset(cpus: u32) -> Self {
        let kicks: Arc<Vec<AtomicU32>> = Arc::new((0..cpus).map(|_| AtomicU32::new(0)).collect());
        let told = kicks.clone();
        let chips = Chips::new(
            cpus,
            2_000_000_000,
            Box::new(move |cpu| {
                told[cpu as usize].fetch_add(1, SeqCst);
            }),
        );
        Self { chips, kicks }
    }

    fn write(&self, cpu: u32, gpa: u64, value: u32) {
        assert!(self.chips.mmio_write(cpu, gpa, 4, u64::from(value)));
    }

    fn read(&self, cpu: u32, gpa: u64) -> u64 {
        self.chips.mmio_read(cpu, gpa, 4).unwrap()
    }

    fn redirect(&self, pin: u32, low: u32, high: u32) {
        for (index, value) in [(0x11 + 2 * pin, high), (0x10 + 2 * pin, low)] {
            self.write(0, IOAPIC, index);
            self.write(0, IOAPIC + 0x10, value);
        }
    }

    fn entry(&self, pin: u32) -> u64 {
        self.write(0, IOAPIC, 0x10 + 2 * pin);
        self.read(0, IOAPIC + 0x10)
    }

    fn out(&self, port: u16, value: u8) {
        self.chips.pio_write(port, 1, u32::from(value));
    }

    fn pic_ready(&self) {
        for (port, value) in [
            (0x20, 0x11),
            (0x21, 0x08),
            (0x21, 0x04),
            (0x21, 0x01),
            (0xA0, 0x11),
            (0xA1, 0x70),
            (0xA1, 0x02),
            (0xA1, 0x01),
            (0x21, 0x00),
            (0xA1, 0x00),
        ] {
            self.out(port, value);
        }
    }

    fn kicked(&self, cpu: u32) -> u32 {
        self.kicks[cpu as usize].swap(0, SeqCst)
    }
}

#[test]
fn virtual_wire_after_reset() {
    let m = Machine::reset(2);
    m.pic_ready();
    m.chips.set_irq(4, true);
    assert!(m.chips.pending(0) && !m.chips.pending(1));
    assert_eq!(m.kicked(0), 1);
    m.chips.set_irq(5, true);
    assert_eq!(m.kicked(0), 0, "it knows already");
    assert_eq!(m.chips.ack(0), Some(0x0C));
    assert_eq!(m.chips.ack(0), None);
    m.out(0x20, 0x20);
    assert_eq!((m.kicked(0), m.chips.ack(0)), (1, Some(0x0D)));

    let m = Machine::reset(1);
    m.pic_ready();
    assert_eq!(m.chips.msr_write(0, 0x1B, 0xFEE0_0100), Some(Ok(())));
    m.chips.set_irq(1, true);
    assert_eq!(m.chips.ack(0), Some(9), "the APIC is off");

    let m = Machine::new(1);
    m.pic_ready();
    m.write(0, LVT_LINT0, 0x10700);
    m.chips.set_irq(1, true);
    assert!(!m.chips.pending(0), "LINT0 masked");
    m.write(0, LVT_LINT0, 0x700);
    assert!(m.chips.pending(0));
}

#[test]
fn lint0_as_fixed_and_nmi() {
    let m = Machine::new(1);
    m.pic_ready();
    m.write(0, LVT_LINT0, 0x55);
    m.chips.set_irq(1, true);
    assert_eq!(m.chips.ack(0), Some(0x55));
    m.chips.set_irq(1, false);
    let m = Machine::new(1);
    m.pic_ready();
    m.write(0, LVT_LINT0, 0x400);
    m.chips.set_irq(1, true);
    assert!(m.chips.take_nmi(0) && !m.chips.take_nmi(0));
}

#[test]
fn level_through_the_ioapic() {
    let m = Machine::new(2);
    m.out(0xA1, 0xFF);
    m.redirect(11, 0x8041, 1 << 24);
    m.kicked(1);
    m.chips.set_irq(11, true);
    assert_eq!((m.kicked(0), m.kicked(1)), (0, 1));
    assert_eq!(m.chips.ack(1), Some(0x41));
    assert_eq!(m.entry(11), 0xC041);
    m.write(1, EOI, 0);
    assert_eq!(m.kicked(1), 1, "the line is still up");
    assert_eq!(m.chips.ack(1), Some(0x41));
    m.chips.set_irq(11, false);
    m.write(1, EOI, 0);
    assert_eq!(m.entry(11), 0x8041);
    assert!(!m.chips.pending(1));
}

#[test]
fn a_level_waits_for_the_apic_to_be_enabled() {
    let m = Machine::reset(1);
    m.redirect(20, 0x8050, 0);
    m.chips.set_irq(20, true);
    assert!(!m.chips.pending(0));
    m.write(0, SVR, 0x1FF);
    assert_eq!(m.chips.ack(0), Some(0x50));
}

#[test]
fn gsi_map() {
    let m = Machine::new(1);
    for pin in 0..24 {
        m.redirect(pin, 0x40 + pin, 0);
    }
    m.out(0x21, 0xFF);
    for (gsi, vector) in [
        (0, Some(0x42)),
        (1, Some(0x41)),
        (2, None),
        (3, Some(0x43)),
        (16, Some(0x50)),
        (23, Some(0x57)),
        (24, None),
        (u32::MAX, None),
    ] {
        m.chips.set_irq(gsi, true);
        assert_eq!(m.chips.ack(0), vector, "gsi {gsi}");
        m.write(0, EOI, 0);
    }
}

#[test]
fn msi() {
    let m = Machine::new(3);
    m.chips.send_msi(0xFEE0_2000, 0x4061);
    assert_eq!((m.chips.ack(2), m.chips.pending(0)), (Some(0x61), false));
    m.chips.send_msi(0xFEEF_F000, 0x62);
    assert!((0..2).all(|cpu| m.chips.ack(cpu) == Some(0x62)));
    m.chips.send_msi(0xFED0_0000, 0x63);
    m.chips.send_msi(0x1_FEE0_0000, 0x63);
    assert!(!m.chips.pending(0));
    m.chips.send_msi(0xFEE0_1000, 0x400);
    assert!(m.chips.take_nmi(1) && !m.chips.take_nmi(0));
    // Lowest priority, logical, redirection hint: the idle one of 0 and 1.
    for cpu in 0..3 {
        m.write(cpu, LAPIC + 0xD0, 1 << (24 + cpu));
        m.write(cpu, EOI, 0);
    }
    m.chips.set_cr8(0, 5);
    m.chips.send_msi(0xFEE0_300C, 0x163);
    assert_eq!((m.chips.pending(0), m.chips.ack(1)), (false, Some(0x63)));
}

#[test]
fn ipis() {
    let m = Machine::new(3);
    for cpu in 0..3 {
        m.kicked(cpu);
    }
    m.write(0, ICR_HIGH, 2 << 24);
    m.write(0, ICR, 0x40F1);
    assert_eq!((m.kicked(1), m.kicked(2), m.chips.ack(2)), (0, 1, Some(0xF1)));
    m.write(0, ICR, 0xC_40F2); // all but self
    assert_eq!((m.chips.ack(0), m.chips.ack(1)), (None, Some(0xF2)));
    m.write(0, ICR, 0x4_40F3); // self
    assert_eq!(m.chips.ack(0), Some(0xF3));
    m.write(1, ICR, 0x8_4450); // NMI to all
    assert!((0..3).all(|cpu| m.chips.take_nmi(cpu)));
    m.write(0, ICR_HIGH, 0xFF << 24);
    m.write(0, ICR, 0x4031);
    assert_eq!(m.read(0, LAPIC + 0x210) >> 0x11 & 1, 1, "broadcast includes self");
}

#[test]
fn init_and_startup() {
    let m = Machine::new(2);
    m.write(1, LVT_TIMER, 0x20040);
    m.kicked(1);
    m.write(0, ICR_HIGH, 1 << 24);
    m.write(0, ICR, 0xC500);
    assert_eq!(m.kicked(1), 1);
    m.write(0, ICR, 0x8500); // de-assert: nothing
    m.write(0, ICR, 0x4699);
    assert_eq!(m.chips.take_sipi(1), None, "INIT comes first");
    assert!(m.chips.take_init(1) && !m.chips.take_init(1));
    assert_eq!(m.read(1, LVT_TIMER), 0x10000);
    assert_eq!(m.read(1, SVR), 0xFF);
    assert_eq!(m.chips.take_sipi(1), Some(0x99));
    m.write(0, ICR, 0x4699);
    assert_eq!(m.chips.take_sipi(1), None, "it runs");
    assert!(!m.chips.waits_for_sipi(1) && !m.chips.waits_for_sipi(0));

    let m = Machine::reset(2);
    m.write(0, SVR, 0x1FF);
    m.write(0, ICR, 0xC_4608); // SIPI without INIT reaches an AP after reset
    assert_eq!(m.chips.take_sipi(1), Some(8));
}

#[test]
fn x2apic_ipi() {
    let m = Machine::new(2);
    for cpu in 0..2 {
        let base = 0xFEE0_0C00 | if cpu == 0 { 0x100 } else { 0 };
        assert_eq!(m.chips.msr_write(cpu, 0x1B, base), Some(Ok(())));
    }
    assert_eq!(m.chips.mmio_read(0, LAPIC + 0x20, 4), Some(0xFFFF_FFFF));
    assert_eq!(m.chips.msr_write(0, 0x830, 1 << 32 | 0x71), Some(Ok(())));
    assert_eq!(m.chips.ack(1), Some(0x71));
    assert_eq!(m.chips.msr_write(1, 0x80B, 0), Some(Ok(())));
    assert_eq!(m.chips.msr_write(0, 0x830, 2 << 32 | 0x872), Some(Ok(())));
    assert_eq!(m.chips.ack(1), Some(0x72), "logical cluster 0, bit 1");
    assert_eq!(m.chips.msr_write(1, 0x80B, 0), Some(Ok(())));
    assert_eq!(m.chips.msr_write(0, 0x830, 0xFFFF_FFFF << 32 | 0x73), Some(Ok(())));
    assert_eq!((m.chips.ack(0), m.chips.ack(1)), (Some(0x73), Some(0x73)));
    assert_eq!(m.chips.msr_write(0, 0x802, 1), Some(Err(Gp)));
    assert_eq!(m.chips.msr_read(0, 0x1A), None);
    assert_eq!(m.chips.msr_read(9, 0x1B), Some(Err(Gp)));
    assert_eq!(m.chips.msr_write(1, 0x80B, 0), Some(Ok(())));
    m.redirect(5, 0x44, 1 << 24);
    m.chips.set_irq(5, true);
    assert!(m.chips.pending(1));
}

#[test]
fn deadlines_and_kicks() {
    let m = Machine::new(1);
    let now = clock::now_ns();
    assert_eq!(m.chips.next_deadline_ns(0), None);
    m.kicked(0);
    m.write(0, LAPIC + 0x3E0, 0xB);
    m.write(0, LVT_TIMER, 0x40);
    m.write(0, LAPIC + 0x380, 1_000_000_000);
    assert_eq!(m.kicked(0), 1);
    let at = m.chips.next_deadline_ns(0).unwrap();
    assert!(at >= now + 1_000_000_000);
    m.write(0, LAPIC + 0x380, 2_000_000_000);
    assert_eq!(m.kicked(0), 0, "it moved later");
    m.write(0, LAPIC + 0x380, 500_000_000);
    assert_eq!(m.kicked(0), 1);
    m.chips.tick(0, now);
    assert!(!m.chips.pending(0));
    m.chips.tick(0, at);
    assert_eq!((m.kicked(0), m.chips.ack(0)), (1, Some(0x40)));

    // The PIT is processor 0's.
    m.out(0x21, 0xFF);
    m.redirect(2, 0x30, 0);
    m.write(0, EOI, 0);
    for (port, value) in [(0x43, 0x34), (0x40, 0xA9), (0x40, 0x04)] {
        m.out(port, value);
    }
    let at = m.chips.next_deadline_ns(0).unwrap();
    m.chips.tick(0, at);
    assert_eq!(m.chips.ack(0), Some(0x30));
    let next = m.chips.next_deadline_ns(0).unwrap();
    assert!((next - at).abs_diff(1193 * 1_000_000_000 / 1_193_182) < 2);
}

#[test]
fn tsc_deadline_uses_the_offset() {
    let m = Machine::new(1);
    m.chips.set_tsc_offset(0, -(clock::rdtsc() as i64));
    m.write(0, LVT_TIMER, 0x40040);
    assert_eq!(m.chips.msr_write(0, 0x6E0, 1 << 50), Some(Ok(())));
    assert_eq!(m.chips.msr_read(0, 0x6E0), Some(Ok(1 << 50)));
    assert!(m.chips.next_deadline_ns(0).is_some());
    assert_eq!(m.chips.msr_write(0, 0x6E0, 1), Some(Ok(())));
    assert_eq!(m.chips.ack(0), Some(0x40));
    assert_eq!(m.chips.msr_read(0, 0x6E0), Some(Ok(0)));
    assert_eq!(m.chips.next_deadline_ns(0), None);
    m.chips.load_msr(0, 0x6E0, 77).unwrap();
    assert!(m.chips.load_msr(0, 0x1B, 1).is_err() && m.chips.load_msr(4, 0x1B, 0).is_err());
}

#[test]
fn what_counts_on_the_host_clock_can_be_delayed() {
    let m = Machine::new(1);
    m.redirect(2, 0x30, 0);
    for (port, value) in [(0x43, 0x34), (0x40, 0xA9), (0x40, 0x04)] {
        m.out(port, value);
    }
    let pit = m.chips.next_deadline_ns(0).unwrap();
    m.chips.delay(0, 5_000_000_000);
    assert_eq!(m.chips.next_deadline_ns(0), Some(pit + 5_000_000_000));
    m.chips.tick(0, pit);
    assert_eq!(m.chips.ack(0), None);

    m.write(0, LVT_TIMER, 0x40);
    m.write(0, LAPIC + 0x3E0, 0xB);
    m.write(0, LAPIC + 0x380, 1_000_000);
    let lapic = m.chips.next_deadline_ns(0).unwrap();
    m.chips.delay(0, -1000);
    assert_eq!(m.chips.next_deadline_ns(0), Some(lapic - 1000));
}

#[test]
fn state_round_trip_makes_no_edge() {
    let m = Machine::new(2);
    m.pic_ready();
    m.redirect(9, 0x8033, 0);
    m.redirect(6, 0x36, 0);
    m.chips.set_irq(9, true);
    m.chips.set_irq(6, true);
    assert_eq!(m.chips.ack(0), Some(0x71), "the PIC comes first");
    while m.chips.ack(0).is_some() {}
    for (port, value) in [(0x43, 0x34), (0x40, 0xA9), (0x40, 0x04)] {
        m.out(port, value);
    }
    let saved = m.chips.state();

    let n = Machine::reset(2);
    n.chips.set_state(&saved).unwrap();
    let ChipsState { lapics, ioapic, pic, .. } = n.chips.state();
    assert_eq!((&ioapic, &pic, lapics[1].id), (&saved.ioapic, &saved.pic, 1));
    assert_eq!(n.kicked(0), 1, "a deadline is new to it");
    let pending = n.chips.pending(0);
    n.chips.set_irq(9, true);
    n.chips.set_irq(6, true);
    assert_eq!(n.chips.pending(0), pending, "levels again, no edges");
    assert_eq!(n.chips.lapic_page(0), m.chips.lapic_page(0));

    assert!(Machine::reset(1).chips.set_state(&saved).unwrap_err().contains("2 processors"));
    let mut swapped = saved.clone();
    swapped.lapics.swap(0, 1);
    assert!(n.chips.set_state(&swapped).unwrap_err().contains("ID"));
    let mut times = saved;
    times.clock_ns = u64::MAX;
    n.chips.set_state(&times).unwrap();
    n.chips.tick(0, u64::MAX);
}

#[test]
fn pages_and_ports() {
    let m = Machine::new(1);
    assert!(m.chips.owns_gpa(LAPIC + 0xFFF) && m.chips.owns_gpa(IOAPIC) && !m.chips.owns_gpa(0xFEE0_1000));
    assert_eq!(m.chips.mmio_read(0, 0x1000, 4), None);
    assert!(!m.chips.mmio_write(0, 0x1000, 4, 0));
    assert_eq!(m.chips.msr_write(0, 0x1B, 0xD000_0900), Some(Ok(())));
    assert!(m.chips.owns_gpa(0xD000_0000));
    assert_eq!(m.chips.mmio_read(0, 0xD000_0030, 4), Some(0x50014));
    assert_eq!(m.chips.mmio_read(0, LAPIC, 2), Some(0xFFFF));
    assert_eq!(m.chips.mmio_read(7, LAPIC, 8), Some(u64::MAX));
    let owned: Vec<u16> = (0..=u16::MAX).filter(|&port| Chips::owns_port(port)).collect();
    assert_eq!(owned, [0x20, 0x21, 0x40, 0x41, 0x42, 0x43, 0x61, 0xA0, 0xA1, 0x4D0, 0x4D1]);
    m.chips.pio_write(0x20, 2, 0x0011);
    assert_eq!(m.chips.pio_read(0x21, 4) >> 8, 0xFF_FFFF);
    for size in 0..=255 {
        m.chips.pio_read(0x43, size);
        m.chips.mmio_read(0, IOAPIC + 0x10, size);
        m.chips.pio_write(0xFFFF, size, 0);
    }
}

#[test]
fn processors_that_do_not_exist() {
    let m = Machine::new(1);
    let cpu = u32::MAX;
    m.chips.tick(cpu, 5);
    m.chips.set_cr8(cpu, 5);
    assert!(!m.chips.pending(cpu) && !m.chips.take_nmi(cpu) && !m.chips.take_init(cpu));
    assert_eq!((m.chips.ack(cpu), m.chips.take_sipi(cpu), m.chips.next_deadline_ns(cpu)), (None, None, None));
    assert_eq!(m.chips.lapic_page(cpu).len(), 1024);
    assert!(m.chips.set_lapic_page(cpu, &[0; 1024]).is_err());
    assert_eq!(m.chips.msr_read(cpu, 0x6E0), Some(Err(Gp)));
}
