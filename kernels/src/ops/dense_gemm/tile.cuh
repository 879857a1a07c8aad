// One tile of y = x W^T on the tensor cores: TOKENS rows of x, OUTS rows of W, in float32. Published numerics only.
//
// x is bfloat16; W is bfloat16, E4M3 (a scale per 128x128) or E2M1 (a scale per row and 32 columns). Both come to
// shared memory as they are stored (cp.async, STAGES deep, 64 columns a stage); codes become bfloat16 in registers
// on their way to the mma, exactly: every scale is a power of two.
//
// The 16-row side of an mma is W, the 8-column side x: codes can be widened straight into the registers that an mma
// wants. Which columns an mma sums is free as long as both operands agree: of 32 columns lane q of four takes 8q..8q+7,
// so that a lane's part of a row is contiguous in shared memory in every format (one load, no bank conflicts) and
// neighbours in x are neighbours in W. Bfloat16 weights come by ldmatrix instead, and so does x then. Which output a
// row of the mma is, is free too: rows of W are put into shared memory in such an order that a lane ends up with
// consecutive outputs.
//
// Codes are scaled by 2^(scale - 32), which keeps all scales up to 2^33 within bfloat16; finish() gives the 2^32 back.
#include "base.cuh"
#include "ptx.cuh"
#include "numerics.cuh"

#define WEIGHT_BF16 1
#define WEIGHT_FP8 2
#define WEIGHT_FP4 3

// Columns of a stage, and outputs of a warp.
#define STAGE_COLS 64
#define WARP_OUTS 64

// The shape of a block's work. WARPS_M warps share the tokens, OUTS / 64 the outputs. PAIRED: every 64 rows of W are
// 32 of one matrix and 32 of another, and a lane has 4 consecutive outputs of each instead of 8.
template <int TOKENS_, int OUTS_, int WARPS_M_, int STAGES_, int FORMAT_, bool PAIRED_>
struct TileShape {
    static constexpr int TOKENS = TOKENS_, OUTS = OUTS_, WARPS_M = WARPS_M_, STAGES = STAGES_, FORMAT = FORMAT_;
    static constexpr bool PAIRED = PAIRED_;
    static constexpr int WARPS_N = OUTS / WARP_OUTS, BLOCK = LANES * WARPS_M * WARPS_N;
    static constexpr int WARP_TOKENS = TOKENS / WARPS_M, TOKEN_TILES = WARP_TOKENS / 8;
    // Bytes of a row of W in a stage, its 16-byte chunks, and what a lane reads of its 32 columns.
    static constexpr int ROW_BYTES = FORMAT == WEIGHT_BF16 ? 128 : FORMAT == WEIGHT_FP8 ? 64 : 32;
    static constexpr int CHUNKS = ROW_BYTES / 16, LANE_BYTES = ROW_BYTES / 8;
    static constexpr int X_BYTES = TOKENS * 128, STAGE_BYTES = X_BYTES + OUTS * ROW_BYTES;
    static constexpr int SHARED_BYTES = STAGE_BYTES * STAGES;
    // Copies of a thread in a stage, and the rows between them.
    static constexpr int X_COPIES = TOKENS * 8 / BLOCK, X_STEP = BLOCK / 8;
    static constexpr int W_COPIES = OUTS * CHUNKS / BLOCK, W_STEP = BLOCK / CHUNKS;
    static_assert(X_COPIES * X_STEP == TOKENS && X_STEP % 8 == 0, "tokens are not whole copies");
    static_assert(W_COPIES * W_STEP == OUTS, "outputs are not whole copies");
    static_assert(W_STEP % 64 == 0 || (W_STEP == 32 && FORMAT != WEIGHT_FP4), "copies change their swizzle");
    static_assert(WARP_TOKENS % 8 == 0 && OUTS % WARP_OUTS == 0, "not whole mma tiles");
};

// What a thread copies and scales: filled by the kernel, for its rows.
template <class T>
struct TileSource {
    const u16* x;
    // Of its even and odd copies: the same but where a tile mixes two matrices.
    const u8* w[2];
    // Where its copies start, in 16-byte units from x and w: row and chunk.
    u32 x_at[T::X_COPIES], w_at[T::W_COPIES];
    // Scale rows of the first and the second four of this lane's outputs (for FP8 the same for all lanes).
    const u8* scales[2];
    // FP4: bytes of a scale row.
    u32 scale_row;
    // Stages in all: columns / 64.
    u32 steps;
};

// Place in shared memory of row r of W: 16 * m + 8 * h + l for output 2m + h of the lanes l * 4 .. l * 4 + 3.
template <class T>
DEVICE u32 weight_place(u32 r) {
    if constexpr (T::PAIRED) return (r & ~31u) + 16 * (r / 2 % 2) + 8 * (r % 2) + r / 4 % 8;
    return (r & ~63u) + 16 * (r / 2 % 4) + 8 * (r % 2) + r / 8 % 8;
}
// Which bits of a row's number are put over those of its chunks, so that a warp's reads fall into different banks:
// for ldmatrix all, otherwise the halves of rows are swapped.
template <class T>
DEVICE u32 swizzle_x(u32 row) {
    return T::FORMAT == WEIGHT_BF16 ? row % 8 : row % 2 * 4;
}
template <class T>
DEVICE u32 swizzle_w(u32 place) {
    return T::FORMAT == WEIGHT_BF16 ? place % 8 : T::FORMAT == WEIGHT_FP8 ? place / 2 % 2 * 2 : place / 4 % 2;
}

