//! The fixed pieces of host code around translations: enter, leave, and the
//! ways out. Written once into the floor of the code cache.
//!
//! Every way back into translated code sets gs to the current region and then
//! looks at `pending`; a signal that arrives after the look finds the program
//! counter inside the cache and poisons gs (`signals.rs`). So no event is lost
//! and no block polls.
use crate::asm::*;
use crate::cache::CodeCache;
use crate::cpu::{at, exit, CPU_BYTES, HOST, JC, NO_SITE, SLOT_D, SLOT_T, TAG_R, TAG_W};
use crate::insn::Mem;
use crate::overflow;
use crate::perf_map;
use crate::vector::{self, Means};

/// Host addresses of the stubs.
#[derive(Default, Clone, Copy)]
pub struct Stubs {
    /// `extern "C" fn(*mut Cpu)`: run from `cpu.resume` until an exit.
    pub enter: u64,
    /// A memory access missed the table: r8 address, r9d info; called from cold code.
    pub miss: u64,
    /// The same where the flags live in the host's register.
    pub miss_flags: u64,
    /// The same for accesses that share a probe: where the table cannot serve
    /// them all, returns five bytes further on.
    pub miss_group: u64,
    pub miss_group_flags: u64,
    /// A slot holds another page: r8 address, r9d info with the slot's number.
    /// The table fills it, else the miss goes on as above; flags stay. By
    /// direction (store) and by whether the accesses share the probe.
    pub refill: [[u64; 2]; 2],
    /// Indirect jump found no entry: r8 target.
    pub lookup: u64,
    /// Jump to r8 by the jump cache.
    pub indirect: u64,
    /// Direct jump not linked yet: r8 target, r10d site.
    pub link: u64,
    /// Helper r10d, flags in the host's register.
    pub helper: u64,
    /// Helper r10d, flags in `cpu.lazy` (or dead).
    pub helper_lazy: u64,
    /// Leave for an event; r8 is the exact rip.
    pub event: u64,
    /// Target of the signal handler after a fault in a copied instruction.
    pub fault: u64,
    /// End of a snippet.
    pub snippet_end: u64,
}

/// Guest registers that a C function may change, by encoding number.
const VOLATILE: [u8; 6] = [0, 1, 2, 6, 7, 4];
const KEPT: [u8; 6] = [3, 5, 12, 13, 14, 15];

fn save(a: &mut Asm, regs: &[u8]) {
    for &n in regs {
        a.store(at::gpr(n), pinned(n).unwrap());
    }
}

fn restore(a: &mut Asm, regs: &[u8]) {
    for &n in regs {
        a.load(pinned(n).unwrap(), at::gpr(n));
    }
}

/// `movups` of xmm0-15; legacy encodings leave the upper halves alone, and the
/// functions called from stubs are compiled without AVX.
fn xmm(a: &mut Asm, store: bool) {
    for n in 0..16u8 {
        a.b(&[0x65]);
        if n >= 8 {
            a.b(&[0x44]);
        }
        a.b(&[0x0f, if store { 0x11 } else { 0x10 }, ((n & 7) << 3) | 4, 0x25]);
        a.d(at::XMM + 16 * u32::from(n));
    }
}

fn flags_to_lazy(a: &mut Asm) {
    a.store(at::gpr(0), RAX);
    a.lahf_seto();
    a.store32(at::LAZY, RAX);
}

fn lazy_to_flags(a: &mut Asm) {
    a.load32(RAX, at::LAZY);
    a.sahf_of();
    a.load(RAX, at::gpr(0));
}

fn wrgsbase(a: &mut Asm, reg: u8) {
    a.b(&[0xf3, 0x48 | (reg >> 3), 0x0f, 0xae, 0xd8 | (reg & 7)]);
}

fn leave(a: &mut Asm, means: Means) {
    a.b(&vector::save(means));
    a.load(4, at::HOST_RSP);
    a.b(&[0x48, 0x83, 0xc4, 8]);
    for r in [15, 14, 13, 12, 5, 3] {
        a.pop(r);
    }
    a.ret();
}

