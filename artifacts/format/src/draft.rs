//! An artifact being written, in `.NAME.dsv4.partial/` beside its final place.
//!
//! A [`Partial`] holds the directory and its lock. Dropping a draft removes it, unless its journal is
//! kept for another attempt; only [`Draft::commit`] gives anything the final name, and
//! [`Draft::read_back`] says before whether the disk has what was written. What the journal of an
//! interrupted attempt says is believed only of the same plan, and only with the files as it says.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::artifact::{Artifact, is_artifact_file};
use crate::error::FormatError;
use crate::header::{BLOCK_BYTES, MANIFEST_FILE, META_FILE, RANKS_MAX, RECEIPT_FILE, rank_file_name};
use crate::io::{AlignedBuf, DIRECT_ALIGN, DirectFile};
use crate::journal::{
    JOURNAL_FILE, Journal, Opened, Position, RankState, Subject, apply_mark, is_partial_file, rank_bytes_max,
};
use crate::kernels::{self, KernelInput};
use crate::layout::RankLayout;
use crate::manifest::{Digest, KernelRecord, RankFile, StoredFile};
use crate::marks::Marks;
use crate::members;
use crate::parallel::default_threads;
use crate::partial::{Partial, foreign, remove_file};
use crate::progress::Progress;
use crate::rank_writer::RankWriter;
use crate::tree_hash::TreeHash;
use crate::verify::verify_blocks;

#[derive(Clone, Debug, Default)]
pub struct DraftOptions {
    /// Keep only this rank's file. All ranks are still appended and hashed, because the ids cover
    /// them all; the result has the same ids as a full one.
    pub only_rank: Option<u32>,
}

/// Its place in RECEIPT.json, where it says after the end of the journal whose the files are.
pub(crate) const RECEIPT_PLAN: &str = "plan";
const RECEIPT_BYTES_MAX: u64 = 1 << 20;

/// How a draft survives an interruption.
#[derive(Clone, Debug)]
pub struct JournalOptions {
    /// Names everything that decides what is appended to which rank. An attempt at another plan is not resumed.
    pub plan: Digest,
    /// What a user would call it: starting over with another plan of the same subject needs no permission.
    pub subject: String,
    /// Ranks that the artifact under this name has: they are hashed only, if nothing is to be replaced.
    pub there: Vec<u32>,
    /// No note of the packer is longer.
    pub note_bytes_max: usize,
    /// Output of all ranks together between two marks.
    pub every_bytes: u64,
    /// Discard what an interrupted attempt left, whatever it is.
    pub fresh: bool,
}

/// What an earlier attempt left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    Nothing,
    /// Marks. Writers go on from the last one.
    Marks,
    /// Something that cannot be gone on with, for this reason.
    Discarded(&'static str),
}

pub struct Draft {
    pub(crate) partial: Partial,
    pub(crate) layouts: Vec<Arc<RankLayout>>,
    /// `None` for ranks that are hashed only.
    pub(crate) files: Vec<Option<Arc<DirectFile>>>,
    /// Where each rank's writer begins, until it is taken.
    states: Vec<Option<RankState>>,
    /// Where each rank's writer began, if an earlier process had written something.
    begun: Vec<Position>,
    /// Index = rank; whether its file is written.
    kept: Vec<bool>,
    journal: Option<Journal>,
    /// Whether the journal has a mark on the medium.
    pub(crate) marked: Arc<AtomicBool>,
    pub(crate) plan: Option<Digest>,
    every_bytes: u64,
    found: Found,
    pub(crate) meta: Option<StoredFile>,
    pub(crate) kernel_files: Vec<StoredFile>,
    pub(crate) kernels: Vec<KernelRecord>,
    /// Of an artifact without weights: what they are made from.
    pub(crate) weights_seed: Option<u64>,
    /// Holds the lock of the artifact being replaced, which ends up under the partial's name.
    pub(crate) replaced: Option<File>,
}

impl Draft {
    /// Starts an artifact for `layouts.len()` ranks (1 to 8, index = rank) and reserves its disk space.
    /// What an interrupted writer left is discarded, and there is no journal.
    ///
    /// Errors: [`FormatError::Busy`] while another packer writes to `out`, [`FormatError::Occupied`]
    /// when `out` is neither free nor an artifact or the partial directory holds what no packer puts
    /// there, [`FormatError::NoSpace`].
    pub fn create(out: &Path, layouts: Vec<RankLayout>, options: &DraftOptions) -> Result<Self, FormatError> {
        let mut draft = Draft::locked(out, layouts, options, &[])?;
        draft.start_over()?;
        Ok(draft)
    }

