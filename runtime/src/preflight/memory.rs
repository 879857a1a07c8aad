//! The memory plan: what the ranks of this machine need against what it has, and what would fit. Pure arithmetic.
//!
//! What they need is the backends' to say ([`dsv4_kernels::memory`]); what counts as there, and the
//! verdict, are decided here.

pub use dsv4_kernels::memory::{Asked, RankTable, Ranks, Target};
use dsv4_kernels::memory::{DRAFTS_MAX, largest_context, tables, total};
use dsv4_model::ModelError;

use crate::generate::DRAFT_MAX;
use crate::preflight::host::Host;

// The workspace and the caches are counted for this many drafts.
const _: () = assert!(DRAFT_MAX as u64 == DRAFTS_MAX);

/// Memory of a GPU's own, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Card {
    /// All of it.
    pub total: u64,
    /// What its driver calls free.
    pub free: u64,
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
        if target == Target::Card {
            let Card { total, free } = host.card?;
            let basis = "what the GPU's driver calls free";
            return Some(Supply { total, free, available: free, cma_excess: 0, cgroup: None, usable: free, basis });
        }
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
            Target::Cpu | Target::Card => match cgroup {
                Some(headroom) if headroom < available => (headroom, "what the cgroup's limit leaves"),
                _ => (available, "MemAvailable"),
            },
        };
        Some(Supply { total: m.total, free: m.free, available, cma_excess, cgroup, usable, basis })
    }
}

