//! One processor of KVM's: running it, its exits and the answers to them.
//!
//! An exit's data lies in a page that the kernel shares with us (`kvm_run`); the answer
//! goes to the same place before the processor runs on. Finishing an instruction
//! without running on is a run with `immediate_exit` set.
//!
//! A kick sets `immediate_exit` first and sends a signal then: one that comes before
//! KVM_RUN keeps it from running, one that comes later interrupts it.
use crate::debug::Armed;
use crate::memory::Memory;
use crate::{clocks, cpuid, refused, state};
use bunshin_core::cpuid::Leaf;
use bunshin_core::debug::Debugging;
use bunshin_core::{kick, CpuState, EngineError, Exit, Kicker, Reply, Result, Times, Vcpu};
use kvm_bindings::{
    kvm_run, KVM_EXIT_DEBUG, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HLT, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR,
    KVM_EXIT_IO, KVM_EXIT_IO_OUT, KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN,
    KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION,
    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, KVM_INTERNAL_ERROR_SIMUL_EX,
};
use kvm_ioctls::{VcpuFd, VmFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Why KVM could not go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// It met an instruction that it cannot emulate.
    pub emulation: bool,
    /// The instruction, as far as KVM says.
    pub bytes: Vec<u8>,
    /// One sentence.
    pub reason: String,
}

/// What other threads may touch.
struct Shared {
    /// `kvm_run.immediate_exit`; 0 once that is gone.
    page: Mutex<usize>,
    kicked: AtomicBool,
    thread: AtomicU32,
}

impl Kicker for Shared {
    fn kick(&self) {
        self.kicked.store(true, Ordering::Release);
        let page = self.page.lock().unwrap_or_else(PoisonError::into_inner);
        if *page == 0 {
            return;
        }
        // SAFETY: mapped until the processor's drop, which takes the lock.
        unsafe { &*(*page as *const AtomicU8) }.store(1, Ordering::SeqCst);
        let thread = self.thread.load(Ordering::Acquire);
        if thread != 0 && thread != kick::thread_id() {
            kick::send(thread);
        }
    }
}

/// What is left to do for the last exit.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Owed {
    Nothing,
    /// KVM finishes the instruction when it runs again.
    Finish,
    /// So many bytes at this offset of the page, for `IN`.
    Port {
        at: usize,
        size: u8,
        count: u32,
    },
    /// So many bytes, for a load.
    Load(u8),
}

/// A processor of KVM's.
pub struct KvmVcpu {
    pub(crate) index: u32,
    pub(crate) fd: VcpuFd,
    pub(crate) vm: Arc<VmFd>,
    memory: Arc<Memory>,
    shared: Arc<Shared>,
    owed: Owed,
    failure: Option<Failure>,
    fatal: Option<Exit>,
    /// What the host's debug registers wait for.
    pub(crate) armed: Armed,
    /// Calls of KVM_RUN.
    entries: u64,
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        *self.shared.page.lock().unwrap_or_else(PoisonError::into_inner) = 0;
    }
}

impl KvmVcpu {
    pub(crate) fn new(
        index: u32,
        mut fd: VcpuFd,
        leaves: &[Leaf],
        vm: Arc<VmFd>,
        memory: Arc<Memory>,
    ) -> Result<Self> {
        // Whoever runs it may kick it.
        kick::install();
        cpuid::set(&fd, leaves)?;
        // All processors count as the host does.
        clocks::set_tsc_offset(&fd, 0)?;
        let page = &raw mut fd.get_kvm_run().immediate_exit;
        let shared = Shared {
            page: Mutex::new(page as usize),
            kicked: AtomicBool::new(false),
            thread: AtomicU32::new(0),
        };
        let vcpu = Self {
            index,
            fd,
            vm,
            memory,
            shared: Arc::new(shared),
            owed: Owed::Nothing,
            failure: None,
            fatal: None,
            armed: Armed::default(),
            entries: 0,
        };
        // One without these registers does without.
        let _ = state::power_up(&vcpu);
        Ok(vcpu)
    }

    /// Take why KVM could not go on; the processor may run again after that.
    pub fn take_failure(&mut self) -> Option<Failure> {
        let failure = self.failure.take();
        if failure.is_some() {
            self.fatal = None;
        }
        failure
    }

    /// Take over what others have changed of a state that they were given: what stands
    /// in `after` and differs from `before`. Run state, local APIC and clocks stay.
    ///
    /// # Errors
    /// KVM refuses it.
    pub fn put_back(&mut self, before: &CpuState, after: &CpuState) -> Result<()> {
        state::put_back(self, before, after)
    }

    fn immediate(&mut self, on: bool) {
        let page = &raw mut self.fd.get_kvm_run().immediate_exit;
        // SAFETY: a byte that other threads store to, and the kernel reads.
        unsafe { &*page.cast::<AtomicU8>() }.store(on.into(), Ordering::SeqCst);
    }

