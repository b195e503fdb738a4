//! Instructions that Rust performs: everything sensitive, and everything whose
//! memory operand is not a plain one.
//!
//! A helper runs on the saved state (`Cpu`). It must change nothing before the
//! last thing that can fail, because the instruction starts again after a
//! fault or after the owner's answer.
pub mod address;
pub mod control;
pub mod debug;
pub mod event;
pub mod far;
pub mod fast;
pub mod fpu;
pub mod port;
pub mod segment;
pub mod stack;
pub mod string;
pub mod system;
pub mod task;

use crate::insn::gpr_number;
use crate::mmu::{ud, Kind, Trap, Who};
use crate::vcpu::{mode, Vcpu};
use bunshin_core::chips::{IOAPIC_GPA, LAPIC_GPA};
use bunshin_core::Exit;
use iced_x86::{Code, Instruction, MemorySize, Mnemonic as M, OpKind, Register};
use std::arch::x86_64::{_mm_loadu_si128, _mm_storeu_si128};

/// What comes after an instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flow {
    /// The next one.
    Next,
    /// `cpu.rip`, or the mode changed.
    Jump,
}

pub type Done = Result<Flow, Trap>;

/// How Rust performs an instruction.
#[derive(Clone, Copy)]
pub struct Helper {
    pub run: fn(&mut Vcpu, &Instruction) -> Done,
    /// It may touch chips, leave to the owner, or use the C library's memory
    /// functions: run it outside translated code.
    pub outside: bool,
}

/// BT, BTS, BTR, BTC with a memory operand and a register offset.
pub fn bit_string(i: &Instruction) -> bool {
    matches!(i.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc)
        && i.op0_kind() == OpKind::Memory
        && i.op1_kind() == OpKind::Register
}

/// Bytes of the address of the explicit memory operand.
pub fn address_size(i: &Instruction) -> usize {
    match (i.memory_base(), i.memory_index()) {
        (Register::None, x) if x.is_gpr() => x.size(),
        (Register::None, _) => i.memory_displ_size() as usize,
        (b, _) => b.size(),
    }
}

fn is_sreg(i: &Instruction) -> bool {
    (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_segment_register())
}

fn special_register(i: &Instruction) -> bool {
    (0..i.op_count()).any(|n| {
        i.op_kind(n) == OpKind::Register && {
            let r = i.op_register(n);
            r.is_cr() || r.is_dr() || r.is_tr()
        }
    })
}

