//! Residual streams: their start from embeddings, their mixing around every sublayer, their end.

use super::products::Product;
use super::{Activation, GpuBackend, GpuError, Partial, Streams};
use crate::device::args::{Act, F32};
use crate::device::{Buffer, DeviceError, In, Out};
use crate::ops::embedding::{self, DraftAddArgs, EmbedArgs, ExpandArgs, SettleArgs};
use crate::ops::hyper_connection::{self as hc, HcFinishArgs, HcHeadArgs, HcSiteArgs};
use crate::ops::rms_norm::{self, RmsNormArgs};
use dsv4_model::Kind;
use dsv4_model::ops::{Done, Site};
use dsv4_model::tensors::{Block, LayerSpec};

/// Mixing weights of a site.
#[derive(Clone, Copy, Debug)]
pub struct Mix {
    post: u64,
    comb: u64,
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
    /// Embedded rows of this rank's tokens.
    pub(super) fn embed_rows(&mut self) -> Result<Partial, GpuError> {
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

    /// One embedding into all residual streams.
    pub(super) fn expand_rows(&mut self, x: Activation) -> Result<Streams, GpuError> {
        let h = Streams { draft: false, rows: self.current.rows };
        let (y, parts) = summands(&x);
        let args = ExpandArgs { x: y, parts, count: values(&x), h: Out::at(self.streams_at(&h)), n: x.parts };
        embedding::launch_expand(&self.stream, self.kernels.embedding[1], h.rows, args)?;
        Ok(h)
    }

    /// The streams a draft step starts from: its tokens and the streams it continues.
    pub(super) fn start_draft(
        &mut self,
        embedded: Activation,
        source: &Streams,
        block: Block,
    ) -> Result<Streams, GpuError> {
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

    /// Adds what is done to the streams and mixes them into a sublayer's input.
    pub(super) fn enter_site(
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
        let small = |kind| In::at(self.weights.small(layer.block, kind));
        let add = self.addition(done);
        let half = |buffer: &Buffer| buffer.at() + self.mix * (buffer.bytes() / 2);
        let mix = Mix { post: half(&self.work.post), comb: half(&self.work.comb) };
        let x = self.activation(&self.work.x, self.shape.hidden);
        let args = HcSiteArgs {
            h: Out::at(self.streams_at(h)),
            y: add.y,
            parts: add.parts,
            count: add.count,
            post: add.post,
            comb: add.comb,
            w: In::at(self.matrix(layer.block, matrix).codes),
            base: small(base),
            scale: small(scale),
            norm: small(norm),
            partials: Out::at(self.work.mix_partials.at()),
            arrivals: Out::at(self.work.site_arrivals.at()),
            x: Out::at(x.at),
            next_post: Out::at(mix.post),
            next_comb: Out::at(mix.comb),
            n: add.n,
            first: 0,
            rows: self.current.rows,
            eps: self.config.rms_norm_eps,
            hc_eps: self.config.hc_eps,
        };
        hc::launch_site(&self.stream, &self.kernels.hc, args)?;
        self.mix ^= 1;
        Ok((x, mix))
    }

    /// Adds the last sublayer's result to the streams.
    pub(super) fn leave_site(&mut self, h: &mut Streams, done: Done<Self>) -> Result<(), GpuError> {
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

    /// The streams of the wanted rows, collapsed.
    pub(super) fn collapse_wanted(&mut self, h: &Streams, block: Block) -> Result<Activation, GpuError> {
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

    /// An activation in its format, rounded.
    pub(super) fn settle(&self, x: Activation) -> Result<Activation, DeviceError> {
        if x.parts == 0 {
            return Ok(x);
        }
        let y = self.activation(&self.work.embedded, x.cols);
        let args = SettleArgs { parts: In::at(x.at), y: Out::at(y.at), count: values(&x), n: x.parts };
        embedding::launch_settle(&self.stream, self.kernels.embedding[2], args)?;
        Ok(y)
    }

    fn addition(&self, done: Option<Done<Self>>) -> Addition {
        let Some(Done { y, mix }) = done else {
            return Addition { y: In::none(), parts: In::none(), count: 0, n: 0, post: In::none(), comb: In::none() };
        };
        let (rounded, parts) = summands(&y);
        let (post, comb) = (In::at(mix.post), In::at(mix.comb));
        Addition { y: rounded, parts, count: values(&y), n: y.parts, post, comb }
    }
}

/// An activation where it is one, or where its float32 parts are.
fn summands(x: &Activation) -> (In<Act>, In<F32>) {
    match x.parts {
        0 => (In::at(x.at), In::none()),
        _ => (In::none(), In::at(x.at)),
    }
}

/// Values of an activation, and of each of its parts.
fn values(x: &Activation) -> u64 {
    u64::from(x.rows) * u64::from(x.cols)
}
