//! Tiles of source, read ahead by several threads and delivered in order.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Condvar, Mutex, MutexGuard};

use dsv4_format::FormatError;
use dsv4_model::tensors::StoredTensor;

use crate::checkpoint::Checkpoint;
use crate::error::CompileError;
use crate::pack::source::Place;
use crate::plan::Plan;
use crate::split::Piece;

/// Most source bytes in one tile; one row of a tensor may be more.
const TILE_BYTES_MAX: u64 = 32 << 20;
const TILE_BYTES_MIN: u64 = 1 << 20;
/// Buffers of one rank writer, and of one reading thread.
const RANK_BYTES: u64 = 36 << 20;
const THREAD_BYTES: u64 = 6 << 20;

/// A run of whole rows of one stored tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    /// Index into [`Plan::rows`].
    pub row: usize,
    /// Which matrix of the row.
    pub matrix: u64,
    /// Which stored tensor of the matrix.
    pub part: usize,
    /// First row of the stored tensor.
    pub first: u64,
    /// Number of rows.
    pub rows: u64,
}

/// A tile, read, checked and cut.
pub struct Ready {
    /// Which.
    pub tile: Tile,
    /// The stored tensor it is of.
    pub tensor: StoredTensor,
    /// Its source bytes.
    pub bytes: Vec<u8>,
    /// Index = rank.
    pub pieces: Vec<Piece>,
    /// Of the stored tensor, when the tile is all of it.
    pub hash: Option<[u8; 32]>,
}

/// All tiles of a plan from a place on, in artifact order.
fn tiles(plan: &Plan, tile_bytes: u64, from: Place) -> impl Iterator<Item = Tile> {
    plan.rows.iter().enumerate().skip(from.row).flat_map(move |(row, planned)| {
        let from = if row == from.row { from } else { Place::default() };
        (from.matrix..planned.row.matrices()).flat_map(move |matrix| {
            let from = if matrix == from.matrix { from } else { Place::default() };
            planned.cuts.iter().enumerate().skip(from.part).flat_map(move |(part, cut)| {
                let begin = if part == from.part { from.first } else { 0 };
                let step = (tile_bytes / cut.row_bytes).max(1);
                (0..(cut.rows - begin).div_ceil(step)).map(move |n| {
                    let first = begin + n * step;
                    Tile { row, matrix, part, first, rows: step.min(cut.rows - first) }
                })
            })
        })
    })
}

/// Reads the tiles of one plan.
pub struct Reader<'a> {
    checkpoint: &'a Checkpoint,
    plan: &'a Plan,
    jobs: usize,
    /// Tiles read but not yet done with.
    window: usize,
    tile_bytes: u64,
}

