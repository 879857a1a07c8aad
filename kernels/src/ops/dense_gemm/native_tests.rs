use super::gemm::{self, FLAG_F32, GemmPoint};
use super::gemm_tests::Stored;
use super::native::*;
use crate::device::testing::{Bench, assert_close};
use crate::device::unit::Unit;
use crate::device::{Buffer, In, Out};
use crate::gpu::kernels::Kernels;
use crate::numerics::{Numerics, e4m3_value, fake_fp8, ue8m0_value};
use crate::tuning::Tuning;
use dsv4_model::layout::Format;
use dsv4_model::{ModelConfig, Tp};

/// The emulator, or a GPU that has the instructions; another GPU has nothing to test.
pub fn bench() -> Option<Bench> {
    let bench = Bench::new(Numerics::Published)?;
    let arch = bench.gpu().facts().arch();
    if arch != "sm_00a" && arch != ARCH {
        println!("block-scaled kernels are not for {arch}");
        return None;
    }
    Some(bench)
}

pub fn native(bench: &Bench, point: NativePoint) -> Native {
    let unit = unit(point);
    Native::new(point, ["native_fp8", "native_quant"].map(|name| bench.kernel(&unit, name)))
}

/// Activations as codes on the device: `[rows, stride]`, their scales, and the values they stand for.
pub struct Codes {
    pub codes: Buffer,
    pub scales: Buffer,
    pub values: Vec<f32>,
}

impl Codes {
    /// Random codes and scales: every value of either.
    pub fn random(bench: &mut Bench, count: usize) -> Codes {
        let mut codes = bench.bytes(count);
        codes.iter_mut().filter(|c| **c & 0x7f == 0x7f).for_each(|c| *c &= 0xf0);
        let scales: Vec<u8> = (0..count / 128).map(|_| 118 + bench.below(12) as u8).collect();
        let value = |(i, code): (usize, &u8)| e4m3_value(*code) * ue8m0_value(scales[i / 128]);
        let values = codes.iter().enumerate().map(value).collect();
        Codes { codes: bench.upload(&codes), scales: bench.upload(&scales), values }
    }
}

struct Case {
    rows: usize,
    cols: usize,
    /// Rows of the stored matrix in front of these.
    row0: usize,
    f32: bool,
}

fn case(rows: usize, cols: usize, row0: usize, f32: bool) -> Case {
    Case { rows, cols, row0, f32 }
}

