//! Kernels of a model, compiled ahead of time: every unit that any rank of it may load, in both numerics, for every
//! architecture asked for. No GPU is needed, and the same program gives the same bytes everywhere.
//!
//! Which units there are is `dsv4-kernels`' to say; here they are compiled in a few threads, held against its rules
//! and given their keys. Ranks of one size run the same kernels, so an artifact has one set for all of them.
//! [`find`] opens the compiler, [`add`] gives an artifact that is there other kernels.

pub mod add;
mod find;

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use dsv4_format::{ArchKernels, Digest, FormatError, KernelInput, Progress};
use dsv4_kernels::device::DeviceError;
use dsv4_kernels::device::nvrtc::{Nvrtc, judge};
use dsv4_kernels::device::unit::Unit;
use dsv4_kernels::gpu::kernels::Kernels;
use dsv4_kernels::gpu::shape::Shape;
use dsv4_kernels::numerics::Numerics;
use dsv4_kernels::tuning::Tuning;
use dsv4_model::{ModelConfig, Tp};
use serde_json::{Value, json};

use crate::error::CompileError;
pub use find::find;

/// What is compiled for where nothing else is said: a GB10.
pub const ARCH_DEFAULT: &str = "sm_121a";
/// The architectures that every unit is known to compile for.
pub const ARCHES_KNOWN: [&str; 2] = ["sm_90a", "sm_121a"];
/// More threads than this gain little: part of the compiler lets in one at a time.
const THREADS_MAX: usize = 8;
/// For a compiler that recurses.
const STACK_BYTES: usize = 16 << 20;
/// Of the compiler's messages as many lines are shown.
const LOG_LINES_MAX: usize = 10;
/// Whichever a rank starts with, its kernels are there.
const NUMERICS: [Numerics; 2] = [Numerics::Published, Numerics::Float];

/// For what to compile, and with what.
#[derive(Clone, Debug)]
pub struct Target {
    /// The architecture, as the compiler names it.
    pub arch: String,
    /// The choices among equal kernels.
    pub tuning: Tuning,
}

impl Target {
    /// An architecture with the table that comes with this program.
    pub fn new(arch: &str) -> Target {
        Target { arch: arch.to_owned(), tuning: Tuning::for_arch(arch) }
    }
}

/// Whether `arch` is the name of a GPU architecture: `sm_`, a number, and perhaps `a` or `f`.
pub fn is_arch(arch: &str) -> bool {
    let digits = arch.strip_prefix("sm_").map(|rest| rest.strip_suffix(['a', 'f']).unwrap_or(rest));
    digits.is_some_and(|d| (2..=4).contains(&d.len()) && d.bytes().all(|b| b.is_ascii_digit()))
}

/// Everything compiled for a model, and how long it took.
#[derive(Default)]
pub struct KernelSet {
    /// Ascending by architecture, with their tables; kernels ascending by key.
    pub arches: Vec<ArchKernels>,
    /// From opening the compiler on.
    pub seconds: f64,
}

/// How many kernels an architecture has, for reports.
#[derive(Clone, Debug)]
pub struct Count {
    /// The architecture.
    pub arch: String,
    /// Its kernels: units that were compiled.
    pub kernels: usize,
    /// Bytes of their cubins.
    pub bytes: u64,
}

impl KernelSet {
    /// What was compiled, in numbers.
    pub fn counts(&self) -> Vec<Count> {
        let count = |arch: &ArchKernels| Count {
            arch: arch.arch.clone(),
            kernels: arch.kernels.len(),
            bytes: arch.kernels.iter().map(|k| k.cubin.len() as u64).sum(),
        };
        self.arches.iter().map(count).collect()
    }
}

impl Count {
    /// For programs.
    pub fn to_json(&self) -> Value {
        json!({"arch": self.arch, "kernels": self.kernels, "bytes": self.bytes})
    }
}

/// For people: what there is of each architecture, and how long all of it took. Nothing where there is nothing.
pub fn counts_text(counts: &[Count], seconds: f64) -> String {
    let one = |c: &Count| format!("{} kernels of {} bytes for {}", c.kernels, c.bytes, c.arch);
    match counts {
        [] => String::new(),
        all => format!("{}, compiled in {seconds:.1} s\n", all.iter().map(one).collect::<Vec<_>>().join(", ")),
    }
}

/// All units that the ranks of a model load on a target, by key; the same for every rank.
///
/// Errors: [`CompileError::Shape`] for a model, or a table for it, that there are no kernels for.
pub fn units(config: &ModelConfig, tp: Tp, target: &Target) -> Result<BTreeMap<[u8; 32], Unit>, CompileError> {
    for (rank, numerics) in tp.all().flat_map(|rank| NUMERICS.map(|numerics| (rank, numerics))) {
        Shape::check(config, rank, numerics, &target.tuning)?;
    }
    let of = |rank: Tp| -> BTreeMap<[u8; 32], Unit> {
        let units = NUMERICS.into_iter().flat_map(|numerics| Kernels::units(config, rank, numerics, &target.tuning));
        units.map(|unit| (unit.key(&target.arch), unit)).collect()
    };
    let first = of(tp);
    for rank in tp.all() {
        assert!(of(rank).keys().eq(first.keys()), "rank {} of {} has other kernels", rank.rank(), tp.size());
    }
    Ok(first)
}

