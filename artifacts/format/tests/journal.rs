//! Drafts that are interrupted and gone on with: the same bytes as ever, or from the beginning.

mod support;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use dsv4_format::{
    Artifact, Committed, Digest, Draft, DraftOptions, FormatError, Found, JournalOptions, NoProgress, Outcome,
    Receiving, Tensor,
};
use support::{Noise, content, flip, input, layouts, meta, pack, pack_with};

const PLAN: Digest = Digest([9; 32]);
/// Pieces of each tensor: several marks fall inside the large ones.
const PIECES: u64 = 7;
/// Of a record before its payload.
const RECORD: usize = 20;

fn journal(every_bytes: u64) -> JournalOptions {
    let (subject, there) = ("pack of a".into(), Vec::new());
    JournalOptions { plan: PLAN, subject, there, note_bytes_max: 8, every_bytes, fresh: false }
}

fn resume(out: &Path, only_rank: Option<u32>, journal: &JournalOptions) -> Result<Draft, FormatError> {
    resume_with_notes(out, only_rank, journal).map(|(draft, _)| draft)
}

/// With the notes of all marks that were found.
fn resume_with_notes(
    out: &Path,
    only_rank: Option<u32>,
    journal: &JournalOptions,
) -> Result<(Draft, Vec<Vec<u8>>), FormatError> {
    let mut notes = Vec::new();
    let take = &mut |note: &[u8]| {
        notes.push(note.to_vec());
        true
    };
    let draft = Draft::resume(out, layouts(), &DraftOptions { only_rank }, journal, take)?;
    if *draft.found() != Found::Marks {
        notes.clear();
    }
    Ok((draft, notes))
}

fn partial(out: &Path) -> PathBuf {
    out.with_file_name(format!(".{}.partial", out.file_name().expect("name").to_str().expect("text")))
}

fn tensors(rank: u32) -> Vec<(u64, Tensor)> {
    let sections = layouts()[rank as usize].sections().to_vec();
    sections.into_iter().flat_map(|s| s.tensors.into_iter().map(move |t| (s.offset, t))).collect()
}

/// Number of the piece that the last note says comes next.
fn next_piece(notes: &[Vec<u8>]) -> u64 {
    notes.last().map_or(0, |note| u64::from_le_bytes(note.as_slice().try_into().expect("a number")))
}

fn io_error(out: &Path) -> FormatError {
    FormatError::Io { action: "read", path: out.to_path_buf(), source: std::io::Error::other("the cable came off") }
}

/// Leaves the draft as a kill would.
fn interrupt(mut draft: Draft, out: &Path) {
    let error = draft.failed(io_error(out));
    assert!(matches!(error, FormatError::Kept { .. }), "{error}");
    assert!(error.to_string().contains("the cable came off") && error.to_string().contains("the same command goes on"));
}

/// Goes on with what is there until `stop` says of a piece that it is the last, or to the end.
fn attempt(out: &Path, only_rank: Option<u32>, every: u64, stop: impl Fn(u64) -> bool) -> Option<Committed> {
    let (mut draft, notes) = resume_with_notes(out, only_rank, &journal(every)).expect("draft");
    let first = next_piece(&notes);
    let mut writers: Vec<_> = (0..2).map(|rank| draft.rank_writer(rank).expect("writer")).collect();
    let mut marks = draft.marks(&writers).expect("marks");
    let all = [tensors(0), tensors(1)];
    let end = all[0].len() as u64 * PIECES;
    for piece in first..end {
        for (rank, writer) in writers.iter_mut().enumerate() {
            let (_, tensor) = &all[rank][(piece / PIECES) as usize];
            let bytes = content(rank as u32, &tensor.name, tensor.len);
            let at = |n: u64| (tensor.len * n / PIECES) as usize;
            let part = &bytes[at(piece % PIECES)..at(piece % PIECES + 1)];
            if !part.is_empty() {
                writer.append(&tensor.name, part).expect("append");
            }
        }
        marks.offer(&mut writers, || (piece + 1).to_le_bytes().to_vec()).expect("mark");
        if stop(piece) {
            drop(marks);
            drop(writers);
            interrupt(draft, out);
            return None;
        }
    }
    let ranks = marks.finish(writers, end.to_le_bytes().to_vec()).expect("finish");
    draft.read_back(&ranks, &NoProgress).expect("read back");
    draft.write_meta(&meta()).expect("meta");
    Some(draft.commit(input(ranks, "{}"), false, &NoProgress).expect("commit"))
}

