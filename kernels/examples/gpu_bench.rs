//! Times one rank of a model on the GPU of this machine, with weights of random codes: decode steps of 1 to 8 rows
//! at several contexts, and prefill chunks. The other ranks' sums are left out.
//!
//!     gpu_bench CONFIG.json NVRTC_DIR [--tp 2] [--layers N] [--chunk 2048] [--profile] [--no-overlap]
//!
//! Prints a table: time of a step (replayed graph, and launched one by one), launches, the bytes that it has to read,
//! and how many times the time that a device copy needs for as many bytes that is; whether logits are the same bits
//! however the step was launched. `--no-overlap` also times graphs whose kernels wait for one another as a whole.

use std::collections::{BTreeMap, HashMap};
use std::error::Error;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex};

use dsv4_kernels::collective::Alone;
use dsv4_kernels::device::cuda::Cuda;
use dsv4_kernels::device::nvrtc::Nvrtc;
use dsv4_kernels::device::unit::Image;
use dsv4_kernels::device::{Buffer, DeviceError, Facts, Gpu, Graph, Kernel, Launch, Mark};
use dsv4_kernels::gpu::kernels::Kernels;
use dsv4_kernels::gpu::weights::DeviceWeights;
use dsv4_kernels::gpu::{GpuBackend, GpuOptions};
use dsv4_kernels::numerics::Numerics;
use dsv4_kernels::tuning::Tuning;
use dsv4_model::layout::Format;
use dsv4_model::ops::{Segment, Step};
use dsv4_model::tensors::{Block, Kind, TensorRow, table};
use dsv4_model::{Model, ModelConfig, Tp};

const CONTEXTS: [u32; 4] = [0, 8 << 10, 64 << 10, 200 << 10];
const ROWS: [u32; 4] = [1, 2, 4, 8];
const REPEATS: u32 = 20;

/// Counts the time of every kernel by name.
struct Profiled {
    gpu: Arc<dyn Gpu>,
    names: Mutex<HashMap<Kernel, String>>,
    times: Mutex<Option<Vec<(Kernel, Mark, Mark)>>>,
}

impl Gpu for Profiled {
    fn facts(&self) -> &Facts {
        self.gpu.facts()
    }
    fn alloc(&self, bytes: u64) -> Result<u64, DeviceError> {
        self.gpu.alloc(bytes)
    }
    fn free(&self, at: u64) {
        self.gpu.free(at);
    }
    fn write(&self, at: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        self.gpu.write(at, bytes)
    }
    fn read(&self, at: u64, out: &mut [u8]) -> Result<(), DeviceError> {
        self.gpu.read(at, out)
    }
    fn fill(&self, at: u64, byte: u8, bytes: u64) -> Result<(), DeviceError> {
        self.gpu.fill(at, byte, bytes)
    }
    fn copy(&self, to: u64, from: u64, bytes: u64) -> Result<(), DeviceError> {
        self.gpu.copy(to, from, bytes)
    }
    fn load(&self, image: &Image, kernels: &[(&str, u32)]) -> Result<Vec<Kernel>, DeviceError> {
        let loaded = self.gpu.load(image, kernels)?;
        let mut names = self.names.lock().unwrap();
        names.extend(loaded.iter().zip(kernels).map(|(kernel, (name, _))| (*kernel, (*name).to_owned())));
        Ok(loaded)
    }
    fn allow_overlap(&self, kernels: &[Kernel]) {
        self.gpu.allow_overlap(kernels);
    }
    fn set_overlap(&self, on: bool) {
        self.gpu.set_overlap(on);
    }
    fn overlaps(&self) -> bool {
        self.gpu.overlaps()
    }
    fn launch(&self, kernel: Kernel, shape: Launch, args: &[u8]) -> Result<(), DeviceError> {
        let mut times = self.times.lock().unwrap();
        let Some(times) = times.as_mut() else { return self.gpu.launch(kernel, shape, args) };
        let from = self.gpu.mark()?;
        self.gpu.launch(kernel, shape, args)?;
        times.push((kernel, from, self.gpu.mark()?));
        Ok(())
    }
    fn sync(&self) -> Result<(), DeviceError> {
        self.gpu.sync()
    }
    fn begin_capture(&self) -> Result<bool, DeviceError> {
        self.gpu.begin_capture()
    }
    fn end_capture(&self) -> Result<Graph, DeviceError> {
        self.gpu.end_capture()
    }
    fn replay(&self, graph: Graph) -> Result<(), DeviceError> {
        self.gpu.replay(graph)
    }
    fn mark(&self) -> Result<Mark, DeviceError> {
        self.gpu.mark()
    }
    fn seconds_between(&self, from: Mark, to: Mark) -> Result<f64, DeviceError> {
        self.gpu.seconds_between(from, to)
    }
}

