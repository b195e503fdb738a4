//! Which encodings may be generated: everything that this processor runs in
//! 64-bit user mode, less what is not deterministic, not ours to run, or
//! shows where code or the FPU's pointers lie.
use iced_x86::{Code, CpuidFeature, DecoderOptions, EncodingKind, FlowControl, Mnemonic, OpCodeOperandKind};
use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::collections::BTreeMap;
use std::sync::OnceLock;

use crate::state::Layout;

/// Classes of instructions, so that the thousands of AVX-512 encodings do not
/// crowd out the rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// General-purpose instructions.
    Integer,
    /// MOVS, STOS, LODS, CMPS, SCAS.
    String,
    /// x87.
    X87,
    /// MMX, SSE to SSE4.2, AES, SHA and their like in legacy encoding.
    Sse,
    /// VEX-encoded vectors.
    Avx,
    /// EVEX-encoded vectors and opmasks.
    Avx512,
}

/// How often each class is drawn.
const WEIGHTS: [(Class, u64); 6] = [
    (Class::Integer, 58),
    (Class::String, 4),
    (Class::X87, 8),
    (Class::Sse, 14),
    (Class::Avx, 9),
    (Class::Avx512, 7),
];

/// The encodings to draw from.
pub struct Pool {
    classes: Vec<(u64, Vec<Vec<Code>>)>,
    total: u64,
    allowed: Vec<bool>,
}

impl Pool {
    /// Every encoding that the host runs and whose mnemonic `filter` accepts.
    pub fn new(choice: &super::Choice, filter: &dyn Fn(&str) -> bool) -> Self {
        let mut allowed = vec![false; Code::values().len()];
        let mut classes: BTreeMap<Class, BTreeMap<Mnemonic, Vec<Code>>> = BTreeMap::new();
        for code in Code::values() {
            if !host_runs(code, choice.narrow) || denied(code, choice).is_some() {
                continue;
            }
            allowed[code as usize] = true;
            if filter(&format!("{:?}", code.mnemonic()).to_lowercase()) {
                classes.entry(class(code)).or_default().entry(code.mnemonic()).or_default().push(code);
            }
        }
        let mut pool = Self { classes: Vec::new(), total: 0, allowed };
        for (class, weight) in WEIGHTS {
            if let Some(mnemonics) = classes.remove(&class) {
                pool.total += weight;
                pool.classes.push((weight, mnemonics.into_values().collect()));
            }
        }
        pool
    }

    /// Every encoding that the host knows, with the reason why it is not drawn.
    pub fn survey(choice: &super::Choice) -> Vec<(Code, Option<&'static str>)> {
        Code::values()
            .filter(|code| host_runs(*code, choice.narrow))
            .map(|code| (code, denied(code, choice)))
            .collect()
    }

    /// No encoding is left by the filter.
    pub fn is_empty(&self) -> bool {
        self.classes.is_empty()
    }

    /// How many encodings and mnemonics can be drawn.
    pub fn size(&self) -> (usize, usize) {
        let mnemonics = self.classes.iter().flat_map(|(_, m)| m);
        (mnemonics.clone().map(Vec::len).sum(), mnemonics.count())
    }

    /// Draw one: a class by weight, a mnemonic of it, an encoding of that.
    pub fn draw(&self, random: &mut crate::random::Random) -> Code {
        let mut at = random.below(self.total);
        for (weight, mnemonics) in &self.classes {
            if at < *weight {
                let codes = &mnemonics[random.below(mnemonics.len() as u64) as usize];
                return random.pick(codes);
            }
            at -= weight;
        }
        Code::Nopd
    }

    /// May this encoding run at all, whatever the filter says?
    pub fn allows(&self, code: Code) -> bool {
        self.allowed[code as usize]
    }

    /// Every encoding that can be drawn.
    pub fn codes(&self) -> impl Iterator<Item = Code> + '_ {
        self.classes.iter().flat_map(|(_, m)| m).flatten().copied()
    }
}

