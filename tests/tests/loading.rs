//! Loading: every way of reading gives the same weights, leaves nothing cached, and fails with a reason.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use dsv4_format::io::DirectFile;
use dsv4_format::{Artifact, CACHED_BYTES_MAX, FormatError, Io, LoadOptions, NoProgress, SECTION_ALIGN};
use dsv4_tests::artifacts::Packed;
use dsv4_tests::binaries::{DSV4_RUN, Ran, path, run};
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
        let file = rank_file(&nano, rank);
        for (io, staged) in [Io::Auto, Io::Uring, Io::Threads].into_iter().flat_map(|io| [(io, false), (io, true)]) {
            // Somebody has just read the whole file through the page cache.
            let bytes = fs::read(&file).unwrap();
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
            assert_ne!(report.is_cache_bounded(), Some(false), "{report:?}");
            match DirectFile::open(&file).unwrap().cached_bytes() {
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
    // Before memory, and where nobody looks at memory.
    load(&nano, &["--rank", "99", "--reserve", "4096G"]).fails(INPUT, &["rank 99", "less than 2"]);
    load(&nano, &["--rank", "99", "--reserve", "0"]).fails(INPUT, &["rank 99", "less than 2"]);
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

/// A memory cgroup of either version, gone when dropped.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(limit: u64) -> Option<Cgroup> {
        [("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max")].iter().find_map(
            |(mount, file)| {
                let dir = PathBuf::from(mount).join(format!("dsv4-test-{}", std::process::id()));
                // Without a memory controller the directory would be an ordinary one, or lack the file.
                fs::metadata(PathBuf::from(mount).join("cgroup.procs")).and_then(|_| fs::create_dir(&dir)).ok()?;
                let made = Cgroup(dir);
                fs::write(made.0.join(file), limit.to_string()).ok().map(|()| made)
            },
        )
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

/// What a cgroup leaves may be much less than what the machine has; who takes more is killed.
#[test]
fn a_memory_cgroup_stops_a_load_before_the_kernel_does() {
    let nano = Packed::nano(1);
    let Some(group) = Cgroup::new(40 << 20) else {
        return skip("a floor in a memory cgroup: no right to make one");
    };
    let enter = format!("echo $$ > {}/cgroup.procs && exec \"$0\" \"$@\"", group.0.display());
    for io in ["auto", "threads"] {
        // Slots and the copied rank together are more than the limit.
        let load = [text(&nano), "load", "--staged", "--floor", "16M", "--reserve", "0", "--io", io];
        let out = Command::new("sh").args(["-c", &enter]).arg(path(DSV4_RUN)).args(load).output().unwrap();
        let err = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(DEVICE), "{:?}: {err}", out.status);
        assert!(err.contains("cgroup") && err.contains("16777216") && err.contains("--floor"), "{err}");
    }
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
