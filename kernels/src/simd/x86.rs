//! The same order in vector instructions, which compilers do not find by themselves.

use std::arch::x86_64::*;

use super::{FP4_GROUP, FP8_TILE, LANES};
use crate::numerics::{e2m1_value, ue8m0_value};

#[target_feature(enable = "avx2,fma")]
fn fold256(v: __m256) -> f32 {
    let v = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    let v = _mm_add_ps(v, _mm_movehl_ps(v, v));
    _mm_cvtss_f32(_mm_add_ss(v, _mm_movehdup_ps(v)))
}

/// The sums of 32 lanes, the low and the high half.
#[target_feature(enable = "avx512f,avx512dq,avx2,fma")]
fn fold512([low, high]: [__m512; 2]) -> f32 {
    let v = _mm512_add_ps(low, high);
    fold256(_mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)))
}

/// Products of every `w` with every `x`. Lengths are checked by the caller: all equal, a multiple of [`LANES`].
#[target_feature(enable = "avx512f,avx512dq,avx2,fma")]
pub fn tile512<const W: usize, const X: usize>(w: [&[f32]; W], x: [&[f32]; X]) -> [[f32; X]; W] {
    let mut sums = [[[_mm512_setzero_ps(); 2]; X]; W];
    for k in (0..w[0].len()).step_by(LANES) {
        for half in 0..2 {
            // SAFETY: `k + 32` is at most the length of every `w` and `x`.
            let load = |v: &[f32]| unsafe { _mm512_loadu_ps(v.as_ptr().add(k + 16 * half)) };
            let x = x.map(load);
            for (sums, w) in sums.iter_mut().zip(w) {
                let w = load(w);
                for (sums, x) in sums.iter_mut().zip(x) {
                    sums[half] = _mm512_fmadd_ps(x, w, sums[half]);
                }
            }
        }
    }
    sums.map(|row| row.map(|sums| fold512(sums)))
}

/// As [`tile512`].
#[target_feature(enable = "avx2,fma")]
pub fn tile256<const W: usize, const X: usize>(w: [&[f32]; W], x: [&[f32]; X]) -> [[f32; X]; W] {
    w.map(|w| {
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
    })
}

/// 32 E4M3 codes times a scale that has the rebias of [`widen_e4m3`] in it.
///
/// # Safety
/// 32 bytes can be read from `codes`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
unsafe fn e4m3x32(codes: *const u8, scale: __m512) -> [__m512; 2] {
    // SAFETY: as the caller promises.
    let bytes = unsafe { _mm256_loadu_si256(codes.cast()) };
    let mask = _mm512_set1_epi16(0xbf80_u16 as i16);
    let halves = _mm512_and_si512(_mm512_slli_epi16(_mm512_cvtepi8_epi16(bytes), 7), mask);
    let low = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
    let high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
    [_mm512_mul_ps(low, scale), _mm512_mul_ps(high, scale)]
}

/// 16 bytes of E2M1 pairs times a scale, in column order.
///
/// # Safety
/// 16 bytes can be read from `codes`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
unsafe fn e2m1x32(codes: *const u8, table: __m512, scale: __m512) -> [__m512; 2] {
    let first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    let second = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    // SAFETY: as the caller promises.
    let codes = _mm512_cvtepu8_epi32(unsafe { _mm_loadu_si128(codes.cast()) });
    // The permutation reads the low four bits of an index only.
    let table = _mm512_mul_ps(table, scale);
    let even = _mm512_permutexvar_ps(codes, table);
    let odd = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), table);
    [_mm512_permutex2var_ps(even, first, odd), _mm512_permutex2var_ps(even, second, odd)]
}

/// The values of the 16 E2M1 codes.
#[target_feature(enable = "avx512f")]
fn e2m1_table() -> __m512 {
    let table: [f32; 16] = std::array::from_fn(|code| e2m1_value(code as u8));
    // SAFETY: the table has 16 values.
    unsafe { _mm512_loadu_ps(table.as_ptr()) }
}

