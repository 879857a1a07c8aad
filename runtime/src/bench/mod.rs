//! `bench`: how long steps take on a GPU, against what reading their bytes takes at the rate of a copy made there in
//! the same run.
//!
//! One rank computes; with `--solo` it may be one of several, whose sums are left out. Caches are made up and taken for
//! filled: nothing is computed for the positions before a step. [`watch`] takes the times.

pub mod watch;

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use dsv4_format::LoadOptions;
use dsv4_kernels::collective::Alone;
use dsv4_kernels::device::{Buffer, DeviceError, Gpu};
use dsv4_kernels::gpu::kernels::DECODE_ROWS;
use dsv4_kernels::gpu::{GpuBackend, GpuOptions};
use dsv4_kernels::memory::{StepBytes, step_bytes};
use dsv4_kernels::numerics::Numerics;
use dsv4_kernels::ops::dense_gemm::native::Verdict;
use dsv4_model::ops::{Segment, Step};
use dsv4_model::{Model, ModelConfig, Tp};
use serde_json::{Value, json};

use crate::cli::{Backend, BenchArgs};
use crate::compute::{Compute, Device, choose, cuda};
use crate::error::RunError;
use crate::gpu::Ready;
use crate::load::{Opened, floor, open, summary};
use crate::preflight::memory::Asked;
use crate::preflight::{admit, report};
use crate::progress::Bar;
use crate::terminal::{print_now, tell};
use watch::{KernelTime, Watched};

/// Bytes that are copied to know how fast memory is, at most.
const COPY_BYTES_MAX: u64 = 2 << 30;
/// Steps before those that are timed: one records, one replays.
const WARM_STEPS: u32 = 2;
/// Steps of many rows that are timed, at most.
const PREFILL_STEPS_MAX: u32 = 5;
/// What the numbers mean, for whoever reads them later.
const METHOD: &str = "step_seconds: wall clock from a step's upload to its logits on the host, median. gpu_seconds: on the GPU; \
of a recorded step by events around the graph, else from upload to logits, median. kernel_seconds: sum over kernels of the time \
between events around each launch, inside the graph where there is one, less event_seconds for each; a bound from above, as an event also ends the \
overlap of neighbours. gap_seconds: gpu_seconds less kernel_seconds; below 0 where the kernels of a step without events overlap \
for longer than the GPU waits. Caches before a step are made up, with values of a plausible size; the tokens are made up too, and \
so what they choose of experts and entries. block_scaled: whether long steps use those kernels, and how far each was off when it \
was checked at the start, relative to the sum of the magnitudes of an output's products. bytes: weights and caches that the step reads, once each, \
no two rows choosing the same expert. floor_seconds: bytes over copy_bytes_per_second, which counts bytes read and written of a \
copy within the GPU's memory in this run. ratio: step_seconds over floor_seconds.";

/// What is measured where.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Positions before, and rows of, decode steps.
    pub decode: Vec<(u32, u32)>,
    /// The same of prefill steps.
    pub prefill: Vec<(u32, u32)>,
    /// Steps in each place.
    pub steps: u32,
    /// Times by kernel in the result.
    pub profile: bool,
}

/// Where weights come from.
#[derive(Clone, Copy, Debug)]
pub enum Source {
    /// The artifact; loading leaves as much memory to others as asked, or as usual.
    File {
        /// `--reserve`.
        reserve: Option<u64>,
    },
    /// A seed.
    Seed(u64),
}

impl Plan {
    fn new(args: &BenchArgs) -> Plan {
        let pairs = |before: &[u32], rows: &[u32]| {
            let rows: Vec<u32> = rows.iter().copied().filter(|rows| *rows > 0).collect();
            before.iter().flat_map(|start| rows.iter().map(|rows| (*start, *rows)).collect::<Vec<_>>()).collect()
        };
        Plan {
            decode: pairs(&args.context, &args.rows),
            prefill: pairs(&args.depth, &args.chunk),
            steps: args.steps,
            profile: args.profile,
        }
    }

    fn all(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.decode.iter().chain(&self.prefill).copied()
    }

    /// Tokens of the longest sequence.
    fn context(&self) -> u32 {
        self.all().map(|(start, rows)| start.saturating_add(rows)).max().unwrap_or(1)
    }

