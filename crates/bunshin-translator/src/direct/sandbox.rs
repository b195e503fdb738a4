//! The process that guest code runs in.
use super::filter::{filter, MMAP_SECRET, MUNMAP_SECRET};
use super::stub::*;
use bunshin_core::{EngineError, Result};
use std::ffi::CString;
use std::io::Error;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

/// The signal that stops guest code; the stub's handler takes it as any other.
pub const STOP: i32 = libc::SIGUSR1;
/// A sandbox that was told to stop and does not within this time is killed, milliseconds.
const PATIENCE: i32 = 200;
const START: Duration = Duration::from_secs(2);

/// ioctl requests of a seccomp listener.
const RECEIVE: u64 = 0xc050_2100;
const SEND: u64 = 0xc018_2101;
const SET_FLAGS: u64 = 0x4008_2104;
const SYNC_WAKE_UP: u64 = 1;

const NEW_LISTENER: u64 = 1 << 3;
const WAIT_KILLABLE: u64 = 1 << 5;
const SA_RESTORER: u64 = 0x0400_0000;

#[repr(C)]
#[derive(Default)]
struct Notification {
    id: u64,
    pid: u32,
    flags: u32,
    number: i32,
    arch: u32,
    pointer: u64,
    arguments: [u64; 6],
}

#[repr(C)]
struct Response {
    id: u64,
    value: i64,
    error: i32,
    flags: u32,
}

/// What a hand-over tells.
#[derive(Clone, Copy, Debug)]
pub struct Handed {
    pub signal: i32,
    /// Address of the signal's information in the sandbox.
    pub info: u64,
    /// Address of the frame's context in the sandbox.
    pub context: u64,
    pub fs: u64,
    pub gs: u64,
    /// Selectors of DS, ES, FS and GS.
    pub selectors: [u16; 4],
}

/// What the sandbox goes on with besides its frame.
#[derive(Clone, Copy, Debug)]
pub struct Start {
    /// Address of the frame's context in the sandbox.
    pub context: u64,
    pub fs: u64,
    pub gs: u64,
    /// Selectors of DS, ES, FS and GS that Linux lets user mode load.
    pub selectors: [u16; 4],
    pub flags: u64,
}

pub struct Sandbox {
    pid: i32,
    listener: OwnedFd,
    shared: *mut u8,
    /// The hand-over that waits for its answer.
    id: u64,
    secret: u32,
    commands: usize,
}

// SAFETY: owned memory and descriptors.
unsafe impl Send for Sandbox {}

fn failed(what: &str) -> EngineError {
    EngineError::last_os("sandbox", format!("a sandbox for direct execution: {what}"))
}

fn memfd(name: &std::ffi::CStr) -> Result<OwnedFd> {
    // SAFETY: makes a new descriptor.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(failed("memfd_create"));
    }
    // SAFETY: just made.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn write_all(fd: &OwnedFd, bytes: &[u8]) -> Result<()> {
    // SAFETY: writes a slice.
    let n = unsafe { libc::pwrite(fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) };
    if n == bytes.len() as isize {
        Ok(())
    } else {
        Err(failed("writing its program"))
    }
}

impl Sandbox {
    /// A sandbox that may map `files` (its descriptors are `SHARED_FD + 1` and up), stopped
    /// at its first trap. `no_tsc`: RDTSC and RDTSCP trap.
    pub fn new(files: &[RawFd], no_tsc: bool) -> Result<(Self, Handed)> {
        let stub = Stub::new();
        let program = memfd(c"bunshin-sandbox")?;
        write_all(&program, &stub.program())?;
        let memory = memfd(c"bunshin-sandbox-shared")?;
        // SAFETY: the file is new; the mapping is fresh.
        let shared = unsafe {
            if libc::ftruncate(memory.as_raw_fd(), SHARED_BYTES as libc::off_t) != 0 {
                return Err(failed("its shared memory"));
            }
            libc::mmap(
                std::ptr::null_mut(),
                SHARED_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                memory.as_raw_fd(),
                0,
            )
        };
        if shared == libc::MAP_FAILED {
            return Err(failed("its shared memory"));
        }
        let mut secret = [0u8; 4];
        // SAFETY: writes four bytes.
        if unsafe { libc::getrandom(secret.as_mut_ptr().cast(), 4, 0) } != 4 {
            return Err(failed("getrandom"));
        }
        let secret = u32::from_ne_bytes(secret);
        let mut s = Self { pid: 0, listener: program, shared: shared.cast(), id: 0, secret, commands: 0 };
        s.prepare(&stub, files.len(), no_tsc);
        let program = std::mem::replace(&mut s.listener, memfd(c"bunshin-none")?);
        s.pid = spawn(&program, &memory, files)?;
        s.listener = s.take_listener().map_err(|e| s.refusal().unwrap_or(e))?;
        if let Some(refusal) = s.refusal() {
            return Err(refusal);
        }
        let flags = SYNC_WAKE_UP;
        // SAFETY: the listener's ioctl takes flags by value.
        if unsafe { libc::ioctl(s.listener.as_raw_fd(), SET_FLAGS as _, flags) } != 0 {
            return Err(failed("the host's kernel is older than 6.6 (SYNC_WAKE_UP)"));
        }
        s.put(COUNT, 0);
        s.commands = 0;
        let handed = s.receive().ok_or_else(|| failed("it did not start"))?;
        Ok((s, handed))
    }

