use std::ops::Range;

use super::*;
use crate::device::Buffer;
use crate::device::testing::{Bench, assert_close};
use crate::ops::rms_norm::rms_norm;

const EPS: f32 = 1e-6;
const STREAMS: usize = 4;

fn outputs(streams: usize) -> usize {
    (2 + streams) * streams
}

fn shape(hidden: usize, streams: usize) -> HcShape {
    HcShape { hidden: hidden as u32, streams: streams as u32, sinkhorn_iters: 20 }
}

fn params(streams: usize) -> HcParams {
    HcParams { streams, sinkhorn_iters: 20, hc_eps: EPS, rms_eps: EPS }
}

fn kernels(bench: &Bench, shape: HcShape, numerics: Numerics) -> HcKernels {
    let unit = unit(shape, numerics);
    let find = |name| bench.kernel(&unit, name);
    HcKernels {
        shape,
        site: find("hc_site"),
        tiled: find("hc_tiled"),
        collapse: find("hc_collapse"),
        finish: find("hc_finish"),
        head: find("hc_head"),
    }
}

/// What the last sublayer gave.
enum Done {
    Nothing,
    Rounded(Vec<f32>),
    /// Of as many ranks.
    Parts(Vec<f32>, usize),
}

/// Rows at one site, and its weights.
struct Case {
    hidden: usize,
    streams: usize,
    rows: usize,
    h: Vec<f32>,
    done: Done,
    post: Vec<f32>,
    comb: Vec<f32>,
    w: Vec<f32>,
    base: Vec<f32>,
    scale: [f32; 3],
    norm: Vec<f32>,
}

/// What a site gives.
#[derive(Clone, Debug, PartialEq)]
struct Site {
    h: Vec<f32>,
    x: Vec<f32>,
    post: Vec<f32>,
    comb: Vec<f32>,
}

impl Case {
    fn new(bench: &mut Bench, hidden: usize, rows: usize, done: Done) -> Case {
        Case::of(bench, (hidden, STREAMS), rows, done)
    }

    fn of(bench: &mut Bench, (hidden, streams): (usize, usize), rows: usize, done: Done) -> Case {
        let (wide, outputs) = (streams * hidden, outputs(streams));
        Case {
            hidden,
            streams,
            rows,
            h: bench.act(rows * wide),
            done,
            post: bench.noise(rows * streams),
            comb: bench.noise(rows * streams * streams),
            // The sums come out near 1, where the weights depend on them most.
            w: bench.noise(outputs * wide).iter().map(|v| v / (wide as f32).sqrt()).collect(),
            base: bench.noise(outputs),
            scale: [0.9, 1.3, 1.1],
            norm: bench.noise(hidden),
        }
    }

    /// The sublayer's output, as it is added.
    fn added(&self, bench: &Bench) -> Option<Vec<f32>> {
        let mut y = match &self.done {
            Done::Nothing => return None,
            Done::Rounded(y) => y.clone(),
            Done::Parts(parts, _) => {
                let (first, others) = parts.split_at(self.rows * self.hidden);
                let mut sum = first.to_vec();
                for part in others.chunks(first.len()) {
                    sum.iter_mut().zip(part).for_each(|(sum, v)| *sum += v);
                }
                sum
            }
        };
        bench.round(&mut y);
        Some(y)
    }

    /// Streams after the sublayer, by the reference.
    fn finished(&self, bench: &Bench) -> Vec<f32> {
        let mut h = self.h.clone();
        let Some(y) = self.added(bench) else { return h };
        let m = self.streams;
        for (r, row) in h.chunks_exact_mut(m * self.hidden).enumerate() {
            let mix = RowMix {
                pre: Vec::new(),
                post: self.post[r * m..][..m].to_vec(),
                comb: self.comb[r * m * m..][..m * m].to_vec(),
            };
            add_back(row, &y[r * self.hidden..][..self.hidden], &mix);
        }
        bench.round(&mut h);
        h
    }

    fn expected(&self, bench: &Bench) -> Site {
        let h = self.finished(bench);
        let (mut post, mut comb) = (Vec::new(), Vec::new());
        let mut x = vec![0.0; self.rows * self.hidden];
        let p = params(self.streams);
        for (row, x) in h.chunks_exact(self.streams * self.hidden).zip(x.chunks_exact_mut(self.hidden)) {
            let mix = mix(row, |i| &self.w[i * row.len()..][..row.len()], &self.base, &self.scale, p);
            collapse(row, &mix.pre, x);
            bench.round(x);
            rms_norm(x, &self.norm, EPS);
            bench.round(x);
            post.extend(mix.post);
            comb.extend(mix.comb);
        }
        Site { h, x, post, comb }
    }

