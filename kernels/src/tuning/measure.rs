//! Points on a GPU: compiled by many threads, checked against the first, timed with weights that come from memory.
//!
//! A sample is one run of launches over different copies of the weights, behind a fill of a buffer larger than the L2
//! cache: it empties the cache, and while it runs the launches queue up, so that the host's speed does not count. The
//! time of a point is the median sample. Points run in a fixed order; which ones is the cost model's choice.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::chip::Chip;
use super::choose::Timed;
use super::cost::{self, Constants};
use super::resources::{self, Resources};
use super::sketch::Sketched;
use super::tunables::{self, Loaded, Sketcher, Tunable};
use super::{Values, values_text};
use crate::device::unit::{Image, Unit};
use crate::device::{Buffer, DeviceError, Gpu, Kernel, Launch};

/// Samples of a point of which the median counts.
pub const SAMPLES: usize = 5;
/// Compiled units of a bucket, and points of a kernel at a shape, at most.
pub const UNITS_MAX: usize = 48;
/// Launches of a sample, and bytes of all copies of the weights, at most.
const COPIES_MAX: u32 = 12;
const COPIES_BYTES: u64 = 1 << 30;
/// Seconds of launches in a sample, about.
const SAMPLE: f64 = 1e-3;
/// Largest distance of a result from that of the first point, in parts of the largest value: order of sums, and a
/// bfloat16 step.
const TOLERANCE: f32 = 1.0 / 64.0;

/// A point that is worth a measurement.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// Which of the tunables.
    pub tunable: usize,
    /// The point.
    pub point: Values,
    /// What is compiled for it.
    pub unit: Unit,
    /// Shapes of its launches.
    pub shapes: Vec<Launch>,
    /// By the cost model with guessed registers, seconds.
    pub guessed: f64,
}

/// Candidates of all tunables in order. Points that launch the same thing are one; of each bucket the `units_max`
/// most promising units stay, and always that of the untuned table; of each tunable as many points, every unit's best
/// before any unit's second.
pub fn candidates(tunables: &[Box<dyn Tunable>], chip: &Chip, units_max: usize) -> Vec<Candidate> {
    let mut all: Vec<Candidate> = Vec::new();
    // Units by their keys: they are long texts.
    let mut keys: Vec<[u8; 32]> = Vec::new();
    for (i, tunable) in tunables.iter().enumerate() {
        let mut seen: Vec<([u8; 32], Vec<Sketched>)> = Vec::new();
        let sketcher = Sketcher::new(tunable.as_ref(), chip);
        for point in tunable.points() {
            let unit = tunable.unit(&point);
            let asked = sketcher.sketched(&point, &unit);
            let key = unit.key(chip.arch);
            if seen.iter().any(|(k, s)| *k == key && *s == asked) {
                continue;
            }
            let shapes: Vec<Launch> = asked.iter().map(|l| l.shape).collect();
            let work = tunable.work(&point, &shapes);
            let predicted = cost::predict(&work, cost::guess(&work), chip, &Constants::FITTED);
            let guessed = predicted.map_or(f64::INFINITY, |p| p.seconds);
            seen.push((key, asked));
            keys.push(key);
            all.push(Candidate { tunable: i, point, unit, shapes, guessed });
        }
    }
    // What a unit is good for: the sum over its tunables of the best point.
    let scope = |c: &Candidate| (tunables[c.tunable].scope().group, tunables[c.tunable].scope().bucket);
    let mut buckets: Vec<(&str, u32)> = all.iter().map(scope).collect();
    buckets.dedup();
    buckets.sort_unstable();
    buckets.dedup();
    let mut kept: HashSet<[u8; 32]> = HashSet::new();
    for bucket in buckets {
        // Sums in the order of the tunables: the same in every run.
        let mut scores: Vec<([u8; 32], BTreeMap<usize, f64>)> = Vec::new();
        for (c, key) in all.iter().zip(&keys).filter(|(c, _)| scope(c) == bucket) {
            let at = scores.iter().position(|(k, _)| k == key).unwrap_or_else(|| {
                scores.push((*key, BTreeMap::new()));
                scores.len() - 1
            });
            let time = c.guessed * tunables[c.tunable].calls();
            scores[at].1.entry(c.tunable).and_modify(|t| *t = t.min(time)).or_insert(time);
        }
        let mut order: Vec<usize> = (1..scores.len()).collect();
        let sum = |i: usize| scores[i].1.values().sum::<f64>();
        order.sort_by(|a, b| sum(*a).total_cmp(&sum(*b)));
        // The first is the untuned table's.
        kept.extend([0].into_iter().chain(order).take(units_max).map(|i| scores[i].0));
    }
    let mut of_kept: Vec<(Candidate, [u8; 32])> = all.into_iter().zip(keys).filter(|(_, k)| kept.contains(k)).collect();
    let mut stays = vec![true; of_kept.len()];
    for tunable in 0..tunables.len() {
        let mut own: Vec<usize> = (0..of_kept.len()).filter(|i| of_kept[*i].0.tunable == tunable).collect();
        if own.len() <= units_max {
            continue;
        }
        // The untuned table's point, then by promise.
        let first = own.remove(0);
        own.sort_by(|a, b| of_kept[*a].0.guessed.total_cmp(&of_kept[*b].0.guessed));
        let mut of_unit: HashMap<[u8; 32], usize> = HashMap::from([(of_kept[first].1, 1)]);
        let mut place = |i: &usize| {
            let n = of_unit.entry(of_kept[*i].1).or_default();
            *n += 1;
            *n
        };
        let mut order: Vec<(usize, usize)> = own.iter().map(|i| (place(i), *i)).collect();
        order.sort_by_key(|(place, _)| *place);
        order.iter().skip(units_max.saturating_sub(1)).for_each(|(_, i)| stays[*i] = false);
    }
    let mut stays = stays.into_iter();
    of_kept.retain(|_| stays.next() == Some(true));
    of_kept.into_iter().map(|(c, _)| c).collect()
}

