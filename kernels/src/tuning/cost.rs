//! How long a launch should take: a launch, a ramp, and waves of blocks.
//!
//! A wave is as many blocks as are resident at once. Its throughput is that of memory (as fast as the bytes that are asked
//! for ahead allow, by Little's law), instructions, L2 cache or tensor cores. Beside it a block has a chain of its own:
//! start and end, the instructions of its longest warp, activations that queue behind the weights asked for. A kernel
//! that streams weights hides one behind the other in part ([`Constants::blend`]); tiles add their barriers, which other
//! resident blocks hide. What data sheets do not tell is [`Constants`], fitted on measured points ([`super::rank`]).

use dsv4_model::layout::Format;

use super::chip::Chip;
use super::resources::Resources;
use crate::device::Launch;

/// How a kernel works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Every warp streams weights past a few rows.
    Stream,
    /// Blocks multiply tiles, a barrier for every stage.
    Tiles,
}

/// What a launch has to do, all its blocks together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Work {
    /// How.
    pub kind: Kind,
    /// Bytes that must come from memory or go there.
    pub dram_bytes: f64,
    /// Bytes that go between L2 cache and multiprocessors.
    pub l2_bytes: f64,
    /// Floating-point operations of the tensor cores, whole tiles.
    pub tensor_flops: f64,
    /// Instructions of warps.
    pub issue: f64,
    /// Instructions of a block's longest warp.
    pub chain: f64,
    /// Bytes that a block has asked for ahead.
    pub flight_bytes: f64,
    /// Barriers of a block one after another.
    pub syncs: f64,
    /// The (largest) launch.
    pub shape: Launch,
    /// Launches.
    pub launches: f64,
}

/// What is known by measurement alone.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Constants {
    /// Launch, in parts of the chip's.
    pub launch: f64,
    /// Latency of memory under load, in parts of the chip's.
    pub latency: f64,
    /// Share of the memory's rate.
    pub dram: f64,
    /// Streams: start and end of a block, latencies.
    pub block: f64,
    /// Streams: instructions of a lone warp in a cycle.
    pub warp: f64,
    /// Streams: part of a wave's first bytes that activations wait for.
    pub queue: f64,
    /// Streams: 1 adds chain and throughput, more hides the smaller one.
    pub blend: f64,
    /// Tiles: share of the L2 cache's rate.
    pub l2: f64,
    /// Tiles: share of the issue slots.
    pub issue: f64,
    /// Tiles: share of the tensor cores' rate.
    pub tensor: f64,
    /// Tiles: start and end of a block, latencies.
    pub tile: f64,
    /// Tiles: a barrier, latencies.
    pub sync: f64,
}

/// Of the issue slots that any kernel fills: streams never need more.
const STREAM_ISSUE: f64 = 0.9;
/// Of an issue slot that a warp of tiles fills.
const TILE_WARP: f64 = 0.75;
/// Registers of a thread that streams.
const STREAM_REGISTERS: u32 = 80;

impl Constants {
    /// Fitted on three of four points of an H100, with the kernels before weights were streamed through shared memory.
    pub const FITTED: Constants = Constants {
        launch: 2.45,
        latency: 0.69,
        dram: 0.98,
        block: 2.12,
        warp: 0.42,
        queue: 0.29,
        blend: 1.49,
        l2: 1.27,
        issue: 0.59,
        tensor: 0.67,
        tile: 7.1,
        sync: 0.21,
    };

    /// As numbers, for fitting.
    pub fn list(&self) -> [f64; 12] {
        let c = self;
        let streams = [c.launch, c.latency, c.dram, c.block, c.warp, c.queue, c.blend];
        let tiles = [c.l2, c.issue, c.tensor, c.tile, c.sync];
        let mut out = [0.0; 12];
        out.iter_mut().zip(streams.iter().chain(&tiles)).for_each(|(to, from)| *to = *from);
        out
    }

    /// Of [`Constants::list`].
    pub fn of(list: [f64; 12]) -> Constants {
        let [launch, latency, dram, block, warp, queue, blend, l2, issue, tensor, tile, sync] = list;
        // Neither negative nor more than hidden.
        let blend = blend.clamp(1.0, 8.0);
        Constants { launch, latency, dram, block, warp, queue, blend, l2, issue, tensor, tile, sync }
    }
}

/// Instructions of inner loops.
#[derive(Clone, Copy, Debug)]
pub struct Pipe {
    /// Of a warp for a step of 2 KB of weights of `gemv.cu` and `decode.cu`.
    pub step_issue: f64,
}

impl Pipe {
    /// Of a warp that stages 8 activations a lane.
    pub const STAGE_ISSUE: f64 = 60.0;

    /// Of a format; `quantised`: FP8 activations.
    pub fn of(format: Format, quantised: bool) -> Pipe {
        // Of the kernels before weights were streamed through shared memory: loop bodies of sm_90a, NVRTC 13.0.88, counted with nvdisasm 13.5.37: 353, 585 and 1061 for 2, 3 and 6 steps of
        // FP8 codes, 558, 870 and 1662 of FP8 made bfloat16, 826, 2062 and 2484 for 2, 5 and 6 of FP4, 238, 394, 704.
        let step_issue = match (format, quantised) {
            (Format::Fp8, true) => 180.0,
            (Format::Fp8, false) => 280.0,
            (Format::Fp4, _) => 414.0,
            (Format::Bf16, _) => 120.0,
            (Format::F32 | Format::I64, _) => 260.0,
        };
        Pipe { step_issue }
    }

