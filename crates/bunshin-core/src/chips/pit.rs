//! 8254 timer: channel 0 makes IRQ 0, channel 2 the speaker's tone.
//!
//! Spec: Intel 8254 datasheet (order 231164-005); port 0x61 as in the 82371AB
//! (NMI status and control). Input clock 1193182 Hz.
//!
//! | port | write                              | read                        |
//! |------|------------------------------------|-----------------------------|
//! | 0x40 | count of channel 0                 | count, latch or status      |
//! | 0x41 | count of channel 1                 | "                           |
//! | 0x42 | count of channel 2                 | "                           |
//! | 0x43 | control, latch or read-back        | all ones                    |
//! | 0x61 | bit 0 gate of channel 2, bit 1     | the same, bit 4 refresh     |
//! |      | speaker, bits 2-3 kept             | toggle, bit 5 OUT2          |
//!
//! Control: channel 6-7 (3: read-back), access 4-5 (0: latch), mode 1-3, BCD 0.
//! All six modes; counts are computed from the time when they are read. An
//! expiring channel 0 is a pulse on IRQ 0.
//!
//! Not modelled: the clock cycle between writing a count and loading it; a new
//! count in modes 2 and 3 starts at once rather than after the period; writing
//! half a count does not stop mode 0; odd counts of mode 3 read as even; sound.
//! Missed periods are merged into one. Hostile guest: a reload of 1 would be
//! 1.2 million interrupts a second; they come at most every [`MIN_PERIOD_NS`].
use super::MIN_PERIOD_NS;
use serde::{Deserialize, Serialize};

/// Ticks in a second.
pub const HZ: u128 = 1_193_182;
const SECOND: u128 = 1_000_000_000;
/// A refresh cycle is requested this often, and bit 4 of port 0x61 toggles.
const REFRESH_NS: u64 = 15_085;

/// Ticks done after `ns` nanoseconds.
pub fn ticks(ns: u64) -> u64 {
    (u128::from(ns) * HZ / SECOND) as u64
}

/// The first nanosecond at which [`ticks`] gives `n`.
fn nanoseconds(n: u64) -> u64 {
    u64::try_from((u128::from(n) * SECOND).div_ceil(HZ)).unwrap_or(u64::MAX)
}

/// One counter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Channel {
    /// 0 to 5.
    pub mode: u8,
    /// Counts in decimal.
    pub bcd: bool,
    /// 1 low byte, 2 high byte, 3 low then high.
    pub access: u8,
    /// 1 to 65536.
    pub reload: u32,
    /// A count was written since the control word.
    pub loaded: bool,
    /// It was loaded, or triggered in the modes that wait for that.
    pub running: bool,
    /// When that was.
    pub start_ns: u64,
    /// Ticks done, while the gate stops it.
    pub held: Option<u64>,
    /// Rising edges of OUT that were delivered.
    pub edges: u64,
    /// Level of the gate.
    pub gate: bool,
    /// First byte of a count that is being written.
    pub write_low: Option<u8>,
    /// The next read gives the high byte.
    pub read_high: bool,
    /// Latched count.
    pub latch: Option<u16>,
    /// Latched status.
    pub status: Option<u8>,
}

impl Channel {
    /// After power-up, with this level at the gate.
    pub fn new(gate: bool) -> Self {
        Self {
            mode: 0,
            bcd: false,
            access: 3,
            reload: 0x10000,
            loaded: false,
            running: false,
            start_ns: 0,
            held: None,
            edges: 0,
            gate,
            write_low: None,
            read_high: false,
            latch: None,
            status: None,
        }
    }

    fn triggered(&self) -> bool {
        matches!(self.mode, 1 | 5)
    }

    /// Starts over by itself.
    pub fn periodic(&self) -> bool {
        matches!(self.mode, 2 | 3)
    }

    /// Ticks done since it was started.
    pub fn elapsed(&self, now_ns: u64) -> u64 {
        match (self.running, self.held) {
            (false, _) => 0,
            (true, Some(done)) => done,
            (true, None) => ticks(now_ns.saturating_sub(self.start_ns)),
        }
    }

    fn out(&self, now_ns: u64) -> bool {
        let (t, n) = (self.elapsed(now_ns), u64::from(self.reload));
        match self.mode {
            0 => self.running && t >= n,
            1 => !self.running || t >= n,
            _ if !self.running => true,
            2 => self.held.is_some() || t % n != n - 1,
            3 => self.held.is_some() || t % n < n.div_ceil(2),
            _ => t != n,
        }
    }

