//! config.json -> [`ModelConfig`]; refuses, by the name of the field, any other model.

use serde_json::{Map, Value};

use crate::error::ModelError;
use crate::layout::{FP4_GROUP, TILE};

/// YaRN scaling of the rotary table of compressed layers.
#[derive(Clone, Debug, PartialEq)]
pub struct Yarn {
    /// Context extension factor.
    pub factor: f32,
    /// Context length of pretraining, tokens.
    pub original_max_position_embeddings: u64,
    /// Rotations above which a channel keeps its frequency.
    pub beta_fast: f64,
    /// Rotations below which a channel is slowed by the whole factor.
    pub beta_slow: f64,
}

/// The drafter that comes with the checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub enum Draft {
    /// No drafter.
    None,
    /// One multi-token-prediction block (first release).
    Mtp,
    /// A block drafter (0731).
    DSpark {
        /// Number of draft stages.
        stages: u32,
        /// Tokens drafted at once.
        block_size: u64,
        /// Token that fills the undrafted positions.
        noise_token_id: u64,
        /// Layers whose outputs feed the drafter.
        target_layer_ids: Vec<u32>,
        /// Rank of the Markov head.
        markov_rank: u64,
    },
}

/// Checked sizes of one DeepSeek-V4 model. Field names are those of config.json.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub struct ModelConfig {
    pub vocab_size: u64,
    pub hidden_size: u64,
    pub num_hidden_layers: u32,
    pub num_hash_layers: u32,
    pub num_attention_heads: u64,
    pub head_dim: u64,
    pub qk_rope_head_dim: u64,
    pub q_lora_rank: u64,
    pub o_groups: u64,
    pub o_lora_rank: u64,
    pub index_n_heads: u64,
    pub index_head_dim: u64,
    pub index_topk: u64,
    pub sliding_window: u64,
    pub moe_intermediate_size: u64,
    pub n_routed_experts: u64,
    pub num_experts_per_tok: u64,
    pub routed_scaling_factor: f32,
    /// Clamp of the expert activations; 0 means none.
    pub swiglu_limit: f32,
    pub hc_mult: u64,
    pub hc_sinkhorn_iters: u64,
    pub hc_eps: f32,
    pub rms_norm_eps: f32,
    pub rope_theta: f64,
    pub compress_rope_theta: f64,
    pub yarn: Yarn,
    pub max_position_embeddings: u64,
    /// One entry per trunk layer, then one per draft stage: 0, 4 or 128.
    pub compress_ratios: Vec<u32>,
    pub bos_token_id: u64,
    pub eos_token_id: u64,
    pub draft: Draft,
}

/// Reads fields of one JSON object and reports them by their full name.
struct Fields<'a> {
    prefix: &'static str,
    map: &'a Map<String, Value>,
}

fn wrong(field: impl Into<String>, expected: impl Into<String>, found: impl Into<String>) -> ModelError {
    ModelError::Field { field: field.into(), expected: expected.into(), found: found.into() }
}

fn shown(value: Option<&Value>) -> String {
    let text = value.map_or("nothing".to_owned(), Value::to_string);
    if text.chars().count() > 60 { text.chars().take(57).collect::<String>() + "..." } else { text }
}

