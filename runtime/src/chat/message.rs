//! The message model, read from OpenAI-style JSON.
//!
//! Everything is checked here, so that encoding cannot fail on a message's form. Content given as parts is
//! flattened here as well: the prompt format knows only text.

use serde_json::{Map, Value};

use super::error::ChatError;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    System,
    User,
    Assistant,
    Tool,
    /// Written like a user turn, and may declare tools.
    Developer,
    LatestReminder,
}

impl Role {
    fn from_name(name: &str) -> Option<Role> {
        Some(match name {
            "system" => Role::System,
            "user" => Role::User,
            "assistant" => Role::Assistant,
            "tool" => Role::Tool,
            "developer" => Role::Developer,
            "latest_reminder" => Role::LatestReminder,
            _ => return None,
        })
    }
}

/// A special job asked of the model; each has its own control token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    Action,
    Query,
    Authority,
    Domain,
    Title,
    ReadUrl,
}

impl Task {
    fn from_name(name: &str) -> Option<Task> {
        Some(match name {
            "action" => Task::Action,
            "query" => Task::Query,
            "authority" => Task::Authority,
            "domain" => Task::Domain,
            "title" => Task::Title,
            "read_url" => Task::ReadUrl,
            _ => return None,
        })
    }

    pub(super) fn token(self) -> &'static str {
        match self {
            Task::Action => "<｜action｜>",
            Task::Query => "<｜query｜>",
            Task::Authority => "<｜authority｜>",
            Task::Domain => "<｜domain｜>",
            Task::Title => "<｜title｜>",
            Task::ReadUrl => "<｜read_url｜>",
        }
    }
}

/// Arguments of a replayed call: JSON text as OpenAI sends it, or the object itself.
#[derive(Clone, Debug, PartialEq)]
pub enum Arguments {
    Text(String),
    Object(Map<String, Value>),
}

#[derive(Clone, Debug, PartialEq)]
pub struct ToolCall {
    /// Empty when the request gave none.
    pub id: String,
    pub name: String,
    pub arguments: Arguments,
}

/// One message. Fields that a role does not use stay empty.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    pub role: Role,
    pub content: String,
    pub reasoning_content: String,
    pub tool_calls: Vec<ToolCall>,
    /// Of a tool message: the call it answers.
    pub tool_call_id: String,
    /// The `function` objects of declared tools.
    pub tools: Vec<Value>,
    /// A schema that the answer must follow, printed after the tools.
    pub response_format: Option<Value>,
    pub task: Option<Task>,
}

impl Message {
    pub fn new(role: Role, content: impl Into<String>) -> Message {
        Message {
            role,
            content: content.into(),
            reasoning_content: String::new(),
            tool_calls: Vec::new(),
            tool_call_id: String::new(),
            tools: Vec::new(),
            response_format: None,
            task: None,
        }
    }

    /// Reads message `index` of a request. Unknown fields are ignored.
    ///
    /// Errors name the place, as `messages[index].field`.
    pub fn parse(index: usize, value: &Value) -> Result<Message, ChatError> {
        let place = format!("messages[{index}]");
        let map = object(value, &place)?;
        let name = required_string(map, &place, "role")?;
        let role = Role::from_name(name)
            .ok_or_else(|| ChatError::UnknownRole { place: format!("{place}.role"), found: name.to_owned() })?;
        let mut message = Message::new(role, "");

        message.reasoning_content = match optional_string(map, &place, "reasoning_content")? {
            Some(text) => text.to_owned(),
            None => optional_string(map, &place, "reasoning")?.unwrap_or_default().to_owned(),
        };
        message.tool_call_id = optional_string(map, &place, "tool_call_id")?.unwrap_or_default().to_owned();
        for (i, call) in optional_list(map, &place, "tool_calls")?.iter().enumerate() {
            message.tool_calls.push(parse_call(call, &format!("{place}.tool_calls[{i}]"))?);
        }
        for (i, tool) in optional_list(map, &place, "tools")?.iter().enumerate() {
            message.tools.push(parse_tool(tool, &format!("{place}.tools[{i}]"))?);
        }
        message.response_format = map.get("response_format").filter(|v| is_truthy(v)).cloned();
        message.task = match optional_string(map, &place, "task")? {
            None | Some("") => None,
            Some(task) => Some(
                Task::from_name(task)
                    .ok_or_else(|| ChatError::UnknownTask { place: format!("{place}.task"), found: task.to_owned() })?,
            ),
        };
        message.content = parse_content(map, &place, &message)?;
        Ok(message)
    }
}

