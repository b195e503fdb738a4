//! The supervisor program that sets up cases, catches exceptions and records,
//! and the rest of the guest's memory that no case changes.
//!
//! ```text
//! entry ─ wait for GO ─ next case: copy, load, IRETQ ─┐
//!            ▲              ▲                        case
//!            └ batch done ──┴ end: final record ◄── exception: record; resume in the next slot
//! ```
//! A reset enters at the top again and finds out by RUNNING that a case was
//! lost. Handlers use no stack of the case: they keep the registers at a fixed
//! place, so that all a case can spoil is the frame that its exception pushed.
use super::case::{flat, offset, CASE_BYTES, WORDS};
use super::layout::*;
use crate::random::Random;
use iced_x86::code_asm::*;
use iced_x86::{Code, IcedError, Instruction, MemoryOperand, Register};
use std::sync::OnceLock;

/// Sums in a final record, in order; each covers some ranges of memory.
pub const SUMS: [&str; 9] =
    ["tables", "gdt", "ldt and tss", "data 0", "data 1", "data 2", "data 3", "stacks", "large page"];
/// Entries of the upper levels, whole in a final record: PML4, PDPT, PD of
/// either set.
pub const UPPER: [&str; 6] = ["pml4 0", "pdpt 0", "pd 0", "pml4 1", "pdpt 1", "pd 1"];
/// Word of a final record where those start.
pub const FIRST_UPPER: usize = 13;
/// Word of a final record where the sums start.
pub const FIRST_SUM: usize = FIRST_UPPER + UPPER.len();

/// Exceptions that push an error code.
const WITH_ERROR: [u64; 7] = [8, 10, 11, 12, 13, 14, 17];
/// MSRs that a case sets, in the order of a final record, then the rest.
const MSRS: [(u32, &str); 11] = [
    (0xc000_0081, "star"),
    (0xc000_0082, "lstar"),
    (0xc000_0083, "cstar"),
    (0xc000_0084, "sfmask"),
    (0x174, "sysenter_cs"),
    (0x175, "sysenter_esp"),
    (0x176, "sysenter_eip"),
    (0xc000_0100, "fs_base"),
    (0xc000_0101, "gs_base"),
    (0xc000_0102, "kernel_gs_base"),
    (0xc000_0080, "efer"),
];
/// Words of an exception's record that hold the code's bytes.
pub const CODE_BYTES: usize = 34;
const RECORDED_MSRS: usize = 7;
const GPR: [AsmRegister64; 16] =
    [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15];

/// Memory that data pages and stacks start from and that is summed up at the
/// end, as (gpa, words), one group a sum. String operations that go down reach
/// 48 bytes below the addresses of [`super::generate`].
pub fn ranges() -> Vec<Vec<(u64, u64)>> {
    let tables = TABLES.iter().flat_map(|t| [(t + 0x3000, ENTRIES as u64), (t + 0x2000 + 8 * 129, 1)]);
    let mut groups = vec![tables.collect(), vec![(GDT, 32)], vec![(LDT, 8), (TSS, 24), (GDT_COPY, 32)]];
    for page in 0..4 {
        let at = PAGES + 0x1000 * page;
        groups.push(vec![(at, 24), (at + 0xf80, 16)]);
    }
    let stack =
        |n: u64| [(0, 24), (0x600, 96), (0xb00, 48), (0xf80, 16)].map(|(at, w)| (PAGES + n * 0x1000 + at, w));
    groups.push([stack(4), stack(5)].concat());
    groups.push(vec![(LARGE, 32), (LARGE + 0xf80, 16), (CODE + 0xf80, 16)]);
    groups
}

/// Groups of [`ranges`] that the harness fills before each case.
const FILLED: std::ops::Range<usize> = 3..9;

struct Builder {
    a: CodeAssembler,
}

type Step = Result<(), IcedError>;

impl Builder {
    fn memory(at: u64) -> MemoryOperand {
        MemoryOperand::with_base_displ(Register::RIP, (HALF + at) as i64)
    }

    fn load(&mut self, to: AsmRegister64, at: u64) -> Step {
        self.a.add_instruction(Instruction::with2(Code::Mov_r64_rm64, Register::from(to), Self::memory(at))?)
    }

