//! Inner loops, compiled for several instruction sets and chosen at run time.
//!
//! Every version computes the same bits: a dot product keeps 32 running sums (element k goes to sum
//! k mod 32, with fused multiply-add) and adds them in a fixed tree, whatever the vector width. So
//! results do not depend on the machine, the number of rows in a batch or the number of threads.
//!
//! Unsafe are only the calls of functions compiled for instructions that were detected, and unaligned
//! vector loads inside bounds that were checked.
#![allow(unsafe_code)]

use crate::numerics::{bf16_round, e2m1_value, e4m3_value, fake_fp8_body, ue8m0_value};

/// Running sums of a dot product; vectors are whole multiples of this.
pub const LANES: usize = 32;

/// Columns under one FP8 scale.
const FP8_TILE: usize = 128;
/// Columns under one FP4 scale.
const FP4_GROUP: usize = 32;

/// Largest scale byte that leaves room for the factor of [`x86::dots_fp8`]: 2^119.
#[cfg(target_arch = "x86_64")]
const FP8_SCALE_MODERATE: u8 = 246;

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

/// Vector instructions that were found.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy, PartialEq, Eq)]
enum Level {
    Plain,
    Avx2,
    Avx512,
}

/// What this machine has; asked once.
#[cfg(target_arch = "x86_64")]
fn level() -> Level {
    use std::is_x86_feature_detected as has;
    static LEVEL: std::sync::LazyLock<Level> = std::sync::LazyLock::new(|| {
        if !(has!("avx2") && has!("fma") && has!("f16c")) {
            Level::Plain
        } else if has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512dq") {
            Level::Avx512
        } else {
            Level::Avx2
        }
    });
    *LEVEL
}

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
                // SAFETY: every feature that the functions were compiled for has been detected.
                match level() {
                    Level::Avx512 => return unsafe { wide($($arg),*) },
                    Level::Avx2 => return unsafe { narrow($($arg),*) },
                    Level::Plain => {}
                }
            }
            $body($($arg),*)
        }
    };
}

/// A dot product in plain Rust: the definition of the order.
fn dot_plain(x: &[f32], w: &[f32]) -> f32 {
    let mut sums = [0f32; LANES];
    for (x, w) in x.as_chunks::<LANES>().0.iter().zip(w.as_chunks::<LANES>().0) {
        for i in 0..LANES {
            sums[i] = x[i].mul_add(w[i], sums[i]);
        }
    }
    fold(&mut sums)
}

/// Kept out of line: inlined, its pairs make the compiler split the sums into two-element vectors.
#[inline(never)]
fn fold(sums: &mut [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            sums[i] += sums[i + width];
        }
        width /= 2;
    }
    sums[0]
}

#[cfg(target_arch = "x86_64")]
mod x86;

/// Widens a row of E4M3 codes with one scale per 128 columns: whole tiles, but for the last.
pub fn widen_fp8(codes: &[u8], scales: &[u8], out: &mut [f32]) {
    assert!(codes.len() == out.len() && scales.len() == codes.len().div_ceil(FP8_TILE), "lengths of an FP8 row");
    #[cfg(target_arch = "x86_64")]
    if level() != Level::Plain {
        for ((codes, out), scale) in codes.chunks(FP8_TILE).zip(out.chunks_mut(FP8_TILE)).zip(scales) {
            let scale = ue8m0_value(*scale);
            let whole = codes.len() / 8 * 8;
            // SAFETY: the features were detected; both slices have the same length, a multiple of 8.
            unsafe { x86::widen_e4m3(&codes[..whole], scale, &mut out[..whole]) };
            fp8_plain(&codes[whole..], scale, &mut out[whole..]);
        }
        return;
    }
    for ((codes, out), scale) in codes.chunks(FP8_TILE).zip(out.chunks_mut(FP8_TILE)).zip(scales) {
        fp8_plain(codes, ue8m0_value(*scale), out);
    }
}

fn fp8_plain(codes: &[u8], scale: f32, out: &mut [f32]) {
    for (o, c) in out.iter_mut().zip(codes) {
        *o = e4m3_value(*c) * scale;
    }
}

/// Widens a row of E2M1 pairs with one scale per 32 columns.
pub fn widen_fp4(codes: &[u8], scales: &[u8], out: &mut [f32]) {
    assert!(2 * codes.len() == out.len() && FP4_GROUP * scales.len() == out.len(), "lengths of an FP4 row");
    #[cfg(target_arch = "x86_64")]
    if level() == Level::Avx512 {
        // SAFETY: the features were detected, the lengths checked.
        unsafe { x86::widen_e2m1(codes, scales, out) };
        return;
    }
    fp4_plain(codes, scales, out);
}

