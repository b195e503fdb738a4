//! What the owner stops a processor for, unseen by the guest: `bunshin_core::debug`.
use crate::machine::*;
use bunshin_core::debug::{Access, Debugging, Stop, Watchpoint};
use bunshin_core::{Exit, Reply};
use iced_x86::code_asm::*;

const IF: u64 = 0x200;

fn breakpoints(at: &[u64]) -> Debugging {
    Debugging { breakpoints: at.to_vec(), ..Debugging::default() }
}

fn watch(gva: u64, length: u64, access: Access) -> Debugging {
    Debugging { watchpoints: vec![Watchpoint { gva, length, access }], ..Debugging::default() }
}

const STEP: Debugging = Debugging {
    breakpoints: Vec::new(),
    watchpoints: Vec::new(),
    step: true,
    interrupts: false,
    count: None,
    early: false,
};

impl Machine {
    fn debug(&mut self, d: &Debugging) {
        self.vcpu.set_debug(d).unwrap();
    }

    fn go(&mut self) -> Exit {
        let e = self.vcpu.run(Reply::None);
        self.vcpu.complete(Reply::None);
        self.state = self.vcpu.state();
        e
    }

    fn load(&mut self) {
        self.vcpu.set_state(&self.state).unwrap();
    }
}

fn at(gva: u64) -> Exit {
    Exit::Debug { stop: Stop::Breakpoint(gva) }
}

const STEPPED: Exit = Exit::Debug { stop: Stop::Step };

fn done(e: &Exit) -> bool {
    matches!(e, Exit::PioOut { port: DONE, .. })
}

#[test]
fn breakpoints_stop_before_the_instruction_every_time() {
    let mut m = Machine::protected();
    m.code(|a| {
        a.inc(eax)?;
        a.inc(eax)?;
        a.inc(eax)
    });
    m.load();
    m.debug(&breakpoints(&[CODE + 1]));
    for _ in 0..3 {
        assert_eq!(m.go(), at(CODE + 1));
        assert_eq!((m.state.gpr[0], m.state.rip), (1, CODE + 1));
    }
    // Over it, to the next one, and without any.
    m.debug(&STEP);
    assert_eq!(m.go(), STEPPED);
    m.debug(&breakpoints(&[CODE + 1, CODE + 2]));
    assert_eq!(m.go(), at(CODE + 2));
    m.debug(&Debugging::default());
    assert!(done(&m.go()));
    assert_eq!(m.state.gpr[0], 3);
    assert_eq!(m.state.dr[5] & 0xff, 0);
}

#[test]
fn code_that_runs_already_gets_and_loses_breakpoints() {
    let mut m = Machine::protected();
    m.code(|a| {
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        a.inc(eax)?;
        a.cmp(eax, 1_000_000)?;
        a.jb(top)
    });
    m.load();
    assert!(done(&m.go()));
    m.state.rip = CODE;
    m.state.gpr[0] = 0;
    m.load();
    m.debug(&breakpoints(&[CODE + 1]));
    for n in 1..100 {
        assert_eq!(m.go(), at(CODE + 1));
        assert_eq!(m.state.gpr[0], n);
        m.debug(&STEP);
        assert_eq!(m.go(), STEPPED);
        m.debug(&breakpoints(&[CODE + 1]));
    }
    m.debug(&Debugging::default());
    assert!(done(&m.go()));
    assert_eq!(m.state.gpr[0], 1_000_000);
}

#[test]
fn flags_are_exact_at_breakpoints() {
    let mut m = Machine::protected();
    m.state.gpr[0] = 0x8000_0000;
    m.code(|a| {
        a.db(&[0xc1, 0xe0, 1])?; // shl eax, 1: CF and ZF, which nobody reads
        a.mov(eax, dword_ptr(DATA as u32))?;
        a.nop()?;
        a.xor(ecx, ecx)?;
        a.inc(ecx)
    });
    m.load();
    m.debug(&breakpoints(&[CODE + 9]));
    assert_eq!(m.go(), at(CODE + 9));
    assert_eq!(m.state.rflags & 0x41, 0x41);
}

#[test]
fn breakpoints_are_linear_addresses() {
    let mut m = Machine::real();
    m.code(|a| {
        a.inc(ax)?;
        a.inc(ax)
    });
    m.load();
    m.debug(&breakpoints(&[CODE + 1]));
    assert_eq!(m.go(), at(CODE + 1));
    assert_eq!((m.state.gpr[0], m.state.rip), (1, 1));
}

