//! The memory plan: what the ranks of this machine need, what it has, and what would fit. Pure arithmetic.
//!
//! A plan adds up what is exact (weights, caches), what is bounded by reading the forward pass
//! (workspace) and what is assumed (a process, a device context); every line says which. The CPU
//! plan counts what the CPU backend allocates; the GPU plan counts the packed caches that are designed
//! and constants that a GB10 has yet to confirm.

use dsv4_kernels::state::sequence_bytes;
use dsv4_model::ModelConfig;
use dsv4_model::cache::{PAGE_TOKENS, PackedCache};

use crate::generate::DRAFT_MAX;
use crate::preflight::host::Host;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

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
    /// The CPU backend as it is.
    Cpu,
    /// The GPU backend as it is designed.
    Cuda,
}

impl Target {
    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Target::Cpu => "cpu",
            Target::Cuda => "cuda",
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
    /// Whether the logits of all rows are wanted, not only those of a next token.
    pub all_logits: bool,
    /// Bytes to leave to others; by the host's kind if none.
    pub reserve: Option<u64>,
}

/// The ranks that run on this machine.
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

/// What the machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Supply {
    /// MemTotal.
    pub total: u64,
    /// MemFree: what a GPU driver gets.
    pub free: u64,
    /// MemAvailable: what programs get.
    pub available: u64,
    /// Free memory that cannot be pinned.
    pub cma_excess: u64,
    /// What the cgroup lets this process take.
    pub cgroup: Option<u64>,
    /// What counts for the plan.
    pub usable: u64,
    /// Which of the above that is.
    pub basis: &'static str,
}

impl Supply {
    /// None where the machine does not say.
    pub fn of(host: &Host, target: Target) -> Option<Supply> {
        let m = host.memory.as_ref()?;
        let (available, cma_excess) = (m.available.unwrap_or(m.free), m.cma_excess());
        let cgroup = host.cgroup.map(|c| c.headroom);
        let (usable, basis) = match target {
            // The cgroup limits programs, not what a GPU driver takes for them.
            Target::Cuda => {
                let pinnable = available.saturating_sub(cma_excess);
                if m.free < pinnable {
                    (m.free, "MemFree (page cache does not count as free for the GPU driver)")
                } else {
                    (pinnable, "MemAvailable without the kernel's extra CMA")
                }
            }
            Target::Cpu => match cgroup {
                Some(headroom) if headroom < available => (headroom, "what the cgroup's limit leaves"),
                _ => (available, "MemAvailable"),
            },
        };
        Some(Supply { total: m.total, free: m.free, available, cma_excess, cgroup, usable, basis })
    }
}

/// Bytes to leave to others unless told: 6 GiB on a GB10, else a twentieth of the machine within 256 MiB and 6 GiB.
///
/// Where only programs compete, a shortage costs a program and the kernel's own floors are already outside
/// MemAvailable; so a small machine may use nearly all it has.
pub fn default_reserve(host: &Host) -> u64 {
    let total = host.memory.as_ref().map_or(0, |m| m.total);
    if host.is_gb10() { GB10_RESERVE_BYTES } else { (total / 20).clamp(256 * MIB, GB10_RESERVE_BYTES) }
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
    let rows = asked.chunk.max(1 + DRAFT_MAX as u64);
    let steps = rows * row_values(c, tp);
    // Of one vocabulary row: this rank's part, all parts, the joined row.
    let wanted = if asked.all_logits { rows } else { 1 + DRAFT_MAX as u64 };
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
        Target::Cpu => sequence_bytes(config, (asked.chunk as usize).max(1 + DRAFT_MAX), asked.context),
        Target::Cuda => {
            PackedCache::new(config).sequence_bytes(asked.context, config.sliding_window + DRAFT_MAX as u64)
        }
    };
    one.saturating_mul(asked.sequences)
}

