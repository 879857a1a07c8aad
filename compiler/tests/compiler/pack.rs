//! Packing: the right bytes under the right names, the same bytes every time, nothing after a failure.

use std::cell::RefCell;
use std::fs;
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use dsv4_format::{Artifact, FormatError, NoProgress, Outcome, Progress};
use dsv4_model::layout::Format;
use dsv4_model::tensors::table;
use dsv4_model::{ModelConfig, Tp};
use dsv4c::CompileError;
use dsv4c::pack::{PackOptions, PackReport, pack, pack_and_tell};
use dsv4c::synth::{Layers, SynthOptions, synth};
use serde_json::Value;

use crate::fixture::{NANO, Shard, SmallDisk, TINY, assert_same, copy, names, tensors};

/// Expert numbers 5, 5, 6.
const TWICE: [u8; 24] = [5, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0];

fn options(checkpoint: impl AsRef<Path>, tp: u32, out: &Path) -> PackOptions {
    PackOptions { out: Some(out.to_path_buf()), ..PackOptions::new(checkpoint.as_ref(), tp) }
}

fn packed(checkpoint: impl AsRef<Path>, tp: u32, out: &Path) -> PackReport {
    pack(&options(checkpoint, tp, out), &NoProgress).unwrap()
}

/// On one rank every row is its stored tensors, whole: values, then scales at the next 256 bytes.
#[test]
fn every_tensor_lies_under_its_name() {
    let temp = tempfile::tempdir().unwrap();
    for checkpoint in [NANO, TINY] {
        let out = temp.path().join("one.dsv4");
        let report = pack(&PackOptions { force: true, ..options(checkpoint, 1, &out) }, &NoProgress).unwrap();
        let artifact = Artifact::open(&out).unwrap();
        assert_eq!(artifact.manifest().artifact_id.to_string(), report.artifact_id);
        artifact.verify(&NoProgress).unwrap();
        let arena = artifact.load_rank(0, 2, &NoProgress).unwrap();
        let config = ModelConfig::parse(&artifact.manifest().config_json).unwrap();
        let source = tensors(Path::new(checkpoint));
        let mut seen = 0;
        for row in table(&config) {
            let layout = row.matrix_layout(Tp::ONE).unwrap();
            let bytes = arena.tensor(&row.name).unwrap();
            assert_eq!(bytes.len() as u64, layout.stride * row.matrices());
            for matrix in 0..row.matrices() {
                let place = (layout.stride * matrix) as usize;
                for (part, tensor) in row.stored(matrix).iter().enumerate() {
                    let at = place + if part == 0 { 0 } else { layout.scales_offset as usize };
                    let expected = match row.format {
                        Format::I64 => source[&tensor.name].chunks(8).flat_map(|b| b[..4].to_vec()).collect(),
                        _ => source[&tensor.name].clone(),
                    };
                    assert!(bytes[at..at + expected.len()] == expected, "{}", tensor.name);
                    seen += 1;
                }
            }
        }
        assert_eq!(seen, source.len());
    }
}

#[test]
fn packing_again_elsewhere_with_other_threads_gives_the_same_bytes() {
    let temp = tempfile::tempdir().unwrap();
    for (name, checkpoint) in [("nano", NANO), ("tiny", TINY)] {
        for tp in [1, 2] {
            let elsewhere = temp.path().join(format!("{name}{tp}"));
            fs::create_dir(&elsewhere).unwrap();
            let (a, b) = (temp.path().join(format!("{name}{tp}.dsv4")), elsewhere.join("other.dsv4"));
            let jobs = |n| NonZeroUsize::new(n);
            let first = pack(&PackOptions { jobs: jobs(1), ..options(checkpoint, tp, &a) }, &NoProgress).unwrap();
            let again = copy(checkpoint, &elsewhere.join("copy"));
            let second = pack(&PackOptions { jobs: jobs(2), ..options(again, tp, &b) }, &NoProgress).unwrap();
            assert_eq!(first.artifact_id, second.artifact_id);
            assert_same(&a, &b);
        }
    }
}

