//! Writes one safetensors file front to back, past the page cache where the file system lets it.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use dsv4_format::io::{AlignedBuf, DIRECT_ALIGN};
use dsv4_model::tensors::StoredTensor;
use serde_json::json;

use crate::error::CompileError;

const BUFFER_BYTES: usize = 4 << 20;
/// From the kernel's fcntl.h.
const O_DIRECT: i32 = if cfg!(any(target_arch = "aarch64", target_arch = "arm")) { 0o200_000 } else { 0o40_000 };

/// Takes the bytes of the announced tensors, in order and without gaps.
pub struct ShardWriter {
    path: PathBuf,
    file: File,
    buffer: AlignedBuf,
    filled: usize,
    written: u64,
    /// Length of the finished file.
    total: u64,
}

impl ShardWriter {
    /// Creates the file and writes the header of `tensors`, which follow in this order.
    pub fn create<'a>(
        path: &Path,
        tensors: impl Iterator<Item = &'a StoredTensor>,
    ) -> Result<ShardWriter, CompileError> {
        let header = header(tensors);
        let open = |flags| OpenOptions::new().write(true).create(true).truncate(true).custom_flags(flags).open(path);
        let opened = match open(O_DIRECT) {
            Err(e) if e.kind() == ErrorKind::InvalidInput => open(0),
            other => other,
        };
        let mut writer = ShardWriter {
            path: path.to_path_buf(),
            file: opened.map_err(CompileError::io("create", path))?,
            buffer: AlignedBuf::new(BUFFER_BYTES)?,
            filled: 0,
            written: 0,
            total: header.0.len() as u64 + header.1,
        };
        writer.append(&header.0)?;
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

    /// Writes the rest, rounded up as O_DIRECT wants it, and cuts the file to its length.
    pub fn finish(mut self) -> Result<(), CompileError> {
        assert_eq!(self.written + self.filled as u64, self.total, "bytes of the announced tensors");
        let filled = self.filled;
        self.buffer[filled..].fill(0);
        self.flush(filled.next_multiple_of(DIRECT_ALIGN as usize))?;
        let path = &self.path;
        self.file.set_len(self.total).map_err(CompileError::io("set the length of", path))?;
        self.file.sync_all().map_err(CompileError::io("sync", path))
    }

    fn flush(&mut self, bytes: usize) -> Result<(), CompileError> {
        self.file.write_all(&self.buffer[..bytes]).map_err(CompileError::io("write", &self.path))?;
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
