//! The hello: what two ranks tell each other first on every connection, and what they refuse.
//!
//! Frame: magic (8 bytes), version u32, kind u8, length u32, then the body. The calling rank sends
//! its hello; the listening rank answers with its own, so that both can name every difference, or
//! with a refusal that says nothing but a reason when the token is wrong. The preamble is the only
//! part that all versions share. Absent: sockets, deadlines, retries (mesh.rs).

use std::fs::File;
use std::io::Read;

use super::error::{Difference, Differences, Peer, PeerError};
use super::wire::{Reader, WireError, Writer};

/// How many facts a hello may carry.
pub const FACTS_MAX: u32 = 32;
/// How many bytes a fact's name and a fact's value may each have.
pub const FACT_BYTES_MAX: u32 = 256;

/// Named values that must be equal on all ranks: artifact id, contract, numerics, memory plan.
pub type Facts = Vec<(String, String)>;

pub(super) const MAGIC: [u8; 8] = *b"dsv4rank";
pub(super) const VERSION: u32 = 1;
pub(super) const PREAMBLE_BYTES: usize = 8 + 4 + 1 + 4;
/// The longest body: fixed fields, then every fact at full length.
pub(super) const BODY_BYTES_MAX: u32 = 64 + FACTS_MAX * 2 * (4 + FACT_BYTES_MAX);

const KIND_HELLO: u8 = 1;
const KIND_REFUSED: u8 = 2;

/// The secret that ranks of one group share. Never printed.
#[derive(Clone)]
pub struct Token([u8; 32]);

impl Token {
    /// A token from the caller's secret.
    pub fn new(bytes: [u8; 32]) -> Token {
        Token(bytes)
    }

    /// A token nobody can guess.
    pub fn random() -> Result<Token, PeerError> {
        let mut bytes = [0; 32];
        File::open("/dev/urandom")
            .and_then(|mut file| file.read_exact(&mut bytes))
            .map_err(|source| PeerError::Random { source })?;
        Ok(Token(bytes))
    }

    pub(super) fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Compares in a time that does not depend on where the tokens differ.
    fn same(&self, other: &Token) -> bool {
        let difference = self.0.iter().zip(&other.0).fold(0, |all, (a, b)| all | (a ^ b));
        std::hint::black_box(difference) == 0
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(secret)")
    }
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Channel {
    Collective,
    Control,
}

/// Who a rank is.
#[derive(Clone, Debug)]
pub(super) struct Identity {
    pub rank: u32,
    pub tp: u32,
    pub token: Token,
    pub facts: Facts,
    /// The port on which this rank takes its peers' connections.
    pub port: u16,
}

impl Identity {
    /// Refuses what could not be sent or could not be right.
    pub fn check(&self, ranks_max: u32) -> Result<(), PeerError> {
        let setup = |what, found: String, expected: String, help| Err(PeerError::Setup { what, found, expected, help });
        if !(1..=ranks_max).contains(&self.tp) {
            let help = "give --peers one address per rank of the artifact";
            return setup("the rank count", self.tp.to_string(), format!("1 to {ranks_max}"), help);
        }
        if self.rank >= self.tp {
            let help = "--rank counts from 0";
            return setup("the rank", self.rank.to_string(), format!("below {}", self.tp), help);
        }
        let help = "this is a defect in dsv4-run; report it";
        let limit = FACTS_MAX as usize;
        if self.facts.len() > limit {
            let found = self.facts.len().to_string();
            return setup("the count of facts", found, format!("at most {limit}"), help);
        }
        let repeated = |(index, (name, _)): (usize, &(String, String))| {
            self.facts.iter().skip(index + 1).any(|(other, _)| other == name)
        };
        if self.facts.iter().enumerate().any(repeated) {
            return setup("the name of a fact", "given twice".into(), "unique".into(), help);
        }
        let limit = FACT_BYTES_MAX as usize;
        match self.facts.iter().find(|(name, value)| name.len().max(value.len()) > limit) {
            Some((name, value)) => {
                let found = format!("{} and {} bytes long", name.len(), value.len());
                setup("a fact's name or value", found, format!("at most {limit} each"), help)
            }
            None => Ok(()),
        }
    }

    /// The hello frame of this rank for `to`.
    pub fn encode(&self, channel: Channel, to: u32) -> Vec<u8> {
        let mut body = Writer::new();
        body.u8(channel as u8);
        body.u32(self.rank);
        body.u32(to);
        body.u32(self.tp);
        body.fixed(self.token.as_bytes());
        body.fixed(&self.port.to_le_bytes());
        body.u32(self.facts.len() as u32);
        for (name, value) in &self.facts {
            body.text(name);
            body.text(value);
        }
        frame(KIND_HELLO, body.as_bytes())
    }

    /// Compares token, rank count and facts with a peer's hello.
    pub fn compare(&self, theirs: &Hello, peer: &Peer) -> Result<(), PeerError> {
        let peer = Peer { rank: Some(theirs.from.rank), address: peer.address.clone() };
        if !self.token.same(&theirs.from.token) {
            return Err(PeerError::Token { peer });
        }
        let mut differences = Vec::new();
        if self.tp != theirs.from.tp {
            let (ours, theirs) = (Some(self.tp.to_string()), Some(theirs.from.tp.to_string()));
            differences.push(Difference { name: "tp".into(), ours, theirs });
        }
        let value = |facts: &Facts, name: &str| facts.iter().find(|(n, _)| n == name).map(|(_, value)| value.clone());
        let names = self.facts.iter().chain(&theirs.from.facts).map(|(name, _)| name);
        for name in names {
            let (ours, theirs) = (value(&self.facts, name), value(&theirs.from.facts, name));
            if ours != theirs && !differences.iter().any(|d| d.name == *name) {
                differences.push(Difference { name: name.clone(), ours, theirs });
            }
        }
        if differences.is_empty() {
            return Ok(());
        }
        Err(PeerError::Differs { peer, differences: Differences(differences) })
    }
}

/// A received hello.
#[derive(Clone, Debug)]
pub(super) struct Hello {
    pub channel: Channel,
    pub from: Identity,
    pub to: u32,
}

/// Why a listening rank refuses without a hello of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The other side has another version; the preamble has told it ours.
    Version,
    Token,
    Duplicate,
}

