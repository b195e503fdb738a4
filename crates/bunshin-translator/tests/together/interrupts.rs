//! Interrupts between processors, INIT and start-up.
use crate::machine::{done, done_with, meet, wait_for, Begin, Built, Machine, CODE, DATA, START_UP};
use iced_x86::code_asm::*;

const LAPIC: u64 = 0xfee0_0000;
const COUNTS: u64 = DATA + 0x1000;
const MET: u64 = DATA + 0x8000;

fn apic_on(a: &mut CodeAssembler) -> Built {
    a.mov(ebx, LAPIC as u32)?;
    a.mov(dword_ptr(rbx + 0xf0), 0x1ff)
}

/// Write the ICR; rbx points at the APIC.
fn send(a: &mut CodeAssembler, dest: u32, low: u32) -> Built {
    a.mov(dword_ptr(rbx + 0x310), dest << 24)?;
    a.mov(dword_ptr(rbx + 0x300), low)
}

/// A handler that counts at COUNTS + 64 * APIC ID + `slot`.
fn counting(m: &Machine, vector: u64, at: u64, slot: u64, eoi: bool) {
    m.gate(vector, at);
    m.code(at, |a| {
        a.push(rax)?;
        a.mov(eax, LAPIC as u32)?;
        if eoi {
            a.mov(dword_ptr(rax + 0xb0), 0)?;
        }
        a.mov(eax, dword_ptr(rax + 0x20))?;
        a.shr(eax, 18)?;
        a.lock().inc(dword_ptr(rax + COUNTS + slot))?;
        a.pop(rax)?;
        a.iretq()
    });
}

#[test]
fn each_kind_of_destination() {
    let m = Machine::new(3);
    counting(&m, 0x50, CODE + 0x2000, 0, true);
    counting(&m, 2, CODE + 0x2100, 8, false);
    m.code(CODE, |a| {
        let (mut others, mut wait) = (a.create_label(), a.create_label());
        apic_on(a)?;
        // Logical, flat: a bit each.
        a.mov(ecx, edi)?;
        a.mov(eax, 0x100_0000)?;
        a.shl(eax, cl)?;
        a.mov(dword_ptr(rbx + 0xd0), eax)?;
        a.sti()?;
        a.mov(r12d, 1)?;
        meet(a, MET, r12d, 3)?;
        a.test(edi, edi)?;
        a.jne(others)?;
        // Physical; logical to two; all but self; self; NMI to one; lowest priority to
        // one; nowhere.
        type Count = (u64, u32);
        let sent: [(u32, u32, &[Count]); 7] = [
            (1, 0x4050, &[(0x40, 1)]),
            (6, 0x4850, &[(0x40, 2), (0x80, 1)]),
            (0, 0xc_4050, &[(0x40, 3), (0x80, 2)]),
            (0, 0x4_4050, &[(0, 1)]),
            (2, 0x4400, &[(0x88, 1)]),
            (4, 0x4950, &[(0x80, 3)]),
            (9, 0x4050, &[]),
        ];
        for (dest, low, expected) in sent {
            send(a, dest, low)?;
            for &(slot, count) in expected {
                a.mov(ecx, count)?;
                wait_for(a, COUNTS + slot, ecx)?;
            }
        }
        a.mov(dword_ptr(COUNTS + 0x100), 1)?;
        done_with(a, 1)?;
        // The second sleeps between interrupts, the third spins.
        a.set_label(&mut others)?;
        a.nop()?;
        let mut spin = a.create_label();
        a.set_label(&mut wait)?;
        a.cmp(edi, 2)?;
        a.je(spin)?;
        a.cli()?;
        a.cmp(dword_ptr(COUNTS + 0x40), 3)?;
        let mut enough = a.create_label();
        a.jae(enough)?;
        a.sti()?;
        a.hlt()?;
        a.jmp(wait)?;
        a.set_label(&mut spin)?;
        a.pause()?;
        a.cmp(dword_ptr(COUNTS + 0x100), 0)?;
        a.je(wait)?;
        a.set_label(&mut enough)?;
        done_with(a, 1)
    });
    assert_eq!(m.run(&[Begin::Supervisor(CODE); 3]), [1, 1, 1]);
    let counts: Vec<_> = (0..3).map(|n| m.word(COUNTS + 64 * n) as u32).collect();
    assert_eq!(counts, [1, 3, 3]);
    assert_eq!(m.word(COUNTS + 0x88), 1, "NMI");
}

