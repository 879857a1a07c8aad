//! The numbers: what an independent reference computed from the tiny checkpoint, and what ranks owe
//! each other.
//!
//! Every test prints what it measured, bound or not.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex};

use dsv4_kernels::collective::Alone;
use dsv4_kernels::numerics::Numerics;
use dsv4_kernels::ops::Mat;
use dsv4_kernels::reference::{Reference, Streams};
use dsv4_kernels::state::{Compressed, Ring};
use dsv4_kernels::weights::{Arena, Weights, WeightsError};
use dsv4_model::forward::layer;
use dsv4_model::ops::{Backend, Segment, Step};
use dsv4_model::tensors::table;
use dsv4_model::trace::Trace;
use dsv4_model::{Model, TensorId, Tp};
use dsv4_run::step::Command;
use dsv4_tests::artifacts::{Packed, Unwatched, synthetic};
use dsv4_tests::golden::{self, Distance, Tensor, distance, kl};
use dsv4_tests::group::Group;
use dsv4c::pack::{PackOptions, pack};

/// Largest difference of float logits: from the reference, and between numbers of ranks.
const LOGITS_MAX: f64 = 1e-3;
/// Mean difference that FP8 rounding makes of other roundings, in one layer (the goldens' README).
const LAYER_MEAN: f64 = 0.02;
/// Divergence of the published numerics over a whole model, nats, mean over rows.
const KL_MEAN: f64 = 0.03;

/// Bounds of intermediate results by name: the largest difference in float numerics, and in published
/// ones, from equal inputs of a layer, the mean difference as a part of the mean magnitude.
///
/// The backend sums the experts before it rounds, the published code rounds each of them: `ffn_out` and
/// `h_out` differ by that.
const TRACE: &[(&str, f64, f64)] = &[
    ("attn_in", 1e-4, 1e-3),
    ("attn_post", 1e-5, 1e-3),
    ("attn_comb", 1e-5, 1e-3),
    ("q", 1e-4, 1e-3),
    ("kv", 1e-4, 1e-3),
    ("attn_heads", 1e-4, 1e-3),
    ("attn_out", 1e-4, 1e-3),
    ("h_mid", 1e-4, 1e-3),
    ("ffn_in", 1e-4, 1e-3),
    ("ffn_out", 1e-4, 4e-3),
    ("h_out", 1e-4, 2e-3),
    ("compressed_new", 1e-4, 1e-3),
    ("indexer_new", 1e-4, 1e-3),
    ("index_scores", 1e-3, 1e-3),
    ("index_keep", 0.0, 0.0),
    ("route_experts", 0.0, 0.0),
    ("route_weights", 1e-5, 1e-3),
];

fn mid_step(rows: usize) -> Step {
    Step {
        tokens: golden::prompt("mid")[..rows].to_vec(),
        segments: vec![Segment { slot: 0, start: 0, rows: rows as u32 }],
        logits: vec![],
        source: vec![],
    }
}

/// Rows of `found` at the places that `rows` lists, as one list.
fn pick(found: &Mat, rows: impl IntoIterator<Item = usize>) -> Vec<f32> {
    rows.into_iter().flat_map(|r| found.row(r).to_vec()).collect()
}

fn within(what: &str, found: Distance, max: f64) {
    println!("{what}: max |d| {:.2e}, mean {:.2e}", found.max, found.mean);
    assert!(found.max <= max, "{what}: max |d| {} exceeds {max}", found.max);
}

