//! Number formats and roundings, exactly as the model was trained with (SPEC 3.8).

/// Which activation arithmetic to use. Weights are exact in both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numerics {
    /// No activation is rounded: float32 throughout.
    Float,
    /// As published: bfloat16 between operators, FP8 activations before FP8/FP4 matmuls, FP8 KV, FP4 indexer.
    Published,
}

impl Numerics {
    /// Name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Numerics::Float => "float",
            Numerics::Published => "published",
        }
    }

    /// Bytes of an activation as a GPU stores it.
    pub fn act_bytes(self) -> u64 {
        match self {
            Numerics::Float => 4,
            Numerics::Published => 2,
        }
    }
}

/// Rounds to bfloat16, ties to even.
#[inline(always)]
pub fn bf16_round(x: f32) -> f32 {
    let bits = x.to_bits();
    f32::from_bits((bits.wrapping_add(0x7fff + ((bits >> 16) & 1))) & 0xffff_0000)
}

/// Largest E4M3 magnitude.
const E4M3_MAX: f32 = 448.0;
/// Smallest amax an FP8 activation scale is made for.
const FP8_AMAX_MIN: f32 = 1e-4;
/// Smallest amax an FP4 scale is made for: 6 * 2^-126.
const FP4_AMAX_MIN: f32 = 6.0 * f32::MIN_POSITIVE;
/// Values under one FP4 scale of the indexer.
pub const FP4_GROUP: usize = 32;

/// 2^e for exponents of normal numbers.
#[inline(always)]
fn pow2(e: i32) -> f32 {
    f32::from_bits(((e + 127) as u32) << 23)
}

/// Value of a UE8M0 scale byte: 2^(byte-127). Byte 0 is the subnormal 2^-127; 255 (NaN) is refused when packing.
#[inline(always)]
pub fn ue8m0_value(byte: u8) -> f32 {
    if byte == 0 { f32::from_bits(1 << 22) } else { f32::from_bits(u32::from(byte) << 23) }
}

/// Exponent of the power-of-two scale for a group: ceil(log2(amax * (1/max))), from the float's bits.
#[inline(always)]
fn scale_exponent(amax: f32, format_max: f32, floor: f32) -> i32 {
    let bits = (amax.max(floor) * (1.0 / format_max)).to_bits();
    ((bits >> 23) & 0xff) as i32 - 127 + i32::from(bits & 0x7f_ffff != 0)
}

/// Rounds to the nearest E4M3 value, ties to even, saturating at 448.
#[inline(always)]
pub fn e4m3_round(x: f32) -> f32 {
    let x = x.clamp(-E4M3_MAX, E4M3_MAX);
    let bits = x.to_bits();
    // Normal numbers keep 3 of 23 mantissa bits; below 2^-6 the step is 2^-9.
    let normal = f32::from_bits(bits.wrapping_add(0x7_ffff + ((bits >> 20) & 1)) & 0xfff0_0000);
    let subnormal = (x * 512.0).round_ties_even() * (1.0 / 512.0);
    if x.abs() < 0.015_625 { subnormal } else { normal }
}

/// Value of an E4M3 code (bit 7 sign, 4 exponent, 3 mantissa bits).
#[inline(always)]
pub fn e4m3_value(code: u8) -> f32 {
    let magnitude = (u32::from(code) & 0x7f) << 20;
    // Adding the exponent difference is right for normal codes; subnormal ones lack the hidden bit.
    let shifted = f32::from_bits(magnitude + (120 << 23));
    let value = if magnitude < (1 << 23) { 2.0 * shifted - 0.015_625 } else { shifted };
    f32::from_bits(value.to_bits() | (u32::from(code) & 0x80) << 24)
}

/// Values of the E2M1 codes 0..8.
const E2M1: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

/// Value of an E2M1 code (bit 3 sign).
pub const fn e2m1_value(code: u8) -> f32 {
    let value = E2M1[(code & 7) as usize];
    if code & 8 != 0 { -value } else { value }
}

