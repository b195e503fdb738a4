//! A machine over the engines that there are, one of which runs it at a time.
//!
//! A move goes so: all processors stand (their owners have completed the last exits);
//! the other engine is made, or remembered, with the same memory, doorbells and A20
//! gate; chips, registers and clocks are copied; then it is the one. Whatever fails
//! before that leaves the machine where it was, as it was.
use crate::vcpu::{Cell, Moving};
use crate::{keep, Name};
use bunshin_core::chips::ChipsState;
use bunshin_core::cpuid::Leaf;
use bunshin_core::{clock, Engine, EngineError, Region, Result, Vcpu};
use bunshin_kvm::{cpuid as kvm_cpuid, KvmEngine};
use bunshin_translator::{cpuid::Table, Choice, Effort, Plant, TranslatorEngine};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Guest memory as it was mapped.
struct Mapping {
    gpa: u64,
    region: Arc<Region>,
    offset: u64,
    length: u64,
    readonly: bool,
}

#[derive(Clone, Copy)]
struct Doorbell {
    address: u64,
    size: u8,
    value: Option<u64>,
    event: i32,
}

/// The engines and what a new one must be told.
struct Engines {
    current: Name,
    kvm: Option<Arc<KvmEngine>>,
    translator: Option<Arc<TranslatorEngine>>,
    mappings: Vec<Mapping>,
    doorbells: Vec<Doorbell>,
    a20: bool,
}

/// What processors and the machine share.
pub struct Common {
    cpus: u32,
    table: Arc<Table>,
    engines: RwLock<Engines>,
}

impl Common {
    fn read(&self) -> RwLockReadGuard<'_, Engines> {
        self.engines.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Engines> {
        self.engines.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// What each processor answers to CPUID.
    fn leaves(&self) -> Vec<Vec<Leaf>> {
        (0..self.cpus).map(|id| self.table.leaves(id)).collect()
    }

    /// The translator, made if there is none.
    pub fn translator(&self) -> Result<Arc<TranslatorEngine>> {
        self.translator_of(&mut self.write())
    }

    fn translator_of(&self, engines: &mut Engines) -> Result<Arc<TranslatorEngine>> {
        if let Some(engine) = &engines.translator {
            return Ok(engine.clone());
        }
        let engine = TranslatorEngine::of(self.cpus, Effort::Sampled, self.table.clone())?;
        engines.tell(&*engine)?;
        engines.translator = Some(engine.clone());
        Ok(engine)
    }

    fn kvm_of(&self, engines: &mut Engines) -> Result<Arc<KvmEngine>> {
        if let Some(engine) = &engines.kvm {
            return Ok(engine.clone());
        }
        let kept = Table::new(self.cpus).limited(kvm_cpuid::supported()?).leaves(0);
        keep::check(&self.table.leaves(0), &kept)?;
        let engine = KvmEngine::new(self.leaves())?;
        engines.tell(&*engine)?;
        engines.kvm = Some(engine.clone());
        Ok(engine)
    }
}

impl Engines {
    fn engine(&self) -> &dyn Engine {
        // The current one is there: it is made before it becomes current.
        match (self.current, &self.kvm, &self.translator) {
            (Name::Kvm, Some(kvm), _) => &**kvm,
            (_, _, Some(translator)) => &**translator,
            (_, Some(kvm), None) => &**kvm,
            (_, None, None) => unreachable!("a machine has an engine"),
        }
    }

    fn all(&self) -> impl Iterator<Item = &dyn Engine> {
        let kvm = self.kvm.iter().map(|e| &**e as &dyn Engine);
        kvm.chain(self.translator.iter().map(|e| &**e as &dyn Engine))
    }

