//! The runtime on a GPU: the machine's, else the emulator, else (for what is refused, and for what passes between
//! program and driver) a driver without a GPU.
//!
//! On a machine with a GPU everything runs, the program included, with artifacts packed for it (`DSV4_ARTIFACTS`).
//! Without one the emulator runs a few short stories, and what it is too slow for is skipped, said loudly.

use std::ops::ControlFlow;
use std::path::Path;
use std::time::{Duration, Instant};

use dsv4_format::KernelInput;
use dsv4_kernels::device::DeviceError;
use dsv4_kernels::gpu::GpuOptions;
use dsv4_kernels::gpu::kernels::Kernels;
use dsv4_kernels::gpu::state::StateSize;
use dsv4_kernels::numerics::Numerics;
use dsv4_kernels::ops::Mat;
use dsv4_kernels::ops::dense_gemm::native::ARCH;
use dsv4_kernels::tuning::Tuning;
use dsv4_model::ops::{Segment, Step};
use dsv4_model::{ModelConfig, Tp};
use dsv4_run::bench::{Plan, Source as Weights, measure};
use dsv4_run::cli::Backend;
use dsv4_run::compute::{Compute, choose};
use dsv4_run::generate::{Generated, Request, generate};
use dsv4_run::load::open;
use dsv4_run::progress::Bar;
use dsv4_run::sample::Sampling;
use dsv4_run::scheduler::{self, Event, Job, Limits, Options, Policy};
use dsv4_run::step::Command;
use dsv4_tests::artifacts::Packed;
use dsv4_tests::binaries::{DSV4_RUN, run};
use dsv4_tests::device::{self, is_real, packed};
use dsv4_tests::driver::{Driver, Says};
use dsv4_tests::golden::{self, distance};
use dsv4_tests::group::Group;
use dsv4_tests::nano::{Case, cases};
use dsv4_tests::{DATA, skip};
use serde_json::Value;

const USAGE: i32 = 2;
const INPUT: i32 = 3;
const DEVICE: i32 = 4;
const EOS: u32 = 1;
const TOKENS_MAX: usize = 70;
const CHUNK: usize = 64;
const OPTIONS: GpuOptions = GpuOptions { slots: 4, context: 1024, rows_max: 64, solo: false, graphs: true };
/// Tokens of prompt and answer that the emulator has the time for.
const EMULATED_TOKENS: usize = 60;
const REPEATS: usize = 1000;
/// Least part of so many drafts that the trunk must agree with.
const ACCEPTED: f64 = 0.95;
const DRAFTS_TELLING: usize = 200;

/// Says what a story is left out for, on the emulator.
fn needs_gpu(what: &str) -> bool {
    if !is_real() {
        skip(&format!("{what}: needs a GPU"));
    }
    is_real()
}

fn can_run() -> bool {
    device::open().is_some()
}

/// The conversations that there is time for: all on a GPU, the shortest on the emulator.
fn affordable(count: usize) -> Vec<Case> {
    let mut all = cases();
    if !is_real() {
        all.sort_by_key(|case| case.prompt_tokens.len() + case.completion_tokens.len());
        all.truncate(count);
        let longest = all.last().expect("a case");
        let tokens = longest.prompt_tokens.len() + longest.completion_tokens.len();
        assert!(tokens <= EMULATED_TOKENS, "{tokens} tokens");
    }
    all
}

fn answer(group: &mut Group, prompt: &[u32], sampling: Sampling, draft: usize, tokens_max: usize) -> Generated {
    in_chunks(group, prompt, sampling, draft, tokens_max, CHUNK)
}

fn in_chunks(
    group: &mut Group,
    prompt: &[u32],
    sampling: Sampling,
    draft: usize,
    tokens_max: usize,
    chunk: usize,
) -> Generated {
    let request = Request { prompt, tokens_max, sampling, draft, chunk, eos: EOS };
    let generated = generate(&mut group.engine, &request, &mut |_| ControlFlow::Continue(()));
    generated.unwrap_or_else(|e| panic!("{e}"))
}

