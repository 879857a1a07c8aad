//! The CPU backend: the numbers we believe, and a product feature where there is no GPU.
//!
//! One `Reference` is one rank. It holds the weights, the caches of every sequence slot and the
//! current step; [`dsv4_model::forward`] drives it. A row's result never depends on which other rows
//! share the step: every sum has a fixed order.

mod forward;

use std::sync::Mutex;

use dsv4_model::layout::TILE;
use dsv4_model::ops::{Site, Step};
use dsv4_model::tensors::{Block, LayerSpec};
use dsv4_model::{Kind, ModelConfig, TensorId, Tp};

use crate::collective::{Collective, CollectiveError};
use crate::numerics::{Numerics, fake_fp4, fake_fp8, hadamard};
use crate::ops::dense_gemm::matmul;
use crate::ops::hyper_connection::HcParams;
use crate::ops::rms_norm::rms_norm;
use crate::ops::rope::{Rope, rotate};
use crate::ops::{Mat, compressor, for_chunks};
use crate::simd;
use crate::state::{Compressed, LayerState, SequenceState};
use crate::weights::Weights;

/// Channels under one scale of the stored window rows and entries.
const KV_GROUP: usize = 64;

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
pub enum ReferenceError {
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

/// Intermediate results by name, for comparison with goldens: called with (name, columns, values).
pub type Tap = Box<dyn FnMut(&str, usize, &[f32]) + Send + Sync>;

/// Residual streams `[rows, M*D]`.
#[derive(Clone, Debug)]
pub struct Streams(pub Mat);

/// A rank's summand `[rows, D]`.
pub struct Partial(Mat);

/// Experts of every row and their weights.
pub struct Routing {
    chosen: Vec<Vec<u32>>,
    weights: Vec<Vec<f32>>,
}

/// The current step, with what its positions imply.
#[derive(Default)]
struct Current {
    step: Step,
    /// Sequence slot and position of every row.
    rows: Vec<(usize, usize)>,
    /// Rotations of every row: window-only layers, compressed layers.
    turns: [Vec<Vec<(f32, f32)>>; 2],
}

/// One rank of the model on the CPU.
pub struct Reference {
    config: ModelConfig,
    tp: Tp,
    numerics: Numerics,
    weights: Weights,
    /// Never locked: the mutex makes the backend shareable while rows run in parallel.
    collective: Mutex<Box<dyn Collective>>,
    rope: [Rope; 2],
    slots: Vec<Option<SequenceState>>,
    rows_max: usize,
    current: Current,
    tap: Option<Tap>,
    /// The sublayer that runs, for the tap.
    site: Option<(Block, Site)>,
}

impl Reference {
    /// A rank of `config`'s model over loaded `weights`.
    ///
    /// `rows_max` bounds the rows of one sequence in a step, `slots` the sequences.
    pub fn new(
        config: ModelConfig,
        tp: Tp,
        numerics: Numerics,
        weights: Weights,
        collective: Box<dyn Collective>,
        slots: usize,
        rows_max: usize,
    ) -> Reference {
        assert_eq!((collective.rank(), collective.size()), (tp.rank(), tp.size()), "rank of the collective");
        let rope = [Rope::new(&config, false), Rope::new(&config, true)];
        let slots = (0..slots).map(|_| None).collect();
        let current = Current::default();
        let collective = Mutex::new(collective);
        Reference { config, tp, numerics, weights, collective, rope, slots, rows_max, current, tap: None, site: None }
    }

    /// The model's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Calls `tap` with intermediate results from now on.
    pub fn set_tap(&mut self, tap: Option<Tap>) {
        self.tap = tap;
    }

