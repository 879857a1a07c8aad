//! Decode: a few rows of activations past several matrices, each read once.
//!
//! Owns the launch of `gemv.cu`: which blocks take which tiles of which matrix, and how much shared memory they need.
//! A row's result does not depend on the other rows, on their number, nor on [`Segment`]s beside its own.

use serde::{Deserialize, Serialize};

use dsv4_model::layout::Format;

use crate::device::args::{Act, U8};
use crate::device::nvrtc::SHARED_MAX;
use crate::device::unit::{Unit, define, published};
use crate::device::{DeviceError, Gpu, In, Kernel, KernelArgs, Launch};
use crate::kernel_args;
use crate::numerics::Numerics;

/// Most segments of a launch.
pub const SEGMENTS_MAX: usize = 8;
/// Rows of a stored matrix that are worked on together.
pub const TILE_ROWS: u32 = 16;
/// Shared memory that a block takes beside what it asks for.
const SHARED_OF_BLOCK: u32 = 1 << 10;
/// Bytes of a stored row in one step of a warp.
pub const STEP_BYTES: u32 = 128;

/// Flag of a segment: activations are rounded to FP8 per 128 columns before use.
const QUANTISE: u32 = 1;
/// Flag of a segment: the result stays float32.
const Y_F32: u32 = 2;

kernel_args! {
    /// A matrix of a launch: see [`Segment`]. Its blocks are `first_block..`, each of `tiles` tiles of 16 rows.
    pub struct GemvSeg {
        w: In<U8>, scales: In<U8>, x: In<Act>, y: u64, rows: u32, cols: u32, x_stride: u32, y_stride: u32,
        format: u32, flags: u32, row0: u32, first_block: u32, tiles: u32, pad: u32,
    }
    /// `groups` groups of ROWS of the `rows` rows of activations; the first `count` segments count. A block asks for
    /// at most `prefetch` bytes into the L2 cache.
    pub struct GemvArgs { segments: [GemvSeg; 8], count: u32, rows: u32, groups: u32, prefetch: u32 }
}

/// One matrix with its input and output.
#[derive(Clone, Copy)]
pub struct Segment {
    /// Codes (or values) of its row 0, aligned to 16 bytes.
    pub w: In<U8>,
    /// Scales of the stored matrix, from that matrix's start; nothing without scales.
    pub scales: In<U8>,
    /// Activations: row n at `n * x_stride`; aligned to 16 bytes.
    pub x: In<Act>,
    /// Results: row n at `n * y_stride`; act, rounded, or float32.
    pub y: u64,
    /// Outputs.
    pub rows: u32,
    /// Inputs; a multiple of 64.
    pub cols: u32,
    /// Values between rows of `x`; a multiple of 8.
    pub x_stride: u32,
    /// Values between rows of `y`.
    pub y_stride: u32,
    /// How it is stored: F32, BF16 or FP8.
    pub format: Format,
    /// Published numerics: activations are rounded to FP8 per 128 columns first. FP8 only.
    pub quantised: bool,
    /// The result is float32, unrounded.
    pub unrounded: bool,
    /// Row of the stored matrix that row 0 is; a multiple of 16.
    pub row0: u32,
}

/// What can be tuned. `warps` also decides the order of sums: it is one for all of a machine's kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GemvPoint {
    /// Warps of a block.
    pub warps: u32,
    /// Steps (2 KB each) of a warp on their way, where rows of activations leave room for them.
    pub depth: u32,
    /// Blocks of a launch on a multiprocessor, where shared memory leaves room for the next launch's: the grid is as
    /// many, each with its share of the weights.
    pub blocks: u32,
    /// Weights that a block reads at most, about: larger matrices take more blocks.
    pub block_bytes: u32,
    /// Eighths of the L2 cache that a launch fills with weights before it waits for earlier kernels.
    pub ahead: u32,
}

impl GemvPoint {
    /// Where nothing was measured.
    pub const DEFAULT: GemvPoint = GemvPoint { warps: 8, depth: 2, blocks: 2, block_bytes: 256 << 10, ahead: 3 };

