//! The vocabulary: one method per operation of the model.
//!
//! An operation is one fusion unit (a kernel launch, or a few). [`crate::forward`] is written over
//! this trait; who implements it decides what happens (trace, CPU reference, GPU). Operations read
//! positions and lengths from the current [`Step`], never from their arguments, so that one
//! recorded graph can serve every step.

use crate::tensors::{Block, Kind, LayerSpec};

/// Rows of one sequence within a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Slot of the sequence.
    pub slot: u32,
    /// Position of its first row.
    pub start: u32,
    /// Rows.
    pub rows: u32,
}

/// What one forward pass works on; the same on every rank.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Step {
    /// Token id of every row, segment after segment.
    pub tokens: Vec<u32>,
    /// Segments in row order; at most one per slot.
    pub segments: Vec<Segment>,
    /// Rows whose logits are wanted, ascending.
    pub logits: Vec<u32>,
    /// Draft steps only: for every row, the row of the source streams it continues.
    pub source: Vec<u32>,
}

impl Step {
    /// Position of every row.
    pub fn positions(&self) -> impl Iterator<Item = u32> + '_ {
        self.segments.iter().flat_map(|s| s.start..s.start + s.rows)
    }
}

/// The two mixing sites of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Site {
    /// Before attention.
    Attn,
    /// Before the feed-forward part.
    Ffn,
}

/// A sublayer's output on its way back into the residual streams.
pub struct Done<B: Backend + ?Sized> {
    /// Sublayer output, summed over ranks: `[rows, D]`.
    pub y: B::Act,
    /// Its mixing weights.
    pub mix: B::Mix,
}

/// A projection of the attention and, on CSA layers, its companion for the indexer.
pub struct Projected<A> {
    /// Of the attention itself.
    pub main: A,
    /// Of the indexer.
    pub index: Option<A>,
}

/// Names of the operations, for traces and contracts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum Op {
    Embed,
    AllReduce,
    Expand,
    DraftInput,
    HcSite(Site),
    HcFinish,
    AttnInputs,
    AttnQueries,
    IndexSelect,
    Attend,
    AttnOutput,
    Route,
    Experts,
    HcHead,
    Logits,
}

/// The tensors an operation reads in a block: the only list.
pub fn weights(op: Op, layer: &LayerSpec) -> Vec<Kind> {
    use Kind::*;
    let csa = layer.ratio == 4;
    match op {
        Op::Embed => vec![Embed],
        Op::AllReduce | Op::Expand | Op::HcFinish | Op::IndexSelect => vec![],
        Op::DraftInput => vec![ENorm, EProj, HNorm, HProj],
        Op::HcSite(Site::Attn) => vec![HcAttnFn, HcAttnBase, HcAttnScale, AttnNorm],
        Op::HcSite(Site::Ffn) => vec![HcFfnFn, HcFfnBase, HcFfnScale, FfnNorm],
        Op::AttnInputs => {
            let mut list = vec![WqA, QNorm, Wkv, KvNorm];
            if layer.ratio != 0 {
                list.extend([CompressorWkv, CompressorWgate, CompressorApe, CompressorNorm]);
            }
            if csa {
                list.extend([IndexerWkv, IndexerWgate, IndexerApe, IndexerNorm, IndexerWeightsProj]);
            }
            list
        }
        Op::AttnQueries if csa => vec![WqB, IndexerWqB],
        Op::AttnQueries => vec![WqB],
        Op::Attend => vec![AttnSink],
        Op::AttnOutput => vec![WoA, WoB],
        Op::Route if layer.hashed => vec![Gate, Tid2Eid],
        Op::Route => vec![Gate, GateBias],
        Op::Experts => vec![SharedW1, SharedW3, W1, W3, SharedW2, W2],
        Op::HcHead => vec![HcHeadFn, HcHeadBase, HcHeadScale, Norm],
        Op::Logits => vec![Head],
    }
}