fn fp4_plain(codes: &[u8], scales: &[u8], out: &mut [f32]) {
    for ((codes, out), scale) in codes.chunks_exact(FP4_GROUP / 2).zip(out.chunks_exact_mut(FP4_GROUP)).zip(scales) {
        let scale = ue8m0_value(*scale);
        for (o, c) in out.chunks_exact_mut(2).zip(codes) {
            let pair = FP4_PAIRS[usize::from(*c)];
            o[0] = pair[0] * scale;
            o[1] = pair[1] * scale;
        }
    }
}

/// Products of every `w` with every `x`; all lengths are equal, a multiple of [`LANES`].
///
/// Each equals the product of its two vectors alone bit for bit.
#[inline]
pub fn tile<const W: usize, const X: usize>(w: [&[f32]; W], x: [&[f32]; X]) -> [[f32; X]; W] {
    let n = w[0].len();
    let equal = w.iter().chain(&x).all(|v| v.len() == n);
    assert!(equal && n.is_multiple_of(LANES), "lengths of a dot product");
    #[cfg(target_arch = "x86_64")]
    {
        // SAFETY: the features were detected, the lengths checked.
        match level() {
            Level::Avx512 => return unsafe { x86::tile512(w, x) },
            Level::Avx2 => return unsafe { x86::tile256(w, x) },
            Level::Plain => {}
        }
    }
    w.map(|w| x.map(|x| dot_plain(x, w)))
}

/// Dot product of two vectors of equal length, a multiple of [`LANES`].
pub fn dot(x: &[f32], w: &[f32]) -> f32 {
    tile([w], [x])[0][0]
}

/// A row of a stored matrix.
#[derive(Clone, Copy, Debug)]
pub enum Row<'a> {
    /// Float32, in place.
    F32(&'a [f32]),
    /// Little-endian bfloat16.
    Bf16(&'a [u8]),
    /// E4M3 codes, one scale per 128 columns.
    Fp8(&'a [u8], &'a [u8]),
    /// E2M1 pairs, one scale per 32 columns.
    Fp4(&'a [u8], &'a [u8]),
}

impl Row<'_> {
    /// Widens the row.
    pub fn widen(&self, out: &mut [f32]) {
        match self {
            Row::F32(values) => out.copy_from_slice(values),
            Row::Bf16(bytes) => widen_bf16(bytes, out),
            Row::Fp8(codes, scales) => widen_fp8(codes, scales, out),
            Row::Fp4(codes, scales) => widen_fp4(codes, scales, out),
        }
    }
}

/// Products of `x` with rows of one matrix, without widening them in memory where the machine can; `None`
/// where it cannot. Each equals [`dot`] of the widened row bit for bit.
pub fn stored_dots<const R: usize>(rows: [Row<'_>; R], x: &[f32]) -> Option<[f32; R]> {
    #[cfg(target_arch = "x86_64")]
    if level() == Level::Avx512 {
        assert!(x.len().is_multiple_of(LANES), "length of a dot product");
        let n = x.len();
        // SAFETY: the features were detected; every length is checked before the call.
        return match rows[0] {
            Row::F32(_) => {
                let rows = rows.map(|r| if let Row::F32(values) = r { values } else { &[] });
                Some(tile(rows, [x]).map(|[sum]| sum))
            }
            Row::Bf16(_) => {
                let rows = rows.map(|r| if let Row::Bf16(bytes) = r { bytes } else { &[] });
                assert!(rows.iter().all(|r| r.len() == 2 * n), "lengths of a BF16 row");
                Some(unsafe { x86::dots_bf16(rows, x) })
            }
            Row::Fp8(..) => {
                let rows =
                    rows.map(|r| if let Row::Fp8(codes, scales) = r { (codes, scales) } else { (&[][..], &[][..]) });
                assert!(
                    rows.iter().all(|(c, s)| c.len() == n && s.len() == n.div_ceil(FP8_TILE)),
                    "lengths of an FP8 row"
                );
                let moderate = rows.iter().all(|(_, scales)| scales.iter().all(|s| *s <= FP8_SCALE_MODERATE));
                moderate.then(|| unsafe { x86::dots_fp8(rows, x) })
            }
            Row::Fp4(..) => {
                let rows =
                    rows.map(|r| if let Row::Fp4(codes, scales) = r { (codes, scales) } else { (&[][..], &[][..]) });
                assert!(
                    rows.iter().all(|(c, s)| 2 * c.len() == n && FP4_GROUP * s.len() == n),
                    "lengths of an FP4 row"
                );
                Some(unsafe { x86::dots_fp4(rows, x) })
            }
        };
    }
    let _ = (rows, x);
    None
}

#[inline(always)]
fn axpy_body(a: f32, x: &[f32], y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = a.mul_add(*x, *y);
    }
}

