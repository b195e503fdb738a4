//! Control registers, model-specific registers, CPUID, time, TLB control, HLT.
use super::{Done, Flow};
use crate::cpu::{VIF, VIP, VM};
use crate::cpuid::PHYSICAL_BITS;
use crate::mmu::*;
use crate::vcpu::Vcpu;
use bunshin_core::Exit;
use iced_x86::{Instruction, Mnemonic as M, Register};

const CR0_VALID: u64 = 0xe005_003f;
const CR4_VME: u64 = 1;
const CR4_PVI: u64 = 2;
const CR4_DE: u64 = 8;
const CR4_SUPPORTED: u64 =
    0x7f | 1 << 7 | 1 << 8 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 16 | CR4_PCIDE | 1 << 18 | CR4_SMEP | CR4_SMAP;

pub fn refuse(_: &mut Vcpu, _: &Instruction) -> Done {
    Err(gp())
}

/// MOV to and from control registers.
pub fn mov_special(v: &mut Vcpu, i: &Instruction) -> Done {
    v.supervisor()?;
    let (to, from) = (i.op0_register(), i.op1_register());
    if to.is_gpr() {
        let x = match from {
            Register::CR0 => v.cpu().cr0,
            Register::CR2 => v.cpu().cr2,
            Register::CR3 => v.cpu().cr3,
            Register::CR4 => v.cpu().cr4,
            Register::CR8 => v.chips.cr8(v.index),
            _ => return Err(ud()),
        };
        v.set_reg(to, x);
        return Ok(Flow::Next);
    }
    let x = v.reg(from);
    match to {
        Register::CR0 => v.set_cr0(x)?,
        Register::CR2 => v.cpu_mut().cr2 = x,
        Register::CR3 => {
            // Bit 63 is reserved without PCIDs.
            let pcide = v.cpu().cr4 & CR4_PCIDE != 0;
            let keep = pcide && x >> 63 != 0;
            let x = x & !(u64::from(pcide) << 63);
            if x >> PHYSICAL_BITS != 0 {
                return Err(gp());
            }
            let old = std::mem::replace(&mut v.cpu_mut().cr3, x);
            if let Err(e) = v.load_pdptes() {
                v.cpu_mut().cr3 = old;
                return Err(e.into());
            }
            v.switch_address_space(keep);
        }
        Register::CR4 => v.set_cr4(x)?,
        Register::CR8 => {
            if x > 15 {
                return Err(gp());
            }
            v.chips.set_cr8(v.index, x);
        }
        _ => return Err(ud()),
    }
    v.cpu_mut().rip = i.next_ip();
    Ok(Flow::Jump)
}

impl Vcpu {
    fn set_cr0(&mut self, x: u64) -> Result<(), Trap> {
        if x >> 32 != 0 || x & 1 == 0 && x & CR0_PG != 0 || x & (1 << 29) != 0 && x & (1 << 30) == 0 {
            return Err(gp());
        }
        let (old, efer) = (self.cpu().cr0, self.cpu().efer);
        let new = (x & CR0_VALID) | 0x10;
        if new & CR0_PG == 0 && self.cpu().cr4 & CR4_PCIDE != 0 {
            return Err(gp());
        }
        let c = self.cpu();
        if old & CR0_PG == 0 && new & CR0_PG != 0 && c.efer & 0x100 != 0 {
            if c.cr4 & CR4_PAE == 0 || c.seg[1].long() {
                return Err(gp());
            }
            self.cpu_mut().efer |= 0x400;
        }
        if old & CR0_PG != 0 && new & CR0_PG == 0 && self.cpu().efer & 0x400 != 0 {
            if self.cpu().code64() {
                return Err(gp());
            }
            self.cpu_mut().efer &= !0x400;
        }
        let lma = (self.cpu().efer ^ efer) & 0x400;
        self.cpu_mut().cr0 = new;
        if (old ^ new) & CR0_PG != 0 {
            if let Err(e) = self.load_pdptes() {
                let c = self.cpu_mut();
                c.cr0 = old;
                c.efer ^= lma;
                return Err(e.into());
            }
        }
        if (old ^ new) & (CR0_PG | CR0_WP | 1) != 0 {
            self.flush_tlb_all();
        }
        self.refresh_reach();
        self.select_region();
        Ok(())
    }

