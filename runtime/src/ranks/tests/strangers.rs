//! Connections that are not ranks, and the hello parser against arbitrary bytes.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use super::super::error::PeerError;
use super::super::hello::{self, Channel, MAGIC, Opening, OpeningError, VERSION};
use super::{identity, listeners, random, seconds, start};

/// A hello's preamble that announces `length` bytes.
fn preamble(version: u32, length: u32) -> Vec<u8> {
    [&MAGIC[..], &version.to_le_bytes(), &[1], &length.to_le_bytes()].concat()
}

#[test]
fn strangers_do_not_end_a_start() {
    let (mut held, places) = listeners(2);
    let (one, zero) = (held.pop().unwrap(), held.pop().unwrap());
    let send = |bytes: &[u8]| {
        let mut stream = TcpStream::connect(&places[0]).unwrap();
        stream.write_all(bytes).unwrap();
        stream
    };
    // More silent callers than the listener keeps, then callers with something wrong to say.
    let silent: Vec<TcpStream> = (0..70).map(|_| send(&[])).collect();
    let kept = [
        send(b"GET / HTTP/1.1\r\n\r\n"),
        send(&preamble(VERSION, 1 << 31)),
        send(&preamble(VERSION, 0)),
        send(&[preamble(VERSION, 3), vec![0, 0, 0]].concat()),
        send(&preamble(VERSION, 200)[..15]),
    ];
    std::thread::scope(|scope| {
        let zero = scope.spawn(|| start(identity(0, 2), zero, &places, seconds(20)));
        start(identity(1, 2), one, &places, seconds(20)).unwrap();
        zero.join().unwrap().unwrap();
    });
    drop((silent, kept));
}

#[test]
fn a_missing_rank_is_reported_with_the_stranger_that_came() {
    let (mut held, places) = listeners(2);
    let mut deadlines = seconds(20);
    deadlines.connect = Duration::from_millis(400);
    let mut stranger = TcpStream::connect(&places[0]).unwrap();
    stranger.write_all(&preamble(VERSION, 1 << 31)).unwrap();
    let result = start(identity(0, 2), held.remove(0), &places, deadlines);
    let told = result.unwrap_err().to_string();
    let from = stranger.local_addr().unwrap();
    assert!(told.contains(&format!("only {from} with a hello of 2147483648 bytes")), "{told}");
}

#[test]
fn another_version_ends_the_start_on_both_sides() {
    let (mut held, places) = listeners(2);
    let mut other = TcpStream::connect(&places[0]).unwrap();
    other.write_all(&preamble(VERSION + 1, 0)).unwrap();
    let result = start(identity(0, 2), held.remove(0), &places, seconds(20));
    match result {
        Err(PeerError::Version { found, expected, .. }) => {
            assert_eq!((found, expected), (VERSION + 1, VERSION));
        }
        other => panic!("{other:?}"),
    }
    let mut answer = Vec::new();
    other.read_to_end(&mut answer).unwrap();
    assert_eq!(answer[..12], preamble(VERSION, 0)[..12]);
}

/// What rank 1 says when the program at rank 0's address answers with `bytes` and closes.
fn call_against(bytes: &[u8]) -> PeerError {
    let (mut held, places) = listeners(2);
    let (one, zero) = (held.pop().unwrap(), held.pop().unwrap());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut stream, _) = zero.accept().unwrap();
            // The hello is read, so that closing sends no reset that could overtake the answer.
            let mut hello = vec![0; identity(1, 2).encode(Channel::Collective, 0).len()];
            stream.read_exact(&mut hello).unwrap();
            stream.write_all(bytes).unwrap();
        });
        start(identity(1, 2), one, &places, seconds(20)).unwrap_err()
    })
}

#[test]
fn a_called_stranger_is_an_error_at_once() {
    let error = call_against(b"SSH-2.0-OpenSSH_9.6\r\n");
    assert!(matches!(error, PeerError::NotARank { .. }), "{error}");
    let error = call_against(&preamble(VERSION, 1 << 31));
    assert!(matches!(error, PeerError::FrameTooLong { found: 0x8000_0000, .. }), "{error}");
    let error = call_against(&preamble(VERSION + 3, 0));
    assert!(matches!(error, PeerError::Version { .. }), "{error}");
    let error = call_against(&[preamble(VERSION, 2), vec![0; 2]].concat());
    assert!(matches!(error, PeerError::Message { .. }), "{error}");
    let error = call_against(&preamble(VERSION, 200));
    assert!(matches!(error, PeerError::Lost { .. }), "{error}");
    let error = call_against(b"");
    assert!(matches!(error, PeerError::Lost { .. }), "{error}");
}

#[test]
fn a_hello_reads_back() {
    let mut sent = identity(2, 5);
    sent.port = 40_961;
    let bytes = sent.encode(Channel::Control, 1);
    assert_eq!(hello::frame_bytes(&bytes), Ok(Some(bytes.len())));
    let Ok(Opening::Hello(read)) = hello::decode(&bytes) else { panic!() };
    assert_eq!((read.channel, read.to), (Channel::Control, 1));
    assert_eq!((read.from.rank, read.from.tp, read.from.port), (2, 5, 40_961));
    assert_eq!(read.from.facts, sent.facts);
    assert_eq!(read.from.token.as_bytes(), sent.token.as_bytes());
    for end in 0..hello::PREAMBLE_BYTES {
        assert_eq!(hello::frame_bytes(&bytes[..end]), Ok(None), "{end}");
    }
    assert_eq!(hello::frame_bytes(b"dsv5"), Err(OpeningError::Magic));
}

#[test]
fn no_bytes_make_the_parser_panic_or_read_past_a_hello() {
    let valid = identity(1, 4).encode(Channel::Collective, 0);
    let mut decoded = 0;
    for seed in 0..20_000u64 {
        let mut state = 0;
        let mut next = |below: usize| {
            state += 1;
            random(seed, state) as usize % below
        };
        let mut bytes = valid.clone();
        match seed % 3 {
            // Noise behind a right mark and version.
            0 => bytes[12..].iter_mut().for_each(|byte| *byte = next(256) as u8),
            // A valid hello with a few changed bytes.
            1 => (0..=next(4)).for_each(|_| bytes[next(valid.len())] = next(256) as u8),
            // A valid hello, cut or extended.
            _ => bytes.resize(next(2 * valid.len()), 0xff),
        }
        if let Ok(Some(whole)) = hello::frame_bytes(&bytes) {
            assert!(whole <= hello::PREAMBLE_BYTES + hello::BODY_BYTES_MAX as usize);
        }
        decoded += usize::from(hello::decode(&bytes).is_ok());
    }
    // Some changes touch only the token, the ports or a fact, and some change nothing.
    assert!((1..20_000 / 2).contains(&decoded), "{decoded}");
}
