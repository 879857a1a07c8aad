//! What a plan asks of a machine: disk, memory, time, and whether it fits. No weight byte is read.
//!
//! Every figure says how well it is known. The memory lines are those of `dsv4-run ART check`, which
//! holds them against the machine that it runs on; here the machine is a described one, with one rank on
//! it. Figures are listed once, and both texts and JSON print that list.
//! Absent: what the processors can do (times are the disk's), and measuring: a disk's speed is told.

use std::fmt::Write;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use dsv4_kernels::memory::{Asked, RankTable, Ranks, Target, default_reserve, largest_context, tables};
use dsv4_kernels::numerics::Numerics;
use dsv4_model::ModelError;
use serde_json::{Value, json};

use super::Plan;
use crate::checkpoint::Config;
use crate::error::CompileError;

const GIB: u64 = 1 << 30;
const GIGABYTE: f64 = 1e9;
/// MANIFEST and meta: 1.3 MB of hashes, names, contracts and a compressed tokenizer for Flash.
const OTHER_FILES_BYTES: u64 = 8 << 20;
/// Memory that a GB10 shows; firmware keeps the rest of its 128 GB.
const GB10_MEMORY_BYTES: u64 = 119 * GIB;
/// The part of a machine's memory that its system has taken before anything is started: a GB10 that shows
/// 119 GiB has 115 to 116 available.
const SYSTEM_PART: u64 = 32;
/// Processors of a GB10.
const THREADS: u64 = 20;
/// Rows of a prefill step unless told otherwise, as `dsv4-run` has it.
const CHUNK: u64 = 256;
/// The slowest published O_DIRECT read of a GB10's drive, bytes a second.
const GB10_DISK_RATE: f64 = 5.58e9;

const EXACT: &str = "exact";
const ASSUMED: &str = "assumed";
const GIVEN: &str = "given";

/// What to plan for.
#[derive(Clone, Debug)]
pub struct ForecastOptions {
    /// Backend.
    pub target: Target,
    /// Tokens of a sequence; without it what the model allows.
    pub context: Option<u64>,
    /// Sequences at once.
    pub sequences: u64,
    /// Memory of each machine as it shows it, bytes; without it a GB10's.
    pub memory: Option<u64>,
    /// Where the artifact would be; without it the disk's free space is not looked at.
    pub out: Option<PathBuf>,
    /// Bytes a second of the disk; without it a GB10's.
    pub disk_rate: Option<f64>,
}

/// One figure, and how well it is known.
struct Line {
    what: String,
    bytes: u64,
    /// Of a line of time.
    seconds: Option<f64>,
    basis: &'static str,
}

impl Line {
    fn new(what: impl Into<String>, bytes: u64, basis: &'static str) -> Line {
        Line { what: what.into(), bytes, seconds: None, basis }
    }

    fn to_json(&self) -> Value {
        let mut value = json!({"what": self.what, "bytes": self.bytes, "basis": self.basis});
        if let (Some(seconds), Some(object)) = (self.seconds, value.as_object_mut()) {
            object.insert("seconds".into(), seconds.into());
        }
        value
    }

    fn to_text(&self) -> String {
        let side = match self.seconds {
            Some(seconds) => format!("{seconds:>10.1} s  "),
            None => format!("{:>10.2} GiB", self.bytes as f64 / GIB as f64),
        };
        format!("  {:<28}{:>16}{side}  {}\n", self.what, self.bytes, self.basis)
    }
}

/// Bytes on the disk where the artifact would be.
struct Disk {
    lines: Vec<Line>,
    needed: u64,
    /// Where the artifact would be, and what this user may still write there.
    free: Option<(PathBuf, u64)>,
}

impl Disk {
    fn missing(&self) -> u64 {
        self.free.as_ref().map_or(0, |(_, free)| self.needed.saturating_sub(*free))
    }
}

