//! Checkpoint -> artifact: every source byte is read once, hashed, cut and appended to all ranks.
//!
//! The work is a list of tiles (runs of whole rows of one stored tensor) in the artifact's order.
//! Threads read, check, hash and cut tiles ahead; this thread takes them in order and feeds the rank
//! writers, which hash and write on their own. Tiles in flight are counted, so memory is bounded
//! whatever the tensor sizes; neither the number of threads nor the tile size changes a byte. Before
//! the artifact gets its name the rank files are read back from the medium.

mod side_files;
mod tiles;

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime};

use dsv4_format::io::raise_open_files;
use dsv4_format::{
    Artifact, CommitInput, Digest, Draft, DraftOptions, Outcome, Progress, RankFile, RankWriter, SourceId,
};
use dsv4_model::contract;
use dsv4_model::tensors::StoredTensor;
use serde_json::{Map, Value, json};

use crate::checkpoint::Checkpoint;
use crate::error::CompileError;
use crate::plan::Plan;
use tiles::{Reader, Ready};

const ZEROS: [u8; 4096] = [0; 4096];
/// Default of [`PackOptions::memory`].
pub const MEMORY_DEFAULT: u64 = 2 << 30;

/// What to pack, and with how much of the machine.
#[derive(Clone, Debug)]
pub struct PackOptions {
    /// Directory of the checkpoint.
    pub checkpoint: PathBuf,
    /// The artifact; without it `NAME.dsv4` in the working directory, NAME being the checkpoint's.
    pub out: Option<PathBuf>,
    /// Number of ranks: 1, 2, 4 or 8.
    pub tp: u32,
    /// Write only this rank's file; the ids are those of all.
    pub rank: Option<u32>,
    /// Threads that read and cut; without it one per processor.
    pub jobs: Option<NonZeroUsize>,
    /// Bytes of memory for tiles and buffers.
    pub memory: u64,
    /// Replace another artifact of the same name.
    pub force: bool,
    /// A list as `sha256sum` writes it; the files it names are checked before anything is packed.
    pub sha256: Option<PathBuf>,
    /// Read the rank files back before they get their name, and compare every block.
    pub read_back: bool,
}

impl PackOptions {
    /// Defaults for everything but what and for how many ranks.
    pub fn new(checkpoint: impl Into<PathBuf>, tp: u32) -> PackOptions {
        PackOptions {
            checkpoint: checkpoint.into(),
            out: None,
            tp,
            rank: None,
            jobs: None,
            memory: MEMORY_DEFAULT,
            force: false,
            sha256: None,
            read_back: true,
        }
    }
}

/// What was packed.
#[derive(Clone, Debug)]
pub struct PackReport {
    /// The artifact.
    pub out: PathBuf,
    /// Its id.
    pub artifact_id: String,
    /// Id of its rank files together.
    pub weight_set_id: String,
    /// Id of the checkpoint's tensors.
    pub source_id: String,
    /// Number of ranks.
    pub tp: u32,
    /// Tensors read.
    pub tensors: u64,
    /// Weight bytes read.
    pub source_bytes: u64,
    /// Length of each rank's file; index = rank.
    pub rank_bytes: Vec<u64>,
    /// From opening to the final name.
    pub seconds: f64,
    /// How much of that was reading back; nothing if it was not asked for.
    pub read_back_seconds: Option<f64>,
    /// Whether the artifact is new, replaces another, got a rank it lacked, or was there already.
    pub outcome: Outcome,
}

impl PackReport {
    /// Source bytes per second, in 10^9.
    pub fn gb_per_s(&self) -> f64 {
        self.source_bytes as f64 / self.seconds.max(1e-9) / 1e9
    }

    /// The report for programs.
    pub fn to_json(&self) -> Value {
        json!({
            "out": self.out.display().to_string(), "outcome": outcome_name(self.outcome),
            "artifact_id": self.artifact_id, "weight_set_id": self.weight_set_id, "source_id": self.source_id,
            "tp": self.tp, "tensors": self.tensors, "source_bytes": self.source_bytes,
            "rank_bytes": self.rank_bytes, "seconds": self.seconds, "gb_per_s": self.gb_per_s(),
            "read_back_seconds": self.read_back_seconds,
        })
    }

