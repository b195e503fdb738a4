//! The hand-written programs: each ends as it should on the host, twice the
//! same; the translator finds the same.
use bunshin_oracle::{compare, programs, Judge, Native, Options, Stop};
use std::cell::RefCell;
use std::rc::Rc;

fn check(right: &mut dyn Judge, native: &mut dyn Judge) {
    let mut bad = Vec::new();
    for program in programs::all() {
        let mut comparison = compare::Comparison {
            left: native,
            right,
            all_flags: None,
            options: Options { exact_flags: true },
        };
        let (outcome, found) = comparison.run(&program.case);
        match (&outcome.stop, program.fault) {
            (Stop::Breakpoint, None) => {}
            (Stop::Fault { vector, .. }, Some(wanted)) if *vector == wanted => {}
            (stop, _) => bad.push(format!("{}: ended by {stop:x?}", program.name)),
        }
        if let Some(rax) = program.rax {
            if outcome.state.gpr[0] != rax {
                bad.push(format!("{}: rax is {:x}", program.name, outcome.state.gpr[0]));
            }
        }
        if !found.is_empty() {
            bad.push(format!("{}\n{}", program.name, comparison.report(&program.case, &found)));
        }
    }
    assert!(bad.is_empty(), "{}", bad.join("\n"));
}

#[test]
fn programs_agree() {
    let mut native = Rc::new(RefCell::new(Native::new().unwrap()));
    check(&mut native.clone(), &mut native);
    #[cfg(feature = "translator")]
    for hot in [false, true] {
        check(&mut bunshin_oracle::translated::translated(hot, false).unwrap(), &mut native);
    }
}
