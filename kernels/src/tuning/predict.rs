//! A decode step on a chip that is not here: its launches by the backend's own code, their times by the cost model.
//!
//! The step runs on a [`Sketch`], so its launches are those of this program and not of a list that ages. Tuned kernels
//! take what [`cost`] says without its launches, the others their bytes; every launch a latency that was measured on an
//! H100 ([`latency`]). Nothing of it is measured on the chip: it is a step that could be, not one that was.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::sync::Arc;

use dsv4_model::ops::{Segment, Step as ModelStep};
use dsv4_model::tensors::{Block, Kind, TensorRow, layers, table};
use dsv4_model::{Model, ModelConfig, Tp};

use super::chip::Chip;
use super::cost::{self, Constants};
use super::latency::{self, Prefill};
use super::sketch::Sketch;
use super::tunables::Tunable;
use super::{Tuning, tunables};
use crate::collective::Alone;
use crate::device::unit::Image;
use crate::device::{Buffer, Gpu};
use crate::gpu::kernels::Kernels;
use crate::gpu::shape::Shape;
use crate::gpu::weights::DeviceWeights;
use crate::gpu::{GpuBackend, GpuError, GpuOptions, Reserved};
use crate::numerics::Numerics;

/// Seconds of an all-reduce of a row between two machines: an aim, not a measurement.
pub const ALL_REDUCE: f64 = 12e-6;
/// What NCCL takes for as much on two such machines, as published by readers.
pub const ALL_REDUCE_NCCL: f64 = 32e-6;
/// All launches of a kernel in a step.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// Its name.
    pub kernel: String,
    /// How many.
    pub launches: u32,
    /// All of them, seconds.
    pub seconds: f64,
    /// Of these what is neither bytes nor operations.
    pub latency: f64,
    /// By the cost model; otherwise by bytes and latencies alone.
    pub tuned: bool,
}

/// A predicted decode step, or a step of the draft block.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// On what.
    pub chip: &'static str,
    /// Positions before its rows.
    pub context: u32,
    /// Rows, no two of which choose the same expert.
    pub rows: u32,
    /// All launches.
    pub launches: u32,
    /// Longest first.
    pub parts: Vec<Part>,
    /// Sums over all ranks; no time is theirs.
    pub all_reduces: u32,
}

impl Step {
    /// Seconds of the kernels.
    pub fn kernels(&self) -> f64 {
        self.parts.iter().map(|p| p.seconds).sum()
    }

    /// Seconds of the kernels that are neither bytes nor operations.
    pub fn latency(&self) -> f64 {
        self.parts.iter().map(|p| p.latency).sum()
    }

    /// For people: kernels, longest first.
    pub fn to_text(&self) -> String {
        let mut out = format!(
            "PREDICTED, not measured: {}, {} row(s) after {} tokens, replayed: {} launches, {:.2} ms of kernels, {:.2} of them latency\n",
            self.chip,
            self.rows,
            self.context,
            self.launches,
            self.kernels() * 1e3,
            self.latency() * 1e3
        );
        for part in &self.parts {
            let _ = writeln!(
                out,
                "    {:<16} {:>4} x {:>8.2} us = {:>9.1} us{}",
                part.kernel,
                part.launches,
                part.seconds * 1e6 / f64::from(part.launches.max(1)),
                part.seconds * 1e6,
                if part.tuned { "" } else { "  (bytes and latency alone)" }
            );
        }
        out
    }
}

/// What decoding and prefill should do after a number of tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Forecast {
    /// That number.
    pub context: u32,
    /// Steps that verify 0, 1 and 3 drafts, that many rows more than one.
    pub steps: Vec<Step>,
    /// A step of the draft block.
    pub draft: Option<Step>,
    /// Of a prompt.
    pub prefill: Option<Prefill>,
}

/// Drafts of [`Forecast::steps`]: rows that kernels are compiled for.
pub const DRAFTS: [u32; 3] = [0, 1, 3];
/// Contexts of a forecast.
pub const CONTEXTS: [u32; 4] = [0, 8 << 10, 64 << 10, 200 << 10];

impl Forecast {
    /// Tokens a second, one sequence, where each draft is accepted with probability `accepted` after those before it;
    /// all-reduces of `each` seconds, nothing hidden. None without a draft block.
    pub fn rate(&self, drafts: u32, accepted: f64, each: f64) -> Option<f64> {
        let seconds = |step: &Step| step.kernels() + f64::from(step.all_reduces) * each;
        let verify = self.steps.iter().find(|s| s.rows == drafts + 1)?;
        let drafting = if drafts > 0 { f64::from(drafts) * seconds(self.draft.as_ref()?) } else { 0.0 };
        let tokens: f64 = (0..=drafts).map(|n| accepted.powi(n as i32)).sum();
        Some(tokens / (seconds(verify) + drafting))
    }
}

