//! Programs written by hand, each around one thing that a translator can get
//! wrong for longer than a dozen random instructions last: flags that live
//! across memory accesses, code that changes itself, returns that match no
//! call, faults in the middle of a string.
use crate::arena::{CODE, DATA, DATA_LENGTH, PAGE, STACK, STACK_LENGTH};
use crate::case::Case;
use iced_x86::code_asm::*;
use iced_x86::IcedError;

type Built = Result<CodeAssembler, IcedError>;

/// A program and how it must end.
pub struct Program {
    /// What it is about.
    pub name: &'static str,
    /// Code and state.
    pub case: Case,
    /// Exception that ends it; None when it runs to its INT3.
    pub fault: Option<u8>,
    /// What rax must be in the end, where it is known.
    pub rax: Option<u64>,
}

fn program(name: &'static str, at: u64, build: fn() -> Built) -> Program {
    // The NOP gives a label at the end something to stand on.
    let code = build().and_then(|mut assembler| {
        assembler.nop()?;
        assembler.assemble(at)
    });
    let code = code.unwrap_or_else(|e| panic!("{name}: {e}"));
    let mut case = Case::new(at, vec![code]);
    case.state.gpr[3] = DATA;
    case.state.gpr[6] = DATA + 0x1000;
    case.state.gpr[7] = DATA + 0x2000;
    Program { name, case, fault: None, rax: None }
}

/// All programs.
pub fn all() -> Vec<Program> {
    let mut programs = vec![
        program("flags across memory accesses", CODE, flags_across_memory),
        program("flags by number", CODE, flags_by_number),
        Program { rax: Some(0x300), ..program("adc chain through memory", CODE, adc_chain) },
        Program { rax: Some(0x1234_5678), ..program("store into the next instruction", CODE, store_next) },
        Program { rax: Some(5050), ..program("loop that rewrites itself", CODE, store_own_loop) },
        program("function rewritten between calls", CODE, rewritten_function),
        program("constants written over", CODE, constants_written_over),
        program("function that rewrites its caller", CODE + 0x40, rewritten_caller),
        program("data across pages", CODE, data_across_pages),
        Program { rax: Some(6), ..program("returns that match no call", CODE, odd_returns) },
        program("jump into an instruction", CODE, into_instruction),
        program("ten thousand mixed operations", CODE, mixed_loop),
        program("hash kernel", CODE, hash_kernel),
        program("overlapping strings", CODE, strings),
        program("x87 stack", CODE, x87_stack),
        Program { rax: Some(610), ..program("recursion", CODE, recursion) },
        program("jump table", CODE, jump_table),
        program("partial registers", CODE, partial_registers),
        Program { fault: Some(14), ..program("string into the guard page", CODE, string_fault) },
        Program { fault: Some(14), ..program("push below the stack", CODE, stack_fault) },
        Program { fault: Some(0), ..program("division overflow in a loop", CODE, divide_fault) },
        program("vectors in a loop", CODE, vector_loop),
        program("shifts by every count", CODE, shifts),
        program("compare and exchange", CODE, exchange),
    ];
    // Every way in which a page end can cut these instructions.
    for back in 1..32 {
        programs.push(Program {
            rax: Some(0x8899),
            ..program("code across pages", CODE + PAGE - back, code_across_pages)
        });
    }
    programs
}

/// Each arithmetic result's flags, read after loads, stores and address
/// arithmetic that must not touch them.
fn flags_across_memory() -> Built {
    let mut a = CodeAssembler::new(64)?;
    let mut top = a.create_label();
    a.xor(ecx, ecx)?;
    a.mov(rax, 0x7fff_ffff_ffff_ff80u64)?;
    a.set_label(&mut top)?;
    a.add(rax, qword_ptr(rsi + rcx * 8))?;
    a.mov(rdx, qword_ptr(rsi + rcx * 8 + 8))?;
    a.mov(qword_ptr(rdi + rcx * 8), rdx)?;
    a.lea(r8, qword_ptr(rdx + rax + 1))?;
    a.seto(byte_ptr(rbx))?;
    a.setc(byte_ptr(rbx + 1))?;
    a.setp(byte_ptr(rbx + 2))?;
    a.sets(byte_ptr(rbx + 3))?;
    a.cmovle(r9, qword_ptr(rsi + rcx * 8))?;
    a.push(r8)?;
    a.sbb(r10, qword_ptr(rsi + rcx * 8 + 16))?;
    a.pop(r11)?;
    a.pushfq()?;
    a.pop(qword_ptr(rbx + 8))?;
    a.adc(r12, qword_ptr(rbx + 8))?;
    a.rcl(dword_ptr(rbx + 16), 1)?;
    a.mov(r14d, dword_ptr(rbx + 16))?;
    a.adc(qword_ptr(rbx + 24), r14)?;
    a.setbe(r13b)?;
    a.xor(qword_ptr(rbx + 32), r12)?;
    a.inc(ecx)?;
    a.cmp(ecx, 100)?;
    a.jne(top)?;
    Ok(a)
}

