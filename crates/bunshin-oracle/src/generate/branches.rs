//! Branches in shapes that are known to end: forward jumps over a few
//! instructions, calls with and without their return, counted loops, jumps
//! through registers and memory. Targets lie inside the case.
use super::operands::register;
use super::Block;
use crate::arena::{DATA, DATA_LENGTH};
use iced_x86::{Code, Instruction, MemoryOperand, Register};

impl Block<'_> {
    /// Add one branching shape.
    pub(super) fn branch(&mut self) {
        if self.generator.narrow {
            return match self.random.below(9) {
                0..=3 => self.conditional(),
                4 => self.jump_over(),
                5 => self.counted_loop(),
                6 => self.counter_branch(),
                7 => self.push(vec![0xe8, 0, 0, 0, 0]),
                _ => self.direct_function(),
            };
        }
        match self.random.below(15) {
            0..=3 => self.conditional(),
            4 => self.jump_over(),
            5 => self.counted_loop(),
            6 => self.counter_branch(),
            7 => self.call_next(),
            8 | 9 => self.function(),
            10 => self.indirect(),
            11 => self.through_memory(),
            12 | 13 => self.walk(),
            _ => self.push_and_return(),
        }
    }

    /// Fill an instruction's place later: emit `placeholder`, run `body`, then
    /// put in what `finish` makes of (own address, address after the body).
    pub(super) fn around(
        &mut self,
        placeholder: usize,
        body: impl FnOnce(&mut Self),
        finish: impl FnOnce(u64, u64) -> Vec<u8>,
    ) {
        let (slot, at) = (self.code.len(), self.rip);
        self.push(vec![0x90; placeholder]);
        body(self);
        let bytes = finish(at, self.rip);
        debug_assert_eq!(bytes.len(), placeholder);
        self.code[slot] = bytes;
    }

    fn body(&mut self) {
        for _ in 0..self.random.below(4) {
            self.plain();
        }
    }

    fn conditional(&mut self) {
        let condition = self.random.below(16) as u8;
        if self.random.one_in(2) {
            self.around(2, Self::body, |at, end| vec![0x70 | condition, (end - at - 2) as u8]);
        } else {
            self.around(6, Self::body, |at, end| {
                let mut bytes = vec![0x0f, 0x80 | condition];
                bytes.extend(((end - at - 6) as u32).to_le_bytes());
                bytes
            });
        }
    }

    fn jump_over(&mut self) {
        if self.random.one_in(2) {
            self.around(2, Self::body, |at, end| vec![0xeb, (end - at - 2) as u8]);
        } else {
            self.around(5, Self::body, |at, end| near(0xe9, at, end));
        }
    }

    /// MOV ECX, n; body; LOOP, or DEC ECX; JNZ.
    fn counted_loop(&mut self) {
        if self.reserved.contains(&1) {
            return self.plain();
        }
        let count = 1 + self.random.below(20) as u32;
        let mut bytes = vec![0xb9];
        bytes.extend(count.to_le_bytes());
        self.push(bytes);
        let top = self.rip;
        self.reserved.push(1);
        for _ in 0..1 + self.random.below(3) {
            self.plain();
        }
        self.reserved.pop();
        match self.random.below(3) {
            0 => self.push(vec![0xe2, 0]),
            // With an address-size prefix the counter is ECX.
            1 => self.push(vec![0x67, 0xe2, 0]),
            _ => {
                self.push(vec![0xff, 0xc9]);
                self.push(vec![0x75, 0]);
            }
        }
        let back = top.wrapping_sub(self.rip) as u8;
        if let Some(last) = self.code.last_mut() {
            *last.last_mut().unwrap() = back;
        }
    }

    /// LOOPNE, LOOPE, LOOP, JRCXZ forward.
    fn counter_branch(&mut self) {
        let opcode = 0xe0 + self.random.below(4) as u8;
        if self.random.one_in(4) {
            self.around(3, Self::body, |at, end| vec![0x67, opcode, (end - at - 3) as u8]);
        } else {
            self.around(2, Self::body, |at, end| vec![opcode, (end - at - 2) as u8]);
        }
    }

    /// CALL to the next instruction and POP: how old code reads rip.
    fn call_next(&mut self) {
        self.push(vec![0xe8, 0, 0, 0, 0]);
        if self.random.percent(80) {
            let number = self.scratch() as u8;
            let pop = vec![0x58 | (number & 7)];
            self.push(if number >= 8 { [vec![0x41], pop].concat() } else { pop });
        }
    }

    /// CALL f; JMP end; f: body; RET; end.
    fn function(&mut self) {
        let indirect = self.random.one_in(3).then(|| self.scratch());
        self.function_with(indirect)
    }

    fn direct_function(&mut self) {
        self.function_with(None)
    }

    fn function_with(&mut self, indirect: Option<u64>) {
        let pops = self.random.pick(&[0u16, 0, 0, 8, 16, 3]);
        match indirect {
            None => self.push(vec![0xe8, 5, 0, 0, 0]),
            Some(number) => {
                let length: u64 = if number >= 8 { 3 } else { 2 };
                self.load_address(number, self.rip + 7 + length + 5);
                let call = vec![0xff, 0xd0 | (number as u8 & 7)];
                self.push(if number >= 8 { [vec![0x41], call].concat() } else { call });
            }
        }
        self.around(
            5,
            |block| {
                block.body();
                if pops == 0 {
                    block.push(vec![0xc3]);
                } else {
                    block.push(vec![0xc2, pops as u8, 0]);
                }
            },
            |at, end| near(0xe9, at, end),
        );
    }

    /// LEA r, [rip + n]; JMP r, over a body.
    fn indirect(&mut self) {
        let number = self.scratch();
        let lea = self.code.len();
        let at = self.rip;
        self.load_address(number, at);
        let jump = vec![0xff, 0xe0 | (number as u8 & 7)];
        self.push(if number >= 8 { [vec![0x41], jump].concat() } else { jump });
        self.body();
        let distance = (self.rip - at - 7) as u32;
        let length = self.code[lea].len();
        self.code[lea][length - 4..].copy_from_slice(&distance.to_le_bytes());
    }

    /// JMP or CALL [rip + n], the address in the data.
    fn through_memory(&mut self) {
        let slot = DATA + self.random.below(DATA_LENGTH / 8 - 1) * 8;
        let code = if self.random.percent(70) { Code::Jmp_rm64 } else { Code::Call_rm64 };
        let memory = MemoryOperand::with_base_displ(Register::RIP, slot as i64);
        let Ok(instruction) = Instruction::with1(code, memory) else { return };
        if !self.encode(&instruction) {
            return;
        }
        self.body();
        let target = self.rip;
        self.patches.push((slot, target.to_le_bytes().to_vec()));
    }

    /// LEA r, [rip + n]; PUSH r; RET.
    fn push_and_return(&mut self) {
        let number = self.scratch();
        let length = if number >= 8 { 2 } else { 1 };
        self.load_address(number, self.rip + 7 + length + 1);
        let push = vec![0x50 | (number as u8 & 7)];
        self.push(if number >= 8 { [vec![0x41], push].concat() } else { push });
        self.push(vec![0xc3]);
    }

    /// A register to hold a branch target: no pointer, not reserved.
    fn scratch(&mut self) -> u64 {
        loop {
            let number = self.random.below(16);
            let taken = self.roles.pointers.contains(&(number as usize));
            if !taken && !self.reserved.contains(&(number as usize)) {
                return number;
            }
        }
    }

    /// LEA r64, [rip + n]: always 7 bytes.
    fn load_address(&mut self, number: u64, target: u64) {
        let memory = MemoryOperand::with_base_displ(Register::RIP, target as i64);
        if let Ok(lea) = Instruction::with2(Code::Lea_r64_m, register(Register::RAX, number), memory) {
            self.encode(&lea);
        }
    }
}

fn near(opcode: u8, at: u64, end: u64) -> Vec<u8> {
    let mut bytes = vec![opcode];
    bytes.extend(((end - at - 5) as u32).to_le_bytes());
    bytes
}
