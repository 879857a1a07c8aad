//! A checkpoint directory: found, read strictly, compared with the table, then only read from.
//!
//! A directory (links are followed) with config.json and either model.safetensors.index.json or
//! exactly one *.safetensors. A checkpoint that opens holds every tensor of its model with the right
//! format and shape, nothing else, and all of its bytes; only values are still unknown. Absent on
//! purpose: any interpretation of values, and memory maps (reads bypass the page cache).

mod header;
mod sums;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};

use dsv4_format::io::DirectFile;
use dsv4_model::inventory::inventory;
use dsv4_model::tensors::{StoredTensor, table};
use dsv4_model::{ModelConfig, Tp};
use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};

pub use header::Entry;

use crate::error::{CompileError, Mismatch};

pub(crate) const CONFIG_FILE: &str = "config.json";
pub(crate) const INDEX_FILE: &str = "model.safetensors.index.json";
pub(crate) const SHARD_SUFFIX: &str = ".safetensors";
const CONFIG_BYTES_MAX: u64 = 1 << 20;
const INDEX_BYTES_MAX: u64 = 64 << 20;
const SIDE_FILE_BYTES_MAX: u64 = 256 << 20;
/// Kept open all together.
const SHARDS_MAX: usize = 512;

/// The text of a config.json and what it says.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where it was found, for messages.
    pub path: PathBuf,
    /// As found.
    pub text: String,
    /// Checked.
    pub model: ModelConfig,
}

impl Config {
    /// Reads `path`: a config.json, or a directory that holds one.
    pub fn read(path: &Path) -> Result<Config, CompileError> {
        let file = if path.is_dir() { path.join(CONFIG_FILE) } else { path.to_path_buf() };
        let text = read_text(&file, CONFIG_BYTES_MAX)?;
        let model = ModelConfig::parse(&text).map_err(CompileError::model(path))?;
        Ok(Config { path: path.to_path_buf(), text, model })
    }
}

/// An opened checkpoint. Shared by threads.
pub struct Checkpoint {
    dir: PathBuf,
    config: Config,
    shards: Vec<DirectFile>,
    places: HashMap<String, Place>,
}

/// Where a tensor's bytes are.
#[derive(Clone, Copy)]
struct Place {
    shard: usize,
    offset: u64,
}

impl Checkpoint {
    /// Opens and checks everything but the values.
    ///
    /// Errors: every difference from the table in one [`CompileError::Tensors`], or only the numbers
    /// when they are far apart; a malformed file by its name.
    pub fn open(dir: &Path) -> Result<Checkpoint, CompileError> {
        if !dir.is_dir() {
            let found = if dir.exists() { "a file" } else { "nothing" };
            return Err(not_a_checkpoint(dir, "a directory", found));
        }
        if !dir.join(CONFIG_FILE).is_file() {
            return Err(not_a_checkpoint(dir, CONFIG_FILE, "none"));
        }
        let config = Config::read(dir)?;
        let index = Index::find(dir)?;
        let mut shards = Vec::with_capacity(index.shards.len());
        let mut entries = Vec::with_capacity(index.shards.len());
        for name in &index.shards {
            let shard = DirectFile::open(&dir.join(name))?;
            let list = header::read(&shard)?;
            index.check(name, &list)?;
            shards.push(shard);
            entries.push(list);
        }
        let found = entries.iter().map(|list| list.len() as u64).sum();
        let expected = inventory(&config.model, Tp::ONE).map_err(CompileError::model(dir))?;
        let expected = expected.iter().map(|line| line.tensors).sum();
        // Of another model. A config of a few bytes can ask for millions of names: they are made only
        // when the shards have about as many.
        if expected > 2 * found || found > 2 * expected {
            return Err(CompileError::TensorCount { dir: dir.to_path_buf(), expected, found });
        }
        let mismatch = compare(&config.model, &shards, &entries);
        if !mismatch.is_empty() {
            return Err(CompileError::Tensors { dir: dir.to_path_buf(), mismatch: Box::new(mismatch) });
        }
        let mut places = HashMap::new();
        for (shard, list) in entries.into_iter().enumerate() {
            places.extend(list.into_iter().map(|e| (e.name, Place { shard, offset: e.offset })));
        }
        Ok(Checkpoint { dir: dir.to_path_buf(), config, shards, places })
    }

