//! Compute backends. So far the CPU reference backend.

pub mod collective;
