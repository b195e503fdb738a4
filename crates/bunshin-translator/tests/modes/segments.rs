//! Limits, rights and types of segments: SDM volume 3, 5.2 to 5.7.
use crate::machine::*;
use iced_x86::code_asm::*;
use iced_x86::IcedError;

const GP: u8 = 13;
const SS: u8 = 12;

fn fault(vector: u8, error: u32, ip: u32) -> End {
    End::Fault { vector, error, ip }
}

/// Run one access through DS (or ES, FS, SS) of a segment in protected mode.
fn access(access: u32, limit: u32, write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> End {
    let mut m = Machine::protected();
    let s = segment(FREE, DATA, limit, access);
    for n in [0, 3, 4, 5] {
        m.state.segments[n] = s;
    }
    m.code(write);
    m.run()
}

const RW: u32 = 0xc093;
const READ_ONLY: u32 = 0xc091;
const DOWN: u32 = 0xc097;
const CODE_READ: u32 = 0xc09b;
const CODE_ONLY: u32 = 0xc099;

#[test]
fn an_access_inside_the_limit() {
    let mut m = Machine::protected();
    m.state.segments[3] = segment(FREE, DATA, 0x1003, RW);
    m.put(DATA + 0x1000, &0x1234_5678u32.to_le_bytes());
    m.code(|a| {
        a.mov(eax, dword_ptr(0x1000u32))?;
        a.mov(dword_ptr(0x10u32), eax)
    });
    assert_eq!(m.run(), End::Done);
    assert_eq!(m.state.gpr[0], 0x1234_5678);
    assert_eq!(m.word(DATA + 0x10), 0x1234_5678);
}

#[test]
fn the_last_byte_counts() {
    for (at, size, good) in [
        (0xffcu32, 4, true),
        (0xffd, 4, false),
        (0xfff, 1, true),
        (0x1000, 1, false),
        (0xffe, 2, true),
        (0xfff, 2, false),
        (0xffff_ffff, 4, false),
    ] {
        for write in [false, true] {
            let end = access(RW, 0xfff, |a| match (size, write) {
                (1, false) => a.mov(al, byte_ptr(at)),
                (1, true) => a.mov(byte_ptr(at), al),
                (2, false) => a.mov(ax, word_ptr(at)),
                (2, true) => a.mov(word_ptr(at), ax),
                (_, false) => a.mov(eax, dword_ptr(at)),
                (_, true) => a.mov(dword_ptr(at), eax),
            });
            let wanted = if good { End::Done } else { fault(GP, 0, CODE as u32) };
            assert_eq!(end, wanted, "{size} bytes at {at:#x}, write {write}");
        }
    }
}

#[test]
fn every_override_is_looked_at() {
    let end = |s: fn(AsmMemoryOperand) -> AsmMemoryOperand| {
        access(RW, 0xfff, |a| a.mov(eax, s(dword_ptr(0x1000u32))))
    };
    type Override = fn(AsmMemoryOperand) -> AsmMemoryOperand;
    let all: [Override; 4] = [|m| m.es(), |m| m.fs(), |m| m.gs(), |m| m.ds()];
    for s in all {
        assert_eq!(end(s), fault(GP, 0, CODE as u32));
    }
    assert_eq!(end(|m| m.ss()), End::Done);
}

#[test]
fn strings_stop_at_the_limit() {
    let mut m = Machine::protected();
    m.state.segments[0] = segment(FREE, DATA, 0x1fff, RW);
    m.state.gpr[7] = 0x1ff0;
    m.state.gpr[1] = 8;
    m.code(|a| a.rep().stosd());
    assert_eq!(m.run(), fault(GP, 0, CODE as u32));
    // Four elements fit, and the registers say so.
    assert_eq!((m.state.gpr[1], m.state.gpr[7]), (4, 0x2000));
}

#[test]
fn segments_that_expand_down() {
    let read = |at: u32| access(DOWN, 0xfff, move |a| a.mov(eax, dword_ptr(at)));
    assert_eq!(read(0x1000), End::Done);
    assert_eq!(read(0xfff), fault(GP, 0, CODE as u32));
    assert_eq!(read(0x1_0000), End::Done);
    // Without B the top is 64 KiB.
    let small = |at: u32| access(DOWN & !0x4000, 0xfff, move |a| a.mov(eax, dword_ptr(at)));
    assert_eq!(small(0xfffc), End::Done);
    assert_eq!(small(0xfffd), fault(GP, 0, CODE as u32));
}

#[test]
fn rights_of_types() {
    type Write = fn(&mut CodeAssembler) -> Result<(), IcedError>;
    let read: Write = |a| a.mov(eax, dword_ptr(0u32));
    let write: Write = |a| a.mov(dword_ptr(0u32), eax);
    let change: Write = |a| a.add(dword_ptr(0u32), 1);
    for (what, rights, good) in [
        (read, READ_ONLY, true),
        (write, READ_ONLY, false),
        (change, READ_ONLY, false),
        (read, CODE_READ, true),
        (write, CODE_READ, false),
        (read, CODE_ONLY, false),
        (write, CODE_ONLY, false),
    ] {
        let end = access(rights, u32::MAX >> 12, what);
        assert_eq!(end, if good { End::Done } else { fault(GP, 0, CODE as u32) }, "rights {rights:#x}");
    }
}

#[test]
fn code_is_not_written_through_cs() {
    let mut m = Machine::protected();
    m.code(|a| a.mov(dword_ptr(DATA as u32).cs(), eax));
    assert_eq!(m.run(), fault(GP, 0, CODE as u32));
    let mut m = Machine::protected();
    m.put(DATA, &[7]);
    m.code(|a| a.mov(al, byte_ptr(DATA as u32).cs()));
    assert_eq!(m.run(), End::Done);
    assert_eq!(m.state.gpr[0], 7);
}

#[test]
fn null_segments_cannot_be_used() {
    for n in [0u16, 1, 2, 3] {
        let mut m = Machine::protected();
        m.code(|a| {
            a.mov(eax, u32::from(n))?;
            a.mov(fs, eax)?;
            a.mov(eax, dword_ptr(DATA as u32).fs())
        });
        assert!(matches!(m.run(), End::Fault { vector: GP, error: 0, .. }));
        assert_eq!(m.state.segments[4].selector, n);
    }
    let mut m = Machine::protected();
    m.code(|a| {
        a.xor(eax, eax)?;
        a.mov(ss, eax)
    });
    assert_eq!(m.run(), fault(GP, 0, CODE as u32 + 2));
}

#[test]
fn the_stack_segment_has_faults_of_its_own() {
    let mut m = Machine::protected();
    m.state.segments[2] = segment(FREE, 0, 0x7fff, RW);
    m.state.gpr[4] = 0x8004;
    m.set(9 * 8, 0);
    // The handler's frame must fit: a task gate would be a way out, an inner level too.
    m.state.segments[1].access = 0xc0fb;
    m.state.segments[1].selector = USER_CODE;
    m.state.segments[2].access = 0xc0f3;
    m.state.segments[2].selector = FREE | 3;
    m.code(|a| a.push(eax));
    assert_eq!(m.run(), fault(SS, 0, CODE as u32));
    for off in [0x7ffdu32, 0x8000] {
        let mut m = Machine::user();
        m.state.segments[2] = segment(FREE | 3, 0, 0x7fff, 0xc0f3);
        m.state.gpr[5] = u64::from(off);
        m.code(|a| a.mov(eax, dword_ptr(ebp)));
        assert_eq!(m.run(), fault(SS, 0, CODE as u32));
    }
}

#[test]
fn a_small_stack_in_32_bit_code_wraps_at_64_kib() {
    let mut m = Machine::protected();
    m.state.segments[2] = segment(KERNEL_DATA, DATA, 0xffff, 0x93);
    m.state.gpr[4] = 0xabcd_0002;
    m.state.gpr[0] = 0x1122_3344;
    m.code(|a| {
        a.push(ax)?;
        a.push(eax)?;
        a.pop(ebx)
    });
    assert_eq!(m.run(), End::Done);
    assert_eq!(m.state.gpr[4], 0xabcd_0000);
    assert_eq!(m.state.gpr[3], 0x1122_3344);
    assert_eq!(m.word(DATA + 0xfffc), 0x1122_3344);
    assert_eq!(m.word(DATA) & 0xffff, 0x3344);
}

#[test]
fn code_ends_at_its_limit() {
    // The instruction that crosses it does not run, nor does a branch beyond it.
    let mut m = Machine::protected();
    m.state.segments[1] = segment(FREE, 0, CODE as u32 + 3, 0xc09b);
    m.state.segments[1].access = 0x409b;
    m.put(CODE, &[0x90, 0x40, 0x66, 0xb8, 1, 0]);
    assert_eq!(m.run(), fault(GP, 0, CODE as u32 + 2));
    assert_eq!(m.state.gpr[0], 1);

    let mut m = Machine::protected();
    m.state.segments[1] = segment(FREE, 0, CODE as u32 + 0xff, 0x409b);
    m.code(|a| a.jmp(CODE + 0x100));
    assert_eq!(m.run(), fault(GP, 0, CODE as u32));

    let mut m = Machine::protected();
    m.state.segments[1] = segment(FREE, 0, CODE as u32 + 0xff, 0x409b);
    m.code(|a| {
        a.cmp(eax, eax)?;
        a.je(CODE + 0x1000)
    });
    assert_eq!(m.run(), fault(GP, 0, CODE as u32 + 2));

    let mut m = Machine::protected();
    m.state.segments[1] = segment(FREE, 0, CODE as u32 + 0xff, 0x409b);
    m.state.gpr[0] = CODE + 0x100;
    let top = m.state.gpr[4];
    m.code(|a| a.call(eax));
    assert_eq!(m.run(), fault(GP, 0, CODE as u32));
    assert_eq!(m.state.gpr[4], top - 16);
}

#[test]
fn the_same_code_under_another_limit() {
    // Translated once with room, it must not run past a limit set later.
    let mut m = Machine::protected();
    m.put(CODE, &[0x40, 0x40, 0x40, 0x40, 0xe6, DONE as u8]);
    m.state.segments[1] = segment(FREE, 0, CODE as u32 + 0xfff, 0x409b);
    assert_eq!(m.run(), End::Done);
    m.state.rip = CODE;
    m.state.gpr[0] = 0;
    m.state.segments[1].limit = CODE as u32 + 1;
    assert_eq!(m.run(), fault(GP, 0, CODE as u32 + 2));
    assert_eq!(m.state.gpr[0], 2);
}

#[test]
fn loading_checks_type_and_level() {
    let load = |entry: u64, selector: u16| {
        let mut m = Machine::user();
        m.set(FREE, entry);
        m.state.gpr[0] = selector.into();
        m.code(|a| a.mov(ds, eax));
        m.run()
    };
    let error = u32::from(FREE);
    assert_eq!(load(descriptor(0, 0xfff, 0xf3), FREE | 3), End::Done);
    // Level 0 data from level 3.
    assert_eq!(load(descriptor(0, 0xfff, 0x93), FREE | 3), fault(GP, error, CODE as u32));
    // Conforming code is for everybody, other code for its level.
    assert_eq!(load(descriptor(0, 0xfff, 0x9f), FREE | 3), End::Done);
    assert_eq!(load(descriptor(0, 0xfff, 0xf9), FREE | 3), fault(GP, error, CODE as u32));
    // Not present; a system segment; past the table.
    assert_eq!(load(descriptor(0, 0xfff, 0x73), FREE | 3), fault(11, error, CODE as u32));
    assert_eq!(load(descriptor(0, 0xfff, 0xe2), FREE | 3), fault(GP, error, CODE as u32));
    assert_eq!(load(0, 0xfff8 | 3), fault(GP, 0xfff8, CODE as u32));
}

#[test]
fn loading_marks_the_descriptor() {
    let mut m = Machine::protected();
    m.set(FREE, descriptor(DATA as u32, 0xfff, 0x92));
    m.code(|a| {
        a.mov(eax, u32::from(FREE))?;
        a.mov(es, eax)
    });
    assert_eq!(m.run(), End::Done);
    assert_eq!(m.word(GDT + u64::from(FREE) + 4) >> 8 & 0xff, 0x93);
}

#[test]
fn inspection_answers_in_zf() {
    let mut m = Machine::user();
    m.set(FREE, descriptor(0, 0xfff, 0x93));
    m.set(FREE + 8, descriptor(0, 0x1_2345, 0xf2));
    m.set(FREE + 16, descriptor(0, 0xfff, 0xf9));
    m.code(|a| {
        a.mov(ecx, u32::from(FREE))?;
        a.verr(cx)?;
        a.setz(al)?;
        a.mov(ecx, u32::from(FREE + 8))?;
        a.verw(cx)?;
        a.setz(ah)?;
        a.lsl(edx, ecx)?;
        a.lar(esi, ecx)?;
        a.mov(ecx, u32::from(FREE + 16))?;
        a.verr(cx)?;
        a.setz(bl)?;
        a.mov(edi, 0x55u32)?;
        a.lsl(edi, dword_ptr(0x10u32))?;
        a.setz(bh)
    });
    assert_eq!(m.run(), End::Done);
    assert_eq!(m.state.gpr[0] & 0xffff, 0x100);
    assert_eq!(m.state.gpr[2], 0x1_2345);
    assert_eq!(m.state.gpr[6] & 0xf0_ff00, 0xf200); // the rest is undefined
    assert_eq!(m.state.gpr[3] & 0xffff, 0);
    assert_eq!(m.state.gpr[7], 0x55);
}

#[test]
fn arpl_raises_the_level() {
    let mut m = Machine::user();
    m.state.gpr[0] = 0x10;
    m.state.gpr[3] = 3;
    m.code(|a| {
        a.arpl(ax, bx)?;
        a.setz(cl)?;
        a.arpl(ax, bx)?;
        a.setz(ch)
    });
    assert_eq!(m.run(), End::Done);
    assert_eq!(m.state.gpr[0], 0x13);
    assert_eq!(m.state.gpr[1] & 0xffff, 1);
}