impl Fields<'_> {
    fn name(&self, field: &str) -> String {
        format!("{}{field}", self.prefix)
    }

    fn int(&self, field: &str, low: u64, high: u64) -> Result<u64, ModelError> {
        let value = self.map.get(field);
        match value.and_then(Value::as_u64) {
            Some(n) if (low..=high).contains(&n) => Ok(n),
            _ => Err(wrong(self.name(field), format!("an integer in {low}..={high}"), shown(value))),
        }
    }

    fn float(&self, field: &str, low: f64, high: f64) -> Result<f64, ModelError> {
        let value = self.map.get(field);
        match value.and_then(Value::as_f64) {
            Some(n) if n.is_finite() && (low..=high).contains(&n) => Ok(n),
            _ => Err(wrong(self.name(field), format!("a number in {low}..={high}"), shown(value))),
        }
    }

    fn exactly(&self, field: &str, expected: Value) -> Result<(), ModelError> {
        match self.map.get(field) {
            Some(found) if *found == expected => Ok(()),
            found => Err(wrong(self.name(field), expected.to_string(), shown(found))),
        }
    }

    fn exactly_if_present(&self, field: &str, expected: Value) -> Result<(), ModelError> {
        if self.map.contains_key(field) { self.exactly(field, expected) } else { Ok(()) }
    }

    /// Refuses fields whose meaning is not known here.
    fn only(&self, known: &[&str]) -> Result<(), ModelError> {
        match self.map.iter().find(|(name, _)| !known.contains(&name.as_str())) {
            Some((name, value)) => Err(wrong(self.name(name), "no such field", shown(Some(value)))),
            None => Ok(()),
        }
    }

    fn object(&self, field: &str, prefix: &'static str) -> Result<Fields<'_>, ModelError> {
        match self.map.get(field) {
            Some(Value::Object(map)) => Ok(Fields { prefix, map }),
            found => Err(wrong(self.name(field), "an object", shown(found))),
        }
    }

    fn ints(&self, field: &str, high: u64) -> Result<Vec<u32>, ModelError> {
        let found = self.map.get(field);
        let parse = |v: &Value| v.as_u64().filter(|n| *n <= high && *n <= u64::from(u32::MAX)).map(|n| n as u32);
        found
            .and_then(Value::as_array)
            .filter(|list| list.len() <= 1024)
            .and_then(|list| list.iter().map(parse).collect())
            .ok_or_else(|| wrong(self.name(field), format!("a list of integers up to {high}"), shown(found)))
    }
}

fn multiple(field: &str, value: u64, of: u64) -> Result<(), ModelError> {
    if value.is_multiple_of(of) { Ok(()) } else { Err(wrong(field, format!("a multiple of {of}"), value.to_string())) }
}

