//! The host processor as judge of the translator. Random pieces of user-mode
//! code run natively and in an engine, from the same registers and memory at
//! the same addresses; whatever then differs is a bug of the engine (or of
//! this crate, which `bunshin-compare --self-check` is there to exclude).
//!
//! ```text
//! generate ── Case ──┬── Native (signal frames) ─────────┬── compare ── minimise ── cases/*.txt
//!                    └── Guest (any bunshin_core Engine) ─┘
//! ```
//! A development tool: nothing of bunshin depends on it.
#![deny(missing_docs)]

pub mod arena;
pub mod case;
pub mod compare;
pub mod coverage;
pub mod generate;
pub mod guest;
pub mod minimise;
pub mod native;
pub mod processor_time;
pub mod programs;
pub mod random;
pub mod state;
pub mod system;
#[cfg(feature = "translator")]
pub mod translated;

pub use case::Case;
pub use compare::{Comparison, Judge, Options, Outcome, Stop};
pub use generate::{Choice, Generator};
pub use guest::Guest;
pub use native::Native;
pub use state::UserState;
