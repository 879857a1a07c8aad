//! What goes wrong, through the programs: exit code, what the message names, what is left behind.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use dsv4_format::Artifact;
use dsv4_tests::artifacts::{Packed, synthetic};
use dsv4_tests::binaries::{self, DSV4_RUN, DSV4C, Ran, children, is_running, kill, run, start};
use dsv4_tests::golden::{self, distance};
use dsv4_tests::group::addresses;
use dsv4_tests::nano::cases;
use dsv4_tests::{DATA, skip};
use serde_json::Value;

const USAGE: i32 = 2;
const INPUT: i32 = 3;
const PEER: i32 = 5;

/// What "within seconds" means to these tests; two busy cores included.
const SECONDS: Duration = Duration::from_secs(8);

fn text(path: &Path) -> &str {
    path.to_str().expect("a path in ASCII")
}

/// A copy of the tiny checkpoint that a test may damage.
fn tiny_copy(to: &Path) -> PathBuf {
    let dir = to.join("checkpoint");
    fs::create_dir(&dir).unwrap();
    for file in ["config.json", "tiny.safetensors"] {
        fs::copy(Path::new(DATA).join("tiny").join(file), dir.join(file)).unwrap();
    }
    dir
}

/// Rewrites the header of a copy's only shard.
fn edit_header(checkpoint: &Path, edit: impl FnOnce(&mut serde_json::Map<String, Value>)) {
    let file = checkpoint.join("tiny.safetensors");
    let bytes = fs::read(&file).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: serde_json::Map<String, Value> = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    edit(&mut header);
    let header = Value::Object(header).to_string();
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(header.bytes());
    out.extend(&bytes[8 + length..]);
    fs::write(file, out).unwrap();
}

/// Damages a copy of tiny, packs it, and requires the refusal to leave nothing.
fn pack_refuses(damage: impl FnOnce(&Path), words: &[&str]) {
    let temp = tempfile::tempdir().unwrap();
    let checkpoint = tiny_copy(temp.path());
    damage(&checkpoint);
    let out = temp.path().join("out.dsv4");
    run(DSV4C, ["pack", text(&checkpoint), "--tp", "1", "--arch", "none", "-o", text(&out)]).fails(INPUT, words);
    let left: Vec<_> = fs::read_dir(temp.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["checkpoint"]);
}

#[test]
fn checkpoints_that_cannot_be_packed() {
    let config = |dir: &Path, from: &str, to: &str| {
        let file = dir.join("config.json");
        let whole = fs::read_to_string(&file).unwrap();
        assert!(whole.contains(from), "{from}");
        fs::write(file, whole.replacen(from, to, 1)).unwrap();
    };
    pack_refuses(
        |dir| config(dir, "\"deepseek_v4\"", "\"llama\""),
        &["config.json", "model_type", "expected \"deepseek_v4\"", "found \"llama\""],
    );
    pack_refuses(|dir| fs::write(dir.join("config.json"), "{").unwrap(), &["config.json", "JSON"]);
    pack_refuses(|dir| fs::remove_file(dir.join("tiny.safetensors")).unwrap(), &["checkpoint", "safetensors"]);
    pack_refuses(
        |dir| {
            let file = fs::File::options().write(true).open(dir.join("tiny.safetensors")).unwrap();
            file.set_len(file.metadata().unwrap().len() - 1000).unwrap();
        },
        &["tiny.safetensors", "truncated", "1000 are missing"],
    );
    pack_refuses(
        |dir| {
            edit_header(dir, |header| {
                let length = header["norm.weight"]["shape"][0].as_u64().unwrap() * 2;
                header["norm.weight"]["data_offsets"] = vec![0, length].into();
            });
        },
        &["tiny.safetensors", "header: ", "weight", "overlaps"],
    );
    pack_refuses(
        |dir| {
            edit_header(dir, |header| {
                let entry = header.remove("layers.2.attn_norm.weight").unwrap();
                header.insert("layers.2.surplus.weight".into(), entry);
            });
        },
        &["1 missing", "layers.2.attn_norm.weight", "1 not of this model", "layers.2.surplus.weight"],
    );
    pack_refuses(
        |dir| edit_header(dir, |header| header["layers.0.attn.attn_sink"]["dtype"] = "I32".into()),
        &["1 with another dtype", "layers.0.attn.attn_sink", "F32", "I32"],
    );
    pack_refuses(
        |dir| {
            edit_header(dir, |header| {
                let shape = header["layers.0.attn.wq_a.weight"]["shape"].as_array_mut().unwrap();
                shape.reverse();
            });
        },
        &["1 with another shape", "layers.0.attn.wq_a.weight", "[128, 256]", "[256, 128]"],
    );
}

