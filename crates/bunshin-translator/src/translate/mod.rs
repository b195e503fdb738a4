//! Guest code to host code, a block at a time.
//!
//! A load `mov rax, [rbx+8]` where the flags are dead becomes
//!
//! ```text
//! hot  1: lea  r8, [rbx+8]            address
//!         rorx r9, r8, 12             its page number
//!         movzx r9d, r9w              index into the tables
//!         add  r8, gs:[TAG_R+r9*8]    minus the page held there: the offset, on a hit
//!         cmp  r8, 4096-8             a miss and a page crossing are both above
//!         ja   2
//!         mov  r9, gs:[HOST+r9*8]
//!         mov  rax, [r8+r9]           the guest's instruction
//! cold 2: lea  r8, [rbx+8]
//!         mov  r9d, info              size, direction
//!         call miss                   fills the table, or leaves for slow.rs
//!         jmp  1
//! ```
//!
//! Where the flags live, the probe leaves them alone:
//!
//! ```text
//!         mov  r10, gs:[TAG_R+r9*8]
//!         lea  r8, [r8+r10]
//!         mov  r9, gs:[HOST+r9*8]
//!         mov  r10, rcx
//!         lea  rcx, [r8+7]
//!         pext rcx, rcx, gs:[PAGES]   zero if it stays inside the page
//!         jrcxz 3
//!         jmp  2                      (cold: mov rcx, r10 first)
//!      3: mov  rcx, r10
//! ```
//!
//! In hot code the operand has a slot that holds the page it met last, so that the
//! address of the load hangs on nothing but the guest's own register:
//!
//! ```text
//! hot  1: lea  r8, [rbx+8]
//!         add  r8, gs:[SLOT_T+n*8]
//!         cmp  r8, 4096-8
//!         ja   2
//!         mov  r9, gs:[SLOT_D+n*8]    in a loop a register may hold it
//!      3: mov  rax, [rbx+r9+8]
//! cold 2: the slot is filled from the table, then 3; or the miss as above
//! ```
//!
//! Where many accesses follow, `lahf; seto al` saves the flags to `cpu.lazy`
//! once, the first form serves all of them, and `add al, 0x7f; sahf` brings the
//! flags back before they are needed.
mod bound;
mod copy;
mod early;
mod exits;
mod group;
mod keep;
mod plan;
mod probe;
mod stack;

use crate::asm::*;
use crate::block::{Block, Heat, Key, Point, Site, NONE};
use crate::count::Plant;
use crate::cpu::{at, HOST, JC, SLOT_D, SLOT_T, TAG_R, TAG_W};
use crate::debugger::at_owners_breakpoint;
use crate::flags::{effect, live_ahead, Effect, ALL};
use crate::insn::{decode, decoder, encode, exchange, gpr_number, reads, shape, writes, Mem, Parts, Renamed};
use crate::interp::debug::at_breakpoint;
use crate::interp::fpu::{ask, SHUT};
use crate::interp::Helper;
use crate::mmu::{Exception, Kind, INFO_GROUP, INFO_PLAIN, INFO_WRITE};
use crate::perf_map;
use crate::recipe::Recipe;
use crate::revive::{patchable, Patch};
use crate::vcpu::{mode, HelperEntry, Vcpu};
use iced_x86::{
    Code, CpuidFeature, DecoderError, FlowControl, Instruction, InstructionInfoFactory, Mnemonic as M,
    OpAccess, OpKind, Register,
};

use bound::Bound;
use copy::short_count;
use group::Group;
use group::Spot;
pub(crate) use plan::Homes;
pub use plan::Moved;
use plan::{constant_address, Stretch};
use probe::Place;

/// Most guest instructions in a block.
const MOST: usize = 64;

/// Which translation of a block.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Version {
    /// Made at first sight.
    First,
    /// No accesses share a probe: for operands that cross a page.
    Alone,
    /// Made again when samples found it frequent, by what was learned of it.
    Hot(Lesson),
}

/// What running hot code has taught.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Lesson {
    /// Instructions (offsets from the block's start) that change pages too often
    /// for slots.
    pub restless: Vec<i16>,
    /// Its loop by itself is left too soon: it is part of a larger one.
    pub short: bool,
    /// Its loop is hardly ever taken.
    pub straight: bool,
    /// It serves operands that cross a page (`Version::Alone`).
    pub alone: bool,
}

