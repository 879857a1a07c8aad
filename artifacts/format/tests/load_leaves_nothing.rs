//! Alone in its process: what loads leave behind of threads and descriptors.

mod support;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use dsv4_format::{Artifact, FormatError, Io, LoadOptions, NoProgress};
use support::pack_small;

fn entries(dir: &str) -> usize {
    fs::read_dir(Path::new("/proc/self").join(dir)).expect("procfs").count()
}

/// Threads that have ended, and workers of the kernel's, are listed a moment longer.
fn becomes(expected: (usize, usize)) {
    let found = || (entries("task"), entries("fd"));
    let until = Instant::now() + Duration::from_secs(10);
    while found() != expected && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(found(), expected, "threads and descriptors");
}

#[test]
fn no_thread_and_no_descriptor_is_left() {
    let dir = tempfile::tempdir().expect("tempdir");
    let out = dir.path().join("a.dsv4");
    pack_small(&out);
    let artifact = Artifact::open(&out).expect("open");
    let load = |io, staged| {
        let options = LoadOptions { io, staged, ..LoadOptions::default() };
        match artifact.load(0, &options, &NoProgress) {
            Err(FormatError::Uring { source }) => println!("SKIP io_uring: {source}"),
            other => return other.is_ok(),
        }
        true
    };
    let all = || [Io::Auto, Io::Uring, Io::Threads].map(|io| [false, true].map(|staged| load(io, staged)));
    let before = (entries("task"), entries("fd"));
    assert_eq!(all(), [[true; 2]; 3]);
    becomes(before);
    let file = out.join("rank0.weights");
    let mut bytes = fs::read(&file).expect("read");
    let middle = 2 << 20;
    bytes[middle] ^= 1;
    fs::write(&file, bytes).expect("damage");
    assert!(!load(Io::Threads, false) && !load(Io::Auto, true));
    becomes(before);
}