/// LAHF, SAHF and POPF of every value of the flags, and every condition.
fn flags_by_number() -> Built {
    let mut a = CodeAssembler::new(64)?;
    let mut top = a.create_label();
    a.xor(ecx, ecx)?;
    a.set_label(&mut top)?;
    a.mov(eax, ecx)?;
    a.and(eax, 0xfff)?;
    a.and(eax, 0x8d5)?;
    a.or(eax, 0x202)?;
    a.push(rax)?;
    a.popfq()?;
    a.seto(dl)?;
    a.mov(byte_ptr(rdi + rcx), dl)?;
    a.setl(dh)?;
    a.adc(dl, dh)?;
    a.pushfq()?;
    a.pop(r8)?;
    a.mov(ah, cl)?;
    a.sahf()?;
    a.setbe(r9b)?;
    a.setnp(byte_ptr(rsi + rcx))?;
    a.lahf()?;
    a.add(byte_ptr(rsi + rcx), ah)?;
    a.xor(r10, r8)?;
    a.rol(r10, 3)?;
    a.inc(ecx)?;
    a.cmp(ecx, 0x1000)?;
    a.jne(top)?;
    Ok(a)
}

/// A carry that runs through 256 words in memory; DEC and LEA keep it.
fn adc_chain() -> Built {
    let mut a = CodeAssembler::new(64)?;
    let (mut fill, mut top, mut done) = (a.create_label(), a.create_label(), a.create_label());
    a.mov(ecx, 256)?;
    a.set_label(&mut fill)?;
    a.mov(qword_ptr(rsi + rcx * 8 - 8), -1)?;
    a.mov(qword_ptr(rdi + rcx * 8 - 8), 1)?;
    a.loop_(fill)?;
    a.xor(eax, eax)?;
    a.mov(ecx, 256)?;
    a.clc()?;
    a.set_label(&mut top)?;
    a.mov(rdx, qword_ptr(rsi))?;
    a.adc(qword_ptr(rdi), rdx)?;
    a.lea(rsi, qword_ptr(rsi + 8))?;
    a.lea(rdi, qword_ptr(rdi + 8))?;
    a.adc(rax, 2)?;
    // The carry out of the sum is 1 each time; put it back.
    a.stc()?;
    a.dec(ecx)?;
    a.jrcxz(done)?;
    a.jmp(top)?;
    a.set_label(&mut done)?;
    Ok(a)
}

/// The immediate of the very next instruction.
fn store_next() -> Built {
    let mut a = CodeAssembler::new(64)?;
    let mut target = a.create_label();
    a.lea(rdx, ptr(target))?;
    a.mov(dword_ptr(rdx + 1), 0x1234_5678)?;
    a.set_label(&mut target)?;
    a.mov(eax, 1)?;
    Ok(a)
}

/// Adds 1, 2, ... 100 by counting up its own immediate.
fn store_own_loop() -> Built {
    let mut a = CodeAssembler::new(64)?;
    let (mut top, mut add) = (a.create_label(), a.create_label());
    a.xor(eax, eax)?;
    a.mov(ecx, 100)?;
    a.lea(rdx, ptr(add))?;
    a.set_label(&mut top)?;
    a.inc(dword_ptr(rdx + 1))?;
    a.set_label(&mut add)?;
    // add eax, imm32 in its short form: opcode, then the immediate
    a.db(&[0x05, 0, 0, 0, 0])?;
    a.dec(ecx)?;
    a.jnz(top)?;
    Ok(a)
}

