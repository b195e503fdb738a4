//! The order in which processors see each other's loads and stores.
use crate::machine::{done, done_with, meet, wait_for, Begin, Built, Machine, CODE, DATA};
use iced_x86::code_asm::*;

const X: u64 = DATA + 0x1000;
const Y: u64 = DATA + 0x3000;
const MET: u64 = DATA + 0x8000;
const BATCH: i32 = 64;

/// Store buffering: each stores to its own word, then loads the other's. With
/// something between that waits for the store, one of the two sees the other's.
/// Gives how often neither did.
fn store_buffering(x: u64, y: u64, rounds: u32, between: fn(&mut CodeAssembler) -> Built) -> u32 {
    let m = Machine::new(2);
    let seen = DATA + 0x1_0000;
    m.code(CODE, |a| {
        let (mut top, mut batch, mut second, mut stored, mut both) =
            (a.create_label(), a.create_label(), a.create_label(), a.create_label(), a.create_label());
        a.xor(r14d, r14d)?;
        a.mov(ebx, 1)?;
        a.set_label(&mut batch)?;
        // Words of their own for each round, zero at first.
        meet(a, MET, ebx, 2)?;
        a.inc(ebx)?;
        a.xor(esi, esi)?;
        a.set_label(&mut top)?;
        a.test(edi, edi)?;
        a.jne(second)?;
        a.mov(dword_ptr(rsi * 4 + x), 1)?;
        between(a)?;
        a.mov(r13d, dword_ptr(rsi * 4 + y))?;
        a.mov(dword_ptr(rsi * 8 + seen), r13d)?;
        a.jmp(stored)?;
        a.set_label(&mut second)?;
        a.mov(dword_ptr(rsi * 4 + y), 1)?;
        between(a)?;
        a.mov(r13d, dword_ptr(rsi * 4 + x))?;
        a.mov(dword_ptr(rsi * 8 + seen + 4), r13d)?;
        a.set_label(&mut stored)?;
        a.inc(esi)?;
        a.cmp(esi, BATCH)?;
        a.jb(top)?;
        meet(a, MET, ebx, 2)?;
        a.inc(ebx)?;
        // Both look at all rounds, then one of them clears the words.
        a.xor(esi, esi)?;
        let mut look = a.create_label();
        a.set_label(&mut look)?;
        a.mov(rax, qword_ptr(rsi * 8 + seen))?;
        a.test(rax, rax)?;
        a.jne(both)?;
        a.inc(r14d)?;
        a.set_label(&mut both)?;
        a.inc(esi)?;
        a.cmp(esi, BATCH)?;
        a.jb(look)?;
        meet(a, MET, ebx, 2)?;
        a.inc(ebx)?;
        a.xor(esi, esi)?;
        let (mut clear, mut cleared) = (a.create_label(), a.create_label());
        a.test(edi, edi)?;
        a.jne(cleared)?;
        a.set_label(&mut clear)?;
        a.mov(dword_ptr(rsi * 4 + x), 0)?;
        a.mov(dword_ptr(rsi * 4 + y), 0)?;
        a.mov(qword_ptr(rsi * 8 + seen), 0)?;
        a.inc(esi)?;
        a.cmp(esi, BATCH)?;
        a.jb(clear)?;
        a.set_label(&mut cleared)?;
        a.cmp(ebx, rounds)?;
        a.jb(batch)?;
        a.mov(eax, r14d)?;
        done(a)
    });
    let r = m.run(&[Begin::Supervisor(CODE); 2]);
    assert_eq!(r[0], r[1]);
    r[0]
}

#[test]
fn a_fence_between_store_and_load() {
    let fences: [fn(&mut CodeAssembler) -> Built; 4] = [
        |a| a.mfence(),
        |a| a.lock().or(dword_ptr(rsp), 0),
        |a| a.xchg(qword_ptr(rsp - 8), rax),
        |a| {
            // Serialising ones.
            a.mov(r8, rbx)?;
            a.cpuid()?;
            a.mov(rbx, r8)
        },
    ];
    for (n, fence) in fences.into_iter().enumerate() {
        assert_eq!(store_buffering(X, Y, 450, fence), 0, "fence {n}");
    }
}

#[test]
fn a_helper_that_serialises_between_store_and_load() {
    let fences: [fn(&mut CodeAssembler) -> Built; 3] = [
        |a| {
            a.mov(rax, cr3)?;
            a.mov(cr3, rax)
        },
        |a| a.invlpg(byte_ptr(DATA + 0x10_0000)),
        |a| {
            // IRET to what follows.
            let mut next = a.create_label();
            a.mov(rax, rsp)?;
            a.push(0x10)?;
            a.push(rax)?;
            a.pushfq()?;
            a.push(0x08)?;
            a.lea(rax, ptr(next))?;
            a.push(rax)?;
            a.iretq()?;
            a.set_label(&mut next)?;
            Ok(())
        },
    ];
    for (n, fence) in fences.into_iter().enumerate() {
        assert_eq!(store_buffering(X, Y, 240, fence), 0, "fence {n}");
    }
}

