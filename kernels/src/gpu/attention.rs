//! The attention sublayer: projections, compressors, index, attention over window and entries, output.

use super::products::Product;
use super::{Activation, GpuBackend, GpuError, Partial};
use crate::device::args::Turn;
use crate::device::rows::Row;
use crate::device::{DeviceError, In, Out};
use crate::gpu::state::DeviceCompressed;
use crate::ops::indexer::{self, IndexScoreArgs, IndexSelectArgs};
use crate::ops::kv::{self, CompressArgs, HeadsArgs, KvRowsArgs, RingArgs, StoreRingsArgs};
use crate::ops::rms_norm::{self, RmsNormArgs};
use crate::ops::sparse_attention::{self, AttendArgs};
use dsv4_model::Kind;
use dsv4_model::ops::Projected;
use dsv4_model::tensors::LayerSpec;

/// Entries of every row, in the workspace.
#[derive(Clone, Copy, Debug)]
pub struct Selection(());

impl GpuBackend {
    /// Everything that reads the sublayer's input: low-rank query, keys, compressor values.
    pub(super) fn project_inputs(
        &mut self,
        x: &Activation,
        layer: &LayerSpec,
    ) -> Result<Projected<Activation>, GpuError> {
        let (block, rows, work) = (layer.block, self.current.rows, &self.work);
        let product = |kind, y: u64| Product::new(self.matrix(block, kind), x.at, y);
        let query = self.activation(&work.query_rank, self.shape.q_rank);
        let mut products = vec![product(Kind::WqA, query.at), product(Kind::Wkv, work.kv_raw.at())];
        if layer.ratio != 0 {
            products.push(product(Kind::CompressorWkv, work.values.at()).unrounded());
            products.push(product(Kind::CompressorWgate, work.gates.at()).unrounded());
        }
        let index = (layer.ratio == 4).then(|| self.activation(&work.head_weights, self.shape.index_heads));
        if let Some(weights) = index {
            products.push(product(Kind::IndexerWkv, work.index_values.at()).unrounded());
            products.push(product(Kind::IndexerWgate, work.index_gates.at()).unrounded());
            products.push(product(Kind::IndexerWeightsProj, weights.at));
        }
        self.multiply(rows, &products)?;
        let eps = self.config.rms_norm_eps;
        let args = RmsNormArgs {
            x: In::at(query.at),
            w: In::at(self.weights.small(block, Kind::QNorm)),
            y: Out::at(query.at),
            gather: In::none(),
            stride: query.cols,
            per: 1,
            eps,
        };
        rms_norm::launch(&self.stream, self.kernels.q_norm, rows, args)?;
        let args = KvRowsArgs {
            kv: In::at(work.kv_raw.at()),
            w: In::at(self.weights.small(block, Kind::KvNorm)),
            turns: self.turns(layer),
            y: Out::at(work.kv.at()),
            stride: self.shape.head_dim,
            count: rows,
            eps,
        };
        kv::launch_kv_rows(&self.stream, self.kernels.kv[0], args)?;
        self.compress(layer, false)?;
        self.compress(layer, true)?;
        Ok(Projected { main: query, index })
    }

    /// Queries of the heads and of the index.
    pub(super) fn project_queries(
        &mut self,
        qr: &Activation,
        layer: &LayerSpec,
    ) -> Result<Projected<Activation>, GpuError> {
        let (block, rows, s) = (layer.block, self.current.rows, &self.shape);
        let queries = self.activation(&self.work.queries, s.heads * s.head_dim);
        let mut products = vec![Product::new(self.matrix(block, Kind::WqB), qr.at, queries.at)];
        let index = (layer.ratio == 4).then(|| self.activation(&self.work.index_queries, s.index_heads * s.index_dim));
        if let Some(index) = index {
            products.push(Product::new(self.matrix(block, Kind::IndexerWqB), qr.at, index.at));
        }
        self.multiply(rows, &products)?;
        let (turns, eps) = (self.turns(layer), self.config.rms_norm_eps);
        let args = HeadsArgs { q: Out::at(queries.at), turns, count: rows, heads: s.heads, eps };
        kv::launch_heads(&self.stream, self.kernels.kv[1], args)?;
        if let Some(index) = index {
            let args = HeadsArgs { q: Out::at(index.at), heads: s.index_heads, ..args };
            kv::launch_heads(&self.stream, self.kernels.kv[2], args)?;
        }
        Ok(Projected { main: queries, index })
    }

