//! The verbs `check` and `doctor`, and the guard of the verbs that load: from arguments to a verdict.

use std::path::Path;

use dsv4_model::Tp;
use serde_json::json;

use crate::cli::{Backend, CheckArgs, Common, DoctorArgs};
use crate::compute::{Compute, choose, cuda};
use crate::error::RunError;
use crate::gpu::require_kernels;
use crate::load::{Opened, open};
use crate::preflight::checks::Finding;
use crate::preflight::host::Host;
use crate::preflight::memory::{Asked, Target};
use crate::preflight::report::Report;
use crate::preflight::{admit, check, doctor, memory_plan, ranks_here};
use crate::terminal::print_now;

/// The machine this program runs on.
const ROOT: &str = "/";
/// What a GPU backend needs.
const GPU_EXPECTED: &str = "a GPU that this artifact has kernels for";

fn here(opened: &Opened, common: &Common) -> Result<Vec<u32>, RunError> {
    let tp = opened.artifact.manifest().tp;
    if let Some(rank) = common.rank.filter(|rank| *rank >= tp) {
        let what = format!("--rank {rank}: expected a rank below {tp}\n  help: ranks are counted from 0");
        return Err(RunError::Usage(what));
    }
    Ok(ranks_here(tp, common.rank, &common.peers))
}

fn asked(common: &Common, compute: &Compute, context: usize, ranks: usize) -> Asked {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = common.threads.map_or(cores, usize::from).div_ceil(ranks.max(1));
    Asked {
        target: compute.target(),
        context: context as u64,
        sequences: 1,
        chunk: compute.chunk(common.chunk).into(),
        threads: threads as u64,
        numerics: common.numerics.into(),
        all_logits: false,
        reserve: common.reserve,
    }
}

/// Refuses a start whose `sequences` of `tokens` tokens do not fit into this machine's memory.
///
/// Errors: [`RunError::DoesNotFit`].
pub fn admit_start(
    opened: &Opened,
    common: &Common,
    compute: &Compute,
    tokens: usize,
    sequences: usize,
    all_logits: bool,
) -> Result<(), RunError> {
    let here = here(opened, common)?;
    let asked = Asked { all_logits, sequences: sequences as u64, ..asked(common, compute, tokens, here.len()) };
    admit(opened, &compute.sharing(&here), &asked, &compute.host(Path::new(ROOT)))
}

/// Tokens of the longest sequence, up to `most`, of which `sequences` fit into this machine's memory; none if not even
/// short ones do.
pub fn largest_start(
    opened: &Opened,
    common: &Common,
    compute: &Compute,
    most: usize,
    sequences: usize,
) -> Result<Option<usize>, RunError> {
    let here = here(opened, common)?;
    let asked = Asked { sequences: sequences as u64, ..asked(common, compute, most, here.len()) };
    let plan = memory_plan(opened, &compute.sharing(&here), &asked, &compute.host(Path::new(ROOT)))?;
    if plan.fits() || asked.reserve == Some(0) {
        return Ok(Some(most));
    }
    Ok(plan.context_max.map(|tokens| most.min(usize::try_from(tokens).unwrap_or(most))))
}

/// `check`: the report on standard output. Errors: what refuses, also an artifact that cannot be opened.
pub fn run_check(artifact: &Path, args: &CheckArgs) -> Result<(), RunError> {
    let opened = match open(artifact) {
        Ok(opened) => opened,
        Err(error) => {
            if args.json {
                let code = error.exit_code();
                print_now(&format!(
                    "{}\n",
                    json!({"verdict": "refused", "exit_code": code, "error": error.to_string()})
                ))?;
            }
            return Err(error);
        }
    };
    let here = here(&opened, &args.common)?;
    let (compute, mut findings) = match choose(args.common.backend, &opened.artifact, &|| cuda(0)) {
        Ok((compute, note)) => {
            let note = note.map(|note| Finding::ok("gpu.choice", note.trim_end()));
            (compute, Vec::from_iter(note))
        }
        Err(error) => (Compute::Cpu, vec![Finding::refused("gpu.device", &error, GPU_EXPECTED)]),
    };
    let model = opened.config.max_position_embeddings as usize;
    let context = args.common.max_context.unwrap_or(model).min(model);
    let mut asked = Asked { sequences: args.max_seqs.into(), ..asked(&args.common, &compute, context, here.len()) };
    if args.common.backend == Backend::Cuda && matches!(compute, Compute::Cpu) {
        // A GPU that cannot be opened: what one that has the machine's memory would need.
        asked.target = Target::Cuda;
    }
    findings.extend(kernels(&opened, &args.common, &compute, &here));
    let mut host = Host::read(Path::new(ROOT));
    compute.describe(&mut host);
    let mut report = check(&opened, &compute.sharing(&here), &asked, host)?;
    // A driver that has opened a GPU is there, also where the kernel does not show it to a container.
    let is_open = matches!(compute, Compute::Gpu(_)) && report.host.driver.is_none();
    report.findings.retain(|finding| !(is_open && finding.id == "driver.version"));
    // Behind the files, before the machine: whether there is a GPU explains the rest.
    report.findings.splice(1..1, findings);
    conclude(&report, args.json, &artifact.display().to_string())
}

/// Whether the artifact has the kernels that the ranks here would load.
fn kernels(opened: &Opened, common: &Common, compute: &Compute, here: &[u32]) -> Option<Finding> {
    let (Compute::Gpu(device), Some(rank)) = (compute, here.first()) else { return None };
    let tp = Tp::new(*rank, opened.artifact.manifest().tp).ok()?;
    let found = require_kernels(opened, device.gpu.as_ref(), tp, common.numerics.into());
    let facts = device.gpu.facts();
    Some(match found {
        Ok(count) => Finding::ok("gpu.kernels", format!("{count} for {} ({})", facts.name, facts.arch())),
        Err(error) => Finding::refused("gpu.kernels", &error, GPU_EXPECTED),
    })
}

/// `doctor`: the report on standard output. Errors: what would refuse a start.
pub fn run_doctor(args: &DoctorArgs) -> Result<(), RunError> {
    conclude(&doctor(Host::read(Path::new(ROOT))), args.json, "this machine")
}

fn conclude(report: &Report, as_json: bool, place: &str) -> Result<(), RunError> {
    let text = if as_json { format!("{}\n", report.to_json()) } else { report.to_text() };
    print_now(&text)?;
    let refusals: Vec<_> = report.refusals().collect();
    let Some(first) = refusals.first() else { return Ok(()) };
    Err(RunError::Preflight {
        place: place.to_owned(),
        refusals: refusals.iter().map(|f| format!("{} ({})", f.id, f.found)).collect::<Vec<_>>().join(", "),
        help: first.todo.clone(),
        code: report.exit_code(),
    })
}
