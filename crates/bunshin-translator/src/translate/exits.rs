//! Branches and the ways out of a block.
use super::*;

impl Unit<'_> {
    pub(super) fn branch(&mut self, i: &Instruction, live: u32) {
        let size = (self.bits / 8) as u8;
        // Calls and returns move the stack pointer, maybe the recipe's register.
        let after = self.recipe_after(&self.items[self.now]);
        match i.flow_control() {
            FlowControl::UnconditionalBranch => {
                self.flags_to_host(S2, self.live_out);
                self.exit_to(self.cut(i.near_branch_target()));
            }
            FlowControl::ConditionalBranch => {
                let target = self.cut(i.near_branch_target());
                let through = i.next_ip();
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
                            let over = self.a.jcc_far(cc ^ 1);
                            self.poll(target);
                            self.jump(target);
                            self.a.land_far(over);
                            self.exit_to(through);
                        } else {
                            let cc = i.condition_code() as u8 - 1;
                            let next = Some(self.place + 1);
                            let (to, behind) = (self.inside(target), self.inside(through));
                            // What comes next needs no jump, and a loop one for each turn.
                            if behind != next && (to == next || to.is_none() && behind.is_some()) {
                                self.conditional(cc ^ 1, through);
                                self.exit_to(target);
                            } else {
                                self.conditional(cc, target);
                                self.exit_to(through);
                            }
                        }
                    }
                }
            }
            FlowControl::Call => {
                let target = self.cut(i.near_branch_target());
                self.push_const(size, i.next_ip(), live);
                self.recipe = after;
                self.flags_to_host(S2, self.live_out);
                self.settle_stack();
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
                self.settle_stack();
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
                self.settle_stack();
                self.exit_indirect();
            }
            _ => unreachable!("{i}"),
        }
    }

    pub(super) fn indirect_target(&mut self, i: &Instruction, live: u32, size: u8) {
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

    /// Load the memory operand, `size` bytes, into r8.
    pub(super) fn load_operand(&mut self, i: &Instruction, live: u32, size: u8) {
        let m = self.probe(Place::Operand(i), u32::from(size), false, live);
        self.a.load_mem(size, S0, m);
    }

    /// `jcc` to `target`, linked if it can be.
    pub(super) fn conditional(&mut self, cc: u8, target: u64) {
        if let Some(n) = self.inside(target) {
            return self.a.jcc_stretch(cc, n);
        }
        let cold = Label(Section::Cold, self.a.cold.len() as u32);
        self.a.jcc(cc, cold);
        let Label(s, n) = self.a.here();
        self.a.section(Section::Cold);
        if self.homes.moved().is_empty() && self.linkable(target) {
            self.site_stub(Label(s, n - 4), cold, target, false);
        } else {
            self.depart(target);
        }
        self.a.section(Section::Hot);
    }

    /// Out of the plan to `target`.
    fn depart(&mut self, target: u64) {
        self.leave();
        if self.linkable(target) {
            self.site(target, false);
        } else {
            self.a.mov_imm(S0, target);
            self.a.jmp_gs(JC + 8 * (target as u32 & 0xffff));
        }
    }

    /// The stretch of this plan that begins at `target`.
    fn inside(&self, target: u64) -> Option<usize> {
        if self.mode & mode::COUNTED != 0 {
            return None; // every turn is counted
        }
        self.order.iter().position(|&ip| ip == target)
    }

    /// LOOPcc and JrCXZ, whose conditions leave the flags alone.
    pub(super) fn counted(&mut self, i: &Instruction, target: u64, through: u64) {
        let wide = matches!(
            i.code(),
            Code::Jrcxz_rel8_64 | Code::Loop_rel8_64_RCX | Code::Loope_rel8_64_RCX | Code::Loopne_rel8_64_RCX
        );
        // The host's own instruction on the guest's rcx: AMD processors let a
        // repeat prefix choose between LOOPE and LOOPNE.
        if !wide {
            self.a.b(&[0x67]);
        }
        if i.has_rep_prefix() {
            self.a.b(&[0xf3]);
        } else if i.has_repne_prefix() {
            self.a.b(&[0xf2]);
        }
        let taken = self.a.short(match i.mnemonic() {
            M::Loopne => 0xe0,
            M::Loope => 0xe1,
            M::Loop => 0xe2,
            _ => 0xe3,
        });
        match self.inside(through) {
            Some(n) => self.a.jmp_stretch(n),
            None => {
                let cold = Label(Section::Cold, self.a.cold.len() as u32);
                self.a.jmp(cold);
                self.a.section(Section::Cold);
                self.depart(through);
                self.a.section(Section::Hot);
            }
        }
        self.a.land(taken);
        self.exit_to(target);
    }

    /// The end of a stretch: go on at a known address; flags are in the host.
    pub(super) fn exit_to(&mut self, target: u64) {
        // 16-bit code that runs past 64 KiB does not start again at 0.
        let target = if self.bits == 32 { target & 0xffff_ffff } else { target };
        if self.turns(target) {
            self.poll(target);
        }
        // What lies behind comes next anyway.
        if self.inside(target) != Some(self.place + 1) {
            self.jump(target);
        }
    }

    fn jump(&mut self, target: u64) {
        match self.inside(target) {
            Some(n) => self.a.jmp_stretch(n),
            None => self.depart(target),
        }
    }

    /// Jump to the address in r8; flags are in the host.
    pub(super) fn exit_indirect(&mut self) {
        self.leave();
        self.a.movzx16(S1, S0);
        self.a.jmp_gs_indexed(S1, JC);
    }

    /// A jump that can be linked. Where it leads while it is not stands in the cold
    /// section, right behind it if it stands there itself.
    pub(super) fn site(&mut self, target: u64, alone: bool) {
        let Label(section, n) = self.a.here();
        let behind = if section == Section::Cold { 5 } else { 0 };
        let stub = Label(Section::Cold, self.a.cold.len() as u32 + behind);
        self.a.jmp(stub);
        self.a.section(Section::Cold);
        self.site_stub(Label(section, n + 1), stub, target, alone);
        self.a.section(section);
    }

    /// Where the site with its rel32 at `patch` goes while it is not linked;
    /// `stub` is here.
    pub(super) fn site_stub(&mut self, patch: Label, stub: Label, target: u64, alone: bool) {
        let far = !self.same_page(target);
        let id = (self.v.blocks.sites.len() + self.sites.len()) as u32;
        self.a.mov_imm(S0, target);
        self.a.mov_imm(S2, u64::from(id));
        self.a.jmp_abs(self.v.stubs.link);
        let Label(section, end) = self.a.here();
        self.sites.push((patch, stub, Label(section, end - 4), target, far, alone));
    }

    /// In this block's page, so that it moves only with it.
    pub(super) fn same_page(&self, target: u64) -> bool {
        self.mode & (mode::BASED | mode::CODE_LIMITED) == 0 && target & !0xfff == self.rip & !0xfff
    }

    /// Supervisor text keeps its place; when any of it moves, `unlink_far`
    /// undoes links between pages. User pages differ from process to process.
    pub(super) fn linkable(&self, target: u64) -> bool {
        self.same_page(target) || self.mode & mode::USER == 0
    }

    /// A linked jump backwards in a block that an event would not stop: every
    /// loop has one that looks.
    pub(super) fn turns(&self, target: u64) -> bool {
        !self.probed && target <= self.at && self.linkable(target)
    }

    /// A loop without memory accesses must still hear of events. Flags stay.
    pub(super) fn poll(&mut self, target: u64) {
        self.a.mov(S0, RCX);
        self.a.load32(RCX, at::PENDING);
        let quiet = self.a.jrcxz();
        let cold = Label(Section::Cold, self.a.cold.len() as u32);
        self.a.jmp(cold);
        self.a.land(quiet);
        self.a.mov(RCX, S0);
        self.a.section(Section::Cold);
        self.a.mov(RCX, S0);
        self.leave();
        self.a.mov_imm(S0, target);
        self.a.jmp_abs(self.v.stubs.event);
        self.a.section(Section::Hot);
    }

    /// After an interrupt shadow: deliver what waits, else go on at `target`.
    pub(super) fn window(&mut self, target: u64) {
        self.claim_all();
        self.flags_to_host(S2, ALL);
        self.settle_stack();
        self.a.store8_imm(at::SHADOW, 0);
        if self.v.plant == Some(Plant::LostWindow) {
            return self.exit_to(target);
        }
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

    /// In front of a branch in an interrupt shadow, at `ip`: leave if an interrupt waits, so
    /// that it comes right behind the branch, which is performed alone.
    pub(super) fn window_before(&mut self, ip: u64) {
        self.claim_all();
        self.flags_to_host(S2, ALL);
        self.settle_stack();
        if self.v.plant != Some(Plant::LostWindow) {
            self.a.mov(S0, RCX);
            self.a.load8(RCX, at::IRQ_WAITING);
            let quiet = self.a.jrcxz();
            self.a.mov(RCX, S0);
            self.leave();
            self.a.mov_imm(S0, ip);
            self.a.jmp_abs(self.v.stubs.event);
            self.a.land(quiet);
            self.a.mov(RCX, S0);
        }
        self.a.store8_imm(at::SHADOW, 0);
    }

    /// STI ends the block: the instruction that its shadow is for is performed alone.
    pub(super) fn leave_shadowed(&mut self, target: u64) {
        self.claim_all();
        self.flags_to_host(S2, ALL);
        self.settle_stack();
        self.leave();
        self.a.mov_imm(S0, target);
        self.a.jmp_abs(self.v.stubs.event);
    }

    pub(super) fn cut(&self, v: u64) -> u64 {
        match self.bits {
            64 => v,
            32 => v & 0xffff_ffff,
            _ => v & 0xffff,
        }
    }
}
