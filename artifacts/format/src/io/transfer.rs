//! A read or write that may take several requests, whoever makes them: a thread or an io_uring.

use std::io;
use std::time::Duration;

use super::{DIRECT_ALIGN, DirectFile, ReadMode};

const STALLS_MAX: u32 = 1000;

/// How much of a transfer is done, and what its next request must ask for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Transfer {
    offset: u64,
    need: usize,
    have: usize,
    stalls: u32,
    mode: ReadMode,
}

impl Transfer {
    /// At least `need` bytes from `offset`.
    pub(crate) fn new(file: &DirectFile, offset: u64, need: usize) -> Transfer {
        Transfer { offset, need, have: 0, stalls: 0, mode: file.mode() }
    }

    /// Bytes that are done.
    pub(crate) fn have(&self) -> usize {
        self.have
    }

    pub(crate) fn is_missing(&self) -> bool {
        self.have < self.need
    }

    /// Where in the file the next request begins.
    pub(crate) fn position(&self) -> u64 {
        self.offset + self.have as u64
    }

    /// RWF flags of the next request.
    pub(crate) fn flags(&self) -> u32 {
        self.mode.flags()
    }

    /// Takes the outcome of a request for all that was missing. A short one is continued from the last
    /// aligned position, because O_DIRECT would refuse any other; a refused mode is given up for the
    /// whole file; EINTR is free; EAGAIN (a busy queue) waits a little and counts as a stall.
    ///
    /// Errors: the file's; `end` where nothing more comes.
    pub(crate) fn advance(
        &mut self,
        file: &DirectFile,
        result: io::Result<usize>,
        end: io::ErrorKind,
    ) -> io::Result<()> {
        match result {
            Ok(n) if self.have + n >= self.need => self.have = self.need,
            Ok(0) => return Err(end.into()),
            Ok(n) => {
                let done = self.have + n;
                let next = done - done % DIRECT_ALIGN as usize;
                if next == self.have {
                    self.stall(end.into())?;
                }
                self.have = next;
            }
            Err(e) if self.mode.is_refused_by(&e) => file.refuse(self.mode)?,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                std::thread::sleep(Duration::from_millis(1));
                self.stall(e)?;
            }
            Err(e) => return Err(e),
        }
        self.mode = file.mode();
        Ok(())
    }

    /// Bounds how often a transfer may make no progress.
    fn stall(&mut self, error: io::Error) -> io::Result<()> {
        self.stalls += 1;
        if self.stalls > STALLS_MAX { Err(error) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> (tempfile::TempDir, DirectFile) {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("file");
        std::fs::write(&path, [7; 8192]).expect("write");
        let file = DirectFile::open(&path).expect("open");
        (dir, file)
    }

    fn os(code: i32) -> io::Result<usize> {
        Err(io::Error::from_raw_os_error(code))
    }

    #[test]
    fn short_and_interrupted_requests_are_continued_where_o_direct_allows() {
        let (_dir, file) = file();
        let mut transfer = Transfer::new(&file, 4096, 20_000);
        let end = io::ErrorKind::UnexpectedEof;
        for (result, have) in [(Ok(5000), 4096), (os(libc::EINTR), 4096), (os(libc::EAGAIN), 4096), (Ok(100), 4096)] {
            transfer.advance(&file, result, end).expect("goes on");
            assert_eq!((transfer.have(), transfer.position()), (have, 4096 + have as u64));
        }
        assert!(transfer.is_missing());
        transfer.advance(&file, Ok(20_000 - 4096), end).expect("done");
        assert!(!transfer.is_missing());
        let mut cut = Transfer::new(&file, 0, 8192);
        assert_eq!(cut.advance(&file, Ok(0), end).expect_err("the end").kind(), end);
        let mut broken = Transfer::new(&file, 0, 8192);
        let error = broken.advance(&file, os(libc::EIO), end).expect_err("EIO");
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
    }

    #[test]
    fn a_transfer_that_never_moves_ends() {
        let (_dir, file) = file();
        let mut transfer = Transfer::new(&file, 0, 8192);
        let steps = (0..).take_while(|_| transfer.advance(&file, Ok(1), io::ErrorKind::WriteZero).is_ok()).count();
        assert_eq!(steps, STALLS_MAX as usize);
    }

    #[test]
    fn refused_modes_are_given_up_one_after_another() {
        let (_dir, file) = file();
        if !file.is_direct() {
            println!("SKIP refused modes: no O_DIRECT in the temporary directory");
            return;
        }
        let end = io::ErrorKind::UnexpectedEof;
        let (mut one, mut other) = (Transfer::new(&file, 0, 8192), Transfer::new(&file, 0, 8192));
        one.advance(&file, os(libc::EINVAL), end).expect("through the cache");
        assert_eq!((file.mode(), one.flags()), (ReadMode::DontCache, 0x80));
        // Asked for with O_DIRECT still: says nothing about what came after.
        other.advance(&file, os(libc::EINVAL), end).expect("known");
        assert_eq!(file.mode(), ReadMode::DontCache);
        one.advance(&file, os(libc::EOPNOTSUPP), end).expect("without the flag");
        assert_eq!((file.mode(), one.flags()), (ReadMode::Windows, 0));
        assert!(one.advance(&file, os(libc::EINVAL), end).is_err());
    }
}
