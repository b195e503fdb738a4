//! Translation blocks: where they are, how they are found, linked and dropped.
use crate::count::Plant;
use crate::revive::Patch;
use crate::translate::{Lesson, Moved};
use crate::vcpu::Vcpu;
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// Multiplicative hash for keys that are numbers.
#[derive(Default, Clone, Copy)]
pub struct NumberHasher(u64);

impl Hasher for NumberHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for b in bytes {
            self.write_u64(u64::from(*b));
        }
    }
    fn write_u64(&mut self, v: u64) {
        self.0 = (self.0.rotate_left(5) ^ v).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
    fn write_u32(&mut self, v: u32) {
        self.write_u64(u64::from(v));
    }
    fn write_usize(&mut self, v: usize) {
        self.write_u64(v as u64);
    }
}

pub type NumberMap<K, V> = HashMap<K, V, BuildHasherDefault<NumberHasher>>;

/// What makes two pieces of guest code the same translation.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Key {
    pub gpa: u64,
    pub va: u64,
    pub mode: u32,
}

/// Host offset to guest instruction, for faults and slow accesses.
#[derive(Clone, Copy, Debug)]
pub struct Point {
    /// Offset of the first host byte from the block's start.
    pub host: u32,
    /// Offset of the guest instruction from the block's rip.
    pub guest: i16,
    /// The guest's flags are in the host's register when the copied
    /// instruction runs; else in `cpu.lazy`.
    pub host_flags: bool,
    /// Guest registers that r8, r9 and r10 hold and memory does not.
    pub held: [Option<u8>; 3],
    /// How far the guest's stack pointer is ahead of its register.
    pub stack: i32,
}

/// How the slots of hot code fare.
pub struct Heat {
    /// Time-stamp counter since when their refills count.
    pub since: u64,
    /// Guest instruction (offset from the block's start) and slot.
    pub slots: Vec<(i16, u32)>,
    /// Those of them whose tag is a bound.
    pub bounds: Vec<u32>,
    /// All slots of the block.
    pub taken: Vec<u32>,
    /// Slot whose count is the one of entries.
    pub entries: Option<u32>,
    pub lesson: Lesson,
}

pub struct Block {
    pub key: Key,
    /// Address and gpa of a second page that it depends on: the only instruction
    /// crosses into it, or it is hot code on both sides of a page end.
    pub second: Option<(u64, u64)>,
    /// Guest bytes, and instructions.
    pub length: u16,
    pub count: u32,
    pub dead: bool,
    /// Host registers that hold something else than outside.
    pub moved: Box<[Moved]>,
    /// Of hot code only.
    pub heat: Option<Heat>,
    /// Of other code: number of the sample that found it last.
    pub seen: u64,
    /// Address of the code that runs often, and its length; the same for the rest. In
    /// offsets from the block's first byte the second follows the first.
    pub host: u64,
    pub host_length: u32,
    pub cold: u64,
    pub cold_length: u32,
    /// Entry for indirect jumps: checks that r8 is this block's rip.
    pub checked: u64,
    /// Entry for linked jumps.
    pub body: u64,
    pub points: Box<[Point]>,
    /// Highest offset in the code segment that the translation took for valid.
    pub reach: u64,
    /// Further byte ranges of the page that the translation relied on.
    pub relied: Vec<(u16, u16)>,
    /// Constants of the guest's code in it.
    pub patches: Box<[Patch]>,
    /// First of the sites that jump here (`Site::next`), or `NONE`.
    pub incoming: u32,
}

/// A direct jump at the end of a block.
pub struct Site {
    /// Address of its rel32.
    pub patch: u64,
    /// Where it goes while not linked, and the rel32 of the jump at its end.
    pub stub: u64,
    pub jump: u64,
    pub target: u64,
    pub linked: bool,
    /// Target page differs from the block's page.
    pub far: bool,
    /// Leads to the version that shares no probes.
    pub alone: bool,
    /// Block whose list of incoming sites this one is in, and the next in it.
    /// A site that is unlinked stays in its lists.
    pub listed: u32,
    pub next: u32,
    /// In the list of far links, and the next in it.
    pub listed_far: bool,
    pub next_far: u32,
}

/// End of a list of sites. The lists are intrusive because linking happens
/// where no memory may be allocated.
pub const NONE: u32 = u32::MAX;

pub struct Blocks {
    /// In order of host address, and of falling addresses of cold code.
    pub all: Vec<Block>,
    pub index: NumberMap<Key, u32>,
    /// Live blocks by page (index in `Phys::pages`).
    pub by_page: NumberMap<usize, Vec<u32>>,
    pub sites: Vec<Site>,
    /// First of the linked sites that cross pages.
    pub far_links: u32,
    /// Points of all blocks, dead ones included.
    pub points: usize,
}

