//! The command's contract: exit codes, what goes to stdout, JSON keys.

use std::fs::File;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use crate::fixture::{NANO, TINY, names};

fn dsv4c(args: &[&str], dir: &Path) -> Output {
    Command::new(env!("CARGO_BIN_EXE_dsv4c")).args(args).current_dir(dir).output().unwrap()
}

/// Exit code, stdout, stderr.
pub fn run(args: &[&str], dir: &Path) -> (i32, String, String) {
    let out = dsv4c(args, dir);
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (out.status.code().unwrap(), text(out.stdout), text(out.stderr))
}

pub fn json(args: &[&str], dir: &Path) -> Value {
    let (code, out, err) = run(args, dir);
    assert_eq!((code, err.as_str()), (0, ""), "{args:?}");
    serde_json::from_str(&out).unwrap()
}

#[test]
fn pack_inspect_and_verify() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    let packed = json(&["pack", NANO, "--tp", "2", "--arch", "none", "--jobs", "2", "--memory", "512M", "--json"], dir);
    assert_eq!(names(dir), ["nano.dsv4"]);
    assert_eq!((packed["outcome"].as_str(), packed["source_bytes"].as_u64()), (Some("created"), Some(18_317_390)));
    let shown = json(&["inspect", "nano.dsv4", "--json"], dir);
    assert_eq!(shown["artifact_id"], packed["artifact_id"]);
    assert_eq!(shown["weight_set_id"], packed["weight_set_id"]);
    assert_eq!((shown["tp"].as_u64(), shown["format"].as_u64()), (Some(2), Some(2)));
    assert_eq!(shown["model"]["num_hidden_layers"], 8);
    let sections = shown["sections"].as_array().unwrap();
    assert_eq!(sections.len(), 4);
    assert_eq!((sections[1]["rank"].as_u64(), sections[1]["name"].as_str()), (Some(0), Some("mtp.0")));
    assert_eq!(shown["kernels"], Value::Array(Vec::new()));
    let (code, out, err) = run(&["inspect", "nano.dsv4"], dir);
    assert!(code == 0 && err.is_empty() && out.contains(packed["artifact_id"].as_str().unwrap()), "{out}");
    assert_eq!(json(&["verify", "nano.dsv4", "--json"], dir)["ranks"], serde_json::json!([0, 1]));

    let (code, out, _) = run(&["pack", NANO, "--tp", "2", "--arch", "none", "--fresh"], dir);
    assert!(code == 0 && out.contains("already there"), "{out}");
    let (code, out, err) = run(&["pack", TINY, "--tp", "2", "--arch", "none", "-o", "nano.dsv4"], dir);
    assert!(code == 3 && out.is_empty() && err.starts_with("error: ") && err.contains("\n  help: "), "{err}");
    assert_eq!(run(&["pack", TINY, "--tp", "2", "--arch", "none", "-o", "nano.dsv4", "--force"], dir).0, 0);

    let file = dir.join("nano.dsv4/rank1.weights");
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[5 << 20] ^= 4;
    std::fs::write(&file, bytes).unwrap();
    let (code, _, err) = run(&["verify", "nano.dsv4"], dir);
    assert!(code == 3 && err.contains("rank1.weights") && err.contains("section"), "{err}");
}

#[test]
fn usage_and_input_errors_have_their_codes() {
    let temp = tempfile::tempdir().unwrap();
    for (args, expected, words) in [
        (vec!["pack", NANO], 2, "--tp"),
        (vec!["pack", NANO, "--tp", "3"], 2, "1, 2, 4 or 8"),
        (vec!["pack", NANO, "--tp", "2", "--arch", "gb10"], 2, "sm_121a"),
        (vec!["pack", NANO, "--tp", "2", "--arch", "none,sm_121a"], 2, "or none"),
        (vec!["pack", NANO, "--tp", "2", "--nvrtc", "nowhere"], 3, "scripts/setup cuda"),
        (vec!["pack", NANO, "--tp", "2", "--jobs", "0"], 2, "--jobs"),
        (vec!["pack", NANO, "--tp", "2", "--arch", "none", "--memory", "1M"], 2, "--memory"),
        (vec!["pack", NANO, "--tp", "2", "--memory", "99999999999G"], 2, "a number of bytes"),
        (vec!["pack", NANO, "--tp", "2", "--journal-every", "1K"], 2, "--journal-every"),
        (vec!["pack", NANO, "--tp", "4"], 3, "layers.0.attn.wq_b"),
        (vec!["pack", "nowhere", "--tp", "1"], 3, "nowhere"),
        (vec!["plan", "nowhere", "--tp", "1"], 3, "nowhere"),
        (vec!["synth", NANO, "-o", "x", "--layers", "two"], 2, "a number of layers"),
        (vec!["synth", NANO, "-o", "x", "--layers", "9"], 3, "--layers"),
        (vec!["inspect", NANO], 3, "MANIFEST"),
        (vec!["verify", "nowhere"], 3, "nowhere"),
        (vec!["fly"], 2, "fly"),
    ] {
        let (code, out, err) = run(&args, temp.path());
        assert!(code == expected && out.is_empty() && err.contains(words), "{args:?}: {code}\n{err}");
    }
    assert!(names(temp.path()).is_empty());
}