/// Tunables in the order in which they are worth their time: kernels of few rows before those of many, fewer rows
/// first, and what takes most of a step first.
pub fn order(tunables: &[Box<dyn Tunable>], candidates: &[Candidate]) -> Vec<usize> {
    let share = |i: usize| {
        let own = candidates.iter().filter(|c| c.tunable == i).map(|c| c.guessed);
        own.fold(f64::INFINITY, f64::min) * tunables[i].calls()
    };
    let rank =
        |i: usize| if tunables::DECODE_ROWS.contains(&tunables[i].rows()) { tunables[i].rows() } else { u32::MAX };
    let mut order: Vec<(u32, f64, usize)> = (0..tunables.len()).map(|i| (rank(i), share(i), i)).collect();
    order.sort_by(|a, b| a.0.cmp(&b.0).then(b.1.total_cmp(&a.1)));
    order.into_iter().map(|(.., i)| i).collect()
}

/// A compiled unit and what the compiler says of it.
pub type Compiled = (Image, String);

/// Compiles each unit once, with `threads` threads; by key, in the order given. A unit that fails has its message; none
/// is begun after `until`.
pub fn compile(
    units: Vec<(String, Unit)>,
    threads: usize,
    until: Instant,
    one: &(dyn Fn(&Unit) -> Result<Compiled, DeviceError> + Sync),
    done: &(dyn Fn(usize, usize) + Sync),
) -> HashMap<String, Result<Compiled, String>> {
    let mut seen = HashSet::new();
    let unique: Vec<(String, Unit)> = units.into_iter().filter(|(key, _)| seen.insert(key.clone())).collect();
    let (next, finished, out) = (AtomicUsize::new(0), AtomicUsize::new(0), Mutex::new(HashMap::new()));
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(|| {
                while let Some((key, unit)) = unique.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if Instant::now() >= until {
                        break;
                    }
                    let compiled = one(unit).map_err(|e| e.to_string());
                    out.lock().unwrap_or_else(|p| p.into_inner()).insert(key.clone(), compiled);
                    done(finished.fetch_add(1, Ordering::Relaxed) + 1, unique.len());
                }
            });
        }
    });
    out.into_inner().unwrap_or_else(|p| p.into_inner())
}

