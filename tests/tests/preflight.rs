//! `check` and `doctor` on packed nano, and the guard of the verbs that load.

use std::path::Path;

use dsv4_kernels::numerics::Numerics;
use dsv4_run::load::{Opened, open};
use dsv4_run::preflight::host::Host;
use dsv4_run::preflight::memory::{Asked, Target};
use dsv4_run::preflight::{admit, check};
use dsv4_tests::DATA;
use dsv4_tests::artifacts::Packed;
use dsv4_tests::binaries::{DSV4_RUN, DSV4C, run};
use serde_json::Value;

const USAGE: i32 = 2;
const INPUT: i32 = 3;
const DEVICE: i32 = 4;

fn text(packed: &Packed) -> &str {
    packed.path().to_str().expect("a path of ASCII")
}

fn host(name: &str) -> Host {
    Host::read(&Path::new(DATA).join("hosts").join(name))
}

fn asked(target: Target) -> Asked {
    let (context, numerics) = (8192, Numerics::Published);
    Asked { target, context, sequences: 1, chunk: 256, threads: 2, numerics, all_logits: false, reserve: None }
}

fn json(out: &str) -> Value {
    serde_json::from_str(out).unwrap_or_else(|e| panic!("{e}: {out}"))
}

#[test]
fn nano_is_fit_to_run_here() {
    let nano = Packed::nano(2);
    let out = json(run(DSV4_RUN, [text(&nano), "check", "--json"]).ok());
    assert_ne!(out["verdict"], "refused");
    assert_eq!(out["exit_code"], 0);
    let opened = open(nano.path()).unwrap();
    assert_eq!(out["artifact"]["artifact_id"], opened.artifact.manifest().artifact_id.to_string());
    let memory = &out["memory"];
    let ranks = memory["ranks"].as_array().unwrap();
    assert_eq!(ranks.len(), 2);
    for (rank, table) in ranks.iter().enumerate() {
        let lines = table["lines"].as_array().unwrap();
        let sum: u64 = lines.iter().map(|l| l["bytes"].as_u64().unwrap()).sum();
        assert_eq!(table["bytes"], sum);
        assert_eq!(lines[0]["what"], "weights");
        assert_eq!(lines[0]["bytes"], opened.artifact.arena_bytes(rank as u32).unwrap());
    }
    let all: u64 = ranks.iter().map(|t| t["bytes"].as_u64().unwrap()).sum();
    assert_eq!(memory["needed_bytes"], all + memory["reserve_bytes"].as_u64().unwrap());
    assert_eq!((&memory["fits"], &memory["max_context"]), (&true.into(), &8192.into()));
    assert_eq!(out["disk"]["load_bytes"], weights_bytes(&opened));
    assert!(out["disk"]["bytes_per_second"].as_f64().unwrap() > 0.0);
}

fn weights_bytes(opened: &Opened) -> u64 {
    (0..2).map(|rank| opened.artifact.arena_bytes(rank).unwrap()).sum()
}

#[test]
fn a_plan_that_does_not_fit_is_refused_with_the_arithmetic() {
    let nano = Packed::nano(1);
    let ran = run(DSV4_RUN, [text(&nano), "check", "--reserve", "4096G", "--json"]);
    assert_eq!(ran.code, Some(DEVICE), "{ran:#?}");
    ran.says(&["memory.plan", "--reserve"]);
    let out = json(&ran.out);
    assert_eq!((&out["verdict"], &out["exit_code"]), (&"refused".into(), &DEVICE.into()));
    assert_eq!(out["memory"]["max_context"], Value::Null);
    let tokens = nano.scratch().join("tokens.json");
    std::fs::write(&tokens, "[0, 5, 9]").unwrap();
    let (tokens, out) = (tokens.to_str().unwrap(), nano.scratch().join("out.safetensors"));
    let verbs: [&[&str]; 3] =
        [&["generate", "--prompt", "Hi"], &["chat"], &["logits", "--tokens", tokens, "-o", out.to_str().unwrap()]];
    for verb in verbs {
        let start = [&[text(&nano)], verb, &["--reserve", "4096G"]].concat();
        let words = ["not enough memory", "weights", "KV caches", "rank 0", "4096.00 GiB", "MISSING", "--reserve"];
        run(DSV4_RUN, &start).fails(DEVICE, &words);
    }
    assert!(!out.exists());
    // Without a reserve nothing is asked.
    run(DSV4_RUN, [text(&nano), "generate", "--prompt", "Hi", "--max-tokens", "1", "--reserve", "0"]).ok();
}

