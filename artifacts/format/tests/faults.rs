//! Damage of every kind is found, and named where it is.

mod support;

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use dsv4_format::{Artifact, FormatError, NoProgress};
use support::{Noise, open_error, pack, pack_small};

const MIB: u64 = 1 << 20;

struct Packed {
    _dir: tempfile::TempDir,
    path: PathBuf,
}

fn packed(pack: impl Fn(&Path)) -> Packed {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("a.dsv4");
    pack(&path);
    Packed { _dir: dir, path }
}

/// Flips bits of one byte, lets `test` look, and puts the byte back.
fn with_flip<T>(file: &Path, at: u64, mask: u8, test: impl FnOnce() -> T) -> T {
    let open = OpenOptions::new().read(true).write(true).open(file).expect("open");
    let mut byte = [0];
    open.read_exact_at(&mut byte, at).expect("read");
    open.write_all_at(&[byte[0] ^ mask], at).expect("flip");
    let result = test();
    open.write_all_at(&byte, at).expect("restore");
    result
}

fn verify(path: &Path) -> Result<(), FormatError> {
    Artifact::open(path)?.verify(&NoProgress).map(|_| ())
}

#[test]
fn a_flip_of_any_byte_of_manifest_is_found_at_opening() {
    let artifact = packed(|path| {
        pack_small(path);
    });
    let file = artifact.path.join("MANIFEST");
    let len = fs::metadata(&file).expect("metadata").len();
    assert!((4096 + 1000..64 << 10).contains(&len), "{len}");
    for at in 0..len {
        let mask = 1 << (at % 8);
        let error = with_flip(&file, at, mask, || open_error(&artifact.path));
        let named = match at {
            0..8 => matches!(error, FormatError::Magic { .. }),
            8..12 => matches!(error, FormatError::Version { .. }),
            16..24 => matches!(error, FormatError::Length { .. }),
            12..16 | 56..4096 => matches!(error, FormatError::Padding { offset, .. } if offset == at),
            _ => matches!(error, FormatError::Hash { .. }),
        };
        assert!(named, "byte {at}: {error}");
    }
    verify(&artifact.path).expect("whole again");
}

#[test]
fn a_flip_of_any_byte_of_either_superblock_is_found_at_opening() {
    let artifact = packed(|path| {
        pack_small(path);
    });
    let file = artifact.path.join("rank0.weights");
    let tail = fs::metadata(&file).expect("metadata").len() - 4096;
    for (base, copy) in [(0, "at the start"), (tail, "at the end")] {
        for at in 0..4096 {
            let error = with_flip(&file, base + at, 1 << (at % 8), || open_error(&artifact.path));
            let named = match at {
                0..8 => matches!(error, FormatError::Magic { .. }),
                128.. => matches!(error, FormatError::Padding { offset, .. } if offset == base + at),
                _ => matches!(error, FormatError::Superblock { .. }) && error.to_string().contains(copy),
            };
            assert!(named, "byte {at} of {base}: {error}");
            assert!(error.to_string().contains("rank0.weights"));
        }
    }
}

#[test]
fn flips_anywhere_in_weights_are_found_with_their_block() {
    let artifact = packed(|path| {
        pack(path);
    });
    let seed = 20_261_124;
    let mut noise = Noise::new(seed);
    // (section, its offset in the file, its length), from the hand-worked layout.
    let sections = [("embedding", 2 * MIB, 10 * MIB), ("layer.0", 12 * MIB, 4 * MIB), ("layer.1", 16 * MIB, 2 * MIB)];
    // Every tensor, the gaps between tensors, the padding at the end, first and last bytes.
    let mut places = vec![2 * MIB, 2 * MIB + 8_400_952, 2 * MIB + 8_400_953, 2 * MIB + 8_401_200];
    places.extend([12 * MIB - 1, 12 * MIB, 15 * MIB + 1, 16 * MIB - 1, 16 * MIB + 3, 16 * MIB + 4, 18 * MIB - 1]);
    places.extend((0..12).map(|_| 2 * MIB + noise.below(16 * MIB)));
    for (n, at) in places.into_iter().enumerate() {
        let rank = (n % 2) as u32;
        let file = artifact.path.join(format!("rank{rank}.weights"));
        let (name, start, _) = sections.into_iter().rfind(|s| s.1 <= at).expect("section");
        let expected = (name.to_string(), (at - start) / (4 * MIB), start + (at - start) / (4 * MIB) * (4 * MIB));
        let mask = 1 << noise.below(8);
        let (verified, loaded) = with_flip(&file, at, mask, || {
            let open = Artifact::open(&artifact.path).expect("opening reads no weights");
            let other = open.load_rank(1 - rank, 2, &NoProgress);
            assert!(other.is_ok(), "the other rank is whole");
            (verify(&artifact.path), open.load_rank(rank, 2, &NoProgress).map(|_| ()))
        });
        for result in [verified, loaded] {
            let error = result.expect_err("a flipped bit");
            let FormatError::Block { file: named, section, block, offset, reads: 3, .. } = &error else {
                panic!("seed {seed}, byte {at}: {error}")
            };
            assert_eq!((section.clone(), *block, *offset), expected, "seed {seed}, byte {at}");
            assert_eq!(*named, file);
        }
    }
    verify(&artifact.path).expect("whole again");
}

