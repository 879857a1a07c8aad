//! The table: every tensor of the model, with its checkpoint name, format, shape and partition.
//!
//! No other code spells, splits or matches a tensor name. A quantised weight and its scales are
//! one row; all experts of a layer are one row `[experts, out, in]`.

use std::fmt;

use crate::config::{Draft, ModelConfig};
use crate::error::ModelError;
use crate::inventory::Category;
use crate::layout::{FP4_GROUP, Format, MatrixLayout, TILE};
use crate::partition::{Partition, Tp};

/// Which part of the model a tensor belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Block {
    /// Embedding, head, final norm.
    Global,
    /// Trunk layer.
    Layer(u32),
    /// Draft stage.
    Draft(u32),
}

impl Block {
    fn prefix(self) -> String {
        match self {
            Block::Global => String::new(),
            Block::Layer(i) => format!("layers.{i}."),
            Block::Draft(s) => format!("mtp.{s}."),
        }
    }
}

impl fmt::Display for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Block::Global => write!(f, "global"),
            Block::Layer(i) => write!(f, "layers.{i}"),
            Block::Draft(s) => write!(f, "mtp.{s}"),
        }
    }
}

/// A dimension of a shape: its symbol in SPEC notation and its value.
#[derive(Clone, Copy)]
struct Dim(&'static str, fn(&ModelConfig, u32) -> u64);

impl Dim {
    fn of(self, config: &ModelConfig, ratio: u32) -> u64 {
        (self.1)(config, ratio)
    }
}

macro_rules! dims {
    ($($id:ident = $text:literal, |$c:ident, $r:ident| $value:expr;)*) => {
        $(const $id: Dim = Dim($text, |$c: &ModelConfig, $r: u32| $value);)*
    };
}

/// Halves of the compressor's channels: 2 with overlap (ratio 4), else 1.
fn halves(ratio: u32) -> u64 {
    if ratio == 4 { 2 } else { 1 }
}

fn lcm(a: u64, b: u64) -> u64 {
    let (mut x, mut y) = (a, b);
    while y != 0 {
        (x, y) = (y, x % y);
    }
    a / x * b
}

fn markov(c: &ModelConfig) -> u64 {
    if let Draft::DSpark { markov_rank, .. } = c.draft { markov_rank } else { 0 }
}

fn taps(c: &ModelConfig) -> u64 {
    if let Draft::DSpark { target_layer_ids, .. } = &c.draft { target_layer_ids.len() as u64 } else { 0 }
}

dims! {
    ONE = "1", |_c, _r| 1;
    THREE = "3", |_c, _r| 3;
    V = "V", |c, _r| c.vocab_size;
    D = "D", |c, _r| c.hidden_size;
    M = "M", |c, _r| c.hc_mult;
    MD = "M*D", |c, _r| c.hc_mult * c.hidden_size;
    MIX = "(2+M)*M", |c, _r| (2 + c.hc_mult) * c.hc_mult;
    H = "H", |c, _r| c.num_attention_heads;
    HD = "d", |c, _r| c.head_dim;
    Q = "H*d", |c, _r| c.num_attention_heads * c.head_dim;
    RQ = "Rq", |c, _r| c.q_lora_rank;
    O = "G*Ro", |c, _r| c.o_groups * c.o_lora_rank;
    GIN = "H*d/G", |c, _r| c.num_attention_heads * c.head_dim / c.o_groups;
    R = "r", |_c, r| u64::from(r);
    CW = "c*d", |c, r| halves(r) * c.head_dim;
    IW = "2*di", |c, _r| 2 * c.index_head_dim;
    HI = "Hi", |c, _r| c.index_n_heads;
    DI = "di", |c, _r| c.index_head_dim;
    IQ = "Hi*di", |c, _r| c.index_n_heads * c.index_head_dim;
    E = "E", |c, _r| c.n_routed_experts;
    K = "K", |c, _r| c.num_experts_per_tok;
    I = "I", |c, _r| c.moe_intermediate_size;
    MR = "Rm", |c, _r| markov(c);
    DMR = "D+Rm", |c, _r| c.hidden_size + markov(c);
    TAPS = "taps*D", |c, _r| taps(c) * c.hidden_size;
    // Units of a cut. A rank's heads are exactly those of its output groups, so both are cut by
    // groups; no cut falls inside an FP8 tile or an activation quantisation group.
    U_HEADS = "H/G*lcm(Ro,128)/Ro", |c, _r| c.num_attention_heads / c.o_groups * group_step(c);
    U_QROWS = "H*d/G*lcm(Ro,128)/Ro", |c, _r| c.num_attention_heads / c.o_groups * c.head_dim * group_step(c);
    U_GROUPS = "lcm(Ro,128)", |c, _r| lcm(c.o_lora_rank, TILE);
    U_TILE = "128", |_c, _r| TILE;
}

/// Groups that must stay together so that their rows of `wo_a` are whole tiles.
fn group_step(c: &ModelConfig) -> u64 {
    lcm(c.o_lora_rank, TILE) / c.o_lora_rank
}

/// When a row exists in a block.
#[derive(Clone, Copy, PartialEq, Eq)]
enum When {
    Always,
    Compressed,
    Csa,
    Hashed,
    Biased,
}

struct Spec {
    kind: Kind,
    name: &'static str,
    format: Format,
    shape: &'static [Dim],
    split: Option<(usize, Dim)>,
    when: When,
    category: Category,
}

macro_rules! table {
    ($($list:ident { $($kind:ident = $name:literal $format:ident [$($dim:ident),+] $(cut $at:literal by $unit:ident)? $(if $when:ident)? : $category:ident;)* })*) => {
        $(const $list: &[Spec] = &[$(Spec {
            kind: Kind::$kind,
            name: $name,
            format: Format::$format,
            shape: &[$($dim),+],
            split: table!(@cut $($at $unit)?),
            when: table!(@when $($when)?),
            category: Category::$category,
        }),*];)*
    };
    (@cut) => { None };
    (@cut $at:literal $unit:ident) => { Some(($at, $unit)) };
    (@when) => { When::Always };
    (@when $when:ident) => { When::$when };
}

/// What a tensor is, within its block. Names are those of the checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Kind {
    Embed,
    Head,
    Norm,
    HcHeadFn,
    HcHeadBase,
    HcHeadScale,
    AttnNorm,
    FfnNorm,
    HcAttnFn,
    HcAttnBase,
    HcAttnScale,
    HcFfnFn,
    HcFfnBase,
    HcFfnScale,
    AttnSink,
    WqA,
    QNorm,
    WqB,
    Wkv,
    KvNorm,
    WoA,
    WoB,
    CompressorApe,
    CompressorWkv,
    CompressorWgate,
    CompressorNorm,
    IndexerWqB,
    IndexerWeightsProj,
    IndexerApe,
    IndexerWkv,
    IndexerWgate,
    IndexerNorm,
    Gate,
    Tid2Eid,
    GateBias,
    W1,
    W2,
    W3,
    SharedW1,
    SharedW2,
    SharedW3,
    EProj,
    HProj,
    ENorm,
    HNorm,
    MainProj,
    MainNorm,
    MarkovW1,
    MarkovW2,
    Confidence,
}

