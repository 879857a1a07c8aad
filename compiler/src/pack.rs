//! Checkpoint -> artifact: every source byte is read once, hashed, cut and appended to all ranks.
//!
//! The work is a list of tiles (runs of whole rows of one stored tensor) in the artifact's order.
//! Threads read, check, hash and cut tiles ahead; this thread takes them in order and feeds the rank
//! writers, which hash and write on their own. Tiles in flight are counted, so memory is bounded
//! whatever the tensor sizes; neither the number of threads nor the tile size changes a byte. Before
//! the artifact gets its name the rank files are read back from the medium. Kernels are compiled before a weight
//! is read and kept in memory until the weights are written: what cannot be compiled costs seconds.
//!
//! A journal in the partial artifact says how far everything is on the medium: the same command goes
//! on from there after a kill, a power loss or a fault of the machine. What is wrong with the checkpoint
//! or the command leaves nothing.

mod side_files;
mod source;
mod tiles;
mod weightless;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::File;
use std::num::NonZeroUsize;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Instant, SystemTime};

use dsv4_format::io::raise_open_files;
use dsv4_format::{
    ArchKernels, Artifact, CommitInput, Digest, Draft, DraftOptions, Found, JournalOptions, Outcome, Progress,
    RankFile, RankWriter, SourceId, Tensor, require_room,
};
use dsv4_model::{ModelConfig, Tp, contract};
use serde_json::{Map, Value, json};

use crate::checkpoint::Checkpoint;
use crate::error::CompileError;
use crate::kernels::{self, Count, KernelSet, Target, counts_text};
use crate::plan::Plan;
use source::{Notes, Source};
use tiles::{Reader, Ready};
pub use weightless::{WeightlessOptions, pack_weightless};

const PROGRAM: &str = concat!("dsv4c ", env!("CARGO_PKG_VERSION"));
const ZEROS: [u8; 4096] = [0; 4096];
/// Default of [`PackOptions::memory`].
pub const MEMORY_DEFAULT: u64 = 2 << 30;
/// Default of [`PackOptions::journal_every`].
pub const JOURNAL_EVERY_DEFAULT: u64 = 512 << 20;
const JOURNAL_EVERY_MIN: u64 = 1 << 20;

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
    /// GPU architectures to compile kernels for; without any the artifact runs on the CPU alone.
    pub arches: Vec<String>,
    /// Directory of the compiler of kernels; without it the usual places are looked at.
    pub nvrtc: Option<PathBuf>,
    /// Threads that compile, and then read and cut; without it one per processor.
    pub jobs: Option<NonZeroUsize>,
    /// Bytes of memory for tiles and buffers.
    pub memory: u64,
    /// Replace another artifact of the same name.
    pub force: bool,
    /// A list as `sha256sum` writes it; the files it names are checked before anything is packed.
    pub sha256: Option<PathBuf>,
    /// Read the rank files back before they get their name, and compare every block. What an interrupted pack
    /// wrote is read back in any case: nobody knows what happened to it since.
    pub read_back: bool,
    /// Discard what an interrupted pack or receive left, instead of going on with it.
    pub fresh: bool,
    /// Bytes of output between two marks of the journal, at least 1 MiB: an interruption costs about twice as many.
    /// No tile gives more output than this.
    pub journal_every: u64,
}

