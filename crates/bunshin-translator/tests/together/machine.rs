//! A small machine whose processors start in long mode, in supervisor or user mode,
//! over an identity mapping.
//!
//! | gpa        | what                                                     |
//! |------------|----------------------------------------------------------|
//! | 0x1000     | PML4, PDPT, PD, page table of the first 2 MiB            |
//! | 0x6000     | GDT, 0x6100 a TSS for each processor                     |
//! | 0x7000     | IDT                                                      |
//! | 0x9000     | for the tests: start-up code                             |
//! | 0x2_0000   | stacks, 4 KiB for each processor                         |
//! | 0x10_0000  | code                                                     |
//! | 0x20_0000  | data                                                     |
//!
//! A processor is done when it writes its result to port 0x80. It starts with its
//! number in rdi.
use bunshin_core::state::{Segment, Table};
use bunshin_core::{CpuState, Engine, Exit, Kicker, Region, Reply};
use bunshin_translator::{Effort, TranslatorEngine};
use iced_x86::code_asm::*;
use iced_x86::IcedError;
use std::sync::{mpsc, Arc};
use std::time::Duration;

pub const CODE: u64 = 0x10_0000;
pub const DATA: u64 = 0x20_0000;
pub const PAGE_TABLE: u64 = 0x4000;
pub const START_UP: u64 = 0x9000;
const STACKS: u64 = 0x2_0000;
const GDT: u64 = 0x6000;
const TSS: u64 = 0x6100;
const IDT: u64 = 0x7000;
const RAM: u64 = 0x40_0000;
const KERNEL_CS: u16 = 0x08;
const DONE: u16 = 0x80;

/// Far longer than anything takes, on a host that has other things to do.
const PATIENCE: Duration = Duration::from_secs(120);

pub type Built = Result<(), IcedError>;

/// How a processor begins.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Begin {
    Supervisor(u64),
    User(u64),
    /// As after power-up: the first one does nothing, the others wait for a SIPI.
    Waiting,
}

pub struct Machine {
    pub engine: Arc<TranslatorEngine>,
    pub region: Arc<Region>,
    pub cpus: u32,
}

fn flat(access: u64) -> u64 {
    0xffff | (access & 0xff) << 40 | 0xf << 48 | (access >> 12) << 52
}

impl Machine {
    pub fn new(cpus: u32) -> Self {
        Self::with(cpus, Effort::Sampled)
    }

    /// For processors that begin so: all user code is hot code, which would not live
    /// long enough to be found.
    pub fn beginning(cpus: u32, begin: Begin) -> Self {
        Self::with(cpus, if matches!(begin, Begin::User(_)) { Effort::Always } else { Effort::Sampled })
    }

    fn with(cpus: u32, effort: Effort) -> Self {
        let engine = TranslatorEngine::with(cpus, effort).unwrap();
        let region = Region::new(RAM).unwrap();
        engine.map(0, &region, 0, RAM, false).unwrap();
        let m = Self { engine, region, cpus };
        m.put(0x1000, 0x2067);
        m.put(0x2000, 0x3067);
        m.put(0x3000, PAGE_TABLE | 0x67);
        for n in 1..512 {
            m.put(0x3000 + 8 * n, n << 21 | 0xe7);
        }
        // The local APIC and the IOAPIC, at their own addresses.
        m.put(0x2018, 0x5067);
        m.put(0x5000 + 8 * (0xfee0_0000 >> 21 & 511), 0xfee0_00e7);
        m.put(0x5000 + 8 * (0xfec0_0000 >> 21 & 511), 0xfec0_00e7);
        for n in 0..512 {
            m.put(PAGE_TABLE + 8 * n, n << 12 | 0x67);
        }
        for (n, access) in [(1, 0xa09b), (2, 0xc093), (3, 0xc0fb), (4, 0xc0f3), (5, 0xa0fb)] {
            m.put(GDT + 8 * n, flat(access));
        }
        for cpu in 0..u64::from(cpus) {
            // RSP0
            m.put(TSS + 0x80 * cpu + 4, m.stack(cpu) - 0x800);
        }
        m
    }