table! {
    GLOBAL {
        Embed = "embed.weight" Bf16 [V, D] cut 0 by ONE : EmbedHead;
        Head = "head.weight" Bf16 [V, D] cut 0 by ONE : EmbedHead;
        Norm = "norm.weight" Bf16 [D] : NormsAndHead;
        HcHeadFn = "hc_head_fn" F32 [M, MD] : NormsAndHead;
        HcHeadBase = "hc_head_base" F32 [M] : NormsAndHead;
        HcHeadScale = "hc_head_scale" F32 [ONE] : NormsAndHead;
    }
    LAYER {
        AttnNorm = "attn_norm.weight" Bf16 [D] : NormsAndHead;
        FfnNorm = "ffn_norm.weight" Bf16 [D] : NormsAndHead;
        HcAttnFn = "hc_attn_fn" F32 [MIX, MD] : HyperConnections;
        HcAttnBase = "hc_attn_base" F32 [MIX] : HyperConnections;
        HcAttnScale = "hc_attn_scale" F32 [THREE] : HyperConnections;
        HcFfnFn = "hc_ffn_fn" F32 [MIX, MD] : HyperConnections;
        HcFfnBase = "hc_ffn_base" F32 [MIX] : HyperConnections;
        HcFfnScale = "hc_ffn_scale" F32 [THREE] : HyperConnections;
        AttnSink = "attn.attn_sink" F32 [H] cut 0 by U_HEADS : Attention;
        WqA = "attn.wq_a" Fp8 [RQ, D] : Attention;
        QNorm = "attn.q_norm.weight" Bf16 [RQ] : Attention;
        WqB = "attn.wq_b" Fp8 [Q, RQ] cut 0 by U_QROWS : Attention;
        Wkv = "attn.wkv" Fp8 [HD, D] : Attention;
        KvNorm = "attn.kv_norm.weight" Bf16 [HD] : Attention;
        WoA = "attn.wo_a" Fp8 [O, GIN] cut 0 by U_GROUPS : Attention;
        WoB = "attn.wo_b" Fp8 [D, O] cut 1 by U_GROUPS : Attention;
        CompressorApe = "attn.compressor.ape" F32 [R, CW] if Compressed : Compressors;
        CompressorWkv = "attn.compressor.wkv.weight" Bf16 [CW, D] if Compressed : Compressors;
        CompressorWgate = "attn.compressor.wgate.weight" Bf16 [CW, D] if Compressed : Compressors;
        CompressorNorm = "attn.compressor.norm.weight" Bf16 [HD] if Compressed : Compressors;
        IndexerWqB = "attn.indexer.wq_b" Fp8 [IQ, RQ] if Csa : Indexers;
        IndexerWeightsProj = "attn.indexer.weights_proj.weight" Bf16 [HI, D] if Csa : Indexers;
        IndexerApe = "attn.indexer.compressor.ape" F32 [R, IW] if Csa : Indexers;
        IndexerWkv = "attn.indexer.compressor.wkv.weight" Bf16 [IW, D] if Csa : Indexers;
        IndexerWgate = "attn.indexer.compressor.wgate.weight" Bf16 [IW, D] if Csa : Indexers;
        IndexerNorm = "attn.indexer.compressor.norm.weight" Bf16 [DI] if Csa : Indexers;
        Gate = "ffn.gate.weight" Bf16 [E, D] : Routers;
        Tid2Eid = "ffn.gate.tid2eid" I64 [V, K] if Hashed : Routers;
        GateBias = "ffn.gate.bias" F32 [E] if Biased : Routers;
        W1 = "ffn.experts.{e}.w1" Fp4 [E, I, D] cut 1 by U_TILE : RoutedExperts;
        W3 = "ffn.experts.{e}.w3" Fp4 [E, I, D] cut 1 by U_TILE : RoutedExperts;
        W2 = "ffn.experts.{e}.w2" Fp4 [E, D, I] cut 2 by U_TILE : RoutedExperts;
        SharedW1 = "ffn.shared_experts.w1" Fp8 [I, D] cut 0 by U_TILE : SharedExperts;
        SharedW3 = "ffn.shared_experts.w3" Fp8 [I, D] cut 0 by U_TILE : SharedExperts;
        SharedW2 = "ffn.shared_experts.w2" Fp8 [D, I] cut 1 by U_TILE : SharedExperts;
    }
    MTP {
        EProj = "e_proj" Fp8 [D, D] : Draft;
        HProj = "h_proj" Fp8 [D, D] : Draft;
        ENorm = "enorm.weight" Bf16 [D] : Draft;
        HNorm = "hnorm.weight" Bf16 [D] : Draft;
        Norm = "norm.weight" Bf16 [D] : Draft;
        HcHeadFn = "hc_head_fn" F32 [M, MD] : Draft;
        HcHeadBase = "hc_head_base" F32 [M] : Draft;
        HcHeadScale = "hc_head_scale" F32 [ONE] : Draft;
    }
    DSPARK_FIRST {
        MainProj = "main_proj" Fp8 [D, TAPS] : Draft;
        MainNorm = "main_norm.weight" Bf16 [D] : Draft;
    }
    DSPARK_LAST {
        Norm = "norm.weight" Bf16 [D] : Draft;
        HcHeadFn = "hc_head_fn" F32 [M, MD] : Draft;
        HcHeadBase = "hc_head_base" F32 [M] : Draft;
        HcHeadScale = "hc_head_scale" F32 [ONE] : Draft;
        MarkovW1 = "markov_head.markov_w1.weight" Bf16 [V, MR] : Draft;
        MarkovW2 = "markov_head.markov_w2.weight" Bf16 [V, MR] : Draft;
        Confidence = "confidence_head.proj.weight" Bf16 [ONE, DMR] : Draft;
    }
}

