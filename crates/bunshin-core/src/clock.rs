//! Host time: the time-stamp counter and its rate against CLOCK_MONOTONIC.
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
