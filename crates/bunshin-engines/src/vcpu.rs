//! A processor that is run by the one engine or the other.
use crate::machine::Common;
use crate::rescue::Rescue;
use crate::Name;
use bunshin_core::debug::Debugging;
use bunshin_core::{CpuState, EngineError, Exit, Kicker, Reply, Result, Times, Vcpu};
use bunshin_kvm::{KvmEngine, KvmVcpu};
use bunshin_translator::{TranslatorEngine, TranslatorVcpu};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, TryLockError};

/// Where a processor lives; the machine and the processor's owner hold it.
pub struct Cell {
    pub index: u32,
    processor: Mutex<Processor>,
    kicks: Arc<Kicks>,
}

/// Kicks go to whoever runs the processor.
struct Kicks(RwLock<Option<Arc<dyn Kicker>>>);

impl Kicker for Kicks {
    fn kick(&self) {
        if let Some(kicker) = &*self.0.read().unwrap_or_else(PoisonError::into_inner) {
            kicker.kick();
        }
    }
}

impl Cell {
    pub fn new(index: u32, current: Name, common: Arc<Common>) -> Self {
        let processor = Processor {
            index,
            current,
            kvm: None,
            translator: None,
            settled: true,
            debugging: Debugging::default(),
            fatal: None,
            switches: 0,
            rescue: Rescue::default(),
            common,
        };
        Self { index, processor: Mutex::new(processor), kicks: Arc::new(Kicks(RwLock::new(None))) }
    }

    pub fn lock(&self) -> MutexGuard<'_, Processor> {
        self.processor.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The processor if nobody runs it.
    pub fn try_lock(&self) -> Option<MutexGuard<'_, Processor>> {
        match self.processor.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// From now on.
    pub fn kicks_to(&self, kicker: Arc<dyn Kicker>) {
        *self.kicks.0.write().unwrap_or_else(PoisonError::into_inner) = Some(kicker);
    }
}

/// A processor's state with its clocks.
pub struct Copy {
    state: CpuState,
    times: Times,
}

/// A processor in the engines that have it.
pub struct Processor {
    pub(crate) index: u32,
    current: Name,
    pub(crate) kvm: Option<KvmVcpu>,
    pub(crate) translator: Option<TranslatorVcpu>,
    /// The last exit is complete.
    settled: bool,
    /// What the owner wants to stop it for.
    debugging: Debugging,
    pub(crate) fatal: Option<Exit>,
    switches: u64,
    pub(crate) rescue: Rescue,
    pub(crate) common: Arc<Common>,
}

impl Processor {
    fn vcpu(&mut self) -> &mut dyn Vcpu {
        // The current one is made before it becomes current.
        match (self.current, &mut self.kvm, &mut self.translator) {
            (Name::Kvm, Some(kvm), _) => kvm,
            (_, _, Some(translator)) => translator,
            (_, Some(kvm), None) => kvm,
            (_, None, None) => unreachable!("a processor that was taken is in an engine"),
        }
    }

    /// Its last exit is complete, so that it can move.
    pub fn settled(&self) -> bool {
        self.settled && !self.rescue.under_way()
    }

    /// Take the processor from an engine if that has not happened.
    pub fn make(
        &mut self,
        name: Name,
        kvm: Option<&KvmEngine>,
        translator: Option<&TranslatorEngine>,
    ) -> Result<()> {
        match (name, kvm, translator) {
            (Name::Kvm, Some(engine), _) if self.kvm.is_none() => {
                self.kvm = Some(engine.processor(self.index)?);
            }
            (Name::Translator, _, Some(engine)) if self.translator.is_none() => {
                self.translator = Some(engine.processor(self.index)?);
            }
            _ => {}
        }
        Ok(())
    }

    /// The processor in the translator, made if it is not there.
    pub(crate) fn translator(&mut self) -> Result<&mut TranslatorVcpu> {
        if self.translator.is_none() {
            let engine = self.common.translator()?;
            self.translator = Some(engine.processor(self.index)?);
        }
        self.translator.as_mut().ok_or_else(|| EngineError::new("engine", "no translator"))
    }

