//! 82093AA IOAPIC at gpa 0xFEC00000, 24 pins.
//!
//! Spec: Intel 82093AA I/O Advanced Programmable Interrupt Controller, 3.
//!
//! | offset | register | meaning                                     |
//! |--------|----------|---------------------------------------------|
//! | 0x00   | IOREGSEL | index of the register behind IOWIN          |
//! | 0x10   | IOWIN    | 0 ID, 1 version (0x00170011), 2 arbitration |
//! |        |          | 0x10 + 2n / 0x11 + 2n redirection entry n   |
//!
//! Entry: vector 0-7, delivery mode 8-10, logical 11, delivery status 12 (ro),
//! active low 13, remote IRR 14 (ro), level 15, mask 16, destination 56-63.
//!
//! A line says whether the device asserts its interrupt, so the polarity bit is
//! kept and has no effect, as in KVM: board and guest would only have to agree
//! on an inversion twice. An edge on a masked pin is lost, a level waits. A
//! level that no local APIC accepts waits for the next change.
//!
//! Not modelled: SMI, ExtINT through a pin, the EOI register of later versions,
//! extended destination IDs, a delay against storms of level interrupts.
//! Hostile guest: an index that names no register reads zero, writes nothing.
use super::Message;
use serde::{Deserialize, Serialize};

/// Input pins.
pub(super) const PINS: u32 = 24;
const VERSION: u32 = (PINS - 1) << 16 | 0x11;

const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASK: u64 = 1 << 16;
const WRITABLE: u64 = 0xFF00_0000_0001_AFFF;

/// All registers of the IOAPIC, and the levels of its pins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ioapic {
    /// IOAPIC ID, 4 bits.
    pub id: u8,
    /// IOREGSEL.
    pub select: u8,
    /// Redirection entries.
    pub entries: [u64; PINS as usize],
    /// Asserted pins, one bit each.
    pub lines: u32,
}

/// Which entry a register index from 0x10 to 0x3F is half of.
fn entry(index: u8) -> usize {
    usize::from((index - 0x10) / 2)
}

impl Ioapic {
    pub(super) fn new() -> Self {
        Self { id: 0, select: 0, entries: [MASK; PINS as usize], lines: 0 }
    }

    /// Drive a pin (below 24); true when it has an edge to deliver or a level
    /// to look at.
    pub(super) fn set_line(&mut self, pin: u32, level: bool) -> bool {
        let was = self.lines >> pin & 1 == 1;
        self.lines = self.lines & !(1 << pin) | u32::from(level) << pin;
        if !level || self.entries[pin as usize] & MASK != 0 {
            return false;
        }
        if self.entries[pin as usize] & LEVEL == 0 {
            !was
        } else {
            self.waiting(pin)
        }
    }

    /// An unmasked, asserted level that no local APIC holds.
    pub(super) fn waiting(&self, pin: u32) -> bool {
        self.lines >> pin & 1 == 1 && self.entries[pin as usize] & (LEVEL | MASK | REMOTE_IRR) == LEVEL
    }

    /// What the pin sends.
    pub(super) fn message(&self, pin: u32) -> Message {
        let e = self.entries[pin as usize];
        let dest = (e >> 56) as u32;
        Message {
            dest,
            broadcast: dest == 0xFF,
            logical: e >> 11 & 1 == 1,
            mode: (e >> 8 & 7) as u8,
            vector: e as u8,
            level: e & LEVEL != 0,
        }
    }

    /// A local APIC accepted the pin's message.
    pub(super) fn accepted(&mut self, pin: u32) {
        let e = &mut self.entries[pin as usize];
        if *e & LEVEL != 0 {
            *e |= REMOTE_IRR;
        }
    }

    /// EOI of a level-triggered vector.
    pub(super) fn eoi(&mut self, vector: u8) {
        for e in &mut self.entries {
            if *e & LEVEL != 0 && *e as u8 == vector {
                *e &= !REMOTE_IRR;
            }
        }
    }

    pub(super) fn read(&self, offset: u32) -> u32 {
        match (offset, self.select) {
            (0x00, index) => u32::from(index),
            (0x10, 0 | 2) => u32::from(self.id) << 24,
            (0x10, 1) => VERSION,
            (0x10, index @ 0x10..=0x3F) => (self.entries[entry(index)] >> ((index & 1) * 32)) as u32,
            _ => 0,
        }
    }

