//! The GPU backend: one rank of the model on a [`Gpu`], be it real or emulated.
//!
//! Weights lie in one arena, caches and workspace are reserved at the start; a step allocates nothing on the GPU.
//! [`dsv4_model::forward`] drives it. What a step's kernels read of the step is uploaded once, in
//! [`GpuBackend::begin`]; the operations launch and return, and the host waits where ranks exchange sums and where
//! logits are read. Steps of few rows are recorded once and replayed ([`stream`]).

mod attention;
mod experts;
mod forward;
pub mod kernels;
mod native;
mod products;
mod residual;
pub mod shape;
pub mod state;
mod step;
pub mod stream;
#[cfg(test)]
mod tests;
pub mod weights;
pub mod workspace;

use std::sync::Arc;

use dsv4_model::cache::PAGE_TOKENS;
use dsv4_model::layout::Format;
use dsv4_model::ops::Step;
use dsv4_model::tensors::draft_stages;
use dsv4_model::{ModelConfig, Tp};

use crate::collective::{Collective, CollectiveError};
use crate::device::{Buffer, DeviceError, Gpu};
use crate::gpu::kernels::{DECODE_ROWS, Kernels};
use crate::gpu::shape::Shape;
use crate::gpu::state::{DeviceState, StateSize};
use crate::gpu::step::{Bounds, Current, Sequence, Turns, check, check_slot, require};
use crate::gpu::stream::{Key, StepStats, Stream};
use crate::gpu::weights::DeviceWeights;
use crate::gpu::weights::fill_values;
use crate::gpu::workspace::{Need, Workspace};
use crate::numerics::{Numerics, bf16_round};
use crate::ops::Mat;
use crate::ops::dense_gemm::native::Verdict;

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
pub enum GpuError {
    /// The GPU.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// An exchange between ranks failed.
    #[error(transparent)]
    Collective(#[from] CollectiveError),
    /// A step that this rank cannot run.
    #[error(
        "step of rank 0: expected {expected}, found {found}\n  help: all ranks must run the same version of dsv4-run"
    )]
    Step {
        /// What a step must be.
        expected: String,
        /// What this one is.
        found: String,
    },
}

/// What is reserved, and how steps run.
#[derive(Clone, Copy, Debug)]
pub struct GpuOptions {
    /// Sequences at once.
    pub slots: u32,
    /// Tokens of a sequence.
    pub context: u32,
    /// Rows of a step.
    pub rows_max: u32,
    /// One rank of several runs without the others: sums and logits are its own part. For measurements.
    pub solo: bool,
    /// Steps of few rows are recorded and replayed, where the GPU can.
    pub graphs: bool,
}

/// An activation on the GPU: valid until the operation that made it runs again.
#[derive(Clone, Copy, Debug)]
pub struct Activation {
    /// Address of its first value.
    at: u64,
    rows: u32,
    cols: u32,
    /// It is still as many float32 summands, one after another, unrounded; 0: it is activations.
    parts: u32,
}

/// A rank's summand `[rows, D]`, float32.
#[derive(Clone, Copy, Debug)]
pub struct Partial {
    at: u64,
    rows: u32,
    cols: u32,
}

/// Residual streams `[rows, M*D]` of the last trunk or draft step: the next step of the same kind overwrites them.
#[derive(Clone, Copy, Debug)]
pub struct Streams {
    draft: bool,
    rows: u32,
}

/// One rank of the model on a GPU.
pub struct GpuBackend {
    config: ModelConfig,
    tp: Tp,
    numerics: Numerics,
    options: GpuOptions,
    shape: Shape,
    stream: Stream,
    weights: DeviceWeights,
    kernels: Kernels,
    state: DeviceState,
    work: Workspace,
    collective: Box<dyn Collective>,
    turns: Turns,
    slots: Vec<Option<Sequence>>,
    current: Current,
    /// Which of the two places for mixing weights the next site takes.
    mix: u64,
    /// The current pass has run to its end.
    whole: bool,
    /// Sums of other ranks pass through here.
    exchanged: Vec<f32>,
}

/// A rank's caches and what its steps compute in, before there are weights.
///
/// Reserved first, so that what does not fit is known before gigabytes are read.
pub struct Reserved {
    gpu: Arc<dyn Gpu>,
    config: ModelConfig,
    tp: Tp,
    numerics: Numerics,
    options: GpuOptions,
    shape: Shape,
    state: DeviceState,
    work: Workspace,
}

impl Reserved {
    /// For a rank of `config`'s model. Errors: not enough GPU memory.
    pub fn new(
        gpu: Arc<dyn Gpu>,
        config: ModelConfig,
        tp: Tp,
        numerics: Numerics,
        options: GpuOptions,
    ) -> Result<Reserved, DeviceError> {
        assert!(options.rows_max > 0, "steps have rows");
        let shape = Shape::new(&config, tp);
        let size = StateSize { slots: options.slots, context: options.context, act_bytes: numerics.act_bytes() };
        let need = Need::new(&config, shape, numerics, options.rows_max, options.context);
        let state = DeviceState::new(&gpu, &config, size)?;
        let work = Workspace::new(&gpu, &need)?;
        Ok(Reserved { gpu, config, tp, numerics, options, shape, state, work })
    }
}

