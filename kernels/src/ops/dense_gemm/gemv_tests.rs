use dsv4_model::layout::{Format, MatrixLayout, TILE};

use super::gemv::*;
use crate::device::testing::{Bench, assert_close};
use crate::device::{Buffer, In};
use crate::numerics::{Numerics, fake_fp8};
use crate::simd::{Row, dot};

/// A random matrix as it is stored.
pub(crate) struct Stored {
    pub format: Format,
    pub cols: usize,
    pub layout: MatrixLayout,
    pub bytes: Vec<u8>,
}

impl Stored {
    pub fn new(bench: &mut Bench, format: Format, rows: usize, cols: usize) -> Stored {
        let layout = MatrixLayout::new(format, rows as u64, cols as u64);
        let mut bytes = match format {
            Format::F32 => bytemuck::cast_slice(&bench.noise(rows * cols)).to_vec(),
            Format::Bf16 => {
                bench.noise(rows * cols).iter().flat_map(|v| ((v.to_bits() >> 16) as u16).to_le_bytes()).collect()
            }
            _ => bench.bytes(layout.codes_bytes as usize),
        };
        if format == Format::Fp8 {
            // Not NaN.
            bytes.iter_mut().filter(|b| **b & 0x7f == 0x7f).for_each(|b| *b ^= 1);
        }
        bytes.resize(layout.stride as usize, 0xff);
        for b in &mut bytes[layout.scales_offset as usize..][..layout.scales_bytes as usize] {
            *b = 115 + bench.below(7) as u8;
        }
        Stored { format, cols, layout, bytes }
    }

    /// The sum over columns of row `r` with `x`.
    pub fn dot(&self, r: usize, x: &[f32]) -> f32 {
        let (l, mut row) = (&self.layout, vec![0f32; self.cols]);
        let part =
            |offset: u64, width: u64, r: usize| &self.bytes[(offset + r as u64 * width) as usize..][..width as usize];
        let codes = part(0, l.row_bytes, r);
        match self.format {
            Format::F32 => row.copy_from_slice(bytemuck::cast_slice(codes)),
            Format::Bf16 => Row::Bf16(codes).widen(&mut row),
            Format::Fp8 => {
                Row::Fp8(codes, part(l.scales_offset, l.scale_row_bytes, r / TILE as usize)).widen(&mut row);
            }
            _ => Row::Fp4(codes, part(l.scales_offset, l.scale_row_bytes, r)).widen(&mut row),
        }
        dot(&row, x)
    }
}

/// `x [rows, cols]` rounded to FP8 per 128 columns of a row (a rest has a scale of its own), in published numerics.
pub(crate) fn quantised(x: &[f32], cols: usize, numerics: Numerics) -> Vec<f32> {
    let mut out = x.to_vec();
    if numerics == Numerics::Published {
        for group in out.chunks_exact_mut(cols).flat_map(|row| row.chunks_mut(TILE as usize)) {
            let len = group.len();
            fake_fp8(group, len);
        }
    }
    out
}

/// A segment under test: rows `row0..row0 + rows` of a stored matrix.
struct Case {
    stored: Stored,
    matrix: Buffer,
    rows: usize,
    row0: usize,
    quantised: bool,
    unrounded: bool,
    x: Vec<f32>,
    dx: Buffer,
}

const GAP: usize = 8;

impl Case {
    fn new(
        bench: &mut Bench,
        n: usize,
        format: Format,
        rows: usize,
        cols: usize,
        row0: usize,
        flags: [bool; 2],
    ) -> Case {
        let stored = Stored::new(bench, format, row0 + rows, cols);
        let matrix = bench.upload(&stored.bytes);
        let x = bench.act(n * (cols + GAP));
        let dx = bench.upload_act(&x);
        Case { stored, matrix, rows, row0, quantised: flags[0], unrounded: flags[1], x, dx }
    }

    fn y(&self, bench: &Bench, n: usize) -> Buffer {
        if self.unrounded { bench.buffer::<f32>(n * self.rows) } else { bench.buffer_act(n * self.rows) }
    }

    /// Rows from `row` on, into `y`.
    fn segment(&self, row: usize, y: &Buffer, numerics: Numerics) -> Segment {
        let (l, stride) = (&self.stored.layout, self.stored.cols + GAP);
        let act = if numerics == Numerics::Published { 2 } else { 4 };
        Segment {
            w: In::at(self.matrix.at() + self.row0 as u64 * l.row_bytes),
            scales: In::at(self.matrix.at() + l.scales_offset),
            x: In::at(self.dx.at() + (row * stride * act) as u64),
            y: y.at(),
            rows: self.rows as u32,
            cols: self.stored.cols as u32,
            x_stride: stride as u32,
            y_stride: self.rows as u32,
            format: self.stored.format,
            quantised: self.quantised,
            unrounded: self.unrounded,
            row0: self.row0 as u32,
        }
    }

