//! What a sequence keeps between steps, per layer.
//!
//! Window rows and the projections of tokens in open compression windows live in rings indexed by
//! position; finished entries in growing lists. Nothing else remembers how far a sequence is, so
//! going back (a rejected draft) is only a matter of writing the same positions again.

use dsv4_model::ModelConfig;
use dsv4_model::tensors::LayerSpec;

/// Rows of fixed width, addressed by position; the newest `capacity` positions are kept.
pub struct Ring {
    width: usize,
    capacity: usize,
    data: Vec<f32>,
}

impl Ring {
    fn new(width: usize, capacity: usize) -> Ring {
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
    fn new(width: usize, halves: usize, capacity: usize) -> Compressed {
        let ring = || Ring::new(width * halves, capacity);
        Compressed { values: ring(), gates: ring(), entries: Vec::new(), width }
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
        let window = config.sliding_window as usize;
        // A step writes all its rows before it reads, and may go back over the last one's.
        let kept = |visible: usize| visible + 2 * rows_max;
        let ratio = layer.ratio as usize;
        let halves = if ratio == 4 { 2 } else { 1 };
        let open = kept(halves * ratio);
        LayerState {
            window: Ring::new(config.head_dim as usize, kept(window)),
            compressed: (ratio != 0).then(|| Compressed::new(config.head_dim as usize, halves, open)),
            index: (ratio == 4).then(|| Compressed::new(config.index_head_dim as usize, halves, open)),
        }
    }
}

/// Caches of one sequence: trunk layers, then draft stages.
pub struct SequenceState {
    /// One per trunk layer.
    pub layers: Vec<LayerState>,
    /// One per draft stage.
    pub draft: Vec<LayerState>,
}
