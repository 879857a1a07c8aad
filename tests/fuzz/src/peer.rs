//! The other end of a push, in memory: it proves the token whatever it says, so that what is fuzzed is
//! what lies behind the proof.

use std::io::{self, Read, Write};
use std::time::Duration;

use dsv4c::push::Stream;

/// Of the peer's greeting.
const NONCE: [u8; 32] = [9; 32];
/// Magic, version and nonce.
const GREETING_BYTES: usize = 44;
/// A frame's kind and length.
const HEAD_BYTES: usize = 5;

pub const AUTH: u8 = 1;
pub const WELCOME: u8 = 2;
pub const BLOCK: u8 = 6;
/// In an input: a block's frame without the block, of which only the two numbers are there.
pub const WHOLE_BLOCK: u8 = 0x86;

/// One frame.
pub fn frame(kind: u8, content: &[u8]) -> Vec<u8> {
    [&[kind][..], &(content.len() as u32).to_le_bytes(), content].concat()
}

/// The content of the frame that `bytes` begin with, and what follows it.
pub fn first_frame(bytes: &[u8]) -> Option<(u8, &[u8], &[u8])> {
    let (head, rest) = bytes.split_first_chunk::<HEAD_BYTES>()?;
    let [kind, a, b, c, d] = *head;
    let (content, rest) = rest.split_at_checked(u32::from_le_bytes([a, b, c, d]) as usize)?;
    Some((kind, content, rest))
}

fn proof(side: &str, nonces: [&[u8]; 2], offer: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_keyed(&blake3::derive_key("dsv4 push token v1", b""));
    hasher.update(&(side.len() as u64).to_le_bytes()).update(side.as_bytes());
    hasher.update(nonces[0]).update(nonces[1]).update(offer);
    *hasher.finalize().as_bytes()
}

/// A sender's proof for the offer that `said` begins with.
pub fn auth(heard: &[u8], said: &[u8]) -> Vec<u8> {
    let offer = first_frame(said).map_or(&[][..], |(_, content, _)| content);
    let hash = *blake3::hash(offer).as_bytes();
    let nonce = heard.get(12..GREETING_BYTES).unwrap_or(&NONCE);
    frame(AUTH, &[hash, proof("push", [&NONCE, nonce], &hash)].concat())
}

/// A receiver's proof, after the sender's own was heard.
pub fn welcome(heard: &[u8]) -> Vec<u8> {
    let nonce = heard.get(12..GREETING_BYTES).unwrap_or(&NONCE);
    let offer = heard.get(GREETING_BYTES + HEAD_BYTES..GREETING_BYTES + HEAD_BYTES + 32).unwrap_or(&NONCE);
    frame(WELCOME, &proof("receive", [nonce, &NONCE], offer))
}

/// What a peer of this version says first.
pub fn greeting() -> Vec<u8> {
    [b"DSV4PUSH\x01\0\0\0".as_slice(), &NONCE].concat()
}

/// Says the greeting, and all else when it has heard `needs` bytes.
pub struct Peer<F> {
    say: io::Cursor<Vec<u8>>,
    needs: usize,
    answer: Option<F>,
    heard: Vec<u8>,
}

impl<F: FnOnce(&[u8]) -> Vec<u8>> Peer<F> {
    /// `answer` makes the bytes after the greeting out of what was heard: of a receiver's greeting, and of a
    /// sender's greeting and proof.
    pub fn new(is_sender: bool, answer: F) -> Peer<F> {
        let needs = if is_sender { GREETING_BYTES } else { GREETING_BYTES + HEAD_BYTES + 64 };
        Peer { say: io::Cursor::new(greeting()), needs, answer: Some(answer), heard: Vec::new() }
    }
}

impl<F: FnOnce(&[u8]) -> Vec<u8>> Read for Peer<F> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self.say.read(buf)? {
            0 if self.heard.len() >= self.needs => {
                let Some(answer) = self.answer.take() else { return Ok(0) };
                self.say = io::Cursor::new(answer(&self.heard));
                self.say.read(buf)
            }
            n => Ok(n),
        }
    }
}

impl<F> Write for Peer<F> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        // Only the beginning is needed.
        let room = 256usize.saturating_sub(self.heard.len());
        self.heard.extend_from_slice(&buf[..buf.len().min(room)]);
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<F: FnOnce(&[u8]) -> Vec<u8>> Stream for Peer<F> {
    fn read_within(&mut self, _: Option<Duration>) {}
    fn hang_up(&mut self) {}
}
