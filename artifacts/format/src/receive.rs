//! An artifact that arrives from elsewhere, in any order and in several attempts.
//!
//! MANIFEST comes first and says everything about the rest, so nothing else that is sent is believed:
//! a block is written only when its hash is the manifest's, superblocks are made from the manifest,
//! and compressed files count when their hash is right. What an interrupted attempt left is kept in
//! `.NAME.partial` and read again by the next one; there is no journal to be wrong. The final name is given
//! when everything is there and on the medium. Absent: how the bytes arrive.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use crate::artifact::{Artifact, open_rank_file};
use crate::check::check;
use crate::commit::{Outcome, superblock};
use crate::draft::is_replaceable;
use crate::error::FormatError;
use crate::header::{
    BLOCK_BYTES, HEADER_BYTES, MANIFEST_BYTES_MAX, MANIFEST_FILE, RECEIPT_FILE, SECTION_ALIGN, SIGNATURE_FILE,
    rank_file_name,
};
use crate::io::{AlignedBuf, DIRECT_ALIGN, DirectFile};
use crate::journal::{JOURNAL_FILE, is_partial_file};
use crate::load::{Block, blocks};
use crate::manifest::{Digest, Manifest, Section, StoredFile, decode};
use crate::minisign;
use crate::parallel::{default_threads, for_each, lock};
use crate::partial::{Partial, lock_directory, remove_file, sync_directory};
use crate::progress::Progress;
use crate::section::{block_count, block_len, hash_block};

/// The receiving end of a transfer; shared by the threads that write blocks.
pub struct Receiving {
    partial: Partial,
    manifest: Manifest,
    /// As sent.
    bytes: Vec<u8>,
    /// The same artifact under the final name, to which only what it lacks is added.
    same: Option<Artifact>,
    /// Another one, or the same by force, that makes way.
    replaces: bool,
    ranks: Vec<Incoming>,
    files: Vec<AtomicBool>,
    growing: Mutex<Option<Growing>>,
    /// Holds the lock of the artifact being replaced, which ends up under the partial's name.
    replaced: Option<File>,
}

/// A rank's file that is not complete yet.
struct Incoming {
    rank: u32,
    file: DirectFile,
    /// Index of the section, index of the block in it; in file order.
    places: Vec<(u32, u32)>,
    here: Vec<AtomicBool>,
    /// Made now, so there is nothing in it to look at.
    new: bool,
}

/// A compressed file that arrives piece by piece.
struct Growing {
    index: usize,
    file: DirectFile,
    at: u64,
    hasher: blake3::Hasher,
}

impl Receiving {
    /// Judges a MANIFEST and makes ready for the files of `ranks`. Disk space is reserved here.
    /// Without `force` an artifact under that name must be the same; ranks it has are not asked for.
    /// With `force` it is replaced when all is there; its own blocks are used as far as they are the right ones.
    ///
    /// Errors: those of opening an artifact for the MANIFEST, [`FormatError::NoSuchRank`], [`FormatError::Weightless`],
    /// [`FormatError::NothingOffered`], [`FormatError::Exists`], [`FormatError::Occupied`], [`FormatError::Busy`], [`FormatError::NoSpace`],
    /// [`FormatError::Unfinished`] for what an interrupted pack left, unless `force` discards it.
    pub fn begin(out: &Path, manifest: &[u8], ranks: &[u32], force: bool) -> Result<Receiving, FormatError> {
        let (bytes, name) = (manifest.to_vec(), out.join(MANIFEST_FILE));
        let manifest = decode_copy(&bytes, &name)?;
        check(&manifest, &name)?;
        if let Some(&rank) = ranks.iter().find(|rank| **rank >= manifest.tp) {
            return Err(FormatError::NoSuchRank { path: out.to_path_buf(), rank, tp: manifest.tp });
        }
        if let Some(seed) = manifest.weights_seed.filter(|_| !ranks.is_empty()) {
            return Err(FormatError::Weightless { path: out.to_path_buf(), seed });
        }
        // Before anything is looked at: what an earlier attempt left would count as not wanted.
        if ranks.is_empty() && manifest.weights_seed.is_none() {
            return Err(FormatError::NothingOffered { path: out.to_path_buf(), tp: manifest.tp });
        }
        let there = is_replaceable(out)?;
        let same = if there && !force { Some(require_same(out, &manifest)?) } else { None };
        let partial = Partial::resume(out, is_partial_file)?;
        if partial.path().join(JOURNAL_FILE).exists() {
            if !force {
                return Err(FormatError::Unfinished {
                    path: partial.path().to_path_buf(),
                    expected: "receive".into(),
                    found: "pack".into(),
                    help: "let the same pack command finish it, or discard it with --force",
                });
            }
            partial.clear()?;
        }
        let mut receiving = Receiving {
            partial,
            bytes,
            same,
            replaces: there && force,
            ranks: Vec::new(),
            files: stored(&manifest).map(|_| AtomicBool::new(false)).collect(),
            growing: Mutex::new(None),
            replaced: None,
            manifest,
        };
        let wanted: BTreeSet<u32> = ranks.iter().copied().filter(|rank| !receiving.has(*rank)).collect();
        receiving.keep_what_fits(&wanted)?;
        for rank in wanted {
            receiving.ranks.push(receiving.incoming(rank)?);
        }
        Ok(receiving)
    }

