//! A preflight's result, for people and for programs.

use std::fmt::Write;

use serde_json::{Value, json};

use crate::preflight::checks::{About, Finding, Level};
use crate::preflight::disk::DiskProbe;
use crate::preflight::host::Host;
use crate::preflight::memory::{Plan, Target};
use crate::preflight::texts::Limit;

/// Exit code of a refusal for the artifact's files.
pub const FILES: u8 = 3;
/// Exit code of a refusal for memory or the machine.
pub const MACHINE: u8 = 4;

/// Which artifact was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArtifactFacts {
    /// Its directory.
    pub path: String,
    /// Its id.
    pub artifact_id: String,
    /// Id of its weights.
    pub weight_set_id: String,
    /// Ranks it was packed for.
    pub tp: u32,
    /// Ranks that run on this machine.
    pub here: Vec<u32>,
}

/// Everything that was found.
#[derive(Clone, Debug)]
pub struct Report {
    /// None for a host alone.
    pub artifact: Option<ArtifactFacts>,
    /// The memory plan.
    pub plan: Option<Plan>,
    /// The disk probe and the bytes to read.
    pub disk: Option<(DiskProbe, u64)>,
    /// The machine.
    pub host: Host,
    /// All findings.
    pub findings: Vec<Finding>,
}

impl Report {
    /// The gravest finding's level.
    pub fn level(&self) -> Level {
        self.findings.iter().map(|f| f.level).max().unwrap_or(Level::Ok)
    }

    /// What refuses.
    pub fn refusals(&self) -> impl Iterator<Item = &Finding> {
        self.findings.iter().filter(|f| f.level == Level::Refuse)
    }

    /// 0; 3 if files are wrong; 4 if memory or the machine is.
    pub fn exit_code(&self) -> u8 {
        let codes = self.refusals().map(|f| if f.about == About::Files { FILES } else { MACHINE });
        codes.min().unwrap_or(0)
    }

    /// For programs: one object. Sizes are bytes.
    pub fn to_json(&self) -> Value {
        let verdict = match self.level() {
            Level::Refuse => "refused",
            Level::Warn => "ok with warnings",
            Level::Ok => "ok",
        };
        let findings = self.findings.iter().map(
            |f| json!({"id": f.id, "level": f.level.name(), "found": f.found, "expected": f.expected, "todo": f.todo}),
        );
        json!({
            "verdict": verdict,
            "exit_code": self.exit_code(),
            "artifact": self.artifact.as_ref().map(|a| json!({
                "path": a.path, "artifact_id": a.artifact_id, "weight_set_id": a.weight_set_id, "tp": a.tp, "ranks": a.here,
            })),
            "memory": self.plan.as_ref().map(plan_json),
            "disk": self.disk.as_ref().map(|(probe, bytes)| json!({
                "file_bytes": probe.file_bytes, "read_bytes": probe.read_bytes, "bytes_per_second": probe.rate(),
                "readers": probe.readers, "direct": probe.direct, "load_bytes": bytes,
                "expected_seconds": probe.expected_seconds(*bytes), "telling": probe.is_telling(),
            })),
            "host": host_json(&self.host),
            "findings": findings.collect::<Vec<_>>(),
        })
    }

    /// For people.
    pub fn to_text(&self) -> String {
        let mut out = String::new();
        if let Some(a) = &self.artifact {
            let _ = writeln!(
                out,
                "{}\n  artifact {}, packed for {} ranks, here {:?}\n",
                a.path, a.artifact_id, a.tp, a.here
            );
        }
        if let Some(plan) = &self.plan {
            let _ = writeln!(out, "{}", table(plan));
        }
        for f in &self.findings {
            let _ = writeln!(out, "{:<7}{:<20}{}", f.level.name(), f.id, f.found);
            if !f.expected.is_empty() {
                let _ = writeln!(out, "{:<27}expected: {}", "", f.expected);
            }
            if !f.todo.is_empty() {
                let _ = writeln!(out, "{:<27}to do: {}", "", f.todo);
            }
        }
        let count = |level| self.findings.iter().filter(|f| f.level == level).count();
        let (refused, warned) = (count(Level::Refuse), count(Level::Warn));
        let verdict = if refused > 0 { "REFUSED" } else { "OK" };
        let _ = writeln!(out, "\n{verdict}: {refused} refuse, {warned} warn, {} ok", count(Level::Ok));
        out
    }
}

