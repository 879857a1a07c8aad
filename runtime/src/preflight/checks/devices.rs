//! Rules about devices: driver, kernel, GPU, network card, drives.

use super::{Finding, Level, listed, others};
use crate::preflight::host::{Host, Rdma};
use crate::preflight::report::size;
use crate::preflight::texts::Limit;

/// Largest packet that the link between two machines should take.
const LARGE_PACKET: u64 = 9000;

pub(super) fn driver(host: &Host) -> Vec<Finding> {
    let Some(driver) = &host.driver else {
        let todo = "install the driver (DGX OS: nvidia-driver-580-open), then reboot";
        return vec![Finding::machine(
            "driver.version",
            Level::Refuse,
            "no NVIDIA driver loaded",
            "a loaded driver",
            todo,
        )];
    };
    let version = driver.numbers();
    let kernel = host.kernel.as_deref().unwrap_or_default();
    let mut out = Vec::new();
    let mut bad = |level, expected: &str, todo: &str| {
        let found = format!("driver {}", driver.version);
        out.push(Finding::machine("driver.version", level, found, expected, todo));
    };
    if host.is_gb10() {
        if version <= vec![580, 159, 3] {
            let expected =
                "580.159.04 or newer: this one leaks memory descriptors and faults in long prefills (antirez/ds4 #289)";
            bad(Level::Warn, expected, "update the driver");
        }
        if version == [580, 173, 2] {
            let expected = "another version: NV_ERR_NO_MEMORY with gigabytes free was reported (vllm #56824)";
            bad(Level::Warn, expected, "update the driver if allocations fail");
        }
        if version.starts_with(&[595, 84]) && kernel.starts_with("6.17.0-1032") {
            let expected = "another pair: with kernel 6.17.0-1032 the whole host stops (open-gpu-kernel-modules #1358)";
            bad(Level::Warn, expected, "use a 580 driver");
        }
        if !driver.open {
            let found = format!("driver {} with proprietary modules", driver.version);
            let todo = "install the open modules (DGX OS: nvidia-driver-580-open)";
            let expected = "open kernel modules: the others do not start a GB10";
            out.push(Finding::machine("driver.modules", Level::Refuse, found, expected, todo));
        }
    }
    if out.is_empty() {
        let kind = if driver.open { "open" } else { "proprietary" };
        out.push(Finding::ok("driver.version", format!("driver {}, {kind} modules", driver.version)));
    }
    out
}

pub(super) fn kernel(host: &Host) -> Option<Finding> {
    let release = host.kernel.as_ref()?;
    let handover_off = host.cmdline.as_ref().is_some_and(|words| words.iter().any(|w| w == "kho=off"));
    Some(if release.starts_with("7.0.0-1019-nvidia") && !handover_off {
        let found = format!("kernel {release} without kho=off");
        let expected = "kho=off: its kexec handover area makes long-term pins fail (NV-Kernels #590)";
        let todo = "add kho=off to the kernel's command line and reboot, or use another kernel";
        Finding::machine("kernel.version", Level::Refuse, found, expected, todo)
    } else {
        Finding::ok("kernel.version", format!("kernel {release}"))
    })
}

pub(super) fn pages(host: &Host) -> Option<Finding> {
    let bytes = host.page_bytes?;
    let found = format!("pages of {} KiB", bytes / 1024);
    let major = host.driver.as_ref().and_then(|d| d.numbers().first().copied());
    Some(match major {
        Some(major @ (595 | 610)) if bytes == 65_536 => {
            let found = format!("{found} with driver {major}");
            let expected = "4 KiB pages, or a 580 driver: GPU mappings of 4 GiB fault (open-gpu-kernel-modules #1269)";
            let todo = "boot the kernel without -64k, or install a 580 driver";
            Finding::machine("kernel.pages", Level::Refuse, found, expected, todo)
        }
        _ => Finding::ok("kernel.pages", found),
    })
}

pub(super) fn programs(host: &Host) -> Option<Finding> {
    let users = others(&host.processes.as_ref()?.gpu);
    (!users.is_empty()).then(|| {
        let found = format!("the GPU is also in use by {}", listed(&users));
        let todo = "end these programs; a desktop session costs gigabytes (`systemctl set-default multi-user.target`)";
        Finding::machine("gpu.programs", Level::Warn, found, "the GPU for this program alone", todo)
    })
}