fn class(code: Code) -> Class {
    use CpuidFeature as F;
    let info = code.op_code();
    let string = |k: &OpCodeOperandKind| {
        matches!(k, OpCodeOperandKind::seg_rSI | OpCodeOperandKind::es_rDI | OpCodeOperandKind::seg_rDI)
    };
    let features = code.cpuid_features();
    if features.iter().any(|f| format!("{f:?}").starts_with("AVX512")) {
        return Class::Avx512;
    }
    let vector = info.op_kinds().iter().any(|k| {
        let name = format!("{k:?}");
        name.contains("xmm") || name.contains("ymm") || name.contains("zmm") || name.starts_with("mm_")
    });
    match info.encoding() {
        EncodingKind::EVEX => Class::Avx512,
        EncodingKind::VEX if vector || features.contains(&F::AVX) => Class::Avx,
        _ if features.iter().any(|f| matches!(f, F::FPU | F::FPU287 | F::FPU387)) => Class::X87,
        _ if vector || features.iter().any(|f| matches!(f, F::SSE | F::SSE2 | F::MMX)) => Class::Sse,
        _ if info.op_kinds().iter().any(string) => Class::String,
        _ => Class::Integer,
    }
}

/// Why an encoding that the host knows is not drawn; None if it is.
fn denied(code: Code, choice: &super::Choice) -> Option<&'static str> {
    use Mnemonic as M;
    let info = code.op_code();
    if code == Code::Movsxd_r16_rm16 {
        return Some("reads two bytes on Intel's processors, four on AMD's");
    }
    if info.fwait() {
        return Some("is WAIT and another instruction");
    }
    if code.flow_control() != FlowControl::Next {
        return Some("branches and exceptions are made by hand");
    }
    let privileged = info.is_privileged() || info.must_be_cpl0() || info.is_input_output();
    if !choice.privileged && (privileged || info.may_require_cpl0()) {
        return Some("faults in user mode; drawn with --privileged");
    }
    let segment = |k: &OpCodeOperandKind| {
        use OpCodeOperandKind as K;
        matches!(k, K::seg_reg | K::tr_reg | K::es | K::cs | K::ss | K::ds | K::fs | K::gs)
    };
    if info.op_kinds().iter().any(segment) {
        return Some("segment registers are loaded and stored by hand");
    }
    match code.mnemonic() {
        M::Rdtsc | M::Rdtscp | M::Rdpid | M::Rdrand | M::Rdseed | M::Cpuid | M::Xgetbv => {
            Some("not deterministic; made by hand, with the result overwritten")
        }
        M::Lar | M::Lsl | M::Verr | M::Verw | M::Lss | M::Lds | M::Les | M::Lfs | M::Lgs => {
            Some("takes a selector; made by hand")
        }
        M::Rdpmc | M::Rdpru | M::Mcommit | M::Xabort | M::Xtest | M::Xbegin | M::Xend => {
            Some("not deterministic, and the kernel's to allow")
        }
        M::Monitorx | M::Mwaitx | M::Monitor | M::Mwait | M::Tpause | M::Umwait | M::Umonitor => {
            Some("waits")
        }
        M::Clzero | M::Rdpkru | M::Wrpkru | M::Invlpga | M::Swapgs => {
            Some("the guest's processor does not have it, or not in user mode")
        }
        M::Sgdt | M::Sidt | M::Sldt | M::Str | M::Smsw | M::Lmsw => {
            Some("Linux forbids it (UMIP) and answers for the processor")
        }
        M::Fnstenv
        | M::Fstenv
        | M::Fldenv
        | M::Fnsave
        | M::Fsave
        | M::Frstor
        | M::Fxsave
        | M::Fxsave64
        | M::Fxrstor
        | M::Fxrstor64
        | M::Xsave
        | M::Xsave64
        | M::Xsavec
        | M::Xsavec64
        | M::Xsaveopt
        | M::Xsaveopt64
        | M::Xrstor
        | M::Xrstor64
            if !choice.environment =>
        {
            Some("shows FIP and FDP; drawn with --environment")
        }
        _ => None,
    }
}

