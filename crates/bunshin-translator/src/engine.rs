//! The translator behind the engine boundary.
use crate::count::Plant;
use crate::direct::{Choice, Direct};
use crate::mmu::Phys;
use crate::pages::{Pages, MAX_CPUS};
use crate::shared::{Crew, Order, Shared};
use crate::vcpu::{Effort, Vcpu as Cpu};
use crate::{cpuid, host};
use bunshin_core::chips::{Chips, ChipsState};
use bunshin_core::debug::Debugging;
use bunshin_core::{
    clock, CpuState, Engine, EngineError, Exit, GuestMemory, Kicker, Region, Reply, Result, Times, Vcpu,
};
use std::sync::atomic::{fence, AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// Most guest memory, bytes.
const MEMORY: u64 = 1 << 40;

/// An address whose writes signal an eventfd.
#[derive(Clone, Copy)]
pub struct Doorbell {
    pub address: u64,
    pub size: u8,
    pub value: Option<u64>,
    pub event: i32,
}

/// Processors in software, their interrupt controllers and memory map.
pub struct TranslatorEngine {
    memory: Arc<GuestMemory>,
    chips: Arc<Chips>,
    cpuid: Arc<cpuid::Table>,
    crew: Arc<Crew>,
    taken: Mutex<Vec<bool>>,
    doorbells: Arc<Mutex<Vec<Doorbell>>>,
    effort: Effort,
    exact_flags: AtomicBool,
    plant: Mutex<Option<Plant>>,
    /// User code runs directly where this says so.
    direct: Mutex<Option<Choice>>,
    /// The A20 gate is open.
    a20: Arc<AtomicBool>,
}

impl TranslatorEngine {
    /// An engine for `cpus` processors.
    pub fn new(cpus: u32) -> Result<Arc<Self>> {
        Self::with(cpus, Effort::Sampled)
    }

    /// An engine that takes the code that `effort` says for hot.
    pub fn with(cpus: u32, effort: Effort) -> Result<Arc<Self>> {
        Self::of(cpus, effort, Arc::new(cpuid::Table::new(cpus)))
    }

    /// An engine whose processors answer CPUID by `cpuid`, which is made for as many.
    pub fn of(cpus: u32, effort: Effort, cpuid: Arc<cpuid::Table>) -> Result<Arc<Self>> {
        let missing: Vec<_> = host::features()
            .into_iter()
            .filter(|(n, on)| !on && host::REQUIRED.contains(n))
            .map(|(n, _)| n)
            .collect();
        if !missing.is_empty() {
            return Err(EngineError::new(
                "host-processor",
                format!("the translator needs {} of the host processor and kernel", missing.join(", ")),
            ));
        }
        if !(1..=MAX_CPUS).contains(&cpus) {
            return Err(EngineError::new(
                "cpus",
                format!("{cpus} processors asked for, the translator runs 1 to {MAX_CPUS}"),
            ));
        }
        let crew = Arc::new(Crew::new(cpus));
        let others = Arc::downgrade(&crew);
        let kick = Box::new(move |n: u32| {
            if let Some(s) = others.upgrade().as_ref().and_then(|crew| crew.get(n)) {
                s.poke();
            }
        });
        let engine = Arc::new(Self {
            memory: GuestMemory::new(),
            chips: Chips::new(cpus, clock::tsc_hz(), kick),
            cpuid,
            crew,
            taken: Mutex::new(vec![false; cpus as usize]),
            doorbells: Arc::default(),
            effort,
            exact_flags: AtomicBool::new(false),
            plant: Mutex::default(),
            direct: Mutex::default(),
            a20: Arc::new(AtomicBool::new(true)),
        });
        Ok(engine)
    }

    /// Let processors taken from now on run user code directly (`direct/mod.rs`), where
    /// `choice` says so. Memory mapped from now on can be shared with other processes.
    ///
    /// # Errors
    /// The host cannot make a sandbox.
    pub fn run_directly(&self, choice: Choice) -> Result<()> {
        crate::direct::probe()?;
        *self.direct.lock().unwrap() = Some(choice);
        Ok(())
    }

    /// Take a processor; as `Engine::vcpu`, for those who need to know that it is the
    /// translator's.
    ///
    /// # Errors
    /// There is no such processor, it is taken, or the host gives no memory.
    pub fn processor(&self, index: u32) -> Result<TranslatorVcpu> {
        let mut taken = self.taken.lock().unwrap();
        match taken.get_mut(index as usize) {
            None => return Err(EngineError::new("cpus", format!("there is no processor {index}"))),
            Some(t) if *t => {
                return Err(EngineError::new("cpus", format!("processor {index} is taken already")))
            }
            Some(t) => *t = true,
        }
        let mut v = Cpu::new(
            index,
            Phys::new(self.memory.slots(), &self.crew),
            self.chips.clone(),
            self.cpuid.clone(),
            self.crew.clone(),
        )?;
        v.doorbells = self.doorbells.clone();
        v.gate = self.a20.clone();
        v.effort = self.effort;
        v.plant = *self.plant.lock().unwrap();
        v.exact_flags = self.exact_flags.load(Ordering::Relaxed);
        if let Some(choice) = *self.direct.lock().unwrap() {
            let files = self.memory.slots().iter().map(|s| s.region().share()).collect::<Result<_>>()?;
            v.direct = Some(Box::new(Direct::new(files, choice)));
        }
        Ok(TranslatorVcpu(v))
    }

    /// Forget everything that was made of guest memory: another engine had it.
    pub fn forget(&self) {
        for s in (0..MAX_CPUS).filter_map(|n| self.crew.get(n)) {
            s.order_all();
            s.poke();
        }
    }

    /// Let every processor taken from now on keep the arithmetic flags after
    /// each instruction, whether anybody reads them or not. Slower; for those
    /// who compare this engine with others.
    pub fn keep_flags(&self) {
        self.exact_flags.store(true, Ordering::Relaxed);
    }
}

impl TranslatorEngine {
    /// Let every processor taken from now on do something wrong; for trying those who
    /// judge this engine.
    pub fn plant(&self, what: Plant) {
        *self.plant.lock().unwrap() = Some(what);
    }

    /// Let the processors forget translations of memory that was changed from outside.
    fn changed(&self, pages: &Pages, gpa: u64, length: u64) {
        let end = gpa.saturating_add(length);
        let mut told = 0;
        let mut first = 0;
        for slot in self.memory.slots() {
            let (from, to) = (gpa.max(slot.gpa), end.min(slot.gpa + slot.length));
            for at in (from & !0xfff..to).step_by(4096) {
                let page = first + ((at - slot.gpa) >> 12) as usize;
                let who = pages.code(page);
                told |= who;
                self.crew.those(who).for_each(|s| s.order(Order::DropCode(page)));
            }
            first += (slot.length >> 12) as usize;
        }
        self.crew.those(told).for_each(Shared::poke);
    }
}

impl Engine for TranslatorEngine {
    fn name(&self) -> &'static str {
        "translator"
    }

    fn vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>> {
        Ok(Box::new(self.processor(index)?))
    }

    fn map(&self, gpa: u64, region: &Arc<Region>, offset: u64, length: u64, readonly: bool) -> Result<()> {
        if self.taken.lock().unwrap().iter().any(|&t| t) {
            return Err(EngineError::new(
                "memory-map",
                "memory is mapped before the first processor is taken",
            ));
        }
        let total = length.saturating_add(self.memory.slots().iter().map(|s| s.length).sum());
        if total > MEMORY {
            let (most, asked) = (MEMORY >> 30, total >> 30);
            return Err(EngineError::new(
                "memory-size",
                format!("{asked} GiB of guest memory, the translator takes at most {most} GiB"),
            ));
        }
        if self.direct.lock().unwrap().is_some() {
            region.share()?;
        }
        self.memory.map(gpa, region, offset, length, readonly)
    }

    fn unmap(&self, gpa: u64, length: u64) -> Result<()> {
        if self.taken.lock().unwrap().iter().any(|&t| t) {
            return Err(EngineError::new("memory-map", "memory cannot be unmapped while processors exist"));
        }
        self.memory.unmap(gpa, length);
        Ok(())
    }

    fn read(&self, gpa: u64, into: &mut [u8]) -> bool {
        self.memory.read(gpa, into)
    }

    fn write(&self, gpa: u64, from: &[u8]) -> bool {
        let done = self.memory.write(gpa, from);
        // Who announces a translation from now on reads the new bytes.
        fence(Ordering::SeqCst);
        if let Some(pages) = self.crew.known_pages() {
            self.changed(pages, gpa, from.len() as u64);
        }
        done
    }

    fn set_irq(&self, gsi: u32, level: bool) {
        self.chips.set_irq(gsi, level);
    }

    fn set_a20(&self, open: bool) {
        self.a20.store(open, Ordering::Release);
        for s in (0..MAX_CPUS).filter_map(|n| self.crew.get(n)) {
            s.poke();
        }
    }

    fn send_msi(&self, address: u64, data: u32) {
        self.chips.send_msi(address, data);
    }

    fn doorbell(&self, address: u64, size: u8, value: Option<u64>, event: i32) -> Result<()> {
        if !matches!(size, 1 | 2 | 4 | 8) {
            return Err(EngineError::new(
                "doorbell",
                format!("a doorbell of {size} bytes, expected 1, 2, 4 or 8"),
            ));
        }
        self.doorbells.lock().unwrap().push(Doorbell { address, size, value, event });
        Ok(())
    }

    fn take_dirty(&self, _gpa: u64, _length: u64) -> Result<Vec<u8>> {
        Err(EngineError::new("dirty-log", "this version keeps no dirty log"))
    }

    fn set_time(&self, ns: Option<u64>) -> Result<()> {
        self.chips.clock.set_script(ns);
        Ok(())
    }

    fn chips(&self) -> Result<ChipsState> {
        Ok(ChipsState { lapics: Vec::new(), ..self.chips.state() })
    }

    fn set_chips(&self, chips: &ChipsState) -> Result<()> {
        self.chips.set_state(chips).map_err(|what| EngineError::new("state", what))
    }

    fn tsc_hz(&self) -> u64 {
        clock::tsc_hz()
    }

    fn host_tsc(&self) -> u64 {
        clock::rdtsc()
    }
}