    /// The entries of every row that its index finds.
    pub(super) fn select_entries(
        &mut self,
        qi: &Activation,
        head_weights: &Activation,
        layer: &LayerSpec,
    ) -> Result<Selection, GpuError> {
        let (current, work) = (&self.current, &self.work);
        let [score, select] = self.kernels.indexer.unwrap_or_else(|| panic!("a model with index entries"));
        let index = self.compressed(layer, true);
        let (heads, width) = (f64::from(self.shape.index_heads), f64::from(self.shape.index_dim));
        let stride = current.entries;
        let scores = work.scores.at();
        // Nothing is scored where every row sees no more than are selected.
        let scored = stride > self.shape.topk;
        let rows_at_once = if scored { work.score_rows(stride) } else { current.rows };
        for first in (0..current.rows).step_by(rows_at_once.max(1) as usize) {
            let count = rows_at_once.min(current.rows - first);
            let rows = In::at(current.rows_at + u64::from(first) * size_of::<Row>() as u64);
            let act = |x: &Activation| In::at(x.at + u64::from(first) * u64::from(x.cols) * self.act_bytes());
            if scored {
                let args = IndexScoreArgs {
                    rows,
                    q: act(qi),
                    hw: act(head_weights),
                    entries: In::at(index.entries.at()),
                    pages: In::at(self.state.pages.at()),
                    scores: Out::at(scores),
                    stride,
                    pages_max: self.state.pages_max,
                    count,
                    per: 0,
                    scale: (1.0 / width.sqrt() / heads.sqrt()) as f32,
                };
                indexer::launch_score(&self.stream, score, stride, args)?;
            }
            let args = IndexSelectArgs {
                rows,
                scores: In::at(scores),
                selected: Out::at(work.selected.at() + u64::from(first) * u64::from(self.shape.topk) * 4),
                counts: Out::at(work.counts.at() + u64::from(first) * 4),
                stride,
            };
            indexer::launch_select(&self.stream, select, count, args)?;
        }
        Ok(Selection(()))
    }

    /// Attention over window, entries and this step's rows; then the rings take the step's rows.
    pub(super) fn attend_entries(
        &mut self,
        q: &Activation,
        _selected: Option<&Selection>,
        layer: &LayerSpec,
    ) -> Result<Activation, GpuError> {
        let (rows, work, s) = (self.current.rows, &self.work, &self.shape);
        let state = self.state.layer(layer.block);
        let o = self.activation(&work.attended, s.heads * s.head_dim);
        let args = AttendArgs {
            rows: In::at(self.current.rows_at),
            q: In::at(q.at),
            kv: In::at(work.kv.at()),
            window: In::at(state.window.at()),
            entries: In::at(state.compressed.as_ref().map_or(0, |c| c.entries.at())),
            pages: In::at(self.state.pages.at()),
            selected: In::at(work.selected.at()),
            counts: In::at(work.counts.at()),
            sinks: In::at(self.weights.small(layer.block, Kind::AttnSink)),
            turns: self.turns(layer),
            o: Out::at(o.at),
            partial: Out::at(work.attend_partial.at()),
            stats: Out::at(work.attend_stats.at()),
            heads: s.heads,
            pages_max: self.state.pages_max,
            splits: 0,
        };
        let kernels = self.kernels.attend.of(layer.ratio);
        sparse_attention::launch(&self.stream, kernels, s.attention(layer.ratio), self.numerics, rows, args)?;
        self.store_rings(layer)?;
        Ok(o)
    }

