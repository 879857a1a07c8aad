//! Checkpoints to damage, shards taken apart and put together, small file systems.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

pub const NANO: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/nano");
pub const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/tiny");

/// A copy of a checkpoint's files.
pub fn copy(checkpoint: &str, to: &Path) -> PathBuf {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(checkpoint).unwrap() {
        let path = entry.unwrap().path();
        if path.file_name().unwrap() != "conversations.json" {
            fs::write(to.join(path.file_name().unwrap()), fs::read(&path).unwrap()).unwrap();
        }
    }
    to.to_path_buf()
}

/// A safetensors file as header text and data.
pub struct Shard {
    pub header: String,
    pub data: Vec<u8>,
}

impl Shard {
    pub fn read(path: &Path) -> Shard {
        let bytes = fs::read(path).unwrap();
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header = String::from_utf8(bytes[8..8 + length].to_vec()).unwrap();
        Shard { header, data: bytes[8 + length..].to_vec() }
    }

    pub fn write(&self, path: &Path) {
        let mut bytes = (self.header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(self.header.as_bytes());
        bytes.extend_from_slice(&self.data);
        fs::write(path, bytes).unwrap();
    }

    /// Replaces the only occurrence of `from` in the header.
    pub fn edit(&mut self, from: &str, to: &str) {
        assert_eq!(self.header.matches(from).count(), 1, "{from}");
        self.header = self.header.replace(from, to);
    }

    pub fn entries(&self) -> BTreeMap<String, Value> {
        let mut all: BTreeMap<String, Value> = serde_json::from_str(&self.header).unwrap();
        all.remove("__metadata__");
        all
    }

    /// Place of a tensor in the data.
    pub fn range(&self, name: &str) -> std::ops::Range<usize> {
        let offsets = &self.entries()[name]["data_offsets"];
        offsets[0].as_u64().unwrap() as usize..offsets[1].as_u64().unwrap() as usize
    }
}

/// Every tensor of a checkpoint: its bytes by name.
pub fn tensors(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut out = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            let shard = Shard::read(&path);
            for name in shard.entries().into_keys() {
                let bytes = shard.data[shard.range(&name)].to_vec();
                assert!(out.insert(name, bytes).is_none());
            }
        }
    }
    out
}

/// Names in a directory, sorted.
pub fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Requires two artifacts to be the same byte for byte, but for the receipt.
pub fn assert_same(a: &Path, b: &Path) {
    assert_eq!(names(a), names(b));
    for name in names(a).into_iter().filter(|n| n != "RECEIPT.json") {
        assert!(fs::read(a.join(&name)).unwrap() == fs::read(b.join(&name)).unwrap(), "{name} differs");
    }
}

/// A file system of a few megabytes, unmounted on drop.
pub struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    /// Without the right to mount there is none: the skip says so.
    pub fn mount(megabytes: u32) -> Option<SmallDisk> {
        let dir = tempfile::tempdir().unwrap();
        let size = format!("size={megabytes}M");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(dir.path()).output();
        if mounted.is_ok_and(|o| o.status.success()) {
            return Some(SmallDisk(dir));
        }
        eprintln!("SKIPPED: a full disk: no right to mount a tmpfs here");
        None
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}
