//! The end of a draft: superblocks, MANIFEST, receipt, sync, and one rename.
//!
//! Everything is on the medium before the final name appears, so a crash leaves either the old
//! state or the whole new artifact. Ranks may be packed one at a time: a rank's file joins the same
//! artifact that is there without it, and the file of another rank is never lost.

use std::fs;
use std::io;
use std::sync::atomic::Ordering;

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use crate::artifact::{Artifact, open_rank_file};
use crate::check::check;
use crate::draft::{Draft, RECEIPT_PLAN, is_replaceable};
use crate::error::FormatError;
use crate::header::{HEADER_BYTES, MANIFEST_FILE, META_FILE, RECEIPT_FILE, Superblock, rank_file_name};
use crate::identity::index_hash;
use crate::io::AlignedBuf;
use crate::journal::JOURNAL_FILE;
use crate::layout::{RankLayout, SectionLayout};
use crate::manifest::{
    ArtifactId, Canary, Digest, KernelSetId, Manifest, RankFile, Section, SourceId, StoredFile, WeightSetId, encode,
};
use crate::partial::{Partial, lock_directory, remove_file, sync_directory};
use crate::progress::Progress;
use crate::section::NO_ROOT;

/// What the packer knows and the files do not say.
#[derive(Clone, Debug)]
pub struct CommitInput {
    /// The checkpoint's config as normalised text.
    pub config_json: String,
    pub source_id: SourceId,
    pub weight_contract: Digest,
    pub op_contract: Digest,
    pub canary: Option<Canary>,
    /// From [`RankWriter::finish`](crate::RankWriter::finish), in rank order; none for a draft without weights.
    pub ranks: Vec<RankFile>,
    /// RECEIPT.json: who, when, how long. The ids are added; nothing here is part of the identity.
    pub receipt: serde_json::Map<String, serde_json::Value>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Created,
    /// Another artifact (or the same, with `force`) had the name and is gone.
    Replaced,
    /// The same artifact was there without rank files this one has; they were added, nothing else
    /// was changed.
    RankAdded,
    /// The same artifact was there, whole, with every file this one has; nothing was changed.
    AlreadyThere,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Committed {
    pub artifact_id: ArtifactId,
    pub weight_set_id: WeightSetId,
    pub outcome: Outcome,
}

impl Draft {
    /// Completes the artifact under its final name. If the same artifact is there already, it is read
    /// and judged whole (which `progress` shows), and only rank files it lacks are added to it. With
    /// `force` an artifact that is already there is replaced atomically; what is not an artifact never
    /// is. Rank files of the same weights that this draft does not write are kept even then.
    ///
    /// Errors: [`FormatError::Exists`] (another artifact, or the same but damaged), [`FormatError::Input`]
    /// and [`FormatError::Manifest`] for contradicting input, I/O. The partial directory is removed in
    /// every case but that of [`FormatError::Kept`].
    pub fn commit(
        mut self,
        input: CommitInput,
        force: bool,
        progress: &dyn Progress,
    ) -> Result<Committed, FormatError> {
        self.try_commit(input, force, progress).map_err(|e| self.failed(e))
    }

    fn try_commit(
        &mut self,
        input: CommitInput,
        force: bool,
        progress: &dyn Progress,
    ) -> Result<Committed, FormatError> {
        let receipt = input.receipt.clone();
        let manifest = self.manifest(input)?;
        let path = self.partial.path().join(MANIFEST_FILE);
        check(&manifest, &path)?;
        let committed =
            |outcome| Committed { artifact_id: manifest.artifact_id, weight_set_id: manifest.weight_set_id, outcome };
        let replace = is_replaceable(self.partial.out())?;
        if replace && !force {
            let lacking = self.require_same(&manifest, progress)?;
            if lacking.is_empty() {
                return Ok(committed(Outcome::AlreadyThere));
            }
            self.write_superblocks(&manifest)?;
            self.add_ranks(&lacking)?;
            return Ok(committed(Outcome::RankAdded));
        }
        self.write_superblocks(&manifest)?;
        self.write_new(MANIFEST_FILE, &encode(&manifest, &path)?)?;
        self.write_receipt(receipt, &manifest)?;
        if !replace {
            // It was there, so that its ranks were not written.
            if self.files.iter().all(Option::is_none) && self.weights_seed.is_none() {
                return Err(FormatError::NoRanks { path: self.partial.out().to_path_buf(), tp: manifest.tp });
            }
            self.without_journal(Partial::publish)?;
            return Ok(committed(Outcome::Created));
        }
        // What is replaced takes the partial's name until it is removed, and must not pass for a
        // partial that nobody holds.
        self.replaced = Some(lock_directory(self.partial.out()).map_err(|e| match e {
            Errno::WOULDBLOCK => FormatError::Busy { path: self.partial.out().to_path_buf() },
            e => FormatError::io("lock", self.partial.out(), 0, e.into()),
        })?);
        self.keep_other_ranks(&manifest)?;
        self.without_journal(Partial::replace)?;
        Ok(committed(Outcome::Replaced))
    }

