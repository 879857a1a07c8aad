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
    /// Adds a finished sublayer to the streams `h` (`[rows, M, D]`, in place) and writes partial sums of their dot
    /// products with `w` (`[(2+M)*M, M*D]`) and of their squares.
    ///
    /// What the sublayer gave is `y` (`[rows, D]`), or the rounded sum of `n` `parts` of `count` values each in their
    /// order; with neither nothing is added. `post` (`[rows, M]`) and `comb` (`[rows, M*M]`) are what [`HcCollapseArgs`]
    /// gave for it. `merged` comes from the launch.
    pub struct HcMixArgs {
        h: Out<Act>, y: In<Act>, parts: In<F32>, count: u64, n: u32, post: In<F32>, comb: In<F32>, w: In<F32>,
        partials: Out<F32>, rows: u32, merged: u32,
    }

    /// The sublayer's input `x` (`[rows, D]`, normalised with `norm`), and what will add its output: `post`, `comb`.
    ///
    /// `eps` is that of all norms. `merged` comes from the launch.
    pub struct HcCollapseArgs {
        h: In<Act>, partials: In<F32>, base: In<F32>, scale: In<F32>, norm: In<F32>,
        x: Out<Act>, post: Out<F32>, comb: Out<F32>, eps: f32, hc_eps: f32, merged: u32,
    }

    /// Adds a finished sublayer to the streams, as [`HcMixArgs`] does.
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
const SPLIT: u32 = 32;
/// Splits whose sums are added up before the others'.
const GROUP: u32 = 8;
/// Rows of a block that spreads the mixing matrix over all blocks.
const FEW: u32 = 8;
/// Rows of a block that keeps a part of the mixing matrix.
const TILE_ROWS: u32 = 64;
const TILED_THREADS: u32 = 128;
const THREADS: u32 = 256;
const HEAD_THREADS: u32 = 512;
/// Columns that a thread handles at once.
const VECTOR: u32 = 8;

/// Rows up to which blocks that only wait for memory are better than tiles.
const FEW_ROWS_MAX: u32 = 32;
/// Rows from which the tiles alone are enough blocks, so that a block may add up a group of splits.
const MERGED_ROWS_MIN: u32 = 512;

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
    /// Dot products with the mixing matrix.
    fn outputs(self) -> u32 {
        (2 + self.streams) * self.streams
    }

    fn splits(self) -> u32 {
        self.hidden / SPLIT
    }

    /// Float32 values of the partial sums of at most `rows_max` rows, however they are mixed.
    pub fn partials(self, rows_max: u32) -> u64 {
        let of = |rows: u32, mix: HcMix| u64::from(rows) * u64::from(mix.count(self)) * u64::from(self.outputs() + 1);
        of(rows_max, HcMix::Merged).max(of(rows_max.min(MERGED_ROWS_MIN - 1), HcMix::Tiled))
    }
}

/// How rows are mixed; all ways give the same bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HcMix {
    /// The mixing matrix is spread over as many blocks as possible.
    Few,
    /// The same, and a block keeps its part for many rows.
    Tiled,
    /// A block goes through a group of splits.
    Merged,
}

impl HcMix {
    /// The way for a number of rows.
    pub fn of(rows: u32) -> HcMix {
        match rows {
            0..=FEW_ROWS_MAX => HcMix::Few,
            rows if rows < MERGED_ROWS_MIN => HcMix::Tiled,
            _ => HcMix::Merged,
        }
    }

    /// Splits that one partial sum covers.
    fn merged(self) -> u32 {
        if self == HcMix::Merged { GROUP } else { 1 }
    }

    /// Partial sums of a row.
    fn count(self, shape: HcShape) -> u32 {
        shape.splits().div_ceil(self.merged())
    }
}

