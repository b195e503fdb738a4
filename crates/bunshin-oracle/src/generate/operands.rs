//! Fills an encoding's operands: registers, memory in every addressing form,
//! immediates, prefixes, EVEX decorations. The encoder refuses some
//! combinations (AH with REX, say); the caller draws again.
use super::registers::{pointer, Roles};
use crate::arena::{DATA, DATA_LENGTH};
use crate::random::Random;
use iced_x86::{Code, Instruction, OpCodeOperandKind as K, OpKind, Register, RoundingControl};

const GPR64: Register = Register::RAX;
const GPR32: Register = Register::EAX;
const GPR16: Register = Register::AX;

/// Byte registers as `number` 0..15 selects them with REX.
const GPR8: [Register; 16] = [
    Register::AL,
    Register::CL,
    Register::DL,
    Register::BL,
    Register::SPL,
    Register::BPL,
    Register::SIL,
    Register::DIL,
    Register::R8L,
    Register::R9L,
    Register::R10L,
    Register::R11L,
    Register::R12L,
    Register::R13L,
    Register::R14L,
    Register::R15L,
];

/// Fills operands for one case.
pub struct Operands<'a> {
    /// Source of choices.
    pub random: &'a mut Random,
    /// Which registers hold pointers.
    pub roles: &'a Roles,
    /// Registers that must not be operands (loop counters).
    pub reserved: &'a [usize],
    /// Address of the instruction.
    pub rip: u64,
    /// 32-bit code.
    pub narrow: bool,
}

struct Drawn {
    memory: bool,
    address_size: u32,
    rex_free: bool,
    destination: bool,
}

