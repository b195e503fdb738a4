//! `Vcpu`: one virtual processor; exits become tuples, replies become values.
//!
//! Soundness does not depend on Python's manners: the processor sits behind a
//! lock that is only ever tried, `run` and `complete` stay on the thread of the
//! first of them, a reply is checked against the exit it answers, and a panic in
//! the engine ends the processor and not the process. All but `run` keep the GIL
//! while they hold the lock, so that a short call never makes `run` find it busy.
use crate::dispatch::Dispatch;
use crate::{raise, refuse};
use bunshin_core::clock::{rdtsc, tsc_hz};
use bunshin_core::debug::{Access, Debugging, Stop, Watchpoint};
use bunshin_core::{panics, CpuState, Exit, Kicker, Reply};
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyInt, PyTuple};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::thread::ThreadId;

/// Kinds of exit, as their first element says.
pub const PIO_IN: u8 = 0;
pub const PIO_OUT: u8 = 1;
pub const MMIO_READ: u8 = 2;
pub const MMIO_WRITE: u8 = 3;
const HYPERCALL: u8 = 4;
const DEBUG: u8 = 5;
const KICKED: u8 = 6;
const SHUTDOWN: u8 = 7;
const FAILED: u8 = 8;

/// The first element of an exit, by name.
pub const KINDS: [(&str, u8); 9] = [
    ("PIO_IN", PIO_IN),
    ("PIO_OUT", PIO_OUT),
    ("MMIO_READ", MMIO_READ),
    ("MMIO_WRITE", MMIO_WRITE),
    ("HYPERCALL", HYPERCALL),
    ("DEBUG", DEBUG),
    ("KICKED", KICKED),
    ("SHUTDOWN", SHUTDOWN),
    ("FAILED", FAILED),
];

/// What the last exit wants for an answer.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wants {
    Nothing,
    Value,
    /// So many bytes.
    Bytes(usize),
}

impl Wants {
    fn after(exit: &Exit) -> Self {
        match exit {
            Exit::PioIn { size, count, .. } if *count > 1 => {
                Self::Bytes(usize::from(*size) * *count as usize)
            }
            Exit::PioIn { .. } | Exit::MmioRead { .. } | Exit::Hypercall { .. } => Self::Value,
            _ => Self::Nothing,
        }
    }
}

struct Processor {
    vcpu: Box<dyn bunshin_core::Vcpu>,
    wants: Wants,
    thread: Option<ThreadId>,
    /// The engine panicked: it can only be told about.
    broken: Option<String>,
}

impl Processor {
    /// The reply as the engine takes it, checked against what it wants.
    fn reply(&self, reply: Option<&Bound<'_, PyAny>>) -> PyResult<Reply> {
        match self.wants {
            // An exit that wants no answer ignores one.
            Wants::Nothing => Ok(Reply::None),
            Wants::Value => {
                let given =
                    reply.ok_or_else(|| refuse("reply", "the last exit wants an int, found no reply"))?;
                let number = given.downcast::<PyInt>().map_err(|_| {
                    PyTypeError::new_err(format!("the last exit wants an int, found {}", given.get_type()))
                })?;
                Ok(Reply::Value(number.extract()?))
            }
            Wants::Bytes(length) => {
                let bytes = match reply {
                    Some(given) => PyBuffer::<u8>::get(given)?.to_vec(given.py())?,
                    None => Vec::new(),
                };
                if bytes.len() != length {
                    let found = bytes.len();
                    return Err(refuse(
                        "reply",
                        format!("the last exit wants {length} bytes, found {found}"),
                    ));
                }
                Ok(Reply::Bytes(bytes))
            }
        }
    }

    fn on_its_thread(&mut self, index: u32) -> PyResult<()> {
        let here = std::thread::current().id();
        if *self.thread.get_or_insert(here) == here {
            Ok(())
        } else {
            Err(refuse(
                "wrong-thread",
                format!("vcpu {index} runs on the thread that first ran it, not on this one"),
            ))
        }
    }

    /// Call the engine; a panic breaks the processor.
    fn call<R>(&mut self, f: impl FnOnce(&mut dyn bunshin_core::Vcpu) -> R) -> Result<R, String> {
        if let Some(why) = &self.broken {
            return Err(why.clone());
        }
        let vcpu = &mut *self.vcpu;
        panics::catch(|| f(vcpu)).map_err(|said| {
            let why = format!("the engine panicked: {said}");
            self.wants = Wants::Nothing;
            self.broken = Some(why.clone());
            why
        })
    }
}

