//! Innocuous instructions: copied with registers renamed.
use super::*;

/// Only general registers: such an instruction cannot fault on the host once its
/// memory operand is checked (divisions read all flags).
fn integer_only(i: &Instruction) -> bool {
    use CpuidFeature as F;
    i.cpuid_features().iter().all(|f| {
        matches!(
            f,
            F::INTEL8086
                | F::INTEL186
                | F::INTEL286
                | F::INTEL386
                | F::INTEL486
                | F::X64
                | F::CMOV
                | F::POPCNT
                | F::LZCNT
                | F::BMI1
                | F::BMI2
                | F::ADX
                | F::MOVBE
        )
    }) && !matches!(i.mnemonic(), M::Wait | M::Div | M::Idiv)
        && (0..i.op_count()).all(|n| i.op_kind(n) != OpKind::Register || i.op_register(n).is_gpr())
}

/// The one-byte INC and DEC of 16- and 32-bit code, REX prefixes in 64-bit code.
pub(super) fn short_count(i: &Instruction) -> bool {
    matches!(i.code(), Code::Inc_r16 | Code::Inc_r32 | Code::Dec_r16 | Code::Dec_r32)
}

impl Unit<'_> {
    /// Such an instruction in the two-byte form.
    pub(super) fn count(&mut self, item: &Item) {
        let i = &item.insn;
        let kept = item.live_after & !item.effect.kills;
        let needed = if self.loses_recipe(item) { ALL } else { kept };
        if needed != 0 && self.flags != Flags::Host {
            self.flags_to_host(S0, needed);
        }
        let (n, _) = gpr_number(i.op0_register()).expect("a general register");
        let h = self.home(n).expect("16- and 32-bit code has no registers in memory");
        if i.op0_register().size() == 2 {
            self.a.b(&[0x66]);
        }
        if h >= 8 {
            self.a.b(&[0x41]);
        }
        let dec = u8::from(i.mnemonic() == M::Dec) << 3;
        self.a.b(&[0xff, 0xc0 | dec | (h & 7)]);
        self.flags = Flags::Host;
    }

    /// Copy the instruction with its registers renamed and its memory operand
    /// behind a probe.
    pub(super) fn generic(&mut self, item: &Item) {
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
        if bit_string {
            self.claim_all();
        }
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
                let short = 8 * crate::interp::address_size(i) < self.bits as usize;
                if i.op1_register().size() == 2 || short || self.examined(i) {
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
        let mut allowed: &[u8] = match to.mem {
            Some(Mem { base: S2, .. } | Mem { index: Some(S2), .. }) => &[S0, S1],
            Some(Mem { base: S0, index: Some(S1), .. }) => &[S2],
            Some(Mem { index: Some(S1), .. }) => &[S0, S2],
            Some(Mem { base: S0, .. }) => &[S1, S2],
            Some(_) => &[S0, S1, S2],
            None if self.grouped() => &[S0, S1, S2],
            None => &[S2, S0, S1],
        };
        let mut used: Vec<u8> = Vec::new();
        let mut taken: [(u8, u8, bool); 4] = [(255, 0, false); 4];
        let mut count = 0;
        let mut spilled = fields
            .iter()
            .filter(|&&f| f != 0 && i.op_kind(u32::from(f) - 1) == OpKind::Register)
            .filter_map(|&f| gpr_number(i.op_register(u32::from(f) - 1)))
            .filter(|g| !g.1 && self.home(g.0).is_none())
            .map(|g| g.0);
        let (first, second) = (spilled.next(), spilled.next());
        let two = first.is_some() && second.is_some() && first != second;
        if let Some(m) = to.mem.filter(|m| m.base == S0 && m.index == Some(S1) && two) {
            // Two of them beside a memory operand: fold the address into one register.
            self.a.lea(true, S0, Some(S0), m.index.map(|x| (x, 1)), 0);
            to.mem = Some(Mem { base: S0, index: None, disp: 0 });
            allowed = &[S1, S2];
        }
        for (slot, &f) in fields.iter().enumerate() {
            if f == 0 || i.op_kind(u32::from(f) - 1) != OpKind::Register {
                continue;
            }
            let reg = i.op_register(u32::from(f) - 1);
            let Some((n, high_byte)) = gpr_number(reg) else { continue };
            let host = if high_byte {
                if copy {
                    let h = self.pick(allowed, &used);
                    used.push(h);
                    self.a.rorx(h, n, 8);
                    h
                } else if swap.is_some() {
                    n // the low byte of the same register
                } else {
                    n + 4
                }
            } else if let Some(h) = self.home(n) {
                h
            } else if let Some(t) = taken[..count].iter().find(|t| t.0 == n) {
                t.1
            } else {
                let (reads_it, writes_it) = self.operand_access(i, n);
                let h = self.cached(n).unwrap_or_else(|| {
                    let h = self.pick(allowed, &used);
                    if reads_it || reg.size() < 4 {
                        self.a.load(h, at::gpr(n));
                    }
                    h
                });
                used.push(h);
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
        if let Some((at, size)) = patchable(i).filter(|_| !self.bounce) {
            let Label(section, end) = self.a.here();
            let guest = (i.ip().wrapping_sub(self.rip) as u16).wrapping_add(at);
            let patch = Patch { guest, host: 0, size, negated: false, plus: 0 };
            self.patches.push((Label(section, end - u32::from(size)), patch));
        }
        if let Some(n) = swap {
            self.a.b(&[0x86, 0xc0 | ((n + 4) << 3) | n]);
        }
        for &(n, h, written) in &taken[..count] {
            if bit_string {
                continue;
            }
            let dirty = written || self.cache[usize::from(h - S0)].is_some_and(|c| c.1);
            self.cache(h, n, dirty);
        }
        if item.effect.writes != 0 {
            self.flags = Flags::Host;
        }
    }

    /// Whether the explicit operands naming guest register `n` are read, written.
    pub(super) fn operand_access(&mut self, i: &Instruction, n: u8) -> (bool, bool) {
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

    /// MOV between the accumulator and a full address.
    pub(super) fn moffs(&mut self, i: &Instruction, live: u32) {
        let size = i.memory_size().size() as u8;
        let load = i.op0_kind() == OpKind::Register;
        let m = self.probe(Place::Operand(i), u32::from(size), !load, live);
        if self.loses_recipe(&self.items[self.now]) {
            let r = self.scratch_beside(m);
            self.flags_to_host(r, ALL);
        }
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

    pub(super) fn lea(&mut self, i: &Instruction) {
        let (n, _) = gpr_number(i.op0_register()).unwrap();
        let size = i.op0_register().size();
        let base = i.memory_base();
        let index = i.memory_index();
        let address = if base != Register::None { base.size() } else { index.size() };
        let disp = i.memory_displacement64();
        let constant = base == Register::None && index == Register::None || i.is_ip_rel_memory_operand();
        if size == 2 || address == 2 {
            self.claim_all();
            if constant {
                self.a.mov_imm(S1, disp & 0xffff);
            } else {
                let b = gpr_number(base).map(|(n, _)| self.use_gpr(n, S0));
                let x = gpr_number(index).map(|(n, _)| (self.use_gpr(n, S1), i.memory_index_scale() as u8));
                let disp = if address == 2 { disp as i16 as i32 } else { disp as i32 };
                self.a.lea(false, S1, b, x, disp);
            }
            if size == 2 {
                return self.low16(n);
            }
            let to = self.home(n).unwrap_or(S0);
            self.a.movzx16(to, S1);
            if to == S0 {
                self.a.store(at::gpr(n), to);
            }
            return;
        }
        let b = gpr_number(base).filter(|_| !constant).map(|(n, _)| self.get(n, &[]));
        let used: &[u8] = &b.map_or([0], |b| [b]);
        let x = gpr_number(index)
            .filter(|_| !constant)
            .map(|(n, _)| (self.get(n, used), i.memory_index_scale() as u8));
        let to = self.home(n).or_else(|| self.cached(n)).unwrap_or_else(|| {
            // The sources are read before this is written, so it may be one of them.
            let allowed: &[u8] = if self.grouped() { &[S0, S1] } else { &[S2, S0, S1] };
            self.pick(allowed, &[])
        });
        if constant {
            let v = if size == 8 && self.bits == 64 { disp } else { disp & 0xffff_ffff };
            self.a.mov_imm(to, v);
        } else {
            self.a.lea(size == 8 && address == 8, to, b, x, disp as i32);
        }
        if self.home(n).is_none() {
            self.cache(to, n, true);
        }
    }

    /// Low 16 bits of guest register `n` from r9.
    pub(super) fn low16(&mut self, n: u8) {
        match self.home(n) {
            Some(h) => self.a.b(&[0x66, 0x44 | (h >> 3), 0x89, 0xc8 | (h & 7)]), // mov h16, r9w
            None => {
                self.a.load(S0, at::gpr(n));
                self.a.b(&[0x66, 0x45, 0x89, 0xc8]); // mov r8w, r9w
                self.a.store(at::gpr(n), S0);
            }
        }
    }
}
