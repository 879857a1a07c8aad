//! What happens around a draft: names that are taken, two packers, disks that are full, and what stays
//! behind (nothing).

mod support;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;

use dsv4_format::{Artifact, Draft, DraftOptions, FormatError, NoProgress, Outcome, RankLayout};
use support::{flip, input, layouts, pack, pack_with, plans, write_rank};

fn entries(dir: &Path) -> Vec<String> {
    let name = |entry: std::io::Result<fs::DirEntry>| entry.expect("entry").file_name().into_string().expect("name");
    let mut names: Vec<_> = fs::read_dir(dir).expect("dir").map(name).collect();
    names.sort();
    names
}

fn create(out: &Path) -> Result<Draft, FormatError> {
    Draft::create(out, layouts(), &DraftOptions::default())
}

#[test]
fn the_same_artifact_again_changes_nothing() {
    let dir = tempfile::tempdir().expect("tempdir");
    let out = dir.path().join("a.dsv4");
    let first = pack(&out);
    let receipt = fs::read(out.join("RECEIPT.json")).expect("receipt");
    let second = pack(&out);
    assert_eq!((second.artifact_id, second.outcome), (first.artifact_id, Outcome::AlreadyThere));
    assert_eq!(fs::read(out.join("RECEIPT.json")).expect("receipt"), receipt);
    assert_eq!(entries(dir.path()), ["a.dsv4"]);
}

#[test]
fn another_artifact_is_replaced_only_by_force() {
    let dir = tempfile::tempdir().expect("tempdir");
    let out = dir.path().join("a.dsv4");
    let first = pack(&out);
    let error = pack_with(&out, 1 << 20, "{\"x\":2}", None, false).expect_err("exists");
    let FormatError::Exists { expected, ref found, .. } = error else { panic!("{error}") };
    assert_eq!(*found, first.artifact_id.to_string());
    assert_ne!(expected, first.artifact_id);
    assert!(error.to_string().contains("--force"));
    assert_eq!(Artifact::open(&out).expect("open").manifest().artifact_id, first.artifact_id);
    assert_eq!(entries(dir.path()), ["a.dsv4"]);

    let second = pack_with(&out, 1 << 20, "{\"x\":2}", None, true).expect("force");
    assert_eq!((second.artifact_id, second.outcome), (expected, Outcome::Replaced));
    let there = Artifact::open(&out).expect("open");
    assert_eq!(there.manifest().artifact_id, expected);
    there.verify(&NoProgress).expect("verify");
    assert_eq!(entries(dir.path()), ["a.dsv4"]);
}