#[test]
fn watchpoints_stop_behind_the_access() {
    for (access, read, write) in
        [(Access::Read, true, false), (Access::Write, false, true), (Access::Any, true, true)]
    {
        for (store, hit) in [(false, read), (true, write)] {
            for length in [1u64, 2, 8, 5000] {
                let mut m = Machine::protected();
                let last = (DATA + length - 1) as u32;
                m.code(|a| {
                    // The tables would hold the page by now.
                    a.mov(byte_ptr(DATA as u32 - 1), al)?;
                    a.mov(bl, byte_ptr(DATA as u32 - 1))?;
                    a.mov(byte_ptr(last + 1), al)?;
                    a.mov(bl, byte_ptr(last + 1))?;
                    if store {
                        a.mov(byte_ptr(last), cl)
                    } else {
                        a.mov(cl, byte_ptr(last))
                    }
                });
                m.load();
                let d = watch(DATA, length, access);
                m.debug(&d);
                let e = m.go();
                if hit {
                    assert_eq!(e, Exit::Debug { stop: Stop::Watchpoint(d.watchpoints[0]) });
                    assert_eq!(m.state.rip, CODE + 28);
                } else {
                    assert!(done(&e), "{e:?}");
                }
                m.debug(&Debugging::default());
                assert!(hit != done(&e));
            }
        }
    }
}

#[test]
fn watchpoints_hear_of_pushes_strings_and_wide_accesses() {
    let stop = |d: &Debugging| Exit::Debug { stop: Stop::Watchpoint(d.watchpoints[0]) };
    let mut m = Machine::protected();
    m.code(|a| a.push(eax));
    m.load();
    let d = watch(STACK - 4, 4, Access::Write);
    m.debug(&d);
    assert_eq!(m.go(), stop(&d));
    assert_eq!(m.state.rip, CODE + 1);

    let mut m = Machine::protected();
    m.state.gpr[7] = DATA;
    m.state.gpr[1] = 8;
    m.code(|a| a.rep().stosd());
    m.load();
    let d = watch(DATA + 9, 1, Access::Write);
    m.debug(&d);
    assert_eq!(m.go(), stop(&d));
    // After the third element, with the rest still to do.
    assert_eq!((m.state.gpr[1], m.state.gpr[7], m.state.rip), (5, DATA + 12, CODE));
    assert!(done(&m.go()));
    assert_eq!(m.word(DATA + 28), m.state.gpr[0] as u32);
}

#[test]
fn an_access_that_faults_is_none() {
    let mut m = Machine::protected();
    m.code(|a| a.mov(eax, dword_ptr(DATA as u32)));
    // DS ends below it.
    m.state.segments[3].limit = 0xfff;
    m.load();
    m.debug(&watch(DATA, 4, Access::Any));
    assert!(matches!(m.go(), Exit::PioOut { port, .. } if port == FAULT + 13));
}

#[test]
fn a_step_is_one_instruction() {
    let mut m = Machine::protected();
    m.put(IDT + 8 * 0x40, &gate(KERNEL_CODE, (CODE + 0x100) as u32, 0x8e, 0).to_le_bytes());
    m.code(|a| {
        a.inc(eax)?;
        a.mov(ecx, 3u32)?;
        a.mov(edi, DATA as u32)?;
        a.rep().stosb()?;
        a.int(0x40)
    });
    m.load();
    m.debug(&STEP);
    let mut seen = Vec::new();
    for _ in 0..7 {
        assert_eq!(m.go(), STEPPED);
        seen.push(m.state.rip - CODE);
    }
    assert_eq!(seen[..3], [1, 6, 11]);
    let repeated = seen.iter().filter(|&&r| r == 11).count();
    assert!((1..=3).contains(&repeated), "{seen:?}");
    assert!(seen.contains(&13));
    assert!(seen.contains(&0x100));
    assert_eq!(m.state.rflags & 0x100, 0);
}

#[test]
fn a_fault_ends_a_step_at_its_handler() {
    let mut m = Machine::protected();
    m.code(|a| a.ud2());
    m.load();
    m.debug(&STEP);
    assert_eq!(m.go(), STEPPED);
    assert_eq!(m.state.rip, STUBS + 8 * 6);
}

