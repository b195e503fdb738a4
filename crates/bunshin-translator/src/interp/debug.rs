//! Debug registers: breakpoints on code, data and ports, general detect, what
//! follows MOV SS. SDM volume 3, 17.2 and 17.3.
//!
//! While a breakpoint on code is armed (`mode::DEBUG`) translations have a look at the
//! registers in front of the instruction that it names; those translations go when the
//! registers change. `debugger.rs` has the owner's breakpoints, which are no part of the
//! guest. Pages with a breakpoint on data get no entry in the TLB's tables,
//! so that `access` hears of every access. Not modelled: restricted transactional
//! memory, bus locks.
use super::{Done, Flow};
use crate::cpu::RF;
use crate::mmu::{gp, ud, Exception, Kind, Trap, DB};
use crate::vcpu::{mode, Vcpu};
use iced_x86::{Instruction, Register};

const CR4_DE: u64 = 8;
/// Bits of DR6: single step, task switch, general detect.
pub const BS: u64 = 1 << 14;
pub const BT: u64 = 1 << 15;
const BD: u64 = 1 << 13;
/// General detect enable in DR7.
pub const GD: u64 = 1 << 13;
/// Local enables in DR7.
pub const LOCAL: u64 = 0x155;
const BTF: u64 = 2;
/// In `Vcpu::met`: the instruction set TF and traps at once.
pub const STEP: u8 = 0x80;
/// In `Vcpu::met`: the owner watches what the instruction accessed.
pub const OWNER: u8 = 0x40;

/// Which kinds of breakpoints DR7 enables.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Armed {
    pub code: bool,
    pub data: bool,
    pub ports: bool,
}

/// What a breakpoint waits for: its R/W field.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Condition {
    Code,
    Store,
    Port,
    Access,
}

#[derive(Clone, Copy)]
struct Breakpoint {
    condition: Condition,
    from: u64,
    length: u64,
}

impl Breakpoint {
    fn covers(&self, at: u64, length: u64) -> bool {
        at < self.from + self.length && self.from < at.saturating_add(length)
    }
}

impl Vcpu {
    /// Breakpoint `n`, if it is enabled.
    fn breakpoint(&self, n: usize) -> Option<Breakpoint> {
        let c = self.cpu();
        if c.dr[7] >> (2 * n) & 3 == 0 {
            return None;
        }
        let field = c.dr[7] >> (16 + 4 * n) & 15;
        let condition = match field & 3 {
            0 => Condition::Code,
            1 => Condition::Store,
            2 if c.cr4 & CR4_DE != 0 => Condition::Port,
            2 => return None,
            _ => Condition::Access,
        };
        let length = match field >> 2 {
            0 => 1,
            1 => 2,
            2 => 8,
            _ => 4,
        };
        let length = if condition == Condition::Code { 1 } else { length };
        Some(Breakpoint { condition, from: c.dr[n] & !(length - 1), length })
    }

    fn hits(&self, at: u64, length: u64, wanted: impl Fn(Condition) -> bool) -> u8 {
        (0..4).fold(0, |m, n| match self.breakpoint(n) {
            Some(b) if wanted(b.condition) && b.covers(at, length) => m | 1 << n,
            _ => m,
        })
    }

    /// Breakpoints on the instruction at linear address `at`, a bit each.
    pub fn code_hits(&self, at: u64) -> u8 {
        self.hits(at, 1, |c| c == Condition::Code)
    }

    /// A breakpoint on data lies in the page of `va` and hears of `kind`.
    pub fn watched(&self, va: u64, kind: Kind) -> bool {
        self.armed.data && self.hits(va & !0xfff, 4096, |c| hears(c, kind)) != 0
            || self.debugger.watches(va & !0xfff, 4096, kind).is_some()
    }

    /// Something may be watched: look at accesses one by one.
    pub fn watching(&self) -> bool {
        self.armed.data || self.debugger.is_watching()
    }

    /// Note the breakpoints on data that an access meets.
    pub fn note_access(&mut self, va: u64, size: u64, kind: Kind) {
        if self.armed.data {
            self.met |= self.hits(va, size, |c| hears(c, kind));
        }
        self.note_owners(va, size, kind);
    }

    /// Note the breakpoints on ports that an access meets.
    pub fn note_port(&mut self, port: u16, size: usize) {
        if self.armed.ports {
            self.met |= self.hits(port.into(), size as u64, |c| c == Condition::Port);
        }
    }

