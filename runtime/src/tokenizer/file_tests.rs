//! Files that are refused, and texts that files cannot encode.

use serde_json::{Value, json};

use super::test_files::{load, real_tokenizer};
use super::tests::{streamed, word_tokenizer};
use super::*;

fn bytes(file: &Value) -> Vec<u8> {
    serde_json::to_vec(file).expect("JSON")
}

/// A byte-level file with every byte a token, in which a test changes one thing.
fn byte_tokenizer() -> Value {
    let file = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/nano/tokenizer.json"));
    serde_json::from_slice(&file.expect("tokenizer.json")).expect("JSON")
}

fn refusal(file: &Value) -> String {
    Tokenizer::from_bytes(&bytes(file)).expect_err("must be refused").to_string()
}

/// The file with one part replaced, `part` a JSON pointer.
fn with(mut file: Value, part: &str, value: Value) -> Value {
    *file.pointer_mut(part).unwrap_or_else(|| panic!("{part}")) = value;
    file
}

#[track_caller]
fn assert_refused(file: &Value, beginning: &str) {
    let found = refusal(file);
    assert!(found.starts_with(&format!("tokenizer.json: {beginning}")), "{found}");
    assert!(found.contains("\n  help: "), "{found}");
}

#[test]
fn bad_files_are_refused() {
    let error = |json: &[u8]| Tokenizer::from_bytes(json).expect_err("must be refused").to_string();
    for json in [&b"{"[..], b"", b"[]", b"null", b"\xff"] {
        assert!(error(json).starts_with("tokenizer.json: cannot be read"), "{}", error(json));
    }
    assert_refused(&json!({}), "model.vocab is null, expected an object");
    let file = word_tokenizer();
    let set = |part: &str, value: Value| with(file.clone(), part, value);
    assert_refused(&set("/version", json!("2.0")), "cannot be read: Unknown tokenizer version '2.0'");
    assert_refused(&set("/model/type", json!("Unigram")), "model.type is \"Unigram\", expected \"BPE\"");
    assert_refused(&set("/model/vocab", json!([["a", 0.0]])), "model.vocab is [[\"a\",0.0]], expected an object");
    assert_refused(&set("/model/vocab/a", json!(-1)), "the id of token \"a\" is -1");
    assert_refused(&set("/added_tokens", json!({})), "added_tokens is {}, expected a list");
    assert_refused(&set("/added_tokens", json!([{"id": 0}])), "added_tokens[0].content is null");
}

#[test]
fn large_ids_are_refused() {
    let limit = u64::from(rules::ID_LIMIT);
    for id in [limit, 4_000_000_000, u64::MAX] {
        let expected = format!("token \"a\" has id {id}, expected an id below {limit}");
        assert_refused(&with(word_tokenizer(), "/model/vocab/a", json!(id)), &expected);
        let mut file = byte_tokenizer();
        file["added_tokens"][1]["id"] = json!(id);
        assert_refused(&file, &format!("token \"<｜end▁of▁sentence｜>\" has id {id}"));
    }
}

/// Each of these makes the tokenizers library panic, or join bytes that are no text.
#[test]
fn files_that_break_the_library_are_refused() {
    let set = |part: &str, value: Value| with(word_tokenizer(), part, value);
    let precompiled = json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"});
    assert_refused(&set("/normalizer", precompiled.clone()), "normalizer.type is \"Precompiled\", expected null, or");
    let nested = json!({"type": "Sequence", "normalizers": [{"type": "NFC"}, precompiled.clone()]});
    assert_refused(&set("/normalizer", nested), "normalizer.normalizers[1].type is \"Precompiled\"");
    let untagged = json!({"precompiled_charsmap": "AAAA"});
    assert_refused(&set("/normalizer", untagged), "normalizer is {\"precompiled_charsmap\":\"AAAA\"}");
    for kind in ["String", "Regex"] {
        let empty = json!({"type": "Replace", "pattern": {kind: ""}, "content": "x"});
        assert_refused(&set("/normalizer", empty), "normalizer.pattern is {");
    }
    let fixed = json!({"type": "FixedLength", "length": 0});
    assert_refused(&set("/pre_tokenizer", fixed), "pre_tokenizer.type is \"FixedLength\"");

    for prefix in ["a long prefix", "é"] {
        let file = set("/model/continuing_subword_prefix", json!(prefix));
        assert_refused(&file, "model.merges[0] is \"▁ a\", expected a second token that begins with");
    }
    for merge in [json!("▁a ▁a"), json!(["a", "b"]), json!("a"), json!("a  a"), json!(["a"]), json!(3)] {
        assert_refused(&set("/model/merges/0", merge.clone()), &format!("model.merges[0] is {merge}, expected"));
    }
    // Not looked at, so nothing can break in there.
    let file = set("/post_processor", json!({"type": "unknown"}));
    assert!(Tokenizer::from_bytes(&bytes(&file)).is_ok());
}

