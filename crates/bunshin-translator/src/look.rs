//! Guest-virtual to guest-physical for those who look from outside: a page walk that
//! changes nothing, neither accessed bits nor tables nor counters.
//!
//! Rights are not asked for: whoever debugs a guest may see what the guest itself may
//! not. SDM volume 3, chapter 4.
use crate::mmu::{canonical, CR0_PG, CR4_PAE, CR4_PSE};
use crate::vcpu::Vcpu;

const P: u64 = 1;
const PS: u64 = 0x80;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

impl Vcpu {
    /// The gpa behind `gva` in the current address space; None if it is not mapped.
    pub fn look(&self, gva: u64) -> Option<u64> {
        let c = self.cpu();
        if c.cr0 & CR0_PG == 0 {
            return Some(gva & 0xffff_ffff & self.lines);
        }
        let long = c.efer & 0x400 != 0;
        let wide = long || c.cr4 & CR4_PAE != 0;
        if if long { !canonical(gva) } else { gva >> 32 != 0 } {
            return None;
        }
        let (mut table, mut level) = match (long, wide) {
            (true, _) => (c.cr3 & ADDRESS, 4),
            (_, true) => (self.pdptes[(gva >> 30) as usize & 3], 2),
            _ => (c.cr3 & 0xffff_f000 | P, 2),
        };
        if !long && table & P == 0 {
            return None;
        }
        let (index_bits, entry_bits) = if wide { (9, 3) } else { (10, 2) };
        loop {
            let at = 12 + index_bits * (level - 1);
            let index = gva >> at & ((1 << index_bits) - 1);
            let e = self.read_entry((table & ADDRESS) + (index << entry_bits), wide)?;
            if e & P == 0 {
                return None;
            }
            let large = e & PS != 0 && matches!(level, 2 | 3) && (wide || c.cr4 & CR4_PSE != 0);
            if level == 1 || large {
                let inside = (1u64 << at) - 1;
                let high = if !wide && large { (e >> 13 & 0xff) << 32 } else { 0 };
                return Some(((e & ADDRESS & !inside) | high | (gva & inside)) & self.lines);
            }
            table = e;
            level -= 1;
        }
    }
}
