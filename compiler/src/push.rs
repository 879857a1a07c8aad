//! A rank of an artifact from one machine to another, over one TCP connection.
//!
//! ```text
//! push -> receive    magic, version, nonce
//! receive -> push    magic, version, nonce
//! push -> receive    auth: hash of the offer, proof of the token
//! receive -> push    welcome: its proof of the token
//! push -> receive    offer: ranks, SIGNATURE, MANIFEST
//! receive -> push    alive …, want: which blocks and files are missing       ┐ until nothing is missing,
//! push -> receive    block …, file …, done                                   ┘ a few times at most
//! receive -> push    alive …, accepted
//! either             refuse: why it stops
//! ```
//!
//! A frame is a kind, a length and that many bytes, all integers little-endian. Every length is held
//! against its kind's limit before anything is read or reserved; a peer that did not prove the token
//! gets to send 108 bytes. What arrives is believed only by MANIFEST's hashes, so an interrupted push
//! is resumed by looking at what is there. A receiver holds at most [`MEMORY_BYTES_MAX`] for a peer.
//!
//! The token keeps strangers out; it does not hide what is sent, and nothing is encrypted. Without a
//! token anyone who reaches the port may push: MANIFEST's signature (`--key`) then says whose it is.

mod link;
mod receive;
mod send;
mod wire;

use std::fs::File;
use std::io::Read;
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::time::Duration;

use dsv4_format::{Artifact, BLOCK_BYTES, MANIFEST_BYTES_MAX, Outcome, Progress};
use serde_json::{Value, json};

use crate::error::CompileError;
use crate::sign::Verifier;
use link::Link;
pub use link::Stream;

/// Blocks on their way between network and disk.
const BUFFERS: usize = 8;
/// What a receiver holds for one peer: blocks, and MANIFEST as sent, aligned, decoded and encoded
/// again, each of at most four times its size.
pub const MEMORY_BYTES_MAX: u64 = BUFFERS as u64 * BLOCK_BYTES + 16 * MANIFEST_BYTES_MAX;
/// Without a word from the other side for so long, a connection is given up.
pub const TIMEOUT: Duration = Duration::from_secs(30);
const CONNECT_WITHIN: Duration = Duration::from_secs(10);
const TOKEN_BYTES: std::ops::RangeInclusive<u64> = 16..=4096;

/// A secret both sides know.
#[derive(Clone)]
pub struct Token(Vec<u8>);

impl Token {
    /// No secret: whoever connects is welcome.
    pub fn none() -> Token {
        Token(Vec::new())
    }

    /// The content of a file without white space around it: 16 to 4096 bytes.
    pub fn read(path: &Path) -> Result<Token, CompileError> {
        let file = File::open(path).map_err(CompileError::io("open", path))?;
        let mut bytes = Vec::new();
        let limit = *TOKEN_BYTES.end() + 64;
        file.take(limit).read_to_end(&mut bytes).map_err(CompileError::io("read", path))?;
        let token = bytes.trim_ascii().to_vec();
        if TOKEN_BYTES.contains(&(token.len() as u64)) {
            return Ok(Token(token));
        }
        Err(CompileError::Key {
            file: path.to_path_buf(),
            expected: "a token of 16 to 4096 bytes",
            found: format!("{} bytes or more", token.len()),
            help: "make one for both machines, such as with `openssl rand -hex 32`",
        })
    }
}

/// What to send.
pub struct PushOptions {
    pub artifact: PathBuf,
    pub which: Ranks,
    pub token: Token,
    pub timeout: Duration,
}

/// Which ranks' files to send.
#[derive(Clone, Debug)]
pub enum Ranks {
    /// Those that are here.
    Present,
    /// All of the artifact; an absent one is an error.
    All,
    These(Vec<u32>),
}

/// What was sent, or received.
#[derive(Clone, Debug)]
pub struct Transfer {
    pub peer: String,
    pub artifact_id: String,
    pub ranks: Vec<u32>,
    /// Bytes of blocks and files that were sent in this connection, repetitions included.
    pub bytes: u64,
    /// Bytes of the offered ranks' sections that were there before.
    pub kept_bytes: u64,
    pub seconds: f64,
    pub outcome: Outcome,
}

impl Transfer {
    /// For programs.
    pub fn to_json(&self) -> Value {
        json!({
            "peer": self.peer, "artifact_id": self.artifact_id, "ranks": self.ranks, "bytes": self.bytes,
            "kept_bytes": self.kept_bytes, "seconds": self.seconds, "outcome": outcome_name(self.outcome),
        })
    }