    /// The sublayer's output on the device: rounded, in parts, and how many parts of how many values.
    fn upload_done(&self, bench: &Bench) -> (Option<Buffer>, Option<Buffer>, u64, u32) {
        match &self.done {
            Done::Nothing => (None, None, 0, 0),
            Done::Rounded(y) => (Some(bench.upload_act(y)), None, 0, 0),
            Done::Parts(parts, n) => (None, Some(bench.upload(parts)), (parts.len() / n) as u64, *n as u32),
        }
    }

    /// By the kernels, as a step launches them.
    fn run(&self, bench: &Bench, kernels: &HcKernels) -> Site {
        let launch = |args| launch_site(bench.gpu(), kernels, args).unwrap();
        self.run_by(bench, kernels, 1, launch).remove(0)
    }

    /// By the kernels, as one slice in one way.
    fn run_in(&self, bench: &Bench, kernels: &HcKernels, way: Way) -> Site {
        let launch = |args| launch_slice(bench.gpu(), kernels, way, args).unwrap();
        self.run_by(bench, kernels, 1, launch).remove(0)
    }

    /// What each of `times` launches gives; all but the streams, the last weights and the counter is scratch.
    fn run_by(&self, bench: &Bench, kernels: &HcKernels, times: usize, launch: impl Fn(HcSiteArgs)) -> Vec<Site> {
        let (y, parts, count, n) = self.upload_done(bench);
        let (h, w) = (bench.upload_act(&self.h), bench.upload(&self.w));
        let (base, scale, norm) = (bench.upload(&self.base), bench.upload(&self.scale), bench.upload(&self.norm));
        // The weights of the next sublayer replace those of the last one.
        let (post, comb) = (bench.upload(&self.post), bench.upload(&self.comb));
        let partials = (self.rows as u32 * kernels.shape.splits() * (kernels.shape.outputs() + 1)) as usize;
        let (partials, arrivals) = (bench.buffer::<f32>(partials), bench.upload(&[0u32]));
        let x = bench.buffer_act(self.rows * self.hidden);
        let args = HcSiteArgs {
            h: Out::at(h.at()),
            y: at(&y),
            parts: at(&parts),
            count,
            post: In::at(post.at()),
            comb: In::at(comb.at()),
            w: In::at(w.at()),
            base: In::at(base.at()),
            scale: In::at(scale.at()),
            norm: In::at(norm.at()),
            partials: Out::at(partials.at()),
            arrivals: Out::at(arrivals.at()),
            x: Out::at(x.at()),
            next_post: Out::at(post.at()),
            next_comb: Out::at(comb.at()),
            n,
            first: 0,
            rows: self.rows as u32,
            eps: EPS,
            hc_eps: EPS,
        };
        let mut sites = Vec::new();
        for _ in 0..times {
            launch(args);
            assert_eq!(arrivals.values::<u32>().unwrap(), [0], "the counter after a launch");
            sites.push(Site {
                h: bench.download_act(&h),
                x: bench.download_act(&x),
                post: post.values().unwrap(),
                comb: comb.values().unwrap(),
            });
        }
        sites
    }

    /// Some of the rows, as a case of their own.
    fn part(&self, rows: Range<usize>) -> Case {
        let of = |values: &[f32], each: usize| values[rows.start * each..rows.end * each].to_vec();
        Case {
            hidden: self.hidden,
            streams: self.streams,
            rows: rows.len(),
            h: of(&self.h, self.streams * self.hidden),
            done: match &self.done {
                Done::Nothing => Done::Nothing,
                Done::Rounded(y) => Done::Rounded(of(y, self.hidden)),
                Done::Parts(parts, n) => {
                    let each = parts.chunks(self.rows * self.hidden);
                    Done::Parts(each.flat_map(|part| of(part, self.hidden)).collect(), *n)
                }
            },
            post: of(&self.post, self.streams),
            comb: of(&self.comb, self.streams * self.streams),
            w: self.w.clone(),
            base: self.base.clone(),
            scale: self.scale,
            norm: self.norm.clone(),
        }
    }
}

impl Site {
    /// Some of the rows of a site of `hidden` columns.
    fn part(&self, rows: Range<usize>, hidden: usize) -> Site {
        let of = |values: &[f32], each: usize| values[rows.start * each..rows.end * each].to_vec();
        Site {
            h: of(&self.h, STREAMS * hidden),
            x: of(&self.x, hidden),
            post: of(&self.post, STREAMS),
            comb: of(&self.comb, STREAMS * STREAMS),
        }
    }
}

/// Sublayer inputs: where the order of sums moved a value before the norm over a rounding, the step may be two after
/// it.
fn assert_inputs(found: &[f32], expected: &[f32], numerics: Numerics) {
    if numerics == Numerics::Float {
        return assert_close(found, expected, numerics);
    }
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0f32, |m, v| m.max(v.abs()));
    let mut stepped = 0;
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!((f - e).abs() <= e.abs() / 60.0 + 1e-5 * largest, "value {i}: {f} instead of {e}");
        stepped += usize::from(f != e);
    }
    assert!(stepped * 100 <= found.len(), "{stepped} of {} values are steps away", found.len());
}

