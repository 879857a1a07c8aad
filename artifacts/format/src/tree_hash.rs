//! BLAKE3 whose state can be put down and taken up again by another process.
//!
//! The hasher of the blake3 crate keeps its state to itself. BLAKE3 is a binary tree over 1 KiB
//! chunks whose left subtrees are full powers of two, so after any number of bytes the state is the
//! values of the complete subtrees so far (one for each bit of their number of chunks) and the last,
//! open chunk. That form does not depend on the pieces in which the bytes came: equal states mean
//! equal bytes.

use blake3::hazmat::{HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root};

const CHUNK_BYTES: usize = blake3::CHUNK_LEN;

/// A BLAKE3 hash in the making.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TreeHash {
    /// Where in the tree the first byte is; a multiple of every subtree that begins there.
    base: u64,
    /// From the left, ever smaller; together `chunks` chunks, none of which is the last.
    subtrees: Vec<[u8; 32]>,
    chunks: u64,
    /// The last chunk; empty only before the first byte.
    open: Vec<u8>,
}

impl TreeHash {
    /// No state is longer: as many subtrees as a number has bits.
    pub const ENCODED_BYTES_MAX: usize = 8 + 64 * 32 + CHUNK_BYTES;

    pub fn new() -> TreeHash {
        TreeHash::default()
    }

    /// For a subtree that begins at `base` bytes of a larger tree.
    pub(crate) fn at(base: u64) -> TreeHash {
        TreeHash { base, ..TreeHash::default() }
    }

    /// Bytes taken so far.
    pub fn count(&self) -> u64 {
        self.chunks * CHUNK_BYTES as u64 + self.open.len() as u64
    }

