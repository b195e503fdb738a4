//! One virtual processor: its parts, and the loop between translated code and
//! everything that is not translated code.
use crate::block::{Blocks, Key, NumberMap};
use crate::cache::CodeCache;
use crate::counters::{Counters, Family, Times};
use crate::cpu::{exit, Cpu, NO_SITE, RF, SAMPLES, TF};
use crate::debugger::Debugger;
use crate::direct::Direct;
use crate::interp::debug::Armed;
use crate::interp::{self, Flow, Helper};
use crate::mmu::{Exception, Filled, Phys, Regions, Trap, Who, INFO_GROUP, INFO_WRITE};
use crate::resume::{Behind, Left, SlowSite};
use crate::revive::Grave;
use crate::shared::{Crew, Moment, Shared};
use crate::stubs::Stubs;
use crate::translate::{Lesson, Scratch, Version};
use crate::{asm::Asm, perf_map, signals};
use bunshin_core::chips::Chips;
use bunshin_core::state::Event;
use bunshin_core::{clock, panics, Exit, Reply, Result};
use iced_x86::{Instruction, InstructionInfoFactory, Mnemonic as M};
use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{fence, AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// Bits that translations depend on besides their bytes and address.
pub mod mode {
    pub const BITS16: u32 = 0;
    pub const BITS32: u32 = 1;
    pub const BITS64: u32 = 2;
    const BITS: u32 = 3;
    /// Privilege level 3.
    pub const USER: u32 = 4;
    /// The base of CS is not zero.
    pub const BASED: u32 = 8;
    /// CR4.FSGSBASE is clear.
    pub const NO_FSGSBASE: u32 = 16;
    /// CR4.UMIP is set.
    pub const UMIP: u32 = 32;
    /// CR4.TSD is set.
    pub const TSD: u32 = 64;

    /// In 16- or 32-bit code: DS, ES or SS is not flat, or the stack pointer has not
    /// the code's size.
    pub const LIMITED: u32 = 256;
    /// CS ends before 4 GiB.
    pub const CODE_LIMITED: u32 = 512;
    /// x87, MMX and vector instructions are shut off by CR0.EM or TS, SSE by
    /// CR4.OSFXSR, AVX and AVX-512 by CR4.OSXSAVE or XCR0.
    pub const NO_FPU: u32 = 1 << 12;
    pub const NO_SSE: u32 = 1 << 13;
    pub const NO_AVX: u32 = 1 << 14;
    pub const NO_AVX512: u32 = 1 << 15;
    /// Instructions are counted (`count.rs`); the block was cut to a length for that.
    pub const COUNTED: u32 = 1 << 17;
    pub const CUT: u32 = 1 << 18;
    /// Alignment is checked: level 3, CR0.AM and AC.
    pub const ALIGN: u32 = 1 << 16;
    /// Breakpoints on code are armed.
    pub const DEBUG: u32 = 2048;
    /// Privilege level 1 or 2.
    pub const MIDDLE: u32 = 1024;

    /// The version of a block in which no accesses share a probe.
    pub const ALONE: u32 = 128;

    /// Operand size of the code segment.
    pub fn bits(m: u32) -> u32 {
        match m & BITS {
            BITS16 => 16,
            BITS32 => 32,
            _ => 64,
        }
    }
}

/// An instruction that Rust performs.
pub struct HelperEntry {
    pub insn: Instruction,
    pub helper: Helper,
    pub family: Family,
    pub serialises: bool,
}

impl HelperEntry {
    pub fn new(insn: Instruction) -> Self {
        Self::by(insn, interp::helper(&insn))
    }

    /// Something else to do for it.
    pub fn by(insn: Instruction, helper: Helper) -> Self {
        Self { helper, family: Family::of(&insn), serialises: interp::serialises(&insn), insn }
    }
}

/// Which code of user mode is hot code, worth a better translation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Effort {
    /// What samples find. A timer signal reaches the thread that runs a processor.
    Sampled,
    /// All of it, for tests.
    Always,
    /// None, for tests.
    Never,
}

