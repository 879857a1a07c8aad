//! What a step computes in: one buffer per role, reserved at the start for the longest step.
//!
//! A role is written and read within a layer, but for the streams. Sizes are known without a GPU, for plans.

use std::sync::Arc;

use dsv4_model::ModelConfig;
use dsv4_model::cache::PAGE_TOKENS;
use dsv4_model::tensors::draft_stages;

use crate::device::rows::Row;
use crate::device::{Buffer, DeviceError, Gpu};
use crate::gpu::kernels::DECODE_ROWS;
use crate::gpu::shape::{Shape, hc_shape};
use crate::numerics::Numerics;
use crate::ops::moe_gemm::prefill;
use crate::ops::{indexer, router, sparse_attention};

/// Scores that are computed before they are selected from: float32 values, unless a decode step needs more.
const SCORES_MAX: u64 = 1 << 25;
/// Outputs of all experts of a long step that are summed together: float32 values.
const EXPERT_OUTPUTS_MAX: u64 = 1 << 25;
/// Outputs of a slice of the experts are a multiple of this: tiles of the kernels.
const EXPERT_SLICE: u64 = 256;
/// Bytes of a float32, and of an index.
const WORD: u64 = 4;

/// What sizes follow from.
#[derive(Clone, Copy, Debug)]
pub struct Need {
    shape: Shape,
    rows: u64,
    act: u64,
    drafts: bool,
    long: bool,
    /// Index entries of the longest sequence.
    entries: u64,
    hc_partials: u64,
}

impl Need {
    /// Of a rank with steps of at most `rows_max` rows over sequences of at most `context` tokens.
    pub fn new(config: &ModelConfig, shape: Shape, numerics: Numerics, rows_max: u32, context: u32) -> Need {
        let pages = u64::from(context).div_ceil(PAGE_TOKENS);
        Need {
            shape,
            rows: u64::from(rows_max),
            act: numerics.act_bytes(),
            drafts: !draft_stages(config).is_empty(),
            long: numerics == Numerics::Published && rows_max > DECODE_ROWS,
            entries: if config.compress_ratios.contains(&4) { pages * PAGE_TOKENS / 4 } else { 0 },
            hc_partials: hc_shape(config).partials(rows_max),
        }
    }

    fn act(&self, width: u32) -> u64 {
        self.rows * u64::from(width) * self.act
    }

    fn f32(&self, width: u32) -> u64 {
        self.rows * u64::from(width) * WORD
    }

    /// Streams, one row after the other.
    fn streams(&self) -> u64 {
        self.act(self.shape.hidden * self.shape.streams)
    }

    fn if_drafts(&self, bytes: u64) -> u64 {
        if self.drafts { bytes } else { 0 }
    }

    fn if_long(&self, bytes: u64) -> u64 {
        if self.long { bytes } else { 0 }
    }

    /// Widest activation that is rounded before a product.
    fn quantised(&self) -> u64 {
        let s = &self.shape;
        let widest = s.hidden.max(s.q_rank).max(s.groups * s.o_rank);
        self.if_long(self.act(widest).max(self.if_drafts(self.streams())))
    }

    fn scores(&self) -> u64 {
        let decode = u64::from(DECODE_ROWS).min(self.rows) * self.entries;
        (self.rows * self.entries).min(SCORES_MAX).max(decode) * WORD
    }

    fn attention(&self) -> sparse_attention::Room {
        // The same for every ratio.
        sparse_attention::workspace(self.shape.attention(0))
    }

    /// Words between the blocks of a short step's rows that choose entries.
    fn choice(&self) -> (u64, u64) {
        match self.entries {
            0 => (0, 0),
            _ => indexer::workspace(DECODE_ROWS),
        }
    }

    fn expert_tiles(&self) -> u64 {
        u64::from(prefill::tiles_max(self.shape.moe_sizes(), prefill::TOKENS_MIN, self.rows as u32))
    }

    fn expert_outputs(&self) -> u64 {
        let slots = self.rows * u64::from(self.shape.chosen + 1);
        slots * expert_slice(u64::from(self.shape.hidden), slots) * WORD
    }
}

/// Outputs of `hidden` that a long step's experts compute at once, where rows have `slots` experts in all.
fn expert_slice(hidden: u64, slots: u64) -> u64 {
    (EXPERT_OUTPUTS_MAX / slots / EXPERT_SLICE * EXPERT_SLICE).max(EXPERT_SLICE).min(hidden)
}

