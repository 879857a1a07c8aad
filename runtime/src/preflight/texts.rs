//! Parsers of the texts that kernel and driver show under /proc and /sys.
//!
//! Each takes one text and gives facts, or says what is wrong with it. None reads a file; none
//! trusts a length or a number.

/// A text that is not what it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Malformed {
    /// What the text should have had.
    pub expected: String,
    /// What it had.
    pub found: String,
}

fn malformed(expected: impl Into<String>, found: &str) -> Malformed {
    let mut short: String = found.chars().take(60).collect();
    if short.len() < found.len() {
        short += "...";
    }
    Malformed { expected: expected.into(), found: if short.is_empty() { "nothing".into() } else { short } }
}

/// Largest allocation order that a kernel may have.
const ORDERS_MAX: usize = 32;
/// Numbers of a version that count.
const VERSION_PARTS_MAX: usize = 6;

/// `/proc/meminfo`, bytes. What an older kernel does not tell is 0, or none where 0 would be a statement.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Meminfo {
    pub total: u64,
    pub free: u64,
    pub available: Option<u64>,
    pub buffers: u64,
    pub cached: u64,
    pub swap_cached: u64,
    pub swap_total: u64,
    pub swap_free: u64,
    pub anon: u64,
    pub slab_reclaimable: u64,
    pub slab_unreclaimable: u64,
    pub kernel_stack: u64,
    pub page_tables: u64,
    pub sec_page_tables: u64,
    pub percpu: u64,
    pub balloon: u64,
    pub hugetlb: u64,
    pub cma_total: u64,
    pub cma_free: u64,
}

impl Meminfo {
    /// Parses the file. Errors: no MemTotal or MemFree, a number that is none.
    pub fn parse(text: &str) -> Result<Meminfo, Malformed> {
        let mut m = Meminfo::default();
        let (mut total, mut free) = (None, None);
        for line in text.lines() {
            let Some((name, value)) = line.split_once(':') else { continue };
            let place = match name {
                "MemTotal" => total.insert(0),
                "MemFree" => free.insert(0),
                "MemAvailable" => m.available.insert(0),
                "Buffers" => &mut m.buffers,
                "Cached" => &mut m.cached,
                "SwapCached" => &mut m.swap_cached,
                "SwapTotal" => &mut m.swap_total,
                "SwapFree" => &mut m.swap_free,
                "AnonPages" => &mut m.anon,
                "SReclaimable" => &mut m.slab_reclaimable,
                "SUnreclaim" => &mut m.slab_unreclaimable,
                "KernelStack" => &mut m.kernel_stack,
                "PageTables" => &mut m.page_tables,
                "SecPageTables" => &mut m.sec_page_tables,
                "Percpu" => &mut m.percpu,
                "Balloon" => &mut m.balloon,
                "Hugetlb" => &mut m.hugetlb,
                "CmaTotal" => &mut m.cma_total,
                "CmaFree" => &mut m.cma_free,
                _ => continue,
            };
            *place = kib(value).ok_or_else(|| malformed(format!("{name} in kB"), line))?;
        }
        m.total = total.ok_or_else(|| malformed("MemTotal", ""))?;
        m.free = free.ok_or_else(|| malformed("MemFree", ""))?;
        Ok(m)
    }

    /// Memory that no counter accounts for: what a driver has taken page by page (also for a running program).
    pub fn unaccounted(&self) -> u64 {
        // Cached holds the shared memory, AnonPages does not.
        let known = [
            self.free,
            self.buffers,
            self.cached,
            self.swap_cached,
            self.anon,
            self.slab_reclaimable,
            self.slab_unreclaimable,
            self.kernel_stack,
            self.page_tables,
            self.sec_page_tables,
            self.percpu,
            self.balloon,
            self.hugetlb,
        ];
        known.iter().fold(self.total, |rest, part| rest.saturating_sub(*part))
    }

    /// Free pages of the contiguous allocator beyond those it was given at boot: not for long-term pins.
    pub fn cma_excess(&self) -> u64 {
        self.cma_free.saturating_sub(self.cma_total)
    }
}

/// `N kB` as bytes.
fn kib(text: &str) -> Option<u64> {
    let number = text.trim().strip_suffix("kB")?.trim();
    number.parse::<u64>().ok()?.checked_mul(1024)
}

/// One line of `/proc/buddyinfo`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Zone {
    /// Memory node.
    pub node: u32,
    /// Name, such as Normal.
    pub name: String,
    /// Free blocks of 2^index pages.
    pub blocks: Vec<u64>,
}

