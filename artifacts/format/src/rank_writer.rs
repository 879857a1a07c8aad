//! Writes one rank's file from tensor bytes that arrive in layout order.
//!
//! The calling thread only copies into 4 MiB buffers; a few workers hash finished blocks and write
//! them. Memory is bounded by the number of buffers: when all are in flight, `append` waits.
//! Workers may finish in any order; every value lands at its block's index, so the result does not
//! depend on their number.

use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use crate::error::FormatError;
use crate::header::BLOCK_BYTES;
use crate::io::{AlignedBuf, DirectFile};
use crate::layout::{RankLayout, SectionLayout};
use crate::manifest::{RankFile, Section};
use crate::parallel::lock;
use crate::section::{block_count, block_len, fold, hash_block};

const BUFFERS: usize = 8;

struct Job {
    buf: AlignedBuf,
    section: usize,
    block: u64,
}

struct Done {
    buf: AlignedBuf,
    section: usize,
    block: u64,
    hash: [u8; 32],
}

/// Made by [`Draft::rank_writer`](crate::Draft::rank_writer); may move to another thread.
pub struct RankWriter {
    rank: u32,
    layout: Arc<RankLayout>,
    /// Next tensor to arrive and how much of it has; `section` is past the end when all are there.
    section: usize,
    tensor: usize,
    filled: u64,
    /// Bytes of the current section handed over or in `current`.
    at: u64,
    current: Option<AlignedBuf>,
    free: Vec<AlignedBuf>,
    buffers: usize,
    hashes: Vec<Vec<[u8; 32]>>,
    pending: usize,
    failed: bool,
    jobs: Option<SyncSender<Job>>,
    done: Receiver<Result<Done, FormatError>>,
    workers: Vec<JoinHandle<()>>,
}

impl RankWriter {
    /// `file` is `None` for a rank that is hashed but not kept.
    pub(crate) fn new(
        rank: u32,
        layout: Arc<RankLayout>,
        file: Option<Arc<DirectFile>>,
        workers: usize,
    ) -> Result<Self, FormatError> {
        let (jobs, queue) = sync_channel(BUFFERS);
        let (results, done) = channel();
        let queue = Arc::new(Mutex::new(queue));
        let mut handles = Vec::with_capacity(workers);
        for _ in 0..workers.max(1) {
            let (queue, results) = (Arc::clone(&queue), results.clone());
            let (layout, file) = (Arc::clone(&layout), file.clone());
            let work = move || work(&queue, &results, &layout, file.as_deref());
            let spawned = std::thread::Builder::new().name(format!("write rank {rank}")).spawn(work);
            handles.push(spawned.map_err(|source| FormatError::Thread { what: "a writing thread", source })?);
        }
        let hashes = layout.sections().iter().map(|section| vec![[0; 32]; block_count(section.len) as usize]).collect();
        Ok(RankWriter {
            rank,
            layout,
            section: 0,
            tensor: 0,
            filled: 0,
            at: 0,
            current: None,
            free: Vec::new(),
            buffers: 0,
            hashes,
            pending: 0,
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
        let next = layout.sections().get(self.section).and_then(|s| Some((s, s.tensors.get(self.tensor)?)));
        let Some((section, expected)) = next.filter(|(_, t)| t.name == tensor) else {
            let expected = next.map_or("no further tensor".into(), |(_, t)| format!("tensor {}", t.name));
            return Err(self.out_of_order(expected, format!("tensor {tensor}")));
        };
        let missing = expected.len - self.filled;
        if bytes.len() as u64 > missing {
            let expected = format!("at most {missing} more bytes of {tensor} ({} in all)", expected.len);
            return Err(self.out_of_order(expected, format!("{} bytes", bytes.len())));
        }
        self.pad_to(section, expected.offset + self.filled)?;
        self.put(section, bytes)?;
        self.filled += bytes.len() as u64;
        if self.filled == expected.len {
            self.filled = 0;
            self.tensor += 1;
            if self.tensor == section.tensors.len() {
                self.pad_to(section, section.len)?;
                self.section += 1;
                self.tensor = 0;
                self.at = 0;
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
        if let Some(section) = layout.sections().get(self.section) {
            let name = section.tensors.get(self.tensor).map_or("", |t| t.name.as_str());
            let found = format!("the end after {} bytes of it", self.filled);
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

    fn pad_to(&mut self, section: &SectionLayout, at: u64) -> Result<(), FormatError> {
        const ZEROS: [u8; 4096] = [0; 4096];
        assert!(self.at <= at, "section {} is at {}, past {at}", section.name, self.at);
        while self.at < at {
            let part = (at - self.at).min(ZEROS.len() as u64) as usize;
            self.put(section, &ZEROS[..part])?;
        }
        Ok(())
    }

    /// Copies `bytes` to the section's next place, sending off every block that is complete.
    fn put(&mut self, section: &SectionLayout, mut bytes: &[u8]) -> Result<(), FormatError> {
        while !bytes.is_empty() {
            let block = self.at / BLOCK_BYTES;
            let start = (self.at % BLOCK_BYTES) as usize;
            let len = block_len(section.len, block);
            let mut buf = match self.current.take() {
                Some(buf) => buf,
                None => self.buffer()?,
            };
            let part = bytes.len().min(len - start);
            buf[start..start + part].copy_from_slice(&bytes[..part]);
            self.at += part as u64;
            bytes = &bytes[part..];
            if start + part == len {
                self.send(Job { buf, section: self.section, block })?;
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
        Ok(())
    }

    fn collect(&mut self) -> Result<(), FormatError> {
        let done = self.done.recv().map_err(|_| FormatError::WriterFailed { rank: self.rank })?;
        self.pending -= 1;
        let done = done?;
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

fn work(
    queue: &Mutex<Receiver<Job>>,
    results: &Sender<Result<Done, FormatError>>,
    layout: &RankLayout,
    file: Option<&DirectFile>,
) {
    loop {
        let Ok(job) = lock(queue).recv() else {
            return;
        };
        let section = &layout.sections()[job.section];
        let bytes = &job.buf[..block_len(section.len, job.block)];
        let hash = hash_block(bytes, job.block, block_count(section.len));
        let offset = section.offset + job.block * BLOCK_BYTES;
        let written = file.map_or(Ok(()), |file| file.write_all_at(bytes, offset));
        let Job { buf, section, block } = job;
        // A writer that is gone no longer wants results.
        let _ = results.send(written.map(|()| Done { buf, section, block, hash }));
    }
}
