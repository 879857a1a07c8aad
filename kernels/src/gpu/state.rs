//! What sequences keep on the GPU between steps: window rings, compressor rings, paged entries.
//!
//! Everything is reserved at the start. A ring keeps a window and [`RING_SPARE`] rows: so a short step's rows enter at
//! once, since what they replace is older than anything that the step reads, and a rejected draft is gone back over. A
//! longer step's rows enter at its end; its older rows come from the step's own buffers. Pages hold the entries of 256 tokens in every layer; so far each slot owns a fixed run of them.

use std::sync::Arc;

use dsv4_model::cache::PAGE_TOKENS;
use dsv4_model::tensors::{LayerSpec, draft_stages, layers};
use dsv4_model::{Block, ModelConfig};

use crate::device::{Buffer, DeviceError, Gpu};

/// Rows beyond a window that a ring keeps: the longest draft, and as many again to go back over.
pub(super) const RING_SPARE: u32 = 16;

/// Rows of a slot's window ring.
pub fn window_capacity(window: u32) -> u32 {
    window + RING_SPARE
}

/// Rows of a slot's compressor rings.
pub fn compressor_capacity(ratio: u32) -> u32 {
    (if ratio == 4 { 2 } else { 1 }) * ratio + RING_SPARE
}

/// Open windows and finished entries of one compressor.
pub struct DeviceCompressed {
    /// Value projections, `[slots, capacity, columns]` float32.
    pub values: Buffer,
    /// Gate projections without position bias.
    pub gates: Buffer,
    /// Entries, `[pages, entries per page, width]` activations.
    pub entries: Buffer,
    /// Rows of a slot's ring.
    pub capacity: u32,
    /// Channels of an entry.
    pub width: u32,
    /// Columns of the projections.
    pub columns: u32,
}

/// Caches of one layer.
pub struct DeviceLayer {
    /// Window rows, `[slots, capacity, head_dim]` activations.
    pub window: Buffer,
    /// Long-range entries.
    pub compressed: Option<DeviceCompressed>,
    /// Index entries.
    pub index: Option<DeviceCompressed>,
}

/// Caches of all sequences.
pub struct DeviceState {
    layers: Vec<DeviceLayer>,
    draft: Vec<DeviceLayer>,
    /// Physical page of each page of each slot.
    pub pages: Buffer,
    /// Pages of a slot.
    pub pages_max: u32,
    /// Rows of a slot's window ring.
    pub window_capacity: u32,
}

/// What is reserved.
#[derive(Clone, Copy, Debug)]
pub struct StateSize {
    /// Sequences.
    pub slots: u32,
    /// Tokens of a sequence.
    pub context: u32,
    /// Bytes of a stored activation.
    pub act_bytes: u64,
}

impl StateSize {
    /// Pages of a sequence.
    fn pages(&self) -> u64 {
        u64::from(self.context).div_ceil(PAGE_TOKENS)
    }

    /// Bytes of all caches, and of the page table.
    pub fn bytes(&self, config: &ModelConfig) -> u64 {
        let slots = u64::from(self.slots);
        let window = u64::from(window_capacity(config.sliding_window as u32)) * config.head_dim * self.act_bytes;
        let compressed = |ratio: u32, width: u64| {
            let columns = if ratio == 4 { 2 * width } else { width };
            let rings = 2 * u64::from(compressor_capacity(ratio)) * columns * 4;
            rings + self.pages() * (PAGE_TOKENS / u64::from(ratio)) * width * self.act_bytes
        };
        let layer = |l: LayerSpec| match l.ratio {
            0 => window,
            4 => window + compressed(4, config.head_dim) + compressed(4, config.index_head_dim),
            ratio => window + compressed(ratio, config.head_dim),
        };
        let all: u64 = layers(config).into_iter().chain(draft_stages(config)).map(layer).sum();
        slots * (all + self.pages() * 4)
    }
}

impl DeviceState {
    /// Empty caches. Errors: not enough GPU memory.
    pub fn new(gpu: &Arc<dyn Gpu>, config: &ModelConfig, size: StateSize) -> Result<DeviceState, DeviceError> {
        let pages_max = size.context.div_ceil(PAGE_TOKENS as u32);
        let table: Vec<u32> = (0..size.slots * pages_max).collect();
        let window_capacity = window_capacity(config.sliding_window as u32);
        let all = |specs: Vec<LayerSpec>| -> Result<Vec<DeviceLayer>, DeviceError> {
            specs.iter().map(|spec| DeviceLayer::new(gpu, config, spec, size, pages_max, window_capacity)).collect()
        };
        Ok(DeviceState {
            layers: all(layers(config))?,
            draft: all(draft_stages(config))?,
            pages: Buffer::of(gpu, &table)?,
            pages_max,
            window_capacity,
        })
    }

    /// Bytes that are reserved.
    pub fn bytes(&self) -> u64 {
        let compressed = |c: &Option<DeviceCompressed>| {
            c.as_ref().map_or(0, |c| c.values.bytes() + c.gates.bytes() + c.entries.bytes())
        };
        let layer = |l: &DeviceLayer| l.window.bytes() + compressed(&l.compressed) + compressed(&l.index);
        self.layers.iter().chain(&self.draft).map(layer).sum::<u64>() + self.pages.bytes()
    }

    /// All that sequences keep, and whether it is float32 in all numerics.
    pub fn buffers(&self) -> Vec<(&Buffer, bool)> {
        let mut out = Vec::new();
        for layer in self.layers.iter().chain(&self.draft) {
            out.push((&layer.window, false));
            for c in [&layer.compressed, &layer.index].into_iter().flatten() {
                out.extend([(&c.entries, false), (&c.values, true), (&c.gates, true)]);
            }
        }
        out
    }

    /// Caches of a block. Panics for the global one, which has none.
    pub fn layer(&self, block: Block) -> &DeviceLayer {
        match block {
            Block::Layer(i) => &self.layers[i as usize],
            Block::Draft(s) => &self.draft[s as usize],
            Block::Global => panic!("the global block has no caches"),
        }
    }
}

impl DeviceLayer {
    fn new(
        gpu: &Arc<dyn Gpu>,
        config: &ModelConfig,
        spec: &LayerSpec,
        size: StateSize,
        pages_max: u32,
        window_capacity: u32,
    ) -> Result<DeviceLayer, DeviceError> {
        let act = |values: u64| Buffer::new(gpu, values * size.act_bytes);
        let slots = u64::from(size.slots);
        let compressed = |width: u64| -> Result<DeviceCompressed, DeviceError> {
            let overlap = if spec.ratio == 4 { 2 } else { 1 };
            let (columns, capacity) = (overlap * width, compressor_capacity(spec.ratio));
            let ring = || Buffer::new(gpu, slots * u64::from(capacity) * columns * 4);
            let per_page = PAGE_TOKENS / u64::from(spec.ratio);
            Ok(DeviceCompressed {
                values: ring()?,
                gates: ring()?,
                entries: act(slots * u64::from(pages_max) * per_page * width)?,
                capacity,
                width: width as u32,
                columns: columns as u32,
            })
        };
        Ok(DeviceLayer {
            window: act(slots * u64::from(window_capacity) * config.head_dim)?,
            compressed: (spec.ratio != 0).then(|| compressed(config.head_dim)).transpose()?,
            index: (spec.ratio == 4).then(|| compressed(config.index_head_dim)).transpose()?,
        })
    }
}
