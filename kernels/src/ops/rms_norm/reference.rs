//! RMSNorm: y = w * x * (mean(x^2) + eps)^-1/2, in float32.

use crate::simd;

/// (mean(x^2) + eps)^-1/2. The length is a multiple of [`simd::LANES`].
pub fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (simd::dot(x, x) / x.len() as f32 + eps).sqrt()
}

/// Normalises `x` in place with weights `w`.
pub fn rms_norm(x: &mut [f32], w: &[f32], eps: f32) {
    let r = inverse_rms(x, eps);
    for (x, w) in x.iter_mut().zip(w) {
        *x = w * (*x * r);
    }
}
