//! Every stored byte of an artifact, judged: what is named must be exact, what is not named must be
//! zero, and nothing else may lie in the directory. Of RECEIPT.json and SIGNATURE no byte is fixed:
//! the one must not be empty, the other must have a signature's form.

use std::collections::BTreeSet;
use std::fs;

use crate::artifact::{Artifact, require_len};
use crate::error::FormatError;
use crate::header::{
    BLOCK_BYTES, HEADER_BYTES, KERNELS_PREFIX, MANIFEST_FILE, RECEIPT_FILE, SECTION_ALIGN, SIGNATURE_FILE,
    rank_file_name,
};
use crate::io::{AlignedBuf, DirectFile};
use crate::layout::RankLayout;
use crate::load::run::load;
use crate::load::{Block, Discard, LoadOptions, Staged, blocks};
use crate::manifest::{Digest, RankFile, StoredFile};
use crate::members;
use crate::minisign;
use crate::progress::Progress;
use crate::section::first_nonzero;

/// Reads under way at once: fewer than a load has, for a packer that has little memory.
const VERIFY_DEPTH: usize = 8;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifyReport {
    /// Ranks whose files were read whole.
    pub ranks: Vec<u32>,
    /// Ranks the manifest knows and this directory lacks.
    pub absent: Vec<u32>,
    /// Bytes read and judged.
    pub bytes: u64,
    /// What weights are made from, where the artifact has none to be judged.
    pub weights_seed: Option<u64>,
    /// Whether SIGNATURE is there and has the form of one (whose it is, is not judged).
    pub signed: bool,
}

impl Artifact {
    /// Reads and judges everything. Errors name the file and, in rank files, section, block and offset;
    /// [`FormatError::NoRanks`] when no weights are here to judge.
    pub fn verify(&self, progress: &dyn Progress) -> Result<VerifyReport, FormatError> {
        // Again, from disk: what was opened may have changed since.
        let now = Artifact::open(self.path())?;
        if now.manifest().artifact_id != self.manifest().artifact_id {
            return Err(FormatError::NotAnArtifact {
                path: self.path().to_path_buf(),
                found: "another one than when it was opened".into(),
            });
        }
        if now.present_ranks().is_empty() && now.weights_seed().is_none() {
            return Err(FormatError::NoRanks { path: self.path().to_path_buf(), tp: self.manifest().tp });
        }
        now.verify_contents(progress)
    }

    /// All files that are here, of whichever ranks.
    pub(crate) fn verify_contents(&self, progress: &dyn Progress) -> Result<VerifyReport, FormatError> {
        let signed = self.check_names()?;
        let manifest = self.manifest();
        let stored: Vec<_> = std::iter::once(&manifest.meta).chain(&manifest.kernel_files).collect();
        let ranks: Vec<_> = manifest.ranks.iter().filter(|rank| self.has_rank(rank.rank)).collect();
        let bytes = stored.iter().map(|f| f.len).chain(ranks.iter().map(|r| r.file_len)).sum();
        progress.start("verify", bytes);
        for file in stored {
            self.verify_stored(file)?;
            progress.add(file.len);
        }
        for rank in ranks {
            self.verify_rank(rank, progress)?;
        }
        progress.finish();
        let weights_seed = self.weights_seed();
        let absent = (0..manifest.tp).filter(|&rank| weights_seed.is_none() && !self.has_rank(rank)).collect();
        Ok(VerifyReport { ranks: self.present_ranks().to_vec(), absent, bytes, weights_seed, signed })
    }

    /// Every name in the directory is expected and of a file with something in it. Returns whether
    /// SIGNATURE is among them.
    fn check_names(&self) -> Result<bool, FormatError> {
        let manifest = self.manifest();
        let mut known = BTreeSet::from([MANIFEST_FILE.to_string(), RECEIPT_FILE.into(), SIGNATURE_FILE.into()]);
        known.extend((0..manifest.tp).filter(|_| manifest.weights_seed.is_none()).map(rank_file_name));
        known.extend(manifest.kernel_files.iter().map(|file| file.name.clone()));
        if !manifest.meta.members.is_empty() {
            known.insert(manifest.meta.name.clone());
        }
        let examine = |e| FormatError::io("examine", self.path(), 0, e);
        for entry in fs::read_dir(self.path()).map_err(examine)? {
            let name = entry.map_err(examine)?.file_name();
            let path = self.path().join(&name);
            let meta = fs::metadata(&path).map_err(|e| FormatError::io("examine", &path, 0, e))?;
            if !meta.is_file() || !name.to_str().is_some_and(|name| known.contains(name)) {
                let found = if meta.is_file() { "" } else { ", which is no file" };
                return Err(FormatError::UnknownFile {
                    path,
                    expected: known.into_iter().collect::<Vec<_>>().join(", "),
                    found: format!("{:?}{found}", name.to_string_lossy()),
                });
            }
            if meta.len() == 0 {
                return Err(FormatError::Empty { file: path });
            }
        }
        match self.signature()? {
            Some(bytes) => minisign::check(&bytes, &self.path().join(SIGNATURE_FILE)).map(|()| true),
            None => Ok(false),
        }
    }

