//! The experts' sublayer: their choice, and their sum for a few rows or for many.

use super::products::Product;
use super::{Activation, GpuBackend, GpuError, Partial};
use crate::device::{DeviceError, In, Out};
use crate::gpu::kernels::Long;
use crate::gpu::workspace::Workspace;
use crate::ops::dense_gemm::gemm::{self, FLAG_F32, FP8, GemmSeg};
use crate::ops::moe_gemm::{decode, prefill};
use crate::ops::router::{self, GateArgs, RouteArgs};
use dsv4_model::Kind;
use dsv4_model::layout::Format;
use dsv4_model::tensors::LayerSpec;

/// Experts of every row and their weights, in the workspace.
#[derive(Clone, Copy, Debug)]
pub struct Routing(());

impl GpuBackend {
    /// Experts of every row.
    pub(super) fn choose_experts(&mut self, x: &Activation, layer: &LayerSpec) -> Result<Routing, GpuError> {
        let (block, rows, work) = (layer.block, self.current.rows, &self.work);
        let gate = self.matrix(block, Kind::Gate);
        let (bias, table) = match layer.hashed {
            true => (In::none(), In::at(self.matrix(block, Kind::Tid2Eid).codes)),
            false => (In::at(self.weights.small(block, Kind::GateBias)), In::none()),
        };
        let (scores, scale) = (work.gate.at(), self.config.routed_scaling_factor);
        let (chosen, weights) = (Out::at(work.chosen.at()), Out::at(work.weights.at()));
        let tokens = In::at(self.current.rows_at);
        let [gate_kernel, route_kernel] = self.kernels.router;
        if self.long().is_some() {
            self.multiply(rows, &[Product::new(gate, x.at, scores).unrounded()])?;
            let scores = In::at(scores);
            let args = RouteArgs { scores, bias, table, rows: tokens, chosen, weights, scale, count: rows };
            router::launch(&self.stream, route_kernel, args)?;
            return Ok(Routing(()));
        }
        let args = GateArgs {
            x: In::at(x.at),
            w: In::at(gate.codes),
            scores: Out::at(scores),
            bias,
            table,
            rows: tokens,
            chosen,
            weights,
            arrivals: Out::at(work.gate_arrivals.at()),
            scale,
            count: rows,
        };
        router::launch_gate(&self.stream, gate_kernel, self.shape.experts, args)?;
        Ok(Routing(()))
    }

    /// This rank's part of the experts' sum.
    pub(super) fn run_experts(
        &mut self,
        x: &Activation,
        _routing: &Routing,
        layer: &LayerSpec,
    ) -> Result<Partial, GpuError> {
        match self.long() {
            Some(long) => self.experts_sorted(long, x, layer)?,
            None => self.experts_streamed(x, layer)?,
        }
        Ok(self.part())
    }

    /// Rows that chose the same expert share its weights.
    fn experts_streamed(&self, x: &Activation, layer: &LayerSpec) -> Result<(), DeviceError> {
        let (rows, work) = (self.current.rows, &self.work);
        let w = |kind| self.matrix(layer.block, kind);
        let all = &self.kernels.moe;
        let Some(kernels) = all.iter().find(|k| k.rows >= rows).or(all.last()) else {
            panic!("no kernel of the experts fits a block");
        };
        let mid = work.mid.at();
        let args = decode::MoeUpArgs {
            x: In::at(x.at),
            w1: w(Kind::W1).codes(),
            w3: w(Kind::W3).codes(),
            stride: w(Kind::W1).layout.stride,
            shared_w1: w(Kind::SharedW1).codes(),
            shared_w3: w(Kind::SharedW3).codes(),
            chosen: In::at(work.chosen.at()),
            weights: In::at(work.weights.at()),
            mid: Out::at(mid),
            limit: self.config.swiglu_limit,
            rows,
            prefetch: 0,
        };
        kernels.launch_up(&self.stream, args)?;
        let args = decode::MoeDownArgs {
            mid: In::at(mid),
            w2: w(Kind::W2).codes(),
            stride: w(Kind::W2).layout.stride,
            shared_w2: w(Kind::SharedW2).codes(),
            chosen: In::at(work.chosen.at()),
            y: Out::at(self.part().at),
            rows,
            prefetch: 0,
        };
        kernels.launch_down(&self.stream, args)
    }