pub struct Vcpu {
    pub index: u32,
    cpu: *mut Cpu,
    pub regions: Regions,
    /// Region in use, and the one of the current address space's user mode.
    pub region: usize,
    pub user_region: usize,
    pub clock: u64,
    /// Supervisor code was run from pages that are not global.
    pub nonglobal_code: bool,
    pub phys: Phys,
    pub cache: CodeCache,
    pub stubs: Stubs,
    pub blocks: Blocks,
    pub helpers: Vec<HelperEntry>,
    /// Dropped translations that may fit again.
    pub graves: NumberMap<Key, Grave>,
    /// Single instructions with their operand in the bounce buffer, by bytes.
    pub snippets: NumberMap<u128, u64>,
    /// Places that left with a single access, by host address.
    pub slow_sites: NumberMap<u64, SlowSite>,
    /// Kept from one translation to the next for their memory.
    pub asm: Asm,
    pub window: Vec<u8>,
    pub factory: Option<InstructionInfoFactory>,
    pub scratch: Scratch,
    pub chips: Arc<Chips>,
    pub shared: Arc<Shared>,
    /// All processors of the machine.
    pub crew: Arc<Crew>,
    /// Came in through the gate.
    pub inside: bool,
    /// In an exclusive section.
    pub exclusive: bool,
    /// Translated code runs, if only to have called a helper.
    pub in_code: bool,
    /// An exception whose frame could not be written from within translated code.
    pub deferred: Option<Exception>,
    pub counters: Counters,
    pub times: Times,
    pub msrs: crate::msr::Msrs,
    pub cpuid: Arc<crate::cpuid::Table>,
    /// Whether device accesses may leave to the owner now.
    pub may_exit: bool,
    /// Device reads already answered for the instruction in progress.
    pub answers: Vec<u64>,
    pub answer_next: usize,
    /// Device writes of completed instructions.
    pub outbox: VecDeque<Exit>,
    /// The instruction that an exit interrupted.
    pub waiting: Option<Instruction>,
    /// The owner owes an answer to this exit.
    pub owed: Option<Owed>,
    /// Where the last exit left translated code.
    pub left: Option<Left>,
    /// Came with a state, to be delivered before the next instruction.
    pub incoming: Option<Event>,
    /// The interrupt controllers are another engine's: accesses to them are the owner's.
    pub foreign: bool,
    /// Look for events at the next run, whatever `eventful` says.
    pub look: bool,
    pub fatal: Option<Exit>,
    /// Bytes of the instruction fetched last.
    pub bytes: [u8; 15],
    /// A kick came while a snippet ran.
    pub again: bool,
    pub effort: Effort,
    /// Samples that found user code, and more than `AGAIN` to begin with.
    pub found: u64,
    /// XSAVE components that the last exit found in use.
    pub saved: u64,
    /// When the guest's system time is zero.
    pub start: Moment,
    pub doorbells: Arc<Mutex<Vec<crate::engine::Doorbell>>>,
    /// Translate as if every arithmetic flag were read.
    pub exact_flags: bool,
    /// The A20 gate is open, and the bits of a gpa that it lets through here so far.
    pub gate: Arc<AtomicBool>,
    pub lines: u64,
    /// Page-directory pointers of PAE paging, as they were when CR3 was loaded.
    pub pdptes: [u64; 4],
    /// Breakpoints that are armed, and those that the present instruction met.
    pub armed: Armed,
    pub met: u8,
    /// What the owner wants to stop for.
    pub debugger: Debugger,
    /// Instructions executed in runs that count them, and the clock that they saw last.
    pub executed: u64,
    /// `executed` when that was asked for last.
    pub started: u64,
    pub script: Option<u64>,
    /// The run before was counted out between two blocks: this one goes on as it would have.
    pub resumed: bool,
    /// The present instruction is a repeated one that goes on later.
    pub unfinished: bool,
    /// Most instructions that blocks get now; the block that was made so.
    pub cut_at: Option<usize>,
    pub cut: Option<u32>,
    /// Draws from the generator that stands for the host's in such runs.
    pub draws: u64,
    pub plant: Option<crate::count::Plant>,
    /// User code may run directly.
    pub direct: Option<Box<Direct>>,
    timer: signals::Timer,
    sampler: signals::Timer,
    timer_set: u64,
    registered: bool,
}

/// What an unanswered exit waits for.
#[derive(Clone, Debug)]
pub enum Owed {
    /// The value joins `answers`, the instruction runs again.
    Answer { size: u8, count: u32 },
}

// SAFETY: raw pointers lead into memory that the Vcpu owns.
unsafe impl Send for Vcpu {}

/// Room that one translation may need, bytes.
const ROOM: usize = 1 << 16;
/// Most blocks, dead ones included, before everything is translated afresh.
const BLOCKS: usize = 400_000;
/// Most points of them all.
const POINTS: usize = 4_000_000;
/// Code cache, bytes.
const CACHE: usize = 96 << 20;
/// A slot is given up that changes its page more often than once in so many ticks.
const RESTLESS: u64 = 100;
/// Finding a bound is cheaper, and is done instead of many looks at slots.
const RESTLESS_BOUND: u64 = 12;
/// A loop that is entered more often than once in so many ticks is part of a larger one.
const SHORT: u64 = 60;
/// A loop that is entered more often than once in so many ticks is none.
const STRAIGHT: u64 = 60;
/// Processor time between two samples, nanoseconds.
const SAMPLE_NS: i64 = 1_000_000;
/// What comes of that on most hosts, milliseconds.
const SAMPLE_MS: u64 = 4;
/// Code is frequent that two of so many samples find: programs whose time is spread
/// thin gain nothing by slots.
const AGAIN: u64 = 64;
/// Ticks that a change of a slot's page costs, a branch foretold wrong among them, and
/// that a slot saves at each turn.
const REFILL: u64 = 60;
const SAVED: u64 = 3;
/// Bytes of host code that run in a tick.
const BYTES_A_TICK: u64 = 16;