    fn count(&self, now_ns: u64) -> u16 {
        let (t, n) = (self.elapsed(now_ns), u64::from(self.reload));
        let wrap = if self.bcd { 10_000 } else { 0x10000 };
        let count = match self.mode {
            _ if !self.loaded => 0,
            2 => n - t % n,
            3 => n - ((t % n * 2 % n) & !1),
            _ => (n + wrap - t % wrap) % wrap,
        } % wrap;
        let count = count as u16;
        if self.bcd {
            [1000, 100, 10, 1].iter().fold(0, |bcd, unit| (bcd << 4) | (count / unit % 10))
        } else {
            count
        }
    }

    fn control(&mut self, value: u8) {
        let (gate, mode) = (self.gate, value >> 1 & 7);
        *self = Self {
            mode: if mode > 5 { mode & 3 } else { mode },
            bcd: value & 1 != 0,
            access: value >> 4 & 3,
            ..Self::new(gate)
        };
    }

    fn latch(&mut self, now_ns: u64) {
        if self.latch.is_none() {
            self.latch = Some(self.count(now_ns));
            self.read_high = false;
        }
    }

    fn latch_status(&mut self, now_ns: u64) {
        let out = u8::from(self.out(now_ns)) << 7;
        let null = u8::from(!self.loaded) << 6;
        self.status.get_or_insert(out | null | self.access << 4 | self.mode << 1 | u8::from(self.bcd));
    }

    fn read(&mut self, now_ns: u64) -> u8 {
        if let Some(status) = self.status.take() {
            return status;
        }
        let [low, high] = self.latch.unwrap_or_else(|| self.count(now_ns)).to_le_bytes();
        let take_high = self.access == 2 || self.access == 3 && self.read_high;
        self.read_high = self.access == 3 && !self.read_high;
        if !self.read_high {
            self.latch = None;
        }
        if take_high {
            high
        } else {
            low
        }
    }

    fn write(&mut self, value: u8, now_ns: u64) {
        let count = match (self.access, self.write_low) {
            (1, _) => u16::from(value),
            (2, _) => u16::from(value) << 8,
            (_, None) => {
                self.write_low = Some(value);
                return;
            }
            (_, Some(low)) => u16::from(value) << 8 | u16::from(low),
        };
        self.write_low = None;
        self.reload = match (count, self.bcd) {
            (0, false) => 0x10000,
            (0, true) => 10_000,
            (n, false) => u32::from(n),
            (n, true) => [12, 8, 4, 0].iter().fold(0, |sum, shift| sum * 10 + u32::from(n >> shift & 15)),
        };
        self.loaded = true;
        if !self.triggered() {
            self.start(now_ns);
        }
    }

    fn start(&mut self, now_ns: u64) {
        self.running = true;
        self.start_ns = now_ns;
        self.edges = 0;
        self.held = (!self.gate && !self.triggered()).then_some(0);
    }

    fn set_gate(&mut self, gate: bool, now_ns: u64) {
        if gate == self.gate {
            return;
        }
        let done = self.elapsed(now_ns);
        self.gate = gate;
        if self.triggered() || self.periodic() {
            if gate && self.loaded {
                self.start(now_ns);
            } else if self.periodic() {
                self.held = Some(0);
            }
        } else if gate {
            self.start_ns = now_ns.saturating_sub(nanoseconds(done));
            self.held = None;
        } else {
            self.held = Some(done);
        }
    }

    /// Number of the next rising edge of OUT that makes an interrupt.
    fn next_edge(&self) -> Option<u64> {
        if !self.running || self.held.is_some() || self.triggered() {
            None
        } else if self.periodic() {
            let stride = ticks(MIN_PERIOD_NS).div_ceil(u64::from(self.reload)).max(1);
            Some(self.edges + stride)
        } else {
            (self.edges == 0).then_some(1)
        }
    }

    fn deadline_ns(&self) -> Option<u64> {
        let edge = self.next_edge()?;
        Some(self.start_ns.saturating_add(nanoseconds(edge.saturating_mul(u64::from(self.reload)))))
    }

    fn tick(&mut self, now_ns: u64) -> bool {
        let Some(edge) = self.next_edge() else { return false };
        let passed = self.elapsed(now_ns) / u64::from(self.reload);
        if passed < edge {
            return false;
        }
        self.edges = passed;
        true
    }
}

/// All three counters and port 0x61.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pit {
    /// IRQ 0, refresh, speaker.
    pub channels: [Channel; 3],
    /// Bits 0..3 of port 0x61 as written.
    pub port61: u8,
}

