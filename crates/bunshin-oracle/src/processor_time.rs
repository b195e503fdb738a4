//! Clocks of the processor time of one thread or process: patience that a busy
//! machine does not use up.
use std::time::Duration;

/// The clock of the thread that asks.
pub fn of_this_thread() -> libc::clockid_t {
    let mut clock = 0;
    // SAFETY: asks for the clock of this very thread.
    unsafe { libc::pthread_getcpuclockid(libc::pthread_self(), &mut clock) };
    clock
}

/// The clock of a process, all of its threads; None when there is none.
pub fn of_process(id: u32) -> Option<libc::clockid_t> {
    let mut clock = 0;
    // SAFETY: fills the number.
    let failed = unsafe { libc::clock_getcpuclockid(id as libc::pid_t, &mut clock) };
    (failed == 0).then_some(clock)
}

/// What a clock shows; nothing if its thread or process has ended.
pub fn spent(clock: libc::clockid_t) -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: fills the structure, or fails.
    unsafe { libc::clock_gettime(clock, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_takes_time_and_sleep_does_not() {
        let clock = of_this_thread();
        let before = spent(clock);
        std::thread::sleep(Duration::from_millis(50));
        let slept = spent(clock) - before;
        let mut x = 1u64;
        while spent(clock) < before + slept + Duration::from_millis(20) {
            x = std::hint::black_box(x.wrapping_mul(3));
        }
        assert!(slept < Duration::from_millis(40), "{slept:?}");
        assert!(spent(of_process(std::process::id()).unwrap()) >= spent(clock) - before);
    }
}