impl Vcpu {
    /// Build processor `index` with its tables and stubs.
    pub fn new(
        index: u32,
        phys: Phys,
        chips: Arc<Chips>,
        cpuid: Arc<crate::cpuid::Table>,
        crew: Arc<Crew>,
    ) -> Result<Box<Self>> {
        signals::install();
        // Built at first use, with functions that helpers may not call.
        let _ = iced_x86::Code::INVALID.op_code();
        let mut cache = CodeCache::new(CACHE)?;
        let stubs = Stubs::write(&mut cache, crate::vector::Means::of_host());
        if perf_map::is_on() {
            stubs.tell(cache.range().0, cache.next());
        }
        let mut regions = Regions::new()?;
        regions.set_miss(stubs.lookup);
        let cpu = regions.cpu;
        // SAFETY: the page is mapped and nobody else uses it yet.
        let pending = unsafe { &raw const (*cpu).pending };
        let shared = Arc::new(Shared::new(pending, !crew.single()));
        crew.join(index, shared.clone());
        let clock = &chips.clock;
        let scripted = Moment { tsc: clock.tsc(), ns: clock.now_ns(), system_ns: 0 };
        let start = if clock.script().is_some() { scripted } else { crew.start };
        let mut v = Box::new(Self {
            index,
            cpu,
            regions,
            region: 0,
            user_region: 1,
            clock: 0,
            nonglobal_code: false,
            phys,
            cache,
            stubs,
            blocks: Blocks::default(),
            helpers: Vec::new(),
            graves: NumberMap::default(),
            snippets: NumberMap::default(),
            slow_sites: NumberMap::default(),
            asm: Asm::default(),
            window: Vec::new(),
            factory: None,
            scratch: Scratch::default(),
            chips,
            shared,
            crew,
            inside: false,
            exclusive: false,
            in_code: false,
            deferred: None,
            counters: Counters::default(),
            times: Times::default(),
            msrs: crate::msr::Msrs::default(),
            cpuid,
            may_exit: false,
            answers: Vec::new(),
            answer_next: 0,
            outbox: VecDeque::new(),
            waiting: None,
            owed: None,
            left: None,
            incoming: None,
            foreign: false,
            look: true,
            fatal: None,
            bytes: [0; 15],
            again: false,
            effort: Effort::Sampled,
            found: 2 * AGAIN,
            saved: u64::MAX,
            start,
            doorbells: Arc::default(),
            exact_flags: false,
            gate: Arc::new(AtomicBool::new(true)),
            lines: u64::MAX,
            pdptes: [0; 4],
            armed: Armed::default(),
            met: 0,
            debugger: Debugger::default(),
            executed: 0,
            started: 0,
            script: None,
            resumed: false,
            unfinished: false,
            cut_at: None,
            cut: None,
            draws: 0,
            plant: None,
            direct: None,
            timer: signals::Timer::default(),
            sampler: signals::Timer::default(),
            timer_set: 0,
            registered: false,
        });
        let me = &raw mut *v;
        let fault_stub = v.stubs.fault;
        let c = v.cpu_mut();
        c.vcpu = me as u64;
        c.fn_fill = fill as *const () as u64;
        c.fn_lookup = lookup as *const () as u64;
        c.fn_link = link as *const () as u64;
        c.fn_helper = run_helper as *const () as u64;
        c.fault_stub = fault_stub;
        c.mask63 = 63;
        c.pages = !0xfff;
        c.mask31 = 31;
        c.sign = 1 << 63;
        c.astray = [1 << 32, 0];
        v.reset();
        Ok(v)
    }

    pub fn cpu(&self) -> &Cpu {
        // SAFETY: owned by `regions`; translated code does not run while Rust does.
        unsafe { &*self.cpu }
    }

    pub fn cpu_mut(&mut self) -> &mut Cpu {
        // SAFETY: as in `cpu`.
        unsafe { &mut *self.cpu }
    }

    /// Mode bits of the current state.
    pub fn mode(&self) -> u32 {
        let c = self.cpu();
        let mut m = if c.code64() {
            mode::BITS64
        } else if c.seg[1].big() {
            mode::BITS32
        } else {
            mode::BITS16
        };
        m |= match c.cpl {
            0 => 0,
            3 => mode::USER,
            _ => mode::MIDDLE,
        };
        if m & 3 != mode::BITS64 {
            if c.seg[1].base != 0 {
                m |= mode::BASED;
            }
            if c.seg[1].limit != u32::MAX {
                m |= mode::CODE_LIMITED;
            }
            if !(c.seg[0].flat() && c.seg[2].flat() && c.seg[3].flat()) || c.seg[2].big() != c.seg[1].big() {
                m |= mode::LIMITED;
            }
        }
        if c.cr4 & (1 << 16) == 0 {
            m |= mode::NO_FSGSBASE;
        }
        if c.cr4 & (1 << 11) != 0 {
            m |= mode::UMIP;
        }
        if self.armed.code {
            m |= mode::DEBUG;
        }
        if self.counting() {
            m |= mode::COUNTED;
        }
        if self.aligned() {
            m |= mode::ALIGN;
        }
        m |= self.shut();
        if c.cr4 & 4 != 0 {
            m |= mode::TSD;
        }
        m
    }

    /// Who fetches code at the current privilege.
    pub fn fetcher(&self) -> Who {
        if self.cpu().cpl == 3 {
            Who::User
        } else {
            Who::Supervisor
        }
    }

    /// Linear address of `rip`.
    pub fn linear_rip(&self, rip: u64) -> u64 {
        let c = self.cpu();
        if c.code64() {
            rip
        } else {
            rip.wrapping_add(c.seg[1].base) & 0xffff_ffff
        }
    }

    /// The mapping of code may have changed as a whole.
    pub fn code_moved(&mut self) {
        self.unlink_far();
        let miss = self.stubs.lookup;
        self.regions.all[0].flush_jc(miss);
        self.nonglobal_code = false;
    }

    // --- the loop ------------------------------------------------------------

