//! From an artifact to a rank that can run: contracts, exact cover, weights in memory.

use std::path::Path;
use std::sync::Arc;

use dsv4_format::{Arena, Artifact, Progress, Section};
use dsv4_kernels::collective::Collective;
use dsv4_kernels::numerics::Numerics;
use dsv4_kernels::reference::Reference;
use dsv4_kernels::weights::Weights;
use dsv4_model::contract;
use dsv4_model::plan::sections;
use dsv4_model::{ModelConfig, Tp};

use crate::error::RunError;

/// An artifact that this program can run.
pub struct Opened {
    /// The files.
    pub artifact: Artifact,
    /// The model in them.
    pub config: ModelConfig,
}

/// Opens an artifact and checks that it was made for this program's description of the model.
///
/// Reads no weights. Errors: the files, another contract, a tensor missing, extra or of another size.
pub fn open(path: &Path) -> Result<Opened, RunError> {
    let artifact = Artifact::open(path)?;
    let manifest = artifact.manifest();
    let ours = [contract::weight_contract(), contract::op_contract()];
    let stored = [manifest.weight_contract, manifest.op_contract];
    let names = [("weight", contract::WEIGHT_CONTRACT_NAME), ("op", contract::OP_CONTRACT_NAME)];
    for ((text, digest), (name, member)) in ours.iter().zip(stored).zip(names) {
        if contract::hash(text) != digest.0 {
            let theirs = artifact.meta(member)?.unwrap_or_default();
            let theirs = String::from_utf8_lossy(&theirs).into_owned();
            let (line, ours, theirs) = contract::first_difference(text, &theirs).unwrap_or_default();
            return Err(RunError::Contract { contract: name, line, ours, theirs });
        }
    }
    let config = ModelConfig::parse(&manifest.config_json)?;
    for rank in &manifest.ranks {
        let tp = Tp::new(rank.rank, manifest.tp)?;
        let mut expected = Vec::new();
        for section in sections(&config, tp)? {
            for row in section.rows {
                let (shape, bytes) = (row.local_shape(tp)?, row.artifact_bytes(tp)?);
                expected.push(format!("{}: {} {} {shape:?}, {bytes} bytes", section.name, row.name, row.format.name()));
            }
        }
        let describe = |s: &Section| -> Vec<String> {
            let tensors = s.tensors.iter();
            tensors.map(|t| format!("{}: {} {} {:?}, {} bytes", s.name, t.name, t.dtype, t.shape, t.len)).collect()
        };
        let found: Vec<String> = rank.sections.iter().flat_map(describe).collect();
        let differs = (0..expected.len().max(found.len())).find(|i| expected.get(*i) != found.get(*i));
        if let Some(i) = differs {
            let shown = |list: &[String]| list.get(i).cloned().unwrap_or("no more tensors".into());
            return Err(RunError::Input {
                file: path.join("MANIFEST"),
                expected: format!("tensor {i} of rank {} to be {}", rank.rank, shown(&expected)),
                found: shown(&found),
                help: "pack the checkpoint again",
            });
        }
    }
    Ok(Opened { artifact, config })
}

/// How a rank computes.
#[derive(Clone, Copy, Debug)]
pub struct RankOptions {
    /// Activation arithmetic.
    pub numerics: Numerics,
    /// Sequences at once.
    pub slots: usize,
    /// Most rows of one sequence in a step: the prefill chunk.
    pub rows_max: usize,
}

/// Bytes held by an [`Arena`], for the compute backend.
struct ArenaBytes(Arena);

impl AsRef<[u8]> for ArenaBytes {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Opened {
    /// Streams a rank's weights into memory, every block verified. Errors: file, section, block, offset.
    pub fn load(&self, rank: u32, threads: usize, progress: &dyn Progress) -> Result<Arena, RunError> {
        Ok(self.artifact.load_rank(rank, threads, progress)?)
    }

    /// The CPU backend of a rank over its loaded weights.
    pub fn backend(
        &self,
        arena: Arena,
        collective: Box<dyn Collective>,
        options: RankOptions,
    ) -> Result<Reference, RunError> {
        let tp = Tp::new(collective.rank(), self.artifact.manifest().tp)?;
        let layout = Arc::clone(self.artifact.layout(tp.rank())?);
        let place = move |name: &str| {
            let place = layout.tensor(name)?;
            Some(place.arena_offset as usize..(place.arena_offset + place.len) as usize)
        };
        let weights = Weights::new(&self.config, tp, Arc::new(ArenaBytes(arena)), place)?;
        let Opened { config, .. } = self;
        Ok(Reference::new(config.clone(), tp, options.numerics, weights, collective, options.slots, options.rows_max))
    }
}