/// An answer to any exit.
fn zeros(exit: &Exit) -> Reply {
    match *exit {
        Exit::PioIn { size, count, .. } if count > 1 => {
            Reply::Bytes(vec![0; usize::from(size) * count as usize])
        }
        _ => Reply::Value(0),
    }
}

fn panicked(why: String) -> PyErr {
    refuse("engine-panic", why)
}

/// `(kind, address, size, value)`.
fn tuple<'py, V: IntoPyObject<'py>>(
    py: Python<'py>,
    kind: u8,
    address: u64,
    size: u8,
    value: V,
) -> PyResult<Bound<'py, PyTuple>> {
    (kind, address, size, value).into_pyobject(py)
}

fn exit_tuple(py: Python<'_>, exit: Exit) -> PyResult<Bound<'_, PyTuple>> {
    let nothing: Option<u64> = None;
    match exit {
        Exit::PioIn { port, size, count } => tuple(py, PIO_IN, port.into(), size, count),
        Exit::PioOut { port, size, data } if data.len() <= usize::from(size).min(8) => {
            let mut value = [0; 8];
            value[..data.len()].copy_from_slice(&data);
            tuple(py, PIO_OUT, port.into(), size, u64::from_le_bytes(value))
        }
        Exit::PioOut { port, size, data } => tuple(py, PIO_OUT, port.into(), size, PyBytes::new(py, &data)),
        Exit::MmioRead { gpa, size } => tuple(py, MMIO_READ, gpa, size, nothing),
        Exit::MmioWrite { gpa, size, value } => tuple(py, MMIO_WRITE, gpa, size, value),
        Exit::Hypercall { number } => tuple(py, HYPERCALL, number, 0, nothing),
        Exit::Debug { stop } => {
            let (address, why) = match stop {
                Stop::Breakpoint(gva) => (gva, "breakpoint"),
                Stop::Watchpoint(w) => (w.gva, access_name(w.access)),
                Stop::Step => (0, "step"),
            };
            tuple(py, DEBUG, address, 0, why)
        }
        Exit::Kicked => tuple(py, KICKED, 0, 0, nothing),
        Exit::Shutdown { reason } => tuple(py, SHUTDOWN, 0, 0, reason),
        Exit::Failed { reason } => tuple(py, FAILED, 0, 0, reason),
    }
}

/// Accesses that a watchpoint hears of, by name.
const ACCESSES: [(&str, Access); 3] =
    [("read", Access::Read), ("write", Access::Write), ("access", Access::Any)];

fn access_name(access: Access) -> &'static str {
    ACCESSES.iter().find(|(_, a)| *a == access).map_or("access", |(name, _)| name)
}

fn watchpoint((gva, length, name): (u64, u64, String)) -> PyResult<Watchpoint> {
    let Some((_, access)) = ACCESSES.iter().find(|(n, _)| *n == name) else {
        return Err(refuse("debug", format!("watchpoint: {name:?} is not read, write or access")));
    };
    Ok(Watchpoint { gva, length, access: *access })
}

/// One virtual processor; `run` and `complete` belong to one thread.
#[pyclass(frozen, module = "bunshin._native")]
pub struct Vcpu {
    index: u32,
    processor: Mutex<Processor>,
    kicker: Arc<dyn Kicker>,
    times: Times,
}

/// One call of a device in so many is timed and stands for all: a prime, so that it
/// falls into step with no loop of a driver.
const PERIOD: u64 = 13;

/// Ticks of the time-stamp counter. Written by the processor's thread only.
#[derive(Default)]
struct Times {
    /// In `run` and `serve`.
    inside: AtomicU64,
    /// Calls of devices within `serve`.
    called: AtomicU64,
    /// From an exit to a device that came back to the caller to its answer.
    answering: AtomicU64,
    /// When the last such exit came back, or 0.
    came: AtomicU64,
    /// Calls until the next one that is timed.
    left: AtomicU64,
}

impl Times {
    fn add(to: &AtomicU64, ticks: u64) {
        to.store(to.load(Ordering::Relaxed).wrapping_add(ticks), Ordering::Relaxed);
    }