/// A function on another page, written anew for each of 60 calls.
fn rewritten_function() -> Built {
    let mut a = CodeAssembler::new(64)?;
    let mut top = a.create_label();
    a.mov(r8d, (CODE + 0x2000) as u32)?;
    a.mov(r9d, (CODE + 0x2ffe) as u32)?;
    a.xor(ecx, ecx)?;
    a.xor(eax, eax)?;
    a.set_label(&mut top)?;
    // add eax, imm8; rol eax, 1; ret
    a.mov(word_ptr(r8), 0xc083)?;
    a.mov(byte_ptr(r8 + 2), cl)?;
    a.mov(dword_ptr(r8 + 3), 0x00c3_c0d1)?;
    a.call(r8)?;
    a.call(r8)?;
    // And one that lies across a page end: xor eax, imm32; ret
    a.mov(byte_ptr(r9), 0x35)?;
    a.mov(dword_ptr(r9 + 1), eax)?;
    a.ror(dword_ptr(r9 + 1), cl)?;
    a.mov(byte_ptr(r9 + 5), 0xc3u32 as i32)?;
    a.call(r9)?;
    a.mov(dword_ptr(rdi + rcx * 4), eax)?;
    a.inc(ecx)?;
    a.cmp(ecx, 60)?;
    a.jne(top)?;
    Ok(a)
}

/// A function whose code stays what it is but for its constants, among them those
/// of comparisons and sums whose flags live across a load.
fn constants_written_over() -> Built {
    const FUNCTION: [u8; 48] = [
        0xb8, 0, 0, 0, 0, // mov eax, imm32
        0x05, 0, 0, 0, 0, // add eax, imm32
        0x8b, 0x0e, // mov ecx, [rsi]
        0x41, 0x0f, 0x92, 0xc2, // setb r10b
        0x2d, 0, 0, 0, 0, // sub eax, imm32
        0x8b, 0x0e, // mov ecx, [rsi]
        0x41, 0x0f, 0x90, 0xc3, // seto r11b
        0x3d, 0, 0, 0, 0, // cmp eax, imm32
        0x8b, 0x0e, // mov ecx, [rsi]
        0x0f, 0x9c, 0xc2, // setl dl
        0x49, 0xbd, 0, 0, 0, 0, 0, 0, 0, 0,    // mov r13, imm64
        0xc3, // ret
    ];
    let mut a = CodeAssembler::new(64)?;
    let mut top = a.create_label();
    a.mov(r8d, (CODE + 0x2000) as u32)?;
    for (n, chunk) in FUNCTION.chunks(8).enumerate() {
        let mut bytes = [0; 8];
        bytes[..chunk.len()].copy_from_slice(chunk);
        a.mov(r9, u64::from_le_bytes(bytes))?;
        a.mov(qword_ptr(r8 + 8 * n), r9)?;
    }
    a.mov(r12d, 64)?;
    a.mov(r14, 0x9e37_79b9_7f4a_7c15u64)?;
    a.xor(r15d, r15d)?;
    a.xor(edx, edx)?;
    a.set_label(&mut top)?;
    for at in [1, 6, 17, 28] {
        a.imul_3(r14, r14, 0x2c1b_3c6d)?;
        a.add(r14, 0x1234_5677)?;
        a.mov(r9, r14)?;
        a.shr(r9, 24)?;
        a.mov(dword_ptr(r8 + at), r9d)?;
    }
    a.mov(qword_ptr(r8 + 39), r14)?;
    for _ in 0..2 {
        a.call(r8)?;
        a.add(r15, rax)?;
        a.add(r15, r13)?;
        a.rol(r15, 7)?;
        a.xor(r15b, r10b)?;
        a.rol(r15, 1)?;
        a.xor(r15b, r11b)?;
        a.rol(r15, 1)?;
        a.xor(r15b, dl)?;
    }
    a.dec(r12d)?;
    a.jne(top)?;
    a.mov(qword_ptr(rdi), r15)?;
    Ok(a)
}

