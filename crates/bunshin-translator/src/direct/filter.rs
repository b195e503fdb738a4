//! The seccomp filter of a sandbox: which system calls the host's kernel lets it make.
//!
//! | from | number | |
//! |---|---|---|
//! | the stub's hand-over | HAND_OVER | a notification |
//! | the stub's return | rt_sigreturn | allowed |
//! | the stub's commands | mmap, munmap | allowed with the secret |
//! | these three places | anything else | the sandbox is killed |
//! | anywhere else | any, INT 80h too | SIGSYS: a system call of the guest's |
//!
//! Guest code can jump to the stub. It gains nothing: the hand-over and the return do what
//! any trap does, and commands want the secret, which is in the sandbox's memory only
//! while the stub goes through its commands.
use super::stub::{Stub, HAND_OVER, STUB};
use libc::{sock_filter, BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W};

const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;

/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
const POINTER: u32 = 8;
const ARGUMENTS: u32 = 16;

/// The high half of argument 3 of mmap (flags), which Linux does not look at, or of
/// argument 5 of munmap, which it does not have.
pub const MMAP_SECRET: usize = 3;
pub const MUNMAP_SECRET: usize = 5;

fn load(offset: u32) -> sock_filter {
    sock_filter { code: (BPF_LD | BPF_W | BPF_ABS) as u16, jt: 0, jf: 0, k: offset }
}

fn answer(action: u32) -> sock_filter {
    sock_filter { code: (BPF_RET | BPF_K) as u16, jt: 0, jf: 0, k: action }
}

/// Load a word, then go to one of two places.
struct Test {
    word: u32,
    is: u32,
    yes: Place,
    no: Place,
}

#[derive(Clone, Copy)]
enum Place {
    /// Another test, by its number.
    On(usize),
    Trap,
    HandOver,
    Allow,
    Kill,
}

/// The filter, for a stub and a secret.
pub fn filter(stub: &Stub, secret: u32) -> Vec<sock_filter> {
    use Place::*;
    let test = |word, is, yes, no| Test { word, is, yes, no };
    let high_half = |argument: usize| ARGUMENTS + 8 * argument as u32 + 4;
    let tests = [
        test(ARCH, AUDIT_ARCH_X86_64, On(1), Trap),
        test(POINTER + 4, (STUB >> 32) as u32, On(2), Trap),
        test(POINTER, stub.hand_over as u32, On(6), On(3)),
        test(POINTER, stub.sigreturn as u32, On(7), On(4)),
        test(POINTER, stub.command as u32, On(8), On(5)),
        // Behind the return lies a system call that is never right.
        test(POINTER, stub.sigreturn as u32 + 2, Kill, Trap),
        test(NUMBER, HAND_OVER, HandOver, Kill),
        test(NUMBER, libc::SYS_rt_sigreturn as u32, Allow, Kill),
        test(NUMBER, libc::SYS_mmap as u32, On(10), On(9)),
        test(NUMBER, libc::SYS_munmap as u32, On(11), Kill),
        test(high_half(MMAP_SECRET), secret, Allow, Kill),
        test(high_half(MUNMAP_SECRET), secret, Allow, Kill),
    ];
    let answers = [
        libc::SECCOMP_RET_TRAP,
        libc::SECCOMP_RET_USER_NOTIF,
        libc::SECCOMP_RET_ALLOW,
        libc::SECCOMP_RET_KILL_PROCESS,
    ];
    let end = 2 * tests.len();
    let index = |place| match place {
        On(n) => 2 * n,
        Trap => end,
        HandOver => end + 1,
        Allow => end + 2,
        Kill => end + 3,
    };
    let mut program = Vec::new();
    for t in &tests {
        program.push(load(t.word));
        // Jumps count from the next instruction.
        let from = program.len() + 1;
        let (jt, jf) = ((index(t.yes) - from) as u8, (index(t.no) - from) as u8);
        program.push(sock_filter { code: (BPF_JMP | BPF_JEQ | BPF_K) as u16, jt, jf, k: t.is });
    }
    program.extend(answers.map(answer));
    program
}
