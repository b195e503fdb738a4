//! A virtual machine of KVM's: memory, interrupt controllers in the host's kernel,
//! interrupt lines, doorbells.
//!
//! GSIs are wired as in the chips that other engines bring: 0 (the PIT's) is PIC IRQ 0
//! and IOAPIC pin 2, 1 and 3 to 15 both of the same number, 16 to 23 pins only.
use crate::memory::Memory;
use crate::vcpu::KvmVcpu;
use crate::{chips, open, refused};
use bunshin_core::chips::ChipsState;
use bunshin_core::cpuid::Leaf;
use bunshin_core::{clock, Engine, EngineError, Region, Result, Vcpu};
use kvm_bindings::{
    kvm_enable_cap, kvm_ioeventfd, kvm_irq_routing_entry, kvm_msi, kvm_pit_config, KvmIrqRouting,
    KVM_CAP_EXIT_ON_EMULATION_FAILURE, KVM_CAP_X2APIC_API, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_IRQ_ROUTING_IRQCHIP, KVM_PIT_SPEAKER_DUMMY,
};
use kvm_ioctls::{Kvm, VmFd};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Three pages that KVM needs below 4 GiB on older Intel processors, and one more.
const TSS: usize = 0xFFFB_D000;
const IDENTITY: u64 = 0xFFFB_C000;
/// KVM_IOEVENTFD: `_IOW(0xAE, 0x79, 64 bytes)`.
const IOEVENTFD: libc::c_ulong = 0x4040_AE79;
const IOEVENTFD_DATAMATCH: u32 = 1;
/// 32-bit APIC IDs in states, and no broadcast by 0xFF in x2APIC mode.
const X2APIC_API: u64 = 3;
/// Inputs that have lines.
const GSIS: u32 = 24;

/// Processors in hardware, their interrupt controllers in the host's kernel.
///
/// The order of the fields is that of their end: the machine before its memory.
pub struct KvmEngine {
    vm: Arc<VmFd>,
    memory: Arc<Memory>,
    cpuid: Vec<Vec<Leaf>>,
    taken: Mutex<Vec<bool>>,
    /// Lines that devices assert, by gsi.
    levels: Mutex<u32>,
}

impl KvmEngine {
    /// A machine whose processors answer CPUID with `cpuid`, one list for each.
    ///
    /// # Errors
    /// KVM cannot be opened or refuses, or has not as many processors.
    pub fn new(cpuid: Vec<Vec<Leaf>>) -> Result<Arc<Self>> {
        let kvm = open()?;
        let most = kvm.get_max_vcpus();
        if cpuid.is_empty() || cpuid.len() > most {
            let cpus = cpuid.len();
            return Err(EngineError::new(
                "cpus",
                format!("{cpus} processors asked for, KVM on this host runs 1 to {most}"),
            ));
        }
        let vm = Arc::new(create(&kvm)?);
        equip(&vm)?;
        finish(&vm)?;
        Ok(Arc::new(Self {
            memory: Arc::new(Memory::new(vm.clone(), kvm.get_nr_memslots())),
            vm,
            taken: Mutex::new(vec![false; cpuid.len()]),
            cpuid,
            levels: Mutex::new(0),
        }))
    }

    fn levels(&self) -> MutexGuard<'_, u32> {
        self.levels.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begin all logs of written pages anew: others have had the memory.
    pub fn forget_log(&self) {
        self.memory.forget_log();
    }

    /// Take a processor; as `Engine::vcpu`, for those who need to know that it is KVM's.
    ///
    /// # Errors
    /// There is no such processor, it is taken, or KVM refuses.
    pub fn processor(&self, index: u32) -> Result<KvmVcpu> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        match taken.get_mut(index as usize) {
            None => Err(EngineError::new("cpus", format!("there is no processor {index}"))),
            Some(true) => Err(EngineError::new("cpus", format!("processor {index} is taken already"))),
            Some(taken) => {
                let fd = self
                    .vm
                    .create_vcpu(index.into())
                    .map_err(|e| refused(format!("creating processor {index}"), e))?;
                let leaves = &self.cpuid[index as usize];
                let vcpu = KvmVcpu::new(index, fd, leaves, self.vm.clone(), self.memory.clone())?;
                *taken = true;
                Ok(vcpu)
            }
        }
    }
}

/// Make an empty machine.
pub(crate) fn create(kvm: &Kvm) -> Result<VmFd> {
    kvm.create_vm().map_err(|e| refused("creating a virtual machine", e))
}

/// Give it interrupt controllers and what all machines have.
pub(crate) fn equip(vm: &VmFd) -> Result<()> {
    vm.set_tss_address(TSS).map_err(|e| refused("placing its task state segment", e))?;
    vm.set_identity_map_address(IDENTITY).map_err(|e| refused("placing its identity map", e))?;
    vm.create_irq_chip().map_err(|e| refused("creating interrupt controllers", e))?;
    // Older kernels lack these two; they do without.
    let mut cap = kvm_enable_cap { cap: KVM_CAP_X2APIC_API, ..Default::default() };
    cap.args[0] = X2APIC_API;
    let _ = vm.enable_cap(&cap);
    let mut cap = kvm_enable_cap { cap: KVM_CAP_EXIT_ON_EMULATION_FAILURE, ..Default::default() };
    cap.args[0] = 1;
    let _ = vm.enable_cap(&cap);
    Ok(())
}

