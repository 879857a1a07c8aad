//! A finished artifact, opened: MANIFEST read and judged, and every rank file that is here held
//! against it by length and both superblocks. No weight byte is read and nothing large allocated.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::check::{TUNING_MEMBER, check, find_kernel, find_member, is_arch};
use crate::commit::superblock;
use crate::error::{FormatError, SuperblockCopy};
use crate::header::{
    HEADER_BYTES, KERNELS_PREFIX, MANIFEST_BYTES_MAX, MANIFEST_FILE, META_FILE, RANKS_MAX, RECEIPT_FILE,
    SIGNATURE_FILE, rank_file_name,
};
use crate::io::{AlignedBuf, DirectFile};
use crate::layout::RankLayout;
use crate::manifest::{Digest, KernelRecord, Manifest, Member, RankFile, StoredFile, decode};
use crate::members;

pub struct Artifact {
    path: PathBuf,
    manifest: Manifest,
    layouts: Vec<Arc<RankLayout>>,
    present: Vec<u32>,
}

impl Artifact {
    /// Opens and checks everything that can be checked without reading weights. Rank files may be
    /// absent (a machine holds only its own); those present must be exact.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let refuse = |found: String| FormatError::NotAnArtifact { path: path.to_path_buf(), found };
        match fs::metadata(path) {
            Ok(meta) if meta.is_dir() => {}
            Ok(_) => return Err(refuse("something that is not a directory".into())),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(refuse("nothing".into())),
            Err(e) => return Err(FormatError::io("examine", path, 0, e)),
        }
        let name = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
        if name.starts_with('.') && name.ends_with(".partial") {
            return Err(refuse("one that is not finished".into()));
        }
        Artifact::read(path)
    }

    /// As [`Artifact::open`], of a directory whatever its name.
    pub(crate) fn read(path: &Path) -> Result<Self, FormatError> {
        let refuse = |found: String| FormatError::NotAnArtifact { path: path.to_path_buf(), found };
        let file = path.join(MANIFEST_FILE);
        if !exists(&file)? {
            return Err(refuse("a directory without MANIFEST".into()));
        }
        let manifest = decode(&read_whole(&file, MANIFEST_BYTES_MAX)?, &file)?;
        let layouts = check(&manifest, &file)?.into_iter().map(Arc::new).collect();
        let mut artifact = Artifact { path: path.to_path_buf(), manifest, layouts, present: Vec::new() };
        let weightless = artifact.manifest.weights_seed.is_some();
        for rank in artifact.manifest.ranks.iter().filter(|_| !weightless) {
            if exists(&artifact.rank_path(rank.rank))? {
                artifact.open_rank(rank)?;
                artifact.present.push(rank.rank);
            }
        }
        Ok(artifact)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// What weights are made from, for measurements, where the artifact has none: no rank of it can be loaded.
    pub fn weights_seed(&self) -> Option<u64> {
        self.manifest.weights_seed
    }

    /// Ranks whose files were here at opening, ascending.
    pub fn present_ranks(&self) -> &[u32] {
        &self.present
    }

    pub fn has_rank(&self, rank: u32) -> bool {
        self.present.contains(&rank)
    }

    /// Where a rank's tensors lie. Errors: [`FormatError::NoSuchRank`].
    pub fn layout(&self, rank: u32) -> Result<&Arc<RankLayout>, FormatError> {
        self.layouts.get(rank as usize).ok_or_else(|| self.no_such_rank(rank))
    }

    /// Memory for a rank's weights, bytes. Errors: [`FormatError::NoSuchRank`].
    pub fn arena_bytes(&self, rank: u32) -> Result<u64, FormatError> {
        self.layout(rank).map(|layout| layout.arena_bytes())
    }

    /// A member of `meta`, decompressed and hash-checked; `None` if there is none of this name.
    pub fn meta(&self, name: &str) -> Result<Option<Vec<u8>>, FormatError> {
        let file = &self.manifest.meta;
        find_member(file, name).map(|member| self.read_member(file, member)).transpose()
    }

    /// A kernel's cubin, decompressed and hash-checked. `kernel` is one of this manifest's.
    pub fn kernel(&self, kernel: &KernelRecord) -> Result<Option<Vec<u8>>, FormatError> {
        self.kernel_member(&kernel.arch, &kernel.key.to_string())
    }

    /// The tuning table's text that came with the kernels of `arch`.
    pub fn tuning(&self, arch: &str) -> Result<Option<Vec<u8>>, FormatError> {
        self.kernel_member(arch, TUNING_MEMBER)
    }

    /// Hash of that text as MANIFEST has it; nothing is read.
    pub fn tuning_hash(&self, arch: &str) -> Option<Digest> {
        find_kernel(&self.manifest, arch, TUNING_MEMBER).map(|(_, member)| member.raw_hash)
    }

    fn kernel_member(&self, arch: &str, name: &str) -> Result<Option<Vec<u8>>, FormatError> {
        let found = find_kernel(&self.manifest, arch, name);
        found.map(|(file, member)| self.read_member(file, member)).transpose()
    }

    fn read_member(&self, stored: &StoredFile, member: &Member) -> Result<Vec<u8>, FormatError> {
        let path = self.path.join(&stored.name);
        let file = DirectFile::open(&path)?;
        require_len(&file, stored.len)?;
        // Bounded: the member lies inside a file whose real length was just checked.
        let mut frame = vec![0; member.len as usize];
        file.read_exact_at(&mut frame, member.offset)?;
        members::restore(member, &frame, &path)
    }

    /// Where a rank's file is, or would be.
    pub fn rank_path(&self, rank: u32) -> PathBuf {
        self.path.join(rank_file_name(rank))
    }

    /// The rank's record, if its file is to be had.
    pub(crate) fn rank_file(&self, rank: u32) -> Result<&RankFile, FormatError> {
        let record = self.manifest.ranks.get(rank as usize).ok_or_else(|| self.no_such_rank(rank))?;
        if let Some(seed) = self.weights_seed() {
            return Err(FormatError::Weightless { path: self.path.clone(), seed });
        }
        let path = self.rank_path(rank);
        if exists(&path)? {
            return Ok(record);
        }
        Err(FormatError::RankMissing { path, rank, present: self.present.clone() })
    }

    /// Opens a rank's file and holds length and both superblocks against the manifest.
    pub(crate) fn open_rank(&self, rank: &RankFile) -> Result<DirectFile, FormatError> {
        open_rank_file(&self.rank_path(rank.rank), &self.manifest, rank)
    }

    fn no_such_rank(&self, rank: u32) -> FormatError {
        FormatError::NoSuchRank { path: self.path.clone(), rank, tp: self.manifest.tp }
    }
}

