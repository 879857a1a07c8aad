//! The GPU backend, on the emulator where there is no GPU, against the CPU backend, on the checkpoint of the goldens.

use std::sync::Arc;
use std::time::Instant;

use dsv4_kernels::collective::Alone;
use dsv4_kernels::device::Gpu;
use dsv4_kernels::device::unit::Unit;
use dsv4_kernels::gpu::{Activation, GpuBackend, GpuOptions};
use dsv4_kernels::numerics::Numerics;
use dsv4_kernels::ops::Mat;
use dsv4_kernels::ops::dense_gemm::native;
use dsv4_kernels::reference::Streams as CpuStreams;
use dsv4_model::Model;
use dsv4_model::forward::layer;
use dsv4_model::ops::{Backend, Done, Segment, Site, Step};
use dsv4_run::gpu::Ready;
use dsv4_run::load::{RankOptions, open};
use dsv4_run::step::{Command, Source};
use dsv4_tests::artifacts::{Packed, Unwatched};
use dsv4_tests::device::{self, packed};
use dsv4_tests::golden::{self, distance, kl};
use dsv4_tests::group::{Failed, Group};
use dsv4_tests::skip;

/// Largest difference of float logits between the backends.
const LOGITS_MAX: f64 = 1e-4;
/// Mean difference that FP8 rounding makes of other roundings, in one layer (the goldens' README).
const LAYER_MEAN: f64 = 0.02;
/// Divergence of the published numerics over a whole model, nats, mean over rows: as for the CPU.
const KL_MEAN: f64 = 0.03;

const OPTIONS: GpuOptions = GpuOptions { slots: 2, context: 512, rows_max: 64, solo: false, graphs: true };

fn can_run() -> bool {
    device::open().is_some()
}

/// All ranks of a packed checkpoint.
fn group(packed: &Packed, numerics: Numerics) -> Group {
    Group::on_gpu(packed.path(), numerics, OPTIONS)
}

/// A step of one sequence that wants all its rows' logits.
fn all_of(slot: u32, start: usize, tokens: &[u32]) -> Step {
    let rows = tokens.len() as u32;
    Step {
        tokens: tokens.to_vec(),
        segments: vec![Segment { slot, start: start as u32, rows }],
        logits: (0..rows).collect(),
        source: vec![],
    }
}

/// The same commands on the CPU: one rank.
fn reference(packed: &Packed, numerics: Numerics, rows_max: usize) -> Group {
    let opened = open(packed.path()).unwrap_or_else(|e| panic!("{e}"));
    let arena = opened.artifact.load_rank(0, 2, &Unwatched).unwrap_or_else(|e| panic!("{e}"));
    let options = RankOptions { numerics, slots: 2, rows_max };
    Group::alone(opened.backend(arena, Box::new(Alone), options).unwrap_or_else(|e| panic!("{e}")))
}

/// Says how long something took.
struct Clock(Instant);

impl Clock {
    fn start() -> Clock {
        Clock(Instant::now())
    }

    fn lap(&mut self, what: &str) {
        println!("{what}: {:.1} s", self.0.elapsed().as_secs_f64());
        self.0 = Instant::now();
    }
}

fn close(what: &str, found: &Mat, expected: &Mat, max: f64) {
    assert_eq!((found.rows, found.cols), (expected.rows, expected.cols), "{what}");
    let d = distance(&found.data, &expected.data);
    println!("{what}: max |d| {:.2e}, mean {:.2e}", d.max, d.mean);
    assert!(d.max <= max, "{what}: max |d| {} exceeds {max}", d.max);
}

/// Mean divergence of rows.
fn mean_kl(found: &Mat, expected: &Mat) -> f64 {
    assert_eq!((found.rows, found.cols), (expected.rows, expected.cols));
    (0..found.rows).map(|r| kl(found.row(r), expected.row(r))).sum::<f64>() / found.rows as f64
}

/// Steps of all lengths: past the window, over closing entries of both kinds, with more entries than are selected.
const PARTS: [usize; 5] = [64, 60, 7, 5, 1];

#[test]
fn float_logits_are_those_of_the_cpu() {
    if !can_run() {
        return;
    }
    let mut clock = Clock::start();
    let art = packed("tiny", 1);
    let tokens = golden::prompt("mid");
    let mut rank = group(&art, Numerics::Float);
    clock.lap("ready");
    let expected = reference(&art, Numerics::Float, 140).logits_in_parts(&tokens, &[tokens.len()]);
    clock.lap("CPU");
    let found = rank.logits_in_parts(&tokens, &PARTS);
    clock.lap("GPU");
    close("float", &found, &expected, LOGITS_MAX);
}

