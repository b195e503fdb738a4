//! Guest-physical memory: regions of host memory mapped at gpa.
//!
//! A region is one `mmap` of the host. Pages are given by the host when they
//! are first touched. The guest can reach nothing outside the regions mapped
//! here; an access elsewhere is a device access.
use crate::error::{EngineError, Result};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, RwLock};

/// Size of a guest page in bytes.
pub const PAGE: u64 = 4096;

/// Size of the huge pages that the host is asked for, in bytes: fewer faults while the
/// guest touches its memory first, and fewer misses of the host's TLB later.
const HUGE: usize = 2 << 20;

/// A block of host memory, zero-filled, page-aligned, released on drop.
pub struct Region {
    host: *mut u8,
    length: usize,
    /// The file behind it, once it is shared.
    file: Mutex<Option<OwnedFd>>,
}

// SAFETY: the region is plain memory that the guest may change at any moment;
// all access goes through raw copies, never through references.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// Reserve `length` bytes (a multiple of 4096) of zero-filled memory.
    pub fn new(length: u64) -> Result<Arc<Self>> {
        if length == 0 || length % PAGE != 0 {
            return Err(EngineError::new(
                "memory-size",
                format!("guest memory of {length} bytes is not a multiple of 4096"),
            ));
        }
        let refused = || {
            EngineError::last_os("host-memory", format!("the host gave no {length} bytes of guest memory"))
        };
        let length = length as usize;
        let whole = length.checked_add(HUGE).ok_or_else(refused)?;
        // SAFETY: a fresh anonymous mapping touches nothing that exists; what is cut off
        // at its ends belongs to it.
        unsafe {
            let area = libc::mmap(
                std::ptr::null_mut(),
                whole,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            );
            if area == libc::MAP_FAILED {
                return Err(refused());
            }
            let before = area.cast::<u8>().align_offset(HUGE);
            let host = area.cast::<u8>().add(before);
            if before > 0 {
                libc::munmap(area, before);
            }
            if whole - before > length {
                libc::munmap(host.add(length).cast(), whole - before - length);
            }
            // Where the host has no huge pages, small ones do.
            libc::madvise(host.cast(), length, libc::MADV_HUGEPAGE);
            Ok(Arc::new(Self { host, length, file: Mutex::new(None) }))
        }
    }

    /// Put a file behind the memory that other processes can map, and return its
    /// descriptor, which lives as long as the region. Addresses and bytes stay the same;
    /// nobody may store there meanwhile.
    pub fn share(&self) -> Result<RawFd> {
        let failed = || EngineError::last_os("host-memory", "guest memory that can be shared");
        let mut file = self.file.lock().unwrap();
        if let Some(fd) = &*file {
            return Ok(fd.as_raw_fd());
        }
        // SAFETY: makes a new descriptor.
        let fd = unsafe { libc::memfd_create(c"bunshin-memory".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(failed());
        }
        // SAFETY: just made.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let raw = fd.as_raw_fd();
        // SAFETY: the descriptor is open; `touched` has a byte for each page. Only pages
        // that exist are read, and the new mapping is as long as the old one.
        unsafe {
            if libc::ftruncate(raw, self.length as libc::off_t) != 0 {
                return Err(failed());
            }
            let mut touched = vec![0u8; self.length.div_ceil(PAGE as usize)];
            if libc::mincore(self.host.cast(), self.length, touched.as_mut_ptr()) != 0 {
                return Err(failed());
            }
            for n in (0..touched.len()).filter(|&n| touched[n] & 1 != 0) {
                let at = n * PAGE as usize;
                let page = self.host.add(at).cast();
                if libc::pwrite(raw, page, PAGE as usize, at as libc::off_t) != PAGE as isize {
                    return Err(failed());
                }
            }
            let mapped = libc::mmap(
                self.host.cast(),
                self.length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE,
                raw,
                0,
            );
            if mapped == libc::MAP_FAILED {
                return Err(failed());
            }
            libc::madvise(self.host.cast(), self.length, libc::MADV_HUGEPAGE);
        }
        *file = Some(fd);
        Ok(raw)
    }

    /// First byte in host memory.
    pub fn host(&self) -> *mut u8 {
        self.host
    }

    /// Length in bytes.
    pub fn length(&self) -> usize {
        self.length
    }

    /// The first offset at or behind `start` where this region and another of the same
    /// length differ.
    pub fn difference(&self, other: &Self, start: usize) -> Option<usize> {
        const STEP: usize = 4096;
        let (mut a, mut b) = ([0u8; STEP], [0u8; STEP]);
        let mut at = start;
        while at < self.length.min(other.length) {
            let n = STEP.min(self.length - at);
            // SAFETY: inside both regions, whose lengths are compared above; the guest may
            // race, and bytes are bytes.
            let same = unsafe { libc::memcmp(self.host.add(at).cast(), other.host.add(at).cast(), n) == 0 };
            if !same && self.read(at, &mut a[..n]) && other.read(at, &mut b[..n]) {
                if let Some(k) = (0..n).find(|&k| a[k] != b[k]) {
                    return Some(at + k);
                }
            }
            at += n;
        }
        None
    }

    /// Copy out of the region; false when the range lies outside it.
    pub fn read(&self, offset: usize, into: &mut [u8]) -> bool {
        if offset.checked_add(into.len()).is_none_or(|end| end > self.length) {
            return false;
        }
        // SAFETY: the range was checked; the guest may race, bytes are bytes.
        unsafe { std::ptr::copy_nonoverlapping(self.host.add(offset), into.as_mut_ptr(), into.len()) };
        true
    }

    /// Copy into the region; false when the range lies outside it.
    pub fn write(&self, offset: usize, from: &[u8]) -> bool {
        if offset.checked_add(from.len()).is_none_or(|end| end > self.length) {
            return false;
        }
        // SAFETY: as in `read`.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), self.host.add(offset), from.len()) };
        true
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`, nobody holds the region any more.
        unsafe { libc::munmap(self.host.cast(), self.length) };
    }
}

/// One mapping of (part of) a region at a guest-physical address.
#[derive(Clone)]
pub struct Slot {
    /// First guest-physical address, page-aligned.
    pub gpa: u64,
    /// Length in bytes, a multiple of 4096.
    pub length: u64,
    /// Host address of the first byte.
    pub host: *mut u8,
    /// Guest writes are dropped (ROM).
    pub readonly: bool,
    region: Arc<Region>,
}

// SAFETY: see Region.
unsafe impl Send for Slot {}
// SAFETY: see Region.
unsafe impl Sync for Slot {}

/// The guest-physical address space of one machine.
#[derive(Default)]
pub struct GuestMemory {
    slots: RwLock<Vec<Slot>>,
}

impl GuestMemory {
    /// An address space with nothing in it.
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// Map `length` bytes of `region`, from `offset`, at `gpa`.
    pub fn map(
        &self,
        gpa: u64,
        region: &Arc<Region>,
        offset: u64,
        length: u64,
        readonly: bool,
    ) -> Result<()> {
        let bad = |why: &str| {
            EngineError::new("memory-map", format!("mapping {length:#x} bytes at gpa {gpa:#x}: {why}"))
        };
        if gpa % PAGE != 0 || length % PAGE != 0 || offset % PAGE != 0 || length == 0 {
            return Err(bad("not page-aligned"));
        }
        if offset.checked_add(length).is_none_or(|end| end > region.length as u64) {
            return Err(bad("the region is shorter"));
        }
        let end = gpa.checked_add(length).ok_or_else(|| bad("wraps around"))?;
        let mut slots = self.slots.write().unwrap();
        if slots.iter().any(|s| gpa < s.gpa + s.length && s.gpa < end) {
            return Err(bad("overlaps memory that is mapped already"));
        }
        // SAFETY: offset lies inside the region, checked above.
        let host = unsafe { region.host.add(offset as usize) };
        slots.push(Slot { gpa, length, host, readonly, region: region.clone() });
        slots.sort_by_key(|s| s.gpa);
        Ok(())
    }

    /// Remove every mapping inside `[gpa, gpa + length)`.
    pub fn unmap(&self, gpa: u64, length: u64) {
        self.slots.write().unwrap().retain(|s| s.gpa < gpa || s.gpa + s.length > gpa + length);
    }

    /// A copy of the current mappings, sorted by gpa.
    pub fn slots(&self) -> Vec<Slot> {
        self.slots.read().unwrap().clone()
    }

    fn each(&self, gpa: u64, length: usize, mut f: impl FnMut(*mut u8, usize, usize)) -> bool {
        let slots = self.slots.read().unwrap();
        let (mut at, mut done) = (gpa, 0usize);
        while done < length {
            let Some(s) = slots.iter().find(|s| at >= s.gpa && at - s.gpa < s.length) else { return false };
            let n = ((s.gpa + s.length - at) as usize).min(length - done);
            // SAFETY: at lies inside the slot.
            f(unsafe { s.host.add((at - s.gpa) as usize) }, done, n);
            done += n;
            at = at.wrapping_add(n as u64);
        }
        true
    }

    /// Copy from guest-physical memory; false when part of it is not RAM.
    pub fn read(&self, gpa: u64, into: &mut [u8]) -> bool {
        let into_ptr = into.as_mut_ptr();
        // SAFETY: `each` yields ranges inside slots and inside `into`.
        self.each(gpa, into.len(), |host, at, n| unsafe {
            std::ptr::copy_nonoverlapping(host, into_ptr.add(at), n)
        })
    }

    /// Copy into guest-physical memory (ROM included); false when part of it
    /// is not RAM. Engines must be told through their own `write`, so that
    /// translations of changed code are dropped.
    pub fn write(&self, gpa: u64, from: &[u8]) -> bool {
        // SAFETY: as in `read`.
        self.each(gpa, from.len(), |host, at, n| unsafe {
            std::ptr::copy_nonoverlapping(from.as_ptr().add(at), host, n)
        })
    }
}

impl Slot {
    /// The region behind this slot.
    pub fn region(&self) -> &Arc<Region> {
        &self.region
    }
}
