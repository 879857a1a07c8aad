//! What attention reads of a row: its low-rank query, window row and compressed entries; and the rings that keep
//! window rows and projections.
//!
//! Within a step, rows of its own positions are read from the step's buffers and older ones from the rings. A short
//! step's rows enter the rings at once: what they replace is older than anything that the step reads. A longer step's
//! newest rows do so at its end ([`launch_store_rings`]). The reference is spread over `reference/forward.rs` and
//! [`super::compressor`], [`super::rope`], [`super::rms_norm`].

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use crate::device::args::{Act, F32, StepRow, Turn, U32};
use crate::device::unit::{Unit, define, published};
use crate::device::{DeviceError, Gpu, In, Kernel, KernelArgs, Launch, Out};
use crate::kernel_args;
use crate::numerics::Numerics;

kernel_args! {
    /// A compressor of the layer; see compress.cuh for shapes. Nothing where the layer has none.
    pub struct CompressArgs {
        values: In<F32>, gates: In<F32>, ring_values: Out<F32>, ring_gates: Out<F32>, ape: In<F32>, norm: In<F32>,
        entries: Out<Act>, stride: u32,
    }
    /// See prepare.cu for shapes. `compressors` are those of entries and of index entries; `store` is set by
    /// [`launch_prepare`].
    pub struct PrepareArgs {
        rows: In<StepRow>, query: Out<Act>, query_norm: In<F32>, kv_raw: In<Act>, kv_norm: In<F32>, turns: In<Turn>,
        entry_turns: In<Turn>, pages: In<U32>, kv: Out<Act>, window: Out<Act>, compressors: [CompressArgs; 2],
        count: u32, kv_stride: u32, pages_max: u32, store: u32, eps: f32,
    }
}

impl CompressArgs {
    /// No compressor.
    pub fn none() -> CompressArgs {
        let (none, out) = (In::none(), Out::none());
        CompressArgs {
            values: none,
            gates: none,
            ring_values: out,
            ring_gates: out,
            ape: none,
            norm: none,
            entries: Out::none(),
            stride: 0,
        }
    }
}

/// Threads of a block.
const THREADS: u32 = 256;
/// Positions of a long compression window that a thread loads at once.
const AT_ONCE: u32 = 4;

/// Sizes that the kernels are compiled for. Widths are multiples of 64.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Positions of a compression window: 0 (none), 4 (windows overlap; there are index entries too) or another
    /// number (they do not).
    pub ratio: u32,
    /// Channels of the low-rank query.
    pub query_rank: u32,
    /// Channels of a head, of window rows and of entries.
    pub head_dim: u32,
    /// Rotated channels.
    pub rope: u32,
    /// Channels of an index entry.
    pub index_dim: u32,
    /// Positions of the attention window.
    pub window: u32,
    /// Positions that a window ring holds.
    pub capacity: u32,
    /// Positions that a compressor's rings hold.
    pub compressor_capacity: u32,
    /// Entries of a page.
    pub per_page: u32,
}

impl Sizes {
    /// Whether there are kernels for them: widths that fit one another and the Hadamard transform, runs of threads that
    /// share a long window without rest, rings that hold what is read.
    pub fn are_possible(&self) -> bool {
        let widths = [self.query_rank, self.head_dim, self.index_dim, self.rope];
        let long = ![0, 4].contains(&self.ratio);
        widths.iter().all(|width| *width > 0 && width.is_multiple_of(64))
            && self.rope <= self.index_dim
            && self.index_dim <= self.head_dim
            && self.head_dim <= 1024
            && self.index_dim.is_power_of_two()
            && (!long || (4 * THREADS).is_multiple_of(self.head_dim))
            && (!long || self.ratio.is_multiple_of(4 * THREADS / self.head_dim * AT_ONCE))
            && self.capacity >= self.window
            && (self.ratio == 0 || self.compressor_capacity >= 8.max(self.ratio))
    }

    /// Compressors of the layer.
    pub fn compressors(&self) -> u32 {
        match self.ratio {
            0 => 0,
            4 => 2,
            _ => 1,
        }
    }

    /// Rows of a step that may enter the rings before older rows are read: row `i` replaces position
    /// `start + i - capacity`, and the oldest that is read is `start - reach`.
    pub fn stored_at_once(&self) -> u32 {
        let window = self.capacity - (self.window - 1);
        match self.ratio {
            0 => window,
            4 => window.min(self.compressor_capacity - 7),
            ratio => window.min(self.compressor_capacity - (ratio - 1)),
        }
    }
}

/// The factor of [`crate::numerics::hadamard`], to the bit.
pub(super) fn hadamard_scale(width: u32) -> (String, String) {
    let scale = (1.0 / f64::from(width).sqrt()) as f32;
    define("HADAMARD_SCALE", format!("float_of({:#x}u)", scale.to_bits()))
}

/// What is compiled for layers of a ratio: `attn_prepare`, `store_rings`.
pub fn unit(sizes: Sizes, numerics: Numerics) -> Unit {
    let Sizes { ratio, query_rank, head_dim, rope, index_dim, capacity, compressor_capacity, per_page, .. } = sizes;
    assert!(sizes.are_possible(), "keys and values of {sizes:?}");
    Unit {
        family: "kv",
        source: concat!(include_str!("rows.cuh"), include_str!("compress.cuh"), include_str!("prepare.cu")),
        args: PrepareArgs::cuda(),
        defines: vec![
            define("CAPC", compressor_capacity),
            define("CAPW", capacity),
            define("EPP", per_page),
            hadamard_scale(index_dim),
            define("HD", head_dim),
            define("ID", index_dim),
            published(numerics),
            define("Q_RANK", query_rank),
            define("RATIO", ratio),
            define("ROPE", rope),
            define("THREADS", THREADS),
        ],
        kernels: ["attn_prepare", "store_rings"].map(|k| (k.into(), 0)).to_vec(),
    }
}

/// Query, window row and entries of each of the step's rows. Short steps enter the rings; after longer ones
/// [`launch_store_rings`] must come.
pub fn launch_prepare(gpu: &dyn Gpu, kernel: Kernel, sizes: Sizes, mut args: PrepareArgs) -> Result<(), DeviceError> {
    args.store = u32::from(args.count <= sizes.stored_at_once());
    let blocks = (2 * args.count).div_ceil(THREADS / 32) + args.count * sizes.compressors();
    gpu.launch(kernel, Launch::row(blocks, THREADS), args.bytes().as_slice())
}

/// The newest rows of a step that [`launch_prepare`] has not stored into the rings: after attention has read older
/// ones. Nothing after short steps.
pub fn launch_store_rings(gpu: &dyn Gpu, kernel: Kernel, sizes: Sizes, args: PrepareArgs) -> Result<(), DeviceError> {
    if args.count <= sizes.stored_at_once() {
        return Ok(());
    }
    let grid = [args.count, 1 + sizes.compressors(), 1];
    gpu.launch(kernel, Launch { grid, threads: THREADS, shared: 0 }, args.bytes().as_slice())
}