#[test]
fn published_logits_diverge_no_more_than_those_of_the_cpu() {
    if !can_run() {
        return;
    }
    let mut clock = Clock::start();
    let art = packed("tiny", 1);
    let tokens = golden::prompt("mid");
    let mut rank = group(&art, Numerics::Published);
    clock.lap("ready");
    let cpu = reference(&art, Numerics::Published, 140).logits_in_parts(&tokens, &[tokens.len()]);
    clock.lap("CPU");
    let gpu = rank.logits_in_parts(&tokens, &PARTS);
    clock.lap("GPU");
    println!("against the CPU: KL mean {:.4}", mean_kl(&gpu, &cpu));
    for file in ["logits_float.safetensors", "logits_serve.safetensors"] {
        let golden = &golden::tensors(file)["mid"];
        let golden = Mat { rows: golden.shape[0], cols: golden.cols(), data: golden.data.clone() };
        let (gpu, cpu) = (mean_kl(&gpu, &golden), mean_kl(&cpu, &golden));
        println!("against {file}: KL mean {gpu:.4}, of the CPU {cpu:.4}");
        assert!(gpu < KL_MEAN, "{file}: KL {gpu} exceeds {KL_MEAN}");
    }
}

/// Each layer alone, from the exact input that the goldens' reference had, in one long step and in short ones.
#[test]
fn published_layer_by_layer() {
    if !can_run() {
        return;
    }
    let mut clock = Clock::start();
    let golden = golden::tensors("layer_io_serve.safetensors");
    let art = packed("tiny", 1);
    let tokens = golden::prompt("mid");
    let mut group = group(&art, Numerics::Published);
    let b = group.gpu();
    let model = Model::new(b.config());
    clock.lap("ready");
    let layers = model.layers().len();
    for (i, spec) in model.layers().iter().enumerate() {
        let last = i + 1 == layers;
        let next = if last { format!("layers.{i}.out") } else { format!("layers.{}.in", i + 1) };
        let (from, to) = (&golden[&format!("layers.{i}.in")], &golden[&next]);
        let mut found = Vec::new();
        b.open(0).unwrap();
        for (start, rows) in [(0, 50), (50, 11), (61, 1)] {
            let part = &from.data[start * from.cols()..(start + rows) * from.cols()];
            b.begin(Step { logits: vec![], ..all_of(0, start, &tokens[start..start + rows]) }, None).unwrap();
            b.finish().unwrap();
            let mut h = b.set_streams(&Mat { rows, cols: from.cols(), data: part.to_vec() }).unwrap();
            let done = layer(b, spec, &mut h, None).unwrap();
            b.hc_finish(&mut h, done).unwrap();
            found.extend(b.streams(&h).unwrap().data);
        }
        let d = distance(&found, &to.data[..found.len()]);
        let size = to.data.iter().map(|v| f64::from(v.abs())).sum::<f64>() / to.data.len() as f64;
        println!("layer {i}: mean |d| {:.2e} of mean |h| {size:.2}, max {:.2e}", d.mean, d.max);
        assert!(d.mean < LAYER_MEAN, "layer {i}: mean |d| {} exceeds {LAYER_MEAN}", d.mean);
    }
    clock.lap("GPU");
}

/// Other widths: the trained checkpoint.
#[test]
fn nano_is_that_of_the_cpu() {
    if !can_run() {
        return;
    }
    let mut clock = Clock::start();
    let art = packed("nano", 1);
    let tokens: Vec<u32> = (0..26u32).map(|i| 2 + (i * i * 7 + i * 13) % 2039).collect();
    for numerics in [Numerics::Float, Numerics::Published] {
        let mut rank = group(&art, numerics);
        clock.lap("ready");
        let found = rank.logits_in_parts(&tokens, &[19, 6, 1]);
        clock.lap("GPU");
        let expected = reference(&art, numerics, 26).logits_in_parts(&tokens, &[26]);
        let divergence = mean_kl(&found, &expected);
        println!("{} against the CPU: KL mean {divergence:.1e}", numerics.name());
        let bound = if numerics == Numerics::Float { 1e-8 } else { KL_MEAN };
        assert!(divergence < bound, "{}: KL {divergence} exceeds {bound}", numerics.name());
    }
}

