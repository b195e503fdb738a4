//! Operands that are looked at by elements: what masks leave of them, gathers and
//! scatters, MASKMOVQ and its kin.
use crate::cpu::*;
use crate::insn::decode;
use crate::interp::{Done, Flow};
use crate::mmu::{ud, Kind};
use crate::vcpu::Vcpu;
use iced_x86::{Instruction, Mnemonic as M, OpKind, Register};

fn vector_number(r: Register) -> usize {
    if r.is_zmm() {
        r as usize - Register::ZMM0 as usize
    } else if r.is_ymm() {
        r as usize - Register::YMM0 as usize
    } else {
        r as usize - Register::XMM0 as usize
    }
}

/// Takes its memory operand as a whole whatever the mask: elements of the
/// result do not come from elements of the operand. SDM volume 2, 2.8 (E4NF,
/// E5NF, E6NF).
fn whole(i: &Instruction) -> bool {
    match i.mnemonic() {
        M::Valignd
        | M::Valignq
        | M::Vcvtne2ps2bf16
        | M::Vdbpsadbw
        | M::Vgf2p8affineinvqb
        | M::Vgf2p8affineqb
        | M::Vmovddup
        | M::Vmovshdup
        | M::Vmovsldup
        | M::Vpalignr
        | M::Vpconflictd
        | M::Vpconflictq
        | M::Vpmaddubsw
        | M::Vpmaddwd
        | M::Vpmultishiftqb => true,
        M::Vextractf32x4
        | M::Vextractf32x8
        | M::Vextractf64x2
        | M::Vextractf64x4
        | M::Vextracti32x4
        | M::Vextracti32x8
        | M::Vextracti64x2
        | M::Vextracti64x4
        | M::Vinsertf32x4
        | M::Vinsertf32x8
        | M::Vinsertf64x2
        | M::Vinsertf64x4
        | M::Vinserti32x4
        | M::Vinserti32x8
        | M::Vinserti64x2
        | M::Vinserti64x4 => true,
        M::Vpackssdw
        | M::Vpacksswb
        | M::Vpackusdw
        | M::Vpackuswb
        | M::Vpunpckhbw
        | M::Vpunpckhdq
        | M::Vpunpckhqdq
        | M::Vpunpckhwd
        | M::Vpunpcklbw
        | M::Vpunpckldq
        | M::Vpunpcklqdq
        | M::Vpunpcklwd
        | M::Vunpckhpd
        | M::Vunpckhps
        | M::Vunpcklpd
        | M::Vunpcklps => true,
        M::Vpermb
        | M::Vpermw
        | M::Vpermd
        | M::Vpermq
        | M::Vpermps
        | M::Vpermpd
        | M::Vpermi2b
        | M::Vpermi2w
        | M::Vpermi2d
        | M::Vpermi2q
        | M::Vpermi2ps
        | M::Vpermi2pd
        | M::Vpermt2b
        | M::Vpermt2w
        | M::Vpermt2d
        | M::Vpermt2q
        | M::Vpermt2ps
        | M::Vpermt2pd
        | M::Vpermilps
        | M::Vpermilpd => true,
        M::Vpshufb
        | M::Vpshufd
        | M::Vpshufhw
        | M::Vpshuflw
        | M::Vshuff32x4
        | M::Vshuff64x2
        | M::Vshufi32x4
        | M::Vshufi64x2
        | M::Vshufpd
        | M::Vshufps => true,
        // Shifts by one count for all.
        M::Vpsllw
        | M::Vpslld
        | M::Vpsllq
        | M::Vpsraw
        | M::Vpsrad
        | M::Vpsraq
        | M::Vpsrlw
        | M::Vpsrld
        | M::Vpsrlq => i.op2_kind() == OpKind::Memory,
        _ => false,
    }
}

/// A masked move with a VEX prefix.
pub fn masked_move(m: M) -> bool {
    matches!(m, M::Vmaskmovps | M::Vmaskmovpd | M::Vpmaskmovd | M::Vpmaskmovq)
}

