//! Files read and written past the page cache.
//!
//! O_DIRECT where the file system takes it. Where it refuses (at open or at the first transfer) the
//! same calls go through the cache with RWF_DONTCACHE, and where that is unknown, without. Some file
//! systems take O_DIRECT and use the cache all the same, so what was read is dropped in every mode, and
//! the first write is looked for in the cache. Dropped are windows of whole 2 MiB: smaller ones leave
//! large folios cached (measured: 98 % of the file with 1 MiB windows).
//! Short transfers, EINTR and EAGAIN never reach the caller ([`transfer`]). One descriptor for each
//! file: O_DIRECT is switched on and off on it, so a checkpoint of hundreds of shards stays below
//! common limits.

pub(crate) mod cached;
pub(crate) mod ring;
#[cfg(test)]
mod tests;
mod transfer;

use std::cell::RefCell;
use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, IoSliceMut};
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use rustix::fs::{Advice, FallocateFlags, OFlags};
use rustix::io::ReadWriteFlags;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::error::FormatError;
use crate::header::BLOCK_BYTES;
pub use crate::map::AlignedBuf;
use crate::parallel::lock;
pub(crate) use transfer::Transfer;

/// What O_DIRECT wants file offsets, lengths and addresses to be multiples of.
pub const DIRECT_ALIGN: u64 = 4096;
const DROP_WINDOW: u64 = 2 << 20;
/// Reads that may leave something behind their end in the page cache, before all of the file is dropped.
const LEFT_MAX: u64 = 8;
/// Written through the page cache before it must be on the medium: bounds what waits there.
const DIRTY_BYTES_MAX: u64 = 64 << 20;
/// `RWF_DONTCACHE` of the kernel's interface (since Linux 6.14), which no library names yet.
const DONTCACHE: u32 = 0x80;
const NOTE: &str = "files go through the page cache, dropped as they are used: this file system has no O_DIRECT";
/// Whether any file of this process had to do without O_DIRECT.
static REFUSED: AtomicBool = AtomicBool::new(false);

/// What a user should know once about the files used so far; none while all take O_DIRECT.
pub fn cache_note() -> Option<&'static str> {
    REFUSED.load(Ordering::Relaxed).then_some(NOTE)
}

/// How a file's transfers treat the page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ReadMode {
    /// O_DIRECT: past the cache.
    Direct = 0,
    /// RWF_DONTCACHE: through the cache, dropped by the kernel.
    DontCache = 1,
    /// Through the cache, dropped in windows of 2 MiB once used.
    Windows = 2,
}

impl ReadMode {
    /// As in reports.
    pub fn name(self) -> &'static str {
        match self {
            ReadMode::Direct => "O_DIRECT",
            ReadMode::DontCache => "RWF_DONTCACHE",
            ReadMode::Windows => "page cache with DONTNEED",
        }
    }

    fn from_u8(mode: u8) -> ReadMode {
        match mode {
            0 => ReadMode::Direct,
            1 => ReadMode::DontCache,
            _ => ReadMode::Windows,
        }
    }

    /// Whether an error of a transfer in this mode says that the mode is not to be had.
    fn is_refused_by(self, error: &io::Error) -> bool {
        match self {
            ReadMode::Direct => error.raw_os_error() == Some(libc::EINVAL),
            ReadMode::DontCache => {
                matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EINVAL | libc::ENOSYS))
            }
            ReadMode::Windows => false,
        }
    }

    /// Flags of a single transfer.
    pub(crate) fn flags(self) -> u32 {
        if self == ReadMode::DontCache { DONTCACHE } else { 0 }
    }
}

/// Where blocks are read from: a file, or a test's faulty disk.
pub(crate) trait ReadAt: Sync {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<(), FormatError>;
}

/// Raises the limit on open files to what this process may have: a checkpoint keeps all its shards
/// open. Only a wish; where it does not suffice, opening fails with [`FormatError::OpenFiles`].
pub fn raise_open_files() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum {
        let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    }
}