#[test]
fn the_same_artifact_damaged_is_not_taken_for_whole() {
    let dir = tempfile::tempdir().expect("tempdir");
    let out = dir.path().join("a.dsv4");
    pack(&out);
    let again = |force| pack_with(&out, 1 << 20, "{}", None, force);
    // In a block, between two sections' tensors, in a compressed file, in MANIFEST.
    for (name, at) in [("rank1.weights", 5 << 20), ("rank0.weights", 1 << 20), ("meta", 20), ("MANIFEST", 5000)] {
        flip(&out.join(name), at);
        let error = again(false).expect_err("damaged");
        assert!(matches!(error, FormatError::Exists { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains("a damaged one") && text.contains(name) && text.contains("--force"), "{text}");
        assert_eq!(text.matches("help:").count(), 1, "{text}");
        assert_eq!(again(true).expect("force").outcome, Outcome::Replaced);
        Artifact::open(&out).expect("open").verify(&NoProgress).expect("whole");
    }
    assert_eq!(entries(dir.path()), ["a.dsv4"]);
}

#[test]
fn ranks_packed_one_after_another_join() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (out, whole) = (dir.path().join("a.dsv4"), dir.path().join("whole.dsv4"));
    pack(&whole);
    let rank = |rank, config, force| pack_with(&out, 1 << 20, config, Some(rank), force).map(|done| done.outcome);
    assert_eq!(rank(0, "{}", false).expect("first"), Outcome::Created);
    let receipt = fs::read(out.join("RECEIPT.json")).expect("receipt");
    assert_eq!(rank(1, "{}", false).expect("second"), Outcome::RankAdded);
    assert_eq!(rank(1, "{}", false).expect("again"), Outcome::AlreadyThere);
    for name in ["MANIFEST", "meta", "rank0.weights", "rank1.weights"] {
        assert!(fs::read(out.join(name)).expect("read") == fs::read(whole.join(name)).expect("read"), "{name}");
    }
    assert_eq!(fs::read(out.join("RECEIPT.json")).expect("receipt"), receipt);

    // One pack of all ranks adds what is lacking too, even if that is everything.
    fs::remove_file(out.join("rank0.weights")).expect("remove");
    assert_eq!(pack_with(&out, 1 << 20, "{}", None, false).expect("all").outcome, Outcome::RankAdded);
    fs::remove_file(out.join("rank0.weights")).expect("remove");
    fs::remove_file(out.join("rank1.weights")).expect("remove");
    assert_eq!(rank(1, "{}", false).expect("the only one"), Outcome::RankAdded);
    assert_eq!(Artifact::open(&out).expect("open").present_ranks(), [1]);

    // A damaged artifact takes no more ranks, and another one none at all.
    flip(&out.join("rank1.weights"), 5 << 20);
    let error = rank(0, "{}", false).expect_err("damaged");
    assert!(error.to_string().contains("a damaged one"), "{error}");
    let error = rank(0, "{\"x\":2}", false).expect_err("another artifact");
    assert!(matches!(error, FormatError::Exists { .. }), "{error}");
    assert_eq!(Artifact::open(&out).expect("open").present_ranks(), [1]);
    assert_eq!(entries(dir.path()), ["a.dsv4", "whole.dsv4"]);
}

/// Replacing one rank's file, or the small files around it, does not cost the other rank's.
#[test]
fn force_keeps_the_other_rank_of_the_same_weights() {
    let dir = tempfile::tempdir().expect("tempdir");
    let out = dir.path().join("a.dsv4");
    pack(&out);
    flip(&out.join("rank1.weights"), 5 << 20);
    flip(&out.join("MANIFEST"), 5000);
    let rank1 = |config| pack_with(&out, 1 << 20, config, Some(1), true).expect("force").outcome;
    assert_eq!(rank1("{}"), Outcome::Replaced);
    let report = Artifact::open(&out).expect("open").verify(&NoProgress).expect("whole");
    assert_eq!(report.ranks, [0, 1]);
    // Another config, the same weights.
    assert_eq!(rank1("{\"x\":2}"), Outcome::Replaced);
    assert_eq!(Artifact::open(&out).expect("open").present_ranks(), [0, 1]);
    // What is not this weight set's is not taken along.
    flip(&out.join("rank0.weights"), 40);
    assert_eq!(rank1("{}"), Outcome::Replaced);
    assert_eq!(Artifact::open(&out).expect("open").present_ranks(), [1]);
    assert_eq!(entries(dir.path()), ["a.dsv4"]);
}

#[test]
fn what_the_disk_did_not_keep_is_found_by_reading_back() {
    let dir = tempfile::tempdir().expect("tempdir");
    let out = dir.path().join("a.dsv4");
    let read_back = |damage: &dyn Fn(&Path)| {
        let mut draft = create(&out).expect("draft");
        let ranks: Vec<_> = (0..2).map(|rank| write_rank(&mut draft, rank, 1 << 20)).collect();
        damage(&dir.path().join(".a.dsv4.partial"));
        draft.read_back(&ranks, &NoProgress)
    };
    read_back(&|_| ()).expect("whole");
    // The first section begins at 2 MiB.
    let error = read_back(&|partial| flip(&partial.join("rank1.weights"), (2 << 20) + (5 << 20))).expect_err("a flip");
    let FormatError::ReadBack { ref file, ref section, block, offset, .. } = error else { panic!("{error}") };
    assert!(file.ends_with(".a.dsv4.partial/rank1.weights") && section == "embedding", "{error}");
    assert_eq!((block, offset), (1, 6 << 20));
    let error = read_back(&|partial| flip(&partial.join("rank0.weights"), 5000)).expect_err("before the sections");
    assert!(matches!(error, FormatError::Padding { offset: 5000, .. }), "{error}");
    assert!(entries(dir.path()).is_empty());
}

#[test]
fn a_partial_with_somebodys_files_is_left_alone() {
    let dir = tempfile::tempdir().expect("tempdir");
    let partial = dir.path().join(".a.dsv4.partial");
    fs::create_dir(&partial).expect("dir");
    for name in ["MANIFEST", "thesis.txt"] {
        fs::write(partial.join(name), b"years of work").expect("write");
    }
    let error = create(&dir.path().join("a.dsv4")).err().expect("occupied");
    assert!(matches!(error, FormatError::Occupied { ref path, .. } if *path == partial), "{error}");
    assert!(error.to_string().contains("thesis.txt"), "{error}");
    assert_eq!(entries(&partial), ["MANIFEST", "thesis.txt"]);
    assert_eq!(entries(dir.path()), [".a.dsv4.partial"]);
}

#[test]
fn what_is_not_an_artifact_is_never_overwritten() {
    let dir = tempfile::tempdir().expect("tempdir");
    let home = dir.path().join("home.dsv4");
    fs::create_dir(&home).expect("dir");
    let empty = dir.path().join("empty.dsv4");
    fs::create_dir(&empty).expect("dir");
    fs::write(home.join("MANIFEST"), b"").expect("write");
    fs::write(home.join("thesis.txt"), b"years of work").expect("write");
    let file = dir.path().join("file.dsv4");
    fs::write(&file, b"a file").expect("write");
    let link = dir.path().join("link.dsv4");
    symlink(&home, &link).expect("link");
    for out in [&home, &empty, &file, &link, Path::new("/"), Path::new("..")] {
        let error = create(out).err().expect("occupied");
        assert!(matches!(error, FormatError::Occupied { .. }), "{error}");
    }
    assert_eq!(fs::read(home.join("thesis.txt")).expect("read"), b"years of work");
    assert_eq!(entries(dir.path()), ["empty.dsv4", "file.dsv4", "home.dsv4", "link.dsv4"]);

    // It appeared while packing: force does not help either.
    let late = dir.path().join("late.dsv4");
    let mut draft = create(&late).expect("draft");
    let ranks = (0..2).map(|rank| write_rank(&mut draft, rank, 1 << 20)).collect();
    fs::create_dir(&late).expect("dir");
    fs::write(late.join("notes"), b"mine").expect("write");
    let error = draft.commit(input(ranks, "{}"), true, &NoProgress).expect_err("occupied");
    assert!(matches!(error, FormatError::Occupied { .. }), "{error}");
    assert_eq!(entries(&late), ["notes"]);
}

#[test]
fn a_second_packer_is_refused_while_the_first_lives() {
    let dir = tempfile::tempdir().expect("tempdir");
    let out = dir.path().join("a.dsv4");
    let mut first = create(&out).expect("first");
    let error = create(&out).err().expect("busy");
    assert!(matches!(error, FormatError::Busy { .. }), "{error}");
    let ranks = (0..2).map(|rank| write_rank(&mut first, rank, 1 << 20)).collect();
    first.commit(input(ranks, "{}"), false, &NoProgress).expect("commit");
    drop(create(&out).expect("free again"));
    assert_eq!(entries(dir.path()), ["a.dsv4"]);
}

#[test]
fn a_dropped_draft_leaves_nothing_and_a_killed_one_is_no_obstacle() {
    let dir = tempfile::tempdir().expect("tempdir");
    let out = dir.path().join("a.dsv4");
    let mut draft = create(&out).expect("draft");
    write_rank(&mut draft, 0, 1 << 20);
    assert_eq!(entries(dir.path()), [".a.dsv4.partial"]);
    drop(draft);
    assert!(entries(dir.path()).is_empty());

    let partial = dir.path().join(".a.dsv4.partial");
    fs::create_dir(&partial).expect("dir");
    for name in ["MANIFEST", "rank0.weights", "rank7.weights"] {
        fs::write(partial.join(name), b"left by a kill").expect("write");
    }
    let error = Artifact::open(&partial).err().expect("never loadable");
    assert!(matches!(error, FormatError::NotAnArtifact { .. }), "{error}");
    pack(&out);
    Artifact::open(&out).expect("open").verify(&NoProgress).expect("verify");
    assert_eq!(entries(dir.path()), ["a.dsv4"]);
}

#[test]
fn bytes_out_of_order_are_refused() {
    let dir = tempfile::tempdir().expect("tempdir");
    let mut draft = create(&dir.path().join("a.dsv4")).expect("draft");
    let mut writer = draft.rank_writer(0).expect("writer");
    writer.append("embed", &[1; 1000]).expect("append");
    let error = writer.append("norm", &[1; 100]).expect_err("embed is not complete");
    assert!(error.to_string().contains("expected tensor embed, found tensor norm"), "{error}");
    let again = writer.append("embed", &[1; 1000]).expect_err("a failed writer stays failed");
    assert!(matches!(again, FormatError::WriterFailed { rank: 0 }));
    assert!(matches!(writer.finish(), Err(FormatError::WriterFailed { rank: 0 })));

    let mut writer = draft.rank_writer(1).expect("writer");
    writer.append("embed", &vec![1; (8 << 20) + 12_345]).expect("append");
    let error = writer.append("embed", &[1; 2]).expect_err("one byte too many");
    assert!(error.to_string().contains("at most 1 more bytes of embed (8400954 in all)"), "{error}");
    drop(writer);

    let mut draft = create(&dir.path().join("b.dsv4")).expect("draft");
    let mut writer = draft.rank_writer(0).expect("writer");
    writer.append("embed", &[1; 1000]).expect("append");
    let error = writer.finish().expect_err("incomplete");
    assert!(error.to_string().contains("tensor embed, found the end after 1000 bytes of it"), "{error}");
}

#[test]
fn contradicting_input_is_refused() {
    let dir = tempfile::tempdir().expect("tempdir");
    let out = dir.path().join("a.dsv4");
    let none = Draft::create(&out, Vec::new(), &DraftOptions::default()).err().expect("no ranks");
    assert!(matches!(none, FormatError::Input { .. }));
    let keep = Draft::create(&out, layouts(), &DraftOptions { only_rank: Some(2) }).err().expect("no such rank");
    assert!(matches!(keep, FormatError::Input { .. }));

    let refuse = |change: &dyn Fn(&mut dsv4_format::CommitInput), expected: &str| {
        let layouts: Vec<_> = (0..2).map(|rank| RankLayout::new(&plans(rank)[2..]).expect("layout")).collect();
        let mut draft = Draft::create(&out, layouts, &DraftOptions::default()).expect("draft");
        let ranks = (0..2).map(|rank| write_rank(&mut draft, rank, 5)).collect();
        let mut input = input(ranks, "{}");
        change(&mut input);
        let error = draft.commit(input, false, &NoProgress).expect_err(expected);
        assert!(error.to_string().contains(expected), "{error}");
        assert!(entries(dir.path()).is_empty());
    };
    refuse(&|input| input.ranks.truncate(1), "finished ranks: expected 2, found 1");
    refuse(&|input| input.ranks.swap(0, 1), "rank 0: expected the draft's layout");
    refuse(&|input| input.config_json.clear(), "config length: expected 1 to");
    refuse(&|input| input.ranks[0].sections[0].root.0[5] ^= 1, "root: expected");
    refuse(
        &|input| input.canary = Some(dsv4_format::Canary { tokens: vec![1], logits: vec![f32::NAN] }),
        "canary logits: expected finite numbers",
    );
}

#[test]
fn a_parent_that_does_not_exist_is_named() {
    let dir = tempfile::tempdir().expect("tempdir");
    let error = create(&dir.path().join("no/a.dsv4")).err().expect("no parent");
    assert!(error.to_string().contains("no/.a.dsv4.partial: cannot create"), "{error}");
}

struct Mount<'a>(&'a Path);