    /// Whether it compiles without spills and fits a block.
    pub fn legal(&self) -> bool {
        matches!(self.warps, 4 | 8 | 16)
            && (2..=4).contains(&self.depth)
            && (1..=4).contains(&self.blocks)
            && self.warps * self.depth <= 32
            && self.block_bytes.is_power_of_two()
            && (16 << 10..=1 << 20).contains(&self.block_bytes)
            && self.ahead <= AHEAD_MAX
    }

    /// All legal points.
    pub fn all() -> impl Iterator<Item = GemvPoint> {
        let grids = [1, 2].into_iter().flat_map(|blocks| [64 << 10, 256 << 10].map(|bytes| (blocks, bytes)));
        let rings = [4, 8, 16].into_iter().flat_map(|warps| (2..=4).map(move |depth| (warps, depth)));
        grids
            .flat_map(move |grid| rings.clone().map(move |ring| (grid, ring)))
            .flat_map(|((blocks, block_bytes), (warps, depth))| {
                [0, 2, 3].map(|ahead| GemvPoint { warps, depth, blocks, block_bytes, ahead })
            })
            .filter(GemvPoint::legal)
    }

    /// Steps of a warp on their way, beside `rows` rows of activations.
    pub(crate) fn depth_of(&self, rows: u32) -> u32 {
        if rows > 4 { 1 } else { self.depth }
    }
}

/// Most of the L2 cache that one launch asks for ahead, in eighths: what the launch at work has asked for
/// is still there.
pub(crate) const AHEAD_MAX: u32 = 4;
/// Shared memory of a block's rings.
pub(crate) fn ring_bytes(warps: u32, depth: u32) -> u32 {
    // Steps of 16 rows, and 4 bytes of scales for every lane.
    warps * depth * (TILE_ROWS * STEP_BYTES + 32 * 4)
}

/// Bytes that a block of `blocks` may ask for ahead, where a launch may fill `ahead` eighths of the L2 cache.
pub(crate) fn prefetch_bytes(gpu: &dyn Gpu, ahead: u32, blocks: u32) -> u32 {
    (gpu.facts().l2_bytes * u64::from(ahead) / 8 / u64::from(blocks.max(1)) / 128 * 128).min(1 << 30) as u32
}

/// Blocks that registers leave room for on a multiprocessor: 64 of a thread, so that two blocks of a launch and two of
/// the next fit; 80 where rows of activations or rings take the shared memory for that anyway.
pub(crate) fn resident(warps: u32, depth: u32, rows: u32) -> u32 {
    if rows > 2 || depth > 2 || warps < 8 { (24 / warps).max(1) } else { 32 / warps }
}

/// Text shared with the experts' kernels, before a kernel's own.
macro_rules! with_stream {
    ($source:literal) => {
        concat!(include_str!("../dense_gemm/stream.cuh"), include_str!($source))
    };
}
pub(crate) use with_stream;

/// What is compiled for `rows` (1, 2, 4 or 8) rows of activations in a block.
pub fn unit(rows: u32, point: GemvPoint, numerics: Numerics) -> Unit {
    assert!(matches!(rows, 1 | 2 | 4 | 8), "gemv of {rows} rows");
    Unit {
        family: "gemv",
        source: with_stream!("gemv.cu"),
        args: GemvArgs::cuda(),
        defines: vec![
            define("DEPTH", point.depth_of(rows)),
            published(numerics),
            define("QUANTISE", QUANTISE),
            define("RESIDENT", resident(point.warps, point.depth_of(rows), rows)),
            define("ROWS", rows),
            define("THREADS", point.warps * 32),
            define("WARPS", point.warps),
            define("Y_F32", Y_F32),
        ],
        kernels: vec![("gemv".into(), SHARED_MAX)],
    }
}

