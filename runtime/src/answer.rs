//! One answer to a conversation: encode, generate, decode, parse.

use std::ops::ControlFlow;
use std::sync::Arc;

use dsv4_model::{Draft, ModelConfig};
use serde_json::{Value, json};

use crate::chat::{Completion, Effort, EncodeOptions, Event, Message, Profile, StreamParser, encode_pieces, parse};
use crate::error::RunError;
use crate::generate::{Finish, Generated, Request, Stats, generate};
use crate::sample::Sampling;
use crate::session::Session;
use crate::tokenizer::Tokenizer;

/// How to answer.
#[derive(Clone, Copy, Debug)]
pub struct AnswerOptions {
    /// Ask for reasoning.
    pub thinking: bool,
    /// How hard to think; only with `thinking`.
    pub effort: Option<Effort>,
    /// Most tokens of the answer; the context's rest when none.
    pub tokens_max: Option<usize>,
    /// Most tokens of prompt and answer.
    pub context: usize,
    /// Choice of tokens.
    pub sampling: Sampling,
    /// Most drafts per step.
    pub draft: usize,
    /// Rows of a prefill step.
    pub chunk: usize,
}

/// A prompt ready to run.
pub struct Prompt {
    /// As text.
    pub text: String,
    /// As token ids.
    pub tokens: Vec<u32>,
    /// The answer begins inside the reasoning.
    pub thinking_open: bool,
}

/// A finished answer.
pub struct Answer {
    /// Tokens, reason of the end, measurements.
    pub generated: Generated,
    /// All of it as text, the end token left out.
    pub text: String,
    /// Its parts.
    pub message: Completion,
}

/// Encodes a conversation for `config`'s release.
pub fn prompt(
    config: &ModelConfig,
    tokenizer: &Tokenizer,
    messages: &[Message],
    options: &AnswerOptions,
) -> Result<Prompt, RunError> {
    let profile = if matches!(config.draft, Draft::DSpark { .. }) { Profile::V0731 } else { Profile::Preview };
    let encode = EncodeOptions { thinking: options.thinking, profile, effort: options.effort, drop_thinking: true };
    let encoded = encode_pieces(messages, &encode)?;
    let tokens = tokenizer.encode_pieces(&encoded.pieces)?;
    Ok(Prompt { text: encoded.text(), tokens, thinking_open: encoded.thinking_open })
}

/// Tokens that the answer may have. Errors: the prompt fills the context.
pub fn room(config: &ModelConfig, prompt: &Prompt, options: &AnswerOptions) -> Result<usize, RunError> {
    match options.context.checked_sub(prompt.tokens.len()) {
        Some(room) if room > 0 => Ok(room),
        _ => Err(RunError::Context {
            tokens: prompt.tokens.len(),
            context: options.context,
            model: config.max_position_embeddings,
        }),
    }
}

/// Generates the answer to `prompt`; `on_event` sees its parts as they come and may stop it.
pub fn answer(
    session: &mut Session,
    tokenizer: &Arc<Tokenizer>,
    prompt: &Prompt,
    options: &AnswerOptions,
    on_event: &mut dyn FnMut(Event) -> ControlFlow<()>,
) -> Result<Answer, RunError> {
    let config = &session.opened.config;
    let room = room(config, prompt, options)?;
    let eos = config.eos_token_id as u32;
    let request = Request {
        prompt: &prompt.tokens,
        tokens_max: options.tokens_max.unwrap_or(room).min(room),
        sampling: options.sampling,
        draft: options.draft,
        chunk: options.chunk,
        eos,
    };
    // Special tokens stay: some vocabularies mark the tags that the parser reads as special.
    let mut stream = tokenizer.stream(false);
    let mut parser = StreamParser::new(prompt.thinking_open);
    let mut feed = |events: Vec<Event>| events.into_iter().try_for_each(&mut *on_event);
    let generated = generate(&mut session.engine, &request, &mut |token| {
        let text = if token == eos { None } else { stream.push(token) };
        text.map_or(ControlFlow::Continue(()), |text| feed(parser.push(&text)))
    })?;
    if generated.finish != Finish::Cancelled {
        let rest = stream.finish().map(|text| parser.push(&text)).unwrap_or_default();
        let _ = feed(rest).is_continue() && feed(parser.finish()).is_continue();
    }
    let shown = generated.tokens.strip_suffix(&[eos]).unwrap_or(&generated.tokens);
    let text = tokenizer.decode(shown, false);
    let message = parse(&text, prompt.thinking_open);
    Ok(Answer { generated, text, message })
}

impl Answer {
    /// `stop`, `length`, `tool_calls` or `cancelled`.
    pub fn finish_reason(&self) -> &'static str {
        match self.generated.finish {
            Finish::Stop if !self.message.tool_calls.is_empty() => "tool_calls",
            Finish::Stop => "stop",
            Finish::Length => "length",
            Finish::Cancelled => "cancelled",
        }
    }

    /// The message in the form of the OpenAI API.
    pub fn message_json(&self) -> Value {
        let calls = self.message.tool_calls.iter().enumerate().map(|(i, call)| {
            let function = json!({"name": call.name, "arguments": call.arguments});
            json!({"id": format!("call_{i}"), "type": "function", "function": function})
        });
        json!({
            "role": "assistant",
            "content": self.message.content,
            "reasoning_content": self.message.reasoning_content,
            "tool_calls": calls.collect::<Vec<Value>>(),
        })
    }
}

/// Measurements as JSON.
pub fn stats_json(stats: &Stats, prompt_tokens: usize, tokens: usize) -> Value {
    json!({
        "prompt_tokens": prompt_tokens,
        "completion_tokens": tokens,
        "cached_tokens": 0,
        "prefill_ms": stats.prefill_ms,
        "decode_ms": stats.decode_ms,
        "decode_steps": stats.decode_steps,
        "draft_tokens": stats.draft_tokens,
        "accepted_tokens": stats.accepted_tokens,
        "tokens_per_second": tokens_per_second(stats, tokens),
    })
}

/// Tokens after the first over the time since the first.
pub fn tokens_per_second(stats: &Stats, tokens: usize) -> f64 {
    if stats.decode_ms > 0.0 { tokens.saturating_sub(1) as f64 / stats.decode_ms * 1e3 } else { 0.0 }
}
