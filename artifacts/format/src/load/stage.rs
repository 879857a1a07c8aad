//! What the threads of a load hand each other: blocks to prepare, to read, to hash, to place.
//!
//! One lock: a block is 4 MiB, so even a fast disk takes it a few thousand times a second. Every wait
//! ends when the load ends, well or not; a thread that panics ends it too.

use std::collections::VecDeque;
use std::io;
use std::mem;
use std::ops::DerefMut;
use std::path::Path;
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::error::FormatError;
use crate::io::DIRECT_ALIGN;
use crate::load::{Block, READS_MAX};
use crate::parallel::lock;

/// Judges a block whose hash matched.
pub(crate) type Judge<'a> = &'a (dyn Fn(&Block<'_>, &[u8]) -> Result<(), FormatError> + Sync);

/// One block on its way.
pub(crate) struct Job<'b, B> {
    pub(crate) block: Block<'b>,
    pub(crate) buf: B,
    /// Reads that failed or gave other bytes.
    failed: u32,
    /// Bytes of memory that using the buffer may take and that were not counted yet.
    cost: u64,
}

impl<'b, B> Job<'b, B> {
    /// Apart from its buffer, for while that is somebody else's.
    pub(crate) fn split(self) -> (Job<'b, ()>, B) {
        (Job { block: self.block, buf: (), failed: self.failed, cost: self.cost }, self.buf)
    }
}

impl<'b> Job<'b, ()> {
    pub(crate) fn with<B>(self, buf: B) -> Job<'b, B> {
        Job { block: self.block, buf, failed: self.failed, cost: self.cost }
    }
}

struct State<'b, B> {
    /// Memory whose pages may not exist yet.
    fresh: VecDeque<Job<'b, B>>,
    /// Memory that can be read into.
    ready: VecDeque<Job<'b, B>>,
    read: VecDeque<Job<'b, B>>,
    verified: VecDeque<Job<'b, B>>,
    ended: bool,
    paused: Option<Instant>,
    /// Bytes of memory that may be taken until the watchdog has looked again.
    credit: u64,
    paused_for: Duration,
    retries: u64,
    /// With its place in the file: of several the first is told.
    failure: Option<(u64, FormatError)>,
}

/// The work of one load.
pub(crate) struct Stage<'b, B> {
    path: &'b Path,
    state: Mutex<State<'b, B>>,
    readers: Condvar,
    hashers: Condvar,
    placer: Condvar,
    watchdog: Condvar,
}

/// Ends the load if its thread panics, so that the others do not wait for what will not come.
pub(crate) struct EndOnPanic<'s, 'b, B>(pub(crate) &'s Stage<'b, B>);

impl<B> Drop for EndOnPanic<'_, '_, B> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.end();
        }
    }
}

impl<'b, B> Stage<'b, B> {
    pub(crate) fn new(path: &'b Path) -> Self {
        let state = State {
            fresh: VecDeque::new(),
            ready: VecDeque::new(),
            read: VecDeque::new(),
            verified: VecDeque::new(),
            ended: false,
            paused: None,
            credit: u64::MAX,
            paused_for: Duration::ZERO,
            retries: 0,
            failure: None,
        };
        let [readers, hashers, placer, watchdog] = [const { Condvar::new() }; 4];
        Stage { path, state: Mutex::new(state), readers, hashers, placer, watchdog }
    }

    fn lock(&self) -> MutexGuard<'_, State<'b, B>> {
        lock(&self.state)
    }

    /// Adds a block to be read into `buf`; `fresh` memory may be prepared first.
    pub(crate) fn add(&self, block: Block<'b>, buf: B, fresh: bool) {
        let job = Job { block, buf, failed: 0, cost: block.len as u64 };
        let mut state = self.lock();
        if fresh {
            state.fresh.push_back(job);
            self.hashers.notify_one();
        } else {
            state.ready.push_back(job);
        }
        self.readers.notify_one();
    }

