//! How much memory a rank needs: weights, caches, what a step works in, and what surrounds them. Pure arithmetic.
//!
//! Lines are exact (weights, caches, a GPU's workspace), bounded by reading the forward pass (the CPU's) or assumed (a
//! process, a device context), and say which. All count what the backends allocate, the GPU's in the numerics asked
//! for: float32 activations need up to twice the caches and workspace.
//! Also here: what a step reads of all that, for floors under its time.
//! Absent: what a machine has, and the verdict; who plans knows the machine.

use dsv4_model::cache::PAGE_TOKENS;
use dsv4_model::tensors::{layers, table};
use dsv4_model::{Block, Kind, ModelConfig, ModelError, Tp};

use crate::gpu::shape::Shape;
use crate::gpu::state::StateSize;
use crate::gpu::workspace::{Need, Workspace};
use crate::numerics::Numerics;
use crate::state::sequence_bytes;
use crate::weights::is_small;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Most drafts that a step verifies.
pub const DRAFTS_MAX: u64 = 15;
/// A rank's program, tokenizer, manifest, thread stacks on the CPU.
const PROCESS_BYTES: u64 = 64 * MIB;
/// A GPU rank's host side: the same, with the driver's libraries.
const GPU_PROCESS_BYTES: u64 = 512 * MIB;
/// The ring of pinned buffers that blocks are verified in: 64 of 4 MiB.
const STAGING_BYTES: u64 = 256 * MIB;
/// A device context with loaded kernels.
const DEVICE_CONTEXT_BYTES: u64 = 512 * MIB;
/// Captured graphs of all step shapes.
const GRAPHS_BYTES: u64 = 256 * MIB;
/// Buffers of the exchange between ranks.
const COMMUNICATION_BYTES: u64 = GIB;
/// Left to others on a GB10, where memory that runs short ends the machine and not a program.
const GB10_RESERVE_BYTES: u64 = 6 * GIB;
const VALUE_BYTES: u64 = 4;

/// Which backend a plan is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// The CPU backend.
    Cpu,
    /// The GPU backend, on a GPU whose memory is the machine's.
    Cuda,
    /// The GPU backend, on a card with memory of its own: what lies there.
    Card,
}

impl Target {
    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Target::Cpu => "cpu",
            Target::Cuda | Target::Card => "cuda",
        }
    }
}

/// How well a number is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Basis {
    /// Counted.
    Exact,
    /// Not more than this.
    Bound,
    /// A guess that a measurement has to replace.
    Assumed,
}

impl Basis {
    /// As printed.
    pub fn name(self) -> &'static str {
        match self {
            Basis::Exact => "exact",
            Basis::Bound => "upper bound",
            Basis::Assumed => "assumed",
        }
    }
}

/// What is planned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    /// Backend.
    pub target: Target,
    /// Tokens of a sequence, prompt and answer.
    pub context: u64,
    /// Sequences at once.
    pub sequences: u64,
    /// Rows of a prefill step.
    pub chunk: u64,
    /// Compute threads of a rank.
    pub threads: u64,
    /// Activation arithmetic: how a GPU stores activations. The CPU's are float32 in any.
    pub numerics: Numerics,
    /// Whether the logits of all rows are wanted, not only those of a next token.
    pub all_logits: bool,
    /// Bytes to leave to others; by the host's kind if none.
    pub reserve: Option<u64>,
}

/// The ranks that run on one machine.
#[derive(Clone, Copy, Debug)]
pub struct Ranks<'a> {
    /// The model.
    pub config: &'a ModelConfig,
    /// Ranks in all.
    pub tp: u32,
    /// Rank and bytes of its weights in memory.
    pub here: &'a [(u32, u64)],
}

/// One line of a rank's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Line {
    /// What needs the memory.
    pub what: &'static str,
    /// How much.
    pub bytes: u64,
    /// How well that is known.
    pub basis: Basis,
}

/// What one rank needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankTable {
    /// The rank.
    pub rank: u32,
    /// Its memory by use; the same uses for every rank.
    pub lines: Vec<Line>,
}

