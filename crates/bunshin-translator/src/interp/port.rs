//! IN, OUT and their string forms.
use super::{Done, Flow};
use crate::mmu::{Exception, Kind, Trap, Who};
use crate::vcpu::Vcpu;
use bunshin_core::chips::Chips;
use bunshin_core::Exit;
use iced_x86::{Instruction, Mnemonic as M, OpKind, Register};

/// Elements that one exit carries at most.
const BULK: u64 = 1024;

impl Vcpu {
    /// #GP(0) unless IOPL or the TSS's bitmap allows the port.
    fn allow_port(&mut self, port: u16, size: usize) -> Result<(), Trap> {
        let c = self.cpu();
        if c.cpl <= c.iopl() && c.eflags & crate::cpu::VM == 0 || c.cr0 & 1 == 0 {
            return Ok(());
        }
        let (base, limit) = (c.tr.base, u64::from(c.tr.limit));
        if c.tr.unusable() || c.tr.access & 15 < 9 || limit < 0x67 {
            return Err(Exception::gp().into());
        }
        let map = self.load(base + 0x66, 2, Who::System)?;
        let at = map + u64::from(port >> 3);
        if at + 1 > limit {
            return Err(Exception::gp().into());
        }
        let bits = self.load(base + at, 2, Who::System)? >> (port & 7);
        if bits & ((1 << size) - 1) != 0 {
            return Err(Exception::gp().into());
        }
        Ok(())
    }

    fn port_read(&mut self, port: u16, size: usize, count: u32) -> Result<u64, Trap> {
        self.counters.port_accesses += 1;
        if Chips::owns_port(port) && !self.foreign {
            return Ok(u64::from(self.chips.pio_read(port, size as u8)));
        }
        if self.answer_next < self.answers.len() {
            self.answer_next += 1;
            return Ok(self.answers[self.answer_next - 1]);
        }
        Err(Trap::Exit(Exit::PioIn { port, size: size as u8, count }))
    }

    fn port_write(&mut self, port: u16, size: usize, data: Vec<u8>) {
        self.counters.port_accesses += 1;
        if Chips::owns_port(port) && !self.foreign {
            for e in data.chunks(size) {
                let mut b = [0; 4];
                b[..size].copy_from_slice(e);
                self.chips.pio_write(port, size as u8, u32::from_le_bytes(b));
            }
        } else {
            self.outbox.push_back(Exit::PioOut { port, size: size as u8, data });
        }
    }
}

pub fn port(v: &mut Vcpu, i: &Instruction) -> Done {
    let size = match i.mnemonic() {
        M::In => i.op0_register().size(),
        M::Out => i.op1_register().size(),
        M::Insb | M::Outsb => 1,
        M::Insw | M::Outsw => 2,
        _ => 4,
    };
    let port = match i.mnemonic() {
        M::In if i.op1_kind() != OpKind::Register => i.immediate8().into(),
        M::Out if i.op0_kind() != OpKind::Register => i.immediate8().into(),
        _ => v.reg(Register::DX) as u16,
    };
    v.allow_port(port, size)?;
    v.note_port(port, size);
    match i.mnemonic() {
        M::In => {
            let x = v.port_read(port, size, 1)?;
            v.set_reg(i.op0_register(), x);
        }
        M::Out => {
            let x = v.reg(i.op1_register());
            v.port_write(port, size, x.to_le_bytes()[..size].to_vec());
        }
        _ => return string(v, i, port, size),
    }
    Ok(Flow::Next)
}

fn string(v: &mut Vcpu, i: &Instruction, port: u16, size: usize) -> Done {
    let input = matches!(i.mnemonic(), M::Insb | M::Insw | M::Insd);
    let reg = if input { i.memory_base_or_di(true) } else { i.memory_base_or_di(false) };
    let mask = match reg.size() {
        2 => 0xffff,
        4 => 0xffff_ffff,
        _ => u64::MAX,
    };
    let counter = match reg.size() {
        2 => Register::CX,
        4 => Register::ECX,
        _ => Register::RCX,
    };
    let rep = i.has_rep_prefix() || i.has_repne_prefix();
    let left = if rep { v.reg(counter) } else { 1 };
    if left == 0 {
        return Ok(Flow::Next);
    }
    let down = v.cpu().df != 0;
    let step = if down { (size as u64).wrapping_neg() } else { size as u64 };
    let seg = if input { 0 } else { Vcpu::segment_index(i.memory_segment()) };
    let count = left.min(BULK);
    let who = v.data_access();
    let start = v.reg(reg);
    let offset = |n: u64| start.wrapping_add(step.wrapping_mul(n)) & mask;
    let mut done = 0;
    let mut failed = None;
    if input {
        // Check the first element's page before anything is taken from the device.
        v.check_segment(seg, start & mask, size, Kind::Write)?;
        let first = v.linear(seg, start & mask);
        v.access(first, 1, Kind::Write, who)?;
        let chip = Chips::owns_port(port);
        // Never take more than can be stored: stop at the end of the page.
        let room = if down { 1 } else { ((4096 - (first & 0xfff)) / size as u64).max(1) };
        let count = if chip { 1 } else { count.min(room) };
        while done < count {
            let x = v.port_read(port, size, (count - done) as u32)?;
            let va = v.segment_at(seg, offset(done), size, Kind::Write);
            if let Err(e) = va.and_then(|va| v.store(va, size, x, who)) {
                failed = Some(e);
                break;
            }
            done += 1;
        }
    } else {
        let mut data = Vec::with_capacity(size * count as usize);
        while done < count {
            let va = v.segment_at(seg, offset(done), size, Kind::Read);
            match va.and_then(|va| v.load(va, size, who)) {
                Ok(x) => data.extend_from_slice(&x.to_le_bytes()[..size]),
                Err(e) => {
                    failed = Some(e);
                    break;
                }
            }
            done += 1;
        }
        if done > 0 {
            v.port_write(port, size, data);
        }
    }
    if done == 0 {
        return Err(failed.unwrap());
    }
    v.set_reg(reg, start.wrapping_add(step.wrapping_mul(done)) & mask);
    if rep {
        let c = v.reg(counter).wrapping_sub(done);
        v.set_reg(counter, c);
        if c != 0 {
            v.cpu_mut().rip = i.ip();
            return Ok(Flow::Jump);
        }
    }
    Ok(Flow::Next)
}

trait Index {
    fn memory_base_or_di(&self, di: bool) -> Register;
}

impl Index for Instruction {
    /// The index register that the address size selects.
    fn memory_base_or_di(&self, di: bool) -> Register {
        for n in 0..self.op_count() {
            match (self.op_kind(n), di) {
                (OpKind::MemoryESDI, true) => return Register::DI,
                (OpKind::MemoryESEDI, true) => return Register::EDI,
                (OpKind::MemoryESRDI, true) => return Register::RDI,
                (OpKind::MemorySegSI, false) => return Register::SI,
                (OpKind::MemorySegESI, false) => return Register::ESI,
                (OpKind::MemorySegRSI, false) => return Register::RSI,
                _ => {}
            }
        }
        Register::RDI
    }
}
