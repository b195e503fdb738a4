//! Direct execution: user code of the guest runs natively in a process of its own while
//! the translator runs the guest's kernel. Experimental, off unless asked for;
//! `docs/design/direct-execution.md` has figures and what cannot be trapped.
//!
//! ```text
//!  Vcpu::run_loop ─> run_direct ──registers──> Frame ──answer──> Sandbox: guest code
//!        ^                │                                           │ trap
//!        │                ├── a page that can be mapped: map, again   v
//!        └── anything <───┴───────────── notification <────────── the stub
//! ```
//!
//! A sandbox mirrors one user region of the TLB (`mmu.rs`) and is to be understood as a
//! TLB itself: it holds mappings of guest pages that stay valid until the guest flushes
//! them. What a region drops is noted in its [`Stale`] and unmapped before guest code
//! runs there again. Pages are writable under the same rules as store tags, and writable
//! or executable but not both: executable ones were searched for instructions that would
//! show the host (`scan.rs`), and have breakpoints where there may be one
//! (`guard.rs`).
//!
//! What a hostile guest could try: see `stub.rs`, `filter.rs`, `frame.rs`.
mod filter;
mod frame;
mod guard;
mod pages;
mod policy;
mod sandbox;
mod scan;
mod stub;
mod tables;

use crate::cpu::*;
use crate::mmu::{Exception, Filled, Kind, Who, OF_};
use crate::vcpu::{mode, Vcpu};
use bunshin_core::{clock, EngineError, Exit, Result};
use frame::Frame;
use pages::Mirror;
pub use pages::Stale;
use policy::Standing;
use sandbox::{Handed, Sandbox, Start};
use std::ops::ControlFlow;
use std::os::fd::RawFd;
use std::sync::atomic::Ordering;

pub use sandbox::STOP;
pub use stub::sandbox_addresses;

/// Most instructions performed one by one in a page that cannot be guarded, before the
/// translator takes the stretch over: as long as a hand-over or two.
const VISIT: u32 = 100;

/// Selectors of user mode under Linux: no others run directly.
const CODE: u16 = 0x33;
const DATA: u16 = 0x2b;
/// What Linux says of a SIGTRAP: by INT3, by INT1, by TF.
const SI_KERNEL: i32 = 0x80;
const TRAP_BRKPT: i32 = 1;
const TRAP_TRACE: i32 = 2;
/// Bit of DR6: single-step.
const BS: u64 = 1 << 14;

/// A sandbox and what it mirrors.
struct Place {
    sandbox: Sandbox,
    frame: Frame,
    mirror: Mirror,
    /// The guest's time-stamp counter is not the host's, so reading it traps.
    offset: bool,
}

/// Direct execution on one processor.
pub struct Direct {
    files: Vec<RawFd>,
    /// By region; the supervisor's has none.
    standings: Vec<Standing>,
    places: Vec<Option<Place>>,
    /// Thread that made the sandboxes: they end with it.
    thread: u32,
    /// When user mode was entered under the translator.
    since: u64,
    /// Until the next entry into user mode the translator has it.
    rest: bool,
    ticks_per_us: u64,
    /// Direct always, for tests.
    eager: bool,
}

/// When direct execution is chosen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Choice {
    /// Where user time is long and entries into the kernel are few.
    Profile,
    /// Wherever it is possible, for tests.
    Always,
}

/// Whether the host can make a sandbox. Tells whether it gives breakpoints for it as well:
/// without them the translator runs all pages that may show the host.
///
/// # Errors
/// What the host lacks.
pub fn probe() -> Result<bool> {
    let (sandbox, handed) = Sandbox::new(&[], false)?;
    let whole = Frame::new(sandbox.shared(), handed.context).is_some();
    if !whole {
        return Err(EngineError::new("sandbox", "the host's signal frames are not as expected"));
    }
    Ok(guard::Guard::default().set(sandbox.pid(), 0x1000, &[0], 0).is_ok())
}

impl Direct {
    /// `files` are those behind the slots of guest memory, in order.
    pub fn new(files: Vec<RawFd>, choice: Choice) -> Self {
        let regions = crate::mmu::USER_REGIONS + 1;
        Self {
            files,
            standings: (0..regions).map(|_| Standing::default()).collect(),
            places: (0..regions).map(|_| None).collect(),
            thread: 0,
            since: 0,
            rest: false,
            ticks_per_us: (clock::tsc_hz() / 1_000_000).max(1),
            eager: choice == Choice::Always,
        }
    }

    fn ns(&self, ticks: u64) -> u64 {
        ticks.saturating_mul(1000) / self.ticks_per_us
    }

