//! Experts for the many rows of a prefill, on the block-scaled tensor cores of a GB10; published numerics only.
//!
//! A second form of the matmuls of [`prefill`](super::prefill), never the only one: it exists on
//! [`ARCH`](crate::ops::dense_gemm::native::ARCH) alone, and [`self_check`] decides at the start whether it is used. In order:
//! `Prefill::sort`, [`NativeExperts::up`], [`NativeExperts::up_shared`], then for every slice of the outputs
//! [`NativeExperts::down`], the shared expert's `dense_gemm::native` into slot K, and `Prefill::sum`. What lies between
//! the matmuls is codes and scales.

use std::sync::Arc;

use dsv4_model::layout::{Format, MatrixLayout};

use crate::device::args::{F32, U8, U32};
use crate::device::unit::{Unit, define, published};
use crate::device::{Buffer, DeviceError, Gpu, In, Kernel, KernelArgs, Launch, Out};
use crate::kernel_args;
use crate::numerics::{Numerics, e2m1_value, e4m3_value, ue8m0_value};
use crate::ops::dense_gemm::gemm::GemmPoint;
use crate::ops::dense_gemm::native::{Exact, NativePoint, Noise, Verdict};
use crate::ops::moe_gemm::prefill::{self, MoeSizes, Prefill};

kernel_args! {
    /// Both first matmuls and the activation: `x` `[rows, D]` and `mid` `[rows, K + 1, F]` codes, with a scale for 128.
    ///
    /// Matrices of a stack are `stride` bytes apart, their scales `scales_at` bytes behind their start.
    pub struct NativeUpArgs {
        x: In<U8>, x_scales: In<U8>, w1: In<U8>, w3: In<U8>, stride: u64, scales_at: u64, pairs: In<U32>,
        tiles: In<U32>, tile_count: In<U32>, weights: In<F32>, mid: Out<U8>, mid_scales: Out<U8>, limit: f32, rows: u32,
    }

    /// The last matmul of the routed experts, for outputs `first_out .. first_out + outs`: `out` `[rows, K + 1, outs]`.
    pub struct NativeDownArgs {
        mid: In<U8>, mid_scales: In<U8>, w2: In<U8>, stride: u64, scales_at: u64, pairs: In<U32>, tiles: In<U32>,
        tile_count: In<U32>, out: Out<F32>, first_out: u32, outs: u32,
    }
}

/// Outputs of w1, and of w3, of a block: a group that is rounded together.
const BLOCK_F: u32 = 128;
const KERNELS: [&str; 3] = ["native_moe_up", "native_moe_up_shared", "native_moe_down"];

/// The tiles that go with those of `prefill`: the list of pairs is the same. Two blocks fit a multiprocessor.
pub fn point_for(prefill: GemmPoint) -> NativePoint {
    NativePoint { tokens: prefill.tokens, outs: 2 * BLOCK_F, stages: 4, group: 1 }
}

/// The tiles of the shared expert, whose weights are twice as large.
fn shared_point(point: NativePoint) -> NativePoint {
    NativePoint { stages: 2, ..point }
}

/// Whether a choice of tiles can be compiled: as for a product, and a block has whole groups to round.
pub fn legal(point: NativePoint) -> bool {
    point.outs == 2 * BLOCK_F && point.legal(Format::Fp4) && shared_point(point).legal(Format::Fp8)
}

/// What is compiled.
pub fn unit(sizes: MoeSizes, point: NativePoint) -> Unit {
    assert!(legal(point), "{point:?}");
    assert!(sizes.hidden.is_multiple_of(128) && sizes.inner.is_multiple_of(BLOCK_F), "{sizes:?}");
    let mut defines = point.defines();
    defines.extend([
        define("D", sizes.hidden),
        define("F", sizes.inner),
        define("SHARED_STAGES", shared_point(point).stages),
        define("TOP_K", sizes.top_k),
        published(Numerics::Published),
    ]);
    defines.sort();
    let shared = |name: &str| match name {
        "native_moe_up_shared" => shared_point(point).shared(Format::Fp8),
        _ => point.shared(Format::Fp4),
    };
    Unit {
        family: "native_moe",
        source: concat!(
            include_str!("../../cuh/ptx_sm121.cuh"),
            include_str!("../dense_gemm/native_tile.cuh"),
            include_str!("native.cu")
        ),
        args: NativeUpArgs::cuda() + &NativeDownArgs::cuda(),
        defines,
        kernels: KERNELS.map(|name| (name.to_owned(), shared(name))).into(),
    }
}

/// The loaded kernels.
#[derive(Clone, Copy)]
pub struct NativeExperts {
    sizes: MoeSizes,
    point: NativePoint,
    kernels: [Kernel; 3],
}

impl NativeExperts {
    /// The kernels of [`unit`] of the same sizes and tiles, loaded.
    pub fn new(sizes: MoeSizes, point: NativePoint, kernels: [Kernel; 3]) -> NativeExperts {
        NativeExperts { sizes, point, kernels }
    }

    /// The routed experts up to the last matmul, for `args.rows` rows sorted in tiles of as many tokens.
    pub fn up(&self, gpu: &dyn Gpu, args: NativeUpArgs) -> Result<(), DeviceError> {
        let grid = [self.sizes.inner / BLOCK_F, self.tiles_max(args.rows), 1];
        let shape = Launch { grid, threads: self.point.threads(), shared: self.point.shared(Format::Fp4) };
        gpu.launch(self.kernels[0], shape, args.bytes().as_slice())
    }

