//! `dsv4-run`: loads an artifact and runs it.
//!
//! The way through: [`load`] opens an artifact and reads a rank, [`compute`] decides what runs it, [`preflight`] says whether
//! it will fit, [`gpu`] puts a rank onto a GPU, [`session`] brings all ranks to life, [`step`] runs one forward pass on all of them, [`generate`] makes tokens out of steps, [`answer`] text
//! out of tokens, [`verbs`] a command out of all that.

pub mod answer;
pub mod bench;
pub mod chat;
pub mod cli;
pub mod compute;
pub mod error;
pub mod generate;
pub mod gpu;
pub mod load;
pub mod preflight;
pub mod progress;
pub mod ranks;
pub mod sample;
pub mod scheduler;
pub mod serve;
pub mod server;
pub mod session;
pub mod stall;
pub mod step;
pub mod tensor_file;
pub mod terminal;
pub mod tokenizer;
pub mod verbs;
