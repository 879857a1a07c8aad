//! The reply of /v1/responses: an object of items, or its events.

use serde_json::{Value, json};

use super::answers::Answers;
use super::blocks::{Block, BlockKind, Blocks, Change};
use super::choice::Step;
use super::error::ApiError;
use super::sse::{Events, write_named};
use super::usage::Total;

pub(super) struct ResponseForm {
    /// The object, without what the answer adds.
    response: Value,
    blocks: Blocks,
    writer: Writer,
}

impl ResponseForm {
    /// `response`: the object before the answer.
    pub fn new(response: Value) -> ResponseForm {
        ResponseForm { response, blocks: Blocks::default(), writer: Writer::default() }
    }

    pub fn keep(&mut self, step: Step) {
        self.blocks.take(step, |_, _, _| ());
    }

    pub fn whole(mut self, answers: &Answers) -> Value {
        self.ended(self.status(), answers);
        self.response
    }

    fn status(&self) -> &'static str {
        if self.blocks.end == "length" { "incomplete" } else { "completed" }
    }

    /// Adds to the object what came.
    fn ended(&mut self, status: &str, answers: &Answers) {
        let shown = self.blocks.list.iter().filter(|block| block.is_shown());
        self.response["status"] = json!(status);
        self.response["output"] = shown.map(|block| item(block, of_ended(block))).collect();
        self.response["usage"] = usage(answers.total());
        if status == "incomplete" {
            self.response["incomplete_details"] = json!({"reason": "max_output_tokens"});
        }
    }
}

fn usage(total: Total) -> Value {
    json!({
        "input_tokens": total.prompt,
        "input_tokens_details": {"cached_tokens": total.cached, "cache_write_tokens": 0},
        "output_tokens": total.tokens,
        "output_tokens_details": {"reasoning_tokens": total.reasoning},
        "total_tokens": total.prompt + total.tokens,
    })
}

/// An item's id: of a call, the call itself has another.
fn item_id(block: &Block) -> String {
    let prefix = match block.kind {
        BlockKind::Reasoning => "rs_",
        BlockKind::Text => "msg_",
        BlockKind::Call { .. } => "fc_",
    };
    format!("{prefix}{}", block.id)
}

fn of_ended(block: &Block) -> &'static str {
    if block.whole { "completed" } else { "incomplete" }
}

/// An item with what is in it; one that has just begun has no parts.
fn item(block: &Block, status: &str) -> Value {
    let parts = if block.text.is_empty() { json!([]) } else { json!([part(block)]) };
    let id = item_id(block);
    match &block.kind {
        BlockKind::Reasoning => {
            json!({"id": id, "type": "reasoning", "status": status, "summary": [], "content": parts})
        }
        BlockKind::Text => {
            json!({"id": id, "type": "message", "role": "assistant", "status": status, "content": parts})
        }
        BlockKind::Call { name } => json!({
            "id": id, "type": "function_call", "status": status, "call_id": format!("call_{}", block.id),
            "name": name, "arguments": block.text,
        }),
    }
}

/// The only part of reasoning and of a message.
fn part(block: &Block) -> Value {
    match block.kind {
        BlockKind::Reasoning => json!({"type": "reasoning_text", "text": block.text}),
        _ => json!({"type": "output_text", "text": block.text, "annotations": [], "logprobs": []}),
    }
}

/// Numbers the events.
#[derive(Default)]
struct Writer {
    next: u64,
}

impl Writer {
    fn write(&mut self, out: &mut String, kind: &str, mut data: Value) {
        data["type"] = json!(kind);
        data["sequence_number"] = json!(self.next);
        self.next += 1;
        write_named(out, &data);
    }

    fn change(&mut self, out: &mut String, index: usize, block: &Block, change: Change) {
        let id = item_id(block);
        match (change, &block.kind) {
            (Change::Begins, kind) => {
                let data = json!({"output_index": index, "item": item(block, "in_progress")});
                self.write(out, "response.output_item.added", data);
                if !matches!(kind, BlockKind::Call { .. }) {
                    let data = json!({"item_id": id, "output_index": index, "content_index": 0, "part": part(block)});
                    self.write(out, "response.content_part.added", data);
                }
            }
            (Change::Adds(text), BlockKind::Call { .. }) => {
                let data = json!({"item_id": id, "output_index": index, "delta": text});
                self.write(out, "response.function_call_arguments.delta", data);
            }
            (Change::Adds(text), kind) => {
                let data = json!({"item_id": id, "output_index": index, "content_index": 0, "delta": text});
                self.text_event(out, kind, "delta", data);
            }
            (Change::Ends, BlockKind::Call { name }) => {
                let data = json!({"item_id": id, "output_index": index, "name": name, "arguments": block.text});
                self.write(out, "response.function_call_arguments.done", data);
                self.item_done(out, index, block);
            }
            (Change::Ends, kind) => {
                let place = json!({"item_id": id, "output_index": index, "content_index": 0});
                let mut data = place.clone();
                data["text"] = json!(block.text);
                self.text_event(out, kind, "done", data);
                let mut data = place;
                data["part"] = part(block);
                self.write(out, "response.content_part.done", data);
                self.item_done(out, index, block);
            }
        }
    }

    fn item_done(&mut self, out: &mut String, index: usize, block: &Block) {
        let data = json!({"output_index": index, "item": item(block, of_ended(block))});
        self.write(out, "response.output_item.done", data);
    }

    /// `what`: `delta` or `done`.
    fn text_event(&mut self, out: &mut String, kind: &BlockKind, what: &str, mut data: Value) {
        if *kind == BlockKind::Reasoning {
            return self.write(out, &format!("response.reasoning_text.{what}"), data);
        }
        data["logprobs"] = json!([]);
        self.write(out, &format!("response.output_text.{what}"), data);
    }
}

impl Events for ResponseForm {
    const KEEP_ALIVE: &'static str = ": keep-alive\n\n";

    fn begin(&mut self, _answers: &Answers, out: &mut String) {
        for kind in ["response.created", "response.in_progress"] {
            self.writer.write(out, kind, json!({"response": self.response}));
        }
    }

    fn step(&mut self, _index: usize, step: Step, _answers: &Answers, out: &mut String) {
        let ResponseForm { blocks, writer, .. } = self;
        blocks.take(step, |index, block, change| writer.change(out, index, block, change));
    }

    fn fail(&mut self, error: &ApiError, answers: &Answers, out: &mut String) {
        self.ended("failed", answers);
        self.response["error"] = json!({"code": "server_error", "message": error.message});
        self.writer.write(out, "response.failed", json!({"response": self.response}));
    }

    fn finish(&mut self, answers: &Answers, out: &mut String) {
        let status = self.status();
        self.ended(status, answers);
        self.writer.write(out, &format!("response.{status}"), json!({"response": self.response}));
    }
}
