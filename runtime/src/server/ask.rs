//! How an answer is asked for: the fields that the forms of requests have in common.

use serde_json::Value;

use crate::sample::Shaping;
use crate::scheduler::Options;

use super::app::{App, random};
use super::error::{ApiError, Result};
use super::fields::Fields;

/// Most stop strings.
const STOPS_MAX: usize = 16;
/// Longest stop string; so much text may have to be held back.
const STOP_BYTES_MAX: usize = 1024;
/// Most likeliest tokens that are told.
const TOP_LOGPROBS_MAX: i64 = 20;
/// Most answers to one prompt.
const CHOICES_MAX: i64 = 16;

/// Which form the request has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Chat,
    Completion,
}

/// How an answer is asked for.
#[derive(Clone, Debug)]
pub(super) struct Ask {
    /// For jobs; `tokens_max` still without regard to the context.
    pub options: Options,
    /// Answers to a prompt.
    pub n: usize,
    /// Texts that end an answer.
    pub stops: Vec<String>,
    /// Most calls of tools; none is no limit.
    pub calls_max: Option<usize>,
    pub stream: bool,
    /// A last chunk with the usage.
    pub usage_at_end: bool,
    /// The usage in every chunk.
    pub usage_always: bool,
    /// Ids with the text.
    pub token_ids: bool,
    /// The prompt before the answer.
    pub echo: bool,
}

impl Ask {
    pub fn parse(fields: &Fields, app: &App, kind: Kind) -> Result<Ask> {
        let stream_options = fields.object("stream_options")?;
        let stream_option = |name| stream_options.as_ref().map_or(Ok(None), |options| options.boolean(name));
        let n = fields.int("n", 1..=CHOICES_MAX)?.unwrap_or(1);
        if let Some(best) = fields.int("best_of", 1..=CHOICES_MAX)?
            && best != n
        {
            return Err(ApiError::unsupported("best_of", format!("found {best}, expected n, which is {n}")));
        }
        let echo = kind == Kind::Completion && fields.boolean("echo")?.unwrap_or(false);
        let logprobs = logprobs(fields, kind)?;
        let tokens_max = tokens_max(fields, kind, echo)?;
        let options = Options {
            logprobs,
            // Without a token to generate, a job is there for its prompt alone.
            prompt_logprobs: if echo { logprobs.or((tokens_max == 0).then_some(0)) } else { None },
            ..options(fields, app, tokens_max)?
        };
        // It says nothing that is not so anyway; of another type it is a mistake.
        fields.boolean("cache_prompt")?;
        Ok(Ask {
            options,
            n: n as usize,
            stops: stops(fields, "stop")?,
            calls_max: fields.boolean("parallel_tool_calls")?.and_then(|parallel| (!parallel).then_some(1)),
            stream: fields.boolean("stream")?.unwrap_or(false),
            usage_at_end: stream_option("include_usage")?.unwrap_or(false),
            usage_always: stream_option("continuous_usage_stats")?.unwrap_or(false),
            token_ids: fields.boolean("return_token_ids")?.unwrap_or(false),
            echo,
        })
    }

    /// One answer, in the forms whose replies have no choices; `tokens_max` and `stops` have other names there.
    pub fn single(fields: &Fields, app: &App, tokens_max: usize, stops: Vec<String>, one_call: bool) -> Result<Ask> {
        Ok(Ask {
            options: options(fields, app, tokens_max)?,
            n: 1,
            stops,
            calls_max: one_call.then_some(1),
            stream: fields.boolean("stream")?.unwrap_or(false),
            usage_at_end: false,
            usage_always: false,
            token_ids: false,
            echo: false,
        })
    }
}

