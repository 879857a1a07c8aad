use super::*;
use crate::device::Buffer;
use crate::ops::kv::testing::{Done, FLASH, Layer, NANO, TINY, assert_rounded};
use crate::ops::rms_norm::inverse_rms;
use crate::ops::rope::{Rope, rotate, rotate_back};

const BOTH: [Numerics; 2] = [Numerics::Float, Numerics::Published];

/// A layer with its attention.
struct Attention {
    layer: Layer,
    sizes: Sizes,
    kernels: [Kernel; 2],
    sinks: Vec<f32>,
    rope: Rope,
}

impl Attention {
    fn new(config: &str, ratio: u32, heads: u32, topk: u32, numerics: Numerics) -> Option<Attention> {
        let mut layer = Layer::new(config, ratio, numerics)?;
        let sizes = Sizes {
            heads,
            head_dim: layer.sizes.head_dim,
            rope: layer.sizes.rope,
            window: layer.config.sliding_window as u32,
            capacity: layer.sizes.capacity,
            ratio,
            topk,
            per_page: layer.sizes.per_page,
        };
        let unit = unit(sizes, numerics);
        let kernels = ["attend", "attend_long"].map(|k| layer.bench.kernel(&unit, k));
        let sinks = layer.bench.noise(heads as usize);
        let rope = Rope::new(&layer.config, ratio != 0);
        Some(Attention { layer, sizes, kernels, sinks, rope })
    }

    /// Entries of each row, as an indexer could choose them: the row's own and its position decide.
    fn selected(&self, done: &Done) -> Vec<Vec<u32>> {
        let choose = |row: &crate::device::rows::Row| {
            if self.sizes.ratio == 0 {
                return Vec::new();
            }
            let visible = (row.position + 1) / self.sizes.ratio;
            if self.sizes.ratio != 4 || visible <= self.sizes.topk {
                return (0..visible).collect();
            }
            let scores = self.layer.noise(20, row, visible as usize);
            crate::ops::indexer::top_k(&scores, self.sizes.topk as usize)
        };
        done.rows.iter().map(choose).collect()
    }

