use super::gemm::*;
use crate::device::testing::{Bench, assert_close};
use crate::device::{Buffer, In, Out};
use crate::numerics::{Numerics, fake_fp8};
use crate::simd::{self, Row};
use dsv4_model::layout::{Format, MatrixLayout, TILE};

/// A stack of random matrices as they are stored.
pub struct Stored {
    pub format: Format,
    pub layout: MatrixLayout,
    pub cols: usize,
    pub bytes: Vec<u8>,
}

impl Stored {
    pub fn random(bench: &mut Bench, format: Format, count: usize, rows: usize, cols: usize) -> Stored {
        let layout = MatrixLayout::new(format, rows as u64, cols as u64);
        let mut bytes = bench.bytes(count * layout.stride as usize);
        for matrix in bytes.chunks_exact_mut(layout.stride as usize) {
            let (codes, scales) = matrix.split_at_mut(layout.scales_offset as usize);
            match format {
                Format::Bf16 => {
                    let values = bench.act(rows * cols);
                    let bits = values.iter().flat_map(|v| ((v.to_bits() >> 16) as u16).to_le_bytes());
                    codes.iter_mut().zip(bits).for_each(|(to, b)| *to = b);
                }
                // No NaN.
                Format::Fp8 => codes.iter_mut().filter(|c| **c & 0x7f == 0x7f).for_each(|c| *c &= 0xf0),
                _ => {}
            }
            scales.iter_mut().for_each(|s| *s = 112 + *s % 12);
        }
        Stored { format, layout, cols, bytes }
    }

    pub fn widen(&self, index: usize, row: usize) -> Vec<f32> {
        let (l, start) = (&self.layout, index * self.layout.stride as usize);
        let codes = &self.bytes[start + row * l.row_bytes as usize..][..l.row_bytes as usize];
        let scales = |row: usize| {
            let at = start + l.scales_offset as usize + row * l.scale_row_bytes as usize;
            &self.bytes[at..at + l.scale_row_bytes as usize]
        };
        let stored = match self.format {
            Format::Bf16 => Row::Bf16(codes),
            Format::Fp8 => Row::Fp8(codes, scales(row / TILE as usize)),
            Format::Fp4 => Row::Fp4(codes, scales(row)),
            other => panic!("{}", other.name()),
        };
        let mut out = vec![0.0; self.cols];
        stored.widen(&mut out);
        out
    }

    /// Rows of `x` times rows `first..first + count` of matrix `index`, as the reference does it: `[rows, count]`.
    pub fn times(&self, index: usize, x: &[f32], first: usize, count: usize) -> Vec<f32> {
        let w: Vec<Vec<f32>> = (first..first + count).map(|r| self.widen(index, r)).collect();
        x.chunks_exact(self.cols).flat_map(|x| w.iter().map(|w| simd::dot(x, w)).collect::<Vec<f32>>()).collect()
    }
}

struct Case {
    rows: usize,
    cols: usize,
    /// Rows of the stored matrix in front of these.
    row0: usize,
    f32: bool,
}

