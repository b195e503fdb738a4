//! What hot code is made of: the stretches of a page that lead to each other,
//! and the host registers that its guest registers live in.
//!
//! A loop that lies within one plan runs without leaving it, so it pays to hold
//! the guest's r8-r11 in the homes of registers that the plan does not use, and
//! the ways of its operands to the host (`SLOT_D`) in what is left of them. Every
//! way out of the plan puts things back: nobody else knows of it.
use super::*;

/// Most instructions of a plan, and most stretches.
const INSTRUCTIONS: usize = 200;
const STRETCHES: usize = 20;

/// No way leads there.
const FAR: usize = usize::MAX / 4;

/// Instructions that run one after the other.
pub(super) struct Stretch {
    pub(super) ip: u64,
    pub(super) items: Vec<Item>,
    /// Flags that may be read after its end.
    pub(super) live_out: u32,
    /// A loop here was found to be left too soon to stand alone.
    pub(super) short: bool,
}

/// How the stretches of a plan lead to each other.
pub(super) struct Paths {
    /// Where each goes on.
    pub(super) to: Vec<Vec<usize>>,
    /// Instructions of the shortest way from the first stretch through each and back.
    turn: Vec<usize>,
}

impl Paths {
    pub(super) fn of(plan: &[Stretch]) -> Self {
        let count = plan.len();
        let place = |t: u64| plan.iter().position(|s| s.ip == t);
        let to: Vec<Vec<usize>> =
            plan.iter().map(|s| s.successors().into_iter().flatten().filter_map(place).collect()).collect();
        let (mut from_first, mut to_first) = (vec![FAR; count], vec![FAR; count]);
        from_first[0] = 0;
        for _ in 0..count {
            for n in 0..count {
                let cost = plan[n].items.len();
                for &k in &to[n] {
                    let back = if k == 0 { 0 } else { to_first[k] };
                    to_first[n] = to_first[n].min(cost + back);
                    from_first[k] = from_first[k].min(from_first[n] + cost);
                }
            }
        }
        let turn = (0..count).map(|n| (from_first[n] + to_first[n]).min(FAR)).collect();
        Self { to, turn }
    }

    /// Of the shortest loop through the first stretch.
    fn shortest(&self) -> usize {
        self.turn[0]
    }

    /// For each stretch, a bit for every one that is in a loop with it which does not
    /// go through the first.
    pub(super) fn inner_loops(&self) -> Vec<u32> {
        let count = self.to.len();
        let mut reach = vec![0u32; count];
        for _ in 0..count {
            for n in 1..count {
                for &k in self.to[n].iter().filter(|&&k| k != 0) {
                    reach[n] |= 1 << k | reach[k];
                }
            }
        }
        let mutual = |n: usize, k: usize| reach[n] >> k & 1 != 0 && reach[k] >> n & 1 != 0;
        (0..count).map(|n| (0..count).filter(|&k| mutual(n, k)).fold(0, |m, k| m | 1 << k)).collect()
    }
}

impl Stretch {
    pub(super) fn last(&self) -> &Instruction {
        &self.items.last().expect("a stretch is never empty").insn
    }

    /// Where it goes on, as far as that is written in it; first what lies behind it.
    pub(super) fn successors(&self) -> [Option<u64>; 2] {
        let last = self.last();
        match last.flow_control() {
            FlowControl::UnconditionalBranch if near(last) => [Some(last.near_branch_target()), None],
            FlowControl::ConditionalBranch => [Some(last.next_ip()), Some(last.near_branch_target())],
            FlowControl::Next if !ends(last) => [Some(last.next_ip()), None],
            _ => [None, None],
        }
    }
}

/// A host register put to another use: by a guest register, or by the way to the
/// host of one operand.
#[derive(Clone, Copy, Debug)]
pub struct Moved {
    pub host: u8,
    /// The guest register that lives there now.
    pub guest: Option<u8>,
    /// The plan changes it.
    pub written: bool,
}