    fn run(&self, done: &Done) -> Vec<f32> {
        let (heads, width) = (self.sizes.heads as usize, self.sizes.head_dim as usize);
        let (count, topk) = (done.rows.len(), self.sizes.topk as usize);
        let raw = self.layer.acts(10, &done.rows, heads * width);
        let selected = self.selected(done);
        let mut lists = vec![u32::MAX; count * topk];
        for ((row, chosen), list) in done.rows.iter().zip(&selected).zip(lists.chunks_exact_mut(topk)) {
            // Rows that see no more have no list.
            if self.sizes.ratio == 4 && (row.position + 1) / 4 > self.sizes.topk {
                let place = |w: &u32| self.layer.compressors[0].place_of(row.slot as usize, *w as usize) as u32;
                list.iter_mut().zip(chosen).for_each(|(to, w)| *to = place(w));
            }
        }
        let bench = &self.layer.bench;
        let (dq, lists, sinks) = (bench.upload_act(&raw), bench.upload(&lists), bench.upload(&self.sinks));
        let room = workspace(self.sizes);
        let (partial, stats) = (bench.buffer::<f32>(room.partial as usize), bench.buffer::<f32>(room.stats as usize));
        let arrived = bench.upload(&vec![0u32; room.arrived as usize]);
        let at = |buffer: Option<&Buffer>| buffer.map_or(0, Buffer::at);
        let entries = self.layer.compressors.first();
        let attend_in = |parts: u32, times: u32| {
            let o = bench.buffer_act(count * heads * width);
            let args = AttendArgs {
                rows: In::at(done.device_rows.at()),
                q: In::at(dq.at()),
                kv: In::at(done.kv.at()),
                window: In::at(self.layer.window.at()),
                entries: In::at(at(entries.map(|c| &c.entries))),
                pages: In::at(at(entries.map(|c| &c.device_pages))),
                selected: In::at(lists.at()),
                sinks: In::at(sinks.at()),
                turns: In::at(done.turns.at()),
                o: Out::at(o.at()),
                partial: Out::at(partial.at()),
                stats: Out::at(stats.at()),
                arrived: Out::at(arrived.at()),
                heads: 0,
                pages_max: entries.map_or(0, |c| c.pages_max),
                splits: 0,
                parts: 0,
                eps: 1e-6,
            };
            for _ in 0..times {
                let (sizes, numerics) = (self.sizes, self.layer.numerics);
                launch_parts(bench.gpu(), self.kernels, sizes, numerics, count as u32, parts, args).unwrap();
            }
            assert!(arrived.values::<u32>().unwrap().iter().all(|n| *n == 0), "counters are left behind");
            bench.download_act(&o)
        };
        let found = attend_in(1, 1);
        let same = |other: Vec<f32>| found.iter().zip(&other).all(|(a, b)| a.to_bits() == b.to_bits());
        assert!(same(attend_in(1, 2)), "another launch with the same counters");
        if count <= 16 && self.layer.numerics == Numerics::Published {
            for parts in [2, 4].into_iter().filter(|parts| self.sizes.parts_are_possible(*parts)) {
                assert!(same(attend_in(parts, 2)), "{parts} parts of the channels");
            }
        }

        let mut q = raw;
        for (i, head) in q.chunks_exact_mut(width).enumerate() {
            let scale = inverse_rms(head, 1e-6);
            head.iter_mut().for_each(|v| *v *= scale);
            bench.round(head);
            rotate(head, &self.rope.at(done.rows[i / heads].position));
            bench.round(head);
        }
        let mut distance = Distance::default();
        for (r, row) in done.rows.iter().enumerate() {
            let (state, position) = (&self.layer.states[row.slot as usize], row.position as usize);
            let first = (position + 1).saturating_sub(self.sizes.window as usize);
            let mut keys: Vec<&[f32]> = (first..=position).map(|p| state.window.row(p)).collect();
            if let Some(compressed) = &state.compressed {
                keys.extend(selected[r].iter().map(|w| compressed.entry(*w as usize)));
            }
            let numerics = self.layer.numerics;
            let turns = self.rope.at(row.position);
            for head in 0..heads {
                let part = (r * heads + head) * width..(r * heads + head + 1) * width;
                let mut expected = vec![0.0; width];
                attend(&q[part.clone()], &keys, self.sinks[head], numerics == Numerics::Published, &mut expected);
                bench.round(&mut expected);
                rotate_back(&mut expected, &turns);
                bench.round(&mut expected);
                match numerics {
                    Numerics::Float => assert_rounded(&found[part], &expected, numerics, 0.0),
                    Numerics::Published => {
                        distance.add(&found[part.clone()], &expected, exact(&q[part], &keys, self.sinks[head], &turns));
                    }
                }
            }
        }
        distance.check();
        found
    }

    /// A step with attention; the outputs, row after row.
    fn step(&mut self, segments: &[(u32, u32, u32)]) -> Vec<f32> {
        let done = self.layer.step(segments);
        let out = self.run(&done);
        self.layer.store(&done);
        out
    }
}

/// Exact attention of a head, turned back, and the sums of p * |key| that bound what rounding p can do.
fn exact(q: &[f32], keys: &[&[f32]], sink: f32, turns: &[(f32, f32)]) -> (Vec<f32>, Vec<f32>) {
    let scale = 1.0 / (q.len() as f64).sqrt();
    let dot = |key: &&[f32]| q.iter().zip(*key).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() * scale;
    let scores: Vec<f64> = keys.iter().map(dot).collect();
    let max = scores.iter().fold(f64::NEG_INFINITY, |m, s| m.max(*s));
    let total = scores.iter().map(|s| (s - max).exp()).sum::<f64>() + (f64::from(sink) - max).exp();
    let (mut out, mut spread) = (vec![0f64; q.len()], vec![0f64; q.len()]);
    for (score, key) in scores.iter().zip(keys) {
        let p = (score - max).exp() / total;
        out.iter_mut().zip(*key).for_each(|(o, k)| *o += p * f64::from(*k));
        spread.iter_mut().zip(*key).for_each(|(o, k)| *o += p * f64::from(k.abs()));
    }
    let mut out: Vec<f32> = out.iter().map(|v| *v as f32).collect();
    rotate_back(&mut out, turns);
    // Turning back mixes neighbours.
    let spread = spread.chunks_exact(2).flat_map(|p| [(p[0] + p[1]) as f32; 2]).collect();
    (out, spread)
}

