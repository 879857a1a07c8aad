//! Drafts that are interrupted and gone on with: the same bytes as ever, or from the beginning.

mod support;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use dsv4_format::{
    Artifact, Committed, Digest, Draft, DraftOptions, FormatError, Found, JournalOptions, NoProgress, Outcome,
    Receiving, Tensor,
};
use support::{content, flip, input, layouts, meta, pack};

const PLAN: Digest = Digest([9; 32]);
/// Pieces of each tensor: several marks fall inside the large ones.
const PIECES: u64 = 7;

fn journal(every_bytes: u64) -> JournalOptions {
    JournalOptions { plan: PLAN, every_bytes, fresh: false }
}

fn resume(out: &Path, only_rank: Option<u32>, journal: &JournalOptions) -> Result<Draft, FormatError> {
    Draft::resume(out, layouts(), &DraftOptions { only_rank }, journal)
}

fn partial(out: &Path) -> PathBuf {
    out.with_file_name(format!(".{}.partial", out.file_name().expect("name").to_str().expect("text")))
}

fn tensors(rank: u32) -> Vec<(u64, Tensor)> {
    let sections = layouts()[rank as usize].sections().to_vec();
    sections.into_iter().flat_map(|s| s.tensors.into_iter().map(move |t| (s.offset, t))).collect()
}

/// Number of the piece that a note says comes next.
fn next_piece(found: &Found) -> u64 {
    match found {
        Found::Marks(notes) => {
            u64::from_le_bytes(notes.last().expect("a mark").as_slice().try_into().expect("a number"))
        }
        _ => 0,
    }
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
    let mut draft = resume(out, only_rank, &journal(every)).expect("draft");
    let first = next_piece(draft.found());
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
    let before = journal_bytes(out).max(80);
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
        let draft = resume(&out, None, &journal(5 << 20)).expect("draft");
        let next = next_piece(draft.found());
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
        let draft = resume(&out, None, &journal(1)).expect("draft");
        let next = next_piece(draft.found());
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
    let draft = resume(&out, None, &journal(1)).expect("draft");
    let Found::Marks(notes) = draft.found().clone() else { panic!("no marks") };
    interrupt(draft, &out);
    let file = partial(&out).join("JOURNAL");
    let bytes = fs::read(&file).expect("read");
    assert!(notes.len() > 5, "{notes:?}");
    let mut shorter = 0;
    // Behind the first mark; without it there is nothing to go on with.
    let len = u32::from_le_bytes(bytes[64..68].try_into().expect("a length"));
    let second = 64 + 20 + len as usize;
    for at in (second..bytes.len()).step_by(bytes.len() / 40) {
        for cut in [false, true] {
            let mut damaged = bytes.clone();
            damaged[at] ^= 16;
            damaged.truncate(if cut { at } else { bytes.len() });
            fs::write(&file, damaged).expect("write");
            let draft = resume(&out, None, &journal(1)).expect("draft");
            match draft.found().clone() {
                Found::Marks(found) => {
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
    // Without a mark, without a journal, empty: nothing that anybody would miss.
    assert_eq!(
        damage(&|p| fs::write(p.join("JOURNAL"), &fs::read(p.join("JOURNAL")).expect("read")[..64]).expect("cut")),
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
    let other = JournalOptions { plan: Digest([8; 32]), ..journal(1) };
    let draft = resume(&out, None, &other).expect("draft");
    assert_eq!(*draft.found(), Found::Discarded("it is of another checkpoint or of other options"));
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
    assert!(matches!(error, FormatError::Unfinished { expected: "receive", found: "pack", .. }), "{error}");
    assert!(error.to_string().contains("the same pack command") && error.to_string().contains("--force"), "{error}");
    assert!(partial(&out).join("JOURNAL").exists());
    let receiving = receive(true).expect("discarded");
    assert!(!partial(&out).join("JOURNAL").exists());

    drop(receiving);
    let error = resume(&out, None, &journal(1)).err().expect("a receive's");
    assert!(matches!(error, FormatError::Unfinished { expected: "pack", found: "receive", .. }), "{error}");
    assert!(error.to_string().contains("repeat the push") && error.to_string().contains("--fresh"), "{error}");
    assert!(partial(&out).join("MANIFEST").exists());
    let draft = resume(&out, None, &JournalOptions { fresh: true, ..journal(1) }).expect("discarded");
    assert!(!partial(&out).join("MANIFEST").exists());
    drop(draft);

    // A whole artifact there is what a crash between two last steps left: nobody goes on with it.
    fs::create_dir(partial(&out)).expect("dir");
    for name in ["MANIFEST", "meta", "rank0.weights", "rank1.weights", "RECEIPT.json"] {
        fs::copy(whole.join(name), partial(&out).join(name)).expect("copy");
    }
    assert_eq!(*resume(&out, None, &journal(1)).expect("draft").found(), Found::Nothing);
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
    let draft = resume(&out, None, &journal(1)).expect("draft");
    // The last mark may not have been on the medium yet.
    assert!(next_piece(draft.found()) >= end - 1);
    assert_eq!(fs::read_dir(partial(&out)).expect("list").count(), 3);
    interrupt(draft, &out);
    let last = |piece| {
        assert!(piece >= end - 1, "piece {piece} was there");
        false
    };
    attempt(&out, None, 1, last).expect("committed");
    assert_same(&out, &whole);
}
