//! What attention reads of a row: window rows, compressed entries, queries; and the rings that keep them.
//!
//! Within a step, rows of its own positions are read from the step's buffers and older ones from the rings;
//! [`launch_store_rings`] puts the newest rows into the rings and comes last. The reference is spread over
//! `reference/forward.rs` and [`super::compressor`], [`super::rope`], [`super::rms_norm`].

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
    /// Normalised, rotated and rounded window rows `y` `[count, HD]` of raw projections `kv` `[count, stride]`.
    pub struct KvRowsArgs {
        kv: In<Act>, w: In<F32>, turns: In<Turn>, y: Out<Act>, stride: u32, count: u32, eps: f32,
    }
    /// Heads `q` `[count, heads, HD or ID]`, changed in place. `eps` is of the queries' norm.
    pub struct HeadsArgs {
        q: Out<Act>, turns: In<Turn>, count: u32, heads: u32, eps: f32,
    }
    /// A compressor's projections `[count, stride]` and its rings `[slots, capacity, width]`; `width` is a multiple
    /// of 4.
    pub struct RingArgs {
        values: In<F32>, gates: In<F32>, ring_values: Out<F32>, ring_gates: Out<F32>,
        width: u32, stride: u32, capacity: u32,
    }
    /// Window rows `kv` `[count, HD]` go to `window` `[slots, CAPW, HD]`, projections to the compressors' rings.
    pub struct StoreRingsArgs {
        rows: In<StepRow>, kv: In<Act>, window: Out<Act>, rings: [RingArgs; 2], count: u32,
    }
    /// Entries of the windows that the rows close; see compress.cu for shapes.
    pub struct CompressArgs {
        rows: In<StepRow>, values: In<F32>, gates: In<F32>, ring_values: In<F32>, ring_gates: In<F32>,
        ape: In<F32>, norm: In<F32>, turns: In<Turn>, entries: Out<Act>, pages: In<U32>,
        stride: u32, pages_max: u32, eps: f32,
    }
}

impl RingArgs {
    /// No compressor.
    pub fn none() -> RingArgs {
        let (none, out) = (In::none(), Out::none());
        RingArgs { values: none, gates: none, ring_values: out, ring_gates: out, width: 0, stride: 0, capacity: 1 }
    }
}

/// Threads of a block.
const THREADS: u32 = 128;

/// Sizes that the row kernels are compiled for. Each is a multiple of 64; `capacity` is of the window rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Channels of a head, and of window rows.
    pub head_dim: u32,
    /// Rotated channels.
    pub rope: u32,
    /// Channels of an index head.
    pub index_dim: u32,
    /// Positions that a window ring holds; any number.
    pub capacity: u32,
}

/// What is compiled for rows and rings: `kv_rows`, `query_heads`, `index_queries`, `store_rings`.
pub fn unit(sizes: Sizes, numerics: Numerics) -> Unit {
    let Sizes { head_dim, rope, index_dim, capacity } = sizes;
    for width in [head_dim, index_dim] {
        assert!(width % 64 == 0 && rope % 64 == 0 && rope <= width, "{sizes:?}: widths are multiples of 64");
    }
    assert!(index_dim.is_power_of_two(), "{sizes:?}: the Hadamard transform is of a power of two");
    Unit {
        family: "kv",
        source: concat!(include_str!("rows.cuh"), include_str!("kv.cu")),
        args: [KvRowsArgs::cuda(), HeadsArgs::cuda(), StoreRingsArgs::cuda()].concat(),
        defines: vec![
            define("CAPW", capacity),
            hadamard_scale(index_dim),
            define("HD", head_dim),
            define("ID", index_dim),
            published(numerics),
            define("ROPE", rope),
            define("THREADS", THREADS),
        ],
        kernels: ["kv_rows", "query_heads", "index_queries", "store_rings"].map(|k| (k.into(), 0)).to_vec(),
    }
}

/// The factor of [`crate::numerics::hadamard`], to the bit.
fn hadamard_scale(width: u32) -> (String, String) {
    let scale = (1.0 / f64::from(width).sqrt()) as f32;
    define("HADAMARD_SCALE", format!("float_of({:#x}u)", scale.to_bits()))
}

/// A compressor that `compress` is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CompressSizes {
    /// Positions of a window: 4 (windows overlap) or another number (they do not).
    pub ratio: u32,
    /// Channels of an entry.
    pub width: u32,
    /// Rotated channels.
    pub rope: u32,
    /// Whether entries are the indexer's.
    pub index: bool,
    /// Positions that its rings hold.
    pub capacity: u32,
    /// Entries of a page.
    pub per_page: u32,
}

impl CompressSizes {
    fn threads(&self) -> u32 {
        self.width.clamp(128, 512)
    }
}

/// What is compiled for a compressor: `compress`.
pub fn compress_unit(sizes: CompressSizes, numerics: Numerics) -> Unit {
    let CompressSizes { ratio, width, rope, index, capacity, per_page } = sizes;
    assert!(width % 64 == 0 && rope % 64 == 0 && rope <= width, "{sizes:?}: widths are multiples of 64");
    assert!(!index || width.is_power_of_two(), "{sizes:?}: the Hadamard transform is of a power of two");
    Unit {
        family: "compress",
        source: concat!(include_str!("rows.cuh"), include_str!("compress.cu")),
        args: CompressArgs::cuda(),
        defines: vec![
            define("CAPC", capacity),
            define("EPP", per_page),
            hadamard_scale(width),
            define("INDEX", u32::from(index)),
            published(numerics),
            define("RATIO", ratio),
            define("ROPE", rope),
            define("THREADS", sizes.threads()),
            define("WIDTH", width),
        ],
        kernels: vec![("compress".into(), 0)],
    }
}

/// A warp for each of `items`.
fn warps(items: u64) -> Launch {
    Launch::row(items.div_ceil(u64::from(THREADS / 32)) as u32, THREADS)
}

/// Window rows of the step.
pub fn launch_kv_rows(gpu: &dyn Gpu, kernel: Kernel, args: KvRowsArgs) -> Result<(), DeviceError> {
    gpu.launch(kernel, warps(args.count.into()), args.bytes().as_slice())
}

/// Query heads (`query_heads`) or index heads (`index_queries`) of the step.
pub fn launch_heads(gpu: &dyn Gpu, kernel: Kernel, args: HeadsArgs) -> Result<(), DeviceError> {
    gpu.launch(kernel, warps(u64::from(args.count) * u64::from(args.heads)), args.bytes().as_slice())
}

/// Entries of the windows that the step's `rows` rows close.
pub fn launch_compress(
    gpu: &dyn Gpu,
    kernel: Kernel,
    sizes: CompressSizes,
    rows: u32,
    args: CompressArgs,
) -> Result<(), DeviceError> {
    gpu.launch(kernel, Launch::row(rows, sizes.threads()), args.bytes().as_slice())
}

/// The step's newest rows into the rings: after attention and compressors have read older ones.
pub fn launch_store_rings(gpu: &dyn Gpu, kernel: Kernel, args: StoreRingsArgs) -> Result<(), DeviceError> {
    let rings = args.rings.iter().take_while(|ring| ring.width != 0).count() as u32;
    let shape = Launch { grid: [args.count, 1 + rings, 1], threads: THREADS, shared: 0 };
    gpu.launch(kernel, shape, args.bytes().as_slice())
}
