//! What goes in comes out, and goes in the same way twice.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use dsv4_format::{Artifact, Digest, NoProgress, Outcome, Progress};
use support::{content, layouts, meta, pack, pack_small, pack_with};

fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let read = |entry: fs::DirEntry| {
        let name = entry.file_name().into_string().expect("name");
        (name, fs::read(entry.path()).expect("read"))
    };
    fs::read_dir(dir).expect("dir").map(|entry| read(entry.expect("entry"))).collect()
}

#[derive(Default)]
struct Count {
    total: AtomicU64,
    done: AtomicU64,
}

impl Progress for Count {
    fn start(&self, _what: &str, total_bytes: u64) {
        self.total.store(total_bytes, Ordering::Relaxed);
    }
    fn add(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }
    fn finish(&self) {
        assert_eq!(self.total.load(Ordering::Relaxed), self.done.load(Ordering::Relaxed));
    }
}

#[test]
fn two_ranks_come_back_byte_for_byte() {
    let dir = tempfile::tempdir().expect("tempdir");
    let out = dir.path().join("a.dsv4");
    let committed = pack(&out);
    assert_eq!(committed.outcome, Outcome::Created);
    let artifact = Artifact::open(&out).expect("open");
    assert_eq!(artifact.manifest().artifact_id, committed.artifact_id);
    assert_eq!(artifact.manifest().weight_set_id, committed.weight_set_id);
    assert_eq!(artifact.present_ranks(), [0, 1]);
    for (rank, layout) in (0..2).zip(layouts()) {
        assert_eq!(artifact.arena_bytes(rank).expect("bytes"), layout.arena_bytes());
        let count = Count::default();
        let arena = artifact.load_rank(rank, 3, &count).expect("load");
        assert_eq!(count.done.into_inner(), layout.arena_bytes());
        assert_eq!(arena.len() as u64, layout.arena_bytes());
        assert_eq!(arena.as_ptr().addr() % 4096, 0);
        let mut covered = vec![false; arena.len()];
        for tensor in layout.sections().iter().flat_map(|s| &s.tensors) {
            let place = layout.tensor(&tensor.name).expect("place");
            let expected = content(rank, &tensor.name, tensor.len);
            assert!(arena.bytes(place) == Some(&expected[..]), "rank {rank} {}", tensor.name);
            assert!(arena.tensor(&tensor.name) == Some(&expected[..]));
            let start = place.arena_offset as usize;
            covered[start..start + expected.len()].fill(true);
        }
        assert!(arena.iter().zip(&covered).all(|(&byte, &covered)| covered || byte == 0), "padding is zero");
        assert!(arena.tensor("absent").is_none());
    }
    for (name, expected) in meta() {
        assert!(artifact.meta(&name).expect("meta") == Some(expected), "{name}");
    }
    assert_eq!(artifact.meta("absent").expect("meta"), None);
    let count = Count::default();
    let report = artifact.verify(&count).expect("verify");
    assert_eq!((report.ranks, report.absent, report.signed), (vec![0, 1], vec![], false));
    assert_eq!(report.bytes, count.done.into_inner());
    let names: Vec<_> = files(&out).into_keys().collect();
    assert_eq!(names, ["MANIFEST", "RECEIPT.json", "meta", "rank0.weights", "rank1.weights"]);
    assert!(!dir.path().join(".a.dsv4.partial").exists());
}

#[test]
fn packing_twice_gives_the_same_bytes() {
    let (one, two) = (tempfile::tempdir().expect("tempdir"), tempfile::tempdir().expect("tempdir"));
    let (a, b) = (one.path().join("a.dsv4"), two.path().join("other name.dsv4"));
    let first = pack_with(&a, 1 << 20, "{}", None, false).expect("pack");
    let second = pack_with(&b, 77_777, "{}", None, false).expect("pack");
    assert_eq!(first, second);
    let (mut a, mut b) = (files(&a), files(&b));
    assert_ne!(a.remove("RECEIPT.json"), b.remove("RECEIPT.json"));
    assert_eq!(a.len(), 4);
    for (name, bytes) in &a {
        assert!(b.get(name) == Some(bytes), "{name}");
    }
}

