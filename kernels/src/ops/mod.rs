//! Operation families. Each has a CPU reference: plain functions on rows of float32.
//!
//! A reference computes a row from that row's inputs alone and in a fixed order, so that its result
//! does not depend on what else is in the batch.

pub mod compressor;
pub mod dense_gemm;
pub mod embedding;
pub mod hyper_connection;
pub mod indexer;
pub mod kv;
pub mod moe_gemm;
pub mod rms_norm;
pub mod rope;
pub mod router;
pub mod sparse_attention;

/// A row-major float32 matrix: activations `[rows, cols]`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Mat {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Values, row after row.
    pub data: Vec<f32>,
}

impl Mat {
    /// All zeros.
    pub fn zeros(rows: usize, cols: usize) -> Mat {
        Mat { rows, cols, data: vec![0.0; rows * cols] }
    }

    /// Row `r`.
    pub fn row(&self, r: usize) -> &[f32] {
        &self.data[r * self.cols..(r + 1) * self.cols]
    }

    /// Row `r`, to be written.
    pub fn row_mut(&mut self, r: usize) -> &mut [f32] {
        &mut self.data[r * self.cols..(r + 1) * self.cols]
    }

    /// Applies `f` to every value.
    pub fn map(mut self, f: impl Fn(f32) -> f32) -> Mat {
        for v in &mut self.data {
            *v = f(*v);
        }
        self
    }
}

/// Multiply-adds below which a parallel loop costs more than it saves.
pub const PARALLEL_WORK_MIN: usize = 1 << 20;

/// Runs `f(index, chunk)` over equal chunks of `out`, in parallel where `work` is worth it.
pub fn for_chunks(out: &mut [f32], chunk: usize, work: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    use rayon::prelude::*;
    if chunk == 0 {
        return;
    }
    if work < PARALLEL_WORK_MIN || rayon::current_num_threads() == 1 {
        out.chunks_mut(chunk).enumerate().for_each(|(i, c)| f(i, c));
    } else {
        out.par_chunks_mut(chunk).enumerate().for_each(|(i, c)| f(i, c));
    }
}
