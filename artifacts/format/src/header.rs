//! The two fixed 4 KiB headers (MANIFEST's and a rank file's superblock), the sizes everything
//! is aligned to, and the limits a reader enforces before it believes any number.
//!
//! All integers are little-endian. Bytes not named are zero, and checked to be.

use std::path::Path;

use crate::error::{FormatError, SuperblockCopy};
use crate::manifest::{Digest, WeightSetId};
use crate::section::first_nonzero;

/// Covers the headers, the archive (rkyv 0.8, little-endian, aligned, 32-bit offsets) and the
/// canonical encodings behind every id. Any change of those is a new number.
pub const FORMAT_VERSION: u32 = 2;

/// MANIFEST's header, and each copy of a rank file's superblock.
pub(crate) const HEADER_BYTES: usize = 4096;
/// Sections start at multiples of this and are zero-padded to it: huge pages, any sector size,
/// and the smallest window for which dropping page cache works with large folios.
pub const SECTION_ALIGN: u64 = 2 << 20;
/// Unit of reading, hashing and retrying. A section's last block may be half of it.
pub const BLOCK_BYTES: u64 = 4 << 20;
pub(crate) const LARGE_TENSOR_BYTES: u64 = 64 << 10;
pub(crate) const LARGE_TENSOR_ALIGN: u64 = 4096;
pub(crate) const SMALL_TENSOR_ALIGN: u64 = 256;

/// MANIFEST's largest length, header included.
pub const MANIFEST_BYTES_MAX: u64 = 16 << 20;
pub(crate) const RANKS_MAX: u32 = 8;
pub(crate) const RANK_BYTES_MAX: u64 = 1 << 44;
pub(crate) const SECTIONS_MAX: usize = 1 << 16;
pub(crate) const TENSORS_MAX: usize = 1 << 20;
pub(crate) const DIMS_MAX: usize = 8;
pub(crate) const NAME_BYTES_MAX: usize = 255;
pub(crate) const DTYPE_BYTES_MAX: usize = 32;
pub(crate) const CONFIG_BYTES_MAX: usize = 1 << 20;
pub(crate) const MEMBERS_MAX: usize = 1 << 16;
pub(crate) const MEMBER_RAW_BYTES_MAX: u64 = 256 << 20;
pub(crate) const STORED_FILE_BYTES_MAX: u64 = 1 << 30;
pub(crate) const CANARY_TOKENS_MAX: usize = 4096;

pub(crate) const MANIFEST_FILE: &str = "MANIFEST";
pub(crate) const META_FILE: &str = "meta";
pub(crate) const KERNELS_PREFIX: &str = "kernels.";
pub(crate) const SIGNATURE_FILE: &str = "SIGNATURE";
pub(crate) const RECEIPT_FILE: &str = "RECEIPT.json";

pub(crate) fn rank_file_name(rank: u32) -> String {
    format!("rank{rank}.weights")
}

const MANIFEST_MAGIC: &[u8; 8] = b"DSV4MANI";
const RANK_MAGIC: &[u8; 8] = b"DSV4RANK";

// MANIFEST header.
const M_VERSION: usize = 8;
const M_ARCHIVE_LEN: usize = 16;
const M_ARCHIVE_HASH: usize = 24;
const M_END: usize = 56;

// Superblock.
const S_VERSION: usize = 8;
const S_TP: usize = 12;
const S_RANK: usize = 16;
const S_SECTIONS: usize = 20;
const S_FILE_LEN: usize = 24;
const S_WEIGHT_SET: usize = 32;
const S_INDEX: usize = 64;
const S_CHECK: usize = 96;
const S_END: usize = 128;

/// What MANIFEST's first 4 KiB say about the archive behind them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ManifestHeader {
    pub archive_len: u64,
    pub archive_hash: Digest,
}

impl ManifestHeader {
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        put(&mut out, 0, MANIFEST_MAGIC);
        put(&mut out, M_VERSION, &FORMAT_VERSION.to_le_bytes());
        put(&mut out, M_ARCHIVE_LEN, &self.archive_len.to_le_bytes());
        put(&mut out, M_ARCHIVE_HASH, self.archive_hash.as_bytes());
        out
    }

    pub fn decode(bytes: &[u8; HEADER_BYTES], file: &Path) -> Result<Self, FormatError> {
        check_magic(bytes, MANIFEST_MAGIC, file)?;
        let version = u32_at(bytes, M_VERSION);
        if version != FORMAT_VERSION {
            return Err(FormatError::Version { file: file.to_path_buf(), expected: FORMAT_VERSION, found: version });
        }
        check_zero(bytes, M_VERSION + 4, M_ARCHIVE_LEN, 0, file)?;
        check_zero(bytes, M_END, HEADER_BYTES, 0, file)?;
        Ok(ManifestHeader {
            archive_len: u64_at(bytes, M_ARCHIVE_LEN),
            archive_hash: Digest(hash_at(bytes, M_ARCHIVE_HASH)),
        })
    }
}