#[test]
fn synth_takes_lists_of_layers() {
    let temp = tempfile::tempdir().unwrap();
    for (layers, kept) in [("2", "[0,0,0]"), ("2,", "[4,0]"), ("2,3", "[4,128,0]")] {
        let made = json(
            &["synth", NANO, "-o", layers, "--layers", layers, "--seed", "3", "--shards", "2", "--json"],
            temp.path(),
        );
        assert_eq!(made["shards"], 2);
        let config = std::fs::read_to_string(temp.path().join(layers).join("config.json")).unwrap();
        let config: Value = serde_json::from_str(&config).unwrap();
        assert_eq!(config["compress_ratios"].to_string(), kept);
    }
}

/// The published totals of Flash, from its config alone.
#[test]
fn plan_of_the_real_model() {
    let temp = tempfile::tempdir().unwrap();
    let config = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/flash_config.json");
    let plan = json(&["plan", config, "--tp", "2", "--json"], temp.path());
    assert_eq!((plan["tensors"].as_u64(), plan["checkpoint_bytes"].as_u64()), (Some(69_187), Some(159_609_485_896)));
    let rank = &plan["ranks"][1];
    // Within padding of half the cut weights and all the copied ones.
    assert!((80_470_000_000..80_600_000_000).contains(&rank["file_bytes"].as_u64().unwrap()), "{rank}");
    let sections = plan["sections"].as_array().unwrap();
    let bytes: u64 = sections.iter().map(|s| s["bytes"].as_u64().unwrap()).sum();
    assert_eq!(Some(bytes), rank["arena_bytes"].as_u64());
    let (code, text, _) = run(&["plan", config, "--tp", "2"], temp.path());
    assert!(code == 0 && text.contains("159609485896") && text.contains("layers.42"), "{text}");
    assert_eq!(json(&["plan", NANO, "--tp", "1", "--json"], temp.path())["tensors"], 754);
}

/// Runs the command under a limit of the shell's `ulimit`; one that hangs is ended with code 124.
fn limited(limit: &str, args: &[&str], dir: &Path) -> (i32, String) {
    let script = format!("ulimit {limit} && exec timeout 60 \"$0\" \"$@\"");
    let mut command = Command::new("sh");
    command.args(["-c", &script, env!("CARGO_BIN_EXE_dsv4c")]).args(args).current_dir(dir);
    // Large stacks and one heap: of the address space that is allowed, threads are what runs out.
    command.env("RUST_MIN_STACK", (1u64 << 30).to_string()).env("MALLOC_ARENA_MAX", "1");
    let out = command.output().unwrap();
    (out.status.code().unwrap(), String::from_utf8(out.stderr).unwrap())
}

#[test]
fn a_thread_that_cannot_start_is_an_error_not_a_hang() {
    let temp = tempfile::tempdir().unwrap();
    let args = ["pack", NANO, "--tp", "1", "--arch", "none", "-o", "x.dsv4", "--jobs", "32", "--memory", "4G"];
    let (code, err) = limited("-v 13107200", &args, temp.path());
    assert!(code == 4 && err.contains("a reading thread cannot start") && err.contains("help:"), "{code}: {err}");
    assert!(names(temp.path()).is_empty());

    json(&["pack", TINY, "--tp", "1", "--arch", "none", "-o", "x.dsv4", "--json"], temp.path());
    if std::thread::available_parallelism().unwrap().get() == 1 {
        eprintln!("SKIPPED: verifying takes no threads on one processor");
        return;
    }
    let (code, err) = limited("-v 900000", &["verify", "x.dsv4"], temp.path());
    assert!(code == 4 && err.contains("a reading thread cannot start"), "{code}: {err}");
}