    fn store(&mut self, at: u64, from: AsmRegister64) -> Step {
        self.a.add_instruction(Instruction::with2(
            Code::Mov_rm64_r64,
            Self::memory(at),
            Register::from(from),
        )?)
    }

    fn set(&mut self, at: u64, value: i32) -> Step {
        self.a.add_instruction(Instruction::with2(Code::Mov_rm64_imm32, Self::memory(at), value)?)
    }

    fn increment(&mut self, at: u64) -> Step {
        self.a.add_instruction(Instruction::with1(Code::Inc_rm64, Self::memory(at))?)
    }

    fn compare(&mut self, register: AsmRegister64, at: u64) -> Step {
        self.a.add_instruction(Instruction::with2(
            Code::Cmp_r64_rm64,
            Register::from(register),
            Self::memory(at),
        )?)
    }

    /// rsi: from, rdi: gpa to copy to.
    fn copy(&mut self, to: u64, words: u64) -> Step {
        self.a.mov(rdi, HALF + to)?;
        self.a.mov(ecx, words as u32)?;
        self.a.rep().movsq()
    }

    fn read_msr(&mut self, msr: u32) -> Step {
        self.a.mov(ecx, msr)?;
        self.a.rdmsr()?;
        self.a.shl(rdx, 32)?;
        self.a.or(rax, rdx)
    }

    /// rdi: the next record of the log, with its tag; spoils rcx.
    fn record(&mut self) -> Step {
        self.load(rdi, LOGGED)?;
        self.a.imul_3(rdi, rdi, 8 * RECORD as i32)?;
        self.a.mov(rcx, HALF + LOG)?;
        self.a.add(rdi, rcx)?;
        self.increment(LOGGED)
    }

    /// Tag of a record in rdi: `tag` and the case's number; spoils rcx, rdx.
    fn tag(&mut self, tag: u32) -> Step {
        self.a.mov(ecx, tag)?;
        self.load(rdx, INDEX)?;
        self.a.shl(rdx, 16)?;
        self.a.or(rcx, rdx)?;
        self.a.mov(qword_ptr(rdi), rcx)
    }

    fn descriptors(&mut self, code: Code, number: u64) -> Step {
        self.a.add_instruction(Instruction::with1(code, Self::memory(OPERANDS + 16 * number))?)
    }

