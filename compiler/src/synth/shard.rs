//! Writes one safetensors file front to back, past the page cache.

use std::collections::BTreeMap;
use std::path::Path;

use dsv4_format::io::{AlignedBuf, DIRECT_ALIGN, DirectFile};
use dsv4_model::tensors::StoredTensor;
use serde_json::json;

use crate::error::CompileError;

const BUFFER_BYTES: usize = 4 << 20;

/// Takes the bytes of the announced tensors, in order and without gaps.
pub struct ShardWriter {
    file: DirectFile,
    buffer: AlignedBuf,
    filled: usize,
    written: u64,
    /// Length of the finished file.
    total: u64,
}

impl ShardWriter {
    /// Creates the file, reserves its space and writes the header of `tensors`, which follow in this
    /// order.
    pub fn create<'a>(
        path: &Path,
        tensors: impl Iterator<Item = &'a StoredTensor>,
    ) -> Result<ShardWriter, CompileError> {
        let (header, data_bytes) = header(tensors);
        let total = header.len() as u64 + data_bytes;
        let mut writer = ShardWriter {
            file: DirectFile::create(path, total.next_multiple_of(DIRECT_ALIGN))?,
            buffer: AlignedBuf::new(BUFFER_BYTES)?,
            filled: 0,
            written: 0,
            total,
        };
        writer.append(&header)?;
        Ok(writer)
    }

    /// The next bytes.
    pub fn append(&mut self, mut bytes: &[u8]) -> Result<(), CompileError> {
        while !bytes.is_empty() {
            let part = bytes.len().min(BUFFER_BYTES - self.filled);
            self.buffer[self.filled..self.filled + part].copy_from_slice(&bytes[..part]);
            self.filled += part;
            bytes = &bytes[part..];
            if self.filled == BUFFER_BYTES {
                self.flush(BUFFER_BYTES)?;
            }
        }
        Ok(())
    }

    /// Writes the rest, rounded up as O_DIRECT wants it, cuts the file to its length and syncs it.
    pub fn finish(mut self) -> Result<(), CompileError> {
        assert_eq!(self.written + self.filled as u64, self.total, "bytes of the announced tensors");
        let filled = self.filled;
        let padded = filled.next_multiple_of(DIRECT_ALIGN as usize);
        self.buffer[filled..padded].fill(0);
        self.flush(padded)?;
        self.file.truncate(self.total)?;
        Ok(self.file.sync()?)
    }

    fn flush(&mut self, bytes: usize) -> Result<(), CompileError> {
        self.file.write_all_at(&self.buffer[..bytes], self.written)?;
        self.written += bytes as u64;
        self.filled = 0;
        Ok(())
    }
}

/// The header with its length, and the bytes of data behind it.
fn header<'a>(tensors: impl Iterator<Item = &'a StoredTensor>) -> (Vec<u8>, u64) {
    let mut entries = BTreeMap::from([("__metadata__".to_owned(), json!({"format": "pt"}))]);
    let mut end = 0;
    for t in tensors {
        let offsets = [end, end + t.bytes];
        entries.insert(t.name.clone(), json!({"dtype": t.dtype, "shape": t.shape, "data_offsets": offsets}));
        end += t.bytes;
    }
    let mut text = json!(entries).to_string().into_bytes();
    // Data starts at a multiple of 8, as every reader of the format likes it.
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut out = (text.len() as u64).to_le_bytes().to_vec();
    out.append(&mut text);
    (out, end)
}
