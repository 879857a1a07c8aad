//! Communication between tensor-parallel ranks, behind one trait.
//!
//! Every rank calls the same collectives in the same order with the same sizes. Sums run in rank
//! order (rank 0 first) on every rank, so replicated state stays bit-identical.

/// Why a collective failed. The step is lost; the rank must end.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct CollectiveError(pub String);

/// Collective operations among `size` ranks.
pub trait Collective: Send {
    /// This rank, `0..size`.
    fn rank(&self) -> u32;
    /// How many ranks take part.
    fn size(&self) -> u32;
    /// Replaces `data` by the sum over all ranks, added in rank order.
    fn all_reduce(&mut self, data: &mut [f32]) -> Result<(), CollectiveError>;
    /// Collects every rank's `mine` (equal lengths) on rank 0, in rank order, into `out`
    /// (`size * mine.len()` values; other ranks pass an empty slice).
    fn gather(&mut self, mine: &[f32], out: &mut [f32]) -> Result<(), CollectiveError>;
}

/// One rank alone: every collective is a copy.
pub struct Alone;

impl Collective for Alone {
    fn rank(&self) -> u32 {
        0
    }
    fn size(&self) -> u32 {
        1
    }
    fn all_reduce(&mut self, _data: &mut [f32]) -> Result<(), CollectiveError> {
        Ok(())
    }
    fn gather(&mut self, mine: &[f32], out: &mut [f32]) -> Result<(), CollectiveError> {
        out.copy_from_slice(mine);
        Ok(())
    }
}