#[test]
fn hundreds_of_shards_under_a_common_limit_on_open_files() {
    let temp = tempfile::tempdir().unwrap();
    json(&["synth", NANO, "-o", "many", "--shards", "200", "--json"], temp.path());
    let pack = ["pack", "many", "--tp", "2", "--arch", "none", "-o", "x.dsv4"];
    // One descriptor for each shard; and where only the soft limit is low, it is raised.
    for limit in ["-n 256", "-Sn 64"] {
        let (code, err) = limited(limit, &pack, temp.path());
        assert_eq!((code, err.as_str()), (0, ""), "{limit}");
    }
    let (code, err) = limited("-n 100", &pack, temp.path());
    assert!(code == 3 && err.contains("may have 100") && err.contains("ulimit -n"), "{code}: {err}");
}

#[test]
fn output_that_leads_nowhere() {
    let temp = tempfile::tempdir().unwrap();
    let full = || File::options().write(true).open("/dev/full").unwrap();
    let run = |args: &[&str], stdout: Stdio, stderr: Stdio| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dsv4c"));
        let out = command.args(args).current_dir(temp.path()).stdout(stdout).stderr(stderr).spawn().unwrap();
        let out = out.wait_with_output().unwrap();
        (out.status.code(), String::from_utf8(out.stderr).unwrap())
    };
    let plan = ["plan", NANO, "--tp", "1"];
    // A reader that has seen enough.
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    assert_eq!(run(&plan, writer.into(), Stdio::piped()), (Some(0), String::new()));
    let (code, err) = run(&plan, full().into(), Stdio::piped());
    assert!(code == Some(3) && err.contains("standard output") && err.contains("help:"), "{code:?}: {err}");
    // An error nobody can see keeps its code.
    assert_eq!(run(&["verify", "nowhere"], Stdio::piped(), full().into()).0, Some(3));
    assert_eq!(run(&["pack"], Stdio::piped(), full().into()).0, Some(2));
    // Nor does a line that nobody can see end what succeeds: a receiver says where it waits.
    let mut command = Command::new(env!("CARGO_BIN_EXE_dsv4c"));
    command.args(["receive", "--listen", "127.0.0.1:0", "-o", "x.dsv4"]).current_dir(temp.path());
    let mut receiver = command.stdout(Stdio::null()).stderr(full()).spawn().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(300));
    let ended = receiver.try_wait().unwrap();
    receiver.kill().unwrap();
    receiver.wait().unwrap();
    assert_eq!(ended, None);
}

#[test]
fn what_is_read_back_is_in_the_summary() {
    let temp = tempfile::tempdir().unwrap();
    let pack = ["pack", NANO, "--tp", "2", "--arch", "none", "-o", "x.dsv4", "--json", "--force"];
    let seconds = |args: &[&str]| json(args, temp.path())["read_back_seconds"].as_f64();
    assert!(seconds(&pack).is_some_and(|s| s > 0.0));
    assert_eq!(seconds(&[&pack[..], &["--no-verify"]].concat()), None);
}

#[test]
fn sums_are_checked_before_packing() {
    let temp = tempfile::tempdir().unwrap();
    let checkpoint = crate::fixture::copy(NANO, &temp.path().join("nano"));
    let shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    let sums = Command::new("sha256sum").args(shards).arg("config.json").current_dir(&checkpoint).output().unwrap();
    let sums = String::from_utf8(sums.stdout).unwrap();
    let pack = |list: &str| {
        std::fs::write(temp.path().join("list"), list).unwrap();
        run(
            &["pack", "nano", "--tp", "1", "--arch", "none", "--sha256", "list", "-o", "x.dsv4", "--force"],
            temp.path(),
        )
    };
    assert_eq!(pack(&sums).0, 0);
    std::fs::remove_dir_all(temp.path().join("x.dsv4")).unwrap();
    let line = |n: usize| sums.lines().nth(n).unwrap();
    for (list, words) in [
        (line(0).to_owned(), "model-00002-of-00002.safetensors: expected a line for this shard"),
        (sums.replace("config.json", "conf.json"), "conf.json: expected this file"),
        (sums.replace("  ", " "), "line 1"),
        (sums.replace(&line(1)[..8], "01234567"), "model-00002-of-00002.safetensors: SHA-256 is"),
    ] {
        let (code, _, err) = pack(&list);
        assert!(code == 3 && err.contains(words) && err.contains("help:"), "{code}: {err}");
    }
    // A bit that no other check of the source would find.
    let file = checkpoint.join(shards[0]);
    let mut bytes = std::fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let (code, _, err) = pack(&sums);
    assert!(code == 3 && err.contains(shards[0]) && err.contains("SHA-256 is"), "{code}: {err}");
    assert_eq!(names(temp.path()), ["list", "nano"]);
    assert_eq!(run(&["pack", "nano", "--tp", "1", "--arch", "none", "-o", "x.dsv4"], temp.path()).0, 0);
}
