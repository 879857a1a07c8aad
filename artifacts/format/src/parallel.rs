//! A list of jobs shared out among threads, stopping at the first failure.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::FormatError;

/// Runs `work` on every job with up to `threads` threads (at least one), each with its own state.
/// Of several failures the one of the earliest job is returned.
///
/// Errors: those of `new_state` and `work`; [`FormatError::Thread`] when a thread cannot start, and
/// then those that did stop early.
pub(crate) fn for_each<J: Send, S>(
    jobs: Vec<J>,
    threads: usize,
    new_state: impl Fn() -> Result<S, FormatError> + Sync,
    work: impl Fn(&mut S, J) -> Result<(), FormatError> + Sync,
) -> Result<(), FormatError> {
    let threads = threads.clamp(1, jobs.len().max(1));
    let queue = Mutex::new(jobs.into_iter().enumerate());
    let stop = AtomicBool::new(false);
    let failure: Mutex<Option<(usize, FormatError)>> = Mutex::new(None);
    let fail = |index: usize, error: FormatError| {
        stop.store(true, Ordering::Relaxed);
        let mut slot = lock(&failure);
        if slot.as_ref().is_none_or(|(earlier, _)| index < *earlier) {
            *slot = Some((index, error));
        }
    };
    let run = || {
        let mut state = match new_state() {
            Ok(state) => state,
            Err(error) => return fail(usize::MAX, error),
        };
        while !stop.load(Ordering::Relaxed) {
            let Some((index, job)) = lock(&queue).next() else {
                return;
            };
            if let Err(error) = work(&mut state, job) {
                return fail(index, error);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            if let Err(source) = std::thread::Builder::new().spawn_scoped(scope, run) {
                return fail(usize::MAX, FormatError::Thread { what: "a reading thread", source });
            }
        }
        run();
    });
    match failure.into_inner().unwrap_or_else(|e| e.into_inner()) {
        None => Ok(()),
        Some((_, error)) => Err(error),
    }
}

/// A panic elsewhere already ends the program; the data behind a poisoned lock is still whole.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// Threads for reading and hashing when the caller has no say: enough to keep a fast disk busy.
pub(crate) fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get()).min(8)
}