/// One tensor of the model: a block and what it is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TensorId {
    /// Layer or draft stage.
    pub block: Block,
    /// Which of its tensors.
    pub kind: Kind,
}

/// A row of the table for one model: everything about one tensor.
#[derive(Clone, Debug)]
pub struct TensorRow {
    /// Identity.
    pub id: TensorId,
    /// Name in the artifact: the checkpoint's, without `.weight` of quantised tensors; `{e}` stands for the expert.
    pub name: String,
    /// Number format.
    pub format: Format,
    /// Whole shape; `[out, in]`, `[experts, out, in]` or `[n]`.
    pub shape: Vec<u64>,
    /// How ranks share it.
    pub partition: Partition,
    /// Inventory category.
    pub category: Category,
}

/// One tensor as the checkpoint stores it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredTensor {
    /// Name in the safetensors header.
    pub name: String,
    /// safetensors dtype.
    pub dtype: &'static str,
    /// Shape as stored.
    pub shape: Vec<u64>,
    /// Bytes as stored.
    pub bytes: u64,
}

fn stored(name: String, dtype: &'static str, width: u64, shape: Vec<u64>) -> StoredTensor {
    let bytes = shape.iter().product::<u64>() * width;
    StoredTensor { name, dtype, shape, bytes }
}

impl TensorRow {
    /// Experts in the row; 1 for anything that is not a stack of experts.
    pub fn matrices(&self) -> u64 {
        if self.shape.len() == 3 { self.shape[0] } else { 1 }
    }

