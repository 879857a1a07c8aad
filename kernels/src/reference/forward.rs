//! The operations of [`Reference`], one method each: what they compute is in [`crate::ops`].

use dsv4_model::ops::{Backend, Done, Projected, Site};
use dsv4_model::tensors::{Block, LayerSpec};
use dsv4_model::{Kind, TensorId};

use super::{Partial, Reference, ReferenceError, Routing, Streams, compressed_ref};
use crate::ops::dense_gemm::matmul;
use crate::ops::hyper_connection::{self as hc, RowMix};
use crate::ops::rms_norm::inverse_rms;
use crate::ops::rope::{rotate, rotate_back};
use crate::ops::{Mat, for_chunks, indexer, moe_gemm, router, sparse_attention};
use crate::simd::Row;

impl Backend for Reference {
    type Act = Mat;
    type Partial = Partial;
    type Streams = Streams;
    type Mix = Vec<RowMix>;
    type Selection = Vec<Vec<u32>>;
    type Routing = Routing;
    type Logits = Mat;
    type Error = ReferenceError;

    fn embed(&mut self) -> Result<Partial, ReferenceError> {
        let w = self.weights.matrix(TensorId { block: Block::Global, kind: Kind::Embed }, 0);
        let first = w.rows * self.tp.rank() as usize;
        let mut out = Mat::zeros(self.rows(), w.cols);
        for (r, token) in self.current.step.tokens.iter().enumerate() {
            if let Some(local) = (*token as usize).checked_sub(first).filter(|l| *l < w.rows) {
                w.widen_row(local, out.row_mut(r));
            }
        }
        Ok(Partial(out))
    }

    fn all_reduce(&mut self, Partial(mut part): Partial) -> Result<Mat, ReferenceError> {
        self.exchange().all_reduce(&mut part.data)?;
        Ok(self.round(part))
    }

    fn expand(&mut self, x: Mat) -> Result<Streams, ReferenceError> {
        let m = self.config.hc_mult as usize;
        let mut h = Mat::zeros(x.rows, m * x.cols);
        for r in 0..x.rows {
            h.row_mut(r).chunks_exact_mut(x.cols).for_each(|stream| stream.copy_from_slice(x.row(r)));
        }
        Ok(Streams(h))
    }

    fn draft_input(&mut self, embedded: Mat, source: &Streams, block: Block) -> Result<Streams, ReferenceError> {
        let (m, dim) = (self.config.hc_mult as usize, self.config.hidden_size as usize);
        let embedded = self.norm(embedded, block, Kind::ENorm);
        let e = self.linear(&embedded, block, Kind::EProj);
        let mut streams = Mat::zeros(self.rows() * m, dim);
        for (r, from) in self.current.step.source.iter().enumerate() {
            streams.data[r * m * dim..(r + 1) * m * dim].copy_from_slice(source.0.row(*from as usize));
        }
        let streams = self.norm(streams, block, Kind::HNorm);
        let mut h = self.linear(&streams, block, Kind::HProj);
        for (i, stream) in h.data.chunks_exact_mut(dim).enumerate() {
            stream.iter_mut().zip(e.row(i / m)).for_each(|(h, e)| *h += e);
        }
        let h = self.round(h);
        Ok(Streams(Mat { rows: self.rows(), cols: m * dim, data: h.data }))
    }

    fn hc_site(
        &mut self,
        h: &mut Streams,
        done: Option<Done<Self>>,
        layer: &LayerSpec,
        site: Site,
    ) -> Result<(Mat, Vec<RowMix>), ReferenceError> {
        if let Some(done) = done {
            self.hc_finish(h, done)?;
        }
        self.site = Some((layer.block, site));
        let (matrix, base, scale, norm, name) = match site {
            Site::Attn => (Kind::HcAttnFn, Kind::HcAttnBase, Kind::HcAttnScale, Kind::AttnNorm, "attn"),
            Site::Ffn => (Kind::HcFfnFn, Kind::HcFfnBase, Kind::HcFfnScale, Kind::FfnNorm, "ffn"),
        };
        let params = self.hc_params();
        let w = self.weights.matrix(TensorId { block: layer.block, kind: matrix }, 0);
        let (base, scale) = (self.weights.small(layer.block, base), self.weights.small(layer.block, scale));
        let mut x = Mat::zeros(h.0.rows, self.config.hidden_size as usize);
        let row_of = |i: usize| match w.row(i) {
            Row::F32(values) => values,
            other => panic!("mixing matrices are float32, not {other:?}"),
        };
        let mix = |r: usize| hc::mix(h.0.row(r), row_of, base, scale, params);
        let mixes: Vec<RowMix> = if h.0.rows > 1 {
            use rayon::prelude::*;
            (0..h.0.rows).into_par_iter().map(mix).collect()
        } else {
            (0..h.0.rows).map(mix).collect()
        };
        for (r, mix) in mixes.iter().enumerate() {
            hc::collapse(h.0.row(r), &mix.pre, x.row_mut(r));
        }
        let x = self.round(x);
        self.tap(layer.block, &format!("{name}_in"), &x);
        if self.tap.is_some() {
            let post: Vec<f32> = mixes.iter().flat_map(|m| m.post.clone()).collect();
            let comb: Vec<f32> = mixes.iter().flat_map(|m| m.comb.clone()).collect();
            self.tap_values(layer.block, &format!("{name}_post"), params.streams, &post);
            self.tap_values(layer.block, &format!("{name}_comb"), params.streams * params.streams, &comb);
        }
        Ok((self.norm(x, layer.block, norm), mixes))
    }