/// Token for token, whatever is drafted.
fn conversations(tp: u32, drafts: &[usize], count: usize) {
    if !can_run() {
        return;
    }
    let art = packed("nano", tp);
    for numerics in [Numerics::Published, Numerics::Float] {
        if numerics == Numerics::Float && !needs_gpu("conversations in float numerics") {
            continue;
        }
        let started = Instant::now();
        let mut group = Group::on_gpu(art.path(), numerics, OPTIONS);
        println!("{tp} ranks ready in {:.1} s", started.elapsed().as_secs_f64());
        let (mut drafted, mut accepted) = (0, 0);
        for case in affordable(count) {
            for draft in drafts {
                let found = answer(&mut group, &case.prompt_tokens, Sampling::GREEDY, *draft, TOKENS_MAX);
                assert_eq!(found.tokens, case.completion_tokens, "{}, {draft} drafts", case.kind);
                drafted += found.stats.draft_tokens;
                accepted += found.stats.accepted_tokens;
            }
        }
        let part = accepted as f64 / drafted.max(1) as f64;
        println!("{}: {accepted} of {drafted} drafts accepted, {part:.3}", numerics.name());
        assert!(drafted < DRAFTS_TELLING || part > ACCEPTED, "{part} of the drafts");
        group.finish();
        println!("{tp} ranks, {}: {:.1} s", numerics.name(), started.elapsed().as_secs_f64());
    }
}

#[test]
fn conversations_of_one_rank() {
    conversations(1, &[0, 2], 2);
}

#[test]
fn conversations_of_two_ranks() {
    conversations(2, &[0, 3], 1);
}

/// Choice by chance, with drafts that are often wrong: the same answer.
#[test]
fn drafts_change_nothing() {
    if !can_run() {
        return;
    }
    let art = packed("nano", 1);
    let mut group = Group::on_gpu(art.path(), Numerics::Published, OPTIONS);
    let (tokens_max, chunk) = if is_real() { (TOKENS_MAX, CHUNK) } else { (6, 16) };
    let mut rejected = 0;
    for case in affordable(1).iter().take(8) {
        for seed in if is_real() { 1..9 } else { 1..3 } {
            let wild = Sampling { temperature: 3.0, top_p: 0.95, seed, ..Sampling::GREEDY };
            let plain = in_chunks(&mut group, &case.prompt_tokens, wild, 0, tokens_max, chunk);
            for draft in if is_real() { 1..4 } else { 2..3 } {
                let other = in_chunks(&mut group, &case.prompt_tokens, wild, draft, tokens_max, chunk);
                assert_eq!(other.tokens, plain.tokens, "{}, seed {seed}, {draft} drafts", case.kind);
                rejected += other.stats.draft_tokens - other.stats.accepted_tokens;
            }
        }
    }
    println!("{rejected} drafts rejected");
    assert!(rejected > 0);
}

/// Through the scheduler, in each other's company and with drafts: the conversations as ever.
#[test]
fn scheduled_together_nothing_changes() {
    if !can_run() {
        return;
    }
    let art = packed("nano", 1);
    let mut group = Group::on_gpu(art.path(), Numerics::Published, OPTIONS);
    let cases = affordable(2);
    let tokens_max = if is_real() { TOKENS_MAX } else { 3 };
    let limits = Limits { queue: 64, running: OPTIONS.slots as usize, context: OPTIONS.context as usize };
    let (scheduler, intake) = scheduler::new(limits);
    let jobs: Vec<_> = cases
        .iter()
        .enumerate()
        .map(|(i, case)| {
            let (events, receiver) = tokio::sync::mpsc::unbounded_channel();
            let options = Options { draft: i % 3, ..Options::greedy(tokens_max) };
            scheduler.submit(Job { prompt: case.prompt_tokens.clone(), options, events }).expect("room");
            receiver
        })
        .collect();
    scheduler.drain();
    let policy = Policy { chunk: CHUNK, decode_bound: Duration::from_millis(50), eos: 1 };
    scheduler::work(&mut group.engine, &intake, policy).unwrap_or_else(|e| panic!("{e}"));
    for (case, mut events) in cases.iter().zip(jobs) {
        let mut tokens = Vec::new();
        while let Some(event) = events.blocking_recv() {
            match event {
                Event::Token { token, .. } => tokens.push(token),
                Event::Failed { reason } => panic!("{reason}"),
                _ => {}
            }
        }
        let expected = &case.completion_tokens;
        assert_eq!(tokens, expected[..expected.len().min(tokens_max)], "{}", case.kind);
    }
    group.finish();
}

