//! Block hashes and how they fold to a section's root.
//!
//! A section's root is the plain BLAKE3 hash of its bytes. BLAKE3 is a binary tree over 1 KiB
//! chunks whose left subtrees are full powers of two, so every aligned 4 MiB block is one subtree:
//! its chaining value can be computed and checked on its own, in any order, on any thread.

use blake3::hazmat::{HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root};

use crate::header::BLOCK_BYTES;
use crate::manifest::Digest;

/// The root of a section without blocks, of an artifact without weights.
pub(crate) const NO_ROOT: Digest = Digest([0; 32]);

/// How many blocks `len` bytes of section have.
pub(crate) fn block_count(len: u64) -> u64 {
    len.div_ceil(BLOCK_BYTES)
}

/// Length of block `index` of a section of `len` bytes; `index < block_count(len)`.
pub(crate) fn block_len(len: u64, index: u64) -> usize {
    (len - index * BLOCK_BYTES).min(BLOCK_BYTES) as usize
}

/// The value stored for block `index` of a section with `count` blocks. A lone block is the whole
/// tree, and BLAKE3 finishes a root differently from a subtree: its value is the root itself.
pub(crate) fn hash_block(bytes: &[u8], index: u64, count: u64) -> [u8; 32] {
    if count == 1 {
        return *blake3::hash(bytes).as_bytes();
    }
    blake3::Hasher::new().set_input_offset(index * BLOCK_BYTES).update(bytes).finalize_non_root()
}

/// The section's root; `None` without blocks.
pub(crate) fn fold(blocks: &[[u8; 32]]) -> Option<Digest> {
    let (left, right) = match blocks {
        [] => return None,
        [only] => return Some(Digest(*only)),
        _ => blocks.split_at(left_blocks(blocks.len())),
    };
    let root = merge_subtrees_root(&subtree(left), &subtree(right), Mode::Hash);
    Some(Digest(*root.as_bytes()))
}

fn subtree(blocks: &[[u8; 32]]) -> [u8; 32] {
    if let [only] = blocks {
        return *only;
    }
    let (left, right) = blocks.split_at(left_blocks(blocks.len()));
    merge_subtrees_non_root(&subtree(left), &subtree(right), Mode::Hash)
}

/// The largest power of two below `blocks`, which is at least 2.
fn left_blocks(blocks: usize) -> usize {
    1 << (usize::BITS - 1 - (blocks - 1).leading_zeros())
}

/// Index and value of the first byte that is not zero.
pub(crate) fn first_nonzero(bytes: &[u8]) -> Option<(usize, u8)> {
    bytes.iter().copied().enumerate().find(|&(_, byte)| byte != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn left_subtree_is_the_largest_smaller_power_of_two() {
        let expected = [(2, 1), (3, 2), (4, 2), (5, 4), (8, 4), (9, 8), (20_242, 16_384)];
        for (blocks, left) in expected {
            assert_eq!(left_blocks(blocks), left, "{blocks} blocks");
        }
    }

    #[test]
    fn blocks_hashed_in_any_order_fold_to_the_plain_hash() {
        // 1 to 7 blocks, the last whole or half.
        let bytes: Vec<u8> = (0..7u32 << 20).flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
        for half_blocks in 1..=14 {
            let section = &bytes[..half_blocks * (2 << 20)];
            let count = block_count(section.len() as u64);
            let mut blocks = vec![[0; 32]; count as usize];
            for index in (0..count).rev() {
                let start = (index * BLOCK_BYTES) as usize;
                let len = block_len(section.len() as u64, index);
                blocks[index as usize] = hash_block(&section[start..start + len], index, count);
            }
            assert_eq!(fold(&blocks), Some(Digest::of(section)), "{half_blocks} half blocks");
        }
    }

    #[test]
    fn no_blocks_have_no_root() {
        assert_eq!(fold(&[]), None);
    }
}