/// Segments of one launch, `tokens` rows: every output against the reference, everything around untouched.
fn check(point: NativePoint, tokens: usize, cases: &[Case]) {
    let Some(mut bench) = bench() else { return };
    let native = native(&bench, point);
    let mut keep: Vec<[Buffer; 4]> = Vec::new();
    let (mut segs, mut expected) = (Vec::new(), Vec::new());
    for case in cases {
        let w = Stored::random(&mut bench, Format::Fp8, 1, case.row0 + case.rows, case.cols);
        let (x_stride, y_stride) = (case.cols + 128, case.rows + 13);
        let x = Codes::random(&mut bench, tokens * x_stride);
        let tight: Vec<f32> = x.values.chunks_exact(x_stride).flat_map(|r| r[..case.cols].to_vec()).collect();
        expected.push(w.times(0, &tight, case.row0, case.rows));
        let dw = bench.upload(&w.bytes);
        let y = if case.f32 { bench.buffer::<f32>(tokens * y_stride) } else { bench.buffer_act(tokens * y_stride) };
        segs.push(NativeSeg {
            w: In::at(dw.at() + case.row0 as u64 * w.layout.row_bytes),
            scales: In::at(dw.at() + w.layout.scales_offset),
            x: In::at(x.codes.at()),
            x_scales: In::at(x.scales.at()),
            y: y.at(),
            rows: case.rows as u32,
            cols: case.cols as u32,
            x_stride: x_stride as u32,
            scale_stride: x_stride as u32 / 128,
            y_stride: y_stride as u32,
            flags: if case.f32 { FLAG_F32 } else { 0 },
            row0: case.row0 as u32,
            first_block: 0,
        });
        keep.push([y, dw, x.codes, x.scales]);
    }
    native.launch(bench.gpu(), tokens as u32, &segs).unwrap();
    for ((case, mut expected), [y, ..]) in cases.iter().zip(expected).zip(&keep) {
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

const SMALL: NativePoint = NativePoint { tokens: 64, outs: 256, stages: 2, group: 2 };

#[test]
fn kernel_is_the_reference() {
    check(NativePoint::DEFAULT, 150, &[case(320, 256, 0, false), case(64, 128, 64, true), case(128, 384, 192, false)]);
    check(SMALL, 150, &[case(192, 128, 64, true), case(256, 256, 0, false)]);
    // More tiles of rows than pass over the weights together, and more segments than a launch has.
    let many: Vec<Case> = (0..9).map(|i| case(64 + 64 * (i % 3), 128, 0, i % 2 == 0)).collect();
    check(SMALL, 200, &many);
}

/// One segment over all of `w`, as float32.
fn whole(w: &Stored, at: &Buffer, x: u64, x_scales: u64, y: &Buffer, rows: u32) -> NativeSeg {
    let cols = w.cols as u32;
    NativeSeg {
        w: In::at(at.at()),
        scales: In::at(at.at() + w.layout.scales_offset),
        x: In::at(x),
        x_scales: In::at(x_scales),
        y: y.at(),
        rows,
        cols,
        x_stride: cols,
        scale_stride: cols / 128,
        y_stride: rows,
        flags: FLAG_F32,
        row0: 0,
        first_block: 0,
    }
}

#[test]
fn a_row_is_the_same_in_any_batch() {
    let Some(mut bench) = bench() else { return };
    let native = native(&bench, NativePoint::DEFAULT);
    let (rows, cols) = (128, 256);
    let w = Stored::random(&mut bench, Format::Fp8, 1, rows, cols);
    let (dw, x) = (bench.upload(&w.bytes), Codes::random(&mut bench, 140 * cols));
    let run = |first: usize, tokens: usize| -> Vec<f32> {
        let y = bench.buffer::<f32>(tokens * rows);
        let (codes, scales) = ((first * cols) as u64, (first * cols / 128) as u64);
        let seg = whole(&w, &dw, x.codes.at() + codes, x.scales.at() + scales, &y, rows as u32);
        native.launch(bench.gpu(), tokens as u32, &[seg]).unwrap();
        y.values().unwrap()
    };
    let all = run(0, 140);
    for (first, tokens) in [(3, 1), (100, 40)] {
        assert_eq!(run(first, tokens), all[first * rows..(first + tokens) * rows]);
    }
}

#[test]
fn every_code_and_extreme_scales_keep_their_bits() {
    let Some(mut bench) = bench() else { return };
    let native = native(&bench, NativePoint::DEFAULT);
    let (rows, cols) = (64, 128);
    let mut w = Stored::random(&mut bench, Format::Fp8, 1, rows, cols);
    // Every code but NaN is somewhere.
    for (i, code) in w.bytes[..rows * cols].iter_mut().enumerate() {
        *code = if i & 0x7f == 0x7f { 0x80 } else { i as u8 };
    }
    // One value of x is not zero: no sum, so every bit counts.
    let mut x = vec![0u8; cols * cols];
    (0..cols).for_each(|i| x[i * cols + i] = 0xb8);
    let dx = bench.upload(&x);
    for (scale, of_x) in [(40, 100u8), (127, 127), (160, 180), (200, 60)] {
        w.bytes[w.layout.scales_offset as usize] = scale;
        let (dw, scales) = (bench.upload(&w.bytes), bench.upload(&vec![of_x; cols]));
        let y = bench.buffer::<f32>(cols * rows);
        native.launch(bench.gpu(), cols as u32, &[whole(&w, &dw, dx.at(), scales.at(), &y, rows as u32)]).unwrap();
        let found: Vec<f32> = y.values().unwrap();
        for r in 0..rows {
            let row = w.widen(0, r);
            (0..cols).for_each(|k| {
                assert_eq!(found[k * rows + r], -row[k] * ue8m0_value(of_x), "row {r}, column {k}, scale {scale}");
            });
        }
    }
}

#[test]
fn quantised_rows_are_the_reference() {
    let Some(mut bench) = bench() else { return };
    let native = native(&bench, NativePoint::DEFAULT);
    for (rows, cols) in [(17, 128), (3, 256), (5, 1024)] {
        let stride = cols + 8;
        let mut x = bench.act(rows * stride);
        x[..128].fill(0.0);
        // A group of one size only, and one far below the smallest scale.
        x[stride..stride + 128].fill(448.0);
        x[2 * stride..2 * stride + 128].iter_mut().for_each(|v| *v *= 2f32.powi(-20));
        let dx = bench.upload_act(&x);
        let (codes, scales) = (bench.buffer::<u8>(rows * cols), bench.buffer::<u8>(rows * cols / 128));
        let args = NativeQuantArgs {
            x: In::at(dx.at()),
            codes: Out::at(codes.at()),
            scales: Out::at(scales.at()),
            rows: rows as u32,
            cols: cols as u32,
            x_stride: stride as u32,
        };
        native.quantise(bench.gpu(), args).unwrap();
        let scales: Vec<u8> = scales.values().unwrap();
        let codes: Vec<u8> = codes.values().unwrap();
        let found: Vec<f32> =
            codes.iter().enumerate().map(|(i, c)| e4m3_value(*c) * ue8m0_value(scales[i / 128])).collect();
        let mut expected: Vec<f32> = x.chunks_exact(stride).flat_map(|r| r[..cols].to_vec()).collect();
        fake_fp8(&mut expected, 128);
        assert_eq!(found, expected);
    }
}

/// Another meaning of the instruction, in front of a unit's source.
pub fn altered(unit: Unit, text: &str) -> Unit {
    let ptx = include_str!("../../cuh/ptx_sm121.cuh");
    let rest = unit.source.strip_prefix(ptx).expect("the instructions come first");
    Unit { source: String::leak(format!("{ptx}\n{text}\n#define mma_scaled altered_mma\n{rest}")), ..unit }
}

/// Sums that keep 14 bits.
pub const NARROW: &str = "
template <int A, int BA, int PA, int BB, int LB>
DEVICE void altered_mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], u32 sa, u32 sb) {
    mma_scaled<A, BA, PA, BB, LB>(d, a, b, sa, sb);
    for (float& v : d) v = float_of(bits_of(v) & 0xfffffc00u);
}";
/// Every addition to a sum rounds towards zero, as tensor cores often do.
pub const TOWARDS_ZERO: &str = "
template <int A, int BA, int PA, int BB, int LB>
DEVICE void altered_mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], u32 sa, u32 sb) {
    float p[4] = {0, 0, 0, 0};
    mma_scaled<A, BA, PA, BB, LB>(p, a, b, sa, sb);
    for (int i = 0; i < 4; i++) {
        double exact = (double)d[i] + p[i];
        d[i] = (float)exact;
        if (fabs((double)d[i]) > fabs(exact)) d[i] = float_of(bits_of(d[i]) - 1);
    }
}";
/// A lane's scale is taken for another column's.
pub const OTHER_LANE: &str = "
template <int A, int BA, int PA, int BB, int LB>
DEVICE void altered_mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], u32 sa, u32 sb) {
    mma_scaled<A, BA, PA, BB, LB ^ 1>(d, a, b, sa, sb);
}";
/// The last of four bytes is read as the first.
pub const OTHER_BYTE: &str = "
template <int A, int BA, int PA, int BB, int LB>
DEVICE void altered_mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], u32 sa, u32 sb) {
    mma_scaled<A, BA == 3 ? 0 : BA, PA, BB, LB>(d, a, b, sa, sb);
}";