impl RankTable {
    /// All lines.
    pub fn bytes(&self) -> u64 {
        self.lines.iter().map(|l| l.bytes).fold(0, u64::saturating_add)
    }
}

/// Bytes to leave to others unless told: 6 GiB on a GB10, else a twentieth of the machine's `total` within 256 MiB and 6 GiB.
///
/// Where only programs compete, a shortage costs a program and the kernel's own floors are already outside
/// what is available; so a small machine may use nearly all it has.
pub fn default_reserve(total: u64, is_gb10: bool) -> u64 {
    if is_gb10 { GB10_RESERVE_BYTES } else { (total / 20).clamp(256 * MIB, GB10_RESERVE_BYTES) }
}

/// Floats of activations that are alive at once for a row of a step, at most.
fn row_values(config: &ModelConfig, tp: u64) -> u64 {
    let c = config;
    let local = |n: u64| n.div_ceil(tp);
    // Streams: of the last trunk and draft steps, of this one, and a copy that the draft block makes.
    let streams = 4 * c.hc_mult * c.hidden_size;
    let layer = 6 * c.hidden_size;
    let queries = 4 * local(c.num_attention_heads * c.head_dim) + 3 * c.q_lora_rank;
    let rows = 8 * c.head_dim + 6 * c.index_head_dim;
    let index = 3 * c.index_n_heads * c.index_head_dim + c.index_topk;
    let output = 3 * local(c.o_groups * c.o_lora_rank);
    let experts = 4 * c.hidden_size + 6 * local(c.moe_intermediate_size) + 3 * c.n_routed_experts;
    streams + layer + queries + rows + index + output + experts
}

/// Bytes of everything a step needs and gives back.
fn workspace_bytes(ranks: &Ranks<'_>, asked: &Asked) -> u64 {
    let (c, tp) = (ranks.config, u64::from(ranks.tp));
    let rows = asked.chunk.max(1 + DRAFTS_MAX);
    let steps = rows * row_values(c, tp);
    // Of one vocabulary row: this rank's part, all parts, the joined row.
    let wanted = if asked.all_logits { rows } else { 1 + DRAFTS_MAX };
    let logits = 3 * wanted * c.vocab_size;
    // A thread scores every index entry of a row and lists the rows it attends to.
    let entries = asked.context / 4 * 2;
    let attended = 6 * (c.sliding_window + c.index_topk + asked.context / 128);
    let weights = 4 * c.hidden_size.max(c.num_attention_heads * c.head_dim);
    let threads = asked.threads * (entries + attended + weights);
    (steps + logits + threads) * VALUE_BYTES
}

/// Bytes of the caches of all sequences on one rank.
fn cache_bytes(config: &ModelConfig, asked: &Asked) -> u64 {
    let one = match asked.target {
        Target::Cpu => sequence_bytes(config, asked.chunk.max(1 + DRAFTS_MAX) as usize, asked.context),
        Target::Cuda | Target::Card => {
            let act_bytes = asked.numerics.act_bytes();
            StateSize { slots: 1, context: to_u32(asked.context), act_bytes }.bytes(config)
        }
    };
    one.saturating_mul(asked.sequences)
}

/// More than any model allows stays that.
fn to_u32(count: u64) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// Bytes of a GPU's workspace, and of the small tensors that it keeps as float32. Errors: those of [`tables`].
fn device_workspace_bytes(ranks: &Ranks<'_>, rank: u32, asked: &Asked) -> Result<u64, ModelError> {
    let tp = Tp::new(rank, ranks.tp)?;
    let shape = Shape::new(ranks.config, tp);
    let rows = to_u32(asked.chunk.max(1 + DRAFTS_MAX));
    let need = Need::new(ranks.config, shape, asked.numerics, rows, to_u32(asked.context));
    let mut bytes: u64 = Workspace::sizes(&need).iter().map(|(_, bytes)| bytes).sum();
    for row in table(ranks.config).iter().filter(|row| is_small(row.id.kind)) {
        bytes += row.local_shape(tp)?.iter().product::<u64>() * VALUE_BYTES;
    }
    Ok(bytes)
}

