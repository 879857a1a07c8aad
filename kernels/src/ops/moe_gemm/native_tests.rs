//! Against the portable kernels, which are tested against the reference.

use super::native::*;
use super::prefill::{self, DEFAULT_POINT, MoeDownArgs, MoeSizes, MoeSortArgs, MoeUpArgs, Prefill};
use crate::device::testing::{Bench, assert_close};
use crate::device::{Buffer, In, Out};
use crate::numerics::{Numerics, e4m3_value, ue8m0_value};
use crate::ops::dense_gemm::gemm::GemmPoint;
use crate::ops::dense_gemm::gemm_tests::Stored;
use crate::ops::dense_gemm::native_tests::{Codes, NARROW, OTHER_BYTE, OTHER_LANE, TOWARDS_ZERO, altered, bench};
use dsv4_model::layout::Format;

const LIMIT: f32 = 1.0;

fn experts(bench: &Bench, sizes: MoeSizes, point: GemmPoint) -> (NativeExperts, Prefill) {
    let (portable, tiles) = (prefill::unit(sizes, point), point_for(point));
    let native = unit(sizes, tiles);
    let kernels = ["native_moe_up", "native_moe_up_shared", "native_moe_down"].map(|name| bench.kernel(&native, name));
    let prefill = Prefill::new(sizes, point, |name| bench.kernel(&portable, name));
    (NativeExperts::new(sizes, tiles, kernels), prefill)
}

/// The values of codes `[.., width]`.
fn decode(codes: &Buffer, scales: &Buffer) -> Vec<f32> {
    let (codes, scales): (Vec<u8>, Vec<u8>) = (codes.values().unwrap(), scales.values().unwrap());
    codes.iter().enumerate().map(|(i, c)| e4m3_value(*c) * ue8m0_value(scales[i / 128])).collect()
}

/// Equal but for values on another side of a rounding to bfloat16, and then of one to E4M3.
fn assert_mid(found: &[f32], expected: &[f32]) {
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
    let Some(mut bench) = bench() else { return };
    let (native, portable) = experts(&bench, sizes, point);
    let (d, f, k) = (sizes.hidden as usize, sizes.inner as usize, sizes.top_k as usize);
    let e = sizes.experts as usize;
    let mut stacks = |format, count, rows, cols| {
        let stored = Stored::random(&mut bench, format, count, rows, cols);
        (bench.upload(&stored.bytes), stored.layout)
    };
    let (w1, up_layout) = stacks(Format::Fp4, e, f, d);
    let (w3, _) = stacks(Format::Fp4, e, f, d);
    let (w2, down_layout) = stacks(Format::Fp4, e, d, f);
    let (shared_w1, shared_layout) = stacks(Format::Fp8, 1, f, d);
    let (shared_w3, _) = stacks(Format::Fp8, 1, f, d);
    let x = Codes::random(&mut bench, rows * d);
    let x_act = bench.upload_act(&x.values);
    // The first expert has every row, the last none.
    let chosen: Vec<u32> = (0..rows)
        .flat_map(|_| {
            let next = 1 + bench.below(e as u64 - k as u64) as u32;
            std::iter::once(0).chain(next..).take(k).collect::<Vec<u32>>()
        })
        .collect();
    let weights: Vec<f32> = (0..rows * k).map(|_| 0.1 + bench.below(1000) as f32 / 1500.0).collect();
    let (chosen_at, weights) = (bench.upload(&chosen), bench.upload(&weights));
    let counts = bench.buffer::<u32>(e);
    let tiles = bench.buffer::<u32>(prefill::tiles_max(sizes, point.tokens, rows as u32) as usize * 4);
    let (pairs, tile_count) = (bench.buffer::<u32>(rows * k), bench.buffer::<u32>(1));
    let sort = MoeSortArgs {
        chosen: In::at(chosen_at.at()),
        counts: Out::at(counts.at()),
        pairs: Out::at(pairs.at()),
        tiles: Out::at(tiles.at()),
        tile_count: Out::at(tile_count.at()),
        pair_count: chosen.len() as u32,
    };
    portable.sort(bench.gpu(), sort).unwrap();

    let slots = rows * (k + 1);
    let (mid, scales) = (bench.buffer::<u8>(slots * f), bench.buffer::<u8>(slots * f / 128));
    let routed = NativeUpArgs {
        x: In::at(x.codes.at()),
        x_scales: In::at(x.scales.at()),
        w1: In::at(w1.at()),
        w3: In::at(w3.at()),
        stride: up_layout.stride,
        scales_at: up_layout.scales_offset,
        pairs: In::at(pairs.at()),
        tiles: In::at(tiles.at()),
        tile_count: In::at(tile_count.at()),
        weights: In::at(weights.at()),
        mid: Out::at(mid.at()),
        mid_scales: Out::at(scales.at()),
        limit: LIMIT,
        rows: rows as u32,
    };
    native.up(bench.gpu(), routed).unwrap();
    let shared = NativeUpArgs {
        w1: In::at(shared_w1.at()),
        w3: In::at(shared_w3.at()),
        scales_at: shared_layout.scales_offset,
        pairs: In::none(),
        tiles: In::none(),
        tile_count: In::none(),
        weights: In::none(),
        ..routed
    };
    native.up_shared(bench.gpu(), shared).unwrap();
    let mid_act = bench.buffer_act(slots * f);
    let portable_up = |args: NativeUpArgs| MoeUpArgs {
        x: In::at(x_act.at()),
        w1: args.w1,
        w3: args.w3,
        stride: args.stride,
        scales_at: args.scales_at,
        pairs: args.pairs,
        tiles: args.tiles,
        tile_count: args.tile_count,
        weights: args.weights,
        mid: Out::at(mid_act.at()),
        limit: LIMIT,
        rows: rows as u32,
    };
    portable.up(bench.gpu(), portable_up(routed)).unwrap();
    portable.up_shared(bench.gpu(), portable_up(shared)).unwrap();
    let found = decode(&mid, &scales);
    assert_mid(&found, &bench.download_act(&mid_act));

    // From the same mid.
    let mid_act = bench.upload_act(&found);
    for (first, outs) in [(0, 64), (64, d - 64)] {
        let (by_native, by_portable) = (bench.buffer::<f32>(slots * outs), bench.buffer::<f32>(slots * outs));
        let args = NativeDownArgs {
            mid: In::at(mid.at()),
            mid_scales: In::at(scales.at()),
            w2: In::at(w2.at()),
            stride: down_layout.stride,
            scales_at: down_layout.scales_offset,
            pairs: routed.pairs,
            tiles: routed.tiles,
            tile_count: routed.tile_count,
            out: Out::at(by_native.at()),
            first_out: first as u32,
            outs: outs as u32,
        };
        native.down(bench.gpu(), rows as u32, args).unwrap();
        let args = MoeDownArgs {
            mid: In::at(mid_act.at()),
            w2: args.w2,
            stride: args.stride,
            scales_at: args.scales_at,
            pairs: args.pairs,
            tiles: args.tiles,
            tile_count: args.tile_count,
            out: Out::at(by_portable.at()),
            first_out: args.first_out,
            outs: args.outs,
        };
        portable.down(bench.gpu(), rows as u32, args).unwrap();
        let [found, expected] = [by_native, by_portable].map(|b| b.values::<f32>().unwrap());
        // The shared expert's slot is written by neither.
        for (found, expected) in found.chunks_exact((k + 1) * outs).zip(expected.chunks_exact((k + 1) * outs)) {
            let (found, shared) = found.split_at(k * outs);
            assert!(shared.iter().all(|v| v.is_nan()), "written past the routed experts");
            assert!(expected[..k * outs].iter().any(|v| *v != 0.0));
            assert_close(found, &expected[..k * outs], Numerics::Float);
        }
    }
}

