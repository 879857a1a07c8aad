//! The pushing side: says what it has, then sends what is asked for. A few threads read blocks and
//! check them; this one writes them to the connection in whatever order they are ready.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel, sync_channel};
use std::time::{Duration, Instant};

use dsv4_format::io::{AlignedBuf, DirectFile};
use dsv4_format::{Artifact, BLOCK_BYTES, Digest, FormatError, Progress, RankReader, StoredFile};

use super::link::Stream;
use super::wire::{Kind, OfferFrame, Peer, nonce, outcome, proof, take_bits};
use super::{BUFFERS, Ranks, Token, Transfer};
use crate::error::CompileError;

const READERS: usize = 4;
/// A receiver asks again for what arrived damaged; one that never has enough is not believed.
const ROUNDS_MAX: u32 = 8;
/// Greeting and proof, all together.
const WELCOME_WITHIN: Duration = Duration::from_secs(20);
/// For a refusal that may explain why writing failed.
const REASON_WITHIN: Duration = Duration::from_secs(2);

/// What is offered, opened and ready to be read.
pub(super) struct Offer<'a> {
    artifact: &'a Artifact,
    ranks: Vec<u32>,
    readers: Vec<RankReader<'a>>,
    files: Vec<&'a StoredFile>,
    frame: Vec<u8>,
}

