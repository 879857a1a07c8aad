//! y = x . W^T for weights of any stored format.

pub mod gemm;
#[cfg(test)]
pub(crate) mod gemm_tests;
pub mod gemv;
#[cfg(test)]
pub(crate) mod gemv_tests;
pub mod native;
#[cfg(test)]
pub(crate) mod native_tests;
mod reference;

pub use reference::*;