// This thread's row and chunk of x and of W in its first copy; the next rows are X_STEP and W_STEP further.
DEVICE u32 copy_x_row() { return threadIdx.x / 8; }
DEVICE u32 copy_x_chunk() { return threadIdx.x % 8; }
template <class T>
DEVICE u32 copy_w_row() {
    return threadIdx.x / T::CHUNKS;
}
template <class T>
DEVICE u32 copy_w_chunk() {
    return threadIdx.x % T::CHUNKS;
}
// The first of this lane's consecutive outputs.
template <class T>
DEVICE u32 lane_out() {
    return lane_id() / 4 * (T::PAIRED ? 4 : 8);
}

template <class T>
DEVICE void copy_stage(u8* stage, const TileSource<T>& s, u32 step) {
    u32 row = copy_x_row();
    u8* to = stage + row * 128 + (copy_x_chunk() ^ swizzle_x<T>(row)) * 16;
    const u8* x = reinterpret_cast<const u8*>(s.x) + (u64)step * 128;
#pragma unroll
    for (int i = 0; i < T::X_COPIES; i++) copy_async16(to + i * T::X_STEP * 128, x + (u64)s.x_at[i] * 16);
    u32 place = weight_place<T>(copy_w_row<T>());
    to = stage + T::X_BYTES + place * T::ROW_BYTES;
#pragma unroll
    for (int i = 0; i < T::W_COPIES; i++) {
        // Rows 32 further are 4 places further, or 32 where they are of another matrix.
        u32 further = T::W_STEP == 32 ? i / 2 * 64 + i % 2 * (T::PAIRED ? 32 : 4) : i * T::W_STEP;
        u32 at = (copy_w_chunk<T>() ^ swizzle_w<T>(place + further)) * 16;
        const u8* w = s.w[i % 2] + (u64)step * T::ROW_BYTES;
        copy_async16_wide(to + further * T::ROW_BYTES + at, w + (u64)s.w_at[i] * 16);
    }
}

// A scale byte as what codes are multiplied by, twice: 2^(byte - 127 - 32) and what their place in bfloat16 lacks.
template <int FORMAT>
DEVICE u32 code_scale(u32 byte) {
    constexpr u32 lacks = FORMAT == WEIGHT_FP8 ? 120 : 126;
    return byte * 0x00800080u + (lacks - 32) * 0x00800080u;
}

// Eight codes of a row as four pairs of bfloat16: a code's bits behind its sign, which is left where it fills up.
DEVICE void widen_fp8(u32 (&out)[4], uint2 codes, u32 scale) {
    u32 words[2] = {codes.x, codes.y};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 t = permute_bytes(words[i / 2], 0, i % 2 ? 0xb3a2 : 0x9180);
        out[i] = mul_bf16x2(t << 4 & 0x87f087f0u, scale);
    }
}
DEVICE void widen_fp4(u32 (&out)[4], u32 codes, u32 scale) {
    u32 low = codes << 4;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 t = permute_bytes(low, codes, 0xc480 + i * 0x1111);
        out[i] = mul_bf16x2(t << 2 & 0x81c081c0u, scale);
    }
}

// Sums of a warp: [output 2m + h of the lane][8 tokens: 2q and 2q + 1 are this lane's], with h * 2 + (token % 2) last.
template <class T>
struct TileSums {
    float v[4][T::TOKEN_TILES][4];
};

// Adds a stage: 2 x 32 columns. `scale`: FP8 as multiplied by, for m / 2; FP4 two bytes for output 2m + h.
template <class T>
DEVICE void add_stage(TileSums<T>& sums, const u8* stage, const u32 (&scale)[8], u32 warp_m, u32 warp_n) {
    u32 lane = lane_id(), row = T::FORMAT == WEIGHT_BF16 ? lane % 8 : lane / 4;
    const u8* x = stage + (warp_m * T::WARP_TOKENS + row) * 128;
    const u8* w = stage + T::X_BYTES + (warp_n * WARP_OUTS + row) * T::ROW_BYTES;
#pragma unroll
    for (int half = 0; half < 2; half++) {
        // Of the step's two mma, for every 16 outputs.
        u32 a[2][4][4];
#pragma unroll
        for (int m = 0; m < 4; m++) {
            if constexpr (T::FORMAT == WEIGHT_BF16) {
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    u32 chunk = (half * 4 + k * 2 + lane / 16) ^ swizzle_w<T>(row);
                    load_matrix_x4(a[k][m], w + (m * 16 + lane / 8 % 2 * 8) * T::ROW_BYTES + chunk * 16);
                }
            } else {
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    u32 at = ((half * T::CHUNKS / 2) ^ swizzle_w<T>(row)) * 16 + lane % 4 * T::LANE_BYTES;
                    const u8* codes = w + (m * 16 + h * 8) * T::ROW_BYTES + at;
                    u32 wide[4];
                    if constexpr (T::FORMAT == WEIGHT_FP8) {
                        widen_fp8(wide, *reinterpret_cast<const uint2*>(codes), scale[m / 2]);
                    } else {
                        u32 byte = half ? scale[2 * m + h] >> 8 : scale[2 * m + h] & 0xff;
                        widen_fp4(wide, *reinterpret_cast<const u32*>(codes), code_scale<T::FORMAT>(byte));
                    }
#pragma unroll
                    for (int i = 0; i < 4; i++) a[i / 2][m][i % 2 * 2 + h] = wide[i];
                }
            }
        }
