//! How much of a file is in the page cache: cachestat (Linux 6.5), else mincore.

#![allow(unsafe_code)] // Two system calls that no safe library offers.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use memmap2::MmapOptions;

/// Mapped at once for mincore, bytes.
const WINDOW: u64 = 1 << 30;
/// The same on every architecture.
const SYS_CACHESTAT: libc::c_long = 451;

/// `struct cachestat_range`; length 0 means to the end of the file.
#[repr(C)]
struct Range {
    offset: u64,
    len: u64,
}

/// `struct cachestat`, pages.
#[repr(C)]
#[derive(Default)]
struct Stat {
    cache: u64,
    dirty: u64,
    writeback: u64,
    evicted: u64,
    recently_evicted: u64,
}

/// Bytes, in whole pages. Errors: a kernel that does not tell, or not about a file of somebody else's.
pub(crate) fn cached_bytes(file: &File, len: u64) -> io::Result<u64> {
    match cachestat(file) {
        Err(e) if e.raw_os_error() == Some(libc::ENOSYS) => mincore(file, len),
        known => known,
    }
}

fn page_bytes() -> u64 {
    // SAFETY: takes a number, touches no memory of ours.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(bytes).unwrap_or(4096)
}

fn cachestat(file: &File) -> io::Result<u64> {
    let (range, mut stat) = (Range { offset: 0, len: 0 }, Stat::default());
    // SAFETY: the kernel reads `range` and writes `stat`, both laid out as its interface says and alive
    // during the call; the descriptor is open as long as `file` is borrowed.
    let failed = unsafe { libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), &raw const range, &raw mut stat, 0) } != 0;
    if failed { Err(io::Error::last_os_error()) } else { Ok(stat.cache * page_bytes()) }
}

fn mincore(file: &File, len: u64) -> io::Result<u64> {
    let page = page_bytes();
    let mut resident = 0;
    for start in (0..len).step_by(WINDOW as usize) {
        let window = WINDOW.min(len - start) as usize;
        // SAFETY: the mapping is never read, so a file that changes or shrinks meanwhile changes nothing.
        let map = unsafe { MmapOptions::new().offset(start).len(window).map(file)? };
        let mut pages = vec![0u8; window.div_ceil(page as usize)];
        // SAFETY: the range is exactly the mapping, and `pages` has a byte for each of its pages.
        let failed = unsafe { libc::mincore(map.as_ptr().cast_mut().cast(), window, pages.as_mut_ptr().cast()) } != 0;
        if failed {
            return Err(io::Error::last_os_error());
        }
        resident += pages.iter().filter(|p| **p & 1 == 1).count() as u64;
    }
    Ok(resident * page)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::DirectFile;

    #[test]
    fn both_ways_count_what_was_read_and_dropped() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("file");
        let bytes = vec![3; (6 << 20) + 5];
        std::fs::write(&path, &bytes).expect("write");
        let file = DirectFile::open(&path).expect("open");
        file.sync().expect("sync");
        if rustix::fs::fstatfs(file.file()).expect("a file system").f_type == 0x0102_1994 {
            return println!("SKIP residency: a file in memory stays there");
        }
        let whole = (bytes.len() as u64).next_multiple_of(page_bytes());
        let ways = [|f: &File, _| cachestat(f), mincore];
        for (way, name) in ways.into_iter().zip(["cachestat", "mincore"]) {
            assert!(std::fs::read(&path).expect("read") == bytes);
            match way(file.file(), file.len()) {
                Err(e) => println!("SKIP {name}: {e}"),
                Ok(found) => {
                    assert_eq!(found, whole, "{name}");
                    file.evict();
                    assert_eq!(way(file.file(), file.len()).expect("known"), 0, "{name}");
                }
            }
        }
    }
}
