//! Translations that come back: code that was written over with what it was, or
//! with other constants in the same places, as JIT compilers and patches do.
//!
//! A write into a page drops all of its translations. What they were made from is
//! remembered; when one of them is wanted again and its bytes differ only in
//! constants that the translation copied, these are copied once more.
use crate::block::Key;
use crate::vcpu::Vcpu;
use iced_x86::{Code, Instruction, OpKind};

/// A constant of the guest's code inside a translation.
#[derive(Clone, Copy, Debug)]
pub struct Patch {
    /// Offset of its bytes from the block's first.
    pub guest: u16,
    /// Offset of the host's from the translation's start.
    pub host: u32,
    /// 4 or 8.
    pub size: u8,
    pub negated: bool,
    /// What is added to it there.
    pub plus: i32,
}

/// What a dropped translation was made from.
pub struct Grave {
    id: u32,
    /// Range inside the page, and its bytes; the block's own first.
    ranges: Vec<(u16, Vec<u8>)>,
}

/// Most dropped translations that are remembered.
const GRAVES: usize = 4096;

/// The instruction's immediate may change without anything else changing: offset
/// from the instruction's start and size.
pub fn patchable(i: &Instruction) -> Option<(u16, u8)> {
    use Code::*;
    let size = match i.code() {
        Mov_r64_imm64 => 8,
        Mov_r32_imm32 | Mov_rm32_imm32 | Mov_rm64_imm32 => 4,
        Add_EAX_imm32 | Or_EAX_imm32 | Adc_EAX_imm32 | Sbb_EAX_imm32 | And_EAX_imm32 | Sub_EAX_imm32
        | Xor_EAX_imm32 | Cmp_EAX_imm32 | Test_EAX_imm32 => 4,
        Add_rm32_imm32 | Or_rm32_imm32 | Adc_rm32_imm32 | Sbb_rm32_imm32 | And_rm32_imm32
        | Sub_rm32_imm32 | Xor_rm32_imm32 | Cmp_rm32_imm32 | Test_rm32_imm32
            if i.op0_kind() == OpKind::Register =>
        {
            4
        }
        _ => return None,
    };
    Some(((i.len() - size) as u16, size as u8))
}

impl Vcpu {
    /// Remember what block `id` was made from; its page still has it.
    pub fn bury(&mut self, id: u32) {
        let b = &mut self.blocks.all[id as usize];
        if b.dead || b.heat.is_some() || b.second.is_some() {
            return;
        }
        let Some(page) = self.phys.host(b.key.gpa & !0xfff) else { return };
        let start = (b.key.gpa & 0xfff) as u16;
        let own = (start, start + b.length);
        let ranges = std::iter::once(own)
            .chain(std::mem::take(&mut b.relied))
            .map(|(from, to)| {
                let mut bytes = vec![0; usize::from(to - from)];
                // SAFETY: a page of guest RAM, of which this is a part.
                unsafe {
                    let at = (page + u64::from(from)) as *const u8;
                    std::ptr::copy_nonoverlapping(at, bytes.as_mut_ptr(), bytes.len());
                }
                (from, bytes)
            })
            .collect();
        if self.graves.len() == GRAVES {
            self.graves.clear();
        }
        self.graves.insert(b.key, Grave { id, ranges });
    }

    /// Bring back the translation for `key`, whose page is `page`, if it still fits.
    pub fn revive(&mut self, key: &Key, page: &[u8]) -> Option<u32> {
        let g = self.graves.remove(key)?;
        if self.blocks.all[g.id as usize].reach > self.code_limit() {
            return None;
        }
        let b = &mut self.blocks.all[g.id as usize];
        let mut changed = false;
        for (n, (from, old)) in g.ranges.iter().enumerate() {
            let new = &page[usize::from(*from)..usize::from(*from) + old.len()];
            if new == old.as_slice() {
                continue;
            }
            if n != 0 {
                return None;
            }
            let constant = |k: usize| {
                b.patches
                    .iter()
                    .any(|p| (usize::from(p.guest)..usize::from(p.guest) + usize::from(p.size)).contains(&k))
            };
            if (0..old.len()).any(|k| old[k] != new[k] && !constant(k)) {
                return None;
            }
            changed = true;
        }
        if changed {
            let start = usize::from(g.ranges[0].0);
            for p in &b.patches {
                let at = start + usize::from(p.guest);
                let bytes = &page[at..at + usize::from(p.size)];
                let host = b.address(p.host);
                if p.size == 8 {
                    self.cache.write(host, bytes);
                    continue;
                }
                let v = i32::from_le_bytes(bytes.try_into().ok()?);
                let v = if p.negated { v.wrapping_neg() } else { v };
                self.cache.write(host, &v.wrapping_add(p.plus).to_le_bytes());
            }
            self.slow_sites.clear();
        }
        b.dead = false;
        b.relied = g.ranges[1..].iter().map(|(from, bytes)| (*from, from + bytes.len() as u16)).collect();
        self.blocks.index.insert(*key, g.id);
        self.counters.revived += 1;
        Some(g.id)
    }
}
