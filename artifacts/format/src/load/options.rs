//! What a load is told, and what it tells.

use std::time::Duration;

use crate::io::ReadMode;
use crate::parallel::default_threads;

/// How long memory may stay below the floor before a load is given up.
const PATIENCE: Duration = Duration::from_secs(5);
/// More of a rank file than this is not left in the page cache by loading it.
pub const CACHED_BYTES_MAX: u64 = 64 << 20;

/// Which way of reading is asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Io {
    /// io_uring where it is allowed, else threads.
    #[default]
    Auto,
    /// io_uring, or fail.
    Uring,
    /// Threads that each wait for one read.
    Threads,
}

/// Which way of reading is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    Uring,
    Threads,
}

impl Engine {
    /// As in reports.
    pub fn name(self) -> &'static str {
        match self {
            Engine::Uring => "io_uring",
            Engine::Threads => "threads",
        }
    }
}

/// What there is of memory now: the name of the figure that counts, and bytes. `None`: not to be known.
pub type Look = Option<(&'static str, u64)>;

/// Memory that a load leaves to others: below it nothing more is read, and when that does not help, the
/// load ends.
#[derive(Clone, Copy)]
pub struct Floor<'a> {
    pub bytes: u64,
    /// How long it may be low.
    pub patience: Duration,
    /// Looks at memory.
    pub look: &'a (dyn Fn() -> Look + Sync),
}

impl<'a> Floor<'a> {
    /// At least `bytes`, for as long as a load is usually worth waiting for.
    pub fn new(bytes: u64, look: &'a (dyn Fn() -> Look + Sync)) -> Floor<'a> {
        Floor { bytes, patience: PATIENCE, look }
    }
}

/// How to load.
#[derive(Clone, Copy)]
pub struct LoadOptions<'a> {
    pub io: Io,
    /// Threads that hash.
    pub threads: usize,
    /// Reads under way at once; by engine if none.
    pub queue_depth: Option<usize>,
    /// Through a ring of slots, as into memory that the disk cannot write.
    pub staged: bool,
    /// None: memory is not watched.
    pub floor: Option<Floor<'a>>,
}

impl Default for LoadOptions<'_> {
    fn default() -> Self {
        LoadOptions { io: Io::Auto, threads: default_threads(), queue_depth: None, staged: false, floor: None }
    }
}

/// What a load did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoadReport {
    /// Bytes of weights.
    pub bytes: u64,
    /// From the first request to the last block in its place.
    pub seconds: f64,
    pub engine: Engine,
    pub mode: ReadMode,
    pub queue_depth: usize,
    /// Threads that hashed.
    pub threads: usize,
    /// Whether blocks went through slots.
    pub staged: bool,
    /// Blocks that had to be read again.
    pub retries: u64,
    /// Of it, waiting for memory.
    pub paused_seconds: f64,
    /// Bytes of the file in the page cache, once its pages were dropped before loading.
    pub cached_bytes_before: Option<u64>,
    /// The same afterwards.
    pub cached_bytes_after: Option<u64>,
}

impl LoadReport {
    /// Bytes a second.
    pub fn rate(&self) -> f64 {
        if self.seconds > 0.0 { self.bytes as f64 / self.seconds } else { 0.0 }
    }

    /// Whether the page cache holds next to nothing of the file; `None` where that cannot be known.
    pub fn is_cache_bounded(&self) -> Option<bool> {
        self.cached_bytes_after.map(|bytes| bytes <= CACHED_BYTES_MAX)
    }
}
