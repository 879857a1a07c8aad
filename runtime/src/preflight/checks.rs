//! Rules: facts in, findings out, each with what to do.
//!
//! A finding that refuses means: with this, a start is known to fail, hang the machine or compute
//! garbage. A rule whose facts are unknown says nothing; facts that were there but unreadable have a
//! finding of their own. Rules about the GPU apply only where one is to be used. The lists of bad
//! versions are reports of others, named in the finding.

mod devices;

use crate::error::RunError;
use crate::preflight::disk::DiskProbe;
use crate::preflight::host::{Host, Process};
use crate::preflight::memory::{Plan, Target};
use crate::preflight::report::{FILES, size};
use crate::preflight::texts::{Swap, free_in_blocks};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Size of the blocks that a GPU driver asks for.
const CONTIGUOUS_BYTES: u64 = 2 * MIB;
/// Below this much memory in such blocks, allocations have failed with gigabytes free.
const CONTIGUOUS_LEAST: u64 = GIB;
const CONTIGUOUS_FEW: u64 = 8 * GIB;
/// Memory that no counter explains, beyond what a driver at rest takes.
const UNACCOUNTED_MOST: u64 = 4 * GIB;
/// Extra CMA that tells of a kernel handover area.
const CMA_EXCESS_MOST: u64 = GIB;
/// A floor of free memory above this takes more than it gives.
const KEPT_FREE_MOST: u64 = GIB;
/// Cache that hides this much memory from a GPU driver is worth a word.
const CACHE_MUCH: u64 = 8 * GIB;
/// The slowest published O_DIRECT read of a GB10's drive is 5.58 GB/s.
const GB10_DISK_RATE_LEAST: f64 = 5e9;

/// How grave a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// As it should be, or only worth knowing.
    Ok,
    /// Works, with a cost or a risk.
    Warn,
    /// A start is refused.
    Refuse,
}

impl Level {
    /// As printed.
    pub fn name(self) -> &'static str {
        match self {
            Level::Ok => "ok",
            Level::Warn => "warn",
            Level::Refuse => "refuse",
        }
    }
}

/// What kind of thing a finding is about; decides the exit code of a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum About {
    /// The artifact's files: exit code 3.
    Files,
    /// The machine: exit code 4.
    Machine,
}

/// The result of one rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Stable name, such as `memory.plan`.
    pub id: &'static str,
    /// How grave.
    pub level: Level,
    /// What it is about.
    pub about: About,
    /// What was found.
    pub found: String,
    /// What was expected; empty where nothing is wrong.
    pub expected: String,
    /// What to do; empty where nothing is wrong.
    pub todo: String,
}

impl Finding {
    /// All is well.
    pub fn ok(id: &'static str, found: impl Into<String>) -> Finding {
        let (found, expected, todo) = (found.into(), String::new(), String::new());
        Finding { id, level: Level::Ok, about: About::Machine, found, expected, todo }
    }

    /// Something is wrong with the machine.
    pub fn machine(
        id: &'static str,
        level: Level,
        found: impl Into<String>,
        expected: impl Into<String>,
        todo: impl Into<String>,
    ) -> Finding {
        let (found, expected, todo) = (found.into(), expected.into(), todo.into());
        Finding { id, level, about: About::Machine, found, expected, todo }
    }

    /// What an error says, which refuses.
    pub fn refused(id: &'static str, error: &RunError, expected: impl Into<String>) -> Finding {
        let text = error.to_string();
        let (found, todo) = text.split_once("\n  help: ").unwrap_or((&text, "see the message"));
        let about = if error.exit_code() == FILES { About::Files } else { About::Machine };
        Finding { id, level: Level::Refuse, about, found: found.into(), expected: expected.into(), todo: todo.into() }
    }
}

/// Everything about the machine. `gpu`: whether its GPU is to be used.
pub fn host(host: &Host, gpu: bool) -> Vec<Finding> {
    // A GB10's GPU takes its memory from the machine; a card with memory of its own does not.
    let shared = gpu && host.is_gb10();
    let mut out = Vec::new();
    out.extend(unread(host));
    out.extend(swap(host));
    out.extend(cgroup(host, shared));
    out.extend(kept_free(host));
    out.extend(unaccounted(host, shared));
    out.extend(watchdogs(host));
    if gpu {
        out.extend(devices::driver(host));
        out.extend(devices::pages(host));
        out.extend(devices::programs(host));
        out.extend(devices::locked(host));
        out.extend(devices::network(host));
        out.extend(devices::drives(host));
    }
    if shared {
        out.extend(devices::kernel(host));
        out.extend(cma(host));
        out.extend(contiguous(host));
        out.extend(cache(host));
    }
    out
}

fn unread(host: &Host) -> Vec<Finding> {
    let finding = |u: &crate::preflight::host::Unread| {
        let found = format!("{}: {}", u.file.display(), u.found);
        Finding::machine(
            "host.unread",
            Level::Warn,
            found,
            &u.expected,
            "report it; what depends on it was not checked",
        )
    };
    host.unread.iter().map(finding).collect()
}