/// Bytes to leave to others on this machine unless told: nothing of a card's memory, which nobody else needs.
pub fn default_reserve(host: &Host, target: Target) -> u64 {
    if target == Target::Card {
        return 0;
    }
    let total = host.memory.as_ref().map_or(0, |m| m.total);
    dsv4_kernels::memory::default_reserve(total, host.is_gb10())
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

/// Plans `asked` on `host`. Errors: a number of ranks that cannot cut the model.
pub fn plan(ranks: &Ranks<'_>, asked: &Asked, host: &Host) -> Result<Plan, ModelError> {
    let reserve = asked.reserve.unwrap_or_else(|| default_reserve(host, asked.target));
    let tables = tables(ranks, asked)?;
    let supply = Supply::of(host, asked.target);
    let context_max = match supply.map(|s| s.usable.checked_sub(reserve)) {
        None => Some(ranks.config.max_position_embeddings),
        Some(None) => None,
        Some(Some(usable)) => largest_context(ranks, asked, usable)?,
    };
    Ok(Plan {
        asked: *asked,
        needed: total(&tables).saturating_add(reserve),
        ranks: tables,
        reserve,
        supply,
        context_max,
        context_model: ranks.config.max_position_embeddings,
    })
}

#[cfg(test)]
mod tests {
    use dsv4_kernels::numerics::Numerics;
    use dsv4_model::ModelConfig;
    use dsv4_model::cache::PAGE_TOKENS;

    use super::*;
    use crate::preflight::host::tests::host;
    use crate::preflight::texts::Meminfo;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    fn config(text: &str) -> ModelConfig {
        ModelConfig::parse(text).unwrap()
    }

    fn flash() -> ModelConfig {
        config(include_str!("../../../tests/golden/flash_config.json"))
    }

    fn asked(target: Target, context: u64) -> Asked {
        let numerics = Numerics::Published;
        Asked { target, context, sequences: 1, chunk: 256, threads: 1, numerics, all_logits: false, reserve: None }
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
        let plan = plan(&ranks, &asked(Target::Cuda, 1 << 20), &host("gb10")).unwrap();
        let table = &plan.ranks[0];
        // Entries of bfloat16 values for a million tokens; the rest is counted where the table is made.
        let entries = 21 * (1 << 18) * (512 + 128) * 2 + 20 * (1 << 13) * 512 * 2;
        let caches = line(table, "KV caches");
        assert!((entries..entries + (64 << 20)).contains(&caches), "{caches}");
        let rest = line(table, "workspace") + GIB / 4 + GIB + GIB / 2 + GIB / 4 + GIB / 2;
        assert_eq!(table.bytes(), FLASH_TP2_BYTES + caches + rest);
        assert!((128 * MIB..GIB).contains(&line(table, "workspace")));
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
        let plan = plan(&ranks, &asked(Target::Cuda, 256), &host("gb10")).unwrap();
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
            let found = plan(&ranks, &asked(Target::Cuda, 4096), &host(name)).unwrap();
            assert_eq!(found.fits(), fits, "{name}");
        }
        // The kernel's extra CMA is taken off what is available.
        let supply = Supply::of(&host("gb10-kho"), Target::Cuda).unwrap();
        assert_eq!(supply.usable, (118_566_368 - (9_817_088 - 65_536)) << 10);
        // Programs may push the cache out.
        assert_eq!(Supply::of(&host("gb10-cached"), Target::Cpu).unwrap().usable, 115_412_332 << 10);
    }

    /// A card counts on its own: the machine's memory does not matter, and nothing is left to others.
    #[test]
    fn a_card_of_80_gib() {
        let config = flash();
        let ranks = Ranks { config: &config, tp: 2, here: &[(0, FLASH_TP2_BYTES)] };
        let with = |free| Host { card: Some(Card { total: 80 * GIB, free }), ..host("gb10-cached") };
        let found = plan(&ranks, &asked(Target::Card, 65_536), &with(79 * GIB)).unwrap();
        assert_eq!((found.reserve, found.fits()), (0, true));
        assert_eq!(found.needed, found.ranks[0].bytes());
        assert!(found.ranks[0].lines.iter().all(|l| !["process", "staging"].contains(&l.what)));
        let short = plan(&ranks, &asked(Target::Card, 65_536), &with(74 * GIB)).unwrap();
        assert_eq!((short.missing(), short.context_max), (found.needed - 74 * GIB, None));
        // Nothing is known of a card that nobody opened.
        assert_eq!(Supply::of(&host("gb10"), Target::Card), None);
    }

    /// What float numerics need more is planned, not found out.
    #[test]
    fn float_numerics_need_more() {
        let config = flash();
        let ranks = Ranks { config: &config, tp: 2, here: &[(0, FLASH_TP2_BYTES)] };
        let on_card = |numerics, free| {
            let host = Host { card: Some(Card { total: 80 * GIB, free }), ..Host::default() };
            plan(&ranks, &Asked { numerics, ..asked(Target::Card, 200_000) }, &host).unwrap()
        };
        let published = on_card(Numerics::Published, 80 * GIB);
        let float = on_card(Numerics::Float, published.needed);
        let caches = [&published, &float].map(|plan| line(&plan.ranks[0], "KV caches"));
        assert!(caches[1] > caches[0] * 19 / 10 && caches[1] < caches[0] * 2, "{caches:?}");
        assert_eq!((published.fits(), float.missing()), (true, float.needed - published.needed));
        assert!(float.context_max < Some(200_000) && on_card(Numerics::Float, float.needed).fits());
    }

    fn with_memory(available: u64, total: u64) -> Host {
        let memory = Meminfo { total, free: available / 2, available: Some(available), ..Meminfo::default() };
        Host { memory: Some(memory), ..Host::default() }
    }

    #[test]
    fn reserves() {
        assert_eq!(default_reserve(&host("gb10"), Target::Cpu), 6 * GIB);
        assert_eq!(default_reserve(&with_memory(0, GIB), Target::Cpu), 256 * MIB);
        assert_eq!(default_reserve(&with_memory(0, 40 * GIB), Target::Cpu), 2 * GIB);
        assert_eq!(default_reserve(&with_memory(0, 1 << 40), Target::Cpu), 6 * GIB);
        assert_eq!(default_reserve(&Host::default(), Target::Cpu), 256 * MIB);
        let config = config(include_str!("../../../tests/nano/config.json"));
        let ranks = Ranks { config: &config, tp: 1, here: &[(0, 9 << 20)] };
        let with =
            |reserve| plan(&ranks, &Asked { reserve, ..asked(Target::Cpu, 8192) }, &with_memory(GIB, GIB)).unwrap();
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
                numerics: if random(2) == 0 { Numerics::Float } else { Numerics::Published },
                all_logits: random(2) == 0,
                reserve: Some(random(GIB)),
                ..asked(target, 512)
            };
            let host = with_memory(random(if is_flash { 400 * GIB } else { 8 * GIB }), 512 * GIB);
            let found = plan(&ranks, &asked, &host).unwrap();
            let at = |context: u64| plan(&ranks, &Asked { context, ..asked }, &host).unwrap().fits();
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