    fn stack(&self, cpu: u64) -> u64 {
        STACKS + 0x1000 * (cpu + 1)
    }

    /// Write a word before or while the machine runs; no translations hear of it.
    pub fn put(&self, gpa: u64, word: u64) {
        assert!(self.region.write(gpa as usize, &word.to_le_bytes()));
    }

    pub fn word(&self, gpa: u64) -> u64 {
        let mut b = [0; 8];
        assert!(self.engine.read(gpa, &mut b));
        u64::from_le_bytes(b)
    }

    /// Let `vector` go to `handler`; user mode may raise it too.
    pub fn gate(&self, vector: u64, handler: u64) {
        let low =
            (handler & 0xffff) | u64::from(KERNEL_CS) << 16 | 0xee << 40 | (handler >> 16 & 0xffff) << 48;
        self.put(IDT + 16 * vector, low);
        self.put(IDT + 16 * vector + 8, handler >> 32);
    }

    /// Assemble 64-bit code to `at`; the address behind it.
    pub fn code(&self, at: u64, build: impl FnOnce(&mut CodeAssembler) -> Built) -> u64 {
        self.code_of(64, at, build)
    }

    /// Assemble code of `bits` bits to `at`; the address behind it.
    pub fn code_of(&self, bits: u32, at: u64, build: impl FnOnce(&mut CodeAssembler) -> Built) -> u64 {
        let mut a = CodeAssembler::new(bits).unwrap();
        build(&mut a).unwrap();
        // A label at the end needs something to stand on.
        a.nop().unwrap();
        let bytes = a.assemble(at).unwrap();
        assert!(self.region.write(at as usize, &bytes));
        at + bytes.len() as u64
    }

    /// The state in which processor `cpu` begins.
    pub fn state(&self, cpu: u32, begin: Begin, mut s: CpuState) -> CpuState {
        let (rip, user) = match begin {
            Begin::Supervisor(rip) => (rip, false),
            Begin::User(rip) => (rip, true),
            Begin::Waiting => return s,
        };
        let segment = |selector: u16, access: u32| Segment { selector, base: 0, limit: u32::MAX, access };
        let (code, data) = if user {
            (segment(0x2b, 0xa0fb), segment(0x23, 0xc0f3))
        } else {
            (segment(KERNEL_CS, 0xa09b), segment(0x10, 0xc093))
        };
        s.segments = [data, code, data, data, data, data];
        s.ldt = Segment { access: 1 << 16, ..Segment::default() };
        s.tr = Segment { selector: 0x30, base: TSS + 0x80 * u64::from(cpu), limit: 0x67, access: 0x8b };
        s.gdt = Table { base: GDT, limit: 0x3f };
        s.idt = Table { base: IDT, limit: 0xfff };
        (s.cr0, s.cr3) = (0x8001_0033, 0x1000);
        s.cr4 = 1 << 5 | 1 << 9 | 1 << 10;
        s.gpr = [0; 16];
        s.gpr[4] = self.stack(cpu.into()) - 0x100;
        s.gpr[7] = cpu.into();
        s.rip = rip;
        // User mode may use ports.
        s.rflags = if user { 0x3002 } else { 2 };
        s.msrs.retain(|m| m.0 != 0xc000_0080);
        s.msrs.push((0xc000_0080, 0x501));
        s.waits_for_sipi = false;
        s
    }

    /// Run processor `n` from `begins[n]` until all are done; their results.
    /// Processors that begin waiting need not be done: they are stopped then.
    pub fn run(&self, begins: &[Begin]) -> Vec<u32> {
        self.run_with(begins, || ())
    }