/// Segments of one launch, `tokens` rows: every output against the reference, everything around untouched.
fn check(format: Format, point: GemmPoint, tokens: usize, cases: &[Case]) {
    let Some(mut bench) = Bench::new(Numerics::Published) else { return };
    let name = if format == Format::Bf16 { "gemm_bf16" } else { "gemm_fp8" };
    let kernel = bench.kernel(&unit(format, point), name);
    let mut keep: Vec<Buffer> = Vec::new();
    let mut segs = Vec::new();
    let mut expected = Vec::new();
    for case in cases {
        let w = Stored::random(&mut bench, format, 1, case.row0 + case.rows, case.cols);
        let (x_stride, y_stride) = (case.cols + 24, case.rows + 13);
        let x = bench.act(tokens * x_stride);
        let tight: Vec<f32> = x.chunks_exact(x_stride).flat_map(|r| r[..case.cols].to_vec()).collect();
        expected.push(w.times(0, &tight, case.row0, case.rows));
        let (dw, dx) = (bench.upload(&w.bytes), bench.upload_act(&x));
        let y = if case.f32 { bench.buffer::<f32>(tokens * y_stride) } else { bench.buffer_act(tokens * y_stride) };
        segs.push(GemmSeg {
            w: In::at(dw.at() + case.row0 as u64 * w.layout.row_bytes),
            scales: In::at(dw.at() + w.layout.scales_offset),
            x: In::at(dx.at()),
            y: y.at(),
            rows: case.rows as u32,
            cols: case.cols as u32,
            x_stride: x_stride as u32,
            y_stride: y_stride as u32,
            format: if format == Format::Bf16 { BF16 } else { FP8 },
            flags: if case.f32 { FLAG_F32 } else { 0 },
            row0: case.row0 as u32,
            first_block: 0,
        });
        keep.extend([dw, dx, y]);
    }
    launch(bench.gpu(), kernel, format, point, tokens as u32, &segs).unwrap();
    for (i, (case, mut expected)) in cases.iter().zip(expected).enumerate() {
        let y = &keep[3 * i + 2];
        let (all, numerics): (Vec<f32>, _) = if case.f32 {
            (y.values().unwrap(), Numerics::Float)
        } else {
            bench.round(&mut expected);
            (bench.download_act(y), Numerics::Published)
        };
        let rows = all.chunks_exact(case.rows + 13);
        assert!(rows.clone().all(|r| r[case.rows..].iter().all(|v| v.is_nan())), "written past a row");
        let found: Vec<f32> = rows.flat_map(|r| r[..case.rows].to_vec()).collect();
        assert_close(&found, &expected, numerics);
    }
}

fn case(rows: usize, cols: usize, row0: usize, f32: bool) -> Case {
    Case { rows, cols, row0, f32 }
}

const SMALL: GemmPoint = GemmPoint { tokens: 64, outs: 128, warps_m: 2, stages: 4, group: 2 };

#[test]
fn fp8_kernel_is_the_reference() {
    let default = GemmPoint::default_for(Format::Fp8);
    check(Format::Fp8, default, 150, &[case(320, 256, 0, false), case(64, 128, 64, true), case(128, 320, 192, false)]);
    check(Format::Fp8, SMALL, 150, &[case(192, 64, 64, true), case(256, 192, 0, false)]);
    // More tiles of rows than pass over the weights together, and more segments than a launch has.
    let many: Vec<Case> = (0..9).map(|i| case(64 + 64 * (i % 3), 64, 0, i % 2 == 0)).collect();
    check(Format::Fp8, SMALL, 200, &many);
}

#[test]
fn bf16_kernel_is_the_reference() {
    let default = GemmPoint::default_for(Format::Bf16);
    check(Format::Bf16, default, 17, &[case(256, 256, 0, true), case(4, 256, 0, false), case(72, 64, 0, true)]);
    check(Format::Bf16, default, 130, &[case(64, 128, 0, false)]);
}

#[test]
fn a_row_is_the_same_in_any_batch() {
    let Some(mut bench) = Bench::new(Numerics::Published) else { return };
    let point = GemmPoint::default_for(Format::Fp8);
    let kernel = bench.kernel(&unit(Format::Fp8, point), "gemm_fp8");
    let (rows, cols) = (128, 256);
    let w = Stored::random(&mut bench, Format::Fp8, 1, rows, cols);
    let x = bench.act(140 * cols);
    let (dw, dx) = (bench.upload(&w.bytes), bench.upload_act(&x));
    let run = |first: usize, tokens: usize| -> Vec<f32> {
        let y = bench.buffer::<f32>(tokens * rows);
        let seg = GemmSeg {
            w: In::at(dw.at()),
            scales: In::at(dw.at() + w.layout.scales_offset),
            x: In::at(dx.at() + (first * cols * 2) as u64),
            y: y.at(),
            rows: rows as u32,
            cols: cols as u32,
            x_stride: cols as u32,
            y_stride: rows as u32,
            format: FP8,
            flags: FLAG_F32,
            row0: 0,
            first_block: 0,
        };
        launch(bench.gpu(), kernel, Format::Fp8, point, tokens as u32, &[seg]).unwrap();
        y.values().unwrap()
    };
    let all = run(0, 140);
    for (first, tokens) in [(3, 1), (100, 40)] {
        assert_eq!(run(first, tokens), all[first * rows..(first + tokens) * rows]);
    }
}