/// Every processor sends to every other as fast as it can, and NMIs too.
#[test]
fn storm() {
    let m = Machine::new(2);
    let rounds = 3000u32;
    counting(&m, 0x50, CODE + 0x2000, 0, true);
    counting(&m, 2, CODE + 0x2100, 8, false);
    m.code(CODE, |a| {
        let mut top = a.create_label();
        apic_on(a)?;
        a.sti()?;
        a.mov(r12d, 1)?;
        meet(a, MET, r12d, 2)?;
        a.mov(ecx, rounds)?;
        a.set_label(&mut top)?;
        a.mov(dword_ptr(rbx + 0x300), 0xc_4050)?;
        // In the middle of it: a locked operation that needs all the others out.
        a.lock().inc(dword_ptr(DATA + 0x2ffe))?;
        let mut no = a.create_label();
        a.test(ecx, 15)?;
        a.jne(no)?;
        a.mov(dword_ptr(rbx + 0x300), 0xc_4400)?;
        a.set_label(&mut no)?;
        a.dec(ecx)?;
        a.jne(top)?;
        a.inc(r12d)?;
        meet(a, MET, r12d, 2)?;
        // The last of all arrives: the other's counter moves on.
        a.mov(dword_ptr(rbx + 0x300), 0xc_4050)?;
        let mut mine = a.create_label();
        a.set_label(&mut mine)?;
        a.mov(eax, edi)?;
        a.shl(eax, 6)?;
        a.cmp(dword_ptr(rax + COUNTS), 0)?;
        a.je(mine)?;
        a.inc(r12d)?;
        meet(a, MET, r12d, 2)?;
        done_with(a, 1)
    });
    assert_eq!(m.run(&[Begin::Supervisor(CODE); 2]), [1, 1]);
    assert_eq!(m.word(DATA + 0x2ffe) as u32, 2 * rounds);
    for cpu in 0..2 {
        let (fixed, nmi) = (m.word(COUNTS + 64 * cpu) as u32, m.word(COUNTS + 64 * cpu + 8) as u32);
        assert!((1..=rounds + 1).contains(&fixed) && nmi >= 1, "{fixed} {nmi}");
    }
}

/// INIT and SIPI, again and again: to sleeping, running and absent processors.
#[test]
fn started_and_restarted() {
    let m = Machine::new(2);
    let runs = DATA + 0x2000;
    // Real mode at START_UP: count at 0:0x9800, then sleep for good or spin.
    for (page, spin) in [(START_UP, false), (START_UP + 0x1000, true)] {
        m.code_of(16, page, |a| {
            a.xor(ax, ax)?;
            a.mov(ds, ax)?;
            a.lock().inc(dword_ptr(0x9800))?;
            if spin {
                let mut again = a.create_label();
                a.set_label(&mut again)?;
                a.inc(word_ptr(0x9810))?;
                a.jmp(again)?;
            }
            a.cli()?;
            a.hlt()
        });
    }
    m.code(CODE, |a| {
        let (mut top, mut spin, mut sent, mut bad) =
            (a.create_label(), a.create_label(), a.create_label(), a.create_label());
        apic_on(a)?;
        // Nobody there: nothing happens.
        send(a, 7, 0x4500)?;
        send(a, 7, 0x4609)?;
        a.mov(ecx, 1)?;
        a.set_label(&mut top)?;
        send(a, 1, 0x4500)?;
        a.test(ecx, 1)?;
        a.jne(spin)?;
        send(a, 1, 0x4600 | (START_UP >> 12) as u32)?;
        a.jmp(sent)?;
        a.set_label(&mut spin)?;
        send(a, 1, 0x4600 | ((START_UP + 0x1000) >> 12) as u32)?;
        a.set_label(&mut sent)?;
        wait_for(a, 0x9800, ecx)?;
        // It runs: a second SIPI is not taken.
        send(a, 1, 0x4600 | (START_UP >> 12) as u32)?;
        a.cmp(dword_ptr(0x9800), ecx)?;
        a.jne(bad)?;
        a.inc(ecx)?;
        a.cmp(ecx, 101)?;
        a.jb(top)?;
        a.mov(qword_ptr(runs), rcx)?;
        done_with(a, 1)?;
        a.set_label(&mut bad)?;
        done_with(a, 2)
    });
    assert_eq!(m.run(&[Begin::Supervisor(CODE), Begin::Waiting])[0], 1);
    assert_eq!(m.word(0x9800) as u32, 100);
    assert_ne!(m.word(0x9810) as u16, 0, "the one that spins did so");
}

/// A timer for each processor.
#[test]
fn timers() {
    let m = Machine::new(2);
    counting(&m, 0x60, CODE + 0x2000, 0, true);
    m.code(CODE, |a| {
        let mut top = a.create_label();
        let mut enough = a.create_label();
        apic_on(a)?;
        a.mov(dword_ptr(rbx + 0x3e0), 0xb)?;
        // Periodic for the one, one-shot and again for the other: both get there.
        a.mov(dword_ptr(rbx + 0x320), 0x2_0060)?;
        a.mov(dword_ptr(rbx + 0x380), 200_000)?;
        a.mov(esi, edi)?;
        a.shl(esi, 6)?;
        a.set_label(&mut top)?;
        a.cli()?;
        a.cmp(dword_ptr(rsi + COUNTS), 20)?;
        a.jae(enough)?;
        a.sti()?;
        a.hlt()?;
        a.jmp(top)?;
        a.set_label(&mut enough)?;
        a.mov(dword_ptr(rbx + 0x320), 0x1_0060)?;
        a.mov(eax, dword_ptr(rsi + COUNTS))?;
        done(a)
    });
    assert!(m.run(&[Begin::Supervisor(CODE); 2]).iter().all(|&n| n >= 20));
}
