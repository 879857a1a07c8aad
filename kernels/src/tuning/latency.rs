//! What an H100 was measured to take beyond bytes and operations, and how that is carried to a chip that is not here.
//!
//! Two things of one card on one day (H100 80GB HBM3, 2026-11-24, one of two ranks of Flash): decode kernels at one row
//! and 8K tokens, timed by events, and prefill kernels in chunks of 8192 rows. A kernel's latency is what is left of its
//! time after what [`super::cost`] or its bytes explain; it is a number of seconds of a launch, whatever the chip:
//! barriers would shrink with the clock (a GB10's is 1.37 times an H100's), waits for memory grow (about 1.2 times).
//! Absent on purpose: any claim that this was measured elsewhere.

use dsv4_model::tensors::layers;
use dsv4_model::{ModelConfig, Tp};

use super::chip::{Chip, H100};

/// Latencies of a launch, seconds: from its start to its end what neither bytes nor the cost model's waves explain.
///
/// Event times less 2.5 us each, which is what 499 of them add to a step that took 5.56 ms without overlap, less the
/// model without its launches. `index_score` and `attend` also take [`SCORED`] and [`ATTENDED`].
const LATENCY: [(&str, f64); 8] = [
    ("gemv", 2.2e-6),
    ("moe_up", 2.5e-6),
    ("moe_down", 3.0e-6),
    ("hc_site", 6.4e-6),
    ("attend", 14.4e-6),
    ("index_score", 20.4e-6),
    ("gate", 4.3e-6),
    ("attn_prepare", 3.5e-6),
];
/// Of kernels that were not timed apart: what is left of all events for four launches.
const LATENCY_OTHER: f64 = 4.8e-6;
/// What a launch saves when kernels may start while the one ahead ends: 5.56 ms without, 5.20 ms with overlap.
const OVERLAPPED: f64 = 0.73e-6;
/// Of an entry of HCA attention beyond its bytes: between 8K and 200K a launch of 43 grew by 3.4 us, those of 20
/// layers by 1536 entries.
const ATTENDED: f64 = 4.4e-9;
/// Of an entry that the index scores and chooses from beyond its bytes: what is left of the 0.51 ms by which a step
/// grew between 8K and 200K.
const SCORED: f64 = 0.26e-9;
/// Rows that double what an entry takes: eight rows did for attention.
const ROWS_DOUBLE: f64 = 7.0;

/// Latency of a launch in a replayed step, seconds.
pub(super) fn of_launch(kernel: &str) -> f64 {
    let own = LATENCY.iter().find(|(name, _)| *name == kernel);
    own.map_or(LATENCY_OTHER, |(_, seconds)| *seconds) - OVERLAPPED
}

/// Seconds of `rows` rows for entries that attention reads and that the index scores: instructions, so they go by the
/// chip's multiprocessors and clock.
pub(super) fn of_entries(chip: &Chip, rows: u32, attended: f64, scored: f64) -> (f64, f64) {
    let power = |c: &Chip| f64::from(c.multiprocessors) * c.clock;
    let factor = power(&H100) / power(chip) * (1.0 + f64::from(rows - 1) / ROWS_DOUBLE);
    (attended * ATTENDED * factor, scored * SCORED * factor)
}

/// What a part of prefill goes by.
#[derive(Clone, Copy, PartialEq)]
enum By {
    /// Tensor cores.
    Products,
    /// Memory.
    Bytes,
}

/// Rows of the chunk that was measured, layers of it, and how many of them had an index.
const CHUNK: f64 = 8192.0;
const LAYERS: f64 = 6.0;
const INDEXED: f64 = 2.0;
/// Milliseconds of a layer, mean of the first six, by kernel; without `index_score`.
const PREFILL: [(&str, f64, By); 14] = [
    ("gemm_fp8", 3.43, By::Products),
    ("moe_up", 2.96, By::Products),
    ("moe_down", 1.63, By::Products),
    ("attend", 1.58, By::Products),
    ("hc_mix_tiled", 0.85, By::Bytes),
    ("hc_collapse", 0.47, By::Bytes),
    ("moe_up_shared", 0.42, By::Products),
    ("moe_sum", 0.40, By::Bytes),
    ("gemm_bf16", 0.39, By::Products),
    ("query_heads", 0.18, By::Bytes),
    ("fake_quant", 0.18, By::Bytes),
    ("compress", 0.08, By::Bytes),
    ("index", 0.13, By::Bytes),
    // The chunk took 84.5 ms; the rest of it is gaps and what was not listed.
    ("rest", 1.20, By::Bytes),
];
/// Milliseconds of `index_score`, in a mean of six layers: at depth 0, and for each 1024 tokens before the chunk.
const INDEX: (f64, f64) = (0.18, 0.0435);
/// Seconds of a row's two sums over two ranks in a layer at 23.7 GB/s, nothing hidden: an assumption.
const PREFILL_SUMS: f64 = 705e3 / 23.7e9 / 43.0;

/// A predicted chunk of a prompt.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prefill {
    /// Tokens before it.
    pub depth: u32,
    /// Tokens a second of a chunk there, sums over ranks included.
    pub at_depth: f64,
    /// Tokens a second of a whole prompt of so many tokens; none of an empty one.
    pub of_prompt: Option<f64>,
}

/// Prefill at a depth, by ratios to the H100 that was measured: products by tensor cores' rates of 16-bit operands, the
/// rest by the rates of memory. None for anything but what was measured: the layers of Flash, one rank of two.
pub fn prefill(config: &ModelConfig, tp: Tp, chip: &Chip, depth: u32) -> Option<Prefill> {
    let sizes = (config.hidden_size, config.moe_intermediate_size, config.n_routed_experts, config.hc_mult);
    if sizes != (4096, 2048, 256, 4) || tp.size() != 2 {
        return None;
    }
    let layers = layers(config);
    let (count, indexed) = (layers.len() as f64, layers.iter().filter(|l| l.ratio == 4).count() as f64);
    let mma = |c: &Chip| c.mma * c.clock * f64::from(c.multiprocessors);
    let factor = |by| if by == By::Products { mma(&H100) / mma(chip) } else { H100.dram / chip.dram };
    let fixed: f64 = PREFILL.iter().map(|(_, ms, by)| ms * 1e-3 * factor(*by)).sum::<f64>() * count / CHUNK;
    let index = |depth: f64| {
        let of_layer = (INDEX.0 + INDEX.1 * depth / 1024.0) * 1e-3 * LAYERS / INDEXED;
        of_layer * factor(By::Products) * indexed / CHUNK
    };
    let seconds = |depth: f64| fixed + index(depth) + PREFILL_SUMS * count;
    let depth_tokens = f64::from(depth);
    // Depth 0 stands for a first chunk; of a prompt chunks' depths average half of what is before the last.
    let mean = (depth_tokens - CHUNK).max(0.0) / 2.0;
    let of_prompt = (depth > 0).then(|| 1.0 / seconds(mean));
    Some(Prefill { depth, at_depth: 1.0 / seconds(depth_tokens), of_prompt })
}
