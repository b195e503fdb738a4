//! Which address spaces run directly: those whose user code is done sooner that way.
//!
//! Time is counted in stretches, from an entry into user mode to the next one into the
//! kernel. A hand-over makes each some 10 µs longer and the rest of it shorter, by how much
//! depends on the program: code that runs once has to be translated first, a loop of
//! vector instructions gains nothing. So both ways are measured and compared.

/// User time that an address space has behind it before it goes direct, nanoseconds. A
/// sandbox costs about as much; waiting 5 ms instead made no difference to speak of.
const TRIAL: u64 = 2_000_000;
/// Average stretch under the translator below which nothing can be won: two hand-overs.
const WORTH: u64 = 20_000;
/// Average stretch in the sandbox from which hand-overs do not matter, so that no
/// comparison is needed.
const SURE: u64 = 60_000;
/// A longer stretch says no more than that it was long.
const LONGEST: u64 = 1_000_000;
/// Stretches before a way is judged: the code that comes back is translated by then.
const SAMPLE: u32 = 64;
/// A comparison holds for so many times a sample, and twice as long after each that
/// confirms it.
const HOLDS: u32 = 4;
/// Weight of one stretch in the average: 1 / 16.
const WEIGHT: u32 = 4;
/// Most doublings of the time to the next attempt or comparison: 2 s and up.
const DOUBLINGS: u32 = 10;
/// Pages that cannot be guarded are visited instruction by instruction. So many visits in
/// a row, each after a run shorter than this: a loop that the translator runs better.
const VISITS: u32 = 64;
const SHORT: u64 = 50_000;

/// How one address space fares. Times are in nanoseconds.
#[derive(Clone, Copy, Default, Debug)]
pub struct Standing {
    pub cr3: u64,
    on: bool,
    /// Under the translator to be compared, not for good.
    sampling: bool,
    /// Something about it cannot be done directly.
    refused: bool,
    /// User time since it came to the translator.
    total: u64,
    /// Stretches since it came to where it is, and their running average.
    count: u32,
    average: u64,
    /// The average when it was last where it is not now; 0: never.
    other: u64,
    /// Comparisons that confirmed direct execution, those that did not.
    confirmed: u32,
    relapses: u32,
    visits: u32,
}

impl Standing {
    pub fn new(cr3: u64) -> Self {
        Self { cr3, ..Self::default() }
    }

    /// It runs directly.
    pub fn is_on(&self) -> bool {
        self.on
    }

    /// From now on, unless it cannot; for tests.
    pub fn insist(&mut self) {
        self.on = !self.refused;
    }

    /// It never runs directly again.
    pub fn refuse(&mut self) {
        self.refused = true;
        self.on = false;
    }

    /// A stretch of user code is over. Called inside translated code too.
    pub fn stretch(&mut self, ns: u64) {
        self.total = self.total.saturating_add(ns);
        self.count = self.count.saturating_add(1);
        let ns = ns.min(LONGEST);
        self.average = match self.count {
            1 => ns,
            _ => self.average - (self.average >> WEIGHT) + (ns >> WEIGHT),
        };
        if self.on {
            if self.count < SAMPLE || self.average >= SURE {
                return;
            }
            if self.average >= self.other {
                self.relapse();
            } else if self.count >= (SAMPLE * HOLDS) << self.confirmed.min(DOUBLINGS) {
                self.switch(false);
                self.sampling = true;
            }
        } else if self.refused {
        } else if self.sampling {
            if self.count >= SAMPLE {
                if self.average > self.other {
                    self.confirmed += 1;
                    self.switch(true);
                } else {
                    self.relapses += 1;
                    self.sampling = false;
                    self.total = 0;
                }
            }
        } else if self.total >= TRIAL << self.relapses.min(DOUBLINGS)
            && self.average >= WORTH
            && self.average > self.other
        {
            self.switch(true);
        }
    }

    /// After `ns` in the sandbox a page was visited instruction by instruction.
    pub fn visit(&mut self, ns: u64) {
        self.visits = if ns < SHORT { self.visits + 1 } else { 0 };
        if self.on && self.visits >= VISITS {
            self.relapse();
        }
    }

    /// It does not pay: not again soon.
    fn relapse(&mut self) {
        self.relapses += 1;
        self.switch(false);
    }

    fn switch(&mut self, on: bool) {
        self.on = on;
        self.sampling = false;
        self.other = self.average;
        self.count = 0;
        self.total = 0;
        self.visits = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Run a program whose stretches take `translated` or `direct` for so many of them.
    /// How many were direct.
    fn run(s: &mut Standing, translated: u64, direct: u64, stretches: u32) -> u32 {
        (0..stretches)
            .filter(|_| {
                let on = s.is_on();
                s.stretch(if on { direct } else { translated });
                on
            })
            .count() as u32
    }

    #[test]
    fn long_stretches_go_direct_and_stay() {
        let mut s = Standing::new(1);
        assert_eq!(run(&mut s, 3_000_000, 1_000_000, 1000), 999);
    }

    #[test]
    fn short_stretches_never_go() {
        let mut s = Standing::new(1);
        assert_eq!(run(&mut s, 6_000, 15_000, 100_000), 0);
    }

    #[test]
    fn what_does_not_pay_goes_back_and_tries_less_and_less() {
        let mut s = Standing::new(1);
        let (early, late) = (run(&mut s, 25_000, 30_000, 10_000), run(&mut s, 25_000, 30_000, 100_000));
        assert!(early > 0 && early < 1000, "{early}");
        assert!(late < 500, "{late}");
    }

    #[test]
    fn what_pays_in_short_stretches_stays_but_for_samples() {
        let mut s = Standing::new(1);
        let direct = run(&mut s, 60_000, 20_000, 100_000);
        assert!(direct > 98_000, "{direct}");
    }

    #[test]
    fn a_program_that_changes_is_noticed() {
        let mut s = Standing::new(1);
        run(&mut s, 300_000, 100_000, 1000);
        assert!(s.is_on());
        let direct = run(&mut s, 6_000, 15_000, 100_000);
        assert!(!s.is_on() && direct < 2000, "{direct}");
        run(&mut s, 300_000, 100_000, 1000);
        assert!(s.is_on(), "it may come back");
    }

    #[test]
    fn visits_in_a_row_end_it_and_a_refusal_lasts() {
        let mut s = Standing::new(1);
        run(&mut s, 300_000, 100_000, 100);
        for _ in 0..VISITS - 1 {
            s.visit(10_000);
        }
        s.visit(SHORT);
        assert!(s.is_on());
        for _ in 0..VISITS {
            s.visit(10_000);
        }
        assert!(!s.is_on());
        s.refuse();
        s.insist();
        run(&mut s, 300_000, 100_000, 100_000);
        assert!(!s.is_on());
    }
}