/// What every rank of a machine needs. Errors: a number of ranks that cannot cut the model.
pub fn tables(ranks: &Ranks<'_>, asked: &Asked) -> Result<Vec<RankTable>, ModelError> {
    let caches = cache_bytes(ranks.config, asked);
    let of = |&(rank, weights): &(u32, u64)| -> Result<RankTable, ModelError> {
        let mut lines = vec![("weights", weights, Basis::Exact), ("KV caches", caches, Basis::Exact)];
        if asked.target == Target::Cpu {
            let workspace = workspace_bytes(ranks, asked);
            lines.extend([("workspace", workspace, Basis::Bound), ("process", PROCESS_BYTES, Basis::Assumed)]);
        } else {
            lines.push(("workspace", device_workspace_bytes(ranks, rank, asked)?, Basis::Exact));
            lines.push(("graphs", GRAPHS_BYTES, Basis::Assumed));
        }
        // A card's context is there before anybody asks what is free; the rest lies in the machine's memory.
        if asked.target == Target::Cuda {
            let communication = if ranks.tp > 1 { COMMUNICATION_BYTES } else { 0 };
            lines.extend([
                ("communication", communication, Basis::Assumed),
                ("device context", DEVICE_CONTEXT_BYTES, Basis::Assumed),
                ("staging", STAGING_BYTES, Basis::Exact),
                ("process", GPU_PROCESS_BYTES, Basis::Assumed),
            ]);
        }
        let lines = lines.into_iter().map(|(what, bytes, basis)| Line { what, bytes, basis }).collect();
        Ok(RankTable { rank, lines })
    };
    ranks.here.iter().map(of).collect()
}

/// What all ranks of a machine need together.
pub fn total(tables: &[RankTable]) -> u64 {
    tables.iter().map(RankTable::bytes).fold(0, u64::saturating_add)
}

/// What a step reads, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepBytes {
    /// Of weights.
    pub weights: u64,
    /// Of caches.
    pub caches: u64,
}

impl StepBytes {
    /// Both.
    pub fn all(self) -> u64 {
        self.weights + self.caches
    }
}

/// What a trunk step of `rows` rows behind `context` positions of one sequence has to read on the GPU, everything
/// once: weights, of experts as many as the rows choose if no two choose the same; window rows, all index entries
/// and the long-range entries they lead to, all others. Errors: a tensor that cannot be cut for `tp`.
pub fn step_bytes(
    config: &ModelConfig,
    tp: Tp,
    numerics: Numerics,
    rows: u64,
    context: u64,
) -> Result<StepBytes, ModelError> {
    let mut weights = 0;
    for row in table(config) {
        if matches!(row.id.block, Block::Draft(_)) {
            continue;
        }
        let bytes = row.artifact_bytes(tp)?;
        weights += match row.id.kind {
            Kind::Embed | Kind::Tid2Eid => 0,
            Kind::W1 | Kind::W2 | Kind::W3 => {
                let chosen = (rows * config.num_experts_per_tok).min(config.n_routed_experts);
                bytes / config.n_routed_experts * chosen
            }
            _ => bytes,
        };
    }
    let stored = numerics.act_bytes();
    let (row, index) = (config.head_dim * stored, config.index_head_dim * stored);
    let caches = layers(config).into_iter().map(|layer| {
        let window = context.min(config.sliding_window) * row;
        let entries = context.checked_div(u64::from(layer.ratio)).unwrap_or(0);
        window
            + match layer.ratio {
                4 => entries * index + entries.min(rows * config.index_topk) * row,
                _ => entries * row,
            }
    });
    Ok(StepBytes { weights, caches: caches.sum() })
}

