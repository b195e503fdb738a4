//! Neighbouring accesses off one base register that share one probe.
use super::bound::step;
use super::*;

/// Neighbouring accesses off one base register that share one probe.
///
/// A register leads to the host from the first access to the last; nothing between
/// them may use it or change the base by an unknown amount.
#[derive(Clone, Copy, Debug)]
pub(super) struct Group {
    pub(super) base: Option<u8>,
    pub(super) index: Option<(u8, u8)>,
    /// Displacement of the lowest byte, and bytes covered.
    pub(super) low: i64,
    pub(super) span: i64,
    /// How far the base register has moved since the probe.
    pub(super) shift: i64,
    pub(super) write: bool,
    /// What leads to the host: its address of the lowest byte, or what is added to
    /// the guest's own base register.
    pub(super) host: u8,
    pub(super) direct: bool,
    /// Accesses still to come: after the last one another group may begin.
    pub(super) left: u32,
}

/// Most bytes that a group covers: what crosses a page takes the other version.
const SPAN: i64 = 256;

/// How many instructions a group may reach ahead.
const REACH: usize = 24;

/// An access as base, index and displacement.
#[derive(Clone, Copy, Debug)]
pub(super) struct Spot {
    pub(super) base: Option<u8>,
    pub(super) index: Option<(u8, u8)>,
    pub(super) disp: i64,
    pub(super) size: i64,
    pub(super) write: bool,
}

impl Group {
    pub(super) fn covers(&self, s: &Spot) -> bool {
        let at = s.disp + self.shift - self.low;
        s.base == self.base
            && s.index == self.index
            && at >= 0
            && at + s.size <= self.span
            && (self.write || !s.write)
    }

    /// Follow one instruction: false if the base or index is lost.
    pub(super) fn step(&mut self, item: &Item) -> bool {
        let i = &item.insn;
        let mut touched = item.writes;
        let base = self.base.map_or(0, |b| 1u16 << b);
        let moved = match i.mnemonic() {
            M::Push | M::Pop | M::Call | M::Ret if self.base == Some(4) => {
                // A pop into the stack pointer itself is not a move by 8.
                if i.mnemonic() == M::Pop
                    && i.op0_kind() == OpKind::Register
                    && gpr_number(i.op0_register()) == Some((4, false))
                {
                    return false;
                }
                Some((4, i64::from(i.stack_pointer_increment())))
            }
            _ => step(i),
        };
        if let Some((moved, by)) = moved {
            if Some(moved) == self.base {
                self.shift += by;
                touched &= !base;
            }
        }
        let index = self.index.map_or(0, |x| 1u16 << x.0);
        touched & (base | index) == 0 && self.shift.abs() < 0x10_0000
    }
}

impl Unit<'_> {
    /// r10 belongs to a group.
    pub(super) fn grouped(&self) -> bool {
        self.group.is_some_and(|g| g.host == S2)
    }

    /// r10 is wanted for something else.
    pub(super) fn ungroup(&mut self) {
        if self.grouped() {
            self.group = None;
        }
    }

    /// The access as base, index and displacement, if it has that form.
    pub(super) fn spot(&self, place: Place, size: u32, write: bool) -> Option<Spot> {
        // The version that takes over is found by links, which stay inside a page.
        let near = self.same_page(self.at);
        if self.bits != 64 || self.bounce || self.mode & mode::ALONE != 0 || !near {
            return None;
        }
        let size = i64::from(size);
        Some(match place {
            Place::Stack(below) => Spot { base: Some(4), index: None, disp: -i64::from(below), size, write },
            Place::Frame => Spot { base: Some(5), index: None, disp: 0, size, write },
            Place::Operand(i) => {
                let (base, index) = (i.memory_base(), i.memory_index());
                if matches!(i.memory_segment(), Register::FS | Register::GS) {
                    return None;
                }
                if let Some(address) = constant_address(i) {
                    let disp = address as i64;
                    let plain = disp.unsigned_abs() < 1 << 62;
                    return plain.then_some(Spot { base: None, index: None, disp, size, write });
                }
                if base == Register::None || !base.is_gpr64() || index != Register::None && !index.is_gpr64()
                {
                    return None;
                }
                let index = gpr_number(index).map(|g| (g.0, i.memory_index_scale() as u8));
                let disp = i.memory_displacement64() as i64;
                Spot { base: gpr_number(base).map(|g| g.0), index, disp, size, write }
            }
            Place::Bits(_) => return None,
        })
    }

    /// The accesses of one instruction, in order.
    pub(super) fn spots(&self, item: &Item) -> [Option<Spot>; 2] {
        let i = &item.insn;
        let word = 8;
        let explicit = if item.access == OpAccess::None || crate::interp::bit_string(i) {
            None
        } else {
            let size = i.memory_size().size() as u32;
            (size > 0 && size <= 64)
                .then(|| self.spot(Place::Operand(i), size, writes(item.access)))
                .flatten()
        };
        let stack = match i.mnemonic() {
            M::Push => {
                self.spot(Place::Stack(i32::from(self.stack_size(i))), self.stack_size(i).into(), true)
            }
            M::Call => self.spot(Place::Stack(word), 8, true),
            M::Pop => self.spot(Place::Stack(0), self.stack_size(i).into(), false),
            M::Ret => self.spot(Place::Stack(0), 8, false),
            M::Leave => self.spot(Place::Frame, 8, false),
            _ => None,
        };
        [explicit, stack]
    }

    /// What the instructions from here on access off the same base; None if
    /// nothing joins `first`.
    pub(super) fn gather(&self, first: Spot) -> Option<Group> {
        self.gather_from(first, 2)
    }

    /// The same, of `least` accesses or more.
    pub(super) fn gather_from(&self, first: Spot, least: u32) -> Option<Group> {
        let (mut low, mut high, mut count, mut write) = (first.disp, first.disp + first.size, 0, first.write);
        let mut g = Group {
            base: first.base,
            index: first.index,
            low: 0,
            span: 0,
            shift: 0,
            write: false,
            host: S2,
            direct: false,
            left: 0,
        };
        for item in self.items[self.now..].iter().take(REACH) {
            let i = &item.insn;
            if i.code() == Code::INVALID || crate::interp::wants_helper(i, self.mode) {
                break;
            }
            if self.is_bound(i.ip().wrapping_sub(self.rip) as i16) {
                continue;
            }
            for s in self.spots(item).into_iter().flatten() {
                if s.base != first.base || s.index != first.index {
                    continue;
                }
                let at = s.disp + g.shift;
                let (l, h) = (low.min(at), high.max(at + s.size));
                if h - l > SPAN {
                    continue;
                }
                (low, high, write) = (l, h, write || s.write);
                count += 1;
            }
            if i.flow_control() != FlowControl::Next || !g.step(item) {
                break;
            }
        }
        (count >= least).then(|| Group { low, span: high - low, shift: 0, write, left: count - 1, ..g })
    }
}