fn journal_bytes(out: &Path) -> u64 {
    fs::metadata(partial(out).join("JOURNAL")).map_or(0, |meta| meta.len())
}

/// Stops behind the first piece after which the journal has grown.
fn until_next_mark(out: &Path, only_rank: Option<u32>, every: u64) -> Option<Committed> {
    let before = journal_bytes(out).max((RECORD + 44 + 20) as u64);
    attempt(out, only_rank, every, |_| journal_bytes(out) > before)
}

fn assert_same(out: &Path, whole: &Path) {
    for name in ["MANIFEST", "meta", "rank0.weights", "rank1.weights"] {
        if out.join(name).exists() || !name.starts_with("rank") {
            assert!(fs::read(out.join(name)).expect("read") == fs::read(whole.join(name)).expect("read"), "{name}");
        }
    }
    Artifact::open(out).expect("open").verify(&NoProgress).expect("verify");
}

#[test]
fn interrupted_after_every_mark_it_is_the_same_artifact() {
    let dir = tempfile::tempdir().expect("tempdir");
    let whole = dir.path().join("whole.dsv4");
    let expected = pack(&whole);
    for (name, only_rank) in [("both.dsv4", None), ("one.dsv4", Some(1))] {
        let out = dir.path().join(name);
        let mut interruptions = 0;
        let committed = loop {
            match until_next_mark(&out, only_rank, 1) {
                Some(committed) => break committed,
                None => interruptions += 1,
            }
        };
        assert!(interruptions > 10, "{interruptions}");
        assert_eq!((committed.artifact_id, committed.outcome), (expected.artifact_id, Outcome::Created));
        assert_same(&out, &whole);
        assert_eq!(Artifact::open(&out).expect("open").present_ranks(), only_rank.map_or(vec![0, 1], |r| vec![r]));
        assert!(!partial(&out).exists());
    }
}

/// A kill between two marks: what came after the last one is done again.
#[test]
fn interrupted_between_marks_it_goes_on_from_the_last_one() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (whole, out) = (dir.path().join("whole.dsv4"), dir.path().join("x.dsv4"));
    pack(&whole);
    for last in [9, 11, 17, 25, 30, 38] {
        assert!(attempt(&out, None, 5 << 20, |piece| piece == last).is_none());
        let (draft, notes) = resume_with_notes(&out, None, &journal(5 << 20)).expect("draft");
        let next = next_piece(&notes);
        assert!(0 < next && next <= last + 1, "{next} after {last}");
        interrupt(draft, &out);
    }
    attempt(&out, None, 5 << 20, |_| false).expect("committed");
    assert_same(&out, &whole);
}

/// Power loss: nothing that was written after the last mark needs to be there.
#[test]
fn only_what_a_mark_covers_is_relied_on() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (whole, out) = (dir.path().join("whole.dsv4"), dir.path().join("x.dsv4"));
    pack(&whole);
    let mut losses = 0;
    while until_next_mark(&out, None, 1).is_none() {
        let (draft, notes) = resume_with_notes(&out, None, &journal(1)).expect("draft");
        let next = next_piece(&notes);
        interrupt(draft, &out);
        for rank in 0..2 {
            let all = tensors(rank);
            let Some((section, tensor)) = all.get((next / PIECES) as usize) else { continue };
            // The first byte that the mark does not cover; of the page it lies in the rest is padding.
            let at = section + tensor.offset + tensor.len * (next % PIECES) / PIECES;
            let file = fs::OpenOptions::new().write(true).open(partial(&out).join(format!("rank{rank}.weights")));
            let file = file.expect("open");
            let len = file.metadata().expect("metadata").len();
            file.write_all_at(&vec![0xa5; (len - at) as usize], at).expect("write");
        }
        losses += 1;
    }
    assert!(losses > 5, "{losses}");
    // Padding between sections is written like everything else; the gap before the tail is the last section's.
    assert_same(&out, &whole);
}