    /// This rank's part of the output projection.
    pub(super) fn project_output(&mut self, o: &Activation, layer: &LayerSpec) -> Result<Partial, GpuError> {
        let (rows, s) = (self.current.rows, &self.shape);
        let (rank, width) = (s.o_rank, o.cols / s.groups);
        let z = self.activation(&self.work.output_rank, s.groups * rank);
        let w = self.matrix(layer.block, Kind::WoA);
        let groups: Vec<Product> = (0..s.groups)
            .map(|g| Product {
                w,
                first: g * rank,
                count: rank,
                x: o.at + u64::from(g * width) * self.act_bytes(),
                x_stride: o.cols,
                y: z.at + u64::from(g * rank) * self.act_bytes(),
                y_stride: z.cols,
                // The published code does not quantise this activation.
                quantised: false,
                unrounded: false,
            })
            .collect();
        self.multiply(rows, &groups)?;
        let part = self.part();
        self.multiply(rows, &[Product::new(self.matrix(layer.block, Kind::WoB), z.at, part.at).unrounded()])?;
        Ok(part)
    }

    /// Rotations of the rows' positions.
    fn turns(&self, layer: &LayerSpec) -> In<Turn> {
        In::at(self.current.turns[usize::from(layer.ratio != 0)])
    }

    fn compressed(&self, layer: &LayerSpec, index: bool) -> &DeviceCompressed {
        let state = self.state.layer(layer.block);
        let cache = if index { &state.index } else { &state.compressed };
        cache.as_ref().unwrap_or_else(|| panic!("{:?} has no such compressor", layer.block))
    }

    /// Closes the windows that the step's rows fill, of a layer that has such a compressor.
    fn compress(&self, layer: &LayerSpec, index: bool) -> Result<(), DeviceError> {
        let (kernel, ape, norm, values, gates) = match (layer.ratio, index) {
            (0, _) | (128, true) => return Ok(()),
            (_, true) => {
                let kernel = self.kernels.compress_index.unwrap_or_else(|| panic!("a model with index entries"));
                (kernel, Kind::IndexerApe, Kind::IndexerNorm, &self.work.index_values, &self.work.index_gates)
            }
            (ratio, false) => {
                let kernel = self.kernels.compress.of(ratio);
                (kernel, Kind::CompressorApe, Kind::CompressorNorm, &self.work.values, &self.work.gates)
            }
        };
        let cache = self.compressed(layer, index);
        let args = CompressArgs {
            rows: In::at(self.current.rows_at),
            values: In::at(values.at()),
            gates: In::at(gates.at()),
            ring_values: In::at(cache.values.at()),
            ring_gates: In::at(cache.gates.at()),
            ape: In::at(self.weights.small(layer.block, ape)),
            norm: In::at(self.weights.small(layer.block, norm)),
            turns: In::at(self.current.turns[if layer.ratio == 4 { 2 } else { 3 }]),
            entries: Out::at(cache.entries.at()),
            pages: In::at(self.state.pages.at()),
            stride: cache.columns,
            pages_max: self.state.pages_max,
            eps: self.config.rms_norm_eps,
        };
        let sizes = self.shape.compressor(layer.ratio, index);
        kv::launch_compress(&self.stream, kernel, sizes, self.current.rows, args)
    }

    /// The step's newest rows into the rings: nothing of this layer reads older ones after this.
    fn store_rings(&self, layer: &LayerSpec) -> Result<(), DeviceError> {
        let (state, work) = (self.state.layer(layer.block), &self.work);
        let ring = |cache: &Option<DeviceCompressed>, values: u64, gates: u64| match cache {
            None => RingArgs::none(),
            Some(cache) => RingArgs {
                values: In::at(values),
                gates: In::at(gates),
                ring_values: Out::at(cache.values.at()),
                ring_gates: Out::at(cache.gates.at()),
                width: cache.columns,
                stride: cache.columns,
                capacity: cache.capacity,
            },
        };
        let args = StoreRingsArgs {
            rows: In::at(self.current.rows_at),
            kv: In::at(work.kv.at()),
            window: Out::at(state.window.at()),
            rings: [
                ring(&state.compressed, work.values.at(), work.gates.at()),
                ring(&state.index, work.index_values.at(), work.index_gates.at()),
            ],
            count: self.current.rows,
        };
        kv::launch_store_rings(&self.stream, self.kernels.kv[3], args)
    }
}