/// A rank file's first and last 4 KiB. It carries the weight set's id, not the artifact's: kernels
/// may be rebuilt beside unchanged rank files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Superblock {
    pub tp: u32,
    pub rank: u32,
    pub sections: u32,
    pub file_len: u64,
    pub weight_set_id: WeightSetId,
    pub index_hash: Digest,
}

impl Superblock {
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        put(&mut out, 0, RANK_MAGIC);
        put(&mut out, S_VERSION, &FORMAT_VERSION.to_le_bytes());
        put(&mut out, S_TP, &self.tp.to_le_bytes());
        put(&mut out, S_RANK, &self.rank.to_le_bytes());
        put(&mut out, S_SECTIONS, &self.sections.to_le_bytes());
        put(&mut out, S_FILE_LEN, &self.file_len.to_le_bytes());
        put(&mut out, S_WEIGHT_SET, self.weight_set_id.as_bytes());
        put(&mut out, S_INDEX, self.index_hash.as_bytes());
        let check = Digest::of(&out[..S_CHECK]);
        put(&mut out, S_CHECK, check.as_bytes());
        out
    }

    /// Requires `bytes` to be exactly this superblock and names the first thing that differs.
    /// `base` is where `bytes` lie in the file.
    pub fn require(
        &self,
        bytes: &[u8; HEADER_BYTES],
        copy: SuperblockCopy,
        base: u64,
        file: &Path,
    ) -> Result<(), FormatError> {
        const DAMAGED: &str = "the file is damaged; copy or pack it again";
        const SWAPPED: &str = "this file belongs to another rank or artifact; put the right one here";
        let differs = |what, expected: String, found: String, help| FormatError::Superblock {
            file: file.to_path_buf(),
            copy,
            what,
            expected,
            found,
            help,
        };
        check_magic(bytes, RANK_MAGIC, file)?;
        let check = Digest(hash_at(bytes, S_CHECK));
        let computed = Digest::of(&bytes[..S_CHECK]);
        if check != computed {
            let (expected, found) = (check.to_string(), computed.to_string());
            return Err(differs("own BLAKE3", expected, found, DAMAGED));
        }
        check_zero(bytes, S_END, HEADER_BYTES, base, file)?;
        let version = u32_at(bytes, S_VERSION);
        if version != FORMAT_VERSION {
            return Err(FormatError::Version { file: file.to_path_buf(), expected: FORMAT_VERSION, found: version });
        }
        let numbers = [
            ("tp", u64::from(self.tp), u64::from(u32_at(bytes, S_TP))),
            ("rank", u64::from(self.rank), u64::from(u32_at(bytes, S_RANK))),
            ("section count", u64::from(self.sections), u64::from(u32_at(bytes, S_SECTIONS))),
            ("file length", self.file_len, u64_at(bytes, S_FILE_LEN)),
        ];
        for (what, expected, found) in numbers {
            if expected != found {
                return Err(differs(what, expected.to_string(), found.to_string(), SWAPPED));
            }
        }
        let hashes = [
            ("weight set id", *self.weight_set_id.as_bytes(), hash_at(bytes, S_WEIGHT_SET)),
            ("section index hash", *self.index_hash.as_bytes(), hash_at(bytes, S_INDEX)),
        ];
        for (what, expected, found) in hashes {
            if expected != found {
                let (expected, found) = (Digest(expected).to_string(), Digest(found).to_string());
                return Err(differs(what, expected, found, SWAPPED));
            }
        }
        Ok(())
    }
}

fn put(out: &mut [u8; HEADER_BYTES], at: usize, bytes: &[u8]) {
    out[at..at + bytes.len()].copy_from_slice(bytes);
}

fn u32_at(bytes: &[u8; HEADER_BYTES], at: usize) -> u32 {
    let mut out = [0; 4];
    out.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(out)
}

fn u64_at(bytes: &[u8; HEADER_BYTES], at: usize) -> u64 {
    let mut out = [0; 8];
    out.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(out)
}

fn hash_at(bytes: &[u8; HEADER_BYTES], at: usize) -> [u8; 32] {
    let mut out = [0; 32];
    out.copy_from_slice(&bytes[at..at + 32]);
    out
}

fn check_magic(bytes: &[u8; HEADER_BYTES], magic: &[u8; 8], file: &Path) -> Result<(), FormatError> {
    if bytes[..8] == magic[..] {
        return Ok(());
    }
    Err(FormatError::Magic {
        file: file.to_path_buf(),
        expected: String::from_utf8_lossy(magic).into_owned(),
        found: bytes[..8].escape_ascii().to_string(),
    })
}

fn check_zero(bytes: &[u8; HEADER_BYTES], start: usize, end: usize, base: u64, file: &Path) -> Result<(), FormatError> {
    match first_nonzero(&bytes[start..end]) {
        None => Ok(()),
        Some((at, found)) => {
            Err(FormatError::Padding { file: file.to_path_buf(), offset: base + (start + at) as u64, found })
        }
    }
}