#[test]
fn steps_and_breakpoints_over_device_accesses() {
    let mut m = Machine::protected();
    m.code(|a| {
        a.in_(al, 0x21)?;
        a.out(0x21, al)?;
        a.mov(ebx, dword_ptr(0xd000_0000u32))?;
        a.mov(dword_ptr(0xd000_0000u32), ebx)?;
        a.nop()
    });
    m.load();
    m.debug(&breakpoints(&[CODE]));
    assert_eq!(m.go(), at(CODE));
    m.debug(&STEP);
    // The board has no device there: the engine's own PIC answers port 0x21.
    for end in [2, 4] {
        assert_eq!(m.go(), STEPPED);
        assert_eq!(m.state.rip, CODE + end);
    }
    assert_eq!(m.vcpu.run(Reply::None), Exit::MmioRead { gpa: 0xd000_0000, size: 4 });
    assert_eq!(m.vcpu.run(Reply::Value(0x1234)), STEPPED);
    let s = m.vcpu.state();
    assert_eq!((s.gpr[3], s.rip), (0x1234, CODE + 10));
    assert_eq!(m.vcpu.run(Reply::None), Exit::MmioWrite { gpa: 0xd000_0000, size: 4, value: 0x1234 });
    assert_eq!(m.vcpu.run(Reply::None), STEPPED);
    assert_eq!(m.vcpu.state().rip, CODE + 16);
}

/// The PIT as a source of interrupts: IRQ 0 through the PIC, vector 0x28.
fn with_timer(m: &mut Machine) {
    m.put(IDT + 8 * 0x28, &gate(KERNEL_CODE, (CODE + 0x200) as u32, 0x8e, 0).to_le_bytes());
    m.put(CODE + 0x200, &[0xcf]); // iretd
}

#[test]
fn interrupts_wait_while_stepping_unless_they_may_come() {
    for interrupts in [false, true] {
        let mut m = Machine::protected();
        with_timer(&mut m);
        let out = |a: &mut CodeAssembler, port: u32, value: u32| {
            a.mov(al, value)?;
            a.out(port, al)
        };
        m.code(|a| {
            for (port, value) in [
                (0x20, 0x11),
                (0x21, 0x28),
                (0x21, 4),
                (0x21, 1),
                (0x21, 0xfe),
                (0x43, 0x34),
                (0x40, 2),
                (0x40, 0),
            ] {
                out(a, port, value)?;
            }
            let mut top = a.create_label();
            a.set_label(&mut top)?;
            a.jmp(top)
        });
        let spin = CODE + 32;
        m.load();
        m.debug(&breakpoints(&[spin]));
        assert_eq!(m.go(), at(spin));
        std::thread::sleep(std::time::Duration::from_millis(2));
        m.state.rflags |= IF;
        m.load();
        m.debug(&Debugging { interrupts, ..STEP });
        assert_eq!(m.go(), STEPPED);
        assert_eq!(m.state.rip, if interrupts { CODE + 0x200 } else { spin });
        // It was not lost.
        m.debug(&breakpoints(&[CODE + 0x200]));
        assert_eq!(m.go(), at(CODE + 0x200));
    }
}

#[test]
fn a_step_from_hlt_waits_for_an_interrupt_and_leaves_it_pending() {
    let mut m = Machine::protected();
    with_timer(&mut m);
    m.code(|a| {
        for (port, value) in [
            (0x20, 0x11),
            (0x21, 0x28),
            (0x21, 4),
            (0x21, 1),
            (0x21, 0xfe),
            (0x43, 0x34),
            (0x40, 0),
            (0x40, 1),
        ] {
            a.mov(al, value)?;
            a.out(port, al)?;
        }
        a.sti()?;
        a.hlt()?;
        a.nop()
    });
    let halt = CODE + 33;
    m.load();
    m.debug(&breakpoints(&[halt]));
    // An interrupt that came before HLT would return to it.
    assert_eq!(m.go(), at(halt));
    m.debug(&STEP);
    assert_eq!(m.go(), STEPPED);
    assert_eq!((m.state.rip, m.state.halted), (halt + 1, true));
    assert_eq!(m.go(), STEPPED);
    assert_eq!((m.state.rip, m.state.halted), (halt + 2, false));
    m.debug(&breakpoints(&[CODE + 0x200]));
    assert_eq!(m.go(), at(CODE + 0x200));
}