/// An embedding of many tiles: tile size follows the memory allowed, the bytes do not.
#[test]
fn memory_does_not_change_a_byte() {
    let temp = tempfile::tempdir().unwrap();
    let checkpoint = wide(temp.path());
    let (a, b) = (temp.path().join("a.dsv4"), temp.path().join("b.dsv4"));
    let whole = packed(&checkpoint, 2, &a);
    let jobs = NonZeroUsize::new(3);
    let tight = PackOptions { jobs, memory: 101 << 20, ..options(&checkpoint, 2, &b) };
    let narrow = pack(&tight, &NoProgress).unwrap();
    assert_eq!((&whole.artifact_id, &whole.source_id), (&narrow.artifact_id, &narrow.source_id));
    assert_same(&a, &b);
    let starved = pack(&PackOptions { memory: 50 << 20, ..tight }, &NoProgress).unwrap_err();
    assert!(matches!(starved, CompileError::Usage { what: "--memory", .. }) && starved.exit_code() == 2, "{starved}");
}

#[test]
fn the_source_id_depends_on_bytes_and_names_not_on_files() {
    let temp = tempfile::tempdir().unwrap();
    let whole = packed(NANO, 1, &temp.path().join("whole.dsv4"));
    // The same tensors in one file, in another order.
    let joined = temp.path().join("joined");
    fs::create_dir(&joined).unwrap();
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        fs::copy(Path::new(NANO).join(name), joined.join(name)).unwrap();
    }
    let mut header = serde_json::Map::new();
    let mut data: Vec<u8> = Vec::new();
    for name in ["model-00002-of-00002.safetensors", "model-00001-of-00002.safetensors"] {
        let shard = Shard::read(&Path::new(NANO).join(name));
        for (tensor, mut entry) in shard.entries().into_iter().rev() {
            let start = data.len();
            data.extend_from_slice(&shard.data[shard.range(&tensor)]);
            entry["data_offsets"] = vec![start, data.len()].into();
            header.insert(tensor, entry);
        }
    }
    let file = joined.join("all.safetensors");
    let mut shard = Shard { header: serde_json::Value::Object(header).to_string(), data };
    shard.write(&file);
    let same = packed(&joined, 1, &temp.path().join("joined.dsv4"));
    assert_eq!((&whole.source_id, &whole.artifact_id), (&same.source_id, &same.artifact_id));
    let at = shard.range("embed.weight").start;
    shard.data[at] ^= 1;
    shard.write(&file);
    let other = packed(&joined, 1, &temp.path().join("other.dsv4"));
    assert_ne!(whole.source_id, other.source_id);
    assert_ne!(whole.weight_set_id, other.weight_set_id);
}

#[test]
fn side_files_come_along_and_may_be_absent() {
    let temp = tempfile::tempdir().unwrap();
    packed(NANO, 1, &temp.path().join("nano.dsv4"));
    packed(TINY, 1, &temp.path().join("tiny.dsv4"));
    let nano = Artifact::open(&temp.path().join("nano.dsv4")).unwrap();
    let tiny = Artifact::open(&temp.path().join("tiny.dsv4")).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        assert_eq!(nano.meta(name).unwrap(), Some(fs::read(Path::new(NANO).join(name)).unwrap()));
        assert_eq!(tiny.meta(name).unwrap(), None);
    }
    assert_eq!(nano.meta("conversations.json").unwrap(), None);
}

#[test]
fn a_name_that_is_taken() {
    let temp = tempfile::tempdir().unwrap();
    let out = temp.path().join("x.dsv4");
    assert_eq!(packed(NANO, 1, &out).outcome, Outcome::Created);
    assert_eq!(packed(NANO, 1, &out).outcome, Outcome::AlreadyThere);
    for (checkpoint, tp) in [(TINY, 1), (NANO, 2)] {
        let error = pack(&options(checkpoint, tp, &out), &NoProgress).unwrap_err();
        assert!(matches!(error, CompileError::OtherArtifact { .. }) && error.exit_code() == 3, "{error}");
    }
    // Other values under the same config: only packing tells.
    let other = copy(NANO, &temp.path().join("other"));
    let file = other.join("model-00001-of-00002.safetensors");
    let mut shard = Shard::read(&file);
    shard.data[0] ^= 1;
    shard.write(&file);
    let error = pack(&options(&other, 1, &out), &NoProgress).unwrap_err();
    assert!(matches!(error, CompileError::Format(FormatError::Exists { .. })) && error.exit_code() == 3, "{error}");
    let forced = pack(&PackOptions { force: true, ..options(&other, 1, &out) }, &NoProgress).unwrap();
    assert_eq!(forced.outcome, Outcome::Replaced);
    assert_eq!(names(temp.path()), ["other", "x.dsv4"]);
}