/// A function that changes the instruction behind the call to it.
fn rewritten_caller() -> Built {
    let mut a = CodeAssembler::new(64)?;
    let (mut top, mut function, mut start) = (a.create_label(), a.create_label(), a.create_label());
    a.jmp(start)?;
    a.set_label(&mut function)?;
    a.mov(rdx, qword_ptr(rsp))?;
    // mov eax, imm32 there
    a.mov(dword_ptr(rdx + 1), ecx)?;
    a.ret()?;
    a.set_label(&mut start)?;
    a.mov(ecx, 50)?;
    a.set_label(&mut top)?;
    a.call(function)?;
    a.mov(eax, -1)?;
    a.mov(dword_ptr(rdi + rcx * 4), eax)?;
    a.dec(ecx)?;
    a.jnz(top)?;
    Ok(a)
}

/// A few long instructions; the caller places a page end among them.
fn code_across_pages() -> Built {
    let mut a = CodeAssembler::new(64)?;
    let mut top = a.create_label();
    a.mov(ecx, 3)?;
    a.set_label(&mut top)?;
    a.mov(rax, 0x1122_3344_5566_7788u64)?;
    a.mov(dword_ptr(rbx + rcx * 4 + 0x100), 0x8899)?;
    a.movzx(eax, word_ptr(rbx + rcx * 4 + 0x100))?;
    a.dec(ecx)?;
    a.jnz(top)?;
    Ok(a)
}

/// Loads, stores and read-modify-writes of every size at every byte around a
/// page end.
fn data_across_pages() -> Built {
    let mut a = CodeAssembler::new(64)?;
    let mut top = a.create_label();
    a.lea(r8, qword_ptr(rbx + PAGE as i32 - 34))?;
    a.mov(ecx, 66)?;
    a.set_label(&mut top)?;
    a.mov(rax, qword_ptr(r8))?;
    a.add(qword_ptr(r8 + 1), rax)?;
    a.adc(dword_ptr(r8), eax)?;
    a.xchg(qword_ptr(r8), rax)?;
    a.lock().add(dword_ptr(r8 + 2), edx)?;
    a.lock().xadd(qword_ptr(r8), rdx)?;
    a.movups(xmm0, xmmword_ptr(r8))?;
    a.paddb(xmm1, xmm0)?;
    a.movdqu(xmmword_ptr(r8 + 3), xmm1)?;
    a.bts(dword_ptr(r8), ecx)?;
    a.setc(byte_ptr(r8 + 5))?;
    a.push(qword_ptr(r8))?;
    a.pop(qword_ptr(r8 + 6))?;
    a.fld(tword_ptr(r8))?;
    a.fstp(tword_ptr(r8 + 4))?;
    a.movbe(r9, qword_ptr(r8))?;
    a.crc32(r10, qword_ptr(r8))?;
    a.inc(r8)?;
    a.dec(ecx)?;
    a.jnz(top)?;
    Ok(a)
}

/// RET to a pushed address, to a changed one, past a dropped one, twice to the
/// same place.
fn odd_returns() -> Built {
    let mut a = CodeAssembler::new(64)?;
    let [mut one, mut two, mut three, mut four, mut skip, mut end] = [(); 6].map(|()| a.create_label());
    a.xor(eax, eax)?;
    // Return address made by hand.
    a.lea(rdx, ptr(one))?;
    a.push(rdx)?;
    a.ret()?;
    a.int3()?;
    a.set_label(&mut one)?;
    a.inc(eax)?;
    // The callee moves its return address on by one instruction.
    a.call(two)?;
    a.int3()?;
    a.inc(eax)?;
    // The callee drops its own return address and returns for its caller.
    a.call(three)?;
    a.inc(eax)?;
    // RET with an operand drops arguments.
    a.push(1)?;
    a.push(2)?;
    a.call(skip)?;
    a.inc(eax)?;
    a.jmp(end)?;
    a.set_label(&mut two)?;
    a.inc(qword_ptr(rsp))?;
    a.ret()?;
    a.set_label(&mut three)?;
    a.call(four)?;
    a.int3()?;
    a.set_label(&mut four)?;
    a.add(rsp, 8)?;
    a.inc(eax)?;
    a.ret()?;
    a.set_label(&mut skip)?;
    a.inc(eax)?;
    a.ret_1(16)?;
    a.set_label(&mut end)?;
    Ok(a)
}

