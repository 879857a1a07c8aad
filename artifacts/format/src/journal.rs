//! JOURNAL: how far an interrupted pack came. Records are only ever appended.
//!
//! A record is its payload's length (u32), 16 bytes of check, and the payload. The check is the
//! beginning of BLAKE3 over everything before it: the whole hash of the record before, this length,
//! this payload. So reading stops at the first record that is torn, damaged or not the next one, and what
//! comes after it counts for nothing. The first record names the plan and, in words, its subject; each other one is a
//! mark: what was on the medium when it was appended ([`Position`], block values and the block in the
//! making of every rank, and a note of the packer's own).
//!
//! Absent: when marks are taken (`marks.rs`), and any trust in a mark whose files are not as it says.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::artifact::is_artifact_file;
use crate::error::FormatError;
use crate::header::BLOCK_BYTES;
use crate::io::AlignedBuf;
use crate::layout::{RankLayout, SectionLayout};
use crate::manifest::Digest;
use crate::section::block_count;
use crate::tree_hash::TreeHash;

pub(crate) const JOURNAL_FILE: &str = "JOURNAL";
const MAGIC: &[u8; 8] = b"DSV4JRNL";
const VERSION: u32 = 2;
const CHECK_BYTES: usize = 16;
/// Of the first record's payload: a subject holds a path.
const HEADER_BYTES_MAX: usize = 16 << 10;

/// What a journal is of.
pub(crate) struct Subject<'a> {
    /// Everything that decides what is written.
    pub plan: &'a Digest,
    /// What a user would call it.
    pub words: &'a str,
    /// No mark is longer.
    pub mark_bytes_max: usize,
}

impl Subject<'_> {
    fn header(&self) -> Vec<u8> {
        [&MAGIC[..], &VERSION.to_le_bytes(), self.plan.as_bytes(), self.words.as_bytes()].concat()
    }

    /// In whatever words: a checkpoint may have been moved.
    fn is_of_plan(&self, first: &[u8]) -> bool {
        first.starts_with(&self.header()[..MAGIC.len() + 4 + 32])
    }

    /// What the first record is good for, if it is not this subject's.
    fn other(&self, first: &[u8]) -> Opened {
        let Some(rest) = first.strip_prefix(MAGIC) else { return Opened::Damaged };
        let Some(rest) = rest.strip_prefix(&VERSION.to_le_bytes()) else { return Opened::OtherVersion };
        match rest.get(self.plan.as_bytes().len()..) {
            None => Opened::Damaged,
            Some(words) if words == self.words.as_bytes() => Opened::Changed,
            Some(words) => Opened::Other(String::from_utf8_lossy(words).escape_debug().to_string()),
        }
    }
}

/// Whether some writer could have put a file of this name into a partial artifact.
pub(crate) fn is_partial_file(name: &str) -> bool {
    name == JOURNAL_FILE || is_artifact_file(name)
}

/// The open file, to be appended to.
pub(crate) struct Journal {
    path: PathBuf,
    file: File,
    /// Whole hash of the last record.
    chain: [u8; 32],
    mark_bytes_max: usize,
    /// Whether there is a mark on the medium.
    marked: Arc<AtomicBool>,
}

/// What a partial directory's JOURNAL is good for.
pub(crate) enum Opened {
    Missing,
    /// Its first record is none, or a sound one does not follow from those before it.
    Damaged,
    /// Written by a program that keeps it differently.
    OtherVersion,
    /// Of this subject by name, but of another plan.
    Changed,
    /// Of another subject; this one.
    Other(String),
    /// Cut behind the last good mark, if there is one ([`Journal::has_marks`]).
    Marks(Journal),
}

impl Journal {
    /// Begins a journal; it and its name are on the medium when the directory is synced, too.
    pub fn create(dir: &Path, subject: &Subject<'_>) -> Result<Journal, FormatError> {
        let path = dir.join(JOURNAL_FILE);
        let file = OpenOptions::new().append(true).create_new(true).open(&path);
        let file = file.map_err(|e| FormatError::io("create", &path, 0, e))?;
        let (marked, mark_bytes_max) = (Arc::default(), subject.mark_bytes_max);
        let mut journal = Journal { path, file, chain: [0; 32], mark_bytes_max, marked };
        journal.append_record(&subject.header(), HEADER_BYTES_MAX)?;
        Ok(journal)
    }

