//! Guest instructions as bytes: where prefixes, opcode, ModRM and immediate
//! lie, and how to write the same instruction with other registers.
//!
//! iced-x86 decodes and tells what an instruction reads and writes; this file
//! only moves its encoding. Encodings: SDM volume 2, chapter 2.
use iced_x86::{
    Code, Decoder, DecoderOptions, Instruction, MandatoryPrefix, OpAccess, OpCodeOperandKind as K, OpKind,
    Register,
};
use std::cell::RefCell;

/// How the opcode is introduced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Legacy,
    /// VEX or XOP, always written in its three-byte form.
    Vex,
    Evex,
}

/// The parts of one encoding.
#[derive(Clone, Copy, Debug)]
pub struct Parts {
    form: Form,
    /// 66, F2/F3, F0 in the order found; segment and address-size prefixes dropped.
    prefixes: [u8; 4],
    prefix_count: u8,
    /// Legacy: the REX byte or 0. VEX: the two payload bytes. EVEX: three.
    payload: [u8; 3],
    lead: u8,
    /// Escape bytes and opcode.
    opcode: [u8; 3],
    opcode_len: u8,
    modrm: Option<u8>,
    imm_at: u8,
    length: u8,
    /// The immediate names a vector register whose top bit 32-bit code ignores.
    short_register: bool,
}

fn has_modrm_1(op: u8) -> bool {
    match op {
        0x00..=0x3f => op & 7 < 4,
        0x62 | 0x63 | 0x69 | 0x6b | 0x80..=0x8f | 0xc0 | 0xc1 | 0xc4..=0xc7 | 0xd0..=0xd3 | 0xd8..=0xdf => {
            true
        }
        0xf6 | 0xf7 | 0xfe | 0xff => true,
        _ => false,
    }
}

fn has_modrm_2(op: u8) -> bool {
    !matches!(op, 0x04..=0x0c | 0x0e | 0x24..=0x27 | 0x30..=0x37 | 0x77 | 0x80..=0x8f | 0xa0..=0xa2 | 0xa8..=0xaa | 0xc8..=0xcf)
}

