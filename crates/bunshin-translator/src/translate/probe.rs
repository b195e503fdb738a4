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

impl Unit<'_> {
    /// The address `from` bytes past an operand into r8; uses r9 (and r10 for
    /// bit strings).
    pub(super) fn locate(&mut self, place: Place, from: i64) -> Option<u64> {
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
    pub(super) fn probe(&mut self, place: Place, size: u32, write: bool, live: u32) -> Mem {
        self.ahead = self.ahead.saturating_sub(1);
        let spot = self.spot(place, size, write);
        if let (Some(s), Some(g)) = (spot, self.group) {
            if g.covers(&s) {
                return Mem { base: S2, index: None, disp: (s.disp + g.shift - g.low) as i32 };
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
        if keep || start.is_some() {
            self.claim(S2);
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
    pub(super) fn check(
        &mut self,
        place: Place,
        (from, span): (i64, i64),
        write: bool,
        keep: bool,
        grouped: bool,
    ) {
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
        // The slow path and the guest's handlers look for registers in memory.
        if let Some((n, true)) = self.cache[2] {
            self.a.store(at::gpr(n), S2);
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

    pub(super) fn host_page(&mut self, slot: Option<u32>) {
        match slot {
            Some(n) => self.a.load(S1, HOST + n),
            None => self.a.load_indexed(S1, S1, HOST),
        }
    }

    /// A guest register's value in some host register, loading it to `scratch`
    /// if it is kept in memory.
    pub(super) fn use_gpr(&mut self, n: u8, scratch: u8) -> u8 {
        pinned(n).or_else(|| self.cached(n)).unwrap_or_else(|| {
            self.a.load(scratch, at::gpr(n));
            scratch
        })
    }

    /// The linear address of the memory operand into r8 (uses r9). Gives the
    /// address if it is a constant.
    pub(super) fn address(&mut self, i: &Instruction, from: i32) -> Option<u64> {
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

    /// Address `[reg + disp]` in the stack segment, into r8.
    pub(super) fn stack_slot(&mut self, reg: u8, disp: i32) {
        self.a.lea(self.wide(), S0, Some(reg), None, disp);
        if self.mode & mode::BASED != 0 && self.bits != 64 {
            self.a.load(S1, at::seg_base(2));
            self.a.lea(false, S0, Some(S0), Some((S1, 1)), 0);
        }
    }

    /// BT and its kin with a register bit offset reach beyond their operand:
    /// r8 = address + (offset >> log2 size) * size.
    pub(super) fn bit_address(&mut self, i: &Instruction) {
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
