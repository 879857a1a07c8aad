//! How many bytes a sequence keeps between steps in the packed form: FP8 rows, FP4 index entries.
//!
//! The published code rounds what it keeps to just these formats, so the form loses nothing
//! (SPEC 4). It is the layout planned for GPU caches; the CPU backend keeps float32 and has its own
//! arithmetic beside its caches. Absent: where pages lie, who owns them.

use crate::config::ModelConfig;
use crate::layout::FP4_GROUP;
use crate::tensors::{LayerSpec, draft_stages, layers};

/// Tokens of a page: the unit in which caches are handed out.
pub const PAGE_TOKENS: u64 = 256;
/// Channels under one scale of a packed row.
const ROW_GROUP: u64 = 64;
/// A packed row's length is a multiple of this, bytes.
const ROW_ALIGN: u64 = 8;

/// Sizes of one model's packed caches; the same on every rank, as all share the one key-value head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedCache {
    /// A window row, or a long-range entry, bytes.
    pub row_bytes: u64,
    /// An index entry, bytes.
    pub index_bytes: u64,
    /// Layers of the trunk with ratio 4.
    pub csa_layers: u64,
    /// Layers of the trunk with ratio 128.
    pub hca_layers: u64,
    /// Layers of the trunk and draft stages: each has a window.
    pub windows: u64,
    /// Unfinished entries of all layers, bytes of a sequence: float32 values and gates.
    pub open_bytes: u64,
}

impl PackedCache {
    /// Sizes for `config`'s model.
    pub fn new(config: &ModelConfig) -> PackedCache {
        let trunk = layers(config);
        let count = |ratio| trunk.iter().filter(|l| l.ratio == ratio).count() as u64;
        let plain = config.head_dim - config.qk_rope_head_dim;
        let row = plain + 2 * config.qk_rope_head_dim + plain.div_ceil(ROW_GROUP);
        let open = |layer: &LayerSpec| {
            let (tokens, width) = match layer.ratio {
                0 => (0, 0),
                // Two overlapping windows, each with projections of its own, for entries and index.
                4 => (8, 2 * (config.head_dim + config.index_head_dim)),
                ratio => (u64::from(ratio), config.head_dim),
            };
            2 * tokens * width * size_of::<f32>() as u64
        };
        PackedCache {
            row_bytes: row.next_multiple_of(ROW_ALIGN),
            index_bytes: config.index_head_dim / 2 + config.index_head_dim / FP4_GROUP,
            csa_layers: count(4),
            hca_layers: count(128),
            windows: trunk.len() as u64 + draft_stages(config).len() as u64,
            open_bytes: trunk.iter().map(open).sum(),
        }
    }

    /// Finished entries of `tokens` tokens, bytes.
    pub fn entries_bytes(&self, tokens: u64) -> u64 {
        let (csa, hca) = (self.csa_layers * (tokens / 4), self.hca_layers * (tokens / 128));
        self.row_bytes * (csa + hca) + self.index_bytes * csa
    }

    /// Entries of a page of [`PAGE_TOKENS`], bytes.
    pub fn page_bytes(&self) -> u64 {
        self.entries_bytes(PAGE_TOKENS)
    }

    /// Windows of `rows` rows in every layer, bytes of a sequence.
    pub fn window_bytes(&self, rows: u64) -> u64 {
        self.windows * rows * self.row_bytes
    }

    /// Everything of a sequence of `tokens` tokens, whole pages, windows of `rows` rows, bytes.
    pub fn sequence_bytes(&self, tokens: u64, rows: u64) -> u64 {
        tokens.div_ceil(PAGE_TOKENS) * self.page_bytes() + self.window_bytes(rows) + self.open_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flash() -> PackedCache {
        PackedCache::new(&ModelConfig::parse(include_str!("../../../tests/golden/flash_config.json")).unwrap())
    }

    /// The published table of Flash: 0.655, 0.982 and 3.432 GiB; 3.2 MB of windows, 12.2 MB open.
    #[test]
    fn flash_by_hand() {
        let flash = flash();
        assert_eq!((flash.row_bytes, flash.index_bytes), (584, 68));
        assert_eq!((flash.csa_layers, flash.hca_layers, flash.windows), (21, 20, 44));
        for (tokens, bytes, gib) in
            [(200_000, 702_844_160, 0.655), (300_000, 1_054_266_240, 0.982), (1_048_576, 3_684_958_208, 3.432)]
        {
            assert_eq!(flash.entries_bytes(tokens), bytes);
            assert!((bytes as f64 / f64::from(1 << 30) - gib).abs() < 5e-4, "{tokens}");
        }
        // 21/4 long and index entries and 20/128 more long ones a token.
        assert_eq!(flash.page_bytes(), 21 * 64 * (584 + 68) + 20 * 2 * 584);
        assert_eq!(flash.page_bytes() as f64 / 256.0, 3514.25);
        assert_eq!(flash.window_bytes(128), 44 * 128 * 584);
        assert_eq!(flash.open_bytes, 21 * (65_536 + 16_384) + 20 * 524_288);
        assert_eq!(flash.sequence_bytes(257, 144), 2 * 899_648 + 44 * 144 * 584 + 12_206_080);
    }

    #[test]
    fn draft_stages_have_windows_only() {
        let text = include_str!("../../../tests/golden/flash_0731_config.json");
        let dspark = PackedCache::new(&ModelConfig::parse(text).unwrap());
        assert_eq!(dspark.windows, 46);
        assert_eq!(dspark.page_bytes(), flash().page_bytes());
    }
}
