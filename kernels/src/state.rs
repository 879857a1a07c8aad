//! What a sequence keeps between steps, per layer.
//!
//! Window rows and the projections of tokens in open compression windows live in rings indexed by
//! position; finished entries in growing lists. Nothing else remembers how far a sequence is, so
//! going back (a rejected draft) is only a matter of writing the same positions again.

mod size;

use dsv4_model::ModelConfig;
use dsv4_model::tensors::LayerSpec;

pub use size::sequence_bytes;
use size::{CompressedSize, LayerSize, RingSize};

/// Rows of fixed width, addressed by position; the newest `capacity` positions are kept.
pub struct Ring {
    width: usize,
    capacity: usize,
    data: Vec<f32>,
}

impl Ring {
    fn new(RingSize { width, capacity }: RingSize) -> Ring {
        Ring { width, capacity, data: vec![0.0; width * capacity] }
    }

    /// Row of `position`.
    pub fn row(&self, position: usize) -> &[f32] {
        let at = position % self.capacity * self.width;
        &self.data[at..at + self.width]
    }

    /// Row of `position`, to be written.
    pub fn row_mut(&mut self, position: usize) -> &mut [f32] {
        let at = position % self.capacity * self.width;
        &mut self.data[at..at + self.width]
    }
}

/// A compressor's open windows and finished entries.
pub struct Compressed {
    /// Value projections of recent tokens: `[c*d]` per position.
    pub values: Ring,
    /// Gate projections of recent tokens, position bias added.
    pub gates: Ring,
    /// Finished entries, `[entries, width]`.
    pub entries: Vec<f32>,
    /// Channels of an entry.
    pub width: usize,
}

impl Compressed {
    fn new(size: CompressedSize) -> Compressed {
        let ring = || Ring::new(size.ring);
        Compressed { values: ring(), gates: ring(), entries: Vec::new(), width: size.width }
    }

    /// Entry `index`.
    pub fn entry(&self, index: usize) -> &[f32] {
        &self.entries[index * self.width..(index + 1) * self.width]
    }
}

/// Caches of one layer.
pub struct LayerState {
    /// Window rows, `[d]` per position.
    pub window: Ring,
    /// Long-range entries (ratio 4 or 128).
    pub compressed: Option<Compressed>,
    /// Index entries (ratio 4).
    pub index: Option<Compressed>,
}

impl LayerState {
    /// Empty caches; `rows_max` is the most rows of one sequence in a step.
    pub fn new(config: &ModelConfig, layer: &LayerSpec, rows_max: usize) -> LayerState {
        let size = LayerSize::new(config, layer, rows_max);
        LayerState {
            window: Ring::new(size.window),
            compressed: size.compressed.map(Compressed::new),
            index: size.index.map(Compressed::new),
        }
    }
}

/// Caches of one sequence: trunk layers, then draft stages.
pub struct SequenceState {
    /// One per trunk layer.
    pub layers: Vec<LayerState>,
    /// Positions that trunk steps have filled.
    pub length: usize,
    /// One per draft stage.
    pub draft: Vec<LayerState>,
    /// Positions that draft steps have filled.
    pub draft_length: usize,
}