/// A step of one row for each of some sequences.
fn decode(rows: &[(u32, u32, u32)]) -> Command {
    Command::Trunk(Step {
        tokens: rows.iter().map(|(_, _, token)| *token).collect(),
        segments: rows.iter().map(|(slot, start, _)| Segment { slot: *slot, start: *start, rows: 1 }).collect(),
        logits: (0..rows.len() as u32).collect(),
        source: vec![],
    })
}

/// Sequences decoded together have the bits that each has alone; recorded steps those of launched ones, and kernels that
/// start while the one ahead ends those of kernels one after another.
#[test]
fn batched_equals_alone_and_recorded_equals_launched() {
    if !can_run() {
        return;
    }
    let art = packed("nano", 1);
    let mut group = Group::on_gpu(art.path(), Numerics::Published, OPTIONS);
    // More than one step of a kind, and prompts of different lengths.
    let (steps, sequences) = if is_real() { (40, 4) } else { (2, 2) };
    let prompts: Vec<Vec<u32>> = affordable(2).iter().take(sequences).map(|case| case.prompt_tokens.clone()).collect();
    let length = |i: usize| if is_real() { 200 } else { 5 + i };
    let prompts: Vec<&[u32]> = prompts.iter().enumerate().map(|(i, p)| &p[..p.len().min(length(i))]).collect();
    let fill = |group: &mut Group, slot: u32, prompt: &[u32]| {
        group.run(Command::Open(slot));
        for (i, part) in prompt.chunks(CHUNK).enumerate() {
            let segments = vec![Segment { slot, start: (i * CHUNK) as u32, rows: part.len() as u32 }];
            group.run(Command::Trunk(Step { tokens: part.to_vec(), segments, ..Step::default() }));
        }
    };
    let token = |sequence: usize, step: usize| 2 + ((sequence * 977 + step * 131) % 2000) as u32;
    let mut runs: Vec<Vec<Vec<f32>>> = Vec::new();
    let ways = [(true, true), (false, true), (true, false), (false, false)];
    // The emulator runs kernels one after another.
    for (graphs, overlap) in ways.into_iter().filter(|(_, overlap)| *overlap || is_real()) {
        group.gpu().set_graphs(graphs);
        group.gpu().set_overlap(overlap);
        let mut alone = vec![Vec::new(); prompts.len()];
        for (i, prompt) in prompts.iter().enumerate() {
            fill(&mut group, i as u32, prompt);
            for step in 0..steps {
                let row = (i as u32, (prompt.len() + step) as u32, token(i, step));
                alone[i].extend(group.run(decode(&[row])).data);
            }
        }
        assert_eq!(group.gpu().stats().replayed, graphs);
        let mut together = vec![Vec::new(); prompts.len()];
        for (i, prompt) in prompts.iter().enumerate() {
            fill(&mut group, i as u32, prompt);
        }
        for step in 0..steps {
            let row = |(i, prompt): (usize, &&[u32])| (i as u32, (prompt.len() + step) as u32, token(i, step));
            let rows: Vec<_> = prompts.iter().enumerate().map(row).collect();
            let logits: Mat = group.run(decode(&rows));
            (0..prompts.len()).for_each(|i| together[i].extend(logits.row(i)));
        }
        assert!(alone.iter().flatten().all(|l| l.is_finite()));
        runs.extend([alone, together]);
    }
    for (i, other) in runs.iter().enumerate().skip(1) {
        assert!(*other == runs[0], "run {i} has other bits");
    }
}

