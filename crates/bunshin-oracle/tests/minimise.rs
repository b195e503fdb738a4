//! A judge with a known bug: the difference is found, made small, written as
//! text, and still there when read back.
use bunshin_oracle::generate::{Choice, Generator};
use bunshin_oracle::minimise::minimise;
use bunshin_oracle::{Case, Comparison, Judge, Native, Options, Outcome};
use std::cell::RefCell;
use std::rc::Rc;

/// Gets AF wrong after any case with a BSWAP, if r12 is odd.
struct Buggy(Rc<RefCell<Native>>);

impl Judge for Buggy {
    fn name(&self) -> &'static str {
        "buggy"
    }

    fn run(&mut self, case: &Case) -> Outcome {
        let mut outcome = self.0.borrow_mut().run(case);
        if case.state.gpr[12] % 2 == 1 && case.listing().iter().any(|line| line.starts_with("bswap")) {
            outcome.state.rflags ^= 0x10;
        }
        outcome
    }
}

#[test]
fn a_difference_becomes_one_instruction() {
    let native = Rc::new(RefCell::new(Native::new().unwrap()));
    let (mut left, mut right) = (native.clone(), Buggy(native));
    let mut comparison = Comparison {
        left: &mut left,
        right: &mut right,
        all_flags: None,
        options: Options { exact_flags: true },
    };
    let mut generator = Generator::new(&Choice::default()).unwrap();
    let (case, found) = (0..100_000)
        .map(|index| generator.case(1, index))
        .find_map(|case| {
            let (_, found) = comparison.run(&case);
            (!found.is_empty()).then_some((case, found))
        })
        .expect("BSWAP with an odd r12 among 100000 cases");
    let (small, found) = minimise(&mut comparison, &case, &found);
    assert_eq!(small.code.len(), 1, "{}", small.to_text(""));
    assert_eq!(small.state.gpr.iter().filter(|v| **v != 0).count(), 1, "{}", small.to_text(""));
    assert_eq!(small.state.gpr[12], 1);
    assert!(small.patches.is_empty());
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].name, "rflags");
    let back = Case::from_text(&small.to_text("found by a test")).unwrap();
    assert_eq!(comparison.run(&back).1, found);
}