impl Default for Blocks {
    fn default() -> Self {
        Self {
            all: Vec::new(),
            index: NumberMap::default(),
            by_page: NumberMap::default(),
            sites: Vec::new(),
            far_links: NONE,
            points: 0,
        }
    }
}

impl Blocks {
    /// The block that holds host address `pc`, and the point at or before it.
    pub fn locate(&self, pc: u64) -> Option<(&Block, Point)> {
        let (b, off) = self.holds(pc)?;
        let p = b.points.partition_point(|p| p.host <= off);
        Some((b, *b.points.get(p.checked_sub(1)?)?))
    }

    /// The block whose code has host address `pc`, and where in it that is.
    pub fn holds(&self, pc: u64) -> Option<(&Block, u32)> {
        let cold = self.all.last().is_some_and(|b| pc >= b.cold);
        let n = if cold {
            self.all.partition_point(|b| b.cold > pc)
        } else {
            self.all.partition_point(|b| b.host <= pc).checked_sub(1)?
        };
        let b = self.all.get(n)?;
        Some((b, b.offset(pc)?))
    }
}

impl Block {
    /// Offset of a host address in the block.
    fn offset(&self, pc: u64) -> Option<u32> {
        let inside = |from, length| {
            let off = pc.wrapping_sub(from);
            (off < u64::from(length)).then_some(off as u32)
        };
        inside(self.host, self.host_length)
            .or_else(|| inside(self.cold, self.cold_length).map(|off| off + self.host_length))
    }

    /// Host address of an offset in the block.
    pub fn address(&self, offset: u32) -> u64 {
        match offset.checked_sub(self.host_length) {
            Some(cold) => self.cold + u64::from(cold),
            None => self.host + u64::from(offset),
        }
    }
}

impl Vcpu {
    /// Find the translation for `rip` in the current mode; None if there is none
    /// or the address does not translate.
    pub fn find_block(&mut self, rip: u64, alone: bool) -> Option<u32> {
        let va = self.linear_rip(rip);
        self.counters.tlb_fetch += 1;
        let m = self.walk(va, self.fetcher(), crate::mmu::Kind::Fetch).ok()?;
        let gpa = m.gpa | (va & 0xfff);
        let mode = self.mode() | if alone { crate::vcpu::mode::ALONE } else { 0 };
        let id = *self.blocks.index.get(&Key { gpa, va: rip, mode })?;
        let mut global = m.global;
        if self.blocks.all[id as usize].reach > self.code_limit() {
            return None;
        }
        if let Some((next, second)) = self.blocks.all[id as usize].second {
            let m2 = self.walk(next, self.fetcher(), crate::mmu::Kind::Fetch).ok()?;
            if m2.gpa != second {
                return None;
            }
            global &= m2.global;
        }
        if !global {
            self.nonglobal_code |= self.region == 0;
        }
        Some(id)
    }

    /// Code for an indirect jump to `rip`; 0 if it must be translated first.
    pub fn lookup(&mut self, rip: u64) -> u64 {
        self.counters.lookups += 1;
        if self.counting() {
            return 0;
        }
        match self.find_block(rip, false) {
            Some(id) => {
                let b = &self.blocks.all[id as usize];
                let r = &mut self.regions.all[self.region];
                r.jc_set(rip, (b.checked, b.body), self.stubs.lookup);
                if let Some((second, _)) = b.second {
                    r.runs_in(second);
                }
                b.body
            }
            None => 0,
        }
    }

    /// Code for the direct jump `site` to `rip`, linking it where that is valid.
    pub fn link(&mut self, rip: u64, site: u32) -> u64 {
        let alone = self.is_alone(site);
        if self.counting() {
            return 0;
        }
        let Some(id) = self.find_block(rip, alone) else { return 0 };
        self.link_to(site, id);
        self.blocks.all[id as usize].body
    }

    /// The site leads to a version that shares no probes.
    pub fn is_alone(&self, site: u32) -> bool {
        self.blocks.sites.get(site as usize).is_some_and(|s| s.alone)
    }

    pub fn link_to(&mut self, site: u32, id: u32) {
        let b = &mut self.blocks.all[id as usize];
        let Some(s) = self.blocks.sites.get_mut(site as usize) else { return };
        if b.second.is_some() {
            // It hangs on two pages: by the jump cache, which knows of both.
            let (jump, alone) = (s.jump, s.alone);
            if !alone {
                self.cache.patch(jump, self.stubs.indirect);
            }
            return;
        }
        if s.target != b.key.va || s.linked || b.dead || (s.listed != NONE && s.listed != id) {
            return;
        }
        s.linked = true;
        if s.listed == NONE {
            s.listed = id;
            s.next = std::mem::replace(&mut b.incoming, site);
        }
        if s.far && !s.listed_far {
            s.listed_far = true;
            s.next_far = std::mem::replace(&mut self.blocks.far_links, site);
        }
        let (patch, body) = (s.patch, b.body);
        self.cache.patch(patch, body);
        self.counters.links += 1;
    }

