//! Host memory that a disk writes and a GPU copies from: at a 2 MiB boundary, pinned where there is a driver.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use crate::device::DeviceError;
use crate::device::cuda::Pin;

/// A large page, so that few pages have to be pinned.
const ALIGN: usize = 2 << 20;

/// Zeroed host memory. Dropping it waits for a copy that is under way.
pub struct HostMemory {
    at: NonNull<u8>,
    layout: Layout,
    pin: Option<Pin>,
}

// SAFETY: it owns its memory; so does what pins it.
unsafe impl Send for HostMemory {}

impl HostMemory {
    /// `bytes` (at least one) that nothing pins. Errors: none left.
    pub fn plain(bytes: usize) -> Result<HostMemory, DeviceError> {
        let refused = |reason: &str| DeviceError::HostMemory { bytes: bytes as u64, reason: reason.into() };
        let layout =
            Layout::from_size_align(bytes.max(1), ALIGN).map_err(|_| refused("more than there are addresses"))?;
        // SAFETY: the size is not zero.
        let at = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(|| refused("the allocator refuses"))?;
        Ok(HostMemory { at, layout, pin: None })
    }

    /// The same memory, which `pin` has pinned.
    pub(super) fn pinned(mut self, pin: Pin) -> HostMemory {
        self.pin = Some(pin);
        self
    }

    pub(super) fn pin(&self) -> Option<&Pin> {
        self.pin.as_ref()
    }
}

impl Deref for HostMemory {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: all of it is initialised and lives as long as `self`; a device only reads it.
        unsafe { std::slice::from_raw_parts(self.at.as_ptr(), self.layout.size()) }
    }
}

impl DerefMut for HostMemory {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and nobody else has it. Writing while a device copies changes only what is copied.
        unsafe { std::slice::from_raw_parts_mut(self.at.as_ptr(), self.layout.size()) }
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        self.pin = None;
        // SAFETY: it came from `alloc_zeroed` with this layout; nothing pins it and no copy reads it any more.
        unsafe { dealloc(self.at.as_ptr(), self.layout) };
    }
}
