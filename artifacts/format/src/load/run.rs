//! One load from the first request to the last block in its place.
//!
//! The calling thread lends buffers and places verified blocks, so a destination belongs to one thread.
//! Beside it: reading threads, hashing threads, a watchdog. All of them have ended when this returns.

use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::error::FormatError;
use crate::io::ring::{probe, with_ring};
use crate::io::{DirectFile, ReadMode};
use crate::load::Block;
use crate::load::destination::Destination;
use crate::load::options::{CACHED_BYTES_MAX, Engine, Floor, Io, LoadOptions, LoadReport, Look};
use crate::load::readers::{read_blocks, read_with_ring};
use crate::load::stage::{EndOnPanic, Judge, Stage};
use crate::parallel::lock;
use crate::progress::Progress;

/// How often the watchdog looks.
const TICK: Duration = Duration::from_millis(100);
/// How long memory must be there again before a shortage is over.
const GOOD_AGAIN: Duration = Duration::from_secs(1);
/// Reads under way at once, of 4 MiB each.
const URING_DEPTH: usize = 16;
const THREADS_DEPTH: usize = 8;
const DEPTH_MAX: usize = 1024;
/// Buffers lent beyond those that are being read and hashed, so that no stage waits for another.
const AHEAD: usize = 8;

/// How blocks come into memory.
pub(crate) struct Reading<'r, 'b, B> {
    /// What each reading thread does, until the stage gives no more.
    pub(crate) read: &'r (dyn Fn(&Stage<'b, B>) + Sync),
    pub(crate) threads: usize,
    /// Reads under way at once.
    pub(crate) depth: usize,
}

/// What the threads of a load know about it.
pub(crate) struct Moved {
    pub(crate) retries: u64,
    pub(crate) paused: Duration,
}

/// Buffers that keep `depth` reads and `threads` hashing threads busy.
pub(crate) fn buffers(depth: usize, threads: usize) -> usize {
    depth + 2 * threads + AHEAD
}

/// Reads, verifies and places `blocks` of a file; afterwards the page cache holds next to nothing of it.
///
/// Errors: the earliest failure in the file; [`FormatError::Uring`], [`FormatError::Thread`],
/// [`FormatError::LowMemory`], those of `dest` and `judge`.
pub(crate) fn load<'b, D: Destination>(
    file: &'b DirectFile,
    blocks: &[Block<'b>],
    dest: &mut D,
    judge: Judge<'_>,
    options: &LoadOptions<'_>,
    progress: &dyn Progress,
) -> Result<LoadReport, FormatError> {
    let depth = |usual: usize| options.queue_depth.unwrap_or(usual).clamp(1, DEPTH_MAX).min(blocks.len().max(1));
    let uring_depth = depth(URING_DEPTH);
    let uring = match options.io {
        Io::Threads => None,
        Io::Auto => probe(uring_depth).ok(),
        Io::Uring => Some(probe(uring_depth).map_err(|source| FormatError::Uring { source })?),
    };
    let engine = if uring.is_some() { Engine::Uring } else { Engine::Threads };
    let queue_depth = if uring.is_some() { uring_depth } else { depth(THREADS_DEPTH) };
    file.evict();
    let cached_bytes_before = file.cached_bytes();
    let started = Instant::now();
    let moved = match uring {
        Some(uring) => {
            let uring = Mutex::new(Some(uring));
            let read = |stage: &Stage<'b, D::Buffer>| {
                // Taken by the only reading thread.
                if let Some(uring) = lock(&uring).take() {
                    with_ring(uring, file.file(), queue_depth, |ring| read_with_ring(stage, file, ring));
                }
            };
            let reading = Reading { read: &read, threads: 1, depth: queue_depth };
            run(file.path(), blocks, dest, reading, judge, options, progress)
        }
        None => {
            let read = |stage: &Stage<'b, D::Buffer>| read_blocks(stage, file);
            let reading = Reading { read: &read, threads: queue_depth, depth: queue_depth };
            run(file.path(), blocks, dest, reading, judge, options, progress)
        }
    }?;
    let seconds = started.elapsed().as_secs_f64();
    let mut cached_bytes_after = file.cached_bytes();
    // What went through the cache is dropped as it is used, but pages that a processor has just added to a batch stay
    // until the whole file is asked for.
    let allowed = if file.mode() == ReadMode::Direct { CACHED_BYTES_MAX } else { 0 };
    if cached_bytes_after.is_some_and(|bytes| bytes > allowed) {
        file.evict();
        cached_bytes_after = file.cached_bytes();
    }
    Ok(LoadReport {
        bytes: blocks.iter().map(|b| b.len as u64).sum(),
        seconds,
        engine,
        mode: file.mode(),
        queue_depth,
        threads: options.threads.max(1),
        staged: options.staged,
        retries: moved.retries,
        paused_seconds: moved.paused.as_secs_f64(),
        cached_bytes_before,
        cached_bytes_after,
    })
}

