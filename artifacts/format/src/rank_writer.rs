//! Writes one rank's file from tensor bytes that arrive in layout order.
//!
//! The calling thread only copies into 4 MiB buffers; a few workers hash finished blocks and write
//! them. Memory is bounded by the number of buffers: when all are in flight, `append` waits.
//! Workers may finish in any order; every value lands at its block's index, so the result does not
//! depend on their number. For a journal the writer says where it stands without stopping: the block
//! in the making is written as far as it goes, and the blocks before it may still be on their way.

use std::sync::mpsc::{Receiver, Sender, SyncSender, TryRecvError, channel, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use crate::error::FormatError;
use crate::header::BLOCK_BYTES;
use crate::io::{AlignedBuf, DIRECT_ALIGN, DirectFile};
use crate::journal::{Position, RankState, blocks_between, encode_rank};
use crate::layout::{RankLayout, SectionLayout};
use crate::manifest::{RankFile, Section};
use crate::parallel::lock;
use crate::section::{block_count, block_len, fold, hash_block};
use crate::tree_hash::TreeHash;

const BUFFERS: usize = 8;

struct Job {
    buf: AlignedBuf,
    section: usize,
    block: u64,
    /// Of its first bytes, where `buf` does not have them.
    before: Option<TreeHash>,
    /// Counts the jobs of a writer.
    number: u64,
}

struct Done {
    buf: AlignedBuf,
    section: usize,
    block: u64,
    hash: [u8; 32],
    number: u64,
}

/// What the next mark will say about a rank.
struct Stand {
    position: Position,
    /// The block in the making.
    open: TreeHash,
    /// Jobs sent before it, and how many of them are not done.
    jobs: u64,
    pending: usize,
}

/// Made by [`Draft::rank_writer`](crate::Draft::rank_writer); may move to another thread.
pub struct RankWriter {
    rank: u32,
    layout: Arc<RankLayout>,
    file: Option<Arc<DirectFile>>,
    /// Next tensor to arrive; what is before `at` was handed over or is in `current`.
    next: Position,
    current: Option<AlignedBuf>,
    /// Of the first bytes of the block in the making, where an earlier process had them and no file has.
    before: Option<TreeHash>,
    free: Vec<AlignedBuf>,
    buffers: usize,
    hashes: Vec<Vec<[u8; 32]>>,
    pending: usize,
    sent: u64,
    /// Where the last mark stands.
    marked: Position,
    stand: Option<Stand>,
    failed: bool,
    jobs: Option<SyncSender<Job>>,
    done: Receiver<Result<Done, FormatError>>,
    workers: Vec<JoinHandle<()>>,
}

impl RankWriter {
    /// `file` is `None` for a rank that is hashed but not kept. Goes on from `state`; with a file the
    /// bytes of its block in the making are there.
    pub(crate) fn new(
        rank: u32,
        layout: Arc<RankLayout>,
        file: Option<Arc<DirectFile>>,
        workers: usize,
        state: RankState,
    ) -> Result<Self, FormatError> {
        let (jobs, queue) = sync_channel(BUFFERS);
        let (results, done) = channel();
        let queue = Arc::new(Mutex::new(queue));
        let mut handles = Vec::with_capacity(workers);
        for _ in 0..workers.max(1) {
            let (queue, results) = (Arc::clone(&queue), results.clone());
            let (layout, file) = (Arc::clone(&layout), file.clone());
            let work = move || work(rank, &queue, &results, &layout, file.as_deref());
            let spawned = std::thread::Builder::new().name(format!("write rank {rank}")).spawn(work);
            handles.push(spawned.map_err(|source| FormatError::Thread { what: "a writing thread", source })?);
        }
        let RankState { position, values, open, bytes } = state;
        let before = Some(open).filter(|open| file.is_none() && open.count() > 0);
        assert!(
            bytes.is_some() || before.is_some() || position.in_block() == 0,
            "rank {rank}: the block in the making"
        );
        Ok(RankWriter {
            rank,
            layout,
            file,
            next: position,
            buffers: usize::from(bytes.is_some()),
            current: bytes,
            before,
            free: Vec::new(),
            hashes: values,
            pending: 0,
            sent: 0,
            marked: position,
            stand: None,
            failed: false,
            jobs: Some(jobs),
            done,
            workers: handles,
        })
    }

    pub fn rank(&self) -> u32 {
        self.rank
    }

    pub fn layout(&self) -> &RankLayout {
        &self.layout
    }

    /// The next bytes of `tensor`. Tensors come in layout order, each in one or many pieces; padding
    /// is added here. Waits while too many blocks are in flight.
    ///
    /// Errors: [`FormatError::Order`] for another tensor or too many bytes; a worker's I/O error, after
    /// which nothing more is accepted.
    pub fn append(&mut self, tensor: &str, bytes: &[u8]) -> Result<(), FormatError> {
        if self.failed {
            return Err(FormatError::WriterFailed { rank: self.rank });
        }
        let result = self.try_append(tensor, bytes);
        self.failed |= result.is_err();
        result
    }

    fn try_append(&mut self, tensor: &str, bytes: &[u8]) -> Result<(), FormatError> {
        let layout = Arc::clone(&self.layout);
        let next = layout.sections().get(self.next.section).and_then(|s| Some((s, s.tensors.get(self.next.tensor)?)));
        let Some((section, expected)) = next.filter(|(_, t)| t.name == tensor) else {
            let expected = next.map_or("no further tensor".into(), |(_, t)| format!("tensor {}", t.name));
            return Err(self.out_of_order(expected, format!("tensor {tensor}")));
        };
        let missing = expected.len - self.next.filled;
        if bytes.len() as u64 > missing {
            let expected = format!("at most {missing} more bytes of {tensor} ({} in all)", expected.len);
            return Err(self.out_of_order(expected, format!("{} bytes", bytes.len())));
        }
        self.pad_to(section, expected.offset + self.next.filled)?;
        self.put(section, bytes)?;
        self.next.filled += bytes.len() as u64;
        if self.next.filled == expected.len {
            self.next.filled = 0;
            self.next.tensor += 1;
            if self.next.tensor == section.tensors.len() {
                self.pad_to(section, section.len)?;
                self.next = Position { section: self.next.section + 1, ..Position::default() };
            }
        }
        Ok(())
    }

    /// Waits for all blocks and gives the rank's record.
    ///
    /// Errors: [`FormatError::Order`] when tensors are missing; a worker's I/O error.
    pub fn finish(mut self) -> Result<RankFile, FormatError> {
        if self.failed {
            return Err(FormatError::WriterFailed { rank: self.rank });
        }
        let layout = Arc::clone(&self.layout);
        if let Some(section) = layout.sections().get(self.next.section) {
            let name = section.tensors.get(self.next.tensor).map_or("", |t| t.name.as_str());
            let found = format!("the end after {} bytes of it", self.next.filled);
            return Err(self.out_of_order(format!("tensor {name}"), found));
        }
        self.jobs = None;
        while self.pending > 0 {
            self.collect()?;
        }
        let hashes = std::mem::take(&mut self.hashes);
        let sections = layout.sections().iter().zip(hashes).map(|(section, blocks)| Section {
            name: section.name.clone(),
            offset: section.offset,
            len: section.len,
            root: fold(&blocks).unwrap_or_else(|| unreachable!("a section has at least one block")),
            blocks,
            tensors: section.tensors.clone(),
        });
        Ok(RankFile {
            rank: self.rank,
            file_len: layout.file_len(),
            arena_bytes: layout.arena_bytes(),
            sections: sections.collect(),
        })
    }

    /// Bytes that have a place, padding included.
    pub(crate) fn bytes(&self) -> u64 {
        self.next.bytes(&self.layout)
    }

    /// Whether there is something that no mark covers.
    pub(crate) fn is_ahead_of_marks(&self) -> bool {
        self.next != self.marked
    }

    /// Notes where the writer stands, for the next mark. The block in the making is written up to here,
    /// before anybody can write the whole of it.
    pub(crate) fn note_stand(&mut self) -> Result<(), FormatError> {
        if self.failed {
            return Err(FormatError::WriterFailed { rank: self.rank });
        }
        let noted = self.try_note_stand();
        self.failed |= noted.is_err();
        noted
    }

    fn try_note_stand(&mut self) -> Result<(), FormatError> {
        let (position, end) = (self.next, self.next.in_block());
        let (section, block) = position.block();
        let mut open = self.before.clone().unwrap_or_else(|| TreeHash::at(block * BLOCK_BYTES));
        if let Some(buf) = &mut self.current {
            open.update(&buf[open.count() as usize..end]);
            if let Some(file) = &self.file {
                let padded = end.next_multiple_of(DIRECT_ALIGN as usize);
                buf[end..padded].fill(0);
                file.write_all_at(&buf[..padded], self.layout.sections()[section].offset + block * BLOCK_BYTES)?;
            }
        }
        self.stand = Some(Stand { position, open, jobs: self.sent, pending: self.pending });
        Ok(())
    }

    /// Whether everything before the noted stand is written; with `wait` it is on return.
    pub(crate) fn reached_stand(&mut self, wait: bool) -> Result<bool, FormatError> {
        while self.stand.as_ref().is_some_and(|stand| stand.pending > 0) {
            let done = match self.done.try_recv() {
                Ok(done) => done,
                Err(TryRecvError::Empty) if !wait => return Ok(false),
                Err(_) => self.done.recv().map_err(|_| FormatError::WriterFailed { rank: self.rank })?,
            };
            let taken = self.take_in(done);
            self.failed |= taken.is_err();
            taken?;
        }
        Ok(true)
    }

    /// Appends this rank's part of the mark for the noted stand, which was reached.
    pub(crate) fn encode_stand(&mut self, out: &mut Vec<u8>) {
        let Some(stand) = self.stand.take() else { unreachable!("rank {}: no stand was noted", self.rank) };
        assert_eq!(stand.pending, 0, "rank {}: blocks on their way", self.rank);
        let blocks = blocks_between(&self.layout, self.marked, stand.position);
        let values = blocks.into_iter().map(|(section, block)| self.hashes[section][block as usize]);
        encode_rank(out, stand.position, values, &stand.open);
        self.marked = stand.position;
    }

    pub(crate) fn file(&self) -> Option<&Arc<DirectFile>> {
        self.file.as_ref()
    }

    fn pad_to(&mut self, section: &SectionLayout, at: u64) -> Result<(), FormatError> {
        const ZEROS: [u8; 4096] = [0; 4096];
        assert!(self.next.at <= at, "section {} is at {}, past {at}", section.name, self.next.at);
        while self.next.at < at {
            let part = (at - self.next.at).min(ZEROS.len() as u64) as usize;
            self.put(section, &ZEROS[..part])?;
        }
        Ok(())
    }

    /// Copies `bytes` to the section's next place, sending off every block that is complete.
    fn put(&mut self, section: &SectionLayout, mut bytes: &[u8]) -> Result<(), FormatError> {
        while !bytes.is_empty() {
            let (index, block) = self.next.block();
            let start = self.next.in_block();
            let len = block_len(section.len, block);
            let mut buf = match self.current.take() {
                Some(buf) => buf,
                None => self.buffer()?,
            };
            let part = bytes.len().min(len - start);
            buf[start..start + part].copy_from_slice(&bytes[..part]);
            self.next.at += part as u64;
            bytes = &bytes[part..];
            if start + part == len {
                let before = self.before.take();
                self.send(Job { buf, section: index, block, before, number: self.sent })?;
            } else {
                self.current = Some(buf);
            }
        }
        Ok(())
    }

    /// A buffer that no worker holds; waits for one when all are out.
    fn buffer(&mut self) -> Result<AlignedBuf, FormatError> {
        loop {
            if let Some(buf) = self.free.pop() {
                return Ok(buf);
            }
            if self.buffers < BUFFERS {
                self.buffers += 1;
                return AlignedBuf::named(BLOCK_BYTES as usize, "a block to write");
            }
            self.collect()?;
        }
    }

    fn send(&mut self, job: Job) -> Result<(), FormatError> {
        // Workers end only when this sender does; a refused job means they panicked.
        let sent = self.jobs.as_ref().is_some_and(|jobs| jobs.send(job).is_ok());
        if !sent {
            return Err(FormatError::WriterFailed { rank: self.rank });
        }
        self.pending += 1;
        self.sent += 1;
        Ok(())
    }

    fn collect(&mut self) -> Result<(), FormatError> {
        let done = self.done.recv().map_err(|_| FormatError::WriterFailed { rank: self.rank })?;
        self.take_in(done)
    }

    fn take_in(&mut self, done: Result<Done, FormatError>) -> Result<(), FormatError> {
        self.pending -= 1;
        let done = done?;
        if let Some(stand) = self.stand.as_mut().filter(|stand| done.number < stand.jobs) {
            stand.pending -= 1;
        }
        self.hashes[done.section][done.block as usize] = done.hash;
        self.free.push(done.buf);
        Ok(())
    }

    fn out_of_order(&self, expected: String, found: String) -> FormatError {
        FormatError::Order { rank: self.rank, expected, found }
    }
}

impl Drop for RankWriter {
    fn drop(&mut self) {
        self.jobs = None;
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

/// Answers for a job whose worker panics: others live on, so the writer would wait for ever.
struct Owed<'a> {
    rank: u32,
    results: &'a Sender<Result<Done, FormatError>>,
}

impl Drop for Owed<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = self.results.send(Err(FormatError::WriterFailed { rank: self.rank }));
        }
    }
}

