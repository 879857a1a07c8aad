//! Valid headers, indexes, configs and keys with pieces moved, repeated, cut out and put in: refused with a
//! reason or understood, never a panic. (One text at a time inside the parser: `checkpoint/header.rs`.)

use std::fs;
use std::path::Path;

use dsv4c::checkpoint::Checkpoint;
use dsv4c::sign::{Verifier, keygen};

use crate::fixture::{NANO, Shard, copy};

const CHECKPOINT_CASES: u64 = 1500;
const KEY_CASES: u64 = 3000;

struct Noise(u64);

impl Noise {
    fn new(case: u64) -> Noise {
        Noise((case + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16) as usize % n.max(1)
    }
}

/// What JSON and these files are made of.
const WORDS: [&[u8]; 14] = [
    b"\"",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"0",
    b"18446744073709551615",
    b"-1",
    b"1e400",
    b"null",
    b"\\u0000",
    b"\xff",
];

/// One to three changes; half of the places lie just behind a quote, a comma or a colon.
fn mutate(noise: &mut Noise, bytes: &mut Vec<u8>) {
    for _ in 0..1 + noise.below(3) {
        let mut at = noise.below(bytes.len() + 1);
        if noise.below(2) == 0 {
            let marks = bytes[at..].iter().position(|b| b"\",:[".contains(b));
            at += marks.map_or(0, |mark| mark + 1);
        }
        let len = [1, 2, 8, 60][noise.below(4)].min(bytes.len() - at);
        let to = noise.below(bytes.len() + 1);
        let piece: Vec<u8> = bytes[at..at + len].to_vec();
        match noise.below(6) {
            0 => drop(bytes.drain(at..at + len)),
            1 => drop(bytes.splice(to..to, piece)),
            2 => drop(bytes.splice(at..at, piece)),
            3 => drop(bytes.splice(at..at + len.min(2), WORDS[noise.below(WORDS.len())].iter().copied())),
            4 if at < bytes.len() => bytes[at] ^= 1 << noise.below(8),
            _ if noise.below(20) == 0 => bytes.truncate(at),
            _ => drop(bytes.splice(at..at, WORDS[noise.below(WORDS.len())].iter().copied())),
        }
    }
}

/// In memory, where thousands of files are written in seconds.
fn fast_dir() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// A shard of `header` whose data is a hole: opening reads none.
fn write_shard(path: &Path, header: &[u8], data_bytes: usize) {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header);
    let length = bytes.len() + data_bytes;
    fs::write(path, bytes).unwrap();
    fs::File::options().write(true).open(path).unwrap().set_len(length as u64).unwrap();
}

#[test]
fn a_checkpoint_of_moved_pieces_is_understood_or_refused() {
    let temp = fast_dir();
    let dir = copy(NANO, &temp.path().join("nano"));
    let shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    let whole = shards.map(|name| Shard::read(&dir.join(name)));
    let texts = ["config.json", "model.safetensors.index.json"].map(|name| (name, fs::read(dir.join(name)).unwrap()));
    for (name, shard) in shards.iter().zip(&whole) {
        write_shard(&dir.join(name), shard.header.as_bytes(), shard.data.len());
    }
    Checkpoint::open(&dir).unwrap();
    let (mut understood, mut refused) = (0, 0);
    for case in 0..CHECKPOINT_CASES {
        let mut noise = Noise::new(case);
        let which = noise.below(4);
        match which {
            0 | 1 => {
                let mut header = whole[which].header.clone().into_bytes();
                mutate(&mut noise, &mut header);
                write_shard(&dir.join(shards[which]), &header, whole[which].data.len());
            }
            _ => {
                let (name, mut bytes) = texts[which - 2].clone();
                mutate(&mut noise, &mut bytes);
                fs::write(dir.join(name), bytes).unwrap();
            }
        }
        match Checkpoint::open(&dir) {
            Ok(_) => understood += 1,
            Err(error) => {
                let text = error.to_string();
                assert!(text.contains("\n  help: ") && error.exit_code() == 3, "case {case}: {text}");
                let names = [shards[0], shards[1], texts[0].0, texts[1].0, "nano"];
                assert!(names.iter().any(|name| text.contains(name)), "case {case}: no file in: {text}");
                assert!(text.len() < 32 << 10, "case {case}: {} bytes of message", text.len());
                refused += 1;
            }
        }
        match which {
            0 | 1 => write_shard(&dir.join(shards[which]), whole[which].header.as_bytes(), whole[which].data.len()),
            _ => fs::write(dir.join(texts[which - 2].0), &texts[which - 2].1).unwrap(),
        }
    }
    println!("{understood} understood, {refused} refused");
    // White space, words of config.json that are not used here.
    assert!(understood > 0 && refused > CHECKPOINT_CASES / 2, "{understood} and {refused}");
    Checkpoint::open(&dir).unwrap();
}

#[test]
fn a_public_key_of_moved_pieces_is_none_or_another() {
    let temp = fast_dir();
    let key = keygen(&temp.path().join("mine")).unwrap();
    let whole = fs::read(&key.public).unwrap();
    let file = temp.path().join("other.pub");
    let mut read = 0;
    for case in 0..KEY_CASES {
        let mut bytes = whole.clone();
        mutate(&mut Noise::new(case), &mut bytes);
        fs::write(&file, bytes).unwrap();
        match Verifier::read(&file) {
            // The comment is anything; a digit of the key may be another.
            Ok(_) => read += 1,
            Err(error) => assert!(error.to_string().contains("\n  help: "), "case {case}: {error}"),
        }
    }
    assert!((1..KEY_CASES).contains(&read), "{read}");
}