impl PackOptions {
    /// Defaults for everything but what and for how many ranks; no kernels.
    pub fn new(checkpoint: impl Into<PathBuf>, tp: u32) -> PackOptions {
        PackOptions {
            checkpoint: checkpoint.into(),
            out: None,
            tp,
            rank: None,
            arches: Vec::new(),
            nvrtc: None,
            jobs: None,
            memory: MEMORY_DEFAULT,
            force: false,
            sha256: None,
            read_back: true,
            fresh: false,
            journal_every: JOURNAL_EVERY_DEFAULT,
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
    /// What a bench makes the weights from, where none were packed.
    pub weights_seed: Option<u64>,
    /// Number of ranks.
    pub tp: u32,
    /// Tensors packed, or described.
    pub tensors: u64,
    /// Weight bytes packed.
    pub source_bytes: u64,
    /// How many of them an interrupted pack had packed already.
    pub resumed_bytes: u64,
    /// How many were read this time.
    pub read_bytes: u64,
    /// Length of each rank's file; index = rank.
    pub rank_bytes: Vec<u64>,
    /// What was compiled for each architecture.
    pub kernels: Vec<Count>,
    /// How much of the time was compiling them.
    pub kernel_seconds: f64,
    /// From opening to the final name.
    pub seconds: f64,
    /// How much of that was reading back; nothing if nothing was.
    pub read_back_seconds: Option<f64>,
    /// Whether the artifact is new, replaces another, got a rank it lacked, or was there already.
    pub outcome: Outcome,
}

impl PackReport {
    /// Source bytes read per second, in 10^9.
    pub fn gb_per_s(&self) -> f64 {
        self.read_bytes as f64 / self.seconds.max(1e-9) / 1e9
    }

    /// The report for programs.
    pub fn to_json(&self) -> Value {
        json!({
            "out": self.out.display().to_string(), "outcome": outcome_name(self.outcome),
            "artifact_id": self.artifact_id, "weight_set_id": self.weight_set_id, "source_id": self.source_id,
            "tp": self.tp, "tensors": self.tensors, "source_bytes": self.source_bytes,
            "resumed_bytes": self.resumed_bytes, "read_bytes": self.read_bytes,
            "rank_bytes": self.rank_bytes, "seconds": self.seconds, "gb_per_s": self.gb_per_s(),
            "read_back_seconds": self.read_back_seconds,
            "kernels": self.kernels.iter().map(Count::to_json).collect::<Value>(),
            "kernel_seconds": self.kernel_seconds, "weights_seed": self.weights_seed,
        })
    }

    /// The report for people.
    pub fn to_text(&self) -> String {
        let ranks: Vec<String> = self.rank_bytes.iter().map(u64::to_string).collect();
        let read_back = match self.read_back_seconds {
            Some(seconds) => format!("{seconds:.1} s of it to read back what was written"),
            None => "not read back".into(),
        };
        let resumed = match self.resumed_bytes {
            0 => String::new(),
            bytes => format!("{bytes} bytes were there from an interrupted pack, {} were read\n", self.read_bytes),
        };
        if let Some(seed) = self.weights_seed {
            return format!(
                "{}: {}\nno weights: those of {} ranks are made from seed {seed}, by dsv4-run bench alone\n{}artifact id {}\n",
                self.out.display(),
                outcome_name(self.outcome),
                self.tp,
                counts_text(&self.kernels, self.kernel_seconds),
                self.artifact_id,
            );
        }
        let kernels = counts_text(&self.kernels, self.kernel_seconds);
        format!(
            "{}: {}\n{} tensors, {} bytes for {} ranks of {} bytes in {:.1} s ({:.2} GB/s), {read_back}\n{resumed}{kernels}artifact id {}\n",
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

/// Packs a checkpoint, telling nobody what it does about an interrupted pack. See [`pack_and_tell`].
pub fn pack(options: &PackOptions, progress: &dyn Progress) -> Result<PackReport, CompileError> {
    pack_and_tell(options, progress, &|_| ())
}

/// Packs a checkpoint, or goes on with a pack of it that was interrupted; `tell` gets a line for people
/// when there was one.
///
/// Errors: a checkpoint that is damaged or of another model, a `tp` that cuts a head, group or tile
/// (before any weight is read), a name that is taken, a full disk, a disk that does not give back what
/// was written. A failed pack leaves nothing, unless the error is [`dsv4_format::FormatError::Kept`].
pub fn pack_and_tell(
    options: &PackOptions,
    progress: &dyn Progress,
    tell: &dyn Fn(&str),
) -> Result<PackReport, CompileError> {
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
    let there = if options.force { None } else { the_same(&out, &plan, &config_json, None)? };
    check_usage(options)?;
    let has = |rank: u32| there.as_ref().is_some_and(|there| there.has_rank(rank));
    let written = (0..).zip(plan.rank_file_bytes());
    let written = written.filter(|(rank, _)| options.rank.is_none_or(|only| only == *rank) && !has(*rank));
    require_room(&out, written.map(|(_, bytes)| bytes).sum())?;
    let reader = Reader::new(&checkpoint, &plan, options.jobs, options.memory, options.journal_every)?;
    // First of all that takes time: a compiler that is missing is known at once, as is a disk without room.
    let kernels = compile_kernels(options, &checkpoint.config().model, &options.checkpoint, progress)?;
    if let Some(there) = &there {
        require_same_kernels(there, &kernels)?;
    }
    if let Some(list) = &options.sha256 {
        let jobs = options.jobs.or_else(|| std::thread::available_parallelism().ok());
        checkpoint.check_sums(list, jobs.map_or(1, NonZeroUsize::get), progress)?;
    }
    let journal = JournalOptions {
        plan: plan_hash(&checkpoint, &plan, options, &config_json)?,
        subject: subject(options)?,
        there: there.map_or(Vec::new(), |there| there.present_ranks().to_vec()),
        note_bytes_max: Notes::bytes_max(&plan),
        every_bytes: options.journal_every,
        fresh: options.fresh,
    };
    let mut notes = Notes::new(&plan);
    let ranks = DraftOptions { only_rank: options.rank };
    let mut draft = Draft::resume(&out, plan.layouts.clone(), &ranks, &journal, &mut |note| notes.take(note))?;
    let source = found_source(&plan, &draft, notes, tell);
    let kept = |draft: &mut Draft, e| match e {
        CompileError::Format(e) => CompileError::Format(draft.failed(e)),
        e => e,
    };
    let weights =
        write_weights(options, &plan, &reader, &mut draft, source, progress).map_err(|e| kept(&mut draft, e))?;
    meta.extend(contract_texts());
    draft.write_meta(&meta).map_err(|e| draft.failed(e))?;
    for compiled in &kernels.arches {
        let written = draft.write_kernels(&compiled.arch, &compiled.kernels, compiled.tuning.as_deref());
        written.map_err(|e| draft.failed(e))?;
    }
    let receipt = receipt(options, &plan, started, &weights, &kernels);
    let input = CommitInput {
        config_json,
        source_id: weights.source_id,
        weight_contract: Digest(contract::hash(&contract::weight_contract())),
        op_contract: Digest(contract::hash(&contract::op_contract())),
        canary: None,
        ranks: weights.ranks,
        receipt,
    };
    let committed = draft.commit(input, options.force, progress)?;
    Ok(PackReport {
        out,
        artifact_id: committed.artifact_id.to_string(),
        weight_set_id: committed.weight_set_id.to_string(),
        source_id: weights.source_id.to_string(),
        weights_seed: None,
        tp: options.tp,
        tensors: plan.tensors(),
        source_bytes: plan.checkpoint_bytes(),
        resumed_bytes: weights.resumed_bytes,
        read_bytes: weights.read_bytes,
        rank_bytes: plan.rank_file_bytes(),
        kernels: kernels.counts(),
        kernel_seconds: kernels.seconds,
        seconds: started.elapsed().as_secs_f64(),
        read_back_seconds: weights.read_back_seconds,
        outcome: committed.outcome,
    })
}

fn check_usage(options: &PackOptions) -> Result<(), CompileError> {
    if let Some(rank) = options.rank.filter(|rank| *rank >= options.tp) {
        let expected = format!("a rank below {}", options.tp);
        let help = "ranks are counted from 0";
        return Err(CompileError::Usage { what: "--rank", expected, found: rank.to_string(), help });
    }
    if options.journal_every < JOURNAL_EVERY_MIN {
        let (expected, found) = (format!("at least {JOURNAL_EVERY_MIN} bytes"), options.journal_every.to_string());
        let help = "marks cost time; the default is one in 512M";
        return Err(CompileError::Usage { what: "--journal-every", expected, found, help });
    }
    Ok(())
}

/// The texts, not only their hashes: a program that refuses the artifact can then say why.
fn contract_texts() -> Vec<(String, Vec<u8>)> {
    vec![
        (contract::OP_CONTRACT_NAME.into(), contract::op_contract().into_bytes()),
        (contract::WEIGHT_CONTRACT_NAME.into(), contract::weight_contract().into_bytes()),
    ]
}

fn compile_kernels(
    options: &PackOptions,
    model: &ModelConfig,
    at: &Path,
    progress: &dyn Progress,
) -> Result<KernelSet, CompileError> {
    let targets: Vec<Target> = options.arches.iter().map(|arch| Target::new(arch)).collect();
    let tp = Tp::new(0, options.tp).map_err(CompileError::model(at))?;
    kernels::compile(model, tp, &targets, options.nvrtc.as_deref(), options.jobs, progress)
}

/// Finds out, before weights are read for long, that the artifact that is there can only be another one.
fn require_same_kernels(there: &Artifact, kernels: &KernelSet) -> Result<(), CompileError> {
    let records = |arch: &str| -> Vec<(Digest, Digest)> {
        there.manifest().kernels.iter().filter(|k| k.arch == arch).map(|k| (k.key, k.hash)).collect()
    };
    let same = |c: &ArchKernels| {
        let ours: Vec<_> = c.kernels.iter().map(|k| (k.key, Digest::of(&k.cubin))).collect();
        let table = c.tuning.as_ref().map(|text| Digest::of(text.as_bytes()));
        ours == records(&c.arch) && table == there.tuning_hash(&c.arch)
    };
    let found: BTreeSet<&str> = there.manifest().kernels.iter().map(|k| k.arch.as_str()).collect();
    let expected: BTreeSet<&str> = kernels.arches.iter().map(|c| c.arch.as_str()).collect();
    let names = |set: &BTreeSet<&str>| match set.is_empty() {
        true => "none".to_owned(),
        false => format!("those for {}", set.iter().copied().collect::<Vec<_>>().join(", ")),
    };
    let (expected, found) = match kernels.arches.iter().find(|c| !same(c)) {
        None if found == expected => return Ok(()),
        Some(other) if found == expected => (format!("this program's for {}", other.arch), "another version's".into()),
        _ => (names(&expected), names(&found)),
    };
    Err(CompileError::OtherKernels { path: there.path().to_path_buf(), expected, found })
}

/// Rank files, written and read back.
struct Weights {
    ranks: Vec<RankFile>,
    source_id: SourceId,
    resumed_bytes: u64,
    read_bytes: u64,
    read_back_seconds: Option<f64>,
}

fn write_weights(
    options: &PackOptions,
    plan: &Plan,
    reader: &Reader<'_>,
    draft: &mut Draft,
    mut source: Source,
    progress: &dyn Progress,
) -> Result<Weights, CompileError> {
    let resumed_bytes = source.bytes();
    let writers: Result<Vec<RankWriter>, _> = (0..options.tp).map(|rank| draft.rank_writer(rank)).collect();
    let mut writers = writers?;
    let mut marks = draft.marks(&writers)?;
    progress.start("pack", plan.checkpoint_bytes());
    progress.add(resumed_bytes);
    let mut read_bytes = 0;
    reader.run(source.place, |ready| {
        append(plan, &mut writers, &mut source, ready)?;
        marks.offer(&mut writers, || source.note())?;
        read_bytes += ready.bytes.len() as u64;
        progress.add(ready.bytes.len() as u64);
        Ok(())
    })?;
    progress.finish();
    let ranks = marks.finish(writers, source.note())?;
    let started = Instant::now();
    let read = if options.read_back {
        draft.read_back(&ranks, progress)?;
        true
    } else {
        draft.read_back_resumed(&ranks, progress)?
    };
    let read_back_seconds = read.then(|| started.elapsed().as_secs_f64());
    Ok(Weights { ranks, source_id: source.finish(), resumed_bytes, read_bytes, read_back_seconds })
}

/// The source at the place where the draft's writers begin.
fn found_source(plan: &Plan, draft: &Draft, notes: Notes<'_>, tell: &dyn Fn(&str)) -> Source {
    match draft.found() {
        Found::Nothing => Source::default(),
        Found::Discarded(reason) => {
            tell(&format!("starts over with a pack that was interrupted: {reason}"));
            Source::default()
        }
        Found::Marks => {
            let source = notes.source();
            let (there, all) = (source.bytes(), plan.checkpoint_bytes());
            tell(&format!("goes on with a pack that was interrupted: {there} of {all} bytes are there"));
            source
        }
    }
}

/// Names everything that decides which bytes go where: only an attempt at the same plan is gone on
/// with. The shards' sizes, times and inodes stand for their content (a copy that keeps the time has another
/// inode, or another time of change), the running file for what it does.
fn plan_hash(
    checkpoint: &Checkpoint,
    plan: &Plan,
    options: &PackOptions,
    config_json: &str,
) -> Result<Digest, CompileError> {
    let mut shards = Vec::new();
    for path in checkpoint.shards() {
        let meta = path.metadata().map_err(CompileError::io("examine", path))?;
        shards.push(json!([
            path.file_name().map(OsStr::to_string_lossy),
            meta.size(),
            meta.mtime(),
            meta.mtime_nsec(),
            meta.ctime(),
            meta.ctime_nsec(),
            meta.ino()
        ]));
    }
    let layouts = plan.layouts.iter().map(|layout| {
        let tensors = layout.sections().iter().flat_map(|section| {
            let tensor = |t: &Tensor| {
                json!([section.name, section.offset, section.len, t.name, t.dtype, t.shape, t.offset, t.len])
            };
            section.tensors.iter().map(tensor)
        });
        tensors.collect::<Value>()
    });
    let text = json!({
        "program": PROGRAM, "build": build(), "config": config_json, "tp": options.tp, "rank": options.rank,
        "weight_contract": contract::weight_contract(), "op_contract": contract::op_contract(),
        "layouts": layouts.collect::<Value>(), "shards": shards,
    });
    Ok(Digest::of(text.to_string().as_bytes()))
}

/// Hash of the running program's file: a version may be built more than once. Without /proc there is none,
/// and the version stands alone.
fn build() -> Option<String> {
    static BUILD: OnceLock<Option<String>> = OnceLock::new();
    let hash = || {
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(File::open("/proc/self/exe").ok()?).ok()?;
        Some(hasher.finalize().to_hex().to_string())
    };
    BUILD.get_or_init(hash).clone()
}

/// What a user would call the pack; of the same one, another plan means that something changed.
fn subject(options: &PackOptions) -> Result<String, CompileError> {
    let full = options.checkpoint.canonicalize().map_err(CompileError::io("resolve", &options.checkpoint))?;
    let rank = options.rank.map_or(String::new(), |rank| format!(" --rank {rank}"));
    Ok(format!("pack of {} with --tp {}{rank}", full.display(), options.tp))
}

/// Hands one tile's pieces to the rank writers and its bytes or hash to the source's id.
fn append(plan: &Plan, writers: &mut [RankWriter], source: &mut Source, ready: &Ready) -> Result<(), CompileError> {
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
    source.add(plan, ready);
    Ok(())
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

/// Finds out early, where it can be seen without packing, that `out` is an artifact with another id: `seed` is what
/// weights are to be made from, if they are. Otherwise what is there: to tell whether it is the same, its ranks only
/// need to be hashed.
fn the_same(out: &Path, plan: &Plan, config_json: &str, seed: Option<u64>) -> Result<Option<Artifact>, CompileError> {
    // What is not an artifact, or a damaged one, is the draft's to judge.
    let Ok(there) = Artifact::open(out) else { return Ok(None) };
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
    if manifest.weights_seed != seed {
        let name =
            |seed: Option<u64>| seed.map_or("a checkpoint's".into(), |seed| format!("none, but the seed {seed}"));
        return other("weights", name(seed), name(manifest.weights_seed));
    }
    Ok(Some(there))
}

fn receipt(
    options: &PackOptions,
    plan: &Plan,
    started: Instant,
    weights: &Weights,
    kernels: &KernelSet,
) -> Map<String, Value> {
    let mut out = receipt_now(started, kernels);
    out.insert("checkpoint".into(), options.checkpoint.display().to_string().into());
    out.insert("sha256_checked".into(), options.sha256.is_some().into());
    out.insert("source_bytes".into(), plan.checkpoint_bytes().into());
    out.insert("read_back_seconds".into(), weights.read_back_seconds.into());
    out
}

/// By whom, when, and how long it took until now.
fn receipt_now(started: Instant, kernels: &KernelSet) -> Map<String, Value> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let mut out = Map::new();
    out.insert("program".into(), PROGRAM.into());
    out.insert("kernel_seconds".into(), kernels.seconds.into());
    out.insert("seconds".into(), started.elapsed().as_secs_f64().into());
    out.insert("finished_unix_s".into(), now.into());
    out
}

#[cfg(test)]
mod tests {
    use dsv4_format::{KernelInput, NoProgress, RankLayout, SectionPlan, TensorPlan};

    use super::*;

    fn set(cubin: u8, table: &str) -> KernelSet {
        let kernels = vec![KernelInput { family: "rope".into(), key: Digest([1; 32]), cubin: vec![cubin; 9] }];
        let arches = vec![ArchKernels { arch: "sm_121a".into(), kernels, tuning: Some(table.to_owned()) }];
        KernelSet { arches, seconds: 0.0 }
    }

    /// Of the same keys, and for the same architectures: what else makes another artifact is found before weights.
    #[test]
    fn other_cubins_and_tables_are_other_kernels() {
        let out = std::env::temp_dir().join(format!("dsv4-other-kernels-{}.dsv4", std::process::id()));
        let tensor = TensorPlan { name: "w".into(), dtype: "u8".into(), shape: vec![3], bytes: 3 };
        let layout = RankLayout::new(&[SectionPlan { name: "all".into(), tensors: vec![tensor] }]).unwrap();
        let mut draft = Draft::weightless(&out, vec![layout], 1, Digest([1; 32]), "a test", true).unwrap();
        for compiled in set(1, "a table").arches {
            draft.write_kernels(&compiled.arch, &compiled.kernels, compiled.tuning.as_deref()).unwrap();
        }
        let input = CommitInput {
            config_json: "{}".into(),
            source_id: SourceId([0; 32]),
            weight_contract: Digest([0; 32]),
            op_contract: Digest([0; 32]),
            canary: None,
            ranks: Vec::new(),
            receipt: Map::new(),
        };
        draft.commit(input, true, &NoProgress).unwrap();
        let there = Artifact::open(&out).unwrap();
        std::fs::remove_dir_all(&out).unwrap();
        require_same_kernels(&there, &set(1, "a table")).unwrap();
        for other in [set(2, "a table"), set(1, "another table")] {
            let error = require_same_kernels(&there, &other).unwrap_err().to_string();
            assert!(error.contains("expected this program's for sm_121a, found another version's"), "{error}");
        }
        let none = require_same_kernels(&there, &KernelSet::default()).unwrap_err().to_string();
        assert!(none.contains("expected none, found those for sm_121a"), "{none}");
    }
}