    /// Reads what is there, handing every mark to `apply`, which says whether it follows from those
    /// before it. Errors: I/O alone.
    pub fn open(
        dir: &Path,
        subject: &Subject<'_>,
        mut apply: impl FnMut(&[u8]) -> bool,
    ) -> Result<Opened, FormatError> {
        let path = dir.join(JOURNAL_FILE);
        let failed = |action, e| FormatError::io(action, &path, 0, e);
        let file = match OpenOptions::new().read(true).append(true).open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Opened::Missing),
            Err(e) => return Err(failed("open", e)),
        };
        let mut reader = BufReader::new(&file);
        let mut chain = [0; 32];
        let mut next = |chain: &mut [u8; 32], max| read_record(&mut reader, chain, max).map_err(|e| failed("read", e));
        let mut good = 0;
        match next(&mut chain, HEADER_BYTES_MAX)? {
            Some(first) if subject.is_of_plan(&first) => good += record_bytes(first.len()),
            Some(first) => return Ok(subject.other(&first)),
            None => return Ok(Opened::Damaged),
        }
        let mut marked = false;
        let mut last = chain;
        while let Some(payload) = next(&mut chain, subject.mark_bytes_max)? {
            if !apply(&payload) {
                return Ok(Opened::Damaged);
            }
            good += record_bytes(payload.len());
            marked = true;
            last = chain;
        }
        let cut = || -> io::Result<()> {
            file.set_len(good)?;
            (&file).seek(SeekFrom::End(0))?;
            file.sync_all()
        };
        cut().map_err(|e| failed("cut", e))?;
        let (marked, mark_bytes_max) = (Arc::new(AtomicBool::new(marked)), subject.mark_bytes_max);
        Ok(Opened::Marks(Journal { path, file, chain: last, mark_bytes_max, marked }))
    }

    /// Whether there is a mark on the medium; stays true of what this says as marks are appended.
    pub fn has_marks(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.marked)
    }

    /// Appends a mark; returns when it is on the medium.
    pub fn append(&mut self, mark: &[u8]) -> Result<(), FormatError> {
        self.append_record(mark, self.mark_bytes_max)?;
        self.marked.store(true, Ordering::Release);
        Ok(())
    }

    fn append_record(&mut self, payload: &[u8], max: usize) -> Result<(), FormatError> {
        assert!(payload.len() <= max, "a record of {} bytes, {max} at most", payload.len());
        let len = (payload.len() as u32).to_le_bytes();
        let chain = chained(&self.chain, &len, payload);
        let record = [&len, &chain[..CHECK_BYTES], payload].concat();
        let written = self.file.write_all(&record).and_then(|()| self.file.sync_data());
        written.map_err(|e| FormatError::io("write", &self.path, record.len() as u64, e))?;
        self.chain = chain;
        Ok(())
    }
}

fn record_bytes(payload: usize) -> u64 {
    (4 + CHECK_BYTES + payload) as u64
}

fn chained(before: &[u8; 32], len: &[u8; 4], payload: &[u8]) -> [u8; 32] {
    *blake3::Hasher::new().update(before).update(len).update(payload).finalize().as_bytes()
}

/// The next payload, of at most `max` bytes, or nothing where the good records end.
fn read_record(reader: &mut impl Read, chain: &mut [u8; 32], max: usize) -> io::Result<Option<Vec<u8>>> {
    let mut len = [0; 4];
    let mut check = [0; CHECK_BYTES];
    if !filled(reader, &mut len)? || !filled(reader, &mut check)? {
        return Ok(None);
    }
    let expected = u32::from_le_bytes(len) as usize;
    if expected > max {
        return Ok(None);
    }
    let mut payload = Vec::new();
    reader.take(expected as u64).read_to_end(&mut payload)?;
    let found = chained(chain, &len, &payload);
    if payload.len() != expected || found[..CHECK_BYTES] != check {
        return Ok(None);
    }
    *chain = found;
    Ok(Some(payload))
}

