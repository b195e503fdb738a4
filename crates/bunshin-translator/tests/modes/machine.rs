//! A processor, two megabytes of RAM and code in them: enough to try one thing.
use bunshin_core::state::{Segment, Table};
use bunshin_core::{CpuState, Engine, Exit, Region, Reply, Vcpu};
use bunshin_translator::TranslatorEngine;
use iced_x86::code_asm::CodeAssembler;
use std::sync::Arc;

pub const RAM: u64 = 0x20_0000;
pub const GDT: u64 = 0x1000;
pub const IDT: u64 = 0x2000;
/// One handler a vector: OUT to `FAULT + vector`, 8 bytes each.
pub const STUBS: u64 = 0x3000;
pub const TSS: u64 = 0x4000;
pub const CODE: u64 = 0x1_0000;
pub const STACK: u64 = 0x8000;
pub const INNER_STACK: u64 = 0x9000;
pub const DATA: u64 = 0x2_0000;

/// Ports that end a run: done, and one for each exception.
pub const DONE: u16 = 0x90;
pub const FAULT: u16 = 0x200;

pub const KERNEL_CODE: u16 = 0x08;
pub const KERNEL_DATA: u16 = 0x10;
pub const USER_CODE: u16 = 0x1b;
pub const USER_DATA: u16 = 0x23;
pub const TR: u16 = 0x28;
/// First selector that is free for a test.
pub const FREE: u16 = 0x40;

/// How a run ended.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
pub enum End {
    Done,
    /// The exception, its error code, and the address that it was pushed with.
    Fault {
        vector: u8,
        error: u32,
        ip: u32,
    },
    Shutdown,
}

pub struct Machine {
    pub engine: Arc<dyn Engine>,
    pub vcpu: Box<dyn Vcpu>,
    pub state: CpuState,
}

/// A descriptor of 32-bit form. `access` as in `Segment::access`.
pub fn descriptor(base: u32, limit: u32, access: u32) -> u64 {
    let (limit, access) =
        if limit > 0xf_ffff { (limit >> 12, access | 0x8000) } else { (limit, access & !0x8000) };
    u64::from(limit & 0xffff)
        | u64::from(base & 0xff_ffff) << 16
        | u64::from(access & 0xff) << 40
        | u64::from(limit >> 16) << 48
        | u64::from(access >> 12 & 15) << 52
        | u64::from(base >> 24) << 56
}

/// A gate of 32-bit form; `access` is type, DPL and P.
pub fn gate(selector: u16, offset: u32, access: u32, parameters: u32) -> u64 {
    u64::from(offset & 0xffff)
        | u64::from(selector) << 16
        | u64::from(parameters) << 32
        | u64::from(access & 0xff) << 40
        | u64::from(offset >> 16) << 48
}

pub fn segment(selector: u16, base: u64, limit: u32, access: u32) -> Segment {
    Segment { selector, base, limit, access }
}

pub fn flat(selector: u16, access: u32) -> Segment {
    segment(selector, 0, u32::MAX, access)
}

/// Code of `bits`, assembled for its place at CODE.
pub fn assemble(
    bits: u32,
    ip: u64,
    write: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>,
) -> Vec<u8> {
    let mut a = CodeAssembler::new(bits).unwrap();
    write(&mut a).unwrap();
    a.assemble(ip).unwrap()
}

impl Machine {
    pub fn new() -> Self {
        let engine = TranslatorEngine::new(1).unwrap();
        let region = Region::new(RAM).unwrap();
        engine.map(0, &region, 0, RAM, false).unwrap();
        let mut vcpu = engine.vcpu(0).unwrap();
        let state = vcpu.state();
        Self { engine, vcpu, state }
    }

    /// Real-address mode, code at CODE in a segment of its own, data at DATA.
    pub fn real() -> Self {
        let mut m = Self::new();
        let s = |base: u64| segment((base >> 4) as u16, base, 0xffff, 0x93);
        m.state.segments = [s(DATA), s(CODE), s(0), s(DATA), s(DATA), s(DATA)];
        m.state.rip = 0;
        m.state.gpr[4] = STACK;
        m.state.idt = Table { base: 0, limit: 0x3ff };
        for vector in 0..32u16 {
            let stub = STUBS + 8 * u64::from(vector);
            m.put(4 * u64::from(vector) + 2, &((stub >> 4) as u16).to_le_bytes());
            m.put(4 * u64::from(vector), &((stub & 15) as u16).to_le_bytes());
            m.put(stub, &stub_code(vector, 16));
        }
        m
    }

