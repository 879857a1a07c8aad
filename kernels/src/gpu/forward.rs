//! The operations of [`GpuBackend`], one method each: which kernels they launch on which buffers.

use dsv4_model::Kind;
use dsv4_model::layout::Format;
use dsv4_model::ops::{Backend, Done, Projected, Site};
use dsv4_model::tensors::{Block, LayerSpec};

use super::products::Product;
use super::{Activation, GpuBackend, GpuError, Partial, Streams};
use crate::device::args::{Act, F32, Turn};
use crate::device::rows::Row;
use crate::device::{Buffer, DeviceError, Gpu, In, Out};
use crate::gpu::kernels::{DECODE_ROWS, Long};
use crate::gpu::state::DeviceCompressed;
use crate::gpu::workspace::Workspace;
use crate::ops::Mat;
use crate::ops::dense_gemm::gemm::{self, FLAG_F32, FP8, GemmPoint, GemmSeg};
use crate::ops::embedding::{self, DraftAddArgs, EmbedArgs, ExpandArgs, SettleArgs};
use crate::ops::hyper_connection::{self as hc, HcCollapseArgs, HcFinishArgs, HcHeadArgs, HcMix, HcMixArgs};
use crate::ops::indexer::{self, IndexScoreArgs, IndexSelectArgs};
use crate::ops::kv::{self, CompressArgs, HeadsArgs, KvRowsArgs, RingArgs, StoreRingsArgs};
use crate::ops::moe_gemm::{decode, prefill};
use crate::ops::rms_norm::{self, RmsNormArgs};
use crate::ops::router::{self, RouteArgs};
use crate::ops::sparse_attention::{self, AttendArgs};

/// Mixing weights of a site.
#[derive(Clone, Copy, Debug)]
pub struct Mix {
    post: u64,
    comb: u64,
}

/// Entries of every row, in the workspace.
#[derive(Clone, Copy, Debug)]
pub struct Selection(());

/// Experts of every row and their weights, in the workspace.
#[derive(Clone, Copy, Debug)]
pub struct Routing(());

impl Backend for GpuBackend {
    type Act = Activation;
    type Partial = Partial;
    type Streams = Streams;
    type Mix = Mix;
    type Selection = Selection;
    type Routing = Routing;
    type Logits = Mat;
    type Error = GpuError;

    fn embed(&mut self) -> Result<Partial, GpuError> {
        let table = self.matrix(Block::Global, Kind::Embed);
        let part = self.part();
        let args = EmbedArgs {
            rows: In::at(self.current.rows_at),
            table: In::at(table.codes),
            y: Out::at(part.at),
            first_token: self.tp.rank() * self.shape.vocab,
            vocab: self.shape.vocab,
        };
        embedding::launch_embed(&self.stream, self.kernels.embedding[0], self.current.rows, args)?;
        Ok(part)
    }

    fn all_reduce(&mut self, part: Partial) -> Result<Activation, GpuError> {
        if !self.is_alone() {
            // Every rank has the same sum, added in the order of the ranks.
            let count = part.rows as usize * part.cols as usize;
            self.exchanged.resize(count, 0.0);
            self.stream.read(part.at, bytemuck::cast_slice_mut(&mut self.exchanged))?;
            self.collective.all_reduce(&mut self.exchanged)?;
            self.stream.write(part.at, bytemuck::cast_slice(&self.exchanged))?;
        }
        Ok(Activation { at: part.at, rows: part.rows, cols: part.cols, parts: 1 })
    }

    fn expand(&mut self, x: Activation) -> Result<Streams, GpuError> {
        let x = self.settle(x)?;
        let h = Streams { draft: false, rows: self.current.rows };
        let args = ExpandArgs { x: In::at(x.at), h: Out::at(self.streams_at(&h)) };
        embedding::launch_expand(&self.stream, self.kernels.embedding[1], h.rows, args)?;
        Ok(h)
    }

    fn draft_input(&mut self, embedded: Activation, source: &Streams, block: Block) -> Result<Streams, GpuError> {
        let embedded = self.settle(embedded)?;
        let (rows, streams) = (self.current.rows, self.shape.streams);
        let norm = |x: u64, w: Kind, y: u64, gather: u64, per: u32| RmsNormArgs {
            x: In::at(x),
            w: In::at(self.weights.small(block, w)),
            y: Out::at(y),
            gather: In::at(gather),
            stride: self.shape.hidden,
            per,
            eps: self.config.rms_norm_eps,
        };
        let kernel = self.kernels.hidden_norm.unwrap_or_else(|| panic!("a model that drafts"));
        let (token, from) = (self.work.token.at(), self.work.source.at());
        let args = norm(embedded.at, Kind::ENorm, token, 0, 1);
        rms_norm::launch(&self.stream, kernel, rows, args)?;
        // Source streams are read here alone: they may be those that this step overwrites below.
        let args = norm(self.streams_at(source), Kind::HNorm, from, self.current.rows_at, streams);
        rms_norm::launch(&self.stream, kernel, rows * streams, args)?;
        let (token_out, source_out) = (self.work.token_out.at(), self.work.source_out.at());
        self.multiply(rows, &[Product::new(self.matrix(block, Kind::EProj), token, token_out)])?;
        self.multiply(rows * streams, &[Product::new(self.matrix(block, Kind::HProj), from, source_out)])?;
        let h = Streams { draft: true, rows };
        let args = DraftAddArgs { h: In::at(source_out), e: In::at(token_out), y: Out::at(self.streams_at(&h)) };
        embedding::launch_draft_add(&self.stream, self.kernels.embedding[3], rows, args)?;
        Ok(h)
    }

