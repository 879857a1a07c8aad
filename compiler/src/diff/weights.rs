//! Sections, tensors and their bytes. Hashes say which blocks differ, the blocks' bytes say which of
//! the tensors in them do: a tensor is read from the first block that differs to its first other byte.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use dsv4_format::io::AlignedBuf;
use dsv4_format::{Artifact, BLOCK_BYTES, FormatError, Manifest, Progress, RankFile, RankReader, Section, Tensor};
use serde_json::Value;

use super::Diff;
use crate::error::CompileError;

/// Compares all ranks of two artifacts with different weight sets.
pub(super) fn compare(out: &mut Diff, a: &Artifact, b: &Artifact, progress: &dyn Progress) -> Result<(), CompileError> {
    let (ma, mb) = (a.manifest(), b.manifest());
    if ma.tp != mb.tp {
        names(out, ma, mb);
        out.note("ranks hold other parts of the tensors, which are therefore compared by name only".into());
        return Ok(());
    }
    for (ra, rb) in ma.ranks.iter().zip(&mb.ranks) {
        sections(out, ra, rb);
        let pairs = tensors(out, ra, rb);
        blocks(out, ra, rb);
        let suspects: Vec<Pair<'_>> = pairs.into_iter().filter(Pair::may_differ).collect();
        if suspects.is_empty() {
            continue;
        }
        if !a.has_rank(ra.rank) || !b.has_rank(rb.rank) {
            unread(out, ra.rank, &suspects);
            continue;
        }
        let (mut side_a, mut side_b) = (Side::new(a, ra)?, Side::new(b, rb)?);
        progress.start(&format!("compare rank {}", ra.rank), suspects.iter().map(|p| p.a.1.len).sum());
        for pair in &suspects {
            if let Some((at, x, y)) = pair.first_difference(&mut side_a, &mut side_b)? {
                let shown = |byte: u8| Some(Value::from(format!("byte {at} is {byte:#04x}")));
                out.push("weights", format!("rank {} {}", ra.rank, pair.a.1.name), shown(x), shown(y));
            }
            progress.add(pair.a.1.len);
        }
        progress.finish();
    }
    Ok(())
}

/// Without both files only the blocks are known, not which of the tensors in them differ.
fn unread(out: &mut Diff, rank: u32, suspects: &[Pair<'_>]) {
    out.note(format!(
        "rank {rank} is not in both places: the tensors under \"weights\" are those in blocks that differ"
    ));
    for pair in suspects {
        let place = |section: &Section| Some(Value::from(format!("in a block of {} that differs", section.name)));
        out.push("weights", format!("rank {rank} {}", pair.a.1.name), place(pair.a.0), place(pair.b.0));
    }
}

/// Tensors that only one of two differently cut artifacts has.
fn names(out: &mut Diff, a: &Manifest, b: &Manifest) {
    let names = |m: &Manifest| -> BTreeSet<String> {
        m.ranks.iter().flat_map(|r| &r.sections).flat_map(|s| &s.tensors).map(|t| t.name.clone()).collect()
    };
    let (a, b) = (names(a), names(b));
    for name in a.symmetric_difference(&b) {
        let has = |side: &BTreeSet<String>| side.contains(name).then(|| Value::from("a tensor"));
        out.push("tensors", name, has(&a), has(&b));
    }
}

fn sections(out: &mut Diff, a: &RankFile, b: &RankFile) {
    let by_name = |rank: &'_ RankFile| -> BTreeMap<String, String> {
        let shown = |s: &Section| format!("{} tensors, {} bytes", s.tensors.len(), s.len);
        rank.sections.iter().map(|s| (s.name.clone(), shown(s))).collect()
    };
    let (sa, sb) = (by_name(a), by_name(b));
    for name in sa.keys().chain(sb.keys().filter(|name| !sa.contains_key(*name))) {
        if sa.get(name) != sb.get(name) {
            let shown = |side: &BTreeMap<String, String>| side.get(name).cloned().map(Value::from);
            out.push("sections", format!("rank {} {name}", a.rank), shown(&sa), shown(&sb));
        }
    }
}

/// Blocks at the same place of the same section.
fn blocks(out: &mut Diff, a: &RankFile, b: &RankFile) {
    let others: HashMap<&str, &Section> = b.sections.iter().map(|s| (s.name.as_str(), s)).collect();
    for section in &a.sections {
        let Some(other) = others.get(section.name.as_str()).filter(|other| other.root != section.root) else {
            continue;
        };
        for i in 0..section.blocks.len().max(other.blocks.len()) {
            let hash = |s: &Section| s.blocks.get(i).map(|hash| dsv4_format::Digest(*hash).to_string());
            let (x, y) = (hash(section), hash(other));
            if x != y {
                let at = format!("rank {} {} block {i}", a.rank, section.name);
                out.push("blocks", at, x.map(Value::from), y.map(Value::from));
            }
        }
    }
}

/// A tensor of the same name and length on both sides.
struct Pair<'m> {
    a: (&'m Section, &'m Tensor),
    b: (&'m Section, &'m Tensor),
}

