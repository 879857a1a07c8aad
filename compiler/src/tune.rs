//! `dsv4c tune`: the table of points for an architecture, measured on the GPU of this machine or estimated.
//!
//! What can be chosen, what it costs and how it is timed is `dsv4-kernels`' to say (`tuning`); here is the order of
//! things: compile what is promising in several threads, time it, choose, and tell what was expected.

mod report;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Args;
use dsv4_format::Artifact;
use dsv4_kernels::device::DeviceError;
use dsv4_kernels::device::cuda::Cuda;
use dsv4_kernels::device::nvrtc::{COMPILER, Nvrtc};
use dsv4_kernels::device::unit::{Image, Unit};
use dsv4_kernels::tuning::Tuning;
use dsv4_kernels::tuning::chip::{self, Chip};
use dsv4_kernels::tuning::choose::{Timed, choose};
use dsv4_kernels::tuning::cost::{self, Constants};
use dsv4_kernels::tuning::measure::{self, Candidate, Compiled, Limits, Measured, UNITS_MAX};
use dsv4_kernels::tuning::predict;
use dsv4_kernels::tuning::rank;
use dsv4_kernels::tuning::resources;
use dsv4_kernels::tuning::table::{Entry, Source, Table};
use dsv4_kernels::tuning::tunables::{self, Tunable};
use dsv4_model::{ModelConfig, Tp};

use crate::CompileError;
use crate::checkpoint::Config;
use crate::kernels::{self, ARCH_DEFAULT};
pub use report::TuneReport;
use report::{Row, Validated};

/// The config of DeepSeek-V4-Flash: what tables are made for unless another is named.
const FLASH: &str = include_str!("../../tests/golden/flash_config.json");
/// What the point of untuned tables is weighed by among estimates.
const UNTUNED_BONUS: f64 = 0.98;
/// Most text of a file of measurements, bytes.
const LINES_BYTES_MAX: u64 = 16 << 20;

/// Flags of `dsv4c tune`.
#[derive(Args, Clone, Debug)]
pub struct TuneArgs {
    /// `flash`, a config.json, a directory with one, or an artifact.
    #[arg(long, default_value = "flash")]
    config: PathBuf,
    /// Number of ranks [default: the artifact's, or 2].
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=8))]
    tp: Option<u32>,
    /// Architecture [default: that of this machine's GPU, without one sm_121a].
    #[arg(long)]
    arch: Option<String>,
    /// Directory of NVRTC 13.0.
    #[arg(long, value_name = "DIR")]
    nvrtc: Option<PathBuf>,
    /// The table's file; without it nothing is written.
    #[arg(short, long)]
    out: Option<PathBuf>,
    /// Time of every shape beside its floor, not only a summary.
    #[arg(long)]
    report: bool,
    /// Predict decoding and prefill; nothing is measured.
    #[arg(long, conflicts_with_all = ["validate", "measurements"])]
    predict: bool,
    /// Write every measured point to this file, a line each.
    #[arg(long, value_name = "FILE")]
    measurements: Option<PathBuf>,
    /// Fit the cost model on such a file and say how well it orders what it was not fitted on; nothing is measured.
    #[arg(long, value_name = "FILE")]
    validate: Option<PathBuf>,
    /// Choose from such a file instead of measuring.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["measurements", "predict", "validate", "compile_only"])]
    from: Option<PathBuf>,
    /// Keep compiled kernels in this directory and take them from there.
    #[arg(long, value_name = "DIR")]
    cubins: Option<PathBuf>,
    /// Stop after filling --cubins: where there is no GPU, for a machine that has one.
    #[arg(long, requires = "cubins")]
    compile_only: bool,
    /// Seconds that compiling and measuring may take together; what there is by then becomes the table.
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    seconds: u64,
    /// Compiled units of a kernel and number of rows, and points of a kernel at a shape, at most.
    #[arg(long, default_value_t = UNITS_MAX as u32, value_parser = clap::value_parser!(u32).range(1..=1024))]
    points: u32,
    /// Threads that compile [default: one per processor].
    #[arg(long)]
    jobs: Option<NonZeroUsize>,
    /// Only kernels whose name begins so.
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    /// The report for programs.
    #[arg(long)]
    pub json: bool,
}

