//! From an artifact to a rank that can run: contracts, exact cover, weights in memory; and the verb `load`,
//! which does the last of it alone.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use dsv4_format::io::cache_note;
use dsv4_format::{Arena, Artifact, Floor, FormatError, LoadOptions, LoadReport, Look, NoProgress, Progress, Section};
use dsv4_kernels::collective::Collective;
use dsv4_kernels::device::Buffer;
use dsv4_kernels::numerics::Numerics;
use dsv4_kernels::reference::Reference;
use dsv4_kernels::weights::Weights;
use dsv4_model::contract;
use dsv4_model::plan::sections;
use dsv4_model::{ModelConfig, Tp};

use serde_json::{Value, json};

use crate::cli::LoadArgs;
use crate::compute::{Compute, choose, cuda};
use crate::error::RunError;
use crate::gpu::load_arena;
use crate::preflight::disk::{self, DiskProbe};
use crate::preflight::host::Host;
use crate::preflight::memory::{Asked, Supply, Target};
use crate::preflight::{admit, report};
use crate::progress::Bar;
use crate::stall;
use crate::terminal::{print_now, tell};

/// Memory that loading leaves to others on the CPU, if there are no wishes, and at most this part of the machine.
const FLOOR_BYTES: u64 = 512 << 20;
const FLOOR_PART: u64 = 32;
/// The same where a GPU has the machine's memory: there a shortage can stop the machine.
const UNIFIED_FLOOR_BYTES: u64 = 4 << 30;
/// How long `load` measures the disk beforehand.
const PROBE_WITHIN: Duration = Duration::from_millis(500);

/// An artifact that this program can run.
pub struct Opened {
    /// The files.
    pub artifact: Artifact,
    /// The model in them.
    pub config: ModelConfig,
}

/// Opens an artifact and checks that it was made for this program's description of the model.
///
/// Reads no weights; ends the process when the disk stops answering. Errors: the files, another contract, a
/// tensor missing, extra or of another size.
pub fn open(path: &Path) -> Result<Opened, RunError> {
    stall::guard(path, &NoProgress, |_| examine(path))
}

fn examine(path: &Path) -> Result<Opened, RunError> {
    let artifact = Artifact::open(path)?;
    let manifest = artifact.manifest();
    let ours = [contract::weight_contract(), contract::op_contract()];
    let stored = [manifest.weight_contract, manifest.op_contract];
    let names = [("weight", contract::WEIGHT_CONTRACT_NAME), ("op", contract::OP_CONTRACT_NAME)];
    for ((text, digest), (name, member)) in ours.iter().zip(stored).zip(names) {
        if contract::hash(text) != digest.0 {
            let theirs = artifact.meta(member)?.unwrap_or_default();
            let theirs = String::from_utf8_lossy(&theirs).into_owned();
            let (line, ours, theirs) = contract::first_difference(text, &theirs).unwrap_or_default();
            return Err(RunError::Contract { contract: name, line, ours, theirs });
        }
    }
    let config = ModelConfig::parse(&manifest.config_json)?;
    for rank in &manifest.ranks {
        let tp = Tp::new(rank.rank, manifest.tp)?;
        let mut expected = Vec::new();
        for section in sections(&config, tp)? {
            for row in section.rows {
                let (shape, bytes) = (row.local_shape(tp)?, row.artifact_bytes(tp)?);
                expected.push(format!("{}: {} {} {shape:?}, {bytes} bytes", section.name, row.name, row.format.name()));
            }
        }
        let describe = |s: &Section| -> Vec<String> {
            let tensors = s.tensors.iter();
            tensors.map(|t| format!("{}: {} {} {:?}, {} bytes", s.name, t.name, t.dtype, t.shape, t.len)).collect()
        };
        let found: Vec<String> = rank.sections.iter().flat_map(describe).collect();
        let differs = (0..expected.len().max(found.len())).find(|i| expected.get(*i) != found.get(*i));
        if let Some(i) = differs {
            let shown = |list: &[String]| list.get(i).cloned().unwrap_or("no more tensors".into());
            return Err(RunError::Input {
                file: path.join("MANIFEST"),
                expected: format!("tensor {i} of rank {} to be {}", rank.rank, shown(&expected)),
                found: shown(&found),
                help: "pack the checkpoint again",
            });
        }
    }
    Ok(Opened { artifact, config })
}

/// How a rank computes.
#[derive(Clone, Copy, Debug)]
pub struct RankOptions {
    /// Activation arithmetic.
    pub numerics: Numerics,
    /// Sequences at once.
    pub slots: usize,
    /// Most rows of one sequence in a step: the prefill chunk.
    pub rows_max: usize,
}

/// Bytes held by an [`Arena`], for the compute backend.
struct ArenaBytes(Arena);

