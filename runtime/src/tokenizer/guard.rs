//! Calls into the tokenizers library, which panics on some files and texts: a panic becomes an error message.
//!
//! The panic is not printed either. Panic hooks belong to the process, so one hook is put in once, in front of
//! the one before it, and stays; whether it is silent is a matter of each thread, and only during `catch`.
//! Not caught, because nothing can: exhausted memory and endless loops. The rules of `rules.rs` are there for these.

use std::any::Any;
use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;

thread_local! {
    static SILENT: Cell<bool> = const { Cell::new(false) };
}

/// Runs `f`; the message of its panic is the error. `f` must leave nothing behind that a panic can leave half done.
pub(super) fn catch<T>(f: impl FnOnce() -> T) -> Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let print = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !SILENT.try_with(Cell::get).unwrap_or(false) {
                print(info);
            }
        }));
    });
    let before = SILENT.replace(true);
    let result = panic::catch_unwind(AssertUnwindSafe(f));
    SILENT.set(before);
    result.map_err(|payload| format!("the tokenizers library panicked: {}", message(payload.as_ref())))
}

fn message(payload: &(dyn Any + Send)) -> &str {
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panics_become_messages_and_stay_where_they_are() {
        assert_eq!(catch(|| 3), Ok(3));
        let failed = |text: &str| Err(format!("the tokenizers library panicked: {text}"));
        assert_eq!(catch(|| -> u8 { panic!("plain") }), failed("plain"));
        let four = std::hint::black_box(4);
        assert_eq!(catch(|| -> u8 { panic!("made of {four}") }), failed("made of 4"));
        assert_eq!(catch(|| -> u8 { panic::panic_any(4) }), failed("no message"));
        assert!(!SILENT.get());
        // A panic inside a panic's scope leaves the outer scope silent.
        let nested = catch(|| (catch(|| panic!("inner")).is_err(), SILENT.get()));
        assert_eq!(nested, Ok((true, true)));
    }
}
