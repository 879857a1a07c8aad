//! Decode: the experts of a few rows; rows that chose the same one share its weights.
//!
//! Owns the launches of `decode.cu`. A row's result does not depend on the other rows nor on their number.

use serde::{Deserialize, Serialize};

use dsv4_model::layout::{Format, MatrixLayout};

use crate::device::args::{Act, F32, U8, U32};
use crate::device::nvrtc::SHARED_MAX;
use crate::device::unit::{Unit, define, published};
use crate::device::{DeviceError, Gpu, In, Kernel, KernelArgs, Launch, Out};
use crate::kernel_args;
use crate::numerics::Numerics;
use crate::ops::dense_gemm::gemv::{
    AHEAD_MAX, TILE_ROWS, prefetch_bytes, resident, ring_bytes, split_of, steps_of, with_stream, x_row_bytes,
};

kernel_args! {
    /// `x [rows, D]`, stacks of `w1` and `w3` with matrices `stride` bytes apart, `chosen` and `weights` `[rows, K]`,
    /// `mid [rows, K+1, F]`; no clamp where `limit` is 0. The launch sets `prefetch`: bytes that a block may ask for
    /// ahead.
    pub struct MoeUpArgs {
        x: In<Act>, w1: In<U8>, w3: In<U8>, stride: u64, shared_w1: In<U8>, shared_w3: In<U8>,
        chosen: In<U32>, weights: In<F32>, mid: Out<Act>, limit: f32, rows: u32, prefetch: u32,
    }
    /// `mid [rows, K+1, F]`, the stack of `w2`, `chosen [rows, K]`, `y [rows, D]`; `prefetch` as above.
    pub struct MoeDownArgs {
        mid: In<Act>, w2: In<U8>, stride: u64, shared_w2: In<U8>, chosen: In<U32>, y: Out<F32>, rows: u32, prefetch: u32,
    }
}

/// Sizes of a rank's experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Experts {
    /// Model width; a multiple of 64.
    pub hidden: u32,
    /// This rank's part of an expert's width, routed and shared; a multiple of 64.
    pub inner: u32,
    /// Routed experts of a row.
    pub chosen: u32,
}

/// Rows among which `moe_up` looks for equal experts.
const WINDOW: u32 = 16;

impl Experts {
    /// Whether there are kernels for them. A warp looks for equal experts, so a row's choice is among its lanes.
    pub fn are_possible(&self) -> bool {
        self.hidden.is_multiple_of(64) && self.inner.is_multiple_of(64) && (1..=32).contains(&self.chosen)
    }

    /// Shared memory of the lists of pairs and experts of [`WINDOW`] rows, bytes; of few experts
    /// more than there are, which leaves room for what else is static.
    fn lists_bytes(&self) -> u32 {
        ((WINDOW * self.chosen + 1) * 4).max(1024)
    }

    /// Bytes between the matrices of a stack: (w1 and w3, w2).
    pub fn strides(&self) -> (u64, u64) {
        let (d, f) = (u64::from(self.hidden), u64::from(self.inner));
        (MatrixLayout::new(Format::Fp4, f, d).stride, MatrixLayout::new(Format::Fp4, d, f).stride)
    }
}

/// What can be tuned. `warps` also decides the order of sums: it is one for all of a machine's kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MoePoint {
    /// Warps of a block.
    pub warps: u32,
    /// Steps (2 KB each) of a warp on their way, where rows of activations leave room for them.
    pub depth: u32,
    /// Tiles of 16 expert rows of a `moe_up` block, of both matrices.
    pub up_tiles: u32,
    /// Tiles of 16 output rows of a `moe_down` block, of all experts.
    pub down_tiles: u32,
    /// Eighths of the L2 cache that a launch fills with weights before it waits for earlier kernels.
    pub ahead: u32,
}

impl MoePoint {
    /// Where nothing was measured.
    pub const DEFAULT: MoePoint = MoePoint { warps: 8, depth: 2, up_tiles: 1, down_tiles: 1, ahead: 3 };