    /// Reads and judges the kernels of an architecture, where there are any. Errors: those of [`Artifact::verify`].
    pub fn verify_kernels(&self, arch: &str) -> Result<(), FormatError> {
        let name = format!("{KERNELS_PREFIX}{arch}");
        self.manifest().kernel_files.iter().filter(|file| file.name == name).try_for_each(|f| self.verify_stored(f))
    }

    /// Whether `meta` and all kernels are here as packed. Errors: what says nothing about them.
    pub(crate) fn stored_are_whole(&self) -> Result<bool, FormatError> {
        let manifest = self.manifest();
        let mut stored = std::iter::once(&manifest.meta).chain(&manifest.kernel_files);
        match stored.try_for_each(|file| self.verify_stored(file)) {
            Ok(()) => Ok(true),
            Err(e @ (FormatError::Memory { .. } | FormatError::Thread { .. } | FormatError::OpenFiles { .. })) => {
                Err(e)
            }
            Err(_) => Ok(false),
        }
    }

    pub(crate) fn verify_stored(&self, stored: &StoredFile) -> Result<(), FormatError> {
        if stored.members.is_empty() {
            return Ok(());
        }
        let path = self.path().join(&stored.name);
        let file = DirectFile::open(&path)?;
        require_len(&file, stored.len)?;
        let mut bytes = vec![0; stored.len as usize];
        file.read_exact_at(&mut bytes, 0)?;
        let found = Digest::of(&bytes);
        if found != stored.hash {
            return Err(FormatError::Hash { file: path, what: "the file".into(), expected: stored.hash, found });
        }
        for member in &stored.members {
            // Members follow each other from 0 to the file's length (checked with the manifest).
            let start = member.offset as usize;
            members::restore(member, &bytes[start..start + member.len as usize], &path)?;
        }
        Ok(())
    }

    fn verify_rank(&self, rank: &RankFile, progress: &dyn Progress) -> Result<(), FormatError> {
        verify_blocks(&self.open_rank(rank)?, rank, self.layout(rank.rank)?, progress)
    }
}

/// All of a rank's file but its superblocks: blocks as recorded, everything between tensors zero.
/// Counts the whole file's length.
pub(crate) fn verify_blocks(
    file: &DirectFile,
    rank: &RankFile,
    layout: &RankLayout,
    progress: &dyn Progress,
) -> Result<(), FormatError> {
    let mut head = AlignedBuf::new(SECTION_ALIGN as usize)?;
    file.read_exact_at(&mut head, 0)?;
    require_zero(&head[HEADER_BYTES..], HEADER_BYTES as u64, file)?;
    progress.add(SECTION_ALIGN + HEADER_BYTES as u64);
    let gaps: Vec<_> = layout.sections().iter().map(|section| section.gaps()).collect();
    let judge = |block: &Block<'_>, bytes: &[u8]| {
        // The hash says these are the bytes that were written; the format says padding is zero.
        let (start, end) = (block.index * BLOCK_BYTES, block.index * BLOCK_BYTES + block.len as u64);
        let gaps = &gaps[block.section_index];
        let first = gaps.partition_point(|&(_, gap_end)| gap_end <= start);
        for &(gap_start, gap_end) in gaps[first..].iter().take_while(|gap| gap.0 < end) {
            let (from, to) = (gap_start.max(start) - start, gap_end.min(end) - start);
            let base = block.file_offset + from;
            require_zero(&bytes[from as usize..to as usize], base, file)?;
        }
        Ok(())
    };
    let options = LoadOptions { queue_depth: Some(VERIFY_DEPTH), ..LoadOptions::default() };
    let mut nowhere = Staged::new(Discard::default(), VERIFY_DEPTH + 2 * options.threads);
    load(file, &blocks(rank), &mut nowhere, &judge, &options, progress).map(|_| ())
}

fn require_zero(bytes: &[u8], base: u64, file: &DirectFile) -> Result<(), FormatError> {
    match first_nonzero(bytes) {
        None => Ok(()),
        Some((at, found)) => {
            Err(FormatError::Padding { file: file.path().to_path_buf(), offset: base + at as u64, found })
        }
    }
}
