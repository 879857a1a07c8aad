//! Attention of one query head over chosen rows that are keys and values at once, with a sink (SPEC 3.4).

use crate::numerics::bf16_round;
use crate::simd;

/// Softmax-weighted sum of `rows` into `out` (`[d]`); the sink takes part in the denominator only.
///
/// `round` rounds the numerators to bfloat16 as the published kernels do.
pub fn attend(q: &[f32], rows: &[&[f32]], sink: f32, round: bool, out: &mut [f32]) {
    let scale = 1.0 / (q.len() as f64).sqrt() as f32;
    let mut scores: Vec<f32> = rows.iter().map(|k| simd::dot(q, k) * scale).collect();
    let max = scores.iter().fold(f32::NEG_INFINITY, |m, s| m.max(*s));
    let mut sum = 0.0;
    for s in &mut scores {
        *s = libm::expf(*s - max);
        sum += *s;
    }
    sum += libm::expf(sink - max);
    out.fill(0.0);
    for (p, row) in scores.iter().zip(rows) {
        simd::axpy(if round { bf16_round(*p) } else { *p }, row, out);
    }
    for o in out {
        *o /= sum;
    }
}