#[test]
fn one_rank_has_the_ids_of_all() {
    let temp = tempfile::tempdir().unwrap();
    let (all, one) = (temp.path().join("all.dsv4"), temp.path().join("one.dsv4"));
    let whole = packed(NANO, 2, &all);
    let half = pack(&PackOptions { rank: Some(1), ..options(NANO, 2, &one) }, &NoProgress).unwrap();
    assert_eq!(whole.artifact_id, half.artifact_id);
    assert_eq!(Artifact::open(&one).unwrap().present_ranks(), [1]);
    assert!(fs::read(all.join("rank1.weights")).unwrap() == fs::read(one.join("rank1.weights")).unwrap());
    let error = pack(&PackOptions { rank: Some(2), ..options(NANO, 2, &one) }, &NoProgress).unwrap_err();
    assert_eq!(error.exit_code(), 2, "{error}");
}

/// What went wrong, and that nothing stayed.
fn refused(checkpoint: &Path, tp: u32) -> CompileError {
    let temp = tempfile::tempdir().unwrap();
    let error = pack(&options(checkpoint, tp, &temp.path().join("x.dsv4")), &NoProgress).unwrap_err();
    assert!(names(temp.path()).is_empty(), "{:?}", names(temp.path()));
    error
}

#[test]
fn a_tp_that_cuts_a_tile_names_the_tensor() {
    for checkpoint in [NANO, TINY] {
        let error = refused(Path::new(checkpoint), 4);
        assert!(
            error.to_string().contains("tensor layers.0.attn.wq_b") && error.to_string().contains("--tp 1, 2"),
            "{error}"
        );
        assert_eq!(error.exit_code(), 3);
    }
    assert_eq!(refused(Path::new(NANO), 3).exit_code(), 2);
}

#[test]
fn values_no_kernel_can_use_are_named() {
    let temp = tempfile::tempdir().unwrap();
    for (tensor, at, value, expected) in [
        ("layers.1.attn.wkv.weight", 1234, &[0xff][..], "element 1234 is NaN (code 0xff)"),
        ("layers.1.attn.wkv.scale", 1, &[0xff], "element 1 is NaN (code 0xff)"),
        ("layers.1.ffn.experts.5.w2.scale", 77, &[0xff], "element 77 is NaN (code 0xff)"),
        (
            "layers.0.ffn.gate.tid2eid",
            80,
            &[8, 0, 0, 0, 0, 0, 0, 0],
            "element 10 is 8, expected an expert number in 0..8",
        ),
        ("layers.0.ffn.gate.tid2eid", 0, &[0xff; 8], "element 0 is -1"),
        // All three experts of token 3.
        ("layers.0.ffn.gate.tid2eid", 72, &TWICE, "element 10 is 5 again, expected different experts in row 3"),
        ("embed.weight", 2 * 3001, &[0x80, 0xff], "element 3001 is -inf (BF16 0xff80), expected a finite number"),
        ("hc_head_base", 4, &[1, 0, 0xc0, 0x7f], "element 1 is NaN (F32 0x7fc00001), expected a finite number"),
    ] {
        let dir = temp.path().join(format!("{tensor}.{at}"));
        copy(TINY, &dir);
        let file = dir.join("tiny.safetensors");
        let mut shard = Shard::read(&file);
        let start = shard.range(tensor).start + at;
        shard.data[start..start + value.len()].copy_from_slice(value);
        shard.write(&file);
        let error = refused(&dir, 2).to_string();
        assert!(error.starts_with(tensor) && error.contains(expected), "{error}");
    }
}

#[test]
fn a_full_disk_is_an_error_and_leaves_nothing() {
    let Some(disk) = SmallDisk::mount(12) else { return };
    let error = pack(&options(NANO, 2, &disk.path().join("x.dsv4")), &NoProgress).unwrap_err();
    assert!(matches!(error, CompileError::Format(FormatError::NoSpace { .. })), "{error}");
    assert!(names(disk.path()).is_empty());
}

