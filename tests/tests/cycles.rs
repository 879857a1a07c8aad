//! Started and stopped again and again, in order and by SIGKILL of either rank, at any moment from the
//! first: nothing is left of it.
//!
//! After every cycle: no process, no listening socket, no shared memory of System V. After all of them: no
//! file where a program would leave one, no named shared memory, and as much memory as before; of the memory
//! that running processes hold, whoever they are, nothing is counted.
//!
//! `DSV4_CYCLES=50` for another count.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use dsv4_tests::artifacts::Packed;
use dsv4_tests::binaries::{self, DSV4_RUN, children, is_running, kill};

const CYCLES: u64 = 9;
const SEED: u64 = 7;
const PEER: i32 = 5;
/// What "within seconds" means to this test; two busy cores included.
const SECONDS: Duration = Duration::from_secs(8);
/// From the start of a process to beyond its first tokens.
const MOMENTS_MS: u64 = 900;
/// Of these, in which ranks start, find each other and load; half of the moments are among them.
const START_MS: u64 = 60;
/// How much less memory may be there after all cycles. One rank that stays, or one arena of each cycle, is more.
const MEMORY_BYTES_MAX: i64 = 96 << 20;
/// For others to give back what they borrowed meanwhile.
const SETTLE_WITHIN: Duration = Duration::from_secs(60);

/// How a cycle ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    InOrder,
    LeaderKilled,
    ChildKilled,
}

const ENDS: [End; 3] = [End::InOrder, End::LeaderKilled, End::ChildKilled];

fn random(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z ^ (z >> 27)
}

/// Bytes that are available or held by some process; that are anonymous and held by no process; that are
/// shared. Not read at one moment: while others take memory, any of them may be off.
fn memory() -> [i64; 3] {
    let of = |text: &str, name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().trim_end_matches(" kB").parse::<i64>().ok().map(|kib| kib << 10)
    };
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let statuses = entries.filter_map(|entry| fs::read_to_string(entry.path().join("status")).ok());
    let held: i64 = statuses.filter_map(|status| of(&status, "RssAnon:")).sum();
    let text = fs::read_to_string("/proc/meminfo").unwrap();
    let [available, anonymous, shared] = ["MemAvailable:", "AnonPages:", "Shmem:"].map(|name| of(&text, name).unwrap());
    [available + held, anonymous - held, shared]
}

/// Everything that runs with `artifact` on its command line, whoever its parent is by now.
fn processes_of(artifact: &Path) -> Vec<u32> {
    let artifact = artifact.to_str().unwrap().as_bytes();
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let ids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let names_it = |id: &u32| {
        let line = fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
        line.windows(artifact.len()).any(|part| part == artifact)
    };
    ids.filter(names_it).filter(|id| is_running(*id)).collect()
}

/// Inodes of the sockets that are listened on in this network namespace.
fn listening() -> BTreeSet<u64> {
    let mut out = BTreeSet::new();
    for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
        for line in fs::read_to_string(table).unwrap_or_default().lines().skip(1) {
            let fields: Vec<&str> = line.split_whitespace().collect();
            if fields.get(3) == Some(&"0A") {
                out.extend(fields.get(9).and_then(|inode| inode.parse::<u64>().ok()));
            }
        }
    }
    out
}

/// Inodes of a process's sockets.
fn sockets(process: u32) -> Vec<u64> {
    let Ok(entries) = fs::read_dir(format!("/proc/{process}/fd")) else { return Vec::new() };
    let links = entries.flatten().filter_map(|entry| fs::read_link(entry.path()).ok());
    links.filter_map(|to| to.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()).collect()
}

/// Segments of System V shared memory that one of `processes` made or used last.
fn segments(processes: &BTreeSet<u32>) -> usize {
    let text = fs::read_to_string("/proc/sysvipc/shm").unwrap_or_default();
    let mine = |line: &&str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        fields.get(4..6).unwrap_or_default().iter().any(|id| id.parse().is_ok_and(|id| processes.contains(&id)))
    };
    text.lines().skip(1).filter(mine).count()
}

/// Names in the directories for temporary files that a program of this workspace, or a library for shared
/// memory, could have made. Others come and go there with every other program.
fn named_leftovers() -> BTreeSet<PathBuf> {
    let entries = ["/tmp", "/dev/shm"].map(|dir| fs::read_dir(dir).into_iter().flatten().flatten());
    let suspect = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        !name.starts_with("dsv4-fuzz.") && ["dsv4", "nccl", "sem."].iter().any(|word| name.contains(word))
    };
    entries.into_iter().flatten().map(|entry| entry.path()).filter(suspect).collect()
}

