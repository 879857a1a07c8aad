//! The library and the command from the outside: damaged checkpoints, packing, synthetic checkpoints.

mod checkpoint;
mod command;
mod fixture;
mod pack;
mod synth;