    pub fn copy(&mut self) -> Copy {
        let vcpu = self.vcpu();
        Copy { state: vcpu.state(), times: vcpu.times() }
    }

    /// Give the processor in the engine `name` a state.
    pub fn paste(&mut self, name: Name, copy: &Copy) -> Result<()> {
        // The clocks come by themselves, to the tick.
        let state = CpuState { tsc: 0, ..copy.state.clone() };
        let vcpu: Option<&mut dyn Vcpu> = match name {
            Name::Kvm => self.kvm.as_mut().map(|v| v as &mut dyn Vcpu),
            Name::Translator => self.translator.as_mut().map(|v| v as &mut dyn Vcpu),
        };
        let Some(vcpu) = vcpu else { return Ok(()) };
        // One that cannot stop for what is wanted is no place to be.
        vcpu.set_debug(&self.debugging)?;
        vcpu.set_times(&copy.times);
        vcpu.set_state(&state)
    }

    /// The engine `name` runs it from now on.
    pub fn be(&mut self, name: Name) {
        self.current = name;
        self.switches += 1;
    }

    pub fn kicker(&mut self) -> Arc<dyn Kicker> {
        self.vcpu().kicker()
    }

    fn run(&mut self, reply: Reply) -> Exit {
        if let Some(e) = &self.fatal {
            return e.clone();
        }
        let exit = match self.current {
            Name::Kvm => self.run_rescued(reply),
            Name::Translator => self.vcpu().run(reply),
        };
        self.settled = matches!(exit, Exit::Kicked | Exit::Debug { .. });
        exit
    }

    fn complete(&mut self, reply: Reply) -> Option<Exit> {
        if self.fatal.is_some() {
            return None;
        }
        let exit =
            if self.rescue.under_way() { self.complete_rescue(reply) } else { self.vcpu().complete(reply) };
        self.settled = exit.is_none();
        exit
    }

    /// Finish what is unfinished: somebody wants to look, or to begin anew.
    fn settle(&mut self) {
        while self.rescue.under_way() {
            self.complete_rescue(Reply::Value(u64::MAX));
        }
    }
}

/// A processor as its owner has it.
pub struct Moving(pub Arc<Cell>);

impl Vcpu for Moving {
    fn run(&mut self, reply: Reply) -> Exit {
        self.0.lock().run(reply)
    }

    fn complete(&mut self, reply: Reply) -> Option<Exit> {
        self.0.lock().complete(reply)
    }

    fn state(&mut self) -> CpuState {
        let mut p = self.0.lock();
        p.settle();
        p.vcpu().state()
    }

    fn set_state(&mut self, state: &CpuState) -> Result<()> {
        let mut p = self.0.lock();
        p.settle();
        p.fatal = None;
        p.settled = true;
        p.vcpu().set_state(state)
    }

    fn set_debug(&mut self, debugging: &Debugging) -> Result<()> {
        let mut p = self.0.lock();
        p.vcpu().set_debug(debugging)?;
        p.debugging = debugging.clone();
        Ok(())
    }

    fn executed(&self) -> u64 {
        let p = self.0.lock();
        p.translator.as_ref().map_or(0, Vcpu::executed)
    }

    fn times(&mut self) -> Times {
        self.0.lock().vcpu().times()
    }

    fn set_times(&mut self, times: &Times) {
        self.0.lock().vcpu().set_times(times);
    }

    fn skip_time(&mut self, ticks: u64) {
        self.0.lock().vcpu().skip_time(ticks);
    }

    fn kicker(&self) -> Arc<dyn Kicker> {
        self.0.kicks.clone()
    }

    fn translate(&mut self, gva: u64) -> Option<u64> {
        self.0.lock().vcpu().translate(gva)
    }

    fn stats(&self) -> Vec<(&'static str, u64)> {
        let p = self.0.lock();
        let mut all = Vec::new();
        if let Some(kvm) = &p.kvm {
            all.extend(kvm.stats());
            all.extend(p.rescue.stats());
        }
        if let Some(translator) = &p.translator {
            all.extend(translator.stats());
        }
        if p.switches != 0 {
            all.push(("switches", p.switches));
        }
        all
    }
}