/// A file read and written past the page cache. Shared by threads: nothing here has a position.
pub struct DirectFile {
    path: PathBuf,
    file: File,
    /// A [`ReadMode`].
    mode: AtomicU8,
    len: u64,
    written: AtomicU64,
    /// Reads that ended within a window.
    left: AtomicU64,
    /// Whether a sync has failed. Held during a sync: the kernel tells a lost write once, to whoever asks
    /// first, and nobody may hear afterwards that all is well.
    sync_failed: Mutex<bool>,
}

impl DirectFile {
    /// Opens an existing regular file for reading.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let file = File::open(path).map_err(|e| FormatError::io("open", path, 0, e))?;
        let meta = file.metadata().map_err(|e| FormatError::io("examine", path, 0, e))?;
        if !meta.is_file() {
            let source = io::Error::new(io::ErrorKind::InvalidInput, "not a regular file");
            return Err(FormatError::io("open", path, 0, source));
        }
        DirectFile::new(path, file, meta.len())
    }

    /// Creates a file that must not exist yet, of `len` zero bytes, all of them reserved on disk: a
    /// full disk is known here. (File systems that cannot reserve only set the length.)
    pub fn create(path: &Path, len: u64) -> Result<Self, FormatError> {
        let failed = |action, e| FormatError::io(action, path, len, e);
        let file =
            OpenOptions::new().read(true).write(true).create_new(true).open(path).map_err(|e| failed("create", e))?;
        loop {
            match rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, len) {
                Ok(()) => break,
                Err(rustix::io::Errno::INTR) => continue,
                Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {
                    file.set_len(len).map_err(|e| failed("set the length of", e))?;
                    break;
                }
                Err(e) => return Err(failed("reserve space for", e.into())),
            }
        }
        DirectFile::new(path, file, len)
    }

    /// Opens an existing file for reading and writing in place.
    pub(crate) fn reopen(path: &Path) -> Result<Self, FormatError> {
        let failed = |e| FormatError::io("open", path, 0, e);
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(failed)?;
        let len = file.metadata().map_err(failed)?.len();
        DirectFile::new(path, file, len)
    }

    fn new(path: &Path, file: File, len: u64) -> Result<Self, FormatError> {
        let mode = match set_direct(&file, true) {
            Ok(()) => ReadMode::Direct,
            Err(rustix::io::Errno::INVAL) => ReadMode::DontCache,
            Err(e) => return Err(FormatError::io("open", path, 0, e.into())),
        };
        if mode != ReadMode::Direct {
            REFUSED.store(true, Ordering::Relaxed);
        }
        let [written, left] = [const { AtomicU64::new(0) }; 2];
        let (mode, sync_failed) = (AtomicU8::new(mode as u8), Mutex::new(false));
        Ok(DirectFile { path: path.to_path_buf(), file, mode, len, written, left, sync_failed })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes, as they were at opening.
    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether transfers bypass the page cache (as far as is known yet).
    pub fn is_direct(&self) -> bool {
        self.mode() == ReadMode::Direct
    }

    /// How transfers treat the page cache (as far as is known yet).
    pub fn mode(&self) -> ReadMode {
        ReadMode::from_u8(self.mode.load(Ordering::Relaxed))
    }

    /// The descriptor, for requests that are made elsewhere.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Bytes of the file in the page cache, whoever read them; `None` where that cannot be known.
    pub fn cached_bytes(&self) -> Option<u64> {
        cached::cached_bytes(&self.file, 0..self.len).ok()
    }

    /// Drops the file's clean pages from the page cache. Advice only.
    pub fn evict(&self) {
        let _ = rustix::fs::fadvise(&self.file, 0, None, Advice::DontNeed);
    }

    /// Fills `buf` from `offset`; any offset, length and address. Aligned requests (4 KiB, as from
    /// [`AlignedBuf`]) go straight into `buf`, others through a buffer of the calling thread.
    ///
    /// Errors: [`FormatError::PastEnd`], [`FormatError::Io`].
    pub fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<(), FormatError> {
        let len = buf.len() as u64;
        if offset.checked_add(len).is_none_or(|end| end > self.len) {
            return Err(FormatError::PastEnd { file: self.path.clone(), offset, len, found: self.len });
        }
        let need = buf.len();
        let done = if self.is_direct() && !is_aligned(buf, offset) {
            self.read_through_bounce(buf, offset)?
        } else {
            self.read_at_least(buf, offset, need)
        };
        done.map_err(|e| FormatError::io("read", &self.path, len, e))?;
        self.drop_windows(offset, offset + len);
        Ok(())
    }

    /// Writes all of `buf` at `offset`; `offset`, length and address are multiples of 4 KiB.
    ///
    /// Errors: [`FormatError::NoSpace`], [`FormatError::Io`].
    pub fn write_all_at(&self, buf: &[u8], offset: u64) -> Result<(), FormatError> {
        assert!(is_aligned(buf, offset), "unaligned write of {} bytes at {offset}", buf.len());
        let failed = |e| FormatError::io("write", &self.path, buf.len() as u64, e);
        self.write_all(buf, offset).map_err(failed)?;
        self.bound_dirty(offset, buf.len() as u64).map_err(failed)
    }

    /// Cuts the file, written in whole 4 KiB, to its true length.
    pub fn truncate(&mut self, len: u64) -> Result<(), FormatError> {
        self.file.set_len(len).map_err(|e| FormatError::io("set the length of", &self.path, len, e))?;
        self.len = len;
        Ok(())
    }

    /// Returns when data and length are on the medium. Of a file that goes through the page cache
    /// nothing stays cached, so what is read next is what the medium has. Once it has failed it always
    /// fails: what was lost does not come back.
    pub fn sync(&self) -> Result<(), FormatError> {
        self.sync_with(File::sync_all).map_err(|e| FormatError::io("sync", &self.path, self.len, e))?;
        if !self.is_direct() {
            self.evict();
        }
        Ok(())
    }

    /// The next of the ways to read and write, for every thread, unless that has happened already.
    pub(crate) fn refuse(&self, used: ReadMode) -> io::Result<()> {
        let next = match used {
            ReadMode::Direct => {
                set_direct(&self.file, false)?;
                REFUSED.store(true, Ordering::Relaxed);
                ReadMode::DontCache
            }
            ReadMode::DontCache | ReadMode::Windows => ReadMode::Windows,
        };
        // Lost where another thread was first; then it is done.
        let _ = self.mode.compare_exchange(used as u8, next as u8, Ordering::Relaxed, Ordering::Relaxed);
        Ok(())
    }

    fn sync_with(&self, sync: impl FnOnce(&File) -> io::Result<()>) -> io::Result<()> {
        let mut failed = lock(&self.sync_failed);
        if *failed {
            return Err(io::Error::other("an earlier sync of this file has failed"));
        }
        sync(&self.file).inspect_err(|_| *failed = true)
    }

    /// After a write through the page cache: starts writing what is dirty and drops what is already clean;
    /// waits for the medium once enough was written, so that a disk slower than the writer does not fill the
    /// memory with what waits for it. The first write says whether O_DIRECT is meant.
    fn bound_dirty(&self, offset: u64, len: u64) -> io::Result<()> {
        let before = self.written.fetch_add(len, Ordering::Relaxed);
        if self.is_direct() {
            let is_first = before == 0 && len > 0;
            if !is_first || cached::cached_bytes(&self.file, offset..offset + len).is_ok_and(|cached| cached < len) {
                return Ok(());
            }
            self.refuse(ReadMode::Direct)?;
        }
        if before / DIRTY_BYTES_MAX != (before + len) / DIRTY_BYTES_MAX {
            self.sync_with(File::sync_data)?;
        }
        self.evict();
        Ok(())
    }

    /// The outer error is ours (no memory for the buffer), the inner the file's.
    fn read_through_bounce(&self, buf: &mut [u8], offset: u64) -> Result<io::Result<()>, FormatError> {
        thread_local! {
            // One per thread that reads at odd offsets, kept: mapping 4 MiB anew for every small
            // tensor would cost more than reading it.
            static BOUNCE: RefCell<Option<AlignedBuf>> = const { RefCell::new(None) };
        }
        BOUNCE.with_borrow_mut(|slot| {
            let bounce = match slot {
                Some(bounce) => bounce,
                None => slot.insert(AlignedBuf::named(BLOCK_BYTES as usize, "a bounce buffer")?),
            };
            let mut done = 0;
            while done < buf.len() {
                let at = offset + done as u64;
                let skip = (at % DIRECT_ALIGN) as usize;
                let part = (buf.len() - done).min(bounce.len() - skip);
                let window = (skip + part).next_multiple_of(DIRECT_ALIGN as usize);
                let start = at - skip as u64;
                if let Err(e) = self.read_at_least(&mut bounce[..window], start, skip + part) {
                    return Ok(Err(e));
                }
                buf[done..done + part].copy_from_slice(&bounce[skip..skip + part]);
                done += part;
            }
            Ok(Ok(()))
        })
    }

    /// Reads until the first `need` bytes of `buf` are there.
    fn read_at_least(&self, buf: &mut [u8], offset: u64, need: usize) -> io::Result<()> {
        let mut transfer = Transfer::new(self, offset, need);
        while transfer.is_missing() {
            let have = transfer.have();
            let result = match transfer.flags() {
                0 => self.file.read_at(&mut buf[have..], transfer.position()),
                flags => {
                    let part = &mut [IoSliceMut::new(&mut buf[have..])];
                    let flags = ReadWriteFlags::from_bits_retain(flags);
                    rustix::io::preadv2(&self.file, part, transfer.position(), flags).map_err(io::Error::from)
                }
            };
            transfer.advance(self, result, io::ErrorKind::UnexpectedEof)?;
        }
        Ok(())
    }

    fn write_all(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let mut transfer = Transfer::new(self, offset, buf.len());
        while transfer.is_missing() {
            let part = &buf[transfer.have()..];
            let result = match transfer.flags() {
                0 => self.file.write_at(part, transfer.position()),
                flags => {
                    let flags = ReadWriteFlags::from_bits_retain(flags);
                    let part = &[IoSlice::new(part)];
                    rustix::io::pwritev2(&self.file, part, transfer.position(), flags).map_err(io::Error::from)
                }
            };
            transfer.advance(self, result, io::ErrorKind::WriteZero)?;
        }
        Ok(())
    }

    /// Drops the 2 MiB windows that the reader of `start..end` has used. Of a small read the window that `end`
    /// lies in stays, for the next one. That may never come, and the kernel reads ahead: so after some reads
    /// all of the file is dropped.
    pub(crate) fn drop_windows(&self, start: u64, end: u64) {
        let is_whole = end == self.len || end.is_multiple_of(DROP_WINDOW);
        if !is_whole && self.left.fetch_add(1, Ordering::Relaxed) % LEFT_MAX == LEFT_MAX - 1 {
            return self.evict();
        }
        let from = start - start % DROP_WINDOW;
        let is_used_up = is_whole || end - start >= DROP_WINDOW;
        let to = if is_used_up { end.next_multiple_of(DROP_WINDOW) } else { end - end % DROP_WINDOW };
        if let Some(len) = to.checked_sub(from).and_then(NonZeroU64::new) {
            let _ = rustix::fs::fadvise(&self.file, from, Some(len), Advice::DontNeed);
        }
    }
}

impl ReadAt for DirectFile {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<(), FormatError> {
        DirectFile::read_exact_at(self, buf, offset)
    }
}

impl Drop for DirectFile {
    fn drop(&mut self) {
        self.evict();
    }
}

/// INVAL where the file system has no O_DIRECT.
fn set_direct(file: &File, on: bool) -> rustix::io::Result<()> {
    let mut flags = rustix::fs::fcntl_getfl(file)?;
    flags.set(OFlags::DIRECT, on);
    rustix::fs::fcntl_setfl(file, flags)
}

fn is_aligned(buf: &[u8], offset: u64) -> bool {
    let align = DIRECT_ALIGN as usize;
    buf.as_ptr().addr().is_multiple_of(align) && buf.len().is_multiple_of(align) && offset.is_multiple_of(DIRECT_ALIGN)
}