/// Portable kernels whose quantised activations are all zero.
fn broken(unit: &Unit) -> Unit {
    let zero = unit.source.replace("e4m3_round(", "0.0f * e4m3_round(");
    let portable = ["gemm", "moe_prefill"].contains(&unit.family);
    Unit { source: if portable { String::leak(zero) } else { unit.source }, ..unit.clone() }
}

/// Ranks use the block-scaled kernels together or not at all, and say so.
fn agrees(packed: &Packed, gpu: Arc<dyn Gpu>) {
    let opened = open(packed.path()).unwrap();
    let mut ready = Ready::new(&opened, gpu, 0, Numerics::Published, OPTIONS).unwrap_or_else(|e| panic!("{e}"));
    ready.agree(&mut Alone).unwrap();
    assert_eq!((ready.is_block_scaled(), ready.outcome()), (true, "long steps use the block-scaled kernels\n"));
    ready.agree(&mut Failed).unwrap();
    assert!(!ready.is_block_scaled() && ready.outcome().contains("another rank's"), "{}", ready.outcome());
}

/// Long steps on the block-scaled tensor cores that only sm_121a has, against the portable kernels. On the emulator the
/// portable ones of the same rank are broken: every quantised product is a block-scaled one.
#[test]
fn block_scaled_products_are_the_portable_ones() {
    let Some(gpu) = device::open() else { return };
    let (is_real, arch) = (device::is_real(), gpu.gpu.facts().arch());
    if is_real && arch != native::ARCH {
        return skip(&format!("block-scaled products: {arch} has none, and the emulator is not used beside a GPU"));
    }
    let mut clock = Clock::start();
    let tokens = &golden::prompt("mid")[..93];
    for checkpoint in ["tiny", "nano"] {
        let portable = packed(checkpoint, 1);
        let edited = (!is_real).then(|| {
            let (kernels, tuning) = device::kernels_for(&portable, 1, native::ARCH, &[Numerics::Published], broken);
            portable.with_kernels(native::ARCH, &kernels, Some(&tuning))
        });
        let packed = edited.as_ref().unwrap_or(&portable);
        let gpu = move || if is_real { device::open().expect("as before") } else { device::emulator_as((12, 1)) }.gpu;
        agrees(packed, gpu());
        let mut rank = Group::on(gpu, packed.path(), Numerics::Published, OPTIONS);
        let verdicts = rank.gpu().verdicts();
        verdicts.iter().for_each(|v| println!("{v}"));
        assert_eq!(verdicts.len(), 2);
        assert!(verdicts.iter().all(|v| v.accepted()));
        assert!(is_real || verdicts[0].portable > 0.1, "broken");
        let found = rank.logits_in_parts(tokens, &[64, 29]);
        clock.lap("block-scaled");
        let mut rank = Group::on_gpu_portable(portable.path(), Numerics::Published, OPTIONS);
        assert_eq!(rank.gpu().verdicts().is_empty(), !is_real);
        let expected = rank.logits_in_parts(tokens, &[64, 29]);
        clock.lap("portable");
        let divergence = mean_kl(&found, &expected);
        println!("KL mean {divergence:.1e}, the same bits: {}", found == expected);
        assert!(divergence < KL_MEAN, "KL {divergence} exceeds {KL_MEAN}");
    }
}

/// Two sequences, drafts that continue the trunk and drafts.
fn stories(tokens: &[u32]) -> Vec<Command> {
    let both = |starts: [u32; 2], rows: [u32; 2], from: usize| Step {
        tokens: tokens[from..from + (rows[0] + rows[1]) as usize].to_vec(),
        segments: (0..2).map(|i| Segment { slot: 1 - i, start: starts[i as usize], rows: rows[i as usize] }).collect(),
        logits: (0..rows[0] + rows[1]).collect(),
        source: vec![],
    };
    let draft = |step: Step, source: &[u32]| Step { source: source.to_vec(), ..step };
    let upto = |n: u32| (0..n).collect::<Vec<u32>>();
    vec![
        Command::Open(1),
        Command::Open(0),
        Command::Trunk(both([0, 0], [9, 21], 0)),
        Command::Draft(draft(both([0, 0], [9, 21], 1), &upto(30)), Source::Trunk),
        Command::Draft(draft(both([9, 21], [1, 1], 31), &[29, 8]), Source::Draft),
        Command::Draft(draft(both([10, 22], [1, 1], 40), &[1, 0]), Source::Draft),
        // Back over half of a draft, and on.
        Command::Trunk(both([9, 21], [5, 3], 50)),
        Command::Trunk(both([12, 22], [1, 2], 60)),
        Command::Draft(draft(both([9, 22], [1, 1], 61), &[2, 0]), Source::Trunk),
        Command::Trunk(both([13, 24], [1, 1], 70)),
        Command::Trunk(both([14, 25], [1, 1], 73)),
    ]
}