    /// Run until the owner is needed.
    pub fn run(&mut self, reply: Reply) -> Exit {
        self.attach();
        let script = self.chips.clock.script();
        self.look |= std::mem::replace(&mut self.script, script) != script;
        let turn = Turn::new(self);
        let e = if turn.0.debugger.steps() { turn.0.run_one(reply) } else { turn.0.run_loop(reply) };
        drop(turn);
        signals::leave();
        self.owe(&e);
        if self.owed.is_none()
            && !matches!(e, Exit::PioOut { .. } | Exit::MmioWrite { .. })
            && !self.counted_stop(&e)
        {
            // A kick may have come together with something else.
            self.look = true;
            if perf_map::is_on() {
                perf_map::flush();
            }
        }
        e
    }

    /// Remember what answer the owner owes to an exit.
    pub fn owe(&mut self, e: &Exit) {
        self.owed = match *e {
            Exit::PioIn { size, count, .. } => Some(Owed::Answer { size, count }),
            Exit::MmioRead { size, .. } => Some(Owed::Answer { size, count: 1 }),
            Exit::Hypercall { .. } => Some(Owed::Answer { size: 8, count: 1 }),
            _ => None,
        };
    }

    // In all the time: see `Turn`.
    fn run_loop(&mut self, reply: Reply) -> Exit {
        if let Some(e) = &self.fatal {
            return e.clone();
        }
        let answered = self.owed.is_some();
        if answered {
            self.answer(reply);
        }
        if let Some(e) = self.outbox.pop_front() {
            return e;
        }
        let way = self.go_on(answered);
        if answered {
            self.count_step();
        }
        let mut inside = match way {
            ControlFlow::Continue(()) => true,
            ControlFlow::Break(None) => false,
            ControlFlow::Break(Some(e)) => return e,
        };
        loop {
            if !inside && self.counting() {
                if let Some(e) = self.spent() {
                    return e;
                }
            }
            let resumed = std::mem::take(&mut self.resumed);
            if std::mem::take(&mut self.look) || self.eventful_after(resumed) {
                inside = false;
                let (started, halted) = (clock::rdtsc(), self.times.halted);
                let e = self.events();
                self.times.events += clock::rdtsc() - started - (self.times.halted - halted);
                if let Some(e) = e {
                    return e;
                }
                if self.cpu().halted != 0 {
                    continue;
                }
            }
            if self.cpu().eflags & (TF | RF) != 0 || self.cpu().shadow != 0 {
                if let Some(e) = self.owners_breakpoint() {
                    return e;
                }
                match self.code_breakpoint() {
                    Some(e) => {
                        self.deliver(e);
                        self.debugger.stepped = true;
                        self.count_step();
                    }
                    None => {
                        let e = self.step();
                        self.count_step();
                        if let Some(e) = e {
                            return e;
                        }
                    }
                }
                inside = false;
                continue;
            }
            if self.goes_direct() {
                inside = false;
                if let ControlFlow::Break(e) = self.run_direct() {
                    return e.expect("left for an exit");
                }
                continue;
            }
            if !std::mem::take(&mut inside) {
                let rip = self.cpu().rip;
                let found = if self.counting() {
                    self.counted_block(rip, false)
                } else {
                    self.find_block(rip, false).or_else(|| self.translate_here(rip, NO_SITE))
                };
                let Some(id) = found else { continue };
                self.cpu_mut().resume = self.blocks.all[id as usize].body;
            }
            if let Some(e) = self.enter() {
                return e;
            }
            if self.fatal.is_some() {
                return self.fatal.clone().unwrap();
            }
        }
    }

    pub fn cache_full(&self) -> bool {
        self.cache.room() < ROOM || self.blocks.all.len() > BLOCKS || self.blocks.points > POINTS
    }

    /// Translate what the samples found again, with more effort.
    fn heat(&mut self) {
        if self.counting() {
            return;
        }
        for k in 0..SAMPLES {
            let pc = self.cpu().samples[k];
            let Some((b, _)) = self.blocks.holds(pc) else { continue };
            let key = b.key;
            // Now is another time: what runs may be another program.
            let usual = key.mode & !mode::ALONE == self.mode();
            if b.dead || !usual || key.mode & mode::USER == 0 || self.cache_full() {
                continue;
            }
            let Some(id) = self.find_block(key.va, key.mode & mode::ALONE != 0) else { continue };
            if self.blocks.all[id as usize].key.gpa != key.gpa {
                continue;
            }
            let b = &mut self.blocks.all[id as usize];
            self.found += 1;
            let since = self.found - std::mem::replace(&mut b.seen, self.found);
            if b.heat.is_none() && since > AGAIN {
                continue;
            }
            let Some(lesson) = self.lesson(id) else { continue };
            self.kill(id);
            if self.translate(key.va, &mut Version::Hot(lesson)).is_ok() {
                self.counters.hot_blocks += 1;
            }
        }
    }