impl ModelConfig {
    /// Parses and checks the text of a config.json.
    ///
    /// Errors: [`ModelError::Json`], or [`ModelError::Field`] naming the first field that is
    /// missing, out of range, or does not belong to a DeepSeek-V4 model.
    pub fn parse(text: &str) -> Result<ModelConfig, ModelError> {
        let root: Value = serde_json::from_str(text).map_err(|source| ModelError::Json { source })?;
        let Value::Object(map) = &root else {
            return Err(wrong("(root)", "an object", shown(Some(&root))));
        };
        let f = Fields { prefix: "", map };
        f.exactly("model_type", "deepseek_v4".into())?;
        f.exactly("num_key_value_heads", 1.into())?;
        f.exactly("n_shared_experts", 1.into())?;
        f.exactly("scoring_func", "sqrtsoftplus".into())?;
        f.exactly("topk_method", "noaux_tc".into())?;
        f.exactly("norm_topk_prob", true.into())?;
        f.exactly("hidden_act", "silu".into())?;
        f.exactly_if_present("tie_word_embeddings", false.into())?;
        f.exactly_if_present("attention_bias", false.into())?;
        f.exactly_if_present("expert_dtype", "fp4".into())?;
        // Fields of neighbouring models: with another value they would mean another computation.
        f.exactly_if_present("mlp_bias", false.into())?;
        f.exactly_if_present("n_group", 1.into())?;
        f.exactly_if_present("topk_group", 1.into())?;
        let quant = f.object("quantization_config", "quantization_config.")?;
        quant.only(&["quant_method", "fmt", "scale_fmt", "weight_block_size", "activation_scheme"])?;
        quant.exactly_if_present("activation_scheme", "dynamic".into())?;
        quant.exactly("quant_method", "fp8".into())?;
        quant.exactly("fmt", "e4m3".into())?;
        quant.exactly("scale_fmt", "ue8m0".into())?;
        quant.exactly("weight_block_size", vec![TILE, TILE].into())?;
        let scaling = f.object("rope_scaling", "rope_scaling.")?;
        scaling.only(&["type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"])?;
        scaling.exactly("type", "yarn".into())?;

        let layers = f.int("num_hidden_layers", 1, 512)? as u32;
        let compress_ratios = f.ints("compress_ratios", 128)?;
        let config = ModelConfig {
            vocab_size: f.int("vocab_size", 16, 1 << 22)?,
            hidden_size: f.int("hidden_size", 128, 1 << 16)?,
            num_hidden_layers: layers,
            num_hash_layers: f.int("num_hash_layers", 0, u64::from(layers))? as u32,
            num_attention_heads: f.int("num_attention_heads", 1, 1024)?,
            head_dim: f.int("head_dim", 64, 4096)?,
            qk_rope_head_dim: f.int("qk_rope_head_dim", 2, 1024)?,
            q_lora_rank: f.int("q_lora_rank", 128, 1 << 16)?,
            o_groups: f.int("o_groups", 1, 1024)?,
            o_lora_rank: f.int("o_lora_rank", 1, 1 << 16)?,
            index_n_heads: f.int("index_n_heads", 1, 1024)?,
            index_head_dim: f.int("index_head_dim", 32, 1024)?,
            index_topk: f.int("index_topk", 1, 1 << 20)?,
            sliding_window: f.int("sliding_window", 1, 1 << 16)?,
            moe_intermediate_size: f.int("moe_intermediate_size", 128, 1 << 16)?,
            n_routed_experts: f.int("n_routed_experts", 1, 1 << 14)?,
            num_experts_per_tok: f.int("num_experts_per_tok", 1, 64)?,
            routed_scaling_factor: f.float("routed_scaling_factor", 1e-6, 1e6)? as f32,
            swiglu_limit: f.float("swiglu_limit", 0.0, 1e6)? as f32,
            hc_mult: f.int("hc_mult", 1, 16)?,
            hc_sinkhorn_iters: f.int("hc_sinkhorn_iters", 1, 1000)?,
            hc_eps: f.float("hc_eps", 0.0, 1.0)? as f32,
            rms_norm_eps: f.float("rms_norm_eps", 0.0, 1.0)? as f32,
            rope_theta: f.float("rope_theta", 1.0, 1e12)?,
            compress_rope_theta: f.float("compress_rope_theta", 1.0, 1e12)?,
            yarn: Yarn {
                factor: scaling.float("factor", 1.0, 1e6)? as f32,
                original_max_position_embeddings: scaling.int("original_max_position_embeddings", 1, 1 << 32)?,
                beta_fast: scaling.float("beta_fast", 1e-3, 1e6)?,
                beta_slow: scaling.float("beta_slow", 1e-3, 1e6)?,
            },
            max_position_embeddings: f.int("max_position_embeddings", 1, 1 << 24)?,
            bos_token_id: f.int("bos_token_id", 0, 1 << 22)?,
            eos_token_id: f.int("eos_token_id", 0, 1 << 22)?,
            draft: draft(&f, layers, compress_ratios.len())?,
            compress_ratios,
        };
        config.check()?;
        Ok(config)
    }