#[test]
fn largest_and_smallest_scales_keep_their_bits() {
    let Some(mut bench) = Bench::new(Numerics::Published) else { return };
    let point = GemmPoint::default_for(Format::Fp8);
    let kernel = bench.kernel(&unit(Format::Fp8, point), "gemm_fp8");
    let mut w = Stored::random(&mut bench, Format::Fp8, 1, 64, 64);
    for scale in [60, 127, 160] {
        w.bytes[w.layout.scales_offset as usize] = scale;
        // Every code against one value of x: no sum, so every bit counts.
        let mut x = vec![0.0; 64 * 64];
        (0..64).for_each(|i| x[i * 64 + i] = 1.0);
        let (dw, dx, y) = (bench.upload(&w.bytes), bench.upload_act(&x), bench.buffer::<f32>(64 * 64));
        let seg = GemmSeg {
            w: In::at(dw.at()),
            scales: In::at(dw.at() + w.layout.scales_offset),
            x: In::at(dx.at()),
            y: y.at(),
            rows: 64,
            cols: 64,
            x_stride: 64,
            y_stride: 64,
            format: FP8,
            flags: FLAG_F32,
            row0: 0,
            first_block: 0,
        };
        launch(bench.gpu(), kernel, Format::Fp8, point, 64, &[seg]).unwrap();
        let found: Vec<f32> = y.values().unwrap();
        for r in 0..64 {
            let row = w.widen(0, r);
            (0..64).for_each(|k| assert_eq!(found[k * 64 + r], row[k], "row {r}, column {k}, scale {scale}"));
        }
    }
}

#[test]
fn fake_quant_is_the_reference() {
    let Some(mut bench) = Bench::new(Numerics::Published) else { return };
    let kernel = bench.kernel(&unit(Format::Fp8, GemmPoint::default_for(Format::Fp8)), "fake_quant");
    for (rows, cols) in [(17, 128), (3, 256), (5, 1024)] {
        let stride = cols + 8;
        let mut x = bench.act(rows * stride);
        x[..128].fill(0.0);
        let (dx, y) = (bench.upload_act(&x), bench.buffer_act(rows * cols));
        let args = FakeQuantArgs {
            x: In::at(dx.at()),
            y: Out::at(y.at()),
            rows: rows as u32,
            cols: cols as u32,
            x_stride: stride as u32,
        };
        launch_fake_quant(bench.gpu(), kernel, args).unwrap();
        let mut expected: Vec<f32> = x.chunks_exact(stride).flat_map(|r| r[..cols].to_vec()).collect();
        fake_fp8(&mut expected, 128);
        assert_eq!(bench.download_act(&y), expected);
    }
}

#[test]
fn points_say_what_can_be_compiled() {
    for format in [Format::Fp8, Format::Bf16] {
        let point = GemmPoint::default_for(format);
        assert!(point.legal(format));
        assert!(!GemmPoint { stages: point.stages + 1, ..point }.legal(format), "more shared memory than there is");
        assert!(!GemmPoint { warps_m: 1, ..point }.legal(format), "sums of 128 x 64 do not fit a warp's registers");
        assert!(!GemmPoint { outs: 192, ..point }.legal(format), "copies are not whole");
        assert!(!GemmPoint { outs: 100, ..point }.legal(format));
    }
    assert!(!SMALL.legal(Format::Bf16), "a copy's rows are not whole groups of 32");
}
