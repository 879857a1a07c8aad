//! The reading threads of a load, in both kinds.

use std::io::ErrorKind;
use std::ops::DerefMut;

use crate::error::FormatError;
use crate::io::ring::{Read, Requests};
use crate::io::{DirectFile, ReadAt, Transfer};
use crate::load::stage::{Job, Stage};

/// Reads one block after another.
pub(crate) fn read_blocks<B: DerefMut<Target = [u8]>>(stage: &Stage<'_, B>, source: &impl ReadAt) {
    while let Some(mut job) = stage.next_read() {
        let len = job.block.len;
        match source.read_exact_at(&mut job.buf[..len], job.block.file_offset) {
            Ok(()) => stage.read_done(job),
            Err(error) => stage.read_failed_with(job, error),
        }
    }
}

/// What a request is for: the block without its buffer, which is the request's.
pub(crate) type Tag<'b> = (Job<'b, ()>, Transfer);

/// Keeps as many reads under way as there is room for. Returns with some under way when the load ends
/// early; the ring waits for them.
pub(crate) fn read_with_ring<'b, B: DerefMut<Target = [u8]>>(
    stage: &Stage<'b, B>,
    file: &DirectFile,
    ring: &mut impl Requests<Tag<'b>, B>,
) {
    while !stage.has_ended() {
        while ring.has_room() {
            // Waiting here is only right while nothing is under way.
            let next = if ring.under_way() == 0 { stage.next_read() } else { stage.try_next_read() };
            let Some(job) = next else { break };
            let transfer = Transfer::new(file, job.block.file_offset, job.block.len);
            let (job, buf) = job.split();
            request(ring, job, transfer, buf);
        }
        let ((job, mut transfer), buf, result) = match ring.wait() {
            Ok(Some(done)) => done,
            Ok(None) => continue,
            Err(source) => return stage.fail(0, FormatError::Uring { source }),
        };
        match transfer.advance(file, result, ErrorKind::UnexpectedEof) {
            Ok(()) if transfer.is_missing() => request(ring, job, transfer, buf),
            Ok(()) => {
                file.drop_windows(job.block.file_offset, job.block.file_offset + job.block.len as u64);
                stage.read_done(job.with(buf));
            }
            Err(error) => stage.read_failed(job.with(buf), error),
        }
    }
}

fn request<'b, B>(ring: &mut impl Requests<Tag<'b>, B>, job: Job<'b, ()>, transfer: Transfer, buf: B) {
    let (start, end) = (transfer.have(), job.block.len);
    let read = Read { start, end, offset: transfer.position(), flags: transfer.flags() };
    ring.start((job, transfer), buf, read);
}
