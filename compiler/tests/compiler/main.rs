//! The library and the command from the outside: damaged checkpoints, packing, synthetic checkpoints.

mod checkpoint;
mod command;
mod diff;
mod fixture;
mod mutations;
mod pack;
mod plan;
mod push;
mod sign;
mod synth;
