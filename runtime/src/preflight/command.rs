//! The verbs `check` and `doctor`, and the guard of the verbs that load: from arguments to a verdict.

use std::path::Path;

use serde_json::json;

use crate::cli::{Backend, CheckArgs, Common, DoctorArgs};
use crate::error::RunError;
use crate::load::{Opened, open};
use crate::preflight::host::Host;
use crate::preflight::memory::{Asked, Target};
use crate::preflight::report::Report;
use crate::preflight::{admit, check, doctor, ranks_here};
use crate::terminal::print_now;

/// The machine this program runs on.
const ROOT: &str = "/";

fn here(opened: &Opened, common: &Common) -> Result<Vec<u32>, RunError> {
    let tp = opened.artifact.manifest().tp;
    if let Some(rank) = common.rank.filter(|rank| *rank >= tp) {
        let what = format!("--rank {rank}: expected a rank below {tp}\n  help: ranks are counted from 0");
        return Err(RunError::Usage(what));
    }
    Ok(ranks_here(tp, common.rank, &common.peers))
}

fn asked(common: &Common, target: Target, context: usize, ranks: usize) -> Asked {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = common.threads.map_or(cores, usize::from).div_ceil(ranks.max(1));
    Asked {
        target,
        context: context as u64,
        sequences: 1,
        chunk: u64::from(common.chunk),
        threads: threads as u64,
        all_logits: false,
        reserve: common.reserve,
    }
}

/// Refuses a start whose sequence of `tokens` tokens does not fit into this machine's memory.
///
/// Errors: [`RunError::DoesNotFit`].
pub fn admit_start(opened: &Opened, common: &Common, tokens: usize, all_logits: bool) -> Result<(), RunError> {
    let here = here(opened, common)?;
    let asked = Asked { all_logits, ..asked(common, Target::Cpu, tokens, here.len()) };
    admit(opened, &here, &asked, &Host::for_memory(Path::new(ROOT)))
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
    // Today `auto` computes on the CPU; `cuda` plans the GPU memory that is designed.
    let target = if args.common.backend == Backend::Cuda { Target::Cuda } else { Target::Cpu };
    let here = here(&opened, &args.common)?;
    let model = opened.config.max_position_embeddings as usize;
    let context = args.common.max_context.unwrap_or(model).min(model);
    let asked = Asked { sequences: args.max_seqs.into(), ..asked(&args.common, target, context, here.len()) };
    let report = check(&opened, &here, &asked, Host::read(Path::new(ROOT)))?;
    conclude(&report, args.json, &artifact.display().to_string())
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
