//! The engines by name, and a machine that moves between them while it runs.
//!
//! | file    | what                                                             |
//! |---------|------------------------------------------------------------------|
//! | machine | [`Machine`]: an `Engine` over those that there are; the move      |
//! | vcpu    | a processor that is run by the one or the other                  |
//! | rescue  | instructions that KVM cannot emulate, performed by the translator |
//! | keep    | what a guest was told of the processor, and who can keep it       |
//!
//! Memory and devices stay where they are in a move; registers, interrupt controllers
//! and clocks go over. The engine that was left keeps its tables for the way back.
#![deny(missing_docs)]

mod keep;
mod machine;
mod rescue;
mod vcpu;

pub use machine::Machine;

use bunshin_core::EngineError;

/// The engines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Name {
    /// The host's processor.
    Kvm,
    /// Software.
    Translator,
}

impl Name {
    /// As people write it.
    pub fn text(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Translator => "translator",
        }
    }

    /// The engine of that name.
    ///
    /// # Errors
    /// There is none.
    pub fn parse(text: &str) -> Result<Self, EngineError> {
        match text {
            "kvm" => Ok(Self::Kvm),
            "translator" => Ok(Self::Translator),
            _ => Err(EngineError::new(
                "engine-name",
                format!("there is no engine {text:?}, expected \"kvm\" or \"translator\""),
            )),
        }
    }
}
