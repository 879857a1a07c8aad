//! JOURNAL of an interrupted pack, found beside rank files as it left them.
//!
//! Input: 0, then the file as it is; or 1, then records (a length of two bytes and so many), which are put
//! behind the first record of the real pack with checks that are right. Whatever it says, it is gone on with
//! or started over; memory follows from the pack's layout, not from the file.
#![no_main]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use dsv4_format::{
    Digest, Draft, DraftOptions, FormatError, Found, JournalOptions, RankLayout, SectionPlan, TensorPlan,
};
use dsv4_fuzz::{scratch, seed_corpus};
use libfuzzer_sys::fuzz_target;

const RECORD: usize = 20;
const NOTE_BYTES: usize = 8;

struct Real {
    out: PathBuf,
    /// The rank files, linked to for every input: nothing is written into them.
    kept: PathBuf,
    /// With its first record and some marks.
    journal: Vec<u8>,
}

fn resume(out: &Path) -> Result<Draft, FormatError> {
    let tensor = |name: &str, bytes: u64| TensorPlan { name: name.into(), dtype: "u8".into(), shape: vec![], bytes };
    let section = |name: &str, tensors| SectionPlan { name: name.into(), tensors };
    let layout = |rank: u64| {
        let plan =
            [section("a", vec![tensor("x", (5 << 20) + rank), tensor("y", 3)]), section("b", vec![tensor("z", 70)])];
        RankLayout::new(&plan).expect("a layout")
    };
    let journal = JournalOptions {
        plan: Digest([9; 32]),
        subject: "pack of a".into(),
        there: Vec::new(),
        note_bytes_max: NOTE_BYTES,
        every_bytes: 1,
        fresh: false,
    };
    let mut last = 0;
    let take = &mut |note: &[u8]| {
        let Ok(bytes) = note.try_into() else { return false };
        let before = std::mem::replace(&mut last, u64::from_le_bytes(bytes));
        before <= last
    };
    Draft::resume(out, vec![layout(0), layout(1)], &DraftOptions::default(), &journal, take)
}

fn real() -> &'static Real {
    static REAL: OnceLock<Real> = OnceLock::new();
    REAL.get_or_init(|| {
        let dir = scratch();
        let (out, kept) = (dir.join("x.dsv4"), dir.join("kept"));
        let mut draft = resume(&out).expect("a draft");
        let mut writers: Vec<_> = (0..2).map(|rank| draft.rank_writer(rank).expect("a writer")).collect();
        let mut marks = draft.marks(&writers).expect("marks");
        let mut journal = Vec::new();
        for n in 1..=10u64 {
            for writer in &mut writers {
                writer.append("x", &vec![n as u8; 512 << 10]).expect("bytes");
            }
            marks.offer(&mut writers, || n.to_le_bytes().to_vec()).expect("a mark");
            journal = fs::read(draft.path().join("JOURNAL")).expect("JOURNAL");
        }
        drop((marks, writers));
        fs::create_dir(&kept).expect("a directory");
        for name in ["rank0.weights", "rank1.weights"] {
            fs::hard_link(draft.path().join(name), kept.join(name)).expect("a link");
        }
        Real { out, kept, journal }
    })
}

/// Payloads of the real journal.
fn payloads() -> Vec<Vec<u8>> {
    let (mut out, mut rest) = (Vec::new(), &real().journal[..]);
    while let Some((len, _)) = rest.split_first_chunk() {
        let end = RECORD + u32::from_le_bytes(*len) as usize;
        out.push(rest[RECORD..end].to_vec());
        rest = &rest[end..];
    }
    out
}

fn seeds() -> Vec<Vec<u8>> {
    let marks = payloads().split_off(1);
    let records = |marks: &[Vec<u8>]| -> Vec<u8> {
        let all = marks.iter().map(|mark| [&(mark.len() as u16).to_le_bytes()[..], mark].concat());
        [vec![1], all.flatten().collect()].concat()
    };
    vec![[&[0], &real().journal[..]].concat(), records(&marks), records(&marks[..1])]
}

/// The file that an input stands for.
fn file(input: &[u8]) -> Vec<u8> {
    let Some((kind, mut rest)) = input.split_first() else { return Vec::new() };
    if kind & 1 == 0 {
        return rest.to_vec();
    }
    let mut all = vec![payloads().swap_remove(0)];
    while let Some((len, after)) = rest.split_first_chunk() {
        let (payload, after) = after.split_at(after.len().min(usize::from(u16::from_le_bytes(*len))));
        all.push(payload.to_vec());
        rest = after;
    }
    let (mut out, mut chain) = (Vec::new(), [0; 32]);
    for payload in all {
        let len = (payload.len() as u32).to_le_bytes();
        chain = *blake3::Hasher::new().update(&chain).update(&len).update(&payload).finalize().as_bytes();
        out.extend([&len[..], &chain[..16], &payload].concat());
    }
    out
}

fuzz_target!(init: seed_corpus(seeds), |input: &[u8]| {
    let real = real();
    let partial = real.out.with_file_name(".x.dsv4.partial");
    fs::create_dir(&partial).expect("a directory");
    for name in ["rank0.weights", "rank1.weights"] {
        fs::hard_link(real.kept.join(name), partial.join(name)).expect("a link");
    }
    fs::write(partial.join("JOURNAL"), file(input)).expect("room");
    match resume(&real.out) {
        Ok(mut draft) => {
            if *draft.found() == Found::Marks {
                let writers: Vec<_> = (0..2).map(|rank| draft.rank_writer(rank).expect("a writer")).collect();
                draft.marks(&writers).expect("marks");
            }
        }
        // Of another subject: it stays.
        Err(error) => {
            assert!(error.to_string().contains("\n  help: "), "{error}");
            assert!(matches!(error, FormatError::Unfinished { .. }), "{error}");
            fs::remove_dir_all(&partial).expect("removed");
        }
    }
    assert!(!partial.exists());
});
