//! Guest paging and the software TLB.
//!
//! A region is one set of tables behind `gs` (layout in `cpu.rs`): region 0
//! serves supervisor mode, the others user mode, one for each recently used
//! PCID. Beside each region lies its twin with empty tags and an empty jump
//! cache; a signal handler points gs there to make the next memory access or
//! indirect jump leave translated code. The twin shares the region's host
//! addresses, so that a probe which has already compared its tag still loads
//! the right one.
//!
//! Page walks: SDM volume 3, chapter 4. Not modelled: protection keys, LA57.
//! A page that holds translations, or is read-only memory, never gets a store
//! tag: stores to it take the slow path (`slow.rs`).
use crate::cpu::*;
use crate::direct::Stale;
use crate::overflow::Overflow;
use crate::pages::Pages;
use crate::shared::Crew;
use crate::vcpu::Vcpu;
use bunshin_core::memory::Slot;
use bunshin_core::{EngineError, Exit, Result};
use iced_x86::{CodeSize, Instruction, OpKind, Register};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::Arc;

/// A processor exception about to be delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    pub vector: u8,
    pub error: Option<u32>,
    /// New CR2 for a page fault; for #GP, the address that is not canonical.
    pub address: Option<u64>,
}

pub const DE: u8 = 0;
pub const DB: u8 = 1;
pub const BP: u8 = 3;
pub const OF_: u8 = 4;
pub const BR: u8 = 5;
pub const UD: u8 = 6;
pub const DF_: u8 = 8;
pub const TS: u8 = 10;
pub const NP: u8 = 11;
pub const SS: u8 = 12;
pub const GP: u8 = 13;
pub const PF_: u8 = 14;

impl Exception {
    pub fn new(vector: u8) -> Self {
        Self { vector, error: None, address: None }
    }
    pub fn with(vector: u8, error: u32) -> Self {
        Self { vector, error: Some(error), address: None }
    }
    pub fn gp() -> Self {
        Self::with(GP, 0)
    }
    pub fn ud() -> Self {
        Self::new(UD)
    }
    pub fn not_canonical(va: u64) -> Self {
        Self { vector: GP, error: Some(0), address: Some(va) }
    }

    /// #SS instead of #GP where the memory operand of `i` lies on the stack. In
    /// 64-bit code its base tells, since prefixes other than FS and GS mean nothing.
    pub fn settle(mut self, i: &Instruction) -> Self {
        if self.vector == GP && self.address.take().is_some() {
            let explicit = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
            let stack = if i.code_size() == CodeSize::Code64 {
                matches!(i.memory_base(), Register::RSP | Register::RBP | Register::ESP | Register::EBP)
                    && !matches!(i.segment_prefix(), Register::FS | Register::GS)
            } else {
                i.memory_segment() == Register::SS
            };
            if explicit && stack {
                self.vector = SS;
            }
        }
        self
    }

    /// #SS instead of #GP: the access was the stack's own.
    pub fn on_stack(self) -> Self {
        match self {
            Self { vector: GP, address: Some(_), .. } => Self::with(SS, 0),
            e => e,
        }
    }
}

/// Why an instruction did not complete.
#[derive(Clone, Debug)]
pub enum Trap {
    Fault(Exception),
    /// A device was touched in a place that cannot leave to its owner: run the
    /// instruction again from the dispatcher.
    Device,
    /// The owner must answer first; the instruction runs again afterwards.
    Exit(Exit),
}

impl Trap {
    /// `Exception::on_stack` of the fault, if it is one.
    pub fn on_stack(self) -> Self {
        match self {
            Trap::Fault(e) => Trap::Fault(e.on_stack()),
            t => t,
        }
    }
}

impl From<Exception> for Trap {
    fn from(e: Exception) -> Self {
        Trap::Fault(e)
    }
}

pub fn gp() -> Trap {
    Trap::Fault(Exception::gp())
}
pub fn ud() -> Trap {
    Trap::Fault(Exception::ud())
}

/// What a page walk found.
#[derive(Clone, Copy, Debug)]
pub struct Mapping {
    pub gpa: u64,
    /// A store may be entered in the table (writable and dirty already set).
    pub store: bool,
    pub user: bool,
    pub global: bool,
    /// log2 of the page size: 12, 21, 22, 30.
    pub bits: u8,
}

/// What became of a miss.
#[derive(Clone, Copy, Debug)]
pub enum Filled {
    /// The access will hit now.
    Retry,
    /// It must take the slow path.
    Slow,
    /// It faults.
    Fault(Exception),
}

/// Bits of the info word of a miss, above the size: a store.
pub const INFO_WRITE: u32 = 0x1000;
/// A page fault of this access needs no further thought: no mask suppresses it,
/// no alignment fault comes before it.
pub const INFO_PLAIN: u32 = 0x2000;
/// The check is shared between several accesses.
pub const INFO_GROUP: u32 = 0x4000;

/// Who asks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Who {
    User,
    Supervisor,
    /// Implicit supervisor access to descriptor tables and TSS.
    System,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    Read,
    Write,
    Fetch,
}

/// Guest RAM as the processor sees it.
pub struct Phys {
    pub slots: Vec<PhysSlot>,
    /// What all processors hold of each page of every slot.
    pub pages: Arc<Pages>,
    /// For each page: which table of this processor holds a store tag for it. 0
    /// none, else 1 + (region << 16 | index), or `MANY`.
    pub hints: Vec<u32>,
}