/// Published numerics: the kernel rounds numerators relative to another maximum than the reference, and each such
/// rounding is off by up to 2^-9 of the numerator. No value may be further from the exact one than that and the
/// roundings of the result explain, and all of them together not further than the reference's.
#[derive(Default)]
struct Distance {
    kernel: f64,
    reference: f64,
}

impl Distance {
    fn add(&mut self, found: &[f32], expected: &[f32], (exact, spread): (Vec<f32>, Vec<f32>)) {
        for (i, x) in exact.iter().enumerate() {
            let distance = (found[i] - x).abs();
            let bound = spread[i] / 250.0 + x.abs() / 100.0;
            assert!(distance <= bound, "value {i}: {} instead of {x}, the reference's is {}", found[i], expected[i]);
            self.kernel += f64::from(distance);
            self.reference += f64::from((expected[i] - x).abs());
        }
    }

    fn check(&self) {
        assert!(
            self.kernel <= 1.1 * self.reference,
            "{} from the exact, the reference {}",
            self.kernel,
            self.reference
        );
    }
}

fn grow(config: &str, ratio: u32, heads: u32, topk: u32, numerics: Numerics, steps: &[&[(u32, u32, u32)]]) {
    let Some(mut attention) = Attention::new(config, ratio, heads, topk, numerics) else { return };
    for segments in steps {
        attention.layer.generation += 1;
        attention.step(segments);
    }
}

#[test]
fn steps_of_all_sizes() {
    for numerics in BOTH {
        for (ratio, heads) in [(0, 4), (4, 8), (128, 20)] {
            grow(
                NANO,
                ratio,
                heads,
                64,
                numerics,
                &[
                    &[(0, 0, 1)],
                    &[(0, 1, 3), (1, 0, 16)],
                    &[(0, 4, 130)],
                    &[(0, 134, 16)],
                    // Four of sixteen were accepted.
                    &[(0, 138, 2), (1, 16, 5)],
                    &[(0, 140, 60), (1, 21, 7)],
                    &[(0, 200, 20)],
                    &[(0, 220, 3), (1, 28, 1)],
                ],
            );
        }
    }
}

#[test]
fn full_width_heads() {
    for numerics in BOTH {
        grow(TINY, 4, 4, 32, numerics, &[&[(0, 0, 150)], &[(0, 150, 3), (1, 0, 2)], &[(0, 152, 1)]]);
        grow(TINY, 128, 2, 32, numerics, &[&[(0, 0, 20), (1, 0, 240)], &[(0, 20, 3), (1, 239, 17)], &[(1, 256, 2)]]);
        grow(TINY, 0, 33, 32, numerics, &[&[(0, 0, 18)], &[(0, 18, 1)]]);
    }
}

/// The release's sizes on a rank of two: more entries than are chosen, in decode steps and in a longer one.
#[test]
fn release_sizes() {
    for (ratio, numerics) in [(4, Numerics::Published), (4, Numerics::Float), (128, Numerics::Published)] {
        let Some(mut attention) = Attention::new(FLASH, ratio, 32, 512, numerics) else { return };
        for chunk in 0..9 {
            let done = attention.layer.step(&[(0, 240 * chunk, 240)]);
            attention.layer.store(&done);
        }
        attention.step(&[(0, 2160, 2)]);
        if numerics == Numerics::Published {
            attention.step(&[(0, 2162, 17)]);
        }
    }
}

/// The same rows in other company: the same bits.
#[test]
fn company_changes_no_bit() {
    for numerics in BOTH {
        for ratio in [0, 4, 128] {
            let new = || Attention::new(NANO, ratio, 8, 64, numerics);
            let (Some(mut together), Some(mut alone)) = (new(), new()) else { return };
            for attention in [&mut together, &mut alone] {
                let done = attention.layer.step(&[(0, 0, 251), (1, 0, 120)]);
                attention.layer.store(&done);
            }
            let a = together.step(&[(1, 120, 9), (0, 251, 7)]);
            let mut b = Vec::new();
            for p in 120..129 {
                b.extend(alone.step(&[(1, p, 1)]));
            }
            b.extend(alone.step(&[(0, 251, 3)]));
            b.extend(alone.step(&[(0, 254, 4)]));
            assert!(a.iter().zip(&b).all(|(a, b)| a.to_bits() == b.to_bits()), "{numerics:?}, ratio {ratio}");
            assert_eq!(a.len(), b.len());
        }
    }
}
