//! How fast all cores hash blocks of 4 MiB, as a load does it: `hash_rate SECONDS` prints bytes a second.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use dsv4_format::BLOCK_BYTES;

fn main() {
    let seconds: f64 = std::env::args().nth(1).and_then(|s| s.parse().ok()).unwrap_or(2.0);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let (hashed, started) = (AtomicU64::new(0), Instant::now());
    let until = started + Duration::from_secs_f64(seconds);
    std::thread::scope(|scope| {
        for core in 0..cores {
            let hashed = &hashed;
            scope.spawn(move || {
                // Larger together than a cache, as blocks that come from a disk are.
                let block = |i: usize| vec![(core * 16 + i) as u8; BLOCK_BYTES as usize];
                let blocks: Vec<Vec<u8>> = (0..16).map(block).collect();
                for block in blocks.iter().cycle().take_while(|_| Instant::now() < until) {
                    std::hint::black_box(blake3::hash(block));
                    hashed.fetch_add(BLOCK_BYTES, Ordering::Relaxed);
                }
            });
        }
    });
    println!("{:.0}", hashed.into_inner() as f64 / started.elapsed().as_secs_f64());
}