/// Copy the table's entry for r8 to the slot in the upper half of r9d. The slot is
/// written by the region's own address: gs may point to the twin by now.
fn refill(a: &mut Asm, write: bool, miss: u64) {
    let (rcx, rdx, flags) = (at::REFILL + 8, at::REFILL + 16, at::REFILL + 24);
    let restore = |a: &mut Asm| {
        a.load(2, rdx);
        a.load(RAX, flags);
        a.sahf_of();
        a.load(RAX, at::REFILL);
        a.load(RCX, rcx);
    };
    a.store(at::REFILL, RAX);
    a.store(rcx, RCX);
    a.store(rdx, 2);
    a.lahf_seto();
    a.store(flags, RAX);
    a.rorx(RAX, S0, 12);
    a.movzx16(RAX, RAX);
    a.load_indexed(RCX, RAX, if write { TAG_W } else { TAG_R });
    a.mov32(2, S1);
    a.b(&[0x81, 0xe2]); // and edx, 0xfff
    a.d(0xfff);
    a.lea(true, 2, Some(2), Some((S0, 1)), 0);
    a.b(&[0x48, 0x01, 0xca]); // add rdx, rcx
    a.cmp_imm(2, 4096);
    let hit = a.jcc_short(6);
    restore(a);
    a.jmp_abs(miss);
    a.land(hit);
    a.load_indexed(RAX, RAX, HOST);
    a.b(&[0x48, 0x01, 0xc8]); // add rax, rcx
    a.rorx(2, S1, 16);
    a.mov32(2, 2);
    a.b(&[0x65, 0xff, 0x04, 0x95]); // inc dword gs:[rdx*4 + refills]
    a.d(at::REFILLS);
    a.load(S0, at::REGION_BASE);
    a.lea(true, S0, Some(S0), Some((2, 8)), 0);
    a.store_mem(8, Mem { base: S0, index: None, disp: SLOT_T as i32 }, RCX);
    a.store_mem(8, Mem { base: S0, index: None, disp: SLOT_D as i32 }, RAX);
    restore(a);
    a.ret();
}

/// A shared check of r9d & 0xfff bytes at r8 that crosses a page cannot be served:
/// return five bytes further on. Stack frames stay where they are for long, so this
/// is no rare case. Uses r10.
fn turn_back(a: &mut Asm, flags: bool) {
    if flags {
        a.store(at::REFILL, RAX);
        a.lahf_seto();
        a.store(at::REFILL + 8, RAX);
    }
    let restore = |a: &mut Asm| {
        if flags {
            a.load(RAX, at::REFILL + 8);
            a.sahf_of();
            a.load(RAX, at::REFILL);
        }
    };
    a.store(at::GROUP, S1);
    a.b(&[0x45, 0x89, 0xc2]); // mov r10d, r8d
    a.b(&[0x41, 0x81, 0xe2]); // and r10d, 0xfff
    a.d(0xfff);
    a.b(&[0x41, 0x81, 0xe1]); // and r9d, 0xfff
    a.d(0xfff);
    a.add(S2, S1);
    a.load(S1, at::GROUP);
    a.cmp_imm(S2, 4096);
    let inside = a.jcc_short(6);
    a.b(&[0x48, 0x83, 0x04, 0x24, 5]); // add qword [rsp], 5
    restore(a);
    a.ret();
    a.land(inside);
    restore(a);
}

impl Stubs {
    /// Name the stubs, which lie from `first` to `end`, in the map for perf.
    pub fn tell(&self, first: u64, end: u64) {
        let [[load, load_group], [store, store_group]] = self.refill;
        let mut named = [
            (first, "leave"),
            (self.enter, "enter"),
            (self.miss, "miss"),
            (self.miss_flags, "miss"),
            (self.miss_group, "miss"),
            (self.miss_group_flags, "miss"),
            (load, "refill"),
            (load_group, "refill"),
            (store, "refill"),
            (store_group, "refill"),
            (self.lookup, "lookup"),
            (self.link, "link"),
            (self.helper, "helper"),
            (self.helper_lazy, "helper"),
            (self.event, "event"),
            (self.fault, "fault"),
            (self.snippet_end, "snippet end"),
        ];
        named.sort_unstable();
        let ends = named.iter().skip(1).map(|s| s.0).chain([end]);
        for (&(from, name), to) in named.iter().zip(ends) {
            perf_map::own(from, to - from, name);
        }
    }

