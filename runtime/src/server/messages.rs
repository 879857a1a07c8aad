//! POST /v1/messages and /v1/messages/count_tokens: the Anthropic API's conversations to a prompt.
//!
//! Absent on purpose: images and documents, tools that the API's own machines would run, a bound of its own for the
//! reasoning (`budget_tokens` is read and not kept; `max_tokens` bounds both).

use std::sync::Arc;

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::chat::{Arguments, EncodeOptions, Encoded, Piece, Role, control, encode_pieces};

use super::answers::{Answers, Prompt};
use super::app::App;
use super::ask::{Ask, stops};
use super::body::read;
use super::chat::{effort_of, prompt};
use super::error::{ApiError, Result};
use super::fields::{Content, Fields, parse_object};
use super::messages_error::request_id;
use super::messages_reply::MessageForm;
use super::reply::{collect, stream};
use super::turns::{Turns, function, join};

/// What begins a block of the system that is for who runs the API, and another one in every request: with it in the
/// prompt no two prompts would begin alike.
const NOT_FOR_THE_MODEL: &str = "x-anthropic-billing-header:";

pub(super) async fn messages(State(app): State<Arc<App>>, request: Request) -> Result<Response> {
    let answering = app.answer();
    let id = request_id(&request);
    let body = read(request, app.config.body_bytes_max).await?;
    let (ask, prompt) = app.make_ready(move |app| prepare(app, &body)).await?;
    let mut answers = Answers::submit(&app, &ask, &[prompt], "messages")?;
    let mut form = MessageForm::new(&app.model.name, id);
    if ask.stream {
        return stream(answers, form, app.config.keep_alive, answering).await;
    }
    collect(&mut answers, |_, step| form.keep(step)).await?;
    Ok(Json(form.whole(&answers)?).into_response())
}

/// How many tokens the prompt of the same request would have.
pub(super) async fn count_tokens(State(app): State<Arc<App>>, request: Request) -> Result<Json<Value>> {
    let body = read(request, app.config.body_bytes_max).await?;
    let work = move |app: &App| {
        let object = parse_object(&body)?;
        let fields = Fields::new(&object);
        app.check_model(&fields)?;
        Ok(json!({"input_tokens": conversation(app, &fields)?.tokens.len()}))
    };
    app.work(work).await.map(Json)
}

fn prepare(app: &App, body: &[u8]) -> Result<(Ask, Prompt)> {
    let object = parse_object(body)?;
    let fields = Fields::new(&object);
    app.check_model(&fields)?;
    let Some(tokens_max) = fields.int("max_tokens", 1..=i64::MAX)? else {
        return Err(ApiError::field("max_tokens", "missing, expected the most tokens that the answer may have"));
    };
    let (_, one_call) = tool_choice(&fields)?;
    let stops = stops(&fields, "stop_sequences")?;
    let ask = Ask::single(&fields, app, tokens_max as usize, stops, one_call)?;
    Ok((ask, conversation(app, &fields)?))
}

fn conversation(app: &App, fields: &Fields) -> Result<Prompt> {
    check_format(fields)?;
    let mut turns = Turns::default();
    if fields.get("system").is_some() {
        system(fields, "system", &mut turns)?;
    }
    for message in fields.objects("messages")? {
        match message.required("role")? {
            "user" => user(&message, &mut turns)?,
            "assistant" => assistant(&message, &mut turns)?,
            "system" => system(&message, "content", &mut turns)?,
            other => {
                let reason = format!("found {other:?}, expected \"user\", \"assistant\" or \"system\"");
                return Err(ApiError::field(&message.name("role"), reason));
            }
        }
    }
    if !turns.messages.iter().any(|message| message.role != Role::System) {
        return Err(ApiError::field("messages", "found none, expected at least one message"));
    }
    let tools = tools(fields)?;
    if tool_choice(fields)?.0 {
        turns.declare(tools);
    }
    prompt(app, &encode(&turns, &thinking(app, fields)?)?, "messages")
}

/// The prompt; an assistant's message at the end is the beginning of the answer.
fn encode(turns: &Turns, options: &EncodeOptions) -> Result<Encoded> {
    let last = turns.messages.last().filter(|message| message.role == Role::Assistant);
    if last.is_some_and(|message| !message.tool_calls.is_empty()) {
        return Err(ApiError::field("messages", "the last has a tool_use: expected a message with its tool_result"));
    }
    if last.is_some() && options.thinking {
        let reason =
            "the last is the assistant's, which an answer with thinking cannot go on from: expected the user's";
        return Err(ApiError::field("messages", reason));
    }
    let mut encoded = encode_pieces(&turns.messages, options)?;
    if last.is_some()
        && let Some(Piece::Control(end)) = encoded.pieces.last_mut()
        && let Some(open) = end.strip_suffix(control::EOS)
    {
        *end = open.to_owned();
    }
    Ok(encoded)
}

/// Refuses what only a grammar could keep, as chats do.
fn check_format(fields: &Fields) -> Result<()> {
    let output = fields.object("output_config")?;
    let format = output.as_ref().filter(|output| output.get("format").is_some()).map(|output| output.name("format"));
    let old = fields.get("output_format").map(|_| "output_format".to_owned());
    match format.or(old) {
        Some(name) => Err(ApiError::unsupported(&name, "not supported yet: ask for JSON in a message instead")),
        None => Ok(()),
    }
}