    /// For people.
    pub fn to_text(&self) -> String {
        format!(
            "{}: {} (ranks {:?}, {} bytes sent, {} there before, {:.1} s, {:.2} GB/s)\n",
            self.artifact_id,
            outcome_name(self.outcome),
            self.ranks,
            self.bytes,
            self.kept_bytes,
            self.seconds,
            self.bytes as f64 / self.seconds.max(1e-9) / 1e9,
        )
    }
}

fn outcome_name(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Created => "created",
        Outcome::Replaced => "replaced",
        Outcome::RankAdded => "added to the artifact that was there",
        Outcome::AlreadyThere => "already there, nothing was sent",
    }
}

/// Sends ranks to a machine where [`Receiver::accept`] waits.
///
/// Errors: an artifact that cannot be read or lacks a rank (before connecting), a peer that cannot be
/// reached, refuses, breaks off or has another token. What arrived there is kept for the next attempt.
pub fn push(options: &PushOptions, address: &str, progress: &dyn Progress) -> Result<Transfer, CompileError> {
    let artifact = Artifact::open(&options.artifact)?;
    let offer = send::Offer::new(&artifact, &options.which)?;
    let stream = connect(address)?;
    let link = Link::new(stream, address, options.timeout)?;
    send::session(offer, link, address, &options.token, progress)
}

/// As [`push`], over a connection that is there.
pub fn push_over(
    options: &PushOptions,
    stream: impl Stream,
    progress: &dyn Progress,
) -> Result<Transfer, CompileError> {
    let artifact = Artifact::open(&options.artifact)?;
    send::session(send::Offer::new(&artifact, &options.which)?, stream, "the peer", &options.token, progress)
}

fn connect(address: &str) -> Result<TcpStream, CompileError> {
    let failed = |action, source| CompileError::Network {
        peer: address.to_owned(),
        action,
        source,
        help: "give HOST:PORT of a machine where `dsv4c receive` runs, and check network and firewall",
    };
    let mut last = std::io::Error::new(std::io::ErrorKind::NotFound, "the name has no address");
    for to in address.to_socket_addrs().map_err(|e| failed("resolve the name", e))? {
        match TcpStream::connect_timeout(&to, CONNECT_WITHIN) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(failed("connect", last))
}

/// Where and from whom to receive.
pub struct ReceiveOptions {
    pub out: PathBuf,
    pub token: Token,
    /// Take only what is signed with this key.
    pub key: Option<Verifier>,
    /// Replace another artifact of that name.
    pub force: bool,
    pub timeout: Duration,
}

/// The receiving side, listening.
pub struct Receiver {
    listener: TcpListener,
    options: ReceiveOptions,
}

impl Receiver {
    /// Listens. Errors: an address that cannot be had.
    pub fn bind(address: &str, options: ReceiveOptions) -> Result<Receiver, CompileError> {
        let listener = TcpListener::bind(address).map_err(|source| CompileError::Network {
            peer: address.to_owned(),
            action: "listen",
            source,
            help: "give an address of this machine and a port that is free",
        })?;
        Ok(Receiver { listener, options })
    }

    /// Where it listens.
    pub fn address(&self) -> Result<String, CompileError> {
        let found = self.listener.local_addr().map(|address| address.to_string());
        found.map_err(|source| CompileError::Network {
            peer: "the listener".into(),
            action: "name it",
            source,
            help: "try again",
        })
    }

    /// Waits for one push and sees it to its end. Who does not prove the token is turned away (`log`
    /// gets a line about it), and the waiting goes on.
    ///
    /// Errors: a peer that breaks off or sends what it should not, an offer that is refused, I/O.
    pub fn accept(&self, progress: &dyn Progress, log: &dyn Fn(&str)) -> Result<Transfer, CompileError> {
        loop {
            let (stream, from) = match self.listener.accept() {
                Ok(accepted) => accepted,
                // The peer was gone before it was accepted, or no descriptor is free for a moment.
                Err(error) => {
                    log(&format!("a connection failed: {error}"));
                    std::thread::sleep(Duration::from_millis(100));
                    continue;
                }
            };
            let peer = from.to_string();
            let admitted = Link::new(stream, &peer, self.options.timeout)
                .and_then(|link| receive::admit(link, &peer, &self.options.token));
            match admitted {
                Ok(admitted) => return admitted.session(&self.options, progress),
                Err(error) => log(&format!("turned away: {error}")),
            }
        }
    }
}

/// As [`Receiver::accept`], over a connection that is there; a wrong token is an error.
pub fn receive_over(
    options: &ReceiveOptions,
    stream: impl Stream,
    progress: &dyn Progress,
) -> Result<Transfer, CompileError> {
    receive::admit(stream, "the peer", &options.token)?.session(options, progress)
}
