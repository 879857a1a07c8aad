//! Sizes of a rank, as kernels count them, and which of them there are kernels for.

use std::fmt::Debug;

use dsv4_model::cache::PAGE_TOKENS;
use dsv4_model::layout::Format;
use dsv4_model::tensors::{draft_stages, layers};
use dsv4_model::{ModelConfig, Tp};

use crate::gpu::state;
use crate::numerics::Numerics;
use crate::ops::dense_gemm::gemv::Gemv;
use crate::ops::hyper_connection::HcShape;
use crate::ops::moe_gemm::decode::Experts;
use crate::ops::moe_gemm::prefill::MoeSizes;
use crate::ops::{indexer, kv, router, sparse_attention};
use crate::tuning::Tuning;

/// Sizes of a rank, as kernels count them.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Model width.
    pub hidden: u32,
    /// Residual streams.
    pub streams: u32,
    /// Query heads of this rank.
    pub heads: u32,
    /// Channels of a head.
    pub head_dim: u32,
    /// Rotated channels.
    pub rope: u32,
    /// Width of the low-rank query.
    pub q_rank: u32,
    /// Output groups of this rank.
    pub groups: u32,
    /// Width of a group's low-rank output.
    pub o_rank: u32,
    /// Positions of the window.
    pub window: u32,
    /// Index heads.
    pub index_heads: u32,
    /// Channels of an index head.
    pub index_dim: u32,
    /// Entries that are selected.
    pub topk: u32,
    /// Routed experts.
    pub experts: u32,
    /// Experts of a row.
    pub chosen: u32,
    /// This rank's part of an expert's width.
    pub inner: u32,
    /// Tokens of this rank's part of embedding and head.
    pub vocab: u32,
}

/// A model, or a tuning table for it, that there are no kernels for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "GPU kernels: {fields}: expected {expected}, found {found}\n  help: this model runs on the CPU: pack it with --arch none"
)]
pub struct ShapeError {
    /// Fields of config.json, or of a tuning table.
    pub fields: &'static str,
    /// What there are kernels for.
    pub expected: String,
    /// What it is.
    pub found: String,
}

impl Shape {
    /// Checks that there are kernels for every operation of the model: where there are not, [`Shape::new`],
    /// [`Kernels::walk`](crate::gpu::kernels::Kernels::walk) and steps panic.
    ///
    /// Errors: the first size that is out of what kernels are written for.
    pub fn check(config: &ModelConfig, tp: Tp, numerics: Numerics, tuning: &Tuning) -> Result<(), ShapeError> {
        let require = |holds: bool, fields, expected: &str, found: &dyn Debug| match holds {
            true => Ok(()),
            false => Err(ShapeError { fields, expected: expected.into(), found: format!("{found:?}") }),
        };
        let size = u64::from(tp.size());
        let divided = [config.num_attention_heads, config.o_groups, config.moe_intermediate_size, config.vocab_size];
        require(
            divided.iter().all(|n| n.is_multiple_of(size)),
            "num_attention_heads, o_groups, moe_intermediate_size, vocab_size",
            &format!("multiples of {size} ranks"),
            &divided,
        )?;
        let hc = hc_shape(config);
        require(
            hc.is_possible(),
            "hc_mult, hidden_size",
            "2 or 4 streams of a multiple of 64",
            &(hc.streams, hc.hidden),
        )?;
        let s = Shape::new(config, tp);
        let (drafts, trunk) = (draft_stages(config), layers(config));
        for ratio in trunk.iter().chain(&drafts).map(|layer| layer.ratio) {
            let (attention, prepare) = (s.attention(ratio), s.prepare(ratio));
            require(
                attention.are_possible(),
                "head_dim, qk_rope_head_dim, sliding_window",
                "heads of a multiple of 64 channels up to 512, a window of a multiple of 32",
                &(s.head_dim, s.rope, s.window),
            )?;
            require(
                prepare.are_possible(),
                "q_lora_rank, head_dim, index_head_dim, qk_rope_head_dim, compress_ratios",
                "multiples of 64, the last no wider than those before, and heads that divide 1024 for windows of 128",
                &(s.q_rank, s.head_dim, s.index_dim, s.rope, ratio),
            )?;
            require(
                ratio != 4 || s.indexer().are_possible(numerics),
                "index_n_heads, index_head_dim, index_topk",
                "heads that fit 48 KB together, at most 2048 entries",
                &(s.index_heads, s.index_dim, s.topk),
            )?;
        }
        require(
            router::is_possible(s.hidden as usize, s.experts as usize, s.chosen as usize),
            "n_routed_experts, num_experts_per_tok",
            "at most 1024 experts, of which at most 32 are chosen",
            &(s.experts, s.chosen),
        )?;
        let experts = Experts { hidden: s.hidden, inner: s.inner, chosen: s.chosen };
        require(
            experts.are_possible() && tuning.moe(experts, 1).legal(experts, 1, numerics),
            "hidden_size, moe_intermediate_size, num_experts_per_tok, moe",
            "a rank's experts of a multiple of 64, a row of which fits a block",
            &(experts, tuning.moe(experts, 1)),
        )?;
        let widest = s.hidden.max(s.q_rank).max(s.groups * s.o_rank).max(s.heads * s.head_dim / s.groups.max(1));
        let formats = [Format::F32, Format::Bf16, Format::Fp8];
        require(
            formats.into_iter().all(|format| Gemv::fits(1, tuning.gemv(1), numerics, format, widest)),
            "hidden_size, o_groups, o_lora_rank, head_dim, gemv",
            "rows of activations of which one fits a block",
            &(widest, tuning.gemv(1)),
        )
    }