    fn set_up(&mut self) -> Step {
        let from = |name: &str| qword_ptr(rbx + offset(name) as i32);
        for (name, to, words) in [
            ("gdt", GDT, 32),
            ("gdt", GDT_COPY, 32),
            ("ldt", LDT, 8),
            ("tss", TSS, 24),
            ("tss", TSS_OTHER, 24),
            ("pt", TABLES[0] + 0x3000, ENTRIES as u64),
        ] {
            self.a.lea(rsi, from(name))?;
            self.copy(to, words)?;
        }
        self.copy(TABLES[1] + 0x3000, ENTRIES as u64)?;
        // A stack that starts on the next page may have grown over their last entries.
        self.a.xor(eax, eax)?;
        for tables in TABLES {
            self.a.mov(rdi, HALF + tables + 0x3e00)?;
            self.a.mov(ecx, 64)?;
            self.a.rep().stosq()?;
        }
        for (n, tables) in TABLES.iter().enumerate() {
            for (name, to) in
                [("pml4", 0), ("pdpt", 0x1000), ("pd", 0x2000 + 8 * 128), ("large", 0x2000 + 8 * 129)]
            {
                self.a.mov(rax, qword_ptr(rbx + (offset(name) + 8 * n as u64) as i32))?;
                self.store(tables + to, rax)?;
            }
        }
        self.a.lea(rsi, qword_ptr(rbx + 8 * WORDS as i32))?;
        self.copy(CODE, (SLOTS as u64 + 1) * SLOT / 8)?;
        for (at, words) in ranges()[FILLED].iter().flatten() {
            self.a.mov(rsi, HALF + TEMPLATE + (at & 0xfff))?;
            self.copy(*at, *words)?;
        }
        self.a.mov(rax, qword_ptr(rbx + 8 * (WORDS - 1) as i32))?;
        self.store(END, rax)?;
        self.descriptors(Code::Lgdt_m1664, 0)?;
        let (mut plain, mut loaded) = (self.a.create_label(), self.a.create_label());
        self.a.cmp(from("idt"), 0)?;
        self.a.jne(plain)?;
        self.descriptors(Code::Lidt_m1664, 2)?;
        self.a.jmp(loaded)?;
        self.a.set_label(&mut plain)?;
        self.descriptors(Code::Lidt_m1664, 3)?;
        self.a.set_label(&mut loaded)?;
        // An exception from user mode has left a null one, and IRET to nowhere tells.
        self.a.mov(eax, KERNEL_SS as u32)?;
        self.a.mov(ss, eax)?;
        self.a.mov(eax, TR as u32)?;
        self.a.ltr(ax)?;
        self.a.mov(eax, LDTR as u32)?;
        self.a.lldt(ax)?;
        for (name, segment) in [("ds", ds), ("es", es), ("fs", fs), ("gs", gs)] {
            self.a.mov(rax, from(name))?;
            self.a.mov(segment, eax)?;
        }
        for (msr, name) in MSRS {
            self.a.mov(ecx, msr)?;
            self.a.mov(eax, dword_ptr(rbx + offset(name) as i32))?;
            self.a.mov(edx, dword_ptr(rbx + offset(name) as i32 + 4))?;
            self.a.wrmsr()?;
        }
        // TSC_AUX.
        self.a.mov(ecx, 0xc000_0103u32)?;
        self.a.xor(eax, eax)?;
        self.a.xor(edx, edx)?;
        self.a.wrmsr()?;
        self.a.xor(ecx, ecx)?;
        self.a.mov(rax, from("xcr0"))?;
        self.a.xsetbv()?;
        self.a.xor(eax, eax)?;
        self.a.mov(cr2, rax)?;
        for (name, register) in [("cr4", cr4), ("cr3", cr3), ("cr8", cr8), ("cr0", cr0)] {
            self.a.mov(rax, from(name))?;
            self.a.mov(register, rax)?;
        }
        self.a.xor(eax, eax)?;
        self.a.mov(dr6, rax)?;
        for (i, register) in [dr0, dr1, dr2, dr3].into_iter().enumerate() {
            self.a.mov(rax, qword_ptr(rbx + (offset("breakpoint") + 8 * i as u64) as i32))?;
            self.a.mov(register, rax)?;
        }
        self.a.mov(rax, from("dr7"))?;
        self.a.mov(dr7, rax)?;
        self.set(RUNNING, 1)?;
        self.a.mov(rsp, HALF + STACK_TOP)?;
        for name in ["ss", "rsp", "rflags", "cs", "rip"] {
            self.a.push(from(name))?;
        }
        for (i, register) in GPR.iter().enumerate() {
            if ![3, 4].contains(&i) {
                self.a.mov(*register, qword_ptr(rbx + 8 * i as i32))?;
            }
        }
        self.a.mov(rbx, qword_ptr(rbx + 24))?;
        self.a.iretq()
    }

    /// rax: error code, rbx: frame. The case's registers are at SAVE.
    fn exception(&mut self) -> Step {
        self.a.mov(rsp, HALF + STACK_TOP)?;
        self.a.cld()?;
        self.record()?;
        self.a.mov(qword_ptr(rdi + 8), rax)?;
        self.a.add_instruction(Instruction::with2(
            Code::Movzx_r32_rm8,
            Register::ECX,
            Self::memory(VECTOR),
        )?)?;
        self.load(rdx, INDEX)?;
        self.a.shl(rdx, 16)?;
        self.a.or(rcx, rdx)?;
        self.a.mov(qword_ptr(rdi), rcx)?;
        for i in 0..5 {
            self.a.mov(rax, qword_ptr(rbx + 8 * i))?;
            self.a.mov(qword_ptr(rdi + 16 + 8 * i), rax)?;
        }
        for i in 0..16 {
            self.load(rax, SAVE + 8 * i)?;
            self.a.mov(qword_ptr(rdi + 56 + 8 * i as i32), rax)?;
        }
        self.a.mov(rax, cr2)?;
        self.a.mov(qword_ptr(rdi + 8 * 23), rax)?;
        self.a.xor(edx, edx)?;
        for segment in [gs, fs, es, ds] {
            self.a.shl(rdx, 16)?;
            self.a.mov(ecx, segment)?;
            self.a.or(rdx, rcx)?;
        }
        self.a.mov(qword_ptr(rdi + 8 * 24), rdx)?;
        for (i, msr) in [0xc000_0100u32, 0xc000_0101, 0xc000_0102, 0xc000_0080].into_iter().enumerate() {
            self.read_msr(msr)?;
            let word = if i == 3 { 32 } else { 25 + i as i32 };
            self.a.mov(qword_ptr(rdi + 8 * word), rax)?;
        }
        for (i, register) in [cr0, cr3, cr4, cr8].into_iter().enumerate() {
            self.a.mov(rax, register)?;
            self.a.mov(qword_ptr(rdi + 8 * (28 + i as i32)), rax)?;
        }
        self.a.str(eax)?;
        self.a.sldt(ecx)?;
        self.a.shl(rcx, 16)?;
        self.a.or(rax, rcx)?;
        self.a.mov(qword_ptr(rdi + 8 * 33), rax)?;
        for (register, word) in [(dr6, 36), (dr7, 37)] {
            self.a.mov(rax, register)?;
            self.a.mov(qword_ptr(rdi + 8 * word), rax)?;
        }
        self.code_bytes()
    }