/// Compiling takes minutes; what is there already, or was reserved, needs no room.
#[test]
fn a_full_disk_is_known_before_kernels_are_compiled() {
    let Some(disk) = SmallDisk::mount(20) else { return };
    let arches = vec!["sm_121a".into()];
    let usual = PackOptions { arches, nvrtc: Some("/nowhere".into()), ..options(NANO, 2, &disk.path().join("x.dsv4")) };
    let error = pack(&usual, &NoProgress).unwrap_err();
    let CompileError::Format(FormatError::NoSpace { needed, .. }) = error else { panic!("{error}") };
    assert!(needed > 20 << 20 && names(disk.path()).is_empty());
    let one = PackOptions { rank: Some(1), ..usual };
    assert!(matches!(pack(&one, &NoProgress).unwrap_err(), CompileError::NoNvrtc { .. }));
}

#[test]
fn ranks_packed_one_after_another_are_one_artifact() {
    let temp = tempfile::tempdir().unwrap();
    let (all, one) = (temp.path().join("all.dsv4"), temp.path().join("one.dsv4"));
    packed(NANO, 2, &all);
    let rank = |rank, force| {
        let report = pack(&PackOptions { rank: Some(rank), force, ..options(NANO, 2, &one) }, &NoProgress);
        report.unwrap().outcome
    };
    assert_eq!(rank(0, false), Outcome::Created);
    assert_eq!(rank(1, false), Outcome::RankAdded);
    assert_same(&all, &one);
    assert_eq!(rank(1, true), Outcome::Replaced);
    assert_same(&all, &one);
    assert_eq!(names(temp.path()), ["all.dsv4", "one.dsv4"]);
}

/// Spoils a byte of a rank's file as soon as reading back begins.
struct BadDisk(PathBuf);

impl Progress for BadDisk {
    fn start(&self, what: &str, _total_bytes: u64) {
        if what == "read back" {
            let file = fs::OpenOptions::new().read(true).write(true).open(&self.0).unwrap();
            let mut byte = [0];
            file.read_exact_at(&mut byte, (2 << 20) + 7).unwrap();
            file.write_all_at(&[byte[0] ^ 1], (2 << 20) + 7).unwrap();
        }
    }

    fn add(&self, _bytes: u64) {}

    fn finish(&self) {}
}

#[test]
fn what_the_disk_did_not_keep_gets_no_name() {
    let temp = tempfile::tempdir().unwrap();
    let out = temp.path().join("x.dsv4");
    let disk = BadDisk(temp.path().join(".x.dsv4.partial/rank1.weights"));
    let error = pack(&options(NANO, 2, &out), &disk).unwrap_err();
    let CompileError::Format(FormatError::ReadBack { block: 0, offset, .. }) = error else { panic!("{error}") };
    assert_eq!((offset, error.exit_code()), (2 << 20, 3));
    assert!(names(temp.path()).is_empty());
    // Without reading back it goes unseen until somebody verifies.
    let unread = PackOptions { read_back: false, ..options(NANO, 2, &out) };
    assert_eq!(pack(&unread, &disk).unwrap().read_back_seconds, None);
}

#[test]
fn a_tokenizer_that_does_not_fit_is_named_by_file_and_field() {
    let temp = tempfile::tempdir().unwrap();
    let dir = copy(NANO, &temp.path().join("nano"));
    let edited = |name: &str, edit: &dyn Fn(&str) -> String| {
        let file = dir.join(name);
        let text = fs::read_to_string(&file).unwrap();
        let new = edit(&text);
        assert_ne!(text, new);
        fs::write(&file, new).unwrap();
        let error = refused(&dir, 1);
        fs::write(&file, text).unwrap();
        assert!(matches!(error, CompileError::SideFile { .. }) && error.exit_code() == 3, "{error}");
        let text = error.to_string();
        assert!(text.contains("help:"), "{text}");
        text
    };
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        let error = edited(name, &|text| text.replacen('{', "[", 1));
        assert!(error.contains(name) && error.contains("text: expected JSON"), "{error}");
        assert!(edited(name, &|_| "<html>404</html>".into()).contains(name));
    }
    let tokenizer = |change: &dyn Fn(&mut Value)| {
        edited("tokenizer.json", &|text| {
            let mut value: Value = serde_json::from_str(text).unwrap();
            change(&mut value);
            value.to_string()
        })
    };
    let error = tokenizer(&|t| t["model"]["vocab"]["zz"] = 2048.into());
    assert!(error.contains("model.vocab[\"zz\"]: expected an id below vocab_size = 2048"), "{error}");
    let error = tokenizer(&|t| t["added_tokens"][3]["id"] = 4096.into());
    assert!(error.contains("added_tokens[3].id") && error.contains("found 4096"), "{error}");
    let error = tokenizer(&|t| t["model"]["vocab"]["zz"] = Value::from(-1));
    assert!(error.contains("text: expected JSON"), "{error}");
    // Token 1, the end, is no longer there.
    let error = tokenizer(&|t| {
        t["added_tokens"][1]["id"] = 7.into();
        t["model"]["vocab"].as_object_mut().unwrap().retain(|_, id| *id != 1);
    });
    assert!(error.contains("eos_token_id"), "{error}");
    packed(&dir, 1, &temp.path().join("x.dsv4"));
}

