use super::*;
use crate::device::Buffer;
use crate::device::testing::{Bench, assert_close};
use crate::ops::rms_norm::rms_norm;

const EPS: f32 = 1e-6;
const STREAMS: usize = 4;
const OUTPUTS: usize = (2 + STREAMS) * STREAMS;

fn shape(hidden: usize) -> HcShape {
    HcShape { hidden: hidden as u32, streams: STREAMS as u32, sinkhorn_iters: 20 }
}

fn params() -> HcParams {
    HcParams { streams: STREAMS, sinkhorn_iters: 20, hc_eps: EPS, rms_eps: EPS }
}

fn kernels(bench: &Bench, hidden: usize, numerics: Numerics) -> HcKernels {
    let unit = unit(shape(hidden), numerics);
    let find = |name| bench.kernel(&unit, name);
    HcKernels {
        shape: shape(hidden),
        mix: find("hc_mix"),
        mix_tiled: find("hc_mix_tiled"),
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
#[derive(Debug, PartialEq)]
struct Site {
    h: Vec<f32>,
    x: Vec<f32>,
    post: Vec<f32>,
    comb: Vec<f32>,
}

impl Case {
    fn new(bench: &mut Bench, hidden: usize, rows: usize, done: Done) -> Case {
        let wide = STREAMS * hidden;
        Case {
            hidden,
            rows,
            h: bench.act(rows * wide),
            done,
            post: bench.noise(rows * STREAMS),
            comb: bench.noise(rows * STREAMS * STREAMS),
            // The sums come out near 1, where the weights depend on them most.
            w: bench.noise(OUTPUTS * wide).iter().map(|v| v / (wide as f32).sqrt()).collect(),
            base: bench.noise(OUTPUTS),
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
        for (r, row) in h.chunks_exact_mut(STREAMS * self.hidden).enumerate() {
            let mix = RowMix {
                pre: Vec::new(),
                post: self.post[r * STREAMS..][..STREAMS].to_vec(),
                comb: self.comb[r * STREAMS * STREAMS..][..STREAMS * STREAMS].to_vec(),
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
        for (row, x) in h.chunks_exact(STREAMS * self.hidden).zip(x.chunks_exact_mut(self.hidden)) {
            let mix = mix(row, |i| &self.w[i * row.len()..][..row.len()], &self.base, &self.scale, params());
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

    /// By the kernels, mixed in one way.
    fn run(&self, bench: &Bench, kernels: &HcKernels, way: HcMix) -> Site {
        let (y, parts, count, n) = self.upload_done(bench);
        let (h, w) = (bench.upload_act(&self.h), bench.upload(&self.w));
        let (base, scale, norm) = (bench.upload(&self.base), bench.upload(&self.scale), bench.upload(&self.norm));
        // The weights of the next sublayer replace those of the last one.
        let (post, comb) = (bench.upload(&self.post), bench.upload(&self.comb));
        let partials = bench.buffer::<f32>(self.rows * way.count(kernels.shape) as usize * (OUTPUTS + 1));
        let x = bench.buffer_act(self.rows * self.hidden);
        let args = HcMixArgs {
            h: Out::at(h.at()),
            y: at(&y),
            parts: at(&parts),
            count,
            n,
            post: In::at(post.at()),
            comb: In::at(comb.at()),
            w: In::at(w.at()),
            partials: Out::at(partials.at()),
            rows: self.rows as u32,
            merged: 0,
        };
        launch_mix(bench.gpu(), kernels, way, args).unwrap();
        let args = HcCollapseArgs {
            h: In::at(h.at()),
            partials: In::at(partials.at()),
            base: In::at(base.at()),
            scale: In::at(scale.at()),
            norm: In::at(norm.at()),
            x: Out::at(x.at()),
            post: Out::at(post.at()),
            comb: Out::at(comb.at()),
            eps: EPS,
            hc_eps: EPS,
            merged: 0,
        };
        launch_collapse(bench.gpu(), kernels, way, self.rows as u32, args).unwrap();
        Site {
            h: bench.download_act(&h),
            x: bench.download_act(&x),
            post: post.values().unwrap(),
            comb: comb.values().unwrap(),
        }
    }

    /// Rows from `first` on, as a case of its own.
    fn tail(&self, first: usize) -> Case {
        let after = |values: &[f32], each: usize| values[first * each..].to_vec();
        Case {
            hidden: self.hidden,
            rows: self.rows - first,
            h: after(&self.h, STREAMS * self.hidden),
            done: match &self.done {
                Done::Rounded(y) => Done::Rounded(after(y, self.hidden)),
                _ => Done::Nothing,
            },
            post: after(&self.post, STREAMS),
            comb: after(&self.comb, STREAMS * STREAMS),
            w: self.w.clone(),
            base: self.base.clone(),
            scale: self.scale,
            norm: self.norm.clone(),
        }
    }
}

/// Sublayer inputs: where the order of sums moved a value before the norm over a rounding, the step may be two after it.
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

#[test]
fn a_site_is_the_reference() {
    for numerics in [Numerics::Float, Numerics::Published] {
        let Some(mut bench) = Bench::new(numerics) else { return };
        // Of nano and tiny, with a ragged group of splits, of Flash.
        for (hidden, rows) in [(256, 1), (256, 19), (320, 3), (4096, 1), (4096, 9)] {
            let kernels = kernels(&bench, hidden, numerics);
            let dones = [
                Done::Nothing,
                Done::Rounded(bench.act(rows * hidden)),
                Done::Parts(bench.noise(rows * hidden), 1),
                Done::Parts(bench.noise(2 * rows * hidden), 2),
            ];
            for done in dones {
                let case = Case::new(&mut bench, hidden, rows, done);
                let (found, expected) = (case.run(&bench, &kernels, HcMix::of(rows as u32)), case.expected(&bench));
                assert_eq!(found.h, expected.h, "streams");
                assert_inputs(&found.x, &expected.x, numerics);
                // Weights are float32 in both numerics.
                assert_close(&found.post, &expected.post, Numerics::Float);
                assert_close(&found.comb, &expected.comb, Numerics::Float);
            }
        }
    }
}

#[test]
fn all_ways_to_mix_give_the_same_bits() {
    for numerics in [Numerics::Float, Numerics::Published] {
        let Some(mut bench) = Bench::new(numerics) else { return };
        // More than one tile, the last one ragged; whole and ragged groups of splits.
        for (hidden, rows) in [(320, 131), (4096, 70)] {
            let kernels = kernels(&bench, hidden, numerics);
            let done = Done::Rounded(bench.act(rows * hidden));
            let case = Case::new(&mut bench, hidden, rows, done);
            let few = case.run(&bench, &kernels, HcMix::Few);
            assert_eq!(few.h, case.finished(&bench));
            assert!(few == case.run(&bench, &kernels, HcMix::Tiled), "tiled {hidden} {numerics:?}");
            assert!(few == case.run(&bench, &kernels, HcMix::Merged), "merged {hidden} {numerics:?}");
            // A row alone.
            let alone = case.tail(rows - 1).run(&bench, &kernels, HcMix::Few);
            assert_eq!(alone.x, few.x[(rows - 1) * hidden..]);
            assert_eq!(alone.comb, few.comb[(rows - 1) * STREAMS * STREAMS..]);
        }
    }
}

#[test]
fn finish_adds_the_last_sublayer() {
    for numerics in [Numerics::Float, Numerics::Published] {
        let Some(mut bench) = Bench::new(numerics) else { return };
        for (hidden, rows) in [(256, 3), (320, 7), (4096, 2)] {
            let kernels = kernels(&bench, hidden, numerics);
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
        for hidden in [256, 320, 4096] {
            let kernels = kernels(&bench, hidden, numerics);
            let case = Case::new(&mut bench, hidden, 5, Done::Nothing);
            let w = &case.w[..STREAMS * STREAMS * hidden];
            let (base, scale) = (&case.base[..STREAMS], 0.7);
            let wanted = [1u32, 4];
            let mut expected = vec![0.0; wanted.len() * hidden];
            for (r, x) in wanted.iter().zip(expected.chunks_exact_mut(hidden)) {
                let row = &case.h[*r as usize * STREAMS * hidden..][..STREAMS * hidden];
                collapse(row, &head_mix(row, w, base, scale, params()), x);
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
fn partial_sums_fit_in_every_way() {
    for rows in [1, 32, 33, 511, 512, 8192] {
        for at_most in [rows, 8192] {
            let needed = u64::from(rows * HcMix::of(rows).count(shape(4096))) * (OUTPUTS as u64 + 1);
            assert!(needed <= shape(4096).partials(at_most), "{rows} of {at_most} rows");
        }
    }
    assert_eq!(shape(4096).partials(1), 128 * 25);
}
