//! Processors that sleep, are stopped, or never run, while others need them out.
use crate::machine::{done_with, Begin, Built, Machine, CODE, DATA};
use bunshin_core::{Engine, Exit, Reply};
use iced_x86::code_asm::*;
use std::time::Duration;

/// Locked operations across pages need every other processor out.
fn crossing(a: &mut CodeAssembler, rounds: u32) -> Built {
    let mut top = a.create_label();
    a.mov(ecx, rounds)?;
    a.set_label(&mut top)?;
    a.lock().inc(dword_ptr(DATA + 0x1ffe))?;
    a.dec(ecx)?;
    a.jne(top)
}

#[test]
fn one_sleeps_for_ever() {
    let m = Machine::new(2);
    m.code(CODE, |a| {
        let mut asleep = a.create_label();
        a.test(edi, edi)?;
        a.jne(asleep)?;
        crossing(a, 20_000)?;
        done_with(a, 1)?;
        a.set_label(&mut asleep)?;
        a.cli()?;
        a.hlt()?;
        a.ud2()
    });
    let mut sleeper = m.engine.vcpu(1).unwrap();
    let state = m.state(1, Begin::Supervisor(CODE), sleeper.state());
    sleeper.set_state(&state).unwrap();
    let kicker = sleeper.kicker();
    let thread = std::thread::spawn(move || sleeper.run(Reply::None));
    assert_eq!(m.run(&[Begin::Supervisor(CODE)]), [1]);
    kicker.kick();
    assert_eq!(thread.join().unwrap(), Exit::Kicked);
    assert_eq!(m.word(DATA + 0x1ffe) as u32, 20_000);
}

/// A processor whose owner holds it, in the middle of an exit, is out; it finds
/// what the other did when it comes back.
#[test]
fn one_is_with_its_owner() {
    let m = Machine::new(2);
    let function = CODE + 0x4000;
    assert!(m.engine.write(function, &[0xb8, 1, 0, 0, 0, 0xc3]));
    m.code(CODE, |a| {
        let mut writer = a.create_label();
        a.mov(rbp, function)?;
        a.test(edi, edi)?;
        a.je(writer)?;
        a.call(rbp)?;
        a.out(0x90, eax)?;
        // MMIO: the read waits for its answer while the code that follows changes.
        a.mov(ebx, 0x3000_0000)?;
        a.mov(ecx, dword_ptr(rbx))?;
        a.call(rbp)?;
        a.add(eax, ecx)?;
        a.out(0x90, eax)?;
        a.hlt()?;
        a.set_label(&mut writer)?;
        a.mov(dword_ptr(rbp + 1), 2)?;
        crossing(a, 1000)?;
        done_with(a, 1)
    });
    let mut held = m.engine.vcpu(1).unwrap();
    m.put(0x2000, 0x3067);
    let state = m.state(1, Begin::Supervisor(CODE), held.state());
    held.set_state(&state).unwrap();
    assert_eq!(held.run(Reply::None), Exit::PioOut { port: 0x90, size: 4, data: vec![1, 0, 0, 0] });
    assert_eq!(held.run(Reply::None), Exit::MmioRead { gpa: 0x3000_0000, size: 4 });
    assert_eq!(m.run(&[Begin::Supervisor(CODE)]), [1]);
    let out = held.run(Reply::Value(40));
    assert_eq!(out, Exit::PioOut { port: 0x90, size: 4, data: vec![42, 0, 0, 0] });
}

