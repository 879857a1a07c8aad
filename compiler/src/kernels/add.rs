//! Other kernels for an artifact that is there, beside rank files that are not touched: for one more architecture, by
//! another tuning table, or as another version of this program compiles them.

use std::collections::BTreeSet;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::SystemTime;

use dsv4_format::{Artifact, Digest, Manifest, NewKernels, Outcome, Progress};
use dsv4_kernels::tuning::Tuning;
use dsv4_model::{ModelConfig, Tp, contract};
use serde_json::{Map, Value, json};

use super::{ARCH_DEFAULT, Count, KernelSet, Target, compile, counts_text, units};
use crate::checkpoint::read_text;
use crate::error::CompileError;

const PROGRAM: &str = concat!("dsv4c ", env!("CARGO_PKG_VERSION"));
const TABLE_BYTES_MAX: u64 = 1 << 20;

/// What to compile, and for which artifact.
#[derive(Clone, Debug)]
pub struct AddOptions {
    /// The artifact.
    pub artifact: PathBuf,
    /// Architectures; without any those that it has, or that of the table, or [`ARCH_DEFAULT`].
    pub arches: Vec<String>,
    /// Directory of the compiler; without it the usual places are looked at.
    pub nvrtc: Option<PathBuf>,
    /// A tuning table to use for its architecture in place of this program's.
    pub tuning: Option<PathBuf>,
    /// Threads; without it one per processor.
    pub jobs: Option<NonZeroUsize>,
    /// Drop a signature that is there.
    pub force: bool,
}

impl AddOptions {
    /// Defaults for everything but the artifact.
    pub fn new(artifact: impl Into<PathBuf>) -> AddOptions {
        AddOptions {
            artifact: artifact.into(),
            arches: Vec::new(),
            nvrtc: None,
            tuning: None,
            jobs: None,
            force: false,
        }
    }
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct AddReport {
    /// The artifact.
    pub artifact: PathBuf,
    /// Its id before.
    pub old_id: String,
    /// Its id now.
    pub artifact_id: String,
    /// What was compiled.
    pub kernels: Vec<Count>,
    /// How long that took.
    pub kernel_seconds: f64,
    /// Replaced, or the same as before.
    pub outcome: Outcome,
    /// What else one should know.
    pub notes: Vec<String>,
}

impl AddReport {
    /// For programs.
    pub fn to_json(&self) -> Value {
        json!({
            "artifact": self.artifact.display().to_string(), "outcome": outcome_name(self.outcome),
            "old_id": self.old_id, "artifact_id": self.artifact_id,
            "kernels": self.kernels.iter().map(Count::to_json).collect::<Value>(),
            "kernel_seconds": self.kernel_seconds, "notes": self.notes,
        })
    }

    /// For people.
    pub fn to_text(&self) -> String {
        let mut out = format!("{}: kernels {}\n", self.artifact.display(), outcome_name(self.outcome));
        out += &counts_text(&self.kernels, self.kernel_seconds);
        out += &format!("artifact id {}\n", self.artifact_id);
        self.notes.iter().for_each(|note| out += &format!("note: {note}\n"));
        out
    }
}

fn outcome_name(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::AlreadyThere => "already there, the same; nothing changed",
        _ => "replaced; the rank files are as they were",
    }
}

/// Compiles kernels and puts them into the artifact, all at once or not at all.
///
/// Errors: an artifact whose weights are laid out for another version of this program, or that is signed (unless
/// told to drop the signature), before anything is compiled; those of [`compile`] and of
/// [`Artifact::replace_kernels`].
pub fn add(options: &AddOptions, progress: &dyn Progress) -> Result<AddReport, CompileError> {
    let artifact = Artifact::open(&options.artifact)?;
    let manifest = artifact.manifest();
    require_weight_contract(&artifact)?;
    let model = ModelConfig::parse(&manifest.config_json).map_err(CompileError::model(&options.artifact))?;
    let tp = Tp::new(0, manifest.tp).map_err(CompileError::model(&options.artifact))?;
    let targets = targets(options, manifest)?;
    let new = |set: &KernelSet| new_kernels(set, &targets);
    // What is plain from the keys alone need not wait for the compiler.
    let mut same = true;
    for target in &targets {
        same &= has(&artifact, target, &keys(&model, tp, target)?);
    }
    let signed = artifact.signature()?.is_some();
    if signed && !options.force && !(same && manifest.op_contract == op_contract()) {
        return Err(dsv4_format::FormatError::Signed { path: options.artifact.join("SIGNATURE") }.into());
    }
    let mut notes = notes(&artifact, &model, tp, &targets)?;
    let set = compile(&model, tp, &targets, options.nvrtc.as_deref(), options.jobs, progress)?;
    let done = artifact.replace_kernels(&new(&set), options.force)?;
    if signed && artifact.signature()?.is_none() {
        notes.push("the signature was of the kernels as they were and is gone: sign again with dsv4c sign".to_owned());
    }
    Ok(AddReport {
        artifact: options.artifact.clone(),
        old_id: manifest.artifact_id.to_string(),
        artifact_id: done.artifact_id.to_string(),
        kernels: set.counts(),
        kernel_seconds: set.seconds,
        notes: if done.outcome == Outcome::AlreadyThere { Vec::new() } else { notes },
        outcome: done.outcome,
    })
}

