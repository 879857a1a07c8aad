//! An artifact being written, in `.NAME.dsv4.partial/` beside its final place.
//!
//! A [`Partial`] holds the directory and its lock. Dropping a draft removes it, unless its journal is
//! kept for another attempt; only [`Draft::commit`] gives anything the final name, and
//! [`Draft::read_back`] says before whether the disk has what was written. What the journal of an
//! interrupted attempt says is believed only of the same plan, and only with the files as it says.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;

use crate::artifact::is_artifact_file;
use crate::check::{TUNING_MEMBER, is_arch};
use crate::error::FormatError;
use crate::header::{BLOCK_BYTES, KERNELS_PREFIX, MANIFEST_FILE, META_FILE, RANKS_MAX, rank_file_name};
use crate::io::{AlignedBuf, DIRECT_ALIGN, DirectFile};
use crate::journal::{JOURNAL_FILE, Journal, Opened, RankState, apply_mark, has_marks, is_partial_file};
use crate::layout::RankLayout;
use crate::manifest::{Digest, KernelRecord, RankFile, StoredFile};
use crate::marks::Marks;
use crate::members;
use crate::parallel::default_threads;
use crate::partial::{Partial, foreign, remove_file};
use crate::progress::Progress;
use crate::rank_writer::RankWriter;
use crate::receive::is_whole;
use crate::tree_hash::TreeHash;
use crate::verify::verify_blocks;

#[derive(Clone, Debug, Default)]
pub struct DraftOptions {
    /// Keep only this rank's file. All ranks are still appended and hashed, because the ids cover
    /// them all; the result has the same ids as a full one.
    pub only_rank: Option<u32>,
}

/// How a draft survives an interruption.
#[derive(Clone, Copy, Debug)]
pub struct JournalOptions {
    /// Names everything that decides what is appended to which rank. An attempt at another plan is not resumed.
    pub plan: Digest,
    /// Output of all ranks together between two marks.
    pub every_bytes: u64,
    /// Discard what an interrupted attempt left, whatever it is.
    pub fresh: bool,
}

/// What an earlier attempt left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    Nothing,
    /// Its marks; the packer's note of each, in order. Writers go on from the last one.
    Marks(Vec<Vec<u8>>),
    /// Something that cannot be gone on with, for this reason.
    Discarded(&'static str),
}

/// One compiled kernel to store.
#[derive(Clone, Debug)]
pub struct KernelInput {
    pub family: String,
    pub key: Digest,
    pub cubin: Vec<u8>,
}

