//! The description as text, under a hash.
//!
//! The *weight contract* (table, partition, layouts, section order) guards the rank files; the *op
//! contract* (operations and the weights they read, per kind of layer) guards the kernels. Both are
//! kept as golden files and reviewed like code. The runtime compares the texts stored in an artifact
//! with its own and names the first line that differs.

use crate::layout::{FP4_GROUP, PART_ALIGN, TILE};
use crate::ops::{Op, Site, weights};
use crate::tensors::{Block, LayerSpec, describe};

/// Name under which an artifact keeps the text of its weight contract.
pub const WEIGHT_CONTRACT_NAME: &str = "weight_contract.txt";
/// Name under which an artifact keeps the text of its op contract.
pub const OP_CONTRACT_NAME: &str = "op_contract.txt";

/// Text of the weight contract.
pub fn weight_contract() -> String {
    format!(
        "dsv4 weight contract 1\nscale tile {TILE}x{TILE}; fp4 group {FP4_GROUP}; parts aligned to {PART_ALIGN}\n\
         order: as the forward pass first reads them; unread rows last, in table order\n{}",
        describe()
    )
}

/// Text of the op contract.
pub fn op_contract() -> String {
    let mut out = String::from("dsv4 op contract 1\n");
    let ops = [
        Op::Embed,
        Op::AllReduce,
        Op::Expand,
        Op::DraftInput,
        Op::HcSite(Site::Attn),
        Op::AttnInputs,
        Op::AttnQueries,
        Op::IndexSelect,
        Op::Attend,
        Op::AttnOutput,
        Op::HcSite(Site::Ffn),
        Op::Route,
        Op::Experts,
        Op::HcFinish,
        Op::HcHead,
        Op::Logits,
    ];
    for (ratio, hashed) in [0, 4, 128].into_iter().flat_map(|ratio| [(ratio, true), (ratio, false)]) {
        out += &format!("layer ratio {ratio}, {}\n", if hashed { "hashed" } else { "biased" });
        let layer = LayerSpec { block: Block::Layer(0), ratio, hashed };
        for op in ops {
            out += &format!("  {op:?} {:?}\n", weights(op, &layer));
        }
    }
    out
}

/// BLAKE3 of a contract's text.
pub fn hash(text: &str) -> [u8; 32] {
    *blake3::hash(text.as_bytes()).as_bytes()
}

/// The first line in which two contracts differ: (line number from 1, ours, theirs).
pub fn first_difference(ours: &str, theirs: &str) -> Option<(usize, String, String)> {
    let (mut a, mut b) = (ours.lines(), theirs.lines());
    let mut number = 0;
    loop {
        number += 1;
        let (x, y) = (a.next(), b.next());
        if x.is_none() && y.is_none() {
            return None;
        }
        if x != y {
            let shown = |s: Option<&str>| s.unwrap_or("(nothing)").to_owned();
            return Some((number, shown(x), shown(y)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A change of these texts changes what artifacts mean: rewrite the golden only with a reason.
    #[test]
    fn contracts_equal_their_goldens() {
        for (text, golden) in [
            (weight_contract(), include_str!("../../../tests/golden/weight_contract.txt")),
            (op_contract(), include_str!("../../../tests/golden/op_contract.txt")),
        ] {
            assert_eq!(first_difference(&text, golden), None);
        }
    }

    #[test]
    fn the_first_difference_is_named() {
        assert_eq!(first_difference("a\nb", "a\nc"), Some((2, "b".into(), "c".into())));
        assert_eq!(first_difference("a", "a\nc"), Some((2, "(nothing)".into(), "c".into())));
    }
}
