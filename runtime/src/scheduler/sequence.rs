//! One job that runs: its tokens, what of them is in the caches, what comes next. No ranks, no steps.

use std::time::Instant;

use super::plan::Adaptive;
use super::{Done, Event, Finish, Job, Logprob, Options, Usage};
use crate::error::RunError;
use crate::sample::Seen;
use tokio::sync::mpsc::UnboundedSender;

/// A job in a slot.
pub struct Sequence {
    /// Its slot on every rank.
    pub slot: u32,
    /// Prompt token ids.
    pub prompt: Vec<u32>,
    /// Tokens decided so far.
    pub answer: Vec<u32>,
    /// How it is continued.
    pub options: Options,
    /// Positions in the trunk's caches.
    pub computed: usize,
    /// Drafts that the next step checks.
    pub drafts: Vec<u32>,
    /// Tokens behind the rows of the last trunk step that the draft block has yet to read.
    pub following: Vec<u32>,
    /// The draft length.
    pub adaptive: Adaptive,
    /// How it ended.
    pub finish: Option<Finish>,
    /// Why it cannot go on.
    pub failure: Option<String>,
    events: UnboundedSender<Event>,
    eos: u32,
    usage: Usage,
    prompt_logprobs: Vec<Logprob>,
    seen: Seen,
    /// When it left the queue; when its first token was decided; when it last was in a step.
    started: Instant,
    first: Option<Instant>,
    /// When it was last in a step.
    pub stepped: Instant,
}

impl Sequence {
    /// A job that was submitted at `since` and has a slot now.
    pub fn new(job: Job, since: Instant, slot: u32, eos: u32) -> Sequence {
        let now = Instant::now();
        let Job { prompt, options, events } = job;
        let _ = events.send(Event::Started { cached: 0 });
        let usage =
            Usage { prompt_tokens: prompt.len(), queue_ms: (now - since).as_secs_f64() * 1e3, ..Usage::default() };
        let adaptive = Adaptive::new(options.draft);
        let seen = options.shaping.seen(&prompt);
        Sequence {
            slot,
            prompt,
            answer: Vec::new(),
            options,
            computed: 0,
            drafts: Vec::new(),
            following: Vec::new(),
            adaptive,
            finish: None,
            failure: None,
            events,
            eos,
            usage,
            prompt_logprobs: Vec::new(),
            seen,
            started: now,
            first: None,
            stepped: now,
        }
    }

    /// Whether its prompt is not computed yet.
    pub fn is_prefilling(&self) -> bool {
        self.computed < self.prompt.len()
    }

    /// Whether the draft block follows it.
    pub fn is_drafting(&self) -> bool {
        self.options.draft > 0
    }

    /// Sees whether anybody still waits for it, and in time.
    pub fn look(&mut self, now: Instant) {
        if self.finish.is_some() {
            return;
        }
        if self.events.is_closed() {
            self.finish = Some(Finish::Cancelled);
        } else if self.options.deadline.is_some_and(|deadline| deadline <= now) {
            self.finish = Some(Finish::Deadline);
        }
    }

    /// Drafts of the next step, of `most` that there is room for: none behind the last token.
    pub fn drafts_wanted(&self, most: usize) -> usize {
        let left = self.options.tokens_max.saturating_sub(self.answer.len() + 1);
        self.adaptive.length().min(most).min(left)
    }

    /// Whether drafting beyond `token` is in vain.
    pub fn ends_with(&self, token: u32) -> bool {
        token == self.eos && !self.options.ignore_eos
    }

    /// The token behind what was decided and `drafts`, from a row of logits. Errors: one is not a number.
    pub fn choose(&self, logits: &[f32], drafts: &[u32]) -> Result<u32, RunError> {
        let position = self.prompt.len() + self.answer.len() + drafts.len();
        if let Some(token) = logits.iter().position(|l| !l.is_finite()) {
            return Err(RunError::NotFinite { position, token, found: logits[token] });
        }
        let no_end = self.options.ignore_eos || self.answer.len() + drafts.len() < self.options.tokens_min;
        let shaping = &self.options.shaping;
        if shaping.is_none() && !no_end {
            return Ok(self.options.sampling.choose(logits, position as u32));
        }
        let mut shaped = logits.to_vec();
        if !shaping.is_none() {
            shaping.apply(&mut shaped, &self.seen, drafts);
        }
        if no_end && let Some(end) = shaped.get_mut(self.eos as usize) {
            *end = f32::MIN;
        }
        Ok(self.options.sampling.choose(&shaped, position as u32))
    }