    /// Takes the next bytes. Long pieces are hashed as fast as the blake3 crate does.
    pub fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.open.len() == CHUNK_BYTES {
                let value = self.value(&self.open);
                self.push(value, 1);
                self.open.clear();
            }
            // At least one byte is left over: only what is not the last chunk may be closed.
            let whole = (bytes.len() - 1) / CHUNK_BYTES;
            if self.open.is_empty() && whole > 0 {
                let fits = 1 << whole.ilog2();
                let aligned = if self.chunks == 0 { fits } else { 1 << self.chunks.trailing_zeros() };
                let run = aligned.min(fits);
                let (now, rest) = bytes.split_at(run as usize * CHUNK_BYTES);
                let value = self.value(now);
                self.push(value, run);
                bytes = rest;
            } else {
                let (now, rest) = bytes.split_at(bytes.len().min(CHUNK_BYTES - self.open.len()));
                self.open.extend_from_slice(now);
                bytes = rest;
            }
        }
    }

    /// The hash of all bytes taken, as `blake3::hash` gives it.
    pub fn root(&self) -> [u8; 32] {
        match self.right_of_first() {
            None => *blake3::hash(&self.open).as_bytes(),
            Some((first, rest)) => *merge_subtrees_root(&first, &rest, Mode::Hash).as_bytes(),
        }
    }

    /// The value of all bytes taken (at least one) as a subtree of a larger tree.
    pub(crate) fn subtree(&self) -> [u8; 32] {
        match self.right_of_first() {
            None => self.value(&self.open),
            Some((first, rest)) => merge_subtrees_non_root(&first, &rest, Mode::Hash),
        }
    }

    /// The first subtree, and everything behind it as one. `None` while there is only the open chunk.
    fn right_of_first(&self) -> Option<([u8; 32], [u8; 32])> {
        let (first, others) = self.subtrees.split_first()?;
        let merge = |right, left: &[u8; 32]| merge_subtrees_non_root(left, &right, Mode::Hash);
        Some((*first, others.iter().rev().fold(self.value(&self.open), merge)))
    }

    /// Of a subtree that begins behind the complete ones.
    fn value(&self, bytes: &[u8]) -> [u8; 32] {
        let offset = self.base + self.chunks * CHUNK_BYTES as u64;
        blake3::Hasher::new().set_input_offset(offset).update(bytes).finalize_non_root()
    }

    /// Adds a subtree of `run` chunks, a power of two that divides the number of those before it.
    fn push(&mut self, mut value: [u8; 32], run: u64) {
        let mut before = self.chunks / run;
        while before % 2 == 1 {
            let Some(left) = self.subtrees.pop() else { unreachable!("one subtree for each bit of {}", self.chunks) };
            value = merge_subtrees_non_root(&left, &value, Mode::Hash);
            before /= 2;
        }
        self.subtrees.push(value);
        self.chunks += run;
    }

    /// Appends the state: how many bytes (u64), the subtrees' values, the open chunk.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.count().to_le_bytes());
        out.extend(self.subtrees.iter().flatten());
        out.extend_from_slice(&self.open);
    }

    /// Takes a state off the front of `input`; `None` if it is cut short.
    pub fn decode(input: &mut &[u8]) -> Option<TreeHash> {
        TreeHash::decode_at(0, input)
    }

    pub(crate) fn decode_at(base: u64, input: &mut &[u8]) -> Option<TreeHash> {
        let (count, mut rest) = input.split_first_chunk()?;
        let count = u64::from_le_bytes(*count);
        let mut out = TreeHash::at(base);
        if let Some(before_last) = count.checked_sub(1) {
            out.chunks = before_last / CHUNK_BYTES as u64;
            for _ in 0..out.chunks.count_ones() {
                let (value, after) = rest.split_first_chunk()?;
                out.subtrees.push(*value);
                rest = after;
            }
            let (open, after) = rest.split_at_checked((count - out.chunks * CHUNK_BYTES as u64) as usize)?;
            out.open.extend_from_slice(open);
            rest = after;
        }
        *input = rest;
        Some(out)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes(len: usize) -> Vec<u8> {
        (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 11) as u8).collect()
    }

    fn hashed<'a>(base: u64, pieces: impl IntoIterator<Item = &'a [u8]>) -> TreeHash {
        let mut hash = TreeHash::at(base);
        pieces.into_iter().for_each(|piece| hash.update(piece));
        hash
    }

    #[test]
    fn every_length_around_the_edges_of_the_tree_is_plain_blake3() {
        let all = bytes(70 * CHUNK_BYTES);
        for chunks in 0..=65 {
            for len in (chunks * CHUNK_BYTES).saturating_sub(1)..=chunks * CHUNK_BYTES + 1 {
                let whole = hashed(0, [&all[..len]]);
                assert_eq!(whole.root(), *blake3::hash(&all[..len]).as_bytes(), "{len} bytes");
                assert_eq!(whole.count(), len as u64);
                assert_eq!(hashed(0, all[..len].chunks(1000)), whole, "{len} bytes in pieces");
            }
        }
    }

    #[test]
    fn a_block_of_a_larger_tree_has_the_value_that_artifacts_store() {
        let all = bytes(4 << 20);
        for (len, index) in [(4 << 20, 0), (4 << 20, 5), (2 << 20, 3)] {
            let block = hashed(index * (4 << 20), all[..len].chunks(300_001));
            assert_eq!(
                block.subtree(),
                crate::section::hash_block(&all[..len], index, 9),
                "{len} bytes, block {index}"
            );
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

        /// Put down and taken up again after every piece.
        #[test]
        fn a_state_goes_on_where_it_was_put_down(lens in prop::collection::vec(0usize..200_000, 1..8)) {
            let all = bytes(lens.iter().sum());
            let mut hash = TreeHash::new();
            let mut rest = &all[..];
            for len in lens {
                let (now, after) = rest.split_at(len);
                hash.update(now);
                rest = after;
                let mut state = Vec::new();
                hash.encode(&mut state);
                for cut in [0, 7, state.len() - 1] {
                    prop_assert!(TreeHash::decode(&mut &state[..cut.min(state.len() - 1)]).is_none());
                }
                state.push(7);
                let mut input = &state[..];
                let again = TreeHash::decode(&mut input).unwrap();
                prop_assert_eq!(input, &[7]);
                prop_assert_eq!(&again, &hash);
                hash = again;
            }
            prop_assert_eq!(hash.root(), *blake3::hash(&all).as_bytes());
        }
    }
}
