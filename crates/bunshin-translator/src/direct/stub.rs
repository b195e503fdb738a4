//! The program of a sandbox: what is in its address space besides the guest's pages.
//!
//! ```text
//! STUB           code: program start, signal handler
//! STUB + 0x1000  orders: bases, then up to MOST commands (system calls to make)
//! + 0x5000       stack of signals; the frame of the last trap lies on it
//! ```
//!
//! The handler hands over by one system call that the seccomp filter turns into a
//! notification (`filter.rs`): the host's kernel vouches for it that the sandbox stands
//! still until it is answered, whatever its program does. Back from there, it performs
//! the commands that were left for it and returns from the signal into guest code.
//!
//! Linux maps nothing at STUB: programs lie below, libraries and stacks above.
use iced_x86::code_asm::*;
use iced_x86::{BlockEncoderOptions, IcedError};

pub const STUB: u64 = 0x6000_0000_0000;
pub const ORDERS: u64 = STUB + 0x1000;
pub const ORDERS_BYTES: usize = 0x4000;
pub const STACK: u64 = ORDERS + ORDERS_BYTES as u64;
pub const STACK_BYTES: usize = 0x8000;
pub const END: u64 = STACK + STACK_BYTES as u64;
/// Bytes shared with the engine: orders and stack.
pub const SHARED_BYTES: usize = ORDERS_BYTES + STACK_BYTES;
/// End of what Linux gives to user mode, with four levels of page tables.
pub const TOP: u64 = 0x7fff_ffff_f000;

/// Offsets in the orders.
pub const FS: usize = 0;
pub const GS: usize = 8;
pub const COUNT: usize = 16;
/// Address of the context to return to; 0 at first.
pub const CONTEXT: usize = 24;
/// Selectors of DS, ES, FS and GS, 16 bits each.
pub const SELECTORS: usize = 32;
/// Flags; the return from the signal leaves ID and NT as they are.
pub const FLAGS: usize = 40;
pub const COMMANDS: usize = 64;
/// Bytes of a command: number, six arguments, result.
pub const COMMAND: usize = 64;
/// What setting up needs beside commands, at the end.
pub const SCRATCH: usize = 0x3800;
pub const MOST: usize = (SCRATCH - COMMANDS) / COMMAND;

/// Descriptor of the shared memory; those of guest RAM follow.
pub const SHARED_FD: i32 = 100;

/// The number of the system call that hands over. Linux has none of that number.
pub const HAND_OVER: u32 = 0x3fff_ff00;

/// Where things lie in a sandbox: no secret, guest code can look for itself. For tests.
pub struct Addresses {
    pub start: u64,
    pub handler: u64,
    /// Behind the system calls that hand over, carry out a command, return.
    pub hand_over: u64,
    pub command: u64,
    pub sigreturn: u64,
    pub orders: u64,
    pub stack: u64,
}

/// The addresses in every sandbox.
pub fn sandbox_addresses() -> Addresses {
    let Stub { handler, hand_over, command, sigreturn, .. } = Stub::new();
    Addresses { start: STUB, handler, hand_over, command, sigreturn, orders: ORDERS, stack: STACK }
}

/// The stub's code, and addresses in it. Those of system calls lie behind them, as the
/// filter sees them.
pub struct Stub {
    pub code: Vec<u8>,
    pub handler: u64,
    pub hand_over: u64,
    pub command: u64,
    pub sigreturn: u64,
}

impl Stub {
    pub fn new() -> Self {
        Self::write().expect("the stub can be assembled")
    }

