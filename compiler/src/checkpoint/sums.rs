//! A list of SHA-256 sums, as `sha256sum` writes it, held against the files of a checkpoint.
//!
//! Whole files are read once, sequentially each and several at a time, before anything is packed: a
//! sum tells nothing before a file's last byte. Every shard must be listed; whatever else is listed
//! must be there and is checked too.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use dsv4_format::io::{AlignedBuf, DirectFile};
use dsv4_format::{FormatError, Progress};
use rayon::ThreadPoolBuilder;
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::{Checkpoint, read_text};
use crate::error::CompileError;

const LIST_BYTES_MAX: u64 = 1 << 20;
const BUFFER_BYTES: usize = 4 << 20;

impl Checkpoint {
    /// Checks the files that `list` names, with `jobs` threads.
    ///
    /// Errors: [`CompileError::SumList`] for a list that is malformed, lacks a shard or names a file
    /// that is not there; [`CompileError::Sum`] for the first file, by name, with another sum.
    pub fn check_sums(&self, list: &Path, jobs: usize, progress: &dyn Progress) -> Result<(), CompileError> {
        let sums = parse(&read_text(list, LIST_BYTES_MAX)?, list)?;
        let fault = |at: &str, expected: &str, found: &str| CompileError::SumList {
            file: list.to_path_buf(),
            at: at.into(),
            expected: expected.into(),
            found: found.into(),
        };
        for shard in &self.shards {
            let name = shard.path().file_name().unwrap_or_default().to_string_lossy();
            if !sums.contains_key(name.as_ref()) {
                return Err(fault(&name, "a line for this shard", "none"));
            }
        }
        let mut files = Vec::new();
        for (name, expected) in &sums {
            let path = self.dir.join(name);
            if !path.is_file() {
                return Err(fault(name, "this file in the checkpoint", "no such file"));
            }
            files.push((path, expected));
        }
        let bytes = |path: &PathBuf| path.metadata().map_or(0, |meta| meta.len());
        progress.start("check SHA-256", files.iter().map(|(path, _)| bytes(path)).sum());
        let started = ThreadPoolBuilder::new().num_threads(jobs).build();
        let pool =
            started.map_err(|e| FormatError::Thread { what: "a hashing thread", source: std::io::Error::other(e) })?;
        let check = |(path, expected): &(PathBuf, &String)| match sum(path, progress) {
            Ok(found) if found == **expected => None,
            Ok(found) => Some(CompileError::Sum { file: path.clone(), expected: (*expected).clone(), found }),
            Err(error) => Some(error),
        };
        match pool.install(|| files.par_iter().find_map_first(check)) {
            Some(error) => Err(error),
            None => {
                progress.finish();
                Ok(())
            }
        }
    }
}

/// Lower-case hexadecimal.
fn sum(path: &Path, progress: &dyn Progress) -> Result<String, CompileError> {
    let file = DirectFile::open(path)?;
    let mut buffer = AlignedBuf::new(BUFFER_BYTES)?;
    let mut hasher = Sha256::new();
    let mut at = 0;
    while at < file.len() {
        let part = (file.len() - at).min(BUFFER_BYTES as u64);
        let bytes = &mut buffer[..part as usize];
        file.read_exact_at(bytes, at)?;
        hasher.update(&*bytes);
        progress.add(part);
        at += part;
    }
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// File name -> sum. A line is 64 hexadecimal digits, a space, a space or `*`, and a plain name.
fn parse(text: &str, list: &Path) -> Result<BTreeMap<String, String>, CompileError> {
    let mut sums = BTreeMap::new();
    for (n, line) in text.lines().enumerate() {
        let fault = |expected: &str| CompileError::SumList {
            file: list.to_path_buf(),
            at: format!("line {}", n + 1),
            expected: expected.into(),
            found: line.chars().take(100).flat_map(char::escape_debug).collect(),
        };
        let (sum, name) = line
            .split_once(' ')
            .filter(|(sum, _)| sum.len() == 64 && sum.bytes().all(|c| c.is_ascii_hexdigit()))
            .ok_or_else(|| fault("64 hexadecimal digits, two spaces and a file name"))?;
        let name = name.strip_prefix([' ', '*']).unwrap_or("");
        if name.is_empty() || name.contains(['/', '\\']) || name == ".." || name == "." {
            return Err(fault("the plain name of a file of the checkpoint"));
        }
        if sums.insert(name.to_owned(), sum.to_ascii_lowercase()).is_some() {
            return Err(fault("a file once"));
        }
    }
    Ok(sums)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_strictly() {
        let sum = "0123456789abcdefABCDEF0123456789abcdefABCDEF0123456789abcdefABCD";
        let read = |text: &str| parse(text, Path::new("list")).map_err(|e| e.to_string());
        let good = read(&format!("{sum}  a.safetensors\n{sum} *b c.json\n")).unwrap();
        let lower = sum.to_ascii_lowercase();
        assert_eq!(good, BTreeMap::from([("a.safetensors".into(), lower.clone()), ("b c.json".into(), lower)]));
        for (text, at) in [
            (format!("{sum}  a\n\n"), "line 2"),
            (format!("{}  a\n", &sum[1..]), "line 1"),
            (format!("{}g  a\n", &sum[1..]), "line 1"),
            (format!("{sum} a\n"), "plain name"),
            (format!("{sum}  ../a\n"), "plain name"),
            (format!("\\{sum}  a\\nb\n"), "line 1"),
            (format!("{sum}  a\n{sum}  a\n"), "a file once"),
        ] {
            let error = read(&text).unwrap_err();
            assert!(error.starts_with("list: line ") && error.contains(at) && error.contains("help:"), "{error}");
        }
    }
}