/// One prompt, again and again, between others.
#[test]
fn repeats_give_one_answer() {
    if !can_run() || !needs_gpu("1,000 repeats of a prompt") {
        return;
    }
    let art = packed("nano", 1);
    let mut group = Group::on_gpu(art.path(), Numerics::Published, OPTIONS);
    let cases = cases();
    let hot = Sampling { temperature: 1.0, top_p: 1.0, seed: 5, ..Sampling::GREEDY };
    let prompt = &cases[0].prompt_tokens;
    let first = answer(&mut group, prompt, hot, 0, TOKENS_MAX).tokens;
    for i in 0..REPEATS {
        if i % 50 == 0 {
            answer(&mut group, &cases[i / 50 % cases.len()].prompt_tokens, Sampling::GREEDY, 2, TOKENS_MAX);
        }
        assert_eq!(answer(&mut group, prompt, hot, i % 4, TOKENS_MAX).tokens, first, "repeat {i}");
    }
}

/// What computes is decided by what is there and what the artifact has.
#[test]
fn what_computes() {
    let Some(gpu) = device::open() else { return };
    let (with, without) = (packed("tiny", 1), Packed::tiny(1));
    let arch = gpu.gpu.facts().arch();
    let on = |asked: Backend, packed: &Packed, there: bool| {
        let artifact = open(packed.path()).unwrap().artifact;
        let opened = || if there { Ok(gpu.clone()) } else { Err(DeviceError::NoDriver) };
        choose(asked, &artifact, &opened).map(|(compute, _)| matches!(compute, Compute::Gpu(_)))
    };
    assert!(on(Backend::Auto, &with, true).unwrap() && on(Backend::Cuda, &with, true).unwrap());
    assert!(!on(Backend::Auto, &with, false).unwrap() && !on(Backend::Cpu, &with, true).unwrap());
    assert!(!on(Backend::Auto, &without, true).unwrap(), "packed without kernels");
    let text = on(Backend::Cuda, &without, true).unwrap_err().to_string();
    println!("{text}");
    assert!(text.contains("found none") && text.contains(&format!("--arch {arch}")), "{text}");
    assert!(matches!(on(Backend::Cuda, &with, false), Err(e) if e.exit_code() == 4));
}

/// Times of steps over weights from a seed: all numbers are there, and the kernels by name.
#[test]
fn a_bench() {
    let Some(gpu) = device::open() else { return };
    let art = packed("nano", 2);
    let opened = open(art.path()).unwrap();
    let plan = Plan { decode: vec![(0, 1), (300, 2)], prefill: vec![(64, 17)], steps: 1, profile: true };
    let lines = std::cell::RefCell::new(String::new());
    let say = |text: &str| lines.borrow_mut().push_str(text);
    let of = |weights, plan: &Plan| {
        measure(&opened, &gpu, 1, Numerics::Published, weights, plan, &Bar::new(true), &say).unwrap()
    };
    let out = of(Weights::Seed(3), &plan);
    println!("{}", lines.borrow());
    assert_eq!((&out["tp"], &out["rank"], &out["solo"]), (&2.into(), &1.into(), &true.into()));
    assert_eq!(out["weights_bytes"], opened.artifact.arena_bytes(1).unwrap());
    // Only sm_121a has block-scaled kernels to check.
    let has_some = gpu.gpu.facts().arch() == ARCH;
    let checks = out["block_scaled"]["checks"].as_array().unwrap();
    assert_eq!((&out["block_scaled"]["used"], checks.len()), (&has_some.into(), if has_some { 2 } else { 0 }));
    assert_eq!(lines.borrow().contains("block-scaled"), has_some);
    assert!(out["method"].as_str().unwrap().contains("made up"));
    assert!(out["copy_bytes_per_second"].as_f64().unwrap() > 1e6);
    let cells: Vec<&Value> = ["decode", "prefill"].iter().flat_map(|of| out[of].as_array().unwrap()).collect();
    let places: Vec<_> = cells.iter().map(|c| (c["context"].as_u64().unwrap(), c["rows"].as_u64().unwrap())).collect();
    assert_eq!(places, [(0, 1), (300, 2), (64, 17)]);
    for cell in &cells {
        for time in ["step_seconds", "gpu_seconds", "floor_seconds", "ratio", "tokens_per_second"] {
            assert!(cell[time].as_f64().is_some_and(|t| t > 0.0 && t.is_finite()), "{time} of {cell}");
        }
        let decode = cell["rows"].as_u64().unwrap() <= 16;
        assert_eq!(cell["recorded"], decode, "{cell}");
        let of = |time: &str| cell[time].as_f64().unwrap();
        assert_eq!(of("gap_seconds"), of("gpu_seconds") - of("kernel_seconds"), "{cell}");
        let kernels = cell["kernels"].as_array().unwrap();
        let count: u64 = kernels.iter().map(|k| k["count"].as_u64().unwrap()).sum();
        assert_eq!(cell["launches"], count, "every launch has a name: {cell}");
        let attends = |k: &Value| k["name"].as_str().is_some_and(|name| name.starts_with("attend"));
        assert!(kernels.iter().any(attends), "{cell}");
        let sum = cell["weights_bytes"].as_u64().unwrap() + cell["caches_bytes"].as_u64().unwrap();
        assert_eq!(cell["bytes"], sum);
    }
    // Entries of 300 positions are read, before the first none.
    assert!(cells[1]["caches_bytes"].as_u64() > Some(0) && cells[0]["caches_bytes"] == 0);
    // The artifact's own weights lead through the same steps.
    let few = Plan { decode: vec![(0, 1)], prefill: vec![], ..plan.clone() };
    assert_eq!(of(Weights::File { reserve: None }, &few)["decode"][0]["launches"], cells[0]["launches"]);
}

