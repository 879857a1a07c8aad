//! Attention of one query head over chosen rows that are keys and values at once, with a sink (SPEC 3.4).
//!
//! A row's keys are its window and its entries. In short steps this list is split over blocks, of which the last merges
//! all; in long steps a block has a row's whole list. How it is cut depends on the list and on [`splits`] alone, so
//! that the other rows of a decode step change no bit.

mod reference;
#[cfg(test)]
mod tests;

pub use reference::*;

use crate::device::args::{Act, F32, StepRow, Turn, U32};
use crate::device::unit::{Unit, define, published};
use crate::device::{DeviceError, Gpu, In, Kernel, KernelArgs, Launch, Out};
use crate::kernel_args;
use crate::numerics::Numerics;

kernel_args! {
    /// See attend.cu for shapes. `entries` and `pages` are for ratios above 0, `selected` for ratio 4, `partial`,
    /// `stats` and `arrived` for steps that split; nothing where they are not. `eps` is of the queries' norm.
    pub struct AttendArgs {
        rows: In<StepRow>, q: In<Act>, kv: In<Act>, window: In<Act>, entries: In<Act>, pages: In<U32>,
        selected: In<U32>, sinks: In<F32>, turns: In<Turn>, o: Out<Act>, partial: Out<F32>, stats: Out<F32>,
        arrived: Out<U32>, heads: u32, pages_max: u32, splits: u32, parts: u32, eps: f32,
    }
}

/// Rows up to which a step is short: all such steps split a list alike.
const SHORT_ROWS: u32 = 16;
/// Splits of a short step.
const SPLITS_MAX: u32 = 16;
/// Rows times splits of any step that splits at all, at most.
const PARTS_MAX: u32 = SHORT_ROWS * SPLITS_MAX;
/// Rows of any step that splits, at most.
const SPLIT_ROWS_MAX: u32 = 128;
/// Keys of a tile.
const KEYS: u32 = 32;
/// Heads of a block of a short step.
const HEADS_SHORT: u32 = 16;
/// Splits that most lists of short steps have, at least.
const SPLITS_OF_MOST: u32 = 8;

/// Sizes that the kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Query heads of this rank.
    pub heads: u32,
    /// Channels of a head: a multiple of 64, at most 512.
    pub head_dim: u32,
    /// Rotated channels.
    pub rope: u32,
    /// Positions of the window: a multiple of 32.
    pub window: u32,
    /// Positions that a window ring holds.
    pub capacity: u32,
    /// Positions of an entry: 4 (entries are selected), another number (all are seen), 0 (there are none).
    pub ratio: u32,
    /// Entries that are selected, ratio 4.
    pub topk: u32,
    /// Entries of a page.
    pub per_page: u32,
}

impl Sizes {
    /// Whether there are kernels for them: heads of whole slices, whole pairs and tiles.
    pub fn are_possible(&self) -> bool {
        self.head_dim.is_multiple_of(64)
            && self.head_dim <= 512
            && self.rope.is_multiple_of(8)
            && self.rope <= self.head_dim
            && self.window.is_multiple_of(KEYS)
    }

    /// Each warp has a slice of the channels, whole k steps of 16.
    fn threads(&self) -> u32 {
        if self.head_dim.is_multiple_of(128) { 256 } else { 128 }
    }

    /// Heads of a block of a long step: whole tensor core tiles of 16.
    fn heads_long(&self) -> u32 {
        if self.heads <= 16 { 16 } else { 32 }
    }

    /// Two tiles of keys, every warp's dot products, numerators, three numbers per head, and whether it is the last
    /// block (bfloat16 kernels).
    fn shared(&self, heads: u32, numerics: Numerics) -> u32 {
        match numerics {
            Numerics::Published => {
                let keys = 2 * KEYS * self.head_dim * 2;
                keys + self.threads() / 32 * heads * KEYS * 4 + heads * KEYS * 2 + heads * 12 + 16
            }
            Numerics::Float => 0,
        }
    }

    /// Parts of the channels that blocks of a short step share: as many as leave no multiprocessor without work, each
    /// at least 16 channels of every warp's slice. They change no sum.
    fn parts(&self, rows: u32, multiprocessors: u32) -> u32 {
        let blocks = rows * self.heads.div_ceil(HEADS_SHORT) * SPLITS_OF_MOST;
        let fits = |parts: &u32| self.parts_are_possible(*parts) && blocks * parts <= multiprocessors;
        [4, 2].into_iter().find(fits).unwrap_or(1)
    }