    /// As [`Draft::create`], with a journal: goes on where an interrupted attempt at the same plan
    /// stood. [`Draft::found`] says what was there. `take` gets the packer's note of every mark in turn and
    /// says whether it follows from those before it; unless marks are found, what it took counts for nothing.
    ///
    /// Errors: [`FormatError::Unfinished`] for what an interrupted receive or a pack of another subject left,
    /// unless it is to be discarded.
    pub fn resume(
        out: &Path,
        layouts: Vec<RankLayout>,
        options: &DraftOptions,
        journal: &JournalOptions,
        take: &mut dyn FnMut(&[u8]) -> bool,
    ) -> Result<Self, FormatError> {
        let mut draft = Draft::locked(out, layouts, options, &journal.there)?;
        draft.every_bytes = journal.every_bytes;
        draft.plan = Some(journal.plan);
        let subject = Subject {
            plan: &journal.plan,
            words: &journal.subject,
            mark_bytes_max: rank_bytes_max(&draft.layouts) + journal.note_bytes_max,
        };
        draft.found = if journal.fresh { Found::Nothing } else { draft.look(&subject, take)? };
        if draft.found == Found::Marks {
            draft.clear_but_weights()?;
            draft.partial.discard_on_drop();
            return Ok(draft);
        }
        draft.start_over()?;
        let journal = Journal::create(draft.partial.path(), &subject)?;
        draft.marked = journal.has_marks();
        draft.journal = Some(journal);
        draft.files.iter().flatten().try_for_each(|file| file.sync())?;
        draft.partial.sync_names()?;
        Ok(draft)
    }

    /// An artifact without rank files, whose weights are made from `seed` wherever they are needed. What an
    /// interrupted attempt left is treated as by [`Draft::resume`]; there is nothing to go on with, and no writers.
    ///
    /// Errors: those of [`Draft::resume`].
    pub fn weightless(
        out: &Path,
        layouts: Vec<RankLayout>,
        seed: u64,
        plan: Digest,
        subject: &str,
        fresh: bool,
    ) -> Result<Self, FormatError> {
        let journal = JournalOptions {
            plan,
            subject: subject.to_owned(),
            // Of no rank a file is written.
            there: (0..RANKS_MAX).collect(),
            note_bytes_max: 0,
            every_bytes: u64::MAX,
            fresh,
        };
        let mut draft = Draft::resume(out, layouts, &DraftOptions::default(), &journal, &mut |_| false)?;
        draft.weights_seed = Some(seed);
        Ok(draft)
    }

    /// The locked directory, with what is in it.
    fn locked(
        out: &Path,
        layouts: Vec<RankLayout>,
        options: &DraftOptions,
        there: &[u32],
    ) -> Result<Self, FormatError> {
        let tp = u32::try_from(layouts.len()).unwrap_or(u32::MAX);
        if !(1..=RANKS_MAX).contains(&tp) || options.only_rank.is_some_and(|rank| rank >= tp) {
            return Err(FormatError::Input {
                what: "ranks of the draft".into(),
                expected: format!("1 to {RANKS_MAX} layouts, and among them the rank to keep"),
                found: format!("{tp} layouts, keep {:?}", options.only_rank),
            });
        }
        is_replaceable(out)?;
        Ok(Draft {
            partial: Partial::resume(out, is_partial_file)?,
            states: layouts.iter().map(|layout| Some(RankState::new(layout))).collect(),
            begun: vec![Position::default(); layouts.len()],
            kept: (0..tp)
                .map(|rank| options.only_rank.is_none_or(|only| only == rank) && !there.contains(&rank))
                .collect(),
            layouts: layouts.into_iter().map(Arc::new).collect(),
            files: Vec::new(),
            journal: None,
            marked: Arc::default(),
            plan: None,
            every_bytes: u64::MAX,
            found: Found::Nothing,
            meta: None,
            kernel_files: Vec::new(),
            kernels: Vec::new(),
            weights_seed: None,
            replaced: None,
        })
    }

