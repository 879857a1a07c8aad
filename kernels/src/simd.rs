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

/// Dot products of `R` vectors with `w`, in plain Rust: the definition of the order.
fn dots_plain<const R: usize>(x: [&[f32]; R], w: &[f32]) -> [f32; R] {
    x.map(|x| {
        let mut sums = [0f32; LANES];
        for (x, w) in x.as_chunks::<LANES>().0.iter().zip(w.as_chunks::<LANES>().0) {
            for i in 0..LANES {
                sums[i] = x[i].mul_add(w[i], sums[i]);
            }
        }
        fold(&mut sums)
    })
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
mod x86 {
    //! The same order in vector instructions, which compilers do not find by themselves.

    use std::arch::x86_64::*;

    use super::LANES;
    use crate::numerics::{e2m1_value, ue8m0_value};

    #[target_feature(enable = "avx2,fma")]
    fn fold256(v: __m256) -> f32 {
        let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
        _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
    }

    /// Lengths are checked by the caller: all equal, a multiple of [`LANES`].
    #[target_feature(enable = "avx512f,avx512dq,avx2,fma")]
    pub fn dots512<const R: usize>(x: [&[f32]; R], w: &[f32]) -> [f32; R] {
        let mut sums = [[_mm512_setzero_ps(); 2]; R];
        for k in (0..w.len()).step_by(LANES) {
            // SAFETY: `k + 32` is at most the length of `w` and of every `x`, which are equal.
            let load = |v: &[f32], i: usize| unsafe { _mm512_loadu_ps(v.as_ptr().add(k + i)) };
            let (low, high) = (load(w, 0), load(w, 16));
            for r in 0..R {
                sums[r][0] = _mm512_fmadd_ps(load(x[r], 0), low, sums[r][0]);
                sums[r][1] = _mm512_fmadd_ps(load(x[r], 16), high, sums[r][1]);
            }
        }
        sums.map(|[low, high]| {
            let v = _mm512_add_ps(low, high);
            fold256(_mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)))
        })
    }

    /// E4M3 codes times a scale. An E4M3 code is a half-precision number with 8 subtracted from its
    /// exponent, subnormals included. Lengths are equal and a multiple of 8.
    #[target_feature(enable = "avx2,fma,f16c")]
    pub fn widen_e4m3(codes: &[u8], scale: f32, out: &mut [f32]) {
        let (rebias, scale) = (_mm256_set1_ps(256.0), _mm256_set1_ps(scale));
        let mask = _mm_set1_epi16(0xbf80_u16 as i16);
        for k in (0..codes.len()).step_by(8) {
            // SAFETY: 8 bytes and 8 floats from `k` on are inside the slices.
            let bytes = unsafe { _mm_loadl_epi64(codes.as_ptr().add(k).cast()) };
            // Sign extension leaves the sign in bits 14 and 15 of the shifted code; bit 14 is the exponent's.
            let halves = _mm_and_si128(_mm_slli_epi16(_mm_cvtepi8_epi16(bytes), 7), mask);
            let values = _mm256_mul_ps(_mm256_mul_ps(_mm256_cvtph_ps(halves), rebias), scale);
            // SAFETY: as above.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr().add(k), values) };
        }
    }

    /// E2M1 pairs times their scales. Lengths: 16 codes and one scale per 32 values.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
    pub fn widen_e2m1(codes: &[u8], scales: &[u8], out: &mut [f32]) {
        let table: [f32; 16] = std::array::from_fn(|code| e2m1_value(code as u8));
        // SAFETY: the table has 16 values.
        let table = unsafe { _mm512_loadu_ps(table.as_ptr()) };
        let first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        let second = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        for (g, scale) in scales.iter().enumerate() {
            let scale = _mm512_set1_ps(ue8m0_value(*scale));
            // SAFETY: group `g` has 16 bytes of codes and 32 values, both inside the slices.
            let bytes = unsafe { _mm_loadu_si128(codes.as_ptr().add(16 * g).cast()) };
            let codes = _mm512_cvtepu8_epi32(bytes);
            // The permutation reads the low four bits of an index only.
            let even = _mm512_mul_ps(_mm512_permutexvar_ps(codes, table), scale);
            let odd = _mm512_mul_ps(_mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), table), scale);
            // SAFETY: as above.
            unsafe {
                _mm512_storeu_ps(out.as_mut_ptr().add(32 * g), _mm512_permutex2var_ps(even, first, odd));
                _mm512_storeu_ps(out.as_mut_ptr().add(32 * g + 16), _mm512_permutex2var_ps(even, second, odd));
            }
        }
    }

    /// As [`dots512`].
    #[target_feature(enable = "avx2,fma")]
    pub fn dots256<const R: usize>(x: [&[f32]; R], w: &[f32]) -> [f32; R] {
        x.map(|x| {
            let mut sums = [_mm256_setzero_ps(); 4];
            for k in (0..w.len()).step_by(LANES) {
                // SAFETY: `k + 32` is at most the length of `w` and of `x`, which are equal.
                let load = |v: &[f32], i: usize| unsafe { _mm256_loadu_ps(v.as_ptr().add(k + 8 * i)) };
                for i in 0..4 {
                    sums[i] = _mm256_fmadd_ps(load(x, i), load(w, i), sums[i]);
                }
            }
            let [a, b, c, d] = sums;
            fold256(_mm256_add_ps(_mm256_add_ps(a, c), _mm256_add_ps(b, d)))
        })
    }
}

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

/// Dot products of `R` vectors with `w`; all lengths are equal, a multiple of [`LANES`].
///
/// Each equals the product of its vector alone bit for bit.
#[inline]
fn dots<const R: usize>(x: [&[f32]; R], w: &[f32]) -> [f32; R] {
    let n = w.len();
    assert!(n.is_multiple_of(LANES) && x.iter().all(|x| x.len() == n), "lengths of a dot product");
    #[cfg(target_arch = "x86_64")]
    {
        // SAFETY: the features were detected, the lengths checked.
        match level() {
            Level::Avx512 => return unsafe { x86::dots512(x, w) },
            Level::Avx2 => return unsafe { x86::dots256(x, w) },
            Level::Plain => {}
        }
    }
    dots_plain(x, w)
}

/// Dot product of two vectors of equal length, a multiple of [`LANES`].
pub fn dot(x: &[f32], w: &[f32]) -> f32 {
    dots([x], w)[0]
}

/// Four dot products with one vector.
pub fn dot4(x: [&[f32]; 4], w: &[f32]) -> [f32; 4] {
    dots(x, w)
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
            let (x, w) = (noise(4 * n, 1), noise(n, 2));
            let rows: Vec<&[f32]> = x.chunks_exact(n).collect();
            let four = dot4([rows[0], rows[1], rows[2], rows[3]], &w);
            for (row, sum) in rows.iter().zip(four) {
                assert_eq!(sum.to_bits(), dot(row, &w).to_bits());
                assert_eq!(sum.to_bits(), dots_plain([row], &w)[0].to_bits());
                #[cfg(target_arch = "x86_64")]
                if level() != Level::Plain {
                    // SAFETY: the features were detected; lengths are multiples of the lanes.
                    assert_eq!(sum.to_bits(), unsafe { x86::dots256([row], &w)[0] }.to_bits());
                }
                let exact: f64 = row.iter().zip(&w).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                assert!((f64::from(sum) - exact).abs() < 1e-4);
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