    /// What was learned of a block, if that is new: that it is hot at all, or how
    /// its slots and its loop fare.
    fn lesson(&mut self, id: u32) -> Option<Lesson> {
        let cpu = self.cpu;
        let b = &mut self.blocks.all[id as usize];
        let alone = b.key.mode & mode::ALONE != 0;
        let Some(h) = &mut b.heat else { return Some(Lesson { alone, ..Lesson::default() }) };
        // SAFETY: as in `cpu_mut`; `blocks` is no part of the page.
        let refills = unsafe { &mut (*cpu).refills };
        let now = clock::rdtsc();
        let ticks = now - std::mem::replace(&mut h.since, now);
        let often = |n: u32, most| ticks < most * u64::from(refills[n as usize]);
        // Between two samples that find it the block runs for about one sample's time.
        let turns = clock::tsc_hz() / 1000 * SAMPLE_MS / (u64::from(b.host_length) / BYTES_A_TICK).max(1);
        let loses = |n: u32| u64::from(refills[n as usize]) * REFILL > turns * SAVED;
        let mut lesson = h.lesson.clone();
        for &(guest, n) in &h.slots {
            let bound = h.bounds.contains(&n);
            let most = if bound { RESTLESS_BOUND } else { RESTLESS };
            if (often(n, most) || !bound && loses(n)) && !lesson.restless.contains(&guest) {
                lesson.restless.push(guest);
            }
        }
        let entered = |most| h.entries.is_some_and(|n| often(n, most));
        // Bounds are for the innermost loop alone.
        if !h.bounds.is_empty() {
            lesson.short |= entered(SHORT);
        } else {
            lesson.straight |= entered(STRAIGHT);
        }
        for &n in &h.taken {
            refills[n as usize] = 0;
        }
        (lesson != h.lesson).then_some(lesson)
    }

    fn translate_here(&mut self, rip: u64, site: u32) -> Option<u32> {
        let mut site = site;
        let mut version = if self.is_alone(site) {
            Version::Alone
        } else if self.effort == Effort::Always && self.cpu().cpl == 3 {
            Version::Hot(Lesson::default())
        } else {
            Version::First
        };
        if self.cache_full() {
            self.flush_code();
            site = NO_SITE;
        }
        let flushes = self.counters.cache_flushes;
        match self.translate(rip, &mut version) {
            Ok(id) => {
                // The sites may have been dropped by order of another processor.
                if site != NO_SITE && self.counters.cache_flushes == flushes {
                    self.link_to(site, id);
                }
                Some(id)
            }
            Err(e) => {
                // A breakpoint comes before what is wrong with fetching.
                let e = self.code_breakpoint().unwrap_or(e);
                self.deliver(e);
                None
            }
        }
    }

    /// Run translated code from `cpu.resume` until something needs the loop.
    fn enter(&mut self) -> Option<Exit> {
        loop {
            self.run_code();
            let (code, arg) = (self.cpu().exit, self.cpu().arg);
            match code {
                exit::TRANSLATE => {
                    let rip = self.cpu().rip;
                    if self.cpu().pending.load(Ordering::Relaxed) != 0 || self.cpu().eflags & TF != 0 {
                        return None;
                    }
                    let alone = self.is_alone(arg);
                    if self.counting() {
                        if alone {
                            self.not_begun();
                        }
                        self.tally();
                        let pending = self.cpu().pending.load(Ordering::Relaxed) != 0;
                        if pending || self.cpu().eflags & TF != 0 {
                            return None;
                        }
                        if self.counted_enough() {
                            self.resumed = true;
                            return None;
                        }
                        let id = self.counted_block(rip, alone)?;
                        self.cpu_mut().resume = self.blocks.all[id as usize].body;
                        continue;
                    }
                    let id = match self.find_block(rip, alone) {
                        Some(id) => id,
                        None => self.translate_here(rip, arg)?,
                    };
                    self.cpu_mut().resume = self.blocks.all[id as usize].body;
                }
                exit::HELPER => {
                    let (insn, helper) = {
                        let h = &self.helpers[arg as usize];
                        (h.insn, h.helper)
                    };
                    let behind = Behind::Code(self.cpu().host_pc);
                    let started = self.times.outside.start();
                    let way = self.outside(&insn, helper, behind);
                    self.times.outside.stop(started);
                    if let ControlFlow::Break(e) = way {
                        return e;
                    }
                }
                exit::SLOW => {
                    let started = self.times.slow.start();
                    let way = self.slow_exit();
                    self.times.slow.stop(started);
                    if let ControlFlow::Break(e) = way {
                        return e;
                    }
                }
                exit::FAULT => {
                    if self.host_fault() {
                        return self.step();
                    }
                    return None;
                }
                exit::EVENT => return None,
                _ => {
                    self.fail(format!("translated code ended with unknown code {code}"));
                    return None;
                }
            }
        }
    }

    /// Set rip (and flags) to the guest instruction at `cpu.host_pc`.
    fn locate_rip(&mut self) {
        let pc = self.cpu().host_pc;
        // A return address lies behind its call.
        let Some((b, p)) = self.blocks.locate(pc - 1) else {
            self.fail(format!("host address {pc:#x} is in no translation"));
            return;
        };
        let rip = b.key.va.wrapping_add(p.guest as u64);
        self.cpu_mut().rip = rip;
    }

