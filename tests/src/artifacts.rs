//! Checkpoints packed into temporary directories, removed when dropped.

use std::path::{Path, PathBuf};

use dsv4_format::{Artifact, CommitInput, Draft, DraftOptions, KernelInput, Progress};
use dsv4c::pack::{PackOptions, pack};
use dsv4c::synth::{Layers, SynthOptions, synth};
use tempfile::TempDir;

use crate::DATA;

/// Nobody watches.
pub struct Unwatched;

impl Progress for Unwatched {
    fn start(&self, _what: &str, _total_bytes: u64) {}
    fn add(&self, _bytes: u64) {}
    fn finish(&self) {}
}

/// An artifact of a test's own.
pub struct Packed {
    dir: TempDir,
    path: PathBuf,
}

impl Packed {
    /// The trained checkpoint, with its tokenizer.
    pub fn nano(tp: u32) -> Packed {
        Packed::of(&Path::new(DATA).join("nano"), tp)
    }

    /// The checkpoint of the goldens.
    pub fn tiny(tp: u32) -> Packed {
        Packed::of(&Path::new(DATA).join("tiny"), tp)
    }

    /// An artifact that is there already, and stays.
    pub fn there(path: &Path) -> Packed {
        assert!(path.is_dir(), "{} is missing", path.display());
        Packed { dir: tempfile::tempdir().expect("a temporary directory"), path: path.to_owned() }
    }

    /// Any checkpoint.
    pub fn of(checkpoint: &Path, tp: u32) -> Packed {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("packed.dsv4");
        let options = PackOptions { out: Some(path.clone()), ..PackOptions::new(checkpoint, tp) };
        pack(&options, &Unwatched).unwrap_or_else(|e| panic!("{}: {e}", checkpoint.display()));
        Packed { dir, path }
    }

    /// The same, with other kernels.
    pub fn with_kernels(&self, arch: &str, kernels: &[KernelInput], tuning: Option<&str>) -> Packed {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("packed.dsv4");
        rewrite(&self.path, &path, arch, kernels, tuning).unwrap_or_else(|e| panic!("{e}"));
        Packed { dir, path }
    }

    /// The artifact.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A directory for what a test writes, removed with the artifact.
    pub fn scratch(&self) -> &Path {
        self.dir.path()
    }
}

/// Writes the artifact `from` again as `to`, with other kernels.
fn rewrite(
    from: &Path,
    to: &Path,
    arch: &str,
    kernels: &[KernelInput],
    tuning: Option<&str>,
) -> Result<(), dsv4_format::FormatError> {
    let artifact = Artifact::open(from)?;
    let manifest = artifact.manifest();
    let layouts = (0..manifest.tp).map(|rank| artifact.layout(rank).map(|layout| (**layout).clone()));
    let mut draft = Draft::create(to, layouts.collect::<Result<_, _>>()?, &DraftOptions::default())?;
    let mut ranks = Vec::new();
    for rank in &manifest.ranks {
        let arena = artifact.load_rank(rank.rank, 1, &Unwatched)?;
        let mut writer = draft.rank_writer(rank.rank)?;
        for tensor in rank.sections.iter().flat_map(|section| &section.tensors) {
            writer.append(&tensor.name, arena.tensor(&tensor.name).expect("a tensor of the layout"))?;
        }
        ranks.push(writer.finish()?);
    }
    let names = manifest.meta.members.iter().map(|member| member.name.clone());
    let meta = names.map(|name| Ok((name.clone(), artifact.meta(&name)?.expect("a member that is listed"))));
    draft.write_meta(&meta.collect::<Result<Vec<_>, dsv4_format::FormatError>>()?)?;
    draft.write_kernels(arch, kernels, tuning)?;
    let input = CommitInput {
        config_json: manifest.config_json.clone(),
        source_id: manifest.source_id,
        weight_contract: manifest.weight_contract,
        op_contract: manifest.op_contract,
        canary: manifest.canary.clone(),
        ranks,
        receipt: serde_json::Map::new(),
    };
    draft.commit(input, false, &Unwatched).map(|_| ())
}

/// A random checkpoint of `config` in a new directory `out`.
pub fn synthetic(config: &Path, out: &Path, seed: u64) {
    let options =
        SynthOptions { config: config.to_owned(), out: out.to_owned(), layers: Layers::All, seed, shards: None };
    synth(&options, &Unwatched).unwrap_or_else(|e| panic!("{}: {e}", config.display()));
}
