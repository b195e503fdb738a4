//! CPUID as the guest sees it: the host's, less what is not offered, plus a
//! hypervisor's leaves that tell the TSC rate (KVM's interface, which Linux
//! reads without calibration).
use crate::vcpu::Vcpu;
use bunshin_core::cpuid::{find, Leaf};
use std::arch::x86_64::__cpuid_count;
use std::collections::BTreeMap;
use std::sync::Mutex;

/// Bits of a physical address.
pub const PHYSICAL_BITS: u32 = 46;

/// eax, ebx, ecx, edx.
pub type Regs = [u32; 4];

/// CPUID.80000001H:ECX: topology leaves 8000001D and 8000001E.
const TOPOEXT: u32 = 22;

/// What the processors of a machine answer.
pub struct Table {
    cpus: u32,
    max: u32,
    max_ext: u32,
    /// What another engine can offer, where the guest is to move to it.
    other: Option<Vec<Leaf>>,
}

/// What answers depend on besides the table.
struct Asked {
    id: u32,
    osxsave: bool,
    apic: bool,
    xcr0: u64,
}

/// CPUID.1:ECX: XSAVE, and what the table always says itself: OSXSAVE, a hypervisor.
const XSAVE: u32 = 26;
const OSXSAVE: u32 = 27;
const HYPERVISOR: u32 = 31;
/// CPUID.1:EDX: APIC (while it is on), several processors in a package.
const APIC: u32 = 9;
const HTT: u32 = 28;
/// CPUID.80000001H:ECX: the same for AMD's.
const CMP_LEGACY: u32 = 1;

/// The host's answer. A hypervisor below us may make CPUID slow, so each is
/// asked once; no leaf that is passed on has as many as 64 parts.
fn host(leaf: u32, sub: u32) -> Regs {
    static SEEN: Mutex<BTreeMap<(u32, u32), Regs>> = Mutex::new(BTreeMap::new());
    if sub >= 64 {
        return [0; 4];
    }
    *SEEN.lock().unwrap().entry((leaf, sub)).or_insert_with(|| {
        let r = __cpuid_count(leaf, sub);
        [r.eax, r.ebx, r.ecx, r.edx]
    })
}

fn bits(list: &[u32]) -> u32 {
    list.iter().fold(0, |m, &b| m | 1 << b)
}

impl Table {
    pub fn new(cpus: u32) -> Self {
        let max = host(0, 0)[0].min(0x16);
        let max_ext = host(0x8000_0000, 0)[0].min(0x8000_0021);
        Self { cpus, max, max_ext, other: None }
    }

    /// The table without what another engine, which supports `leaves`, does not have.
    pub fn limited(self, leaves: Vec<Leaf>) -> Self {
        Self { other: Some(leaves), ..self }
    }

    /// Everything that processor `id` answers after RESET#.
    pub fn leaves(&self, id: u32) -> Vec<Leaf> {
        let asked = Asked { id, osxsave: false, apic: true, xcr0: 1 };
        let mut list = Vec::new();
        let hypervisor = [0x4000_0000, 0x4000_0001, 0x4000_0010];
        for leaf in (0..=self.max).chain(hypervisor).chain(0x8000_0000..=self.max_ext) {
            let subs = match leaf {
                4 | 0x8000_001d => 5,
                7 => 2,
                0xb => 3,
                0xd => 63,
                _ => 0,
            };
            if subs == 0 {
                list.push(Leaf { leaf, sub: None, regs: self.answer(leaf, 0, &asked) });
            }
            for sub in 0..subs {
                let regs = self.answer(leaf, sub, &asked);
                if sub < 2 || regs != [0; 4] {
                    list.push(Leaf { leaf, sub: Some(sub), regs });
                }
            }
        }
        list
    }

    /// Bits of an APIC ID that tell the processors apart; each is a core of its own
    /// and all are in one package.
    fn id_bits(&self) -> u32 {
        32 - (self.cpus - 1).leading_zeros()
    }

    /// APIC IDs set aside for the package.
    fn ids(&self) -> u32 {
        1 << self.id_bits()
    }

    /// A cache as leaves 4 and 0x8000001D describe it: the first two levels belong to
    /// a core, the others to all.
    fn cache(&self, host: Regs) -> Regs {
        let [eax, ebx, ecx, edx] = host;
        let shared = if eax >> 5 & 7 > 2 { self.ids() - 1 } else { 0 };
        if eax & 31 == 0 {
            return [0; 4];
        }
        [eax & 0x3fff | shared << 14, ebx, ecx, edx]
    }