#[test]
fn a_gpu_is_used_only_if_its_sums_are_wide_enough() {
    let Some(bench) = bench() else { return };
    let point = GemmPoint::default_for(Format::Fp8);
    let portable = gemm::unit(Format::Fp8, point);
    let (gemm_fp8, fake_quant) = (bench.kernel(&portable, "gemm_fp8"), bench.kernel(&portable, "fake_quant"));
    let run = |native| self_check(&bench.shared(), &native, (gemm_fp8, point), fake_quant).unwrap();
    let verdict = run(native(&bench, NativePoint::DEFAULT));
    println!("{verdict}");
    assert!(verdict.accepted(), "{verdict}");
    if bench.gpu().facts().arch() == ARCH {
        return;
    }
    assert!(verdict.native < 1e-6 && verdict.portable < 1e-6, "{verdict}");
    for (text, accepted) in [(TOWARDS_ZERO, true), (NARROW, false), (OTHER_LANE, false)] {
        let unit = altered(unit(NativePoint::DEFAULT), text);
        let kernels = ["native_fp8", "native_quant"].map(|name| bench.kernel(&unit, name));
        let verdict = run(Native::new(NativePoint::DEFAULT, kernels));
        println!("{verdict}");
        assert_eq!(verdict.accepted(), accepted, "{verdict}");
        assert_eq!(verdict.to_string().contains("FAILED"), !accepted, "{verdict}");
    }
    let unknown = Verdict { native: f64::INFINITY, ..verdict };
    assert!(!unknown.accepted());
}

#[test]
fn points_say_what_can_be_compiled() {
    let point = NativePoint::DEFAULT;
    assert!(point.legal(Format::Fp8) && SMALL.legal(Format::Fp8) && SMALL.legal(Format::Fp4));
    assert!(2 * (point.shared(Format::Fp8) + 1024) <= 102_400, "two blocks fit a multiprocessor");
    assert!(!NativePoint { stages: 7, ..point }.legal(Format::Fp8), "more shared memory than there is");
    assert!(!NativePoint { tokens: 16, ..point }.legal(Format::Fp8), "half a warp's tokens");
    assert!(!NativePoint { outs: 64, ..point }.legal(Format::Fp8), "copies are not whole");
    assert!(!NativePoint { outs: 0, ..point }.legal(Format::Fp8));
}

#[test]
fn only_one_architecture_has_them_and_never_alone() {
    let config = ModelConfig::parse(include_str!("../../../../tests/golden/flash_config.json")).unwrap();
    let families = |arch: &str, numerics| -> Vec<&str> {
        let units = Kernels::units(&config, Tp::new(0, 2).unwrap(), numerics, &Tuning::for_arch(arch));
        units.iter().map(|u| u.family).collect()
    };
    let (here, elsewhere) = (families(ARCH, Numerics::Published), families("sm_90a", Numerics::Published));
    let portable: Vec<&str> = here.iter().copied().filter(|f| !f.starts_with("native")).collect();
    assert_eq!(portable, elsewhere);
    assert_eq!(here.len(), elsewhere.len() + 2);
    assert!(!families(ARCH, Numerics::Float).iter().any(|f| f.starts_with("native")));
}
