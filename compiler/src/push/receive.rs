//! The receiving side: lets in who knows the token, judges the offer, asks for what is missing, and
//! writes what arrives. This thread reads the connection into aligned buffers; a few others hash and
//! write them.

use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, channel, sync_channel};
use std::sync::{Mutex, MutexGuard};
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant, SystemTime};

use dsv4_format::io::AlignedBuf;
use dsv4_format::{BLOCK_BYTES, FormatError, Outcome, Progress, Receiving};
use serde_json::{Map, Value};

use super::link::Stream;
use super::wire::{Kind, OfferFrame, Peer, bits, nonce, outcome_byte, proof};
use super::{BUFFERS, ReceiveOptions, Token, Transfer};
use crate::error::CompileError;

const WRITERS: usize = 4;
/// How often damaged blocks are asked for before the way between is given up.
const ROUNDS_MAX: u32 = 4;
/// Greeting and proof, all together: a stranger holds the port no longer.
const PROOF_WITHIN: Duration = Duration::from_secs(10);
/// The offer, all together.
const OFFER_WITHIN: Duration = Duration::from_secs(120);
const ALIVE_EVERY: Duration = Duration::from_secs(3);

/// A peer that knows the token, and the hash of what it will offer.
pub(super) struct Admitted<S> {
    peer: Peer<S>,
    offer: [u8; 32],
}

/// Greets, and turns away who has another version or token.
pub(super) fn admit<S: Stream>(stream: S, name: &str, token: &Token) -> Result<Admitted<S>, CompileError> {
    let mut peer = Peer { stream, name: name.to_owned() };
    peer.stream.read_within(Some(PROOF_WITHIN));
    let version = peer.read_version()?;
    let mine = nonce()?;
    // Before judging: the other side should learn this version, too.
    peer.send_preamble(&mine)?;
    peer.require_version(version)?;
    let nonces = [peer.read_nonce()?, mine];
    let auth = peer.expect(Kind::Auth, "a proof of the token")?;
    let halves = auth.split_first_chunk::<32>().and_then(|(offer, said)| Some((*offer, *said.first_chunk::<32>()?)));
    let (offer, said) = halves.ok_or_else(|| peer.wrong("token", "64 bytes", format!("{}", auth.len())))?;
    // Compares in constant time.
    if blake3::Hash::from_bytes(said) != proof(token, "push", &nonces, &offer) {
        let reason = "the token is another one; give both sides the same --token-file";
        peer.refuse(reason);
        return Err(CompileError::Peer {
            peer: peer.name,
            at: "token",
            expected: "a proof that it knows this one".into(),
            found: "another".into(),
            help: "give both sides the same --token-file; if you do not know this peer, choose a network it cannot reach",
        });
    }
    peer.send(Kind::Welcome, &[proof(token, "receive", &nonces, &offer).as_bytes()])?;
    Ok(Admitted { peer, offer })
}

impl<S: Stream> Admitted<S> {
    /// From the offer to the final name. What goes wrong here is told to the peer.
    pub fn session(mut self, options: &ReceiveOptions, progress: &dyn Progress) -> Result<Transfer, CompileError> {
        let done = self.converse(options, progress);
        match &done {
            Ok(_) | Err(CompileError::Network { .. } | CompileError::Refused { .. }) => {}
            Err(error) => self.peer.refuse(&error.to_string()),
        }
        done
    }

    fn converse(&mut self, options: &ReceiveOptions, progress: &dyn Progress) -> Result<Transfer, CompileError> {
        let started = Instant::now();
        let peer = &mut self.peer;
        peer.stream.read_within(Some(OFFER_WITHIN));
        let bytes = peer.expect(Kind::Offer, "an offer")?;
        peer.stream.read_within(None);
        if blake3::hash(&bytes) != blake3::Hash::from_bytes(self.offer) {
            return Err(peer.wrong("offer", "the one that was announced", "another"));
        }
        let offer = OfferFrame::decode(&bytes);
        let offer = offer.ok_or_else(|| peer.wrong("offer", "ranks, signature and manifest", "something else"))?;
        drop(bytes);
        if let Some(key) = &options.key {
            key.check_bytes(&offer.manifest, offer.signature.as_deref(), &options.out.join("SIGNATURE"))?;
        }
        let receiving = Receiving::begin(&options.out, &offer.manifest, &offer.ranks, options.force)?;
        alive(peer, || receiving.examine(progress))?;
        let manifest = receiving.manifest();
        let artifact_id = manifest.artifact_id.to_string();
        let all: u64 = offer.ranks.iter().filter_map(|&r| manifest.ranks.get(r as usize)).map(|r| r.arena_bytes).sum();
        let missing = missing_bytes(&receiving);
        let mut transfer = Transfer {
            peer: peer.name.clone(),
            artifact_id,
            ranks: offer.ranks.clone(),
            bytes: 0,
            kept_bytes: all - missing.0,
            seconds: 0.0,
            outcome: Outcome::AlreadyThere,
        };
        for round in 0.. {
            let (blocks, files) = missing_bytes(&receiving);
            if blocks + files == 0 {
                break;
            }
            if round == ROUNDS_MAX {
                let found = format!("{} bytes damaged every time", blocks + files);
                return Err(peer.wrong("blocks", "their hashes as in MANIFEST", found));
            }
            peer.send(Kind::Want, &[&want(&receiving, &offer.ranks)])?;
            progress.start("receive", blocks + files);
            transfer.bytes += take_round(&receiving, peer, progress)?;
            progress.finish();
        }
        let receipt = receipt(&transfer, started);
        transfer.outcome = alive(peer, || receiving.finish(offer.signature.as_deref(), receipt))?;
        transfer.seconds = started.elapsed().as_secs_f64();
        // Whether or not the other side hears it: the artifact is complete.
        let _ = peer.send(Kind::Accepted, &[&[outcome_byte(transfer.outcome)]]);
        Ok(transfer)
    }
}

