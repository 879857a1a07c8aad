// Number formats and roundings, bit for bit as numerics.rs has them (SPEC 3.8).
#pragma once
#include "base.cuh"

DEVICE float ue8m0_value(u8 byte) { return byte == 0 ? float_of(1u << 22) : float_of((u32)byte << 23); }
// 2^e for exponents of normal numbers.
DEVICE float pow2(int e) { return float_of((u32)(e + 127) << 23); }

// Exponent of a group's power-of-two scale: ceil(log2(max(amax, floor) * (1/largest))).
DEVICE int scale_exponent(float amax, float inverse_largest, float floor) {
    u32 bits = bits_of((amax > floor ? amax : floor) * inverse_largest);
    return (int)((bits >> 23) & 0xff) - 127 + ((bits & 0x7fffffu) != 0);
}
#define FP8_INVERSE_MAX (1.0f / 448.0f)
#define FP8_AMAX_MIN 1e-4f
#define FP4_INVERSE_MAX (1.0f / 6.0f)
#define FP4_AMAX_MIN (6.0f * 1.17549435e-38f)

// Nearest E4M3 value, ties to even, saturating at 448.
DEVICE float e4m3_round(float x) {
    x = x < -448.0f ? -448.0f : x > 448.0f ? 448.0f : x;
    u32 bits = bits_of(x);
    float normal = float_of((bits + 0x7ffffu + ((bits >> 20) & 1u)) & 0xfff00000u);
    float subnormal = rintf(x * 512.0f) * (1.0f / 512.0f);
    return fabsf(x) < 0.015625f ? subnormal : normal;
}
// Nearest E2M1 value, ties to the even code, saturating at 6.
DEVICE float e2m1_round(float x) {
    float a = fminf(fabsf(x), 6.0f);
    float v = a < 2.0f ? rintf(a * 2.0f) * 0.5f : a < 4.0f ? rintf(a) : rintf(a * 0.5f) * 2.0f;
    return copysignf(v, x);
}
// Code of a value that is an E4M3 value exactly (bit 7 the sign).
DEVICE u8 e4m3_code(float v) {
    u32 bits = bits_of(v);
    float m = fabsf(v);
    u32 code = m < 0.015625f ? (u32)(m * 512.0f) : ((bits >> 20) & 0x7ffu) - (120u << 3);
    return (u8)(code | (bits >> 24 & 0x80u));
}
