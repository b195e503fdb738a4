//! Code that one processor writes and another runs. The translator promises more
//! than the manual: what was stored is what runs, without serialising.
use crate::machine::{done_with, meet, wait_for, Begin, Built, Machine, CODE, DATA};
use bunshin_core::Engine;
use iced_x86::code_asm::*;

const MET: u64 = DATA + 0x8000;
/// Functions that are rewritten, away from the code that does it.
const FUNCTIONS: u64 = CODE + 0x4000;
/// Versions that were published, a dword for each function.
const VERSIONS: u64 = DATA + 0x1000;

/// `mov eax, imm32; ret`
fn function(m: &Machine, at: u64, value: u32) {
    let [a, b, c, d] = value.to_le_bytes();
    assert!(m.engine.write(at, &[0xb8, a, b, c, d, 0xc3]));
}

/// One processor raises the immediates of `count` functions `stride` bytes apart,
/// the first at `first`, one after the other and publishes each; the other calls
/// them and must never get less than what was published before the call. Where an
/// immediate spans pages only the byte at `offset` of it is written.
fn raised_immediates(
    first: u64,
    count: u32,
    stride: u32,
    raises: u32,
    offset: Option<u64>,
    begin: fn(u64) -> Begin,
) {
    let m = Machine::beginning(2, begin(CODE));
    for n in 0..u64::from(count) {
        function(&m, first + n * u64::from(stride), 0);
    }
    m.code(CODE, |a| {
        let (mut writer, mut top, mut each, mut old) =
            (a.create_label(), a.create_label(), a.create_label(), a.create_label());
        a.mov(ebx, 1)?;
        meet(a, MET, ebx, 2)?;
        a.test(edi, edi)?;
        a.jne(writer)?;
        a.set_label(&mut top)?;
        a.xor(esi, esi)?;
        a.mov(rbp, first)?;
        a.set_label(&mut each)?;
        a.mov(r12d, dword_ptr(rsi * 4 + VERSIONS))?;
        a.call(rbp)?;
        a.cmp(eax, r12d)?;
        a.jb(old)?;
        a.add(rbp, stride as i32)?;
        a.inc(esi)?;
        a.cmp(esi, count)?;
        a.jb(each)?;
        a.cmp(dword_ptr(VERSIONS + 4 * u64::from(count - 1)), raises)?;
        a.jb(top)?;
        done_with(a, 1)?;
        a.set_label(&mut old)?;
        done_with(a, 2)?;

        a.set_label(&mut writer)?;
        a.mov(ecx, 1)?;
        let (mut raise, mut next) = (a.create_label(), a.create_label());
        a.set_label(&mut raise)?;
        a.xor(esi, esi)?;
        a.mov(rbp, first + 1)?;
        a.set_label(&mut next)?;
        match offset {
            None => a.mov(dword_ptr(rbp), ecx)?,
            Some(n) => a.mov(byte_ptr(rbp + n), cl)?,
        }
        match offset {
            None => a.mov(dword_ptr(rsi * 4 + VERSIONS), ecx)?,
            Some(n) => {
                a.mov(eax, ecx)?;
                a.shl(eax, 8 * n as u32)?;
                a.mov(dword_ptr(rsi * 4 + VERSIONS), eax)?;
            }
        }
        a.add(rbp, stride as i32)?;
        a.inc(esi)?;
        a.cmp(esi, count)?;
        a.jb(next)?;
        a.inc(ecx)?;
        a.cmp(ecx, raises + 1)?;
        a.jb(raise)?;
        // The last round is published as large enough whatever the offset.
        a.mov(dword_ptr(VERSIONS + 4 * u64::from(count - 1)), raises)?;
        done_with(a, 1)
    });
    assert_eq!(m.run(&[begin(CODE); 2]), [1, 1]);
    let last = m.word(first + 1 + u64::from(count - 1) * u64::from(stride)) as u32;
    assert_eq!(last, raises << (8 * offset.unwrap_or(0)));
}

#[test]
fn a_raised_immediate() {
    raised_immediates(FUNCTIONS, 1, 64, 3000, None, Begin::Supervisor);
    raised_immediates(FUNCTIONS, 1, 64, 3000, None, Begin::User);
}

#[test]
fn many_functions_translated_while_they_are_rewritten() {
    raised_immediates(FUNCTIONS, 60, 64, 60, None, Begin::Supervisor);
    raised_immediates(FUNCTIONS, 60, 64, 30, None, Begin::User);
    // One a page, and in the pages of the code that calls them.
    raised_immediates(FUNCTIONS, 40, 4096, 60, None, Begin::User);
    raised_immediates(CODE + 0x800, 6, 64, 60, None, Begin::Supervisor);
}