/// True if the instruction is not translated but performed by `helper`.
pub fn wants_helper(i: &Instruction, m: u32) -> bool {
    let user = m & (mode::USER | mode::MIDDLE) != 0;
    let bits = mode::bits(m);
    // The stack is not what PUSH and POP are translated for.
    let careful = bits == 16 || m & mode::LIMITED != 0;
    match i.mnemonic() {
        M::Mov => is_sreg(i) || special_register(i),
        M::Push => is_sreg(i) || careful,
        M::Pop => is_sreg(i) || i.op0_kind() == OpKind::Memory || careful,
        M::Leave => careful || i.code() == Code::Leavew,
        M::Cli | M::Sti | M::Stac | M::Clac | M::Swapgs => user,
        M::Rdtsc => user && m & mode::TSD != 0 || m & mode::COUNTED != 0,
        M::Rdrand | M::Rdseed => m & mode::COUNTED != 0,
        M::Rdfsbase | M::Rdgsbase => m & mode::NO_FSGSBASE != 0,
        M::Wrfsbase | M::Wrgsbase => true,
        // Its target is known, and whether that is inside the code segment.
        M::Jmp if matches!(i.code(), Code::Jmp_rel8_16 | Code::Jmp_rel16) => bits == 64,
        M::Call | M::Jmp | M::Ret | M::Retf => {
            careful
                || m & mode::CODE_LIMITED != 0
                || !matches!(
                    i.code(),
                    Code::Call_rel32_64
                        | Code::Call_rel32_32
                        | Code::Call_rm64
                        | Code::Call_rm32
                        | Code::Jmp_rel8_64
                        | Code::Jmp_rel8_32
                        | Code::Jmp_rel32_64
                        | Code::Jmp_rel32_32
                        | Code::Jmp_rm64
                        | Code::Jmp_rm32
                        | Code::Retnq
                        | Code::Retnq_imm16
                        | Code::Retnd
                        | Code::Retnd_imm16
                )
        }
        M::Loop | M::Loope | M::Loopne | M::Jcxz | M::Jecxz | M::Jrcxz => {
            bits == 16
                || i.op0_kind() == OpKind::NearBranch16
                || matches!(
                    i.code(),
                    Code::Jcxz_rel8_32
                        | Code::Jcxz_rel8_16
                        | Code::Loop_rel8_32_CX
                        | Code::Loope_rel8_32_CX
                        | Code::Loopne_rel8_32_CX
                )
        }
        M::Movsb
        | M::Movsw
        | M::Movsq
        | M::Stosb
        | M::Stosw
        | M::Stosd
        | M::Stosq
        | M::Lodsb
        | M::Lodsw
        | M::Lodsd
        | M::Lodsq
        | M::Scasb
        | M::Scasw
        | M::Scasd
        | M::Scasq
        | M::Cmpsb
        | M::Cmpsw
        | M::Cmpsq => true,
        M::Movsd | M::Cmpsd => string::is_string(i),
        M::Insb | M::Insw | M::Insd | M::Outsb | M::Outsw | M::Outsd | M::In | M::Out => true,
        M::Cpuid
        | M::Rdmsr
        | M::Wrmsr
        | M::Hlt
        | M::Rdtscp
        | M::Rdpmc
        | M::Rdpid
        | M::Lgdt
        | M::Lidt
        | M::Sgdt
        | M::Sidt
        | M::Lldt
        | M::Ltr
        | M::Sldt
        | M::Str
        | M::Lmsw
        | M::Smsw
        | M::Clts
        | M::Invlpg
        | M::Invpcid
        | M::Invd
        | M::Wbinvd
        | M::Wbnoinvd
        | M::Xgetbv
        | M::Xsetbv
        | M::Monitor
        | M::Mwait
        | M::Vmcall
        | M::Vmmcall
        | M::Lar
        | M::Lsl
        | M::Verr
        | M::Verw
        | M::Pushf
        | M::Pushfd
        | M::Pushfq
        | M::Popf
        | M::Popfd
        | M::Popfq
        | M::Iret
        | M::Iretd
        | M::Iretq
        | M::Int
        | M::Int1
        | M::Int3
        | M::Into
        | M::Syscall
        | M::Sysret
        | M::Sysretq
        | M::Sysenter
        | M::Sysexit
        | M::Sysexitq
        | M::Bound
        | M::Enter
        | M::Xlatb
        | M::Ud0
        | M::Ud1
        | M::Ud2
        | M::Pusha
        | M::Pushad
        | M::Popa
        | M::Popad
        | M::Aaa
        | M::Aas
        | M::Aad
        | M::Aam
        | M::Daa
        | M::Das
        | M::Les
        | M::Lds
        | M::Lss
        | M::Lfs
        | M::Lgs
        | M::Arpl
        | M::Salc
        | M::Rsm
        | M::Getsec => true,
        M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu => true,
        M::Fnstenv
        | M::Fldenv
        | M::Fnsave
        | M::Frstor
        | M::Fxsave
        | M::Fxsave64
        | M::Fxrstor
        | M::Fxrstor64
        | M::Xsave
        | M::Xsave64
        | M::Xsaveopt
        | M::Xsaveopt64
        | M::Xsavec
        | M::Xsavec64
        | M::Xsaves
        | M::Xsaves64
        | M::Xrstor
        | M::Xrstor64
        | M::Xrstors
        | M::Xrstors64 => true,
        M::Monitorx
        | M::Mwaitx
        | M::Clzero
        | M::Rdpkru
        | M::Wrpkru
        | M::Xbegin
        | M::Xend
        | M::Xabort
        | M::Xtest
        | M::Vmrun
        | M::Vmload
        | M::Vmsave
        | M::Stgi
        | M::Clgi
        | M::Skinit
        | M::Invlpga
        | M::Invlpgb
        | M::Tlbsync
        | M::Vmptrld
        | M::Vmptrst
        | M::Vmclear
        | M::Vmread
        | M::Vmwrite
        | M::Vmlaunch
        | M::Vmresume
        | M::Vmxon
        | M::Vmxoff
        | M::Invept
        | M::Invvpid
        | M::Vmfunc
        | M::Encls
        | M::Enclu
        | M::Enclv
        | M::Tpause
        | M::Umwait
        | M::Umonitor
        | M::Enqcmd
        | M::Enqcmds
        | M::Rdpru
        | M::Mcommit
        | M::Ptwrite
        | M::Tdpbssd
        | M::Tileloadd
        | M::Ldtilecfg
        | M::Sttilecfg
        | M::Tilerelease
        | M::Tilezero
        | M::Tilestored
        | M::Pconfig
        | M::Serialize
        | M::Clui
        | M::Stui
        | M::Uiret
        | M::Senduipi
        | M::Testui
        | M::Incsspd
        | M::Incsspq
        | M::Rdsspd
        | M::Rdsspq
        | M::Saveprevssp
        | M::Rstorssp
        | M::Wrssd
        | M::Wrssq
        | M::Wrussd
        | M::Wrussq
        | M::Setssbsy
        | M::Clrssbsy => true,
        _ => false,
    }
}