    /// Gives the final name, when all the rest is on the medium; just before, JOURNAL is removed, and it is put
    /// back if the name could not be given. A crash in between leaves a whole artifact without a journal, known
    /// by the plan in its receipt, which the next attempt discards.
    fn without_journal(&mut self, give_name: fn(&mut Partial) -> Result<(), FormatError>) -> Result<(), FormatError> {
        self.partial.sync_names()?;
        let path = self.partial.path().join(JOURNAL_FILE);
        let journal = match fs::read(&path) {
            Ok(bytes) => Some(bytes),
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            Err(e) => return Err(FormatError::io("read", &path, 0, e)),
        };
        remove_file(&path)?;
        let marked = self.marked.swap(false, Ordering::AcqRel);
        let named = give_name(&mut self.partial);
        if let (Err(_), Some(bytes), true) = (&named, journal, marked && self.partial.is_here()) {
            // The first error is the one to report.
            let back = self.write_new(JOURNAL_FILE, &bytes).and_then(|()| self.partial.sync_names());
            self.marked.store(back.is_ok(), Ordering::Release);
        }
        named
    }

    fn manifest(&mut self, mut input: CommitInput) -> Result<Manifest, FormatError> {
        if self.weights_seed.is_some() && input.ranks.is_empty() {
            input.ranks = (0..).zip(&self.layouts).map(|(rank, layout)| unwritten(rank, layout)).collect();
        }
        let differs = |what: String, expected: String, found: String| FormatError::Input { what, expected, found };
        if input.ranks.len() != self.layouts.len() {
            let (expected, found) = (self.layouts.len().to_string(), input.ranks.len().to_string());
            return Err(differs("finished ranks".into(), expected, found));
        }
        for (rank, (file, layout)) in input.ranks.iter().zip(&self.layouts).enumerate() {
            let same = file.sections.len() == layout.sections().len()
                && file
                    .sections
                    .iter()
                    .zip(layout.sections())
                    .all(|(a, b)| (&a.name, a.offset, a.len, &a.tensors) == (&b.name, b.offset, b.len, &b.tensors));
            if !same {
                return Err(differs(format!("rank {rank}"), "the draft's layout".into(), "another".into()));
            }
        }
        let nothing = || StoredFile { name: META_FILE.into(), len: 0, hash: Digest::of(&[]), members: Vec::new() };
        let mut manifest = Manifest {
            artifact_id: ArtifactId([0; 32]),
            weight_set_id: WeightSetId([0; 32]),
            source_id: input.source_id,
            kernel_set_id: KernelSetId([0; 32]),
            tp: self.layouts.len() as u32,
            weight_contract: input.weight_contract,
            op_contract: input.op_contract,
            config_json: input.config_json,
            ranks: input.ranks,
            meta: self.meta.take().unwrap_or_else(nothing),
            kernel_files: std::mem::take(&mut self.kernel_files),
            kernels: std::mem::take(&mut self.kernels),
            canary: input.canary,
            weights_seed: self.weights_seed,
        };
        let ids = manifest.computed_ids();
        (manifest.weight_set_id, manifest.kernel_set_id, manifest.artifact_id) = ids;
        Ok(manifest)
    }