    /// Commands that the stub begins with: forget the program's stack and the vDSO, close
    /// all else, take signals, go under the filter.
    fn prepare(&mut self, stub: &Stub, files: usize, no_tsc: bool) {
        let last = SHARED_FD as u64 + files as u64;
        self.command(libc::SYS_munmap, [0, STUB, 0, 0, 0, 0]);
        self.command(libc::SYS_munmap, [END, TOP - END, 0, 0, 0, 0]);
        self.command(libc::SYS_close_range, [0, SHARED_FD as u64, 0, 0, 0, 0]);
        self.command(libc::SYS_close_range, [last + 1, u32::MAX.into(), 0, 0, 0, 0]);
        self.command(libc::SYS_prctl, [libc::PR_SET_PDEATHSIG as u64, libc::SIGKILL as u64, 0, 0, 0, 0]);
        if no_tsc {
            let way = libc::PR_TSC_SIGSEGV as u64;
            self.command(libc::SYS_prctl, [libc::PR_SET_TSC as u64, way, 0, 0, 0, 0]);
        }
        let at = |offset: usize| ORDERS + (SCRATCH + offset) as u64;
        // No core files: struct rlimit.
        self.command(libc::SYS_setrlimit, [libc::RLIMIT_CORE.into(), at(0), 0, 0, 0, 0]);
        // stack_t: address, flags, size.
        for (n, word) in [STACK, 0, STACK_BYTES as u64].into_iter().enumerate() {
            self.put(SCRATCH + 16 + 8 * n, word);
        }
        self.command(libc::SYS_sigaltstack, [at(16), 0, 0, 0, 0, 0]);
        // The kernel's struct sigaction: handler, flags, restorer, mask.
        let flags = (libc::SA_SIGINFO | libc::SA_ONSTACK) as u64 | SA_RESTORER;
        for (n, word) in [stub.handler, flags, STUB, u64::MAX].into_iter().enumerate() {
            self.put(SCRATCH + 64 + 8 * n, word);
        }
        for signal in
            [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP, libc::SIGSYS, STOP]
        {
            self.command(libc::SYS_rt_sigaction, [signal as u64, at(64), 0, 8, 0, 0]);
        }
        self.command(libc::SYS_prctl, [libc::PR_SET_NO_NEW_PRIVS as u64, 1, 0, 0, 0, 0]);
        let rules = filter(stub, self.secret);
        // struct sock_fprog, then the program.
        self.put(SCRATCH + 128, rules.len() as u64);
        self.put(SCRATCH + 136, at(256));
        for (n, rule) in rules.iter().enumerate() {
            let head = u64::from(rule.code) | u64::from(rule.jt) << 16 | u64::from(rule.jf) << 24;
            self.put(SCRATCH + 256 + 8 * n, head | u64::from(rule.k) << 32);
        }
        let way = libc::SECCOMP_SET_MODE_FILTER as u64;
        self.command(libc::SYS_seccomp, [way, NEW_LISTENER | WAIT_KILLABLE, at(128), 0, 0, 0]);
    }

    fn put(&mut self, offset: usize, value: u64) {
        debug_assert!(offset + 8 <= SHARED_BYTES);
        // SAFETY: inside the shared memory.
        unsafe { self.shared.add(offset).cast::<u64>().write_volatile(value) }
    }

    fn get(&self, offset: usize) -> u64 {
        // SAFETY: as in `put`.
        unsafe { self.shared.add(offset).cast::<u64>().read_volatile() }
    }

    fn command(&mut self, number: i64, arguments: [u64; 6]) {
        let at = COMMANDS + COMMAND * self.commands;
        self.put(at, number as u64);
        for (n, a) in arguments.into_iter().enumerate() {
            self.put(at + 8 + 8 * n, a);
        }
        self.commands += 1;
        self.put(COUNT, self.commands as u64);
    }

    /// Forget commands not carried out yet: all that they map goes.
    pub fn drop_maps(&mut self) {
        self.commands = 0;
    }

