//! How fast the disk gives a rank file, measured on the file itself in half a second.
//!
//! Blocks of 4 MiB are read past the page cache, in an order that jumps through the file, by two,
//! eight and sixteen readers in turn; the best counts. No block is read twice: a small file is
//! simply read once. What is read is not verified, loading does that.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use dsv4_format::io::{AlignedBuf, DirectFile};
use dsv4_format::{BLOCK_BYTES, FormatError, NoProgress};

use crate::stall;

/// Readers that are tried, in turn.
const READERS: [usize; 3] = [2, 8, 16];
/// A file that is smaller says little about a disk: one pass ends before the disk is busy.
pub const TELLING_BYTES: u64 = 256 << 20;

/// What was measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DiskProbe {
    /// Length of the file.
    pub file_bytes: u64,
    /// Bytes read in the best round.
    pub read_bytes: u64,
    /// Its time, seconds.
    pub seconds: f64,
    /// Its readers.
    pub readers: usize,
    /// Whether the page cache was passed by.
    pub direct: bool,
}

impl DiskProbe {
    /// Bytes a second.
    pub fn rate(&self) -> f64 {
        if self.seconds > 0.0 { self.read_bytes as f64 / self.seconds } else { 0.0 }
    }

    /// Seconds to read `bytes`; none if nothing was read.
    pub fn expected_seconds(&self, bytes: u64) -> Option<f64> {
        (self.rate() > 0.0).then(|| bytes as f64 / self.rate())
    }

    /// Whether enough was read to speak of the disk.
    pub fn is_telling(&self) -> bool {
        self.file_bytes >= TELLING_BYTES
    }
}

/// Reads `file` for at most about `within`; ends the process when the disk stops answering. Errors: the file
/// cannot be opened or read, no memory for buffers.
pub fn probe(file: &Path, within: Duration) -> Result<DiskProbe, FormatError> {
    stall::guard(file, &NoProgress, |_| measure(file, within))
}

fn measure(file: &Path, within: Duration) -> Result<DiskProbe, FormatError> {
    let file = DirectFile::open(file)?;
    // Some file systems take O_DIRECT and give what is in the page cache all the same.
    file.evict();
    // The ragged end is left out, except where it is all there is.
    let block_bytes = BLOCK_BYTES.min(file.len().max(1));
    let blocks = file.len() / block_bytes;
    // A stride that meets every block: no common factor with their number.
    let stride = [7919, 6007, 4099, 1].into_iter().find(|s| gcd(*s, blocks) == 1).unwrap_or(1);
    let next = AtomicU64::new(0);
    let mut best: Option<DiskProbe> = None;
    for readers in READERS {
        let started = Instant::now();
        let until = started + within / READERS.len() as u32;
        let read_bytes = AtomicU64::new(0);
        let read = || -> Result<(), FormatError> {
            let mut buf = AlignedBuf::new(block_bytes as usize)?;
            while Instant::now() < until {
                let block = next.fetch_add(1, Ordering::Relaxed);
                if block >= blocks {
                    break;
                }
                let place = (u128::from(block) * u128::from(stride) % u128::from(blocks)) as u64;
                file.read_exact_at(&mut buf, place * block_bytes)?;
                read_bytes.fetch_add(block_bytes, Ordering::Relaxed);
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..readers).map(|_| scope.spawn(read)).collect();
            threads.into_iter().try_for_each(|t| t.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        })?;
        let round = DiskProbe {
            file_bytes: file.len(),
            read_bytes: read_bytes.into_inner(),
            seconds: started.elapsed().as_secs_f64(),
            readers,
            direct: file.is_direct(),
        };
        if best.is_none_or(|b| round.rate() > b.rate()) {
            best = Some(round);
        }
    }
    Ok(best.unwrap_or(DiskProbe { file_bytes: file.len(), read_bytes: 0, seconds: 0.0, readers: 0, direct: false }))
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_once_and_in_time() {
        let path = std::env::temp_dir().join(format!("dsv4-disk-{}", std::process::id()));
        for len in [1usize, 4096, (9 << 20) + 5, 48 << 20] {
            std::fs::write(&path, vec![7; len]).unwrap();
            let started = Instant::now();
            let found = probe(&path, Duration::from_millis(300)).unwrap();
            assert!(started.elapsed() < Duration::from_secs(5));
            assert_eq!(found.file_bytes, len as u64);
            assert!(found.read_bytes > 0 && found.read_bytes <= len as u64, "{found:?}");
            assert!(found.rate() > 0.0 && found.expected_seconds(1 << 30).unwrap() > 0.0);
            assert!(!found.is_telling());
        }
        std::fs::write(&path, []).unwrap();
        assert_eq!(probe(&path, Duration::from_millis(30)).unwrap().expected_seconds(1), None);
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(probe(&path, Duration::from_millis(30)), Err(FormatError::Io { .. })));
    }

    #[test]
    fn what_somebody_left_in_the_page_cache_is_not_measured() {
        let path = std::env::temp_dir().join(format!("dsv4-disk-cached-{}", std::process::id()));
        std::fs::write(&path, vec![7; 8 << 20]).unwrap();
        let file = DirectFile::open(&path).unwrap();
        file.sync().unwrap();
        file.evict();
        let can_be_dropped = file.cached_bytes() == Some(0);
        std::fs::read(&path).unwrap();
        // Nothing is read, and what was there is gone.
        probe(&path, Duration::ZERO).unwrap();
        let cached = file.cached_bytes();
        std::fs::remove_file(&path).unwrap();
        if can_be_dropped {
            assert_eq!(cached, Some(0));
        } else {
            println!("SKIP a measured page cache: this file lives in it");
        }
    }

    #[test]
    fn strides_meet_every_block() {
        for blocks in [1, 2, 7919, 7919 * 6007, 19_195] {
            let stride = [7919, 6007, 4099, 1].into_iter().find(|s| gcd(*s, blocks) == 1).unwrap();
            assert_eq!(gcd(stride, blocks), 1);
        }
        assert_eq!((0..10).map(|b| b * 7919 % 10).collect::<std::collections::BTreeSet<u64>>().len(), 10);
    }
}
