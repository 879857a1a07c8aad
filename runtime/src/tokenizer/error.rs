//! What can be wrong with a `tokenizer.json`, with a text for it, or between it and the `config.json` beside it.

use std::borrow::Cow;

#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    #[error(
        "tokenizer.json: cannot be read: {reason}\n  help: the file must be that of the checkpoint, in the Hugging Face tokenizers format"
    )]
    Parse { reason: String },
    /// A well-formed file that asks for something which is not done here.
    #[error(
        "tokenizer.json: {place} is {found}, expected {expected}\n  help: tokenizers of this kind are not supported; use the tokenizer.json that was published with the checkpoint"
    )]
    Unsupported { place: String, found: String, expected: Cow<'static, str> },
    #[error(
        "tokenizer.json: {place} is {found}, expected {expected}\n  help: the file is damaged; take it from the checkpoint again"
    )]
    Damaged { place: String, found: String, expected: &'static str },
    #[error(
        "tokenizer.json: token {token:?} has id {id}, expected an id below {limit}\n  help: the file is damaged; take it from the checkpoint again"
    )]
    IdTooLarge { token: String, id: u64, limit: u32 },
    #[error(
        "tokenizer.json: id {id} is that of {token:?} and of {other:?}, expected one token per id\n  help: the file is damaged; take it from the checkpoint again"
    )]
    SharedId { id: u32, token: String, other: String },
    /// Ids of added tokens follow from the vocabulary and from their order; the declared ones are not free.
    #[error(
        "tokenizer.json: token {token:?} is declared with id {declared}, but is given {found}\n  help: added tokens that are not in the vocabulary get the ids after it, in the order of the list; correct the list, or take the file from the checkpoint again"
    )]
    DeclaredId { token: String, declared: u32, found: String },
    #[error(
        "tokenizer.json: text of {bytes} bytes cannot be encoded: {reason}\n  help: the file's rules fail on this text; use the tokenizer.json that was published with the checkpoint"
    )]
    Encode { bytes: usize, reason: String },
    #[error(
        "tokenizer.json: the vocabulary has no token for some of the text {text:?}\n  help: use the tokenizer.json that was published with the checkpoint; its vocabulary covers every byte"
    )]
    NoToken { text: String },
    #[error(
        "tokenizer.json: a text of {bytes} bytes gives no tokens, expected at least one\n  help: the file's normalizer or pre-tokenizer removes all of this text; give another text"
    )]
    NoTokens { bytes: usize },
    #[error(
        "tokenizer.json: token {token:?} has id {id}, but vocab_size in config.json is {vocab_size}\n  help: the two files are of different checkpoints; pack them from the same one"
    )]
    BeyondModel { token: String, id: u32, vocab_size: u64 },
    #[error(
        "tokenizer.json: the control token {token:?} is {found}, expected an added token of one id that strips nothing\n  help: this is not the model's tokenizer; use the tokenizer.json that was published with the checkpoint"
    )]
    NoControl { token: &'static str, found: String },
    #[error(
        "tokenizer.json: {token:?} has id {id}, but {field} in config.json is {config}\n  help: the two files are of different checkpoints; pack them from the same one"
    )]
    ControlId { token: &'static str, id: u32, field: &'static str, config: u64 },
}