    /// The host processor faulted in a copied instruction. True if it must be
    /// performed with more care.
    fn host_fault(&mut self) -> bool {
        let pc = self.cpu().host_pc;
        let (vector, address) = (self.cpu().fault_vector as u8, self.cpu().fault_addr);
        let Some((b, p)) = self.blocks.locate(pc) else {
            self.fail(format!("host fault {vector} at {pc:#x} (address {address:#x}) in no translation"));
            return false;
        };
        let rip = b.key.va.wrapping_add(p.guest as u64);
        let hot = b.heat.is_some() || b.dead;
        // SAFETY: as in `cpu_mut`; the block is no part of the page.
        let c = unsafe { &mut *self.cpu };
        for m in &b.moved {
            let home = usize::from(m.host);
            if let Some(n) = m.guest {
                c.gpr[usize::from(n)] = c.gpr[home];
            }
            c.gpr[home] = c.away[home];
        }
        c.gpr[4] = c.gpr[4].wrapping_add(p.stack as u64);
        for (k, n) in p.held.iter().enumerate() {
            if let Some(n) = n {
                c.gpr[usize::from(*n)] = c.scratch[k];
            }
        }
        if p.host_flags {
            let f = self.cpu().fault_flags;
            self.cpu_mut().set_arith(f);
        }
        self.cpu_mut().rip = rip;
        if vector == crate::mmu::PF_ {
            self.fail(format!("translated code for rip {rip:#x} touched host address {address:#x}"));
            return false;
        }
        if hot && matches!(vector, crate::mmu::GP | crate::mmu::SS) {
            return true;
        }
        let e = if vector == crate::mmu::GP { Exception::gp() } else { Exception::new(vector) };
        self.deliver(e);
        false
    }

    /// Perform one instruction outside translated code. Ok(true): it fell
    /// through; Ok(false): look at rip afresh; Err: the owner is needed.
    pub fn perform(&mut self, insn: &Instruction, helper: Helper) -> std::result::Result<bool, Exit> {
        self.may_exit = true;
        self.answer_next = 0;
        let out = self.outbox.len();
        let before = self.cpu().eflags & TF;
        let shadow = std::mem::take(&mut self.cpu_mut().shadow);
        let r = (helper.run)(self, insn);
        self.may_exit = false;
        if matches!(r, Err(Trap::Exit(_))) {
            // It runs again, and what it met is met again.
            self.cpu_mut().shadow = shadow;
        } else if shadow != 0 && self.cpu().shadow == interp::debug::AFTER_SS {
            self.cpu_mut().shadow = 0;
        }
        if !self.crew.single() {
            // It may be one that serialises.
            fence(Ordering::SeqCst);
        }
        self.finish(insn, r, out, before)
    }

    fn finish(
        &mut self,
        insn: &Instruction,
        r: std::result::Result<Flow, Trap>,
        out: usize,
        traced: u64,
    ) -> std::result::Result<bool, Exit> {
        self.debugger.stepped = !matches!(r, Err(Trap::Exit(_)));
        match r {
            Ok(flow) => {
                self.answers.clear();
                if flow == Flow::Next {
                    self.cpu_mut().rip = insn.next_ip();
                }
                // INT n and SYSCALL clear TF and do not trap; POPF and IRET do.
                let restores =
                    matches!(insn.mnemonic(), M::Popf | M::Popfd | M::Popfq | M::Iret | M::Iretd | M::Iretq);
                if !restores {
                    self.cpu_mut().eflags &= !RF;
                }
                let traced = traced != 0 && (restores || self.cpu().eflags & TF != 0);
                let sequential = self.cpu().rip == insn.next_ip();
                if let Some(e) = self.due(traced, sequential) {
                    self.deliver(e);
                    return Ok(false);
                }
                Ok(flow == Flow::Next)
            }
            Err(Trap::Fault(e)) => {
                self.answers.clear();
                self.outbox.truncate(out);
                self.met = 0;
                self.deliver(e.settle(insn));
                Ok(false)
            }
            Err(Trap::Exit(e)) => {
                self.outbox.truncate(out);
                self.waiting = Some(*insn);
                Err(e)
            }
            Err(Trap::Device) => {
                self.fail("a device access could not be completed".into());
                Ok(false)
            }
        }
    }

    /// Perform the instruction at rip, whatever it is.
    pub fn step(&mut self) -> Option<Exit> {
        self.counters.slow_steps += 1;
        let insn = match self.fetch() {
            Ok(i) => i,
            Err(e) => {
                self.deliver(e);
                self.debugger.stepped = true;
                return None;
            }
        };
        if self.waiting.take().is_some_and(|w| w != insn) {
            // Another processor has changed it: the answers are not for this one.
            self.answers.clear();
        }
        let helper = Helper { run: crate::slow::any, outside: true };
        match self.perform(&insn, helper) {
            Ok(_) => self.outbox.pop_front(),
            Err(e) => Some(e),
        }
    }

    /// Take the owner's answer and finish the instruction that wanted it. An exit that
    /// comes back belongs to the same instruction.
    pub fn complete(&mut self, reply: Reply) -> Option<Exit> {
        self.look = true;
        if self.owed.is_some() {
            self.left = None;
            self.answer(reply);
            if let Some(e) = self.visit(Self::step) {
                self.owe(&e);
                return Some(e);
            }
        }
        self.outbox.pop_front()
    }

    /// Signal the doorbell at `gpa`, if there is one for this write.
    pub fn ring(&self, gpa: u64, size: u8, value: u64) -> bool {
        let bells = self.doorbells.lock().unwrap();
        let mut hit = false;
        for d in
            bells.iter().filter(|d| d.address == gpa && d.size == size && d.value.is_none_or(|v| v == value))
        {
            let one = 1u64;
            // SAFETY: writes 8 bytes to a descriptor that the owner gave.
            unsafe { libc::write(d.event, (&raw const one).cast(), 8) };
            hit = true;
        }
        hit
    }

    /// The local APIC is globally enabled.
    pub fn chips_enabled(&self) -> bool {
        matches!(self.chips.msr_read(self.index, 0x1b), Some(Ok(x)) if x & 0x800 != 0)
    }