/// Parses `/proc/buddyinfo`. Errors: a line of another form.
pub fn buddyinfo(text: &str) -> Result<Vec<Zone>, Malformed> {
    let zone = |line: &str| {
        let mut words = line.split_whitespace();
        let node = words.next().filter(|w| *w == "Node").and_then(|_| words.next()?.strip_suffix(',')?.parse().ok())?;
        let name = words.next().filter(|w| *w == "zone").and_then(|_| words.next())?.to_owned();
        let blocks: Vec<u64> = words.map(|w| w.parse().ok()).collect::<Option<_>>()?;
        (1..=ORDERS_MAX).contains(&blocks.len()).then_some(Zone { node, name, blocks })
    };
    let lines = text.lines().filter(|l| !l.trim().is_empty());
    lines.map(|l| zone(l).ok_or_else(|| malformed("Node N, zone NAME and counts of free blocks", l))).collect()
}

/// Free bytes in blocks of at least `least` bytes.
pub fn free_in_blocks(zones: &[Zone], page_bytes: u64, least: u64) -> u64 {
    let of_zone = |zone: &Zone| {
        let blocks = zone.blocks.iter().enumerate().map(|(order, count)| {
            let bytes = page_bytes.checked_shl(order as u32).unwrap_or(u64::MAX);
            if bytes >= least { count.saturating_mul(bytes) } else { 0 }
        });
        blocks.fold(0, u64::saturating_add)
    };
    zones.iter().map(of_zone).fold(0, u64::saturating_add)
}

/// One line of `/proc/swaps`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Swap {
    /// File or device.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// Bytes in use.
    pub used: u64,
}

/// Parses `/proc/swaps`. Errors: a line of another form.
pub fn swaps(text: &str) -> Result<Vec<Swap>, Malformed> {
    let swap = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [name, _kind, size, used, _priority] = words[..] else { return None };
        let bytes = |n: &str| n.parse::<u64>().ok()?.checked_mul(1024);
        Some(Swap { name: name.to_owned(), size: bytes(size)?, used: bytes(used)? })
    };
    let lines = text.lines().skip(1).filter(|l| !l.trim().is_empty());
    lines.map(|l| swap(l).ok_or_else(|| malformed("name, type, size, used, priority", l))).collect()
}

/// The kernel's release in `/proc/version`, such as `6.17.0-1029-nvidia`. Errors: another text.
pub fn kernel_release(text: &str) -> Result<String, Malformed> {
    let release = text.strip_prefix("Linux version ").and_then(|rest| rest.split_whitespace().next());
    release.map(str::to_owned).ok_or_else(|| malformed("Linux version RELEASE", text))
}

/// The NVIDIA driver in `/proc/driver/nvidia/version`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Driver {
    /// Such as `580.159.04`.
    pub version: String,
    /// Whether its kernel modules are the open ones.
    pub open: bool,
}

impl Driver {
    /// Parses the file. Errors: no version in its first line.
    pub fn parse(text: &str) -> Result<Driver, Malformed> {
        let line = text.lines().next().unwrap_or_default();
        let is_version = |w: &&str| w.contains('.') && w.split('.').all(|n| n.parse::<u32>().is_ok());
        let version = line.starts_with("NVRM version:").then(|| line.split_whitespace().find(is_version)).flatten();
        let version = version.ok_or_else(|| malformed("NVRM version: ... N.N.N", line))?;
        Ok(Driver { version: version.to_owned(), open: line.contains("Open Kernel Module") })
    }

    /// The numbers of the version, for comparison.
    pub fn numbers(&self) -> Vec<u32> {
        self.version.split('.').take(VERSION_PARTS_MAX).map(|n| n.parse().unwrap_or(0)).collect()
    }
}

/// The model in a `/proc/driver/nvidia/gpus/*/information`. Errors: none named.
pub fn gpu_model(text: &str) -> Result<String, Malformed> {
    let model = text.lines().find_map(|l| l.strip_prefix("Model:"));
    model.map(|m| m.trim().to_owned()).filter(|m| !m.is_empty()).ok_or_else(|| malformed("Model: NAME", text))
}

/// A limit of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// None.
    Unlimited,
    /// So many bytes.
    Bytes(u64),
}

/// The soft limit of locked memory in `/proc/self/limits`. Errors: no such line.
pub fn locked_max(text: &str) -> Result<Limit, Malformed> {
    let line = text.lines().find_map(|l| l.strip_prefix("Max locked memory"));
    let soft = line.and_then(|l| l.split_whitespace().next());
    match soft {
        Some("unlimited") => Ok(Limit::Unlimited),
        Some(n) => n.parse().map(Limit::Bytes).map_err(|_| malformed("Max locked memory: a number of bytes", n)),
        None => Err(malformed("a line Max locked memory", text)),
    }
}

