//! Choice of compressed entries for a query (SPEC 3.6).

use crate::simd;
use crate::state::Compressed;

/// Scores of the first `visible` index entries: sum over heads of `weight * relu(q . k)`.
///
/// `q` is `[heads, width]`, `weights` `[heads]` (already scaled).
pub fn scores(q: &[f32], weights: &[f32], index: &Compressed, visible: usize) -> Vec<f32> {
    (0..visible)
        .map(|w| {
            let key = index.entry(w);
            let heads = q.chunks_exact(index.width).zip(weights);
            heads.map(|(q, weight)| simd::dot(q, key).max(0.0) * weight).sum()
        })
        .collect()
}

/// Indices of the `k` largest scores, ascending; on equal scores the lower index wins.
pub fn top_k(scores: &[f32], k: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..scores.len() as u32).collect();
    if scores.len() > k {
        let better = |a: &u32, b: &u32| scores[*b as usize].total_cmp(&scores[*a as usize]).then(a.cmp(b));
        order.select_nth_unstable_by(k, better);
        order.truncate(k);
        order.sort_unstable();
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_go_to_the_lower_index() {
        assert_eq!(top_k(&[1.0, 3.0, 3.0, -2.0, 3.0], 2), [1, 2]);
        assert_eq!(top_k(&[-1.0, -3.0], 5), [0, 1]);
        assert_eq!(top_k(&[-1.0, -3.0, -2.0], 2), [0, 2]);
    }
}
