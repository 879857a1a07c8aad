use super::prefill::*;
use super::swiglu;
use crate::device::testing::{Bench, assert_close};
use crate::device::{Buffer, In, Out};
use crate::numerics::{Numerics, fake_fp8};
use crate::ops::dense_gemm::gemm::GemmPoint;
use crate::ops::dense_gemm::gemm_tests::Stored;
use dsv4_model::layout::Format;

const LIMIT: f32 = 1.0;

/// A layer's experts and rows that go to them.
struct World {
    bench: Bench,
    prefill: Prefill,
    sizes: MoeSizes,
    point: GemmPoint,
    rows: usize,
    w: [Stored; 3],
    shared: [Stored; 3],
    x: Vec<f32>,
    chosen: Vec<u32>,
    weights: Vec<f32>,
}

/// `experts` of which the last is never chosen and the first by every row.
fn world(sizes: MoeSizes, point: GemmPoint, rows: usize) -> Option<World> {
    let mut bench = Bench::new(Numerics::Published)?;
    let (d, f, k) = (sizes.hidden as usize, sizes.inner as usize, sizes.top_k as usize);
    let e = sizes.experts as usize;
    let compiled = unit(sizes, point);
    let prefill = Prefill::new(sizes, point, |name| bench.kernel(&compiled, name));
    let stack = |bench: &mut Bench, rows, cols| Stored::random(bench, Format::Fp4, e, rows, cols);
    let w = [stack(&mut bench, f, d), stack(&mut bench, d, f), stack(&mut bench, f, d)];
    let dense = |bench: &mut Bench, rows, cols| Stored::random(bench, Format::Fp8, 1, rows, cols);
    let shared = [dense(&mut bench, f, d), dense(&mut bench, d, f), dense(&mut bench, f, d)];
    let mut x = bench.act(rows * d);
    fake_fp8(&mut x, 128);
    let mut chosen = Vec::new();
    for _ in 0..rows {
        let mut row = vec![0u32];
        while row.len() < k {
            let other = 1 + bench.below(e as u64 - 2) as u32;
            if !row.contains(&other) {
                row.push(other);
            }
        }
        row.sort_unstable();
        chosen.extend(row);
    }
    let weights = (0..rows * k).map(|_| 0.1 + bench.below(1000) as f32 / 1500.0).collect();
    Some(World { bench, prefill, sizes, point, rows, w, shared, x, chosen, weights })
}

impl World {
    /// The activation between the matmuls for one row, unquantised.
    fn mid(&self, w: &[Stored; 3], expert: usize, row: usize, weight: f32) -> Vec<f32> {
        let (d, f) = (self.sizes.hidden as usize, self.sizes.inner as usize);
        let x = &self.x[row * d..(row + 1) * d];
        let mut gate = w[0].times(expert, x, 0, f);
        let mut up = w[2].times(expert, x, 0, f);
        self.bench.round(&mut gate);
        self.bench.round(&mut up);
        swiglu(&mut gate, &up, LIMIT, weight);
        self.bench.round(&mut gate);
        gate
    }
}

struct Sorted {
    pairs: Buffer,
    tiles: Buffer,
    tile_count: Buffer,
}

fn sort(w: &World) -> Sorted {
    let pairs = w.chosen.len();
    let chosen = w.bench.upload(&w.chosen);
    let counts = w.bench.buffer::<u32>(w.sizes.experts as usize);
    let max = tiles_max(w.sizes, w.point.tokens, w.rows as u32) as usize;
    let out = Sorted {
        pairs: w.bench.buffer::<u32>(pairs),
        tiles: w.bench.buffer::<u32>(max * 4),
        tile_count: w.bench.buffer::<u32>(1),
    };
    let args = MoeSortArgs {
        chosen: In::at(chosen.at()),
        counts: Out::at(counts.at()),
        pairs: Out::at(out.pairs.at()),
        tiles: Out::at(out.tiles.at()),
        tile_count: Out::at(out.tile_count.at()),
        pair_count: pairs as u32,
    };
    w.prefill.sort(w.bench.gpu(), args).unwrap();
    out
}