    /// The caller comes with an answer, or none.
    fn enter(&self) -> u64 {
        let now = rdtsc();
        let came = self.came.swap(0, Ordering::Relaxed);
        if came != 0 {
            Self::add(&self.answering, now.saturating_sub(came));
        }
        now
    }

    /// `exit` goes to the caller.
    fn leave(&self, entered: u64, exit: &Exit) {
        let now = rdtsc();
        Self::add(&self.inside, now.saturating_sub(entered));
        let device = matches!(
            exit,
            Exit::PioIn { .. } | Exit::PioOut { .. } | Exit::MmioRead { .. } | Exit::MmioWrite { .. }
        );
        self.came.store(if device { now } else { 0 }, Ordering::Relaxed);
    }

    /// Time `call`, if it is its turn.
    fn sample<R>(&self, call: impl FnOnce() -> R) -> R {
        let left = self.left.load(Ordering::Relaxed);
        if left > 0 {
            self.left.store(left - 1, Ordering::Relaxed);
            return call();
        }
        self.left.store(PERIOD - 1, Ordering::Relaxed);
        let started = rdtsc();
        let result = call();
        Self::add(&self.called, PERIOD * (rdtsc() - started));
        result
    }

    /// Nanoseconds by name: all, and what devices took.
    fn list(&self) -> [(&'static str, u64); 2] {
        let [inside, called, answering] =
            [&self.inside, &self.called, &self.answering].map(|t| t.load(Ordering::Relaxed));
        let ns = |ticks: u64| (u128::from(ticks) * 1_000_000_000 / u128::from(tsc_hz())) as u64;
        [("time.total_ns", ns(inside + answering)), ("time.devices_ns", ns(called + answering))]
    }
}

impl Vcpu {
    /// Wrap the processor called `index`.
    pub fn new(index: u32, vcpu: Box<dyn bunshin_core::Vcpu>) -> Self {
        let kicker = vcpu.kicker();
        let processor = Processor { vcpu, wants: Wants::Nothing, thread: None, broken: None };
        Self { index, processor: Mutex::new(processor), kicker, times: Times::default() }
    }

    fn lock(&self) -> PyResult<MutexGuard<'_, Processor>> {
        match self.processor.try_lock() {
            Ok(guard) => Ok(guard),
            Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => {
                Err(refuse("busy", format!("vcpu {} is in use by another thread; kick it first", self.index)))
            }
        }
    }

    /// Answer the last exit and run until the next one.
    fn go(&self, py: Python<'_>, reply: impl FnOnce(&Processor) -> PyResult<Reply>) -> PyResult<Exit> {
        let mut processor = self.lock()?;
        processor.on_its_thread(self.index)?;
        let reply = reply(&processor)?;
        let exit = processor.call(|vcpu| py.allow_threads(|| vcpu.run(reply)));
        let exit = exit.unwrap_or_else(|reason| Exit::Failed { reason });
        processor.wants = Wants::after(&exit);
        Ok(exit)
    }

    fn lock_complete(&self) -> PyResult<MutexGuard<'_, Processor>> {
        let processor = self.lock()?;
        if processor.wants == Wants::Nothing {
            Ok(processor)
        } else {
            Err(refuse("incomplete", format!("the last exit of vcpu {} has no answer yet", self.index)))
        }
    }
}

#[pymethods]
impl Vcpu {
    /// Answer the last exit and run until the next one; the GIL is released.
    #[pyo3(signature = (reply = None))]
    fn run<'py>(&self, py: Python<'py>, reply: Option<&Bound<'py, PyAny>>) -> PyResult<Bound<'py, PyTuple>> {
        let entered = self.times.enter();
        let exit = self.go(py, |processor| processor.reply(reply))?;
        self.times.leave(entered, &exit);
        exit_tuple(py, exit)
    }

