//! Loops: how far their registers may go before an operand leaves its
//! page is found out once, and one comparison a turn serves all operands.
//!
//! In a loop most addresses are constant, or move with one register that only
//! grows or only shrinks. The way from that register to the host stays the same until
//! a page ends. A copy loop becomes
//!
//! ```text
//! hot  1: cmp   rsi, gs:[SLOT_T+n*8]    the bound
//!         jge   2
//!      3: vmovdqu ymm0, [rsi+rbx]       rbx: the way (SLOT_D of the operand's own slot)
//!         ...
//! cold 2: every operand is looked up in the table; the smallest limit of all becomes
//!         the bound; then 3. If one is not in the table or crosses a page, a version
//!         of the rest of the block takes over that looks at each access.
//! ```
//!
//! A bound holds only for the turns of its loop: whoever enters, or comes back from a
//! helper, empties it (`arrive`). An empty bound is the least of all numbers, so that
//! whatever empties slots (a flush, the twin of a kicked region) stops the loop here.
use super::group::Spot;
use super::plan::{Paths, Stretch};
use super::*;
use crate::cpu::NO_PAGE;
use crate::interp::wants_helper;

/// Most bytes that an operand's neighbours cover together.
const SPAN: i64 = 256;

/// Most operands of one bound.
const MEMBERS: usize = 6;

/// Registers farther from zero than this get no bound, so that none can wrap between
/// two turns unseen.
const FAR: u64 = 1 << 62;

/// How the loop changes a register.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Motion {
    Still,
    Up,
    Down,
    Wild,
}

/// Operands of a loop that one comparison serves.
pub(super) struct Bound {
    /// Slot whose tag is the bound.
    slot: u32,
    /// The register that moves, and whether it shrinks; None: all addresses are constant.
    by: Option<(u8, bool)>,
    /// The instruction that the comparison stands before.
    first: i16,
    /// The comparison has been written.
    checked: bool,
    members: Vec<Member>,
}

/// Neighbouring operands with the same registers.
struct Member {
    base: Option<u8>,
    index: Option<(u8, u8)>,
    /// What the moving register counts for in the address; 0: it is not in it.
    scale: u8,
    /// Displacement of the first byte and behind the last, before the loop's first move.
    low: i64,
    high: i64,
    write: bool,
    /// Slot whose way leads from `scale` times the register to the host.
    slot: u32,
    pin: Option<u8>,
    users: Vec<i16>,
}

/// What `bind` has found so far.
struct Found {
    motions: [Motion; 16],
    bounds: Vec<Bound>,
    /// How far the registers had moved at each bound's comparison.
    at: Vec<Moved16>,
}

/// The instruction moves a register by a constant: which, and how far.
pub(super) fn step(i: &Instruction) -> Option<(u8, i64)> {
    let (n, high) = gpr_number(i.op0_register()).filter(|_| i.op0_kind() == OpKind::Register)?;
    if high || !i.op0_register().is_gpr64() {
        return None;
    }
    let by = match i.mnemonic() {
        M::Add | M::Sub if !matches!(i.op1_kind(), OpKind::Register | OpKind::Memory) => {
            let v = i.immediate(1) as i64;
            if i.mnemonic() == M::Add {
                v
            } else {
                v.checked_neg()?
            }
        }
        M::Inc => 1,
        M::Dec => -1,
        M::Lea if i.memory_base() == i.op0_register() && i.memory_index() == Register::None => {
            i.memory_displacement64() as i64
        }
        _ => return None,
    };
    (by.unsigned_abs() < 0x1_0000).then_some((n, by))
}

/// How the loop changes register `n`.
fn motion(plan: &[Stretch], n: u8) -> Motion {
    let mut motion = Motion::Still;
    for item in plan.iter().flat_map(|s| &s.items).filter(|i| i.writes >> n & 1 != 0) {
        let new = match step(&item.insn) {
            Some((m, by)) if m == n && by > 0 => Motion::Up,
            Some((m, by)) if m == n && by < 0 => Motion::Down,
            Some((m, 0)) if m == n => motion,
            _ => return Motion::Wild,
        };
        if motion != Motion::Still && motion != new {
            return Motion::Wild;
        }
        motion = new;
    }
    motion
}

