//! A loaded rank: its tensors as views into one arena of bytes.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use dsv4_model::layout::{Format, MatrixLayout, TILE};
use dsv4_model::tensors::{TensorRow, table};
use dsv4_model::{Block, Kind, ModelConfig, ModelError, TensorId, Tp};

use crate::simd::Row;

/// The arena's bytes, however they are held.
pub type Arena = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// Why a loaded rank cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// The configuration does not allow this rank.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The arena lacks a tensor.
    #[error(
        "tensor {tensor}: not in the loaded rank\n  help: the artifact was made for another model description; pack it again"
    )]
    Missing { tensor: String },
    /// A token's experts are not distinct experts of the model.
    #[error(
        "tensor {tensor}: token {token} goes to experts {found:?}, expected distinct ones below {experts}\n  help: the artifact is damaged or was not made by dsv4c; pack it again"
    )]
    Experts {
        /// Which table.
        tensor: String,
        /// Row of the table.
        token: usize,
        /// What it says.
        found: Vec<i32>,
        /// Experts there are.
        experts: u64,
    },
    /// A tensor has another size than the model description says.
    #[error(
        "tensor {tensor}: {found} bytes loaded, expected {expected}\n  help: the artifact was made for another model description; pack it again"
    )]
    Size { tensor: String, found: u64, expected: u64 },
}

struct Place {
    row: TensorRow,
    layout: MatrixLayout,
    rows: usize,
    cols: usize,
    bytes: Range<usize>,
}

/// The weights of one rank.
pub struct Weights {
    arena: Arena,
    places: HashMap<TensorId, Place>,
    /// Vectors and other small tensors, widened once.
    small: HashMap<TensorId, Vec<f32>>,
}

/// One matrix `[rows, cols]` in its stored format.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    /// Outputs.
    pub rows: usize,
    /// Inputs.
    pub cols: usize,
    format: Format,
    layout: MatrixLayout,
    /// Stored row that row 0 is.
    first: usize,
    bytes: &'a [u8],
}

impl<'a> Matrix<'a> {
    /// A matrix in its stored bytes.
    pub(crate) fn of(format: Format, layout: MatrixLayout, rows: usize, cols: usize, bytes: &'a [u8]) -> Matrix<'a> {
        Matrix { rows, cols, format, layout, first: 0, bytes }
    }

    /// Row `index` as it is stored.
    pub fn row(&self, index: usize) -> Row<'a> {
        assert!(index < self.rows, "row {index} of {}", self.rows);
        let index = self.first + index;
        let part = |offset: u64, width: u64, row: usize| {
            let start = offset as usize + row * width as usize;
            &self.bytes[start..start + width as usize]
        };
        let codes = part(0, self.layout.row_bytes, index);
        let scales = |row| part(self.layout.scales_offset, self.layout.scale_row_bytes, row);
        match self.format {
            Format::F32 => Row::F32(bytemuck::cast_slice(codes)),
            Format::Bf16 => Row::Bf16(codes),
            Format::Fp8 => Row::Fp8(codes, scales(index / TILE as usize)),
            Format::Fp4 => Row::Fp4(codes, scales(index)),
            Format::I64 => panic!("an integer table is not a matrix"),
        }
    }

    /// Widens row `index` into `out` (`cols` values).
    pub fn widen_row(&self, index: usize, out: &mut [f32]) {
        self.row(index).widen(out);
    }

    /// Rows `first..first + count` as a matrix of their own.
    pub fn rows_from(self, first: usize, count: usize) -> Matrix<'a> {
        assert!(first + count <= self.rows, "rows {first}+{count} of {}", self.rows);
        Matrix { first: self.first + first, rows: count, ..self }
    }
}

impl Weights {
    /// Views of every tensor of `config`'s model at `tp` in `arena`; `place` gives a tensor's bytes by name.
    ///
    /// Errors: a tensor missing or of another size.
    pub fn new(
        config: &ModelConfig,
        tp: Tp,
        arena: Arena,
        place: impl Fn(&str) -> Option<Range<usize>>,
    ) -> Result<Weights, WeightsError> {
        let mut weights = Weights { arena, places: HashMap::new(), small: HashMap::new() };
        for row in table(config) {
            let bytes = place_of(&row, tp, (*weights.arena).as_ref().len(), &place)?;
            let shape = row.local_shape(tp)?;
            let cols = shape[shape.len() - 1] as usize;
            let rows = if shape.len() == 1 { 1 } else { shape[shape.len() - 2] as usize };
            let layout = row.matrix_layout(tp)?;
            let id = row.id;
            weights.places.insert(id, Place { row, layout, rows, cols, bytes });
            if id.kind == Kind::Tid2Eid {
                let p = weights.place(id);
                check_experts(
                    &p.row.name,
                    &(*weights.arena).as_ref()[p.bytes.clone()],
                    p.cols,
                    config.n_routed_experts,
                )?;
            }
            if is_small(id.kind) {
                let values = weights.widen(id);
                weights.small.insert(id, values);
            }
        }
        Ok(weights)
    }