#[test]
fn a_damaged_journal_gives_an_earlier_mark_or_none() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (whole, out) = (dir.path().join("whole.dsv4"), dir.path().join("x.dsv4"));
    pack(&whole);
    assert!(attempt(&out, None, 1 << 20, |piece| piece == 30).is_none());
    let (draft, notes) = resume_with_notes(&out, None, &journal(1)).expect("draft");
    interrupt(draft, &out);
    let file = partial(&out).join("JOURNAL");
    let bytes = fs::read(&file).expect("read");
    assert!(notes.len() > 5, "{notes:?}");
    let mut shorter = 0;
    // Behind the first mark; without it there is nothing to go on with.
    let second = records(&bytes)[2].start - RECORD;
    for at in (second..bytes.len()).step_by(bytes.len() / 40) {
        for cut in [false, true] {
            let mut damaged = bytes.clone();
            damaged[at] ^= 16;
            damaged.truncate(if cut { at } else { bytes.len() });
            fs::write(&file, damaged).expect("write");
            let (draft, found) = resume_with_notes(&out, None, &journal(1)).expect("draft");
            match draft.found() {
                Found::Marks => {
                    assert!(found.len() < notes.len() && notes.starts_with(&found), "byte {at}: {found:?}");
                    shorter += 1;
                }
                found => panic!("byte {at}: {found:?}"),
            }
            interrupt(draft, &out);
        }
    }
    assert!(shorter > 40, "{shorter}");
    // From the earliest of them to the end.
    attempt(&out, None, 1 << 20, |_| false).expect("committed");
    assert_same(&out, &whole);
}

/// What is found after each kind of damage, and that the result is right all the same.
#[test]
fn what_is_not_as_the_journal_says_is_not_gone_on_with() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (whole, out) = (dir.path().join("whole.dsv4"), dir.path().join("x.dsv4"));
    pack(&whole);
    let damage = |damage: &dyn Fn(&Path)| {
        assert!(attempt(&out, None, 1 << 20, |piece| piece == 10).is_none());
        damage(&partial(&out));
        let draft = resume(&out, None, &journal(1 << 20)).expect("draft");
        let found = draft.found().clone();
        drop(draft);
        assert!(!partial(&out).exists());
        found
    };
    let discarded = |found: Found| match found {
        Found::Discarded(reason) => reason,
        found => panic!("{found:?}"),
    };
    // The block in the making, at the beginning of its section.
    let flips = |p: &Path| (0..2).for_each(|mib| flip(&p.join("rank1.weights"), (12 << 20) + (mib << 20) + 5));
    assert!(attempt(&out, None, 1 << 20, |piece| piece == 31).is_none());
    flips(&partial(&out));
    let draft = resume(&out, None, &journal(1 << 20)).expect("draft");
    assert_eq!(discarded(draft.found().clone()), "a block is not as its journal says");
    drop(draft);

    let file = discarded(damage(&|p| fs::remove_file(p.join("rank0.weights")).expect("remove")));
    assert_eq!(file, "a rank's file is not as its journal says");
    let cut =
        |p: &Path| fs::OpenOptions::new().write(true).open(p.join("rank0.weights")).and_then(|f| f.set_len(1 << 20));
    assert_eq!(discarded(damage(&|p| cut(p).expect("cut"))), "a rank's file is not as its journal says");
    assert_eq!(discarded(damage(&|p| flip(&p.join("JOURNAL"), 21))), "its journal is damaged");
    let first = RECORD + 44 + "pack of a".len();
    // Without a mark, without a journal, empty: nothing that anybody would miss.
    assert_eq!(
        damage(&|p| fs::write(p.join("JOURNAL"), &fs::read(p.join("JOURNAL")).expect("read")[..first]).expect("cut")),
        Found::Nothing
    );
    assert_eq!(discarded(damage(&|p| fs::write(p.join("JOURNAL"), b"").expect("empty"))), "its journal is damaged");
    assert_eq!(damage(&|p| fs::remove_file(p.join("JOURNAL")).expect("remove")), Found::Nothing);

    attempt(&out, None, 1 << 20, |_| false).expect("committed");
    assert_same(&out, &whole);
}