/// The same bytes read in two ways.
fn into_instruction() -> Built {
    let mut a = CodeAssembler::new(64)?;
    let (mut top, mut first) = (a.create_label(), a.create_label());
    a.mov(ecx, 40)?;
    a.xor(eax, eax)?;
    a.lea(rdx, ptr(first))?;
    a.set_label(&mut top)?;
    a.mov(r8d, ecx)?;
    a.and(r8d, 1)?;
    a.add(r8, rdx)?;
    a.jmp(r8)?;
    a.set_label(&mut first)?;
    // From 0: test al, 40h; inc eax. From 1: rex inc eax.
    a.db(&[0xa8, 0x40, 0xff, 0xc0])?;
    a.nop()?;
    a.imul_3(eax, eax, 17)?;
    a.mov(dword_ptr(rdi + rcx * 4), eax)?;
    a.dec(ecx)?;
    a.jnz(top)?;
    Ok(a)
}

/// Multiplications, divisions, bit scans and memory in ten thousand rounds.
fn mixed_loop() -> Built {
    let mut a = CodeAssembler::new(64)?;
    let mut top = a.create_label();
    a.mov(ecx, 10_000)?;
    a.mov(r8, 0x9e37_79b9_7f4a_7c15u64)?;
    a.mov(r15, 6364136223846793005u64)?;
    a.set_label(&mut top)?;
    a.mov(rax, r8)?;
    a.mul(r15)?;
    a.lea(r8, qword_ptr(rax + rdx + 1))?;
    a.mov(r9, r8)?;
    a.shr(r9, 52)?;
    a.and(r9d, 0xff8)?;
    a.xor(qword_ptr(rsi + r9), r8)?;
    a.mov(eax, r8d)?;
    a.cdq()?;
    a.mov(r10d, ecx)?;
    a.or(r10d, 3)?;
    a.idiv(r10d)?;
    a.add(qword_ptr(rdi + r9), rdx)?;
    a.adc(r11, rax)?;
    a.bsr(r12, r8)?;
    a.cmovz(r12, rcx)?;
    a.xchg(cl, r12b)?;
    a.rol(r13, cl)?;
    a.shrd(r14, r13, cl)?;
    a.xchg(cl, r12b)?;
    a.popcnt(rax, r14)?;
    a.bt(r8, rcx)?;
    a.sbb(rbp, rax)?;
    a.test(r8d, 0x10)?;
    a.setne(al)?;
    a.movsx(eax, al)?;
    a.sub(r13, rax)?;
    a.bswap(r13)?;
    a.dec(ecx)?;
    a.jnz(top)?;
    Ok(a)
}

/// 64 rounds on eight words held in registers, 40 times, keys from memory.
fn hash_kernel() -> Built {
    let mut a = CodeAssembler::new(64)?;
    let (mut block, mut round) = (a.create_label(), a.create_label());
    let [va, vb, vc, vd, ve, vf, vg, vh] = [eax, ebx, ebp, edx, r8d, r9d, r10d, r11d];
    a.mov(r14d, 40)?;
    a.set_label(&mut block)?;
    a.xor(ecx, ecx)?;
    a.set_label(&mut round)?;
    a.mov(r12d, ve)?;
    a.ror(r12d, 14)?;
    a.xor(r12d, ve)?;
    a.ror(r12d, 5)?;
    a.mov(r13d, vf)?;
    a.xor(r13d, vg)?;
    a.and(r13d, ve)?;
    a.xor(r13d, vg)?;
    a.xor(r12d, ve)?;
    a.ror(r12d, 6)?;
    a.add(vh, dword_ptr(rsi + rcx * 4))?;
    a.add(vh, r12d)?;
    a.add(vh, r13d)?;
    a.add(vd, vh)?;
    a.mov(r12d, va)?;
    a.xor(r12d, vb)?;
    a.and(r12d, vc)?;
    a.rol(va, 7)?;
    a.add(vh, r12d)?;
    a.xchg(vh, vg)?;
    a.xchg(vg, vf)?;
    a.xchg(vf, ve)?;
    a.xchg(ve, vd)?;
    a.xchg(vd, vc)?;
    a.xchg(vc, vb)?;
    a.xchg(vb, va)?;
    a.mov(dword_ptr(rdi + rcx * 4), va)?;
    a.inc(ecx)?;
    a.cmp(ecx, 64)?;
    a.jb(round)?;
    a.dec(r14d)?;
    a.jnz(block)?;
    Ok(a)
}

