//! A pack that is killed at any moment, again and again: the same command ends with the same bytes, and what
//! has the final name is whole at every moment.
//!
//! `DSV4_KILLS` says how many kills there are, `DSV4_KILLS_SEED` when.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dsv4_format::{Artifact, NoProgress};
use dsv4_tests::DATA;
use dsv4_tests::binaries::{DSV4C, is_running, kill, run, start};
use serde_json::Value;

const KILLS: u64 = 12;
const RECEIPT: &str = "RECEIPT.json";

/// A number from the environment; one that is none is an error, not the default.
fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name} is {text:?}")))
}

/// SplitMix64.
struct Moments(u64);

impl Moments {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % n
    }
}

/// When a pack is killed.
#[derive(Clone, Copy, Debug)]
enum Moment {
    /// At any time of what a whole pack took, so also after its end.
    After(Duration),
    /// When its journal has grown by so many bytes and some time has passed: at work on any machine, slow or fast.
    Grown(u64, Duration),
}

/// Every file but the receipt.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let named = entries.map(|file| (file.file_name().unwrap().to_str().unwrap().to_owned(), file));
    named.filter(|(name, _)| name != RECEIPT).map(|(name, file)| (name, std::fs::read(file).unwrap())).collect()
}

/// One way to pack, and what it gives when nobody disturbs it.
struct Case {
    args: Vec<String>,
    /// What has the name before; then the pack replaces it.
    old: Option<PathBuf>,
    id: String,
    files: BTreeMap<String, Vec<u8>>,
    took: Duration,
}

impl Case {
    fn new(dir: &Path, flags: &[&str], old: Option<&Path>) -> Case {
        let mut args: Vec<String> = vec!["pack".into(), format!("{DATA}/nano")];
        args.extend(
            ["--tp", "2", "--arch", "none", "--journal-every", "1M", "--json"]
                .iter()
                .chain(flags)
                .map(|arg| arg.to_string()),
        );
        if old.is_some() {
            args.push("--force".into());
        }
        let mut case = Case {
            args,
            old: old.map(Path::to_owned),
            id: String::new(),
            files: BTreeMap::new(),
            took: Duration::ZERO,
        };
        let out = case.prepared(dir, "whole");
        let started = Instant::now();
        case.id = case.finished(&out).0;
        case.took = started.elapsed();
        case.files = files(&out);
        case
    }

    /// A path for an artifact, with the old one there.
    fn prepared(&self, dir: &Path, name: &str) -> PathBuf {
        let dir = dir.join(name);
        if dir.exists() {
            std::fs::remove_dir_all(&dir).unwrap();
        }
        std::fs::create_dir(&dir).unwrap();
        let out = dir.join("x.dsv4");
        if let Some(old) = &self.old {
            std::fs::create_dir(&out).unwrap();
            for entry in std::fs::read_dir(old).unwrap() {
                let file = entry.unwrap().path();
                std::fs::copy(&file, out.join(file.file_name().unwrap())).unwrap();
            }
        }
        out
    }

    fn args<'a>(&'a self, out: &'a Path) -> Vec<&'a str> {
        self.args.iter().map(String::as_str).chain(["-o", out.to_str().unwrap()]).collect()
    }

    /// Packs to the end; gives the id and how many bytes were there.
    fn finished(&self, out: &Path) -> (String, u64) {
        let ran = run(DSV4C, self.args(out));
        let report: Value = serde_json::from_str(ran.ok()).unwrap();
        let bytes = |key: &str| report[key].as_u64().unwrap();
        assert_eq!(bytes("resumed_bytes") + bytes("read_bytes"), bytes("source_bytes"), "{report}");
        assert!(bytes("resumed_bytes") == 0 || ran.err.starts_with("goes on with a pack"), "{}", ran.err);
        (report["artifact_id"].as_str().unwrap().to_owned(), bytes("resumed_bytes"))
    }

    /// Starts the pack and kills it at a moment; false if it was faster.
    fn killed_at(&self, out: &Path, moment: Moment) -> bool {
        let mut args = self.args(out);
        args.push("--quiet");
        let journal = out.with_file_name(".x.dsv4.partial/JOURNAL");
        let journal_bytes = || std::fs::metadata(&journal).map_or(0, |meta| meta.len());
        let before = journal_bytes();
        let running = start(DSV4C, args);
        let wait = match moment {
            Moment::After(wait) => wait,
            Moment::Grown(bytes, wait) => {
                while journal_bytes() < before + bytes && is_running(running.id()) {
                    std::thread::sleep(Duration::from_micros(50));
                }
                wait
            }
        };
        std::thread::sleep(wait);
        kill(running.id());
        let ran = running.finish();
        assert!(ran.err.is_empty(), "{ran:?}");
        assert!(matches!(ran.code, None | Some(0)), "{ran:?}");
        ran.code.is_none()
    }
}

#[test]
fn every_kill_leaves_something_to_go_on_with() {
    let (kills, seed) = (setting("DSV4_KILLS", KILLS), setting("DSV4_KILLS_SEED", 1));
    println!("DSV4_KILLS={kills} DSV4_KILLS_SEED={seed}");
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    let old = dir.join("old.dsv4");
    run(DSV4C, ["pack", &format!("{DATA}/tiny"), "--tp", "2", "--arch", "none", "-o", old.to_str().unwrap()]).ok();
    let cases = [
        Case::new(dir, &["--jobs", "1", "--memory", "128M"], None),
        Case::new(dir, &["--jobs", "3"], Some(&old)),
        Case::new(dir, &["--rank", "1"], None),
        Case::new(dir, &["--no-verify"], None),
    ];
    let mut moments = Moments(seed);
    let (mut done, mut at_work, mut resumed, mut rounds) = (0, 0, 0, 0);
    while done < kills {
        let case = &cases[rounds as usize % cases.len()];
        rounds += 1;
        let out = case.prepared(dir, "x");
        // Once, or several times before it may finish.
        let repeat = if moments.below(3) == 0 { 2 + moments.below(4) } else { 1 };
        for n in 0..repeat {
            let moment = match (rounds + n) % 2 {
                0 => Moment::After(Duration::from_micros(moments.below(case.took.as_micros() as u64 + 2000))),
                // The first record has about 120 bytes, a mark a few hundred.
                _ => Moment::Grown(150 + moments.below(3000), Duration::from_micros(moments.below(500))),
            };
            let was_at_work = case.killed_at(&out, moment);
            println!("round {rounds}, kill {n} at {moment:?}: {}", if was_at_work { "at work" } else { "it was done" });
            done += 1;
            at_work += u64::from(was_at_work);
            if out.exists() {
                let there = Artifact::open(&out).unwrap_or_else(|e| panic!("{moment:?}: {e}"));
                there.verify(&NoProgress).unwrap_or_else(|e| panic!("{moment:?}: {e}"));
            }
        }
        let (id, bytes) = case.finished(&out);
        resumed += u64::from(bytes > 0);
        assert_eq!(id, case.id, "round {rounds}");
        let found = files(&out);
        assert_eq!(found.keys().collect::<Vec<_>>(), case.files.keys().collect::<Vec<_>>(), "round {rounds}");
        for (name, bytes) in &found {
            assert!(*bytes == case.files[name], "round {rounds}: {name} differs");
        }
        assert_eq!(std::fs::read_dir(out.parent().unwrap()).unwrap().count(), 1, "round {rounds}: something stays");
    }
    println!("{done} kills, {at_work} of them at work; {resumed} of {rounds} packs went on with something");
    assert!(at_work > 0 && resumed > 0, "{at_work} of {done} at work, {resumed} of {rounds} resumed");
}