pub struct Draft {
    pub(crate) partial: Partial,
    pub(crate) layouts: Vec<Arc<RankLayout>>,
    /// `None` for ranks that are hashed only.
    pub(crate) files: Vec<Option<Arc<DirectFile>>>,
    /// Where each rank's writer begins, until it is taken.
    states: Vec<Option<RankState>>,
    journal: Option<Journal>,
    every_bytes: u64,
    found: Found,
    pub(crate) meta: Option<StoredFile>,
    pub(crate) kernel_files: Vec<StoredFile>,
    pub(crate) kernels: Vec<KernelRecord>,
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
        let mut draft = Draft::locked(out, layouts, options)?;
        draft.start_over(options)?;
        Ok(draft)
    }

    /// As [`Draft::create`], with a journal: goes on where an interrupted attempt at the same plan
    /// stood. [`Draft::found`] says what was there.
    ///
    /// Errors: [`FormatError::Unfinished`] for what an interrupted receive left, unless it is to be discarded.
    pub fn resume(
        out: &Path,
        layouts: Vec<RankLayout>,
        options: &DraftOptions,
        journal: &JournalOptions,
    ) -> Result<Self, FormatError> {
        let mut draft = Draft::locked(out, layouts, options)?;
        draft.every_bytes = journal.every_bytes;
        draft.found = if journal.fresh { Found::Nothing } else { draft.look(options, &journal.plan)? };
        if let Found::Marks(_) = draft.found {
            draft.clear_but_weights()?;
            draft.partial.discard_on_drop();
            return Ok(draft);
        }
        draft.start_over(options)?;
        draft.journal = Some(Journal::create(draft.partial.path(), &journal.plan)?);
        draft.files.iter().flatten().try_for_each(|file| file.sync())?;
        draft.partial.sync_names()?;
        Ok(draft)
    }

    /// The locked directory, with what is in it.
    fn locked(out: &Path, layouts: Vec<RankLayout>, options: &DraftOptions) -> Result<Self, FormatError> {
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
            layouts: layouts.into_iter().map(Arc::new).collect(),
            files: Vec::new(),
            journal: None,
            every_bytes: u64::MAX,
            found: Found::Nothing,
            meta: None,
            kernel_files: Vec::new(),
            kernels: Vec::new(),
            replaced: None,
        })
    }

    /// Discards what is there and makes the rank files.
    fn start_over(&mut self, options: &DraftOptions) -> Result<(), FormatError> {
        self.partial.clear()?;
        self.partial.discard_on_drop();
        self.states = self.layouts.iter().map(|layout| Some(RankState::new(layout))).collect();
        self.files.clear();
        for (rank, layout) in (0u32..).zip(&self.layouts) {
            let kept = options.only_rank.is_none_or(|only| only == rank);
            let path = self.partial.path().join(rank_file_name(rank));
            let file = if kept { Some(Arc::new(DirectFile::create(&path, layout.file_len())?)) } else { None };
            self.files.push(file);
        }
        Ok(())
    }

    /// Whether what is there can be gone on with; then journal, states and files are set.
    fn look(&mut self, options: &DraftOptions, plan: &Digest) -> Result<Found, FormatError> {
        let dir = self.partial.path().to_path_buf();
        let mut states: Vec<_> = self.layouts.iter().map(|layout| RankState::new(layout)).collect();
        let mut notes = Vec::new();
        let opened = Journal::open(&dir, plan, |mark| {
            let note = apply_mark(&mut states, &self.layouts, mark);
            let follows = note.is_some();
            notes.extend(note);
            follows
        })?;
        let journal = match opened {
            Opened::Missing if dir.join(MANIFEST_FILE).exists() && !is_whole(&dir) => {
                return Err(FormatError::Unfinished {
                    path: dir,
                    expected: "pack",
                    found: "receive",
                    help: "repeat the push to finish it, or discard it with --fresh",
                });
            }
            Opened::Missing | Opened::Marks(_, 0) => return Ok(Found::Nothing),
            Opened::Damaged => return Ok(Found::Discarded("its journal is damaged")),
            Opened::OtherPlan => return Ok(Found::Discarded("it is of another checkpoint or of other options")),
            Opened::Marks(journal, _) => journal,
        };
        let mut files = Vec::new();
        for ((rank, layout), state) in (0u32..).zip(&self.layouts).zip(&mut states) {
            if options.only_rank.is_some_and(|only| only != rank) {
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
        self.states = states.into_iter().map(Some).collect();
        self.files = files;
        self.journal = Some(journal);
        Ok(Found::Marks(notes))
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
        if !error.is_of_the_machine() || !has_marks(path) {
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
        self.meta = Some(self.write_stored(META_FILE, files)?);
        Ok(())
    }

    /// Writes `kernels.<arch>` with its tuning table. Once per architecture.
    pub fn write_kernels(
        &mut self,
        arch: &str,
        kernels: &[KernelInput],
        tuning: Option<&str>,
    ) -> Result<(), FormatError> {
        if !is_arch(arch) {
            return Err(FormatError::Input {
                what: "architecture".into(),
                expected: "lower-case letters, digits and _".into(),
                found: format!("{arch:?}"),
            });
        }
        let mut files: Vec<_> = kernels.iter().map(|k| (k.key.to_string(), k.cubin.clone())).collect();
        files.extend(tuning.map(|text| (TUNING_MEMBER.to_string(), text.as_bytes().to_vec())));
        let stored = self.write_stored(&format!("{KERNELS_PREFIX}{arch}"), &files)?;
        self.kernel_files.push(stored);
        self.kernel_files.sort_by(|a, b| a.name.cmp(&b.name));
        self.kernels.extend(kernels.iter().map(|k| KernelRecord {
            family: k.family.clone(),
            key: k.key,
            arch: arch.to_string(),
            hash: Digest::of(&k.cubin),
            size: k.cubin.len() as u64,
        }));
        self.kernels.sort_by(|a, b| (&a.arch, a.key).cmp(&(&b.arch, b.key)));
        Ok(())
    }

    fn write_stored(&self, name: &str, files: &[(String, Vec<u8>)]) -> Result<StoredFile, FormatError> {
        let path = self.partial.path().join(name);
        let (record, bytes) = members::store(name, files, &path)?;
        if !bytes.is_empty() {
            self.write_new(name, &bytes)?;
        }
        Ok(record)
    }

    /// Writes and syncs a small file.
    pub(crate) fn write_new(&self, name: &str, bytes: &[u8]) -> Result<(), FormatError> {
        let path = self.partial.path().join(name);
        let write = || -> io::Result<()> {
            let mut file = File::create_new(&path)?;
            file.write_all(bytes)?;
            file.sync_all()
        };
        write().map_err(|e| FormatError::io("write", &path, bytes.len() as u64, e))
    }

    /// Reads the kept rank files from the medium and holds every block against `ranks`, which
    /// [`RankWriter::finish`] gave, in rank order. Call it when all of them are finished.
    ///
    /// Errors: [`FormatError::ReadBack`], [`FormatError::Padding`], I/O.
    pub fn read_back(&self, ranks: &[RankFile], progress: &dyn Progress) -> Result<(), FormatError> {
        let kept =
            || ranks.iter().zip(&self.layouts).zip(&self.files).filter_map(|(r, file)| Some((r, file.as_ref()?)));
        progress.start("read back", kept().map(|((rank, _), _)| rank.file_len).sum());
        for ((rank, layout), file) in kept() {
            file.sync()?;
            verify_blocks(file, rank, layout, progress).map_err(|e| match e {
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
        if std::thread::panicking() && has_marks(self.partial.path()) {
            self.partial.keep_on_drop();
        }
    }
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
