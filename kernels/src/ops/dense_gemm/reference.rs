//! y = x . W^T for weights of any stored format.

use crate::ops::{Mat, for_chunks};
use crate::simd::{self, Row};
use crate::weights::Matrix;

/// Outputs a task computes.
const OUTPUTS_PER_TASK: usize = 32;
/// Weight rows that are widened together.
const OUTPUTS_AT_ONCE: usize = 4;

/// `x [rows, cols]` times `w [outputs, cols]` transposed: `[rows, outputs]`, float32, unrounded.
///
/// Each weight row is widened once and used for every row of `x`.
pub fn matmul(x: &Mat, w: Matrix<'_>) -> Mat {
    assert_eq!(x.cols, w.cols, "matmul: inputs");
    let mut out = Mat::zeros(x.rows, w.rows);
    if x.rows == 0 || w.rows == 0 {
        return out;
    }
    let work = x.rows.max(4) * w.rows * w.cols;
    // Outputs first, so that tasks write apart from one another.
    let mut by_output = vec![0f32; x.rows * w.rows];
    for_chunks(&mut by_output, OUTPUTS_PER_TASK * x.rows, work, |task, chunk| {
        let mut widened = Vec::new();
        for (i, out) in chunk.chunks_mut(OUTPUTS_AT_ONCE * x.rows).enumerate() {
            let first = task * OUTPUTS_PER_TASK + i * OUTPUTS_AT_ONCE;
            let count = out.len() / x.rows;
            if x.rows == 1 && count == OUTPUTS_AT_ONCE {
                let rows: [Row<'_>; OUTPUTS_AT_ONCE] = std::array::from_fn(|j| w.row(first + j));
                if let Some(sums) = simd::stored_dots(rows, &x.data) {
                    out.copy_from_slice(&sums);
                    continue;
                }
            }
            widened.resize(OUTPUTS_AT_ONCE * w.cols, 0f32);
            for (j, row) in widened.chunks_exact_mut(w.cols).take(count).enumerate() {
                w.widen_row(first + j, row);
            }
            let rows: Vec<&[f32]> = widened.chunks_exact(w.cols).take(count).collect();
            match rows.as_slice().try_into() {
                Ok(rows) => four_rows(x, rows, out),
                Err(_) => rows.iter().zip(out.chunks_exact_mut(x.rows)).for_each(|(row, out)| {
                    out.iter_mut().enumerate().for_each(|(r, o)| *o = simd::dot(x.row(r), row));
                }),
            }
        }
    });
    if x.rows == 1 {
        out.data = by_output;
        return out;
    }
    for r in 0..x.rows {
        for (o, v) in out.row_mut(r).iter_mut().enumerate() {
            *v = by_output[o * x.rows + r];
        }
    }
    out
}

/// Products of every row of `x` with four weight rows: `out` is `[4, rows]`.
fn four_rows(x: &Mat, w: [&[f32]; OUTPUTS_AT_ONCE], out: &mut [f32]) {
    let mut r = 0;
    while r + 3 <= x.rows {
        let tile = simd::tile(w, [x.row(r), x.row(r + 1), x.row(r + 2)]);
        for (out, sums) in out.chunks_exact_mut(x.rows).zip(tile) {
            out[r..r + 3].copy_from_slice(&sums);
        }
        r += 3;
    }
    for r in r..x.rows {
        for (out, [sum]) in out.chunks_exact_mut(x.rows).zip(simd::tile(w, [x.row(r)])) {
            out[r] = sum;
        }
    }
}
