//! Manifold-constrained hyper-connections: M residual streams mixed around every sublayer (SPEC 3.1).

use crate::ops::rms_norm::inverse_rms;
use crate::simd;

/// Constants of the mixing.
#[derive(Clone, Copy, Debug)]
pub struct HcParams {
    /// Residual streams.
    pub streams: usize,
    /// Rounds of row and column normalisation, the first included.
    pub sinkhorn_iters: usize,
    /// Added to weights and sums.
    pub hc_eps: f32,
    /// Of the statistic over all streams.
    pub rms_eps: f32,
}

/// Mixing weights of one row.
#[derive(Clone, Debug, PartialEq)]
pub struct RowMix {
    /// Weight of every stream in the sublayer's input.
    pub pre: Vec<f32>,
    /// Weight of the sublayer's output in every stream.
    pub post: Vec<f32>,
    /// `comb[j * M + k]`: how much of stream j goes on in stream k.
    pub comb: Vec<f32>,
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + libm::expf(-x))
}

/// The statistic and the `outputs` dot products with the rows of `weights` (`[outputs, M*D]`).
fn project<'a>(h: &[f32], outputs: usize, row: impl Fn(usize) -> &'a [f32], eps: f32) -> Vec<f32> {
    let r = inverse_rms(h, eps);
    (0..outputs).map(|i| simd::dot(h, row(i)) * r).collect()
}

/// Mixing weights of one row from its streams `h` (`[M*D]`, stream after stream).
///
/// `row(i)` is row i of the mixing matrix `[(2+M)*M, M*D]`; `base` and `scale` as stored.
pub fn mix<'a>(h: &[f32], row: impl Fn(usize) -> &'a [f32], base: &[f32], scale: &[f32], p: HcParams) -> RowMix {
    let m = p.streams;
    let mixed = project(h, (2 + m) * m, row, p.rms_eps);
    let pre = (0..m).map(|j| sigmoid(mixed[j] * scale[0] + base[j]) + p.hc_eps).collect();
    let post = (m..2 * m).map(|j| 2.0 * sigmoid(mixed[j] * scale[1] + base[j])).collect();
    let mut comb: Vec<f32> = (2 * m..(2 + m) * m).map(|j| mixed[j] * scale[2] + base[j]).collect();
    sinkhorn(&mut comb, p);
    RowMix { pre, post, comb }
}

/// Row softmax, then alternating column and row normalisation of an M x M matrix.
fn sinkhorn(a: &mut [f32], p: HcParams) {
    let m = p.streams;
    for row in a.chunks_exact_mut(m) {
        let max = row.iter().fold(f32::NEG_INFINITY, |x, y| x.max(*y));
        row.iter_mut().for_each(|v| *v = libm::expf(*v - max));
        let sum: f32 = row.iter().sum();
        row.iter_mut().for_each(|v| *v = *v / sum + p.hc_eps);
    }
    let columns = |a: &mut [f32]| {
        for k in 0..m {
            let sum: f32 = (0..m).map(|j| a[j * m + k]).sum();
            (0..m).for_each(|j| a[j * m + k] /= sum + p.hc_eps);
        }
    };
    columns(a);
    for _ in 1..p.sinkhorn_iters {
        for row in a.chunks_exact_mut(m) {
            let sum: f32 = row.iter().sum();
            row.iter_mut().for_each(|v| *v /= sum + p.hc_eps);
        }
        columns(a);
    }
}

/// Weights of the head's collapse: `[M]`. `weights` is `[M, M*D]`.
pub fn head_mix(h: &[f32], weights: &[f32], base: &[f32], scale: f32, p: HcParams) -> Vec<f32> {
    let mixed = project(h, p.streams, |i| &weights[i * h.len()..(i + 1) * h.len()], p.rms_eps);
    mixed.iter().zip(base).map(|(m, b)| sigmoid(m * scale + b) + p.hc_eps).collect()
}

/// Sum of the streams under weights `pre`, into `out` (`[D]`).
pub fn collapse(h: &[f32], pre: &[f32], out: &mut [f32]) {
    out.fill(0.0);
    for (stream, weight) in h.chunks_exact(out.len()).zip(pre) {
        simd::axpy(*weight, stream, out);
    }
}

/// New streams: `h'[k] = post[k] * y + sum_j comb[j][k] * h[j]`, in place.
pub fn add_back(h: &mut [f32], y: &[f32], mix: &RowMix) {
    let m = mix.post.len();
    let dim = y.len();
    let old = h.to_vec();
    for (k, new) in h.chunks_exact_mut(dim).enumerate() {
        for (new, y) in new.iter_mut().zip(y) {
            *new = mix.post[k] * y;
        }
        for (j, stream) in old.chunks_exact(dim).enumerate() {
            simd::axpy(mix.comb[j * m + k], stream, new);
        }
    }
}
