//! What MANIFEST says: its types as stored, and the only use of rkyv.
//!
//! Reading is hash first, then checked access, then an owned copy; what the numbers mean is judged
//! in `check.rs`. The types' field order and the pinned rkyv features are part of the format
//! (`header::FORMAT_VERSION`).

use std::fmt;
use std::path::Path;

use rkyv::rancor::BoxedError;
use rkyv::{Archive, Deserialize, Serialize};

use crate::error::FormatError;
use crate::header::{HEADER_BYTES, MANIFEST_BYTES_MAX, ManifestHeader};

macro_rules! hash_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Archive, Serialize, Deserialize)]
        pub struct $name(pub [u8; 32]);

        impl $name {
            pub fn as_bytes(&self) -> &[u8; 32] {
                &self.0
            }

            /// Exactly 64 hexadecimal digits, or nothing.
            pub fn from_hex(text: &str) -> Option<Self> {
                blake3::Hash::from_hex(text).ok().map(|hash| Self(*hash.as_bytes()))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&blake3::Hash::from_bytes(self.0).to_hex())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }
    };
}

hash_type!(
    /// A plain BLAKE3 hash of some bytes, or a key or contract hash made by the caller.
    Digest
);
hash_type!(
    /// Names the bytes of all rank files together.
    WeightSetId
);
hash_type!(
    /// Names the checkpoint's tensors, whatever files they came in. Made by the packer.
    SourceId
);
hash_type!(
    /// Names the set of kernels.
    KernelSetId
);
hash_type!(
    /// Names everything that can change a token.
    ArtifactId
);

impl Digest {
    pub fn of(bytes: &[u8]) -> Self {
        Digest(*blake3::hash(bytes).as_bytes())
    }
}

/// One tensor of a section. `name` and `dtype` are the packer's words; only `len` counts here.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Tensor {
    pub name: String,
    pub dtype: String,
    pub shape: Vec<u64>,
    /// From the section's start, bytes.
    pub offset: u64,
    /// Bytes, without padding.
    pub len: u64,
}

/// A run of tensors that is padded, hashed and addressed as one.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Section {
    pub name: String,
    /// In the rank file, bytes; a multiple of 2 MiB.
    pub offset: u64,
    /// Padding included, bytes; a multiple of 2 MiB.
    pub len: u64,
    /// BLAKE3 of the section's `len` bytes; zeros where there are no weights.
    pub root: Digest,
    /// One per 4 MiB: the block's BLAKE3 subtree chaining value; in a section of one block, `root`. None where there
    /// are no weights.
    pub blocks: Vec<[u8; 32]>,
    pub tensors: Vec<Tensor>,
}

#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct RankFile {
    pub rank: u32,
    pub file_len: u64,
    /// Memory a runtime needs for this rank's weights: the sections one after another.
    pub arena_bytes: u64,
    pub sections: Vec<Section>,
}

/// One compressed member of a [`StoredFile`].
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct Member {
    pub name: String,
    pub raw_len: u64,
    pub raw_hash: Digest,
    /// Of the zstd frame in the file, bytes.
    pub offset: u64,
    pub len: u64,
}

/// A file of zstd frames, one after another (`meta`, `kernels.<arch>`).
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct StoredFile {
    pub name: String,
    pub len: u64,
    /// BLAKE3 of the file as stored.
    pub hash: Digest,
    /// Sorted by name.
    pub members: Vec<Member>,
}

/// One compiled kernel; its bytes are the member named by `key` (in hex) of `kernels.<arch>`.
#[derive(Clone, Debug, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct KernelRecord {
    pub family: String,
    pub key: Digest,
    pub arch: String,
    /// BLAKE3 and length of the cubin, uncompressed.
    pub hash: Digest,
    pub size: u64,
}