/// A file inside the rules whose normalizer panics on a text: the pattern is not empty, but matches nothing.
#[test]
fn panics_on_a_text_are_errors() {
    let empty_match = json!({"type": "Replace", "pattern": {"Regex": "a?"}, "content": "b"});
    let tokenizer =
        Tokenizer::from_bytes(&bytes(&with(byte_tokenizer(), "/normalizer", empty_match))).expect("inside the rules");
    for added in [true, false] {
        let found = tokenizer.encode_plain("xyz", added).expect_err("must fail").to_string();
        assert!(
            found.starts_with("tokenizer.json: text of 3 bytes cannot be encoded: the tokenizers library panicked: "),
            "{found}"
        );
    }
}

#[test]
fn dropout_is_refused() {
    for dropout in [json!(0.1), json!(1), json!(-0.5), json!("0")] {
        assert_refused(
            &with(word_tokenizer(), "/model/dropout", dropout.clone()),
            &format!("model.dropout is {dropout}"),
        );
    }
    for dropout in [json!(null), json!(0), json!(0.0)] {
        let json = bytes(&with(word_tokenizer(), "/model/dropout", dropout));
        assert_eq!(Tokenizer::from_bytes(&json).expect("no dropout").encode_plain("a", false).expect("ids"), [2]);
    }
}

#[test]
fn declared_ids_are_the_ids() {
    let nano = byte_tokenizer();
    let added = |entries: &[(&str, u64)]| {
        let entry = |(content, id): &(&str, u64)| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        };
        let mut file = nano.clone();
        let list = file["added_tokens"].as_array_mut().expect("a list");
        list.extend(entries.iter().map(entry));
        file
    };
    let size = load("nano").vocab_size();
    let after = u64::from(size);
    let tokenizer = Tokenizer::from_bytes(&bytes(&added(&[("<new>", after), ("<newer>", after + 1)]))).expect("valid");
    assert_eq!(tokenizer.encode_plain("<newer><new>", true).expect("ids"), [size + 1, size]);

    let found = |file: Value, expected: &str| assert_refused(&file, expected);
    // The library would go by the list's order.
    found(
        added(&[("<newer>", after + 1), ("<new>", after)]),
        &format!("token \"<newer>\" is declared with id {}, but is given id {after}", after + 1),
    );
    found(
        added(&[("<new>", after + 7)]),
        &format!("token \"<new>\" is declared with id {}, but is given id {after}", after + 7),
    );
    found(added(&[("<think>", after)]), &format!("token \"<think>\" is declared with id {after}, but is given id 5"));
    found(added(&[("", after)]), &format!("token \"\" is declared with id {after}, but is given none"));
    found(added(&[("<new>", 5)]), "id 5 is that of \"<new>\" and of \"<think>\"");

    let mut twice = word_tokenizer();
    twice["model"]["vocab"]["b"] = json!(1);
    assert_refused(&twice, "id 1 is that of \"b\" and of \"a\"");
}

