//! Kernels change beside rank files that stay the very files they are.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use dsv4_format::{
    ArchKernels, Artifact, Committed, Digest, Draft, FormatError, KernelInput, NewKernels, NoProgress, Outcome,
};
use support::{flip, layouts, meta, pack, pack_small, pack_with, write_rank};

fn kernel(family: &str, n: u8) -> KernelInput {
    KernelInput { family: family.into(), key: Digest([n; 32]), cubin: vec![n; 5000] }
}

fn of(arch: &str, numbers: &[u8]) -> ArchKernels {
    let kernels = numbers.iter().map(|n| kernel("rope", *n)).collect();
    ArchKernels { arch: arch.into(), kernels, tuning: Some(format!("arch = {arch:?}\n")) }
}

fn new(arches: Vec<ArchKernels>) -> NewKernels {
    let receipt = serde_json::Map::from_iter([("kernels".to_owned(), "new".into())]);
    let meta = vec![("op_contract.txt".into(), b"ops, second edition\n".to_vec())];
    NewKernels { arches, op_contract: Digest::of(b"ops 2"), meta, receipt }
}

fn replace(out: &Path, arches: Vec<ArchKernels>) -> Result<Committed, FormatError> {
    Artifact::open(out).expect("open").replace_kernels(&new(arches), false)
}

/// Inode, time of change of the content in nanoseconds, length.
fn identity(path: &Path) -> (u64, i64, u64) {
    let meta = fs::metadata(path).expect("metadata");
    (meta.ino(), meta.mtime() * 1_000_000_000 + meta.mtime_nsec(), meta.len())
}

fn weights(out: &Path) -> Vec<(u64, i64, u64)> {
    (0..2).map(|rank| identity(&out.join(format!("rank{rank}.weights")))).collect()
}

fn names(dir: &Path) -> Vec<String> {
    let name = |e: std::io::Result<fs::DirEntry>| e.expect("entry").file_name().into_string().expect("name");
    let mut names: Vec<String> = fs::read_dir(dir).expect("dir").map(name).collect();
    names.sort();
    names
}

/// The artifact that a pack with these kernels makes at once.
fn packed_at_once(out: &Path, arches: &[ArchKernels]) -> Committed {
    let mut draft = Draft::create(out, layouts(), &Default::default()).expect("draft");
    let ranks = (0..2).map(|rank| write_rank(&mut draft, rank, 1 << 20)).collect();
    let mut members = meta();
    members.extend(new(Vec::new()).meta);
    draft.write_meta(&members).expect("meta");
    for arch in arches {
        draft.write_kernels(&arch.arch, &arch.kernels, arch.tuning.as_deref()).expect("kernels");
    }
    let mut input = support::input(ranks, "{}");
    input.op_contract = Digest::of(b"ops 2");
    draft.commit(input, false, &NoProgress).expect("commit")
}

#[test]
fn kernels_are_added_and_replaced_beside_the_same_rank_files() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (out, other) = (dir.path().join("a.dsv4"), dir.path().join("b.dsv4"));
    pack(&out);
    // A name that leads there does as well.
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&out, &link).expect("symlink");
    let (before, running) = (weights(&out), Artifact::open(&out).expect("open"));
    let done = replace(&link, vec![of("sm_121a", &[1, 2])]).expect("replace");
    assert_eq!(done.outcome, Outcome::Replaced);
    let done = replace(&out, vec![of("sm_90a", &[9]), of("sm_121a", &[3, 2])]).expect("replace");
    assert_eq!((done.outcome, weights(&out)), (Outcome::Replaced, before.clone()));

    let expected = packed_at_once(&other, &[of("sm_90a", &[9]), of("sm_121a", &[2, 3])]);
    assert_eq!((done.artifact_id, done.weight_set_id), (expected.artifact_id, expected.weight_set_id));
    for file in ["MANIFEST", "meta", "kernels.sm_90a", "kernels.sm_121a"] {
        assert!(fs::read(out.join(file)).expect("read") == fs::read(other.join(file)).expect("read"), "{file}");
    }
    let artifact = Artifact::open(&out).expect("open");
    artifact.verify(&NoProgress).expect("verify");
    assert_eq!(artifact.meta("op_contract.txt").expect("meta"), Some(b"ops, second edition\n".to_vec()));
    assert_eq!(artifact.meta("tokenizer.json").expect("meta"), Some(meta()[0].1.clone()));
    assert_eq!(artifact.tuning("sm_90a").expect("tuning"), Some(b"arch = \"sm_90a\"\n".to_vec()));
    let receipt: BTreeMap<String, serde_json::Value> =
        serde_json::from_slice(&fs::read(out.join("RECEIPT.json")).expect("read")).expect("JSON");
    assert_eq!(receipt["kernels"], "new");
    assert_eq!(receipt["artifact_id"], done.artifact_id.to_string());
    assert!(receipt["nanos"].is_u64(), "what was there stays: {receipt:?}");

    // One architecture alone: the other stays.
    replace(&out, vec![of("sm_90a", &[8])]).expect("replace");
    let kernels = Artifact::open(&out).expect("open").manifest().kernels.clone();
    let listed: Vec<_> = kernels.iter().map(|k| (k.arch.as_str(), k.key.0[0])).collect();
    assert_eq!(listed, [("sm_121a", 2), ("sm_121a", 3), ("sm_90a", 8)]);
    Artifact::open(&out).expect("open").verify(&NoProgress).expect("verify");
    // Who opened the artifact before goes on: its weights are where they were.
    running.load_rank(1, 2, &NoProgress).expect("load");
    assert_eq!((weights(&out), names(dir.path())), (before, vec!["a.dsv4".into(), "b.dsv4".into(), "link".into()]));
}

