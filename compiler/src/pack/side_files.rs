//! The small files beside config.json that go into the artifact, judged before any weight is read.
//!
//! They are carried byte for byte. Judged is what would otherwise show only when the artifact is
//! used: that they are JSON, and that tokens and the model's vocabulary fit together. How text is
//! cut into tokens is the runtime's business.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use dsv4_model::ModelConfig;
use serde::de::{DeserializeOwned, IgnoredAny};

use crate::checkpoint::Checkpoint;
use crate::error::CompileError;

const TOKENIZER: &str = "tokenizer.json";
const OTHERS: [&str; 2] = ["tokenizer_config.json", "generation_config.json"];

#[derive(serde::Deserialize)]
struct Tokenizer {
    model: Model,
    #[serde(default)]
    added_tokens: Vec<Added>,
}

#[derive(serde::Deserialize)]
struct Model {
    vocab: BTreeMap<String, u64>,
}

#[derive(serde::Deserialize)]
struct Added {
    id: u64,
}

/// Those that are there, with their bytes.
///
/// Errors: [`CompileError::SideFile`] naming the file and the field.
pub fn read(checkpoint: &Checkpoint) -> Result<Vec<(String, Vec<u8>)>, CompileError> {
    let files = checkpoint.side_files(&[TOKENIZER, OTHERS[0], OTHERS[1]])?;
    for (name, bytes) in &files {
        let path = checkpoint.dir().join(name);
        if name == TOKENIZER {
            check_tokens(&json(bytes, &path)?, &checkpoint.config().model, &path)?;
        } else {
            json::<HashMap<String, IgnoredAny>>(bytes, &path)?;
        }
    }
    Ok(files)
}

fn json<T: DeserializeOwned>(bytes: &[u8], file: &Path) -> Result<T, CompileError> {
    let fault = |e: serde_json::Error| fault(file, "text".into(), "JSON of such a file".into(), e.to_string());
    serde_json::from_slice(bytes).map_err(fault)
}

/// Every token has a row of the embedding, and the ids that config.json names are tokens.
fn check_tokens(tokenizer: &Tokenizer, config: &ModelConfig, file: &Path) -> Result<(), CompileError> {
    let vocab = tokenizer.model.vocab.iter().map(|(token, id)| (format!("model.vocab[{token:?}]"), *id));
    let added = tokenizer.added_tokens.iter().enumerate().map(|(n, t)| (format!("added_tokens[{n}].id"), t.id));
    let mut ids = HashSet::new();
    let mut largest: Option<(String, u64)> = None;
    for (at, id) in vocab.chain(added) {
        ids.insert(id);
        if largest.as_ref().is_none_or(|(_, most)| id > *most) {
            largest = Some((at, id));
        }
    }
    if let Some((at, id)) = largest.filter(|(_, id)| *id >= config.vocab_size) {
        let expected = format!("an id below vocab_size = {} of config.json", config.vocab_size);
        return Err(fault(file, at, expected, id.to_string()));
    }
    for (field, id) in [("bos_token_id", config.bos_token_id), ("eos_token_id", config.eos_token_id)] {
        if !ids.contains(&id) {
            let expected = format!("a token with the id {id}, the {field} of config.json");
            return Err(fault(file, "model.vocab and added_tokens".into(), expected, "none".into()));
        }
    }
    Ok(())
}

fn fault(file: &Path, at: String, expected: String, found: String) -> CompileError {
    CompileError::SideFile { file: file.to_path_buf(), at, expected, found }
}