/// Does what the flags say; `tell` gets lines for people.
///
/// Errors: the config, files, a GPU that fails, measurements without a GPU of the architecture.
pub fn tune(args: &TuneArgs, tell: &(dyn Fn(&str) + Sync)) -> Result<TuneReport, CompileError> {
    let started = Instant::now();
    let (config, tp) = model(&args.config, args.tp)?;
    let elsewhere = args.predict || args.validate.is_some() || args.compile_only || args.from.is_some();
    let gpu = match if elsewhere { Err(DeviceError::NoDriver) } else { Cuda::open(0) } {
        Ok(gpu) => Some(gpu),
        Err(DeviceError::NoDriver) => None,
        // A driver without a GPU, or one that fails: an estimate is still to be had.
        Err(error) => {
            tell(&error.to_string());
            None
        }
    };
    let here = gpu.as_ref().map(|gpu| gpu.facts().arch());
    let arch = args.arch.clone().or_else(|| here.clone()).unwrap_or_else(|| ARCH_DEFAULT.to_owned());
    let chip = chip::of(&arch).ok_or_else(|| CompileError::Usage {
        what: "--arch",
        expected: "sm_121a or sm_90a".into(),
        found: arch.clone(),
        help: "the cost model knows these chips alone",
    })?;
    let mut tunables = tunables::all(&config, tp);
    if let Some(only) = &args.only {
        tunables.retain(|t| t.kernel().starts_with(only.as_str()));
    }
    let mut report = TuneReport::new(&arch, chip.name, tp.size());
    report.details = args.report;
    if let Some(file) = &args.validate {
        report.validated = Some(validate(file, &tunables, &chip)?);
        return Ok(report);
    }
    if args.predict {
        let tuning = Tuning::for_arch(&arch);
        report.rows = rows(&tunables, &chip, &tuning, &[]);
        report.forecasts = predict::forecasts(&config, tp, &chip, &tuning);
        return Ok(report);
    }
    let gpu = gpu.filter(|_| here.as_deref() == Some(arch.as_str()));
    if let Some(file) = args.measurements.as_ref().filter(|_| gpu.is_none() && !args.compile_only) {
        return Err(CompileError::Usage {
            what: "--measurements",
            expected: format!("a GPU of {arch} on this machine, to write {}", file.display()),
            found: here.unwrap_or_else(|| "none".into()),
            help: "run it where such a GPU is; without --measurements the table is estimated",
        });
    }
    // Of what was measured elsewhere all is looked at.
    let units_max = if args.from.is_some() { usize::MAX } else { args.points as usize };
    let candidates = measure::candidates(&tunables, &chip, units_max);
    tell(&format!("{}: {} points of {} kernels and shapes", chip.name, candidates.len(), tunables.len()));
    let key = |unit: &Unit| hex(&unit.key(&arch));
    let compiled = match args.from {
        Some(_) => HashMap::new(),
        None => {
            let order = measure::order(&tunables, &candidates);
            // Half of the time, so that what is compiled is measured.
            let until = gpu.is_some().then(|| started + Duration::from_secs(args.seconds) / 2);
            compile(args, &arch, &candidates, &order, &key, until, tell)?
        }
    };
    if args.compile_only {
        report.compiled = compiled.len();
        return Ok(report);
    }
    let measured = match (&gpu, &args.from) {
        (_, Some(file)) => {
            let (text, lines) = read_lines(file)?;
            report.gpu = rank::gpu_of(&text).map(str::to_owned);
            rank::measured(&lines, &tunables)
        }
        (None, None) => {
            tell("no such GPU here: the table is estimated");
            Vec::new()
        }
        (Some(gpu), None) => {
            report.gpu = Some(gpu.facts().name.clone());
            let tell: &dyn Fn(&str) = &|line| tell(line);
            let until = started + Duration::from_secs(args.seconds);
            let limits = Limits { until, samples: measure::SAMPLES, flush_bytes: chip.l2_bytes * 4, tell };
            measure::measure(gpu, &tunables, &candidates, &key, &compiled, &limits)?
        }
    };
    if let (Some(file), Some(gpu)) = (&args.measurements, &gpu) {
        let about = format!("{}, {COMPILER}, {arch}, tensor parallel {}", gpu.facts().name, tp.size());
        write(file, &rank::write(&about, &tunables, &measured))?;
    }
    if gpu.is_some() {
        let about = rank::write("this run", &tunables, &measured);
        let lines = rank::read(&about).map_err(|source| CompileError::Tuning { file: "this run".into(), source })?;
        report.validated =
            rank::validate(&lines, &tunables, &chip).map(|found| Validated { file: "this run".into(), found });
    }
    let measured = whole(&tunables, &candidates, measured, tell);
    let table = table(&tunables, &candidates, &compiled, &measured, &key, &chip, report.gpu.as_deref());
    // What was chosen is what this program accepts.
    let tuning = Tuning::of(&table).map_err(|source| {
        let file =
            args.from.as_ref().or(args.out.as_ref()).map_or_else(|| PathBuf::from("the new table"), PathBuf::clone);
        CompileError::Tuning { file, source }
    })?;
    report.rows = rows(&tunables, &chip, &tuning, &measured);
    if let Some(out) = &args.out {
        write(out, &table.text())?;
        report.out = Some(out.clone());
    }
    report.table = Some(table);
    report.seconds = started.elapsed().as_secs_f64();
    Ok(report)
}