/// Where the guest's arithmetic flags are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Flags {
    Host,
    /// In `cpu.lazy`.
    Lazy,
    /// Overwritten by a probe; nobody wants them.
    Dead,
    /// Overwritten by a probe; `Unit::recipe` brings them back.
    Recipe,
}

struct Item {
    insn: Instruction,
    /// Offset of its bytes in the fetched window.
    at: usize,
    effect: Effect,
    live_after: u32,
    /// How it uses its memory operand.
    access: OpAccess,
    /// General registers that it writes, and that it uses at all, a bit each.
    writes: u16,
    uses: u16,
}

impl Item {
    fn new(insn: Instruction, at: usize, factory: &mut InstructionInfoFactory) -> Self {
        let info = factory.info(&insn);
        let access = (0..insn.op_count())
            .find(|&n| insn.op_kind(n) == OpKind::Memory)
            .map_or(OpAccess::None, |n| info.op_access(n));
        let (mut written, mut uses) = (0, 0);
        for r in info.used_registers() {
            if let Some((n, _)) = gpr_number(r.register()) {
                uses |= 1 << n;
                written |= u16::from(writes(r.access())) << n;
            }
        }
        Self { effect: effect(&insn), insn, at, live_after: ALL, access, writes: written, uses }
    }
}

/// Lists that are kept from one translation to the next for their memory.
#[derive(Default)]
pub struct Scratch {
    items: Vec<Item>,
    points: Vec<(Label, Point)>,
    sites: Vec<NewSite>,
}

/// A jump out of the block: places of the rel32, the stub and its jump, target, whether
/// pages differ, version.
type NewSite = (Label, Label, Label, u64, bool, bool);

/// A second page that hot code is looked for in.
#[derive(Clone, Copy)]
struct Neighbour {
    va: u64,
    gpa: u64,
    page: usize,
    host: u64,
}

/// A block being translated.
struct Unit<'a> {
    v: &'a mut Vcpu,
    a: Asm,
    bytes: &'a [u8],
    /// Address of the first of these bytes, and how many may be looked at.
    base: u64,
    span: usize,
    /// The page next to the block's, if the bytes are of both, and whether
    /// anything depends on it.
    neighbour: Option<Neighbour>,
    reached: bool,
    bits: u32,
    mode: u32,
    rip: u64,
    /// Addresses of the stretches, the one being written, and its address.
    order: Vec<u64>,
    place: usize,
    at: u64,
    /// How far the guest's stack pointer is ahead of its register.
    stack: i32,
    /// Where guest registers live.
    homes: Homes,
    /// Slots whose ways to the host a register holds.
    pinned_slots: Vec<(u32, u8)>,
    /// Instructions whose first operand has one of them.
    pins: Vec<(i16, u32)>,
    /// What serves operands of a loop together.
    bounds: Vec<Bound>,
    flags: Flags,
    points: Vec<(Label, Point)>,
    sites: Vec<NewSite>,
    relied: Vec<(u16, u16)>,
    patches: Vec<(Label, Patch)>,
    live_out: u32,
    info: InstructionInfoFactory,
    probed: bool,
    group: Option<Group>,
    /// Frequent code: worth slots.
    hot: bool,
    /// Slots whose refills are counted and the instructions that they serve; all slots.
    slots: Vec<(i16, u32)>,
    taken: Vec<u32>,
    /// The instruction that a check is done for ahead of it.
    slots_of: Option<i16>,
    lesson: Lesson,
    /// The slot whose count of refills counts how often the plan is entered.
    entries: Option<u32>,
    /// Guest registers that live in memory, held by r8, r9, r10 meanwhile, and
    /// whether memory is behind.
    cache: [Option<(u8, bool)>; 3],
    /// How to compute the guest's flags again, if that can be done.
    recipe: Option<Recipe>,
    items: &'a [Item],
    /// Index of the instruction being written, in `items`.
    now: usize,
    /// Memory accesses up to where the flags are needed or overwritten.
    ahead: usize,
    /// Writing a snippet: the operand lies at `cpu.tmp`, nothing is probed.
    bounce: bool,
    /// Index of the instruction being written, for `points`.
    guest: i16,
    /// Highest offset that code may have, and that this block took for valid.
    code_limit: u64,
    reach: u64,
}

/// Memory accesses from the first instruction on before the flags are read or
/// overwritten.
fn accesses_ahead(items: &[Item]) -> usize {
    let mut n = 0;
    for (k, i) in items.iter().enumerate() {
        if k > 0 && i.effect.reads != 0 {
            break;
        }
        let memory = (0..i.insn.op_count()).any(|n| i.insn.op_kind(n) == OpKind::Memory);
        n += usize::from(memory && i.insn.mnemonic() != M::Lea) + usize::from(i.insn.is_stack_instruction());
        if i.effect.writes != 0 {
            break;
        }
    }
    n
}