/// Enabled elements of the memory operand and their size, for instructions
/// whose faults are suppressed by a mask.
pub fn element_mask(v: &Vcpu, i: &Instruction) -> Option<(u64, usize)> {
    let m = i.mnemonic();
    let masked = i.op_mask() != Register::None;
    let compress = matches!(
        m,
        M::Vpcompressb | M::Vpcompressw | M::Vpcompressd | M::Vpcompressq | M::Vcompressps | M::Vcompresspd
    );
    if (masked || compress) && !whole(i) {
        let op = i.code().op_code();
        // An element may be a pair or four of what the operand holds.
        let n = if op.can_broadcast() {
            op.broadcast_memory_size().size()
        } else {
            op.memory_size().element_size()
        };
        let count = op.memory_size().size() / n;
        let low = |bits: u32| u64::MAX.checked_shr(64 - bits).unwrap_or(0);
        let mut live = if masked { v.opmask(i.op_mask()) } else { u64::MAX };
        if matches!(
            m,
            M::Vpbroadcastb
                | M::Vpbroadcastw
                | M::Vpbroadcastd
                | M::Vpbroadcastq
                | M::Vbroadcastss
                | M::Vbroadcastsd
                | M::Vbroadcastf32x2
                | M::Vbroadcastf32x4
                | M::Vbroadcastf32x8
                | M::Vbroadcastf64x2
                | M::Vbroadcastf64x4
                | M::Vbroadcasti32x2
                | M::Vbroadcasti32x4
                | M::Vbroadcasti32x8
                | M::Vbroadcasti64x2
                | M::Vbroadcasti64x4
        ) {
            // Any copy that is wanted wants the element.
            let all = live & low((i.op0_register().size() / n) as u32);
            live = (0..64).step_by(count).fold(0, |m, k| m | all >> k);
        }
        live &= low(count as u32);
        return Some(match m {
            _ if i.is_broadcast() => (u64::from(live != 0), n),
            M::Vpexpandb | M::Vpexpandw | M::Vpexpandd | M::Vpexpandq | M::Vexpandps | M::Vexpandpd => {
                (low(live.count_ones()), n)
            }
            _ if compress => (low(live.count_ones()), n),
            _ => (live, n),
        });
    }
    if masked_move(m) {
        let r = i.op1_register();
        let n = if matches!(m, M::Vmaskmovpd | M::Vpmaskmovq) { 8 } else { 4 };
        let x = v.vector(vector_number(r));
        let m = (0..r.size() / n).filter(|k| x[k * n + n - 1] & 0x80 != 0).fold(0, |m, k| m | 1 << k);
        return Some((m, n));
    }
    None
}

/// MASKMOVQ, MASKMOVDQU: store the bytes whose mask has its top bit set.
pub fn masked_bytes(v: &mut Vcpu, i: &Instruction) -> Done {
    let mmx = i.mnemonic() == M::Maskmovq;
    let (src, mask) = (i.op_register(1), i.op_register(2));
    let get = |v: &Vcpu, r: Register| {
        if mmx {
            let n = r as usize - Register::MM0 as usize;
            let top = (v.cpu().xsave.0[3] >> 3) as usize & 7;
            let mut b = [0; 64];
            if v.component(0).is_some() {
                // MM registers are physical, the area holds stack order.
                let st = (n + 8 - top) & 7;
                b[..8].copy_from_slice(&v.cpu().xsave.0[32 + 16 * st..][..8]);
            }
            b
        } else {
            v.vector(vector_number(r))
        }
    };
    let (s, m) = (get(v, src), get(v, mask));
    let seg = Vcpu::segment_index(i.memory_segment());
    let di = match i.op_kind(0) {
        OpKind::MemorySegDI => v.cpu().gpr[7] & 0xffff,
        OpKind::MemorySegEDI => v.cpu().gpr[7] & 0xffff_ffff,
        _ => v.cpu().gpr[7],
    };
    let who = v.data_access();
    let count = if mmx { 8 } else { 16 };
    v.check_segment(seg, di, count, Kind::Write)?;
    let at = |v: &Vcpu, k: usize| v.linear(seg, di.wrapping_add(k as u64));
    if mmx {
        // Like any MMX instruction it enters MMX state, even if it then faults;
        // a store does that and changes nothing else.
        let store = [0x0f, 0x7f, 0x00];
        let operand = v.cpu().bounce.0.as_ptr() as u64;
        v.run_snippet(&store, &decode(&store, 64, i.ip()), operand)?;
    }
    v.check_alignment(at(v, 0), count, 8)?;
    // Processors check the whole operand, whatever the mask, by quadwords.
    for k in (0..count).step_by(8) {
        v.check(at(v, k), 8, Kind::Write, who)?;
    }
    for k in (0..count).filter(|&k| m[k] & 0x80 != 0) {
        let va = at(v, k);
        v.store(va, 1, s[k].into(), who)?;
    }
    Ok(Flow::Next)
}

