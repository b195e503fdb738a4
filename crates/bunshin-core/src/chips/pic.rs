//! Two 8259A interrupt controllers, the slave on the master's IR2.
//!
//! Spec: Intel 8259A datasheet (order 231468-003); ELCR as in the 82371AB.
//!
//! | port        | write                        | read               |
//! |-------------|------------------------------|--------------------|
//! | 0x20, 0xA0  | ICW1 (bit 4), OCW3 (bit 3),  | IRR, ISR or poll   |
//! |             | OCW2                         |                    |
//! | 0x21, 0xA1  | ICW2, ICW3, ICW4, then OCW1  | IMR                |
//! | 0x4D0,0x4D1 | ELCR: bit set = level        | ELCR               |
//!
//! Modelled: fully nested and special fully nested mode, rotation, special
//! mask, automatic EOI, poll, spurious IR7, single mode's ICW sequence.
//! An edge stays latched when the line falls before it is acknowledged (QEMU
//! and KVM do the same; hardware gives a spurious IR7). The slave's output is
//! a level into the master.
//!
//! Not modelled: 8080 mode, buffered mode, ICW1's LTIM (ELCR decides), ICW3
//! (the cascade is wired to IR2). Hostile guest: all values are masked; a
//! half-done ICW sequence only waits.
use serde::{Deserialize, Serialize};

/// One 8259A. Plain state.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chip {
    /// Requests.
    pub irr: u8,
    /// In service.
    pub isr: u8,
    /// Masked inputs.
    pub imr: u8,
    /// Levels of the inputs.
    pub lines: u8,
    /// Level-triggered inputs.
    pub elcr: u8,
    /// Vector of IR0.
    pub base: u8,
    /// Input with the highest priority.
    pub first: u8,
    /// Next ICW expected (2, 3, 4), or 0.
    pub icw: u8,
    /// ICW1 announced an ICW4.
    pub icw4: bool,
    /// ICW1 said that there is no slave.
    pub single: bool,
    /// Reads give ISR in place of IRR.
    pub read_isr: bool,
    /// The next read polls.
    pub poll: bool,
    /// Special mask mode.
    pub special_mask: bool,
    /// Special fully nested mode.
    pub special_nested: bool,
    /// Interrupts end when they are taken.
    pub auto_eoi: bool,
    /// Priorities rotate with automatic EOI.
    pub rotate_auto: bool,
}

impl Chip {
    /// Distance of the set bit with the highest priority; 8 when none is set.
    fn rank(&self, bits: u8) -> u32 {
        bits.rotate_right(u32::from(self.first)).trailing_zeros()
    }

    fn input(&self, rank: u32) -> u8 {
        (rank as u8 + self.first) & 7
    }

    /// The input that asks for service.
    fn request(&self, master: bool) -> Option<u8> {
        let rank = self.rank(self.irr & !self.imr);
        let mut busy = self.isr;
        if self.special_mask {
            busy &= !self.imr;
        }
        if self.special_nested && master {
            busy &= !(1 << CASCADE);
        }
        (rank < 8 && rank < self.rank(busy)).then(|| self.input(rank))
    }

    fn ack(&mut self, input: u8) {
        let bit = 1 << input;
        if !self.auto_eoi {
            self.isr |= bit;
        } else if self.rotate_auto {
            self.first = (input + 1) & 7;
        }
        if self.elcr & bit == 0 {
            self.irr &= !bit;
        }
    }

    fn set_line(&mut self, input: u8, level: bool) {
        let bit = 1 << input;
        if level {
            if (self.elcr | !self.lines) & bit != 0 {
                self.irr |= bit;
            }
            self.lines |= bit;
        } else {
            self.lines &= !bit;
            self.irr &= !(bit & self.elcr);
        }
    }

    fn set_elcr(&mut self, value: u8) {
        self.elcr = value;
        self.irr = self.irr & !value | self.lines & value;
    }

    fn command(&mut self, value: u8) {
        if value & 0x10 != 0 {
            // ICW1: an edge must come anew, a level is still there.
            let Self { elcr, lines, base, .. } = *self;
            *self = Self { elcr, lines, base, irr: lines & elcr, icw: 2, ..Self::default() };
            self.icw4 = value & 1 != 0;
            self.single = value & 2 != 0;
        } else if value & 0x08 != 0 {
            // OCW3.
            self.poll = value & 4 != 0;
            if value & 2 != 0 {
                self.read_isr = value & 1 != 0;
            }
            if value & 0x40 != 0 {
                self.special_mask = value & 0x20 != 0;
            }
        } else {
            self.ocw2(value >> 5, value & 7);
        }
    }

    fn ocw2(&mut self, command: u8, level: u8) {
        let rotate = command & 4 != 0;
        match command {
            0 | 4 => self.rotate_auto = rotate,
            1 | 5 => {
                let keep = if self.special_mask { self.imr } else { 0 };
                let rank = self.rank(self.isr & !keep);
                if rank < 8 {
                    let input = self.input(rank);
                    self.isr &= !(1 << input);
                    if rotate {
                        self.first = (input + 1) & 7;
                    }
                }
            }
            3 | 7 => {
                self.isr &= !(1 << level);
                if rotate {
                    self.first = (level + 1) & 7;
                }
            }
            6 => self.first = (level + 1) & 7,
            _ => {}
        }
    }

