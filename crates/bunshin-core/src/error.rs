//! One error type for everything an engine can refuse.
use std::fmt;

/// What went wrong, as one sentence for people and a slug for programs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineError {
    /// Stable word for programs, for example `host-memory`.
    pub slug: &'static str,
    /// One sentence: where, what was found, what was expected.
    pub message: String,
}

impl EngineError {
    /// Build an error from its slug and sentence.
    pub fn new(slug: &'static str, message: impl Into<String>) -> Self {
        Self { slug, message: message.into() }
    }

    /// Build an error that adds the operating system's reason (`errno`).
    pub fn last_os(slug: &'static str, what: impl fmt::Display) -> Self {
        Self::new(slug, format!("{what}: {}", std::io::Error::last_os_error()))
    }
}

impl fmt::Display for EngineError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for EngineError {}

/// Result with [`EngineError`].
pub type Result<T> = std::result::Result<T, EngineError>;