/// A whole ELF file with nothing in it.
fn empty_elf() -> Vec<u8> {
    let mut file = b"\x7fELF\x02\x01".to_vec();
    file.resize(64, 0);
    file
}

/// An artifact with kernels that nobody can run, but by name those of this program.
fn nameless(arch: &str, tuning: Option<&str>, keep: impl Fn(&KernelInput) -> bool) -> Packed {
    let config =
        ModelConfig::parse(&std::fs::read_to_string(Path::new(DATA).join("nano/config.json")).unwrap()).unwrap();
    let table = Tuning::for_arch(arch);
    let mut kernels: Vec<KernelInput> = Vec::new();
    for unit in Kernels::units(&config, Tp::new(0, 2).unwrap(), Numerics::Published, &table) {
        let key = dsv4_format::Digest(unit.key(arch));
        if kernels.iter().all(|k| k.key != key) {
            kernels.push(KernelInput { family: unit.family.into(), key, cubin: empty_elf() });
        }
    }
    kernels.retain(keep);
    let text = table.text();
    Packed::nano(2).with_kernels(arch, &kernels, Some(tuning.unwrap_or(&text)))
}

const GENERATE: [&str; 6] = ["generate", "--prompt", "Hi", "--max-tokens", "3", "--json"];

fn with_backend<'a>(backend: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&GENERATE[..], &["--backend", backend], more].concat()
}

