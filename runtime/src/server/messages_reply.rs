//! The reply to a conversation in the form of the Anthropic API: a message of blocks, or its events.

use serde_json::{Value, json};

use super::answers::Answers;
use super::app::new_id;
use super::blocks::{Block, BlockKind, Blocks, Change};
use super::choice::Step;
use super::error::{ApiError, Result};
use super::messages_error::error_json;
use super::sse::{Events, write_named};
use super::usage::Total;

pub(super) struct MessageForm {
    id: String,
    model: String,
    request_id: String,
    blocks: Blocks,
}

impl MessageForm {
    pub fn new(model: &str, request_id: String) -> MessageForm {
        MessageForm { id: new_id("msg_"), model: model.to_owned(), request_id, blocks: Blocks::default() }
    }

    pub fn keep(&mut self, step: Step) {
        self.blocks.take(step, |_, _, _| ());
    }

    /// Errors: a call whose arguments nest too deep to be read.
    pub fn whole(self, answers: &Answers) -> Result<Value> {
        let content = self.blocks.list.iter().filter(|block| block.is_shown()).map(whole_block);
        let mut message = self.message(content.collect::<Result<Vec<Value>>>()?, answers.total());
        message["stop_reason"] = json!(self.stop_reason());
        message["stop_sequence"] = json!(self.blocks.stop);
        Ok(message)
    }

    /// One that has not ended.
    fn message(&self, content: Vec<Value>, total: Total) -> Value {
        json!({
            "id": self.id, "type": "message", "role": "assistant", "model": self.model, "content": content,
            "stop_reason": null, "stop_sequence": null, "usage": usage(total),
        })
    }

    fn stop_reason(&self) -> &'static str {
        match self.blocks.end {
            "length" => "max_tokens",
            "tool_calls" => "tool_use",
            _ if self.blocks.stop.is_some() => "stop_sequence",
            _ => "end_turn",
        }
    }
}

/// Input is what was computed; what came from a cache has its own number.
fn usage(total: Total) -> Value {
    json!({
        "input_tokens": total.prompt.saturating_sub(total.cached),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": total.cached,
        "output_tokens": total.tokens,
        "output_tokens_details": {"thinking_tokens": total.reasoning},
    })
}

fn whole_block(block: &Block) -> Result<Value> {
    let mut value = empty_block(block);
    match &block.kind {
        BlockKind::Reasoning => value["thinking"] = json!(block.text),
        BlockKind::Text => value["text"] = json!(block.text),
        BlockKind::Call { name } => {
            let input: Value = serde_json::from_str(&block.text)
                .map_err(|error| ApiError::failed(format!("arguments of a call of {name:?}: {error}")))?;
            value["input"] = input;
        }
    }
    Ok(value)
}

/// A block before anything is in it. Reasoning is not signed: who sends it back is not asked where it is from.
fn empty_block(block: &Block) -> Value {
    match &block.kind {
        BlockKind::Reasoning => json!({"type": "thinking", "thinking": "", "signature": ""}),
        BlockKind::Text => json!({"type": "text", "text": ""}),
        BlockKind::Call { name } => {
            json!({"type": "tool_use", "id": format!("toolu_{}", block.id), "name": name, "input": {}})
        }
    }
}

fn write_change(out: &mut String, index: usize, block: &Block, change: Change) {
    let mut delta = |delta: Value| {
        write_named(out, &json!({"type": "content_block_delta", "index": index, "delta": delta}));
    };
    match (change, &block.kind) {
        (Change::Begins, _) => {
            let block = empty_block(block);
            write_named(out, &json!({"type": "content_block_start", "index": index, "content_block": block}));
        }
        (Change::Adds(text), BlockKind::Reasoning) => delta(json!({"type": "thinking_delta", "thinking": text})),
        (Change::Adds(text), BlockKind::Text) => delta(json!({"type": "text_delta", "text": text})),
        (Change::Adds(text), BlockKind::Call { .. }) => {
            delta(json!({"type": "input_json_delta", "partial_json": text}))
        }
        (Change::Ends, kind) => {
            if *kind == BlockKind::Reasoning {
                delta(json!({"type": "signature_delta", "signature": ""}));
            }
            write_named(out, &json!({"type": "content_block_stop", "index": index}));
        }
    }
}

impl Events for MessageForm {
    const KEEP_ALIVE: &'static str = "event: ping\ndata: {\"type\":\"ping\"}\n\n";

    fn begin(&mut self, answers: &Answers, out: &mut String) {
        let message = self.message(Vec::new(), answers.total());
        write_named(out, &json!({"type": "message_start", "message": message}));
    }

    fn step(&mut self, _index: usize, step: Step, _answers: &Answers, out: &mut String) {
        self.blocks.take(step, |index, block, change| write_change(out, index, block, change));
    }

    fn fail(&mut self, error: &ApiError, _answers: &Answers, out: &mut String) {
        write_named(out, &error_json(error, &self.request_id));
    }

    fn finish(&mut self, answers: &Answers, out: &mut String) {
        let delta = json!({"stop_reason": self.stop_reason(), "stop_sequence": self.blocks.stop});
        write_named(out, &json!({"type": "message_delta", "delta": delta, "usage": usage(answers.total())}));
        write_named(out, &json!({"type": "message_stop"}));
    }
}