/// Does this processor know the encoding, whatever its privilege?
pub fn host_runs(code: Code, narrow: bool) -> bool {
    static HOST: OnceLock<Host> = OnceLock::new();
    HOST.get_or_init(Host::detect).runs(code, narrow)
}

/// What CPUID says of this processor.
struct Host {
    amd: bool,
    leaf1_ecx: u32,
    leaf1_edx: u32,
    leaf7: [u32; 3],
    leaf7_1_eax: u32,
    leaf13_1_eax: u32,
    extended_ecx: u32,
    rdtscp: bool,
    avx: bool,
    avx512: bool,
}

impl Host {
    fn detect() -> Self {
        let vendor = __cpuid(0);
        let one = __cpuid(1);
        let seven = if vendor.eax >= 7 { __cpuid_count(7, 0) } else { __cpuid_count(0, 1) };
        let has_seven = vendor.eax >= 7;
        let seven_1 = if has_seven && seven.eax >= 1 { __cpuid_count(7, 1).eax } else { 0 };
        let extended = __cpuid(0x8000_0001);
        let layout = Layout::host();
        Self {
            amd: vendor.ebx == u32::from_le_bytes(*b"Auth") || vendor.ebx == u32::from_le_bytes(*b"Hygo"),
            leaf1_ecx: one.ecx,
            leaf1_edx: one.edx,
            leaf7: if has_seven { [seven.ebx, seven.ecx, seven.edx] } else { [0; 3] },
            leaf7_1_eax: seven_1,
            leaf13_1_eax: if vendor.eax >= 0xd { __cpuid_count(0xd, 1).eax } else { 0 },
            extended_ecx: extended.ecx,
            rdtscp: extended.edx >> 27 & 1 == 1,
            avx: layout.features & 4 != 0,
            avx512: layout.avx512(),
        }
    }

    fn runs(&self, code: Code, narrow: bool) -> bool {
        let info = code.op_code();
        let encodings = [EncodingKind::Legacy, EncodingKind::VEX, EncodingKind::EVEX];
        code != Code::INVALID
            && info.is_instruction()
            && (if narrow { info.mode32() } else { info.mode64() })
            && encodings.contains(&info.encoding())
            && info.decoder_option() == DecoderOptions::NONE
            && (match (self.amd, narrow) {
                (true, false) => info.amd_decoder64(),
                (false, false) => info.intel_decoder64(),
                (true, true) => info.amd_decoder32(),
                (false, true) => info.intel_decoder32(),
            })
            && !info.is_reserved_nop()
            && code.cpuid_features().iter().all(|f| self.has(*f))
            && (self.avx512 || info.encoding() != EncodingKind::EVEX)
    }