#[test]
fn flips_in_the_head_padding_and_the_compressed_files_are_found_by_verify() {
    let artifact = packed(|path| {
        pack_small(path);
    });
    let mut noise = Noise::new(7);
    let file = artifact.path.join("rank0.weights");
    for at in (0..20).map(|_| 4096 + noise.below(2 * MIB - 4096)).chain([4096, 2 * MIB - 1]) {
        let error = with_flip(&file, at, 0x40, || verify(&artifact.path)).expect_err("padding");
        assert!(matches!(error, FormatError::Padding { offset, found: 0x40, .. } if offset == at), "{error}");
    }
    for name in ["meta", "kernels.sm_121a"] {
        let file = artifact.path.join(name);
        let len = fs::metadata(&file).expect("metadata").len();
        for at in 0..len {
            let error = with_flip(&file, at, 1 << (at % 8), || verify(&artifact.path)).expect_err("compressed");
            assert!(matches!(error, FormatError::Hash { .. }) && error.to_string().contains(name), "{error}");
        }
    }
}

#[test]
fn a_damaged_member_is_never_returned() {
    let artifact = packed(|path| {
        pack_small(path);
    });
    let file = artifact.path.join("meta");
    let open = Artifact::open(&artifact.path).expect("open");
    let good: Vec<_> = support::meta();
    for at in 0..fs::metadata(&file).expect("metadata").len() {
        for (name, expected) in &good {
            let result = with_flip(&file, at, 0x10, || open.meta(name));
            match result {
                // The flip is in the other member, or in bits zstd ignores.
                Ok(found) => assert!(found.as_ref() == Some(expected), "{name}, byte {at}"),
                Err(error) => assert!(error.to_string().contains(name.as_str()), "{error}"),
            }
        }
    }
}

#[test]
fn wrong_lengths_are_found_at_opening() {
    let artifact = packed(|path| {
        pack_small(path);
    });
    for name in ["MANIFEST", "rank0.weights"] {
        let file = artifact.path.join(name);
        let whole = fs::read(&file).expect("read");
        for len in [0, 1, 4095, 4096, 4097, whole.len() - 1] {
            fs::write(&file, &whole[..len]).expect("cut");
            let error = open_error(&artifact.path);
            assert!(matches!(error, FormatError::Length { .. }), "{name} of {len}: {error}");
        }
        let longer: Vec<_> = whole.iter().copied().chain([0]).collect();
        fs::write(&file, longer).expect("extend");
        assert!(matches!(open_error(&artifact.path), FormatError::Length { .. }));
        fs::write(&file, &whole).expect("restore");
    }
    for name in ["meta", "kernels.sm_121a"] {
        let file = artifact.path.join(name);
        let whole = fs::read(&file).expect("read");
        fs::write(&file, &whole[..whole.len() - 1]).expect("cut");
        assert!(matches!(verify(&artifact.path), Err(FormatError::Length { .. })), "{name}");
        fs::remove_file(&file).expect("remove");
        assert!(matches!(verify(&artifact.path), Err(FormatError::Io { .. })), "{name}");
        fs::write(&file, &whole).expect("restore");
    }
    // Far beyond the limit (and sparse): refused by its length, without reading it.
    let file = artifact.path.join("MANIFEST");
    OpenOptions::new().write(true).open(&file).and_then(|f| f.set_len(1 << 40)).expect("extend");
    assert!(matches!(open_error(&artifact.path), FormatError::TooLarge { found: 0x100_0000_0000, .. }));
}