/// The parts join to the whole, for the decoders that are accepted; the others are refused.
#[test]
fn decoders_that_change_earlier_text_are_refused() {
    let replace = json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "});
    let strip = |start: u64, stop: u64| json!({"type": "Strip", "content": " ", "start": start, "stop": stop});
    let (fuse, fallback) = (json!({"type": "Fuse"}), json!({"type": "ByteFallback"}));
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
    let sequence = |steps: Value| json!({"type": "Sequence", "decoders": steps});
    let refused = [
        (json!(null), "decoder is null"),
        (json!({"type": "WordPiece", "prefix": "##", "cleanup": true}), "decoder is {"),
        (json!({"type": "BPEDecoder", "suffix": "</w>"}), "decoder is {"),
        (json!({"type": "CTC", "pad_token": "a", "word_delimiter_token": "|", "cleanup": true}), "decoder is {"),
        (json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}), "decoder is {"),
        (json!({"type": "Replace", "pattern": {"Regex": "."}, "content": ""}), "decoder is {"),
        (json!({"type": "Replace", "pattern": {"String": ""}, "content": "x"}), "decoder is {"),
        // Across tokens, or at the end.
        (sequence(json!([fuse, replace])), "decoder.decoders[1] is {"),
        (sequence(json!([fuse, strip(0, 1)])), "decoder.decoders[1] is {"),
        (sequence(json!([fuse, fallback])), "decoder.decoders[1] is {"),
        (sequence(json!([fuse, strip(1, 0), strip(1, 0)])), "decoder.decoders[2] is {"),
        (sequence(json!([strip(1, 0)])), "decoder.decoders[0] is {"),
        (sequence(json!([fallback, replace])), "decoder.decoders[1] is {"),
        (sequence(json!([replace, byte_level])), "decoder.decoders[1] is {"),
    ];
    for (decoder, expected) in refused {
        assert_refused(&with(word_tokenizer(), "/decoder", decoder), expected);
    }

    let accepted = [
        sequence(json!([])),
        replace.clone(),
        fallback.clone(),
        sequence(json!([replace, fallback])),
        sequence(json!([replace, fallback, fuse, strip(1, 0)])),
        sequence(json!([replace, replace, fuse, strip(3, 0)])),
        sequence(json!([byte_level, fuse, strip(2, 0)])),
    ];
    let mut seed = 1u64;
    for decoder in accepted {
        let file = with(word_tokenizer(), "/decoder", decoder.clone());
        let tokenizer = Arc::new(Tokenizer::from_bytes(&bytes(&file)).expect("accepted"));
        let library = tokenizers::Tokenizer::from_bytes(bytes(&file)).expect("valid");
        for _ in 0..2000 {
            let ids: Vec<u32> = (0..8)
                .map(|_| {
                    seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    (seed >> 33) as u32 % 8
                })
                .collect();
            let whole = tokenizer.decode(&ids, false);
            assert_eq!(streamed(&tokenizer, &ids, false), whole, "{decoder}: {ids:?}");
            // Of broken characters the library shows more marks.
            let theirs = library.decode(&ids, false).expect("text");
            if !theirs.contains('\u{fffd}') {
                assert_eq!(whole, theirs, "{decoder}: {ids:?}");
            }
        }
    }
}

#[test]
fn text_without_tokens_is_an_error() {
    let text = |s: &str| [Piece::Text(s.to_owned())];
    let mut file = byte_tokenizer();
    file["model"]["vocab"] = json!({});
    file["model"]["merges"] = json!([]);
    file["added_tokens"] = json!([]);
    let empty = Tokenizer::from_bytes(&bytes(&file)).expect("an empty vocabulary");
    assert_eq!(empty.vocab_size(), 0);
    let found = empty.encode_pieces(&text("hello")).expect_err("no ids").to_string();
    assert!(
        found.starts_with("tokenizer.json: the vocabulary has no token for some of the text \"hello\"\n  help: "),
        "{found}"
    );
    assert!(empty.encode_pieces(&text("")).expect("nothing to encode").is_empty());

    // One character without a token is lost just as silently.
    let mut file = byte_tokenizer();
    let vocab = file["model"]["vocab"].as_object_mut().expect("an object");
    vocab.retain(|token, _| !token.contains('z'));
    file["model"]["merges"].as_array_mut().expect("a list").retain(|merge| !merge.to_string().contains('z'));
    let tokenizer = Tokenizer::from_bytes(&bytes(&file)).expect("valid");
    assert!(!tokenizer.encode_plain("a bog", true).expect("ids").is_empty());
    for lossy in ["z", "a zoo", "a cozy fez", "baz"] {
        let found = tokenizer.encode_plain(lossy, true).expect_err("no token").to_string();
        assert!(found.contains("no token for some of the text"), "{found}");
    }

    let strip = json!({"type": "Strip", "strip_left": true, "strip_right": true});
    let tokenizer = Tokenizer::from_bytes(&bytes(&with(byte_tokenizer(), "/normalizer", strip))).expect("valid");
    let found = tokenizer.encode_pieces(&text("  \n")).expect_err("no ids").to_string();
    assert!(found.starts_with("tokenizer.json: a text of 3 bytes gives no tokens"), "{found}");
    assert!(!tokenizer.encode_pieces(&text(" a ")).expect("ids").is_empty());
}