#[test]
fn pairs_are_sorted_by_expert_then_row() {
    let sizes = MoeSizes { hidden: 256, inner: 128, experts: 9, top_k: 3 };
    for rows in [1, 150, 700] {
        let Some(w) = world(sizes, DEFAULT_POINT, rows) else { return };
        let sorted = sort(&w);
        let mut expected: Vec<u32> = (0..w.chosen.len() as u32).collect();
        expected.sort_by_key(|p| (w.chosen[*p as usize], *p));
        assert_eq!(sorted.pairs.values::<u32>().unwrap(), expected);
        let mut tiles: Vec<[u32; 4]> = Vec::new();
        for e in 0..sizes.experts {
            let first = expected.iter().filter(|p| w.chosen[**p as usize] < e).count() as u32;
            let count = w.chosen.iter().filter(|c| **c == e).count() as u32;
            let step = w.point.tokens;
            tiles.extend((0..count.div_ceil(step)).map(|t| [e, first + t * step, (count - t * step).min(step), 0]));
        }
        assert_eq!(sorted.tile_count.values::<u32>().unwrap(), [tiles.len() as u32]);
        assert!(tiles.len() as u32 <= tiles_max(sizes, w.point.tokens, rows as u32));
        let found: Vec<u32> = sorted.tiles.values().unwrap();
        assert_eq!(found[..tiles.len() * 4], *tiles.as_flattened());
    }
}

/// As the reference has it; a value may be on another side of a rounding to bfloat16, and then of one to E4M3.
fn assert_mid(found: &[f32], mut expected: Vec<f32>) {
    fake_fp8(&mut expected, 128);
    let mut stepped = 0;
    for (group, (found, expected)) in found.chunks_exact(128).zip(expected.chunks_exact(128)).enumerate() {
        let largest = expected.iter().fold(0f32, |m, v| m.max(v.abs()));
        for (f, e) in found.iter().zip(expected).filter(|(f, e)| f != e) {
            assert!((f - e).abs() <= e.abs() / 8.0 + largest / 200_000.0, "group {group}: {f} instead of {e}");
            stepped += 1;
        }
    }
    assert!(stepped * 100 <= found.len(), "{stepped} of {} values are a step away", found.len());
}