impl Refusal {
    pub fn encode(self) -> Vec<u8> {
        frame(KIND_REFUSED, &[self as u8])
    }
}

/// A decoded frame of the opening exchange.
#[derive(Clone, Debug)]
pub(super) enum Opening {
    Hello(Hello),
    Refused(Refusal),
}

/// Why bytes are not an opening frame.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum OpeningError {
    Magic,
    Version(u32),
    TooLong(u32),
    Kind { field: &'static str, found: u8 },
    Body(WireError),
}

impl OpeningError {
    pub fn at(self, peer: Peer) -> PeerError {
        const DURING: &str = "hello";
        match self {
            OpeningError::Magic => PeerError::NotARank { peer, found: "bytes without its mark".into() },
            OpeningError::Version(found) => PeerError::Version { peer, found, expected: VERSION },
            OpeningError::TooLong(found) => PeerError::FrameTooLong {
                peer,
                during: DURING,
                found: u64::from(found),
                limit: u64::from(BODY_BYTES_MAX),
            },
            OpeningError::Kind { field, found } => {
                PeerError::Garbled { peer, during: DURING, found: format!("{field} {found}"), expected: "a known one" }
            }
            OpeningError::Body(source) => PeerError::Message { peer, during: DURING, source },
        }
    }
}

/// The length of the whole frame that `bytes` begins; `None` while too few have arrived.
/// The mark is checked as far as it has arrived, so that a stranger is known by its first byte.
pub(super) fn frame_bytes(bytes: &[u8]) -> Result<Option<usize>, OpeningError> {
    if bytes.iter().zip(&MAGIC).any(|(found, expected)| found != expected) {
        return Err(OpeningError::Magic);
    }
    let mut reader = Reader::new(bytes.get(MAGIC.len()..).unwrap_or_default());
    let Ok(version) = reader.u32("version") else { return Ok(None) };
    if version != VERSION {
        return Err(OpeningError::Version(version));
    }
    let (Ok(_), Ok(length)) = (reader.u8("kind"), reader.u32("length")) else { return Ok(None) };
    if length > BODY_BYTES_MAX {
        return Err(OpeningError::TooLong(length));
    }
    Ok(Some(PREAMBLE_BYTES + length as usize))
}

/// Decodes a whole frame, as `frame_bytes` measured it.
pub(super) fn decode(bytes: &[u8]) -> Result<Opening, OpeningError> {
    frame_bytes(bytes)?;
    let mut preamble = Reader::new(bytes.get(MAGIC.len() + 4..).unwrap_or_default());
    let kind = preamble.u8("kind").map_err(OpeningError::Body)?;
    let body = preamble.bytes("body", BODY_BYTES_MAX).map_err(OpeningError::Body)?;
    preamble.finish().map_err(OpeningError::Body)?;
    match kind {
        KIND_HELLO => decode_hello(body).map(Opening::Hello),
        KIND_REFUSED => {
            let mut reader = Reader::new(body);
            let reason = reader.u8("reason").map_err(OpeningError::Body)?;
            reader.finish().map_err(OpeningError::Body)?;
            match reason {
                0 => Ok(Opening::Refused(Refusal::Version)),
                1 => Ok(Opening::Refused(Refusal::Token)),
                2 => Ok(Opening::Refused(Refusal::Duplicate)),
                found => Err(OpeningError::Kind { field: "refusal", found }),
            }
        }
        found => Err(OpeningError::Kind { field: "frame kind", found }),
    }
}

fn decode_hello(body: &[u8]) -> Result<Hello, OpeningError> {
    let mut reader = Reader::new(body);
    let channel = match reader.u8("channel").map_err(OpeningError::Body)? {
        0 => Channel::Collective,
        1 => Channel::Control,
        found => return Err(OpeningError::Kind { field: "channel", found }),
    };
    let mut fields = || -> Result<Hello, WireError> {
        let (rank, to, tp) = (reader.u32("rank")?, reader.u32("to")?, reader.u32("tp")?);
        let token = Token(reader.fixed("token")?);
        let port = u16::from_le_bytes(reader.fixed("port")?);
        let offset = PREAMBLE_BYTES + 47; // the fixed fields above
        let count = reader.u32("facts")?;
        if count > FACTS_MAX {
            return Err(WireError::Long { field: "facts", offset, count, limit: FACTS_MAX });
        }
        let mut facts = Facts::new();
        for _ in 0..count {
            let name = reader.text("fact name", FACT_BYTES_MAX)?;
            let value = reader.text("fact value", FACT_BYTES_MAX)?;
            facts.push((name.to_owned(), value.to_owned()));
        }
        reader.clone().finish()?;
        Ok(Hello { channel, to, from: Identity { rank, tp, token, facts, port } })
    };
    fields().map_err(OpeningError::Body)
}

fn frame(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut frame = Writer::new();
    frame.fixed(&MAGIC);
    frame.u32(VERSION);
    frame.u8(kind);
    frame.bytes(body);
    frame.into_bytes()
}
