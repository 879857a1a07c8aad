//! Manifold-constrained hyper-connections: M residual streams mixed around every sublayer (SPEC 3.1).

mod reference;
#[cfg(test)]
mod tests;

pub use reference::*;

use crate::device::args::{Act, F32, U32};
use crate::device::unit::{Unit, define, published};
use crate::device::{DeviceError, Gpu, In, Kernel, KernelArgs, Launch, Out};
use crate::kernel_args;
use crate::numerics::Numerics;

kernel_args! {
    /// A site: adds a finished sublayer to rows `first..first + rows` of the streams `h` (`[.., M, D]`, in place) and
    /// gives the next one's input `x` (`[.., D]`, normalised with `norm`) and what will add its output: `next_post`,
    /// `next_comb`, which may lie where `post` and `comb` do.
    ///
    /// What the sublayer gave is `y` (`[.., D]`), or the rounded sum of `n` `parts` of `count` values each in their
    /// order; with neither nothing is added. `post` (`[.., M]`) and `comb` (`[.., M*M]`) are what its site gave for it.
    /// `w` is the mixing matrix (`[(2+M)*M, M*D]`), `eps` that of all norms. `partials` ([`HcShape::partials`]) are
    /// scratch; `arrivals` is a counter, zero before and after. `first` and whether `arrivals` is used come from the
    /// launch.
    pub struct HcSiteArgs {
        h: Out<Act>, y: In<Act>, parts: In<F32>, count: u64, post: In<F32>, comb: In<F32>,
        w: In<F32>, base: In<F32>, scale: In<F32>, norm: In<F32>, partials: Out<F32>, arrivals: Out<U32>,
        x: Out<Act>, next_post: Out<F32>, next_comb: Out<F32>, n: u32, first: u32, rows: u32, eps: f32, hc_eps: f32,
    }

    /// Adds a finished sublayer to the streams, as [`HcSiteArgs`] does.
    pub struct HcFinishArgs {
        h: Out<Act>, y: In<Act>, parts: In<F32>, count: u64, n: u32, post: In<F32>, comb: In<F32>, rows: u32,
    }

    /// `x` (`[n, D]`): the input of the head from the streams of row `wanted[i]`; `w` is `[M, M*D]`.
    pub struct HcHeadArgs {
        h: In<Act>, wanted: In<U32>, w: In<F32>, base: In<F32>, scale: In<F32>, norm: In<F32>, x: Out<Act>,
        eps: f32, hc_eps: f32,
    }
}

/// Columns of a split: of every stream, what one block of the mixing has.
const SPLIT: u32 = 64;
/// Splits whose sums are added up before the others'.
const GROUP: u32 = 4;
/// Rows of a block that spreads the mixing matrix over all blocks.
const FEW: u32 = 8;
/// Rows of a block that keeps a part of the mixing matrix.
const TILE_ROWS: u32 = 64;
const TILED_THREADS: u32 = 128;
const FINISH_THREADS: u32 = 256;
const HEAD_THREADS: u32 = 512;
/// Threads that collapse a row, at least and at most, and what they come in: a block adds up its warps in fours.
const THREADS_MIN: u32 = 512;
const THREADS_MAX: u32 = 896;
const THREADS_STEP: u32 = 128;
/// Columns that a thread handles at once.
const VECTOR: u32 = 8;

/// Rows up to which one block that collapses them all, right where they are mixed, is sooner done than a launch of a
/// block for each: a row takes it about 0.35 us, 38 KB at what a multiprocessor reads from the L2 cache.
const FUSED_ROWS_MAX: u32 = 4;
// One block counts arrivals, and collapses as many rows as it mixes.
const _: () = assert!(FUSED_ROWS_MAX <= FEW);
/// Rows up to which blocks that only wait for memory are better than tiles.
const FEW_ROWS_MAX: u32 = 32;
/// Rows of a slice of a long step: their streams, 8.4 MB in Flash, are still in the L2 cache (24 MB on a GB10) when
/// they are read again.
const SLICE: u32 = 256;

/// Sizes that the kernels are compiled for.
#[derive(Clone, Copy, Debug)]
pub struct HcShape {
    /// Width of a stream.
    pub hidden: u32,
    /// Streams.
    pub streams: u32,
    /// Rounds of row and column normalisation, the first included.
    pub sinkhorn_iters: u32,
}

impl HcShape {
    /// Whether there are kernels for it: 2 or 4 streams, and whole splits.
    ///
    /// Outputs are dealt to four warps and, with the sum of squares, to the lanes of one.
    pub fn is_possible(self) -> bool {
        matches!(self.streams, 2 | 4) && self.hidden.is_multiple_of(SPLIT) && self.sinkhorn_iters > 0
    }

    /// Dot products with the mixing matrix.
    fn outputs(self) -> u32 {
        (2 + self.streams) * self.streams
    }

    /// Threads that collapse a row: each has eight columns, where that many fit a block.
    fn threads(self) -> u32 {
        self.hidden.div_ceil(VECTOR).next_multiple_of(THREADS_STEP).clamp(THREADS_MIN, THREADS_MAX)
    }

