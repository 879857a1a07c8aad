//! What a machine says about itself: facts under a root directory, `/` or a test's.
//!
//! Every read is bounded. A file that is not there, or not for this user, is a fact that is not
//! known; a file with an unexpected text is kept as an [`Unread`] with its name. Nothing is changed,
//! nothing needs to be root. Absent: what only ioctls or a driver library tell (SMART, clocks).

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use crate::preflight::memory::Card;
use crate::preflight::texts::{
    Driver, Limit, Malformed, Meminfo, Swap, Zone, buddyinfo, cgroup_cache, cgroup_limit, cgroup_paths, gpu_model,
    kernel_release, locked_max, page_bytes, swaps,
};

/// Longest text that is read.
const TEXT_BYTES_MAX: u64 = 256 << 10;
/// Of the long list of mappings only the first is wanted.
const SMAPS_BYTES_MAX: u64 = 4 << 10;
/// Most entries of a directory that are looked at.
const ENTRIES_MAX: usize = 256;
const PROCESSES_MAX: usize = 1 << 16;
const FILES_MAX: usize = 1 << 12;
/// Slots of a port's address table that are looked at.
const GIDS_MAX: usize = 32;

/// A fact that could not be read, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unread {
    /// The file.
    pub file: PathBuf,
    /// What it should have held.
    pub expected: String,
    /// What it held, or why it could not be read.
    pub found: String,
}

/// The tightest memory limit of the cgroups this process is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CgroupMemory {
    /// Bytes.
    pub limit: u64,
    /// Bytes that may still be taken; cached files count as free.
    pub headroom: u64,
}

/// One RDMA function of a network card.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rdma {
    /// Such as `rocep1s0f0`.
    pub name: String,
    /// Whether port 1 is active.
    pub active: bool,
    /// Gigabits a second of port 1.
    pub gbits: Option<u64>,
    /// Gigatransfers a second of its PCIe link.
    pub pcie_gt: Option<f64>,
    /// Lanes of its PCIe link.
    pub pcie_lanes: Option<u64>,
    /// Network interface and its largest packet.
    pub interface: Option<(String, u64)>,
    /// Slot of the RoCE v2 address for IPv4.
    pub gid: Option<usize>,
    /// Fatal PCIe errors so far.
    pub fatal_errors: Option<u64>,
    /// Firmware.
    pub firmware: Option<String>,
}

/// One NVMe drive.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Nvme {
    /// Such as `nvme0`.
    pub name: String,
    /// What the drive calls itself.
    pub model: String,
    /// Gigatransfers a second of its PCIe link.
    pub pcie_gt: Option<f64>,
    /// Lanes of its PCIe link.
    pub pcie_lanes: Option<u64>,
}

/// A running program of interest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Process id.
    pub id: u32,
    /// Name.
    pub name: String,
}

/// What runs beside this program.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Processes {
    /// Those that end others when memory runs short.
    pub watchdogs: Vec<Process>,
    /// Those that have opened an NVIDIA device.
    pub gpu: Vec<Process>,
    /// Processes of other users that could not be looked into.
    pub hidden: usize,
}

/// Programs that end others when memory runs short, by the first 15 letters of their names.
const WATCHDOGS: [&str; 5] = ["earlyoom", "dgx-anti-oom", "nohang", "oomd", "systemd-oomd"];

/// All facts of a machine. A fact that is none, or an empty list, is not known or not there.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Host {
    /// Memory by use.
    pub memory: Option<Meminfo>,
    /// The limit of this process's cgroups.
    pub cgroup: Option<CgroupMemory>,
    /// Free blocks by size.
    pub zones: Option<Vec<Zone>>,
    /// Page size, bytes.
    pub page_bytes: Option<u64>,
    /// Kernel release.
    pub kernel: Option<String>,
    /// Words of the kernel's command line.
    pub cmdline: Option<Vec<String>>,
    /// Swap files and devices.
    pub swaps: Option<Vec<Swap>>,
    /// Memory that the kernel keeps free, bytes.
    pub kept_free: Option<u64>,
    /// Memory that this process may lock.
    pub locked_max: Option<Limit>,
    /// NVIDIA driver.
    pub driver: Option<Driver>,
    /// NVIDIA GPUs by model.
    pub gpus: Vec<String>,
    /// Memory of the GPU's own, where it was opened and has some; no file says that.
    pub card: Option<Card>,
    /// RDMA functions.
    pub rdma: Vec<Rdma>,
    /// NVMe drives.
    pub nvme: Vec<Nvme>,
    /// Other programs; only after [`Host::read`].
    pub processes: Option<Processes>,
    /// Facts that were there but could not be read.
    pub unread: Vec<Unread>,
}