/// Products of `x` with FP8 rows, widened on the way. Lengths are checked by the caller: rows as long as `x`,
/// a multiple of [`LANES`], a scale for every 128 columns, none above 2^119 (`scale * 256` is finite).
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
pub fn dots_fp8<const R: usize>(rows: [(&[u8], &[u8]); R], x: &[f32]) -> [f32; R] {
    let mut sums = [[_mm512_setzero_ps(); 2]; R];
    for k in (0..x.len()).step_by(LANES) {
        // SAFETY: 32 values from `k` on are inside `x` and every row.
        let (low, high) = unsafe { (_mm512_loadu_ps(x.as_ptr().add(k)), _mm512_loadu_ps(x.as_ptr().add(k + 16))) };
        for (sums, (codes, scales)) in sums.iter_mut().zip(rows) {
            let scale = _mm512_set1_ps(256.0 * ue8m0_value(scales[k / FP8_TILE]));
            // SAFETY: as above.
            let [a, b] = unsafe { e4m3x32(codes.as_ptr().add(k), scale) };
            *sums = [_mm512_fmadd_ps(low, a, sums[0]), _mm512_fmadd_ps(high, b, sums[1])];
        }
    }
    sums.map(|sums| fold512(sums))
}

/// Products of `x` with FP4 rows, widened on the way. Lengths are checked by the caller: 16 bytes and a scale
/// for every 32 values of `x`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
pub fn dots_fp4<const R: usize>(rows: [(&[u8], &[u8]); R], x: &[f32]) -> [f32; R] {
    let table = e2m1_table();
    let mut sums = [[_mm512_setzero_ps(); 2]; R];
    for k in (0..x.len()).step_by(LANES) {
        // SAFETY: 32 values from `k` on are inside `x`.
        let (low, high) = unsafe { (_mm512_loadu_ps(x.as_ptr().add(k)), _mm512_loadu_ps(x.as_ptr().add(k + 16))) };
        for (sums, (codes, scales)) in sums.iter_mut().zip(rows) {
            let scale = _mm512_set1_ps(ue8m0_value(scales[k / FP4_GROUP]));
            // SAFETY: 16 bytes from `k / 2` on are inside the row.
            let [a, b] = unsafe { e2m1x32(codes.as_ptr().add(k / 2), table, scale) };
            *sums = [_mm512_fmadd_ps(low, a, sums[0]), _mm512_fmadd_ps(high, b, sums[1])];
        }
    }
    sums.map(|sums| fold512(sums))
}

/// Products of `x` with bfloat16 rows, widened on the way. Lengths are checked by the caller: two bytes for
/// every value of `x`, a multiple of [`LANES`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")]
pub fn dots_bf16<const R: usize>(rows: [&[u8]; R], x: &[f32]) -> [f32; R] {
    let mut sums = [[_mm512_setzero_ps(); 2]; R];
    for k in (0..x.len()).step_by(LANES) {
        for half in 0..2 {
            let at = k + 16 * half;
            // SAFETY: 16 values from `at` on are inside `x`.
            let x = unsafe { _mm512_loadu_ps(x.as_ptr().add(at)) };
            for (sums, row) in sums.iter_mut().zip(rows) {
                // SAFETY: 32 bytes from `2 * at` on are inside the row.
                let bits = unsafe { _mm256_loadu_si256(row.as_ptr().add(2 * at).cast()) };
                let w = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
                sums[half] = _mm512_fmadd_ps(x, w, sums[half]);
            }
        }
    }
    sums.map(|sums| fold512(sums))
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
    let table = e2m1_table();
    for (g, scale) in scales.iter().enumerate() {
        let scale = _mm512_set1_ps(ue8m0_value(*scale));
        // SAFETY: group `g` has 16 bytes of codes and 32 values, both inside the slices.
        unsafe {
            let [low, high] = e2m1x32(codes.as_ptr().add(16 * g), table, scale);
            _mm512_storeu_ps(out.as_mut_ptr().add(32 * g), low);
            _mm512_storeu_ps(out.as_mut_ptr().add(32 * g + 16), high);
        }
    }
}
