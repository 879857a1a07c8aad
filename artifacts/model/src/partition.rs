//! The only arithmetic on ranks.

use std::ops::Range;

use crate::error::ModelError;

/// One rank of a tensor-parallel group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tp {
    rank: u32,
    size: u32,
}

impl Tp {
    /// The whole model on one rank.
    pub const ONE: Tp = Tp { rank: 0, size: 1 };

    /// Rank `rank` of `size`. Errors: sizes other than 1, 2, 4, 8. Panics if `rank >= size`.
    pub fn new(rank: u32, size: u32) -> Result<Tp, ModelError> {
        if ![1, 2, 4, 8].contains(&size) {
            return Err(ModelError::Tp { found: size });
        }
        assert!(rank < size, "rank {rank} of {size}");
        Ok(Tp { rank, size })
    }

    /// This rank, `0..size`.
    pub fn rank(self) -> u32 {
        self.rank
    }

    /// Number of ranks.
    pub fn size(self) -> u32 {
        self.size
    }

    /// All ranks of the group, in order.
    pub fn all(self) -> impl Iterator<Item = Tp> {
        (0..self.size).map(move |rank| Tp { rank, ..self })
    }
}

/// How a tensor is shared among ranks: copied, or cut along one dimension of its shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Partition {
    /// Every rank holds the whole tensor.
    Copy,
    /// Rank r holds the r-th equal part of dimension `dim`, a whole number of `unit`s.
    Split {
        /// Index into the shape.
        dim: usize,
        /// Head, group or scale tile that must stay whole, in elements.
        unit: u64,
    },
}

impl Partition {
    /// The part of dimension `dim` of length `len` that `tp` holds.
    ///
    /// Errors: [`ModelError::Indivisible`] when a part would not be a whole number of units;
    /// `tensor` names the offender in the message.
    pub fn range(self, tensor: &str, dim: usize, len: u64, tp: Tp) -> Result<Range<u64>, ModelError> {
        let unit = match self {
            Partition::Split { dim: cut, unit } if cut == dim && tp.size > 1 => unit,
            _ => return Ok(0..len),
        };
        let ranks = u64::from(tp.size);
        if unit == 0 || !len.is_multiple_of(unit * ranks) {
            let fits: Vec<String> = [1u64, 2, 4, 8]
                .iter()
                .filter(|n| **n == 1 || (unit != 0 && len.is_multiple_of(unit * **n)))
                .map(u64::to_string)
                .collect();
            let fits = format!("this tensor fits --tp {}", fits.join(", "));
            return Err(ModelError::Indivisible { tensor: tensor.to_owned(), len, unit, ranks: tp.size, fits });
        }
        let part = len / ranks;
        let first = u64::from(tp.rank) * part;
        Ok(first..first + part)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_in_order() {
        let split = Partition::Split { dim: 0, unit: 128 };
        for size in [1, 2, 4, 8] {
            let mut next = 0;
            for tp in Tp::new(0, size).unwrap().all() {
                let part = split.range("t", 0, 8192, tp).unwrap();
                assert_eq!(part.start, next);
                assert_eq!(part.end % 128, 0);
                next = part.end;
            }
            assert_eq!(next, 8192);
            assert_eq!(split.range("t", 1, 77, Tp::new(size - 1, size).unwrap()).unwrap(), 0..77);
        }
    }

    #[test]
    fn a_cut_inside_a_unit_is_refused_by_name() {
        let split = Partition::Split { dim: 0, unit: 128 };
        let error = split.range("layers.0.attn.wo_a", 0, 256, Tp::new(0, 4).unwrap()).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("layers.0.attn.wo_a") && text.contains("--tp 1, 2"), "{text}");
        assert!(Tp::new(0, 3).is_err());
        assert_eq!(split.range("t", 0, 100, Tp::ONE).unwrap(), 0..100, "one rank cuts nothing");
    }
}
