//! Instructions that write given bytes at a given place, in most ways that
//! x86 has: MOV, XCHG, CMPXCHG, locked arithmetic, strings in both directions,
//! PUSH and CALL, vectors whole and masked, x87. What they write comes from
//! immediates or from a slot in the data segment.
use super::rewrite::sized;
use super::{Block, Generator};
use crate::arena::{DATA, DATA_LENGTH};
use iced_x86::{Code, Instruction, MemoryOperand, Register};

/// How a writer names the place.
#[derive(Clone, Copy, PartialEq)]
enum Form {
    /// Relative to rip.
    Relative,
    /// By absolute address.
    Absolute,
    /// Through a register that an instruction before loads.
    Base(u64),
}

#[derive(Clone, PartialEq)]
enum Kind {
    /// MOV of an immediate.
    Immediate,
    /// MOV of a register; MOVNTI.
    Register,
    /// XCHG.
    Exchange,
    /// CMPXCHG, which succeeds while the old bytes are there.
    CompareExchange,
    /// CMPXCHG8B or CMPXCHG16B.
    CompareExchangeWide,
    /// XOR with what differs, which undoes itself the second time.
    Xor,
    /// ADD of what differs.
    Add,
    /// XADD of what differs.
    ExchangeAdd,
    /// MOVS or STOS, the element size, repeated, backwards.
    String { store: bool, unit: usize, repeat: bool, backwards: bool },
    /// Loaded from the slot by the first, stored by the second.
    Vector { load: Code, store: Code },
    /// Stored under a mask.
    Masked { store: Code },
    /// FILD and FISTP of 8 bytes.
    Fistp,
    /// PUSH with the stack pointer in the code.
    Push,
    /// CALL with the stack pointer in the code: the return address.
    Call,
    /// Any instruction that stores, with its operand moved here.
    Any(Instruction),
}

/// One store of a writer.
#[derive(Clone)]
struct Store {
    offset: usize,
    length: usize,
    kind: Kind,
    form: Form,
    /// Two registers that may be spoiled.
    scratch: [u64; 2],
    lock: bool,
    slot: u64,
}

/// Instructions that write so many bytes.
pub(super) struct Writer {
    stores: Vec<Store>,
    length: usize,
    narrow: bool,
}

/// A writer's code, and what it needs in the data.
pub(super) struct Emitted {
    pub code: Vec<Vec<u8>>,
    pub patches: Vec<(u64, Vec<u8>)>,
}

/// Room of a slot: a vector register.
const SLOT: u64 = 64;

impl Writer {
    pub(super) fn length(&self) -> usize {
        self.length
    }

    /// Some way to write `length` bytes; with `constant` also such that write
    /// something else.
    pub(super) fn draw(block: &mut Block, length: usize, constant: bool) -> Self {
        let narrow = block.generator.narrow;
        let mut stores = Vec::new();
        let whole = block.random.below(10);
        if length > 1 && whole == 0 {
            stores.extend(Store::draw(block, 0, length, |b, l| Some(Kind::string(b, l))));
        } else if length <= 16 && whole == 1 {
            stores.extend(Store::draw(block, 0, length, |b, _| Kind::masked(b)));
        } else if constant && whole <= 4 {
            stores.extend(Store::draw(block, 0, length, |b, l| b.storing(l).map(Kind::Any)));
        }
        let mut at = if stores.is_empty() { 0 } else { length };
        while at < length {
            let fits: Vec<_> = [1, 2, 4, 8, 16, 32, 64].into_iter().filter(|s| at + s <= length).collect();
            let largest = fits[fits.len() - 1];
            let size =
                if stores.len() > 4 || block.random.percent(85) { largest } else { block.random.pick(&fits) };
            if let Some(store) = Store::draw(block, at, size, |b, l| Kind::draw(b, l, constant)) {
                stores.push(store);
                at += size;
            }
        }
        if block.random.one_in(3) {
            stores.reverse();
        }
        Self { stores, length, narrow }
    }

