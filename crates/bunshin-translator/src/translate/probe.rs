//! Memory operands behind the software TLB: the hot path of everything. The
//! picture of what is emitted stands on top of `mod.rs`.
use super::*;

/// Where a memory operand is.
#[derive(Clone, Copy)]
pub(super) enum Place<'i> {
    /// The explicit operand.
    Operand(&'i Instruction),
    /// The explicit operand of BT and its kin, moved by the bit offset.
    Bits(&'i Instruction),
    /// This many bytes below the top of the stack.
    Stack(i32),
    /// At rbp.
    Frame,
}

/// Where the page of an operand is looked up.
#[derive(Clone, Copy)]
enum Way {
    /// In the table, by the address.
    Table,
    /// In the table, at an offset that is known.
    Fixed(u32),
    /// In a slot of its own (hot code).
    Slot(u32),
}

/// Accesses ahead, up to the next use of the flags, that make saving them worth it.
const MANY_ACCESSES: usize = 4;

/// Nothing comes before a page fault of the instruction or takes it away: no
/// mask, no pending x87 exception.
fn faults_plainly(i: &Instruction) -> bool {
    let x87 = i.cpuid_features().iter().any(|f| {
        matches!(f, CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387 | CpuidFeature::MMX)
    });
    let mmx = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_mm());
    !x87 && !mmx && i.op_mask() == Register::None
}

/// A high byte register is swapped with the low one around the instruction.
fn swaps(place: Place) -> bool {
    let Place::Operand(i) = place else { return false };
    let high = |k| i.op_kind(k) == OpKind::Register && gpr_number(i.op_register(k)).is_some_and(|g| g.1);
    (0..i.op_count()).any(high)
}