fn at<T>(buffer: &Option<Buffer>) -> In<T> {
    buffer.as_ref().map_or(In::none(), |b| In::at(b.at()))
}

fn check_site(bench: &Bench, kernels: &HcKernels, numerics: Numerics, case: &Case) {
    let (found, expected) = (case.run(bench, kernels), case.expected(bench));
    assert_eq!(found.h, expected.h, "streams");
    assert_inputs(&found.x, &expected.x, numerics);
    // Weights are float32 in both numerics.
    assert_close(&found.post, &expected.post, Numerics::Float);
    assert_close(&found.comb, &expected.comb, Numerics::Float);
}

#[test]
fn a_site_is_the_reference() {
    for numerics in [Numerics::Float, Numerics::Published] {
        let Some(mut bench) = Bench::new(numerics) else { return };
        // Of nano and tiny, with a ragged group of splits, of Flash, of Pro.
        for (hidden, rows) in [(256, 1), (256, 19), (320, 3), (4096, 1), (4096, 4), (4096, 9), (7168, 3)] {
            let kernels = kernels(&bench, shape(hidden, STREAMS), numerics);
            let dones = [
                Done::Nothing,
                Done::Rounded(bench.act(rows * hidden)),
                Done::Parts(bench.noise(rows * hidden), 1),
                Done::Parts(bench.noise(2 * rows * hidden), 2),
                Done::Parts(bench.noise(3 * rows * hidden), 3),
            ];
            for done in dones {
                let case = Case::new(&mut bench, hidden, rows, done);
                check_site(&bench, &kernels, numerics, &case);
            }
        }
    }
}

#[test]
fn two_streams_are_the_reference() {
    for numerics in [Numerics::Float, Numerics::Published] {
        let Some(mut bench) = Bench::new(numerics) else { return };
        for (hidden, rows) in [(320, 1), (256, 6), (256, 40)] {
            let kernels = kernels(&bench, shape(hidden, 2), numerics);
            let done = Done::Parts(bench.noise(2 * rows * hidden), 2);
            let case = Case::of(&mut bench, (hidden, 2), rows, done);
            check_site(&bench, &kernels, numerics, &case);
        }
    }
}

/// Weights that are far from even take all rounds; so do those that one stream has nearly alone.
#[test]
fn uneven_weights_are_the_reference() {
    let Some(mut bench) = Bench::new(Numerics::Float) else { return };
    let kernels = kernels(&bench, shape(256, STREAMS), Numerics::Float);
    for gain in [0.0, 4.0, 30.0] {
        let mut case = Case::new(&mut bench, 256, 16, Done::Nothing);
        case.scale[2] = gain;
        case.base.iter_mut().skip(2 * STREAMS).step_by(STREAMS + 1).for_each(|v| *v += gain);
        check_site(&bench, &kernels, Numerics::Float, &case);
    }
}

#[test]
fn all_ways_give_the_same_bits() {
    for numerics in [Numerics::Float, Numerics::Published] {
        let Some(mut bench) = Bench::new(numerics) else { return };
        // More than one tile, the last one ragged; whole and ragged groups of splits.
        for (hidden, rows) in [(320, 131), (4096, 70), (7168, 34)] {
            let kernels = kernels(&bench, shape(hidden, STREAMS), numerics);
            let done = Done::Parts(bench.noise(2 * rows * hidden), 2);
            let case = Case::new(&mut bench, hidden, rows, done);
            let few = case.run_in(&bench, &kernels, Way::Few);
            assert_eq!(few.h, case.finished(&bench));
            assert!(few == case.run_in(&bench, &kernels, Way::Tiled), "tiled {hidden} {numerics:?}");
            // As many as a decode step has, from anywhere.
            let (mut first, counts) = (0, if hidden >= 4096 { 1..=5 } else { 1..=16 });
            for count in counts {
                first = if first + count > rows { 0 } else { first };
                let some = first..first + count;
                let found = case.part(some.clone()).run(&bench, &kernels);
                assert!(found == few.part(some.clone(), hidden), "rows {some:?} of {hidden} {numerics:?}");
                first += count;
            }
        }
    }
}

