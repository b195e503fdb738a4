//! Page tables that one processor changes while another uses them.
use crate::machine::{done_with, wait_for, Begin, Built, Machine, CODE, DATA, PAGE_TABLE};
use bunshin_core::Engine;
use iced_x86::code_asm::*;

/// The page whose mapping moves, in the first 2 MiB, and the two that it moves
/// between.
const MOVING: u64 = 0x5_0000;
const HOMES: [u64; 2] = [DATA + 0x1_0000, DATA + 0x1_1000];
const ENTRY: u64 = PAGE_TABLE + 8 * (MOVING >> 12);
/// Requests for a shootdown, answers to them.
const ASKED: u64 = DATA + 0x1000;
const ANSWERED: u64 = DATA + 0x1040;
const OVER: u64 = DATA + 0x1080;
const LAPIC: u64 = 0xfee0_0000;
const VECTOR: u64 = 0x41;

/// Enable the local APIC.
fn apic_on(a: &mut CodeAssembler) -> Built {
    a.mov(ebx, LAPIC as u32)?;
    a.mov(dword_ptr(rbx + 0xf0), 0x1ff)
}

/// Invalidate the page and answer.
fn shootdown_handler(m: &Machine, at: u64) {
    m.gate(VECTOR, at);
    m.code(at, |a| {
        a.push(rax)?;
        a.push(rbx)?;
        a.mov(eax, dword_ptr(ASKED))?;
        a.invlpg(byte_ptr(MOVING))?;
        a.mov(ebx, LAPIC as u32)?;
        a.mov(dword_ptr(rbx + 0xb0), 0)?;
        a.mov(dword_ptr(ANSWERED), eax)?;
        a.pop(rbx)?;
        a.pop(rax)?;
        a.iretq()
    });
}

/// Point the page at home `to` (rax), shoot the other's TLB down for round ecx.
fn move_page(a: &mut CodeAssembler) -> Built {
    a.or(rax, 0x67)?;
    a.mov(qword_ptr(ENTRY), rax)?;
    a.invlpg(byte_ptr(MOVING))?;
    a.mov(dword_ptr(ASKED), ecx)?;
    a.mov(dword_ptr(rbx + 0x310), 1 << 24)?;
    a.mov(dword_ptr(rbx + 0x300), 0x4000 | VECTOR as u32)?;
    wait_for(a, ANSWERED, ecx)
}

/// Processor 0 moves a page back and forth and spoils the home that it left, as
/// `spoil` does with rdx pointing there, before it goes back as `good` makes it.
/// Processor 1 runs `use_it` all the time, which goes to the label when it finds
/// something spoilt.
fn moving(
    rounds: u32,
    start: &[u8],
    good: fn(&mut CodeAssembler) -> Built,
    spoil: fn(&mut CodeAssembler) -> Built,
    use_it: fn(&mut CodeAssembler, CodeLabel) -> Built,
) {
    let m = Machine::new(2);
    shootdown_handler(&m, CODE + 0x2000);
    HOMES.iter().for_each(|&h| assert!(m.engine.write(h, start)));
    m.put(ENTRY, HOMES[0] | 0x67);
    m.code(CODE, |a| {
        let (mut user, mut top, mut bad) = (a.create_label(), a.create_label(), a.create_label());
        apic_on(a)?;
        a.test(edi, edi)?;
        a.jne(user)?;
        a.mov(ecx, 1)?;
        wait_for(a, OVER + 64, ecx)?;
        a.set_label(&mut top)?;
        for (to, left) in [(1, 0), (0, 1)] {
            a.mov(rdx, HOMES[to])?;
            good(a)?;
            a.mov(rax, HOMES[to])?;
            move_page(a)?;
            a.mov(rdx, HOMES[left])?;
            spoil(a)?;
            a.inc(ecx)?;
        }
        a.cmp(ecx, rounds)?;
        a.jb(top)?;
        a.mov(dword_ptr(OVER), 1)?;
        done_with(a, 1)?;

        a.set_label(&mut user)?;
        a.sti()?;
        a.mov(dword_ptr(OVER + 64), 1)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        use_it(a, bad)?;
        a.cmp(dword_ptr(OVER), 0)?;
        a.je(again)?;
        done_with(a, 1)?;
        a.set_label(&mut bad)?;
        done_with(a, 2)
    });
    assert_eq!(m.run(&[Begin::Supervisor(CODE); 2]), [1, 1]);
}

