//! Batch after batch through two machines, until something differs or the
//! work is done.
use super::compare::{differences, log_text};
use super::generate::{self, Choice};
use super::layout::*;
use super::machine::{run, run_both, Machine, Record};
use super::minimise::minimise;
use super::SystemCase;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// How much to do, and how.
#[derive(Debug, Clone)]
pub struct Campaign {
    /// Seed of the cases.
    pub seed: u64,
    /// Number of the first case.
    pub first: u64,
    /// Cases at most.
    pub cases: u64,
    /// Privileged or mode-changing instructions at most.
    pub instructions: u64,
    /// Seconds at most.
    pub seconds: f64,
    /// Differences at most.
    pub stop_after: u64,
    /// Make each difference small.
    pub minimise: bool,
    /// What to generate.
    pub choice: Choice,
}

/// What was done.
#[derive(Debug, Default)]
pub struct Done {
    /// Cases compared.
    pub cases: u64,
    /// Privileged or mode-changing instructions among them that ran.
    pub instructions: u64,
    /// Cases that differed.
    pub differences: u64,
    /// Exceptions by vector, [`FINAL`] and [`LOST`] too.
    pub records: BTreeMap<u64, u64>,
}

/// Privileged instructions of a case that ran: all up to the last slot that
/// a record names.
fn ran(case: &SystemCase, log: &[Record]) -> u64 {
    let ours = |rip: u64| [CODE_USER, CODE_SUPERVISOR].contains(&(rip & !0xfff));
    let last = log.iter().rev().filter(|r| r[0] < FINAL && ours(r[2])).map(|r| (r[2] & 0xfff) / SLOT).next();
    let slots = case.slots.len().max(1) as u64;
    u64::from(case.privileged) * last.unwrap_or(0).min(slots) / slots
}

impl Campaign {
    /// Run it; differences go to standard output.
    ///
    /// # Errors
    /// A machine cannot go on.
    pub fn run(&self, left: &mut dyn Machine, right: &mut dyn Machine) -> Result<Done, String> {
        let start = Instant::now();
        let mut told = start;
        let mut done = Done::default();
        let mut index = self.first;
        while done.cases < self.cases
            && done.instructions < self.instructions
            && done.differences < self.stop_after
            && start.elapsed().as_secs_f64() < self.seconds
        {
            let count = (self.cases - done.cases).min(BATCH as u64);
            let cases: Vec<_> =
                (index..index + count).map(|i| generate::case(self.seed, i, self.choice)).collect();
            index += count;
            let logs = run_both(left, right, &cases)?;
            for (case, (a, b)) in cases.iter().zip(logs.0.iter().zip(&logs.1)) {
                done.cases += 1;
                done.instructions += ran(case, a);
                for record in a {
                    *done.records.entry(record[0]).or_default() += 1;
                }
                let found = differences(case, a, b);
                if found.is_empty() || done.differences >= self.stop_after {
                    continue;
                }
                done.differences += 1;
                println!("seed {} case {}", case.seed, case.index);
                self.tell(left, right, case, &found, a, b)?;
            }
            if told.elapsed() >= Duration::from_secs(5) {
                told = Instant::now();
                eprintln!(
                    "{:6.0} s  {} cases  {} instructions  {} differences",
                    start.elapsed().as_secs_f64(),
                    done.cases,
                    done.instructions,
                    done.differences
                );
            }
        }
        Ok(done)
    }

    fn tell(
        &self,
        left: &mut dyn Machine,
        right: &mut dyn Machine,
        case: &SystemCase,
        found: &[crate::state::Difference],
        a: &[Record],
        b: &[Record],
    ) -> Result<(), String> {
        for d in found.iter().take(16) {
            println!("  {:28}  {:18}  {}", d.name, d.left, d.right);
        }
        if !self.minimise {
            println!(
                "{}  {}:\n{}  {}:\n{}",
                case.to_text(""),
                left.name(),
                log_text(a),
                right.name(),
                log_text(b)
            );
            return Ok(());
        }
        let (small, found) = minimise(left, right, case, found)?;
        for d in found.iter().take(16) {
            println!("  {:28}  {:18}  {}", d.name, d.left, d.right);
        }
        let single = std::slice::from_ref(&small);
        let (a, b) = (run(left, single)?, run(right, single)?);
        println!("  {}:\n{}  {}:\n{}", left.name(), log_text(&a[0]), right.name(), log_text(&b[0]));
        let names: Vec<_> = found.iter().take(6).map(|d| d.name.as_str()).collect();
        let remark = format!("seed {} case {}: differed in {}", case.seed, case.index, names.join(", "));
        println!("---- cases/system/NAME.txt\n{}----\n", small.to_text(&remark));
        Ok(())
    }
}
