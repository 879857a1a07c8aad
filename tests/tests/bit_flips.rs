//! Single flipped bits anywhere in MANIFEST and in the rank files, each found by `verify` and by loading,
//! under the name of the place where it is.
//!
//! What is judged, for every flip, on the disk and past the page cache:
//!
//! * in MANIFEST: opening the artifact anew, and `verify` of one that was opened before;
//! * in a rank's file: opening, `verify` and `load_rank` of an artifact whose only rank is that one: MANIFEST,
//!   `meta` and all of this rank's file. Its files are links to those of the whole artifact, which is
//!   allowed; the other rank's file, in which nothing changed, is judged before the first flip and after
//!   the last.
//!
//! A few bytes are not read by loading, by design (docs/format.md, section 7): those from 4 KiB to 2 MiB of a
//! rank's file. There a flip is `verify`'s alone to find, and what is loaded is what would be without it.
//!
//! `DSV4_FLIPS=10000` for another count.

use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Instant;

use dsv4_format::io::ReadMode;
use dsv4_format::{Artifact, FormatError};
use dsv4_tests::artifacts::{Packed, Unwatched};

const FLIPS: u64 = 400;
const SEED: u64 = 20_261_124;
const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
const BLOCK: u64 = 4 * MIB;
const TP: u32 = 2;

/// Where a bit is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Manifest,
    HeadSuperblock,
    /// Not read by loading.
    HeadPadding,
    Weights,
    /// Between and behind tensors; read, and part of a block, like weights.
    SectionPadding,
    TailSuperblock,
}

/// Kinds by how often they are chosen, of 20 times.
const SHARES: [(Kind, u64); 6] = [
    (Kind::Manifest, 4),
    (Kind::HeadSuperblock, 1),
    (Kind::HeadPadding, 2),
    (Kind::Weights, 8),
    (Kind::SectionPadding, 4),
    (Kind::TailSuperblock, 1),
];

/// splitmix64 of a seed and a count.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }

    fn kind(&mut self) -> Kind {
        let mut left = self.below(SHARES.iter().map(|(_, share)| share).sum());
        for (kind, share) in SHARES {
            if left < share {
                return kind;
            }
            left -= share;
        }
        unreachable!("the shares are all of it")
    }
}

/// A file and the bytes of one kind in it.
struct Region {
    kind: Kind,
    rank: u32,
    bytes: Range<u64>,
}

fn regions(artifact: &Artifact, manifest_bytes: u64) -> Vec<Region> {
    let mut out = vec![Region { kind: Kind::Manifest, rank: 0, bytes: 0..manifest_bytes }];
    for rank in &artifact.manifest().ranks {
        let mut region = |kind, bytes| out.push(Region { kind, rank: rank.rank, bytes });
        region(Kind::HeadSuperblock, 0..PAGE);
        region(Kind::HeadPadding, PAGE..2 * MIB);
        for section in &rank.sections {
            let mut end = section.offset;
            for tensor in &section.tensors {
                let start = section.offset + tensor.offset;
                region(Kind::SectionPadding, end..start);
                region(Kind::Weights, start..start + tensor.len);
                end = start + tensor.len;
            }
            region(Kind::SectionPadding, end..section.offset + section.len);
        }
        region(Kind::TailSuperblock, rank.file_len - PAGE..rank.file_len);
    }
    out
}

/// A byte of one kind, any with the same chance.
fn place(regions: &[Region], kind: Kind, random: &mut Random) -> (u32, u64) {
    let of_kind = || regions.iter().filter(|r| r.kind == kind);
    let mut left = random.below(of_kind().map(|r| r.bytes.end - r.bytes.start).sum());
    for region in of_kind() {
        let length = region.bytes.end - region.bytes.start;
        if left < length {
            return (region.rank, region.bytes.start + left);
        }
        left -= length;
    }
    unreachable!("a byte of {kind:?}")
}

/// Flips a bit for as long as `test` looks.
fn flipped<T>(file: &File, at: u64, mask: u8, test: impl FnOnce() -> T) -> T {
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ mask], at).unwrap();
    let result = test();
    file.write_all_at(&byte, at).unwrap();
    result
}

/// The artifact with one rank's file alone, by links.
fn alone(whole: &Path, rank: u32, scratch: &Path) -> PathBuf {
    let dir = scratch.join(format!("rank{rank}-alone.dsv4"));
    std::fs::create_dir(&dir).unwrap();
    for name in ["MANIFEST", "meta", &format!("rank{rank}.weights")] {
        symlink(whole.join(name), dir.join(name)).unwrap();
    }
    dir
}

fn verify(path: &Path) -> Result<(), FormatError> {
    Artifact::open(path)?.verify(&Unwatched).map(|_| ())
}

