//! A safetensors file of float32 matrices, written row by row and never left half-done.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde_json::{Map, json};

use crate::error::RunError;

/// Bytes of a value.
const F32_BYTES: u64 = 4;

/// A file under a name of its own until [`TensorFile::finish`]; dropped before that, it is removed.
pub struct TensorFile {
    target: PathBuf,
    partial: PathBuf,
    file: File,
    /// Where each tensor's values start.
    starts: Vec<u64>,
    cols: usize,
    finished: bool,
}

impl TensorFile {
    /// Makes a file for `tensors` (name, rows) of `cols` columns each, at its full size.
    ///
    /// Errors: the directory cannot be written, or the disk is too small (where the file system can tell).
    pub fn create(target: &Path, tensors: &[(&str, usize)], cols: usize) -> Result<TensorFile, RunError> {
        let mut header = Map::new();
        let mut end = 0u64;
        let mut starts = Vec::new();
        for (name, rows) in tensors {
            starts.push(end);
            let next = end + (*rows * cols) as u64 * F32_BYTES;
            header.insert((*name).into(), json!({"dtype": "F32", "shape": [rows, cols], "data_offsets": [end, next]}));
            end = next;
        }
        let mut text = serde_json::Value::Object(header).to_string().into_bytes();
        text.resize(text.len().next_multiple_of(8), b' ');
        let data = 8 + text.len() as u64;
        let mut partial = target.as_os_str().to_owned();
        partial.push(format!(".partial-{}", std::process::id()));
        let partial = PathBuf::from(partial);
        let opened = OpenOptions::new().write(true).create_new(true).open(&partial);
        let file = opened.map_err(|source| failed(&partial, source))?;
        let starts = starts.into_iter().map(|start| data + start).collect();
        let out = TensorFile { target: target.to_owned(), partial, file, starts, cols, finished: false };
        let size = data + end;
        let flags = rustix::fs::FallocateFlags::empty();
        match rustix::fs::fallocate(&out.file, flags, 0, size) {
            // Some file systems cannot reserve; a full one shows while writing.
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => {}
            Err(error) => return Err(failed(&out.partial, error.into())),
        }
        let prefix = [(text.len() as u64).to_le_bytes().as_slice(), &text].concat();
        out.file.write_all_at(&prefix, 0).map_err(|source| failed(&out.partial, source))?;
        Ok(out)
    }

    /// Writes whole rows of a tensor, from row `first` on.
    pub fn write_rows(&mut self, tensor: usize, first: usize, values: &[f32]) -> Result<(), RunError> {
        let at = self.starts[tensor] + (first * self.cols) as u64 * F32_BYTES;
        self.file.write_all_at(bytemuck::cast_slice(values), at).map_err(|source| failed(&self.partial, source))
    }

    /// Syncs the file and gives it its name.
    pub fn finish(mut self) -> Result<(), RunError> {
        let moved = self.file.sync_all().and_then(|()| std::fs::rename(&self.partial, &self.target));
        moved.map_err(|source| failed(&self.target, source))?;
        self.finished = true;
        Ok(())
    }
}

impl Drop for TensorFile {
    fn drop(&mut self) {
        if !self.finished {
            let _ = std::fs::remove_file(&self.partial);
        }
    }
}

fn failed(file: &Path, source: io::Error) -> RunError {
    RunError::Io { action: "writing", file: file.to_owned(), source, help: "check the path and the free space" }
}