fn swap(host: &Host) -> Option<Finding> {
    let swaps = host.swaps.as_ref()?;
    let sum = |of: fn(&Swap) -> u64| swaps.iter().map(of).fold(0, u64::saturating_add);
    let (size_bytes, used) = (sum(|s| s.size), sum(|s| s.used));
    let found = format!("swap {}, in use {}", size(size_bytes), size(used));
    Some(if used <= 64 * MIB {
        Finding::ok("memory.swap", found)
    } else {
        let todo = "find what used the memory; `swapoff -a && swapon -a` as root brings it back";
        Finding::machine(
            "memory.swap",
            Level::Warn,
            found,
            "swap not in use: memory has been short since the start",
            todo,
        )
    })
}

fn cgroup(host: &Host, shared: bool) -> Option<Finding> {
    let c = host.cgroup?;
    let found = format!("cgroup limit {}, of it free {}", size(c.limit), size(c.headroom));
    Some(if shared {
        let todo = "plan with the machine's memory; a container's limit does not protect the machine";
        Finding::machine("memory.cgroup", Level::Warn, found, "no limit: it is not enforced for GPU memory", todo)
    } else {
        Finding::ok("memory.cgroup", found)
    })
}

fn kept_free(host: &Host) -> Option<Finding> {
    let bytes = host.kept_free.filter(|b| *b > KEPT_FREE_MOST)?;
    let found = format!("vm.min_free_kbytes keeps {} free", size(bytes));
    let todo = "set it back, such as `sysctl vm.min_free_kbytes=45056`";
    Some(Finding::machine("memory.kept_free", Level::Warn, found, format!("at most {}", size(KEPT_FREE_MOST)), todo))
}

fn listed(processes: &[Process]) -> String {
    let shown: Vec<String> = processes.iter().take(8).map(|p| format!("{} ({})", p.name, p.id)).collect();
    let more = processes.len().saturating_sub(8);
    if more > 0 { format!("{} and {more} more", shown.join(", ")) } else { shown.join(", ") }
}

/// Users of the GPU but for the driver's own daemon, which opens it and holds nothing.
fn others(users: &[Process]) -> Vec<Process> {
    users.iter().filter(|p| !p.name.starts_with("nvidia-persiste")).cloned().collect()
}

fn unaccounted(host: &Host, shared: bool) -> Option<Finding> {
    const ID: &str = "memory.unaccounted";
    let bytes = host.memory.as_ref()?.unaccounted();
    let found = format!("{} that no counter accounts for", size(bytes));
    if bytes <= UNACCOUNTED_MOST {
        return Some(Finding::ok(ID, found));
    }
    let expected = format!("at most {}", size(UNACCOUNTED_MOST));
    if !shared {
        let todo = "look for a driver or a hypervisor that holds memory; the plan counts it as used";
        return Some(Finding::machine(ID, Level::Warn, found, expected, todo));
    }
    let processes = host.processes.clone().unwrap_or_default();
    let users = others(&processes.gpu);
    Some(if !users.is_empty() {
        let found = format!("{found}; the GPU is in use by {}", listed(&users));
        Finding::machine(ID, Level::Warn, found, expected, "end these programs if they are not wanted")
    } else if host.processes.is_none() || processes.hidden > 0 {
        let found = format!("{found}; {} processes could not be looked into", processes.hidden);
        let todo = "run this as root to see who uses the GPU; if nobody does, the driver holds the memory: reboot";
        Finding::machine(ID, Level::Warn, found, expected, todo)
    } else {
        let found = format!("{found}, and no program uses the GPU: held by the driver");
        Finding::machine(ID, Level::Refuse, found, expected, "reboot; nothing else is known to free it")
    })
}

fn watchdogs(host: &Host) -> Option<Finding> {
    let found = &host.processes.as_ref()?.watchdogs;
    (!found.is_empty()).then(|| {
        let expected = "no program that ends others when memory is short: a loaded rank idles with little left";
        let todo = "stop it, or exempt dsv4-run in its settings";
        Finding::machine("memory.watchdog", Level::Warn, format!("running: {}", listed(found)), expected, todo)
    })
}

fn cma(host: &Host) -> Option<Finding> {
    let excess = host.memory.as_ref()?.cma_excess();
    (excess > CMA_EXCESS_MOST).then(|| {
        let found = format!("CmaFree is {} above CmaTotal", size(excess));
        let expected = "no more free than there is: this memory cannot be pinned, and ibv_reg_mr fails beside it";
        let todo = "add kho=off to the kernel's command line and reboot";
        Finding::machine("memory.cma", Level::Refuse, found, expected, todo)
    })
}

