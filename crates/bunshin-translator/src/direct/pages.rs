//! Which guest pages a sandbox has mapped, and what it must forget.
use super::guard::Guard;
use super::sandbox::Sandbox;
use super::scan::{ends_open, suspects};
use super::stub::{END, STUB, TOP};
use super::tables::{join, split, Leaf, Leaves, CHUNK};
use crate::block::NumberMap;
use crate::mmu::{Filled, Kind, Who, PF_};
use crate::vcpu::Vcpu;
use libc::{PROT_EXEC, PROT_READ, PROT_WRITE};

/// Single pages that a region drops and that are kept apart.
const SINGLES: usize = 64;
/// Most areas of memory that Linux is asked for; it allows a process 65530.
const AREAS: usize = 50_000;
/// A fault maps pages of so many around it, aligned, that the guest's tables have too. In
/// one stroke a page costs a tenth of a fault; the guest's kernel itself maps 16 at once.
const AROUND: usize = 16;
/// Commands that a fault needs: runs, and pages that lose their breakpoints.
const NEED: usize = AROUND + 8;
/// Commands left for that.
const SPARE: usize = 2 * NEED;
/// Bytes of the longest instruction.
const LONGEST: u64 = 15;
/// In `writers`: several addresses have the page.
const MANY: u64 = 1;

/// Bits of an entry of `Chunk`.
const WRITE: u64 = PROT_WRITE as u64;
const EXECUTE: u64 = PROT_EXEC as u64;
const PROTECTION: u64 = 0xfff;

/// What a region has dropped since its sandbox last ran. Noted inside translated code
/// too, so nothing here grows.
pub struct Stale {
    all: bool,
    pages: Vec<u64>,
}

impl Default for Stale {
    fn default() -> Self {
        Self { all: false, pages: Vec::with_capacity(SINGLES) }
    }
}

impl Stale {
    pub fn all(&mut self) {
        self.all = true;
    }

    pub fn page(&mut self, va: u64) {
        if self.pages.len() == SINGLES {
            self.all = true;
        }
        if !self.all {
            self.pages.push(va & !0xfff);
        }
    }

    fn clear(&mut self) {
        self.all = false;
        self.pages.clear();
    }
}

/// The pages that one page table of the guest's may map.
struct Chunk {
    /// Index in `Phys::pages` << 12 | protection; 0: not mapped.
    pages: [u64; CHUNK],
    mapped: usize,
    /// A large page was among them: what drops any of it drops all.
    large: bool,
}

/// The mappings of one sandbox.
#[derive(Default)]
pub struct Mirror {
    chunks: NumberMap<u64, Box<Chunk>>,
    /// A page of 1 GiB was among them.
    giant: bool,
    /// At most so many areas of memory.
    areas: usize,
    /// Where a page (index in `Phys::pages`) is mapped for stores, or `MANY`.
    writers: NumberMap<u64, u64>,
    /// Pages that must lose their mappings for stores.
    protect: Vec<u64>,
    /// Executable pages whose last instruction may show the host, depending on the page
    /// behind them.
    open: Vec<u64>,
    /// The guest's kernel was told of a fault there: it is likely to have a page now.
    faulted: Option<(u64, Kind)>,
    /// The last page that was asked for could show the host.
    unguarded: bool,
    /// Pages had to go for want of breakpoints.
    evicted: bool,
    stale: Stale,
    guard: Guard,
}

/// Neighbours that one command maps.
struct Run {
    va: u64,
    pages: u64,
    protection: i32,
    file: usize,
    offset: u64,
}

impl Mirror {
    /// Stores to `page` must be heard: take its mappings away before guest code runs.
    pub fn protect(&mut self, page: usize) {
        if self.writers.contains_key(&(page as u64)) {
            self.protect.push(page as u64);
        }
    }

    /// The guest's kernel sees a fault at `va`.
    pub fn faults(&mut self, va: u64, kind: Kind) {
        self.faulted = Some((va & !0xfff, kind));
    }

    /// The page that could not be mapped may show the host. Tells it once.
    pub fn take_unguarded(&mut self) -> bool {
        std::mem::take(&mut self.unguarded)
    }

    /// Pages had to go for want of breakpoints. Tells it once.
    pub fn take_evicted(&mut self) -> bool {
        std::mem::take(&mut self.evicted)
    }

    /// A breakpoint of the page at `va` was met.
    pub fn meets(&mut self, va: u64) {
        self.guard.meets(va & !0xfff);
    }

