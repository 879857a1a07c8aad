//! The source's side of a pack: which place of it comes next, and the hashes that make its id.
//!
//! Both survive an interruption: a mark of the journal carries a note of the place, of the tensors
//! whose hashes are new, and of the hash in the making. A place does not depend on tile size, memory
//! or threads.

use dsv4_format::{SourceId, TreeHash};
use dsv4_model::tensors::StoredTensor;

use crate::pack::tiles::{Ready, Tile};
use crate::plan::Plan;

/// A row of a stored tensor, in the artifact's order; past the last one when all is packed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Index into [`Plan::rows`].
    pub row: usize,
    /// Which matrix of the row.
    pub matrix: u64,
    /// Which stored tensor of the matrix.
    pub part: usize,
    /// Which row of the stored tensor.
    pub first: u64,
}

impl Place {
    fn after(plan: &Plan, tile: &Tile) -> Place {
        let planned = &plan.rows[tile.row];
        let next = Place { row: tile.row, matrix: tile.matrix, part: tile.part, first: tile.first + tile.rows };
        if next.first < planned.cuts[tile.part].rows {
            next
        } else if next.part + 1 < planned.cuts.len() {
            Place { part: next.part + 1, first: 0, ..next }
        } else if next.matrix + 1 < planned.row.matrices() {
            Place { matrix: next.matrix + 1, part: 0, first: 0, ..next }
        } else {
            Place { row: next.row + 1, ..Place::default() }
        }
    }

    fn is_of(&self, plan: &Plan) -> bool {
        match plan.rows.get(self.row) {
            None => *self == Place { row: plan.rows.len(), ..Place::default() },
            Some(planned) => {
                self.matrix < planned.row.matrices()
                    && planned.cuts.get(self.part).is_some_and(|cut| self.first < cut.rows)
            }
        }
    }

    /// How many stored tensors are before it.
    fn tensors_before(&self, plan: &Plan) -> u64 {
        let rows = plan.rows.iter().take(self.row).map(|planned| planned.row.matrices() * planned.cuts.len() as u64);
        let matrices = plan.rows.get(self.row).map_or(0, |planned| self.matrix * planned.cuts.len() as u64);
        rows.sum::<u64>() + matrices + self.part as u64
    }

    /// Bytes before it of the stored tensor that is open.
    fn open_bytes(&self, plan: &Plan) -> u64 {
        let cut = plan.rows.get(self.row).and_then(|planned| planned.cuts.get(self.part));
        cut.map_or(0, |cut| self.first * cut.row_bytes)
    }

    /// The stored tensors before it.
    fn before(&self, plan: &Plan) -> Vec<StoredTensor> {
        let mut tensors = Vec::new();
        for (row, planned) in plan.rows.iter().enumerate().take(self.row.saturating_add(1)) {
            let matrices = if row == self.row { self.matrix } else { planned.row.matrices() };
            tensors.extend((0..matrices).flat_map(|matrix| planned.row.stored(matrix)));
        }
        let open = plan.rows.get(self.row).map(|planned| planned.row.stored(self.matrix));
        tensors.extend(open.into_iter().flatten().take(self.part));
        tensors
    }
}

/// What the notes of an interrupted pack's marks say so far, held against the plan one by one.
pub struct Notes<'a> {
    plan: &'a Plan,
    place: Place,
    hashes: Vec<[u8; 32]>,
    open: TreeHash,
}

