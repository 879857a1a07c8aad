//! Every rule, on hosts that trigger it and on hosts that do not.

use std::path::PathBuf;

use super::checks::{self, Level};
use super::disk::DiskProbe;
use super::host::tests::host;
use super::host::{CgroupMemory, Host, Process, Processes, Unread};
use super::report::Report;
use super::texts::{Limit, Swap};
use super::*;

fn findings(host: &Host, gpu: bool, id: &str) -> Vec<(Level, String)> {
    let all = checks::host(host, gpu);
    for f in &all {
        assert_eq!(f.level == Level::Ok, f.todo.is_empty() && f.expected.is_empty(), "{f:?}");
        assert!(!f.found.is_empty());
    }
    all.into_iter()
        .filter(|f| f.id == id)
        .map(|f| (f.level, format!("{} | {} | {}", f.found, f.expected, f.todo)))
        .collect()
}

/// Requires exactly one finding of the rule, with these words.
#[track_caller]
fn one(host: &Host, gpu: bool, id: &str, level: Level, words: &[&str]) {
    let found = findings(host, gpu, id);
    assert_eq!(found.iter().map(|f| f.0).collect::<Vec<_>>(), [level], "{found:?}");
    for word in words {
        assert!(found[0].1.contains(word), "no {word:?} in {found:?}");
    }
}

fn gb10(change: impl FnOnce(&mut Host)) -> Host {
    let mut host = host("gb10");
    change(&mut host);
    host
}

#[test]
fn a_healthy_gb10_has_nothing_to_do() {
    let report = doctor(host("gb10"));
    assert_eq!((report.level(), report.exit_code()), (Level::Ok, 0), "{}", report.to_text());
    let ids: Vec<&str> = report.findings.iter().map(|f| f.id).collect();
    let expected = [
        "memory.size",
        "gpu.model",
        "memory.swap",
        "memory.unaccounted",
        "driver.version",
        "kernel.pages",
        "limits.memlock",
        "network.rdma",
        "disk.link",
        "kernel.version",
        "memory.contiguous",
    ];
    assert_eq!(ids, expected);
}

#[test]
fn a_machine_without_a_gpu_is_not_asked_for_one() {
    let report = doctor(host("recorded-x86"));
    assert_eq!((report.level(), report.exit_code()), (Level::Ok, 0), "{}", report.to_text());
    // The same machine with a GPU backend asked for has no driver.
    one(&host("recorded-x86"), true, "driver.version", Level::Refuse, &["no NVIDIA driver"]);
    // A card with memory of its own does not care for the machine's large blocks.
    let h100 = doctor(host("recorded-h100"));
    assert_eq!(h100.level(), Level::Ok, "{}", h100.to_text());
}

#[test]
fn nothing_known_is_no_verdict() {
    assert_eq!(checks::host(&Host::default(), false), []);
    assert_eq!(doctor(Host::default()).exit_code(), 0);
}

#[test]
fn memory_held_by_nobody() {
    const ID: &str = "memory.unaccounted";
    one(&host("gb10-held"), true, ID, Level::Refuse, &["101.", "held by the driver", "reboot"]);
    assert_eq!(doctor(host("gb10-held")).exit_code(), 4);
    let with = |processes| Host { processes, ..host("gb10-held") };
    let server = Process { id: 41, name: "VLLM::Worker".into() };
    let daemon = Process { id: 40, name: "nvidia-persiste".into() };
    let used = Processes { gpu: vec![daemon.clone(), server], ..Processes::default() };
    one(&with(Some(used.clone())), true, ID, Level::Warn, &["VLLM::Worker (41)"]);
    one(&with(Some(used)), true, "gpu.programs", Level::Warn, &["VLLM::Worker (41)"]);
    let daemon_only = Processes { gpu: vec![daemon], ..Processes::default() };
    one(&with(Some(daemon_only.clone())), true, ID, Level::Refuse, &["held by the driver"]);
    assert_eq!(findings(&with(Some(daemon_only)), true, "gpu.programs"), []);
    let hidden = Processes { hidden: 3, ..Processes::default() };
    one(&with(Some(hidden)), true, ID, Level::Warn, &["3 processes", "root"]);
    one(&with(None), true, ID, Level::Warn, &["root"]);
    one(&host("gb10-held"), false, ID, Level::Warn, &["counts it as used"]);
    one(&host("gb10"), true, ID, Level::Ok, &["2.39 GiB"]);
}

