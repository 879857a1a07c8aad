//! A rank's bytes into memory, block by block, none of them believed before its hash matched.
//!
//! [`RankReader`] hands out single verified blocks (for a staging ring), [`Artifact::load_rank`]
//! fills an [`Arena`] with all of them. A block that does not match, or cannot be read, is read
//! twice more from the medium, then the load fails with its address.

use std::ops::Deref;
use std::path::Path;
use std::sync::Arc;

use crate::artifact::Artifact;
use crate::error::FormatError;
use crate::header::{BLOCK_BYTES, SECTION_ALIGN};
use crate::io::{AlignedBuf, DirectFile, ReadAt};
use crate::layout::{Place, RankLayout};
use crate::manifest::{Digest, RankFile};
use crate::parallel::for_each;
use crate::progress::Progress;
use crate::section::{block_count, block_len, hash_block};

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

/// Fills `buf` (of `block.len` bytes) with the block or fails; on failure `buf` holds garbage.
pub(crate) fn read_verified<S: ReadAt>(
    source: &S,
    path: &Path,
    block: &Block<'_>,
    buf: &mut [u8],
) -> Result<(), FormatError> {
    let mut failure = None;
    for reads in 1..=READS_MAX {
        match source.read_exact_at(buf, block.file_offset) {
            Err(error) => failure = Some(error),
            Ok(()) => {
                let found = hash_block(buf, block.index, block.count);
                if found == block.hash {
                    return Ok(());
                }
                failure = Some(FormatError::Block {
                    file: path.to_path_buf(),
                    section: block.section.into(),
                    block: block.index,
                    offset: block.file_offset,
                    expected: Box::new(Digest(block.hash)),
                    found: Box::new(Digest(found)),
                    reads,
                });
            }
        }
    }
    failure.map_or(Ok(()), Err)
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

    /// Whether the file is read past the page cache.
    pub fn is_direct(&self) -> bool {
        self.file.is_direct()
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

    /// Reads a whole rank into memory with `threads` readers, each verifying what it read.
    ///
    /// Errors: [`FormatError::RankMissing`], [`FormatError::NoSuchRank`], [`FormatError::Memory`],
    /// [`FormatError::Block`], I/O.
    pub fn load_rank(&self, rank: u32, threads: usize, progress: &dyn Progress) -> Result<Arena, FormatError> {
        let reader = self.rank_reader(rank)?;
        let layout = Arc::clone(self.layout(rank)?);
        let bytes = layout.arena_bytes();
        let mut buf = AlignedBuf::named(usize::try_from(bytes).unwrap_or(usize::MAX), "the weight arena")?;
        buf.prefer_huge_pages();
        progress.start(&format!("load rank {rank}"), bytes);
        // Sections follow each other without gaps, so cutting the arena by block length gives every
        // block its own place.
        let mut rest = &mut buf[..];
        let mut jobs = Vec::with_capacity(reader.blocks.len());
        for block in &reader.blocks {
            let (part, tail) = rest.split_at_mut(block.len);
            jobs.push((block, part));
            rest = tail;
        }
        for_each(
            jobs,
            threads,
            || Ok(()),
            |(), (block, part)| {
                reader.read(block, part)?;
                progress.add(block.len as u64);
                Ok(())
            },
        )?;
        progress.finish();
        Ok(Arena { buf, layout })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    /// Gives wrong bytes, or an error, for the first `bad` reads.
    struct Faulty {
        good: Vec<u8>,
        bad: u32,
        errors: bool,
        reads: AtomicU32,
    }

    impl ReadAt for Faulty {
        fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<(), FormatError> {
            let nth = self.reads.fetch_add(1, Ordering::Relaxed);
            let start = offset as usize;
            buf.copy_from_slice(&self.good[start..start + buf.len()]);
            if nth < self.bad {
                if self.errors {
                    let source = std::io::Error::from_raw_os_error(5);
                    return Err(FormatError::io("read", Path::new("disk"), 0, source));
                }
                buf[17] ^= 4;
            }
            Ok(())
        }
    }

    fn outcome(bad: u32, errors: bool) -> (Result<(), FormatError>, u32) {
        let len = 2 << 20;
        let good: Vec<u8> = (0..2 * len as u32).map(|i| (i.wrapping_mul(40_503) >> 7) as u8).collect();
        let block = Block {
            section_index: 0,
            section: "layer 0",
            index: 0,
            count: 1,
            file_offset: len as u64,
            arena_offset: 0,
            len,
            hash: *blake3::hash(&good[len..]).as_bytes(),
        };
        let source = Faulty { good, bad, errors, reads: AtomicU32::new(0) };
        let mut buf = vec![0; len];
        let result = read_verified(&source, Path::new("disk"), &block, &mut buf);
        if result.is_ok() {
            assert!(buf == source.good[len..]);
        }
        (result, source.reads.into_inner())
    }

    #[test]
    fn a_bad_block_is_read_twice_more_and_then_named() {
        for errors in [false, true] {
            for bad in 0..3 {
                let (result, reads) = outcome(bad, errors);
                assert!(result.is_ok(), "{bad} bad reads");
                assert_eq!(reads, bad + 1);
            }
            let (result, reads) = outcome(3, errors);
            assert_eq!(reads, 3);
            let error = result.expect_err("three bad reads");
            match error {
                FormatError::Io { .. } => assert!(errors),
                FormatError::Block { ref section, block: 0, offset, reads: 3, .. } => {
                    assert!(!errors);
                    assert_eq!((section.as_str(), offset), ("layer 0", 2 << 20));
                }
                other => panic!("unexpected {other}"),
            }
        }
    }
}