#[test]
fn a_number_of_ranks_that_does_not_divide() {
    let temp = tempfile::tempdir().unwrap();
    let (tiny, out) = (format!("{DATA}/tiny"), temp.path().join("out.dsv4"));
    let pack = |tp: &str| run(DSV4C, ["pack", &tiny, "--tp", tp, "-o", text(&out)]);
    pack("4").fails(INPUT, &["layers.0.attn.", "4 ranks", "--tp 1, 2"]);
    pack("3").fails_at_the_command_line(&["--tp", "1, 2, 4 or 8"]);
    assert!(!out.exists());
}

/// Errors of the argument parser, which writes in its own form.
trait CommandLine {
    fn fails_at_the_command_line(&self, words: &[&str]);
}

impl CommandLine for Ran {
    fn fails_at_the_command_line(&self, words: &[&str]) {
        assert_eq!((self.code, self.out.as_str()), (Some(USAGE), ""), "{self:#?}");
        for word in words {
            assert!(self.err.contains(word), "no {word:?} in {self:#?}");
        }
    }
}

#[test]
fn usage_errors() {
    let packed = Packed::tiny(2);
    let art = text(packed.path());
    let tokens = packed.scratch().join("tokens.json");
    fs::write(&tokens, "[3, 4]").unwrap();
    let tokens = text(&tokens);
    for (args, words) in [
        (vec![art, "fly"], "fly"),
        (vec![art, "generate"], "--prompt"),
        (vec![art, "generate", "--prompt", "a", "--messages", "b"], "--messages"),
        (vec![art, "generate", "--prompt", "a", "--draft", "99"], "--draft"),
        (vec![art, "generate", "--prompt", "a", "--temperature", "-1"], "--temperature"),
        (vec![art, "generate", "--prompt", "a", "--top-p", "-0.5"], "--top-p"),
        (vec![art, "generate", "--prompt", "a", "--numerics", "int4"], "--numerics"),
        (vec![art, "generate", "--prompt", "a", "--chunk", "0"], "--chunk"),
        (vec![art, "generate", "--prompt", "a", "--rank", "0"], "--peers"),
        (vec![art, "logits", "--tokens", tokens], "--output"),
        (vec![art, "logits", "--tokens", tokens, "-o", "x", "--rank", "0", "--peers", "127.0.0.1:1"], "--peers"),
    ] {
        run(DSV4_RUN, &args).fails_at_the_command_line(&[words]);
    }
    for (args, words) in [
        (vec!["pack", art], "--tp"),
        (vec!["verify"], "<ARTIFACT>"),
        (vec!["pack", art, "--tp", "two"], "1, 2, 4 or 8"),
        (vec!["pack", art, "--tp", "1", "--jobs", "0"], "--jobs"),
    ] {
        run(DSV4C, &args).fails_at_the_command_line(&[words]);
    }
}

/// Without a tokenizer there is no text, but there are logits.
#[test]
fn an_artifact_without_tokenizer() {
    let packed = Packed::tiny(2);
    let art = text(packed.path());
    run(DSV4_RUN, [art, "generate", "--prompt", "a"]).fails(INPUT, &["tokenizer.json", "generate"]);
    run(DSV4_RUN, [art, "chat"]).fails(INPUT, &["tokenizer.json", "chat"]);
    let (tokens, out) = (packed.scratch().join("tokens.json"), packed.scratch().join("out.safetensors"));
    fs::write(&tokens, format!("{:?}", golden::prompt("mid"))).unwrap();
    let args = [art, "logits", "--tokens", text(&tokens), "-o", text(&out), "--numerics", "float", "--mtp"];
    assert_eq!(run(DSV4_RUN, args).ok(), "");
    let (found, expected) = (golden::read(&out), golden::tensors("logits_float.safetensors"));
    assert_eq!((&found["logits"].shape[..], &found["mtp"].shape[..]), (&[140, 512][..], &[139, 512][..]));
    assert!(distance(&found["logits"].data, &expected["mid"].data).max < 1e-3);
    let last = &found["mtp"].data[(139 - 24) * 512..];
    assert!(distance(last, &expected["mtp_mid"].data).max < 1e-3);
}