    /// Sixteen bytes where the code was interrupted, if that is in its page and
    /// leaves room; else zero. rdi: the record.
    fn code_bytes(&mut self) -> Step {
        let (mut ours, mut done) = (self.a.create_label(), self.a.create_label());
        self.a.mov(rax, qword_ptr(rdi + 16))?;
        self.a.mov(rdx, rax)?;
        self.a.and(rdx, !0xfff)?;
        self.a.xor(ecx, ecx)?;
        self.a.xor(esi, esi)?;
        self.a.cmp(rdx, CODE_USER as i32)?;
        self.a.je(ours)?;
        self.a.cmp(rdx, CODE_SUPERVISOR as i32)?;
        self.a.jne(done)?;
        self.a.set_label(&mut ours)?;
        self.a.and(eax, 0xfff)?;
        self.a.cmp(eax, 0xff0)?;
        self.a.ja(done)?;
        self.a.mov(rdx, HALF + CODE)?;
        self.a.mov(rcx, qword_ptr(rdx + rax))?;
        self.a.mov(rsi, qword_ptr(rdx + rax + 8))?;
        self.a.set_label(&mut done)?;
        self.a.mov(qword_ptr(rdi + 8 * CODE_BYTES as i32), rcx)?;
        self.a.mov(qword_ptr(rdi + 8 * CODE_BYTES as i32 + 8), rsi)
    }

    /// Where to go on, or the end: rbx is the frame.
    fn resume(&mut self, end: CodeLabel) -> Step {
        // RF as QEMU pushes it, see `compare::exempt`.
        self.a.and(qword_ptr(rbx + 16), !0x1_0000)?;
        self.increment(CAUGHT)?;
        self.load(rax, CAUGHT)?;
        self.a.cmp(rax, MOST as i32)?;
        self.a.jae(end)?;
        self.a.add_instruction(Instruction::with2(
            Code::Movzx_r32_rm8,
            Register::ECX,
            Self::memory(VECTOR),
        )?)?;
        self.a.cmp(ecx, 8)?;
        self.a.je(end)?;
        // A breakpoint on code is met once.
        let mut other = self.a.create_label();
        self.a.cmp(ecx, 1)?;
        self.a.jne(other)?;
        self.a.or(qword_ptr(rbx + 16), 0x1_0000)?;
        self.a.set_label(&mut other)?;
        self.a.mov(rax, qword_ptr(rbx))?;
        self.a.mov(rdx, rax)?;
        self.a.and(rdx, !0xfff)?;
        let (mut ours, mut trap, mut on) =
            (self.a.create_label(), self.a.create_label(), self.a.create_label());
        self.a.cmp(rdx, CODE_USER as i32)?;
        self.a.je(ours)?;
        self.a.cmp(rdx, CODE_SUPERVISOR as i32)?;
        self.a.jne(end)?;
        self.a.set_label(&mut ours)?;
        self.a.and(eax, 0xfff)?;
        // A trap's rip is behind its instruction already.
        for vector in [1, 3, 4] {
            self.a.cmp(ecx, vector)?;
            self.a.je(trap)?;
        }
        self.a.cmp(ecx, 0x20)?;
        self.a.jae(trap)?;
        self.a.or(eax, SLOT as i32 - 1)?;
        self.a.inc(eax)?;
        self.a.set_label(&mut trap)?;
        self.compare(rax, END)?;
        self.a.jae(end)?;
        self.a.or(rax, rdx)?;
        self.a.jmp(on)?;
        self.a.set_label(&mut on)?;
        self.a.mov(qword_ptr(rbx), rax)?;
        self.a.mov(rsp, rbx)?;
        for (i, register) in GPR.iter().enumerate() {
            if i != 4 {
                self.load(*register, SAVE + 8 * i as u64)?;
            }
        }
        self.a.iretq()
    }

