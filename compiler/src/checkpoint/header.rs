//! The header of one safetensors file, read strictly: a file that passes is covered by its tensors
//! from the first data byte to the last, each exactly once.
//!
//! The header is bounded before it is read; what is allocated is bounded by its length.

use std::collections::HashSet;
use std::fmt;
use std::path::Path;

use dsv4_format::io::DirectFile;
use safetensors::Dtype;
use serde::de::{Deserialize, Deserializer, Error, IgnoredAny, MapAccess, Visitor};

use crate::error::CompileError;

/// The format's own limit on the JSON text, in bytes.
const HEADER_BYTES_MAX: u64 = 100_000_000;
/// Of the length that precedes the text.
const LENGTH_BYTES: u64 = 8;
const DIMS_MAX: usize = 8;

/// One tensor of a shard.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Name in the header.
    pub name: String,
    /// Number format.
    pub dtype: Dtype,
    /// Shape as stored.
    pub shape: Vec<u64>,
    /// Of the first byte, from the start of the file.
    pub offset: u64,
    /// Length in bytes.
    pub bytes: u64,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEntry {
    dtype: Dtype,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// The JSON object of a header, in its order; no name twice.
struct RawHeader(Vec<(String, RawEntry)>);

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut entries = Vec::new();
                let mut seen = HashSet::new();
                while let Some(name) = map.next_key::<String>()? {
                    if !seen.insert(name.clone()) {
                        return Err(A::Error::custom(format!("the name {name:?} twice")));
                    }
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    let entry = map.next_value().map_err(|e| A::Error::custom(format!("{name}: {e}")))?;
                    entries.push((name, entry));
                }
                Ok(RawHeader(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// Reads and checks the header of `file`. Tensors come in the order of their bytes.
///
/// Errors: [`CompileError::Header`], [`CompileError::Truncated`], or the read's own.
pub fn read(file: &DirectFile) -> Result<Vec<Entry>, CompileError> {
    let path = file.path();
    let fault = |expected: &str, found: String| CompileError::Header {
        file: path.to_path_buf(),
        at: "length".into(),
        expected: expected.into(),
        found,
    };
    if file.len() < LENGTH_BYTES {
        return Err(fault("at least 8 bytes", format!("{} bytes", file.len())));
    }
    let mut length = [0; LENGTH_BYTES as usize];
    file.read_exact_at(&mut length, 0)?;
    let length = u64::from_le_bytes(length);
    if length > HEADER_BYTES_MAX {
        return Err(fault("at most 100000000 bytes", format!("{length} bytes")));
    }
    if length > file.len() - LENGTH_BYTES {
        return Err(CompileError::Truncated {
            file: path.to_path_buf(),
            expected: LENGTH_BYTES + length,
            found: file.len(),
        });
    }
    let mut text = vec![0; length as usize];
    file.read_exact_at(&mut text, LENGTH_BYTES)?;
    parse(path, &text, file.len() - LENGTH_BYTES - length)
}

/// Checks a header's `text` against the `data_bytes` that follow it in the file.
pub(crate) fn parse(path: &Path, text: &[u8], data_bytes: u64) -> Result<Vec<Entry>, CompileError> {
    let fault = |at: &str, expected: String, found: String| CompileError::Header {
        file: path.to_path_buf(),
        at: at.into(),
        expected,
        found,
    };
    let RawHeader(mut raw) = serde_json::from_slice(text)
        .map_err(|e| fault("text", "a JSON object of tensors, each once".into(), e.to_string()))?;
    raw.sort_by_key(|(_, entry)| entry.data_offsets);
    let data_start = LENGTH_BYTES + text.len() as u64;
    let mut end = 0;
    let mut entries = Vec::with_capacity(raw.len());
    for (name, entry) in raw {
        let [first, last] = entry.data_offsets;
        if entry.shape.len() > DIMS_MAX {
            let found = entry.shape.len().to_string();
            return Err(fault(&name, format!("at most {DIMS_MAX} dimensions"), found));
        }
        let bytes = size(&entry)
            .ok_or_else(|| fault(&name, "whole bytes, fewer than 2^64".into(), format!("shape {:?}", entry.shape)))?;
        if last.checked_sub(first) != Some(bytes) {
            let expected = format!("{bytes} bytes for {} {:?}", entry.dtype, entry.shape);
            return Err(fault(&name, expected, format!("data_offsets [{first}, {last}]")));
        }
        if first != end {
            let what = if first < end { "overlaps" } else { "a hole before it" };
            return Err(fault(
                &name,
                format!("data from byte {end} on"),
                format!("{what}: data_offsets [{first}, {last}]"),
            ));
        }
        end = last;
        entries.push(Entry {
            name,
            dtype: entry.dtype,
            shape: entry.shape,
            offset: data_start.saturating_add(first),
            bytes,
        });
    }
    if end > data_bytes {
        let found = data_start + data_bytes;
        return Err(CompileError::Truncated {
            file: path.to_path_buf(),
            expected: data_start.saturating_add(end),
            found,
        });
    }
    if end < data_bytes {
        let found = format!("{data_bytes} bytes of data");
        return Err(fault("end of the file", format!("{end} bytes of data"), found));
    }
    Ok(entries)
}

/// Bytes of a tensor, or nothing if they overflow or are not whole.
fn size(entry: &RawEntry) -> Option<u64> {
    let elements = entry.shape.iter().try_fold(1u64, |n, dim| n.checked_mul(*dim))?;
    let bits = elements.checked_mul(entry.dtype.bitsize() as u64)?;
    bits.is_multiple_of(8).then_some(bits / 8)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parsed(text: &str, data_bytes: u64) -> Result<Vec<Entry>, String> {
        parse(Path::new("shard"), text.as_bytes(), data_bytes).map_err(|e| e.to_string())
    }

    const GOOD: &str = r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[2,3],"data_offsets":[4,16]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}  "#;

    #[test]
    fn tensors_come_in_the_order_of_their_bytes() {
        let entries = parsed(GOOD, 16).unwrap();
        let start = 8 + GOOD.len() as u64;
        let places: Vec<_> = entries.iter().map(|e| (e.name.as_str(), e.offset - start, e.bytes)).collect();
        assert_eq!(places, [("a", 0, 4), ("b", 4, 12)]);
        assert_eq!(entries[1].shape, [2, 3]);
    }

    #[test]
    fn every_contradiction_is_named() {
        let entry = |name: &str, dtype: &str, shape: &str, first: u64, last: u64| {
            format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{first},{last}]}}"#)
        };
        let a = entry("a", "F32", "[1]", 0, 4);
        for (text, data, expected) in [
            (format!("{{{a},{}}}", entry("b", "F32", "[1]", 8, 12)), 12, "a hole before it"),
            (format!("{{{a},{}}}", entry("b", "F32", "[1]", 2, 6)), 6, "overlaps"),
            (format!("{{{a},{a}}}"), 4, "\"a\" twice"),
            (format!("{{{}}}", entry("a", "F32", "[2]", 0, 4)), 4, "8 bytes for F32 [2]"),
            (format!("{{{}}}", entry("a", "F32", "[1]", 4, 0)), 4, "4 bytes for F32 [1]"),
            (format!("{{{}}}", entry("a", "F4", "[1]", 0, 0)), 0, "whole bytes"),
            (format!("{{{}}}", entry("a", "F33", "[1]", 0, 4)), 4, "a: unknown variant `F33`"),
            (format!("{{{}}}", entry("a", "U8", "[4294967296,4294967296,16]", 0, 4)), 4, "fewer than 2^64"),
            (format!("{{{}}}", entry("a", "U8", "[1,1,1,1,1,1,1,1,1]", 0, 1)), 1, "at most 8 dimensions"),
            (format!("{{{a}}}"), 3, "truncated: expected"),
            (format!("{{{a}}}"), 5, "end of the file: expected 4 bytes of data, found 5"),
            (format!("{{{a}}}x"), 4, "trailing characters"),
            ("[]".to_owned(), 0, "an object of tensors"),
        ] {
            let error = parsed(&text, data).unwrap_err();
            assert!(error.starts_with("shard: ") && error.contains(expected), "{text}\n{error}");
        }
    }

    proptest! {
        /// A damaged header is read as what it says or refused; it never panics.
        #[test]
        fn flipped_bits_are_read_or_refused(flips in proptest::collection::vec((0..GOOD.len(), 0u8..8), 1..6), data in 0u64..64) {
            let mut text = GOOD.as_bytes().to_vec();
            for (at, bit) in flips {
                text[at] ^= 1 << bit;
            }
            if let Ok(entries) = parse(Path::new("shard"), &text, data) {
                prop_assert_eq!(entries.iter().map(|e| e.bytes).sum::<u64>(), data);
            }
        }

        #[test]
        fn arbitrary_bytes_are_refused_or_cover_the_data(text in proptest::collection::vec(any::<u8>(), 0..200), data in 0u64..64) {
            if let Ok(entries) = parse(Path::new("shard"), &text, data) {
                prop_assert_eq!(entries.iter().map(|e| e.bytes).sum::<u64>(), data);
            }
        }
    }
}