/// Ends a pack, as a kill would, as soon as its journal has grown.
struct EndsAtMark {
    journal: PathBuf,
    before: u64,
}

impl EndsAtMark {
    fn new(out: &Path) -> EndsAtMark {
        let name = out.file_name().unwrap().to_str().unwrap();
        let journal = out.with_file_name(format!(".{name}.partial/JOURNAL"));
        let before = len(&journal);
        EndsAtMark { journal, before }
    }
}

fn len(file: &Path) -> u64 {
    fs::metadata(file).map_or(0, |meta| meta.len())
}

/// Length of the record that is there before any mark: a number, a check, and what the number counts.
fn first_record(journal: &Path) -> u64 {
    let mut bytes = [0; 4];
    let read = fs::File::open(journal).and_then(|file| file.read_exact_at(&mut bytes, 0));
    read.map_or(u64::MAX, |()| 20 + u64::from(u32::from_le_bytes(bytes)))
}

impl Progress for EndsAtMark {
    fn start(&self, _what: &str, _total_bytes: u64) {}

    fn add(&self, _bytes: u64) {
        if len(&self.journal) > self.before.max(first_record(&self.journal)) {
            resume_unwind(Box::new("killed"));
        }
    }

    fn finish(&self) {}
}

/// The report, or nothing when the pack was ended at its next mark; and what it told.
fn until_next_mark(options: &PackOptions) -> (Option<PackReport>, Vec<String>) {
    let told = RefCell::new(Vec::new());
    let tell = |line: &str| told.borrow_mut().push(line.to_owned());
    let progress = EndsAtMark::new(options.out.as_ref().unwrap());
    let report = catch_unwind(AssertUnwindSafe(|| pack_and_tell(options, &progress, &tell).unwrap())).ok();
    (report, told.into_inner())
}

/// A checkpoint with an embedding of many tiles.
fn wide(dir: &Path) -> PathBuf {
    let config = fs::read_to_string(Path::new(NANO).join("config.json")).unwrap();
    let path = dir.join("config.json");
    fs::write(&path, config.replace("\"vocab_size\": 2048", "\"vocab_size\": 65536")).unwrap();
    let out = dir.join("wide");
    let options = SynthOptions { config: path, out: out.clone(), layers: Layers::First(1), seed: 5, shards: None };
    synth(&options, &NoProgress).unwrap();
    out
}

#[test]
fn interrupted_after_every_mark_with_other_threads_and_memory_it_is_the_same_artifact() {
    let temp = tempfile::tempdir().unwrap();
    let wide = wide(temp.path());
    for (checkpoint, tp, rank) in [(Path::new(NANO), 2, None), (&wide, 2, None), (&wide, 2, Some(1)), (&wide, 1, None)]
    {
        let (whole, out) = (temp.path().join("whole.dsv4"), temp.path().join("x.dsv4"));
        let expected = pack(&PackOptions { rank, ..options(checkpoint, tp, &whole) }, &NoProgress).unwrap();
        let mut interruptions = 0;
        let mut there = 0;
        let report = loop {
            let jobs = NonZeroUsize::new(1 + interruptions % 3);
            let memory = [101 << 20, 300 << 20, 2 << 30, 120 << 20][interruptions % 4];
            let again = PackOptions { rank, jobs, memory, journal_every: 1 << 20, ..options(checkpoint, tp, &out) };
            let (report, told) = until_next_mark(&again);
            if interruptions > 0 {
                let [line] = told.as_slice() else { panic!("{told:?}") };
                let line = line.strip_prefix("goes on with a pack that was interrupted: ").unwrap();
                let words: Vec<&str> = line.split(' ').collect();
                let (now, all) = (words[0].parse::<u64>().unwrap(), words[2].parse::<u64>().unwrap());
                assert!(there < now && now <= all && all == expected.source_bytes, "{there}: {line}");
                there = now;
            }
            match report {
                Some(report) => break report,
                None => interruptions += 1,
            }
        };
        assert!(interruptions > 4, "{interruptions}");
        assert_eq!((&report.artifact_id, &report.source_id), (&expected.artifact_id, &expected.source_id));
        assert_eq!((report.resumed_bytes, report.read_bytes), (there, expected.source_bytes - there));
        assert_eq!((expected.resumed_bytes, expected.read_bytes), (0, expected.source_bytes));
        assert_same(&whole, &out);
        assert!(report.to_text().contains(&format!("{there} bytes were there from an interrupted pack")));
        for dir in [whole, out] {
            fs::remove_dir_all(dir).unwrap();
        }
    }
    assert_eq!(names(temp.path()), ["config.json", "wide"]);
}

