//! Bringing the ranks together.
//!
//! Every rank listens before it calls. It calls the lower ranks in order, then takes the higher
//! ones; rank 0 only listens, so by induction nobody waits in a circle. Local ranks have ports that
//! nobody knows beforehand: each tells its own in its hello, and rank 0 sends the list of all ports
//! once every rank has proved itself.
//!
//! A caller that shows the protocol's mark but another version, token or fact ends the start on
//! both sides: that is a mistake somebody must correct. A caller without the mark (a port scanner,
//! a health check) is dropped and mentioned only if a rank stays missing.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};

use super::caller::{Caller, Rejected};
use super::collective::TcpCollective;
use super::control::{Control, ControlReceiver, ControlSender};
use super::error::{Peer, PeerError};
use super::hello::{self, Channel, Facts, Hello, Identity, Opening, OpeningError, Refusal, Token};
use super::socket::{Deadline, Link, watch};

/// The largest tensor-parallel size.
pub const RANKS_MAX: u32 = 8;

/// How many unfinished callers a listener keeps; beyond that the oldest is dropped.
const WAITING_MAX: usize = 64;
/// One attempt to connect; more attempts follow until the deadline.
const ATTEMPT: Duration = Duration::from_secs(2);
/// How long a refused caller is given to take the reason.
const REFUSAL: Duration = Duration::from_secs(2);
/// How often the wait for callers looks at what cannot be polled.
const TICK: Duration = Duration::from_millis(100);

/// How long to wait for peers.
#[derive(Clone, Copy, Debug)]
pub struct Deadlines {
    /// From the start of `connect` until every rank is connected.
    pub connect: Duration,
    /// For each collective and each control frame, once begun.
    pub collective: Duration,
}

impl Default for Deadlines {
    fn default() -> Deadlines {
        Deadlines { connect: Duration::from_secs(30), collective: Duration::from_secs(30) }
    }
}

/// All ranks, connected. The halves are independent.
#[derive(Debug)]
pub struct Mesh {
    /// Goes into the compute backend.
    pub collective: TcpCollective,
    /// Stays with the engine.
    pub control: Control,
}

/// Connects rank `rank` with its peers. `peers[r]` is where rank `r` listens, as `host:port`, this
/// rank's own place included; all ranks pass the same list. Blocks until every rank is connected
/// and has shown an equal token, rank count and facts, at most `deadlines.connect`.
pub fn connect(
    rank: u32,
    peers: &[String],
    token: Token,
    facts: Facts,
    deadlines: Deadlines,
) -> Result<Mesh, PeerError> {
    let tp = u32::try_from(peers.len()).unwrap_or(u32::MAX);
    let identity = Identity { rank, tp, token, facts, port: 0 };
    identity.check(RANKS_MAX)?;
    let address = peers.get(rank as usize).cloned().unwrap_or_default();
    let listener = TcpListener::bind(&address).map_err(|source| PeerError::Listen { rank, address, source })?;
    Start::new(identity, listener, Places::Listed(peers.to_vec()), deadlines)?.run(&mut || Ok(()))
}

/// How a rank knows where the others listen.
pub(super) enum Places {
    Listed(Vec<String>),
    /// All on 127.0.0.1; rank 0 listens here and knows the other ports.
    Local(SocketAddr),
}

/// A rank that is being connected.
pub(super) struct Start {
    identity: Identity,
    listener: TcpListener,
    /// For each rank, where it listens, as far as known.
    places: Vec<String>,
    local: bool,
    deadline: Deadline,
    deadlines: Deadlines,
    collective: Vec<Link>,
    control: Vec<Link>,
    /// For each rank, the port its hello named.
    ports: Vec<u16>,
}

impl Start {
    /// `identity.port` is set from `listener`.
    pub fn new(
        mut identity: Identity,
        listener: TcpListener,
        places: Places,
        deadlines: Deadlines,
    ) -> Result<Start, PeerError> {
        identity.check(RANKS_MAX)?;
        let rank = identity.rank;
        let prepared = listener.set_nonblocking(true).and_then(|()| listener.local_addr());
        let own =
            prepared.map_err(|source| PeerError::Listen { rank, address: "the bound listener".into(), source })?;
        identity.port = own.port();
        let tp = identity.tp as usize;
        let (places, local) = match places {
            Places::Listed(places) => (places, false),
            Places::Local(leader) => {
                let mut places = vec!["a local process".to_owned(); tp];
                places[0] = leader.to_string();
                (places, true)
            }
        };
        assert_eq!(places.len(), tp, "one place per rank");
        let mut ports = vec![0; tp];
        ports[rank as usize] = own.port();
        Ok(Start {
            identity,
            listener,
            places,
            local,
            deadline: Deadline::within(deadlines.connect),
            deadlines,
            collective: Vec::new(),
            control: Vec::new(),
            ports,
        })
    }

