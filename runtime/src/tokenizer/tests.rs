//! Texts and ids against the golden files, and streams against whole texts.

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

pub(super) fn streamed(tokenizer: &Arc<Tokenizer>, ids: &[u32], skip_special: bool) -> String {
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
    let single = |byte: &u8| (0..tokenizer.vocab_size()).find(|id| tokenizer.token_bytes(*id) == Some(&[*byte][..]));
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
pub(super) fn word_tokenizer() -> Value {
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
fn word_vocabularies_decode() {
    let json = serde_json::to_vec(&word_tokenizer()).expect("JSON");
    let tokenizer = Arc::new(Tokenizer::from_bytes(&json).expect("valid"));
    let ids = tokenizer.encode_plain("a a🎉 a", true).expect("ids");
    assert_eq!(ids, [2, 2, 3, 4, 5, 6, 2]);
    let mut stream = tokenizer.stream(false);
    let parts: Vec<_> = ids.iter().map(|id| stream.push(*id)).collect();
    let part = |s: &str| Some(s.to_owned());
    assert_eq!(parts, [part("a"), part(" a"), None, None, None, part("🎉"), part(" a")]);
    assert_eq!(tokenizer.decode(&ids, false), "a a🎉 a");
}