#[test]
fn sequences_and_drafts() {
    if !can_run() {
        return;
    }
    let mut clock = Clock::start();
    let art = packed("tiny", 1);
    let tokens = golden::prompt("mid");
    for numerics in [Numerics::Float, Numerics::Published] {
        let (mut rank, mut cpu) = (group(&art, numerics), reference(&art, numerics, 64));
        clock.lap("ready");
        let (mut divergence, mut rows) = (0.0, 0);
        for (i, command) in stories(&tokens).into_iter().enumerate() {
            let found = rank.run(command.clone());
            let expected = cpu.engine.run(command).unwrap();
            if numerics == Numerics::Float {
                close(&format!("command {i}"), &found, &expected, LOGITS_MAX);
            } else if found.rows > 0 {
                divergence += mean_kl(&found, &expected) * found.rows as f64;
                rows += found.rows;
            }
        }
        println!("{} against the CPU: KL mean {:.4}", numerics.name(), divergence / f64::from(rows.max(1) as u32));
        assert!(divergence <= KL_MEAN * rows as f64);
        clock.lap("GPU");
    }
}

/// In steps of up to 16 rows a row has the same bits in any company, and recorded or not.
#[test]
fn a_row_does_not_depend_on_its_step() {
    if !can_run() {
        return;
    }
    let mut clock = Clock::start();
    let art = packed("tiny", 1);
    let tokens = &golden::prompt("mid")[..14];
    for numerics in [Numerics::Float, Numerics::Published] {
        let mut rank = group(&art, numerics);
        clock.lap("ready");
        let alone = rank.logits_in_parts(tokens, &[1]);
        assert!(rank.gpu().stats().replayed, "steps alike are replayed");
        rank.gpu().set_graphs(false);
        assert!(rank.logits_in_parts(tokens, &[14]) == alone, "{}: 14 rows", numerics.name());
        assert!(!rank.gpu().stats().replayed);
        rank.gpu().set_graphs(true);
        assert!(rank.logits_in_parts(tokens, &[2, 3, 9]) == alone, "{}: 2 to 9 rows", numerics.name());
        // Beside another sequence, in the other slot.
        rank.run(Command::Open(0));
        rank.run(Command::Open(1));
        let mut beside = Mat::default();
        for start in (0..12).step_by(3) {
            let other = Segment { slot: 0, start: start as u32 / 3 * 5, rows: 5 };
            let own = Segment { slot: 1, start: start as u32, rows: 3 };
            let mut step = Step { segments: vec![other, own], ..Step::default() };
            step.tokens = golden::prompt("mid")[40 + start..45 + start].to_vec();
            step.tokens.extend(&tokens[start..start + 3]);
            step.logits = vec![5, 6, 7];
            beside.data.extend(rank.run(Command::Trunk(step)).data);
        }
        assert!(beside.data == alone.data[..beside.data.len()], "{}: beside another", numerics.name());
        clock.lap("GPU");
    }
}

/// Two ranks, each with a GPU of its own where it is emulated, their sums over loopback.
#[test]
fn two_ranks() {
    if !can_run() {
        return;
    }
    let mut clock = Clock::start();
    let tokens = golden::prompt("mid")[..21].to_vec();
    let alone = packed("tiny", 1);
    let art = packed("tiny", 2);
    for numerics in [Numerics::Float, Numerics::Published] {
        let mut both = group(&art, numerics);
        let found = both.logits_in_parts(&tokens, &[17, 3, 1]);
        both.finish();
        clock.lap("GPU");
        let expected = reference(&alone, numerics, 21).logits_in_parts(&tokens, &[21]);
        match numerics {
            Numerics::Float => close("two ranks", &found, &expected, LOGITS_MAX),
            Numerics::Published => {
                let divergence = mean_kl(&found, &expected);
                println!("two ranks against the CPU: KL mean {divergence:.4}");
                assert!(divergence < KL_MEAN);
            }
        }
    }
}