/// Does what may take long, and lets the peer know that it goes on.
fn alive<S: Stream, T: Send>(
    peer: &mut Peer<S>,
    work: impl FnOnce() -> Result<T, FormatError> + Send,
) -> Result<T, CompileError> {
    std::thread::scope(|scope| {
        let (done, result) = channel();
        let worker = start(scope, move || done.send(work()).is_ok())?;
        loop {
            match result.recv_timeout(ALIVE_EVERY) {
                Ok(result) => return Ok(result?),
                // A peer that is gone is noticed at the next thing that matters.
                Err(RecvTimeoutError::Timeout) => drop(peer.send(Kind::Alive, &[])),
                Err(RecvTimeoutError::Disconnected) => match worker.join() {
                    Err(panic) => std::panic::resume_unwind(panic),
                    Ok(_) => unreachable!("the worker sends before it ends"),
                },
            }
        }
    })
}

/// Bytes of blocks, and of compressed files, that are not here.
fn missing_bytes(receiving: &Receiving) -> (u64, u64) {
    let mut blocks = 0;
    for (rank, missing) in receiving.missing_blocks() {
        let numbers = (0u32..).zip(missing).filter(|(_, missing)| *missing);
        blocks +=
            numbers.filter_map(|(block, _)| receiving.block_bytes(rank, block)).map(|len| len as u64).sum::<u64>();
    }
    let files = (0u32..).zip(receiving.missing_files()).filter(|(_, missing)| *missing);
    (blocks, files.filter_map(|(file, _)| receiving.file_bytes(file)).sum())
}

/// A bit for every file, then for every block of every rank that was offered.
fn want(receiving: &Receiving, offered: &[u32]) -> Vec<u8> {
    let mut out = bits(&receiving.missing_files());
    let missing = receiving.missing_blocks();
    for &rank in offered {
        match missing.iter().find(|(other, _)| *other == rank) {
            Some((_, missing)) => out.extend(bits(missing)),
            None => {
                let sections = receiving.manifest().ranks.get(rank as usize).map_or(&[][..], |r| &r.sections);
                let blocks = sections.iter().map(|section| section.blocks.len()).sum();
                out.extend(bits(&vec![false; blocks]));
            }
        }
    }
    out
}

struct Job {
    rank: u32,
    block: u32,
    len: usize,
    buf: AlignedBuf,
}

/// Between the connection and the writers.
struct Pool {
    jobs: SyncSender<Job>,
    free: Receiver<AlignedBuf>,
    /// Back already without having been with the writers.
    spare: Vec<AlignedBuf>,
    /// Buffers that exist; made as they are needed.
    made: usize,
}

impl Pool {
    fn buffer(&mut self) -> Result<AlignedBuf, FormatError> {
        match self.spare.pop().ok_or(()).or_else(|()| self.free.try_recv()) {
            Ok(buf) => Ok(buf),
            Err(_) if self.made < BUFFERS => {
                self.made += 1;
                AlignedBuf::new(BLOCK_BYTES as usize)
            }
            Err(_) => self.free.recv().map_err(|_| FormatError::WriterFailed { rank: 0 }),
        }
    }
}