/// A measured point.
#[derive(Clone, Debug)]
pub struct Measured {
    /// What it took.
    pub timed: Timed,
    /// Registers and shared memory, where the compiler says so.
    pub resources: Option<Resources>,
}

/// What a run may take, and what it tells.
pub struct Limits<'a> {
    /// When no further point is begun.
    pub until: Instant,
    /// Samples of a point, at least 1: [`SAMPLES`] on a GPU.
    pub samples: usize,
    /// Bytes of a buffer that is filled between samples: larger than the L2 cache.
    pub flush_bytes: u64,
    /// A line for people.
    pub tell: &'a dyn Fn(&str),
}

/// Times candidates whose units are in `compiled` (by `key`), in [`order`]. Tunables that time does not suffice for are
/// left out, with all their points: a choice among half of them would bind the others.
///
/// A point with another result than the first, or a unit that did not compile, is told and left out; so is everything
/// after a GPU that fails. Errors: it fails before anything was measured.
pub fn measure(
    gpu: &Arc<dyn Gpu>,
    tunables: &[Box<dyn Tunable>],
    candidates: &[Candidate],
    key: &dyn Fn(&Unit) -> String,
    compiled: &HashMap<String, Result<Compiled, String>>,
    limits: &Limits,
) -> Result<Vec<Measured>, DeviceError> {
    let mut out = Vec::new();
    match measure_into(&mut out, gpu, tunables, candidates, key, compiled, limits) {
        Err(error) if out.is_empty() => Err(error),
        Err(error) => {
            // What the tunable at work has is not all of it.
            let last = out.last().map(|m: &Measured| m.timed.tunable);
            out.retain(|m| Some(m.timed.tunable) != last);
            (limits.tell)(&format!("measuring ends here: {error}"));
            Ok(out)
        }
        Ok(()) => Ok(out),
    }
}

