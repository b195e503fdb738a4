//! Host signals: faults of copied instructions, and kicks.
//!
//! A fault inside the code cache is turned into a jump to the `fault` stub. A
//! kick that finds the program counter inside the cache points gs at the twin
//! of the current region, whose tags are empty, so that translated code leaves
//! at its next memory access or indirect jump with exact state. A sample notes the
//! program counter, so that frequent code is found without counting.
use crate::cpu::{Cpu, REGION, SAMPLES};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::OnceLock;

const SLOTS: usize = 4096;
/// Executable ranges: start, end, address of the fault stub is in the Cpu.
static FROM: [AtomicU64; SLOTS] = [const { AtomicU64::new(0) }; SLOTS];
static TO: [AtomicU64; SLOTS] = [const { AtomicU64::new(0) }; SLOTS];
static USED: AtomicU64 = AtomicU64::new(0);
/// Handlers that were there before, by signal number.
static OLD: OnceLock<[Option<libc::sigaction>; 65]> = OnceLock::new();

/// Remember a code cache.
pub fn register(from: u64, to: u64) {
    for i in 0..SLOTS {
        if FROM[i].compare_exchange(0, from, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            TO[i].store(to, Ordering::Release);
            USED.fetch_max(i as u64 + 1, Ordering::AcqRel);
            return;
        }
    }
}

/// Forget the cache that starts at `from`.
pub fn unregister(from: u64) {
    for i in 0..SLOTS {
        if FROM[i].load(Ordering::Acquire) == from {
            TO[i].store(0, Ordering::Release);
            FROM[i].store(0, Ordering::Release);
        }
    }
}

fn inside(pc: u64) -> bool {
    (0..USED.load(Ordering::Acquire) as usize)
        .any(|i| pc >= FROM[i].load(Ordering::Acquire) && pc < TO[i].load(Ordering::Acquire))
}

/// The signal that samples a processor's thread.
fn sample_signal() -> i32 {
    libc::SIGRTMIN() + 6
}

pub use bunshin_core::kick::{send as kick, signal as kick_signal, thread_id};

fn cpu_of_gs() -> *mut Cpu {
    let base: u64;
    // SAFETY: FSGSBASE was checked when the engine was made; called only when
    // the program counter is inside a code cache, so gs is a region.
    unsafe { core::arch::asm!("rdgsbase {}", out(reg) base) };
    base as *mut Cpu
}

