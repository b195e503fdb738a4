//! What KVM on this host is worth: figures from a throwaway machine.
//!
//! That `/dev/kvm` opens proves nothing: there are nested hosts whose KVM emulates
//! supervisor code at a thousandth of the speed and ends at instructions that a kernel
//! cannot do without. So a guest of a few bytes runs here in supervisor mode, in long
//! mode, and says how far it came:
//!
//! | port | after                                      |
//! |------|--------------------------------------------|
//! | 0x80 | the first instruction in long mode         |
//! | 0x81 | [`LOOP`] turns of two instructions, timed  |
//! | 0x82 | LOCK CMPXCHG16B, with the right result     |
//! | 0x83 | XSAVE, XRSTOR, the same register again     |
//!
//! Figures only: what follows from them is decided where engines are chosen.
use crate::memory::Memory;
use crate::vcpu::KvmVcpu;
use crate::{cpuid, engine, open, refused};
use bunshin_core::cpuid::{find, Leaf};
use bunshin_core::{clock, CpuState, Exit, Region, Reply, Result, Vcpu};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::Duration;

/// Turns of the loop that is timed: half a millisecond where an instruction takes 500 ns.
const LOOP: u32 = 500;
/// What a guest gets before it counts as hanging.
const PATIENCE: Duration = Duration::from_millis(15);
const SIZE: u64 = 0x1_0000;
const TABLES: u64 = 0x1000;
const CODE: u64 = 0x8000;
const DATA: u64 = 0xA000;
const CR4_PAE: u64 = 1 << 5;
const CR4_OSFXSR: u64 = 1 << 9;
const CR4_OSXSAVE: u64 = 1 << 18;

/// What was measured. Everything after a failure is as if it were not there.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Figures {
    /// Why the device node could not be opened: `kvm-absent`, `kvm-permission`, `kvm`.
    pub refusal: Option<&'static str>,
    /// Why it makes no machine with memory, processor and interrupt controllers; or why
    /// the guest ended early.
    pub trouble: Option<String>,
    /// It made one.
    pub machine: bool,
    /// The guest's first instruction in long mode was executed.
    pub long_mode: bool,
    /// Nanoseconds of one simple instruction in supervisor mode.
    pub instruction_ns: f64,
    /// CMPXCHG16B works there.
    pub cmpxchg16b: bool,
    /// XSAVE and XRSTOR work there; None: they are not offered.
    pub xsave: Option<bool>,
    /// Slots of memory.
    pub slots: usize,
    /// Most processors.
    pub cpus: usize,
    /// Microseconds that all of this took.
    pub took_us: u64,
}

/// Look. Never an error: what goes wrong is what is found.
pub fn measure() -> Figures {
    let started = clock::now_ns();
    let mut figures = Figures::default();
    if let Err(error) = look(&mut figures) {
        if figures.refusal.is_none() {
            figures.trouble.get_or_insert(error.message);
        }
    }
    figures.took_us = (clock::now_ns() - started) / 1000;
    figures
}

fn look(f: &mut Figures) -> Result<()> {
    let kvm = open().inspect_err(|e| f.refusal = Some(e.slug))?;
    (f.slots, f.cpus) = (kvm.get_nr_memslots(), kvm.get_max_vcpus());
    let leaves = cpuid::supported_by(&kvm)?;
    let xsave = find(&leaves, 1, 0)[2] >> 26 & 1 == 1;
    f.xsave = xsave.then_some(false);
    // Memory first: later, each change of it waits for other processors of the host.
    let vm = Arc::new(engine::create(&kvm)?);
    let memory = Arc::new(Memory::new(vm.clone(), f.slots));
    let region = Region::new(SIZE)?;
    memory.map(0, &region, 0, SIZE, false)?;
    engine::equip(&vm)?;
    let fd = vm.create_vcpu(0).map_err(|e| refused("creating a processor", e))?;
    let mut vcpu = KvmVcpu::new(0, fd, &leaves, vm.clone(), memory.clone())?;
    f.machine = true;
    let done = run(f, &region, &leaves, xsave, &mut vcpu);
    // The end of a machine waits too; nobody needs to wait for it.
    std::thread::spawn(move || drop((vcpu, vm, memory)));
    done
}

