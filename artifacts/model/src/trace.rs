//! A backend that records instead of computing: which operations run and which tensors they touch.
//!
//! The packer writes sections in this order; the op contract prints it. That a partial sum is never
//! read before its all-reduce is checked by the types; the trace checks that operations returning
//! one, and only they, read a tensor cut along its input.

use std::convert::Infallible;

use crate::config::{Draft, ModelConfig};
use crate::forward::Model;
use crate::ops::{Backend, Done, Op, Projected, Site, weights};
use crate::tensors::{Block, LayerSpec, TensorId};

/// One recorded operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// Operation.
    pub op: Op,
    /// Block whose weights it reads.
    pub block: Block,
    /// Weights, in the order of [`weights`].
    pub tensors: Vec<TensorId>,
}

/// Records the calls of a forward pass.
#[derive(Default)]
pub struct Trace {
    calls: Vec<Call>,
}

impl Trace {
    /// The calls of a trunk step and, where the model has a multi-token-prediction block, a draft step.
    pub fn run(config: &ModelConfig) -> Vec<Call> {
        let model = Model::new(config);
        let mut trace = Trace::default();
        let Ok(()) = model.trunk(&mut trace);
        let Ok(()) = model.logits(&mut trace, &());
        if config.draft == Draft::Mtp {
            let Ok(()) = model.mtp(&mut trace, &());
            let Ok(()) = model.mtp_logits(&mut trace, &());
        }
        trace.calls
    }

    fn call(&mut self, op: Op, layer: &LayerSpec) -> Result<(), Infallible> {
        let tensors = weights(op, layer).into_iter().map(|kind| TensorId { block: layer.block, kind }).collect();
        self.calls.push(Call { op, block: layer.block, tensors });
        Ok(())
    }

    fn global(&mut self, op: Op, block: Block) -> Result<(), Infallible> {
        self.call(op, &LayerSpec { block, ratio: 0, hashed: false })
    }
}

impl Backend for Trace {
    type Act = ();
    type Partial = ();
    type Streams = ();
    type Mix = ();
    type Selection = ();
    type Routing = ();
    type Logits = ();
    type Error = Infallible;

    fn embed(&mut self) -> Result<(), Infallible> {
        self.global(Op::Embed, Block::Global)
    }
    fn all_reduce(&mut self, _part: ()) -> Result<(), Infallible> {
        self.global(Op::AllReduce, Block::Global)
    }
    fn expand(&mut self, _x: ()) -> Result<(), Infallible> {
        self.global(Op::Expand, Block::Global)
    }
    fn draft_input(&mut self, _embedded: (), _source: &(), block: Block) -> Result<(), Infallible> {
        self.global(Op::DraftInput, block)
    }
    fn hc_site(
        &mut self,
        _h: &mut (),
        _done: Option<Done<Self>>,
        l: &LayerSpec,
        site: Site,
    ) -> Result<((), ()), Infallible> {
        self.call(Op::HcSite(site), l)?;
        Ok(((), ()))
    }
    fn hc_finish(&mut self, _h: &mut (), _done: Done<Self>) -> Result<(), Infallible> {
        self.global(Op::HcFinish, Block::Global)
    }
    fn attn_inputs(&mut self, _x: &(), l: &LayerSpec) -> Result<Projected<()>, Infallible> {
        self.call(Op::AttnInputs, l)?;
        Ok(Projected { main: (), index: (l.ratio == 4).then_some(()) })
    }
    fn attn_queries(&mut self, _qr: &(), l: &LayerSpec) -> Result<Projected<()>, Infallible> {
        self.call(Op::AttnQueries, l)?;
        Ok(Projected { main: (), index: (l.ratio == 4).then_some(()) })
    }
    fn index_select(&mut self, _qi: &(), _weights: &(), l: &LayerSpec) -> Result<(), Infallible> {
        self.call(Op::IndexSelect, l)
    }
    fn attend(&mut self, _q: &(), _selected: Option<&()>, l: &LayerSpec) -> Result<(), Infallible> {
        self.call(Op::Attend, l)
    }
    fn attn_output(&mut self, _o: &(), l: &LayerSpec) -> Result<(), Infallible> {
        self.call(Op::AttnOutput, l)
    }
    fn route(&mut self, _x: &(), l: &LayerSpec) -> Result<(), Infallible> {
        self.call(Op::Route, l)
    }
    fn experts(&mut self, _x: &(), _routing: &(), l: &LayerSpec) -> Result<(), Infallible> {
        self.call(Op::Experts, l)
    }
    fn hc_head(&mut self, _h: &(), block: Block) -> Result<(), Infallible> {
        self.global(Op::HcHead, block)
    }
    fn logits(&mut self, _x: &()) -> Result<(), Infallible> {
        self.global(Op::Logits, Block::Global)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::partition::Partition;
    use crate::tensors::table;
    use std::collections::HashSet;

    fn nano() -> ModelConfig {
        ModelConfig::parse(include_str!("../../../tests/nano/config.json")).unwrap()
    }

    #[test]
    fn the_forward_pass_touches_every_tensor() {
        let touched: HashSet<TensorId> = Trace::run(&nano()).into_iter().flat_map(|c| c.tensors).collect();
        let all: HashSet<TensorId> = table(&nano()).into_iter().map(|r| r.id).collect();
        assert_eq!(touched, all);
    }

    #[test]
    fn partial_sums_come_from_cut_inputs_and_are_reduced() {
        let rows = table(&nano());
        let cut_input = |id: &TensorId| {
            let row = rows.iter().find(|r| r.id == *id).unwrap();
            // The embedding is cut by rows: tokens of other ranks are zero summands.
            matches!(row.partition, Partition::Split { dim, .. } if dim + 1 == row.shape.len() && dim > 0)
        };
        let calls = Trace::run(&nano());
        for (i, call) in calls.iter().enumerate() {
            let partial = matches!(call.op, Op::Embed | Op::AttnOutput | Op::Experts);
            assert_eq!(partial && call.op != Op::Embed, call.tensors.iter().any(cut_input), "{call:?}");
            assert_eq!(partial, calls.get(i + 1).is_some_and(|next| next.op == Op::AllReduce));
        }
    }
}
