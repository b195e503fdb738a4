//! Register tests of the local APIC; constants written again from the SDM.
use super::*;
use crate::chips::MIN_PERIOD_NS;

// Written again from the SDM.
const TPR: u32 = 0x80;
const PPR: u32 = 0xA0;
const EOI: u32 = 0xB0;
const LDR: u32 = 0xD0;
const DFR: u32 = 0xE0;
const SVR: u32 = 0xF0;
const ISR1: u32 = 0x110;
const IRR1: u32 = 0x210;
const ESR: u32 = 0x280;
const ICR_LOW: u32 = 0x300;
const LVT_TIMER: u32 = 0x320;
const LVT_LINT0: u32 = 0x350;
const LVT_ERROR: u32 = 0x370;
const INITIAL: u32 = 0x380;
const CURRENT: u32 = 0x390;
const DIVIDE: u32 = 0x3E0;

fn at(ns: u64) -> Now {
    Now { ns, tsc: ns.wrapping_mul(2) }
}

fn on() -> Lapic {
    let mut l = Lapic::new(0);
    assert_eq!(l.write(SVR, 4, 0x1FF, at(0)), Effect::Enabled);
    l
}

#[test]
fn reset_values() {
    let mut l = Lapic::new(3);
    assert_eq!(l.base, 0xFEE0_0800);
    assert_eq!(l.read(0x20, 4, at(0)), 3 << 24);
    assert_eq!(l.read(0x30, 4, at(0)), 0x50014);
    assert_eq!(l.read(SVR, 4, at(0)), 0xFF);
    assert_eq!(l.read(DFR, 4, at(0)), 0xFFFF_FFFF);
    for lvt in (LVT_TIMER..=LVT_ERROR).step_by(16) {
        assert_eq!(l.read(lvt, 4, at(0)), 0x10000);
    }
    let mut b = Lapic::new(0);
    assert_eq!(b.base, 0xFEE0_0900);
    assert_eq!(b.read(LVT_LINT0, 4, at(0)), 0x700);
    assert!(b.takes_pic() && !l.takes_pic());
}

#[test]
fn priorities_and_eoi() {
    let mut l = on();
    assert!(l.accept(0x31, false) && l.accept(0x35, true));
    assert_eq!(l.read(IRR1, 4, at(0)), 1 << 0x11 | 1 << 0x15);
    assert_eq!(l.ack(), Some(0x35));
    assert_eq!(l.read(ISR1, 4, at(0)), 1 << 0x15);
    assert_eq!(l.read(PPR, 4, at(0)), 0x30);
    assert_eq!(l.deliverable(), None);
    l.accept(0x41, false);
    assert_eq!(l.ack(), Some(0x41));
    assert_eq!(l.write(EOI, 4, 0, at(0)), Effect::None);
    assert_eq!(l.write(EOI, 4, 0, at(0)), Effect::Eoi(0x35));
    l.write(TPR, 4, 0x30, at(0));
    assert_eq!((l.deliverable(), l.cr8()), (None, 3));
    l.set_cr8(2);
    assert_eq!(l.ack(), Some(0x31));
    assert_eq!(l.write(EOI, 4, 0, at(0)), Effect::None);
    assert_eq!(l.write(EOI, 4, 0, at(0)), Effect::None);
}

#[test]
fn disabled_accepts_nothing_and_masks_its_lvts() {
    let mut l = on();
    l.write(LVT_TIMER, 4, 0x40, at(0));
    l.write(SVR, 4, 0xFF, at(0));
    assert!(!l.accept(0x50, false));
    assert_eq!(l.read(LVT_TIMER, 4, at(0)), 0x10040);
    l.write(LVT_LINT0, 4, 0x700, at(0));
    assert_eq!(l.read(LVT_LINT0, 4, at(0)), 0x10700);
    assert!(!l.takes_pic());
}

#[test]
fn illegal_vectors_end_in_esr() {
    let mut l = on();
    l.write(LVT_ERROR, 4, 0xFE, at(0));
    l.accept(3, false);
    assert_eq!(l.read(ESR, 4, at(0)), 0);
    l.write(ESR, 4, 0, at(0));
    assert_eq!(l.read(ESR, 4, at(0)), 1 << 6);
    assert_eq!(l.ack(), Some(0xFE));
    assert_eq!(l.write(ICR_LOW, 4, 0x0F, at(0)), Effect::None);
    l.write(ESR, 4, 0, at(0));
    assert_eq!(l.read(ESR, 4, at(0)), 1 << 5);
    assert_eq!(l.write(ICR_LOW, 4, 0x4041, at(0)), Effect::Ipi);
}

