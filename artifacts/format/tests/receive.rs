//! An artifact put together from pieces in any order, in two attempts; and signatures added to one.

mod support;

use std::fs;
use std::path::Path;

use dsv4_format::io::AlignedBuf;
use dsv4_format::{Artifact, BLOCK_BYTES, FormatError, NoProgress, Outcome, Receiving};
use support::{open_error, pack, pack_with};

fn begin(out: &Path, from: &Path, ranks: &[u32], force: bool) -> Result<Receiving, FormatError> {
    let receiving = Receiving::begin(out, &fs::read(from.join("MANIFEST")).expect("MANIFEST"), ranks, force)?;
    receiving.examine(&NoProgress)?;
    Ok(receiving)
}

/// Puts the last `blocks` blocks of a rank, last first.
fn put_blocks(receiving: &Receiving, from: &Path, rank: u32, blocks: usize) {
    let artifact = Artifact::open(from).expect("open");
    let reader = artifact.rank_reader(rank).expect("reader");
    let mut buf = AlignedBuf::new(BLOCK_BYTES as usize).expect("buffer");
    for (number, block) in reader.blocks().iter().enumerate().rev().take(blocks) {
        let bytes = &mut buf[..block.len];
        reader.read(block, bytes).expect("read");
        bytes[block.len / 2] ^= 1;
        assert!(!receiving.put_block(rank, number as u32, bytes).expect("put"), "block {number} is wrong");
        bytes[block.len / 2] ^= 1;
        assert!(receiving.put_block(rank, number as u32, bytes).expect("put"), "block {number}");
    }
}

fn put_file(receiving: &Receiving, from: &Path, damage: bool) -> bool {
    let bytes = fs::read(from.join("meta")).expect("meta");
    let mut buf = AlignedBuf::new(BLOCK_BYTES as usize).expect("buffer");
    buf[..bytes.len()].copy_from_slice(&bytes);
    buf[3] ^= u8::from(damage);
    receiving.put_file(0, &mut buf, bytes.len()).expect("put")
}

fn assert_same(a: &Path, b: &Path) {
    for entry in fs::read_dir(a).expect("dir") {
        let name = entry.expect("entry").file_name();
        let same = fs::read(a.join(&name)).expect("a") == fs::read(b.join(&name)).expect("b");
        assert!(same || name == "RECEIPT.json", "{name:?}");
    }
}

#[test]
fn pieces_in_any_order_and_two_attempts_make_the_artifact() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (a, b) = (dir.path().join("a.dsv4"), dir.path().join("b.dsv4"));
    pack(&a);
    let receiving = begin(&b, &a, &[1, 0], false).expect("begin");
    let missing = receiving.missing_blocks();
    assert_eq!(missing.iter().map(|(rank, blocks)| (*rank, blocks.len())).collect::<Vec<_>>(), [(0, 5), (1, 5)]);
    assert!(missing.iter().all(|(_, blocks)| blocks.iter().all(|missing| *missing)));
    assert_eq!(
        (receiving.block_bytes(0, 0), receiving.block_bytes(0, 5), receiving.block_bytes(2, 0)),
        (Some(4 << 20), None, None)
    );
    put_blocks(&receiving, &a, 1, 3);
    assert!(!put_file(&receiving, &a, true) && receiving.missing_files() == [true]);
    assert!(put_file(&receiving, &a, false) && receiving.missing_files() == [false]);
    // While it lasts nobody else writes there; afterwards what arrived is found again.
    assert!(matches!(begin(&b, &a, &[1], false), Err(FormatError::Busy { .. })));
    drop(receiving);
    assert!(!b.exists());
    let receiving = begin(&b, &a, &[0, 1], false).expect("again");
    assert_eq!(receiving.missing_blocks()[1].1, [true, true, false, false, false]);
    assert_eq!((receiving.missing_files(), receiving.file_bytes(0)), (vec![false], None));
    put_blocks(&receiving, &a, 0, 5);
    put_blocks(&receiving, &a, 1, 5);
    assert_eq!(receiving.finish(None, serde_json::Map::new()).expect("finish"), Outcome::Created);
    Artifact::open(&b).expect("open").verify(&NoProgress).expect("verify");
    assert_same(&a, &b);
    assert_eq!(fs::read_dir(dir.path()).expect("dir").count(), 2);
}