impl Parts {
    /// Take apart `bytes`, exactly one valid instruction.
    pub fn new(bytes: &[u8], bits: u32) -> Option<Self> {
        let mut p = Self {
            form: Form::Legacy,
            prefixes: [0; 4],
            prefix_count: 0,
            payload: [0; 3],
            lead: 0,
            opcode: [0; 3],
            opcode_len: 0,
            modrm: None,
            imm_at: 0,
            length: bytes.len() as u8,
            short_register: false,
        };
        let mut i = 0;
        let mut addr16 = bits == 16;
        // Only a REX right before the opcode counts.
        let mut rex = 0;
        loop {
            let b = *bytes.get(i)?;
            match b {
                0x66 | 0xf2 | 0xf3 | 0xf0 => {
                    rex = 0;
                    // Repeats of one prefix are dropped; the last of F2/F3 counts.
                    if b & 0xfe == 0xf2 {
                        let n = p.prefix_count as usize;
                        if let Some(old) = p.prefixes[..n].iter_mut().find(|x| **x & 0xfe == 0xf2) {
                            *old = b;
                            i += 1;
                            continue;
                        }
                    }
                    if !p.prefixes[..p.prefix_count as usize].contains(&b) {
                        *p.prefixes.get_mut(p.prefix_count as usize)? = b;
                        p.prefix_count += 1;
                    }
                }
                0x2e | 0x36 | 0x3e | 0x26 | 0x64 | 0x65 => rex = 0,
                0x67 => {
                    rex = 0;
                    addr16 = bits == 32;
                }
                0x40..=0x4f if bits == 64 => rex = b,
                _ => break,
            }
            i += 1;
        }
        let b = *bytes.get(i)?;
        let next = bytes.get(i + 1).copied().unwrap_or(0);
        let vex = bits == 64 || next >= 0xc0;
        match b {
            0xc5 if vex => {
                p.form = Form::Vex;
                p.lead = 0xc4;
                // R vvvv L pp, map 0F; X, B set (inverted), W clear.
                p.payload = [(next & 0x80) | 0x61, next & 0x7f, 0];
                p.opcode[0] = *bytes.get(i + 2)?;
                i += 3;
            }
            0xc4 if vex => {
                p.form = Form::Vex;
                p.lead = 0xc4;
                p.payload = [next, *bytes.get(i + 2)?, 0];
                p.opcode[0] = *bytes.get(i + 3)?;
                i += 4;
            }
            0x8f if next & 0x1f >= 8 => {
                p.form = Form::Vex;
                p.lead = 0x8f;
                p.payload = [next, *bytes.get(i + 2)?, 0];
                p.opcode[0] = *bytes.get(i + 3)?;
                i += 4;
            }
            0x62 if vex => {
                p.form = Form::Evex;
                p.payload = [next, *bytes.get(i + 2)?, *bytes.get(i + 3)?];
                p.opcode[0] = *bytes.get(i + 4)?;
                i += 5;
            }
            0x0f => {
                p.payload[0] = rex;
                let n = if next == 0x38 || next == 0x3a { 3 } else { 2 };
                p.opcode[..n].copy_from_slice(bytes.get(i..i + n)?);
                p.opcode_len = n as u8;
                i += n;
            }
            _ => {
                p.payload[0] = rex;
                // 82 is an alias of 80 that 64-bit code lacks.
                p.opcode[0] = if b == 0x82 { 0x80 } else { b };
                p.opcode_len = 1;
                i += 1;
            }
        }
        if bits != 64 && p.form != Form::Legacy {
            // Outside long mode the register extension bits are not extensions.
            p.payload[0] |= if p.form == Form::Evex { 0xf0 } else { 0xe0 };
            p.payload[1] |= 0x40;
        }
        let modrm = match p.form {
            Form::Legacy => match p.opcode_len {
                1 => has_modrm_1(b),
                2 => has_modrm_2(p.opcode[1]),
                _ => true,
            },
            Form::Vex => !(p.lead == 0xc4 && p.payload[0] & 0x1f == 1 && p.opcode[0] == 0x77),
            Form::Evex => true,
        };
        if modrm {
            let m = *bytes.get(i)?;
            p.modrm = Some(m);
            i += 1;
            let (mode, rm) = (m >> 6, m & 7);
            if mode != 3 {
                if addr16 {
                    i += match (mode, rm) {
                        (0, 6) | (2, _) => 2,
                        (1, _) => 1,
                        _ => 0,
                    };
                } else {
                    let mut base = rm;
                    if rm == 4 {
                        base = *bytes.get(i)? & 7;
                        i += 1;
                    }
                    i += match (mode, base) {
                        (0, 5) | (2, _) => 4,
                        (1, _) => 1,
                        _ => 0,
                    };
                }
            }
        }
        p.imm_at = i as u8;
        (i <= bytes.len()).then_some(p)
    }

    /// [`Parts::new`] for writing the instruction as 64-bit code: in 16-bit code
    /// the operand-size prefix means the opposite.
    pub fn of(i: &Instruction, bytes: &[u8], bits: u32) -> Option<Self> {
        let mut p = Self::new(bytes, bits)?;
        if bits != 64 && p.form != Form::Legacy {
            let op = i.code().op_code();
            if op.is_wig32() {
                // W, which would make general registers 64 bits wide.
                p.payload[1] &= 0x7f;
            }
            p.short_register =
                op.op_kinds().iter().any(|k| matches!(k, K::xmm_is4 | K::ymm_is4 | K::xmm_is5 | K::ymm_is5));
        }
        if bits == 16 && p.form == Form::Legacy {
            let op = i.code().op_code();
            let n = p.prefix_count as usize;
            let has = p.prefixes[..n].contains(&0x66);
            let want = match op.operand_size() {
                _ if op.mandatory_prefix() == MandatoryPrefix::P66 => true,
                16 => true,
                32 => false,
                _ => has,
            };
            if want && !has {
                *p.prefixes.get_mut(n)? = 0x66;
                p.prefix_count += 1;
            } else if has && !want {
                let at = p.prefixes[..n].iter().position(|&b| b == 0x66)?;
                p.prefixes.copy_within(at + 1..n, at);
                p.prefix_count -= 1;
            }
        }
        Some(p)
    }