/// Whether there were enough bytes left.
fn filled(reader: &mut impl Read, buf: &mut [u8]) -> io::Result<bool> {
    match reader.read_exact(buf) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(e) => Err(e),
    }
}

/// Where the writing of one rank stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Position {
    /// Next tensor to arrive and how much of it has; `section` is past the end when all are there.
    pub section: usize,
    pub tensor: usize,
    pub filled: u64,
    /// Bytes of the section that have a place, padding included.
    pub at: u64,
}

impl Position {
    /// Bytes of the block in the making.
    pub fn in_block(&self) -> usize {
        (self.at % BLOCK_BYTES) as usize
    }

    /// Index and number of the block in the making, or the next one.
    pub fn block(&self) -> (usize, u64) {
        (self.section, self.at / BLOCK_BYTES)
    }

    /// Bytes of the rank's arena before it.
    pub fn bytes(&self, layout: &RankLayout) -> u64 {
        match layout.sections().get(self.section) {
            Some(section) => section.offset - layout.sections()[0].offset + self.at,
            None => layout.arena_bytes(),
        }
    }

    /// Whether a writer of this layout can stand here.
    fn is_of(&self, layout: &RankLayout) -> bool {
        let Some(section) = layout.sections().get(self.section) else {
            return *self == Position { section: layout.sections().len(), ..Position::default() };
        };
        let Some(tensor) = section.tensors.get(self.tensor) else { return false };
        let before = self.tensor.checked_sub(1).map_or(0, |n| section.tensors[n].offset + section.tensors[n].len);
        match self.filled {
            0 => (before..=tensor.offset).contains(&self.at),
            filled => filled < tensor.len && self.at == tensor.offset + filled,
        }
    }
}

/// The complete blocks from one position to a later one: (section, block), in file order.
pub(crate) fn blocks_between(layout: &RankLayout, from: Position, to: Position) -> Vec<(usize, u64)> {
    let count = |section: &SectionLayout| block_count(section.len);
    let mut out = Vec::new();
    for (index, section) in layout.sections().iter().enumerate().skip(from.section).take(to.section + 1 - from.section)
    {
        let first = if index == from.section { from.block().1 } else { 0 };
        let end = if index == to.section { to.block().1 } else { count(section) };
        out.extend((first..end).map(|block| (index, block)));
    }
    out
}

/// Appends one rank's part of a mark: position, new block values in file order, the block in the making.
pub(crate) fn encode_rank(out: &mut Vec<u8>, at: Position, values: impl Iterator<Item = [u8; 32]>, open: &TreeHash) {
    out.extend_from_slice(&(at.section as u32).to_le_bytes());
    out.extend_from_slice(&(at.tensor as u32).to_le_bytes());
    out.extend_from_slice(&at.filled.to_le_bytes());
    out.extend_from_slice(&at.at.to_le_bytes());
    values.for_each(|value| out.extend_from_slice(&value));
    open.encode(out);
}

/// What the marks so far say about one rank.
pub(crate) struct RankState {
    pub position: Position,
    /// Index = section, then block; of those before the position.
    pub values: Vec<Vec<[u8; 32]>>,
    /// Of the block in the making.
    pub open: TreeHash,
    /// Its bytes, once they were read back.
    pub bytes: Option<AlignedBuf>,
}

impl RankState {
    /// Nothing is there yet.
    pub fn new(layout: &RankLayout) -> RankState {
        let values = layout.sections().iter().map(|section| vec![[0; 32]; block_count(section.len) as usize]);
        RankState { position: Position::default(), values: values.collect(), open: TreeHash::new(), bytes: None }
    }

