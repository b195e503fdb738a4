//! Guest memory as KVM's slots, with the log of written pages and the A20 gate.
//!
//! KVM has no A20 gate. While it is closed, the odd megabytes of the first 64 show the
//! even ones below them; above that, where no program of those days looks, they stay as
//! they are. Moving slots is not atomic for other processors that run meanwhile; whoever
//! closes the gate is alone.
use crate::refused;
use bunshin_core::memory::{Slot, PAGE};
use bunshin_core::{EngineError, GuestMemory, Region, Result};
use kvm_bindings::{kvm_userspace_memory_region, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY};
use kvm_ioctls::VmFd;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

const MIB: u64 = 1 << 20;
/// End of what the A20 gate moves.
const GATED: u64 = 64 * MIB;

/// What one of KVM's slots shows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Piece {
    gpa: u64,
    length: u64,
    host: u64,
    readonly: bool,
    logged: bool,
}

#[derive(Default)]
struct Slots {
    /// By KVM's slot number.
    pieces: Vec<Option<Piece>>,
    closed: bool,
    /// Guest addresses `[from, to)` whose writes are logged.
    logged: Vec<(u64, u64)>,
    /// Pages written by others than the processors since they were taken.
    written: BTreeSet<u64>,
}

/// The memory of one virtual machine.
pub struct Memory {
    // Goes before the host memory that it uses.
    vm: Arc<VmFd>,
    pub guest: Arc<GuestMemory>,
    most: usize,
    slots: Mutex<Slots>,
}