fn near(i: &Instruction) -> bool {
    matches!(i.op0_kind(), OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64)
}

/// How a block ends, so far as the decoder can tell.
fn ends(i: &Instruction) -> bool {
    i.flow_control() != FlowControl::Next || i.code() == Code::INVALID || crate::interp::ends_block(i)
}

impl Vcpu {
    /// Translate the block at `rip` in the current mode and return its number.
    ///
    /// With `alone` no accesses share a probe: the version for operands that
    /// cross a page. Hot code gets slots. Fails with the exception that fetching the
    /// first instruction raises.
    pub fn translate(&mut self, rip: u64, version: &mut Version) -> Result<u32, Exception> {
        match self.translate_once(rip, version)? {
            Some(id) => Ok(id),
            // Once more, with nobody there to change anything.
            None => self.exclusively(|v| v.translate_once(rip, version))?.ok_or(Exception::gp()),
        }
    }

    /// The page next to `rip`'s that a short loop may lie in too, if it was run from.
    fn neighbour(&mut self, rip: u64) -> Option<Neighbour> {
        let page = rip & !0xfff;
        let va = if rip & 0x800 != 0 { page.wrapping_add(4096) } else { page.wrapping_sub(4096) };
        let gpa = self.walk(va, self.fetcher(), Kind::Fetch).ok()?.gpa;
        let page = self.phys.page(gpa).filter(|p| self.blocks.by_page.contains_key(p))?;
        // Stores to it are heard already, or it is left alone.
        let heard = self.phys.pages.code(page) & self.me() != 0;
        let host = self.phys.host(gpa)?;
        heard.then_some(Neighbour { va, gpa, page, host })
    }