    fn unlink(&mut self, site: u32) {
        let s = &mut self.blocks.sites[site as usize];
        if s.linked {
            s.linked = false;
            let (patch, stub) = (s.patch, s.stub);
            self.cache.patch(patch, stub);
        }
    }

    /// Undo every link between pages: some code page may be mapped elsewhere now.
    pub fn unlink_far(&mut self) {
        let mut at = std::mem::replace(&mut self.blocks.far_links, NONE);
        while at != NONE {
            let s = &mut self.blocks.sites[at as usize];
            s.listed_far = false;
            let next = s.next_far;
            self.unlink(at);
            at = next;
        }
    }

    pub fn kill(&mut self, id: u32) {
        let b = &mut self.blocks.all[id as usize];
        if b.dead {
            return;
        }
        b.dead = true;
        let (key, checked) = (b.key, b.checked);
        let mut at = std::mem::replace(&mut b.incoming, NONE);
        b.relied = Vec::new();
        if let Some(h) = b.heat.take() {
            self.regions.give_back(h.taken.iter().copied());
        }
        while at != NONE {
            let s = &mut self.blocks.sites[at as usize];
            s.listed = NONE;
            let next = s.next;
            self.unlink(at);
            at = next;
        }
        self.blocks.index.remove(&key);
        let miss = self.stubs.lookup;
        for r in &mut self.regions.all {
            r.jc_drop(key.va, checked, miss);
        }
        self.counters.killed += 1;
    }

    /// Drop the translations that were made in a mode with `bit`, for good.
    pub fn forget_mode(&mut self, bit: u32) {
        self.graves.retain(|key, _| key.mode & bit == 0);
        for id in 0..self.blocks.all.len() as u32 {
            if self.blocks.all[id as usize].key.mode & bit != 0 {
                self.kill(id);
            }
        }
    }

    /// Guest memory `[gpa, gpa + length)` inside one page is about to change: drop the
    /// translations that were made from it. They may come back (`revive.rs`).
    pub fn code_changed(&mut self, gpa: u64, length: u64) {
        let Some(page) = self.phys.page(gpa) else { return };
        if self.plant == Some(Plant::StaleCode) {
            return;
        }
        if self.phys.pages.code(page) & self.me() == 0 {
            return;
        }
        self.counters.code_writes += 1;
        let Some(mut ids) = self.blocks.by_page.remove(&page) else {
            self.phys.pages.forget_code(page, self.me());
            return;
        };
        let (from, to) = (gpa & 0xfff, (gpa & 0xfff) + length);
        let page_gpa = gpa & !0xfff;
        let hit = |b: &Block| {
            let start = if b.key.gpa & !0xfff == page_gpa { b.key.gpa & 0xfff } else { 0 };
            let second = b.second.is_some_and(|s| s.1 == page_gpa);
            if second && b.heat.is_some() {
                return true;
            }
            let end = if second {
                (b.key.gpa & 0xfff) + u64::from(b.length) - 4096
            } else {
                start + u64::from(b.length)
            };
            start < to && from < end
                || b.relied.iter().any(|&(s, e)| u64::from(s) < to && from < u64::from(e))
        };
        ids.retain(|&i| !self.blocks.all[i as usize].dead);
        if ids.iter().any(|&i| hit(&self.blocks.all[i as usize])) {
            // Who writes code writes more of it: the whole page goes, so that the
            // stores that follow are fast again.
            self.counters.pages_dropped += 1;
            for i in ids.drain(..) {
                self.bury(i);
                self.kill(i);
            }
        }
        if ids.is_empty() {
            self.phys.pages.forget_code(page, self.me());
        } else {
            self.blocks.by_page.insert(page, ids);
        }
    }

    /// Drop all translations that were made from `page`, which has changed already.
    pub fn drop_page(&mut self, page: usize) {
        if let Some(ids) = self.blocks.by_page.remove(&page) {
            self.counters.pages_dropped += 1;
            for id in ids {
                self.kill(id);
            }
        }
        self.phys.pages.forget_code(page, self.me());
    }

    /// Forget every translation.
    pub fn flush_code(&mut self) {
        for &page in self.blocks.by_page.keys() {
            self.phys.pages.forget_code(page, self.me());
        }
        self.blocks = Blocks::default();
        self.helpers.clear();
        self.snippets.clear();
        self.slow_sites.clear();
        self.graves.clear();
        self.cache.flush();
        let miss = self.stubs.lookup;
        for r in &mut self.regions.all {
            r.flush_jc(miss);
        }
        self.regions.free_slots();
        self.nonglobal_code = false;
        self.counters.cache_flushes += 1;
    }
}
