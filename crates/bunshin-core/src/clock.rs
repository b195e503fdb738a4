//! Host time: the time-stamp counter and its rate against CLOCK_MONOTONIC; and the
//! clock of a machine, which a script may hold.
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The host's time-stamp counter.
pub fn rdtsc() -> u64 {
    // SAFETY: RDTSC has no preconditions in user mode on Linux.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Nanoseconds of CLOCK_MONOTONIC.
pub fn now_ns() -> u64 {
    let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut t) };
    t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
}

fn cpuid_hz() -> Option<u64> {
    let leaf = |n, s| core::arch::x86_64::__cpuid_count(n, s);
    let max = leaf(0, 0).eax;
    if max >= 0x15 {
        let l = leaf(0x15, 0);
        if l.eax != 0 && l.ebx != 0 && l.ecx != 0 {
            return Some(u64::from(l.ecx) * u64::from(l.ebx) / u64::from(l.eax));
        }
    }
    // A hypervisor below us may tell the rate in kHz (leaf 0x40000010).
    if leaf(1, 0).ecx >> 31 == 1 && leaf(0x4000_0000, 0).eax >= 0x4000_0010 {
        let khz = leaf(0x4000_0010, 0).eax;
        if khz != 0 {
            return Some(u64::from(khz) * 1000);
        }
    }
    None
}

fn measure_hz() -> u64 {
    // Three short windows; the shortest disturbance wins by the median.
    let mut rates: Vec<u64> = (0..3)
        .map(|_| {
            let (t0, c0) = (Instant::now(), rdtsc());
            std::thread::sleep(Duration::from_millis(4));
            let (t1, c1) = (t0.elapsed(), rdtsc());
            ((c1 - c0) as u128 * 1_000_000_000 / t1.as_nanos().max(1)) as u64
        })
        .collect();
    rates.sort_unstable();
    rates[1]
}

/// Ticks of the host's time-stamp counter in a second: from CPUID where it is
/// told, measured for 12 ms otherwise. The same value for the process's life.
pub fn tsc_hz() -> u64 {
    static HZ: OnceLock<u64> = OnceLock::new();
    *HZ.get_or_init(|| cpuid_hz().unwrap_or_else(measure_hz))
}

/// The clocks that a machine's time is made of: the host's, or what a script says. Under a
/// script time stands still until the script moves it on, so that a run can be repeated.
#[derive(Debug, Default)]
pub struct Clock {
    /// Nanoseconds that the script says, plus one; 0 without a script.
    script: AtomicU64,
}

/// Time of day at the beginning of every script: 2024-01-01.
const SCRIPT_EPOCH_NS: u64 = 1_704_067_200_000_000_000;

impl Clock {
    /// From now on it is `ns` nanoseconds since the script began; None: the host's time.
    pub fn set_script(&self, ns: Option<u64>) {
        self.script.store(ns.map_or(0, |ns| ns.saturating_add(1)), Ordering::Release);
    }

    /// What the script says, if there is one.
    pub fn script(&self) -> Option<u64> {
        self.script.load(Ordering::Acquire).checked_sub(1)
    }

    /// Nanoseconds as CLOCK_MONOTONIC counts them.
    pub fn now_ns(&self) -> u64 {
        self.script().unwrap_or_else(now_ns)
    }

    /// Ticks of the host's time-stamp counter.
    pub fn tsc(&self) -> u64 {
        match self.script() {
            Some(ns) => (u128::from(ns) * u128::from(tsc_hz()) / 1_000_000_000) as u64,
            None => rdtsc(),
        }
    }

    /// Nanoseconds since 1970.
    pub fn wall_ns(&self) -> u64 {
        if let Some(ns) = self.script() {
            return SCRIPT_EPOCH_NS + ns;
        }
        let mut t = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: writes one timespec.
        unsafe { libc::clock_gettime(libc::CLOCK_REALTIME, &mut t) };
        t.tv_sec as u64 * 1_000_000_000 + t.tv_nsec as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_script_holds_the_clock() {
        let c = Clock::default();
        assert!(c.script().is_none() && c.now_ns() > 0);
        c.set_script(Some(0));
        assert_eq!((c.now_ns(), c.tsc(), c.wall_ns()), (0, 0, SCRIPT_EPOCH_NS));
        c.set_script(Some(1_000_000_000));
        assert_eq!((c.now_ns(), c.tsc()), (1_000_000_000, tsc_hz()));
        c.set_script(None);
        assert!(c.script().is_none());
    }
}