impl Pit {
    pub(super) fn new() -> Self {
        Self { channels: [Channel::new(true), Channel::new(true), Channel::new(false)], port61: 0 }
    }

    pub(super) fn read(&mut self, port: u16, now_ns: u64) -> u8 {
        match port {
            0x40..=0x42 => self.channels[usize::from(port - 0x40)].read(now_ns),
            0x61 => {
                let refresh = (now_ns / REFRESH_NS) as u8 & 1;
                self.port61 | refresh << 4 | u8::from(self.channels[2].out(now_ns)) << 5
            }
            _ => 0xFF,
        }
    }

    pub(super) fn write(&mut self, port: u16, value: u8, now_ns: u64) {
        match port {
            0x40..=0x42 => self.channels[usize::from(port - 0x40)].write(value, now_ns),
            0x43 if value >> 6 == 3 => {
                for (i, channel) in self.channels.iter_mut().enumerate() {
                    if value >> (i + 1) & 1 == 1 {
                        if value & 0x20 == 0 {
                            channel.latch(now_ns);
                        }
                        if value & 0x10 == 0 {
                            channel.latch_status(now_ns);
                        }
                    }
                }
            }
            0x43 => {
                let channel = &mut self.channels[usize::from(value >> 6)];
                if value & 0x30 == 0 {
                    channel.latch(now_ns);
                } else {
                    channel.control(value);
                }
            }
            0x61 => {
                self.port61 = value & 0xF;
                self.channels[2].set_gate(value & 1 == 1, now_ns);
            }
            _ => {}
        }
    }

    /// When IRQ 0 comes next.
    pub(super) fn deadline_ns(&self) -> Option<u64> {
        self.channels[0].deadline_ns()
    }

    /// True when IRQ 0 has an edge by now.
    pub(super) fn tick(&mut self, now_ns: u64) -> bool {
        self.channels[0].tick(now_ns)
    }

    /// Whether a state that came from outside can be this timer's.
    pub(super) fn check(&self) -> Result<(), String> {
        for (i, c) in self.channels.iter().enumerate() {
            if c.mode > 5 || !(1..=3).contains(&c.access) || !(1..=0x10000).contains(&c.reload) {
                return Err(format!(
                    "PIT channel {i}: mode {}, access {} and reload {} are not all possible",
                    c.mode, c.access, c.reload
                ));
            }
            if c.edges >> 56 != 0 || c.held.is_some_and(|t| t >> 56 != 0) || c.running && !c.loaded {
                return Err(format!("PIT channel {i}: counted {} edges, stopped at {:?}", c.edges, c.held));
            }
        }
        if self.port61 > 0xF || self.channels[2].gate != (self.port61 & 1 == 1) {
            return Err(format!("PIT: port 0x61 holds {:#x}, which is not the gate's state", self.port61));
        }
        Ok(())
    }

