//! Long steps on block-scaled tensor cores: the products of quantised activations, and the experts.
//!
//! A quantised activation is its codes, row after row, and its scales behind them: together about half of what the
//! portable form needs of the same buffers.

use std::sync::Arc;

use super::products::Product;
use super::{Activation, GpuBackend};
use crate::device::args::U8;
use crate::device::{DeviceError, Gpu, In, Out};
use crate::gpu::kernels::{Kernels, Long, NativeLong};
use crate::gpu::workspace::Workspace;
use crate::ops::dense_gemm::gemm::FLAG_F32;
use crate::ops::dense_gemm::native::{self, NativeQuantArgs, NativeSeg, Verdict};
use crate::ops::moe_gemm::native::{self as native_moe, NativeDownArgs, NativeUpArgs};
use crate::ops::moe_gemm::prefill::MoeSumArgs;
use dsv4_model::Kind;
use dsv4_model::layout::Format;
use dsv4_model::tensors::LayerSpec;

/// Columns under one scale.
const GROUP: u32 = 128;

impl Kernels {
    /// Checks the block-scaled kernels, and forgets them where one is not accepted. Errors: the GPU's.
    pub fn check(&mut self, gpu: &Arc<dyn Gpu>) -> Result<(), DeviceError> {
        let Some(long) = &mut self.long else { return Ok(()) };
        let Some(NativeLong { dense, experts }) = &long.native else { return Ok(()) };
        self.verdicts = vec![
            native::self_check(gpu, dense, long.fp8, long.fake_quant)?,
            native_moe::self_check(gpu, experts, &long.experts)?,
        ];
        if !self.verdicts.iter().all(Verdict::accepted) {
            long.native = None;
        }
        Ok(())
    }

    /// Whether long steps use the block-scaled kernels.
    pub fn is_native(&self) -> bool {
        self.long.as_ref().is_some_and(|long| long.native.is_some())
    }

    /// Forgets the block-scaled kernels: another rank's did not pass.
    pub fn drop_native(&mut self) {
        if let Some(long) = &mut self.long {
            long.native = None;
        }
    }
}

/// Codes of `[rows, cols]` and, behind them, scales `[rows, cols / 128]`.
#[derive(Clone, Copy)]
struct Codes {
    at: u64,
    scales: u64,
}

impl Codes {
    fn new(at: u64, rows: u32, cols: u32) -> Codes {
        Codes { at, scales: at + u64::from(rows) * u64::from(cols) }
    }

    /// From column `first` of row 0 on, a whole group.
    fn from(self, first: u32) -> Codes {
        Codes { at: self.at + u64::from(first), scales: self.scales + u64::from(first / GROUP) }
    }

    fn codes(self) -> In<U8> {
        In::at(self.at)
    }

    fn scales(self) -> In<U8> {
        In::at(self.scales)
    }
}

impl Product {
    /// Whether both operands are codes.
    pub(super) fn is_native(&self) -> bool {
        self.quantised && self.w.format == Format::Fp8
    }
}

impl GpuBackend {
    /// Those of `products` whose operands are codes.
    pub(super) fn multiply_native(
        &self,
        native: &NativeLong,
        rows: u32,
        products: &[Product],
    ) -> Result<(), DeviceError> {
        let products: Vec<&Product> = products.iter().filter(|p| p.is_native()).collect();
        let Some(first) = products.first() else { return Ok(()) };
        let x = self.quantise(native, rows, first.w.cols, (first.x, first.x_stride))?;
        let segment = |p: &&Product| {
            assert_eq!(p.x, first.x, "quantised products of a call have the same activations");
            NativeSeg {
                w: p.codes(),
                scales: p.w.scales(),
                x: x.codes(),
                x_scales: x.scales(),
                y: p.y,
                rows: p.count,
                cols: p.w.cols,
                x_stride: p.w.cols,
                scale_stride: p.w.cols / GROUP,
                y_stride: p.y_stride,
                flags: if p.unrounded { FLAG_F32 } else { 0 },
                row0: p.first,
                first_block: 0,
            }
        };
        native.dense.launch(&self.stream, rows, &products.iter().map(segment).collect::<Vec<_>>())
    }

