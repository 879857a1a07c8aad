//! Progress on stderr: a bar when that is a terminal, nothing otherwise.

use std::io::IsTerminal;
use std::sync::Mutex;

use dsv4_format::Progress;
use indicatif::{ProgressBar, ProgressStyle};

/// One bar at a time; a new stage replaces it.
pub struct Bar {
    shown: bool,
    bar: Mutex<ProgressBar>,
}

impl Bar {
    /// Draws unless `quiet`, or unless nobody would see it.
    pub fn new(quiet: bool) -> Bar {
        Bar { shown: !quiet && std::io::stderr().is_terminal(), bar: Mutex::new(ProgressBar::hidden()) }
    }

    fn current(&self) -> std::sync::MutexGuard<'_, ProgressBar> {
        self.bar.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn draw(&self, what: &str, total: u64, template: &str) {
        if !self.shown {
            return;
        }
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        *self.current() = ProgressBar::new(total).with_style(style).with_message(what.to_owned());
    }
}

impl Progress for Bar {
    fn start(&self, what: &str, total_bytes: u64) {
        self.draw(what, total_bytes, "{msg} {wide_bar} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left");
    }

    fn start_count(&self, what: &str, total: u64) {
        self.draw(what, total, "{msg} {wide_bar} {pos} of {len}, {eta} left");
    }

    fn add(&self, n: u64) {
        self.current().inc(n);
    }

    fn finish(&self) {
        self.current().finish_and_clear();
    }
}