#[test]
fn the_same_kernels_change_nothing() {
    let dir = tempfile::tempdir().expect("tempdir");
    let out = dir.path().join("a.dsv4");
    pack(&out);
    replace(&out, vec![of("sm_121a", &[1])]).expect("replace");
    let before = ["MANIFEST", "RECEIPT.json", "kernels.sm_121a"].map(|name| identity(&out.join(name)));
    let done = replace(&out, vec![of("sm_121a", &[1])]).expect("replace");
    assert_eq!(done.outcome, Outcome::AlreadyThere);
    assert_eq!(before, ["MANIFEST", "RECEIPT.json", "kernels.sm_121a"].map(|name| identity(&out.join(name))));
}

/// Missing, cut or with a wrong bit: the same kernels are no reason to leave it so.
#[test]
fn kernels_that_are_not_as_packed_are_written_anew() {
    let dir = tempfile::tempdir().expect("tempdir");
    let out = dir.path().join("a.dsv4");
    pack(&out);
    let both = || vec![of("sm_121a", &[1]), of("sm_90a", &[2])];
    replace(&out, both()).expect("replace");
    // Of the same MANIFEST, so it holds on.
    fs::write(out.join("SIGNATURE"), "whoever").expect("write");
    let (file, other) = (out.join("kernels.sm_121a"), out.join("kernels.sm_90a"));
    let (whole, before, manifest) = (fs::read(&file).expect("read"), weights(&out), fs::read(out.join("MANIFEST")));
    let damages: [&dyn Fn(&Path); 3] =
        [&|file| fs::remove_file(file).expect("remove"), &|file| flip(file, 9), &|file| {
            fs::write(file, &whole[..whole.len() / 2]).expect("write")
        }];
    for damage in damages {
        damage(&file);
        // Who compiles for another architecture does not vouch for it.
        for arches in [vec![of("sm_90a", &[2])], vec![of("sm_90a", &[3])]] {
            let artifact = Artifact::open(&out).expect("open");
            let error = artifact.replace_kernels(&new(arches), true).expect_err("damaged").to_string();
            assert!(error.contains("kernels.sm_121a"), "{error}");
        }
        let done = replace(&out, both()).expect("replace");
        assert_eq!((done.outcome, weights(&out)), (Outcome::Replaced, before.clone()));
        assert!(fs::read(&file).expect("read") == whole);
        assert_eq!(fs::read(out.join("MANIFEST")).ok(), manifest.as_ref().ok().cloned());
        assert_eq!(fs::read(out.join("SIGNATURE")).expect("read"), b"whoever");
        assert_eq!(replace(&out, both()).expect("replace").outcome, Outcome::AlreadyThere);
    }
    assert_eq!(names(dir.path()), ["a.dsv4"]);
    flip(&other, 9);
    let error = replace(&out, vec![of("sm_121a", &[1])]).expect_err("the other is damaged");
    assert!(matches!(&error, FormatError::Hash { file, .. } if *file == other), "{error}");
}

#[test]
fn a_signature_is_dropped_only_when_told() {
    let dir = tempfile::tempdir().expect("tempdir");
    let out = dir.path().join("a.dsv4");
    pack(&out);
    fs::write(out.join("SIGNATURE"), "whoever").expect("write");
    let before = fs::read(out.join("MANIFEST")).expect("read");
    let error = replace(&out, vec![of("sm_121a", &[1])]).expect_err("signed");
    assert!(matches!(&error, FormatError::Signed { .. }) && error.to_string().contains("--force"), "{error}");
    assert!(fs::read(out.join("MANIFEST")).expect("read") == before);
    let artifact = Artifact::open(&out).expect("open");
    artifact.replace_kernels(&new(vec![of("sm_121a", &[1])]), true).expect("replace");
    assert!(!out.join("SIGNATURE").exists());
    Artifact::open(&out).expect("open").verify(&NoProgress).expect("verify");
}

