//! Token ids back to text, at once or as they arrive.
//!
//! Accepted are the decoders that give every token bytes of its own, whatever its neighbours are, and treat at
//! most the beginning of the text apart: only of these can text be shown before all of it is there. They are
//! `ByteLevel`, and in this order, each of them optional: `Replace` with a string pattern, `ByteFallback`, `Fuse`,
//! a `Strip` that cuts nothing at the end. Refused are those that change earlier text when more comes
//! (`WordPiece`, `CTC`, `BPEDecoder`) or treat a token by its place (`Metaspace`, a missing decoder).
//!
//! Added tokens stand for themselves. Bytes that are no UTF-8 become U+FFFD, one for every maximal part of a
//! character.

use std::sync::Arc;

use serde_json::Value;

use super::Tokenizer;
use super::error::TokenizerError;
use super::rules::unsupported;

const DECODERS_TEXT: &str =
    "ByteLevel, or a Sequence of Replace (of a string), ByteFallback, Fuse and Strip (of the beginning), in this order";

/// A file's decoder.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Decoder {
    byte_level: bool,
    replacements: Vec<(String, String)>,
    byte_fallback: bool,
    /// A character and how many of it are cut off the beginning of a text.
    strip: Option<(char, usize)>,
}

impl Decoder {
    pub(super) fn parse(file: &Value) -> Result<Decoder, TokenizerError> {
        let mut decoder = Decoder::default();
        let mut fused = false;
        let root = std::slice::from_ref(file);
        let (steps, sequence) = match file["decoders"].as_array() {
            Some(steps) if file["type"] == "Sequence" => (steps.as_slice(), true),
            _ => (root, false),
        };
        for (i, step) in steps.iter().enumerate() {
            if !decoder.take(step, &mut fused, i == 0) {
                let place = if sequence { format!("decoder.decoders[{i}]") } else { "decoder".to_owned() };
                return Err(unsupported(&place, step, DECODERS_TEXT));
            }
        }
        Ok(decoder)
    }

    /// Adds a step, unless it is of another kind or stands where it would mean something else.
    fn take(&mut self, step: &Value, fused: &mut bool, first: bool) -> bool {
        match step["type"].as_str() {
            Some("ByteLevel") if first => {
                self.byte_level = true;
                *fused = true;
            }
            Some("Replace") if !*fused && !self.byte_fallback => {
                let (Some(pattern), Some(content)) = (step["pattern"]["String"].as_str(), step["content"].as_str())
                else {
                    return false;
                };
                if pattern.is_empty() {
                    return false;
                }
                self.replacements.push((pattern.to_owned(), content.to_owned()));
            }
            Some("ByteFallback") if !*fused => self.byte_fallback = true,
            Some("Fuse") => *fused = true,
            Some("Strip") if *fused && self.strip.is_none() && step["stop"] == 0 => {
                let mut content = step["content"].as_str().unwrap_or_default().chars();
                let (Some(c), None, Some(start)) = (content.next(), content.next(), step["start"].as_u64()) else {
                    return false;
                };
                self.strip = Some((c, usize::try_from(start).unwrap_or(usize::MAX)));
            }
            _ => return false,
        }
        true
    }

    /// The bytes of a vocabulary's tokens, in the order of `texts`.
    pub(super) fn bytes_of<'a>(&self, texts: impl Iterator<Item = &'a str>) -> Vec<Vec<u8>> {
        let alphabet = byte_alphabet();
        texts.map(|text| self.token_bytes(text, &alphabet)).collect()
    }

    fn token_bytes(&self, text: &str, alphabet: &[char]) -> Vec<u8> {
        if self.byte_level {
            return byte_level_bytes(text, alphabet);
        }
        let mut text = text.to_owned();
        for (pattern, content) in &self.replacements {
            text = text.replace(pattern, content);
        }
        match fallback_byte(&text) {
            Some(byte) if self.byte_fallback => vec![byte],
            _ => text.into_bytes(),
        }
    }

    pub(super) fn start(&self) -> Beginning {
        Beginning { strip: self.strip }
    }
}

/// What is still to be cut off the beginning of a text.
#[derive(Debug)]
pub(super) struct Beginning {
    strip: Option<(char, usize)>,
}

impl Beginning {
    /// Cuts the text's next part.
    pub(super) fn cut(&mut self, part: &mut String) {
        let Some((content, left)) = &mut self.strip else { return };
        let matching = part.chars().take(*left).take_while(|c| c == content).count();
        part.drain(..matching * content.len_utf8());
        *left -= matching;
        if !part.is_empty() {
            self.strip = None;
        }
    }
}

/// Decodes one sequence as its tokens arrive; the parts join to `Tokenizer::decode` of all of them.
///
/// A part never ends inside a character. The cost of a token does not depend on how many came before.
#[derive(Debug)]
pub struct TextStream {
    tokenizer: Arc<Tokenizer>,
    skip_special: bool,
    beginning: Beginning,
    /// The beginning of a character, at most 3 bytes between calls.
    bytes: Vec<u8>,
}

impl TextStream {
    pub(super) fn new(tokenizer: &Arc<Tokenizer>, skip_special: bool) -> TextStream {
        let beginning = tokenizer.decoder.start();
        TextStream { tokenizer: Arc::clone(tokenizer), skip_special, beginning, bytes: Vec::new() }
    }

    /// Takes the next token; returns the text that it completes, if any.
    pub fn push(&mut self, token: u32) -> Option<String> {
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
        self.show(out)
    }

    /// No more tokens will come; returns what was held back (U+FFFD for a character without its end).
    pub fn finish(&mut self) -> Option<String> {
        let rest = String::from_utf8_lossy(&std::mem::take(&mut self.bytes)).into_owned();
        self.show(rest)
    }

    fn show(&mut self, mut part: String) -> Option<String> {
        self.beginning.cut(&mut part);
        (!part.is_empty()).then_some(part)
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
fn byte_level_bytes(text: &str, alphabet: &[char]) -> Vec<u8> {
    let byte = |c: char| match c as u32 {
        // The shifted characters have no gap, so only 0..=255 and 256..=323 can occur.
        code @ 0..=0xff => (alphabet.get(code as usize) == Some(&c)).then_some(code as u8),
        _ => alphabet.iter().position(|a| *a == c).map(|byte| byte as u8),
    };
    text.chars().map(byte).collect::<Option<Vec<u8>>>().unwrap_or_else(|| text.as_bytes().to_vec())
}

/// The byte of a token `<0x..>`.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}
