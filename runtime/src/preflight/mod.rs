//! Before any weight byte is read: will it fit, and is this machine known to work?
//!
//! [`host`] reads what the machine says (parsers in [`texts`]), [`memory`] adds up what the ranks
//! need, [`disk`] measures the drive, [`checks`] turns facts into findings, [`report`] prints them,
//! [`command`] takes arguments to all that.
//! Three ways in: [`admit`] guards a start with the memory plan alone, [`check`] looks at an artifact
//! and the machine, [`doctor`] at the machine. Nothing here changes anything.
//!
//! Absent: other ranks' machines (each checks its own), SMART and clocks (they need ioctls or a driver
//! library), an RDMA ping.

pub mod checks;
pub mod command;
pub mod disk;
pub mod host;
pub mod memory;
pub mod report;
#[cfg(test)]
mod rules_tests;
pub mod texts;

use std::time::Duration;

use dsv4_format::FormatError;

use crate::error::RunError;
use crate::load::Opened;
use checks::{About, Finding, Level};
use host::Host;
use memory::{Asked, Plan, Ranks, Target, plan};
use report::{ArtifactFacts, Report};

/// How long the disk is measured.
const PROBE_WITHIN: Duration = Duration::from_millis(500);

/// The ranks that run on this machine: all without `peers`, else this one and those at the same host name.
pub fn ranks_here(tp: u32, rank: Option<u32>, peers: &[String]) -> Vec<u32> {
    let Some(rank) = rank else { return (0..tp).collect() };
    let host = |peer: &String| peer.rsplit_once(':').map_or(peer.clone(), |(host, _)| host.to_owned());
    let own = peers.get(rank as usize).map(host);
    (0..tp).filter(|r| *r == rank || (own.is_some() && peers.get(*r as usize).map(host) == own)).collect()
}

/// The memory plan of the ranks `here` of an artifact. Errors: a rank that the artifact does not have, or that cannot
/// have its part of the model.
pub fn memory_plan(opened: &Opened, here: &[u32], asked: &Asked, host: &Host) -> Result<Plan, RunError> {
    let weights: Result<Vec<(u32, u64)>, RunError> =
        here.iter().map(|rank| Ok((*rank, opened.artifact.arena_bytes(*rank)?))).collect();
    let weights = weights?;
    let ranks = Ranks { config: &opened.config, tp: opened.artifact.manifest().tp, here: &weights };
    Ok(plan(&ranks, asked, host)?)
}

/// Refuses a start that does not fit into memory; a reserve of 0 asks for no such guard.
///
/// Errors: [`RunError::DoesNotFit`] with the whole table.
pub fn admit(opened: &Opened, here: &[u32], asked: &Asked, host: &Host) -> Result<(), RunError> {
    if asked.reserve == Some(0) {
        return Ok(());
    }
    let plan = memory_plan(opened, here, asked, host)?;
    if plan.fits() {
        return Ok(());
    }
    Err(RunError::DoesNotFit {
        needed: report::size(plan.needed),
        usable: report::size(plan.supply.map_or(0, |s| s.usable)),
        table: report::table(&plan),
        help: checks::what_fits(&plan),
    })
}

/// Looks at an artifact that could be opened, and at the machine. `here` are the ranks that would run on it.
///
/// Errors: a rank that the artifact does not have.
pub fn check(opened: &Opened, here: &[u32], asked: &Asked, host: Host) -> Result<Report, RunError> {
    let artifact = &opened.artifact;
    let manifest = artifact.manifest();
    let plan = memory_plan(opened, here, asked, &host)?;
    let mut findings = vec![match artifact.weights_seed() {
        Some(seed) => {
            let error = FormatError::Weightless { path: artifact.path().to_path_buf(), seed };
            Finding::refused("files.ranks", &error.into(), "weights")
        }
        None => checks::files(artifact.present_ranks(), here),
    }];
    let load_bytes = here.iter().filter_map(|r| artifact.arena_bytes(*r).ok()).sum();
    let first = here.iter().find(|r| artifact.has_rank(**r));
    let mut disk = None;
    if let Some(rank) = first {
        match disk::probe(&artifact.rank_path(*rank), PROBE_WITHIN) {
            Ok(probe) => {
                findings.extend(checks::disk(&probe, load_bytes, &host));
                disk = Some((probe, load_bytes));
            }
            Err(error) => findings.push(Finding {
                id: "disk.read",
                level: Level::Refuse,
                about: About::Files,
                found: error.to_string(),
                expected: "a file that can be read".into(),
                todo: "see the message".into(),
            }),
        }
    }
    findings.push(checks::memory(&plan));
    findings.extend(checks::gpu_memory(&plan, &host));
    findings.extend(checks::host(&host, asked.target != Target::Cpu));
    let artifact = ArtifactFacts {
        path: artifact.path().display().to_string(),
        artifact_id: manifest.artifact_id.to_string(),
        weight_set_id: manifest.weight_set_id.to_string(),
        tp: manifest.tp,
        here: here.to_vec(),
    };
    Ok(Report { artifact: Some(artifact), plan: Some(plan), disk, host, findings })
}

/// Looks at the machine alone; its GPU counts where there is one.
pub fn doctor(host: Host) -> Report {
    let gpu = !host.gpus.is_empty() || host.driver.is_some();
    let mut findings = Vec::new();
    if let Some(m) = &host.memory {
        let sizes = [m.total, m.free, m.available.unwrap_or(m.free)].map(report::size);
        let found = format!("{} in all, {} free, {} available", sizes[0], sizes[1], sizes[2]);
        findings.push(Finding::ok("memory.size", found));
    }
    let gpus = if gpu { host.gpus.join(", ") } else { "none: the CPU backend computes".into() };
    findings.push(Finding::ok("gpu.model", if gpus.is_empty() { "a driver without a GPU".into() } else { gpus }));
    findings.extend(checks::host(&host, gpu));
    Report { artifact: None, plan: None, disk: None, host, findings }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_of_this_machine() {
        let peers = ["a:1", "b:1", "a:2", "c:1"].map(String::from);
        assert_eq!(ranks_here(4, None, &[]), [0, 1, 2, 3]);
        assert_eq!(ranks_here(4, Some(0), &peers), [0, 2]);
        assert_eq!(ranks_here(4, Some(1), &peers), [1]);
        assert_eq!(ranks_here(2, Some(1), &[]), [1]);
    }
}
