//! POST /v1/completions: a text to its continuation.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::Response;
use serde_json::Value;

use crate::chat::{Piece, control};

use super::answers::Prompt;
use super::app::App;
use super::ask::{Ask, Kind};
use super::body::read;
use super::chat::tokens;
use super::completion_reply::CompletionForm;
use super::error::{ApiError, Result};
use super::fields::{Fields, parse_object};
use super::reply::reply;

pub(super) async fn completions(State(app): State<Arc<App>>, request: Request) -> Result<Response> {
    let answering = app.answer();
    let body = read(request, app.config.body_bytes_max).await?;
    let (ask, prompts) = app.make_ready(move |app| prepare(app, &body)).await?;
    let form = CompletionForm::new(&app.model.tokenizer, &ask, &prompts);
    reply(&app, ask, prompts, "prompt", form, answering).await
}

fn prepare(app: &App, body: &[u8]) -> Result<(Ask, Vec<Prompt>)> {
    let object = parse_object(body)?;
    let fields = Fields::new(&object);
    app.check_model(&fields)?;
    if fields.string("suffix")?.is_some_and(|suffix| !suffix.is_empty()) {
        return Err(ApiError::unsupported("suffix", "not supported: the model continues a text, it fills no gap"));
    }
    let ask = Ask::parse(&fields, app, Kind::Completion)?;
    let prompts = prompts(app, &fields, ask.echo)?;
    Ok((ask, prompts))
}

/// A text, token ids, or a list of either.
fn prompts(app: &App, fields: &Fields, echo: bool) -> Result<Vec<Prompt>> {
    let expected = "a string, a list of strings, a list of token ids or a list of such lists";
    let bos = fields.boolean("add_special_tokens")?.unwrap_or(false);
    match fields.get("prompt") {
        None => Err(ApiError::field("prompt", format!("missing, expected {expected}"))),
        Some(Value::String(text)) => Ok(vec![text_prompt(app, "prompt", text, bos)?]),
        Some(Value::Array(list)) => match list.first() {
            Some(Value::Number(_)) => Ok(vec![id_prompt(app, fields, "prompt", list, echo)?]),
            Some(Value::String(_) | Value::Array(_)) => {
                let most = app.scheduler.limits().queue;
                if list.len() > most {
                    let reason = format!("found {} prompts, expected at most {most}", list.len());
                    return Err(ApiError::field("prompt", reason));
                }
                list.iter().enumerate().map(|(i, prompt)| one_of_many(app, fields, i, prompt, bos, echo)).collect()
            }
            _ => Err(ApiError::field("prompt", format!("found an empty list or one of others, expected {expected}"))),
        },
        Some(other) => Err(fields.wrong("prompt", other, expected)),
    }
}

fn one_of_many(app: &App, fields: &Fields, i: usize, prompt: &Value, bos: bool, echo: bool) -> Result<Prompt> {
    let name = format!("prompt[{i}]");
    match prompt {
        Value::String(text) => text_prompt(app, &name, text, bos),
        Value::Array(ids) => id_prompt(app, fields, &name, ids, echo),
        other => Err(fields.wrong(&name, other, "a string or a list of token ids")),
    }
}

/// As the tokenizer of the release does it: nothing is put before the text if `bos` is not asked for.
pub(super) fn text_tokens(app: &App, param: &str, text: &str, bos: bool) -> Result<Vec<u32>> {
    let mut pieces = vec![Piece::Text(text.to_owned())];
    if bos {
        pieces.insert(0, Piece::Control(control::BOS.to_owned()));
    }
    tokens(app, &pieces, param)
}

fn text_prompt(app: &App, param: &str, text: &str, bos: bool) -> Result<Prompt> {
    let tokens = text_tokens(app, param, text, bos)?;
    not_empty(param, Prompt { tokens, text: text.to_owned(), thinking: None })
}

fn id_prompt(app: &App, fields: &Fields, param: &str, list: &[Value], echo: bool) -> Result<Prompt> {
    let tokens = fields.token_ids(param, list, app.model.config.vocab_size)?;
    let text = if echo { app.model.tokenizer.decode(&tokens, false) } else { String::new() };
    not_empty(param, Prompt { tokens, text, thinking: None })
}

fn not_empty(param: &str, prompt: Prompt) -> Result<Prompt> {
    if prompt.tokens.is_empty() {
        return Err(ApiError::field(param, "found no tokens, expected at least one: the model continues something"));
    }
    Ok(prompt)
}