    fn write() -> Result<Self, IcedError> {
        let mut a = CodeAssembler::new(64)?;
        let mut commands = a.create_label();
        let (mut next, mut done, mut first) = (a.create_label(), a.create_label(), a.create_label());
        let (mut handler, mut handed, mut commanded) = (a.create_label(), a.create_label(), a.create_label());
        let mut alone = a.create_label();

        // The program's start: map what is shared.
        a.mov(eax, libc::SYS_mmap as u32)?;
        a.mov(rdi, ORDERS)?;
        a.mov(esi, SHARED_BYTES as u32)?;
        a.mov(edx, libc::PROT_READ | libc::PROT_WRITE)?;
        a.mov(r10d, libc::MAP_SHARED | libc::MAP_FIXED)?;
        a.mov(r8d, SHARED_FD)?;
        a.xor(r9d, r9d)?;
        a.syscall()?;
        a.jmp(commands)?;

        // handler(signal, siginfo, ucontext): arguments 0 to 2 of the system call;
        // 3 and 4 are the bases, 5 has the selectors. Guest code may jump here, so what follows the
        // hand-over takes nothing from registers.
        a.set_label(&mut handler)?;
        a.rdfsbase(r10)?;
        a.rdgsbase(r8)?;
        a.xor(r9d, r9d)?;
        for (n, segment) in [gs, fs, es, ds].into_iter().enumerate() {
            if n != 0 {
                a.shl(r9, 16)?;
            }
            a.mov(eax, segment)?;
            a.or(r9, rax)?;
        }
        a.mov(eax, HAND_OVER)?;
        a.syscall()?;
        a.set_label(&mut handed)?;
        // Nobody listens any more.
        a.test(rax, rax)?;
        a.jne(alone)?;

        a.set_label(&mut commands)?;
        a.mov(r12, ORDERS)?;
        a.mov(r13, qword_ptr(r12 + COUNT as i32))?;
        a.lea(r14, ptr(r12 + COMMANDS as i32))?;
        a.set_label(&mut next)?;
        a.test(r13, r13)?;
        a.je(done)?;
        a.mov(rax, qword_ptr(r14))?;
        for (n, register) in [rdi, rsi, rdx, r10, r8, r9].into_iter().enumerate() {
            a.mov(register, qword_ptr(r14 + (8 + 8 * n) as i32))?;
        }
        a.syscall()?;
        a.set_label(&mut commanded)?;
        a.mov(qword_ptr(r14 + 56), rax)?;
        // The secret lies in one of these.
        a.mov(qword_ptr(r14 + 32), 0)?;
        a.mov(qword_ptr(r14 + 48), 0)?;
        a.add(r14, COMMAND as i32)?;
        a.dec(r13)?;
        a.jmp(next)?;
        a.set_label(&mut done)?;
        a.cmp(qword_ptr(r12 + CONTEXT as i32), 0)?;
        a.je(first)?;
        for (n, segment) in [ds, es, fs, gs].into_iter().enumerate() {
            a.mov(segment, word_ptr(r12 + (SELECTORS + 2 * n) as i32))?;
        }
        a.mov(rax, qword_ptr(r12 + FS as i32))?;
        a.wrfsbase(rax)?;
        a.mov(rax, qword_ptr(r12 + GS as i32))?;
        a.wrgsbase(rax)?;
        a.lea(rsp, ptr(r12 + FLAGS as i32))?;
        a.popfq()?;
        a.mov(rsp, qword_ptr(r12 + CONTEXT as i32))?;
        a.mov(eax, libc::SYS_rt_sigreturn as u32)?;
        a.syscall()?;
        // The filter kills for a system call here.
        a.set_label(&mut alone)?;
        a.syscall()?;
        // The first trap makes the frame that everything else is done with.
        a.set_label(&mut first)?;
        a.hlt()?;

        let done = a.assemble_options(STUB, BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS)?;
        Ok(Self {
            handler: done.label_ip(&handler)?,
            hand_over: done.label_ip(&handed)?,
            command: done.label_ip(&commanded)?,
            sigreturn: done.label_ip(&alone)?,
            code: done.inner.code_buffer,
        })
    }

    /// A static program for Linux: the code, and nothing else.
    pub fn program(&self) -> Vec<u8> {
        let mut file = vec![0; 0x1000];
        file[..8].copy_from_slice(b"\x7fELF\x02\x01\x01\x00");
        let mut put = |at: usize, value: u64, size: usize| {
            file[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
        };
        // e_type EXEC, e_machine, e_version, e_entry, e_phoff, e_ehsize, e_phentsize, e_phnum.
        for (at, value, size) in [
            (16, 2, 2),
            (18, 62, 2),
            (20, 1, 4),
            (24, STUB, 8),
            (32, 64, 8),
            (52, 64, 2),
            (54, 56, 2),
            (56, 1, 2),
        ] {
            put(at, value, size);
        }
        // PT_LOAD, readable and executable; offset, vaddr, paddr, filesz, memsz, align.
        let length = self.code.len() as u64;
        put(64, 1 | 5 << 32, 8);
        for (n, value) in [0x1000, STUB, STUB, length, length, 0x1000].into_iter().enumerate() {
            put(72 + 8 * n, value, 8);
        }
        file.extend_from_slice(&self.code);
        file
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn system_calls_lie_where_the_filter_looks_for_them() {
        let s = Stub::new();
        for at in [s.hand_over, s.command, s.sigreturn] {
            let end = (at - STUB) as usize;
            assert_eq!(s.code[end - 2..end], [0x0f, 0x05]);
        }
        assert!(s.code.len() < 0x1000);
        assert!(s.handler > STUB && s.handler < s.hand_over);
    }
}