#[test]
fn another_plan_or_fresh_starts_over_and_foreign_files_stay() {
    let dir = tempfile::tempdir().expect("tempdir");
    let out = dir.path().join("x.dsv4");
    assert!(attempt(&out, None, 1 << 20, |piece| piece == 10).is_none());
    let changed = JournalOptions { plan: Digest([8; 32]), ..journal(1) };
    // Of something else: not without being told to.
    let other = JournalOptions { subject: "pack of b".into(), ..changed.clone() };
    let error = resume(&out, None, &other).err().expect("a pack of a");
    let FormatError::Unfinished { ref expected, ref found, .. } = error else { panic!("{error}") };
    assert_eq!((expected.as_str(), found.as_str()), ("pack of b", "pack of a"));
    assert!(error.to_string().contains("--fresh"), "{error}");
    // The same under another name: the checkpoint was moved.
    let moved = JournalOptions { plan: PLAN, ..other };
    let draft = resume(&out, None, &moved).expect("draft");
    assert_eq!(*draft.found(), Found::Marks);
    interrupt(draft, &out);
    let draft = resume(&out, None, &changed).expect("draft");
    assert_eq!(*draft.found(), Found::Discarded("the checkpoint's files, its config or this program changed"));
    drop(draft);
    assert!(attempt(&out, None, 1 << 20, |piece| piece == 10).is_none());
    let draft = resume(&out, None, &JournalOptions { fresh: true, ..journal(1) }).expect("draft");
    assert_eq!(*draft.found(), Found::Nothing);
    drop(draft);
    assert!(attempt(&out, None, 1 << 20, |piece| piece == 10).is_none());
    fs::write(partial(&out).join("thesis"), b"years of work").expect("write");
    for fresh in [false, true] {
        let error = resume(&out, None, &JournalOptions { fresh, ..journal(1) }).err().expect("occupied");
        assert!(matches!(error, FormatError::Occupied { .. }) && error.to_string().contains("thesis"), "{error}");
        assert!(partial(&out).join("JOURNAL").exists());
    }
    fs::remove_file(partial(&out).join("thesis")).expect("remove");
    // A draft without a journal discards it.
    pack(&out);
    assert!(!out.join("JOURNAL").exists() && !partial(&out).exists());
}

#[test]
fn faults_of_the_input_leave_nothing() {
    let dir = tempfile::tempdir().expect("tempdir");
    let out = dir.path().join("x.dsv4");
    assert!(attempt(&out, None, 1 << 20, |piece| piece == 10).is_none());
    let mut draft = resume(&out, None, &journal(1)).expect("draft");
    let mut writer = draft.rank_writer(0).expect("writer");
    let error = draft.failed(writer.append("layers.1.s", &[1]).expect_err("not its turn"));
    assert!(matches!(error, FormatError::Order { .. }), "{error}");
    drop((writer, draft));
    assert!(!partial(&out).exists());
    // Nor does a fault of the machine before the first mark.
    let mut draft = resume(&out, None, &journal(1)).expect("draft");
    let error = draft.failed(io_error(&out));
    assert!(matches!(error, FormatError::Io { .. }), "{error}");
    drop(draft);
    assert!(!partial(&out).exists());
}