pub struct PhysSlot {
    pub gpa: u64,
    pub end: u64,
    pub host: u64,
    pub readonly: bool,
    /// Index of its first page in `Phys::pages`.
    pub first: usize,
    _keep: Slot,
}

const MANY: u32 = u32::MAX;

impl Phys {
    pub fn new(slots: Vec<Slot>, crew: &Crew) -> Self {
        let mut first = 0;
        let slots: Vec<_> = slots
            .into_iter()
            .map(|s| {
                let p = PhysSlot {
                    gpa: s.gpa,
                    end: s.gpa + s.length,
                    host: s.host as u64,
                    readonly: s.readonly,
                    first,
                    _keep: s,
                };
                first += ((p.end - p.gpa) >> 12) as usize;
                p
            })
            .collect();
        // Both come as untouched zero pages, however much memory the guest has.
        Self { slots, pages: crew.pages(first), hints: vec![0; first] }
    }

    #[inline]
    pub fn slot(&self, gpa: u64) -> Option<&PhysSlot> {
        self.slots.iter().find(|s| gpa >= s.gpa && gpa < s.end)
    }

    /// Host address of a gpa.
    #[inline]
    pub fn host(&self, gpa: u64) -> Option<u64> {
        self.slot(gpa).map(|s| s.host + (gpa - s.gpa))
    }

    #[inline]
    pub fn page(&self, gpa: u64) -> Option<usize> {
        self.slot(gpa).map(|s| s.first + ((gpa - s.gpa) >> 12) as usize)
    }

    /// Index of the slot that has a page, and the page's offset in the file behind it.
    pub fn file_of(&self, page: usize) -> Option<(usize, u64)> {
        let pages = |s: &PhysSlot| ((s.end - s.gpa) >> 12) as usize;
        let n = self.slots.iter().position(|s| page >= s.first && page - s.first < pages(s))?;
        let s = &self.slots[n];
        let base = s._keep.region().host() as u64;
        Some((n, s.host - base + ((page - s.first) as u64) * 4096))
    }

    /// The guest can store there.
    pub fn writable(&self, gpa: u64) -> bool {
        self.slot(gpa).is_some_and(|s| !s.readonly)
    }

    /// Host address of the first byte of a page, by its index; 0 if there is none.
    pub fn host_of(&self, page: usize) -> u64 {
        let pages = |s: &PhysSlot| ((s.end - s.gpa) >> 12) as usize;
        let slot = self.slots.iter().find(|s| page >= s.first && page - s.first < pages(s));
        slot.map_or(0, |s| s.host + ((page - s.first) as u64) * 4096)
    }
}

pub struct Region {
    /// Value for gs; the twin lies `REGION` above.
    pub base: u64,
    /// Indices whose tags may be set.
    used: Vec<u16>,
    /// The subset that a CR3 write drops.
    nonglobal: Vec<u16>,
    /// Entries of user pages (region 0 only).
    kuser: Vec<u16>,
    jc_used: Vec<u16>,
    overflow: Overflow,
    /// Pages (low 16 bits of the page number) that jump cache entries lie in.
    exec: Box<[u64; 1024]>,
    /// 2 MiB ranges with entries that came from larger pages.
    large: Box<[u64; 8]>,
    huge: bool,
    /// Mode bits and base of CS for which the jump cache is valid.
    pub mode: u32,
    pub cs_base: u64,
    /// Limit of CS, where `mode` says that there is one.
    pub cs_limit: u32,
    /// PCID that owns a user region.
    pub owner: Option<u16>,
    pub last_use: u64,
    /// Slots that hot code was given so far, of all regions alike.
    pub slots: usize,
    /// The page of a device that was touched last.
    device: Option<DevicePage>,
    /// What was dropped since its sandbox last ran.
    pub stale: Stale,
}

/// A translation that the tables cannot hold, since there is no RAM behind it. Drivers
/// stay with one page for long. It goes whenever any entry of its region does.
#[derive(Clone, Copy)]
struct DevicePage {
    va: u64,
    gpa: u64,
    store: bool,
}

/// Entries of a journal; more than a table has, so re-entered ones fit too.
const JOURNAL: usize = 1 << 17;

/// Zero without the C library (see `stubs.rs` on AVX).
fn zero(words: &mut [u64]) {
    for w in words {
        // SAFETY: volatile keeps the loop from becoming a memset call.
        unsafe { std::ptr::write_volatile(w, 0) };
    }
}

/// Number of user regions.
pub const USER_REGIONS: usize = 8;

fn empty_tag(index: u16) -> u64 {
    // Zero would match page 0 itself, and for operands that wrap around, the last.
    if index == 0 || index == u16::MAX {
        1 << 27
    } else {
        0
    }
}

impl Region {
    fn tag(&self, table: u32, index: u16) -> *mut u64 {
        (self.base + u64::from(table) + 8 * u64::from(index)) as *mut u64
    }

    fn get(&self, table: u32, index: u16) -> u64 {
        // SAFETY: every table has 64 Ki entries inside the region's mapping.
        unsafe { *self.tag(table, index) }
    }

    fn set(&self, table: u32, index: u16, v: u64) {
        // SAFETY: as in `get`.
        unsafe { *self.tag(table, index) = v }
    }

