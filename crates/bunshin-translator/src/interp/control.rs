//! Near branches, loops, software interrupts, BOUND.
use super::event::Source;
use super::{Done, Flow};
use crate::cpu::*;
use crate::mmu::{canonical, Exception, Kind, Trap, BP, BR, DB, OF_};
use crate::vcpu::Vcpu;
use iced_x86::{Code, Instruction, Mnemonic as M, OpKind, Register};

/// CALL, JMP, RET in the forms that are not translated.
pub fn transfer(v: &mut Vcpu, i: &Instruction) -> Done {
    let far = matches!(i.op0_kind(), OpKind::FarBranch16 | OpKind::FarBranch32)
        || i.is_call_far_indirect()
        || i.is_jmp_far_indirect()
        || i.mnemonic() == M::Retf;
    if far {
        return super::far::transfer(v, i);
    }
    if i.mnemonic() == M::Ret {
        let n = i.code().op_code().operand_size() as usize / 8;
        let n = if n == 0 { v.operand_bytes(i) } else { n };
        let to = v.peek(0, n)?;
        v.reachable(to)?;
        v.drop_stack(n as u64 + if i.op_count() > 0 { i.immediate16().into() } else { 0 });
        v.cpu_mut().rip = to;
        return Ok(Flow::Jump);
    }
    let near = matches!(i.op0_kind(), OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64);
    let mut to = if near { i.near_branch_target() } else { v.operand(i, 0)? };
    let n = match i.code() {
        Code::Call_rel16 | Code::Call_rm16 | Code::Jmp_rel16 | Code::Jmp_rel8_16 | Code::Jmp_rm16 => 2,
        Code::Call_rel32_32 | Code::Call_rm32 | Code::Jmp_rel32_32 | Code::Jmp_rel8_32 | Code::Jmp_rm32 => 4,
        _ => 8,
    };
    if n == 2 {
        to &= 0xffff;
    }
    v.reachable(to)?;
    if i.mnemonic() == M::Call {
        v.push(n, i.next_ip())?;
    }
    v.cpu_mut().rip = to;
    Ok(Flow::Jump)
}

impl Vcpu {
    /// A near branch may go to `to`.
    pub fn reachable(&self, to: u64) -> Result<(), Trap> {
        let out = if self.cpu().code64() { !canonical(to) } else { to > self.code_limit() };
        if out {
            return Err(Exception::gp().into());
        }
        Ok(())
    }
}

/// LOOP and JCXZ with counters that translated code does not handle.
pub fn counted(v: &mut Vcpu, i: &Instruction) -> Done {
    let wide = match i.code() {
        Code::Jcxz_rel8_16
        | Code::Jcxz_rel8_32
        | Code::Loop_rel8_16_CX
        | Code::Loop_rel8_32_CX
        | Code::Loope_rel8_16_CX
        | Code::Loope_rel8_32_CX
        | Code::Loopne_rel8_16_CX
        | Code::Loopne_rel8_32_CX => Register::CX,
        Code::Jrcxz_rel8_16
        | Code::Jrcxz_rel8_64
        | Code::Loop_rel8_16_RCX
        | Code::Loope_rel8_16_RCX
        | Code::Loopne_rel8_16_RCX
        | Code::Loop_rel8_64_RCX
        | Code::Loope_rel8_64_RCX
        | Code::Loopne_rel8_64_RCX => Register::RCX,
        _ => Register::ECX,
    };
    let before = v.cpu().gpr[1];
    let zf = v.cpu().arith() & ZF != 0;
    let taken = match i.mnemonic() {
        M::Jcxz | M::Jecxz | M::Jrcxz => v.reg(wide) == 0,
        m => {
            let c = v.reg(wide).wrapping_sub(1);
            v.set_reg(wide, c);
            v.reg(wide) != 0
                && match m {
                    M::Loope => zf,
                    M::Loopne => !zf,
                    _ => true,
                }
        }
    };
    // Whoever cannot go on keeps the counter.
    let rip = if taken { i.near_branch_target() } else { i.next_ip() };
    if let Err(e) = v.reachable(rip) {
        v.cpu_mut().gpr[1] = before;
        return Err(e);
    }
    v.cpu_mut().rip = rip;
    Ok(Flow::Jump)
}

/// INT n, INT1, INT3, INTO.
pub fn int(v: &mut Vcpu, i: &Instruction) -> Done {
    let (vector, source) = match i.mnemonic() {
        M::Int3 => (BP, Source::Software),
        M::Int1 => {
            // What MOV SS before it met comes with it.
            let met = u64::from(std::mem::take(&mut v.met));
            v.cpu_mut().dr[6] |= met & 15;
            (DB, Source::Hardware)
        }
        M::Into => {
            if v.cpu().arith() & OF == 0 {
                return Ok(Flow::Next);
            }
            (OF_, Source::Software)
        }
        _ => {
            let vector = i.immediate8();
            if v.cpu().eflags & VM != 0 && v.int_8086(vector, i.next_ip())? {
                return Ok(Flow::Jump);
            }
            (vector, Source::Software)
        }
    };
    v.event(vector, None, source, i.next_ip(), 0)?;
    Ok(Flow::Jump)
}

pub fn bound(v: &mut Vcpu, i: &Instruction) -> Done {
    let n = i.op0_register().size();
    let va = v.operand_anywhere(i, 0, 2 * n, Kind::Read)?;
    v.check_alignment(va, 2 * n, n)?;
    let who = v.data_access();
    let sext = |x: u64| if n == 2 { i64::from(x as i16) } else { i64::from(x as i32) };
    let (low, high) = (v.load(va, n, who)?, v.load(va.wrapping_add(n as u64), n, who)?);
    let x = sext(v.reg(i.op0_register()));
    if x < sext(low) || x > sext(high) {
        return Err(Exception::new(BR).into());
    }
    Ok(Flow::Next)
}