fn contiguous(host: &Host) -> Option<Finding> {
    const ID: &str = "memory.contiguous";
    let bytes = free_in_blocks(host.zones.as_ref()?, host.page_bytes.unwrap_or(4096), CONTIGUOUS_BYTES);
    let found = format!("{} free in blocks of {} and larger", size(bytes), size(CONTIGUOUS_BYTES));
    Some(if bytes < CONTIGUOUS_LEAST {
        let expected = format!("at least {}: drivers fail below with memory free", size(CONTIGUOUS_LEAST));
        Finding::machine(ID, Level::Refuse, found, expected, "reboot; compaction rarely brings large blocks back")
    } else if bytes < CONTIGUOUS_FEW {
        let todo =
            "as root `sync; echo 1 > /proc/sys/vm/drop_caches; echo 1 > /proc/sys/vm/compact_memory`, else reboot";
        Finding::machine(ID, Level::Warn, found, format!("at least {}", size(CONTIGUOUS_FEW)), todo)
    } else {
        Finding::ok(ID, found)
    })
}

fn cache(host: &Host) -> Option<Finding> {
    let m = host.memory.as_ref()?;
    let hidden = m.available?.saturating_sub(m.free);
    (hidden > CACHE_MUCH).then(|| {
        let found = format!("MemFree is {}, {} below MemAvailable", size(m.free), size(hidden));
        let expected = "the two near each other: the driver takes free memory and does not wait for the page cache";
        let todo = "as root `sync; echo 1 > /proc/sys/vm/drop_caches`; copy and hash large files past the cache (dd iflag=direct)";
        Finding::machine("memory.cache", Level::Warn, found, expected, todo)
    })
}

/// The plan's verdict.
pub fn memory(plan: &Plan) -> Finding {
    const ID: &str = "memory.plan";
    let Some(supply) = plan.supply else {
        let todo = "make /proc/meminfo readable";
        return Finding::machine(ID, Level::Warn, "how much memory there is is not known", "MemAvailable", todo);
    };
    let (needed, usable) = (size(plan.needed), size(supply.usable));
    if plan.fits() {
        return Finding::ok(ID, format!("{needed} needed, {usable} usable: fits"));
    }
    let found = format!("{usable} usable: {} too little", size(plan.missing()));
    Finding::machine(ID, Level::Refuse, found, format!("{needed} for context {}", plan.asked.context), what_fits(plan))
}

/// What to do about a plan that does not fit.
pub fn what_fits(plan: &Plan) -> String {
    let reserve = if plan.reserve > 0 { ", or leave less to others with --reserve" } else { "" };
    match plan.context_max {
        Some(context) if context < plan.asked.context => format!("--max-context {context} fits{reserve}"),
        Some(context) => format!("a context of {context} fits: ask for fewer tokens{reserve}"),
        None => {
            let what = match plan.asked.target {
                Target::Cpu => "end other programs, use a machine with more memory",
                Target::Cuda => "end other programs, drop the page cache, pack for more ranks",
                Target::Card => "end other programs on the GPU, use smaller chunks (--chunk), pack for more ranks",
            };
            format!("no context fits: {what}{reserve}")
        }
    }
}

/// A GPU plan counts the machine's memory, which is that of the GPU only on a GB10.
pub fn gpu_memory(plan: &Plan, host: &Host) -> Option<Finding> {
    (plan.asked.target == Target::Cuda && !host.is_gb10()).then(|| {
        let found = if host.gpus.is_empty() { "no GPU".to_owned() } else { host.gpus.join(", ") };
        let expected = "a GB10: the plan counts the machine's memory, not a card's";
        Finding::machine("gpu.memory", Level::Warn, found, expected, "compare the table with the card's memory")
    })
}

/// What the disk probe says; `bytes` are to be read.
pub fn disk(probe: &DiskProbe, bytes: u64, host: &Host) -> Vec<Finding> {
    let mut out = Vec::new();
    if !probe.direct {
        let expected = "a file system that takes O_DIRECT: else files go through the page cache, in bounded windows";
        let todo = "move the artifact to a local ext4 or xfs";
        out.push(Finding::machine("disk.direct", Level::Warn, "O_DIRECT is refused here", expected, todo));
    }
    let Some(seconds) = probe.expected_seconds(bytes) else { return out };
    let rate = probe.rate();
    let found =
        format!("{:.2} GB/s with {} readers: about {seconds:.1} s for {}", rate / 1e9, probe.readers, size(bytes));
    out.push(if !probe.is_telling() {
        Finding::ok("disk.rate", format!("{found} (the file is too small to tell the disk's speed)"))
    } else if host.is_gb10() && rate < GB10_DISK_RATE_LEAST {
        let expected = "5.6 to 10.7 GB/s, as drives of other units give";
        let todo = "check that the artifact is on the NVMe drive, its temperature, and what else reads";
        Finding::machine("disk.rate", Level::Warn, found, expected, todo)
    } else {
        Finding::ok("disk.rate", found)
    });
    out
}

/// Whether the files of the ranks that run here are here.
pub fn files(present: &[u32], here: &[u32]) -> Finding {
    let missing: Vec<u32> = here.iter().copied().filter(|r| !present.contains(r)).collect();
    let mut finding = Finding::ok("files.ranks", format!("rank files here: {present:?}"));
    finding.about = About::Files;
    if !missing.is_empty() {
        finding.level = Level::Refuse;
        finding.expected = format!("those of {here:?}");
        finding.todo =
            format!("copy the files of ranks {missing:?} here, or name a rank that is here with --rank and --peers");
    }
    finding
}