/// No later load passes it (SDM volume 3, "Serializing Instructions"): those that
/// are performed without leaving translated code.
pub fn serialises(i: &Instruction) -> bool {
    match i.mnemonic() {
        M::Mov => special_register(i) && !i.op0_register().is_gpr(),
        M::Iret
        | M::Iretd
        | M::Iretq
        | M::Lmsw
        | M::Clts
        | M::Invlpg
        | M::Invpcid
        | M::Invd
        | M::Wbinvd
        | M::Wbnoinvd
        | M::Lgdt
        | M::Lidt
        | M::Lldt
        | M::Ltr
        | M::Xsetbv => true,
        _ => false,
    }
}

/// True if nothing may be translated behind the instruction.
pub fn ends_block(i: &Instruction) -> bool {
    match i.mnemonic() {
        M::Mov => {
            special_register(i) && i.op0_kind() == OpKind::Register && !i.op0_register().is_gpr()
                || is_sreg_write(i)
        }
        M::Pop => is_sreg(i),
        M::Lmsw
        | M::Clts
        | M::Wrmsr
        | M::Xsetbv
        | M::Invlpg
        | M::Invpcid
        | M::Hlt
        | M::Popf
        | M::Popfd
        | M::Popfq
        | M::Lss
        | M::Lds
        | M::Les
        | M::Lfs
        | M::Lgs
        | M::Vmcall
        | M::Vmmcall
        | M::Wbinvd
        | M::Invd
        | M::Cpuid => true,
        _ => false,
    }
}

fn is_sreg_write(i: &Instruction) -> bool {
    i.op0_kind() == OpKind::Register && i.op0_register().is_segment_register()
}

