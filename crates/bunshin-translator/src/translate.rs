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
//! Where many accesses follow, `lahf; seto al` saves the flags to `cpu.lazy`
//! once, the first form serves all of them, and `add al, 0x7f; sahf` brings the
//! flags back before they are needed.
use crate::asm::*;
use crate::block::{Block, Key, Point, Site, NONE};
use crate::cpu::{at, HOST, JC, TAG_R, TAG_W};
use crate::flags::{effect, live_ahead, Effect, ALL};
use crate::insn::{decode, decoder, encode, gpr_number, reads, shape, writes, Mem, Parts, Renamed};
use crate::mmu::{Exception, Kind, INFO_PLAIN, INFO_WRITE};
use crate::recipe::Recipe;
use crate::vcpu::{mode, HelperEntry, Vcpu};
use iced_x86::{
    Code, CpuidFeature, DecoderError, FlowControl, Instruction, InstructionInfoFactory, Mnemonic as M,
    OpAccess, OpKind, Register,
};

/// Most guest instructions in a block.
const MOST: usize = 64;

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

/// Where a memory operand is.
#[derive(Clone, Copy)]
enum Place<'i> {
    /// The explicit operand.
    Operand(&'i Instruction),
    /// The explicit operand of BT and its kin, moved by the bit offset.
    Bits(&'i Instruction),
    /// This many bytes below the top of the stack.
    Stack(i32),
    /// At rbp.
    Frame,
}

/// Accesses ahead, up to the next use of the flags, that make saving them worth it.
const MANY_ACCESSES: usize = 4;

struct Item {
    insn: Instruction,
    /// Offset of its bytes in the fetched window.
    at: usize,
    effect: Effect,
    live_after: u32,
    /// How it uses its memory operand.
    access: OpAccess,
    /// General registers that it writes, a bit each.
    writes: u16,
}

impl Item {
    fn new(insn: Instruction, at: usize, factory: &mut InstructionInfoFactory) -> Self {
        let info = factory.info(&insn);
        let access = (0..insn.op_count())
            .find(|&n| insn.op_kind(n) == OpKind::Memory)
            .map_or(OpAccess::None, |n| info.op_access(n));
        let writes = info
            .used_registers()
            .iter()
            .filter(|r| writes(r.access()))
            .filter_map(|r| gpr_number(r.register()))
            .fold(0, |m, g| m | 1 << g.0);
        Self { effect: effect(&insn), insn, at, live_after: ALL, access, writes }
    }
}

/// Neighbouring accesses off one base register that share one probe.
///
/// r10 holds the host address of the lowest byte from the first access to the
/// last; nothing between them may use r10 or change the base by an unknown amount.
#[derive(Clone, Copy, Debug)]
struct Group {
    base: Option<u8>,
    index: Option<(u8, u8)>,
    /// Displacement of the lowest byte, and bytes covered.
    low: i64,
    span: i64,
    /// How far the base register has moved since the probe.
    shift: i64,
    write: bool,
}

/// Most bytes that a group covers: what crosses a page takes the other version.
const SPAN: i64 = 256;
/// How many instructions a group may reach ahead.
const REACH: usize = 24;

/// An access as base, index and displacement.
#[derive(Clone, Copy, Debug)]
struct Spot {
    base: Option<u8>,
    index: Option<(u8, u8)>,
    disp: i64,
    size: i64,
    write: bool,
}

impl Group {
    fn covers(&self, s: &Spot) -> bool {
        let at = s.disp + self.shift - self.low;
        s.base == self.base
            && s.index == self.index
            && at >= 0
            && at + s.size <= self.span
            && (self.write || !s.write)
    }

    /// Follow one instruction: false if the base or index is lost.
    fn step(&mut self, item: &Item) -> bool {
        let i = &item.insn;
        let mut touched = item.writes;
        let base = self.base.map_or(0, |b| 1u16 << b);
        let by = match i.mnemonic() {
            M::Push | M::Pop | M::Call | M::Ret if self.base == Some(4) => {
                // A pop into the stack pointer itself is not a move by 8.
                if i.mnemonic() == M::Pop
                    && i.op0_kind() == OpKind::Register
                    && gpr_number(i.op0_register()) == Some((4, false))
                {
                    return false;
                }
                Some(i64::from(i.stack_pointer_increment()))
            }
            M::Add | M::Sub
                if i.op0_kind() == OpKind::Register
                    && i.op0_register().is_gpr64()
                    && i.op1_kind() != OpKind::Register
                    && i.op1_kind() != OpKind::Memory =>
            {
                let v = i.immediate(1) as i64;
                (v.unsigned_abs() < 0x1_0000).then_some(if i.mnemonic() == M::Add { v } else { -v })
            }
            M::Inc if i.op0_kind() == OpKind::Register && i.op0_register().is_gpr64() => Some(1),
            M::Dec if i.op0_kind() == OpKind::Register && i.op0_register().is_gpr64() => Some(-1),
            _ => None,
        };
        if let Some(by) = by {
            let moved = match i.mnemonic() {
                M::Push | M::Pop | M::Call | M::Ret => 4,
                _ => gpr_number(i.op0_register()).map_or(16, |g| g.0),
            };
            if Some(moved) == self.base {
                self.shift += by;
                touched &= !base;
            }
        }
        let index = self.index.map_or(0, |x| 1u16 << x.0);
        touched & (base | index) == 0 && self.shift.abs() < 0x10_0000
    }
}

/// A block being translated.
struct Unit<'a> {
    v: &'a mut Vcpu,
    a: Asm,
    bytes: &'a [u8],
    bits: u32,
    mode: u32,
    rip: u64,
    flags: Flags,
    points: Vec<(Label, u16, bool)>,
    /// Place of the rel32, the stub, target, whether pages differ, version.
    sites: Vec<(Label, Label, u64, bool, bool)>,
    relied: Vec<(u16, u16)>,
    live_out: u32,
    info: InstructionInfoFactory,
    probed: bool,
    group: Option<Group>,
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
    guest: u16,
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

/// Nothing comes before a page fault of the instruction or takes it away: no
/// mask, no pending x87 exception.
fn faults_plainly(i: &Instruction) -> bool {
    let x87 = i.cpuid_features().iter().any(|f| {
        matches!(f, CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387 | CpuidFeature::MMX)
    });
    let mmx = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_mm());
    !x87 && !mmx && i.op_mask() == Register::None
}

/// Only general registers: such an instruction cannot fault on the host once its
/// memory operand is checked (divisions read all flags).
fn integer_only(i: &Instruction) -> bool {
    let x87 = i.cpuid_features().iter().any(|f| {
        matches!(f, CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387 | CpuidFeature::MMX)
    });
    !x87 && (0..i.op_count()).all(|n| i.op_kind(n) != OpKind::Register || i.op_register(n).is_gpr())
}