    /// Rows are sorted by expert; outputs come in slices that the workspace has room for.
    fn experts_sorted(&self, long: &Long, x: &Activation, layer: &LayerSpec) -> Result<(), DeviceError> {
        let (rows, s, work, stream) = (self.current.rows, &self.shape, &self.work, &self.stream);
        let w = |kind| self.matrix(layer.block, kind);
        let (pairs, tiles, tile_count) = (work.expert_pairs.at(), work.expert_tiles.at(), work.expert_tile_count.at());
        let sort = prefill::MoeSortArgs {
            chosen: In::at(work.chosen.at()),
            counts: Out::at(work.expert_counts.at()),
            pairs: Out::at(pairs),
            tiles: Out::at(tiles),
            tile_count: Out::at(tile_count),
            pair_count: rows * s.chosen,
        };
        long.experts.sort(stream, sort)?;
        if let Some(native) = &long.native {
            return self.experts_native(long, native, x, layer);
        }
        self.fake_quant(long, rows, s.hidden, (x.at, x.cols))?;
        let (w1, shared_w1) = (w(Kind::W1), w(Kind::SharedW1));
        let mid = work.mid.at();
        let routed = prefill::MoeUpArgs {
            x: In::at(work.quantised.at()),
            w1: w1.codes(),
            w3: w(Kind::W3).codes(),
            stride: w1.layout.stride,
            scales_at: w1.layout.scales_offset,
            pairs: In::at(pairs),
            tiles: In::at(tiles),
            tile_count: In::at(tile_count),
            weights: In::at(work.weights.at()),
            mid: Out::at(mid),
            limit: self.config.swiglu_limit,
            rows,
        };
        long.experts.up(stream, routed)?;
        let shared = prefill::MoeUpArgs {
            w1: shared_w1.codes(),
            w3: w(Kind::SharedW3).codes(),
            scales_at: shared_w1.layout.scales_offset,
            pairs: In::none(),
            tiles: In::none(),
            tile_count: In::none(),
            weights: In::none(),
            ..routed
        };
        long.experts.up_shared(stream, shared)?;
        let (w2, shared_w2) = (w(Kind::W2), w(Kind::SharedW2));
        let out = work.expert_outputs.at();
        let slice = Workspace::expert_slice(s, rows);
        for first_out in (0..s.hidden).step_by(slice as usize) {
            let outs = slice.min(s.hidden - first_out);
            let down = prefill::MoeDownArgs {
                mid: In::at(mid),
                w2: w2.codes(),
                stride: w2.layout.stride,
                scales_at: w2.layout.scales_offset,
                pairs: In::at(pairs),
                tiles: In::at(tiles),
                tile_count: In::at(tile_count),
                out: Out::at(out),
                first_out,
                outs,
            };
            long.experts.down(stream, rows, down)?;
            // The shared expert is the last slot of every row.
            let last = u64::from(s.chosen);
            let segment = GemmSeg {
                w: In::at(shared_w2.codes + u64::from(first_out) * shared_w2.layout.row_bytes),
                scales: shared_w2.scales(),
                x: In::at(mid + last * u64::from(s.inner) * self.act_bytes()),
                y: out + last * u64::from(outs) * 4,
                rows: outs,
                cols: s.inner,
                x_stride: (s.chosen + 1) * s.inner,
                y_stride: (s.chosen + 1) * outs,
                format: FP8,
                flags: FLAG_F32,
                row0: first_out,
                first_block: 0,
            };
            let (kernel, point) = long.fp8;
            gemm::launch(stream, kernel, Format::Fp8, point, rows, &[segment])?;
            let sum = prefill::MoeSumArgs { out: In::at(out), y: Out::at(self.part().at), rows, first_out, outs };
            long.experts.sum(stream, sum)?;
        }
        Ok(())
    }
}