/// Float logits of all prompts and of the draft block, for every way to cut the prompt into steps, which
/// must not change a bit.
fn float_logits(tp: u32) {
    let packed = Packed::tiny(tp);
    let golden = golden::tensors("logits_float.safetensors");
    let long_rows: Vec<usize> = golden["long_rows"].data.iter().map(|r| *r as usize).collect();
    let mut group = Group::start(packed.path(), Numerics::Float, 388);
    for name in ["long", "mid", "short"] {
        let tokens = golden::prompt(name);
        let whole = group.logits(&tokens, tokens.len(), true);
        assert_eq!((whole.0.rows, whole.1.rows), (tokens.len(), tokens.len() - 1));
        let rows: Vec<usize> = if name == "long" { long_rows.clone() } else { (0..tokens.len()).collect() };
        within(&format!("tp {tp}, {name}"), distance(&pick(&whole.0, rows), &golden[name].data), LOGITS_MAX);
        if name == "mid" {
            let last = &pick(&whole.1, whole.1.rows - 24..whole.1.rows);
            within(&format!("tp {tp}, mtp_mid"), distance(last, &golden["mtp_mid"].data), LOGITS_MAX);
        }
        for chunk in [1, 7, 64, 129] {
            assert!(group.logits(&tokens, chunk, true) == whole, "tp {tp}, {name}: steps of {chunk} rows differ");
        }
        if name == "long" {
            let parts = [7, 50, 64, 3, 1, 130, 133];
            assert!(group.logits_in_parts(&tokens, &parts) == whole.0, "tp {tp}, {name}: steps of {parts:?} differ");
        }
    }
    group.finish();
}

#[test]
fn float_logits_of_one_rank() {
    float_logits(1);
}

#[test]
fn float_logits_of_two_ranks() {
    float_logits(2);
}

/// Chunks change nothing in the published numerics either.
#[test]
fn published_logits_do_not_depend_on_steps() {
    for tp in [1, 2] {
        let packed = Packed::tiny(tp);
        let tokens = golden::prompt("mid");
        let mut group = Group::start(packed.path(), Numerics::Published, tokens.len());
        let whole = group.logits(&tokens, tokens.len(), true);
        for chunk in [1, 7, 64, 129] {
            assert!(group.logits(&tokens, chunk, true) == whole, "tp {tp}: steps of {chunk} rows differ");
        }
        group.finish();
    }
}

type Taps = BTreeMap<String, Mat>;

/// Makes the backend show its intermediate results.
fn tap(reference: &mut Reference) -> Arc<Mutex<Taps>> {
    let seen = Arc::new(Mutex::new(Taps::new()));
    let into = Arc::clone(&seen);
    reference.set_tap(Some(Box::new(move |name, cols, values| {
        let mat = Mat { rows: values.len() / cols.max(1), cols, data: values.to_vec() };
        assert!(into.lock().unwrap().insert(name.to_owned(), mat).is_none(), "{name} twice");
    })));
    seen
}

/// How far one kind of intermediate result is from the goldens, in the layer where it is farthest.
#[derive(Clone, Copy, Debug, Default)]
struct Worst {
    /// Largest difference.
    max: f64,
    /// Mean difference as a part of the mean magnitude.
    relative: f64,
}

/// Compares every tensor of a trace file with what was seen over prompt mid: the worst of each kind.
fn compare_trace(file: &str, seen: &Taps) -> BTreeMap<&'static str, Worst> {
    let golden = golden::tensors(file);
    let rows: Vec<usize> = golden["pick"].data.iter().map(|r| *r as usize).collect();
    let mut worst: BTreeMap<&str, Worst> = BTreeMap::new();
    for (name, expected) in golden.iter().filter(|(name, _)| *name != "pick") {
        let kind = name.splitn(3, '.').nth(2).expect("layers.N.KIND");
        let (kind, ..) = TRACE.iter().find(|t| t.0 == kind).unwrap_or_else(|| panic!("no tolerance for {name}"));
        let found = seen.get(name).unwrap_or_else(|| panic!("the backend does not show {name}"));
        // All entries of the prompt, or the rows that are listed.
        let whole = matches!(*kind, "compressed_new" | "indexer_new");
        let values = if whole { found.data.clone() } else { pick(found, rows.iter().copied()) };
        let d = distance(&values, &expected.data);
        let size: f64 = expected.data.iter().filter(|v| v.is_finite()).map(|v| f64::from(v.abs())).sum();
        let relative = d.mean * expected.data.len() as f64 / size;
        let worst = worst.entry(kind).or_default();
        *worst = Worst { max: worst.max.max(d.max), relative: worst.relative.max(relative) };
    }
    for (name, Worst { max, relative }) in &worst {
        println!("{file} {name}: max |d| {max:.2e}, relative mean {relative:.2e}");
    }
    worst
}

