//! Runs a case on this processor, in this process, with every user register
//! taken from and returned to a [`UserState`].
//!
//! Entry is `rt_sigreturn` on a signal frame that we fill ourselves, so the
//! kernel loads all registers, flags and the XSAVE area at once. The way out
//! is a signal: INT3 or a fault makes the kernel write the same frame onto an
//! alternate stack; the handler copies it and jumps back to [`enter`]. FS and
//! GS base are zero meanwhile, as in the guest.
//!
//! A run takes a few microseconds. A case that goes astray cannot harm the
//! process except by stores to addresses that it guesses: system calls from
//! the arena are dispatched to SIGSYS (Linux 5.11), a timer ends endless
//! loops. Signals that arrive outside a run go to the handlers that were
//! there before, so an engine with handlers of its own can share the process.
//!
//! Not modelled: debug registers, protection keys, CET.
use crate::arena::{self, SEGMENTS};
use crate::case::Case;
use crate::compare::{null, Judge, Outcome, Step, Stop};
use crate::state::{Layout, UserState, TF};
use iced_x86::{Decoder, DecoderOptions};
use std::cell::{RefCell, UnsafeCell};
use std::marker::PhantomData;
use std::mem::{offset_of, zeroed};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// The signals that end a run.
const FATAL: [i32; 6] =
    [libc::SIGTRAP, libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGSYS];
/// Period, in time of the processor, of the timer that ends endless loops.
const TICK_NS: i64 = 5_000_000;
/// Period, in real time, of a second timer for cases that wait in the kernel.
const WAIT_NS: i64 = 500_000_000;
/// What a case gets when it asks for nothing else.
const TICKS: u64 = 4;
/// Instructions that [`Judge::steps`] tells at most.
const MOST_STEPS: usize = 4000;
const ALTERNATE_STACK: usize = 256 * 1024;
const FRAME_HEAD: usize = 1024;
const FRAME_STATE: usize = 16 * 1024;

const PR_SET_SYSCALL_USER_DISPATCH: i32 = 59;
const PR_SYS_DISPATCH_OFF: u64 = 0;
const PR_SYS_DISPATCH_ON: u64 = 1;
/// System calls from above this address are the process's own.
const OWN_CODE: u64 = 0x4000_0000;

/// What the assembly below shares with the rest; offsets are checked there.
#[repr(C)]
struct Shared {
    host_rsp: u64,
    host_fs: u64,
    host_gs: u64,
    frame_rsp: u64,
    ticks: u64,
    limit: u64,
    running: u64,
    /// es, ds, fs, gs as the case left them.
    selectors: [u16; 4],
    /// FS and GS base as the case left them.
    bases: [u64; 2],
    previous: [u64; 65],
}

struct Cell(UnsafeCell<Shared>);
// SAFETY: only the thread that holds the one `Native` and its signal handlers
// touch the contents.
unsafe impl Sync for Cell {}

static SHARED: Cell = Cell(UnsafeCell::new(Shared {
    host_rsp: 0,
    host_fs: 0,
    host_gs: 0,
    frame_rsp: 0,
    ticks: 0,
    limit: TICKS,
    running: 0,
    selectors: [0; 4],
    bases: [0; 2],
    previous: [0; 65],
}));

/// Only one `Native` at a time: the arena has fixed addresses.
static TAKEN: AtomicBool = AtomicBool::new(false);

/// Seed and index of the case that runs, for the message of a crash.
static CURRENT: [AtomicU64; 2] = [AtomicU64::new(u64::MAX), AtomicU64::new(u64::MAX)];

/// What the handler copies out of the signal frame.
struct Captured {
    state: UserState,
    signal: i32,
    vector: u64,
    error: u64,
    cr2: u64,
}

struct Out(UnsafeCell<Option<Box<Captured>>>);
// SAFETY: as for `Cell`.
unsafe impl Sync for Out {}
static OUT: Out = Out(UnsafeCell::new(None));

