//! The choice of a token from logits: greedy, or the Gumbel-max of a tempered distribution.
//!
//! Noise is a function of (seed, position, token) alone, so a choice does not depend on batches,
//! drafts or restarts. Logarithms come from a portable library, so it does not depend on the machine.

/// How tokens are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// Smallest set of likeliest tokens with this much probability; 1 keeps all.
    pub top_p: f32,
    /// Of the noise.
    pub seed: u64,
}

impl Sampling {
    /// The likeliest token, always.
    pub const GREEDY: Sampling = Sampling { temperature: 0.0, top_p: 1.0, seed: 0 };

    /// The token for `position` of the sequence.
    pub fn choose(&self, logits: &[f32], position: u32) -> u32 {
        let best = argmax(logits);
        if self.temperature <= 0.0 {
            return best;
        }
        let max = f64::from(logits[best as usize]);
        let temperature = f64::from(self.temperature);
        let tempered = |l: &f32| (f64::from(*l) - max) / temperature;
        // Beyond this distance no noise can make up for the gap: all noise lies in (-4, 38).
        let within = logits.iter().enumerate().map(|(t, l)| (t as u32, tempered(l))).filter(|(_, l)| *l > -42.0);
        let mut candidates: Vec<(u32, f64)> = within.collect();
        if self.top_p < 1.0 {
            candidates = self.nucleus(candidates, logits.iter().map(|l| libm::exp(tempered(l))).sum());
        }
        let noisy = |(token, l): &(u32, f64)| l + gumbel(self.seed, position, *token);
        let first = (best, f64::NEG_INFINITY);
        candidates.iter().fold(first, |kept, c| if noisy(c) > kept.1 { (c.0, noisy(c)) } else { kept }).0
    }

    /// The likeliest candidates that together reach `top_p` of `total`; on equal values lower ids first.
    fn nucleus(&self, mut candidates: Vec<(u32, f64)>, total: f64) -> Vec<(u32, f64)> {
        candidates.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let mut sum = 0.0;
        let mut kept = 0;
        for (_, l) in &candidates {
            kept += 1;
            sum += libm::exp(*l);
            if sum >= f64::from(self.top_p) * total {
                break;
            }
        }
        candidates.truncate(kept);
        candidates
    }
}

/// Index of the largest value; the lowest on ties.
pub fn argmax(values: &[f32]) -> u32 {
    let mut best = 0;
    for (i, v) in values.iter().enumerate() {
        if *v > values[best] {
            best = i;
        }
    }
    best as u32
}

/// Standard Gumbel noise, a pure function of its arguments.
fn gumbel(seed: u64, position: u32, token: u32) -> f64 {
    let key = mix(seed ^ mix((u64::from(position) << 32) | u64::from(token)));
    // 52 random bits, centred so that neither logarithm meets 0 or 1.
    let uniform = ((key >> 12) as f64 + 0.5) / (1u64 << 52) as f64;
    -libm::log(-libm::log(uniform))
}

/// The finaliser of SplitMix64: every output bit depends on every input bit.
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frequencies_follow_the_distribution() {
        let logits = [1.0f32, 2.0, 0.0, -1.0];
        let total: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
        let sampling = Sampling { temperature: 1.0, top_p: 1.0, seed: 7 };
        let mut counts = [0u32; 4];
        let n = 40_000;
        for position in 0..n {
            counts[sampling.choose(&logits, position) as usize] += 1;
        }
        for (c, l) in counts.iter().zip(logits) {
            let expected = f64::from(l).exp() / total;
            assert!((f64::from(*c) / f64::from(n) - expected).abs() < 0.01, "{counts:?}");
        }
    }

    #[test]
    fn nucleus_and_temperature_narrow_the_choice() {
        let logits = [0.0f32, 3.0, 2.9, -5.0];
        let narrow = Sampling { temperature: 1.0, top_p: 0.6, seed: 3 };
        let seen: std::collections::HashSet<u32> = (0..500).map(|p| narrow.choose(&logits, p)).collect();
        assert_eq!(seen, std::collections::HashSet::from([1, 2]));
        let cold = Sampling { temperature: 0.01, top_p: 1.0, seed: 3 };
        assert!((0..100).all(|p| cold.choose(&logits, p) == 1));
        assert_eq!(Sampling::GREEDY.choose(&[2.0, 5.0, 5.0], 0), 1);
    }

    #[test]
    fn noise_stays_within_the_bounds_that_candidates_are_cut_by() {
        let noise: Vec<f64> = (0..100_000).map(|token| gumbel(1, 2, token)).collect();
        assert!(noise.iter().all(|g| (-4.0..38.0).contains(g)));
        let mean = noise.iter().sum::<f64>() / noise.len() as f64;
        assert!((mean - 0.5772).abs() < 0.02, "{mean}");
    }

    #[test]
    fn the_same_seed_and_position_choose_the_same_token() {
        let logits: Vec<f32> = (0..100).map(|i| (i % 7) as f32 * 0.1).collect();
        let a = Sampling { temperature: 1.0, top_p: 0.9, seed: 1 };
        let b = Sampling { seed: 2, ..a };
        let run = |s: &Sampling| (0..50).map(|p| s.choose(&logits, p)).collect::<Vec<u32>>();
        assert_eq!(run(&a), run(&a));
        assert_ne!(run(&a), run(&b));
    }
}
