//! The translator as a judge.
use crate::guest::Guest;
use bunshin_translator::{Choice, Effort, TranslatorEngine};

/// A guest on a fresh translator with one processor. Hot code is all of it or
/// none: signals that sample would disturb native runs. With `all_flags` every
/// arithmetic flag is kept, see [`crate::Comparison::all_flags`].
///
/// # Errors
/// What the engine refused.
pub fn translated(hot: bool, all_flags: bool) -> bunshin_core::Result<Guest> {
    let engine = TranslatorEngine::with(1, if hot { Effort::Always } else { Effort::Never })?;
    if all_flags {
        engine.keep_flags();
    }
    Guest::new(engine)
}

/// A guest whose user code runs directly on the host processor wherever that is
/// possible: what is judged is the way in and out, and what traps.
///
/// # Errors
/// What the engine refused.
pub fn direct() -> bunshin_core::Result<Guest> {
    let engine = TranslatorEngine::with(1, Effort::Never)?;
    engine.run_directly(Choice::Always)?;
    let guest = Guest::new(engine)?;
    guest.wait_by_the_wall();
    Ok(guest)
}
