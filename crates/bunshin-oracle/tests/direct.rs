//! User code that runs directly on the host processor: the way in and out against plain
//! native code, and programs that attack the sandbox that they run in.
#![cfg(feature = "translator")]
use bunshin_oracle::arena::{CODE, DATA};
use bunshin_oracle::guest::Guest;
use bunshin_oracle::{translated, Case, Choice, Comparison, Generator, Judge, Native, Options, Stop};
use bunshin_translator::sandbox_addresses;
use std::sync::{Mutex, PoisonError};

/// The arena has fixed addresses: one test at a time.
static ARENA: Mutex<()> = Mutex::new(());

/// The host's kernel has what sandboxes need (Linux 6.6).
fn possible() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(['.', '-']).map_while(|n| n.trim().parse::<u32>().ok());
    (numbers.next().unwrap(), numbers.next().unwrap()) >= (6, 6)
}

fn count(guest: &Guest, name: &str) -> u64 {
    guest.stats().into_iter().find(|(n, _)| *n == name).unwrap_or_else(|| panic!("no figure {name}")).1
}

#[test]
fn random_instructions_agree() {
    if !possible() {
        return;
    }
    let _arena = ARENA.lock().unwrap_or_else(PoisonError::into_inner);
    let mut guest = translated::direct().unwrap();
    let mut native = Native::new().unwrap();
    let kinds = [
        ("user mode", 4000, Choice::default()),
        ("environment", 500, Choice { environment: true, ..Choice::default() }),
        ("privileged", 500, Choice { privileged: true, ..Choice::default() }),
        ("rewriting", 1000, Choice { rewriting: true, ..Choice::default() }),
    ];
    let mut cases = 0;
    for (name, number, choice) in kinds {
        let mut generator = Generator::new(&choice).unwrap();
        let mut comparison =
            Comparison { left: &mut native, right: &mut guest, all_flags: None, options: Options::default() };
        for index in 0..number {
            let case = generator.case(1, index);
            let (_, found) = comparison.run(&case);
            if !found.is_empty() {
                panic!("{name}, seed 1, case {index}\n{}", comparison.report(&case, &found));
            }
        }
        cases += number;
    }
    let traps = count(&guest, "direct_traps");
    assert!(traps > cases, "{traps} traps in {cases} cases: they did not run directly");
    assert_eq!(count(&guest, "direct_losses"), 0);
}

/// `mov rax, target; jmp rax`, the other registers as given.
fn jump(target: u64, registers: &[(usize, u64)]) -> Case {
    let mut code = vec![0x48, 0xb8];
    code.extend(target.to_le_bytes());
    let mut case = Case::new(CODE, vec![code, vec![0xff, 0xe0]]);
    for &(n, value) in registers {
        case.state.gpr[n] = value;
    }
    case
}

/// The same, with eax = `number` at the target.
fn call(target: u64, number: u32, registers: &[(usize, u64)]) -> Case {
    let mut case = jump(target, registers);
    // mov r15, target; mov eax, number; jmp r15
    let mut load = vec![0x49, 0xbf];
    load.extend(target.to_le_bytes());
    let mut number_code = vec![0xb8];
    number_code.extend(number.to_le_bytes());
    case.code = vec![load, number_code, vec![0x41, 0xff, 0xe7]];
    case
}

#[test]
fn attacks_on_the_sandbox_end_in_faults() {
    if !possible() {
        return;
    }
    let _arena = ARENA.lock().unwrap_or_else(PoisonError::into_inner);
    const MMAP: u32 = 9;
    const SIGRETURN: u32 = 15;
    const EXIT: u32 = 231;
    let mut guest = translated::direct().unwrap();
    let mut native = Native::new().unwrap();
    // add rax, rbx; vaddps ymm0, ymm0, ymm1
    let sane = Case::new(CODE, vec![vec![0x48, 0x01, 0xd8], vec![0xc5, 0xfc, 0x58, 0xc1]]);
    let a = sandbox_addresses();
    // A system call lies in the two bytes before each of these.
    let [hand_over, command, sigreturn] = [a.hand_over, a.command, a.sigreturn].map(|end| end - 2);
    let map = [(7, DATA), (6, 4096), (2, 7), (10, 0x11), (8, 101), (9, 0)];
    let own = Case::new(CODE, vec![vec![0xc6, 0x07, 0xcc]]);
    let mut orders = own.clone();
    orders.state.gpr[7] = a.orders + 16;
    let mut stack = own.clone();
    stack.state.gpr[7] = a.stack + 0x7f00;
    let mut code = own;
    code.state.gpr[7] = a.start;
    let attacks = [
        ("the stub's start", jump(a.start, &[])),
        ("the handler, with nonsense", jump(a.handler, &[(7, 11), (6, 1), (2, DATA)])),
        ("a hand-over, with nonsense", call(hand_over, 0x3fff_ff00, &[(2, a.stack)])),
        ("another number at the hand-over", call(hand_over, EXIT, &[])),
        ("mmap without the secret", call(command, MMAP, &map)),
        ("exit in place of a command", call(command, EXIT, &[])),
        ("a return from no signal", call(sigreturn, SIGRETURN, &[(4, DATA)])),
        ("another number at the return", call(sigreturn, EXIT, &[])),
        ("the call that is never right", jump(a.sigreturn, &[])),
        ("a store to the orders", orders),
        ("a store to the signal stack", stack),
        ("a store to the stub", code),
    ];
    for (name, attack) in &attacks {
        let outcome = guest.run(attack);
        assert!(!matches!(outcome.stop, Stop::Failed(_)), "{name}: {:?}", outcome.stop);
        // The next program has a whole sandbox.
        let (expected, found) = (native.run(&sane), guest.run(&sane));
        assert_eq!(found.stop, expected.stop, "after {name}");
        assert_eq!(found.state.gpr, expected.state.gpr, "after {name}");
        assert_eq!(found.memory, expected.memory, "after {name}");
    }
    let losses = count(&guest, "direct_losses");
    assert!(losses >= 5, "{losses} of the killed sandboxes were noticed");
    assert!(count(&guest, "direct_sandboxes") > count(&guest, "direct_losses"));
}