    fn hc_finish(&mut self, h: &mut Streams, done: Done<Self>) -> Result<(), ReferenceError> {
        let cols = h.0.cols;
        let this = &*self;
        let work = h.0.data.len() * 8;
        for_chunks(&mut h.0.data, cols, work, |r, row| {
            hc::add_back(row, done.y.row(r), &done.mix[r]);
            this.round_all(row);
        });
        if let Some((block, site)) = self.site.filter(|_| self.tap.is_some()) {
            let (sublayer, streams) = match site {
                Site::Attn => ("attn_out", "h_mid"),
                Site::Ffn => ("ffn_out", "h_out"),
            };
            self.tap(block, sublayer, &done.y);
            self.tap(block, streams, &h.0);
        }
        Ok(())
    }

    fn attn_inputs(&mut self, x: &Mat, layer: &LayerSpec) -> Result<Projected<Mat>, ReferenceError> {
        let block = layer.block;
        let qr = self.norm(self.linear(x, block, Kind::WqA), block, Kind::QNorm);
        let mut kv = self.norm(self.linear(x, block, Kind::Wkv), block, Kind::KvNorm);
        for r in 0..kv.rows {
            rotate(kv.row_mut(r), &self.turns(layer)[r]);
            self.round_all(kv.row_mut(r));
            self.kv_round(kv.row_mut(r));
        }
        for r in 0..kv.rows {
            let (slot, position) = self.current.rows[r];
            self.layer_state(slot, block).window.row_mut(position).copy_from_slice(kv.row(r));
        }
        self.tap(block, "kv", &kv);
        if layer.ratio != 0 {
            let values = self.plain(x, block, Kind::CompressorWkv);
            let gates = self.plain(x, block, Kind::CompressorWgate);
            let new = self.compress(layer, false, &values, &gates);
            self.tap(block, "compressed_new", &new);
        }
        if layer.ratio != 4 {
            return Ok(Projected { main: qr, index: None });
        }
        let values = self.plain(x, block, Kind::IndexerWkv);
        let gates = self.plain(x, block, Kind::IndexerWgate);
        let new = self.compress(layer, true, &values, &gates);
        self.tap(block, "indexer_new", &new);
        let (heads, width) = (self.config.index_n_heads as f64, self.config.index_head_dim as f64);
        let scale = (1.0 / width.sqrt() / heads.sqrt()) as f32;
        let weights = self.round(self.plain(x, block, Kind::IndexerWeightsProj)).map(|v| v * scale);
        Ok(Projected { main: qr, index: Some(self.round(weights)) })
    }

    fn attn_queries(&mut self, qr: &Mat, layer: &LayerSpec) -> Result<Projected<Mat>, ReferenceError> {
        let block = layer.block;
        let dim = self.config.head_dim as usize;
        let mut q = self.linear(qr, block, Kind::WqB);
        let (this, cols) = (&*self, q.cols);
        let work = q.data.len() * 8;
        for_chunks(&mut q.data, cols, work, |r, row| {
            for head in row.chunks_exact_mut(dim) {
                let s = inverse_rms(head, this.config.rms_norm_eps);
                head.iter_mut().for_each(|v| *v *= s);
                this.round_all(head);
                rotate(head, &this.turns(layer)[r]);
                this.round_all(head);
            }
        });
        self.tap(block, "q", &q);
        if layer.ratio != 4 {
            return Ok(Projected { main: q, index: None });
        }
        let width = self.config.index_head_dim as usize;
        let mut qi = self.linear(qr, block, Kind::IndexerWqB);
        let (this, cols) = (&*self, qi.cols);
        let work = qi.data.len() * 16;
        for_chunks(&mut qi.data, cols, work, |r, row| {
            for head in row.chunks_exact_mut(width) {
                rotate(head, &this.turns(layer)[r]);
                this.round_all(head);
                this.index_round(head);
            }
        });
        Ok(Projected { main: q, index: Some(qi) })
    }

