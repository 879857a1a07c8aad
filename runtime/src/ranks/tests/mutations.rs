//! Hellos with pieces moved, repeated, cut out and put in, behind a length that is right for what there is
//! then. (Changed bytes and cut hellos: `strangers.rs`.)

use super::super::hello::{
    self, BODY_BYTES_MAX, Channel, FACT_BYTES_MAX, FACTS_MAX, Identity, Opening, PREAMBLE_BYTES, Refusal, Token,
};
use super::random;

const CASES: u64 = 40_000;

fn valid(facts: usize) -> Vec<u8> {
    let facts = (0..facts).map(|i| (format!("fact_{i}"), "value".repeat(1 + i % 7))).collect();
    Identity { rank: 1, tp: 4, token: Token::new([7; 32]), facts, port: 40_961 }.encode(Channel::Control, 2)
}

#[test]
fn a_hello_of_moved_pieces_is_read_as_what_it_says_or_refused() {
    let wholes = [valid(0), valid(3), valid(32)];
    let (mut read, mut refused) = (0u64, 0);
    for case in 0..CASES {
        let mut count = 0;
        let mut below = |n: usize| {
            count += 1;
            random(case, count) as usize % n.max(1)
        };
        let mut body = wholes[case as usize % 3][PREAMBLE_BYTES..].to_vec();
        for _ in 0..1 + below(3) {
            let (at, to) = (below(body.len() + 1), below(body.len() + 1));
            let len = [1, 4, 12, 300][below(4)].min(body.len() - at);
            let piece: Vec<u8> = body[at..at + len].to_vec();
            match below(5) {
                0 => drop(body.drain(at..at + len)),
                1 => drop(body.splice(to..to, piece)),
                2 => body[at..at + len].fill([0, 1, 0x80, 0xff][below(4)]),
                3 => body.truncate(at),
                _ => {
                    let number = [0, 1, 2, 31, 32, 33, 256, 257, 1 << 20, u32::MAX][below(10)];
                    drop(body.splice(at..(at + 4).min(body.len()), number.to_le_bytes()));
                }
            }
        }
        let mut bytes = wholes[0][..PREAMBLE_BYTES].to_vec();
        bytes[13..].copy_from_slice(&(body.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&body);
        match hello::frame_bytes(&bytes) {
            Ok(whole) => assert_eq!(whole, Some(bytes.len()), "case {case}"),
            Err(_) => assert!(body.len() > BODY_BYTES_MAX as usize, "case {case}"),
        }
        match hello::decode(&bytes) {
            Ok(Opening::Hello(hello)) => {
                // One content, one encoding: nothing hides in a hello.
                assert_eq!(hello.from.encode(hello.channel, hello.to), bytes, "case {case}");
                let facts = &hello.from.facts;
                let longest = facts.iter().flat_map(|(name, value)| [name.len(), value.len()]).max().unwrap_or(0);
                assert!(facts.len() <= FACTS_MAX as usize && longest <= FACT_BYTES_MAX as usize, "case {case}");
                read += 1;
            }
            Ok(Opening::Refused(_)) => panic!("case {case}: a hello is no refusal"),
            Err(_) => refused += 1,
        }
    }
    println!("{read} read, {refused} refused");
    assert!(read > CASES / 100 && refused > CASES / 2, "{read} and {refused}");
}

#[test]
fn a_refusal_reads_back_and_its_alterations_are_others() {
    for refusal in [Refusal::Version, Refusal::Token, Refusal::Duplicate] {
        let whole = refusal.encode();
        assert!(matches!(hello::decode(&whole), Ok(Opening::Refused(found)) if found == refusal));
        for at in 0..whole.len() {
            assert!(hello::decode(&whole[..at]).is_err(), "{at} bytes");
            for bit in 0..8 {
                let mut bytes = whole.clone();
                bytes[at] ^= 1 << bit;
                if let Ok(Opening::Refused(found)) = hello::decode(&bytes) {
                    assert!(at == whole.len() - 1 && found != refusal, "byte {at}, bit {bit}");
                }
            }
        }
        let mut longer = whole.clone();
        longer.push(0);
        assert!(hello::decode(&longer).is_err(), "a byte behind the frame");
        let length = whole.len() - 5;
        longer[length] += 1;
        assert!(hello::decode(&longer).is_err(), "a byte behind the reason");
    }
}