    /// Relations between fields that the arithmetic relies on.
    fn check(&self) -> Result<(), ModelError> {
        let stages = self.draft_stages();
        let entries = self.num_hidden_layers as usize + stages as usize;
        if self.compress_ratios.len() != entries {
            let expected = format!("{entries} entries ({} layers and {stages} draft stages)", self.num_hidden_layers);
            return Err(wrong("compress_ratios", expected, format!("{} entries", self.compress_ratios.len())));
        }
        for (i, r) in self.compress_ratios.iter().enumerate() {
            let allowed = if i < self.num_hidden_layers as usize { &[0, 4, 128][..] } else { &[0][..] };
            if !allowed.contains(r) {
                return Err(wrong(format!("compress_ratios[{i}]"), format!("one of {allowed:?}"), r.to_string()));
            }
        }
        multiple("hidden_size", self.hidden_size, TILE)?;
        multiple("q_lora_rank", self.q_lora_rank, TILE)?;
        multiple("moe_intermediate_size", self.moe_intermediate_size, TILE)?;
        multiple("num_attention_heads", self.num_attention_heads, self.o_groups)?;
        multiple("head_dim * heads per group", self.num_attention_heads / self.o_groups * self.head_dim, TILE)?;
        multiple("o_groups * o_lora_rank", self.o_groups * self.o_lora_rank, TILE)?;
        multiple("qk_rope_head_dim", self.qk_rope_head_dim, 2)?;
        multiple("head_dim", self.head_dim, 32)?;
        multiple("index_head_dim", self.index_head_dim, FP4_GROUP)?;
        if self.qk_rope_head_dim >= self.head_dim || self.qk_rope_head_dim > self.index_head_dim {
            let expected = "less than head_dim and at most index_head_dim";
            return Err(wrong("qk_rope_head_dim", expected, self.qk_rope_head_dim.to_string()));
        }
        // FP8 KV rounding works on groups of 64 over the channels that are not rotated.
        multiple("head_dim - qk_rope_head_dim", self.head_dim - self.qk_rope_head_dim, 64)?;
        if !self.index_head_dim.is_power_of_two() {
            return Err(wrong(
                "index_head_dim",
                "a power of two (Hadamard transform)",
                self.index_head_dim.to_string(),
            ));
        }
        if self.num_experts_per_tok > self.n_routed_experts {
            let expected = format!("at most n_routed_experts = {}", self.n_routed_experts);
            return Err(wrong("num_experts_per_tok", expected, self.num_experts_per_tok.to_string()));
        }
        let mut ids = vec![("bos_token_id", self.bos_token_id), ("eos_token_id", self.eos_token_id)];
        if let Draft::DSpark { noise_token_id, .. } = self.draft {
            ids.push(("dspark_noise_token_id", noise_token_id));
        }
        for (field, id) in ids {
            if id >= self.vocab_size {
                return Err(wrong(field, format!("less than vocab_size = {}", self.vocab_size), id.to_string()));
            }
        }
        Ok(())
    }

    /// Number of draft blocks after the trunk.
    pub fn draft_stages(&self) -> u32 {
        match &self.draft {
            Draft::None => 0,
            Draft::Mtp => 1,
            Draft::DSpark { stages, .. } => *stages,
        }
    }

    /// config.json of the model made of the listed `layers` of the one in `text`, its draft block kept.
    ///
    /// Rewrites `num_hidden_layers`, `compress_ratios`, `num_hash_layers` and the DSpark target layers.
    pub fn keep_layers(text: &str, layers: &[u32]) -> Result<String, ModelError> {
        let config = ModelConfig::parse(text)?;
        let all = config.num_hidden_layers;
        let ascending = layers.windows(2).all(|w| w[0] < w[1]);
        if layers.is_empty() || !ascending || layers.iter().any(|l| *l >= all) {
            return Err(ModelError::Layers { found: format!("{layers:?}"), layers: all });
        }
        let mut root: Value = serde_json::from_str(text).map_err(|source| ModelError::Json { source })?;
        let kept = layers.iter().map(|l| config.compress_ratios[*l as usize]);
        let draft = config.compress_ratios[all as usize..].iter().copied();
        root["compress_ratios"] = kept.chain(draft).collect::<Vec<u32>>().into();
        root["num_hidden_layers"] = layers.len().into();
        root["num_hash_layers"] = layers.iter().filter(|l| **l < config.num_hash_layers).count().into();
        if let Draft::DSpark { target_layer_ids, .. } = &config.draft {
            // The taps move to the last layers there are; a short model repeats its last one.
            let last = layers.len() - 1;
            let count = target_layer_ids.len();
            let ids: Vec<usize> = (0..count).map(|i| (last + 1 + i).saturating_sub(count).min(last)).collect();
            root["dspark_target_layer_ids"] = ids.into();
        }
        let text = serde_json::to_string_pretty(&root).map_err(|source| ModelError::Json { source })?;
        ModelConfig::parse(&text)?;
        Ok(text)
    }
}

