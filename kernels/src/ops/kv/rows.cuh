// A row in the registers of one warp: of every 64 channels, lane l holds 64j + 2l and 64j + 2l + 1. Rotary pairs
// and the groups of 64 (FP8) and 32 (FP4) are then a lane's or a warp's own, and nothing goes through shared memory.
// A row's result depends on that row alone.
#include "base.cuh"
#include "numerics.cuh"

DEVICE float2 load_pair(const u16* at) {
    u32 v = *reinterpret_cast<const u32*>(at);
    return float2{float_of(v << 16), float_of(v & 0xffff0000u)};
}
DEVICE float2 load_pair(const float* at) { return *reinterpret_cast<const float2*>(at); }
DEVICE void store_pair(u16* at, float x, float y) { *reinterpret_cast<u32*>(at) = to_bf16(x) | (u32)to_bf16(y) << 16; }
DEVICE void store_pair(float* at, float x, float y) { *reinterpret_cast<float2*>(at) = float2{x, y}; }

template <int J, class T>
DEVICE void load_row(float (&v)[J][2], const T* from) {
#pragma unroll
    for (int j = 0; j < J; j++) {
        float2 p = load_pair(from + 64 * j + 2 * lane_id());
        v[j][0] = p.x;
        v[j][1] = p.y;
    }
}
template <int J, class T>
DEVICE void store_row(const float (&v)[J][2], T* to) {
#pragma unroll
    for (int j = 0; j < J; j++) store_pair(to + 64 * j + 2 * lane_id(), v[j][0], v[j][1]);
}
template <int J>
DEVICE void round_row(float (&v)[J][2]) {
#pragma unroll
    for (int j = 0; j < J; j++) {
        v[j][0] = round_act(v[j][0]);
        v[j][1] = round_act(v[j][1]);
    }
}
// (mean(x^2) + eps)^-1/2.
template <int J>
DEVICE float inverse_rms_row(const float (&v)[J][2], float eps) {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < J; j++) sum += v[j][0] * v[j][0] + v[j][1] * v[j][1];
    return 1.0f / sqrtf(warp_sum(sum) / (64 * J) + eps);
}
// w * (x * r), rounded.
template <int J>
DEVICE void norm_row(float (&v)[J][2], const float (&w)[J][2], float eps) {
    float r = inverse_rms_row(v, eps);
#pragma unroll
    for (int j = 0; j < J; j++) {
        v[j][0] = w[j][0] * (v[j][0] * r);
        v[j][1] = w[j][1] * (v[j][1] * r);
    }
    round_row(v);
}
// Turns the last ROPE_ channels, then rounds all.
template <int ROPE_, int J>
DEVICE void rotate_row(float (&v)[J][2], const float2* turns) {
#pragma unroll
    for (int j = J - ROPE_ / 64; j < J; j++) {
        float2 turn = turns[32 * (j - (J - ROPE_ / 64)) + lane_id()];
        float x = v[j][0], y = v[j][1];
        v[j][0] = x * turn.x - y * turn.y;
        v[j][1] = x * turn.y + y * turn.x;
    }
    round_row(v);
}
// The FP8 rounding of a stored row: the channels that are not rotated, in groups of 64.
template <int ROPE_, int J>
DEVICE void kv_round_row(float (&v)[J][2]) {
#if PUBLISHED
#pragma unroll
    for (int j = 0; j < J - ROPE_ / 64; j++) {
        float amax = warp_max(fmaxf(fabsf(v[j][0]), fabsf(v[j][1])));
        int e = scale_exponent(amax, FP8_INVERSE_MAX, FP8_AMAX_MIN);
        float scale = pow2(e), inverse = pow2(-e);
        v[j][0] = round_act(e4m3_round(v[j][0] * inverse) * scale);
        v[j][1] = round_act(e4m3_round(v[j][1] * inverse) * scale);
    }
#endif
}
// The indexer's rounding: Walsh-Hadamard in natural order times `scale`, then FP4 in groups of 32.
template <int J>
DEVICE void index_round_row(float (&v)[J][2], float scale) {
#if PUBLISHED
#pragma unroll
    for (int j = 0; j < J; j++) {
        float x = v[j][0], y = v[j][1];
        v[j][0] = x + y;
        v[j][1] = x - y;
    }
#pragma unroll
    for (int h = 1; h < LANES; h *= 2) {
        bool upper = lane_id() & h;
#pragma unroll
        for (int j = 0; j < J; j++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float other = shuffle_xor(v[j][i], h);
                v[j][i] = upper ? other - v[j][i] : v[j][i] + other;
            }
        }
    }
#pragma unroll
    for (int h = 1; h < J; h *= 2) {
#pragma unroll
        for (int j = 0; j < J; j++) {
            if (j & h) continue;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float x = v[j][i], y = v[j + h][i];
                v[j][i] = x + y;
                v[j + h][i] = x - y;
            }
        }
    }
#pragma unroll
    for (int j = 0; j < J; j++) {
        float x = round_act(v[j][0] * scale), y = round_act(v[j][1] * scale);
        float amax = fmaxf(fabsf(x), fabsf(y));
#pragma unroll
        for (int m = 8; m > 0; m /= 2) amax = fmaxf(amax, shuffle_xor(amax, m));
        int e = scale_exponent(amax, FP4_INVERSE_MAX, FP4_AMAX_MIN);
        float step = pow2(e), inverse = pow2(-e);
        v[j][0] = round_act(e2m1_round(x * inverse) * step);
        v[j][1] = round_act(e2m1_round(y * inverse) * step);
    }
#endif
}
