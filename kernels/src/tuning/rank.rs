//! How well the cost model orders measured points: constants fitted on some of them, judged on the others.
//!
//! The split is by a hash of a point's name, so it is the same in every run. Measurements are lines of text:
//! `kernel,shape,rows,point,registers,shared,us`.

use std::collections::BTreeMap;

use super::chip::Chip;
use super::choose::Timed;
use super::cost::{self, Constants};
use super::measure::Measured;
use super::resources::Resources;
use super::tunables::{Sketcher, Tunable};
use super::{TuningError, Values, values_parse, values_text};

/// First line of a file of measurements.
pub const HEADER: &str = "kernel,shape,rows,point,registers,shared,us";

/// A measured point, as files have it.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    /// As tables name it.
    pub kernel: String,
    /// As tables name it.
    pub shape: String,
    /// Rows.
    pub rows: u32,
    /// The point.
    pub point: Values,
    /// What the compiler says.
    pub resources: Option<Resources>,
    /// Seconds of a launch.
    pub seconds: f64,
}

/// All lines of measurements; `about` (the GPU, the compiler) is a comment on top.
pub fn write(about: &str, tunables: &[Box<dyn Tunable>], measured: &[Measured]) -> String {
    let mut out = format!("# {about}\n{HEADER}\n");
    for m in measured {
        let t = &tunables[m.timed.tunable];
        let (registers, shared) = m.resources.map_or((0, 0), |r| (r.registers, r.shared));
        let (point, us) = (values_text(&m.timed.point), m.timed.seconds * 1e6);
        out += &format!("{},{},{},{point},{registers},{shared},{us:.3}\n", t.kernel(), t.shape(), t.rows());
    }
    out
}

/// Reads lines of measurements. Errors: a line that is none.
pub fn read(text: &str) -> Result<Vec<Line>, TuningError> {
    let lines = text.lines().enumerate().filter(|(_, l)| !l.starts_with('#') && !l.is_empty() && *l != HEADER);
    lines
        .map(|(i, line)| {
            let parse = || -> Option<Line> {
                let parts: Vec<&str> = line.split(',').collect();
                let [kernel, shape, rows, point, registers, shared, us] = parts[..] else { return None };
                let registers: u32 = registers.parse().ok()?;
                let resources = Resources { registers, shared: shared.parse().ok()?, spilled: 0 };
                let us: f64 = us.parse().ok().filter(|us| f64::is_finite(*us) && *us > 0.0)?;
                Some(Line {
                    kernel: kernel.into(),
                    shape: shape.into(),
                    rows: rows.parse().ok()?,
                    point: values_parse(point)?,
                    resources: (registers > 0).then_some(resources),
                    seconds: us * 1e-6,
                })
            };
            let at = format!("line {}", i + 1);
            parse().ok_or_else(|| TuningError { at, expected: HEADER.into(), found: line.into() })
        })
        .collect()
}

/// Lines as they were measured; those of other kernels and shapes are left out.
pub fn measured(lines: &[Line], tunables: &[Box<dyn Tunable>]) -> Vec<Measured> {
    let of = |line: &Line| {
        let tunable = tunable_of(line, tunables)?;
        let timed = Timed { tunable, point: line.point.clone(), seconds: line.seconds };
        Some(Measured { timed, resources: line.resources })
    };
    lines.iter().filter_map(of).collect()
}

/// Which of the tunables a line is of; none if its point is not one that is tried today.
fn tunable_of(line: &Line, tunables: &[Box<dyn Tunable>]) -> Option<usize> {
    let named = |i: &usize| {
        let t = &tunables[*i];
        (t.kernel(), t.shape(), t.rows()) == (&line.kernel[..], &line.shape[..], line.rows)
    };
    (0..tunables.len()).find(named).filter(|i| tunables[*i].points().contains(&line.point))
}

/// What a file of measurements says of where it was made: the GPU's name.
pub fn gpu_of(text: &str) -> Option<&str> {
    text.lines().next()?.strip_prefix("# ")?.split(',').next()
}

/// A line with what the cost model needs of it.
struct Known {
    group: String,
    work: cost::Work,
    resources: Resources,
    seconds: f64,
    held_out: bool,
}

