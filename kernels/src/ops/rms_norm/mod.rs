//! RMSNorm: y = w * x * (mean(x^2) + eps)^-1/2.

mod reference;
#[cfg(test)]
mod tests;

pub use reference::*;

use crate::device::args::{Act, F32, StepRow};
use crate::device::unit::{Unit, define, published};
use crate::device::{DeviceError, Gpu, In, Kernel, KernelArgs, Launch, Out};
use crate::kernel_args;
use crate::numerics::Numerics;

kernel_args! {
    /// Rows of `x` (at a distance of `stride` values) normalised into rows of `y` (one after another).
    ///
    /// With `gather`, row `i` of `y` comes from row `gather[i / per].source * per + i % per` of `x`.
    pub struct RmsNormArgs {
        x: In<Act>, w: In<F32>, y: Out<Act>, gather: In<StepRow>, stride: u32, per: u32, eps: f32,
    }
}

/// Threads of a block.
const THREADS: u32 = 256;

/// What is compiled for rows of `cols` values.
pub fn unit(cols: usize, numerics: Numerics) -> Unit {
    Unit {
        family: "rms_norm",
        source: include_str!("rms_norm.cu"),
        args: RmsNormArgs::cuda(),
        defines: vec![define("COLS", cols), published(numerics), define("THREADS", THREADS)],
        kernels: vec![("rms_norm".into(), 0)],
    }
}

/// Normalises `rows` rows.
pub fn launch(gpu: &dyn Gpu, kernel: Kernel, rows: u32, args: RmsNormArgs) -> Result<(), DeviceError> {
    gpu.launch(kernel, Launch::row(rows, THREADS), args.bytes().as_slice())
}