    /// One leaf as processor `v` answers it.
    pub(crate) fn get(&self, leaf: u32, sub: u32, v: &Vcpu) -> Regs {
        let c = v.cpu();
        // The answer costs a lock, and only one leaf tells it.
        let apic = leaf != 1 || v.chips_enabled();
        let asked = Asked { id: v.index, osxsave: c.cr4 & (1 << 18) != 0, apic, xcr0: c.xcr0 };
        self.answer(leaf, sub, &asked)
    }

    fn answer(&self, leaf: u32, sub: u32, asked: &Asked) -> Regs {
        let own = self.own(leaf, sub, asked);
        let Some(other) = &self.other else { return own };
        let has = find(other, leaf, sub);
        let both = |n: usize, always: &[u32]| own[n] & (has[n] | bits(always));
        match (leaf, sub) {
            (1, _) => {
                let ecx = both(2, &[OSXSAVE, HYPERVISOR]);
                [own[0], own[1], ecx, both(3, &[APIC, HTT])]
            }
            (7, 0) => [own[0], both(1, &[]), both(2, &[]), both(3, &[])],
            (7, _) | (0x8000_0021 | 0x4000_0001, _) => [both(0, &[]), own[1], own[2], own[3]],
            (0xd, _) if find(other, 1, 0)[2] >> XSAVE & 1 == 0 => [0; 4],
            (0xd, 1) => [both(0, &[]), own[1], own[2], own[3]],
            (0x8000_0001, _) => [own[0], own[1], both(2, &[CMP_LEGACY]), both(3, &[])],
            (0x8000_0008, _) => {
                let physical = (own[0] & 0xff).min(has[0] & 0xff).max(36);
                [own[0] & !0xff | physical, own[1], own[2], own[3]]
            }
            _ => own,
        }
    }

    /// The XSAVE components that are offered.
    fn components(&self) -> u64 {
        let mask = crate::host::xsave_mask();
        match &self.other {
            Some(other) => {
                let d = find(other, 0xd, 0);
                mask & (u64::from(d[3]) << 32 | u64::from(d[0]))
            }
            None => mask,
        }
    }