    /// Write all stubs.
    pub fn write(cache: &mut CodeCache, means: Means) -> Self {
        let mut s = Self::default();
        let mut put = |f: &mut dyn FnMut(&mut Asm)| {
            let mut a = Asm::default();
            f(&mut a);
            a.put(cache)
        };
        let leave_at = put(&mut |a| leave(a, means));
        let exit_with = |a: &mut Asm, code: u32| {
            a.store32_imm(at::EXIT, code);
            a.jmp_abs(leave_at);
        };

        s.enter = put(&mut |a| {
            for r in [3, 5, 12, 13, 14, 15] {
                a.push(r);
            }
            a.b(&[0x48, 0x83, 0xec, 8]);
            // mov rax, [rdi + REGION_BASE]
            a.b(&[0x48, 0x8b, 0x87]);
            a.d(at::REGION_BASE);
            wrgsbase(a, RAX);
            a.store(at::HOST_RSP, 4);
            a.b(&vector::load(means));
            a.cmp32_imm8(at::PENDING, 0);
            let quiet = a.jcc_short(4);
            exit_with(a, exit::EVENT);
            a.land(quiet);
            restore(a, &KEPT);
            restore(a, &VOLATILE[1..]);
            lazy_to_flags(a);
            a.jmp_gs(at::RESUME);
        });

        // Go on at the code in rax with all of the state from memory.
        let resume_at = put(&mut |a| {
            a.mov(S2, RAX);
            a.load(RAX, at::REGION_BASE);
            wrgsbase(a, RAX);
            a.cmp32_imm8(at::PENDING, 0);
            let quiet = a.jcc_short(4);
            exit_with(a, exit::EVENT);
            a.land(quiet);
            restore(a, &KEPT);
            restore(a, &VOLATILE[1..]);
            lazy_to_flags(a);
            a.b(&[0x41, 0xff, 0xe2]); // jmp r10
        });

        let miss = |a: &mut Asm, flags: bool, group: bool| {
            if group {
                turn_back(a, flags);
            }
            if flags {
                flags_to_lazy(a);
                save(a, &VOLATILE[1..]);
            } else {
                save(a, &VOLATILE);
            }
            // A group may hold its address there.
            a.store(at::GROUP, S2);
            a.b(&[0x48, 0x8b, 0x04, 0x24]); // mov rax, [rsp]
            a.store(at::HOST_PC, RAX);
            xmm(a, true);
            a.load(7, at::VCPU);
            a.mov(6, S0);
            a.mov(2, S1);
            a.b(&[0x48, 0x83, 0xec, 8]);
            a.call_gs(at::FN_FILL);
            a.b(&[0x48, 0x83, 0xc4, 8]);
            xmm(a, false);
            let slow = if group {
                // Past the jump back: to the version without groups.
                a.b(&[0x85, 0xc0]); // test eax, eax
                let filled = a.jcc_short(5);
                a.b(&[0x48, 0x83, 0x04, 0x24, 5]); // add qword [rsp], 5
                a.land(filled);
                None
            } else {
                a.b(&[0x48, 0x83, 0xf8, 2]); // cmp rax, 2
                let served = a.jcc_short(2);
                // The access faulted and the fault was delivered.
                save(a, &KEPT);
                let inside = a.jcc_short(5);
                a.jmp_abs(leave_at);
                a.land(inside);
                a.b(&[0x59]); // pop rcx
                a.jmp_abs(resume_at);
                a.land(served);
                a.b(&[0x85, 0xc0]); // test eax, eax
                Some(a.jcc_short(4))
            };
            a.cmp32_imm8(at::PENDING, 0);
            let event = a.jcc_short(5);
            a.load(S2, at::GROUP);
            restore(a, &VOLATILE);
            if flags {
                lazy_to_flags(a);
            }
            a.ret();
            if let Some(slow) = slow {
                a.land(slow);
            }
            a.land(event);
            save(a, &KEPT);
            exit_with(a, exit::SLOW);
        };
        s.miss = put(&mut |a| miss(a, false, false));
        s.miss_flags = put(&mut |a| miss(a, true, false));
        s.miss_group = put(&mut |a| miss(a, false, true));
        s.miss_group_flags = put(&mut |a| miss(a, true, true));

        for write in [false, true] {
            for group in [false, true] {
                let miss = if group { s.miss_group_flags } else { s.miss_flags };
                s.refill[usize::from(write)][usize::from(group)] = put(&mut |a| refill(a, write, miss));
            }
        }

        // Common end of lookup and link: rax is code or 0.
        let go = |a: &mut Asm| {
            xmm(a, false);
            a.b(&[0x48, 0x85, 0xc0]); // test rax, rax
            let some = a.jcc_short(5);
            save(a, &KEPT);
            exit_with(a, exit::TRANSLATE);
            a.land(some);
            a.mov(S2, RAX);
            a.cmp32_imm8(at::PENDING, 0);
            let event = a.jcc_short(5);
            restore(a, &VOLATILE[1..]);
            lazy_to_flags(a);
            a.b(&[0x41, 0xff, 0xe2]); // jmp r10
            a.land(event);
            save(a, &KEPT);
            exit_with(a, exit::EVENT);
        };
        s.lookup = put(&mut |a| {
            flags_to_lazy(a);
            overflow::look(a, lazy_to_flags);
            save(a, &VOLATILE[1..]);
            a.store(at::RIP, S0);
            a.store32_imm(at::ARG, NO_SITE);
            xmm(a, true);
            a.load(7, at::VCPU);
            a.mov(6, S0);
            a.call_gs(at::FN_LOOKUP);
            go(a);
        });
        s.indirect = put(&mut |a| {
            a.movzx16(S1, S0);
            a.jmp_gs_indexed(S1, JC);
        });
        s.link = put(&mut |a| {
            flags_to_lazy(a);
            save(a, &VOLATILE[1..]);
            a.store(at::RIP, S0);
            a.store32(at::ARG, S2);
            xmm(a, true);
            a.load(7, at::VCPU);
            a.mov(6, S0);
            a.mov32(2, S2);
            a.call_gs(at::FN_LINK);
            go(a);
        });

        let helper = |a: &mut Asm| {
            save(a, &VOLATILE[1..]);
            save(a, &KEPT);
            a.pop(RAX);
            a.store(at::HOST_PC, RAX);
            xmm(a, true);
            a.load(7, at::VCPU);
            a.mov32(6, S2);
            a.call_gs(at::FN_HELPER);
            xmm(a, false);
            a.b(&[0x48, 0x83, 0xf8, 1]); // cmp rax, 1
            let inside = a.jcc_short(5);
            a.jmp_abs(leave_at);
            a.land(inside);
            let jumps = a.jcc_short(7); // above: code to go on at
            a.load(RAX, at::HOST_PC);
            a.land(jumps);
            a.jmp_abs(resume_at);
        };
        s.helper = put(&mut |a| {
            flags_to_lazy(a);
            helper(a);
        });
        s.helper_lazy = put(&mut |a| {
            a.store(at::gpr(0), RAX);
            helper(a);
        });
        s.event = put(&mut |a| {
            flags_to_lazy(a);
            save(a, &VOLATILE[1..]);
            save(a, &KEPT);
            a.store(at::RIP, S0);
            exit_with(a, exit::EVENT);
        });
        s.fault = put(&mut |a| {
            for (k, r) in [S0, S1, S2].into_iter().enumerate() {
                a.store(at::SCRATCH + 8 * k as u32, r);
            }
            save(a, &VOLATILE);
            save(a, &KEPT);
            exit_with(a, exit::FAULT);
        });
        s.snippet_end = put(&mut |a| {
            flags_to_lazy(a);
            save(a, &VOLATILE[1..]);
            save(a, &KEPT);
            exit_with(a, exit::SNIPPET);
        });
        cache.keep();
        s
    }
}

const _: () = assert!(CPU_BYTES >= 4096);