#[test]
fn a_pack_and_a_receive_do_not_take_each_others_partials() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (whole, out) = (dir.path().join("whole.dsv4"), dir.path().join("x.dsv4"));
    pack(&whole);
    let manifest = fs::read(whole.join("MANIFEST")).expect("read");
    let receive = |force| Receiving::begin(&out, &manifest, &[0, 1], force);

    assert!(attempt(&out, None, 1 << 20, |piece| piece == 10).is_none());
    let error = receive(false).err().expect("a pack's");
    assert!(error.to_string().contains("an interrupted receive left, found what an interrupted pack left"), "{error}");
    assert!(error.to_string().contains("the same pack command") && error.to_string().contains("--force"), "{error}");
    assert!(partial(&out).join("JOURNAL").exists());
    let receiving = receive(true).expect("discarded");
    assert!(!partial(&out).join("JOURNAL").exists());

    drop(receiving);
    let error = resume(&out, None, &journal(1)).err().expect("a receive's");
    assert!(
        error.to_string().contains("interrupted pack of a left, found what an interrupted receive left"),
        "{error}"
    );
    assert!(error.to_string().contains("repeat the push") && error.to_string().contains("--fresh"), "{error}");
    assert!(partial(&out).join("MANIFEST").exists());
    let draft = resume(&out, None, &JournalOptions { fresh: true, ..journal(1) }).expect("discarded");
    assert!(!partial(&out).join("MANIFEST").exists());
    drop(draft);

    // A receive that lacks nothing but its name is one still.
    let put = |receipt: &str| {
        fs::create_dir(partial(&out)).expect("dir");
        for name in ["MANIFEST", "meta", "rank0.weights", "rank1.weights"] {
            fs::copy(whole.join(name), partial(&out).join(name)).expect("copy");
        }
        fs::write(partial(&out).join("RECEIPT.json"), receipt).expect("write");
    };
    put("{\"from\":\"elsewhere\"}");
    let error = resume(&out, None, &journal(1)).err().expect("a receive's");
    assert!(matches!(error, FormatError::Unfinished { ref found, .. } if found == "receive"), "{error}");
    drop(resume(&out, None, &JournalOptions { fresh: true, ..journal(1) }).expect("discarded"));
    // A pack of this plan is what a crash between two last steps left; of another, it is somebody's.
    put(&format!("{{\"plan\":\"{PLAN}\"}}"));
    let found = resume(&out, None, &journal(1)).expect("draft").found().clone();
    assert!(matches!(found, Found::Discarded(reason) if reason.contains("complete but for its name")), "{found:?}");
    put("{\"plan\":\"another\"}");
    let error = resume(&out, None, &journal(1)).err().expect("another pack's");
    assert!(matches!(error, FormatError::Unfinished { ref found, .. } if found == "pack of something else"), "{error}");
    // Beside a finished artifact it is the one that this replaced.
    pack_with(&dir.path().join("y.dsv4"), 1 << 20, "{}", None, false).expect("pack");
    fs::rename(dir.path().join("y.dsv4"), &out).expect("rename");
    assert_eq!(*resume(&out, None, &journal(1)).expect("draft").found(), Found::Nothing);
    // So it is with the receipt of a receive, and without one; but not when something is missing.
    put("{\"from\":\"elsewhere\"}");
    assert_eq!(*resume(&out, None, &journal(1)).expect("draft").found(), Found::Nothing);
    for lacking in [None, Some("meta"), Some("rank0.weights")] {
        put("{}");
        let files = std::iter::once("RECEIPT.json").chain(lacking);
        files.for_each(|name| fs::remove_file(partial(&out).join(name)).expect("remove"));
        if lacking == Some("rank0.weights") {
            let len = fs::metadata(whole.join("rank0.weights")).expect("metadata").len();
            let file = fs::File::create(partial(&out).join("rank0.weights")).expect("create");
            file.set_len(len).expect("length");
        }
        match (lacking, resume(&out, None, &journal(1))) {
            (None, draft) => assert_eq!(*draft.expect("draft").found(), Found::Nothing),
            (_, draft) => assert!(matches!(draft.err(), Some(FormatError::Unfinished { .. })), "{lacking:?}"),
        }
        let _ = fs::remove_dir_all(partial(&out));
    }
}

/// Interrupted when the small files were there already.
#[test]
fn a_commit_that_was_cut_short_is_done_again() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (whole, out) = (dir.path().join("whole.dsv4"), dir.path().join("x.dsv4"));
    pack(&whole);
    let end = tensors(0).len() as u64 * PIECES;
    assert!(attempt(&out, None, 1, |piece| piece == end - 1).is_none());
    for name in ["MANIFEST", "meta", "RECEIPT.json", "kernels.sm_121a"] {
        fs::write(partial(&out).join(name), b"from last time").expect("write");
    }
    flip(&partial(&out).join("rank0.weights"), 3);
    let (draft, notes) = resume_with_notes(&out, None, &journal(1)).expect("draft");
    // The last mark may not have been on the medium yet.
    assert!(next_piece(&notes) >= end - 1);
    assert_eq!(fs::read_dir(partial(&out)).expect("list").count(), 3);
    interrupt(draft, &out);
    let last = |piece| {
        assert!(piece >= end - 1, "piece {piece} was there");
        false
    };
    attempt(&out, None, 1, last).expect("committed");
    assert_same(&out, &whole);
}