/// Forecasts of `tp`'s rank at all [`CONTEXTS`].
pub fn forecasts(config: &ModelConfig, tp: Tp, chip: &Chip, tuning: &Tuning) -> Vec<Forecast> {
    let room = config.max_position_embeddings.saturating_sub(64).min(200 << 10) as u32;
    let mut rank = Rank::new(config, tp, chip, tuning, room);
    let draft = rank.draft();
    let of = |context: u32| Forecast {
        context,
        steps: DRAFTS.iter().map(|drafts| rank.step(context, drafts + 1)).collect(),
        draft: draft.clone(),
        prefill: latency::prefill(config, tp, chip, context),
    };
    CONTEXTS.into_iter().filter(|context| *context <= room).map(of).collect()
}

/// A rank on a GPU that runs nothing, whose steps are predicted.
pub struct Rank<'a> {
    config: &'a ModelConfig,
    tp: Tp,
    chip: &'a Chip,
    tuning: &'a Tuning,
    tunables: Vec<Box<dyn Tunable>>,
    sketch: Arc<Sketch>,
    backend: GpuBackend,
    model: Model,
}

fn fail(e: &dyn std::fmt::Display) -> ! {
    panic!("a step on a GPU that runs nothing: {e}")
}

impl<'a> Rank<'a> {
    /// `tp`'s rank with caches for `context` tokens.
    ///
    /// Panics if it cannot be built: it can for every config that there are kernels for.
    pub fn new(config: &'a ModelConfig, tp: Tp, chip: &'a Chip, tuning: &'a Tuning, context: u32) -> Rank<'a> {
        let sketch = Sketch::open(chip);
        let gpu: Arc<dyn Gpu> = sketch.clone();
        // There is no table to choose experts by; the launches are the same without.
        let unhashed = ModelConfig { num_hash_layers: 0, ..config.clone() };
        let kernels = Kernels::walk(&unhashed, tp, Numerics::Published, tuning, |unit| {
            unit.load(gpu.as_ref(), &Image::Cubin(Vec::new()))
        });
        let kernels = kernels.unwrap_or_else(|e| fail(&e));
        let (mut places, mut end) = (HashMap::new(), 0usize);
        for row in table(&unhashed) {
            let bytes = row.artifact_bytes(tp).unwrap_or_else(|e| fail(&e)) as usize;
            places.insert(row.name, end..end + bytes);
            end += bytes.next_multiple_of(4096);
        }
        let arena = Buffer::new(&gpu, end as u64).unwrap_or_else(|e| fail(&e));
        let weights = DeviceWeights::new(&gpu, &unhashed, tp, arena, |name| places.get(name).cloned());
        let weights = weights.unwrap_or_else(|e| fail(&e));
        let options = GpuOptions { slots: 1, context: context + 64, rows_max: 16, solo: true, graphs: false };
        let reserved = Reserved::new(gpu, unhashed.clone(), tp, Numerics::Published, options);
        let reserved = reserved.unwrap_or_else(|e| fail(&e));
        let backend = GpuBackend::with(reserved, weights, kernels, Box::new(Alone));
        let tunables = tunables::all(config, tp);
        Rank { config, tp, chip, tuning, tunables, sketch, backend, model: Model::new(&unhashed) }
    }

    /// A decode step of `rows` rows after `context` positions. Panics if the rank has no room for it.
    pub fn step(&mut self, context: u32, rows: u32) -> Step {
        let counts = self.count(context, rows).unwrap_or_else(|e| fail(&e));
        let tuned = self.tuned(rows);
        let traffic = traffic(self.config, self.tp, context, rows, self.chip);
        let part = |(kernel, launches): (String, u32)| {
            let by_model = tuned.get(kernel.as_str()).copied();
            let busy = by_model.or_else(|| traffic.get(kernel.as_str()).copied()).unwrap_or(0.0);
            let latency = f64::from(launches) * latency::of_launch(&kernel);
            Part { kernel, launches, seconds: busy + latency, latency, tuned: by_model.is_some() }
        };
        // Embedding, and two sublayers of every layer.
        self.whole(context, rows, counts.into_iter().map(part).collect(), 2 * layers(self.config).len() as u32 + 1)
    }

    /// A step of one row of the draft block with its logits; none if the model has none. Its attention has a window alone,
    /// so it is the same after any number of positions.
    pub fn draft(&mut self) -> Option<Step> {
        if !self.model.has_mtp() {
            return None;
        }
        let counts = self.count_draft().unwrap_or_else(|e| fail(&e));
        let part = |(kernel, launches): (String, u32)| {
            let latency = f64::from(launches) * latency::of_launch(&kernel);
            Part { kernel, launches, seconds: latency, latency, tuned: false }
        };
        let mut parts: Vec<Part> = counts.into_iter().map(part).collect();
        let seconds = draft_bytes(self.config, self.tp) / self.chip.dram;
        parts.push(Part { kernel: "weights".into(), launches: 0, seconds, latency: 0.0, tuned: false });
        Some(self.whole(0, 1, parts, 3))
    }

    fn whole(&self, context: u32, rows: u32, mut parts: Vec<Part>, all_reduces: u32) -> Step {
        parts.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        Step {
            chip: self.chip.name,
            context,
            rows,
            launches: parts.iter().map(|p| p.launches).sum(),
            parts,
            all_reduces: if self.tp.size() > 1 { all_reduces } else { 0 },
        }
    }

    /// What the cost model says of all launches of each kernel, without the launches.
    fn tuned(&self, rows: u32) -> BTreeMap<&'static str, f64> {
        let bucket = tunables::DECODE_ROWS.into_iter().find(|n| *n >= rows).unwrap_or(8);
        let mut out: BTreeMap<&str, f64> = BTreeMap::new();
        for tunable in self.tunables.iter().filter(|t| t.rows() == bucket) {
            let points = tunable.points();
            let chosen = self.tuning.lookup(tunable.kernel(), tunable.shape(), bucket).filter(|p| points.contains(p));
            let Some(point) = chosen.or(points.first()) else { continue };
            let work = tunable.work(point, &tunables::launches(tunable.as_ref(), point, self.chip));
            let work = cost::Work { launches: 0.0, ..work };
            let predicted = cost::predict(&work, cost::guess(&work), self.chip, &Constants::FITTED);
            *out.entry(tunable.kernel()).or_default() += predicted.map_or(0.0, |p| p.seconds) * tunable.calls();
        }
        out
    }

