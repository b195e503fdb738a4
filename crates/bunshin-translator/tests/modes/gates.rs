//! Call gates, returns to outer levels, conforming code, interrupts between levels.
use crate::machine::*;
use iced_x86::code_asm::*;
use iced_x86::IcedError;

const GP: u8 = 13;
const NP: u8 = 11;
const GATE: u16 = FREE;
const TARGET: u64 = 0x1_8000;

fn far(selector: u16, offset: u32) -> Vec<u8> {
    let mut b = vec![0x9a];
    b.extend_from_slice(&offset.to_le_bytes());
    b.extend_from_slice(&selector.to_le_bytes());
    b
}

fn through(m: &mut Machine, entry: u64) -> End {
    m.set(GATE, entry);
    m.code(|a| a.db(&far(GATE | 3, 0xdead)));
    m.run()
}

fn target(m: &Machine, write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) {
    m.put(TARGET, &assemble(32, TARGET, write));
}

#[test]
fn an_inner_level_gets_parameters_and_gives_back() {
    let mut m = Machine::user();
    m.state.gpr[4] = STACK - 8;
    m.put(STACK - 8, &0x1111_1111u32.to_le_bytes());
    m.put(STACK - 4, &0x2222_2222u32.to_le_bytes());
    target(&m, |a| {
        a.mov(eax, dword_ptr(esp + 8))?; // last parameter pushed
        a.mov(ebx, dword_ptr(esp + 12))?;
        a.mov(ecx, dword_ptr(esp + 16))?; // old esp
        a.mov(edx, dword_ptr(esp + 20))?; // old ss
        a.mov(esi, cs)?;
        a.mov(edi, ss)?;
        a.retf_1(8)
    });
    let end = through(&mut m, gate(KERNEL_CODE, TARGET as u32, 0xec, 2));
    assert_eq!(end, End::Done);
    let g = &m.state.gpr;
    assert_eq!((g[0], g[3]), (0x1111_1111, 0x2222_2222));
    assert_eq!((g[1], g[2]), (STACK - 8, u64::from(USER_DATA)));
    assert_eq!((g[6], g[7]), (u64::from(KERNEL_CODE), u64::from(KERNEL_DATA)));
    assert_eq!(g[4], STACK);
    assert_eq!(m.state.segments[1].selector, USER_CODE);
    assert_eq!(m.state.segments[2].selector, USER_DATA);
}

#[test]
fn a_16_bit_gate_pushes_words() {
    let mut m = Machine::user();
    m.state.gpr[4] = STACK - 2;
    m.put(STACK - 2, &[0x34, 0x12]);
    target(&m, |a| {
        a.movzx(eax, word_ptr(esp + 4))?;
        a.movzx(ebx, word_ptr(esp))?;
        a.db(&[0x66])?;
        a.retf_1(2)
    });
    // The return address must fit 16 bits.
    m.state.segments[1].base = 0x1_0000;
    m.set(USER_CODE, descriptor(0x1_0000, 0xf_ffff, 0xc0fb));
    m.state.rip = 0;
    let end = through(&mut m, gate(KERNEL_CODE, 0x8000, 0xe4, 1));
    assert!(matches!(end, End::Fault { vector: 6 | 13 | 14, .. }) || end == End::Done, "{end:?}");
}

#[test]
fn gates_are_checked() {
    let error = u32::from(GATE);
    let end = |entry| through(&mut Machine::user(), entry);
    let ip = CODE as u32;
    // Its own level, presence, target and type.
    assert_eq!(end(gate(KERNEL_CODE, TARGET as u32, 0x8c, 0)), End::Fault { vector: GP, error, ip });
    assert_eq!(end(gate(KERNEL_CODE, TARGET as u32, 0x6c, 0)), End::Fault { vector: NP, error, ip });
    assert_eq!(end(gate(0, TARGET as u32, 0xec, 0)), End::Fault { vector: GP, error: 0, ip });
    let data = u32::from(KERNEL_DATA);
    assert_eq!(end(gate(KERNEL_DATA, TARGET as u32, 0xec, 0)), End::Fault { vector: GP, error: data, ip });
    assert_eq!(end(gate(KERNEL_CODE, TARGET as u32, 0xee, 0)), End::Fault { vector: GP, error, ip });
}

