//! What a step computes: which rows of which sequences. Pure arithmetic.
//!
//! Pieces of a prompt are cut at fixed places, whoever else is there: at multiples of [`GRID`] (or of the chunk, if that
//! is less), and a rest of no more rows than a short step has is a step of its own. So a row belongs to a long or to a
//! short step by its position alone, and a prompt has the same caches however it was cut, also on a GPU, where the two
//! differ in their order of sums.

use std::time::Duration;

/// Pieces end at multiples of this position, or at the prompt's end.
pub const GRID: usize = 64;
/// Rows of all sequences together that are decoded in one step: a row's result does not depend on its company up to
/// here, on a GPU either.
pub const SHORT_ROWS: usize = 16;

/// Rows that a step of prefill may have when some are decoding, so that they wait no longer than `bound`.
pub fn rows_within(bound: Duration, us_per_row: f64, chunk: usize) -> usize {
    let rows = if us_per_row > 0.0 { bound.as_micros() as f64 / us_per_row } else { GRID as f64 };
    let whole = (rows.clamp(0.0, chunk as f64) as usize) / GRID * GRID;
    whole.max(GRID.min(chunk))
}

/// Where the piece of a prompt of `length` tokens that begins at `start` ends, with at most `rows` rows, if it is cut
/// at multiples of `grid`: at `start`, where nothing fits.
pub fn piece_end(start: usize, length: usize, rows: usize, grid: usize) -> usize {
    let rest = length % grid;
    // The last rows, if they are few.
    let tail = if rest <= SHORT_ROWS { length - rest } else { length };
    let until = if start < tail { tail } else { length };
    if until - start <= rows { until } else { ((start + rows) / grid * grid).max(start) }
}

/// Drafts that each of `sequences` may have so that all fit a short step together.
pub fn drafts_each(sequences: usize) -> usize {
    (SHORT_ROWS / sequences.max(1)).saturating_sub(1)
}

/// A draft length that follows what is accepted: rows that are rejected cost time, drafts that are not made cost more.
#[derive(Clone, Copy, Debug)]
pub struct Adaptive {
    most: usize,
    /// Part of the drafts at a place that was accepted lately, given that those before were.
    accepted: f64,
}

impl Adaptive {
    /// Up to `most` drafts; hopeful at first.
    pub fn new(most: usize) -> Adaptive {
        Adaptive { most, accepted: 0.7 }
    }

    /// Drafts of the next step: as many as are accepted at least two times in five, all together.
    pub fn length(&self) -> usize {
        let (mut all, mut length) = (1.0, 0);
        while length < self.most {
            all *= self.accepted;
            if all < 0.4 {
                break;
            }
            length += 1;
        }
        // Always one: otherwise nothing would ever be learnt again.
        length.max(self.most.min(1))
    }

    /// What became of `drafted` drafts.
    pub fn learn(&mut self, drafted: usize, accepted: usize) {
        let tried = drafted.min(accepted + 1);
        for place in 0..tried {
            let hit = if place < accepted { 1.0 } else { 0.0 };
            self.accepted += 0.1 * (hit - self.accepted);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whichever pieces: every row is in a long step or in a short one by its position alone.
    #[test]
    fn pieces_do_not_change_which_rows_are_short() {
        for (length, grid) in (1..400).flat_map(|length| [(length, 64), (length, 24)]) {
            let cut = |rows: &dyn Fn(usize, usize) -> usize| {
                let (mut start, mut short, mut turn) = (0, Vec::new(), 0);
                while start < length {
                    let most = rows(start, turn);
                    turn += 1;
                    let end = piece_end(start, length, most, grid);
                    assert!(end >= start && end - start <= most && end <= length);
                    assert!(end > start || most < grid, "{start} of {length}: nothing in {most} rows");
                    short.extend((start..end).map(|_| end - start <= SHORT_ROWS));
                    start = end;
                }
                short
            };
            let whole = cut(&|_, _| 4096);
            assert_eq!(cut(&|_, _| grid), whole, "{length}");
            assert_eq!(cut(&|start, _| if start % 128 == 0 { 64 } else { 200 }), whole, "{length}");
            // What others leave of a step.
            assert_eq!(cut(&|_, turn| if turn % 3 == 2 { 70 } else { 20 + turn % 40 }), whole, "{length}");
        }
        assert_eq!(piece_end(0, 100, 4096, GRID), 100);
        assert_eq!(piece_end(0, 70, 4096, GRID), 64);
        assert_eq!(piece_end(64, 70, 4096, GRID), 70);
        assert_eq!(piece_end(0, 100, 80, GRID), 64);
        assert_eq!(piece_end(0, 42, 41, GRID), 0);
        assert_eq!(piece_end(0, 100, 8, 8), 8);
    }

    #[test]
    fn a_bound_is_rows() {
        assert_eq!(rows_within(Duration::from_millis(100), 100.0, 2048), 960);
        assert_eq!(rows_within(Duration::from_millis(1), 1e6, 2048), GRID);
        assert_eq!(rows_within(Duration::from_secs(100), 1.0, 256), 256);
        assert_eq!(rows_within(Duration::from_secs(100), 1.0, 10), 10);
        assert_eq!(rows_within(Duration::from_secs(1), 0.0, 256), GRID);
        assert_eq!([1, 2, 5, 8, 9, 16, 0].map(drafts_each), [15, 7, 2, 1, 0, 0, 15]);
    }

    #[test]
    fn drafts_grow_and_shrink() {
        let mut adaptive = Adaptive::new(5);
        assert_eq!(adaptive.length(), 2);
        (0..40).for_each(|_| adaptive.learn(5, 5));
        assert_eq!(adaptive.length(), 5);
        (0..60).for_each(|_| adaptive.learn(5, 0));
        assert_eq!(adaptive.length(), 1);
        assert_eq!(Adaptive::new(0).length(), 0);
    }
}