    /// Take the owner's answer to the last exit.
    pub fn answer(&mut self, reply: Reply) {
        if let Some(Owed::Answer { size, count }) = self.owed.take() {
            match reply {
                Reply::Value(v) => self.answers.push(v),
                Reply::Bytes(b) => {
                    for n in 0..count as usize {
                        let mut v = [0; 8];
                        let s = usize::from(size);
                        if let Some(part) = b.get(n * s..n * s + s) {
                            v[..s].copy_from_slice(part);
                        }
                        self.answers.push(u64::from_le_bytes(v));
                    }
                }
                Reply::None => self.answers.push(u64::MAX),
            }
        }
    }

    /// The engine cannot go on.
    pub fn fail(&mut self, reason: String) {
        let c = self.cpu();
        let at = format!("{reason} (rip {:#x}, mode {:#x})", c.rip, self.mode());
        self.fatal.get_or_insert(Exit::Failed { reason: at });
    }

    pub fn shut_down(&mut self, reason: String) {
        self.fatal.get_or_insert(Exit::Shutdown { reason });
    }

    // --- events -----------------------------------------------------------------

    /// There may be something for `events` to do.
    pub fn eventful(&self) -> bool {
        let c = self.cpu();
        c.pending.load(Ordering::Relaxed) != 0
            || c.halted != 0
            || c.irq_waiting != 0 && c.iflag != 0
            || self.deferred.is_some()
            || self.fatal.is_some()
    }

    /// Kicks, timers, changed memory, interrupts; HLT waits here.
    pub fn events(&mut self) -> Option<Exit> {
        loop {
            if let Some(e) = &self.fatal {
                return Some(e.clone());
            }
            self.shared.listen();
            if self.cpu().pending.swap(0, Ordering::AcqRel) != 0 {
                self.counters.events += 1;
                self.regions.all[self.user_region].settle_slots();
            }
            self.give_way();
            if self.cpu().sampled as usize == SAMPLES {
                self.cpu_mut().sampled = 0;
                self.heat();
            }
            if let Some(e) = self.deferred.take() {
                self.deliver(e);
                continue;
            }
            if let Some(e) = self.incoming.take() {
                self.take_event(&e);
                continue;
            }
            if let Some(stop) = self.debugger.take_stop() {
                return Some(stop);
            }
            if self.shared.kicked.swap(false, Ordering::AcqRel) {
                return Some(Exit::Kicked);
            }
            let lines = if self.gate.load(Ordering::Acquire) { u64::MAX } else { !(1 << 20) };
            if std::mem::replace(&mut self.lines, lines) != lines {
                self.flush_tlb_all();
            }
            if self.chips.starting(self.index) && !self.start_up() {
                self.sleep(None);
                continue;
            }
            // The deadline first: one that has passed is told as the time of asking.
            let deadline = self.chips.next_deadline_ns(self.index);
            let now = self.chips.clock.now_ns();
            if deadline.is_some_and(|d| d <= now) {
                self.chips.tick(self.index, now);
            }
            self.arm();
            self.cpu_mut().irq_waiting = 0;
            let c = self.cpu();
            if self.debugger.holds_interrupts() {
                self.hold_interrupts();
            } else if c.nmi_blocked == 0 && c.shadow == 0 && self.chips.take_nmi(self.index) {
                self.cpu_mut().halted = 0;
                self.interrupt_now(2);
                // Others may wait behind it.
                self.cpu().pending.store(1, Ordering::Release);
            } else if self.chips.pending(self.index) {
                if self.cpu().iflag != 0 && self.cpu().shadow == 0 {
                    if let Some(vector) = self.chips.ack(self.index) {
                        self.cpu_mut().halted = 0;
                        self.counters.interrupts += 1;
                        self.interrupt_now(vector);
                        self.cpu_mut().irq_waiting = self.chips.pending(self.index).into();
                    }
                } else {
                    self.cpu_mut().irq_waiting = 1;
                }
            }
            if self.cpu().halted == 0 {
                return None;
            }
            if let Some(e) = self.halted_stop() {
                return Some(e);
            }
            self.counters.halts += 1;
            self.wait();
        }
    }

    /// Set the host timer for the next deadline of the chips.
    fn arm(&mut self) {
        if self.script.is_some() {
            return;
        }
        let next = self.chips.next_deadline_ns(self.index).unwrap_or(0);
        if next != self.timer_set {
            self.timer_set = next;
            self.timer.set(next);
        }
    }

    /// Sleep in HLT until poked or the next deadline.
    fn wait(&mut self) {
        let deadline = self.chips.next_deadline_ns(self.index);
        if self.cpu().pending.load(Ordering::Acquire) != 0 {
            return;
        }
        self.sleep(deadline);
    }

    /// Bind to the calling thread: signals and timers go there.
    pub fn attach(&mut self) {
        // Between two counted runs another processor may have used the thread.
        self.look |= signals::enter(self.cpu as u64) && !self.resumed;
        let id = signals::thread_id();
        if self.shared.thread.load(Ordering::Relaxed) != id {
            self.shared.thread.store(id, Ordering::Release);
            self.timer = signals::Timer::new(id);
            self.timer_set = 0;
            if self.effort == Effort::Sampled {
                self.sampler = signals::Timer::sampling(SAMPLE_NS);
            }
        }
        if !self.registered {
            self.registered = true;
            let (from, to) = self.cache.range();
            signals::register(from, to);
        }
    }
}