#[test]
fn a_changed_checkpoint_starts_over_and_says_so() {
    let temp = tempfile::tempdir().unwrap();
    let checkpoint = copy(NANO, &temp.path().join("nano"));
    let out = temp.path().join("x.dsv4");
    let usual = PackOptions { journal_every: 1 << 20, ..options(&checkpoint, 2, &out) };
    let shard = checkpoint.join("model-00002-of-00002.safetensors");
    let touched = || {
        let later = SystemTime::now() + Duration::from_nanos(1);
        fs::File::options().write(true).open(&shard).unwrap().set_modified(later).unwrap();
    };
    // As `cp -p`: same length, same time, another file.
    let copied = || {
        let other = checkpoint.join("other");
        fs::copy(&shard, &other).unwrap();
        let time = fs::metadata(&shard).unwrap().modified().unwrap();
        fs::File::options().write(true).open(&other).unwrap().set_modified(time).unwrap();
        fs::rename(&other, &shard).unwrap();
    };
    let expected = packed(NANO, 2, &temp.path().join("whole.dsv4"));
    for (change, first) in
        [(&touched as &dyn Fn(), "starts over"), (&copied as &dyn Fn(), "starts over"), (&|| (), "goes on")]
    {
        assert!(until_next_mark(&usual).0.is_none());
        change();
        let (_, told) = until_next_mark(&usual);
        assert!(told.len() == 1 && told[0].starts_with(first), "{told:?}");
        assert!(first != "starts over" || told[0].contains("the checkpoint's files, its config or this"), "{told:?}");
        let fresh = PackOptions { fresh: true, ..usual.clone() };
        let (report, told) = until_next_mark(&fresh);
        assert!(report.is_none() && told.is_empty(), "{told:?}");
        let report = pack(&fresh, &NoProgress).unwrap();
        assert_eq!((report.resumed_bytes, &report.artifact_id), (0, &expected.artifact_id));
        assert_same(&out, &temp.path().join("whole.dsv4"));
        fs::remove_dir_all(&out).unwrap();
    }
    assert_eq!(names(temp.path()), ["nano", "whole.dsv4"]);
}

#[test]
fn a_pack_of_something_else_does_not_discard_one_that_was_interrupted() {
    let temp = tempfile::tempdir().unwrap();
    let out = temp.path().join("x.dsv4");
    let usual = PackOptions { journal_every: 1 << 20, ..options(NANO, 2, &out) };
    assert!(until_next_mark(&usual).0.is_none());
    for (other, words) in [
        (PackOptions { tp: 1, ..usual.clone() }, "nano with --tp 1 left"),
        (PackOptions { rank: Some(1), ..usual.clone() }, "nano with --tp 2 --rank 1 left"),
        (PackOptions { checkpoint: TINY.into(), ..usual.clone() }, "tiny with --tp 2 left"),
        (PackOptions { checkpoint: TINY.into(), force: true, ..usual.clone() }, "tiny with --tp 2 left"),
    ] {
        let error = pack(&other, &NoProgress).unwrap_err();
        assert!(matches!(error, CompileError::Format(FormatError::Unfinished { .. })), "{error}");
        let text = error.to_string();
        assert!(
            text.contains(words) && text.contains("nano with --tp 2 left\n  help:") && error.exit_code() == 3,
            "{text}"
        );
    }
    let (report, told) = until_next_mark(&usual);
    assert!(told[0].starts_with("goes on with") && report.is_none(), "{told:?}");
    let other = pack(&PackOptions { checkpoint: TINY.into(), fresh: true, ..usual }, &NoProgress).unwrap();
    assert_eq!(other.resumed_bytes, 0);
    assert_eq!(names(temp.path()), ["x.dsv4"]);
}

