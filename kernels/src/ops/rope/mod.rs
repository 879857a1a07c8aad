//! Rotary embedding of the last channels, neighbours paired (SPEC 3.3).

mod reference;

pub use reference::*;