#[test]
fn jmp_does_not_change_the_level() {
    let mut m = Machine::user();
    m.set(GATE, gate(KERNEL_CODE, TARGET as u32, 0xec, 0));
    m.code(|a| {
        let mut b = far(GATE | 3, 0);
        b[0] = 0xea;
        a.db(&b)
    });
    let error = u32::from(KERNEL_CODE);
    assert_eq!(m.run(), End::Fault { vector: GP, error, ip: CODE as u32 });
}

#[test]
fn conforming_code_runs_at_the_callers_level() {
    let mut m = Machine::user();
    m.set(GATE, descriptor(0, u32::MAX, 0xc09f));
    target(&m, |a| {
        a.mov(eax, cs)?;
        a.retf()
    });
    m.code(|a| a.db(&far(GATE, TARGET as u32)));
    assert_eq!(m.run(), End::Done);
    assert_eq!(m.state.gpr[0], u64::from(GATE | 3));
}

#[test]
fn inner_data_segments_do_not_survive_the_return() {
    let mut m = Machine::protected();
    let s = STACK as u32;
    m.code(|a| {
        a.push(u32::from(USER_DATA))?;
        a.push(s)?;
        a.push(u32::from(USER_CODE))?;
        a.push(TARGET as u32)?;
        a.mov(eax, u32::from(USER_DATA))?;
        a.mov(fs, eax)?;
        a.retf()
    });
    target(&m, |a| a.mov(eax, dword_ptr(DATA as u32)));
    assert!(matches!(m.run(), End::Fault { vector: GP, error: 0, .. }));
    let selectors: Vec<_> = m.state.segments.iter().map(|s| s.selector).collect();
    assert_eq!(selectors, [0, KERNEL_CODE, KERNEL_DATA, 0, USER_DATA, 0]);
}

#[test]
fn interrupts_change_to_the_inner_stack() {
    let mut m = Machine::user();
    m.state.gpr[4] = STACK;
    m.code(|a| a.ud2());
    assert_eq!(m.run(), End::Fault { vector: 6, error: 0, ip: CODE as u32 });
    assert_eq!(m.state.gpr[4], INNER_STACK - 20);
    assert_eq!(m.word(INNER_STACK - 4), USER_DATA.into());
    assert_eq!(m.word(INNER_STACK - 8), STACK as u32);
    assert_eq!(m.word(INNER_STACK - 16), USER_CODE.into());
    assert_eq!(m.state.segments[2].selector, KERNEL_DATA);
}

#[test]
fn software_interrupts_mind_the_gates_level() {
    let mut m = Machine::user();
    m.code(|a| a.int(0x20));
    assert_eq!(m.run(), End::Fault { vector: GP, error: 0x20 * 8 + 2, ip: CODE as u32 });
    let mut m = Machine::user();
    m.put(IDT + 8 * 0x20, &gate(KERNEL_CODE, STUBS as u32 + 8 * 0x20, 0xee, 0).to_le_bytes());
    m.code(|a| a.int(0x20));
    assert_eq!(m.run(), End::Fault { vector: 0x20, error: 0, ip: CODE as u32 + 2 });
}

#[test]
fn a_16_bit_gate_of_the_idt() {
    let mut m = Machine::protected();
    // Type 6: a frame of words.
    m.put(IDT + 8 * 6, &gate(KERNEL_CODE, STUBS as u32 + 48, 0x86, 0).to_le_bytes());
    m.code(|a| a.ud2());
    assert!(matches!(m.run(), End::Fault { vector: 6, .. }));
    assert_eq!(m.state.gpr[4], STACK - 6);
    assert_eq!(m.word(STACK - 6) & 0xffff, CODE as u32 & 0xffff);
    assert_eq!(m.word(STACK - 4) & 0xffff, KERNEL_CODE.into());
}

#[test]
fn a_bad_inner_stack_is_an_invalid_tss() {
    let mut m = Machine::user();
    m.put(TSS + 8, &USER_DATA.to_le_bytes());
    // The fault itself cannot get a stack either: no way but down.
    m.code(|a| a.ud2());
    assert_eq!(m.run(), End::Shutdown);
}