    fn end(&mut self) -> Step {
        self.a.xor(eax, eax)?;
        self.a.mov(dr7, rax)?;
        for (value, register) in [(BOOT_ROOT, cr3), (CR4, cr4), (CR0, cr0), (0, cr8)] {
            self.a.mov(rax, value)?;
            self.a.mov(register, rax)?;
        }
        self.record()?;
        self.tag(FINAL as u32)?;
        for (i, (msr, _)) in MSRS[..RECORDED_MSRS].iter().enumerate() {
            self.read_msr(*msr)?;
            self.a.mov(qword_ptr(rdi + 8 * (1 + i as i32)), rax)?;
        }
        for (code, word) in [(Code::Sgdt_m1664, 8), (Code::Sidt_m1664, 10)] {
            self.a.mov(qword_ptr(rdi + 8 * word + 8), 0)?;
            let to = MemoryOperand::with_base_displ(Register::RDI, i64::from(8 * word));
            self.a.add_instruction(Instruction::with1(code, to)?)?;
        }
        self.a.xor(ecx, ecx)?;
        self.a.xgetbv()?;
        self.a.mov(qword_ptr(rdi + 8 * 12), rax)?;
        let upper = TABLES.iter().flat_map(|t| [*t, t + 0x1000, t + 0x2000 + 8 * 128]);
        for (i, at) in upper.enumerate() {
            self.load(rax, at)?;
            self.a.mov(qword_ptr(rdi + 8 * (FIRST_UPPER + i) as i32), rax)?;
        }
        self.a.mov(ecx, 0xc000_0080u32)?;
        self.a.mov(eax, EFER as u32)?;
        self.a.xor(edx, edx)?;
        self.a.wrmsr()?;
        // Sums: rsi walks the ranges, rdi the record.
        self.a.mov(rsi, HALF + RANGES)?;
        self.a.mov(ebp, SUMS.len() as u32)?;
        self.a.mov(r8, 0x9e37_79b9_7f4a_7c15u64)?;
        let (mut group, mut range, mut word, mut done) =
            (self.a.create_label(), self.a.create_label(), self.a.create_label(), self.a.create_label());
        self.a.set_label(&mut group)?;
        self.a.mov(eax, 1)?;
        self.a.set_label(&mut range)?;
        self.a.mov(rdx, qword_ptr(rsi))?;
        self.a.add(rsi, 8)?;
        self.a.test(rdx, rdx)?;
        self.a.je(done)?;
        self.a.mov(ecx, dword_ptr(rsi))?;
        self.a.add(rsi, 8)?;
        self.a.set_label(&mut word)?;
        self.a.xor(rax, qword_ptr(rdx))?;
        self.a.imul_2(rax, r8)?;
        self.a.rol(rax, 23)?;
        self.a.add(rdx, 8)?;
        self.a.dec(ecx)?;
        self.a.jne(word)?;
        self.a.jmp(range)?;
        self.a.set_label(&mut done)?;
        self.a.mov(qword_ptr(rdi + 8 * FIRST_SUM as i32), rax)?;
        self.a.add(rdi, 8)?;
        self.a.dec(ebp)?;
        self.a.jne(group)
    }
}

