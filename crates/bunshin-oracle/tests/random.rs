//! Random instructions on the host processor and translated: hundreds of
//! thousands on every run, always the same ones. `make fuzz` goes on from there.
#![cfg(feature = "translator")]
use bunshin_oracle::{Choice, Comparison, Generator, Native, Options};
use std::cell::RefCell;
use std::rc::Rc;

#[test]
fn random_instructions_agree() {
    for hot in [false, true] {
        compare(hot);
    }
}

fn compare(hot: bool) {
    let mut engine = bunshin_oracle::translated::translated(hot, false).unwrap();
    let mut all_flags = bunshin_oracle::translated::translated(hot, true).unwrap();
    let mut native = Rc::new(RefCell::new(Native::new().unwrap()));
    let kinds = [
        ("user mode", 40_000, Choice::default()),
        ("32-bit", 20_000, Choice { narrow: true, ..Choice::default() }),
        ("environment", 10_000, Choice { environment: true, ..Choice::default() }),
        ("privileged", 10_000, Choice { privileged: true, ..Choice::default() }),
        ("rewriting", 20_000, Choice { rewriting: true, ..Choice::default() }),
        ("32-bit rewriting", 10_000, Choice { rewriting: true, narrow: true, ..Choice::default() }),
    ];
    for (name, cases, choice) in kinds {
        let mut generator = Generator::new(&choice).unwrap();
        let mut comparison = Comparison {
            left: &mut native,
            right: &mut engine,
            all_flags: Some(&mut all_flags),
            options: Options::default(),
        };
        for index in 0..cases {
            let case = generator.case(1, index);
            let (_, found) = comparison.run(&case);
            if !found.is_empty() {
                let report = comparison.report(&case, &found);
                panic!("{name}, hot code {hot}, seed 1, case {index}\n{report}");
            }
        }
    }
}