    /// And one warp for what only the end of the sublayer needs.
    fn site_threads(self) -> u32 {
        self.threads() + 32
    }

    fn splits(self) -> u32 {
        self.hidden / SPLIT
    }

    /// Float32 values of the partial sums of at most `rows_max` rows.
    pub fn partials(self, rows_max: u32) -> u64 {
        u64::from(rows_max.min(SLICE)) * u64::from(self.splits()) * u64::from(self.outputs() + 1)
    }
}

/// How the rows of a slice are mixed and collapsed; all ways give the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// The mixing matrix is spread over as many blocks as possible; the last of them collapses.
    Fused,
    /// The same, then a block for every row.
    Few,
    /// A block keeps its part of the matrix for many rows; then a block for every row.
    Tiled,
}

impl Way {
    fn of(rows: u32) -> Way {
        match rows {
            0..=FUSED_ROWS_MAX => Way::Fused,
            rows if rows <= FEW_ROWS_MAX => Way::Few,
            _ => Way::Tiled,
        }
    }
}

/// The loaded kernels of a unit, in its order.
#[derive(Clone, Copy, Debug)]
pub struct HcKernels {
    /// What they were compiled for.
    pub shape: HcShape,
    /// `hc_site`.
    pub site: Kernel,
    /// `hc_tiled`.
    pub tiled: Kernel,
    /// `hc_collapse`.
    pub collapse: Kernel,
    /// `hc_finish`.
    pub finish: Kernel,
    /// `hc_head`.
    pub head: Kernel,
}

/// What is compiled for `shape`. Panics if that is not possible ([`HcShape::is_possible`]).
pub fn unit(shape: HcShape, numerics: Numerics) -> Unit {
    assert!(shape.is_possible(), "hyper-connections of {shape:?}");
    Unit {
        family: "hyper_connection",
        source: concat!(include_str!("eight.cuh"), include_str!("hyper_connection.cu")),
        args: HcSiteArgs::cuda() + &HcFinishArgs::cuda() + &HcHeadArgs::cuda(),
        defines: vec![
            define("D", shape.hidden),
            define("FEW", FEW),
            define("FINISH_THREADS", FINISH_THREADS),
            define("FUSED", FUSED_ROWS_MAX),
            define("GROUP", GROUP),
            define("HEAD_THREADS", HEAD_THREADS),
            define("M", shape.streams),
            published(numerics),
            define("SINKHORN", shape.sinkhorn_iters),
            define("SPLIT", SPLIT),
            define("THREADS", shape.threads()),
            define("TILE_ROWS", TILE_ROWS),
        ],
        kernels: ["hc_site", "hc_tiled", "hc_collapse", "hc_finish", "hc_head"].map(|k| (k.into(), 0)).into(),
    }
}

/// Enters a site with `args.rows` rows: one launch for few of them, two for each slice of many.
pub fn launch_site(gpu: &dyn Gpu, kernels: &HcKernels, args: HcSiteArgs) -> Result<(), DeviceError> {
    for first in (0..args.rows).step_by(SLICE as usize) {
        let rows = SLICE.min(args.rows - first);
        launch_slice(gpu, kernels, Way::of(rows), HcSiteArgs { first, rows, ..args })?;
    }
    Ok(())
}

fn launch_slice(gpu: &dyn Gpu, kernels: &HcKernels, way: Way, args: HcSiteArgs) -> Result<(), DeviceError> {
    assert!(way != Way::Fused || args.arrivals.0 != 0, "blocks that count one another in need a counter");
    let arrivals = if way == Way::Fused { args.arrivals } else { Out::none() };
    let args = HcSiteArgs { arrivals, ..args };
    let site_threads = kernels.shape.site_threads();
    let (kernel, threads, rows) = match way {
        Way::Fused | Way::Few => (kernels.site, site_threads, FEW),
        Way::Tiled => (kernels.tiled, TILED_THREADS, TILE_ROWS),
    };
    let grid = [kernels.shape.splits(), args.rows.div_ceil(rows), 1];
    gpu.launch(kernel, Launch { grid, threads, shared: 0 }, args.bytes().as_slice())?;
    if way == Way::Fused {
        return Ok(());
    }
    gpu.launch(kernels.collapse, Launch::row(args.rows, site_threads), args.bytes().as_slice())
}

/// Adds the last sublayer to `args.rows` rows.
pub fn launch_finish(gpu: &dyn Gpu, kernels: &HcKernels, args: HcFinishArgs) -> Result<(), DeviceError> {
    let items = u64::from(args.rows) * u64::from(kernels.shape.hidden / VECTOR);
    let blocks = items.div_ceil(u64::from(FINISH_THREADS)) as u32;
    gpu.launch(kernels.finish, Launch::row(blocks, FINISH_THREADS), args.bytes().as_slice())
}

/// Collapses `wanted` rows for the head.
pub fn launch_head(gpu: &dyn Gpu, kernels: &HcKernels, wanted: u32, args: HcHeadArgs) -> Result<(), DeviceError> {
    gpu.launch(kernels.head, Launch::row(wanted, HEAD_THREADS), args.bytes().as_slice())
}
