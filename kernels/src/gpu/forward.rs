//! [`GpuBackend`] as a [`Backend`]: the operations in their order, and where ranks meet.

use super::attention::Selection;
use super::experts::Routing;
use super::products::Product;
use super::residual::Mix;
use super::{Activation, GpuBackend, GpuError, Partial, Streams};
use crate::device::Gpu;
use crate::gpu::kernels::DECODE_ROWS;
use crate::ops::Mat;
use dsv4_model::Kind;
use dsv4_model::ops::{Backend, Done, Projected, Site};
use dsv4_model::tensors::{Block, LayerSpec};

impl Backend for GpuBackend {
    type Act = Activation;
    type Partial = Partial;
    type Streams = Streams;
    type Mix = Mix;
    type Selection = Selection;
    type Routing = Routing;
    type Logits = Mat;
    type Error = GpuError;

    fn embed(&mut self) -> Result<Partial, GpuError> {
        self.embed_rows()
    }

    fn all_reduce(&mut self, part: Partial) -> Result<Activation, GpuError> {
        if !self.is_alone() {
            // Every rank has the same sum, added in the order of the ranks.
            let count = part.rows as usize * part.cols as usize;
            self.exchanged.resize(count, 0.0);
            self.stream.read(part.at, bytemuck::cast_slice_mut(&mut self.exchanged))?;
            self.collective.all_reduce(&mut self.exchanged)?;
            self.stream.write(part.at, bytemuck::cast_slice(&self.exchanged))?;
        }
        Ok(Activation { at: part.at, rows: part.rows, cols: part.cols, parts: 1 })
    }

    fn expand(&mut self, x: Activation) -> Result<Streams, GpuError> {
        self.expand_rows(x)
    }

    fn draft_input(&mut self, embedded: Activation, source: &Streams, block: Block) -> Result<Streams, GpuError> {
        self.start_draft(embedded, source, block)
    }

    fn hc_site(
        &mut self,
        h: &mut Streams,
        done: Option<Done<Self>>,
        layer: &LayerSpec,
        site: Site,
    ) -> Result<(Activation, Mix), GpuError> {
        self.enter_site(h, done, layer, site)
    }

    fn hc_finish(&mut self, h: &mut Streams, done: Done<Self>) -> Result<(), GpuError> {
        self.leave_site(h, done)
    }

    fn attn_inputs(&mut self, x: &Activation, layer: &LayerSpec) -> Result<Projected<Activation>, GpuError> {
        self.project_inputs(x, layer)
    }

    fn attn_queries(&mut self, qr: &Activation, layer: &LayerSpec) -> Result<Projected<Activation>, GpuError> {
        self.project_queries(qr, layer)
    }

    fn index_select(
        &mut self,
        qi: &Activation,
        head_weights: &Activation,
        layer: &LayerSpec,
    ) -> Result<Selection, GpuError> {
        self.select_entries(qi, head_weights, layer)
    }

    fn attend(
        &mut self,
        q: &Activation,
        _selected: Option<&Selection>,
        layer: &LayerSpec,
    ) -> Result<Activation, GpuError> {
        self.attend_entries(q, _selected, layer)
    }

    fn attn_output(&mut self, o: &Activation, layer: &LayerSpec) -> Result<Partial, GpuError> {
        self.project_output(o, layer)
    }

    fn route(&mut self, x: &Activation, layer: &LayerSpec) -> Result<Routing, GpuError> {
        self.choose_experts(x, layer)
    }

    fn experts(&mut self, x: &Activation, _routing: &Routing, layer: &LayerSpec) -> Result<Partial, GpuError> {
        self.run_experts(x, _routing, layer)
    }

    fn hc_head(&mut self, h: &Streams, block: Block) -> Result<Activation, GpuError> {
        self.collapse_wanted(h, block)
    }

    fn logits(&mut self, x: &Activation) -> Result<Mat, GpuError> {
        let head = self.matrix(Block::Global, Kind::Head);
        let cols = head.rows as usize;
        let mut local = Mat::zeros(x.rows as usize, cols);
        let y = self.work.logits.at();
        for (i, out) in local.data.chunks_mut(cols * DECODE_ROWS as usize).enumerate() {
            let first = i as u32 * DECODE_ROWS;
            let from = x.at + u64::from(first) * u64::from(x.cols) * self.act_bytes();
            let rows = (out.len() / cols) as u32;
            self.multiply_streamed(rows, &[Product::new(head, from, y).unrounded()])?;
            // A step that is recorded has one such part.
            self.stream.end(self.whole)?;
            self.stream.read(y, bytemuck::cast_slice_mut(out))?;
        }
        self.stream.end(false)?;
        self.gather(local)
    }
}

impl GpuBackend {
    pub(super) fn part(&self) -> Partial {
        Partial { at: self.work.part.at(), rows: self.current.rows, cols: self.shape.hidden }
    }

    /// All ranks' logits on rank 0, nothing elsewhere.
    fn gather(&mut self, local: Mat) -> Result<Mat, GpuError> {
        if self.is_alone() {
            return Ok(local);
        }
        let size = self.tp.size() as usize;
        if self.tp.rank() != 0 {
            self.collective.gather(&local.data, &mut [])?;
            return Ok(Mat::default());
        }
        let mut parts = vec![0f32; size * local.data.len()];
        self.collective.gather(&local.data, &mut parts)?;
        let mut out = Mat::zeros(local.rows, size * local.cols);
        for (rank, part) in parts.chunks_exact(local.data.len().max(1)).enumerate() {
            for r in 0..local.rows {
                let at = rank * local.cols;
                out.row_mut(r)[at..at + local.cols].copy_from_slice(&part[r * local.cols..(r + 1) * local.cols]);
            }
        }
        Ok(out)
    }
}
