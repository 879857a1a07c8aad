//! Kernels as they are stored: the cubins of an architecture and its tuning table in one file, and a record of each
//! cubin in the manifest. [`Artifact::replace_kernels`] gives a finished artifact others.
//!
//! The artifact with other kernels is made whole beside the old one, the rank files by a second name of the same
//! file, and takes its place by one exchange of names. So a crash leaves the old one or the new one, a weight is
//! neither read nor written, and who has the old one open goes on with it.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;

use rustix::io::Errno;

use crate::artifact::Artifact;
use crate::check::{TUNING_MEMBER, check, is_arch};
use crate::commit::{Committed, Outcome};
use crate::draft::{is_replaceable, was_replaced};
use crate::error::FormatError;
use crate::header::{KERNELS_PREFIX, MANIFEST_FILE, META_FILE, RECEIPT_FILE, SIGNATURE_FILE, rank_file_name};
use crate::journal::{JOURNAL_FILE, is_partial_file};
use crate::manifest::{Digest, KernelRecord, Manifest, StoredFile, encode};
use crate::members;
use crate::partial::{Partial, lock_directory};

const RECEIPT_BYTES_MAX: u64 = 1 << 20;

/// One compiled kernel to store.
#[derive(Clone, Debug)]
pub struct KernelInput {
    pub family: String,
    pub key: Digest,
    pub cubin: Vec<u8>,
}

/// The kernels of one architecture, and the text of the table they were compiled by.
#[derive(Clone, Debug)]
pub struct ArchKernels {
    pub arch: String,
    pub kernels: Vec<KernelInput>,
    pub tuning: Option<String>,
}

/// What replaces the kernels of an artifact.
#[derive(Clone, Debug)]
pub struct NewKernels {
    /// Take the place of those of the same architecture; others stay.
    pub arches: Vec<ArchKernels>,
    pub op_contract: Digest,
    /// Members of `meta` that take the place of those of the same name.
    pub meta: Vec<(String, Vec<u8>)>,
    /// Goes into RECEIPT.json, beside what is there.
    pub receipt: serde_json::Map<String, serde_json::Value>,
}

/// `kernels.<arch>`: its record, its bytes, and the records of its kernels. `dir` is where it will be, for messages.
pub(crate) fn store(
    dir: &Path,
    arch: &str,
    kernels: &[KernelInput],
    tuning: Option<&str>,
) -> Result<(StoredFile, Vec<u8>, Vec<KernelRecord>), FormatError> {
    if !is_arch(arch) {
        return Err(FormatError::Input {
            what: "architecture".into(),
            expected: "lower-case letters, digits and _".into(),
            found: format!("{arch:?}"),
        });
    }
    let mut files: Vec<_> = kernels.iter().map(|k| (k.key.to_string(), k.cubin.clone())).collect();
    files.extend(tuning.map(|text| (TUNING_MEMBER.to_string(), text.as_bytes().to_vec())));
    let name = format!("{KERNELS_PREFIX}{arch}");
    let (stored, bytes) = members::store(&name, &files, &dir.join(&name))?;
    let records = kernels.iter().map(|k| KernelRecord {
        family: k.family.clone(),
        key: k.key,
        arch: arch.to_string(),
        hash: Digest::of(&k.cubin),
        size: k.cubin.len() as u64,
    });
    Ok((stored, bytes, records.collect()))
}

/// The manifest's order.
pub(crate) fn sort(files: &mut [StoredFile], kernels: &mut [KernelRecord]) {
    files.sort_by(|a, b| a.name.cmp(&b.name));
    kernels.sort_by(|a, b| (&a.arch, a.key).cmp(&(&b.arch, b.key)));
}

/// A file whose bytes are at hand, whatever the old artifact has under that name.
type Fresh = (String, Vec<u8>);

impl Artifact {
    /// Gives the artifact other kernels. Rank files stay the very files they are; everything else is replaced at
    /// once or not at all. Where nothing would change, nothing is; a file that is not as MANIFEST says is written anew
    /// if it is of what `new` holds, and nothing is replaced if it is another.
    ///
    /// A signature is of the MANIFEST as it was: unless that stays the same, it is dropped with `unsign`.
    ///
    /// Errors: [`FormatError::Signed`] without `unsign`, [`FormatError::Unfinished`] where an interrupted pack or
    /// receive of this name waits, [`FormatError::Busy`], [`FormatError::Occupied`], [`FormatError::Input`], I/O.
    pub fn replace_kernels(&self, new: &NewKernels, unsign: bool) -> Result<Committed, FormatError> {
        let (manifest, fresh) = self.with_kernels(new)?;
        let committed =
            |outcome| Committed { artifact_id: manifest.artifact_id, weight_set_id: manifest.weight_set_id, outcome };
        if manifest.artifact_id == self.manifest().artifact_id && self.stored_are_whole()? {
            return Ok(committed(Outcome::AlreadyThere));
        }
        // The name may be a link; its neighbours are those of the directory itself.
        let out = fs::canonicalize(self.path()).map_err(|e| FormatError::io("resolve", self.path(), 0, e))?;
        is_replaceable(&out)?;
        // Ends up under the partial's name, and must not pass for a partial that nobody holds.
        let _old = lock_directory(&out).map_err(|e| match e {
            Errno::WOULDBLOCK => FormatError::Busy { path: out.clone() },
            e => FormatError::io("lock", &out, 0, e.into()),
        })?;
        // Again: who held no lock may have replaced it since.
        let now = Artifact::open(&out)?;
        if now.manifest() != self.manifest() {
            let found = "another one than when it was opened".into();
            return Err(FormatError::NotAnArtifact { path: out, found });
        }
        // Only now nobody signs it any more.
        let (signed, same) = (now.signature()?.is_some(), manifest == *now.manifest());
        if signed && !same && !unsign {
            return Err(FormatError::Signed { path: self.path().join(SIGNATURE_FILE) });
        }
        let mut partial = Partial::resume(&out, is_partial_file)?;
        refuse_unfinished(partial.path(), &out)?;
        partial.discard_on_drop();
        partial.clear()?;
        for &rank in now.present_ranks() {
            link(&out, partial.path(), &rank_file_name(rank))?;
        }
        let stored = std::iter::once(&manifest.meta).chain(&manifest.kernel_files).filter(|f| !f.members.is_empty());
        for file in stored {
            match fresh.iter().find(|(name, _)| *name == file.name) {
                Some((name, bytes)) => write_new(&partial.path().join(name), bytes)?,
                None => {
                    // A new artifact would vouch for it.
                    now.verify_stored(file)?;
                    link(&out, partial.path(), &file.name)?;
                }
            }
        }
        if signed && same {
            link(&out, partial.path(), SIGNATURE_FILE)?;
        }
        // The receipt first: a MANIFEST without one is what an interrupted receive leaves.
        write_new(&partial.path().join(RECEIPT_FILE), receipt(&out, new, &manifest).as_bytes())?;
        let path = partial.path().join(MANIFEST_FILE);
        write_new(&path, &encode(&manifest, &path)?)?;
        partial.replace()?;
        Ok(committed(Outcome::Replaced))
    }