/// Gathers and scatters, an element at a time.
pub fn gather(v: &mut Vcpu, i: &Instruction) -> Done {
    let m = i.mnemonic();
    let scatter = i.op0_kind() == OpKind::Memory;
    if matches!(format!("{m:?}").as_str(), s if s.contains("prefetch") || s.contains("pf0") || s.contains("pf1"))
    {
        return Ok(Flow::Next);
    }
    let data = if scatter { i.op1_register() } else { i.op0_register() };
    let n = i.memory_size().element_size().max(1);
    let index = i.memory_index();
    // Index elements are 32 bits in the forms whose name has d before the data letters.
    let wide_index = matches!(
        m,
        M::Vpgatherqd
            | M::Vpgatherqq
            | M::Vgatherqps
            | M::Vgatherqpd
            | M::Vpscatterqd
            | M::Vpscatterqq
            | M::Vscatterqps
            | M::Vscatterqpd
    );
    let w = if wide_index { 8 } else { 4 };
    let count = (data.size() / n).min(index.size() / w);
    let evex = i.op_mask() != Register::None;
    let vex_mask = if evex { Register::None } else { i.op2_register() };
    let mut out = v.vector(vector_number(data));
    let indices = v.vector(vector_number(index));
    let mut kmask = if evex { v.opmask(i.op_mask()) } else { 0 };
    let mut vmask = if evex { [0; 64] } else { v.vector(vector_number(vex_mask)) };
    if !evex
        && (vector_number(data) == vector_number(index)
            || vector_number(vex_mask) == vector_number(index)
            || vector_number(data) == vector_number(vex_mask))
        || evex && !scatter && vector_number(data) == vector_number(index)
    {
        return Err(ud());
    }
    let seg = Vcpu::segment_index(i.memory_segment());
    let base = if i.memory_base() == Register::None { 0 } else { v.reg(i.memory_base()) };
    let who = v.data_access();
    let (mut failed, mut moved) = (None, false);
    for k in 0..count {
        let on = if evex { kmask >> k & 1 != 0 } else { vmask[k * n + n - 1] & 0x80 != 0 };
        if !on {
            vmask[k * n..k * n + n].fill(0);
            continue;
        }
        let x = if w == 8 {
            i64::from_le_bytes(indices[8 * k..8 * k + 8].try_into().unwrap())
        } else {
            i32::from_le_bytes(indices[4 * k..4 * k + 4].try_into().unwrap()).into()
        };
        let off = base
            .wrapping_add((x as u64).wrapping_mul(u64::from(i.memory_index_scale())))
            .wrapping_add(i.memory_displacement64());
        let off = if i.memory_base().size() == 4 || !v.cpu().code64() { off & 0xffff_ffff } else { off };
        // Single elements need no alignment, whatever AC says.
        let r = if scatter {
            v.check_segment(seg, off, n, Kind::Write)
                .and_then(|()| v.write_as(v.linear(seg, off), &out[k * n..k * n + n], who))
        } else {
            let mut b = [0; 8];
            v.check_segment(seg, off, n, Kind::Read)
                .and_then(|()| v.read_as(v.linear(seg, off), &mut b[..n], who))
                .map(|()| out[k * n..k * n + n].copy_from_slice(&b[..n]))
        };
        if let Err(e) = r {
            failed = Some(e);
            break;
        }
        moved = true;
        if evex {
            kmask &= !(1 << k);
        } else {
            vmask[k * n..k * n + n].fill(0);
        }
    }
    // A fault leaves what it has not reached as it was; EVEX clears what lies
    // above the register with the first element.
    if failed.is_none() {
        out[count * n..].fill(0);
        vmask.fill(0);
        kmask = 0;
    } else if evex && moved {
        out[data.size().max(index.size())..].fill(0);
    }
    if !scatter {
        v.set_vector(vector_number(data), &out);
    }
    if evex {
        v.set_opmask(i.op_mask(), kmask);
    } else {
        v.set_vector(vector_number(vex_mask), &vmask);
    }
    match failed {
        // What was done traps first; the rest comes when it runs again.
        Some(_) if moved && v.cpu().eflags & TF != 0 => Ok(Flow::Jump),
        Some(e) => Err(e),
        None => Ok(Flow::Next),
    }
}
