//! Virtual-8086 mode, with and without CR4.VME: SDM volume 3, chapter 20.
use crate::machine::*;
use bunshin_core::state::Segment;
use bunshin_core::{Exit, Reply};
use iced_x86::code_asm::*;
use iced_x86::IcedError;

const GP: u8 = 13;
const VM: u64 = 0x2_0000;
const IF: u64 = 0x200;
const VIF: u64 = 0x8_0000;
const VIP: u64 = 0x10_0000;

/// In virtual-8086 mode at CODE, IOPL as given.
fn machine(iopl: u64) -> Machine {
    let mut m = Machine::protected();
    let s = |base: u64| segment((base >> 4) as u16, base, 0xffff, 0xf3);
    m.state.segments = [s(DATA), s(CODE), s(0), s(DATA), s(0x3_0000), s(0x4_0000)];
    m.state.rip = 0;
    m.state.rflags = VM | iopl << 12 | 2;
    m.state.gpr[4] = STACK;
    // Every port is allowed.
    m.state.tr.limit = 0x2068;
    m.set(TR, descriptor(TSS as u32, 0x2068, 0x8b));
    m.put(TSS + 0x66, &0x88u16.to_le_bytes());
    m.put(TSS + 0x68 + 0x2000, &[0xff]);
    m.put(TSS + 0x68, &[0xff; 32]); // redirection: all to the protected-mode handlers
    m
}

#[test]
fn it_addresses_as_an_8086() {
    let mut m = machine(3);
    m.code(|a| {
        a.mov(ax, 0x2345u32)?;
        a.mov(ds, ax)?;
        a.mov(word_ptr(0x10), ax)?;
        a.mov(bx, ds)?;
        a.pushf()?;
        a.pop(cx)
    });
    assert_eq!(m.run(), End::Done);
    assert_eq!(m.word(0x2_3460) & 0xffff, 0x2345);
    assert_eq!(m.state.segments[3].base, 0x2_3450);
    assert_eq!(m.state.gpr[1] & 0xffff, 0x3002);
    assert_eq!(m.state.segments[3].access & 0x60, 0x60);
}

#[test]
fn limits_are_64_kib() {
    let mut m = machine(3);
    m.state.gpr[3] = 0xffff;
    m.code(|a| a.mov(ax, word_ptr(bx)));
    assert_eq!(m.run(), End::Fault { vector: GP, error: 0, ip: 0 });
}

#[test]
fn an_exception_pushes_all_segments_and_leaves_null_ones() {
    let mut m = machine(3);
    m.code(|a| a.ud2());
    assert_eq!(m.run(), End::Fault { vector: 6, error: 0, ip: 0 });
    let top = INNER_STACK;
    // GS FS DS ES SS ESP EFLAGS CS EIP, from the top down
    let frame: Vec<u32> = (1..=9).map(|n| m.word(top - 4 * n)).collect();
    let flags = frame[6];
    assert_eq!(frame[..6], [0x4000, 0x3000, 0x2000, 0x2000, 0, STACK as u32]);
    assert_eq!(flags & VM as u32, VM as u32);
    assert_eq!(frame[7..], [0x1000, 0]);
    assert_eq!(m.state.rflags & VM, 0);
    for n in [0, 3, 4, 5] {
        assert_eq!(m.state.segments[n].selector, 0);
        assert_eq!(m.state.segments[n].access & 0x1_0000, 0x1_0000);
    }
}

#[test]
fn iret_from_level_0_enters_it() {
    let mut m = Machine::protected();
    m.state.tr.limit = 0x2068;
    m.put(TSS + 0x2068, &[0xff]);
    // out DONE, al
    m.put(0x1_2340, &[0xe6, DONE as u8]);
    m.code(|a| {
        for word in [0x5000u32, 0x4000, 0x3000, 0x2000, 0x1000, 0xfff0, VM as u32 | 0x3202, 0x1234, 0] {
            a.push(word)?;
        }
        a.iretd()
    });
    assert_eq!(m.run(), End::Done);
    let s: Vec<Segment> = m.state.segments.to_vec();
    assert_eq!(
        s.iter().map(|s| s.selector).collect::<Vec<_>>(),
        [0x2000, 0x1234, 0x1000, 0x3000, 0x4000, 0x5000]
    );
    for s in s {
        assert_eq!((s.base, s.limit, s.access & 0xff), (u64::from(s.selector) << 4, 0xffff, 0xf3));
    }
    assert_eq!(m.state.gpr[4], 0xfff0);
    assert_eq!(m.state.rflags & (VM | IF), VM | IF);
}