/// Token lists that are none.
#[test]
fn bad_token_lists() {
    let packed = Packed::tiny(1);
    let (art, tokens, out) = (text(packed.path()), packed.scratch().join("t.json"), packed.scratch().join("out"));
    let logits = |list: &str, more: &[&str]| {
        fs::write(&tokens, list).unwrap();
        let args = [art, "logits", "--tokens", text(&tokens), "-o", text(&out)];
        let ran = run(DSV4_RUN, args.iter().chain(more));
        assert!(!out.exists(), "{ran:?}");
        ran
    };
    logits("[1, 512]", &[]).fails(INPUT, &["t.json", "512"]);
    logits("[1, -1]", &[]).fails(INPUT, &["t.json"]);
    logits("[]", &[]).fails(INPUT, &["t.json", "at least 1"]);
    logits("[1]", &["--mtp"]).fails(INPUT, &["t.json", "at least 2"]);
    logits("{\"a\": 1}", &[]).fails(INPUT, &["t.json"]);
    logits("[1, 2", &[]).fails(INPUT, &["t.json", "EOF"]);
    logits("[1, 2, 3]", &["--max-context", "2"]).fails(INPUT, &["3 tokens", "context of 2", "--max-context"]);
    fs::remove_file(&tokens).unwrap();
    run(DSV4_RUN, [art, "logits", "--tokens", text(&tokens), "-o", text(&out)]).fails(INPUT, &["t.json"]);
}

#[test]
fn conversations_that_cannot_be_run() {
    let packed = Packed::nano(1);
    let (art, file) = (text(packed.path()), packed.scratch().join("m.json"));
    let generate = |content: &str, more: &[&str]| {
        fs::write(&file, content).unwrap();
        let args = [art, "generate", "--messages", text(&file)];
        run(DSV4_RUN, args.iter().chain(more))
    };
    generate("[{\"role\": \"user\", ", &[]).fails(INPUT, &["m.json", "EOF"]);
    generate("{\"no\": 1}", &[]).fails(INPUT, &["messages"]);
    generate("[{\"role\": \"alien\", \"content\": \"a\"}]", &[]).fails(INPUT, &["alien"]);
    let case = &cases()[0];
    let length = case.prompt_tokens.len();
    let thinking = ["--thinking", "--max-context"];
    let context = |n: usize| {
        let n = n.to_string();
        generate(&case.input.to_string(), &[thinking[0], thinking[1], &n, "--json"])
    };
    context(length - 1).fails(INPUT, &["context of", "--max-context", "8192"]);
    context(length).fails(INPUT, &["context of", "--max-context", "8192"]);
    // One token of room gives one token.
    let answer: Value = serde_json::from_str(context(length + 1).ok()).unwrap();
    assert_eq!(answer["completion_tokens"], Value::from(vec![case.completion_tokens[0]]));
    assert_eq!(answer["finish_reason"], "length");
}

/// A model without a draft block answers, but cannot draft.
#[test]
fn drafts_of_a_model_that_has_none() {
    let temp = tempfile::tempdir().unwrap();
    let (config, checkpoint) = (temp.path().join("config.json"), temp.path().join("checkpoint"));
    let nano = fs::read_to_string(format!("{DATA}/nano/config.json")).unwrap();
    let mut value: Value = serde_json::from_str(&nano).unwrap();
    value["num_nextn_predict_layers"] = 0.into();
    value["num_hidden_layers"] = 3.into();
    value["num_hash_layers"] = 1.into();
    value["compress_ratios"] = vec![0, 4, 128].into();
    fs::write(&config, value.to_string()).unwrap();
    synthetic(&config, &checkpoint, 1);
    fs::copy(format!("{DATA}/nano/tokenizer.json"), checkpoint.join("tokenizer.json")).unwrap();
    let packed = Packed::of(&checkpoint, 2);
    let generate = |draft: &str| {
        let args = [text(packed.path()), "generate", "--prompt", "a", "--max-tokens", "3", "--draft", draft, "--json"];
        run(DSV4_RUN, args)
    };
    generate("1").fails(INPUT, &["--draft", "no draft block"]);
    let answer: Value = serde_json::from_str(generate("0").ok()).unwrap();
    assert!((1..=3).contains(&answer["completion_tokens"].as_array().unwrap().len()), "{answer}");
}

