//! The user-mode state of one x86-64 processor: general registers, rip,
//! rflags and the XSAVE area in standard form (x87, SSE, AVX, AVX-512).
//!
//! The area's layout comes from CPUID leaf 0xD, since AMD and Intel place the
//! AVX-512 components differently. Masked in every comparison, because the
//! hardware itself does not promise them: FOP, FIP, FDP, the FPU selectors,
//! MXCSR_MASK, reserved bytes, and whether a component is in its initial
//! configuration (XSTATE_BV).
//!
//! Spec: Intel SDM volume 1, chapter 13; AMD APM volume 2, 11.5.
use std::arch::x86_64::{__cpuid_count, _xgetbv};
use std::sync::OnceLock;

/// x87, SSE, AVX and the three AVX-512 components of XCR0.
pub const FEATURES: u64 = 0xe7;
/// Bytes of a standard-form area with [`FEATURES`], on every processor.
pub const XSAVE_BYTES: usize = 2816;

/// Arithmetic flags CF PF AF ZF SF OF.
pub const ARITHMETIC: u64 = 0x8d5;
/// Direction flag.
pub const DF: u64 = 1 << 10;
/// Trap flag.
pub const TF: u64 = 1 << 8;
/// Alignment check.
pub const AC: u64 = 1 << 18;
/// What user mode can change and both sides must agree on: the arithmetic
/// flags, TF, DF, NT, AC, ID. RF and IF belong to the system.
pub const USER_FLAGS: u64 = ARITHMETIC | TF | DF | 1 << 14 | AC | 1 << 21;

const HEADER: usize = 512;
const AVX: u64 = 1 << 2;
const OPMASK: u64 = 1 << 5;
const ZMM_HIGH: u64 = 1 << 6;
const HIGH_16: u64 = 1 << 7;

/// Names of the general registers in encoding order.
pub const GPR_NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];

/// Where the host keeps each component of the XSAVE area.
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    /// Bits of XCR0 within [`FEATURES`].
    pub features: u64,
    /// Bytes from the start to the end of the last component.
    pub size: usize,
    avx: usize,
    opmask: usize,
    zmm_high: usize,
    high_16: usize,
}

impl Layout {
    /// The host's layout.
    pub fn host() -> &'static Self {
        static LAYOUT: OnceLock<Layout> = OnceLock::new();
        LAYOUT.get_or_init(|| {
            let features = xcr0() & FEATURES;
            let component = |n: u32| {
                if features >> n & 1 == 0 {
                    return (0, 0);
                }
                let leaf = __cpuid_count(0xd, n);
                (leaf.ebx as usize, leaf.eax as usize)
            };
            let parts = [component(2), component(5), component(6), component(7)];
            let size = parts.iter().map(|(at, length)| at + length).fold(HEADER + 64, usize::max);
            assert!(size <= XSAVE_BYTES, "XSAVE components end at {size}, expected {XSAVE_BYTES} at most");
            Self {
                features,
                size,
                avx: parts[0].0,
                opmask: parts[1].0,
                zmm_high: parts[2].0,
                high_16: parts[3].0,
            }
        })
    }

    /// Vector registers 16..31 and the opmasks exist.
    pub fn avx512(&self) -> bool {
        self.features & (OPMASK | ZMM_HIGH | HIGH_16) == OPMASK | ZMM_HIGH | HIGH_16
    }
}

/// Extended control register 0 of the host.
fn xcr0() -> u64 {
    // SAFETY: leaf 1 tells whether OSXSAVE is set, and only then XGETBV runs.
    unsafe {
        #[target_feature(enable = "xsave")]
        unsafe fn read() -> u64 {
            // SAFETY: the caller saw OSXSAVE.
            unsafe { _xgetbv(0) }
        }
        if __cpuid_count(1, 0).ecx >> 27 & 1 == 1 {
            read()
        } else {
            3
        }
    }
}

