//! Rotary embedding of the last channels, neighbours paired (SPEC 3.3).

use dsv4_model::ModelConfig;

/// Angular frequencies of the channel pairs, radians per position.
#[derive(Clone, Debug)]
pub struct Rope {
    frequencies: Vec<f32>,
}

impl Rope {
    /// The table of window-only layers (`compressed` false) or, with YaRN, of ratio 4 and 128.
    pub fn new(config: &ModelConfig, compressed: bool) -> Rope {
        let dim = config.qk_rope_head_dim as usize;
        let base = if compressed { config.compress_rope_theta } else { config.rope_theta };
        // The reference divides a float32 power; multiplying by its inverse rounds differently.
        let plain = (0..dim / 2).map(|i| 1.0 / libm::pow(base, 2.0 * i as f64 / dim as f64) as f32);
        if !compressed {
            return Rope { frequencies: plain.collect() };
        }
        let yarn = &config.yarn;
        let channel = |rotations: f64| {
            let length = yarn.original_max_position_embeddings as f64;
            dim as f64 * libm::log(length / (rotations * std::f64::consts::TAU)) / (2.0 * libm::log(base))
        };
        let low = channel(yarn.beta_fast).floor().max(0.0);
        let high = channel(yarn.beta_slow).ceil().min(dim as f64 - 1.0);
        let span = (high - low).max(0.001) as f32;
        let scaled = plain.enumerate().map(|(i, f)| {
            let ramp = ((i as f32 - low as f32) / span).clamp(0.0, 1.0);
            f / yarn.factor * ramp + f * (1.0 - ramp)
        });
        Rope { frequencies: scaled.collect() }
    }

    /// Cosine and sine of every pair at `position`: the angle is the float32 product.
    pub fn at(&self, position: u32) -> Vec<(f32, f32)> {
        let angle = |f: &f32| f64::from(position as f32 * f);
        self.frequencies.iter().map(|f| (libm::cos(angle(f)) as f32, libm::sin(angle(f)) as f32)).collect()
    }
}

/// Turns the last `2 * turns.len()` channels of `x`.
pub fn rotate(x: &mut [f32], turns: &[(f32, f32)]) {
    let start = x.len() - 2 * turns.len();
    for (pair, (cos, sin)) in x[start..].chunks_exact_mut(2).zip(turns) {
        let (a, b) = (pair[0], pair[1]);
        pair[0] = a * cos - b * sin;
        pair[1] = a * sin + b * cos;
    }
}

/// Turns back the last `2 * turns.len()` channels of `x`.
pub fn rotate_back(x: &mut [f32], turns: &[(f32, f32)]) {
    let start = x.len() - 2 * turns.len();
    for (pair, (cos, sin)) in x[start..].chunks_exact_mut(2).zip(turns) {
        let (a, b) = (pair[0], pair[1]);
        pair[0] = a * cos + b * sin;
        pair[1] = b * cos - a * sin;
    }
}