#[test]
fn the_tokenizer_must_be_the_models() {
    let nano = load("nano");
    let size = u64::from(nano.vocab_size());
    let refused = |tokenizer: &Tokenizer, vocab_size, bos, eos, expected: &str| {
        let found = tokenizer.check(vocab_size, bos, eos).expect_err("must be refused").to_string();
        assert!(found.starts_with(&format!("tokenizer.json: {expected}")), "{found}");
        assert!(found.contains("\n  help: "), "{found}");
    };
    nano.check(size, 0, 1).expect("the model's");
    nano.check(size + 1000, 0, 1).expect("a model may have more rows");
    let last = String::from_utf8_lossy(nano.token_bytes(nano.vocab_size() - 1).expect("a token")).into_owned();
    refused(
        &nano,
        size - 1,
        0,
        1,
        &format!("token {last:?} has id {}, but vocab_size in config.json is {}", size - 1, size - 1),
    );
    refused(&nano, size, 7, 1, "\"<｜begin▁of▁sentence｜>\" has id 0, but bos_token_id in config.json is 7");
    refused(
        &nano,
        size,
        0,
        1 << 33,
        "\"<｜end▁of▁sentence｜>\" has id 1, but eos_token_id in config.json is 8589934592",
    );

    let at = |token: &str| {
        let list = byte_tokenizer()["added_tokens"].as_array().expect("a list").clone();
        list.iter().position(|added| added["content"] == token).expect("an added token")
    };
    for token in [
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        "<｜User｜>",
        "<｜Assistant｜>",
        "<think>",
        "</think>",
        "｜DSML｜",
    ] {
        // In the vocabulary, so that its id stays, but not added.
        let mut file = byte_tokenizer();
        file["added_tokens"].as_array_mut().expect("a list").remove(at(token));
        let tokenizer = Tokenizer::from_bytes(&bytes(&file)).expect("valid");
        refused(&tokenizer, size, 0, 1, &format!("the control token {token:?} is an ordinary token of the vocabulary"));
        file["model"]["vocab"].as_object_mut().expect("an object").remove(token);
        let tokenizer = Tokenizer::from_bytes(&bytes(&file)).expect("valid");
        refused(&tokenizer, size, 0, 1, &format!("the control token {token:?} is missing"));
        for flag in ["single_word", "lstrip", "rstrip"] {
            let mut file = byte_tokenizer();
            file["added_tokens"][at(token)][flag] = json!(true);
            let tokenizer = Tokenizer::from_bytes(&bytes(&file)).expect("valid");
            refused(&tokenizer, size, 0, 1, &format!("the control token {token:?} is an added token with single_word"));
        }
    }
    if let Some(real) = real_tokenizer() {
        real.check(129_280, 0, 1).expect("the model's");
        refused(&real, 129_279, 0, 1, "token \"<｜image｜>\" has id 129279, but vocab_size");
    }
}

/// A long run of blanks does not reach the limits of the pattern engine, which stops without an error.
#[test]
fn long_runs_split_as_short_ones() {
    let tokenizer = load("nano");
    for unit in [" ", "\n", "é", "! "] {
        let text = format!("{}x", unit.repeat(1_200_000 / unit.len()));
        let ids = tokenizer.encode_plain(&text, false).expect("ids");
        assert_eq!(tokenizer.decode(&ids, false), text);
        let short = tokenizer.encode_plain(&format!("{}x", unit.repeat(64)), false).expect("ids");
        assert_eq!(ids.last(), short.last(), "{unit:?}");
    }
}