/// Moves onto themselves in both directions, fills, compares, scans.
fn strings() -> Built {
    let mut a = CodeAssembler::new(64)?;
    a.mov(rsi, DATA + 0x100)?;
    a.lea(rdi, qword_ptr(rsi + 1))?;
    a.mov(ecx, 300)?;
    a.rep().movsb()?;
    a.mov(rsi, DATA + 0x1ff8)?;
    a.lea(rdi, qword_ptr(rsi + 3))?;
    a.mov(ecx, 20)?;
    a.rep().movsq()?;
    a.std()?;
    a.mov(rsi, DATA + 0x3008)?;
    a.lea(rdi, qword_ptr(rsi + 8))?;
    a.mov(ecx, 100)?;
    a.rep().movsd()?;
    a.mov(rdi, DATA + 0x4001)?;
    a.mov(eax, 0x1234_5678)?;
    a.mov(ecx, 9)?;
    a.rep().stosw()?;
    a.lodsb()?;
    a.cld()?;
    a.mov(rdi, DATA + 0x100)?;
    a.mov(al, byte_ptr(rdi))?;
    a.mov(ecx, 1000)?;
    a.repe().scasb()?;
    a.pushfq()?;
    a.pop(r8)?;
    a.mov(r9, rdi)?;
    a.mov(rsi, DATA + 0x100)?;
    a.mov(rdi, DATA + 0x140)?;
    a.mov(ecx, 1000)?;
    a.repe().cmpsb()?;
    a.setb(r10b)?;
    a.mov(r11, rcx)?;
    a.repne().cmpsd()?;
    a.mov(r12, rsi)?;
    // Nothing to do leaves everything, flags too.
    a.xor(ecx, ecx)?;
    a.stc()?;
    a.repne().scasq()?;
    a.rep().movsq()?;
    a.pushfq()?;
    a.pop(r13)?;
    // 32-bit counters and pointers.
    a.mov(rcx, 0x1_0000_0004u64)?;
    a.db(&[0x67, 0xf3, 0xa5])?;
    Ok(a)
}

/// Constants, transcendental functions, overflow and underflow of the stack,
/// every store.
fn x87_stack() -> Built {
    let mut a = CodeAssembler::new(64)?;
    let mut top = a.create_label();
    a.fninit()?;
    a.mov(ecx, 20)?;
    a.set_label(&mut top)?;
    a.mov(dword_ptr(rbx), ecx)?;
    a.fldpi()?;
    a.fild(dword_ptr(rbx))?;
    a.fdivp(st1, st0)?;
    a.fld(st0)?;
    a.fsin()?;
    a.fxch(st0, st1)?;
    a.fcos()?;
    a.fsqrt()?;
    a.fyl2x()?;
    a.fst(qword_ptr(rdi + rcx * 8))?;
    a.frndint()?;
    a.fistp(word_ptr(rdi + rcx * 2 + 0x200))?;
    a.fld1()?;
    a.fldl2e()?;
    a.fucomip(st0, st1)?;
    a.seta(byte_ptr(rsi + rcx))?;
    a.fcmovbe(st0, st3)?;
    a.fnstsw(ax)?;
    a.mov(word_ptr(rsi + rcx * 2 + 0x100), ax)?;
    a.fbstp(tword_ptr(rsi + 0x300))?;
    // One more stays than goes: the stack overflows in the end.
    a.fldz()?;
    a.dec(ecx)?;
    a.jnz(top)?;
    a.fstp(tword_ptr(rsi + 0x400))?;
    a.fnstcw(word_ptr(rsi + 0x420))?;
    Ok(a)
}

/// Fibonacci the slow way.
fn recursion() -> Built {
    let mut a = CodeAssembler::new(64)?;
    let [mut fib, mut small, mut end] = [(); 3].map(|()| a.create_label());
    a.mov(edi, 15)?;
    a.call(fib)?;
    a.jmp(end)?;
    a.set_label(&mut fib)?;
    a.push(rbp)?;
    a.mov(rbp, rsp)?;
    a.sub(rsp, 16)?;
    a.mov(eax, edi)?;
    a.cmp(edi, 2)?;
    a.jb(small)?;
    a.mov(dword_ptr(rbp - 4), edi)?;
    a.dec(edi)?;
    a.call(fib)?;
    a.mov(dword_ptr(rbp - 8), eax)?;
    a.mov(edi, dword_ptr(rbp - 4))?;
    a.sub(edi, 2)?;
    a.call(fib)?;
    a.add(eax, dword_ptr(rbp - 8))?;
    a.set_label(&mut small)?;
    a.leave()?;
    a.ret()?;
    a.set_label(&mut end)?;
    Ok(a)
}