    /// How often a step launches each kernel.
    fn count(&mut self, context: u32, rows: u32) -> Result<BTreeMap<String, u32>, GpuError> {
        self.begin(context, rows)?;
        let streams = self.model.trunk(&mut self.backend)?;
        self.model.logits(&mut self.backend, &streams)?;
        Ok(self.taken())
    }

    fn count_draft(&mut self) -> Result<BTreeMap<String, u32>, GpuError> {
        self.begin(0, 1)?;
        let source = self.model.trunk(&mut self.backend)?;
        self.model.logits(&mut self.backend, &source)?;
        let segments = vec![Segment { slot: 0, start: 0, rows: 1 }];
        let step = ModelStep { tokens: vec![1], segments, logits: vec![0], source: vec![0] };
        self.backend.begin(step, Some(&source))?;
        self.sketch.take();
        let streams = self.model.mtp(&mut self.backend, &source)?;
        self.model.mtp_logits(&mut self.backend, &streams)?;
        Ok(self.taken())
    }

    fn begin(&mut self, context: u32, rows: u32) -> Result<(), GpuError> {
        self.backend.open(0)?;
        self.backend.assume_filled(0, context)?;
        let segments = vec![Segment { slot: 0, start: context, rows }];
        let step = ModelStep { tokens: vec![1; rows as usize], segments, logits: (0..rows).collect(), source: vec![] };
        self.backend.begin(step, None)?;
        self.sketch.take();
        Ok(())
    }

    fn taken(&self) -> BTreeMap<String, u32> {
        let mut counts = BTreeMap::new();
        for launch in self.sketch.take() {
            *counts.entry(launch.kernel).or_default() += 1;
        }
        counts
    }
}

/// Seconds of all launches of kernels that are not tuned: their bytes, and what attention and index compute.
fn traffic(config: &ModelConfig, tp: Tp, context: u32, rows: u32, chip: &Chip) -> HashMap<&'static str, f64> {
    let s = Shape::new(config, tp);
    let (layers, d, m) = (layers(config), f64::from(s.hidden), f64::from(s.streams));
    let mixing = (2.0 + m) * m * m * d * 4.0;
    let (mut read, mut attended, mut scored) = (0.0, 0.0, 0.0);
    for layer in &layers {
        let entries = match layer.ratio {
            0 => 0,
            4 => (context / 4).min(s.topk),
            ratio => context / ratio,
        };
        read += f64::from(s.window.min(context) + entries) * f64::from(s.head_dim) * 2.0;
        match layer.ratio {
            0 => {}
            4 if context / 4 > s.topk => scored += f64::from(context / 4),
            4 => {}
            _ => attended += f64::from(entries),
        }
    }
    let (attend, index) = latency::of_entries(chip, rows, attended, scored);
    let key = f64::from(s.index_dim) * 2.0;
    HashMap::from([
        ("hc_site", 2.0 * layers.len() as f64 * mixing / chip.dram),
        ("attend", read / chip.dram + attend),
        ("index_score", scored * key / chip.dram + index),
        ("hc_head", m * m * d * 4.0 / chip.dram),
        ("gate", layers.len() as f64 * f64::from(s.experts) * d * 2.0 / chip.dram),
    ])
}

/// Bytes of weights that a row of the draft block reads: the chosen experts' part of the stacks, and the head.
fn draft_bytes(config: &ModelConfig, tp: Tp) -> f64 {
    let share = config.num_experts_per_tok as f64 / config.n_routed_experts as f64;
    let of = |row: &TensorRow| {
        let bytes = row.artifact_bytes(tp).unwrap_or_else(|e| fail(&e)) as f64;
        match (row.id.block, row.id.kind) {
            (Block::Draft(_), Kind::W1 | Kind::W2 | Kind::W3) => bytes * share,
            (Block::Draft(_), _) | (Block::Global, Kind::Head) => bytes,
            _ => 0.0,
        }
    };
    table(config).iter().map(of).sum()
}