    /// How the address space fares that `region` has now.
    fn standing(&mut self, region: usize, cr3: u64) -> &mut Standing {
        let s = &mut self.standings[region];
        if s.cr3 != cr3 {
            *s = Standing::new(cr3);
        }
        s
    }

    /// The region `region` has a page at index `page` that must not be stored to.
    fn protect(&mut self, page: usize) {
        for p in self.places.iter_mut().flatten() {
            p.mirror.protect(page);
        }
    }
}

/// What becomes of a trap.
enum Next {
    /// The processor's state is what it should be: look at it.
    Out,
    /// The instruction at rip is the translator's.
    Step,
    /// So is all of the page that it lies in.
    Page,
}

/// The access that the error code of a page fault tells of.
fn kind_of(error: u64) -> Kind {
    match error {
        e if e & 16 != 0 => Kind::Fetch,
        e if e & 2 != 0 => Kind::Write,
        _ => Kind::Read,
    }
}

impl Vcpu {
    /// Privilege changes: the processor enters `region`, 0 for the supervisor's.
    pub fn note_privilege(&mut self, before: usize, region: usize) {
        let cr3 = self.cpu().cr3 & !0xfff;
        let Some(d) = &mut self.direct else { return };
        if before == 0 && region != 0 {
            d.rest = false;
            d.since = clock::rdtsc();
            if d.eager {
                d.standing(region, cr3).insist();
            }
        } else if before != 0 && region == 0 && d.since != 0 {
            let ticks = clock::rdtsc() - std::mem::take(&mut d.since);
            let ns = d.ns(ticks);
            let eager = d.eager;
            let s = d.standing(before, cr3);
            s.stretch(ns);
            if eager {
                s.insist();
            }
        }
    }

    /// User code goes on in a sandbox, if it can.
    pub fn goes_direct(&self) -> bool {
        self.direct.as_ref().is_some_and(|d| {
            self.region != 0
                && !d.rest
                && d.standings[self.region].is_on()
                && d.standings[self.region].cr3 == self.cpu().cr3 & !0xfff
        })
    }

    /// No store to `page` may go unheard.
    pub fn protect_direct(&mut self, page: usize) {
        if let Some(d) = &mut self.direct {
            d.protect(page);
        }
    }

    /// The processor is in a state that a sandbox can have too.
    fn can_go_direct(&self) -> bool {
        let c = self.cpu();
        self.mode() & !mode::UMIP == mode::BITS64 | mode::USER
            && c.seg[1].selector == CODE
            && c.seg[2].selector == DATA
            && [0, 3].iter().all(|&n| c.seg[n].selector <= 3 || c.seg[n].selector == DATA)
            && [4, 5].iter().all(|&n| c.seg[n].selector == 0)
            && c.eflags & (TF | RF | NT | VM) == 0
            && c.iflag != 0
            && c.shadow == 0
            && c.rip < stub::TOP
            && !self.armed.data
            && self.debugger.until.is_none()
            && !self.debugger.steps()
            && !self.debugger.is_watching()
            && self.debugger.breakpoints.is_empty()
            && self.lines == u64::MAX
            && self.waiting.is_none()
            && self.answers.is_empty()
    }

    /// The translator has user mode until it is entered again.
    fn rest_direct(&mut self) {
        if let Some(d) = &mut self.direct {
            d.rest = true;
        }
    }

    /// The translator has this address space from now on.
    fn refuse_direct(&mut self) {
        let (region, cr3) = (self.region, self.cpu().cr3 & !0xfff);
        if let Some(d) = &mut self.direct {
            d.rest = true;
            d.places[region] = None;
            if !d.eager {
                d.standing(region, cr3).refuse();
            }
        }
    }

    /// Run user code in the sandbox of its region. `Break`: an exit to the owner, if any.
    /// `Continue`: look at the processor's state.
    pub fn run_direct(&mut self) -> ControlFlow<Option<Exit>> {
        let ready = self.can_go_direct();
        let Some(mut d) = self.direct.take() else { return ControlFlow::Continue(()) };
        let me = crate::signals::thread_id();
        if std::mem::replace(&mut d.thread, me) != me {
            d.places.iter_mut().for_each(|p| *p = None);
        }
        let region = self.region;
        d.rest = !ready;
        let mut place = if ready { d.places[region].take() } else { None };
        let offset = self.cpu().tsc_offset != 0;
        if place.as_ref().is_some_and(|p| p.offset != offset) {
            place = None;
        }
        if ready && place.is_none() {
            place = self.new_place(&d.files);
        }
        self.direct = Some(d);
        let Some(mut place) = place else {
            if ready {
                self.refuse_direct();
            }
            return ControlFlow::Continue(());
        };
        let started = clock::rdtsc();
        let next = self.run_place(&mut place);
        let ticks = clock::rdtsc() - started;
        self.times.direct += ticks;
        let cr3 = self.cpu().cr3 & !0xfff;
        if let Some(d) = &mut self.direct {
            if let Some(Next::Page) = next {
                let ns = d.ns(ticks);
                d.standing(region, cr3).visit(ns);
            }
            match next {
                Some(_) => d.places[region] = Some(place),
                None => {
                    // Its registers are lost: the program has destroyed its sandbox.
                    drop(place);
                    self.refuse_direct();
                    self.counters.direct_losses += 1;
                    self.deliver(Exception::gp());
                    return ControlFlow::Continue(());
                }
            }
        }
        match next {
            Some(Next::Step) => {
                self.counters.direct_steps += 1;
                match self.step() {
                    Some(e) => ControlFlow::Break(Some(e)),
                    None => ControlFlow::Continue(()),
                }
            }
            Some(Next::Page) => self.visit_page(),
            _ => ControlFlow::Continue(()),
        }
    }