    /// Of a warp of `tile.cuh` for a stage of 64 columns, 64 outputs and so many tokens.
    pub fn tile_issue(format: Format, tokens: u32) -> f64 {
        // What does not depend on the tokens, counted likewise: 528, 548 and 310 instructions for 64 tokens of FP8, FP4
        // and BF16, 471 and 179 for 32 of FP4 and BF16.
        let fixed = match format {
            Format::Fp8 => 384.0,
            Format::Fp4 => 400.0,
            _ => 140.0,
        };
        // An mma for 16 outputs, 8 tokens and 16 columns; a load of activations for 32 columns.
        fixed + f64::from(tokens / 8) * (16.0 + 2.0)
    }
}

/// What bounds a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bound {
    /// Memory.
    Memory,
    /// L2 cache.
    Cache,
    /// Instructions.
    Issue,
    /// Tensor cores.
    Tensor,
    /// Waiting for a block's own loads.
    Latency,
}

/// A prediction.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Predicted {
    /// All of it.
    pub seconds: f64,
    /// What the waves wait for most.
    pub bound: Bound,
    /// Blocks on a multiprocessor at once.
    pub resident: u32,
}

/// Registers of a kernel that is not compiled: enough for what tiles ask for ahead. Streams ask for it into shared memory
/// and are compiled for at most so many.
pub fn guess(work: &Work) -> Resources {
    if work.kind == Kind::Stream {
        return Resources { registers: STREAM_REGISTERS, shared: 0, spilled: 0 };
    }
    let threads = f64::from(work.shape.threads.max(32));
    let ahead = work.flight_bytes / threads / 4.0;
    let registers = (70.0 + ahead).clamp(64.0, 255.0) as u32;
    Resources { registers, shared: 0, spilled: 0 }
}

/// Blocks of a launch that a multiprocessor has room for.
pub fn resident(chip: &Chip, shape: Launch, resources: Resources) -> u32 {
    let warps = shape.threads.div_ceil(32).max(1);
    let registers = (resources.registers * 32).next_multiple_of(256) * warps;
    // The driver keeps 1 KB of every block's.
    let shared = shape.shared + resources.shared + 1024;
    let by = [chip.registers / registers.max(1), chip.shared / shared, chip.warps / warps, chip.blocks];
    by.into_iter().min().unwrap_or(0)
}

/// What a launch should take on a chip. None: a block does not fit.
pub fn predict(work: &Work, resources: Resources, chip: &Chip, c: &Constants) -> Option<Predicted> {
    let resident = resident(chip, work.shape, resources);
    let blocks = work.shape.grid.iter().map(|n| f64::from(*n)).product::<f64>().max(1.0);
    if resident == 0 {
        return None;
    }
    let slots = f64::from(resident) * f64::from(chip.multiprocessors);
    let full = (blocks / slots).floor();
    let rest = blocks - full * slots;
    let (of_full, full_bound) = wave(work, slots.min(blocks), blocks, chip, c);
    let (of_rest, rest_bound) = if rest > 0.0 { wave(work, rest, blocks, chip, c) } else { (0.0, full_bound) };
    let bound = if full * of_full >= of_rest { full_bound } else { rest_bound };
    // A ramp: the first bytes arrive a latency after the launch.
    let start = chip.launch * c.launch * work.launches + chip.latency * c.latency;
    Some(Predicted { seconds: start + full * of_full + of_rest, bound, resident })
}

/// `n` blocks of `blocks` at once.
fn wave(work: &Work, n: f64, blocks: f64, chip: &Chip, c: &Constants) -> (f64, Bound) {
    let sms = f64::from(chip.multiprocessors);
    let per_sm = (n / sms).ceil();
    let of = |whole: f64| whole / blocks;
    let rate = chip.dram * c.dram;
    let asked = (n * work.flight_bytes / (rate * chip.latency * c.latency)).min(1.0);
    let memory = n * of(work.dram_bytes) / (rate * asked);
    let issue = |share: f64| per_sm * of(work.issue) / (4.0 * share * chip.clock);
    let longest =
        |all: &[(f64, Bound)]| all.iter().copied().fold((0.0, Bound::Memory), |m, x| if x.0 > m.0 { x } else { m });
    match work.kind {
        Kind::Stream => {
            let (busy, bound) = longest(&[(memory, Bound::Memory), (issue(STREAM_ISSUE), Bound::Issue)]);
            let queue = c.queue * n * work.flight_bytes / rate;
            let chain = c.block * chip.latency + work.chain / (chip.clock * c.warp) + queue;
            let seconds = (busy.powf(c.blend) + chain.powf(c.blend)).powf(1.0 / c.blend);
            (seconds, if chain > busy { Bound::Latency } else { bound })
        }
        Kind::Tiles => {
            let warps = per_sm * f64::from(work.shape.threads.div_ceil(32));
            let share = c.issue.min(warps * TILE_WARP / 4.0);
            let (busy, bound) = longest(&[
                (memory, Bound::Memory),
                (n * of(work.l2_bytes) / (chip.l2 * c.l2 * (n / sms).min(1.0)), Bound::Cache),
                (issue(share), Bound::Issue),
                (per_sm * of(work.tensor_flops) / (chip.mma * chip.clock * c.tensor), Bound::Tensor),
            ]);
            let waits = (work.syncs * c.sync / per_sm + c.tile) * chip.latency;
            (busy + waits, if waits > busy { Bound::Latency } else { bound })
        }
    }
}

/// The least that a launch can take on a chip, whatever the point: its bytes at the memory's rate, or its products at
/// that of the tensor cores.
pub fn floor(bytes: f64, flops: f64, chip: &Chip) -> f64 {
    (bytes / chip.dram).max(flops / (chip.mma * chip.clock * f64::from(chip.multiprocessors)))
}
