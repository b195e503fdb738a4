//! The translator as a judge.
use crate::guest::Guest;
use bunshin_translator::TranslatorEngine;

/// A guest on a fresh translator with one processor.
///
/// # Errors
/// What the engine refused.
pub fn translated() -> bunshin_core::Result<Guest> {
    Guest::new(TranslatorEngine::new(1)?)
}
