//! Any engine as a judge: one virtual processor in 64-bit user mode, the arena
//! mapped at the same addresses as on the host, every exception caught.
//!
//! | gpa         | what                                               |
//! |-------------|----------------------------------------------------|
//! | 0x1000      | page tables: PML4, PDPT, PD, three page tables, PDPT and PD of the supervisor half |
//! | 0x9000      | GDT, 0x9100 TSS                                    |
//! | 0xa000      | IDT                                                |
//! | 0xb000      | a stub a vector: `out port, al`, port 0xc0 + vector |
//! | 0xe000      | top of the supervisor stack                        |
//! | 0x10_0000   | code, data and stack of the arena                  |
//!
//! The supervisor half maps all of this at 0xffff_8000_0000_0000. A stub's OUT
//! is an exit of the engine; the frame that the exception pushed lies on the
//! supervisor stack, everything else is still in the registers. SYSCALL goes
//! to a stub as well, and so does INT 80h, since Linux takes both.
//! Selectors are Linux's, where a program can see them.
use crate::arena::{
    base_image, changed_lines, image_offset, CODE_LENGTH, IMAGE_LENGTH, LINE, PAGE, SEGMENTS,
};
use crate::case::Case;
use crate::compare::{null, Judge, Outcome, Stop};
use crate::processor_time;
use crate::state::{Layout, UserState, XSAVE_BYTES};
use bunshin_core::state::{Segment, Table};
use bunshin_core::{CpuState, Engine, Exit, Kicker, Region, Reply, Vcpu};
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

const HALF: u64 = 0xffff_8000_0000_0000;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const PT: u64 = 0x4000;
const HIGH_PDPT: u64 = 0x7000;
const HIGH_PD: u64 = 0x8000;
const GDT: u64 = 0x9000;
const TSS: u64 = 0x9100;
const IDT: u64 = 0xa000;
const STUBS: u64 = 0xb000;
const STUB_LENGTH: u64 = 16;
const STACK_TOP: u64 = 0xe000;
const ARENA: u64 = 0x10_0000;
const RAM: u64 = 0x20_0000;

/// First port of the stubs. None of an engine's own chips lives here.
const PORT: u16 = 0xc0;
/// Numbers of the stubs behind those of the exceptions.
const SYSCALL: u16 = 32;
const INT80: u16 = 33;

const KERNEL_CS: u16 = 0x10;
const USER_CS: u16 = 0x33;
const USER_SS: u16 = 0x2b;
const TR: u16 = 0x40;

const EFER: u32 = 0xc000_0080;
const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const FMASK: u32 = 0xc000_0084;

/// How much of a processor's time a case may take: several times what the
/// host gets, and far more than any needs that ends.
const PATIENCE: Duration = Duration::from_millis(120);
/// How many times as much [`Judge::run_patiently`] gives.
const PATIENT: u32 = 25;
/// The same by the clock on the wall, when others may have the processor.
const PATIENCE_BY_THE_WALL: Duration = Duration::from_secs(3);
/// How often the watcher looks.
const LOOK: Duration = Duration::from_millis(20);

/// An engine as a [`Judge`].
pub struct Guest {
    name: &'static str,
    engine: Arc<dyn Engine>,
    vcpu: Box<dyn Vcpu>,
    region: Arc<Region>,
    start: CpuState,
    scratch: CpuState,
    watch: Arc<Watch>,
}

/// The run in progress: odd while one is, so that a watcher can tell.
struct Watch {
    run: AtomicU64,
    kicked: AtomicU64,
    /// How many times [`PATIENCE`] it may take.
    factor: AtomicU32,
    /// Clock of the processor time of the thread that runs, 0 at first.
    clock: AtomicI32,
}

impl Watch {
    fn patience(&self) -> Duration {
        if self.clock.load(Ordering::SeqCst) == libc::CLOCK_MONOTONIC {
            PATIENCE_BY_THE_WALL
        } else {
            PATIENCE
        }
    }

    fn spent(&self) -> Duration {
        processor_time::spent(self.clock.load(Ordering::SeqCst))
    }
}