#[test]
fn swap_cgroup_floor_and_watchdogs() {
    let swapped = |used| gb10(|h| h.swaps = Some(vec![Swap { name: "/swap.img".into(), size: 16 << 30, used }]));
    one(&swapped(5 << 30), false, "memory.swap", Level::Warn, &["16.00 GiB", "in use 5.00 GiB", "swapoff"]);
    one(&swapped(1 << 20), false, "memory.swap", Level::Ok, &["1.0 MiB"]);
    let limited = gb10(|h| h.cgroup = Some(CgroupMemory { limit: 8 << 30, headroom: 3 << 30 }));
    one(&limited, true, "memory.cgroup", Level::Warn, &["8.00 GiB", "not enforced"]);
    one(&limited, false, "memory.cgroup", Level::Ok, &["free 3.00 GiB"]);
    let kept = |bytes| gb10(|h| h.kept_free = Some(bytes));
    one(&kept(4 << 30), false, "memory.kept_free", Level::Warn, &["4.00 GiB", "sysctl"]);
    assert_eq!(findings(&kept(1 << 30), false, "memory.kept_free"), []);
    let watched = |watchdogs| gb10(|h| h.processes = Some(Processes { watchdogs, ..Processes::default() }));
    let earlyoom = Process { id: 7, name: "earlyoom".into() };
    one(&watched(vec![earlyoom]), false, "memory.watchdog", Level::Warn, &["earlyoom (7)"]);
    assert_eq!(findings(&watched(vec![]), false, "memory.watchdog"), []);
    let unread = gb10(|h| {
        let unread = Unread { file: PathBuf::from("/proc/swaps"), expected: "a table".into(), found: "x".into() };
        h.unread.push(unread);
    });
    one(&unread, false, "host.unread", Level::Warn, &["/proc/swaps: x", "a table"]);
}

#[test]
fn drivers() {
    const ID: &str = "driver.version";
    let with = |version: &str, kernel: &str| {
        gb10(|h| {
            h.driver.as_mut().unwrap().version = version.into();
            h.kernel = Some(kernel.into());
        })
    };
    for version in ["580.159.03", "580.95.05", "570.1"] {
        one(&with(version, "6.17.0-1029-nvidia"), true, ID, Level::Warn, &["leaks", version]);
    }
    one(&with("580.173.02", "6.17.0-1029-nvidia"), true, ID, Level::Warn, &["NV_ERR_NO_MEMORY"]);
    one(&with("595.84", "6.17.0-1032-nvidia"), true, ID, Level::Warn, &["#1358"]);
    for (version, kernel) in
        [("595.84", "6.17.0-1029-nvidia"), ("580.159.04", "6.14.0-1"), ("580.178.04", "6.17.0-1032-nvidia")]
    {
        one(&with(version, kernel), true, ID, Level::Ok, &[version]);
    }
    let closed = gb10(|h| h.driver.as_mut().unwrap().open = false);
    one(&closed, true, "driver.modules", Level::Refuse, &["proprietary", "nvidia-driver-580-open"]);
    // Other GPUs have other histories.
    let other = |h: &mut Host| {
        h.gpus = vec!["NVIDIA H100 80GB HBM3".into()];
        h.driver.as_mut().unwrap().version = "550.1".into();
        h.driver.as_mut().unwrap().open = false;
    };
    one(&gb10(other), true, ID, Level::Ok, &["550.1"]);
    assert_eq!(findings(&closed, false, "driver.modules"), []);
}

#[test]
fn kernels_and_pages() {
    one(&host("gb10-kho"), true, "kernel.version", Level::Refuse, &["7.0.0-1019-nvidia", "kho=off"]);
    one(&host("gb10-kho"), true, "memory.cma", Level::Refuse, &["9.30 GiB above CmaTotal"]);
    let cured = |h: &mut Host| {
        h.kernel = Some("7.0.0-1019-nvidia".into());
        h.cmdline = Some(vec!["quiet".into(), "kho=off".into()]);
    };
    one(&gb10(cured), true, "kernel.version", Level::Ok, &["7.0.0-1019-nvidia"]);
    assert_eq!(findings(&host("gb10"), true, "memory.cma"), []);
    one(&host("gb10-64k"), true, "kernel.pages", Level::Refuse, &["64 KiB", "595", "#1269"]);
    let clean = Host { driver: host("gb10").driver, ..host("gb10-64k") };
    one(&clean, true, "kernel.pages", Level::Ok, &["64 KiB"]);
    one(
        &gb10(|h| h.driver.as_mut().unwrap().version = "610.43.02".into()),
        true,
        "kernel.pages",
        Level::Ok,
        &["4 KiB"],
    );
    assert_eq!(findings(&host("gb10-kho"), false, "kernel.version"), []);
}

#[test]
fn blocks_and_cache() {
    one(&host("gb10-fragmented"), true, "memory.contiguous", Level::Refuse, &["44.0 MiB", "reboot"]);
    let few = gb10(|h| h.zones.as_mut().unwrap()[1].blocks[10] = 1200);
    one(&few, true, "memory.contiguous", Level::Warn, &["compact_memory"]);
    one(&host("gb10-64k"), true, "memory.contiguous", Level::Ok, &["GiB free in blocks"]);
    one(&host("gb10-cached"), true, "memory.cache", Level::Warn, &["3.80 GiB", "drop_caches"]);
    for other in ["gb10", "gb10-held"] {
        assert_eq!(findings(&host(other), true, "memory.cache"), []);
    }
}

