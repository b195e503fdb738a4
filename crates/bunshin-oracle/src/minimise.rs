//! Makes a case that differs smaller, as long as it still differs in at least
//! one of the same places: fewer instructions, then plainer registers.
use crate::arena::CODE;
use crate::case::Case;
use crate::compare::Comparison;
use crate::state::{Difference, Xsave};

const ROUNDS: usize = 4;

/// The smallest case found, and what differs in it.
pub fn minimise(comparison: &mut Comparison, case: &Case, found: &[Difference]) -> (Case, Vec<Difference>) {
    let mut search = Search {
        names: found.iter().map(|d| d.name.clone()).collect(),
        comparison,
        best: case.clone(),
        found: found.to_vec(),
    };
    for _ in 0..ROUNDS {
        let before = search.best.to_text("");
        search.code();
        search.registers();
        if search.best.to_text("") == before {
            break;
        }
    }
    (search.best, search.found)
}

struct Search<'a, 'b> {
    names: Vec<String>,
    comparison: &'a mut Comparison<'b>,
    best: Case,
    found: Vec<Difference>,
}

impl Search<'_, '_> {
    /// Keep the change if the case still differs.
    fn attempt(&mut self, change: impl FnOnce(&mut Case)) -> bool {
        let mut case = self.best.clone();
        change(&mut case);
        let (_, found) = self.comparison.run(&case);
        let same = found.iter().any(|d| self.names.contains(&d.name));
        if same {
            self.best = case;
            self.found = found;
        }
        same
    }

    fn code(&mut self) {
        while self.best.code.len() > 1
            && self.attempt(|case| {
                case.code.pop();
            })
        {}
        for i in (0..self.best.code.len()).rev() {
            if self.best.code[i].iter().any(|b| *b != 0x90) {
                // NOPs of the same length leave every branch in place.
                self.attempt(|case| {
                    let length = case.code[i].len();
                    case.code[i] = vec![0x90; length];
                });
            }
        }
        for i in (0..self.best.code.len()).rev() {
            if self.best.code.len() > 1 && self.best.code[i].iter().all(|b| *b == 0x90) {
                let _ = self.attempt(|case| {
                    case.code.remove(i);
                }) || self.attempt(|case| case.code[i].truncate(1));
            }
        }
        self.attempt(|case| case.state.rip = CODE);
    }

    fn registers(&mut self) {
        for i in (0..self.best.patches.len()).rev() {
            self.attempt(|case| {
                case.patches.remove(i);
            });
        }
        self.attempt(|case| case.state.xsave = Xsave::default());
        self.attempt(|case| case.state.rflags = 0x202);
        for i in 0..16 {
            for value in [0, 1] {
                if self.best.state.gpr[i] > value && self.attempt(|case| case.state.gpr[i] = value) {
                    break;
                }
            }
        }
        let initial = Xsave::default();
        if self.best.state.xsave == initial {
            return;
        }
        self.attempt(|case| {
            for i in 0..Xsave::shape().0 {
                case.state.xsave.set_vector(i, [0; 64]);
            }
        });
        self.attempt(|case| {
            for i in 0..8 {
                case.state.xsave.set_st(i, [0; 10]);
            }
        });
        self.attempt(|case| case.state.xsave.set_mxcsr(initial.mxcsr()));
        self.attempt(|case| case.state.xsave.set_fcw(initial.fcw()));
        self.attempt(|case| case.state.xsave.set_fsw(initial.fsw()));
        self.attempt(|case| case.state.xsave.set_ftw(initial.ftw()));
        for i in 0..Xsave::shape().0 {
            if self.best.state.xsave.vector(i) != [0; 64] {
                self.attempt(|case| case.state.xsave.set_vector(i, [0; 64]));
            }
        }
        for i in 0..8 {
            if self.best.state.xsave.st(i) != [0; 10] {
                self.attempt(|case| case.state.xsave.set_st(i, [0; 10]));
            }
            if self.best.state.xsave.opmask(i) != 0 {
                self.attempt(|case| case.state.xsave.set_opmask(i, 0));
            }
        }
    }
}