#[test]
fn absurd_lengths_in_the_header_allocate_nothing() {
    let artifact = packed(|path| {
        pack_small(path);
    });
    let file = artifact.path.join("MANIFEST");
    let whole = fs::read(&file).expect("read");
    for len in [0, 1, u64::MAX, u64::MAX - 4095, 1 << 40, whole.len() as u64] {
        let mut bytes = whole.clone();
        bytes[16..24].copy_from_slice(&len.to_le_bytes());
        fs::write(&file, bytes).expect("write");
        assert!(matches!(open_error(&artifact.path), FormatError::Length { .. }), "{len}");
    }
}

#[test]
fn missing_foreign_and_swapped_files_are_named() {
    let artifact = packed(|path| {
        pack(path);
    });
    let [zero, one] = ["rank0.weights", "rank1.weights"].map(|name| artifact.path.join(name));
    let aside = artifact.path.with_extension("aside");

    fs::rename(&zero, &aside).expect("rename");
    let open = Artifact::open(&artifact.path).expect("one rank is enough");
    let error = open.load_rank(0, 1, &NoProgress).err().expect("missing");
    assert!(matches!(error, FormatError::RankMissing { rank: 0, ref present, .. } if *present == [1]), "{error}");
    let error = open.load_rank(2, 1, &NoProgress).err().expect("no such rank");
    assert!(matches!(error, FormatError::NoSuchRank { rank: 2, tp: 2, .. }), "{error}");
    assert_eq!(verify(&artifact.path).map_err(|e| e.to_string()), Ok(()));

    // Ranks 0 and 1 have equal lengths here: only the superblock tells them apart.
    fs::copy(&one, &zero).expect("copy");
    let error = open_error(&artifact.path);
    assert!(error.to_string().contains("rank is 1, expected 0"), "{error}");
    fs::rename(&aside, &zero).expect("rename");
    verify(&artifact.path).expect("whole again");

    let other = packed(|path| {
        support::pack_with(path, 1 << 20, "{}", None, false).expect("pack");
    });
    fs::copy(other.path.join("rank0.weights"), &zero).expect("the same weight set");
    verify(&artifact.path).expect("interchangeable");

    for name in ["rank2.weights", "kernels.sm_90a", "notes.txt", ".hidden"] {
        let stray = artifact.path.join(name);
        fs::write(&stray, b"x").expect("write");
        let error = verify(&artifact.path).expect_err(name);
        assert!(matches!(error, FormatError::UnknownFile { ref path, .. } if *path == stray), "{error}");
        fs::remove_file(&stray).expect("remove");
    }
    // Rank 1 has the same bytes wherever it lies: it may be a link to another disk, not a directory.
    fs::rename(&one, &aside).expect("rename");
    std::os::unix::fs::symlink(&aside, &one).expect("link");
    verify(&artifact.path).expect("a link to the file");
}

#[test]
fn receipt_and_signature_have_a_form_but_no_fixed_bytes() {
    let artifact = packed(|path| {
        pack_small(path);
    });
    let [receipt, signature] = ["RECEIPT.json", "SIGNATURE"].map(|name| artifact.path.join(name));
    let report = || Artifact::open(&artifact.path).expect("open").verify(&NoProgress);
    fs::write(&receipt, b"anything").expect("write");
    assert!(!report().expect("the receipt is not judged").signed);
    for file in [&receipt, &signature] {
        fs::write(file, b"").expect("write");
        let error = report().expect_err("empty");
        assert!(matches!(error, FormatError::Empty { file: ref named } if named == file), "{error}");
        fs::remove_file(file).expect("remove");
        verify(&artifact.path).expect("may be deleted");
    }
    let (zeros, more_zeros) = ("A".repeat(99) + "=", "A".repeat(86) + "==");
    let good = format!("untrusted comment: a\n{zeros}\ntrusted comment: b\n{more_zeros}\n");
    fs::write(&signature, &good).expect("write");
    assert!(report().expect("the form of a signature").signed);
    let mut long = good.clone().into_bytes();
    long.resize(20 << 10, b'\n');
    for bad in [b"anything".to_vec(), good.replace("trusted comment: b", "trusted").into_bytes()] {
        fs::write(&signature, bad).expect("write");
        let error = report().expect_err("no signature");
        assert!(matches!(error, FormatError::Signature { .. }), "{error}");
    }
    fs::write(&signature, long).expect("write");
    assert!(matches!(report().expect_err("too long"), FormatError::TooLarge { .. }));
    fs::remove_file(&signature).expect("remove");
    fs::create_dir(&receipt).expect("dir");
    let error = report().expect_err("a directory");
    assert!(matches!(error, FormatError::UnknownFile { .. }) && error.to_string().contains("no file"), "{error}");
}

