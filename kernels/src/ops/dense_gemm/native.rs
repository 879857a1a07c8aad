//! y = x . W^T for the many rows of a prefill, on the block-scaled tensor cores of a GB10; published numerics only.
//!
//! A second form of [`gemm`](super::gemm) for FP8 weights, never the only one: it exists on [`ARCH`] alone, and
//! [`self_check`] decides at the start whether this GPU sums as widely as it must. `x` comes quantised
//! ([`Native::quantise`]); codes and scales are multiplied as they are, so that the result is that of the portable form
//! but for the order and the width of the sums.

use std::fmt;
use std::sync::Arc;

use dsv4_model::layout::{Format, TILE};

use crate::device::args::{Act, U8};
use crate::device::nvrtc::SHARED_MAX;
use crate::device::unit::{Unit, define, published};
use crate::device::{Buffer, DeviceError, Gpu, In, Kernel, KernelArgs, Launch, Out};
use crate::kernel_args;
use crate::numerics::{Numerics, e4m3_value, fake_fp8, ue8m0_value};
use crate::ops::dense_gemm::gemm::{self, FLAG_F32, FakeQuantArgs, GemmPoint, GemmSeg};

/// The only architecture that has these instructions.
pub const ARCH: &str = "sm_121a";
/// Segments of a launch.
pub const SEGS_MAX: usize = 8;
/// Columns that a stage of the pipeline holds.
const STAGE_COLS: u32 = 64;
/// Outputs and rows of a warp.
const WARP_OUTS: u32 = 64;
const WARP_TOKENS: u32 = 32;
const QUANT_THREADS: u32 = 256;

kernel_args! {
    /// One matrix of a launch: `y[r, n] = sum over k of x[r, k] w[n, k]` for `rows` n and `cols` k.
    ///
    /// `x` is E4M3 codes, `x_stride` of them from row to row, and `x_scales` has a byte for 128 of them, `scale_stride`
    /// from row to row. `w` is at its row 0, `scales` at the stored matrix's first scale; `row0` is the stored row that
    /// row 0 is (a multiple of 64). `x` and `w` are aligned to 16 bytes, `cols` is a multiple of 128, `x_stride` of 16.
    /// `first_block` is filled in by the launch.
    pub struct NativeSeg {
        w: In<U8>, scales: In<U8>, x: In<U8>, x_scales: In<U8>, y: u64, rows: u32, cols: u32, x_stride: u32,
        scale_stride: u32, y_stride: u32, flags: u32, row0: u32, first_block: u32,
    }

    /// `count` segments for the same `tokens` rows.
    pub struct NativeArgs { segs: [NativeSeg; 8], count: u32, tokens: u32 }

    /// Rows of `x` (at a distance of `x_stride` values) as E4M3 codes `[rows, cols]` and scales `[rows, cols / 128]`.
    pub struct NativeQuantArgs {
        x: In<Act>, codes: Out<U8>, scales: Out<U8>, rows: u32, cols: u32, x_stride: u32,
    }
}

/// A choice of tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NativePoint {
    /// Rows of `x` of a block.
    pub tokens: u32,
    /// Outputs of a block.
    pub outs: u32,
    /// Stages of the copy pipeline.
    pub stages: u32,
    /// Tiles of rows that pass over all weights together.
    pub group: u32,
}

impl NativePoint {
    /// By reasoning, not measured: two blocks of 8 warps fit a multiprocessor.
    pub const DEFAULT: NativePoint = NativePoint { tokens: 128, outs: 128, stages: 3, group: 8 };

    /// Threads of a block.
    pub fn threads(&self) -> u32 {
        32 * (self.tokens / WARP_TOKENS) * (self.outs / WARP_OUTS)
    }

    /// Shared memory of a block, bytes.
    pub fn shared(&self, format: Format) -> u32 {
        self.stages * (self.tokens * STAGE_COLS + self.outs * row_bytes(format))
    }