fn op_contract() -> Digest {
    Digest(contract::hash(&contract::op_contract()))
}

/// The weights are read by kernels of this program from now on.
fn require_weight_contract(artifact: &Artifact) -> Result<(), CompileError> {
    let (ours, theirs) = (Digest(contract::hash(&contract::weight_contract())), artifact.manifest().weight_contract);
    if ours == theirs {
        return Ok(());
    }
    let (path, expected, found) = (artifact.path().to_path_buf(), ours.to_string(), theirs.to_string());
    Err(CompileError::OtherWeights { path, expected, found })
}

fn targets(options: &AddOptions, manifest: &Manifest) -> Result<Vec<Target>, CompileError> {
    let table = options.tuning.as_ref().map(|file| {
        let text = read_text(file, TABLE_BYTES_MAX)?;
        let fault = |source| CompileError::Tuning { file: file.clone(), source };
        Tuning::parse(&text).map_err(fault)
    });
    let table = table.transpose()?;
    let mut arches: BTreeSet<String> = options.arches.iter().cloned().collect();
    if arches.is_empty() {
        arches = match &table {
            Some(table) => BTreeSet::from([table.arch.clone()]),
            None => manifest.kernels.iter().map(|k| k.arch.clone()).collect(),
        };
    }
    if arches.is_empty() {
        arches.insert(ARCH_DEFAULT.into());
    }
    if let Some(table) = table.as_ref().filter(|table| !arches.contains(&table.arch)) {
        return Err(CompileError::Usage {
            what: "--tuning",
            expected: format!("a table for one of {}", arches.into_iter().collect::<Vec<_>>().join(", ")),
            found: format!("one for {}", table.arch),
            help: "name its architecture with --arch as well",
        });
    }
    let target = |arch: String| match &table {
        Some(table) if table.arch == arch => Target { arch, tuning: table.clone() },
        _ => Target::new(&arch),
    };
    Ok(arches.into_iter().map(target).collect())
}

fn keys(model: &ModelConfig, tp: Tp, target: &Target) -> Result<BTreeSet<[u8; 32]>, CompileError> {
    Ok(units(model, tp, target)?.into_keys().collect())
}

/// Whether an artifact's kernels for a target are those of these keys, by the same table, as its MANIFEST says.
fn has(artifact: &Artifact, target: &Target, keys: &BTreeSet<[u8; 32]>) -> bool {
    let kernels = artifact.manifest().kernels.iter().filter(|k| k.arch == target.arch);
    kernels.map(|k| k.key.0).collect::<BTreeSet<_>>() == *keys
        && artifact.tuning_hash(&target.arch) == Some(Digest::of(target.tuning.text().as_bytes()))
}

/// What is lost or left behind. Errors: kernels that stay and are damaged.
fn notes(artifact: &Artifact, model: &ModelConfig, tp: Tp, targets: &[Target]) -> Result<Vec<String>, CompileError> {
    let mut notes = Vec::new();
    for target in targets {
        let old = artifact.tuning_hash(&target.arch);
        if old.is_some_and(|old| old != Digest::of(target.tuning.text().as_bytes())) {
            notes.push(format!("the tuning table of {} was another one", target.arch));
        }
    }
    let there: BTreeSet<&str> = artifact.manifest().kernels.iter().map(|k| k.arch.as_str()).collect();
    for arch in there.into_iter().filter(|arch| !targets.iter().any(|t| t.arch == *arch)) {
        // By whichever table they were compiled: it says which kernels there must be.
        artifact.verify_kernels(arch)?;
        let text = artifact.tuning(arch)?.and_then(|text| String::from_utf8(text).ok());
        let tuning = text.and_then(|text| Tuning::parse(&text).ok());
        let target = tuning.map(|tuning| Target { arch: arch.to_owned(), tuning });
        let ours = |target: Target| keys(model, tp, &target).is_ok_and(|keys| has(artifact, &target, &keys));
        if !target.is_some_and(ours) {
            notes.push(format!(
                "the kernels for {arch} are of another version of this program: name it in --arch as well"
            ));
        }
    }
    Ok(notes)
}

fn new_kernels(set: &KernelSet, targets: &[Target]) -> NewKernels {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let arches: Vec<&str> = targets.iter().map(|t| t.arch.as_str()).collect();
    let what = json!({"program": PROGRAM, "arches": arches, "seconds": set.seconds, "finished_unix_s": now});
    NewKernels {
        arches: set.arches.clone(),
        op_contract: op_contract(),
        meta: vec![(contract::OP_CONTRACT_NAME.into(), contract::op_contract().into_bytes())],
        receipt: Map::from_iter([("kernels".to_owned(), what)]),
    }
}
