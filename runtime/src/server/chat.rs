//! POST /v1/chat/completions: a conversation to a prompt.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::response::Response;
use serde_json::Value;

use crate::chat::{Effort, EncodeOptions, Encoded, Piece, Profile, Role, encode_pieces, merge_tools, parse_messages};
use crate::tokenizer::TokenizerError;

use super::answers::Prompt;
use super::app::App;
use super::ask::{Ask, Kind};
use super::body::read;
use super::chat_reply::ChatForm;
use super::error::{ApiError, Result};
use super::fields::{Fields, parse_object};
use super::reply::reply;

pub(super) async fn chat(State(app): State<Arc<App>>, request: Request) -> Result<Response> {
    let answering = app.answer();
    let body = read(request, app.config.body_bytes_max).await?;
    let (ask, prompt) = app.make_ready(move |app| prepare(app, &body)).await?;
    let form = ChatForm::new(&app.model.tokenizer, &ask);
    reply(&app, ask, vec![prompt], "messages", form, answering).await
}

fn prepare(app: &App, body: &[u8]) -> Result<(Ask, Prompt)> {
    let object = parse_object(body)?;
    let fields = Fields::new(&object);
    app.check_model(&fields)?;
    check_format(&fields)?;
    let ask = Ask::parse(&fields, app, Kind::Chat)?;
    Ok((ask, conversation(app, &fields)?))
}

/// Refuses what only a grammar could keep: an answer that ignores it would look like one that keeps it.
fn check_format(fields: &Fields) -> Result<()> {
    let Some(format) = fields.object("response_format")? else { return Ok(()) };
    match format.string("type")? {
        None | Some("text") => Ok(()),
        Some(kind @ ("json_object" | "json_schema")) => {
            let reason = format!("{kind} is not supported yet: ask for JSON in a message instead");
            Err(ApiError::unsupported("response_format", reason))
        }
        Some(kind) => Err(ApiError::field("response_format.type", format!("found {kind:?}, expected \"text\""))),
    }
}

/// The prompt of `messages`, with tools and what is said about thinking.
pub(super) fn conversation(app: &App, fields: &Fields) -> Result<Prompt> {
    let Some(list) = fields.get("messages") else {
        return Err(ApiError::field("messages", "missing, expected a list of messages"));
    };
    let mut messages = parse_messages(list)?;
    // The API's newer name for the system; the model's own developer turn is another thing.
    messages.iter_mut().filter(|m| m.role == Role::Developer).for_each(|m| m.role = Role::System);
    if has_tools(fields)? {
        merge_tools(&mut messages, fields.get("tools").unwrap_or(&Value::Null))?;
    }
    prompt(app, &encode_pieces(&messages, &thinking(app, fields)?)?, "messages")
}

/// A conversation's tokens. `param`: the field that has it, for errors.
pub(super) fn prompt(app: &App, encoded: &Encoded, param: &str) -> Result<Prompt> {
    let tokens = tokens(app, &encoded.pieces, param)?;
    Ok(Prompt { tokens, text: String::new(), thinking: Some(encoded.thinking_open) })
}

/// Ids of a prompt. Errors: text that the vocabulary cannot spell.
pub(super) fn tokens(app: &App, pieces: &[Piece], param: &str) -> Result<Vec<u32>> {
    let encoded = app.model.tokenizer.encode_pieces(pieces);
    encoded.map_err(|error: TokenizerError| ApiError::field(param, error))
}

/// Whether the model is told about the request's tools.
pub(super) fn has_tools(fields: &Fields) -> Result<bool> {
    let named = "a function by name is not supported yet: give only that tool, and \"auto\"";
    match fields.get("tool_choice") {
        None => Ok(true),
        Some(Value::String(choice)) => match choice.as_str() {
            "auto" => Ok(true),
            "none" => Ok(false),
            "required" => {
                Err(ApiError::unsupported("tool_choice", "\"required\" is not supported yet: use \"auto\" or \"none\""))
            }
            other => Err(ApiError::field("tool_choice", format!("found {other:?}, expected \"auto\" or \"none\""))),
        },
        Some(Value::Object(_)) => Err(ApiError::unsupported("tool_choice", named)),
        Some(other) => Err(fields.wrong("tool_choice", other, "\"auto\" or \"none\"")),
    }
}

/// Whether and how hard to think: the template's own words, then the API's, then an effort of none.
fn thinking(app: &App, fields: &Fields) -> Result<EncodeOptions> {
    let mut thinking = app.config.thinking;
    let template = fields.object("chat_template_kwargs")?;
    let mut effort = fields.string("reasoning_effort")?.map(|effort| ("reasoning_effort".to_owned(), effort));
    if let Some(template) = &template
        && let Some(own) = template.string("reasoning_effort")?
    {
        effort = Some((template.name("reasoning_effort"), own));
    }
    let effort = match effort {
        None => None,
        Some((_, "none")) => {
            thinking = false;
            None
        }
        Some((name, effort)) => Some(effort_of(app.model.profile, &name, effort)?),
    };
    if let Some(asked) = fields.object("thinking")? {
        thinking = match asked.string("type")? {
            Some("enabled") => true,
            Some("disabled") => false,
            None => thinking,
            Some(other) => {
                let reason = format!("found {other:?}, expected \"enabled\" or \"disabled\"");
                return Err(ApiError::field("thinking.type", reason));
            }
        };
    }
    if let Some(template) = &template {
        let asked = template.boolean("thinking")?.or(template.boolean("enable_thinking")?);
        thinking = asked.unwrap_or(thinking);
    }
    Ok(EncodeOptions { thinking, profile: app.model.profile, effort, drop_thinking: true })
}

/// The release's effort for one of the API's.
pub(super) fn effort_of(profile: Profile, name: &str, effort: &str) -> Result<Effort> {
    match (effort, profile) {
        ("minimal" | "low", Profile::V0731) => Ok(Effort::Low),
        // The first release knows nothing below.
        ("minimal" | "low", Profile::Preview) | ("medium" | "high", _) => Ok(Effort::High),
        ("xhigh" | "max", _) => Ok(Effort::Max),
        (other, _) => {
            let reason = format!("found {other:?}, expected none, minimal, low, medium, high, xhigh or max");
            Err(ApiError::field(name, reason))
        }
    }
}