impl<'a> Notes<'a> {
    /// Nothing is packed yet.
    pub fn new(plan: &'a Plan) -> Notes<'a> {
        Notes { plan, place: Place::default(), hashes: Vec::new(), open: TreeHash::new() }
    }

    /// No note of this plan is longer.
    pub fn bytes_max(plan: &Plan) -> usize {
        let end = Place { row: plan.rows.len(), ..Place::default() };
        40 + 32 * end.tensors_before(plan) as usize + TreeHash::ENCODED_BYTES_MAX
    }

    /// Takes the next note; false when it does not follow, and then all of them count for nothing.
    pub fn take(&mut self, note: &[u8]) -> bool {
        self.try_take(note).is_some()
    }

    fn try_take(&mut self, mut note: &[u8]) -> Option<()> {
        let [row, matrix, part, first, count] = std::array::from_fn(|_| take_u64(&mut note));
        self.place = Place { row: row? as usize, matrix: matrix?, part: part? as usize, first: first? };
        if !self.place.is_of(self.plan) {
            return None;
        }
        let new = self.place.tensors_before(self.plan).checked_sub(self.hashes.len() as u64);
        if new != Some(count?) {
            return None;
        }
        for _ in 0..count? {
            let (hash, after) = note.split_first_chunk()?;
            self.hashes.push(*hash);
            note = after;
        }
        self.open = TreeHash::decode(&mut note)?;
        (note.is_empty() && self.open.count() == self.place.open_bytes(self.plan)).then_some(())
    }

    /// The source where the last note stands.
    pub fn source(self) -> Source {
        let tensors: Vec<_> = self.place.before(self.plan).into_iter().zip(self.hashes).collect();
        Source { place: self.place, noted: tensors.len(), tensors, open: self.open }
    }
}

/// The checkpoint's identity in the making: BLAKE3 in derive-key mode over its tensors by name, encoded
/// as all ids are (little-endian, texts and lists preceded by their length as u64).
#[derive(Default)]
pub struct Source {
    /// What comes next.
    pub place: Place,
    tensors: Vec<(StoredTensor, [u8; 32])>,
    /// Of the tensor whose tiles are arriving.
    open: TreeHash,
    /// How many of `tensors` the last note had.
    noted: usize,
}

impl Source {
    /// Tiles come in order; a tile that is a whole tensor brings its hash along.
    pub fn add(&mut self, plan: &Plan, ready: &Ready) {
        self.place = Place::after(plan, &ready.tile);
        if let Some(hash) = ready.hash {
            self.tensors.push((ready.tensor.clone(), hash));
            return;
        }
        self.open.update(&ready.bytes);
        if self.open.count() == ready.tensor.bytes {
            let hash = std::mem::take(&mut self.open).root();
            self.tensors.push((ready.tensor.clone(), hash));
        }
    }

    /// What the next mark says: the place, the hashes since the last note, the hash in the making.
    pub fn note(&mut self) -> Vec<u8> {
        let new = &self.tensors[self.noted..];
        let mut out = Vec::new();
        let Place { row, matrix, part, first } = self.place;
        for number in [row as u64, matrix, part as u64, first, new.len() as u64] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        new.iter().for_each(|(_, hash)| out.extend_from_slice(hash));
        self.open.encode(&mut out);
        self.noted = self.tensors.len();
        out
    }

    /// Bytes that are packed.
    pub fn bytes(&self) -> u64 {
        self.tensors.iter().map(|(tensor, _)| tensor.bytes).sum::<u64>() + self.open.count()
    }

    /// The id, when all tensors are packed.
    pub fn finish(mut self) -> SourceId {
        self.tensors.sort_by(|a, b| a.0.name.cmp(&b.0.name));
        let mut out = blake3::Hasher::new_derive_key("dsv4 source v1");
        let text = |out: &mut blake3::Hasher, text: &str| {
            out.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
        };
        out.update(&(self.tensors.len() as u64).to_le_bytes());
        for (tensor, hash) in &self.tensors {
            text(&mut out, &tensor.name);
            text(&mut out, tensor.dtype);
            out.update(&(tensor.shape.len() as u64).to_le_bytes());
            for dim in &tensor.shape {
                out.update(&dim.to_le_bytes());
            }
            out.update(hash);
        }
        SourceId(*out.finalize().as_bytes())
    }
}

fn take_u64(input: &mut &[u8]) -> Option<u64> {
    let (bytes, rest) = input.split_first_chunk()?;
    *input = rest;
    Some(u64::from_le_bytes(*bytes))
}
