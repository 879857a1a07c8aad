//! Which `tokenizer.json` files are read, and what they say about tokens.
//!
//! The tokenizers library reads more kinds than it reads safely, so the file is checked before it sees it:
//!
//! | part | accepted |
//! |---|---|
//! | model | BPE without dropout; ids below `ID_LIMIT`, one token per id, merges whose parts and results are tokens |
//! | normalizer | none, or any of `NORMALIZERS`, alone or in sequence |
//! | pre-tokenizer | none, or any of `PRE_TOKENIZERS`, alone or in sequence |
//! | decoder | see `decode.rs` |
//! | post-processor, truncation, padding | anything: not applied, and not given to the library |
//!
//! Absent on purpose: `Precompiled` and the models other than BPE (panics, and no decoder here for their
//! vocabularies), and `FixedLength` (panics). What the library does with the rest still runs under `guard.rs`.

use std::borrow::Cow;
use std::collections::HashMap;

use serde_json::{Map, Value};

use super::error::TokenizerError;

/// Ids at and above this are refused: the byte table has a place for every id below the largest.
pub(super) const ID_LIMIT: u32 = 1 << 22;

const NORMALIZERS: &[&str] = &[
    "BertNormalizer",
    "ByteLevel",
    "Lowercase",
    "NFC",
    "NFD",
    "NFKC",
    "NFKD",
    "Nmt",
    "Prepend",
    "Replace",
    "Strip",
    "StripAccents",
];
const PRE_TOKENIZERS: &[&str] = &[
    "BertPreTokenizer",
    "ByteLevel",
    "CharDelimiterSplit",
    "Digits",
    "Metaspace",
    "Punctuation",
    "Split",
    "UnicodeScripts",
    "Whitespace",
    "WhitespaceSplit",
];

/// The tokens of a file, as it declares them.
pub(super) struct Declared<'a> {
    pub(super) vocab: Vec<(&'a str, u32)>,
    pub(super) added: Vec<Added<'a>>,
}

pub(super) struct Added<'a> {
    pub(super) content: &'a str,
    pub(super) id: u32,
    pub(super) special: bool,
}

/// Checks the parts that encode: model, normalizer, pre-tokenizer and added tokens.
pub(super) fn check(file: &Value) -> Result<Declared<'_>, TokenizerError> {
    let model = &file["model"];
    let kind = &model["type"];
    // Old files have no type; the library tells BPE from the others by its merges.
    if !kind.is_null() && kind != "BPE" {
        return Err(unsupported("model.type", kind, "\"BPE\""));
    }
    if !(model["dropout"].is_null() || model["dropout"].as_f64() == Some(0.0)) {
        let expected = "null or 0: with dropout the same text has other tokens every time";
        return Err(unsupported("model.dropout", &model["dropout"], expected));
    }
    let Some(vocab) = model["vocab"].as_object() else {
        return Err(damaged("model.vocab", &model["vocab"], "an object of tokens and their ids"));
    };
    let declared = Declared { vocab: vocabulary(vocab)?, added: added_tokens(&file["added_tokens"])? };
    one_token_per_id(&declared)?;
    check_merges(model, vocab)?;
    check_steps(&file["normalizer"], "normalizer", "normalizers", NORMALIZERS)?;
    check_steps(&file["pre_tokenizer"], "pre_tokenizer", "pretokenizers", PRE_TOKENIZERS)?;
    Ok(declared)
}

fn vocabulary(vocab: &Map<String, Value>) -> Result<Vec<(&str, u32)>, TokenizerError> {
    vocab.iter().map(|(token, id)| Ok((token.as_str(), token_id(token, id)?))).collect()
}

fn added_tokens(list: &Value) -> Result<Vec<Added<'_>>, TokenizerError> {
    let entries = match list {
        Value::Null => return Ok(Vec::new()),
        Value::Array(entries) => entries,
        other => return Err(damaged("added_tokens", other, "a list")),
    };
    let mut added = Vec::with_capacity(entries.len());
    for (i, token) in entries.iter().enumerate() {
        let Some(content) = token["content"].as_str() else {
            return Err(damaged(&format!("added_tokens[{i}].content"), &token["content"], "a string"));
        };
        added.push(Added { content, id: token_id(content, &token["id"])?, special: token["special"] == true });
    }
    Ok(added)
}