/// The instruction that waits for its owner's answer is replaced meanwhile, and what
/// follows it too: it had begun, so it ends as it was; the rest runs as it is now.
#[test]
fn the_instruction_that_waits_is_replaced() {
    for complete in [false, true] {
        let m = Machine::new(2);
        let at = CODE + 0x4000;
        m.code(at, |a| {
            a.mov(ebx, 0x3000_0000)?;
            a.mov(esi, 0x3000_1000)?;
            a.mov(eax, dword_ptr(rbx))?;
            a.out(0x90, eax)?;
            a.hlt()
        });
        let mut v = m.engine.vcpu(0).unwrap();
        let state = m.state(0, Begin::Supervisor(at), v.state());
        v.set_state(&state).unwrap();
        assert_eq!(v.run(Reply::None), Exit::MmioRead { gpa: 0x3000_0000, size: 4 });
        // mov eax, [rsi]; out 0x91, eax
        assert!(m.engine.write(at + 10, &[0x8b, 0x06, 0xe7, 0x91]));
        let mut value = 7;
        if complete {
            // Looked at afresh: the new instruction, with an answer of its own.
            let next = v.complete(Reply::Value(7));
            assert_eq!(next, Some(Exit::MmioRead { gpa: 0x3000_1000, size: 4 }));
            value = 9;
            assert_eq!(v.run(Reply::Value(9)), Exit::PioOut { port: 0x91, size: 4, data: vec![9, 0, 0, 0] });
        } else {
            let out = v.run(Reply::Value(7));
            assert_eq!(out, Exit::PioOut { port: 0x91, size: 4, data: vec![7, 0, 0, 0] });
        }
        assert_eq!(v.state().gpr[0], value);
    }
}

#[test]
fn stopped_while_both_run() {
    for begin in [Begin::Supervisor(CODE), Begin::User(CODE)] {
        let m = Machine::beginning(2, begin);
        m.code(CODE, |a| {
            let mut top = a.create_label();
            a.set_label(&mut top)?;
            crossing(a, 50)?;
            // And a loop that touches no memory.
            let mut empty = a.create_label();
            a.mov(ecx, 10_000)?;
            a.set_label(&mut empty)?;
            a.dec(ecx)?;
            a.jne(empty)?;
            a.jmp(top)
        });
        let mut threads = Vec::new();
        let mut kickers = Vec::new();
        for cpu in 0..2 {
            let mut v = m.engine.vcpu(cpu).unwrap();
            let state = m.state(cpu, begin, v.state());
            kickers.push(v.kicker());
            threads.push(std::thread::spawn(move || {
                v.set_state(&state).unwrap();
                let first = v.run(Reply::None);
                // Stopped and run on, twice.
                (first, v.run(Reply::None), v)
            }));
        }
        for _ in 0..2 {
            while m.word(DATA + 0x1ffe) as u32 & 0xff == 0 {
                std::thread::yield_now();
            }
            std::thread::sleep(Duration::from_millis(20));
            kickers.iter().for_each(|k| k.kick());
        }
        // A kick may have come before the other was seen: one more for the last run.
        while threads.iter().any(|t| !t.is_finished()) {
            kickers.iter().for_each(|k| k.kick());
            std::thread::yield_now();
        }
        for t in threads {
            let (a, b, _) = t.join().unwrap();
            assert_eq!((a, b), (Exit::Kicked, Exit::Kicked));
        }
    }
}

/// Orders for a processor that never runs do not pile up without bound, and it
/// still starts with a clean slate.
#[test]
fn one_never_runs() {
    let m = Machine::new(2);
    m.code(CODE, |a| {
        let mut top = a.create_label();
        a.mov(rbp, CODE + 0x4000)?;
        a.mov(ecx, 5000)?;
        a.set_label(&mut top)?;
        a.mov(byte_ptr(rbp), 0xc3u32)?;
        a.call(rbp)?;
        a.dec(ecx)?;
        a.jne(top)?;
        done_with(a, 1)
    });
    let idle = m.engine.vcpu(1).unwrap();
    assert_eq!(m.run(&[Begin::Supervisor(CODE)]), [1]);
    drop(idle);
}

#[test]
fn how_many_there_may_be() {
    use bunshin_translator::TranslatorEngine;
    for wrong in [0, 65, u32::MAX] {
        let error = TranslatorEngine::new(wrong).err().unwrap();
        assert!(error.to_string().contains("1 to 64"), "{error}");
    }
    let m = Machine::new(64);
    assert!(m.engine.vcpu(64).is_err());
    assert!(m.engine.vcpu(63).is_ok());
    assert!(m.engine.vcpu(63).is_err());
}
