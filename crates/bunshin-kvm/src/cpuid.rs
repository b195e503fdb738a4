//! CPUID: what KVM can offer, and telling it what the guest is to see.
use crate::{open, refused};
use bunshin_core::cpuid::Leaf;
use bunshin_core::{EngineError, Result};
use kvm_bindings::{kvm_cpuid_entry2, CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm, VcpuFd};

/// What this host's KVM can offer a guest.
///
/// # Errors
/// KVM cannot be opened, or refuses.
pub fn supported() -> Result<Vec<Leaf>> {
    supported_by(&open()?)
}

pub(crate) fn supported_by(kvm: &Kvm) -> Result<Vec<Leaf>> {
    let list = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|e| refused("asking for the features that it supports", e))?;
    let leaf = |e: &kvm_cpuid_entry2| Leaf {
        leaf: e.function,
        sub: (e.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0).then_some(e.index),
        regs: [e.eax, e.ebx, e.ecx, e.edx],
    };
    let mut leaves: Vec<_> = list.as_slice().iter().map(leaf).collect();
    if kvm.check_extension(Cap::TscDeadlineTimer) {
        // Told of apart, since it goes with the local APIC in the kernel.
        leaves.iter_mut().filter(|l| l.leaf == 1).for_each(|l| l.regs[2] |= 1 << 24);
    }
    Ok(leaves)
}

/// Let a processor answer CPUID with `leaves`.
pub(crate) fn set(fd: &VcpuFd, leaves: &[Leaf]) -> Result<()> {
    let entries: Vec<_> = leaves
        .iter()
        .map(|l| kvm_cpuid_entry2 {
            function: l.leaf,
            index: l.sub.unwrap_or(0),
            flags: if l.sub.is_some() { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 },
            eax: l.regs[0],
            ebx: l.regs[1],
            ecx: l.regs[2],
            edx: l.regs[3],
            ..Default::default()
        })
        .collect();
    let list = CpuId::from_entries(&entries).map_err(|_| {
        EngineError::new("kvm", format!("KVM: {} leaves of CPUID are too many", entries.len()))
    })?;
    fd.set_cpuid2(&list).map_err(|e| refused("setting what the guest sees of the processor", e))
}