/// An interpreter's loop: one indirect jump, four targets.
fn jump_table() -> Built {
    let mut a = CodeAssembler::new(64)?;
    let [mut next, mut end, mut l0, mut l1, mut l2, mut l3] = [(); 6].map(|()| a.create_label());
    for (i, label) in [l0, l1, l2, l3].into_iter().enumerate() {
        a.lea(rdx, ptr(label))?;
        a.mov(qword_ptr(rbx + 8 * i as i32), rdx)?;
    }
    a.mov(ecx, 2000)?;
    a.xor(eax, eax)?;
    a.set_label(&mut next)?;
    a.dec(ecx)?;
    a.js(end)?;
    a.movzx(edx, byte_ptr(rsi + rcx))?;
    a.and(edx, 3)?;
    a.jmp(qword_ptr(rbx + rdx * 8))?;
    a.set_label(&mut l0)?;
    a.add(rax, rcx)?;
    a.jmp(next)?;
    a.set_label(&mut l1)?;
    a.rol(rax, 5)?;
    a.jmp(next)?;
    a.set_label(&mut l2)?;
    a.xor(rax, rcx)?;
    a.jmp(next)?;
    a.set_label(&mut l3)?;
    a.lea(rax, qword_ptr(rax + rax * 4 + 1))?;
    a.jmp(next)?;
    a.set_label(&mut end)?;
    Ok(a)
}

/// Bytes and words of registers, high bytes among them.
fn partial_registers() -> Built {
    let mut a = CodeAssembler::new(64)?;
    let mut top = a.create_label();
    a.mov(rax, 0x0123_4567_89ab_cdefu64)?;
    a.mov(rdx, rax)?;
    a.mov(ecx, 500)?;
    a.set_label(&mut top)?;
    a.add(ah, al)?;
    a.adc(dh, ah)?;
    a.mov(bh, dl)?;
    a.xor(bl, bh)?;
    a.mov(byte_ptr(rdi + rcx), ah)?;
    a.sub(dl, byte_ptr(rsi + rcx))?;
    a.mov(ax, dx)?;
    a.movzx(ebp, ah)?;
    a.movsx(r9w, bl)?;
    a.xchg(dh, al)?;
    a.mul(dh)?;
    a.rol(dx, 3)?;
    a.mov(ch, 0u32 as i32)?;
    a.neg(sil)?;
    a.neg(sil)?;
    a.bswap(edx)?;
    a.cbw()?;
    a.mov(bl, 0u32 as i32)?;
    a.mov(bh, 0u32 as i32)?;
    a.dec(cl)?;
    a.jnz(top)?;
    Ok(a)
}

/// REP MOVSD that starts well and runs off the data; the registers tell how
/// far it came.
fn string_fault() -> Built {
    let mut a = CodeAssembler::new(64)?;
    a.mov(rdi, DATA + DATA_LENGTH - 0x102)?;
    a.mov(ecx, 0x400)?;
    a.rep().movsd()?;
    Ok(a)
}

/// PUSHes until the guard page below the stack is hit.
fn stack_fault() -> Built {
    let mut a = CodeAssembler::new(64)?;
    let mut top = a.create_label();
    a.mov(rsp, STACK + STACK_LENGTH / 4)?;
    a.set_label(&mut top)?;
    a.push(rsp)?;
    a.push(-3)?;
    a.pushfq()?;
    a.call(top)?;
    Ok(a)
}

/// A quotient that outgrows its register after some rounds.
fn divide_fault() -> Built {
    let mut a = CodeAssembler::new(64)?;
    let mut top = a.create_label();
    a.mov(r8d, 1000)?;
    a.mov(ecx, 900)?;
    a.xor(edx, edx)?;
    a.set_label(&mut top)?;
    a.mov(eax, 77)?;
    a.div(r8d)?;
    a.add(edx, ecx)?;
    a.mov(dword_ptr(rdi + rcx * 4), eax)?;
    a.inc(ecx)?;
    a.jmp(top)?;
    Ok(a)
}

