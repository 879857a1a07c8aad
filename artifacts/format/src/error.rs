//! Everything that can go wrong with an artifact, each message as
//! what / where / expected / found / what to do.
//!
//! All variants mean "input or artifact" (exit code 3) to the binaries except
//! [`FormatError::Memory`], [`FormatError::LowMemory`], [`FormatError::Thread`] and [`FormatError::Uring`],
//! which are "device or memory" (exit code 4).

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::process::{Resource, getrlimit};

use crate::manifest::{ArtifactId, Digest};

/// Which of a rank file's two superblocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SuperblockCopy {
    /// The first 4 KiB.
    Head,
    /// The last 4 KiB.
    Tail,
}

impl fmt::Display for SuperblockCopy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SuperblockCopy::Head => "superblock at the start",
            SuperblockCopy::Tail => "superblock copy at the end",
        })
    }
}

#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    #[error("{path}: cannot {action}: {source}\n  help: check the path, its permissions and the disk (dmesg shows media errors)", path = path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },

    #[error("{path}: the disk is full: {needed} bytes are needed here\n  help: free space or write the artifact to another file system", path = path.display())]
    NoSpace { path: PathBuf, needed: u64 },

    #[error(
        "{bytes} bytes of memory for {what} are not available: {source}\n  help: stop other programs, or use a machine with more memory"
    )]
    Memory { what: &'static str, bytes: u64, source: io::Error },

    #[error(
        "{what} cannot start: {source}\n  help: stop other programs, raise the limits on processes and memory (ulimit -u, ulimit -v), or ask for fewer threads"
    )]
    Thread { what: &'static str, source: io::Error },

    #[error(
        "{figure} is {found} bytes, expected at least {floor} while weights are read; waiting {seconds} s did not help, what was read is given up\n  help: stop other programs, or give a smaller --floor (0 for none)"
    )]
    LowMemory { figure: &'static str, floor: u64, found: u64, seconds: f64 },

    #[error("io_uring cannot be used: {source}\n  help: leave --io out, or use --io threads")]
    Uring { source: io::Error },

    #[error("{path}: too many files are open: this process may have {limit}\n  help: raise the limit (ulimit -n) and try again", path = path.display())]
    OpenFiles { path: PathBuf, limit: u64 },

    #[error("{path}: another process is writing here\n  help: wait for it, or end it; its lock goes with it", path = path.display())]
    Busy { path: PathBuf },

    #[error("{path}: an artifact is already here: expected {expected}, found {found}\n  help: choose another name, or replace it with --force", path = path.display())]
    Exists { path: PathBuf, expected: ArtifactId, found: String },

    #[error("{path}: expected nothing, or what an interrupted {expected} left, found what an interrupted {found} left\n  help: {help}", path = path.display())]
    Unfinished { path: PathBuf, expected: String, found: String, help: &'static str },

    #[error("{source}\n  help: what is written so far is kept in {path}: the same command goes on with it, --fresh discards it", path = path.display())]
    Kept { path: PathBuf, source: Box<FormatError> },

    #[error("{path}: expected a free name or an artifact, found {found}\n  help: choose another name; what is there is never overwritten, not even with --force", path = path.display())]
    Occupied { path: PathBuf, found: String },

    #[error("{path}: expected an artifact (a directory with a MANIFEST), found {found}\n  help: give the path of a finished NAME.dsv4 directory", path = path.display())]
    NotAnArtifact { path: PathBuf, found: String },

    #[error("{file}: the first bytes are wrong: expected {expected:?}, found {found:?}\n  help: this is not such a file, or it is damaged; copy or pack it again", file = file.display())]
    Magic { file: PathBuf, expected: String, found: String },

    #[error("{file}: format version is {found}, expected {expected}\n  help: use the release that wrote this artifact, or pack it again with this one", file = file.display())]
    Version { file: PathBuf, expected: u32, found: u32 },

    #[error("{file}: length is {found} bytes, expected {expected}\n  help: the file is truncated or has extra bytes; copy or pack it again", file = file.display())]
    Length { file: PathBuf, expected: u64, found: u64 },

    #[error("{file}: reading {len} bytes at offset {offset}: expected them inside the file, found a length of {found}\n  help: the file is truncated; fetch it again", file = file.display())]
    PastEnd { file: PathBuf, offset: u64, len: u64, found: u64 },

    #[error("{file}: {what} is {found}, expected at most {limit}\n  help: the file is damaged or was not written by this program; copy or pack it again", file = file.display())]
    TooLarge { file: PathBuf, what: String, limit: u64, found: u64 },

    #[error("{file}: BLAKE3 of {what} is {found}, expected {expected}\n  help: the file is damaged; copy or pack it again", file = file.display())]
    Hash { file: PathBuf, what: String, expected: Digest, found: Digest },

    #[error("{file}: padding at offset {offset}: expected 0, found {found}\n  help: the file is damaged; copy or pack it again", file = file.display())]
    Padding { file: PathBuf, offset: u64, found: u8 },

    #[error("{file}: the archive's structure is unsound: {reason}\n  help: the hash matches, so this was written by another program or version; pack it again", file = file.display())]
    Structure { file: PathBuf, reason: String },

    #[error("{file}: {at}: expected {expected}, found {found}\n  help: the manifest contradicts itself; pack the artifact again", file = file.display())]
    Manifest { file: PathBuf, at: String, expected: String, found: String },

    #[error("{file}: {copy}: {what} is {found}, expected {expected}\n  help: {help}", file = file.display())]
    Superblock {
        file: PathBuf,
        copy: SuperblockCopy,
        what: &'static str,
        expected: String,
        found: String,
        help: &'static str,
    },

    #[error("{file}: section {section}, block {block}, offset {offset}: block hash is {found}, expected {expected} (read {reads} times)\n  help: the data on this disk is damaged; copy this rank's file again, then check memory and disk", file = file.display())]
    Block {
        file: PathBuf,
        section: String,
        /// Counted from the section's start, in 4 MiB blocks.
        block: u64,
        /// In the file, bytes.
        offset: u64,
        expected: Box<Digest>,
        found: Box<Digest>,
        reads: u32,
    },

    #[error("{file}: section {section}, block {block}, offset {offset}: cannot read after {reads} tries: {source}\n  help: the disk does not give these bytes (dmesg shows media errors); copy this rank's file again, to another disk", file = file.display())]
    BlockRead { file: PathBuf, section: String, block: u64, offset: u64, reads: u32, source: io::Error },

    #[error("{file}: section {section}, block {block}, offset {offset}: read back with block hash {found}, expected {expected}\n  help: the disk does not give what was written to it; check memory and disk (dmesg), then pack again", file = file.display())]
    ReadBack { file: PathBuf, section: String, block: u64, offset: u64, expected: Box<Digest>, found: Box<Digest> },

    #[error("{file}: section {section}, block {block}, offset {offset}: cannot be read back after {reads} tries: {source}\n  help: the disk does not give what was written to it (dmesg shows media errors); if trying again does not help, pack to another disk", file = file.display())]
    ReadBackIo { file: PathBuf, section: String, block: u64, offset: u64, reads: u32, source: io::Error },

    #[error("{path}: the file of rank {rank} is missing; expected it beside MANIFEST, found ranks {present:?}\n  help: copy this rank's file here, or run with a rank that is present", path = path.display())]
    RankMissing { path: PathBuf, rank: u32, present: Vec<u32> },

    #[error("{path}: expected weights, found none: this artifact's are made from the seed {seed}, to measure with\n  help: `dsv4-run bench` runs it; for answers pack a checkpoint", path = .path.display())]
    Weightless { path: PathBuf, seed: u64 },

    #[error("{path}: expected no signature, found one: it is of the kernels as they are, and would be void\n  help: replace the kernels and drop it with --force, then sign again with `dsv4c sign`", path = .path.display())]
    Signed { path: PathBuf },

    #[error("{path}: no rank's file is here: expected at least one of {tp}, found none\n  help: copy a rank's file beside MANIFEST, or pack again", path = path.display())]
    NoRanks { path: PathBuf, tp: u32 },

    #[error("{path}: no rank is offered of an artifact with weights: expected at least one of {tp}, found none\n  help: push from a machine that has a rank's file", path = .path.display())]
    NothingOffered { path: PathBuf, tp: u32 },

    #[error("{path}: rank {rank} does not exist: expected less than {tp}\n  help: this artifact is packed for {tp} ranks", path = path.display())]
    NoSuchRank { path: PathBuf, rank: u32, tp: u32 },

    #[error("{path}: a file that belongs to no artifact: expected {expected}, found {found}\n  help: move it away; an artifact holds nothing but what its MANIFEST names", path = path.display())]
    UnknownFile { path: PathBuf, expected: String, found: String },

    #[error("{file}: is empty: expected content, found 0 bytes\n  help: an artifact has no empty files; copy it again, or remove it if it is RECEIPT.json or SIGNATURE", file = file.display())]
    Empty { file: PathBuf },

    #[error("{file}: {at}: expected {expected}, found {found}\n  help: this is no signature as minisign writes it; sign again, or remove the file", file = file.display())]
    Signature { file: PathBuf, at: String, expected: String, found: String },

    #[error("{file}: member {member}: {reason}\n  help: the file is damaged; copy or pack it again", file = file.display())]
    Member { file: PathBuf, member: String, reason: String },

    #[error(
        "layout: section {section:?}, tensor {tensor:?}: expected {expected}, found {found}\n  help: this is a fault of the plan, not of the checkpoint; report it with the command line"
    )]
    Layout { section: String, tensor: String, expected: String, found: String },

    #[error(
        "rank {rank}: bytes arrived out of order: expected {expected}, found {found}\n  help: this is a fault of the packer, not of the checkpoint; report it with the command line"
    )]
    Order { rank: u32, expected: String, found: String },

    #[error("rank {rank}: an earlier write failed, nothing more is written\n  help: see the first error")]
    WriterFailed { rank: u32 },

    #[error(
        "{what}: expected {expected}, found {found}\n  help: this is a fault of the packer's input to the manifest; report it with the command line"
    )]
    Input { what: String, expected: String, found: String },
}

