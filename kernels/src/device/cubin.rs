//! Whether bytes are a whole cubin, before a driver that is told no length reads them.

/// Bytes of the header of a 64-bit ELF file, of a section's and of a segment's entry in their tables.
const HEADER: usize = 64;
const SECTION: u64 = 64;
const SEGMENT: u64 = 56;
/// A section without bytes in the file.
const NOBITS: u32 = 8;

/// Whether this is a 64-bit little-endian ELF file whose tables, sections and segments lie within it.
pub(super) fn is_whole(bytes: &[u8]) -> bool {
    tables(bytes).is_some()
}

fn tables(bytes: &[u8]) -> Option<()> {
    let header = bytes.get(..HEADER)?;
    if header[..6] != *b"\x7fELF\x02\x01" {
        return None;
    }
    let half = |at: usize| Some(u64::from(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?)));
    let word = |at: u64| {
        let at = usize::try_from(at).ok()?;
        Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
    };
    let long = |at: u64| {
        let at = usize::try_from(at).ok()?;
        Some(u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
    };
    let within = |at: u64, len: u64| at.checked_add(len).filter(|end| *end <= bytes.len() as u64).map(|_| ());
    // (table, entries, bytes of each) of segments and sections.
    let segments = (long(32)?, half(56)?, SEGMENT);
    let sections = (long(40)?, half(60)?, SECTION);
    for (table, count, size) in [segments, sections] {
        within(table, count * size)?;
    }
    for at in (0..segments.1).map(|i| segments.0 + i * SEGMENT) {
        within(long(at + 8)?, long(at + 32)?)?;
    }
    for at in (0..sections.1).map(|i| sections.0 + i * SECTION) {
        if word(at + 4)? != NOBITS {
            within(long(at + 24)?, long(at + 32)?)?;
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file of one segment, one section and four bytes for both.
    fn file() -> Vec<u8> {
        let mut f = vec![0u8; 188];
        f[..6].copy_from_slice(b"\x7fELF\x02\x01");
        f[32..40].copy_from_slice(&64u64.to_le_bytes());
        f[40..48].copy_from_slice(&120u64.to_le_bytes());
        f[56] = 1;
        f[60] = 1;
        f[64 + 8..64 + 16].copy_from_slice(&184u64.to_le_bytes());
        f[64 + 32..64 + 40].copy_from_slice(&4u64.to_le_bytes());
        f[120 + 4] = 1;
        f[120 + 24..120 + 32].copy_from_slice(&184u64.to_le_bytes());
        f[120 + 32..120 + 40].copy_from_slice(&4u64.to_le_bytes());
        f
    }

    #[test]
    fn what_is_cut_or_points_outside_is_not_whole() {
        let whole = file();
        assert!(is_whole(&whole));
        assert!((0..whole.len()).all(|len| !is_whole(&whole[..len])));
        assert!(!is_whole(b".version 9.0\n.target sm_90a\n"));
        for at in [3, 4, 5, 39, 47, 57, 61, 64 + 15, 64 + 39, 120 + 31, 120 + 39] {
            let mut other = whole.clone();
            other[at] = 0xff;
            assert!(!is_whole(&other), "byte {at}");
        }
        let mut empty = whole;
        empty[124] = NOBITS as u8;
        empty[120 + 39] = 0xff;
        assert!(is_whole(&empty), "such a section has no bytes");
    }
}