    /// The immediate bytes of this encoding.
    pub fn imm<'a>(&self, bytes: &'a [u8]) -> &'a [u8] {
        &bytes[self.imm_at as usize..self.length as usize]
    }

    pub fn modrm(&self) -> Option<u8> {
        self.modrm
    }
}

/// A memory operand in host registers: `[base + index + disp]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mem {
    pub base: u8,
    pub index: Option<u8>,
    pub disp: i32,
}

/// Registers to write instead of the guest's; None keeps the encoding's own.
#[derive(Clone, Copy, Default, Debug)]
pub struct Renamed {
    pub reg: Option<u8>,
    pub rm: Option<u8>,
    pub vvvv: Option<u8>,
    pub opcode: Option<u8>,
    pub mem: Option<Mem>,
    /// Memory operand becomes `gs:[offset]`.
    pub gs: Option<u32>,
}

/// Write the instruction `p` (found in `bytes`) with registers renamed.
pub fn encode(p: &Parts, bytes: &[u8], r: &Renamed, out: &mut Vec<u8>) {
    if r.gs.is_some() {
        out.push(0x65);
    }
    out.extend_from_slice(&p.prefixes[..p.prefix_count as usize]);
    let m = p.modrm.unwrap_or(0);
    let mut low_reg = (m >> 3) & 7;
    let mut low_rm = m & 7;
    // X and B of the memory form or of the register form.
    let mem_xb =
        r.mem.map(|m| (m.index.is_some_and(|i| i >= 8), m.base >= 8)).or(r.gs.map(|_| (false, false)));
    if let Some(n) = r.reg {
        low_reg = n & 7;
    }
    if let Some(n) = r.rm {
        low_rm = n & 7;
    }
    let mut op = p.opcode;
    match p.form {
        Form::Legacy => {
            let mut rex = p.payload[0];
            let mut set = |bit: u8, on: bool| rex = (rex & !bit) | if on { bit } else { 0 };
            if let Some(n) = r.reg {
                set(4, n >= 8);
            }
            if let Some(n) = r.rm.or(r.opcode) {
                set(1, n >= 8);
            }
            if let Some((x, b)) = mem_xb {
                set(2, x);
                set(1, b);
            }
            if rex & 0xf != 0 {
                rex |= 0x40;
            }
            if rex != 0 {
                out.push(rex);
            }
            if let Some(n) = r.opcode {
                let last = p.opcode_len as usize - 1;
                op[last] = (op[last] & !7) | (n & 7);
            }
            out.extend_from_slice(&op[..p.opcode_len as usize]);
        }
        Form::Vex | Form::Evex => {
            let mut v = p.payload;
            let mut set = |i: usize, bit: u8, on: bool| v[i] = (v[i] & !bit) | if on { 0 } else { bit };
            if let Some(n) = r.reg {
                set(0, 0x80, n >= 8);
                if p.form == Form::Evex {
                    set(0, 0x10, false);
                }
            }
            if let Some(n) = r.rm {
                set(0, 0x20, n >= 8);
                if p.form == Form::Evex {
                    set(0, 0x40, false);
                }
            }
            if let Some((x, b)) = mem_xb {
                set(0, 0x40, x);
                set(0, 0x20, b);
            }
            if let Some(n) = r.vvvv {
                v[1] = (v[1] & !0x78) | ((!n & 15) << 3);
                if p.form == Form::Evex {
                    v[2] |= 8;
                }
            }
            match p.form {
                Form::Vex => out.extend_from_slice(&[p.lead, v[0], v[1], op[0]]),
                _ => out.extend_from_slice(&[0x62, v[0], v[1], v[2], op[0]]),
            }
        }
    }
    if let Some(m) = p.modrm {
        let reg = low_reg << 3;
        if let Some(Mem { base, index, disp }) = r.mem {
            // A base of r12 or rsp needs an index, be it none, rbp and r13 a displacement.
            let index = index.or((base & 7 == 4).then_some(4));
            // EVEX scales byte displacements; write those whole.
            let (mode, bytes) = match disp {
                0 if base & 7 != 5 => (0, 0),
                -128..=127 if p.form != Form::Evex => (0x40, 1),
                _ => (0x80, 4),
            };
            match index {
                Some(i) => out.extend_from_slice(&[mode | reg | 4, ((i & 7) << 3) | (base & 7)]),
                None => out.push(mode | reg | (base & 7)),
            }
            out.extend_from_slice(&disp.to_le_bytes()[..bytes]);
        } else if let Some(off) = r.gs {
            out.extend_from_slice(&[reg | 4, 0x25]);
            out.extend_from_slice(&off.to_le_bytes());
        } else if m >> 6 == 3 {
            out.push(0xc0 | reg | low_rm);
        } else {
            unreachable!("memory operand kept");
        }
    }
    out.extend_from_slice(p.imm(bytes));
    if p.short_register {
        if let Some(last) = out.last_mut() {
            *last &= 0x7f;
        }
    }
}