/// Without reading back, what an interrupted pack wrote is read back all the same.
#[test]
fn what_was_damaged_between_two_attempts_gets_no_name() {
    let temp = tempfile::tempdir().unwrap();
    let checkpoint = wide(temp.path());
    let out = temp.path().join("x.dsv4");
    // Tiles of about 1 MiB.
    let (jobs, memory) = (NonZeroUsize::new(1), 49 << 20);
    let small = PackOptions { jobs, memory, journal_every: 1 << 20, ..options(&checkpoint, 1, &out) };
    let unread = PackOptions { read_back: false, ..small };
    let file = temp.path().join(".x.dsv4.partial/rank0.weights");
    let interrupted = || {
        // A block is 4 MiB: eight marks cover at least one.
        for _ in 0..8 {
            assert!(until_next_mark(&unread).0.is_none());
        }
    };
    interrupted();
    let rank = fs::File::options().read(true).write(true).open(&file).unwrap();
    let mut byte = [0];
    rank.read_exact_at(&mut byte, (2 << 20) + 7).unwrap();
    rank.write_all_at(&[byte[0] ^ 1], (2 << 20) + 7).unwrap();
    let error = pack(&unread, &NoProgress).unwrap_err();
    assert!(matches!(error, CompileError::Format(FormatError::ReadBack { block: 0, .. })), "{error}");
    assert_eq!(names(temp.path()), ["config.json", "wide"]);
    interrupted();
    let report = pack(&unread, &NoProgress).unwrap();
    assert!(report.resumed_bytes > 0 && report.read_back_seconds.is_some());
    Artifact::open(&out).unwrap().verify(&NoProgress).unwrap();
}

/// The largest step of progress while packing.
#[derive(Default)]
struct Steps(AtomicU64);

impl Progress for Steps {
    fn start(&self, what: &str, _total_bytes: u64) {
        if what == "read back" {
            resume_unwind(Box::new("it is packed"));
        }
    }

    fn add(&self, bytes: u64) {
        self.0.fetch_max(bytes, Ordering::Relaxed);
    }

    fn finish(&self) {}
}

#[test]
fn marks_can_be_as_near_as_asked_for() {
    let temp = tempfile::tempdir().unwrap();
    let checkpoint = wide(temp.path());
    for (journal_every, most) in [(1 << 20, 512 << 10), (4 << 20, 2 << 20)] {
        let options =
            PackOptions { journal_every, fresh: true, ..options(&checkpoint, 2, &temp.path().join("x.dsv4")) };
        let steps = Steps::default();
        catch_unwind(AssertUnwindSafe(|| pack(&options, &steps))).unwrap_err();
        let largest = steps.0.load(Ordering::Relaxed);
        assert!(most / 2 < largest && largest <= most, "{largest} bytes at once, {most} wanted");
    }
}

/// What is in the partial artifact whenever packing begins.
struct Looking {
    partial: PathBuf,
    seen: Mutex<Vec<Vec<String>>>,
}

impl Progress for Looking {
    fn start(&self, what: &str, _total_bytes: u64) {
        if what == "pack" {
            self.seen.lock().unwrap().push(names(&self.partial));
        }
    }

    fn add(&self, _bytes: u64) {}

    fn finish(&self) {}
}

#[test]
fn onto_the_same_artifact_no_weights_are_written() {
    let temp = tempfile::tempdir().unwrap();
    let out = temp.path().join("x.dsv4");
    packed(NANO, 2, &out);
    let again = |rank| {
        let seen = Mutex::new(Vec::new());
        let looking = Looking { partial: temp.path().join(".x.dsv4.partial"), seen };
        let report = pack(&PackOptions { rank, ..options(NANO, 2, &out) }, &looking).unwrap();
        (report.outcome, looking.seen.into_inner().unwrap())
    };
    let only = |names: &[&str]| vec![names.iter().map(|name| name.to_string()).collect::<Vec<_>>()];
    assert_eq!(again(None), (Outcome::AlreadyThere, only(&["JOURNAL"])));
    fs::remove_file(out.join("rank0.weights")).unwrap();
    assert_eq!(again(Some(1)), (Outcome::AlreadyThere, only(&["JOURNAL"])));
    assert_eq!(again(None), (Outcome::RankAdded, only(&["JOURNAL", "rank0.weights"])));
    Artifact::open(&out).unwrap().verify(&NoProgress).unwrap();
    assert_eq!(names(temp.path()), ["x.dsv4"]);
}

