//! Synthetic checkpoints: the same bytes from the same seed, valid, packable.

use std::fs;
use std::path::{Path, PathBuf};

use dsv4_format::{Artifact, FormatError, NoProgress, Partial};
use dsv4c::CompileError;
use dsv4c::checkpoint::Checkpoint;
use dsv4c::pack::{PackOptions, pack};
use dsv4c::synth::{Layers, SynthOptions, synth};

use crate::fixture::{NANO, SmallDisk, names, tensors};

fn options(out: PathBuf) -> SynthOptions {
    SynthOptions { config: PathBuf::from(NANO), out, layers: Layers::All, seed: 11, shards: None }
}

#[test]
fn bytes_follow_from_the_seed_alone() {
    let temp = tempfile::tempdir().unwrap();
    let at = |name: &str| temp.path().join(name);
    let report = synth(&options(at("a")), &NoProgress).unwrap();
    assert_eq!((report.tensors, report.bytes, report.shards), (754, 18_317_390, 1));
    synth(&options(at("a2")), &NoProgress).unwrap();
    for name in names(&at("a")) {
        assert!(fs::read(at("a").join(&name)).unwrap() == fs::read(at("a2").join(&name)).unwrap(), "{name}");
    }
    let one_thread = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let sharded = SynthOptions { shards: Some(5), ..options(at("b")) };
    assert_eq!(one_thread.install(|| synth(&sharded, &NoProgress)).unwrap().shards, 5);
    synth(&SynthOptions { seed: 12, ..options(at("c")) }, &NoProgress).unwrap();
    synth(&SynthOptions { layers: Layers::First(2), ..options(at("d")) }, &NoProgress).unwrap();
    let (a, b, c, d) = (tensors(&at("a")), tensors(&at("b")), tensors(&at("c")), tensors(&at("d")));
    assert!(a == b);
    assert!(a.iter().all(|(name, bytes)| c[name] != *bytes || bytes.len() < 8));
    assert!(d.len() < a.len() && d.iter().all(|(name, bytes)| a[name] == *bytes));
}

#[test]
fn they_pack() {
    let temp = tempfile::tempdir().unwrap();
    let mut ids = Vec::new();
    for shards in [1, 3] {
        let dir = temp.path().join(format!("nano{shards}"));
        synth(&SynthOptions { shards: Some(shards), ..options(dir.clone()) }, &NoProgress).unwrap();
        let out = temp.path().join(format!("nano{shards}.dsv4"));
        let report = pack(&PackOptions { out: Some(out.clone()), ..PackOptions::new(dir, 2) }, &NoProgress).unwrap();
        Artifact::open(&out).unwrap().verify(&NoProgress).unwrap();
        ids.push(report.artifact_id);
    }
    assert_eq!(ids[0], ids[1]);
}

#[test]
fn listed_layers_keep_their_kind() {
    let temp = tempfile::tempdir().unwrap();
    let out = temp.path().join("two");
    synth(&SynthOptions { layers: Layers::List(vec![2, 3]), ..options(out.clone()) }, &NoProgress).unwrap();
    let config = &Checkpoint::open(&out).unwrap().config().model.clone();
    assert_eq!((config.num_hidden_layers, config.num_hash_layers), (2, 1));
    assert_eq!(config.compress_ratios, [4, 128, 0]);
    for layers in
        [Layers::First(9), Layers::First(u32::MAX), Layers::First(0), Layers::List(vec![8]), Layers::List(vec![3, 2])]
    {
        let error = synth(&SynthOptions { layers, ..options(temp.path().join("none")) }, &NoProgress).unwrap_err();
        assert!(matches!(error, CompileError::Model { .. }), "{error}");
    }
    assert_eq!(names(temp.path()), ["two"]);
}

/// Every config of the family, also the one with a block drafter, with shards of one tensor and more.
#[test]
fn any_config_and_any_number_of_shards() {
    let temp = tempfile::tempdir().unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/dspark_config.json");
    let out = temp.path().join("dspark");
    let options = SynthOptions { config: golden, layers: Layers::First(1), shards: Some(300), ..options(out.clone()) };
    assert_eq!(synth(&options, &NoProgress).unwrap().shards, 300);
    Checkpoint::open(&out).unwrap();
    for shards in [0, 513] {
        let out = temp.path().join("none");
        let error = synth(&SynthOptions { shards: Some(shards), out, ..options.clone() }, &NoProgress).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{error}");
    }
}

#[test]
fn an_existing_name_is_never_touched() {
    let temp = tempfile::tempdir().unwrap();
    let out = temp.path().join("mine");
    fs::create_dir(&out).unwrap();
    let error = synth(&options(out), &NoProgress).unwrap_err();
    assert!(matches!(error, CompileError::Occupied { .. }) && error.exit_code() == 3, "{error}");
}

#[test]
fn a_full_disk_is_an_error_and_leaves_nothing() {
    let Some(disk) = SmallDisk::mount(12) else { return };
    let options = SynthOptions { shards: Some(2), ..options(disk.path().join("nano")) };
    let error = synth(&options, &NoProgress).unwrap_err();
    assert!(matches!(error, CompileError::NoSpace { needed: 18_317_390, .. }), "{error}");
    assert!(names(disk.path()).is_empty(), "{:?}", names(disk.path()));
}

#[test]
fn what_another_run_is_writing_is_never_touched() {
    let temp = tempfile::tempdir().unwrap();
    let (out, partial) = (temp.path().join("nano"), temp.path().join(".nano.partial"));
    let running = Partial::create(&out, |name| name == "config.json").unwrap();
    fs::write(partial.join("config.json"), "half of it").unwrap();
    let error = synth(&options(out.clone()), &NoProgress).unwrap_err();
    assert!(matches!(error, CompileError::Format(FormatError::Busy { .. })), "{error}");
    assert_eq!(names(&partial), ["config.json"]);
    drop(running);

    // What a killed run left is discarded, what somebody else put there is not.
    fs::create_dir(&partial).unwrap();
    for name in ["config.json", "model-00001-of-00007.safetensors", "notes"] {
        fs::write(partial.join(name), name).unwrap();
    }
    let error = synth(&options(out.clone()), &NoProgress).unwrap_err();
    assert!(matches!(error, CompileError::Format(FormatError::Occupied { .. })), "{error}");
    assert_eq!(names(&partial).len(), 3);
    fs::remove_file(partial.join("notes")).unwrap();
    synth(&options(out.clone()), &NoProgress).unwrap();
    Checkpoint::open(&out).unwrap();
    assert_eq!(names(temp.path()), ["nano"]);
}
