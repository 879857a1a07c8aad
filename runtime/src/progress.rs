//! A progress bar on standard error, where that is a terminal.

use std::io::IsTerminal;
use std::sync::Mutex;

use dsv4_format::Progress;
use indicatif::{ProgressBar, ProgressStyle};

/// Bytes, rate and time left of one stage at a time.
pub struct Bar {
    shown: bool,
    bar: Mutex<Option<ProgressBar>>,
}

impl Bar {
    /// Shows nothing when `quiet` or when nobody looks.
    pub fn new(quiet: bool) -> Bar {
        Bar { shown: !quiet && std::io::stderr().is_terminal(), bar: Mutex::new(None) }
    }

    fn with(&self, f: impl FnOnce(&mut Option<ProgressBar>)) {
        f(&mut self.bar.lock().unwrap_or_else(|p| p.into_inner()));
    }
}

impl Progress for Bar {
    fn start(&self, what: &str, total_bytes: u64) {
        if self.shown {
            let style = "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
            let style = ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar());
            self.with(|bar| *bar = Some(ProgressBar::new(total_bytes).with_style(style).with_message(what.to_owned())));
        }
    }

    fn add(&self, bytes: u64) {
        self.with(|bar| bar.iter().for_each(|b| b.inc(bytes)));
    }

    fn finish(&self) {
        self.with(|bar| bar.take().iter().for_each(ProgressBar::finish_and_clear));
    }
}
