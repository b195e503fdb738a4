//! Panics that become an outcome: what an engine's own mistake says goes into the
//! reason of the failed run, not onto somebody's terminal.
use std::any::Any;
use std::cell::{Cell, RefCell};
use std::panic::{catch_unwind, AssertUnwindSafe, PanicHookInfo};
use std::sync::Once;

thread_local! {
    /// Calls of `catch` that this thread is in.
    static INSIDE: Cell<u32> = const { Cell::new(0) };
    /// What the last panic of this thread said, and where.
    static LAST: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Keep the words of panics inside [`catch`] for its result; all others go to the hook
/// that was there before. Once for the process.
pub fn install() {
    static DONE: Once = Once::new();
    DONE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if INSIDE.get() == 0 {
                before(info);
                return;
            }
            LAST.set(Some(words(info)));
            if std::env::var_os("BUNSHIN_DEBUG").is_some_and(|v| !v.is_empty() && v != "0") {
                before(info);
            }
        }));
    });
}

/// Run `f`; a panic in it is an error that says what it said, and where.
pub fn catch<R>(f: impl FnOnce() -> R) -> Result<R, String> {
    INSIDE.set(INSIDE.get() + 1);
    let result = catch_unwind(AssertUnwindSafe(f));
    INSIDE.set(INSIDE.get() - 1);
    result.map_err(|panic| last(&*panic))
}

/// What a panic that was caught on this thread said, and where.
pub fn last(panic: &(dyn Any + Send)) -> String {
    LAST.take().unwrap_or_else(|| message(panic).to_owned())
}

fn words(info: &PanicHookInfo<'_>) -> String {
    let message = message(info.payload()).replace('\n', " ");
    match info.location() {
        Some(place) => format!("{message} ({}:{})", place.file(), place.line()),
        None => message,
    }
}

fn message(panic: &(dyn Any + Send)) -> &str {
    if let Some(text) = panic.downcast_ref::<&str>() {
        text
    } else if let Some(text) = panic.downcast_ref::<String>() {
        text
    } else {
        "no reason given"
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn the_words_of_a_panic_are_its_result() {
        static PRINTED: AtomicU32 = AtomicU32::new(0);
        std::panic::set_hook(Box::new(|_| {
            PRINTED.fetch_add(1, Ordering::SeqCst);
        }));
        install();
        install();
        assert_eq!(catch(|| 5), Ok(5));
        let line = line!() + 1;
        let said = catch(|| panic!("slot {} is\ntaken", 3)).unwrap_err();
        assert_eq!(said, format!("slot 3 is taken ({}:{line})", file!()));
        let nested = catch(|| catch(|| std::panic::panic_any(7)).unwrap_err()).unwrap();
        assert!(nested.starts_with("no reason given ("), "{nested}");
        assert_eq!(PRINTED.load(Ordering::SeqCst), 0);
        // Outside, the hook from before has its say.
        let panic = catch_unwind(|| panic!("loud")).unwrap_err();
        assert_eq!(PRINTED.load(Ordering::SeqCst), 1);
        assert_eq!(last(&*panic), "loud");
    }
}
