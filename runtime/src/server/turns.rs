//! A conversation that comes in parts: blocks and items, several of which may make up one message of the prompt.

use crate::chat::{Arguments, Message, Role, ToolCall, system_message};
use serde_json::Value;

/// What stands between two texts of one message.
const GAP: &str = "\n\n";

/// Messages so far. What one role says in a row is one message.
#[derive(Debug, Default)]
pub(super) struct Turns {
    pub messages: Vec<Message>,
}

impl Turns {
    /// The role's message that goes on.
    fn message(&mut self, role: Role) -> &mut Message {
        let last = self.messages.len().saturating_sub(1);
        let goes_on = self.messages.last().is_some_and(|message| message.role == role);
        let place = if goes_on { last } else { self.messages.len() };
        if !goes_on {
            self.messages.push(Message::new(role, ""));
        }
        &mut self.messages[place]
    }

    pub fn say(&mut self, role: Role, text: &str) {
        join(&mut self.message(role).content, text);
    }

    /// The system's words. The prompt has a place for them before the first turn; what comes later goes into a turn of
    /// the user's, because after a system message nobody would be asked to answer.
    pub fn instruct(&mut self, text: &str) {
        let begun = self.messages.iter().any(|message| message.role != Role::System);
        self.say(if begun { Role::User } else { Role::System }, text);
    }

    /// The assistant's reasoning.
    pub fn reason(&mut self, text: &str) {
        join(&mut self.message(Role::Assistant).reasoning_content, text);
    }

    /// The assistant's call of a tool.
    pub fn call(&mut self, id: &str, name: &str, arguments: Arguments) {
        let call = ToolCall { id: id.to_owned(), name: name.to_owned(), arguments };
        self.message(Role::Assistant).tool_calls.push(call);
    }

    /// What came of a call.
    pub fn result(&mut self, call: &str, text: String) {
        self.messages.push(Message { tool_call_id: call.to_owned(), ..Message::new(Role::Tool, text) });
    }

    /// Tools that the assistant may call: `function` objects.
    pub fn declare(&mut self, tools: Vec<Value>) {
        if !tools.is_empty() {
            system_message(&mut self.messages).tools.extend(tools);
        }
    }
}

/// Adds a text to another.
pub(super) fn join(to: &mut String, text: &str) {
    if !to.is_empty() && !text.is_empty() {
        to.push_str(GAP);
    }
    to.push_str(text);
}

/// The `function` object of a tool. `parameters`: a JSON schema.
pub(super) fn function(name: &str, description: Option<&str>, parameters: Option<&Value>) -> Value {
    let mut function = serde_json::Map::new();
    function.insert("name".into(), name.into());
    if let Some(description) = description {
        function.insert("description".into(), description.into());
    }
    if let Some(parameters) = parameters {
        function.insert("parameters".into(), parameters.clone());
    }
    Value::Object(function)
}
