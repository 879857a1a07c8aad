//! A rank's tensors on the GPU: matrices where the loader put them, small tensors widened to float32 beside them.

mod fill;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use dsv4_model::layout::{Format, MatrixLayout};
use dsv4_model::tensors::{TensorRow, table};
use dsv4_model::{Block, Kind, ModelConfig, TensorId, Tp};

use crate::device::args::U8;
use crate::device::{Buffer, DeviceError, Gpu, In};
use crate::weights::{self, Matrix, WeightsError};
pub use fill::fill;
pub(crate) use fill::fill_values;

/// A matrix in the arena; a stack of experts is `count` of them, `stride` bytes apart.
#[derive(Clone, Copy, Debug)]
pub struct DeviceMatrix {
    /// Address of its codes.
    pub codes: u64,
    /// Address of its scales; meaningless without.
    pub scales: u64,
    /// Outputs.
    pub rows: u32,
    /// Inputs.
    pub cols: u32,
    /// How it is stored.
    pub format: Format,
    /// Byte order.
    pub layout: MatrixLayout,
}

impl DeviceMatrix {
    /// Codes as a kernel takes them.
    pub fn codes(&self) -> In<U8> {
        In::at(self.codes)
    }

    /// Scales as a kernel takes them.
    pub fn scales(&self) -> In<U8> {
        In::at(self.scales)
    }
}

/// All tensors of a rank.
pub struct DeviceWeights {
    /// The rank's sections as stored.
    arena: Buffer,
    matrices: HashMap<TensorId, DeviceMatrix>,
    small: HashMap<TensorId, Buffer>,
}

/// What can be wrong with loaded weights.
#[derive(Debug, thiserror::Error)]
pub enum DeviceWeightsError {
    /// Not the model's.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The GPU.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

impl DeviceWeights {
    /// Views of every tensor of `config`'s model at `tp` in `arena`; `place` gives a tensor's bytes by name.
    ///
    /// Small tensors are read back once and widened. Errors: as for weights on the CPU, and the GPU's.
    pub fn new(
        gpu: &Arc<dyn Gpu>,
        config: &ModelConfig,
        tp: Tp,
        arena: Buffer,
        place: impl Fn(&str) -> Option<Range<usize>>,
    ) -> Result<DeviceWeights, DeviceWeightsError> {
        let mut out = DeviceWeights { arena, matrices: HashMap::new(), small: HashMap::new() };
        for row in table(config) {
            let bytes = weights::place_of(&row, tp, out.arena.bytes() as usize, &place)?;
            let shape = row.local_shape(tp).map_err(WeightsError::from)?;
            let cols = shape[shape.len() - 1] as u32;
            let rows = if shape.len() == 1 { 1 } else { shape[shape.len() - 2] as u32 };
            let layout = row.matrix_layout(tp).map_err(WeightsError::from)?;
            let at = out.arena.at() + bytes.start as u64;
            let matrix =
                DeviceMatrix { codes: at, scales: at + layout.scales_offset, rows, cols, format: row.format, layout };
            out.matrices.insert(row.id, matrix);
            if row.id.kind == Kind::Tid2Eid || weights::is_small(row.id.kind) {
                let mut host = vec![0u8; bytes.len()];
                gpu.read(at, &mut host)?;
                out.keep_small(gpu, config, &row, matrix, &host)?;
            }
        }
        Ok(out)
    }

    fn keep_small(
        &mut self,
        gpu: &Arc<dyn Gpu>,
        config: &ModelConfig,
        row: &TensorRow,
        matrix: DeviceMatrix,
        host: &[u8],
    ) -> Result<(), DeviceWeightsError> {
        if row.id.kind == Kind::Tid2Eid {
            return Ok(weights::check_experts(&row.name, host, matrix.cols as usize, config.n_routed_experts)?);
        }
        let (rows, cols) = (matrix.rows as usize, matrix.cols as usize);
        let stored = Matrix::of(row.format, matrix.layout, rows, cols, host);
        let mut values = vec![0f32; rows * cols];
        values.chunks_exact_mut(cols).enumerate().for_each(|(i, out)| stored.widen_row(i, out));
        self.small.insert(row.id, Buffer::of(gpu, &values)?);
        Ok(())
    }

    /// A matrix, or the first of a stack. Panics if the model has no such tensor.
    pub fn matrix(&self, block: Block, kind: Kind) -> DeviceMatrix {
        let id = TensorId { block, kind };
        *self.matrices.get(&id).unwrap_or_else(|| panic!("no tensor {id:?} in this model"))
    }

    /// Address of a small tensor's float32 values. Panics if the model has no such tensor.
    pub fn small(&self, block: Block, kind: Kind) -> u64 {
        let id = TensorId { block, kind };
        self.small.get(&id).unwrap_or_else(|| panic!("no small tensor {id:?} in this model")).at()
    }

    /// Bytes on the GPU.
    pub fn bytes(&self) -> u64 {
        self.arena.bytes() + self.small.values().map(Buffer::bytes).sum::<u64>()
    }
}