impl AsRef<[u8]> for ArenaBytes {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// The floor under memory while weights are loaded: as asked (0 for none), else by the machine, and never
/// above what a plan with this reserve leaves.
pub fn floor(asked: Option<u64>, reserve: Option<u64>, host: &Host, target: Target) -> Option<Floor<'static>> {
    let total = host.memory.as_ref().map_or(0, |memory| memory.total);
    let bytes = asked.unwrap_or_else(|| {
        let usual = if target == Target::Cuda { UNIFIED_FLOOR_BYTES } else { FLOOR_BYTES };
        usual.min(total / FLOOR_PART).min(reserve.unwrap_or(u64::MAX))
    });
    let look: &'static (dyn Fn() -> Look + Sync) = if target == Target::Cuda { &unified_here } else { &memory_here };
    (bytes > 0).then(|| Floor::new(bytes, look))
}

fn memory_here() -> Look {
    memory_under(Path::new("/"), Target::Cpu)
}

fn unified_here() -> Look {
    memory_under(Path::new("/"), Target::Cuda)
}

/// What the memory plan counts as there, now; so the cgroup's limit is seen as the plan sees it, and on a machine
/// whose memory is the GPU's only what its driver gets.
fn memory_under(root: &Path, target: Target) -> Look {
    let supply = Supply::of(&Host::for_memory(root), target)?;
    Some((supply.basis, supply.usable))
}

/// What a user is told after loading, lines of text.
pub fn summary(rank: u32, r: &LoadReport) -> String {
    let (size, rate) = (report::size(r.bytes), r.rate() / 1e9);
    let (engine, mode) = (r.engine.name(), r.mode.name());
    let mut text = format!("rank {rank}: {size} loaded in {:.2} s, {rate:.2} GB/s ({engine}, {mode})\n", r.seconds);
    if r.retries > 0 {
        text += &format!("warning: {} blocks had to be read again: check memory and disk (dmesg)\n", r.retries);
    }
    if r.paused_seconds > 0.0 {
        text += &format!("warning: reading waited {:.1} s for memory\n", r.paused_seconds);
    }
    match (r.is_cache_bounded(), r.cached_bytes_after) {
        (Some(false), Some(cached)) => {
            let cached = report::size(cached);
            text += &format!("warning: {cached} of the rank's file are in the page cache: another program reads it\n");
        }
        (None, _) => text += "note: how much of the rank's file is in the page cache this system does not tell\n",
        _ => {}
    }
    text += &cache_note().map_or(String::new(), |note| format!("note: {note}\n"));
    text
}

fn load_json(rank: u32, r: &LoadReport, disk: &DiskProbe, compute: &Compute) -> Value {
    let disk = disk.is_telling().then(|| disk.rate());
    json!({
        "rank": rank,
        "backend": compute.name(),
        "bytes": r.bytes,
        "seconds": r.seconds,
        "bytes_per_second": r.rate(),
        "disk_bytes_per_second": disk,
        "disk_percent": disk.map(|disk| 100.0 * r.rate() / disk),
        "engine": r.engine.name(),
        "mode": r.mode.name(),
        "queue_depth": r.queue_depth,
        "threads": r.threads,
        "staged": r.staged,
        "retries": r.retries,
        "paused_seconds": r.paused_seconds,
        "cached_bytes_before": r.cached_bytes_before,
        "cached_bytes_after": r.cached_bytes_after,
    })
}

/// Loads a rank; ends the process when its disk stops answering.
pub fn load_watched(
    artifact: &Artifact,
    rank: u32,
    options: &LoadOptions<'_>,
    progress: &dyn Progress,
) -> Result<(Arena, LoadReport), FormatError> {
    stall::guard(&artifact.rank_path(rank), progress, |progress| artifact.load(rank, options, progress))
}