    /// Rows of the longest step.
    fn rows_max(&self) -> u32 {
        self.all().map(|(_, rows)| rows).max().unwrap_or(1).max(DECODE_ROWS)
    }
}

/// `bench`: JSON on standard output, progress on standard error. Errors: those of a start on a GPU.
pub fn run_bench(artifact: &Path, args: &BenchArgs) -> Result<(), RunError> {
    let opened = open(artifact)?;
    let (tp, model) = (opened.artifact.manifest().tp, opened.config.max_position_embeddings);
    let usage = |what: String, help: &str| Err(RunError::Usage(format!("{what}\n  help: {help}")));
    if tp > 1 && !args.solo {
        let what = format!("bench: the artifact is packed for {tp} ranks, expected 1 or --solo");
        return usage(what, "give --solo: one rank computes, and sums over ranks are left out");
    }
    if args.rank >= tp {
        return usage(format!("--rank {}: expected a rank below {tp}", args.rank), "ranks are counted from 0");
    }
    let plan = Plan::new(args);
    if u64::from(plan.context()) > model {
        let what = format!("{} tokens in a sequence, expected at most the model's {model}", plan.context());
        return usage(what, "give smaller --context, --depth or --chunk");
    }
    let seed = args.weights_seed.or(opened.artifact.weights_seed());
    let source = seed.map_or(Source::File { reserve: args.reserve }, Source::Seed);
    if matches!(source, Source::File { .. }) {
        opened.require_rank(args.rank)?;
    }
    let (compute, _) = choose(Backend::Cuda, &opened.artifact, &|| cuda(0))?;
    let Compute::Gpu(device) = &compute else { unreachable!("a GPU was asked for") };
    let say = |text: &str| {
        if !args.quiet {
            tell(text)
        }
    };
    say(&compute.line(args.rank, &opened.artifact));
    let asked = Asked {
        target: compute.target(),
        context: plan.context().into(),
        sequences: 1,
        chunk: plan.rows_max().into(),
        threads: 1,
        numerics: args.numerics.into(),
        all_logits: false,
        reserve: args.reserve,
    };
    admit(&opened, &[args.rank], &asked, &compute.host(Path::new("/"))).map_err(|error| match error {
        RunError::DoesNotFit { needed, usable, table, .. } => {
            let help = "measure long contexts and large chunks apart (--rows 0 and --chunk 0 leave a part out)".into();
            RunError::DoesNotFit { needed, usable, table, help }
        }
        other => other,
    })?;
    let mut out =
        measure(&opened, device, args.rank, args.numerics.into(), source, &plan, &Bar::new(args.quiet), &say)?;
    if let Some(object) = out.as_object_mut() {
        object.insert("backend".into(), compute.to_json(&opened.artifact));
    }
    print_now(&format!("{out}\n")).map(|_| ())
}