/// Reports what the manifests say of tensors, and returns those whose bytes can be compared.
fn tensors<'m>(out: &mut Diff, a: &'m RankFile, b: &'m RankFile) -> Vec<Pair<'m>> {
    let all = |rank: &'m RankFile| rank.sections.iter().flat_map(|s| s.tensors.iter().map(move |t| (s, t)));
    let others: HashMap<&str, (&Section, &Tensor)> = all(b).map(|(s, t)| (t.name.as_str(), (s, t))).collect();
    let mine: BTreeSet<&str> = all(a).map(|(_, t)| t.name.as_str()).collect();
    let shown = |(s, t): (&Section, &Tensor)| {
        Some(Value::from(format!("{} {:?}, {} bytes at {} of {}", t.dtype, t.shape, t.len, t.offset, s.name)))
    };
    let mut pairs = Vec::new();
    for (section, tensor) in all(a) {
        let at = format!("rank {} {}", a.rank, tensor.name);
        let Some(&(other_section, other)) = others.get(tensor.name.as_str()) else {
            out.push("tensors", at, shown((section, tensor)), None);
            continue;
        };
        if tensor != other || section.name != other_section.name {
            out.push("tensors", at, shown((section, tensor)), shown((other_section, other)));
        }
        if tensor.len == other.len {
            pairs.push(Pair { a: (section, tensor), b: (other_section, other) });
        }
    }
    for (section, tensor) in all(b).filter(|(_, t)| !mine.contains(t.name.as_str())) {
        out.push("tensors", format!("rank {} {}", a.rank, tensor.name), None, shown((section, tensor)));
    }
    pairs
}

impl Pair<'_> {
    /// Whether any block under the tensor differs, or cannot be compared by hash.
    fn may_differ(&self) -> bool {
        let mut at = 0;
        while at < self.a.1.len {
            match self.equal_block(at) {
                Some(len) => at += len,
                None => return true,
            }
        }
        false
    }

    /// How far from byte `at` of the tensor equal hashes prove equal bytes; `None` when they do not.
    /// A block's hash depends on its place in the section, so only equal places compare.
    fn equal_block(&self, at: u64) -> Option<u64> {
        let ((sa, ta), (sb, tb)) = (self.a, self.b);
        if ta.offset != tb.offset {
            return None;
        }
        let block = usize::try_from((ta.offset + at) / BLOCK_BYTES).ok()?;
        // A section of one block has its root there: never equal to a subtree's value.
        let same = sa.blocks.get(block)? == sb.blocks.get(block)?;
        same.then(|| BLOCK_BYTES - (ta.offset + at) % BLOCK_BYTES)
    }

    /// Position in the tensor, and the two bytes there.
    fn first_difference(&self, a: &mut Side<'_>, b: &mut Side<'_>) -> Result<Option<(u64, u8, u8)>, FormatError> {
        let ((sa, ta), (sb, tb)) = (self.a, self.b);
        let mut at = 0;
        while at < ta.len {
            if let Some(len) = self.equal_block(at) {
                at += len;
                continue;
            }
            let (x, y) = (a.bytes(sa, ta.offset + at, ta.len - at)?, b.bytes(sb, tb.offset + at, tb.len - at)?);
            let differs = x.iter().zip(y).enumerate().find(|(_, (x, y))| x != y);
            if let Some((i, (&x, &y))) = differs {
                return Ok(Some((at + i as u64, x, y)));
            }
            at += x.len().min(y.len()) as u64;
        }
        Ok(None)
    }
}

/// One artifact's rank, read block by block; neighbouring tensors share the last block read.
struct Side<'a> {
    reader: RankReader<'a>,
    /// Position of a section's first block among the rank's.
    first: HashMap<&'a str, usize>,
    buf: AlignedBuf,
    loaded: Option<usize>,
}

impl<'a> Side<'a> {
    fn new(artifact: &'a Artifact, rank: &'a RankFile) -> Result<Side<'a>, FormatError> {
        let mut first = HashMap::new();
        let mut blocks = 0;
        for section in &rank.sections {
            first.insert(section.name.as_str(), blocks);
            blocks += section.blocks.len();
        }
        let buf = AlignedBuf::new(BLOCK_BYTES as usize)?;
        Ok(Side { reader: artifact.rank_reader(rank.rank)?, first, buf, loaded: None })
    }

    /// At least one byte and at most `len` from `offset` of the section, all from one block.
    fn bytes(&mut self, section: &Section, offset: u64, len: u64) -> Result<&[u8], FormatError> {
        let index = self.first[section.name.as_str()] + (offset / BLOCK_BYTES) as usize;
        let block = self.reader.blocks()[index];
        if self.loaded != Some(index) {
            self.loaded = None;
            self.reader.read(&block, &mut self.buf[..block.len])?;
            self.loaded = Some(index);
        }
        let start = (offset % BLOCK_BYTES) as usize;
        let end = block.len.min(start + usize::try_from(len).unwrap_or(usize::MAX - start));
        Ok(&self.buf[start..end])
    }
}