/// Requires the error that a flip at `at` of `file` has to give when the file is opened.
fn is_opening_error(error: &FormatError, kind: Kind, file: &Path, at: u64) {
    let in_header = |at: u64| match at {
        0..8 => matches!(error, FormatError::Magic { .. }),
        _ => matches!(error, FormatError::Padding { offset, .. } if *offset == at),
    };
    let right = match (kind, at) {
        (Kind::Manifest, 8..12) => matches!(error, FormatError::Version { .. }),
        (Kind::Manifest, 16..24) => matches!(error, FormatError::Length { .. }),
        (Kind::Manifest, 24..56 | PAGE..) => matches!(error, FormatError::Hash { .. }),
        (Kind::Manifest, _) => in_header(at),
        (Kind::HeadSuperblock, 8..128) => error.to_string().contains("superblock at the start"),
        (Kind::HeadSuperblock, _) => in_header(at),
        (_, _) => {
            let tail = std::fs::metadata(file).unwrap().len() - PAGE;
            match at - tail {
                0..8 => matches!(error, FormatError::Magic { .. }),
                8..128 => error.to_string().contains("superblock copy at the end"),
                _ => in_header(at),
            }
        }
    };
    let name = file.file_name().unwrap().to_str().unwrap();
    assert!(right && error.to_string().contains(name), "{kind:?}, byte {at}: {error}");
}

#[test]
fn every_flipped_bit_is_found_and_named() {
    let flips = std::env::var("DSV4_FLIPS").map_or(FLIPS, |n| n.parse().expect("DSV4_FLIPS: a number"));
    let packed = Packed::nano(TP);
    let whole = packed.path();
    let opened = Artifact::open(whole).unwrap();
    opened.verify(&Unwatched).unwrap();
    if opened.rank_reader(0).unwrap().mode() != ReadMode::Direct {
        dsv4_tests::skip("flips as the disk has them: this file system has no O_DIRECT");
    }
    let open = |name: &str| OpenOptions::new().read(true).write(true).open(whole.join(name)).unwrap();
    let manifest = open("MANIFEST");
    let regions = regions(&opened, manifest.metadata().unwrap().len());
    let ranks: Vec<_> = (0..TP)
        .map(|rank| {
            let dir = alone(whole, rank, packed.scratch());
            let opened = Artifact::open(&dir).unwrap();
            let weights = opened.load_rank(rank, 2, &Unwatched).unwrap();
            (open(&format!("rank{rank}.weights")), dir, opened, weights)
        })
        .collect();

    let (started, mut counts) = (Instant::now(), [0u64; SHARES.len()]);
    let mut random = Random(SEED);
    for flip in 0..flips {
        let kind = random.kind();
        let (rank, at) = place(&regions, kind, &mut random);
        let mask = 1 << random.below(8);
        let shown = format!("seed {SEED}, flip {flip}: {kind:?} of rank {rank}, byte {at}, mask {mask:#04x}");
        counts[kind as usize] += 1;
        if kind == Kind::Manifest {
            let file = whole.join("MANIFEST");
            let (anew, before) = flipped(&manifest, at, mask, || (Artifact::open(whole), opened.verify(&Unwatched)));
            is_opening_error(&anew.err().expect(&shown), kind, &file, at);
            is_opening_error(&before.expect_err(&shown), kind, &file, at);
            continue;
        }
        let (file, dir, opened, weights) = &ranks[rank as usize];
        let path = dir.join(format!("rank{rank}.weights"));
        // An artifact that was opened while all was well, so that each of the two judges for itself.
        let (verified, loaded) = flipped(file, at, mask, || (verify(dir), opened.load_rank(rank, 2, &Unwatched)));
        let verified = verified.expect_err(&shown);
        match kind {
            Kind::HeadSuperblock | Kind::TailSuperblock => {
                is_opening_error(&verified, kind, &path, at);
                is_opening_error(&loaded.err().expect(&shown), kind, &path, at);
            }
            Kind::HeadPadding => {
                let right = matches!(&verified, FormatError::Padding { file, offset, found }
                    if *file == path && *offset == at && *found == mask);
                assert!(right, "{shown}: {verified}");
                let loaded = loaded.unwrap_or_else(|e| panic!("{shown}: read by loading: {e}"));
                assert!(loaded[..] == weights[..], "{shown}: other weights");
            }
            _ => {
                let sections = &opened.manifest().ranks[rank as usize].sections;
                let section = sections.iter().rfind(|s| s.offset <= at).expect("a section");
                let index = (at - section.offset) / BLOCK;
                let expected = (&path, &section.name, index, section.offset + index * BLOCK, 3);
                for error in [verified, loaded.err().expect(&shown)] {
                    let FormatError::Block { file, section, block, offset, reads, .. } = &error else {
                        panic!("{shown}: {error}")
                    };
                    assert_eq!((file, section, *block, *offset, *reads), expected, "{shown}");
                }
            }
        }
    }
    let took = started.elapsed();
    println!("{flips} flips, all found, in {took:.1?}: {:?}", SHARES.map(|(kind, _)| (kind, counts[kind as usize])));
    assert!(flips < 200 || counts.iter().all(|&count| count > 0), "{counts:?}");
    opened.verify(&Unwatched).expect("whole again");
    for (rank, (.., weights)) in (0..TP).zip(&ranks) {
        assert!(opened.load_rank(rank, 2, &Unwatched).unwrap()[..] == weights[..]);
    }
}