    /// The shared expert likewise, into slot K: FP8 matrices, no pairs, tiles or weights.
    pub fn up_shared(&self, gpu: &dyn Gpu, args: NativeUpArgs) -> Result<(), DeviceError> {
        let grid = [self.sizes.inner / BLOCK_F, args.rows.div_ceil(self.point.tokens), 1];
        let shared = shared_point(self.point).shared(Format::Fp8);
        gpu.launch(self.kernels[1], Launch { grid, threads: self.point.threads(), shared }, args.bytes().as_slice())
    }

    /// The routed experts' last matmul for `rows` rows. Slices start and end at multiples of 64 outputs.
    pub fn down(&self, gpu: &dyn Gpu, rows: u32, args: NativeDownArgs) -> Result<(), DeviceError> {
        let (first, outs) = (args.first_out, args.outs);
        let inside = first + outs <= self.sizes.hidden && outs > 0;
        assert!(inside && first.is_multiple_of(64) && outs.is_multiple_of(64), "outputs {first}+{outs}");
        let grid = [outs.div_ceil(self.point.outs), self.tiles_max(rows), 1];
        let shape = Launch { grid, threads: self.point.threads(), shared: self.point.shared(Format::Fp4) };
        gpu.launch(self.kernels[2], shape, args.bytes().as_slice())
    }

    fn tiles_max(&self, rows: u32) -> u32 {
        let (sizes, tokens) = (self.sizes, self.point.tokens);
        prefill::tiles_max(sizes, tokens, rows)
    }
}

/// Outputs of the product that is checked.
const CHECK_OUTS: u32 = 128;

/// Multiplies random codes with `native_moe_down` and the portable `moe_down`, and compares both with sums in float64.
///
/// Errors: the GPU's. A GPU that multiplies wrongly is no error but a verdict.
pub fn self_check(gpu: &Arc<dyn Gpu>, native: &NativeExperts, portable: &Prefill) -> Result<Verdict, DeviceError> {
    let (sizes, count) = (native.sizes, native.point.tokens);
    let (k, cols, outs) = (sizes.top_k as usize, sizes.inner as usize, CHECK_OUTS.min(sizes.hidden));
    let rows = count.div_ceil(sizes.top_k);
    let slots = rows as usize * (k + 1);
    let layout = MatrixLayout::new(Format::Fp4, u64::from(outs), u64::from(sizes.inner));
    let mut noise = Noise::new();
    let mut w = noise.bytes(layout.stride as usize);
    let scales = noise.scales(layout.scales_bytes as usize);
    w[layout.scales_offset as usize..][..scales.len()].copy_from_slice(&scales);
    let codes = noise.fp8_codes(slots * cols);
    let mid_scales = noise.scales(slots * cols / 128);
    let value = |i: usize| e4m3_value(codes[i]) * ue8m0_value(mid_scales[i / 128]);
    let mid: Vec<f32> = (0..slots * cols).map(value).collect();
    // Exactly bfloat16: an E4M3 value and a power of two.
    let bits: Vec<u16> = mid.iter().map(|v| (v.to_bits() >> 16) as u16).collect();
    let pairs: Vec<u32> = (0..count).collect();

    let (w_at, pairs_at) = (Buffer::of(gpu, &w)?, Buffer::of(gpu, &pairs)?);
    let (tiles, tile_count) = (Buffer::of(gpu, &[0, 0, count, 0])?, Buffer::of(gpu, &[1u32])?);
    let (codes_at, scales_at, bits_at) =
        (Buffer::of(gpu, &codes)?, Buffer::of(gpu, &mid_scales)?, Buffer::of(gpu, &bits)?);
    let out = Buffer::new(gpu, (slots as u64) * u64::from(outs) * 4)?;
    let args = NativeDownArgs {
        mid: In::at(codes_at.at()),
        mid_scales: In::at(scales_at.at()),
        w2: In::at(w_at.at()),
        stride: layout.stride,
        scales_at: layout.scales_offset,
        pairs: In::at(pairs_at.at()),
        tiles: In::at(tiles.at()),
        tile_count: In::at(tile_count.at()),
        out: Out::at(out.at()),
        first_out: 0,
        outs,
    };
    native.down(gpu.as_ref(), rows, args)?;
    let by_native: Vec<f32> = out.values()?;
    let args = prefill::MoeDownArgs {
        mid: In::at(bits_at.at()),
        w2: args.w2,
        stride: args.stride,
        scales_at: args.scales_at,
        pairs: args.pairs,
        tiles: args.tiles,
        tile_count: args.tile_count,
        out: args.out,
        first_out: 0,
        outs,
    };
    portable.down(gpu.as_ref(), rows, args)?;
    let by_portable: Vec<f32> = out.values()?;

    let of_pairs = |values: &[f32], width: usize| -> Vec<f32> {
        let slot = |p: usize| (p + p / k) * width;
        (0..count as usize).flat_map(|p| values[slot(p)..][..width].to_vec()).collect()
    };
    let w = |out: usize, col: usize| {
        let byte = w[out * cols / 2 + col / 2];
        let code = if col.is_multiple_of(2) { byte & 15 } else { byte >> 4 };
        f64::from(e2m1_value(code) * ue8m0_value(scales[out * (cols / 32) + col / 32]))
    };
    let exact = Exact::new(&of_pairs(&mid, cols), cols, outs as usize, w);
    let error = |values: &[f32]| exact.error(&of_pairs(values, outs as usize));
    Ok(Verdict { product: "FP4 by FP8", native: error(&by_native), portable: error(&by_portable) })
}