    /// Take mappings away from pages that are to be protected.
    pub fn settle(&mut self, sandbox: &mut Sandbox) {
        while let Some(page) = self.protect.pop() {
            match self.writers.remove(&page) {
                Some(MANY) => {
                    let of_page = |e: &u64| e >> 12 == page && e & WRITE != 0;
                    let all = self.chunks.iter().flat_map(|(&c, chunk)| {
                        (0..CHUNK).filter(|&n| of_page(&chunk.pages[n])).map(move |n| join(c, n))
                    });
                    for va in all.collect::<Vec<_>>() {
                        self.unmap(va, sandbox);
                    }
                }
                Some(va) => self.unmap(va, sandbox),
                None => {}
            }
        }
    }

    /// The instruction at `rip` stores to a page that it may lie in itself: both are not
    /// to be had together. Forget the page, so that it is searched again.
    pub fn gives_up(&mut self, va: u64, rip: u64, sandbox: &mut Sandbox) -> bool {
        let page = va & !0xfff;
        let own = rip & !0xfff == page || rip.wrapping_add(LONGEST - 1) & !0xfff == page;
        let both = own && self.entry(page) & EXECUTE != 0;
        if both {
            self.unmap(page, sandbox);
        }
        both
    }

    fn entry(&self, va: u64) -> u64 {
        let (chunk, n) = split(va);
        self.chunks.get(&chunk).map_or(0, |c| c.pages[n])
    }

    /// `entry` is mapped at `va` from now on, out of a page of `bits`.
    fn enter(&mut self, va: u64, entry: u64, bits: u8) {
        self.leave(va);
        let (chunk, n) = split(va);
        let empty = || Box::new(Chunk { pages: [0; CHUNK], mapped: 0, large: false });
        let c = self.chunks.entry(chunk).or_insert_with(empty);
        c.pages[n] = entry;
        c.mapped += 1;
        c.large |= bits > 12;
        self.giant |= bits > 21;
        if entry & WRITE != 0 {
            let other = |w: &mut u64| *w = if *w == va { va } else { MANY };
            self.writers.entry(entry >> 12).and_modify(other).or_insert(va);
        }
    }

    /// Nothing is mapped at `va` any more, or something else. False: nothing was.
    fn leave(&mut self, va: u64) -> bool {
        let (chunk, n) = split(va);
        let Some(c) = self.chunks.get_mut(&chunk) else { return false };
        let entry = std::mem::take(&mut c.pages[n]);
        if entry == 0 {
            return false;
        }
        c.mapped -= 1;
        self.left(va, entry);
        true
    }

    fn left(&mut self, va: u64, entry: u64) {
        if entry & EXECUTE != 0 {
            self.guard.forget(va);
            self.open.retain(|&o| o != va);
        }
        if entry & WRITE != 0 && self.writers.get(&(entry >> 12)) == Some(&va) {
            self.writers.remove(&(entry >> 12));
        }
    }

    fn unmap(&mut self, va: u64, sandbox: &mut Sandbox) {
        if self.leave(va) {
            self.unmap_ranges(&[(va, 4096)], sandbox);
        }
    }

    /// Unmap addresses that nothing is entered for any more.
    fn unmap_ranges(&mut self, ranges: &[(u64, u64)], sandbox: &mut Sandbox) {
        if ranges.is_empty() {
            return;
        }
        if sandbox.room() < ranges.len() + SPARE {
            self.unmap_all(sandbox);
            return;
        }
        for &(va, length) in ranges {
            sandbox.unmap(va, length);
        }
        self.areas += ranges.len();
    }

    /// The page at `va` changes: one before it whose last instruction may run on into it
    /// must be searched again.
    fn close(&mut self, va: u64, sandbox: &mut Sandbox) {
        let before = va.wrapping_sub(4096);
        if self.open.contains(&before) {
            self.unmap(before, sandbox);
        }
    }

    fn map(&mut self, run: Option<Run>, sandbox: &mut Sandbox) {
        if let Some(r) = run {
            sandbox.map(r.va, 4096 * r.pages, r.protection, r.file, r.offset);
            // One that it lies in the middle of falls apart.
            self.areas += 2;
        }
    }

    fn unmap_all(&mut self, sandbox: &mut Sandbox) {
        if self.areas != 0 {
            sandbox.drop_maps();
            sandbox.unmap(0, STUB);
            sandbox.unmap(END, TOP - END);
        }
        self.chunks.clear();
        self.giant = false;
        self.areas = 0;
        self.writers.clear();
        self.protect.clear();
        self.open.clear();
        self.guard.clear();
    }

    /// Areas that there are at most, counted anew.
    fn count_areas(&self) -> usize {
        // Neighbours in both memories are one area.
        let starts = |c: &Chunk| {
            (0..CHUNK).filter(|&n| c.pages[n] != 0 && (n == 0 || c.pages[n] != c.pages[n - 1] + 4096)).count()
        };
        self.chunks.values().map(|c| starts(c)).sum()
    }
}