    fn values(&self, bench: &Bench, y: &Buffer) -> Vec<f32> {
        if self.unrounded { y.values().unwrap() } else { bench.download_act(y) }
    }

    fn expected(&self, bench: &Bench, numerics: Numerics) -> Vec<f32> {
        let cols = self.stored.cols;
        let tight: Vec<f32> = self.x.chunks_exact(cols + GAP).flat_map(|row| row[..cols].to_vec()).collect();
        let x = if self.quantised { quantised(&tight, cols, numerics) } else { tight };
        let mut out: Vec<f32> = x
            .chunks_exact(cols)
            .flat_map(|x| (0..self.rows).map(|r| self.stored.dot(self.row0 + r, x)).collect::<Vec<_>>())
            .collect();
        if !self.unrounded {
            bench.round(&mut out);
        }
        out
    }
}

fn compiled(bench: &Bench, rows: u32, point: GemvPoint, numerics: Numerics) -> Gemv {
    Gemv { kernel: bench.kernel(&unit(rows, point, numerics), "gemv"), rows, point, numerics }
}

/// Several matrices at once, ragged ones too; every row the same bits alone and together, whatever is compiled.
#[test]
fn kernel_is_the_reference_and_rows_are_independent() {
    for numerics in [Numerics::Float, Numerics::Published] {
        let Some(mut bench) = Bench::new(numerics) else { return };
        let points = [GemvPoint::DEFAULT, GemvPoint { warps: 4, depth: 3, blocks: 1, block_bytes: 16 << 10, ahead: 0 }];
        for (point, n) in points.into_iter().zip([16, 5]) {
            let mut case = |f, rows, cols, row0, flags| Case::new(&mut bench, n, f, rows, cols, row0, flags);
            let cases = [
                case(Format::Fp8, 24, 64, 0, [true, true]),
                case(Format::Bf16, 24, 192, 0, [false, true]),
                case(Format::Fp8, 128, 320, 0, [true, false]),
                case(Format::Fp8, 64, 192, 64, [false, false]),
                case(Format::F32, 8, 256, 0, [false, true]),
                case(Format::Bf16, 8, 64, 0, [false, true]),
                case(Format::Fp8, 300, 256, 0, [true, false]),
                case(Format::Fp8, 72, 1024, 128, [false, false]),
            ];
            let alone: Vec<Vec<f32>> = {
                let one = compiled(&bench, 1, point, numerics);
                cases
                    .iter()
                    .map(|case| {
                        let row = |r| {
                            let y = case.y(&bench, 1);
                            one.launch(bench.gpu(), 1, &[case.segment(r, &y, numerics)]).unwrap();
                            case.values(&bench, &y)
                        };
                        (0..n).flat_map(row).collect()
                    })
                    .collect()
            };
            for (i, (case, alone)) in cases.iter().zip(&alone).enumerate() {
                println!("{numerics:?} {point:?} case {i}");
                assert_close(alone, &case.expected(&bench, numerics), numerics);
            }
            for rows in if n == 16 { vec![1, 2, 4, 8] } else { vec![1, 4] } {
                let gemv = compiled(&bench, rows, point, numerics);
                let outs: Vec<Buffer> = cases.iter().map(|c| c.y(&bench, n)).collect();
                let segments: Vec<Segment> = cases.iter().zip(&outs).map(|(c, y)| c.segment(0, y, numerics)).collect();
                gemv.launch(bench.gpu(), n as u32, &segments).unwrap();
                for ((case, alone), y) in cases.iter().zip(&alone).zip(&outs) {
                    assert!(case.values(&bench, y).iter().zip(alone).all(|(a, b)| a.to_bits() == b.to_bits()));
                }
            }
        }
    }
}

/// Zero rows, and activations of which a whole group is zero, give zeros.
#[test]
fn zero_activations_give_zeros() {
    let numerics = Numerics::Published;
    let Some(mut bench) = Bench::new(numerics) else { return };
    let mut case = Case::new(&mut bench, 2, Format::Fp8, 32, 256, 0, [true, true]);
    case.x.fill(0.0);
    case.dx = bench.upload_act(&case.x);
    let y = case.y(&bench, 2);
    compiled(&bench, 2, GemvPoint::DEFAULT, numerics).launch(bench.gpu(), 2, &[case.segment(0, &y, numerics)]).unwrap();
    assert!(case.values(&bench, &y).iter().all(|v| *v == 0.0));
}

#[test]
fn points_and_rows_that_fit() {
    assert!(GemvPoint::DEFAULT.legal());
    assert!(GemvPoint::all().count() > 20);
    let fits = |rows, format, cols| Gemv::fits(rows, GemvPoint::DEFAULT, Numerics::Published, format, cols);
    assert!(fits(8, Format::Fp8, 4096) && fits(8, Format::Bf16, 4096) && fits(2, Format::Fp8, 8192));
    // wo_b of one rank alone: steps of 3 rows and more read it once for every two.
    assert!(!fits(4, Format::Fp8, 8192));
}
