//! The activation between an expert's two matmuls (SPEC 3.7).

/// `silu(min(gate, limit)) * clamp(up, -limit, limit) * weight` into `gate`, in float32; no clamp when the limit is 0.
pub fn swiglu(gate: &mut [f32], up: &[f32], limit: f32, weight: f32) {
    for (g, u) in gate.iter_mut().zip(up) {
        let (mut a, mut b) = (*g, *u);
        if limit > 0.0 {
            a = a.min(limit);
            b = b.clamp(-limit, limit);
        }
        *g = a / (1.0 + libm::expf(-a)) * b * weight;
    }
}