/// How far registers moved since the start of a turn; None where ways differ.
type Moved16 = [Option<i64>; 16];

/// Follow one instruction.
fn advance(moved: &mut Moved16, item: &Item) {
    let step = step(&item.insn);
    for (n, m) in moved.iter_mut().enumerate().filter(|(n, _)| item.writes >> n & 1 != 0) {
        *m = match step {
            Some((k, by)) if usize::from(k) == n => m.map(|m| m + by),
            _ => None,
        };
    }
}

/// How far registers have moved where each stretch of a loop begins.
fn at_entries(plan: &[Stretch], to: &[Vec<usize>]) -> Vec<Moved16> {
    // The stretches in an order in which ways lead, but for the way back to the first.
    let mut order = vec![0];
    let mut waits: Vec<usize> = vec![0; plan.len()];
    to.iter().flatten().for_each(|&k| waits[k] += 1);
    let mut at = vec![None; plan.len()];
    at[0] = Some([Some(0); 16]);
    let mut next = 0;
    while next < order.len() {
        let n = order[next];
        next += 1;
        let mut out: Moved16 = at[n].unwrap_or([None; 16]);
        plan[n].items.iter().for_each(|i| advance(&mut out, i));
        for &k in to[n].iter().filter(|&&k| k != 0) {
            at[k] = Some(match at[k] {
                None => out,
                Some(before) => std::array::from_fn(|r| before[r].filter(|_| before[r] == out[r])),
            });
            waits[k] -= 1;
            if waits[k] == 0 {
                order.push(k);
            }
        }
    }
    at.into_iter().map(|m| m.unwrap_or([None; 16])).collect()
}