/// Integer and floating-point vectors through memory at changing alignment.
fn vector_loop() -> Built {
    let mut a = CodeAssembler::new(64)?;
    let mut top = a.create_label();
    a.mov(ecx, 600)?;
    a.set_label(&mut top)?;
    a.movdqu(xmm0, xmmword_ptr(rsi + rcx))?;
    a.movaps(xmm1, xmmword_ptr(rbx))?;
    a.paddd(xmm2, xmm0)?;
    a.pmuludq(xmm3, xmm0)?;
    a.pshufb(xmm2, xmm1)?;
    a.cvtdq2ps(xmm4, xmm0)?;
    a.mulps(xmm4, xmm4)?;
    a.addps(xmm5, xmm4)?;
    a.sqrtps(xmm6, xmm5)?;
    a.movups(xmmword_ptr(rdi + rcx), xmm6)?;
    a.pmovmskb(eax, xmm2)?;
    a.cvtsi2sd(xmm7, rcx)?;
    a.divsd(xmm7, qword_ptr(rsi + rcx))?;
    a.ucomisd(xmm7, xmm4)?;
    a.setp(byte_ptr(rbx + 32))?;
    a.pinsrw(xmm3, eax, 3)?;
    a.movq(mm1, rax)?;
    a.paddw(mm1, qword_ptr(rbx))?;
    a.movq(qword_ptr(rbx + 40), mm1)?;
    a.emms()?;
    a.dec(ecx)?;
    a.jnz(top)?;
    Ok(a)
}

/// Shifts and rotates by 0 to 79: flags stay when the masked count is 0.
fn shifts() -> Built {
    let mut a = CodeAssembler::new(64)?;
    let mut top = a.create_label();
    a.mov(rax, 0x8123_4567_89ab_cde1u64)?;
    a.mov(ecx, 79)?;
    a.set_label(&mut top)?;
    macro_rules! flags {
        () => {
            a.pushfq()?;
            a.pop(r8)?;
            a.add(r9, r8)?;
            a.rol(r9, 7)?;
            a.bt(r9, 3)?;
        };
    }
    a.shl(al, cl)?;
    flags!();
    a.rcr(ax, cl)?;
    flags!();
    a.sar(qword_ptr(rsi), cl)?;
    flags!();
    a.rcl(dword_ptr(rsi + 8), cl)?;
    flags!();
    a.shld(rdx, rax, cl)?;
    flags!();
    a.shrd(dword_ptr(rsi + 16), eax, cl)?;
    flags!();
    a.rol(ah, cl)?;
    flags!();
    a.ror(rax, cl)?;
    flags!();
    a.mov(dword_ptr(rdi + rcx * 4), r9d)?;
    a.dec(ecx)?;
    a.jns(top)?;
    Ok(a)
}

/// CMPXCHG in every size, taken and not.
fn exchange() -> Built {
    let mut a = CodeAssembler::new(64)?;
    let (mut top, mut not) = (a.create_label(), a.create_label());
    a.mov(ecx, 200)?;
    a.set_label(&mut top)?;
    a.mov(eax, dword_ptr(rsi))?;
    a.test(ecx, 1)?;
    a.jz(not)?;
    a.inc(eax)?;
    a.set_label(&mut not)?;
    a.lock().cmpxchg(dword_ptr(rsi), ecx)?;
    a.setz(byte_ptr(rdi + rcx))?;
    a.cmpxchg(byte_ptr(rsi + 9), cl)?;
    a.setz(byte_ptr(rdi + rcx + 256))?;
    a.mov(rax, qword_ptr(rbx))?;
    a.mov(rdx, qword_ptr(rbx + 8))?;
    a.push(rbx)?;
    a.push(rcx)?;
    a.mov(r10, rbx)?;
    a.lea(rbx, qword_ptr(rax + 1))?;
    a.lock().cmpxchg16b(xmmword_ptr(r10))?;
    a.pop(rcx)?;
    a.pop(rbx)?;
    a.setz(byte_ptr(rdi + rcx + 512))?;
    a.lock().xadd(qword_ptr(rbx + 16), rax)?;
    a.xchg(qword_ptr(rbx + 24), rdx)?;
    a.dec(ecx)?;
    a.jnz(top)?;
    Ok(a)
}