fn run(f: &mut Figures, region: &Region, leaves: &[Leaf], xsave: bool, vcpu: &mut KvmVcpu) -> Result<()> {
    region.write(TABLES as usize, &tables());
    region.write(CODE as usize, &code(xsave));
    let reset = vcpu.state();
    vcpu.set_state(&state(leaves, xsave, reset))?;
    let _hanging = Watch::new(vcpu);
    let mut empty = 0;
    let mut last = clock::now_ns();
    loop {
        let exit = vcpu.run(Reply::None);
        let now = clock::now_ns();
        let took = now - last;
        match exit {
            Exit::PioOut { port: 0x80, .. } => {
                // The next stretch has the loop; a stretch without it tells what to take off.
                f.long_mode = true;
                empty = if empty == 0 { took } else { empty.min(took) };
            }
            Exit::PioOut { port: 0x81, .. } => {
                let ns = took.saturating_sub(empty) as f64 / f64::from(2 * LOOP);
                f.instruction_ns = if f.instruction_ns == 0.0 { ns } else { f.instruction_ns.min(ns) };
            }
            Exit::PioOut { port: 0x82, ref data, .. } => f.cmpxchg16b = data == &[1],
            Exit::PioOut { port: 0x83, ref data, .. } => {
                f.xsave = Some(data == &[1]);
            }
            Exit::PioOut { port: 0x84, .. } => return Ok(()),
            Exit::Kicked => {
                f.trouble = Some(format!("its guest was not done after {} ms", PATIENCE.as_millis()));
                return Ok(());
            }
            Exit::Failed { reason } | Exit::Shutdown { reason } => {
                f.trouble = Some(reason);
                return Ok(());
            }
            other => {
                f.trouble = Some(format!("its guest did what it was not told to: {other:?}"));
                return Ok(());
            }
        }
        last = clock::now_ns();
    }
}

