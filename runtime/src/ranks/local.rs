//! All ranks on this machine: rank 0 starts the others as child processes.
//!
//! A child learns its rank and rank 0's address from two hidden arguments, and the rank count and
//! a random token from its standard input, where no other user can read them. Standard input then
//! stays open as a lifeline: when it ends, rank 0 is gone. (The parent thread's death signal would
//! fire when a thread ends, not the process.) Children get a process group of their own, so that
//! an interrupt from the terminal reaches rank 0 alone, which then ends them in order.
//!
//! Ports: rank 0's listener is bound before the first child starts, and each child binds its own
//! and reports it in its hello. No port is chosen first and bound later.

use std::ffi::OsString;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use super::error::PeerError;
use super::hello::{Facts, Identity, Token};
use super::mesh::{Deadlines, Mesh, Places, RANKS_MAX, Start};

/// First bytes on a child's standard input; then rank count u32 and token.
const GREETING: [u8; 8] = *b"dsv4seat";
const GREETING_BYTES: usize = 8 + 4 + 32;
/// How often a wait for children looks; no child is waited for while the model runs.
const TICK: Duration = Duration::from_millis(10);
/// After a connection broke, how long its process is given to be seen as ended.
const AFTERMATH: Duration = Duration::from_secs(2);

/// Rank 0's side: the other ranks as child processes. Dropping it kills those that still run.
#[derive(Debug)]
pub struct LocalRanks {
    /// Until the ranks are connected; then nobody else is let in.
    listener: Option<TcpListener>,
    leader: SocketAddr,
    tp: u32,
    token: Token,
    children: Vec<LocalChild>,
}

#[derive(Debug)]
struct LocalChild {
    rank: u32,
    process: Child,
    /// Held apart from `process`, whose waiting would close it and so end the child too early.
    lifeline: Option<ChildStdin>,
}

impl LocalRanks {
    /// Starts ranks `1..tp` as `exe args… --local-rank R --local-leader ADDR`. They write to this
    /// process's standard error. Returns at once; [`LocalRanks::connect`] waits for them.
    pub fn spawn(exe: &Path, args: &[OsString], tp: u32) -> Result<LocalRanks, PeerError> {
        let token = Token::random()?;
        // The checks of an identity, before any process exists.
        Identity { rank: 0, tp, token: token.clone(), facts: Facts::new(), port: 0 }.check(RANKS_MAX)?;
        let listener = listen(0)?;
        let leader = address_of(&listener, 0)?;
        let mut ranks = LocalRanks { listener: Some(listener), leader, tp, token, children: Vec::new() };
        for rank in 1..tp {
            let failed = |source| PeerError::Spawn { rank, exe: exe.to_owned(), source };
            let mut process = Command::new(exe)
                .args(args)
                .arg("--local-rank")
                .arg(rank.to_string())
                .arg("--local-leader")
                .arg(leader.to_string())
                .stdin(Stdio::piped())
                .stdout(Stdio::from(std::io::stderr()))
                .process_group(0)
                .spawn()
                .map_err(failed)?;
            let lifeline = process.stdin.take();
            ranks.children.push(LocalChild { rank, process, lifeline });
            let greeting = [GREETING.as_slice(), &tp.to_le_bytes(), ranks.token.as_bytes()].concat();
            let child = ranks.children.last_mut().and_then(|child| child.lifeline.as_mut());
            if let Some(Err(source)) = child.map(|stdin| stdin.write_all(&greeting)) {
                // It closed its input: most likely it has ended, and its status says more.
                return Err(ranks.find_ended(AFTERMATH).unwrap_or_else(|| failed(source)));
            }
        }
        Ok(ranks)
    }

    /// Connects rank 0 with its children. Errors at once when a child ends instead of coming.
    pub fn connect(&mut self, facts: Facts, deadlines: Deadlines) -> Result<Mesh, PeerError> {
        let identity = Identity { rank: 0, tp: self.tp, token: self.token.clone(), facts, port: 0 };
        let listener = self.listener.take();
        let listener = listener.unwrap_or_else(|| panic!("the local ranks were connected twice"));
        let start = Start::new(identity, listener, Places::Local(self.leader), deadlines)?;
        let mut alive = || check(&mut self.children);
        match start.run(&mut alive) {
            Err(error @ PeerError::Lost { .. }) => Err(self.find_ended(AFTERMATH).unwrap_or(error)),
            result => result,
        }
    }

    /// The process ids of ranks 1 and up, in rank order.
    pub fn processes(&self) -> Vec<u32> {
        self.children.iter().map(|child| child.process.id()).collect()
    }

    /// Looks, without waiting, whether every child still runs; the error tells which ended, how.
    pub fn check(&mut self) -> Result<(), PeerError> {
        check(&mut self.children)
    }

    /// Waits up to `within` for a child to end and tells which, how. For after a collective or a
    /// control frame failed: the status of a child says more than its closed connection.
    pub fn find_ended(&mut self, within: Duration) -> Option<PeerError> {
        let start = Instant::now();
        loop {
            if let Err(error) = check(&mut self.children) {
                return Some(error);
            }
            if start.elapsed() >= within {
                return None;
            }
            std::thread::sleep(TICK);
        }
    }

