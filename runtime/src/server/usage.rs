//! What an answer took, as JSON.

use std::time::Instant;

use serde_json::{Value, json};

use crate::scheduler::Usage;

/// What one answer takes, as it comes.
#[derive(Debug)]
pub(super) struct Spent {
    pub prompt: usize,
    /// Of the prompt's tokens, those from a cache.
    pub cached: usize,
    /// Tokens so far.
    pub tokens: usize,
    /// Of these, tokens of reasoning.
    pub reasoning: usize,
    submitted: Instant,
    started: Option<Instant>,
    first: Option<Instant>,
    last: Option<Instant>,
    /// The scheduler's own measurements; an answer that is cut off here has none.
    measured: Option<Usage>,
}

impl Spent {
    /// Of an answer that is submitted now.
    pub fn new(prompt: usize) -> Spent {
        let (submitted, none) = (Instant::now(), None);
        let (cached, tokens, reasoning) = (0, 0, 0);
        Spent { prompt, cached, tokens, reasoning, submitted, started: none, first: none, last: none, measured: None }
    }

    pub fn start(&mut self, cached: usize) {
        self.cached = cached;
        self.started = Some(Instant::now());
    }

    pub fn token(&mut self, reasoning: bool) {
        let now = Instant::now();
        self.tokens += 1;
        self.reasoning += usize::from(reasoning);
        self.first.get_or_insert(now);
        self.last = Some(now);
    }

    pub fn end(&mut self, measured: Usage) {
        self.measured = Some(measured);
    }

    /// Times, and what drafts did, if the scheduler has told.
    pub fn metrics(&self) -> Value {
        let ms = |from: Option<Instant>, to: Option<Instant>| match (from, to) {
            (Some(from), Some(to)) => to.saturating_duration_since(from).as_secs_f64() * 1e3,
            _ => 0.0,
        };
        let (queue, prefill, decode) = match &self.measured {
            Some(usage) => (usage.queue_ms, usage.prefill_ms, usage.decode_ms),
            None => (ms(Some(self.submitted), self.started), ms(self.started, self.first), ms(self.first, self.last)),
        };
        // The first token's time is prefill's.
        let rate = if decode > 0.0 { self.tokens.saturating_sub(1) as f64 / decode * 1e3 } else { 0.0 };
        let mut metrics = json!({
            "queue_ms": queue,
            "prefill_ms": prefill,
            "decode_ms": decode,
            "tokens_per_second": rate,
        });
        if let Some(usage) = &self.measured {
            metrics["speculative_decoding"] = speculation(usage);
        }
        metrics
    }
}

/// Steps that checked drafts; those without any say nothing about drafts.
fn speculation(usage: &Usage) -> Value {
    let steps = usage.drafted.iter().zip(&usage.accepted).filter(|(drafted, _)| **drafted > 0);
    let (drafted, accepted): (Vec<u64>, Vec<u64>) = steps.map(|(d, a)| (u64::from(*d), u64::from(*a))).unzip();
    json!({
        "num_draft_tokens": drafted.iter().sum::<u64>(),
        "num_accepted_draft_tokens": accepted.iter().sum::<u64>(),
        "num_spec_steps": drafted.len(),
        "per_step_accepted": accepted,
        "per_step_drafted": drafted,
    })
}

/// What a reply took, in tokens.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Total {
    pub prompt: usize,
    /// Of the prompt's.
    pub cached: usize,
    pub tokens: usize,
    /// Of these.
    pub reasoning: usize,
}

/// Of a reply whose answers took `spent`, `n` to every prompt, one prompt's after the other's.
pub(super) fn total<'a>(spent: impl Iterator<Item = &'a Spent>, n: usize) -> Total {
    let mut total = Total::default();
    for (i, spent) in spent.enumerate() {
        if i % n == 0 {
            total.prompt += spent.prompt;
            total.cached += spent.cached;
        }
        total.tokens += spent.tokens;
        total.reasoning += spent.reasoning;
    }
    total
}

/// The `usage` of a reply with choices.
pub(super) fn usage(total: Total) -> Value {
    let Total { prompt, cached, tokens, reasoning } = total;
    json!({
        "prompt_tokens": prompt,
        "completion_tokens": tokens,
        "total_tokens": prompt + tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prompt_counts_once() {
        let spent = |prompt, cached, tokens, reasoning| Spent { cached, tokens, reasoning, ..Spent::new(prompt) };
        let all = [spent(5, 2, 1, 0), spent(5, 5, 2, 1), spent(7, 0, 4, 0), spent(7, 7, 8, 3)];
        let expected = json!({
            "prompt_tokens": 12, "completion_tokens": 15, "total_tokens": 27,
            "prompt_tokens_details": {"cached_tokens": 2}, "completion_tokens_details": {"reasoning_tokens": 4},
        });
        assert_eq!(usage(total(all.iter(), 2)), expected);
    }

    #[test]
    fn steps_without_drafts_are_left_out() {
        let mut spent = Spent { tokens: 9, ..Spent::new(1) };
        assert!(spent.metrics().get("speculative_decoding").is_none());
        let drafted = vec![0, 3, 2, 0, 4];
        spent.end(Usage { decode_ms: 400.0, drafted, accepted: vec![0, 1, 2, 0, 0], ..Usage::default() });
        let metrics = spent.metrics();
        assert_eq!(metrics["tokens_per_second"], 20.0);
        let expected = json!({
            "num_draft_tokens": 9, "num_accepted_draft_tokens": 3, "num_spec_steps": 3,
            "per_step_accepted": [1, 2, 0], "per_step_drafted": [3, 2, 4],
        });
        assert_eq!(metrics["speculative_decoding"], expected);
    }
}
