//! The choice of a token from logits: greedy, or the Gumbel-max of a tempered distribution.
//!
//! Noise is a function of (seed, position, token) alone, so a choice does not depend on batches,
//! drafts or restarts. Logarithms come from a portable library, so it does not depend on the machine.
//! [`Shaping`] changes logits before the choice, by what the sequence has so far.

use std::collections::HashMap;

/// How tokens are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// Smallest set of likeliest tokens with this much probability; 1 keeps all.
    pub top_p: f32,
    /// As many of the likeliest tokens; 0 keeps all.
    pub top_k: u32,
    /// Tokens at least as likely as this part of the likeliest; 0 keeps all.
    pub min_p: f32,
    /// Of the noise.
    pub seed: u64,
}

impl Sampling {
    /// The likeliest token, always.
    pub const GREEDY: Sampling = Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, min_p: 0.0, seed: 0 };

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
        let reach = if self.min_p > 0.0 { libm::log(f64::from(self.min_p)).max(-42.0) } else { -42.0 };
        let noisy = |kept: (u32, f64), (token, l): (u32, f64)| {
            let noise = gumbel(self.seed, position, token, kept.1 - l);
            noise.map(|noise| (token, l + noise)).filter(|own| own.1 > kept.1).unwrap_or(kept)
        };
        let first = (best, f64::NEG_INFINITY);
        let all = || logits.iter().enumerate().map(|(t, l)| (t as u32, tempered(l))).filter(|(_, l)| *l >= reach);
        if self.top_k == 0 && self.top_p >= 1.0 {
            return all().fold(first, noisy).0;
        }
        // Of what the other limits leave.
        let total = |list: &[(u32, f64)]| match self.top_k > 0 || self.min_p > 0.0 {
            true => list.iter().map(|(_, l)| libm::exp(*l)).sum(),
            false => logits.iter().map(|l| libm::exp(tempered(l))).sum(),
        };
        let by = |a: &(u32, f64), b: &(u32, f64)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        let mut candidates: Vec<(u32, f64)> = all().collect();
        let most = self.top_k as usize;
        if most > 0 && most < candidates.len() {
            candidates.select_nth_unstable_by(most - 1, by);
            candidates.truncate(most);
        }
        if self.top_p < 1.0 {
            let total = if self.top_k > 0 {
                candidates.sort_unstable_by(by);
                total(&candidates)
            } else {
                total(&candidates)
            };
            candidates = self.nucleus(candidates, total, by);
        }
        candidates.into_iter().fold(first, noisy).0
    }

    /// The likeliest candidates that together reach `top_p` of `total`; on equal values lower ids first.
    fn nucleus(
        &self,
        candidates: Vec<(u32, f64)>,
        total: f64,
        by: impl Fn(&(u32, f64), &(u32, f64)) -> std::cmp::Ordering + Copy,
    ) -> Vec<(u32, f64)> {
        // Nearly always a few hundred tokens are enough: the others need no order.
        for depth in [6.0, 14.0, f64::INFINITY] {
            let mut likely: Vec<(u32, f64)> = candidates.iter().filter(|(_, l)| *l >= -depth).copied().collect();
            likely.sort_unstable_by(by);
            let (mut sum, mut kept) = (0.0, 0);
            for (_, l) in &likely {
                kept += 1;
                sum += libm::exp(*l);
                if sum >= f64::from(self.top_p) * total {
                    likely.truncate(kept);
                    return likely;
                }
            }
        }
        candidates
    }
}

/// Changes to logits before the choice.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Shaping {
    /// Off the logit of every token that the answer has.
    pub presence: f32,
    /// Off it, as often as the answer has the token.
    pub frequency: f32,
    /// Positive logits of tokens of prompt and answer are divided by it, negative ones multiplied; 0 is off, as is 1.
    pub repetition: f32,
    /// Onto the logits of tokens.
    pub bias: Vec<(u32, f32)>,
}