impl Vcpu {
    /// What the region has dropped is unmapped, except what its page tables still say: a
    /// TLB may have read that again at once.
    pub(super) fn refresh(&mut self, mirror: &mut Mirror, sandbox: &mut Sandbox) {
        let region = self.region;
        // Both have the room that they need.
        std::mem::swap(&mut mirror.stale, &mut self.regions.all[region].stale);
        let mut gone = Vec::new();
        if mirror.stale.all || mirror.giant && !mirror.stale.pages.is_empty() {
            for chunk in mirror.chunks.keys().copied().collect::<Vec<_>>() {
                self.check_pages(mirror, chunk, 0..CHUNK, &mut gone);
            }
        } else {
            for k in 0..mirror.stale.pages.len() {
                let va = mirror.stale.pages[k];
                let (chunk, n) = split(va);
                let large = mirror.chunks.get(&chunk).is_some_and(|c| c.large);
                self.check_pages(mirror, chunk, if large { 0..CHUNK } else { n..n + 1 }, &mut gone);
                mirror.close(va, sandbox);
            }
        }
        mirror.stale.clear();
        mirror.unmap_ranges(&gone, sandbox);
        if mirror.areas > AREAS {
            mirror.areas = mirror.count_areas();
            if mirror.areas > AREAS / 2 {
                mirror.unmap_all(sandbox);
            }
        }
    }

    /// Strike out those of `pages` of a chunk that the tables do not have as they are
    /// mapped. `gone` gets their addresses and lengths.
    fn check_pages(
        &mut self,
        mirror: &mut Mirror,
        chunk: u64,
        pages: std::ops::Range<usize>,
        gone: &mut Vec<(u64, u64)>,
    ) {
        let Some(mut c) = mirror.chunks.remove(&chunk) else { return };
        let leaves = self.leaves(join(chunk, 0));
        let mut run: Option<(u64, u64)> = None;
        for n in pages {
            let (va, entry) = (join(chunk, n), c.pages[n]);
            if entry == 0 {
                continue;
            }
            let leaf = leaves.and_then(|l| self.leaf(&l, n));
            if leaf.is_some_and(|leaf| self.still_holds(mirror, va, entry, leaf)) {
                gone.extend(run.take());
                continue;
            }
            c.pages[n] = 0;
            c.mapped -= 1;
            mirror.left(va, entry);
            let start = run.map_or(va, |(start, _)| start);
            run = Some((start, va + 4096 - start));
        }
        gone.extend(run);
        if c.mapped != 0 {
            mirror.chunks.insert(chunk, c);
        }
    }

    /// A mapping is what the tables say. Executable pages are searched again.
    fn still_holds(&self, mirror: &Mirror, va: u64, entry: u64, leaf: Leaf) -> bool {
        self.phys.page(leaf.gpa) == Some((entry >> 12) as usize)
            && (entry & WRITE == 0 || leaf.store)
            && (entry & EXECUTE == 0
                || leaf.execute && {
                    let (places, open) = self.search(va, leaf.gpa);
                    mirror.guard.has(va, &places) && open == mirror.open.contains(&va)
                })
    }

    /// Map the page at `va` for an access of guest code, and neighbours, or say what
    /// becomes of that.
    pub(super) fn mirror_page(
        &mut self,
        mirror: &mut Mirror,
        sandbox: &mut Sandbox,
        va: u64,
        kind: Kind,
        rip: u64,
    ) -> Filled {
        let m = match self.walk(va, Who::User, kind) {
            Ok(m) => m,
            Err(e) if e.vector == PF_ => return Filled::Fault(e),
            Err(_) => return Filled::Slow,
        };
        let va = va & !0xfff;
        let leaf = Leaf { gpa: m.gpa, store: m.store, execute: kind == Kind::Fetch };
        let Some(entry) = self.wanted(leaf, kind) else { return Filled::Slow };
        if kind == Kind::Write && entry & WRITE == 0 {
            return Filled::Slow;
        }
        if sandbox.room() < NEED {
            mirror.unmap_all(sandbox);
        }
        if mirror.entry(va) & EXECUTE != 0 {
            mirror.unmap(va, sandbox);
        }
        let (places, open) = if kind == Kind::Fetch { self.search(va, m.gpa) } else { (Vec::new(), false) };
        if !places.is_empty() {
            let Ok(gone) = mirror.guard.set(sandbox.pid(), va, &places, rip & !0xfff) else {
                mirror.unguarded = true;
                return Filled::Slow;
            };
            mirror.evicted |= !gone.is_empty();
            for page in gone {
                mirror.unmap(page, sandbox);
            }
        }
        self.map_around(mirror, sandbox, va, kind, entry, m.bits);
        if open {
            mirror.open.push(va);
        }
        Filled::Retry
    }