    fn index_select(
        &mut self,
        qi: &Mat,
        head_weights: &Mat,
        layer: &LayerSpec,
    ) -> Result<Vec<Vec<u32>>, ReferenceError> {
        use rayon::prelude::*;
        let k = self.config.index_topk as usize;
        let this = &*self;
        let select = |(r, (slot, position)): (usize, &(usize, usize))| {
            let visible = Self::visible(layer, *position);
            let index = compressed_ref(this.layer_state_ref(*slot, layer.block), true);
            if visible <= k && this.tap.is_none() {
                return (Vec::new(), (0..visible as u32).collect());
            }
            let scores = indexer::scores(qi.row(r), head_weights.row(r), index, visible);
            let kept = indexer::top_k(&scores, k);
            (scores, kept)
        };
        let chosen: Vec<(Vec<f32>, Vec<u32>)> =
            this.current.rows.par_iter().enumerate().map(|(r, at)| select((r, at))).collect();
        if self.tap.is_some() {
            let width = chosen.iter().map(|(s, _)| s.len()).max().unwrap_or(0);
            let mut scores =
                Mat { rows: chosen.len(), cols: width, data: vec![f32::NEG_INFINITY; chosen.len() * width] };
            let mut keep = Mat::zeros(chosen.len(), width);
            for (r, (s, kept)) in chosen.iter().enumerate() {
                scores.row_mut(r)[..s.len()].copy_from_slice(s);
                kept.iter().for_each(|w| keep.row_mut(r)[*w as usize] = 1.0);
            }
            self.tap(layer.block, "index_scores", &scores);
            self.tap(layer.block, "index_keep", &keep);
        }
        Ok(chosen.into_iter().map(|(_, kept)| kept).collect())
    }

    fn attend(&mut self, q: &Mat, selected: Option<&Vec<Vec<u32>>>, layer: &LayerSpec) -> Result<Mat, ReferenceError> {
        let dim = self.config.head_dim as usize;
        let heads = q.cols / dim;
        let window = self.config.sliding_window as usize;
        let sinks = self.weights.small(layer.block, Kind::AttnSink);
        let this = &*self;
        let mut o = Mat::zeros(q.rows, q.cols);
        let work = q.data.len() * 2 * window;
        for_chunks(&mut o.data, q.cols, work, |r, out| {
            let (slot, position) = this.current.rows[r];
            let state = this.layer_state_ref(slot, layer.block);
            let first = (position + 1).saturating_sub(window);
            let mut rows: Vec<&[f32]> = (first..=position).map(|p| state.window.row(p)).collect();
            if let Some(compressed) = &state.compressed {
                match selected {
                    Some(chosen) => rows.extend(chosen[r].iter().map(|w| compressed.entry(*w as usize))),
                    None => rows.extend((0..Self::visible(layer, position)).map(|w| compressed.entry(w))),
                }
            }
            for head in 0..heads {
                let part = head * dim..(head + 1) * dim;
                let out = &mut out[part.clone()];
                sparse_attention::attend(&q.row(r)[part], &rows, sinks[head], this.published(), out);
                this.round_all(out);
            }
        });
        self.tap(layer.block, "attn_heads", &o);
        let (this, cols) = (&*self, o.cols);
        let work = o.data.len();
        for_chunks(&mut o.data, cols, work, |r, row| {
            for head in row.chunks_exact_mut(dim) {
                rotate_back(head, &this.turns(layer)[r]);
                this.round_all(head);
            }
        });
        Ok(o)
    }

    fn attn_output(&mut self, o: &Mat, layer: &LayerSpec) -> Result<Partial, ReferenceError> {
        let block = layer.block;
        let groups = (self.config.o_groups / u64::from(self.tp.size())) as usize;
        let rank = self.config.o_lora_rank as usize;
        let width = o.cols / groups;
        let w = self.weights.matrix(TensorId { block, kind: Kind::WoA }, 0);
        let mut z = Mat::zeros(o.rows, groups * rank);
        for g in 0..groups {
            let mut part = Mat::zeros(o.rows, width);
            for r in 0..o.rows {
                part.row_mut(r).copy_from_slice(&o.row(r)[g * width..(g + 1) * width]);
            }
            // The published code does not quantise this activation.
            let out = matmul(&part, w.rows_from(g * rank, rank));
            for r in 0..o.rows {
                z.row_mut(r)[g * rank..(g + 1) * rank].copy_from_slice(out.row(r));
            }
        }
        let z = self.round(z);
        let y = self.linear_sum(&z, block, Kind::WoB, 0);
        Ok(Partial(y))
    }

