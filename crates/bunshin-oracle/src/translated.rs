//! The translator as a judge.
use crate::guest::Guest;
use bunshin_translator::{Effort, TranslatorEngine};

/// A guest on a fresh translator with one processor. Hot code is all of it or
/// none: signals that sample would disturb native runs.
///
/// # Errors
/// What the engine refused.
pub fn translated(hot: bool) -> bunshin_core::Result<Guest> {
    Guest::new(TranslatorEngine::with(1, if hot { Effort::Always } else { Effort::Never })?)
}
