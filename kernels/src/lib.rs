//! Compute backends of the model. So far one: [`reference`], on the CPU.
//!
//! Arithmetic on activations and weights lives in [`ops`], a module per family; [`numerics`] has the
//! number formats, [`simd`] the inner loops, [`weights`] the view of a loaded rank, [`state`] what a
//! sequence keeps between steps, [`collective`] the exchange between ranks, [`memory`] what a rank needs in all.

#[cfg(target_endian = "big")]
compile_error!("weights are little-endian and read in place");

pub mod collective;
pub mod memory;
pub mod numerics;
pub mod ops;
pub mod reference;
pub mod simd;
pub mod state;
pub mod weights;