    fn data(&mut self, value: u8) {
        let last = if self.icw4 { 4 } else { 0 };
        match self.icw {
            2 => {
                self.base = value & 0xF8;
                self.icw = if self.single { last } else { 3 };
            }
            3 => self.icw = last,
            4 => {
                self.special_nested = value & 0x10 != 0;
                self.auto_eoi = value & 0x02 != 0;
                self.icw = 0;
            }
            _ => self.imr = value,
        }
    }

    fn read(&mut self, data: bool, master: bool) -> u8 {
        if std::mem::take(&mut self.poll) {
            let Some(input) = self.request(master) else { return 0 };
            self.ack(input);
            return 0x80 | input;
        }
        match (data, self.read_isr) {
            (true, _) => self.imr,
            (false, true) => self.isr,
            (false, false) => self.irr,
        }
    }

    fn check(&self, name: &str) -> Result<(), String> {
        if self.first > 7 || self.base & 7 != 0 || !matches!(self.icw, 0 | 2..=4) {
            return Err(format!(
                "PIC {name}: priority {}, vector base {:#x} and ICW {} are not all possible",
                self.first, self.base, self.icw
            ));
        }
        Ok(())
    }
}

const CASCADE: u8 = 2;
/// Inputs whose trigger mode can be chosen, master and slave.
const ELCR: [u8; 2] = [0xF8, 0xDE];

/// Both controllers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pic {
    /// IRQ 0 to 7.
    pub master: Chip,
    /// IRQ 8 to 15.
    pub slave: Chip,
}

impl Pic {
    /// The slave's output is a level on the master's IR2.
    fn cascade(&mut self) {
        let asks = self.slave.request(false).is_some();
        self.master.irr = self.master.irr & !(1 << CASCADE) | u8::from(asks) << CASCADE;
    }

    /// The level of INTR.
    pub(super) fn output(&self) -> bool {
        self.master.request(true).is_some()
    }

    /// Drive IRQ 0 to 15 (not 2).
    pub(super) fn set_line(&mut self, irq: u32, level: bool) {
        let input = irq as u8 & 7;
        if irq < 8 {
            self.master.set_line(input, level);
        } else {
            self.slave.set_line(input, level);
            self.cascade();
        }
    }

    /// INTA cycles: the vector, spurious IR7 when nothing asks any more.
    pub(super) fn ack(&mut self) -> u8 {
        let vector = match self.master.request(true) {
            Some(CASCADE) => {
                self.master.ack(CASCADE);
                let input = self.slave.request(false);
                if let Some(input) = input {
                    self.slave.ack(input);
                }
                self.slave.base + input.unwrap_or(7)
            }
            Some(input) => {
                self.master.ack(input);
                self.master.base + input
            }
            None => self.master.base + 7,
        };
        self.cascade();
        vector
    }

    pub(super) fn read(&mut self, port: u16) -> u8 {
        let value = match port {
            0x20 | 0x21 => self.master.read(port & 1 == 1, true),
            0xA0 | 0xA1 => self.slave.read(port & 1 == 1, false),
            0x4D0 => self.master.elcr,
            0x4D1 => self.slave.elcr,
            _ => 0xFF,
        };
        self.cascade();
        value
    }

    pub(super) fn write(&mut self, port: u16, value: u8) {
        match port {
            0x20 => self.master.command(value),
            0x21 => self.master.data(value),
            0xA0 => self.slave.command(value),
            0xA1 => self.slave.data(value),
            0x4D0 => self.master.set_elcr(value & ELCR[0]),
            0x4D1 => self.slave.set_elcr(value & ELCR[1]),
            _ => {}
        }
        self.cascade();
    }