    /// Move its times to another clock.
    pub(super) fn rebase(&mut self, to: impl Fn(u64) -> u64) {
        for c in &mut self.channels {
            c.start_ns = to(c.start_ns);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // 1193182 Hz: 11932 ticks are 10.0001 ms.
    const MS: u64 = 1_000_000;

    fn program(p: &mut Pit, control: u8, count: u16, now: u64) {
        let port = 0x40 + u16::from(control >> 6);
        p.write(0x43, control, now);
        p.write(port, count as u8, now);
        p.write(port, (count >> 8) as u8, now);
    }

    fn read(p: &mut Pit, port: u16, now: u64) -> u16 {
        u16::from(p.read(port, now)) | u16::from(p.read(port, now)) << 8
    }

    #[test]
    fn rate_generator() {
        let mut p = Pit::new();
        assert_eq!(p.deadline_ns(), None);
        program(&mut p, 0x34, 11932, 5 * MS);
        let first = p.deadline_ns().unwrap();
        assert!((15 * MS..15 * MS + 1000).contains(&first), "{first}");
        assert!(!p.tick(first - 1));
        assert!(p.tick(first));
        assert!(!p.tick(first));
        let second = p.deadline_ns().unwrap();
        assert!((25 * MS..25 * MS + 1000).contains(&second), "{second}");
        assert!(p.tick(100 * MS) && !p.tick(100 * MS), "missed periods are one edge");
        assert!(p.deadline_ns().unwrap() > 100 * MS);
    }

    #[test]
    fn terminal_count_fires_once() {
        let mut p = Pit::new();
        program(&mut p, 0x30, 0, 0);
        let at = p.deadline_ns().unwrap();
        assert!((54 * MS..55 * MS).contains(&at), "65536 ticks are 54.9 ms: {at}");
        assert!(p.tick(at));
        assert_eq!(p.deadline_ns(), None);
        program(&mut p, 0x38, 1000, 0);
        assert!(p.tick(MS) && p.deadline_ns().is_none());
    }

    #[test]
    fn storms_are_tamed() {
        let mut p = Pit::new();
        program(&mut p, 0x34, 1, 0);
        assert!(p.deadline_ns().unwrap() + 1000 >= MIN_PERIOD_NS);
    }

    #[test]
    fn latch_and_read_back() {
        let mut p = Pit::new();
        program(&mut p, 0x34, 10_000, 0);
        let later = nanoseconds(100);
        assert_eq!(read(&mut p, 0x40, later), 9_900);
        p.write(0x43, 0x00, later);
        p.write(0x43, 0x00, later * 2);
        assert_eq!(read(&mut p, 0x40, later * 9), 9_900);
        // Read-back: status and count of channel 0.
        p.write(0x43, 0xC2, later);
        assert_eq!(p.read(0x40, later), 0b1011_0100);
        assert_eq!(read(&mut p, 0x40, MS * 50), 9_900);
        p.write(0x43, 0x36, 0);
        p.write(0x43, 0xE2, 0);
        assert_eq!(p.read(0x40, 0), 0b1111_0110, "null count, mode 3");
    }

    #[test]
    fn bcd() {
        let mut p = Pit::new();
        program(&mut p, 0x35, 0x1234, 0);
        assert_eq!(read(&mut p, 0x40, nanoseconds(35)), 0x1199);
        program(&mut p, 0x35, 0xFFFF, 0);
        read(&mut p, 0x40, MS * 77);
    }

    #[test]
    fn calibration_through_channel_2() {
        // As Linux does: gate on, speaker off, mode 0, poll OUT2.
        let mut p = Pit::new();
        p.write(0x61, 0x01, 0);
        program(&mut p, 0xB0, 11932, 0);
        assert_eq!(p.read(0x61, 9 * MS) & 0x2F, 0x01);
        assert_eq!(p.read(0x61, 11 * MS) & 0x2F, 0x21);
        // The gate holds the count.
        program(&mut p, 0xB0, 11932, 0);
        p.write(0x61, 0x00, 5 * MS);
        assert_eq!(p.read(0x61, 90 * MS) & 0x20, 0);
        let held = read(&mut p, 0x42, 90 * MS);
        p.write(0x61, 0x01, 100 * MS);
        assert_eq!(read(&mut p, 0x42, 100 * MS), held);
        assert_eq!(p.read(0x61, 104 * MS) & 0x20, 0);
        assert_eq!(p.read(0x61, 106 * MS) & 0x20, 0x20);
    }

    #[test]
    fn square_wave_and_one_shot() {
        let mut p = Pit::new();
        p.write(0x61, 0x01, 0);
        program(&mut p, 0xB6, 100, 0);
        assert_eq!(p.read(0x61, nanoseconds(49)) & 0x20, 0x20);
        assert_eq!(p.read(0x61, nanoseconds(50)) & 0x20, 0);
        assert_eq!(p.read(0x61, nanoseconds(100)) & 0x20, 0x20);
        program(&mut p, 0xB2, 100, 0);
        assert_eq!(p.read(0x61, MS) & 0x20, 0x20, "waits for the gate");
        p.write(0x61, 0x00, MS);
        p.write(0x61, 0x01, MS);
        assert_eq!(p.read(0x61, MS) & 0x20, 0);
        assert_eq!(p.read(0x61, 2 * MS) & 0x20, 0x20);
    }

    #[test]
    fn any_value_is_harmless() {
        let mut p = Pit::new();
        for now in [0, 1, MS, u64::MAX] {
            for value in 0..=255 {
                for port in [0x43, 0x40, 0x41, 0x42, 0x61, 0x44] {
                    p.write(port, value, now);
                    p.write(0x42, value, now);
                    for port in [0x40, 0x41, 0x42, 0x43, 0x61, 0x44] {
                        p.read(port, now / 2);
                        p.read(port, now);
                    }
                    p.tick(now);
                    p.deadline_ns();
                    p.check().unwrap();
                }
            }
        }
    }

    #[test]
    fn malformed_state() {
        let mut p = Pit::new();
        p.channels[1].reload = 0;
        assert!(p.check().unwrap_err().contains("channel 1"));
        let mut p = Pit::new();
        p.port61 = 1;
        assert!(p.check().unwrap_err().contains("0x61"));
    }
}