impl<'a> Offer<'a> {
    pub fn new(artifact: &'a Artifact, which: &Ranks) -> Result<Offer<'a>, CompileError> {
        let manifest = artifact.manifest();
        let mut ranks = match which {
            Ranks::Present | Ranks::All if artifact.weights_seed().is_some() => Vec::new(),
            Ranks::Present => artifact.present_ranks().to_vec(),
            Ranks::All => (0..manifest.tp).collect(),
            Ranks::These(ranks) => ranks.clone(),
        };
        ranks.sort_unstable();
        ranks.dedup();
        if ranks.is_empty() && artifact.weights_seed().is_none() {
            return Err(CompileError::Usage {
                what: "--rank",
                expected: "a rank whose file is here".into(),
                found: "an artifact without any".into(),
                help: "push from the machine that packed it",
            });
        }
        let readers: Result<_, FormatError> = ranks.iter().map(|&rank| artifact.rank_reader(rank)).collect();
        let frame =
            OfferFrame { ranks: ranks.clone(), signature: artifact.signature()?, manifest: artifact.manifest_bytes()? };
        let files = std::iter::once(&manifest.meta).chain(&manifest.kernel_files);
        let files = files.filter(|file| !file.members.is_empty()).collect();
        Ok(Offer { artifact, ranks, readers: readers?, files, frame: frame.encode() })
    }

    /// What is asked for; `None` for an answer to another offer.
    fn wanted(&self, mut want: &[u8]) -> Option<Wanted> {
        let files = take_bits(&mut want, self.files.len())?;
        let mut blocks = Vec::new();
        for (index, reader) in self.readers.iter().enumerate() {
            let flags = take_bits(&mut want, reader.blocks().len())?;
            let numbers = flags.iter().enumerate().filter(|(_, wanted)| **wanted);
            blocks.extend(numbers.map(|(block, _)| (index, block)));
        }
        want.is_empty().then_some(Wanted { files, blocks })
    }

    fn bytes(&self, wanted: &Wanted) -> u64 {
        let blocks = wanted.blocks.iter().map(|&(rank, block)| self.readers[rank].blocks()[block].len as u64);
        let files = self.files.iter().zip(&wanted.files).filter(|(_, wanted)| **wanted);
        blocks.sum::<u64>() + files.map(|(file, _)| file.len).sum::<u64>()
    }
}

struct Wanted {
    files: Vec<bool>,
    /// Index of the rank among those offered, number of the block.
    blocks: Vec<(usize, usize)>,
}

/// One whole push. What goes wrong here is told to the peer, as long as it listens.
pub(super) fn session<S: Stream>(
    offer: Offer<'_>,
    stream: S,
    name: &str,
    token: &Token,
    progress: &dyn Progress,
) -> Result<Transfer, CompileError> {
    let mut peer = Peer { stream, name: name.to_owned() };
    match converse(&offer, &mut peer, token, progress) {
        Err(CompileError::Network { action: "write to it", source, peer: name, help }) => {
            // Perhaps it stopped listening because it refused, and that lies here to be read.
            peer.stream.read_within(Some(REASON_WITHIN));
            match peer.head("a reason") {
                Err(refused @ CompileError::Refused { .. }) => Err(refused),
                _ => Err(CompileError::Network { action: "write to it", source, peer: name, help }),
            }
        }
        Err(error @ (CompileError::Network { .. } | CompileError::Refused { .. })) => Err(error),
        Err(error) => {
            peer.refuse(&error.to_string());
            Err(error)
        }
        done => done,
    }
}

fn converse<S: Stream>(
    offer: &Offer<'_>,
    peer: &mut Peer<S>,
    token: &Token,
    progress: &dyn Progress,
) -> Result<Transfer, CompileError> {
    let started = Instant::now();
    greet(offer, peer, token)?;
    peer.send(Kind::Offer, &[&offer.frame])?;
    let mut sent_bytes = 0;
    let mut kept_bytes = 0;
    let mut rounds = 0;
    let outcome = loop {
        match peer.head("what is missing")? {
            (Kind::Alive, _) => {}
            (Kind::Want, len) => {
                let want = peer.body(len)?;
                let wanted = offer.wanted(&want).ok_or_else(|| {
                    peer.wrong(
                        "what is missing",
                        "a bit for each block and file of the offer",
                        format!("{len} other bytes"),
                    )
                })?;
                rounds += 1;
                if rounds > ROUNDS_MAX {
                    let found = format!("{} blocks still missing", wanted.blocks.len());
                    return Err(peer.wrong("what is missing", format!("an end after {ROUNDS_MAX} times"), found));
                }
                let bytes = offer.bytes(&wanted);
                if rounds == 1 {
                    let all: u64 = offer.readers.iter().flat_map(|r| r.blocks()).map(|block| block.len as u64).sum();
                    let none = Wanted { files: vec![false; wanted.files.len()], blocks: wanted.blocks.clone() };
                    kept_bytes = all - offer.bytes(&none);
                }
                progress.start("push", bytes);
                send_blocks(offer, &wanted.blocks, peer, progress)?;
                for (index, file) in offer.files.iter().enumerate().filter(|(index, _)| wanted.files[*index]) {
                    send_file(offer, index as u32, file, peer, progress)?;
                }
                progress.finish();
                peer.send(Kind::Done, &[])?;
                sent_bytes += bytes;
            }
            (Kind::Accepted, len) => {
                let body = peer.body(len)?;
                break outcome(&body).ok_or_else(|| peer.wrong("the end", "an outcome", format!("{body:?}")))?;
            }
            (found, _) => return Err(peer.wrong("frame", "what is missing", format!("{found:?}"))),
        }
    };
    if rounds == 0 {
        kept_bytes = offer.readers.iter().flat_map(|r| r.blocks()).map(|block| block.len as u64).sum();
    }
    Ok(Transfer {
        peer: peer.name.clone(),
        artifact_id: offer.artifact.manifest().artifact_id.to_string(),
        ranks: offer.ranks.clone(),
        bytes: sent_bytes,
        kept_bytes,
        seconds: started.elapsed().as_secs_f64(),
        outcome,
    })
}

/// Both sides prove that they know the token before anything about the artifact is said.
fn greet<S: Stream>(offer: &Offer<'_>, peer: &mut Peer<S>, token: &Token) -> Result<(), CompileError> {
    peer.stream.read_within(Some(WELCOME_WITHIN));
    let mine = nonce()?;
    peer.send_preamble(&mine)?;
    let version = peer.read_version()?;
    peer.require_version(version)?;
    let nonces = [mine, peer.read_nonce()?];
    let hash = blake3::hash(&offer.frame);
    let say = proof(token, "push", &nonces, hash.as_bytes());
    peer.send(Kind::Auth, &[hash.as_bytes(), say.as_bytes()])?;
    let answer = peer.expect(Kind::Welcome, "a proof of the token")?;
    let expected = proof(token, "receive", &nonces, hash.as_bytes());
    // Compares in constant time.
    if expected != answer[..] {
        return Err(CompileError::Peer {
            peer: peer.name.clone(),
            at: "token",
            expected: "a proof that it knows this one".into(),
            found: "another".into(),
            help: "give both sides the same --token-file, and the address of your own receiver",
        });
    }
    peer.stream.read_within(None);
    Ok(())
}

struct Ready {
    rank: u32,
    block: u32,
    len: usize,
    buf: AlignedBuf,
}

fn send_blocks<S: Stream>(
    offer: &Offer<'_>,
    blocks: &[(usize, usize)],
    peer: &mut Peer<S>,
    progress: &dyn Progress,
) -> Result<(), CompileError> {
    if blocks.is_empty() {
        return Ok(());
    }
    let next = AtomicUsize::new(0);
    let (give_back, free) = channel();
    for _ in 0..BUFFERS.min(blocks.len()) {
        // The other end lives in this function.
        let _ = give_back.send(AlignedBuf::new(BLOCK_BYTES as usize)?);
    }
    let free = Mutex::new(free);
    std::thread::scope(|scope| {
        let (ready, arriving) = sync_channel(BUFFERS);
        for _ in 0..READERS.min(blocks.len()) {
            let ready = ready.clone();
            let (next, free) = (&next, &free);
            let work = move || {
                // A buffer first: who waits for one must not hold a block back.
                while let Some(buf) = take(free) {
                    let Some(&job) = blocks.get(next.fetch_add(1, Ordering::Relaxed)) else { return };
                    let read = read_block(offer, job, buf);
                    let failed = read.is_err();
                    if ready.send(read).is_err() || failed {
                        return;
                    }
                }
            };
            let started = std::thread::Builder::new().spawn_scoped(scope, work);
            started.map_err(|source| FormatError::Thread { what: "a thread that reads", source })?;
        }
        drop(ready);
        // Moved in, so that readers waiting for a buffer end when this does.
        let give_back = give_back;
        for read in arriving {
            let Ready { rank, block, len, buf } = read?;
            peer.send(Kind::Block, &[&[rank.to_le_bytes(), block.to_le_bytes()].concat(), &buf[..len]])?;
            progress.add(len as u64);
            let _ = give_back.send(buf);
        }
        Ok(())
    })
}

fn take(free: &Mutex<Receiver<AlignedBuf>>) -> Option<AlignedBuf> {
    free.lock().unwrap_or_else(|e| e.into_inner()).recv().ok()
}

fn read_block(offer: &Offer<'_>, (rank, block): (usize, usize), mut buf: AlignedBuf) -> Result<Ready, FormatError> {
    let reader = &offer.readers[rank];
    let place = reader.blocks()[block];
    reader.read(&place, &mut buf[..place.len])?;
    Ok(Ready { rank: offer.ranks[rank], block: block as u32, len: place.len, buf })
}

/// In pieces of 4 MiB. Its hash is known when the last one went out; the receiver checks it as well.
fn send_file<S: Stream>(
    offer: &Offer<'_>,
    index: u32,
    record: &StoredFile,
    peer: &mut Peer<S>,
    progress: &dyn Progress,
) -> Result<(), CompileError> {
    let path = offer.artifact.path().join(&record.name);
    let file = DirectFile::open(&path)?;
    if file.len() != record.len {
        return Err(FormatError::Length { file: path, expected: record.len, found: file.len() }.into());
    }
    let mut buf = AlignedBuf::new(BLOCK_BYTES as usize)?;
    let mut hasher = blake3::Hasher::new();
    let mut at = 0;
    while at < record.len {
        let len = (record.len - at).min(BLOCK_BYTES) as usize;
        file.read_exact_at(&mut buf[..len], at)?;
        hasher.update(&buf[..len]);
        peer.send(Kind::File, &[&index.to_le_bytes(), &buf[..len]])?;
        progress.add(len as u64);
        at += len as u64;
    }
    let found = Digest(*hasher.finalize().as_bytes());
    if found != record.hash {
        let what = "the file".into();
        return Err(FormatError::Hash { file: path, what, expected: record.hash, found }.into());
    }
    Ok(())
}
