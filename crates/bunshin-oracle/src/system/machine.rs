//! Something that runs batches of cases, and the log it leaves.
use super::case::{SystemCase, CASE_BYTES};
use super::layout::*;

/// One record of the log, see [`names`].
pub type Record = [u64; RECORD];

/// A machine that holds the harness.
pub trait Machine {
    /// For reports.
    fn name(&self) -> &'static str;
    /// Copy into guest memory.
    fn write(&mut self, gpa: u64, bytes: &[u8]);
    /// Copy out of guest memory.
    fn read(&mut self, gpa: u64, bytes: &mut [u8]);
    /// Run until DONE equals `go`, which has been written to GO. False when
    /// time ran out; then the machine has been reset and runs on with the next
    /// case when this is called again.
    ///
    /// # Errors
    /// The machine cannot go on at all.
    fn run(&mut self, go: u64) -> Result<bool, String>;
}

/// The number at an address.
pub fn word(machine: &mut dyn Machine, gpa: u64) -> u64 {
    let mut bytes = [0; 8];
    machine.read(gpa, &mut bytes);
    u64::from_le_bytes(bytes)
}

/// Run cases, at most [`BATCH`]; the records of each.
///
/// # Errors
/// The machine cannot go on, or its log makes no sense.
pub fn run(machine: &mut dyn Machine, cases: &[SystemCase]) -> Result<Vec<Vec<Record>>, String> {
    let go = begin(machine, cases);
    finish(machine, cases, go)
}

/// Run cases on two machines, the left one of which starts by itself.
///
/// # Errors
/// As for [`run`].
#[allow(clippy::type_complexity)]
pub fn run_both(
    left: &mut dyn Machine,
    right: &mut dyn Machine,
    cases: &[SystemCase],
) -> Result<(Vec<Vec<Record>>, Vec<Vec<Record>>), String> {
    let (one, two) = (begin(left, cases), begin(right, cases));
    let right = finish(right, cases, two)?;
    Ok((finish(left, cases, one)?, right))
}

/// Lay a batch out and let it begin; its number for [`finish`].
fn begin(machine: &mut dyn Machine, cases: &[SystemCase]) -> u64 {
    mend(machine);
    let bytes: Vec<u8> = cases.iter().flat_map(SystemCase::bytes).collect();
    assert!(cases.len() <= BATCH && bytes.len() as u64 == cases.len() as u64 * CASE_BYTES);
    machine.write(CASES, &bytes);
    machine.write(COUNT, &(cases.len() as u64).to_le_bytes());
    let go = word(machine, DONE) + 1;
    machine.write(GO, &go.to_le_bytes());
    go
}

/// A case may have written where it should not: the image as it was.
fn mend(machine: &mut dyn Machine) {
    for (gpa, bytes) in super::harness::image() {
        let mut now = vec![0; bytes.len()];
        machine.read(*gpa, &mut now);
        if now != *bytes {
            machine.write(*gpa, bytes);
        }
    }
}

fn finish(machine: &mut dyn Machine, cases: &[SystemCase], go: u64) -> Result<Vec<Vec<Record>>, String> {
    let mut attempts = 0;
    while !machine.run(go)? {
        attempts += 1;
        if attempts > cases.len() {
            return Err(format!("{} does not finish a batch", machine.name()));
        }
    }
    let count = word(machine, LOGGED) as usize;
    let most = BATCH * (MOST as usize + 2);
    if count > most {
        return Err(format!("{}: a log of {count} records, expected {most} at most", machine.name()));
    }
    let mut log = vec![0; count * RECORD * 8];
    machine.read(LOG, &mut log);
    let mut records = vec![Vec::new(); cases.len()];
    for bytes in log.chunks_exact(RECORD * 8) {
        let mut record = [0; RECORD];
        for (word, bytes) in record.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = u64::from_le_bytes(bytes.try_into().unwrap());
        }
        let index = (record[0] >> 16) as usize;
        record[0] &= 0xffff;
        let own: &mut Vec<Record> =
            records.get_mut(index).ok_or_else(|| format!("{}: a record of case {index}", machine.name()))?;
        clear_unused(&mut record);
        own.push(record);
    }
    Ok(records)
}

