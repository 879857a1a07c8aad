//! When marks are taken, while ranks are being written.
//!
//! Nobody waits for a mark: the writers note where they stand and go on; once their blocks before
//! that place are written, another thread syncs the rank files and appends the mark. Only when the
//! next one is due before the last is on the medium does the packer wait, so that an interruption
//! costs no more than two intervals.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;

use crate::error::FormatError;
use crate::io::DirectFile;
use crate::journal::Journal;
use crate::manifest::RankFile;
use crate::rank_writer::RankWriter;

/// Made by [`Draft::marks`](crate::Draft::marks).
pub struct Marks {
    every_bytes: u64,
    /// Of all ranks, when the last stand was noted.
    noted_bytes: u64,
    /// The packer's note for the stand that was noted and is not reached by all.
    note: Option<Vec<u8>>,
    /// Whether the thread has a mark that it has not answered for.
    busy: bool,
    marks: Option<Sender<Vec<u8>>>,
    answers: Receiver<Result<(), FormatError>>,
    thread: Option<JoinHandle<()>>,
}

impl Marks {
    /// `writers` stand where the journal ends.
    pub(crate) fn new(journal: Journal, every_bytes: u64, writers: &[RankWriter]) -> Result<Marks, FormatError> {
        let files: Vec<Arc<DirectFile>> = writers.iter().filter_map(RankWriter::file).cloned().collect();
        let (marks, queue) = channel();
        let (results, answers) = channel();
        let spawned = std::thread::Builder::new()
            .name("journal".into())
            .spawn(move || append_marks(journal, &files, &queue, &results));
        let thread = spawned.map_err(|source| FormatError::Thread { what: "the journal's thread", source })?;
        Ok(Marks {
            every_bytes,
            noted_bytes: writers.iter().map(RankWriter::bytes).sum(),
            note: None,
            busy: false,
            marks: Some(marks),
            answers,
            thread: Some(thread),
        })
    }

    /// Takes a mark if one is due. To be called whenever all writers stand at the same place of the
    /// source; `note` then describes that place, and comes back after an interruption.
    ///
    /// Errors: those of writing, also of marks taken earlier.
    pub fn offer(&mut self, writers: &mut [RankWriter], note: impl FnOnce() -> Vec<u8>) -> Result<(), FormatError> {
        self.advance(writers, false)?;
        let bytes: u64 = writers.iter().map(RankWriter::bytes).sum();
        if bytes - self.noted_bytes < self.every_bytes {
            return Ok(());
        }
        self.advance(writers, true)?;
        self.await_answer(true)?;
        self.note_stand(writers, note())?;
        self.advance(writers, false)
    }

    /// Takes the last mark, waits until it is on the medium, and finishes the writers.
    ///
    /// Errors: those of [`RankWriter::finish`] and of writing.
    pub fn finish(mut self, mut writers: Vec<RankWriter>, note: Vec<u8>) -> Result<Vec<RankFile>, FormatError> {
        self.advance(&mut writers, true)?;
        if writers.iter().any(RankWriter::is_ahead_of_marks) {
            self.note_stand(&mut writers, note)?;
            self.advance(&mut writers, true)?;
        }
        self.await_answer(true)?;
        writers.into_iter().map(RankWriter::finish).collect()
    }

    fn note_stand(&mut self, writers: &mut [RankWriter], note: Vec<u8>) -> Result<(), FormatError> {
        writers.iter_mut().try_for_each(RankWriter::note_stand)?;
        self.noted_bytes = writers.iter().map(RankWriter::bytes).sum();
        self.note = Some(note);
        Ok(())
    }

    /// Hands over the mark whose stand all writers have reached; with `wait` there is none left here.
    fn advance(&mut self, writers: &mut [RankWriter], wait: bool) -> Result<(), FormatError> {
        self.await_answer(wait && self.note.is_some())?;
        if self.note.is_none() || self.busy {
            return Ok(());
        }
        for writer in writers.iter_mut() {
            if !writer.reached_stand(wait)? {
                return Ok(());
            }
        }
        let mut mark = Vec::new();
        writers.iter_mut().for_each(|writer| writer.encode_stand(&mut mark));
        mark.extend(self.note.take().unwrap_or_default());
        // The thread ends only when this sender does, or after an answer that is an error.
        self.busy = self.marks.as_ref().is_some_and(|marks| marks.send(mark).is_ok());
        assert!(self.busy, "the journal's thread has ended");
        Ok(())
    }

    fn await_answer(&mut self, wait: bool) -> Result<(), FormatError> {
        while self.busy {
            let answer = match self.answers.try_recv() {
                Err(TryRecvError::Empty) if !wait => return Ok(()),
                Err(TryRecvError::Empty) => self.answers.recv().map_err(|_| TryRecvError::Disconnected),
                other => other,
            };
            self.busy = false;
            match answer {
                Ok(result) => result?,
                Err(_) => unreachable!("the journal's thread answers for every mark"),
            }
        }
        Ok(())
    }
}

impl Drop for Marks {
    fn drop(&mut self) {
        self.marks = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Data first, then the record that says it is there.
fn append_marks(
    mut journal: Journal,
    files: &[Arc<DirectFile>],
    queue: &Receiver<Vec<u8>>,
    results: &Sender<Result<(), FormatError>>,
) {
    while let Ok(mark) = queue.recv() {
        let appended = files.iter().try_for_each(|file| file.sync()).and_then(|()| journal.append(&mark));
        let failed = appended.is_err();
        // Who is gone no longer wants to know.
        let _ = results.send(appended);
        if failed {
            return;
        }
    }
}