/// How a block ends, so far as the decoder can tell.
fn ends(i: &Instruction) -> bool {
    i.flow_control() != FlowControl::Next || i.code() == Code::INVALID || crate::interp::ends_block(i)
}

impl Vcpu {
    /// Translate the block at `rip` in the current mode and return its number.
    ///
    /// With `alone` no accesses share a probe: the version for operands that
    /// cross a page. Fails with the exception that fetching the first
    /// instruction raises.
    pub fn translate(&mut self, rip: u64, alone: bool) -> Result<u32, Exception> {
        let started = bunshin_core::clock::rdtsc();
        let va = self.linear_rip(rip);
        let m = self.walk(va, self.fetcher(), Kind::Fetch)?;
        let gpa = m.gpa | (va & 0xfff);
        let Some(page) = self.phys.page(gpa) else {
            return Err(Exception::gp()); // executing a device: not modelled
        };
        let host = self.phys.host(gpa & !0xfff).unwrap();
        let mode = self.mode() | if alone { mode::ALONE } else { 0 };
        let bits = mode::bits(mode);
        // A copy: what is decoded must be what is written, whoever changes it now.
        let mut window = std::mem::take(&mut self.window);
        window.clear();
        // SAFETY: a page of guest RAM.
        window.extend_from_slice(unsafe { std::slice::from_raw_parts(host as *const u8, 4096) });
        let start = (va & 0xfff) as usize;

        let mut items: Vec<Item> = Vec::with_capacity(16);
        let mut factory = self.factory.take().unwrap_or_else(InstructionInfoFactory::new);
        let mut second = None;
        {
            let mut d = decoder(&window[start..], bits, rip);
            while items.len() < MOST && d.can_decode() {
                let at = start + d.position();
                let insn = d.decode();
                if insn.code() == Code::INVALID && d.last_error() == DecoderError::NoMoreBytes {
                    break;
                }
                let end = ends(&insn);
                items.push(Item::new(insn, at, &mut factory));
                if end {
                    break;
                }
            }
        }
        if items.is_empty() {
            // The first instruction crosses into the next page.
            let next = (va & !0xfff).wrapping_add(4096);
            let m2 = self.walk(next, self.fetcher(), Kind::Fetch)?;
            let mut rest = [0; 16];
            match self.phys.host(m2.gpa) {
                // SAFETY: guest RAM.
                Some(h) => unsafe { std::ptr::copy_nonoverlapping(h as *const u8, rest.as_mut_ptr(), 16) },
                None => return Err(Exception::gp()),
            }
            window.extend_from_slice(&rest);
            second = Some(m2.gpa);
            let insn = decode(&window[start..(start + 15).min(window.len())], bits, rip);
            items.push(Item::new(insn, start, &mut factory));
        }
        let limit = if second.is_some() { window.len() } else { 4096 };
        let mut u = Unit {
            a: std::mem::take(&mut self.asm),
            v: self,
            bytes: &window[..limit],
            bits,
            mode,
            rip,
            flags: Flags::Host,
            points: Vec::with_capacity(32),
            sites: Vec::new(),
            relied: Vec::new(),
            live_out: ALL,
            info: factory,
            probed: false,
            ahead: 0,
            group: None,
            recipe: None,
            items: &[],
            now: 0,
            bounce: false,
            guest: 0,
        };
        u.a.clear();
        u.look_ahead(items.last().map(|i| i.insn).unwrap(), second.is_some());
        let mut live = u.live_out;
        for i in items.iter_mut().rev() {
            i.live_after = live;
            live = i.effect.live_before(live);
        }
        u.entry();
        let body = u.a.here().1;
        let mut ended = false;
        let mut shadow = false;
        u.items = &items;
        for (n, item) in items.iter().enumerate() {
            u.now = n;
            u.ahead = accesses_ahead(&items[n..]);
            ended = u.instruction(item);
            if u.group.as_mut().is_some_and(|g| !g.step(item)) {
                u.group = None;
            }
            u.recipe = u.recipe_after(item);
            if ended {
                break;
            }
            // STI: one more instruction, then look for interrupts.
            if shadow {
                u.window(item.insn.next_ip());
                ended = true;
                break;
            }
            shadow = item.insn.mnemonic() == M::Sti;
            if shadow && n + 1 == items.len() {
                u.window(item.insn.next_ip());
                ended = true;
            }
        }
        let last = items.last().unwrap().insn;
        if !ended {
            u.flags_to_host(S2, u.live_out);
            u.exit_to(last.next_ip());
        }
        let guest_length = (last.next_ip().wrapping_sub(rip) as u16).max(1);
        let Unit { a, points, sites, relied, info, .. } = u;
        self.asm = a;
        self.factory = Some(info);
        self.window = window;
        let at = self.cache.next();
        let length = self.asm.length();
        let out = self.cache.take(length);
        self.asm.finish(at, out);
        let hot = self.asm.hot.len() as u32;
        let place = |l: Label| l.1 + if l.0 == Section::Cold { hot } else { 0 };
        let id = self.blocks.all.len() as u32;
        for (patch, stub, target, far, alone) in sites {
            self.blocks.sites.push(Site {
                patch: at + u64::from(place(patch)),
                stub: at + u64::from(place(stub)),
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
        let mut points: Vec<Point> = points
            .iter()
            .map(|&(l, guest, host_flags)| Point { host: place(l), guest, host_flags })
            .collect();
        points.sort_by_key(|p| p.host);
        let key = Key { gpa, va: rip, mode };
        self.blocks.all.push(Block {
            key,
            second,
            length: guest_length,
            dead: false,
            host: at,
            host_length: length as u32,
            checked: at,
            body: at + u64::from(body),
            points: points.into_boxed_slice(),
            relied,
            incoming: NONE,
        });
        self.blocks.index.insert(key, id);
        for (page, gpa) in
            [Some((page, gpa)), second.and_then(|g| Some((self.phys.page(g)?, g)))].into_iter().flatten()
        {
            self.blocks.by_page.entry(page).or_default().push(id);
            if !self.phys.code[page] {
                let host = self.phys.host(gpa & !0xfff).unwrap();
                self.protect_page(page, host);
            }
        }
        self.counters.blocks += 1;
        self.counters.instructions_translated += items.len() as u64;
        self.counters.host_bytes += length as u64;
        self.counters.translate_ticks += bunshin_core::clock::rdtsc() - started;
        Ok(id)
    }
}

impl Vcpu {
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
        let mut u = Unit {
            a: std::mem::take(&mut self.asm),
            v: self,
            bytes,
            bits,
            mode,
            rip: insn.ip(),
            flags: Flags::Host,
            points: Vec::new(),
            sites: Vec::new(),
            relied: Vec::new(),
            live_out: ALL,
            info: InstructionInfoFactory::new(),
            probed: false,
            ahead: 0,
            group: None,
            recipe: None,
            items: &[],
            now: 0,
            bounce: true,
            guest: 0,
        };
        u.a.clear();
        u.generic(&Item::new(*insn, 0, &mut InstructionInfoFactory::new()));
        u.a.jmp_abs(u.v.stubs.snippet_end);
        self.asm = u.a;
        let at = self.cache.next();
        let length = self.asm.length();
        let out = self.cache.take(length);
        self.asm.finish(at, out);
        self.snippets.insert(key, at);
        at
    }
}

impl Unit<'_> {
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
        let base = self.rip & !0xfff;
        (self.mode & mode::BASED == 0 && target & !0xfff == base).then_some((target & 0xfff) as usize)
    }