    /// Waits up to `grace` for every child to end by itself; call it after
    /// [`ControlSender::close`](super::ControlSender::close). Errors: the first child (in rank
    /// order) that ended with another status than 0, or did not end and was killed.
    pub fn finish(mut self, grace: Duration) -> Result<(), PeerError> {
        let start = Instant::now();
        let mut result = Ok(());
        for child in &mut self.children {
            let ended = loop {
                match child.process.try_wait() {
                    Ok(Some(status)) if status.success() => break Ok(()),
                    Ok(Some(status)) => break Err(child.ended_with(status.to_string(), status.code())),
                    Err(error) => break Err(child.ended_with(format!("unknown: {error}"), None)),
                    Ok(None) if start.elapsed() < grace => std::thread::sleep(TICK),
                    Ok(None) => {
                        child.end();
                        let (rank, process) = (child.rank, child.process.id());
                        break Err(PeerError::ChildStays { rank, process, waited: start.elapsed() });
                    }
                }
            };
            result = result.and(ended);
        }
        result
    }
}

impl Drop for LocalRanks {
    fn drop(&mut self) {
        // All are killed before the first is waited for.
        for child in &mut self.children {
            let _ended_already = child.process.kill();
        }
        self.children.iter_mut().for_each(LocalChild::end);
    }
}

impl LocalChild {
    /// Kills and reaps; nothing happens to a child that was reaped before.
    fn end(&mut self) {
        let _ended_already = self.process.kill();
        let _reaped_already = self.process.wait();
    }

    fn ended_with(&self, status: String, code: Option<i32>) -> PeerError {
        PeerError::Child { rank: self.rank, process: self.process.id(), status, code }
    }
}

/// A child that has ended stays an error for every later call: `try_wait` keeps its status.
fn check(children: &mut [LocalChild]) -> Result<(), PeerError> {
    for child in children {
        match child.process.try_wait() {
            Ok(None) => {}
            Ok(Some(status)) => return Err(child.ended_with(status.to_string(), status.code())),
            Err(error) => return Err(child.ended_with(format!("unknown: {error}"), None)),
        }
    }
    Ok(())
}

/// A child's side, before it is connected.
#[derive(Debug)]
pub struct LocalSeat {
    rank: u32,
    tp: u32,
    token: Token,
    leader: SocketAddr,
    listener: TcpListener,
}

/// Takes the seat that rank 0 prepared: reads the greeting from `stdin` and starts listening.
///
/// From then on a thread watches `stdin` and calls `leader_gone` when it ends, which is when rank
/// 0 has ended, even while this rank loads or computes; a process passes
/// `|| std::process::exit(5)`.
pub fn join_local(
    rank: u32,
    leader: SocketAddr,
    mut stdin: impl Read + Send + 'static,
    leader_gone: impl FnOnce() + Send + 'static,
) -> Result<LocalSeat, PeerError> {
    let mut greeting = [0; GREETING_BYTES];
    let refused = |found: String| PeerError::Greeting { rank, found };
    stdin.read_exact(&mut greeting).map_err(|error| refused(error.to_string()))?;
    let mut reader = super::wire::Reader::new(&greeting);
    let mut fields = || Ok((reader.fixed("mark")?, reader.u32("tp")?, reader.fixed("token")?));
    let (mark, tp, token): ([u8; 8], u32, [u8; 32]) =
        fields().map_err(|error: super::wire::WireError| refused(error.to_string()))?;
    if mark != GREETING {
        return Err(refused("other bytes".into()));
    }
    let listener = listen(rank)?;
    std::thread::Builder::new()
        .name("leader-watch".into())
        .spawn(move || {
            let mut bytes = [0; 64];
            // Rank 0 writes nothing more; an error is as final as the end.
            while matches!(stdin.read(&mut bytes), Ok(1..)) {}
            leader_gone();
        })
        .map_err(|source| PeerError::Thread { rank, source })?;
    Ok(LocalSeat { rank, tp, token: Token::new(token), leader, listener })
}

impl LocalSeat {
    /// This process's rank.
    pub fn rank(&self) -> u32 {
        self.rank
    }

    /// The number of ranks, as rank 0 told it.
    pub fn tp(&self) -> u32 {
        self.tp
    }

    /// Connects with rank 0 and the other children; as [`connect`](super::connect).
    pub fn connect(self, facts: Facts, deadlines: Deadlines) -> Result<Mesh, PeerError> {
        let LocalSeat { rank, tp, token, leader, listener } = self;
        let identity = Identity { rank, tp, token, facts, port: 0 };
        Start::new(identity, listener, Places::Local(leader), deadlines)?.run(&mut || Ok(()))
    }
}

fn listen(rank: u32) -> Result<TcpListener, PeerError> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(|source| PeerError::Listen {
        rank,
        address: "127.0.0.1, any port".into(),
        source,
    })
}

fn address_of(listener: &TcpListener, rank: u32) -> Result<SocketAddr, PeerError> {
    listener.local_addr().map_err(|source| PeerError::Listen { rank, address: "127.0.0.1, any port".into(), source })
}
