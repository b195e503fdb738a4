//! The native judge itself: registers in, registers out, faults told apart.
use bunshin_oracle::arena::{CODE, DATA, DATA_LENGTH, STACK};
use bunshin_oracle::{Case, Judge, Native, Stop};
use std::sync::{Mutex, MutexGuard};

static ARENA: Mutex<()> = Mutex::new(());

fn native() -> (MutexGuard<'static, ()>, Native) {
    let guard = ARENA.lock().unwrap_or_else(|e| e.into_inner());
    (guard, Native::new().unwrap())
}

fn case(code: &[&[u8]]) -> Case {
    Case::new(CODE, code.iter().map(|b| b.to_vec()).collect())
}

#[test]
fn every_register_goes_in_and_out() {
    let (_guard, mut native) = native();
    let mut case = case(&[&[0x90]]);
    for i in 0..16 {
        case.state.gpr[i] = 0x0101_0101_0101_0101 * (i as u64 + 1);
    }
    case.state.rflags = 0x202 | 0x8d5 | 1 << 10;
    for i in 0..bunshin_oracle::state::Xsave::shape().0 {
        case.state.xsave.set_vector(i, [i as u8 + 1; 64]);
    }
    for i in 0..8 {
        case.state.xsave.set_st(i, [i as u8 + 0x40; 10]);
        case.state.xsave.set_opmask(i, 0x55 << i);
    }
    case.state.xsave.set_ftw(0xff);
    case.state.xsave.set_fsw(0x1800);
    case.state.xsave.set_mxcsr(0x3f80);
    let outcome = native.run(&case);
    assert_eq!(outcome.stop, Stop::Breakpoint);
    let mut expected = case.state.clone();
    expected.rip += 2;
    let found = outcome.state.differences(&expected, bunshin_oracle::state::USER_FLAGS);
    assert_eq!(found, []);
}

#[test]
fn faults_are_told_apart() {
    let (_guard, mut native) = native();
    let fault = |native: &mut Native, code: &[u8], rax: u64| {
        let mut case = case(&[code]);
        case.state.gpr[0] = rax;
        let outcome = native.run(&case);
        (outcome.stop, outcome.state.rip - CODE)
    };
    let of = |vector, error, address| Stop::Fault { vector, error, address };
    // div eax with eax = 0
    assert_eq!(fault(&mut native, &[0xf7, 0xf0], 0), (of(0, 0, 0), 0));
    // ud2
    assert_eq!(fault(&mut native, &[0x0f, 0x0b], 0), (of(6, 0, 0), 0));
    // mov [rax], eax past the data
    let end = DATA + DATA_LENGTH;
    assert_eq!(fault(&mut native, &[0x89, 0x00], end - 2), (of(14, 6, end), 0));
    // mov eax, [rax] with a non-canonical address
    assert_eq!(fault(&mut native, &[0x8b, 0x00], 1 << 63), (of(13, 0, 0), 0));
    // hlt
    assert_eq!(fault(&mut native, &[0xf4], 0), (of(13, 0, 0), 0));
    // jmp rax into data
    let mut jump = case(&[&[0xff, 0xe0]]);
    jump.state.gpr[0] = DATA;
    let outcome = native.run(&jump);
    assert_eq!((outcome.stop, outcome.state.rip), (of(14, 0x15, DATA), DATA));
    // int1; some hypervisors leave rip on it
    assert_eq!(fault(&mut native, &[0xf1], 0).0, of(1, 0, 0));
    // jmp $
    assert_eq!(fault(&mut native, &[0xeb, 0xfe], 0).0, Stop::Timeout);
    // syscall: exit_group(0) must not reach the kernel
    assert_eq!(fault(&mut native, &[0x0f, 0x05], 231), (Stop::Syscall, 2));
    assert_eq!(fault(&mut native, &[0xcd, 0x80], 252), (Stop::Syscall, 2));
}

#[test]
fn alignment_check_and_single_step_survive() {
    let (_guard, mut native) = native();
    // mov eax, [rax]
    let mut case = case(&[&[0x8b, 0x00]]);
    case.state.gpr[0] = DATA + 1;
    case.state.rflags |= 1 << 18;
    assert_eq!(native.run(&case).stop, Stop::Fault { vector: 17, error: 0, address: 0 });
    case.state.rflags = 0x302;
    let outcome = native.run(&case);
    assert_eq!(outcome.stop, Stop::Fault { vector: 1, error: 0, address: 0 });
    assert_eq!(outcome.state.rip, CODE + 2);
}

#[test]
fn memory_is_put_back_and_changes_are_told() {
    let (_guard, mut native) = native();
    // push rax; inc byte [rip - 8] (its own first byte is at rip - 7)
    let mut case = case(&[&[0x50]]);
    case.state.gpr[0] = 0x1234;
    case.patches.push((DATA + 8, vec![1]));
    let first = native.run(&case);
    let second = native.run(&case);
    assert_eq!(first.memory, second.memory);
    assert_eq!(first.memory.len(), 3, "code, data, stack");
    assert_eq!(first.state.gpr[4], STACK + 0x2000 - 8);
}

#[test]
fn fs_and_gs_base_are_zero() {
    let (_guard, mut native) = native();
    for prefix in [0x64, 0x65] {
        // mov eax, fs:[rbx]
        let mut case = case(&[&[prefix, 0x8b, 0x03]]);
        case.state.gpr[3] = DATA;
        assert_eq!(native.run(&case).stop, Stop::Breakpoint);
    }
}

#[test]
fn a_run_is_quick() {
    let (_guard, mut native) = native();
    let case = case(&[&[0x48, 0x01, 0xd8]]);
    let start = std::time::Instant::now();
    for _ in 0..20_000 {
        native.run(&case);
    }
    println!("{:?} a run", start.elapsed() / 20_000);
}