impl Shaping {
    /// Whether it leaves logits as they are.
    pub fn is_none(&self) -> bool {
        let Shaping { presence, frequency, repetition, bias } = self;
        *presence == 0.0 && *frequency == 0.0 && (*repetition == 0.0 || *repetition == 1.0) && bias.is_empty()
    }

    /// What it needs to know of a prompt; the answer's tokens are added as they come.
    pub fn seen(&self, prompt: &[u32]) -> Seen {
        let counts =
            if self.repetition > 0.0 { prompt.iter().map(|&token| (token, 0)).collect() } else { HashMap::new() };
        Seen { counts: if self.is_none() { None } else { Some(counts) } }
    }

    /// Applies it behind `seen` and `drafts`. Tokens past the vocabulary count for nothing.
    pub fn apply(&self, logits: &mut [f32], seen: &Seen, drafts: &[u32]) {
        let counts = seen.counts.iter().flatten();
        let drafted = |token: u32| drafts.iter().filter(|&&d| d == token).count() as u32;
        for (&token, &count) in counts {
            self.penalise(logits, token, count + drafted(token));
        }
        // Drafts that neither prompt nor answer has, once each.
        for (i, &token) in drafts.iter().enumerate() {
            let is_known = seen.counts.as_ref().is_some_and(|counts| counts.contains_key(&token));
            if !is_known && !drafts[..i].contains(&token) {
                self.penalise(logits, token, drafted(token));
            }
        }
        for &(token, bias) in &self.bias {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit += bias;
            }
        }
    }

    /// For a token that prompt or answer has, the answer `count` times.
    fn penalise(&self, logits: &mut [f32], token: u32, count: u32) {
        let Some(logit) = logits.get_mut(token as usize) else { return };
        if self.repetition > 0.0 {
            *logit = if *logit > 0.0 { *logit / self.repetition } else { *logit * self.repetition };
        }
        if count > 0 {
            *logit -= self.presence + self.frequency * count as f32;
        }
    }
}

/// How often an answer has a token; tokens that only the prompt has are there with 0. Nothing where nobody asks.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    counts: Option<HashMap<u32, u32>>,
}

