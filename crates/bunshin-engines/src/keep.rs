//! What a guest was told of its processor, and whether another engine can keep it.
use bunshin_core::cpuid::{find, Leaf};
use bunshin_core::{EngineError, Result};

/// Features that guests use most, for people: name, leaf, register, bit.
const NAMES: [(&str, u32, usize, u32); 25] = [
    ("SSE3", 1, 2, 0),
    ("PCLMULQDQ", 1, 2, 1),
    ("SSSE3", 1, 2, 9),
    ("FMA", 1, 2, 12),
    ("CMPXCHG16B", 1, 2, 13),
    ("PCID", 1, 2, 17),
    ("SSE4.1", 1, 2, 19),
    ("SSE4.2", 1, 2, 20),
    ("x2APIC", 1, 2, 21),
    ("POPCNT", 1, 2, 23),
    ("TSC deadline", 1, 2, 24),
    ("AES", 1, 2, 25),
    ("XSAVE", 1, 2, 26),
    ("AVX", 1, 2, 28),
    ("FSGSBASE", 7, 1, 0),
    ("AVX2", 7, 1, 5),
    ("SMEP", 7, 1, 7),
    ("BMI2", 7, 1, 8),
    ("INVPCID", 7, 1, 10),
    ("AVX-512", 7, 1, 16),
    ("SMAP", 7, 1, 20),
    ("SHA", 7, 1, 29),
    ("UMIP", 7, 2, 2),
    ("NX", 0x8000_0001, 3, 20),
    ("1 GiB pages", 0x8000_0001, 3, 26),
];
/// Names in a message.
const SHOWN: usize = 6;

/// That `kept`, what is left of `told` on the other engine, is all of it.
///
/// # Errors
/// It is not; the sentence names features.
pub fn check(told: &[Leaf], kept: &[Leaf]) -> Result<()> {
    let differs = |l: &&Leaf| find(kept, l.leaf, l.sub.unwrap_or(0)) != l.regs;
    let Some(first) = told.iter().find(differs) else { return Ok(()) };
    let mut names: Vec<_> = NAMES
        .iter()
        .filter(|&&(_, leaf, register, bit)| {
            let on = |l: &[Leaf]| find(l, leaf, 0)[register] >> bit & 1 == 1;
            on(told) && !on(kept)
        })
        .map(|n| n.0.to_owned())
        .collect();
    if names.len() > SHOWN {
        let more = names.len() - SHOWN;
        names.truncate(SHOWN);
        names.push(format!("{more} more"));
    }
    if names.is_empty() {
        names.push(format!("what leaf {:#x} of CPUID tells", first.leaf));
    }
    Err(EngineError::new(
        "engine-switch",
        format!(
            "the guest was told at boot of {}, which KVM on this host does not offer; a machine \
             that is to move must be built for it",
            names.join(", ")
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        let leaf = |leaf, sub, ecx| Leaf { leaf, sub, regs: [1, 0, ecx, 0] };
        let told = [leaf(1, None, 1 << 28 | 1 << 20 | 1), leaf(0xD, Some(0), 7)];
        assert_eq!(check(&told, &told), Ok(()));
        let kept = [leaf(1, None, 1), leaf(0xD, Some(0), 7)];
        let said = check(&told, &kept).unwrap_err().message;
        assert!(said.contains("SSE4.2, AVX,"), "{said}");
        let said = check(&told, &told[..1]).unwrap_err().message;
        assert!(said.contains("leaf 0xd"), "{said}");
    }
}