/// The harness's code at [`HARNESS`] and the addresses of its stubs.
fn code() -> Result<(Vec<u8>, Vec<u64>), IcedError> {
    let mut b = Builder { a: CodeAssembler::new(64)? };
    let (mut wait, mut batch, mut next, mut batch_done, mut end) =
        (b.a.create_label(), b.a.create_label(), b.a.create_label(), b.a.create_label(), b.a.create_label());
    // Entry.
    b.a.mov(rsp, HALF + STACK_TOP)?;
    b.descriptors(Code::Lidt_m1664, 2)?;
    b.load(rax, RUNNING)?;
    b.a.test(rax, rax)?;
    b.a.je(wait)?;
    b.record()?;
    b.tag(LOST as u32)?;
    b.set(RUNNING, 0)?;
    b.increment(INDEX)?;
    b.a.jmp(next)?;
    b.a.set_label(&mut wait)?;
    b.load(rax, GO)?;
    b.compare(rax, DONE)?;
    b.a.jne(batch)?;
    b.a.pause()?;
    b.a.jmp(wait)?;
    b.a.set_label(&mut batch)?;
    b.set(INDEX, 0)?;
    b.set(LOGGED, 0)?;
    b.a.set_label(&mut next)?;
    b.load(rax, INDEX)?;
    b.compare(rax, COUNT)?;
    b.a.jae(batch_done)?;
    b.a.imul_3(rbx, rax, CASE_BYTES as i32)?;
    b.a.mov(rcx, HALF + CASES)?;
    b.a.add(rbx, rcx)?;
    b.set(CAUGHT, 0)?;
    b.set_up()?;
    b.a.set_label(&mut batch_done)?;
    b.load(rax, GO)?;
    b.store(DONE, rax)?;
    b.a.mov(edx, u32::from(PORT))?;
    b.a.out(dx, al)?;
    b.a.jmp(wait)?;
    // Exceptions.
    let (mut with, mut without, mut common) = (b.a.create_label(), b.a.create_label(), b.a.create_label());
    b.a.set_label(&mut with)?;
    for (i, register) in GPR.iter().enumerate() {
        b.store(SAVE + 8 * i as u64, *register)?;
    }
    b.a.mov(rax, qword_ptr(rsp))?;
    // Stacks are summed up in the end, and QEMU's codes differ, see `compare::exempt`.
    b.a.mov(qword_ptr(rsp), 0)?;
    b.a.lea(rbx, qword_ptr(rsp + 8))?;
    b.a.jmp(common)?;
    b.a.set_label(&mut without)?;
    for (i, register) in GPR.iter().enumerate() {
        b.store(SAVE + 8 * i as u64, *register)?;
    }
    b.a.xor(eax, eax)?;
    b.a.mov(rbx, rsp)?;
    b.a.set_label(&mut common)?;
    b.exception()?;
    b.resume(end)?;
    b.a.set_label(&mut end)?;
    b.end()?;
    b.set(RUNNING, 0)?;
    b.increment(INDEX)?;
    b.a.jmp(next)?;
    let mut stubs = Vec::new();
    for vector in 0..VECTORS {
        let mut here = b.a.create_label();
        b.a.set_label(&mut here)?;
        b.a.add_instruction(Instruction::with2(Code::Mov_rm8_imm8, Builder::memory(VECTOR), vector as u32)?)?;
        b.a.jmp(if WITH_ERROR.contains(&vector) { with } else { without })?;
        stubs.push(here);
    }
    let options = iced_x86::BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
    let result = b.a.assemble_options(HALF + HARNESS, options)?;
    let at = stubs.iter().map(|l| result.label_ip(l)).collect::<Result<Vec<_>, _>>()?;
    Ok((result.inner.code_buffer, at))
}

/// Guest memory before a batch, as (gpa, bytes).
///
/// # Panics
/// The harness does not assemble, a mistake of this file.
pub fn image() -> &'static [(u64, Vec<u8>)] {
    static IMAGE: OnceLock<Vec<(u64, Vec<u8>)>> = OnceLock::new();
    IMAGE.get_or_init(build)
}

