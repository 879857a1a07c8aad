//! Inner loops, compiled for several instruction sets and chosen at run time.
//!
//! Every version computes the same bits: a dot product keeps 32 running sums (element k goes to sum
//! k mod 32, with fused multiply-add) and adds them in a fixed tree, whatever the vector width. So
//! results do not depend on the machine, the number of rows in a batch or the number of threads.
//!
//! The one unsafe act here is to call a function compiled for instructions that were detected.
#![allow(unsafe_code)]

use crate::numerics::{e2m1_value, e4m3_value, ue8m0_value};

/// Running sums of a dot product; vectors are whole multiples of this.
pub const LANES: usize = 32;

/// Columns under one FP8 scale.
const FP8_TILE: usize = 128;
/// Columns under one FP4 scale.
const FP4_GROUP: usize = 32;

/// Both values of a byte of E2M1 codes: low nibble first.
static FP4_PAIRS: [[f32; 2]; 256] = {
    let mut table = [[0.0; 2]; 256];
    let mut byte = 0;
    while byte < 256 {
        table[byte] = [e2m1_value(byte as u8 & 15), e2m1_value(byte as u8 >> 4)];
        byte += 1;
    }
    table
};

macro_rules! versions {
    ($(#[$doc:meta])* pub fn $name:ident($($arg:ident: $ty:ty),*) $(-> $ret:ty)? = $body:ident) => {
        $(#[$doc])*
        pub fn $name($($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
                fn wide($($arg: $ty),*) $(-> $ret)? { $body($($arg),*) }
                #[target_feature(enable = "avx2,fma")]
                fn narrow($($arg: $ty),*) $(-> $ret)? { $body($($arg),*) }
                if std::is_x86_feature_detected!("avx512f")
                    && std::is_x86_feature_detected!("avx512bw")
                    && std::is_x86_feature_detected!("avx512vl")
                    && std::is_x86_feature_detected!("avx512dq")
                    && std::is_x86_feature_detected!("fma")
                {
                    // SAFETY: every feature the function was compiled for has just been detected.
                    return unsafe { wide($($arg),*) };
                }
                if std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("fma") {
                    // SAFETY: as above.
                    return unsafe { narrow($($arg),*) };
                }
            }
            $body($($arg),*)
        }
    };
}

#[inline(always)]
fn fold(mut sums: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            sums[i] += sums[i + width];
        }
        width /= 2;
    }
    sums[0]
}

#[inline(always)]
fn dot_body(x: &[f32], w: &[f32]) -> f32 {
    assert!(x.len() == w.len() && x.len().is_multiple_of(LANES));
    let mut sums = [0f32; LANES];
    for (x, w) in x.chunks_exact(LANES).zip(w.chunks_exact(LANES)) {
        for i in 0..LANES {
            sums[i] = x[i].mul_add(w[i], sums[i]);
        }
    }
    fold(sums)
}

#[inline(always)]
fn dot4_body(x: [&[f32]; 4], w: &[f32]) -> [f32; 4] {
    let [a, b, c, d] = x;
    let n = w.len();
    assert!(n.is_multiple_of(LANES) && a.len() == n && b.len() == n && c.len() == n && d.len() == n);
    let mut sums = [[0f32; LANES]; 4];
    for k in (0..n).step_by(LANES) {
        let w = &w[k..k + LANES];
        for (sums, x) in sums.iter_mut().zip([&a[k..k + LANES], &b[k..k + LANES], &c[k..k + LANES], &d[k..k + LANES]]) {
            for i in 0..LANES {
                sums[i] = x[i].mul_add(w[i], sums[i]);
            }
        }
    }
    sums.map(fold)
}

#[inline(always)]
fn axpy_body(a: f32, x: &[f32], y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = a.mul_add(*x, *y);
    }
}

