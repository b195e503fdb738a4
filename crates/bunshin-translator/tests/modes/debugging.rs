//! Breakpoints, single steps and what follows MOV SS: SDM volume 3, 17.2 and 17.3.
use crate::machine::*;
use iced_x86::code_asm::*;

const DB: u8 = 1;
const TF: u64 = 0x100;
const RF: u64 = 0x1_0000;
/// Global enable of breakpoint 0; its R/W and LEN fields.
const G0: u64 = 2;
const ON_STORE: u64 = 1 << 16;
const ON_PORT: u64 = 2 << 16;
const ON_ACCESS: u64 = 3 << 16;
const FOUR: u64 = 3 << 18;
const GD: u64 = 1 << 13;
/// DR6 and DR7 in `CpuState::dr`.
const DR6: usize = 4;
const DR7: usize = 5;

fn db(ip: u64) -> End {
    End::Fault { vector: DB, error: 0, ip: ip as u32 }
}

#[test]
fn code_breakpoints_come_before_the_instruction() {
    let mut m = Machine::protected();
    m.code(|a| {
        a.inc(eax)?;
        a.inc(eax)?;
        a.inc(eax)
    });
    m.state.dr[0] = CODE + 1;
    m.state.dr[DR7] = 0x400 | G0;
    assert_eq!(m.run(), db(CODE + 1));
    assert_eq!((m.state.gpr[0], m.state.dr[DR6] & 0xf), (1, 1));
    // Another time at another place, then not at all, in code that is translated by now.
    m.state.gpr[0] = 0;
    m.state.rip = CODE;
    m.state.dr[0] = CODE + 2;
    assert_eq!(m.run(), db(CODE + 2));
    m.state.rip = CODE;
    m.state.dr[DR7] = 0x400;
    assert_eq!(m.run(), End::Done);
}

#[test]
fn rf_lets_one_instruction_pass() {
    let mut m = Machine::protected();
    m.code(|a| {
        let mut top = a.create_label();
        a.mov(ecx, 2u32)?;
        a.set_label(&mut top)?;
        a.inc(eax)?;
        a.dec(ecx)?;
        a.jnz(top)
    });
    m.state.dr[0] = CODE + 5;
    m.state.dr[DR7] = 0x400 | G0;
    m.state.rip = CODE + 5;
    m.state.gpr[1] = 2;
    m.state.rflags |= RF;
    // Passed once, caught the second time round.
    assert_eq!(m.run(), db(CODE + 5));
    assert_eq!((m.state.gpr[0], m.state.gpr[1]), (1, 1));
}

#[test]
fn iret_brings_rf() {
    let mut m = Machine::protected();
    let target = CODE + 0x100;
    m.put(target, &[0x40, 0xe6, DONE as u8]);
    m.state.dr[0] = target;
    m.state.dr[DR7] = 0x400 | G0;
    m.code(|a| {
        a.push(RF as u32 | 2)?;
        a.push(u32::from(KERNEL_CODE))?;
        a.push(target as u32)?;
        a.iretd()
    });
    assert_eq!(m.run(), End::Done);
    assert_eq!(m.state.gpr[0], 1);
    assert_eq!(m.state.rflags & RF, 0);
}

#[test]
fn data_breakpoints_trap_after_the_access() {
    let at = DATA as u32;
    for (kind, read, write) in [(ON_STORE, false, true), (ON_ACCESS, true, true)] {
        for store in [false, true] {
            let mut m = Machine::protected();
            m.code(|a| {
                // Fill the tables first: a neighbour in the same page is no hit.
                a.mov(dword_ptr(at + 8), eax)?;
                a.mov(ebx, dword_ptr(at + 8))?;
                if store {
                    a.mov(dword_ptr(at), eax)
                } else {
                    a.mov(eax, dword_ptr(at))
                }
            });
            m.state.dr[0] = DATA + 2;
            m.state.dr[DR7] = 0x400 | G0 | kind;
            let end = m.run();
            let hit = if store { write } else { read };
            assert_eq!(end, if hit { db(CODE + 16) } else { End::Done }, "store {store}");
            assert_eq!(m.state.dr[DR6] & 0xf, u64::from(hit));
        }
    }
}