fn measure_into(
    out: &mut Vec<Measured>,
    gpu: &Arc<dyn Gpu>,
    tunables: &[Box<dyn Tunable>],
    candidates: &[Candidate],
    key: &dyn Fn(&Unit) -> String,
    compiled: &HashMap<String, Result<Compiled, String>>,
    limits: &Limits,
) -> Result<(), DeviceError> {
    let flush = Buffer::new(gpu, limits.flush_bytes)?;
    let mut loaded: HashMap<String, Vec<Kernel>> = HashMap::new();
    for i in order(tunables, candidates) {
        let tunable = &tunables[i];
        let own: Vec<&Candidate> = candidates.iter().filter(|c| c.tunable == i).collect();
        let name = format!("{} {} rows {}", tunable.kernel(), tunable.shape(), tunable.rows());
        if own.is_empty() {
            continue;
        }
        let is_over = || Instant::now() >= limits.until;
        if is_over() {
            (limits.tell)(&format!("{name}: not measured, the time is over"));
            continue;
        }
        let least = own.iter().map(|c| c.guessed).fold(SAMPLE, f64::min);
        let fitting = (COPIES_BYTES / tunable.bytes().max(1)).min((SAMPLE / least) as u64);
        let copies = fitting.clamp(2, COPIES_MAX.into()) as u32;
        let prepared = match tunable.prepare(gpu, copies) {
            Err(DeviceError::Memory { bytes, .. }) => {
                (limits.tell)(&format!("{name}: not measured, {bytes} bytes of memory are missing"));
                continue;
            }
            other => other?,
        };
        let (mut expected, mut best): (Option<Vec<f32>>, Option<(f64, &Values)>) = (None, None);
        let before = out.len();
        for c in own {
            if is_over() {
                (limits.tell)(&format!("{name}: not measured, the time ended after {} points", out.len() - before));
                best = None;
                out.truncate(before);
                break;
            }
            let id = key(&c.unit);
            let (image, log) = match compiled.get(&id) {
                Some(Ok(compiled)) => compiled,
                Some(Err(message)) => {
                    (limits.tell)(&format!("{name}: {} does not compile: {message}", values_text(&c.point)));
                    continue;
                }
                None => continue,
            };
            let resources = resources::of(log, tunable.entry(&c.point));
            if resources.is_some_and(|r| r.spilled > 0) {
                (limits.tell)(&format!("{name}: {} spills registers", values_text(&c.point)));
                continue;
            }
            if !loaded.contains_key(&id) {
                loaded.insert(id.clone(), c.unit.load(gpu.as_ref(), image)?);
            }
            let kernels = Loaded::new(&c.unit, loaded[&id].clone());
            prepared.clear(gpu.as_ref())?;
            prepared.before(gpu.as_ref(), &kernels, &c.point)?;
            prepared.launch(gpu.as_ref(), &kernels, &c.point, 0)?;
            let found = prepared.result(gpu.as_ref())?;
            if let Err(why) = same(&found, expected.as_deref()) {
                (limits.tell)(&format!("{name}: {} computes something else: {why}", values_text(&c.point)));
                continue;
            }
            expected.get_or_insert(found);
            let mut samples = Vec::with_capacity(limits.samples);
            for _ in 0..limits.samples {
                gpu.fill(flush.at(), samples.len() as u8, flush.bytes())?;
                let from = gpu.mark()?;
                for copy in 0..copies {
                    prepared.launch(gpu.as_ref(), &kernels, &c.point, copy)?;
                }
                samples.push(gpu.seconds_between(from, gpu.mark()?)? / f64::from(copies));
            }
            samples.sort_by(f64::total_cmp);
            let seconds = samples[samples.len() / 2];
            if best.is_none_or(|(least, _)| seconds < least) {
                best = Some((seconds, &c.point));
            }
            out.push(Measured { timed: Timed { tunable: i, point: c.point.clone(), seconds }, resources });
        }
        if let Some((seconds, point)) = best {
            let rate = tunable.bytes() as f64 / seconds / 1e9;
            let text = values_text(point);
            (limits.tell)(&format!(
                "{name}: {:.2} us, {rate:.0} GB/s, {text} of {} points",
                seconds * 1e6,
                out.len() - before
            ));
        }
    }
    Ok(())
}

/// Whether a result is that of the first point, but for the order of sums.
fn same(found: &[f32], expected: Option<&[f32]>) -> Result<(), String> {
    let largest = found.iter().fold(0f32, |m, v| m.max(v.abs()));
    if let Some(at) = found.iter().position(|v| !v.is_finite()) {
        return Err(format!("value {at} is {}", found[at]));
    }
    if found.is_empty() || largest == 0.0 {
        return Err("nothing".into());
    }
    let Some(expected) = expected else { return Ok(()) };
    if found.len() != expected.len() {
        return Err(format!("{} values instead of {}", found.len(), expected.len()));
    }
    match found.iter().zip(expected).position(|(f, e)| (f - e).abs() > TOLERANCE * largest) {
        Some(at) => Err(format!("value {at} is {} instead of {}", found[at], expected[at])),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::same;

    #[test]
    fn results_are_compared() {
        let first = [1.0, -2.0, 0.5];
        assert!(same(&first, None).is_ok() && same(&[1.01, -2.0, 0.5], Some(&first)).is_ok());
        assert!(same(&[1.1, -2.0, 0.5], Some(&first)).unwrap_err().contains("value 0"));
        assert!(same(&first[..2], Some(&first)).is_err());
        assert!(same(&[0.0; 3], None).is_err() && same(&[f32::NAN, 1.0, 1.0], None).is_err());
    }
}