    /// Whether it compiles without spills and fits a block, with `rows` rows of the shared expert in a block.
    pub fn legal(&self, experts: Experts, rows: u32, numerics: Numerics) -> bool {
        let room = SHARED_MAX - experts.lists_bytes();
        self.is_bounded()
            && up_shared(experts, *self, rows, numerics) <= room
            && down_shared(experts, *self, rows, numerics) <= room
    }

    /// What holds of a legal point whatever the model.
    pub fn is_bounded(&self) -> bool {
        matches!(self.warps, 4 | 8 | 16)
            && (2..=4).contains(&self.depth)
            && self.warps * self.depth <= 32
            && (1..=8).contains(&self.up_tiles)
            && (1..=8).contains(&self.down_tiles)
            && self.ahead <= AHEAD_MAX
    }

    /// All legal points.
    pub fn all(experts: Experts, rows: u32, numerics: Numerics) -> impl Iterator<Item = MoePoint> {
        let tiles = [1, 2, 4].into_iter().flat_map(|up| [1, 2, 4].map(|down| (up, down)));
        tiles
            .flat_map(|(up_tiles, down_tiles)| [4, 8, 16].map(|warps| (up_tiles, down_tiles, warps)))
            .flat_map(|(up_tiles, down_tiles, warps)| {
                let ring = (2..=4).flat_map(|depth| [0, 3].map(|ahead| (depth, ahead)));
                ring.map(move |(depth, ahead)| MoePoint { warps, depth, up_tiles, down_tiles, ahead })
            })
            .filter(move |p| p.legal(experts, rows, numerics))
    }

    /// Steps of a warp on their way, beside `rows` rows of activations.
    pub(crate) fn depth_of(&self, rows: u32) -> u32 {
        if rows > 2 { 1 } else { self.depth }
    }
}

/// Rows whose experts a `moe_down` block reads once, and pairs that share a `moe_up` block.
pub(crate) fn at_once(experts: Experts, rows: u32, numerics: Numerics) -> u32 {
    match numerics {
        // A warp looks for equal experts: a pair of row and slot is a lane's.
        Numerics::Published => rows.min(4).min(32 / experts.chosen).max(1),
        Numerics::Float => 1,
    }
}

/// What is compiled; `rows` (1, 2, 4 or 8) rows share the shared expert's weights in a block of `moe_up`.
pub fn unit(experts: Experts, rows: u32, point: MoePoint, numerics: Numerics) -> Unit {
    assert!(matches!(rows, 1 | 2 | 4 | 8), "moe of {rows} rows");
    assert!(experts.are_possible(), "moe of {experts:?}");
    // Float32 sums need more registers than 64 (NVRTC 13.0.88, sm_90a: 16 of them would be spilled), as do two rows wider
    // than Flash's (sm_121a: 3).
    let blocks = match numerics {
        Numerics::Published if rows == 2 && experts.hidden > 4096 => (24 / point.warps).max(1),
        Numerics::Published => resident(point.warps, point.depth_of(rows), rows),
        Numerics::Float => (24 / point.warps).max(1),
    };
    Unit {
        family: "moe_decode",
        source: with_stream!("../moe_gemm/decode.cu"),
        args: MoeUpArgs::cuda() + &MoeDownArgs::cuda(),
        defines: vec![
            define("D", experts.hidden),
            define("DEPTH", point.depth_of(rows)),
            define("DOWN_TILES", point.down_tiles),
            define("F", experts.inner),
            define("GROUP", at_once(experts, rows, numerics)),
            define("K", experts.chosen),
            published(numerics),
            define("RESIDENT", blocks),
            define("ROWS", rows),
            define("SHARE", at_once(experts, rows, numerics)),
            define("THREADS", point.warps * 32),
            define("UP_TILES", point.up_tiles),
            define("WARPS", point.warps),
            define("WINDOW", WINDOW),
        ],
        kernels: vec![
            ("moe_up".into(), up_shared(experts, point, rows, numerics)),
            ("moe_down".into(), down_shared(experts, point, rows, numerics)),
        ],
    }
}