/// The model and the rank whose kernels are tuned: all ranks have the same shapes.
fn model(source: &Path, tp: Option<u32>) -> Result<(ModelConfig, Tp), CompileError> {
    let of = |text: &str| ModelConfig::parse(text).map_err(CompileError::model(source));
    let (config, default) = if source == Path::new("flash") {
        (of(FLASH)?, 2)
    } else if source.join("MANIFEST").is_file() {
        let artifact = Artifact::open(source)?;
        (of(&artifact.manifest().config_json)?, artifact.manifest().tp)
    } else {
        (Config::read(source)?.model, 2)
    };
    let tp = Tp::new(0, tp.unwrap_or(default)).map_err(CompileError::model(source))?;
    // A cut that a tensor does not allow is refused here.
    for row in dsv4_model::tensors::table(&config) {
        row.local_shape(tp).map_err(CompileError::model(source))?;
    }
    Ok((config, tp))
}

/// Units of the candidates, by key, those of the first tunables first; `until`: of a GPU that is there, when no further
/// one is begun. Without a compiler and a GPU there are none: the cost model guesses registers.
fn compile(
    args: &TuneArgs,
    arch: &str,
    candidates: &[Candidate],
    order: &[usize],
    key: &dyn Fn(&Unit) -> String,
    until: Option<Instant>,
    tell: &(dyn Fn(&str) + Sync),
) -> Result<HashMap<String, Result<Compiled, String>>, CompileError> {
    let nvrtc = match kernels::find(args.nvrtc.as_deref()) {
        Ok(nvrtc) => nvrtc,
        Err(error) if until.is_some() || args.compile_only || args.nvrtc.is_some() => return Err(error),
        Err(_) => {
            tell("no NVRTC here: registers are guessed; see --nvrtc");
            return Ok(HashMap::new());
        }
    };
    if let Some(dir) = &args.cubins {
        std::fs::create_dir_all(dir).map_err(CompileError::io("create", dir))?;
    }
    let units = order.iter().flat_map(|i| candidates.iter().filter(move |c| c.tunable == *i));
    let units = units.map(|c| (key(&c.unit), c.unit.clone())).collect();
    let threads = args.jobs.map_or_else(rayon::current_num_threads, NonZeroUsize::get);
    let started = Instant::now();
    let one = |unit: &Unit| match &args.cubins {
        Some(dir) => cached(&nvrtc, unit, arch, &dir.join(hex(&unit.key(arch)))),
        None => nvrtc.compile(unit, arch).map(|(cubin, log)| (Image::Cubin(cubin), log)),
    };
    let done = |n: usize, of: usize| {
        if n.is_multiple_of(32) || n == of {
            tell(&format!("{n} of {of} units compiled in {:.1} s", started.elapsed().as_secs_f64()));
        }
    };
    // Without a GPU nothing waits for it: a day is no limit.
    let until = until.unwrap_or_else(|| started + Duration::from_secs(86_400));
    Ok(measure::compile(units, threads, until, &one, &done))
}