#[test]
fn pushes_and_strings_meet_data_breakpoints() {
    let mut m = Machine::protected();
    m.code(|a| a.push(eax));
    m.state.dr[0] = STACK - 4;
    m.state.dr[DR7] = 0x400 | G0 | ON_STORE | FOUR;
    assert_eq!(m.run(), db(CODE + 1));

    let mut m = Machine::protected();
    m.state.gpr[7] = DATA;
    m.state.gpr[1] = 8;
    m.code(|a| a.rep().stosd());
    m.state.dr[0] = DATA + 8;
    m.state.dr[DR7] = 0x400 | G0 | ON_STORE | FOUR;
    // After the third element, with the rest still to do.
    assert_eq!(m.run(), db(CODE));
    assert_eq!((m.state.gpr[1], m.state.gpr[7]), (5, DATA + 12));
}

#[test]
fn port_breakpoints_need_de() {
    for de in [false, true] {
        let mut m = Machine::protected();
        m.state.cr4 |= if de { 8 } else { 0 };
        m.state.dr[0] = 0x21;
        m.state.dr[DR7] = 0x400 | G0 | ON_PORT;
        m.code(|a| a.in_(al, 0x21));
        assert_eq!(m.run(), if de { db(CODE + 2) } else { End::Done });
    }
}

#[test]
fn general_detect_guards_the_registers() {
    let mut m = Machine::protected();
    m.state.dr[DR7] = 0x400 | GD;
    m.code(|a| a.mov(eax, dr0));
    assert_eq!(m.run(), db(CODE));
    assert_eq!(m.state.dr[DR6] & 0x2000, 0x2000);
    assert_eq!(m.state.dr[DR7] & GD, 0);
}

#[test]
fn dr4_and_dr5_are_aliases_without_de() {
    let mut m = Machine::protected();
    m.state.dr[0] = 0x1234;
    m.code(|a| {
        a.db(&[0x0f, 0x21, 0xe0])?; // mov eax, dr4
        a.mov(ebx, dr7)
    });
    assert_eq!(m.run(), End::Done);
    assert_eq!((m.state.gpr[0], m.state.gpr[3]), (0xffff_0ff0, 0x400));
    let mut m = Machine::protected();
    m.state.cr4 |= 8;
    m.code(|a| a.db(&[0x0f, 0x21, 0xe0]));
    assert_eq!(m.run(), End::Fault { vector: 6, error: 0, ip: CODE as u32 });
}

#[test]
fn single_steps() {
    let mut m = Machine::protected();
    m.state.rflags |= TF;
    m.code(|a| a.inc(eax));
    assert_eq!(m.run(), db(CODE + 1));
    assert_eq!(m.state.dr[DR6] & 0x4000, 0x4000);
    assert_eq!(m.state.rflags & TF, 0);
    // The flag is set by POPF: the trap comes after the instruction behind it.
    let mut m = Machine::protected();
    m.code(|a| {
        a.push(TF as u32 | 2)?;
        a.popfd()?;
        a.inc(eax)?;
        a.inc(eax)
    });
    assert_eq!(m.run(), db(CODE + 7));
    assert_eq!(m.state.gpr[0], 1);
}

#[test]
fn mov_ss_holds_traps_back() {
    let mut m = Machine::protected();
    m.state.gpr[0] = u64::from(KERNEL_DATA);
    m.state.rflags |= TF;
    m.code(|a| {
        a.mov(ss, eax)?;
        a.inc(ebx)?;
        a.inc(ebx)
    });
    assert_eq!(m.run(), db(CODE + 3));
    assert_eq!(m.state.gpr[3], 1);
}

#[test]
fn int1_and_int3() {
    let mut m = Machine::protected();
    m.code(|a| a.int1());
    assert_eq!(m.run(), db(CODE + 1));
    assert_eq!(m.state.dr[DR6] & 0xf00f, 0);
    let mut m = Machine::protected();
    m.code(|a| a.int3());
    assert_eq!(m.run(), End::Fault { vector: 3, error: 0, ip: CODE as u32 + 1 });
}

#[test]
fn into_and_bound() {
    let mut m = Machine::protected();
    m.state.gpr[0] = 0x7fff_ffff;
    m.code(|a| {
        a.into()?;
        a.inc(eax)?;
        a.into()
    });
    assert_eq!(m.run(), End::Fault { vector: 4, error: 0, ip: CODE as u32 + 3 });
    let mut m = Machine::protected();
    m.put(DATA, &[0xf0, 0xff, 0xff, 0xff, 5, 0, 0, 0]);
    m.state.gpr[0] = u64::from((-16i32) as u32);
    m.code(|a| {
        a.bound(eax, qword_ptr(DATA as u32))?;
        a.mov(eax, 6u32)?;
        a.bound(eax, qword_ptr(DATA as u32))
    });
    assert_eq!(m.run(), End::Fault { vector: 5, error: 0, ip: CODE as u32 + 11 });
}