    /// The guest's kernel has returned from a fault: save user code the next one.
    pub(super) fn mirror_faulted(&mut self, mirror: &mut Mirror, sandbox: &mut Sandbox) {
        let Some((va, kind)) = mirror.faulted.take() else { return };
        let Some(leaves) = self.leaves(va) else { return };
        let Some(leaf) = self.leaf(&leaves, split(va).1) else { return };
        let Some(entry) = self.wanted(leaf, kind) else { return };
        let enough = match kind {
            Kind::Read => true,
            Kind::Write => entry & WRITE != 0,
            Kind::Fetch => leaf.execute && self.is_plain(va, leaf.gpa),
        };
        if enough && mirror.entry(va) != entry && sandbox.room() >= NEED {
            self.map_around(mirror, sandbox, va, kind, entry, leaves.bits);
        }
    }

    /// Map `entry` at `va`, and what the tables have around it for accesses of that kind.
    fn map_around(
        &mut self,
        mirror: &mut Mirror,
        sandbox: &mut Sandbox,
        va: u64,
        kind: Kind,
        entry: u64,
        bits: u8,
    ) {
        let (chunk, middle) = split(va);
        let first = middle & !(AROUND - 1);
        let leaves = self.leaves(va);
        let mut run: Option<Run> = None;
        for n in first..first + AROUND {
            let here = join(chunk, n);
            let entry = match leaves {
                _ if n == middle => Some(entry),
                Some(l) if mirror.entry(here) == 0 && !(STUB..END).contains(&here) => {
                    self.beside(&l, here, n, kind)
                }
                _ => None,
            };
            let Some(entry) = entry else { continue };
            let Some((file, offset)) = self.phys.file_of((entry >> 12) as usize) else { continue };
            mirror.enter(here, entry, bits);
            if kind == Kind::Fetch && mirror.writers.contains_key(&(entry >> 12)) {
                // Another address has it for stores.
                mirror.protect.push(entry >> 12);
            }
            mirror.close(here, sandbox);
            let protection = (entry & PROTECTION) as i32;
            match &mut run {
                Some(r)
                    if r.va + 4096 * r.pages == here
                        && r.protection == protection
                        && r.file == file
                        && r.offset + 4096 * r.pages == offset =>
                {
                    r.pages += 1;
                }
                _ => {
                    mirror.map(run.replace(Run { va: here, pages: 1, protection, file, offset }), sandbox);
                }
            }
        }
        mirror.map(run, sandbox);
    }

    /// What may be mapped of a page that was not asked for.
    fn beside(&self, leaves: &Leaves, va: u64, n: usize, kind: Kind) -> Option<u64> {
        let leaf = self.leaf(leaves, n)?;
        let fits = match kind {
            // What is code is not known to be data as well, nor the other way round.
            Kind::Fetch => leaf.execute && !leaf.store && self.is_plain(va, leaf.gpa),
            _ => !leaf.execute || leaf.store,
        };
        if fits {
            self.wanted(leaf, kind)
        } else {
            None
        }
    }

    /// The entry for a page of guest RAM, as far as the rules for stores let it.
    fn wanted(&self, leaf: Leaf, kind: Kind) -> Option<u64> {
        let page = self.phys.page(leaf.gpa)?;
        let protection = match kind {
            Kind::Fetch => PROT_READ | PROT_EXEC,
            _ if leaf.store && self.phys.writable(leaf.gpa) && self.stores_freely(page) => {
                PROT_READ | PROT_WRITE
            }
            _ => PROT_READ,
        };
        Some((page as u64) << 12 | protection as u64)
    }

    /// Where the page at `va` may show the host, and whether that depends on the page
    /// behind it.
    fn search(&self, va: u64, gpa: u64) -> (Vec<usize>, bool) {
        let Some(host) = self.phys.host(gpa) else { return (Vec::new(), false) };
        // SAFETY: a page of guest RAM; what its processors store meanwhile is theirs to
        // know.
        let bytes = unsafe { std::slice::from_raw_parts(host as *const u8, 4096) };
        let open = ends_open(bytes);
        let next = if open { self.first_bytes(va + 4096) } else { None };
        (suspects(bytes, next), open)
    }

    /// Nothing there may show the host.
    fn is_plain(&self, va: u64, gpa: u64) -> bool {
        let (places, open) = self.search(va, gpa);
        places.is_empty() && !open
    }

    /// The first bytes of the page at `va`, if the tables have one that code may run on
    /// into.
    fn first_bytes(&self, va: u64) -> Option<[u8; 2]> {
        let leaf = self.leaf(&self.leaves(va)?, split(va).1)?;
        let host = self.phys.host(leaf.gpa).filter(|_| leaf.execute)?;
        // SAFETY: the beginning of a page of guest RAM.
        Some(unsafe { (host as *const [u8; 2]).read_volatile() })
    }
}