std::arch::global_asm!(
    // fn bunshin_oracle_enter(): returns when the case has stopped.
    ".globl bunshin_oracle_enter",
    "bunshin_oracle_enter:",
    "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15",
    "lea rcx, [rip + {shared}]",
    "rdfsbase rax", "mov [rcx + {fs}], rax",
    "rdgsbase rax", "mov [rcx + {gs}], rax",
    "mov [rcx + {rsp}], rsp",
    "mov rsp, [rcx + {frame}]",
    "mov qword ptr [rcx + {running}], 1",
    "xor eax, eax",
    "wrfsbase rax", "wrgsbase rax",
    "mov eax, 15",
    "syscall",
    "ud2",
    // Handler of the fatal signals: rdi signal, rsi siginfo, rdx ucontext.
    ".globl bunshin_oracle_fatal",
    "bunshin_oracle_fatal:",
    "lea rcx, [rip + {shared}]",
    "cmp qword ptr [rcx + {running}], 0",
    "je 2f",
    "mov qword ptr [rcx + {running}], 0",
    // The case's AC flag is still ours.
    "push 0x202", "popfq",
    "mov [rcx + {selectors}], es", "mov [rcx + {selectors} + 2], ds",
    "mov [rcx + {selectors} + 4], fs", "mov [rcx + {selectors} + 6], gs",
    "rdfsbase rax", "mov [rcx + {bases}], rax",
    "rdgsbase rax", "mov [rcx + {bases} + 8], rax",
    "xor eax, eax", "mov fs, eax", "mov gs, eax",
    "mov rax, [rcx + {fs}]", "wrfsbase rax",
    "mov rax, [rcx + {gs}]", "wrgsbase rax",
    "sub rsp, 8",
    "call {capture}",
    "lea rcx, [rip + {shared}]",
    "mov rsp, [rcx + {rsp}]",
    "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx",
    "ret",
    "2: mov eax, edi",
    "mov rax, [rcx + {previous} + rax * 8]",
    "cmp rax, 1",
    "jbe 3f",
    "jmp rax",
    "3: jmp {crash}",
    // Handler of the timer.
    ".globl bunshin_oracle_tick",
    "bunshin_oracle_tick:",
    "lea rcx, [rip + {shared}]",
    "cmp qword ptr [rcx + {running}], 0",
    "je 4f",
    "mov rax, [rcx + {ticks}]",
    "inc rax",
    "mov [rcx + {ticks}], rax",
    "cmp rax, [rcx + {limit}]",
    "jae bunshin_oracle_fatal",
    "4: ret",
    shared = sym SHARED,
    capture = sym capture,
    crash = sym crash,
    rsp = const offset_of!(Shared, host_rsp),
    fs = const offset_of!(Shared, host_fs),
    gs = const offset_of!(Shared, host_gs),
    frame = const offset_of!(Shared, frame_rsp),
    ticks = const offset_of!(Shared, ticks),
    limit = const offset_of!(Shared, limit),
    running = const offset_of!(Shared, running),
    selectors = const offset_of!(Shared, selectors),
    bases = const offset_of!(Shared, bases),
    previous = const offset_of!(Shared, previous),
);

extern "C" {
    fn bunshin_oracle_enter();
    fn bunshin_oracle_fatal();
    fn bunshin_oracle_tick();
}