/// The memory table for people: a column for each rank, then the sum against what there is.
pub fn table(plan: &Plan) -> String {
    let mut out = String::new();
    let asked = &plan.asked;
    let _ = writeln!(
        out,
        "memory, {} backend, {} numerics: {} tokens of context, {} sequence(s), chunks of {}",
        asked.target.name(),
        asked.numerics.name(),
        asked.context,
        asked.sequences,
        asked.chunk
    );
    let _ = write!(out, "  {:<18}", "");
    for table in &plan.ranks {
        let _ = write!(out, "{:>14}", format!("rank {}", table.rank));
    }
    let lines = plan.ranks.first().map(|t| t.lines.as_slice()).unwrap_or_default();
    for (i, line) in lines.iter().enumerate() {
        let _ = write!(out, "\n  {:<18}", line.what);
        for table in &plan.ranks {
            let _ = write!(out, "{:>14}", table.lines.get(i).map_or(String::new(), |l| size(l.bytes)));
        }
        let _ = write!(out, "  {}", line.basis.name());
    }
    let row =
        |name: &str, bytes: u64, note: &str| format!("\n  {name:<18}{:>14}  {note}", size(bytes)).trim_end().to_owned();
    let ranks = plan.needed.saturating_sub(plan.reserve);
    out += &format!("\n{}", row("all ranks here", ranks, "").trim_start_matches('\n'));
    out += &row("left to others", plan.reserve, "--reserve");
    out += &row("needed", plan.needed, "");
    if let Some(s) = plan.supply {
        let whose = if asked.target == Target::Card { "GPU" } else { "machine" };
        let note = format!("{}; the {whose} has {}", s.basis, size(s.total));
        out += &row("usable", s.usable, &note);
        let (name, bytes) =
            if plan.fits() { ("to spare", s.usable - plan.needed) } else { ("MISSING", plan.missing()) };
        out += &row(name, bytes, "");
    }
    out += &match plan.context_max {
        None => "\n  no context fits".to_owned(),
        Some(context) => format!("\n  largest context that fits: {context} of the model's {}", plan.context_model),
    };
    out.push('\n');
    out
}

fn plan_json(plan: &Plan) -> Value {
    let ranks = plan.ranks.iter().map(|t| {
        let lines = t.lines.iter().map(|l| json!({"what": l.what, "bytes": l.bytes, "basis": l.basis.name()}));
        json!({"rank": t.rank, "bytes": t.bytes(), "lines": lines.collect::<Vec<_>>()})
    });
    json!({
        "backend": plan.asked.target.name(),
        "numerics": plan.asked.numerics.name(),
        "context": plan.asked.context,
        "sequences": plan.asked.sequences,
        "chunk": plan.asked.chunk,
        "ranks": ranks.collect::<Vec<_>>(),
        "reserve_bytes": plan.reserve,
        "needed_bytes": plan.needed,
        "usable_bytes": plan.supply.map(|s| s.usable),
        "usable_basis": plan.supply.map(|s| s.basis),
        "fits": plan.fits(),
        "missing_bytes": plan.missing(),
        "max_context": plan.context_max,
        "model_context": plan.context_model,
    })
}

fn host_json(host: &Host) -> Value {
    let m = host.memory.as_ref();
    json!({
        "mem_total": m.map(|m| m.total),
        "mem_free": m.map(|m| m.free),
        "mem_available": m.and_then(|m| m.available),
        "unaccounted": m.map(|m| m.unaccounted()),
        "swap_total": m.map(|m| m.swap_total),
        "swap_free": m.map(|m| m.swap_free),
        "cma_total": m.map(|m| m.cma_total),
        "cma_free": m.map(|m| m.cma_free),
        "cgroup_limit": host.cgroup.map(|c| c.limit),
        "cgroup_headroom": host.cgroup.map(|c| c.headroom),
        "page_bytes": host.page_bytes,
        "kernel": host.kernel,
        "driver": host.driver.as_ref().map(|d| json!({"version": d.version, "open": d.open})),
        "gpus": host.gpus,
        "memlock_bytes": host.locked_max.map(|l| match l {
            Limit::Unlimited => Value::from("unlimited"),
            Limit::Bytes(bytes) => bytes.into(),
        }),
        "rdma": host.rdma.iter().map(|r| json!({
            "name": r.name, "active": r.active, "gbits": r.gbits, "pcie_gt": r.pcie_gt, "pcie_lanes": r.pcie_lanes,
            "interface": r.interface.as_ref().map(|i| &i.0), "mtu": r.interface.as_ref().map(|i| i.1), "gid": r.gid,
            "fatal_errors": r.fatal_errors, "firmware": r.firmware,
        })).collect::<Vec<_>>(),
        "nvme": host.nvme.iter().map(|d| json!({
            "name": d.name, "model": d.model, "pcie_gt": d.pcie_gt, "pcie_lanes": d.pcie_lanes,
        })).collect::<Vec<_>>(),
    })
}

/// Bytes for people.
pub fn size(bytes: u64) -> String {
    let value = bytes as f64;
    match bytes {
        0..1024 => format!("{bytes} B"),
        1024..0x10_0000 => format!("{:.1} KiB", value / 1024.0),
        0x10_0000..0x4000_0000 => format!("{:.1} MiB", value / 1_048_576.0),
        _ => format!("{:.2} GiB", value / 1_073_741_824.0),
    }
}