/// Compiles all kernels of a model's ranks for `targets`. Without targets nothing is needed and nothing is done.
///
/// Errors: those of [`units`], [`CompileError::NoNvrtc`], [`CompileError::Kernel`] for the first unit that does not compile or breaks a rule.
pub fn compile(
    config: &ModelConfig,
    tp: Tp,
    targets: &[Target],
    nvrtc: Option<&Path>,
    jobs: Option<NonZeroUsize>,
    progress: &dyn Progress,
) -> Result<KernelSet, CompileError> {
    if targets.is_empty() {
        return Ok(KernelSet::default());
    }
    let started = Instant::now();
    let mut targets: Vec<&Target> = targets.iter().collect();
    targets.sort_by(|a, b| a.arch.cmp(&b.arch));
    targets.dedup_by(|a, b| a.arch == b.arch);
    let mut work = Vec::new();
    for (index, target) in targets.iter().enumerate() {
        work.extend(units(config, tp, target)?.into_iter().map(|(key, unit)| (index, key, unit)));
    }
    let nvrtc = find(nvrtc)?;
    let arches: Vec<&str> = targets.iter().map(|t| t.arch.as_str()).collect();
    progress.start_count(&format!("kernels for {}", arches.join(", ")), work.len() as u64);
    let cubins = in_threads(jobs, &work, |(index, _, unit)| {
        let cubin = compile_unit(&nvrtc, unit, &targets[*index].arch)?;
        progress.add(1);
        Ok(cubin)
    })?;
    progress.finish();
    let table = |target: &&Target| ArchKernels {
        arch: target.arch.clone(),
        tuning: Some(target.tuning.text()),
        kernels: Vec::new(),
    };
    let mut arches: Vec<ArchKernels> = targets.iter().map(table).collect();
    // In the order of targets and keys, whoever compiled what.
    for ((index, key, unit), cubin) in work.into_iter().zip(cubins) {
        arches[index].kernels.push(KernelInput { family: unit.family.into(), key: Digest(key), cubin });
    }
    Ok(KernelSet { arches, seconds: started.elapsed().as_secs_f64() })
}

/// One unit's cubin, if it is as it must be.
fn compile_unit(nvrtc: &Nvrtc, unit: &Unit, arch: &str) -> Result<Vec<u8>, CompileError> {
    let broken = |expected: String, found: String| CompileError::Kernel {
        family: unit.family,
        arch: arch.to_owned(),
        expected,
        found,
        help: match ARCHES_KNOWN.contains(&arch) {
            true => {
                "this is a fault of this program: report it with the command line and config.json; --arch none packs for the CPU alone"
            }
            false => "kernels are written for sm_90a and sm_121a; others may compile or not",
        },
    };
    let (cubin, log) = nvrtc.compile(unit, arch).map_err(|error| {
        let found = match error {
            DeviceError::Compile { log, .. } => log,
            other => other.to_string(),
        };
        broken("it to compile".into(), first_lines(&found))
    })?;
    judge(unit, &cubin, &log).map_err(|fault| {
        let expected = format!("kernel {} to have {}", fault.kernel, fault.expected);
        broken(expected, fault.found)
    })?;
    Ok(cubin)
}

fn first_lines(text: &str) -> String {
    let mut lines = text.lines();
    let mut out: Vec<&str> = lines.by_ref().take(LOG_LINES_MAX).collect();
    if lines.next().is_some() {
        out.push("…");
    }
    out.join("\n    ")
}