#[test]
fn words_in_pages_of_code() {
    // CODE's own page and one that holds no code but crosses into it.
    assert_eq!(store_buffering(CODE + 0x800, Y, 60, |a| a.mfence()), 0);
    assert_eq!(store_buffering(CODE + 0x800, CODE + 0xa00, 60, |a| a.mfence()), 0);
}

/// Message passing: who sees the flag sees the data, whatever kind of memory.
fn message_passing(data: u64, flag: u64, rounds: u32) {
    let m = Machine::beginning(2, Begin::User(CODE));
    m.code(CODE, |a| {
        let (mut writer, mut top) = (a.create_label(), a.create_label());
        a.test(edi, edi)?;
        a.jne(writer)?;
        // The reader: never data older than the flag that was read before it.
        let mut old = a.create_label();
        a.set_label(&mut top)?;
        a.mov(ebx, dword_ptr(flag))?;
        a.mov(ecx, dword_ptr(data))?;
        a.cmp(ecx, ebx)?;
        a.jb(old)?;
        a.cmp(ebx, rounds)?;
        a.jb(top)?;
        done_with(a, 1)?;
        a.set_label(&mut old)?;
        done_with(a, 2)?;
        a.set_label(&mut writer)?;
        a.mov(eax, 1)?;
        let mut next = a.create_label();
        a.set_label(&mut next)?;
        a.mov(dword_ptr(data), eax)?;
        a.mov(dword_ptr(flag), eax)?;
        a.inc(eax)?;
        a.cmp(eax, rounds + 1)?;
        a.jb(next)?;
        done_with(a, 1)
    });
    assert_eq!(m.run(&[Begin::User(CODE); 2]), [1, 1]);
}

#[test]
fn data_before_its_flag() {
    message_passing(X, Y, 1_000_000);
    message_passing(DATA + 0x1ffe, Y, 5000);
    message_passing(X, DATA + 0x4ffc, 1_000_000);
    message_passing(CODE + 0x900, Y, 2000);
    message_passing(X, CODE + 0x900, 2000);
    message_passing(CODE + 0x900, CODE + 0x980, 2000);
}

/// Both processors send each other a token through two words, with data beside it.
#[test]
fn ping_pong() {
    let rounds = 300;
    let m = Machine::new(2);
    m.code(CODE, |a| {
        let (mut top, mut bad) = (a.create_label(), a.create_label());
        // rdi: mine, rsi: the other's.
        a.xor(r12d, r12d)?;
        a.mov(eax, edi)?;
        a.xor(eax, 1)?;
        a.shl(edi, 8)?;
        a.shl(eax, 8)?;
        a.lea(rsi, qword_ptr(rax + X))?;
        a.add(rdi, X as i32)?;
        a.set_label(&mut top)?;
        a.inc(r12d)?;
        a.lea(eax, dword_ptr(r12 * 8 + 3))?;
        a.mov(dword_ptr(rdi + 64), eax)?;
        a.mov(dword_ptr(rdi), r12d)?;
        let mut again = a.create_label();
        let mut good = a.create_label();
        a.set_label(&mut again)?;
        a.cmp(dword_ptr(rsi), r12d)?;
        a.jae(good)?;
        a.pause()?;
        a.jmp(again)?;
        a.set_label(&mut good)?;
        a.cmp(dword_ptr(rsi + 64), eax)?;
        a.jb(bad)?;
        a.cmp(r12d, rounds)?;
        a.jb(top)?;
        done_with(a, 1)?;
        a.set_label(&mut bad)?;
        done_with(a, 2)
    });
    assert_eq!(m.run(&[Begin::Supervisor(CODE); 2]), [1, 1]);
}

/// Where nobody else is: `wait_for` goes on at once, and `meet` counts one.
#[test]
fn one_processor_needs_nobody() {
    let m = Machine::new(1);
    m.code(CODE, |a| {
        a.mov(ebx, 1)?;
        meet(a, MET, ebx, 1)?;
        wait_for(a, MET, ebx)?;
        a.lock().inc(dword_ptr(DATA + 0x1fff))?;
        a.mov(eax, dword_ptr(DATA + 0x1fff))?;
        done(a)
    });
    assert_eq!(m.run(&[Begin::Supervisor(CODE)]), [1]);
}