/// The page size in `/proc/self/smaps`, bytes. Errors: no such line.
pub fn page_bytes(text: &str) -> Result<u64, Malformed> {
    let line = text.lines().find_map(|l| l.strip_prefix("KernelPageSize:"));
    let bytes = line.and_then(kib).filter(|bytes| bytes.is_power_of_two());
    bytes.ok_or_else(|| malformed("KernelPageSize: a power of two in kB", line.unwrap_or_default()))
}

/// Where `/proc/self/cgroup` says this process is counted: version 2 path, version 1 memory path.
pub fn cgroup_paths(text: &str) -> (Option<String>, Option<String>) {
    let (mut unified, mut memory) = (None, None);
    for line in text.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(id), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        if id == "0" && controllers.is_empty() {
            unified = Some(path.to_owned());
        } else if controllers.split(',').any(|c| c == "memory") {
            memory = Some(path.to_owned());
        }
    }
    (unified, memory)
}

/// A cgroup's limit: bytes, or none. Errors: neither a number nor `max`.
pub fn cgroup_limit(text: &str) -> Result<Option<u64>, Malformed> {
    // Version 1 writes the largest multiple of a page for "none".
    const NONE: u64 = 1 << 60;
    match text.trim() {
        "max" => Ok(None),
        n => n.parse().map(|n: u64| (n < NONE).then_some(n)).map_err(|_| malformed("max, or a number of bytes", n)),
    }
}

/// Cached file bytes in a `memory.stat`: what a cgroup gives back when it needs memory.
pub fn cgroup_cache(text: &str) -> u64 {
    let value = |name: &str| {
        let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|n| n.trim().parse::<u64>().ok())
    };
    // Version 1 has the sums of the whole subtree under another name.
    let of = |name: &str| value(&format!("total_{name}")).or_else(|| value(name)).unwrap_or(0);
    of("inactive_file").saturating_add(of("active_file"))
}

#[cfg(test)]
mod tests {
    use super::*;

    macro_rules! host {
        ($path:literal) => {
            include_str!(concat!("../../../tests/hosts/", $path))
        };
    }

    #[test]
    fn meminfo_of_recorded_and_composed_hosts() {
        let m = Meminfo::parse(host!("recorded-h100/proc/meminfo")).unwrap();
        assert_eq!((m.total, m.free), (131_981_020 << 10, 130_684_708 << 10));
        assert_eq!((m.available, m.percpu, m.cma_free), (Some(131_481_272 << 10), 4_480 << 10, 0));
        assert_eq!(m.unaccounted(), 229_336 << 10);
        let m = Meminfo::parse(host!("recorded-x86/proc/meminfo")).unwrap();
        assert_eq!(m.total, 24_684_084 << 10);
        assert!(m.unaccounted() < 1 << 30, "{}", m.unaccounted());
        let m = Meminfo::parse(host!("gb10/proc/meminfo")).unwrap();
        assert_eq!(m.unaccounted(), 2_508_400 << 10);
        assert_eq!((m.swap_total, m.cma_excess()), (16_777_212 << 10, 0));
        let m = Meminfo::parse(host!("gb10-kho/proc/meminfo")).unwrap();
        assert_eq!(m.cma_excess(), (9_817_088 - 65_536) << 10);
        let m = Meminfo::parse(host!("gb10-held/proc/meminfo")).unwrap();
        assert_eq!(m.unaccounted() >> 30, 101);
    }

    #[test]
    fn meminfo_that_is_none() {
        for (text, expected) in [
            ("", "MemTotal"),
            ("MemTotal: 12 kB\n", "MemFree"),
            ("MemTotal: many kB\nMemFree: 1 kB\n", "MemTotal in kB"),
            ("MemTotal: 18446744073709551615 kB\nMemFree: 1 kB\n", "MemTotal in kB"),
            ("MemTotal: 12\nMemFree: 1 kB\n", "MemTotal in kB"),
        ] {
            assert_eq!(Meminfo::parse(text).unwrap_err().expected, expected);
        }
        // More known than there is: no underflow.
        let m = Meminfo::parse("MemTotal: 1 kB\nMemFree: 1 kB\nCached: 5 kB\n").unwrap();
        assert_eq!((m.unaccounted(), m.available), (0, None));
    }

