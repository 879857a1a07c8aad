//! How much of a file is in the page cache: cachestat (Linux 6.5), else mincore.

#![allow(unsafe_code)] // Two system calls that no safe library offers.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use memmap2::MmapOptions;
use rustix::fs::{Access, access};

/// Mapped at once for mincore, bytes.
const WINDOW: u64 = 1 << 30;
/// The same on every architecture.
const SYS_CACHESTAT: libc::c_long = 451;

/// `struct cachestat_range`; length 0 means to the end of the file.
#[repr(C)]
struct Part {
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

/// Bytes of a part of a file that are cached, in whole pages; the part is not empty and starts at a page.
/// Errors: a kernel that does not tell, or not about a file of somebody else's.
pub(crate) fn cached_bytes(file: &File, part: Range<u64>) -> io::Result<u64> {
    either(cachestat(file, &part), file, &part)
}

/// Also a sandbox may refuse cachestat, with whatever error it likes.
fn either(told: io::Result<u64>, file: &File, part: &Range<u64>) -> io::Result<u64> {
    told.or_else(|_| mincore(file, part))
}

fn page_bytes() -> u64 {
    // SAFETY: takes a number, touches no memory of ours.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    u64::try_from(bytes).unwrap_or(4096)
}

fn cachestat(file: &File, part: &Range<u64>) -> io::Result<u64> {
    let (range, mut stat) = (Part { offset: part.start, len: part.end - part.start }, Stat::default());
    // SAFETY: the kernel reads `range` and writes `stat`, both laid out as its interface says and alive
    // during the call; the descriptor is open as long as `file` is borrowed.
    let failed = unsafe { libc::syscall(SYS_CACHESTAT, file.as_raw_fd(), &raw const range, &raw mut stat, 0) } != 0;
    if failed { Err(io::Error::last_os_error()) } else { Ok(stat.cache * page_bytes()) }
}

fn mincore(file: &File, part: &Range<u64>) -> io::Result<u64> {
    // Of a file that this process neither owns nor may write, the kernel says that all of it is there.
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    if file.metadata()?.uid() != rustix::process::geteuid().as_raw() {
        access(path, Access::WRITE_OK)?;
    }
    let page = page_bytes();
    let mut resident = 0;
    for start in part.clone().step_by(WINDOW as usize) {
        let window = WINDOW.min(part.end - start) as usize;
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
        let (page, len) = (page_bytes(), file.len());
        let refused = |f: &File, part: &Range<u64>| either(Err(io::ErrorKind::PermissionDenied.into()), f, part);
        let ways = [cachestat, mincore, refused];
        for (way, name) in ways.into_iter().zip(["cachestat", "mincore", "cachestat forbidden"]) {
            assert!(std::fs::read(&path).expect("read") == bytes);
            match way(file.file(), &(0..len)) {
                Err(e) if name == "cachestat" => println!("SKIP {name}: {e}"),
                found => {
                    assert_eq!(found.expect("known"), len.next_multiple_of(page), "{name}");
                    assert_eq!(way(file.file(), &(page..5 * page)).expect("known"), 4 * page, "{name}");
                    file.evict();
                    assert_eq!(way(file.file(), &(0..len)).expect("known"), 0, "{name}");
                }
            }
        }
    }
}
