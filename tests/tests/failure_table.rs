//! What can go wrong, row by row, and where it is made to go wrong.
//!
//! | row | made by |
//! |---|---|
//! | truncated shard | `faults.rs`, `compiler/tests/compiler/checkpoint.rs` |
//! | truncated or too long rank file | [`a_rank_file_of_another_length`]; every length: `format/tests/faults.rs` |
//! | flipped bit in weights, superblocks, MANIFEST | `bit_flips.rs`, `faults.rs`, `format/tests/faults.rs` |
//! | corrupt source shard | `compiler/tests/compiler/command.rs` (with a list of sums), `pack.rs` there (source id, values no kernel can use) |
//! | ranks' files swapped | [`swapped_rank_files`] |
//! | rank file of another artifact, or cut for another number of ranks | [`a_rank_file_of_another_artifact`], [`a_rank_file_of_another_tp`]; over the network: `faults.rs` |
//! | another format version | [`another_format_version`]; of a peer: `runtime/src/ranks/tests`, `compiler/tests/compiler/push.rs` |
//! | another contract between packer and runtime | [`another_op_contract`] |
//! | wrong architecture, driver too old | `cuda_runtime.rs`, with a driver made for it; on recorded machines: `preflight.rs`, `runtime/src/preflight` |
//! | kernel file, or part of it, missing | [`a_kernel_file_that_is_missing_or_cut`]. A key that the runtime looks up in vain: `cuda_runtime.rs` |
//! | disk full | `faults.rs`, `compiler/tests/compiler/{pack,push,synth}.rs` |
//! | SIGKILL in pack | [`a_pack_that_is_killed`]; in push and receive: `compiler/tests/compiler/push.rs`. Power loss: not here, needs a disk that forgets |
//! | SIGKILL in load, and what stays | `cycles.rs` |
//! | EIO from the medium | [`a_medium_with_a_bad_place`], [`a_shard_on_a_medium_with_a_bad_place`] |
//! | a read that never returns | [`a_read_that_never_returns`] |
//! | O_DIRECT refused | [`a_file_system_without_direct_io`]; taken, and the page cache used all the same: [`a_file_system_that_caches_what_is_direct`] |
//! | low memory before load | `preflight.rs` |
//! | low memory during load | `loading.rs`, by floors no machine reaches and in a memory cgroup |
//! | device memory fragmented, `ibv_reg_mr` refused, MTU or GID wrong | not here: needs a GPU, an RDMA network. Judged on recorded machines, as above |
//! | peer dead in load | [`a_peer_that_ends_while_weights_are_loaded`] |
//! | peer dead at work | `faults.rs`, `runtime/src/ranks/tests` |

use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use dsv4_format::io::{DirectFile, ReadMode};
use dsv4_format::{
    Artifact, CommitInput, Digest, Draft, DraftOptions, FORMAT_VERSION, KernelInput, RankLayout, SectionPlan, SourceId,
    TensorPlan,
};
use dsv4_run::ranks::{Deadlines, Token, connect};
use dsv4_tests::artifacts::{Packed, Unwatched};
use dsv4_tests::binaries::{DSV4_RUN, DSV4C, Ran, kill, run, start, start_with};
use dsv4_tests::group::addresses;
use dsv4_tests::{DATA, skip};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::process::{Pid, Signal, kill_process};

const INPUT: i32 = 3;
const PEER: i32 = 5;
const SECONDS: Duration = Duration::from_secs(8);
const MIB: u64 = 1 << 20;

fn text(path: &Path) -> &str {
    path.to_str().expect("a path in ASCII")
}

/// Names and lengths of the files in a directory.
fn listing(dir: &Path) -> Vec<(String, u64)> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    let mut all: Vec<_> = entries
        .map(|entry| (entry.file_name().into_string().unwrap(), fs::metadata(entry.path()).unwrap().len()))
        .collect();
    all.sort();
    all
}