    /// Tell a new engine what the others know.
    fn tell(&self, engine: &dyn Engine) -> Result<()> {
        for m in &self.mappings {
            engine.map(m.gpa, &m.region, m.offset, m.length, m.readonly)?;
        }
        for d in &self.doorbells {
            engine.doorbell(d.address, d.size, d.value, d.event)?;
        }
        if !self.a20 {
            engine.set_a20(false);
        }
        Ok(())
    }
}

/// One machine, run by the one engine or the other.
pub struct Machine {
    common: Arc<Common>,
    cells: Vec<Arc<Cell>>,
    taken: Mutex<Vec<bool>>,
    moved: AtomicBool,
}

impl Machine {
    /// A machine of `cpus` processors, run by the engine `name` first. One that is
    /// `movable`, or begins in KVM, tells its guest only of what both engines keep.
    ///
    /// # Errors
    /// The engine, or for a movable machine KVM, cannot be had on this host.
    pub fn new(name: Name, cpus: u32, movable: bool) -> Result<Arc<Self>> {
        if !(1..=64).contains(&cpus) {
            return Err(EngineError::new(
                "cpus",
                format!("{cpus} processors asked for, bunshin runs 1 to 64"),
            ));
        }
        let mut table = Table::new(cpus);
        if name == Name::Kvm || movable {
            table = table.limited(kvm_cpuid::supported()?);
        }
        let engines = Engines {
            current: name,
            kvm: None,
            translator: None,
            mappings: Vec::new(),
            doorbells: Vec::new(),
            a20: true,
        };
        let common = Arc::new(Common { cpus, table: Arc::new(table), engines: RwLock::new(engines) });
        let mut engines = common.write();
        match name {
            Name::Kvm => drop(common.kvm_of(&mut engines)?),
            Name::Translator => drop(common.translator_of(&mut engines)?),
        }
        drop(engines);
        let cells = (0..cpus).map(|index| Arc::new(Cell::new(index, name, common.clone()))).collect();
        Ok(Arc::new(Self {
            common,
            cells,
            taken: Mutex::new(vec![false; cpus as usize]),
            moved: AtomicBool::new(false),
        }))
    }

    /// Let the translator run user code directly. Before memory is mapped and processors
    /// are taken.
    ///
    /// # Errors
    /// The host cannot make a sandbox.
    pub fn run_directly(&self) -> Result<()> {
        self.common.translator()?.run_directly(Choice::Profile)
    }

    /// Let the translator do something wrong; for trying those who judge it. Before
    /// processors are taken.
    ///
    /// # Errors
    /// Another engine runs the machine.
    pub fn plant(&self, what: Plant) -> Result<()> {
        match (&self.common.read().translator, self.common.read().current) {
            (Some(translator), Name::Translator) => {
                translator.plant(what);
                Ok(())
            }
            _ => Err(EngineError::new("plant", "only the translator does something wrong on purpose")),
        }
    }

    fn taken(&self) -> MutexGuard<'_, Vec<bool>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Let another engine run the machine. All processors stand, and their last exits
    /// are complete.
    ///
    /// # Errors
    /// One of them does not stand; the engine cannot be had; or it cannot keep what the
    /// guest was told of the processor. The machine is as it was then.
    pub fn switch(&self, to: Name) -> Result<()> {
        let mut engines = self.common.write();
        if engines.current == to {
            return Ok(());
        }
        let mut processors = Vec::with_capacity(self.cells.len());
        for cell in &self.cells {
            let processor = cell.try_lock().filter(|p| p.settled()).ok_or_else(|| {
                EngineError::new(
                    "engine-switch",
                    format!(
                        "processor {} is in the middle of something; pause the machine first",
                        cell.index
                    ),
                )
            })?;
            processors.push(processor);
        }
        let (kvm, translator) = match to {
            Name::Kvm => (Some(self.common.kvm_of(&mut engines)?), None),
            Name::Translator => (None, Some(self.common.translator_of(&mut engines)?)),
        };
        for processor in &mut processors {
            processor.make(to, kvm.as_deref(), translator.as_deref())?;
        }
        let from = engines.engine();
        let chips = from.chips()?;
        let states: Vec<_> = processors.iter_mut().map(|p| p.copy()).collect();
        if let Some(translator) = &translator {
            translator.forget();
        }
        if let Some(kvm) = &kvm {
            kvm.forget_log();
        }
        let target: &dyn Engine = match (&kvm, &translator) {
            (Some(kvm), _) => &**kvm,
            (_, Some(translator)) => &**translator,
            _ => return Ok(()),
        };
        // Both count on this host's clock, which has not stood still.
        target.set_chips(&ChipsState { clock_ns: clock::now_ns(), ..chips })?;
        for (processor, state) in processors.iter_mut().zip(states) {
            processor.paste(to, &state)?;
        }
        for (processor, cell) in processors.iter_mut().zip(&self.cells) {
            processor.be(to);
            let kicker = processor.kicker();
            cell.kicks_to(kicker.clone());
            // One more than needed does no harm, one that went to the old engine would.
            kicker.kick();
        }
        engines.current = to;
        self.moved.store(true, Ordering::Release);
        Ok(())
    }
}

impl Engine for Machine {
    fn name(&self) -> &'static str {
        self.common.read().current.text()
    }