    /// Sizes of `tp`'s rank.
    pub fn new(config: &ModelConfig, tp: Tp) -> Shape {
        let size = u64::from(tp.size());
        Shape {
            hidden: config.hidden_size as u32,
            streams: config.hc_mult as u32,
            heads: (config.num_attention_heads / size) as u32,
            head_dim: config.head_dim as u32,
            rope: config.qk_rope_head_dim as u32,
            q_rank: config.q_lora_rank as u32,
            groups: (config.o_groups / size) as u32,
            o_rank: config.o_lora_rank as u32,
            window: config.sliding_window as u32,
            index_heads: config.index_n_heads as u32,
            index_dim: config.index_head_dim as u32,
            topk: config.index_topk as u32,
            experts: config.n_routed_experts as u32,
            chosen: config.num_experts_per_tok as u32,
            inner: (config.moe_intermediate_size / size) as u32,
            vocab: (config.vocab_size / size) as u32,
        }
    }

    /// Attention over entries of `ratio` positions.
    pub fn attention(&self, ratio: u32) -> sparse_attention::Sizes {
        sparse_attention::Sizes {
            heads: self.heads,
            head_dim: self.head_dim,
            rope: self.rope,
            window: self.window,
            capacity: state::window_capacity(self.window),
            ratio,
            topk: self.topk,
            per_page: per_page(ratio),
        }
    }

    /// What precedes attention over entries of `ratio` positions.
    pub fn prepare(&self, ratio: u32) -> kv::Sizes {
        kv::Sizes {
            ratio,
            query_rank: self.q_rank,
            head_dim: self.head_dim,
            rope: self.rope,
            index_dim: self.index_dim,
            window: self.window,
            capacity: state::window_capacity(self.window),
            compressor_capacity: state::compressor_capacity(ratio),
            per_page: per_page(ratio),
        }
    }

    /// The indexer.
    pub fn indexer(&self) -> indexer::Sizes {
        indexer::Sizes {
            heads: self.index_heads,
            width: self.index_dim,
            rope: self.rope,
            topk: self.topk,
            ratio: 4,
            per_page: per_page(4),
        }
    }

    /// The experts of long steps.
    pub fn moe_sizes(&self) -> MoeSizes {
        MoeSizes { hidden: self.hidden, inner: self.inner, experts: self.experts, top_k: self.chosen }
    }
}

/// Hyper-connections of a model.
pub fn hc_shape(config: &ModelConfig) -> HcShape {
    HcShape {
        hidden: config.hidden_size as u32,
        streams: config.hc_mult as u32,
        sinkhorn_iters: config.hc_sinkhorn_iters as u32,
    }
}

/// Entries of a page.
pub fn per_page(ratio: u32) -> u32 {
    (PAGE_TOKENS as u32).checked_div(ratio).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLASH: &str = include_str!("../../../tests/golden/flash_config.json");

    fn with(field: &str, value: &str) -> ModelConfig {
        let (before, rest) = FLASH.split_once(&format!("\"{field}\":")).expect("a field");
        let after = &rest[rest.find([',', '}']).expect("an end")..];
        ModelConfig::parse(&format!("{before}\"{field}\": {value}{after}")).unwrap_or_else(|e| panic!("{e}"))
    }

    /// What the description of the model allows and no kernel is written for is an error before anything is compiled.
    #[test]
    fn models_without_kernels_are_refused() {
        let tuning = Tuning::untuned("sm_121a");
        let check = |config: &ModelConfig, ranks| {
            let check = |numerics| Shape::check(config, Tp::new(0, ranks).unwrap(), numerics, &tuning);
            check(Numerics::Published).and(check(Numerics::Float))
        };
        for ranks in [1, 2, 4, 8] {
            assert_eq!(check(&ModelConfig::parse(FLASH).unwrap(), ranks), Ok(()));
        }
        assert_eq!(check(&with("hc_mult", "2"), 2), Ok(()));
        for (field, value) in [
            ("hc_mult", "1"),
            ("hc_mult", "3"),
            ("hc_mult", "8"),
            ("head_dim", "1024"),
            ("head_dim", "384"),
            ("sliding_window", "100"),
            ("index_topk", "4096"),
            ("num_experts_per_tok", "40"),
            ("n_routed_experts", "2048"),
            ("hidden_size", "65536"),
        ] {
            let error = check(&with(field, value), 2).unwrap_err().to_string();
            assert!(error.contains(field) && error.contains("--arch none"), "{field} {value}: {error}");
        }
    }
}
