//! Choice of experts and their weights (SPEC 3.7).

mod reference;
#[cfg(test)]
mod tests;

pub use reference::*;

use crate::device::args::{F32, I32, StepRow, U32};
use crate::device::unit::{Unit, define, published};
use crate::device::{DeviceError, Gpu, In, Kernel, KernelArgs, Launch, Out};
use crate::kernel_args;
use crate::numerics::Numerics;

kernel_args! {
    /// `chosen` (`[count, K]`, ascending) and `weights` (`[count, K]`) from the gate's `scores` (`[count, E]`).
    ///
    /// With `table` (`[vocab, K]`) the experts are those of the token in `rows`, and `bias` is not read; without it
    /// those with the largest affinity plus `bias` (`[E]`), and `rows` is not read.
    pub struct RouteArgs {
        scores: In<F32>, bias: In<F32>, table: In<I32>, rows: In<StepRow>,
        chosen: Out<U32>, weights: Out<F32>, scale: f32, count: u32,
    }
}

/// Threads of a block: four rows.
const THREADS: u32 = 128;
const ROWS_PER_BLOCK: u32 = THREADS / 32;

/// What is compiled for `chosen` of `experts` experts.
pub fn unit(experts: usize, chosen: usize, numerics: Numerics) -> Unit {
    assert!(chosen <= experts && chosen <= 32 && experts <= 1024, "{chosen} of {experts} experts do not fit a warp");
    Unit {
        family: "router",
        source: include_str!("router.cu"),
        args: RouteArgs::cuda(),
        defines: vec![define("E", experts), define("K", chosen), published(numerics), define("THREADS", THREADS)],
        kernels: vec![("route".into(), 0)],
    }
}

/// Chooses the experts of `args.count` rows.
pub fn launch(gpu: &dyn Gpu, kernel: Kernel, args: RouteArgs) -> Result<(), DeviceError> {
    gpu.launch(kernel, Launch::row(args.count.div_ceil(ROWS_PER_BLOCK), THREADS), args.bytes().as_slice())
}
