//! What happens to rows of width D before and between the layers: lookup of tokens, copies into the residual
//! streams, the sum of the ranks' parts, a drafter's input.
//!
//! The CPU backend does these in place; there is no reference beside it.

#[cfg(test)]
mod tests;

use crate::device::args::{Act, Bf16, F32, StepRow};
use crate::device::unit::{Unit, define, published};
use crate::device::{DeviceError, Gpu, In, Kernel, KernelArgs, Launch, Out};
use crate::kernel_args;
use crate::numerics::Numerics;

kernel_args! {
    /// `y` (`[rows, D]`): row `token - first_token` of `table` (`[vocab, D]`), or zeros where there is none.
    pub struct EmbedArgs { rows: In<StepRow>, table: In<Bf16>, y: Out<F32>, first_token: u32, vocab: u32 }

    /// `h` (`[rows, M, D]`): every stream is `x` (`[rows, D]`), or the rounded sum of `n` `parts` of `count` values
    /// each in their order.
    pub struct ExpandArgs { x: In<Act>, parts: In<F32>, count: u64, h: Out<Act>, n: u32 }

    /// `y` (`[count]`): the sum of `n` parts of `count` values each, in their order.
    pub struct SettleArgs { parts: In<F32>, y: Out<Act>, count: u64, n: u32 }

    /// `y` (`[rows, M, D]`, may be `h`): `h` (`[rows, M, D]`) and in every stream `e` (`[rows, D]`).
    pub struct DraftAddArgs { h: In<Act>, e: In<Act>, y: Out<Act> }
}

/// Threads of a block.
const THREADS: u32 = 256;
/// Values of one vector access; widths are multiples of it.
const VECTOR: u64 = 8;

/// What is compiled for `streams` streams of width `hidden`.
pub fn unit(hidden: usize, streams: usize, numerics: Numerics) -> Unit {
    assert!((hidden as u64).is_multiple_of(VECTOR), "a width of {hidden} is not whole vectors");
    Unit {
        family: "embedding",
        source: include_str!("embedding.cu"),
        args: EmbedArgs::cuda() + &ExpandArgs::cuda() + &SettleArgs::cuda() + &DraftAddArgs::cuda(),
        defines: vec![define("D", hidden), define("M", streams), published(numerics), define("THREADS", THREADS)],
        kernels: ["embed", "expand", "settle", "draft_add"].map(|name| (name.into(), 0)).into(),
    }
}

/// Looks up the tokens of `rows` rows.
pub fn launch_embed(gpu: &dyn Gpu, kernel: Kernel, rows: u32, args: EmbedArgs) -> Result<(), DeviceError> {
    gpu.launch(kernel, Launch::row(rows, THREADS), args.bytes().as_slice())
}

/// Copies `rows` rows into their streams.
pub fn launch_expand(gpu: &dyn Gpu, kernel: Kernel, rows: u32, args: ExpandArgs) -> Result<(), DeviceError> {
    gpu.launch(kernel, Launch::row(rows, THREADS), args.bytes().as_slice())
}

/// Adds the parts of all ranks.
pub fn launch_settle(gpu: &dyn Gpu, kernel: Kernel, args: SettleArgs) -> Result<(), DeviceError> {
    assert!(args.count.is_multiple_of(VECTOR) && args.n > 0, "{} parts of {} values", args.n, args.count);
    let blocks = args.count.div_ceil(u64::from(THREADS) * VECTOR) as u32;
    gpu.launch(kernel, Launch::row(blocks, THREADS), args.bytes().as_slice())
}

/// Adds a drafter's two projections, of `rows` rows.
pub fn launch_draft_add(gpu: &dyn Gpu, kernel: Kernel, rows: u32, args: DraftAddArgs) -> Result<(), DeviceError> {
    gpu.launch(kernel, Launch::row(rows, THREADS), args.bytes().as_slice())
}
