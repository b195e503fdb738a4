//! The few host instructions that the translator writes by itself.
//!
//! Host registers in translated code:
//!
//! ```text
//! rax rcx rdx rbx rbp rsi rdi r12-r15   the guest's registers of that name
//! r11                                   the guest's rsp
//! r8 r9 r10                             scratch (S0 S1 S2)
//! rsp                                   the host's stack
//! gs                                    the processor's page and its tables (cpu.rs)
//! ```
//!
//! The guest's r8-r11 live in memory at `gs:[gpr + 8 n]`.
//! A block is written into two sections, hot and cold, which the code cache keeps apart.

use crate::cache::CodeCache;
use crate::insn::Mem;

pub const RAX: u8 = 0;
pub const RCX: u8 = 1;
pub const S0: u8 = 8;
pub const S1: u8 = 9;
pub const S2: u8 = 10;
/// Host register that holds the guest's rsp.
pub const GSP: u8 = 11;

/// Host register of guest register `n`, None for the ones kept in memory.
pub fn pinned(n: u8) -> Option<u8> {
    match n {
        4 => Some(GSP),
        8..=11 => None,
        _ => Some(n),
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Section {
    Hot,
    Cold,
}

/// A place in the code being written.
#[derive(Clone, Copy, Debug)]
pub struct Label(pub Section, pub u32);

enum Target {
    /// Stretch of the plan, wherever it comes to lie.
    Stretch(usize),
    Label(Label),
    Absolute(u64),
}

struct Fixup {
    section: Section,
    /// Offset of the rel32.
    at: u32,
    target: Target,
}

#[derive(Default)]
pub struct Asm {
    pub hot: Vec<u8>,
    pub cold: Vec<u8>,
    fixups: Vec<Fixup>,
    stretches: Vec<Label>,
    in_cold: bool,
}

impl Asm {
    pub fn clear(&mut self) {
        self.hot.clear();
        self.cold.clear();
        self.fixups.clear();
        self.stretches.clear();
        self.in_cold = false;
    }

    pub fn section(&mut self, s: Section) {
        self.in_cold = s == Section::Cold;
    }

    pub fn buf(&mut self) -> &mut Vec<u8> {
        if self.in_cold {
            &mut self.cold
        } else {
            &mut self.hot
        }
    }

    pub fn here(&self) -> Label {
        if self.in_cold {
            Label(Section::Cold, self.cold.len() as u32)
        } else {
            Label(Section::Hot, self.hot.len() as u32)
        }
    }

    #[inline]
    pub fn b(&mut self, bytes: &[u8]) {
        self.buf().extend_from_slice(bytes);
    }

    #[inline]
    pub fn d(&mut self, v: u32) {
        self.b(&v.to_le_bytes());
    }

    fn fix(&mut self, target: Target) {
        let Label(section, at) = self.here();
        self.fixups.push(Fixup { section, at, target });
        self.d(0);
    }

    /// Bytes that the finished block takes.
    fn length(&self) -> usize {
        self.hot.len() + self.cold.len()
    }

    /// Resolve all jumps for execution at host address `at`, of the cold section at
    /// `cold_at`. `hot` and `cold` may be copied there then.
    fn settle(&mut self, at: u64, cold_at: u64) {
        let place = |l: &Label| u64::from(l.1) + if l.0 == Section::Cold { cold_at } else { at };
        for f in &self.fixups {
            let from = place(&Label(f.section, f.at)) + 4;
            let to = match &f.target {
                Target::Label(l) => place(l),
                Target::Stretch(n) => place(&self.stretches[*n]),
                Target::Absolute(a) => *a,
            };
            let rel = to.wrapping_sub(from) as i64;
            debug_assert!(i32::try_from(rel).is_ok());
            let buf = if f.section == Section::Cold { &mut self.cold } else { &mut self.hot };
            buf[f.at as usize..f.at as usize + 4].copy_from_slice(&(rel as i32).to_le_bytes());
        }
    }

    /// Write the code to `cache`, cold section and all in one place, and return its
    /// address.
    pub fn put(&mut self, cache: &mut CodeCache) -> u64 {
        let at = cache.next();
        let hot = self.hot.len();
        self.settle(at, at + hot as u64);
        let out = cache.take(self.length());
        out[..hot].copy_from_slice(&self.hot);
        out[hot..].copy_from_slice(&self.cold);
        at
    }

    /// Write the code to `cache` and return its address and the cold section's.
    pub fn put_apart(&mut self, cache: &mut CodeCache) -> (u64, u64) {
        let (at, cold_at) = (cache.next(), cache.cold() - self.cold.len() as u64);
        self.settle(at, cold_at);
        cache.take(self.hot.len()).copy_from_slice(&self.hot);
        cache.take_cold(self.cold.len()).copy_from_slice(&self.cold);
        (at, cold_at)
    }

    // --- control flow -----------------------------------------------------

    pub fn jmp(&mut self, l: Label) {
        self.b(&[0xe9]);
        self.fix(Target::Label(l));
    }

    /// The next stretch of the plan begins here.
    pub fn bind(&mut self) {
        let here = self.here();
        self.stretches.push(here);
    }

    /// `jmp` to a stretch of the plan.
    pub fn jmp_stretch(&mut self, n: usize) {
        self.b(&[0xe9]);
        self.fix(Target::Stretch(n));
    }

    /// `jcc` to a stretch of the plan.
    pub fn jcc_stretch(&mut self, cc: u8, n: usize) {
        self.b(&[0x0f, 0x80 | cc]);
        self.fix(Target::Stretch(n));
    }

    pub fn jmp_abs(&mut self, a: u64) {
        self.b(&[0xe9]);
        self.fix(Target::Absolute(a));
    }

    pub fn call_abs(&mut self, a: u64) {
        self.b(&[0xe8]);
        self.fix(Target::Absolute(a));
    }

    pub fn jcc(&mut self, cc: u8, l: Label) {
        self.b(&[0x0f, 0x80 | cc]);
        self.fix(Target::Label(l));
    }

    /// `jrcxz` forward; patch with [`Asm::land`].
    pub fn jrcxz(&mut self) -> usize {
        self.b(&[0xe3, 0]);
        self.buf().len()
    }

    /// Short jump of opcode `op` forward; patch with [`Asm::land`].
    pub fn short(&mut self, op: u8) -> usize {
        self.b(&[op, 0]);
        self.buf().len()
    }

    /// Short `jcc` forward; patch with [`Asm::land`].
    pub fn jcc_short(&mut self, cc: u8) -> usize {
        self.b(&[0x70 | cc, 0]);
        self.buf().len()
    }

    /// Short `jmp` forward; patch with [`Asm::land`].
    pub fn jmp_short(&mut self) -> usize {
        self.b(&[0xeb, 0]);
        self.buf().len()
    }

    /// `jcc` forward over any distance; patch with [`Asm::land_far`].
    pub fn jcc_far(&mut self, cc: u8) -> usize {
        self.b(&[0x0f, 0x80 | cc, 0, 0, 0, 0]);
        self.buf().len()
    }

    pub fn land_far(&mut self, from: usize) {
        let n = (self.buf().len() - from) as u32;
        self.buf()[from - 4..from].copy_from_slice(&n.to_le_bytes());
    }

    pub fn land(&mut self, from: usize) {
        let n = self.buf().len() - from;
        assert!(n < 128);
        self.buf()[from - 1] = n as u8;
    }

    // --- processor page ---------------------------------------------------

    fn gs(&mut self, w: bool, op: &[u8], reg: u8, off: u32) {
        let rex = 0x40 | if w { 8 } else { 0 } | ((reg >> 3) << 2);
        self.b(&[0x65]);
        if rex != 0x40 {
            self.b(&[rex]);
        }
        self.b(op);
        self.b(&[((reg & 7) << 3) | 4, 0x25]);
        self.d(off);
    }

    /// `op reg64, gs:[index*8 + off]`
    fn gs_indexed(&mut self, op: u8, reg: u8, index: u8, off: u32) {
        let rex = 0x48 | ((reg >> 3) << 2) | ((index >> 3) << 1);
        self.b(&[0x65, rex, op, ((reg & 7) << 3) | 4, 0xc5 | ((index & 7) << 3)]);
        self.d(off);
    }

    pub fn load(&mut self, reg: u8, off: u32) {
        self.gs(true, &[0x8b], reg, off);
    }

    pub fn load32(&mut self, reg: u8, off: u32) {
        self.gs(false, &[0x8b], reg, off);
    }

    pub fn store(&mut self, off: u32, reg: u8) {
        self.gs(true, &[0x89], reg, off);
    }

    pub fn store32(&mut self, off: u32, reg: u8) {
        self.gs(false, &[0x89], reg, off);
    }

    /// `movzx reg32, byte gs:[off]`
    pub fn load8(&mut self, reg: u8, off: u32) {
        self.gs(false, &[0x0f, 0xb6], reg, off);
    }

    pub fn store8_imm(&mut self, off: u32, v: u8) {
        self.gs(false, &[0xc6], 0, off);
        self.b(&[v]);
    }

    pub fn store32_imm(&mut self, off: u32, v: u32) {
        self.gs(false, &[0xc7], 0, off);
        self.d(v);
    }

    /// `cmp dword gs:[off], imm8`
    pub fn cmp32_imm8(&mut self, off: u32, v: u8) {
        self.gs(false, &[0x83], 7, off);
        self.b(&[v]);
    }

    /// `cmp qword gs:[off], imm8`
    pub fn cmp64_imm8(&mut self, off: u32, v: u8) {
        self.gs(true, &[0x83], 7, off);
        self.b(&[v]);
    }

    /// `cmp reg64, gs:[off]`
    pub fn cmp_gs(&mut self, reg: u8, off: u32) {
        self.gs(true, &[0x3b], reg, off);
    }

    /// `inc dword gs:[off]`
    pub fn increment32(&mut self, off: u32) {
        self.gs(false, &[0xff], 0, off);
    }

    /// `call gs:[off]`
    pub fn call_gs(&mut self, off: u32) {
        self.gs(false, &[0xff], 2, off);
    }

    /// `jmp gs:[off]`
    pub fn jmp_gs(&mut self, off: u32) {
        self.gs(false, &[0xff], 4, off);
    }

    /// `jmp gs:[index*8 + off]`
    pub fn jmp_gs_indexed(&mut self, index: u8, off: u32) {
        let rex = 0x40 | ((index >> 3) << 1);
        self.b(&[0x65, rex, 0xff, 0x24, 0xc5 | ((index & 7) << 3)]);
        self.d(off);
    }

    pub fn load_indexed(&mut self, reg: u8, index: u8, off: u32) {
        self.gs_indexed(0x8b, reg, index, off);
    }

    pub fn add_indexed(&mut self, reg: u8, index: u8, off: u32) {
        self.gs_indexed(0x03, reg, index, off);
    }

    pub fn cmp_indexed(&mut self, reg: u8, index: u8, off: u32) {
        self.gs_indexed(0x3b, reg, index, off);
    }

    pub fn add_gs(&mut self, reg: u8, off: u32) {
        self.gs(true, &[0x03], reg, off);
    }

    /// `add to, from`
    pub fn add(&mut self, to: u8, from: u8) {
        self.b(&[0x48 | ((from >> 3) << 2) | (to >> 3), 0x01, 0xc0 | ((from & 7) << 3) | (to & 7)]);
    }

    /// `sub to, from`
    pub fn sub(&mut self, to: u8, from: u8) {
        self.b(&[0x48 | ((from >> 3) << 2) | (to >> 3), 0x29, 0xc0 | ((from & 7) << 3) | (to & 7)]);
    }

    pub fn not(&mut self, reg: u8) {
        self.b(&[0x48 | (reg >> 3), 0xf7, 0xd0 | (reg & 7)]);
    }

    /// `shr reg64, n`; nothing for 0.
    pub fn shr(&mut self, reg: u8, n: u8) {
        if n != 0 {
            self.b(&[0x48 | (reg >> 3), 0xc1, 0xe8 | (reg & 7), n]);
        }
    }

    // --- registers ----------------------------------------------------------

    pub fn mov(&mut self, to: u8, from: u8) {
        if to != from {
            self.b(&[0x48 | ((from >> 3) << 2) | (to >> 3), 0x89, 0xc0 | ((from & 7) << 3) | (to & 7)]);
        }
    }

    /// `mov to32, from32`: clears the upper half even when `to == from`.
    pub fn mov32(&mut self, to: u8, from: u8) {
        self.b(&[0x40 | ((from >> 3) << 2) | (to >> 3), 0x89, 0xc0 | ((from & 7) << 3) | (to & 7)]);
    }

    pub fn movzx16(&mut self, to: u8, from: u8) {
        self.b(&[0x40 | ((to >> 3) << 2) | (from >> 3), 0x0f, 0xb7, 0xc0 | ((to & 7) << 3) | (from & 7)]);
    }

    /// Shortest `mov reg, v`; flags stay.
    pub fn mov_imm(&mut self, reg: u8, v: u64) {
        if u32::try_from(v).is_ok() {
            if reg >= 8 {
                self.b(&[0x41]);
            }
            self.b(&[0xb8 | (reg & 7)]);
            self.d(v as u32);
        } else if i32::try_from(v as i64).is_ok() {
            self.b(&[0x48 | (reg >> 3), 0xc7, 0xc0 | (reg & 7)]);
            self.d(v as u32);
        } else {
            self.b(&[0x48 | (reg >> 3), 0xb8 | (reg & 7)]);
            self.b(&v.to_le_bytes());
        }
    }

    /// `lea to, [base + index*scale + disp]`; with `wide` false the result is
    /// cut to 32 bits. No register: absolute.
    pub fn lea(&mut self, wide: bool, to: u8, base: Option<u8>, index: Option<(u8, u8)>, disp: i32) {
        let rex = 0x40
            | if wide { 8 } else { 0 }
            | ((to >> 3) << 2)
            | (index.map_or(0, |(r, _)| r >> 3) << 1)
            | base.map_or(0, |r| r >> 3);
        if rex != 0x40 {
            self.b(&[rex]);
        }
        self.b(&[0x8d]);
        self.address(to, base, index, disp);
    }

    /// `lea to, [base + disp32]` up to the displacement, which the caller writes.
    pub fn lea_disp32(&mut self, wide: bool, to: u8, base: u8) {
        self.b(&[0x40 | if wide { 8 } else { 0 } | ((to >> 3) << 2) | (base >> 3), 0x8d]);
        self.b(&[0x80 | (to & 7) << 3 | (base & 7)]);
        if base & 7 == 4 {
            self.b(&[0x24]);
        }
    }

    /// ModRM, SIB and displacement of a memory operand.
    fn address(&mut self, reg: u8, base: Option<u8>, index: Option<(u8, u8)>, disp: i32) {
        let r = (reg & 7) << 3;
        let need_sib = index.is_some() || base.is_none_or(|b| b & 7 == 4);
        let (mode, size) = match base {
            None => (0, 4),
            Some(b) if disp == 0 && b & 7 != 5 => (0, 0),
            Some(_) if i8::try_from(disp).is_ok() => (0x40, 1),
            Some(_) => (0x80, 4),
        };
        if need_sib {
            let (i, s) = index.map_or((4, 0), |(i, s)| (i & 7, s.trailing_zeros() as u8));
            self.b(&[mode | r | 4, (s << 6) | (i << 3) | base.map_or(5, |b| b & 7)]);
        } else {
            self.b(&[mode | r | (base.unwrap() & 7)]);
        }
        match size {
            1 => self.b(&[disp as u8]),
            4 => self.d(disp as u32),
            _ => {}
        }
    }

    fn rex_mem(wide: bool, reg: u8, m: Mem) -> u8 {
        0x40 | if wide { 8 } else { 0 }
            | ((reg >> 3) << 2)
            | (m.index.map_or(0, |i| i >> 3) << 1)
            | (m.base >> 3)
    }

    fn address_mem(&mut self, reg: u8, m: Mem) {
        self.address(reg, Some(m.base), m.index.map(|i| (i, 1)), m.disp);
    }

    /// Load `size` bytes, extended with zeros.
    pub fn load_mem(&mut self, size: u8, to: u8, m: Mem) {
        self.b(&[Self::rex_mem(size == 8, to, m)]);
        match size {
            1 => self.b(&[0x0f, 0xb6]),
            2 => self.b(&[0x0f, 0xb7]),
            _ => self.b(&[0x8b]),
        }
        self.address_mem(to, m);
    }

    pub fn store_mem(&mut self, size: u8, m: Mem, from: u8) {
        if size == 2 {
            self.b(&[0x66]);
        }
        self.b(&[Self::rex_mem(size == 8, from, m), if size == 1 { 0x88 } else { 0x89 }]);
        self.address_mem(from, m);
    }

    /// Store an immediate, sign-extended from 32 bits.
    pub fn store_mem_imm(&mut self, size: u8, m: Mem, v: i32) {
        if size == 2 {
            self.b(&[0x66]);
        }
        self.b(&[Self::rex_mem(size == 8, 0, m), if size == 1 { 0xc6 } else { 0xc7 }]);
        self.address_mem(0, m);
        match size {
            1 => self.b(&[v as u8]),
            2 => self.b(&(v as u16).to_le_bytes()),
            _ => self.d(v as u32),
        }
    }

    /// `rorx to, from, n` (flags stay)
    pub fn rorx(&mut self, to: u8, from: u8, n: u8) {
        let r = if to >= 8 { 0 } else { 0x80 };
        let b = if from >= 8 { 0 } else { 0x20 };
        self.b(&[0xc4, r | 0x40 | b | 3, 0xfb, 0xf0, 0xc0 | ((to & 7) << 3) | (from & 7), n]);
    }

    /// `pext to, from, qword gs:[off]`
    pub fn pext_gs(&mut self, to: u8, from: u8, off: u32) {
        let r = if to >= 8 { 0 } else { 0x80 };
        self.b(&[0x65, 0xc4, r | 0x62, 0x82 | ((!from & 15) << 3), 0xf5, ((to & 7) << 3) | 4, 0x25]);
        self.d(off);
    }

    /// `cmp reg64, imm32`
    pub fn cmp_imm(&mut self, reg: u8, v: i32) {
        self.b(&[0x48 | (reg >> 3), 0x81, 0xf8 | (reg & 7)]);
        self.d(v as u32);
    }

    pub fn push(&mut self, reg: u8) {
        if reg >= 8 {
            self.b(&[0x41]);
        }
        self.b(&[0x50 | (reg & 7)]);
    }

    pub fn pop(&mut self, reg: u8) {
        if reg >= 8 {
            self.b(&[0x41]);
        }
        self.b(&[0x58 | (reg & 7)]);
    }

    pub fn ret(&mut self) {
        self.b(&[0xc3]);
    }

    /// Host flags into eax (AH, AL); the caller has saved rax.
    pub fn lahf_seto(&mut self) {
        self.b(&[0x9f, 0x0f, 0x90, 0xc0]);
    }

    /// Flags from rax as `lahf_seto` left them.
    pub fn sahf_of(&mut self) {
        self.b(&[0x04, 0x7f, 0x9e]);
    }
}