#[test]
fn an_immediate_in_the_second_page_of_its_instruction() {
    // Opcode in one page, immediate in the next.
    raised_immediates(FUNCTIONS + 0xfff, 1, 64, 1500, None, Begin::Supervisor);
    // Cut through the immediate: a byte of it on either side.
    raised_immediates(FUNCTIONS + 0xffd, 1, 64, 255, Some(1), Begin::Supervisor);
    raised_immediates(FUNCTIONS + 0xffd, 1, 64, 255, Some(2), Begin::User);
}

/// As kernels patch: a breakpoint first, then the tail, then the first byte. The
/// other processor runs the old, the new or the breakpoint, never a mix.
#[test]
fn patched_under_a_breakpoint() {
    let m = Machine::new(2);
    let site = FUNCTIONS + 0x123;
    let handler = CODE + 0x2000;
    m.gate(3, handler);
    // Behind the site: what each of the two jumps leads to.
    let (one, two) = (FUNCTIONS + 0x200, FUNCTIONS + 0x300);
    function(&m, one, 1);
    function(&m, two, 2);
    let jump = |to: u64| {
        let mut b = [0xe9, 0, 0, 0, 0];
        b[1..].copy_from_slice(&((to - site - 5) as u32).to_le_bytes());
        b
    };
    assert!(m.engine.write(site, &jump(one)));
    // The breakpoint stands for `mov eax, 3; ret`.
    m.code(handler, |a| {
        a.mov(eax, 3)?;
        a.mov(r11, qword_ptr(rsp + 24))?;
        a.mov(r10, qword_ptr(r11))?;
        a.mov(qword_ptr(rsp), r10)?;
        a.add(r11, 8)?;
        a.mov(qword_ptr(rsp + 24), r11)?;
        a.iretq()
    });
    let rounds = 1500u32;
    m.code(CODE, |a| {
        let (mut writer, mut top, mut bad) = (a.create_label(), a.create_label(), a.create_label());
        a.mov(ebx, 1)?;
        meet(a, MET, ebx, 2)?;
        a.test(edi, edi)?;
        a.jne(writer)?;
        a.mov(rbp, site)?;
        a.set_label(&mut top)?;
        a.call(rbp)?;
        a.dec(eax)?;
        a.cmp(eax, 2)?;
        a.ja(bad)?;
        a.cmp(dword_ptr(VERSIONS), 0)?;
        a.je(top)?;
        done_with(a, 1)?;
        a.set_label(&mut bad)?;
        done_with(a, 2)?;
        a.set_label(&mut writer)?;
        a.mov(ecx, rounds)?;
        a.mov(rbp, site)?;
        let mut next = a.create_label();
        a.set_label(&mut next)?;
        for target in [two, one] {
            let b = jump(target);
            let rel = u32::from_le_bytes(b[1..].try_into().unwrap());
            a.mov(byte_ptr(rbp), 0xccu32)?;
            a.mov(dword_ptr(rbp + 1), rel)?;
            a.mov(byte_ptr(rbp), 0xe9u32)?;
        }
        a.dec(ecx)?;
        a.jne(next)?;
        a.mov(dword_ptr(VERSIONS), 1)?;
        done_with(a, 1)
    });
    assert_eq!(m.run(&[Begin::Supervisor(CODE); 2]), [1, 1]);
}