    /// Flags that the code after this block may read, as far as it lies in the
    /// same page.
    fn look_ahead(&mut self, last: Instruction, crossing: bool) {
        let mut targets: Vec<u64> = Vec::new();
        match last.flow_control() {
            FlowControl::UnconditionalBranch | FlowControl::Call if near(&last) => {
                targets.push(last.near_branch_target());
            }
            FlowControl::ConditionalBranch => {
                targets.push(last.near_branch_target());
                targets.push(last.next_ip());
            }
            FlowControl::Next if !ends(&last) => targets.push(last.next_ip()),
            _ => return,
        }
        if crossing {
            return;
        }
        let mut live = 0;
        for t in targets {
            let Some(off) = self.offset_of(t) else {
                live = ALL;
                continue;
            };
            let mut d = decoder(&self.bytes[off..], self.bits, t);
            live |= live_ahead(|| d.can_decode().then(|| d.decode()));
            self.relied.push((off as u16, (off + d.position()) as u16));
        }
        self.live_out = live;
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

    fn point(&mut self, host_flags: bool) {
        let l = self.a.here();
        self.points.push((l, self.guest, host_flags));
    }

    // --- flags ---------------------------------------------------------------

    /// Keep the flags in memory from here on.
    fn flags_to_lazy(&mut self) {
        self.a.mov(S0, RAX);
        self.a.lahf_seto();
        self.a.store32(at::LAZY, RAX);
        self.a.mov(RAX, S0);
        self.flags = Flags::Lazy;
    }

    /// r10 for other use than the group's.
    fn take_s2(&mut self) -> u8 {
        self.group = None;
        S2
    }

    /// The first of `free`, which it leaves.
    fn take(&mut self, free: &mut &[u8]) -> u8 {
        let r = free[0];
        *free = &free[1..];
        if r == S2 {
            self.group = None;
        }
        r
    }

    /// A scratch register that `m` does not use.
    fn scratch_beside(&mut self, m: Mem) -> u8 {
        if m.base == S2 {
            S0
        } else {
            self.take_s2()
        }
    }

    fn flags_to_host(&mut self, scratch: u8, live: u32) {
        if self.flags == Flags::Lazy && live != 0 {
            self.a.mov(scratch, RAX);
            self.a.load32(RAX, at::LAZY);
            self.a.sahf_of();
            self.a.mov(RAX, scratch);
        }
        if let (Flags::Recipe, Some(r), true) = (self.flags, self.recipe, live != 0) {
            r.emit(&mut self.a, scratch);
        }
        if live != 0 {
            self.flags = Flags::Host;
        }
    }

    /// The recipe after `item`, which may have set the flags itself.
    fn recipe_after(&self, item: &Item) -> Option<Recipe> {
        if item.effect.writes != 0 {
            return Recipe::of(&item.insn, &item.effect);
        }
        let stack = match item.insn.mnemonic() {
            M::Push | M::Pop | M::Call | M::Ret => Some(i64::from(item.insn.stack_pointer_increment())),
            _ => None,
        };
        // A pop into the stack pointer is no move by a constant.
        let stack = stack.filter(|_| {
            item.insn.mnemonic() != M::Pop
                || item.insn.op0_kind() == OpKind::Register
                    && gpr_number(item.insn.op0_register()) != Some((4, false))
        });
        self.recipe?.after(item.writes, stack)
    }

    /// The instruction is copied, so that flags can be brought back between its
    /// probe and itself.
    fn by_generic(&self, i: &Instruction) -> bool {
        i.flow_control() == FlowControl::Next
            && !matches!(
                i.mnemonic(),
                M::Lea | M::Push | M::Pop | M::Leave | M::Rdtsc | M::Rdfsbase | M::Rdgsbase
            )
    }

    /// Flags that only the recipe has, and that `item` makes it lose.
    fn loses_recipe(&self, item: &Item) -> bool {
        self.flags == Flags::Recipe
            && item.live_after & !item.effect.kills != 0
            && item.effect.kills != ALL
            && (item.effect.writes != 0 || self.recipe_after(item).is_none())
    }

    // --- memory --------------------------------------------------------------

    /// A guest register's value in some host register, loading it to `scratch`
    /// if it is kept in memory.
    fn use_gpr(&mut self, n: u8, scratch: u8) -> u8 {
        pinned(n).unwrap_or_else(|| {
            self.a.load(scratch, at::gpr(n));
            scratch
        })
    }

    /// The linear address of the memory operand into r8 (uses r9). Gives the
    /// address if it is a constant.
    fn address(&mut self, i: &Instruction, from: i32) -> Option<u64> {
        let seg = i.memory_segment();
        let seg_base = match seg {
            Register::FS => Some(4),
            Register::GS => Some(5),
            _ if self.bits == 64 || self.mode & mode::BASED == 0 => None,
            Register::ES => Some(0),
            Register::CS => Some(1),
            Register::SS => Some(2),
            _ => Some(3),
        };
        let base = i.memory_base();
        let index = i.memory_index();
        let disp = i.memory_displacement64();
        let size = if base != Register::None { base.size() } else { index.size() };
        let mut constant = None;
        if base == Register::None && index == Register::None || i.is_ip_rel_memory_operand() {
            let v = if self.bits == 64 { disp } else { disp & 0xffff_ffff };
            constant = Some(v);
            self.a.mov_imm(S0, v);
        } else {
            let b = gpr_number(base).map(|(n, _)| self.use_gpr(n, S0));
            let x = gpr_number(index).map(|(n, _)| (self.use_gpr(n, S1), i.memory_index_scale() as u8));
            // 16-bit addresses wrap at 64 KiB and the displacement is one of 16 bits
            let disp = if size == 2 { disp as i16 as i32 } else { (disp as i32).wrapping_add(from) };
            let wide = size == 8 && self.bits == 64;
            self.a.lea(wide, S0, b, x, disp);
            if size == 2 {
                self.a.movzx16(S0, S0);
            }
        }
        if let Some(n) = seg_base {
            self.a.load(S1, at::seg_base(n));
            self.a.lea(self.bits == 64, S0, Some(S0), Some((S1, 1)), 0);
            return None;
        }
        constant
    }

    /// The address `from` bytes past an operand into r8; uses r9 (and r10 for
    /// bit strings).
    fn locate(&mut self, place: Place, from: i64) -> Option<u64> {
        let from = from as i32;
        match place {
            Place::Operand(i) => return self.address(i, from),
            Place::Bits(i) => self.bit_address(i),
            Place::Stack(below) => self.stack_slot(GSP, from - below),
            Place::Frame => self.stack_slot(5, from),
        }
        None
    }

    /// The host address of an operand of `size` bytes; `live` are the flags
    /// that must survive. It is `[r8 + r9]`, or `[r10 + n]` inside a group; the
    /// other scratch registers are free afterwards.
    fn probe(&mut self, place: Place, size: u32, write: bool, live: u32) -> Mem {
        self.ahead = self.ahead.saturating_sub(1);
        let spot = self.spot(place, size, write);
        if let (Some(s), Some(g)) = (spot, self.group) {
            if g.covers(&s) {
                return Mem { base: S2, index: None, disp: (s.disp + g.shift - g.low) as i32 };
            }
        }
        let start = spot.filter(|_| self.group.is_none()).and_then(|s| self.gather(s));
        if self.flags == Flags::Host && live != 0 {
            if self.recipe.is_some() {
                self.flags = Flags::Recipe;
            } else if self.ahead + 1 >= MANY_ACCESSES || self.group.is_some() {
                self.flags_to_lazy();
            }
        }
        let keep = self.flags == Flags::Host && live != 0;
        if self.flags == Flags::Host && live == 0 {
            self.flags = Flags::Dead;
        }
        self.probed = true;
        match start {
            None => {
                self.check(place, (0, size.into()), write, keep, false);
                Mem { base: S0, index: Some(S1), disp: 0 }
            }
            Some(g) => {
                let s = spot.unwrap();
                self.check(place, (g.low - s.disp, g.span), g.write, keep, true);
                self.a.lea(true, S2, Some(S0), Some((S1, 1)), 0);
                self.group = Some(g);
                // Where the whole does not fit, go on with a version of the rest
                // that probes one by one.
                self.a.section(Section::Cold);
                if self.flags == Flags::Lazy && live != 0 {
                    self.a.mov(S0, RAX);
                    self.a.load32(RAX, at::LAZY);
                    self.a.sahf_of();
                    self.a.mov(RAX, S0);
                }
                let target = self.items[self.now].insn.ip();
                let stub = Label(Section::Cold, self.a.here().1 + 5);
                self.a.jmp(stub);
                self.site_stub(Label(Section::Cold, stub.1 - 4), stub, target, true);
                self.a.section(Section::Hot);
                Mem { base: S2, index: None, disp: (s.disp - g.low) as i32 }
            }
        }
    }

    /// Emit the check that `span` bytes from `place + from` can be accessed;
    /// leaves their host address as r8 + r9. With a span of a group, cold code
    /// falls through where that is not so.
    fn check(&mut self, place: Place, (from, span): (i64, i64), write: bool, keep: bool, grouped: bool) {
        let tag = if write { TAG_W } else { TAG_R };
        let retry = self.a.here();
        let slot = self.locate(place, from).map(|c| 8 * ((c >> 12) as u32 & 0xffff));
        if slot.is_none() {
            self.a.rorx(S1, S0, 12);
            self.a.movzx16(S1, S1);
        }
        let cold = Label(Section::Cold, self.a.cold.len() as u32);
        if keep {
            match slot {
                Some(n) => self.a.load(S2, tag + n),
                None => self.a.load_indexed(S2, S1, tag),
            }
            self.a.lea(true, S0, Some(S0), Some((S2, 1)), 0);
            self.host_page(slot);
            self.a.mov(S2, RCX);
            self.a.lea(true, RCX, Some(S0), None, span as i32 - 1);
            self.a.pext_gs(RCX, RCX, at::PAGES);
            let hit = self.a.jrcxz();
            self.a.jmp(cold);
            self.a.land(hit);
            self.a.mov(RCX, S2);
        } else {
            match slot {
                Some(n) => self.a.add_gs(S0, tag + n),
                None => self.a.add_indexed(S0, S1, tag),
            }
            self.a.cmp_imm(S0, 4096 - span as i32);
            self.a.jcc(7, cold);
            self.host_page(slot);
        }
        self.a.section(Section::Cold);
        self.point(false);
        if keep {
            self.a.mov(RCX, S2);
        }
        // Out of the way the flags can be made exact, for the frame of a fault too.
        let recipe = self.recipe.filter(|_| matches!(self.flags, Flags::Recipe | Flags::Dead));
        if let Some(r) = recipe {
            r.emit(&mut self.a, S0);
        }
        let keep = keep || recipe.is_some();
        self.locate(place, from);
        let plain =
            span < 16 && !grouped && self.items.get(self.now).is_some_and(|i| faults_plainly(&i.insn));
        let mut info = span as u32;
        if write {
            info |= INFO_WRITE;
        }
        if plain {
            info |= INFO_PLAIN;
        }
        self.a.mov_imm(S1, info.into());
        let stubs = self.v.stubs;
        self.a.call_abs(match (grouped, keep) {
            (false, false) => stubs.miss,
            (false, true) => stubs.miss_flags,
            (true, false) => stubs.miss_group,
            (true, true) => stubs.miss_group_flags,
        });
        self.a.jmp(retry);
        self.a.section(Section::Hot);
    }

    /// The access as base, index and displacement, if it has that form.
    fn spot(&self, place: Place, size: u32, write: bool) -> Option<Spot> {
        if self.bits != 64 || self.bounce || self.mode & mode::ALONE != 0 {
            return None;
        }
        let size = i64::from(size);
        Some(match place {
            Place::Stack(below) => Spot { base: Some(4), index: None, disp: -i64::from(below), size, write },
            Place::Frame => Spot { base: Some(5), index: None, disp: 0, size, write },
            Place::Operand(i) => {
                let (base, index) = (i.memory_base(), i.memory_index());
                if i.is_ip_rel_memory_operand()
                    || matches!(i.memory_segment(), Register::FS | Register::GS)
                    || base == Register::None
                    || !base.is_gpr64()
                    || index != Register::None && !index.is_gpr64()
                {
                    return None;
                }
                let index = gpr_number(index).map(|g| (g.0, i.memory_index_scale() as u8));
                let disp = i.memory_displacement64() as i64;
                Spot { base: gpr_number(base).map(|g| g.0), index, disp, size, write }
            }
            Place::Bits(_) => return None,
        })
    }

    /// What the instructions from here on access off the same base; None if
    /// nothing joins `first`.
    fn gather(&self, first: Spot) -> Option<Group> {
        let (mut low, mut high, mut count, mut write) = (first.disp, first.disp + first.size, 0, first.write);
        let mut g = Group { base: first.base, index: first.index, low: 0, span: 0, shift: 0, write: false };
        for (n, item) in self.items[self.now..].iter().take(REACH).enumerate() {
            let i = &item.insn;
            if i.code() == Code::INVALID || crate::interp::wants_helper(i, self.mode) {
                break;
            }
            for s in self.spots(item).into_iter().flatten() {
                if s.base != first.base || s.index != first.index {
                    continue;
                }
                let at = s.disp + g.shift;
                let (l, h) = (low.min(at), high.max(at + s.size));
                if h - l > SPAN {
                    continue;
                }
                (low, high, write) = (l, h, write || s.write);
                count += 1;
            }
            let _ = n;
            if i.flow_control() != FlowControl::Next || !g.step(item) {
                break;
            }
        }
        (count >= 2).then_some(Group { low, span: high - low, shift: 0, write, ..g })
    }

    /// The accesses of one instruction, in order.
    fn spots(&self, item: &Item) -> [Option<Spot>; 2] {
        let i = &item.insn;
        let word = 8;
        let explicit = if item.access == OpAccess::None || crate::interp::bit_string(i) {
            None
        } else {
            let size = i.memory_size().size() as u32;
            (size > 0 && size <= 64)
                .then(|| self.spot(Place::Operand(i), size, writes(item.access)))
                .flatten()
        };
        let stack = match i.mnemonic() {
            M::Push => {
                self.spot(Place::Stack(i32::from(self.stack_size(i))), self.stack_size(i).into(), true)
            }
            M::Call => self.spot(Place::Stack(word), 8, true),
            M::Pop => self.spot(Place::Stack(0), self.stack_size(i).into(), false),
            M::Ret => self.spot(Place::Stack(0), 8, false),
            M::Leave => self.spot(Place::Frame, 8, false),
            _ => None,
        };
        [explicit, stack]
    }

    fn host_page(&mut self, slot: Option<u32>) {
        match slot {
            Some(n) => self.a.load(S1, HOST + n),
            None => self.a.load_indexed(S1, S1, HOST),
        }
    }

    /// Address `[reg + disp]` in the stack segment, into r8.
    fn stack_slot(&mut self, reg: u8, disp: i32) {
        self.a.lea(self.wide(), S0, Some(reg), None, disp);
        if self.mode & mode::BASED != 0 && self.bits != 64 {
            self.a.load(S1, at::seg_base(2));
            self.a.lea(false, S0, Some(S0), Some((S1, 1)), 0);
        }
    }

    fn move_stack(&mut self, by: i32) {
        self.a.lea(self.wide(), GSP, Some(GSP), None, by);
    }

    /// Push what `put` stores.
    fn push_with(&mut self, size: u8, live: u32, put: impl FnOnce(&mut Self, Mem)) {
        let m = self.probe(Place::Stack(size.into()), size.into(), true, live);
        put(self, m);
        self.move_stack(-i32::from(size));
    }

    /// Pop into r8, without moving the stack pointer.
    fn pop_to_s0(&mut self, size: u8, live: u32) {
        let m = self.probe(Place::Stack(0), size.into(), false, live);
        self.a.load_mem(size, S0, m);
    }

    fn push_const(&mut self, size: u8, v: u64, live: u32) {
        self.push_with(size, live, |u, m| {
            if size < 8 || i32::try_from(v as i64).is_ok() {
                u.a.store_mem_imm(size, m, v as i32);
            } else {
                let r = u.scratch_beside(m);
                u.a.mov_imm(r, v);
                u.a.store_mem(size, m, r);
            }
        });
    }

    // --- ways out ------------------------------------------------------------

    /// A jump that can be linked: `hot` writes the jump at a place whose rel32
    /// is the site.
    fn site(&mut self, target: u64) {
        let cold = Label(Section::Cold, self.a.cold.len() as u32);
        self.a.jmp(cold);
        let Label(s, n) = self.a.here();
        self.a.section(Section::Cold);
        self.site_stub(Label(s, n - 4), cold, target, false);
        self.a.section(Section::Hot);
    }

    /// Where the site with its rel32 at `patch` goes while it is not linked;
    /// `stub` is here.
    fn site_stub(&mut self, patch: Label, stub: Label, target: u64, alone: bool) {
        let far = !self.same_page(target);
        self.sites.push((patch, stub, target, far, alone));
        let id = (self.v.blocks.sites.len() + self.sites.len() - 1) as u32;
        self.a.mov_imm(S0, target);
        self.a.mov_imm(S2, u64::from(id));
        self.a.jmp_abs(self.v.stubs.link);
    }

    /// In this block's page, so that it moves only with it.
    fn same_page(&self, target: u64) -> bool {
        self.mode & mode::BASED == 0 && target & !0xfff == self.rip & !0xfff
    }

    /// Supervisor text keeps its place; when any of it moves, `unlink_far`
    /// undoes links between pages. User pages differ from process to process.
    fn linkable(&self, target: u64) -> bool {
        self.same_page(target) || self.mode & mode::USER == 0
    }

    /// A linked jump backwards in a block that an event would not stop: every
    /// loop has one that looks.
    fn turns(&self, target: u64) -> bool {
        !self.probed && target <= self.rip && self.linkable(target)
    }

    /// Go on at a known address; flags are in the host.
    fn exit_to(&mut self, target: u64) {
        let target = self.cut(target);
        if self.turns(target) {
            self.poll(target);
        }
        if self.linkable(target) {
            self.site(target);
        } else {
            self.a.mov_imm(S0, target);
            self.a.jmp_gs(JC + 8 * (target as u32 & 0xffff));
        }
    }

    /// A loop without memory accesses must still hear of events. Flags stay.
    fn poll(&mut self, target: u64) {
        self.a.mov(S0, RCX);
        self.a.load32(RCX, at::PENDING);
        let quiet = self.a.jrcxz();
        self.a.mov(RCX, S0);
        self.a.mov_imm(S0, target);
        self.a.jmp_abs(self.v.stubs.event);
        self.a.land(quiet);
        self.a.mov(RCX, S0);
    }

    /// After an interrupt shadow: deliver what waits, else go on at `target`.
    fn window(&mut self, target: u64) {
        self.flags_to_host(S2, ALL);
        self.a.store8_imm(at::SHADOW, 0);
        self.a.mov(S0, RCX);
        self.a.load8(RCX, at::IRQ_WAITING);
        let quiet = self.a.jrcxz();
        self.a.mov(RCX, S0);
        self.a.mov_imm(S0, target);
        self.a.jmp_abs(self.v.stubs.event);
        self.a.land(quiet);
        self.a.mov(RCX, S0);
        self.exit_to(target);
    }

    /// Jump to the address in r8; flags are in the host.
    fn exit_indirect(&mut self) {
        self.a.movzx16(S1, S0);
        self.a.jmp_gs_indexed(S1, JC);
    }

    fn cut(&self, v: u64) -> u64 {
        match self.bits {
            64 => v,
            32 => v & 0xffff_ffff,
            _ => v & 0xffff,
        }
    }

    /// Let Rust perform the instruction; comes back here unless it jumps.
    fn helper(&mut self, i: &Instruction) {
        self.group = None;
        if self.flags == Flags::Recipe {
            self.flags_to_host(S0, ALL);
        }
        let id = self.v.helpers.len() as u32;
        self.v.helpers.push(HelperEntry::new(*i));
        self.point(false);
        self.a.mov_imm(S2, u64::from(id));
        let stub = if self.flags == Flags::Host { self.v.stubs.helper } else { self.v.stubs.helper_lazy };
        self.a.call_abs(stub);
        self.flags = Flags::Host;
    }

    // --- instructions ----------------------------------------------------------

    /// Translate one instruction; true if it ended the block.
    fn instruction(&mut self, item: &Item) -> bool {
        let i = &item.insn;
        self.guest = i.ip().wrapping_sub(self.rip) as u16;
        let live_before = item.effect.live_before(item.live_after);
        if !self.by_generic(i) && self.recipe_after(item).is_none() {
            if self.flags == Flags::Recipe {
                self.flags_to_host(S0, ALL);
            }
            self.recipe = None;
        }
        if i.code() == Code::INVALID || crate::interp::wants_helper(i, self.mode) {
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
                // Nothing to flush, but it faults as a load does.
                self.probe(Place::Operand(i), 1, false, live_before);
            }
            M::Lea => self.lea(i),
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
                self.a.mov(5, S0);
            }
            M::Cli => self.a.store8_imm(at::IFLAG, 0),
            M::Sti => {
                self.a.store8_imm(at::IFLAG, 1);
                self.a.store8_imm(at::SHADOW, 1);
            }
            M::Cld => self.a.store8_imm(at::DF, 0),
            M::Std => self.a.store8_imm(at::DF, 1),
            M::Stac => self.a.store8_imm(at::AC, 1),
            M::Clac => {
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
                let h = pinned(to).unwrap_or(S0);
                if i.op0_register().size() == 8 {
                    self.a.load(h, at::seg_base(n));
                } else {
                    self.a.load32(h, at::seg_base(n));
                }
                if pinned(to).is_none() {
                    self.a.store(at::gpr(to), h);
                }
            }
            _ => self.generic(item),
        }
        false
    }

    fn push(&mut self, i: &Instruction, live: u32) {
        let size = self.stack_size(i);
        match i.op0_kind() {
            OpKind::Register => {
                let (n, _) = gpr_number(i.op0_register()).unwrap();
                self.push_with(size, live, |u, m| {
                    let r = pinned(n).unwrap_or_else(|| {
                        let r = u.scratch_beside(m);
                        u.a.load(r, at::gpr(n));
                        r
                    });
                    u.a.store_mem(size, m, r);
                });
            }
            _ => {
                let v = i.immediate(0);
                self.push_const(size, v, live);
            }
        }
    }

    fn pop(&mut self, i: &Instruction, live: u32) {
        let size = self.stack_size(i);
        let (n, _) = gpr_number(i.op0_register()).unwrap();
        if let Some(h) = pinned(n).filter(|_| n != 4 && size >= 4) {
            let m = self.probe(Place::Stack(0), size.into(), false, live);
            self.a.load_mem(size, h, m);
            self.move_stack(i32::from(size));
            return;
        }
        self.pop_to_s0(size, live);
        self.move_stack(i32::from(size));
        match pinned(n) {
            Some(h) if size >= 4 => self.a.mov(h, S0),
            // mov h16, r8w
            Some(h) => self.a.b(&[0x66, 0x44 | (h >> 3), 0x89, 0xc0 | (h & 7)]),
            None if size >= 4 => self.a.store(at::gpr(n), S0),
            None => {
                self.a.load(S1, at::gpr(n));
                self.a.b(&[0x66, 0x45, 0x89, 0xc1]); // mov r9w, r8w
                self.a.store(at::gpr(n), S1);
            }
        }
    }

    fn lea(&mut self, i: &Instruction) {
        let (n, _) = gpr_number(i.op0_register()).unwrap();
        let size = i.op0_register().size();
        let base = i.memory_base();
        let index = i.memory_index();
        let address = if base != Register::None { base.size() } else { index.size() };
        let to = pinned(n).unwrap_or(S0);
        let disp = i.memory_displacement64();
        if base == Register::None && index == Register::None || i.is_ip_rel_memory_operand() {
            let v = if size == 8 { disp } else { disp & 0xffff_ffff };
            let v = if self.bits == 64 { v } else { v & 0xffff_ffff };
            if size == 2 {
                self.a.mov_imm(S1, v & 0xffff);
                self.low16(n, S1);
                return;
            }
            self.a.mov_imm(to, v);
        } else {
            let b = gpr_number(base).map(|(n, _)| self.use_gpr(n, S0));
            let x = gpr_number(index).map(|(n, _)| (self.use_gpr(n, S1), i.memory_index_scale() as u8));
            let disp = if address == 2 { disp as i16 as i32 } else { disp as i32 };
            let wide = size == 8 && address == 8;
            if size == 2 || address == 2 {
                self.a.lea(false, S1, b, x, disp);
                if size == 2 {
                    self.low16(n, S1);
                    return;
                }
                self.a.movzx16(to, S1);
            } else {
                self.a.lea(wide, to, b, x, disp);
            }
        }
        if pinned(n).is_none() {
            self.a.store(at::gpr(n), to);
        }
    }

    /// Low 16 bits of guest register `n` from r9.
    fn low16(&mut self, n: u8, _from: u8) {
        match pinned(n) {
            Some(h) => self.a.b(&[0x66, 0x44 | (h >> 3), 0x89, 0xc8 | (h & 7)]), // mov h16, r9w
            None => {
                self.a.load(S0, at::gpr(n));
                self.a.b(&[0x66, 0x45, 0x89, 0xc8]); // mov r8w, r9w
                self.a.store(at::gpr(n), S0);
            }
        }
    }

    /// Load the memory operand, `size` bytes, into r8.
    fn load_operand(&mut self, i: &Instruction, live: u32, size: u8) {
        let m = self.probe(Place::Operand(i), u32::from(size), false, live);
        self.a.load_mem(size, S0, m);
    }

    fn branch(&mut self, i: &Instruction, live: u32) {
        let size = (self.bits / 8) as u8;
        // Calls and returns move the stack pointer, maybe the recipe's register.
        let after = self.recipe_after(&self.items[self.now]);
        match i.flow_control() {
            FlowControl::UnconditionalBranch => {
                self.flags_to_host(S2, self.live_out);
                self.exit_to(i.near_branch_target());
            }
            FlowControl::ConditionalBranch => {
                let target = self.cut(i.near_branch_target());
                let through = self.cut(i.next_ip());
                match i.mnemonic() {
                    M::Jcxz | M::Jecxz | M::Jrcxz | M::Loop | M::Loope | M::Loopne => {
                        self.flags_to_host(S2, ALL);
                        self.counted(i, target, through);
                    }
                    _ => {
                        self.flags_to_host(S2, ALL);
                        if self.turns(target) {
                            // keep the poll off the way that falls through
                            let cc = i.condition_code() as u8 - 1;
                            let taken = self.a.jcc_short(cc ^ 1);
                            self.exit_to(target);
                            self.a.land(taken);
                        } else {
                            let cc = i.condition_code() as u8 - 1;
                            self.conditional(cc, target);
                        }
                        self.exit_to(through);
                    }
                }
            }
            FlowControl::Call => {
                let target = self.cut(i.near_branch_target());
                self.push_const(size, i.next_ip(), live);
                self.recipe = after;
                self.flags_to_host(S2, self.live_out);
                self.exit_to(target);
            }
            FlowControl::Return => {
                self.pop_to_s0(size, live);
                let extra = if i.op_count() > 0 && i.op0_kind() == OpKind::Immediate16 {
                    i32::from(i.immediate16())
                } else {
                    0
                };
                self.move_stack(i32::from(size) + extra);
                self.recipe = after;
                self.flags_to_host(S2, ALL);
                self.exit_indirect();
            }
            FlowControl::IndirectBranch => {
                self.indirect_target(i, live, size);
                self.flags_to_host(S2, ALL);
                self.exit_indirect();
            }
            FlowControl::IndirectCall => {
                self.indirect_target(i, live, size);
                self.a.store(at::TMP, S0);
                self.push_const(size, i.next_ip(), live);
                self.recipe = after;
                self.a.load(S0, at::TMP);
                self.flags_to_host(S2, ALL);
                self.exit_indirect();
            }
            _ => unreachable!("{i}"),
        }
    }

    fn indirect_target(&mut self, i: &Instruction, live: u32, size: u8) {
        if i.op0_kind() == OpKind::Memory {
            self.load_operand(i, live, size);
        } else {
            let (n, _) = gpr_number(i.op0_register()).unwrap();
            let r = self.use_gpr(n, S0);
            if self.wide() {
                self.a.mov(S0, r);
            } else {
                self.a.mov32(S0, r);
            }
        }
    }

    /// `jcc` to `target`, linked if it can be.
    fn conditional(&mut self, cc: u8, target: u64) {
        let cold = Label(Section::Cold, self.a.cold.len() as u32);
        self.a.jcc(cc, cold);
        let Label(s, n) = self.a.here();
        if self.linkable(target) {
            self.a.section(Section::Cold);
            self.site_stub(Label(s, n - 4), cold, target, false);
        } else {
            self.a.section(Section::Cold);
            self.a.mov_imm(S0, target);
            self.a.jmp_gs(JC + 8 * (target as u32 & 0xffff));
        }
        self.a.section(Section::Hot);
    }

    /// LOOPcc and JrCXZ, whose conditions leave the flags alone.
    fn counted(&mut self, i: &Instruction, target: u64, through: u64) {
        let m = i.mnemonic();
        let wide = matches!(
            i.code(),
            Code::Jrcxz_rel8_64 | Code::Loop_rel8_64_RCX | Code::Loope_rel8_64_RCX | Code::Loopne_rel8_64_RCX
        );
        let zero = |a: &mut Asm| {
            if !wide {
                a.b(&[0x67]);
            }
            a.jrcxz()
        };
        if matches!(m, M::Jecxz | M::Jrcxz | M::Jcxz) {
            let taken = zero(&mut self.a);
            self.exit_to(through);
            self.a.land(taken);
            self.exit_to(target);
            return;
        }
        self.a.lea(wide, RCX, Some(RCX), None, -1);
        let done = zero(&mut self.a);
        let other = match m {
            M::Loope => Some(self.a.jcc_short(5)),
            M::Loopne => Some(self.a.jcc_short(4)),
            _ => None,
        };
        self.exit_to(target);
        self.a.land(done);
        if let Some(o) = other {
            self.a.land(o);
        }
        self.exit_to(through);
    }

    /// Copy the instruction with its registers renamed and its memory operand
    /// behind a probe.
    fn generic(&mut self, item: &Item) {
        let i = &item.insn;
        let bytes = &self.bytes[item.at..item.at + i.len()];
        let live_before = item.effect.live_before(item.live_after);
        let s = shape(i.code());
        let has_mem = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory)
            || matches!(i.mnemonic(), M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu | M::Xlatb);
        let p = match Parts::of(i, bytes, self.bits) {
            Some(p) if !s.vsib => p,
            _ => return self.helper(i),
        };
        if has_mem && p.modrm().is_none() && !self.bounce {
            return self.moffs(i, live_before);
        }
        let bit_string = crate::interp::bit_string(i);
        let mut to = Renamed::default();
        let high = (0..i.op_count())
            .find(|&n| i.op_kind(n) == OpKind::Register && gpr_number(i.op_register(n)).is_some_and(|g| g.1));
        let (mut swap, mut copy) = (None, false);
        if has_mem && self.bounce {
            self.a.load(S0, at::TMP);
            self.a.mov_imm(S1, 0);
            to.mem = Some(Mem { base: S0, index: Some(S1), disp: 0 });
        } else if has_mem {
            let size = i.memory_size().size() as u32;
            let access = item.access;
            if size == 0
                || size > 64
                || access == OpAccess::None
                || matches!(i.mnemonic(), M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu)
            {
                return self.helper(i);
            }
            let place = if bit_string {
                // Short addresses wrap with the offset added.
                if i.op1_register().size() == 2 || 8 * crate::interp::address_size(i) < self.bits as usize {
                    return self.helper(i);
                }
                Place::Bits(i)
            } else {
                Place::Operand(i)
            };
            to.mem = Some(self.probe(place, size, writes(access), live_before));
        }
        if let Some(n) = high {
            let extended = (0..i.op_count()).any(|n| {
                i.op_kind(n) == OpKind::Register && gpr_number(i.op_register(n)) == Some((4, false))
            });
            if has_mem || extended {
                // A high byte cannot be named beside r8-r15: read a copy, or
                // swap it with the low byte around the instruction.
                copy = !writes(self.info.info(i).op_access(n));
                swap = gpr_number(i.op_register(n)).map(|g| g.0).filter(|_| !copy);
            }
        }
        let needs_flags = item.effect.reads
            | if item.effect.writes != 0 { item.live_after & !item.effect.kills } else { 0 };
        // What faults on the host must leave live flags where they can be found.
        let faults = self.flags == Flags::Recipe && !integer_only(i);
        let needs_flags = if faults || self.loses_recipe(item) { ALL } else { needs_flags };
        if needs_flags != 0 && self.flags != Flags::Host {
            let r = to.mem.map_or(S0, |m| self.scratch_beside(m));
            self.flags_to_host(r, needs_flags);
        }
        // Registers kept in memory, through scratch ones.
        let fields = [s.reg, s.rm, s.vvvv, s.opcode];
        let mut free: &[u8] = match to.mem {
            Some(m) if m.base == S2 => &[S0, S1],
            Some(_) => &[S2],
            None => &[S0, S1, S2],
        };
        let mut taken: [(u8, u8, bool); 4] = [(255, 0, false); 4];
        let mut count = 0;
        let mut spilled = fields
            .iter()
            .filter(|&&f| f != 0 && i.op_kind(u32::from(f) - 1) == OpKind::Register)
            .filter_map(|&f| gpr_number(i.op_register(u32::from(f) - 1)))
            .filter(|g| !g.1 && pinned(g.0).is_none())
            .map(|g| g.0);
        let (first, second) = (spilled.next(), spilled.next());
        let two = first.is_some() && second.is_some() && first != second;
        if let Some(m) = to.mem.filter(|m| m.base == S0 && two) {
            // Two of them beside a memory operand: fold the address into one register.
            self.a.lea(true, S0, Some(S0), m.index.map(|x| (x, 1)), 0);
            to.mem = Some(Mem { base: S0, index: None, disp: 0 });
            free = &[S1, S2];
        }
        for (slot, &f) in fields.iter().enumerate() {
            if f == 0 || i.op_kind(u32::from(f) - 1) != OpKind::Register {
                continue;
            }
            let reg = i.op_register(u32::from(f) - 1);
            let Some((n, high_byte)) = gpr_number(reg) else { continue };
            let host = if high_byte {
                if copy {
                    let h = self.take(&mut free);
                    self.a.rorx(h, n, 8);
                    h
                } else if swap.is_some() {
                    n // the low byte of the same register
                } else {
                    n + 4
                }
            } else if let Some(h) = pinned(n) {
                h
            } else if let Some(t) = taken[..count].iter().find(|t| t.0 == n) {
                t.1
            } else {
                let h = self.take(&mut free);
                let (reads_it, writes_it) = self.operand_access(i, n);
                if reads_it || reg.size() < 4 {
                    self.a.load(h, at::gpr(n));
                }
                taken[count] = (n, h, writes_it);
                count += 1;
                h
            };
            // A plain register keeps its own number where nothing changes.
            let keep = !high_byte && host == n;
            let want = if keep && swap.is_none() { None } else { Some(host) };
            match slot {
                0 => to.reg = want,
                1 => to.rm = want,
                2 => to.vvvv = want,
                _ => to.opcode = want,
            }
        }
        if bit_string {
            // The address already holds the upper bits of the offset.
            let from = to.reg.unwrap_or_else(|| gpr_number(i.op1_register()).unwrap().0);
            self.take_s2();
            self.a.pext_gs(S2, from, if i.op1_register().size() == 8 { at::MASK63 } else { at::MASK31 });
            to.reg = Some(S2);
        }
        if let Some(n) = swap {
            // xchg low, high: 86 /r
            self.a.b(&[0x86, 0xc0 | ((n + 4) << 3) | n]);
        }
        self.point(self.flags == Flags::Host);
        let out = self.a.buf();
        encode(&p, bytes, &to, out);
        if let Some(n) = swap {
            self.a.b(&[0x86, 0xc0 | ((n + 4) << 3) | n]);
        }
        for &(n, h, written) in &taken[..count] {
            if written {
                self.a.store(at::gpr(n), h);
            }
        }
        if item.effect.writes != 0 {
            self.flags = Flags::Host;
        }
    }

    /// MOV between the accumulator and a full address.
    fn moffs(&mut self, i: &Instruction, live: u32) {
        let size = i.memory_size().size() as u8;
        let load = i.op0_kind() == OpKind::Register;
        let m = self.probe(Place::Operand(i), u32::from(size), !load, live);
        if !load {
            self.a.store_mem(size, m, RAX);
        } else if size >= 4 {
            self.a.load_mem(size, RAX, m);
        } else {
            // Narrow loads keep the rest of rax.
            let op = Renamed { mem: Some(m), ..Default::default() };
            let bytes: &[u8] = if size == 2 { &[0x66, 0x8b, 0x00] } else { &[0x8a, 0x00] };
            encode(&Parts::new(bytes, 64).unwrap(), bytes, &op, self.a.buf());
        }
    }

    /// Whether the explicit operands naming guest register `n` are read, written.
    fn operand_access(&mut self, i: &Instruction, n: u8) -> (bool, bool) {
        let info = self.info.info(i);
        let (mut r, mut w) = (false, false);
        for k in 0..i.op_count() {
            if i.op_kind(k) == OpKind::Register && gpr_number(i.op_register(k)).is_some_and(|g| g.0 == n) {
                let a = info.op_access(k);
                // A conditional write keeps the old value.
                r |= reads(a) || matches!(a, OpAccess::CondWrite);
                w |= writes(a);
            }
        }
        (r, w)
    }

    /// BT and its kin with a register bit offset reach beyond their operand:
    /// r8 = address + (offset >> log2 size) * size.
    fn bit_address(&mut self, i: &Instruction) {
        let n = gpr_number(i.op1_register()).map_or(0, |g| g.0);
        let size = i.op1_register().size();
        self.take_s2();
        self.address(i, 0);
        let r = self.use_gpr(n, S1);
        // r9 = sign-extended offset, shifted without flags: sarx needs a count
        // register, so r10 holds it.
        let (count, width) = if size == 8 { (6, true) } else { (5, false) };
        self.a.mov_imm(S2, count);
        if !width {
            // movsxd r9, r32
            self.a.b(&[0x4c | (r >> 3), 0x63, 0xc8 | (r & 7)]);
        } else {
            self.a.mov(S1, r);
        }
        // sarx r9, r9, r10
        self.a.b(&[0xc4, 0x42, 0xaa, 0xf7, 0xc9]);
        self.a.lea(self.wide(), S0, Some(S0), Some((S1, size as u8)), 0);
    }
}