/// What is the same for every instruction of one `Code`.
#[derive(Clone, Copy, Default, Debug)]
pub struct Shape {
    known: bool,
    /// Operand index + 1 of general registers by encoding field, 0 if none.
    pub reg: u8,
    pub rm: u8,
    pub vvvv: u8,
    pub opcode: u8,
    /// The memory operand is an index vector (gather, scatter).
    pub vsib: bool,
}

thread_local! {
    static SHAPES: RefCell<Vec<Shape>> = RefCell::new(vec![Shape::default(); Code::values().len()]);
}

/// The shape of `code`.
pub fn shape(code: Code) -> Shape {
    SHAPES.with(|s| {
        let slot = &mut s.borrow_mut()[code as usize];
        if !slot.known {
            let mut n = Shape { known: true, ..Shape::default() };
            let op = code.op_code();
            for i in 0..op.op_count() {
                let at = i as u8 + 1;
                match op.op_kind(i) {
                    K::r8_reg
                    | K::r16_reg
                    | K::r16_reg_mem
                    | K::r32_reg
                    | K::r32_reg_mem
                    | K::r64_reg
                    | K::r64_reg_mem => n.reg = at,
                    K::r8_or_mem
                    | K::r16_or_mem
                    | K::r32_or_mem
                    | K::r32_or_mem_mpx
                    | K::r64_or_mem
                    | K::r64_or_mem_mpx
                    | K::r16_rm
                    | K::r32_rm
                    | K::r64_rm => n.rm = at,
                    K::r32_vvvv | K::r64_vvvv => n.vvvv = at,
                    K::r8_opcode | K::r16_opcode | K::r32_opcode | K::r64_opcode => n.opcode = at,
                    K::mem_vsib32x
                    | K::mem_vsib64x
                    | K::mem_vsib32y
                    | K::mem_vsib64y
                    | K::mem_vsib32z
                    | K::mem_vsib64z => n.vsib = true,
                    _ => {}
                }
            }
            *slot = n;
        }
        *slot
    })
}

/// Encoding number of a general register of any size, and whether it is a high byte.
pub fn gpr_number(r: Register) -> Option<(u8, bool)> {
    if !r.is_gpr() {
        return None;
    }
    if (Register::AH..=Register::BH).contains(&r) {
        return Some((r as u8 - Register::AH as u8, true));
    }
    Some((r.full_register() as u8 - Register::RAX as u8, false))
}

/// True if the access reads the operand.
pub fn reads(a: OpAccess) -> bool {
    !matches!(a, OpAccess::Write | OpAccess::None | OpAccess::NoMemAccess)
}

