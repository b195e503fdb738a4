//! Locked instructions, wherever their operands lie.
use crate::machine::{done, done_with, meet, Begin, Built, Machine, CODE, DATA};
use iced_x86::code_asm::*;

const ROUNDS: u32 = 20_000;
/// Operands that are slow to reach: fewer rounds.
const SLOW_ROUNDS: u32 = 1_000;

/// Every way to count that must not lose a count, on dwords at `gpa` and qwords
/// and more from `gpa` + 16 on. Each adds 1 a round.
fn count_everywhere(a: &mut CodeAssembler, gpa: u64) -> Built {
    a.mov(eax, 1)?;
    a.lock().xadd(dword_ptr(gpa), eax)?;
    a.lock().inc(dword_ptr(gpa))?;
    a.lock().add(dword_ptr(gpa), 1)?;
    let mut again = a.create_label();
    a.mov(eax, dword_ptr(gpa))?;
    a.set_label(&mut again)?;
    a.lea(edx, dword_ptr(rax + 1))?;
    a.lock().cmpxchg(dword_ptr(gpa), edx)?;
    a.jne(again)?;
    a.mov(rdx, -1i64)?;
    a.lock().sub(qword_ptr(gpa + 16), rdx)?;
    // A lock of one bit around counts that are not locked.
    let mut taken = a.create_label();
    let mut got = a.create_label();
    a.set_label(&mut taken)?;
    a.lock().bts(dword_ptr(gpa + 24), 3)?;
    a.jnc(got)?;
    a.pause()?;
    a.jmp(taken)?;
    a.set_label(&mut got)?;
    a.inc(dword_ptr(gpa + 28))?;
    a.lock().btr(dword_ptr(gpa + 24), 3)?;
    // The same by exchange.
    let mut taken = a.create_label();
    let mut got = a.create_label();
    a.set_label(&mut taken)?;
    a.mov(eax, 1)?;
    a.xchg(dword_ptr(gpa + 32), eax)?;
    a.test(eax, eax)?;
    a.je(got)?;
    a.pause()?;
    a.jmp(taken)?;
    a.set_label(&mut got)?;
    a.inc(dword_ptr(gpa + 36))?;
    a.mov(dword_ptr(gpa + 32), 0)
}

fn check(m: &Machine, gpa: u64, sum: u64) {
    assert_eq!(m.word(gpa) as u32, 4 * sum as u32, "counts");
    assert_eq!(m.word(gpa + 16), sum, "sub of -1");
    assert_eq!(m.word(gpa + 24), sum << 32, "under a bit");
    assert_eq!(m.word(gpa + 32), sum << 32, "under an exchange");
}

fn counters_at(gpa: u64, rounds: u32, begin: fn(u64) -> Begin, cpus: u32) {
    let m = Machine::beginning(cpus, begin(CODE));
    // Away from the page's start, where operands may reach to.
    let code = CODE + 0x100;
    m.code(code, |a| {
        let mut top = a.create_label();
        a.mov(ebx, 1)?;
        meet(a, DATA + 0x8000, ebx, cpus as i32)?;
        a.mov(ecx, rounds)?;
        a.set_label(&mut top)?;
        count_everywhere(a, gpa)?;
        a.dec(ecx)?;
        a.jne(top)?;
        done_with(a, 1)
    });
    assert_eq!(m.run(&vec![begin(code); cpus as usize]), vec![1; cpus as usize]);
    check(&m, gpa, u64::from(cpus) * u64::from(rounds));
}

#[test]
fn aligned() {
    counters_at(DATA + 0x1000, ROUNDS, Begin::Supervisor, 2);
    counters_at(DATA + 0x1000, ROUNDS, Begin::User, 2);
}

#[test]
fn across_cache_lines() {
    counters_at(DATA + 0x103d, SLOW_ROUNDS, Begin::User, 2);
}

#[test]
fn across_pages() {
    // Each of the operands in turn.
    for back in [1, 3, 17, 23, 27, 30, 34, 39] {
        counters_at(DATA + 0x2000 - back, SLOW_ROUNDS, Begin::Supervisor, 2);
    }
}

#[test]
fn in_a_page_of_code() {
    counters_at(CODE + 0x800, SLOW_ROUNDS, Begin::Supervisor, 2);
    counters_at(CODE + 0x800, SLOW_ROUNDS / 4, Begin::User, 3);
}

#[test]
fn across_pages_of_code_and_data() {
    counters_at(CODE + 0x1000 - 2, SLOW_ROUNDS / 4, Begin::Supervisor, 2);
    counters_at(CODE - 2, SLOW_ROUNDS / 4, Begin::Supervisor, 2);
}

#[test]
fn many_processors() {
    counters_at(DATA + 0x1000, ROUNDS / 10, Begin::Supervisor, 7);
}

/// Sixteen bytes whose halves only agree between two operations.
#[test]
fn sixteen_bytes() {
    for at in [DATA + 0x1000, CODE + 0x800] {
        let rounds = if at > DATA { ROUNDS } else { SLOW_ROUNDS };
        let m = Machine::new(2);
        m.code(CODE, |a| {
            let mut top = a.create_label();
            let mut again = a.create_label();
            let mut bad = a.create_label();
            a.mov(esi, rounds)?;
            a.set_label(&mut top)?;
            a.xor(eax, eax)?;
            a.cdq()?;
            a.set_label(&mut again)?;
            a.lea(rbx, qword_ptr(rax + 1))?;
            a.lea(rcx, qword_ptr(rdx + 2))?;
            a.lock().cmpxchg16b(xmmword_ptr(at))?;
            a.setz(r8b)?;
            a.lea(rbp, qword_ptr(rax + rax))?;
            a.cmp(rbp, rdx)?;
            a.jne(bad)?;
            a.test(r8b, r8b)?;
            a.je(again)?;
            a.dec(esi)?;
            a.jne(top)?;
            done_with(a, 1)?;
            a.set_label(&mut bad)?;
            done_with(a, 2)
        });
        assert_eq!(m.run(&[Begin::User(CODE); 2]), [1, 1]);
        let sum = 2 * u64::from(rounds);
        assert_eq!((m.word(at), m.word(at + 8)), (sum, 2 * sum));
    }
}

/// Stores that cross a page of code do not tear locked operations in it.
#[test]
fn exchange_returns_what_others_wrote() {
    for at in [DATA + 0x1ffe, CODE + 0xffe, CODE + 0x700] {
        let m = Machine::new(2);
        // Each swaps its own values in; every value comes out exactly once: the sum
        // of what went in less what is left is the sum of what came out.
        m.code(CODE, |a| {
            let mut top = a.create_label();
            a.xor(ebx, ebx)?;
            a.mov(ecx, SLOW_ROUNDS)?;
            a.lea(esi, dword_ptr(rdi + rdi * 4 + 1))?;
            a.set_label(&mut top)?;
            a.imul_3(esi, esi, 0x10001)?;
            a.mov(eax, esi)?;
            a.add(ebp, esi)?;
            a.xchg(dword_ptr(at), eax)?;
            a.add(ebx, eax)?;
            a.dec(ecx)?;
            a.jne(top)?;
            a.mov(eax, ebp)?;
            a.sub(eax, ebx)?;
            done(a)
        });
        let r = m.run(&[Begin::Supervisor(CODE); 2]);
        assert_eq!(r[0].wrapping_add(r[1]), m.word(at) as u32, "at {at:#x}");
    }
}
