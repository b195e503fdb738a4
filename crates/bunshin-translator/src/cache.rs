//! The code cache: one stretch of host memory, mapped twice.
//!
//! Translations are written through one mapping (read, write) and run through
//! the other (read, execute), so no page can be written and executed at the
//! same address. What runs often grows from the bottom, what runs seldom from the
//! top, so that the host's instruction cache holds none of it. The memory is anonymous,
//! since that is where `perf` expects code that somebody else names (`perf_map.rs`).
use bunshin_core::{EngineError, Result};

pub struct CodeCache {
    rw: *mut u8,
    rx: *mut u8,
    size: usize,
    used: usize,
    /// Cold code lies from here to the end.
    cold: usize,
    /// Stubs lie below; a flush keeps them.
    floor: usize,
}

// SAFETY: owned memory, used by one vCPU thread at a time.
unsafe impl Send for CodeCache {}

impl CodeCache {
    pub fn new(size: usize) -> Result<Self> {
        let refused = || EngineError::last_os("host-memory", "the host refused executable memory");
        // SAFETY: plain system calls on fresh mappings.
        unsafe {
            let rw = libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            if rw == libc::MAP_FAILED {
                return Err(EngineError::last_os("host-memory", "no memory for the code cache"));
            }
            // An old size of 0 maps the same shared memory a second time.
            let rx = libc::mremap(rw, 0, size, libc::MREMAP_MAYMOVE);
            if rx == libc::MAP_FAILED {
                let error = refused();
                libc::munmap(rw, size);
                return Err(error);
            }
            if libc::mprotect(rx, size, libc::PROT_READ | libc::PROT_EXEC) != 0 {
                let error = refused();
                libc::munmap(rw, size);
                libc::munmap(rx, size);
                return Err(error);
            }
            Ok(Self { rw: rw.cast(), rx: rx.cast(), size, used: 0, cold: size, floor: 0 })
        }
    }

    /// Host address range of executable code.
    pub fn range(&self) -> (u64, u64) {
        (self.rx as u64, self.rx as u64 + self.size as u64)
    }

    /// Executable address of the next byte to be written.
    pub fn next(&self) -> u64 {
        self.rx as u64 + self.used as u64
    }

    /// Executable address of the lowest byte of cold code.
    pub fn cold(&self) -> u64 {
        self.rx as u64 + self.cold as u64
    }

    pub fn room(&self) -> usize {
        self.cold - self.used
    }

    pub fn used(&self) -> usize {
        self.size - self.room()
    }

    /// The next `length` bytes, writable; they are taken.
    pub fn take(&mut self, length: usize) -> &mut [u8] {
        assert!(length <= self.room());
        let at = self.used;
        self.used = (self.used + length + 15) & !15;
        self.used = self.used.min(self.cold);
        // SAFETY: inside the mapping; nobody else holds this part.
        unsafe { std::slice::from_raw_parts_mut(self.rw.add(at), length) }
    }

    /// The `length` bytes below all cold code, writable; they are taken.
    pub fn take_cold(&mut self, length: usize) -> &mut [u8] {
        assert!(length <= self.room());
        self.cold -= length;
        // SAFETY: as in `take`.
        unsafe { std::slice::from_raw_parts_mut(self.rw.add(self.cold), length) }
    }

    /// Everything written so far stays for ever.
    pub fn keep(&mut self) {
        self.floor = self.used;
    }

    /// Forget all translations. The pages go back to the host.
    pub fn flush(&mut self) {
        let floor = (self.floor + 4095) & !4095;
        let cold = (self.cold & !4095).max(floor);
        for (from, to) in [(floor, self.used), (cold, self.size)] {
            if to > from {
                // SAFETY: inside the mapping.
                unsafe { libc::madvise(self.rw.add(from).cast(), to - from, libc::MADV_REMOVE) };
            }
        }
        (self.used, self.cold) = (self.floor, self.size);
    }

    /// Write over code at executable address `at`.
    pub fn write(&mut self, at: u64, bytes: &[u8]) {
        let off = (at - self.rx as u64) as usize;
        assert!(off + bytes.len() <= self.size);
        // SAFETY: inside the mapping; only this thread executes the code.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.rw.add(off), bytes.len()) };
    }

    /// Redirect the `jmp`/`jcc` whose rel32 lies at executable address `site`.
    pub fn patch(&mut self, site: u64, target: u64) {
        let rel = target.wrapping_sub(site + 4) as i32;
        let off = (site - self.rx as u64) as usize;
        debug_assert!(off + 4 <= self.size);
        // SAFETY: inside the mapping; an aligned or single-cache-line store is
        // not needed because only this thread executes the code.
        unsafe { self.rw.add(off).cast::<i32>().write_unaligned(rel) };
    }
}

impl Drop for CodeCache {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`.
        unsafe {
            libc::munmap(self.rw.cast(), self.size);
            libc::munmap(self.rx.cast(), self.size);
        }
    }
}