/// Rounds to the nearest E2M1 value, ties to the even code, saturating at 6.
#[inline(always)]
pub fn e2m1_round(x: f32) -> f32 {
    let a = x.abs().min(6.0);
    // The step is 0.5 below 2, 1 below 4, else 2; ties-to-even of the scaled value is the even code.
    let value = if a < 2.0 {
        (a * 2.0).round_ties_even() * 0.5
    } else if a < 4.0 {
        a.round_ties_even()
    } else {
        (a * 0.5).round_ties_even() * 2.0
    };
    value.copysign(x)
}

fn amax(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |m, v| m.max(v.abs()))
}

/// Rounds `x` to E4M3 with one power-of-two scale per `group` values, in place. Lengths must be whole groups.
pub fn fake_fp8(x: &mut [f32], group: usize) {
    crate::simd::fake_fp8(x, group);
}

#[inline(always)]
pub(crate) fn fake_fp8_body(x: &mut [f32], group: usize) {
    debug_assert!(x.len().is_multiple_of(group));
    for g in x.chunks_exact_mut(group) {
        let e = scale_exponent(amax(g), E4M3_MAX, FP8_AMAX_MIN);
        let (scale, inverse) = (pow2(e), pow2(-e));
        for v in g {
            *v = e4m3_round(*v * inverse) * scale;
        }
    }
}

/// Rounds `x` to E2M1 with one power-of-two scale per 32 values, in place.
pub fn fake_fp4(x: &mut [f32]) {
    debug_assert!(x.len().is_multiple_of(FP4_GROUP));
    for g in x.chunks_exact_mut(FP4_GROUP) {
        let e = scale_exponent(amax(g), 6.0, FP4_AMAX_MIN);
        let scale = pow2(e);
        for v in g {
            // Dividing: the inverse of the smallest scale is not finite.
            *v = e2m1_round(*v / scale) * scale;
        }
    }
}

/// Walsh-Hadamard transform in natural order, scaled by n^-1/2, in place. The length is a power of two.
pub fn hadamard(x: &mut [f32]) {
    let n = x.len();
    debug_assert!(n.is_power_of_two());
    let mut h = 1;
    while h < n {
        for pair in x.chunks_exact_mut(2 * h) {
            let (a, b) = pair.split_at_mut(h);
            for (a, b) in a.iter_mut().zip(b) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        h *= 2;
    }
    let scale = (1.0 / (n as f64).sqrt()) as f32;
    for v in x {
        *v *= scale;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e4m3_codes_are_fixed_points_and_midpoints_go_to_even() {
        let mut values: Vec<f32> = (0..0x7fu8).map(e4m3_value).collect();
        assert_eq!((values[1], values[7], values[8], values[0x7e]), (2f32.powi(-9), 0.013_671_875, 0.015_625, 448.0));
        for (code, v) in values.iter().enumerate() {
            assert_eq!(e4m3_round(*v), *v);
            assert_eq!(e4m3_round(-*v), -*v);
            assert_eq!(e4m3_value(code as u8 | 0x80), -*v);
        }
        values.dedup();
        for (code, pair) in values.windows(2).enumerate() {
            let even = if code % 2 == 0 { pair[0] } else { pair[1] };
            assert_eq!(e4m3_round((pair[0] + pair[1]) / 2.0), even, "between {pair:?}");
        }
        assert_eq!(e4m3_round(1e9), 448.0);
    }

    #[test]
    fn bf16_ties_to_even() {
        assert_eq!(bf16_round(f32::from_bits(0x3f80_8000)).to_bits(), 0x3f80_0000);
        assert_eq!(bf16_round(f32::from_bits(0x3f81_8000)).to_bits(), 0x3f82_0000);
        assert_eq!(bf16_round(f32::from_bits(0x3f80_8001)).to_bits(), 0x3f81_0000);
        assert_eq!(bf16_round(-0.0).to_bits(), (-0.0f32).to_bits());
    }

    #[test]
    fn hadamard_is_its_own_inverse() {
        let x: Vec<f32> = (0..64).map(|i| ((i * 37 % 29) as f32) - 11.0).collect();
        let mut y = x.clone();
        hadamard(&mut y);
        hadamard(&mut y);
        for (a, b) in x.iter().zip(&y) {
            assert!((a - b).abs() < 1e-4);
        }
    }
}
