//! Products with weights: a few rows past streamed matrices, or tiles of many rows.

use dsv4_model::layout::Format;
use dsv4_model::{Block, Kind};

use crate::device::args::U8;
use crate::device::{DeviceError, In, Out};
use crate::gpu::GpuBackend;
use crate::gpu::kernels::{DECODE_ROWS, Long};
use crate::gpu::weights::DeviceMatrix;
use crate::ops::dense_gemm::gemm::{self, BF16, FLAG_F32, FP8, FakeQuantArgs, GemmSeg};
use crate::ops::dense_gemm::gemv::{Gemv, SEGMENTS_MAX, Segment};

/// `y = x . W^T` for some rows of a stored matrix.
#[derive(Clone, Copy)]
pub(super) struct Product {
    pub w: DeviceMatrix,
    /// Rows `first .. first + count` of it.
    pub first: u32,
    pub count: u32,
    /// Activations; all quantised products of a call have the same.
    pub x: u64,
    /// Activations between rows of `x`.
    pub x_stride: u32,
    pub y: u64,
    /// Values between rows of `y`.
    pub y_stride: u32,
    /// Activations are rounded to FP8 first, in published numerics.
    pub quantised: bool,
    /// The result stays float32.
    pub unrounded: bool,
}

impl Product {
    /// All of `w` times rows of `x`, which lie one after another, as those of `y` do.
    pub fn new(w: DeviceMatrix, x: u64, y: u64) -> Product {
        Product {
            w,
            first: 0,
            count: w.rows,
            x,
            x_stride: w.cols,
            y,
            y_stride: w.rows,
            quantised: w.format == Format::Fp8,
            unrounded: false,
        }
    }

    /// With a result that stays float32.
    pub fn unrounded(self) -> Product {
        Product { unrounded: true, ..self }
    }

    /// Address of the first row.
    pub(super) fn codes(&self) -> In<U8> {
        In::at(self.w.codes + u64::from(self.first) * self.w.layout.row_bytes)
    }
}

impl GpuBackend {
    /// The kernels of long steps, where this step is one.
    pub(super) fn long(&self) -> Option<&Long> {
        self.kernels.long.as_ref().filter(|_| self.current.rows > DECODE_ROWS)
    }

    pub(super) fn matrix(&self, block: Block, kind: Kind) -> DeviceMatrix {
        self.weights.matrix(block, kind)
    }

    /// Products of `rows` rows each.
    pub(super) fn multiply(&self, rows: u32, products: &[Product]) -> Result<(), DeviceError> {
        match self.long() {
            Some(long) => self.multiply_tiles(long, rows, products),
            None => self.multiply_streamed(rows, products),
        }
    }

    /// Matrices are read once for up to 8 rows.
    pub(super) fn multiply_streamed(&self, rows: u32, products: &[Product]) -> Result<(), DeviceError> {
        for products in products.chunks(SEGMENTS_MAX) {
            let segments: Vec<Segment> = products.iter().map(|p| self.segment(p)).collect();
            let kernel = self.gemv(rows, products);
            let point = self.kernels.tuning.gemv_for(kernel.rows, &segments);
            Gemv { point, ..*kernel }.launch(&self.stream, rows, &segments)?;
        }
        Ok(())
    }

    fn segment(&self, p: &Product) -> Segment {
        Segment {
            w: p.codes(),
            scales: p.w.scales(),
            x: In::at(p.x),
            y: p.y,
            rows: p.count,
            cols: p.w.cols,
            x_stride: p.x_stride,
            y_stride: p.y_stride,
            format: p.w.format,
            quantised: p.quantised && self.published(),
            unrounded: p.unrounded,
            row0: p.first,
        }
    }

    /// The kernel of the fewest rows that has all of them at once, or else of the most that fit a block.
    fn gemv(&self, rows: u32, products: &[Product]) -> &Gemv {
        let fits = |g: &&Gemv| products.iter().all(|p| Gemv::fits(g.rows, g.point, g.numerics, p.w.format, p.w.cols));
        let mut fitting = self.kernels.gemv.iter().filter(fits).peekable();
        while let Some(kernel) = fitting.next() {
            if kernel.rows >= rows || fitting.peek().is_none() {
                return kernel;
            }
        }
        panic!("rows of {:?} columns do not fit a block", products.iter().map(|p| p.w.cols).collect::<Vec<_>>());
    }

    fn multiply_tiles(&self, long: &Long, rows: u32, products: &[Product]) -> Result<(), DeviceError> {
        if let Some(native) = &long.native {
            self.multiply_native(native, rows, products)?;
        }
        let mut rounded = None;
        let (mut fp8, mut bf16) = (Vec::new(), Vec::new());
        for p in products.iter().filter(|p| long.native.is_none() || !p.is_native()) {
            let mut x = (p.x, p.x_stride);
            if p.quantised {
                if rounded.is_none() {
                    self.fake_quant(long, rows, p.w.cols, x)?;
                }
                assert_eq!(*rounded.get_or_insert(p.x), p.x, "quantised products of a call have the same activations");
                x = (self.work.quantised.at(), p.w.cols);
            }
            let (list, format) = match p.w.format {
                Format::Fp8 => (&mut fp8, FP8),
                Format::Bf16 => (&mut bf16, BF16),
                other => panic!("a product of {} weights", other.name()),
            };
            list.push(GemmSeg {
                w: p.codes(),
                scales: p.w.scales(),
                x: In::at(x.0),
                y: p.y,
                rows: p.count,
                cols: p.w.cols,
                x_stride: x.1,
                y_stride: p.y_stride,
                format,
                flags: if p.unrounded { FLAG_F32 } else { 0 },
                row0: p.first,
                first_block: 0,
            });
        }
        for ((kernel, point), format, segments) in [(long.fp8, Format::Fp8, fp8), (long.bf16, Format::Bf16, bf16)] {
            gemm::launch(&self.stream, kernel, format, point, rows, &segments)?;
        }
        Ok(())
    }

    /// Rows of `cols` activations at (address, stride), rounded, one after another.
    pub(super) fn fake_quant(&self, long: &Long, rows: u32, cols: u32, x: (u64, u32)) -> Result<(), DeviceError> {
        let y = Out::at(self.work.quantised.at());
        let args = FakeQuantArgs { x: In::at(x.0), y, rows, cols, x_stride: x.1 };
        gemm::launch_fake_quant(&self.stream, long.fake_quant, args)
    }
}