/// Register numbers of a signal frame in encoding order.
const GREGS: [i32; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

/// Called on the alternate stack with the host's FS base back in place.
extern "C" fn capture(signal: i32, _info: *mut libc::siginfo_t, context: *mut libc::ucontext_t) {
    // SAFETY: the kernel passes a valid ucontext; OUT is filled before a run
    // and only used by the running thread.
    unsafe {
        let Some(out) = (*OUT.0.get()).as_mut() else { return };
        let machine = &(*context).uc_mcontext;
        for (value, reg) in out.state.gpr.iter_mut().zip(GREGS) {
            *value = machine.gregs[reg as usize] as u64;
        }
        out.state.rip = machine.gregs[libc::REG_RIP as usize] as u64;
        out.state.rflags = machine.gregs[libc::REG_EFL as usize] as u64;
        out.signal = signal;
        out.vector = machine.gregs[libc::REG_TRAPNO as usize] as u64;
        out.error = machine.gregs[libc::REG_ERR as usize] as u64;
        out.cr2 = machine.gregs[libc::REG_CR2 as usize] as u64;
        let size = Layout::host().size;
        std::ptr::copy_nonoverlapping(machine.fpregs.cast::<u8>(), out.state.xsave.0.as_mut_ptr(), size);
    }
}

/// A fatal signal outside a run that nobody else handles: say which case was
/// being compared, then die of the signal as usual.
extern "C" fn crash(signal: i32, _info: *mut libc::siginfo_t, context: *mut libc::ucontext_t) {
    let mut text = [0u8; 160];
    let mut length = 0;
    let mut put = |bytes: &[u8]| {
        text[length..length + bytes.len()].copy_from_slice(bytes);
        length += bytes.len();
    };
    let number = |put: &mut dyn FnMut(&[u8]), mut value: u64, base: u64| {
        let mut digits = [0u8; 20];
        let mut at = 20;
        loop {
            at -= 1;
            digits[at] = b"0123456789abcdef"[(value % base) as usize];
            value /= base;
            if value == 0 {
                break;
            }
        }
        put(&digits[at..]);
    };
    put(b"bunshin-oracle: signal ");
    number(&mut put, signal as u64, 10);
    put(b" outside the arena at 0x");
    // SAFETY: the kernel passes a valid ucontext.
    let rip = unsafe { (*context).uc_mcontext.gregs[libc::REG_RIP as usize] as u64 };
    number(&mut put, rip, 16);
    let [seed, index] = [0, 1].map(|i| CURRENT[i].load(Ordering::Relaxed));
    if index != u64::MAX {
        put(b" during seed ");
        number(&mut put, seed, 10);
        put(b" case ");
        number(&mut put, index, 10);
    }
    put(b"\n");
    // SAFETY: async-signal-safe calls with valid arguments.
    unsafe {
        libc::write(2, text.as_ptr().cast(), length);
        let mut default: libc::sigaction = zeroed();
        default.sa_sigaction = libc::SIG_DFL;
        libc::sigaction(signal, &default, std::ptr::null_mut());
    }
}

/// Note the case that is being compared, for the message of a crash.
pub fn note_current(case: &Case) {
    CURRENT[0].store(case.seed, Ordering::Relaxed);
    CURRENT[1].store(case.index, Ordering::Relaxed);
}

/// No case is being compared any more.
pub fn note_nothing() {
    CURRENT[1].store(u64::MAX, Ordering::Relaxed);
}

/// A copy of a signal frame as the kernel lays it out, ready for
/// `rt_sigreturn`: return address, ucontext, siginfo; then the FPU state.
#[repr(C, align(64))]
struct Frame {
    head: [u8; FRAME_HEAD],
    state: [u8; FRAME_STATE],
}

static FRAME_COPY: AtomicU64 = AtomicU64::new(0);

/// Where a ucontext holds the signal mask, 8 bytes for the kernel.
const MASK: usize = 296;

extern "C" fn copy_frame(_signal: i32, _info: *mut libc::siginfo_t, context: *mut libc::ucontext_t) {
    let frame = FRAME_COPY.load(Ordering::Relaxed) as *mut Frame;
    // SAFETY: `Native::new` put a Frame here; the kernel's frame holds a
    // return address below the ucontext and a siginfo above it, and its FPU
    // state tells its own size.
    unsafe {
        // ucontext as the kernel knows it: 304 bytes, then siginfo of 128.
        let head = context.cast::<u8>().sub(8);
        std::ptr::copy_nonoverlapping(head, (*frame).head.as_mut_ptr(), 8 + 304 + 128);
        let state = (*context).uc_mcontext.fpregs.cast::<u8>();
        let size = state.add(468).cast::<u32>().read() as usize;
        if size <= FRAME_STATE {
            std::ptr::copy_nonoverlapping(state, (*frame).state.as_mut_ptr(), size);
        }
        let own = (*frame).head.as_mut_ptr().add(8).cast::<libc::ucontext_t>();
        (*own).uc_mcontext.fpregs = (*frame).state.as_mut_ptr().cast();
    }
}

/// The host processor as a [`Judge`]. One exists at a time; it stays on its
/// thread.
pub struct Native {
    frame: Box<Frame>,
    stack: Vec<u8>,
    old_stack: libc::stack_t,
    timers: [libc::timer_t; 2],
    tick: i32,
    mapped: usize,
    /// Run 32-bit code.
    narrow: bool,
    old_actions: Vec<(i32, libc::sigaction)>,
    mask: libc::sigset_t,
    _thread: PhantomData<*mut ()>,
}

/// SYSCALL and SYSENTER in 32-bit code leave Linux with the address of its own code,
/// which the dispatch above lets through: code that changes itself could fork this process.
/// A filter turns such calls into SIGSYS; it stays for the life of the thread.
fn refuse_narrow_calls() -> Result<(), String> {
    /// The offset of `arch` in `seccomp_data`, and its value for i386.
    const ARCH: (u32, u32) = (4, 0x4000_0003);
    const ALLOW: u32 = 0x7fff_0000;
    const TRAP: u32 = 0x0003_0000;
    let filter = |code: u16, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    // Load the word, skip one instruction unless equal, return either.
    let mut program = [
        filter(0x20, 0, 0, ARCH.0),
        filter(0x15, 0, 1, ARCH.1),
        filter(0x06, 0, 0, TRAP),
        filter(0x06, 0, 0, ALLOW),
    ];
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: a filter of this thread's system calls that lets all of its own through.
    let done = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1u64, 0u64, 0u64, 0u64) == 0
            && libc::prctl(libc::PR_SET_SECCOMP, 2u64, &program, 0u64, 0u64) == 0
    };
    if done {
        Ok(())
    } else {
        Err(os("the kernel cannot keep 32-bit system calls from the arena (seccomp)"))
    }
}