    /// Checkpoint tensors of matrix `index`: values, then scales where the format has them.
    pub fn stored(&self, index: u64) -> Vec<StoredTensor> {
        let name = self.name.replace("{e}", &index.to_string());
        let matrix = if self.shape.len() == 3 { self.shape[1..].to_vec() } else { self.shape.clone() };
        match self.format {
            Format::F32 => vec![stored(name, "F32", 4, matrix)],
            Format::Bf16 => vec![stored(name, "BF16", 2, matrix)],
            Format::I64 => vec![stored(name, "I64", 8, matrix)],
            Format::Fp8 => {
                let scales = vec![matrix[0].div_ceil(TILE), matrix[1].div_ceil(TILE)];
                vec![
                    stored(format!("{name}.weight"), "F8_E4M3", 1, matrix),
                    stored(format!("{name}.scale"), "F8_E8M0", 1, scales),
                ]
            }
            Format::Fp4 => vec![
                stored(format!("{name}.weight"), "I8", 1, vec![matrix[0], matrix[1] / 2]),
                stored(format!("{name}.scale"), "F8_E8M0", 1, vec![matrix[0], matrix[1] / FP4_GROUP]),
            ],
        }
    }

    /// Bytes in the checkpoint, scales included.
    pub fn checkpoint_bytes(&self) -> u64 {
        // All matrices of a stack have the same size.
        self.matrices() * self.stored(0).iter().map(|t| t.bytes).sum::<u64>()
    }