    fn clear_entry(&self, index: u16) {
        self.set(TAG_R, index, empty_tag(index));
        self.set(TAG_W, index, empty_tag(index));
    }

    /// Host address for `va` if the table has it.
    #[inline]
    pub fn probe(&self, va: u64, size: u64, write: bool) -> Option<u64> {
        let index = (va >> 12) as u16;
        let off = va.wrapping_add(self.get(if write { TAG_W } else { TAG_R }, index));
        (off <= 4096 - size).then(|| self.get(HOST, index) + off)
    }

    /// Forget what the slots hold, or only what lies between `from` and `to`.
    fn flush_slots(&mut self, from: u64, to: u64) {
        self.device = None;
        // SAFETY: inside the region's mapping; translated code does not run meanwhile.
        let tags = unsafe {
            std::slice::from_raw_parts_mut((self.base + u64::from(SLOT_T)) as *mut u64, self.slots)
        };
        for t in tags {
            let page = t.wrapping_neg();
            *t = if page >= from && page <= to { NO_PAGE } else { *t };
        }
        if (from, to) != (0, u64::MAX) {
            self.flush_bounds();
        }
    }

    /// Forget how far loops may go: the pages behind their bounds are not known.
    fn flush_bounds(&mut self) {
        for n in 0..self.slots as u64 {
            // SAFETY: as in `flush_slots`.
            unsafe {
                if *((self.base + u64::from(SLOT_D) + 8 * n) as *const u64) == IS_BOUND {
                    *((self.base + u64::from(SLOT_T) + 8 * n) as *mut u64) = NO_PAGE;
                }
            }
        }
    }

    /// The gpa behind `va`, if the last device lies there.
    fn device_page(&self, va: u64, write: bool) -> Option<u64> {
        let page = self.device.filter(|d| d.va == va & !0xfff && (d.store || !write))?;
        Some(page.gpa | (va & 0xfff))
    }

    /// A signal pointed gs to the twin: a slot filled just then has its tag there.
    pub fn settle_slots(&mut self) {
        self.flush_slots(0, u64::MAX);
        for n in 0..self.slots as u64 {
            // SAFETY: as in `flush_slots`.
            unsafe { *((self.base + REGION as u64 + u64::from(SLOT_T) + 8 * n) as *mut u64) = NO_PAGE };
        }
    }

    /// No slot may let stores through to the page at `host`.
    fn protect_slots(&mut self, host: u64) {
        for n in 0..self.slots as u64 {
            // SAFETY: as in `flush_slots`.
            unsafe {
                let tag = (self.base + u64::from(SLOT_T) + 8 * n) as *mut u64;
                let way = *((self.base + u64::from(SLOT_D) + 8 * n) as *const u64);
                if *tag != NO_PAGE && (way.wrapping_sub(*tag) == host || way == IS_BOUND) {
                    *tag = NO_PAGE;
                }
            }
        }
    }

    pub fn flush(&mut self) {
        self.stale.all();
        for k in 0..self.used.len() {
            self.clear_entry(self.used[k]);
        }
        self.flush_slots(0, u64::MAX);
        self.used.clear();
        self.nonglobal.clear();
        self.kuser.clear();
        zero(&mut self.large[..]);
        self.huge = false;
    }

    pub fn flush_nonglobal(&mut self) {
        for k in 0..self.nonglobal.len() {
            self.clear_entry(self.nonglobal[k]);
        }
        self.nonglobal.clear();
        self.kuser.clear();
        self.flush_slots(0, u64::MAX);
    }

    pub fn flush_kuser(&mut self) {
        for k in 0..self.kuser.len() {
            self.clear_entry(self.kuser[k]);
        }
        self.kuser.clear();
        self.flush_slots(0, u64::MAX);
    }

    pub fn flush_jc(&mut self, miss: u64) {
        if self.jc_used.is_empty() {
            return;
        }
        for k in 0..self.jc_used.len() {
            self.set(JC, self.jc_used[k], miss);
        }
        self.jc_used.clear();
        self.overflow.clear();
        zero(&mut self.exec[..]);
    }

    /// Indirect jumps to `va` go to `checked`, which looks at the address, or to `body`.
    pub fn jc_set(&mut self, va: u64, (checked, body): (u64, u64), miss: u64) {
        if self.jc_used.len() == JOURNAL {
            self.flush_jc(miss);
        }
        let index = va as u16;
        if self.get(JC, index) == miss {
            self.jc_used.push(index);
        }
        self.set(JC, index, checked);
        self.overflow.insert(va, body);
        self.runs_in(va);
    }

    /// A jump cache entry depends on the page at `va`.
    pub fn runs_in(&mut self, va: u64) {
        let page = (va >> 12) as u16 as usize;
        self.exec[page >> 6] |= 1 << (page & 63);
    }

    /// Drop the jump cache's entries for `va`, the first if it leads to `code`.
    pub fn jc_drop(&mut self, va: u64, code: u64, miss: u64) {
        if self.get(JC, va as u16) == code {
            self.set(JC, va as u16, miss);
        }
        self.overflow.remove(va);
    }