    fn hc_site(
        &mut self,
        h: &mut Streams,
        done: Option<Done<Self>>,
        layer: &LayerSpec,
        site: Site,
    ) -> Result<(Activation, Mix), GpuError> {
        let (matrix, base, scale, norm) = match site {
            Site::Attn => (Kind::HcAttnFn, Kind::HcAttnBase, Kind::HcAttnScale, Kind::AttnNorm),
            Site::Ffn => (Kind::HcFfnFn, Kind::HcFfnBase, Kind::HcFfnScale, Kind::FfnNorm),
        };
        let rows = self.current.rows;
        let small = |kind| In::at(self.weights.small(layer.block, kind));
        let streams = self.streams_at(h);
        let way = HcMix::of(rows);
        let add = self.addition(done);
        let partials = self.work.mix_partials.at();
        let args = HcMixArgs {
            h: Out::at(streams),
            y: add.y,
            parts: add.parts,
            count: add.count,
            n: add.n,
            post: add.post,
            comb: add.comb,
            w: In::at(self.matrix(layer.block, matrix).codes),
            partials: Out::at(partials),
            rows,
            merged: 0,
        };
        hc::launch_mix(&self.stream, &self.kernels.hc, way, args)?;
        let half = |buffer: &Buffer| buffer.at() + self.mix * (buffer.bytes() / 2);
        let mix = Mix { post: half(&self.work.post), comb: half(&self.work.comb) };
        let x = self.activation(&self.work.x, self.shape.hidden);
        let args = HcCollapseArgs {
            h: In::at(streams),
            partials: In::at(partials),
            base: small(base),
            scale: small(scale),
            norm: small(norm),
            x: Out::at(x.at),
            post: Out::at(mix.post),
            comb: Out::at(mix.comb),
            eps: self.config.rms_norm_eps,
            hc_eps: self.config.hc_eps,
            merged: 0,
        };
        hc::launch_collapse(&self.stream, &self.kernels.hc, way, rows, args)?;
        self.mix ^= 1;
        Ok((x, mix))
    }

    fn hc_finish(&mut self, h: &mut Streams, done: Done<Self>) -> Result<(), GpuError> {
        let add = self.addition(Some(done));
        let args = HcFinishArgs {
            h: Out::at(self.streams_at(h)),
            y: add.y,
            parts: add.parts,
            count: add.count,
            n: add.n,
            post: add.post,
            comb: add.comb,
            rows: self.current.rows,
        };
        hc::launch_finish(&self.stream, &self.kernels.hc, args)?;
        self.whole = true;
        Ok(())
    }