fn known(lines: &[Line], tunables: &[Box<dyn Tunable>], chip: &Chip) -> Vec<Known> {
    let mut sketchers: BTreeMap<usize, Sketcher> = BTreeMap::new();
    lines
        .iter()
        .filter_map(|line| {
            let i = tunable_of(line, tunables)?;
            let tunable = tunables[i].as_ref();
            let sketcher = sketchers.entry(i).or_insert_with(|| Sketcher::new(tunable, chip));
            let work = tunable.work(&line.point, &sketcher.launches(&line.point));
            let group = format!("{} {} rows {}", line.kernel, line.shape, line.rows);
            let name = format!("{group} {}", values_text(&line.point));
            // One in four.
            let held_out = blake3::hash(name.as_bytes()).as_bytes()[0] < 64;
            let resources = line.resources.unwrap_or_else(|| cost::guess(&work));
            Some(Known { group, work, resources, seconds: line.seconds, held_out })
        })
        .collect()
}

/// What a validation found.
#[derive(Clone, Debug, PartialEq)]
pub struct Validation {
    /// Fitted on the points that are not held out.
    pub constants: Constants,
    /// Points to fit on, points held out.
    pub points: (usize, usize),
    /// Over all held-out points together: mostly tells shapes apart.
    pub rank_all: f64,
    /// Mean over kernels and shapes with at least four held-out points of the correlation among those.
    pub rank_within: f64,
    /// The same with [`Constants::FITTED`], which this program has.
    pub rank_fixed: f64,
    /// Median factor between predicted and measured time of held-out points, at least 1.
    pub off: f64,
    /// Mean over kernels and shapes of what the model's choice takes, in parts of the best measured.
    pub regret: f64,
    /// The same for the first point of each: the untuned one.
    pub untuned: f64,
    /// By kernel: (held-out points, correlation within shapes, median factor).
    pub kernels: BTreeMap<String, (usize, f64, f64)>,
}

/// Fits constants and judges them. None: too few points that this model has.
pub fn validate(lines: &[Line], tunables: &[Box<dyn Tunable>], chip: &Chip) -> Option<Validation> {
    let all = known(lines, tunables, chip);
    let (held, fitted): (Vec<&Known>, Vec<&Known>) = all.iter().partition(|k| k.held_out);
    if held.len() < 8 || fitted.len() < 8 {
        return None;
    }
    let constants = fit(&fitted, chip);
    let time =
        |k: &Known, c: &Constants| cost::predict(&k.work, k.resources, chip, c).map_or(f64::INFINITY, |p| p.seconds);
    let pairs = |list: &[&Known], c: &Constants| -> (Vec<f64>, Vec<f64>) {
        list.iter().map(|k| (time(k, c), k.seconds)).unzip()
    };
    let within = |kernel: &str, c: &Constants| -> Option<f64> {
        let mut groups: BTreeMap<&str, Vec<&Known>> = BTreeMap::new();
        for k in held.iter().filter(|k| k.group.starts_with(kernel)) {
            groups.entry(&k.group).or_default().push(k);
        }
        let ranks: Vec<f64> = groups
            .values()
            .filter(|list| list.len() >= 4)
            .map(|list| pairs(list, c))
            .filter_map(|(predicted, measured)| spearman(&predicted, &measured))
            .collect();
        (!ranks.is_empty()).then(|| ranks.iter().sum::<f64>() / ranks.len() as f64)
    };
    let off = |kernel: &str| -> f64 {
        let factor = |k: &&&Known| (time(k, &constants) / k.seconds).ln().abs();
        let mut factors: Vec<f64> = held.iter().filter(|k| k.group.starts_with(kernel)).map(|k| factor(&k)).collect();
        factors.sort_by(f64::total_cmp);
        factors.get(factors.len() / 2).map_or(f64::NAN, |f| f.exp())
    };
    let mut by_group: BTreeMap<&str, Vec<&Known>> = BTreeMap::new();
    all.iter().for_each(|k| by_group.entry(&k.group).or_default().push(k));
    let (mut regret, mut untuned) = (0.0, 0.0);
    for list in by_group.values() {
        let best = list.iter().map(|k| k.seconds).fold(f64::INFINITY, f64::min);
        let pick = list.iter().min_by(|a, b| time(a, &constants).total_cmp(&time(b, &constants)));
        regret += pick.map_or(1.0, |k| k.seconds / best) / by_group.len() as f64;
        untuned += list[0].seconds / best / by_group.len() as f64;
    }
    let mut kernels = BTreeMap::new();
    for kernel in lines.iter().map(|l| l.kernel.as_str()) {
        if !kernels.contains_key(kernel) {
            let name = format!("{kernel} ");
            let count = held.iter().filter(|k| k.group.starts_with(&name)).count();
            kernels.insert(kernel.to_owned(), (count, within(&name, &constants).unwrap_or(f64::NAN), off(&name)));
        }
    }
    let (predicted, measured) = pairs(&held, &constants);
    Some(Validation {
        constants,
        points: (fitted.len(), held.len()),
        rank_all: spearman(&predicted, &measured)?,
        rank_within: within("", &constants).unwrap_or(f64::NAN),
        rank_fixed: within("", &Constants::FITTED).unwrap_or(f64::NAN),
        off: off(""),
        regret,
        untuned,
        kernels,
    })
}