/// `verify`, `check` and `generate` all refuse `artifact`, naming `words`, and change nothing in it.
fn refused(artifact: &Path, words: &[&str]) {
    let before = listing(artifact);
    let artifact_ = text(artifact);
    let check_generate: [&[&str]; 2] = [&["check"], &["generate", "--prompt", "a", "--max-tokens", "2"]];
    let mut all = vec![run(DSV4C, ["verify", artifact_])];
    all.extend(check_generate.map(|verb| run(DSV4_RUN, [&[artifact_], verb].concat())));
    for ran in all {
        ran.fails(INPUT, words);
        assert!(ran.took < SECONDS, "{ran:?}");
    }
    assert_eq!(listing(artifact), before);
}

fn accepted(artifact: &Path) {
    run(DSV4C, ["verify", text(artifact)]).ok();
}

#[test]
fn a_rank_file_of_another_length() {
    let packed = Packed::nano(2);
    let file = packed.path().join("rank1.weights");
    let length = fs::metadata(&file).unwrap().len();
    let open = fs::File::options().write(true).open(&file).unwrap();
    for found in [0, 1, 2 * MIB, length - 4096, length - 1, length + 1, length + 2 * MIB] {
        open.set_len(found).unwrap();
        refused(packed.path(), &["rank1.weights", &format!("length is {found} bytes, expected {length}")]);
    }
}

#[test]
fn swapped_rank_files() {
    let packed = Packed::nano(2);
    let [zero, one, aside] = ["rank0.weights", "rank1.weights", "../aside"].map(|name| packed.path().join(name));
    assert_eq!(fs::metadata(&zero).unwrap().len(), fs::metadata(&one).unwrap().len(), "not told apart by length");
    let swap = || {
        fs::rename(&zero, &aside).unwrap();
        fs::rename(&one, &zero).unwrap();
        fs::rename(&aside, &one).unwrap();
    };
    swap();
    refused(packed.path(), &["rank0.weights", "rank is 1, expected 0"]);
    swap();
    accepted(packed.path());
}

/// Of the same model, the same length, and other weights.
#[test]
fn a_rank_file_of_another_artifact() {
    let packed = Packed::nano(2);
    let checkpoint = packed.scratch().join("checkpoint");
    fs::create_dir(&checkpoint).unwrap();
    for (name, _) in listing(&Path::new(DATA).join("nano")).into_iter().filter(|(n, _)| n != "conversations.json") {
        fs::copy(Path::new(DATA).join("nano").join(&name), checkpoint.join(&name)).unwrap();
    }
    // The last byte of a shard is one of a weight: no length, name or shape differs.
    let shard = checkpoint.join("model-00002-of-00002.safetensors");
    let open = fs::File::options().read(true).write(true).open(&shard).unwrap();
    let (last, mut byte) = (fs::metadata(&shard).unwrap().len() - 1, [0]);
    open.read_exact_at(&mut byte, last).unwrap();
    open.write_all_at(&[byte[0] ^ 1], last).unwrap();
    let other = Packed::of(&checkpoint, 2);
    let ids = [&packed, &other].map(|p| Artifact::open(p.path()).unwrap().manifest().weight_set_id.to_string());
    assert_ne!(ids[0], ids[1]);
    for rank in 0..2 {
        let name = format!("rank{rank}.weights");
        let (own, aside) = (packed.path().join(&name), packed.scratch().join("aside"));
        fs::rename(&own, &aside).unwrap();
        fs::copy(other.path().join(&name), &own).unwrap();
        refused(packed.path(), &[&name, "weight set", &ids[0], &ids[1]]);
        fs::rename(&aside, &own).unwrap();
    }
    accepted(packed.path());
}

#[test]
fn a_rank_file_of_another_tp() {
    let (two, one) = (Packed::nano(2), Packed::nano(1));
    let [here, there] = [&two, &one].map(|packed| packed.path().join("rank0.weights"));
    let lengths = [&here, &there].map(|file| fs::metadata(file).unwrap().len());
    let own = fs::read(&here).unwrap();
    fs::copy(&there, &here).unwrap();
    refused(two.path(), &["rank0.weights", &format!("length is {} bytes, expected {}", lengths[1], lengths[0])]);
    // Brought to the right length, as only a program could.
    let mut bytes = fs::read(&there).unwrap();
    bytes.truncate(own.len());
    bytes.resize(own.len(), 0);
    fs::write(&here, bytes).unwrap();
    refused(two.path(), &["rank0.weights", "superblock at the start", "tp is 1, expected 2"]);
}

