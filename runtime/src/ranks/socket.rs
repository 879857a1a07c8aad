//! One connection to one peer: non-blocking, waits by `poll`, never beyond a deadline.
//!
//! Owns [`Link`] and the resumable transfers [`Outgoing`] and [`Incoming`], which both the
//! collectives and the simple whole-frame calls are made of. Absent: any frame's meaning.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt;

use super::error::{Peer, PeerError};

/// A moment until which something must have happened, or never.
#[derive(Clone, Copy, Debug)]
pub(super) struct Deadline {
    start: Instant,
    within: Option<Duration>,
}

impl Deadline {
    pub fn within(duration: Duration) -> Deadline {
        Deadline { start: Instant::now(), within: Some(duration) }
    }

    /// No deadline: a worker may wait for its next command for days.
    pub fn never() -> Deadline {
        Deadline { start: Instant::now(), within: None }
    }

    /// What is left; `None` without a deadline.
    pub fn left(&self) -> Option<Duration> {
        self.within.map(|within| within.saturating_sub(self.start.elapsed()))
    }

    pub fn passed(&self) -> bool {
        self.left().is_some_and(|left| left.is_zero())
    }

    pub fn waited(&self) -> Duration {
        self.start.elapsed()
    }
}

/// Waits until one of `fds` is ready; `false` when the deadline passed first.
pub(super) fn wait(fds: &mut [PollFd<'_>], deadline: &Deadline) -> io::Result<bool> {
    loop {
        let left = match deadline.left().map(Timespec::try_from) {
            None => None,
            // A duration beyond the clock's range is as good as none.
            Some(left) => left.ok(),
        };
        match poll(fds, left.as_ref()) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// A connection whose peer is known.
pub(super) struct Link {
    pub peer: Peer,
    pub stream: TcpStream,
}

impl Link {
    /// Prepares `stream`: non-blocking, no Nagle delay, and probes that find a machine that lost
    /// its power or its cable within about 25 s even while nothing is sent.
    pub fn new(peer: Peer, stream: TcpStream) -> Result<Link, PeerError> {
        let prepare = || -> io::Result<()> {
            stream.set_nodelay(true)?;
            stream.set_nonblocking(true)?;
            sockopt::set_socket_keepalive(&stream, true)?;
            sockopt::set_tcp_keepidle(&stream, Duration::from_secs(10))?;
            sockopt::set_tcp_keepintvl(&stream, Duration::from_secs(5))?;
            sockopt::set_tcp_keepcnt(&stream, 3)?;
            Ok(())
        };
        match prepare() {
            Ok(()) => Ok(Link { peer, stream }),
            Err(source) => Err(PeerError::Socket { peer, during: "setting up", source }),
        }
    }

    /// Sends `header` and `body` whole.
    pub fn send(&self, header: &[u8], body: &[u8], deadline: &Deadline, during: &'static str) -> Result<(), PeerError> {
        let mut outgoing = Outgoing::new(header, body);
        loop {
            outgoing.advance(&self.stream).map_err(|error| self.broken(error, during))?;
            if outgoing.done() {
                return Ok(());
            }
            self.wait_for(PollFlags::OUT, deadline, during)?;
        }
    }

    /// Fills `bytes`.
    pub fn receive(&self, bytes: &mut [u8], deadline: &Deadline, during: &'static str) -> Result<(), PeerError> {
        let mut incoming = Incoming::new(&mut [], bytes);
        loop {
            incoming.advance(&self.stream).map_err(|error| self.broken(error, during))?;
            if incoming.done() {
                return Ok(());
            }
            self.wait_for(PollFlags::IN, deadline, during)?;
        }
    }

    /// Waits until the connection is ready for `flags` or broken.
    pub fn wait_for(&self, flags: PollFlags, deadline: &Deadline, during: &'static str) -> Result<(), PeerError> {
        let mut fds = [PollFd::new(&self.stream, flags)];
        match wait(&mut fds, deadline) {
            Ok(true) => Ok(()),
            Ok(false) => Err(self.stuck(deadline, during)),
            Err(source) => Err(PeerError::Socket { peer: self.peer.clone(), during, source }),
        }
    }

    /// The error for a connection that failed with `error`.
    pub fn broken(&self, error: io::Error, during: impl Into<String>) -> PeerError {
        let found = match error.kind() {
            io::ErrorKind::UnexpectedEof => "a closed connection".to_owned(),
            _ => error.to_string(),
        };
        PeerError::Lost { peer: self.peer.clone(), during: during.into(), found }
    }

    pub fn stuck(&self, deadline: &Deadline, during: impl Into<String>) -> PeerError {
        let (peer, waited) = (self.peer.clone(), deadline.waited());
        PeerError::Stuck { peer, during: during.into(), waited }
    }
}

/// Waits at most `pause`, but fails as soon as one of `links` is closed by its peer. Bytes that
/// already arrived on them do not matter: the peer may be ahead.
pub(super) fn watch(
    links: &[&Link],
    also: Vec<PollFd<'_>>,
    pause: Duration,
    during: &'static str,
) -> Result<(), PeerError> {
    let mut fds: Vec<PollFd<'_>> = links.iter().map(|link| PollFd::new(&link.stream, PollFlags::RDHUP)).collect();
    fds.extend(also);
    if let Err(source) = wait(&mut fds, &Deadline::within(pause)) {
        let peer = Peer { rank: None, address: "any address".into() };
        return Err(PeerError::Socket { peer, during, source });
    }
    match links.iter().zip(&fds).find(|(_, fd)| !fd.revents().is_empty()) {
        Some((link, _)) => Err(link.broken(io::ErrorKind::UnexpectedEof.into(), during)),
        None => Ok(()),
    }
}

/// A frame on its way out.
pub(super) struct Outgoing<'a> {
    header: &'a [u8],
    body: &'a [u8],
    sent: usize,
}

impl<'a> Outgoing<'a> {
    pub fn new(header: &'a [u8], body: &'a [u8]) -> Outgoing<'a> {
        Outgoing { header, body, sent: 0 }
    }

    pub fn done(&self) -> bool {
        self.sent == self.header.len() + self.body.len()
    }

    /// Writes what the socket takes now; header and body go out in one call.
    pub fn advance(&mut self, mut stream: &TcpStream) -> io::Result<()> {
        while !self.done() {
            let in_header = self.sent.min(self.header.len());
            let in_body = self.sent - in_header;
            let parts = [IoSlice::new(&self.header[in_header..]), IoSlice::new(&self.body[in_body..])];
            match stream.write_vectored(&parts) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// A frame on its way in.
pub(super) struct Incoming<'a> {
    header: &'a mut [u8],
    body: &'a mut [u8],
    got: usize,
}

impl<'a> Incoming<'a> {
    pub fn new(header: &'a mut [u8], body: &'a mut [u8]) -> Incoming<'a> {
        Incoming { header, body, got: 0 }
    }

    pub fn done(&self) -> bool {
        self.got == self.header.len() + self.body.len()
    }

    pub fn got(&self) -> usize {
        self.got
    }

    /// The header, once it is whole.
    pub fn header(&self) -> Option<&[u8]> {
        (self.got >= self.header.len()).then_some(&*self.header)
    }

    /// Reads what is there now. A short read means that the socket is empty, so no second call is
    /// spent on learning that.
    pub fn advance(&mut self, mut stream: &TcpStream) -> io::Result<()> {
        while !self.done() {
            let in_header = self.got.min(self.header.len());
            let in_body = self.got - in_header;
            let wanted = self.header.len() + self.body.len() - self.got;
            let mut parts =
                [IoSliceMut::new(&mut self.header[in_header..]), IoSliceMut::new(&mut self.body[in_body..])];
            match stream.read_vectored(&mut parts) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => {
                    self.got += count;
                    if count < wanted {
                        return Ok(());
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