/// A unit out of files of its key's name, or compiled into them. A file that cannot be written is no error: the unit
/// is there.
fn cached(nvrtc: &Nvrtc, unit: &Unit, arch: &str, file: &Path) -> Result<Compiled, DeviceError> {
    let (cubin_file, log_file) = (file.with_extension("cubin"), file.with_extension("log"));
    if let (Ok(cubin), Ok(log)) = (std::fs::read(&cubin_file), std::fs::read_to_string(&log_file)) {
        return Ok((Image::Cubin(cubin), log));
    }
    let (cubin, log) = nvrtc.compile(unit, arch)?;
    // The log last: where it is, the cubin is whole.
    let _ = std::fs::write(&cubin_file, &cubin).and_then(|()| std::fs::write(&log_file, &log));
    Ok((Image::Cubin(cubin), log))
}

/// Without what time sufficed for in part where parts contradict one another: kernels that are compiled as one, or whose
/// point for more rows would be that of fewer.
fn whole(
    tunables: &[Box<dyn Tunable>],
    candidates: &[Candidate],
    mut measured: Vec<Measured>,
    tell: &(dyn Fn(&str) + Sync),
) -> Vec<Measured> {
    let mut groups: Vec<&str> =
        tunables.iter().map(|t| t.scope()).filter(|scope| scope.sized).map(|scope| scope.group).collect();
    groups.dedup();
    for group in groups {
        let own = |i: usize| tunables[i].scope().group == group;
        let missing = |i: &usize| {
            own(*i) && candidates.iter().any(|c| c.tunable == *i) && !measured.iter().any(|m| m.timed.tunable == *i)
        };
        let some = measured.iter().any(|m| own(m.timed.tunable));
        if let Some(i) = (0..tunables.len()).find(missing).filter(|_| some) {
            let t = &tunables[i];
            tell(&format!("{group}: not chosen by time, for {} of {} rows was not measured", t.kernel(), t.rows()));
            measured.retain(|m| !own(m.timed.tunable));
        }
    }
    measured
}

/// The best points: of what was measured; of a group of kernels that was not, by the cost model.
fn table(
    tunables: &[Box<dyn Tunable>],
    candidates: &[Candidate],
    compiled: &HashMap<String, Result<Compiled, String>>,
    measured: &[Measured],
    key: &dyn Fn(&Unit) -> String,
    chip: &Chip,
    gpu: Option<&str>,
) -> Table {
    let predicted: Vec<Timed> = candidates
        .iter()
        .filter_map(|c| {
            let tunable = tunables[c.tunable].as_ref();
            let work = tunable.work(&c.point, &c.shapes);
            let log = match compiled.get(&key(&c.unit)) {
                Some(Err(_)) => return None,
                Some(Ok((_, log))) => resources::of(log, tunable.entry(&c.point)),
                None => None,
            };
            let own = |m: &&Measured| m.timed.tunable == c.tunable && m.timed.point == c.point;
            let resources = log.or_else(|| measured.iter().find(own)?.resources).unwrap_or_else(|| cost::guess(&work));
            let p = cost::predict(&work, resources, chip, &Constants::FITTED).filter(|_| resources.spilled == 0)?;
            Some(Timed { tunable: c.tunable, point: c.point.clone(), seconds: p.seconds })
        })
        .collect();
    let was_measured = |t: &Timed| {
        let group = tunables[t.tunable].scope().group;
        measured.iter().any(|m| tunables[m.timed.tunable].scope().group == group)
    };
    let of = |list: &[Timed], shape: &str, entry: &Entry| {
        let same = |t: &&Timed| {
            let tunable = &tunables[t.tunable];
            (tunable.kernel(), tunable.shape(), tunable.rows()) == (&entry.kernel[..], shape, entry.rows)
                && t.point == entry.point
        };
        list.iter().find(same).map(|t| t.seconds * 1e6)
    };
    let timed: Vec<Timed> = measured.iter().map(|m| m.timed.clone()).collect();
    // An estimate that is hardly better is no reason to leave the point of untuned tables.
    let weighed = |t: &Timed| {
        let first = tunables[t.tunable].points().first() == Some(&t.point);
        Timed { seconds: t.seconds * if first { UNTUNED_BONUS } else { 1.0 }, ..t.clone() }
    };
    let rest: Vec<Timed> = predicted.iter().filter(|t| !was_measured(t)).map(weighed).collect();
    let mut entries = Vec::new();
    for (list, source) in [(&timed, Source::Measured), (&rest, Source::Estimated)] {
        for (mut entry, seconds) in choose(tunables, list) {
            entry.source = Some(source);
            entry.predicted_us = of(&predicted, &entry.shape, &entry);
            match source {
                Source::Measured => {
                    entry.measured_us = Some(seconds * 1e6);
                    entry.gpu = gpu.map(str::to_owned);
                }
                Source::Estimated => entry.predicted_us = entry.predicted_us.or(Some(seconds * 1e6)),
            }
            entries.push(entry);
        }
    }
    entries.sort_by(|a, b| (&a.kernel, &a.shape, a.rows).cmp(&(&b.kernel, &b.shape, b.rows)));
    Table { arch: chip.arch.into(), entry: entries }
}