/// Memory of a rank against that of its machine.
struct Memory {
    asked: Asked,
    ranks: Vec<RankTable>,
    reserve: u64,
    /// Of the rank that needs most.
    needed: u64,
    machine: u64,
    system: u64,
    /// Basis of `machine`.
    basis: &'static str,
    context_max: Option<u64>,
    context_model: u64,
    /// The fewest ranks for which it would fit, where no context does.
    tp: Option<u32>,
}

impl Memory {
    fn usable(&self) -> u64 {
        self.machine - self.system
    }

    fn missing(&self) -> u64 {
        self.needed.saturating_sub(self.usable())
    }
}

/// Disk, memory and time of a plan.
pub struct Forecast {
    disk: Disk,
    memory: Memory,
    rate: (f64, &'static str),
    time: Vec<Line>,
}

impl Forecast {
    /// Errors: a context beyond the model's, ranks that cannot cut it, a directory that cannot be asked for its free space.
    pub fn new(config: &Config, plan: &Plan, options: &ForecastOptions) -> Result<Forecast, CompileError> {
        let (rate, basis) = options.disk_rate.map_or((GB10_DISK_RATE, ASSUMED), |rate| (rate, GIVEN));
        let disk = disk(plan, options.out.as_deref())?;
        Ok(Forecast {
            memory: memory(config, plan, options)?,
            time: times(plan, disk.needed, rate),
            disk,
            rate: (rate, basis),
        })
    }

    /// Whether each rank fits into its machine, and the artifact on the disk where that is known.
    pub fn fits(&self) -> bool {
        self.memory.missing() == 0 && self.disk.missing() == 0
    }

    /// For programs: `disk`, `memory` (keys as in `dsv4-run ART check --json`), `time`, `fits`. Sizes are bytes.
    pub fn to_json(&self) -> Value {
        let (disk, memory) = (&self.disk, &self.memory);
        let list = |lines: &[Line]| lines.iter().map(Line::to_json).collect::<Vec<_>>();
        let ranks = memory.ranks.iter().map(|table| {
            let lines = rank_lines(table);
            json!({"rank": table.rank, "bytes": table.bytes(), "lines": list(&lines)})
        });
        json!({
            "fits": self.fits(),
            "disk": {
                "lines": list(&disk.lines),
                "needed_bytes": disk.needed,
                "out": disk.free.as_ref().map(|(path, _)| path.display().to_string()),
                "free_bytes": disk.free.as_ref().map(|(_, free)| free),
                "fits": disk.free.as_ref().map(|_| disk.missing() == 0),
                "missing_bytes": disk.missing(),
            },
            "memory": {
                "backend": memory.asked.target.name(),
                "context": memory.asked.context,
                "sequences": memory.asked.sequences,
                "chunk": memory.asked.chunk,
                "threads": memory.asked.threads,
                "ranks": ranks.collect::<Vec<_>>(),
                "reserve_bytes": memory.reserve,
                "needed_bytes": memory.needed,
                "machine_bytes": memory.machine,
                "machine_basis": memory.basis,
                "system_bytes": memory.system,
                "usable_bytes": memory.usable(),
                "fits": memory.missing() == 0,
                "missing_bytes": memory.missing(),
                "max_context": memory.context_max,
                "model_context": memory.context_model,
                "fitting_tp": memory.tp,
            },
            "time": {"bytes_per_second": self.rate.0, "basis": self.rate.1, "lines": list(&self.time)},
        })
    }

    /// For people; the verdict comes last.
    pub fn to_text(&self) -> String {
        let disk = &self.disk;
        let mut out = format!("\ndisk:\n{}", text(&disk.lines));
        out += &text(&[Line::new("needed", disk.needed, ASSUMED)]);
        if let Some((path, free)) = &disk.free {
            out += &text(&[Line::new("free", *free, EXACT), margin(disk.needed, *free)]);
            let _ = writeln!(out, "  at {}", path.display());
        }
        out += &self.memory_text();
        let (rate, basis) = self.rate;
        let _ = writeln!(out, "\ntime at {:.2} GB/s ({basis}), if the disk is what limits:", rate / GIGABYTE);
        out + &text(&self.time) + "\n" + &self.verdict()
    }

