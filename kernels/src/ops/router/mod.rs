//! Choice of experts and their weights (SPEC 3.7).

mod reference;
#[cfg(test)]
mod tests;

pub use reference::*;

use crate::device::args::{Act, Bf16, F32, I32, StepRow, U32};
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

    /// The same from the gate's input: `x` (`[count, D]`) times `w` (`[E, D]`).
    ///
    /// Affinities go through `scores` (`[count, E]`); `arrivals` ([`arrivals`] counters) are zero before and after.
    pub struct GateArgs {
        x: In<Act>, w: In<Bf16>, scores: Out<F32>, bias: In<F32>, table: In<I32>, rows: In<StepRow>,
        chosen: Out<U32>, weights: Out<F32>, arrivals: Out<U32>, scale: f32, count: u32,
    }
}

/// Threads of a block that only routes: four rows.
const THREADS: u32 = 128;
const ROWS_PER_BLOCK: u32 = THREADS / 32;
/// Threads of a block of the gate.
const GATE_THREADS: u32 = 256;
/// Experts of a block of the gate.
const EXPERTS: u32 = 2;
/// Rows that a block of the gate has: with [`EXPERTS`] they fill a warp.
const ROWS: u32 = 16;

/// Counters that the gate needs for as many rows.
pub fn arrivals(rows_max: u64) -> u64 {
    rows_max.div_ceil(u64::from(ROWS))
}

/// Whether there are kernels for that: a choice fits a warp, rows are whole vectors.
pub fn is_possible(hidden: usize, experts: usize, chosen: usize) -> bool {
    chosen <= experts && chosen <= 32 && experts <= 1024 && hidden.is_multiple_of(8)
}

/// What is compiled for `chosen` of `experts` experts of rows of `hidden` values; kernels gate, route.
pub fn unit(hidden: usize, experts: usize, chosen: usize, numerics: Numerics) -> Unit {
    assert!(is_possible(hidden, experts, chosen), "{chosen} of {experts} experts of a width of {hidden}");
    Unit {
        family: "router",
        source: concat!(include_str!("../hyper_connection/eight.cuh"), include_str!("router.cu")),
        args: RouteArgs::cuda() + &GateArgs::cuda(),
        defines: vec![
            define("D", hidden),
            define("E", experts),
            define("EXPERTS", EXPERTS),
            define("GATE_THREADS", GATE_THREADS),
            define("K", chosen),
            published(numerics),
            define("ROWS", ROWS),
            define("THREADS", THREADS),
        ],
        kernels: ["gate", "route"].map(|name| (name.into(), 0)).into(),
    }
}

/// Scores and experts of `args.count` rows of a model with `experts` experts. Every block reads all rows: for few.
pub fn launch_gate(gpu: &dyn Gpu, kernel: Kernel, experts: u32, args: GateArgs) -> Result<(), DeviceError> {
    assert!(args.w.0.is_multiple_of(16) && args.x.0.is_multiple_of(16), "gate: {:x}, {:x}", args.w.0, args.x.0);
    let grid = [experts.div_ceil(EXPERTS), args.count.div_ceil(ROWS), 1];
    gpu.launch(kernel, Launch { grid, threads: GATE_THREADS, shared: 0 }, args.bytes().as_slice())
}

/// Chooses the experts of `args.count` rows.
pub fn launch(gpu: &dyn Gpu, kernel: Kernel, args: RouteArgs) -> Result<(), DeviceError> {
    gpu.launch(kernel, Launch::row(args.count.div_ceil(ROWS_PER_BLOCK), THREADS), args.bytes().as_slice())
}
