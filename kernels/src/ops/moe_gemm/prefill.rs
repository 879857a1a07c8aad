//! Experts for the many rows of a prefill, on tensor cores; published numerics only.
//!
//! In order: [`Prefill::sort`], [`Prefill::up`], [`Prefill::up_shared`], then for every slice of the outputs
//! [`Prefill::down`], the shared expert's `dense_gemm::gemm` into slot K, and [`Prefill::sum`]. Sums are in a fixed
//! order: a row's result depends neither on the number of rows nor on the other rows.

use dsv4_model::layout::Format;

use crate::device::args::{Act, F32, U8, U32};
use crate::device::unit::{Unit, define, published};
use crate::device::{DeviceError, Gpu, In, Kernel, KernelArgs, Launch, Out};
use crate::kernel_args;
use crate::numerics::Numerics;
use crate::ops::dense_gemm::gemm::GemmPoint;

kernel_args! {
    /// Sorts the `pair_count` pairs (row, slot) of `chosen` `[rows, K]` by expert.
    ///
    /// `counts` `[E]`, `pairs` `[rows * K]`, `tiles` `[tiles_max][4]`, `tile_count` `[1]`.
    pub struct MoeSortArgs {
        chosen: In<U32>, counts: Out<U32>, pairs: Out<U32>, tiles: Out<U32>, tile_count: Out<U32>, pair_count: u32,
    }

    /// Both first matmuls and the activation: `x` `[rows, D]` fake-quantised, `mid` `[rows, K + 1, F]`, fake-quantised.
    ///
    /// Matrices of a stack are `stride` bytes apart, their scales `scales_at` bytes behind their start.
    pub struct MoeUpArgs {
        x: In<Act>, w1: In<U8>, w3: In<U8>, stride: u64, scales_at: u64, pairs: In<U32>, tiles: In<U32>,
        tile_count: In<U32>, weights: In<F32>, mid: Out<Act>, limit: f32, rows: u32,
    }

    /// The last matmul of the routed experts, for outputs `first_out .. first_out + outs`: `out` `[rows, K + 1, outs]`.
    pub struct MoeDownArgs {
        mid: In<Act>, w2: In<U8>, stride: u64, scales_at: u64, pairs: In<U32>, tiles: In<U32>, tile_count: In<U32>,
        out: Out<F32>, first_out: u32, outs: u32,
    }

    /// The sum over all slots, into columns `first_out ..` of `y` `[rows, D]`.
    pub struct MoeSumArgs { out: In<F32>, y: Out<F32>, rows: u32, first_out: u32, outs: u32 }
}

const SORT_THREADS: u32 = 512;
/// Outputs of w1, and of w3, of a block: a group that is rounded together.
const BLOCK_F: u32 = 128;

/// Sizes of the experts on this rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MoeSizes {
    /// Hidden width.
    pub hidden: u32,
    /// Expert width of this rank.
    pub inner: u32,
    /// Routed experts.
    pub experts: u32,
    /// Experts of a row.
    pub top_k: u32,
}

/// Tiles where nothing is measured: two blocks fit a multiprocessor.
pub const DEFAULT_POINT: GemmPoint = GemmPoint { tokens: 64, outs: 256, warps_m: 1, stages: 3, group: 1 };

/// Whether a choice of tiles can be compiled: as for a product, and a block has whole groups to round.
pub fn legal(point: GemmPoint) -> bool {
    point.outs == 2 * BLOCK_F
        && point.tokens >= TOKENS_MIN
        && point.legal(Format::Fp4)
        && shared_point(point).legal(Format::Fp8)
}

/// The tiles of the shared expert, whose weights are twice as large: as many stages as fit the same share of memory.
fn shared_point(point: GemmPoint) -> GemmPoint {
    let stages = point.shared(Format::Fp4) / GemmPoint { stages: 1, ..point }.shared(Format::Fp8);
    GemmPoint { stages: stages.max(2), ..point }
}

/// Tokens of a tile, at least, whatever the point: what is reserved for a list of tiles counts on it.
pub const TOKENS_MIN: u32 = 32;

/// Entries of the list for `rows` rows of tiles of `tokens` tokens.
pub fn tiles_max(sizes: MoeSizes, tokens: u32, rows: u32) -> u32 {
    // Every expert may leave one tile unfilled; no expert has more pairs than rows.
    (rows * sizes.top_k / tokens + sizes.experts).min(rows.div_ceil(tokens) * sizes.experts)
}

