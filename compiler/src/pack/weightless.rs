//! A pack of no checkpoint: manifest and kernels of a config, and a seed from which a bench makes the weights.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Instant;

use dsv4_format::{CommitInput, Digest, Draft, Progress, SourceId};
use dsv4_model::{Tp, contract};
use serde_json::json;

use super::{PROGRAM, PackReport, build, contract_texts, normalised, receipt_now, require_same_kernels, the_same};
use crate::checkpoint::Config;
use crate::error::CompileError;
use crate::kernels::{self, Target};
use crate::plan::Plan;

const SOURCE_CONTEXT: &str = "dsv4 weights from a seed v1";

/// What to pack, and for which machines.
#[derive(Clone, Debug)]
pub struct WeightlessOptions {
    /// A config.json, or a directory with one.
    pub config: PathBuf,
    /// What the weights are made from.
    pub seed: u64,
    /// The artifact.
    pub out: PathBuf,
    /// Number of ranks: 1, 2, 4 or 8.
    pub tp: u32,
    /// GPU architectures to compile kernels for.
    pub arches: Vec<String>,
    /// Directory of the compiler of kernels.
    pub nvrtc: Option<PathBuf>,
    /// Threads that compile.
    pub jobs: Option<NonZeroUsize>,
    /// Replace another artifact of the same name.
    pub force: bool,
    /// Discard what an interrupted pack or receive left.
    pub fresh: bool,
}

/// Makes an artifact without weights.
///
/// Errors: a config of another model, a `tp` that cuts a head, group or tile, those of [`kernels::compile`], a name
/// that is taken.
pub fn pack_weightless(options: &WeightlessOptions, progress: &dyn Progress) -> Result<PackReport, CompileError> {
    let started = Instant::now();
    let config = Config::read(&options.config)?;
    let plan = Plan::new(&config, options.tp)?;
    let config_json = normalised(&config.text, &options.config)?;
    let there = if options.force { None } else { the_same(&options.out, &plan, &config_json, Some(options.seed))? };
    let targets: Vec<Target> = options.arches.iter().map(|arch| Target::new(arch)).collect();
    let tp = Tp::new(0, options.tp).map_err(CompileError::model(&options.config))?;
    let set = kernels::compile(&config.model, tp, &targets, options.nvrtc.as_deref(), options.jobs, progress)?;
    if let Some(there) = &there {
        require_same_kernels(there, &set)?;
    }
    let seed = options.seed;
    let intent = json!({
        "program": PROGRAM, "build": build(), "config": config_json, "tp": options.tp, "weights_seed": seed,
    });
    let plan_hash = Digest::of(intent.to_string().as_bytes());
    let subject = format!("pack of seed {seed} with --tp {}", options.tp);
    let mut draft = Draft::weightless(&options.out, plan.layouts.clone(), seed, plan_hash, &subject, options.fresh)?;
    draft.write_meta(&contract_texts())?;
    for compiled in &set.arches {
        draft.write_kernels(&compiled.arch, &compiled.kernels, compiled.tuning.as_deref())?;
    }
    let source_id = SourceId(blake3::derive_key(SOURCE_CONTEXT, &seed.to_le_bytes()));
    let mut receipt = receipt_now(started, &set);
    receipt.insert("config".into(), options.config.display().to_string().into());
    let input = CommitInput {
        config_json,
        source_id,
        weight_contract: Digest(contract::hash(&contract::weight_contract())),
        op_contract: Digest(contract::hash(&contract::op_contract())),
        canary: None,
        ranks: Vec::new(),
        receipt,
    };
    let committed = draft.commit(input, options.force, progress)?;
    Ok(PackReport {
        out: options.out.clone(),
        artifact_id: committed.artifact_id.to_string(),
        weight_set_id: committed.weight_set_id.to_string(),
        source_id: source_id.to_string(),
        weights_seed: Some(seed),
        tp: options.tp,
        tensors: plan.tensors(),
        source_bytes: 0,
        resumed_bytes: 0,
        read_bytes: 0,
        rank_bytes: Vec::new(),
        kernels: set.counts(),
        kernel_seconds: set.seconds,
        seconds: started.elapsed().as_secs_f64(),
        read_back_seconds: None,
        outcome: committed.outcome,
    })
}