/// The loaded kernels of a unit, in its order.
#[derive(Clone, Copy, Debug)]
pub struct HcKernels {
    /// What they were compiled for.
    pub shape: HcShape,
    /// `hc_mix`.
    pub mix: Kernel,
    /// `hc_mix_tiled`.
    pub mix_tiled: Kernel,
    /// `hc_collapse`.
    pub collapse: Kernel,
    /// `hc_finish`.
    pub finish: Kernel,
    /// `hc_head`.
    pub head: Kernel,
}

/// What is compiled for `shape`.
pub fn unit(shape: HcShape, numerics: Numerics) -> Unit {
    let threads = shape.outputs() * (SPLIT / 4);
    // Outputs are dealt to four warps and, with the sum of squares, to the lanes of one.
    let streams = shape.outputs().is_multiple_of(4) && shape.outputs() < 32 && threads.is_multiple_of(32);
    assert!(
        streams && shape.hidden.is_multiple_of(SPLIT) && shape.sinkhorn_iters > 0,
        "hyper-connections of {shape:?}"
    );
    Unit {
        family: "hyper_connection",
        source: include_str!("hyper_connection.cu"),
        args: HcMixArgs::cuda() + &HcCollapseArgs::cuda() + &HcFinishArgs::cuda() + &HcHeadArgs::cuda(),
        defines: vec![
            define("D", shape.hidden),
            define("FEW", FEW),
            define("GROUP", GROUP),
            define("HEAD_THREADS", HEAD_THREADS),
            define("M", shape.streams),
            published(numerics),
            define("SINKHORN", shape.sinkhorn_iters),
            define("SPLIT", SPLIT),
            define("THREADS", THREADS),
            define("TILE_ROWS", TILE_ROWS),
        ],
        kernels: ["hc_mix", "hc_mix_tiled", "hc_collapse", "hc_finish", "hc_head"].map(|k| (k.into(), 0)).into(),
    }
}

/// Mixes `args.rows` rows in the way `mix`.
pub fn launch_mix(gpu: &dyn Gpu, kernels: &HcKernels, mix: HcMix, args: HcMixArgs) -> Result<(), DeviceError> {
    let shape = kernels.shape;
    let args = HcMixArgs { merged: mix.merged(), ..args };
    let (kernel, threads, rows) = match mix {
        HcMix::Few => (kernels.mix, shape.outputs() * (SPLIT / 4), FEW),
        HcMix::Tiled | HcMix::Merged => (kernels.mix_tiled, TILED_THREADS, TILE_ROWS),
    };
    let grid = [mix.count(shape), args.rows.div_ceil(rows), 1];
    gpu.launch(kernel, Launch { grid, threads, shared: 0 }, args.bytes().as_slice())
}

/// Collapses `rows` rows that were mixed in the way `mix`.
pub fn launch_collapse(
    gpu: &dyn Gpu,
    kernels: &HcKernels,
    mix: HcMix,
    rows: u32,
    args: HcCollapseArgs,
) -> Result<(), DeviceError> {
    let args = HcCollapseArgs { merged: mix.merged(), ..args };
    gpu.launch(kernels.collapse, Launch::row(rows, THREADS), args.bytes().as_slice())
}

/// Adds the last sublayer to `args.rows` rows.
pub fn launch_finish(gpu: &dyn Gpu, kernels: &HcKernels, args: HcFinishArgs) -> Result<(), DeviceError> {
    let items = u64::from(args.rows) * u64::from(kernels.shape.hidden / VECTOR);
    let blocks = items.div_ceil(u64::from(THREADS)) as u32;
    gpu.launch(kernels.finish, Launch::row(blocks, THREADS), args.bytes().as_slice())
}

/// Collapses `wanted` rows for the head.
pub fn launch_head(gpu: &dyn Gpu, kernels: &HcKernels, wanted: u32, args: HcHeadArgs) -> Result<(), DeviceError> {
    gpu.launch(kernels.head, Launch::row(wanted, HEAD_THREADS), args.bytes().as_slice())
}