/// The function that performs `i`.
pub fn helper(i: &Instruction) -> Helper {
    let inside = |run| Helper { run, outside: false };
    let outside = |run| Helper { run, outside: true };
    match i.mnemonic() {
        M::Mov if special_register(i) => {
            let is = |r: fn(Register) -> bool| r(i.op0_register()) || r(i.op1_register());
            if is(|r| r.is_dr()) {
                return outside(debug::mov);
            }
            // CR8 belongs to a chip; what CR4 changes may drop translations.
            Helper { run: system::mov_special, outside: is(|r| matches!(r, Register::CR8 | Register::CR4)) }
        }
        M::Mov if is_sreg(i) => inside(segment::mov),
        M::Push if is_sreg(i) => inside(segment::push),
        M::Pop if is_sreg(i) => inside(segment::pop),
        M::Push => inside(stack::push),
        M::Pop => inside(stack::pop),
        M::Leave => inside(stack::leave),
        M::Enter => inside(stack::enter),
        M::Pusha | M::Pushad => inside(stack::pusha),
        M::Popa | M::Popad => inside(stack::popa),
        M::Pushf | M::Pushfd | M::Pushfq => inside(stack::pushf),
        M::Popf | M::Popfd | M::Popfq => inside(stack::popf),
        M::Cli | M::Sti => inside(system::interrupt_flag),
        M::Clac | M::Stac => inside(system::access_check),
        M::Swapgs => inside(system::swapgs),
        M::Rdfsbase | M::Rdgsbase | M::Wrfsbase | M::Wrgsbase => inside(system::fsgsbase),
        M::Call | M::Jmp | M::Ret | M::Retf => inside(control::transfer),
        M::Loop | M::Loope | M::Loopne | M::Jcxz | M::Jecxz | M::Jrcxz => inside(control::counted),
        M::Iret | M::Iretd | M::Iretq => inside(far::iret),
        M::Int | M::Int1 | M::Int3 | M::Into => inside(control::int),
        M::Syscall => inside(fast::syscall),
        M::Sysret | M::Sysretq => inside(fast::sysret),
        M::Sysenter => inside(fast::sysenter),
        M::Sysexit | M::Sysexitq => inside(fast::sysexit),
        M::Movsb
        | M::Movsw
        | M::Movsq
        | M::Stosb
        | M::Stosw
        | M::Stosd
        | M::Stosq
        | M::Lodsb
        | M::Lodsw
        | M::Lodsd
        | M::Lodsq
        | M::Scasb
        | M::Scasw
        | M::Scasd
        | M::Scasq
        | M::Cmpsb
        | M::Cmpsw
        | M::Cmpsq => inside(string::string),
        M::Movsd | M::Cmpsd if string::is_string(i) => inside(string::string),
        M::In | M::Out | M::Insb | M::Insw | M::Insd | M::Outsb | M::Outsw | M::Outsd => outside(port::port),
        M::Cpuid => outside(system::cpuid),
        M::Rdmsr => outside(system::rdmsr),
        M::Wrmsr => outside(system::wrmsr),
        M::Hlt => outside(system::hlt),
        M::Vmcall | M::Vmmcall => outside(system::hypercall),
        M::Rdtsc | M::Rdtscp | M::Rdpid => inside(system::rdtscp),
        M::Lgdt | M::Lidt => inside(segment::load_table),
        M::Sgdt | M::Sidt => inside(segment::store_table),
        M::Lldt | M::Ltr => inside(segment::load_system),
        M::Sldt | M::Str | M::Smsw => inside(segment::store_system),
        M::Lmsw | M::Clts => inside(system::lmsw),
        M::Lar | M::Lsl | M::Verr | M::Verw => inside(segment::inspect),
        M::Les | M::Lds | M::Lss | M::Lfs | M::Lgs => inside(segment::load_far),
        M::Arpl => inside(segment::arpl),
        M::Invlpg => inside(system::invlpg),
        M::Invpcid => inside(system::invpcid),
        M::Invd | M::Wbinvd | M::Wbnoinvd => inside(system::cache_control),
        M::Xgetbv | M::Xsetbv => inside(system::xcr),
        M::Bound => inside(control::bound),
        M::Xlatb => inside(stack::xlat),
        M::Aaa | M::Aas | M::Aad | M::Aam | M::Daa | M::Das | M::Salc => inside(stack::decimal),
        M::Inc | M::Dec if i.op0_kind() == OpKind::Register => inside(stack::inc_dec),
        M::Rdpmc | M::Rsm => inside(system::refuse),
        M::Clzero => outside(crate::slow::any),
        _ if wants_ud(i) => inside(undefined),
        _ => outside(crate::slow::any),
    }
}

/// Not offered in CPUID, so undefined whatever the host has.
fn wants_ud(i: &Instruction) -> bool {
    i.code() == Code::INVALID
        || !matches!(
            i.mnemonic(),
            M::Maskmovq
                | M::Maskmovdqu
                | M::Vmaskmovdqu
                | M::Fnstenv
                | M::Fldenv
                | M::Fnsave
                | M::Frstor
                | M::Fxsave
                | M::Fxsave64
                | M::Fxrstor
                | M::Fxrstor64
                | M::Xsave
                | M::Xsave64
                | M::Xsaveopt
                | M::Xsaveopt64
                | M::Xsavec
                | M::Xsavec64
                | M::Xsaves
                | M::Xsaves64
                | M::Xrstor
                | M::Xrstor64
                | M::Xrstors
                | M::Xrstors64
        ) && wants_helper(i, mode::BITS64)
}

pub fn undefined(_: &mut Vcpu, _: &Instruction) -> Done {
    Err(ud())
}

// --- what helpers share ------------------------------------------------------------

impl Vcpu {
    /// Who a data access of the current instruction belongs to.
    pub fn data_access(&self) -> Who {
        if self.cpu().cpl == 3 {
            Who::User
        } else {
            Who::Supervisor
        }
    }

    /// A register of any size, zero-extended.
    pub fn reg(&self, r: Register) -> u64 {
        let (n, high) = gpr_number(r).unwrap_or((0, false));
        let v = self.cpu().gpr[n as usize];
        match r.size() {
            1 if high => (v >> 8) & 0xff,
            1 => v & 0xff,
            2 => v & 0xffff,
            4 => v & 0xffff_ffff,
            _ => v,
        }
    }

