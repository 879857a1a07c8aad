// The words every kernel is written in, for the GPU and for the emulator on the CPU.
//
// A kernel takes one argument struct (its text is generated from the Rust struct) and is spelled
//   KERNEL(name, NameArgs, THREADS) { ... a.field ... }
// or, where registers must leave room for BLOCKS of them on a multiprocessor, KERNEL_RESIDENT(.., THREADS, BLOCKS).
// Shared memory is SHARED for fixed arrays and DYNAMIC_SHARED for what the launch sizes. Warp functions
// (shuffles, mma) are called by whole warps, block barriers by all threads that have not left.
// The specialisation (model sizes, numerics, tuning) arrives as macros.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifdef DSV4_EMULATED
#include "emulate.h"
#else
#define KERNEL(name, Args, THREADS) \
    extern "C" __global__ void __launch_bounds__(THREADS) name(const __grid_constant__ Args a)
#define KERNEL_RESIDENT(name, Args, THREADS, BLOCKS) \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) name(const __grid_constant__ Args a)
#define DEVICE __device__ __forceinline__
#define SHARED __shared__
#define DYNAMIC_SHARED(type, name)                             \
    extern __shared__ __align__(128) unsigned char dsv4_shared[]; \
    type* name = reinterpret_cast<type*>(dsv4_shared)
#define FULL_WARP 0xffffffffu
DEVICE float shuffle_xor(float v, int lane_mask) { return __shfl_xor_sync(FULL_WARP, v, lane_mask); }
DEVICE u32 shuffle_xor(u32 v, int lane_mask) { return __shfl_xor_sync(FULL_WARP, v, lane_mask); }
DEVICE float shuffle(float v, int lane) { return __shfl_sync(FULL_WARP, v, lane); }
DEVICE u32 shuffle(u32 v, int lane) { return __shfl_sync(FULL_WARP, v, lane); }
DEVICE u32 ballot(bool v) { return __ballot_sync(FULL_WARP, v); }
DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE u32 bits_of(float v) { return __float_as_uint(v); }
DEVICE float float_of(u32 v) { return __uint_as_float(v); }
DEVICE u32 count_bits(u32 v) { return __popc(v); }
DEVICE u32 atomic_add(u32* at, u32 v) { return atomicAdd(at, v); }
DEVICE void fence_device() { __threadfence(); }
DEVICE u32 warp_max(u32 v) { return __reduce_max_sync(FULL_WARP, v); }
#endif

#define LANES 32

DEVICE u32 lane_id() { return threadIdx.x % LANES; }
DEVICE u32 warp_id() { return threadIdx.x / LANES; }

// Activations: bfloat16 in the published numerics (where everything between operators is rounded to it),
// float32 in the float numerics, where nothing is rounded.
#if PUBLISHED
typedef u16 act_t;
#else
typedef float act_t;
#endif

// Nearest bfloat16, ties to even.
DEVICE u16 to_bf16(float x) {
    u32 bits = bits_of(x);
    return (u16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
DEVICE float from_bf16(u16 x) { return float_of((u32)x << 16); }
DEVICE float bf16_round(float x) { return from_bf16(to_bf16(x)); }

DEVICE float load(const float* at) { return *at; }
DEVICE float load(const u16* at) { return from_bf16(*at); }
DEVICE void store(float* at, float v) { *at = v; }
DEVICE void store(u16* at, float v) { *at = to_bf16(v); }

// Rounds to the activation format.
DEVICE float round_act(float x) {
#if PUBLISHED
    return bf16_round(x);
#else
    return x;
#endif
}

#ifndef DSV4_EMULATED
// The sum over a warp's lanes, on every lane. A fixed tree: the same bits always.
DEVICE float warp_sum(float v) {
#pragma unroll
    for (int m = LANES / 2; m > 0; m /= 2) v += shuffle_xor(v, m);
    return v;
}
DEVICE float warp_max(float v) {
#pragma unroll
    for (int m = LANES / 2; m > 0; m /= 2) {
        float o = shuffle_xor(v, m);
        v = o > v ? o : v;
    }
    return v;
}
#endif

// The sum over a block of THREADS, on every thread; `scratch` has one float per warp. Called by all threads.
template <int THREADS>
DEVICE float block_sum(float v, float* scratch) {
    constexpr int WARPS = THREADS / LANES;
    v = warp_sum(v);
    sync_block();
    if (lane_id() == 0) scratch[warp_id()] = v;
    sync_block();
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += scratch[w];
    return sum;
}

// Several values at once: 16 bytes of float32 or bfloat16 (8 bytes for four bfloat16), aligned to that.
DEVICE void load4(const float* at, float (&v)[4]) {
    float4 w = *reinterpret_cast<const float4*>(at);
    v[0] = w.x, v[1] = w.y, v[2] = w.z, v[3] = w.w;
}
DEVICE void store4(float* at, const float (&v)[4]) {
    float4 w;
    w.x = v[0], w.y = v[1], w.z = v[2], w.w = v[3];
    *reinterpret_cast<float4*>(at) = w;
}
DEVICE void widen_bf16x2(u32 w, float& lo, float& hi) {
    lo = float_of(w << 16);
    hi = float_of(w & 0xffff0000u);
}
// Two bfloat16 in a word, the lower one first.
DEVICE u32 pack_bf16x2(float lo, float hi) { return to_bf16(lo) | (u32)to_bf16(hi) << 16; }
DEVICE void load4(const u16* at, float (&v)[4]) {
    uint2 w = *reinterpret_cast<const uint2*>(at);
    widen_bf16x2(w.x, v[0], v[1]);
    widen_bf16x2(w.y, v[2], v[3]);
}
DEVICE void store4(u16* at, const float (&v)[4]) {
    uint2 w;
    w.x = pack_bf16x2(v[0], v[1]), w.y = pack_bf16x2(v[2], v[3]);
    *reinterpret_cast<uint2*>(at) = w;
}
DEVICE void load8(const float* at, float (&v)[8]) {
    float4 a = reinterpret_cast<const float4*>(at)[0], b = reinterpret_cast<const float4*>(at)[1];
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w;
    v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}
DEVICE void store8(float* at, const float (&v)[8]) {
    float4 a, b;
    a.x = v[0], a.y = v[1], a.z = v[2], a.w = v[3];
    b.x = v[4], b.y = v[5], b.z = v[6], b.w = v[7];
    reinterpret_cast<float4*>(at)[0] = a;
    reinterpret_cast<float4*>(at)[1] = b;
}
DEVICE void load8(const u16* at, float (&v)[8]) {
    uint4 w = *reinterpret_cast<const uint4*>(at);
    widen_bf16x2(w.x, v[0], v[1]);
    widen_bf16x2(w.y, v[2], v[3]);
    widen_bf16x2(w.z, v[4], v[5]);
    widen_bf16x2(w.w, v[6], v[7]);
}
DEVICE void store8(u16* at, const float (&v)[8]) {
    uint4 w;
    w.x = pack_bf16x2(v[0], v[1]), w.y = pack_bf16x2(v[2], v[3]);
    w.z = pack_bf16x2(v[4], v[5]), w.w = pack_bf16x2(v[6], v[7]);
    *reinterpret_cast<uint4*>(at) = w;
}
