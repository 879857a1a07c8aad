//! An artifact being written, in `.NAME.dsv4.partial/` beside its final place.
//!
//! A [`Partial`] holds the directory and its lock. Dropping a draft removes it; only
//! [`Draft::commit`] gives anything the final name, and [`Draft::read_back`] says before whether the
//! disk has what was written.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;

use crate::artifact::is_artifact_file;
use crate::check::{TUNING_MEMBER, is_arch};
use crate::error::FormatError;
use crate::header::{KERNELS_PREFIX, MANIFEST_FILE, META_FILE, RANKS_MAX, rank_file_name};
use crate::io::DirectFile;
use crate::layout::RankLayout;
use crate::manifest::{Digest, KernelRecord, RankFile, StoredFile};
use crate::members;
use crate::parallel::default_threads;
use crate::partial::{Partial, foreign};
use crate::progress::Progress;
use crate::rank_writer::RankWriter;
use crate::verify::verify_blocks;

#[derive(Clone, Debug, Default)]
pub struct DraftOptions {
    /// Keep only this rank's file. All ranks are still appended and hashed, because the ids cover
    /// them all; the result has the same ids as a full one.
    pub only_rank: Option<u32>,
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
    taken: Vec<bool>,
    pub(crate) meta: Option<StoredFile>,
    pub(crate) kernel_files: Vec<StoredFile>,
    pub(crate) kernels: Vec<KernelRecord>,
    /// Holds the lock of the artifact being replaced, which ends up under the partial's name.
    pub(crate) replaced: Option<File>,
}

impl Draft {
    /// Starts an artifact for `layouts.len()` ranks (1 to 8, index = rank) and reserves its disk space.
    ///
    /// Errors: [`FormatError::Busy`] while another packer writes to `out`, [`FormatError::Occupied`]
    /// when `out` is neither free nor an artifact or the partial directory holds what no packer puts
    /// there, [`FormatError::NoSpace`].
    pub fn create(out: &Path, layouts: Vec<RankLayout>, options: &DraftOptions) -> Result<Self, FormatError> {
        let tp = u32::try_from(layouts.len()).unwrap_or(u32::MAX);
        if !(1..=RANKS_MAX).contains(&tp) || options.only_rank.is_some_and(|rank| rank >= tp) {
            return Err(FormatError::Input {
                what: "ranks of the draft".into(),
                expected: format!("1 to {RANKS_MAX} layouts, and among them the rank to keep"),
                found: format!("{tp} layouts, keep {:?}", options.only_rank),
            });
        }
        is_replaceable(out)?;
        let mut draft = Draft {
            partial: Partial::create(out, is_artifact_file)?,
            layouts: layouts.into_iter().map(Arc::new).collect(),
            files: Vec::new(),
            taken: vec![false; tp as usize],
            meta: None,
            kernel_files: Vec::new(),
            kernels: Vec::new(),
            replaced: None,
        };
        for (rank, layout) in (0..tp).zip(&draft.layouts) {
            let kept = options.only_rank.is_none_or(|only| only == rank);
            let path = draft.partial.path().join(rank_file_name(rank));
            let file = if kept { Some(Arc::new(DirectFile::create(&path, layout.file_len())?)) } else { None };
            draft.files.push(file);
        }
        Ok(draft)
    }

    /// The writer of one rank; independent of the draft, so that ranks can be written by different
    /// threads. Each rank's may be taken once. Errors: no memory for its threads.
    pub fn rank_writer(&mut self, rank: u32) -> Result<RankWriter, FormatError> {
        let index = rank as usize;
        assert!(self.taken.get(index) == Some(&false), "writer of rank {rank} is not there to take");
        self.taken[index] = true;
        let workers = default_threads().div_ceil(self.layouts.len()).min(4);
        let (layout, file) = (Arc::clone(&self.layouts[index]), self.files[index].clone());
        RankWriter::new(rank, layout, file, workers)
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