/// A standard-form XSAVE area.
#[repr(C, align(64))]
#[derive(Clone, PartialEq, Eq)]
pub struct Xsave(pub [u8; XSAVE_BYTES]);

impl Default for Xsave {
    fn default() -> Self {
        let mut area = Self([0; XSAVE_BYTES]);
        area.set_fcw(0x37f);
        area.set_mxcsr(0x1f80);
        area.0[HEADER..HEADER + 8].copy_from_slice(&Layout::host().features.to_le_bytes());
        area
    }
}

impl Xsave {
    fn u16_at(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.0[at..at + 2].try_into().unwrap())
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// x87 control word.
    pub fn fcw(&self) -> u16 {
        self.u16_at(0)
    }

    /// Set the x87 control word.
    pub fn set_fcw(&mut self, value: u16) {
        self.put(0, &value.to_le_bytes());
    }

    /// x87 status word.
    pub fn fsw(&self) -> u16 {
        self.u16_at(2)
    }

    /// Set the x87 status word.
    pub fn set_fsw(&mut self, value: u16) {
        self.put(2, &value.to_le_bytes());
    }

    /// Abridged tag byte: bit i set when physical register i holds a value.
    pub fn ftw(&self) -> u8 {
        self.0[4]
    }

    /// Set the abridged tag byte.
    pub fn set_ftw(&mut self, value: u8) {
        self.0[4] = value;
    }

    /// SSE control and status.
    pub fn mxcsr(&self) -> u32 {
        u32::from_le_bytes(self.0[24..28].try_into().unwrap())
    }

    /// Set SSE control and status.
    pub fn set_mxcsr(&mut self, value: u32) {
        self.put(24, &value.to_le_bytes());
    }

    /// ST(i) relative to the top of the stack: 10 bytes.
    pub fn st(&self, i: usize) -> [u8; 10] {
        self.0[32 + 16 * i..42 + 16 * i].try_into().unwrap()
    }

    /// Set ST(i).
    pub fn set_st(&mut self, i: usize, value: [u8; 10]) {
        self.put(32 + 16 * i, &value);
    }

    /// How many vector registers there are and how wide they are in bytes.
    pub fn shape() -> (usize, usize) {
        let layout = Layout::host();
        if layout.avx512() {
            (32, 64)
        } else if layout.features & AVX != 0 {
            (16, 32)
        } else {
            (16, 16)
        }
    }

    /// Vector register `i`, zero above the host's width.
    pub fn vector(&self, i: usize) -> [u8; 64] {
        let layout = Layout::host();
        let mut value = [0; 64];
        if i >= 16 {
            value.copy_from_slice(&self.0[layout.high_16 + 64 * (i - 16)..][..64]);
            return value;
        }
        value[..16].copy_from_slice(&self.0[160 + 16 * i..][..16]);
        if layout.features & AVX != 0 {
            value[16..32].copy_from_slice(&self.0[layout.avx + 16 * i..][..16]);
        }
        if layout.avx512() {
            value[32..].copy_from_slice(&self.0[layout.zmm_high + 32 * i..][..32]);
        }
        value
    }

    /// Set vector register `i`; parts that the host lacks are dropped.
    pub fn set_vector(&mut self, i: usize, value: [u8; 64]) {
        let layout = Layout::host();
        if i >= 16 {
            if layout.avx512() {
                self.put(layout.high_16 + 64 * (i - 16), &value);
            }
            return;
        }
        self.put(160 + 16 * i, &value[..16]);
        if layout.features & AVX != 0 {
            self.put(layout.avx + 16 * i, &value[16..32]);
        }
        if layout.avx512() {
            self.put(layout.zmm_high + 32 * i, &value[32..]);
        }
    }

    /// Opmask register `i`; zero where the host has none.
    pub fn opmask(&self, i: usize) -> u64 {
        let layout = Layout::host();
        if !layout.avx512() {
            return 0;
        }
        u64::from_le_bytes(self.0[layout.opmask + 8 * i..][..8].try_into().unwrap())
    }