    fn memory_text(&self) -> String {
        let m = &self.memory;
        let mut out = format!(
            "\nmemory of each rank, one to a machine: {} backend, {} tokens of context, {} sequence(s), \
             chunks of {}, {} threads:\n",
            m.asked.target.name(),
            m.asked.context,
            m.asked.sequences,
            m.asked.chunk,
            m.asked.threads
        );
        let mut lines = m.ranks.iter().max_by_key(|t| t.bytes()).map(rank_lines).unwrap_or_default();
        lines.push(Line::new("left to others", m.reserve, ASSUMED));
        lines.push(Line::new("needed", m.needed, ASSUMED));
        let whose = if m.basis == ASSUMED { "machine, a GB10" } else { "machine" };
        lines.push(Line::new(whose, m.machine, m.basis));
        lines.push(Line::new("taken by its system", m.system, ASSUMED));
        lines.push(Line::new("usable", m.usable(), ASSUMED));
        lines.push(margin(m.needed, m.usable()));
        out += &text(&lines);
        let _ = match m.context_max {
            Some(context) => writeln!(out, "  largest context that fits: {context} of the model's {}", m.context_model),
            None => writeln!(out, "  no context fits"),
        };
        out
    }

    fn verdict(&self) -> String {
        let (disk, memory) = (&self.disk, &self.memory);
        if self.fits() {
            let unknown = if disk.free.is_none() { "; the disk's free space is told with -o" } else { "" };
            return format!("fits{unknown}\n");
        }
        let mut out = String::from("DOES NOT FIT\n");
        if memory.missing() > 0 {
            let _ = writeln!(out, "  memory: {}; {}", too_little(memory.missing()), self.what_fits());
        }
        if disk.missing() > 0 {
            let _ = writeln!(out, "  disk: {}; free some or choose another file system", too_little(disk.missing()));
        }
        out
    }