impl GpuBackend {
    /// A rank in what is reserved for it, of checked kernels ([`Kernels::check`]).
    pub fn with(
        reserved: Reserved,
        weights: DeviceWeights,
        kernels: Kernels,
        collective: Box<dyn Collective>,
    ) -> GpuBackend {
        let Reserved { gpu, config, tp, numerics, options, shape, state, work } = reserved;
        let alone = (0, 1);
        let expected = if options.solo { alone } else { (tp.rank(), tp.size()) };
        assert_eq!((collective.rank(), collective.size()), expected, "rank of the collective");
        GpuBackend {
            state,
            work,
            stream: Stream::new(gpu),
            turns: Turns::new(&config),
            slots: vec![None; options.slots as usize],
            current: Current::default(),
            mix: 0,
            whole: false,
            exchanged: Vec::new(),
            config,
            tp,
            numerics,
            options,
            shape,
            weights,
            kernels,
            collective,
        }
    }

    /// The model's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Launches of the current or last step.
    pub fn stats(&self) -> StepStats {
        self.stream.stats()
    }

    /// How the block-scaled kernels of long steps did when they were checked at the start; empty where the architecture
    /// has none. They are used if all are accepted.
    pub fn verdicts(&self) -> &[Verdict] {
        &self.kernels.verdicts
    }

    /// Whether steps of few rows are recorded and replayed from now on.
    pub fn set_graphs(&mut self, graphs: bool) {
        self.options.graphs = graphs;
    }

    /// Records steps anew, where they are recorded. Errors: the GPU's.
    pub fn forget_recordings(&mut self) -> Result<(), GpuError> {
        Ok(self.stream.forget()?)
    }

    /// Starts an empty sequence in `slot`. Errors: no such slot.
    pub fn open(&mut self, slot: u32) -> Result<(), GpuError> {
        check_slot(slot, self.slots.len())?;
        self.slots[slot as usize] = Some(Sequence::default());
        Ok(())
    }

    /// Forgets the sequence in `slot`. Errors: no such slot.
    pub fn close(&mut self, slot: u32) -> Result<(), GpuError> {
        check_slot(slot, self.slots.len())?;
        self.slots[slot as usize] = None;
        Ok(())
    }

    /// Fills all caches with values of a plausible size, all different: the choice among entries takes longer where
    /// many are equal. For measurements. Errors: the GPU's.
    pub fn make_up_caches(&mut self) -> Result<(), GpuError> {
        let (gpu, act) = (self.stream.gpu(), if self.published() { Format::Bf16 } else { Format::F32 });
        for (seed, (buffer, is_sum)) in (0..).zip(self.state.buffers()) {
            fill_values(gpu.as_ref(), buffer, if is_sum { Format::F32 } else { act }, seed)?;
        }
        Ok(gpu.sync()?)
    }

    /// Takes the trunk's caches of a sequence for filled up to `tokens`, whatever is in them. For measurements.
    /// Errors: the slot is not open.
    pub fn assume_filled(&mut self, slot: u32, tokens: u32) -> Result<(), GpuError> {
        let open = self.slots.get_mut(slot as usize).and_then(Option::as_mut);
        let sequence =
            open.ok_or_else(|| GpuError::Step { expected: format!("slot {slot} open"), found: "not".into() })?;
        sequence.trunk.extend(0, tokens);
        Ok(())
    }

    /// Whether kernels may start while the one ahead ends, from now on: they may unless this says otherwise.
    pub fn set_overlap(&mut self, overlap: bool) {
        self.stream.set_overlap(overlap);
    }

    /// Positions that trunk and draft steps have filled in `slot`; nothing where no sequence is open.
    pub fn filled(&self, slot: u32) -> Option<(u32, u32)> {
        let sequence = (*self.slots.get(slot as usize)?)?;
        Some((sequence.trunk.length, sequence.draft.length))
    }

    /// Sets the step that the next operations work on; `source` are the streams a draft step continues.
    ///
    /// Errors: slots that are not open or named twice, too many rows, a gap before a segment, a start that the rings
    /// no longer reach, rows, tokens or positions out of range; the GPU's.
    pub fn begin(&mut self, step: Step, source: Option<&Streams>) -> Result<(), GpuError> {
        if self.whole {
            self.finish()?;
        }
        self.stream.discard()?;
        let bounds = Bounds {
            rows_max: self.options.rows_max,
            context: self.config.max_position_embeddings.min(self.options.context.into()),
            vocab: self.config.vocab_size,
        };
        check(&step, source, &self.slots, bounds)?;
        if source.is_some() {
            let stages = draft_stages(&self.config).len();
            require(stages > 0, || ("a model that drafts".into(), "none".into()))?;
        }
        for s in &step.segments {
            if let Some(sequence) = &mut self.slots[s.slot as usize] {
                let filled = if source.is_some() { &mut sequence.draft } else { &mut sequence.trunk };
                filled.extend(s.start, s.start + s.rows);
            }
        }
        let (pairs, topk) = (self.shape.rope as usize / 2, self.shape.topk);
        let entries_max = self.state.pages_max * (PAGE_TOKENS as u32 / 4);
        let at = self.work.step.at();
        let (current, bytes) = Current::new(&step, &self.turns, at, pairs, topk, entries_max);
        self.stream.write(at, &bytes)?;
        self.current = current;
        (self.mix, self.whole) = (0, false);
        let records = self.options.graphs && current.rows <= DECODE_ROWS && self.is_alone();
        let key = Key {
            rows: current.rows,
            wanted: current.wanted,
            source: source.map(|s| s.draft),
            entries: current.entries,
        };
        self.stream.begin(records.then_some(key))?;
        Ok(())
    }

