//! The choices of a chat's reply.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use crate::chat::{Event as Part, ParsedCall};
use crate::tokenizer::Tokenizer;

use super::app::new_id;
use super::ask::Ask;
use super::choice::Step;
use super::logprobs::chat_entry;
use super::reply::Form;

const CALL_ID: &str = "call_";

/// One answer, as far as it is not in a chunk yet; of a whole reply that is all of it.
#[derive(Default)]
struct Kept {
    ids: Vec<u32>,
    logprobs: Vec<Value>,
    reasoning: String,
    content: String,
    calls: Vec<ParsedCall>,
    /// A call without its end.
    open: Option<ParsedCall>,
    finish: &'static str,
}

pub(super) struct ChatForm {
    tokenizer: Arc<Tokenizer>,
    answers: Vec<Kept>,
    token_ids: bool,
    logprobs: bool,
}

impl ChatForm {
    pub fn new(tokenizer: &Arc<Tokenizer>, ask: &Ask) -> ChatForm {
        ChatForm {
            tokenizer: tokenizer.clone(),
            answers: (0..ask.n).map(|_| Kept::default()).collect(),
            token_ids: ask.token_ids,
            logprobs: ask.options.logprobs.is_some(),
        }
    }

    fn keep_token(&mut self, index: usize, step: &mut Step) {
        let (Some((token, logprob)), Some(kept)) = (step.token.take(), self.answers.get_mut(index)) else { return };
        if self.token_ids {
            kept.ids.push(token);
        }
        if let Some(logprob) = logprob {
            kept.logprobs.push(chat_entry(&self.tokenizer, token, &logprob));
        }
    }

    /// The choice of a chunk, with the tokens since the last one.
    fn chunk(&mut self, index: usize, delta: Value, finish: Option<&str>) -> Value {
        let mut choice = json!({"index": index, "delta": delta, "finish_reason": finish});
        let Some(kept) = self.answers.get_mut(index) else { return choice };
        if self.logprobs {
            choice["logprobs"] = json!({"content": std::mem::take(&mut kept.logprobs)});
        }
        if self.token_ids {
            choice["token_ids"] = json!(std::mem::take(&mut kept.ids));
        }
        choice
    }
}

/// What a part adds to a message.
fn delta(part: Part) -> Option<Value> {
    let call = |call: Value| json!({"tool_calls": [call]});
    Some(match part {
        Part::Content(text) => json!({"content": text}),
        // Clients know it by one name or the other.
        Part::Reasoning(text) => json!({"reasoning_content": text, "reasoning": text}),
        Part::ToolCallStart { index, name } => {
            let function = json!({"name": name, "arguments": ""});
            call(json!({"index": index, "id": new_id(CALL_ID), "type": "function", "function": function}))
        }
        Part::ToolCallArguments { index, delta } => call(json!({"index": index, "function": {"arguments": delta}})),
        Part::ToolCallEnd { .. } => return None,
    })
}

impl Form for ChatForm {
    const NAMES: (&'static str, &'static str, &'static str) = ("chat.completion", "chat.completion.chunk", "chatcmpl-");

    fn opening(&mut self) -> Vec<Value> {
        let count = self.answers.len();
        (0..count).map(|index| self.chunk(index, json!({"role": "assistant", "content": ""}), None)).collect()
    }

    fn chunks(&mut self, index: usize, mut step: Step) -> Vec<Value> {
        self.keep_token(index, &mut step);
        let deltas: Vec<Value> = step.parts.into_iter().filter_map(delta).collect();
        let mut chunks: Vec<Value> = deltas.into_iter().map(|delta| self.chunk(index, delta, None)).collect();
        if let Some(Ok(finish)) = step.end {
            chunks.push(self.chunk(index, json!({}), Some(finish)));
        }
        chunks
    }

    fn keep(&mut self, index: usize, mut step: Step) {
        self.keep_token(index, &mut step);
        let Some(kept) = self.answers.get_mut(index) else { return };
        for part in step.parts {
            match part {
                Part::Content(text) => kept.content.push_str(&text),
                Part::Reasoning(text) => kept.reasoning.push_str(&text),
                Part::ToolCallStart { name, .. } => kept.open = Some(ParsedCall { name, arguments: String::new() }),
                Part::ToolCallArguments { delta, .. } => {
                    if let Some(call) = &mut kept.open {
                        call.arguments.push_str(&delta);
                    }
                }
                Part::ToolCallEnd { .. } => kept.calls.extend(kept.open.take()),
            }
        }
        if let Some(Ok(finish)) = step.end {
            kept.finish = finish;
        }
    }

    fn whole(self) -> Vec<Value> {
        let choice = |(index, kept): (usize, Kept)| {
            let mut choice = Map::new();
            choice.insert("index".into(), json!(index));
            choice.insert("finish_reason".into(), json!(kept.finish));
            let logprobs = if self.logprobs { json!({"content": kept.logprobs}) } else { Value::Null };
            choice.insert("logprobs".into(), logprobs);
            if self.token_ids {
                choice.insert("token_ids".into(), json!(kept.ids));
            }
            choice.insert("message".into(), message(kept));
            Value::Object(choice)
        };
        self.answers.into_iter().enumerate().map(choice).collect()
    }
}

fn message(kept: Kept) -> Value {
    let content = if kept.content.is_empty() && !kept.calls.is_empty() { Value::Null } else { json!(kept.content) };
    let mut message = json!({"role": "assistant", "content": content});
    if !kept.reasoning.is_empty() {
        message["reasoning_content"] = json!(kept.reasoning);
        message["reasoning"] = json!(kept.reasoning);
    }
    if !kept.calls.is_empty() {
        let call = |call: ParsedCall| {
            let function = json!({"name": call.name, "arguments": call.arguments});
            json!({"id": new_id(CALL_ID), "type": "function", "function": function})
        };
        message["tool_calls"] = kept.calls.into_iter().map(call).collect();
    }
    message
}
