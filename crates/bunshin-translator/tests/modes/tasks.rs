//! Task switches: SDM volume 3, chapter 7.
use crate::machine::*;
use iced_x86::code_asm::*;
use iced_x86::IcedError;

const TSS_B: u64 = 0x5000;
const B: u16 = FREE;
const TASK_GATE: u16 = FREE + 8;
const LDT: u16 = FREE + 16;
const TASK_CODE: u64 = 0x1_8000;
const TASK_STACK: u64 = 0xa000;
const NT: u64 = 0x4000;

fn put16(m: &Machine, at: u64, v: u16) {
    m.put(at, &v.to_le_bytes());
}

fn put32(m: &Machine, at: u64, v: u32) {
    m.put(at, &v.to_le_bytes());
}

/// A second task of level 0 with code of its own.
fn task(m: &Machine, write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) {
    m.set(B, descriptor(TSS_B as u32, 0x67, 0x89));
    put32(m, TSS_B + 0x20, TASK_CODE as u32);
    put32(m, TSS_B + 0x24, 2);
    put32(m, TSS_B + 0x28, 0xaaaa_0000);
    put32(m, TSS_B + 0x38, TASK_STACK as u32);
    for (n, s) in [KERNEL_DATA, KERNEL_CODE, KERNEL_DATA, KERNEL_DATA, 0, 0].into_iter().enumerate() {
        put32(m, TSS_B + 0x48 + 4 * n as u64, s.into());
    }
    put16(m, TSS_B + 0x66, 0x68);
    let mut code = assemble(32, TASK_CODE, write);
    code.extend_from_slice(&[0xe6, DONE as u8, 0xf4]);
    m.put(TASK_CODE, &code);
}

fn far(opcode: u8, selector: u16) -> [u8; 7] {
    let s = selector.to_le_bytes();
    [opcode, 0, 0, 0, 0, s[0], s[1]]
}

fn busy(m: &Machine, selector: u16) -> bool {
    m.word(GDT + u64::from(selector) + 4) & 0x200 != 0
}

#[test]
fn jmp_leaves_the_old_task_for_good() {
    let mut m = Machine::protected();
    task(&m, |a| a.mov(ebx, eax));
    m.state.gpr[0] = 0x1234;
    m.code(|a| a.db(&far(0xea, B)));
    assert_eq!(m.run(), End::Done);
    assert_eq!(m.state.gpr[3], 0xaaaa_0000);
    assert_eq!(m.state.gpr[4], TASK_STACK);
    assert_eq!(m.state.tr.selector, B);
    assert_eq!(m.state.cr0 & 8, 8);
    assert_eq!(m.state.rflags & NT, 0);
    assert!(!busy(&m, TR));
    assert!(busy(&m, B));
    assert_eq!(m.word(TSS + 0x28), 0x1234);
    assert_eq!(m.word(TSS + 0x20), CODE as u32 + 7);
    assert_eq!(m.word(TSS + 0x38), STACK as u32);
}

#[test]
fn call_nests_and_iret_returns() {
    for by_gate in [false, true] {
        let mut m = Machine::protected();
        task(&m, |a| {
            a.mov(ebx, 1u32)?;
            a.iretd()
        });
        m.set(TASK_GATE, gate(B, 0, 0x85, 0));
        m.state.gpr[3] = 0x77;
        m.code(|a| {
            a.db(&far(0x9a, if by_gate { TASK_GATE } else { B }))?;
            a.inc(ebx)
        });
        assert_eq!(m.run(), End::Done);
        assert_eq!(m.state.gpr[3], 0x78);
        assert_eq!(m.state.tr.selector, TR);
        assert!(busy(&m, TR));
        assert!(!busy(&m, B));
        assert_eq!(m.word(TSS_B) & 0xffff, TR.into());
        assert_eq!(m.word(TSS_B + 0x34), 1);
        // NT was for the nested task only.
        assert_eq!(m.state.rflags & NT, 0);
        assert_eq!(m.word(TSS_B + 0x24) & NT as u32, 0);
    }
}

#[test]
fn an_exception_through_a_task_gate_pushes_its_error_code() {
    let mut m = Machine::protected();
    task(&m, |a| a.mov(ebx, dword_ptr(esp)));
    m.put(IDT + 8 * 13, &gate(B, 0, 0x85, 0).to_le_bytes());
    m.code(|a| {
        a.mov(eax, u32::from(0x700u16))?;
        a.mov(ds, eax)
    });
    m.set(0x700, descriptor(0, 0, 0x82));
    assert_eq!(m.run(), End::Done);
    assert_eq!(m.state.gpr[3], 0x700);
    assert_eq!(m.state.gpr[4], TASK_STACK - 4);
    assert_eq!(m.state.rflags & NT, NT);
    // The faulting instruction, and RF for its return.
    assert_eq!(m.word(TSS + 0x20), CODE as u32 + 5);
    assert_eq!(m.word(TSS + 0x24) & 0x1_0000, 0x1_0000);
}