    /// As `run`, while the host does something of its own.
    pub fn run_with(&self, begins: &[Begin], meanwhile: impl FnOnce()) -> Vec<u32> {
        let (send, receive) = mpsc::channel();
        let mut kickers: Vec<Arc<dyn Kicker>> = Vec::new();
        let mut threads = Vec::new();
        for (cpu, &begin) in (0..self.cpus).zip(begins) {
            let mut vcpu = self.engine.vcpu(cpu).unwrap();
            kickers.push(vcpu.kicker());
            let state = self.state(cpu, begin, vcpu.state());
            let send = send.clone();
            threads.push(std::thread::spawn(move || {
                if begin != Begin::Waiting {
                    vcpu.set_state(&state).unwrap();
                }
                let result = match vcpu.run(Reply::None) {
                    Exit::PioOut { port: DONE, data, .. } => {
                        let mut b = [0; 4];
                        b[..data.len().min(4)].copy_from_slice(&data[..data.len().min(4)]);
                        Ok(u32::from_le_bytes(b))
                    }
                    other => Err(format!("processor {cpu}: {other:?} at {:#x}", vcpu.state().rip)),
                };
                let _ = send.send((cpu as usize, begin, result));
                // The processor may not go before the others are done.
                vcpu
            }));
        }
        meanwhile();
        let mut results = vec![0; begins.len()];
        let mut left = begins.iter().filter(|&&b| b != Begin::Waiting).count();
        let mut failures = Vec::new();
        while left > 0 {
            match receive.recv_timeout(PATIENCE) {
                Ok((cpu, _, Ok(value))) => results[cpu] = value,
                Ok((_, Begin::Waiting, Err(_))) => continue,
                Ok((_, _, Err(why))) => failures.push(why),
                Err(_) => failures.push("not done in time".into()),
            }
            left -= 1;
            if !failures.is_empty() {
                break;
            }
        }
        kickers.iter().for_each(|k| k.kick());
        let vcpus: Vec<_> = threads.into_iter().map(|t| t.join().unwrap()).collect();
        if !failures.is_empty() {
            let rips: Vec<_> = vcpus.into_iter().map(|mut v| format!("{:#x}", v.state().rip)).collect();
            panic!("{}; processors at {}", failures.join(", "), rips.join(", "));
        }
        results
    }
}

/// Tell the host that this processor is done, with the result in eax.
pub fn done(a: &mut CodeAssembler) -> Built {
    a.out(i32::from(DONE), eax)?;
    // Nobody runs it on.
    a.hlt()
}

/// `done` with a constant.
pub fn done_with(a: &mut CodeAssembler, value: u32) -> Built {
    a.mov(eax, value)?;
    done(a)
}

/// Wait until the dword at `gpa` is at least `value` (a register that is not rax).
pub fn wait_for(a: &mut CodeAssembler, gpa: u64, value: AsmRegister32) -> Built {
    let mut again = a.create_label();
    let mut good = a.create_label();
    // For labels of the caller's: an instruction can have one only.
    a.nop()?;
    a.set_label(&mut again)?;
    a.cmp(dword_ptr(gpa), value)?;
    a.jae(good)?;
    a.pause()?;
    a.jmp(again)?;
    a.set_label(&mut good)?;
    a.nop()
}

/// Meet the other processors: the dword at `gpa` counts arrivals; `round` (a
/// register) times `cpus` have arrived before anybody goes on. Changes eax.
pub fn meet(a: &mut CodeAssembler, gpa: u64, round: AsmRegister32, cpus: i32) -> Built {
    let mut again = a.create_label();
    let mut good = a.create_label();
    a.lock().inc(dword_ptr(gpa))?;
    a.imul_3(eax, round, cpus)?;
    a.set_label(&mut again)?;
    a.cmp(dword_ptr(gpa), eax)?;
    a.jae(good)?;
    a.pause()?;
    a.jmp(again)?;
    a.set_label(&mut good)?;
    a.nop()
}