/// A short text and the logits the packer's reference computed for it.
#[derive(Clone, Debug, PartialEq, Archive, Serialize, Deserialize)]
pub struct Canary {
    pub tokens: Vec<u32>,
    pub logits: Vec<f32>,
}

#[derive(Clone, Debug, PartialEq, Archive, Serialize, Deserialize)]
pub struct Manifest {
    pub artifact_id: ArtifactId,
    pub weight_set_id: WeightSetId,
    pub source_id: SourceId,
    pub kernel_set_id: KernelSetId,
    pub tp: u32,
    pub weight_contract: Digest,
    pub op_contract: Digest,
    pub config_json: String,
    /// Index = rank; `tp` of them, whether or not their files are present.
    pub ranks: Vec<RankFile>,
    /// Without members there is no file.
    pub meta: StoredFile,
    /// Sorted by name.
    pub kernel_files: Vec<StoredFile>,
    /// Sorted by (arch, key).
    pub kernels: Vec<KernelRecord>,
    pub canary: Option<Canary>,
    /// There are no rank files: weights are made from this number, for measurements. Sections then have no blocks.
    pub weights_seed: Option<u64>,
}

/// The whole MANIFEST file: header and archive.
pub(crate) fn encode(manifest: &Manifest, file: &Path) -> Result<Vec<u8>, FormatError> {
    let archive = rkyv::to_bytes::<BoxedError>(manifest)
        .map_err(|e| FormatError::Structure { file: file.to_path_buf(), reason: e.to_string() })?;
    let total = (HEADER_BYTES + archive.len()) as u64;
    if total > MANIFEST_BYTES_MAX {
        return Err(FormatError::TooLarge {
            file: file.to_path_buf(),
            what: "length".into(),
            limit: MANIFEST_BYTES_MAX,
            found: total,
        });
    }
    let header = ManifestHeader { archive_len: archive.len() as u64, archive_hash: Digest::of(&archive) };
    let mut bytes = header.encode().to_vec();
    bytes.extend_from_slice(&archive);
    Ok(bytes)
}

/// Hash, then structure, then canonical form. `bytes` is the whole file and starts at a 16-byte aligned address; its
/// length was already held against [`MANIFEST_BYTES_MAX`]. An archive cannot name more data than it
/// holds (checked access refuses overlapping ranges), so the copy is bounded as well.
pub(crate) fn decode(bytes: &[u8], file: &Path) -> Result<Manifest, FormatError> {
    let Some((head, archive)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
        return Err(FormatError::Length {
            file: file.to_path_buf(),
            expected: HEADER_BYTES as u64,
            found: bytes.len() as u64,
        });
    };
    let header = ManifestHeader::decode(head, file)?;
    if header.archive_len != archive.len() as u64 {
        return Err(FormatError::Length {
            file: file.to_path_buf(),
            expected: header.archive_len.saturating_add(HEADER_BYTES as u64),
            found: bytes.len() as u64,
        });
    }
    let found = Digest::of(archive);
    if found != header.archive_hash {
        return Err(FormatError::Hash {
            file: file.to_path_buf(),
            what: "the archive".into(),
            expected: header.archive_hash,
            found,
        });
    }
    let archived = rkyv::access::<ArchivedManifest, BoxedError>(archive).map_err(|e| unsound(e, file))?;
    let manifest = rkyv::deserialize::<Manifest, BoxedError>(archived).map_err(|e| unsound(e, file))?;
    // One content, one encoding: nothing can hide between the archive's objects.
    let again = rkyv::to_bytes::<BoxedError>(&manifest).map_err(|e| unsound(e, file))?;
    if again.as_slice() != archive {
        return Err(FormatError::Structure {
            file: file.to_path_buf(),
            reason: "expected the canonical encoding, found another of the same content".into(),
        });
    }
    Ok(manifest)
}

fn unsound(error: BoxedError, file: &Path) -> FormatError {
    FormatError::Structure { file: file.to_path_buf(), reason: error.to_string() }
}