    /// Number of the system call that the signal information at `va` of the sandbox tells of.
    pub fn system_call(&self, va: u64) -> Option<i32> {
        self.information(va, 24)
    }

    /// `si_code` in it.
    pub fn code(&self, va: u64) -> Option<i32> {
        self.information(va, 8)
    }

    fn information(&self, va: u64, offset: usize) -> Option<i32> {
        let at = (va.checked_sub(ORDERS)? as usize).checked_add(offset)?;
        (va >= STACK && at % 4 == 0 && at <= SHARED_BYTES - 4).then(|| {
            // SAFETY: inside the shared memory.
            unsafe { self.shared.add(at).cast::<i32>().read_volatile() }
        })
    }

    /// Room for so many commands.
    pub fn room(&self) -> usize {
        MOST - self.commands
    }

    /// Before guest code runs again: map `length` bytes of file `file` from `offset` at `va`.
    pub fn map(&mut self, va: u64, length: u64, protection: i32, file: usize, offset: u64) {
        let flags = (libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_POPULATE) as u64;
        let fd = SHARED_FD as u64 + 1 + file as u64;
        let mut arguments = [va, length, protection as u64, flags, fd, offset];
        arguments[MMAP_SECRET] |= u64::from(self.secret) << 32;
        self.command(libc::SYS_mmap, arguments);
    }

    /// Before guest code runs again: nothing is mapped at `va`.
    pub fn unmap(&mut self, va: u64, length: u64) {
        let mut arguments = [va, length, 0, 0, 0, 0];
        arguments[MUNMAP_SECRET] = u64::from(self.secret) << 32;
        self.command(libc::SYS_munmap, arguments);
    }

    /// Where orders and stack lie here.
    pub fn shared(&self) -> *mut u8 {
        self.shared
    }

    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Carry out the commands, run guest code until it traps. None: the sandbox is dead,
    /// or did not what it was told.
    pub fn run(&mut self, start: Start) -> Option<Handed> {
        self.put(CONTEXT, start.context);
        self.put(FS, start.fs);
        self.put(GS, start.gs);
        let word = |selectors: [u16; 4]| selectors.iter().rev().fold(0, |w, &s| w << 16 | u64::from(s));
        self.put(SELECTORS, word(start.selectors));
        self.put(FLAGS, start.flags);
        self.put(COUNT, self.commands as u64);
        let done = std::mem::take(&mut self.commands);
        let response = Response { id: self.id, value: 0, error: 0, flags: 0 };
        // SAFETY: the ioctl reads a response.
        if unsafe { libc::ioctl(self.listener.as_raw_fd(), SEND as _, &raw const response) } != 0 {
            return None;
        }
        let handed = self.receive()?;
        // The files are long enough and the addresses exist: only want of memory fails.
        let result = |n| self.get(COMMANDS + COMMAND * n + 56) as i64;
        if (0..done).any(|n| (-4095..0).contains(&result(n))) {
            return None;
        }
        self.put(COUNT, 0);
        Some(handed)
    }

    /// Wait for a hand-over.
    fn receive(&mut self) -> Option<Handed> {
        loop {
            let mut n = Notification::default();
            // SAFETY: the ioctl fills a notification, which must be zero before.
            if unsafe { libc::ioctl(self.listener.as_raw_fd(), RECEIVE as _, &raw mut n) } == 0 {
                self.id = n.id;
                let [signal, info, context, fs, gs, s] = n.arguments;
                let selectors = [s as u16, (s >> 16) as u16, (s >> 32) as u16, (s >> 48) as u16];
                return Some(Handed { signal: signal as i32, info, context, fs, gs, selectors });
            }
            match Error::last_os_error().raw_os_error() {
                // A kick, whose handler has sent STOP on.
                Some(libc::EINTR) if self.stops() => {}
                _ => return None,
            }
        }
    }

