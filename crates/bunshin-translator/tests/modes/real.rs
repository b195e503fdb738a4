//! Real-address mode, big real mode, 16-bit addresses: SDM volume 3, 20.1.
use crate::machine::*;
use iced_x86::code_asm::*;

const GP: u8 = 13;
const SS: u8 = 12;

#[test]
fn selectors_are_bases() {
    let mut m = Machine::real();
    m.put(0x1_2345 * 16 % RAM, &[0; 2]);
    m.code(|a| {
        a.mov(ax, 0x1234u32)?;
        a.mov(es, ax)?;
        a.mov(word_ptr(0x56).es(), ax)?;
        a.mov(bx, es)
    });
    assert_eq!(m.run(), End::Done);
    assert_eq!(m.word(0x1_2340 + 0x56) & 0xffff, 0x1234);
    assert_eq!(m.state.segments[0].base, 0x1_2340);
}

#[test]
fn addresses_wrap_at_64_kib() {
    let mut m = Machine::real();
    m.state.gpr[3] = 0xfff0;
    m.state.gpr[6] = 0x20;
    m.put(DATA + 0x14, &[0x99]);
    m.code(|a| a.mov(al, byte_ptr(bx + si + 4)));
    assert_eq!(m.run(), End::Done);
    assert_eq!(m.state.gpr[0] & 0xff, 0x99);
}

#[test]
fn words_do_not_wrap() {
    let mut m = Machine::real();
    m.state.gpr[3] = 0xffff;
    m.code(|a| a.mov(ax, word_ptr(bx)));
    assert_eq!(m.run(), End::Fault { vector: GP, error: 0, ip: 0 });
    // The same on the stack is its own fault.
    let mut m = Machine::real();
    m.state.gpr[5] = 0xffff;
    m.code(|a| a.mov(ax, word_ptr(bp)));
    assert_eq!(m.run(), End::Fault { vector: SS, error: 0, ip: 0 });
}

#[test]
fn big_addresses_need_a_big_limit() {
    let mut m = Machine::real();
    m.state.gpr[3] = 0x1_0000;
    m.put(DATA + 0x1_0000, &[0x42]);
    m.code(|a| a.mov(al, byte_ptr(ebx)));
    assert_eq!(m.run(), End::Fault { vector: GP, error: 0, ip: 0 });
    m.state.segments[3].limit = u32::MAX;
    m.state.segments[3].base = DATA;
    m.state.segments[1] = segment((CODE >> 4) as u16, CODE, 0xffff, 0x93);
    m.state.rip = 0;
    assert_eq!(m.run(), End::Done);
    assert_eq!(m.state.gpr[0] & 0xff, 0x42);
}

#[test]
fn protected_mode_and_back_leaves_big_limits() {
    let mut m = Machine::real();
    m.set(KERNEL_DATA, descriptor(0, u32::MAX, 0xc093));
    m.put(0x600, &[0xff, 0x0f, (GDT & 0xff) as u8, (GDT >> 8) as u8, 0, 0]);
    m.put(0x15_0000, &[0x77]);
    m.code(|a| {
        a.xor(ax, ax)?;
        a.mov(ds, ax)?;
        a.lgdt(fword_ptr(0x600))?;
        a.mov(eax, cr0)?;
        a.or(al, 1)?;
        a.mov(cr0, eax)?;
        a.mov(bx, u32::from(KERNEL_DATA))?;
        a.mov(es, bx)?;
        a.and(al, 0xfe)?;
        a.mov(cr0, eax)?;
        a.xor(bx, bx)?;
        a.mov(es, bx)?;
        a.mov(esi, 0x15_0000u32)?;
        a.mov(cl, byte_ptr(esi).es())?;
        // Code may be written here.
        a.mov(byte_ptr(0x100).cs(), cl)
    });
    assert_eq!(m.run(), End::Done);
    assert_eq!(m.state.gpr[1] & 0xff, 0x77);
    assert_eq!(m.word(CODE + 0x100) & 0xff, 0x77);
}

#[test]
fn interrupts_go_through_the_vector_table() {
    let mut m = Machine::real();
    m.state.rflags = 0x302 & !0x100;
    m.put(4 * 0x40, &[0x80, 0, 0, 0x10]);
    // pushf; pop bx; iret
    m.put(CODE + 0x80, &[0x9c, 0x5b, 0xcf]);
    m.code(|a| {
        a.int(0x40)?;
        a.pushf()?;
        a.pop(cx)
    });
    assert_eq!(m.run(), End::Done);
    assert_eq!(m.state.gpr[3] & 0x200, 0);
    assert_eq!(m.state.gpr[1] & 0x200, 0x200);
    assert_eq!(m.state.gpr[4], STACK);
    assert_eq!(m.word(STACK - 6) & 0xffff, 2);
}