    /// Connects everything. `alive` is asked about ten times a second while waiting for callers
    /// and ends the wait by an error.
    pub fn run(mut self, alive: &mut dyn FnMut() -> Result<(), PeerError>) -> Result<Mesh, PeerError> {
        let Identity { rank, tp, .. } = self.identity;
        for to in 0..rank {
            let link = self.call(to, Channel::Collective)?;
            self.collective.push(link);
            if to == 0 {
                let link = self.call(to, Channel::Control)?;
                self.control.push(link);
                if self.local {
                    self.receive_ports()?;
                }
            }
        }
        self.take_callers(alive)?;
        if rank == 0 && self.local {
            self.send_ports()?;
        }
        let by_rank = |link: &Link| link.peer.rank;
        self.collective.sort_by_key(by_rank);
        self.control.sort_by_key(by_rank);
        let within = self.deadlines.collective;
        let control = match self.control.pop() {
            Some(leader) if rank > 0 => Control::Worker(ControlReceiver::new(leader, within)),
            last => {
                self.control.extend(last);
                Control::Leader(ControlSender::new(self.control, within))
            }
        };
        Ok(Mesh { collective: TcpCollective::new(rank, tp, self.collective, within), control })
    }

    /// Calls rank `to` until it answers, and compares hellos.
    fn call(&self, to: u32, channel: Channel) -> Result<Link, PeerError> {
        let stream = self.dial(to)?;
        let link = Link::new(self.named(to), stream)?;
        link.send(&self.identity.encode(channel, to), &[], &self.deadline, "hello")?;
        let mut frame = vec![0; hello::PREAMBLE_BYTES];
        link.receive(&mut frame, &self.deadline, "hello")?;
        let refused = |error: OpeningError| error.at(link.peer.clone());
        // `frame_bytes` bounds the length; the preamble is whole, so there is one.
        let whole = hello::frame_bytes(&frame).map_err(refused)?.unwrap_or(frame.len());
        frame.resize(whole, 0);
        link.receive(&mut frame[hello::PREAMBLE_BYTES..], &self.deadline, "hello")?;
        let theirs = match hello::decode(&frame).map_err(refused)? {
            Opening::Hello(theirs) => theirs,
            Opening::Refused(Refusal::Token) => {
                return Err(PeerError::Token { peer: link.peer });
            }
            Opening::Refused(Refusal::Duplicate) => {
                let address = format!("this process, calling {}", link.peer.address);
                let peer = Peer { rank: Some(self.identity.rank), address };
                return Err(PeerError::Duplicate { peer });
            }
            Opening::Refused(Refusal::Version) => {
                return Err(PeerError::Garbled {
                    peer: link.peer,
                    during: "hello",
                    found: "a refusal of the version that it speaks itself".into(),
                    expected: "a hello",
                });
            }
        };
        self.identity.compare(&theirs, &link.peer)?;
        if theirs.from.rank != to {
            let (found, expected) = (theirs.from.rank, to.to_string());
            return Err(PeerError::Rank { peer: link.peer, found, expected });
        }
        Ok(link)
    }

    /// Opens a connection to rank `to`, which may not listen yet.
    fn dial(&self, to: u32) -> Result<TcpStream, PeerError> {
        let peer = self.named(to);
        let mut pause = Duration::from_millis(10);
        loop {
            let left = self.deadline.left().unwrap_or(ATTEMPT).min(ATTEMPT);
            let last = match dial_once(&peer.address, left.max(Duration::from_millis(1))) {
                Ok(stream) => return Ok(stream),
                Err(error) => error.to_string(),
            };
            if self.deadline.passed() {
                return Err(PeerError::Absent { peer, waited: self.deadline.waited(), last });
            }
            let links: Vec<&Link> = self.collective.iter().chain(&self.control).collect();
            watch(&links, Vec::new(), pause.min(left), "start")?;
            pause = (pause * 2).min(Duration::from_millis(250));
        }
    }

    /// Takes calls until every higher rank is here.
    fn take_callers(&mut self, alive: &mut dyn FnMut() -> Result<(), PeerError>) -> Result<(), PeerError> {
        let mut callers: Vec<Caller> = Vec::new();
        let mut last = "no connection from it".to_owned();
        while let Some(missing) = self.missing() {
            alive()?;
            if self.deadline.passed() {
                let (peer, waited) = (self.named(missing), self.deadline.waited());
                return Err(PeerError::Absent { peer, waited, last });
            }
            let mut fds = vec![PollFd::new(&self.listener, PollFlags::IN)];
            fds.extend(callers.iter().map(|caller| PollFd::new(&caller.stream, PollFlags::IN)));
            let links: Vec<&Link> = self.collective.iter().chain(&self.control).collect();
            watch(&links, fds, self.deadline.left().unwrap_or(TICK).min(TICK), "start")?;
            while let Some(caller) = self.accept()? {
                if callers.len() == WAITING_MAX {
                    callers.remove(0);
                }
                callers.push(caller);
            }
            for mut caller in std::mem::take(&mut callers) {
                match caller.advance() {
                    Ok(None) => callers.push(caller),
                    Ok(Some(hello)) => self.admit(caller, hello)?,
                    Err(Rejected::Stranger(reason)) => {
                        last = format!("only {} with {reason}", caller.from);
                    }
                    Err(Rejected::Version(error)) => {
                        return Err(self.refuse(caller, Refusal::Version.encode(), error));
                    }
                }
            }
        }
        Ok(())
    }

