//! How large the caches of a sequence are: the arithmetic behind [`super::LayerState::new`], for plans.

use dsv4_model::ModelConfig;
use dsv4_model::tensors::{LayerSpec, draft_stages, layers};

/// Bytes of a stored value: caches are float32.
const VALUE_BYTES: u64 = size_of::<f32>() as u64;

/// Size of a ring of rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RingSize {
    pub width: usize,
    pub capacity: usize,
}

impl RingSize {
    fn bytes(self) -> u64 {
        self.width as u64 * self.capacity as u64 * VALUE_BYTES
    }
}

/// Size of a compressor's caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CompressedSize {
    /// Of the values and, once more, of the gates.
    pub ring: RingSize,
    /// Channels of an entry.
    pub width: usize,
    /// Tokens of an entry.
    pub ratio: usize,
}

impl CompressedSize {
    fn bytes(self, tokens: u64) -> u64 {
        2 * self.ring.bytes() + tokens / self.ratio as u64 * self.width as u64 * VALUE_BYTES
    }
}

/// Sizes of one layer's caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LayerSize {
    pub window: RingSize,
    pub compressed: Option<CompressedSize>,
    pub index: Option<CompressedSize>,
}

impl LayerSize {
    /// `rows_max` is the most rows of one sequence in a step.
    pub fn new(config: &ModelConfig, layer: &LayerSpec, rows_max: usize) -> LayerSize {
        // A step writes all its rows before it reads, and may go back over the last one's.
        let kept = |visible: usize| visible + 2 * rows_max;
        let ratio = layer.ratio as usize;
        let halves = if ratio == 4 { 2 } else { 1 };
        let compressed = |width: u64| {
            let width = width as usize;
            let ring = RingSize { width: width * halves, capacity: kept(halves * ratio) };
            CompressedSize { ring, width, ratio }
        };
        LayerSize {
            window: RingSize { width: config.head_dim as usize, capacity: kept(config.sliding_window as usize) },
            compressed: (ratio != 0).then(|| compressed(config.head_dim)),
            index: (ratio == 4).then(|| compressed(config.index_head_dim)),
        }
    }

    fn bytes(&self, tokens: u64) -> u64 {
        let compressed = [self.compressed, self.index].into_iter().flatten();
        self.window.bytes() + compressed.map(|c| c.bytes(tokens)).sum::<u64>()
    }
}

/// Bytes of memory that one sequence's caches use once it is `tokens` long: trunk layers and draft stages.
///
/// The lists of entries grow by doubling; what they have reserved but not reached is address space, not memory.
pub fn sequence_bytes(config: &ModelConfig, rows_max: usize, tokens: u64) -> u64 {
    let all = layers(config).into_iter().chain(draft_stages(config));
    all.map(|layer| LayerSize::new(config, &layer, rows_max).bytes(tokens)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{Compressed, LayerState};

    /// Bytes that the caches of a sequence of `tokens` tokens hold, counted on the caches themselves.
    fn held(config: &ModelConfig, rows_max: usize, tokens: usize) -> u64 {
        let mut values = 0;
        for layer in layers(config).iter().chain(&draft_stages(config)) {
            let mut state = LayerState::new(config, layer, rows_max);
            values += state.window.data.capacity();
            let mut count = |cache: &mut Compressed, ratio: usize| {
                for _ in 0..tokens / ratio {
                    cache.entries.resize(cache.entries.len() + cache.width, 0.0);
                }
                assert!(cache.entries.capacity() <= (2 * cache.entries.len()).max(4 * cache.width));
                values += cache.values.data.capacity() + cache.gates.data.capacity() + cache.entries.len();
            };
            state.compressed.iter_mut().for_each(|c| count(c, layer.ratio as usize));
            state.index.iter_mut().for_each(|c| count(c, layer.ratio as usize));
        }
        values as u64 * 4
    }

    #[test]
    fn sizes_are_those_of_the_caches() {
        for text in [
            include_str!("../../../tests/nano/config.json"),
            include_str!("../../../tests/tiny/config.json"),
            include_str!("../../../tests/golden/dspark_config.json"),
            include_str!("../../../tests/golden/flash_config.json"),
        ] {
            let config = ModelConfig::parse(text).unwrap();
            for (rows_max, tokens) in [(1, 0), (16, 3), (33, 127), (256, 128), (256, 8191)] {
                let found = sequence_bytes(&config, rows_max, tokens as u64);
                assert_eq!(found, held(&config, rows_max, tokens), "{rows_max} rows, {tokens} tokens");
            }
        }
    }

    /// Flash at 1,048,576 tokens and chunks of 256, by hand.
    #[test]
    fn flash_by_hand() {
        let config = ModelConfig::parse(include_str!("../../../tests/golden/flash_config.json")).unwrap();
        let windows = 44 * (128 + 512) * 512 * 4;
        let csa = 21 * (2 * (8 + 512) * (1024 + 256) + 262_144 * (512 + 128)) * 4;
        let hca = 20 * (2 * (128 + 512) * 512 + 8192 * 512) * 4;
        assert_eq!(sequence_bytes(&config, 256, 1 << 20), windows + csa + hca);
    }
}