/// True if the access may write the operand.
pub fn writes(a: OpAccess) -> bool {
    matches!(a, OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite)
}

/// A decoder that reads `bytes` at `va` as the host's processor does: vendors
/// differ in what operand-size prefixes mean to branches.
pub fn decoder(bytes: &[u8], bits: u32, va: u64) -> Decoder<'_> {
    let options = if crate::host::amd() { DecoderOptions::AMD } else { DecoderOptions::NONE };
    Decoder::with_ip(bits, bytes, va, options)
}

/// Decode one instruction at `va`.
pub fn decode(bytes: &[u8], bits: u32, va: u64) -> Instruction {
    exchange(decoder(bytes, bits, va).decode(), bytes)
}

/// F3 90 with REX.B exchanges r8 with rax, while iced-x86 sees a PAUSE. `bytes`
/// start with the instruction.
pub fn exchange(mut i: Instruction, bytes: &[u8]) -> Instruction {
    if i.code() != Code::Pause || i.len() < 3 {
        return i;
    }
    let rex = bytes[i.len() - 2];
    if rex & 0xf1 == 0x41 {
        let narrow = bytes[..i.len()].contains(&0x66);
        let (code, r8, rax) = match (rex & 8 != 0, narrow) {
            (true, _) => (Code::Xchg_r64_RAX, Register::R8, Register::RAX),
            (_, true) => (Code::Xchg_r16_AX, Register::R8W, Register::AX),
            _ => (Code::Xchg_r32_EAX, Register::R8D, Register::EAX),
        };
        i.set_code(code);
        i.set_has_rep_prefix(false);
        i.set_op0_kind(OpKind::Register);
        i.set_op1_kind(OpKind::Register);
        i.set_op0_register(r8);
        i.set_op1_register(rax);
    }
    i
}

/// The first instruction of `code`, which lies at `ip` in code of `bits`, as text, and
/// its length in bytes.
pub fn disassemble(code: &[u8], bits: u32, ip: u64) -> (String, usize) {
    let i = decode(code, bits, ip);
    if i.code() == Code::INVALID {
        return ("(bad)".into(), 1);
    }
    (i.to_string(), i.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Renaming nothing but the memory operand must decode back to the same instruction.
    #[test]
    fn encodings_survive() {
        let cases: &[&[u8]] = &[
            &[0x48, 0x8b, 0x44, 0x24, 0x08],
            &[0x66, 0x0f, 0x6f, 0x07],
            &[0xf2, 0x0f, 0x10, 0x05, 1, 0, 0, 0],
            &[0xc5, 0xfd, 0x6f, 0x06],
            &[0xc4, 0xe2, 0x7d, 0x18, 0x07],
            &[0x62, 0xf1, 0xfe, 0x48, 0x6f, 0x46, 0x01],
            &[0x81, 0x04, 0x25, 0, 0x10, 0, 0, 0x78, 0x56, 0x34, 0x12],
            &[0xf0, 0x48, 0x0f, 0xc7, 0x0e],
        ];
        for bytes in cases {
            let i = decode(bytes, 64, 0);
            assert_eq!(i.len(), bytes.len(), "{bytes:x?}");
            let p = Parts::new(bytes, 64).unwrap();
            let mut out = Vec::new();
            let to = Renamed { mem: Some(Mem { base: 10, index: Some(9), disp: 0 }), ..Default::default() };
            encode(&p, bytes, &to, &mut out);
            let j = decode(&out, 64, 0);
            assert_eq!(j.code(), i.code(), "{bytes:x?} {out:x?}");
            assert_eq!(j.memory_base(), Register::R10);
            assert_eq!(j.memory_index(), Register::R9);
            assert_eq!(j.len(), out.len());
            assert_eq!(j.op_kind(0), i.op_kind(0));
            if i.op0_register() != Register::None {
                assert_eq!(j.op0_register(), i.op0_register());
            }
        }
    }
}
