//! Commands from rank 0 to the workers: whole byte frames, in order, on their own connections.
//!
//! Frame: mark u32, kind u32, length u32, bytes. An orderly end is a frame of its own, so that a
//! worker can tell it from a rank 0 that died. Absent: what a command means, and any answer;
//! workers answer by taking part in the collectives.

use std::time::Duration;

use rustix::event::{PollFd, PollFlags};

use super::error::PeerError;
use super::socket::{Deadline, Link, wait};

/// The longest control frame.
pub const CONTROL_BYTES_MAX: u32 = 16 << 20;

const MARK: u32 = u32::from_le_bytes(*b"dctl");
const KIND_COMMAND: u32 = 1;
const KIND_CLOSE: u32 = 2;
const HEADER_BYTES: usize = 12;
const DURING: &str = "control";

/// This rank's half of the control connections.
#[derive(Debug)]
pub enum Control {
    /// Rank 0.
    Leader(ControlSender),
    /// Any other rank.
    Worker(ControlReceiver),
}

/// Rank 0's half. Dropping it without [`ControlSender::close`] makes every worker fail.
pub struct ControlSender {
    workers: Vec<Link>,
    within: Duration,
}

impl ControlSender {
    pub(super) fn new(workers: Vec<Link>, within: Duration) -> ControlSender {
        ControlSender { workers, within }
    }

    /// Sends `frame` to every worker. Returns when the sockets have taken it. Errors: a frame over
    /// [`CONTROL_BYTES_MAX`], a worker that is gone or takes nothing within the deadline.
    pub fn send_control(&mut self, frame: &[u8]) -> Result<(), PeerError> {
        self.send(KIND_COMMAND, frame)
    }

    /// Tells every worker that this was the last command.
    pub fn close(mut self) -> Result<(), PeerError> {
        self.send(KIND_CLOSE, &[])
    }

    /// Looks, without waiting, whether every worker is still connected. An idle engine calls this
    /// now and then: without it a lost worker would show only at the next step.
    pub fn check(&self) -> Result<(), PeerError> {
        let mut fds: Vec<PollFd<'_>> =
            self.workers.iter().map(|link| PollFd::new(&link.stream, PollFlags::IN | PollFlags::RDHUP)).collect();
        if let (Err(source), Some(link)) = (wait(&mut fds, &Deadline::within(Duration::ZERO)), self.workers.first()) {
            return Err(PeerError::Socket { peer: link.peer.clone(), during: DURING, source });
        }
        for (link, fd) in self.workers.iter().zip(&fds) {
            if fd.revents() == PollFlags::IN {
                return Err(PeerError::Garbled {
                    peer: link.peer.clone(),
                    during: DURING,
                    found: "bytes from a worker".into(),
                    expected: "silence: only rank 0 sends commands",
                });
            }
            if !fd.revents().is_empty() {
                return Err(link.broken(std::io::ErrorKind::UnexpectedEof.into(), DURING));
            }
        }
        Ok(())
    }

    fn send(&mut self, kind: u32, frame: &[u8]) -> Result<(), PeerError> {
        let too_long = |link: &Link| PeerError::FrameTooLong {
            peer: link.peer.clone(),
            during: DURING,
            found: frame.len() as u64,
            limit: u64::from(CONTROL_BYTES_MAX),
        };
        let deadline = Deadline::within(self.within);
        for link in &self.workers {
            let length = match u32::try_from(frame.len()) {
                Ok(length) if length <= CONTROL_BYTES_MAX => length,
                _ => return Err(too_long(link)),
            };
            let mut header = [0; HEADER_BYTES];
            for (bytes, field) in header.chunks_exact_mut(4).zip([MARK, kind, length]) {
                bytes.copy_from_slice(&field.to_le_bytes());
            }
            link.send(&header, frame, &deadline, DURING)?;
        }
        Ok(())
    }
}

/// A worker's half.
pub struct ControlReceiver {
    leader: Link,
    within: Duration,
    closed: bool,
}

impl ControlReceiver {
    pub(super) fn new(leader: Link, within: Duration) -> ControlReceiver {
        ControlReceiver { leader, within, closed: false }
    }

    /// The next command, waiting for it as long as it takes; `None` once rank 0 has closed in
    /// order. Errors: rank 0 is gone, a frame that began does not end within the deadline, a
    /// length over [`CONTROL_BYTES_MAX`], bytes that are no frame.
    pub fn recv_control(&mut self) -> Result<Option<Vec<u8>>, PeerError> {
        if self.closed {
            return Ok(None);
        }
        let link = &self.leader;
        link.wait_for(PollFlags::IN, &Deadline::never(), DURING)?;
        let deadline = Deadline::within(self.within);
        let mut header = [0; HEADER_BYTES];
        link.receive(&mut header, &deadline, DURING)?;
        let (fields, _) = header.as_chunks::<4>();
        let fields: Vec<u32> = fields.iter().map(|field| u32::from_le_bytes(*field)).collect();
        match fields[..] {
            [MARK, KIND_CLOSE, 0] => {
                self.closed = true;
                Ok(None)
            }
            [MARK, KIND_COMMAND, length] if length <= CONTROL_BYTES_MAX => {
                let mut frame = vec![0; length as usize];
                link.receive(&mut frame, &deadline, DURING)?;
                Ok(Some(frame))
            }
            [MARK, KIND_COMMAND, length] => Err(PeerError::FrameTooLong {
                peer: link.peer.clone(),
                during: DURING,
                found: u64::from(length),
                limit: u64::from(CONTROL_BYTES_MAX),
            }),
            _ => Err(PeerError::Garbled {
                peer: link.peer.clone(),
                during: DURING,
                found: format!("the header {header:02x?}"),
                expected: "the header of a command",
            }),
        }
    }
}

impl std::fmt::Debug for ControlSender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ControlSender to {} workers", self.workers.len())
    }
}

impl std::fmt::Debug for ControlReceiver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ControlReceiver from {}", self.leader.peer)
    }
}