    /// Shape of the part that `tp` holds. Errors: the cut would not fall on a unit.
    pub fn local_shape(&self, tp: Tp) -> Result<Vec<u64>, ModelError> {
        (0..self.shape.len())
            .map(|dim| self.partition.range(&self.name, dim, self.shape[dim], tp).map(|r| r.end - r.start))
            .collect()
    }

    /// Layout of one matrix of the part that `tp` holds.
    pub fn matrix_layout(&self, tp: Tp) -> Result<MatrixLayout, ModelError> {
        let shape = self.local_shape(tp)?;
        let cols = shape[shape.len() - 1];
        let rows = if shape.len() == 1 { 1 } else { shape[shape.len() - 2] };
        Ok(MatrixLayout::new(self.format, rows, cols))
    }

    /// Bytes in the rank file of `tp`.
    pub fn artifact_bytes(&self, tp: Tp) -> Result<u64, ModelError> {
        Ok(self.matrices() * self.matrix_layout(tp)?.stride)
    }
}

/// What a layer or draft stage is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerSpec {
    /// Which one.
    pub block: Block,
    /// Compression ratio of its attention: 0 (window only), 4 (CSA) or 128 (HCA).
    pub ratio: u32,
    /// Routed by the token table instead of the biased top-k.
    pub hashed: bool,
}

/// The layers of the trunk, in order.
pub fn layers(config: &ModelConfig) -> Vec<LayerSpec> {
    (0..config.num_hidden_layers)
        .map(|i| LayerSpec {
            block: Block::Layer(i),
            ratio: config.compress_ratios[i as usize],
            hashed: i < config.num_hash_layers,
        })
        .collect()
}

/// The draft stages, in order: window-only, routed by bias.
pub fn draft_stages(config: &ModelConfig) -> Vec<LayerSpec> {
    (0..config.draft_stages()).map(|s| LayerSpec { block: Block::Draft(s), ratio: 0, hashed: false }).collect()
}

fn row(spec: &Spec, block: Block, ratio: u32, config: &ModelConfig) -> TensorRow {
    let partition = match spec.split {
        None => Partition::Copy,
        Some((dim, unit)) => Partition::Split { dim, unit: unit.of(config, ratio) },
    };
    TensorRow {
        id: TensorId { block, kind: spec.kind },
        name: block.prefix() + spec.name,
        format: spec.format,
        shape: spec.shape.iter().map(|d| d.of(config, ratio)).collect(),
        partition,
        category: if matches!(block, Block::Draft(_)) { Category::Draft } else { spec.category },
    }
}

/// Every row of `config`'s model: globals, then trunk layers, then draft stages.
pub fn table(config: &ModelConfig) -> Vec<TensorRow> {
    let mut rows: Vec<TensorRow> = GLOBAL.iter().map(|s| row(s, Block::Global, 0, config)).collect();
    let stages = config.draft_stages();
    for layer in layers(config).into_iter().chain(draft_stages(config)) {
        let present = |s: &&Spec| match s.when {
            When::Always => true,
            When::Compressed => layer.ratio != 0,
            When::Csa => layer.ratio == 4,
            When::Hashed => layer.hashed,
            When::Biased => !layer.hashed,
        };
        let own = LAYER.iter().filter(present);
        let extra: &[&[Spec]] = match (layer.block, &config.draft) {
            (Block::Draft(_), Draft::Mtp) => &[MTP],
            (Block::Draft(s), Draft::DSpark { .. }) => match (s == 0, s + 1 == stages) {
                (true, true) => &[DSPARK_FIRST, DSPARK_LAST],
                (true, false) => &[DSPARK_FIRST],
                (false, true) => &[DSPARK_LAST],
                (false, false) => &[],
            },
            _ => &[],
        };
        let all = own.chain(extra.iter().flat_map(|list| list.iter()));
        rows.extend(all.map(|s| row(s, layer.block, layer.ratio, config)));
    }
    rows
}