#[test]
fn the_vector_table_has_a_limit_and_can_move() {
    let mut m = Machine::real();
    m.state.idt.limit = 4 * 0x40 + 2;
    m.code(|a| a.int(0x40));
    assert_eq!(m.run(), End::Fault { vector: GP, error: 0, ip: 0 });
    let mut m = Machine::real();
    m.state.idt.base = 0x600;
    m.put(0x600 + 4 * 0x40, &[0x80, 0, 0, 0x10]);
    m.put(CODE + 0x80, &[0xe6, DONE as u8]);
    m.code(|a| a.int(0x40));
    assert_eq!(m.run(), End::Done);
    assert_eq!(m.state.rip, 0x82);
}

#[test]
fn far_calls_and_returns() {
    let mut m = Machine::real();
    // mov bx, cs; retf 2
    m.put(0x1_8000 + 0x10, &[0x8c, 0xcb, 0xca, 2, 0]);
    m.code(|a| {
        a.push(ax)?;
        a.db(&[0x9a, 0x10, 0x00, 0x00, 0x18])?;
        a.mov(cx, cs)
    });
    assert_eq!(m.run(), End::Done);
    assert_eq!((m.state.gpr[3], m.state.gpr[1]), (0x1800, 0x1000));
    assert_eq!(m.state.gpr[4], STACK);
}

#[test]
fn wide_branches_end_at_the_limit() {
    let mut m = Machine::real();
    // jmp dword 0x10000 (operand-size prefix)
    m.put(CODE, &[0x66, 0xe9, 0xfa, 0xff, 0, 0]);
    assert_eq!(m.run(), End::Fault { vector: GP, error: 0, ip: 0 });
    // Code that runs over the end does not come again at 0.
    let mut m = Machine::real();
    m.put(CODE + 0xffff, &[0x90]);
    m.state.rip = 0xffff;
    m.put(CODE, &[0xe6, DONE as u8]);
    assert_eq!(m.run(), End::Fault { vector: GP, error: 0, ip: 0 });
}

#[test]
fn what_does_not_exist_in_real_mode() {
    for bytes in [&[0x0fu8, 0, 0xc0][..], &[0x0f, 0, 0xd8], &[0x63, 0xc0], &[0x0f, 3, 0xc0]] {
        let mut m = Machine::real();
        m.code(|a| a.db(bytes));
        assert_eq!(m.run(), End::Fault { vector: 6, error: 0, ip: 0 }, "{bytes:x?}");
    }
}

#[test]
fn the_stack_pointer_wraps() {
    let mut m = Machine::real();
    m.state.gpr[4] = 0;
    m.state.gpr[0] = 0x1234;
    m.code(|a| {
        a.push(ax)?;
        a.pop(bx)
    });
    assert_eq!(m.run(), End::Done);
    assert_eq!(m.state.gpr[3] & 0xffff, 0x1234);
    assert_eq!(m.word(0xfffe) & 0xffff, 0x1234);
}

#[test]
fn a_closed_a20_gate_wraps_at_one_megabyte() {
    for paging in [false, true] {
        let mut m = if paging { Machine::protected() } else { Machine::real() };
        m.put(0x10_0500, &[0x11]);
        m.put(0x500, &[0x22]);
        if paging {
            // One page of 4 MiB, mapped onto itself.
            m.put(0x7000, &0x83u32.to_le_bytes());
            m.state.cr3 = 0x7000;
            m.state.cr4 |= 0x10;
            m.state.cr0 |= 1 << 31;
            m.code(|a| a.mov(al, byte_ptr(0x10_0500u32)));
        } else {
            m.state.segments[3] = segment(0xffff, 0xf_fff0, 0xffff, 0x93);
            m.code(|a| a.mov(al, byte_ptr(0x510)));
        }
        let start = m.state.clone();
        for (open, wanted) in [(true, 0x11), (false, 0x22), (true, 0x11)] {
            m.engine.set_a20(open);
            m.state = start.clone();
            assert_eq!(m.run(), End::Done);
            assert_eq!(m.state.gpr[0] & 0xff, wanted, "open {open}, paging {paging}");
        }
    }
}