/// The threads of a load around one way of reading.
pub(crate) fn run<'b, D: Destination>(
    path: &'b Path,
    blocks: &[Block<'b>],
    dest: &mut D,
    reading: Reading<'_, 'b, D::Buffer>,
    judge: Judge<'_>,
    options: &LoadOptions<'_>,
    progress: &dyn Progress,
) -> Result<Moved, FormatError> {
    let stage = Stage::new(path);
    let threads = options.threads.max(1);
    let reader = || guarded(&stage, || (reading.read)(&stage));
    let hasher = || guarded(&stage, || stage.hash(judge));
    let watchdog = || guarded(&stage, || options.floor.iter().for_each(|floor| watch(&stage, floor, progress)));
    let mut crew: Vec<(&'static str, &(dyn Fn() + Sync))> = Vec::new();
    if let Some(floor) = &options.floor {
        // Before the first byte, not a moment after it.
        look(&stage, floor);
        crew.push(("the memory watchdog", &watchdog));
    }
    crew.extend((0..reading.threads).map(|_| ("a reading thread", &reader as _)));
    crew.extend((0..threads).map(|_| ("a hashing thread", &hasher as _)));
    std::thread::scope(|scope| {
        let _guard = EndOnPanic(&stage);
        for (what, work) in crew {
            if let Err(source) = std::thread::Builder::new().spawn_scoped(scope, work) {
                return stage.fail(0, FormatError::Thread { what, source });
            }
        }
        match place(&stage, blocks, dest, buffers(reading.depth, threads), progress) {
            Ok(()) => stage.end(),
            Err(error) => stage.fail(0, error),
        }
    });
    stage.outcome().map(|(retries, paused)| Moved { retries, paused })
}

fn guarded<B>(stage: &Stage<'_, B>, work: impl FnOnce()) {
    let _guard = EndOnPanic(stage);
    work();
}

/// Lends buffers, at most `lent_max` at once, and places what was verified, until all blocks are in
/// their places or the load has ended.
fn place<'b, D: Destination>(
    stage: &Stage<'b, D::Buffer>,
    blocks: &[Block<'b>],
    dest: &mut D,
    lent_max: usize,
    progress: &dyn Progress,
) -> Result<(), FormatError> {
    let mut waiting = blocks.iter().peekable();
    let (mut lent, mut copying) = (0, 0);
    while waiting.peek().is_some() || lent > 0 || copying > 0 {
        while lent < lent_max
            && let Some(block) = waiting.peek()
            && let Some(buf) = dest.lend(block)?
        {
            assert!(buf.len() >= block.len, "{} bytes were lent for {}", buf.len(), block.len);
            stage.add(**block, buf, D::FRESH);
            waiting.next();
            lent += 1;
        }
        assert!(lent > 0 || copying > 0, "the destination lends nothing, and nothing is under way");
        match stage.next_verified(copying == 0) {
            Some(job) => {
                dest.accept(&job.block, job.buf)?;
                progress.add(job.block.len as u64);
                lent -= 1;
                copying = dest.settle(false)?;
            }
            None if stage.has_ended() => return Ok(()),
            None => copying = dest.settle(true)?,
        }
    }
    Ok(())
}

/// Looks at memory: pauses reading where it is low, else lets it take half of what there is above the floor
/// until the next look. (Half: a staged block takes its slot and its place.) Returns what is low.
fn look<B>(stage: &Stage<'_, B>, floor: &Floor<'_>) -> Look {
    let above = match (floor.look)() {
        Some((figure, found)) if found < floor.bytes => {
            stage.pause();
            return Some((figure, found));
        }
        Some((_, found)) => found - floor.bytes,
        None => u64::MAX,
    };
    stage.resume((above / 2).max(1));
    None
}

/// Looks again and again, and ends the load when memory stays low.
fn watch<B>(stage: &Stage<'_, B>, floor: &Floor<'_>, progress: &dyn Progress) {
    let mut shortage = Shortage::default();
    // The first look was made before the first byte.
    while !stage.ends_within(TICK) {
        let low = look(stage, floor);
        shortage.look(low.is_some());
        if let Some((figure, found)) = low {
            if shortage.lasted > floor.patience {
                let seconds = floor.patience.as_secs_f64();
                return stage.fail(0, FormatError::LowMemory { figure, floor: floor.bytes, found, seconds });
            }
            // A sign of life: the disk is not what the load waits for.
            progress.add(0);
        }
    }
}

/// For how long memory has been low, counted in looks: time in which this process was stopped is not waited.
#[derive(Debug, Default)]
struct Shortage {
    lasted: Duration,
    good: Duration,
}

impl Shortage {
    /// One more look. Memory that comes and goes is low all the time.
    fn look(&mut self, low: bool) {
        if low {
            self.lasted += TICK;
            self.good = Duration::ZERO;
        } else {
            self.good += TICK;
        }
        if self.good >= GOOD_AGAIN {
            self.lasted = Duration::ZERO;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How long a shortage has lasted after looks that found memory low (`-`) or not (`+`).
    fn ticks(looks: &str) -> u32 {
        let mut shortage = Shortage::default();
        looks.chars().for_each(|look| shortage.look(look == '-'));
        (shortage.lasted.as_millis() / TICK.as_millis()) as u32
    }

    #[test]
    fn a_shortage_ends_only_when_memory_stays_there() {
        assert_eq!((ticks(""), ticks("+++"), ticks("---")), (0, 0, 3));
        let flapping = "-----+".repeat(10);
        assert_eq!(ticks(&flapping), 50);
        assert_eq!(ticks(&format!("{flapping}{}", "+".repeat(8))), 50);
        assert_eq!(ticks(&format!("{flapping}{}", "+".repeat(9))), 0);
        assert_eq!(ticks(&format!("{flapping}{}--", "+".repeat(9))), 2);
    }
}