    fn widen(&self, id: TensorId) -> Vec<f32> {
        let m = self.matrix(id, 0);
        let mut out = vec![0.0; m.rows * m.cols];
        for (i, row) in out.chunks_exact_mut(m.cols).enumerate() {
            m.widen_row(i, row);
        }
        out
    }

    fn place(&self, id: TensorId) -> &Place {
        self.places.get(&id).unwrap_or_else(|| panic!("no tensor {id:?} in this model"))
    }

    /// Matrix `index` of a tensor (0 unless it is a stack of experts). Panics if the model has no such tensor.
    pub fn matrix(&self, id: TensorId, index: usize) -> Matrix<'_> {
        let p = self.place(id);
        assert!((index as u64) < p.row.matrices(), "matrix {index} of {}", p.row.name);
        let stride = p.layout.stride as usize;
        let start = p.bytes.start + index * stride;
        let bytes = &(*self.arena).as_ref()[start..start + stride];
        Matrix { rows: p.rows, cols: p.cols, format: p.row.format, layout: p.layout, first: 0, bytes }
    }

    /// A vector, or a small matrix row after row, in float32.
    pub fn small(&self, block: Block, kind: Kind) -> &[f32] {
        let id = TensorId { block, kind };
        self.small.get(&id).unwrap_or_else(|| panic!("no small tensor {id:?} in this model"))
    }

    /// Row `token` of the token-to-expert table.
    pub fn experts_of(&self, block: Block, token: u32) -> &[i32] {
        let p = self.place(TensorId { block, kind: Kind::Tid2Eid });
        let row_bytes = p.layout.row_bytes as usize;
        let start = p.bytes.start + token as usize * row_bytes;
        bytemuck::cast_slice(&(*self.arena).as_ref()[start..start + row_bytes])
    }
}

/// Where a tensor lies in an arena of `arena_bytes`. Errors: missing, or another size than the model's.
pub(crate) fn place_of(
    row: &TensorRow,
    tp: Tp,
    arena_bytes: usize,
    place: &impl Fn(&str) -> Option<Range<usize>>,
) -> Result<Range<usize>, WeightsError> {
    let bytes = place(&row.name).ok_or_else(|| WeightsError::Missing { tensor: row.name.clone() })?;
    let expected = row.artifact_bytes(tp)?;
    if bytes.end > arena_bytes || bytes.end.saturating_sub(bytes.start) as u64 != expected {
        let found = bytes.end.saturating_sub(bytes.start) as u64;
        return Err(WeightsError::Size { tensor: row.name.clone(), found, expected });
    }
    Ok(bytes)
}

/// Every token's experts (`per_token` 32-bit numbers a row) are distinct ones of the model.
pub(crate) fn check_experts(tensor: &str, table: &[u8], per_token: usize, experts: u64) -> Result<(), WeightsError> {
    for (token, row) in table.chunks_exact(4 * per_token).enumerate() {
        let row: Vec<i32> = row.chunks_exact(4).map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        let in_range = row.iter().all(|e| u64::try_from(*e).is_ok_and(|e| e < experts));
        if !in_range || row.iter().enumerate().any(|(i, e)| row[..i].contains(e)) {
            return Err(WeightsError::Experts { tensor: tensor.to_owned(), token, found: row, experts });
        }
    }
    Ok(())
}

/// Tensors that are widened at load: everything but the matrices that a matmul streams.
pub(crate) fn is_small(kind: Kind) -> bool {
    use Kind::*;
    matches!(
        kind,
        Norm | HcHeadFn
            | HcHeadBase
            | HcHeadScale
            | AttnNorm
            | FfnNorm
            | HcAttnBase
            | HcAttnScale
            | HcFfnBase
            | HcFfnScale
            | AttnSink
            | QNorm
            | KvNorm
            | CompressorApe
            | CompressorNorm
            | IndexerApe
            | IndexerNorm
            | GateBias
            | ENorm
            | HNorm
            | MainNorm
    )
}
