//! Frames and what is in them: written in one way, read with every length bounded.

use std::io::{self, Read};

use dsv4_format::{BLOCK_BYTES, MANIFEST_BYTES_MAX, Outcome, SIGNATURE_BYTES_MAX};
use rustix::rand::{GetRandomFlags, getrandom};

use super::Token;
use super::link::Stream;
use crate::error::CompileError;

const MAGIC: &[u8; 8] = b"DSV4PUSH";
/// Any change of what is sent is a new number.
pub(super) const VERSION: u32 = 1;
const REASON_BYTES_MAX: usize = 1024;
const OFFER_HEAD_BYTES: usize = 16;
const TIMED_OUT: &str = "see whether the other machine is alive and the network works; then push again, which resumes";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    Auth = 1,
    Welcome,
    Offer,
    Alive,
    Want,
    Block,
    File,
    Done,
    Accepted,
    Refuse,
}

impl Kind {
    const ALL: [Kind; 10] = [
        Kind::Auth,
        Kind::Welcome,
        Kind::Offer,
        Kind::Alive,
        Kind::Want,
        Kind::Block,
        Kind::File,
        Kind::Done,
        Kind::Accepted,
        Kind::Refuse,
    ];

    /// Longest content, bytes.
    fn limit(self) -> usize {
        match self {
            Kind::Auth => 64,
            Kind::Welcome => 32,
            Kind::Offer => OFFER_HEAD_BYTES + (SIGNATURE_BYTES_MAX + MANIFEST_BYTES_MAX) as usize,
            Kind::Alive | Kind::Done => 0,
            // A bit for every 32 bytes of MANIFEST, and a byte for its files.
            Kind::Want => MANIFEST_BYTES_MAX as usize / 32,
            Kind::Block | Kind::File => 8 + BLOCK_BYTES as usize,
            Kind::Accepted => 1,
            Kind::Refuse => REASON_BYTES_MAX,
        }
    }
}

/// The other side, by name, and what is said to it.
pub(super) struct Peer<S> {
    pub stream: S,
    pub name: String,
}

impl<S: Stream> Peer<S> {
    pub fn broken(&self, action: &'static str, source: io::Error) -> CompileError {
        CompileError::Network { peer: self.name.clone(), action, source, help: TIMED_OUT }
    }

    /// A peer that says what it should not.
    pub fn wrong(&self, at: &'static str, expected: impl Into<String>, found: impl Into<String>) -> CompileError {
        CompileError::Peer {
            peer: self.name.clone(),
            at,
            expected: expected.into(),
            found: found.into(),
            help: "this is not the same release of dsv4c, or something between damages the data",
        }
    }

    pub fn read_exact(&mut self, buf: &mut [u8]) -> Result<(), CompileError> {
        self.stream.read_exact(buf).map_err(|e| self.broken("read from it", e))
    }

    /// `parts` follow each other as the frame's content.
    pub fn send(&mut self, kind: Kind, parts: &[&[u8]]) -> Result<(), CompileError> {
        let len: usize = parts.iter().map(|part| part.len()).sum();
        assert!(len <= kind.limit(), "{kind:?} of {len} bytes");
        let mut head = vec![kind as u8];
        head.extend_from_slice(&(len as u32).to_le_bytes());
        let mut sent = Ok(());
        match parts {
            [] => sent = self.stream.write_all(&head),
            // Small parts go out with the head, large ones from where they lie.
            [first, rest @ ..] if first.len() <= 256 => {
                head.extend_from_slice(first);
                sent = sent.and_then(|()| self.stream.write_all(&head));
                sent = rest.iter().fold(sent, |sent, part| sent.and_then(|()| self.stream.write_all(part)));
            }
            parts => {
                sent = sent.and_then(|()| self.stream.write_all(&head));
                sent = parts.iter().fold(sent, |sent, part| sent.and_then(|()| self.stream.write_all(part)));
            }
        }
        sent.map_err(|e| self.broken("write to it", e))
    }

    /// The next frame's kind and length. A refusal comes back as the error it is.
    pub fn head(&mut self, expected: &'static str) -> Result<(Kind, usize), CompileError> {
        let mut head = [0; 5];
        self.read_exact(&mut head)?;
        let [kind, a, b, c, d] = head;
        let len = u32::from_le_bytes([a, b, c, d]) as usize;
        let known = Kind::ALL.into_iter().find(|known| *known as u8 == kind);
        let Some(kind) = known else {
            return Err(self.wrong("frame", expected, format!("kind {kind}")));
        };
        if len > kind.limit() {
            return Err(self.wrong("frame length", format!("at most {} for {kind:?}", kind.limit()), len.to_string()));
        }
        if kind == Kind::Refuse {
            let reason = self.body(len)?;
            return Err(CompileError::Refused { peer: self.name.clone(), reason: readable(&reason) });
        }
        Ok((kind, len))
    }