    /// The manifest with other kernels, and the files that are not the old artifact's to give.
    fn with_kernels(&self, new: &NewKernels) -> Result<(Manifest, Vec<Fresh>), FormatError> {
        let mut manifest = self.manifest().clone();
        manifest.op_contract = new.op_contract;
        let mut fresh = Vec::new();
        let mut meta = Vec::new();
        for member in &self.manifest().meta.members {
            if !new.meta.iter().any(|(name, _)| *name == member.name) {
                meta.extend(self.meta(&member.name)?.map(|bytes| (member.name.clone(), bytes)));
            }
        }
        meta.extend(new.meta.iter().cloned());
        let (stored, bytes) = members::store(META_FILE, &meta, &self.path().join(META_FILE))?;
        manifest.meta = stored;
        fresh.push((META_FILE.to_owned(), bytes));
        for arch in &new.arches {
            let (stored, bytes, records) = store(self.path(), &arch.arch, &arch.kernels, arch.tuning.as_deref())?;
            manifest.kernel_files.retain(|file| file.name != stored.name);
            manifest.kernels.retain(|kernel| kernel.arch != arch.arch);
            manifest.kernels.extend(records);
            fresh.push((stored.name.clone(), bytes));
            manifest.kernel_files.push(stored);
        }
        sort(&mut manifest.kernel_files, &mut manifest.kernels);
        (manifest.weight_set_id, manifest.kernel_set_id, manifest.artifact_id) = manifest.computed_ids();
        check(&manifest, &self.path().join(MANIFEST_FILE))?;
        Ok((manifest, fresh))
    }
}

/// What waits in the partial directory for a command that goes on with it is not this one's to discard. What a change
/// of kernels or an exchange of names left there has a receipt, or is whole.
fn refuse_unfinished(partial: &Path, out: &Path) -> Result<(), FormatError> {
    let has = |name: &str| {
        let path = partial.join(name);
        path.try_exists().map_err(|e| FormatError::io("examine", &path, 0, e))
    };
    let (found, help) = if has(JOURNAL_FILE)? {
        ("pack", "let the same pack command finish it, or discard it with pack --fresh")
    } else if has(MANIFEST_FILE)? && !has(RECEIPT_FILE)? && !was_replaced(partial, out)? {
        ("receive", "repeat the push to finish it, or move this directory away")
    } else {
        return Ok(());
    };
    let expected = "change of kernels".into();
    Err(FormatError::Unfinished { path: partial.to_path_buf(), expected, found: found.into(), help })
}

fn link(from: &Path, to: &Path, name: &str) -> Result<(), FormatError> {
    let to = to.join(name);
    fs::hard_link(from.join(name), &to).map_err(|e| FormatError::io("link", &to, 0, e))
}

/// Writes and syncs a small file.
pub(crate) fn write_new(path: &Path, bytes: &[u8]) -> Result<(), FormatError> {
    let write = || -> io::Result<()> {
        let mut file = File::create_new(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(|e| FormatError::io("write", path, bytes.len() as u64, e))
}

/// The old receipt, as far as it is one, with what is new.
fn receipt(out: &Path, new: &NewKernels, manifest: &Manifest) -> String {
    let mut bytes = Vec::new();
    // For people, and free to be edited or deleted: what cannot be read is left out.
    let read = File::open(out.join(RECEIPT_FILE)).and_then(|f| f.take(RECEIPT_BYTES_MAX).read_to_end(&mut bytes));
    let old = read.ok().and_then(|_| serde_json::from_slice(&bytes).ok());
    let mut receipt: serde_json::Map<String, serde_json::Value> = old.unwrap_or_default();
    receipt.extend(new.receipt.clone());
    receipt.insert("artifact_id".into(), manifest.artifact_id.to_string().into());
    format!("{:#}\n", serde_json::Value::Object(receipt))
}