macro_rules! workspace {
    ($need:ident; $($(#[$doc:meta])* $role:ident: $bytes:expr;)*) => {
        /// The buffers.
        pub struct Workspace {
            $($(#[$doc])* pub $role: Buffer),*
        }

        impl Workspace {
            /// Reserves all of them. Errors: not enough GPU memory.
            pub fn new(gpu: &Arc<dyn Gpu>, $need: &Need) -> Result<Workspace, DeviceError> {
                let work = Workspace { $($role: Buffer::new(gpu, $bytes)?),* };
                work.clear_counts(gpu.as_ref())?;
                Ok(work)
            }

            /// Bytes that are reserved for each role.
            pub fn reserved(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($role), self.$role.bytes())),*]
            }

            /// Bytes of each role.
            pub fn sizes($need: &Need) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($role), $bytes)),*]
            }
        }
    };
}
workspace! { n;
    /// What is uploaded once a step: rows, four tables of rotations, wanted rows.
    step: n.rows * (size_of::<Row>() as u64 + 4 * u64::from(n.shape.rope / 2) * 2 * WORD + WORD);
    /// Streams of the last trunk step, `[rows, M, D]` activations.
    trunk: n.streams();
    /// Streams of the last draft step.
    draft: n.if_drafts(n.streams());
    /// A rank's summand, `[rows, D]` float32.
    part: n.f32(n.shape.hidden);
    /// Embedded tokens, `[rows, D]` activations.
    embedded: n.act(n.shape.hidden);
    /// A drafter's normalised token and its projection.
    token: n.if_drafts(n.act(n.shape.hidden));
    /// As above.
    token_out: n.if_drafts(n.act(n.shape.hidden));
    /// A drafter's normalised source streams and their projection, `[rows, M, D]` activations.
    source: n.if_drafts(n.streams());
    /// As above.
    source_out: n.if_drafts(n.streams());
    /// Partial sums of the mixing.
    mix_partials: n.hc_partials * WORD;
    /// Blocks of a mixing that are done.
    site_arrivals: WORD;
    /// Mixing weights of two sites in turn, `[rows, M]` and `[rows, M, M]` float32.
    post: 2 * n.f32(n.shape.streams);
    /// As above.
    comb: 2 * n.f32(n.shape.streams * n.shape.streams);
    /// A sublayer's input, `[rows, D]` activations.
    x: n.act(n.shape.hidden);
    /// An activation as FP8 weights take it; only long steps write it down.
    quantised: n.quantised();
    /// The low-rank query.
    query_rank: n.act(n.shape.q_rank);
    /// Window rows before and after norm and rotation, `[rows, HD]` activations.
    kv_raw: n.act(n.shape.head_dim);
    /// As above.
    kv: n.act(n.shape.head_dim);
    /// Projections of the compressors, `[rows, columns]` float32.
    values: n.f32(2 * n.shape.head_dim);
    /// As above.
    gates: n.f32(2 * n.shape.head_dim);
    /// Of the indexer's.
    index_values: n.f32(2 * n.shape.index_dim);
    /// As above.
    index_gates: n.f32(2 * n.shape.index_dim);
    /// Raw weights of the index heads, `[rows, IH]` activations.
    head_weights: n.act(n.shape.index_heads);
    /// Queries, `[rows, H, HD]` activations.
    queries: n.act(n.shape.heads * n.shape.head_dim);
    /// Index queries, `[rows, IH, ID]` activations.
    index_queries: n.act(n.shape.index_heads * n.shape.index_dim);
    /// Scores of index entries of some rows, float32.
    scores: n.scores();
    /// Counts of the scores' first digits. Zeros between launches.
    score_bins: n.choice().0 * WORD;
    /// Blocks of a row that have scored. Zeros between launches.
    score_arrived: n.choice().1 * WORD;
    /// Chosen entries, `[rows, TOPK]`.
    selected: n.f32(n.shape.topk);
    /// Attention's sums of split lists.
    attend_partial: n.attention().partial * WORD;
    /// As above.
    attend_stats: n.attention().stats * WORD;
    /// Splits that have been summed. Zeros between launches.
    attend_arrived: n.attention().arrived * WORD;
    /// Attention, `[rows, H, HD]` activations.
    attended: n.act(n.shape.heads * n.shape.head_dim);
    /// The low-rank output, `[rows, G*OR]` activations.
    output_rank: n.act(n.shape.groups * n.shape.o_rank);
    /// What the gate gives, `[rows, E]` float32.
    gate: n.f32(n.shape.experts);
    /// Blocks of the gate that are done, for groups of rows.
    gate_arrivals: router::arrivals(n.rows) * WORD;
    /// Experts of every row and their weights, `[rows, K]`.
    chosen: n.f32(n.shape.chosen);
    /// As above.
    weights: n.f32(n.shape.chosen);
    /// Inside the experts, `[rows, K+1, F]` activations.
    mid: n.act((n.shape.chosen + 1) * n.shape.inner);
    /// Rows of each expert, in long steps.
    expert_counts: n.if_long(u64::from(n.shape.experts) * WORD);
    /// Pairs of row and slot, sorted by expert.
    expert_pairs: n.if_long(n.f32(n.shape.chosen));
    /// Tiles of them, and how many.
    expert_tiles: n.if_long(n.expert_tiles() * 4 * WORD);
    /// As above.
    expert_tile_count: n.if_long(WORD);
    /// Outputs of every slot, `[rows, K+1, outputs of a slice]` float32.
    expert_outputs: n.if_long(n.expert_outputs());
    /// The head's input, `[wanted, D]` activations.
    head: n.act(n.shape.hidden);
    /// Logits of some rows, `[16, local V]` float32.
    logits: u64::from(DECODE_ROWS) * u64::from(n.shape.vocab) * WORD;
}

impl Workspace {
    /// What is counted in begins with nothing, and is left so by whoever arrives last. Errors: the GPU's.
    fn clear_counts(&self, gpu: &dyn Gpu) -> Result<(), DeviceError> {
        [&self.site_arrivals, &self.gate_arrivals, &self.score_bins, &self.score_arrived, &self.attend_arrived]
            .into_iter()
            .try_for_each(|counts| gpu.fill(counts.at(), 0, counts.bytes()))
    }

    /// Rows whose scores fit, at `stride` values each.
    pub fn score_rows(&self, stride: u32) -> u32 {
        (self.scores.bytes() / (u64::from(stride) * WORD)).min(u64::from(u32::MAX)) as u32
    }

    /// Outputs that a long step of `rows` rows computes at once.
    pub fn expert_slice(shape: &Shape, rows: u32) -> u32 {
        expert_slice(u64::from(shape.hidden), u64::from(rows) * u64::from(shape.chosen + 1)) as u32
    }
}
