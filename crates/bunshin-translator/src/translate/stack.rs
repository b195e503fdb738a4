//! PUSH and POP.
use super::*;

impl Unit<'_> {
    pub(super) fn push(&mut self, i: &Instruction, live: u32) {
        let size = self.stack_size(i);
        match i.op0_kind() {
            OpKind::Register => {
                let (n, _) = gpr_number(i.op0_register()).unwrap();
                self.push_with(size, live, |u, m| {
                    let r = u.home(n).unwrap_or_else(|| {
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

    pub(super) fn pop(&mut self, i: &Instruction, live: u32) {
        let size = self.stack_size(i);
        let (n, _) = gpr_number(i.op0_register()).unwrap();
        if let Some(h) = self.home(n).filter(|_| n != 4 && size >= 4) {
            let m = self.probe(Place::Stack(0), size.into(), false, live);
            self.a.load_mem(size, h, m);
            self.move_stack(i32::from(size));
            return;
        }
        self.pop_to_s0(size, live);
        self.move_stack(i32::from(size));
        if n == 4 {
            self.settle_stack();
        }
        match self.home(n) {
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

    /// Push what `put` stores.
    pub(super) fn push_with(&mut self, size: u8, live: u32, put: impl FnOnce(&mut Self, Mem)) {
        let m = self.probe(Place::Stack(size.into()), size.into(), true, live);
        put(self, m);
        self.move_stack(-i32::from(size));
    }

    pub(super) fn push_const(&mut self, size: u8, v: u64, live: u32) {
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

    /// Pop into r8, without moving the stack pointer.
    pub(super) fn pop_to_s0(&mut self, size: u8, live: u32) {
        let m = self.probe(Place::Stack(0), size.into(), false, live);
        self.a.load_mem(size, S0, m);
    }

    /// Move the stack pointer: in 64-bit code its register follows when somebody
    /// wants it.
    pub(super) fn move_stack(&mut self, by: i32) {
        if self.wide() {
            self.stack += by;
        } else {
            self.a.lea(false, GSP, Some(GSP), None, by);
        }
    }

    /// The stack pointer's register catches up. Flags stay.
    pub(super) fn settle_stack(&mut self) {
        let by = std::mem::take(&mut self.stack);
        if by != 0 {
            self.a.lea(true, GSP, Some(GSP), None, by);
        }
    }

    /// The instruction wants the stack pointer in its register.
    pub(super) fn wants_stack(&self, i: &Instruction) -> bool {
        let named = |n| {
            i.op_kind(n) == OpKind::Register && gpr_number(i.op_register(n)).is_some_and(|g| g == (4, false))
        };
        // Short addresses wrap where they are computed.
        let short = i.memory_base() != Register::RSP && i.memory_base().full_register() == Register::RSP;
        if short || (0..i.op_count()).any(named) {
            return true;
        }
        match i.mnemonic() {
            M::Push | M::Call | M::Ret => false,
            M::Pop => i.op0_kind() != OpKind::Register,
            M::Lea => i.memory_base().full_register() == Register::RSP,
            _ => i.flow_control() != FlowControl::Next,
        }
    }

    /// ADD and SUB of a constant whose flags nobody reads only move it.
    pub(super) fn moves_stack(&self, item: &Item) -> Option<i32> {
        let i = &item.insn;
        let constant = matches!(i.op1_kind(), OpKind::Immediate8to64 | OpKind::Immediate32to64);
        let idle = item.live_after & item.effect.writes == 0;
        if !self.wide()
            || i.op0_kind() != OpKind::Register
            || i.op0_register() != Register::RSP
            || !constant
            || !idle
        {
            return None;
        }
        let by = i32::try_from(i.immediate(1) as i64).ok().filter(|v| v.unsigned_abs() < 1 << 20)?;
        match i.mnemonic() {
            M::Add => Some(by),
            M::Sub => Some(-by),
            _ => None,
        }
    }
}