#[test]
fn a_section_root_is_the_plain_hash_of_its_bytes_in_the_file() {
    let dir = tempfile::tempdir().expect("tempdir");
    let out = dir.path().join("a.dsv4");
    pack(&out);
    let artifact = Artifact::open(&out).expect("open");
    let mut blocks = Vec::new();
    for rank in &artifact.manifest().ranks {
        let file = fs::read(out.join(format!("rank{}.weights", rank.rank))).expect("read");
        assert_eq!(file.len() as u64, rank.file_len);
        assert!(file[..4096] == file[file.len() - 4096..], "superblock copy");
        assert_eq!(&file[..8], b"DSV4RANK");
        for section in &rank.sections {
            let start = section.offset as usize;
            assert_eq!(section.root, Digest::of(&file[start..start + section.len as usize]));
            blocks.push(section.blocks.len());
        }
    }
    assert_eq!(blocks, [3, 1, 1, 3, 1, 1]);
}

#[test]
fn one_rank_alone_has_the_ids_of_the_whole() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (whole, part) = (dir.path().join("whole.dsv4"), dir.path().join("part.dsv4"));
    let all = pack(&whole);
    let one = pack_with(&part, 1 << 20, "{}", Some(1), false).expect("pack");
    assert_eq!(all, one);
    let (mut whole, part_files) = (files(&whole), files(&part));
    whole.remove("rank0.weights");
    assert!(whole.keys().eq(part_files.keys()));
    assert!(whole["MANIFEST"] == part_files["MANIFEST"] && whole["rank1.weights"] == part_files["rank1.weights"]);
    let artifact = Artifact::open(&part).expect("open");
    assert_eq!(artifact.present_ranks(), [1]);
    artifact.load_rank(1, 2, &NoProgress).expect("load");
    let report = artifact.verify(&NoProgress).expect("verify");
    assert_eq!((report.ranks, report.absent), (vec![1], vec![0]));
}

#[test]
fn kernels_come_back_and_change_only_their_own_ids() {
    let dir = tempfile::tempdir().expect("tempdir");
    let out = dir.path().join("a.dsv4");
    pack_small(&out);
    let artifact = Artifact::open(&out).expect("open");
    let kernels = &artifact.manifest().kernels;
    let listed: Vec<_> = kernels.iter().map(|k| (k.family.as_str(), k.key.0[0], k.arch.as_str(), k.size)).collect();
    assert_eq!(listed, [("rope", 1, "sm_121a", 301), ("rms_norm", 2, "sm_121a", 302)]);
    assert_eq!(artifact.kernel(&kernels[1]).expect("kernel"), Some(vec![2; 302]));
    assert_eq!(artifact.tuning("sm_121a").expect("tuning"), Some(b"[rope]\nthreads = 256\n".to_vec()));
    assert_eq!(artifact.tuning("sm_90a").expect("tuning"), None);
    artifact.verify(&NoProgress).expect("verify");
}

/// Fails when the archive's layout or a canonical encoding moves: then FORMAT_VERSION has to move as
/// well. Another version of zstd may change the compressed files, and MANIFEST with them, but no id.
#[test]
fn the_format_has_not_moved() {
    let dir = tempfile::tempdir().expect("tempdir");
    let out = dir.path().join("a.dsv4");
    let committed = pack_small(&out);
    let hash = |name: &str| Digest::of(&fs::read(out.join(name)).expect("read")).to_string();
    let found = [
        ("weight set", committed.weight_set_id.to_string()),
        ("artifact", committed.artifact_id.to_string()),
        ("MANIFEST", hash("MANIFEST")),
        ("rank0.weights", hash("rank0.weights")),
        ("meta", hash("meta")),
        ("kernels.sm_121a", hash("kernels.sm_121a")),
    ];
    let expected = [
        ("weight set", "2813159de2720977bd8e55683c11157b974bb7ab64868db4a0cb8812440e81a4"),
        ("artifact", "e9c9c36122a986a1956606ad0811b2898cea7f4040327c599c21d00fed302ec1"),
        ("MANIFEST", "f89618c8e955c2d87506c89f642c9187f2b1689437f6ed25e4ae83d2ce061c8d"),
        ("rank0.weights", "4f374588d038930ddb002ccac871d66df33548dbf1012a7e86fc83d436e3af0f"),
        ("meta", "97d261177e8a3dafd17c88c94bf8da439c97eb522ebc126216924270bf5575b9"),
        ("kernels.sm_121a", "d4b90daa6198cdf929fb883e48a3add39457e8f8dae2ea99e74750a6186b3629"),
    ];
    assert_eq!(found.each_ref().map(|(what, hash)| (*what, hash.as_str())), expected);
}