    fn route(&mut self, x: &Mat, layer: &LayerSpec) -> Result<Routing, ReferenceError> {
        let k = self.config.num_experts_per_tok as usize;
        let affinities = self.plain(x, layer.block, Kind::Gate).map(router::affinity);
        let mut routing = Routing { chosen: Vec::new(), weights: Vec::new() };
        for r in 0..x.rows {
            let row = affinities.row(r);
            let chosen = if layer.hashed {
                let experts = self.weights.experts_of(layer.block, self.current.step.tokens[r]);
                // Loading checked the table's range; the order of a sum must not depend on the table's.
                let mut chosen: Vec<u32> = experts.iter().map(|e| *e as u32).collect();
                chosen.sort_unstable();
                chosen
            } else {
                router::choose(row, self.weights.small(layer.block, Kind::GateBias), k)
            };
            routing.weights.push(router::weights(row, &chosen, self.config.routed_scaling_factor));
            routing.chosen.push(chosen);
        }
        if self.tap.is_some() {
            let experts: Vec<f32> = routing.chosen.iter().flatten().map(|e| *e as f32).collect();
            let weights: Vec<f32> = routing.weights.iter().flatten().copied().collect();
            self.tap_values(layer.block, "route_experts", k, &experts);
            self.tap_values(layer.block, "route_weights", k, &weights);
        }
        Ok(routing)
    }

    fn experts(&mut self, x: &Mat, routing: &Routing, layer: &LayerSpec) -> Result<Partial, ReferenceError> {
        let block = layer.block;
        let limit = self.config.swiglu_limit;
        let this = &*self;
        let xq = this.quantised(x);
        let xq = xq.as_ref().unwrap_or(x);
        let expert = |input: &Mat, kinds: [Kind; 3], index: usize, weights: &dyn Fn(usize) -> f32| {
            let weight = |kind| this.weights.matrix(TensorId { block, kind }, index);
            let mut t = this.round(matmul(input, weight(kinds[0])));
            let up = this.round(matmul(input, weight(kinds[2])));
            for r in 0..t.rows {
                moe_gemm::swiglu(t.row_mut(r), up.row(r), limit, weights(r));
            }
            let t = this.round(t);
            this.linear_sum(&t, block, kinds[1], index)
        };
        let mut y = Mat::zeros(x.rows, x.cols);
        // Experts ascending, the shared one last: every row sums in the same order in any batch.
        for e in 0..this.config.n_routed_experts as u32 {
            let users: Vec<(usize, f32)> = (0..x.rows)
                .filter_map(|r| {
                    let slot = routing.chosen[r].iter().position(|c| *c == e)?;
                    Some((r, routing.weights[r][slot]))
                })
                .collect();
            if users.is_empty() {
                continue;
            }
            let mut input = Mat::zeros(users.len(), x.cols);
            for (i, (r, _)) in users.iter().enumerate() {
                input.row_mut(i).copy_from_slice(xq.row(*r));
            }
            let out = expert(&input, [Kind::W1, Kind::W2, Kind::W3], e as usize, &|i| users[i].1);
            for (i, (r, _)) in users.iter().enumerate() {
                y.row_mut(*r).iter_mut().zip(out.row(i)).for_each(|(y, o)| *y += o);
            }
        }
        let shared = expert(xq, [Kind::SharedW1, Kind::SharedW2, Kind::SharedW3], 0, &|_| 1.0);
        y.data.iter_mut().zip(&shared.data).for_each(|(y, s)| *y += s);
        Ok(Partial(y))
    }

    fn hc_head(&mut self, h: &Streams, block: Block) -> Result<Mat, ReferenceError> {
        let wanted = &self.current.step.logits;
        let params = self.hc_params();
        let weights = self.weights.small(block, Kind::HcHeadFn);
        let base = self.weights.small(block, Kind::HcHeadBase);
        let scale = self.weights.small(block, Kind::HcHeadScale)[0];
        let mut x = Mat::zeros(wanted.len(), self.config.hidden_size as usize);
        for (i, r) in wanted.iter().enumerate() {
            let row = h.0.row(*r as usize);
            let pre = hc::head_mix(row, weights, base, scale, params);
            hc::collapse(row, &pre, x.row_mut(i));
        }
        let x = self.round(x);
        Ok(self.norm(x, block, Kind::Norm))
    }

    fn logits(&mut self, x: &Mat) -> Result<Mat, ReferenceError> {
        let local = self.plain(x, Block::Global, Kind::Head);
        let size = self.tp.size() as usize;
        if self.tp.rank() != 0 {
            self.exchange().gather(&local.data, &mut [])?;
            return Ok(Mat::default());
        }
        let mut parts = vec![0f32; size * local.data.len()];
        self.exchange().gather(&local.data, &mut parts)?;
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