/// Host registers by guest register, and what was moved to make it so.
#[derive(Clone, Default, Debug)]
pub struct Homes {
    moved: Vec<Moved>,
}

impl Homes {
    /// Host register of guest register `n`, None for the ones kept in memory.
    pub fn of(&self, n: u8) -> Option<u8> {
        pinned(n).or_else(|| self.moved.iter().find(|m| m.guest == Some(n)).map(|m| m.host))
    }

    pub(super) fn lend(&mut self, to: Moved) {
        self.moved.push(to);
    }

    pub fn moved(&self) -> &[Moved] {
        &self.moved
    }
}

impl Unit<'_> {
    /// Host register of guest register `n`, None for the ones kept in memory.
    pub(super) fn home(&self, n: u8) -> Option<u8> {
        self.homes.of(n)
    }

    /// Into the plan: moved registers take their new homes. Uses r8; flags stay.
    pub(super) fn arrive(&mut self) {
        for k in 0..self.homes.moved.len() {
            let m = self.homes.moved[k];
            self.a.store(at::away(m.host), m.host);
            if let Some(n) = m.guest {
                self.a.load(m.host, at::gpr(n));
            }
        }
        for k in 0..self.pinned_slots.len() {
            let (n, host) = self.pinned_slots[k];
            self.a.load(host, SLOT_D + 8 * n);
        }
        self.empty_bounds();
    }

    /// A loop that is entered as often as it turns is none. Flags stay.
    pub(super) fn count_entry(&mut self) {
        let Some(n) = self.entries else { return };
        self.a.load32(S0, at::REFILLS + 4 * n);
        self.a.lea(false, S0, Some(S0), None, 1);
        self.a.store32(at::REFILLS + 4 * n, S0);
    }

    /// Out of the plan: every register goes home. Flags stay.
    pub(super) fn leave(&mut self) {
        for k in 0..self.homes.moved.len() {
            let m = self.homes.moved[k];
            if let (Some(n), true) = (m.guest, m.written) {
                self.a.store(at::gpr(n), m.host);
            }
            self.a.load(m.host, at::away(m.host));
        }
    }

    /// Add to `plan` what its first stretch leads to, as far as it was run before.
    pub(super) fn explore(&mut self, plan: &mut Vec<Stretch>, gpa: u64) {
        let mut left = INSTRUCTIONS;
        let mut waiting: Vec<u64> = Vec::new();
        let mut next = 0;
        loop {
            while next < plan.len() {
                left = left.saturating_sub(plan[next].items.len());
                let [behind, elsewhere] = plan[next].successors();
                waiting.extend(elsewhere);
                waiting.extend(behind);
                next += 1;
            }
            let Some(ip) = waiting.pop() else { return };
            let Some(offset) = self.offset_of(ip) else { continue };
            if plan.iter().any(|s| s.ip == ip) {
                continue;
            }
            let page = match self.neighbour {
                Some(n) if !self.same_page(ip) => n.gpa,
                _ => gpa & !0xfff,
            };
            let key = Key { gpa: page | ip & 0xfff, va: ip, mode: self.mode };
            if left == 0 || plan.len() == STRETCHES {
                continue;
            }
            let Some(&id) = self.v.blocks.index.get(&key) else { continue };
            let short = self.v.blocks.all[id as usize].heat.as_ref().is_some_and(|h| h.lesson.short);
            let limit = self.code_limit;
            let items = decode_stretch(
                Vec::with_capacity(16),
                self.bytes,
                offset,
                ip,
                self.bits,
                limit,
                &mut self.info,
            );
            if !items.is_empty() {
                plan.push(Stretch { ip, items, live_out: ALL, short });
            }
        }
    }

    /// Keep of `plan` the innermost loop through its first stretch: the stretches on
    /// ways back to it that are not much longer than the shortest, without loops inside
    /// that do better alone.
    pub(super) fn focus(plan: &mut Vec<Stretch>) {
        let paths = Paths::of(plan);
        let most = (3 * paths.shortest() + 20).min(FAR - 1);
        let inner = paths.inner_loops();
        let short = |n: usize| (0..plan.len()).any(|k| plan[k].short && inner[n] >> k & 1 != 0);
        let keep: Vec<bool> =
            (0..plan.len()).map(|n| n == 0 || paths.turn[n] <= most && (inner[n] == 0 || short(n))).collect();
        let mut keep = keep.into_iter();
        plan.retain(|_| keep.next() == Some(true));
    }

    /// Make of `plan` nothing but the loop through its first stretch, if bounds serve it.
    pub(super) fn narrow(&mut self, plan: &mut Vec<Stretch>) -> bool {
        let paths = Paths::of(plan);
        let shortest = paths.shortest();
        // Where helpers stand before ordinary instructions, no two accesses are sure to
        // see the same memory.
        let watched = mode::DEBUG | SHUT | mode::ALIGN | mode::COUNTED | mode::CUT;
        let helped = self.mode & watched != 0 || !self.v.debugger.breakpoints.is_empty();
        if shortest >= FAR || self.v.exact_flags || helped {
            return false;
        }
        let mut n = 0;
        let (mut inner, rest): (Vec<_>, Vec<_>) = std::mem::take(plan).into_iter().partition(|_| {
            n += 1;
            paths.turn[n - 1] <= shortest + shortest / 2 + 6
        });
        self.liveness(&mut inner, false);
        self.settle(&inner, true);
        if self.bounds.is_empty() {
            self.v.regions.give_back(std::mem::take(&mut self.taken).into_iter());
            self.homes = Homes::default();
            self.entries = None;
            self.slots.clear();
            self.pins.clear();
            self.pinned_slots.clear();
            inner.extend(rest);
            *plan = inner;
            return false;
        }
        *plan = inner;
        true
    }

    /// Fill in which flags live where.
    pub(super) fn liveness(&mut self, plan: &mut [Stretch], crossing: bool) {
        // What is read outside the plan first.
        let count = plan.len();
        let (mut inside, mut outside, mut live_in) = ([0; STRETCHES], [0; STRETCHES], [0; STRETCHES]);
        for (ip, s) in inside.iter_mut().zip(plan.iter()) {
            *ip = s.ip;
        }
        for (live, s) in outside.iter_mut().zip(plan.iter()) {
            *live = self.look_ahead(s.last(), crossing, &inside[..count]);
        }
        loop {
            let before = live_in;
            for n in (0..plan.len()).rev() {
                let inner = plan[n].successors().into_iter().flatten();
                let inner = inner.filter_map(|t| plan.iter().position(|s| s.ip == t));
                let mut live = inner.fold(outside[n], |l, k| l | live_in[k]);
                let s = &mut plan[n];
                s.live_out = live;
                for i in s.items.iter_mut().rev() {
                    i.live_after = live;
                    live = i.effect.live_before(live);
                }
                live_in[n] = live;
            }
            if live_in == before {
                return;
            }
        }
    }

    /// Where registers live, if the plan has a loop, and what bounds serve it.
    pub(super) fn settle(&mut self, plan: &[Stretch], bounds: bool) {
        let place = |t: u64| plan.iter().position(|s| s.ip == t);
        let turns = plan
            .iter()
            .enumerate()
            .any(|(n, s)| s.successors().into_iter().flatten().filter_map(place).any(|k| k <= n));
        // STI leaves by a way of its own.
        if !turns || plan.iter().flat_map(|s| &s.items).any(|i| i.insn.mnemonic() == M::Sti) {
            return;
        }
        let (mut uses, mut written) = ([0u32; 16], 0u16);
        for i in plan.iter().flat_map(|s| &s.items) {
            for (n, count) in uses.iter_mut().enumerate() {
                *count += u32::from(i.uses >> n & 1);
            }
            written |= i.writes;
        }
        let mut free: Vec<u8> = [0, 1, 2, 6, 7, 3, 5, 15, 14, 13, 12]
            .into_iter()
            .filter(|&n| uses[usize::from(n)] == 0)
            .collect();
        let mut wanted: Vec<u8> = (8..12).filter(|&n| uses[usize::from(n)] > 0).collect();
        wanted.sort_by_key(|&n| std::cmp::Reverse(uses[usize::from(n)]));
        self.entries = self.v.regions.take_slot();
        self.taken.extend(self.entries);
        for n in wanted {
            let Some(host) = free.pop() else { return };
            self.homes.moved.push(Moved { host, guest: Some(n), written: written >> n & 1 != 0 });
        }
        if bounds {
            self.bind(plan);
            self.pin_bounds(&mut free);
        }
        // What is left holds the ways of operands, one for each address register.
        for s in plan {
            let mut seen: Vec<(Register, Register)> = Vec::new();
            for i in &s.items {
                let Some(key) = self.pin_key(i) else { continue };
                let guest = i.insn.ip().wrapping_sub(self.rip) as i16;
                if seen.contains(&key) || self.lesson.restless.contains(&guest) || self.is_bound(guest) {
                    continue;
                }
                let Some(host) = free.pop() else { return };
                seen.push(key);
                let Some(n) = self.v.regions.take_slot() else { return };
                self.taken.push(n);
                self.slots.push((guest, n));
                self.pins.push((guest, n));
                self.pinned_slots.push((n, host));
                self.homes.moved.push(Moved { host, guest: None, written: false });
            }
        }
    }

    /// The registers that a memory operand worth a pin hangs on.
    fn pin_key(&self, item: &Item) -> Option<(Register, Register)> {
        let i = &item.insn;
        if i.code() == Code::INVALID || crate::interp::wants_helper(i, self.mode) {
            return None;
        }
        if item.access == OpAccess::None {
            let stack = matches!(i.mnemonic(), M::Push | M::Pop | M::Call | M::Ret);
            return stack.then_some((Register::RSP, Register::None));
        }
        let (base, index) = (i.memory_base(), i.memory_index());
        let apart = matches!(i.memory_segment(), Register::FS | Register::GS);
        (constant_address(i).is_none() && !apart && i.memory_size().size() > 0).then_some((base, index))
    }
}