#[test]
fn a_fault_of_the_checkpoint_leaves_no_marks() {
    let temp = tempfile::tempdir().unwrap();
    let checkpoint = copy(TINY, &temp.path().join("tiny"));
    let out = temp.path().join("x.dsv4");
    let file = checkpoint.join("tiny.safetensors");
    let mut shard = Shard::read(&file);
    // Of the last section.
    let at = shard.range("hc_head_base").start;
    shard.data[at..at + 4].copy_from_slice(&[0, 0, 0xc0, 0x7f]);
    shard.write(&file);
    let usual = PackOptions { journal_every: 1 << 20, ..options(&checkpoint, 2, &out) };
    let error = pack(&usual, &NoProgress).unwrap_err();
    assert!(matches!(error, CompileError::Value { .. }), "{error}");
    assert_eq!(names(temp.path()), ["tiny"]);
    let error = pack(&PackOptions { journal_every: 1 << 10, ..usual }, &NoProgress).unwrap_err();
    assert!(matches!(error, CompileError::Usage { what: "--journal-every", .. }) && error.exit_code() == 2, "{error}");
}

/// Fills a disk as soon as reading back begins: what is small and last finds no place.
struct Filler(PathBuf);

impl Progress for Filler {
    fn start(&self, what: &str, _total_bytes: u64) {
        if what == "read back" {
            let mut size = 1 << 24;
            let file = fs::File::create(&self.0).unwrap();
            let mut at = 0;
            while size >= 4096 {
                match file.write_at(&vec![1; size], at) {
                    Ok(n) => at += n as u64,
                    Err(_) => size /= 2,
                }
            }
        }
    }

    fn add(&self, _bytes: u64) {}

    fn finish(&self) {}
}

#[test]
fn a_fault_of_the_machine_keeps_what_is_done() {
    let Some(disk) = SmallDisk::mount(64) else { return };
    let (out, filler) = (disk.path().join("x.dsv4"), disk.path().join("filler"));
    let usual = options(NANO, 2, &out);
    let error = pack(&usual, &Filler(filler.clone())).unwrap_err();
    let CompileError::Format(FormatError::Kept { ref source, .. }) = error else { panic!("{error}") };
    assert!(matches!(**source, FormatError::NoSpace { .. }) && error.exit_code() == 3, "{error}");
    assert!(error.to_string().contains("kept") && error.to_string().contains("the same command goes on"), "{error}");
    assert_eq!(names(disk.path()), [".x.dsv4.partial", "filler"]);
    fs::remove_file(&filler).unwrap();
    let report = pack(&usual, &NoProgress).unwrap();
    assert_eq!((report.resumed_bytes, report.read_bytes), (report.source_bytes, 0));
    let temp = tempfile::tempdir().unwrap();
    packed(NANO, 2, &temp.path().join("whole.dsv4"));
    assert_same(&temp.path().join("whole.dsv4"), &out);
}

/// Kernels are no part of what a journal is about: they are compiled again, and may be others.
#[test]
fn an_interrupted_pack_goes_on_with_other_kernels() {
    if let Err(error) = dsv4c::kernels::find(None) {
        eprintln!("SKIPPED: {error}");
        assert!(std::env::var_os("DSV4_NO_SKIPS").is_none(), "skips are not allowed");
        return;
    }
    let temp = tempfile::tempdir().unwrap();
    let out = temp.path().join("x.dsv4");
    let first = PackOptions { journal_every: 1 << 20, ..options(Path::new(NANO), 2, &out) };
    assert!(until_next_mark(&first).0.is_none());
    let again = PackOptions { arches: vec!["sm_121a".into()], ..first };
    let report = pack(&again, &NoProgress).unwrap();
    assert!(report.resumed_bytes > 0 && report.kernels[0].kernels > 20, "{report:?}");
    let artifact = Artifact::open(&out).unwrap();
    artifact.verify(&NoProgress).unwrap();
    assert_eq!(artifact.manifest().kernels.len(), report.kernels[0].kernels);
}
