//! Exclusive sections: one processor acts while all the others stand still.
//!
//! Translated code takes no locks, so what must not interleave with it (a store
//! into code of another processor, a locked operation that spans two pages) is
//! done while every other processor is *out*: in its owner's hands, asleep in
//! HLT, or waiting at the gate. Who is out owes the gate nothing and cannot come
//! in while a section is wanted.
//!
//! ```text
//!           come_in                       begin ──> section ──> end
//!   out  ────────────>  in  (runs code)     │  (a processor that waits
//!        <────────────                      │   for its turn is out)
//!           go_out
//! ```
//!
//! Coming in and going out are one store and one load while nobody wants a
//! section. A store that a probe let through and that has not happened yet is why
//! the others must really be out: helpers that translated code calls are no place
//! to stop at.
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// A processor as the gate sees it.
pub trait Walker {
    /// The flag that says whether the processor is in. Only its own thread sets it.
    fn inside(&self) -> &AtomicBool;
    /// Make the processor come to the gate soon. Called from other threads.
    fn hurry(&self);
}

#[derive(Default)]
struct Turn {
    /// A section is going on, or its owner waits for the others to go out.
    taken: bool,
    /// Processors that wait to come in.
    queue: u32,
    /// Those of them that come in before the next section begins.
    passing: u32,
    /// Sections since somebody in the queue came in.
    overtaken: u32,
}

/// Sections in a row that a queue waits for. It is cheaper to let whoever wants
/// several have them while the others wake up, but nobody stays out for ever.
const PATIENCE: u32 = 32;

/// Looks at a flag before a thread sleeps: some microseconds, the time that a kick
/// takes to arrive at a processor that runs.
const SPINS: u32 = 400;

/// Look at `done` for a while.
fn spin(done: impl Fn() -> bool) {
    for _ in 0..SPINS {
        if done() {
            return;
        }
        std::hint::spin_loop();
    }
}

#[derive(Default)]
pub struct Gate {
    /// Sections that were asked for and have not ended.
    wanted: AtomicU32,
    turn: Mutex<Turn>,
    changed: Condvar,
}

impl Gate {
    fn lock(&self) -> MutexGuard<'_, Turn> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, turn: MutexGuard<'a, Turn>) -> MutexGuard<'a, Turn> {
        self.changed.wait(turn).unwrap_or_else(PoisonError::into_inner)
    }

    /// Somebody waits for this processor to go out.
    pub fn wanted(&self) -> bool {
        self.wanted.load(Ordering::SeqCst) != 0
    }

    /// From out to in; waits while sections are wanted.
    pub fn come_in(&self, me: &impl Walker) {
        me.inside().store(true, Ordering::SeqCst);
        if !self.wanted() {
            return;
        }
        self.go_out(me);
        spin(|| !self.wanted());
        let mut turn = self.lock();
        turn.queue += 1;
        while turn.taken || turn.passing == 0 && self.wanted() {
            turn = self.wait(turn);
        }
        turn.queue -= 1;
        turn.overtaken = 0;
        me.inside().store(true, Ordering::SeqCst);
        if turn.passing > 0 {
            turn.passing -= 1;
            if turn.passing == 0 {
                self.changed.notify_all();
            }
        }
    }

    /// From in to out.
    pub fn go_out(&self, me: &impl Walker) {
        me.inside().store(false, Ordering::SeqCst);
        if self.wanted() {
            drop(self.lock());
            self.changed.notify_all();
        }
    }

    /// Begin a section; the processor `me` must be in. It is out while it waits, so
    /// whatever it knew may be different afterwards. The section ends when the
    /// result is dropped.
    pub fn begin<'a, W: Walker + 'a>(
        &'a self,
        me: &W,
        others: impl Iterator<Item = &'a W> + Clone,
    ) -> Section<'a> {
        self.wanted.fetch_add(1, Ordering::SeqCst);
        let mut turn = self.lock();
        if turn.taken || turn.passing > 0 {
            me.inside().store(false, Ordering::SeqCst);
            self.changed.notify_all();
            while turn.taken || turn.passing > 0 {
                turn = self.wait(turn);
            }
            me.inside().store(true, Ordering::SeqCst);
        }
        turn.taken = true;
        let is_in = |w: &&W| w.inside().load(Ordering::SeqCst);
        others.clone().filter(is_in).for_each(Walker::hurry);
        spin(|| !others.clone().any(|w| is_in(&w)));
        while others.clone().any(|w| is_in(&w)) {
            turn = self.wait(turn);
        }
        Section(self)
    }
}