/// What passes between program and driver, up to logits that are all zero: two processes, each with its own.
#[test]
fn a_driver_without_a_gpu_is_led_through_everything() {
    let art = nameless("sm_121a", None, |_| true);
    for says in [Says::default(), Says { unified: true, ..Says::default() }] {
        let Some(driver) = Driver::new(says) else { return };
        for backend in ["cuda", "auto"] {
            let ran = driver.run(art.path(), with_backend(backend, &["--draft", "1"]));
            let out: Value = serde_json::from_str(ran.ok()).unwrap();
            assert_eq!(out["completion_tokens"], Value::from(vec![0, 0, 0]), "{ran:?}");
            let found = &out["backend"];
            assert_eq!((&found["name"], &found["gpu"]), (&"cuda".into(), &"NVIDIA Nothing".into()));
            assert_eq!((&found["arch"], &found["ordinal"]), (&"sm_121a".into(), &0.into()));
            let id = open(art.path()).unwrap().artifact.manifest().kernel_set_id.to_string();
            assert_eq!(found["kernel_set_id"], id);
            for word in ["rank 0: on NVIDIA Nothing (GPU 0)", "for sm_121a", &id, "GB/s"] {
                assert!(ran.err.contains(word), "no {word:?} in {}", ran.err);
            }
        }
        // Through pinned slots.
        let ran = driver.run(art.path(), ["load", "--rank", "1", "--backend", "cuda", "--json"]);
        let out: Value = serde_json::from_str(ran.ok()).unwrap();
        assert_eq!((&out["backend"], &out["staged"]), (&"cuda".into(), &true.into()));
        let ran = driver.run(art.path(), ["check", "--backend", "cuda", "--json"]);
        let out: Value = serde_json::from_str(&ran.out).unwrap();
        let findings = out["findings"].as_array().unwrap();
        let kernels = findings.iter().find(|f| f["id"] == "gpu.kernels").unwrap_or_else(|| panic!("{out}"));
        assert!(kernels["level"] == "ok" && kernels["found"].as_str().unwrap().contains("sm_121a"), "{kernels}");
        let whose = out["memory"]["usable_basis"].as_str().unwrap();
        assert_eq!(whose.contains("driver calls free"), !says.unified, "{whose}");
    }
}

/// Every way in which there is no GPU to compute on, and what it says.
#[test]
fn no_gpu_to_compute_on() {
    let art = nameless("sm_121a", None, |_| true);
    let refused = |driver: &Driver, code: i32, words: &[&str]| {
        driver.run(art.path(), with_backend("cuda", &[])).fails(code, words);
    };
    if !is_real() {
        refused(&Driver::none(), DEVICE, &["libcuda.so.1", "install the NVIDIA driver", "--backend cpu"]);
    }
    let Some(old) = Driver::new(Says { version: 12_080, ..Says::default() }) else { return };
    refused(&old, DEVICE, &["CUDA 13.0", "CUDA 12.8", "driver 580 or newer"]);
    let with = |says: Says| Driver::new(says).expect("as before");
    refused(&with(Says { init: 100, ..Says::default() }), DEVICE, &["GPU 0", "none that the driver sees"]);
    refused(&with(Says { init: 34, ..Says::default() }), DEVICE, &["stub", "library path"]);
    refused(&with(Says { count: 0, ..Says::default() }), DEVICE, &["GPU 0", "found 0 GPUs", "CUDA_VISIBLE_DEVICES"]);
    // Left the choice, the CPU computes, and says why it has to.
    let ran = old.run(art.path(), with_backend("auto", &[]));
    let out: Value = serde_json::from_str(ran.ok()).unwrap();
    assert_eq!(out["backend"]["name"], "cpu");
    assert!(ran.err.contains("computing on the CPU: CUDA driver: expected one for CUDA 13.0"), "{}", ran.err);
    // `check` says the same among everything else.
    let ran = old.run(art.path(), ["check", "--backend", "cuda", "--json"]);
    assert_eq!(ran.code, Some(DEVICE), "{ran:?}");
    ran.says(&["gpu.device", "driver 580 or newer"]);
}