/// The drafter: decided by the presence of `dspark_*` keys, as `num_nextn_predict_layers` still says 1 there.
fn draft(f: &Fields<'_>, layers: u32, ratios: usize) -> Result<Draft, ModelError> {
    if f.map.contains_key("dspark_block_size") {
        let stages = ratios.saturating_sub(layers as usize);
        if !(1..=8).contains(&stages) {
            let expected = format!("{layers} layers and 1 to 8 draft stages");
            return Err(wrong("compress_ratios", expected, format!("{ratios} entries")));
        }
        let target_layer_ids = f.ints("dspark_target_layer_ids", u64::from(layers) - 1)?;
        if target_layer_ids.is_empty() {
            return Err(wrong("dspark_target_layer_ids", "at least one layer", "none"));
        }
        return Ok(Draft::DSpark {
            stages: stages as u32,
            block_size: f.int("dspark_block_size", 1, 64)?,
            noise_token_id: f.int("dspark_noise_token_id", 0, 1 << 22)?,
            target_layer_ids,
            markov_rank: f.int("dspark_markov_rank", 1, 1 << 16)?,
        });
    }
    match f.int("num_nextn_predict_layers", 0, 1)? {
        0 => Ok(Draft::None),
        _ => Ok(Draft::Mtp),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NANO: &str = include_str!("../../../tests/nano/config.json");
    const FLASH: &str = include_str!("../../../tests/golden/flash_config.json");

    fn with(field: &str, value: Value) -> ModelError {
        let mut root: Value = serde_json::from_str(NANO).unwrap();
        root[field] = value;
        ModelConfig::parse(&root.to_string()).unwrap_err()
    }

    #[test]
    fn real_configs_parse() {
        let flash = ModelConfig::parse(FLASH).unwrap();
        assert_eq!((flash.num_hidden_layers, flash.hidden_size, flash.draft), (43, 4096, Draft::Mtp));
        let dspark = ModelConfig::parse(include_str!("../../../tests/golden/dspark_config.json")).unwrap();
        assert_eq!(dspark.draft_stages(), 3);
        ModelConfig::parse(include_str!("../../../tests/tiny/config.json")).unwrap();
    }

    #[test]
    fn anything_else_is_refused_by_field() {
        for (field, value) in [
            ("model_type", "llama".into()),
            ("scoring_func", "softmax".into()),
            ("num_key_value_heads", 8.into()),
            ("hidden_size", 200.into()),
            ("vocab_size", Value::Null),
            ("head_dim", "wide".into()),
            ("num_experts_per_tok", 9.into()),
            ("compress_ratios", vec![0, 0, 4].into()),
            ("index_head_dim", 96.into()),
            ("quantization_config", Value::Null),
            ("eos_token_id", 5000.into()),
            ("n_group", 8.into()),
        ] {
            let text = with(field, value).to_string();
            assert!(text.contains(field), "{field}: {text}");
        }
        for (object, field) in [("rope_scaling", "mscale"), ("quantization_config", "modules_to_not_convert")] {
            let mut root: Value = serde_json::from_str(NANO).unwrap();
            root[object][field] = 1.into();
            let text = ModelConfig::parse(&root.to_string()).unwrap_err().to_string();
            assert!(text.contains(&format!("{object}.{field}")), "{text}");
        }
        assert!(matches!(ModelConfig::parse("{"), Err(ModelError::Json { .. })));
    }

    #[test]
    fn kept_layers_rewrite_what_depends_on_them() {
        let text = ModelConfig::keep_layers(FLASH, &[2, 3]).unwrap();
        let config = ModelConfig::parse(&text).unwrap();
        assert_eq!(config.compress_ratios, [4, 128, 0]);
        assert_eq!((config.num_hidden_layers, config.num_hash_layers), (2, 1));
        assert!(ModelConfig::keep_layers(FLASH, &[3, 2]).is_err());
        assert!(ModelConfig::keep_layers(FLASH, &[43]).is_err());
    }
}
