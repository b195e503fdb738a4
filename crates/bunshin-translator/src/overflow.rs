//! What the jump cache has no room for.
//!
//! The jump cache is indexed by the low 16 bits of an address, so two frequent targets
//! with the same ones would drive each other out for ever. Targets that it missed are
//! kept here too, by a hash of more bits; the stub for misses looks before it calls
//! Rust. The entries check the whole address and lead past the check of a block's
//! entry. They lie in the region (`cpu.rs`) and go whenever its jump cache goes.
use crate::asm::{Asm, S0, S1, S2};
use crate::cpu::{OVER_CODE, OVER_RIP};

/// Number of entries.
pub const ENTRIES: usize = 2048;

/// What entry `n` holds while it is empty: an address that would be looked for in
/// another one.
fn nothing(n: u16) -> u64 {
    u64::from(n == 0)
}

/// The entries of one region.
pub struct Overflow {
    /// Value of gs.
    base: u64,
    /// Indices that may be in use; more than the table has never.
    used: Vec<u16>,
}

fn index(rip: u64) -> u16 {
    (rip.wrapping_add(rip >> 16) as usize % ENTRIES) as u16
}

impl Overflow {
    /// Empty entries of the region at `base`, and of its twin at `twin`.
    ///
    /// # Safety
    /// Both are regions, mapped for as long as this lives.
    pub unsafe fn new(base: u64, twin: u64) -> Self {
        let o = Self { base, used: Vec::with_capacity(ENTRIES) };
        for n in 0..ENTRIES as u16 {
            o.set(OVER_RIP, n, nothing(n));
            // SAFETY: as promised to this function.
            unsafe { *((twin + u64::from(OVER_RIP) + 8 * u64::from(n)) as *mut u64) = nothing(n) };
        }
        o
    }

    fn get(&self, table: u32, n: u16) -> u64 {
        // SAFETY: the tables lie inside the region's mapping.
        unsafe { *((self.base + u64::from(table) + 8 * u64::from(n)) as *const u64) }
    }

    fn set(&self, table: u32, n: u16, v: u64) {
        // SAFETY: as in `get`.
        unsafe { *((self.base + u64::from(table) + 8 * u64::from(n)) as *mut u64) = v }
    }

    /// Jumps to `rip` may go to `body`.
    pub fn insert(&mut self, rip: u64, body: u64) {
        let n = index(rip);
        if self.get(OVER_RIP, n) == nothing(n) {
            self.used.push(n);
        }
        self.set(OVER_RIP, n, rip);
        self.set(OVER_CODE, n, body);
    }

    /// The code for `rip` is gone.
    pub fn remove(&mut self, rip: u64) {
        let n = index(rip);
        if self.get(OVER_RIP, n) == rip {
            self.set(OVER_RIP, n, nothing(n));
            // Its index is known; a second entry of it would let the list grow.
            if let Some(k) = self.used.iter().position(|&u| u == n) {
                self.used.swap_remove(k);
            }
        }
    }

    /// Forget all.
    pub fn clear(&mut self) {
        for k in 0..self.used.len() {
            let n = self.used[k];
            self.set(OVER_RIP, n, nothing(n));
        }
        self.used.clear();
    }
}

/// Code that goes on at what the table has for the address in r8, if it has that.
/// `leave` writes what puts the guest's state back, but for r8-r10. Falls through
/// otherwise. Changes the flags, r9 and r10.
pub fn look(a: &mut Asm, leave: impl FnOnce(&mut Asm)) {
    a.rorx(S1, S0, 16);
    a.add(S1, S0);
    a.b(&[0x41, 0x81, 0xe1]); // and r9d, ENTRIES - 1
    a.d(ENTRIES as u32 - 1);
    // In this order: a signal may point gs to the twin in between, which has no code.
    a.load_indexed(S2, S1, OVER_CODE);
    a.cmp_indexed(S0, S1, OVER_RIP);
    let other = a.jcc_short(5);
    leave(a);
    a.b(&[0x41, 0xff, 0xe2]); // jmp r10
    a.land(other);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::REGION;

    #[test]
    fn colliding_targets_are_told_apart_and_forgotten() {
        let mut memory = vec![0u64; REGION / 8];
        let mut twin = vec![0u64; REGION / 8];
        // SAFETY: both are large enough and outlive the table.
        let mut o = unsafe { Overflow::new(memory.as_mut_ptr() as u64, twin.as_mut_ptr() as u64) };
        let find =
            |o: &Overflow, rip| (o.get(OVER_RIP, index(rip)) == rip).then(|| o.get(OVER_CODE, index(rip)));
        let (one, two) = (0x7f12_3456_8000, 0x55aa_0011_8000);
        assert_ne!(index(one), index(two));
        o.insert(one, 1);
        o.insert(two, 2);
        assert_eq!((find(&o, one), find(&o, two)), (Some(1), Some(2)));
        o.remove(one);
        o.remove(one);
        assert_eq!((find(&o, one), find(&o, two)), (None, Some(2)));
        o.clear();
        assert_eq!((find(&o, two), o.used.len()), (None, 0));
        for rip in 0..100_000 {
            o.insert(rip, 1);
            o.remove(rip - rip % 3);
        }
        assert!(o.used.len() <= ENTRIES);
        o.clear();
        assert!((0..ENTRIES as u16).all(|n| o.get(OVER_RIP, n) == nothing(n)));
        assert!([0, 1, 1 << 63, u64::MAX].iter().all(|&rip| o.get(OVER_RIP, index(rip)) != rip));
    }
}