impl FormatError {
    /// The message without what to do, for quoting in another one.
    pub(crate) fn fact(&self) -> String {
        let text = self.to_string();
        text.split_once("\n  help: ").map_or(text.clone(), |(fact, _)| fact.to_owned())
    }

    /// Whether the machine failed, or another program was in the way: then what was written before is as
    /// good as it was.
    pub(crate) fn is_of_the_machine(&self) -> bool {
        matches!(
            self,
            FormatError::Io { .. }
                | FormatError::NoSpace { .. }
                | FormatError::Memory { .. }
                | FormatError::Thread { .. }
                | FormatError::OpenFiles { .. }
                | FormatError::Busy { .. }
                | FormatError::WriterFailed { .. }
                | FormatError::BlockRead { .. }
                | FormatError::ReadBackIo { .. }
                | FormatError::LowMemory { .. }
                | FormatError::Uring { .. }
        )
    }

    /// Wraps an I/O error; a full disk becomes [`FormatError::NoSpace`], too many open files
    /// [`FormatError::OpenFiles`].
    pub(crate) fn io(action: &'static str, path: &Path, needed: u64, source: io::Error) -> Self {
        let path = path.to_path_buf();
        if source.raw_os_error() == Some(Errno::MFILE.raw_os_error()) {
            let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
            return FormatError::OpenFiles { path, limit };
        }
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => FormatError::NoSpace { path, needed },
            _ => FormatError::Io { action, path, source },
        }
    }
}
