//! Choice of experts and their weights (SPEC 3.7).

/// sqrt(softplus(x)); softplus is linear above 20.
pub fn affinity(x: f32) -> f32 {
    let softplus = if x > 20.0 { x } else { libm::log1pf(libm::expf(x)) };
    softplus.sqrt()
}

/// The `k` experts with the largest biased affinity, ascending; on equal values the lower index wins.
pub fn choose(affinities: &[f32], bias: &[f32], k: usize) -> Vec<u32> {
    let biased: Vec<f32> = affinities.iter().zip(bias).map(|(s, b)| s + b).collect();
    crate::ops::indexer::top_k(&biased, k)
}

/// Weights of the chosen experts: affinity over the sum of the chosen, times `scale`.
pub fn weights(affinities: &[f32], chosen: &[u32], scale: f32) -> Vec<f32> {
    let sum: f32 = chosen.iter().map(|e| affinities[*e as usize]).sum();
    chosen.iter().map(|e| affinities[*e as usize] / sum * scale).collect()
}