/// A backend of the model. `Act` values are `[rows, width]` unless said otherwise; `local` widths
/// are this rank's part. Shapes are those of the model and the current step; a backend asserts them.
pub trait Backend {
    /// Activation that is whole on every rank.
    type Act;
    /// This rank's summand of an activation: useless before [`Backend::all_reduce`].
    type Partial;
    /// The residual streams `[rows, M, D]`.
    type Streams;
    /// Mixing weights of a site: `post [rows, M]`, `comb [rows, M, M]`.
    type Mix;
    /// For every row the compressed entries it attends to.
    type Selection;
    /// For every row its experts and their weights.
    type Routing;
    /// Logits of the wanted rows (whole on rank 0).
    type Logits;
    /// What can go wrong while a step runs.
    type Error;

    /// Rows of the embedding that this rank holds; zero for other tokens. `[rows, D]`.
    fn embed(&mut self) -> Result<Self::Partial, Self::Error>;
    /// Sum over ranks, in rank order; rounds to the activation format.
    fn all_reduce(&mut self, part: Self::Partial) -> Result<Self::Act, Self::Error>;
    /// Starts the residual streams: M copies of the embedding.
    fn expand(&mut self, x: Self::Act) -> Result<Self::Streams, Self::Error>;
    /// Starts the streams of a draft block: `e_proj . norm(embedded) + h_proj . norm(source[j])` per stream.
    ///
    /// `source` are streams of an earlier step, read at the rows the current step names.
    fn draft_input(
        &mut self,
        embedded: Self::Act,
        source: &Self::Streams,
        block: Block,
    ) -> Result<Self::Streams, Self::Error>;
    /// Adds a finished sublayer to the streams, then mixes them for the next one.
    ///
    /// Returns the normalised sublayer input `[rows, D]` and its mixing weights. Source: V4
    /// hyper-connections (SPEC 3.1).
    fn hc_site(
        &mut self,
        h: &mut Self::Streams,
        done: Option<Done<Self>>,
        layer: &LayerSpec,
        site: Site,
    ) -> Result<(Self::Act, Self::Mix), Self::Error>;
    /// Adds the last sublayer to the streams.
    fn hc_finish(&mut self, h: &mut Self::Streams, done: Done<Self>) -> Result<(), Self::Error>;
    /// Everything that reads the attention input: the low-rank query, the window row, the open
    /// compressor rows (closing entries as windows fill) and, on CSA layers, the indexer's head weights.
    ///
    /// Writes the caches. Returns `qr [rows, Rq]` and the head weights `[rows, Hi]` (CSA only).
    fn attn_inputs(&mut self, x: &Self::Act, layer: &LayerSpec) -> Result<Projected<Self::Act>, Self::Error>;
    /// Queries, normalised per head and rotated: `[rows, local H, d]`; on CSA layers also the indexer's
    /// `[rows, Hi, di]`.
    fn attn_queries(&mut self, qr: &Self::Act, layer: &LayerSpec) -> Result<Projected<Self::Act>, Self::Error>;
    /// Scores the index entries and keeps the best `index_topk` visible ones per row.
    fn index_select(
        &mut self,
        qi: &Self::Act,
        head_weights: &Self::Act,
        layer: &LayerSpec,
    ) -> Result<Self::Selection, Self::Error>;
    /// Attention over window and entries (all visible ones, or the selected), with sink; turned back.
    /// `[rows, local H, d]`.
    fn attend(
        &mut self,
        q: &Self::Act,
        selected: Option<&Self::Selection>,
        layer: &LayerSpec,
    ) -> Result<Self::Act, Self::Error>;
    /// The grouped low-rank output projection.
    fn attn_output(&mut self, o: &Self::Act, layer: &LayerSpec) -> Result<Self::Partial, Self::Error>;
    /// Chooses experts and their weights.
    fn route(&mut self, x: &Self::Act, layer: &LayerSpec) -> Result<Self::Routing, Self::Error>;
    /// Shared and chosen experts, this rank's part of their width.
    fn experts(
        &mut self,
        x: &Self::Act,
        routing: &Self::Routing,
        layer: &LayerSpec,
    ) -> Result<Self::Partial, Self::Error>;
    /// Collapses the streams of the wanted rows and normalises: `[wanted, D]`. `block` owns the weights
    /// (`Global` for the trunk).
    fn hc_head(&mut self, h: &Self::Streams, block: Block) -> Result<Self::Act, Self::Error>;
    /// Logits of the wanted rows, gathered on rank 0: `[wanted, V]`.
    fn logits(&mut self, x: &Self::Act) -> Result<Self::Logits, Self::Error>;
}