fn build() -> Vec<(u64, Vec<u8>)> {
    let (code, stubs) = code().expect("the harness assembles");
    assert!(code.len() < 0x1_0000, "the harness has {} bytes", code.len());
    let words = |words: &[u64]| words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
    let mut parts = vec![(HARNESS, code)];
    for (idt, plain) in [(IDT, false), (IDT_PLAIN, true)] {
        let mut table = Vec::new();
        for (vector, at) in (0u64..).zip(&stubs) {
            let access: u64 = if vector >= 0x20 || [3, 4].contains(&vector) { 0xee } else { 0x8e };
            let stack = match (vector, plain) {
                (8, _) => 2,
                (_, true) => 0,
                _ => 1,
            };
            table
                .push(at & 0xffff | KERNEL_CS << 16 | stack << 32 | access << 40 | (at >> 16 & 0xffff) << 48);
            table.push(at >> 32);
        }
        parts.push((idt, words(&table)));
    }
    let operand = |at: u64, limit: u64| {
        let mut bytes = limit.to_le_bytes()[..2].to_vec();
        bytes.extend((HALF + at).to_le_bytes());
        bytes.resize(16, 0);
        bytes
    };
    let limit = 16 * VECTORS - 1;
    for (i, (at, limit)) in [(GDT, 255), (GDT_COPY, 255), (IDT, limit), (IDT_PLAIN, limit), (BOOT_GDT, 39)]
        .into_iter()
        .enumerate()
    {
        parts.push((OPERANDS + 16 * i as u64, operand(at, limit)));
    }
    // The same selectors as in a case, and 32-bit supervisor code.
    parts.push((BOOT_GDT, words(&[0, flat(0xa09b), flat(0xc093), flat(0xc09b), flat(0xc0f3)])));
    const ALL: u64 = 0x63;
    let large: Vec<u64> = (0..RAM >> 21).map(|n| n << 21 | ALL | 0x80).collect();
    parts.push((BOOT_ROOT, words(&[(BOOT_ROOT + 0x1000) | ALL])));
    parts.push((BOOT_ROOT + 0x1000, words(&[(BOOT_ROOT + 0x2000) | ALL])));
    parts.push((BOOT_ROOT + 0x2000, words(&large)));
    parts.push((HIGH, words(&[(HIGH + 0x1000) | ALL])));
    parts.push((HIGH + 0x1000, words(&large)));
    for root in [BOOT_ROOT, TABLES[0], TABLES[1]] {
        parts.push((root + 8 * 256, words(&[HIGH | ALL])));
    }
    let mut list = Vec::new();
    for group in ranges() {
        for (at, count) in group {
            list.extend([HALF + at, count]);
        }
        list.push(0);
    }
    parts.push((RANGES, words(&list)));
    let mut random = Random::new(0x7379_7374);
    let template: Vec<u64> = (0..512)
        .map(|_| match random.below(4) {
            0 => DATA + random.below(0x4000),
            1 => random.below(0x100),
            _ => random.integer(),
        })
        .collect();
    parts.push((TEMPLATE, words(&template)));
    parts.push((CODE + 0x300, vec![0xcc; 0xc00]));
    parts.push((BOOT, boot()));
    parts
}

/// 32-bit code, entered with flat segments and paging off: long mode, then
/// the harness.
fn boot() -> Vec<u8> {
    let build = || -> Result<Vec<u8>, IcedError> {
        let mut a = CodeAssembler::new(32)?;
        a.mov(eax, CR4 as u32)?;
        a.mov(cr4, eax)?;
        a.mov(eax, BOOT_ROOT as u32)?;
        a.mov(cr3, eax)?;
        a.mov(ecx, 0xc000_0080u32)?;
        a.mov(eax, EFER as u32)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.mov(eax, CR0 as u32)?;
        a.mov(cr0, eax)?;
        a.assemble(BOOT)
    };
    let mut bytes = build().expect("the boot code assembles");
    // JMP 8:next, then as 64-bit code LGDT at its high address, MOV RAX, entry; JMP RAX.
    let next = BOOT + bytes.len() as u64 + 7;
    bytes.push(0xea);
    bytes.extend((next as u32).to_le_bytes());
    bytes.extend((KERNEL_CS as u16).to_le_bytes());
    bytes.extend([0x0f, 0x01, 0x14, 0x25]);
    bytes.extend((OPERANDS as u32 + 64).to_le_bytes());
    bytes.extend([0x48, 0xb8]);
    bytes.extend(entry().to_le_bytes());
    bytes.extend([0xff, 0xe0]);
    bytes
}

/// Where the harness starts.
pub fn entry() -> u64 {
    HALF + HARNESS
}

const _: () = assert!(CASE_BYTES % 8 == 0 && SUMS.len() + FIRST_SUM <= RECORD);