    fn has(&self, feature: CpuidFeature) -> bool {
        use CpuidFeature as F;
        let bit = |register: u32, bit: u32| register >> bit & 1 == 1;
        let [ebx7, ecx7, edx7] = self.leaf7;
        match feature {
            F::INTEL8086 | F::INTEL186 | F::INTEL286 | F::INTEL386 | F::INTEL486 | F::X64 => true,
            F::FPU | F::FPU287 | F::FPU387 | F::MULTIBYTENOP | F::PAUSE | F::CPUID | F::TSC => true,
            F::CX8 => bit(self.leaf1_edx, 8),
            F::CMOV => bit(self.leaf1_edx, 15),
            F::CLFSH => bit(self.leaf1_edx, 19),
            F::MMX => bit(self.leaf1_edx, 23),
            F::FXSR => bit(self.leaf1_edx, 24),
            F::SSE => bit(self.leaf1_edx, 25),
            F::SSE2 => bit(self.leaf1_edx, 26),
            F::SSE3 => bit(self.leaf1_ecx, 0),
            F::PCLMULQDQ => bit(self.leaf1_ecx, 1),
            F::SSSE3 => bit(self.leaf1_ecx, 9),
            F::FMA => self.avx && bit(self.leaf1_ecx, 12),
            F::CMPXCHG16B => bit(self.leaf1_ecx, 13),
            F::SSE4_1 => bit(self.leaf1_ecx, 19),
            F::SSE4_2 => bit(self.leaf1_ecx, 20),
            F::MOVBE => bit(self.leaf1_ecx, 22),
            F::POPCNT => bit(self.leaf1_ecx, 23),
            F::AES => bit(self.leaf1_ecx, 25),
            F::XSAVE => bit(self.leaf1_ecx, 27),
            F::AVX => self.avx && bit(self.leaf1_ecx, 28),
            F::F16C => self.avx && bit(self.leaf1_ecx, 29),
            F::SEP => bit(self.extended_ecx, 0),
            F::LZCNT => bit(self.extended_ecx, 5),
            F::SSE4A => bit(self.extended_ecx, 6),
            F::PREFETCHW => bit(self.extended_ecx, 8),
            F::FMA4 => self.avx && bit(self.extended_ecx, 16),
            F::BMI1 => bit(ebx7, 3),
            F::AVX2 => self.avx && bit(ebx7, 5),
            F::BMI2 => bit(ebx7, 8),
            F::ADX => bit(ebx7, 19),
            F::CLFLUSHOPT => bit(ebx7, 23),
            F::CLWB => bit(ebx7, 24),
            F::SHA => bit(ebx7, 29),
            F::AVX512F => self.avx512 && bit(ebx7, 16),
            F::AVX512DQ => self.avx512 && bit(ebx7, 17),
            F::AVX512_IFMA => self.avx512 && bit(ebx7, 21),
            F::AVX512CD => self.avx512 && bit(ebx7, 28),
            F::AVX512BW => self.avx512 && bit(ebx7, 30),
            F::AVX512VL => self.avx512 && bit(ebx7, 31),
            F::AVX512_VBMI => self.avx512 && bit(ecx7, 1),
            F::AVX512_VBMI2 => self.avx512 && bit(ecx7, 6),
            F::GFNI => bit(ecx7, 8),
            F::VAES => self.avx && bit(ecx7, 9),
            F::VPCLMULQDQ => self.avx && bit(ecx7, 10),
            F::AVX512_VNNI => self.avx512 && bit(ecx7, 11),
            F::AVX512_BITALG => self.avx512 && bit(ecx7, 12),
            F::AVX512_VPOPCNTDQ => self.avx512 && bit(ecx7, 14),
            F::AVX512_VP2INTERSECT => self.avx512 && bit(edx7, 8),
            F::MOVDIRI => bit(ecx7, 27),
            F::MOVDIR64B => bit(ecx7, 28),
            F::CLDEMOTE => bit(ecx7, 25),
            F::RDPID => bit(ecx7, 22),
            F::FSGSBASE => bit(ebx7, 0),
            F::RDSEED => bit(ebx7, 18),
            F::RDRAND => bit(self.leaf1_ecx, 30),
            F::RDTSCP => self.rdtscp,
            F::XSAVEOPT => bit(self.leaf13_1_eax, 0),
            F::XSAVEC => bit(self.leaf13_1_eax, 1),
            F::XSAVES => bit(self.leaf13_1_eax, 3),
            F::SMAP => bit(ebx7, 20),
            F::INVPCID => bit(ebx7, 10),
            F::MSR => bit(self.leaf1_edx, 5),
            F::CLZERO | F::RDPRU | F::MONITORX | F::WBNOINVD => self.amd,
            F::SERIALIZE => bit(edx7, 14),
            F::AVX512_FP16 => self.avx512 && bit(edx7, 23),
            F::AVX_VNNI => self.avx && bit(self.leaf7_1_eax, 4),
            F::AVX512_BF16 => self.avx512 && bit(self.leaf7_1_eax, 5),
            _ => false,
        }
    }
}
