//! `plan` against a machine: does it fit, by how much not, and what would.

use std::path::Path;

use serde_json::Value;

use crate::command::{json, run};
use crate::fixture::{NANO, SmallDisk};

const FLASH: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/flash_config.json");
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

fn plan(args: &[&str], dir: &Path) -> Value {
    json(&[&["plan"], args, &["--json"]].concat(), dir)["forecast"].clone()
}

fn number(value: &Value, key: &str) -> u64 {
    value[key].as_u64().unwrap_or_else(|| panic!("{key} of {value}"))
}

/// Bytes and basis of a line.
fn line(lines: &Value, what: &str) -> (u64, String) {
    let found = lines.as_array().unwrap().iter().find(|l| l["what"] == what);
    let found = found.unwrap_or_else(|| panic!("no {what} in {lines}"));
    (number(found, "bytes"), found["basis"].as_str().unwrap().to_owned())
}

/// Flash on two GB10 with a million tokens.
///
/// Weights of a rank, from the published totals: experts, shared experts and embedding with head are halved, and so
/// is the attention, but for `wq_a` and `wkv` (43 x 1536 x 4096 codes, a scale for 128 x 128) and their norms (two bytes
/// a channel), which both ranks have; 43 sinks and 43 scales of `wkv` of 128 bytes are padded to 256. Copied whole are
/// compressors, indexers, hyper-connections, norms and routers, with the expert tables of three layers
/// (129,280 x 6) in 32 bits instead of 64.
#[test]
fn flash_on_two_gb10() {
    let temp = tempfile::tempdir().unwrap();
    let found = plan(&[FLASH, "--tp", "2", "--backend", "cuda"], temp.path());
    let memory = &found["memory"];
    let weights = 80_509_665_280;
    let halved = (147_169_738_752u64 + 1_082_196_480 + 2_118_123_520) / 2;
    let both = 43 * 1536 * 4096;
    let attention = (4_599_478_144 + both + both / (128 * 128) + 43 * 1536 * 2) / 2 + 43 * (128 + 128);
    let copied = 525_722_624 + 275_353_344 + 135_275_592 + 974_868 + 108_834_816 - 3 * 129_280 * 6 * 4;
    let draft = 1_819_594_752;
    // The rest is padding: of the copied tensors to 256 bytes, of 46 sections to 2 MiB.
    let padding = weights - halved - attention - copied - draft;
    assert!(padding < 46 * 2 * MIB, "{padding}");

    assert_eq!(memory["ranks"].as_array().unwrap().len(), 2);
    let lines = &memory["ranks"][1]["lines"];
    assert_eq!(line(lines, "weights"), (weights, "exact".into()));
    // 4096 pages of 256 tokens, each with a number: 21 layers with 64 long (512 bfloat16) and index (128) entries, 20 with
    // 2 long ones; 44 windows of 128 + 16 rows; rings of float32 values and gates, 8 + 16 and 128 + 16 rows.
    let rings = 21 * 2 * (8 + 16) * (1024 + 256) * 4 + 20 * 2 * (128 + 16) * 512 * 4;
    let caches = 4096 * (21 * 64 * (512 + 128) * 2 + 20 * 2 * 512 * 2 + 4) + 44 * 144 * 512 * 2 + rings;
    assert_eq!(line(lines, "KV caches"), (caches, "exact".into()));
    let (workspace, basis) = line(lines, "workspace");
    assert!(basis == "exact" && workspace > 128 * MIB && workspace < GIB, "{workspace}");
    let fixed = [("graphs", 256), ("communication", 1024), ("device context", 512), ("process", 512)];
    for (what, mib) in fixed {
        assert_eq!(line(lines, what), (mib * MIB, "assumed".into()), "{what}");
    }
    assert_eq!(line(lines, "staging"), (256 * MIB, "exact".into()));
    let rank = weights + caches + workspace + (256 + 1024 + 512 + 512 + 256) * MIB;
    assert_eq!(number(&memory["ranks"][0], "bytes"), rank);
    assert_eq!((number(memory, "needed_bytes"), number(memory, "reserve_bytes")), (rank + 6 * GIB, 6 * GIB));
    // A GB10 that shows 119 GiB, of which the system has a 32nd.
    let usable = 119 * GIB - 119 * GIB / 32;
    assert_eq!((number(memory, "machine_bytes"), number(memory, "usable_bytes")), (119 * GIB, usable));
    assert_eq!(
        (&memory["machine_basis"], &memory["fits"], &found["fits"]),
        (&"assumed".into(), &true.into(), &true.into())
    );
    assert_eq!((number(memory, "context"), number(memory, "max_context")), (1 << 20, 1 << 20));

    let disk = &found["disk"];
    let file = 80_511_766_528;
    assert_eq!(line(&disk["lines"], "rank1.weights"), (file, "exact".into()));
    assert_eq!(number(disk, "needed_bytes"), 2 * file + 8 * MIB);
    assert_eq!((&disk["free_bytes"], &disk["fits"]), (&Value::Null, &Value::Null));
    // At 5.58 GB/s: 159.6 GB read, 161 GB written and read back; 80.5 GB loaded.
    let time = &found["time"];
    assert_eq!((time["bytes_per_second"].as_f64(), &time["basis"]), (Some(5.58e9), &"assumed".into()));
    let passed = [159_609_485_896 + 4 * file + 8 * MIB, 159_609_485_896 + 2 * file + 8 * MIB, weights];
    for (line, (bytes, seconds)) in
        time["lines"].as_array().unwrap().iter().zip(passed.into_iter().zip([86.3, 57.5, 14.4]))
    {
        assert_eq!((number(line, "bytes"), &line["basis"]), (bytes, &"assumed".into()));
        assert!((line["seconds"].as_f64().unwrap() - seconds).abs() < 0.1, "{line}");
    }
}