#[inline(always)]
fn fp8_body(codes: &[u8], scales: &[u8], out: &mut [f32]) {
    for ((codes, out), scale) in codes.chunks(FP8_TILE).zip(out.chunks_mut(FP8_TILE)).zip(scales) {
        let scale = ue8m0_value(*scale);
        for (o, c) in out.iter_mut().zip(codes) {
            *o = e4m3_value(*c) * scale;
        }
    }
}

#[inline(always)]
fn fp4_body(codes: &[u8], scales: &[u8], out: &mut [f32]) {
    for ((codes, out), scale) in codes.chunks_exact(FP4_GROUP / 2).zip(out.chunks_exact_mut(FP4_GROUP)).zip(scales) {
        let scale = ue8m0_value(*scale);
        for (o, c) in out.chunks_exact_mut(2).zip(codes) {
            let pair = FP4_PAIRS[usize::from(*c)];
            o[0] = pair[0] * scale;
            o[1] = pair[1] * scale;
        }
    }
}

#[inline(always)]
fn bf16_body(bytes: &[u8], out: &mut [f32]) {
    for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
        *o = f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16);
    }
}

versions! {
    /// Dot product of two vectors of equal length, a multiple of [`LANES`].
    pub fn dot(x: &[f32], w: &[f32]) -> f32 = dot_body
}
versions! {
    /// Four dot products with one `w`; each equals [`dot`] bit for bit.
    pub fn dot4(x: [&[f32]; 4], w: &[f32]) -> [f32; 4] = dot4_body
}
versions! {
    /// `y += a * x`, fused.
    pub fn axpy(a: f32, x: &[f32], y: &mut [f32]) = axpy_body
}
versions! {
    /// Widens a row of E4M3 codes with one scale per 128 columns.
    pub fn widen_fp8(codes: &[u8], scales: &[u8], out: &mut [f32]) = fp8_body
}
versions! {
    /// Widens a row of E2M1 pairs with one scale per 32 columns.
    pub fn widen_fp4(codes: &[u8], scales: &[u8], out: &mut [f32]) = fp4_body
}
versions! {
    /// Widens little-endian bfloat16.
    pub fn widen_bf16(bytes: &[u8], out: &mut [f32]) = bf16_body
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(n: usize, seed: u32) -> Vec<f32> {
        let mut s = seed;
        (0..n)
            .map(|_| {
                s = s.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (s >> 8) as f32 / 8_388_608.0 - 1.0
            })
            .collect()
    }

    #[test]
    fn all_versions_give_the_same_bits() {
        for n in [32, 128, 1024, 4096] {
            let (x, w) = (noise(4 * n, 1), noise(n, 2));
            let rows: Vec<&[f32]> = x.chunks_exact(n).collect();
            let four = dot4([rows[0], rows[1], rows[2], rows[3]], &w);
            for (row, sum) in rows.iter().zip(four) {
                assert_eq!(sum.to_bits(), dot(row, &w).to_bits());
                assert_eq!(sum.to_bits(), dot_body(row, &w).to_bits());
                let exact: f64 = row.iter().zip(&w).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                assert!((f64::from(sum) - exact).abs() < 1e-4);
            }
        }
    }

    #[test]
    fn widening_is_exact() {
        let codes: Vec<u8> = (0..=255).filter(|c| c & 0x7f != 0x7f).chain([0, 0]).collect();
        let mut out = vec![f32::NAN; 256];
        widen_fp8(&codes, &[130, 120], &mut out);
        for (i, c) in codes.iter().enumerate() {
            assert_eq!(out[i], e4m3_value(*c) * if i < 128 { 8.0 } else { 0.0078125 });
        }
        let bytes: Vec<u8> = (0..32).map(|i| (i * 53 + 7) as u8).collect();
        let mut out = vec![f32::NAN; 64];
        widen_fp4(&bytes, &[127, 0], &mut out);
        for (i, v) in out.iter().enumerate() {
            let code = if i % 2 == 0 { bytes[i / 2] & 15 } else { bytes[i / 2] >> 4 };
            assert_eq!(*v, e2m1_value(code) * if i < 32 { 1.0 } else { 2f32.powi(-127) });
        }
    }
}