/// What every rank of this machine needs.
pub fn tables(ranks: &Ranks<'_>, asked: &Asked) -> Vec<RankTable> {
    let caches = cache_bytes(ranks.config, asked);
    let workspace = workspace_bytes(ranks, asked);
    let of = |&(rank, weights): &(u32, u64)| {
        let mut lines = vec![("weights", weights, Basis::Exact), ("KV caches", caches, Basis::Exact)];
        match asked.target {
            Target::Cpu => {
                lines.extend([("workspace", workspace, Basis::Bound), ("process", PROCESS_BYTES, Basis::Assumed)]);
            }
            Target::Cuda => {
                // In prefill the window rows of a chunk lie beside the windows.
                let chunk = PackedCache::new(ranks.config).window_bytes(asked.chunk);
                let communication = if ranks.tp > 1 { COMMUNICATION_BYTES } else { 0 };
                lines.extend([
                    ("workspace", workspace.saturating_add(chunk), Basis::Assumed),
                    ("graphs", GRAPHS_BYTES, Basis::Assumed),
                    ("communication", communication, Basis::Assumed),
                    ("device context", DEVICE_CONTEXT_BYTES, Basis::Assumed),
                    ("staging", STAGING_BYTES, Basis::Exact),
                    ("process", GPU_PROCESS_BYTES, Basis::Assumed),
                ]);
            }
        }
        let lines = lines.into_iter().map(|(what, bytes, basis)| Line { what, bytes, basis }).collect();
        RankTable { rank, lines }
    };
    ranks.here.iter().map(of).collect()
}

/// A plan held against a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// What was asked.
    pub asked: Asked,
    /// What the ranks here need.
    pub ranks: Vec<RankTable>,
    /// Left to others.
    pub reserve: u64,
    /// Everything, the reserve included.
    pub needed: u64,
    /// What there is; none where the machine does not say.
    pub supply: Option<Supply>,
    /// The largest context up to the model's that would fit, in whole pages; none if not even a page would.
    pub context_max: Option<u64>,
    /// The model's own limit.
    pub context_model: u64,
}

impl Plan {
    /// Whether it fits; yes where nothing is known.
    pub fn fits(&self) -> bool {
        self.missing() == 0
    }

    /// Bytes that are missing.
    pub fn missing(&self) -> u64 {
        self.supply.map_or(0, |s| self.needed.saturating_sub(s.usable))
    }
}

/// Plans `asked` on `host`.
pub fn plan(ranks: &Ranks<'_>, asked: &Asked, host: &Host) -> Plan {
    let reserve = asked.reserve.unwrap_or_else(|| default_reserve(host));
    let tables = tables(ranks, asked);
    let supply = Supply::of(host, asked.target);
    let context_max = supply.map_or(Some(ranks.config.max_position_embeddings), |s| {
        largest_context(ranks, asked, s.usable.checked_sub(reserve)?)
    });
    Plan {
        asked: *asked,
        needed: total(&tables).saturating_add(reserve),
        ranks: tables,
        reserve,
        supply,
        context_max,
        context_model: ranks.config.max_position_embeddings,
    }
}

fn total(tables: &[RankTable]) -> u64 {
    tables.iter().map(RankTable::bytes).fold(0, u64::saturating_add)
}