    /// Write a register as the processor does: 32 bits clear the upper half.
    pub fn set_reg(&mut self, r: Register, v: u64) {
        let (n, high) = gpr_number(r).unwrap_or((0, false));
        let g = &mut self.cpu_mut().gpr[n as usize];
        *g = match r.size() {
            1 if high => (*g & !0xff00) | ((v & 0xff) << 8),
            1 => (*g & !0xff) | (v & 0xff),
            2 => (*g & !0xffff) | (v & 0xffff),
            4 => v & 0xffff_ffff,
            _ => v,
        };
    }

    /// Read guest memory as `who`.
    pub fn read_as(&mut self, va: u64, into: &mut [u8], who: Who) -> Result<(), Trap> {
        if (va & 0xfff) as usize + into.len() > 4096 {
            self.check_end(va, into.len())?;
        }
        let mut done = 0;
        while done < into.len() {
            let at = va.wrapping_add(done as u64);
            let n = ((4096 - (at & 0xfff)) as usize).min(into.len() - done);
            let (host, gpa) = self.access(at, n as u64, Kind::Read, who)?;
            match host {
                // SAFETY: guest RAM, `n` bytes inside one page.
                Some(h) => unsafe { copy_bytes(h as *const u8, into[done..].as_mut_ptr(), n) },
                None => self.device_read(gpa, &mut into[done..done + n])?,
            }
            done += n;
        }
        Ok(())
    }

    /// Check an access as the processor does before it starts.
    pub fn check(&mut self, va: u64, length: usize, kind: Kind, who: Who) -> Result<(), Trap> {
        self.check_end(va, length)?;
        let mut done = 0;
        while done < length as u64 {
            let at = va.wrapping_add(done);
            self.access(at, 1, kind, who)?;
            done += 4096 - (at & 0xfff);
        }
        Ok(())
    }

    /// Write guest memory as `who`. All pages are checked before any is changed.
    pub fn write_as(&mut self, va: u64, from: &[u8], who: Who) -> Result<(), Trap> {
        if (va & 0xfff) as usize + from.len() > 4096 {
            self.check(va, from.len(), Kind::Write, who)?;
        }
        let mut done = 0;
        while done < from.len() {
            let at = va.wrapping_add(done as u64);
            let n = ((4096 - (at & 0xfff)) as usize).min(from.len() - done);
            let (host, gpa) = self.access(at, n as u64, Kind::Write, who)?;
            match host {
                // SAFETY: as above.
                Some(h) => unsafe { copy_bytes(from[done..].as_ptr(), h as *mut u8, n) },
                None => self.special_write(gpa, &from[done..done + n])?,
            }
            done += n;
        }
        Ok(())
    }

    /// A store that may not go straight to RAM: read-only memory, code, a device.
    pub fn special_write(&mut self, gpa: u64, from: &[u8]) -> Result<(), Trap> {
        let Some(s) = self.phys.slot(gpa) else { return self.device_write(gpa, from) };
        if s.readonly {
            return Ok(());
        }
        if self.in_code {
            // Dropping translations allocates, and may have to wait; do it outside.
            return Err(Trap::Device);
        }
        let h = s.host + (gpa - s.gpa);
        let page = s.first + ((gpa - s.gpa) >> 12) as usize;
        let others = self.phys.pages.announce_store(page, self.me()) & !self.me();
        if others != 0 && !self.exclusive {
            return self.exclusively(|v| v.special_write(gpa, from));
        }
        self.drop_others_code(page);
        // SAFETY: guest RAM, inside one page.
        let old = unsafe { std::slice::from_raw_parts(h as *const u8, from.len()) };
        if old != from {
            self.code_changed(gpa, from.len() as u64);
        }
        // SAFETY: guest RAM.
        unsafe { copy_bytes(from.as_ptr(), h as *mut u8, from.len()) };
        Ok(())
    }

    /// Unsigned little-endian load of 1, 2, 4 or 8 bytes.
    pub fn load(&mut self, va: u64, size: usize, who: Who) -> Result<u64, Trap> {
        let mut b = [0; 8];
        self.read_as(va, &mut b[..size], who)?;
        Ok(u64::from_le_bytes(b))
    }