impl Host {
    /// All facts under `root`.
    pub fn read(root: &Path) -> Host {
        let mut host = Host::for_memory(root);
        let mut files = Files { root, unread: std::mem::take(&mut host.unread) };
        host.zones = files.parse("proc/buddyinfo", buddyinfo);
        host.page_bytes = files.parse_start("proc/self/smaps", SMAPS_BYTES_MAX, page_bytes);
        host.kernel = files.parse("proc/version", kernel_release);
        let words = |text: &str| Ok(text.split_whitespace().map(str::to_owned).collect());
        host.cmdline = files.parse("proc/cmdline", words);
        host.swaps = files.parse("proc/swaps", swaps);
        host.kept_free = files.parse("proc/sys/vm/min_free_kbytes", |text| {
            let kib = text.trim().parse::<u64>().ok().and_then(|n| n.checked_mul(1024));
            kib.ok_or_else(|| Malformed { expected: "a number of KiB".into(), found: text.trim().into() })
        });
        host.locked_max = files.parse("proc/self/limits", locked_max);
        host.rdma = files.names("sys/class/infiniband").into_iter().map(|name| files.rdma(name)).collect();
        host.nvme = files.names("sys/class/nvme").into_iter().map(|name| files.nvme(name)).collect();
        host.processes = files.processes();
        host.unread = files.unread;
        host
    }

    /// Only the facts that say how much memory there is, and of what GPU and driver.
    pub fn for_memory(root: &Path) -> Host {
        let mut files = Files { root, unread: Vec::new() };
        let memory = files.parse("proc/meminfo", Meminfo::parse);
        let cgroup = files.cgroup();
        let gpus = files.names("proc/driver/nvidia/gpus");
        let gpus = gpus.iter().filter_map(|gpu| {
            let file = format!("proc/driver/nvidia/gpus/{gpu}/information");
            files.parse(&file, gpu_model)
        });
        let gpus = gpus.collect();
        let driver = files.parse("proc/driver/nvidia/version", Driver::parse);
        Host { memory, cgroup, gpus, driver, unread: files.unread, ..Host::default() }
    }

    /// Whether this is a GB10, whose GPU has no memory of its own.
    pub fn is_gb10(&self) -> bool {
        self.gpus.iter().any(|model| model.contains("GB10"))
    }
}

/// Files under a root, and what went wrong with them.
struct Files<'a> {
    root: &'a Path,
    unread: Vec<Unread>,
}

