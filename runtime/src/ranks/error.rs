//! What can go wrong between ranks. Every variant ends the rank with [`PeerError::EXIT_CODE`].

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use super::wire::WireError;

/// A rank as messages name it; the rank is unknown until its hello has been read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its rank, once known.
    pub rank: Option<u32>,
    /// Where it listens or where its connection came from.
    pub address: String,
}

impl std::fmt::Display for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.rank {
            Some(rank) => write!(f, "rank {rank} ({})", self.address),
            None => write!(f, "the peer at {}", self.address),
        }
    }
}

/// One fact on which two ranks differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// The fact's name.
    pub name: String,
    /// This rank's value; `None` if it has no such fact.
    pub ours: Option<String>,
    /// The peer's value.
    pub theirs: Option<String>,
}

/// Every fact on which two ranks differ, one line each when printed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Differences(pub Vec<Difference>);

impl std::fmt::Display for Differences {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Debug formatting escapes control characters: the values come from another machine.
        let value = |v: &Option<String>| match v {
            Some(text) => format!("{text:?}"),
            None => "absent".to_owned(),
        };
        for Difference { name, ours, theirs } in &self.0 {
            let (found, expected) = (value(theirs), value(ours));
            write!(f, "\n  {}: found {found}, expected {expected}", name.escape_debug())?;
        }
        Ok(())
    }
}

/// Why the ranks cannot start or go on together.
#[derive(Debug, thiserror::Error)]
pub enum PeerError {
    /// The caller's description of the ranks is impossible.
    #[error("ranks: {what} is {found}, expected {expected}\n  help: {help}")]
    Setup { what: &'static str, found: String, expected: String, help: &'static str },

    /// This rank's own address cannot be listened on.
    #[error(
        "rank {rank}: cannot listen on {address}: {source}\n  help: place {rank} of --peers must be an address of this machine with a free port"
    )]
    Listen { rank: u32, address: String, source: io::Error },

    /// A peer did not come before the deadline.
    #[error(
        "{peer} is missing: expected within {waited:.1?}, found: {last}\n  help: start that rank; if it runs, check its address, its port and the firewall"
    )]
    Absent { peer: Peer, waited: Duration, last: String },

    /// Something answered that is not a rank.
    #[error(
        "{peer} does not speak the rank protocol: found {found}, expected a hello\n  help: another program uses this port; give the ranks a port of their own"
    )]
    NotARank { peer: Peer, found: String },

    /// A rank of another build.
    #[error(
        "{peer} speaks rank protocol version {found}, expected {expected}\n  help: run the same build of dsv4-run on every machine"
    )]
    Version { peer: Peer, found: u32, expected: u32 },

    /// The tokens differ. The values stay secret.
    #[error(
        "{peer} holds another token: found one that differs, expected this rank's\n  help: two groups of ranks share an address, or the machines were given different secrets"
    )]
    Token { peer: Peer },

    /// A peer holds another rank than its place says.
    #[error(
        "{peer} says it is rank {found}, expected {expected}\n  help: --peers must list the same ranks in the same order everywhere, and each rank needs its own --rank"
    )]
    Rank { peer: Peer, found: u32, expected: String },

    /// A peer calls this rank by another's number.
    #[error(
        "{peer} takes this rank for rank {found}, expected {expected}\n  help: --peers must list the same ranks in the same order everywhere"
    )]
    Place { peer: Peer, found: u32, expected: u32 },

    /// A second process claims a rank.
    #[error(
        "{peer} came twice: found a second connection for the same purpose, expected one\n  help: two processes were started with the same --rank; stop one"
    )]
    Duplicate { peer: Peer },

    /// The ranks would not compute the same model in the same way.
    #[error(
        "{peer} does not fit this rank:{differences}\n  help: start every rank with the same artifact, the same build and the same options"
    )]
    Differs { peer: Peer, differences: Differences },

    /// The connection ended.
    #[error(
        "{peer} is gone during {during}: found {found}, expected it to stay\n  help: its own log says why it ended"
    )]
    Lost { peer: Peer, during: String, found: String },

    /// The peer is connected and silent.
    #[error(
        "{peer} is stuck during {during}: found unfinished after {waited:.1?}, expected within that time\n  help: see its log and its load; a stopped or swapping machine looks like this"
    )]
    Stuck { peer: Peer, during: String, waited: Duration },

    /// The ranks run different collectives.
    #[error(
        "{peer} is out of step: found {found}, expected {expected}\n  help: this is a defect in dsv4-run; report it with the logs of every rank"
    )]
    OutOfStep { peer: Peer, found: String, expected: String },

    /// A frame announces more bytes than any frame may have.
    #[error(
        "{peer}, {during}: a frame has {found} bytes, expected at most {limit}\n  help: run the same build of dsv4-run on every machine"
    )]
    FrameTooLong { peer: Peer, during: &'static str, found: u64, limit: u64 },

    /// Bytes that are not what the protocol has here.
    #[error(
        "{peer}, {during}: found {found}, expected {expected}\n  help: run the same build of dsv4-run on every machine, and let nothing else use its port"
    )]
    Garbled { peer: Peer, during: &'static str, found: String, expected: &'static str },

    /// A message that does not decode.
    #[error("{peer}, {during}: {source}")]
    Message { peer: Peer, during: &'static str, source: WireError },

    /// The operating system refused something on a connection.
    #[error(
        "{peer}, {during}: found the error \"{source}\", expected it to work\n  help: check the limits of this process (open files) and the network"
    )]
    Socket { peer: Peer, during: &'static str, source: io::Error },

    /// A collective failed before; this rank may not go on.
    #[error(
        "ranks: a collective was started after one had failed, expected none\n  help: this rank must end; the first failure was: {first}"
    )]
    Failed { first: String },

    /// No random token could be made.
    #[error(
        "/dev/urandom: cannot read 32 bytes: {source}\n  help: the device must exist and be readable in this container"
    )]
    Random { source: io::Error },

    /// A local rank cannot be started.
    #[error(
        "rank {rank}: cannot start {}: {source}\n  help: the program must still be where it was started from, and processes must be allowed", exe.display()
    )]
    Spawn { rank: u32, exe: PathBuf, source: io::Error },

    /// A local rank ended on its own.
    #[error(
        "rank {rank} (process {process}) ended with {status}, expected it to run until rank 0 ends it\n  help: its own error stands above in this log"
    )]
    Child { rank: u32, process: u32, status: String, code: Option<i32> },

    /// The watch over standard input cannot be started.
    #[error(
        "rank {rank}: cannot start a thread: {source}\n  help: raise the limit of threads or processes (ulimit -u)"
    )]
    Thread { rank: u32, source: io::Error },

    /// A local rank does not end when told.
    #[error(
        "rank {rank} (process {process}) was still running {waited:.1?} after rank 0 had closed, expected it to end; it was killed\n  help: report this with its log"
    )]
    ChildStays { rank: u32, process: u32, waited: Duration },

    /// A local rank was not started by rank 0.
    #[error(
        "rank {rank}: standard input holds {found}, expected the greeting of rank 0\n  help: --local-rank and --local-leader are for dsv4-run itself; use --rank and --peers"
    )]
    Greeting { rank: u32, found: String },
}

impl PeerError {
    /// The exit code of a process that ends for any of these reasons.
    pub const EXIT_CODE: u8 = 5;
}