/// Words that a record of its kind does not have hold what was there before.
fn clear_unused(record: &mut Record) {
    let used = match record[0] {
        FINAL => super::harness::FIRST_SUM + super::harness::SUMS.len(),
        LOST => 1,
        _ => EXCEPTION.len(),
    };
    record[used..].fill(0);
}

/// Words of an exception's record.
const EXCEPTION: [&str; 38] = [
    "vector",
    "error",
    "rip",
    "cs",
    "rflags",
    "rsp",
    "ss",
    "rax",
    "rcx",
    "rdx",
    "rbx",
    "frame",
    "rbp",
    "rsi",
    "rdi",
    "r8",
    "r9",
    "r10",
    "r11",
    "r12",
    "r13",
    "r14",
    "r15",
    "cr2",
    "ds-es-fs-gs",
    "fs base",
    "gs base",
    "kernel gs base",
    "cr0",
    "cr3",
    "cr4",
    "cr8",
    "efer",
    "tr-ldtr",
    "code",
    "more code",
    "dr6",
    "dr7",
];

/// Names of the words of a record with this tag.
pub fn names(tag: u64) -> Vec<&'static str> {
    match tag {
        FINAL => [
            "tag",
            "star",
            "lstar",
            "cstar",
            "sfmask",
            "sysenter cs",
            "sysenter esp",
            "sysenter eip",
            "gdtr",
            "gdtr base",
            "idtr",
            "idtr base",
            "xcr0",
        ]
        .into_iter()
        .chain(super::harness::UPPER)
        .chain(super::harness::SUMS)
        .collect(),
        LOST => vec!["tag"],
        _ => EXCEPTION.to_vec(),
    }
}

#[cfg(feature = "translator")]
pub use translated::Translated;

#[cfg(feature = "translator")]
mod translated {
    use super::super::{harness, layout::*};
    use super::{mend, word, Machine};
    use crate::processor_time;
    use bunshin_core::state::{Segment, Table};
    use bunshin_core::{CpuState, Engine, Exit, Kicker, Region, Reply, Vcpu};
    use bunshin_translator::TranslatorEngine;
    use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
    use std::sync::{Arc, Weak};
    use std::time::Duration;

    /// How much of a processor's time one case may take.
    const PATIENCE: Duration = Duration::from_millis(800);

    /// The translator.
    pub struct Translated {
        engine: Arc<TranslatorEngine>,
        vcpu: Box<dyn Vcpu>,
        start: CpuState,
        watch: Arc<Watch>,
        reset: bool,
    }

    struct Watch {
        region: Arc<Region>,
        running: AtomicBool,
        kicked: AtomicU64,
        /// Clock of the processor time of the thread that runs, 0 at first.
        clock: AtomicI32,
    }

    fn watch(watch: &Weak<Watch>, kicker: &dyn Kicker) {
        let (mut seen, mut since) = (u64::MAX, Duration::ZERO);
        loop {
            std::thread::sleep(PATIENCE / 10);
            let Some(watch) = watch.upgrade() else { return };
            let mut bytes = [0; 8];
            watch.region.read(INDEX as usize, &mut bytes);
            let index = u64::from_le_bytes(bytes);
            let now = processor_time::spent(watch.clock.load(Ordering::SeqCst));
            if !watch.running.load(Ordering::SeqCst) || index != seen {
                (seen, since) = (index, now);
            } else if now.saturating_sub(since) >= PATIENCE {
                watch.kicked.store(index, Ordering::SeqCst);
                kicker.kick();
                since = now;
            }
        }
    }

