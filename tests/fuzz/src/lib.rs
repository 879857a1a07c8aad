//! What the fuzzers share: small artifacts, corpora made from real bytes, and a peer of the push
//! protocol that says what it is told to.
//!
//! No corpus is stored in the tree: a target writes its seeds into the corpus directory of its command
//! line when that is empty. Everything is written below the directory for temporary files, which
//! scripts/fuzz makes on a memory file system and removes.

pub mod peer;

use std::fs;
use std::path::{Path, PathBuf};

use dsv4_format::{
    Canary, CommitInput, Digest, Draft, DraftOptions, KernelInput, NoProgress, RankLayout, SectionPlan, SourceId,
    TensorPlan,
};

/// Writes `seeds` into the corpus directory, the first argument that is a directory, if it is empty.
pub fn seed_corpus(seeds: impl FnOnce() -> Vec<Vec<u8>>) {
    let arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let Some(dir) = arguments.into_iter().find(|argument| argument.is_dir()) else { return };
    if fs::read_dir(&dir).expect("the corpus").next().is_none() {
        for (number, seed) in seeds().into_iter().enumerate() {
            fs::write(dir.join(format!("seed-{number}")), seed).expect("a seed");
        }
    }
}

/// A directory for what a target writes.
pub fn scratch() -> PathBuf {
    tempfile::tempdir().expect("a temporary directory").keep()
}

/// An artifact of `tp` ranks of one 2 MiB block each, with `meta`; with everything else there is, too, if
/// `whole`.
pub fn artifact(dir: &Path, name: &str, tp: u32, whole: bool) -> PathBuf {
    let out = dir.join(name);
    let len = |rank: u32| 300 + u64::from(rank);
    let layout = |rank: u32| {
        let tensor =
            |name: &str, bytes: u64| TensorPlan { name: name.into(), dtype: "u8".into(), shape: vec![bytes], bytes };
        let tensors = vec![tensor("layers.0.w", len(rank)), tensor("b", 4)];
        RankLayout::new(&[SectionPlan { name: "all".into(), tensors }]).expect("a layout")
    };
    let mut draft = Draft::create(&out, (0..tp).map(layout).collect(), &DraftOptions::default()).expect("a draft");
    let ranks = (0..tp).map(|rank| {
        let mut writer = draft.rank_writer(rank).expect("a writer");
        writer.append("layers.0.w", &vec![rank as u8 + 1; len(rank) as usize]).expect("bytes");
        writer.append("b", &[1, 2, 3, 4]).expect("bytes");
        writer.finish().expect("a rank")
    });
    let ranks = ranks.collect();
    draft.write_meta(&[("tokenizer.json".into(), b"{}".to_vec())]).expect("meta");
    if whole {
        let kernels = [("rms_norm", 2u8), ("rope", 1)].map(|(family, key)| KernelInput {
            family: family.into(),
            key: Digest([key; 32]),
            cubin: vec![key; 300 + key as usize],
        });
        draft.write_kernels("sm_121a", &kernels, Some("[rope]\nthreads = 256\n")).expect("kernels");
    }
    let input = CommitInput {
        config_json: format!("{name:?}"),
        source_id: SourceId([7; 32]),
        weight_contract: Digest::of(b"weights"),
        op_contract: Digest::of(b"ops"),
        canary: whole.then(|| Canary { tokens: vec![0, 17, 128_000], logits: vec![-1.5, 0.25, 1e-30] }),
        ranks,
        receipt: serde_json::Map::new(),
    };
    draft.commit(input, false, &NoProgress).expect("a commit");
    out
}