    /// None: the first page may have changed while others stood still for the second.
    fn translate_once(&mut self, rip: u64, version: &mut Version) -> Result<Option<u32>, Exception> {
        let alone = match version {
            Version::First => false,
            Version::Alone => true,
            Version::Hot(lesson) => lesson.alone,
        };
        let started = bunshin_core::clock::rdtsc();
        let code_limit = self.code_limit();
        if rip > code_limit {
            return Err(Exception::gp());
        }
        let va = self.linear_rip(rip);
        let m = self.walk(va, self.fetcher(), Kind::Fetch)?;
        let gpa = m.gpa | (va & 0xfff);
        let Some(page) = self.phys.page(gpa) else {
            return Err(Exception::gp()); // executing a device: not modelled
        };
        let host = self.phys.host(gpa & !0xfff).unwrap();
        self.claim_code(page);
        let mut mode = self.mode() | if alone { mode::ALONE } else { 0 };
        if self.cut_at.is_some() {
            mode |= mode::CUT;
        }
        let bits = mode::bits(mode);
        let (hot, lesson) = match version {
            Version::Hot(lesson) if bits == 64 => (true, std::mem::take(lesson)),
            _ => (false, Lesson::default()),
        };
        // A copy: what is decoded must be what is written, whoever changes it now.
        let mut window = std::mem::take(&mut self.window);
        window.clear();
        // SAFETY: a page of guest RAM.
        window.extend_from_slice(unsafe { std::slice::from_raw_parts(host as *const u8, 4096) });
        let mut start = (va & 0xfff) as usize;
        let mut base = rip & !0xfff;
        // The version without shared probes is found by links, which stay in a page.
        let neighbour = if hot && !alone { self.neighbour(rip) } else { None };
        if let Some(n) = neighbour {
            // SAFETY: a page of guest RAM.
            let bytes = unsafe { std::slice::from_raw_parts(n.host as *const u8, 4096) };
            if n.va > base {
                window.extend_from_slice(bytes);
            } else {
                window.splice(..0, bytes.iter().copied());
                start += 4096;
                base = n.va;
            }
        }

        if !matches!(version, Version::Hot(_)) {
            if let Some(id) = self.revive(&Key { gpa, va: rip, mode }, &window) {
                self.window = window;
                self.enlist(id, page);
                return Ok(Some(id));
            }
        }
        let mut factory = self.factory.take().unwrap_or_else(InstructionInfoFactory::new);
        let mut second = None;
        let span = window.len();
        let kept = std::mem::take(&mut self.scratch);
        let mut items = plan::decode_stretch(kept.items, &window, start, rip, bits, code_limit, &mut factory);
        let mut outside = items.is_empty() && {
            let first = decode(&window[start..(start + 15).min(window.len())], bits, rip);
            first.code() != Code::INVALID && first.next_ip().wrapping_sub(1) > code_limit
        };
        if items.is_empty() && !outside {
            // The first instruction crosses into the next page.
            let next = (va & !0xfff).wrapping_add(4096);
            let m2 = self.walk(next, self.fetcher(), Kind::Fetch)?;
            let (Some(page2), Some(h)) = (self.phys.page(m2.gpa), self.phys.host(m2.gpa)) else {
                return Err(Exception::gp());
            };
            if self.claim_code(page2) {
                (self.window, self.factory) = (window, Some(factory));
                return Ok(None);
            }
            let mut rest = [0; 16];
            // SAFETY: guest RAM.
            unsafe { std::ptr::copy_nonoverlapping(h as *const u8, rest.as_mut_ptr(), 16) };
            window.extend_from_slice(&rest);
            second = Some(Neighbour { va: next, gpa: m2.gpa, page: page2, host: h });
            let insn = decode(&window[start..(start + 15).min(window.len())], bits, rip);
            outside = bits != 64 && insn.next_ip() > code_limit + 1;
            if !outside {
                items.push(Item::new(insn, start, &mut factory));
            }
        }
        if let Some(most) = self.cut_at {
            items.truncate(most);
        }
        if items.is_empty() {
            self.factory = Some(factory);
            self.window = window;
            return Err(Exception::gp());
        }
        let mut u = Unit {
            base,
            span,
            neighbour,
            points: kept.points,
            sites: kept.sites,
            hot,
            lesson,
            code_limit,
            ..Unit::new(self, &window, (bits, mode), rip, factory)
        };
        let mut plan = vec![Stretch { ip: rip, items, live_out: ALL, short: false }];
        let mut settled = !hot || u.lesson.straight;
        if !settled {
            u.explore(&mut plan, gpa);
            settled = !u.lesson.short && second.is_none() && u.narrow(&mut plan);
            if !settled {
                Unit::focus(&mut plan);
            }
        }
        if !u.v.debugger.breakpoints.is_empty() {
            u.show_flags(&mut plan);
        }
        if u.v.exact_flags || mode & mode::COUNTED != 0 {
            // Even what faults shows the flags as they were before it.
            plan.iter_mut().flat_map(|s| &mut s.items).for_each(|i| i.effect.kills = 0);
        } else {
            u.liveness(&mut plan, second.is_some());
        }
        if !settled {
            u.settle(&plan, false);
        }
        u.order = plan.iter().map(|s| s.ip).collect();
        u.entry();
        let body = u.a.here().1;
        u.arrive();
        u.count_entry();
        for (n, s) in plan.iter().enumerate() {
            u.stretch(n, s);
        }
        let guest_length = (plan[0].last().next_ip().wrapping_sub(rip) as u16).max(1);
        for s in &plan[1..] {
            u.rely(s.ip, s.last().next_ip());
        }
        u.reached |= (rip & 0xfff) + u64::from(guest_length) > 4096;
        let reached = u.reached;
        let (users, bounds) = u.bound_users();
        u.slots.extend(users);
        let Unit {
            a,
            mut points,
            mut sites,
            relied,
            info,
            slots,
            taken,
            lesson,
            entries,
            homes,
            patches,
            reach,
            ..
        } = u;
        let end = plan.iter().map(|s| s.last().next_ip().wrapping_sub(1)).max().unwrap_or(0);
        for &n in &taken {
            self.cpu_mut().refills[n as usize] = 0;
        }
        self.asm = a;
        self.factory = Some(info);
        self.window = window;
        let (at, cold_at) = self.asm.put_apart(&mut self.cache);
        let (length, cold_length) = (self.asm.hot.len() as u32, self.asm.cold.len() as u32);
        let place = |l: Label| l.1 + if l.0 == Section::Cold { length } else { 0 };
        let address = |l: Label| u64::from(l.1) + if l.0 == Section::Cold { cold_at } else { at };
        let id = self.blocks.all.len() as u32;
        for &(patch, stub, jump, target, far, alone) in &sites {
            self.blocks.sites.push(Site {
                patch: address(patch),
                stub: address(stub),
                jump: address(jump),
                target,
                linked: false,
                far,
                alone,
                listed: NONE,
                next: NONE,
                listed_far: false,
                next_far: NONE,
            });
        }
        let mut placed: Box<[Point]> = points.iter().map(|&(l, p)| Point { host: place(l), ..p }).collect();
        placed.sort_by_key(|p| p.host);
        let key = Key { gpa, va: rip, mode };
        let second = second.or(neighbour.filter(|_| reached));
        self.blocks.points += placed.len();
        self.blocks.all.push(Block {
            key,
            second: second.map(|s| (s.va, s.gpa)),
            length: guest_length,
            count: plan[0].items.len() as u32,
            dead: false,
            host: at,
            host_length: length,
            cold: cold_at,
            cold_length,
            checked: at,
            body: at + u64::from(body),
            points: placed,
            reach: if bits == 64 { 0 } else { reach.max(end) },
            relied,
            incoming: NONE,
            moved: homes.moved().into(),
            patches: patches.iter().map(|&(l, p)| Patch { host: place(l), ..p }).collect(),
            seen: 0,
            heat: hot.then_some(Heat { since: started, slots, bounds, taken, entries, lesson }),
        });
        self.blocks.index.insert(key, id);
        for page in [Some(page), second.map(|s| s.page)].into_iter().flatten() {
            self.enlist(id, page);
        }
        if perf_map::is_on() {
            let user = mode & mode::USER != 0;
            perf_map::block([(at, length.into()), (cold_at, cold_length.into())], rip, user);
        }
        self.counters.blocks += 1;
        self.counters.instructions_translated += plan.iter().map(|s| s.items.len() as u64).sum::<u64>();
        self.counters.host_bytes += u64::from(length + cold_length);
        let mut items = plan.swap_remove(0).items;
        items.clear();
        points.clear();
        sites.clear();
        self.scratch = Scratch { items, points, sites };
        self.times.translating += bunshin_core::clock::rdtsc() - started;
        Ok(Some(id))
    }
}

