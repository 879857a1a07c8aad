//! Loading: every way of reading gives the same weights, leaves nothing cached, and fails with a reason.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Duration;

use dsv4_format::io::DirectFile;
use dsv4_format::{Artifact, CACHED_BYTES_MAX, FormatError, Io, LoadOptions, NoProgress, SECTION_ALIGN};
use dsv4_tests::artifacts::Packed;
use dsv4_tests::binaries::{DSV4_RUN, Ran, run};
use dsv4_tests::skip;
use serde_json::Value;

const INPUT: i32 = 3;
const DEVICE: i32 = 4;

fn text(packed: &Packed) -> &str {
    packed.path().to_str().expect("a path in ASCII")
}

fn rank_file(packed: &Packed, rank: u32) -> PathBuf {
    packed.path().join(format!("rank{rank}.weights"))
}

fn load(packed: &Packed, args: &[&str]) -> Ran {
    run(DSV4_RUN, [text(packed), "load"].iter().chain(args))
}

#[test]
fn every_way_loads_the_same_and_leaves_nothing_cached() {
    let nano = Packed::nano(2);
    let artifact = Artifact::open(nano.path()).unwrap();
    for rank in 0..2 {
        let path = rank_file(&nano, rank);
        for (io, staged) in [Io::Auto, Io::Uring, Io::Threads].into_iter().flat_map(|io| [(io, false), (io, true)]) {
            // Somebody has just read the whole file through the page cache.
            let bytes = fs::read(&path).unwrap();
            let options = LoadOptions { io, staged, ..LoadOptions::default() };
            let (arena, report) = match artifact.load(rank, &options, &NoProgress) {
                Err(FormatError::Uring { source }) => {
                    skip(&format!("io_uring: {source}"));
                    continue;
                }
                loaded => loaded.unwrap(),
            };
            let start = SECTION_ALIGN as usize;
            assert!(arena[..] == bytes[start..start + arena.len()], "rank {rank}, {io:?}, staged {staged}");
            assert_eq!((report.bytes, report.staged, report.retries), (arena.len() as u64, staged, 0));
            assert!(report.is_cache_bounded(), "{report:?}");
            match DirectFile::open(&path).unwrap().cached_bytes() {
                Some(cached) => assert!(cached <= CACHED_BYTES_MAX, "{cached} bytes are cached"),
                None => skip("residency: this kernel does not tell"),
            }
        }
    }
}

#[test]
fn the_verb_reports_what_it_did() {
    let nano = Packed::nano(2);
    for (io, engine) in [("threads", "threads"), ("auto", "")] {
        for staged in [false, true] {
            let mut args = vec!["--rank", "1", "--json", "--io", io, "--queue-depth", "3", "--threads", "2"];
            args.extend(staged.then_some("--staged"));
            let out: Value = serde_json::from_str(load(&nano, &args).ok()).unwrap();
            let bytes = fs::metadata(rank_file(&nano, 1)).unwrap().len() - SECTION_ALIGN - 4096;
            assert_eq!((out["rank"].as_u64(), out["bytes"].as_u64()), (Some(1), Some(bytes)));
            assert_eq!((out["staged"].as_bool(), out["retries"].as_u64()), (Some(staged), Some(0)));
            assert_eq!((out["queue_depth"].as_u64(), out["threads"].as_u64()), (Some(3), Some(2)));
            assert!(out["engine"].as_str().unwrap().contains(engine));
            assert!(out["bytes_per_second"].as_f64().unwrap() > 0.0);
            // A file this small says nothing about a disk.
            assert_eq!(out["disk_percent"], Value::Null);
        }
    }
    let ran = load(&nano, &[]);
    assert!(ran.ok().starts_with("rank 0: "), "{ran:?}");
    assert!(ran.out.contains(" GB/s ("), "{ran:?}");
}

#[test]
fn damage_and_absence_are_told_by_every_way() {
    let nano = Packed::nano(2);
    let file = File::options().read(true).write(true).open(rank_file(&nano, 0)).unwrap();
    let at = SECTION_ALIGN + (5 << 20) + 77;
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
    file.sync_all().unwrap();
    for args in [["--io", "threads"], ["--io", "auto"], ["--staged", "--quiet"]] {
        load(&nano, &args).fails(INPUT, &["rank0.weights", "section ", "block ", "offset ", "read 3 times"]);
    }
    load(&nano, &["--rank", "2"]).fails(INPUT, &["rank 2", "less than 2"]);
    let cut = File::options().write(true).open(rank_file(&nano, 1)).unwrap();
    cut.set_len(at).unwrap();
    load(&nano, &["--rank", "1"]).fails(INPUT, &["rank1.weights", "length"]);
    fs::remove_file(rank_file(&nano, 1)).unwrap();
    load(&nano, &["--rank", "1"]).fails(INPUT, &["rank1.weights", "missing"]);
}

#[test]
fn memory_that_is_low_stops_a_load_and_a_start() {
    let nano = Packed::nano(1);
    let started = [
        load(&nano, &["--floor", "4096G", "--io", "threads"]),
        load(&nano, &["--floor", "4096G", "--staged"]),
        run(DSV4_RUN, [text(&nano), "generate", "--prompt", "2+3=", "--floor", "4096G"]),
    ];
    for ran in started {
        ran.fails(DEVICE, &["MemAvailable", "4398046511104", "--floor"]);
        // Five seconds of patience, and not many more.
        assert!(ran.took > Duration::from_secs(5) && ran.took < Duration::from_secs(12), "{ran:?}");
    }
    load(&nano, &["--reserve", "4096G"]).fails(DEVICE, &["not enough memory", "needed"]);
    load(&nano, &["--floor", "0", "--reserve", "0"]).ok();
}

#[test]
fn a_start_says_how_it_loaded_unless_quiet() {
    let nano = Packed::nano(1);
    let generate = |quiet: &[&str]| {
        let args = [text(&nano), "generate", "--prompt", "2+3=", "--max-tokens", "1", "--io", "threads"];
        run(DSV4_RUN, args.iter().chain(quiet))
    };
    let ran = generate(&[]);
    ran.ok();
    let lines: Vec<_> = ran.err.lines().filter(|line| line.contains(" loaded in ")).collect();
    assert_eq!(lines.len(), 1, "{ran:?}");
    assert!(lines[0].starts_with("rank 0: ") && lines[0].contains("GB/s (threads, "), "{ran:?}");
    let quiet = generate(&["--quiet"]);
    assert_eq!((quiet.ok(), quiet.err.as_str()), (ran.out.as_str(), ""));
}