    /// The report for people.
    pub fn to_text(&self) -> String {
        let ranks: Vec<String> = self.rank_bytes.iter().map(u64::to_string).collect();
        let read_back = match self.read_back_seconds {
            Some(seconds) => format!("{seconds:.1} s of it to read back what was written"),
            None => "not read back".into(),
        };
        format!(
            "{}: {}\n{} tensors, {} bytes for {} ranks of {} bytes in {:.1} s ({:.2} GB/s), {read_back}\nartifact id {}\n",
            self.out.display(),
            outcome_name(self.outcome),
            self.tensors,
            self.source_bytes,
            self.tp,
            ranks.join(", "),
            self.seconds,
            self.gb_per_s(),
            self.artifact_id,
        )
    }
}

fn outcome_name(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Created => "created",
        Outcome::Replaced => "replaced",
        Outcome::RankAdded => "rank added to the same artifact",
        Outcome::AlreadyThere => "already there, the same; nothing changed",
    }
}

/// Packs a checkpoint.
///
/// Errors: a checkpoint that is damaged or of another model, a `tp` that cuts a head, group or tile
/// (before any weight is read), a name that is taken, a full disk, a disk that does not give back what
/// was written. A failed pack leaves nothing.
pub fn pack(options: &PackOptions, progress: &dyn Progress) -> Result<PackReport, CompileError> {
    let started = Instant::now();
    raise_open_files();
    let checkpoint = Checkpoint::open(&options.checkpoint)?;
    let plan = Plan::new(checkpoint.config(), options.tp)?;
    let mut meta = side_files::read(&checkpoint)?;
    let config_json = normalised(&checkpoint.config().text, &options.checkpoint)?;
    let out = match &options.out {
        Some(out) => out.clone(),
        None => default_out(&options.checkpoint)?,
    };
    if !options.force {
        refuse_another(&out, &plan, &config_json)?;
    }
    if let Some(rank) = options.rank.filter(|rank| *rank >= options.tp) {
        let expected = format!("a rank below {}", options.tp);
        let help = "ranks are counted from 0";
        return Err(CompileError::Usage { what: "--rank", expected, found: rank.to_string(), help });
    }
    if let Some(list) = &options.sha256 {
        let jobs = options.jobs.or_else(|| std::thread::available_parallelism().ok());
        checkpoint.check_sums(list, jobs.map_or(1, NonZeroUsize::get), progress)?;
    }
    let reader = Reader::new(&checkpoint, &plan, options.jobs, options.memory)?;
    let draft_options = DraftOptions { only_rank: options.rank };
    let mut draft = Draft::create(&out, plan.layouts.clone(), &draft_options)?;
    let mut writers = Vec::new();
    for rank in 0..options.tp {
        writers.push(draft.rank_writer(rank)?);
    }
    progress.start("pack", plan.checkpoint_bytes());
    let mut source = SourceHash::default();
    reader.run(|ready| {
        append(&plan, &mut writers, &mut source, ready)?;
        progress.add(ready.bytes.len() as u64);
        Ok(())
    })?;
    progress.finish();
    let ranks: Result<Vec<RankFile>, _> = writers.into_iter().map(RankWriter::finish).collect();
    let ranks = ranks?;
    let read_back_seconds = match options.read_back {
        true => {
            let started = Instant::now();
            draft.read_back(&ranks, progress)?;
            Some(started.elapsed().as_secs_f64())
        }
        false => None,
    };
    // The texts, not only their hashes: a program that refuses the artifact can then say why.
    meta.push((contract::OP_CONTRACT_NAME.into(), contract::op_contract().into_bytes()));
    meta.push((contract::WEIGHT_CONTRACT_NAME.into(), contract::weight_contract().into_bytes()));
    draft.write_meta(&meta)?;
    let source_id = source.finish();
    let input = CommitInput {
        config_json,
        source_id,
        weight_contract: Digest(contract::hash(&contract::weight_contract())),
        op_contract: Digest(contract::hash(&contract::op_contract())),
        canary: None,
        ranks,
        receipt: receipt(options, &plan, started, read_back_seconds),
    };
    let committed = draft.commit(input, options.force, progress)?;
    Ok(PackReport {
        out,
        artifact_id: committed.artifact_id.to_string(),
        weight_set_id: committed.weight_set_id.to_string(),
        source_id: source_id.to_string(),
        tp: options.tp,
        tensors: plan.tensors(),
        source_bytes: plan.checkpoint_bytes(),
        rank_bytes: plan.rank_file_bytes(),
        seconds: started.elapsed().as_secs_f64(),
        read_back_seconds,
        outcome: committed.outcome,
    })
}