    /// Set opmask register `i`.
    pub fn set_opmask(&mut self, i: usize, value: u64) {
        let layout = Layout::host();
        if layout.avx512() {
            self.put(layout.opmask + 8 * i, &value.to_le_bytes());
        }
    }

    /// Bring an area that a processor wrote into the one form that is
    /// compared: components in their initial configuration are written out,
    /// what is masked (see the file's head) is zero.
    pub fn normalise(&mut self) {
        let layout = Layout::host();
        let present = u64::from_le_bytes(self.0[HEADER..HEADER + 8].try_into().unwrap());
        let absent = layout.features & !present;
        if absent & 1 != 0 {
            self.0[..24].fill(0);
            self.set_fcw(0x37f);
            self.0[32..160].fill(0);
        }
        if absent & 2 != 0 {
            self.0[160..416].fill(0);
        }
        let mut clear = |feature: u64, at: usize, length: usize| {
            if absent & feature != 0 {
                self.0[at..at + length].fill(0);
            }
        };
        clear(AVX, layout.avx, 256);
        clear(OPMASK, layout.opmask, 64);
        clear(ZMM_HIGH, layout.zmm_high, 512);
        clear(HIGH_16, layout.high_16, 1024);
        self.0[5..24].fill(0);
        self.0[28..32].fill(0);
        for i in 0..8 {
            self.0[42 + 16 * i..48 + 16 * i].fill(0);
        }
        self.0[416..HEADER + 64].fill(0);
        self.0[HEADER..HEADER + 8].copy_from_slice(&layout.features.to_le_bytes());
        if layout.opmask > layout.avx + 256 {
            self.0[layout.avx + 256..layout.opmask].fill(0);
        }
        self.0[layout.size..].fill(0);
    }
}

/// Everything that user-mode code can see in registers.
#[derive(Clone, PartialEq, Eq)]
pub struct UserState {
    /// rax rcx rdx rbx rsp rbp rsi rdi r8..r15, in encoding order.
    pub gpr: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// RFLAGS; bits outside [`USER_FLAGS`] carry no meaning.
    pub rflags: u64,
    /// Floating-point and vector registers.
    pub xsave: Xsave,
}

impl Default for UserState {
    fn default() -> Self {
        Self { gpr: [0; 16], rip: 0, rflags: 0x202, xsave: Xsave::default() }
    }
}

/// One register that differs, both values as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Register or place.
    pub name: String,
    /// What the first judge found.
    pub left: String,
    /// What the second judge found.
    pub right: String,
}

impl Difference {
    /// Build from anything printable.
    pub fn new(name: impl Into<String>, left: impl Into<String>, right: impl Into<String>) -> Self {
        Self { name: name.into(), left: left.into(), right: right.into() }
    }
}

/// RFLAGS as the letters of the flags that are set.
pub fn flag_names(rflags: u64) -> String {
    const NAMES: [(u32, &str); 11] = [
        (0, "CF"),
        (2, "PF"),
        (4, "AF"),
        (6, "ZF"),
        (7, "SF"),
        (8, "TF"),
        (10, "DF"),
        (11, "OF"),
        (14, "NT"),
        (18, "AC"),
        (21, "ID"),
    ];
    let set: Vec<_> = NAMES.iter().filter(|(bit, _)| rflags >> bit & 1 == 1).map(|(_, name)| *name).collect();
    set.join(" ")
}

/// Bytes of a little-endian register, most significant first, in groups of 8.
pub fn register_text(bytes: &[u8]) -> String {
    let mut text = String::new();
    for (i, byte) in bytes.iter().rev().enumerate() {
        if i > 0 && (bytes.len() - i) % 8 == 0 {
            text.push('_');
        }
        text += &format!("{byte:02x}");
    }
    text
}