    /// It was told to stop: wait for that. False: it does not, or is dead.
    fn stops(&self) -> bool {
        let until = Instant::now() + Duration::from_millis(PATIENCE as u64);
        loop {
            let mut poll = libc::pollfd { fd: self.listener.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one descriptor.
            let ready = unsafe { libc::poll(&raw mut poll, 1, PATIENCE) };
            if ready > 0 {
                return poll.revents & libc::POLLIN != 0;
            }
            if Instant::now() >= until {
                return false;
            }
        }
    }

    /// What the host's kernel refused of the preparations.
    fn refusal(&self) -> Option<EngineError> {
        (0..self.commands).map(|n| COMMANDS + COMMAND * n).find_map(|at| {
            let result = self.get(at + 56) as i64;
            let what = match self.get(at) as i64 {
                libc::SYS_seccomp => "seccomp with a listener, which takes Linux 6.0 or newer",
                libc::SYS_close_range => "close_range, which takes Linux 5.9 or newer",
                libc::SYS_prctl => "prctl",
                _ => "a system call to set it up",
            };
            (-4095..0).contains(&result).then(|| {
                let why = Error::from_raw_os_error(-result as i32);
                EngineError::new(
                    "sandbox",
                    format!("a sandbox for direct execution: the host refuses {what}: {why}"),
                )
            })
        })
    }

    /// The filter's listener is the only descriptor below the shared memory's.
    fn take_listener(&self) -> Result<OwnedFd> {
        // SAFETY: the process is a child that nobody has waited for.
        let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, self.pid, 0) } as RawFd;
        if pidfd < 0 {
            return Err(failed("pidfd_open"));
        }
        // SAFETY: just made.
        let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
        let started = Instant::now();
        loop {
            // SAFETY: gives a new descriptor.
            let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), 0, 0) } as RawFd;
            if fd >= 0 {
                // SAFETY: just made. 0 was something else before the stub closed it.
                let fd = unsafe { OwnedFd::from_raw_fd(fd) };
                if is_listener(&fd) {
                    return Ok(fd);
                }
            }
            if started.elapsed() > START {
                return Err(failed("it did not go under its filter"));
            }
            std::thread::sleep(Duration::from_micros(50));
        }
    }
}

fn is_listener(fd: &OwnedFd) -> bool {
    std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
        .is_ok_and(|name| name.to_string_lossy().contains("seccomp notify"))
}

/// Start the program with its descriptors in their places.
fn spawn(program: &OwnedFd, memory: &OwnedFd, files: &[RawFd]) -> Result<i32> {
    let path = CString::new(format!("/proc/self/fd/{}", program.as_raw_fd())).expect("no zero byte");
    let name = CString::new("bunshin-sandbox").expect("no zero byte");
    // Out of the way of the places that they are to take.
    let first = SHARED_FD + 1 + files.len() as i32;
    let sources = std::iter::once(memory.as_raw_fd())
        .chain(files.iter().copied())
        .map(|fd| {
            // SAFETY: gives a new descriptor.
            match unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, first) } {
                fd if fd < 0 => Err(failed("its descriptors")),
                // SAFETY: just made.
                fd => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
            }
        })
        .collect::<Result<Vec<_>>>()?;
    // SAFETY: everything is initialised before it is used and destroyed afterwards.
    unsafe {
        let mut actions: libc::posix_spawn_file_actions_t = std::mem::zeroed();
        let mut attributes: libc::posix_spawnattr_t = std::mem::zeroed();
        libc::posix_spawn_file_actions_init(&raw mut actions);
        libc::posix_spawnattr_init(&raw mut attributes);
        let mut nothing: libc::sigset_t = std::mem::zeroed();
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut nothing);
        libc::sigfillset(&raw mut all);
        libc::posix_spawnattr_setsigmask(&raw mut attributes, &raw const nothing);
        libc::posix_spawnattr_setsigdefault(&raw mut attributes, &raw const all);
        let flags = libc::POSIX_SPAWN_SETSIGMASK | libc::POSIX_SPAWN_SETSIGDEF;
        libc::posix_spawnattr_setflags(&raw mut attributes, flags as libc::c_short);
        for (n, fd) in sources.iter().enumerate() {
            libc::posix_spawn_file_actions_adddup2(&raw mut actions, fd.as_raw_fd(), SHARED_FD + n as i32);
        }
        let mut pid = 0;
        let (arguments, environment) =
            ([name.as_ptr().cast_mut(), std::ptr::null_mut()], [std::ptr::null_mut::<libc::c_char>()]);
        let error = libc::posix_spawn(
            &raw mut pid,
            path.as_ptr(),
            &raw const actions,
            &raw const attributes,
            arguments.as_ptr(),
            environment.as_ptr(),
        );
        libc::posix_spawn_file_actions_destroy(&raw mut actions);
        libc::posix_spawnattr_destroy(&raw mut attributes);
        if error != 0 {
            let why = Error::from_raw_os_error(error);
            return Err(EngineError::new("sandbox", format!("a sandbox for direct execution: {why}")));
        }
        Ok(pid)
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        // SAFETY: the process is ours and not waited for; the memory was mapped in `new`.
        unsafe {
            if self.pid > 0 {
                libc::kill(self.pid, libc::SIGKILL);
                libc::waitpid(self.pid, std::ptr::null_mut(), 0);
            }
            libc::munmap(self.shared.cast(), SHARED_BYTES);
        }
    }
}