    /// Enter the guest until the kernel comes back. None: nothing to tell.
    fn enter(&mut self) -> Option<Exit> {
        self.entries += 1;
        match self.fd.run().map(drop) {
            Ok(()) => self.exit(),
            Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => None,
            Err(e) => {
                let reason = refused(format!("running processor {}", self.index), e).message;
                self.fail(Failure { emulation: false, bytes: Vec::new(), reason })
            }
        }
    }

    fn fail(&mut self, failure: Failure) -> Option<Exit> {
        let exit = Exit::Failed { reason: failure.reason.clone() };
        self.failure = Some(failure);
        self.fatal = Some(exit.clone());
        Some(exit)
    }

    /// What the page says.
    fn exit(&mut self) -> Option<Exit> {
        let run: *mut kvm_run = self.fd.get_kvm_run();
        // SAFETY: the kernel wrote the member of the union that the reason names.
        let (reason, union) = unsafe { ((*run).exit_reason, &(*run).__bindgen_anon_1) };
        match reason {
            KVM_EXIT_IO => {
                // SAFETY: as above.
                let io = unsafe { union.io };
                let (port, size, count, at) = (io.port, io.size, io.count, io.data_offset as usize);
                if u32::from(io.direction) == KVM_EXIT_IO_OUT {
                    self.owed = Owed::Finish;
                    let mut data = vec![0; usize::from(size) * count as usize];
                    // SAFETY: the kernel put so many bytes there, inside what is mapped.
                    unsafe {
                        let from = run.cast::<u8>().add(at);
                        std::ptr::copy_nonoverlapping(from, data.as_mut_ptr(), data.len());
                    }
                    return Some(Exit::PioOut { port, size, data });
                }
                self.owed = Owed::Port { at, size, count };
                Some(Exit::PioIn { port, size, count })
            }
            KVM_EXIT_MMIO => {
                // SAFETY: as above.
                let mmio = unsafe { union.mmio };
                let (gpa, size) = (mmio.phys_addr, mmio.len.min(8) as u8);
                if mmio.is_write == 0 {
                    self.owed = Owed::Load(size);
                    return Some(Exit::MmioRead { gpa, size });
                }
                self.owed = Owed::Finish;
                if self.memory.is_rom(gpa) {
                    return None;
                }
                let value = u64::from_le_bytes(mmio.data) & (u64::MAX >> (64 - 8 * u32::from(size.max(1))));
                Some(Exit::MmioWrite { gpa, size, value })
            }
            KVM_EXIT_SHUTDOWN => {
                let rip = self.fd.get_regs().map_or(0, |r| r.rip);
                let reason = format!("triple fault: processor {} shut down at rip {rip:#x}", self.index);
                self.fatal = Some(Exit::Shutdown { reason });
                self.fatal.clone()
            }
            KVM_EXIT_DEBUG => {
                // SAFETY: as above.
                let debug = unsafe { union.debug };
                self.armed.why(&debug.arch).map(|stop| Exit::Debug { stop })
            }
            KVM_EXIT_HLT | KVM_EXIT_INTR | KVM_EXIT_IRQ_WINDOW_OPEN => None,
            KVM_EXIT_INTERNAL_ERROR => {
                // SAFETY: as above; the bytes only where the flag says so.
                let (suberror, bytes) = unsafe {
                    let e = union.emulation_failure;
                    let told = e.suberror == KVM_INTERNAL_ERROR_EMULATION
                        && e.ndata >= 1
                        && e.flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0;
                    let insn = e.__bindgen_anon_1.__bindgen_anon_1;
                    let length = usize::from(insn.insn_size).min(insn.insn_bytes.len());
                    (e.suberror, if told { insn.insn_bytes[..length].to_vec() } else { Vec::new() })
                };
                let failure = self.internal_error(suberror, bytes);
                self.fail(failure)
            }
            KVM_EXIT_FAIL_ENTRY => {
                // SAFETY: as above.
                let why = unsafe { union.fail_entry.hardware_entry_failure_reason };
                let reason = format!("KVM: the host's processor refused to enter the guest ({why:#x})");
                self.fail(Failure { emulation: false, bytes: Vec::new(), reason })
            }
            other => {
                let reason = format!("KVM: processor {} stopped for reason {other}", self.index);
                self.fail(Failure { emulation: false, bytes: Vec::new(), reason })
            }
        }
    }

    fn internal_error(&self, suberror: u32, bytes: Vec<u8>) -> Failure {
        let rip = self.fd.get_regs().map_or(0, |r| r.rip);
        let emulation = suberror == KVM_INTERNAL_ERROR_EMULATION;
        let what = match suberror {
            KVM_INTERNAL_ERROR_EMULATION => "cannot emulate an instruction".to_owned(),
            KVM_INTERNAL_ERROR_SIMUL_EX => "met two exceptions at once".to_owned(),
            KVM_INTERNAL_ERROR_DELIVERY_EV => "failed to deliver an event".to_owned(),
            other => format!("failed by internal error {other}"),
        };
        let mut reason = format!("KVM on this host {what} at rip {rip:#x}");
        if !bytes.is_empty() {
            let hex: Vec<_> = bytes.iter().map(|b| format!("{b:02x}")).collect();
            reason += &format!(" (bytes {})", hex.join(" "));
        }
        Failure { emulation, bytes, reason }
    }

