//! Kernels compiled before anything runs: into an artifact as it is packed, into one that is there, and into one
//! without weights.

use std::collections::BTreeMap;
use std::fs;
use std::num::NonZeroUsize;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dsv4_format::{Artifact, CommitInput, Digest, Draft, Outcome, Progress, SourceId};
use dsv4_kernels::gpu::kernels::Kernels;
use dsv4_kernels::numerics::Numerics;
use dsv4_kernels::tuning::Tuning;
use dsv4_model::{ModelConfig, Tp};
use dsv4_tests::artifacts::Unwatched;
use dsv4_tests::binaries::{DSV4_RUN, DSV4C, run, start};
use dsv4_tests::skip;
use dsv4c::kernels::add::{AddOptions, add};
use dsv4c::kernels::find;
use dsv4c::pack::{PackOptions, WeightlessOptions, pack, pack_weightless};
use serde_json::{Value, json};
use tempfile::TempDir;

const NANO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/nano");
const USAGE: i32 = 2;
const INPUT: i32 = 3;
const ARCHES: [&str; 2] = ["sm_121a", "sm_90a"];

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Whether the compiler of kernels is here.
fn can_compile() -> bool {
    find(None).map_err(|e| skip(&e.to_string())).is_ok()
}

fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|file| (file.file_name().unwrap().to_str().unwrap().to_owned(), fs::read(file).unwrap())).collect()
}

fn inspect(artifact: &Path) -> Value {
    serde_json::from_str(run(DSV4C, ["inspect", text(artifact), "--json"]).ok()).unwrap()
}

