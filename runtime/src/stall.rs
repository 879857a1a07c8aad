//! A disk that stops answering. No thread comes back from such a read, so no error can return either: the
//! process says what it waits for and ends, and the other ranks with it.
//!
//! Silence is counted in ticks in which this process ran: one that was stopped, or frozen with its container,
//! has waited for nothing.

use std::mem;
use std::path::Path;
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use dsv4_format::Progress;

use crate::terminal::tell;

/// How long the disk may give nothing.
const LIMIT: Duration = Duration::from_secs(30);
/// Ticks of the limit.
const TICKS: u32 = 30;

#[derive(Default)]
struct State {
    heard: bool,
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
        self.state().heard = true;
        self.inner.add(bytes);
    }

    fn finish(&self) {
        self.inner.finish();
    }
}

/// Ends the watch with the work, also with one that panics.
struct End<'w, 'a>(&'w Watched<'a>);

impl Drop for End<'_, '_> {
    fn drop(&mut self) {
        self.0.state().ended = true;
        self.0.changed.notify_all();
    }
}

/// Runs `work`, which waits for the disk of `file` and reports to `progress`; when nothing is reported for 30 s
/// the process says so and ends with exit code 3.
pub fn guard<T>(file: &Path, progress: &dyn Progress, work: impl FnOnce(&dyn Progress) -> T) -> T {
    let stalled = || {
        let (file, seconds) = (file.display(), LIMIT.as_secs());
        tell(&format!(
            "error: {file}: nothing was read for {seconds} s, expected some of it\n  help: the disk does not answer: see dmesg, and its health with nvme smart-log or smartctl\n"
        ));
        std::process::exit(3);
    };
    watch(LIMIT, progress, stalled, work)
}

fn watch<T>(
    limit: Duration,
    progress: &dyn Progress,
    stalled: impl FnOnce() + Send,
    work: impl FnOnce(&dyn Progress) -> T,
) -> T {
    let watched = Watched { inner: progress, state: Mutex::default(), changed: Condvar::new() };
    std::thread::scope(|scope| {
        let look = || {
            let (tick, mut silent) = (limit / TICKS, 0);
            while silent < TICKS {
                let began = Instant::now();
                let waited = watched.changed.wait_timeout_while(watched.state(), tick, |state| !state.ended);
                let mut state = waited.unwrap_or_else(|p| p.into_inner()).0;
                if state.ended {
                    return;
                }
                silent = silence(silent, mem::take(&mut state.heard), began.elapsed() > 2 * tick);
            }
            stalled();
        };
        // Without a thread for it the work is not watched, which is no reason to refuse it.
        let _watching = std::thread::Builder::new().name("stall".into()).spawn_scoped(scope, look);
        let _end = End(&watched);
        work(&watched)
    })
}

/// Ticks of silence after one more, in which something was `heard`, or which came so `late` that nobody was
/// there to hear.
fn silence(ticks: u32, heard: bool, late: bool) -> u32 {
    if heard || late { 0 } else { ticks + 1 }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use dsv4_format::NoProgress;

    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn silence_is_a_stall() {
        let (stalled, started) = (AtomicBool::new(false), Instant::now());
        let work = |_: &dyn Progress| {
            while !stalled.load(Ordering::Relaxed) && started.elapsed() < Duration::from_secs(50) {
                std::thread::sleep(Duration::from_millis(5));
            }
        };
        watch(Duration::from_millis(300), &NoProgress, || stalled.store(true, Ordering::Relaxed), work);
        assert!(stalled.into_inner() && started.elapsed() >= Duration::from_millis(300));
    }

    #[test]
    fn only_ticks_in_which_this_process_ran_are_silent() {
        let after = |ticks: &[(bool, bool)]| ticks.iter().fold(0, |n, (heard, late)| silence(n, *heard, *late));
        let (silent, heard, stopped) = ((false, false), (true, false), (false, true));
        assert_eq!(after(&[silent; 30]), 30);
        assert_eq!(after(&[silent, silent, heard, silent]), 1);
        assert_eq!(after(&[&[silent; 29][..], &[stopped]].concat()), 0);
    }

    #[test]
    fn work_that_ends_ends_the_watch() {
        let started = Instant::now();
        let stalled = || panic!("not within an hour");
        assert_eq!(watch(HOUR, &NoProgress, stalled, |_| 7), 7);
        let panics = || watch(HOUR, &NoProgress, stalled, |_| panic!("expected by this test"));
        assert!(std::panic::catch_unwind(panics).is_err());
        assert!(started.elapsed() < HOUR / TICKS);
    }
}
