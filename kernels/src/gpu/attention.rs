//! The attention sublayer: projections, compressors, index, attention over window and entries, output.

use super::products::Product;
use super::{Activation, GpuBackend, GpuError, Partial};
use crate::device::args::Turn;
use crate::device::rows::Row;
use crate::device::{In, Out};
use crate::gpu::kernels::DECODE_ROWS;
use crate::gpu::state::DeviceCompressed;
use crate::ops::indexer::{self, IndexQueriesArgs, IndexScoreArgs};
use crate::ops::kv::{self, CompressArgs, PrepareArgs};
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
        let [prepare, _] = self.kernels.prepare.of(layer.ratio);
        kv::launch_prepare(&self.stream, prepare, self.shape.prepare(layer.ratio), self.prepare_args(layer))?;
        Ok(Projected { main: query, index })
    }

    /// Queries of the heads and of the index, as projected: norm and rotation are the first things that their readers
    /// do.
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
        let kernels = self.kernels.indexer.unwrap_or_else(|| panic!("a model with index entries"));
        let sizes = self.shape.indexer();
        let index = self.compressed(layer, true);
        let (heads, width) = (f64::from(self.shape.index_heads), f64::from(self.shape.index_dim));
        let stride = current.entries;
        // Nothing is chosen where every row sees no more than are selected.
        if stride <= self.shape.topk {
            return Ok(Selection(()));
        }
        let args = |first: u32, count: u32| {
            let act = |x: &Activation| In::at(x.at + u64::from(first) * u64::from(x.cols) * self.act_bytes());
            IndexScoreArgs {
                rows: In::at(current.rows_at + u64::from(first) * size_of::<Row>() as u64),
                q: act(qi),
                hw: act(head_weights),
                turns: self.turns(layer),
                entries: In::at(index.entries.at()),
                pages: In::at(self.state.pages.at()),
                scores: Out::at(work.scores.at()),
                bins: Out::at(work.score_bins.at()),
                arrived: Out::at(work.score_arrived.at()),
                selected: Out::at(work.selected.at() + u64::from(first) * u64::from(self.shape.topk) * 4),
                stride,
                pages_max: self.state.pages_max,
                count,
                per: 0,
                scale: (1.0 / width.sqrt() / heads.sqrt()) as f32,
            }
        };
        if current.rows <= DECODE_ROWS {
            indexer::launch_choose(&self.stream, kernels, sizes, self.numerics, stride, args(0, current.rows))?;
            return Ok(Selection(()));
        }
        let queries = IndexQueriesArgs { q: Out::at(qi.at), turns: self.turns(layer), count: current.rows };
        indexer::launch_queries(&self.stream, kernels, sizes, queries)?;
        let rows_at_once = work.score_rows(stride).max(1);
        for first in (0..current.rows).step_by(rows_at_once as usize) {
            let count = rows_at_once.min(current.rows - first);
            indexer::launch_choose_long(&self.stream, kernels, sizes, self.numerics, stride, args(first, count))?;
        }
        Ok(Selection(()))
    }

    /// Attention over window, entries and this step's rows; then the rings take the rows of a longer step.
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
            sinks: In::at(self.weights.small(layer.block, Kind::AttnSink)),
            turns: self.turns(layer),
            o: Out::at(o.at),
            partial: Out::at(work.attend_partial.at()),
            stats: Out::at(work.attend_stats.at()),
            arrived: Out::at(work.attend_arrived.at()),
            heads: s.heads,
            pages_max: self.state.pages_max,
            splits: 0,
            parts: 0,
            eps: self.config.rms_norm_eps,
        };
        let kernels = self.kernels.attend.of(layer.ratio);
        sparse_attention::launch(&self.stream, kernels, s.attention(layer.ratio), self.numerics, rows, args)?;
        let [_, store] = self.kernels.prepare.of(layer.ratio);
        kv::launch_store_rings(&self.stream, store, s.prepare(layer.ratio), self.prepare_args(layer))?;
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

    fn prepare_args(&self, layer: &LayerSpec) -> PrepareArgs {
        let (state, work, block) = (self.state.layer(layer.block), &self.work, layer.block);
        let small = |kind| In::at(self.weights.small(block, kind));
        let compressor = |cache: &Option<DeviceCompressed>, values: u64, gates: u64, ape, norm| match cache {
            None => CompressArgs::none(),
            Some(cache) => CompressArgs {
                values: In::at(values),
                gates: In::at(gates),
                ring_values: Out::at(cache.values.at()),
                ring_gates: Out::at(cache.gates.at()),
                ape: small(ape),
                norm: small(norm),
                entries: Out::at(cache.entries.at()),
                stride: cache.columns,
            },
        };
        let (values, gates) = (work.values.at(), work.gates.at());
        let entries = compressor(&state.compressed, values, gates, Kind::CompressorApe, Kind::CompressorNorm);
        let (values, gates) = (work.index_values.at(), work.index_gates.at());
        let index = compressor(&state.index, values, gates, Kind::IndexerApe, Kind::IndexerNorm);
        PrepareArgs {
            rows: In::at(self.current.rows_at),
            query: Out::at(work.query_rank.at()),
            query_norm: small(Kind::QNorm),
            kv_raw: In::at(work.kv_raw.at()),
            kv_norm: small(Kind::KvNorm),
            turns: self.turns(layer),
            entry_turns: In::at(self.current.turns[if layer.ratio == 4 { 2 } else { 3 }]),
            pages: In::at(self.state.pages.at()),
            kv: Out::at(work.kv.at()),
            window: Out::at(state.window.at()),
            compressors: [entries, index],
            count: self.current.rows,
            kv_stride: self.shape.head_dim,
            pages_max: self.state.pages_max,
            store: 0,
            eps: self.config.rms_norm_eps,
        }
    }
}