    /// Starts an empty sequence in `slot`. Errors: no such slot.
    pub fn open(&mut self, slot: u32) -> Result<(), ReferenceError> {
        self.check_slot(slot)?;
        let new = |l: &LayerSpec| LayerState::new(&self.config, l, self.rows_max);
        let layers = dsv4_model::tensors::layers(&self.config).iter().map(new).collect();
        let draft = dsv4_model::tensors::draft_stages(&self.config).iter().map(new).collect();
        self.slots[slot as usize] = Some(SequenceState { layers, length: 0, draft, draft_length: 0 });
        Ok(())
    }

    /// Forgets the sequence in `slot`. Errors: no such slot.
    pub fn close(&mut self, slot: u32) -> Result<(), ReferenceError> {
        self.check_slot(slot)?;
        self.slots[slot as usize] = None;
        Ok(())
    }

    fn check_slot(&self, slot: u32) -> Result<(), ReferenceError> {
        require((slot as usize) < self.slots.len(), || (format!("a slot below {}", self.slots.len()), slot.to_string()))
    }

    /// Sets the step that the next operations work on; `source` are the streams a draft step continues.
    ///
    /// Errors: slots that are not open or named twice, too many rows, a gap before a segment, rows, tokens or
    /// positions out of range.
    pub fn begin(&mut self, step: Step, source: Option<&Streams>) -> Result<(), ReferenceError> {
        let context = self.config.max_position_embeddings;
        let mut rows = Vec::with_capacity(step.tokens.len());
        for s in &step.segments {
            self.check_slot(s.slot)?;
            require(self.slots[s.slot as usize].is_some(), || ("an open slot".into(), s.slot.to_string()))?;
            let most = format!("at most {} rows of a sequence", self.rows_max);
            require(s.rows as usize <= self.rows_max, || (most, s.rows.to_string()))?;
            let end = u64::from(s.start) + u64::from(s.rows);
            require(end <= context, || (format!("positions below {context}"), end.to_string()))?;
            let twice = step.segments.iter().filter(|other| other.slot == s.slot).count() > 1;
            require(!twice, || ("one segment per slot".into(), format!("slot {} twice", s.slot)))?;
            let state = self.slots[s.slot as usize].as_ref();
            let filled = state.map_or(0, |q| if source.is_some() { q.draft_length } else { q.length });
            require(s.start as usize <= filled, || (format!("a start up to {filled}"), s.start.to_string()))?;
            rows.extend((s.start..s.start + s.rows).map(|p| (s.slot as usize, p as usize)));
        }
        let (count, tokens) = (rows.len(), step.tokens.len());
        require(count == tokens, || (format!("a token for each of {count} rows"), tokens.to_string()))?;
        let below = |list: &[u32], limit: u64, what: &str| match list.iter().find(|v| u64::from(**v) >= limit) {
            Some(found) => require(false, || (format!("{what} below {limit}"), found.to_string())),
            None => Ok(()),
        };
        below(&step.tokens, self.config.vocab_size, "token ids")?;
        below(&step.logits, count as u64, "wanted rows")?;
        let ascending = step.logits.windows(2).all(|pair| pair[0] < pair[1]);
        require(ascending, || ("wanted rows in ascending order".into(), format!("{:?}", step.logits)))?;
        if let Some(source) = source {
            let named = step.source.len();
            require(count == named, || (format!("a source for each of {count} rows"), named.to_string()))?;
            below(&step.source, source.0.rows as u64, "source rows")?;
        }
        for s in &step.segments {
            if let Some(state) = self.slots[s.slot as usize].as_mut() {
                let length = if source.is_some() { &mut state.draft_length } else { &mut state.length };
                *length = (s.start + s.rows) as usize;
            }
        }
        let turns = [0, 1].map(|i| rows.iter().map(|(_, p)| self.rope[i].at(*p as u32)).collect());
        self.current = Current { step, rows, turns };
        Ok(())
    }

    /// The caches of the sequence in `slot`.
    pub fn sequence(&self, slot: u32) -> Option<&SequenceState> {
        self.slots[slot as usize].as_ref()
    }