fn names(dir: &Path) -> Vec<String> {
    fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// Waits for what has to come true within seconds.
fn within_seconds(what: &str, mut holds: impl FnMut() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < SECONDS, "not within {SECONDS:?}: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// `generate` in an empty directory that it is told to use for temporary files, too.
fn start(artifact: &Path, dir: &Path, log: &Path, end: End) -> Child {
    let mut command = Command::new(binaries::path(DSV4_RUN));
    command.arg(artifact).args(["generate", "--prompt", "Count.", "--temperature", "100", "--quiet"]);
    // Drawn so hot, and with this seed, an answer goes on for long.
    command.args(["--draft", "1", "--seed", "3"]);
    command.args(if end == End::InOrder { &["--max-tokens", "12"][..] } else { &[] });
    let log = File::create(log).unwrap();
    command.current_dir(dir).env("TMPDIR", dir);
    command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap()
}

/// One cycle; returns the processes that there were.
fn cycle(number: u64, artifact: &Path, dir: &Path, log: &Path) -> BTreeSet<u32> {
    let end = ENDS[(number % 3) as usize];
    let drawn = random(SEED << 32 | number);
    let among = if drawn.is_multiple_of(2) { START_MS } else { MOMENTS_MS };
    let moment = Duration::from_millis(drawn / 2 % among);
    let shown = format!("seed {SEED}, cycle {number}: {end:?} after {moment:?}");
    let mut leader = start(artifact, dir, log, end);
    let id = leader.id();
    let mut child = None;
    if end != End::LeaderKilled {
        within_seconds(&format!("{shown}: a second rank"), || {
            child = children(id).first().copied();
            child.is_some() || end == End::InOrder && leader.try_wait().unwrap().is_some()
        });
    }
    std::thread::sleep(moment);
    let mut seen: BTreeSet<u32> = children(id).into_iter().chain(child).chain([id]).collect();
    let held: BTreeSet<u64> = seen.iter().flat_map(|id| sockets(*id)).collect();
    match (end, child) {
        (End::LeaderKilled, _) => kill(id),
        (End::ChildKilled, Some(child)) => kill(child),
        _ => {}
    }
    let mut status = None;
    within_seconds(&format!("{shown}: the end of rank 0"), || {
        status = leader.try_wait().unwrap();
        status.is_some()
    });
    let said = fs::read_to_string(log).unwrap();
    let code = status.and_then(|status| status.code());
    let expected = [Some(0), None, Some(PEER)][end as usize];
    assert_eq!(code, expected, "{shown}: {said}");
    // A rank that was started in the last moment is not among those seen, but names the artifact.
    seen.extend(processes_of(artifact));
    within_seconds(&format!("{shown}: no process"), || {
        processes_of(artifact).is_empty() && !seen.iter().any(|id| is_running(*id))
    });
    assert!(listening().is_disjoint(&held), "{shown}: a socket is still listened on");
    assert_eq!(segments(&seen), 0, "{shown}: shared memory is left");
    println!("{shown}: {} processes, {} sockets, code {code:?}", seen.len(), held.len());
    seen
}

#[test]
fn nothing_is_left_of_ranks_that_ended_or_were_killed() {
    let cycles = std::env::var("DSV4_CYCLES").map_or(CYCLES, |n| n.parse().expect("DSV4_CYCLES: a number"));
    let packed = Packed::nano(2);
    let (dir, log) = (packed.scratch().join("empty"), packed.scratch().join("log"));
    fs::create_dir(&dir).unwrap();
    // What is loaded and cached once is not lost.
    cycle(0, packed.path(), &dir, &log);
    let files = names(packed.path());
    let (leftovers, before, started) = (named_leftovers(), memory(), Instant::now());
    let mut processes = BTreeSet::new();
    for number in 0..cycles {
        processes.extend(cycle(number, packed.path(), &dir, &log));
    }
    println!("{cycles} cycles with {} processes in {:.1?}", processes.len(), started.elapsed());
    assert_eq!(names(&dir), Vec::<String>::new(), "files beside the program");
    assert_eq!(names(packed.path()), files, "files in the artifact");
    let more: Vec<_> = named_leftovers().difference(&leftovers).cloned().collect();
    assert!(more.is_empty(), "{more:?}");
    let settle = Instant::now();
    loop {
        let now = memory();
        // Less available, more in use.
        let lost = [before[0] - now[0], now[1] - before[1], now[2] - before[2]];
        let mib = lost.map(|bytes| bytes >> 20);
        if lost.iter().all(|&bytes| bytes < MEMORY_BYTES_MAX) {
            println!("lost, MiB: available {}, anonymous {}, shared {}", mib[0], mib[1], mib[2]);
            break;
        }
        assert!(settle.elapsed() < SETTLE_WITHIN, "lost, MiB: available, anonymous, shared: {mib:?}");
        std::thread::sleep(Duration::from_millis(500));
    }
}