/// What is compiled.
pub fn unit(sizes: MoeSizes, point: GemmPoint) -> Unit {
    assert!(legal(point), "{point:?}");
    assert!(sizes.hidden.is_multiple_of(64) && sizes.inner.is_multiple_of(BLOCK_F), "{sizes:?}");
    let mut defines = point.defines();
    defines.extend([
        define("D", sizes.hidden),
        define("F", sizes.inner),
        define("SHARED_STAGES", shared_point(point).stages),
        define("SORT_THREADS", SORT_THREADS),
        define("TOP_K", sizes.top_k),
        published(Numerics::Published),
    ]);
    defines.sort();
    let (routed, shared) = (point.shared(Format::Fp4), shared_point(point).shared(Format::Fp8));
    Unit {
        family: "moe_prefill",
        source: concat!(include_str!("../dense_gemm/tile.cuh"), include_str!("prefill.cu")),
        args: MoeSortArgs::cuda() + &MoeUpArgs::cuda() + &MoeDownArgs::cuda() + &MoeSumArgs::cuda(),
        defines,
        kernels: KERNELS
            .map(|name| {
                let bytes = match name {
                    "moe_up" | "moe_down" => routed,
                    "moe_up_shared" => shared,
                    _ => 0,
                };
                (name.to_owned(), bytes)
            })
            .into(),
    }
}

const KERNELS: [&str; 6] = ["moe_count", "moe_place", "moe_up", "moe_up_shared", "moe_down", "moe_sum"];

/// The loaded kernels.
#[derive(Clone, Copy)]
pub struct Prefill {
    sizes: MoeSizes,
    point: GemmPoint,
    kernels: [Kernel; 6],
}

impl Prefill {
    /// The kernels of [`unit`] of the same sizes and tiles, loaded, by name.
    pub fn new(sizes: MoeSizes, point: GemmPoint, kernel: impl Fn(&str) -> Kernel) -> Prefill {
        Prefill { sizes, point, kernels: KERNELS.map(kernel) }
    }

    /// Sorts the pairs of `args.pair_count / K` rows.
    pub fn sort(&self, gpu: &dyn Gpu, args: MoeSortArgs) -> Result<(), DeviceError> {
        // Counts pass through float32 sums.
        assert!(args.pair_count < 1 << 24, "{} pairs", args.pair_count);
        let shape = Launch::row(self.sizes.experts, SORT_THREADS);
        gpu.launch(self.kernels[0], shape, args.bytes().as_slice())?;
        gpu.launch(self.kernels[1], shape, args.bytes().as_slice())
    }

    /// The routed experts up to the last matmul, for `args.rows` sorted rows.
    pub fn up(&self, gpu: &dyn Gpu, args: MoeUpArgs) -> Result<(), DeviceError> {
        let grid = [self.sizes.inner / BLOCK_F, tiles_max(self.sizes, self.point.tokens, args.rows), 1];
        let shape = Launch { grid, threads: self.point.threads(), shared: self.point.shared(Format::Fp4) };
        gpu.launch(self.kernels[2], shape, args.bytes().as_slice())
    }

    /// The shared expert likewise, into slot K: FP8 matrices, no pairs, tiles or weights.
    pub fn up_shared(&self, gpu: &dyn Gpu, args: MoeUpArgs) -> Result<(), DeviceError> {
        let grid = [self.sizes.inner / BLOCK_F, args.rows.div_ceil(self.point.tokens), 1];
        let shared = shared_point(self.point).shared(Format::Fp8);
        gpu.launch(self.kernels[3], Launch { grid, threads: self.point.threads(), shared }, args.bytes().as_slice())
    }

    /// The routed experts' last matmul for `rows` rows. Slices start and end at multiples of 64 outputs.
    pub fn down(&self, gpu: &dyn Gpu, rows: u32, args: MoeDownArgs) -> Result<(), DeviceError> {
        self.check_slice(args.first_out, args.outs);
        let grid = [args.outs.div_ceil(self.point.outs), tiles_max(self.sizes, self.point.tokens, rows), 1];
        let shape = Launch { grid, threads: self.point.threads(), shared: self.point.shared(Format::Fp4) };
        gpu.launch(self.kernels[4], shape, args.bytes().as_slice())
    }

    /// Sums the slots.
    pub fn sum(&self, gpu: &dyn Gpu, args: MoeSumArgs) -> Result<(), DeviceError> {
        self.check_slice(args.first_out, args.outs);
        let quarters = u64::from(args.rows) * u64::from(args.outs / 4);
        let shape = Launch::row(quarters.div_ceil(u64::from(SORT_THREADS)) as u32, SORT_THREADS);
        gpu.launch(self.kernels[5], shape, args.bytes().as_slice())
    }

    fn check_slice(&self, first: u32, outs: u32) {
        let inside = first + outs <= self.sizes.hidden && outs > 0;
        assert!(inside && first.is_multiple_of(64) && outs.is_multiple_of(64), "outputs {first}+{outs}");
    }
}