    /// Store; levels may be [`Ioapic::waiting`] afterwards.
    pub(super) fn write(&mut self, offset: u32, value: u32) {
        match (offset, self.select) {
            (0x00, _) => self.select = value as u8,
            (0x10, 0) => self.id = (value >> 24) as u8 & 0xF,
            (0x10, index @ 0x10..=0x3F) => {
                let e = &mut self.entries[entry(index)];
                let shift = (index & 1) * 32;
                let writable = WRITABLE & 0xFFFF_FFFF << shift;
                *e = *e & !writable | u64::from(value) << shift & writable;
                if *e & LEVEL == 0 {
                    *e &= !REMOTE_IRR;
                }
            }
            _ => {}
        }
    }

    /// Whether a state that came from outside can be this IOAPIC's.
    pub(super) fn check(&self) -> Result<(), String> {
        if let Some((pin, e)) = (0..).zip(self.entries).find(|(_, e)| e & !(WRITABLE | REMOTE_IRR) != 0) {
            return Err(format!("IOAPIC: redirection entry {pin} is {e:#x}, which has reserved bits"));
        }
        if self.lines >> PINS != 0 || self.id > 0xF {
            return Err(format!(
                "IOAPIC: lines {:#x} or ID {} name more than there are",
                self.lines, self.id
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(io: &mut Ioapic, index: u32, value: u32) {
        io.write(0x00, index);
        io.write(0x10, value);
    }

    fn get(io: &mut Ioapic, index: u32) -> u32 {
        io.write(0x00, index);
        io.read(0x10)
    }

    #[test]
    fn registers() {
        let mut io = Ioapic::new();
        assert_eq!(get(&mut io, 1), 0x0017_0011);
        assert_eq!(get(&mut io, 0x10), 0x0001_0000);
        set(&mut io, 0, 0x0F00_0000);
        assert_eq!((get(&mut io, 0), get(&mut io, 2)), (0x0F00_0000, 0x0F00_0000));
        set(&mut io, 0x3E, 0xFFFF_FFFF);
        set(&mut io, 0x3F, 0xFFFF_FFFF);
        assert_eq!((get(&mut io, 0x3E), get(&mut io, 0x3F)), (0x1AFFF, 0xFF00_0000));
        for index in 0..=0xFF {
            set(&mut io, index, 0x1234_5678);
            get(&mut io, index);
        }
        assert_eq!(get(&mut io, 0x40), 0);
        io.write(0x40, 1);
    }

    #[test]
    fn edge() {
        let mut io = Ioapic::new();
        assert!(!io.set_line(4, true), "masked: lost");
        set(&mut io, 0x18, 0x30);
        set(&mut io, 0x19, 0x0300_0000);
        assert!(!io.set_line(4, true), "no edge");
        assert!(!io.set_line(4, false));
        assert!(io.set_line(4, true));
        let m = io.message(4);
        assert_eq!((m.vector, m.dest, m.mode, m.level, m.logical), (0x30, 3, 0, false, false));
        io.accepted(4);
        assert_eq!(get(&mut io, 0x18), 0x30);
    }

    #[test]
    fn level() {
        let mut io = Ioapic::new();
        io.set_line(10, true);
        set(&mut io, 0x24, 0x8040);
        assert!(io.waiting(10));
        io.accepted(10);
        assert_eq!(get(&mut io, 0x24), 0xC040);
        assert!(!io.waiting(10));
        assert!(!io.set_line(10, true));
        io.eoi(0x41);
        assert!(!io.waiting(10));
        io.eoi(0x40);
        assert!(io.waiting(10), "still asserted");
        io.accepted(10);
        set(&mut io, 0x24, 0x0040);
        assert_eq!(get(&mut io, 0x24), 0x0040, "edge mode clears remote IRR");
    }

    #[test]
    fn malformed_state() {
        let mut io = Ioapic::new();
        io.entries[7] = 1 << 20;
        assert!(io.check().unwrap_err().contains("entry 7"));
        let mut io = Ioapic::new();
        io.lines = 1 << 24;
        assert!(io.check().is_err());
    }
}