    fn set_cr4(&mut self, x: u64) -> Result<(), Trap> {
        let old = self.cpu().cr4;
        let c = self.cpu();
        if x & !CR4_SUPPORTED != 0
            || x & CR4_PCIDE != 0 && old & CR4_PCIDE == 0 && (c.cr3 & 0xfff != 0 || c.efer & 0x400 == 0)
            || x & CR4_PAE == 0 && c.efer & 0x400 != 0
        {
            return Err(gp());
        }
        self.cpu_mut().cr4 = x;
        if (old ^ x) & (CR4_PSE | CR4_PAE | CR4_PGE) != 0 {
            if let Err(e) = self.load_pdptes() {
                self.cpu_mut().cr4 = old;
                return Err(e.into());
            }
        }
        if (old ^ x) & CR4_DE != 0 {
            self.arm_breakpoints();
        }
        if (old ^ x) & (CR4_PSE | CR4_PAE | CR4_PGE | CR4_SMEP | CR4_SMAP | CR4_PCIDE) != 0 {
            self.flush_tlb_all();
        }
        self.select_region();
        Ok(())
    }
}

pub fn lmsw(v: &mut Vcpu, i: &Instruction) -> Done {
    v.supervisor()?;
    let cr0 = v.cpu().cr0;
    let x = if i.mnemonic() == M::Clts {
        cr0 & !8
    } else {
        let x = v.operand(i, 0)? & 15;
        (cr0 & !14) | x
    };
    v.set_cr0(x)?;
    v.cpu_mut().rip = i.next_ip();
    Ok(Flow::Jump)
}

/// CLI and STI where IOPL decides, or CR4.VME and PVI give a virtual flag.
pub fn interrupt_flag(v: &mut Vcpu, i: &Instruction) -> Done {
    let c = v.cpu_mut();
    let set = i.mnemonic() == M::Sti;
    if c.cr0 & 1 == 0 || c.cpl <= c.iopl() {
        c.iflag = u8::from(set);
        if set {
            c.shadow = 1;
        }
        return Ok(Flow::Next);
    }
    let virtual_flag = if c.eflags & VM != 0 { c.cr4 & CR4_VME } else { c.cr4 & CR4_PVI };
    if c.cpl != 3 || virtual_flag == 0 || set && c.eflags & VIP != 0 {
        return Err(gp());
    }
    if set {
        c.eflags |= VIF;
    } else {
        c.eflags &= !VIF;
    }
    Ok(Flow::Next)
}

/// CLAC and STAC; also drops what supervisor code entered for user pages.
pub fn access_check(v: &mut Vcpu, i: &Instruction) -> Done {
    if v.cpu().cpl != 0 {
        return Err(ud());
    }
    v.cpu_mut().ac = u8::from(i.mnemonic() == M::Stac);
    if i.mnemonic() == M::Clac {
        v.regions.all[0].flush_kuser();
        v.cpu_mut().kuser = 0;
    }
    Ok(Flow::Next)
}

pub fn swapgs(v: &mut Vcpu, _: &Instruction) -> Done {
    v.supervisor()?;
    let c = v.cpu_mut();
    std::mem::swap(&mut c.seg_base[5], &mut c.kernel_gs_base);
    Ok(Flow::Next)
}

pub fn fsgsbase(v: &mut Vcpu, i: &Instruction) -> Done {
    if v.cpu().cr4 & (1 << 16) == 0 || !v.cpu().code64() {
        return Err(ud());
    }
    let n = if matches!(i.mnemonic(), M::Rdfsbase | M::Wrfsbase) { 4 } else { 5 };
    if matches!(i.mnemonic(), M::Rdfsbase | M::Rdgsbase) {
        let x = v.cpu().seg_base[n];
        v.set_reg(i.op0_register(), x);
    } else {
        let x = v.reg(i.op0_register());
        if !canonical(x) {
            return Err(gp());
        }
        v.cpu_mut().seg_base[n] = x;
    }
    Ok(Flow::Next)
}

pub fn invlpg(v: &mut Vcpu, i: &Instruction) -> Done {
    v.supervisor()?;
    let va = v.operand_address(i);
    if canonical(va) {
        v.invlpg(va);
    }
    v.cpu_mut().rip = i.next_ip();
    Ok(Flow::Jump)
}

pub fn invpcid(v: &mut Vcpu, i: &Instruction) -> Done {
    v.supervisor()?;
    let va = v.operand_at(i, 0, 16, Kind::Read)?;
    let who = v.data_access();
    let (low, address) = (v.load(va, 8, who)?, v.load(va.wrapping_add(8), 8, who)?);
    let kind = v.reg(i.op0_register());
    let pcid = (low & 0xfff) as u16;
    let foreign = kind < 2 && pcid != 0 && v.cpu().cr4 & CR4_PCIDE == 0;
    if foreign || kind > 3 || kind < 2 && low >> 12 != 0 || kind == 0 && !canonical(address) {
        return Err(gp());
    }
    match kind {
        0 => {
            v.invlpg_pcid(address, pcid);
        }
        1 => v.flush_pcid(pcid),
        _ => v.flush_tlb_all(),
    }
    v.cpu_mut().rip = i.next_ip();
    Ok(Flow::Jump)
}

