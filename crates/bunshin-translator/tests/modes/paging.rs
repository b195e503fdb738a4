//! Paging modes that 64-bit kernels leave behind: SDM volume 3, 4.3 and 4.4.
use crate::machine::*;
use iced_x86::code_asm::*;

const GP: u8 = 13;
const PF: u8 = 14;
const PG: u64 = 1 << 31;
const PSE: u64 = 0x10;
const PAE: u64 = 0x20;
const ROOT: u64 = 0x6000;
const DIRECTORY: u64 = 0x7000;
const TABLE: u64 = 0xb000;
/// Reserved bit in an error code, and the bits of a protection violation.
const RESERVED: u32 = 8;

fn put32(m: &Machine, at: u64, v: u32) {
    m.put(at, &v.to_le_bytes());
}

fn put64(m: &Machine, at: u64, v: u64) {
    m.put(at, &v.to_le_bytes());
}

/// PAE paging: the first gigabyte mapped onto itself by pages of 2 MiB.
fn pae() -> Machine {
    let mut m = Machine::protected();
    put64(&m, ROOT, DIRECTORY | 1);
    put64(&m, DIRECTORY, 0x83);
    m.state.cr3 = ROOT;
    m.state.cr4 |= PAE;
    m.state.cr0 |= PG;
    m
}

#[test]
fn two_levels_and_large_pages() {
    let mut m = Machine::protected();
    m.state.cr3 = ROOT;
    m.state.cr4 |= PSE;
    m.state.cr0 |= PG;
    put32(&m, ROOT, 0x83);
    // 4 MiB on: a table whose second page is DATA.
    put32(&m, ROOT + 4, TABLE as u32 | 3);
    put32(&m, TABLE + 4, DATA as u32 | 3);
    put32(&m, DATA + 8, 0x1234);
    m.code(|a| {
        a.mov(eax, dword_ptr(0x40_1008u32))?;
        a.mov(dword_ptr(0x40_1010u32), eax)?;
        a.mov(ebx, dword_ptr(0x40_2000u32))
    });
    assert_eq!(m.run(), End::Fault { vector: PF, error: 0, ip: CODE as u32 + 10 });
    assert_eq!(m.state.cr2, 0x40_2000);
    assert_eq!(m.word(DATA + 0x10), 0x1234);
    // Accessed and dirty bits.
    assert_eq!(m.word(TABLE + 4) & 0x60, 0x60);
}

#[test]
fn reserved_bits_of_large_pages() {
    let mut m = Machine::protected();
    m.state.cr3 = ROOT;
    m.state.cr4 |= PSE;
    m.state.cr0 |= PG;
    put32(&m, ROOT, 0x83);
    put32(&m, ROOT + 4, 0x83 | 1 << 21);
    m.code(|a| a.mov(eax, dword_ptr(0x40_0000u32)));
    assert_eq!(m.run(), End::Fault { vector: PF, error: RESERVED | 1, ip: CODE as u32 });

    let mut m = pae();
    put64(&m, DIRECTORY + 8, 0x83 | 1 << 13);
    m.code(|a| a.mov(eax, dword_ptr(0x20_0000u32)));
    assert_eq!(m.run(), End::Fault { vector: PF, error: RESERVED | 1, ip: CODE as u32 });

    // NX without EFER.NXE, and an address that is too wide.
    for bit in [63, 51] {
        let mut m = pae();
        put64(&m, DIRECTORY + 8, 0x83 | 1 << bit);
        m.code(|a| a.mov(dword_ptr(0x20_0000u32), eax));
        assert_eq!(m.run(), End::Fault { vector: PF, error: RESERVED | 3, ip: CODE as u32 });
    }
}

#[test]
fn page_directory_pointers_are_loaded_with_cr3() {
    let mut m = pae();
    put64(&m, TABLE, 0x83);
    put32(&m, DATA, 0x77);
    // The entry for the second gigabyte counts once CR3 is written.
    m.code(|a| {
        a.mov(dword_ptr(ROOT as u32 + 8), TABLE as i32 | 1)?;
        a.mov(eax, cr3)?;
        a.mov(cr3, eax)?;
        a.mov(ebx, dword_ptr(0x4000_0000 + DATA as u32))?;
        // To clear it changes nothing until then.
        a.mov(dword_ptr(ROOT as u32 + 8), 0)?;
        a.invlpg(byte_ptr(0x4000_0000 + DATA as u32))?;
        a.mov(ecx, dword_ptr(0x4000_0000 + DATA as u32))?;
        a.mov(cr3, eax)?;
        a.mov(edx, dword_ptr(0x4000_0000 + DATA as u32))
    });
    assert!(matches!(m.run(), End::Fault { vector: PF, error: 0, .. }));
    assert_eq!((m.state.gpr[3], m.state.gpr[1]), (0x77, 0x77));
}

#[test]
fn bad_page_directory_pointers_do_not_load() {
    for bit in [1u64, 2, 5, 63, 50] {
        let mut m = pae();
        let root = 0xc000;
        put64(&m, root, DIRECTORY | 1 | 1 << bit);
        m.state.gpr[0] = root;
        m.code(|a| a.mov(cr3, eax));
        assert_eq!(m.run(), End::Fault { vector: GP, error: 0, ip: CODE as u32 }, "bit {bit}");
        assert_eq!(m.state.cr3, ROOT);
    }
}

#[test]
fn unknown_registers_and_bits_fault() {
    for msr in [0x48u32, 0x49, 0x1234_5678, 0xc001_0118] {
        for write in [false, true] {
            let mut m = Machine::protected();
            m.state.gpr[1] = msr.into();
            m.state.gpr[2] = 0;
            m.code(|a| if write { a.wrmsr() } else { a.rdmsr() });
            assert_eq!(m.run(), End::Fault { vector: GP, error: 0, ip: CODE as u32 }, "{msr:#x}");
        }
    }
    // CR4.LA57, and paging without protection.
    let mut m = Machine::protected();
    m.state.gpr[0] = 1 << 12;
    m.code(|a| a.mov(cr4, eax));
    assert_eq!(m.run(), End::Fault { vector: GP, error: 0, ip: CODE as u32 });
    let mut m = Machine::protected();
    m.state.gpr[0] = PG;
    m.code(|a| a.mov(cr0, eax));
    assert_eq!(m.run(), End::Fault { vector: GP, error: 0, ip: CODE as u32 });
}
