//! Files read and written past the page cache.
//!
//! O_DIRECT where the file system takes it. Where it refuses (at open or at the first transfer) the
//! same calls go through the cache, and what was touched is dropped in windows of whole 2 MiB:
//! smaller windows leave large folios cached (measured: 98 % of the file with 1 MiB windows).
//! Short transfers, EINTR and EAGAIN never reach the caller. One descriptor for each file: O_DIRECT
//! is switched on and off on it, so a checkpoint of hundreds of shards stays below common limits.

use std::cell::RefCell;
use std::fs::{File, OpenOptions};
use std::io;
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::fs::{Advice, FallocateFlags, OFlags};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::error::FormatError;
use crate::header::BLOCK_BYTES;
pub use crate::map::AlignedBuf;

/// What O_DIRECT wants file offsets, lengths and addresses to be multiples of.
pub const DIRECT_ALIGN: u64 = 4096;
const DROP_WINDOW: u64 = 2 << 20;
const STALLS_MAX: u32 = 1000;

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
    direct: AtomicBool,
    len: u64,
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
        let direct = match set_direct(&file, true) {
            Ok(()) => true,
            Err(rustix::io::Errno::INVAL) => false,
            Err(e) => return Err(FormatError::io("open", path, 0, e.into())),
        };
        Ok(DirectFile { path: path.to_path_buf(), file, direct: AtomicBool::new(direct), len })
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
        self.direct.load(Ordering::Relaxed)
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
        if self.is_direct() {
            let done = if is_aligned(buf, offset) {
                self.read_at_least(buf, offset, buf.len())
            } else {
                self.read_through_bounce(buf, offset)?
            };
            match done {
                Ok(()) => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::InvalidInput => self.refuse_direct()?,
                Err(e) => return Err(FormatError::io("read", &self.path, len, e)),
            }
        }
        let need = buf.len();
        self.read_at_least(buf, offset, need).map_err(|e| FormatError::io("read", &self.path, len, e))?;
        self.drop_windows(offset, offset + len);
        Ok(())
    }

    /// Writes all of `buf` at `offset`; `offset`, length and address are multiples of 4 KiB.
    ///
    /// Errors: [`FormatError::NoSpace`], [`FormatError::Io`].
    pub fn write_all_at(&self, buf: &[u8], offset: u64) -> Result<(), FormatError> {
        assert!(is_aligned(buf, offset), "unaligned write of {} bytes at {offset}", buf.len());
        let failed = |e| FormatError::io("write", &self.path, buf.len() as u64, e);
        if self.is_direct() {
            match self.write_all(buf, offset) {
                Ok(()) => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::InvalidInput => self.refuse_direct()?,
                Err(e) => return Err(failed(e)),
            }
        }
        self.write_all(buf, offset).map_err(failed)?;
        // Starts writing what is dirty and drops what is already clean, so the cache stays at about
        // what the disk has in flight. Advice only: a refusal costs memory, not data.
        let _ = rustix::fs::fadvise(&self.file, 0, None, Advice::DontNeed);
        Ok(())
    }

    /// Cuts the file, written in whole 4 KiB, to its true length.
    pub fn truncate(&mut self, len: u64) -> Result<(), FormatError> {
        self.file.set_len(len).map_err(|e| FormatError::io("set the length of", &self.path, len, e))?;
        self.len = len;
        Ok(())
    }

    /// Returns when data and length are on the medium. Of a file that goes through the page cache
    /// nothing stays cached, so what is read next is what the medium has.
    pub fn sync(&self) -> Result<(), FormatError> {
        self.file.sync_all().map_err(|e| FormatError::io("sync", &self.path, self.len, e))?;
        if !self.is_direct() {
            let _ = rustix::fs::fadvise(&self.file, 0, None, Advice::DontNeed);
        }
        Ok(())
    }

    /// From here on through the page cache, for every thread.
    fn refuse_direct(&self) -> Result<(), FormatError> {
        set_direct(&self.file, false).map_err(|e| FormatError::io("open", &self.path, 0, e.into()))?;
        self.direct.store(false, Ordering::Relaxed);
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

    /// Reads until the first `need` bytes of `buf` are there. A short read is continued from the last
    /// aligned position, because O_DIRECT would refuse any other.
    fn read_at_least(&self, buf: &mut [u8], offset: u64, need: usize) -> io::Result<()> {
        let (mut have, mut stalls) = (0, 0);
        loop {
            match self.file.read_at(&mut buf[have..], offset + have as u64) {
                Ok(n) if have + n >= need => return Ok(()),
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => {
                    let next = aligned_down(have + n);
                    if next == have {
                        stall(&mut stalls, io::ErrorKind::UnexpectedEof.into())?;
                    }
                    have = next;
                }
                Err(e) => retry(&mut stalls, e)?,
            }
        }
    }

    fn write_all(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let (mut done, mut stalls) = (0, 0);
        while done < buf.len() {
            match self.file.write_at(&buf[done..], offset + done as u64) {
                Ok(n) if done + n == buf.len() => return Ok(()),
                Ok(n) => {
                    let next = aligned_down(done + n);
                    if next == done {
                        stall(&mut stalls, io::ErrorKind::WriteZero.into())?;
                    }
                    done = next;
                }
                Err(e) => retry(&mut stalls, e)?,
            }
        }
        Ok(())
    }

    /// Drops the whole 2 MiB windows that the reader of `start..end` has left behind. The window
    /// `end` lies in stays until a later read leaves it, or the file is closed.
    fn drop_windows(&self, start: u64, end: u64) {
        let from = start - start % DROP_WINDOW;
        let to = if end == self.len { end.next_multiple_of(DROP_WINDOW) } else { end - end % DROP_WINDOW };
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
        if !self.is_direct() {
            let _ = rustix::fs::fadvise(&self.file, 0, None, Advice::DontNeed);
        }
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

fn aligned_down(bytes: usize) -> usize {
    bytes - bytes % DIRECT_ALIGN as usize
}

/// EINTR is free; EAGAIN (a busy queue) waits a little and counts as a stall.
fn retry(stalls: &mut u32, error: io::Error) -> io::Result<()> {
    match error.kind() {
        io::ErrorKind::Interrupted => Ok(()),
        io::ErrorKind::WouldBlock => {
            std::thread::sleep(Duration::from_millis(1));
            stall(stalls, error)
        }
        _ => Err(error),
    }
}

/// Bounds how often a transfer may make no progress.
fn stall(stalls: &mut u32, error: io::Error) -> io::Result<()> {
    *stalls += 1;
    if *stalls > STALLS_MAX { Err(error) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every byte differs from its neighbours and repeats only after 2^32.
    fn pattern(len: usize) -> Vec<u8> {
        (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
    }

    #[test]
    fn reads_any_range_of_a_file_with_a_ragged_end_in_both_modes() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("shard");
        let bytes = pattern((9 << 20) + 1234);
        std::fs::write(&path, &bytes).expect("write");
        let len = bytes.len();
        let ranges = [
            (0, len),
            (1, 1),
            (4095, 2),
            (4096, 4096),
            (8, (5 << 20) + 3),
            ((4 << 20) - 1, (4 << 20) + 2),
            (len - 1, 1),
            (len - 1234, 1234),
            (len, 0),
        ];
        for refuse in [false, true] {
            let file = DirectFile::open(&path).expect("open");
            if refuse {
                file.refuse_direct().expect("through the cache");
                assert!(!file.is_direct());
            }
            for (start, n) in ranges {
                let mut buf = vec![0xa5; n];
                file.read_exact_at(&mut buf, start as u64).expect("read");
                assert!(buf == bytes[start..start + n], "{n} bytes at {start}, refused {refuse}");
            }
            let mut aligned = AlignedBuf::new(2 << 20).expect("buffer");
            file.read_exact_at(&mut aligned, 6 << 20).expect("read");
            assert!(aligned[..] == bytes[6 << 20..8 << 20]);
        }
    }

    #[test]
    fn reading_past_the_end_names_the_length() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("short");
        std::fs::write(&path, [7; 10]).expect("write");
        let file = DirectFile::open(&path).expect("open");
        for (offset, len) in [(0, 11), (10, 1), (u64::MAX, 2)] {
            let mut buf = vec![0; len];
            let error = file.read_exact_at(&mut buf, offset).expect_err("past the end");
            assert!(matches!(error, FormatError::PastEnd { found: 10, .. }), "{error}");
        }
    }

    #[test]
    fn a_file_cut_after_opening_is_an_error_not_an_endless_loop() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("cut");
        std::fs::write(&path, vec![7; 3 << 20]).expect("write");
        let file = DirectFile::open(&path).expect("open");
        OpenOptions::new().write(true).open(&path).and_then(|f| f.set_len(5000)).expect("cut");
        let mut buf = vec![0; 1 << 20];
        let error = file.read_exact_at(&mut buf, 0).expect_err("cut");
        assert!(matches!(error, FormatError::Io { action: "read", .. }), "{error}");
    }

    /// A checkpoint's shards are open all together.
    #[test]
    fn a_file_takes_one_descriptor() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("shard");
        std::fs::write(&path, [7; 10]).expect("write");
        let files: Vec<DirectFile> = (0..20).map(|_| DirectFile::open(&path).expect("open")).collect();
        let link = |entry: io::Result<std::fs::DirEntry>| std::fs::read_link(entry.expect("entry").path()).ok();
        let open = std::fs::read_dir("/proc/self/fd").expect("descriptors").filter_map(link);
        assert_eq!(open.filter(|target| *target == path).count(), files.len());
    }

    #[test]
    fn writes_reach_the_file_in_both_modes() {
        let dir = tempfile::tempdir().expect("tempdir");
        for refuse in [false, true] {
            let path = dir.path().join(format!("out{refuse}"));
            let mut file = DirectFile::create(&path, 6 << 20).expect("create");
            if refuse {
                file.refuse_direct().expect("through the cache");
            }
            let mut buf = AlignedBuf::new(2 << 20).expect("buffer");
            buf.copy_from_slice(&pattern(2 << 20));
            file.write_all_at(&buf, 2 << 20).expect("write");
            file.sync().expect("sync");
            let found = std::fs::read(&path).expect("read");
            assert_eq!(found.len(), 6 << 20);
            assert!(found[2 << 20..4 << 20] == buf[..]);
            assert!(found[..2 << 20].iter().chain(&found[4 << 20..]).all(|&b| b == 0));
            file.truncate((4 << 20) - 5).expect("truncate");
            assert_eq!((file.len(), std::fs::metadata(&path).expect("metadata").len()), (4_194_299, 4_194_299));
        }
    }
}
