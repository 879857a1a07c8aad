//! What a request asks of the scheduler, and what it hears back.

use std::time::Instant;

use tokio::sync::mpsc::UnboundedSender;

use crate::sample::{Sampling, Shaping};

/// A prompt to be continued.
pub struct Job {
    /// Token ids, at least one; prompt and [`Options::tokens_max`] fit the context.
    pub prompt: Vec<u32>,
    /// How.
    pub options: Options,
    /// Where events go. A receiver that is gone cancels the job. What it holds is bounded by the job's own tokens.
    pub events: UnboundedSender<Event>,
}

/// How a prompt is continued.
#[derive(Clone, Debug)]
pub struct Options {
    /// Most tokens to generate, the end token included; 0 only together with `prompt_logprobs`.
    pub tokens_max: usize,
    /// The end token is not chosen before that many others.
    pub tokens_min: usize,
    /// The end token ends nothing.
    pub ignore_eos: bool,
    /// Choice of tokens.
    pub sampling: Sampling,
    /// Changes to the logits before the choice.
    pub shaping: Shaping,
    /// With every token its log-probability, and those of this many likeliest.
    pub logprobs: Option<usize>,
    /// First [`Event::Prompt`] with the same of every prompt token but the first.
    pub prompt_logprobs: Option<usize>,
    /// Most drafts a step.
    pub draft: usize,
    /// Higher ones leave the queue first.
    pub priority: i32,
    /// When nobody wants the answer any more.
    pub deadline: Option<Instant>,
}

impl Options {
    /// Up to `tokens_max` of the likeliest tokens, and nothing besides.
    pub fn greedy(tokens_max: usize) -> Options {
        Options {
            tokens_max,
            tokens_min: 0,
            ignore_eos: false,
            sampling: Sampling::GREEDY,
            shaping: Shaping::default(),
            logprobs: None,
            prompt_logprobs: None,
            draft: 0,
            priority: 0,
            deadline: None,
        }
    }
}

/// A token's log-probability under the model's own distribution, before temperature, penalties and bias.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprob {
    /// Of the token.
    pub logprob: f32,
    /// The likeliest tokens, likeliest first.
    pub top: Vec<(u32, f32)>,
}

/// What becomes of a job. Last comes [`Event::Done`] or [`Event::Failed`].
#[derive(Clone, Debug)]
pub enum Event {
    /// It left the queue: this many prompt tokens need no computing.
    Started {
        /// Prompt tokens from a cache.
        cached: usize,
    },
    /// Of the prompt tokens from the second on.
    Prompt(Vec<Logprob>),
    /// The next token, the end token included.
    Token {
        /// Its id.
        token: u32,
        /// If asked for.
        logprob: Option<Logprob>,
    },
    /// It ended.
    Done(Done),
    /// It cannot go on; whatever came before stands.
    Failed {
        /// For the client.
        reason: String,
    },
}

/// Why a job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The end token.
    Stop,
    /// `tokens_max`.
    Length,
    /// Its deadline passed.
    Deadline,
    /// The receiver is gone.
    Cancelled,
}

/// How a job ended, and what it took.
#[derive(Clone, Debug)]
pub struct Done {
    /// Why.
    pub finish: Finish,
    /// Measurements.
    pub usage: Usage,
}

/// Measurements of a job.
#[derive(Clone, Debug, Default)]
pub struct Usage {
    /// Prompt tokens.
    pub prompt_tokens: usize,
    /// Of these, tokens from a cache.
    pub cached_tokens: usize,
    /// Tokens generated.
    pub tokens: usize,
    /// From submission until it left the queue, milliseconds.
    pub queue_ms: f64,
    /// From there to the first token, milliseconds.
    pub prefill_ms: f64,
    /// From there to the end, milliseconds.
    pub decode_ms: f64,
    /// Drafts that were checked, step by step; steps without any are there as 0.
    pub drafted: Vec<u8>,
    /// Of these, accepted.
    pub accepted: Vec<u8>,
}