    fn exchange(&mut self) -> &mut dyn Collective {
        // A poisoned lock cannot be: nobody locks.
        self.collective.get_mut().unwrap_or_else(|p| p.into_inner()).as_mut()
    }

    fn rows(&self) -> usize {
        self.current.rows.len()
    }

    fn published(&self) -> bool {
        self.numerics == Numerics::Published
    }

    /// Rounds to the activation format: bfloat16 as published.
    fn round(&self, mut x: Mat) -> Mat {
        self.round_all(&mut x.data);
        x
    }

    fn round_all(&self, x: &mut [f32]) {
        if self.published() {
            simd::round_bf16(x);
        }
    }

    fn tap(&mut self, block: Block, name: &str, x: &Mat) {
        self.tap_values(block, name, x.cols, &x.data);
    }

    fn tap_values(&mut self, block: Block, name: &str, cols: usize, values: &[f32]) {
        if let Some(tap) = &mut self.tap {
            tap(&format!("{block}.{name}"), cols, values);
        }
    }

    /// An activation on its way into FP8 or FP4 weights.
    fn quantised(&self, x: &Mat) -> Option<Mat> {
        self.published().then(|| {
            let mut x = x.clone();
            let cols = x.cols;
            for_chunks(&mut x.data, cols, 8 * x.rows * cols, |_, row| fake_fp8(row, TILE as usize));
            x
        })
    }

    /// `x` times a quantised weight, unrounded.
    fn linear_sum(&self, x: &Mat, block: Block, kind: Kind, index: usize) -> Mat {
        let w = self.weights.matrix(TensorId { block, kind }, index);
        matmul(self.quantised(x).as_ref().unwrap_or(x), w)
    }

    /// `x` times a quantised weight, rounded to the activation format.
    fn linear(&self, x: &Mat, block: Block, kind: Kind) -> Mat {
        self.round(self.linear_sum(x, block, kind, 0))
    }

    /// `x` times a BF16 or F32 weight, unrounded.
    fn plain(&self, x: &Mat, block: Block, kind: Kind) -> Mat {
        matmul(x, self.weights.matrix(TensorId { block, kind }, 0))
    }

    fn norm(&self, mut x: Mat, block: Block, kind: Kind) -> Mat {
        let (w, eps, cols) = (self.weights.small(block, kind), self.config.rms_norm_eps, x.cols);
        for row in x.data.chunks_exact_mut(cols) {
            rms_norm(row, w, eps);
        }
        self.round(x)
    }

    fn hc_params(&self) -> HcParams {
        HcParams {
            streams: self.config.hc_mult as usize,
            sinkhorn_iters: self.config.hc_sinkhorn_iters as usize,
            hc_eps: self.config.hc_eps,
            rms_eps: self.config.rms_norm_eps,
        }
    }

    fn turns(&self, layer: &LayerSpec) -> &[Vec<(f32, f32)>] {
        &self.current.turns[usize::from(layer.ratio != 0)]
    }

    /// FP8 rounding of a stored row: the channels that are not rotated.
    fn kv_round(&self, row: &mut [f32]) {
        if self.published() {
            let plain = row.len() - self.config.qk_rope_head_dim as usize;
            fake_fp8(&mut row[..plain], KV_GROUP);
            self.round_all(&mut row[..plain]);
        }
    }

    /// The indexer's rounding of queries and entries: Hadamard, then FP4.
    fn index_round(&self, row: &mut [f32]) {
        if self.published() {
            hadamard(row);
            self.round_all(row);
            fake_fp4(row);
            self.round_all(row);
        }
    }

    fn layer_state(&mut self, slot: usize, block: Block) -> &mut LayerState {
        let state = self.slots[slot].as_mut().expect("begin checked that the slot is open");
        match block {
            Block::Layer(i) => &mut state.layers[i as usize],
            Block::Draft(s) => &mut state.draft[s as usize],
            Block::Global => panic!("the global block has no caches"),
        }
    }