pub fn cache_control(v: &mut Vcpu, _: &Instruction) -> Done {
    v.supervisor()?;
    Ok(Flow::Next)
}

/// RDTSC, RDTSCP, RDPID.
pub fn rdtscp(v: &mut Vcpu, i: &Instruction) -> Done {
    if i.mnemonic() == M::Rdpid {
        let x = v.msrs.tsc_aux;
        v.set_reg(i.op0_register(), x);
        return Ok(Flow::Next);
    }
    if v.cpu().cr4 & 4 != 0 && v.cpu().cpl != 0 {
        return Err(gp());
    }
    let t = v.tsc();
    let aux = v.msrs.tsc_aux;
    let c = v.cpu_mut();
    c.gpr[0] = t & 0xffff_ffff;
    c.gpr[2] = t >> 32;
    if i.mnemonic() == M::Rdtscp {
        c.gpr[1] = aux & 0xffff_ffff;
    }
    Ok(Flow::Next)
}

impl Vcpu {
    /// The guest's time-stamp counter now.
    pub fn tsc(&self) -> u64 {
        self.chips.clock.tsc().wrapping_add(self.cpu().tsc_offset)
    }
}

pub fn cpuid(v: &mut Vcpu, i: &Instruction) -> Done {
    let (leaf, sub) = (v.cpu().gpr[0] as u32, v.cpu().gpr[1] as u32);
    let table = v.cpuid.clone();
    let r = table.get(leaf, sub, v);
    let c = v.cpu_mut();
    (c.gpr[0], c.gpr[3], c.gpr[1], c.gpr[2]) = (r[0].into(), r[1].into(), r[2].into(), r[3].into());
    c.rip = i.next_ip();
    Ok(Flow::Jump)
}

pub fn rdmsr(v: &mut Vcpu, _: &Instruction) -> Done {
    v.supervisor()?;
    let n = v.cpu().gpr[1] as u32;
    let x = v.read_msr(n).ok_or_else(gp)?;
    let c = v.cpu_mut();
    c.gpr[0] = x & 0xffff_ffff;
    c.gpr[2] = x >> 32;
    Ok(Flow::Next)
}

pub fn wrmsr(v: &mut Vcpu, i: &Instruction) -> Done {
    v.supervisor()?;
    let c = v.cpu();
    let (n, x) = (c.gpr[1] as u32, (c.gpr[0] & 0xffff_ffff) | (c.gpr[2] << 32));
    v.write_msr(n, x).ok_or_else(gp)?;
    // What depends on the register (EFER, GS base) was changed by write_msr;
    // only EFER changes how code is translated.
    if n == 0xc000_0080 {
        v.select_region();
    }
    v.cpu_mut().rip = i.next_ip();
    Ok(Flow::Jump)
}

pub fn xcr(v: &mut Vcpu, i: &Instruction) -> Done {
    if v.cpu().cr4 & (1 << 18) == 0 {
        return Err(ud());
    }
    let n = v.cpu().gpr[1] as u32;
    if i.mnemonic() == M::Xgetbv {
        if n > 1 {
            return Err(gp());
        }
        let x = v.cpu().xcr0;
        let c = v.cpu_mut();
        c.gpr[0] = x & 0xffff_ffff;
        c.gpr[2] = x >> 32;
        return Ok(Flow::Next);
    }
    v.supervisor()?;
    let c = v.cpu();
    let x = (c.gpr[0] & 0xffff_ffff) | (c.gpr[2] << 32);
    let avx512 = x & 0xe0;
    if n != 0
        || x & 1 == 0
        || x & !crate::host::xsave_mask() != 0
        || x & 4 != 0 && x & 2 == 0
        || avx512 != 0 && (avx512 != 0xe0 || x & 4 == 0)
    {
        return Err(gp());
    }
    v.cpu_mut().xcr0 = x;
    v.select_region();
    v.cpu_mut().rip = i.next_ip();
    Ok(Flow::Jump)
}

pub fn hlt(v: &mut Vcpu, i: &Instruction) -> Done {
    v.supervisor()?;
    let c = v.cpu_mut();
    c.halted = 1;
    c.rip = i.next_ip();
    Ok(Flow::Jump)
}

pub fn hypercall(v: &mut Vcpu, _: &Instruction) -> Done {
    if v.cpu().cpl != 0 {
        return Err(gp());
    }
    let number = v.cpu().gpr[0];
    if v.answer_next < v.answers.len() {
        v.answer_next += 1;
        let x = v.answers[v.answer_next - 1];
        v.cpu_mut().gpr[0] = x;
        return Ok(Flow::Next);
    }
    Err(Trap::Exit(Exit::Hypercall { number }))
}