#[test]
fn locked_memory() {
    let limited = gb10(|h| h.locked_max = Some(Limit::Bytes(8 << 20)));
    one(&limited, true, "limits.memlock", Level::Warn, &["8.0 MiB", "ulimit -l unlimited"]);
    one(&host("gb10"), true, "limits.memlock", Level::Ok, &[]);
    assert_eq!(findings(&limited, false, "limits.memlock"), []);
}

#[test]
fn network_functions() {
    const ID: &str = "network.rdma";
    let both = |change: fn(&mut super::host::Rdma)| {
        gb10(|h| h.rdma.iter_mut().filter(|r| r.name == "rocep1s0f0").for_each(change))
    };
    one(&host("gb10"), true, ID, Level::Ok, &["rocep1s0f0", "roceP2p1s0f0"]);
    one(&both(|r| r.active = false), true, ID, Level::Warn, &["only roceP2p1s0f0", "second interface"]);
    one(&both(|r| r.pcie_lanes = Some(2)), true, ID, Level::Refuse, &["rocep1s0f0: PCIe 32 GT/s x2", "fwupdmgr"]);
    one(&both(|r| r.gbits = Some(40)), true, ID, Level::Warn, &["40 Gb/s"]);
    one(
        &both(|r| r.interface = Some(("enp1s0f0np0".into(), 1500))),
        true,
        ID,
        Level::Warn,
        &["MTU 1500", "ip link set dev enp1s0f0np0"],
    );
    one(&both(|r| r.gid = None), true, ID, Level::Warn, &["RoCE v2"]);
    one(&both(|r| r.fatal_errors = Some(3)), true, ID, Level::Warn, &["3 fatal PCIe errors"]);
    one(&gb10(|h| h.rdma.clear()), true, ID, Level::Warn, &["none of 0"]);
    assert_eq!(findings(&host("recorded-h100"), true, ID), []);
}

#[test]
fn disks() {
    let slow = gb10(|h| h.nvme[0].pcie_lanes = Some(2));
    one(&slow, true, "disk.link", Level::Warn, &["EXAMPLE GEN5 4TB", "x2"]);
    let probe =
        |rate: u64, direct| DiskProbe { file_bytes: 80 << 30, read_bytes: rate / 2, seconds: 0.5, readers: 8, direct };
    let levels = |p: DiskProbe, host: &Host| -> Vec<(&str, Level)> {
        checks::disk(&p, 80_000_000_000, host).iter().map(|f| (f.id, f.level)).collect()
    };
    assert_eq!(levels(probe(10_000_000_000, true), &host("gb10")), [("disk.rate", Level::Ok)]);
    assert_eq!(levels(probe(2_000_000_000, true), &host("gb10")), [("disk.rate", Level::Warn)]);
    assert_eq!(levels(probe(2_000_000_000, true), &host("recorded-x86")), [("disk.rate", Level::Ok)]);
    assert_eq!(
        levels(probe(2_000_000_000, false), &Host::default()),
        [("disk.direct", Level::Warn), ("disk.rate", Level::Ok)]
    );
    let found = checks::disk(&probe(10_000_000_000, true), 80_000_000_000, &Host::default());
    assert!(found[0].found.contains("10.00 GB/s") && found[0].found.contains("8.0 s"), "{found:?}");
    let small = DiskProbe { file_bytes: 9 << 20, ..probe(100, true) };
    assert_eq!(levels(small, &host("gb10")), [("disk.rate", Level::Ok)]);
}

#[test]
fn files_refuse_before_memory() {
    assert_eq!(checks::files(&[0, 1], &[0, 1]).level, Level::Ok);
    let missing = checks::files(&[0], &[0, 1]);
    assert_eq!(missing.level, Level::Refuse);
    assert!(missing.todo.contains("ranks [1]"), "{missing:?}");
    let mut report = doctor(host("gb10-held"));
    assert_eq!(report.exit_code(), 4);
    report.findings.push(missing);
    assert_eq!(report.exit_code(), 3);
}

#[test]
fn reports_say_everything_twice() {
    let report: Report = doctor(host("gb10-kho"));
    let (json, text) = (report.to_json(), report.to_text());
    assert_eq!(json["verdict"], "refused");
    assert_eq!(json["exit_code"], 4);
    assert_eq!(json["host"]["cma_free"], 9_817_088u64 << 10);
    assert_eq!(json["host"]["driver"]["version"], "580.178.04");
    assert_eq!(json["artifact"], serde_json::Value::Null);
    let findings = json["findings"].as_array().unwrap();
    assert_eq!(findings.len(), report.findings.len());
    for f in findings {
        assert!(text.contains(f["found"].as_str().unwrap()) && text.contains(f["todo"].as_str().unwrap()));
    }
    assert!(text.contains("REFUSED: 2 refuse"), "{text}");
}