#[test]
fn one_shot_counts_down_once() {
    let mut l = on();
    l.write(LVT_TIMER, 4, 0x40, at(0));
    l.write(DIVIDE, 4, 0x3, at(0)); // by 16
    l.write(INITIAL, 4, 1000, at(100));
    assert_eq!(l.deadline_ns(at(100), 1), Some(16_100));
    assert_eq!(l.read(CURRENT, 4, at(100 + 160)), 990);
    l.tick(at(16_099));
    assert_eq!(l.deliverable(), None);
    l.tick(at(16_100));
    assert_eq!(l.ack(), Some(0x40));
    assert_eq!(l.deadline_ns(at(16_100), 1), None);
    assert_eq!(l.read(CURRENT, 4, at(20_000)), 0);
}

#[test]
fn dividers_of_the_manual() {
    let mut l = on();
    for (code, by) in [
        (0b0000, 2),
        (0b0001, 4),
        (0b0010, 8),
        (0b0011, 16),
        (0b1000, 32),
        (0b1001, 64),
        (0b1010, 128),
        (0b1011, 1),
    ] {
        l.write(DIVIDE, 4, code, at(0));
        assert_eq!(l.divider(), by, "{code:#b}");
    }
}

#[test]
fn periodic_merges_what_was_missed_and_keeps_phase() {
    let mut l = on();
    l.write(LVT_TIMER, 4, 0x20040, at(0));
    l.write(DIVIDE, 4, 0xB, at(0));
    l.write(INITIAL, 4, 1_000_000, at(0));
    l.tick(at(5_300_000));
    assert_eq!(l.ack(), Some(0x40));
    assert_eq!(l.deadline_ns(at(5_300_000), 1), Some(6_000_000));
    assert_eq!(l.read(CURRENT, 4, at(5_300_000)), 700_000);
}

#[test]
fn a_period_of_one_nanosecond_is_tamed() {
    let mut l = on();
    l.write(LVT_TIMER, 4, 0x20040, at(0));
    l.write(DIVIDE, 4, 0xB, at(0));
    l.write(INITIAL, 4, 1, at(0));
    assert_eq!(l.deadline_ns(at(0), 1), Some(MIN_PERIOD_NS));
}

#[test]
fn tsc_deadline() {
    let mut l = on();
    l.set_tsc_deadline(5, at(10));
    assert_eq!(l.tsc_deadline(at(10)), 0, "ignored in one-shot mode");
    l.write(LVT_TIMER, 4, 0x40040, at(0));
    l.set_tsc_deadline(1000, at(10));
    assert_eq!(l.deadline_ns(at(10), 2_000_000_000), Some(500));
    l.tick(at(499));
    assert_eq!(l.deliverable(), None);
    l.tick(at(500));
    assert_eq!(l.ack(), Some(0x40));
    assert_eq!(l.tsc_deadline(at(501)), 0);
    l.write(EOI, 4, 0, at(502));
    l.set_tsc_deadline(7, at(600));
    assert_eq!(l.ack(), Some(0x40), "a deadline in the past fires at once");
    l.set_tsc_deadline(u64::MAX, at(600));
    assert_eq!(l.deadline_ns(at(600), 1), Some(u64::MAX));
    l.write(LVT_TIMER, 4, 0x40, at(700));
    assert_eq!(l.tsc_deadline(at(700)), 0, "another mode disarms");
}

#[test]
fn masked_timer_does_not_fire_when_unmasked_late() {
    let mut l = on();
    l.write(LVT_TIMER, 4, 0x10040, at(0));
    l.write(INITIAL, 4, 100, at(0));
    assert_eq!(l.deadline_ns(at(0), 1), None);
    l.write(LVT_TIMER, 4, 0x40, at(10_000));
    l.tick(at(10_001));
    assert_eq!(l.deliverable(), None);
}

#[test]
fn logical_destinations() {
    let mut l = on();
    l.write(LDR, 4, 0x0200_0000, at(0));
    assert!(l.matches(0x03, true) && !l.matches(0x04, true));
    l.write(DFR, 4, 0x0FFF_FFFF, at(0));
    l.write(LDR, 4, 0x3200_0000, at(0));
    assert!(l.matches(0x3E, true) && !l.matches(0x2E, true) && !l.matches(0x31, true));
    let mut x = Lapic::new(0x25);
    x.set_base(0xFEE0_0C00).unwrap();
    assert_eq!(x.read_x2(0x80D, at(0)), Ok(0x0002_0020));
    assert!(x.matches(0x0002_0021, true) && !x.matches(0x0001_0020, true) && x.matches(0x25, false));
}

