//! Page-aligned anonymous memory. No file is read through a mapping: that fills the page cache and turns
//! a disk error into a signal. (`io/cached.rs` maps one to ask what of it is cached, and never reads it.)

use std::ops::{Deref, DerefMut};

use memmap2::{Advice, MmapMut};

use crate::error::FormatError;

/// Zeroed memory that starts at a page boundary (at least 4 KiB), as O_DIRECT wants it.
pub struct AlignedBuf {
    map: MmapMut,
}

impl AlignedBuf {
    /// `len` is at least 1. Errors: [`FormatError::Memory`].
    pub fn new(len: usize) -> Result<Self, FormatError> {
        AlignedBuf::named(len, "a read or write buffer")
    }

    pub(crate) fn named(len: usize, what: &'static str) -> Result<Self, FormatError> {
        let map = MmapMut::map_anon(len).map_err(|source| FormatError::Memory { what, bytes: len as u64, source })?;
        Ok(AlignedBuf { map })
    }

    /// Asks for huge pages, which saves most page faults of a large buffer. Only a wish: a kernel
    /// without them refuses, and nothing changes but speed.
    pub(crate) fn prefer_huge_pages(&self) {
        let _ = self.map.advise(Advice::HugePage);
    }
}

impl Deref for AlignedBuf {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}

impl DerefMut for AlignedBuf {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.map
    }
}