    #[test]
    fn buddyinfo_counts_large_blocks() {
        let zones = buddyinfo(host!("recorded-h100/proc/buddyinfo")).unwrap();
        let names: Vec<&str> = zones.iter().map(|z| z.name.as_str()).collect();
        assert_eq!(names, ["DMA", "DMA32", "Normal"]);
        assert_eq!(zones[2].blocks, [27, 64, 62, 26, 40, 33, 18, 7, 7, 10, 26]);
        // 1 + 0 + 10 blocks of 2 MiB, 3 + 753 + 26 of 4 MiB.
        assert_eq!(free_in_blocks(&zones, 4096, 2 << 20), (11 * 2 + 782 * 4) << 20);
        let zones = buddyinfo(host!("gb10-fragmented/proc/buddyinfo")).unwrap();
        assert_eq!(free_in_blocks(&zones, 4096, 2 << 20), (14 * 2 + 4 * 4) << 20);
        // Pages of 64 KiB: order 5 is 2 MiB.
        let zones = buddyinfo(host!("gb10-64k/proc/buddyinfo")).unwrap();
        assert_eq!(zones[1].blocks.len(), 14);
        assert_eq!(
            free_in_blocks(&zones[..1], 65_536, 2 << 20),
            (4 * 2 + 3 * 4 + 2 * 8 + 16 + 32 + 2 * 64 + 128 + 256 + 3 * 512) << 20
        );
        assert_eq!(
            free_in_blocks(&[Zone { node: 0, name: "x".into(), blocks: vec![u64::MAX; 32] }], 1 << 40, 1),
            u64::MAX
        );
        assert_eq!(buddyinfo("").unwrap(), []);
        for bad in ["Node 0 zone DMA 1", "Node 0, zone DMA", "Node 0, zone DMA 1 -2", "Node x, zone DMA 1"] {
            assert_eq!(buddyinfo(bad).unwrap_err().found, bad);
        }
        assert!(buddyinfo(&format!("Node 0, zone DMA{}", " 1".repeat(33))).is_err());
    }

    #[test]
    fn swaps_and_limits() {
        assert_eq!(swaps(host!("recorded-x86/proc/swaps")).unwrap(), []);
        let found = swaps(host!("gb10/proc/swaps")).unwrap();
        assert_eq!(found, [Swap { name: "/swap.img".into(), size: 16_777_212 << 10, used: 0 }]);
        assert!(swaps("Filename\n/a file many 0 -2\n").is_err());
        assert_eq!(locked_max(host!("recorded-x86/proc/self/limits")), Ok(Limit::Bytes(8_388_608)));
        assert_eq!(locked_max(host!("gb10/proc/self/limits")), Ok(Limit::Unlimited));
        assert!(locked_max("Max locked memory  some  some bytes").is_err());
        assert!(locked_max("").is_err());
    }

    #[test]
    fn kernel_driver_and_pages() {
        assert_eq!(kernel_release(host!("recorded-x86/proc/version")).unwrap(), "6.18.44");
        assert_eq!(kernel_release(host!("gb10-kho/proc/version")).unwrap(), "7.0.0-1019-nvidia");
        assert!(kernel_release("Darwin 1").is_err());
        let driver = Driver::parse(host!("recorded-h100/proc/driver/nvidia/version")).unwrap();
        assert_eq!(driver, Driver { version: "580.159.04".into(), open: true });
        assert_eq!(driver.numbers(), [580, 159, 4]);
        let closed = "NVRM version: NVIDIA UNIX aarch64 Kernel Module  580.173.02  Tue Jul 21 09:46:53 UTC 2026\n";
        assert_eq!(Driver::parse(closed).unwrap(), Driver { version: "580.173.02".into(), open: false });
        assert!(Driver::parse("NVRM version: none\n").is_err());
        assert_eq!(gpu_model(host!("gb10/proc/driver/nvidia/gpus/000f:01:00.0/information")).unwrap(), "NVIDIA GB10");
        assert!(gpu_model("Model:   \n").is_err());
        assert_eq!(page_bytes(host!("recorded-x86/proc/self/smaps")), Ok(4096));
        assert_eq!(page_bytes(host!("gb10-64k/proc/self/smaps")), Ok(65_536));
        assert!(page_bytes("KernelPageSize: 3 kB\n").is_err());
    }

    #[test]
    fn cgroups_of_both_versions() {
        let v1 = (Some("/".into()), Some("/session/0001".into()));
        assert_eq!(cgroup_paths(host!("recorded-x86/proc/self/cgroup")), v1);
        let v2 = (Some("/user.slice/user-1000.slice/session-3.scope".into()), None);
        assert_eq!(cgroup_paths(host!("gb10/proc/self/cgroup")), v2);
        assert_eq!(cgroup_paths("x"), (None, None));
        assert_eq!(cgroup_limit("max\n"), Ok(None));
        assert_eq!(cgroup_limit("9223372036854771712\n"), Ok(None));
        assert_eq!(cgroup_limit("8589934592\n"), Ok(Some(8 << 30)));
        assert!(cgroup_limit("8G").is_err());
        assert_eq!(cgroup_cache("anon 5\ninactive_file 7\nactive_file 11\n"), 18);
        assert_eq!(cgroup_cache("inactive_file 7\ntotal_inactive_file 70\ntotal_active_file 11\n"), 81);
        assert_eq!(cgroup_cache("inactive_file x"), 0);
    }
}
