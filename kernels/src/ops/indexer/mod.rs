//! Choice of compressed entries for a query (SPEC 3.6).
//!
//! Short steps finish their queries, score and select in one launch ([`launch_choose`]); longer ones in three, the
//! last two for as many rows at a time as there is room for scores.

mod reference;
#[cfg(test)]
mod tests;

pub use reference::*;

use crate::device::args::{Act, F32, StepRow, Turn, U32};
use crate::device::unit::{Unit, define, published};
use crate::device::{DeviceError, Gpu, In, Kernel, KernelArgs, Launch, Out};
use crate::kernel_args;
use crate::numerics::Numerics;
use crate::ops::kv;

kernel_args! {
    /// See index_score.cu for shapes: `bins` and `arrived` are for short steps, `turns` too. `stride` is a multiple
    /// of 4; a block of a longer step scores `per` rows.
    pub struct IndexScoreArgs {
        rows: In<StepRow>, q: In<Act>, hw: In<Act>, turns: In<Turn>, entries: In<Act>, pages: In<U32>,
        scores: Out<F32>, bins: Out<U32>, arrived: Out<U32>, selected: Out<U32>,
        stride: u32, pages_max: u32, count: u32, per: u32, scale: f32,
    }
    /// Queries `q` `[count, IH, ID]` of a longer step, finished in place.
    pub struct IndexQueriesArgs {
        q: Out<Act>, turns: In<Turn>, count: u32,
    }
}

/// Threads of a block.
const THREADS: u32 = 256;
/// Threads of a block that scores rows of a longer step: each block has as many entries.
const LONG_THREADS: u32 = 128;
/// Entries that a block of a short step scores at once.
const KEYS: u32 = THREADS / 32 * 16;
/// Rows that a block of a longer step scores: its entries are read once for all of them.
const ROWS_OF_BLOCK: u32 = 8;
/// Values of the first digit of a score; see select.cuh.
const BINS: u32 = 2048;
/// Bytes of what a block that selects keeps beside the marks.
const SELECT_BYTES: u32 = 3 * BINS * 4 + (THREADS / 32 + 4) * 4;
/// Entries of the longest row: 1,048,576 positions.
const ENTRIES_MAX: u32 = 1 << 18;

/// Sizes that the kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Index heads.
    pub heads: u32,
    /// Channels of each, a multiple of 64.
    pub width: u32,
    /// Rotated channels.
    pub rope: u32,
    /// Entries that are kept.
    pub topk: u32,
    /// Positions of an entry.
    pub ratio: u32,
    /// Entries of a page.
    pub per_page: u32,
}

/// The kernels.
#[derive(Clone, Copy)]
pub struct Indexer {
    /// Short steps.
    pub score: Kernel,
    /// Longer ones.
    pub queries: Kernel,
    /// As above.
    pub score_long: Kernel,
    /// As above.
    pub select: Kernel,
}

/// Two bits of every score.
fn marks_bytes(entries: u32) -> u32 {
    entries.div_ceil(32) * 8
}

impl Sizes {
    /// Whether there are kernels for them: widths of the Hadamard transform, all heads in shared memory.
    pub fn are_possible(&self, numerics: Numerics) -> bool {
        self.width.is_multiple_of(64)
            && self.width.is_power_of_two()
            && self.rope.is_multiple_of(64)
            && self.rope <= self.width
            && self.shared_long(numerics) <= 48 << 10
            && self.topk <= BINS
    }

    /// A row's queries and the weights of its heads in shared memory.
    fn queries_bytes(&self, numerics: Numerics) -> (u32, u32) {
        let heads = self.heads.next_multiple_of(8);
        let queries = match numerics {
            Numerics::Published => heads * (self.width + 32) * 2,
            Numerics::Float => heads * self.width * 4,
        };
        (queries, heads * 4)
    }

    /// Shared memory of a block of a short step: queries while it scores, marks while it selects.
    fn shared(&self, entries: u32, numerics: Numerics) -> u32 {
        let (queries, weights) = self.queries_bytes(numerics);
        SELECT_BYTES + weights + queries.max(marks_bytes(entries))
    }

    /// The same of a block that scores rows of a longer one.
    fn shared_long(&self, numerics: Numerics) -> u32 {
        let (queries, weights) = self.queries_bytes(numerics);
        queries + weights
    }
}