    fn own(&self, leaf: u32, sub: u32, asked: &Asked) -> Regs {
        let id = asked.id;
        match leaf {
            0 => {
                let h = host(0, 0);
                [self.max, h[1], h[2], h[3]]
            }
            1 => {
                let h = host(1, 0);
                let mut ecx = h[2] & bits(&[0, 1, 9, 12, 13, 17, 19, 20, 22, 23, 25, 26, 28, 29, 30]);
                ecx |= bits(&[17, 21, 24, 31]); // PCID, x2APIC, TSC deadline, hypervisor
                if asked.osxsave {
                    ecx |= 1 << OSXSAVE;
                }
                let mut edx = h[3] & !bits(&[7, 14, 18, 21, 22, 27, 29, 30, 31]);
                edx = (edx & !(1 << 28)) | 1 << 9 | if self.cpus > 1 { 1 << 28 } else { 0 };
                if !asked.apic {
                    edx &= !(1 << 9);
                }
                [h[0], (h[1] & 0xff00) | (self.ids() << 16) | (id << 24), ecx, edx]
            }
            2 => host(2, 0),
            4 => {
                let mut h = self.cache(host(4, sub));
                if h[0] & 31 != 0 {
                    h[0] |= (self.ids() - 1) << 26;
                }
                h
            }
            6 => [4, 0, 0, 0],
            7 if sub == 0 => {
                let h = host(7, 0);
                let mut ebx = h[1]
                    & bits(&[0, 3, 5, 7, 8, 9, 10, 16, 17, 18, 19, 20, 21, 23, 24, 26, 27, 28, 29, 30, 31]);
                // FSGSBASE SMEP INVPCID SMAP are ours
                ebx |= bits(&[0, 7, 10, 20]);
                ebx |= 1 << 1; // TSC_ADJUST
                let mut ecx = h[2] & bits(&[1, 6, 8, 9, 10, 11, 12, 14, 22]);
                ecx |= 1 << 2; // UMIP
                let edx = h[3] & bits(&[2, 3, 4, 8, 23]);
                [1, ebx, ecx, edx]
            }
            7 if sub == 1 => {
                let h = host(7, 1);
                [h[0] & bits(&[4, 5, 10, 11, 12, 23]), 0, 0, 0]
            }
            0xb => match sub {
                0 => [0, 1, 0x100, id],
                1 => [self.id_bits().max(1), self.cpus, 0x201, id],
                _ => [0, 0, sub, id],
            },
            0xd => self.xsave(sub, asked.xcr0),
            0x15 => {
                // crystal of 1 GHz would need a ratio; give kHz through leaf 16 and KVM's
                let hz = bunshin_core::clock::tsc_hz();
                let crystal = 24_000_000u64;
                // TSC = crystal * ebx / eax, as near as 32 bits allow
                let den = 1_000_000u64;
                [den as u32, (hz * den / crystal) as u32, crystal as u32, 0]
            }
            0x16 => {
                let mhz = (bunshin_core::clock::tsc_hz() / 1_000_000) as u32;
                [mhz, mhz, 100, 0]
            }
            0x4000_0000 => {
                let s = b"KVMKVMKVM\0\0\0";
                let w = |k: usize| u32::from_le_bytes([s[k], s[k + 1], s[k + 2], s[k + 3]]);
                [0x4000_0010, w(0), w(4), w(8)]
            }
            // CLOCKSOURCE2, CLOCKSOURCE_STABLE, NOP_IO_DELAY
            0x4000_0001 => [bits(&[1, 3, 24]), 0, 0, 0],
            0x4000_0010 => [(bunshin_core::clock::tsc_hz() / 1000) as u32, 1_000_000, 0, 0],
            0x8000_0000 => {
                let h = host(leaf, 0);
                [self.max_ext, h[1], h[2], h[3]]
            }
            0x8000_0001 => {
                let h = host(leaf, 0);
                let mut ecx = h[2] & bits(&[0, 5, 6, 7, 8, 11, 16, 21, TOPOEXT]);
                if crate::host::amd() && self.cpus > 1 {
                    // CmpLegacy: what HTT counts are cores.
                    ecx |= 1 << 1;
                }
                let mut edx = h[3] & !bits(&[7, 14, 18, 21, 28]);
                edx |= bits(&[11, 20, 26, 27, 29]);
                [h[0], h[1] & 0xffff_0000, ecx, edx]
            }
            0x8000_0002..=0x8000_0006 => host(leaf, 0),
            0x8000_0007 => [0, 0, 0, 1 << 8],
            0x8000_0008 => {
                let h = host(leaf, 0);
                [(h[0] & 0xff00) | PHYSICAL_BITS, 0, self.id_bits() << 12 | (self.cpus - 1), 0]
            }
            0x8000_001a if leaf <= self.max_ext => host(leaf, 0),
            0x8000_001d if leaf <= self.max_ext => self.cache(host(leaf, sub)),
            // Cores of one thread, on one node.
            0x8000_001e if leaf <= self.max_ext && host(0x8000_0001, 0)[2] >> TOPOEXT & 1 != 0 => {
                [id, id & 0xff, 0, 0]
            }
            // LFENCE serialises, null selector clears base
            0x8000_0021 => [host(leaf, 0)[0] & bits(&[0, 2, 6]), 0, 0, 0],
            _ => [0; 4],
        }
    }

    /// Leaf 0xD: sizes for the components that are offered.
    fn xsave(&self, sub: u32, xcr0: u64) -> Regs {
        let mask = self.components();
        match sub {
            0 => {
                let size = |m: u64| {
                    (2..63)
                        .filter(|n| m & (1 << n) != 0)
                        .map(|n| {
                            let h = host(0xd, n);
                            h[1] + h[0]
                        })
                        .max()
                        .unwrap_or(0)
                        .max(576)
                };
                [mask as u32, size(xcr0), size(mask), (mask >> 32) as u32]
            }
            1 => {
                // XSAVEOPT, XSAVEC, XGETBV(1), XSAVES
                let h = host(0xd, 1);
                let mut size = 576;
                for n in 2..63 {
                    if xcr0 & (1 << n) != 0 {
                        let h = host(0xd, n);
                        if h[2] & 2 != 0 {
                            size = (size + 63) & !63;
                        }
                        size += h[0];
                    }
                }
                [h[0] & 0xf, size, 0, 0]
            }
            n if n < 63 && mask & (1 << n) != 0 => {
                let h = host(0xd, n);
                [h[0], h[1], h[2] & 2, 0]
            }
            _ => [0; 4],
        }
    }
}