    /// Discards what is there and makes the rank files.
    fn start_over(&mut self) -> Result<(), FormatError> {
        self.partial.clear()?;
        self.partial.discard_on_drop();
        self.states = self.layouts.iter().map(|layout| Some(RankState::new(layout))).collect();
        self.files.clear();
        for ((rank, layout), kept) in (0u32..).zip(&self.layouts).zip(&self.kept) {
            let path = self.partial.path().join(rank_file_name(rank));
            let file = if *kept { Some(Arc::new(DirectFile::create(&path, layout.file_len())?)) } else { None };
            self.files.push(file);
        }
        Ok(())
    }

    /// Whether what is there can be gone on with; then journal, states and files are set.
    fn look(&mut self, subject: &Subject<'_>, take: &mut dyn FnMut(&[u8]) -> bool) -> Result<Found, FormatError> {
        let dir = self.partial.path().to_path_buf();
        let mut states: Vec<_> = self.layouts.iter().map(|layout| RankState::new(layout)).collect();
        let opened =
            Journal::open(&dir, subject, |mark| apply_mark(&mut states, &self.layouts, mark).is_some_and(&mut *take))?;
        let unfinished = |found: String, help| {
            Err(FormatError::Unfinished { path: dir.clone(), expected: subject.words.into(), found, help })
        };
        let journal = match opened {
            Opened::Missing if dir.join(MANIFEST_FILE).exists() => {
                return match receipt_plan(&dir)? {
                    None if was_replaced(&dir, self.partial.out())? => Ok(Found::Nothing),
                    None => unfinished("receive".into(), "repeat the push to finish it, or discard it with --fresh"),
                    // What was replaced, and not removed any more.
                    Some(_) if is_replaceable(self.partial.out())? => Ok(Found::Nothing),
                    Some(plan) if plan == subject.plan.to_string() => {
                        Ok(Found::Discarded("it was complete but for its name, and its journal is gone"))
                    }
                    Some(_) => unfinished("pack of something else".into(), OTHER_PACK),
                };
            }
            Opened::Missing => return Ok(Found::Nothing),
            Opened::Damaged => return Ok(Found::Discarded("its journal is damaged")),
            Opened::OtherVersion => return Ok(Found::Discarded("its journal is of another version of this program")),
            Opened::Changed => {
                return Ok(Found::Discarded("the checkpoint's files, its config or this program changed"));
            }
            Opened::Other(words) => return unfinished(words, OTHER_PACK),
            Opened::Marks(journal) if !journal.has_marks().load(Ordering::Acquire) => return Ok(Found::Nothing),
            Opened::Marks(journal) => journal,
        };
        let mut files = Vec::new();
        for (((rank, layout), state), kept) in (0u32..).zip(&self.layouts).zip(&mut states).zip(&self.kept) {
            if !kept {
                files.push(None);
                continue;
            }
            let file = match DirectFile::reopen(&dir.join(rank_file_name(rank))) {
                Ok(file) if file.len() == layout.file_len() => file,
                Err(e) if !matches!(&e, FormatError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound) => {
                    return Err(e);
                }
                _ => return Ok(Found::Discarded("a rank's file is not as its journal says")),
            };
            if !read_open_block(&file, layout, state)? {
                return Ok(Found::Discarded("a block is not as its journal says"));
            }
            files.push(Some(Arc::new(file)));
        }
        self.begun = states.iter().map(|state| state.position).collect();
        self.states = states.into_iter().map(Some).collect();
        self.files = files;
        self.marked = journal.has_marks();
        self.journal = Some(journal);
        Ok(Found::Marks)
    }

    /// Removes what an attempt left that came as far as its commit.
    fn clear_but_weights(&self) -> Result<(), FormatError> {
        let dir = self.partial.path();
        let examine = |e| FormatError::io("examine", dir, 0, e);
        let kept: Vec<String> =
            (0u32..).zip(&self.files).filter_map(|(r, f)| f.as_ref().map(|_| rank_file_name(r))).collect();
        for entry in fs::read_dir(dir).map_err(examine)? {
            let name = entry.map_err(examine)?.file_name();
            let name = name.to_string_lossy();
            if name != JOURNAL_FILE && !kept.iter().any(|kept| *kept == name) {
                remove_file(&dir.join(&*name))?;
            }
        }
        Ok(())
    }

    /// Where it is written.
    pub fn path(&self) -> &Path {
        self.partial.path()
    }

    /// What an earlier attempt left.
    pub fn found(&self) -> &Found {
        &self.found
    }

    /// The marks of this draft, whose writers (all of them, in rank order) have taken nothing yet.
    /// Once. Errors: no memory for a thread.
    pub fn marks(&mut self, writers: &[RankWriter]) -> Result<Marks, FormatError> {
        let Some(journal) = self.journal.take() else { panic!("a draft with a journal gives its marks once") };
        Marks::new(journal, self.every_bytes, writers)
    }

