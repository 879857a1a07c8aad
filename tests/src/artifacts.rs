//! Checkpoints packed into temporary directories, removed when dropped.

use std::path::{Path, PathBuf};

use dsv4_format::Progress;
use dsv4c::pack::{PackOptions, pack};
use dsv4c::synth::{Layers, SynthOptions, synth};
use tempfile::TempDir;

use crate::DATA;

/// Nobody watches.
pub struct Unwatched;

impl Progress for Unwatched {
    fn start(&self, _what: &str, _total_bytes: u64) {}
    fn add(&self, _bytes: u64) {}
    fn finish(&self) {}
}

/// An artifact of a test's own.
pub struct Packed {
    dir: TempDir,
    path: PathBuf,
}

impl Packed {
    /// The trained checkpoint, with its tokenizer.
    pub fn nano(tp: u32) -> Packed {
        Packed::of(&Path::new(DATA).join("nano"), tp)
    }

    /// The checkpoint of the goldens.
    pub fn tiny(tp: u32) -> Packed {
        Packed::of(&Path::new(DATA).join("tiny"), tp)
    }

    /// Any checkpoint.
    pub fn of(checkpoint: &Path, tp: u32) -> Packed {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("packed.dsv4");
        let options = PackOptions { out: Some(path.clone()), ..PackOptions::new(checkpoint, tp) };
        pack(&options, &Unwatched).unwrap_or_else(|e| panic!("{}: {e}", checkpoint.display()));
        Packed { dir, path }
    }

    /// The artifact.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A directory for what a test writes, removed with the artifact.
    pub fn scratch(&self) -> &Path {
        self.dir.path()
    }
}

/// A random checkpoint of `config` in a new directory `out`.
pub fn synthetic(config: &Path, out: &Path, seed: u64) {
    let options =
        SynthOptions { config: config.to_owned(), out: out.to_owned(), layers: Layers::All, seed, shards: None };
    synth(&options, &Unwatched).unwrap_or_else(|e| panic!("{}: {e}", config.display()));
}