#[test]
fn endless_loops_stop_when_kicked() {
    if !possible() {
        return;
    }
    let _arena = ARENA.lock().unwrap_or_else(PoisonError::into_inner);
    let mut guest = translated::direct().unwrap();
    let endless = Case::new(CODE, vec![vec![0xeb, 0xfe]]);
    for _ in 0..3 {
        assert_eq!(guest.run(&endless).stop, Stop::Timeout);
    }
    assert!(count(&guest, "direct_traps") > 0);
}

/// An instruction that lies in two pages which have not enough breakpoints together, each
/// for bytes that would be CPUID.
#[test]
fn an_instruction_in_two_guarded_pages_gets_on() {
    if !possible() {
        return;
    }
    let _arena = ARENA.lock().unwrap_or_else(PoisonError::into_inner);
    let (mut guest, mut native) = (translated::direct().unwrap(), Native::new().unwrap());
    // jmp over the bytes; mov rax, imm64, half of it behind the page's end; the same again.
    let skip = |n: usize| {
        let mut bytes = vec![0xeb, 2 * n as u8];
        bytes.extend([0x0f, 0xa2].repeat(n));
        bytes
    };
    let over = vec![0x48, 0xb8, 1, 2, 3, 4, 5, 6, 7, 8];
    for counts in [(1, 4), (4, 1), (4, 4), (3, 2), (20, 1), (1, 20)] {
        let first = skip(counts.0);
        let at = CODE + 4096 - 5 - first.len() as u64;
        let case = Case::new(at, vec![first, over.clone(), skip(counts.1)]);
        let (expected, found) = (native.run(&case), guest.run(&case));
        assert_eq!(found.stop, expected.stop, "{counts:?}");
        assert_eq!(found.state.gpr, expected.state.gpr, "{counts:?}");
        assert_eq!(found.state.gpr[0], 0x0807_0605_0403_0201);
    }
    assert_eq!(count(&guest, "direct_losses"), 0);
}

#[test]
fn a_counter_with_an_offset_is_the_guests() {
    if !possible() {
        return;
    }
    let _arena = ARENA.lock().unwrap_or_else(PoisonError::into_inner);
    const SKIPPED: u64 = 1 << 50;
    let mut guest = translated::direct().unwrap();
    // rdtsc; shl rdx, 32; or rax, rdx; mov rbx, rax; rdtscp
    let code =
        [&[0x0f, 0x31][..], &[0x48, 0xc1, 0xe2, 32], &[0x48, 9, 0xd0], &[0x48, 0x89, 0xc3], &[0x0f, 1, 0xf9]];
    let case = Case::new(CODE, code.iter().map(|i| i.to_vec()).collect());
    let before = guest.run(&case).state.gpr[3];
    let traps = count(&guest, "direct_traps");
    guest.skip_time(SKIPPED);
    let outcome = guest.run(&case);
    let (first, second) = (outcome.state.gpr[3], outcome.state.gpr[0] | outcome.state.gpr[2] << 32);
    let passed = first.wrapping_add(SKIPPED).wrapping_sub(before);
    assert!(passed < 1 << 40, "{passed:#x} ticks passed");
    assert!(second.wrapping_sub(first) < 1 << 40, "RDTSCP agrees with RDTSC");
    // Both trapped, and the case itself ended in a trap.
    assert!(count(&guest, "direct_traps") >= traps + 3);
    assert_eq!(count(&guest, "direct_losses"), 0);
}
