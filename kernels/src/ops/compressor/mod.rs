//! Gated pooling of 4 or 128 tokens into one entry (SPEC 3.5).

mod reference;

pub use reference::*;