    /// Rows of `cols` activations at (address, stride) as codes.
    fn quantise(&self, native: &NativeLong, rows: u32, cols: u32, x: (u64, u32)) -> Result<Codes, DeviceError> {
        let out = Codes::new(self.work.quantised.at(), rows, cols);
        let args = NativeQuantArgs {
            x: In::at(x.0),
            codes: Out::at(out.at),
            scales: Out::at(out.scales),
            rows,
            cols,
            x_stride: x.1,
        };
        native.dense.quantise(&self.stream, args)?;
        Ok(out)
    }

    /// The experts of sorted rows: as `experts_sorted` goes on, from and to codes.
    pub(super) fn experts_native(
        &self,
        long: &Long,
        native: &NativeLong,
        x: &Activation,
        layer: &LayerSpec,
    ) -> Result<(), DeviceError> {
        let (rows, s, work, stream) = (self.current.rows, &self.shape, &self.work, &self.stream);
        let w = |kind| self.matrix(layer.block, kind);
        let (pairs, tiles) = (In::at(work.expert_pairs.at()), In::at(work.expert_tiles.at()));
        let tile_count = In::at(work.expert_tile_count.at());
        let x = self.quantise(native, rows, s.hidden, (x.at, x.cols))?;
        let (w1, shared_w1) = (w(Kind::W1), w(Kind::SharedW1));
        let mid = Codes::new(work.mid.at(), rows, (s.chosen + 1) * s.inner);
        let routed = NativeUpArgs {
            x: x.codes(),
            x_scales: x.scales(),
            w1: w1.codes(),
            w3: w(Kind::W3).codes(),
            stride: w1.layout.stride,
            scales_at: w1.layout.scales_offset,
            pairs,
            tiles,
            tile_count,
            weights: In::at(work.weights.at()),
            mid: Out::at(mid.at),
            mid_scales: Out::at(mid.scales),
            limit: self.config.swiglu_limit,
            rows,
        };
        native.experts.up(stream, routed)?;
        let shared = NativeUpArgs {
            w1: shared_w1.codes(),
            w3: w(Kind::SharedW3).codes(),
            scales_at: shared_w1.layout.scales_offset,
            pairs: In::none(),
            tiles: In::none(),
            tile_count: In::none(),
            weights: In::none(),
            ..routed
        };
        native.experts.up_shared(stream, shared)?;
        let (w2, shared_w2) = (w(Kind::W2), w(Kind::SharedW2));
        // The shared expert is the last slot of every row.
        let (slots, last) = (s.chosen + 1, mid.from(s.chosen * s.inner));
        let out = work.expert_outputs.at();
        let slice = Workspace::expert_slice(s, rows);
        for first_out in (0..s.hidden).step_by(slice as usize) {
            let outs = slice.min(s.hidden - first_out);
            let down = NativeDownArgs {
                mid: mid.codes(),
                mid_scales: mid.scales(),
                w2: w2.codes(),
                stride: w2.layout.stride,
                scales_at: w2.layout.scales_offset,
                pairs,
                tiles,
                tile_count,
                out: Out::at(out),
                first_out,
                outs,
            };
            native.experts.down(stream, rows, down)?;
            let segment = NativeSeg {
                w: In::at(shared_w2.codes + u64::from(first_out) * shared_w2.layout.row_bytes),
                scales: shared_w2.scales(),
                x: last.codes(),
                x_scales: last.scales(),
                y: out + u64::from(s.chosen) * u64::from(outs) * 4,
                rows: outs,
                cols: s.inner,
                x_stride: slots * s.inner,
                scale_stride: slots * s.inner / GROUP,
                y_stride: slots * outs,
                flags: FLAG_F32,
                row0: first_out,
                first_block: 0,
            };
            native.dense.launch(stream, rows, &[segment])?;
            let sum = MoeSumArgs { out: In::at(out), y: Out::at(self.part().at), rows, first_out, outs };
            long.experts.sum(stream, sum)?;
        }
        Ok(())
    }
}
