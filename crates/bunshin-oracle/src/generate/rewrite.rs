//! Code that changes itself, in shapes that are known to end. A *victim* is
//! some bytes of code that are overwritten with other code, a *writer* the
//! instructions that do it. The shapes differ in when the victim runs: only
//! after the write, before and after it, every time round a loop; as a
//! function of its own, on another page, across the end of a page; or as part
//! of the very instruction that writes.
use super::operands::{register, Operands};
use super::writers::{Emitted, Writer};
use super::Block;
use crate::arena::{CODE, CODE_LENGTH, PAGE};
use iced_x86::{Decoder, DecoderOptions, OpAccess, OpCodeOperandKind, OpKind, Register};

/// Code, and what is written over it.
pub(super) struct Victim {
    /// The instructions that stand there at first.
    pub old: Vec<Vec<u8>>,
    /// Where in them the write begins.
    pub at: usize,
    /// What is written.
    pub new: Vec<u8>,
    /// The bytes are a constant inside one instruction: anything may be
    /// written there.
    pub constant: bool,
}

impl Victim {
    fn length(&self) -> usize {
        self.old.iter().map(Vec::len).sum()
    }

    fn old_bytes(&self) -> Vec<u8> {
        self.old.concat()[self.at..self.at + self.new.len()].to_vec()
    }
}