#[test]
fn steps_that_cannot_be_run_are_refused() {
    if !can_run() {
        return;
    }
    let art = packed("tiny", 1);
    let mut group = group(&art, Numerics::Published);
    let tokens = golden::prompt("mid");
    let b = group.gpu();
    let refuses = |b: &mut GpuBackend, step: Step, words: &str| {
        let text = b.begin(step, None).expect_err(words).to_string();
        println!("{text}");
        assert!(text.contains(words) && text.contains("help:"), "{text}");
    };
    refuses(b, all_of(0, 0, &tokens[..1]), "an open slot");
    refuses(b, all_of(2, 0, &tokens[..1]), "a slot below 2");
    assert!(b.open(2).is_err() && b.close(2).is_err());
    b.open(0).unwrap();
    b.open(1).unwrap();
    refuses(b, all_of(0, 1, &tokens[..1]), "a start up to 0");
    refuses(b, all_of(0, 0, &tokens[..65]), "at most 64 rows");
    refuses(b, all_of(0, 0, &[512]), "token ids below 512");
    refuses(b, Step { tokens: vec![], ..all_of(0, 0, &[3]) }, "a token for each of 1 rows");
    refuses(b, Step { logits: vec![1], ..all_of(0, 0, &[3]) }, "wanted rows below 1");
    refuses(b, Step { logits: vec![1, 0], ..all_of(0, 0, &[3, 4]) }, "ascending");
    let twice = Segment { slot: 0, start: 0, rows: 1 };
    refuses(b, Step { segments: vec![twice, twice], ..all_of(0, 0, &[3, 4]) }, "one segment per slot");
    // Positions are claimed by a step that begins; none of these runs.
    for start in (0..512).step_by(64) {
        b.begin(all_of(0, start, &[3; 64]), None).unwrap();
    }
    assert_eq!(b.filled(0), Some((512, 0)));
    refuses(b, all_of(0, 512, &[3]), "positions below 512");
    refuses(b, all_of(0, 494, &[3]), "a start of 0 or from 495");
    b.begin(all_of(0, 495, &[3]), None).unwrap();
    assert_eq!(b.filled(0), Some((496, 0)));
    refuses(b, all_of(0, 494, &[3]), "a start of 0 or from 495");
    b.begin(all_of(0, 0, &[3]), None).unwrap();
    refuses(b, all_of(0, 2, &[3]), "a start up to 1");
    let source = b.set_streams(&Mat { rows: 1, cols: 1024, data: vec![0.0; 1024] }).unwrap();
    let error = b.begin(Step { source: vec![1], ..all_of(1, 0, &[3]) }, Some(&source)).unwrap_err();
    assert!(error.to_string().contains("source rows below 1"), "{error}");
    let error = b.begin(all_of(1, 0, &[3]), Some(&source)).unwrap_err();
    assert!(error.to_string().contains("a source for each of 1 rows"), "{error}");
}