#[test]
fn loads_through_a_moving_page() {
    moving(
        150,
        &[0; 64],
        |a| a.mov(dword_ptr(rdx + 16), 0),
        |a| a.mov(dword_ptr(rdx + 16), 0xbad),
        |a, bad| {
            a.cmp(dword_ptr(MOVING + 16), 0)?;
            a.jne(bad)
        },
    );
}

#[test]
fn code_in_a_moving_page() {
    // A call from another page is linked; what it leads to moves. `xor eax, eax; ret`
    // or `mov al, 1; ret`.
    moving(
        150,
        &[0x31, 0xc0, 0xc3, 0x90],
        |a| a.mov(dword_ptr(rdx), 0x90c3_c031u32),
        |a| a.mov(dword_ptr(rdx), 0x90c3_01b0u32),
        |a, bad| {
            a.mov(esi, MOVING as u32)?;
            a.call(rsi)?;
            a.test(al, al)?;
            a.jne(bad)
        },
    );
}

#[test]
fn stores_through_a_moving_page() {
    // Nothing is stored to a home that was left: the word stays as it was spoilt.
    moving(
        150,
        &[0; 64],
        |a| a.mov(dword_ptr(rdx + 32), 0),
        |a| {
            let mut good = a.create_label();
            a.mov(dword_ptr(rdx + 32), 0xbad)?;
            for _ in 0..200 {
                a.pause()?;
            }
            a.cmp(dword_ptr(rdx + 32), 0xbad)?;
            a.je(good)?;
            a.ud2()?;
            a.set_label(&mut good)?;
            Ok(())
        },
        |a, _| a.mov(dword_ptr(MOVING + 32), 7),
    );
}

/// Accessed and dirty bits that one processor sets do not undo what another does to
/// the entry.
#[test]
fn an_entry_taken_away_stays_away() {
    let rounds = 200_000u32;
    let m = Machine::new(2);
    m.put(ENTRY, HOMES[0] | 0x07);
    // The page fault of the user: try again.
    m.gate(14, CODE + 0x2000);
    m.code(CODE + 0x2000, |a| {
        a.add(rsp, 8)?;
        a.iretq()
    });
    m.code(CODE, |a| {
        let (mut user, mut top, mut bad) = (a.create_label(), a.create_label(), a.create_label());
        a.test(edi, edi)?;
        a.jne(user)?;
        a.mov(ecx, rounds)?;
        a.set_label(&mut top)?;
        // Take it away, as a kernel does that wants the dirty bit with it.
        a.xor(eax, eax)?;
        a.xchg(qword_ptr(ENTRY), rax)?;
        for _ in 0..4 {
            a.pause()?;
        }
        a.cmp(qword_ptr(ENTRY), 0)?;
        a.jne(bad)?;
        // Present and fresh again.
        a.mov(rax, HOMES[0] | 0x07)?;
        a.mov(qword_ptr(ENTRY), rax)?;
        // For a while that differs from round to round.
        let (mut wait, mut on) = (a.create_label(), a.create_label());
        a.mov(edx, ecx)?;
        a.and(edx, 63)?;
        a.set_label(&mut wait)?;
        a.je(on)?;
        a.dec(edx)?;
        a.jmp(wait)?;
        a.set_label(&mut on)?;
        a.dec(ecx)?;
        a.jne(top)?;
        a.mov(dword_ptr(OVER), 1)?;
        done_with(a, 1)?;
        a.set_label(&mut bad)?;
        a.mov(dword_ptr(OVER), 1)?;
        a.mov(rax, HOMES[0] | 0x07)?;
        a.mov(qword_ptr(ENTRY), rax)?;
        done_with(a, 2)?;
        a.set_label(&mut user)?;
        a.nop()?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.invlpg(byte_ptr(MOVING))?;
        a.mov(eax, dword_ptr(MOVING))?;
        a.invlpg(byte_ptr(MOVING))?;
        a.mov(dword_ptr(MOVING), eax)?;
        a.cmp(dword_ptr(OVER), 0)?;
        a.je(again)?;
        done_with(a, 1)
    });
    assert_eq!(m.run(&[Begin::Supervisor(CODE); 2]), [1, 1]);
}