impl<'a> Reader<'a> {
    /// Fits tile size and read-ahead into `memory` bytes. No tile gives more than `output_max` bytes to all
    /// ranks together, but for a single row that does. Errors: too little memory for any tiles.
    pub fn new(
        checkpoint: &'a Checkpoint,
        plan: &'a Plan,
        jobs: Option<NonZeroUsize>,
        memory: u64,
        output_max: u64,
    ) -> Result<Reader<'a>, CompileError> {
        let available = || std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        let jobs = jobs.unwrap_or_else(available).get();
        let window = jobs + 2;
        let fixed = RANK_BYTES * u64::from(plan.tp) + THREAD_BYTES * jobs as u64;
        // A tile takes its source bytes and, where it is cut by columns, as much again.
        let tile_bytes = memory.saturating_sub(fixed) / (2 * window as u64);
        if tile_bytes < TILE_BYTES_MIN {
            let least = fixed + 2 * window as u64 * TILE_BYTES_MIN;
            return Err(CompileError::Usage {
                what: "--memory",
                expected: format!("at least {least} bytes for {} ranks and {jobs} jobs", plan.tp),
                found: memory.to_string(),
                help: "allow more memory, or use fewer --jobs",
            });
        }
        // Every rank may get all of it.
        let tile_bytes = tile_bytes.min(TILE_BYTES_MAX).min(output_max / u64::from(plan.tp));
        Ok(Reader { checkpoint, plan, jobs, window, tile_bytes })
    }

    /// Calls `consume` with every tile from a place on, in order, on this thread.
    ///
    /// Errors: the first one in tile order, from reading or from `consume`, or a thread that cannot
    /// start; then nothing more is read.
    pub fn run(
        &self,
        from: Place,
        mut consume: impl FnMut(&Ready) -> Result<(), CompileError>,
    ) -> Result<(), CompileError> {
        let tiles = Mutex::new(tiles(self.plan, self.tile_bytes, from).enumerate());
        let gate = Gate::new(self.window);
        let spare = Mutex::new(Vec::new());
        let (results, ready) = channel();
        std::thread::scope(|scope| {
            // Before the threads: when one of them cannot start, the others must not wait for places.
            let _closer = Closer(&gate);
            for _ in 0..self.jobs {
                let (results, tiles, gate, spare) = (results.clone(), &tiles, &gate, &spare);
                let work = move || self.work(tiles, gate, spare, results);
                let started = std::thread::Builder::new().spawn_scoped(scope, work);
                started.map_err(|source| FormatError::Thread { what: "a reading thread", source })?;
            }
            drop(results);
            let mut early = BTreeMap::new();
            let mut next = 0;
            while let Ok((index, result)) = ready.recv() {
                early.insert(index, result);
                while let Some(result) = early.remove(&next) {
                    let tile: Ready = result?;
                    consume(&tile)?;
                    lock(&spare).push(tile.bytes);
                    gate.release();
                    next += 1;
                }
            }
            Ok(())
        })
    }

    fn work(
        &self,
        tiles: &Mutex<impl Iterator<Item = (usize, Tile)>>,
        gate: &Gate,
        spare: &Mutex<Vec<Vec<u8>>>,
        results: Sender<(usize, Result<Ready, CompileError>)>,
    ) {
        // A thread ends when there is nothing left, when the gate is closed, or by a panic: in each
        // case no other needs to start another tile.
        let _closer = Closer(gate);
        // The place in the window first, then the tile: so the lowest tile not yet delivered always
        // has a place, and the window cannot fill up with later ones.
        while gate.acquire() {
            let Some((index, tile)) = lock(tiles).next() else { return };
            let buffer = lock(spare).pop().unwrap_or_default();
            if results.send((index, self.read(tile, buffer))).is_err() {
                return;
            }
        }
    }

    fn read(&self, tile: Tile, mut bytes: Vec<u8>) -> Result<Ready, CompileError> {
        let planned = &self.plan.rows[tile.row];
        let cut = &planned.cuts[tile.part];
        let tensor = planned.row.stored(tile.matrix).swap_remove(tile.part);
        let range = tile.first * cut.row_bytes..(tile.first + tile.rows) * cut.row_bytes;
        bytes.resize((range.end - range.start) as usize, 0);
        self.checkpoint.read(&tensor, range, &mut bytes)?;
        let pieces = cut.apply(tile.first, &bytes).map_err(|bad| CompileError::Value {
            tensor: tensor.name.clone(),
            element: bad.element,
            expected: bad.expected,
            found: bad.found,
        })?;
        let hash = (tile.rows == cut.rows).then(|| *blake3::hash(&bytes).as_bytes());
        Ok(Ready { tile, tensor, bytes, pieces, hash })
    }
}

/// Counts free places in the window; closed, it lets nobody in.
struct Gate {
    state: Mutex<(usize, bool)>,
    changed: Condvar,
}

impl Gate {
    fn new(places: usize) -> Gate {
        Gate { state: Mutex::new((places, false)), changed: Condvar::new() }
    }

    /// Waits for a place; false once closed.
    fn acquire(&self) -> bool {
        let mut state = lock(&self.state);
        while state.0 == 0 && !state.1 {
            state = self.changed.wait(state).unwrap_or_else(|e| e.into_inner());
        }
        if state.1 {
            return false;
        }
        state.0 -= 1;
        true
    }

    fn release(&self) {
        lock(&self.state).0 += 1;
        self.changed.notify_one();
    }
}

/// Closes the gate when its thread is done, however that happens.
struct Closer<'a>(&'a Gate);

impl Drop for Closer<'_> {
    fn drop(&mut self) {
        lock(&self.0.state).1 = true;
        self.0.changed.notify_all();
    }
}

/// A panic elsewhere already ends the program; the data behind a poisoned lock is still whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}