fn watch(watch: &Weak<Watch>, kicker: &dyn Kicker) {
    let (mut seen, mut since) = (0, Duration::ZERO);
    loop {
        std::thread::sleep(LOOK);
        let Some(watch) = watch.upgrade() else { return };
        let run = watch.run.load(Ordering::SeqCst);
        if run % 2 == 0 || run != seen {
            (seen, since) = (run, watch.spent());
        } else if watch.spent().saturating_sub(since)
            >= watch.patience() * watch.factor.load(Ordering::SeqCst)
        {
            watch.kicked.store(run, Ordering::SeqCst);
            kicker.kick();
        }
    }
}

impl Guest {
    /// Build the guest on an engine that has no memory mapped yet.
    ///
    /// # Errors
    /// What the engine refused.
    pub fn new(engine: Arc<dyn Engine>) -> bunshin_core::Result<Self> {
        let region = Region::new(RAM)?;
        build(&region);
        engine.map(0, &region, 0, RAM, false)?;
        let mut vcpu = engine.vcpu(0)?;
        let start = start_state(vcpu.state());
        let shared = Arc::new(Watch {
            run: AtomicU64::new(0),
            kicked: AtomicU64::new(0),
            factor: AtomicU32::new(1),
            clock: AtomicI32::new(0),
        });
        let (weak, kicker) = (Arc::downgrade(&shared), vcpu.kicker());
        std::thread::spawn(move || watch(&weak, &*kicker));
        let scratch = start.clone();
        Ok(Self { name: engine.name(), engine, vcpu, region, start, scratch, watch: shared })
    }

    /// Judge patience by the clock on the wall, for engines that let others run the code.
    pub fn wait_by_the_wall(&self) {
        self.watch.clock.store(libc::CLOCK_MONOTONIC, Ordering::SeqCst);
    }

    /// The engine's counters.
    pub fn stats(&self) -> Vec<(&'static str, u64)> {
        self.vcpu.stats()
    }

    /// The guest does not notice that so many ticks have passed, as after a pause.
    pub fn skip_time(&mut self, ticks: u64) {
        self.vcpu.skip_time(ticks);
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        if let Some(offset) = image_offset(address, bytes.len()) {
            self.engine.write(ARENA + offset as u64, bytes);
        }
    }

