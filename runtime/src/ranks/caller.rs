//! A connection that a listening rank has taken and that has not yet said who it is.
//!
//! Reads one hello, as it arrives, and not a byte more. Anybody can open such a connection, so it
//! never waits, and it holds at most one hello of memory. Absent: judging the hello (hello.rs).

use std::io::{self, Read};
use std::net::{SocketAddr, TcpStream};

use super::error::{Peer, PeerError};
use super::hello::{self, Hello, Opening, OpeningError};

/// A connection that has not said hello.
pub(super) struct Caller {
    pub stream: TcpStream,
    pub from: SocketAddr,
    bytes: Vec<u8>,
}

/// Why a caller is turned away before its hello is compared.
pub(super) enum Rejected {
    /// Not a rank, or one that cannot speak: drop it.
    Stranger(String),
    /// A rank of another build: tell it, and end.
    Version(PeerError),
}

impl Caller {
    /// `stream` must be non-blocking.
    pub fn new(stream: TcpStream, from: SocketAddr) -> Caller {
        Caller { stream, from, bytes: Vec::new() }
    }

    /// Reads what has arrived; the hello once it is whole.
    pub fn advance(&mut self) -> Result<Option<Hello>, Rejected> {
        let stranger = |reason: &str| Rejected::Stranger(reason.to_owned());
        loop {
            let wanted = match hello::frame_bytes(&self.bytes) {
                Ok(None) => hello::PREAMBLE_BYTES,
                Ok(Some(whole)) => whole,
                Err(error @ OpeningError::Version(_)) => {
                    let peer = Peer { rank: None, address: self.from.to_string() };
                    return Err(Rejected::Version(error.at(peer)));
                }
                Err(OpeningError::TooLong(found)) => {
                    return Err(stranger(&format!("a hello of {found} bytes")));
                }
                Err(_) => return Err(stranger("bytes that are no hello")),
            };
            let have = self.bytes.len();
            if have == wanted && have > hello::PREAMBLE_BYTES {
                return match hello::decode(&self.bytes) {
                    Ok(Opening::Hello(hello)) => Ok(Some(hello)),
                    _ => Err(stranger("a hello that does not decode")),
                };
            }
            if have >= wanted {
                return Err(stranger("an empty hello"));
            }
            // `wanted` is at most one hello, so nothing that follows it is read here.
            self.bytes.resize(wanted, 0);
            let read = self.stream.read(&mut self.bytes[have..]);
            self.bytes.truncate(have + read.as_ref().map_or(0, |count| *count));
            match read {
                Ok(0) => return Err(stranger("a connection closed before its hello")),
                Ok(_) => {}
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => return Ok(None),
                    io::ErrorKind::Interrupted => {}
                    _ => return Err(stranger(&format!("the error \"{error}\""))),
                },
            }
        }
    }
}