impl Profiled {
    /// Time by kernel of what `run` launches, one kernel at a time, longest first, seconds.
    fn profile<T>(&self, run: impl FnOnce() -> T) -> (T, Vec<(String, u32, f64)>) {
        *self.times.lock().unwrap() = Some(Vec::new());
        let overlapped = self.overlaps();
        self.set_overlap(false);
        let result = run();
        self.set_overlap(overlapped);
        let times = self.times.lock().unwrap().take().unwrap_or_default();
        let names = self.names.lock().unwrap();
        let mut sums: BTreeMap<String, (u32, f64)> = BTreeMap::new();
        for (kernel, from, to) in times {
            let sum = sums.entry(names[&kernel].clone()).or_default();
            sum.0 += 1;
            sum.1 += self.gpu.seconds_between(from, to).unwrap_or(0.0);
        }
        let mut list: Vec<_> = sums.into_iter().map(|(name, (count, time))| (name, count, time)).collect();
        list.sort_by(|a, b| b.2.total_cmp(&a.2));
        (result, list)
    }
}

struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn bytes(&mut self, count: usize, map: impl Fn(u8) -> u8) -> Vec<u8> {
        (0..count).map(|_| map((self.next() >> 32) as u8)).collect()
    }
}

/// Writes random codes of a tensor's format, and scales that keep activations small.
fn fill(
    gpu: &dyn Gpu,
    row: &TensorRow,
    tp: Tp,
    at: u64,
    config: &ModelConfig,
    noise: &mut Noise,
) -> Result<(), Box<dyn Error>> {
    const PIECE: usize = 8 << 20;
    let layout = row.matrix_layout(tp)?;
    let shape = row.local_shape(tp)?;
    let cols = *shape.last().unwrap_or(&1);
    let exponent = |gain: f64| (127.0 + (gain / (cols as f64).sqrt()).log2()).round() as u8;
    let (codes, scale): (Vec<u8>, u8) = match row.format {
        Format::Fp8 => (noise.bytes(PIECE, |b| b & 0x87 | 0x38 | (b & 0x08)), exponent(0.7)),
        Format::Fp4 => (noise.bytes(PIECE, |b| b), exponent(0.4)),
        Format::Bf16 => {
            let gain = if cols == 1 || shape.len() == 1 { 1.0 } else { 1.0 / (cols as f32).sqrt() };
            let value = |n: &mut Noise| {
                ((n.next() >> 40) as f32 / (1 << 23) as f32 - 1.0) * gain + if shape.len() == 1 { 1.0 } else { 0.0 }
            };
            ((0..PIECE / 2).flat_map(|_| ((value(noise).to_bits() >> 16) as u16).to_le_bytes()).collect(), 0)
        }
        Format::F32 => {
            let value = |n: &mut Noise| ((n.next() >> 40) as f32 / (1 << 23) as f32 - 1.0) / (cols as f32).sqrt();
            ((0..PIECE / 4).flat_map(|_| value(noise).to_le_bytes()).collect(), 0)
        }
        Format::I64 => {
            let (experts, k) = (config.n_routed_experts, config.num_experts_per_tok);
            let row = |n: &mut Noise| {
                let first = n.next() % experts;
                (0..k).flat_map(move |i| (((first + i * 37) % experts) as i32).to_le_bytes()).collect::<Vec<u8>>()
            };
            let count = PIECE / (4 * k as usize);
            ((0..count).flat_map(|_| row(noise)).collect(), 0)
        }
    };
    let scales = vec![scale; layout.scales_bytes as usize];
    let whole = match row.format {
        Format::I64 => codes.len() as u64,
        _ => PIECE as u64,
    };
    for matrix in 0..row.matrices() {
        let start = at + matrix * layout.stride;
        let mut done = 0;
        while done < layout.codes_bytes {
            let part = whole.min(layout.codes_bytes - done);
            gpu.write(start + done, &codes[..part as usize])?;
            done += part;
        }
        if !scales.is_empty() {
            gpu.write(start + layout.scales_offset, &scales)?;
        }
    }
    Ok(())
}