    /// Perform instructions one by one until they leave the page that rip is in: it may
    /// show the host, so it has no mapping. Code that stays is the translator's.
    fn visit_page(&mut self) -> ControlFlow<Option<Exit>> {
        self.counters.direct_unguarded += 1;
        let page = self.cpu().rip & !0xfff;
        for _ in 0..VISIT {
            self.counters.direct_steps += 1;
            if let Some(e) = self.step() {
                return ControlFlow::Break(Some(e));
            }
            let pending = self.cpu().pending.load(Ordering::Relaxed) != 0;
            if pending || self.look || self.cpu().rip & !0xfff != page || !self.can_go_direct() {
                return ControlFlow::Continue(());
            }
        }
        self.rest_direct();
        ControlFlow::Continue(())
    }

    /// Breakpoints went from one page to another, the last time at `ran`. False: that is
    /// too often.
    fn still_pays(&mut self, ran: &mut u64) -> bool {
        let now = clock::rdtsc();
        let ticks = now - std::mem::replace(ran, now);
        let (region, cr3) = (self.region, self.cpu().cr3 & !0xfff);
        self.direct.as_mut().is_none_or(|d| {
            let (ns, eager) = (d.ns(ticks), d.eager);
            let s = d.standing(region, cr3);
            s.visit(ns);
            eager || s.is_on()
        })
    }

    fn new_place(&mut self, files: &[RawFd]) -> Option<Place> {
        let offset = self.cpu().tsc_offset != 0;
        let (sandbox, handed) = Sandbox::new(files, offset).ok()?;
        let frame = Frame::new(sandbox.shared(), handed.context)?;
        self.counters.direct_sandboxes += 1;
        // What the region dropped before concerns nobody.
        self.regions.all[self.region].stale = Stale::default();
        Some(Place { sandbox, frame, mirror: Mirror::default(), offset })
    }

    /// None: the sandbox is lost.
    fn run_place(&mut self, p: &mut Place) -> Option<Next> {
        self.refresh(&mut p.mirror, &mut p.sandbox);
        self.mirror_faulted(&mut p.mirror, &mut p.sandbox);
        p.frame.store(self);
        let c = self.cpu();
        let mut start = Start {
            context: p.frame.va,
            fs: c.seg_base[4],
            gs: c.seg_base[5],
            selectors: [3, 0, 4, 5].map(|n: usize| c.seg[n].selector),
            flags: p.frame.flags() & !TF,
        };
        let mut ran = clock::rdtsc();
        loop {
            p.mirror.settle(&mut p.sandbox);
            // From here on a kick goes on to the sandbox.
            self.cpu().sandbox.store(p.sandbox.pid() as u32, Ordering::SeqCst);
            if self.cpu().pending.load(Ordering::SeqCst) != 0 {
                self.cpu().sandbox.store(0, Ordering::SeqCst);
                return Some(Next::Out);
            }
            let handed = p.sandbox.run(start);
            self.cpu().sandbox.store(0, Ordering::SeqCst);
            let handed = handed.filter(|h| h.context == p.frame.va)?;
            self.counters.direct_traps += 1;
            let cause = p.frame.cause();
            if handed.signal == libc::SIGSEGV && cause.vector == 14 {
                // The registers are needed only if the guest is to see it.
                match self.fill_direct(p, cause.address, cause.error) {
                    Filled::Retry => {
                        self.counters.direct_fills += 1;
                        let goes_on = !p.mirror.take_evicted() || self.still_pays(&mut ran);
                        if goes_on && self.cpu().pending.load(Ordering::Relaxed) == 0 {
                            (start.fs, start.gs) = (handed.fs, handed.gs);
                            start.selectors = handed.selectors;
                            start.flags = p.frame.flags() & !TF;
                            continue;
                        }
                        self.take_registers(p, handed)?;
                        return Some(Next::Out);
                    }
                    Filled::Slow => {
                        self.take_registers(p, handed)?;
                        let page = p.mirror.take_unguarded();
                        return Some(if page { Next::Page } else { Next::Step });
                    }
                    Filled::Fault(e) => {
                        self.take_registers(p, handed)?;
                        p.mirror.faults(cause.address, kind_of(cause.error));
                        self.deliver(e);
                        return Some(Next::Out);
                    }
                }
            }
            self.take_registers(p, handed)?;
            return Some(match handed.signal {
                STOP => Next::Out,
                libc::SIGSYS => self.direct_call(p, handed),
                libc::SIGTRAP => self.direct_trap(p, p.sandbox.code(handed.info), cause.vector),
                libc::SIGSEGV if cause.vector == OF_.into() => {
                    // INT 4 has been executed; the translator does it again.
                    let c = self.cpu_mut();
                    c.rip = c.rip.wrapping_sub(2);
                    Next::Step
                }
                _ => Next::Step,
            });
        }
    }