fn system(fields: &Fields, field: &str, turns: &mut Turns) -> Result<()> {
    let mut say = |text: &str| {
        if !text.starts_with(NOT_FOR_THE_MODEL) {
            turns.instruct(text);
        }
    };
    match fields.content(field)? {
        Content::Text(text) => say(text),
        Content::Parts(blocks) => {
            for block in blocks {
                match block.required("type")? {
                    "text" => say(block.required("text")?),
                    other => return Err(ApiError::part(block.place(), other)),
                }
            }
        }
    }
    Ok(())
}

fn user(message: &Fields, turns: &mut Turns) -> Result<()> {
    let blocks = match message.content("content")? {
        Content::Text(text) => {
            turns.say(Role::User, text);
            return Ok(());
        }
        Content::Parts(blocks) => blocks,
    };
    for block in blocks {
        match block.required("type")? {
            "text" => turns.say(Role::User, block.required("text")?),
            "tool_result" => turns.result(block.required("tool_use_id")?, result(&block)?),
            other => return Err(ApiError::part(block.place(), other)),
        }
    }
    Ok(())
}

/// A tool's result as text. What is none is named: a result is outside the client's control.
fn result(block: &Fields) -> Result<String> {
    let mut text = String::new();
    if block.boolean("is_error")?.unwrap_or(false) {
        text.push_str("Error:");
    }
    if block.get("content").is_none() {
        return Ok(text);
    }
    match block.content("content")? {
        Content::Text(own) => join(&mut text, own),
        Content::Parts(parts) => {
            for part in parts {
                match part.required("type")? {
                    "text" => join(&mut text, part.required("text")?),
                    other => join(&mut text, &format!("[Unsupported {other}]")),
                }
            }
        }
    }
    Ok(text)
}

fn assistant(message: &Fields, turns: &mut Turns) -> Result<()> {
    let blocks = match message.content("content")? {
        Content::Text(text) => {
            turns.say(Role::Assistant, text);
            return Ok(());
        }
        Content::Parts(blocks) => blocks,
    };
    for block in blocks {
        match block.required("type")? {
            "text" => turns.say(Role::Assistant, block.required("text")?),
            "thinking" => turns.reason(block.required("thinking")?),
            // Nobody here can read it.
            "redacted_thinking" => {}
            "tool_use" => {
                let input = match block.get("input") {
                    None => serde_json::Map::new(),
                    Some(Value::Object(map)) => map.clone(),
                    Some(other) => return Err(block.wrong("input", other, "an object")),
                };
                turns.call(block.required("id")?, block.required("name")?, Arguments::Object(input));
            }
            other => return Err(ApiError::part(block.place(), other)),
        }
    }
    Ok(())
}

/// The `function` objects of the request's tools.
fn tools(fields: &Fields) -> Result<Vec<Value>> {
    let tool = |tool: Fields| match tool.string("type")? {
        None | Some("custom") => {
            let schema = tool.get("input_schema");
            if let Some(other) = schema.filter(|schema| !schema.is_object()) {
                return Err(tool.wrong("input_schema", other, "an object"));
            }
            Ok(function(tool.required("name")?, tool.string("description")?, schema))
        }
        Some(other) => {
            let reason =
                format!("{other:?} is not supported: expected a tool of the client's own, with an input_schema");
            Err(ApiError::unsupported(&tool.name("type"), reason))
        }
    };
    fields.objects("tools")?.into_iter().map(tool).collect()
}

/// Whether the model is told about the tools, and whether it may call only one.
fn tool_choice(fields: &Fields) -> Result<(bool, bool)> {
    let Some(choice) = fields.object("tool_choice")? else { return Ok((true, false)) };
    let one_call = choice.boolean("disable_parallel_tool_use")?.unwrap_or(false);
    match choice.required("type")? {
        "auto" => Ok((true, one_call)),
        "none" => Ok((false, one_call)),
        forced @ ("any" | "tool") => {
            let reason = format!("{forced:?} is not supported yet: use \"auto\" or \"none\"");
            Err(ApiError::unsupported("tool_choice.type", reason))
        }
        other => Err(ApiError::field("tool_choice.type", format!("found {other:?}, expected \"auto\" or \"none\""))),
    }
}

/// Whether and how hard to think: not, if nothing is said, whatever the server does elsewhere.
fn thinking(app: &App, fields: &Fields) -> Result<EncodeOptions> {
    let thinking = match fields.object("thinking")? {
        None => false,
        Some(asked) => {
            asked.int("budget_tokens", 1..=i64::MAX)?;
            match asked.required("type")? {
                "enabled" | "adaptive" => true,
                "disabled" => false,
                other => {
                    let reason = format!("found {other:?}, expected \"enabled\", \"adaptive\" or \"disabled\"");
                    return Err(ApiError::field("thinking.type", reason));
                }
            }
        }
    };
    let output = fields.object("output_config")?;
    let effort = output.as_ref().map_or(Ok(None), |output| output.string("effort"))?;
    let profile = app.model.profile;
    let effort = effort.map(|effort| effort_of(profile, "output_config.effort", effort)).transpose()?;
    Ok(EncodeOptions { thinking, profile, effort, drop_thinking: true })
}
