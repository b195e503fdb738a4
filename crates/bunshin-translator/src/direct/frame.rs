//! The signal frame of a sandbox's last trap: all registers of its program.
//!
//! Layout: `struct ucontext` and `struct sigcontext` of Linux's ABI. The frame lies in
//! memory that guest code can write, so nothing in it is believed: addresses must lie in
//! the stack of signals, and values are such as user mode could have. What guest code left
//! there must not reach another program of the guest's in the same sandbox either.
use super::stub::{END, ORDERS, STACK};
use crate::cpu::*;
use crate::host;
use crate::vcpu::Vcpu;

/// Offsets in `struct ucontext`.
const GREGS: usize = 40;
const FPSTATE: usize = GREGS + 8 * 23;
const SIGMASK: usize = FPSTATE + 72;
const BYTES: usize = SIGMASK + 8;
/// Numbers of words behind GREGS; the general registers come first.
const ORDER: [usize; 16] = [8, 9, 10, 11, 12, 13, 14, 15, 7, 6, 5, 3, 2, 0, 1, 4];
const RIP: usize = 16;
const FLAGS: usize = 17;
const SEGMENTS: usize = 18;
const ERROR: usize = 19;
const VECTOR: usize = 20;
const CR2: usize = 22;

/// Flags that user mode changes as it likes.
const FREE: u64 = ARITH as u64 | TF | DF | AC | NT | ID;

/// The XSAVE area: legacy part without what software may keep there, XSTATE_BV.
const LEGACY: usize = 416;
const MXCSR: usize = 24;
const MXCSR_MASK: usize = 28;
const XSTATE_BV: usize = 512;
const HEADER_END: usize = 576;

/// The frame of a sandbox, always in the same place.
pub struct Frame {
    /// Address of the context in the sandbox.
    pub va: u64,
    context: *mut u8,
    vectors: *mut u8,
    /// All of it as the first trap left it, before guest code ran. What the processor's
    /// state does not say is taken from here each time.
    first: Vec<u8>,
    /// Bits of MXCSR that exist.
    mxcsr: u32,
}

/// Why it trapped.
#[derive(Clone, Copy, Debug)]
pub struct Cause {
    pub vector: u64,
    pub error: u64,
    pub address: u64,
}

impl Frame {
    /// The frame of the first trap, whose context lies at `va` of the sandbox; `shared`
    /// is where its orders and stack lie here. None: it is not what Linux makes.
    pub fn new(shared: *mut u8, va: u64) -> Option<Self> {
        let inside = |va: u64, bytes: usize| {
            va % 8 == 0 && va >= STACK && va.checked_add(bytes as u64).is_some_and(|end| end <= END)
        };
        // SAFETY: lies in the shared memory if `inside` says so.
        let here = |va: u64| unsafe { shared.add((va - ORDERS) as usize) };
        if !inside(va, BYTES) {
            return None;
        }
        // SAFETY: as above.
        let state = unsafe { here(va + FPSTATE as u64).cast::<u64>().read_volatile() };
        if state < va || !inside(state, area_bytes()) {
            return None;
        }
        let length = (END - va) as usize;
        // SAFETY: from the context to the end of the stack; the sandbox stands still.
        let first = unsafe { std::slice::from_raw_parts(here(va), length) }.to_vec();
        let area = (state - va) as usize;
        let mask = first[area + MXCSR_MASK..][..4].try_into().map_or(0, u32::from_le_bytes);
        let mxcsr = if mask == 0 { 0xffbf } else { mask };
        let mut f = Self { va, context: here(va), vectors: here(state), first, mxcsr };
        f.first[SIGMASK..SIGMASK + 8].fill(0);
        f.first[area + XSTATE_BV..area + XSTATE_BV + 8].fill(0);
        Some(f)
    }

    fn get(&self, word: usize) -> u64 {
        // SAFETY: inside the context, aligned; checked by `new`.
        unsafe { self.context.add(GREGS + 8 * word).cast::<u64>().read_volatile() }
    }