#pragma unroll
        for (int j = 0; j < T::TOKEN_TILES; j++) {
            u32 b[4];
            if constexpr (T::FORMAT == WEIGHT_BF16) {
                load_matrix_x4(b, x + j * 8 * 128 + ((half * 4 + lane / 8) ^ swizzle_x<T>(row)) * 16);
            } else {
                u32 chunk = (half * 4 + lane % 4) ^ swizzle_x<T>(row);
                uint4 v = *reinterpret_cast<const uint4*>(x + j * 8 * 128 + chunk * 16);
                b[0] = v.x, b[1] = v.y, b[2] = v.z, b[3] = v.w;
            }
#pragma unroll
            for (int k = 0; k < 2; k++)
#pragma unroll
                for (int m = 0; m < 4; m++) {
                    u32 pair[2] = {b[2 * k], b[2 * k + 1]};
                    mma_bf16(sums.v[m][j], a[k][m], pair);
                }
        }
    }
}

// The scales of a stage as read: FP8 one byte for each four outputs, FP4 two bytes (32 columns each) for each output.
template <class T>
DEVICE void read_scales(u32 (&raw)[8], const TileSource<T>& s, u32 step) {
    if constexpr (T::FORMAT == WEIGHT_FP8) {
        raw[0] = s.scales[0][step / 2];
        raw[1] = s.scales[1][step / 2];
    } else if constexpr (T::FORMAT == WEIGHT_FP4) {
#pragma unroll
        for (int i = 0; i < 8; i++)
            raw[i] = *reinterpret_cast<const u16*>(s.scales[i / 4] + (u64)(i % 4) * s.scale_row + 2 * step);
    }
}

// The whole product. `shared` has SHARED_BYTES; called by all threads; ends with a barrier.
template <class T>
DEVICE void multiply_tile(TileSums<T>& sums, u8* shared, const TileSource<T>& s) {
    u32 warp_m = warp_id() / T::WARPS_N, warp_n = warp_id() % T::WARPS_N;
#pragma unroll
    for (int m = 0; m < 4; m++)
#pragma unroll
        for (int j = 0; j < T::TOKEN_TILES; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) sums.v[m][j][i] = 0.0f;
#pragma unroll
    for (int i = 0; i < T::STAGES - 1; i++) {
        if ((u32)i < s.steps) copy_stage<T>(shared + i * T::STAGE_BYTES, s, i);
        copy_commit();
    }
    u32 next[8] = {}, scale[8];
    read_scales<T>(next, s, 0);
    u32 reading = 0, writing = T::STAGES - 1;
#pragma unroll 1
    for (u32 step = 0; step < s.steps; step++) {
        copy_wait<T::STAGES - 2>();
        // Every thread's copies of this stage are there, and all have left the stage that is written next.
        sync_block();
        if (step + T::STAGES - 1 < s.steps) copy_stage<T>(shared + writing * T::STAGE_BYTES, s, step + T::STAGES - 1);
        copy_commit();
#pragma unroll
        for (int j = 0; j < 8; j++) scale[j] = T::FORMAT == WEIGHT_FP8 ? code_scale<T::FORMAT>(next[j]) : next[j];
        // A stage ahead: their latency hides behind the mma.
        read_scales<T>(next, s, step + 1 < s.steps ? step + 1 : step);
        add_stage<T>(sums, shared + reading * T::STAGE_BYTES, scale, warp_m, warp_n);
        reading = reading + 1 == T::STAGES ? 0 : reading + 1;
        writing = writing + 1 == T::STAGES ? 0 : writing + 1;
    }
    copy_wait<0>();
    sync_block();
}

// Output i of this lane's eight, for token 8 * tile + 2q + odd of the warp.
template <class T>
DEVICE float finish(const TileSums<T>& sums, int tile, int odd, int i) {
    constexpr float unit = T::FORMAT == WEIGHT_BF16 ? 1.0f : 4294967296.0f;
    return sums.v[i / 2][tile][i % 2 * 2 + odd] * unit;
}
// Which token of the block that is.
template <class T>
DEVICE u32 lane_token(int tile, int odd) {
    return warp_id() / T::WARPS_N * T::WARP_TOKENS + tile * 8 + lane_id() % 4 * 2 + odd;
}