#[test]
fn float_traces() {
    let packed = Packed::tiny(1);
    let mut group = Group::start(packed.path(), Numerics::Float, 140);
    let seen = tap(group.reference());
    group.engine.run(Command::Open(0)).unwrap();
    group.engine.run(Command::Trunk(mid_step(140))).unwrap();
    group.finish();
    let worst = compare_trace("trace_float.safetensors", &seen.lock().unwrap());
    assert_eq!(worst.len(), TRACE.len(), "every name of the table occurs");
    for (name, max, _) in TRACE {
        assert!(worst[name].max <= *max, "{name}: max |d| {} exceeds {max}", worst[name].max);
    }
}

/// Each layer alone, from the exact input that the reference had: its output and what is between.
#[test]
fn published_layer_by_layer() {
    let golden = golden::tensors("layer_io_serve.safetensors");
    let packed = Packed::tiny(1);
    let mut group = Group::start(packed.path(), Numerics::Published, 140);
    let reference = group.reference();
    let seen = tap(reference);
    let model = Model::new(reference.config());
    let streams = |t: &Tensor| Mat { rows: t.shape[0], cols: t.cols(), data: t.data.clone() };
    reference.open(0).unwrap();
    reference.begin(mid_step(140), None).unwrap();
    for (i, spec) in model.layers().iter().enumerate() {
        let last = i + 1 == model.layers().len();
        let next = if last { format!("layers.{i}.out") } else { format!("layers.{}.in", i + 1) };
        let mut h = Streams(streams(&golden[&format!("layers.{i}.in")]));
        let done = layer(reference, spec, &mut h, None).unwrap();
        reference.hc_finish(&mut h, done).unwrap();
        let (found, expected) = (&h.0.data, &golden[&next].data);
        let d = distance(found, expected);
        let count = found.len() as f64;
        let size = expected.iter().map(|v| f64::from(v.abs())).sum::<f64>() / count;
        let equal = 100.0 * found.iter().zip(expected).filter(|(a, b)| a == b).count() as f64 / count;
        println!("layer {i}: mean |d| {:.2e} of mean |h| {size:.2}, max {:.2e}, {equal:.1} % equal", d.mean, d.max);
        assert!(d.mean < LAYER_MEAN, "layer {i}: mean |d| {} exceeds {LAYER_MEAN}", d.mean);
    }
    group.finish();
    for (name, w) in compare_trace("trace_serve.safetensors", &seen.lock().unwrap()) {
        let (_, _, bound) = TRACE.iter().find(|t| t.0 == name).expect("compared by the table");
        assert!(w.relative <= *bound, "{name}: relative mean |d| {} exceeds {bound}", w.relative);
    }
}

/// Columns `at..at + width` of the rows of `positions`.
fn rows_of(ring: &Ring, positions: std::ops::Range<usize>, at: usize, width: usize) -> Vec<f32> {
    positions.flat_map(|p| ring.row(p)[at..at + width].to_vec()).collect()
}