/// Bytes of weights that a step of `rows` rows reads, if no two rows choose the same expert, by kernel.
fn step_bytes(config: &ModelConfig, tp: Tp, rows: u64) -> Result<BTreeMap<&'static str, u64>, Box<dyn Error>> {
    let mut sums = BTreeMap::new();
    for row in table(config) {
        if matches!(row.id.block, Block::Draft(_)) {
            continue;
        }
        let bytes = row.artifact_bytes(tp)?;
        let routed = bytes * (rows * config.num_experts_per_tok).min(config.n_routed_experts) / config.n_routed_experts;
        let (kernel, bytes) = match row.id.kind {
            Kind::Embed | Kind::Tid2Eid => continue,
            Kind::W1 | Kind::W3 => ("moe_up", routed),
            Kind::W2 => ("moe_down", routed),
            Kind::SharedW1 | Kind::SharedW3 => ("moe_up", bytes),
            Kind::SharedW2 => ("moe_down", bytes),
            Kind::HcAttnFn | Kind::HcFfnFn => ("hc_mix", bytes),
            _ => ("gemv", bytes),
        };
        *sums.entry(kernel).or_default() += bytes;
    }
    Ok(sums)
}

fn copy_rate(gpu: &dyn Gpu, buffer: &Buffer) -> Result<f64, DeviceError> {
    let half = (buffer.bytes() / 2).min(2 << 30);
    let mut best = 0f64;
    for _ in 0..5 {
        let from = gpu.mark()?;
        gpu.copy(buffer.at() + half, buffer.at(), half)?;
        let seconds = gpu.seconds_between(from, gpu.mark()?)?;
        best = best.max(2.0 * half as f64 / seconds);
    }
    Ok(best)
}