    fn set(&self, word: usize, value: u64) {
        // SAFETY: as in `get`.
        unsafe { self.context.add(GREGS + 8 * word).cast::<u64>().write_volatile(value) }
    }

    pub fn cause(&self) -> Cause {
        Cause { vector: self.get(VECTOR), error: self.get(ERROR), address: self.get(CR2) }
    }

    pub fn rip(&self) -> u64 {
        self.get(RIP)
    }

    /// Selector of the code segment.
    pub fn code_segment(&self) -> u16 {
        self.get(SEGMENTS) as u16
    }

    /// Its flags, as far as they are user mode's, and IF.
    pub fn flags(&self) -> u64 {
        self.get(FLAGS) & FREE | IF | 2
    }

    /// Take the registers over into the processor.
    pub fn load(&self, v: &mut Vcpu) {
        let c = v.cpu_mut();
        for (word, n) in ORDER.into_iter().enumerate() {
            c.gpr[n] = self.get(word);
        }
        c.rip = self.get(RIP);
        let flags = c.rflags() & !FREE | self.get(FLAGS) & FREE;
        c.set_rflags(flags);
        // SAFETY: the header is part of the area.
        let present = unsafe { self.vectors.add(XSTATE_BV).cast::<u64>().read_volatile() };
        let present = present & host::xsave_mask();
        self.copy(&mut c.xsave.0, present, |here, there, n| {
            // SAFETY: both areas have the component; `copy` says where.
            unsafe { std::ptr::copy_nonoverlapping(there, here, n) }
        });
        let mxcsr = u32::from_le_bytes(c.xsave.0[MXCSR..MXCSR + 4].try_into().unwrap()) & self.mxcsr;
        c.xsave.0[MXCSR..MXCSR + 4].copy_from_slice(&mxcsr.to_le_bytes());
        c.xsave.0[XSTATE_BV..XSTATE_BV + 8].copy_from_slice(&present.to_le_bytes());
        v.saved = u64::MAX;
        v.blank_initial();
    }

    /// Let the sandbox go on with the processor's registers.
    pub fn store(&self, v: &mut Vcpu) {
        // SAFETY: as long as it was when it was read from there; the sandbox stands still.
        unsafe { std::ptr::copy_nonoverlapping(self.first.as_ptr(), self.context, self.first.len()) };
        let c = v.cpu_mut();
        for (word, n) in ORDER.into_iter().enumerate() {
            self.set(word, c.gpr[n]);
        }
        self.set(RIP, c.rip);
        self.set(FLAGS, c.rflags() & FREE | IF | 2);
        let bv: [u8; 8] = c.xsave.0[XSTATE_BV..XSTATE_BV + 8].try_into().unwrap();
        let present = u64::from_le_bytes(bv) & host::xsave_mask();
        self.copy(&mut c.xsave.0, present, |here, there, n| {
            // SAFETY: as in `load`.
            unsafe { std::ptr::copy_nonoverlapping(here, there, n) }
        });
        // SAFETY: the header is part of the area.
        unsafe { self.vectors.add(XSTATE_BV).cast::<u64>().write_volatile(present) };
    }

    /// Call `copy` (here, there, bytes) for what `present` says of the XSAVE area.
    fn copy(&self, here: &mut [u8; 4096], present: u64, copy: impl Fn(*mut u8, *mut u8, usize)) {
        copy(here.as_mut_ptr(), self.vectors, LEGACY);
        for n in (2..8).filter(|n| present >> n & 1 != 0) {
            let (at, length) = host::component(n);
            // SAFETY: `new` has checked that the area there has all components.
            copy(here[at..at + length].as_mut_ptr(), unsafe { self.vectors.add(at) }, length);
        }
    }
}

/// Bytes of an XSAVE area with all components that belong to the guest.
fn area_bytes() -> usize {
    (2..8).map(host::component).map(|(at, length)| at + length).max().unwrap_or(0).max(HEADER_END)
}