/// Results in the order of `work`; of several errors the one that comes first there.
fn in_threads<W: Sync, T: Send>(
    jobs: Option<NonZeroUsize>,
    work: &[W],
    one: impl Fn(&W) -> Result<T, CompileError> + Sync,
) -> Result<Vec<T>, CompileError> {
    let threads = jobs.or_else(|| std::thread::available_parallelism().ok()).map_or(1, NonZeroUsize::get);
    let next = AtomicUsize::new(0);
    let done: Mutex<BTreeMap<usize, Result<T, CompileError>>> = Mutex::new(BTreeMap::new());
    std::thread::scope(|scope| {
        for _ in 0..threads.min(THREADS_MAX).min(work.len()) {
            let body = || {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some(item) = work.get(at) else { return };
                    let result = one(item);
                    if result.is_err() {
                        next.store(work.len(), Ordering::Relaxed);
                    }
                    done.lock().unwrap_or_else(PoisonError::into_inner).insert(at, result);
                }
            };
            let started = std::thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, body);
            started.map_err(|source| {
                next.store(work.len(), Ordering::Relaxed);
                FormatError::Thread { what: "a thread that compiles kernels", source }
            })?;
        }
        Ok::<(), FormatError>(())
    })?;
    done.into_inner().unwrap_or_else(PoisonError::into_inner).into_values().collect()
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use dsv4_kernels::ops::rms_norm;

    use super::*;

    /// The compiler, where it is; a test without it passes and says that it did nothing.
    fn nvrtc() -> Option<Nvrtc> {
        let found = find(None);
        if let Err(error) = &found {
            eprintln!("SKIPPED: {error}");
            assert!(std::env::var_os("DSV4_NO_SKIPS").is_none(), "skips are not allowed");
        }
        found.ok()
    }

    #[test]
    fn a_unit_that_breaks_a_rule_is_refused_with_its_family() {
        let Some(nvrtc) = nvrtc() else { return };
        let good = rms_norm::unit(4096, Numerics::Float);
        assert_eq!(compile_unit(&nvrtc, &good, "sm_121a").unwrap()[..4], *b"\x7fELF");
        let refused = |change: fn(&mut Unit), arch: &str| {
            let mut unit = good.clone();
            change(&mut unit);
            let error = compile_unit(&nvrtc, &unit, arch).unwrap_err();
            assert_eq!(error.exit_code(), 3);
            error.to_string()
        };
        let all_have = |text: &str, words: &[&str]| assert!(words.iter().all(|word| text.contains(word)), "{text}");
        let text = refused(|unit| unit.source = "KERNEL(rms_norm, RmsNormArgs, 32) { missing(a.x); }", "sm_121a");
        all_have(&text, &["rms_norm for sm_121a", "it to compile", "missing", "help: ", "report it"]);
        let text = refused(|unit| unit.kernels[0].1 = 101_376, "sm_121a");
        all_have(&text, &["kernel rms_norm to have at most 101376 bytes of shared memory", "101376 dynamic"]);
        let text = refused(|unit| unit.kernels.push(("gone".into(), 0)), "sm_121a");
        all_have(&text, &["kernel gone to have its code in the cubin", "only that of rms_norm"]);
        let spills = |unit: &mut Unit| {
            unit.source = "extern \"C\" __global__ void __launch_bounds__(1024, 2) rms_norm(float* x, int n) {
                float v[96];
                for (int i = 0; i < 96; i++) v[i] = x[i * 1024 + threadIdx.x];
                for (int k = 0; k < n; k++)
                    for (int i = 0; i < 96; i++) v[i] = v[i] * v[(i + 1) % 96] + v[(i + 7) % 96];
                for (int i = 0; i < 96; i++) x[i * 1024 + threadIdx.x] = v[i];
            }"
        };
        all_have(&refused(spills, "sm_121a"), &["no spilled registers", "bytes of them"]);
        all_have(&refused(|_| (), "sm_99"), &["rms_norm for sm_99", "written for sm_90a and sm_121a"]);
    }

    #[test]
    fn of_several_errors_the_first_in_order_is_told() {
        let work: Vec<usize> = (0..64).collect();
        let jobs = NonZeroUsize::new(4);
        let fault = |at: usize| CompileError::Usage {
            what: "a test",
            expected: String::new(),
            found: at.to_string(),
            help: "none",
        };
        let done = in_threads(jobs, &work, |at| Ok(at * 2)).unwrap();
        assert_eq!(done, (0..64).map(|at| at * 2).collect::<Vec<_>>());
        let error = in_threads(jobs, &work, |at| if *at % 32 == 7 { Err(fault(*at)) } else { Ok(*at) }).unwrap_err();
        assert!(matches!(&error, CompileError::Usage { found, .. } if found == "7"), "{error}");
    }

    #[test]
    fn the_time_is_told_once() {
        let count = |arch: &str| Count { arch: arch.into(), kernels: 3, bytes: 40 };
        let text = counts_text(&[count("sm_121a"), count("sm_90a")], 2.0);
        assert_eq!(text, "3 kernels of 40 bytes for sm_121a, 3 kernels of 40 bytes for sm_90a, compiled in 2.0 s\n");
        assert_eq!(counts_text(&[], 2.0), "");
    }

    #[test]
    fn architectures_have_their_names() {
        assert!(["sm_90a", "sm_121a", "sm_121", "sm_100f"].iter().all(|arch| is_arch(arch)));
        assert!(
            !["", "sm_", "sm_a", "sm_121x", "sm_121aa", "compute_90", "sm_12345", "SM_90"].iter().any(|a| is_arch(a))
        );
    }

    /// Ranks have the same kernels, and both numerics share what does not depend on them.
    #[test]
    fn units_are_those_of_every_rank() {
        let config = include_str!("../../tests/golden/tp8_config.json");
        let model = ModelConfig::parse(config).unwrap();
        for size in [1, 2, 4, 8] {
            let target = Target::new("sm_121a");
            let all: Vec<_> = Tp::new(0, size).unwrap().all().map(|tp| units(&model, tp, &target).unwrap()).collect();
            assert!(all.iter().all(|one| one.keys().eq(all[0].keys())) && all.len() == size as usize);
        }
    }
}
