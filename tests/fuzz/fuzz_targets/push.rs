//! Both sides of a push against a peer that knows the token and says anything.
//!
//! Input: flags (1: the peer receives; 2: it has a proof of its own instead of the right one; 4: the name is
//! taken, so that a receiver stops where it has judged the offer), then the frames it says. A frame of kind
//! 0x86 holds two numbers and stands for that rank's real block.
#![no_main]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use dsv4_format::{Artifact, FormatError, NoProgress};
use dsv4_fuzz::peer::{BLOCK, Peer, WHOLE_BLOCK, auth, first_frame, frame, welcome};
use dsv4_fuzz::{artifact, scratch, seed_corpus};
use dsv4c::CompileError;
use dsv4c::push::{PushOptions, Ranks, ReceiveOptions, Token, push_over, receive_over};
use libfuzzer_sys::fuzz_target;

const PEER_RECEIVES: u8 = 1;
const OWN_PROOF: u8 = 2;
const TAKEN: u8 = 4;
const BLOCK_AT: std::ops::Range<usize> = 2 << 20..4 << 20;

struct Real {
    dir: PathBuf,
    small: PathBuf,
    /// Of the two ranks.
    blocks: [Vec<u8>; 2],
}

fn real() -> &'static Real {
    static REAL: OnceLock<Real> = OnceLock::new();
    REAL.get_or_init(|| {
        let dir = scratch();
        let small = artifact(&dir, "small.dsv4", 2, false);
        artifact(&dir, "taken.dsv4", 1, false);
        let block = |rank| fs::read(small.join(format!("rank{rank}.weights"))).expect("a rank")[BLOCK_AT].to_vec();
        let blocks = [block(0), block(1)];
        Real { dir, small, blocks }
    })
}

fn seeds() -> Vec<Vec<u8>> {
    let small = &real().small;
    let manifest = fs::read(small.join("MANIFEST")).expect("MANIFEST");
    let meta = fs::read(small.join("meta")).expect("meta");
    let offer = |ranks: u64| {
        let head = [&ranks.to_le_bytes()[..], &0u32.to_le_bytes(), &(manifest.len() as u32).to_le_bytes()].concat();
        frame(3, &[&head[..], &manifest].concat())
    };
    let block = |rank: u32| frame(WHOLE_BLOCK, &[rank.to_le_bytes(), [0; 4]].concat());
    let file = frame(7, &[&0u32.to_le_bytes()[..], &meta].concat());
    let done = frame(8, &[]);
    let both = [offer(3), block(0), block(1), file.clone(), done.clone()].concat();
    let one = [offer(2), file, block(1), done.clone()].concat();
    let want = |flags: [u8; 3]| frame(5, &flags);
    let alive = frame(4, &[]);
    let asks = [alive.clone(), want([1, 1, 1]), want([0, 1, 0]), alive, frame(9, &[0])].concat();
    let refuses = frame(10, b"no room");
    let seed = |flags: u8, frames: &[u8]| [&[flags], frames].concat();
    vec![
        seed(0, &both),
        seed(0, &one),
        seed(TAKEN, &both),
        seed(OWN_PROOF, &[auth(&[], &both), both.clone()].concat()),
        seed(PEER_RECEIVES, &asks),
        seed(PEER_RECEIVES, &refuses),
        seed(PEER_RECEIVES | OWN_PROOF, &[welcome(&[]), asks].concat()),
    ]
}

/// Frames as they are said: with blocks where an input only names them.
fn said(input: &[u8]) -> Vec<u8> {
    let (mut out, mut rest) = (Vec::new(), input);
    while let Some((kind, content, after)) = first_frame(rest) {
        match content.first() {
            Some(rank) if kind == WHOLE_BLOCK => {
                out.extend(frame(BLOCK, &[content, &real().blocks[usize::from(rank & 1)]].concat()));
            }
            _ => out.extend_from_slice(&rest[..rest.len() - after.len()]),
        }
        rest = after;
    }
    // What is no whole frame.
    out.extend_from_slice(rest);
    out
}

fn judge(error: &CompileError) {
    assert!(!matches!(error, CompileError::Format(FormatError::Memory { .. })), "{error}");
    assert!(error.to_string().contains("\n  help: "), "{error}");
}

fn push(flags: u8, input: &[u8]) {
    let artifact = real().small.clone();
    let options = PushOptions { artifact, which: Ranks::All, token: Token::none(), timeout: Duration::ZERO };
    let answer = |heard: &[u8]| {
        let proof = if flags & OWN_PROOF == 0 { welcome(heard) } else { Vec::new() };
        [proof, said(input)].concat()
    };
    if let Err(error) = push_over(&options, Peer::new(false, answer), &NoProgress) {
        judge(&error);
    }
}

fn receive(flags: u8, input: &[u8]) {
    let taken = flags & TAKEN != 0;
    let out = real().dir.join(if taken { "taken.dsv4" } else { "out.dsv4" });
    let options =
        ReceiveOptions { out: out.clone(), token: Token::none(), key: None, force: false, timeout: Duration::ZERO };
    let answer = |heard: &[u8]| {
        let frames = said(input);
        let proof = if flags & OWN_PROOF == 0 { auth(heard, &frames) } else { Vec::new() };
        [proof, frames].concat()
    };
    match receive_over(&options, Peer::new(true, answer), &NoProgress) {
        Ok(_) => {
            Artifact::open(&out).and_then(|artifact| artifact.verify(&NoProgress)).expect("what was accepted is whole");
            assert!(!taken, "another artifact replaced one without being told to");
        }
        Err(error) => {
            judge(&error);
            assert!(taken || !out.exists(), "{error}");
        }
    }
    // No input finds what another left.
    remove(&out, taken);
    remove(&out.with_file_name(".out.dsv4.partial"), taken);
}

fn remove(path: &Path, taken: bool) {
    if !taken && path.exists() {
        fs::remove_dir_all(path).expect("removed");
    }
}

fuzz_target!(init: seed_corpus(seeds), |input: &[u8]| {
    let Some((&flags, frames)) = input.split_first() else { return };
    if flags & PEER_RECEIVES != 0 { push(flags, frames) } else { receive(flags, frames) }
});