#[test]
fn another_format_version() {
    let packed = Packed::nano(2);
    let head = |file: &Path, copies: &[u64], change: &dyn Fn(&mut [u8])| {
        let open = fs::File::options().read(true).write(true).open(file).unwrap();
        for &copy in copies {
            let mut head = [0; 4096];
            open.read_exact_at(&mut head, copy).unwrap();
            change(&mut head);
            open.write_all_at(&head, copy).unwrap();
        }
    };
    for version in [0, FORMAT_VERSION - 1, FORMAT_VERSION + 1, u32::MAX] {
        let words = ["version is", &format!("{version}, expected {FORMAT_VERSION}")];
        let manifest = packed.path().join("MANIFEST");
        let set = |version: u32| head(&manifest, &[0], &|head| head[8..12].copy_from_slice(&version.to_le_bytes()));
        set(version);
        refused(packed.path(), &[&["MANIFEST"], &words[..]].concat());
        set(FORMAT_VERSION);
        // A superblock has a hash of its own, right for whatever it says.
        let rank = packed.path().join("rank1.weights");
        let tail = fs::metadata(&rank).unwrap().len() - 4096;
        for copies in [&[0][..], &[tail], &[0, tail]] {
            let set = |version: u32| {
                head(&rank, copies, &|head| {
                    head[8..12].copy_from_slice(&version.to_le_bytes());
                    let hash = *Digest::of(&head[..96]).as_bytes();
                    head[96..128].copy_from_slice(&hash);
                });
            };
            set(version);
            refused(packed.path(), &[&["rank1.weights"], &words[..]].concat());
            set(FORMAT_VERSION);
        }
    }
    accepted(packed.path());
}

/// An artifact as another release could write it: sound in itself, with kernels, and another op contract.
fn of_another_release(dir: &Path) -> PathBuf {
    let out = dir.join("other.dsv4");
    let tensor = TensorPlan { name: "w".into(), dtype: "u8".into(), shape: vec![300], bytes: 300 };
    let layout = RankLayout::new(&[SectionPlan { name: "all".into(), tensors: vec![tensor] }]).unwrap();
    let mut draft = Draft::create(&out, vec![layout], &DraftOptions::default()).unwrap();
    let mut writer = draft.rank_writer(0).unwrap();
    writer.append("w", &[5; 300]).unwrap();
    let rank = writer.finish().unwrap();
    let weights = dsv4_model::contract::weight_contract();
    let ops = dsv4_model::contract::op_contract().replacen("Embed [Embed]", "Embed [Embed, Norm]", 1);
    let names = [dsv4_model::contract::WEIGHT_CONTRACT_NAME, dsv4_model::contract::OP_CONTRACT_NAME];
    let mut members: Vec<_> = names.into_iter().zip([&weights, &ops]).collect();
    members.sort();
    let members = members.into_iter().map(|(name, text)| (name.to_owned(), text.clone().into_bytes()));
    draft.write_meta(&members.collect::<Vec<_>>()).unwrap();
    let kernels = [("rms_norm", 2u8), ("rope", 1)].map(|(family, key)| KernelInput {
        family: family.into(),
        key: Digest([key; 32]),
        cubin: vec![key; 5000],
    });
    draft.write_kernels("sm_121a", &kernels, None).unwrap();
    let input = CommitInput {
        config_json: fs::read_to_string(Path::new(DATA).join("nano/config.json")).unwrap(),
        source_id: SourceId([7; 32]),
        weight_contract: Digest(dsv4_model::contract::hash(&weights)),
        op_contract: Digest(dsv4_model::contract::hash(&ops)),
        canary: None,
        ranks: vec![rank],
        receipt: serde_json::Map::new(),
    };
    draft.commit(input, false, &Unwatched).unwrap();
    out
}

