//! Privileged and mode-changing code: every case in `cases/system/`, and the
//! first thousands of one seed.
//!
//! `expected/system.txt` holds sums of the translator's logs from a run in
//! which QEMU agreed, so that this test needs no QEMU. Where QEMU is installed
//! the same cases are compared with it again. After a change that is right,
//! `BUNSHIN_ORACLE_BLESS=1 cargo test -p bunshin-oracle --test system` compares
//! with QEMU and writes the sums anew.
#![cfg(feature = "translator")]
use bunshin_oracle::system::compare::{differences, log_text, reads_time};
use bunshin_oracle::system::generate::{case, Choice};
use bunshin_oracle::system::layout::BATCH;
use bunshin_oracle::system::machine::{run, run_both, Machine, Record, Translated};
use bunshin_oracle::system::qemu::Qemu;
use bunshin_oracle::system::SystemCase;
use std::arch::x86_64::__cpuid;
use std::path::{Path, PathBuf};

const SEED: u64 = 1;
const BATCHES: u64 = 16;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_path_buf()
}

/// FNV-1a over what the records hold, but for rax and rdx where a single step
/// shows the time.
fn sum(cases: &[SystemCase], logs: &[Vec<Record>]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for (case, log) in cases.iter().zip(logs) {
        for record in log {
            let mut record = *record;
            if record[0] == 1 && reads_time(case, &record) {
                (record[7], record[9]) = (0, 0);
            }
            for byte in record.iter().flat_map(|word| word.to_le_bytes()) {
                hash = (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
            }
        }
    }
    hash
}

fn amd() -> bool {
    __cpuid(0).ebx == u32::from_le_bytes(*b"Auth")
}

fn saved() -> Vec<(PathBuf, SystemCase)> {
    let mut files: Vec<_> = std::fs::read_dir(folder().join("cases/system"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|e| e == "txt"))
        .collect();
    files.sort();
    files
        .into_iter()
        .map(|path| {
            let text = std::fs::read_to_string(&path).unwrap();
            let case = SystemCase::from_text(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            (path, case)
        })
        .collect()
}

/// Both machines; panics where they differ.
fn compare(qemu: &mut dyn Machine, translated: &mut dyn Machine, cases: &[SystemCase]) {
    let (left, right) = run_both(qemu, translated, cases).unwrap();
    for (case, (a, b)) in cases.iter().zip(left.iter().zip(&right)) {
        let found = differences(case, a, b);
        assert!(
            found.is_empty(),
            "{found:#?}\n{}  QEMU:\n{}  translator:\n{}",
            case.to_text(&format!("seed {} case {}", case.seed, case.index)),
            log_text(a),
            log_text(b)
        );
    }
}

#[test]
fn privileged_code_agrees() {
    if !amd() {
        println!("SKIPPED: the sums are those of AMD's processors, whose ways the translator follows here");
        return;
    }
    let batches: Vec<Vec<SystemCase>> = (0..BATCHES)
        .map(|batch| {
            (0..BATCH as u64).map(|i| case(SEED, batch * BATCH as u64 + i, Choice::default())).collect()
        })
        .collect();
    let saved = saved();
    let mut translated = Translated::new().unwrap();
    let bless = std::env::var_os("BUNSHIN_ORACLE_BLESS").is_some();
    if Qemu::exists() {
        let mut qemu = Qemu::new().unwrap();
        for cases in &batches {
            compare(&mut qemu, &mut translated, cases);
        }
        for (path, case) in &saved {
            println!("{}", path.display());
            compare(&mut qemu, &mut translated, std::slice::from_ref(case));
        }
    } else {
        assert!(!bless, "sums are written from a run that QEMU has judged, and it is missing");
        println!("SKIPPED: comparing with {}, which is not installed; sums only", Qemu::PROGRAM);
    }
    // A fresh machine: what earlier cases left in memory is part of the sums.
    let mut translated = Translated::new().unwrap();
    let mut lines = Vec::new();
    for (number, cases) in batches.iter().enumerate() {
        lines.push(format!("batch {number} {:016x}", sum(cases, &run(&mut translated, cases).unwrap())));
    }
    for (path, case) in &saved {
        let name = path.file_stem().unwrap().to_string_lossy();
        let single = std::slice::from_ref(case);
        lines.push(format!("{name} {:016x}", sum(single, &run(&mut translated, single).unwrap())));
    }
    let file = folder().join("expected/system.txt");
    if bless {
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(&file, lines.join("\n") + "\n").unwrap();
        return;
    }
    let expected = std::fs::read_to_string(&file).unwrap();
    let bad: Vec<_> = lines.iter().zip(expected.lines()).filter(|(a, b)| a != b).collect();
    assert!(
        bad.is_empty() && lines.len() == expected.lines().count(),
        "logs changed (now, expected): {bad:#?}; `bunshin-compare --system --seed {SEED} --cases {}` asks QEMU",
        BATCHES * BATCH as u64
    );
}