    /// INVLPG; true when jump cache entries lay in the page.
    pub fn invalidate(&mut self, va: u64) -> bool {
        let big = (va >> 21) as usize & 511;
        // A sandbox may have mapped a large page where the table has nothing of it.
        self.stale.page(va);
        if self.huge {
            self.flush();
        } else if self.large[big >> 6] & (1 << (big & 63)) != 0 {
            self.stale.all();
            let from = (va >> 12) as u16 & !511;
            for i in from..=from + 511 {
                self.clear_entry(i);
            }
            self.flush_slots(0, u64::MAX);
        } else {
            self.clear_entry((va >> 12) as u16);
            self.flush_slots(va & !0xfff, va & !0xfff);
        }
        let page = (va >> 12) as u16 as usize;
        if self.huge || self.large[big >> 6] & (1 << (big & 63)) != 0 {
            return self.exec[(page & !511) >> 6..][..8].iter().any(|&w| w != 0);
        }
        self.exec[page >> 6] & (1 << (page & 63)) != 0
    }
}

/// All regions of one processor; owns the address space they lie in.
pub struct Regions {
    pub all: Vec<Region>,
    pub cpu: *mut Cpu,
    /// Slots that were used before.
    free: Vec<u32>,
    area: *mut u8,
    length: usize,
}

// SAFETY: owned memory; used by the vCPU's thread.
unsafe impl Send for Regions {}

fn memfd(length: usize) -> Result<i32> {
    // SAFETY: creates a new file.
    let fd = unsafe { libc::memfd_create(c"bunshin-cpu".as_ptr(), libc::MFD_CLOEXEC) };
    // SAFETY: fd was just made.
    if fd < 0 || unsafe { libc::ftruncate(fd, length as libc::off_t) } != 0 {
        return Err(EngineError::last_os("host-memory", "the processor's tables"));
    }
    Ok(fd)
}

impl Regions {
    pub fn new() -> Result<Self> {
        let count = 1 + USER_REGIONS;
        let length = count * 2 * REGION;
        let ways = 8 * SLOTS;
        // SAFETY: fresh mappings; MAP_FIXED only inside the area reserved first.
        unsafe {
            let area = libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            );
            if area == libc::MAP_FAILED {
                return Err(EngineError::last_os("host-memory", "the processor's tables"));
            }
            let area: *mut u8 = area.cast();
            let table = (HOST - TAG_W) as usize;
            let place = |off: usize, len: usize, fd: i32, from: usize| {
                let p = libc::mmap(
                    area.add(off).cast(),
                    len,
                    libc::PROT_READ | libc::PROT_WRITE,
                    libc::MAP_SHARED | libc::MAP_FIXED,
                    fd,
                    from as libc::off_t,
                );
                if p == libc::MAP_FAILED {
                    Err(EngineError::last_os("host-memory", "the processor's tables"))
                } else {
                    Ok(())
                }
            };
            let (cpu_fd, jc_fd, host_fd) = (memfd(CPU_BYTES)?, memfd(table)?, memfd(table * count)?);
            let way_fd = memfd(ways * count)?;
            let mut all = Vec::new();
            let mut done = Ok(());
            for i in 0..count {
                let off = i * 2 * REGION;
                for twin in [0, REGION] {
                    done = done
                        .and_then(|()| place(off + twin, CPU_BYTES, cpu_fd, 0))
                        .and_then(|()| place(off + twin + HOST as usize, table, host_fd, i * table))
                        .and_then(|()| place(off + twin + SLOT_D as usize, ways, way_fd, i * ways));
                }
                done = done.and_then(|()| place(off + REGION + JC as usize, table, jc_fd, 0));
                all.push(Region {
                    base: area as u64 + off as u64,
                    used: Vec::with_capacity(JOURNAL),
                    nonglobal: Vec::with_capacity(JOURNAL),
                    kuser: Vec::with_capacity(JOURNAL),
                    jc_used: Vec::with_capacity(JOURNAL),
                    overflow: Overflow::new(area as u64 + off as u64, (area as usize + off + REGION) as u64),
                    exec: Box::new([0; 1024]),
                    large: Box::new([0; 8]),
                    huge: false,
                    mode: u32::MAX,
                    cs_base: 0,
                    cs_limit: u32::MAX,
                    owner: None,
                    last_use: 0,
                    slots: 0,
                    device: None,
                    stale: Stale::default(),
                });
            }
            for fd in [cpu_fd, jc_fd, host_fd, way_fd] {
                libc::close(fd);
            }
            let s = Self { all, cpu: area.cast(), free: Vec::with_capacity(SLOTS), area, length };
            done?;
            for r in &s.all {
                for b in [r.base, r.base + REGION as u64] {
                    for n in 0..SLOTS as u64 {
                        *((b + u64::from(SLOT_T) + 8 * n) as *mut u64) = NO_PAGE;
                    }
                    for t in [TAG_R, TAG_W] {
                        for i in [0, u16::MAX] {
                            *((b + u64::from(t) + 8 * u64::from(i)) as *mut u64) = empty_tag(i);
                        }
                    }
                }
            }
            Ok(s)
        }
    }

    pub fn cpu_mut(&mut self) -> &mut Cpu {
        // SAFETY: the processor page is part of region 0.
        unsafe { &mut *self.cpu }
    }

    /// Fill every jump cache with the stub for misses.
    pub fn set_miss(&mut self, miss: u64) {
        for (i, r) in self.all.iter().enumerate() {
            for twin in 0..=u64::from(i == 0) {
                for n in 0..=u16::MAX {
                    // SAFETY: inside the region's tables.
                    unsafe {
                        *((r.base + twin * REGION as u64 + u64::from(JC) + 8 * u64::from(n)) as *mut u64) =
                            miss;
                    }
                }
            }
        }
    }
}