fn os(what: &str) -> String {
    format!("{what}: {}", std::io::Error::last_os_error())
}

impl Native {
    /// Map the arena, take the signals.
    ///
    /// # Errors
    /// One sentence: another `Native` exists, the addresses are in use, or
    /// the kernel lacks what this needs (FSGSBASE, syscall user dispatch).
    pub fn new() -> Result<Self, String> {
        // SAFETY: reads the auxiliary vector.
        if unsafe { libc::getauxval(libc::AT_HWCAP2) } & 2 == 0 {
            return Err("this kernel does not let user mode write FS base (FSGSBASE)".into());
        }
        if (bunshin_oracle_enter as *const () as u64) < OWN_CODE {
            return Err("the program is not position-independent, its code lies where cases run".into());
        }
        if TAKEN.swap(true, Ordering::SeqCst) {
            return Err("the arena is in use already".into());
        }
        // From here on dropping `native` undoes what was done.
        // SAFETY: plain data for the kernel.
        let mut native = unsafe {
            Self {
                frame: Box::new(zeroed()),
                stack: vec![0; ALTERNATE_STACK],
                old_stack: zeroed(),
                timers: [std::ptr::null_mut(); 2],
                tick: libc::SIGRTMIN() + 7,
                mapped: 0,
                narrow: false,
                old_actions: Vec::new(),
                mask: zeroed(),
                _thread: PhantomData,
            }
        };
        for s in SEGMENTS {
            native.map(&s)?;
        }
        native.take_signals()?;
        // SAFETY: dispatch concerns this thread only; the range keeps all
        // code above the arena out of it.
        let dispatch = unsafe {
            let length = 0x7fff_ffff_f000 - OWN_CODE;
            libc::prctl(PR_SET_SYSCALL_USER_DISPATCH, PR_SYS_DISPATCH_ON, OWN_CODE, length, 0u64)
        };
        if dispatch != 0 {
            return Err(os("the kernel cannot keep system calls out of the arena"));
        }
        refuse_narrow_calls()?;
        Ok(native)
    }