    /// The code at `rip` that turns `old` at `target` into `new`. Its length
    /// depends on neither.
    pub(super) fn emit(
        &self,
        generator: &mut Generator,
        rip: u64,
        target: u64,
        old: &[u8],
        new: &[u8],
    ) -> Emitted {
        let mut emitter = Emitter {
            generator,
            rip,
            narrow: self.narrow,
            out: Emitted { code: Vec::new(), patches: Vec::new() },
        };
        for store in &self.stores {
            let range = store.offset..store.offset + store.length;
            emitter.store(store, target + store.offset as u64, &old[range.clone()], &new[range]);
        }
        emitter.out
    }
}

impl Store {
    fn draw(
        block: &mut Block,
        offset: usize,
        length: usize,
        kind: impl FnOnce(&mut Block, usize) -> Option<Kind>,
    ) -> Option<Self> {
        let narrow = block.generator.narrow;
        let kind = kind(block, length)?;
        // rax, rcx, rdx, rbx, rsi, rdi are named by some of the kinds.
        let below = match (narrow, length) {
            (true, 1) => 4,
            (true, _) => 8,
            _ => 16,
        };
        let one = block.free_register(below, &[0, 4]);
        let two = block.free_register(if narrow { 8 } else { 16 }, &[0, 4, one]);
        let form = match block.random.below(4) {
            0 | 1 if !narrow => Form::Relative,
            2 => Form::Absolute,
            _ if narrow => Form::Absolute,
            _ => Form::Base(two),
        };
        let slot = DATA + block.random.below(DATA_LENGTH / SLOT) * SLOT;
        Some(Self { offset, length, kind, form, scratch: [one, two], lock: block.random.one_in(2), slot })
    }
}

impl Kind {
    fn string(block: &mut Block, length: usize) -> Self {
        let narrow = block.generator.narrow;
        let units: Vec<usize> =
            [1, 2, 4, 8].into_iter().filter(|u| length % u == 0 && (*u < 8 || !narrow)).collect();
        let unit = block.random.pick(&units);
        let store = unit == length && block.random.one_in(2);
        let repeat = unit != length || block.random.one_in(2);
        Kind::String { store, unit, repeat, backwards: block.random.one_in(3) }
    }

    fn masked(block: &mut Block) -> Option<Self> {
        let store =
            block.random.pick(&[Code::EVEX_Vmovdqu8_xmmm128_k1z_xmm, Code::EVEX_Vpcompressb_xmmm128_k1z_xmm]);
        block.generator.pool().allows(store).then_some(Kind::Masked { store })
    }

    fn draw(block: &mut Block, length: usize, constant: bool) -> Option<Self> {
        let narrow = block.generator.narrow;
        let wide = |load, store| Kind::Vector { load, store };
        let kind = match length {
            1 | 2 | 4 | 8 => match block.random.below(16) {
                0..=2 if length < 8 => Kind::Immediate,
                0..=4 if length < 8 || !narrow => Kind::Register,
                5 | 6 if length < 8 || !narrow => Kind::Exchange,
                7 if length < 8 || !narrow => Kind::CompareExchange,
                8 if length < 8 || !narrow => Kind::Xor,
                9 if length < 8 || !narrow => Kind::Add,
                10 if length < 8 || !narrow => Kind::ExchangeAdd,
                11 | 12 => Kind::string(block, length),
                13 if length == 8 => Kind::CompareExchangeWide,
                13 if length == 4 => wide(Code::Movd_xmm_rm32, Code::Movd_rm32_xmm),
                14 if length == 8 => Kind::Fistp,
                14 => return Kind::masked(block),
                _ if length == if narrow { 4 } else { 8 } => match constant {
                    true if block.random.one_in(2) => Kind::Call,
                    _ => Kind::Push,
                },
                _ if length == 8 => match block.random.below(2) {
                    0 => wide(Code::Movq_xmm_xmmm64, Code::Movq_xmmm64_xmm),
                    _ => wide(Code::Movq_mm_mmm64, Code::Movq_mmm64_mm),
                },
                _ => Kind::Immediate,
            },
            16 => match block.random.below(6) {
                0 => wide(Code::Movups_xmm_xmmm128, Code::Movups_xmmm128_xmm),
                1 => wide(Code::VEX_Vmovdqu_xmm_xmmm128, Code::VEX_Vmovdqu_xmmm128_xmm),
                2 if !narrow => Kind::CompareExchangeWide,
                3 => return Kind::masked(block),
                4 => wide(Code::Lddqu_xmm_m128, Code::Movdqu_xmmm128_xmm),
                _ => Kind::string(block, length),
            },
            32 => match block.random.below(3) {
                0 => Kind::string(block, length),
                _ => wide(Code::VEX_Vmovdqu_ymm_ymmm256, Code::VEX_Vmovdqu_ymmm256_ymm),
            },
            _ => match block.random.below(3) {
                0 => Kind::string(block, length),
                _ => wide(Code::EVEX_Vmovdqu32_zmm_k1z_zmmm512, Code::EVEX_Vmovdqu32_zmmm512_k1z_zmm),
            },
        };
        // Without these the pool of this host has no such instruction.
        match &kind {
            Kind::Vector { store, .. } if !block.generator.pool().allows(*store) => None,
            Kind::Immediate if length == 8 => None,
            _ => Some(kind),
        }
    }
}

