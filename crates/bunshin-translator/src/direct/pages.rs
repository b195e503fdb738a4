//! Which guest pages a sandbox has mapped, and what it must forget.
use super::guard::Guard;
use super::sandbox::Sandbox;
use super::scan::suspects;
use super::stub::{END, STUB, TOP};
use crate::block::NumberMap;
use crate::mmu::{Filled, Kind, Who, PF_};
use crate::vcpu::Vcpu;
use libc::{PROT_EXEC, PROT_READ, PROT_WRITE};

/// Single pages that a region drops and that are kept apart.
const SINGLES: usize = 64;
/// Most pages that are mapped one by one; Linux allows a process 65530 mappings.
const MOST: usize = 30_000;
/// Commands left for what a single fault needs.
const SPARE: usize = 8;
/// Bytes of the longest instruction.
const LONGEST: u64 = 15;
/// In `writers`: several addresses have the page.
const MANY: u64 = 1;

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
}

/// The mappings of one sandbox.
#[derive(Default)]
pub struct Mirror {
    /// Protection by address of the page.
    mapped: NumberMap<u64, i32>,
    /// Where a page (index in `Phys::pages`) is mapped for stores, or `MANY`.
    writers: NumberMap<u64, u64>,
    /// Pages that must lose their mappings for stores.
    protect: Vec<u64>,
    guard: Guard,
}

impl Mirror {
    /// Stores to `page` must be heard: take its mappings away before guest code runs.
    pub fn protect(&mut self, page: usize) {
        if self.writers.contains_key(&(page as u64)) {
            self.protect.push(page as u64);
        }
    }

    /// Unmap what the region has dropped.
    pub fn forget(&mut self, stale: &mut Stale, sandbox: &mut Sandbox) {
        if std::mem::take(&mut stale.all) || self.mapped.len() > MOST {
            self.unmap_all(sandbox);
        } else {
            for &va in &stale.pages {
                self.unmap(va, sandbox);
            }
        }
        stale.pages.clear();
    }

    /// Take mappings away from pages that are to be protected.
    pub fn settle(&mut self, sandbox: &mut Sandbox) {
        while let Some(page) = self.protect.pop() {
            match self.writers.remove(&page) {
                Some(MANY) => self.unmap_all(sandbox),
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
        let both = own && self.mapped.get(&page).is_some_and(|p| p & PROT_EXEC != 0);
        if both {
            self.unmap(page, sandbox);
        }
        both
    }

    fn unmap(&mut self, va: u64, sandbox: &mut Sandbox) {
        if sandbox.room() <= SPARE {
            self.unmap_all(sandbox);
        } else if let Some(protection) = self.mapped.remove(&va) {
            sandbox.unmap(va, 4096);
            if protection & PROT_EXEC != 0 {
                self.guard.forget(va);
            }
        }
    }

    fn unmap_all(&mut self, sandbox: &mut Sandbox) {
        if !self.mapped.is_empty() {
            sandbox.drop_maps();
            sandbox.unmap(0, STUB);
            sandbox.unmap(END, TOP - END);
        }
        self.mapped.clear();
        self.writers.clear();
        self.protect.clear();
        self.guard.clear();
    }
}

impl Vcpu {
    /// Map the page at `va` for an access of guest code, or say what becomes of that.
    pub(super) fn mirror_page(
        &mut self,
        mirror: &mut Mirror,
        sandbox: &mut Sandbox,
        va: u64,
        kind: Kind,
    ) -> Filled {
        let m = match self.walk(va, Who::User, kind) {
            Ok(m) => m,
            Err(e) if e.vector == PF_ => return Filled::Fault(e),
            Err(_) => return Filled::Slow,
        };
        let va = va & !0xfff;
        let Some((file, offset)) = self.phys.file(m.gpa) else { return Filled::Slow };
        let (Some(page), Some(host)) = (self.phys.page(m.gpa), self.phys.host(m.gpa)) else {
            return Filled::Slow;
        };
        let store = kind != Kind::Fetch && m.store && self.phys.writable(m.gpa) && self.stores_freely(page);
        let protection = match kind {
            Kind::Write if !store => return Filled::Slow,
            Kind::Fetch => {
                let next = self.first_bytes(va + 4096);
                // SAFETY: a page of guest RAM; what its processors store meanwhile is
                // theirs to know.
                let bytes = unsafe { std::slice::from_raw_parts(host as *const u8, 4096) };
                let places = suspects(bytes, next);
                if !places.is_empty() {
                    let Ok(gone) = mirror.guard.set(sandbox.pid(), va, &places) else {
                        self.counters.direct_unguarded += 1;
                        self.rest_direct();
                        return Filled::Slow;
                    };
                    for page in gone {
                        mirror.unmap(page, sandbox);
                    }
                }
                PROT_READ | PROT_EXEC
            }
            _ if store => PROT_READ | PROT_WRITE,
            _ => PROT_READ,
        };
        sandbox.map(va, 4096, protection, file, offset);
        if mirror.mapped.insert(va, protection).is_some_and(|before| before & PROT_EXEC != 0) && store {
            mirror.guard.forget(va);
        }
        if store {
            mirror
                .writers
                .entry(page as u64)
                .and_modify(|w| *w = if *w == va { va } else { MANY })
                .or_insert(va);
        }
        Filled::Retry
    }

    /// The first bytes of the page at `va`, if there is one that code may run on into.
    fn first_bytes(&mut self, va: u64) -> Option<[u8; 2]> {
        let m = self.walk(va, Who::User, Kind::Fetch).ok()?;
        let host = self.phys.host(m.gpa)?;
        // SAFETY: the beginning of a page of guest RAM.
        Some(unsafe { (host as *const [u8; 2]).read_volatile() })
    }
}
