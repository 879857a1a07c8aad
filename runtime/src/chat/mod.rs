//! Chat text: messages to a prompt, a completion back to messages.
//!
//! ```text
//! request JSON ─▶ message.rs ─▶ encode.rs ─▶ pieces ─▶ tokens … tokens ─▶ text ─▶ stream.rs ─▶ events
//!                                                                              parse.rs: all of it at once
//! ```
//!
//! Owns the model's chat format and nothing else: no HTTP shapes, no sampling, no token ids. Text that came
//! with a request is never trusted to be markup: `Piece` keeps the two apart until the tokenizer has run.

mod encode;
mod error;
#[cfg(test)]
mod golden_tests;
mod json;
mod message;
mod parse;
mod stream;

pub use encode::{Effort, EncodeOptions, Encoded, Profile, encode, encode_pieces};
pub use error::ChatError;
pub(crate) use message::kind;
pub use message::{Arguments, Message, Role, Task, ToolCall, merge_tools, parse_messages, system_message};
pub use parse::{Completion, ParsedCall, parse};
pub use stream::{Event, StreamParser};

/// A stretch of a prompt, by who wrote it.
///
/// Only the tokenizer's added tokens inside `Control` become control ids; the same characters inside `Text`
/// are encoded as ordinary text, so that nobody forges a turn by typing its marker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Markup written by the encoder.
    Control(String),
    /// Anything that came with the request, history included.
    Text(String),
}

impl Piece {
    pub fn as_str(&self) -> &str {
        match self {
            Piece::Control(s) | Piece::Text(s) => s,
        }
    }
}

/// The control tokens of the format, as the vocabulary spells them (bars U+FF5C, blocks U+2581).
pub mod control {
    pub const BOS: &str = "<｜begin▁of▁sentence｜>";
    pub const EOS: &str = "<｜end▁of▁sentence｜>";
    pub const USER: &str = "<｜User｜>";
    pub const ASSISTANT: &str = "<｜Assistant｜>";
    pub const LATEST_REMINDER: &str = "<｜latest_reminder｜>";
    pub const THINK_OPEN: &str = "<think>";
    pub const THINK_CLOSE: &str = "</think>";
    /// Stands inside every tag of the tool call markup, after `<` or `</`.
    pub const DSML: &str = "｜DSML｜";
}
