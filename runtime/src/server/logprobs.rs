//! Log-probabilities in the two forms that the API has.

use serde_json::{Map, Value, json};

use crate::scheduler::Logprob;
use crate::tokenizer::Tokenizer;

/// JSON has no infinity; this is what the API says instead.
const LEAST: f32 = -9999.0;

fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { LEAST }
}

/// A token of a chat, with the likeliest in its place.
pub(super) fn chat_entry(tokenizer: &Tokenizer, token: u32, logprob: &Logprob) -> Value {
    let entry = |token: u32, logprob: f32| {
        let bytes = tokenizer.token_bytes(token).unwrap_or_default();
        json!({"token": String::from_utf8_lossy(bytes), "logprob": finite(logprob), "bytes": bytes})
    };
    let mut own = entry(token, logprob.logprob);
    own["top_logprobs"] = logprob.top.iter().map(|(token, logprob)| entry(*token, *logprob)).collect();
    own
}

/// Tokens of a completion, in columns.
#[derive(Debug, Default)]
pub(super) struct Columns {
    tokens: Vec<Value>,
    token_logprobs: Vec<Value>,
    top_logprobs: Vec<Value>,
    text_offset: Vec<Value>,
    /// Characters of all tokens so far.
    offset: usize,
}

impl Columns {
    /// The next token; the first of a prompt has no log-probability.
    pub fn push(&mut self, tokenizer: &Tokenizer, token: u32, logprob: Option<&Logprob>) {
        let text = name(tokenizer, token);
        let top = logprob.map(|logprob| {
            let mut top = Map::new();
            for (other, value) in &logprob.top {
                // Likeliest first: of two tokens with one text the likelier stays.
                top.entry(name(tokenizer, *other)).or_insert_with(|| json!(finite(*value)));
            }
            top.entry(text.clone()).or_insert_with(|| json!(finite(logprob.logprob)));
            top
        });
        self.text_offset.push(json!(self.offset));
        self.offset += text.chars().count();
        self.tokens.push(json!(text));
        self.token_logprobs.push(json!(logprob.map(|logprob| finite(logprob.logprob))));
        self.top_logprobs.push(json!(top));
    }

    /// What came since the last time.
    pub fn take(&mut self) -> Value {
        json!({
            "tokens": std::mem::take(&mut self.tokens),
            "token_logprobs": std::mem::take(&mut self.token_logprobs),
            "top_logprobs": std::mem::take(&mut self.top_logprobs),
            "text_offset": std::mem::take(&mut self.text_offset),
        })
    }
}

/// A token's text; its bytes, spelled out, if they are none.
fn name(tokenizer: &Tokenizer, token: u32) -> String {
    let bytes = tokenizer.token_bytes(token).unwrap_or_default();
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => bytes.iter().fold("bytes:".to_owned(), |text, byte| text + &format!("\\x{byte:02x}")),
    }
}