/// The constants with the least mean square of logarithms between predicted and measured: descent by coordinates, each
/// by factors that get smaller, within a factor of ten of those that this program has.
fn fit(points: &[&Known], chip: &Chip) -> Constants {
    let error = |list: &[f64; 12]| -> f64 {
        let c = Constants::of(*list);
        let one = |k: &&Known| {
            let predicted = cost::predict(&k.work, k.resources, chip, &c).map_or(1.0, |p| p.seconds);
            (predicted / k.seconds).ln().powi(2)
        };
        points.iter().map(one).sum::<f64>() / points.len() as f64
    };
    let start = Constants::FITTED.list();
    let (mut best, mut least) = (start, error(&start));
    let mut factor = 1.6f64;
    while factor > 1.005 {
        let mut better = false;
        for i in 0..best.len() {
            for f in [factor, 1.0 / factor] {
                let mut list = best;
                list[i] = (list[i] * f).clamp(start[i] / 10.0, start[i] * 10.0);
                let e = error(&list);
                if e < least * (1.0 - 1e-9) {
                    (best, least, better) = (list, e, true);
                }
            }
        }
        if !better {
            factor = factor.sqrt();
        }
    }
    Constants::of(best)
}

/// Rank correlation; equal values share their mean rank. None for fewer than two points or no differences.
pub fn spearman(a: &[f64], b: &[f64]) -> Option<f64> {
    let ranks = |v: &[f64]| -> Vec<f64> {
        let mut order: Vec<usize> = (0..v.len()).collect();
        order.sort_by(|i, j| v[*i].total_cmp(&v[*j]));
        let mut out = vec![0.0; v.len()];
        let mut first = 0;
        while first < order.len() {
            let end = (first..order.len()).find(|i| v[order[*i]] != v[order[first]]).unwrap_or(order.len());
            let mean = (first + end - 1) as f64 / 2.0;
            order[first..end].iter().for_each(|i| out[*i] = mean);
            first = end;
        }
        out
    };
    let (x, y) = (ranks(a), ranks(b));
    let n = x.len() as f64;
    let mean = (n - 1.0) / 2.0;
    let sum = |p: &[f64], q: &[f64]| p.iter().zip(q).map(|(p, q)| (p - mean) * (q - mean)).sum::<f64>();
    let scale = (sum(&x, &x) * sum(&y, &y)).sqrt();
    (x.len() == y.len() && scale > 0.0).then(|| sum(&x, &y) / scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_correlate() {
        let rank = |a: &[f64], b: &[f64]| spearman(a, b).unwrap();
        assert!((rank(&[1.0, 2.0, 3.0], &[10.0, 40.0, 90.0]) - 1.0).abs() < 1e-12);
        assert!((rank(&[1.0, 2.0, 3.0], &[3.0, 2.0, 1.0]) + 1.0).abs() < 1e-12);
        // By hand: ranks 0 1 2 3 and 1 0 3 2.
        assert!((rank(&[1.0, 2.0, 3.0, 4.0], &[2.0, 1.0, 4.0, 3.0]) - 0.6).abs() < 1e-12);
        // Equal values: ranks 0.5 0.5 2.
        assert!((rank(&[1.0, 1.0, 3.0], &[1.0, 2.0, 3.0]) - 0.866_025_4).abs() < 1e-6);
        assert_eq!(spearman(&[1.0, 1.0], &[1.0, 2.0]), None);
    }

    #[test]
    fn lines_are_read() {
        let text = format!("# a GPU\n{HEADER}\ngemv,64x64 bf16,1,depth=3 warps=8,96,0,2.5\n");
        let lines = read(&text).unwrap();
        assert_eq!(lines.len(), 1);
        assert_eq!((lines[0].rows, lines[0].point["warps"], lines[0].resources.unwrap().registers), (1, 8, 96));
        assert!((lines[0].seconds - 2.5e-6).abs() < 1e-12);
        for bad in ["gemv,x,1,depth=3,96,0", "gemv,x,1,depth,96,0,1", "gemv,x,1,depth=3,96,0,-1"] {
            assert!(read(bad).unwrap_err().to_string().contains("line 1"), "{bad}");
        }
    }
}
