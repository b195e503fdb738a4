//! What the host processor and kernel offer.
use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::sync::OnceLock;

/// State components that belong to the guest: x87, SSE, AVX, AVX-512, as far
/// as the host's kernel enables them.
pub fn xsave_mask() -> u64 {
    static MASK: OnceLock<u64> = OnceLock::new();
    *MASK.get_or_init(|| {
        if __cpuid(1).ecx & (1 << 27) == 0 {
            return 3;
        }
        let (low, high): (u32, u32);
        // SAFETY: OSXSAVE was checked.
        unsafe { core::arch::asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high) };
        (u64::from(high) << 32 | u64::from(low)) & 0xe7
    })
}

/// The processor is AMD's, or of its family.
pub fn amd() -> bool {
    static AMD: OnceLock<bool> = OnceLock::new();
    *AMD.get_or_init(|| [*b"Auth", *b"Hygo"].contains(&__cpuid(0).ebx.to_le_bytes()))
}

/// Offset and length of XSAVE component `n` in the standard form.
pub fn component(n: usize) -> (usize, usize) {
    static PLACES: OnceLock<[(usize, usize); 8]> = OnceLock::new();
    PLACES.get_or_init(|| {
        std::array::from_fn(|n| match n {
            0 => (32, 128),
            1 => (160, 256),
            _ if xsave_mask() >> n & 1 == 0 => (0, 0),
            _ => {
                let l = __cpuid_count(0xd, n as u32);
                (l.ebx as usize, l.eax as usize)
            }
        })
    })[n]
}

/// Where a state component lies in an XSAVE area: CPUID leaf 0xD.
#[derive(Clone, Copy, Default)]
pub struct Component {
    pub size: usize,
    /// In the standard format.
    pub offset: usize,
    /// Starts at a multiple of 64 in the compacted format.
    pub aligned: bool,
}

/// The extended components (2 and up) by number. CPUID may trap to a
/// hypervisor below us, so it is asked once.
pub fn components() -> &'static [Component; 63] {
    static TABLE: OnceLock<[Component; 63]> = OnceLock::new();
    TABLE.get_or_init(|| {
        let mut t = [Component::default(); 63];
        for (n, c) in t.iter_mut().enumerate().skip(2) {
            if xsave_mask() >> n & 1 != 0 {
                let l = __cpuid_count(0xd, n as u32);
                *c = Component { size: l.eax as usize, offset: l.ebx as usize, aligned: l.ecx & 2 != 0 };
            }
        }
        t
    })
}

pub fn has_xsaveopt() -> bool {
    __cpuid_count(0xd, 1).eax & 1 != 0
}

/// XGETBV with ecx = 1 tells which state components are in use.
pub fn has_xgetbv_in_use() -> bool {
    __cpuid_count(0xd, 1).eax & 4 != 0
}

pub fn has_avx512bw() -> bool {
    __cpuid_count(7, 0).ebx & (1 << 30) != 0
}

/// FSGSBASE as enabled for user mode by the host's kernel (AT_HWCAP2 bit 1).
fn fsgsbase() -> bool {
    // SAFETY: reads the auxiliary vector.
    unsafe { libc::getauxval(libc::AT_HWCAP2) & 2 != 0 }
}

/// What the translator uses, by name; `required` says which it cannot do without.
pub fn features() -> Vec<(&'static str, bool)> {
    let l1 = __cpuid(1);
    let l7 = __cpuid_count(7, 0);
    let ext = __cpuid(0x8000_0001);
    let os_avx = xsave_mask() & 4 != 0;
    vec![
        ("xsave", l1.ecx & (1 << 27) != 0),
        ("bmi2", l7.ebx & (1 << 8) != 0),
        ("fsgsbase", fsgsbase()),
        ("lahf", ext.ecx & 1 != 0),
        ("cmpxchg16b", l1.ecx & (1 << 13) != 0),
        ("avx", l1.ecx & (1 << 28) != 0 && os_avx),
        ("avx2", l7.ebx & (1 << 5) != 0 && os_avx),
        ("avx512f", l7.ebx & (1 << 16) != 0 && xsave_mask() & 0xe0 == 0xe0),
        ("erms", l7.ebx & (1 << 9) != 0),
        ("xsaveopt", has_xsaveopt()),
    ]
}

/// Names that the translator cannot do without.
pub const REQUIRED: [&str; 5] = ["xsave", "bmi2", "fsgsbase", "lahf", "avx"];