#[test]
fn sensitive_instructions_need_iopl_3() {
    type Write = fn(&mut CodeAssembler) -> Result<(), IcedError>;
    let all: [(&str, Write); 6] = [
        ("cli", |a| a.cli()),
        ("sti", |a| a.sti()),
        ("pushf", |a| a.pushf()),
        ("popf", |a| a.popf()),
        ("int", |a| a.int(0x21)),
        ("iret", |a| a.iret()),
    ];
    for (name, write) in all {
        let mut m = machine(0);
        m.code(write);
        assert_eq!(m.run(), End::Fault { vector: GP, error: 0, ip: 0 }, "{name}");
    }
    let mut m = machine(3);
    m.code(|a| {
        a.sti()?;
        a.nop()?;
        a.pushf()?;
        a.cli()?;
        a.pop(ax)
    });
    assert_eq!(m.run(), End::Done);
    assert_eq!(m.state.gpr[0] & IF, IF);
    assert_eq!(m.state.rflags & IF, 0);
}

#[test]
fn privileged_instructions_fault_and_others_are_unknown() {
    let end = |bytes: &[u8]| {
        let mut m = machine(3);
        m.code(|a| a.db(bytes));
        m.run()
    };
    for bytes in [&[0xf4u8][..], &[0x0f, 0x20, 0xc0], &[0x0f, 0x06], &[0x0f, 0x01, 0x16, 0, 0]] {
        assert_eq!(end(bytes), End::Fault { vector: GP, error: 0, ip: 0 }, "{bytes:x?}");
    }
    // SLDT, STR, LLDT, LAR, VERR, ARPL
    for bytes in [
        &[0x0fu8, 0, 0xc0][..],
        &[0x0f, 0, 0xc8],
        &[0x0f, 0, 0xd0],
        &[0x0f, 2, 0xc0],
        &[0x0f, 0, 0xe0],
        &[0x63, 0xc0],
    ] {
        assert_eq!(end(bytes), End::Fault { vector: 6, error: 0, ip: 0 }, "{bytes:x?}");
    }
}

#[test]
fn ports_are_by_the_bitmap_even_with_iopl_3() {
    let mut m = machine(3);
    m.put(TSS + 0x88 + 0x80 / 8, &[0x01]);
    m.code(|a| {
        a.in_(al, 0x71)?;
        a.out(0x80, al)
    });
    m.vcpu.set_state(&m.state).unwrap();
    let first = m.vcpu.run(Reply::None);
    assert!(matches!(first, Exit::PioIn { port: 0x71, .. }), "{first:?}");
    let end = m.vcpu.run(Reply::Value(0));
    assert!(matches!(end, Exit::PioOut { port, .. } if port == FAULT + 13), "{end:?}");
}

#[test]
fn vme_redirects_interrupts_and_keeps_a_virtual_flag() {
    let mut m = machine(0);
    m.state.cr4 |= 1;
    m.state.rflags |= VIF;
    // INT 21h to the program's own handler at 1000:0080
    m.put(TSS + 0x68 + 4, &[0xfd]);
    m.put(4 * 0x21, &[0x80, 0, 0, 0x10]);
    m.put(CODE + 0x80, &[0x9c, 0x5b, 0xcf]); // pushf; pop bx; iret
    m.code(|a| {
        a.int(0x21)?;
        a.pushf()?;
        a.pop(cx)?;
        a.cli()?;
        a.pushf()?;
        a.pop(dx)
    });
    assert_eq!(m.run(), End::Done);
    let g = &m.state.gpr;
    assert_eq!(g[3] & 0xffff & IF, 0, "the handler runs with VIF clear");
    assert_eq!(g[1] & 0x3200, 0x3200, "IRET brings it back; IOPL reads as 3");
    assert_eq!(g[2] & IF, 0);
    assert_eq!(m.state.rflags & (VIF | 0x3000), 0);
}

#[test]
fn a_waiting_virtual_interrupt_faults_sti() {
    let mut m = machine(0);
    m.state.cr4 |= 1;
    m.state.rflags |= VIP;
    m.code(|a| a.sti());
    assert_eq!(m.run(), End::Fault { vector: GP, error: 0, ip: 0 });
}

#[test]
fn pvi_gives_level_3_a_virtual_flag() {
    let mut m = Machine::user();
    m.state.cr4 |= 2;
    m.put(TSS + 0x66, &0x68u16.to_le_bytes());
    m.state.tr.limit = 0x2068;
    m.code(|a| {
        a.sti()?;
        a.nop()
    });
    assert_eq!(m.run(), End::Done);
    assert_eq!(m.state.rflags & (VIF | IF), VIF);
}
