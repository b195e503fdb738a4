//! Instructions that control registers shut off, and alignment checks: SDM volume 3,
//! 2.5 and 6.15 (#NM, #UD, #AC).
use crate::machine::*;
use iced_x86::code_asm::*;
use iced_x86::IcedError;

const UD: u8 = 6;
const NM: u8 = 7;
const AC: u8 = 17;
const MP: u64 = 2;
const EM: u64 = 4;
const TS: u64 = 8;
const AM: u64 = 1 << 18;
const OSFXSR: u64 = 1 << 9;
const OSXSAVE: u64 = 1 << 18;
const AC_FLAG: u64 = 1 << 18;

type Write = fn(&mut CodeAssembler) -> Result<(), IcedError>;

const X87: Write = |a| a.fld1();
const WAIT: Write = |a| a.wait();
const MMX: Write = |a| a.paddb(mm0, mm1);
const SSE: Write = |a| a.addps(xmm0, xmm1);
const SSE_LOAD: Write = |a| a.movups(xmm0, xmmword_ptr(DATA as u32));
const AVX: Write = |a| a.vaddps(ymm0, ymm1, ymm2);
const BMI: Write = |a| a.andn(eax, ebx, ecx);
const FXSAVE: Write = |a| a.fxsave(ptr(DATA as u32));
const POPCNT: Write = |a| a.popcnt(eax, ebx);

fn run(set0: u64, set4: u64, xcr0: u64, write: Write) -> End {
    let mut m = Machine::protected();
    m.state.cr0 |= set0;
    m.state.cr4 |= set4;
    m.state.xcr0 = xcr0;
    m.code(write);
    m.run()
}

fn fault(vector: u8) -> End {
    End::Fault { vector, error: 0, ip: CODE as u32 }
}

#[test]
fn what_shuts_off_what() {
    const ALL: u64 = OSFXSR | OSXSAVE;
    let cases: &[(&str, u64, u64, u64, Write, End)] = &[
        ("x87", 0, 0, 1, X87, End::Done),
        ("x87, TS", TS, ALL, 7, X87, fault(NM)),
        ("x87, EM", EM, ALL, 7, X87, fault(NM)),
        ("wait, TS", TS, ALL, 7, WAIT, End::Done),
        ("wait, MP TS", MP | TS, ALL, 7, WAIT, fault(NM)),
        ("mmx", 0, 0, 1, MMX, End::Done),
        ("mmx, TS", TS, ALL, 7, MMX, fault(NM)),
        ("mmx, EM", EM, ALL, 7, MMX, fault(UD)),
        ("sse", 0, OSFXSR, 1, SSE, End::Done),
        ("sse load", 0, OSFXSR, 1, SSE_LOAD, End::Done),
        ("sse, no OSFXSR", 0, 0, 1, SSE, fault(UD)),
        ("sse load, no OSFXSR", 0, 0, 1, SSE_LOAD, fault(UD)),
        ("sse, TS", TS, ALL, 7, SSE, fault(NM)),
        ("sse, EM", EM, ALL, 7, SSE, fault(UD)),
        ("avx", 0, ALL, 7, AVX, End::Done),
        ("avx, no OSXSAVE", 0, OSFXSR, 7, AVX, fault(UD)),
        ("avx, no XCR0", 0, ALL, 3, AVX, fault(UD)),
        ("avx, TS", TS, ALL, 7, AVX, fault(NM)),
        ("bmi", EM | TS, 0, 1, BMI, End::Done),
        ("popcnt", EM | TS, 0, 1, POPCNT, End::Done),
        ("fxsave", 0, 0, 1, FXSAVE, End::Done),
        ("fxsave, TS", TS, ALL, 7, FXSAVE, fault(NM)),
        ("fxsave, EM", EM, ALL, 7, FXSAVE, fault(NM)),
    ];
    for (name, set0, set4, xcr0, write, wanted) in cases {
        assert_eq!(run(*set0, *set4, *xcr0, *write), *wanted, "{name}");
    }
}