    /// What becomes of the draft after `error`: where the machine failed and there are marks, they stay,
    /// and the error says so. Otherwise dropping the draft discards it.
    pub fn failed(&mut self, error: FormatError) -> FormatError {
        let path = self.partial.path();
        if !error.is_of_the_machine() || !self.marked.load(Ordering::Acquire) {
            return error;
        }
        let path = path.to_path_buf();
        self.partial.keep_on_drop();
        FormatError::Kept { path, source: Box::new(error) }
    }

    /// The writer of one rank; independent of the draft, so that ranks can be written by different
    /// threads. Each rank's may be taken once. Errors: no memory for its threads.
    pub fn rank_writer(&mut self, rank: u32) -> Result<RankWriter, FormatError> {
        let index = rank as usize;
        let state = self.states.get_mut(index).and_then(Option::take);
        let Some(state) = state else { panic!("writer of rank {rank} is not there to take") };
        let workers = default_threads().div_ceil(self.layouts.len()).min(4);
        let (layout, file) = (Arc::clone(&self.layouts[index]), self.files[index].clone());
        RankWriter::new(rank, layout, file, workers, state)
    }

    /// Writes `meta`: (name, content) pairs in any order. Without members there will be no such file.
    pub fn write_meta(&mut self, files: &[(String, Vec<u8>)]) -> Result<(), FormatError> {
        assert!(self.meta.is_none(), "meta is written twice");
        let (stored, bytes) = members::store(META_FILE, files, &self.partial.path().join(META_FILE))?;
        if !bytes.is_empty() {
            self.write_new(META_FILE, &bytes)?;
        }
        self.meta = Some(stored);
        Ok(())
    }

    /// Writes `kernels.<arch>` with its tuning table. Once per architecture.
    pub fn write_kernels(
        &mut self,
        arch: &str,
        kernels: &[KernelInput],
        tuning: Option<&str>,
    ) -> Result<(), FormatError> {
        let (stored, bytes, records) = kernels::store(self.partial.path(), arch, kernels, tuning)?;
        self.write_new(&stored.name, &bytes)?;
        self.kernel_files.push(stored);
        self.kernels.extend(records);
        kernels::sort(&mut self.kernel_files, &mut self.kernels);
        Ok(())
    }

    /// Writes and syncs a small file.
    pub(crate) fn write_new(&self, name: &str, bytes: &[u8]) -> Result<(), FormatError> {
        kernels::write_new(&self.partial.path().join(name), bytes)
    }

    /// Reads the kept rank files from the medium and holds every block against `ranks`, which
    /// [`RankWriter::finish`] gave, in rank order. Call it when all of them are finished.
    ///
    /// Errors: [`FormatError::ReadBack`], [`FormatError::ReadBackIo`], [`FormatError::Padding`], I/O.
    pub fn read_back(&self, ranks: &[RankFile], progress: &dyn Progress) -> Result<(), FormatError> {
        self.read_blocks(ranks, progress)
    }

    /// As [`Draft::read_back`], only of the blocks that an earlier process wrote: of what happened to them
    /// since, nobody knows. Whether there are any.
    pub fn read_back_resumed(&self, ranks: &[RankFile], progress: &dyn Progress) -> Result<bool, FormatError> {
        let mut ranks = ranks.to_vec();
        for (rank, begun) in ranks.iter_mut().zip(&self.begun) {
            for (index, section) in rank.sections.iter_mut().enumerate() {
                match index.cmp(&begun.section) {
                    std::cmp::Ordering::Less => {}
                    std::cmp::Ordering::Equal => section.blocks.truncate(begun.block().1 as usize),
                    std::cmp::Ordering::Greater => section.blocks.clear(),
                }
            }
        }
        let any =
            ranks.iter().zip(&self.files).any(|(r, f)| f.is_some() && r.sections.iter().any(|s| !s.blocks.is_empty()));
        if any {
            self.read_blocks(&ranks, progress)?;
        }
        Ok(any)
    }