    /// The next frame's content, which must be of this kind.
    pub fn expect(&mut self, kind: Kind, name: &'static str) -> Result<Vec<u8>, CompileError> {
        match self.head(name)? {
            (found, len) if found == kind => self.body(len),
            (found, _) => Err(self.wrong("frame", name, format!("{found:?}"))),
        }
    }

    /// Content of a frame whose length was judged; memory grows with what really arrives.
    pub fn body(&mut self, len: usize) -> Result<Vec<u8>, CompileError> {
        let mut out = Vec::new();
        let read = (&mut self.stream).take(len as u64).read_to_end(&mut out);
        match read {
            Ok(n) if n == len => Ok(out),
            Ok(_) => Err(self.broken("read from it", io::ErrorKind::UnexpectedEof.into())),
            Err(e) => Err(self.broken("read from it", e)),
        }
    }

    /// Says why this side stops, if the other still listens.
    pub fn refuse(&mut self, reason: &str) {
        let mut end = reason.len().min(REASON_BYTES_MAX);
        while !reason.is_char_boundary(end) {
            end -= 1;
        }
        if self.send(Kind::Refuse, &[&reason.as_bytes()[..end]]).is_ok() {
            self.stream.hang_up();
        }
    }

    pub fn send_preamble(&mut self, nonce: &[u8; 32]) -> Result<(), CompileError> {
        let bytes = [&MAGIC[..], &VERSION.to_le_bytes(), nonce].concat();
        self.stream.write_all(&bytes).map_err(|e| self.broken("write to it", e))
    }

    /// Reads magic and version; the nonce follows only in this version.
    pub fn read_version(&mut self) -> Result<u32, CompileError> {
        let (mut magic, mut version) = ([0; 8], [0; 4]);
        self.read_exact(&mut magic)?;
        if magic != *MAGIC {
            let (expected, found) = (MAGIC.escape_ascii().to_string(), magic.escape_ascii().to_string());
            return Err(self.wrong("greeting", expected, found));
        }
        self.read_exact(&mut version)?;
        Ok(u32::from_le_bytes(version))
    }

    pub fn require_version(&self, found: u32) -> Result<(), CompileError> {
        if found == VERSION {
            return Ok(());
        }
        Err(CompileError::Peer {
            peer: self.name.clone(),
            at: "protocol version",
            expected: VERSION.to_string(),
            found: found.to_string(),
            help: "use the same release of dsv4c on both machines; the lower number is the older one",
        })
    }

    pub fn read_nonce(&mut self) -> Result<[u8; 32], CompileError> {
        let mut nonce = [0; 32];
        self.read_exact(&mut nonce)?;
        Ok(nonce)
    }
}

/// For one connection only: a proof is of no use in another.
pub(super) fn nonce() -> Result<[u8; 32], CompileError> {
    let mut nonce = [0; 32];
    getrandom(&mut nonce[..], GetRandomFlags::empty()).map_err(|e| CompileError::Network {
        peer: "this machine".into(),
        action: "take random bytes",
        source: e.into(),
        help: "try again",
    })?;
    Ok(nonce)
}

/// Who says this knows the token, and means this connection and this offer. The sides' proofs differ,
/// so neither can be sent back to its maker.
pub(super) fn proof(token: &Token, side: &str, nonces: &[[u8; 32]; 2], offer: &[u8; 32]) -> blake3::Hash {
    let key = blake3::derive_key("dsv4 push token v1", &token.0);
    let mut hasher = blake3::Hasher::new_keyed(&key);
    hasher.update(&(side.len() as u64).to_le_bytes()).update(side.as_bytes());
    hasher.update(&nonces[0]).update(&nonces[1]).update(offer);
    hasher.finalize()
}

/// Ranks as bits, lengths of SIGNATURE (0: none) and MANIFEST, then both.
pub(super) struct OfferFrame {
    pub ranks: Vec<u32>,
    pub signature: Option<Vec<u8>>,
    pub manifest: Vec<u8>,
}

impl OfferFrame {
    pub fn encode(&self) -> Vec<u8> {
        let ranks = self.ranks.iter().fold(0u64, |bits, rank| bits | 1 << rank);
        let signature = self.signature.as_deref().unwrap_or_default();
        let mut out = ranks.to_le_bytes().to_vec();
        out.extend_from_slice(&(signature.len() as u32).to_le_bytes());
        out.extend_from_slice(&(self.manifest.len() as u32).to_le_bytes());
        out.extend_from_slice(signature);
        out.extend_from_slice(&self.manifest);
        out
    }