/// What a sequence keeps after the 9 tokens of prompt short.
#[test]
fn decode_state() {
    let golden = golden::tensors("state_float.safetensors");
    let packed = Packed::tiny(1);
    for chunk in [9, 2, 1] {
        let mut group = Group::start(packed.path(), Numerics::Float, 9);
        let tokens = golden::prompt("short");
        group.engine.run(Command::Open(0)).unwrap();
        for (i, part) in tokens.chunks(chunk).enumerate() {
            let segments = vec![Segment { slot: 0, start: (i * chunk) as u32, rows: part.len() as u32 }];
            let step = Step { tokens: part.to_vec(), segments, logits: vec![], source: vec![] };
            group.engine.run(Command::Trunk(step)).unwrap();
        }
        let ratios = group.reference().config().compress_ratios.clone();
        let state = group.reference().sequence(0).expect("open");
        let mut compared = BTreeSet::new();
        let mut same = |name: String, found: &[f32]| {
            let expected = golden.get(&name).unwrap_or_else(|| panic!("no golden {name}"));
            let d = distance(found, &expected.data);
            assert!(d.max <= 1e-4, "steps of {chunk}, {name}: max |d| {}", d.max);
            compared.insert(name);
            d.max
        };
        let mut worst: f64 = 0.0;
        for (i, layer) in state.layers.iter().enumerate() {
            let width = golden["layers.0.window"].cols();
            worst = worst.max(same(format!("layers.{i}.window"), &rows_of(&layer.window, 0..9, 0, width)));
            let ratio = ratios[i] as usize;
            let caches = [("compressor", &layer.compressed), ("indexer", &layer.index)];
            for (name, cache) in caches.into_iter().filter_map(|(name, cache)| Some((name, cache.as_ref()?))) {
                let Compressed { values, gates, entries, width } = cache;
                let prefix = format!("layers.{i}.{name}");
                // Tokens behind the last closed window; with ratio 4 also half of those in it.
                let open = 9 / ratio * ratio..9;
                let both = if ratio == 4 { 2 * width } else { *width };
                worst = worst.max(same(format!("{prefix}.entries"), entries));
                worst = worst.max(same(format!("{prefix}.open_kv"), &rows_of(values, open.clone(), 0, both)));
                worst = worst.max(same(format!("{prefix}.open_gate"), &rows_of(gates, open.clone(), 0, both)));
                if ratio == 4 {
                    let previous = open.start - ratio..open.start;
                    worst = worst.max(same(format!("{prefix}.prev_kv"), &rows_of(values, previous.clone(), 0, *width)));
                    worst = worst.max(same(format!("{prefix}.prev_gate"), &rows_of(gates, previous, 0, *width)));
                }
            }
        }
        assert_eq!(compared.len(), golden.len(), "every tensor of the file is compared");
        println!("state, steps of {chunk}: max |d| {worst:.2e}");
        group.finish();
    }
}

/// Divergence of the published numerics, end to end, from the float and the served reference.
#[test]
fn published_end_to_end() {
    let tokens = golden::prompt("mid");
    let float = &golden::tensors("logits_float.safetensors")["mid"];
    let served = &golden::tensors("logits_serve.safetensors")["mid"];
    let mut alone: Option<Mat> = None;
    for tp in [1, 2] {
        let packed = Packed::tiny(tp);
        let mut group = Group::start(packed.path(), Numerics::Published, 64);
        let (ours, _) = group.logits(&tokens, 64, false);
        group.finish();
        let d = distance(&ours.data, &alone.get_or_insert_with(|| ours.clone()).data);
        println!("tp {tp} against 1, published: mean |d| {:.2e}, max {:.2e}", d.mean, d.max);
        for (name, golden) in [("float", float), ("served", served)] {
            let rows: Vec<f64> = (0..ours.rows).map(|r| kl(ours.row(r), golden.row(r))).collect();
            let mean = rows.iter().sum::<f64>() / rows.len() as f64;
            let largest = rows.iter().copied().fold(0.0, f64::max);
            let d = distance(&ours.data, &golden.data);
            println!("tp {tp}, published against {name}: KL mean {mean:.4}, max {largest:.4}; mean |d| {:.3}", d.mean);
            assert!(mean < KL_MEAN, "tp {tp}, {name}: KL {mean} exceeds {KL_MEAN}");
        }
    }
}

/// A model whose cuts fall on scale tiles for up to eight ranks.
#[test]
fn eight_ranks_compute_what_one_does() {
    let temp = tempfile::tempdir().unwrap();
    let checkpoint = temp.path().join("checkpoint");
    synthetic(&golden::path("tp8_config.json"), &checkpoint, 5);
    let tokens: Vec<u32> = (0..150u32).map(|i| 2 + (i * i * 7 + i * 13) % 509).collect();
    let mut alone: Option<(Mat, Mat)> = None;
    for tp in [1, 2, 4, 8] {
        let packed = Packed::of(&checkpoint, tp);
        let mut group = Group::start(packed.path(), Numerics::Float, 64);
        let found = group.logits(&tokens, 64, true);
        group.finish();
        assert!(found.0.data.iter().chain(&found.1.data).all(|v| v.is_finite()));
        let Some(alone) = &alone else {
            let spread = distance(&found.0.data, &vec![0.0; found.0.data.len()]);
            println!("tp 1: mean |logit| {:.2}", spread.mean);
            alone = Some(found);
            continue;
        };
        within(&format!("tp {tp} against 1"), distance(&found.0.data, &alone.0.data), LOGITS_MAX);
        within(&format!("tp {tp} against 1, draft"), distance(&found.1.data, &alone.1.data), LOGITS_MAX);
    }
}

