//! What an owner stops a processor for, by KVM_SET_GUEST_DEBUG.
//!
//! KVM holds breakpoints and watchpoints in the host's four debug registers, so there are
//! four at most, each of 1, 2, 4 or 8 aligned bytes, and none for loads alone: SDM
//! volume 3, 17.2. Software breakpoints would change the guest's memory and are not used.
//! While it steps, a processor stops for no breakpoint: it has to pass the one it is at.
use crate::refused;
use crate::vcpu::KvmVcpu;
use bunshin_core::debug::{Access, Debugging, Stop, Watchpoint};
use bunshin_core::{EngineError, Result};
use kvm_bindings::{
    kvm_debug_exit_arch, kvm_guest_debug, kvm_guest_debug_arch, KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE,
    KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP,
};

/// Debug registers that hold addresses.
const SLOTS: usize = 4;
/// DR6: a single step.
const BS: u64 = 1 << 14;
/// DR7 with nothing enabled.
const DR7: u64 = 0x400;

/// What a debug register waits for.
#[derive(Clone, Copy, Debug)]
enum Slot {
    Breakpoint(u64),
    /// An aligned part of a watchpoint: address, log2 of its length, and the whole.
    Watch(u64, u32, Watchpoint),
}

/// What the registers are set to.
#[derive(Default, Debug)]
pub(crate) struct Armed(Vec<Slot>);

/// Aligned parts of 1 to 8 bytes that make up a range.
fn parts(w: &Watchpoint) -> Vec<Slot> {
    let (mut at, mut left) = (w.gva, w.length);
    let mut parts = Vec::new();
    while left > 0 && parts.len() <= SLOTS {
        let bits = at.trailing_zeros().min(left.ilog2()).min(3);
        parts.push(Slot::Watch(at, bits, *w));
        at = at.wrapping_add(1 << bits);
        left -= 1 << bits;
    }
    parts
}

impl Armed {
    /// Find room for all of it.
    fn new(d: &Debugging) -> Result<Self> {
        let bad = |what: &str| Err(EngineError::new("debug", format!("KVM {what}")));
        if d.count.is_some() {
            return bad("does not count instructions");
        }
        if d.watchpoints.iter().any(|w| w.access == Access::Read) {
            return bad("has no watchpoints for reads alone; watch accesses instead");
        }
        let mut slots: Vec<_> = d.watchpoints.iter().flat_map(parts).collect();
        if !d.step {
            slots.extend(d.breakpoints.iter().map(|&at| Slot::Breakpoint(at)));
        }
        if slots.len() > SLOTS {
            return bad("has four debug registers for breakpoints and watchpoints, and more were asked for");
        }
        Ok(Self(slots))
    }

    /// DR0 to DR7.
    fn registers(&self) -> [u64; 8] {
        let mut dr = [0; 8];
        dr[7] = DR7;
        for (n, slot) in self.0.iter().enumerate() {
            let (at, field) = match *slot {
                Slot::Breakpoint(at) => (at, 0),
                Slot::Watch(at, bits, w) => {
                    let length = [0u64, 1, 3, 2][bits as usize];
                    (at, length << 2 | if w.access == Access::Write { 1 } else { 3 })
                }
            };
            dr[n] = at;
            dr[7] |= 2 << (2 * n) | field << (16 + 4 * n);
        }
        dr
    }

    /// Why the processor stopped. None: for nothing that was asked for.
    pub(crate) fn why(&self, exit: &kvm_debug_exit_arch) -> Option<Stop> {
        let met = |n: usize| exit.dr6 >> n & 1 != 0;
        let slot = (0..self.0.len()).find(|&n| met(n)).map(|n| self.0[n]);
        match slot {
            Some(Slot::Breakpoint(at)) => Some(Stop::Breakpoint(at)),
            Some(Slot::Watch(_, _, w)) => Some(Stop::Watchpoint(w)),
            None => (exit.dr6 & BS != 0).then_some(Stop::Step),
        }
    }
}

impl KvmVcpu {
    /// Stop for this from now on. `d` was checked.
    pub(crate) fn arm(&mut self, d: &Debugging) -> Result<()> {
        let armed = Armed::new(d)?;
        let mut control = 0;
        if !armed.0.is_empty() {
            control |= KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP;
        }
        if d.step {
            control |= KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP;
            control |= if d.interrupts { 0 } else { KVM_GUESTDBG_BLOCKIRQ };
        }
        let arch = kvm_guest_debug_arch { debugreg: armed.registers() };
        let debug = kvm_guest_debug { control, pad: 0, arch };
        self.fd.set_guest_debug(&debug).map_err(|e| refused("setting breakpoints", e))?;
        self.armed = armed;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(gva: u64, length: u64, access: Access) -> Watchpoint {
        Watchpoint { gva, length, access }
    }

    #[test]
    fn registers_as_the_manual_has_them() {
        let d = Debugging {
            breakpoints: vec![0x1000],
            watchpoints: vec![watch(0x2000, 8, Access::Write), watch(0x3004, 4, Access::Any)],
            ..Debugging::default()
        };
        let dr = Armed::new(&d).unwrap().registers();
        assert_eq!(dr[..3], [0x2000, 0x3004, 0x1000]);
        // Global enables; R/W and LEN: stores of 8 (01, 10), accesses of 4 (11, 11), code (00, 00).
        assert_eq!(dr[7], 0x400 | 0b10_10_10 | 0b1001 << 16 | 0b1111 << 20);
    }

    #[test]
    fn ranges_are_taken_apart() {
        let of = |gva, length| {
            parts(&watch(gva, length, Access::Write))
                .iter()
                .map(|s| match s {
                    Slot::Watch(at, bits, _) => (*at, 1u64 << bits),
                    Slot::Breakpoint(_) => unreachable!(),
                })
                .collect::<Vec<_>>()
        };
        assert_eq!(of(0x1000, 8), [(0x1000, 8)]);
        assert_eq!(of(0x1003, 4), [(0x1003, 1), (0x1004, 2), (0x1006, 1)]);
        assert_eq!(of(0x1000, 12), [(0x1000, 8), (0x1008, 4)]);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let slug = |d: Debugging| Armed::new(&d).map(drop).unwrap_err().slug;
        let none = Debugging::default;
        assert_eq!(slug(Debugging { breakpoints: vec![1, 2, 3, 4, 5], ..none() }), "debug");
        assert_eq!(slug(Debugging { watchpoints: vec![watch(1, 1 << 20, Access::Any)], ..none() }), "debug");
        assert_eq!(slug(Debugging { watchpoints: vec![watch(0, 1, Access::Read)], ..none() }), "debug");
        assert_eq!(slug(Debugging { count: Some(1), ..none() }), "debug");
        // A step passes breakpoints, so it needs no room for them.
        assert!(Armed::new(&Debugging { breakpoints: vec![1, 2, 3, 4, 5], step: true, ..none() }).is_ok());
    }

    #[test]
    fn dr6_tells_why() {
        let w = watch(0x2000, 8, Access::Write);
        let d = Debugging { breakpoints: vec![0x1000], watchpoints: vec![w], ..Debugging::default() };
        let armed = Armed::new(&d).unwrap();
        let why = |dr6| armed.why(&kvm_debug_exit_arch { dr6, ..Default::default() });
        assert_eq!(why(1), Some(Stop::Watchpoint(w)));
        assert_eq!(why(2), Some(Stop::Breakpoint(0x1000)));
        assert_eq!(why(BS), Some(Stop::Step));
        assert_eq!(why(4), None);
    }
}