pub(super) fn locked(host: &Host) -> Option<Finding> {
    Some(match host.locked_max? {
        Limit::Unlimited => Finding::ok("limits.memlock", "locked memory is not limited"),
        Limit::Bytes(bytes) => {
            let found = format!("at most {} of locked memory", size(bytes));
            let todo =
                "`ulimit -l unlimited`, or memlock in /etc/security/limits.conf (containers: --ulimit memlock=-1)";
            Finding::machine("limits.memlock", Level::Warn, found, "no limit: RDMA buffers are locked", todo)
        }
    })
}

pub(super) fn network(host: &Host) -> Vec<Finding> {
    const ID: &str = "network.rdma";
    let active: Vec<&Rdma> = host.rdma.iter().filter(|r| r.active).collect();
    if !host.is_gb10() && host.rdma.is_empty() {
        return Vec::new();
    }
    let mut out = Vec::new();
    let mut add = |level, found: String, expected: &str, todo: &str| {
        out.push(Finding::machine(ID, level, found, expected, todo));
    };
    if active.is_empty() {
        let found = format!("none of {} RDMA functions is active", host.rdma.len());
        let todo = "connect the QSFP cable and bring both interfaces up; ranks on one machine need none";
        add(Level::Warn, found, "an active function for each half of the cable", todo);
    }
    if host.is_gb10() && active.len() == 1 {
        let expected = "two: one cable is two PCIe functions, and one alone gives half (12.5 of 23.6 GB/s)";
        add(Level::Warn, format!("only {} is active", active[0].name), expected, "bring the second interface up");
    }
    for r in &active {
        let link = (r.pcie_gt.unwrap_or(32.0), r.pcie_lanes.unwrap_or(4));
        if host.is_gb10() && (link.0 < 32.0 || link.1 < 4) {
            let found = format!("{}: PCIe {} GT/s x{}", r.name, link.0, link.1);
            let todo = "update the firmware (`fwupdmgr update`; before April 2026 it wired x2), then switch off and on";
            add(Level::Refuse, found, "32 GT/s x4", todo);
        }
        if let Some(gbits) = r.gbits.filter(|g| host.is_gb10() && *g < 200) {
            add(Level::Warn, format!("{}: {gbits} Gb/s", r.name), "200 Gb/s", "check the cable and the other end");
        }
        if let Some((interface, mtu)) = r.interface.as_ref().filter(|(_, mtu)| *mtu < LARGE_PACKET) {
            let todo = format!("`ip link set dev {interface} mtu 9000` on both machines");
            add(Level::Warn, format!("{} ({interface}): MTU {mtu}", r.name), "9000", &todo);
        }
        if r.gid.is_none() {
            let todo = "give its interface an IPv4 address; never pin the slot, it moves between starts";
            add(Level::Warn, format!("{}: no RoCE v2 address for IPv4", r.name), "one", todo);
        }
        if let Some(errors) = r.fatal_errors.filter(|n| *n > 0) {
            let todo = "update the card's firmware; such errors have stopped whole machines";
            add(Level::Warn, format!("{}: {errors} fatal PCIe errors", r.name), "none", todo);
        }
    }
    if out.is_empty() {
        let names: Vec<&str> = active.iter().map(|r| r.name.as_str()).collect();
        out.push(Finding::ok(ID, format!("active: {}", names.join(", "))));
    }
    out
}

pub(super) fn drives(host: &Host) -> Vec<Finding> {
    let told = host.nvme.iter().filter_map(|d| {
        let (gt, lanes) = (d.pcie_gt?, d.pcie_lanes?);
        let found = format!("{} {}: PCIe {gt} GT/s x{lanes}", d.name, d.model);
        Some(if gt < 16.0 || lanes < 4 {
            let todo = "seat the drive again, or expect loads to take longer";
            Finding::machine("disk.link", Level::Warn, found, "16 GT/s x4 or more", todo)
        } else {
            Finding::ok("disk.link", found)
        })
    });
    told.collect()
}