struct Emitter<'a> {
    generator: &'a mut Generator,
    rip: u64,
    narrow: bool,
    out: Emitted,
}

const BY_SIZE: [[Code; 4]; 6] = [
    [Code::Mov_rm8_imm8, Code::Mov_rm16_imm16, Code::Mov_rm32_imm32, Code::Mov_rm64_imm32],
    [Code::Mov_rm8_r8, Code::Mov_rm16_r16, Code::Mov_rm32_r32, Code::Mov_rm64_r64],
    [Code::Xchg_rm8_r8, Code::Xchg_rm16_r16, Code::Xchg_rm32_r32, Code::Xchg_rm64_r64],
    [Code::Cmpxchg_rm8_r8, Code::Cmpxchg_rm16_r16, Code::Cmpxchg_rm32_r32, Code::Cmpxchg_rm64_r64],
    [Code::Xor_rm8_r8, Code::Xor_rm16_r16, Code::Xor_rm32_r32, Code::Xor_rm64_r64],
    [Code::Add_rm8_r8, Code::Add_rm16_r16, Code::Add_rm32_r32, Code::Add_rm64_r64],
];
const EXCHANGE_ADD: [Code; 4] =
    [Code::Xadd_rm8_r8, Code::Xadd_rm16_r16, Code::Xadd_rm32_r32, Code::Xadd_rm64_r64];