    /// Whether the kernels can be compiled so: whole warps and copies, shared memory suffices.
    pub fn legal(&self, format: Format) -> bool {
        let whole = self.tokens.is_multiple_of(WARP_TOKENS) && self.outs.is_multiple_of(WARP_OUTS);
        if !whole || self.tokens == 0 || self.outs == 0 || self.group == 0 {
            return false;
        }
        let threads = self.threads();
        let (x_step, w_step) = (threads / (STAGE_COLS / 16), threads / (row_bytes(format) / 16));
        (128..=512).contains(&threads)
            && self.tokens.is_multiple_of(x_step)
            && self.outs.is_multiple_of(w_step)
            && w_step.is_multiple_of(64)
            && (2..=6).contains(&self.stages)
            && self.shared(format) <= SHARED_MAX
    }

    /// The macros of it.
    pub(crate) fn defines(&self) -> Vec<(String, String)> {
        vec![
            define("THREADS", self.threads()),
            define("TILE_OUTS", self.outs),
            define("TILE_STAGES", self.stages),
            define("TILE_TOKENS", self.tokens),
        ]
    }
}

/// Bytes of a stage's columns of one row of weights.
fn row_bytes(format: Format) -> u32 {
    match format {
        Format::Fp8 => STAGE_COLS,
        Format::Fp4 => STAGE_COLS / 2,
        other => panic!("no block-scaled product with {} weights", other.name()),
    }
}

/// What is compiled: `native_fp8` and `native_quant`.
pub fn unit(point: NativePoint) -> Unit {
    assert!(point.legal(Format::Fp8), "{point:?}");
    let mut defines = point.defines();
    defines.extend([
        define("GROUP", point.group),
        define("QUANT_THREADS", QUANT_THREADS),
        published(Numerics::Published),
    ]);
    defines.sort();
    Unit {
        family: "native_gemm",
        source: concat!(
            include_str!("../../cuh/ptx_sm121.cuh"),
            include_str!("native_tile.cuh"),
            include_str!("native.cu")
        ),
        args: NativeArgs::cuda() + &NativeQuantArgs::cuda(),
        defines,
        kernels: vec![("native_fp8".into(), point.shared(Format::Fp8)), ("native_quant".into(), 0)],
    }
}

/// The loaded kernels.
#[derive(Clone, Copy)]
pub struct Native {
    point: NativePoint,
    fp8: Kernel,
    quant: Kernel,
}

impl Native {
    /// The kernels of [`unit`] of the same tiles, loaded.
    pub fn new(point: NativePoint, [fp8, quant]: [Kernel; 2]) -> Native {
        Native { point, fp8, quant }
    }

    /// Rounds `args.rows` rows as FP8 weights take them; `args.cols` is a multiple of 128.
    pub fn quantise(&self, gpu: &dyn Gpu, args: NativeQuantArgs) -> Result<(), DeviceError> {
        let cols = args.cols;
        assert!(cols.is_multiple_of(TILE as u32) && args.x_stride.is_multiple_of(8), "rows of {cols} values");
        let groups = u64::from(args.rows) * u64::from(cols) / TILE;
        let blocks = groups.div_ceil(u64::from(QUANT_THREADS / 32 * 2)) as u32;
        gpu.launch(self.quant, Launch::row(blocks, QUANT_THREADS), args.bytes().as_slice())
    }

    /// Launches the product of `tokens` rows with every segment.
    pub fn launch(&self, gpu: &dyn Gpu, tokens: u32, segs: &[NativeSeg]) -> Result<(), DeviceError> {
        let point = self.point;
        for segs in segs.chunks(SEGS_MAX) {
            let mut args = NativeArgs { segs: [segs[0]; SEGS_MAX], count: segs.len() as u32, tokens };
            let mut blocks = 0;
            for (to, seg) in args.segs.iter_mut().zip(segs) {
                check(seg);
                *to = NativeSeg { first_block: blocks, ..*seg };
                blocks += tokens.div_ceil(point.tokens) * seg.rows.div_ceil(point.outs);
            }
            let shape = Launch { grid: [blocks, 1, 1], threads: point.threads(), shared: point.shared(Format::Fp8) };
            gpu.launch(self.fp8, shape, args.bytes().as_slice())?;
        }
        Ok(())
    }
}