/// Loads a rank, or makes it up, and measures `plan`; `say` gets lines for people.
pub fn measure(
    opened: &Opened,
    device: &Device,
    rank: u32,
    numerics: Numerics,
    source: Source,
    plan: &Plan,
    progress: &Bar,
    say: &dyn Fn(&str),
) -> Result<Value, RunError> {
    let manifest = opened.artifact.manifest();
    let tp = Tp::new(rank, manifest.tp)?;
    let watched = Watched::new(Arc::clone(&device.gpu));
    let gpu: Arc<dyn Gpu> = watched.clone();
    let options = GpuOptions { slots: 1, context: plan.context(), rows_max: plan.rows_max(), solo: true, graphs: true };
    let ready = Ready::new(opened, Arc::clone(&gpu), rank, numerics, options)?;
    say(&ready.verdicts());
    say(ready.outcome());
    let is_block_scaled = ready.is_block_scaled();
    let copy_rate = copy_rate(gpu.as_ref(), ready.arena())?;
    let mark_seconds = watched.mark_seconds()?;
    say(&format!("copy {:.0} GB/s, read and written\n", copy_rate / 1e9));
    let arena_bytes = ready.arena().bytes();
    let loaded = match source {
        Source::Seed(seed) => {
            let started = Instant::now();
            let loaded = ready.fill(opened, seed)?;
            let (size, seconds) = (report::size(arena_bytes), started.elapsed().as_secs_f64());
            say(&format!("{size} of weights made from seed {seed} in {seconds:.1} s\n"));
            loaded
        }
        Source::File { reserve } => {
            let compute = Compute::Gpu(device.clone());
            let floor = floor(None, reserve, &compute.host(Path::new("/")), compute.target());
            let (loaded, report) = ready.load(opened, &LoadOptions { floor, ..LoadOptions::default() }, progress)?;
            say(&summary(rank, &report));
            loaded
        }
    };
    let mut backend = loaded.backend(Box::new(Alone));
    let block_scaled = json!({
        "used": is_block_scaled,
        "checks": backend.verdicts().iter().map(verdict_json).collect::<Vec<_>>(),
    });
    backend.make_up_caches()?;
    let mut bench = Bench {
        model: Model::new(&opened.config),
        config: &opened.config,
        tp,
        numerics,
        backend,
        watched,
        copy_rate,
        mark_seconds,
        plan,
    };
    let table =
        ["context", "rows", "step ms", "gpu ms", "kernel ms", "gap ms", "floor ms", "ratio", "tokens/s", "launches"];
    say(&(table.map(|name| format!("{name:>10}")).concat() + "\n"));
    let mut measured = |cells: &[(u32, u32)]| -> Result<Vec<Value>, RunError> {
        cells
            .iter()
            .map(|(start, rows)| {
                let cell = bench.cell(*start, *rows)?;
                say(&cell.line());
                Ok(cell.to_json(plan.profile))
            })
            .collect()
    };
    let (decode, prefill) = (measured(&plan.decode)?, measured(&plan.prefill)?);
    Ok(json!({
        "artifact_id": manifest.artifact_id.to_string(),
        "rank": rank,
        "tp": manifest.tp,
        "solo": manifest.tp > 1,
        "numerics": numerics.name(),
        "block_scaled": block_scaled,
        "weights": match source { Source::File { .. } => "the artifact's".into(), Source::Seed(seed) => format!("from seed {seed}") },
        "weights_bytes": arena_bytes,
        "copy_bytes_per_second": copy_rate,
        "event_seconds": mark_seconds,
        "steps": plan.steps,
        "decode": decode,
        "prefill": prefill,
        "method": METHOD,
    }))
}

fn verdict_json(v: &Verdict) -> Value {
    json!({"product": v.product, "error": v.native, "portable_error": v.portable, "accepted": v.accepted()})
}

/// Bytes a second, read and written, of the best of some copies within `buffer`.
fn copy_rate(gpu: &dyn Gpu, buffer: &Buffer) -> Result<f64, DeviceError> {
    let half = (buffer.bytes() / 2).min(COPY_BYTES_MAX);
    gpu.fill(buffer.at(), 0, 2 * half)?;
    let mut best = 0f64;
    for _ in 0..10 {
        let from = gpu.mark()?;
        gpu.copy(buffer.at() + half, buffer.at(), half)?;
        let seconds = gpu.seconds_between(from, gpu.mark()?)?;
        best = best.max(2.0 * half as f64 / seconds.max(1e-9));
    }
    gpu.forget_marks();
    Ok(best)
}

/// Steps to be timed, and what times them.
struct Bench<'a> {
    model: Model,
    config: &'a ModelConfig,
    tp: Tp,
    numerics: Numerics,
    backend: GpuBackend,
    watched: Arc<Watched>,
    copy_rate: f64,
    mark_seconds: f64,
    plan: &'a Plan,
}

/// What was measured in one place.
struct Cell {
    start: u32,
    rows: u32,
    steps: u32,
    step_seconds: f64,
    gpu_seconds: f64,
    kernel_seconds: f64,
    floor_seconds: f64,
    launches: u32,
    recorded: bool,
    bytes: StepBytes,
    kernels: Vec<KernelTime>,
}