    /// The lowest higher rank that has not opened every connection it must.
    fn missing(&self) -> Option<u32> {
        let has = |links: &[Link], rank| links.iter().any(|link| link.peer.rank == Some(rank));
        let own = self.identity.rank;
        (own + 1..self.identity.tp)
            .find(|rank| !has(&self.collective, *rank) || (own == 0 && !has(&self.control, *rank)))
    }

    fn accept(&self) -> Result<Option<Caller>, PeerError> {
        loop {
            match self.listener.accept() {
                Ok((stream, from)) => {
                    // A caller that cannot be made non-blocking could stop the whole start.
                    if stream.set_nonblocking(true).is_ok() {
                        return Ok(Some(Caller::new(stream, from)));
                    }
                }
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return Ok(None),
                    io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => {}
                    _ => {
                        let peer = Peer { rank: None, address: "any address".into() };
                        let during = "taking connections";
                        return Err(PeerError::Socket { peer, during, source: error });
                    }
                },
            }
        }
    }

    /// Compares a caller's hello with ours, answers, and keeps the connection.
    fn admit(&mut self, caller: Caller, hello: Hello) -> Result<(), PeerError> {
        let own = &self.identity;
        let from = hello.from.rank;
        let peer = Peer { rank: Some(from), address: caller.from.to_string() };
        let answer = own.encode(hello.channel, from);
        match own.compare(&hello, &peer) {
            Ok(()) => {}
            Err(error @ PeerError::Token { .. }) => {
                return Err(self.refuse(caller, Refusal::Token.encode(), error));
            }
            Err(error) => return Err(self.refuse(caller, answer, error)),
        }
        if hello.to != own.rank {
            let error = PeerError::Place { peer, found: hello.to, expected: own.rank };
            return Err(self.refuse(caller, answer, error));
        }
        if !(own.rank + 1..own.tp).contains(&from) {
            let expected = format!("a rank above {} and below {}", own.rank, own.tp);
            let error = PeerError::Rank { peer, found: from, expected };
            return Err(self.refuse(caller, answer, error));
        }
        let links = match hello.channel {
            Channel::Collective => &mut self.collective,
            Channel::Control if own.rank == 0 => &mut self.control,
            Channel::Control => {
                let found = format!("a control connection to rank {}", own.rank);
                let expected = "control connections to rank 0 only";
                return Err(PeerError::Garbled { peer, during: "hello", found, expected });
            }
        };
        if links.iter().any(|link| link.peer.rank == Some(from)) {
            let error = PeerError::Duplicate { peer };
            return Err(self.refuse(caller, Refusal::Duplicate.encode(), error));
        }
        if let Some(port) = self.ports.get_mut(from as usize) {
            *port = hello.from.port;
        }
        let link = Link::new(peer, caller.stream)?;
        link.send(&answer, &[], &self.deadline, "hello")?;
        links.push(link);
        Ok(())
    }

    /// Sends `answer` so that the caller learns the reason too, and gives back `error`. That the
    /// caller may be gone already changes nothing.
    fn refuse(&self, caller: Caller, answer: Vec<u8>, error: PeerError) -> PeerError {
        let peer = Peer { rank: None, address: caller.from.to_string() };
        let _told = Link::new(peer, caller.stream)
            .and_then(|link| link.send(&answer, &[], &Deadline::within(REFUSAL), "hello"));
        error
    }

    fn send_ports(&self) -> Result<(), PeerError> {
        let list: Vec<u8> = self.ports.iter().flat_map(|port| port.to_le_bytes()).collect();
        self.collective.iter().try_for_each(|link| link.send(&list, &[], &self.deadline, "start"))
    }

    fn receive_ports(&mut self) -> Result<(), PeerError> {
        let Some(leader) = self.collective.first() else { return Ok(()) };
        let mut list = vec![0; 2 * self.ports.len()];
        leader.receive(&mut list, &self.deadline, "start")?;
        let (ports, _) = list.as_chunks::<2>();
        for (place, port) in self.places.iter_mut().zip(ports).skip(1) {
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, u16::from_le_bytes(*port)));
            *place = address.to_string();
        }
        Ok(())
    }

    fn named(&self, rank: u32) -> Peer {
        let address = self.places.get(rank as usize).cloned().unwrap_or_default();
        Peer { rank: Some(rank), address }
    }
}

fn dial_once(address: &str, within: Duration) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in address.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, within) {
            // On one machine, a socket that calls a free port may be given that very port and
            // then meets itself.
            Ok(stream) if stream.local_addr()? == stream.peer_addr()? => {
                last = io::ErrorKind::ConnectionRefused.into();
            }
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}