    fn attn_inputs(&mut self, x: &Activation, layer: &LayerSpec) -> Result<Projected<Activation>, GpuError> {
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

    fn attn_queries(&mut self, qr: &Activation, layer: &LayerSpec) -> Result<Projected<Activation>, GpuError> {
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

    fn index_select(
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

    fn attend(
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

    fn attn_output(&mut self, o: &Activation, layer: &LayerSpec) -> Result<Partial, GpuError> {
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

    fn route(&mut self, x: &Activation, layer: &LayerSpec) -> Result<Routing, GpuError> {
        let (block, rows, work) = (layer.block, self.current.rows, &self.work);
        let gate = self.matrix(block, Kind::Gate);
        self.multiply(rows, &[Product::new(gate, x.at, work.gate.at()).unrounded()])?;
        let (bias, table) = match layer.hashed {
            true => (In::none(), In::at(self.matrix(block, Kind::Tid2Eid).codes)),
            false => (In::at(self.weights.small(block, Kind::GateBias)), In::none()),
        };
        let args = RouteArgs {
            scores: In::at(work.gate.at()),
            bias,
            table,
            rows: In::at(self.current.rows_at),
            chosen: Out::at(work.chosen.at()),
            weights: Out::at(work.weights.at()),
            scale: self.config.routed_scaling_factor,
            count: rows,
        };
        router::launch(&self.stream, self.kernels.route, args)?;
        Ok(Routing(()))
    }

    fn experts(&mut self, x: &Activation, _routing: &Routing, layer: &LayerSpec) -> Result<Partial, GpuError> {
        match self.long() {
            Some(long) => self.experts_sorted(long, x, layer)?,
            None => self.experts_streamed(x, layer)?,
        }
        Ok(self.part())
    }

    fn hc_head(&mut self, h: &Streams, block: Block) -> Result<Activation, GpuError> {
        let wanted = self.current.wanted;
        let small = |kind| In::at(self.weights.small(block, kind));
        let x = Activation { rows: wanted, ..self.activation(&self.work.head, self.shape.hidden) };
        let args = HcHeadArgs {
            h: In::at(self.streams_at(h)),
            wanted: In::at(self.current.wanted_at),
            w: small(Kind::HcHeadFn),
            base: small(Kind::HcHeadBase),
            scale: small(Kind::HcHeadScale),
            norm: small(Kind::Norm),
            x: Out::at(x.at),
            eps: self.config.rms_norm_eps,
            hc_eps: self.config.hc_eps,
        };
        hc::launch_head(&self.stream, &self.kernels.hc, wanted, args)?;
        Ok(x)
    }

    fn logits(&mut self, x: &Activation) -> Result<Mat, GpuError> {
        let head = self.matrix(Block::Global, Kind::Head);
        let cols = head.rows as usize;
        let mut local = Mat::zeros(x.rows as usize, cols);
        let y = self.work.logits.at();
        for (i, out) in local.data.chunks_mut(cols * DECODE_ROWS as usize).enumerate() {
            let first = i as u32 * DECODE_ROWS;
            let from = x.at + u64::from(first) * u64::from(x.cols) * self.act_bytes();
            let rows = (out.len() / cols) as u32;
            self.multiply_streamed(rows, &[Product::new(head, from, y).unrounded()])?;
            // A step that is recorded has one such part.
            self.stream.end(self.whole)?;
            self.stream.read(y, bytemuck::cast_slice_mut(out))?;
        }
        self.stream.end(false)?;
        self.gather(local)
    }
}

/// What a mixing adds to the streams first.
struct Addition {
    y: In<Act>,
    parts: In<F32>,
    count: u64,
    n: u32,
    post: In<F32>,
    comb: In<F32>,
}

impl GpuBackend {
    fn part(&self) -> Partial {
        Partial { at: self.work.part.at(), rows: self.current.rows, cols: self.shape.hidden }
    }

    /// An activation in its format, rounded.
    pub(super) fn settle(&self, x: Activation) -> Result<Activation, DeviceError> {
        if x.parts == 0 {
            return Ok(x);
        }
        let y = self.activation(&self.work.embedded, x.cols);
        let count = u64::from(x.rows) * u64::from(x.cols);
        let args = SettleArgs { parts: In::at(x.at), y: Out::at(y.at), count, n: x.parts };
        embedding::launch_settle(&self.stream, self.kernels.embedding[2], args)?;
        Ok(y)
    }

    fn addition(&self, done: Option<Done<Self>>) -> Addition {
        let Some(Done { y, mix }) = done else {
            return Addition { y: In::none(), parts: In::none(), count: 0, n: 0, post: In::none(), comb: In::none() };
        };
        Addition {
            y: if y.parts == 0 { In::at(y.at) } else { In::none() },
            parts: if y.parts == 0 { In::none() } else { In::at(y.at) },
            count: u64::from(y.rows) * u64::from(y.cols),
            n: y.parts,
            post: In::at(mix.post),
            comb: In::at(mix.comb),
        }
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

    /// Every row's experts are read for it alone.
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
        };
        kernels.launch_up(&self.stream, args)?;
        let args = decode::MoeDownArgs {
            mid: In::at(mid),
            w2: w(Kind::W2).codes(),
            stride: w(Kind::W2).layout.stride,
            shared_w2: w(Kind::SharedW2).codes(),
            chosen: In::at(work.chosen.at()),
            y: Out::at(self.part().at),
        };
        kernels.launch_down(&self.stream, rows, args)
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
            let point = GemmPoint::default_for(Format::Fp8);
            gemm::launch(stream, long.fp8, Format::Fp8, point, rows, &[segment])?;
            let sum = prefill::MoeSumArgs { out: In::at(out), y: Out::at(self.part().at), rows, first_out, outs };
            long.experts.sum(stream, sum)?;
        }
        Ok(())
    }

    /// All ranks' logits on rank 0, nothing elsewhere.
    fn gather(&mut self, local: Mat) -> Result<Mat, GpuError> {
        if self.is_alone() {
            return Ok(local);
        }
        let size = self.tp.size() as usize;
        if self.tp.rank() != 0 {
            self.collective.gather(&local.data, &mut [])?;
            return Ok(Mat::default());
        }
        let mut parts = vec![0f32; size * local.data.len()];
        self.collective.gather(&local.data, &mut parts)?;
        let mut out = Mat::zeros(local.rows, size * local.cols);
        for (rank, part) in parts.chunks_exact(local.data.len().max(1)).enumerate() {
            for r in 0..local.rows {
                let at = rank * local.cols;
                out.row_mut(r)[at..at + local.cols].copy_from_slice(&part[r * local.cols..(r + 1) * local.cols]);
            }
        }
        Ok(out)
    }
}