/// Give it a PIT, and wire the interrupt lines.
fn finish(vm: &VmFd) -> Result<()> {
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(|e| refused("creating a PIT", e))?;
    route(vm)
}

/// Wire the interrupt lines.
fn route(vm: &VmFd) -> Result<()> {
    let mut entries = Vec::new();
    let mut wire = |gsi, irqchip, pin| {
        let mut e = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
        e.u.irqchip.irqchip = irqchip;
        e.u.irqchip.pin = pin;
        entries.push(e);
    };
    for gsi in (0..GSIS).filter(|&gsi| gsi != 2) {
        match gsi {
            0..=7 => wire(gsi, KVM_IRQCHIP_PIC_MASTER, gsi),
            8..=15 => wire(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - 8),
            _ => {}
        }
        wire(gsi, KVM_IRQCHIP_IOAPIC, if gsi == 0 { 2 } else { gsi });
    }
    let routing = KvmIrqRouting::from_entries(&entries)
        .map_err(|_| EngineError::new("kvm", "KVM: the interrupt lines are too many"))?;
    vm.set_gsi_routing(&routing).map_err(|e| refused("wiring the interrupt lines", e))
}

impl Engine for KvmEngine {
    fn name(&self) -> &'static str {
        "kvm"
    }

    fn vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>> {
        Ok(Box::new(self.processor(index)?))
    }

    fn map(&self, gpa: u64, region: &Arc<Region>, offset: u64, length: u64, readonly: bool) -> Result<()> {
        self.memory.map(gpa, region, offset, length, readonly)
    }

    fn unmap(&self, gpa: u64, length: u64) -> Result<()> {
        self.memory.unmap(gpa, length)
    }

    fn read(&self, gpa: u64, into: &mut [u8]) -> bool {
        self.memory.guest.read(gpa, into)
    }

    fn write(&self, gpa: u64, from: &[u8]) -> bool {
        self.memory.write(gpa, from)
    }

    fn set_irq(&self, gsi: u32, level: bool) {
        if gsi >= GSIS || gsi == 2 {
            return;
        }
        let mut levels = self.levels();
        *levels = *levels & !(1 << gsi) | u32::from(level) << gsi;
        // The machine exists and the line is wired; there is nothing else to go wrong.
        let _ = self.vm.set_irq_line(gsi, level);
    }

    fn set_a20(&self, open: bool) {
        // Slots that were there a moment ago fit again; if not, the gate stays as it is.
        let _ = self.memory.set_a20(open);
    }

    fn send_msi(&self, address: u64, data: u32) {
        if address >> 20 != 0xFEE {
            return;
        }
        let msi = kvm_msi { address_lo: address as u32, data, ..Default::default() };
        // Whether any local APIC took it is not for the sender to know.
        let _ = self.vm.signal_msi(msi);
    }

    fn doorbell(&self, address: u64, size: u8, value: Option<u64>, event: i32) -> Result<()> {
        if !matches!(size, 1 | 2 | 4 | 8) {
            return Err(EngineError::new(
                "doorbell",
                format!("a doorbell of {size} bytes, expected 1, 2, 4 or 8"),
            ));
        }
        let bell = kvm_ioeventfd {
            datamatch: value.unwrap_or(0),
            addr: address,
            len: size.into(),
            fd: event,
            flags: if value.is_some() { IOEVENTFD_DATAMATCH } else { 0 },
            ..Default::default()
        };
        // SAFETY: the kernel reads one structure.
        if unsafe { libc::ioctl(self.vm.as_raw_fd(), IOEVENTFD, &raw const bell) } == 0 {
            Ok(())
        } else {
            Err(EngineError::last_os("doorbell", format!("KVM: a doorbell at {address:#x}")))
        }
    }

    fn take_dirty(&self, gpa: u64, length: u64) -> Result<Vec<u8>> {
        self.memory.take_dirty(gpa, length)
    }

    fn chips(&self) -> Result<ChipsState> {
        chips::read(&self.vm, *self.levels())
    }

    fn set_chips(&self, state: &ChipsState) -> Result<()> {
        let mut levels = self.levels();
        let tell = chips::write(&self.vm, state)?;
        let lines = state.ioapic.lines;
        *levels = lines & !5 | lines >> 2 & 1;
        for gsi in (0..GSIS).filter(|gsi| tell >> gsi & 1 == 1) {
            self.vm.set_irq_line(gsi, true).map_err(|e| refused(format!("raising line {gsi}"), e))?;
        }
        Ok(())
    }

    fn tsc_hz(&self) -> u64 {
        clock::tsc_hz()
    }

    fn host_tsc(&self) -> u64 {
        clock::rdtsc()
    }
}