fn flip(file: &Path, offset: u64, bit: u8) {
    let mut bytes = fs::read(file).unwrap();
    bytes[offset as usize] ^= 1 << bit;
    fs::write(file, bytes).unwrap();
}

#[test]
fn a_flipped_bit_in_the_manifest() {
    let packed = Packed::tiny(1);
    let manifest = packed.path().join("MANIFEST");
    let length = fs::metadata(&manifest).unwrap().len();
    for offset in [0, 8, 16, 30, 100, 4096, 4096 + (length - 4096) / 2, length - 1] {
        flip(&manifest, offset, 3);
        run(DSV4_RUN, [text(packed.path()), "generate", "--prompt", "a"]).fails(INPUT, &["MANIFEST"]);
        run(DSV4C, ["verify", text(packed.path())]).fails(INPUT, &["MANIFEST"]);
        flip(&manifest, offset, 3);
    }
    run(DSV4C, ["verify", text(packed.path())]).ok();
}

/// A weights file with one bit flipped in the middle of a section's second block.
fn with_flipped_weight(packed: &Packed, rank: usize) -> (PathBuf, [String; 4]) {
    let artifact = Artifact::open(packed.path()).unwrap();
    let section = &artifact.manifest().ranks[rank].sections[0];
    const BLOCK: u64 = 4 << 20;
    let block = section.offset + BLOCK;
    let file = packed.path().join(format!("rank{rank}.weights"));
    flip(&file, block + 12_345, 6);
    let words = [
        format!("rank{rank}.weights"),
        format!("section {}", section.name),
        "block 1,".into(),
        format!("offset {block}"),
    ];
    (file, words)
}

#[test]
fn a_flipped_bit_in_the_weights() {
    for (tp, rank) in [(1, 0), (2, 1)] {
        let packed = Packed::nano(tp);
        let (_, words) = with_flipped_weight(&packed, rank);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        run(DSV4C, ["verify", text(packed.path())]).fails(INPUT, &words);
        let ran = run(DSV4_RUN, [text(packed.path()), "generate", "--prompt", "a"]);
        // Another rank's damage reaches rank 0 as a rank that ended; the reason stands above, the code is its own.
        assert_eq!(ran.code, Some(INPUT), "{ran:?}");
        ran.says(&words);
        if rank > 0 {
            ran.says(&["rank 1", "exit status: 3"]);
        }
    }
}

#[test]
fn a_rank_file_that_is_not_whole() {
    let packed = Packed::nano(2);
    let file = packed.path().join("rank1.weights");
    let whole = fs::read(&file).unwrap();
    let generate = || run(DSV4_RUN, [text(packed.path()), "generate", "--prompt", "a", "--max-tokens", "2"]);
    fs::write(&file, &whole[..whole.len() - 4096]).unwrap();
    generate().fails(INPUT, &["rank1.weights", "length"]);
    fs::copy(packed.path().join("rank0.weights"), &file).unwrap();
    generate().fails(INPUT, &["rank1.weights", "rank"]);
    fs::remove_file(&file).unwrap();
    let ran = generate();
    ran.says(&["rank 1"]);
    assert!([INPUT, PEER].contains(&ran.code.unwrap()), "{ran:?}");
    fs::write(&file, &whole).unwrap();
    generate().ok();
}

/// `generate` as rank `rank` of `peers`.
fn as_rank(artifact: &Path, rank: usize, peers: &[String], more: &[&str]) -> Vec<OsString> {
    let (rank, peers) = (rank.to_string(), peers.join(","));
    let args = [text(artifact), "generate", "--rank", &rank, "--peers", &peers];
    args.iter().chain(more).map(OsString::from).collect()
}

/// Ranks started one by one, as on several machines.
#[test]
fn ranks_started_by_hand_answer() {
    let (packed, peers, case) = (Packed::nano(2), addresses(2), &cases()[0]);
    let messages = packed.scratch().join("m.json");
    fs::write(&messages, case.input.to_string()).unwrap();
    let more = ["--messages", text(&messages), "--thinking", "--json", "--draft", "2"];
    // The first one waits for the second, whichever it is.
    for first in [0, 1] {
        let early = start(DSV4_RUN, as_rank(packed.path(), first, &peers, &more));
        std::thread::sleep(Duration::from_millis(150));
        let late = run(DSV4_RUN, as_rank(packed.path(), 1 - first, &peers, &more));
        let early = early.finish();
        let (leader, worker) = if first == 0 { (early, late) } else { (late, early) };
        let answer: Value = serde_json::from_str(leader.ok()).unwrap();
        assert_eq!(answer["completion_tokens"], Value::from(case.completion_tokens.clone()));
        assert_eq!(worker.ok(), "", "only rank 0 answers");
    }
}