/// Ranges of the payloads.
fn records(journal: &[u8]) -> Vec<std::ops::Range<usize>> {
    let (mut out, mut at) = (Vec::new(), 0);
    while at < journal.len() {
        let len = u32::from_le_bytes(journal[at..at + 4].try_into().expect("a length")) as usize;
        out.push(at + RECORD..at + RECORD + len);
        at += RECORD + len;
    }
    out
}

/// A journal of these payloads whose checks are right.
fn sealed(payloads: &[Vec<u8>]) -> Vec<u8> {
    let (mut out, mut chain) = (Vec::new(), [0; 32]);
    for payload in payloads {
        let len = (payload.len() as u32).to_le_bytes();
        chain = *blake3::Hasher::new().update(&chain).update(&len).update(payload).finalize().as_bytes();
        out.extend([&len[..], &chain[..16], payload].concat());
    }
    out
}

/// Goes on from notes that may say anything.
fn to_its_end(mut draft: Draft, notes: &[Vec<u8>]) -> Result<Committed, FormatError> {
    let Some(first) = notes.last().and_then(|note| Some(u64::from_le_bytes(note.as_slice().try_into().ok()?))) else {
        return Err(FormatError::WriterFailed { rank: 0 });
    };
    let mut writers: Vec<_> = (0..2).map(|rank| draft.rank_writer(rank).expect("writer")).collect();
    let mut marks = draft.marks(&writers)?;
    let all = [tensors(0), tensors(1)];
    for piece in first..all[0].len() as u64 * PIECES {
        for (rank, writer) in writers.iter_mut().enumerate() {
            let (_, tensor) = &all[rank][(piece / PIECES) as usize];
            let bytes = content(rank as u32, &tensor.name, tensor.len);
            let at = |n: u64| (tensor.len * n / PIECES) as usize;
            let part = &bytes[at(piece % PIECES)..at(piece % PIECES + 1)];
            if !part.is_empty() {
                writer.append(&tensor.name, part)?;
            }
        }
        marks.offer(&mut writers, || (piece + 1).to_le_bytes().to_vec())?;
    }
    let ranks = marks.finish(writers, vec![0; 8])?;
    draft.read_back(&ranks, &NoProgress)?;
    draft.write_meta(&meta())?;
    draft.commit(input(ranks, "{}"), false, &NoProgress)
}

/// Marks that no check betrays: whatever they say, nothing gets the name but the artifact.
#[test]
fn no_forged_journal_makes_another_artifact() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (whole, out, kept) = (dir.path().join("whole.dsv4"), dir.path().join("x.dsv4"), dir.path().join("kept"));
    pack(&whole);
    assert!(attempt(&out, None, 1 << 20, |piece| piece == 33).is_none());
    fs::rename(partial(&out), &kept).expect("rename");
    let bytes = fs::read(kept.join("JOURNAL")).expect("read");
    let payloads: Vec<Vec<u8>> = records(&bytes).into_iter().map(|range| bytes[range].to_vec()).collect();
    assert!(payloads.len() > 5 && sealed(&payloads) == bytes);
    let mut noise = Noise::new(5);
    let (mut went_on, mut started_over) = (0, 0);
    for round in 0..150 {
        let mut forged = payloads.clone();
        for _ in 0..1 + noise.below(3) {
            let which = 1 + noise.below(forged.len() as u64 - 1) as usize;
            let other = forged[noise.below(payloads.len() as u64) as usize].clone();
            let mark = &mut forged[which];
            let at = noise.below(mark.len() as u64) as usize;
            match noise.below(6) {
                0 => mark[at] ^= 1 << noise.below(8),
                1 => mark[at] = noise.next() as u8,
                2 => mark.truncate(at),
                3 => mark.extend(std::iter::repeat_n(7, 1 + noise.below(40) as usize)),
                4 => *mark = other,
                // A length or number.
                _ => mark.iter_mut().skip(at / 8 * 8).take(8).for_each(|byte| *byte = 0xff),
            }
        }
        fs::create_dir(partial(&out)).expect("dir");
        let to_the_end = went_on < 12;
        for name in ["rank0.weights", "rank1.weights"] {
            let (from, to) = (kept.join(name), partial(&out).join(name));
            if to_the_end { fs::copy(from, to).map(drop) } else { fs::hard_link(from, to) }.expect("put");
        }
        fs::write(partial(&out).join("JOURNAL"), sealed(&forged)).expect("write");
        let (draft, notes) = resume_with_notes(&out, None, &journal(1 << 20)).expect("no error but I/O");
        match draft.found() {
            Found::Marks => went_on += 1,
            Found::Discarded(_) => started_over += 1,
            Found::Nothing => panic!("round {round}"),
        }
        if *draft.found() == Found::Marks && to_the_end {
            match to_its_end(draft, &notes) {
                Ok(_) => {
                    assert_same(&out, &whole);
                    fs::remove_dir_all(&out).expect("remove");
                }
                Err(error) => assert!(error.to_string().contains("\n  help: "), "round {round}: {error}"),
            }
        } else {
            drop(draft);
        }
        assert!(!partial(&out).exists());
    }
    assert!(went_on > 10 && started_over > 10, "{went_on}, {started_over}");
}