/// What jobs are told, without log-probabilities.
fn options(fields: &Fields, app: &App, tokens_max: usize) -> Result<Options> {
    let sampling = &app.config.sampling;
    Ok(Options {
        tokens_max,
        tokens_min: fields.int("min_tokens", 0..=i64::MAX)?.map_or(0, |n| n as usize),
        ignore_eos: fields.boolean("ignore_eos")?.unwrap_or(false),
        sampling: crate::sample::Sampling {
            temperature: fields.float("temperature", 0.0..=2.0)?.unwrap_or(sampling.temperature),
            top_p: fields.float("top_p", 0.0..=1.0)?.unwrap_or(sampling.top_p),
            // -1 is another way to say all.
            top_k: fields.int("top_k", -1..=i64::from(u32::MAX))?.map_or(sampling.top_k, |k| k.max(0) as u32),
            min_p: fields.float("min_p", 0.0..=1.0)?.unwrap_or(sampling.min_p),
            seed: seed(fields)?,
        },
        shaping: Shaping {
            presence: fields.float("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0),
            frequency: fields.float("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0),
            repetition: fields.float("repetition_penalty", 0.01..=10.0)?.unwrap_or(1.0),
            bias: logit_bias(fields, app.model.config.vocab_size)?,
        },
        logprobs: None,
        prompt_logprobs: None,
        draft: app.config.draft,
        priority: fields.int("priority", i64::from(i32::MIN)..=i64::from(i32::MAX))?.map_or(0, |n| n as i32),
        deadline: app.config.answer_within.map(|within| std::time::Instant::now() + within),
    })
}

/// The rest of the context for a chat, 16 for a completion: as the API has it.
fn tokens_max(fields: &Fields, kind: Kind, echo: bool) -> Result<usize> {
    let least = if echo { 0 } else { 1 };
    let old = fields.int("max_tokens", least..=i64::MAX)?;
    let given = fields.int("max_completion_tokens", least..=i64::MAX)?.or(old);
    let default = if kind == Kind::Chat { usize::MAX } else { 16 };
    Ok(given.map_or(default, |n| n as usize))
}

fn logprobs(fields: &Fields, kind: Kind) -> Result<Option<usize>> {
    if kind == Kind::Completion {
        return Ok(fields.int("logprobs", 0..=TOP_LOGPROBS_MAX)?.map(|n| n as usize));
    }
    let wanted = fields.boolean("logprobs")?.unwrap_or(false);
    let top = fields.int("top_logprobs", 0..=TOP_LOGPROBS_MAX)?.unwrap_or(0);
    if top > 0 && !wanted {
        return Err(ApiError::field("top_logprobs", format!("found {top} without logprobs: expected logprobs true")));
    }
    Ok(wanted.then_some(top as usize))
}

/// Any whole number; one that nobody knows if there is none.
fn seed(fields: &Fields) -> Result<u64> {
    let Some(value) = fields.get("seed") else { return Ok(random()) };
    let seed = value.as_u64().or_else(|| value.as_i64().map(|seed| seed as u64));
    seed.ok_or_else(|| fields.wrong("seed", value, "a whole number of 64 bits"))
}

/// Stop strings: a list, or one.
pub(super) fn stops(fields: &Fields, field: &str) -> Result<Vec<String>> {
    let (list, single) = match fields.get(field) {
        None => return Ok(Vec::new()),
        Some(Value::Array(list)) => (list.as_slice(), false),
        Some(one) => (std::slice::from_ref(one), true),
    };
    if list.len() > STOPS_MAX {
        return Err(ApiError::field(field, format!("found {} strings, expected at most {STOPS_MAX}", list.len())));
    }
    let stop = |(i, value): (usize, &Value)| {
        let name = if single { field.to_owned() } else { format!("{field}[{i}]") };
        match value.as_str() {
            Some(stop) if !stop.is_empty() && stop.len() <= STOP_BYTES_MAX => Ok(stop.to_owned()),
            _ => Err(fields.wrong(&name, value, format!("a string of 1 to {STOP_BYTES_MAX} bytes"))),
        }
    };
    list.iter().enumerate().map(stop).collect()
}

fn logit_bias(fields: &Fields, vocab_size: u64) -> Result<Vec<(u32, f32)>> {
    let Some(Value::Object(map)) = fields.get("logit_bias") else {
        return fields.object("logit_bias").map(|_| Vec::new());
    };
    let bias = |(key, value): (&String, &Value)| {
        let id = key.parse::<u32>().ok().filter(|id| u64::from(*id) < vocab_size).ok_or_else(|| {
            ApiError::field("logit_bias", format!("found the key {key:?}, expected a token id below {vocab_size}"))
        })?;
        match value.as_f64() {
            Some(bias) if (-100.0..=100.0).contains(&bias) => Ok((id, bias as f32)),
            _ => Err(fields.wrong(&format!("logit_bias.{id}"), value, "a number in -100..=100")),
        }
    };
    map.iter().map(bias).collect()
}