fn number(bytes: &[u8]) -> u64 {
    let mut wide = [0; 8];
    wide[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(wide)
}

impl Emitter<'_> {
    fn bytes(&mut self, bytes: Vec<u8>) {
        self.rip += bytes.len() as u64;
        self.out.code.push(bytes);
    }

    fn encode(&mut self, instruction: Result<Instruction, iced_x86::IcedError>) {
        // Only register names and addresses vary here, all of which encode.
        let instruction = instruction.expect("operands that fit the encoding");
        self.generator.encoder.encode(&instruction, self.rip).expect("an instruction that encodes");
        let bytes = self.generator.encoder.take_buffer();
        self.bytes(bytes);
    }

    fn pointer(&self, number: u64) -> Register {
        sized(if self.narrow { 4 } else { 8 }, number)
    }

    fn memory(&self, form: Form, at: u64) -> MemoryOperand {
        match form {
            Form::Relative => MemoryOperand::with_base_displ(Register::RIP, at as i64),
            Form::Absolute => MemoryOperand::with_displ(at, if self.narrow { 4 } else { 8 }),
            Form::Base(number) => MemoryOperand::with_base(self.pointer(number)),
        }
    }

    /// MOV r, imm in the longest form, so that the length is always the same.
    fn load(&mut self, number: u64, value: u64) {
        let code = if self.narrow { Code::Mov_r32_imm32 } else { Code::Mov_r64_imm64 };
        let to = self.pointer(number);
        self.encode(if self.narrow {
            Instruction::with2(code, to, value as u32)
        } else {
            Instruction::with2(code, to, value)
        });
    }

    fn patch(&mut self, store: &Store, new: &[u8]) {
        self.out.patches.push((store.slot, new.to_vec()));
    }

    fn store(&mut self, store: &Store, at: u64, old: &[u8], new: &[u8]) {
        let size = store.length;
        let column = size.trailing_zeros() as usize;
        let [one, two] = store.scratch;
        if let Form::Base(base) = store.form {
            self.load(base, at);
        }
        let memory = self.memory(store.form, at);
        let value = number(&new[..size.min(8)]);
        let before = number(&old[..size.min(8)]);
        match &store.kind {
            Kind::Immediate => {
                self.encode(Instruction::with2(BY_SIZE[0][column], memory, value as u32));
            }
            Kind::Register if size >= 4 && store.lock => {
                self.load(one, value);
                let code = if size == 8 { Code::Movnti_m64_r64 } else { Code::Movnti_m32_r32 };
                self.encode(Instruction::with2(code, memory, sized(size, one)));
            }
            Kind::Register => {
                self.load(one, value);
                self.encode(Instruction::with2(BY_SIZE[1][column], memory, sized(size, one)));
            }
            Kind::Exchange => {
                self.load(one, value);
                self.encode(Instruction::with2(BY_SIZE[2][column], memory, sized(size, one)));
            }
            Kind::CompareExchange => {
                self.load(0, before);
                self.load(one, value);
                self.locked(store.lock, Instruction::with2(BY_SIZE[3][column], memory, sized(size, one)));
            }
            Kind::CompareExchangeWide => self.compare_exchange_wide(store, at, old, new),
            Kind::Xor => {
                self.load(one, value ^ before);
                self.locked(store.lock, Instruction::with2(BY_SIZE[4][column], memory, sized(size, one)));
            }
            Kind::Add => {
                self.load(one, value.wrapping_sub(before));
                self.locked(store.lock, Instruction::with2(BY_SIZE[5][column], memory, sized(size, one)));
            }
            Kind::ExchangeAdd => {
                self.load(one, value.wrapping_sub(before));
                self.locked(store.lock, Instruction::with2(EXCHANGE_ADD[column], memory, sized(size, one)));
            }
            Kind::String { store: stos, unit, repeat, backwards } => {
                self.string(store, at, new, *stos, *unit, *repeat, *backwards);
            }
            Kind::Vector { load, store: save } => {
                self.patch(store, new);
                let from = self.memory(Form::Absolute, store.slot);
                let register = self.vector(*load, one);
                self.encode(Instruction::with2(*load, register, from));
                self.encode(Instruction::with2(*save, memory, register));
            }
            Kind::Masked { store: save } => {
                self.patch(store, new);
                let from = self.memory(Form::Absolute, store.slot);
                let vector = Register::XMM0 + (one as u32 & 7);
                self.encode(Instruction::with2(Code::Movups_xmm_xmmm128, vector, from));
                self.load(one, (1 << size) - 1);
                let mask = Register::K1 + (two as u32 % 7);
                self.encode(Instruction::with2(Code::VEX_Kmovd_kr_r32, mask, sized(4, one)));
                self.encode(Instruction::with2(*save, memory, vector).map(|mut instruction| {
                    instruction.set_op_mask(mask);
                    instruction
                }));
            }
            Kind::Fistp => {
                self.patch(store, new);
                self.bytes(vec![0xdb, 0xe3]);
                let from = self.memory(Form::Absolute, store.slot);
                self.encode(Instruction::with1(Code::Fild_m64int, from));
                self.encode(Instruction::with1(Code::Fistp_m64int, memory));
            }
            Kind::Push => {
                self.load(one, value);
                self.on_stack(two, at + size as u64, |emitter| {
                    emitter.bytes(if one >= 8 {
                        vec![0x41, 0x50 | (one as u8 & 7)]
                    } else {
                        vec![0x50 | one as u8]
                    });
                });
            }
            Kind::Call => {
                self.on_stack(two, at + size as u64, |emitter| emitter.bytes(vec![0xe8, 0, 0, 0, 0]));
            }
            Kind::Any(instruction) => {
                let mut instruction = *instruction;
                let (base, size) = match store.form {
                    Form::Relative => (Register::RIP, 8),
                    Form::Base(number) => (self.pointer(number), 0),
                    Form::Absolute => (Register::None, if self.narrow { 4 } else { 8 }),
                };
                instruction.set_memory_base(base);
                instruction.set_memory_displ_size(size);
                instruction.set_memory_displacement64(if size == 0 { 0 } else { at });
                self.encode(Ok(instruction));
            }
        }
    }

    fn locked(&mut self, lock: bool, instruction: Result<Instruction, iced_x86::IcedError>) {
        self.encode(instruction.map(|mut instruction| {
            instruction.set_has_lock_prefix(lock);
            instruction
        }));
    }

    fn vector(&self, load: Code, number: u64) -> Register {
        let first = match load {
            Code::Movq_mm_mmm64 => return Register::MM0 + (number as u32 & 7),
            Code::VEX_Vmovdqu_ymm_ymmm256 => Register::YMM0,
            Code::EVEX_Vmovdqu32_zmm_k1z_zmmm512 => Register::ZMM0,
            _ => Register::XMM0,
        };
        first + (number as u32 & 7)
    }

    /// EDX:EAX and ECX:EBX, or the 64-bit four; 16 bytes must be aligned, and
    /// fault where they are not.
    fn compare_exchange_wide(&mut self, store: &Store, at: u64, old: &[u8], new: &[u8]) {
        let half = store.length / 2;
        for (register, bytes) in [(0, &old[..half]), (2, &old[half..]), (3, &new[..half]), (1, &new[half..])]
        {
            self.load(register, number(bytes));
        }
        let code = if half == 8 { Code::Cmpxchg16b_m128 } else { Code::Cmpxchg8b_m64 };
        let memory = self.memory(if self.narrow { Form::Absolute } else { Form::Relative }, at);
        self.locked(store.lock, Instruction::with1(code, memory));
    }

    #[allow(clippy::too_many_arguments)]
    fn string(
        &mut self,
        store: &Store,
        at: u64,
        new: &[u8],
        stos: bool,
        unit: usize,
        repeat: bool,
        backwards: bool,
    ) {
        let last = if backwards { (store.length - unit) as u64 } else { 0 };
        self.load(7, at + last);
        if stos {
            self.load(0, number(new));
        } else {
            self.patch(store, new);
            self.load(6, store.slot + last);
        }
        if repeat {
            self.load(1, (store.length / unit) as u64);
        }
        if backwards {
            self.bytes(vec![0xfd]);
        }
        let mut bytes = match unit {
            2 => vec![0x66],
            _ => Vec::new(),
        };
        if repeat {
            bytes.push(0xf3);
        }
        if unit == 8 {
            bytes.push(0x48);
        }
        let opcode = if stos { 0xaa } else { 0xa4 };
        bytes.push(opcode | u8::from(unit > 1));
        self.bytes(bytes);
        if backwards {
            self.bytes(vec![0xfc]);
        }
    }

    /// Run something with the stack pointer at `top`, then put it back.
    fn on_stack(&mut self, number: u64, top: u64, run: impl FnOnce(&mut Self)) {
        self.load(number, top);
        let (stack, other) = (self.pointer(4), self.pointer(number));
        let code = if self.narrow { Code::Xchg_rm32_r32 } else { Code::Xchg_rm64_r64 };
        self.encode(Instruction::with2(code, other, stack));
        run(self);
        self.encode(Instruction::with2(code, other, stack));
    }
}