impl Vcpu {
    /// Block `id` depends on `page`, which was claimed.
    fn enlist(&mut self, id: u32, page: usize) {
        self.blocks.by_page.entry(page).or_default().push(id);
    }

    /// Code that runs one copied instruction with its memory operand at the
    /// address in `cpu.tmp`, then leaves. `bytes` are the instruction's.
    pub fn snippet(&mut self, bytes: &[u8], insn: &Instruction) -> u64 {
        let bits = mode::bits(self.mode());
        let mut key = [0u8; 16];
        key[..bytes.len()].copy_from_slice(bytes);
        key[15] = bits as u8;
        let key = u128::from_le_bytes(key);
        if let Some(&at) = self.snippets.get(&key) {
            return at;
        }
        if self.cache.room() < 4096 {
            self.flush_code();
        }
        let mode = self.mode();
        let info = InstructionInfoFactory::new();
        let mut u = Unit { bounce: true, ..Unit::new(self, bytes, (bits, mode), insn.ip(), info) };
        u.generic(&Item::new(*insn, 0, &mut InstructionInfoFactory::new()));
        u.claim_all();
        u.a.jmp_abs(u.v.stubs.snippet_end);
        self.asm = u.a;
        let at = self.asm.put(&mut self.cache);
        self.snippets.insert(key, at);
        at
    }
}

impl<'a> Unit<'a> {
    /// Nothing translated yet, of code in `bytes` that begins at `rip`.
    fn new(
        v: &'a mut Vcpu,
        bytes: &'a [u8],
        (bits, mode): (u32, u32),
        rip: u64,
        info: InstructionInfoFactory,
    ) -> Self {
        let mut a = std::mem::take(&mut v.asm);
        a.clear();
        Self {
            a,
            v,
            bytes,
            base: 0,
            span: 0,
            neighbour: None,
            reached: false,
            bits,
            mode,
            rip,
            order: Vec::new(),
            place: 0,
            at: rip,
            stack: 0,
            homes: Homes::default(),
            pinned_slots: Vec::new(),
            pins: Vec::new(),
            bounds: Vec::new(),
            flags: Flags::Host,
            points: Vec::new(),
            sites: Vec::new(),
            relied: Vec::new(),
            patches: Vec::new(),
            live_out: ALL,
            info,
            probed: false,
            ahead: 0,
            group: None,
            hot: false,
            slots: Vec::new(),
            taken: Vec::new(),
            slots_of: None,
            lesson: Lesson::default(),
            entries: None,
            cache: [None; 3],
            recipe: None,
            items: &[],
            now: 0,
            bounce: false,
            guest: 0,
            code_limit: u64::MAX,
            reach: 0,
        }
    }