impl Bench<'_> {
    /// Measures steps of `rows` rows behind `start` positions.
    fn cell(&mut self, start: u32, rows: u32) -> Result<Cell, RunError> {
        for _ in 0..WARM_STEPS {
            self.step(start, rows)?;
        }
        let steps = if rows > DECODE_ROWS { self.plan.steps.min(PREFILL_STEPS_MAX) } else { self.plan.steps };
        let (mut wall, mut on_gpu) = (Vec::new(), Vec::new());
        for _ in 0..steps {
            let (step_seconds, gpu_seconds) = self.step(start, rows)?;
            wall.push(step_seconds);
            on_gpu.push(gpu_seconds);
            self.watched.forget_marks();
        }
        let stats = self.backend.stats();
        let kernels = self.profile(start, rows)?;
        let bytes = step_bytes(self.config, self.tp, self.numerics, rows.into(), start.into())?;
        Ok(Cell {
            start,
            rows,
            steps,
            step_seconds: median(wall),
            gpu_seconds: median(on_gpu),
            kernel_seconds: kernels.iter().map(|k| k.seconds).sum(),
            floor_seconds: bytes.all() as f64 / self.copy_rate,
            launches: stats.launches,
            recorded: stats.replayed,
            bytes,
            kernels,
        })
    }

    /// Times by kernel of a step that is recorded anew with marks in it, where it is recorded.
    fn profile(&mut self, start: u32, rows: u32) -> Result<Vec<KernelTime>, RunError> {
        self.backend.forget_recordings()?;
        self.watched.begin_profile();
        self.step(start, rows)?;
        let recorded = self.backend.stats().launches > 0 && rows <= DECODE_ROWS;
        if recorded {
            // The first replay of a graph brings it onto the GPU.
            self.step(start, rows)?;
        }
        let kernels = self.watched.profile(self.mark_seconds)?;
        self.backend.forget_recordings()?;
        self.watched.end_profile();
        Ok(kernels)
    }

    /// One step: seconds in all, and on the GPU.
    fn step(&mut self, start: u32, rows: u32) -> Result<(f64, f64), RunError> {
        let vocab = self.config.vocab_size;
        let tokens = (0..u64::from(rows)).map(|i| (i.wrapping_mul(7919) % vocab) as u32).collect();
        let segments = vec![Segment { slot: 0, start, rows }];
        // Every sequence's next token, or every draft's verdict; of a prompt only the last row matters.
        let logits = if rows <= DECODE_ROWS { (0..rows).collect() } else { vec![rows - 1] };
        let step = Step { tokens, segments, logits, source: vec![] };
        self.backend.open(0)?;
        self.backend.assume_filled(0, start)?;
        self.watched.take_replay()?;
        let began = Instant::now();
        let from = self.watched.mark()?;
        self.backend.begin(step, None)?;
        let streams = self.model.trunk(&mut self.backend)?;
        self.model.logits(&mut self.backend, &streams)?;
        let seconds = began.elapsed().as_secs_f64();
        let to = self.watched.mark()?;
        let on_gpu = match self.watched.take_replay()? {
            Some(seconds) => seconds,
            None => self.watched.seconds_between(from, to)?,
        };
        Ok((seconds, on_gpu))
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

impl Cell {
    fn tokens_per_second(&self) -> f64 {
        f64::from(self.rows) / self.step_seconds.max(1e-9)
    }

    fn gap_seconds(&self) -> f64 {
        self.gpu_seconds - self.kernel_seconds
    }

    fn ratio(&self) -> f64 {
        self.step_seconds / self.floor_seconds.max(1e-12)
    }

    fn line(&self) -> String {
        let times = [self.step_seconds, self.gpu_seconds, self.kernel_seconds, self.gap_seconds(), self.floor_seconds];
        let times: String = times.iter().map(|seconds| format!("{:>10.3}", seconds * 1e3)).collect();
        let (ratio, rate) = (self.ratio(), self.tokens_per_second());
        format!("{:>10}{:>10}{times}{ratio:>10.2}{rate:>10.1}{:>10}\n", self.start, self.rows, self.launches)
    }

    fn to_json(&self, profile: bool) -> Value {
        let mut value = json!({
            "context": self.start,
            "rows": self.rows,
            "steps": self.steps,
            "step_seconds": self.step_seconds,
            "gpu_seconds": self.gpu_seconds,
            "kernel_seconds": self.kernel_seconds,
            "gap_seconds": self.gap_seconds(),
            "bytes": self.bytes.all(),
            "weights_bytes": self.bytes.weights,
            "caches_bytes": self.bytes.caches,
            "floor_seconds": self.floor_seconds,
            "ratio": self.ratio(),
            "launches": self.launches,
            "recorded": self.recorded,
            "tokens_per_second": self.tokens_per_second(),
        });
        if let (true, Some(object)) = (profile, value.as_object_mut()) {
            let kernel = |k: &KernelTime| json!({"name": k.name, "count": k.count, "seconds": k.seconds});
            object.insert("kernels".into(), self.kernels.iter().map(kernel).collect());
        }
        value
    }
}