/// New functions of different lengths at addresses used before, published by a
/// flag and called without any serialising.
fn published(begin: fn(u64) -> Begin, slots: u32, stride: u32) {
    let rounds = 160u32;
    let m = Machine::beginning(2, begin(CODE));
    m.code(CODE, |a| {
        let (mut writer, mut top, mut bad) = (a.create_label(), a.create_label(), a.create_label());
        a.mov(ecx, 1)?;
        a.mov(rbp, FUNCTIONS)?;
        a.xor(esi, esi)?;
        a.test(edi, edi)?;
        a.jne(writer)?;
        a.set_label(&mut top)?;
        wait_for(a, VERSIONS, ecx)?;
        a.call(rbp)?;
        a.cmp(eax, ecx)?;
        a.jne(bad)?;
        a.mov(dword_ptr(VERSIONS + 64), ecx)?;
        step(a, slots, stride)?;
        a.cmp(ecx, rounds)?;
        a.jbe(top)?;
        done_with(a, 1)?;
        a.set_label(&mut bad)?;
        done_with(a, 2)?;

        a.set_label(&mut writer)?;
        a.nop()?;
        let mut next = a.create_label();
        a.set_label(&mut next)?;
        // As many NOPs as the round's low bits say, so that old blocks do not fit.
        a.mov(rbx, rbp)?;
        a.mov(edx, ecx)?;
        a.and(edx, 7)?;
        let (mut nop, mut end) = (a.create_label(), a.create_label());
        a.set_label(&mut nop)?;
        a.je(end)?;
        a.mov(byte_ptr(rbx), 0x90u32)?;
        a.inc(rbx)?;
        a.dec(edx)?;
        a.jmp(nop)?;
        a.set_label(&mut end)?;
        a.mov(byte_ptr(rbx), 0xb8u32)?;
        a.mov(dword_ptr(rbx + 1), ecx)?;
        a.mov(byte_ptr(rbx + 5), 0xc3u32)?;
        a.mov(dword_ptr(VERSIONS), ecx)?;
        wait_for(a, VERSIONS + 64, ecx)?;
        step(a, slots, stride)?;
        a.cmp(ecx, rounds)?;
        a.jbe(next)?;
        done_with(a, 1)
    });
    assert_eq!(m.run(&[begin(CODE); 2]), [1, 1]);
}

/// The next round in ecx, the next slot in esi and rbp.
fn step(a: &mut CodeAssembler, slots: u32, stride: u32) -> Built {
    let mut same = a.create_label();
    a.inc(ecx)?;
    a.inc(esi)?;
    a.add(rbp, stride as i32)?;
    a.cmp(esi, slots)?;
    a.jb(same)?;
    a.xor(esi, esi)?;
    a.mov(rbp, FUNCTIONS)?;
    a.set_label(&mut same)?;
    a.nop()
}

#[test]
fn functions_published_by_a_flag() {
    published(Begin::Supervisor, 1, 64);
    published(Begin::User, 3, 64);
    published(Begin::User, 3, 4096);
    // Across pages.
    published(Begin::Supervisor, 5, 4090);
}

/// Both write functions into the same page and call them.
fn same_page(begin: fn(u64) -> Begin, cpus: u32) {
    let m = Machine::beginning(cpus, begin(CODE));
    m.code(CODE, |a| {
        let (mut top, mut bad) = (a.create_label(), a.create_label());
        a.mov(ebx, 1)?;
        meet(a, MET, ebx, cpus as i32)?;
        a.imul_3(ebp, edi, 32)?;
        a.add(rbp, FUNCTIONS as i32)?;
        a.mov(ecx, 1200 / cpus)?;
        a.set_label(&mut top)?;
        a.mov(byte_ptr(rbp), 0xb8u32)?;
        a.mov(dword_ptr(rbp + 1), ecx)?;
        a.mov(byte_ptr(rbp + 5), 0xc3u32)?;
        a.call(rbp)?;
        a.cmp(eax, ecx)?;
        a.jne(bad)?;
        a.call(rbp)?;
        a.cmp(eax, ecx)?;
        a.jne(bad)?;
        a.dec(ecx)?;
        a.jne(top)?;
        done_with(a, 1)?;
        a.set_label(&mut bad)?;
        done_with(a, 2)
    });
    assert_eq!(m.run(&vec![begin(CODE); cpus as usize]), vec![1; cpus as usize]);
}

#[test]
fn two_writers_in_one_page() {
    same_page(Begin::Supervisor, 2);
    same_page(Begin::User, 2);
    same_page(Begin::User, 4);
}

