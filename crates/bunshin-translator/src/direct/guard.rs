//! Breakpoints on instructions that would show the host (`scan.rs`).
//!
//! The processor has four, and Linux gives them out as performance events: one that is
//! met ends in SIGTRAP before the instruction runs. They are exact, where the search is
//! not, and nobody sees them. Each makes switches to and from the sandbox some 2 µs slower.
use bunshin_core::{EngineError, Result};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// What the processor has.
pub const BREAKPOINTS: usize = 4;

/// `struct perf_event_attr` up to `bp_len`, and what a breakpoint needs of it.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    kind: u32,
    size: u32,
    config: u64,
    period: u64,
    sample_type: u64,
    read_format: u64,
    flags: u64,
    wakeup: u32,
    bp_type: u32,
    bp_addr: u64,
    bp_len: u64,
    branch_sample_type: u64,
    sample_regs_user: u64,
    sample_stack_user: u32,
    clock: i32,
    sample_regs_intr: u64,
    aux_watermark: u32,
    sample_max_stack: u16,
    _reserved: u16,
    aux_sample_size: u32,
    _reserved_too: u32,
    signal_data: u64,
}

const BREAKPOINT: u32 = 5;
const EXECUTE: u32 = 4;
const EXCLUDE_KERNEL: u64 = 1 << 5;
const EXCLUDE_HYPERVISOR: u64 = 1 << 6;
const REMOVE_ON_EXEC: u64 = 1 << 36;
const SIGTRAP: u64 = 1 << 37;

/// Breakpoints of one sandbox.
#[derive(Default)]
pub struct Guard {
    /// Where, and the event; the one that was met last comes last.
    set: Vec<(u64, OwnedFd)>,
}

impl Guard {
    /// Breakpoints at `places` of the page at `va`. Pages whose breakpoints had to make
    /// room come back: they must not be executable any more. `keep` is not among them: an
    /// instruction may lie in two pages.
    ///
    /// # Errors
    /// There are more places than breakpoints, or the host does not give any.
    pub fn set(&mut self, pid: i32, va: u64, places: &[usize], keep: u64) -> Result<Vec<u64>> {
        self.forget(va);
        if places.len() > BREAKPOINTS {
            return Err(EngineError::new("sandbox", "more places than the processor has breakpoints"));
        }
        let mut gone = Vec::new();
        while self.set.len() + places.len() > BREAKPOINTS {
            let page = self.set.iter().map(|(at, _)| at & !0xfff).find(|&page| page != keep);
            let Some(page) = page else {
                return Err(EngineError::new("sandbox", "one instruction needs all breakpoints"));
            };
            self.forget(page);
            gone.push(page);
        }
        for &at in places {
            match breakpoint(pid, va + at as u64) {
                Ok(event) => self.set.push((va + at as u64, event)),
                Err(e) => {
                    self.forget(va);
                    return Err(e);
                }
            }
        }
        Ok(gone)
    }

    /// The page at `va` is not executable any more.
    pub fn forget(&mut self, va: u64) {
        self.set.retain(|(at, _)| at & !0xfff != va);
    }

    /// The page at `va` has breakpoints at `places` and nowhere else.
    pub fn has(&self, va: u64, places: &[usize]) -> bool {
        let mut set = self.set.iter().map(|(at, _)| *at).filter(|at| at & !0xfff == va);
        self.set.iter().filter(|(at, _)| at & !0xfff == va).count() == places.len()
            && set.all(|at| places.contains(&((at & 0xfff) as usize)))
    }

    /// One of the page at `va` was met: it makes room for others last.
    pub fn meets(&mut self, va: u64) {
        self.set.sort_by_key(|(at, _)| at & !0xfff == va);
    }

    pub fn clear(&mut self) {
        self.set.clear();
    }
}

fn breakpoint(pid: i32, va: u64) -> Result<OwnedFd> {
    let attributes = Attributes {
        kind: BREAKPOINT,
        size: size_of::<Attributes>() as u32,
        period: 1,
        flags: EXCLUDE_KERNEL | EXCLUDE_HYPERVISOR | REMOVE_ON_EXEC | SIGTRAP,
        bp_type: EXECUTE,
        bp_addr: va,
        bp_len: 8,
        ..Attributes::default()
    };
    let (any, none, close) = (-1, -1, 8);
    // SAFETY: reads the attributes, whose size they tell.
    let fd = unsafe {
        libc::syscall(libc::SYS_perf_event_open, &raw const attributes, pid, any, none, close) as RawFd
    };
    if fd < 0 {
        return Err(EngineError::last_os("sandbox", "a breakpoint for direct execution"));
    }
    // SAFETY: just made.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