/// Bytes of a stored row.
fn row_bytes(format: Format, cols: u32) -> u32 {
    match format {
        Format::F32 | Format::I64 => cols * 4,
        Format::Bf16 => cols * 2,
        Format::Fp8 => cols,
        Format::Fp4 => cols / 2,
    }
}

/// Steps of a row.
pub(crate) fn steps_of(row_bytes: u32) -> u32 {
    row_bytes.div_ceil(STEP_BYTES)
}

/// Warps that share a tile: a power of two, as many as there are and as there are steps.
pub(crate) fn split_of(steps: u32, warps: u32) -> u32 {
    1 << steps.min(warps).max(1).ilog2()
}

/// Shared memory of a row of activations: units of 16 bytes for 8 columns, `units` of them under 16 bytes of weights.
pub(crate) fn x_row_bytes(steps: u32, units: u32) -> u32 {
    steps * units * 128 + 64
}

/// Compiled for `rows` rows in a block.
#[derive(Clone, Copy, Debug)]
pub struct Gemv {
    /// The kernel of [`unit`].
    pub kernel: Kernel,
    /// Rows of activations that a block has.
    pub rows: u32,
    /// As compiled.
    pub point: GemvPoint,
    /// As compiled.
    pub numerics: Numerics,
}

impl Gemv {
    /// Shared memory of a block with `tiles` tiles of a matrix, bytes.
    fn shared(&self, format: Format, cols: u32, tiles: u32) -> u32 {
        let parts = |split| tiles * split * self.rows * TILE_ROWS * 4;
        let units = match format {
            Format::Bf16 => 1,
            _ => 2,
        };
        if self.numerics == Numerics::Float || format == Format::F32 {
            return self.rows * cols * 4 + parts(1);
        }
        let steps = steps_of(row_bytes(format, cols));
        let ring = ring_bytes(self.point.warps, self.point.depth_of(self.rows));
        ring + self.rows * (x_row_bytes(steps, units) + steps * 4) + parts(split_of(steps, self.point.warps))
    }

    /// Tiles that a block takes of a matrix: about `bytes`, all warps busy, within shared memory, blocks alike.
    /// 0: not even one fits.
    fn tiles(&self, s: &Segment, bytes: u32) -> u32 {
        let row = row_bytes(s.format, s.cols);
        let busy = self.point.warps / split_of(steps_of(row), self.point.warps);
        let all = s.rows.div_ceil(TILE_ROWS);
        let wanted = (bytes / (row * TILE_ROWS)).max(1).next_multiple_of(busy).min(all);
        let fit = |tiles: &u32| self.shared(s.format, s.cols, *tiles) <= SHARED_MAX;
        match (1..=wanted).rev().find(fit) {
            Some(tiles) => all.div_ceil(all.div_ceil(tiles)).next_multiple_of(busy).min(tiles),
            None => 0,
        }
    }

    /// Blocks of one launch that are at work together.
    fn slots(&self, gpu: &dyn Gpu, segments: &[&Segment]) -> u32 {
        let block = segments.iter().map(|s| self.shared(s.format, s.cols, 1)).max().unwrap_or(0) + SHARED_OF_BLOCK;
        let fit = gpu.facts().shared_bytes / block;
        // Many rows of activations leave no room for a second launch anyway.
        let fit = if self.rows > 2 { fit } else { fit / 2 };
        gpu.facts().multiprocessors * fit.clamp(1, self.point.blocks)
    }

    /// Tiles that a block takes of each matrix, so that no more than `slots` blocks share all of them, unless a
    /// block's share would be more than it may be.
    fn shares(&self, segments: &[&Segment], slots: u32) -> Vec<u32> {
        let bytes = |s: &&Segment| u64::from(s.rows) * u64::from(row_bytes(s.format, s.cols));
        let total: u64 = segments.iter().map(bytes).sum();
        let mut share = (total / u64::from(slots.max(1))).min(self.point.block_bytes.into()) as u32;
        loop {
            let tiles: Vec<u32> = segments.iter().map(|s| self.tiles(s, share)).collect();
            let blocks: u32 =
                segments.iter().zip(&tiles).map(|(s, t)| s.rows.div_ceil(TILE_ROWS).div_ceil((*t).max(1))).sum();
            if blocks <= slots || share >= self.point.block_bytes {
                return tiles;
            }
            share = (share + share / 8 + 64).min(self.point.block_bytes);
        }
    }