#[test]
fn another_op_contract() {
    let temp = tempfile::tempdir().unwrap();
    let artifact = of_another_release(temp.path());
    let before = listing(&artifact);
    accepted(&artifact);
    for verb in [&["check"][..], &["generate", "--prompt", "a"]] {
        let ran = run(DSV4_RUN, [&[text(&artifact)], verb].concat());
        ran.fails(INPUT, &["op contract", "differs", "in line 3", "Embed [Embed, Norm]"]);
    }
    assert_eq!(listing(&artifact), before);
}

#[test]
fn a_kernel_file_that_is_missing_or_cut() {
    let temp = tempfile::tempdir().unwrap();
    let artifact = of_another_release(temp.path());
    let file = artifact.join("kernels.sm_121a");
    let whole = fs::read(&file).unwrap();
    let verify = || run(DSV4C, ["verify", text(&artifact)]);
    fs::write(&file, &whole[..whole.len() / 2]).unwrap();
    let lengths = format!("length is {} bytes, expected {}", whole.len() / 2, whole.len());
    verify().fails(INPUT, &["kernels.sm_121a", &lengths]);
    fs::remove_file(&file).unwrap();
    verify().fails(INPUT, &["kernels.sm_121a", "No such file"]);
    assert!(!file.exists());
    fs::write(&file, whole).unwrap();
    accepted(&artifact);
}

/// At any moment: there is either the whole artifact or none, what is half-written is never taken for one,
/// and the next pack is not in its way.
#[test]
fn a_pack_that_is_killed() {
    let temp = tempfile::tempdir().unwrap();
    let (nano, out) = (format!("{DATA}/nano"), temp.path().join("out.dsv4"));
    let pack = ["pack", &nano, "--tp", "2", "--arch", "none", "-o", text(&out), "--quiet"];
    let partial = temp.path().join(".out.dsv4.partial");
    let mut interrupted = 0;
    for moment_ms in [5, 20, 40, 60, 90, 130, 180, 260] {
        let running = start(DSV4C, pack);
        std::thread::sleep(Duration::from_millis(moment_ms));
        kill(running.id());
        running.finish();
        let names: Vec<_> = listing(temp.path()).into_iter().map(|(name, _)| name).collect();
        println!("killed after {moment_ms} ms: {names:?}");
        if out.exists() {
            accepted(&out);
            fs::remove_dir_all(&out).unwrap();
        }
        if partial.exists() {
            interrupted += 1;
            refused(&partial, &["partial", "not finished"]);
        }
        assert!(names.iter().all(|name| name == "out.dsv4" || name == ".out.dsv4.partial"), "{names:?}");
    }
    assert!(interrupted > 0, "no moment was within a pack");
    run(DSV4C, pack).ok();
    assert_eq!(listing(temp.path()).len(), 1, "the partial is gone");
    let [again, fresh] = [&out, Packed::nano(2).path()].map(|path| Artifact::open(path).unwrap().manifest().clone());
    assert_eq!(again, fresh);
    accepted(&out);
}

/// A mount, undone when dropped.
struct Mounted(PathBuf);