impl Unit<'_> {
    /// The address `from` bytes past an operand, of which `span` bytes are used, into
    /// r8; uses r9 (and r10 for bit strings and segments that are looked at).
    pub(super) fn locate(&mut self, place: Place, (from, span): (i64, i64), write: bool) -> Option<u64> {
        let from = from as i32;
        match place {
            Place::Operand(i) => return self.address(i, from, span as i32, write),
            Place::Bits(i) => self.bit_address(i),
            Place::Stack(below) => self.stack_slot(GSP, from - below),
            Place::Frame => self.stack_slot(5, from),
        }
        None
    }

    /// The host address of an operand of `size` bytes; `live` are the flags
    /// that must survive. It is `[r8 + r9]`, `[r10 + n]` inside a group, or the
    /// guest's own base register and r9 in hot code; the other scratch registers
    /// are free afterwards.
    pub(super) fn probe(&mut self, place: Place, size: u32, write: bool, live: u32) -> Mem {
        self.ahead = self.ahead.saturating_sub(1);
        if let Place::Operand(i) = place {
            if let Some(m) = self.bounded(i, live) {
                return m;
            }
        }
        let spot = self.spot(place, size, write);
        if let (Some(s), Some(g)) = (spot, self.group) {
            if g.covers(&s) {
                self.group = Some(Group { left: g.left.saturating_sub(1), ..g });
                if self.hot {
                    // Its slot was checked before another instruction: see `check`.
                    self.point(self.flags == Flags::Host);
                }
                return self.covered(place, &s, &g);
            }
        }
        self.vacate();
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
        if keep || start.is_some() || matches!(place, Place::Operand(i) if self.examined(i)) {
            self.claim(S2);
        }
        self.probed = true;
        match start {
            None => self.check(place, (0, size.into()), write, keep, false),
            Some(g) => {
                let s = spot.unwrap();
                let m = self.check(place, (g.low - s.disp, g.span), g.write, keep, true);
                let m = self.hold(m, &s, g);
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
                self.site(target, true);
                self.a.section(Section::Hot);
                m
            }
        }
    }

    /// Begin a group whose lowest byte is at `m`; gives the operand `s`.
    pub(super) fn hold(&mut self, m: Mem, s: &Spot, g: Group) -> Mem {
        let way = m.index.filter(|_| m.base != S0);
        match way {
            // The guest's own base register and the way to the host.
            Some(way) => {
                let host = if way == S1 { S2 } else { way };
                self.a.mov(host, way);
                self.group = Some(Group { host, direct: true, ..g });
                Mem { base: m.base, index: Some(host), disp: m.disp + (s.disp - g.low) as i32 }
            }
            None => {
                self.a.lea(true, S2, Some(m.base), m.index.map(|x| (x, 1)), m.disp);
                self.group = Some(Group { host: S2, direct: false, ..g });
                Mem { base: S2, index: None, disp: (s.disp - g.low) as i32 }
            }
        }
    }

    /// An operand that the group's check covers.
    fn covered(&mut self, place: Place, s: &Spot, g: &Group) -> Mem {
        if !g.direct {
            return Mem { base: g.host, index: None, disp: (s.disp + g.shift - g.low) as i32 };
        }
        match self.direct(place, 0) {
            Some((base, disp)) => Mem { base, index: Some(g.host), disp },
            None => {
                let base = s.base.and_then(|b| self.home(b)).expect("a group has a base");
                self.claim(S0);
                let ahead = if s.base == Some(4) { self.stack } else { 0 };
                self.a.lea(true, S0, Some(base), Some((g.host, 1)), s.disp as i32 + ahead);
                Mem { base: S0, index: None, disp: 0 }
            }
        }
    }

    /// A slot for a memory operand, in hot code.
    fn slot(&mut self) -> Option<u32> {
        let guest = self.slots_of.unwrap_or(self.guest);
        if !self.hot || self.lesson.restless.contains(&guest) {
            return None;
        }
        if let Some(k) = self.pins.iter().position(|p| p.0 == guest) {
            return Some(self.pins.swap_remove(k).1);
        }
        let n = self.v.regions.take_slot()?;
        self.taken.push(n);
        self.slots.push((guest, n));
        Some(n)
    }

    /// An operand of hot code as the guest's own base register and displacement.
    fn direct(&self, place: Place, from: i64) -> Option<(u8, i32)> {
        if self.bits != 64 {
            // Sums wrap at 32 bits there, which an address of the host would not.
            return None;
        }
        let (n, disp) = match place {
            Place::Operand(i)
                if i.memory_index() == Register::None
                    && !matches!(i.memory_segment(), Register::FS | Register::GS) =>
            {
                let base = i.memory_base();
                let n = gpr_number(base).filter(|_| base.is_gpr64())?.0;
                let ahead = if n == 4 { i64::from(self.stack) } else { 0 };
                (n, i.memory_displacement64() as i64 + from + ahead)
            }
            Place::Stack(below) => (4, from - i64::from(below) + i64::from(self.stack)),
            Place::Frame => (5, from),
            _ => return None,
        };
        Some((self.home(n).filter(|_| !swaps(place))?, i32::try_from(disp).ok()?))
    }

    /// Emit the check that `span` bytes from `place + from` can be accessed, and
    /// give their host address. With a span of a group, cold code falls through
    /// where that is not so.
    pub(super) fn check(
        &mut self,
        place: Place,
        (from, span): (i64, i64),
        write: bool,
        keep: bool,
        grouped: bool,
    ) -> Mem {
        let tag = if write { TAG_W } else { TAG_R };
        let retry = self.a.here();
        let fixed = self.locate(place, (from, span), write).map(|c| 8 * ((c >> 12) as u32 & 0xffff));
        let way = match fixed {
            Some(n) => Way::Fixed(n),
            // What an empty slot lets through would fault between the swaps.
            None if swaps(place) => Way::Table,
            None => self.slot().map_or(Way::Table, Way::Slot),
        };
        let direct = self.direct(place, from).filter(|_| matches!(way, Way::Slot(_)));
        let pin = match way {
            Way::Slot(n) => self.pinned_slots.iter().find(|p| p.0 == n).map(|p| p.1),
            _ => None,
        };
        let slow_slot = keep && matches!(way, Way::Slot(_));
        let refilled = !keep && matches!(way, Way::Slot(_));
        let mut back = if refilled { retry } else { self.back(retry) };
        let cold = Label(Section::Cold, self.a.cold.len() as u32);
        // The register that becomes the offset in the page: the address is still
        // needed if it is not the guest's register.
        let mut offset = S0;
        match way {
            Way::Table => {
                self.a.rorx(S1, S0, 12);
                self.a.movzx16(S1, S1);
                if keep {
                    self.a.load_indexed(S2, S1, tag);
                } else {
                    self.a.add_indexed(S0, S1, tag);
                }
            }
            Way::Fixed(n) if keep => self.a.load(S2, tag + n),
            Way::Fixed(n) => self.a.add_gs(S0, tag + n),
            Way::Slot(n) if keep => self.a.load(S2, SLOT_T + 8 * n),
            Way::Slot(n) if direct.is_some() => self.a.add_gs(S0, SLOT_T + 8 * n),
            Way::Slot(n) => {
                offset = S1;
                self.a.load(S1, SLOT_T + 8 * n);
                self.a.add(S1, S0);
            }
        }
        if keep {
            offset = if matches!(way, Way::Slot(_)) { S1 } else { S0 };
            self.a.lea(true, offset, Some(S0), Some((S2, 1)), 0);
            if matches!(way, Way::Slot(_)) {
                // The address may also lie just below the slot's page.
                self.a.mov(S2, RCX);
                self.a.pext_gs(RCX, S1, at::PAGES);
                self.a.lea(true, S1, Some(S1), None, span as i32 - 1);
                self.a.pext_gs(S1, S1, at::PAGES);
                self.a.lea(true, RCX, Some(RCX), Some((S1, 1)), 0);
            } else {
                self.host_page(way);
                self.a.mov(S2, RCX);
                self.a.lea(true, RCX, Some(S0), None, span as i32 - 1);
                self.a.pext_gs(RCX, RCX, at::PAGES);
            }
            let hit = self.a.jrcxz();
            self.a.jmp(cold);
            self.a.land(hit);
            self.a.mov(RCX, S2);
            if slow_slot && pin.is_none() {
                self.host_page(way);
            }
        } else {
            self.a.cmp_imm(offset, 4096 - span as i32);
            self.a.jcc(7, cold);
            if pin.is_none() {
                self.host_page(way);
            }
        }
        let hit = self.a.here();
        self.a.section(Section::Cold);
        if let (Way::Slot(n), true) = (way, refilled) {
            back = self.refill(place, (from, span), n, tag, (direct.is_some(), pin), hit);
        }
        self.point(false);
        if keep {
            self.a.mov(RCX, S2);
        }
        // The slow path and the guest's handlers look for registers in memory.
        if let Some((n, true)) = self.cache[2] {
            self.a.store(at::gpr(n), S2);
        }
        // A fault finds the stack pointer where it is.
        let stack = self.stack;
        self.settle_stack();
        // Out of the way the flags can be made exact, for the frame of a fault too.
        let recipe = self.recipe.filter(|_| matches!(self.flags, Flags::Recipe | Flags::Dead));
        if let Some(r) = recipe {
            r.emit(&mut self.a, S0, &self.homes, &mut self.patches);
        }
        let keep = keep || recipe.is_some();
        self.locate(place, (from, span), write);
        let plain =
            span < 16 && !grouped && self.items.get(self.now).is_some_and(|i| faults_plainly(&i.insn));
        let mut info = span as u32;
        if let Way::Slot(n) = way {
            info |= n << 16;
        }
        if write {
            info |= INFO_WRITE;
        }
        if grouped {
            info |= INFO_GROUP;
        }
        if plain {
            info |= INFO_PLAIN;
        }
        self.a.mov_imm(S1, info.into());
        self.leave();
        let stubs = self.v.stubs;
        self.a.call_abs(match (grouped, keep) {
            _ if slow_slot => stubs.refill[usize::from(write)][usize::from(grouped)],
            (false, false) => stubs.miss,
            (false, true) => stubs.miss_flags,
            (true, false) => stubs.miss_group,
            (true, true) => stubs.miss_group_flags,
        });
        self.stack = stack;
        self.a.jmp(back);
        self.a.section(Section::Hot);
        if matches!(way, Way::Slot(_)) {
            // An empty slot lets through what the host's processor refuses.
            self.point(self.flags == Flags::Host);
        }
        let index = Some(pin.unwrap_or(S1));
        match direct {
            Some((base, disp)) => Mem { base, index, disp },
            None => Mem { base: S0, index, disp: 0 },
        }
    }

    /// Cold code that goes on at `retry` after a stub was called; `retry` itself
    /// if nothing was moved for the call.
    fn back(&mut self, retry: Label) -> Label {
        if self.homes.moved().is_empty() && self.stack == 0 {
            return retry;
        }
        let hot = self.a.here().0 == Section::Hot;
        self.a.section(Section::Cold);
        let back = self.a.here();
        self.arrive();
        if self.stack != 0 {
            self.a.lea(true, GSP, Some(GSP), None, -self.stack);
        }
        self.a.jmp(retry);
        if hot {
            self.a.section(Section::Hot);
        }
        back
    }

    /// Cold code that fills slot `n` from the table and goes on at `hit`; what
    /// follows serves misses of the table and comes back to the place returned.
    /// After a signal in between it writes the tag to the twin: the slot is then
    /// not in order, and `events` empties it.
    fn refill(
        &mut self,
        place: Place,
        (from, span): (i64, i64),
        n: u32,
        tag: u32,
        (direct, pin): (bool, Option<u8>),
        hit: Label,
    ) -> Label {
        let again = self.a.here();
        self.locate(place, (from, span), tag == TAG_W);
        self.a.store(at::TMP2, S2);
        self.a.rorx(S1, S0, 12);
        self.a.movzx16(S1, S1);
        self.a.load_indexed(S2, S1, tag);
        self.a.add(S0, S2);
        self.a.cmp_imm(S0, 4096 - span as i32);
        let miss = self.a.jcc_far(7);
        self.a.store(SLOT_T + 8 * n, S2);
        self.a.load_indexed(S1, S1, HOST);
        self.a.add(S1, S2);
        self.a.store(SLOT_D + 8 * n, S1);
        self.a.increment32(at::REFILLS + 4 * n);
        if let Some(pin) = pin {
            self.a.mov(pin, S1);
        }
        if !direct {
            self.a.sub(S0, S2);
        }
        self.a.load(S2, at::TMP2);
        self.a.jmp(hit);
        let back = self.back(again);
        self.a.land_far(miss);
        self.a.load(S2, at::TMP2);
        back
    }

    /// What leads from the page, or for a slot from the address, to the host: r9.
    fn host_page(&mut self, way: Way) {
        match way {
            Way::Table => self.a.load_indexed(S1, S1, HOST),
            Way::Fixed(n) => self.a.load(S1, HOST + n),
            Way::Slot(n) => self.a.load(S1, SLOT_D + 8 * n),
        }
    }

    /// A guest register's value in some host register, loading it to `scratch`
    /// if it is kept in memory.
    pub(super) fn use_gpr(&mut self, n: u8, scratch: u8) -> u8 {
        self.home(n).or_else(|| self.cached(n)).unwrap_or_else(|| {
            self.a.load(scratch, at::gpr(n));
            scratch
        })
    }

    /// The operand's segment has a base, a limit or rights to mind. That those of
    /// DS, ES and SS have none is part of the mode; CS is never writable, and FS and
    /// GS come and go.
    pub(super) fn examined(&self, i: &Instruction) -> bool {
        let usual = matches!(i.memory_segment(), Register::DS | Register::ES | Register::SS);
        self.bits != 64 && (self.mode & mode::LIMITED != 0 || !usual)
    }

    /// The linear address of the memory operand into r8 (uses r9, and r10 where the
    /// segment is looked at). Gives the address if it is a constant.
    pub(super) fn address(&mut self, i: &Instruction, from: i32, span: i32, write: bool) -> Option<u64> {
        let seg = Vcpu::segment_index(i.memory_segment()) as u8;
        let examined = self.examined(i);
        let based = self.bits == 64 && matches!(seg, 4 | 5);
        let base = i.memory_base();
        let index = i.memory_index();
        let disp = i.memory_displacement64();
        let size = if base != Register::None { base.size() } else { index.size() };
        let mut constant = None;
        if base == Register::None && index == Register::None || i.is_ip_rel_memory_operand() {
            let disp = disp.wrapping_add(from as u64);
            let v = if self.bits == 64 { disp } else { disp & 0xffff_ffff };
            constant = Some(v);
            self.a.mov_imm(S0, v);
        } else {
            let b = gpr_number(base).map(|(n, _)| self.use_gpr(n, S0));
            let x = gpr_number(index).map(|(n, _)| (self.use_gpr(n, S1), i.memory_index_scale() as u8));
            // 16-bit addresses wrap at 64 KiB and the displacement is one of 16 bits
            let disp = if size == 2 { disp as i16 as i32 } else { (disp as i32).wrapping_add(from) };
            let disp = if base == Register::RSP { disp.wrapping_add(self.stack) } else { disp };
            let wide = size == 8 && self.bits == 64;
            self.a.lea(wide, S0, b, x, disp);
            if size == 2 {
                self.a.movzx16(S0, S0);
            }
        }
        if examined {
            // r10 = offset of the last byte less the bytes that may be reached: negative,
            // or else the address becomes one that no table holds.
            let reach = if write { at::REACH_W } else { at::REACH_R };
            self.a.load(S2, reach + 8 * u32::from(seg));
            self.a.lea(true, S2, Some(S2), Some((S0, 1)), span - 1);
            self.a.load(S1, at::seg_base(seg));
            self.a.lea(false, S0, Some(S0), Some((S1, 1)), 0);
            self.a.pext_gs(S2, S2, at::SIGN);
            self.a.load_indexed(S2, S2, at::ASTRAY);
            self.a.lea(true, S0, Some(S0), Some((S2, 1)), 0);
            return None;
        }
        if based {
            self.a.load(S1, at::seg_base(seg));
            self.a.lea(true, S0, Some(S0), Some((S1, 1)), 0);
            return None;
        }
        constant
    }

    /// Address `[reg + disp]` in the stack segment, into r8.
    pub(super) fn stack_slot(&mut self, reg: u8, disp: i32) {
        // Where SS is not flat, stack accesses are not translated.
        let disp = if reg == GSP { disp + self.stack } else { disp };
        self.a.lea(self.wide(), S0, Some(reg), None, disp);
    }

    /// BT and its kin with a register bit offset reach beyond their operand:
    /// r8 = address + (offset >> log2 size) * size.
    pub(super) fn bit_address(&mut self, i: &Instruction) {
        let n = gpr_number(i.op1_register()).map_or(0, |g| g.0);
        let size = i.op1_register().size();
        self.take_s2();
        self.address(i, 0, 1, false);
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
