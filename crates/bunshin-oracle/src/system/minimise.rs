//! Makes a case that differs smaller: fewer slots, then the state of
//! [`SystemCase::default`].
use super::case::WORDS;
use super::compare::differences;
use super::machine::{run_both, Machine};
use super::SystemCase;
use crate::state::Difference;

/// The smallest case found, and what differs in it.
///
/// # Errors
/// A machine cannot go on.
pub fn minimise(
    left: &mut dyn Machine,
    right: &mut dyn Machine,
    case: &SystemCase,
    found: &[Difference],
) -> Result<(SystemCase, Vec<Difference>), String> {
    let mut search = Search { left, right, best: case.clone(), found: found.to_vec() };
    // The number of the record goes away with slots before it.
    let name = |d: &Difference| d.name.split_once(' ').map_or(d.name.clone(), |(_, rest)| rest.to_string());
    let names: Vec<_> = found.iter().map(name).collect();
    let same = |found: &[Difference]| found.iter().any(|d| names.contains(&name(d)));
    for _ in 0..3 {
        let before = search.best.clone();
        while search.best.slots.len() > 1
            && search.attempt(&same, |case| {
                case.slots.pop();
                case.bits.pop();
            })?
        {}
        for i in 0..search.best.slots.len() {
            if search.best.slots[i] != [0x90] {
                search.attempt(&same, |case| case.slots[i] = vec![0x90])?;
            }
        }
        let initial = SystemCase::default();
        for step in [16, 4, 1] {
            for at in (0..WORDS - 1).step_by(step) {
                let range = at..(at + step).min(WORDS - 1);
                if search.best.words[range.clone()] != initial.words[range.clone()] {
                    search.attempt(&same, |case| {
                        case.words[range.clone()].copy_from_slice(&initial.words[range.clone()]);
                    })?;
                }
            }
        }
        if search.best == before {
            break;
        }
    }
    Ok((search.best, search.found))
}

struct Search<'a> {
    left: &'a mut dyn Machine,
    right: &'a mut dyn Machine,
    best: SystemCase,
    found: Vec<Difference>,
}

impl Search<'_> {
    fn attempt(
        &mut self,
        same: &dyn Fn(&[Difference]) -> bool,
        change: impl FnOnce(&mut SystemCase),
    ) -> Result<bool, String> {
        let mut case = self.best.clone();
        change(&mut case);
        let (left, right) = run_both(self.left, self.right, std::slice::from_ref(&case))?;
        let found = differences(&case, &left[0], &right[0]);
        let keep = same(&found);
        if keep {
            self.best = case;
            self.found = found;
        }
        Ok(keep)
    }
}