impl Operands<'_> {
    /// One instruction of this encoding.
    pub fn fill(&mut self, code: Code) -> Instruction {
        let info = code.op_code();
        let mut instruction = Instruction::default();
        instruction.set_code(code);
        let mut drawn = Drawn {
            memory: false,
            address_size: if self.narrow || self.random.one_in(25) { 4 } else { 8 },
            rex_free: self.narrow || self.random.one_in(3),
            destination: false,
        };
        let mut immediate = 0;
        for (i, kind) in info.op_kinds().iter().enumerate() {
            drawn.destination = i == 0;
            self.operand(&mut instruction, i as u32, *kind, &mut drawn, &mut immediate);
        }
        if drawn.memory && info.can_use_lock_prefix() && self.random.one_in(4) {
            instruction.set_has_lock_prefix(true);
        }
        if info.can_use_rep_prefix() && self.random.one_in(2) {
            instruction.set_has_rep_prefix(true);
        } else if info.can_use_repne_prefix() && self.random.one_in(3) {
            instruction.set_has_repne_prefix(true);
        }
        self.decorate(&mut instruction, drawn.memory);
        instruction
    }

    fn decorate(&mut self, instruction: &mut Instruction, memory: bool) {
        let info = instruction.code().op_code();
        if info.require_op_mask_register() || (info.can_use_op_mask_register() && self.random.percent(60)) {
            instruction.set_op_mask(register(Register::K0, 1 + self.random.below(7)));
            let store = memory && instruction.op0_kind() == OpKind::Memory;
            if info.can_use_zeroing_masking() && !store && self.random.one_in(2) {
                instruction.set_zeroing_masking(true);
            }
        }
        if memory {
            if info.can_broadcast() && self.random.one_in(3) {
                instruction.set_is_broadcast(true);
            }
        } else if info.can_use_rounding_control() && self.random.one_in(4) {
            instruction.set_rounding_control(self.random.pick(&[
                RoundingControl::RoundToNearest,
                RoundingControl::RoundDown,
                RoundingControl::RoundUp,
                RoundingControl::RoundTowardZero,
            ]));
        } else if info.can_suppress_all_exceptions() && self.random.one_in(4) {
            instruction.set_suppress_all_exceptions(true);
        }
    }

    fn operand(&mut self, to: &mut Instruction, i: u32, kind: K, drawn: &mut Drawn, immediate: &mut u32) {
        match kind {
            K::r8_or_mem
            | K::r16_or_mem
            | K::r32_or_mem
            | K::r64_or_mem
            | K::mm_or_mem
            | K::xmm_or_mem
            | K::ymm_or_mem
            | K::zmm_or_mem
            | K::k_or_mem
                if self.random.percent(50) =>
            {
                self.memory(to, i, drawn);
            }
            K::mem
            | K::mem_mib
            | K::mem_vsib32x
            | K::mem_vsib64x
            | K::mem_vsib32y
            | K::mem_vsib64y
            | K::mem_vsib32z
            | K::mem_vsib64z => {
                self.memory(to, i, drawn);
                let first = match kind {
                    K::mem_vsib32x | K::mem_vsib64x => Register::XMM0,
                    K::mem_vsib32y | K::mem_vsib64y => Register::YMM0,
                    K::mem_vsib32z | K::mem_vsib64z => Register::ZMM0,
                    _ => return,
                };
                self.vector_index(to, first, drawn);
            }
            K::mem_offs => {
                to.set_op_kind(i, OpKind::Memory);
                to.set_memory_displ_size(drawn.address_size);
                to.set_memory_displacement64(DATA + self.random.below(DATA_LENGTH - 16));
                self.segment(to);
                drawn.memory = true;
            }
            K::seg_rSI | K::es_rDI | K::seg_rDI | K::seg_rBX_al => self.string(to, i, kind, drawn),
            K::imm4_m2z
            | K::imm8
            | K::imm8_const_1
            | K::imm8sex16
            | K::imm8sex32
            | K::imm8sex64
            | K::imm16
            | K::imm32
            | K::imm32sex64
            | K::imm64 => {
                self.immediate(to, i, kind, *immediate);
                *immediate += 1;
            }
            _ => {
                let register = self.register(kind, drawn);
                to.set_op_kind(i, OpKind::Register);
                to.set_op_register(i, register);
            }
        }
    }

    /// A general register number; destinations mostly spare the pointers.
    fn number(&mut self, drawn: &Drawn) -> u64 {
        loop {
            let n = self.random.below(if drawn.rex_free { 8 } else { 16 });
            let pointer = self.roles.pointers.contains(&(n as usize));
            let spared = pointer && drawn.destination && self.random.percent(if n == 4 { 98 } else { 93 });
            if !spared && !self.reserved.contains(&(n as usize)) {
                return n;
            }
        }
    }

    fn byte_register(&mut self, drawn: &Drawn) -> Register {
        if self.random.percent(if self.narrow { 50 } else { 30 }) {
            let number = self.random.below(4);
            if !self.reserved.contains(&(number as usize)) {
                return register(Register::AH, number);
            }
        }
        GPR8[self.number(drawn) as usize]
    }

    fn register(&mut self, kind: K, drawn: &Drawn) -> Register {
        let narrow = self.narrow;
        let vector = |random: &mut Random, first: Register, aligned: bool| {
            let (count, _) = crate::state::Xsave::shape();
            let n = if narrow || random.one_in(2) { random.below(8) } else { random.below(count as u64) };
            register(first, if aligned { n & !3 } else { n })
        };
        match kind {
            K::r8_or_mem | K::r8_reg | K::r8_opcode => self.byte_register(drawn),
            K::r16_or_mem | K::r16_reg | K::r16_reg_mem | K::r16_rm | K::r16_opcode => {
                register(GPR16, self.number(drawn))
            }
            K::r32_or_mem | K::r32_reg | K::r32_reg_mem | K::r32_rm | K::r32_opcode | K::r32_vvvv => {
                register(GPR32, self.number(drawn))
            }
            K::r64_or_mem | K::r64_reg | K::r64_reg_mem | K::r64_rm | K::r64_opcode | K::r64_vvvv => {
                register(GPR64, self.number(drawn))
            }
            K::mm_or_mem | K::mm_reg | K::mm_rm => register(Register::MM0, self.random.below(8)),
            K::k_or_mem | K::k_reg | K::k_rm | K::k_vvvv => register(Register::K0, self.random.below(8)),
            K::kp1_reg => register(Register::K0, self.random.below(4) * 2),
            K::xmm_or_mem | K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 | K::xmm_is5 => {
                vector(self.random, Register::XMM0, false)
            }
            K::ymm_or_mem | K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 | K::ymm_is5 => {
                vector(self.random, Register::YMM0, false)
            }
            K::zmm_or_mem | K::zmm_reg | K::zmm_rm | K::zmm_vvvv => {
                vector(self.random, Register::ZMM0, false)
            }
            K::xmmp3_vvvv => vector(self.random, Register::XMM0, true),
            K::zmmp3_vvvv => vector(self.random, Register::ZMM0, true),
            K::cr_reg => register(Register::CR0, self.random.pick(&[0, 2, 3, 4, 8])),
            K::dr_reg => register(Register::DR0, self.random.below(8)),
            K::al => Register::AL,
            K::cl => Register::CL,
            K::ax => Register::AX,
            K::dx => Register::DX,
            K::eax => Register::EAX,
            K::rax => Register::RAX,
            K::st0 => Register::ST0,
            K::sti_opcode => register(Register::ST0, self.random.below(8)),
            _ => Register::None,
        }
    }

    fn segment(&mut self, to: &mut Instruction) {
        // Null FS and GS, stores through CS: neither is modelled.
        if self.narrow {
            return;
        }
        match self.random.below(100) {
            0..=1 => to.set_segment_prefix(Register::FS),
            2..=3 => to.set_segment_prefix(Register::GS),
            4 => to.set_segment_prefix(self.random.pick(&[
                Register::DS,
                Register::ES,
                Register::SS,
                Register::CS,
            ])),
            _ => {}
        }
    }

    fn string(&mut self, to: &mut Instruction, i: u32, kind: K, drawn: &mut Drawn) {
        let wide = drawn.address_size == 8;
        to.set_op_kind(
            i,
            match (kind, wide) {
                (K::seg_rSI, true) => OpKind::MemorySegRSI,
                (K::seg_rSI, false) => OpKind::MemorySegESI,
                (K::es_rDI, true) => OpKind::MemoryESRDI,
                (K::es_rDI, false) => OpKind::MemoryESEDI,
                (K::seg_rDI, true) => OpKind::MemorySegRDI,
                (K::seg_rDI, false) => OpKind::MemorySegEDI,
                _ => OpKind::Memory,
            },
        );
        if kind == K::seg_rBX_al {
            to.set_memory_base(if wide { Register::RBX } else { Register::EBX });
            to.set_memory_index(Register::AL);
        }
        if kind != K::es_rDI {
            self.segment(to);
        }
    }

    fn memory(&mut self, to: &mut Instruction, i: u32, drawn: &mut Drawn) {
        drawn.memory = true;
        to.set_op_kind(i, OpKind::Memory);
        self.segment(to);
        let size = (to.code().op_code().memory_size().size() as u64).max(1);
        let form = self.random.below(20);
        match if self.narrow && form < 2 { 2 } else { form } {
            0 | 1 => {
                // Relative to rip; sometimes the code itself.
                let target = match self.random.below(30) {
                    0 => self.rip + self.random.below(64),
                    1 => pointer(self.random) & 0xffff_ffff,
                    _ => DATA + self.random.below(DATA_LENGTH / size - 1) * size,
                };
                let wide = drawn.address_size == 8;
                to.set_memory_base(if wide { Register::RIP } else { Register::EIP });
                to.set_memory_displ_size(drawn.address_size);
                to.set_memory_displacement64(target);
            }
            2 => {
                to.set_memory_displ_size(drawn.address_size);
                to.set_memory_displacement64(DATA + self.random.below(DATA_LENGTH / size - 1) * size);
                if self.random.one_in(2) {
                    self.index(to, drawn);
                }
            }
            form => {
                let base = if self.random.percent(97) {
                    self.random.pick(&self.roles.pointers) as u64
                } else {
                    self.random.below(if self.narrow { 8 } else { 16 })
                };
                to.set_memory_base(register(if drawn.address_size == 8 { GPR64 } else { GPR32 }, base));
                if form < 9 {
                    self.index(to, drawn);
                }
                self.displacement(to, size, drawn);
            }
        }
    }

    fn displacement(&mut self, to: &mut Instruction, size: u64, drawn: &Drawn) {
        let wide = drawn.address_size;
        let (length, value): (u32, i64) = match self.random.below(16) {
            0..=7 => (0, 0),
            8 | 9 => (self.random.pick(&[1, wide]), 0),
            10..=12 => {
                let steps = self.random.below(9) as i64 - 4;
                (self.random.pick(&[1, wide]), steps * size as i64)
            }
            13 | 14 => (1, self.random.next() as i8 as i64),
            _ => (wide, self.random.below(0x2000) as i64 - 0x1000),
        };
        to.set_memory_displ_size(length);
        let value = if wide == 8 { value as u64 } else { u64::from(value as u32) };
        to.set_memory_displacement64(value);
    }

    fn index(&mut self, to: &mut Instruction, drawn: &Drawn) {
        let number = if self.random.percent(96) {
            self.random.pick(&self.roles.indexes) as u64
        } else {
            self.random.below(if self.narrow { 8 } else { 16 })
        };
        if number != 4 {
            to.set_memory_index(register(if drawn.address_size == 8 { GPR64 } else { GPR32 }, number));
            to.set_memory_index_scale(self.random.pick(&[1, 2, 4, 8]));
        }
    }

    fn vector_index(&mut self, to: &mut Instruction, first: Register, drawn: &Drawn) {
        if matches!(to.memory_base(), Register::RIP | Register::EIP | Register::None) {
            let base = self.random.pick(&self.roles.pointers) as u64;
            to.set_memory_base(register(if drawn.address_size == 8 { GPR64 } else { GPR32 }, base));
            to.set_memory_displ_size(0);
            to.set_memory_displacement64(0);
        }
        let number = if self.random.percent(96) {
            self.random.pick(&self.roles.vector_indexes) as u64
        } else {
            self.random.below(if self.narrow { 8 } else { 16 })
        };
        to.set_memory_index(register(first, number));
        to.set_memory_index_scale(self.random.pick(&[1, 2, 4, 8]));
    }

    fn immediate(&mut self, to: &mut Instruction, i: u32, kind: K, earlier: u32) {
        let value = self.random.integer();
        let enter = matches!(to.code(), Code::Enterw_imm16_imm8 | Code::Enterq_imm16_imm8);
        match kind {
            K::imm8_const_1 => {
                to.set_op_kind(i, OpKind::Immediate8);
                to.set_immediate8(1);
            }
            K::imm4_m2z => {
                to.set_op_kind(i, OpKind::Immediate8);
                to.set_immediate8(value as u8 & 3);
            }
            K::imm8 if earlier > 0 => {
                to.set_op_kind(i, OpKind::Immediate8_2nd);
                to.set_immediate8_2nd(if enter { (value & 3) as u8 } else { value as u8 });
            }
            K::imm8 => {
                to.set_op_kind(i, OpKind::Immediate8);
                to.set_immediate8(value as u8);
            }
            K::imm8sex16 => {
                to.set_op_kind(i, OpKind::Immediate8to16);
                to.set_immediate8to16(value as i8 as i16);
            }
            K::imm8sex32 => {
                to.set_op_kind(i, OpKind::Immediate8to32);
                to.set_immediate8to32(value as i8 as i32);
            }
            K::imm8sex64 => {
                to.set_op_kind(i, OpKind::Immediate8to64);
                to.set_immediate8to64(i64::from(value as i8));
            }
            K::imm16 => {
                to.set_op_kind(i, OpKind::Immediate16);
                to.set_immediate16(if enter { (value & 0x3f) as u16 } else { value as u16 });
            }
            K::imm32 => {
                to.set_op_kind(i, OpKind::Immediate32);
                to.set_immediate32(value as u32);
            }
            K::imm32sex64 => {
                to.set_op_kind(i, OpKind::Immediate32to64);
                to.set_immediate32to64(i64::from(value as i32));
            }
            _ => {
                to.set_op_kind(i, OpKind::Immediate64);
                to.set_immediate64(value);
            }
        }
    }
}

/// The register `number` places after `first`.
pub fn register(first: Register, number: u64) -> Register {
    first + number as u32
}