/// A journal that somebody made long: notes are not kept, and a mark has a bound.
#[test]
fn a_note_is_judged_when_it_is_read_and_one_that_does_not_follow_starts_over() {
    let dir = tempfile::tempdir().expect("tempdir");
    let out = dir.path().join("x.dsv4");
    assert!(attempt(&out, None, 1 << 20, |piece| piece == 33).is_none());
    let mut taken = 0;
    let take = &mut |_: &[u8]| {
        taken += 1;
        taken < 3
    };
    let draft = Draft::resume(&out, layouts(), &DraftOptions::default(), &journal(1), take).expect("draft");
    assert_eq!(*draft.found(), Found::Discarded("its journal is damaged"));
    drop(draft);
    assert_eq!(taken, 3);

    // The last mark becomes longer than any of this plan.
    assert!(attempt(&out, None, 1 << 20, |piece| piece == 33).is_none());
    let file = partial(&out).join("JOURNAL");
    let bytes = fs::read(&file).expect("read");
    let mut payloads: Vec<Vec<u8>> = records(&bytes).into_iter().map(|range| bytes[range].to_vec()).collect();
    payloads.last_mut().expect("a mark").resize(1 << 20, 0);
    fs::write(&file, sealed(&payloads)).expect("write");
    let (draft, notes) = resume_with_notes(&out, None, &journal(1)).expect("draft");
    assert_eq!((draft.found(), notes.len()), (&Found::Marks, payloads.len() - 2));
}

/// A rank's file ends early for a moment, as a disk that does not answer for its end.
#[test]
fn what_cannot_be_read_back_for_a_moment_is_kept() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (whole, out) = (dir.path().join("whole.dsv4"), dir.path().join("x.dsv4"));
    pack(&whole);
    let end = tensors(0).len() as u64 * PIECES;
    assert!(attempt(&out, None, 1, |piece| piece == end - 1).is_none());
    let mut draft = resume(&out, None, &journal(1)).expect("draft");
    let ranks = Artifact::open(&whole).expect("open").manifest().ranks.clone();
    let file = partial(&out).join("rank1.weights");
    let bytes = fs::read(&file).expect("read");
    let cut = fs::OpenOptions::new().write(true).open(&file).expect("open");
    cut.set_len(5 << 20).expect("cut");
    let error = draft.read_back(&ranks, &NoProgress).expect_err("cut");
    assert!(matches!(error, FormatError::ReadBackIo { block: 1, reads: 3, .. }), "{error}");
    assert!(error.to_string().contains("cannot be read back") && error.to_string().contains("help:"), "{error}");
    let error = draft.failed(error);
    assert!(matches!(error, FormatError::Kept { .. }), "{error}");
    drop(draft);
    fs::write(&file, bytes).expect("write");
    attempt(&out, None, 1, |_| false).expect("committed");
    assert_same(&out, &whole);
}