fn check(seg: &NativeSeg) {
    let (rows, cols, row0) = (seg.rows, seg.cols, seg.row0);
    assert!(seg.flags & !FLAG_F32 == 0, "flags {:#x}: x is quantised before", seg.flags);
    assert!(rows > 0 && cols > 0 && cols.is_multiple_of(TILE as u32), "a matrix of {rows} x {cols}");
    assert!(row0.is_multiple_of(64), "row {row0} of a stored matrix: the scales of a warp differ");
    assert!(seg.x_stride.is_multiple_of(16) && seg.x.0.is_multiple_of(16), "rows of x are not aligned");
    assert!(seg.w.0.is_multiple_of(16), "weights are not aligned");
}

/// Largest error of an output that a GPU may make, relative to the sum of the magnitudes of its products.
///
/// Float32 sums of the self-checks stay four times below it, also where every addition rounds towards zero; sums of 14
/// bits, which some tensor cores have for FP8, are a thousand times above.
pub const ERROR_MAX: f64 = 1.0 / (1 << 19) as f64;

/// How far the sums of a GPU were off.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Verdict {
    /// What was multiplied.
    pub product: &'static str,
    /// Worst error of the block-scaled form, relative to the sum of the magnitudes of an output's products.
    pub native: f64,
    /// The same of the portable form.
    pub portable: f64,
}

impl Verdict {
    /// Whether the block-scaled form may be used.
    pub fn accepted(&self) -> bool {
        self.native <= ERROR_MAX
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (what, outcome) = match self.accepted() {
            true => ("passed", "at most"),
            false => ("FAILED", "expected at most"),
        };
        let Verdict { product, native, portable } = self;
        write!(
            f,
            "check of block-scaled tensor cores {what}: {product} is off by {native:.1e} (portable: {portable:.1e}), "
        )?;
        write!(f, "{outcome} {ERROR_MAX:.1e}")
    }
}

/// Rows, outputs and columns of the product that is checked: a tile of several, and a sum long enough to show its width.
const CHECK: [usize; 3] = [96, 192, 1024];

/// Multiplies random codes with `native` and the portable `gemm_fp8` (with its tiles and `fake_quant`), and compares both
/// with sums in float64.
///
/// Errors: the GPU's. A GPU that multiplies wrongly is no error but a verdict.
pub fn self_check(
    gpu: &Arc<dyn Gpu>,
    native: &Native,
    (gemm_fp8, point): (Kernel, GemmPoint),
    fake_quant: Kernel,
) -> Result<Verdict, DeviceError> {
    let [tokens, outs, cols] = CHECK;
    let mut noise = Noise::new();
    let x: Vec<f32> = noise.activations(tokens * cols);
    let codes = noise.fp8_codes(outs * cols);
    let scales = noise.scales(outs.div_ceil(128) * cols / 128);
    let bits: Vec<u16> = x.iter().map(|v| (v.to_bits() >> 16) as u16).collect();
    let (x_at, w_at, scales_at) = (Buffer::of(gpu, &bits)?, Buffer::of(gpu, &codes)?, Buffer::of(gpu, &scales)?);
    let quantised = Buffer::new(gpu, (tokens * cols * 2) as u64)?;
    let y = Buffer::new(gpu, (tokens * outs * 4) as u64)?;
    let (rows, wide) = (tokens as u32, cols as u32);

    let x_scales = quantised.at() + (tokens * cols) as u64;
    let args = NativeQuantArgs {
        x: In::at(x_at.at()),
        codes: Out::at(quantised.at()),
        scales: Out::at(x_scales),
        rows,
        cols: wide,
        x_stride: wide,
    };
    native.quantise(gpu.as_ref(), args)?;
    let seg = NativeSeg {
        w: In::at(w_at.at()),
        scales: In::at(scales_at.at()),
        x: In::at(quantised.at()),
        x_scales: In::at(x_scales),
        y: y.at(),
        rows: outs as u32,
        cols: wide,
        x_stride: wide,
        scale_stride: wide / 128,
        y_stride: outs as u32,
        flags: FLAG_F32,
        row0: 0,
        first_block: 0,
    };
    native.launch(gpu.as_ref(), rows, &[seg])?;
    let by_native: Vec<f32> = y.values()?;

    let args = FakeQuantArgs { x: In::at(x_at.at()), y: Out::at(quantised.at()), rows, cols: wide, x_stride: wide };
    gemm::launch_fake_quant(gpu.as_ref(), fake_quant, args)?;
    let seg = GemmSeg {
        w: seg.w,
        scales: seg.scales,
        x: In::at(quantised.at()),
        y: y.at(),
        rows: outs as u32,
        cols: wide,
        x_stride: wide,
        y_stride: outs as u32,
        format: gemm::FP8,
        flags: FLAG_F32,
        row0: 0,
        first_block: 0,
    };
    gemm::launch(gpu.as_ref(), gemm_fp8, Format::Fp8, point, rows, &[seg])?;
    let by_portable: Vec<f32> = y.values()?;

    let mut rounded = x;
    fake_fp8(&mut rounded, TILE as usize);
    let w = |out: usize, col: usize| {
        f64::from(e4m3_value(codes[out * cols + col]) * ue8m0_value(scales[out / 128 * (cols / 128) + col / 128]))
    };
    let exact = Exact::new(&rounded, cols, outs, w);
    Ok(Verdict { product: "FP8 by FP8", native: exact.error(&by_native), portable: exact.error(&by_portable) })
}