fn flag<T: std::str::FromStr>(args: &[String], name: &str) -> Option<T> {
    let at = args.iter().position(|a| a == name)?;
    args.get(at + 1)?.parse().ok()
}

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().collect();
    let [_, config_file, nvrtc_dir, ..] = &args[..] else {
        return Err(
            "usage: gpu_bench CONFIG.json NVRTC_DIR [--tp 2] [--layers N] [--chunk 2048] [--profile] [--no-overlap]"
                .into(),
        );
    };
    let text = std::fs::read_to_string(config_file)?;
    let text = match flag::<u32>(&args, "--layers") {
        Some(layers) => ModelConfig::keep_layers(&text, &(0..layers).collect::<Vec<_>>())?,
        None => text,
    };
    let config = ModelConfig::parse(&text)?;
    let tp = Tp::new(0, flag(&args, "--tp").unwrap_or(2))?;
    let chunk: u32 = flag(&args, "--chunk").unwrap_or(16);
    let gpu = Arc::new(Profiled { gpu: Cuda::open(0)?, names: Mutex::default(), times: Mutex::new(None) });
    let shared: Arc<dyn Gpu> = gpu.clone();
    let facts = gpu.facts().clone();
    println!(
        "{}: {} multiprocessors, {:.1} GiB",
        facts.name,
        facts.multiprocessors,
        facts.memory_bytes as f64 / (1u64 << 30) as f64
    );

    let nvrtc = Nvrtc::open(Path::new(nvrtc_dir))?;
    let arch = facts.arch();
    let started = std::time::Instant::now();
    let kernels = Kernels::walk(&config, tp, Numerics::Published, &Tuning::for_arch(&arch), |unit| {
        for (kernel, _) in unit.kernels.iter().filter(|(kernel, _)| !unit.waits(kernel)) {
            println!("{kernel} of {} does not wait by itself: it never starts early", unit.family);
        }
        unit.load(gpu.as_ref(), &Image::Cubin(nvrtc.compile(unit, &arch)?.0))
    })?;
    println!("kernels compiled in {:.1} s", started.elapsed().as_secs_f64());

    let mut places: HashMap<String, Range<usize>> = HashMap::new();
    let mut end = 0usize;
    let rows = table(&config);
    for row in &rows {
        let bytes = row.artifact_bytes(tp)? as usize;
        places.insert(row.name.clone(), end..end + bytes);
        end += bytes.next_multiple_of(4096);
    }
    let arena = Buffer::new(&shared, end as u64)?;
    gpu.fill(arena.at(), 0, end as u64)?;
    let rate = copy_rate(gpu.as_ref(), &arena)?;
    println!("device copy {:.0} GB/s (read and written)", rate / 1e9);
    let started = std::time::Instant::now();
    let mut noise = Noise(0x9e37_79b9_7f4a_7c15);
    for row in &rows {
        fill(gpu.as_ref(), row, tp, arena.at() + places[&row.name].start as u64, &config, &mut noise)?;
    }
    gpu.sync()?;
    println!("weights: {:.2} GB in {:.1} s", end as f64 / 1e9, started.elapsed().as_secs_f64());
    let weights = DeviceWeights::new(&shared, &config, tp, arena, |name| places.get(name).cloned())?;
    let context = CONTEXTS[CONTEXTS.len() - 1] + 4096;
    let options = GpuOptions { slots: 1, context, rows_max: chunk.max(16), solo: true, graphs: true };
    let mut backend = GpuBackend::new(
        shared.clone(),
        config.clone(),
        tp,
        Numerics::Published,
        weights,
        kernels,
        Box::new(Alone),
        options,
    )?;
    let model = Model::new(&config);
    let step = |start: u32, rows: u32, noise: &mut Noise| Step {
        tokens: (0..rows).map(|_| (noise.next() % config.vocab_size) as u32).collect(),
        segments: vec![Segment { slot: 0, start, rows }],
        logits: vec![rows - 1],
        source: vec![],
    };
    println!(
        "{:>8} {:>5} {:>10} {:>10} {:>8} {:>9} {:>9} {:>7} {:>9}",
        "context", "rows", "graph us", "eager us", "launches", "kernel us", "floor us", "ratio", "tokens/s"
    );
    for start in CONTEXTS {
        for rows in ROWS {
            let mut run = |backend: &mut GpuBackend, repeats: u32| -> Result<f64, Box<dyn Error>> {
                let from = gpu.mark()?;
                for _ in 0..repeats {
                    backend.open(0)?;
                    backend.assume_filled(0, start);
                    backend.begin(step(start, rows, &mut noise), None)?;
                    let streams = model.trunk(backend)?;
                    model.logits(backend, &streams)?;
                }
                Ok(gpu.seconds_between(from, gpu.mark()?)? / f64::from(repeats))
            };
            backend.set_graphs(true);
            run(&mut backend, 2)?;
            let graph = run(&mut backend, REPEATS)?;
            let launches = backend.stats().launches;
            let apart = match args.iter().any(|a| a == "--no-overlap") {
                true => {
                    gpu.set_overlap(false);
                    run(&mut backend, 2)?;
                    let apart = run(&mut backend, REPEATS)?;
                    gpu.set_overlap(true);
                    format!(", {:.1} us without overlap", apart * 1e6)
                }
                false => String::new(),
            };
            backend.set_graphs(false);
            run(&mut backend, 1)?;
            let eager = run(&mut backend, 3)?;
            let (result, profile) = gpu.profile(|| run(&mut backend, 1));
            result?;
            let kernel: f64 = profile.iter().map(|(_, _, t)| t).sum();
            let bytes = step_bytes(&config, tp, rows.into())?;
            let floor = bytes.values().sum::<u64>() as f64 / rate;
            // The same step again and again: replayed, launched one by one, and that without overlap.
            let fixed = step(start, rows, &mut Noise(7));
            let mut logits = |graphs: bool, overlap: bool| -> Result<Vec<u32>, Box<dyn Error>> {
                gpu.set_overlap(overlap);
                backend.set_graphs(graphs);
                backend.open(0)?;
                backend.assume_filled(0, start);
                backend.begin(fixed.clone(), None)?;
                let streams = model.trunk(&mut backend)?;
                Ok(model.logits(&mut backend, &streams)?.data.iter().map(|v| v.to_bits()).collect())
            };
            // The first leaves the same rings behind as the others find.
            logits(false, false)?;
            let expected = logits(false, false)?;
            let same = [(false, true), (true, false), (true, true), (true, true), (true, true)]
                .map(|(graphs, overlap)| logits(graphs, overlap).map(|found| found == expected));
            let same = same.into_iter().collect::<Result<Vec<bool>, _>>()?;
            let same = match same.iter().all(|same| *same) {
                true => "the same bits however launched".into(),
                false => format!("DIFFERENT BITS: eager, graph apart, graph: {same:?}"),
            };
            let finite = expected.iter().all(|bits| f32::from_bits(*bits).is_finite());
            println!(
                "{start:>8} {rows:>5} {:>10.1} {:>10.1} {launches:>8} {:>9.1} {:>9.1} {:>7.2} {:>9.1}  {same}{}{apart}",
                graph * 1e6,
                eager * 1e6,
                kernel * 1e6,
                floor * 1e6,
                graph / floor,
                f64::from(rows) / graph,
                if finite { "" } else { ", not finite" },
            );
            if args.iter().any(|a| a == "--profile")
                && (rows == 1 || rows == 8)
                && (start == 8 << 10 || start == 200 << 10)
            {
                for (name, count, time) in profile {
                    let floor = match bytes.get(name.as_str()) {
                        Some(bytes) => format!(", floor {:>7.1} us", *bytes as f64 / rate * 1e6),
                        None => String::new(),
                    };
                    println!(
                        "    {name:<20} {count:>5} x {:>8.2} us = {:>9.1} us{floor}",
                        time * 1e6 / f64::from(count),
                        time * 1e6
                    );
                }
            }
        }
    }
    if chunk > 16 {
        for start in [0, 32 << 10, 128 << 10] {
            let mut run = |backend: &mut GpuBackend| -> Result<f64, Box<dyn Error>> {
                backend.open(0)?;
                backend.assume_filled(0, start);
                let from = gpu.mark()?;
                backend.begin(step(start, chunk, &mut noise), None)?;
                let streams = model.trunk(backend)?;
                model.logits(backend, &streams)?;
                Ok(gpu.seconds_between(from, gpu.mark()?)?)
            };
            run(&mut backend)?;
            let seconds = run(&mut backend)?;
            println!(
                "prefill of {chunk} rows at {start}: {:.2} ms, {:.0} tokens/s",
                seconds * 1e3,
                f64::from(chunk) / seconds
            );
            if args.iter().any(|a| a == "--profile") {
                let (result, profile) = gpu.profile(|| run(&mut backend));
                result?;
                for (name, count, time) in profile {
                    println!(
                        "    {name:<20} {count:>5} x {:>8.2} us = {:>9.1} us",
                        time * 1e6 / f64::from(count),
                        time * 1e6
                    );
                }
            }
        }
    }
    Ok(())
}