#[test]
fn kernels_that_are_not_for_this_gpu() {
    let Some(driver) = Driver::new(Says { capability: (8, 9), ..Says::default() }) else { return };
    let art = nameless("sm_121a", None, |_| true);
    let words = ["NVIDIA Nothing (sm_89)", "found those for sm_121a", "dsv4c kernels", "--arch sm_89", "--backend cpu"];
    for backend in ["cuda", "auto"] {
        driver.run(art.path(), with_backend(backend, &[])).fails(INPUT, &words);
    }
    driver.run(Packed::nano(2).path(), with_backend("cuda", &[])).fails(INPUT, &["found none", "--arch sm_89"]);
    let gb10 = Driver::new(Says::default()).expect("as before");
    let art = nameless("sm_121a", None, |k| k.family != "router");
    let words = ["kernel router (published numerics) for sm_121a", "1 of ", "another version", "dsv4c kernels"];
    gb10.run(art.path(), with_backend("cuda", &[])).fails(INPUT, &words);
    let ran = gb10.run(art.path(), ["check", "--backend", "cuda", "--json"]);
    assert_eq!(ran.code, Some(INPUT), "{ran:?}");
    ran.says(&["gpu.kernels", "dsv4c kernels"]);
    let float = nameless("sm_121a", None, |_| true);
    gb10.run(float.path(), with_backend("cuda", &["--numerics", "float"])).fails(INPUT, &["(float numerics)"]);
    // By name they are all there, and the driver finds nothing in them.
    let hollow = Driver::new(Says { kernels: false, ..Says::default() }).expect("as before");
    let bench = ["bench", "--solo", "--context", "0", "--rows", "1", "--chunk", "0"];
    hollow.run(float.path(), bench).fails(INPUT, &["not in its image", "dsv4c kernels"]);
    for (text, words) in [("arch = 3", "tuning table"), (&Tuning::for_arch("sm_90a").text(), "one for sm_90a")] {
        let art = nameless("sm_121a", Some(text), |_| true);
        gb10.run(art.path(), with_backend("cuda", &[])).fails(INPUT, &[words, "dsv4c kernels"]);
    }
}

#[test]
fn too_little_memory_on_the_card() {
    let art = nameless("sm_121a", None, |_| true);
    let Some(driver) = Driver::new(Says { free: 64 << 20, ..Says::default() }) else { return };
    let words = ["not enough memory", "KV caches", "MISSING", "the GPU's driver calls free", "80.00 GiB"];
    driver.run(art.path(), with_backend("cuda", &[])).fails(DEVICE, &words);
    driver.run(art.path(), ["load", "--backend", "cuda", "--rank", "1"]).fails(DEVICE, &["not enough memory"]);
    // A rank that the artifact does not have is that, whatever memory there is.
    driver.run(art.path(), ["load", "--backend", "cuda", "--rank", "99"]).fails(INPUT, &["rank 99", "less than 2"]);
    // Two cards have a rank each.
    let two = |free| Driver::new(Says { free, count: 2, ..Says::default() }).expect("as before");
    let one = Driver::new(Says { free: 330 << 20, ..Says::default() }).expect("as before");
    one.run(art.path(), with_backend("cuda", &[])).fails(DEVICE, &["not enough memory", "rank 1"]);
    two(330 << 20).run(art.path(), with_backend("cuda", &[])).ok();
    // Float numerics are planned as what they are.
    let check = |numerics: &str| {
        let args =
            ["check", "--backend", "cuda", "--rank", "0", "--peers", "a:1,b:1", "--json", "--numerics", numerics];
        let out: Value = serde_json::from_str(&driver.run(art.path(), args).out).unwrap();
        assert_eq!(out["memory"]["numerics"], numerics);
        let line = out["memory"]["ranks"][0]["lines"][1].clone();
        assert_eq!((&line["what"], &line["basis"]), (&"KV caches".into(), &"exact".into()));
        line["bytes"].as_u64().unwrap()
    };
    let context = 8192;
    let act = |act_bytes| StateSize { slots: 1, context, act_bytes }.bytes(&open(art.path()).unwrap().config);
    assert_eq!((check("published"), check("float")), (act(2), act(4)));
}