/// Whoever knows the token may offer anything; what arrived before is not the price.
#[test]
fn an_offer_of_no_ranks_costs_nothing() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (a, b) = (dir.path().join("a.dsv4"), dir.path().join("b.dsv4"));
    pack(&a);
    let receiving = begin(&b, &a, &[0], false).expect("begin");
    put_blocks(&receiving, &a, 0, 4);
    drop(receiving);
    for force in [false, true] {
        let error = begin(&b, &a, &[], force).err().expect("no ranks");
        assert!(matches!(error, FormatError::NothingOffered { tp: 2, .. }), "{error}");
    }
    let receiving = begin(&b, &a, &[0], false).expect("again");
    assert_eq!(receiving.missing_blocks(), [(0, vec![true, false, false, false, false])]);
    // Nor does one make a partial directory.
    assert!(begin(&dir.path().join("c.dsv4"), &a, &[], false).is_err());
    assert_eq!(fs::read_dir(dir.path()).expect("dir").count(), 2);
}

#[test]
fn another_manifest_starts_over_and_a_wrong_one_does_not_start() {
    let dir = tempfile::tempdir().expect("tempdir");
    let [a, b, other] = ["a.dsv4", "b.dsv4", "other.dsv4"].map(|name| dir.path().join(name));
    pack(&a);
    pack_with(&other, 1 << 20, "{\"another\":1}", None, false).expect("pack");
    let receiving = begin(&b, &a, &[0], false).expect("begin");
    put_blocks(&receiving, &a, 0, 5);
    drop(receiving);
    let receiving = begin(&b, &other, &[0], false).expect("begin");
    assert!(receiving.missing_blocks()[0].1.iter().all(|missing| *missing), "of another artifact");
    drop(receiving);
    // Its rank is not complete, so it is not published with another.
    let receiving = begin(&b, &other, &[1], false).expect("begin");
    put_blocks(&receiving, &other, 1, 5);
    put_file(&receiving, &other, false);
    receiving.finish(None, serde_json::Map::new()).expect("finish");
    assert_eq!(Artifact::open(&b).expect("open").present_ranks(), [1]);

    let taken = begin(&b, &a, &[0], false).err().expect("another is there");
    assert!(matches!(taken, FormatError::Exists { .. }), "{taken}");
    let none = begin(&b, &a, &[2], true).err().expect("no such rank");
    assert!(matches!(none, FormatError::NoSuchRank { rank: 2, .. }), "{none}");
    let mut bytes = fs::read(a.join("MANIFEST")).expect("MANIFEST");
    bytes[5000] ^= 1;
    for wrong in [&bytes[..], &bytes[..100], &[]] {
        assert!(Receiving::begin(&dir.path().join("c.dsv4"), wrong, &[0], false).is_err());
    }
    assert_eq!(fs::read_dir(dir.path()).expect("dir").count(), 3);
}

/// The same weights under other kernels or configuration: nothing travels but what differs.
#[test]
fn replacing_uses_the_weights_that_are_there_and_keeps_other_ranks() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (a, b) = (dir.path().join("a.dsv4"), dir.path().join("b.dsv4"));
    pack(&b);
    pack_with(&a, 1 << 20, "{\"another\":1}", None, false).expect("pack");
    let receiving = begin(&b, &a, &[1], true).expect("begin");
    assert_eq!(receiving.missing_blocks(), [(1, vec![false; 5])]);
    put_file(&receiving, &a, false);
    assert_eq!(receiving.finish(None, serde_json::Map::new()).expect("finish"), Outcome::Replaced);
    assert_eq!(Artifact::open(&b).expect("open").present_ranks(), [0, 1]);
    assert_same(&a, &b);
    assert_eq!(fs::read_dir(dir.path()).expect("dir").count(), 2);
}

#[test]
fn a_signature_is_added_and_bounded() {
    let dir = tempfile::tempdir().expect("tempdir");
    let out = dir.path().join("a.dsv4");
    pack(&out);
    let artifact = Artifact::open(&out).expect("open");
    assert_eq!(artifact.manifest_bytes().expect("bytes"), fs::read(out.join("MANIFEST")).expect("MANIFEST"));
    assert_eq!(artifact.signature().expect("none"), None);
    artifact.set_signature(b"one").expect("set");
    artifact.set_signature(b"two").expect("replace");
    assert_eq!(artifact.signature().expect("read"), Some(b"two".to_vec()));
    // Through a link, the neighbours are those of the directory.
    let link = dir.path().join("link.dsv4");
    std::os::unix::fs::symlink(&out, &link).expect("link");
    Artifact::open(&link).expect("open").set_signature(b"three").expect("set");
    assert_eq!(artifact.signature().expect("read"), Some(b"three".to_vec()));
    assert_eq!(fs::read_dir(dir.path()).expect("dir").count(), 2);
    fs::write(out.join("SIGNATURE"), vec![b'x'; 16385]).expect("write");
    assert!(matches!(artifact.signature(), Err(FormatError::TooLarge { found: 16385, .. })));
    assert!(matches!(open_error(&dir.path().join("none")), FormatError::NotAnArtifact { .. }));
}
