//! Ranks that run one model together: how they find each other, prove that they belong together,
//! sum their partial results, and take commands from rank 0.
//!
//! Every pair of ranks holds one TCP connection for collectives; every worker holds a second one
//! to rank 0 for commands. Two connections, not one with two kinds of frames: the collective half
//! moves into the compute backend while the control half stays with the engine, so neither needs a
//! lock or a reader that sorts frames, and a command never queues behind megabytes of floats.
//!
//! Invariants: nothing but a hello is read from a connection before both sides have compared
//! token, tensor-parallel size and facts; every length is bounded before memory is taken; no wait
//! spins; a lost or stuck peer becomes a [`PeerError`] on every rank that depends on it.
//!
//! Absent on purpose: heartbeats (a dead process closes its sockets, a dead machine is found by
//! TCP keepalive), reconnecting (a lost rank has lost its state), encryption (the token keeps
//! strangers and mix-ups out; it does not hide traffic from somebody who reads the wire).

mod caller;
mod collective;
mod control;
mod error;
mod hello;
mod local;
mod mesh;
mod socket;
pub mod wire;

#[cfg(test)]
mod tests;

pub use collective::TcpCollective;
pub use control::{CONTROL_BYTES_MAX, Control, ControlReceiver, ControlSender};
pub use error::{Peer, PeerError};
pub use hello::{FACT_BYTES_MAX, FACTS_MAX, Facts, Token};
pub use local::{LocalRanks, LocalSeat, join_local};
pub use mesh::{Deadlines, Mesh, RANKS_MAX, connect};