/// A processor in software.
pub struct TranslatorVcpu(pub(crate) Box<Cpu>);

impl Vcpu for TranslatorVcpu {
    fn run(&mut self, reply: Reply) -> Exit {
        self.0.foreign = false;
        self.0.run(reply)
    }

    fn complete(&mut self, reply: Reply) -> Option<Exit> {
        self.0.complete(reply)
    }

    fn state(&mut self) -> CpuState {
        self.0.visit(Cpu::state)
    }

    fn set_state(&mut self, state: &CpuState) -> Result<()> {
        self.0.visit(|v| v.set_state(state))
    }

    fn set_debug(&mut self, debugging: &Debugging) -> Result<()> {
        debugging.check()?;
        self.0.visit(|v| v.set_debug(debugging));
        Ok(())
    }

    fn executed(&self) -> u64 {
        self.0.executed + u64::from(self.0.cpu().begun)
    }

    fn times(&mut self) -> Times {
        self.0.guest_times()
    }

    fn set_times(&mut self, times: &Times) {
        self.0.visit(|v| v.set_guest_times(times));
    }

    fn skip_time(&mut self, ticks: u64) {
        self.0.skip_time(ticks);
    }

    fn kicker(&self) -> Arc<dyn Kicker> {
        self.0.shared.clone()
    }

    fn translate(&mut self, gva: u64) -> Option<u64> {
        self.0.look(gva)
    }

    fn stats(&self) -> Vec<(&'static str, u64)> {
        let mut s = self.0.counters.list();
        s.extend(self.0.times.list());
        s.push(("code_cache_used", self.0.cache.used() as u64));
        s.push(("code_cache_size", (self.0.cache.used() + self.0.cache.room()) as u64));
        s
    }
}