#[test]
fn a_bench_that_cannot_be() {
    let art = nameless("sm_121a", None, |_| true);
    let Some(driver) = Driver::new(Says::default()) else { return };
    driver.run(art.path(), ["bench"]).fails(USAGE, &["2 ranks", "--solo"]);
    driver.run(art.path(), ["bench", "--solo", "--rank", "2"]).fails(USAGE, &["--rank 2"]);
    driver.run(art.path(), ["bench", "--solo"]).fails(USAGE, &["at most the model's 8192"]);
    let small = ["bench", "--solo", "--context", "0,16", "--rows", "1,2", "--chunk", "0", "--steps", "2", "--profile"];
    let ran = driver.run(art.path(), small);
    let out: Value = serde_json::from_str(ran.ok()).unwrap();
    assert_eq!(out["decode"].as_array().map(Vec::len), Some(4));
    assert_eq!((&out["prefill"], &out["weights"]), (&Value::Array(vec![]), &"the artifact's".into()));
    let tight = Driver::new(Says { free: 64 << 20, ..Says::default() }).expect("as before");
    tight.run(art.path(), small).fails(DEVICE, &["not enough memory", "--rows 0"]);
    // Made-up weights need no rank files.
    std::fs::remove_file(art.path().join("rank0.weights")).unwrap();
    driver.run(art.path(), small).fails(INPUT, &["rank0.weights", "missing"]);
    let ran = driver.run(art.path(), [&small[..], &["--weights-seed", "7"]].concat());
    let out: Value = serde_json::from_str(ran.ok()).unwrap();
    assert_eq!(out["weights"], "from seed 7");
    Driver::new(Says { version: 12_080, ..Says::default() })
        .expect("as before")
        .run(art.path(), [&small[..], &["--weights-seed", "7"]].concat())
        .fails(DEVICE, &["driver 580"]);
}

/// The program itself, with kernels out of the artifact: conversations, logits, loading, a bench.
#[test]
fn the_program_on_a_gpu() {
    if !needs_gpu("dsv4-run --backend cuda") {
        return;
    }
    for tp in [1, 2] {
        let art = packed("nano", tp);
        let path = art.path().to_str().unwrap();
        for (case, draft) in cases().iter().step_by(4).flat_map(|case| [(case, "0"), (case, "2")]) {
            let file = art.scratch().join("messages.json");
            std::fs::write(&file, case.input.to_string()).unwrap();
            let mut args = vec![path, "generate", "--messages", file.to_str().unwrap(), "--json", "--quiet"];
            args.extend(["--draft", draft, "--backend", "cuda"]);
            args.extend(case.thinking.then_some("--thinking"));
            let out: Value = serde_json::from_str(run(DSV4_RUN, &args).ok()).unwrap();
            assert_eq!(out["completion_tokens"], Value::from(case.completion_tokens.clone()), "{}", case.kind);
            assert_eq!(out["backend"]["name"], "cuda");
        }
        let report: Value =
            serde_json::from_str(run(DSV4_RUN, [path, "load", "--backend", "cuda", "--json"]).ok()).unwrap();
        println!("{report}");
        assert_eq!((&report["staged"], &report["retries"]), (&true.into(), &0.into()));
        let bench = [path, "bench", "--solo", "--context", "0,1024", "--chunk", "256", "--depth", "0", "--profile"];
        let ran = run(DSV4_RUN, bench);
        let out: Value = serde_json::from_str(ran.ok()).unwrap();
        println!("{}", ran.err);
        for cell in out["decode"].as_array().unwrap() {
            let of = |name: &str| cell[name].as_f64().unwrap();
            assert!(of("kernel_seconds") > 0.0 && of("kernel_seconds") < 3.0 * of("gpu_seconds"), "{cell}");
            assert!(of("gpu_seconds") <= of("step_seconds"), "{cell}");
        }
    }
    let art = packed("tiny", 2);
    let (tokens, out) = (art.scratch().join("tokens.json"), art.scratch().join("out.safetensors"));
    std::fs::write(&tokens, format!("{:?}", golden::prompt("mid"))).unwrap();
    let paths = [art.path(), &tokens, &out].map(|p| p.to_str().unwrap());
    let args = [paths[0], "logits", "--tokens", paths[1], "-o", paths[2], "--numerics", "float", "--mtp"];
    run(DSV4_RUN, [&args[..], &["--backend", "cuda"]].concat()).ok();
    let (found, expected) = (golden::read(&out), golden::tensors("logits_float.safetensors"));
    let d = distance(&found["logits"].data, &expected["mid"].data);
    println!("float logits: max |d| {:.1e}", d.max);
    assert!(d.max < 1e-3);
}