#[test]
fn packed_at_once_or_compiled_later_it_is_the_same_artifact() {
    if !can_compile() {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let (at_once, later) = (temp.path().join("at_once.dsv4"), temp.path().join("later.dsv4"));
    let arches: Vec<String> = ARCHES.map(str::to_owned).to_vec();
    let options = PackOptions { out: Some(at_once.clone()), arches: arches.clone(), ..PackOptions::new(NANO, 2) };
    let packed = pack(&options, &Unwatched).unwrap_or_else(|e| panic!("{e}"));
    println!("nano for {ARCHES:?}: {:.1} s", packed.kernel_seconds);

    let options = PackOptions { out: Some(later.clone()), ..PackOptions::new(NANO, 2) };
    pack(&options, &Unwatched).unwrap_or_else(|e| panic!("{e}"));
    let weights = |rank: u32| fs::metadata(later.join(format!("rank{rank}.weights"))).unwrap();
    let identity = |rank: u32| (weights(rank).ino(), weights(rank).mtime(), weights(rank).mtime_nsec());
    let before = [identity(0), identity(1)];
    let options = AddOptions { arches, jobs: NonZeroUsize::new(3), ..AddOptions::new(&later) };
    let added = add(&options, &Unwatched).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!((added.outcome, added.notes.len()), (Outcome::Replaced, 0));
    assert_eq!([identity(0), identity(1)], before, "rank files are the same files");

    same_kernels(&at_once, &later);
    assert_eq!(added.artifact_id, packed.artifact_id);
    let (mut a, mut b) = (files(&at_once), files(&later));
    assert!(a.remove("RECEIPT.json").is_some() && b.remove("RECEIPT.json").is_some());
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    a.iter().for_each(|(name, bytes)| assert!(*bytes == b[name], "{name} differs"));
    run(DSV4C, ["verify", text(&later)]).ok();
    run(DSV4C, ["diff", text(&at_once), text(&later)]).ok();

    every_unit_is_there(&later);
    let shown = inspect(&later);
    for (file, arch) in shown["kernel_files"].as_array().unwrap().iter().zip(ARCHES) {
        let of_arch = shown["kernels"].as_array().unwrap().iter().filter(|k| k["arch"] == arch);
        assert_eq!((file["arch"].as_str(), file["kernels"].as_u64()), (Some(arch), Some(of_arch.count() as u64)));
        let families = file["families"].as_array().unwrap().iter();
        assert_eq!(families.map(|f| f["bytes"].as_u64().unwrap()).sum::<u64>(), file["bytes"].as_u64().unwrap());
    }
    let people = run(DSV4C, ["inspect", text(&later)]);
    assert!(["sm_90a: ", "sparse_attention", "moe_prefill"].iter().all(|word| people.ok().contains(word)));

    // Another set of kernels is seen before a weight is read, and the way to it named.
    let again = ["pack", NANO, "--tp", "2", "--arch", "none", "-o", text(&later)];
    run(DSV4C, again).fails(INPUT, &["later.dsv4", "expected none", "those for sm_121a, sm_90a", "dsv4c kernels"]);
    assert_eq!(inspect(&later)["artifact_id"], packed.artifact_id.as_str());
}

/// Two artifacts' cubins, one by one, so that one that differs has a name.
fn same_kernels(a: &Path, b: &Path) {
    let (a, b) = (Artifact::open(a).unwrap(), Artifact::open(b).unwrap());
    for (x, y) in a.manifest().kernels.iter().zip(&b.manifest().kernels) {
        assert_eq!((&x.arch, &x.family, x.key), (&y.arch, &y.family, y.key));
        let (one, other) = (a.kernel(x).unwrap().unwrap(), b.kernel(y).unwrap().unwrap());
        let differs = one.iter().zip(&other).position(|(p, q)| p != q);
        let what = format!("{} for {} ({}): {} and {} bytes", x.family, x.arch, x.key, one.len(), other.len());
        if one != other {
            let keep = std::env::temp_dir().join("dsv4-cubins-that-differ");
            fs::create_dir_all(&keep).unwrap();
            fs::write(keep.join("one"), &one).unwrap();
            fs::write(keep.join("other"), &other).unwrap();
        }
        assert!(one == other, "{what}, from byte {differs:?}");
    }
}

/// Fails when weights are read.
struct NoWeights;

impl Progress for NoWeights {
    fn start(&self, what: &str, _total_bytes: u64) {
        assert_ne!(what, "pack", "weights are read");
    }

    fn add(&self, _bytes: u64) {}

    fn finish(&self) {}
}

#[test]
fn weights_and_a_seed_do_not_take_each_others_name() {
    let temp = tempfile::tempdir().unwrap();
    let seeded = weightless(&temp, "seeded", 5);
    let options = PackOptions { out: Some(seeded.clone()), ..PackOptions::new(NANO, 2) };
    let error = pack(&options, &NoWeights).unwrap_err();
    let words = ["seeded.dsv4", "weights: expected a checkpoint's, found none, but the seed 5", "--force"];
    assert!(words.iter().all(|word| error.to_string().contains(word)) && error.exit_code() == INPUT as u8, "{error}");
    let packed = temp.path().join("packed.dsv4");
    let options = PackOptions { out: Some(packed.clone()), ..PackOptions::new(NANO, 2) };
    pack(&options, &Unwatched).unwrap_or_else(|e| panic!("{e}"));
    // Before the compiler is looked for.
    let config = Path::new(NANO).join("config.json");
    for (out, words) in [(&packed, "found a checkpoint's"), (&seeded, "found none, but the seed 5")] {
        let pack = ["pack", "--config", text(&config), "--weights-seed", "6", "--tp", "2", "--nvrtc", "/nowhere"];
        run(DSV4C, pack.iter().chain(&["-o", text(out)]))
            .fails(INPUT, &["weights: expected none, but the seed 6", words]);
    }
}

/// `dsv4c kernels` mends what it compiles and vouches for nothing else.
#[test]
fn damaged_kernels_are_compiled_again() {
    if !can_compile() {
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let (art, key) = (weightless(&temp, "art", 1), temp.path().join("key"));
    let options = AddOptions { arches: vec!["sm_121a".into()], ..AddOptions::new(&art) };
    let added = add(&options, &Unwatched).unwrap_or_else(|e| panic!("{e}"));
    run(DSV4C, ["keygen", "-o", text(&key)]).ok();
    run(DSV4C, ["sign", text(&art), "--key", &format!("{}.key", text(&key))]).ok();
    let before = files(&art);
    fs::remove_file(art.join("kernels.sm_121a")).unwrap();
    let other = ["kernels", text(&art), "--arch", "sm_90a", "--force", "--nvrtc", "/nowhere"];
    run(DSV4C, other).fails(INPUT, &["kernels.sm_121a"]);
    let again = add(&AddOptions::new(&art), &Unwatched).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!((again.outcome, &again.artifact_id, again.notes.len()), (Outcome::Replaced, &added.artifact_id, 0));
    let after = files(&art);
    assert_eq!(after.keys().collect::<Vec<_>>(), before.keys().collect::<Vec<_>>());
    before.iter().filter(|(name, _)| *name != "RECEIPT.json").for_each(|(n, bytes)| assert!(*bytes == after[n], "{n}"));
    run(DSV4C, ["verify", text(&art), "--key", &format!("{}.pub", text(&key))]).ok();
}

/// Known before the compiler is looked for, and no obstacle to an artifact for the CPU.
#[test]
fn a_model_without_kernels_is_packed_for_the_cpu_alone() {
    let temp = tempfile::tempdir().unwrap();
    let mut config: serde_json::Value =
        serde_json::from_slice(&fs::read(Path::new(NANO).join("config.json")).unwrap()).unwrap();
    config["hc_mult"] = 3.into();
    let file = temp.path().join("config.json");
    fs::write(&file, config.to_string()).unwrap();
    let out = temp.path().join("out.dsv4");
    let pack = ["pack", "--config", text(&file), "--weights-seed", "1", "--tp", "2", "-o", text(&out)];
    let words = ["GPU kernels: hc_mult, hidden_size: expected 2 or 4 streams", "found (3, ", "--arch none"];
    run(DSV4C, pack.iter().chain(&["--nvrtc", "/nowhere"])).fails(INPUT, &words);
    assert!(!out.exists());
    run(DSV4C, pack.iter().chain(&["--arch", "none"])).ok();
    run(DSV4C, ["kernels", text(&out), "--nvrtc", "/nowhere"]).fails(INPUT, &words);
}

/// Whatever rank and numerics start, for whichever architecture: by its key, and with the table it was compiled by.
fn every_unit_is_there(artifact: &Path) {
    let artifact = Artifact::open(artifact).unwrap();
    let config = ModelConfig::parse(&artifact.manifest().config_json).unwrap();
    for arch in ARCHES {
        let table = String::from_utf8(artifact.tuning(arch).unwrap().unwrap()).unwrap();
        let tuning = Tuning::parse(&table).unwrap();
        for (rank, numerics) in [(0, Numerics::Published), (1, Numerics::Published), (1, Numerics::Float)] {
            for unit in Kernels::units(&config, Tp::new(rank, 2).unwrap(), numerics, &tuning) {
                let key = Digest(unit.key(arch));
                let record = artifact.manifest().kernels.iter().find(|k| k.arch == arch && k.key == key);
                let record = record.unwrap_or_else(|| panic!("{arch} {}: no kernel {key}", unit.family));
                let cubin = artifact.kernel(record).unwrap().unwrap();
                assert!(record.family == unit.family && cubin.starts_with(b"\x7fELF"), "{arch} {}", unit.family);
            }
        }
    }
}

#[test]
fn without_the_compiler_it_says_what_to_do_at_once() {
    let temp = tempfile::tempdir().unwrap();
    let (empty, out) = (temp.path().join("empty"), temp.path().join("out.dsv4"));
    fs::create_dir(&empty).unwrap();
    let words = ["NVRTC 13.0.88", "empty", "found none", "scripts/setup cuda", "--arch none"];
    let pack = ["pack", NANO, "--tp", "2", "--nvrtc", text(&empty), "-o", text(&out)];
    run(DSV4C, pack).fails(INPUT, &words);
    let seeded = weightless(&temp, "seeded", 1);
    run(DSV4C, ["kernels", text(&seeded), "--nvrtc", text(&empty)]).fails(INPUT, &words);
    // What is there and does not load is not called missing.
    let builtins = "libnvrtc-builtins.so.13.0";
    fs::write(empty.join(builtins), "no library").unwrap();
    let why = ["NVRTC 13.0.88", builtins, "which cannot be opened", "file too short", "scripts/setup cuda"];
    run(DSV4C, pack).fails(INPUT, &why);
    let mut left: Vec<_> = fs::read_dir(temp.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["empty", "seeded.dsv4"]);
}

/// The library's version function says 13.0 of every build of it.
#[test]
fn another_build_of_the_compiler_is_refused() {
    let place = dsv4_tests::binaries::path(DSV4C).ancestors().nth(2).unwrap().join("nvrtc");
    if !place.join("libnvrtc.so.13").is_file() {
        return skip("NVRTC is not in target/nvrtc: run scripts/setup cuda");
    }
    let temp = tempfile::tempdir().unwrap();
    let builtins = "libnvrtc-builtins.so.13.0";
    std::os::unix::fs::symlink(fs::canonicalize(place.join(builtins)).unwrap(), temp.path().join(builtins)).unwrap();
    let mut library = fs::read(place.join("libnvrtc.so.13")).unwrap();
    let build = b"release 13.0, V13.0.88";
    let at = library.windows(build.len()).position(|bytes| bytes == build).expect("the build in the library");
    library[at..at + build.len()].copy_from_slice(b"release 13.0, V13.0.48");
    fs::write(temp.path().join("libnvrtc.so.13"), library).unwrap();
    let out = temp.path().join("out.dsv4");
    let pack = ["pack", NANO, "--tp", "2", "--nvrtc", text(temp.path()), "-o", text(&out)];
    run(DSV4C, pack).fails(INPUT, &["NVRTC 13.0.88", "libnvrtc.so.13 of build 13.0.48"]);
}

/// An artifact of nano without weights and kernels.
fn weightless(temp: &TempDir, name: &str, seed: u64) -> PathBuf {
    let out = temp.path().join(format!("{name}.dsv4"));
    let options = WeightlessOptions {
        config: NANO.into(),
        seed,
        out: out.clone(),
        tp: 2,
        arches: Vec::new(),
        nvrtc: None,
        jobs: None,
        force: false,
        fresh: false,
    };
    pack_weightless(&options, &Unwatched).unwrap_or_else(|e| panic!("{e}"));
    out
}

#[test]
fn without_weights_every_command_knows_it() {
    let temp = tempfile::tempdir().unwrap();
    let (a, b) = (temp.path().join("a.dsv4"), weightless(&temp, "b", 8));
    let config = Path::new(NANO).join("config.json");
    let pack = ["pack", "--config", text(&config), "--weights-seed", "7", "--tp", "2", "--arch", "none"];
    let packed = run(DSV4C, pack.iter().chain(&["-o", text(&a), "--json"]));
    let report: Value = serde_json::from_str(packed.ok()).unwrap();
    assert_eq!((report["weights_seed"].as_u64(), report["outcome"].as_str()), (Some(7), Some("created")));
    assert_eq!(files(&a).into_keys().collect::<Vec<_>>(), ["MANIFEST", "RECEIPT.json", "meta"]);
    assert!(run(DSV4C, pack.iter().chain(&["-o", text(&a)])).ok().contains("already there"));
    run(DSV4C, pack.iter().chain(&["-o", text(&b)])).fails(INPUT, &["b.dsv4", "--force"]);

    let shown = inspect(&a);
    assert_eq!((shown["weights_seed"].as_u64(), shown["tp"].as_u64()), (Some(7), Some(2)));
    assert!(shown["ranks"].as_array().unwrap().iter().all(|rank| rank["present"] == false));
    assert!(run(DSV4C, ["inspect", text(&a)]).ok().contains("seed 7"));
    let verified: Value = serde_json::from_str(run(DSV4C, ["verify", text(&a), "--json"]).ok()).unwrap();
    assert_eq!(
        (&verified["ranks"], &verified["absent"], &verified["weights_seed"]),
        (&json!([]), &json!([]), &json!(7))
    );
    assert!(run(DSV4C, ["verify", text(&a)]).ok().contains("no weights"));
    let differ = run(DSV4C, ["diff", text(&a), text(&b), "--json"]);
    let differ: Value = serde_json::from_str(&differ.out).unwrap();
    let ids = differ["differences"]["ids"]["shown"].as_array().unwrap();
    assert!(ids.iter().any(|item| item["at"] == "weights_seed" && item["a"] == 7 && item["b"] == 8), "{differ}");
    assert!(differ["differences"].get("weights").is_none());

    // Weights are nowhere, so no rank loads.
    run(DSV4_RUN, [text(&a), "load", "--rank", "0"]).fails(INPUT, &["a.dsv4", "seed 7", "dsv4-run bench"]);
    let tokens = temp.path().join("tokens.json");
    fs::write(&tokens, "[1,2,3]").unwrap();
    let logits = temp.path().join("logits.safetensors");
    let ran = run(DSV4_RUN, [text(&a), "logits", "--tokens", text(&tokens), "-o", text(&logits)]);
    assert!(ran.code == Some(INPUT) && ran.err.contains("seed 7") && !logits.exists(), "{ran:#?}");

    // It travels without ranks.
    let there = temp.path().join("there.dsv4");
    let receiver = start(DSV4C, ["receive", "--listen", "127.0.0.1:0", "-o", text(&there)]);
    let begun = Instant::now();
    let address = loop {
        let said = receiver.err();
        if let Some(address) = said.strip_prefix("waiting at ").and_then(|rest| rest.strip_suffix('\n')) {
            break address.to_owned();
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "no address: {said:?}");
        std::thread::sleep(Duration::from_millis(2));
    };
    run(DSV4C, ["push", text(&a), &address]).ok();
    receiver.finish().ok();
    run(DSV4C, ["diff", text(&a), text(&there)]).ok();
    run(DSV4C, ["push", text(&a), &address, "--rank", "0"]).fails(INPUT, &["seed 7"]);
}

#[test]
fn what_cannot_be_meant_is_refused() {
    let temp = tempfile::tempdir().unwrap();
    let (art, config) = (weightless(&temp, "art", 1), Path::new(NANO).join("config.json"));
    let (art, config) = (text(&art), text(&config));
    let table = temp.path().join("table.toml");
    fs::write(&table, Tuning::for_arch("sm_90a").text()).unwrap();
    let seeded = ["pack", "--config", config, "--weights-seed", "1", "--tp", "2", "-o", "x"];
    for (args, words) in [
        (vec!["pack", "--tp", "2"], "<CHECKPOINT"),
        (vec!["pack", "--config", config, "--tp", "2", "-o", "x.dsv4"], "--weights-seed"),
        (vec!["pack", "--config", config, "--weights-seed", "1", "--tp", "2"], "--out"),
        (vec!["pack", "--weights-seed", "1", "--tp", "2"], "--config"),
        (vec!["pack", art, "--config", config, "--weights-seed", "1", "--tp", "2", "-o", "x"], "cannot be used with"),
        ([&seeded[..], &["--memory", "1G"]].concat(), "cannot be used with"),
        ([&seeded[..], &["--no-verify"]].concat(), "cannot be used with"),
        ([&seeded[..], &["--journal-every", "1G"]].concat(), "cannot be used with"),
        (vec!["kernels", art, "--arch", "none"], "sm_121a"),
        (vec!["kernels", art, "--arch", "sm_121a", "--tuning", text(&table)], "one for sm_90a"),
    ] {
        let ran = run(DSV4C, &args);
        assert!(ran.code == Some(USAGE) && ran.out.is_empty() && ran.err.contains(words), "{args:?}: {ran:#?}");
    }
    fs::write(&table, "colour = 3\n").unwrap();
    run(DSV4C, ["kernels", art, "--tuning", text(&table)]).fails(INPUT, &["table.toml", "tuning table"]);
    run(DSV4C, ["kernels", NANO]).fails(INPUT, &["MANIFEST"]);
}

#[test]
fn a_signature_is_of_the_kernels_that_were() {
    let temp = tempfile::tempdir().unwrap();
    let (art, key) = (weightless(&temp, "art", 1), temp.path().join("key"));
    run(DSV4C, ["keygen", "-o", text(&key)]).ok();
    run(DSV4C, ["sign", text(&art), "--key", &format!("{}.key", text(&key))]).ok();
    // Known from the keys alone: no compiler is asked.
    run(DSV4C, ["kernels", text(&art), "--nvrtc", "/nowhere"]).fails(INPUT, &["SIGNATURE", "--force", "dsv4c sign"]);
    if !can_compile() {
        return;
    }
    let options = AddOptions { arches: vec!["sm_121a".into()], force: true, ..AddOptions::new(&art) };
    let added = add(&options, &Unwatched).unwrap_or_else(|e| panic!("{e}"));
    assert!(added.outcome == Outcome::Replaced && added.notes.iter().any(|n| n.contains("signature")), "{added:?}");
    assert!(!art.join("SIGNATURE").exists());
    let verified: Value = serde_json::from_str(run(DSV4C, ["verify", text(&art), "--json"]).ok()).unwrap();
    assert_eq!(verified["signed"], false);
}

#[test]
fn weights_of_another_version_get_no_kernels() {
    let temp = tempfile::tempdir().unwrap();
    let out = temp.path().join("old.dsv4");
    let model = Artifact::open(&weightless(&temp, "art", 1)).unwrap();
    let layouts = (0..2).map(|rank| dsv4_format::RankLayout::clone(model.layout(rank).unwrap())).collect();
    let draft = Draft::weightless(&out, layouts, 1, Digest([1; 32]), "a test", false).unwrap();
    let input = CommitInput {
        config_json: model.manifest().config_json.clone(),
        source_id: SourceId([0; 32]),
        weight_contract: Digest([9; 32]),
        op_contract: model.manifest().op_contract,
        canary: None,
        ranks: Vec::new(),
        receipt: serde_json::Map::new(),
    };
    draft.commit(input, false, &dsv4_format::NoProgress).unwrap();
    let words = ["old.dsv4", &Digest([9; 32]).to_string(), "pack the checkpoint again"];
    run(DSV4C, ["kernels", text(&out), "--nvrtc", "/nowhere"]).fails(INPUT, &words);
}