/// Reads the `messages` list of a request.
pub fn parse_messages(value: &Value) -> Result<Vec<Message>, ChatError> {
    let list = value.as_array().ok_or_else(|| wrong_type("messages", "a list", value))?;
    list.iter().enumerate().map(|(index, message)| Message::parse(index, message)).collect()
}

/// The system message, made in front when there is none.
pub fn system_message(messages: &mut Vec<Message>) -> &mut Message {
    let index = messages.iter().position(|m| m.role == Role::System).unwrap_or_else(|| {
        messages.insert(0, Message::new(Role::System, ""));
        0
    });
    &mut messages[index]
}

/// Adds a request's top-level `tools` (OpenAI form, null or a list) to the system message, after those it
/// already declares. An empty list changes nothing.
pub fn merge_tools(messages: &mut Vec<Message>, tools: &Value) -> Result<(), ChatError> {
    let list = match tools {
        Value::Null => return Ok(()),
        Value::Array(list) => list,
        other => return Err(wrong_type("tools", "a list", other)),
    };
    let parsed = list.iter().enumerate().map(|(i, tool)| parse_tool(tool, &format!("tools[{i}]")));
    let parsed = parsed.collect::<Result<Vec<_>, _>>()?;
    if !parsed.is_empty() {
        system_message(messages).tools.extend(parsed);
    }
    Ok(())
}

fn parse_content(map: &Map<String, Value>, place: &str, message: &Message) -> Result<String, ChatError> {
    let missing =
        || ChatError::Missing { place: format!("{place}.content"), expected: "a string or a list of text parts" };
    match map.get("content") {
        None => match message.role {
            Role::Assistant if !message.tool_calls.is_empty() || !message.reasoning_content.is_empty() => {
                Ok(String::new())
            }
            Role::System if !message.tools.is_empty() || message.response_format.is_some() => Ok(String::new()),
            _ => Err(missing()),
        },
        Some(Value::Null) => match message.role {
            Role::Developer | Role::LatestReminder => Err(missing()),
            _ => Ok(String::new()),
        },
        Some(Value::String(text)) => Ok(text.clone()),
        Some(Value::Array(parts)) => {
            let texts = parts.iter().enumerate().map(|(i, part)| {
                let place = format!("{place}.content[{i}]");
                let map = object(part, &place)?;
                match required_string(map, &place, "type")? {
                    "text" => Ok(optional_string(map, &place, "text")?.unwrap_or_default().to_owned()),
                    // The format says so to the model: a tool's result is outside the client's control.
                    kind if message.role == Role::Tool => Ok(format!("[Unsupported {kind}]")),
                    kind => Err(ChatError::UnsupportedPart { place, found: kind.to_owned() }),
                }
            });
            Ok(texts.collect::<Result<Vec<_>, _>>()?.join("\n\n"))
        }
        Some(other) => Err(wrong_type(&format!("{place}.content"), "a string, a list of text parts or null", other)),
    }
}

fn parse_call(value: &Value, place: &str) -> Result<ToolCall, ChatError> {
    let map = object(value, place)?;
    let id = optional_string(map, place, "id")?.unwrap_or_default().to_owned();
    let place = format!("{place}.function");
    let function = map
        .get("function")
        .ok_or_else(|| ChatError::Missing { place: place.clone(), expected: "an object with name and arguments" })?;
    let function = object(function, &place)?;
    let name = required_string(function, &place, "name")?.to_owned();
    let arguments = match function.get("arguments") {
        None | Some(Value::Null) => Arguments::Object(Map::new()),
        Some(Value::String(text)) => Arguments::Text(text.clone()),
        Some(Value::Object(map)) => Arguments::Object(map.clone()),
        Some(other) => {
            return Err(wrong_type(&format!("{place}.arguments"), "a JSON string or an object", other));
        }
    };
    Ok(ToolCall { id, name, arguments })
}

/// The `function` object of a declared tool; its form beyond the name is between the client and the model.
fn parse_tool(value: &Value, place: &str) -> Result<Value, ChatError> {
    let map = object(value, place)?;
    let place = format!("{place}.function");
    let function = map
        .get("function")
        .ok_or_else(|| ChatError::Missing { place: place.clone(), expected: "an object with the function's name" })?;
    required_string(object(function, &place)?, &place, "name")?;
    Ok(function.clone())
}

fn object<'a>(value: &'a Value, place: &str) -> Result<&'a Map<String, Value>, ChatError> {
    value.as_object().ok_or_else(|| wrong_type(place, "an object", value))
}

/// A string field; null counts as absent.
fn optional_string<'a>(map: &'a Map<String, Value>, place: &str, field: &str) -> Result<Option<&'a str>, ChatError> {
    match map.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(wrong_type(&format!("{place}.{field}"), "a string", other)),
    }
}