    impl Translated {
        /// A machine with every arithmetic flag kept.
        ///
        /// # Errors
        /// What the engine refused.
        pub fn new() -> Result<Self, String> {
            let text = |e: bunshin_core::EngineError| e.to_string();
            let engine = TranslatorEngine::new(1).map_err(text)?;
            engine.keep_flags();
            let region = Region::new(RAM).map_err(text)?;
            engine.map(0, &region, 0, RAM, false).map_err(text)?;
            for (gpa, bytes) in harness::image() {
                engine.write(*gpa, bytes);
            }
            let mut vcpu = engine.vcpu(0).map_err(text)?;
            let start = start(vcpu.state());
            let shared = Arc::new(Watch {
                region,
                running: AtomicBool::new(false),
                kicked: AtomicU64::new(u64::MAX),
                clock: AtomicI32::new(0),
            });
            let (weak, kicker) = (Arc::downgrade(&shared), vcpu.kicker());
            std::thread::spawn(move || watch(&weak, &*kicker));
            Ok(Self { engine, vcpu, start, watch: shared, reset: true })
        }
    }

    impl Machine for Translated {
        fn name(&self) -> &'static str {
            "translator"
        }

        fn write(&mut self, gpa: u64, bytes: &[u8]) {
            self.engine.write(gpa, bytes);
        }

        fn read(&mut self, gpa: u64, bytes: &mut [u8]) {
            self.engine.read(gpa, bytes);
        }

        fn run(&mut self, go: u64) -> Result<bool, String> {
            self.watch.clock.store(processor_time::of_this_thread(), Ordering::SeqCst);
            self.watch.running.store(true, Ordering::SeqCst);
            let mut reply = Reply::None;
            let mut resets = 0;
            let ended = loop {
                if self.reset {
                    mend(self);
                    resets += 1;
                    if resets > 2 * BATCH {
                        return Err("the translator shuts down whatever it is given".into());
                    }
                    self.vcpu.set_state(&self.start).map_err(|e| format!("set_state: {e}"))?;
                    self.reset = false;
                }
                match self.vcpu.run(std::mem::take(&mut reply)) {
                    Exit::PioOut { port: PORT, .. } => {
                        self.vcpu.complete(Reply::None);
                        if word(self, DONE) == go {
                            break true;
                        }
                    }
                    Exit::PioOut { .. } | Exit::MmioWrite { .. } => {}
                    // As on QEMU's machine.
                    Exit::PioIn { size, count: 1, .. } => {
                        reply = Reply::Value([0, 0xff, 0xffff, 0, 0xffff_ffff][usize::from(size)]);
                    }
                    Exit::PioIn { size, count, .. } => {
                        reply = Reply::Bytes(vec![0; usize::from(size) * count as usize]);
                    }
                    Exit::MmioRead { .. } => reply = Reply::Value(u64::MAX),
                    Exit::Kicked if self.watch.kicked.swap(u64::MAX, Ordering::SeqCst) != u64::MAX => {
                        self.reset = true;
                        break false;
                    }
                    Exit::Kicked => {}
                    Exit::Shutdown { .. } => self.reset = true,
                    other => return Err(format!("unexpected exit {other:?}")),
                }
            };
            self.watch.running.store(false, Ordering::SeqCst);
            Ok(ended)
        }
    }

    /// The processor at the harness's entry.
    fn start(mut state: CpuState) -> CpuState {
        let segment = |selector: u16, access: u32| Segment { selector, base: 0, limit: u32::MAX, access };
        let data = segment(KERNEL_SS as u16, 0xc093);
        state.segments = [data, segment(KERNEL_CS as u16, 0xa09b), data, data, data, data];
        state.ldt = Segment { selector: 0, base: 0, limit: 0, access: 1 << 16 };
        state.tr = Segment { selector: 0, base: 0, limit: 0xffff, access: 0x8b };
        state.gdt = Table { base: HALF + BOOT_GDT, limit: 39 };
        state.idt = Table { base: HALF + IDT, limit: 16 * VECTORS as u16 - 1 };
        (state.cr0, state.cr2, state.cr3, state.cr4, state.cr8) = (CR0, 0, BOOT_ROOT, CR4, 0);
        state.rip = harness::entry();
        state.rflags = 2;
        state.gpr = [0; 16];
        match state.msrs.binary_search_by_key(&0xc000_0080, |(i, _)| *i) {
            Ok(at) => state.msrs[at].1 = EFER | 1 << 10,
            Err(at) => state.msrs.insert(at, (0xc000_0080, EFER | 1 << 10)),
        }
        state.halted = false;
        state
    }
}