#[test]
fn clts_opens_what_ts_shut() {
    let mut m = Machine::protected();
    m.state.cr0 |= TS;
    m.code(|a| {
        a.clts()?;
        a.fld1()?;
        a.mov(eax, cr0)?;
        a.or(eax, TS as i32)?;
        a.mov(cr0, eax)?;
        a.fld1()
    });
    let End::Fault { vector, ip, .. } = m.run() else { panic!() };
    assert_eq!((vector, ip), (NM, CODE as u32 + 15));
}

#[test]
fn alignment_is_checked_at_level_3() {
    let load: Write = |a| a.mov(eax, dword_ptr(DATA as u32 + 2));
    let cases: &[(u64, u64, Write, End)] = &[
        (AM, AC_FLAG, load, fault(AC)),
        (0, AC_FLAG, load, End::Done),
        (AM, 0, load, End::Done),
        (AM, AC_FLAG, |a| a.mov(word_ptr(DATA as u32 + 2), ax), End::Done),
        (AM, AC_FLAG, |a| a.mov(word_ptr(DATA as u32 + 1), ax), fault(AC)),
        (AM, AC_FLAG, |a| a.mov(byte_ptr(DATA as u32 + 1), al), End::Done),
        (AM, AC_FLAG, |a| a.push(eax), End::Done),
        (AM, AC_FLAG, |a| a.fld(qword_ptr(DATA as u32 + 4)), fault(AC)),
    ];
    for (n, (set0, flags, write, wanted)) in cases.iter().enumerate() {
        let mut m = Machine::user();
        m.state.cr0 |= set0;
        m.state.rflags |= flags;
        m.code(*write);
        assert_eq!(m.run(), *wanted, "case {n}");
    }
    let mut m = Machine::protected();
    m.state.cr0 |= AM;
    m.state.rflags |= AC_FLAG;
    m.code(load);
    assert_eq!(m.run(), End::Done);
}

#[test]
fn popf_turns_alignment_checks_on() {
    let mut m = Machine::user();
    m.state.cr0 |= AM;
    m.code(|a| {
        a.mov(eax, dword_ptr(DATA as u32 + 1))?;
        a.push(AC_FLAG as u32 | 2)?;
        a.popfd()?;
        a.mov(eax, dword_ptr(DATA as u32 + 1))
    });
    assert_eq!(m.run(), End::Fault { vector: AC, error: 0, ip: CODE as u32 + 11 });
}

/// Divide by zero with that exception unmasked, and meet it.
fn divide(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.fninit()?;
    a.push(0x37bu32)?;
    a.fldcw(word_ptr(esp))?;
    a.fld1()?;
    a.fldz()?;
    a.fdivp(st1, st0)?;
    a.wait()
}

#[test]
fn x87_errors_are_exceptions_with_ne() {
    let mut m = Machine::protected();
    m.state.cr0 |= 1 << 5;
    m.code(divide);
    assert!(matches!(m.run(), End::Fault { vector: 16, .. }));
}

#[test]
fn x87_errors_are_irq_13_without_ne() {
    let mut m = Machine::protected();
    m.code(|a| {
        // Both PICs to vectors 0x20 and up, all inputs but 2 and 13 masked.
        for (port, value) in [
            (0x20u32, 0x11u32),
            (0x21, 0x20),
            (0x21, 4),
            (0x21, 1),
            (0xa0, 0x11),
            (0xa1, 0x28),
            (0xa1, 2),
            (0xa1, 1),
            (0x21, 0xfb),
            (0xa1, 0xdf),
        ] {
            a.mov(al, value)?;
            a.out(port, al)?;
        }
        a.sti()?;
        divide(a)
    });
    assert!(matches!(m.run(), End::Fault { vector: 0x2d, .. }));
}
