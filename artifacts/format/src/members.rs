//! Small files kept compressed: `meta` and `kernels.<arch>` are zstd frames one after another,
//! listed in the manifest. The only use of zstd.
//!
//! One thread and level 19 always, so that the stored bytes repeat; sizes are bounded before and
//! while decompressing.

use std::io::Read;
use std::path::Path;

use crate::error::FormatError;
use crate::manifest::{Digest, Member, StoredFile};

const LEVEL: i32 = 19;
/// Level 19 uses windows of at most 8 MiB; a frame that asks for more is not ours.
const WINDOW_LOG_MAX: u32 = 23;

/// Compresses members (sorted by name here) to the file's bytes and their record.
pub(crate) fn store(
    name: &str,
    members: &[(String, Vec<u8>)],
    file: &Path,
) -> Result<(StoredFile, Vec<u8>), FormatError> {
    let mut sorted: Vec<_> = members.iter().collect();
    sorted.sort_by(|a, b| a.0.cmp(&b.0));
    let mut bytes = Vec::new();
    let mut records = Vec::with_capacity(sorted.len());
    for (name, raw) in sorted {
        let frame = zstd::bulk::compress(raw, LEVEL).map_err(|e| FormatError::Member {
            file: file.to_path_buf(),
            member: name.clone(),
            reason: format!("cannot be compressed: {e}"),
        })?;
        records.push(Member {
            name: name.clone(),
            raw_len: raw.len() as u64,
            raw_hash: Digest::of(raw),
            offset: bytes.len() as u64,
            len: frame.len() as u64,
        });
        bytes.extend_from_slice(&frame);
    }
    let record = StoredFile { name: name.into(), len: bytes.len() as u64, hash: Digest::of(&bytes), members: records };
    Ok((record, bytes))
}

/// One member's content from its stored frame. Memory grows with what the frame really yields and
/// stops one byte after `raw_len`.
pub(crate) fn restore(member: &Member, frame: &[u8], file: &Path) -> Result<Vec<u8>, FormatError> {
    let fault = |reason: String| FormatError::Member { file: file.to_path_buf(), member: member.name.clone(), reason };
    let broken = |e: std::io::Error| fault(format!("expected a zstd frame, found: {e}"));
    let mut rest = frame;
    let mut raw = Vec::new();
    let mut decoder = zstd::stream::read::Decoder::with_buffer(&mut rest).map_err(broken)?.single_frame();
    decoder.window_log_max(WINDOW_LOG_MAX).map_err(broken)?;
    let mut limited = (&mut decoder).take(member.raw_len.saturating_add(1));
    limited.read_to_end(&mut raw).map_err(broken)?;
    drop(decoder);
    if raw.len() as u64 != member.raw_len {
        let found = if raw.len() as u64 > member.raw_len { "more" } else { "less" };
        return Err(fault(format!("expected {} bytes, found {found}", member.raw_len)));
    }
    if !rest.is_empty() {
        return Err(fault(format!("expected one zstd frame, found {} bytes after it", rest.len())));
    }
    let found = Digest::of(&raw);
    if found != member.raw_hash {
        return Err(FormatError::Hash {
            file: file.to_path_buf(),
            what: format!("member {}", member.name),
            expected: member.raw_hash,
            found,
        });
    }
    Ok(raw)
}