/// A given machine, context and number of sequences: by how much it is too little, and what would fit.
#[test]
fn what_does_not_fit_is_told_with_what_would() {
    let temp = tempfile::tempdir().unwrap();
    let args = [FLASH, "--tp", "2", "--backend", "cuda", "--memory-of", "96G", "--max-seqs", "4"];
    let found = plan(&args, temp.path());
    let memory = &found["memory"];
    let (needed, usable, missing) =
        (number(memory, "needed_bytes"), number(memory, "usable_bytes"), number(memory, "missing_bytes"));
    assert_eq!((usable, missing), (93 * GIB, needed - 93 * GIB));
    assert_eq!(
        (&memory["machine_basis"], &memory["fits"], &found["fits"]),
        (&"given".into(), &false.into(), &false.into())
    );
    let context = number(memory, "max_context").to_string();
    assert!(context.parse::<u64>().unwrap().is_multiple_of(256));
    let (code, text, err) = run(&[&["plan"], &args[..]].concat(), temp.path());
    assert_eq!((code, err.as_str()), (0, ""));
    let gib = missing as f64 / GIB as f64;
    let verdict =
        format!("\nDOES NOT FIT\n  memory: {missing} bytes ({gib:.2} GiB) too little; --max-context {context} fits\n");
    assert!(text.ends_with(&verdict), "{text}");
    // It does fit, and a page more does not.
    let with = |context: String| plan(&[&args[..], &["--max-context", &context]].concat(), temp.path());
    assert_eq!(with(context.clone())["fits"], true);
    let more = with((context.parse::<u64>().unwrap() + 256).to_string());
    assert_eq!(more["fits"], false);
    // A page of each sequence: 1.76 MB of entries.
    assert!(number(&more["memory"], "missing_bytes") < 4 * 1_800_000 + 20 * 4 * 256, "{more}");
}

#[test]
fn more_ranks_or_a_larger_machine() {
    let temp = tempfile::tempdir().unwrap();
    for (args, words, tp) in [
        (vec!["--tp", "1"], "no context fits; --tp 2 fits", Value::from(2)),
        (vec!["--tp", "1", "--memory-of", "60G"], "no context fits; --tp 4 fits", Value::from(4)),
        (vec!["--tp", "4", "--memory-of", "8G"], "for no number of ranks: a machine with more memory", Value::Null),
        (vec!["--tp", "8", "--memory-of", "40G", "--max-seqs", "4096"], "lower --max-seqs", Value::Null),
    ] {
        let args = [&[FLASH], &args[..]].concat();
        let found = plan(&args, temp.path());
        assert_eq!((&found["memory"]["fitting_tp"], &found["memory"]["max_context"]), (&tp, &Value::Null), "{args:?}");
        let (_, text, _) = run(&[&["plan"], &args[..]].concat(), temp.path());
        assert!(text.contains("DOES NOT FIT") && text.contains(words), "{args:?}: {text}");
    }
    let (code, _, err) = run(&["plan", NANO, "--tp", "1", "--max-context", "8193"], temp.path());
    assert!(code == 2 && err.contains("--max-context") && err.contains("at most 8192"), "{err}");
    for (flag, value) in [("--max-context", "0"), ("--disk-gb-s", "0"), ("--disk-gb-s", "nan"), ("--max-seqs", "0")] {
        assert_eq!(run(&["plan", NANO, "--tp", "1", flag, value], temp.path()).0, 2, "{flag} {value}");
    }
}

