//! Binary translation of x86 to x86-64: a processor in software for hosts
//! without usable hardware virtualization.
//!
//! Read `translate/mod.rs` for what emitted code looks like, `cpu.rs` for what lies
//! behind `gs`, `stubs.rs` for the way in and out, `mmu.rs` for the software TLB,
//! `slow.rs` for everything that cannot be probed, `vcpu.rs` for the loop.

mod asm;
mod block;
mod cache;
mod count;
mod counters;
mod cpu;
pub mod cpuid;
mod debugger;
mod direct;
mod elements;
mod engine;
mod flags;
mod gate;
pub mod host;
mod insn;
mod interp;
mod lend;
mod look;
mod mmu;
mod msr;
mod overflow;
mod pages;
pub mod perf_map;
mod recipe;
mod resume;
mod revive;
mod shared;
mod signals;
mod slow;
mod state;
mod stubs;
mod together;
mod translate;
mod vcpu;
mod vector;
mod xstate;

pub use count::Plant;
pub use direct::{probe as probe_direct, sandbox_addresses, Choice};
pub use engine::{TranslatorEngine, TranslatorVcpu};
pub use insn::disassemble;
pub use vcpu::Effort;