#[test]
fn mode_transitions() {
    let mut l = Lapic::new(1);
    assert_eq!(l.set_base(0xFEE0_0400), Err(Gp), "EXTD without EN");
    assert_eq!(l.set_base(0xFEE0_0801), Err(Gp), "reserved bit");
    assert_eq!(l.set_base(1 << 52 | 0x800), Err(Gp), "address too wide");
    assert_eq!(l.read_x2(0x802, at(0)), Err(Gp), "not in x2APIC mode");
    assert_eq!(l.set_base(0xFEE0_0C00), Ok(()));
    assert_eq!(l.mmio_page(), None);
    assert_eq!(l.read_x2(0x802, at(0)), Ok(1));
    assert_eq!(l.set_base(0xFEE0_0800), Err(Gp), "x2APIC to xAPIC");
    assert_eq!(l.set_base(0xFEE0_0000), Ok(()));
    assert_eq!(l.set_base(0xFEE0_0C00), Err(Gp), "off to x2APIC");
    assert_eq!(l.set_base(0xFED0_0900), Ok(()), "moved; BSP is not the guest's");
    assert_eq!((l.mmio_page(), l.bsp()), (Some(0xFED0_0000), false));
}

#[test]
fn x2apic_faults() {
    let mut l = on();
    l.set_base(0xFEE0_0D00).unwrap();
    for (index, value) in [
        (0x802, 0),
        (0x80B, 1),
        (0x80D, 0),
        (0x80E, 0),
        (0x808, 0x100),
        (0x80F, 0x200),
        (0x828, 1),
        (0x831, 0),
        (0x832, 1 << 20),
        (0x839, 0),
        (0x8FF, 0),
        (0x830, 1 << 13),
    ] {
        assert_eq!(l.write_x2(index, value, at(0)), Err(Gp), "{index:#x}");
    }
    for index in [0x800, 0x80B, 0x809, 0x80E, 0x831, 0x83F, 0x8FF] {
        assert_eq!(l.read_x2(index, at(0)), Err(Gp), "{index:#x}");
    }
    assert_eq!(l.write_x2(0x83F, 0x77, at(0)), Ok(Effect::None));
    assert_eq!(l.ack(), Some(0x77));
    assert_eq!(l.write_x2(0x80B, 0, at(0)), Ok(Effect::None));
    assert_eq!(l.write_x2(0x830, 5 << 32 | 0x4050, at(0)), Ok(Effect::Ipi));
    assert_eq!(l.icr, 5 << 32 | 0x4050);
}

#[test]
fn every_register_with_any_value_is_harmless() {
    let mut l = on();
    for x2 in [false, true] {
        for offset in 0..0x1000 {
            for value in [0, 1, 0xFFFF_FFFF, 0x5555_5555] {
                for size in [1, 2, 4, 8] {
                    l.write(offset, size, value, at(1));
                    l.read(offset, size, at(u64::MAX));
                    l.tick(at(u64::MAX / 2));
                    l.deadline_ns(at(3), 0);
                }
                let _ = l.write_x2(0x800 + (offset & 0xFF), value, at(1));
                let _ = l.read_x2(0x800 + (offset & 0xFF), at(2));
            }
        }
        if !x2 {
            l.set_base(0xFEE0_0C00).unwrap();
        }
    }
}

#[test]
fn page_round_trip() {
    let mut l = on();
    l.write(LVT_TIMER, 4, 0x20040, at(0));
    l.write(DIVIDE, 4, 0xB, at(0));
    l.write(INITIAL, 4, 1_000_000, at(0));
    l.accept(0x55, true);
    l.accept(0x66, false);
    l.ack();
    l.write(0x310, 4, 0x0300_0000, at(0));
    let page = l.page(at(250_000));
    let mut other = Lapic::new(0);
    other.load_page(&page, at(9_000_000)).unwrap();
    assert_eq!(other.page(at(9_000_000)), page);
    assert_eq!(other.deadline_ns(at(9_000_000), 1), Some(9_750_000));

    assert!(Lapic::new(1).load_page(&page, at(0)).unwrap_err().contains("ID 0"));
    assert!(other.load_page(&page[1..], at(0)).unwrap_err().contains("1023"));
    for (offset, value) in [(0x100usize, 1u8), (0x200, 1), (0xF2, 1), (0x3E0, 0xFF), (0x323, 0xFF)] {
        let mut bad = page.clone();
        bad[offset] = value;
        let before = other.clone();
        assert!(other.load_page(&bad, at(0)).unwrap_err().contains("reserved"), "{offset:#x}");
        assert_eq!(other, before);
    }
}