fn check(sizes: MoeSizes, point: GemmPoint, rows: usize) {
    let Some(w) = world(sizes, point, rows) else { return };
    let (d, f, k) = (sizes.hidden as usize, sizes.inner as usize, sizes.top_k as usize);
    let gpu = w.bench.gpu();
    let sorted = sort(&w);
    let (x, weights) = (w.bench.upload_act(&w.x), w.bench.upload(&w.weights));
    let stacks: Vec<Buffer> = w.w.iter().map(|s| w.bench.upload(&s.bytes)).collect();
    let shared: Vec<Buffer> = w.shared.iter().map(|s| w.bench.upload(&s.bytes)).collect();
    let mid = w.bench.buffer_act(rows * (k + 1) * f);
    let routed = MoeUpArgs {
        x: In::at(x.at()),
        w1: In::at(stacks[0].at()),
        w3: In::at(stacks[2].at()),
        stride: w.w[0].layout.stride,
        scales_at: w.w[0].layout.scales_offset,
        pairs: In::at(sorted.pairs.at()),
        tiles: In::at(sorted.tiles.at()),
        tile_count: In::at(sorted.tile_count.at()),
        weights: In::at(weights.at()),
        mid: Out::at(mid.at()),
        limit: LIMIT,
        rows: rows as u32,
    };
    w.prefill.up(gpu, routed).unwrap();
    let dense = MoeUpArgs {
        w1: In::at(shared[0].at()),
        w3: In::at(shared[2].at()),
        scales_at: w.shared[0].layout.scales_offset,
        pairs: In::none(),
        tiles: In::none(),
        tile_count: In::none(),
        weights: In::none(),
        ..routed
    };
    w.prefill.up_shared(gpu, dense).unwrap();
    let found = w.bench.download_act(&mid);
    let expected = (0..rows).flat_map(|r| {
        let routed = (0..k).map(move |s| r * k + s).map(|p| w.mid(&w.w, w.chosen[p] as usize, r, w.weights[p]));
        routed.chain([w.mid(&w.shared, 0, r, 1.0)]).flatten().collect::<Vec<f32>>()
    });
    assert_mid(&found, expected.collect());

    // From the kernel's own mid: the steps away are its, not this matmul's.
    let slots: Vec<f32> =
        (0..rows * k).map(|p| p + p / k).flat_map(|at| found[at * f..(at + 1) * f].to_vec()).collect();
    let y = w.bench.buffer::<f32>(rows * d);
    let mut expected = vec![0f32; rows * d];
    for (first, outs) in [(0, 64), (64, d - 64)] {
        let out = w.bench.buffer::<f32>(rows * (k + 1) * outs);
        // The shared expert's part, which the dense product puts there.
        let mut parts = vec![f32::NAN; rows * (k + 1) * outs];
        parts.chunks_exact_mut((k + 1) * outs).for_each(|row| row[k * outs..].fill(0.25));
        gpu.write(out.at(), bytemuck::cast_slice(&parts)).unwrap();
        let down = MoeDownArgs {
            mid: In::at(mid.at()),
            w2: In::at(stacks[1].at()),
            stride: w.w[1].layout.stride,
            scales_at: w.w[1].layout.scales_offset,
            pairs: In::at(sorted.pairs.at()),
            tiles: In::at(sorted.tiles.at()),
            tile_count: In::at(sorted.tile_count.at()),
            out: Out::at(out.at()),
            first_out: first as u32,
            outs: outs as u32,
        };
        w.prefill.down(gpu, rows as u32, down).unwrap();
        for p in 0..rows * k {
            let (row, slot) = (p / k, p % k);
            let at = (row * (k + 1) + slot) * outs;
            let part = w.w[1].times(w.chosen[p] as usize, &slots[p * f..(p + 1) * f], first, outs);
            parts[at..at + outs].copy_from_slice(&part);
        }
        let found: Vec<f32> = out.values().unwrap();
        assert_close(&found, &parts, Numerics::Float);
        let args = MoeSumArgs {
            out: In::at(out.at()),
            y: Out::at(y.at()),
            rows: rows as u32,
            first_out: first as u32,
            outs: outs as u32,
        };
        w.prefill.sum(gpu, args).unwrap();
        for (row, y) in expected.chunks_exact_mut(d).enumerate() {
            for slot in 0..k + 1 {
                let from = &found[(row * (k + 1) + slot) * outs..][..outs];
                y[first..first + outs].iter_mut().zip(from).for_each(|(y, o)| *y += o);
            }
        }
    }
    assert_eq!(y.values::<f32>().unwrap(), expected);
}

#[test]
fn kernels_are_the_reference() {
    // The widths of tests/tiny and tests/nano at one and two ranks.
    check(MoeSizes { hidden: 256, inner: 128, experts: 8, top_k: 3 }, DEFAULT_POINT, 70);
    check(MoeSizes { hidden: 256, inner: 256, experts: 8, top_k: 2 }, DEFAULT_POINT, 33);
    let wide = GemmPoint { tokens: 128, warps_m: 2, stages: 4, ..DEFAULT_POINT };
    check(MoeSizes { hidden: 192, inner: 128, experts: 5, top_k: 2 }, wide, 150);
}

#[test]
fn points_say_what_can_be_compiled() {
    assert!(legal(DEFAULT_POINT));
    assert!(legal(GemmPoint { tokens: 128, warps_m: 2, stages: 4, ..DEFAULT_POINT }));
    assert!(!legal(GemmPoint { outs: 128, ..DEFAULT_POINT }), "half a group to round");
    assert!(!legal(GemmPoint { stages: 7, ..DEFAULT_POINT }));
}