    /// Run as `run` does, and answer exits to the devices of `dispatch` by calling
    /// them; return the first exit that is none.
    #[pyo3(signature = (dispatch, reply = None))]
    fn serve<'py>(
        &self,
        py: Python<'py>,
        dispatch: &Bound<'py, Dispatch>,
        reply: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyTuple>> {
        let dispatch = dispatch.get();
        let entered = self.times.enter();
        let mut exit = self.go(py, |processor| processor.reply(reply))?;
        loop {
            match self.times.sample(|| dispatch.answer(py, &exit)) {
                Ok(Some(reply)) => exit = self.go(py, |_| Ok(reply))?,
                Ok(None) => {
                    self.times.leave(entered, &exit);
                    return exit_tuple(py, exit);
                }
                Err(error) => {
                    self.times.leave(entered, &Exit::Kicked);
                    let mut processor = self.lock()?;
                    processor.wants = Wants::Nothing;
                    // Whatever else the instruction wants meets the same device's end.
                    processor
                        .call(|vcpu| {
                            let mut next = vcpu.complete(Reply::Value(0));
                            while let Some(exit) = next {
                                next = vcpu.complete(zeros(&exit));
                            }
                        })
                        .map_err(panicked)?;
                    return Err(error);
                }
            }
        }
    }

    /// Answer the last exit and finish its instruction without running on.
    #[pyo3(signature = (reply = None))]
    fn complete<'py>(
        &self,
        py: Python<'py>,
        reply: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Option<Bound<'py, PyTuple>>> {
        self.times.enter();
        let mut processor = self.lock()?;
        processor.on_its_thread(self.index)?;
        let reply = processor.reply(reply)?;
        processor.wants = Wants::Nothing;
        let exit = processor.call(|vcpu| vcpu.complete(reply)).map_err(panicked)?;
        if let Some(exit) = &exit {
            processor.wants = Wants::after(exit);
        }
        exit.map(|exit| exit_tuple(py, exit)).transpose()
    }

    /// The architectural state: the fields of CpuState by name.
    fn state<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let state = self.lock_complete()?.call(|vcpu| vcpu.state()).map_err(panicked)?;
        Ok(pythonize::pythonize(py, &state)?)
    }

    /// Replace the architectural state.
    fn set_state(&self, state: &Bound<'_, PyDict>) -> PyResult<()> {
        let state: CpuState = pythonize::depythonize(state).map_err(|error| {
            refuse("cpu-state", format!("vcpu {}: the state is not a CpuState: {error}", self.index))
        })?;
        // A new state forgets the exit that waited for an answer.
        let mut processor = self.lock()?;
        processor.call(|vcpu| vcpu.set_state(&state)).map_err(panicked)?.map_err(raise)?;
        processor.wants = Wants::Nothing;
        Ok(())
    }

    /// From the next run on, stop for this and for nothing else.
    #[pyo3(signature = (breakpoints = Vec::new(), watchpoints = Vec::new(), step = false, interrupts = false,
        count = None, early = false))]
    #[allow(clippy::too_many_arguments)]
    fn set_debug(
        &self,
        breakpoints: Vec<u64>,
        watchpoints: Vec<(u64, u64, String)>,
        step: bool,
        interrupts: bool,
        count: Option<u64>,
        early: bool,
    ) -> PyResult<()> {
        let watchpoints = watchpoints.into_iter().map(watchpoint).collect::<PyResult<_>>()?;
        let debugging = Debugging { breakpoints, watchpoints, step, interrupts, count, early };
        let mut processor = self.lock_complete()?;
        processor.call(|vcpu| vcpu.set_debug(&debugging)).map_err(panicked)?.map_err(raise)
    }

    /// Instructions executed in runs with a `count`, ever.
    fn executed(&self) -> PyResult<u64> {
        self.lock()?.call(|vcpu| vcpu.executed()).map_err(panicked)
    }

    /// Take ticks of the host's time-stamp counter out of the guest's time.
    fn skip_time(&self, ticks: u64) -> PyResult<()> {
        self.lock()?.call(|vcpu| vcpu.skip_time(ticks)).map_err(panicked)
    }

    /// Make `run` return KICKED soon; any thread.
    fn kick(&self, py: Python<'_>) {
        py.allow_threads(|| self.kicker.kick());
    }

    /// gva to gpa whatever its rights, None where unmapped; the guest does not notice.
    fn translate(&self, gva: u64) -> PyResult<Option<u64>> {
        self.lock()?.call(|vcpu| vcpu.translate(gva)).map_err(panicked)
    }

    /// Counters by name.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let counters = self.lock()?.call(|vcpu| vcpu.stats()).map_err(panicked)?;
        let stats = PyDict::new(py);
        for (name, value) in counters.into_iter().chain(self.times.list()) {
            stats.set_item(name, value)?;
        }
        Ok(stats)
    }
}