    fn map(&mut self, s: &arena::Segment) -> Result<(), String> {
        let protection = libc::PROT_READ | libc::PROT_WRITE | if s.executable { libc::PROT_EXEC } else { 0 };
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE | libc::MAP_POPULATE;
        // SAFETY: NOREPLACE refuses to touch what exists.
        let at = unsafe { libc::mmap(s.base as *mut _, s.length as usize, protection, flags, -1, 0) };
        if at as u64 != s.base {
            if at != libc::MAP_FAILED {
                // SAFETY: an old kernel took the address as a hint.
                unsafe { libc::munmap(at, s.length as usize) };
            }
            return Err(os(&format!("no arena at {:#x}", s.base)));
        }
        self.mapped += 1;
        let image = &arena::base_image()[s.offset..][..s.length as usize];
        // SAFETY: mapped just now.
        unsafe { std::ptr::copy_nonoverlapping(image.as_ptr(), s.base as *mut u8, image.len()) };
        Ok(())
    }

    fn take_signals(&mut self) -> Result<(), String> {
        // SAFETY: all structures are ours and valid; handlers follow the
        // signal ABI.
        unsafe {
            let stack = libc::stack_t {
                ss_sp: self.stack.as_mut_ptr().cast(),
                ss_flags: 0,
                ss_size: self.stack.len(),
            };
            if libc::sigaltstack(&stack, &mut self.old_stack) != 0 {
                return Err(os("no alternate signal stack"));
            }
            FRAME_COPY.store(self.frame.as_mut() as *mut Frame as u64, Ordering::Relaxed);
            install(self.tick, copy_frame as *const () as usize);
            libc::raise(self.tick);
            let frame = self.frame.as_mut();
            if frame.state[464..468] != 0x4650_5853u32.to_le_bytes() {
                return Err("the kernel's signal frames carry no XSAVE area".into());
            }
            if u32::from_le_bytes(frame.state[468..472].try_into().unwrap()) as usize > FRAME_STATE {
                return Err("the kernel's signal frames are larger than expected".into());
            }
            // Other handlers may need FS base, so their signals wait.
            libc::pthread_sigmask(libc::SIG_SETMASK, std::ptr::null(), &mut self.mask);
            let ours = FATAL.iter().chain([&self.tick]).fold(0u64, |set, s| set | 1 << (s - 1));
            frame.head[8 + MASK..16 + MASK].copy_from_slice(&(!ours).to_le_bytes());
            install(self.tick, bunshin_oracle_tick as *const () as usize);
            let shared = SHARED.0.get();
            (*shared).frame_rsp = frame.head.as_ptr() as u64 + 8;
            (*shared).running = 0;
            *OUT.0.get() = Some(Box::new(Captured {
                state: UserState::default(),
                signal: 0,
                vector: 0,
                error: 0,
                cr2: 0,
            }));
            self.ensure_handlers();
            let clocks = [(libc::CLOCK_THREAD_CPUTIME_ID, TICK_NS), (libc::CLOCK_MONOTONIC, WAIT_NS)];
            for (timer, (clock, period)) in self.timers.iter_mut().zip(clocks) {
                let mut event: libc::sigevent = zeroed();
                event.sigev_notify = libc::SIGEV_THREAD_ID;
                event.sigev_signo = self.tick;
                event.sigev_notify_thread_id = libc::gettid();
                if libc::timer_create(clock, &mut event, timer) != 0 {
                    *timer = std::ptr::null_mut();
                    return Err(os("no timer"));
                }
                let period = libc::timespec { tv_sec: 0, tv_nsec: period };
                let spec = libc::itimerspec { it_interval: period, it_value: period };
                libc::timer_settime(*timer, 0, &spec, std::ptr::null_mut());
            }
        }
        Ok(())
    }