/// Shared memory of a `moe_up` block, bytes.
fn up_shared(experts: Experts, point: MoePoint, rows: u32, numerics: Numerics) -> u32 {
    let parts = |rows, split| 2 * point.up_tiles * split * rows * TILE_ROWS * 4;
    if numerics == Numerics::Float {
        return rows * experts.hidden * 4 + parts(rows, 1);
    }
    let (fp4, fp8) = (steps_of(experts.hidden / 2), steps_of(experts.hidden));
    let at_once = at_once(experts, rows, numerics);
    let routed = at_once * x_row_bytes(fp4, 4) + parts(at_once, split_of(fp4, point.warps));
    let shared = rows * (x_row_bytes(fp8, 2) + fp8 * 4) + parts(rows, split_of(fp8, point.warps));
    ring_bytes(point.warps, point.depth_of(rows)) + routed.max(shared)
}

/// Shared memory of a `moe_down` block, bytes.
fn down_shared(experts: Experts, point: MoePoint, rows: u32, numerics: Numerics) -> u32 {
    let Experts { inner, chosen, .. } = experts;
    let routed_parts = chosen * point.down_tiles * TILE_ROWS * 4;
    if numerics == Numerics::Float {
        return (chosen + 1) * inner * 4 + routed_parts + point.down_tiles * TILE_ROWS * 4;
    }
    let (fp4, fp8) = (steps_of(inner / 2), steps_of(inner));
    let last_parts = point.down_tiles * split_of(fp8, point.warps / 4) * TILE_ROWS * 4;
    let row = chosen * x_row_bytes(fp4, 4) + x_row_bytes(fp8, 2) + fp8 * 4 + routed_parts + last_parts;
    ring_bytes(point.warps, point.depth_of(rows)) + at_once(experts, rows, numerics) * row
}

/// Compiled experts of a layer's shape.
#[derive(Clone, Copy, Debug)]
pub struct MoeDecode {
    /// `moe_up` of [`unit`].
    pub up: Kernel,
    /// `moe_down` of [`unit`].
    pub down: Kernel,
    /// As compiled.
    pub experts: Experts,
    /// As compiled.
    pub rows: u32,
    /// As compiled.
    pub point: MoePoint,
    /// As compiled.
    pub numerics: Numerics,
}

impl MoeDecode {
    /// The first two matrices of every expert and the activation between.
    pub fn launch_up(&self, gpu: &dyn Gpu, mut args: MoeUpArgs) -> Result<(), DeviceError> {
        let blocks = self.experts.inner.div_ceil(TILE_ROWS).div_ceil(self.point.up_tiles);
        let groups = args.rows.div_ceil(self.rows);
        // Only the shared expert's blocks know what to ask for.
        args.prefetch = prefetch_bytes(gpu, self.point.ahead, blocks * groups);
        let shared = up_shared(self.experts, self.point, self.rows, self.numerics);
        let grid = [blocks * (groups + args.rows * self.experts.chosen), 1, 1];
        let shape = Launch { grid, threads: self.point.warps * 32, shared };
        gpu.launch(self.up, shape, args.bytes().as_slice())
    }

    /// The last matrix of every expert, summed; right behind [`MoeDecode::launch_up`] (it reads `chosen` before it
    /// waits for the kernel ahead).
    pub fn launch_down(&self, gpu: &dyn Gpu, mut args: MoeDownArgs) -> Result<(), DeviceError> {
        let blocks = self.experts.hidden.div_ceil(TILE_ROWS).div_ceil(self.point.down_tiles);
        let groups = args.rows.div_ceil(at_once(self.experts, self.rows, self.numerics));
        args.prefetch = prefetch_bytes(gpu, self.point.ahead, blocks * groups);
        let shared = down_shared(self.experts, self.point, self.rows, self.numerics);
        let shape = Launch { grid: [blocks * groups, 1, 1], threads: self.point.warps * 32, shared };
        gpu.launch(self.down, shape, args.bytes().as_slice())
    }
}
