//! CPUID: what KVM can offer, and telling it what the guest is to see.
use crate::{engine, open, refused};
use bunshin_core::cpuid::{find, Leaf};
use bunshin_core::{EngineError, Result};
use kvm_bindings::{kvm_cpuid_entry2, CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use std::sync::OnceLock;

/// What this host's KVM can offer a guest, asked once for a process.
///
/// Some kinds of KVM run user code without a way to hide features from it, and answer so
/// whatever they are told. So a processor of a throwaway machine is asked too.
///
/// # Errors
/// KVM cannot be opened, or refuses.
pub fn supported() -> Result<Vec<Leaf>> {
    static KNOWN: OnceLock<Vec<Leaf>> = OnceLock::new();
    if let Some(known) = KNOWN.get() {
        return Ok(known.clone());
    }
    let kvm = open()?;
    let mut leaves = supported_by(&kvm)?;
    let vm = engine::create(&kvm)?;
    vm.create_irq_chip().map_err(|e| refused("creating interrupt controllers", e))?;
    let fd = vm.create_vcpu(0).map_err(|e| refused("creating a processor", e))?;
    set(&fd, &leaves)?;
    let told = fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(|e| refused("asking for CPUID", e))?;
    add(&mut leaves, &told.as_slice().iter().map(leaf).collect::<Vec<_>>());
    // The end of a machine takes its time.
    std::thread::spawn(move || drop((fd, vm)));
    Ok(KNOWN.get_or_init(|| leaves).clone())
}

/// Add the features that `told` has to `leaves`, in the registers that hold features.
fn add(leaves: &mut [Leaf], told: &[Leaf]) {
    for l in leaves {
        let more = find(told, l.leaf, l.sub.unwrap_or(0));
        let registers: &[usize] = match (l.leaf, l.sub.unwrap_or(0)) {
            (1 | 0x8000_0001, _) => &[2, 3],
            (7, 0) => &[1, 2, 3],
            (0xD, 0) => &[0, 3],
            (7 | 0xD, 1) | (0x8000_0021, _) => &[0],
            _ => &[],
        };
        registers.iter().for_each(|&n| l.regs[n] |= more[n]);
    }
}

fn leaf(e: &kvm_cpuid_entry2) -> Leaf {
    Leaf {
        leaf: e.function,
        sub: (e.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0).then_some(e.index),
        regs: [e.eax, e.ebx, e.ecx, e.edx],
    }
}

pub(crate) fn supported_by(kvm: &Kvm) -> Result<Vec<Leaf>> {
    let list = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|e| refused("asking for the features that it supports", e))?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_that_cannot_be_hidden_are_offered() {
        let leaf = |leaf, sub, regs| Leaf { leaf, sub, regs };
        let mut leaves =
            [leaf(1, None, [7, 1, 1, 1]), leaf(0xD, Some(0), [0, 9, 9, 0]), leaf(5, None, [1; 4])];
        let told = [leaf(1, None, [8, 8, 4, 2]), leaf(0xD, Some(0), [7, 1, 1, 0]), leaf(5, None, [2; 4])];
        add(&mut leaves, &told);
        assert_eq!(leaves.map(|l| l.regs), [[7, 1, 5, 3], [7, 9, 9, 0], [1; 4]]);
    }
}
