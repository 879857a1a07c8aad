//! POST /v1/responses: a list of items to a prompt.
//!
//! Nothing is stored: a request has its whole conversation, and refers to no other.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::chat::{Arguments, EncodeOptions, Role, encode_pieces};

use super::answers::{Answers, Prompt};
use super::app::{App, new_id, now};
use super::ask::{Ask, stops};
use super::body::read;
use super::chat::{effort_of, has_tools, prompt};
use super::error::{ApiError, Result};
use super::fields::{Content, Fields, parse_object};
use super::reply::{collect, stream};
use super::responses_reply::ResponseForm;
use super::turns::{Turns, function, join};

pub(super) async fn responses(State(app): State<Arc<App>>, request: Request) -> Result<Response> {
    let answering = app.answer();
    let body = read(request, app.config.body_bytes_max).await?;
    let (ask, prompt, response) = app.make_ready(move |app| prepare(app, &body)).await?;
    let mut answers = Answers::submit(&app, &ask, &[prompt], "input")?;
    let mut form = ResponseForm::new(response);
    if ask.stream {
        return stream(answers, form, app.config.keep_alive, answering).await;
    }
    collect(&mut answers, |_, step| form.keep(step)).await?;
    Ok(Json(form.whole(&answers)).into_response())
}

/// How to answer, what, and the reply's object as far as it is known.
fn prepare(app: &App, body: &[u8]) -> Result<(Ask, Prompt, Value)> {
    let object = parse_object(body)?;
    let fields = Fields::new(&object);
    app.check_model(&fields)?;
    check_unsupported(&fields)?;
    let tokens_max = fields.int("max_output_tokens", 1..=i64::MAX)?.map_or(usize::MAX, |n| n as usize);
    let one_call = fields.boolean("parallel_tool_calls")?.is_some_and(|parallel| !parallel);
    let ask = Ask::single(&fields, app, tokens_max, stops(&fields, "stop")?, one_call)?;
    let prompt = conversation(app, &fields)?;
    Ok((ask, prompt, response(app, &fields)))
}

/// Refuses what would need something stored, and what only a grammar could keep.
fn check_unsupported(fields: &Fields) -> Result<()> {
    for field in ["previous_response_id", "conversation", "prompt"] {
        if fields.get(field).is_some() {
            let reason = "not supported: nothing is stored here; send the whole conversation as input";
            return Err(ApiError::unsupported(field, reason));
        }
    }
    if fields.boolean("background")?.unwrap_or(false) {
        return Err(ApiError::unsupported("background", "not supported: nothing is stored here; wait, or stream"));
    }
    fields.boolean("store")?;
    let text = fields.object("text")?;
    let Some(format) = text.as_ref().map_or(Ok(None), |text| text.object("format"))? else { return Ok(()) };
    match format.string("type")? {
        None | Some("text") => Ok(()),
        Some(kind @ ("json_object" | "json_schema")) => {
            let reason = format!("{kind} is not supported yet: ask for JSON in a message instead");
            Err(ApiError::unsupported("text.format", reason))
        }
        Some(kind) => Err(ApiError::field("text.format.type", format!("found {kind:?}, expected \"text\""))),
    }
}

fn conversation(app: &App, fields: &Fields) -> Result<Prompt> {
    let mut turns = Turns::default();
    if let Some(instructions) = fields.string("instructions")? {
        turns.say(Role::System, instructions);
    }
    match fields.content("input")? {
        Content::Text(text) => turns.say(Role::User, text),
        Content::Parts(items) => items.iter().try_for_each(|item| add(item, &mut turns))?,
    }
    if !turns.messages.iter().any(|message| message.role != Role::System) {
        return Err(ApiError::field("input", "found no message, expected at least one"));
    }
    let tools = tools(fields)?;
    if has_tools(fields)? {
        turns.declare(tools);
    }
    prompt(app, &encode_pieces(&turns.messages, &thinking(app, fields)?)?, "input")
}