/// Products in float64.
pub(crate) struct Exact {
    /// A sum and the sum of its summands' magnitudes.
    sums: Vec<(f64, f64)>,
}

impl Exact {
    /// Rows of `x` times `outs` rows of weights, given by row and column: `[rows, outs]`.
    pub(crate) fn new(x: &[f32], cols: usize, outs: usize, w: impl Fn(usize, usize) -> f64) -> Exact {
        let w: Vec<f64> = (0..outs * cols).map(|i| w(i / cols, i % cols)).collect();
        let sum = |x: &[f32], w: &[f64]| {
            let products = x.iter().zip(w).map(|(x, w)| f64::from(*x) * w);
            products.fold((0.0, 0.0), |(sum, size), p| (sum + p, size + p.abs()))
        };
        Exact { sums: x.chunks_exact(cols).flat_map(|x| w.chunks_exact(cols).map(move |w| sum(x, w))).collect() }
    }

    /// The worst error of `found`, relative to magnitudes; infinite where something is not a number.
    pub(crate) fn error(&self, found: &[f32]) -> f64 {
        assert_eq!(found.len(), self.sums.len());
        let of = |(found, (sum, size)): (&f32, &(f64, f64))| {
            let error = (f64::from(*found) - sum).abs() / size.max(f64::MIN_POSITIVE);
            if error.is_nan() { f64::INFINITY } else { error }
        };
        found.iter().zip(&self.sums).map(of).fold(0.0, f64::max)
    }
}

/// Numbers of the self-checks: the same on every start.
pub(crate) struct Noise(u64);

impl Noise {
    pub(crate) fn new() -> Noise {
        Noise(0x9e37_79b9_7f4a_7c15)
    }

    fn next(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 32) as u32
    }

    /// Bytes of any value.
    pub(crate) fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next() as u8).collect()
    }

    /// E4M3 codes: most of them between a quarter and two, so that a sum is many of its products' and not a few ones'.
    pub(crate) fn fp8_codes(&mut self, count: usize) -> Vec<u8> {
        let code = |any: u8, which: u32| match which % 256 {
            // Any but NaN.
            0 if any & 0x7f != 0x7f => any,
            _ => any & 0x80 | (0x28 + any % 24),
        };
        self.bytes(count).into_iter().map(|any| code(any, self.next())).collect()
    }

    /// UE8M0 scales from 2^-5 to 2^-2: a neighbour's is mostly another.
    pub(crate) fn scales(&mut self, count: usize) -> Vec<u8> {
        self.bytes(count).into_iter().map(|b| 122 + b % 4).collect()
    }

    /// Activations around zero, in groups of 128 of two sizes.
    pub(crate) fn activations(&mut self, count: usize) -> Vec<f32> {
        let mut out = Vec::with_capacity(count);
        while out.len() < count {
            let size = if self.next().is_multiple_of(2) { 1.0 } else { 2.0 };
            let group = TILE.min((count - out.len()) as u64);
            out.extend((0..group).map(|_| {
                let v = (self.next() as f32 / 4_294_967_296.0 - 0.5) * size;
                f32::from_bits(v.to_bits() & 0xffff_0000)
            }));
        }
        out
    }
}