#[test]
fn ranks_of_two_artifacts_refuse_each_other() {
    let (ours, theirs, peers) = (Packed::nano(2), Packed::tiny(2), addresses(2));
    let ids = [&ours, &theirs].map(|p| Artifact::open(p.path()).unwrap().manifest().artifact_id.to_string());
    let more = ["--prompt", "a", "--peer-timeout", "10"];
    let worker = start(DSV4_RUN, as_rank(theirs.path(), 1, &peers, &more));
    let leader = run(DSV4_RUN, as_rank(ours.path(), 0, &peers, &more));
    for (ran, [own, other]) in [(leader, [0, 1]), (worker.finish(), [1, 0])] {
        let difference = format!("artifact_id: found {:?}, expected {:?}", ids[other], ids[own]);
        ran.fails(PEER, &["weight_set_id", &difference]);
        assert!(ran.took < SECONDS, "{ran:?}");
    }
}

#[test]
fn ranks_with_other_options_refuse_each_other() {
    let (packed, peers) = (Packed::nano(2), addresses(2));
    let more = ["--prompt", "a", "--peer-timeout", "10"];
    let worker = start(DSV4_RUN, as_rank(packed.path(), 1, &peers, &[&more[..], &["--numerics", "float"]].concat()));
    let leader = run(DSV4_RUN, as_rank(packed.path(), 0, &peers, &more));
    leader.fails(PEER, &["numerics: found \"float\", expected \"published\""]);
    worker.finish().fails(PEER, &["numerics: found \"published\", expected \"float\""]);
}

#[test]
fn a_peer_that_never_comes() {
    let (packed, peers) = (Packed::nano(2), addresses(2));
    for (rank, missing) in [(0, 1), (1, 0)] {
        let args = as_rank(packed.path(), rank, &peers, &["--prompt", "a", "--peer-timeout", "2"]);
        let ran = run(DSV4_RUN, args);
        ran.fails(PEER, &[&format!("rank {missing} ({})", peers[missing]), "is missing"]);
        assert!(ran.took >= Duration::from_millis(1900) && ran.took < SECONDS, "{ran:?}");
    }
}

/// An address that this machine does not have, and one that somebody else listens on.
#[test]
fn an_address_that_cannot_be_listened_on() {
    let (packed, peers) = (Packed::nano(2), addresses(2));
    let taken = std::net::TcpListener::bind(&peers[0]).unwrap();
    let more = ["--prompt", "a", "--peer-timeout", "2"];
    run(DSV4_RUN, as_rank(packed.path(), 0, &peers, &more)).fails(PEER, &["rank 0", &peers[0], "listen"]);
    drop(taken);
    let far = ["192.0.2.1:29500".to_owned(), peers[1].clone()];
    run(DSV4_RUN, as_rank(packed.path(), 0, &far, &more)).fails(PEER, &["rank 0", "192.0.2.1:29500", "listen"]);
}

/// An answer that goes on for a long time: noise, drawn hot.
fn endless(artifact: &Path) -> binaries::Running {
    let more = ["--prompt", "Count.", "--temperature", "100", "--seed", "3", "--draft", "1", "--quiet"];
    let mut running = start(DSV4_RUN, [&[text(artifact), "generate"][..], &more].concat());
    running.await_output(200);
    running
}

