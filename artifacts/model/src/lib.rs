//! What packer and runtime must agree on about the model.
//!
//! One description of DeepSeek-V4: its sizes ([`config`]), its tensors and how ranks share them
//! ([`tensors`], [`partition`], [`layout`]), what it keeps between steps ([`cache`]), its operations
//! ([`ops`]) and the order in which they run ([`forward`]). [`trace`] runs that same forward pass
//! without computing and [`contract`] prints the description as text under a hash. Pure: no I/O, no
//! GPU, no unsafe.

pub mod cache;
pub mod config;
pub mod contract;
pub mod error;
pub mod forward;
pub mod inventory;
pub mod layout;
pub mod ops;
pub mod partition;
pub mod plan;
pub mod tensors;
pub mod trace;

pub use config::{Draft, ModelConfig, Yarn};
pub use error::ModelError;
pub use forward::Model;
pub use partition::{Partition, Tp};
pub use tensors::{Block, Kind, TensorId, TensorRow};