/// The largest context in whole pages, or the model's own, for which all ranks here need at most `usable` bytes.
/// Errors: those of [`tables`].
pub fn largest_context(ranks: &Ranks<'_>, asked: &Asked, usable: u64) -> Result<Option<u64>, ModelError> {
    let model = ranks.config.max_position_embeddings;
    let context = |pages: u64| (pages * PAGE_TOKENS).min(model);
    let fits = |pages: u64| -> Result<bool, ModelError> {
        Ok(total(&tables(ranks, &Asked { context: context(pages), ..*asked })?) <= usable)
    };
    // Needs grow with the context: `low` pages fit, `high` pages do not.
    let (mut low, mut high) = (0, model.div_ceil(PAGE_TOKENS) + 1);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if fits(middle)? { low = middle } else { high = middle }
    }
    Ok((low > 0).then(|| context(low)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A rank's arena of Flash at TP 2.
    const FLASH_TP2_BYTES: u64 = 80_509_665_280;

    fn flash() -> ModelConfig {
        ModelConfig::parse(include_str!("../../tests/golden/flash_config.json")).unwrap()
    }

    fn asked(target: Target, context: u64) -> Asked {
        let numerics = Numerics::Published;
        Asked { target, context, sequences: 1, chunk: 256, threads: 20, numerics, all_logits: false, reserve: None }
    }

    fn lines(tp: u32, asked: &Asked) -> Vec<(&'static str, u64, &'static str)> {
        let config = flash();
        let tables = tables(&Ranks { config: &config, tp, here: &[(0, FLASH_TP2_BYTES)] }, asked).unwrap();
        tables[0].lines.iter().map(|l| (l.what, l.bytes, l.basis.name())).collect()
    }

    /// Flash at TP 2, 65,536 tokens, by hand.
    #[test]
    fn flash_by_hand() {
        // Floats of a row: 4 copies of 4 streams, 6 layer inputs, queries of 32 heads, rows of keys and of the
        // indexer, its 64 heads and 512 choices, 4 output groups of 1024, half an expert's 2048.
        let row = 4 * 4 * 4096
            + 6 * 4096
            + (4 * 32 * 512 + 3 * 1024)
            + (8 * 512 + 6 * 128)
            + (3 * 64 * 128 + 512)
            + 3 * 4 * 1024
            + (4 * 4096 + 6 * 1024 + 3 * 256);
        let threads = 20 * (65_536 / 4 * 2 + 6 * (128 + 512 + 512) + 4 * 32_768);
        let workspace = 4 * (256 * row + 3 * 16 * 129_280 + threads);
        let windows = 44 * (128 + 512) * 512 * 4;
        let csa = 21 * (2 * (8 + 512) * (1024 + 256) + 16_384 * (512 + 128)) * 4;
        let hca = 20 * (2 * (128 + 512) * 512 + 512 * 512) * 4;
        assert_eq!(
            lines(2, &asked(Target::Cpu, 65_536)),
            [
                ("weights", FLASH_TP2_BYTES, "exact"),
                ("KV caches", windows + csa + hca, "exact"),
                ("workspace", workspace, "upper bound"),
                ("process", 64 * MIB, "assumed"),
            ]
        );
        // Rows of 512 and index entries of 128 bfloat16 values: 21 layers with an entry of both for 4 tokens, 20 with
        // one for 128; rings of 16 more rows than a window or a compressor's; a number for each of 256 pages.
        let entries = 21 * 16_384 * (512 + 128) * 2 + 20 * 512 * 512 * 2;
        let rings = 21 * 2 * (8 + 16) * (1024 + 256) * 4 + 20 * 2 * (128 + 16) * 512 * 4;
        let caches = entries + rings + 44 * 144 * 512 * 2 + 256 * 4;
        let asked = Asked { sequences: 3, ..asked(Target::Cuda, 65_536) };
        let table = lines(2, &asked);
        let workspace = table[2].1;
        assert!((128 * MIB..GIB).contains(&workspace), "{workspace}");
        let card = [
            ("weights", FLASH_TP2_BYTES, "exact"),
            ("KV caches", 3 * caches, "exact"),
            ("workspace", workspace, "exact"),
            ("graphs", 256 * MIB, "assumed"),
        ];
        let machine = [
            ("communication", GIB, "assumed"),
            ("device context", 512 * MIB, "assumed"),
            ("staging", 256 * MIB, "exact"),
            ("process", 512 * MIB, "assumed"),
        ];
        assert_eq!(table, [card, machine].concat());
        assert_eq!(lines(2, &Asked { target: Target::Card, ..asked }), card);
        // One rank exchanges nothing.
        assert_eq!(lines(1, &asked)[4], ("communication", 0, "assumed"));
        // In float numerics windows and entries are of float32 values; the compressors' rings are in any.
        let float = Asked { numerics: Numerics::Float, ..asked };
        let table = lines(2, &float);
        assert_eq!(table[1].1, 3 * (2 * entries + rings + 2 * 44 * 144 * 512 * 2 + 256 * 4));
        assert_eq!(table[2].1, device_workspace(Numerics::Float, 256, 65_536));
        assert_eq!(workspace, device_workspace(Numerics::Published, 256, 65_536));
        // What the CPU needs does not depend on them.
        let of = |numerics| lines(2, &Asked { numerics, target: Target::Cpu, ..asked });
        assert_eq!(of(Numerics::Float), of(Numerics::Published));
    }

    /// What the GPU backend reserves for steps of Flash on a rank of two, and what it widens.
    fn device_workspace(numerics: Numerics, rows: u32, context: u32) -> u64 {
        let (config, tp) = (flash(), Tp::new(0, 2).unwrap());
        let need = Need::new(&config, Shape::new(&config, tp), numerics, rows, context);
        let small = table(&config).into_iter().filter(|row| is_small(row.id.kind));
        let widened: u64 = small.map(|row| row.local_shape(tp).unwrap().iter().product::<u64>() * 4).sum();
        Workspace::sizes(&need).iter().map(|(_, bytes)| bytes).sum::<u64>() + widened
    }

    /// A plan of what cannot be is no plan of less.
    #[test]
    fn a_number_of_ranks_that_cannot_be() {
        let config = flash();
        let ranks = Ranks { config: &config, tp: 3, here: &[(0, 0)] };
        for numerics in [Numerics::Published, Numerics::Float] {
            let asked = Asked { numerics, ..asked(Target::Card, 256) };
            assert!(matches!(tables(&ranks, &asked), Err(ModelError::Tp { found: 3 })));
            assert!(matches!(largest_context(&ranks, &asked, u64::MAX), Err(ModelError::Tp { found: 3 })));
        }
    }

    /// A token of Flash on one of two ranks: 6.26 GB (the kernel guide counts them by hand).
    #[test]
    fn what_a_step_reads() {
        let (config, tp) = (flash(), Tp::new(0, 2).unwrap());
        let of = |rows, context| step_bytes(&config, tp, Numerics::Published, rows, context).unwrap();
        let one = of(1, 0);
        assert_eq!(one.caches, 0);
        assert!((6.2e9..6.4e9).contains(&(one.weights as f64)), "{one:?}");
        // Six experts more: each three quarters of 4096 x 2048 codes of half a byte and a scale for 32, in 43 layers.
        let experts = 43 * 6 * 3 * (2048 * 1024 + 2048 * 1024 / 16);
        assert_eq!(of(2, 0).weights - one.weights, experts);
        // All experts are read once, however many rows there are.
        assert_eq!(of(100, 0).weights, of(1000, 0).weights);
        let far = of(1, 65_536).caches;
        let (window, csa, hca) = (43 * 128 * 1024, 21 * (16_384 * 256 + 512 * 1024), 20 * 512 * 1024);
        assert_eq!(far, window + csa + hca);
        assert_eq!(of(2, 65_536).caches - far, 21 * 512 * 1024);
        let float = step_bytes(&config, tp, Numerics::Float, 1, 65_536).unwrap();
        assert_eq!((float.weights, float.caches), (one.weights, 2 * far));
    }

    #[test]
    fn reserves() {
        assert_eq!(default_reserve(0, true), 6 * GIB);
        assert_eq!(default_reserve(0, false), 256 * MIB);
        assert_eq!(default_reserve(40 * GIB, false), 2 * GIB);
        assert_eq!(default_reserve(1 << 40, false), 6 * GIB);
    }
}