    /// The directory, as given.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its config.json.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Its shards, in the order of their names.
    pub fn shards(&self) -> impl Iterator<Item = &Path> {
        self.shards.iter().map(DirectFile::path)
    }

    /// Fills `out` with the bytes `range` of a tensor of the table of this checkpoint's config.
    pub fn read(&self, tensor: &StoredTensor, range: Range<u64>, out: &mut [u8]) -> Result<(), CompileError> {
        assert!(range.end <= tensor.bytes && range.end - range.start == out.len() as u64, "{range:?} of {tensor:?}");
        let Some(place) = self.places.get(&tensor.name) else {
            unreachable!("{} was found when the checkpoint was opened", tensor.name);
        };
        Ok(self.shards[place.shard].read_exact_at(out, place.offset + range.start)?)
    }

    /// Those of `names` that lie beside config.json, with their bytes.
    pub fn side_files(&self, names: &[&str]) -> Result<Vec<(String, Vec<u8>)>, CompileError> {
        let mut found = Vec::new();
        for name in names {
            let path = self.dir.join(name);
            if path.is_file() {
                found.push(((*name).to_owned(), read_bytes(&path, SIDE_FILE_BYTES_MAX)?));
            }
        }
        Ok(found)
    }
}

/// Everything in which the shards' tensors differ from the table.
fn compare(config: &ModelConfig, shards: &[DirectFile], entries: &[Vec<Entry>]) -> Mismatch {
    let mut expected: BTreeMap<String, StoredTensor> = BTreeMap::new();
    for row in table(config) {
        let stored = (0..row.matrices()).flat_map(|index| row.stored(index));
        expected.extend(stored.map(|t| (t.name.clone(), t)));
    }
    let mut out = Mismatch::default();
    let all = shards.iter().zip(entries).flat_map(|(shard, list)| list.iter().map(move |entry| (shard, entry)));
    for (shard, entry) in all {
        let file = shard.path().file_name().unwrap_or_default().to_string_lossy();
        let Some(tensor) = expected.remove(&entry.name) else {
            out.extra.push(format!("{} in {file}", entry.name));
            continue;
        };
        if entry.dtype.to_string() != tensor.dtype {
            out.wrong_dtype.push(format!("{} in {file}: expected {}, found {}", entry.name, tensor.dtype, entry.dtype));
        }
        if entry.shape != tensor.shape {
            let (name, expected, found) = (&entry.name, &tensor.shape, &entry.shape);
            out.wrong_shape.push(format!("{name} in {file}: expected {expected:?}, found {found:?}"));
        }
    }
    out.missing = expected.into_keys().collect();
    out
}

/// Which shards there are, and which tensors each should have.
struct Index {
    file: PathBuf,
    shards: Vec<String>,
    /// Nothing for a lone file without an index.
    weight_map: Option<BTreeMap<String, String>>,
}

