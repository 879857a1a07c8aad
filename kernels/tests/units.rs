//! Operators against the golden unit values (tests/golden/units.safetensors).

use std::collections::HashMap;

use dsv4_kernels::numerics::{e2m1_round, e4m3_value, fake_fp4, fake_fp8, hadamard, ue8m0_value};
use dsv4_kernels::ops::hyper_connection::{self as hc, HcParams};
use dsv4_kernels::ops::rope::Rope;
use dsv4_kernels::simd::widen_fp4;
use dsv4_model::ModelConfig;
use safetensors::SafeTensors;

fn golden() -> Vec<u8> {
    std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/units.safetensors")).unwrap()
}

fn config() -> ModelConfig {
    ModelConfig::parse(include_str!("../../tests/tiny/config.json")).unwrap()
}

/// Tensors widened to float32; codes and scales as their byte values.
fn tensors(bytes: &[u8]) -> HashMap<String, Vec<f32>> {
    let file = SafeTensors::deserialize(bytes).unwrap();
    let widen = |t: &safetensors::tensor::TensorView<'_>| -> Vec<f32> {
        match t.dtype() {
            safetensors::Dtype::F32 => t.data().chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
            safetensors::Dtype::I32 => {
                t.data().chunks(4).map(|b| i32::from_le_bytes(b.try_into().unwrap()) as f32).collect()
            }
            safetensors::Dtype::BF16 => {
                t.data().chunks(2).map(|b| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16)).collect()
            }
            _ => t.data().iter().map(|b| f32::from(*b)).collect(),
        }
    };
    file.tensors().into_iter().map(|(name, t)| (name, widen(&t))).collect()
}

fn assert_exact(name: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{name}");
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!(f == e, "{name}[{i}]: {f} instead of {e}");
    }
}

#[test]
fn fp8_activations_are_exact() {
    let bytes = golden();
    let t = tensors(&bytes);
    for group in [64, 128] {
        let mut x = t["x"].clone();
        fake_fp8(&mut x, group);
        assert_exact("value", &x, &t[&format!("fp8.{group}.value")]);
        // The stored codes and scales stand for the same values.
        let (codes, scales) = (&t[&format!("fp8.{group}.codes")], &t[&format!("fp8.{group}.scale")]);
        let decoded: Vec<f32> = codes
            .iter()
            .enumerate()
            .map(|(i, c)| e4m3_value(*c as u8) * ue8m0_value(scales[i / group] as u8))
            .collect();
        assert_exact("codes", &decoded, &x);
    }
}

#[test]
fn fp4_activations_are_exact() {
    let bytes = golden();
    let t = tensors(&bytes);
    let mut x = t["x"].clone();
    fake_fp4(&mut x);
    assert_exact("value", &x, &t["fp4.32.value"]);
    let packed: Vec<u8> = t["fp4.32.packed"].iter().map(|b| *b as u8).collect();
    let scales: Vec<u8> = t["fp4.32.scale"].iter().map(|b| *b as u8).collect();
    let mut decoded = vec![f32::NAN; x.len()];
    widen_fp4(&packed, &scales, &mut decoded);
    assert_exact("packed", &decoded, &x);
    let rounded: Vec<f32> = t["e2m1.in"].iter().map(|v| e2m1_round(*v)).collect();
    assert_exact("e2m1", &rounded, &t["e2m1.out"]);
}

#[test]
fn hadamard_is_exact() {
    let bytes = golden();
    let t = tensors(&bytes);
    let mut x = t["x"].clone();
    x.chunks_exact_mut(128).for_each(hadamard);
    assert_exact("hadamard", &x, &t["hadamard128"]);
}

#[test]
fn rotary_tables_are_within_one_ulp() {
    let bytes = golden();
    let t = tensors(&bytes);
    for (name, compressed) in [("main", false), ("compress", true)] {
        let rope = Rope::new(&config(), compressed);
        for (i, position) in t["rope.pos"].iter().enumerate() {
            for (j, (cos, sin)) in rope.at(*position as u32).into_iter().enumerate() {
                for (part, found) in [("cos", cos), ("sin", sin)] {
                    let expected = t[&format!("rope.{name}.{part}")][i * 32 + j];
                    let ulps = (i64::from(found.to_bits() as i32) - i64::from(expected.to_bits() as i32)).abs();
                    assert!(ulps <= 1, "{name} {part} at {position}, pair {j}: {found} instead of {expected}");
                }
            }
        }
    }
}

#[test]
fn hyper_connection_weights() {
    let bytes = golden();
    let t = tensors(&bytes);
    let tiny = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/tiny/tiny.safetensors")).unwrap();
    let tiny = SafeTensors::deserialize(&tiny).unwrap();
    let read = |name: &str| -> Vec<f32> {
        let t = tiny.tensor(name).unwrap();
        t.data().chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
    };
    let (w, base, scale) = (read("layers.0.hc_attn_fn"), read("layers.0.hc_attn_base"), read("layers.0.hc_attn_scale"));
    let params = HcParams { streams: 4, sinkhorn_iters: 20, hc_eps: 1e-6, rms_eps: 1e-6 };
    let close = |found: &[f32], expected: &[f32]| {
        found.iter().zip(expected).for_each(|(f, e)| assert!((f - e).abs() < 2e-6, "{f} instead of {e}"));
    };
    for r in 0..5 {
        let h = &t["hc.h"][r * 1024..(r + 1) * 1024];
        let mix = hc::mix(h, |i| &w[i * 1024..(i + 1) * 1024], &base, &scale, params);
        close(&mix.post, &t["hc.post"][r * 4..(r + 1) * 4]);
        close(&mix.comb, &t["hc.comb"][r * 16..(r + 1) * 16]);
        let sums: Vec<f32> = mix.comb.chunks(4).map(|row| row.iter().sum()).collect();
        close(&sums, &t["hc.row_sums"][r * 4..(r + 1) * 4]);
        let mut x = vec![0.0; 256];
        hc::collapse(h, &mix.pre, &mut x);
        close(&x, &t["hc.in"][r * 256..(r + 1) * 256]);
    }
}
