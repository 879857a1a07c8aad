//! A rank's bytes into memory, block by block, none of them believed before its hash matched.
//!
//! [`RankReader`] hands out single verified blocks, [`Artifact::load`] fills an [`Arena`] with all of
//! them, [`Artifact::load_into`] any [`Destination`]. A load has stages with threads of their own: blocks
//! are read (many at once, [`readers`]), hashed, and placed ([`run`]); what passes between them is in
//! [`stage`]. A block that does not match, or cannot be read, is read twice more from the medium, then
//! the load fails with its address.

mod destination;
mod options;
mod readers;
pub(crate) mod run;
mod stage;
#[cfg(test)]
mod tests;

use std::ops::Deref;
use std::path::Path;
use std::sync::Arc;

use crate::artifact::Artifact;
use crate::error::FormatError;
use crate::header::{BLOCK_BYTES, SECTION_ALIGN};
use crate::io::{AlignedBuf, DirectFile, ReadAt, ReadMode};
use crate::layout::{Place, RankLayout};
use crate::manifest::{Digest, RankFile};
use crate::progress::Progress;
use crate::section::{block_count, block_len, hash_block};
pub use destination::{Destination, Device, InPlace, SLOTS, Staged};
pub(crate) use destination::{Discard, HostCopy};
pub use options::{CACHED_BYTES_MAX, Engine, Floor, Io, LoadOptions, LoadReport, Look};

const READS_MAX: u32 = 3;

/// 4 MiB (or the last 2 MiB) of a section: what is read, verified and retried as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block<'a> {
    /// Index into the rank's sections.
    pub section_index: usize,
    pub section: &'a str,
    /// Counted from the section's start.
    pub index: u64,
    /// How many blocks the section has.
    pub count: u64,
    pub file_offset: u64,
    pub arena_offset: u64,
    pub len: usize,
    hash: [u8; 32],
}

/// All blocks of a rank in file order.
pub(crate) fn blocks(rank: &RankFile) -> Vec<Block<'_>> {
    let mut out = Vec::new();
    for (section_index, section) in rank.sections.iter().enumerate() {
        let count = block_count(section.len);
        for (index, &hash) in (0..count).zip(&section.blocks) {
            let file_offset = section.offset + index * BLOCK_BYTES;
            out.push(Block {
                section_index,
                section: &section.name,
                index,
                count,
                file_offset,
                arena_offset: file_offset - SECTION_ALIGN,
                len: block_len(section.len, index),
                hash,
            });
        }
    }
    out
}

impl Block<'_> {
    /// Whether these bytes are the block, after `reads` reads. Errors: [`FormatError::Block`].
    fn verify(&self, bytes: &[u8], path: &Path, reads: u32) -> Result<(), FormatError> {
        let found = hash_block(bytes, self.index, self.count);
        if found == self.hash {
            return Ok(());
        }
        Err(FormatError::Block {
            file: path.to_path_buf(),
            section: self.section.into(),
            block: self.index,
            offset: self.file_offset,
            expected: Box::new(Digest(self.hash)),
            found: Box::new(Digest(found)),
            reads,
        })
    }
}

impl FormatError {
    /// Where a read failed, added to what the system says of the file.
    fn of_block(self, block: &Block<'_>, reads: u32) -> FormatError {
        let FormatError::Io { action: "read", path: file, source } = self else { return self };
        let (section, block, offset) = (block.section.to_owned(), block.index, block.file_offset);
        FormatError::BlockRead { file, section, block, offset, reads, source }
    }
}

/// Fills `buf` (of `block.len` bytes) with the block or fails; on failure `buf` holds garbage.
pub(crate) fn read_verified<S: ReadAt>(
    source: &S,
    path: &Path,
    block: &Block<'_>,
    buf: &mut [u8],
) -> Result<(), FormatError> {
    let mut reads = 1;
    loop {
        let read = source.read_exact_at(buf, block.file_offset).map_err(|error| error.of_block(block, reads));
        match read.and_then(|()| block.verify(buf, path, reads)) {
            Err(_) if reads < READS_MAX => reads += 1,
            done => return done,
        }
    }
}

/// A rank's file, opened for reading verified blocks from several threads.
pub struct RankReader<'a> {
    file: DirectFile,
    blocks: Vec<Block<'a>>,
}

