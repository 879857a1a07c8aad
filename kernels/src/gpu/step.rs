//! A step on its way to the GPU: checks, and what kernels read of it.

use dsv4_model::ModelConfig;
use dsv4_model::ops::Step;
use rayon::prelude::*;

use crate::device::rows::{self, Row};
use crate::gpu::state::RING_SPARE;
use crate::gpu::{GpuError, Streams};
use crate::ops::rope::Rope;

/// What is known of a sequence.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sequence {
    /// Positions that trunk steps have filled.
    pub trunk: Filled,
    /// Positions that draft steps have filled.
    pub draft: Filled,
}

/// Positions of one kind of step.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Filled {
    /// The next one.
    pub length: u32,
    /// The end of the longest that the rings have seen: what is long before it is gone.
    pub reached: u32,
}

impl Filled {
    /// The first position that a step may go back to, but for the very first.
    fn kept_from(self) -> u32 {
        self.reached.saturating_sub(RING_SPARE + 1)
    }

    /// After a step.
    pub fn extend(&mut self, start: u32, end: u32) {
        self.length = end;
        self.reached = if start == 0 { end } else { self.reached.max(end) };
    }
}

/// Bounds of a step.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    pub rows_max: u32,
    pub context: u64,
    pub vocab: u64,
}

/// Checks a step: slots that are open and named once, rows, positions, tokens within bounds, no gaps.
pub(super) fn check(
    step: &Step,
    source: Option<&Streams>,
    slots: &[Option<Sequence>],
    bounds: Bounds,
) -> Result<(), GpuError> {
    let Bounds { rows_max, context, vocab } = bounds;
    let mut rows = 0u64;
    for s in &step.segments {
        check_slot(s.slot, slots.len())?;
        let Some(sequence) = slots[s.slot as usize] else {
            return Err(refused("an open slot", s.slot));
        };
        let end = u64::from(s.start) + u64::from(s.rows);
        require(end <= context, || (format!("positions below {context}"), end.to_string()))?;
        let twice = step.segments.iter().filter(|other| other.slot == s.slot).count() > 1;
        require(!twice, || ("one segment per slot".into(), format!("slot {} twice", s.slot)))?;
        let filled = if source.is_some() { sequence.draft } else { sequence.trunk };
        let length = filled.length;
        require(s.start <= length, || (format!("a start up to {length}"), s.start.to_string()))?;
        let kept = filled.kept_from();
        require(s.start == 0 || s.start >= kept, || (format!("a start of 0 or from {kept}"), s.start.to_string()))?;
        rows += u64::from(s.rows);
    }
    require(rows <= u64::from(rows_max), || (format!("at most {rows_max} rows of a step"), rows.to_string()))?;
    let tokens = step.tokens.len();
    require(rows == tokens as u64, || (format!("a token for each of {rows} rows"), tokens.to_string()))?;
    let below = |list: &[u32], limit: u64, what: &str| match list.iter().find(|v| u64::from(**v) >= limit) {
        Some(found) => Err(refused(format!("{what} below {limit}"), found)),
        None => Ok(()),
    };
    below(&step.tokens, vocab, "token ids")?;
    below(&step.logits, rows, "wanted rows")?;
    let ascending = step.logits.windows(2).all(|pair| pair[0] < pair[1]);
    require(ascending, || ("wanted rows in ascending order".into(), format!("{:?}", step.logits)))?;
    let Some(source) = source else { return Ok(()) };
    let named = step.source.len();
    require(rows == named as u64, || (format!("a source for each of {rows} rows"), named.to_string()))?;
    below(&step.source, u64::from(source.rows), "source rows")
}

/// Checks that there is such a slot.
pub(super) fn check_slot(slot: u32, slots: usize) -> Result<(), GpuError> {
    require((slot as usize) < slots, || (format!("a slot below {slots}"), slot.to_string()))
}

fn refused(expected: impl ToString, found: impl ToString) -> GpuError {
    GpuError::Step { expected: expected.to_string(), found: found.to_string() }
}

pub(super) fn require(holds: bool, or: impl FnOnce() -> (String, String)) -> Result<(), GpuError> {
    if holds {
        return Ok(());
    }
    let (expected, found) = or();
    Err(GpuError::Step { expected, found })
}

/// Rotations that kernels read: see [`Turns::of`].
pub(super) struct Turns {
    plain: Rope,
    compressed: Rope,
}

impl Turns {
    pub fn new(config: &ModelConfig) -> Turns {
        Turns { plain: Rope::new(config, false), compressed: Rope::new(config, true) }
    }

    /// Four tables `[rows][pairs]` of cosine and sine: every row's position for window-only and for compressed
    /// layers; where the entry that the row closes begins, for ratio 4 and for ratio 128 (zeros where it closes none).
    fn of(&self, rows: &[Row], pairs: usize) -> Vec<[f32; 2]> {
        let mut out = vec![[0f32; 2]; 4 * rows.len() * pairs];
        let count = rows.len();
        out.par_chunks_exact_mut(pairs).with_min_len(64).enumerate().for_each(|(i, out)| {
            let end = rows[i % count].position + 1;
            let turns = match i / count {
                0 => self.plain.at(end - 1),
                1 => self.compressed.at(end - 1),
                2 if end.is_multiple_of(4) => self.compressed.at(end - 4),
                3 if end.is_multiple_of(128) => self.compressed.at(end - 128),
                _ => return,
            };
            out.iter_mut().zip(turns).for_each(|(out, (cos, sin))| *out = [cos, sin]);
        });
        out
    }
}

/// The current step, and where kernels find its parts.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Current {
    /// Rows.
    pub rows: u32,
    /// Rows whose logits are wanted.
    pub wanted: u32,
    /// Address of the rows.
    pub rows_at: u64,
    /// Addresses of the four tables of rotations.
    pub turns: [u64; 4],
    /// Address of the wanted rows.
    pub wanted_at: u64,
    /// Index entries that any row sees, rounded up: no less than are selected.
    pub entries: u32,
}

impl Current {
    /// A step's bytes for the GPU, and where its parts will be once they are at address `at`.
    ///
    /// `entries_max` are those of the longest sequence.
    pub fn new(step: &Step, turns: &Turns, at: u64, pairs: usize, topk: u32, entries_max: u32) -> (Current, Vec<u8>) {
        let rows = rows::rows(step);
        let mut bytes: Vec<u8> = bytemuck::cast_slice(&rows).to_vec();
        let turns_at = at + bytes.len() as u64;
        bytes.extend_from_slice(bytemuck::cast_slice(&turns.of(&rows, pairs)));
        let table = (rows.len() * pairs * size_of::<[f32; 2]>()) as u64;
        let wanted_at = at + bytes.len() as u64;
        bytes.extend_from_slice(bytemuck::cast_slice(&step.logits));
        let seen = rows.iter().map(|row| (row.position + 1) / 4).max().unwrap_or(0);
        let entries = if seen <= topk { topk } else { seen.next_power_of_two().min(entries_max) };
        let current = Current {
            rows: rows.len() as u32,
            wanted: step.logits.len() as u32,
            rows_at: at,
            turns: [0, 1, 2, 3].map(|i| turns_at + i * table),
            wanted_at,
            entries,
        };
        (current, bytes)
    }
}