impl Block<'_> {
    /// Add one shape.
    pub(super) fn rewrite(&mut self) {
        match self.random.below(12) {
            0 | 1 => self.ahead(),
            2..=4 => self.looped(),
            5 | 6 => self.itself(),
            7 | 8 => self.near_function(),
            _ => self.far_function(),
        }
    }

    /// Writer; some instructions; victim, which has not run before.
    fn ahead(&mut self) {
        let victim = self.victim();
        let writer = Writer::draw(self, victim.new.len(), victim.constant);
        let slot = self.reserve(&writer);
        if self.random.one_in(2) {
            self.plain_body();
        }
        let at = self.rip;
        self.push_all(&victim.old);
        self.settle(slot, &writer, at, &victim);
    }

    /// A loop with victim and writer in it, in either order.
    fn looped(&mut self) {
        let counter = self.counter();
        let count = 2 + self.random.below(3) as u32;
        self.load_counter(counter, count);
        let top = self.rip;
        self.reserved.push(counter);
        let victim = self.victim();
        let writer = Writer::draw(self, victim.new.len(), victim.constant);
        let first = self.random.one_in(2);
        let early = first.then(|| self.reserve(&writer));
        if self.random.one_in(2) {
            self.plain_body();
        }
        let at = self.rip;
        self.push_all(&victim.old);
        if self.random.one_in(2) {
            self.plain_body();
        }
        let slot = early.unwrap_or_else(|| self.reserve(&writer));
        self.settle(slot, &writer, at, &victim);
        self.reserved.pop();
        self.count_down(counter, top);
    }

    /// A loop whose writer writes over itself, or what stands around it.
    fn itself(&mut self) {
        let counter = self.counter();
        let count = 2 + self.random.below(3) as u32;
        self.load_counter(counter, count);
        let top = self.rip;
        self.reserved.push(counter);
        let length = self.random.pick(&[1, 2, 4, 8, 8, 16]);
        let writer = Writer::draw(self, length, true);
        let slot = self.reserve(&writer);
        let tail: Vec<_> = (0..2).map(|_| self.instruction_at(self.rip)).collect();
        self.push_all(&tail);
        let end = self.rip;
        // Somewhere between a little before the last instruction of the
        // writer and the end of the tail.
        let last = slot.last_instruction(self);
        let first = last.saturating_sub(self.random.below(8)).max(top);
        let target = first + self.random.below((end - first).saturating_sub(length as u64).max(1));
        let bytes = self.code_between(top, end);
        let from = (target - top) as usize;
        let length = length.min(bytes.len() - from);
        let old = bytes[from..from + length].to_vec();
        // The constant of an instruction is the last part of it: change the
        // end of what is written more often than all of it.
        let mut new = old.clone();
        match self.random.below(3) {
            0 => new = self.replacement(length),
            1 => {
                let at = self.random.below(length as u64) as usize;
                new[at] = self.random.next() as u8;
            }
            _ => {
                let tail = length.div_ceil(2);
                for byte in &mut new[length - tail..] {
                    *byte ^= 1 << self.random.below(8);
                }
            }
        }
        let victim = Victim { old: vec![old], at: 0, new, constant: true };
        if length == writer.length() {
            self.settle(slot, &writer, target, &victim);
        } else {
            self.abandon(slot);
        }
        self.reserved.pop();
        self.count_down(counter, top);
    }

    /// CALL f; writer; CALL f; JMP end; f: victim; RET; end.
    fn near_function(&mut self) {
        let victim = self.victim();
        let writer = Writer::draw(self, victim.new.len(), victim.constant);
        let calls = self.random.pick(&[[true, true], [true, true], [false, true]]);
        let inside = self.random.one_in(4);
        let mut call_slots = Vec::new();
        let mut call = |block: &mut Self| {
            call_slots.push((block.code.len(), block.rip));
            block.push(vec![0xe8, 0, 0, 0, 0]);
        };
        if calls[0] {
            call(self);
        }
        let before = (!inside).then(|| self.reserve(&writer));
        call(self);
        if self.random.one_in(2) {
            call(self);
        }
        let (jump, jump_at) = (self.code.len(), self.rip);
        self.push(vec![0xe9, 0, 0, 0, 0]);
        let function = self.rip;
        for (slot, at) in call_slots {
            self.code[slot][1..].copy_from_slice(&((function - at - 5) as u32).to_le_bytes());
        }
        let at = self.rip;
        self.push_all(&victim.old);
        let slot = before.unwrap_or_else(|| self.reserve(&writer));
        self.push(vec![0xc3]);
        self.settle(slot, &writer, at, &victim);
        self.code[jump][1..].copy_from_slice(&((self.rip - jump_at - 5) as u32).to_le_bytes());
    }

    /// A function elsewhere in the code, often across the end of a page.
    fn far_function(&mut self) {
        let mut victim = self.victim();
        let length = victim.length() as u64 + 1;
        let Some(at) = self.room_for(length) else { return self.near_function() };
        // One byte or several on either side of a page's end change alone.
        let end = (at | (PAGE - 1)) + 1;
        if at + length > end && self.random.one_in(2) {
            let cut = (end - at) as usize;
            let (from, to) = (victim.at, victim.at + victim.new.len());
            if from < cut && cut < to {
                if self.random.one_in(2) {
                    victim.new.truncate(cut - from);
                } else {
                    victim.new.drain(..cut - from);
                    victim.at = cut;
                }
            }
        }
        let mut bytes = victim.old.concat();
        bytes.push(0xc3);
        // A store beside the function, which changes nothing of it.
        let beside = self.random.one_in(8);
        self.patches.push((at, bytes));
        let call = |block: &mut Self| {
            let mut bytes = vec![0xe8];
            bytes.extend((at.wrapping_sub(block.rip + 5) as u32).to_le_bytes());
            block.push(bytes);
        };
        let looped = self.random.one_in(2).then(|| {
            let counter = self.counter();
            let count = 2 + self.random.below(3) as u32;
            self.load_counter(counter, count);
            self.reserved.push(counter);
            (counter, self.rip)
        });
        if self.random.percent(70) {
            call(self);
        }
        let writer = Writer::draw(self, victim.new.len(), victim.constant);
        let slot = self.reserve(&writer);
        if beside {
            let old = vec![vec![0xcc; victim.new.len()]];
            let beside = Victim { old, at: 0, new: victim.new.clone(), constant: true };
            self.settle(slot, &writer, at + length + 3, &beside);
        } else {
            self.settle(slot, &writer, at, &victim);
        }
        call(self);
        if let Some((counter, top)) = looped {
            self.reserved.pop();
            self.count_down(counter, top);
        }
    }

    /// Room in the code segment away from the case's own code.
    fn room_for(&mut self, length: u64) -> Option<u64> {
        for _ in 0..8 {
            let at = if self.random.one_in(2) {
                CODE + PAGE * (1 + self.random.below(3)) - self.random.below(length.min(32)) - 1
            } else {
                CODE + 0x40 + self.random.below(CODE_LENGTH - 0x400)
            };
            let (first, end) = (at - 0x40, at + length + 0x80);
            let own = self.start.saturating_sub(0x40)..self.start + super::ROOM;
            let clear = |from: u64, to: u64| end <= from || to <= first;
            let patches = &self.patches;
            if end <= CODE + CODE_LENGTH
                && clear(own.start, own.end)
                && patches.iter().all(|(p, bytes)| clear(*p, *p + bytes.len() as u64))
            {
                return Some(at);
            }
        }
        None
    }

    fn plain_body(&mut self) {
        for _ in 0..1 + self.random.below(3) {
            self.plain();
        }
    }

    pub(super) fn push_all(&mut self, code: &[Vec<u8>]) {
        for bytes in code {
            self.push(bytes.clone());
        }
    }

    /// A register for a loop's count that nothing uses by itself.
    fn counter(&self) -> usize {
        let choices: &[usize] = if self.generator.narrow { &[5, 3] } else { &[15, 14, 13, 12] };
        *choices.iter().find(|c| !self.reserved.contains(c)).unwrap_or(&choices[0])
    }

    fn load_counter(&mut self, counter: usize, count: u32) {
        let mut bytes = if counter >= 8 { vec![0x41] } else { Vec::new() };
        bytes.push(0xb8 | (counter as u8 & 7));
        bytes.extend((1u32 << (count - 1)).to_le_bytes());
        self.push(bytes);
    }

    /// SHR counter, 1; JNZ top: ends soon whatever became of the counter.
    fn count_down(&mut self, counter: usize, top: u64) {
        let mut bytes = if counter >= 8 { vec![0x41] } else { Vec::new() };
        bytes.extend([0xd1, 0xe8 | (counter as u8 & 7)]);
        self.push(bytes);
        let mut jump = vec![0x0f, 0x85];
        jump.extend((top.wrapping_sub(self.rip + 6) as u32).to_le_bytes());
        self.push(jump);
    }

    /// The case's code between two of its addresses.
    fn code_between(&self, from: u64, to: u64) -> Vec<u8> {
        let all = self.code.concat();
        all[(from - self.start) as usize..(to - self.start) as usize].to_vec()
    }

    /// Instructions for `length` bytes, with NOPs at the end.
    fn replacement(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        for _ in 0..6 {
            let next = self.instruction_at(self.rip);
            if bytes.len() + next.len() <= length {
                bytes.extend(next);
            }
            if bytes.len() == length || self.random.one_in(3) {
                break;
            }
        }
        bytes.resize(length, 0x90);
        bytes
    }

    fn victim(&mut self) -> Victim {
        match self.random.below(10) {
            0..=3 => self.constant_victim(),
            4..=6 => self.instruction_victim(),
            7 => self.branch_victim(),
            8 => self.probe_victim(),
            _ => self.wide_victim(),
        }
    }

    /// An instruction whose immediate or displacement changes.
    fn constant_victim(&mut self) -> Victim {
        for _ in 0..40 {
            let bytes = self.instruction_at(self.rip);
            let mut decoder = Decoder::with_ip(self.bits(), &bytes, self.rip, DecoderOptions::NONE);
            let instruction = decoder.decode();
            let offsets = decoder.get_constant_offsets(&instruction);
            let (at, length) = if offsets.has_immediate() {
                (offsets.immediate_offset(), offsets.immediate_size())
            } else if offsets.has_displacement() && self.random.one_in(3) {
                (offsets.displacement_offset(), offsets.displacement_size())
            } else {
                continue;
            };
            let mut new = bytes[at..at + length].to_vec();
            if offsets.has_immediate() {
                new.copy_from_slice(&self.random.integer().to_le_bytes()[..length]);
            } else {
                new[0] ^= 1 << self.random.below(8);
            }
            return Victim { old: vec![bytes], at, new, constant: true };
        }
        self.instruction_victim()
    }

    /// Instructions that become others of the same length.
    fn instruction_victim(&mut self) -> Victim {
        let old: Vec<_> = (0..1 + self.random.below(2)).map(|_| self.instruction_at(self.rip)).collect();
        let before = old.concat();
        let length = before.len();
        let mut new = self.replacement(length);
        let mut at = 0;
        // Sometimes only what really changes is written.
        if self.random.one_in(2) {
            let same = |pair: (&u8, &u8)| pair.0 == pair.1;
            let front = before.iter().zip(&new).take_while(|p| same(*p)).count();
            if front < length {
                let back = before.iter().rev().zip(new.iter().rev()).take_while(|p| same(*p)).count();
                new = new[front..length - back].to_vec();
                at = front;
            }
        }
        Victim { old, at, new, constant: false }
    }

    /// A branch that changes its condition or its way.
    fn branch_victim(&mut self) -> Victim {
        let over: Vec<_> = (0..2).map(|_| self.instruction_at(self.rip)).collect();
        let [one, two] = [over[0].len() as u8, over[1].len() as u8];
        let condition = self.random.below(16) as u8;
        let ways = [0, one, one + two];
        let way = self.random.pick(&ways);
        let (jump, at, new) = match self.random.below(4) {
            0 => (vec![0x70 | condition, way], 0, vec![0x70 | self.random.below(16) as u8]),
            1 => (vec![0x70 | condition, way], 1, vec![self.random.pick(&ways)]),
            2 => (vec![0xeb, way], 0, vec![self.random.pick(&[0xeb, 0x75, 0x74, 0x72]), way]),
            _ => {
                let displacement = [self.random.pick(&ways), 0, 0, 0];
                (vec![0xe9, way, 0, 0, 0], 1, displacement.to_vec())
            }
        };
        Victim { old: [vec![jump], over].concat(), at, new, constant: false }
    }

    /// What tracers do: a NOP becomes a jump, an instruction INT3, and back.
    fn probe_victim(&mut self) -> Victim {
        const NOP: [u8; 5] = [0x0f, 0x1f, 0x44, 0, 0];
        let over = self.instruction_at(self.rip);
        let jump = vec![0xe9, over.len() as u8, 0, 0, 0];
        let (first, new) = match self.random.below(5) {
            0 | 1 => (NOP.to_vec(), jump),
            2 => (jump, NOP.to_vec()),
            3 => (NOP.to_vec(), vec![0xcc]),
            _ => (vec![0xcc, 0x90, 0x90, 0x90, 0x90], NOP.to_vec()),
        };
        Victim { old: vec![first, over], at: 0, new, constant: false }
    }

    /// As many bytes as a vector register holds.
    fn wide_victim(&mut self) -> Victim {
        let length = self.random.pick(&[16, 16, 32, 64]);
        let mut old = Vec::new();
        let mut total = 0;
        while total < length {
            let mut next = self.instruction_at(self.rip);
            if total + next.len() > length || self.random.one_in(4) {
                next = vec![0x90];
            }
            total += next.len();
            old.push(next);
        }
        let mut new = self.replacement(length);
        if self.random.one_in(2) {
            // One instruction among others that stay.
            let before = old.concat();
            let pick = self.random.below(old.len() as u64) as usize;
            let from: usize = old[..pick].iter().map(Vec::len).sum();
            let changed = self.replacement(old[pick].len());
            new.copy_from_slice(&before);
            new[from..from + changed.len()].copy_from_slice(&changed);
        }
        Victim { old, at: 0, new, constant: false }
    }

    /// Keep room for a writer whose target is not known yet.
    fn reserve(&mut self, writer: &Writer) -> Slot {
        let slot = Slot { first: self.code.len(), at: self.rip };
        let blank = vec![0; writer.length()];
        let emitted = writer.emit(self.generator, slot.at, CODE + PAGE, &blank, &blank);
        self.push_all(&emitted.code);
        slot
    }

    /// Fill a reserved writer in: it writes the victim that stands at `at`.
    fn settle(&mut self, slot: Slot, writer: &Writer, at: u64, victim: &Victim) {
        let target = at + victim.at as u64;
        let Emitted { code, patches } =
            writer.emit(self.generator, slot.at, target, &victim.old_bytes(), &victim.new);
        for (place, bytes) in self.code[slot.first..].iter_mut().zip(code) {
            debug_assert_eq!(place.len(), bytes.len());
            *place = bytes;
        }
        self.patches.extend(patches);
    }

    /// Make NOPs of a reserved writer's last instruction.
    fn abandon(&mut self, slot: Slot) {
        for bytes in &mut self.code[slot.first..] {
            bytes.fill(0x90);
        }
    }

    /// Some instruction of the pool that writes memory, `length` bytes of it
    /// at most, with its operand at `target`; None when none was found.
    pub(super) fn storing(&mut self, length: usize) -> Option<iced_x86::Instruction> {
        let mut factory = iced_x86::InstructionInfoFactory::new();
        for _ in 0..60 {
            let code = self.generator.pool.draw(self.random);
            let size = code.op_code().memory_size().size();
            if size == 0 || size > length || code.op_code().op_count() == 0 {
                continue;
            }
            let mut instruction = Operands {
                random: self.random,
                roles: self.roles,
                reserved: &self.reserved,
                rip: self.rip,
                narrow: self.generator.narrow,
            }
            .fill(code);
            let fixed = code.op_code().op0_kind() == OpCodeOperandKind::mem_offs;
            if fixed || instruction.op0_kind() != OpKind::Memory || self.touches_reserved(&instruction) {
                continue;
            }
            let writes =
                factory.info(&instruction).used_memory().iter().any(|m| {
                    !matches!(m.access(), OpAccess::Read | OpAccess::NoMemAccess | OpAccess::CondRead)
                });
            if !writes || instruction.memory_index().is_vector_register() {
                continue;
            }
            instruction.set_memory_index(Register::None);
            instruction.set_memory_index_scale(1);
            instruction.set_segment_prefix(Register::None);
            // AH with REX, say. Any base would do for this.
            instruction.set_memory_base(Register::None);
            instruction.set_memory_displ_size(if self.generator.narrow { 4 } else { 8 });
            instruction.set_memory_displacement64(CODE);
            let encodes = self.generator.encoder.encode(&instruction, self.rip).is_ok();
            drop(self.generator.encoder.take_buffer());
            // With another base it may need REX.
            let high = (0..instruction.op_count()).any(|i| {
                matches!(
                    instruction.op_register(i),
                    Register::AH | Register::CH | Register::DH | Register::BH
                )
            });
            if encodes && !high {
                return Some(instruction);
            }
        }
        None
    }

    /// A register below the width that narrow code has, not in use.
    pub(super) fn free_register(&mut self, below: u64, except: &[u64]) -> u64 {
        loop {
            let number = self.random.below(below);
            let taken = number == 4 || except.contains(&number) || self.reserved.contains(&(number as usize));
            let pointer = self.roles.pointers.contains(&(number as usize));
            if !(taken || pointer && below > 8) {
                return number;
            }
        }
    }
}

/// Where a writer's code will stand.
pub(super) struct Slot {
    first: usize,
    at: u64,
}

impl Slot {
    /// Address of the last instruction that was reserved.
    fn last_instruction(&self, block: &Block) -> u64 {
        let mut at = self.at;
        let mut last = at;
        for bytes in &block.code[self.first..] {
            last = at;
            at += bytes.len() as u64;
        }
        last
    }
}

/// The general register of a size in bytes.
pub(super) fn sized(size: usize, number: u64) -> Register {
    match size {
        1 if number < 4 => register(Register::AL, number),
        1 if number < 8 => register(Register::SPL, number - 4),
        1 => register(Register::R8L, number - 8),
        2 => register(Register::AX, number),
        4 => register(Register::EAX, number),
        _ => register(Register::RAX, number),
    }
}
