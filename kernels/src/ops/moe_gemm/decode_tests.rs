use dsv4_model::layout::Format;

use super::decode::*;
use super::swiglu;
use crate::device::testing::{Bench, assert_close};
use crate::device::{Buffer, In, Out};
use crate::numerics::Numerics;
use crate::ops::dense_gemm::gemv_tests::{Stored, quantised};

/// Experts of the stack.
const STACK: usize = 5;

/// A stack of routed matrices and a shared one.
struct Weights {
    routed: Vec<Stored>,
    shared: Stored,
    stack: Buffer,
    one: Buffer,
}

impl Weights {
    fn new(bench: &mut Bench, rows: usize, cols: usize) -> Weights {
        let routed: Vec<Stored> = (0..STACK).map(|_| Stored::new(bench, Format::Fp4, rows, cols)).collect();
        let shared = Stored::new(bench, Format::Fp8, rows, cols);
        let bytes: Vec<u8> = routed.iter().flat_map(|m| m.bytes.clone()).collect();
        let (stack, one) = (bench.upload(&bytes), bench.upload(&shared.bytes));
        Weights { routed, shared, stack, one }
    }

    /// The matrix of a slot.
    fn of(&self, chosen: &[u32], slot: usize) -> &Stored {
        chosen.get(slot).map_or(&self.shared, |e| &self.routed[*e as usize])
    }
}

fn products(w: &Stored, rows: usize, x: &[f32]) -> Vec<f32> {
    (0..rows).map(|r| w.dot(r, x)).collect()
}

#[test]
fn kernels_are_the_reference_and_rows_are_independent() {
    for numerics in [Numerics::Float, Numerics::Published] {
        let Some(mut bench) = Bench::new(numerics) else { return };
        let other = MoePoint { warps: 4, depth: 3, up_tiles: 2, down_tiles: 2, ahead: 0 };
        // (hidden, inner, chosen, rows, limit): tiny and nano cut in one and two; ragged; long.
        let sizes = [
            (256, 256, 3, 5, 1.0, MoePoint::DEFAULT),
            (256, 128, 2, 16, 10.0, MoePoint::DEFAULT),
            (192, 64, 2, 3, 0.0, other),
            (320, 192, 3, 2, 1.0, other),
            (1024, 512, 4, 1, 10.0, MoePoint::DEFAULT),
        ];
        for (hidden, inner, k, rows, limit, point) in sizes {
            println!("{numerics:?} {hidden} {inner} {k} {rows} {point:?}");
            let experts = Experts { hidden: hidden as u32, inner: inner as u32, chosen: k as u32 };
            let (w1, w3) = (Weights::new(&mut bench, inner, hidden), Weights::new(&mut bench, inner, hidden));
            let w2 = Weights::new(&mut bench, hidden, inner);
            let x = bench.act(rows * hidden);
            let chosen: Vec<u32> = (0..rows)
                .flat_map(|_| {
                    let skip = bench.below(2) as usize;
                    (0..STACK as u32).skip(skip).take(k).collect::<Vec<_>>()
                })
                .collect();
            let weights: Vec<f32> = (0..rows * k).map(|_| 0.1 + bench.below(1000) as f32 / 700.0).collect();
            let mid = bench.act(rows * (k + 1) * inner);
            let (dx, dc, dw, dm) =
                (bench.upload_act(&x), bench.upload(&chosen), bench.upload(&weights), bench.upload_act(&mid));
            let (up_stride, down_stride) = experts.strides();
            let act = if numerics == Numerics::Published { 2 } else { 4 };

            // Rows first..first + count, in blocks of `at_once`.
            let go = |at_once: u32, first: usize, count: usize| {
                let unit = unit(experts, at_once, point, numerics);
                let (up, down) = (bench.kernel(&unit, "moe_up"), bench.kernel(&unit, "moe_down"));
                let kernels = MoeDecode { up, down, experts, rows: at_once, point, numerics };
                let (out_mid, y) = (bench.buffer_act(count * (k + 1) * inner), bench.buffer::<f32>(count * hidden));
                let args = MoeUpArgs {
                    x: In::at(dx.at() + (first * hidden * act) as u64),
                    w1: In::at(w1.stack.at()),
                    w3: In::at(w3.stack.at()),
                    stride: up_stride,
                    shared_w1: In::at(w1.one.at()),
                    shared_w3: In::at(w3.one.at()),
                    chosen: In::at(dc.at() + (first * k * 4) as u64),
                    weights: In::at(dw.at() + (first * k * 4) as u64),
                    mid: Out::at(out_mid.at()),
                    limit,
                    rows: count as u32,
                    prefetch: 0,
                };
                kernels.launch_up(bench.gpu(), args).unwrap();
                let args = MoeDownArgs {
                    mid: In::at(dm.at() + (first * (k + 1) * inner * act) as u64),
                    w2: In::at(w2.stack.at()),
                    stride: down_stride,
                    shared_w2: In::at(w2.one.at()),
                    chosen: In::at(dc.at() + (first * k * 4) as u64),
                    y: Out::at(y.at()),
                    rows: count as u32,
                    prefetch: 0,
                };
                kernels.launch_down(bench.gpu(), args).unwrap();
                (bench.download_act(&out_mid), y.values::<f32>().unwrap())
            };

            let (xq, mq) = (quantised(&x, hidden, numerics), quantised(&mid, inner, numerics));
            let (mut expected_mid, mut expected_y) = (Vec::new(), Vec::new());
            for r in 0..rows {
                let (x, chosen) = (&xq[r * hidden..][..hidden], &chosen[r * k..][..k]);
                let mut y = vec![0f32; hidden];
                for slot in 0..=k {
                    let mut gate = products(w1.of(chosen, slot), inner, x);
                    let mut up = products(w3.of(chosen, slot), inner, x);
                    bench.round(&mut gate);
                    bench.round(&mut up);
                    swiglu(&mut gate, &up, limit, if slot < k { weights[r * k + slot] } else { 1.0 });
                    bench.round(&mut gate);
                    expected_mid.extend(gate);
                    let part = &mq[(r * (k + 1) + slot) * inner..][..inner];
                    y.iter_mut().zip(products(w2.of(chosen, slot), hidden, part)).for_each(|(y, p)| *y += p);
                }
                expected_y.extend(y);
            }
            let (found_mid, found_y) = go(1, 0, rows);
            assert_close(&found_mid, &expected_mid, numerics);
            assert_close(&found_y, &expected_y, Numerics::Float);

            let bits =
                |(mid, y): (Vec<f32>, Vec<f32>)| [mid, y].map(|v| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>());
            let whole = bits((found_mid, found_y));
            // Every other size with one more: each is a compilation.
            for at_once in if hidden == inner { vec![2, 4, 8] } else { vec![8] } {
                assert_eq!(bits(go(at_once, 0, rows)), whole);
            }
            let last = bits(go(8, rows - 1, 1));
            assert!(whole.iter().zip(&last).all(|(whole, last)| whole.ends_with(last)));
        }
    }
}

#[test]
fn points_fit_the_true_sizes() {
    let flash = Experts { hidden: 4096, inner: 1024, chosen: 6 };
    for numerics in [Numerics::Float, Numerics::Published] {
        assert!(MoePoint::DEFAULT.legal(flash, 4, numerics));
        assert!(MoePoint::all(flash, 1, numerics).count() > 20);
    }
    assert!(MoePoint::DEFAULT.legal(flash, 8, Numerics::Published));
}