/// The table as text in symbols: one line per row, for the weight contract.
pub(crate) fn describe() -> String {
    let mut out = String::new();
    let lists = [
        ("", GLOBAL),
        ("layers.{l}.", LAYER),
        ("mtp.{s}.", MTP),
        ("dspark.first.", DSPARK_FIRST),
        ("dspark.last.", DSPARK_LAST),
    ];
    for (prefix, list) in lists {
        for s in list {
            let shape: Vec<&str> = s.shape.iter().map(|d| d.0).collect();
            let when = match s.when {
                When::Always => "",
                When::Compressed => " when r>0",
                When::Csa => " when r=4",
                When::Hashed => " when hashed",
                When::Biased => " when not hashed",
            };
            let split = s.split.map_or("copy".to_owned(), |(dim, unit)| format!("Dim({dim}) by {}", unit.0));
            let layout = s.format.layout();
            out += &format!("{prefix}{} {} [{}] {split}{when}; {layout}\n", s.name, s.format.name(), shape.join(", "));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::PART_ALIGN;

    fn flash() -> ModelConfig {
        ModelConfig::parse(include_str!("../../../tests/golden/flash_config.json")).unwrap()
    }

    fn flash_0731() -> ModelConfig {
        ModelConfig::parse(include_str!("../../../tests/golden/flash_0731_config.json")).unwrap()
    }

    /// Bytes of one rank equal the table's parts: nothing lost or doubled by a cut.
    #[test]
    fn parts_of_every_row_sum_to_the_whole() {
        for config in [flash(), flash_0731()] {
            for size in [1, 2, 4, 8] {
                let tp = Tp::new(0, size).unwrap();
                for row in table(&config) {
                    let local: u64 = row.local_shape(tp).unwrap().iter().product();
                    let whole: u64 = row.shape.iter().product();
                    let share = if row.partition == Partition::Copy { 1 } else { u64::from(size) };
                    assert_eq!(local * share, whole, "{}", row.name);
                    assert_eq!(row.artifact_bytes(tp).unwrap() % PART_ALIGN, 0);
                }
            }
        }
    }

    /// No cut falls inside an FP8 tile, an FP4 group or an activation group.
    #[test]
    fn units_are_whole_tiles() {
        for text in [include_str!("../../../tests/nano/config.json"), include_str!("../../../tests/tiny/config.json")] {
            let config = ModelConfig::parse(text).unwrap();
            for row in table(&config) {
                if let (Partition::Split { unit, .. }, Format::Fp8 | Format::Fp4) = (row.partition, row.format) {
                    assert_eq!(unit % TILE, 0, "{}", row.name);
                }
                row.local_shape(Tp::new(1, 2).unwrap()).unwrap();
            }
            let refused = table(&config).iter().find_map(|r| r.local_shape(Tp::new(0, 4).unwrap()).err());
            assert!(matches!(refused, Some(ModelError::Indivisible { .. })), "TP 4 cuts tiles here");
        }
    }

    #[test]
    fn names_are_unique() {
        let mut seen = std::collections::HashSet::new();
        for row in table(&flash_0731()) {
            for index in 0..row.matrices() {
                for t in row.stored(index) {
                    assert!(seen.insert(t.name.clone()), "{}", t.name);
                }
            }
        }
        assert_eq!(seen.len(), 72_317);
    }
}