fn required_string<'a>(map: &'a Map<String, Value>, place: &str, field: &str) -> Result<&'a str, ChatError> {
    optional_string(map, place, field)?
        .ok_or_else(|| ChatError::Missing { place: format!("{place}.{field}"), expected: "a string" })
}

/// A list field; null counts as empty.
fn optional_list<'a>(map: &'a Map<String, Value>, place: &str, field: &str) -> Result<&'a [Value], ChatError> {
    match map.get(field) {
        None | Some(Value::Null) => Ok(&[]),
        Some(Value::Array(list)) => Ok(list),
        Some(other) => Err(wrong_type(&format!("{place}.{field}"), "a list", other)),
    }
}

fn wrong_type(place: &str, expected: &'static str, found: &Value) -> ChatError {
    ChatError::WrongType { place: place.to_owned(), expected, found: kind(found) }
}

/// What a value is, for messages.
pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// Python's truth: the published encoder prints a response format only if it is not empty.
fn is_truthy(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(b) => *b,
        Value::Number(n) => n.as_f64() != Some(0.0),
        Value::String(s) => !s.is_empty(),
        Value::Array(a) => !a.is_empty(),
        Value::Object(o) => !o.is_empty(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn error(messages: Value) -> String {
        parse_messages(&messages).expect_err("must be refused").to_string()
    }

    #[test]
    fn errors_name_message_and_field() {
        let user = json!({"role": "user", "content": "x"});
        for (messages, expected) in [
            (json!({}), "messages: found an object, expected a list"),
            (json!([user, 3]), "messages[1]: found a number, expected an object"),
            (json!([user, {"content": "x"}]), "messages[1].role: missing"),
            (json!([{"role": "bot", "content": "x"}]), "messages[0].role: unknown role \"bot\""),
            (json!([{"role": "user"}]), "messages[0].content: missing"),
            (json!([{"role": "assistant"}]), "messages[0].content: missing"),
            (json!([{"role": "latest_reminder", "content": null}]), "messages[0].content: missing"),
            (json!([{"role": "user", "content": 5}]), "messages[0].content: found a number"),
            (
                json!([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]),
                "messages[0].content[1]: content part of type \"image_url\"",
            ),
            (json!([{"role": "user", "content": ["a"]}]), "messages[0].content[0]: found a string, expected an object"),
            (json!([{"role": "user", "content": "x", "task": "User"}]), "messages[0].task: unknown task \"User\""),
            (
                json!([user, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}]),
                "messages[1].tool_calls[0].function.arguments: found a list, expected a JSON string or an object",
            ),
            (
                json!([{"role": "assistant", "content": "", "tool_calls": [{"id": "a"}]}]),
                "messages[0].tool_calls[0].function: missing",
            ),
            (
                json!([{"role": "system", "content": "", "tools": [{"type": "function"}]}]),
                "messages[0].tools[0].function: missing",
            ),
            (json!([{"role": "assistant", "content": "", "reasoning": 1}]), "messages[0].reasoning: found a number"),
        ] {
            let found = error(messages);
            assert!(found.starts_with(expected), "{found}");
            assert!(found.contains("\n  help: "), "{found}");
        }
    }

    #[test]
    fn parts_and_nulls_flatten() {
        let messages = parse_messages(&json!([
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": null, "reasoning": "r", "tool_calls": null},
            {"role": "tool", "content": [{"type": "text", "text": "a"}, {"type": "image"}]},
        ]))
        .expect("valid");
        assert_eq!(messages[0].content, "a\n\nb");
        assert_eq!((messages[1].content.as_str(), messages[1].reasoning_content.as_str()), ("", "r"));
        assert_eq!(messages[2].content, "a\n\n[Unsupported image]");
    }

    #[test]
    fn tools_go_to_the_system_message() {
        let tools = json!([{"type": "function", "function": {"name": "f"}}]);
        let mut messages = vec![Message::new(Role::User, "x")];
        merge_tools(&mut messages, &Value::Null).expect("null is no tools");
        merge_tools(&mut messages, &json!([])).expect("empty is no tools");
        assert_eq!(messages.len(), 1);
        merge_tools(&mut messages, &tools).expect("valid");
        merge_tools(&mut messages, &tools).expect("valid");
        assert_eq!(messages.len(), 2);
        assert_eq!((messages[0].role, messages[0].tools.len()), (Role::System, 2));
        let refused = merge_tools(&mut messages, &json!([{"function": {}}])).expect_err("no name").to_string();
        assert!(refused.starts_with("tools[0].function.name: missing"), "{refused}");
    }
}