#[test]
fn without_any_rank_nothing_was_verified() {
    let artifact = packed(|path| {
        pack(path);
    });
    for rank in 0..2 {
        fs::remove_file(artifact.path.join(format!("rank{rank}.weights"))).expect("remove");
    }
    Artifact::open(&artifact.path).expect("its MANIFEST can be read");
    let error = verify(&artifact.path).expect_err("no ranks");
    assert!(matches!(error, FormatError::NoRanks { tp: 2, .. }), "{error}");
}

#[test]
fn what_is_not_an_artifact_is_refused() {
    let dir = tempfile::tempdir().expect("tempdir");
    fs::write(dir.path().join("file.dsv4"), b"x").expect("write");
    fs::create_dir(dir.path().join("empty.dsv4")).expect("dir");
    fs::create_dir_all(dir.path().join("odd.dsv4/MANIFEST")).expect("dir");
    for name in ["file.dsv4", "empty.dsv4", "absent.dsv4"] {
        let error = open_error(&dir.path().join(name));
        assert!(matches!(error, FormatError::NotAnArtifact { .. }), "{error}");
    }
    assert!(open_error(&dir.path().join("odd.dsv4")).to_string().contains("not a regular file"));
}

/// Damage behind a correct hash, as another program could write it: never a panic, never a large
/// allocation, and nothing is believed that the ids do not cover.
#[test]
fn damage_behind_a_correct_hash_is_refused() {
    let artifact = packed(|path| {
        pack_small(path);
    });
    let file = artifact.path.join("MANIFEST");
    let whole = fs::read(&file).expect("read");
    let original = Artifact::open(&artifact.path).expect("open").manifest().clone();
    let seed = 4_242;
    let mut noise = Noise::new(seed);
    let (mut refused, mut left_to_verify) = (0, 0);
    for round in 0..6000 {
        let mut bytes = whole.clone();
        let archive = bytes.len() - 4096;
        for _ in 0..1 + noise.below(3) {
            let at = 4096 + noise.below(archive as u64) as usize;
            match round % 3 {
                0 => bytes[at] ^= 1 << noise.below(8),
                1 => bytes[at] = noise.next() as u8,
                _ => bytes[at..].iter_mut().take(4).for_each(|b| *b = 0xff),
            }
        }
        if round % 50 == 49 {
            bytes.truncate(4096 + noise.below(archive as u64) as usize);
        }
        if bytes == whole {
            continue;
        }
        let archive_len = (bytes.len() - 4096) as u64;
        let hash = *blake3::hash(&bytes[4096..]).as_bytes();
        bytes[16..24].copy_from_slice(&archive_len.to_le_bytes());
        bytes[24..56].copy_from_slice(&hash);
        fs::write(&file, &bytes).expect("write");
        let Ok(open) = Artifact::open(&artifact.path) else {
            refused += 1;
            continue;
        };
        // Not in the ids: the stored hashes of compressed files, which verify holds against them.
        assert_ne!(*open.manifest(), original, "seed {seed}, round {round}");
        let mut manifest = open.manifest().clone();
        manifest.meta.hash = original.meta.hash;
        manifest.kernel_files[0].hash = original.kernel_files[0].hash;
        assert_eq!(manifest, original, "seed {seed}, round {round}");
        let error = verify(&artifact.path).expect_err("a wrong stored hash");
        assert!(matches!(error, FormatError::Hash { .. }), "seed {seed}, round {round}: {error}");
        left_to_verify += 1;
    }
    assert!(refused > 5000 && left_to_verify > 0, "{refused} and {left_to_verify}");
}