impl Drop for Mount<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0).status();
    }
}

#[test]
fn a_full_disk_is_known_before_the_first_byte() {
    let dir = tempfile::tempdir().expect("tempdir");
    let small = dir.path().join("small");
    fs::create_dir(&small).expect("dir");
    let mount = Command::new("mount").args(["-t", "tmpfs", "-o", "size=24m", "tmpfs"]).arg(&small).output();
    if !mount.is_ok_and(|output| output.status.success()) {
        eprintln!("SKIPPED a_full_disk_is_known_before_the_first_byte: a tmpfs cannot be mounted here");
        return;
    }
    let _mount = Mount(&small);
    let error = create(&small.join("a.dsv4")).err().expect("two ranks of 18 MiB do not fit");
    let FormatError::NoSpace { ref path, needed } = error else { panic!("{error}") };
    assert!(path.ends_with(".a.dsv4.partial/rank1.weights"), "{error}");
    assert_eq!(needed, (18 << 20) + 4096);
    assert!(entries(&small).is_empty());

    // One rank fits, and tmpfs is another file system than the one the other tests use.
    let out = small.join("b.dsv4");
    pack_with(&out, 1 << 20, "{}", Some(0), false).expect("pack");
    let artifact = Artifact::open(&out).expect("open");
    artifact.load_rank(0, 2, &NoProgress).expect("load");
    artifact.verify(&NoProgress).expect("verify");

    // Full only later: what could not be reserved fails when it is written, and leaves nothing.
    fs::remove_dir_all(&out).expect("remove");
    let options = DraftOptions { only_rank: Some(1) };
    let mut draft = Draft::create(&out, layouts(), &options).expect("one rank fits");
    let filler = small.join("filler");
    let full = fs::write(&filler, vec![1; 24 << 20]).expect_err("until the disk is full");
    assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
    let big = vec![("tokenizer.json".into(), support::content(0, "tokenizer", 100_000))];
    let error = draft.write_meta(&big).expect_err("full");
    assert!(matches!(error, FormatError::NoSpace { .. }), "{error}");
    drop(draft);
    assert_eq!(entries(&small), ["filler"]);
}