impl Regions {
    /// The code that used these slots is gone.
    pub fn give_back(&mut self, slots: impl Iterator<Item = u32>) {
        for n in slots {
            if self.free.len() < SLOTS {
                self.free.push(n);
            }
        }
    }

    /// No code uses a slot any more.
    pub fn free_slots(&mut self) {
        for r in &mut self.all {
            r.flush_slots(0, u64::MAX);
            r.slots = 0;
        }
        self.free.clear();
    }

    /// A slot that nobody uses, in every region of user mode.
    pub fn take_slot(&mut self) -> Option<u32> {
        if let Some(n) = self.free.pop() {
            for r in &mut self.all[1..] {
                r.set(SLOT_T, n as u16, NO_PAGE);
            }
            return Some(n);
        }
        let n = self.all[1].slots;
        if n == SLOTS {
            return None;
        }
        for r in &mut self.all[1..] {
            r.slots = n + 1;
        }
        Some(n as u32)
    }

    /// A slot whose tag is a bound.
    pub fn take_bound(&mut self) -> Option<u32> {
        let n = self.take_slot()?;
        for r in &mut self.all[1..] {
            r.set(SLOT_D, n as u16, IS_BOUND);
        }
        Some(n)
    }
}

impl Drop for Regions {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`.
        unsafe { libc::munmap(self.area.cast(), self.length) };
    }
}

pub const P: u64 = 1;
pub const W: u64 = 2;
pub const U: u64 = 4;
pub const A: u64 = 0x20;
pub const D: u64 = 0x40;
pub const PS: u64 = 0x80;
const G: u64 = 0x100;
pub const NX: u64 = 1 << 63;

pub const CR0_WP: u64 = 1 << 16;
pub const CR0_PG: u64 = 1 << 31;
pub const CR4_PSE: u64 = 1 << 4;
pub const CR4_PAE: u64 = 1 << 5;
pub const CR4_PGE: u64 = 1 << 7;
pub const CR4_PCIDE: u64 = 1 << 17;
pub const CR4_SMEP: u64 = 1 << 20;
pub const CR4_SMAP: u64 = 1 << 21;
pub const EFER_NXE: u64 = 1 << 11;
pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Addresses that fit the width in CPUID leaf 8000_0008.
pub const PHYSICAL: u64 = (1 << crate::cpuid::PHYSICAL_BITS) - 0x1000;

/// Reserved bits of an entry for a large page of `1 << bits` bytes: its address is
/// aligned. Of 4 MiB ones, bits 13 to 20 hold bits 32 to 39 of the address.
fn unaligned(bits: u32, wide: bool) -> u64 {
    if wide {
        (1 << bits) - (1 << 13)
    } else {
        1 << 21
    }
}

pub fn canonical(va: u64) -> bool {
    ((va as i64) << 16 >> 16) as u64 == va
}

impl Vcpu {
    fn who(&self) -> Who {
        if self.cpu().cpl == 3 {
            Who::User
        } else {
            Who::Supervisor
        }
    }

    fn fault(&self, va: u64, who: Who, kind: Kind, present: bool, reserved: bool) -> Exception {
        let c = self.cpu();
        let nx = c.efer & EFER_NXE != 0 && c.cr4 & CR4_PAE != 0 || c.cr4 & CR4_SMEP != 0;
        let code = u32::from(present)
            | if kind == Kind::Write { 2 } else { 0 }
            | if who == Who::User { 4 } else { 0 }
            | if reserved { 8 } else { 0 }
            | if kind == Kind::Fetch && nx { 16 } else { 0 };
        Exception { vector: PF_, error: Some(code), address: Some(va) }
    }

    /// Walk the guest's page tables, setting accessed and dirty bits.
    pub fn walk(&mut self, va: u64, who: Who, kind: Kind) -> std::result::Result<Mapping, Exception> {
        loop {
            if let Some(m) = self.walk_once(va, who, kind)? {
                return Ok(m);
            }
        }
    }

    /// None: an entry changed under our hands, walk again.
    fn walk_once(
        &mut self,
        va: u64,
        who: Who,
        kind: Kind,
    ) -> std::result::Result<Option<Mapping>, Exception> {
        let c = self.cpu();
        let (cr0, cr3, cr4, efer) = (c.cr0, c.cr3, c.cr4, c.efer);
        if cr0 & CR0_PG == 0 {
            let gpa = va & 0xffff_ffff & !0xfff & self.lines;
            return Ok(Some(Mapping { gpa, store: true, user: true, global: false, bits: 12 }));
        }
        self.counters.walks += 1;
        let long = efer & 0x400 != 0;
        if long && !canonical(va) {
            return Err(Exception::not_canonical(va));
        }
        let nxe = efer & EFER_NXE != 0;
        let wide = cr4 & CR4_PAE != 0;
        let none = self.fault(va, who, kind, false, false);
        let (mut table, mut level, shift) = if long {
            (cr3 & ADDRESS, 4u32, 9)
        } else if wide {
            let e = self.pdptes[(va >> 30) as usize & 3];
            if e & P == 0 {
                return Err(none);
            }
            (e & ADDRESS, 2, 9)
        } else {
            (cr3 & 0xffff_f000, 2, 10)
        };
        // Above the physical address; without long mode the ignored bits too.
        let reserved = if long { ADDRESS & !PHYSICAL } else { !(NX | PHYSICAL | 0xfff) };
        let (mut rights, mut nx) = (U | W, false);
        let mut seen: [(u64, u64); 4] = [(0, 0); 4];
        let mut depth = 0;
        loop {
            let entry_bits = if wide || long { 3 } else { 2 };
            let at = 12 + shift * (level - 1);
            let index = (va >> at) & ((1 << shift) - 1);
            let address = table + (index << entry_bits);
            let Some(e) = self.read_entry(address, entry_bits == 3) else { return Err(none) };
            if e & P == 0 {
                return Err(none);
            }
            if entry_bits == 3 && (e & reserved != 0 || e & NX != 0 && !nxe) {
                return Err(self.fault(va, who, kind, true, true));
            }
            rights &= e;
            nx |= e & NX != 0;
            seen[depth] = (address, e);
            depth += 1;
            let leaf = level == 1
                || (e & PS != 0 && (level == 2 || level == 3) && (wide || long || cr4 & CR4_PSE != 0));
            if leaf && level > 1 && e & unaligned(at, entry_bits == 3) != 0 {
                return Err(self.fault(va, who, kind, true, true));
            }
            if !leaf {
                if e & PS != 0 && level == 4 {
                    return Err(self.fault(va, who, kind, true, true));
                }
                table = if entry_bits == 3 { e & ADDRESS } else { e & 0xffff_f000 };
                level -= 1;
                continue;
            }
            let bits = at as u8;
            // Between the PAT bit and the address of a large page.
            if entry_bits == 3 && level > 1 && e & ((1 << bits) - 1) & !0x1fff != 0 {
                return Err(self.fault(va, who, kind, true, true));
            }
            let user = rights & U != 0;
            let writable = rights & W != 0;
            let denied = match who {
                Who::User => !user,
                Who::Supervisor if user => match kind {
                    Kind::Fetch => cr4 & CR4_SMEP != 0,
                    _ => cr4 & CR4_SMAP != 0 && self.cpu().ac == 0,
                },
                Who::System => user && cr4 & CR4_SMAP != 0 && kind != Kind::Fetch,
                _ => false,
            } || kind == Kind::Write && !writable && (who == Who::User || cr0 & CR0_WP != 0)
                || kind == Kind::Fetch && nx;
            if denied {
                return Err(self.fault(va, who, kind, true, false));
            }
            let may_store = writable || (who != Who::User && cr0 & CR0_WP == 0);
            for (i, &(address, e)) in seen[..depth].iter().enumerate() {
                let want = e | A | if i + 1 == depth && kind == Kind::Write { D } else { 0 };
                if want != e && !self.replace_entry(address, entry_bits == 3, e, want) {
                    return Ok(None);
                }
            }
            let dirty = e & D != 0 || kind == Kind::Write;
            let base = if bits == 22 {
                (e & 0xffc0_0000) | ((e >> 13) & 0xff) << 32
            } else {
                e & ADDRESS & !((1u64 << bits) - 1)
            };
            return Ok(Some(Mapping {
                gpa: (base | (va & ((1u64 << bits) - 1) & !0xfff)) & self.lines,
                store: may_store && dirty,
                user,
                global: e & G != 0 && cr4 & CR4_PGE != 0,
                bits,
            }));
        }
    }

    /// Load the four entries that PAE paging without long mode keeps in the processor.
    /// Fails, without a change, where one has reserved bits set.
    pub fn load_pdptes(&mut self) -> std::result::Result<(), Exception> {
        let c = self.cpu();
        if c.cr0 & CR0_PG == 0 || c.cr4 & CR4_PAE == 0 || c.efer & 0x400 != 0 {
            return Ok(());
        }
        let root = c.cr3 & 0xffff_ffe0;
        let mut new = [0; 4];
        for (n, e) in new.iter_mut().enumerate() {
            *e = self.read_entry(root + 8 * n as u64, true).unwrap_or(0);
            if *e & P != 0 && *e & !(P | 8 | 0x10 | 0xe00 | PHYSICAL) != 0 {
                return Err(Exception::gp());
            }
        }
        self.pdptes = new;
        Ok(())
    }

    pub fn read_entry(&self, gpa: u64, wide: bool) -> Option<u64> {
        let host = self.phys.host(gpa & self.lines)?;
        // SAFETY: entries are aligned and inside guest RAM.
        Some(unsafe {
            if wide {
                (*(host as *const AtomicU64)).load(Ordering::Relaxed)
            } else {
                u64::from((*(host as *const AtomicU32)).load(Ordering::Relaxed))
            }
        })
    }

    /// Set bits of an entry if it is still `old`: false when another processor or
    /// the guest has changed it. An entry outside RAM stays as it is.
    fn replace_entry(&self, gpa: u64, wide: bool, old: u64, new: u64) -> bool {
        let Some(host) = self.phys.host(gpa & self.lines) else { return true };
        let relaxed = Ordering::Relaxed;
        // SAFETY: as in `read_entry`.
        unsafe {
            if wide {
                (*(host as *const AtomicU64)).compare_exchange(old, new, relaxed, relaxed).is_ok()
            } else {
                let entry = &*(host as *const AtomicU32);
                entry.compare_exchange(old as u32, new as u32, relaxed, relaxed).is_ok()
            }
        }
    }

    /// A store to `page` by this processor needs no more than to be done, up to the
    /// next safe point: nobody has translations of the page.
    pub fn stores_freely(&self, page: usize) -> bool {
        let pages = &self.phys.pages;
        // Code is no place for many stores: no announcement of one that is not done.
        pages.code(page) == 0 && pages.announce_store(page, self.me()) == 0
    }

    /// Enter a mapping in the current region. False: not RAM, or a store that
    /// must take the slow path.
    fn enter_tlb(&mut self, va: u64, m: &Mapping, write: bool) -> bool {
        let Some(s) = self.phys.slot(m.gpa) else { return false };
        let host = s.host + (m.gpa - s.gpa);
        let page = s.first + ((m.gpa - s.gpa) >> 12) as usize;
        let readonly = s.readonly;
        let store = m.store && !readonly && self.stores_freely(page) && !self.watched(va, Kind::Write);
        if write && !store || self.watched(va, Kind::Read) {
            return false;
        }
        let index = (va >> 12) as u16;
        let region = self.region;
        let r = &mut self.regions.all[region];
        let tag = (va & !0xfff).wrapping_neg();
        let empty = empty_tag(index);
        // Journals never grow: growing could call the C library's memcpy.
        if r.used.len().max(r.nonglobal.len()).max(r.kuser.len()) == JOURNAL {
            r.flush();
            self.regions.cpu_mut().kuser = 0;
        }
        let r = &mut self.regions.all[region];
        if r.get(TAG_R, index) == empty && r.get(TAG_W, index) == empty {
            r.used.push(index);
        }
        r.set(TAG_R, index, tag);
        r.set(TAG_W, index, if store { tag } else { empty });
        r.set(HOST, index, host);
        if !m.global {
            r.nonglobal.push(index);
        }
        if m.bits > 12 {
            if m.bits > 22 {
                r.huge = true;
            } else {
                // A 4 MiB page covers two ranges; mark both.
                let big = (va >> 21) as usize & 511;
                for b in [big, if m.bits == 22 { big ^ 1 } else { big }] {
                    r.large[b >> 6] |= 1 << (b & 63);
                }
            }
        }
        if region == 0 && m.user {
            r.kuser.push(index);
            self.regions.cpu_mut().kuser += 1;
        }
        if store {
            let hint = &mut self.phys.hints[page];
            let mine = 1 + ((region as u32) << 16 | u32::from(index));
            *hint = if *hint == 0 || *hint == mine { mine } else { MANY };
        }
        true
    }

    /// Translated code missed the table at `va`.
    pub fn fill(&mut self, va: u64, info: u32) -> Filled {
        if self.cpu().pending.load(Ordering::Relaxed) != 0 {
            return Filled::Slow;
        }
        let size = u64::from(info & 0xfff);
        let write = info & INFO_WRITE != 0;
        let astray = va >> 32 != 0 && !self.cpu().code64();
        if (va & 0xfff) + size > 4096 || astray {
            return Filled::Slow;
        }
        if self.regions.all[self.region].device_page(va, write).is_some() {
            return Filled::Slow;
        }
        let kind = if write { Kind::Write } else { Kind::Read };
        let who = self.who();
        match self.walk(va, who, kind) {
            Ok(m) if self.enter_tlb(va, &m, write) => Filled::Retry,
            Err(e) if e.vector == PF_ && info & INFO_PLAIN != 0 => Filled::Fault(e),
            _ => Filled::Slow,
        }
    }

    /// Host address for `size` bytes at `va` that do not cross a page; None if
    /// that is not RAM (or is a store that others must hear of), with its gpa.
    pub fn access(
        &mut self,
        va: u64,
        size: u64,
        kind: Kind,
        who: Who,
    ) -> std::result::Result<(Option<u64>, u64), Exception> {
        let own = who == self.who();
        if own && kind != Kind::Fetch {
            if self.watching() {
                self.note_access(va, size, kind);
            }
            if let Some(h) = self.regions.all[self.region].probe(va, size, kind == Kind::Write) {
                return Ok((Some(h), 0));
            }
            if let Some(gpa) = self.regions.all[self.region].device_page(va, kind == Kind::Write) {
                return Ok((None, gpa));
            }
        }
        let m = self.walk(va, who, kind)?;
        let gpa = m.gpa | (va & 0xfff);
        if kind == Kind::Fetch {
            self.counters.tlb_fetch += 1;
        } else if own {
            self.counters.tlb_helper += 1;
            self.enter_tlb(va, &m, kind == Kind::Write);
            // What supervisor code sees of user pages depends on AC besides.
            if self.phys.slot(gpa).is_none() && !(self.region == 0 && m.user) {
                self.regions.all[self.region].device =
                    Some(DevicePage { va: va & !0xfff, gpa: m.gpa, store: m.store });
            }
        }
        let host = match self.phys.slot(gpa) {
            Some(s) if kind != Kind::Write => Some(s.host + (gpa - s.gpa)),
            Some(s) if !s.readonly && self.stores_freely(s.first + ((gpa - s.gpa) >> 12) as usize) => {
                Some(s.host + (gpa - s.gpa))
            }
            _ => None,
        };
        Ok((host, gpa))
    }

    /// No table of this processor may let stores to `page` through.
    pub fn drop_store_tags(&mut self, page: usize) {
        let hint = std::mem::take(&mut self.phys.hints[page]);
        let host = self.phys.host_of(page);
        self.protect_direct(page);
        if hint != 0 {
            for r in &mut self.regions.all {
                r.protect_slots(host);
            }
        }
        if hint == MANY {
            for r in &mut self.regions.all {
                for &i in &r.used {
                    if r.get(HOST, i) == host {
                        r.set(TAG_W, i, empty_tag(i));
                    }
                }
            }
        } else if hint != 0 {
            let (region, index) = (((hint - 1) >> 16) as usize, (hint - 1) as u16);
            let r = &self.regions.all[region];
            if r.get(HOST, index) == host {
                r.set(TAG_W, index, empty_tag(index));
            }
        }
    }

    /// Forget all entries, global ones too, of every region.
    pub fn flush_tlb_all(&mut self) {
        let miss = self.stubs.lookup;
        for r in &mut self.regions.all {
            r.flush();
            r.flush_jc(miss);
        }
        self.code_moved();
        self.cpu_mut().kuser = 0;
        self.counters.tlb_flushes += 1;
    }

    /// INVLPG in the current address space.
    pub fn invlpg(&mut self, va: u64) {
        if self.plant == Some(crate::count::Plant::StaleTlb) {
            return;
        }
        let miss = self.stubs.lookup;
        let user = self.user_region;
        if self.regions.all[user].invalidate(va) {
            self.regions.all[user].flush_jc(miss);
        }
        if self.regions.all[0].invalidate(va) {
            self.code_moved();
        }
        self.counters.invlpg += 1;
    }

    /// INVPCID for one address.
    pub fn invlpg_pcid(&mut self, va: u64, pcid: u16) {
        let miss = self.stubs.lookup;
        if self.pcid() == pcid {
            return self.invlpg(va);
        }
        if let Some(r) = self.regions.all.iter_mut().find(|r| r.owner == Some(pcid)) {
            if r.invalidate(va) {
                r.flush_jc(miss);
            }
        }
    }

    fn pcid(&self) -> u16 {
        if self.cpu().cr4 & CR4_PCIDE != 0 {
            (self.cpu().cr3 & 0xfff) as u16
        } else {
            0
        }
    }

    /// Drop the entries of one PCID.
    pub fn flush_pcid(&mut self, pcid: u16) {
        let miss = self.stubs.lookup;
        let current = self.pcid() == pcid;
        if let Some(i) = self.regions.all.iter().position(|r| r.owner == Some(pcid)) {
            self.regions.all[i].flush();
            self.regions.all[i].flush_jc(miss);
        }
        if current {
            self.regions.all[0].flush_nonglobal();
            if self.nonglobal_code {
                self.code_moved();
            }
            self.cpu_mut().kuser = 0;
        }
        self.counters.tlb_flushes += 1;
    }

    /// After CR3 changed: `keep` is bit 63 of the value written.
    pub fn switch_address_space(&mut self, keep: bool) {
        let miss = self.stubs.lookup;
        let pcid = self.pcid();
        self.counters.cr3_writes += 1;
        self.regions.all[0].flush_nonglobal();
        if self.nonglobal_code {
            self.code_moved();
        }
        self.cpu_mut().kuser = 0;
        self.clock += 1;
        let found = self.regions.all.iter().position(|r| r.owner == Some(pcid));
        let i = found.unwrap_or_else(|| {
            let i = (1..=USER_REGIONS).min_by_key(|&i| self.regions.all[i].last_use).unwrap();
            let r = &mut self.regions.all[i];
            r.flush();
            r.flush_jc(miss);
            r.owner = Some(pcid);
            i
        });
        let r = &mut self.regions.all[i];
        r.last_use = self.clock;
        if !keep && found.is_some() {
            r.flush();
            r.flush_jc(miss);
        }
        self.user_region = i;
        self.select_region();
    }

    /// Point gs at the tables for the current privilege and mode.
    pub fn select_region(&mut self) {
        let i = if self.cpu().cpl == 3 { self.user_region } else { 0 };
        if self.direct.is_some() {
            self.note_privilege(self.region, i);
        }
        self.region = i;
        let mode = self.mode();
        let miss = self.stubs.lookup;
        let (cs_base, cs_limit) = if self.cpu().code64() {
            (0, u32::MAX)
        } else {
            (self.cpu().seg[1].base, self.cpu().seg[1].limit)
        };
        let r = &mut self.regions.all[i];
        if r.mode != mode || r.cs_base != cs_base || r.cs_limit != cs_limit {
            let moved = r.cs_base != cs_base || r.cs_limit != cs_limit;
            r.mode = mode;
            r.cs_base = cs_base;
            r.cs_limit = cs_limit;
            r.flush_jc(miss);
            if moved && i == 0 {
                // The same rip is other code now.
                self.code_moved();
            }
        }
        let base = self.regions.all[i].base;
        self.cpu_mut().region = base;
    }
}
