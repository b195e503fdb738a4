//! The engine boundary: what every engine takes and gives, and the parts that
//! KVM keeps in the kernel (interrupt controllers, PIT) for engines that run in
//! user space. Nothing here knows Python or a particular engine.
#![deny(missing_docs)]

pub mod chips;
pub mod clock;
pub mod cpuid;
pub mod debug;
pub mod engine;
pub mod error;
pub mod kick;
pub mod memory;
pub mod panics;
pub mod state;

pub use engine::{Engine, Exit, Kicker, Reply, Vcpu};
pub use error::{EngineError, Result};
pub use memory::{GuestMemory, Region};
pub use state::{CpuState, Times};