    /// What is being received.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    fn has(&self, rank: u32) -> bool {
        self.same.as_ref().is_some_and(|there| there.has_rank(rank))
    }

    /// Leaves in the partial directory what an earlier attempt at this very MANIFEST put there.
    fn keep_what_fits(&self, wanted: &BTreeSet<u32>) -> Result<(), FormatError> {
        let path = self.partial.path().join(MANIFEST_FILE);
        if !holds(&path, &self.bytes)? {
            self.partial.clear()?;
            write_synced(&path, &self.bytes)?;
        }
        // Never published unless it is complete, and only what is wanted will be.
        for rank in (0..self.manifest.tp).filter(|rank| !wanted.contains(rank)) {
            remove_file(&self.partial.path().join(rank_file_name(rank)))?;
        }
        if self.replaces {
            wanted.iter().try_for_each(|&rank| self.link_from_replaced(rank))?;
        }
        Ok(())
    }

    /// Begins a rank with the file of the artifact that will be replaced, if it is of the same weights:
    /// after a new set of kernels no weight needs to travel. Both names lead to one file, into which only right blocks are written.
    fn link_from_replaced(&self, rank: u32) -> Result<(), FormatError> {
        let name = rank_file_name(rank);
        let (from, to) = (self.partial.out().join(&name), self.partial.path().join(&name));
        let Some(record) = self.manifest.ranks.get(rank as usize) else { return Ok(()) };
        if open_rank_file(&from, &self.manifest, record).is_err() {
            return Ok(());
        }
        remove_file(&to)?;
        fs::hard_link(&from, &to).map_err(|e| FormatError::io("link", &to, 0, e))
    }

    fn incoming(&self, rank: u32) -> Result<Incoming, FormatError> {
        let path = self.partial.path().join(rank_file_name(rank));
        let record = &self.manifest.ranks[rank as usize];
        let left = match DirectFile::reopen(&path) {
            Ok(file) => Some(file).filter(|file| file.len() == record.file_len),
            Err(FormatError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        let new = left.is_none();
        let file = match left {
            Some(file) => file,
            None => {
                remove_file(&path)?;
                // What a full disk did not take must not keep it full.
                DirectFile::create(&path, record.file_len).inspect_err(|_| drop(fs::remove_file(&path)))?
            }
        };
        let mut places = Vec::new();
        for (section, index) in record.sections.iter().zip(0u32..) {
            places.extend((0..section.blocks.len() as u32).map(|block| (index, block)));
        }
        let here = places.iter().map(|_| AtomicBool::new(false)).collect();
        Ok(Incoming { rank, file, places, here, new })
    }

    /// Reads what an earlier attempt left and keeps what has its hash. Takes as long as reading does.
    pub fn examine(&self, progress: &dyn Progress) -> Result<(), FormatError> {
        let old: Vec<&Incoming> = self.ranks.iter().filter(|incoming| !incoming.new).collect();
        let bytes = old.iter().map(|incoming| self.manifest.ranks[incoming.rank as usize].arena_bytes).sum();
        progress.start("read what is here", bytes);
        for incoming in old {
            let record = &self.manifest.ranks[incoming.rank as usize];
            let jobs: Vec<(Block<'_>, &AtomicBool)> = blocks(record).into_iter().zip(&incoming.here).collect();
            let buffer = || AlignedBuf::named(BLOCK_BYTES as usize, "a block to read again");
            for_each(jobs, default_threads(), buffer, |buf, (block, here)| {
                let section = &record.sections[block.section_index];
                let buf = &mut buf[..block.len];
                // What cannot be read is written anew, and fails there if it must.
                let read = incoming.file.read_exact_at(buf, block.file_offset);
                here.store(read.is_ok() && is_block(section, block.index, buf), Ordering::Relaxed);
                progress.add(block.len as u64);
                Ok(())
            })?;
        }
        for (file, here) in stored(&self.manifest).zip(&self.files) {
            here.store(self.same.is_some() || self.is_whole(file)?, Ordering::Relaxed);
        }
        progress.finish();
        Ok(())
    }

    fn is_whole(&self, file: &StoredFile) -> Result<bool, FormatError> {
        let path = self.partial.path().join(&file.name);
        let mut hasher = blake3::Hasher::new();
        match File::open(&path).and_then(|file| hasher.update_reader(file).map(|_| ())) {
            Ok(()) => Ok(Digest(*hasher.finalize().as_bytes()) == file.hash),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(FormatError::io("read", &path, 0, e)),
        }
    }

    /// The ranks whose files are incomplete here, ascending; for each block of the file (in file
    /// order) whether it is missing.
    pub fn missing_blocks(&self) -> Vec<(u32, Vec<bool>)> {
        let missing = |incoming: &Incoming| -> Vec<bool> {
            incoming.here.iter().map(|here| !here.load(Ordering::Acquire)).collect()
        };
        self.ranks.iter().map(|incoming| (incoming.rank, missing(incoming))).collect()
    }

    /// Whether each compressed file (`meta`, then kernels, those with members) is missing. One that has
    /// not arrived whole is given up.
    pub fn missing_files(&self) -> Vec<bool> {
        *lock(&self.growing) = None;
        self.files.iter().map(|here| !here.load(Ordering::Acquire)).collect()
    }

    /// Length of a block, if there is one of this number and it may be put.
    pub fn block_bytes(&self, rank: u32, block: u32) -> Option<usize> {
        let incoming = self.ranks.iter().find(|incoming| incoming.rank == rank)?;
        let (section, index) = *incoming.places.get(block as usize)?;
        Some(block_len(self.section(rank, section)?.len, u64::from(index)))
    }

    /// Length of a compressed file, if there is one of this number and it is missing.
    pub fn file_bytes(&self, index: u32) -> Option<u64> {
        let missing = self.files.get(index as usize).is_some_and(|here| !here.load(Ordering::Acquire));
        stored(&self.manifest).nth(index as usize).filter(|_| missing).map(|file| file.len)
    }

    fn section(&self, rank: u32, section: u32) -> Option<&Section> {
        self.manifest.ranks.get(rank as usize)?.sections.get(section as usize)
    }

    /// Writes a block, if these are its bytes; otherwise it stays missing and this is `false`.
    /// `bytes` begins at a multiple of 4 KiB and has the length of [`Receiving::block_bytes`].
    pub fn put_block(&self, rank: u32, block: u32, bytes: &[u8]) -> Result<bool, FormatError> {
        assert_eq!(self.block_bytes(rank, block), Some(bytes.len()), "block {block} of rank {rank}");
        for incoming in self.ranks.iter().filter(|incoming| incoming.rank == rank) {
            let (section, index) = incoming.places[block as usize];
            let Some(section) = self.section(rank, section) else { continue };
            if !is_block(section, u64::from(index), bytes) {
                return Ok(false);
            }
            incoming.file.write_all_at(bytes, section.offset + u64::from(index) * BLOCK_BYTES)?;
            incoming.here[block as usize].store(true, Ordering::Release);
        }
        Ok(true)
    }

    /// Takes the next `len` bytes of a compressed file that is missing; begins anew if another was
    /// begun. `buf` begins at a multiple of 4 KiB and is one long; `len` is one too but for the file's last
    /// piece. `false` when the file turned out wrong: it stays missing.
    pub fn put_file(&self, index: u32, buf: &mut [u8], len: usize) -> Result<bool, FormatError> {
        assert!(self.file_bytes(index).is_some(), "file {index} is not missing");
        let index = index as usize;
        let Some(record) = stored(&self.manifest).nth(index) else { return Ok(false) };
        let path = self.partial.path().join(&record.name);
        let mut slot = lock(&self.growing);
        let mut growing = match slot.take().filter(|growing| growing.index == index) {
            Some(growing) => growing,
            None => {
                remove_file(&path)?;
                let file = DirectFile::create(&path, record.len.next_multiple_of(DIRECT_ALIGN))?;
                Growing { index, file, at: 0, hasher: blake3::Hasher::new() }
            }
        };
        let end = growing.at + len as u64;
        let padded = len.next_multiple_of(DIRECT_ALIGN as usize);
        if end > record.len || (padded != len && end != record.len) || padded > buf.len() {
            return Ok(false);
        }
        growing.hasher.update(&buf[..len]);
        buf[len..padded].fill(0);
        growing.file.write_all_at(&buf[..padded], growing.at)?;
        growing.at = end;
        if end < record.len {
            *slot = Some(growing);
            return Ok(true);
        }
        if Digest(*growing.hasher.finalize().as_bytes()) != record.hash {
            return Ok(false);
        }
        growing.file.truncate(record.len)?;
        growing.file.sync()?;
        self.files[index].store(true, Ordering::Release);
        Ok(true)
    }

    /// Completes the artifact under its final name; nothing may be missing. `signature` and `receipt`
    /// (to which the ids are added) come along where there are none yet.
    ///
    /// Errors: a signature that cannot be one, I/O. What has arrived stays for another attempt.
    pub fn finish(
        mut self,
        signature: Option<&[u8]>,
        receipt: serde_json::Map<String, serde_json::Value>,
    ) -> Result<Outcome, FormatError> {
        assert!(self.files.iter().all(|here| here.load(Ordering::Acquire)), "a file is missing");
        for incoming in &self.ranks {
            assert!(incoming.here.iter().all(|here| here.load(Ordering::Acquire)), "a block is missing");
            self.finish_rank(incoming)?;
        }
        if let Some(signature) = signature {
            minisign::check(signature, &self.partial.out().join(SIGNATURE_FILE))?;
        }
        if let Some(there) = &self.same {
            let outcome = self.add_to(there, signature)?;
            self.partial.discard_on_drop();
            return Ok(outcome);
        }
        let place = |name| self.partial.path().join(name);
        match signature {
            Some(bytes) => write_synced(&place(SIGNATURE_FILE), bytes)?,
            None => remove_file(&place(SIGNATURE_FILE))?,
        }
        write_synced(&place(RECEIPT_FILE), receipt_text(receipt, &self.manifest).as_bytes())?;
        if !self.replaces {
            self.partial.publish()?;
            return Ok(Outcome::Created);
        }
        let out = self.partial.out().to_path_buf();
        self.replaced = Some(lock_directory(&out).map_err(|e| locked(&out, e))?);
        self.keep_other_ranks()?;
        self.partial.replace()?;
        // What has the partial's name now is the old artifact.
        self.partial.discard_on_drop();
        Ok(Outcome::Replaced)
    }

    /// Superblocks last: until then the file passes for no rank of anything.
    fn finish_rank(&self, incoming: &Incoming) -> Result<(), FormatError> {
        let record = &self.manifest.ranks[incoming.rank as usize];
        incoming.file.sync()?;
        let mut head = AlignedBuf::new(SECTION_ALIGN as usize)?;
        head[..HEADER_BYTES].copy_from_slice(&superblock(&self.manifest, record).encode());
        incoming.file.write_all_at(&head, 0)?;
        incoming.file.write_all_at(&head[..HEADER_BYTES], record.file_len - HEADER_BYTES as u64)?;
        incoming.file.sync()?;
        open_rank_file(incoming.file.path(), &self.manifest, record).map(|_| ())
    }

    /// Each rank's file arrives in the finished artifact by one rename.
    fn add_to(&self, there: &Artifact, signature: Option<&[u8]>) -> Result<Outcome, FormatError> {
        let out = self.partial.out();
        {
            let _lock = lock_directory(out).map_err(|e| locked(out, e))?;
            // Again: who holds no lock may have replaced it since.
            require_same(out, &self.manifest)?;
            for incoming in &self.ranks {
                let to = out.join(rank_file_name(incoming.rank));
                match renameat_with(CWD, incoming.file.path(), CWD, &to, RenameFlags::NOREPLACE) {
                    Ok(()) => {}
                    Err(Errno::INVAL | Errno::NOSYS) if !to.exists() => {
                        fs::rename(incoming.file.path(), &to).map_err(|e| FormatError::io("add", &to, 0, e))?;
                    }
                    Err(e) => return Err(FormatError::io("add", &to, 0, e.into())),
                }
            }
            sync_directory(out)?;
        }
        // The same artifact may have been compressed differently; then the signature is of another MANIFEST.
        let fits = there.signature()?.is_none() && there.manifest_bytes()? == self.bytes;
        let added = signature.filter(|_| fits);
        added.map(|bytes| there.set_signature(bytes)).transpose()?;
        let changed = !self.ranks.is_empty();
        Ok(if changed { Outcome::RankAdded } else { Outcome::AlreadyThere })
    }

    /// Files of the same weights in the artifact to be replaced, of ranks that were not sent.
    fn keep_other_ranks(&self) -> Result<(), FormatError> {
        let sent: BTreeSet<u32> = self.ranks.iter().map(|incoming| incoming.rank).collect();
        (0..self.manifest.tp).filter(|rank| !sent.contains(rank)).try_for_each(|rank| self.link_from_replaced(rank))
    }
}

/// The files a manifest names beside the ranks': `meta` and kernels, those that exist.
fn stored(manifest: &Manifest) -> impl Iterator<Item = &StoredFile> {
    std::iter::once(&manifest.meta).chain(&manifest.kernel_files).filter(|file| !file.members.is_empty())
}

fn is_block(section: &Section, index: u64, bytes: &[u8]) -> bool {
    section.blocks.get(index as usize) == Some(&hash_block(bytes, index, block_count(section.len)))
}

fn require_same(out: &Path, manifest: &Manifest) -> Result<Artifact, FormatError> {
    let there = Artifact::open(out)?;
    if there.manifest().artifact_id == manifest.artifact_id {
        return Ok(there);
    }
    Err(FormatError::Exists {
        path: out.to_path_buf(),
        expected: manifest.artifact_id,
        found: there.manifest().artifact_id.to_string(),
    })
}

/// Decoding wants an aligned copy of what has any address.
fn decode_copy(bytes: &[u8], file: &Path) -> Result<Manifest, FormatError> {
    let found = bytes.len() as u64;
    if bytes.is_empty() {
        return Err(FormatError::Length { file: file.to_path_buf(), expected: HEADER_BYTES as u64, found });
    }
    if found > MANIFEST_BYTES_MAX {
        let what = "length".into();
        return Err(FormatError::TooLarge { file: file.to_path_buf(), what, limit: MANIFEST_BYTES_MAX, found });
    }
    let mut aligned = AlignedBuf::named(bytes.len(), "MANIFEST")?;
    aligned.copy_from_slice(bytes);
    decode(&aligned, file)
}

/// Whether a file is there with exactly this content.
fn holds(path: &Path, bytes: &[u8]) -> Result<bool, FormatError> {
    let mut found = Vec::new();
    match File::open(path).and_then(|file| file.take(bytes.len() as u64 + 1).read_to_end(&mut found)) {
        Ok(_) => Ok(found == bytes),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(FormatError::io("read", path, 0, e)),
    }
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<(), FormatError> {
    let write = || -> io::Result<()> {
        let mut file = File::create(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(|e| FormatError::io("write", path, bytes.len() as u64, e))
}

fn locked(path: &Path, e: Errno) -> FormatError {
    match e {
        Errno::WOULDBLOCK => FormatError::Busy { path: path.to_path_buf() },
        e => FormatError::io("lock", path, 0, e.into()),
    }
}

fn receipt_text(mut receipt: serde_json::Map<String, serde_json::Value>, manifest: &Manifest) -> String {
    receipt.insert("artifact_id".into(), manifest.artifact_id.to_string().into());
    receipt.insert("weight_set_id".into(), manifest.weight_set_id.to_string().into());
    format!("{:#}\n", serde_json::Value::Object(receipt))
}