impl Files<'_> {
    /// The start of a file. None if it is not there or not for this user.
    fn start(&mut self, file: &str, limit: u64) -> Option<String> {
        let path = self.root.join(file);
        let mut bytes = Vec::new();
        match File::open(&path).and_then(|f| f.take(limit).read_to_end(&mut bytes)) {
            Ok(_) => Some(String::from_utf8_lossy(&bytes).into_owned()),
            Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::PermissionDenied) => None,
            Err(e) => {
                self.unread.push(Unread { file: path, expected: "a text".into(), found: e.to_string() });
                None
            }
        }
    }

    fn parse_start<T>(
        &mut self,
        file: &str,
        limit: u64,
        parse: impl FnOnce(&str) -> Result<T, Malformed>,
    ) -> Option<T> {
        let text = self.start(file, limit)?;
        match parse(&text) {
            Ok(fact) => Some(fact),
            Err(Malformed { expected, found }) => {
                self.unread.push(Unread { file: self.root.join(file), expected, found });
                None
            }
        }
    }

    fn parse<T>(&mut self, file: &str, parse: impl FnOnce(&str) -> Result<T, Malformed>) -> Option<T> {
        self.parse_start(file, TEXT_BYTES_MAX, parse)
    }

    /// An attribute of a device: its trimmed text. Drivers refuse to tell some, which is not worth a word.
    fn attribute(&self, file: &str) -> Option<String> {
        let mut bytes = Vec::new();
        let opened = File::open(self.root.join(file)).ok()?;
        opened.take(TEXT_BYTES_MAX).read_to_end(&mut bytes).ok()?;
        Some(String::from_utf8_lossy(&bytes).trim().to_owned())
    }

    /// The first word of an attribute as a number.
    fn number<T: std::str::FromStr>(&self, file: &str) -> Option<T> {
        self.attribute(file)?.split_whitespace().next()?.parse().ok()
    }

    /// Names in a directory, sorted; none if it is not there.
    fn names(&self, dir: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.root.join(dir)).into_iter().flatten().flatten().take(ENTRIES_MAX);
        let mut names: Vec<String> = entries.filter_map(|e| e.file_name().into_string().ok()).collect();
        names.sort();
        names
    }

    /// The tightest limit from this process's cgroup up to the root.
    fn cgroup(&mut self) -> Option<CgroupMemory> {
        let text = self.start("proc/self/cgroup", TEXT_BYTES_MAX)?;
        let (unified, memory) = cgroup_paths(&text);
        let versions = [
            ("sys/fs/cgroup", unified, "memory.max", "memory.current"),
            ("sys/fs/cgroup/memory", memory, "memory.limit_in_bytes", "memory.usage_in_bytes"),
        ];
        let mut tightest: Option<CgroupMemory> = None;
        for (mount, path, limit, usage) in versions {
            // A path that leaves the visible tree starts with `..`: then only its root is known.
            let path = path.filter(|p| !p.split('/').any(|part| part == "..")).unwrap_or_default();
            let mut parts: Vec<&str> = path.split('/').filter(|p| !p.is_empty()).collect();
            loop {
                let dir = format!("{mount}/{}", parts.join("/"));
                let limit = self.parse(&format!("{dir}/{limit}"), cgroup_limit).flatten();
                if let Some(limit) = limit {
                    let used: u64 = self.number(&format!("{dir}/{usage}")).unwrap_or(0);
                    let cache = self.start(&format!("{dir}/memory.stat"), TEXT_BYTES_MAX);
                    let cache = cache.map_or(0, |stat| cgroup_cache(&stat));
                    let headroom = limit.saturating_sub(used.saturating_sub(cache));
                    if tightest.is_none_or(|t| headroom < t.headroom) {
                        tightest = Some(CgroupMemory { limit, headroom });
                    }
                }
                if parts.pop().is_none() {
                    break;
                }
            }
        }
        tightest
    }

    fn rdma(&self, name: String) -> Rdma {
        let dir = format!("sys/class/infiniband/{name}");
        let at = |file: &str| format!("{dir}/{file}");
        let interface = self.names(&at("device/net")).into_iter().next();
        let interface = interface.and_then(|net| {
            let mtu = self.number(&at(&format!("device/net/{net}/mtu")))?;
            Some((net, mtu))
        });
        let is_v2 = |slot: &usize| {
            let kind = self.attribute(&at(&format!("ports/1/gid_attrs/types/{slot}")));
            let address = self.attribute(&at(&format!("ports/1/gids/{slot}")));
            kind.is_some_and(|k| k == "RoCE v2")
                && address.is_some_and(|a| a.starts_with("0000:0000:0000:0000:0000:ffff:"))
        };
        let errors = self.attribute(&at("device/aer_dev_fatal"));
        let errors = errors.and_then(|t| t.lines().find_map(|l| l.strip_prefix("TOTAL_ERR_FATAL ")?.parse().ok()));
        Rdma {
            active: self.attribute(&at("ports/1/state")).is_some_and(|state| state.ends_with("ACTIVE")),
            gbits: self.number(&at("ports/1/rate")),
            pcie_gt: self.number(&at("device/current_link_speed")),
            pcie_lanes: self.number(&at("device/current_link_width")),
            interface,
            gid: (0..GIDS_MAX).find(is_v2),
            fatal_errors: errors,
            firmware: self.attribute(&at("fw_ver")),
            name,
        }
    }

    fn nvme(&self, name: String) -> Nvme {
        let at = |file: &str| format!("sys/class/nvme/{name}/{file}");
        Nvme {
            model: self.attribute(&at("model")).unwrap_or_default(),
            pcie_gt: self.number(&at("device/current_link_speed")),
            pcie_lanes: self.number(&at("device/current_link_width")),
            name,
        }
    }

    /// What runs, but for this process. None where nothing can be listed.
    fn processes(&self) -> Option<Processes> {
        let mut found = Processes::default();
        let own = std::process::id();
        let entries = std::fs::read_dir(self.root.join("proc")).ok()?.flatten().take(PROCESSES_MAX);
        for entry in entries {
            let id = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok());
            let Some(id) = id.filter(|id| *id != own) else { continue };
            let Some(name) = self.attribute(&format!("proc/{id}/comm")) else { continue };
            let process = Process { id, name };
            if WATCHDOGS.contains(&process.name.as_str()) {
                found.watchdogs.push(process.clone());
            }
            match std::fs::read_dir(self.root.join(format!("proc/{id}/fd"))) {
                Ok(files) => {
                    let mut targets = files.flatten().take(FILES_MAX).filter_map(|f| std::fs::read_link(f.path()).ok());
                    if targets.any(|target| is_gpu(&target)) {
                        found.gpu.push(process);
                    }
                }
                Err(e) if e.kind() == ErrorKind::PermissionDenied => found.hidden += 1,
                Err(_) => {}
            }
        }
        found.watchdogs.sort_by_key(|p| p.id);
        found.gpu.sort_by_key(|p| p.id);
        Some(found)
    }
}