    /// Put our handlers (and alternate stack) back on top if an engine has
    /// installed its own since; they chain to those.
    fn ensure_handlers(&mut self) {
        // SAFETY: queries and sets this process's handlers.
        unsafe {
            let mut now: libc::sigaction = zeroed();
            libc::sigaction(libc::SIGSEGV, std::ptr::null(), &mut now);
            let ours = bunshin_oracle_fatal as *const () as usize;
            if now.sa_sigaction == ours {
                return;
            }
            for signal in FATAL {
                libc::sigaction(signal, std::ptr::null(), &mut now);
                if now.sa_sigaction != ours {
                    let old = install(signal, ours);
                    (*SHARED.0.get()).previous[signal as usize] = old.sa_sigaction as u64;
                    self.old_actions.push((signal, old));
                }
            }
        }
    }

    /// Run from `state` until INT3, a fault or the end of time; `state` is
    /// replaced by what the processor then holds. The arena is left as it is.
    pub fn run_state(&mut self, state: &mut UserState, ticks: u64) -> Stop {
        self.ensure_handlers();
        let size = Layout::host().size;
        // SAFETY: the frame is a valid copy of a kernel frame, only values
        // that rt_sigreturn accepts go in; `capture` has filled OUT when
        // `enter` returns.
        unsafe {
            let frame = self.frame.as_mut();
            let context = frame.head.as_mut_ptr().add(8).cast::<libc::ucontext_t>();
            let gregs = &mut (*context).uc_mcontext.gregs;
            for (value, reg) in state.gpr.iter().zip(GREGS) {
                gregs[reg as usize] = *value as i64;
            }
            gregs[libc::REG_RIP as usize] = state.rip as i64;
            gregs[libc::REG_EFL as usize] = (state.rflags | 0x202) as i64;
            let cs = if self.narrow { 0x23 } else { 0x33 };
            let segments = &mut gregs[libc::REG_CSGSFS as usize];
            *segments = *segments & !0xffff | cs;
            frame.state[..464].copy_from_slice(&state.xsave.0[..464]);
            frame.state[512..size].copy_from_slice(&state.xsave.0[512..size]);
            let shared = SHARED.0.get();
            (*shared).ticks = 0;
            (*shared).limit = ticks;
            // 32-bit code needs them and may change them; 64-bit code does not notice.
            std::arch::asm!("mov ds, {0:x}", "mov es, {0:x}", in(reg) 0x2b);
            bunshin_oracle_enter();
            libc::pthread_sigmask(libc::SIG_SETMASK, &self.mask, std::ptr::null_mut());
            let out = (*OUT.0.get()).as_mut().unwrap_unchecked();
            out.state.xsave.normalise();
            *state = out.state.clone();
            self.stop(out.signal, out.vector, out.error, out.cr2)
        }
    }

    fn stop(&self, signal: i32, vector: u64, error: u64, cr2: u64) -> Stop {
        if signal == self.tick {
            return Stop::Timeout;
        }
        if signal == libc::SIGSYS {
            return Stop::Syscall;
        }
        let vector = vector as u8;
        match vector {
            3 => Stop::Breakpoint,
            14 => Stop::Fault { vector, error: error as u32, address: cr2 },
            _ => Stop::Fault { vector, error: error as u32, address: 0 },
        }
    }
}

impl Native {
    /// Patches and code of a case into the arena.
    fn lay(&mut self, case: &Case) {
        self.narrow = case.narrow;
        for (address, bytes) in case.writes() {
            if arena::image_offset(address, bytes.len()).is_some() {
                // SAFETY: inside the arena, which is mapped as long as we live.
                unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), address as *mut u8, bytes.len()) };
            }
        }
    }

    /// Run a case one instruction at a time, as long as `go_on` says so of each and the
    /// case has not ended.
    fn walk(&mut self, case: &Case, mut go_on: impl FnMut(Step) -> bool) {
        self.lay(case);
        let mut state = case.state.clone();
        let code = |rip: u64| {
            let at = arena::image_offset(rip, 15).filter(|at| *at < arena::CODE_LENGTH as usize)?;
            // SAFETY: 15 bytes of the arena's code.
            Some(unsafe { ((at as u64 + arena::CODE) as *const [u8; 15]).read_unaligned() })
        };
        while let Some(bytes) = code(state.rip) {
            let rip = state.rip;
            state.rflags |= TF;
            let stop = self.run_state(&mut state, TICKS);
            let length = Decoder::new(case.bits(), &bytes, DecoderOptions::AMD).decode().len();
            let after = code(rip).unwrap_or(bytes);
            let step = Step { rip, bytes, overwrote_itself: bytes[..length] != after[..length] };
            if !go_on(step) || !matches!(stop, Stop::Fault { vector: 1, .. }) {
                break;
            }
        }
        self.put_back();
    }

    /// The base image back into the arena; what was changed.
    fn put_back(&mut self) -> Vec<(usize, [u8; arena::LINE])> {
        // SAFETY: the arena's segments are mapped and nothing runs in them.
        let memory = unsafe { arena::changed_lines(|i| SEGMENTS[i].base as *const u8) };
        let image = arena::base_image();
        for (offset, line) in &memory {
            let address = arena::image_address(*offset) as *mut u8;
            // SAFETY: as above.
            unsafe { std::ptr::copy_nonoverlapping(image[*offset..].as_ptr(), address, line.len()) };
        }
        memory
    }
}

