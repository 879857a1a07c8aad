//! Reads through io_uring: many at once from one thread, each into a buffer it owns until it is done.
//!
//! Invariant: a buffer that the kernel may write is neither moved, touched nor freed. It lies in
//! [`Ring::requests`], whose places never move, until its completion was seen; a ring that is dropped,
//! also by a panic, first waits for all of them. [`with_ring`] owns the ring, so nobody can forget it.
//! Absent: registered buffers (they cost pinning all of the memory, and save little of a request of
//! 4 MiB), writes, polling.

#![allow(unsafe_code)] // Giving memory to the kernel beyond a call is what no safe interface can express.

use std::fs::File;
use std::io;
use std::ops::DerefMut;
use std::os::fd::AsRawFd;
use std::time::Duration;

use io_uring::{EnterFlags, IoUring, opcode, types};

/// One read request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Read {
    /// Where in the buffer its first byte goes.
    pub(crate) start: usize,
    /// Where in the buffer it ends.
    pub(crate) end: usize,
    /// Where in the file it begins.
    pub(crate) offset: u64,
    /// RWF flags.
    pub(crate) flags: u32,
}

/// What came of a request: its tag, its buffer, bytes read.
pub(crate) type Done<T, B> = (T, B, io::Result<usize>);

/// Reads under way: the kernel's, or a test's faulty ones.
pub(crate) trait Requests<T, B> {
    /// How many are under way.
    fn under_way(&self) -> usize;
    /// Whether another may start.
    fn has_room(&self) -> bool;
    /// Starts a read, of which there is room for.
    fn start(&mut self, tag: T, buf: B, read: Read);
    /// Waits for one that is done; `None` if there are none. Errors: the ring itself is broken.
    fn wait(&mut self) -> io::Result<Option<Done<T, B>>>;
}

/// The kernel's ring for reads of one file.
pub(crate) struct Ring<'f, T, B> {
    uring: IoUring,
    file: &'f File,
    requests: Box<[Option<(T, B)>]>,
    free: Vec<usize>,
}

/// An io_uring that works: made, entered, and left with a request done.
///
/// Errors: what the kernel says: ENOSYS, EPERM (forbidden here), ENOMEM.
pub(crate) fn probe(depth: usize) -> io::Result<IoUring> {
    let mut uring = IoUring::new(u32::try_from(depth).unwrap_or(u32::MAX))?;
    // SAFETY: a request without memory.
    unsafe { uring.submission().push(&opcode::Nop::new().build()) }.map_err(io::Error::other)?;
    uring.submit_and_wait(1)?;
    let result = uring.completion().next().map(|done| done.result());
    match result {
        Some(0) => Ok(uring),
        Some(code) => Err(io::Error::from_raw_os_error(-code)),
        None => Err(io::ErrorKind::WouldBlock.into()),
    }
}

/// Lets `f` read `file` with up to `depth` requests at once; returns after the last of them.
pub(crate) fn with_ring<T, B: DerefMut<Target = [u8]>, R>(
    uring: IoUring,
    file: &File,
    depth: usize,
    f: impl FnOnce(&mut Ring<'_, T, B>) -> R,
) -> R {
    let requests = (0..depth).map(|_| None).collect();
    f(&mut Ring { uring, file, requests, free: (0..depth).rev().collect() })
}

impl<T, B: DerefMut<Target = [u8]>> Requests<T, B> for Ring<'_, T, B> {
    fn under_way(&self) -> usize {
        self.requests.len() - self.free.len()
    }

    fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    fn start(&mut self, tag: T, buf: B, read: Read) {
        let place = self.free.pop().unwrap_or_else(|| unreachable!("{} reads under way", self.requests.len()));
        let (_, buf) = self.requests[place].insert((tag, buf));
        let part = &mut buf[read.start..read.end];
        let len = u32::try_from(part.len()).unwrap_or(u32::MAX);
        let entry = opcode::Read::new(types::Fd(self.file.as_raw_fd()), part.as_mut_ptr(), len)
            .offset(read.offset)
            .rw_flags(read.flags as i32)
            .build()
            .user_data(place as u64);
        // SAFETY: the memory is a part of the buffer in `requests[place]`, at least `len` bytes, which stays
        // there untouched until `wait` or `drop` saw this request's completion (the invariant above); the
        // file is borrowed as long as the ring lives.
        let pushed = unsafe { self.uring.submission().push(&entry) };
        // The queue has as many entries as there are places.
        assert!(pushed.is_ok(), "the submission queue is full");
    }

    fn wait(&mut self) -> io::Result<Option<Done<T, B>>> {
        while self.under_way() > 0 {
            if let Some(done) = self.completed() {
                return Ok(Some(done));
            }
            match self.uring.submit_and_wait(1) {
                Ok(_) => {}
                Err(e) => retry(e)?,
            }
        }
        Ok(None)
    }
}

impl<T, B> Ring<'_, T, B> {
    fn completed(&mut self) -> Option<Done<T, B>> {
        let done = self.uring.completion().next()?;
        let place = done.user_data() as usize;
        let (tag, buf) = self.requests.get_mut(place)?.take()?;
        self.free.push(place);
        let result = match done.result() {
            n @ 0.. => Ok(n as usize),
            code => Err(io::Error::from_raw_os_error(-code)),
        };
        Some((tag, buf, result))
    }
}

