//! Loops that walk through memory: registers that only grow or shrink, operands that
//! they and constant registers address, page ends on the way, now and then the end
//! of what is mapped.
use super::operands::register;
use super::Block;
use crate::arena::{DATA, DATA_LENGTH};
use iced_x86::{Code, Instruction, MemoryOperand, Register};

/// Instructions with a memory operand, and whether it comes first.
const ACCESSES: [(Code, bool, Register); 16] = [
    (Code::Mov_r64_rm64, false, Register::RAX),
    (Code::Mov_rm64_r64, true, Register::RAX),
    (Code::Mov_rm32_r32, true, Register::EAX),
    (Code::Movzx_r32_rm8, false, Register::EAX),
    (Code::Sub_rm64_r64, true, Register::RAX),
    (Code::Add_r32_rm32, false, Register::EAX),
    (Code::Adc_r64_rm64, false, Register::RAX),
    (Code::Xor_rm16_r16, true, Register::AX),
    (Code::Imul_r64_rm64, false, Register::RAX),
    (Code::Cmp_rm32_r32, true, Register::EAX),
    (Code::Cmovb_r64_rm64, false, Register::RAX),
    (Code::Movups_xmm_xmmm128, false, Register::XMM0),
    (Code::Movups_xmmm128_xmm, true, Register::XMM0),
    (Code::Paddd_xmm_xmmm128, false, Register::XMM0),
    (Code::VEX_Vmovups_ymm_ymmm256, false, Register::YMM0),
    (Code::VEX_Vmovups_ymmm256_ymm, true, Register::YMM0),
];

const STEPS: [i32; 14] = [1, 2, 4, 8, 8, 16, 16, 32, 64, 128, 760, 2048, 4096, 0x7000];

impl Block<'_> {
    /// MOV counter, n; body; DEC counter; JNZ body.
    pub(super) fn walk(&mut self) {
        let free: Vec<usize> =
            (0..16).filter(|r| !self.roles.pointers.contains(r) && !self.reserved.contains(r)).collect();
        let pointers: Vec<usize> =
            self.roles.pointers.iter().copied().filter(|r| *r != 4 && !self.reserved.contains(r)).collect();
        if free.len() < 4 || pointers.len() < 2 || self.generator.narrow {
            return self.plain();
        }
        let kept = self.reserved.len();
        let (counter, index) = (free[0], free[1]);
        let walker = self.random.pick(&pointers);
        self.reserved.extend([counter, index, walker]);
        let most = if self.random.one_in(3) { 400 } else { 40 };
        let count = 1 + self.random.below(most);
        self.constant(counter, count as i32);
        let start = [0, 0, 64, -64, -4096][self.random.below(5) as usize];
        self.constant(index, start);
        let top = self.rip;
        let walks_index = self.random.one_in(3);
        for _ in 0..1 + self.random.below(5) {
            match self.random.below(8) {
                0 => self.plain(),
                1 => self.step(walker),
                2 => {
                    // Some turns leave out an access or a step, or the rest of the loop.
                    let condition = 0x70 | self.random.below(16) as u8;
                    let steps = self.random.one_in(3);
                    self.around(
                        2,
                        |block| match steps {
                            true => block.step(walker),
                            false => block.access(walker, index, &pointers, &free[2..]),
                        },
                        |at, end| vec![condition, (end - at - 2) as u8],
                    );
                }
                _ => self.access(walker, index, &pointers, &free[2..]),
            }
        }
        if walks_index {
            self.step(index);
        }
        if self.random.percent(80) {
            self.step(walker);
        }
        self.reserved.truncate(kept);
        // Both forms have 3 bytes.
        let dec = if self.random.one_in(2) { Code::Dec_rm64 } else { Code::Sub_rm64_imm8 };
        let counter = register(Register::RAX, counter as u64);
        let last = match dec {
            Code::Dec_rm64 => Instruction::with1(dec, counter),
            _ => Instruction::with2(dec, counter, 1),
        };
        if let Ok(last) = last {
            self.encode(&last);
        }
        let mut back = vec![0x0f, 0x85];
        back.extend((top.wrapping_sub(self.rip + 6) as u32).to_le_bytes());
        self.push(back);
    }

    fn constant(&mut self, number: usize, value: i32) {
        let to = register(Register::RAX, number as u64);
        if let Ok(mov) = Instruction::with2(Code::Mov_rm64_imm32, to, value) {
            self.encode(&mov);
        }
    }

    /// Move a register by a constant.
    fn step(&mut self, number: usize) {
        let to = register(Register::RAX, number as u64);
        let by = self.random.pick(&STEPS);
        // Mostly in one direction, which the register's number decides.
        let by = if (number & 1 == 0) != self.random.one_in(12) { by } else { -by };
        let move_it = match self.random.below(4) {
            0 if by.abs() == 1 => {
                Instruction::with1(if by > 0 { Code::Inc_rm64 } else { Code::Dec_rm64 }, to)
            }
            0 | 1 => Instruction::with2(Code::Add_rm64_imm32, to, by),
            2 => Instruction::with2(Code::Sub_rm64_imm32, to, -by),
            _ => Instruction::with2(Code::Lea_r64_m, to, MemoryOperand::with_base_displ(to, by.into())),
        };
        if let Ok(move_it) = move_it {
            self.encode(&move_it);
        }
    }

    /// An access by what moves, by what stays, by both, or to a constant address.
    fn access(&mut self, walker: usize, index: usize, pointers: &[usize], data: &[usize]) {
        let (code, memory_first, kind) = self.random.pick(&ACCESSES);
        let of = |n: usize| register(Register::RAX, n as u64);
        let other = self.random.pick(pointers);
        let disp = self.random.below(160) as i64 - 40;
        let disp = if self.random.one_in(8) { disp * 40 } else { disp & !15 };
        let scale = self.random.pick(&[1u32, 2, 4, 8]);
        let memory = match self.random.below(8) {
            0..=3 => MemoryOperand::with_base_displ(of(walker), disp),
            4 => MemoryOperand::with_base_displ(of(other), disp),
            5 => MemoryOperand::with_base_index_scale_displ_size(of(other), of(index), scale, disp, 1),
            6 => MemoryOperand::with_base_index_scale_displ_size(of(walker), of(index), scale, disp, 1),
            _ => {
                let address = DATA + self.random.below(DATA_LENGTH / 8) * 8;
                MemoryOperand::with_displ(address, 8)
            }
        };
        let vector = matches!(kind, Register::XMM0 | Register::YMM0);
        let number = if vector { self.random.below(16) } else { self.random.pick(data) as u64 };
        let data = register(kind, number);
        let access = if memory_first {
            Instruction::with2(code, memory, data)
        } else {
            Instruction::with2(code, data, memory)
        };
        if let Ok(access) = access {
            self.encode(&access);
        }
    }
}