    /// 32-bit protected mode at level 0, flat segments, no paging, a TSS for level 0.
    pub fn protected() -> Self {
        let mut m = Self::new();
        m.state.cr0 = 0x11;
        m.state.segments = [flat(KERNEL_DATA, 0xc093); 6];
        m.state.segments[1] = flat(KERNEL_CODE, 0xc09b);
        m.state.rip = CODE;
        m.state.gpr[4] = STACK;
        m.set(KERNEL_CODE, descriptor(0, u32::MAX, 0xc09b));
        m.set(KERNEL_DATA, descriptor(0, u32::MAX, 0xc093));
        m.set(USER_CODE, descriptor(0, u32::MAX, 0xc0fb));
        m.set(USER_DATA, descriptor(0, u32::MAX, 0xc0f3));
        m.set(TR, descriptor(TSS as u32, 0x67, 0x8b));
        m.state.tr = segment(TR, TSS, 0x67, 0x8b);
        m.put(TSS + 4, &(INNER_STACK as u32).to_le_bytes());
        m.put(TSS + 8, &KERNEL_DATA.to_le_bytes());
        m.put(TSS + 0x66, &0x68u16.to_le_bytes());
        m.state.gdt = Table { base: GDT, limit: 0xfff };
        m.state.idt = Table { base: IDT, limit: 0xfff };
        for vector in 0..48u16 {
            let stub = STUBS + 8 * u64::from(vector);
            m.put(IDT + 8 * u64::from(vector), &gate(KERNEL_CODE, stub as u32, 0x8e, 0).to_le_bytes());
            m.put(stub, &stub_code(vector, 32));
        }
        m
    }

    /// As `protected`, at level 3, all ports allowed by the bitmap.
    pub fn user() -> Self {
        let mut m = Self::protected();
        m.state.tr.limit = 0x2068;
        m.set(TR, descriptor(TSS as u32, 0x2068, 0x8b));
        m.put(TSS + 0x2068, &[0xff]);
        m.state.segments = [flat(USER_DATA, 0xc0f3); 6];
        m.state.segments[1] = flat(USER_CODE, 0xc0fb);
        m
    }

    pub fn put(&self, gpa: u64, bytes: &[u8]) {
        assert!(self.engine.write(gpa, bytes));
    }

    pub fn word(&self, gpa: u64) -> u32 {
        let mut b = [0; 4];
        self.engine.read(gpa, &mut b);
        u32::from_le_bytes(b)
    }

    /// Set the entry of `selector` in the GDT.
    pub fn set(&self, selector: u16, entry: u64) {
        self.put(GDT + u64::from(selector & !7), &entry.to_le_bytes());
    }

    /// Bits of the code segment.
    fn bits(&self) -> u32 {
        match self.state.segments[1].access >> 13 & 3 {
            1 => 64,
            2 => 32,
            _ => 16,
        }
    }

    /// Put code where the state points, and OUT to DONE behind it.
    pub fn code(&self, write: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>) {
        let mut bytes = assemble(self.bits(), self.state.rip, write);
        bytes.extend_from_slice(&[0xe6, DONE as u8, 0xf4]);
        self.put(self.state.segments[1].base + self.state.rip, &bytes);
    }

    /// Run from `state` until the code or a fault ends it; the state is the last one.
    pub fn run(&mut self) -> End {
        self.vcpu.set_state(&self.state).unwrap();
        let end = match self.vcpu.run(Reply::None) {
            Exit::PioOut { port: DONE, .. } => End::Done,
            Exit::PioOut { port, .. } if (FAULT..FAULT + 0x100).contains(&port) => {
                self.fault((port - FAULT) as u8)
            }
            Exit::Shutdown { .. } => End::Shutdown,
            other => panic!("unexpected exit {other:?}"),
        };
        self.vcpu.complete(Reply::None);
        self.state = self.vcpu.state();
        end
    }

    fn fault(&mut self, vector: u8) -> End {
        self.vcpu.complete(Reply::None);
        let s = self.vcpu.state();
        let sp = s.segments[2].base + s.gpr[4];
        if s.cr0 & 1 == 0 {
            return End::Fault { vector, error: 0, ip: self.word(sp) & 0xffff };
        }
        let coded = matches!(vector, 8 | 10..=14 | 17);
        let at = if coded { sp + 4 } else { sp };
        End::Fault { vector, error: if coded { self.word(sp) } else { 0 }, ip: self.word(at) }
    }
}

/// `mov dx, FAULT + vector; out dx, al; hlt`
fn stub_code(vector: u16, bits: u32) -> Vec<u8> {
    let port = FAULT + vector;
    let mut c = if bits == 16 { vec![] } else { vec![0x66] };
    c.extend_from_slice(&[0xba, port as u8, (port >> 8) as u8, 0xee, 0xf4]);
    c
}