/// What is compiled: `index_score`, `index_queries`, `index_score_long`, `index_select`.
pub fn unit(sizes: Sizes, numerics: Numerics) -> Unit {
    let Sizes { heads, width, rope, topk, ratio, per_page } = sizes;
    assert!(sizes.are_possible(numerics), "an index of {sizes:?}");
    Unit {
        family: "indexer",
        source: concat!(
            include_str!("../kv/rows.cuh"),
            include_str!("entries.cuh"),
            include_str!("select.cuh"),
            include_str!("index_score.cu"),
            include_str!("index_long.cu"),
        ),
        args: [IndexScoreArgs::cuda(), IndexQueriesArgs::cuda()].concat(),
        defines: vec![
            define("EPP", per_page),
            kv::hadamard_scale(width),
            define("ID", width),
            define("IH", heads),
            define("LONG_THREADS", LONG_THREADS),
            published(numerics),
            define("RATIO", ratio),
            define("ROPE", rope),
            define("THREADS", THREADS),
            define("TOPK", topk),
        ],
        kernels: vec![
            ("index_score".into(), sizes.shared(ENTRIES_MAX, numerics)),
            ("index_queries".into(), 0),
            ("index_score_long".into(), sizes.shared_long(numerics)),
            ("index_select".into(), SELECT_BYTES + marks_bytes(ENTRIES_MAX)),
        ],
    }
}

/// Words of `bins` and `arrived` for a short step of `rows` rows: zeros before its first launch.
pub fn workspace(rows: u32) -> (u64, u64) {
    (u64::from(rows) * u64::from(BINS), u64::from(rows))
}

/// The entries of each row of a short step; `visible_max` bounds what any of its rows sees.
pub fn launch_choose(
    gpu: &dyn Gpu,
    kernels: Indexer,
    sizes: Sizes,
    numerics: Numerics,
    visible_max: u32,
    args: IndexScoreArgs,
) -> Result<(), DeviceError> {
    assert!(visible_max <= ENTRIES_MAX, "{visible_max} entries of a row");
    // How the entries of a row are shared out changes no score.
    let blocks = visible_max.div_ceil(KEYS).min((gpu.facts().multiprocessors / args.count).max(1));
    let shape = Launch { grid: [blocks, args.count, 1], threads: THREADS, shared: sizes.shared(visible_max, numerics) };
    gpu.launch(kernels.score, shape, args.bytes().as_slice())
}

/// Finishes the queries of a longer step.
pub fn launch_queries(
    gpu: &dyn Gpu,
    kernels: Indexer,
    sizes: Sizes,
    args: IndexQueriesArgs,
) -> Result<(), DeviceError> {
    let heads = u64::from(args.count) * u64::from(sizes.heads);
    gpu.launch(
        kernels.queries,
        Launch::row(heads.div_ceil(u64::from(THREADS / 32)) as u32, THREADS),
        args.bytes().as_slice(),
    )
}

/// The entries of rows of a longer step, whose queries are finished. `args.per` is set here.
pub fn launch_choose_long(
    gpu: &dyn Gpu,
    kernels: Indexer,
    sizes: Sizes,
    numerics: Numerics,
    visible_max: u32,
    mut args: IndexScoreArgs,
) -> Result<(), DeviceError> {
    assert!(visible_max <= ENTRIES_MAX, "{visible_max} entries of a row");
    args.per = ROWS_OF_BLOCK;
    let grid = [visible_max.div_ceil(LONG_THREADS), args.count.div_ceil(args.per), 1];
    let shape = Launch { grid, threads: LONG_THREADS, shared: sizes.shared_long(numerics) };
    gpu.launch(kernels.score_long, shape, args.bytes().as_slice())?;
    launch_select(gpu, kernels, visible_max, args)
}

fn launch_select(gpu: &dyn Gpu, kernels: Indexer, visible_max: u32, args: IndexScoreArgs) -> Result<(), DeviceError> {
    let shared = SELECT_BYTES + marks_bytes(visible_max);
    let shape = Launch { grid: [args.count, 1, 1], threads: THREADS, shared };
    gpu.launch(kernels.select, shape, args.bytes().as_slice())
}