extern "C" fn on_kick(_signal: i32, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel gives a valid context.
    let pc =
        unsafe { (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs[libc::REG_RIP as usize] } as u64;
    let page = RUNS.with(|r| r.page.load(Ordering::Relaxed)) as *mut Cpu;
    if page.is_null() {
        RUNS.with(|r| r.missed.store(true, Ordering::Relaxed));
        return;
    }
    // SAFETY: set only while the processor runs on this thread.
    unsafe {
        (*page).pending.store(1, Ordering::SeqCst);
        let sandbox = (*page).sandbox.load(Ordering::SeqCst);
        if sandbox != 0 {
            libc::syscall(libc::SYS_tgkill, sandbox, sandbox, crate::direct::STOP);
        }
        if inside(pc) {
            // Where a busy host's timer does not come, the guest's may.
            note(page, pc);
            // Before `enter` has set gs this is undone, but it looks at
            // `pending` afterwards.
            let twin = (*page).region + REGION as u64;
            core::arch::asm!("wrgsbase {}", in(reg) twin);
        }
    }
}

extern "C" fn on_sample(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel gives a valid context.
    let pc =
        unsafe { (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs[libc::REG_RIP as usize] } as u64;
    let page = RUNS.with(|r| r.page.load(Ordering::Relaxed)) as *mut Cpu;
    if page.is_null() || !inside(pc) {
        return;
    }
    // SAFETY: the program counter is in translated code.
    if unsafe { note(page, pc) } {
        on_kick(signal, info, context);
    }
}

/// Remember a sample; true if there is no room for another.
///
/// # Safety
/// The processor with this page runs translated code on this thread, so nobody reads
/// the samples meanwhile.
unsafe fn note(page: *mut Cpu, pc: u64) -> bool {
    // SAFETY: the caller's.
    let c = unsafe { &mut *page };
    if (c.sampled as usize) < SAMPLES {
        c.samples[c.sampled as usize] = pc;
        c.sampled += 1;
    }
    c.sampled as usize == SAMPLES
}

/// What the handler knows of the thread that it interrupts.
struct Runs {
    /// Processor page of the processor that the thread runs, or 0.
    page: AtomicU64,
    /// The one that it ran last.
    last: AtomicU64,
    /// A kick or a timer came while it ran none.
    missed: AtomicBool,
}

thread_local! {
    static RUNS: Runs = const {
        Runs { page: AtomicU64::new(0), last: AtomicU64::new(0), missed: AtomicBool::new(false) }
    };
}

/// The thread runs the processor with this page from now on. True when a signal
/// meant for it may have gone past it before.
pub fn enter(page: u64) -> bool {
    RUNS.with(|r| {
        r.page.store(page, Ordering::Release);
        let other = r.last.swap(page, Ordering::Relaxed) != page;
        r.missed.swap(false, Ordering::Relaxed) || other
    })
}

/// The thread runs no processor.
pub fn leave() {
    RUNS.with(|r| r.page.store(0, Ordering::Release));
}

extern "C" fn on_fault(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel gives valid pointers.
    unsafe {
        let m = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext;
        let pc = m.gregs[libc::REG_RIP as usize] as u64;
        if inside(pc) {
            let cpu = &mut *cpu_of_gs();
            let trap = m.gregs[libc::REG_TRAPNO as usize];
            cpu.host_pc = pc;
            cpu.fault_vector = match signal {
                libc::SIGFPE if trap == 16 || trap == 19 => trap as u32,
                libc::SIGFPE => 0,
                libc::SIGILL => 6,
                libc::SIGSEGV | libc::SIGBUS if trap == 14 => 14,
                libc::SIGSEGV => 13,
                libc::SIGBUS => trap as u32,
                _ => trap as u32,
            };
            cpu.fault_addr = (*info).si_addr() as u64;
            cpu.fault_flags = m.gregs[libc::REG_EFL as usize] as u32;
            m.gregs[libc::REG_RIP as usize] = cpu.fault_stub as i64;
            // The stub runs with plain flags.
            m.gregs[libc::REG_EFL as usize] &= !(1 << 8 | 1 << 10);
            return;
        }
        // Not ours: what was there before.
        let old = OLD.get().and_then(|o| o[signal as usize]);
        if let Some(old) = old {
            if old.sa_sigaction != libc::SIG_DFL && old.sa_sigaction != libc::SIG_IGN {
                let f: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) =
                    std::mem::transmute(old.sa_sigaction);
                f(signal, info, context);
                return;
            }
        }
        // Let it happen again with the default action.
        let mut dfl: libc::sigaction = std::mem::zeroed();
        dfl.sa_sigaction = libc::SIG_DFL;
        libc::sigaction(signal, &dfl, std::ptr::null_mut());
    }
}

/// Install the handlers, once for the process.
pub fn install() {
    OLD.get_or_init(|| {
        let mut olds = [None; 65];
        // SAFETY: handlers are async-signal-safe.
        unsafe {
            for s in [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL] {
                let mut a: libc::sigaction = std::mem::zeroed();
                a.sa_sigaction = on_fault as *const () as usize;
                a.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
                let mut old: libc::sigaction = std::mem::zeroed();
                libc::sigaction(s, &a, &mut old);
                olds[s as usize] = Some(old);
            }
            let mut a: libc::sigaction = std::mem::zeroed();
            a.sa_sigaction = on_kick as *const () as usize;
            a.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART | libc::SA_ONSTACK;
            libc::sigaction(kick_signal(), &a, std::ptr::null_mut());
            a.sa_sigaction = on_sample as *const () as usize;
            libc::sigaction(sample_signal(), &a, std::ptr::null_mut());
        }
        olds
    });
}

/// A host timer that kicks or samples one thread.
#[derive(Default)]
pub struct Timer(Option<libc::timer_t>);

// SAFETY: a timer id is a number of the kernel's.
unsafe impl Send for Timer {}

impl Timer {
    pub fn new(thread: u32) -> Self {
        Self::create(thread, libc::CLOCK_MONOTONIC, kick_signal())
    }

    /// A timer that samples the calling thread every `ns` of the processor time
    /// that it uses, or as seldom as the host's clock ticks.
    pub fn sampling(ns: i64) -> Self {
        let t = Self::create(thread_id(), libc::CLOCK_THREAD_CPUTIME_ID, sample_signal());
        if let Some(id) = t.0 {
            let every = libc::timespec { tv_sec: 0, tv_nsec: ns };
            let t = libc::itimerspec { it_interval: every, it_value: every };
            // SAFETY: the timer exists.
            unsafe { libc::timer_settime(id, 0, &t, std::ptr::null_mut()) };
        }
        t
    }

    fn create(thread: u32, clock: libc::clockid_t, signal: i32) -> Self {
        // SAFETY: sigevent is filled for SIGEV_THREAD_ID.
        unsafe {
            let mut e: libc::sigevent = std::mem::zeroed();
            e.sigev_notify = libc::SIGEV_THREAD_ID;
            e.sigev_signo = signal;
            e.sigev_notify_thread_id = thread as i32;
            let mut id: libc::timer_t = std::mem::zeroed();
            if libc::timer_create(clock, &mut e, &mut id) == 0 {
                Self(Some(id))
            } else {
                Self(None)
            }
        }
    }

    /// Fire at `ns` of CLOCK_MONOTONIC; 0 disarms.
    pub fn set(&self, ns: u64) {
        let Some(id) = self.0 else { return };
        let t = libc::itimerspec {
            it_interval: libc::timespec { tv_sec: 0, tv_nsec: 0 },
            it_value: libc::timespec {
                tv_sec: (ns / 1_000_000_000) as i64,
                tv_nsec: (ns % 1_000_000_000) as i64,
            },
        };
        // SAFETY: the timer exists.
        unsafe { libc::timer_settime(id, libc::TIMER_ABSTIME, &t, std::ptr::null_mut()) };
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        if let Some(id) = self.0 {
            // SAFETY: made in `new`.
            unsafe { libc::timer_delete(id) };
        }
    }
}