    fn parts_are_possible(&self, parts: u32) -> bool {
        (self.head_dim / (self.threads() / 32)).is_multiple_of(16 * parts)
    }
}

/// What is compiled: `attend`, `attend_long`.
pub fn unit(sizes: Sizes, numerics: Numerics) -> Unit {
    let Sizes { head_dim, rope, window, capacity, ratio, topk, per_page, .. } = sizes;
    assert!(sizes.are_possible(), "attention of {sizes:?}");
    let scale = (std::f64::consts::LOG2_E / f64::from(head_dim).sqrt()) as f32;
    Unit {
        family: "sparse_attention",
        source: concat!(include_str!("attend.cuh"), include_str!("attend.cu"), include_str!("attend_float.cu")),
        args: AttendArgs::cuda(),
        defines: vec![
            define("CAPW", capacity),
            define("EPP", per_page),
            define("HD", head_dim),
            define("HEADS_LONG", sizes.heads_long()),
            define("HEADS_SHORT", HEADS_SHORT),
            published(numerics),
            define("RATIO", ratio),
            define("ROPE", rope),
            define("SCALE", format!("float_of({:#x}u)", scale.to_bits())),
            define("SPLITS_MAX", SPLITS_MAX),
            define("THREADS", sizes.threads()),
            define("TOPK", topk),
            define("WINDOW", window),
        ],
        kernels: vec![
            ("attend".into(), sizes.shared(HEADS_SHORT, numerics)),
            ("attend_long".into(), sizes.shared(sizes.heads_long(), numerics)),
        ],
    }
}

/// Splits of each row's key list in a step of `rows` rows: the same for all decode steps (up to 16 rows). More rows
/// fill the GPU with fewer splits of each.
pub fn splits(rows: u32) -> u32 {
    match rows {
        0..=SHORT_ROWS => SPLITS_MAX,
        17..=64 => PARTS_MAX / 64,
        65..=SPLIT_ROWS_MAX => PARTS_MAX / SPLIT_ROWS_MAX,
        _ => 1,
    }
}

/// What the workspaces must have room for, whatever the number of rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Floats of `partial`.
    pub partial: u64,
    /// Floats of `stats`.
    pub stats: u64,
    /// Words of `arrived`: zeros before the first launch.
    pub arrived: u64,
}

/// The workspaces.
pub fn workspace(sizes: Sizes) -> Room {
    let heads = u64::from(sizes.heads);
    let sums = u64::from(PARTS_MAX) * heads;
    let groups = u64::from(SHORT_ROWS) * u64::from(sizes.heads.div_ceil(HEADS_SHORT)) * 4;
    let arrived = groups.max(u64::from(SPLIT_ROWS_MAX) * heads);
    Room { partial: sums * u64::from(sizes.head_dim), stats: sums * 2, arrived }
}

/// Attention of a step's `rows` rows, with the kernels [attend, attend_long]. `args.splits`, `args.parts` and
/// `args.heads` are set here.
pub fn launch(
    gpu: &dyn Gpu,
    kernels: [Kernel; 2],
    sizes: Sizes,
    numerics: Numerics,
    rows: u32,
    args: AttendArgs,
) -> Result<(), DeviceError> {
    let parts = if rows <= SHORT_ROWS { sizes.parts(rows, gpu.facts().multiprocessors) } else { 1 };
    launch_parts(gpu, kernels, sizes, numerics, rows, parts, args)
}

fn launch_parts(
    gpu: &dyn Gpu,
    kernels: [Kernel; 2],
    sizes: Sizes,
    numerics: Numerics,
    rows: u32,
    parts: u32,
    mut args: AttendArgs,
) -> Result<(), DeviceError> {
    args.splits = splits(rows);
    args.heads = sizes.heads;
    args.parts = parts;
    let (kernel, heads) = match rows <= SHORT_ROWS {
        true => (kernels[0], HEADS_SHORT),
        false => (kernels[1], sizes.heads_long()),
    };
    let groups = match numerics {
        Numerics::Published => sizes.heads.div_ceil(heads) * parts,
        Numerics::Float => sizes.heads,
    };
    let shape =
        Launch { grid: [args.splits, rows, groups], threads: sizes.threads(), shared: sizes.shared(heads, numerics) };
    gpu.launch(kernel, shape, args.bytes().as_slice())
}