    /// Whether its blocks have room for rows of `cols` activations of such matrices.
    pub fn fits(rows: u32, point: GemvPoint, numerics: Numerics, format: Format, cols: u32) -> bool {
        Gemv { kernel: Kernel(0), rows, point, numerics }.shared(format, cols, 1) <= SHARED_MAX
    }

    /// Multiplies `rows` rows of activations with up to [`SEGMENTS_MAX`] matrices.
    ///
    /// Panics if a segment is not as [`Segment`] says or does not fit ([`Gemv::fits`]): both follow from the model.
    pub fn launch(&self, gpu: &dyn Gpu, rows: u32, segments: &[Segment]) -> Result<(), DeviceError> {
        assert!((1..=SEGMENTS_MAX).contains(&segments.len()), "{} segments", segments.len());
        let empty = GemvSeg {
            w: In::none(),
            scales: In::none(),
            x: In::none(),
            y: 0,
            rows: 0,
            cols: 0,
            x_stride: 0,
            y_stride: 0,
            format: 0,
            flags: 0,
            row0: 0,
            first_block: 0,
            tiles: 0,
            pad: 0,
        };
        let mut args = GemvArgs {
            segments: [empty; 8],
            count: segments.len() as u32,
            rows,
            groups: rows.div_ceil(self.rows),
            prefetch: 0,
        };
        let segments: Vec<&Segment> = segments.iter().collect();
        let shares = self.shares(&segments, self.slots(gpu, &segments) / args.groups.max(1));
        // The longest blocks start first.
        let mut order: Vec<(&Segment, u32)> = segments.into_iter().zip(shares).collect();
        order.sort_by_key(|(s, tiles)| std::cmp::Reverse(tiles * row_bytes(s.format, s.cols)));
        let (mut blocks, mut shared) = (0, 0);
        for (out, (s, tiles)) in args.segments.iter_mut().zip(order) {
            assert!(tiles > 0, "gemv: {} rows of {} columns are more than a block holds", self.rows, s.cols);
            assert!(
                s.cols.is_multiple_of(64) && s.x_stride.is_multiple_of(8) && s.row0.is_multiple_of(TILE_ROWS),
                "gemv: {} columns, x rows {} apart, first row {}",
                s.cols,
                s.x_stride,
                s.row0
            );
            assert!(s.w.0.is_multiple_of(16) && s.x.0.is_multiple_of(16), "gemv: {:x}, {:x}", s.w.0, s.x.0);
            let format = match s.format {
                Format::F32 => 0,
                Format::Bf16 => 1,
                Format::Fp8 => 2,
                other => panic!("gemv of {} weights", other.name()),
            };
            assert!(
                !s.quantised || s.format == Format::Fp8,
                "gemv: quantised activations of {} weights",
                s.format.name()
            );
            *out = GemvSeg {
                w: s.w,
                scales: s.scales,
                x: s.x,
                y: s.y,
                rows: s.rows,
                cols: s.cols,
                x_stride: s.x_stride,
                y_stride: s.y_stride,
                format,
                flags: if s.quantised { QUANTISE } else { 0 } | if s.unrounded { Y_F32 } else { 0 },
                row0: s.row0,
                first_block: blocks,
                tiles,
                pad: 0,
            };
            blocks += s.rows.div_ceil(TILE_ROWS).div_ceil(tiles);
            shared = shared.max(self.shared(s.format, s.cols, tiles));
        }
        args.prefetch = prefetch_bytes(gpu, self.point.ahead, blocks);
        let shape = Launch { grid: [blocks * args.groups, 1, 1], threads: self.point.warps * 32, shared };
        gpu.launch(self.kernel, shape, args.bytes().as_slice())
    }
}