    fn vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>> {
        let mut taken = self.taken();
        let cell = match (self.cells.get(index as usize), taken.get_mut(index as usize)) {
            (Some(_), Some(true)) => {
                return Err(EngineError::new("cpus", format!("processor {index} is taken already")))
            }
            (Some(cell), Some(taken)) => {
                let engines = self.common.read();
                let mut processor = cell.lock();
                processor.make(engines.current, engines.kvm.as_deref(), engines.translator.as_deref())?;
                cell.kicks_to(processor.kicker());
                *taken = true;
                cell.clone()
            }
            _ => return Err(EngineError::new("cpus", format!("there is no processor {index}"))),
        };
        Ok(Box::new(Moving(cell)))
    }

    fn map(&self, gpa: u64, region: &Arc<Region>, offset: u64, length: u64, readonly: bool) -> Result<()> {
        let mut engines = self.common.write();
        for engine in engines.all() {
            engine.map(gpa, region, offset, length, readonly)?;
        }
        engines.mappings.push(Mapping { gpa, region: region.clone(), offset, length, readonly });
        Ok(())
    }

    fn unmap(&self, gpa: u64, length: u64) -> Result<()> {
        let mut engines = self.common.write();
        for engine in engines.all() {
            engine.unmap(gpa, length)?;
        }
        engines.mappings.retain(|m| m.gpa < gpa || m.gpa + m.length > gpa + length);
        Ok(())
    }

    fn read(&self, gpa: u64, into: &mut [u8]) -> bool {
        self.common.read().engine().read(gpa, into)
    }

    fn write(&self, gpa: u64, from: &[u8]) -> bool {
        self.common.read().engine().write(gpa, from)
    }

    fn set_irq(&self, gsi: u32, level: bool) {
        self.common.read().engine().set_irq(gsi, level);
    }

    fn set_a20(&self, open: bool) {
        let mut engines = self.common.write();
        engines.a20 = open;
        engines.all().for_each(|engine| engine.set_a20(open));
    }

    fn send_msi(&self, address: u64, data: u32) {
        self.common.read().engine().send_msi(address, data);
    }

    fn doorbell(&self, address: u64, size: u8, value: Option<u64>, event: i32) -> Result<()> {
        let mut engines = self.common.write();
        for engine in engines.all() {
            engine.doorbell(address, size, value, event)?;
        }
        engines.doorbells.push(Doorbell { address, size, value, event });
        Ok(())
    }

    fn take_dirty(&self, gpa: u64, length: u64) -> Result<Vec<u8>> {
        self.common.read().engine().take_dirty(gpa, length)
    }

    fn set_time(&self, ns: Option<u64>) -> Result<()> {
        self.common.read().engine().set_time(ns)
    }

    fn chips(&self) -> Result<ChipsState> {
        self.common.read().engine().chips()
    }

    fn set_chips(&self, chips: &ChipsState) -> Result<()> {
        self.common.read().engine().set_chips(chips)
    }

    fn tsc_hz(&self) -> u64 {
        clock::tsc_hz()
    }

    fn host_tsc(&self) -> u64 {
        clock::rdtsc()
    }
}
