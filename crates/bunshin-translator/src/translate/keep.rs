//! The guest's flags between the host's register, memory and a recipe; scratch
//! registers.
use super::*;

impl Unit<'_> {
    /// Keep the flags in memory from here on.
    pub(super) fn flags_to_lazy(&mut self) {
        self.a.mov(S0, RAX);
        self.a.lahf_seto();
        self.a.store32(at::LAZY, RAX);
        self.a.mov(RAX, S0);
        self.flags = Flags::Lazy;
    }

    /// r10 for other use than the group's.
    pub(super) fn take_s2(&mut self) -> u8 {
        self.group = None;
        S2
    }

    /// The first of `free`, which it leaves.
    pub(super) fn take(&mut self, free: &mut &[u8]) -> u8 {
        let r = free[0];
        *free = &free[1..];
        if r == S2 {
            self.group = None;
        }
        r
    }

    /// A scratch register that `m` does not use.
    pub(super) fn scratch_beside(&mut self, m: Mem) -> u8 {
        if m.base == S2 {
            S0
        } else {
            self.take_s2()
        }
    }

    pub(super) fn flags_to_host(&mut self, scratch: u8, live: u32) {
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
    pub(super) fn recipe_after(&self, item: &Item) -> Option<Recipe> {
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
    pub(super) fn by_generic(&self, i: &Instruction) -> bool {
        i.flow_control() == FlowControl::Next
            && !matches!(
                i.mnemonic(),
                M::Lea | M::Push | M::Pop | M::Leave | M::Rdtsc | M::Rdfsbase | M::Rdgsbase
            )
    }

    /// Flags that only the recipe has, and that `item` makes it lose.
    pub(super) fn loses_recipe(&self, item: &Item) -> bool {
        self.flags == Flags::Recipe
            && item.live_after & !item.effect.kills != 0
            && item.effect.kills != ALL
            && (item.effect.writes != 0 || self.recipe_after(item).is_none())
    }
}