/// A cut through a scale tile is refused, naming the tensor, before anything is written.
#[test]
fn a_cut_through_a_tile_is_refused() {
    let temp = tempfile::tempdir().unwrap();
    let tiny = Path::new(dsv4_tests::DATA).join("tiny");
    for tp in [4, 8] {
        let out = temp.path().join("cut.dsv4");
        let options = PackOptions { out: Some(out), ..PackOptions::new(&tiny, tp) };
        let error = pack(&options, &Unwatched).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("layers.0.attn.") && text.contains("--tp 1, 2"), "{text}");
        assert_eq!(error.exit_code(), 3, "{text}");
    }
    assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 0);
}

/// A loaded rank's bytes with zeros behind them, aligned as the rank's arena is.
struct WithZeros {
    bytes: Vec<u8>,
    start: usize,
}

impl WithZeros {
    fn new(arena: &[u8], zeros: usize) -> WithZeros {
        const ALIGN: usize = 4096;
        let mut bytes = vec![0; arena.len() + zeros + ALIGN];
        let start = bytes.as_ptr().align_offset(ALIGN);
        bytes[start..start + arena.len()].copy_from_slice(arena);
        WithZeros { bytes, start }
    }
}

impl AsRef<[u8]> for WithZeros {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[self.start..]
    }
}

/// The tensors that the backend reads are those that the trace of the forward pass lists: put zeros in
/// the place of any one, and some logits change.
#[test]
fn every_tensor_of_the_trace_matters() {
    let packed = Packed::tiny(1);
    let opened = dsv4_run::load::open(packed.path()).unwrap();
    let config = &opened.config;
    let loaded = opened.artifact.load_rank(0, 2, &Unwatched).unwrap();
    let layout = opened.artifact.layout(0).unwrap();
    let place = |name: &str| {
        let place = layout.tensor(name)?;
        Some(place.arena_offset as usize..(place.arena_offset + place.len) as usize)
    };
    let rows = table(config);
    let longest = rows.iter().map(|row| row.artifact_bytes(Tp::ONE).unwrap() as usize).max().unwrap();
    let arena: Arena = Arc::new(WithZeros::new(&loaded, longest));
    let logits = |zeroed: Option<&str>, tokens: &[u32]| -> Option<(Mat, Mat)> {
        let weights = Weights::new(config, Tp::ONE, Arc::clone(&arena), |name| match place(name) {
            Some(range) if zeroed == Some(name) => Some(loaded.len()..loaded.len() + range.len()),
            range => range,
        });
        let weights = match weights {
            // A table of experts that is all zeros is refused: it was read.
            Err(WeightsError::Experts { .. }) => return None,
            weights => weights.unwrap(),
        };
        let alone = Box::new(Alone);
        let backend = Reference::new(config.clone(), Tp::ONE, Numerics::Float, weights, alone, 1, tokens.len());
        Some(Group::alone(backend).logits(tokens, tokens.len(), true))
    };
    // Long compression windows close, and the index selects, only in the longer one.
    let prompts = ["short", "mid"].map(golden::prompt);
    let whole = prompts.each_ref().map(|tokens| logits(None, tokens));
    let changes = |name: &str| prompts.iter().zip(&whole).any(|(tokens, whole)| logits(Some(name), tokens) != *whole);
    let matter: BTreeSet<TensorId> = rows.iter().filter(|row| changes(&row.name)).map(|row| row.id).collect();
    let traced: BTreeSet<TensorId> = Trace::run(config).into_iter().flat_map(|call| call.tensors).collect();
    println!("{} tensors", traced.len());
    assert_eq!(matter.symmetric_difference(&traced).collect::<Vec<_>>(), Vec::<&TensorId>::new());
}