/// Whether a file is an NVIDIA GPU: `/dev/nvidia0` and so on, not the control devices.
fn is_gpu(file: &Path) -> bool {
    let number = file.to_str().and_then(|f| f.strip_prefix("/dev/nvidia"));
    number.is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A host of the test data.
    pub fn host(name: &str) -> Host {
        Host::read(&Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/hosts")).join(name))
    }

    #[test]
    fn a_gb10_is_read_whole() {
        let host = host("gb10");
        assert_eq!(host.unread, []);
        assert!(host.is_gb10());
        assert_eq!((host.page_bytes, host.kernel.as_deref()), (Some(4096), Some("6.17.0-1029-nvidia")));
        assert_eq!(host.kept_free, Some(45_056 << 10));
        assert_eq!(host.cgroup, None);
        assert_eq!(host.driver.as_ref().map(|d| d.version.as_str()), Some("580.178.04"));
        assert!(host.cmdline.as_ref().unwrap().iter().any(|w| w == "iommu.passthrough=1"));
        let up: Vec<&Rdma> = host.rdma.iter().filter(|r| r.active).collect();
        assert_eq!(up.iter().map(|r| r.name.as_str()).collect::<Vec<_>>(), ["roceP2p1s0f0", "rocep1s0f0"]);
        assert_eq!(
            *up[1],
            Rdma {
                name: "rocep1s0f0".into(),
                active: true,
                gbits: Some(200),
                pcie_gt: Some(32.0),
                pcie_lanes: Some(4),
                interface: Some(("enp1s0f0np0".into(), 9000)),
                gid: Some(3),
                fatal_errors: Some(0),
                firmware: Some("28.45.4028".into()),
            }
        );
        assert_eq!(host.rdma.len(), 4);
        assert_eq!(host.nvme[0].model, "EXAMPLE GEN5 4TB");
        assert_eq!(host.processes, Some(Processes::default()));
    }

    #[test]
    fn a_recorded_machine_without_a_gpu() {
        let host = host("recorded-x86");
        assert_eq!(host.unread, []);
        assert_eq!((host.cgroup, host.driver.clone(), host.gpus.len(), host.rdma.len()), (None, None, 0, 0));
        assert_eq!(host.locked_max, Some(Limit::Bytes(8 << 20)));
    }

    #[test]
    fn what_is_missing_is_unknown_and_what_is_wrong_is_named() {
        assert_eq!(Host::read(Path::new("/nonexistent")), Host::default());
        let temp = std::env::temp_dir().join(format!("dsv4-host-{}", std::process::id()));
        let write = |file: &str, text: &[u8]| {
            let path = temp.join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("proc/meminfo", b"MemTotal: lots kB\n");
        write("proc/version", b"\xff\xfe\0\0");
        write("proc/buddyinfo", &vec![b'N'; 1 << 20]);
        write("proc/self/cgroup", b"0::/a/b\n");
        write("sys/fs/cgroup/a/memory.max", b"1000000\n");
        write("sys/fs/cgroup/a/memory.current", b"400000\n");
        write("sys/fs/cgroup/a/memory.stat", b"inactive_file 100000\nactive_file 50000\n");
        write("sys/fs/cgroup/a/b/memory.max", b"2000000\n");
        write("sys/fs/cgroup/memory.max", b"nonsense\n");
        write("proc/7/comm", b"earlyoom\n");
        write("proc/8/comm", b"python3\n");
        write("proc/9/comm", b"bash\n");
        for (process, target) in [("8", "/dev/nvidia0"), ("9", "/dev/nvidiactl")] {
            std::fs::create_dir_all(temp.join(format!("proc/{process}/fd"))).unwrap();
            std::os::unix::fs::symlink(target, temp.join(format!("proc/{process}/fd/3"))).unwrap();
        }
        let host = Host::read(&temp);
        std::fs::remove_dir_all(&temp).unwrap();
        let mut files: Vec<_> = host.unread.iter().map(|u| u.file.strip_prefix(&temp).unwrap().to_owned()).collect();
        files.sort();
        let expected = ["proc/buddyinfo", "proc/meminfo", "proc/version", "sys/fs/cgroup/memory.max"];
        assert_eq!(files, expected.map(PathBuf::from));
        assert!(host.unread.iter().all(|u| u.found.len() < 80 && !u.expected.is_empty()), "{:?}", host.unread);
        assert_eq!(host.cgroup, Some(CgroupMemory { limit: 1_000_000, headroom: 750_000 }));
        let processes = host.processes.unwrap();
        assert_eq!(processes.watchdogs, [Process { id: 7, name: "earlyoom".into() }]);
        assert_eq!(processes.gpu, [Process { id: 8, name: "python3".into() }]);
    }
}