/// Opens what must be the file of `rank` in `manifest`: its length and both superblocks say so.
pub(crate) fn open_rank_file(path: &Path, manifest: &Manifest, rank: &RankFile) -> Result<DirectFile, FormatError> {
    let file = DirectFile::open(path)?;
    require_len(&file, rank.file_len)?;
    let expected = superblock(manifest, rank);
    let tail = rank.file_len - HEADER_BYTES as u64;
    let mut buf = AlignedBuf::new(HEADER_BYTES)?;
    for (copy, base) in [(SuperblockCopy::Head, 0), (SuperblockCopy::Tail, tail)] {
        file.read_exact_at(&mut buf, base)?;
        let (bytes, _) = buf.split_first_chunk().unwrap_or_else(|| unreachable!("4 KiB were asked for"));
        expected.require(bytes, copy, base, file.path())?;
    }
    Ok(file)
}

/// Whether some artifact could hold a file of this name.
pub(crate) fn is_artifact_file(name: &str) -> bool {
    [MANIFEST_FILE, META_FILE, SIGNATURE_FILE, RECEIPT_FILE].contains(&name)
        || (0..RANKS_MAX).any(|rank| name == rank_file_name(rank))
        || name.strip_prefix(KERNELS_PREFIX).is_some_and(is_arch)
}

pub(crate) fn require_len(file: &DirectFile, expected: u64) -> Result<(), FormatError> {
    if file.len() == expected {
        return Ok(());
    }
    Err(FormatError::Length { file: file.path().to_path_buf(), expected, found: file.len() })
}

fn exists(path: &Path) -> Result<bool, FormatError> {
    path.try_exists().map_err(|e| FormatError::io("examine", path, 0, e))
}

/// A whole file of at most `limit` bytes, page-aligned.
fn read_whole(path: &Path, limit: u64) -> Result<AlignedBuf, FormatError> {
    let file = DirectFile::open(path)?;
    if file.len() > limit {
        return Err(FormatError::TooLarge {
            file: path.to_path_buf(),
            what: "length".into(),
            limit,
            found: file.len(),
        });
    }
    if file.is_empty() {
        return Err(FormatError::Length { file: path.to_path_buf(), expected: HEADER_BYTES as u64, found: 0 });
    }
    let mut buf = AlignedBuf::named(file.len() as usize, "MANIFEST")?;
    file.read_exact_at(&mut buf, 0)?;
    Ok(buf)
}