    pub fn store(&mut self, va: u64, size: usize, v: u64, who: Who) -> Result<(), Trap> {
        self.write_as(va, &v.to_le_bytes()[..size], who)
    }

    /// Value of operand `n`, zero-extended.
    pub fn operand(&mut self, i: &Instruction, n: u32) -> Result<u64, Trap> {
        match i.op_kind(n) {
            OpKind::Register => Ok(self.reg(i.op_register(n))),
            OpKind::Memory => {
                let size = i.memory_size().size().clamp(1, 8);
                let va = self.operand_at(i, 0, size, Kind::Read)?;
                let who = self.data_access();
                self.load(va, size, who)
            }
            _ => Ok(i.immediate(n)),
        }
    }

    pub fn set_operand(&mut self, i: &Instruction, n: u32, size: usize, v: u64) -> Result<(), Trap> {
        if i.op_kind(n) == OpKind::Register {
            self.set_reg(i.op_register(n), v);
            return Ok(());
        }
        let va = self.operand_at(i, 0, size, Kind::Write)?;
        let who = self.data_access();
        self.store(va, size, v, who)
    }

    /// Device load of up to 8 bytes; larger ones are split.
    fn device_read(&mut self, gpa: u64, into: &mut [u8]) -> Result<(), Trap> {
        if !self.may_exit {
            return Err(Trap::Device);
        }
        let mut done = 0;
        while done < into.len() {
            let at = gpa + done as u64;
            let mut n = (into.len() - done).min(8);
            while !n.is_power_of_two() {
                n -= 1;
            }
            self.counters.device_accesses += 1;
            let chip = if self.foreign { None } else { self.chips.mmio_read(self.index, at, n as u8) };
            let v = match chip {
                Some(v) => v,
                None if self.answer_next < self.answers.len() => {
                    self.answer_next += 1;
                    self.answers[self.answer_next - 1]
                }
                None => return Err(Trap::Exit(Exit::MmioRead { gpa: at, size: n as u8 })),
            };
            into[done..done + n].copy_from_slice(&v.to_le_bytes()[..n]);
            done += n;
        }
        Ok(())
    }

    fn device_write(&mut self, gpa: u64, from: &[u8]) -> Result<(), Trap> {
        if !self.may_exit {
            return Err(Trap::Device);
        }
        let mut done = 0;
        while done < from.len() {
            let at = gpa + done as u64;
            let mut n = (from.len() - done).min(8);
            while !n.is_power_of_two() {
                n -= 1;
            }
            self.counters.device_accesses += 1;
            let mut v = [0; 8];
            v[..n].copy_from_slice(&from[done..done + n]);
            let value = u64::from_le_bytes(v);
            if self.foreign && matches!(at & !0xfff, LAPIC_GPA | IOAPIC_GPA) {
                // Whoever has it makes the access; the instruction has not happened.
                return Err(Trap::Exit(Exit::MmioWrite { gpa: at, size: n as u8, value }));
            }
            let chip = !self.foreign && self.chips.mmio_write(self.index, at, n as u8, value);
            if !chip && !self.ring(at, n as u8, value) {
                self.outbox.push_back(Exit::MmioWrite { gpa: at, size: n as u8, value });
            }
            done += n;
        }
        Ok(())
    }

    /// Memory operand size in bytes.
    pub fn operand_size(i: &Instruction) -> usize {
        match i.memory_size() {
            MemorySize::Unknown => 0,
            m => m.size(),
        }
    }
}

/// Copy without the C library, whose versions may use AVX registers.
///
/// # Safety
/// As `ptr::copy_nonoverlapping`.
pub unsafe fn copy_bytes(from: *const u8, to: *mut u8, n: usize) {
    // SAFETY: the caller's.
    unsafe {
        match n {
            1 => *to = *from,
            2 => to.cast::<u16>().write_unaligned(from.cast::<u16>().read_unaligned()),
            4 => to.cast::<u32>().write_unaligned(from.cast::<u32>().read_unaligned()),
            8 => to.cast::<u64>().write_unaligned(from.cast::<u64>().read_unaligned()),
            // In one piece, as processors with AVX do where it is aligned.
            16 => _mm_storeu_si128(to.cast(), _mm_loadu_si128(from.cast())),
            _ => {
                core::arch::asm!("rep movsb", inout("rcx") n => _, inout("rsi") from => _, inout("rdi") to => _,
                options(nostack, preserves_flags))
            }
        }
    }
}
