//! y = x . W^T for the many rows of a prefill, on tensor cores; published numerics only.
//!
//! `x` comes fake-quantised where the weight wants it ([`launch_fake_quant`]); all sums of a row are in an order
//! that depends neither on the number of rows nor on the other rows.

use serde::{Deserialize, Serialize};

use dsv4_model::layout::{Format, TILE};

use crate::device::args::{Act, U8};
use crate::device::nvrtc::SHARED_MAX;
use crate::device::unit::{Unit, define, published};
use crate::device::{DeviceError, Gpu, In, Kernel, KernelArgs, Launch, Out};
use crate::kernel_args;
use crate::numerics::Numerics;

/// Segments of a launch.
pub const SEGS_MAX: usize = 8;
/// `flags`: `y` is float32, otherwise activations (rounded).
pub const FLAG_F32: u32 = 2;
/// `format` of a segment, as the kernels number them.
pub const BF16: u32 = 1;
/// `format` of a segment, as the kernels number them.
pub const FP8: u32 = 2;

/// Columns that a stage of the pipeline holds.
const STAGE_COLS: u32 = 64;
/// Outputs of a warp.
const WARP_OUTS: u32 = 64;
const QUANT_THREADS: u32 = 256;

kernel_args! {
    /// One matrix of a launch: `y[r, n] = sum over k of x[r, k] w[n, k]` for `rows` n and `cols` k.
    ///
    /// `w` is at its row 0, `scales` at the stored matrix's first scale; `row0` is the stored row that row 0 is (a
    /// multiple of 64). `x` and `w` are aligned to 16 bytes, `cols` a multiple of 64, `x_stride` of 8.
    /// `first_block` is filled in by the launch.
    pub struct GemmSeg {
        w: In<U8>, scales: In<U8>, x: In<Act>, y: u64, rows: u32, cols: u32, x_stride: u32, y_stride: u32,
        format: u32, flags: u32, row0: u32, first_block: u32,
    }

    /// `count` segments for the same `tokens` rows.
    pub struct GemmArgs { segs: [GemmSeg; 8], count: u32, tokens: u32 }

    /// Rows of `x` (at a distance of `x_stride` values) as E4M3 with a power-of-two scale per 128 rounds them.
    pub struct FakeQuantArgs { x: In<Act>, y: Out<Act>, rows: u32, cols: u32, x_stride: u32 }
}

/// A choice of tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GemmPoint {
    /// Rows of `x` of a block.
    pub tokens: u32,
    /// Outputs of a block.
    pub outs: u32,
    /// Warps that share the rows; each has 64 of the outputs.
    pub warps_m: u32,
    /// Stages of the copy pipeline.
    pub stages: u32,
    /// Tiles of rows that pass over all weights together.
    pub group: u32,
}

impl GemmPoint {
    /// Where nothing is measured.
    pub fn default_for(format: Format) -> GemmPoint {
        let stages = if format == Format::Bf16 { 2 } else { 3 };
        GemmPoint { tokens: 128, outs: 256, warps_m: 2, stages, group: 8 }
    }

    /// Threads of a block.
    pub fn threads(&self) -> u32 {
        32 * self.warps_m * (self.outs / WARP_OUTS)
    }

    /// Shared memory of a block, bytes.
    pub fn shared(&self, format: Format) -> u32 {
        self.stages * (self.tokens * STAGE_COLS * 2 + self.outs * row_bytes(format))
    }

    /// Whether the kernels can be compiled so: whole copies and mma tiles, registers and shared memory suffice.
    pub fn legal(&self, format: Format) -> bool {
        let bounded = (1..=8).contains(&self.warps_m)
            && (1..=512).contains(&self.outs)
            && (1..=512).contains(&self.tokens)
            && (2..=6).contains(&self.stages)
            && (1..=1 << 16).contains(&self.group);
        if !bounded || !self.outs.is_multiple_of(WARP_OUTS) {
            return false;
        }
        let (threads, warp_tokens) = (self.threads(), self.tokens / self.warps_m);
        let w_step = threads / (row_bytes(format) / 16);
        let copies = |total: u32, step: u32| step > 0 && total > 0 && total.is_multiple_of(step);
        self.tokens == warp_tokens * self.warps_m
            && matches!(warp_tokens, 32 | 64)
            && (128..=256).contains(&threads)
            && copies(self.tokens * 8, threads)
            && copies(self.outs * row_bytes(format) / 16, threads)
            && (w_step.is_multiple_of(64) || (w_step == 32 && format != Format::Fp4))
            && self.shared(format) <= SHARED_MAX
    }