    fn word(&self, gpa: u64) -> u64 {
        let mut bytes = [0; 8];
        self.region.read(gpa as usize, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    /// Run until a stub's OUT; its number.
    fn run_to_stub(&mut self) -> Result<u16, Stop> {
        let failed = |reason: String| Err(Stop::Failed(reason));
        if self.watch.clock.load(Ordering::Relaxed) == 0 {
            self.watch.clock.store(processor_time::of_this_thread(), Ordering::SeqCst);
        }
        let run = self.watch.run.fetch_add(1, Ordering::SeqCst) + 1;
        let stub = loop {
            match self.vcpu.run(Reply::None) {
                Exit::PioOut { port, .. } if (PORT..=PORT + INT80).contains(&port) => {
                    self.vcpu.complete(Reply::None);
                    break Ok(port - PORT);
                }
                Exit::Kicked if self.watch.kicked.load(Ordering::SeqCst) == run => break Err(Stop::Timeout),
                Exit::Kicked => {}
                Exit::Shutdown { reason } => break failed(format!("shutdown: {reason}")),
                Exit::Failed { reason } => break failed(reason),
                other => {
                    self.vcpu.complete(Reply::None);
                    break failed(format!("unexpected exit {other:?}"));
                }
            }
        };
        self.watch.run.fetch_add(1, Ordering::SeqCst);
        stub
    }

    fn run_state(&mut self, state: &mut UserState, narrow: bool) -> Stop {
        self.scratch.clone_from(&self.start);
        let cpu = &mut self.scratch;
        let data = cpu.segments[2];
        (cpu.segments[0], cpu.segments[3]) = (data, data);
        if narrow {
            cpu.segments[1] = Segment { selector: 0x23, base: 0, limit: u32::MAX, access: 0xc0fb };
        }
        cpu.gpr = state.gpr;
        cpu.rip = state.rip;
        cpu.rflags = state.rflags | 0x202;
        let length = cpu.xsave.len().min(XSAVE_BYTES);
        cpu.xsave[..length].copy_from_slice(&state.xsave.0[..length]);
        if let Err(error) = self.vcpu.set_state(cpu) {
            return Stop::Failed(format!("set_state: {error}"));
        }
        let stub = match self.run_to_stub() {
            Ok(stub) => stub,
            Err(stop) => return stop,
        };
        let cpu = self.vcpu.state();
        state.gpr = cpu.gpr;
        let length = cpu.xsave.len().min(XSAVE_BYTES);
        state.xsave.0[..length].copy_from_slice(&cpu.xsave[..length]);
        state.xsave.normalise();
        if stub == SYSCALL {
            state.rip = cpu.gpr[1];
            state.rflags = cpu.gpr[11];
            return Stop::Syscall;
        }
        state.gpr[4] = self.word(STACK_TOP - 16);
        state.rflags = self.word(STACK_TOP - 24);
        state.rip = self.word(STACK_TOP - 40);
        let error = self.word(STACK_TOP - 48) as u32;
        match stub {
            3 => Stop::Breakpoint,
            INT80 => Stop::Syscall,
            14 => Stop::Fault { vector: 14, error, address: cpu.cr2 },
            8 | 10..=13 | 17 | 21 => Stop::Fault { vector: stub as u8, error, address: 0 },
            _ => Stop::Fault { vector: stub as u8, error: 0, address: 0 },
        }
    }
}

impl Judge for Guest {
    fn name(&self) -> &'static str {
        self.name
    }

    fn run_patiently(&mut self, case: &Case) -> Outcome {
        self.watch.factor.store(PATIENT, Ordering::SeqCst);
        let outcome = self.run(case);
        self.watch.factor.store(1, Ordering::SeqCst);
        outcome
    }

    fn run(&mut self, case: &Case) -> Outcome {
        for (address, bytes) in case.writes() {
            self.write(address, &bytes);
        }
        let mut state = case.state.clone();
        let stop = self.run_state(&mut state, case.narrow);
        let segments = self.vcpu.state().segments;
        let selectors = [0, 3, 4, 5].map(|n: usize| null(segments[n].selector));
        let arena = self.region.host().cast_const().wrapping_add(ARENA as usize);
        // SAFETY: the arena lies inside the region and the guest is stopped.
        let memory = unsafe { changed_lines(|i| arena.wrapping_add(SEGMENTS[i].offset)) };
        let image = base_image();
        // Neighbouring lines go back together.
        let mut lines = memory.iter().map(|(offset, _)| *offset).peekable();
        while let Some(first) = lines.next() {
            let mut end = first + LINE;
            while lines.peek() == Some(&end) {
                lines.next();
                end += LINE;
            }
            self.engine.write(ARENA + first as u64, &image[first..end]);
        }
        let bases = [4, 5].map(|n: usize| segments[n].base);
        Outcome { state, selectors, bases, stop, memory }
    }
}

/// Tables, stubs and the base image.
fn build(region: &Region) {
    let put = |gpa: u64, bytes: &[u8]| {
        region.write(gpa as usize, bytes);
    };
    let entry = |table: u64, index: u64, value: u64| put(table + 8 * index, &value.to_le_bytes());
    // Present, writable, user, accessed, dirty.
    const USER: u64 = 0x67;
    const SUPERVISOR: u64 = 0x63;
    const LARGE: u64 = 0x80;
    const NO_EXECUTE: u64 = 1 << 63;
    entry(PML4, 0, PDPT | USER);
    entry(PDPT, 0, PD | USER);
    for (i, s) in SEGMENTS.iter().enumerate() {
        let table = PT + i as u64 * PAGE;
        entry(PD, s.base >> 21, table | USER);
        for page in 0..s.length / PAGE {
            let gpa = ARENA + s.offset as u64 + page * PAGE;
            let no_execute = if s.executable { 0 } else { NO_EXECUTE };
            entry(table, (s.base >> 12 & 511) + page, gpa | USER | no_execute);
        }
    }
    entry(PML4, 256, HIGH_PDPT | SUPERVISOR);
    entry(HIGH_PDPT, 0, HIGH_PD | SUPERVISOR);
    entry(HIGH_PD, 0, SUPERVISOR | LARGE);

    for (selector, access) in
        [(KERNEL_CS, 0xa09b), (0x18, 0xc093), (0x20, 0xc0fb), (USER_SS & !3, 0xc0f3), (USER_CS & !3, 0xa0fb)]
    {
        entry(GDT, u64::from(selector) / 8, flat(access));
    }
    let tss = HALF + TSS;
    entry(GDT, u64::from(TR) / 8, (tss & 0xff_ffff) << 16 | 0x67 | 0x8b << 40 | (tss >> 24 & 0xff) << 56);
    entry(GDT, u64::from(TR) / 8 + 1, tss >> 32);
    // RSP0; no I/O bitmap.
    put(TSS + 4, &(HALF + STACK_TOP).to_le_bytes());
    put(TSS + 102, &104u16.to_le_bytes());

    for vector in 0..256u64 {
        let number = if vector == 0x80 { u64::from(INT80) } else { vector.min(31) };
        let at = HALF + STUBS + number * STUB_LENGTH;
        // Linux lets user mode raise these.
        let from_user = matches!(vector, 3 | 4 | 0x80);
        let access: u64 = if from_user { 0xee } else { 0x8e };
        let low = (at & 0xffff) | u64::from(KERNEL_CS) << 16 | access << 40 | (at >> 16 & 0xffff) << 48;
        entry(IDT, 2 * vector, low);
        entry(IDT, 2 * vector + 1, at >> 32);
    }
    for number in 0..=INT80 {
        // out port, al; hlt
        let stub = [0xe6, (PORT + number) as u8, 0xf4];
        put(STUBS + u64::from(number) * STUB_LENGTH, &stub);
    }
    put(ARENA, &base_image()[..IMAGE_LENGTH]);
    const { assert!(CODE_LENGTH % PAGE == 0) };
}

/// A flat descriptor: base 0, limit 4 GiB.
fn flat(access: u64) -> u64 {
    0xffff | (access & 0xff) << 40 | 0xf << 48 | (access >> 12) << 52
}

/// The processor in user mode, everything but the case's registers.
fn start_state(mut state: CpuState) -> CpuState {
    let segment = |selector: u16, access: u32| Segment { selector, base: 0, limit: u32::MAX, access };
    let null = Segment { selector: 0, base: 0, limit: 0, access: 1 << 16 };
    let data = segment(USER_SS, 0xc0f3);
    state.segments = [null, segment(USER_CS, 0xa0fb), data, null, null, null];
    state.ldt = null;
    state.tr = Segment { selector: TR, base: HALF + TSS, limit: 0x67, access: 0x8b };
    state.gdt = Table { base: HALF + GDT, limit: 0x4f };
    state.idt = Table { base: HALF + IDT, limit: 0xfff };
    // PE MP ET NE WP AM PG
    state.cr0 = 0x8005_0033;
    state.cr2 = 0;
    state.cr3 = PML4;
    // PAE PGE OSFXSR OSXMMEXCPT FSGSBASE OSXSAVE
    state.cr4 = 1 << 5 | 1 << 7 | 1 << 9 | 1 << 10 | 1 << 16 | 1 << 18;
    state.cr8 = 0;
    // The time-stamp counter as it is: without an offset, user code can run directly.
    state.tsc = 0;
    state.xcr0 = Layout::host().features;
    state.dr = [0, 0, 0, 0, 0xffff_0ff0, 0x400];
    state.halted = false;
    state.interrupt_shadow = false;
    state.nmi_blocked = false;
    let wanted = [
        (EFER, 0xd01),
        (STAR, 0x23 << 48 | u64::from(KERNEL_CS) << 32),
        (LSTAR, HALF + STUBS + u64::from(SYSCALL) * STUB_LENGTH),
        (FMASK, 0x4_7700),
    ];
    for (index, value) in wanted {
        match state.msrs.binary_search_by_key(&index, |(i, _)| *i) {
            Ok(at) => state.msrs[at].1 = value,
            Err(at) => state.msrs.insert(at, (index, value)),
        }
    }
    if state.xsave.len() < Layout::host().size {
        state.xsave.resize(XSAVE_BYTES, 0);
    }
    state
}