impl Seen {
    /// The answer has one more token.
    pub fn add(&mut self, token: u32) {
        if let Some(counts) = &mut self.counts {
            *counts.entry(token).or_default() += 1;
        }
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

/// Standard Gumbel noise, a pure function of seed, position and token; none where it is plain that it is below `least`.
fn gumbel(seed: u64, position: u32, token: u32, least: f64) -> Option<f64> {
    let key = mix(seed ^ mix((u64::from(position) << 32) | u64::from(token))) >> 12;
    // Logarithms take longer than all the rest, and most noise is small: -ln(-ln u) <= -ln(1 - u), and that is at
    // most ln 2 for every leading zero of 1 - u, and one more.
    let zeros = ((1u64 << 52) - 1 - key).checked_ilog2().map_or(53, |log| 52 - log);
    if f64::from(zeros) * std::f64::consts::LN_2 + 1e-9 < least {
        return None;
    }
    // 52 random bits, centred so that neither logarithm meets 0 or 1.
    let uniform = (key as f64 + 0.5) / (1u64 << 52) as f64;
    Some(-libm::log(-libm::log(uniform)))
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
        let sampling = Sampling { temperature: 1.0, seed: 7, ..Sampling::GREEDY };
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
        let narrow = Sampling { temperature: 1.0, top_p: 0.6, seed: 3, ..Sampling::GREEDY };
        let seen: std::collections::HashSet<u32> = (0..500).map(|p| narrow.choose(&logits, p)).collect();
        assert_eq!(seen, std::collections::HashSet::from([1, 2]));
        let cold = Sampling { temperature: 0.01, seed: 3, ..Sampling::GREEDY };
        assert!((0..100).all(|p| cold.choose(&logits, p) == 1));
        assert_eq!(Sampling::GREEDY.choose(&[2.0, 5.0, 5.0], 0), 1);
    }

    #[test]
    fn few_and_unlikely_tokens_are_left_out() {
        let logits = [0.0f32, 3.0, 2.9, 1.0, -5.0];
        let seen = |sampling: Sampling| -> std::collections::BTreeSet<u32> {
            (0..2000).map(|p| sampling.choose(&logits, p)).collect()
        };
        let warm = Sampling { temperature: 2.0, seed: 3, ..Sampling::GREEDY };
        assert_eq!(seen(warm), [0, 1, 2, 3, 4].into());
        assert_eq!(seen(Sampling { top_k: 3, ..warm }), [1, 2, 3].into());
        // exp((1 - 3) / 2) is 0.37.
        assert_eq!(seen(Sampling { min_p: 0.36, ..warm }), [1, 2, 3].into());
        assert_eq!(seen(Sampling { min_p: 0.38, ..warm }), [1, 2].into());
        assert_eq!(seen(Sampling { top_k: 1, ..warm }), [1].into());
        // The part of the three that top_k leaves.
        assert_eq!(seen(Sampling { top_k: 3, top_p: 0.8, ..warm }), [1, 2].into());
    }

    #[test]
    fn penalties_and_bias_move_logits() {
        let shaped = |shaping: Shaping| {
            let mut logits = [1.0f32, -1.0, 2.0];
            assert!(!shaping.is_none());
            let mut seen = shaping.seen(&[0, 1]);
            [2, 2, 9].into_iter().for_each(|token| seen.add(token));
            let mut drafted = logits;
            shaping.apply(&mut logits, &seen, &[]);
            // A draft counts as what was decided.
            let mut before = shaping.seen(&[0, 1]);
            before.add(2);
            shaping.apply(&mut drafted, &before, &[9, 2]);
            assert_eq!(drafted, logits);
            logits
        };
        let none = Shaping::default();
        assert!(none.is_none());
        assert_eq!(shaped(Shaping { presence: 0.5, ..none.clone() }), [1.0, -1.0, 1.5]);
        assert_eq!(shaped(Shaping { frequency: 0.5, ..none.clone() }), [1.0, -1.0, 1.0]);
        assert_eq!(shaped(Shaping { repetition: 2.0, ..none.clone() }), [0.5, -2.0, 1.0]);
        assert_eq!(shaped(Shaping { bias: vec![(1, 4.0), (7, 1.0)], ..none }), [1.0, 3.0, 2.0]);
    }

    #[test]
    fn noise_stays_within_the_bounds_that_candidates_are_cut_by() {
        let all = |token| gumbel(1, 2, token, f64::NEG_INFINITY).unwrap();
        let noise: Vec<f64> = (0..100_000).map(all).collect();
        assert!(noise.iter().all(|g| (-4.0..38.0).contains(g)));
        // What is left out because it is small is small.
        for (token, &noise) in noise.iter().enumerate() {
            for above in [-1.0, 0.0, 2.5, 7.0] {
                match gumbel(1, 2, token as u32, above) {
                    Some(found) => assert_eq!(found, noise),
                    None => assert!(noise < above),
                }
            }
        }
        let mean = noise.iter().sum::<f64>() / noise.len() as f64;
        assert!((mean - 0.5772).abs() < 0.02, "{mean}");
    }

    #[test]
    fn the_same_seed_and_position_choose_the_same_token() {
        let logits: Vec<f32> = (0..100).map(|i| (i % 7) as f32 * 0.1).collect();
        let a = Sampling { temperature: 1.0, top_p: 0.9, seed: 1, ..Sampling::GREEDY };
        let b = Sampling { seed: 2, ..a };
        let run = |s: &Sampling| (0..50).map(|p| s.choose(&logits, p)).collect::<Vec<u32>>();
        assert_eq!(run(&a), run(&a));
        assert_ne!(run(&a), run(&b));
    }
}