/// Every operation alone, from the CPU's inputs, in a short step and in a long one: the same bits but for sums in
/// another order that fall on another side of a rounding, and for what attention rounds (relative to the largest
/// score so far instead of the largest of all).
#[test]
fn published_operations_are_those_of_the_cpu() {
    if !can_run() {
        return;
    }
    let golden = golden::tensors("layer_io_serve.safetensors");
    let art = packed("tiny", 1);
    let tokens = golden::prompt("mid");
    let mut group = group(&art, Numerics::Published);
    let gpu = group.gpu();
    gpu.set_graphs(false);
    let mut on_cpu = reference(&art, Numerics::Published, 64);
    let cpu = on_cpu.reference();
    let model = Model::new(gpu.config());
    // What is equal, at least, and the mean difference as a part of the mean, at most.
    let same = |gpu: &GpuBackend, what: &str, x: &Activation, expected: &Mat, (equal, relative): (f64, f64)| {
        let found = gpu.values(x).unwrap();
        let count = expected.data.len() as f64;
        let size = expected.data.iter().map(|v| f64::from(v.abs())).sum::<f64>() / count;
        let part = found.data.iter().zip(&expected.data).filter(|(f, e)| f == e).count() as f64 / count;
        let mean = distance(&found.data, &expected.data).mean / size;
        println!("{what}: {:.2} % equal, relative mean {mean:.1e}", 100.0 * part);
        assert!(part >= equal && mean <= relative, "{what}: {part} equal, relative mean {mean}");
        gpu.set_values(x, expected).unwrap();
    };
    const SUMS: (f64, f64) = (0.99, 1e-4);
    // One FP8 step away in a thousand values of `mid` moves many outputs a little.
    const EXPERTS: (f64, f64) = (0.95, 1e-3);
    const ATTENTION: (f64, f64) = (0.7, 1e-3);
    for (i, rows) in [(0, 8), (1, 8), (1, 40), (2, 40)] {
        let spec = &model.layers()[i];
        let from = &golden[&format!("layers.{i}.in")];
        let at = |what: &str| format!("layer {i}, {rows} rows, {what}");
        let streams = Mat { rows, cols: from.cols(), data: from.data[..rows * from.cols()].to_vec() };
        let step = Step { logits: vec![], ..all_of(0, 0, &tokens[..rows]) };
        gpu.open(0).unwrap();
        cpu.open(0).unwrap();
        gpu.begin(step.clone(), None).unwrap();
        cpu.begin(step, None).unwrap();
        let (mut h, mut h_cpu) = (gpu.set_streams(&streams).unwrap(), CpuStreams(streams));
        let (x, mix) = gpu.hc_site(&mut h, None, spec, Site::Attn).unwrap();
        let (x_cpu, mix_cpu) = cpu.hc_site(&mut h_cpu, None, spec, Site::Attn).unwrap();
        same(gpu, &at("attention input"), &x, &x_cpu, SUMS);
        let (inputs, inputs_cpu) = (gpu.attn_inputs(&x, spec).unwrap(), cpu.attn_inputs(&x_cpu, spec).unwrap());
        same(gpu, &at("low-rank query"), &inputs.main, &inputs_cpu.main, SUMS);
        let queries = gpu.attn_queries(&inputs.main, spec).unwrap();
        let queries_cpu = cpu.attn_queries(&inputs_cpu.main, spec).unwrap();
        // Queries are normalised and turned where they are used, on the GPU.
        let (mut selected, mut selected_cpu) = (None, None);
        if let (Some(q), Some(q_cpu)) = (&queries.index, &queries_cpu.index) {
            let (w, w_cpu) = (inputs.index.unwrap(), inputs_cpu.index.as_ref().unwrap());
            selected = Some(gpu.index_select(q, &w, spec).unwrap());
            selected_cpu = Some(cpu.index_select(q_cpu, w_cpu, spec).unwrap());
        }
        let o = gpu.attend(&queries.main, selected.as_ref(), spec).unwrap();
        let o_cpu = cpu.attend(&queries_cpu.main, selected_cpu.as_ref(), spec).unwrap();
        same(gpu, &at("attention"), &o, &o_cpu, ATTENTION);
        let y = gpu.attn_output(&o, spec).unwrap();
        let y = gpu.all_reduce(y).unwrap();
        let y_cpu = cpu.attn_output(&o_cpu, spec).unwrap();
        let y_cpu = cpu.all_reduce(y_cpu).unwrap();
        same(gpu, &at("attention output"), &y, &y_cpu, EXPERTS);
        let (x, mix) = gpu.hc_site(&mut h, Some(Done { y, mix }), spec, Site::Ffn).unwrap();
        let (x_cpu, mix_cpu) = cpu.hc_site(&mut h_cpu, Some(Done { y: y_cpu, mix: mix_cpu }), spec, Site::Ffn).unwrap();
        same(gpu, &at("experts' input"), &x, &x_cpu, SUMS);
        let (routing, routing_cpu) = (gpu.route(&x, spec).unwrap(), cpu.route(&x_cpu, spec).unwrap());
        let y = gpu.experts(&x, &routing, spec).unwrap();
        let y = gpu.all_reduce(y).unwrap();
        let y_cpu = cpu.experts(&x_cpu, &routing_cpu, spec).unwrap();
        let y_cpu = cpu.all_reduce(y_cpu).unwrap();
        same(gpu, &at("experts"), &y, &y_cpu, EXPERTS);
        gpu.hc_finish(&mut h, Done { y, mix }).unwrap();
        cpu.hc_finish(&mut h_cpu, Done { y: y_cpu, mix: mix_cpu }).unwrap();
        let d = distance(&gpu.streams(&h).unwrap().data, &h_cpu.0.data);
        println!("{}: mean |d| {:.1e}", at("streams"), d.mean);
        assert!(d.mean < 1e-4, "{}", at("streams"));
    }
}