/// Every kernel and shape with its chosen point: what it was expected to take, took, and could not be below.
fn rows(tunables: &[Box<dyn Tunable>], chip: &Chip, tuning: &Tuning, measured: &[Measured]) -> Vec<Row> {
    let mut out = Vec::new();
    for (i, tunable) in tunables.iter().enumerate() {
        let points = tunable.points();
        let chosen = tuning.lookup(tunable.kernel(), tunable.shape(), tunable.rows());
        let Some(point) = chosen.filter(|p| points.contains(p)).or(points.first()) else { continue };
        let work = tunable.work(point, &tunables::launches(tunable.as_ref(), point, chip));
        let own =
            |p: &dsv4_kernels::tuning::Values| measured.iter().find(|m| m.timed.tunable == i && m.timed.point == *p);
        let resources = own(point).and_then(|m| m.resources).unwrap_or_else(|| cost::guess(&work));
        let predicted = cost::predict(&work, resources, chip, &Constants::FITTED);
        out.push(Row {
            kernel: tunable.kernel(),
            shape: tunable.shape().to_owned(),
            rows: tunable.rows(),
            calls: tunable.calls(),
            point: point.clone(),
            bytes: tunable.bytes(),
            flops: tunable.flops(),
            predicted: predicted.map(|p| p.seconds),
            bound: predicted.map(|p| p.bound),
            measured: own(point).map(|m| m.timed.seconds),
            untuned: points.first().and_then(own).map(|m| m.timed.seconds),
            floor: cost::floor(tunable.bytes() as f64, tunable.flops(), chip),
        });
    }
    out
}

/// A file of measurements, as text and as lines.
fn read_lines(file: &Path) -> Result<(String, Vec<rank::Line>), CompileError> {
    let len = std::fs::metadata(file).map_err(CompileError::io("read", file))?.len();
    if len > LINES_BYTES_MAX {
        return Err(CompileError::TooLarge { file: file.into(), limit: LINES_BYTES_MAX, found: len });
    }
    let text = std::fs::read_to_string(file).map_err(CompileError::io("read", file))?;
    let lines = rank::read(&text).map_err(|source| CompileError::Tuning { file: file.into(), source })?;
    Ok((text, lines))
}

fn validate(file: &Path, tunables: &[Box<dyn Tunable>], chip: &Chip) -> Result<Validated, CompileError> {
    let (_, lines) = read_lines(file)?;
    let found = rank::validate(&lines, tunables, chip).ok_or_else(|| CompileError::Usage {
        what: "--validate",
        expected: "at least 8 points of this model to fit on and 8 to judge by".into(),
        found: format!("{} lines", lines.len()),
        help: "give the file that --measurements wrote for the same --config, --tp and --arch",
    })?;
    Ok(Validated { file: file.into(), found })
}

fn write(file: &Path, text: &str) -> Result<(), CompileError> {
    std::fs::write(file, text).map_err(CompileError::io("write", file))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
