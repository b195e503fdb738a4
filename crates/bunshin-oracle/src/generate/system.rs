//! What user mode may do with system state, in shapes that leave nothing
//! random behind: far branches and IRET to the same level, selectors, time and
//! random numbers that are overwritten at once, and instructions that end in
//! an exception.
use super::rewrite::sized;
use super::Block;
use crate::arena::{DATA, DATA_LENGTH};
use iced_x86::{Code, Instruction, MemoryOperand, Register};

/// Selectors of Linux's GDT, some that lie outside it, the LDT, null. The one
/// that holds the processor's number (78h) is not among them.
const SELECTORS: [u16; 20] = [
    0, 3, 0x10, 0x18, 0x20, 0x23, 0x28, 0x2b, 0x2b, 0x2b, 0x30, 0x33, 0x33, 0x40, 0x43, 0x60, 7, 0x100,
    0xfff8, 0xffff,
];

impl Block<'_> {
    /// Add one shape; true if it ends the case.
    pub(super) fn system(&mut self) -> bool {
        if self.random.one_in(5) {
            self.exception();
            return true;
        }
        match self.random.below(6) {
            0 | 1 => self.overwritten(),
            2 | 3 => self.selector(),
            4 => self.far_return(),
            _ if self.generator.narrow => self.far_return(),
            _ if self.random.one_in(2) => self.interrupt_return(),
            _ => self.far_through_memory(),
        }
        false
    }

    fn load(&mut self, number: u64, value: u32) {
        let mut bytes = if number >= 8 { vec![0x41] } else { Vec::new() };
        bytes.push(0xb8 | (number as u8 & 7));
        bytes.extend(value.to_le_bytes());
        self.push(bytes);
    }

    fn with(&mut self, instruction: Result<Instruction, iced_x86::IcedError>) {
        if let Ok(instruction) = instruction {
            self.encode(&instruction);
        }
    }

    fn any_register(&mut self) -> u64 {
        let below = if self.generator.narrow { 8 } else { 16 };
        self.free_register(below, &[4])
    }

    /// RDTSC, CPUID, RDRAND and their like, and MOVs over what they gave.
    fn overwritten(&mut self) {
        let one = self.any_register();
        let wide = if self.generator.narrow { 4 } else { 8 };
        let (code, spoiled): (Code, &[u64]) = match self.random.below(7) {
            0 => (Code::Rdtsc, &[0, 2]),
            1 => (Code::Rdtscp, &[0, 1, 2]),
            2 => (Code::Cpuid, &[0, 1, 2, 3]),
            3 => (Code::Rdrand_r64, &[]),
            4 => (Code::Rdseed_r32, &[]),
            5 => (Code::Rdpid_r64, &[]),
            _ => (Code::Xgetbv, &[0, 2]),
        };
        if spoiled.iter().any(|n| self.reserved.contains(&(*n as usize))) {
            return;
        }
        let code = match (code, self.generator.narrow) {
            (Code::Rdrand_r64, true) => Code::Rdrand_r32,
            (Code::Rdpid_r64, true) => Code::Rdpid_r32,
            (code, _) => code,
        };
        if !super::pool::host_runs(code, self.generator.narrow) {
            return;
        }
        if code == Code::Xgetbv {
            self.load(1, 0);
        }
        if code.op_code().op_count() == 1 {
            let size = if matches!(code, Code::Rdseed_r32) { 4 } else { wide };
            self.with(Instruction::with1(code, sized(size, one)));
            self.load(one, 0x55);
        } else {
            self.encode(&Instruction::with(code));
        }
        for number in spoiled {
            let value = self.random.next() as u32;
            self.load(*number, value);
        }
    }

    /// LAR, LSL, VERR, VERW, loads and stores of segment registers.
    fn selector(&mut self) {
        let (one, two) = (self.any_register(), self.any_register());
        let selector = self.random.pick(&SELECTORS);
        let narrow = self.generator.narrow;
        let size = self.random.pick(if narrow { &[2, 4] } else { &[2, 4, 8] });
        let mut segment =
            self.random.pick(&[Register::ES, Register::DS, Register::FS, Register::GS, Register::SS]);
        if self.random.one_in(4) {
            let store = match size {
                2 => Code::Mov_rm16_Sreg,
                4 => Code::Mov_r32m16_Sreg,
                _ => Code::Mov_r64m16_Sreg,
            };
            if self.random.one_in(4) {
                segment = Register::CS;
            }
            self.with(Instruction::with2(store, sized(size, one), segment));
            return;
        }
        // The upper half of the register counts for nothing.
        let noise = (self.random.next() as u32) << 16;
        self.load(one, u32::from(selector) | noise);
        let column = size.trailing_zeros() as usize - 1;
        let from = sized(size, one);
        match self.random.below(8) {
            0 => {
                let code = [Code::Lar_r16_rm16, Code::Lar_r32_r32m16, Code::Lar_r64_r64m16][column];
                self.with(Instruction::with2(code, sized(size, two), from));
            }
            1 => {
                let code = [Code::Lsl_r16_rm16, Code::Lsl_r32_r32m16, Code::Lsl_r64_r64m16][column];
                self.with(Instruction::with2(code, sized(size, two), from));
            }
            2 => self.with(Instruction::with1(Code::Verr_rm16, sized(2, one))),
            3 => self.with(Instruction::with1(Code::Verw_rm16, sized(2, one))),
            4 | 5 => {
                let code = [Code::Mov_Sreg_rm16, Code::Mov_Sreg_r32m16, Code::Mov_Sreg_r64m16][column];
                self.with(Instruction::with2(code, segment, from));
            }
            6 if !narrow => {
                self.push(if one >= 8 { vec![0x41, 0x50 | (one as u8 & 7)] } else { vec![0x50 | one as u8] });
                let code = if self.random.one_in(2) { Code::Popq_FS } else { Code::Popq_GS };
                let register = if code == Code::Popq_FS { Register::FS } else { Register::GS };
                self.with(Instruction::with1(code, register));
            }
            _ => {
                let slot = self.slot();
                let mut bytes = (self.random.next() as u32).to_le_bytes().to_vec();
                bytes.extend(selector.to_le_bytes());
                self.patches.push((slot, bytes));
                let code = self.random.pick(&[Code::Lfs_r32_m1632, Code::Lgs_r32_m1632, Code::Lss_r32_m1632]);
                let memory = MemoryOperand::with_displ(slot, if narrow { 4 } else { 8 });
                self.with(Instruction::with2(code, sized(4, two), memory));
            }
        }
    }

    fn slot(&mut self) -> u64 {
        DATA + self.random.below(DATA_LENGTH / 16) * 16
    }

    /// PUSH cs; PUSH address; RETF, to the next instruction.
    fn far_return(&mut self) {
        let one = self.any_register();
        let selector = if self.generator.narrow { 0x23 } else { 0x33 };
        let wide = !self.generator.narrow && self.random.one_in(2);
        let pops = self.random.pick(&[0u8, 0, 8]);
        let mut tail = Vec::new();
        if self.generator.narrow || wide {
            tail.push(vec![0x6a, selector]);
            tail.push(if one >= 8 { vec![0x41, 0x50 | (one as u8 & 7)] } else { vec![0x50 | one as u8] });
        } else {
            // Both as one quadword: SHL, OR, PUSH would change flags, so from memory.
            let slot = self.slot();
            let mut push = vec![0xff, 0x34, 0x25];
            push.extend((slot as u32).to_le_bytes());
            tail.push(push);
        }
        let mut back = if wide { vec![0x48] } else { Vec::new() };
        back.extend(if pops > 0 { vec![0xca, pops, 0] } else { vec![0xcb] });
        tail.push(back);
        let load = if one >= 8 { 6 } else { 5 };
        let end = self.rip + load + tail.iter().map(|b| b.len() as u64).sum::<u64>();
        self.load(one, end as u32);
        if let [0xff, 0x34, 0x25, a, b, c, d] = tail[0][..] {
            let value = end | u64::from(selector) << 32;
            let slot = u64::from(u32::from_le_bytes([a, b, c, d]));
            self.patches.push((slot, value.to_le_bytes().to_vec()));
        }
        self.push_all(&tail);
    }

    /// PUSH ss, rsp, rflags, cs, rip; IRETQ, to the next instruction.
    fn interrupt_return(&mut self) {
        let one = self.free_register(8, &[4]);
        let two = self.free_register(8, &[4, one]);
        let push = |number: u64| vec![0x50 | number as u8];
        // MOV one, rsp; MOV two, end
        let head = 3 + 5;
        let tail = [vec![0x6a, 0x2b], push(one), vec![0x9c], vec![0x6a, 0x33], push(two), vec![0x48, 0xcf]];
        let end = self.rip + head + tail.iter().map(|b| b.len() as u64).sum::<u64>();
        self.push(vec![0x48, 0x89, 0xe0 | one as u8]);
        self.load(two, end as u32);
        self.push_all(&tail);
    }

    /// JMP or CALL through a far pointer, to the next instruction.
    fn far_through_memory(&mut self) {
        let slot = self.slot();
        let code = if self.random.one_in(2) { Code::Jmp_m1632 } else { Code::Call_m1632 };
        let memory = MemoryOperand::with_displ(slot, 8);
        self.with(Instruction::with1(code, memory));
        let mut pointer = (self.rip as u32).to_le_bytes().to_vec();
        pointer.extend(0x33u16.to_le_bytes());
        self.patches.push((slot, pointer));
    }

    /// An instruction after which nothing runs.
    fn exception(&mut self) {
        // INT 80h is Linux's own, and changes rax.
        let number = Some(self.random.next() as u8).filter(|n| *n != 0x80).unwrap_or(0);
        let one = self.random.below(8);
        let mut ways: Vec<Vec<u8>> = vec![
            vec![0xcd, number],
            vec![0xcd, self.random.pick(&[3, 4, 0, 14])],
            vec![0x0f, 0x0b],
            vec![0x0f, 0xb9, 0xc0 | one as u8],
            vec![0x0f, 0xff, 0xc0 | one as u8],
            vec![0xf4],
        ];
        if self.generator.narrow {
            // INTO; BOUND of a register in memory.
            ways.push(vec![0xce]);
            let slot = self.slot() as u32;
            let mut bound = vec![0x62, 0x05 | (one as u8) << 3];
            bound.extend(slot.to_le_bytes());
            ways.push(bound);
        } else {
            ways.push(vec![0x0f, 0x05]);
        }
        let way = self.random.below(ways.len() as u64) as usize;
        let bytes = ways.swap_remove(way);
        self.push(bytes);
    }
}