/// `load`: one rank into memory and out of it again. Errors: those of a start.
pub fn run_load(artifact: &Path, args: &LoadArgs) -> Result<(), RunError> {
    let opened = open(artifact)?;
    // A rank that is not here is told as what it is, before anything is planned or measured for it.
    opened.require_rank(args.rank)?;
    let (compute, note) = choose(args.backend, &opened.artifact, &|| cuda(0))?;
    if let (Some(note), false) = (note, args.quiet) {
        tell(&note);
    }
    let host = compute.host(Path::new("/"));
    let threads = args.threads.map_or_else(|| LoadOptions::default().threads, usize::from);
    let asked = Asked {
        target: compute.target(),
        context: 1,
        sequences: 1,
        chunk: 1,
        threads: threads as u64,
        numerics: Numerics::Published,
        all_logits: false,
        reserve: args.reserve,
    };
    admit(&opened, &[args.rank], &asked, &host)?;
    let options = LoadOptions {
        io: args.io.into(),
        threads,
        queue_depth: args.queue_depth.map(usize::from),
        staged: args.staged,
        floor: floor(args.floor, args.reserve, &host, compute.target()),
    };
    let disk = disk::probe(&opened.artifact.rank_path(args.rank), PROBE_WITHIN)?;
    let bar = Bar::new(args.quiet);
    let report = match &compute {
        Compute::Cpu => load_watched(&opened.artifact, args.rank, &options, &bar)?.1,
        Compute::Gpu(device) => {
            let arena = Buffer::new(&device.gpu, opened.artifact.arena_bytes(args.rank)?)?;
            load_arena(&opened, args.rank, device.gpu.as_ref(), &arena, &options, &bar)?
        }
    };
    let mut text = summary(args.rank, &report);
    if args.json {
        text = format!("{}\n", load_json(args.rank, &report, &disk, &compute));
    } else if disk.is_telling() {
        let percent = 100.0 * report.rate() / disk.rate();
        text += &format!("{percent:.0} % of the disk, which gave {:.2} GB/s before\n", disk.rate() / 1e9);
    }
    print_now(&text).map(|_| ())
}

impl Opened {
    /// Whether a rank's file is here, whole and of this artifact; reads no weights, and ends the process when
    /// the disk stops answering. Errors: what is wrong with it.
    pub fn require_rank(&self, rank: u32) -> Result<(), FormatError> {
        if let Some(seed) = self.artifact.weights_seed() {
            return Err(FormatError::Weightless { path: self.artifact.path().to_path_buf(), seed });
        }
        stall::guard(&self.artifact.rank_path(rank), &NoProgress, |_| self.artifact.rank_reader(rank).map(|_| ()))
    }

    /// The CPU backend of a rank over its loaded weights.
    pub fn backend(
        &self,
        arena: Arena,
        collective: Box<dyn Collective>,
        options: RankOptions,
    ) -> Result<Reference, RunError> {
        let tp = Tp::new(collective.rank(), self.artifact.manifest().tp)?;
        let layout = Arc::clone(self.artifact.layout(tp.rank())?);
        let place = move |name: &str| {
            let place = layout.tensor(name)?;
            Some(place.arena_offset as usize..(place.arena_offset + place.len) as usize)
        };
        let weights = Weights::new(&self.config, tp, Arc::new(ArenaBytes(arena)), place)?;
        let Opened { config, .. } = self;
        Ok(Reference::new(config.clone(), tp, options.numerics, weights, collective, options.slots, options.rows_max))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::preflight::texts::Meminfo;

    #[test]
    fn floors() {
        let memory = |gib: u64| Meminfo { total: gib << 30, ..Meminfo::default() };
        let host = |gib| Host { memory: Some(memory(gib)), ..Host::default() };
        let of = |reserve, gib, target| floor(None, reserve, &host(gib), target).map(|floor| floor.bytes);
        assert_eq!(of(None, 128, Target::Cuda), Some(4 << 30));
        assert_eq!(of(None, 128, Target::Card), Some(512 << 20));
        assert_eq!(of(None, 1, Target::Cpu), Some(32 << 20));
        assert_eq!(of(Some(0), 128, Target::Cuda), None);
        assert_eq!(floor(Some(7), None, &host(128), Target::Cuda).map(|floor| floor.bytes), Some(7));
    }

    #[test]
    fn memory_is_what_the_tightest_limit_leaves() {
        let temp = std::env::temp_dir().join(format!("dsv4-floor-{}", std::process::id()));
        let write = |file: &str, text: &str| {
            let path = temp.join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("proc/meminfo", "MemTotal: 1000000 kB\nMemFree: 300 kB\nMemAvailable: 800 kB\n");
        assert_eq!(memory_under(&temp, Target::Cpu), Some(("MemAvailable", 800 << 10)));
        let (figure, bytes) = memory_under(&temp, Target::Cuda).unwrap();
        assert!(figure.contains("MemFree") && bytes == 300 << 10, "{figure} {bytes}");
        write("proc/self/cgroup", "0::/a\n");
        write("sys/fs/cgroup/a/memory.max", "500000\n");
        write("sys/fs/cgroup/a/memory.current", "450000\n");
        let (figure, bytes) = memory_under(&temp, Target::Cpu).unwrap();
        assert!(figure.contains("cgroup") && bytes == 50_000, "{figure} {bytes}");
        // What is below this is the driver's, not the cgroup's.
        assert_eq!(memory_under(&temp, Target::Cuda).map(|look| look.1), Some(300 << 10));
        std::fs::remove_dir_all(&temp).unwrap();
        assert_eq!(memory_under(&temp, Target::Cpu), None);
    }
}