/// A string instruction, a vector store and a push as writers of code.
#[test]
fn code_written_in_bulk() {
    let m = Machine::new(2);
    let source = DATA + 0x5000;
    m.code(CODE, |a| {
        let (mut writer, mut top, mut bad) = (a.create_label(), a.create_label(), a.create_label());
        a.mov(ecx, 1)?;
        a.mov(rbp, FUNCTIONS)?;
        a.test(edi, edi)?;
        a.jne(writer)?;
        a.set_label(&mut top)?;
        wait_for(a, VERSIONS, ecx)?;
        a.call(rbp)?;
        a.cmp(eax, ecx)?;
        a.jne(bad)?;
        a.mov(dword_ptr(VERSIONS + 64), ecx)?;
        a.inc(ecx)?;
        a.cmp(ecx, 120)?;
        a.jbe(top)?;
        done_with(a, 1)?;
        a.set_label(&mut bad)?;
        done_with(a, 2)?;

        a.set_label(&mut writer)?;
        let (mut next, mut by_vector, mut by_push, mut wrote) =
            (a.create_label(), a.create_label(), a.create_label(), a.create_label());
        a.nop()?;
        a.set_label(&mut next)?;
        // b8 imm32 c3 and zeroes, made elsewhere.
        a.mov(eax, ecx)?;
        a.shl(rax, 8)?;
        a.mov(rbx, 0xc300_0000_00b8_u64)?;
        a.or(rax, rbx)?;
        a.mov(qword_ptr(source), rax)?;
        a.mov(r8d, ecx)?;
        a.test(ecx, 1)?;
        a.jne(by_vector)?;
        a.test(ecx, 2)?;
        a.jne(by_push)?;
        a.mov(rsi, source)?;
        a.mov(rdi, rbp)?;
        a.mov(ecx, 2048)?;
        a.rep().movsb()?;
        a.jmp(wrote)?;
        a.set_label(&mut by_vector)?;
        a.movups(xmm0, xmmword_ptr(source))?;
        a.movups(xmmword_ptr(rbp), xmm0)?;
        a.jmp(wrote)?;
        a.set_label(&mut by_push)?;
        a.mov(r9, rsp)?;
        a.lea(rsp, qword_ptr(rbp + 8))?;
        a.push(rax)?;
        a.mov(rsp, r9)?;
        a.set_label(&mut wrote)?;
        a.mov(ecx, r8d)?;
        a.mov(dword_ptr(VERSIONS), ecx)?;
        wait_for(a, VERSIONS + 64, ecx)?;
        a.inc(ecx)?;
        a.cmp(ecx, 120)?;
        a.jbe(next)?;
        done_with(a, 1)
    });
    assert_eq!(m.run(&[Begin::Supervisor(CODE); 2]), [1, 1]);
}

/// The owner writes code while both processors run it.
#[test]
fn written_from_outside() {
    let m = Machine::new(2);
    function(&m, FUNCTIONS, 0);
    m.code(CODE, |a| {
        let mut top = a.create_label();
        a.mov(rbp, FUNCTIONS)?;
        a.set_label(&mut top)?;
        a.call(rbp)?;
        a.lock().inc(dword_ptr(VERSIONS))?;
        a.test(eax, eax)?;
        a.je(top)?;
        done_with(a, 7)
    });
    let r = m.run_with(&[Begin::User(CODE); 2], || {
        // More orders than are kept apart, then the one that counts.
        while m.word(VERSIONS) < 1000 {
            std::thread::yield_now();
        }
        for _ in 0..3000 {
            function(&m, FUNCTIONS, 0);
        }
        function(&m, FUNCTIONS, 1);
    });
    assert_eq!(r, [7, 7]);
}

/// The stack of one lies in a page that the other runs code from.
#[test]
fn interrupts_pushed_into_a_page_of_code() {
    let m = Machine::new(2);
    let handler = CODE + 0x2000;
    m.gate(3, handler);
    m.gate(14, handler + 0x100);
    function(&m, FUNCTIONS, 5);
    m.code(handler, |a| a.iretq());
    // Page fault: step over the load, two bytes.
    m.code(handler + 0x100, |a| {
        a.add(rsp, 8)?;
        a.add(qword_ptr(rsp), 2)?;
        a.iretq()
    });
    m.code(CODE, |a| {
        let (mut other, mut top, mut bad) = (a.create_label(), a.create_label(), a.create_label());
        a.mov(rbp, FUNCTIONS)?;
        a.test(edi, edi)?;
        a.jne(other)?;
        a.lea(rsp, qword_ptr(rbp + 0xe00))?;
        a.mov(ecx, 300)?;
        a.mov(rbx, 0x4000_0000u64)?;
        a.set_label(&mut top)?;
        a.int3()?;
        a.mov(eax, dword_ptr(rbx))?;
        a.dec(ecx)?;
        a.jne(top)?;
        a.mov(dword_ptr(VERSIONS), 1)?;
        done_with(a, 1)?;
        a.set_label(&mut other)?;
        a.call(rbp)?;
        a.cmp(eax, 5)?;
        a.jne(bad)?;
        a.cmp(dword_ptr(VERSIONS), 0)?;
        a.je(other)?;
        done_with(a, 1)?;
        a.set_label(&mut bad)?;
        done_with(a, 2)
    });
    assert_eq!(m.run(&[Begin::Supervisor(CODE); 2]), [1, 1]);
}
