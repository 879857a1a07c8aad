//! The end of a draft: superblocks, MANIFEST, receipt, sync, and one rename.
//!
//! Everything is on the medium before the final name appears, so a crash leaves either the old
//! state or the whole new artifact.

use std::fs;
use std::io;
use std::path::PathBuf;

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use crate::artifact::Artifact;
use crate::check::check;
use crate::draft::{Draft, is_replaceable, lock_directory};
use crate::error::FormatError;
use crate::header::{HEADER_BYTES, MANIFEST_FILE, META_FILE, RECEIPT_FILE, Superblock};
use crate::identity::index_hash;
use crate::io::AlignedBuf;
use crate::manifest::{
    ArtifactId, Canary, Digest, KernelSetId, Manifest, RankFile, SourceId, StoredFile, WeightSetId, encode,
};

/// What the packer knows and the files do not say.
#[derive(Clone, Debug)]
pub struct CommitInput {
    /// The checkpoint's config as normalised text.
    pub config_json: String,
    pub source_id: SourceId,
    pub weight_contract: Digest,
    pub op_contract: Digest,
    pub canary: Option<Canary>,
    /// From [`RankWriter::finish`](crate::RankWriter::finish), in rank order.
    pub ranks: Vec<RankFile>,
    /// RECEIPT.json: who, when, how long. The ids are added; nothing here is part of the identity.
    pub receipt: serde_json::Map<String, serde_json::Value>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Created,
    /// Another artifact (or the same, with `force`) had the name and is gone.
    Replaced,
    /// The same artifact was there, with every file this one has; nothing was changed.
    AlreadyThere,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Committed {
    pub artifact_id: ArtifactId,
    pub weight_set_id: WeightSetId,
    pub outcome: Outcome,
}

impl Draft {
    /// Completes the artifact under its final name. With `force` an artifact that is already there is
    /// replaced atomically; what is not an artifact never is.
    ///
    /// Errors: [`FormatError::Exists`] (also when the one there has the same id but is damaged or lacks
    /// a rank), [`FormatError::Input`] and [`FormatError::Manifest`] for contradicting input, I/O. The
    /// partial directory is removed in every case.
    pub fn commit(mut self, input: CommitInput, force: bool) -> Result<Committed, FormatError> {
        let receipt = input.receipt.clone();
        let manifest = self.manifest(input)?;
        let path = self.partial.join(MANIFEST_FILE);
        check(&manifest, &path)?;
        let committed =
            |outcome| Committed { artifact_id: manifest.artifact_id, weight_set_id: manifest.weight_set_id, outcome };
        let replace = is_replaceable(&self.out)?;
        if replace && !force {
            self.require_same(&manifest)?;
            return Ok(committed(Outcome::AlreadyThere));
        }
        self.write_superblocks(&manifest)?;
        self.write_new(MANIFEST_FILE, &encode(&manifest, &path)?)?;
        self.write_receipt(receipt, &manifest)?;
        self.dir.sync_all().map_err(|e| FormatError::io("sync", &self.partial, 0, e))?;
        self.publish(replace)?;
        Ok(committed(if replace { Outcome::Replaced } else { Outcome::Created }))
    }

    fn manifest(&mut self, input: CommitInput) -> Result<Manifest, FormatError> {
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
        };
        let ids = manifest.computed_ids();
        (manifest.weight_set_id, manifest.kernel_set_id, manifest.artifact_id) = ids;
        Ok(manifest)
    }

    /// Without `force`, what has the name must be this very artifact and hold every rank we wrote.
    fn require_same(&self, manifest: &Manifest) -> Result<(), FormatError> {
        let differs =
            |found: String| FormatError::Exists { path: self.out.clone(), expected: manifest.artifact_id, found };
        let there = Artifact::open(&self.out).map_err(|e| differs(format!("a damaged one ({e})")))?;
        if there.manifest().artifact_id != manifest.artifact_id {
            return Err(differs(there.manifest().artifact_id.to_string()));
        }
        for (rank, _) in (0..manifest.tp).zip(&self.files).filter(|(_, file)| file.is_some()) {
            if !there.has_rank(rank) {
                return Err(differs(format!("the same, but without rank {rank}")));
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
        receipt.insert("artifact_id".into(), manifest.artifact_id.to_string().into());
        receipt.insert("weight_set_id".into(), manifest.weight_set_id.to_string().into());
        let mut text = format!("{:#}", serde_json::Value::Object(receipt));
        text.push('\n');
        self.write_new(RECEIPT_FILE, text.as_bytes())
    }

    fn publish(&mut self, replace: bool) -> Result<(), FormatError> {
        let failed = |e: Errno| FormatError::io("give the final name to", &self.partial, 0, e.into());
        let rename = |flags| renameat_with(CWD, &self.partial, CWD, &self.out, flags);
        if replace {
            // What is replaced takes the partial's name until it is removed, and must not pass for a
            // partial that nobody holds.
            match lock_directory(&self.out) {
                Ok(dir) => self.replaced = Some(dir),
                Err(Errno::WOULDBLOCK) => {
                    return Err(FormatError::Busy { path: self.out.clone() });
                }
                Err(e) => return Err(FormatError::io("lock", &self.out, 0, e.into())),
            }
            match rename(RenameFlags::EXCHANGE) {
                // Dropping the draft removes the old artifact.
                Ok(()) => {}
                Err(Errno::INVAL | Errno::NOSYS) => self.replace_in_two_steps()?,
                Err(e) => return Err(failed(e)),
            }
        } else {
            match rename(RenameFlags::NOREPLACE) {
                Ok(()) => {}
                Err(Errno::INVAL | Errno::NOSYS) => rename(RenameFlags::empty()).map_err(failed)?,
                Err(e) => return Err(failed(e)),
            }
            self.owned = false;
        }
        let parent = fs::File::open(&self.parent).and_then(|dir| dir.sync_all());
        parent.map_err(|e| FormatError::io("sync", &self.parent, 0, e))
    }

    /// For file systems that cannot exchange: for a moment the name is free, and a crash then leaves
    /// the old artifact under `.NAME.dsv4.old`.
    fn replace_in_two_steps(&mut self) -> Result<(), FormatError> {
        let mut old = self.partial.clone().into_os_string();
        old.push(".old");
        let old = PathBuf::from(old);
        let rename = |from: &PathBuf, to: &PathBuf| -> io::Result<()> { fs::rename(from, to) };
        rename(&self.out, &old).map_err(|e| FormatError::io("set aside", &self.out, 0, e))?;
        if let Err(e) = rename(&self.partial, &self.out) {
            // Put the old one back; if even that fails, the first error is the one to report.
            let _ = rename(&old, &self.out);
            return Err(FormatError::io("give the final name to", &self.partial, 0, e));
        }
        self.owned = false;
        fs::remove_dir_all(&old).map_err(|e| FormatError::io("remove", &old, 0, e))
    }
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