#[test]
fn slices_give_the_same_bits() {
    for numerics in [Numerics::Float, Numerics::Published] {
        let Some(mut bench) = Bench::new(numerics) else { return };
        let (hidden, slice) = (256, SLICE as usize);
        // The last slice is mixed in every way.
        for rows in [slice + 2, slice + 20, 2 * slice + 33] {
            let kernels = kernels(&bench, shape(hidden, STREAMS), numerics);
            let done = Done::Rounded(bench.act(rows * hidden));
            let case = Case::new(&mut bench, hidden, rows, done);
            let all = case.run(&bench, &kernels);
            assert_eq!(all.h, case.finished(&bench));
            for some in [0..1, slice - 1..slice + 1, rows - 1..rows] {
                let found = case.part(some.clone()).run(&bench, &kernels);
                assert!(found == all.part(some.clone(), hidden), "rows {some:?} of {rows} {numerics:?}");
            }
        }
    }
}

#[test]
fn a_site_can_be_entered_again() {
    for numerics in [Numerics::Float, Numerics::Published] {
        let Some(mut bench) = Bench::new(numerics) else { return };
        let kernels = kernels(&bench, shape(320, STREAMS), numerics);
        for rows in [1, 3] {
            let done = Done::Rounded(bench.act(rows * 320));
            let mut case = Case::new(&mut bench, 320, rows, done);
            let launch = |args| launch_site(bench.gpu(), &kernels, args).unwrap();
            for found in case.run_by(&bench, &kernels, 3, launch) {
                assert!(found == case.run(&bench, &kernels), "{rows} rows, {numerics:?}");
                // The next one starts from what this one left.
                let Site { h, post, comb, .. } = found;
                (case.h, case.post, case.comb) = (h, post, comb);
            }
        }
    }
}

#[test]
fn finish_adds_the_last_sublayer() {
    for numerics in [Numerics::Float, Numerics::Published] {
        let Some(mut bench) = Bench::new(numerics) else { return };
        for (hidden, rows) in [(256, 3), (320, 7), (4096, 2)] {
            let kernels = kernels(&bench, shape(hidden, STREAMS), numerics);
            for done in [Done::Rounded(bench.act(rows * hidden)), Done::Parts(bench.noise(2 * rows * hidden), 2)] {
                let case = Case::new(&mut bench, hidden, rows, done);
                let (y, parts, count, n) = case.upload_done(&bench);
                let h = bench.upload_act(&case.h);
                let (post, comb) = (bench.upload(&case.post), bench.upload(&case.comb));
                let args = HcFinishArgs {
                    h: Out::at(h.at()),
                    y: at(&y),
                    parts: at(&parts),
                    count,
                    n,
                    post: In::at(post.at()),
                    comb: In::at(comb.at()),
                    rows: rows as u32,
                };
                launch_finish(bench.gpu(), &kernels, args).unwrap();
                assert_eq!(bench.download_act(&h), case.finished(&bench));
            }
        }
    }
}

#[test]
fn the_head_is_the_reference() {
    for numerics in [Numerics::Float, Numerics::Published] {
        let Some(mut bench) = Bench::new(numerics) else { return };
        for hidden in [256, 320, 4096, 7168] {
            let kernels = kernels(&bench, shape(hidden, STREAMS), numerics);
            let case = Case::new(&mut bench, hidden, 5, Done::Nothing);
            let w = &case.w[..STREAMS * STREAMS * hidden];
            let (base, scale) = (&case.base[..STREAMS], 0.7);
            let wanted = [1u32, 4];
            let mut expected = vec![0.0; wanted.len() * hidden];
            for (r, x) in wanted.iter().zip(expected.chunks_exact_mut(hidden)) {
                let row = &case.h[*r as usize * STREAMS * hidden..][..STREAMS * hidden];
                collapse(row, &head_mix(row, w, base, scale, params(STREAMS)), x);
                bench.round(x);
                rms_norm(x, &case.norm, EPS);
                bench.round(x);
            }
            let (h, rows) = (bench.upload_act(&case.h), bench.upload(&wanted));
            let (w, base, scale) = (bench.upload(w), bench.upload(base), bench.upload(&[scale]));
            let (norm, x) = (bench.upload(&case.norm), bench.buffer_act(wanted.len() * hidden));
            let args = HcHeadArgs {
                h: In::at(h.at()),
                wanted: In::at(rows.at()),
                w: In::at(w.at()),
                base: In::at(base.at()),
                scale: In::at(scale.at()),
                norm: In::at(norm.at()),
                x: Out::at(x.at()),
                eps: EPS,
                hc_eps: EPS,
            };
            launch_head(bench.gpu(), &kernels, wanted.len() as u32, args).unwrap();
            assert_inputs(&bench.download_act(&x), &expected, numerics);
        }
    }
}

#[test]
fn partial_sums_are_those_of_a_slice() {
    assert_eq!(shape(4096, 4).partials(1), 64 * 25);
    assert_eq!(shape(4096, 4).partials(8192), 256 * 64 * 25);
    assert_eq!(shape(320, 2).partials(3), 3 * 5 * 9);
}