/// Only what an earlier process wrote, and only of kept files.
#[test]
fn what_was_there_already_is_read_back_alone() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (whole, out) = (dir.path().join("whole.dsv4"), dir.path().join("x.dsv4"));
    pack(&whole);
    let ranks = Artifact::open(&whole).expect("open").manifest().ranks.clone();
    let draft = resume(&out, None, &journal(1)).expect("draft");
    assert!(!draft.read_back_resumed(&ranks, &NoProgress).expect("nothing was there"));
    drop(draft);
    // Two blocks of each rank are complete.
    assert!(attempt(&out, None, 1, |piece| piece == 14).is_none());
    let draft = resume(&out, None, &journal(1)).expect("draft");
    assert!(draft.read_back_resumed(&ranks, &NoProgress).expect("as written"));
    flip(&partial(&out).join("rank0.weights"), (2 << 20) + (5 << 20));
    let error = draft.read_back_resumed(&ranks, &NoProgress).expect_err("damaged since");
    assert!(matches!(error, FormatError::ReadBack { block: 1, .. }), "{error}");
}

struct Mounted<'a>(&'a Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg(self.0).status();
    }
}

/// A directory that is a mount point cannot be renamed.
#[test]
fn a_name_that_cannot_be_given_leaves_the_journal() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (whole, out) = (dir.path().join("whole.dsv4"), dir.path().join("x.dsv4"));
    pack(&whole);
    let end = tensors(0).len() as u64 * PIECES;
    assert!(attempt(&out, None, 1, |piece| piece == end - 1).is_none());
    let mut draft = resume(&out, None, &journal(1)).expect("draft");
    let there = partial(&out);
    let mount = std::process::Command::new("mount").arg("--bind").args([&there, &there]).output();
    if !mount.is_ok_and(|output| output.status.success()) {
        eprintln!("SKIPPED a_name_that_cannot_be_given_leaves_the_journal: nothing can be mounted here");
        return;
    }
    let mounted = Mounted(&there);
    let ranks = Artifact::open(&whole).expect("open").manifest().ranks.clone();
    draft.write_meta(&meta()).expect("meta");
    let error = draft.commit(input(ranks, "{}"), false, &NoProgress).expect_err("busy");
    let FormatError::Kept { ref source, .. } = error else { panic!("{error}") };
    assert!(source.to_string().contains("cannot give the final name"), "{error}");
    drop(mounted);
    assert!(there.join("JOURNAL").exists() && !out.exists());
    let draft = resume(&out, None, &journal(1)).expect("draft");
    assert_eq!(*draft.found(), Found::Marks);
    interrupt(draft, &out);
    attempt(&out, None, 1, |_| false).expect("committed");
    assert_same(&out, &whole);
}

/// A full disk at the first mark: there is nothing to go on with, and nobody says so.
#[test]
fn a_mark_that_was_begun_is_none() {
    let dir = tempfile::tempdir().expect("tempdir");
    let out = dir.path().join("x.dsv4");
    let mut draft = resume(&out, None, &journal(1)).expect("draft");
    let file = partial(&out).join("JOURNAL");
    let torn = [fs::read(&file).expect("read"), vec![9; 500]].concat();
    fs::write(&file, torn).expect("write");
    let error = draft.failed(io_error(&out));
    assert!(matches!(error, FormatError::Io { .. }), "{error}");
    drop(draft);
    assert!(!partial(&out).exists());
}

/// Ranks that the artifact has are hashed, not written; without it, they are nothing.
#[test]
fn what_is_there_is_not_written_again() {
    let dir = tempfile::tempdir().expect("tempdir");
    let out = dir.path().join("x.dsv4");
    let expected = pack(&out);
    let there = JournalOptions { there: vec![0, 1], ..journal(1 << 20) };
    let packed = |vanishes: bool| {
        let mut draft = resume(&out, None, &there).expect("draft");
        assert_eq!(fs::read_dir(partial(&out)).expect("list").count(), 1);
        let ranks: Vec<_> = (0..2).map(|rank| support::write_rank(&mut draft, rank, 1 << 20)).collect();
        assert_eq!(fs::read_dir(partial(&out)).expect("list").count(), 1);
        draft.write_meta(&meta()).expect("meta");
        if vanishes {
            fs::remove_dir_all(&out).expect("remove");
        }
        draft.commit(input(ranks, "{}"), false, &NoProgress)
    };
    let again = packed(false).expect("the same");
    assert_eq!((again.artifact_id, again.outcome), (expected.artifact_id, Outcome::AlreadyThere));
    let error = packed(true).expect_err("nothing to add to");
    assert!(matches!(error, FormatError::NoRanks { .. }), "{error}");
    assert!(!out.exists() && !partial(&out).exists());
}