/// The address of a memory operand without registers.
pub(super) fn constant_address(i: &Instruction) -> Option<u64> {
    let none = i.memory_base() == Register::None && i.memory_index() == Register::None;
    (none || i.is_ip_rel_memory_operand()).then(|| i.memory_displacement64())
}

/// Decode from `ip` on, which lies at `start` of the bytes, to the end of the stretch
/// or to `limit`, the highest offset that code may have. `items` is an empty list.
pub(super) fn decode_stretch(
    mut items: Vec<Item>,
    bytes: &[u8],
    start: usize,
    ip: u64,
    bits: u32,
    limit: u64,
    factory: &mut InstructionInfoFactory,
) -> Vec<Item> {
    let mut d = decoder(&bytes[start..], bits, ip);
    while items.len() < MOST && d.can_decode() {
        let at = start + d.position();
        let insn = exchange(d.decode(), &bytes[at..]);
        if insn.code() == Code::INVALID && d.last_error() == DecoderError::NoMoreBytes {
            break;
        }
        if insn.next_ip().wrapping_sub(1) > limit {
            break;
        }
        let end = ends(&insn);
        let mut item = Item::new(insn, at, factory);
        if writes(item.access) && constant_address(&insn).is_some_and(|a| a & !0xfff == ip & !0xfff) {
            // It changes code: who knows which flags that will read.
            item.effect.reads = ALL;
        }
        items.push(item);
        if end {
            break;
        }
    }
    items
}