    /// Ends a pass whose logits are not asked for: what was recorded or is replayed is launched.
    ///
    /// Errors: the GPU's.
    pub fn finish(&mut self) -> Result<(), GpuError> {
        Ok(self.stream.end(self.whole && self.current.wanted == 0)?)
    }

    /// Reads streams back, `[rows, M*D]`. Ends the pass. Errors: the GPU's.
    pub fn streams(&mut self, h: &Streams) -> Result<Mat, GpuError> {
        self.finish()?;
        self.read_activations(self.streams_at(h), h.rows, self.shape.hidden * self.shape.streams)
    }

    /// Reads an activation back, `[rows, cols]`. Errors: the GPU's.
    ///
    /// In a step that is recorded nothing has run yet: turn that off first ([`GpuBackend::set_graphs`]).
    pub fn values(&self, x: &Activation) -> Result<Mat, GpuError> {
        if x.parts == 0 {
            return self.read_activations(x.at, x.rows, x.cols);
        }
        let settled = self.settle(*x)?;
        self.read_activations(settled.at, x.rows, x.cols)
    }

    /// Replaces an activation that an operation gave, for comparisons from equal inputs. Errors: the GPU's.
    ///
    /// Panics if the sizes differ. Not in a step that is recorded.
    pub fn set_values(&self, x: &Activation, values: &Mat) -> Result<(), GpuError> {
        assert_eq!((x.rows as usize, x.cols as usize, x.parts < 2), (values.rows, values.cols, true));
        if x.parts == 0 {
            return self.write_activations(x.at, values);
        }
        Ok(self.stream.write(x.at, bytemuck::cast_slice(&values.data))?)
    }

    fn write_activations(&self, at: u64, values: &Mat) -> Result<(), GpuError> {
        match self.numerics {
            Numerics::Float => self.stream.write(at, bytemuck::cast_slice(&values.data))?,
            Numerics::Published => {
                let bits: Vec<u16> = values.data.iter().map(|v| (bf16_round(*v).to_bits() >> 16) as u16).collect();
                self.stream.write(at, bytemuck::cast_slice(&bits))?;
            }
        }
        Ok(())
    }

    fn read_activations(&self, at: u64, rows: u32, cols: u32) -> Result<Mat, GpuError> {
        let count = rows as usize * cols as usize;
        let data = match self.numerics {
            Numerics::Float => self.read::<f32>(at, count)?,
            Numerics::Published => {
                let bits = self.read::<u16>(at, count)?;
                bits.into_iter().map(|b| f32::from_bits(u32::from(b) << 16)).collect()
            }
        };
        Ok(Mat { rows: rows as usize, cols: cols as usize, data })
    }

    /// Takes `h` as the streams of the last trunk step; rounded to the activation format. Errors: the GPU's.
    ///
    /// Panics if there are more rows than a step has, or rows of another width.
    pub fn set_streams(&mut self, h: &Mat) -> Result<Streams, GpuError> {
        let cols = (self.shape.hidden * self.shape.streams) as usize;
        assert!(h.rows <= self.options.rows_max as usize && h.cols == cols, "{} rows of {}", h.rows, h.cols);
        let streams = Streams { draft: false, rows: h.rows as u32 };
        self.write_activations(self.streams_at(&streams), h)?;
        Ok(streams)
    }

    fn read<T: bytemuck::Pod>(&self, at: u64, count: usize) -> Result<Vec<T>, GpuError> {
        let mut out = vec![T::zeroed(); count];
        self.stream.read(at, bytemuck::cast_slice_mut(&mut out))?;
        Ok(out)
    }

    fn streams_at(&self, h: &Streams) -> u64 {
        if h.draft { self.work.draft.at() } else { self.work.trunk.at() }
    }

    /// No sums pass through the host.
    fn is_alone(&self) -> bool {
        self.options.solo || self.tp.size() == 1
    }

    /// Bytes of an activation.
    fn act_bytes(&self) -> u64 {
        self.numerics.act_bytes()
    }

    fn published(&self) -> bool {
        self.numerics == Numerics::Published
    }

    /// The whole of a buffer's first `rows * cols` activations.
    fn activation(&self, buffer: &Buffer, cols: u32) -> Activation {
        Activation { at: buffer.at(), rows: self.current.rows, cols, parts: 0 }
    }
}
