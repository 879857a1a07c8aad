//! Choice of compressed entries for a query (SPEC 3.6).

mod reference;
#[cfg(test)]
mod tests;

pub use reference::*;

use crate::device::args::{Act, F32, StepRow, U32};
use crate::device::unit::{Unit, define, published};
use crate::device::{DeviceError, Gpu, In, Kernel, KernelArgs, Launch, Out};
use crate::kernel_args;
use crate::numerics::Numerics;

kernel_args! {
    /// Scores `[count, stride]` of the index entries that rows see, for rows that see more than are kept.
    ///
    /// `q` `[count, IH, ID]`, `hw` `[count, IH]` raw head weights, `scale` theirs; a block scores `per` rows.
    pub struct IndexScoreArgs {
        rows: In<StepRow>, q: In<Act>, hw: In<Act>, entries: In<Act>, pages: In<U32>, scores: Out<F32>,
        stride: u32, pages_max: u32, count: u32, per: u32, scale: f32,
    }
    /// Entries `selected` `[rows, TOPK]` that each row attends to, `counts` `[rows]` of them; `stride` is a multiple
    /// of 4.
    pub struct IndexSelectArgs {
        rows: In<StepRow>, scores: In<F32>, selected: Out<U32>, counts: Out<U32>, stride: u32,
    }
}

/// Threads of a block that scores: each block has as many entries.
const THREADS: u32 = 128;
/// Threads of a block that selects.
const SELECT_THREADS: u32 = 512;
/// Rows that a block of a long step scores: its entries are read once for all of them.
const ROWS_OF_BLOCK: u32 = 8;

/// Sizes that the kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Index heads.
    pub heads: u32,
    /// Channels of each, a multiple of 32.
    pub width: u32,
    /// Entries that are kept.
    pub topk: u32,
    /// Positions of an entry.
    pub ratio: u32,
    /// Entries of a page.
    pub per_page: u32,
}

/// What is compiled: `index_score`, `index_select`.
pub fn unit(sizes: Sizes, numerics: Numerics) -> Unit {
    let Sizes { heads, width, topk, ratio, per_page } = sizes;
    assert!(width % 32 == 0 && heads * (width + 16) * 4 <= 48 << 10, "{sizes:?}: all heads fit into shared memory");
    Unit {
        family: "indexer",
        source: concat!(include_str!("index_score.cu"), include_str!("index_select.cu")),
        args: [IndexScoreArgs::cuda(), IndexSelectArgs::cuda()].concat(),
        defines: vec![
            define("EPP", per_page),
            define("ID", width),
            define("IH", heads),
            published(numerics),
            define("RATIO", ratio),
            define("SELECT_THREADS", SELECT_THREADS),
            define("THREADS", THREADS),
            define("TOPK", topk),
        ],
        kernels: vec![("index_score".into(), 0), ("index_select".into(), 0)],
    }
}

/// Scores of a step; `visible_max` bounds what any of its rows sees. `args.per` is set here.
pub fn launch_score(
    gpu: &dyn Gpu,
    kernel: Kernel,
    visible_max: u32,
    mut args: IndexScoreArgs,
) -> Result<(), DeviceError> {
    // How many rows share a block changes no score.
    args.per = if args.count <= 16 { 1 } else { ROWS_OF_BLOCK };
    let grid = [visible_max.div_ceil(THREADS), args.count.div_ceil(args.per), 1];
    gpu.launch(kernel, Launch { grid, threads: THREADS, shared: 0 }, args.bytes().as_slice())
}

/// The best entries of each of `rows` rows.
pub fn launch_select(gpu: &dyn Gpu, kernel: Kernel, rows: u32, args: IndexSelectArgs) -> Result<(), DeviceError> {
    gpu.launch(kernel, Launch::row(rows, SELECT_THREADS), args.bytes().as_slice())
}
