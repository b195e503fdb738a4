//! The guest's flags between the host's register, memory and a recipe; scratch
//! registers.
use super::*;

impl Unit<'_> {
    /// Keep the flags in memory from here on.
    pub(super) fn flags_to_lazy(&mut self) {
        self.claim(S0);
        self.a.mov(S0, RAX);
        self.a.lahf_seto();
        self.a.store32(at::LAZY, RAX);
        self.a.mov(RAX, S0);
        self.flags = Flags::Lazy;
    }

    /// r10 for other use than the group's or a cached register's.
    pub(super) fn take_s2(&mut self) -> u8 {
        self.ungroup();
        self.claim(S2);
        S2
    }

    // --- guest registers that live in memory, cached in scratch registers -----

    /// Scratch register that holds guest register `n`.
    pub(super) fn cached(&self, n: u8) -> Option<u8> {
        self.cache.iter().position(|c| c.is_some_and(|c| c.0 == n)).map(|k| S0 + k as u8)
    }

    /// From here on `host` holds guest register `n`.
    pub(super) fn cache(&mut self, host: u8, n: u8, dirty: bool) {
        self.cache[usize::from(host - S0)] = Some((n, dirty));
    }

    /// A scratch register for other use: what it holds goes to memory.
    pub(super) fn claim(&mut self, host: u8) {
        if let Some((n, true)) = self.cache[usize::from(host - S0)].take() {
            self.a.store(at::gpr(n), host);
        }
    }

    /// Everything to memory and forgotten: whoever comes next knows no cache.
    pub(super) fn claim_all(&mut self) {
        for host in [S0, S1, S2] {
            self.claim(host);
        }
    }

    /// Empty r8 and r9 for a probe; r10 takes one of them over if it is free.
    pub(super) fn vacate(&mut self) {
        for host in [S0, S1] {
            if let (Some((n, dirty)), None, None) =
                (self.cache[usize::from(host - S0)], self.cache[2], self.group.filter(|g| g.host == S2))
            {
                self.a.mov(S2, host);
                self.cache(S2, n, dirty);
                self.cache[usize::from(host - S0)] = None;
            } else {
                self.claim(host);
            }
        }
    }

    /// One of `allowed` that is not among `used`, free if there is one.
    pub(super) fn pick(&mut self, allowed: &[u8], used: &[u8]) -> u8 {
        let fits = |h: &&u8| !used.contains(h);
        let empty = allowed.iter().filter(fits).find(|&&h| self.cache[usize::from(h - S0)].is_none());
        let h = *empty.or_else(|| allowed.iter().find(fits)).expect("three scratch registers suffice");
        if h == S2 {
            self.ungroup();
        }
        self.claim(h);
        h
    }

    /// The host register of guest register `n`, by cache or load; not one of `used`.
    pub(super) fn get(&mut self, n: u8, used: &[u8]) -> u8 {
        if let Some(h) = self.home(n).or_else(|| self.cached(n)) {
            return h;
        }
        let allowed: &[u8] = if self.grouped() { &[S0, S1] } else { &[S2, S0, S1] };
        let h = self.pick(allowed, used);
        self.a.load(h, at::gpr(n));
        self.cache(h, n, false);
        h
    }

    /// A scratch register that `m` does not use.
    pub(super) fn scratch_beside(&mut self, m: Mem) -> u8 {
        if m.base != S0 {
            S0
        } else {
            self.take_s2()
        }
    }

    pub(super) fn flags_to_host(&mut self, scratch: u8, live: u32) {
        if live != 0 && matches!(self.flags, Flags::Lazy | Flags::Recipe) {
            self.claim(scratch);
        }
        if self.flags == Flags::Lazy && live != 0 {
            self.a.mov(scratch, RAX);
            self.a.load32(RAX, at::LAZY);
            self.a.sahf_of();
            self.a.mov(RAX, scratch);
        }
        if let (Flags::Recipe, Some(r), true) = (self.flags, self.recipe, live != 0) {
            if r.uses(4) {
                self.settle_stack();
            }
            r.emit(&mut self.a, scratch, &self.homes, &mut self.patches);
        }
        if live != 0 {
            self.flags = Flags::Host;
        }
    }

    /// The recipe after `item`, which may have set the flags itself.
    pub(super) fn recipe_after(&self, item: &Item) -> Option<Recipe> {
        if item.effect.writes != 0 {
            return Recipe::of(
                &item.insn,
                &item.effect,
                &self.homes,
                item.insn.ip().wrapping_sub(self.rip) as u16,
            );
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
                M::Lea
                    | M::Push
                    | M::Pop
                    | M::Leave
                    | M::Rdtsc
                    | M::Rdfsbase
                    | M::Rdgsbase
                    | M::Clac
                    | M::Swapgs
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