fn work(
    rank: u32,
    queue: &Mutex<Receiver<Job>>,
    results: &Sender<Result<Done, FormatError>>,
    layout: &RankLayout,
    file: Option<&DirectFile>,
) {
    loop {
        let Ok(job) = lock(queue).recv() else {
            return;
        };
        let _owed = Owed { rank, results };
        let section = &layout.sections()[job.section];
        let bytes = &job.buf[..block_len(section.len, job.block)];
        let count = block_count(section.len);
        let hash = match job.before {
            None => hash_block(bytes, job.block, count),
            Some(before) => hash_rest(before, bytes, count),
        };
        let offset = section.offset + job.block * BLOCK_BYTES;
        let written = file.map_or(Ok(()), |file| file.write_all_at(bytes, offset));
        let Job { buf, section, block, number, .. } = job;
        // A writer that is gone no longer wants results.
        let _ = results.send(written.map(|()| Done { buf, section, block, hash, number }));
    }
}

/// As [`hash_block`], of a block whose first bytes are known by their state alone.
fn hash_rest(mut before: TreeHash, bytes: &[u8], count: u64) -> [u8; 32] {
    before.update(&bytes[before.count() as usize..]);
    if count == 1 { before.root() } else { before.subtree() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{SectionPlan, TensorPlan};

    #[test]
    fn a_worker_that_panics_answers_while_another_lives() {
        let tensor = TensorPlan { name: "w".into(), dtype: "u8".into(), shape: vec![5], bytes: 5 };
        let layout = RankLayout::new(&[SectionPlan { name: "all".into(), tensors: vec![tensor] }]).expect("layout");
        let state = RankState::new(&layout);
        let mut writer = RankWriter::new(3, Arc::new(layout), None, 2, state).expect("writer");
        let buf = AlignedBuf::new(BLOCK_BYTES as usize).expect("buffer");
        // There is no such section.
        writer.send(Job { buf, section: 9, block: 0, before: None, number: 0 }).expect("sent");
        assert!(matches!(writer.collect(), Err(FormatError::WriterFailed { rank: 3 })));
    }
}