    /// The macros of it.
    pub(crate) fn defines(&self) -> Vec<(String, String)> {
        vec![
            define("TILE_OUTS", self.outs),
            define("TILE_STAGES", self.stages),
            define("THREADS", self.threads()),
            define("TILE_TOKENS", self.tokens),
            define("TILE_WARPS_M", self.warps_m),
        ]
    }
}

/// Bytes of a stage's columns of one row of weights.
fn row_bytes(format: Format) -> u32 {
    match format {
        Format::Bf16 => STAGE_COLS * 2,
        Format::Fp8 => STAGE_COLS,
        Format::Fp4 => STAGE_COLS / 2,
        other => panic!("no tensor core product with {} weights", other.name()),
    }
}

/// What is compiled for weights of `format` (BF16 or FP8): `gemm_bf16`, or `gemm_fp8` and `fake_quant`.
pub fn unit(format: Format, point: GemmPoint) -> Unit {
    assert!(point.legal(format), "{point:?} for {}", format.name());
    let bf16 = match format {
        Format::Bf16 => true,
        Format::Fp8 => false,
        other => panic!("gemm has no kernel for {}", other.name()),
    };
    let mut defines = point.defines();
    defines.extend([
        define("FORMAT_BF16", u32::from(bf16)),
        define("GROUP", point.group),
        published(Numerics::Published),
    ]);
    defines.extend([define("QUANT_THREADS", QUANT_THREADS)]);
    defines.sort();
    let shared = point.shared(format);
    let kernels = match bf16 {
        true => vec![("gemm_bf16".into(), shared)],
        false => vec![("gemm_fp8".into(), shared), ("fake_quant".into(), 0)],
    };
    Unit {
        family: "gemm",
        source: concat!(include_str!("tile.cuh"), include_str!("gemm.cu")),
        args: GemmArgs::cuda() + &FakeQuantArgs::cuda(),
        defines,
        kernels,
    }
}

/// Launches the product of `tokens` rows with every segment, all of them of `format`, for which `kernel` is compiled.
pub fn launch(
    gpu: &dyn Gpu,
    kernel: Kernel,
    format: Format,
    point: GemmPoint,
    tokens: u32,
    segs: &[GemmSeg],
) -> Result<(), DeviceError> {
    let number = if format == Format::Bf16 { BF16 } else { FP8 };
    for segs in segs.chunks(SEGS_MAX) {
        let mut args = GemmArgs { segs: [segs[0]; SEGS_MAX], count: segs.len() as u32, tokens };
        let mut blocks = 0;
        for (to, seg) in args.segs.iter_mut().zip(segs) {
            check(seg, number);
            *to = GemmSeg { first_block: blocks, ..*seg };
            blocks += tokens.div_ceil(point.tokens) * seg.rows.div_ceil(point.outs);
        }
        let shape = Launch { grid: [blocks, 1, 1], threads: point.threads(), shared: point.shared(format) };
        gpu.launch(kernel, shape, args.bytes().as_slice())?;
    }
    Ok(())
}

fn check(seg: &GemmSeg, format: u32) {
    let (rows, cols, row0) = (seg.rows, seg.cols, seg.row0);
    assert!(seg.format == format, "a segment of format {} in a launch for {format}", seg.format);
    assert!(seg.flags & !FLAG_F32 == 0, "flags {:#x}: x is quantised before", seg.flags);
    assert!(rows > 0 && cols > 0 && cols.is_multiple_of(STAGE_COLS), "a matrix of {rows} x {cols}");
    assert!(row0.is_multiple_of(64), "row {row0} of a stored matrix: the scales of a warp differ");
    assert!(seg.x_stride.is_multiple_of(8) && seg.x.0.is_multiple_of(16), "rows of x are not aligned");
    assert!(seg.w.0.is_multiple_of(16), "weights are not aligned");
}

/// Rounds `args.rows` rows as FP8 activations; `args.cols` is a multiple of 128.
pub fn launch_fake_quant(gpu: &dyn Gpu, kernel: Kernel, args: FakeQuantArgs) -> Result<(), DeviceError> {
    assert!(args.cols.is_multiple_of(TILE as u32) && args.x_stride.is_multiple_of(8), "rows of {} values", args.cols);
    let groups = u64::from(args.rows) * u64::from(args.cols) / TILE;
    let blocks = groups.div_ceil(u64::from(QUANT_THREADS / 32 * 2)) as u32;
    gpu.launch(kernel, Launch::row(blocks, QUANT_THREADS), args.bytes().as_slice())
}
