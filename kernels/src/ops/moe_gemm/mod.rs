//! The activation between an expert's two matmuls (SPEC 3.7).

pub mod decode;
#[cfg(test)]
mod decode_tests;
pub mod native;
#[cfg(test)]
mod native_tests;
pub mod prefill;
#[cfg(test)]
mod prefill_tests;
mod reference;

pub use reference::*;
