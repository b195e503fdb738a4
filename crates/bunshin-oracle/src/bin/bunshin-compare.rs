//! `bunshin-compare`: random code on the host processor and in the
//! translator, until something differs or the work is done.
use bunshin_oracle::compare::{Comparison, Judge, Options, Stop};
use bunshin_oracle::coverage::Coverage;
use bunshin_oracle::generate::{Choice, Generator};
use bunshin_oracle::minimise::minimise;
use bunshin_oracle::{Case, Native, Outcome};
use std::cell::RefCell;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::{Duration, Instant};

const USAGE: &str = "\
usage: bunshin-compare [options]
  --cases N | --instructions N | --seconds S
                    how much to do (default: 10 seconds)
  --seed N          start from this seed (default 1)
  --case N          only this case of the seed, or --cases from here on
  --only PATTERNS   only these mnemonics: comma-separated, with *
  --environment     also FNSTENV, FXSAVE, XSAVE and their like
  --narrow          32-bit code, in compatibility mode
  --privileged      also CLI, IN, MOV CR0 and their like, which must fault
  --hot             translate as frequent code is translated
  --direct          run user code directly, see docs/design/direct-execution.md
  --rewriting       code that changes itself
  --exact-flags     compare the arithmetic flags at faults too
  --system          privileged code, judged by QEMU; with --seed, --case,
                    --cases, --instructions, --seconds, --stop-after,
                    --no-minimise, --show and FILE (cases/system/*.txt)
  --watch, --invpcid
                    with --system: also breakpoints on data, INVPCID (QEMU 7.2
                    dies of some of the former and lacks the latter)
  --self-check      the host against itself: shows that the harness is sound
  --stop-after N    stop at this many differences (default 10)
  --no-minimise     report differences as they were found
  --show            print every case instead of running it
  --coverage        print how often each encoding ran, and which did not
  --list            print how many encodings are drawn from, and their names
  FILE ...          run these cases (crates/bunshin-oracle/cases/*.txt) and no others

Exit status: 0 all equal, 1 something differs, 2 cannot run.";

struct Arguments {
    seed: u64,
    cases: u64,
    instructions: u64,
    seconds: f64,
    first_case: Option<u64>,
    choice: Choice,
    options: Options,
    self_check: bool,
    hot: bool,
    direct: bool,
    stop_after: u64,
    minimise: bool,
    show: bool,
    list: bool,
    coverage: bool,
    system: bool,
    system_choice: bunshin_oracle::system::generate::Choice,
    files: Vec<String>,
}

fn arguments() -> Result<Arguments, String> {
    let mut a = Arguments {
        seed: 1,
        cases: u64::MAX,
        instructions: u64::MAX,
        seconds: f64::INFINITY,
        first_case: None,
        choice: Choice::default(),
        options: Options::default(),
        self_check: false,
        hot: false,
        direct: false,
        stop_after: 10,
        minimise: true,
        show: false,
        list: false,
        coverage: false,
        system: false,
        system_choice: Default::default(),
        files: Vec::new(),
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().ok_or_else(|| format!("{word} wants a value"));
        let number =
            |text: String| text.replace('_', "").parse::<u64>().map_err(|_| format!("{text:?} is no number"));
        match word.as_str() {
            "--seed" => a.seed = number(value()?)?,
            "--cases" => a.cases = number(value()?)?,
            "--case" => a.first_case = Some(number(value()?)?),
            "--instructions" => a.instructions = number(value()?)?,
            "--seconds" => {
                a.seconds = value()?.parse().map_err(|_| "--seconds wants a number".to_string())?
            }
            "--only" => a.choice.only = value()?,
            "--environment" => a.choice.environment = true,
            "--narrow" => a.choice.narrow = true,
            "--privileged" => a.choice.privileged = true,
            "--rewriting" => a.choice.rewriting = true,
            "--exact-flags" => a.options.exact_flags = true,
            "--system" => a.system = true,
            "--invpcid" => a.system_choice.invpcid = true,
            "--watch" => a.system_choice.watch = true,
            "--self-check" => a.self_check = true,
            "--hot" => a.hot = true,
            "--direct" => a.direct = true,
            "--stop-after" => a.stop_after = number(value()?)?,
            "--no-minimise" => a.minimise = false,
            "--show" => a.show = true,
            "--coverage" => a.coverage = true,
            "--list" => a.list = true,
            "--threads" => {
                if number(value()?)? != 1 {
                    return Err("the arena has fixed addresses: one thread a process".into());
                }
            }
            "--help" | "-h" => {
                println!("{USAGE}");
                std::process::exit(0);
            }
            _ if word.starts_with('-') => return Err(format!("unknown option {word}\n{USAGE}")),
            _ => a.files.push(word.clone()),
        }
    }
    if a.first_case.is_some() && a.cases == u64::MAX {
        a.cases = 1;
    }
    if a.cases == u64::MAX && a.instructions == u64::MAX && a.seconds == f64::INFINITY {
        a.seconds = 10.0;
    }
    Ok(a)
}

#[cfg(feature = "translator")]
fn engine(a: &Arguments, all_flags: bool) -> Result<Box<dyn Judge>, String> {
    use bunshin_oracle::translated;
    let guest = if a.direct { translated::direct() } else { translated::translated(a.hot, all_flags) };
    let guest = guest.map_err(|e| e.to_string())?;
    Ok(Box::new(guest))
}

#[cfg(not(feature = "translator"))]
fn engine(_: &Arguments, _: bool) -> Result<Box<dyn Judge>, String> {
    Err("built without the translator: only --self-check works".into())
}

#[derive(Default)]
struct Counts {
    cases: u64,
    instructions: u64,
    differences: u64,
    faults: [u64; 32],
    timeouts: u64,
    coverage: Coverage,
}

impl Counts {
    fn add(&mut self, case: &Case, outcome: &Outcome) {
        self.cases += 1;
        self.coverage.add(case, outcome);
        // An INT3 means that all ran, but for what branches passed over;
        // after a fault count what lies before it.
        let end = match &outcome.stop {
            Stop::Breakpoint => u64::MAX,
            Stop::Fault { vector, .. } => {
                self.faults[usize::from(*vector).min(31)] += 1;
                outcome.state.rip
            }
            Stop::Timeout => {
                self.timeouts += 1;
                0
            }
            _ => outcome.state.rip,
        };
        let mut rip = case.state.rip;
        for bytes in &case.code {
            if rip > end {
                break;
            }
            self.instructions += 1;
            rip += bytes.len() as u64;
        }
    }
}

fn main() -> ExitCode {
    match arguments().and_then(|a| run(&a)) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(message) => {
            eprintln!("bunshin-compare: {message}");
            ExitCode::from(2)
        }
    }
}

#[cfg(not(feature = "translator"))]
fn system(_: &Arguments) -> Result<u64, String> {
    Err("built without the translator, there is nothing to judge".into())
}

/// Privileged code on QEMU and in the translator.
#[cfg(feature = "translator")]
fn system(a: &Arguments) -> Result<u64, String> {
    use bunshin_oracle::system::{campaign::Campaign, compare, generate, machine, qemu::Qemu, SystemCase};
    let first = a.first_case.unwrap_or(0);
    if a.show {
        for index in first..first.saturating_add(a.cases.min(1000)) {
            let case = generate::case(a.seed, index, a.system_choice);
            println!("{}", case.to_text(&format!("seed {} case {index}", a.seed)));
        }
        return Ok(0);
    }
    let mut right = machine::Translated::new()?;
    let mut left = Qemu::new()?;
    if !a.files.is_empty() {
        let mut differences = 0;
        for file in &a.files {
            let text = std::fs::read_to_string(file).map_err(|e| format!("{file}: {e}"))?;
            let case = SystemCase::from_text(&text).map_err(|e| format!("{file}: {e}"))?;
            let single = std::slice::from_ref(&case);
            let (x, y) = (machine::run(&mut left, single)?, machine::run(&mut right, single)?);
            println!(
                "{file}\n  QEMU:\n{}  translator:\n{}",
                compare::log_text(&x[0]),
                compare::log_text(&y[0])
            );
            for d in compare::differences(&case, &x[0], &y[0]) {
                println!("  {:28}  {:18}  {}", d.name, d.left, d.right);
                differences += 1;
            }
        }
        return Ok(differences);
    }
    let campaign = Campaign {
        seed: a.seed,
        first,
        cases: a.cases,
        instructions: a.instructions,
        seconds: a.seconds,
        stop_after: a.stop_after,
        minimise: a.minimise,
        choice: a.system_choice,
    };
    let start = Instant::now();
    let done = campaign.run(&mut left, &mut right)?;
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "{} privileged or mode-changing instructions in {} cases, seed {}, {} differences; {seconds:.1} s, {:.1} us a case",
        done.instructions,
        done.cases,
        a.seed,
        done.differences,
        1e6 * seconds / done.cases.max(1) as f64,
    );
    let records: Vec<_> = done.records.iter().map(|(tag, n)| format!("{tag}:{n}")).collect();
    println!("records (vector:count, 256 ends, 512 resets) {}", records.join(" "));
    Ok(done.differences)
}

fn run(a: &Arguments) -> Result<u64, String> {
    if a.system {
        return system(a);
    }
    let mut generator = Generator::new(&a.choice)?;
    if a.list {
        let (codes, mnemonics) = generator.pool().size();
        println!("{codes} encodings of {mnemonics} mnemonics");
        for code in generator.pool().codes() {
            println!("{code:?}");
        }
        return Ok(0);
    }
    if a.show {
        let first = a.first_case.unwrap_or(0);
        for index in first..first.saturating_add(a.cases.min(1000)) {
            println!("{}", generator.case(a.seed, index).to_text(&format!("seed {} case {index}", a.seed)));
        }
        return Ok(0);
    }
    // The engine first: our signal handlers go on top of its own.
    let right = if a.self_check { None } else { Some(engine(a, false)?) };
    let mut all_flags = if a.self_check { None } else { Some(engine(a, true)?) };
    let mut native = Rc::new(RefCell::new(Native::new()?));
    let mut right = right.unwrap_or_else(|| Box::new(native.clone()));
    let mut comparison = Comparison {
        left: &mut native,
        right: &mut *right,
        all_flags: all_flags.as_mut().map(|judge| judge.as_mut() as &mut dyn Judge),
        options: a.options,
    };
    let start = Instant::now();
    let mut counts = Counts::default();
    if a.files.is_empty() {
        random(a, &mut generator, &mut comparison, &mut counts);
    } else {
        for file in &a.files {
            let text = std::fs::read_to_string(file).map_err(|e| format!("{file}: {e}"))?;
            let case = Case::from_text(&text).map_err(|e| format!("{file}: {e}"))?;
            let (outcome, found) = comparison.run(&case);
            counts.add(&case, &outcome);
            if !found.is_empty() {
                counts.differences += 1;
                print!("{file}\n{}", comparison.report(&case, &found));
            }
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    if a.coverage {
        print!("{}", counts.coverage.report(&a.choice));
    }
    println!(
        "{} instructions in {} cases, seed {}, {} differences; {:.1} s, {:.1} us a case",
        counts.instructions,
        counts.cases,
        a.seed,
        counts.differences,
        seconds,
        1e6 * seconds / counts.cases.max(1) as f64,
    );
    let faults: u64 = counts.faults.iter().sum();
    let by_vector: Vec<_> =
        counts.faults.iter().enumerate().filter(|(_, n)| **n > 0).map(|(v, n)| format!("{v}:{n}")).collect();
    println!("{faults} cases faulted (vector:count {}), {} timed out", by_vector.join(" "), counts.timeouts);
    Ok(counts.differences)
}

fn random(a: &Arguments, generator: &mut Generator, comparison: &mut Comparison, counts: &mut Counts) {
    let start = Instant::now();
    let mut told = start;
    let mut index = a.first_case.unwrap_or(0);
    while counts.cases < a.cases && counts.instructions < a.instructions && counts.differences < a.stop_after
    {
        if counts.cases % 256 == 0 {
            if start.elapsed().as_secs_f64() >= a.seconds {
                break;
            }
            if told.elapsed() >= Duration::from_secs(5) {
                told = Instant::now();
                eprintln!(
                    "{:6.0} s  {} cases  {} instructions  {} differences",
                    start.elapsed().as_secs_f64(),
                    counts.cases,
                    counts.instructions,
                    counts.differences
                );
            }
        }
        let case = generator.case(a.seed, index);
        index += 1;
        let (outcome, found) = comparison.run(&case);
        counts.add(&case, &outcome);
        if found.is_empty() {
            continue;
        }
        counts.differences += 1;
        println!("{}", comparison.report(&case, &found));
        if a.minimise {
            let (small, found) = minimise(comparison, &case, &found);
            if found.is_empty() {
                continue;
            }
            println!("minimised:\n{}", comparison.report(&small, &found));
            let names: Vec<_> = found.iter().take(8).map(|d| d.name.as_str()).collect();
            let remark = format!("seed {} case {}: differed in {}", case.seed, case.index, names.join(" "));
            println!("---- cases/NAME.txt\n{}----\n", small.to_text(&remark));
        }
    }
}
