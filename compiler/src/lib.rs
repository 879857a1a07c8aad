//! dsv4c: from a checkpoint to an artifact.
//!
//! [`checkpoint`] reads and judges what was downloaded, [`plan`] says what will be written,
//! [`split`] cuts tensors into ranks' parts, [`kernels`] compiles for GPUs, and [`pack`] streams it all into one. [`synth`] makes
//! checkpoints of any size out of a config.json, and [`inspect`] shows what an artifact holds. [`diff`]
//! says why two artifacts differ, [`sign`] by whom one was made, and [`push`] brings a rank to another machine;
//! [`tune`] chooses among equal kernels.
//! Which tensors there are and how ranks share them is `dsv4-model`'s to say, how files are laid
//! out and hashed `dsv4-format`'s.

pub mod checkpoint;
pub mod diff;
pub mod error;
pub mod inspect;
pub mod kernels;
pub mod pack;
pub mod plan;
pub mod push;
pub mod sign;
pub mod split;
pub mod synth;
pub mod tune;

pub use error::CompileError;