    /// `None` for what [`OfferFrame::encode`] does not make.
    pub fn decode(bytes: &[u8]) -> Option<OfferFrame> {
        let (ranks, rest) = bytes.split_first_chunk::<8>()?;
        let (signature_len, rest) = rest.split_first_chunk::<4>()?;
        let (manifest_len, rest) = rest.split_first_chunk::<4>()?;
        let signature_len = u32::from_le_bytes(*signature_len) as usize;
        let (signature, manifest) = rest.split_at_checked(signature_len)?;
        if manifest.len() != u32::from_le_bytes(*manifest_len) as usize || signature_len > SIGNATURE_BYTES_MAX as usize
        {
            return None;
        }
        let bits = u64::from_le_bytes(*ranks);
        Some(OfferFrame {
            ranks: (0..64).filter(|rank| bits >> rank & 1 == 1).collect(),
            signature: (!signature.is_empty()).then(|| signature.to_vec()),
            manifest: manifest.to_vec(),
        })
    }
}

/// Flags as bits, eight to a byte, the first lowest.
pub(super) fn bits(flags: &[bool]) -> Vec<u8> {
    let byte = |chunk: &[bool]| chunk.iter().rev().fold(0, |byte, &flag| byte << 1 | u8::from(flag));
    flags.chunks(8).map(byte).collect()
}

/// Cuts `count` flags off the front; `None` when they are not there or a bit behind them is set.
pub(super) fn take_bits(bytes: &mut &[u8], count: usize) -> Option<Vec<bool>> {
    let (mine, rest) = bytes.split_at_checked(count.div_ceil(8))?;
    let flags: Vec<bool> = (0..count).map(|i| mine[i / 8] >> (i % 8) & 1 == 1).collect();
    *bytes = rest;
    (bits(&flags) == mine).then_some(flags)
}

const OUTCOMES: [Outcome; 4] = [Outcome::Created, Outcome::Replaced, Outcome::RankAdded, Outcome::AlreadyThere];

pub(super) fn outcome_byte(outcome: Outcome) -> u8 {
    OUTCOMES.iter().position(|&other| other == outcome).unwrap_or_else(|| unreachable!("all are listed")) as u8
}

pub(super) fn outcome(bytes: &[u8]) -> Option<Outcome> {
    let [byte] = bytes else { return None };
    OUTCOMES.get(usize::from(*byte)).copied()
}

/// A peer's text, as far as a terminal may see it.
fn readable(text: &[u8]) -> String {
    let shown = |c: char| if c == '\n' || !c.is_control() { c } else { '?' };
    String::from_utf8_lossy(text).chars().map(shown).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_survive_and_bits_behind_them_are_refused() {
        for count in [0, 1, 7, 8, 9, 17] {
            let flags: Vec<bool> = (0..count).map(|i| i % 3 == 0).collect();
            let bytes = [bits(&flags), vec![0xaa]].concat();
            let mut rest = &bytes[..];
            assert_eq!(take_bits(&mut rest, count), Some(flags));
            assert_eq!(rest, [0xaa]);
        }
        assert_eq!(take_bits(&mut &[0b100][..], 2), None);
        assert_eq!(take_bits(&mut &[1][..], 9), None);
    }

    #[test]
    fn offers_survive_and_their_alterations_are_refused() {
        let offer = OfferFrame { ranks: vec![0, 3, 63], signature: Some(b"sig".to_vec()), manifest: vec![7; 20] };
        let bytes = offer.encode();
        let found = OfferFrame::decode(&bytes).unwrap();
        assert_eq!((found.ranks, found.signature, found.manifest), (offer.ranks, offer.signature, offer.manifest));
        for end in 0..bytes.len() {
            assert!(OfferFrame::decode(&bytes[..end]).is_none(), "{end}");
        }
        assert!(OfferFrame::decode(&[&bytes[..], &[0]].concat()).is_none());
    }

    #[test]
    fn proofs_are_of_a_side_a_connection_an_offer_and_a_token() {
        let (one, two) = (Token(b"one".to_vec()), Token(b"two".to_vec()));
        let nonces = [[1; 32], [2; 32]];
        let all = [
            proof(&one, "push", &nonces, &[3; 32]),
            proof(&two, "push", &nonces, &[3; 32]),
            proof(&one, "receive", &nonces, &[3; 32]),
            proof(&one, "push", &[[2; 32], [1; 32]], &[3; 32]),
            proof(&one, "push", &nonces, &[4; 32]),
        ];
        for (i, a) in all.iter().enumerate() {
            assert!(all[..i].iter().all(|b| a != b), "{i}");
        }
        assert_eq!(all[0], proof(&one, "push", &nonces, &[3; 32]));
    }
}
