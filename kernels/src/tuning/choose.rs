//! From times of points to one point for everything that must agree.
//!
//! Numbers that decide the order of sums are one for a group of kernels; numbers that are compiled in are one for a
//! bucket of rows; the rest is each shape's own. Among all ways that respect this the one with the least sum of times
//! wins, each launch counted as often as a step has it and decode rows weighed alike. Ties: the first.

use std::collections::BTreeMap;

use super::table::Entry;
use super::tunables::Tunable;
use super::{ANY_SHAPE, Values};

/// A point that was timed (or predicted).
#[derive(Clone, Debug)]
pub struct Timed {
    /// Which of the tunables.
    pub tunable: usize,
    /// The point.
    pub point: Values,
    /// Seconds of a launch.
    pub seconds: f64,
}

/// A part of a point.
fn only(point: &Values, keep: impl Fn(&str) -> bool) -> Values {
    point.iter().filter(|(name, _)| keep(name)).map(|(name, n)| (name.clone(), *n)).collect()
}

/// The best choice: entries for all shapes (`*`) of every bucket where sizes are not compiled in, and one for every
/// shape; with the seconds of each.
///
/// Tunables without times are left out.
pub fn choose(tunables: &[Box<dyn Tunable>], timed: &[Timed]) -> Vec<(Entry, f64)> {
    let mut groups: Vec<&str> = Vec::new();
    for t in timed {
        let group = tunables[t.tunable].scope().group;
        if !groups.contains(&group) {
            groups.push(group);
        }
    }
    let mut entries = Vec::new();
    for group in groups {
        let of_group: Vec<&Timed> = timed.iter().filter(|t| tunables[t.tunable].scope().group == group).collect();
        let mut best: Option<(f64, Vec<(Entry, f64)>)> = None;
        let mut tried: Vec<Values> = Vec::new();
        for machine in of_group.iter().map(|t| machine_of(tunables, t)) {
            if tried.contains(&machine) {
                continue;
            }
            let fitting: Vec<&Timed> =
                of_group.iter().copied().filter(|t| machine_of(tunables, t) == machine).collect();
            tried.push(machine);
            let Some((sum, chosen)) = of_machine(tunables, &of_group, &fitting) else { continue };
            if best.as_ref().is_none_or(|(least, _)| sum < *least) {
                best = Some((sum, chosen));
            }
        }
        entries.extend(best.map(|(_, chosen)| chosen).unwrap_or_default());
    }
    entries.sort_by(|(a, _), (b, _)| (&a.kernel, &a.shape, a.rows).cmp(&(&b.kernel, &b.shape, b.rows)));
    entries
}

fn machine_of(tunables: &[Box<dyn Tunable>], t: &Timed) -> Values {
    let machine = tunables[t.tunable].scope().machine;
    only(&t.point, |name| machine.contains(&name))
}

/// What is compiled in: neither of the machine nor free.
fn unit_of(tunables: &[Box<dyn Tunable>], t: &Timed) -> Values {
    let scope = tunables[t.tunable].scope();
    only(&t.point, |name| !scope.machine.contains(&name) && !scope.free.iter().any(|n| n == name))
}

/// The best choice with the same machine numbers; none if a tunable has no time with them.
fn of_machine(tunables: &[Box<dyn Tunable>], all: &[&Timed], fitting: &[&Timed]) -> Option<(f64, Vec<(Entry, f64)>)> {
    let mut buckets: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    for t in all {
        let list = buckets.entry(tunables[t.tunable].scope().bucket).or_default();
        if !list.contains(&t.tunable) {
            list.push(t.tunable);
        }
    }
    let (mut sum, mut chosen) = (0.0, Vec::new());
    for (bucket, members) in buckets {
        let here: Vec<&Timed> = fitting.iter().copied().filter(|t| members.contains(&t.tunable)).collect();
        let mut best: Option<(f64, Vec<&Timed>)> = None;
        let mut tried: Vec<Values> = Vec::new();
        for unit in here.iter().map(|t| unit_of(tunables, t)) {
            if tried.contains(&unit) {
                continue;
            }
            let least = |member: &usize| -> Option<&Timed> {
                let own = here.iter().copied().filter(|t| t.tunable == *member && unit_of(tunables, t) == unit);
                own.reduce(|a, b| if b.seconds < a.seconds { b } else { a })
            };
            let picks: Option<Vec<&Timed>> = members.iter().map(least).collect();
            tried.push(unit);
            let Some(picks) = picks else { continue };
            let time = picks.iter().map(|t| t.seconds * tunables[t.tunable].calls()).sum::<f64>();
            if best.as_ref().is_none_or(|(b, _)| time < *b) {
                best = Some((time, picks));
            }
        }
        let (time, picks) = best?;
        sum += time;
        let mut kernels: Vec<&str> = picks.iter().map(|t| tunables[t.tunable].kernel()).collect();
        kernels.dedup();
        kernels.sort_unstable();
        kernels.dedup();
        for kernel in kernels {
            let own: Vec<&&Timed> = picks.iter().filter(|t| tunables[t.tunable].kernel() == kernel).collect();
            // Shapes that were not timed get the numbers of the one that takes most of a step.
            let weight = |t: &Timed| t.seconds * tunables[t.tunable].calls();
            let Some(heaviest) = own.iter().copied().reduce(|a, b| if weight(b) > weight(a) { b } else { a }) else {
                continue;
            };
            if !tunables[heaviest.tunable].scope().sized {
                let whole = own.iter().map(|t| weight(t)).sum();
                chosen.push((Entry::new(kernel, ANY_SHAPE, bucket, heaviest.point.clone()), whole));
            }
            for t in own {
                let tunable = &tunables[t.tunable];
                chosen.push((Entry::new(kernel, tunable.shape(), tunable.rows(), t.point.clone()), t.seconds));
            }
        }
    }
    Some((sum, chosen))
}