/// Install a handler for a signal; the action that was there before.
///
/// # Safety
/// `handler` follows the ABI of a SA_SIGINFO handler.
unsafe fn install(signal: i32, handler: usize) -> libc::sigaction {
    // SAFETY: structures are ours, see above for the handler.
    unsafe {
        let mut action: libc::sigaction = zeroed();
        let mut old: libc::sigaction = zeroed();
        action.sa_sigaction = handler;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER | libc::SA_RESTART;
        libc::sigaction(signal, &action, &mut old);
        old
    }
}

impl Judge for Native {
    fn name(&self) -> &'static str {
        "native"
    }

    fn run(&mut self, case: &Case) -> Outcome {
        self.lay(case);
        let mut state = case.state.clone();
        let stop = self.run_state(&mut state, TICKS);
        let memory = self.put_back();
        // SAFETY: nothing runs that could write them.
        let (selectors, bases) = unsafe { ((*SHARED.0.get()).selectors, (*SHARED.0.get()).bases) };
        let selectors = selectors.map(null);
        Outcome { state, selectors, bases, stop, memory }
    }

    fn steps(&mut self, case: &Case) -> Vec<Step> {
        let mut steps = Vec::new();
        self.walk(case, |step| {
            steps.push(step);
            steps.len() < MOST_STEPS
        });
        steps
    }

    fn runs_longer_than(&mut self, case: &Case, instructions: usize) -> bool {
        let mut count = 0;
        self.walk(case, |_| {
            count += 1;
            count <= instructions
        });
        count > instructions
    }
}

/// One `Native` on both sides of a comparison, to prove that it is sound.
impl Judge for Rc<RefCell<Native>> {
    fn name(&self) -> &'static str {
        "native"
    }

    fn run(&mut self, case: &Case) -> Outcome {
        self.borrow_mut().run(case)
    }

    fn steps(&mut self, case: &Case) -> Vec<Step> {
        self.borrow_mut().steps(case)
    }

    fn runs_longer_than(&mut self, case: &Case, instructions: usize) -> bool {
        self.borrow_mut().runs_longer_than(case, instructions)
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        // SAFETY: gives back what `new` took, as far as it came.
        unsafe {
            libc::prctl(PR_SET_SYSCALL_USER_DISPATCH, PR_SYS_DISPATCH_OFF, 0u64, 0u64, 0u64);
            for timer in self.timers {
                if !timer.is_null() {
                    libc::timer_delete(timer);
                }
            }
            for (signal, old) in self.old_actions.iter().rev() {
                libc::sigaction(*signal, old, std::ptr::null_mut());
            }
            for s in &SEGMENTS[..self.mapped] {
                libc::munmap(s.base as *mut _, s.length as usize);
            }
            if !self.old_stack.ss_sp.is_null() || self.old_stack.ss_flags != 0 {
                libc::sigaltstack(&self.old_stack, std::ptr::null_mut());
            }
        }
        TAKEN.store(false, Ordering::SeqCst);
    }
}