    fn wide(&self) -> bool {
        self.bits == 64
    }

    fn stack_size(&self, i: &Instruction) -> u8 {
        match i.stack_pointer_increment().unsigned_abs() {
            n @ (2 | 4 | 8) => n as u8,
            _ => (self.bits / 8) as u8,
        }
    }

    fn offset_of(&self, target: u64) -> Option<usize> {
        let offset = target.wrapping_sub(self.base) as usize;
        (self.mode & mode::BASED == 0 && offset < self.span).then_some(offset)
    }

    /// The translation depends on the bytes of `[from, to)`.
    fn rely(&mut self, from: u64, to: u64) {
        let page = self.rip & !0xfff;
        let (start, end) = (from.wrapping_sub(page) as i64, to.wrapping_sub(page) as i64);
        // In the neighbour any change counts.
        self.reached |= start < 0 || end > 4096;
        if start < 4096 && end > 0 {
            self.relied.push((start.max(0) as u16, end.min(4096) as u16));
        }
    }

    /// Flags that the code after a stretch may read, except at the addresses
    /// `inside`, as far as it lies in the same page.
    fn look_ahead(&mut self, last: &Instruction, crossing: bool, inside: &[u64]) -> u32 {
        let targets = match last.flow_control() {
            FlowControl::UnconditionalBranch | FlowControl::Call if near(last) => {
                [Some(last.near_branch_target()), None]
            }
            FlowControl::ConditionalBranch => [Some(last.near_branch_target()), Some(last.next_ip())],
            FlowControl::Next if !ends(last) => [Some(last.next_ip()), None],
            _ => return ALL,
        };
        if crossing {
            return ALL;
        }
        // What a call returns to is not known here.
        let outside = |t: &u64| last.flow_control() == FlowControl::Call || !inside.contains(t);
        let mut live = 0;
        for t in targets.into_iter().flatten().filter(outside) {
            let Some(off) = self.offset_of(t) else {
                live = ALL;
                continue;
            };
            let mut d = decoder(&self.bytes[off..self.span], self.bits, t);
            let shown = |ip| self.v.debugger.breaks_at(self.v.linear_rip(ip));
            live |= live_ahead(|| (d.can_decode() && !shown(d.ip())).then(|| d.decode()));
            let to = t.wrapping_add(d.position() as u64);
            self.rely(t, to);
        }
        live
    }

    /// Entry for indirect jumps: r8 must be this block's rip. Flags stay.
    fn entry(&mut self) {
        let neg = self.rip.wrapping_neg();
        self.a.mov(S2, RCX);
        if i32::try_from(neg as i64).is_ok() {
            self.a.lea(true, RCX, Some(S0), None, neg as i32);
        } else {
            self.a.mov_imm(RCX, neg);
            self.a.lea(true, RCX, Some(RCX), Some((S0, 1)), 0);
        }
        let same = self.a.jrcxz();
        self.a.mov(RCX, S2);
        self.a.jmp_abs(self.v.stubs.lookup);
        self.a.land(same);
        self.a.mov(RCX, S2);
    }

    /// Flags are looked at where the owner stops.
    fn show_flags(&self, plan: &mut [Stretch]) {
        for item in plan.iter_mut().flat_map(|s| &mut s.items) {
            if self.v.debugger.breaks_at(self.v.linear_rip(item.insn.ip())) {
                item.effect.reads = ALL;
            }
        }
    }

    fn point(&mut self, host_flags: bool) {
        let held = self.cache.map(|c| c.and_then(|(n, dirty)| dirty.then_some(n)));
        let p = Point { host: 0, guest: self.guest, host_flags, held, stack: self.stack };
        self.points.push((self.a.here(), p));
    }

    /// A branch to `target` leaves the code segment, or needs more than the 16 bits
    /// that jumps of 16-bit code are translated for.
    fn strays(&mut self, target: u64) -> bool {
        let most = if self.bits == 16 { self.code_limit.min(0xffff) } else { self.code_limit };
        if target <= most {
            self.reach = self.reach.max(target);
        }
        target > most
    }

    /// Let Rust perform the instruction; comes back here unless it jumps.
    fn helper(&mut self, i: &Instruction) {
        self.helper_by(HelperEntry::new(*i));
    }