    /// A token is decided, by this row of logits. Sees whether it is the last.
    pub fn decide(&mut self, token: u32, logits: &[f32]) {
        self.first.get_or_insert_with(Instant::now);
        self.answer.push(token);
        self.seen.add(token);
        let logprob = self.options.logprobs.map(|top| logprob(logits, token, top));
        let sent = self.events.send(Event::Token { token, logprob });
        self.finish = match sent {
            Err(_) => Some(Finish::Cancelled),
            Ok(()) if self.ends_with(token) => Some(Finish::Stop),
            Ok(()) if self.answer.len() >= self.options.tokens_max => Some(Finish::Length),
            Ok(()) => None,
        };
    }

    /// Log-probabilities of prompt tokens: `rows` of logits behind positions from `start` on.
    pub fn tell_prompt<'a>(&mut self, start: usize, rows: impl Iterator<Item = &'a [f32]>) {
        let Some(top) = self.options.prompt_logprobs else { return };
        let tokens = self.prompt.get(start + 1..).unwrap_or_default();
        self.prompt_logprobs.extend(tokens.iter().zip(rows).map(|(&token, row)| logprob(row, token, top)));
        if self.prompt_logprobs.len() + 1 == self.prompt.len() {
            let all = std::mem::take(&mut self.prompt_logprobs);
            let _ = self.events.send(Event::Prompt(all));
        }
    }

    /// It cannot go on.
    pub fn break_off(&mut self, reason: String) {
        self.finish = Some(Finish::Cancelled);
        self.failure = Some(reason);
    }

    /// What became of the drafts of a decoding step.
    pub fn learn(&mut self, drafted: usize, accepted: usize) {
        self.usage.drafted.push(drafted as u8);
        self.usage.accepted.push(accepted as u8);
        self.adaptive.learn(drafted, accepted);
    }

    /// Microseconds from its start.
    pub fn running_us(&self) -> u64 {
        self.started.elapsed().as_micros() as u64
    }

    /// Says that it ended, and how.
    pub fn end(mut self) {
        let now = Instant::now();
        let first = self.first.unwrap_or(now);
        self.usage.tokens = self.answer.len();
        self.usage.prefill_ms = (first - self.started).as_secs_f64() * 1e3;
        self.usage.decode_ms = (now - first).as_secs_f64() * 1e3;
        let finish = self.finish.unwrap_or(Finish::Cancelled);
        let _ = self.events.send(match self.failure {
            Some(reason) => Event::Failed { reason },
            None => Event::Done(Done { finish, usage: self.usage }),
        });
    }

    /// Says that it cannot go on.
    pub fn fail(self, reason: String) {
        let _ = self.events.send(Event::Failed { reason });
    }
}

/// The log-probability of `token` and of the `top` likeliest tokens; on equal ones lower ids first.
fn logprob(logits: &[f32], token: u32, top: usize) -> Logprob {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|l| libm::exp(f64::from(l - max))).sum();
    let log_sum = f64::from(max) + libm::log(sum);
    let of = |l: f32| (f64::from(l) - log_sum) as f32;
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let by = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    let top = top.min(order.len());
    if top > 0 && top < order.len() {
        order.select_nth_unstable_by(top - 1, by);
    }
    order.truncate(top);
    order.sort_by(by);
    let top = order.into_iter().map(|token| (token, of(logits[token as usize]))).collect();
    Logprob { logprob: logits.get(token as usize).map_or(f32::NEG_INFINITY, |l| of(*l)), top }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_probabilities_are_those_of_the_logits() {
        let logits = [1.0f32, 3.0, 3.0, -2.0];
        let total: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
        let of = |l: f32| (f64::from(l).exp() / total).ln();
        let found = logprob(&logits, 3, 3);
        assert!((f64::from(found.logprob) - of(-2.0)).abs() < 1e-6);
        assert_eq!(found.top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 2, 0]);
        assert!((f64::from(found.top[2].1) - of(1.0)).abs() < 1e-6);
        assert_eq!(logprob(&logits, 1, 0).top, []);
        assert_eq!(logprob(&logits, 1, 9).top.len(), 4);
    }
}