    /// Takes the next mark's part off `input`; `None` when it does not follow.
    fn apply(&mut self, layout: &RankLayout, input: &mut &[u8]) -> Option<()> {
        let position = Position {
            section: take_u32(input)? as usize,
            tensor: take_u32(input)? as usize,
            filled: take_u64(input)?,
            at: take_u64(input)?,
        };
        if !position.is_of(layout) || (position.section, position.at) < (self.position.section, self.position.at) {
            return None;
        }
        for (section, block) in blocks_between(layout, self.position, position) {
            let (value, rest) = input.split_first_chunk()?;
            self.values[section][block as usize] = *value;
            *input = rest;
        }
        self.open = TreeHash::decode_at(position.block().1 * BLOCK_BYTES, input)?;
        self.position = position;
        (self.open.count() == position.in_block() as u64).then_some(())
    }
}

/// No mark of ranks with these layouts is longer, but for the packer's note.
pub(crate) fn rank_bytes_max(layouts: &[impl AsRef<RankLayout>]) -> usize {
    let blocks = |layout: &RankLayout| layout.sections().iter().map(|s| block_count(s.len) as usize).sum::<usize>();
    layouts.iter().map(|layout| 24 + 32 * blocks(layout.as_ref()) + TreeHash::ENCODED_BYTES_MAX).sum()
}

/// Applies a mark to the states of all ranks; gives the packer's note. `None` when it does not follow
/// from the marks before it; the states are then good for nothing.
pub(crate) fn apply_mark<'a>(
    states: &mut [RankState],
    layouts: &[impl AsRef<RankLayout>],
    mark: &'a [u8],
) -> Option<&'a [u8]> {
    let mut input = mark;
    for (state, layout) in states.iter_mut().zip(layouts) {
        state.apply(layout.as_ref(), &mut input)?;
    }
    Some(input)
}

fn take_u32(input: &mut &[u8]) -> Option<u32> {
    let (bytes, rest) = input.split_first_chunk()?;
    *input = rest;
    Some(u32::from_le_bytes(*bytes))
}