impl Unit<'_> {
    /// The operand of `item`, if a bound can serve it.
    fn bindable(&self, item: &Item) -> Option<Spot> {
        let i = &item.insn;
        let high = |k| i.op_kind(k) == OpKind::Register && gpr_number(i.op_register(k)).is_some_and(|g| g.1);
        let unlike = matches!(
            i.mnemonic(),
            M::Clflush | M::Clflushopt | M::Clwb | M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu | M::Xlatb
        );
        let guest = i.ip().wrapping_sub(self.rip) as i16;
        if item.access == OpAccess::None
            || i.is_stack_instruction()
            || unlike
            || !self.by_generic(i)
            || i.op_mask() != Register::None
            || crate::interp::bit_string(i)
            || (0..i.op_count()).any(high)
            || self.lesson.restless.contains(&guest)
            || !self.same_page(i.ip())
        {
            return None;
        }
        let size = i.memory_size().size() as u32;
        let spot = self.spot(Place::Operand(i), size, writes(item.access));
        spot.filter(|_| (1..=64).contains(&size))
    }

    /// Find what bounds can serve in the loop that `plan` is, every turn of which goes
    /// through its first stretch. There the comparisons stand.
    pub(super) fn bind(&mut self, plan: &[Stretch]) {
        let paths = Paths::of(plan);
        let helped = |i: &Item| i.insn.code() == Code::INVALID || wants_helper(&i.insn, self.mode);
        let mut seen: Vec<u64> = plan.iter().flat_map(|s| &s.items).map(|i| i.insn.ip()).collect();
        seen.sort_unstable();
        // A helper may change what is mapped; an instruction is named by its address.
        if plan.len() > 1 && plan.iter().flat_map(|s| &s.items).any(helped)
            || paths.inner_loops().iter().any(|&l| l != 0)
            || seen.windows(2).any(|w| w[0] == w[1])
        {
            return;
        }
        let motions: [Motion; 16] = std::array::from_fn(|n| match self.home(n as u8) {
            Some(_) => motion(plan, n as u8),
            None => Motion::Wild,
        });
        let mut found = Found { motions, bounds: Vec::new(), at: Vec::new() };
        for (n, mut moved) in at_entries(plan, &paths.to).into_iter().enumerate() {
            for item in &plan[n].items {
                if item.insn.code() == Code::INVALID || wants_helper(&item.insn, self.mode) {
                    break;
                }
                if let Some(spot) = self.bindable(item) {
                    let guest = item.insn.ip().wrapping_sub(self.rip) as i16;
                    let may_begin = n == 0 && item.effect.live_before(item.live_after) == 0;
                    self.admit(&mut found, (&spot, guest, may_begin), &moved);
                }
                advance(&mut moved, item);
            }
        }
        self.bounds = found.bounds;
    }

    /// Add an operand to a bound, or begin one with it if it may.
    fn admit(&mut self, found: &mut Found, (spot, guest, may_begin): (&Spot, i16, bool), moved: &Moved16) {
        let motions = &found.motions;
        let of = |n: Option<u8>| n.map_or(Motion::Still, |n| motions[usize::from(n)]);
        let index = spot.index.map(|x| x.0);
        let (mover, scale) = match (of(spot.base), of(index)) {
            (Motion::Wild, _) | (_, Motion::Wild) => return,
            (Motion::Still, Motion::Still) => (None, 0),
            (_, Motion::Still) => (spot.base, 1),
            (Motion::Still, _) => (index, spot.index.map_or(1, |x| x.1)),
            _ => return,
        };
        let by = mover.map(|n| (n, motions[usize::from(n)] == Motion::Down));
        // What stands still is served by any.
        let with = found.bounds.iter().position(|b| by.is_none() || b.by == by);
        let k = match with {
            Some(k) => k,
            None if !may_begin => return,
            None => {
                let Some(slot) = self.v.regions.take_bound() else { return };
                self.taken.push(slot);
                found.bounds.push(Bound { slot, by, first: guest, checked: false, members: Vec::new() });
                found.at.push(*moved);
                found.bounds.len() - 1
            }
        };
        let shift = mover.map(usize::from).map_or(Some(0), |n| Some(moved[n]? - found.at[k][n]?));
        let Some(shift) = shift else { return };
        let low = spot.disp + shift * i64::from(scale);
        let high = low + spot.size;
        let b = &mut found.bounds[k];
        let with = b.members.iter_mut().find(|m| {
            m.base == spot.base && m.index == spot.index && m.high.max(high) - m.low.min(low) <= SPAN
        });
        if let Some(m) = with {
            (m.low, m.high, m.write) = (m.low.min(low), m.high.max(high), m.write || spot.write);
            m.users.push(guest);
            return;
        }
        if b.members.len() == MEMBERS {
            return;
        }
        let Some(slot) = self.v.regions.take_slot() else { return };
        self.taken.push(slot);
        let (base, index, write) = (spot.base, spot.index, spot.write);
        b.members.push(Member { base, index, scale, low, high, write, slot, pin: None, users: vec![guest] });
    }

    /// Give `free` host registers to the ways of bounds' operands, the busiest first.
    pub(super) fn pin_bounds(&mut self, free: &mut Vec<u8>) {
        let mut ways: Vec<(usize, usize, usize)> = Vec::new();
        for (k, b) in self.bounds.iter().enumerate() {
            ways.extend(b.members.iter().enumerate().map(|(j, m)| (m.users.len(), k, j)));
        }
        ways.sort_by_key(|w| std::cmp::Reverse(w.0));
        for (_, k, j) in ways {
            let Some(host) = free.pop() else { return };
            let m = &mut self.bounds[k].members[j];
            m.pin = Some(host);
            self.pinned_slots.push((m.slot, host));
            self.homes.lend(Moved { host, guest: None, written: false });
        }
    }

    /// A bound serves the operand of the instruction at this offset.
    pub(super) fn is_bound(&self, guest: i16) -> bool {
        self.bounds.iter().any(|b| b.members.iter().any(|m| m.users.contains(&guest)))
    }

    /// For lessons: instructions and the slots that count their refills; all bounds.
    pub(super) fn bound_users(&self) -> (Vec<(i16, u32)>, Vec<u32>) {
        let of =
            |b: &Bound| -> Vec<_> { b.members.iter().flat_map(|m| &m.users).map(|&g| (g, b.slot)).collect() };
        (self.bounds.iter().flat_map(of).collect(), self.bounds.iter().map(|b| b.slot).collect())
    }

    /// Empty all bounds; uses r8. Flags stay.
    pub(super) fn empty_bounds(&mut self) {
        if self.bounds.is_empty() {
            return;
        }
        const _: () = assert!(NO_PAGE == 1 << 63);
        self.a.load(S0, at::SIGN);
        for k in 0..self.bounds.len() {
            self.a.store(SLOT_T + 8 * self.bounds[k].slot, S0);
        }
    }

    /// The operand of the instruction being written, if a bound serves it; `live` are
    /// the flags that must survive.
    pub(super) fn bounded(&mut self, i: &Instruction, live: u32) -> Option<Mem> {
        let k = self.bounds.iter().position(|b| b.members.iter().any(|m| m.users.contains(&self.guest)))?;
        if self.bounds[k].first == self.guest {
            if self.flags == Flags::Host && live != 0 {
                self.recipe?;
                self.flags = Flags::Recipe;
            }
            let bound = self.bounds.swap_remove(k);
            self.compare(&bound, live);
            self.bounds.push(Bound { checked: true, ..bound });
        }
        let k = self.bounds.iter().position(|b| b.members.iter().any(|m| m.users.contains(&self.guest)))?;
        let b = &self.bounds[k];
        if !b.checked {
            return None;
        }
        let m = b.members.iter().find(|m| m.users.contains(&self.guest))?;
        let (scale, low, slot, pin) = (m.scale, m.low, m.slot, m.pin);
        let mover = b.by.filter(|_| scale != 0).and_then(|b| self.home(b.0));
        let disp = match constant_address(i) {
            Some(a) => a as i64,
            None => i.memory_displacement64() as i64,
        };
        let disp = i32::try_from(disp - low).expect("neighbours are near");
        let way = pin.unwrap_or_else(|| {
            self.vacate();
            self.claim(S1);
            self.a.load(S1, SLOT_D + 8 * slot);
            S1
        });
        Some(match (mover, scale) {
            (None, _) => Mem { base: way, index: None, disp },
            (Some(r), 1) => Mem { base: r, index: Some(way), disp },
            (Some(r), _) => {
                self.vacate();
                self.claim(S0);
                self.a.lea(true, S0, Some(way), Some((r, scale)), disp);
                Mem { base: S0, index: None, disp: 0 }
            }
        })
    }

    /// The comparison with bound `b`, and in cold code what finds it anew.
    fn compare(&mut self, b: &Bound, live: u32) {
        if self.flags == Flags::Host && live == 0 {
            self.flags = Flags::Dead;
        }
        self.probed = true;
        let bound = SLOT_T + 8 * b.slot;
        let mover = b.by.map(|(n, down)| (self.home(n).expect("what moves has a home"), down));
        let missed = match mover {
            Some((r, false)) => {
                self.a.cmp_gs(r, bound);
                0xd
            }
            Some((r, true)) => {
                self.vacate();
                self.claim(S0);
                self.a.mov(S0, r);
                self.a.not(S0);
                self.a.cmp_gs(S0, bound);
                0xd
            }
            None => {
                self.a.cmp64_imm8(bound, 0);
                0xc
            }
        };
        let cold = Label(Section::Cold, self.a.cold.len() as u32);
        self.a.jcc(missed, cold);
        let hit = self.a.here();
        self.a.section(Section::Cold);
        for (n, r) in [S0, S1, S2].into_iter().enumerate() {
            self.a.store(at::BOUND + 8 * n as u32, r);
        }
        let limit = at::BOUND + 24;
        let mut limited = false;
        let mut misses = Vec::new();
        for m in &b.members {
            let span = m.high - m.low;
            let home = |n: u8| self.homes.of(n).expect("operands of bounds have homes");
            let (base, index) = (m.base.map(home), m.index.map(|x| (home(x.0), x.1)));
            match (base, i32::try_from(m.low)) {
                (None, _) if index.is_none() => self.a.mov_imm(S0, m.low as u64),
                (_, Ok(low)) => self.a.lea(true, S0, base, index, low),
                _ => unreachable!("displacements have 32 bits"),
            }
            self.a.rorx(S1, S0, 12);
            self.a.movzx16(S1, S1);
            self.a.add_indexed(S0, S1, if m.write { TAG_W } else { TAG_R });
            self.a.cmp_imm(S0, 4096 - span as i32);
            misses.push(self.a.jcc_far(7));
            self.a.load_indexed(S1, S1, HOST);
            self.a.add(S1, S0);
            if let (Some((r, down)), true) = (mover, m.scale != 0) {
                let shift = m.scale.trailing_zeros() as u8;
                self.a.lea(true, S2, None, Some((r, m.scale)), 0);
                self.a.sub(S1, S2);
                if down {
                    // ~r stays below offset / scale - r.
                    self.a.shr(S0, shift);
                    self.a.sub(S0, r);
                } else {
                    self.a.mov_imm(S2, 4096 - span as u64);
                    self.a.sub(S2, S0);
                    self.a.shr(S2, shift);
                    self.a.lea(true, S0, Some(S2), Some((r, 1)), 1);
                }
                if std::mem::replace(&mut limited, true) {
                    self.a.cmp_gs(S0, limit);
                    let larger = self.a.jcc_short(0xd);
                    self.a.store(limit, S0);
                    self.a.land(larger);
                } else {
                    self.a.store(limit, S0);
                }
            }
            self.a.store(SLOT_D + 8 * m.slot, S1);
            if let Some(pin) = m.pin {
                self.a.mov(pin, S1);
            }
        }
        match mover {
            Some((r, _)) => {
                self.a.load(S1, limit);
                self.a.mov_imm(S0, FAR);
                self.a.add(S0, r);
                let near = self.a.jcc_short(9);
                self.a.load(S1, at::SIGN);
                self.a.land(near);
            }
            None => self.a.mov_imm(S1, 0),
        }
        self.a.store(bound, S1);
        self.a.increment32(at::REFILLS + 4 * b.slot);
        self.restore_scratch();
        self.a.jmp(hit);
        for miss in misses {
            self.a.land_far(miss);
        }
        self.a.increment32(at::REFILLS + 4 * b.slot);
        self.restore_scratch();
        self.give_up(live);
        self.a.section(Section::Hot);
    }

    fn restore_scratch(&mut self) {
        for (n, r) in [S0, S1, S2].into_iter().enumerate() {
            self.a.load(r, at::BOUND + 8 * n as u32);
        }
    }

    /// In cold code: go on with the version that looks at each access.
    fn give_up(&mut self, live: u32) {
        for (k, r) in [S0, S1, S2].into_iter().enumerate() {
            if let Some((n, true)) = self.cache[k] {
                self.a.store(at::gpr(n), r);
            }
        }
        let stack = self.stack;
        self.settle_stack();
        match self.recipe.filter(|_| matches!(self.flags, Flags::Recipe | Flags::Dead)) {
            Some(r) => r.emit(&mut self.a, S0, &self.homes, &mut self.patches),
            None if self.flags == Flags::Lazy && live != 0 => {
                self.a.mov(S0, RAX);
                self.a.load32(RAX, at::LAZY);
                self.a.sahf_of();
                self.a.mov(RAX, S0);
            }
            None => {}
        }
        self.stack = stack;
        self.leave();
        let target = self.items[self.now].insn.ip();
        self.site(target, true);
    }
}