/// The largest context in whole pages, or the model's own, for which all ranks here need at most `usable` bytes.
pub fn largest_context(ranks: &Ranks<'_>, asked: &Asked, usable: u64) -> Option<u64> {
    let model = ranks.config.max_position_embeddings;
    let context = |pages: u64| (pages * PAGE_TOKENS).min(model);
    let fits = |pages: u64| total(&tables(ranks, &Asked { context: context(pages), ..*asked })) <= usable;
    // Needs grow with the context: `low` pages fit, `high` pages do not.
    let (mut low, mut high) = (0, model.div_ceil(PAGE_TOKENS) + 1);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if fits(middle) { low = middle } else { high = middle }
    }
    (low > 0).then(|| context(low))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::preflight::host::tests::host;
    use crate::preflight::texts::Meminfo;

    fn config(text: &str) -> ModelConfig {
        ModelConfig::parse(text).unwrap()
    }

    fn flash() -> ModelConfig {
        config(include_str!("../../../tests/golden/flash_config.json"))
    }

    fn asked(target: Target, context: u64) -> Asked {
        Asked { target, context, sequences: 1, chunk: 256, threads: 1, all_logits: false, reserve: None }
    }

    fn line(table: &RankTable, what: &str) -> u64 {
        table.lines.iter().find(|l| l.what == what).unwrap_or_else(|| panic!("no {what}")).bytes
    }

    /// A rank's arena of Flash at TP 2, as `dsv4c plan` prints it.
    const FLASH_TP2_BYTES: u64 = 80_509_665_280;

    /// Flash at TP 2 and a million tokens on a GB10, by hand.
    #[test]
    fn flash_on_two_gb10() {
        let config = flash();
        let ranks = Ranks { config: &config, tp: 2, here: &[(1, FLASH_TP2_BYTES)] };
        let plan = plan(&ranks, &asked(Target::Cuda, 1 << 20), &host("gb10"));
        let table = &plan.ranks[0];
        // 3.432 GiB of entries, windows of 128 + 16 rows, open entries.
        let caches = 3_684_958_208 + 44 * 144 * 584 + 12_206_080;
        assert_eq!(line(table, "KV caches"), caches);
        let rest = line(table, "workspace") + GIB / 4 + GIB + GIB / 2 + GIB / 4 + GIB / 2;
        assert_eq!(table.bytes(), FLASH_TP2_BYTES + caches + rest);
        assert!(line(table, "workspace") > 256 * 44 * 584 && line(table, "workspace") < GIB / 2);
        assert_eq!(plan.needed, table.bytes() + 6 * GIB);
        let supply = plan.supply.unwrap();
        assert_eq!(supply.usable, 116_204_312 << 10);
        assert!(supply.basis.starts_with("MemFree"));
        assert!(plan.fits());
        assert_eq!(plan.context_max, Some(1 << 20));
    }

    /// Both ranks on one GB10 do not fit: the arithmetic says by how much.
    #[test]
    fn all_ranks_here_count() {
        let config = flash();
        let here = [(0, FLASH_TP2_BYTES), (1, FLASH_TP2_BYTES)];
        let ranks = Ranks { config: &config, tp: 2, here: &here };
        let plan = plan(&ranks, &asked(Target::Cuda, 256), &host("gb10"));
        assert_eq!(
            plan.missing(),
            plan.ranks.iter().map(RankTable::bytes).sum::<u64>() + 6 * GIB - (116_204_312 << 10)
        );
        assert_eq!((plan.fits(), plan.context_max), (false, None));
    }

    #[test]
    fn the_page_cache_and_held_memory_count_against_the_gpu() {
        let config = flash();
        let ranks = Ranks { config: &config, tp: 2, here: &[(0, FLASH_TP2_BYTES)] };
        for (name, fits) in [("gb10", true), ("gb10-cached", false), ("gb10-held", false), ("gb10-kho", true)] {
            assert_eq!(plan(&ranks, &asked(Target::Cuda, 4096), &host(name)).fits(), fits, "{name}");
        }
        // The kernel's extra CMA is taken off what is available.
        let supply = Supply::of(&host("gb10-kho"), Target::Cuda).unwrap();
        assert_eq!(supply.usable, (118_566_368 - (9_817_088 - 65_536)) << 10);
        // Programs may push the cache out.
        assert_eq!(Supply::of(&host("gb10-cached"), Target::Cpu).unwrap().usable, 115_412_332 << 10);
    }

    fn with_memory(available: u64, total: u64) -> Host {
        let memory = Meminfo { total, free: available / 2, available: Some(available), ..Meminfo::default() };
        Host { memory: Some(memory), ..Host::default() }
    }

    #[test]
    fn reserves() {
        assert_eq!(default_reserve(&host("gb10")), 6 * GIB);
        assert_eq!(default_reserve(&with_memory(0, GIB)), 256 * MIB);
        assert_eq!(default_reserve(&with_memory(0, 40 * GIB)), 2 * GIB);
        assert_eq!(default_reserve(&with_memory(0, 1 << 40)), 6 * GIB);
        assert_eq!(default_reserve(&Host::default()), 256 * MIB);
        let config = config(include_str!("../../../tests/nano/config.json"));
        let ranks = Ranks { config: &config, tp: 1, here: &[(0, 9 << 20)] };
        let with = |reserve| plan(&ranks, &Asked { reserve, ..asked(Target::Cpu, 8192) }, &with_memory(GIB, GIB));
        assert_eq!(with(None).needed - with(Some(0)).needed, 256 * MIB);
        assert_eq!(with(Some(7)).needed - with(Some(0)).needed, 7);
        // Nano runs on a machine of 1 GiB.
        assert!(with(None).fits());
    }

    #[test]
    fn a_cgroup_limits_programs_only() {
        let cgroup = Some(crate::preflight::host::CgroupMemory { limit: 9 * GIB, headroom: 5 * GIB });
        let host = Host { cgroup, ..with_memory(8 * GIB, 10 * GIB) };
        assert_eq!(Supply::of(&host, Target::Cpu).unwrap().usable, 5 * GIB);
        assert_eq!(Supply::of(&host, Target::Cuda).unwrap().usable, 4 * GIB);
        let host = Host { cgroup, ..with_memory(3 * GIB, 10 * GIB) };
        assert_eq!(Supply::of(&host, Target::Cpu).unwrap().usable, 3 * GIB);
        assert_eq!(Supply::of(&Host::default(), Target::Cpu), None);
    }

    /// The suggested context fits, one page more does not: for any memory, model, number of ranks and sequences.
    #[test]
    fn the_suggested_context_is_the_largest() {
        let nano = config(include_str!("../../../tests/nano/config.json"));
        let flash = flash();
        // Not a power of two, so that steps over sizes meet no round numbers.
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut random = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 20) % below
        };
        let (mut some, mut whole, mut none) = (0, 0, 0);
        for case in 0..2000 {
            let is_flash = case % 2 == 0;
            let (config, weights) = if is_flash { (&flash, 80 * GIB) } else { (&nano, 9 * MIB) };
            let here: Vec<(u32, u64)> = (0..1 + random(2) as u32).map(|r| (r, weights)).collect();
            let ranks = Ranks { config, tp: 2, here: &here };
            let target = if random(2) == 0 { Target::Cpu } else { Target::Cuda };
            let asked = Asked {
                sequences: 1 + random(4),
                chunk: 1 + random(512),
                threads: 1 + random(64),
                all_logits: random(2) == 0,
                reserve: Some(random(GIB)),
                ..asked(target, 512)
            };
            let host = with_memory(random(if is_flash { 400 * GIB } else { 8 * GIB }), 512 * GIB);
            let found = plan(&ranks, &asked, &host);
            let at = |context: u64| plan(&ranks, &Asked { context, ..asked }, &host).fits();
            match found.context_max {
                None => {
                    none += 1;
                    assert!(!at(PAGE_TOKENS), "{asked:?}");
                }
                Some(context) => {
                    let model = config.max_position_embeddings;
                    assert!(at(context), "{asked:?}");
                    assert!(context == model || context % PAGE_TOKENS == 0);
                    if context < model {
                        some += 1;
                        assert!(!at(context + PAGE_TOKENS), "{asked:?}");
                    } else {
                        whole += 1;
                    }
                }
            }
        }
        assert!(some > 50 && whole > 50 && none > 50, "{some} {whole} {none}");
    }
}
