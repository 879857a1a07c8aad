//! The connection: bytes in and out, never waiting for ever.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use crate::error::CompileError;

/// What a session runs over: TCP, or a test's invention.
pub trait Stream: Read + Write {
    /// From now on everything together must be read within `duration`; `None` lifts this.
    fn read_within(&mut self, duration: Option<Duration>);

    /// Nothing more will be written. Lets the other side read what was, although it is still writing.
    fn hang_up(&mut self);
}

/// TCP; reading or writing fails when nothing moves for the timeout.
pub(super) struct Link {
    stream: TcpStream,
    timeout: Duration,
    deadline: Option<Instant>,
}

/// For a peer that still writes when it is hung up on: closing at once would take back what was said.
const LINGER: Duration = Duration::from_secs(2);

impl Link {
    pub(super) fn new(stream: TcpStream, peer: &str, timeout: Duration) -> Result<Link, CompileError> {
        let set = || -> io::Result<()> {
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(timeout))?;
            stream.set_write_timeout(Some(timeout))
        };
        set().map_err(|source| CompileError::Network {
            peer: peer.to_owned(),
            action: "set up the connection",
            source,
            help: "try again",
        })?;
        Ok(Link { stream, timeout, deadline: None })
    }
}

/// Where a timeout passed the system says that it would have to wait longer.
fn as_timeout(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::WouldBlock => io::ErrorKind::TimedOut.into(),
        _ => error,
    }
}

impl Read for Link {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if let Some(deadline) = self.deadline {
            let left = deadline.saturating_duration_since(Instant::now()).min(self.timeout);
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.stream.set_read_timeout(Some(left))?;
        }
        self.stream.read(buf).map_err(as_timeout)
    }
}

impl Write for Link {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.stream.write(buf).map_err(as_timeout)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Stream for Link {
    fn read_within(&mut self, duration: Option<Duration>) {
        self.deadline = duration.map(|duration| Instant::now() + duration);
        // Refused only for a zero duration, which is not given.
        let _ = self.stream.set_read_timeout(Some(self.timeout));
    }

    fn hang_up(&mut self) {
        let _ = self.stream.shutdown(Shutdown::Write);
        self.read_within(Some(LINGER));
        let mut rest = [0; 4096];
        while self.read(&mut rest).is_ok_and(|n| n > 0) {}
    }
}
