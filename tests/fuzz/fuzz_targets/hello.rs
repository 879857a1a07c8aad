//! The first message between two ranks: never longer than stated, and one content has one encoding.
//!
//! The parser is private to dsv4-run; its source is compiled here, too.
#![no_main]

use dsv4_fuzz::seed_corpus;
use libfuzzer_sys::fuzz_target;

#[allow(dead_code)]
#[path = "../../../runtime/src/ranks/error.rs"]
mod error;
#[allow(dead_code)]
#[path = "../../../runtime/src/ranks/hello.rs"]
mod hello;
#[allow(dead_code)]
#[path = "../../../runtime/src/ranks/wire.rs"]
mod wire;

use hello::{BODY_BYTES_MAX, Channel, Facts, Identity, Opening, PREAMBLE_BYTES, Refusal, Token};

fn seeds() -> Vec<Vec<u8>> {
    let identity = |facts: Facts| Identity { rank: 1, tp: 4, token: Token::new([7; 32]), facts, port: 40_961 };
    let facts = |count: usize| (0..count).map(|i| (format!("fact_{i}"), "value".repeat(1 + i % 7))).collect();
    let mut seeds: Vec<Vec<u8>> = [0, 2, 32].map(|count| identity(facts(count)).encode(Channel::Collective, 0)).into();
    seeds.push(identity(facts(8)).encode(Channel::Control, 3));
    seeds.extend([Refusal::Version, Refusal::Token, Refusal::Duplicate].map(Refusal::encode));
    seeds
}

fuzz_target!(init: seed_corpus(seeds), |input: &[u8]| {
    let whole = match hello::frame_bytes(input) {
        Ok(Some(whole)) => whole,
        // More has to come, or nothing that could be a hello; the whole decoder agrees.
        _ => {
            assert!(hello::decode(input).is_err());
            return;
        }
    };
    assert!(whole <= PREAMBLE_BYTES + BODY_BYTES_MAX as usize);
    match hello::decode(input) {
        Ok(Opening::Hello(read)) => assert_eq!(read.from.encode(read.channel, read.to), input),
        Ok(Opening::Refused(refusal)) => assert_eq!(&refusal.encode()[..PREAMBLE_BYTES - 4], &input[..PREAMBLE_BYTES - 4]),
        Err(_) => {}
    }
});