#[test]
fn what_another_command_left_is_its_own() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (out, partial) = (dir.path().join("a.dsv4"), dir.path().join(".a.dsv4.partial"));
    pack(&out);
    let place = |name: &str| -> PathBuf { partial.join(name) };
    for (left, words) in [("JOURNAL", "interrupted pack"), ("MANIFEST", "interrupted receive")] {
        fs::create_dir(&partial).expect("dir");
        fs::write(place(left), b"something").expect("write");
        let error = replace(&out, vec![of("sm_121a", &[1])]).expect_err("unfinished").to_string();
        assert!(error.contains(words), "{error}");
        assert_eq!(names(&partial), [left]);
        fs::remove_dir_all(&partial).expect("remove");
    }
    // Nobody's: a crash of this very operation, before the exchange of names and after it.
    for left in [vec!["rank0.weights", "RECEIPT.json"], vec!["rank0.weights", "RECEIPT.json", "MANIFEST", "meta"]] {
        fs::create_dir(&partial).expect("dir");
        left.iter().for_each(|name| fs::hard_link(out.join(name), place(name)).expect("link"));
        let n = left.len() as u8;
        replace(&out, vec![of("sm_121a", &[n])]).expect("replace");
        assert!(!partial.exists());
        Artifact::open(&out).expect("open").verify(&NoProgress).expect("verify");
    }
    // An artifact that had no receipt has none where the exchange left it, either.
    fs::create_dir(&partial).expect("dir");
    let files = || names(&out).into_iter().filter(|name| name != "RECEIPT.json");
    files().for_each(|name| fs::hard_link(out.join(&name), place(&name)).expect("link"));
    replace(&out, vec![of("sm_121a", &[7])]).expect("replace");
    assert!(!partial.exists());
    // What an interrupted receive left lacks blocks, and with them superblocks, or a file.
    for lacking in ["rank1.weights", "kernels.sm_121a"] {
        fs::create_dir(&partial).expect("dir");
        let others = files().filter(|name| name != lacking);
        others.for_each(|name| fs::hard_link(out.join(&name), place(&name)).expect("link"));
        if lacking == "rank1.weights" {
            let len = fs::metadata(out.join(lacking)).expect("metadata").len();
            fs::File::create(place(lacking)).and_then(|file| file.set_len(len)).expect("create");
        }
        let before = names(&partial);
        let error = replace(&out, vec![of("sm_121a", &[8])]).expect_err("unfinished");
        assert!(error.to_string().contains("interrupted receive"), "{error}");
        assert_eq!(names(&partial), before);
        fs::remove_dir_all(&partial).expect("remove");
    }
    // Its own directory is not the artifact's either.
    fs::write(out.join("notes.txt"), "mine").expect("write");
    assert!(matches!(replace(&out, vec![of("sm_90a", &[1])]), Err(FormatError::Occupied { .. })));
    assert_eq!(fs::read(out.join("notes.txt")).expect("read"), b"mine");
}

#[test]
fn damaged_members_are_not_carried_on() {
    let dir = tempfile::tempdir().expect("tempdir");
    let out = dir.path().join("a.dsv4");
    pack_small(&out);
    flip(&out.join("meta"), 40);
    let error = replace(&out, vec![of("sm_121a", &[1])]).expect_err("damaged");
    assert!(matches!(error, FormatError::Member { .. } | FormatError::Hash { .. }), "{error}");
    assert_eq!(names(dir.path()), ["a.dsv4"]);
}

#[test]
fn wrong_names_and_repeated_keys_are_refused() {
    let dir = tempfile::tempdir().expect("tempdir");
    let out = dir.path().join("a.dsv4");
    pack_with(&out, 1 << 20, "{}", Some(1), false).expect("pack");
    for (arch, numbers) in [("../x", &[1u8][..]), ("sm_121a", &[1, 1])] {
        let error = replace(&out, vec![of(arch, numbers)]).expect_err(arch);
        assert!(matches!(error, FormatError::Input { .. } | FormatError::Manifest { .. }), "{error}");
    }
    // Of the ranks, those that are here stay.
    replace(&out, vec![of("sm_121a", &[1])]).expect("replace");
    assert_eq!(Artifact::open(&out).expect("open").present_ranks(), [1]);
}
