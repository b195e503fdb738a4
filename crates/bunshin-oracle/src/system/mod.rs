//! Privileged and mode-changing code, judged by another system emulator.
//!
//! User-mode code has the host processor as judge. Supervisor code has none
//! that runs in an ordinary process, so here two machines run the same guest:
//! the translator, and QEMU's translator as a process of its own. The guest
//! records itself. A small supervisor program in its memory ([`harness`]) sets
//! up one case after the other, catches every exception, appends what it saw
//! to a log and goes on; the host only writes a batch of cases and reads the
//! log, so that no step costs an exchange between processes.
//!
//! ```text
//! generate ── SystemCase, 256 a batch ──┬── translator (region) ──┬── compare ── minimise ── cases/system/*.txt
//!                                       └── QEMU (shared file) ───┘
//! ```
//!
//! A case is up to fifteen *slots* of 32 bytes, each one or a few
//! instructions, and the state they start from: registers, descriptors, page
//! tables, TSS, MSRs. An exception in a slot is recorded, and the next slot is
//! tried in the mode that the exception came from, so that one fault does not
//! end a case. Both machines reset on a triple fault; the harness notes the
//! case as lost and goes on with the next.
//!
//! QEMU is no processor. Where it is known to differ from one stands in
//! [`compare::exempt`], with the reason.
pub mod campaign;
pub mod case;
pub mod compare;
pub mod generate;
pub mod harness;
pub mod layout;
pub mod machine;
pub mod minimise;
pub mod qemu;

pub use case::SystemCase;
pub use machine::{Machine, Record};