    fn helper_by(&mut self, entry: HelperEntry) {
        self.group = None;
        self.settle_stack();
        self.claim_all();
        if self.flags == Flags::Recipe {
            self.flags_to_host(S0, ALL);
        }
        let id = self.v.helpers.len() as u32;
        self.v.helpers.push(entry);
        self.point(false);
        self.leave();
        self.a.mov_imm(S2, u64::from(id));
        let stub = if self.flags == Flags::Host { self.v.stubs.helper } else { self.v.stubs.helper_lazy };
        self.a.call_abs(stub);
        self.arrive();
        self.flags = Flags::Host;
    }

    /// Translate the stretch that is number `n` of the plan.
    fn stretch(&mut self, n: usize, s: &'a Stretch) {
        self.a.bind();
        self.items = &s.items;
        self.place = n;
        self.at = s.ip;
        self.live_out = s.live_out;
        self.flags = Flags::Host;
        self.probed = false;
        self.group = None;
        self.recipe = None;
        self.stack = 0;
        let (mut ended, mut shadow) = (false, false);
        for (n, item) in s.items.iter().enumerate() {
            self.ahead = accesses_ahead(&s.items[n..]);
            self.now = n;
            // What ends the block has no room behind it to look for interrupts.
            if shadow && ends(&item.insn) {
                if crate::interp::wants_helper(&item.insn, self.mode) || item.insn.code() == Code::INVALID {
                    self.leave_shadowed(item.insn.ip());
                    ended = true;
                    break;
                }
                self.window_before(item.insn.ip());
            }
            self.check_early(item);
            ended = self.instruction(item);
            if self.group.as_mut().is_some_and(|g| !g.step(item) || g.left == 0) {
                self.group = None;
            }
            self.recipe = self.recipe_after(item);
            if ended {
                break;
            }
            // STI: one more instruction, then look for interrupts.
            if shadow {
                self.window(item.insn.next_ip());
                ended = true;
                break;
            }
            shadow = item.insn.mnemonic() == M::Sti;
            if shadow && n + 1 == s.items.len() {
                self.leave_shadowed(item.insn.next_ip());
                ended = true;
            }
        }
        if !ended {
            self.claim_all();
            self.flags_to_host(S2, self.live_out);
            self.settle_stack();
            self.exit_to(s.last().next_ip());
        }
    }