    /// What would fit into the memory instead.
    fn what_fits(&self) -> String {
        let m = &self.memory;
        match (m.context_max, m.tp) {
            (Some(context), _) => format!("--max-context {context} fits"),
            (None, Some(tp)) => format!("no context fits; --tp {tp} fits"),
            (None, None) if m.asked.sequences > 1 => "no context fits, for no number of ranks: lower --max-seqs".into(),
            (None, None) => "no context fits, for no number of ranks: a machine with more memory is needed".into(),
        }
    }
}

fn text(lines: &[Line]) -> String {
    lines.iter().map(Line::to_text).collect()
}

fn too_little(bytes: u64) -> String {
    format!("{bytes} bytes ({:.2} GiB) too little", bytes as f64 / GIB as f64)
}

/// What is over, or what is not there: the difference of something assumed.
fn margin(needed: u64, there: u64) -> Line {
    let what = if needed > there { "MISSING" } else { "to spare" };
    Line::new(what, needed.abs_diff(there), ASSUMED)
}

fn rank_lines(table: &RankTable) -> Vec<Line> {
    table.lines.iter().map(|l| Line::new(l.what, l.bytes, l.basis.name())).collect()
}

fn disk(plan: &Plan, out: Option<&Path>) -> Result<Disk, CompileError> {
    let files = plan.rank_file_bytes();
    let mut lines: Vec<Line> =
        files.iter().enumerate().map(|(rank, bytes)| Line::new(format!("rank{rank}.weights"), *bytes, EXACT)).collect();
    lines.push(Line::new("other files", OTHER_FILES_BYTES, ASSUMED));
    let needed = lines.iter().map(|l| l.bytes).sum();
    let free = out.map(|out| Ok::<_, CompileError>((out.to_path_buf(), free_bytes(out)?))).transpose()?;
    Ok(Disk { lines, needed, free })
}

/// What this user may still write where `out` is or would be made.
fn free_bytes(out: &Path) -> Result<u64, CompileError> {
    let failed =
        |path: &Path, source| CompileError::Io { action: "find its free space", path: path.to_path_buf(), source };
    for dir in out.ancestors() {
        // The last ancestor of a relative path is empty.
        let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
        match rustix::fs::statvfs(dir).map_err(std::io::Error::from) {
            Ok(found) => return Ok(found.f_bavail.saturating_mul(found.f_frsize)),
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            Err(e) => return Err(failed(dir, e)),
        }
    }
    Err(failed(out, ErrorKind::NotFound.into()))
}

fn memory(config: &Config, plan: &Plan, options: &ForecastOptions) -> Result<Memory, CompileError> {
    let model = config.model.max_position_embeddings;
    let context = options.context.unwrap_or(model);
    if context > model {
        let help = "ask for fewer tokens, or leave --max-context out for all that the model allows";
        let expected = format!("at most {model}, what the model allows");
        return Err(CompileError::Usage { what: "--max-context", expected, found: context.to_string(), help });
    }
    let asked = Asked {
        target: options.target,
        context,
        sequences: options.sequences,
        chunk: CHUNK,
        threads: THREADS,
        numerics: Numerics::Published,
        all_logits: false,
        reserve: None,
    };
    let machine = options.memory.unwrap_or(GB10_MEMORY_BYTES);
    let is_gb10 = options.memory.is_none() || options.target == Target::Cuda;
    let reserve = default_reserve(machine, is_gb10);
    let system = machine / SYSTEM_PART;
    let for_ranks = (machine - system).checked_sub(reserve);
    let largest = |plan: &Plan| -> Result<Option<u64>, ModelError> {
        let here = weights(plan).into_iter().max_by_key(|(_, bytes)| *bytes);
        let (Some(here), Some(usable)) = (here, for_ranks) else { return Ok(None) };
        largest_context(&Ranks { config: &config.model, tp: plan.tp, here: &[here] }, &asked, usable)
    };
    let ranks = tables(&Ranks { config: &config.model, tp: plan.tp, here: &weights(plan) }, &asked);
    let ranks = ranks.map_err(CompileError::model(&config.path))?;
    let context_max = largest(plan).map_err(CompileError::model(&config.path))?;
    let mut tp = None;
    if context_max.is_none() {
        let more = [2, 4, 8].into_iter().filter(|tp| *tp > plan.tp);
        // A number of ranks that cannot cut the model is none that fits.
        tp = more
            .into_iter()
            .find(|tp| Plan::new(config, *tp).is_ok_and(|plan| largest(&plan).is_ok_and(|context| context.is_some())));
    }
    Ok(Memory {
        needed: ranks.iter().map(RankTable::bytes).max().unwrap_or(0).saturating_add(reserve),
        asked,
        ranks,
        reserve,
        machine,
        system,
        basis: if options.memory.is_some() { GIVEN } else { ASSUMED },
        context_max,
        context_model: model,
        tp,
    })
}

/// Each rank and its bytes of weights in memory.
fn weights(plan: &Plan) -> Vec<(u32, u64)> {
    plan.layouts.iter().zip(0..).map(|(layout, rank)| (rank, layout.arena_bytes())).collect()
}

/// Times of bytes that pass one disk: writing is taken to be as fast as reading.
fn times(plan: &Plan, written: u64, rate: f64) -> Vec<Line> {
    let read = plan.checkpoint_bytes();
    let files = plan.rank_file_bytes();
    let load = weights(plan).into_iter().map(|(_, bytes)| bytes).max().unwrap_or(0);
    [
        ("pack: read, write, read back", read + written + files.iter().sum::<u64>()),
        ("pack --no-verify", read + written),
        ("load, each rank", load),
    ]
    .map(|(what, bytes)| Line { seconds: Some(bytes as f64 / rate), ..Line::new(what, bytes, ASSUMED) })
    .into()
}
