//! Attention of one query head over chosen rows that are keys and values at once, with a sink (SPEC 3.4).
//!
//! A row's keys are its window and its entries. In short steps this list is split over blocks and merged, in long
//! ones a block has a row's whole list. How it is cut depends on the list and on [`splits`] alone, so that the other
//! rows of a decode step change no bit.

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
    /// See attend.cu for shapes. `entries` and `pages` are for ratios above 0, `selected` and `counts` for ratio 4,
    /// `partial` and `stats` for steps that split; nothing where they are not.
    pub struct AttendArgs {
        rows: In<StepRow>, q: In<Act>, kv: In<Act>, window: In<Act>, entries: In<Act>, pages: In<U32>,
        selected: In<U32>, counts: In<U32>, sinks: In<F32>, turns: In<Turn>, o: Out<Act>,
        partial: Out<F32>, stats: Out<F32>, heads: u32, pages_max: u32, splits: u32,
    }
}

/// Rows times splits of any step that splits at all, at most.
const PARTS_MAX: u32 = 256;
/// Threads of a block that merges.
const MERGE_THREADS: u32 = 128;
/// Keys of a tile.
const KEYS: u32 = 32;

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
    /// Each warp has a slice of the channels, whole k steps of 16.
    fn threads(&self) -> u32 {
        if self.head_dim.is_multiple_of(128) { 256 } else { 128 }
    }

    /// Heads of a block: whole tensor core tiles of 16.
    fn heads_of_block(&self) -> u32 {
        if self.heads <= 16 { 16 } else { 32 }
    }

    /// Two tiles of keys, every warp's dot products, numerators, three numbers per head (bfloat16 kernels).
    fn shared(&self, numerics: Numerics) -> u32 {
        let heads = self.heads_of_block();
        match numerics {
            Numerics::Published => {
                2 * KEYS * self.head_dim * 2 + self.threads() / 32 * heads * KEYS * 4 + heads * KEYS * 2 + heads * 12
            }
            Numerics::Float => 0,
        }
    }
}

/// What is compiled: `attend`, `attend_merge`.
pub fn unit(sizes: Sizes, numerics: Numerics) -> Unit {
    let Sizes { head_dim, rope, window, capacity, ratio, topk, per_page, .. } = sizes;
    assert!(head_dim % 64 == 0 && head_dim <= 512, "{sizes:?}: heads are multiples of 64 channels up to 512");
    assert!(rope % 2 == 0 && rope <= head_dim && window % KEYS == 0, "{sizes:?}: whole pairs and tiles");
    let scale = 1.0 / f64::from(head_dim).sqrt() as f32;
    Unit {
        family: "sparse_attention",
        source: concat!(include_str!("attend.cuh"), include_str!("attend.cu")),
        args: AttendArgs::cuda(),
        defines: vec![
            define("CAPW", capacity),
            define("EPP", per_page),
            define("HD", head_dim),
            define("HEADS", sizes.heads_of_block()),
            define("MERGE_THREADS", MERGE_THREADS),
            published(numerics),
            define("RATIO", ratio),
            define("ROPE", rope),
            define("SCALE", format!("float_of({:#x}u)", scale.to_bits())),
            define("THREADS", sizes.threads()),
            define("TOPK", topk),
            define("WINDOW", window),
        ],
        kernels: vec![("attend".into(), sizes.shared(numerics)), ("attend_merge".into(), 0)],
    }
}

/// Parts that each row's key list is cut into in a step of `rows` rows: the same for all decode steps (up to 16 rows).
/// More rows fill the GPU with fewer parts of each.
pub fn splits(rows: u32) -> u32 {
    match rows {
        0..=16 => PARTS_MAX / 16,
        17..=64 => PARTS_MAX / 64,
        65..=128 => PARTS_MAX / 128,
        _ => 1,
    }
}

/// Floats of the workspaces `partial` and `stats`; enough for steps of any number of rows.
pub fn workspace(sizes: Sizes) -> (u64, u64) {
    let parts = u64::from(PARTS_MAX) * u64::from(sizes.heads);
    (parts * u64::from(sizes.head_dim), parts * 2)
}

/// Attention of a step's `rows` rows, with the kernels [attend, attend_merge]. `args.splits` and `args.heads` are
/// set here.
pub fn launch(
    gpu: &dyn Gpu,
    kernels: [Kernel; 2],
    sizes: Sizes,
    numerics: Numerics,
    rows: u32,
    mut args: AttendArgs,
) -> Result<(), DeviceError> {
    args.splits = splits(rows);
    args.heads = sizes.heads;
    let groups = match numerics {
        Numerics::Published => sizes.heads.div_ceil(sizes.heads_of_block()),
        Numerics::Float => sizes.heads,
    };
    let shape = Launch { grid: [args.splits, rows, groups], threads: sizes.threads(), shared: sizes.shared(numerics) };
    gpu.launch(kernels[0], shape, args.bytes().as_slice())?;
    if args.splits == 1 {
        return Ok(());
    }
    let shape = Launch { grid: [sizes.heads, rows, 1], threads: MERGE_THREADS, shared: 0 };
    gpu.launch(kernels[1], shape, args.bytes().as_slice())
}
