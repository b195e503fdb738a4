//! Registers and memory to start a case from: pointers that mostly lead
//! somewhere, numbers at their boundaries, FPU and vector state of all kinds.
use crate::arena::{CODE, CODE_LENGTH, DATA, DATA_LENGTH, PAGE, STACK, STACK_LENGTH};
use crate::random::Random;
use crate::state::{UserState, Xsave, ARITHMETIC};

/// What the registers are for in one case.
pub struct Roles {
    /// General registers that hold addresses, by number.
    pub pointers: Vec<usize>,
    /// General registers that hold small numbers.
    pub indexes: Vec<usize>,
    /// Vector registers whose elements are small numbers.
    pub vector_indexes: Vec<usize>,
}

const RSP: usize = 4;

/// An address, mostly inside the data and aligned, sometimes at an edge.
pub fn pointer(random: &mut Random) -> u64 {
    let edge = |random: &mut Random, at: u64| at.wrapping_add(random.below(64)).wrapping_sub(32);
    match random.below(100) {
        0..=59 => DATA + random.below(DATA_LENGTH / 64) * 64,
        60..=75 => DATA + 0x200 + random.below(DATA_LENGTH - 0x400),
        76..=83 => {
            let page = 1 + random.below(DATA_LENGTH / PAGE - 1);
            edge(random, DATA + PAGE * page)
        }
        84..=94 => STACK + random.below(STACK_LENGTH / 8) * 8,
        95 => edge(random, DATA),
        96 => edge(random, DATA + DATA_LENGTH),
        97 => edge(random, STACK + STACK_LENGTH),
        98 => CODE + random.below(CODE_LENGTH),
        99 if random.one_in(2) => random.integer(),
        _ => edge(random, 0x7fff_ffff_ffe0),
    }
}

/// A stack pointer: mostly well inside the stack.
fn stack_pointer(random: &mut Random) -> u64 {
    match random.below(20) {
        0..=13 => STACK + 0x400 + random.below((STACK_LENGTH - 0x800) / 8) * 8,
        14 => STACK + 0x400 + random.below(STACK_LENGTH - 0x800),
        15 => STACK + PAGE * (1 + random.below(3)) + 8 * random.below(3),
        16 => STACK + random.below(48),
        17 => STACK + STACK_LENGTH - random.below(48),
        _ => pointer(random),
    }
}

/// Draw the registers of a case.
pub fn draw(random: &mut Random) -> (UserState, Roles) {
    let mut state = UserState::default();
    let mut roles = Roles { pointers: vec![RSP], indexes: Vec::new(), vector_indexes: Vec::new() };
    for gpr in &mut state.gpr {
        *gpr = random.integer();
    }
    state.gpr[RSP] = stack_pointer(random);
    // rsi and rdi for strings, rbp for frames, rbx for XLAT.
    for (register, percent) in [(7, 75), (6, 75), (5, 60), (3, 40)] {
        if random.percent(percent) {
            roles.pointers.push(register);
        }
    }
    while roles.pointers.len() < 5 {
        let register = random.below(16) as usize;
        if !roles.pointers.contains(&register) {
            roles.pointers.push(register);
        }
    }
    for &register in &roles.pointers[1..] {
        state.gpr[register] = pointer(random);
    }
    while roles.indexes.len() < 2 {
        let register = random.below(16) as usize;
        if !roles.pointers.contains(&register) {
            roles.indexes.push(register);
            let small = random.below(48).wrapping_sub(random.below(16));
            state.gpr[register] = if random.one_in(2) { small.wrapping_mul(16) } else { small };
        }
    }
    if random.percent(40) {
        // rep counts, shift counts, loop counts
        if !roles.pointers.contains(&1) {
            state.gpr[1] = random.below(40);
        }
    }
    state.rflags = 0x202 | (random.next() & ARITHMETIC);
    if random.one_in(10) {
        state.rflags |= crate::state::DF;
    }
    if random.one_in(150) {
        state.rflags |= crate::state::AC;
    }
    if random.one_in(150) {
        state.rflags |= crate::state::TF;
    }
    draw_x87(random, &mut state.xsave);
    draw_vectors(random, &mut state.xsave, &mut roles);
    (state, roles)
}

fn draw_x87(random: &mut Random, area: &mut Xsave) {
    area.set_fcw(match random.below(20) {
        0..=12 => 0x37f,
        13..=17 => 0x7f | (random.next() as u16 & 0xf00),
        _ => 0x40 | (random.next() as u16 & 0xf3f),
    });
    let status = match random.below(4) {
        0 | 1 => random.next() & 0x3800,
        2 => random.next() & 0x7f00,
        _ => random.next() & 0x7f7f,
    } as u16;
    let pending = status & 0x3f & !area.fcw() != 0;
    area.set_fsw(if pending { status | 0x8080 } else { status });
    if random.one_in(4) {
        area.set_fsw(0);
    }
    area.set_ftw(match random.below(4) {
        0 => 0,
        1 => 0xff,
        2 => 0xff << random.below(8),
        _ => random.next() as u8,
    });
    for i in 0..8 {
        area.set_st(i, random.extended());
    }
}

fn draw_vectors(random: &mut Random, area: &mut Xsave, roles: &mut Roles) {
    area.set_mxcsr(match random.below(20) {
        0..=11 => 0x1f80,
        12..=16 => 0x1f80 | (random.next() as u32 & 0xe07f),
        _ => random.next() as u32 & 0xffff,
    });
    let (count, width) = Xsave::shape();
    for i in 0..count {
        let mut value = [0u8; 64];
        let kind = random.below(7);
        for element in value[..width].chunks_exact_mut(8) {
            let bits = match kind {
                0 => 0,
                1 => random.next(),
                2 => random.double(),
                3 => random.float() | random.float() << 32,
                4 => random.integer(),
                5 => u64::from(random.next() as u16) * 0x0001_0001_0001_0001,
                _ => random.next() & 0x807f_807f_807f_807f,
            };
            element.copy_from_slice(&bits.to_le_bytes());
        }
        area.set_vector(i, value);
    }
    for i in 0..2 {
        let register = if i == 0 { random.below(16) } else { random.below(count as u64) } as usize;
        let mut value = [0u8; 64];
        for element in value[..width].chunks_exact_mut(8) {
            let small = random.below(200);
            let bits = if i == 0 { small } else { small | random.below(200) << 32 };
            element.copy_from_slice(&bits.to_le_bytes());
        }
        area.set_vector(register, value);
        roles.vector_indexes.push(register);
    }
    for i in 0..8 {
        let mask = match random.below(4) {
            0 => u64::MAX,
            1 => random.next() & random.next(),
            2 => random.integer(),
            _ => random.next(),
        };
        area.set_opmask(i, mask);
    }
}

/// Bytes to lay over the data where the pointers lead.
pub fn patches(random: &mut Random, state: &UserState, roles: &Roles) -> Vec<(u64, Vec<u8>)> {
    let mut patches = Vec::new();
    for _ in 0..random.below(3) {
        let at = state.gpr[random.pick(&roles.pointers)];
        let bytes = match random.below(4) {
            0 => random.double().to_le_bytes().to_vec(),
            1 => random.extended().to_vec(),
            2 => (0..4).flat_map(|_| (random.float() as u32).to_le_bytes()).collect(),
            _ => random.integer().to_le_bytes().to_vec(),
        };
        let inside = |base: u64, length: u64| at >= base && at + bytes.len() as u64 <= base + length;
        if at < 1 << 32 && (inside(DATA, DATA_LENGTH) || inside(STACK, STACK_LENGTH)) {
            patches.push((at, bytes));
        }
    }
    patches
}
