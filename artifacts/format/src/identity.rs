//! The ids. Each is BLAKE3 in derive-key mode over a canonical encoding: integers little-endian of
//! fixed width, texts and lists preceded by their length as u64, hashes as 32 bytes.
//!
//! What goes in is what can change a token. Time, host, paths, thread counts and compression are
//! left out; block hashes are left out because the roots already cover them.

use crate::header::FORMAT_VERSION;
use crate::manifest::{
    ArtifactId, Canary, Digest, KernelRecord, KernelSetId, Manifest, RankFile, SourceId, StoredFile, WeightSetId,
};

struct Canonical(blake3::Hasher);

impl Canonical {
    fn new(context: &'static str) -> Self {
        let mut out = Canonical(blake3::Hasher::new_derive_key(context));
        out.u32(FORMAT_VERSION);
        out
    }

    fn u32(&mut self, value: u32) {
        self.0.update(&value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.0.update(&value.to_le_bytes());
    }

    fn len(&mut self, items: usize) {
        self.u64(items as u64);
    }

    fn text(&mut self, text: &str) {
        self.len(text.len());
        self.0.update(text.as_bytes());
    }

    fn hash(&mut self, hash: &[u8; 32]) {
        self.0.update(hash);
    }

    fn rank(&mut self, rank: &RankFile) {
        self.u32(rank.rank);
        self.u64(rank.file_len);
        self.len(rank.sections.len());
        for section in &rank.sections {
            self.text(&section.name);
            self.u64(section.offset);
            self.u64(section.len);
            self.hash(section.root.as_bytes());
            self.len(section.tensors.len());
            for tensor in &section.tensors {
                self.text(&tensor.name);
                self.text(&tensor.dtype);
                self.len(tensor.shape.len());
                for &dim in &tensor.shape {
                    self.u64(dim);
                }
                self.u64(tensor.offset);
                self.u64(tensor.len);
            }
        }
    }

    fn stored(&mut self, file: &StoredFile) {
        self.text(&file.name);
        self.len(file.members.len());
        for member in &file.members {
            self.text(&member.name);
            self.u64(member.raw_len);
            self.hash(member.raw_hash.as_bytes());
        }
    }

    fn finish(self) -> [u8; 32] {
        *self.0.finalize().as_bytes()
    }
}

/// Hash of a rank's section index, as its superblock carries it.
pub(crate) fn index_hash(rank: &RankFile) -> Digest {
    let mut out = Canonical::new("dsv4 rank index v1");
    out.rank(rank);
    Digest(out.finish())
}

pub(crate) fn weight_set_id(
    tp: u32,
    weight_contract: &Digest,
    ranks: &[RankFile],
    weights_seed: Option<u64>,
) -> WeightSetId {
    let mut out = Canonical::new("dsv4 weights v1");
    out.u32(tp);
    out.hash(weight_contract.as_bytes());
    out.len(ranks.len());
    for rank in ranks {
        out.rank(rank);
    }
    match weights_seed {
        None => out.u32(0),
        Some(seed) => {
            out.u32(1);
            out.u64(seed);
        }
    }
    WeightSetId(out.finish())
}

/// `kernels` are sorted by (arch, key).
pub(crate) fn kernel_set_id(kernels: &[KernelRecord]) -> KernelSetId {
    let mut out = Canonical::new("dsv4 kernels v1");
    out.len(kernels.len());
    for kernel in kernels {
        out.text(&kernel.arch);
        out.hash(kernel.key.as_bytes());
        out.text(&kernel.family);
        out.hash(kernel.hash.as_bytes());
        out.u64(kernel.size);
    }
    KernelSetId(out.finish())
}

pub(crate) struct ArtifactParts<'a> {
    pub weight_set_id: WeightSetId,
    pub source_id: SourceId,
    pub kernel_set_id: KernelSetId,
    pub weight_contract: Digest,
    pub op_contract: Digest,
    pub config_json: &'a str,
    pub meta: &'a StoredFile,
    pub kernel_files: &'a [StoredFile],
    pub canary: Option<&'a Canary>,
}

pub(crate) fn artifact_id(parts: &ArtifactParts<'_>) -> ArtifactId {
    let mut out = Canonical::new("dsv4 artifact v1");
    out.hash(parts.weight_set_id.as_bytes());
    out.hash(parts.source_id.as_bytes());
    out.hash(parts.kernel_set_id.as_bytes());
    out.hash(parts.weight_contract.as_bytes());
    out.hash(parts.op_contract.as_bytes());
    out.hash(Digest::of(parts.config_json.as_bytes()).as_bytes());
    out.stored(parts.meta);
    out.len(parts.kernel_files.len());
    for file in parts.kernel_files {
        out.stored(file);
    }
    match parts.canary {
        None => out.u32(0),
        Some(canary) => {
            out.u32(1);
            out.len(canary.tokens.len());
            for &token in &canary.tokens {
                out.u32(token);
            }
            out.len(canary.logits.len());
            for &logit in &canary.logits {
                out.u32(logit.to_bits());
            }
        }
    }
    ArtifactId(out.finish())
}

impl Manifest {
    /// The ids its own content gives: weight set, kernel set, artifact.
    pub(crate) fn computed_ids(&self) -> (WeightSetId, KernelSetId, ArtifactId) {
        let weight_set_id = weight_set_id(self.tp, &self.weight_contract, &self.ranks, self.weights_seed);
        let kernel_set_id = kernel_set_id(&self.kernels);
        let artifact_id = artifact_id(&ArtifactParts {
            weight_set_id,
            source_id: self.source_id,
            kernel_set_id,
            weight_contract: self.weight_contract,
            op_contract: self.op_contract,
            config_json: &self.config_json,
            meta: &self.meta,
            kernel_files: &self.kernel_files,
            canary: self.canary.as_ref(),
        });
        (weight_set_id, kernel_set_id, artifact_id)
    }
}
