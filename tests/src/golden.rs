//! Golden tensors, and how far from them a result is.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use crate::DATA;

/// A tensor of a safetensors file, widened to float32.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its values, row after row.
    pub data: Vec<f32>,
}

impl Tensor {
    /// Values of one entry of the first dimension.
    pub fn cols(&self) -> usize {
        self.shape[1..].iter().product()
    }

    /// Entry `r` of the first dimension.
    pub fn row(&self, r: usize) -> &[f32] {
        &self.data[r * self.cols()..(r + 1) * self.cols()]
    }
}

/// Where a golden file is.
pub fn path(file: &str) -> PathBuf {
    Path::new(DATA).join("golden").join(file)
}

/// The tensors of a golden file by name.
pub fn tensors(file: &str) -> BTreeMap<String, Tensor> {
    read(&path(file))
}

/// The tensors of any safetensors file by name.
pub fn read(file: &Path) -> BTreeMap<String, Tensor> {
    let bytes = std::fs::read(file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    let all = SafeTensors::deserialize(&bytes).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    let widened = all.tensors().into_iter().map(|(name, view)| {
        let words = || view.data().as_chunks::<4>().0.iter();
        let data = match view.dtype() {
            Dtype::F32 => words().map(|b| f32::from_le_bytes(*b)).collect(),
            Dtype::I32 => words().map(|b| i32::from_le_bytes(*b) as f32).collect(),
            Dtype::BF16 => {
                let halves = view.data().as_chunks::<2>().0.iter();
                halves.map(|b| f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16)).collect()
            }
            other => panic!("{}: {name} is {other:?}", file.display()),
        };
        (name, Tensor { shape: view.shape().to_vec(), data })
    });
    widened.collect()
}

/// The token ids of a prompt of the goldens: `long` (388), `mid` (140) or `short` (9).
pub fn prompt(name: &str) -> Vec<u32> {
    let text = std::fs::read_to_string(path("golden.json")).expect("golden.json");
    // Its margins hold infinities, which JSON does not have.
    let value: Value = serde_json::from_str(&text.replace("Infinity", "null")).expect("JSON");
    let ids = value["prompts"][name].as_array().unwrap_or_else(|| panic!("no prompt {name}"));
    ids.iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

/// Distance of two lists of numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Distance {
    /// Largest difference.
    pub max: f64,
    /// Mean difference.
    pub mean: f64,
}

/// Compares number by number. Equal infinities agree; a NaN on either side is infinitely far.
pub fn distance(found: &[f32], expected: &[f32]) -> Distance {
    assert_eq!(found.len(), expected.len(), "numbers to compare");
    let mut out = Distance::default();
    for (f, e) in found.iter().zip(expected) {
        let d = if f == e { 0.0 } else { f64::from((f - e).abs()) };
        let d = if d.is_nan() { f64::INFINITY } else { d };
        out.max = out.max.max(d);
        out.mean += d;
    }
    out.mean /= found.len().max(1) as f64;
    out
}

/// KL divergence of the distribution of logits `q` from that of logits `p`, in nats.
pub fn kl(p: &[f32], q: &[f32]) -> f64 {
    let logs = |x: &[f32]| {
        let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = x.iter().map(|v| f64::from(v - max).exp()).sum();
        x.iter().map(|v| f64::from(v - max) - sum.ln()).collect::<Vec<f64>>()
    };
    logs(p).iter().zip(logs(q)).map(|(p, q)| p.exp() * (p - q)).sum()
}