#[test]
fn other_hosts() {
    let nano = Packed::nano(2);
    let opened = open(nano.path()).unwrap();
    for (name, code) in [("gb10", 0), ("gb10-cached", 4), ("gb10-held", 4), ("gb10-fragmented", 4), ("gb10-kho", 4)] {
        let report = check(&opened, &[0], &asked(Target::Cuda), host(name)).unwrap();
        assert_eq!(report.exit_code(), code, "{name}: {}", report.to_text());
    }
    // On the CPU the same machines run nano.
    for name in ["gb10", "gb10-cached", "gb10-held", "gb10-fragmented", "gb10-kho", "recorded-x86", "nothing"] {
        admit(&opened, &[0, 1], &asked(Target::Cpu), &host(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
}

#[test]
fn files_are_told_first() {
    let nano = Packed::nano(2);
    std::fs::remove_file(nano.path().join("rank1.weights")).unwrap();
    let ran = run(DSV4_RUN, [text(&nano), "check", "--json", "--reserve", "4096G"]);
    assert_eq!(ran.code, Some(INPUT), "{ran:#?}");
    ran.says(&["files.ranks", "ranks [1]"]);
    // The machine that holds rank 0 is well.
    let peers = ["--rank", "0", "--peers", "one:1,other:1"];
    let out = json(run(DSV4_RUN, [&[text(&nano), "check", "--json"], &peers[..]].concat()).ok());
    assert_eq!(out["artifact"]["ranks"], Value::from(vec![0]));
    let ran = run(DSV4_RUN, [nano.scratch().to_str().unwrap(), "check", "--json"]);
    assert_eq!(ran.code, Some(INPUT), "{ran:#?}");
    assert_eq!(json(&ran.out)["exit_code"], INPUT);
}

#[test]
fn an_artifact_without_weights_is_told_as_such() {
    let temp = tempfile::tempdir().unwrap();
    let (art, config) = (temp.path().join("a.dsv4"), Path::new(DATA).join("nano/config.json"));
    let (art, config) = (art.to_str().unwrap(), config.to_str().unwrap());
    run(DSV4C, ["pack", "--config", config, "--weights-seed", "7", "--tp", "2", "--arch", "none", "-o", art]).ok();
    let ran = run(DSV4_RUN, [art, "check", "--json"]);
    assert_eq!(ran.code, Some(INPUT), "{ran:#?}");
    ran.says(&["files.ranks", "seed 7", "dsv4-run bench"]);
    let out = json(&ran.out);
    let files = out["findings"].as_array().unwrap().iter().find(|f| f["id"] == "files.ranks").unwrap();
    assert_eq!((&files["level"], &files["expected"]), (&"refuse".into(), &"weights".into()));
    assert!(!ran.out.contains("copy the files"), "{ran:#?}");
    // Text goes the same way, and the verbs that load say the same.
    assert!(run(DSV4_RUN, [art, "check"]).out.contains("dsv4-run bench"));
    run(DSV4_RUN, [art, "load"]).fails(INPUT, &["seed 7", "dsv4-run bench"]);
    run(DSV4_RUN, [art, "generate", "--prompt", "Hi"]).fails(INPUT, &["seed 7", "dsv4-run bench"]);
}

#[test]
fn doctor_needs_no_artifact_and_others_do() {
    let out = json(run(DSV4_RUN, ["doctor", "--json"]).ok());
    assert!(out["host"]["mem_total"].as_u64().unwrap() > 0);
    assert_eq!(out["artifact"], Value::Null);
    run(DSV4_RUN, ["doctor"]).ok();
    run(DSV4_RUN, ["generate", "--prompt", "Hi"]).fails(USAGE, &["ARTIFACT"]);
}