#[test]
fn kernels_are_the_portable_ones() {
    // The widths of tests/tiny and tests/nano at one and two ranks.
    check(MoeSizes { hidden: 256, inner: 128, experts: 8, top_k: 3 }, DEFAULT_POINT, 70);
    check(MoeSizes { hidden: 256, inner: 256, experts: 8, top_k: 2 }, DEFAULT_POINT, 33);
    let wide = GemmPoint { tokens: 128, warps_m: 2, stages: 4, ..DEFAULT_POINT };
    check(MoeSizes { hidden: 384, inner: 128, experts: 5, top_k: 2 }, wide, 150);
}

#[test]
fn a_gpu_is_used_only_if_its_sums_are_wide_enough() {
    let Some(bench) = bench() else { return };
    let sizes = MoeSizes { hidden: 256, inner: 1024, experts: 8, top_k: 3 };
    let (native, portable) = experts(&bench, sizes, DEFAULT_POINT);
    let verdict = self_check(&bench.shared(), &native, &portable).unwrap();
    println!("{verdict}");
    assert!(verdict.accepted(), "{verdict}");
    if bench.gpu().facts().capability != (0, 0) {
        return;
    }
    assert!(verdict.native < 1e-6 && verdict.portable < 1e-6, "{verdict}");
    let point = point_for(DEFAULT_POINT);
    for (text, accepted) in [(TOWARDS_ZERO, true), (NARROW, false), (OTHER_LANE, false), (OTHER_BYTE, false)] {
        let unit = altered(unit(sizes, point), text);
        let kernels: Vec<_> = unit.kernels.iter().map(|(name, _)| bench.kernel(&unit, name)).collect();
        let native = NativeExperts::new(sizes, point, kernels.try_into().unwrap());
        let verdict = self_check(&bench.shared(), &native, &portable).unwrap();
        println!("{verdict}");
        assert_eq!(verdict.accepted(), accepted, "{verdict}");
    }
}

#[test]
fn points_say_what_can_be_compiled() {
    let point = point_for(DEFAULT_POINT);
    assert!(legal(point));
    assert!(2 * (point.shared(Format::Fp4) + 1024) <= 102_400, "two blocks fit a multiprocessor");
    assert!(legal(point_for(GemmPoint { tokens: 128, ..DEFAULT_POINT })));
    assert!(!legal(super::native::point_for(GemmPoint { tokens: 16, ..DEFAULT_POINT })));
    assert!(!legal(crate::ops::dense_gemm::native::NativePoint { outs: 128, ..point }), "half a group to round");
}
