//! CPUID as a list, for engines that are told what the guest sees.

/// One answer of CPUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leaf {
    /// eax.
    pub leaf: u32,
    /// ecx, where the answer depends on it.
    pub sub: Option<u32>,
    /// eax, ebx, ecx, edx.
    pub regs: [u32; 4],
}

/// What `leaves` answer, as [0; 4] where there is no such leaf.
pub fn find(leaves: &[Leaf], leaf: u32, sub: u32) -> [u32; 4] {
    leaves.iter().find(|l| l.leaf == leaf && l.sub.is_none_or(|s| s == sub)).map_or([0; 4], |l| l.regs)
}
