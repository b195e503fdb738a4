//! The local APIC's timer: one-shot, periodic, TSC deadline.
//!
//! Spec: SDM 3, "APIC Timer". One tick before the divider is 1 ns. A masked
//! timer counts on and has no deadline; what expires meanwhile is lost.
use super::{Lapic, LVT_VALID, MASKED, SVR_ENABLE, TIMER};
use crate::chips::{Now, MIN_PERIOD_NS};

impl Lapic {
    pub(in crate::chips) fn timer_mode(&self) -> u32 {
        self.lvt[TIMER] >> 17 & 3
    }

    pub(in crate::chips) fn divider(&self) -> u64 {
        let code = self.tdcr & 3 | self.tdcr >> 1 & 4;
        1 << ((code + 1) & 7)
    }

    pub(in crate::chips) fn period_ns(&self) -> u64 {
        u64::from(self.tmict) * self.divider()
    }

    /// Periods from one delivered interrupt to the next.
    pub(in crate::chips) fn stride(&self) -> u64 {
        MIN_PERIOD_NS.div_ceil(self.period_ns().max(1)).max(1)
    }

    /// Fire the timer if it is due.
    pub(in crate::chips) fn tick(&mut self, now: Now) {
        let due = match self.timer_mode() {
            0 if self.armed && now.ns >= self.start_ns.saturating_add(self.period_ns()) => {
                self.armed = false;
                true
            }
            1 if self.armed => {
                let period = self.period_ns().max(1);
                let passed = now.ns.saturating_sub(self.start_ns) / period;
                let due = passed >= self.stride();
                if due {
                    self.start_ns += passed * period;
                }
                due
            }
            2 if self.tsc_deadline != 0 && now.tsc >= self.tsc_deadline => {
                self.tsc_deadline = 0;
                true
            }
            _ => false,
        };
        if due {
            self.deliver_local(TIMER);
        }
    }

    /// When [`Lapic::tick`] has something to do next, [`Now::ns`].
    pub(in crate::chips) fn deadline_ns(&self, now: Now, tsc_hz: u64) -> Option<u64> {
        if self.lvt[TIMER] & MASKED != 0 {
            return None;
        }
        match self.timer_mode() {
            0 if self.armed => Some(self.start_ns.saturating_add(self.period_ns())),
            1 if self.armed => Some(self.start_ns.saturating_add(self.period_ns() * self.stride())),
            2 if self.tsc_deadline != 0 => {
                let ticks = u128::from(self.tsc_deadline.saturating_sub(now.tsc));
                let wait = (ticks * 1_000_000_000).div_ceil(u128::from(tsc_hz.max(1)));
                Some(now.ns.saturating_add(u64::try_from(wait).unwrap_or(u64::MAX)))
            }
            _ => None,
        }
    }

    pub(in crate::chips) fn current_count(&self, now: Now) -> u32 {
        if !self.armed || self.tmict == 0 {
            return 0;
        }
        let passed = now.ns.saturating_sub(self.start_ns) / self.divider();
        match self.timer_mode() {
            0 => u64::from(self.tmict).saturating_sub(passed) as u32,
            1 => self.tmict - (passed % u64::from(self.tmict)) as u32,
            _ => 0,
        }
    }

    /// The TSC-deadline MSR.
    pub(in crate::chips) fn tsc_deadline(&mut self, now: Now) -> u64 {
        self.tick(now);
        self.tsc_deadline
    }

    /// Write the TSC-deadline MSR; ignored in the other timer modes.
    pub(in crate::chips) fn set_tsc_deadline(&mut self, value: u64, now: Now) {
        if self.timer_mode() == 2 {
            self.tsc_deadline = value;
            self.tick(now);
        }
    }

    /// Restore the TSC-deadline MSR, whatever the mode is by now.
    pub(in crate::chips) fn load_tsc_deadline(&mut self, value: u64) {
        self.tsc_deadline = value;
    }

    pub(in crate::chips) fn write_lvt(&mut self, which: usize, value: u32, now: Now) {
        if which == TIMER {
            self.tick(now);
            let to = value >> 17 & 3;
            if (to == 2) != (self.timer_mode() == 2) || to == 3 {
                self.armed = false;
                self.tmict = 0;
                self.tsc_deadline = 0;
            }
        }
        let forced = if self.svr & SVR_ENABLE == 0 { MASKED } else { 0 };
        self.lvt[which] = value & LVT_VALID[which] | forced;
    }
}