fn token_id(token: &str, id: &Value) -> Result<u32, TokenizerError> {
    let Some(id) = id.as_u64() else {
        return Err(damaged(&format!("the id of token {token:?}"), id, "a whole number"));
    };
    match u32::try_from(id) {
        Ok(id) if id < ID_LIMIT => Ok(id),
        _ => Err(TokenizerError::IdTooLarge { token: token.to_owned(), id, limit: ID_LIMIT }),
    }
}

/// An added token may be in the vocabulary too, but then as the same token.
fn one_token_per_id(declared: &Declared) -> Result<(), TokenizerError> {
    let mut tokens = HashMap::with_capacity(declared.vocab.len() + declared.added.len());
    let added = declared.added.iter().map(|added| (added.content, added.id));
    for (token, id) in declared.vocab.iter().copied().chain(added) {
        if let Some(other) = tokens.insert(id, token)
            && other != token
        {
            return Err(TokenizerError::SharedId { id, token: token.to_owned(), other: other.to_owned() });
        }
    }
    Ok(())
}

/// The library cuts the prefix off the right part and joins the rest in a buffer of the longest token's size, all
/// before it looks for the result in the vocabulary.
fn check_merges(model: &Value, vocab: &Map<String, Value>) -> Result<(), TokenizerError> {
    let prefix = model["continuing_subword_prefix"].as_str().unwrap_or_default();
    for (i, merge) in model["merges"].as_array().into_iter().flatten().enumerate() {
        if merge.as_str().is_some_and(|line| line.starts_with("#version")) {
            continue;
        }
        let place = || format!("model.merges[{i}]");
        let Some((left, right)) = merge_parts(merge) else {
            return Err(damaged(&place(), merge, "two tokens"));
        };
        let Some(rest) = right.strip_prefix(prefix) else {
            return Err(damaged(&place(), merge, "a second token that begins with continuing_subword_prefix"));
        };
        let joined = format!("{left}{rest}");
        if ![left, right, joined.as_str()].iter().all(|token| vocab.contains_key(*token)) {
            return Err(damaged(&place(), merge, "two tokens of the vocabulary that join to a third one"));
        }
    }
    Ok(())
}

fn merge_parts(merge: &Value) -> Option<(&str, &str)> {
    match merge {
        Value::String(line) => line.split_once(' ').filter(|(_, right)| !right.contains(' ')),
        Value::Array(parts) => match parts.as_slice() {
            [Value::String(left), Value::String(right)] => Some((left, right)),
            _ => None,
        },
        _ => None,
    }
}

/// `list` is the name of a sequence's list of steps.
fn check_steps(step: &Value, place: &str, list: &str, accepted: &[&str]) -> Result<(), TokenizerError> {
    if step.is_null() {
        return Ok(());
    }
    let expected = || format!("null, or a Sequence of {}", accepted.join(", "));
    match step["type"].as_str() {
        Some("Sequence") => {
            let mut steps = step[list].as_array().into_iter().flatten().enumerate();
            steps.try_for_each(|(i, step)| check_steps(step, &format!("{place}.{list}[{i}]"), list, accepted))
        }
        Some(kind) if accepted.contains(&kind) => {
            let pattern = &step["pattern"];
            if pattern["String"] == "" || pattern["Regex"] == "" {
                return Err(unsupported(&format!("{place}.pattern"), pattern, "a pattern that is not empty"));
            }
            Ok(())
        }
        Some(_) => Err(unsupported(&format!("{place}.type"), &step["type"], expected())),
        None => Err(unsupported(place, step, expected())),
    }
}

pub(super) fn unsupported(place: &str, found: &Value, expected: impl Into<Cow<'static, str>>) -> TokenizerError {
    TokenizerError::Unsupported { place: place.to_owned(), found: shown(found), expected: expected.into() }
}

fn damaged(place: &str, found: &Value, expected: &'static str) -> TokenizerError {
    TokenizerError::Damaged { place: place.to_owned(), found: shown(found), expected }
}

/// A value's JSON, or its beginning.
fn shown(value: &Value) -> String {
    const CHARS_MAX: usize = 80;
    let json = match value {
        // Not printed in full only to be cut.
        Value::Array(list) if list.len() > CHARS_MAX => return format!("a list of {}", list.len()),
        Value::Object(map) if map.len() > CHARS_MAX => return format!("an object of {} fields", map.len()),
        value => value.to_string(),
    };
    match json.char_indices().nth(CHARS_MAX) {
        Some((end, _)) => format!("{}…", &json[..end]),
        None => json,
    }
}
