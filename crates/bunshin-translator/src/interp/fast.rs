//! SYSCALL, SYSENTER and their returns. SDM volume 3, 5.8.7 and 5.8.8.
use super::{Done, Flow};
use crate::cpu::*;
use crate::mmu::{canonical, ud, Exception};
use crate::vcpu::Vcpu;
use iced_x86::{Instruction, Mnemonic as M};

fn flat(selector: u16, access: u32) -> Seg {
    Seg { selector, base: 0, limit: u32::MAX, access, _pad: [0; 3] }
}

pub fn syscall(v: &mut Vcpu, i: &Instruction) -> Done {
    let c = v.cpu_mut();
    if c.efer & 1 == 0 {
        return Err(ud());
    }
    let flags = c.rflags();
    let next = i.next_ip();
    let long = c.long_mode();
    if long {
        c.gpr[1] = next;
        c.gpr[11] = flags & !RF;
        c.rip = if c.code64() { c.lstar } else { c.cstar };
        c.set_rflags(flags & !c.sfmask & !RF);
    } else {
        c.gpr[1] = next & 0xffff_ffff;
        c.rip = c.star & 0xffff_ffff;
        c.set_rflags(flags & !(VM | IF | RF));
    }
    let cs = (c.star >> 32) as u16 & !3;
    c.cpl = 0;
    v.access_check_from(flags);
    v.put_segment(1, flat(cs, if long { 0xa09b } else { 0xc09b }));
    v.put_segment(2, flat(cs + 8, 0xc093));
    v.select_region();
    Ok(Flow::Jump)
}

pub fn sysret(v: &mut Vcpu, i: &Instruction) -> Done {
    let c = v.cpu();
    if c.efer & 1 == 0 || c.cr0 & 1 == 0 {
        return Err(ud());
    }
    v.supervisor()?;
    let c = v.cpu_mut();
    let old = c.rflags();
    let base = (c.star >> 48) as u16;
    let wide = i.mnemonic() == M::Sysretq;
    if wide {
        // AMD's processors fault in user mode, at the target.
        if !canonical(c.gpr[1]) && !crate::host::amd() {
            return Err(Exception::gp().into());
        }
        c.rip = c.gpr[1];
    } else {
        c.rip = c.gpr[1] & 0xffff_ffff;
    }
    c.cpl = 3;
    if c.long_mode() {
        let f = c.gpr[11] & 0x3c_7fd7 | 2;
        c.set_rflags(f & !RF & !VM);
    } else {
        c.iflag = 1;
    }
    // Unlike POPF and IRET, it traps when it brings TF.
    if c.eflags & TF != 0 {
        v.met |= super::debug::STEP;
    }
    v.access_check_from(old);
    v.put_segment(1, if wide { flat((base + 16) | 3, 0xa0fb) } else { flat(base | 3, 0xc0fb) });
    v.put_segment(2, flat((base + 8) | 3, 0xc0f3));
    v.select_region();
    Ok(Flow::Jump)
}

pub fn sysenter(v: &mut Vcpu, _: &Instruction) -> Done {
    let c = v.cpu_mut();
    // AMD's processors have it outside long mode only.
    if crate::host::amd() && c.long_mode() {
        return Err(Exception::ud().into());
    }
    if c.cr0 & 1 == 0 || c.sysenter[0] & 0xfffc == 0 {
        return Err(Exception::gp().into());
    }
    let long = c.long_mode();
    let cs = c.sysenter[0] as u16 & !3;
    c.eflags &= !(VM | RF);
    c.iflag = 0;
    c.gpr[4] = if long { c.sysenter[1] } else { c.sysenter[1] & 0xffff_ffff };
    c.rip = if long { c.sysenter[2] } else { c.sysenter[2] & 0xffff_ffff };
    c.cpl = 0;
    v.put_segment(1, flat(cs, if long { 0xa09b } else { 0xc09b }));
    v.put_segment(2, flat(cs + 8, 0xc093));
    v.select_region();
    Ok(Flow::Jump)
}

pub fn sysexit(v: &mut Vcpu, i: &Instruction) -> Done {
    if crate::host::amd() && v.cpu().long_mode() {
        v.supervisor()?;
        return Err(Exception::ud().into());
    }
    let c = v.cpu();
    if c.cr0 & 1 == 0 || c.sysenter[0] & 0xfffc == 0 {
        return Err(Exception::gp().into());
    }
    v.supervisor()?;
    let c = v.cpu_mut();
    let cs = c.sysenter[0] as u16;
    let wide = i.mnemonic() == M::Sysexitq;
    if wide {
        if !canonical(c.gpr[1]) || !canonical(c.gpr[2]) {
            return Err(Exception::gp().into());
        }
        c.gpr[4] = c.gpr[1];
        c.rip = c.gpr[2];
    } else {
        c.gpr[4] = c.gpr[1] & 0xffff_ffff;
        c.rip = c.gpr[2] & 0xffff_ffff;
    }
    c.cpl = 3;
    let (code, stack, access) = if wide { (32, 40, 0xa0fb) } else { (16, 24, 0xc0fb) };
    v.put_segment(1, flat((cs + code) | 3, access));
    v.put_segment(2, flat((cs + stack) | 3, 0xc0f3));
    v.select_region();
    Ok(Flow::Jump)
}