    /// The next block to read; waits for one. `None` at the end.
    pub(crate) fn next_read(&self) -> Option<Job<'b, B>> {
        let mut state = self.lock();
        loop {
            if state.ended {
                return None;
            }
            if let Some(job) = state.take_read() {
                return Some(job);
            }
            state = wait(&self.readers, state);
        }
    }

    /// The next block to read, if there is one now.
    pub(crate) fn try_next_read(&self) -> Option<Job<'b, B>> {
        let mut state = self.lock();
        if state.ended { None } else { state.take_read() }
    }

    /// All of a block's bytes were read.
    pub(crate) fn read_done(&self, job: Job<'b, B>) {
        self.lock().read.push_back(job);
        self.hashers.notify_one();
    }

    /// Reading a block failed: again, or the end.
    pub(crate) fn read_failed(&self, job: Job<'b, B>, error: io::Error) {
        let error = FormatError::io("read", self.path, job.block.len as u64, error);
        self.read_failed_with(job, error);
    }

    /// The same, of a source that says more.
    pub(crate) fn read_failed_with(&self, job: Job<'b, B>, error: FormatError) {
        let error = error.of_block(&job.block, READS_MAX);
        self.again(job, error);
    }

    fn again(&self, mut job: Job<'b, B>, error: FormatError) {
        job.failed += 1;
        if job.failed < READS_MAX {
            let mut state = self.lock();
            state.retries += 1;
            state.ready.push_front(job);
            self.readers.notify_one();
        } else {
            self.fail(job.block.file_offset, error);
        }
    }

    /// Ends the load with an error that belongs to this place of the file.
    pub(crate) fn fail(&self, offset: u64, error: FormatError) {
        let mut state = self.lock();
        if state.failure.as_ref().is_none_or(|(earlier, _)| offset < *earlier) {
            state.failure = Some((offset, error));
        }
        drop(state);
        self.end();
    }

    /// Wakes everybody for the last time.
    pub(crate) fn end(&self) {
        self.lock().ended = true;
        for waiting in [&self.readers, &self.hashers, &self.placer, &self.watchdog] {
            waiting.notify_all();
        }
    }

    pub(crate) fn has_ended(&self) -> bool {
        self.lock().ended
    }

    /// The next verified block; with `wait`, waits for one. `None`: none now, or the end.
    pub(crate) fn next_verified(&self, may_wait: bool) -> Option<Job<'b, B>> {
        let mut state = self.lock();
        loop {
            if state.ended {
                return None;
            }
            if let Some(job) = state.verified.pop_front() {
                return Some(job);
            }
            if !may_wait {
                return None;
            }
            state = wait(&self.placer, state);
        }
    }

    /// From now on nothing new is read.
    pub(crate) fn pause(&self) {
        let mut state = self.lock();
        state.paused.get_or_insert_with(Instant::now);
    }

    /// From now on memory for `credit` bytes is taken.
    pub(crate) fn resume(&self, credit: u64) {
        let mut state = self.lock();
        state.credit = credit;
        if let Some(since) = state.paused.take() {
            state.paused_for += since.elapsed();
        }
        self.readers.notify_all();
        self.hashers.notify_all();
    }

    /// Waits; whether the load has ended meanwhile.
    pub(crate) fn ends_within(&self, time: Duration) -> bool {
        let state = self.lock();
        if state.ended {
            return true;
        }
        let waited = self.watchdog.wait_timeout_while(state, time, |state| !state.ended);
        waited.unwrap_or_else(|e| e.into_inner()).0.ended
    }

    /// How it ended: blocks read again, time paused. Errors: the first failure.
    pub(crate) fn outcome(self) -> Result<(u64, Duration), FormatError> {
        let state = self.state.into_inner().unwrap_or_else(|e| e.into_inner());
        match state.failure {
            Some((_, error)) => Err(error),
            None => Ok((state.retries, state.paused_for)),
        }
    }
}

impl<'b, B: DerefMut<Target = [u8]>> Stage<'b, B> {
    /// A hashing thread: verifies what was read, and meanwhile prepares memory for what will be.
    pub(crate) fn hash(&self, judge: Judge<'_>) {
        loop {
            let mut state = self.lock();
            let (read, fresh) = loop {
                if state.ended {
                    return;
                }
                if let Some(job) = state.read.pop_front() {
                    break (Some(job), None);
                }
                if let Some(job) = state.take_fresh() {
                    break (None, Some(job));
                }
                state = wait(&self.hashers, state);
            };
            drop(state);
            if let Some(job) = read {
                self.verify(job, judge);
            }
            if let Some(mut job) = fresh {
                touch(&mut job.buf[..job.block.len]);
                self.lock().ready.push_back(job);
                self.readers.notify_one();
            }
        }
    }

    fn verify(&self, job: Job<'b, B>, judge: Judge<'_>) {
        let block = &job.block;
        let bytes = &job.buf[..block.len];
        if let Err(error) = block.verify(bytes, self.path, job.failed + 1) {
            return self.again(job, error);
        }
        match judge(block, bytes) {
            Err(error) => self.fail(block.file_offset, error),
            Ok(()) => {
                self.lock().verified.push_back(job);
                self.placer.notify_one();
            }
        }
    }
}

impl<'b, B> State<'b, B> {
    fn take_read(&mut self) -> Option<Job<'b, B>> {
        if !self.may_take() {
            return None;
        }
        self.ready.pop_front().or_else(|| self.fresh.pop_front()).map(|job| self.count(job))
    }

    fn take_fresh(&mut self) -> Option<Job<'b, B>> {
        if !self.may_take() {
            return None;
        }
        self.fresh.pop_front().map(|job| self.count(job))
    }

    fn may_take(&self) -> bool {
        self.paused.is_none() && self.credit > 0
    }

    fn count(&mut self, mut job: Job<'b, B>) -> Job<'b, B> {
        self.credit = self.credit.saturating_sub(mem::take(&mut job.cost));
        job
    }
}

fn wait<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condvar.wait(guard).unwrap_or_else(|e| e.into_inner())
}

/// Makes the pages of memory that will be overwritten: a read would have to wait for each of them.
fn touch(bytes: &mut [u8]) {
    bytes.iter_mut().step_by(DIRECT_ALIGN as usize).for_each(|byte| *byte = 0);
}