/// Kicks a guest that hangs.
struct Watch {
    over: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Watch {
    fn new(vcpu: &dyn Vcpu) -> Self {
        let over = Arc::new(AtomicBool::new(false));
        let (kicker, done) = (vcpu.kicker(), over.clone());
        let thread = std::thread::spawn(move || {
            std::thread::park_timeout(PATIENCE);
            while !done.load(Ordering::Acquire) {
                kicker.kick();
                std::thread::park_timeout(Duration::from_millis(1));
            }
        });
        Self { over, thread: Some(thread) }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

/// The first 2 MiB, mapped as they are.
fn tables() -> Vec<u8> {
    let mut pages = vec![0; 0x3000];
    let mut entry = |page: usize, value: u64| pages[page..page + 8].copy_from_slice(&value.to_le_bytes());
    entry(0, (TABLES + 0x1000) | 3);
    entry(0x1000, (TABLES + 0x2000) | 3);
    entry(0x2000, 0x83);
    pages
}

/// The guest; ebx names DATA.
fn code(xsave: bool) -> Vec<u8> {
    let mut c = Vec::new();
    let out = |c: &mut Vec<u8>, port: u8| c.extend([0xE6, port]); // out port,al
                                                                  // Twice: what is met for the first time takes longer.
    for _ in 0..2 {
        out(&mut c, 0x80);
        out(&mut c, 0x80);
        c.push(0xB9); // mov ecx,LOOP
        c.extend(LOOP.to_le_bytes());
        c.extend([0xFF, 0xC9, 0x75, 0xFC]); // again: dec ecx; jnz again
        out(&mut c, 0x81);
    }
    c.extend([0x31, 0xC0, 0x31, 0xD2, 0xB9, 1, 0, 0, 0]); // xor eax,eax; xor edx,edx; mov ecx,1
    c.extend([0x53, 0x48, 0x89, 0xDE, 0xBB, 5, 0, 0, 0]); // push rbx; mov rsi,rbx; mov ebx,5
    c.extend([0xF0, 0x48, 0x0F, 0xC7, 0x0E]); // lock cmpxchg16b [rsi]
    c.extend([0x0F, 0x94, 0xC0, 0x22, 0x46, 8, 0x5B]); // sete al; and al,[rsi+8]; pop rbx
    out(&mut c, 0x82);
    if xsave {
        c.extend([0xBE, 7, 0, 0, 0, 0x66, 0x0F, 0x6E, 0xC6]); // mov esi,7; movd xmm0,esi
        c.extend([0xB8, 3, 0, 0, 0, 0x31, 0xD2]); // mov eax,3; xor edx,edx
        c.extend([0x0F, 0xAE, 0x63, 0x40]); // xsave [rbx+64]
        c.extend([0x66, 0x0F, 0xEF, 0xC0]); // pxor xmm0,xmm0
        c.extend([0x0F, 0xAE, 0x6B, 0x40]); // xrstor [rbx+64]
        c.extend([0x66, 0x0F, 0x7E, 0xC0]); // movd eax,xmm0
        c.extend([0x3C, 7, 0x0F, 0x94, 0xC0]); // cmp al,7; sete al
        out(&mut c, 0x83);
    }
    out(&mut c, 0x84);
    c.push(0xF4); // hlt
    c
}

fn state(leaves: &[Leaf], xsave: bool, reset: CpuState) -> CpuState {
    let mut s = reset;
    s.gpr[3] = DATA;
    s.gpr[4] = DATA + 0x2000;
    s.rip = CODE;
    s.rflags = 2;
    for segment in &mut s.segments {
        (segment.selector, segment.base, segment.limit, segment.access) = (0x18, 0, u32::MAX, 0xC093);
    }
    (s.segments[1].selector, s.segments[1].access) = (0x10, 0xA09B);
    (s.tr.selector, s.tr.limit, s.tr.access) = (0x20, 0x67, 0x8B);
    s.cr0 = 0x8000_0033;
    s.cr3 = TABLES;
    s.cr4 = CR4_PAE | CR4_OSFXSR;
    if xsave {
        s.cr4 |= CR4_OSXSAVE;
        s.xcr0 = 3 & u64::from(find(leaves, 0xD, 0)[0]);
    }
    s.msrs = vec![(0xC000_0080, 0x500)];
    s.xsave = Vec::new();
    s.lapic = Vec::new();
    s.tsc = 0;
    s
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_hangs_is_given_up() {
        let Ok(kvm) = open() else { return eprintln!("no KVM on this host: nothing hangs") };
        let leaves = cpuid::supported_by(&kvm).unwrap();
        let vm = Arc::new(engine::create(&kvm).unwrap());
        let memory = Arc::new(Memory::new(vm.clone(), kvm.get_nr_memslots()));
        let region = Region::new(SIZE).unwrap();
        memory.map(0, &region, 0, SIZE, false).unwrap();
        engine::equip(&vm).unwrap();
        let fd = vm.create_vcpu(0).unwrap();
        let mut vcpu = KvmVcpu::new(0, fd, &leaves, vm.clone(), memory).unwrap();
        region.write(TABLES as usize, &tables());
        region.write(CODE as usize, &[0xEB, 0xFE]); // jmp $
        let reset = vcpu.state();
        vcpu.set_state(&state(&leaves, false, reset)).unwrap();
        let _hanging = Watch::new(&vcpu);
        assert_eq!(vcpu.run(Reply::None), Exit::Kicked);
    }

    #[test]
    fn looking_never_fails_and_is_quick() {
        let f = measure();
        // Whatever this host has: the figures agree with each other.
        assert_eq!(f.refusal.is_some(), f.cpus == 0, "{f:?}");
        assert!(f.machine || !f.long_mode, "{f:?}");
        assert!(f.long_mode || !f.cmpxchg16b && f.instruction_ns == 0.0, "{f:?}");
        assert!(f.took_us > 0);
    }
}