impl Memory {
    pub fn new(vm: Arc<VmFd>, most: usize) -> Self {
        Self { guest: GuestMemory::new(), vm, most, slots: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn map(
        &self,
        gpa: u64,
        region: &Arc<Region>,
        offset: u64,
        length: u64,
        readonly: bool,
    ) -> Result<()> {
        let mut slots = self.lock();
        self.guest.map(gpa, region, offset, length, readonly)?;
        self.apply(&mut slots).inspect_err(|_| self.guest.unmap(gpa, length))
    }

    pub fn unmap(&self, gpa: u64, length: u64) -> Result<()> {
        let mut slots = self.lock();
        self.guest.unmap(gpa, length);
        self.apply(&mut slots)
    }

    pub fn set_a20(&self, open: bool) -> Result<()> {
        let mut slots = self.lock();
        slots.closed = !open;
        self.apply(&mut slots)
    }

    /// A store to memory that the guest may not write: it is dropped.
    pub fn is_rom(&self, gpa: u64) -> bool {
        self.guest.slots().iter().any(|s| s.readonly && gpa >= s.gpa && gpa - s.gpa < s.length)
    }

    pub fn write(&self, gpa: u64, from: &[u8]) -> bool {
        let done = self.guest.write(gpa, from);
        let mut slots = self.lock();
        if !slots.logged.is_empty() && !from.is_empty() {
            let last = gpa.saturating_add(from.len() as u64 - 1);
            slots.written.extend(gpa / PAGE..=last / PAGE);
        }
        done
    }

    /// As `Engine::take_dirty`. The log of a page begins when it is asked for the first
    /// time; all that came before is one answer: written.
    pub fn take_dirty(&self, gpa: u64, length: u64) -> Result<Vec<u8>> {
        let end = gpa.checked_add(length).filter(|_| gpa % PAGE == 0 && length % PAGE == 0);
        let end = end.ok_or_else(|| {
            EngineError::new("dirty-log", format!("{length:#x} bytes at gpa {gpa:#x} are not whole pages"))
        })?;
        let mut slots = self.lock();
        let known = slots.logged.iter().any(|&(from, to)| from <= gpa && end <= to);
        let mut bits = vec![0; (length / PAGE).div_ceil(8) as usize];
        let mut set = |page: u64| {
            if page >= gpa / PAGE && page < end / PAGE {
                let n = (page - gpa / PAGE) as usize;
                bits[n / 8] |= 1 << (n % 8);
            }
        };
        if !known {
            slots.logged.push((gpa, end));
            self.apply(&mut slots)?;
            (gpa / PAGE..end / PAGE).for_each(&mut set);
        }
        for (number, piece) in slots.pieces.iter().enumerate() {
            let Some(p) = piece.filter(|p| p.logged && p.gpa < end && gpa < p.gpa + p.length) else {
                continue;
            };
            let log = self
                .vm
                .get_dirty_log(number as u32, p.length as usize)
                .map_err(|e| refused("the log of written pages", e))?;
            for (word, &bits) in log.iter().enumerate() {
                (0..64).filter(|b| bits >> b & 1 == 1).for_each(|b| set(p.gpa / PAGE + word as u64 * 64 + b));
            }
        }
        let (from, to) = (gpa / PAGE, end / PAGE);
        slots.written.range(from..to).for_each(|&page| set(page));
        slots.written.retain(|page| !(from..to).contains(page));
        Ok(bits)
    }

    /// Begin all logs anew: others have written meanwhile.
    pub fn forget_log(&self) {
        let mut slots = self.lock();
        slots.logged.clear();
        slots.written.clear();
    }

    /// What the slots should show.
    fn wanted(&self, slots: &Slots) -> Vec<Piece> {
        let mut pieces = Vec::new();
        let all = self.guest.slots();
        let whole = |s: &Slot, from: u64, to: u64| Piece {
            gpa: from,
            length: to - from,
            host: s.host as u64 + (from - s.gpa),
            readonly: s.readonly,
            logged: slots.logged.iter().any(|&(a, b)| a < to && from < b),
        };
        for s in &all {
            let (mut at, end) = (s.gpa, s.gpa + s.length);
            // Even megabytes show themselves; the odd ones are added below.
            while slots.closed && at < end && at < GATED {
                let next = ((at / MIB + 1) * MIB).min(end);
                if at / MIB % 2 == 0 {
                    pieces.push(whole(s, at, next));
                }
                at = next;
            }
            if at < end {
                pieces.push(whole(s, at, end));
            }
        }
        if slots.closed {
            let even: Vec<_> = pieces.iter().filter(|p| p.gpa < GATED).copied().collect();
            pieces.extend(even.iter().map(|p| Piece { gpa: p.gpa + MIB, ..*p }));
        }
        pieces
    }

    /// Make KVM's slots show what they should.
    fn apply(&self, slots: &mut Slots) -> Result<()> {
        let wanted = self.wanted(slots);
        if wanted.len() > self.most {
            let (asked, most) = (wanted.len(), self.most);
            return Err(EngineError::new(
                "memory-map",
                format!("{asked} pieces of memory, KVM takes {most}"),
            ));
        }
        for number in 0..slots.pieces.len() {
            let Some(p) = slots.pieces[number].filter(|p| !wanted.contains(p)) else { continue };
            self.set(number, Piece { length: 0, ..p })?;
            slots.pieces[number] = None;
        }
        for p in wanted {
            if slots.pieces.contains(&Some(p)) {
                continue;
            }
            let free = slots.pieces.iter().position(Option::is_none).unwrap_or_else(|| {
                slots.pieces.push(None);
                slots.pieces.len() - 1
            });
            self.set(free, p)?;
            slots.pieces[free] = Some(p);
        }
        Ok(())
    }

    fn set(&self, number: usize, p: Piece) -> Result<()> {
        let logged = if p.logged { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        let region = kvm_userspace_memory_region {
            slot: number as u32,
            flags: if p.readonly { KVM_MEM_READONLY | logged } else { logged },
            guest_phys_addr: p.gpa,
            memory_size: p.length,
            userspace_addr: p.host,
        };
        // SAFETY: the host memory belongs to a region that `guest` holds while it is mapped;
        // the virtual machine goes before, see `KvmEngine`.
        unsafe { self.vm.set_user_memory_region(region) }
            .map_err(|e| refused(format!("mapping {:#x} bytes at gpa {:#x}", p.length, p.gpa), e))
    }
}