/// Takes blocks and files up to "done"; returns the bytes that arrived. What was not as MANIFEST says
/// stays missing.
fn take_round<S: Stream>(
    receiving: &Receiving,
    peer: &mut Peer<S>,
    progress: &dyn Progress,
) -> Result<u64, CompileError> {
    let failure: Mutex<Option<FormatError>> = Mutex::new(None);
    let (jobs, queue) = sync_channel::<Job>(BUFFERS);
    let queue = Mutex::new(queue);
    let read = std::thread::scope(|scope| {
        let (give_back, free) = channel();
        for _ in 0..WRITERS {
            let (give_back, queue, failure) = (give_back.clone(), &queue, &failure);
            start(scope, move || {
                while let Some(Job { rank, block, len, buf }) = next(queue) {
                    match receiving.put_block(rank, block, &buf[..len]) {
                        Ok(true) => progress.add(len as u64),
                        Ok(false) => {}
                        Err(error) => drop(lock(failure).replace(error)),
                    }
                    let _ = give_back.send(buf);
                }
            })?;
        }
        // Dropped at the end, which ends the writers when all is written; the scope waits for them.
        let mut pool = Pool { jobs, free, spare: Vec::new(), made: 0 };
        let mut bytes = 0;
        while lock(&failure).is_none() {
            bytes += match peer.head("a block")? {
                (Kind::Block, len) => take_block(receiving, peer, len, &mut pool)?,
                (Kind::File, len) => take_piece(receiving, peer, len, &mut pool, progress)?,
                (Kind::Done, _) => break,
                (found, _) => return Err(peer.wrong("frame", "a block", format!("{found:?}"))),
            };
        }
        Ok(bytes)
    });
    match failure.into_inner().unwrap_or_else(|e| e.into_inner()) {
        Some(error) => Err(error.into()),
        None => read,
    }
}

fn start<'scope, T: Send + 'scope>(
    scope: &'scope std::thread::Scope<'scope, '_>,
    work: impl FnOnce() -> T + Send + 'scope,
) -> Result<ScopedJoinHandle<'scope, T>, FormatError> {
    let started = std::thread::Builder::new().spawn_scoped(scope, work);
    started.map_err(|source| FormatError::Thread { what: "a thread that writes", source })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

fn next(queue: &Mutex<Receiver<Job>>) -> Option<Job> {
    lock(queue).recv().ok()
}

/// Reads a block for the writers. Returns how many bytes it has.
fn take_block<S: Stream>(
    receiving: &Receiving,
    peer: &mut Peer<S>,
    frame_len: usize,
    pool: &mut Pool,
) -> Result<u64, CompileError> {
    let mut numbers = [[0; 4]; 2];
    if frame_len < 8 {
        return Err(peer.wrong("block", "its numbers and bytes", format!("{frame_len} bytes")));
    }
    peer.read_exact(numbers.as_flattened_mut())?;
    let [rank, block] = numbers.map(u32::from_le_bytes);
    let Some(len) = receiving.block_bytes(rank, block).filter(|len| 8 + len == frame_len) else {
        let found = format!("{} bytes for block {block} of rank {rank}", frame_len - 8);
        return Err(peer.wrong("block", "one that was asked for, whole", found));
    };
    let mut buf = pool.buffer()?;
    peer.read_exact(&mut buf[..len])?;
    // Refused only when all writers are gone, and then the next buffer is not to be had either.
    let _ = pool.jobs.send(Job { rank, block, len, buf });
    Ok(len as u64)
}

/// Writes a piece of a compressed file. Returns how many bytes it has.
fn take_piece<S: Stream>(
    receiving: &Receiving,
    peer: &mut Peer<S>,
    frame_len: usize,
    pool: &mut Pool,
    progress: &dyn Progress,
) -> Result<u64, CompileError> {
    let mut index = [0; 4];
    let len = frame_len.saturating_sub(index.len());
    if len == 0 || len as u64 > BLOCK_BYTES {
        return Err(peer.wrong("file", format!("a number and 1 to {BLOCK_BYTES} bytes"), format!("{frame_len} bytes")));
    }
    peer.read_exact(&mut index)?;
    let index = u32::from_le_bytes(index);
    if receiving.file_bytes(index).is_none() {
        return Err(peer.wrong("file", "one that was asked for", format!("number {index}")));
    }
    let mut buf = pool.buffer()?;
    peer.read_exact(&mut buf[..len])?;
    if receiving.put_file(index, &mut buf, len)? {
        progress.add(len as u64);
    }
    pool.spare.push(buf);
    Ok(len as u64)
}

fn receipt(transfer: &Transfer, started: Instant) -> Map<String, Value> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    Map::from_iter([
        ("program".to_owned(), concat!("dsv4c ", env!("CARGO_PKG_VERSION")).into()),
        ("received_from".to_owned(), transfer.peer.clone().into()),
        ("ranks".to_owned(), transfer.ranks.clone().into()),
        ("bytes".to_owned(), transfer.bytes.into()),
        ("seconds".to_owned(), started.elapsed().as_secs_f64().into()),
        ("finished_unix_s".to_owned(), now.into()),
    ])
}