    /// Translate one instruction; true if it ended the block.
    fn instruction(&mut self, item: &Item) -> bool {
        let i = &item.insn;
        self.guest = i.ip().wrapping_sub(self.rip) as i16;
        let live_before = item.effect.live_before(item.live_after);
        if self.v.debugger.breaks_at(self.v.linear_rip(i.ip())) {
            self.helper_by(HelperEntry::by(*i, Helper { run: at_owners_breakpoint, outside: true }));
        }
        if self.mode & mode::COUNTED != 0 {
            self.a.store32_imm(at::BEGUN, self.now as u32 + 1);
        }
        if self.mode & mode::DEBUG != 0 && self.v.code_hits(self.v.linear_rip(i.ip())) != 0 {
            let helper = Helper { run: at_breakpoint, outside: false };
            self.helper_by(HelperEntry::by(*i, helper));
        }
        if self.mode & SHUT != 0 && crate::interp::fpu::asks(i, self.mode) {
            self.helper_by(HelperEntry::by(*i, Helper { run: ask, outside: false }));
        }
        if !self.by_generic(i) && i.mnemonic() != M::Lea {
            self.claim_all();
        }
        if !self.by_generic(i) && self.recipe_after(item).is_none() {
            if self.flags == Flags::Recipe {
                self.flags_to_host(S0, ALL);
            }
            self.recipe = None;
        }
        let memory = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory) || i.is_stack_instruction();
        if self.mode & mode::ALIGN != 0 && memory && i.code() != Code::INVALID {
            self.helper(i);
            if ends(i) {
                self.exit_to(i.next_ip());
                return true;
            }
            return false;
        }
        let strays = self.bits != 64 && near(i) && self.strays(i.near_branch_target());
        if let Some(by) = self.moves_stack(item).filter(|by| (self.stack + by).unsigned_abs() < 1 << 20) {
            self.stack += by;
            self.flags = Flags::Dead;
            return false;
        }
        if self.wants_stack(i) {
            self.settle_stack();
        }
        if i.code() == Code::INVALID || strays || crate::interp::wants_helper(i, self.mode) {
            self.helper(i);
            if ends(i) {
                // The helper itself jumps; this is for the ones that fall through.
                self.exit_to(i.next_ip());
                return true;
            }
            return false;
        }
        match i.flow_control() {
            FlowControl::Next => {}
            _ => {
                self.branch(i, live_before);
                return true;
            }
        }
        match i.mnemonic() {
            M::Nop
            | M::Prefetchnta
            | M::Prefetcht0
            | M::Prefetcht1
            | M::Prefetcht2
            | M::Prefetchw
            | M::Prefetch
            | M::Prefetchwt1
            | M::Endbr32
            | M::Endbr64
            | M::Cldemote
            | M::Prefetchit0
            | M::Prefetchit1 => {}
            // Without memory some vendors refuse it.
            M::Reservednop if i.op0_kind() == OpKind::Memory => {}
            // A REX prefix would make it an exchange.
            M::Pause => self.a.b(&[0xf3, 0x90]),
            M::Clflush | M::Clflushopt | M::Clwb => {
                // Nothing to flush, but it faults as a load does. No slot: an empty
                // one needs an access behind it.
                let hot = std::mem::take(&mut self.hot);
                self.probe(Place::Operand(i), 1, false, live_before);
                self.hot = hot;
            }
            M::Lea => self.lea(i),
            M::Inc | M::Dec if short_count(i) => self.count(item),
            M::Push if i.op0_kind() != OpKind::Memory => self.push(i, live_before),
            M::Push => {
                let size = self.stack_size(i);
                self.load_operand(i, live_before, size);
                self.a.store(at::TMP, S0);
                self.push_with(size, live_before, |u, m| {
                    let r = u.scratch_beside(m);
                    u.a.load(r, at::TMP);
                    u.a.store_mem(size, m, r);
                });
            }
            M::Pop if i.op0_kind() == OpKind::Register => self.pop(i, live_before),
            M::Leave => {
                let size = (self.bits / 8) as u8;
                let m = self.probe(Place::Frame, u32::from(size), false, live_before);
                self.a.load_mem(size, S0, m);
                self.a.lea(self.wide(), GSP, Some(5), None, i32::from(size));
                self.stack = 0;
                self.a.mov(5, S0);
            }
            M::Cmc if self.v.plant == Some(Plant::WrongFlag) => {}
            M::Cli => self.a.store8_imm(at::IFLAG, 0),
            M::Sti => {
                self.a.store8_imm(at::IFLAG, 1);
                self.a.store8_imm(at::SHADOW, 1);
            }
            M::Cld => self.a.store8_imm(at::DF, 0),
            M::Std => self.a.store8_imm(at::DF, 1),
            M::Stac => self.a.store8_imm(at::AC, 1),
            M::Clac => {
                self.settle_stack();
                self.flags_to_host(S0, live_before);
                // User pages entered while AC was set must go.
                self.a.store8_imm(at::AC, 0);
                self.a.mov(S0, RCX);
                self.a.load32(RCX, at::KUSER);
                let none = self.a.jrcxz();
                self.a.mov(RCX, S0);
                let flags = self.flags;
                self.helper(i);
                self.flags = flags;
                let done = self.a.jmp_short();
                self.a.land(none);
                self.a.mov(RCX, S0);
                self.a.land(done);
            }
            M::Swapgs => {
                self.a.load(S0, at::seg_base(5));
                self.a.load(S1, at::KERNEL_GS_BASE);
                self.a.store(at::seg_base(5), S1);
                self.a.store(at::KERNEL_GS_BASE, S0);
            }
            M::Rdtsc => {
                self.a.b(&[0x0f, 0x31]);
                self.a.rorx(2, 2, 32);
                self.a.lea(true, RAX, Some(RAX), Some((2, 1)), 0);
                self.a.load(S0, at::TSC_OFFSET);
                self.a.lea(true, RAX, Some(RAX), Some((S0, 1)), 0);
                self.a.rorx(2, RAX, 32);
                self.a.mov32(2, 2);
                self.a.mov32(RAX, RAX);
            }
            M::Rdfsbase | M::Rdgsbase => {
                let n = if i.mnemonic() == M::Rdfsbase { 4 } else { 5 };
                let (to, _) = gpr_number(i.op0_register()).unwrap();
                let h = self.home(to).unwrap_or(S0);
                if i.op0_register().size() == 8 {
                    self.a.load(h, at::seg_base(n));
                } else {
                    self.a.load32(h, at::seg_base(n));
                }
                if self.home(to).is_none() {
                    self.a.store(at::gpr(to), h);
                }
            }
            _ => self.generic(item),
        }
        false
    }
}
