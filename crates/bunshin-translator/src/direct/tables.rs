//! The guest's page tables as a processor's TLB could have read them ahead: entries that
//! are present and accessed already. Nothing is changed here, nothing faults; accesses that
//! happen walk as any (`mmu.rs`).
//!
//! Only long mode with four levels: the rest does not run directly.

use crate::mmu::{A, ADDRESS, D, EFER_NXE, NX, P, PHYSICAL, PS, U, W};
use crate::vcpu::Vcpu;

/// Pages that one page table maps, or one large page of that size.
pub const CHUNK: usize = 512;
const CHUNK_BITS: u32 = 21;

/// Which chunk of the address space `va` lies in, and which of its pages that is.
pub fn split(va: u64) -> (u64, usize) {
    (va >> CHUNK_BITS, (va >> 12) as usize & (CHUNK - 1))
}

/// Address of page `n` of a chunk.
pub fn join(chunk: u64, n: usize) -> u64 {
    chunk << CHUNK_BITS | (n as u64) << 12
}

/// The page table of a chunk, or the large page in its place.
#[derive(Clone, Copy)]
pub struct Leaves {
    /// Guest address of the table, or of the part of a large page.
    at: u64,
    /// The large page's entry; none for a table.
    large: Option<u64>,
    /// Bits that all entries so far have in common, and NX of any.
    rights: u64,
    nx: u64,
    /// log2 of the page size: 12, 21, 30.
    pub bits: u8,
}

/// What the tables say of a page for user mode.
#[derive(Clone, Copy, Debug)]
pub struct Leaf {
    pub gpa: u64,
    /// Writable, and dirty already.
    pub store: bool,
    pub execute: bool,
}

impl Vcpu {
    /// The leaves of the chunk with `va`; none where something is absent, reserved, the
    /// kernel's own or not accessed yet.
    pub(super) fn leaves(&self, va: u64) -> Option<Leaves> {
        let mut table = self.cpu().cr3 & ADDRESS;
        let (mut rights, mut nx) = (u64::MAX, 0);
        for bits in [39u8, 30, 21] {
            let e = self.read_entry(table + 8 * (va >> bits & 511), true)?;
            self.is_loaded(e)?;
            rights &= e;
            nx |= e & NX;
            if e & PS == 0 {
                table = e & ADDRESS;
                continue;
            }
            let size = 1u64 << bits;
            // Between the PAT bit and the address of a large page.
            if bits == 39 || e & (size - 1) & !0x1fff != 0 {
                return None;
            }
            let at = (e & ADDRESS & !(size - 1)) | va & (size - 1) & !((1 << CHUNK_BITS) - 1);
            return Some(Leaves { at, large: Some(e), rights, nx, bits });
        }
        Some(Leaves { at: table, large: None, rights, nx, bits: 12 })
    }

    /// Page `n` of them.
    pub(super) fn leaf(&self, leaves: &Leaves, n: usize) -> Option<Leaf> {
        let (e, gpa) = match leaves.large {
            Some(e) => (e, leaves.at + 4096 * n as u64),
            None => {
                let e = self.read_entry(leaves.at + 8 * n as u64, true)?;
                (e, e & ADDRESS)
            }
        };
        self.is_loaded(e)?;
        let rights = leaves.rights & e;
        (rights & U != 0).then_some(Leaf {
            gpa,
            store: rights & W != 0 && e & D != 0,
            execute: (leaves.nx | e & NX) == 0,
        })
    }

    /// A TLB may hold what the entry says.
    fn is_loaded(&self, e: u64) -> Option<()> {
        let reserved = ADDRESS & !PHYSICAL | if self.cpu().efer & EFER_NXE == 0 { NX } else { 0 };
        (e & (P | A) == P | A && e & reserved == 0).then_some(())
    }
}