#[test]
fn the_guests_own_breakpoints_go_on_working() {
    let mut m = Machine::protected();
    m.code(|a| {
        a.inc(eax)?;
        a.inc(eax)
    });
    m.state.dr[0] = CODE + 1;
    m.state.dr[5] = 0x402;
    m.load();
    m.debug(&breakpoints(&[CODE + 1]));
    assert_eq!(m.go(), at(CODE + 1));
    m.debug(&STEP);
    // The guest's breakpoint is a fault before the instruction: that is the step.
    assert_eq!(m.go(), STEPPED);
    assert_eq!((m.state.rip, m.state.dr[4] & 1), (STUBS + 8, 1));
}

#[test]
fn nonsense_is_refused() {
    let mut m = Machine::protected();
    for d in [watch(5, 0, Access::Read), watch(u64::MAX, 2, Access::Any)] {
        assert_eq!(m.vcpu.set_debug(&d).unwrap_err().slug, "debug");
    }
    let many = breakpoints(&(0..5000).collect::<Vec<_>>());
    assert_eq!(m.vcpu.set_debug(&many).unwrap_err().slug, "debug");
    assert!(m.vcpu.set_debug(&watch(u64::MAX, 1, Access::Any)).is_ok());
}

const PG: u64 = 1 << 31;
const ROOT: u64 = 0x6000;
const DIRECTORY: u64 = 0x7000;
const TABLE: u64 = 0xb000;

/// Tables of one mode of paging: entry size, where entries stand and what is in them.
fn translates(m: &mut Machine, wide: bool, entries: &[(u64, u64)], expected: &[(u64, Option<u64>)]) {
    for &(gpa, entry) in entries {
        m.put(gpa, &entry.to_le_bytes()[..if wide { 8 } else { 4 }]);
    }
    m.load();
    for &(gva, gpa) in expected {
        assert_eq!(m.vcpu.translate(gva), gpa, "{gva:#x}");
    }
    // Nothing was marked as accessed.
    for &(gpa, entry) in entries {
        assert_eq!(m.word(gpa), entry as u32);
    }
}

#[test]
fn addresses_are_translated_without_a_trace() {
    let mut m = Machine::protected();
    m.load();
    assert_eq!(m.vcpu.translate(0x1234_5678), Some(0x1234_5678));

    m.state.cr3 = ROOT;
    m.state.cr0 |= PG;
    m.state.cr4 |= 0x10;
    let entries = [(ROOT, 0x83), (ROOT + 4, TABLE | 1), (TABLE + 4, DATA | 1), (ROOT + 8, 0xc0_2083)];
    let expected = [
        (0x3f_ffff, Some(0x3f_ffff)),
        (0x40_1008, Some(DATA + 8)),
        (0x40_0000, None),
        (0x80_1234, Some(0x1_00c0_1234)),
        (0xc0_0000, None),
        (1 << 32, None),
    ];
    translates(&mut m, false, &entries, &expected);

    let mut m = Machine::protected();
    m.state.cr3 = ROOT;
    m.state.cr0 |= PG;
    m.state.cr4 |= 0x20;
    let entries = [(ROOT, DIRECTORY | 1), (DIRECTORY, 0x83), (DIRECTORY + 8, TABLE | 1), (TABLE, DATA | 1)];
    let expected =
        [(0x1f_fff0, Some(0x1f_fff0)), (0x20_0010, Some(DATA + 16)), (0x20_1000, None), (0x4000_0000, None)];
    translates(&mut m, true, &entries, &expected);

    let mut m = Machine::protected();
    m.state.cr3 = ROOT;
    m.state.cr0 |= PG;
    m.state.cr4 |= 0x20;
    m.state.msrs = vec![(0xc000_0080, 0x100)];
    let high = 0xffff_8000_0000_0000;
    let entries = [
        (ROOT + 8 * 256, DIRECTORY | 1),
        (DIRECTORY, TABLE | 1),
        (DIRECTORY + 8, 0x4000_0081),
        (TABLE, 0x20_0081),
        (TABLE + 8, 0xc000 | 1),
        (0xc000, DATA | 1 | 1 << 63),
    ];
    let expected = [
        (high + 0x12_3456, Some(0x32_3456)),
        (high + 0x20_0fff, Some(DATA + 0xfff)),
        (high + 0x20_1000, None),
        (high + 0x4000_0008, Some(0x4000_0008)),
        (high + 0x8000_0000, None),
        (0, None),
        (1 << 47, None),
    ];
    translates(&mut m, true, &entries, &expected);
}