impl RankReader<'_> {
    /// In file order.
    pub fn blocks(&self) -> &[Block<'_>] {
        &self.blocks
    }

    /// Reads and verifies one block into `buf`, whose length is `block.len`; page-aligned buffers
    /// ([`AlignedBuf`], pinned memory) are read into directly.
    ///
    /// Errors: [`FormatError::Block`], [`FormatError::Io`], [`FormatError::PastEnd`]; then `buf` is not to be used.
    pub fn read(&self, block: &Block<'_>, buf: &mut [u8]) -> Result<(), FormatError> {
        assert_eq!(buf.len(), block.len, "buffer for block {} of {}", block.index, block.section);
        read_verified(&self.file, self.file.path(), block, buf)
    }

    /// How reads treat the page cache.
    pub fn mode(&self) -> ReadMode {
        self.file.mode()
    }
}

/// One rank's weights in memory: its sections one after another, at a page boundary.
pub struct Arena {
    buf: AlignedBuf,
    layout: Arc<RankLayout>,
}

impl Arena {
    pub fn layout(&self) -> &RankLayout {
        &self.layout
    }

    /// The bytes at a place of this rank's layout; `None` for a place outside the arena.
    pub fn bytes(&self, place: Place) -> Option<&[u8]> {
        let start = usize::try_from(place.arena_offset).ok()?;
        let len = usize::try_from(place.len).ok()?;
        self.buf.get(start..start.checked_add(len)?)
    }

    pub fn tensor(&self, name: &str) -> Option<&[u8]> {
        self.bytes(self.layout.tensor(name)?)
    }
}

impl Deref for Arena {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.buf
    }
}

impl Artifact {
    /// Opens a rank for reading block by block; checks length and both superblocks again.
    pub fn rank_reader(&self, rank: u32) -> Result<RankReader<'_>, FormatError> {
        let record = self.rank_file(rank)?;
        Ok(RankReader { file: self.open_rank(record)?, blocks: blocks(record) })
    }

    /// [`Artifact::load`] with `threads` hashing threads and nothing else asked for.
    pub fn load_rank(&self, rank: u32, threads: usize, progress: &dyn Progress) -> Result<Arena, FormatError> {
        self.load(rank, &LoadOptions { threads, ..LoadOptions::default() }, progress).map(|(arena, _)| arena)
    }

    /// Reads a whole rank into host memory. On failure the memory is free again.
    ///
    /// Errors: [`FormatError::RankMissing`], [`FormatError::NoSuchRank`], [`FormatError::Memory`],
    /// [`FormatError::LowMemory`], [`FormatError::Uring`], [`FormatError::Block`], I/O.
    pub fn load(
        &self,
        rank: u32,
        options: &LoadOptions<'_>,
        progress: &dyn Progress,
    ) -> Result<(Arena, LoadReport), FormatError> {
        // What the file itself says comes before memory for it.
        let reader = self.rank_reader(rank)?;
        let layout = Arc::clone(self.layout(rank)?);
        let bytes = usize::try_from(layout.arena_bytes()).unwrap_or(usize::MAX);
        let mut buf = AlignedBuf::named(bytes, "the weight arena")?;
        buf.prefer_huge_pages();
        let report = if options.staged {
            let mut dest = Staged::new(HostCopy::new(&mut buf), SLOTS);
            reader.load_into(rank, &mut dest, options, progress)?
        } else {
            reader.load_into(rank, &mut InPlace::new(&mut buf), options, progress)?
        };
        Ok((Arena { buf, layout }, report))
    }

    /// Reads a whole rank into `dest`; on failure some of its blocks are there and some are not.
    ///
    /// Errors: those of [`Artifact::load`] and of `dest`.
    pub fn load_into<D: Destination>(
        &self,
        rank: u32,
        dest: &mut D,
        options: &LoadOptions<'_>,
        progress: &dyn Progress,
    ) -> Result<LoadReport, FormatError> {
        self.rank_reader(rank)?.load_into(rank, dest, options, progress)
    }
}

impl RankReader<'_> {
    fn load_into<D: Destination>(
        &self,
        rank: u32,
        dest: &mut D,
        options: &LoadOptions<'_>,
        progress: &dyn Progress,
    ) -> Result<LoadReport, FormatError> {
        progress.start(&format!("load rank {rank}"), self.blocks.iter().map(|b| b.len as u64).sum());
        let report = run::load(&self.file, &self.blocks, dest, &|_, _| Ok(()), options, progress)?;
        progress.finish();
        Ok(report)
    }
}