#[test]
fn a_task_brings_its_ldt_and_its_level() {
    let mut m = Machine::protected();
    task(&m, |a| {
        a.mov(eax, 0x7u32)?; // LDT entry 0, level 3
        a.mov(es, eax)?;
        a.mov(ecx, dword_ptr(0u32).es())
    });
    m.set(LDT, descriptor(0x6000, 0x7, 0x82));
    m.put(0x6000, &descriptor(DATA as u32, 0xfff, 0xf3).to_le_bytes());
    put32(&m, DATA, 0xfeed);
    put16(&m, TSS_B + 0x60, LDT);
    put32(&m, TSS_B + 0x24, 0x3002);
    for (n, s) in [0, USER_CODE, USER_DATA, USER_DATA, 0, 0].into_iter().enumerate() {
        put32(&m, TSS_B + 0x48 + 4 * n as u64, s.into());
    }
    m.code(|a| a.db(&far(0xea, B)));
    assert_eq!(m.run(), End::Done);
    assert_eq!(m.state.gpr[1], 0xfeed);
    assert_eq!(m.state.ldt.selector, LDT);
    assert_eq!(m.state.segments[2].access >> 5 & 3, 3);
}

#[test]
fn a_task_of_16_bits() {
    let mut m = Machine::protected();
    m.set(B, descriptor(TSS_B as u32, 0x2b, 0x81));
    m.set(TASK_GATE, descriptor(TASK_CODE as u32, 0xffff, 0x9b));
    put16(&m, TSS_B + 0xe, 0);
    put16(&m, TSS_B + 0x10, 2);
    put16(&m, TSS_B + 0x12, 0x5678);
    put16(&m, TSS_B + 0x1a, 0x7000);
    for (n, s) in [KERNEL_DATA, TASK_GATE, KERNEL_DATA, KERNEL_DATA].into_iter().enumerate() {
        put16(&m, TSS_B + 0x22 + 2 * n as u64, s);
    }
    // mov bx, ax; iret
    m.put(TASK_CODE, &[0x89, 0xc3, 0xcf]);
    m.state.gpr[3] = 5;
    m.code(|a| {
        a.db(&far(0x9a, B))?;
        a.inc(ebx)
    });
    assert_eq!(m.run(), End::Done);
    assert_eq!(m.state.gpr[3], 6);
    assert_eq!(m.word(TSS_B + 0x18) & 0xffff, 0x5678);
    assert_eq!(m.word(TSS_B) & 0xffff, TR.into());
}

#[test]
fn what_a_tss_must_be() {
    let error = u32::from(B);
    let ip = CODE as u32;
    let end = |entry: u64| {
        let mut m = Machine::protected();
        task(&m, |a| a.nop());
        m.set(B, entry);
        m.code(|a| a.db(&far(0xea, B)));
        m.run()
    };
    let tss = TSS_B as u32;
    assert_eq!(end(descriptor(tss, 0x67, 0x89)), End::Done);
    assert_eq!(end(descriptor(tss, 0x67, 0x8b)), End::Fault { vector: 13, error, ip });
    assert_eq!(end(descriptor(tss, 0x67, 0x09)), End::Fault { vector: 11, error, ip });
    assert_eq!(end(descriptor(tss, 0x66, 0x89)), End::Fault { vector: 10, error, ip });
}

#[test]
fn bad_segments_are_the_new_tasks_fault() {
    let mut m = Machine::protected();
    task(&m, |a| a.nop());
    put32(&m, TSS_B + 0x54, u32::from(USER_CODE) & !3 | 0x700);
    m.code(|a| a.db(&far(0xea, B)));
    let error = u32::from(USER_CODE) & !3 | 0x700;
    assert_eq!(m.run(), End::Fault { vector: 10, error, ip: TASK_CODE as u32 });
    assert_eq!(m.state.tr.selector, B);
}

#[test]
fn the_debug_trap_of_a_tss() {
    let mut m = Machine::protected();
    task(&m, |a| a.nop());
    put16(&m, TSS_B + 0x64, 1);
    m.code(|a| a.db(&far(0xea, B)));
    assert_eq!(m.run(), End::Fault { vector: 1, error: 0, ip: TASK_CODE as u32 });
    assert_eq!(m.state.dr[4] & 0x8000, 0x8000);
}