impl Mounted {
    fn new(args: &[&str], at: &Path) -> Option<Mounted> {
        fs::create_dir(at).unwrap();
        let ran = Command::new("mount").args(args).arg(at).output();
        ran.is_ok_and(|out| out.status.success()).then(|| Mounted(at.to_owned()))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

/// A file on a medium that gives EIO for some of it, and all the rest.
struct BadPlace {
    _mounted: Mounted,
    file: PathBuf,
}

impl BadPlace {
    /// `content` under `name` on a disk of its own, which cannot read `bad` (multiples of 4 KiB). The bad bytes
    /// are the last of the disk, and then the image that is the disk is cut in front of them.
    fn new(dir: &Path, name: &str, content: &[u8], bad: std::ops::Range<u64>) -> Option<BadPlace> {
        let (image, mount) = (dir.join(format!("{name}.image")), dir.join(format!("{name}.disk")));
        fs::File::create(&image).and_then(|file| file.set_len(64 * MIB)).unwrap();
        let made = Command::new("mkfs.ext4")
            .args(["-q", "-b", "4096", "-O", "^has_journal", "-m", "0"])
            .arg(&image)
            .output()
            .is_ok_and(|out| out.status.success());
        let mounted = made.then(|| Mounted::new(&["-o", "loop", text(&image)], &mount)).flatten();
        let Some(mounted) = mounted else {
            skip("EIO from the medium: needs mkfs.ext4, loop devices and the right to mount");
            return None;
        };
        let (file, [start, end]) = (mount.join(name), [bad.start as usize, bad.end as usize]);
        let mut open = fs::File::create_new(&file).unwrap();
        open.write_all(&content[..start]).unwrap();
        open.write_all(&content[end..]).unwrap();
        open.sync_all().unwrap();
        // Behind everything else on the disk, in the middle of the file.
        fallocate(&open, FallocateFlags::INSERT_RANGE, bad.start, bad.end - bad.start).unwrap();
        open.write_all_at(&content[start..end], bad.start).unwrap();
        open.sync_all().unwrap();
        assert!(fs::read(&file).unwrap() == content, "the file as it was given");
        let disk = fs::read(&image).unwrap();
        let place = |at: usize| {
            let page = &content[at..at + 4096];
            disk.chunks_exact(4096).position(|chunk| chunk == page).expect("the file is on the disk") as u64
        };
        let cut = place(start);
        if place(0) > cut || place(content.len() / 4096 * 4096 - 4096) > cut {
            skip("EIO from the medium: this file system put the bad place in front of the rest");
            return None;
        }
        fs::File::options().write(true).open(&image).unwrap().set_len(cut * 4096).unwrap();
        Some(BadPlace { _mounted: mounted, file })
    }
}

#[test]
fn a_medium_with_a_bad_place() {
    let packed = Packed::nano(2);
    let name = "rank1.weights";
    let own = packed.path().join(name);
    let content = fs::read(&own).unwrap();
    let Some(bad) = BadPlace::new(packed.scratch(), name, &content, 4 * MIB..6 * MIB) else { return };
    fs::rename(&own, packed.scratch().join("aside")).unwrap();
    symlink(&bad.file, &own).unwrap();
    let words = [name, "section", "block", "offset", "cannot read after 3 tries", "Input/output error", "dmesg"];
    let before = listing(packed.path());
    // Opening reads no weights, so the machine is not refused; the probe may or may not meet the place.
    let opened = Artifact::open(packed.path()).unwrap();
    opened.load_rank(0, 1, &Unwatched).unwrap();
    run(DSV4C, ["verify", text(packed.path())]).fails(INPUT, &words);
    let ran = run(DSV4_RUN, [text(packed.path()), "generate", "--prompt", "a", "--max-tokens", "2"]);
    assert_eq!(ran.code, Some(INPUT), "{ran:?}");
    ran.says(&words);
    ran.says(&["rank 1", "exit status: 3"]);
    assert!(ran.took < SECONDS, "{ran:?}");
    assert_eq!(listing(packed.path()), before);
}

#[test]
fn a_shard_on_a_medium_with_a_bad_place() {
    let temp = tempfile::tempdir().unwrap();
    let (checkpoint, name) = (temp.path().join("checkpoint"), "model-00001-of-00002.safetensors");
    fs::create_dir(&checkpoint).unwrap();
    let nano = Path::new(DATA).join("nano");
    let content = fs::read(nano.join(name)).unwrap();
    let Some(bad) = BadPlace::new(temp.path(), name, &content, 4 * MIB..5 * MIB) else { return };
    for (other, _) in listing(&nano).into_iter().filter(|(n, _)| n != "conversations.json") {
        let from = if other == name { bad.file.clone() } else { nano.join(&other) };
        symlink(from, checkpoint.join(other)).unwrap();
    }
    let before = listing(temp.path());
    let out = temp.path().join("out.dsv4");
    let ran = run(DSV4C, ["pack", text(&checkpoint), "--tp", "2", "--arch", "none", "-o", text(&out)]);
    ran.fails(INPUT, &[name, "read", "Input/output error", "dmesg"]);
    let after: Vec<_> = listing(temp.path()).into_iter().filter(|(n, _)| n != ".out.dsv4.partial").collect();
    assert_eq!(after, before, "nothing with the artifact's name");
}

fn answer(artifact: &Path) -> String {
    run(DSV4_RUN, [text(artifact), "generate", "--prompt", "Count.", "--max-tokens", "4", "--quiet"]).ok().to_owned()
}

/// Packing from and to it, verifying and running; only slower and through the cache.
#[test]
fn a_file_system_without_direct_io() {
    let temp = tempfile::tempdir().unwrap();
    let Some(disk) = Mounted::new(&["-t", "ramfs", "ramfs"], &temp.path().join("ramfs")) else {
        return skip("O_DIRECT refused: no right to mount a ramfs, which refuses it");
    };
    let (checkpoint, out) = (disk.0.join("checkpoint"), disk.0.join("out.dsv4"));
    fs::create_dir(&checkpoint).unwrap();
    let nano = Path::new(DATA).join("nano");
    for (name, _) in listing(&nano).into_iter().filter(|(n, _)| n != "conversations.json") {
        fs::copy(nano.join(&name), checkpoint.join(&name)).unwrap();
    }
    run(DSV4C, ["pack", text(&checkpoint), "--tp", "2", "--arch", "none", "-o", text(&out)]).ok();
    let opened = Artifact::open(&out).unwrap();
    assert!(opened.rank_reader(0).unwrap().mode() != ReadMode::Direct, "a file system that refuses");
    let elsewhere = Packed::nano(2);
    assert_eq!(opened.manifest(), Artifact::open(elsewhere.path()).unwrap().manifest());
    accepted(&out);
    assert_eq!(answer(&out), answer(elsewhere.path()));
    let report = run(DSV4_RUN, [text(&out), "check", "--json"]);
    let report: serde_json::Value = serde_json::from_str(report.ok()).unwrap();
    assert_eq!(report["disk"]["direct"], false, "{report}");
}

/// ext4 with data=journal takes O_DIRECT at open, and reads and writes through the page cache.
#[test]
fn a_file_system_that_caches_what_is_direct() {
    let temp = tempfile::tempdir().unwrap();
    let image = temp.path().join("image");
    fs::File::create(&image).and_then(|file| file.set_len(256 * MIB)).unwrap();
    let made = Command::new("mkfs.ext4").arg("-q").arg(&image).output().is_ok_and(|out| out.status.success());
    let at = temp.path().join("disk");
    let mount = || Mounted::new(&["-o", "loop,data=journal", text(&image)], &at);
    let Some(disk) = made.then(mount).flatten() else {
        return skip("a file system that caches what is direct: needs mkfs.ext4, loop devices and the right to mount");
    };
    let (checkpoint, out) = (disk.0.join("checkpoint"), disk.0.join("out.dsv4"));
    fs::create_dir(&checkpoint).unwrap();
    let nano = Path::new(DATA).join("nano");
    for (name, _) in listing(&nano).into_iter().filter(|(n, _)| n != "conversations.json") {
        fs::copy(nano.join(&name), checkpoint.join(&name)).unwrap();
    }
    rustix::fs::sync();
    let cached = |file: PathBuf| DirectFile::open(&file).unwrap().cached_bytes();
    let shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    shards.iter().for_each(|name| DirectFile::open(&checkpoint.join(name)).unwrap().evict());
    run(DSV4C, ["pack", text(&checkpoint), "--tp", "2", "--arch", "none", "--no-verify", "-o", text(&out)]).ok();
    let weights = ["rank0.weights", "rank1.weights"];
    let files = shards.map(|name| checkpoint.join(name)).into_iter().chain(weights.map(|name| out.join(name)));
    for file in files {
        match cached(file.clone()) {
            Some(bytes) => assert!(bytes <= 2 * MIB, "{}: {bytes} bytes are cached", file.display()),
            None => skip("residency: this kernel does not tell"),
        }
    }
    accepted(&out);
}

/// Stands between a program and its C library: reads of HANG_FILE from HANG_FROM on never return.
const HANG: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

ssize_t pread64(int fd, void *bytes, size_t len, off64_t at) {
    ssize_t (*real)(int, void *, size_t, off64_t) = dlsym(RTLD_NEXT, "pread64");
    char name[64], file[4096] = "";
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    if (readlink(name, file, sizeof file - 1) > 0 && strstr(file, getenv("HANG_FILE")))
        while (at >= atoll(getenv("HANG_FROM"))) pause();
    return real(fd, bytes, len, at);
}
"#;

/// While an artifact is opened, while its disk is measured, and while it is loaded. A process that was stopped
/// meanwhile has not waited for the disk.
#[test]
fn a_read_that_never_returns() {
    let packed = Packed::nano(1);
    let (source, shim) = (packed.scratch().join("hang.c"), packed.scratch().join("hang.so"));
    fs::write(&source, HANG).unwrap();
    let made = Command::new("cc").args(["-shared", "-fPIC", "-o"]).args([&shim, &source]).arg("-ldl").output();
    if !made.is_ok_and(|out| out.status.success()) {
        return skip("a read that never returns: needs a C compiler");
    }
    if Artifact::open(packed.path()).unwrap().rank_reader(0).unwrap().mode() == ReadMode::DontCache {
        return skip("a read that never returns: without O_DIRECT reads do not go through the C library");
    }
    let hangs = |from: &str, args: &[&str]| {
        let variables = [("LD_PRELOAD", text(&shim)), ("HANG_FILE", "rank0.weights"), ("HANG_FROM", from)];
        start_with(DSV4_RUN, [&[text(packed.path())], args, &["--io", "threads"]].concat(), &variables)
    };
    let generate = ["generate", "--prompt", "a", "--max-tokens", "2"];
    let weights = (2 * MIB).to_string();
    let all = [hangs("0", &generate), hangs(&weights, &["load"]), hangs(&weights, &generate)];
    let stopped = hangs(&weights, &generate);
    let (id, pause) = (Pid::from_raw(stopped.id() as i32).unwrap(), Duration::from_secs(6));
    std::thread::sleep(Duration::from_secs(2));
    kill_process(id, Signal::STOP).unwrap();
    std::thread::sleep(pause);
    kill_process(id, Signal::CONT).unwrap();
    let limit = Duration::from_secs(30);
    for (running, least) in all.map(|running| (running, limit)).into_iter().chain([(stopped, limit + pause)]) {
        let ran = running.finish();
        ran.fails(INPUT, &["nothing was read for 30 s", "the disk does not answer"]);
        assert!(ran.took >= least && ran.took < least + 2 * SECONDS, "{:?}", ran.took);
    }
}

/// What two ranks of `artifact` compare, as they would say it.
fn facts(artifact: &Path) -> Vec<(String, String)> {
    let opened = Artifact::open(artifact).unwrap();
    let m = opened.manifest();
    let facts = [
        ("artifact_id", m.artifact_id.to_string()),
        ("weight_set_id", m.weight_set_id.to_string()),
        ("weight_contract", m.weight_contract.to_string()),
        ("op_contract", m.op_contract.to_string()),
        ("version", env!("CARGO_PKG_VERSION").to_owned()),
        ("backend", "cpu".to_owned()),
        ("numerics", "published".to_owned()),
        ("chunk", "256".to_owned()),
    ];
    facts.map(|(name, value)| (name.to_owned(), value)).to_vec()
}

/// The other rank is taken, and gone before it says that it has loaded: this process plays it.
#[test]
fn a_peer_that_ends_while_weights_are_loaded() {
    let packed = Packed::nano(2);
    for gone in [0u32, 1] {
        let peers = addresses(2);
        let (rank, list) = ((1 - gone).to_string(), peers.join(","));
        let args = [text(packed.path()), "generate", "--prompt", "a", "--rank", &rank, "--peers", &list];
        let running = start(DSV4_RUN, args);
        let mesh = connect(gone, &peers, Token::new([0; 32]), facts(packed.path()), Deadlines::default());
        let mesh = mesh.unwrap_or_else(|e| panic!("not taken for rank {gone}: {e}"));
        let ended = Instant::now();
        drop(mesh);
        let ran: Ran = running.finish();
        println!("rank {rank} ended {:.2?} after rank {gone}", ended.elapsed());
        ran.fails(PEER, &[&format!("rank {gone}"), "is gone"]);
        assert!(ended.elapsed() < SECONDS, "{ran:?}");
    }
}