/// Hands one tile's pieces to the rank writers and its bytes or hash to the source's id.
fn append(plan: &Plan, writers: &mut [RankWriter], source: &mut SourceHash, ready: &Ready) -> Result<(), CompileError> {
    let name = &plan.rows[ready.tile.row].row.name;
    for (writer, piece) in writers.iter_mut().zip(&ready.pieces) {
        let bytes = piece.bytes(&ready.bytes);
        if !bytes.is_empty() {
            writer.append(name, bytes)?;
        }
        let mut padding = piece.padding;
        while padding > 0 {
            let part = padding.min(ZEROS.len() as u64);
            writer.append(name, &ZEROS[..part as usize])?;
            padding -= part;
        }
    }
    source.add(ready);
    Ok(())
}

/// The checkpoint's identity: BLAKE3 in derive-key mode over its tensors by name, encoded as all ids
/// are (little-endian, texts and lists preceded by their length as u64).
#[derive(Default)]
struct SourceHash {
    tensors: Vec<(StoredTensor, blake3::Hash)>,
    /// Of the tensor whose tiles are arriving.
    open: blake3::Hasher,
}

impl SourceHash {
    /// Tiles come in order; a tile that is a whole tensor brings its hash along.
    fn add(&mut self, ready: &Ready) {
        if let Some(hash) = ready.hash {
            self.tensors.push((ready.tensor.clone(), hash));
            return;
        }
        self.open.update(&ready.bytes);
        if self.open.count() == ready.tensor.bytes {
            self.tensors.push((ready.tensor.clone(), self.open.finalize()));
            self.open.reset();
        }
    }

    fn finish(mut self) -> SourceId {
        self.tensors.sort_by(|a, b| a.0.name.cmp(&b.0.name));
        let mut out = blake3::Hasher::new_derive_key("dsv4 source v1");
        let text = |out: &mut blake3::Hasher, text: &str| {
            out.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
        };
        out.update(&(self.tensors.len() as u64).to_le_bytes());
        for (tensor, hash) in &self.tensors {
            text(&mut out, &tensor.name);
            text(&mut out, tensor.dtype);
            out.update(&(tensor.shape.len() as u64).to_le_bytes());
            for dim in &tensor.shape {
                out.update(&dim.to_le_bytes());
            }
            out.update(hash.as_bytes());
        }
        SourceId(*out.finalize().as_bytes())
    }
}

/// config.json without its white space; the order of keys stays.
fn normalised(text: &str, dir: &Path) -> Result<String, CompileError> {
    let fault = |source| CompileError::model(dir)(dsv4_model::ModelError::Json { source });
    let value: Value = serde_json::from_str(text).map_err(fault)?;
    Ok(value.to_string())
}

/// `NAME.dsv4` in the working directory.
fn default_out(checkpoint: &Path) -> Result<PathBuf, CompileError> {
    let full = checkpoint.canonicalize().map_err(CompileError::io("resolve", checkpoint))?;
    match full.file_name() {
        Some(name) => {
            let mut name = name.to_os_string();
            name.push(".dsv4");
            Ok(PathBuf::from(name))
        }
        None => Err(CompileError::Usage {
            what: "-o",
            expected: "a name for the artifact".into(),
            found: "none, and the checkpoint's directory has none".into(),
            help: "give -o NAME.dsv4",
        }),
    }
}

/// Finds out early, where it can be seen without packing, that `out` is an artifact with another id.
fn refuse_another(out: &Path, plan: &Plan, config_json: &str) -> Result<(), CompileError> {
    // What is not an artifact, or a damaged one, is the draft's to judge.
    let Ok(there) = Artifact::open(out) else { return Ok(()) };
    let manifest = there.manifest();
    let other = |what, expected: String, found: String| {
        Err(CompileError::OtherArtifact { path: out.to_path_buf(), what, expected, found })
    };
    if manifest.tp != plan.tp {
        return other("number of ranks", plan.tp.to_string(), manifest.tp.to_string());
    }
    if manifest.config_json != config_json {
        return other("config.json", "the checkpoint's".into(), "another".into());
    }
    Ok(())
}

fn receipt(options: &PackOptions, plan: &Plan, started: Instant, read_back_seconds: Option<f64>) -> Map<String, Value> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let mut out = Map::new();
    out.insert("program".into(), concat!("dsv4c ", env!("CARGO_PKG_VERSION")).into());
    out.insert("checkpoint".into(), options.checkpoint.display().to_string().into());
    out.insert("sha256_checked".into(), options.sha256.is_some().into());
    out.insert("source_bytes".into(), plan.checkpoint_bytes().into());
    out.insert("seconds".into(), started.elapsed().as_secs_f64().into());
    out.insert("read_back_seconds".into(), read_back_seconds.into());
    out.insert("finished_unix_s".into(), now.into());
    out
}