/// An exclusive section; ends when dropped.
#[must_use]
pub struct Section<'a>(&'a Gate);

impl Drop for Section<'_> {
    fn drop(&mut self) {
        let mut turn = self.0.lock();
        turn.taken = false;
        turn.overtaken += 1;
        if turn.overtaken >= PATIENCE {
            turn.overtaken = 0;
            turn.passing = turn.queue;
        }
        self.0.wanted.fetch_sub(1, Ordering::SeqCst);
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;

    /// A thread that looks at `hurried` as translated code looks at a kick.
    #[derive(Default)]
    struct Runner {
        inside: AtomicBool,
        hurried: AtomicBool,
    }

    impl Walker for Runner {
        fn inside(&self) -> &AtomicBool {
            &self.inside
        }
        fn hurry(&self) {
            self.hurried.store(true, Ordering::SeqCst);
        }
    }

    impl Runner {
        fn safe_point(&self, gate: &Gate) {
            if self.hurried.swap(false, Ordering::SeqCst) && gate.wanted() {
                gate.go_out(self);
                gate.come_in(self);
            }
        }
    }

    /// Threads add to plain pairs of numbers: inside a section both halves may be
    /// changed apart from each other, outside they must always agree.
    fn storm(count: usize, rounds: u64) {
        let gate = Gate::default();
        let runners: Vec<Runner> = (0..count).map(|_| Runner::default()).collect();
        let pair = [AtomicU64::new(0), AtomicU64::new(0)];
        std::thread::scope(|s| {
            for (k, me) in runners.iter().enumerate() {
                let (gate, runners, pair) = (&gate, &runners, &pair);
                s.spawn(move || {
                    gate.come_in(me);
                    for n in 0..rounds {
                        me.safe_point(gate);
                        let halves = (pair[0].load(Ordering::Relaxed), pair[1].load(Ordering::Relaxed));
                        assert_eq!(halves.0, halves.1, "seen in the middle of a section");
                        if n % 3 == k as u64 % 3 {
                            let others = runners.iter().filter(|r| !std::ptr::eq(*r, me));
                            let section = gate.begin(me, others);
                            let x = pair[0].load(Ordering::Relaxed);
                            pair[0].store(x + 1, Ordering::Relaxed);
                            std::thread::yield_now();
                            pair[1].store(x + 1, Ordering::Relaxed);
                            drop(section);
                        }
                        if n % 7 == 0 {
                            gate.go_out(me);
                            gate.come_in(me);
                        }
                    }
                    gate.go_out(me);
                });
            }
        });
        let sections: u64 =
            (0..count as u64).map(|k| (0..rounds).filter(|n| n % 3 == k % 3).count() as u64).sum();
        assert_eq!(pair[0].load(Ordering::Relaxed), sections);
        assert!(!gate.wanted());
    }

    #[test]
    fn nobody_runs_during_a_section() {
        storm(2, 3000);
        storm(5, 600);
    }

    #[test]
    fn a_section_needs_nobody_who_is_out() {
        let gate = Gate::default();
        let (me, other) = (Runner::default(), Runner::default());
        gate.come_in(&me);
        let section = gate.begin(&me, [&other].into_iter());
        assert!(!other.hurried.load(Ordering::SeqCst));
        drop(section);
        gate.come_in(&other);
        gate.go_out(&other);
    }

    #[test]
    fn a_section_that_panics_ends() {
        let gate = Gate::default();
        let me = Runner::default();
        gate.come_in(&me);
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _section = gate.begin(&me, std::iter::empty::<&Runner>());
            panic!("on purpose");
        }));
        assert!(caught.is_err());
        assert!(!gate.wanted());
    }
}
