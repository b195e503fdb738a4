//! Checks done early: a memory operand that comes while the flags live is checked before
//! the instruction that sets them, where they are dead and the plain check serves.
//!
//! ```text
//!         (check of [rsi+r15*8], into r10)
//!         add  r13, rax
//!         mov  rax, [r10]
//!         adc  rdx, 0
//! ```
//!
//! It is a group (`group.rs`) that begins before its first access. Chains of ADD and
//! ADC with loads in between, as in the arithmetic of long numbers, are made of this.
use super::*;

/// How many instructions may lie between.
const REACH: usize = 8;

impl<'a> Unit<'a> {
    /// Before instruction `self.now`: begin the group of the first operand that follows
    /// while the flags live that this instruction sets.
    pub(super) fn check_early(&mut self, item: &Item) {
        if self.group.is_some() || !self.sets_anew(item) {
            return;
        }
        let Some((owner, place, spot)) = self.waiting(item) else { return };
        if self.is_bound(owner) {
            return;
        }
        let Some(g) = self.gather_from(spot, 1) else { return };
        self.guest = item.insn.ip().wrapping_sub(self.rip) as i16;
        self.vacate();
        self.claim(S2);
        self.probed = true;
        self.flags = Flags::Dead;
        self.slots_of = Some(owner);
        let m = self.check(place, (g.low - spot.disp, g.span), g.write, false, true);
        self.slots_of = None;
        self.hold(m, &spot, Group { left: g.left + 1, ..g });
        self.a.section(Section::Cold);
        self.site(item.insn.ip(), true);
        self.a.section(Section::Hot);
    }

    /// Nobody wants the flags before the instruction, somebody those that it sets, and
    /// no recipe brings them back.
    fn sets_anew(&self, item: &Item) -> bool {
        let e = &item.effect;
        let alone = item.access == OpAccess::None && !item.insn.is_stack_instruction();
        e.writes != 0
            && e.live_before(item.live_after) == 0
            && item.live_after != 0
            && alone
            && self.passes(item)
            && self.recipe_after(item).is_none()
    }

    /// It is copied, and runs on to the next.
    fn passes(&self, item: &Item) -> bool {
        let i = &item.insn;
        i.flow_control() == FlowControl::Next
            && i.code() != Code::INVALID
            && !crate::interp::wants_helper(i, self.mode)
            && (self.by_generic(i) || i.mnemonic() == M::Lea)
    }

    /// The first operand behind `item` that comes while flags live, and the offset of
    /// its instruction; None if the registers of its address change before.
    fn waiting(&self, item: &Item) -> Option<(i16, Place<'a>, Spot)> {
        let items = self.items;
        let mut changed = item.writes;
        for next in items[self.now + 1..].iter().take(REACH) {
            let i = &next.insn;
            if next.effect.live_before(next.live_after) == 0
                || i.code() == Code::INVALID
                || crate::interp::wants_helper(i, self.mode)
            {
                return None;
            }
            let found = match self.spots(next) {
                [Some(spot), _] => Some((Place::Operand(i), spot)),
                [None, Some(spot)] if spot.base == Some(5) => Some((Place::Frame, spot)),
                [None, Some(spot)] => Some((Place::Stack(-spot.disp as i32), spot)),
                [None, None] => None,
            };
            if let Some((place, spot)) = found {
                let base = spot.base.map_or(0, |b| 1u16 << b);
                let index = spot.index.map_or(0, |x| 1u16 << x.0);
                let owner = i.ip().wrapping_sub(self.rip) as i16;
                return (changed & (base | index) == 0 && base != 0).then_some((owner, place, spot));
            }
            if next.access != OpAccess::None || i.is_stack_instruction() || !self.passes(next) {
                return None;
            }
            changed |= next.writes;
        }
        None
    }
}