    /// The debug registers or CR4.DE changed. Outside translated code where
    /// breakpoints may have been added.
    pub fn arm_breakpoints(&mut self) {
        let mut now = Armed::default();
        for b in (0..4).filter_map(|n| self.breakpoint(n)) {
            match b.condition {
                Condition::Code => now.code = true,
                Condition::Port => now.ports = true,
                _ => now.data = true,
            }
        }
        let before = std::mem::replace(&mut self.armed, now);
        if before.data || now.data {
            self.flush_tlb_all();
        }
        if now.code {
            self.forget_mode(mode::DEBUG);
        }
        if before.code != now.code {
            self.select_region();
        }
    }

    /// An instruction is complete: the traps that are due. `traced` is TF as it was,
    /// `sequential` that the next instruction follows.
    pub fn due(&mut self, traced: bool, sequential: bool) -> Option<Exception> {
        // What MOV SS met waits until the instruction after it.
        if self.cpu().shadow == AFTER_SS {
            return None;
        }
        let met = std::mem::take(&mut self.met);
        let step = traced && (self.msrs.debugctl & BTF == 0 || !sequential) || met & STEP != 0;
        if met & OWNER != 0 {
            self.stop_for_owner();
        }
        let met = met & !(STEP | OWNER);
        if met == 0 && !step {
            return None;
        }
        Some(self.debug_exception(u64::from(met) | if step { BS } else { 0 }))
    }

    /// The fault of a breakpoint on the instruction at rip, unless RF holds it back.
    pub fn code_breakpoint(&mut self) -> Option<Exception> {
        let c = self.cpu();
        // AMD's processors let MOV SS hold back traps only.
        let shaded = c.shadow == AFTER_SS && !crate::host::amd();
        if !self.armed.code || c.eflags & RF != 0 || shaded {
            return None;
        }
        let hits = self.code_hits(self.linear_rip(c.rip));
        if hits == 0 {
            return None;
        }
        Some(self.debug_exception(hits.into()))
    }

    /// #DB for the conditions `bits` of DR6. The breakpoints of the one before make
    /// room, the other bits stay until software clears them.
    pub fn debug_exception(&mut self, bits: u64) -> Exception {
        let c = self.cpu_mut();
        c.dr[6] = (c.dr[6] & !15) | bits;
        Exception::new(DB)
    }
}

/// `Cpu::shadow` after MOV SS and POP SS, which hold back debug exceptions too; after
/// STI it is 1.
pub const AFTER_SS: u8 = 2;

fn hears(c: Condition, kind: Kind) -> bool {
    c == Condition::Access || c == Condition::Store && kind == Kind::Write
}

/// In front of an instruction with a breakpoint.
pub fn at_breakpoint(v: &mut Vcpu, _: &Instruction) -> Done {
    match v.code_breakpoint() {
        Some(e) => Err(e.into()),
        None => Ok(Flow::Next),
    }
}

/// MOV to and from debug registers.
pub fn mov(v: &mut Vcpu, i: &Instruction) -> Done {
    let (to, from) = (i.op0_register(), i.op1_register());
    let n = number(v, if to.is_gpr() { from } else { to })?;
    v.supervisor()?;
    if v.cpu().dr[7] & GD != 0 {
        return Err(v.debug_exception(BD).into());
    }
    if to.is_gpr() {
        let x = v.cpu().dr[n];
        v.set_reg(to, x);
        return Ok(Flow::Next);
    }
    let x = v.reg(from);
    if n >= 6 && x >> 32 != 0 {
        return Err(gp());
    }
    v.cpu_mut().dr[n] = match n {
        6 => (x & 0xe00f) | 0xffff_0ff0,
        7 => (x & 0xffff_23ff) | 0x400,
        _ => x,
    };
    if n != 6 {
        v.arm_breakpoints();
    }
    v.cpu_mut().rip = i.next_ip();
    Ok(Flow::Jump)
}

fn number(v: &Vcpu, r: Register) -> Result<usize, Trap> {
    let n = r as usize - Register::DR0 as usize;
    match n {
        0..=3 | 6 | 7 => Ok(n),
        4 | 5 if v.cpu().cr4 & CR4_DE == 0 => Ok(n + 2),
        _ => Err(ud()),
    }
}
