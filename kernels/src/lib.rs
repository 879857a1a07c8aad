//! Compute backends of the model: [`reference`] on the CPU, [`gpu`] on a GPU or its emulator ([`device`]).
//!
//! Arithmetic on activations and weights lives in [`ops`], a module per family; [`numerics`] has the
//! number formats, [`simd`] the inner loops, [`weights`] the view of a loaded rank, [`state`] what a
//! sequence keeps between steps, [`collective`] the exchange between ranks, [`memory`] what a rank needs in all.

#[cfg(target_endian = "big")]
compile_error!("weights are little-endian and read in place");

pub mod collective;
pub mod device;
pub mod gpu;
pub mod memory;
pub mod numerics;
pub mod ops;
pub mod reference;
pub mod simd;
pub mod state;
pub mod tuning;
pub mod weights;