    /// Put the owner's answer where KVM looks for it.
    fn answer(&mut self, reply: &Reply) {
        let run: *mut kvm_run = self.fd.get_kvm_run();
        let value = match reply {
            Reply::Value(v) => *v,
            _ => u64::MAX,
        };
        match self.owed {
            Owed::Nothing | Owed::Finish => return,
            Owed::Load(_) => {
                // SAFETY: the page is ours while the processor does not run.
                unsafe { (*run).__bindgen_anon_1.mmio.data = value.to_le_bytes() };
            }
            Owed::Port { at, size, count } => {
                let length = usize::from(size) * count as usize;
                let one = value.to_le_bytes();
                let mut bytes = match reply {
                    Reply::Bytes(b) => b.clone(),
                    _ => one[..usize::from(size).min(8)].repeat(count as usize),
                };
                bytes.resize(length, 0xFF);
                // SAFETY: the kernel reads so many bytes there.
                unsafe {
                    let to = run.cast::<u8>().add(at);
                    std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, length);
                }
            }
        }
        self.owed = Owed::Finish;
    }

    /// Finish what the last exit began.
    pub(crate) fn finish(&mut self) -> Option<Exit> {
        while self.owed == Owed::Finish && self.fatal.is_none() {
            self.owed = Owed::Nothing;
            self.immediate(true);
            if let Some(exit) = self.enter() {
                return Some(exit);
            }
        }
        None
    }

    /// Forget what the last exit began.
    pub(crate) fn drain(&mut self) {
        self.answer(&Reply::Value(0));
        while self.finish().is_some() {
            self.answer(&Reply::Value(0));
        }
        self.failure = None;
        self.fatal = None;
    }

    fn attach(&self) {
        let id = kick::thread_id();
        if self.shared.thread.load(Ordering::Relaxed) != id {
            self.shared.thread.store(id, Ordering::Release);
        }
    }
}

impl Vcpu for KvmVcpu {
    fn run(&mut self, reply: Reply) -> Exit {
        self.attach();
        self.answer(&reply);
        loop {
            if let Some(e) = &self.fatal {
                return e.clone();
            }
            self.immediate(false);
            if self.shared.kicked.swap(false, Ordering::AcqRel) {
                // The instruction of the last exit first: the state may be asked for.
                let Some(exit) = self.finish() else { return Exit::Kicked };
                self.shared.kicked.store(true, Ordering::Release);
                return exit;
            }
            self.owed = Owed::Nothing;
            if let Some(exit) = self.enter() {
                return exit;
            }
        }
    }

    fn complete(&mut self, reply: Reply) -> Option<Exit> {
        self.attach();
        self.answer(&reply);
        self.finish()
    }

    fn state(&mut self) -> CpuState {
        // The owner has answered; what KVM still has to do for it is done here.
        while self.finish().is_some() {
            self.answer(&Reply::Value(u64::MAX));
        }
        state::read(self).unwrap_or_else(|e| {
            self.fail(Failure { emulation: false, bytes: Vec::new(), reason: e.message });
            CpuState::default()
        })
    }

    fn set_state(&mut self, state: &CpuState) -> Result<()> {
        self.drain();
        state::write(self, state)
    }

    fn set_debug(&mut self, debugging: &Debugging) -> Result<()> {
        debugging.check()?;
        self.arm(debugging)
    }

    fn times(&mut self) -> Times {
        clocks::times(&self.vm, &self.fd).unwrap_or_default()
    }

    fn set_times(&mut self, times: &Times) {
        // Without them the guest's time jumps and the guest goes on.
        let _ = clocks::set_tsc_offset(&self.fd, times.tsc_offset);
        let _ = clocks::set_system_time(&self.vm, times);
    }

    fn skip_time(&mut self, ticks: u64) {
        let Ok(times) = clocks::times(&self.vm, &self.fd) else { return };
        let _ = clocks::set_tsc_offset(&self.fd, times.tsc_offset.wrapping_sub(ticks));
        // What the guest's kvmclock was told counts from the old offset: tell it anew.
        let _ = self.fd.kvmclock_ctrl();
        if self.index == 0 {
            let back = clocks::ns_of(ticks);
            let system_ns = times.system_ns.saturating_sub(back);
            let _ = clocks::set_system_time(&self.vm, &Times { system_ns, ..times });
        }
        state::rearm(self);
    }

    fn kicker(&self) -> Arc<dyn Kicker> {
        self.shared.clone()
    }

    fn translate(&mut self, gva: u64) -> Option<u64> {
        let found = self.fd.translate_gva(gva).ok()?;
        (found.valid != 0).then_some(found.physical_address)
    }

    fn stats(&self) -> Vec<(&'static str, u64)> {
        vec![("kvm_entries", self.entries)]
    }
}

impl From<Failure> for EngineError {
    fn from(failure: Failure) -> Self {
        Self::new("kvm", failure.reason)
    }
}