/// Waits until a process has ended.
fn await_end(process: u32) {
    let started = Instant::now();
    while is_running(process) {
        assert!(started.elapsed() < SECONDS, "process {process} still runs");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_local_rank_is_killed_in_the_middle_of_an_answer() {
    let packed = Packed::nano(2);
    let running = endless(packed.path());
    let (leader, children) = (running.id(), children(running.id()));
    assert_eq!(children.len(), 1, "one more rank");
    let killed = Instant::now();
    kill(children[0]);
    let ran = running.finish();
    println!("rank 0 ended {:.2?} after rank 1 was killed", killed.elapsed());
    assert!(killed.elapsed() < SECONDS, "{:?}", killed.elapsed());
    assert_eq!(ran.code, Some(PEER), "{}", ran.err);
    ran.says(&["rank 1", &children[0].to_string(), "signal: 9"]);
    assert!(!is_running(leader) && !is_running(children[0]));
}

/// A reader that has enough ends the answer, not with an error.
#[test]
fn standard_output_is_closed_in_the_middle_of_an_answer() {
    let packed = Packed::nano(2);
    let started = Instant::now();
    let script = "\"$0\" \"$1\" generate --prompt Count. --temperature 100 --seed 3 --quiet | head -c 200 | wc -c";
    let program = binaries::path(DSV4_RUN);
    let out = Command::new("sh").args(["-c", script]).arg(program).arg(packed.path()).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&out.stdout).trim(), "200");
    assert_eq!(String::from_utf8_lossy(&out.stderr), "");
    assert!(started.elapsed() < SECONDS, "{:?}", started.elapsed());
}

#[test]
fn rank_0_is_killed_in_the_middle_of_an_answer() {
    let packed = Packed::nano(2);
    let running = endless(packed.path());
    let children = children(running.id());
    assert_eq!(children.len(), 1, "one more rank");
    let killed = Instant::now();
    kill(running.id());
    // Its pipes end when the other rank, which shares them, has ended too.
    let ran = running.finish();
    await_end(children[0]);
    println!("rank 1 ended {:.2?} after rank 0 was killed", killed.elapsed());
    assert!(killed.elapsed() < SECONDS, "{:?}", killed.elapsed());
    assert_eq!(ran.code, None, "{ran:?}");
}

/// The same on two machines, where there is no lifeline but the sockets.
#[test]
fn a_rank_started_by_hand_is_killed_in_the_middle_of_an_answer() {
    let packed = Packed::nano(2);
    for victim in [0, 1] {
        let peers = addresses(2);
        let more = ["--prompt", "Count.", "--temperature", "100", "--seed", "3", "--quiet"];
        let worker = start(DSV4_RUN, as_rank(packed.path(), 1, &peers, &more));
        let mut leader = start(DSV4_RUN, as_rank(packed.path(), 0, &peers, &more));
        leader.await_output(200);
        let killed = Instant::now();
        kill([leader.id(), worker.id()][victim]);
        let ran = if victim == 0 { worker } else { leader }.finish();
        println!("rank {} ended {:.2?} after rank {victim} was killed", 1 - victim, killed.elapsed());
        assert!(killed.elapsed() < SECONDS, "{:?}", killed.elapsed());
        assert_eq!(ran.code, Some(PEER), "{}", ran.err);
        ran.says(&[&format!("rank {victim}")]);
    }
}

/// A file system of a few megabytes, unmounted when dropped.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount(size: &str) -> Option<SmallDisk> {
        let dir = tempfile::tempdir().unwrap();
        let size = format!("size={size}");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(dir.path()).output();
        if mounted.is_ok_and(|o| o.status.success()) {
            return Some(SmallDisk(dir));
        }
        skip("a full disk: no right to mount a tmpfs here");
        None
    }

    fn is_empty(&self) -> bool {
        fs::read_dir(self.0.path()).unwrap().next().is_none()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

#[test]
fn a_full_disk() {
    let Some(disk) = SmallDisk::mount("9M") else { return };
    let out = disk.0.path().join("out.dsv4");
    let nano = format!("{DATA}/nano");
    run(DSV4C, ["pack", &nano, "--tp", "2", "--arch", "none", "-o", text(&out)])
        .fails(INPUT, &["out.dsv4", "disk is full", "bytes"]);
    assert!(disk.is_empty(), "nothing is left");

    let packed = Packed::nano(1);
    let (tokens, out) = (packed.scratch().join("tokens.json"), disk.0.path().join("logits.safetensors"));
    let list: Vec<u32> = (0..1200).map(|i| 20 + i % 500).collect();
    fs::write(&tokens, format!("{list:?}")).unwrap();
    let args = [text(packed.path()), "logits", "--tokens", text(&tokens), "-o", text(&out)];
    run(DSV4_RUN, args).fails(INPUT, &["logits.safetensors", "space"]);
    assert!(disk.is_empty(), "nothing is left");
    // 200 rows fit.
    fs::write(&tokens, format!("{:?}", &list[..200])).unwrap();
    run(DSV4_RUN, args).ok();
}