    /// Whether a state that came from outside can be these controllers'.
    pub(super) fn check(&self) -> Result<(), String> {
        self.master.check("master")?;
        self.slave.check("slave")?;
        if self.master.elcr & !ELCR[0] != 0 || self.slave.elcr & !ELCR[1] != 0 {
            return Err(format!(
                "PIC: ELCR {:#04x} {:#04x} makes an edge-only line level",
                self.master.elcr, self.slave.elcr
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ready() -> Pic {
        let mut p = Pic::default();
        for (port, value) in [
            (0x20, 0x11),
            (0x21, 0x30),
            (0x21, 0x04),
            (0x21, 0x01),
            (0xA0, 0x11),
            (0xA1, 0x38),
            (0xA1, 0x02),
            (0xA1, 0x01),
            (0x21, 0x00),
            (0xA1, 0x00),
        ] {
            p.write(port, value);
        }
        p
    }

    fn pulse(p: &mut Pic, irq: u32) {
        p.set_line(irq, true);
        p.set_line(irq, false);
    }

    #[test]
    fn fully_nested() {
        let mut p = ready();
        pulse(&mut p, 4);
        assert!(p.output());
        assert_eq!(p.ack(), 0x34);
        pulse(&mut p, 5);
        assert!(!p.output(), "lower priority waits");
        pulse(&mut p, 1);
        assert_eq!(p.ack(), 0x31);
        p.write(0x20, 0x0B);
        assert_eq!(p.read(0x20), 0b1_0010);
        p.write(0x20, 0x20);
        p.write(0x20, 0x20);
        assert_eq!(p.read(0x20), 0);
        assert_eq!(p.ack(), 0x35);
        p.write(0x20, 0x65);
        assert!(!p.output());
    }

    #[test]
    fn slave_through_ir2() {
        let mut p = ready();
        pulse(&mut p, 12);
        assert!(p.output());
        p.write(0x21, 0x04);
        assert!(!p.output(), "cascade masked");
        p.write(0x21, 0x00);
        assert_eq!(p.ack(), 0x3C);
        pulse(&mut p, 8);
        assert!(!p.output(), "master's IR2 is in service");
        p.write(0x20, 0x20);
        assert_eq!(p.ack(), 0x38);
        p.write(0xA0, 0x20);
        p.write(0xA0, 0x20);
        p.write(0x20, 0x20);
        assert!(!p.output());
    }

    #[test]
    fn special_fully_nested_lets_the_slave_interrupt_itself() {
        let mut p = ready();
        for (port, value) in [(0x20, 0x11), (0x21, 0x30), (0x21, 0x04), (0x21, 0x11)] {
            p.write(port, value);
        }
        pulse(&mut p, 12);
        assert_eq!(p.ack(), 0x3C);
        pulse(&mut p, 8);
        assert_eq!(p.ack(), 0x38);
    }

    #[test]
    fn level_and_spurious() {
        let mut p = ready();
        p.write(0x4D0, 0xFF);
        p.write(0x4D1, 0xFF);
        assert_eq!((p.read(0x4D0), p.read(0x4D1)), (0xF8, 0xDE));
        p.set_line(5, true);
        assert_eq!(p.ack(), 0x35);
        p.write(0x20, 0x20);
        assert!(p.output(), "still asserted");
        p.set_line(5, false);
        assert!(!p.output());
        assert_eq!(p.ack(), 0x37, "spurious");
        p.set_line(10, true);
        assert!(p.output());
        p.set_line(10, false);
        assert!(!p.output());
    }

    #[test]
    fn masks_keep_the_edge() {
        let mut p = ready();
        p.write(0x21, 0xFF);
        pulse(&mut p, 3);
        assert!(!p.output());
        p.write(0x21, 0xF7);
        assert_eq!(p.ack(), 0x33);
    }

    #[test]
    fn rotation_special_mask_and_auto_eoi() {
        let mut p = ready();
        pulse(&mut p, 3);
        p.ack();
        p.write(0x20, 0xA0); // rotate on non-specific EOI: 3 becomes lowest
        pulse(&mut p, 3);
        pulse(&mut p, 4);
        assert_eq!(p.ack(), 0x34);
        p.write(0x20, 0x20);
        assert_eq!(p.ack(), 0x33);
        p.write(0x20, 0x63);
        p.write(0x20, 0xC7); // lowest is 7 again
        pulse(&mut p, 1);
        p.ack();
        p.write(0x21, 0x02);
        p.write(0x20, 0x68); // special mask
        pulse(&mut p, 6);
        assert_eq!(p.ack(), 0x36);

        let mut p = ready();
        for (port, value) in [(0x20, 0x11), (0x21, 0x30), (0x21, 0x04), (0x21, 0x03), (0x20, 0x80)] {
            p.write(port, value);
        }
        pulse(&mut p, 0);
        pulse(&mut p, 1);
        assert_eq!(p.ack(), 0x30);
        pulse(&mut p, 0);
        assert_eq!(p.ack(), 0x31, "0 rotated to the end");
        assert_eq!(p.ack(), 0x30);
        p.write(0x20, 0x0B);
        assert_eq!(p.read(0x20), 0);
    }

    #[test]
    fn poll() {
        let mut p = ready();
        pulse(&mut p, 6);
        p.write(0x20, 0x0C);
        assert_eq!(p.read(0x20), 0x86);
        p.write(0x20, 0x0C);
        assert_eq!(p.read(0x20), 0);
        p.write(0x20, 0x0B);
        assert_eq!(p.read(0x20), 0x40);
    }

    #[test]
    fn any_value_is_harmless() {
        let mut p = Pic::default();
        for value in 0..=255u8 {
            for port in [0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1] {
                p.write(port, value);
                p.read(port);
                p.set_line(u32::from(value & 15), value & 16 != 0);
                p.ack();
                p.check().unwrap();
            }
        }
    }

    #[test]
    fn malformed_state() {
        let mut p = Pic::default();
        p.slave.first = 8;
        assert!(p.check().unwrap_err().contains("slave"));
        let mut p = Pic::default();
        p.master.elcr = 1;
        assert!(p.check().unwrap_err().contains("ELCR"));
    }
}