/// A processor that came in; whatever happens, it goes out.
struct Turn<'a>(&'a mut Vcpu);

impl<'a> Turn<'a> {
    fn new(v: &'a mut Vcpu) -> Self {
        v.come_in();
        Self(v)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.go_out();
    }
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        perf_map::flush();
        self.shared.forget();
        let (from, _) = self.cache.range();
        signals::unregister(from);
    }
}

// --- functions that stubs call ---------------------------------------------------
//
// They run with the guest's vector registers live above bit 127, so they must
// not call anything that uses AVX, such as the C library's memcpy.

// A panic must not unwind into translated code: it ends the run as a failure.

fn guarded(v: &mut Vcpu, otherwise: u64, f: impl FnOnce(&mut Vcpu) -> u64) -> u64 {
    match catch_unwind(AssertUnwindSafe(|| f(v))) {
        Ok(code) => code,
        Err(panic) => {
            v.fail(format!("the translator failed an assertion of its own: {}", panics::last(&*panic)));
            v.cpu_mut().exit = exit::EVENT;
            v.cpu().pending.store(1, Ordering::Release);
            otherwise
        }
    }
}

extern "C" fn fill(v: &mut Vcpu, va: u64, info: u32) -> u64 {
    guarded(v, 0, |v| {
        let started = v.times.fill.start();
        let way = fill_or_fault(v, va, info);
        v.times.fill.stop(started);
        way
    })
}

extern "C" fn lookup(v: &mut Vcpu, rip: u64) -> u64 {
    guarded(v, 0, |v| {
        if v.cpu().eflags & (TF | RF) != 0 {
            return 0;
        }
        let started = v.times.find.start();
        let code = v.lookup(rip);
        v.times.find.stop(started);
        code
    })
}

extern "C" fn link(v: &mut Vcpu, rip: u64, site: u32) -> u64 {
    guarded(v, 0, |v| {
        let started = v.times.find.start();
        let code = v.link(rip, site);
        v.times.find.stop(started);
        code
    })
}

extern "C" fn run_helper(v: &mut Vcpu, id: u32) -> u64 {
    guarded(v, 1, |v| {
        let started = v.times.inside.start();
        let way = help(v, id);
        v.times.inside.stop(started);
        way
    })
}

/// 0: take the slow path; 1: try again; 2: leave, `cpu.exit` says why; else
/// code to go on at.
fn fill_or_fault(v: &mut Vcpu, va: u64, info: u32) -> u64 {
    *match info & (INFO_WRITE | INFO_GROUP) {
        0 => &mut v.counters.tlb_load,
        INFO_WRITE => &mut v.counters.tlb_store,
        _ => &mut v.counters.tlb_group,
    } += 1;
    match v.fill(va, info) {
        Filled::Slow => {
            v.counters.tlb_slow += 1;
            0
        }
        Filled::Retry => 1,
        Filled::Fault(mut e) => {
            if v.cpu().eflags & TF != 0 {
                return 0;
            }
            if v.plant == Some(crate::count::Plant::FaultAddress) {
                e.address = e.address.map(|a| a ^ 8);
            }
            v.locate_rip();
            v.deliver(e);
            match go_on(v) {
                1 => 2,
                code => code,
            }
        }
    }
}

/// 0: fall through; 1: leave, `cpu.exit` says why; else code to go on at.
fn help(v: &mut Vcpu, id: u32) -> u64 {
    let h = &v.helpers[id as usize];
    let (helper, insn): (Helper, *const Instruction) = (h.helper, &raw const h.insn);
    let family = h.family as usize;
    let serialises = h.serialises && !v.crew.single();
    // SAFETY: helpers are only cleared by the loop, outside translated code.
    let insn = unsafe { &*insn };
    v.counters.helpers += 1;
    v.counters.families[family] += 1;
    let c = v.cpu_mut();
    c.rip = insn.ip();
    if helper.outside {
        c.exit = exit::HELPER;
        c.arg = id;
        return 1;
    }
    let done = (helper.run)(v, insn);
    if serialises {
        fence(Ordering::SeqCst);
    }
    match done {
        Ok(Flow::Next) if v.met == 0 => {
            v.cpu_mut().rip = insn.next_ip();
            0
        }
        Ok(flow) => {
            if flow == Flow::Next {
                v.cpu_mut().rip = insn.next_ip();
            }
            if v.met != 0 {
                if let Some(e) = v.due(false, false) {
                    v.deliver(e);
                }
            }
            go_on(v)
        }
        Err(Trap::Fault(e)) => {
            v.met = 0;
            v.deliver(e.settle(insn));
            go_on(v)
        }
        Err(_) => {
            let c = v.cpu_mut();
            c.exit = exit::HELPER;
            c.arg = id;
            1
        }
    }
}

fn go_on(v: &mut Vcpu) -> u64 {
    let rip = v.cpu().rip;
    let failed = v.fatal.is_some() || v.deferred.is_some() || v.goes_direct();
    let c = v.cpu_mut();
    let pending = c.pending.load(Ordering::Relaxed) != 0;
    if c.irq_waiting != 0 && c.iflag != 0 || c.eflags & (TF | RF) != 0 || c.shadow != 0 || pending || failed {
        c.exit = exit::EVENT;
        return 1;
    }
    let code = v.lookup(rip);
    if code == 0 {
        let c = v.cpu_mut();
        c.exit = exit::TRANSLATE;
        c.arg = NO_SITE;
        return 1;
    }
    code
}
