//! The model, written once, generic over [`Backend`].

use crate::config::ModelConfig;
use crate::ops::{Backend, Done, Site};
use crate::tensors::{Block, LayerSpec, draft_stages, layers};

/// The structure that a forward pass follows.
#[derive(Clone, Debug)]
pub struct Model {
    layers: Vec<LayerSpec>,
    draft: Vec<LayerSpec>,
}

impl Model {
    /// The structure of `config`'s model.
    pub fn new(config: &ModelConfig) -> Model {
        Model { layers: layers(config), draft: draft_stages(config) }
    }

    /// Layers of the trunk, in order.
    pub fn layers(&self) -> &[LayerSpec] {
        &self.layers
    }

    /// Whether there is a multi-token-prediction block.
    pub fn has_mtp(&self) -> bool {
        self.draft.len() == 1
    }

    /// Runs the trunk over the current step: the streams after the last layer.
    pub fn trunk<B: Backend>(&self, b: &mut B) -> Result<B::Streams, B::Error> {
        let embedded = b.embed()?;
        let embedded = b.all_reduce(embedded)?;
        let mut h = b.expand(embedded)?;
        let mut done = None;
        for l in &self.layers {
            done = Some(layer(b, l, &mut h, done)?);
        }
        if let Some(done) = done {
            b.hc_finish(&mut h, done)?;
        }
        Ok(h)
    }

    /// Logits of the wanted rows from the trunk's streams.
    pub fn logits<B: Backend>(&self, b: &mut B, h: &B::Streams) -> Result<B::Logits, B::Error> {
        let x = b.hc_head(h, Block::Global)?;
        b.logits(&x)
    }

    /// Runs the multi-token-prediction block: row p reads `source` (trunk streams of position p, or its
    /// own streams when drafting deeper) and token p+1.
    ///
    /// Panics if the model has no such block.
    pub fn mtp<B: Backend>(&self, b: &mut B, source: &B::Streams) -> Result<B::Streams, B::Error> {
        let [l] = &self.draft[..] else { panic!("a model with one draft block, not {}", self.draft.len()) };
        let embedded = b.embed()?;
        let embedded = b.all_reduce(embedded)?;
        let mut h = b.draft_input(embedded, source, l.block)?;
        let done = layer(b, l, &mut h, None)?;
        b.hc_finish(&mut h, done)?;
        Ok(h)
    }

    /// Logits for token p+2 of the wanted rows from the draft block's streams.
    pub fn mtp_logits<B: Backend>(&self, b: &mut B, h: &B::Streams) -> Result<B::Logits, B::Error> {
        let x = b.hc_head(h, Block::Draft(0))?;
        b.logits(&x)
    }
}

/// One layer: attention, then experts; the streams are brought up to date by whatever comes next.
pub fn layer<B: Backend>(
    b: &mut B,
    l: &LayerSpec,
    h: &mut B::Streams,
    done: Option<Done<B>>,
) -> Result<Done<B>, B::Error> {
    let (x, mix) = b.hc_site(h, done, l, Site::Attn)?;
    let y = attention(b, l, &x)?;
    let (x, mix) = b.hc_site(h, Some(Done { y, mix }), l, Site::Ffn)?;
    let routing = b.route(&x, l)?;
    let y = b.experts(&x, &routing, l)?;
    let y = b.all_reduce(y)?;
    Ok(Done { y, mix })
}

fn attention<B: Backend>(b: &mut B, l: &LayerSpec, x: &B::Act) -> Result<B::Act, B::Error> {
    let inputs = b.attn_inputs(x, l)?;
    let queries = b.attn_queries(&inputs.main, l)?;
    let selected = match (&queries.index, &inputs.index) {
        (Some(qi), Some(weights)) => Some(b.index_select(qi, weights, l)?),
        _ => None,
    };
    let o = b.attend(&queries.main, selected.as_ref(), l)?;
    let y = b.attn_output(&o, l)?;
    b.all_reduce(y)
}