fn take_u64(input: &mut &[u8]) -> Option<u64> {
    let (bytes, rest) = input.split_first_chunk()?;
    *input = rest;
    Some(u64::from_le_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAN: Digest = Digest([7; 32]);
    const SUBJECT: Subject<'_> = Subject { plan: &PLAN, words: "pack of a", mark_bytes_max: 100 };

    fn first_bytes() -> usize {
        record_bytes(SUBJECT.header().len()) as usize
    }

    fn marks() -> Vec<Vec<u8>> {
        (0..5u8).map(|n| (0..20 + n).map(|i| i.wrapping_mul(37) ^ n).collect()).collect()
    }

    fn written(dir: &Path) -> Vec<u8> {
        let mut journal = Journal::create(dir, &SUBJECT).expect("create");
        marks().iter().for_each(|mark| journal.append(mark).expect("append"));
        std::fs::read(dir.join(JOURNAL_FILE)).expect("read")
    }

    /// The marks that are still read from these bytes; nothing if the journal is none of this plan.
    fn read(dir: &Path, bytes: &[u8]) -> Option<(Journal, Vec<Vec<u8>>)> {
        std::fs::write(dir.join(JOURNAL_FILE), bytes).expect("write");
        let mut found = Vec::new();
        let opened = Journal::open(dir, &SUBJECT, |mark| {
            found.push(mark.to_vec());
            true
        });
        match opened.expect("no I/O error") {
            Opened::Marks(journal) => {
                assert_eq!(journal.has_marks().load(Ordering::Acquire), !found.is_empty());
                Some((journal, found))
            }
            Opened::Damaged => None,
            _ => panic!("the check covers the first record, too"),
        }
    }

    #[test]
    fn a_torn_tail_is_cut_and_written_over() {
        let dir = tempfile::tempdir().expect("tempdir");
        let whole = written(dir.path());
        let last = whole.len() - record_bytes(marks()[4].len()) as usize;
        for end in last..whole.len() {
            for tail in [vec![], vec![0; 70], whole[last..].to_vec()] {
                // What the end of a file may hold when the power went: less, zeros, or something older.
                let torn = [&whole[..end], &tail].concat();
                let (mut journal, found) = read(dir.path(), &torn).expect("of this plan");
                let expected = if torn.starts_with(&whole) { 5 } else { 4 };
                assert_eq!(found, marks()[..expected], "cut at {end}");
                journal.append(b"next").expect("append");
                let bytes = std::fs::read(dir.path().join(JOURNAL_FILE)).expect("read");
                let (_, found) = read(dir.path(), &bytes).expect("of this plan");
                assert_eq!((found.len(), found[expected].as_slice()), (expected + 1, &b"next"[..]));
            }
        }
    }

    #[test]
    fn no_flipped_bit_passes() {
        let dir = tempfile::tempdir().expect("tempdir");
        let whole = written(dir.path());
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << (at % 8);
            let mut end = first_bytes();
            let all = marks();
            let before = all.iter().take_while(|mark| {
                end += record_bytes(mark.len()) as usize;
                end <= at
            });
            let expected = before.count();
            match read(dir.path(), &bytes) {
                None => assert!(at < first_bytes(), "byte {at}"),
                Some((_, found)) => assert_eq!(found, marks()[..expected], "byte {at}"),
            }
        }
    }

    /// Records that are sound one by one, but not in their places.
    #[test]
    fn records_do_not_change_places() {
        let dir = tempfile::tempdir().expect("tempdir");
        let whole = written(dir.path());
        let first = first_bytes();
        let (a, b) = (record_bytes(marks()[0].len()) as usize, record_bytes(marks()[1].len()) as usize);
        let (head, rest) = whole.split_at(first);
        let swapped = [head, &rest[a..a + b], &rest[..a], &rest[a + b..]].concat();
        assert!(read(dir.path(), &swapped).expect("of this plan").1.is_empty());
        let left_out = [head, &rest[a..]].concat();
        assert!(read(dir.path(), &left_out).expect("of this plan").1.is_empty());
    }

    #[test]
    fn another_journal_is_known_for_what_it_is() {
        let dir = tempfile::tempdir().expect("tempdir");
        let open = |subject: &Subject<'_>| Journal::open(dir.path(), subject, |_| true).expect("no I/O error");
        Journal::create(dir.path(), &SUBJECT).expect("create");
        assert!(matches!(open(&SUBJECT), Opened::Marks(_)));
        let plan = Digest([8; 32]);
        assert!(matches!(open(&Subject { plan: &plan, ..SUBJECT }), Opened::Changed));
        let other = Subject { plan: &plan, words: "pack of b", ..SUBJECT };
        assert!(matches!(open(&other), Opened::Other(words) if words == "pack of a"));
        // The same plan in other words, as of a checkpoint that was moved.
        assert!(matches!(open(&Subject { words: "pack of b", ..SUBJECT }), Opened::Marks(_)));
        // Another version, with a check that is right.
        let mut first = SUBJECT.header();
        first[8] = 1;
        let len = (first.len() as u32).to_le_bytes();
        let chain = chained(&[0; 32], &len, &first);
        let bytes = [&len, &chain[..CHECK_BYTES], &first].concat();
        std::fs::write(dir.path().join(JOURNAL_FILE), bytes).expect("write");
        assert!(matches!(open(&SUBJECT), Opened::OtherVersion));
    }

    /// Nothing is read into memory that no pack of this plan could have written.
    #[test]
    fn a_mark_longer_than_the_plan_allows_is_none() {
        let dir = tempfile::tempdir().expect("tempdir");
        let mut journal = Journal::create(dir.path(), &Subject { mark_bytes_max: 1 << 20, ..SUBJECT }).expect("create");
        journal.append(&[1; 100]).expect("append");
        journal.append(&[2; 101]).expect("append");
        let bytes = std::fs::read(dir.path().join(JOURNAL_FILE)).expect("read");
        assert_eq!(read(dir.path(), &bytes).expect("of this plan").1, [vec![1; 100]]);
    }
}