    /// The blocks that `ranks` still name, and the zeros before them.
    fn read_blocks(&self, ranks: &[RankFile], progress: &dyn Progress) -> Result<(), FormatError> {
        let kept = || {
            let kept =
                ranks.iter().zip(&self.layouts).zip(&self.files).filter_map(|(r, file)| Some((r, file.as_ref()?)));
            kept.filter(|((rank, _), _)| rank.sections.iter().any(|section| !section.blocks.is_empty()))
        };
        let bytes = |rank: &RankFile| {
            let sections = rank.sections.iter().map(|s| s.len.min(s.blocks.len() as u64 * BLOCK_BYTES));
            sections.sum::<u64>() + rank.file_len - rank.arena_bytes
        };
        progress.start("read back", kept().map(|((rank, _), _)| bytes(rank)).sum());
        for ((rank, layout), file) in kept() {
            file.sync()?;
            verify_blocks(file, rank, layout, progress).map_err(|e| match e {
                FormatError::BlockRead { file, section, block, offset, reads, source } => {
                    FormatError::ReadBackIo { file, section, block, offset, reads, source }
                }
                FormatError::Block { file, section, block, offset, expected, found, .. } => {
                    FormatError::ReadBack { file, section, block, offset, expected, found }
                }
                other => other,
            })?;
        }
        progress.finish();
        Ok(())
    }
}

impl Drop for Draft {
    /// A panic of the packer costs no more than a kill.
    fn drop(&mut self) {
        if std::thread::panicking() && self.marked.load(Ordering::Acquire) {
            self.partial.keep_on_drop();
        }
    }
}

/// Whether a partial directory holds what made way for the artifact at `out` and was not removed any more, rather than
/// what an interrupted receive left: that has no superblocks until all blocks are there, or lacks a file.
pub(crate) fn was_replaced(dir: &Path, out: &Path) -> Result<bool, FormatError> {
    if !is_replaceable(out)? {
        return Ok(false);
    }
    match Artifact::read(dir) {
        Ok(there) if !there.present_ranks().is_empty() || there.weights_seed().is_some() => there.stored_are_whole(),
        _ => Ok(false),
    }
}

const OTHER_PACK: &str =
    "let that pack finish (its command again goes on with it), give another -o, or discard it with --fresh";

/// The plan that RECEIPT.json says a pack had, if there is such a line.
fn receipt_plan(dir: &Path) -> Result<Option<String>, FormatError> {
    let path = dir.join(RECEIPT_FILE);
    let mut bytes = Vec::new();
    match File::open(&path).and_then(|file| file.take(RECEIPT_BYTES_MAX).read_to_end(&mut bytes)) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(FormatError::io("read", &path, 0, e)),
        Ok(_) => {}
    }
    let receipt: Option<serde_json::Value> = serde_json::from_slice(&bytes).ok();
    Ok(receipt.and_then(|receipt| Some(receipt.get(RECEIPT_PLAN)?.as_str()?.to_owned())))
}

/// Reads the block in the making that the last mark speaks of; false when it is not as the mark says.
fn read_open_block(file: &DirectFile, layout: &RankLayout, state: &mut RankState) -> Result<bool, FormatError> {
    let end = state.position.in_block();
    if end == 0 {
        return Ok(true);
    }
    let (section, block) = state.position.block();
    let mut buf = AlignedBuf::named(BLOCK_BYTES as usize, "a block to write")?;
    let padded = end.next_multiple_of(DIRECT_ALIGN as usize);
    let base = block * BLOCK_BYTES;
    file.read_exact_at(&mut buf[..padded], layout.sections()[section].offset + base)?;
    let mut found = TreeHash::at(base);
    found.update(&buf[..end]);
    let same = found == state.open;
    state.bytes = Some(buf);
    Ok(same)
}

/// Whether `out` is free (`false`) or an artifact that may be replaced (`true`): a directory with a
/// MANIFEST and nothing in it that an artifact could not hold. Anything else is somebody's data.
pub(crate) fn is_replaceable(out: &Path) -> Result<bool, FormatError> {
    let occupied = |found: String| FormatError::Occupied { path: out.to_path_buf(), found };
    let examine = |e| FormatError::io("examine", out, 0, e);
    let meta = match fs::symlink_metadata(out) {
        Ok(meta) => meta,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(e) => return Err(examine(e)),
    };
    if !meta.is_dir() {
        return Err(occupied("something that is not a directory".into()));
    }
    if let Some(name) = foreign(out, is_artifact_file)? {
        return Err(occupied(format!("a directory with {name:?} in it")));
    }
    if !out.join(MANIFEST_FILE).try_exists().map_err(examine)? {
        return Err(occupied("a directory without MANIFEST".into()));
    }
    Ok(true)
}
