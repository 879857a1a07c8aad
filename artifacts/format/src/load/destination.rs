//! Where verified blocks go: memory that the disk writes in place, or memory that it cannot write and
//! that takes them from staging slots.
//!
//! Invariant: buffers are owned by one stage at a time. A slot that a device copies from belongs to the
//! device until its copy is done; only then it is read into again.

use std::collections::VecDeque;
use std::mem;
use std::ops::DerefMut;

use crate::error::FormatError;
use crate::header::BLOCK_BYTES;
use crate::io::AlignedBuf;
use crate::load::Block;

/// Slots of a staging ring.
pub const SLOTS: usize = 64;

/// Takes the blocks of a rank. All calls come from the thread that loads.
pub trait Destination {
    /// Memory that one block is read into; page-aligned, at least as long as the block.
    type Buffer: DerefMut<Target = [u8]> + Send;

    /// Whether buffers are memory that was never touched, whose pages should exist before a read waits for them.
    const FRESH: bool;

    /// Memory for the next block; blocks come in the order of the file. `None`: all is in use, until
    /// [`Destination::settle`] says otherwise.
    fn lend(&mut self, block: &Block<'_>) -> Result<Option<Self::Buffer>, FormatError>;

    /// Takes a block whose hash matched, at the start of `buffer`; in any order. May return before the
    /// block is in its place.
    fn accept(&mut self, block: &Block<'_>, buffer: Self::Buffer) -> Result<(), FormatError>;

    /// How many accepted blocks are not in their place yet; with `wait`, and if there are any, not before
    /// one more is.
    fn settle(&mut self, wait: bool) -> Result<usize, FormatError>;
}

/// Host memory: the disk writes each block where it stays.
pub struct InPlace<'a> {
    rest: &'a mut [u8],
}

impl<'a> InPlace<'a> {
    /// `arena` is page-aligned and has exactly the rank's [`arena_bytes`](crate::Artifact::arena_bytes).
    pub fn new(arena: &'a mut [u8]) -> Self {
        InPlace { rest: arena }
    }
}

impl<'a> Destination for InPlace<'a> {
    type Buffer = &'a mut [u8];
    const FRESH: bool = true;

    fn lend(&mut self, block: &Block<'_>) -> Result<Option<&'a mut [u8]>, FormatError> {
        // Sections follow each other without gaps, so cutting the arena by block length gives every
        // block its own place.
        let (part, rest) = mem::take(&mut self.rest).split_at_mut(block.len);
        self.rest = rest;
        Ok(Some(part))
    }

    fn accept(&mut self, _: &Block<'_>, _: &'a mut [u8]) -> Result<(), FormatError> {
        Ok(())
    }

    fn settle(&mut self, _: bool) -> Result<usize, FormatError> {
        Ok(0)
    }
}

/// Memory that the disk cannot write, and what copies into it. Dropping it ends all copies first.
pub trait Device {
    /// Memory that the disk can write and the device read, page-aligned, [`BLOCK_BYTES`] long.
    type Slot: DerefMut<Target = [u8]> + Send;

    /// One more slot. Errors: [`FormatError::Memory`].
    fn slot(&mut self) -> Result<Self::Slot, FormatError>;

    /// Starts copying the first `len` bytes of `slot` to `arena_offset`; keeps the slot until that is done.
    fn copy(&mut self, slot: Self::Slot, len: usize, arena_offset: u64) -> Result<(), FormatError>;

    /// A slot whose copy is done; with `wait`, waits for one if any copy is under way.
    fn copied(&mut self, wait: bool) -> Result<Option<Self::Slot>, FormatError>;
}

/// A device behind a ring of slots.
pub struct Staged<D: Device> {
    device: D,
    free: Vec<D::Slot>,
    made: usize,
    slots: usize,
    copying: usize,
}

impl<D: Device> Staged<D> {
    /// At most `slots` slots (at least one), made when they are first needed.
    pub fn new(device: D, slots: usize) -> Self {
        Staged { device, free: Vec::new(), made: 0, slots: slots.max(1), copying: 0 }
    }

    /// The device, after loading.
    pub fn into_device(self) -> D {
        self.device
    }

    fn collect(&mut self, wait: bool) -> Result<bool, FormatError> {
        let slot = self.device.copied(wait)?;
        let one = slot.is_some();
        self.free.extend(slot);
        self.copying = self.copying.saturating_sub(usize::from(one));
        Ok(one)
    }
}

impl<D: Device> Destination for Staged<D> {
    type Buffer = D::Slot;
    const FRESH: bool = false;

    fn lend(&mut self, _: &Block<'_>) -> Result<Option<D::Slot>, FormatError> {
        if self.free.is_empty() && self.copying > 0 {
            self.collect(false)?;
        }
        if self.free.is_empty() && self.made < self.slots {
            self.free.push(self.device.slot()?);
            self.made += 1;
        }
        Ok(self.free.pop())
    }

    fn accept(&mut self, block: &Block<'_>, slot: D::Slot) -> Result<(), FormatError> {
        self.copying += 1;
        self.device.copy(slot, block.len, block.arena_offset)
    }

    fn settle(&mut self, wait: bool) -> Result<usize, FormatError> {
        let mut wait = wait && self.copying > 0;
        while self.copying > 0 && self.collect(wait)? {
            wait = false;
        }
        Ok(self.copying)
    }
}

/// Host memory behind slots: loading as a device does it, without one.
pub(crate) struct HostCopy<'a> {
    arena: &'a mut [u8],
    done: VecDeque<AlignedBuf>,
}

impl<'a> HostCopy<'a> {
    pub(crate) fn new(arena: &'a mut [u8]) -> Self {
        HostCopy { arena, done: VecDeque::new() }
    }
}

impl Device for HostCopy<'_> {
    type Slot = AlignedBuf;

    fn slot(&mut self) -> Result<AlignedBuf, FormatError> {
        AlignedBuf::named(BLOCK_BYTES as usize, "a staging slot")
    }

    fn copy(&mut self, slot: AlignedBuf, len: usize, arena_offset: u64) -> Result<(), FormatError> {
        let start = arena_offset as usize;
        self.arena[start..start + len].copy_from_slice(&slot[..len]);
        self.done.push_back(slot);
        Ok(())
    }

    fn copied(&mut self, _: bool) -> Result<Option<AlignedBuf>, FormatError> {
        Ok(self.done.pop_front())
    }
}

/// Nowhere: blocks are only verified.
#[derive(Default)]
pub(crate) struct Discard {
    done: Vec<AlignedBuf>,
}

impl Device for Discard {
    type Slot = AlignedBuf;

    fn slot(&mut self) -> Result<AlignedBuf, FormatError> {
        AlignedBuf::named(BLOCK_BYTES as usize, "a block to verify")
    }

    fn copy(&mut self, slot: AlignedBuf, _: usize, _: u64) -> Result<(), FormatError> {
        self.done.push(slot);
        Ok(())
    }

    fn copied(&mut self, _: bool) -> Result<Option<AlignedBuf>, FormatError> {
        Ok(self.done.pop())
    }
}
