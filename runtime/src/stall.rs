//! A disk that stops answering. No thread comes back from such a read, so no error can return either: the
//! process says what it waits for and ends, and the other ranks with it.

use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use dsv4_format::Progress;

/// How long no block may arrive. A pause for memory is much shorter.
pub const LIMIT: Duration = Duration::from_secs(30);

struct State {
    last: Instant,
    ended: bool,
}

struct Watched<'a> {
    inner: &'a dyn Progress,
    state: Mutex<State>,
    changed: Condvar,
}

impl Watched<'_> {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|p| p.into_inner())
    }
}

impl Progress for Watched<'_> {
    fn start(&self, what: &str, total_bytes: u64) {
        self.inner.start(what, total_bytes);
    }

    fn add(&self, bytes: u64) {
        self.state().last = Instant::now();
        self.inner.add(bytes);
    }

    fn finish(&self) {
        self.inner.finish();
    }
}

/// Runs `work`, which reports to `progress`; calls `stalled` as soon as nothing was reported for `limit`.
pub fn watch<T>(
    limit: Duration,
    progress: &dyn Progress,
    stalled: impl FnOnce() + Send,
    work: impl FnOnce(&dyn Progress) -> T,
) -> T {
    let state = Mutex::new(State { last: Instant::now(), ended: false });
    let watched = Watched { inner: progress, state, changed: Condvar::new() };
    std::thread::scope(|scope| {
        let look = || {
            let mut state = watched.state();
            while !state.ended {
                let Some(left) = limit.checked_sub(state.last.elapsed()) else {
                    drop(state);
                    return stalled();
                };
                let (next, _) = watched.changed.wait_timeout(state, left).unwrap_or_else(|p| p.into_inner());
                state = next;
            }
        };
        // Without a thread for it the work is not watched, which is no reason to refuse it.
        let _watching = std::thread::Builder::new().name("stall".into()).spawn_scoped(scope, look);
        let result = work(&watched);
        watched.state().ended = true;
        watched.changed.notify_all();
        result
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use dsv4_format::NoProgress;

    use super::*;

    fn stalls(steps: u32, pause: Duration) -> bool {
        let stalled = AtomicBool::new(false);
        let limit = Duration::from_millis(200);
        watch(
            limit,
            &NoProgress,
            || stalled.store(true, Ordering::Relaxed),
            |progress| {
                for _ in 0..steps {
                    std::thread::sleep(pause);
                    progress.add(1);
                }
            },
        );
        stalled.into_inner()
    }

    #[test]
    fn only_silence_is_a_stall() {
        assert!(!stalls(0, Duration::ZERO));
        assert!(!stalls(30, Duration::from_millis(20)), "longer than the limit in all, never silent for so long");
        assert!(stalls(1, Duration::from_millis(600)));
    }
}