fn add(item: &Fields, turns: &mut Turns) -> Result<()> {
    match item.string("type")? {
        None | Some("message") => {
            let text = text(item, "content", &["input_text", "output_text", "text"], false)?;
            match item.required("role")? {
                "user" => turns.say(Role::User, &text),
                "assistant" => turns.say(Role::Assistant, &text),
                "system" | "developer" => turns.instruct(&text),
                other => {
                    let reason = format!("found {other:?}, expected user, assistant, system or developer");
                    return Err(ApiError::field(&item.name("role"), reason));
                }
            }
        }
        Some("function_call") => {
            let arguments = item.string("arguments")?.unwrap_or("{}").to_owned();
            turns.call(item.required("call_id")?, item.required("name")?, Arguments::Text(arguments));
        }
        Some("function_call_output") => {
            let output = text(item, "output", &["input_text", "output_text", "text"], true)?;
            turns.result(item.required("call_id")?, output);
        }
        // What an API of reasoning in secret sends has no content, only a summary.
        Some("reasoning") if item.get("content").is_some() => {
            turns.reason(&text(item, "content", &["reasoning_text", "text"], false)?);
        }
        Some("reasoning") => {}
        Some(other) => {
            let reason = format!(
                "{other:?} is not supported: expected message, function_call, function_call_output or reasoning"
            );
            return Err(ApiError::unsupported(&item.name("type"), reason));
        }
    }
    Ok(())
}

/// A string, or parts that are texts of `kinds`; others are refused, or `named` in the text.
fn text(item: &Fields, field: &str, kinds: &[&str], named: bool) -> Result<String> {
    let parts = match item.content(field)? {
        Content::Text(text) => return Ok(text.to_owned()),
        Content::Parts(parts) => parts,
    };
    let mut text = String::new();
    for part in parts {
        match part.required("type")? {
            kind if kinds.contains(&kind) => join(&mut text, part.required("text")?),
            "refusal" => join(&mut text, part.required("refusal")?),
            other if named => join(&mut text, &format!("[Unsupported {other}]")),
            other => return Err(ApiError::part(part.place(), other)),
        }
    }
    Ok(text)
}

/// The `function` objects of the request's tools.
fn tools(fields: &Fields) -> Result<Vec<Value>> {
    let tool = |tool: Fields| match tool.required("type")? {
        "function" => {
            let parameters = tool.get("parameters");
            if let Some(other) = parameters.filter(|schema| !schema.is_object()) {
                return Err(tool.wrong("parameters", other, "an object"));
            }
            Ok(function(tool.required("name")?, tool.string("description")?, parameters))
        }
        other => {
            let reason = format!("{other:?} is not supported: expected \"function\", a tool of the client's own");
            Err(ApiError::unsupported(&tool.name("type"), reason))
        }
    };
    fields.objects("tools")?.into_iter().map(tool).collect()
}

/// As the server does it if nothing is said; an effort of none is no reasoning.
fn thinking(app: &App, fields: &Fields) -> Result<EncodeOptions> {
    let profile = app.model.profile;
    let reasoning = fields.object("reasoning")?;
    let (thinking, effort) = match reasoning.as_ref().map_or(Ok(None), |reasoning| reasoning.string("effort"))? {
        None => (app.config.thinking, None),
        Some("none") => (false, None),
        Some(effort) => (true, Some(effort_of(profile, "reasoning.effort", effort)?)),
    };
    Ok(EncodeOptions { thinking, profile, effort, drop_thinking: true })
}

/// The reply's object before the answer, with what the request said.
fn response(app: &App, fields: &Fields) -> Value {
    let said = |field: &str, default: Value| fields.get(field).cloned().unwrap_or(default);
    let effort = fields.get("reasoning").and_then(|reasoning| reasoning.get("effort"));
    json!({
        "id": new_id("resp_"),
        "object": "response",
        "created_at": now(),
        "status": "in_progress",
        "background": false,
        "error": null,
        "incomplete_details": null,
        "instructions": said("instructions", Value::Null),
        "max_output_tokens": said("max_output_tokens", Value::Null),
        "max_tool_calls": null,
        "metadata": said("metadata", json!({})),
        "model": app.model.name,
        "output": [],
        "parallel_tool_calls": said("parallel_tool_calls", json!(true)),
        "previous_response_id": null,
        "reasoning": {"effort": effort, "summary": null},
        "service_tier": "default",
        "store": false,
        "temperature": said("temperature", json!(app.config.sampling.temperature)),
        "text": {"format": {"type": "text"}},
        "tool_choice": said("tool_choice", json!("auto")),
        "tools": said("tools", json!([])),
        "top_logprobs": 0,
        "top_p": said("top_p", json!(app.config.sampling.top_p)),
        "truncation": "disabled",
        "usage": null,
        "user": said("user", Value::Null),
    })
}