    /// Registers out of the sandbox. None: it runs what it cannot.
    fn take_registers(&mut self, p: &mut Place, handed: Handed) -> Option<()> {
        if p.frame.code_segment() != CODE {
            return None;
        }
        p.frame.load(self);
        // What guest code has loaded itself: the guest's descriptors say what that is.
        for (n, selector) in [3, 0, 4, 5].into_iter().zip(handed.selectors) {
            if self.cpu().seg[n].selector != selector {
                self.load_segment(n, selector).ok()?;
            }
        }
        let c = self.cpu_mut();
        (c.seg_base[4], c.seg_base[5]) = (handed.fs, handed.gs);
        Some(())
    }

    /// A trap of debugging, which says `code` of itself.
    fn direct_trap(&mut self, p: &mut Place, code: Option<i32>, vector: u64) -> Next {
        let rip = self.cpu().rip;
        let mut before = |n: u64| self.load(rip.wrapping_sub(n), n as usize, Who::User).ok();
        let length = match (code, vector) {
            // INT3 in one or two bytes has been executed, or INT1, of which some hosts
            // tell before; the translator does it again.
            (Some(SI_KERNEL), 3) if before(1) == Some(0xcc) => 1,
            (Some(SI_KERNEL), 3) => 2,
            (Some(TRAP_BRKPT), 1) if before(1) == Some(0xf1) => 1,
            (Some(TRAP_TRACE), 1) => {
                let e = self.debug_exception(BS);
                self.deliver(e);
                return Next::Out;
            }
            // A breakpoint of `guard.rs`.
            _ => {
                p.mirror.meets(rip);
                0
            }
        };
        self.cpu_mut().rip = rip.wrapping_sub(length);
        Next::Step
    }

    /// A system call of any kind has been executed: SYSCALL itself is performed at once.
    fn direct_call(&mut self, p: &mut Place, handed: Handed) -> Next {
        let rip = self.cpu().rip;
        let at = rip.wrapping_sub(2);
        match self.load(at, 2, Who::User) {
            Ok(0x050f) => {
                let mut i = iced_x86::Instruction::default();
                i.set_code(iced_x86::Code::Syscall);
                i.set_len(2);
                i.set_next_ip(rip);
                self.counters.direct_calls += 1;
                match crate::interp::fast::syscall(self, &i) {
                    Ok(_) => Next::Out,
                    Err(_) => {
                        self.cpu_mut().rip = at;
                        Next::Step
                    }
                }
            }
            Ok(0x80cd) => {
                self.cpu_mut().rip = at;
                Next::Step
            }
            _ => {
                // The vsyscall page: Linux has done the return already.
                let call = p.sandbox.system_call(handed.info);
                let entry = match call {
                    Some(201) => 0x400,
                    Some(309) => 0x800,
                    _ => 0,
                };
                let c = self.cpu_mut();
                c.gpr[4] = c.gpr[4].wrapping_sub(8);
                c.rip = 0xffff_ffff_ff60_0000 + entry;
                Next::Step
            }
        }
    }

    /// A page fault of guest code at `va`: map the page, or say what else.
    fn fill_direct(&mut self, p: &mut Place, va: u64, error: u64) -> Filled {
        let kind = kind_of(error);
        // A trap by TF may come in the middle of an instruction that faults on its way.
        let traced = p.frame.flags() & TF != 0;
        if traced || va >= stub::TOP || (stub::STUB..stub::END).contains(&va) {
            return Filled::Slow;
        }
        if kind == Kind::Write && p.mirror.gives_up(va, p.frame.rip(), &mut p.sandbox) {
            return Filled::Slow;
        }
        self.mirror_page(&mut p.mirror, &mut p.sandbox, va, kind, p.frame.rip())
    }
}