impl Index {
    fn find(dir: &Path) -> Result<Index, CompileError> {
        let file = dir.join(INDEX_FILE);
        if !file.is_file() {
            return Ok(Index { file, shards: vec![lone_shard(dir)?], weight_map: None });
        }
        let fault = |at: &str, expected: &str, found: String| CompileError::Index {
            file: file.clone(),
            at: at.into(),
            expected: expected.into(),
            found,
        };
        let bytes = read_bytes(&file, INDEX_BYTES_MAX)?;
        let raw: RawIndex =
            serde_json::from_slice(&bytes).map_err(|e| fault("text", "JSON with a weight_map", e.to_string()))?;
        for (tensor, shard) in &raw.weight_map.0 {
            let mut parts = Path::new(shard).components();
            let plain = matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None));
            if !plain || shard.contains(['/', '\\', '\0']) || !shard.ends_with(SHARD_SUFFIX) {
                return Err(fault(tensor, "the name of a *.safetensors file beside the index", format!("{shard:?}")));
            }
        }
        let shards: std::collections::BTreeSet<&String> = raw.weight_map.0.values().collect();
        if shards.is_empty() || shards.len() > SHARDS_MAX {
            return Err(fault("weight_map", &format!("1 to {SHARDS_MAX} shards"), shards.len().to_string()));
        }
        let shards: Vec<String> = shards.into_iter().cloned().collect();
        if let Some(name) = shards.iter().find(|name| !dir.join(name).is_file()) {
            return Err(fault("weight_map", &format!("the shard {name} beside the index"), "no such file".into()));
        }
        Ok(Index { file, shards, weight_map: Some(raw.weight_map.0) })
    }

    /// The index and the shard `name` list the same tensors for it.
    fn check(&self, name: &str, entries: &[Entry]) -> Result<(), CompileError> {
        let Some(map) = &self.weight_map else { return Ok(()) };
        let fault = |at: &str, expected: String, found: String| CompileError::Index {
            file: self.file.clone(),
            at: at.into(),
            expected,
            found,
        };
        for entry in entries {
            match map.get(&entry.name) {
                Some(shard) if shard == name => {}
                Some(shard) => return Err(fault(&entry.name, format!("it in {shard}"), format!("it in {name}"))),
                None => return Err(fault(&entry.name, format!("an entry, as it is in {name}"), "none".into())),
            }
        }
        let present: HashSet<&str> = entries.iter().map(|e| e.name.as_str()).collect();
        match map.iter().find(|(tensor, shard)| *shard == name && !present.contains(tensor.as_str())) {
            Some((tensor, _)) => Err(fault(tensor, format!("it in {name}"), "it is not there".into())),
            None => Ok(()),
        }
    }
}

fn lone_shard(dir: &Path) -> Result<String, CompileError> {
    let failed = |e| CompileError::io("list", dir)(e);
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        if let Some(name) = name.to_str().filter(|n| n.ends_with(SHARD_SUFFIX)) {
            names.push(name.to_owned());
        }
    }
    match names.as_slice() {
        [one] => Ok(one.clone()),
        _ => {
            let found = format!("{} *.safetensors files and no index", names.len());
            Err(not_a_checkpoint(dir, &format!("{INDEX_FILE}, or exactly one *.safetensors file"), &found))
        }
    }
}

#[derive(serde::Deserialize)]
struct RawIndex {
    weight_map: WeightMap,
}

/// Tensor name -> shard name; no name twice.
struct WeightMap(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for WeightMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Names;
        impl<'de> Visitor<'de> for Names {
            type Value = WeightMap;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensor names and shard names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<WeightMap, A::Error> {
                let mut out = BTreeMap::new();
                while let Some((tensor, shard)) = map.next_entry::<String, String>()? {
                    if out.contains_key(&tensor) {
                        return Err(A::Error::custom(format!("the name {tensor:?} twice")));
                    }
                    out.insert(tensor, shard);
                }
                Ok(WeightMap(out))
            }
        }
        deserializer.deserialize_map(Names)
    }
}

fn not_a_checkpoint(dir: &Path, expected: &str, found: &str) -> CompileError {
    CompileError::NotACheckpoint { dir: dir.to_path_buf(), expected: expected.into(), found: found.into() }
}

/// The whole of a small file; never more than `limit` bytes are read.
fn read_bytes(path: &Path, limit: u64) -> Result<Vec<u8>, CompileError> {
    let file = File::open(path).map_err(CompileError::io("open", path))?;
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).map_err(CompileError::io("read", path))?;
    match bytes.len() as u64 {
        found if found > limit => Err(CompileError::TooLarge { file: path.to_path_buf(), limit, found }),
        _ => Ok(bytes),
    }
}

pub(crate) fn read_text(path: &Path, limit: u64) -> Result<String, CompileError> {
    let invalid = |e: std::string::FromUtf8Error| {
        CompileError::io("read", path)(std::io::Error::new(std::io::ErrorKind::InvalidData, e))
    };
    String::from_utf8(read_bytes(path, limit)?).map_err(invalid)
}