/// Every figure of the JSON is in the text, under its name, with its basis, and the other way round.
#[test]
fn text_and_json_have_the_same_figures() {
    let temp = tempfile::tempdir().unwrap();
    for backend in ["cpu", "cuda"] {
        let args =
            [FLASH, "--tp", "2", "--backend", backend, "--disk-gb-s", "2", "--memory-of", "128G", "-o", "x.dsv4"];
        let found = plan(&args, temp.path());
        let (code, text, _) = run(&[&["plan"], &args[..]].concat(), temp.path());
        assert_eq!(code, 0);
        let (disk, memory, time) = (&found["disk"], &found["memory"], &found["time"]);
        let mut expected: Vec<(String, u64, String)> = Vec::new();
        for lines in [&disk["lines"], &memory["ranks"][0]["lines"], &time["lines"]] {
            expected.extend(lines.as_array().unwrap().iter().map(|l| {
                let text = |key: &str| l[key].as_str().unwrap().to_owned();
                (text("what"), number(l, "bytes"), text("basis"))
            }));
        }
        let fixed =
            |what: &str, value: &Value, key: &str, basis: &str| (what.to_owned(), number(value, key), basis.to_owned());
        expected.extend([
            fixed("needed", disk, "needed_bytes", "assumed"),
            fixed("left to others", memory, "reserve_bytes", "assumed"),
            fixed("needed", memory, "needed_bytes", "assumed"),
            fixed("machine", memory, "machine_bytes", "given"),
            fixed("taken by its system", memory, "system_bytes", "assumed"),
            fixed("usable", memory, "usable_bytes", "assumed"),
        ]);
        // Name, bytes, size or seconds in two words, basis.
        let forecast = text.split_once("\ndisk:\n").unwrap().1;
        let mut shown: Vec<(String, u64, String)> = Vec::new();
        for line in forecast.lines().filter(|l| l.ends_with("GiB") || l.contains(" GiB  ") || l.contains(" s  ")) {
            let (what, figures) = line.trim_start().split_at_checked(28).unwrap();
            let words: Vec<&str> = figures.split_whitespace().collect();
            shown.push((what.trim().to_owned(), words[0].parse().unwrap(), words[3..].join(" ")));
        }
        // Free space changes between two runs, and the margins with it.
        shown.retain(|(what, ..)| !["free", "to spare", "MISSING"].contains(&what.as_str()));
        expected.sort();
        shown.sort();
        assert_eq!(shown, expected, "{text}");
        assert!(text.contains("time at 2.00 GB/s (given)"), "{text}");
    }
}

/// Free space is that of the file system where the artifact would be, whatever of its path exists.
#[test]
fn a_small_disk_is_told() {
    let Some(small) = SmallDisk::mount(12) else { return };
    let Some(large) = SmallDisk::mount(40) else { return };
    let temp = tempfile::tempdir().unwrap();
    let out = |disk: &SmallDisk| disk.path().join("not/yet/x.dsv4").to_str().unwrap().to_owned();
    let args = |out: &str| ["plan", NANO, "--tp", "2", "-o", out].map(String::from);
    let (small, large) = (out(&small), out(&large));
    let found = plan(&[NANO, "--tp", "2", "-o", &small], temp.path());
    let disk = &found["disk"];
    // Nano's two rank files and what is beside them.
    let needed = 2 * 14_684_160 + 8 * MIB;
    assert_eq!((number(disk, "needed_bytes"), number(disk, "free_bytes")), (needed, 12 * MIB));
    assert_eq!((number(disk, "missing_bytes"), disk["out"].as_str()), (needed - 12 * MIB, Some(small.as_str())));
    assert_eq!((&disk["fits"], &found["memory"]["fits"], &found["fits"]), (&false.into(), &true.into(), &false.into()));
    let (code, text, _) = run(&args(&small).each_ref().map(String::as_str), temp.path());
    let verdict = format!("DOES NOT FIT\n  disk: {} bytes (0.02 GiB) too little; free some", needed - 12 * MIB);
    assert!(code == 0 && text.contains(&verdict), "{text}");
    // A full one.
    std::fs::write(Path::new(&small).ancestors().nth(3).unwrap().join("full"), vec![1; 12 << 20]).unwrap();
    assert_eq!(plan(&[NANO, "--tp", "2", "-o", &small], temp.path())["disk"]["free_bytes"], 0);
    let found = plan(&[NANO, "--tp", "2", "-o", &large], temp.path());
    assert_eq!((&found["disk"]["fits"], &found["fits"]), (&true.into(), &true.into()));
    // And it does.
    std::fs::create_dir_all(Path::new(&large).parent().unwrap()).unwrap();
    assert_eq!(run(&["pack", NANO, "--tp", "2", "--arch", "none", "-o", &large], temp.path()).0, 0);
    let used = std::fs::read_dir(&large).unwrap().map(|e| e.unwrap().metadata().unwrap().len()).sum::<u64>();
    assert!(used <= needed, "{used} of {needed}");
    // Nothing can be made below a file.
    let (code, _, err) = run(&["plan", NANO, "--tp", "2", "-o", &format!("{large}/MANIFEST/x.dsv4")], temp.path());
    assert!(code == 3 && err.contains("free space") && err.contains("MANIFEST"), "{err}");
    // A name alone is here.
    assert!(number(&plan(&[NANO, "--tp", "2", "-o", "x.dsv4"], temp.path())["disk"], "free_bytes") > 0);
}