    fn layer_state_ref(&self, slot: usize, block: Block) -> &LayerState {
        let state = self.slots[slot].as_ref().expect("begin checked that the slot is open");
        match block {
            Block::Layer(i) => &state.layers[i as usize],
            Block::Draft(s) => &state.draft[s as usize],
            Block::Global => panic!("the global block has no caches"),
        }
    }

    /// Entries a query at `position` sees.
    fn visible(layer: &LayerSpec, position: usize) -> usize {
        if layer.ratio == 0 { 0 } else { (position + 1) / layer.ratio as usize }
    }

    /// Stores compressor projections of the step's rows and closes the windows that they fill.
    ///
    /// `values`, `gates`: `[rows, c*width]`. Returns the new entries, `[entries, width]`.
    fn compress(&mut self, layer: &LayerSpec, indexer: bool, values: &Mat, gates: &Mat) -> Mat {
        let ratio = layer.ratio as usize;
        let (ape, norm) = match indexer {
            true => (Kind::IndexerApe, Kind::IndexerNorm),
            false => (Kind::CompressorApe, Kind::CompressorNorm),
        };
        let ape = self.weights.small(layer.block, ape).to_vec();
        let rows = std::mem::take(&mut self.current.rows);
        let mut closed: Vec<(usize, usize)> = Vec::new();
        for (r, (slot, position)) in rows.iter().enumerate() {
            let state = compressed_mut(self.layer_state(*slot, layer.block), indexer);
            state.values.row_mut(*position).copy_from_slice(values.row(r));
            let bias = &ape[position % ratio * gates.cols..][..gates.cols];
            let row = state.gates.row_mut(*position);
            row.iter_mut().zip(gates.row(r)).zip(bias).for_each(|((o, g), b)| *o = g + b);
            // Entries from here on belong to a continuation that this step replaces.
            state.entries.truncate(position / ratio * state.width);
            if (position + 1) % ratio == 0 {
                closed.push((*slot, position + 1));
                let width = state.width;
                state.entries.resize(state.entries.len() + width, 0.0);
            }
        }
        self.current.rows = rows;
        let width = values.cols / if ratio == 4 { 2 } else { 1 };
        let mut new = Mat::zeros(closed.len(), width);
        let this = &*self;
        let work = closed.len() * width * ratio * 16;
        for_chunks(&mut new.data, width, work, |i, out| {
            let (slot, end) = closed[i];
            let state = compressed_ref(this.layer_state_ref(slot, layer.block), indexer);
            compressor::pool(state, end, ratio, out);
            this.round_all(out);
            rms_norm(out, this.weights.small(layer.block, norm), this.config.rms_norm_eps);
            this.round_all(out);
            rotate(out, &this.rope[1].at((end - ratio) as u32));
            this.round_all(out);
            if indexer { this.index_round(out) } else { this.kv_round(out) }
        });
        for (i, (slot, end)) in closed.iter().enumerate() {
            let state = compressed_mut(self.layer_state(*slot, layer.block), indexer);
            let at = (end / ratio - 1) * width;
            state.entries[at..at + width].copy_from_slice(new.row(i));
        }
        new
    }
}

fn require(holds: bool, or: impl FnOnce() -> (String, String)) -> Result<(), ReferenceError> {
    if holds {
        return Ok(());
    }
    let (expected, found) = or();
    Err(ReferenceError::Step { expected, found })
}

fn compressed_mut(state: &mut LayerState, indexer: bool) -> &mut Compressed {
    let cache = if indexer { &mut state.index } else { &mut state.compressed };
    cache.as_mut().expect("layers with a compressor have its cache")
}

fn compressed_ref(state: &LayerState, indexer: bool) -> &Compressed {
    let cache = if indexer { &state.index } else { &state.compressed };
    cache.as_ref().expect("layers with a compressor have its cache")
}