    /// Without `force`, what has the name must be this very artifact, every stored byte of it as
    /// packed. Returns the ranks we wrote that it lacks.
    fn require_same(&self, manifest: &Manifest, progress: &dyn Progress) -> Result<Vec<u32>, FormatError> {
        let out = self.partial.out();
        let differs =
            |found: String| FormatError::Exists { path: out.to_path_buf(), expected: manifest.artifact_id, found };
        let damaged = |e: FormatError| match e {
            FormatError::Memory { .. } | FormatError::Thread { .. } | FormatError::OpenFiles { .. } => e,
            e => differs(format!("a damaged one ({})", e.fact())),
        };
        let there = Artifact::open(out).map_err(damaged)?;
        if there.manifest().artifact_id != manifest.artifact_id {
            return Err(differs(there.manifest().artifact_id.to_string()));
        }
        there.verify_contents(progress).map_err(damaged)?;
        let ours = (0..manifest.tp).zip(&self.files).filter(|(_, file)| file.is_some());
        Ok(ours.map(|(rank, _)| rank).filter(|rank| !there.has_rank(*rank)).collect())
    }

    /// Moves finished rank files into the artifact that lacks them. Each arrives whole, by one rename.
    fn add_ranks(&self, ranks: &[u32]) -> Result<(), FormatError> {
        let out = self.partial.out();
        for name in ranks.iter().copied().map(rank_file_name) {
            let (from, to) = (self.partial.path().join(&name), out.join(&name));
            let renamed = match renameat_with(CWD, &from, CWD, &to, RenameFlags::NOREPLACE) {
                Err(Errno::INVAL | Errno::NOSYS) => fs::rename(&from, &to),
                other => other.map_err(io::Error::from),
            };
            renamed.map_err(|e| FormatError::io("add", &to, 0, e))?;
        }
        sync_directory(out)
    }

    /// Rank files of the same weights in the artifact to be replaced that we do not write: linked, so
    /// that they have a name in the old directory until the new one has its own.
    fn keep_other_ranks(&self, manifest: &Manifest) -> Result<(), FormatError> {
        for (rank, _) in manifest.ranks.iter().zip(&self.files).filter(|(_, file)| file.is_none()) {
            let name = rank_file_name(rank.rank);
            let from = self.partial.out().join(&name);
            if open_rank_file(&from, manifest, rank).is_ok() {
                let to = self.partial.path().join(&name);
                fs::hard_link(&from, &to).map_err(|e| FormatError::io("link", &to, 0, e))?;
            }
        }
        Ok(())
    }

    fn write_superblocks(&self, manifest: &Manifest) -> Result<(), FormatError> {
        let mut buf = AlignedBuf::new(HEADER_BYTES)?;
        for ((rank, layout), file) in manifest.ranks.iter().zip(&self.layouts).zip(&self.files) {
            let Some(file) = file else { continue };
            buf.copy_from_slice(&superblock(manifest, rank).encode());
            file.write_all_at(&buf, 0)?;
            file.write_all_at(&buf, layout.tail_offset())?;
            file.sync()?;
        }
        Ok(())
    }

    fn write_receipt(
        &self,
        mut receipt: serde_json::Map<String, serde_json::Value>,
        manifest: &Manifest,
    ) -> Result<(), FormatError> {
        if let Some(plan) = self.plan {
            receipt.insert(RECEIPT_PLAN.into(), plan.to_string().into());
        }
        receipt.insert("artifact_id".into(), manifest.artifact_id.to_string().into());
        receipt.insert("weight_set_id".into(), manifest.weight_set_id.to_string().into());
        let mut text = format!("{:#}", serde_json::Value::Object(receipt));
        text.push('\n');
        self.write_new(RECEIPT_FILE, text.as_bytes())
    }
}

/// A rank whose weights nobody has written: its layout without a hash of anything.
fn unwritten(rank: u32, layout: &RankLayout) -> RankFile {
    let section = |s: &SectionLayout| Section {
        name: s.name.clone(),
        offset: s.offset,
        len: s.len,
        root: NO_ROOT,
        blocks: Vec::new(),
        tensors: s.tensors.clone(),
    };
    let sections = layout.sections().iter().map(section).collect();
    RankFile { rank, file_len: layout.file_len(), arena_bytes: layout.arena_bytes(), sections }
}

/// What a rank's file must carry at both ends.
pub(crate) fn superblock(manifest: &Manifest, rank: &RankFile) -> Superblock {
    Superblock {
        tp: manifest.tp,
        rank: rank.rank,
        sections: rank.sections.len() as u32,
        file_len: rank.file_len,
        weight_set_id: manifest.weight_set_id,
        index_hash: index_hash(rank),
    }
}
