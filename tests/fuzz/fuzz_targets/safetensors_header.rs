//! The header of a shard, read from a file: what is accepted covers the data exactly.
//!
//! Input: length of the data (8 bytes, a hole in the file), then the file from its first byte.
#![no_main]

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::sync::OnceLock;

use dsv4_format::io::DirectFile;
use dsv4_fuzz::{scratch, seed_corpus};
use libfuzzer_sys::fuzz_target;

mod error {
    pub use dsv4c::CompileError;
}
#[path = "../../../compiler/src/checkpoint/header.rs"]
mod header;

/// Longest hole.
const DATA_BYTES_MAX: u64 = 1 << 40;
const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tiny/tiny.safetensors");

/// The first tensors of a real header, few and many.
fn seeds() -> Vec<Vec<u8>> {
    let whole = std::fs::read(TINY).expect("the tiny checkpoint");
    let length = u64::from_le_bytes(whole[..8].try_into().expect("8 bytes")) as usize;
    let all: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(&whole[8..8 + length]).expect("a header");
    let mut tensors: Vec<_> = all.into_iter().filter(|(name, _)| name != "__metadata__").collect();
    tensors.sort_by_key(|(_, entry)| entry["data_offsets"][0].as_u64());
    let seed = |count: usize| {
        let mut header = serde_json::Map::from_iter(tensors.iter().take(count).cloned());
        let end = tensors[count - 1].1["data_offsets"][1].as_u64().expect("an offset");
        if count == 2 {
            header.insert("__metadata__".into(), serde_json::json!({"format": "pt"}));
        }
        let text = serde_json::Value::Object(header).to_string();
        [&end.to_le_bytes()[..], &(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
    };
    [1, 2, 5, 20].map(seed).into()
}

fn file() -> &'static PathBuf {
    static FILE: OnceLock<PathBuf> = OnceLock::new();
    FILE.get_or_init(|| scratch().join("shard"))
}

fuzz_target!(init: seed_corpus(seeds), |input: &[u8]| {
    let Some((data, bytes)) = input.split_first_chunk::<8>() else { return };
    // No header lies in the hole: it would be one of a file that is as long as it says.
    let text = bytes.first_chunk::<8>().map_or(u64::MAX, |length| u64::from_le_bytes(*length));
    let has_text = text <= (bytes.len() as u64).saturating_sub(8);
    let data = if has_text { u64::from_le_bytes(*data) % DATA_BYTES_MAX } else { 0 };
    let mut out = File::create(file()).expect("a file");
    out.write_all(bytes).expect("room");
    out.set_len(bytes.len() as u64 + data).expect("a hole");
    drop(out);
    let shard = DirectFile::open(file()).expect("a file");
    match header::read(&shard) {
        Ok(entries) => {
            let mut end = 8 + text;
            for entry in &entries {
                assert_eq!(entry.offset, end, "{}", entry.name);
                end += entry.bytes;
            }
            assert_eq!(end, shard.len());
        }
        Err(error) => assert!(error.to_string().contains("\n  help: "), "{error}"),
    }
});
