//! Small asymmetric artifacts for the tests: no two tensors alike, sizes ragged on purpose.

#![allow(dead_code)] // each test binary uses its own part

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;

use dsv4_format::{
    Artifact, Canary, CommitInput, Committed, Digest, Draft, DraftOptions, FormatError, KernelInput, NoProgress,
    RankFile, RankLayout, SectionPlan, SourceId, TensorPlan,
};

pub fn tensor(name: &str, dtype: &str, shape: &[u64], bytes: u64) -> TensorPlan {
    TensorPlan { name: name.into(), dtype: dtype.into(), shape: shape.to_vec(), bytes }
}

pub fn section(name: &str, tensors: Vec<TensorPlan>) -> SectionPlan {
    SectionPlan { name: name.into(), tensors }
}

/// Two ranks; sections of three, one and one blocks.
pub fn plans(rank: u64) -> Vec<SectionPlan> {
    vec![
        section(
            "embedding",
            vec![
                tensor("embed", "bf16", &[9, 7], (8 << 20) + 12_345 + rank),
                tensor("norm", "f32", &[25], 100),
                tensor("wide", "f8", &[256, 256], 65_536),
                tensor("narrow", "f8", &[65_535], 65_535 - rank),
            ],
        ),
        section("layer.0", vec![tensor("layers.0.w", "f4", &[3, 2], (3 << 20) + 1)]),
        section("layer.1", vec![tensor("layers.1.b", "f32", &[], 4), tensor("layers.1.s", "e8m0", &[17], 17 + rank)]),
    ]
}

pub fn layouts() -> Vec<RankLayout> {
    (0..2).map(|rank| RankLayout::new(&plans(rank)).expect("layout")).collect()
}

/// A stream of bytes fixed by a name.
pub struct Noise(u64);

impl Noise {
    pub fn new(seed: u64) -> Self {
        Noise(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

pub fn content(rank: u32, name: &str, len: u64) -> Vec<u8> {
    let seed = name.bytes().fold(u64::from(rank) + 1, |h, b| h.wrapping_mul(31) + u64::from(b));
    let mut noise = Noise::new(seed);
    let mut out: Vec<u8> = (0..len.div_ceil(8)).flat_map(|_| noise.next().to_le_bytes()).collect();
    out.truncate(len as usize);
    out
}

/// Appends every tensor of `rank` in pieces of `piece` bytes.
pub fn write_rank(draft: &mut Draft, rank: u32, piece: usize) -> RankFile {
    let mut writer = draft.rank_writer(rank).expect("writer");
    for section in writer.layout().sections().to_vec() {
        for tensor in section.tensors {
            for part in content(rank, &tensor.name, tensor.len).chunks(piece) {
                writer.append(&tensor.name, part).expect("append");
            }
        }
    }
    writer.finish().expect("finish")
}

pub fn meta() -> Vec<(String, Vec<u8>)> {
    vec![
        ("tokenizer.json".into(), b"{\"vocab\":[0,1,2]}".repeat(1000)),
        ("generation_config.json".into(), b"{\"temperature\":0.6}".to_vec()),
    ]
}

pub fn input(ranks: Vec<RankFile>, config: &str) -> CommitInput {
    let mut receipt = serde_json::Map::new();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("clock");
    receipt.insert("nanos".into(), (now.as_nanos() as u64).into());
    CommitInput {
        config_json: config.into(),
        source_id: SourceId([3; 32]),
        weight_contract: Digest::of(b"weights"),
        op_contract: Digest::of(b"ops"),
        canary: Some(Canary { tokens: vec![0, 17, 128_000], logits: vec![-1.5, 0.25, 1e-30] }),
        ranks,
        receipt,
    }
}

pub fn pack_with(
    out: &Path,
    piece: usize,
    config: &str,
    only_rank: Option<u32>,
    force: bool,
) -> Result<Committed, FormatError> {
    let mut draft = Draft::create(out, layouts(), &DraftOptions { only_rank })?;
    let ranks = (0..2).map(|rank| write_rank(&mut draft, rank, piece)).collect();
    draft.write_meta(&meta())?;
    draft.commit(input(ranks, config), force, &NoProgress)
}

pub fn pack(out: &Path) -> Committed {
    pack_with(out, 1 << 20, "{}", None, false).expect("pack")
}

/// One rank of one tiny tensor, and kernels: the smallest artifact with everything in it.
pub fn pack_small(out: &Path) -> Committed {
    let plan = [section("all", vec![tensor("w", "f32", &[5], 20), tensor("scale", "e8m0", &[3], 3)])];
    let layout = RankLayout::new(&plan).expect("layout");
    let mut draft = Draft::create(out, vec![layout], &DraftOptions::default()).expect("draft");
    let rank = write_rank(&mut draft, 0, 7);
    draft.write_meta(&meta()).expect("meta");
    let kernels = [("rms_norm", 2u8), ("rope", 1)].map(|(family, key)| KernelInput {
        family: family.into(),
        key: Digest([key; 32]),
        cubin: vec![key; 300 + key as usize],
    });
    draft.write_kernels("sm_121a", &kernels, Some("[rope]\nthreads = 256\n")).expect("kernels");
    draft.commit(input(vec![rank], "{\"n\":1}"), false, &NoProgress).expect("commit")
}

/// Flips one bit of a file.
pub fn flip(file: &Path, at: u64) {
    let open = OpenOptions::new().read(true).write(true).open(file).expect("open");
    let mut byte = [0];
    open.read_exact_at(&mut byte, at).expect("read");
    open.write_all_at(&[byte[0] ^ 4], at).expect("write");
}

pub fn open_error(path: &Path) -> FormatError {
    Artifact::open(path).err().expect("opening must fail")
}