#[inline(always)]
fn round_bf16_body(x: &mut [f32]) {
    x.iter_mut().for_each(|v| *v = bf16_round(*v));
}

#[inline(always)]
fn bf16_body(bytes: &[u8], out: &mut [f32]) {
    for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
        *o = f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16);
    }
}

versions! {
    /// `y += a * x`, fused.
    pub fn axpy(a: f32, x: &[f32], y: &mut [f32]) = axpy_body
}
versions! {
    /// [`crate::numerics::fake_fp8`].
    pub fn fake_fp8(x: &mut [f32], group: usize) = fake_fp8_body
}
versions! {
    /// [`crate::numerics::bf16_round`] of every value.
    pub fn round_bf16(x: &mut [f32]) = round_bf16_body
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
            let (x, w) = (noise(3 * n, 1), noise(4 * n, 2));
            let x: Vec<&[f32]> = x.chunks_exact(n).collect();
            let w: Vec<&[f32]> = w.chunks_exact(n).collect();
            let tile = tile([w[0], w[1], w[2], w[3]], [x[0], x[1], x[2]]);
            for (w, sums) in w.iter().zip(tile) {
                for (x, sum) in x.iter().zip(sums) {
                    assert_eq!(sum.to_bits(), dot(x, w).to_bits());
                    assert_eq!(sum.to_bits(), dot(w, x).to_bits());
                    assert_eq!(sum.to_bits(), dot_plain(x, w).to_bits());
                    #[cfg(target_arch = "x86_64")]
                    if level() != Level::Plain {
                        // SAFETY: the features were detected; lengths are equal multiples of the lanes.
                        assert_eq!(sum.to_bits(), unsafe { x86::tile256([w], [x])[0][0] }.to_bits());
                    }
                    let exact: f64 = x.iter().zip(*w).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                    assert!((f64::from(sum) - exact).abs() < 1e-4);
                }
            }
        }
    }

    #[test]
    fn stored_rows_give_the_bits_of_widened_ones() {
        let n = 416;
        let x = noise(n, 3);
        let bytes = |seed: u32, count: usize| -> Vec<u8> {
            noise(count, seed)
                .iter()
                .map(|v| (v.to_bits() >> 3) as u8)
                .map(|b| if b & 0x7f == 0x7f { b ^ 1 } else { b })
                .collect()
        };
        let (codes, pairs, bf16) = (bytes(4, 2 * n), bytes(5, n), bytes(6, 4 * n));
        let (tiles, groups) = ([118, 127, 130, 9, 120, 246, 1, 127], bytes(7, 2 * n / 32));
        let f32s = noise(2 * n, 8);
        let rows = |i: usize| {
            [
                Row::F32(&f32s[i * n..][..n]),
                Row::Bf16(&bf16[i * 2 * n..][..2 * n]),
                Row::Fp8(&codes[i * n..][..n], &tiles[i * 4..][..4]),
                Row::Fp4(&pairs[i * n / 2..][..n / 2], &groups[i * n / 32..][..n / 32]),
            ]
        };
        for (a, b) in rows(0).into_iter().zip(rows(1)) {
            let Some(found) = stored_dots([a, b], &x) else { continue };
            for (row, sum) in [a, b].iter().zip(found) {
                let mut widened = vec![f32::NAN; n];
                row.widen(&mut widened);
                assert_eq!(sum.to_bits(), dot(&x, &widened).to_bits(), "{row:?}");
            }
        }
    }

    #[test]
    fn widening_is_exact() {
        // Every code, at two scales and in a last tile that is not whole.
        let codes: Vec<u8> = (0..=255).filter(|c| c & 0x7f != 0x7f).chain([1, 129, 0x7e]).collect();
        let mut out = vec![f32::NAN; 257];
        widen_fp8(&codes, &[130, 120, 120], &mut out);
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
        let mut plain = vec![f32::NAN; 64];
        fp4_plain(&bytes, &[127, 0], &mut plain);
        assert_eq!(out, plain);
    }
}