impl<T, B> Drop for Ring<'_, T, B> {
    fn drop(&mut self) {
        // What was never submitted the kernel does not know of.
        let unsubmitted = self.uring.submission().len();
        let mut left = (self.requests.len() - self.free.len()).saturating_sub(unsubmitted);
        while left > 0 {
            if self.completed().is_some() {
                left -= 1;
                continue;
            }
            // SAFETY: submits nothing, only waits for a completion; no argument is a pointer.
            let waited = unsafe { self.uring.submitter().enter::<()>(0, 1, EnterFlags::GETEVENTS.bits(), None) };
            if waited.map(|_| ()).or_else(retry).is_err() {
                // The kernel still writes into memory that is about to be freed: nothing sound is left to do.
                std::process::abort();
            }
        }
    }
}

/// EINTR is free; a busy kernel (EAGAIN, EBUSY) is asked again a little later.
fn retry(error: io::Error) -> io::Result<()> {
    match error.raw_os_error() {
        Some(libc::EINTR) => Ok(()),
        Some(libc::EAGAIN | libc::EBUSY) => {
            std::thread::sleep(Duration::from_millis(1));
            Ok(())
        }
        _ => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::AlignedBuf;

    fn file(bytes: usize) -> File {
        use std::io::Write;
        let mut file = tempfile::tempfile().expect("a file");
        let content: Vec<u8> = (0..bytes as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
        file.write_all(&content).expect("write");
        file
    }

    #[test]
    fn reads_come_back_with_their_tag_and_bytes() {
        let Ok(uring) = probe(4) else { return println!("SKIP io_uring: not allowed here") };
        let file = file(1 << 20);
        let (mut seen, mut next) = (vec![false; 16], 0u64);
        with_ring(uring, &file, 4, |ring| {
            while next < 16 || ring.under_way() > 0 {
                while next < 16 && ring.has_room() {
                    let buf = AlignedBuf::new(1 << 16).expect("buffer");
                    ring.start(next, buf, Read { start: 4096, end: 1 << 16, offset: next << 16, flags: 0 });
                    next += 1;
                }
                let (tag, buf, result) = ring.wait().expect("the ring").expect("one is under way");
                assert_eq!(result.expect("read"), (1 << 16) - 4096);
                assert!(buf[..4096].iter().all(|b| *b == 0));
                let at = (tag << 16) as u32;
                let expected = |i: u32| ((at + i).wrapping_mul(2_654_435_761) >> 11) as u8;
                assert!((0..(1 << 16) - 4096).all(|i| buf[4096 + i as usize] == expected(i)), "{tag}");
                assert!(!std::mem::replace(&mut seen[tag as usize], true));
            }
        });
        assert!(seen.iter().all(|s| *s));
    }

    /// Notes when it is freed.
    struct Watched<'c>(AlignedBuf, &'c std::cell::Cell<usize>);

    impl std::ops::Deref for Watched<'_> {
        type Target = [u8];
        fn deref(&self) -> &[u8] {
            &self.0
        }
    }

    impl DerefMut for Watched<'_> {
        fn deref_mut(&mut self) -> &mut [u8] {
            &mut self.0
        }
    }

    impl Drop for Watched<'_> {
        fn drop(&mut self) {
            self.1.set(self.1.get() + 1);
            // Seen by the kernel's writes that would come too late.
            self.0.fill(0);
        }
    }

    #[test]
    fn a_panic_waits_for_what_is_under_way() {
        let file = file(8 << 20);
        for unsubmitted in [false, true] {
            let Ok(uring) = probe(4) else { return println!("SKIP io_uring: not allowed here") };
            let freed = std::cell::Cell::new(0);
            let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                with_ring(uring, &file, 4, |ring| {
                    for i in 0..4u64 {
                        let buf = Watched(AlignedBuf::new(1 << 20).expect("buffer"), &freed);
                        ring.start(i, buf, Read { start: 0, end: 1 << 20, offset: i << 20, flags: 0 });
                    }
                    if !unsubmitted {
                        drop(ring.wait());
                    }
                    panic!("expected by this test");
                })
            }));
            assert!(caught.is_err());
            assert_eq!(freed.get(), 4);
        }
    }

    #[test]
    fn errors_and_ends_are_results_of_their_request() {
        let Ok(uring) = probe(2) else { return println!("SKIP io_uring: not allowed here") };
        let file = file(5000);
        with_ring(uring, &file, 2, |ring| {
            let buf = || AlignedBuf::new(8192).expect("buffer");
            let whole = |offset| Read { start: 0, end: 8192, offset, flags: 0 };
            ring.start("short", buf(), whole(0));
            ring.start("past", buf(), whole(8192));
            assert!(!ring.has_room());
            for _ in 0..2 {
                let (tag, _, result) = ring.wait().expect("the ring").expect("one");
                assert_eq!(result.expect("read"), if tag == "short" { 5000 } else { 0 });
            }
            ring.start("flags", buf(), Read { flags: 1 << 30, ..whole(0) });
            let (_, _, result) = ring.wait().expect("the ring").expect("one");
            assert!(result.is_err());
            assert!(ring.wait().expect("the ring").is_none());
        });
    }
}