impl UserState {
    /// Every register in which two normalised states differ; flags only
    /// within `flags`.
    pub fn differences(&self, other: &Self, flags: u64) -> Vec<Difference> {
        let mut found = Vec::new();
        for (i, name) in GPR_NAMES.iter().enumerate() {
            if self.gpr[i] != other.gpr[i] {
                let text = |v: u64| format!("{v:016x}");
                found.push(Difference::new(*name, text(self.gpr[i]), text(other.gpr[i])));
            }
        }
        if self.rip != other.rip {
            found.push(Difference::new("rip", format!("{:x}", self.rip), format!("{:x}", other.rip)));
        }
        if (self.rflags ^ other.rflags) & flags != 0 {
            let text = |v: u64| format!("{:06x} [{}]", v & flags, flag_names(v & flags));
            found.push(Difference::new("rflags", text(self.rflags), text(other.rflags)));
        }
        if self.xsave == other.xsave {
            return found;
        }
        let (a, b) = (&self.xsave, &other.xsave);
        let mut word = |name: &str, left: u32, right: u32| {
            if left != right {
                found.push(Difference::new(name, format!("{left:04x}"), format!("{right:04x}")));
            }
        };
        word("fcw", a.fcw().into(), b.fcw().into());
        word("fsw", a.fsw().into(), b.fsw().into());
        word("ftw", a.ftw().into(), b.ftw().into());
        word("mxcsr", a.mxcsr(), b.mxcsr());
        for i in 0..8 {
            if a.st(i) != b.st(i) {
                found.push(Difference::new(
                    format!("st{i}"),
                    register_text(&a.st(i)),
                    register_text(&b.st(i)),
                ));
            }
            if a.opmask(i) != b.opmask(i) {
                let text = |v: u64| format!("{v:016x}");
                found.push(Difference::new(format!("k{i}"), text(a.opmask(i)), text(b.opmask(i))));
            }
        }
        let (count, width) = Xsave::shape();
        for i in 0..count {
            if a.vector(i) != b.vector(i) {
                let text = |v: [u8; 64]| register_text(&v[..width]);
                found.push(Difference::new(format!("v{i}"), text(a.vector(i)), text(b.vector(i))));
            }
        }
        if found.is_empty() {
            let at = a.0.iter().zip(&b.0).position(|(x, y)| x != y).unwrap_or(0);
            found.push(Difference::new(
                format!("xsave+{at:#x}"),
                format!("{:02x}", a.0[at]),
                format!("{:02x}", b.0[at]),
            ));
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_come_back_as_they_were_set() {
        let mut area = Xsave::default();
        let (count, width) = Xsave::shape();
        for i in 0..count {
            let mut value = [0u8; 64];
            for (at, byte) in value[..width].iter_mut().enumerate() {
                *byte = (i * 7 + at) as u8;
            }
            area.set_vector(i, value);
        }
        for i in 0..8 {
            area.set_st(i, [i as u8 + 1; 10]);
            area.set_opmask(i, 0x1111 * i as u64);
        }
        let before = area.clone();
        area.normalise();
        assert!(area == before, "normalising must not touch what is compared");
        for i in 0..count {
            assert_eq!(area.vector(i)[width - 1], (i * 7 + width - 1) as u8);
        }
    }

    #[test]
    fn initial_components_are_written_out() {
        let mut area = Xsave::default();
        area.set_vector(3, [0xaa; 64]);
        area.set_st(0, [0xbb; 10]);
        area.0[512..520].fill(0);
        area.normalise();
        assert!(area == Xsave::default());
    }

    #[test]
    fn only_differing_registers_are_named() {
        let a = UserState::default();
        let mut b = a.clone();
        b.gpr[11] = 5;
        b.rflags |= 1 | 1 << 9;
        b.xsave.set_mxcsr(0x1fa0);
        let names: Vec<_> = a.differences(&b, USER_FLAGS).into_iter().map(|d| d.name).collect();
        assert_eq!(names, ["r11", "rflags", "mxcsr"]);
    }
}
