// Weights streamed once past a few rows of activations: what the decode kernels of dense_gemm and moe_gemm share.
//
// A tile is 16 rows of a stored matrix. A step is 128 bytes of each of them (64 BF16, 128 FP8, 256 FP4 columns): lane
// (g, c) = (lane / 4, lane % 4) has 16 bytes at c * 16 and at 64 + c * 16 of rows g and g + 8, four copies of 16
// bytes. The tensor cores' order of columns is ours to choose, so a lane multiplies what it has copied: weights are
// the 16-row operand, rows of activations the 8 columns. A warp walks over (tile, step) pairs with DEPTH steps on
// their way, across tiles: cp.async brings them into the warp's own ring in shared memory, where a lane reads back
// what it has asked for itself (only FP4's scales are shared by the four lanes of a group), so that no registers and no
// block barriers are needed and a block leaves room for the next kernel's. `split` warps share a tile, each with a slice of its steps; their partial sums meet in shared memory and
// are added in warp order. The split depends on the matrix and on WARPS alone, and a column of the operand does not
// see the others: a row's bits are the same alone or among others, for every grid and every ROWS.
//
// Weights are the same whatever earlier kernels do. Before a block waits for those it fills its ring and asks for its
// share of the weights into the L2 cache, up to what the launch allows it.
//
// Activations lie in shared memory in the order of the operands: units of 8 columns (16 bytes), such that the four
// lanes of a group read 64 bytes in a row, and rows 64 bytes apart modulo 128: no bank conflicts.
//
// Macros: WARPS, THREADS = 32 * WARPS, DEPTH (steps on their way), RESIDENT (blocks of a kernel that registers leave
// room for).
#include "base.cuh"
#include "ptx.cuh"
#include "numerics.cuh"

#define FORMAT_F32 0
#define FORMAT_BF16 1
#define FORMAT_FP8 2
#define FORMAT_FP4 3
#define TILE_ROWS 16
#define STEP_BYTES 128
#define STEP_WEIGHTS (TILE_ROWS * STEP_BYTES)
// What lanes ask for of a step: first the weights, then 4 bytes of scales each.
#define SLOT_BYTES (STEP_WEIGHTS + LANES * 4)
#define RING_BYTES (WARPS * DEPTH * SLOT_BYTES)
// A prefetch of a thread.
#define PREFETCH_BYTES 4096u

// Warps that share a tile: a power of two, as many as there are and as there are steps.
DEVICE u32 split_of(u32 steps, u32 warps) {
    u32 split = 1;
    while (split * 2 <= warps && split * 2 <= steps) split *= 2;
    return split;
}
DEVICE u32 steps_of(u32 row_bytes) { return (row_bytes + STEP_BYTES - 1) / STEP_BYTES; }

// Asks for `bytes` from `at` on into the L2 cache. Called by whole blocks.
DEVICE void prefetch(const u8* at, u32 bytes) {
    for (u32 p = (lane_id() * WARPS + warp_id()) * PREFETCH_BYTES; p < bytes; p += THREADS * PREFETCH_BYTES)
        prefetch_l2(at + p, bytes - p < PREFETCH_BYTES ? bytes - p : PREFETCH_BYTES);
}

// Where a warp works: tiles first, first + stride, .. below `tiles`, of each the steps begin..end.
struct Slice {
    u32 first, stride, tiles, begin, end, row_bytes, part, split;
};
// Warp `warp` of `warps` that share `tiles` tiles.
DEVICE Slice slice_of(u32 warp, u32 warps, u32 tiles, u32 row_bytes, u32 split) {
    u32 steps = steps_of(row_bytes), part = warp % split;
    return Slice{warp / split, warps / split, tiles, steps * part / split, steps * (part + 1) / split, row_bytes, part, split};
}

// A lane's view of a tile: the matrix, and its rows a and b of it. Rows past the end are the last one again, and
// thrown away.
struct Strip {
    const u8* w;
    u32 a, b;
};
DEVICE Strip strip_at(const u8* w, u32 tile, u32 rows) {
    u32 a = tile * TILE_ROWS + lane_id() / 4, b = a + 8;
    return Strip{w, a < rows ? a : rows - 1, b < rows ? b : rows - 1};
}
// Where the FP8 scales of a tile of a stored matrix are, of which its row 0 is `row0`.
DEVICE u32 scales_before(u32 row0, u32 tile, u32 cols) { return (row0 + tile * TILE_ROWS) / 128 * ((cols + 127) / 128); }

// Activations of a step that a block keeps in shared memory, all rows.
#define X_ROW_BYTES(steps, units) ((u32)(steps) * (units) * 128u + 64u)

#if PUBLISHED

// How weights meet activations. UNITS: activation units of 8 columns under 16 bytes of weights; QUANTISED: scales of
// activations stay apart; WIDE: rows are whole steps.
struct Bf16Weights {  // times activations as they are
    enum { FORMAT = FORMAT_BF16, UNITS = 1, QUANTISED = 0, WIDE = 1 };
};
struct Fp8Raw {  // made bfloat16 with their scale, times activations as they are
    enum { FORMAT = FORMAT_FP8, UNITS = 2, QUANTISED = 0, WIDE = 1 };
};
struct Fp8Codes {  // codes times codes of activations as halves; scales of both on the sum of 128 columns
    enum { FORMAT = FORMAT_FP8, UNITS = 2, QUANTISED = 1, WIDE = 1 };
};
template <int COLUMNS>
struct Fp4 {  // made bfloat16 with their scale, times activations rounded to FP8: exact
    enum { FORMAT = FORMAT_FP4, UNITS = 4, QUANTISED = 0, WIDE = COLUMNS % 256 == 0 };
};
// Asks for a step. `scales` are those of the tile for FP8, those of the matrix for FP4.
template <class E>
DEVICE void fetch(u8* slot, const Strip& from, const u8* scales, u32 step, u32 row_bytes) {
    u32 c = lane_id() % 4;
    uint4* to = reinterpret_cast<uint4*>(slot) + lane_id();
    u8* own = slot + STEP_WEIGHTS + lane_id() * 4;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        // Past the end of a row its last 16 bytes stand in: the activations there are zero.
        u32 at = step * STEP_BYTES + h * 64 + c * 16;
        if (E::FORMAT != FORMAT_FP4 || !E::WIDE) at = at < row_bytes ? at : row_bytes - 16;
        copy_async16_wide(to + 2 * h * LANES, from.w + ((u64)from.a * row_bytes + at));
        copy_async16_wide(to + (2 * h + 1) * LANES, from.w + ((u64)from.b * row_bytes + at));
    }
    // The word that has the tile's scale: its place there is known again when it is used.
    if (E::FORMAT == FORMAT_FP8) {
        const u8* scale = scales + step;
        copy_async4(own, scale - ((u64)scale & 3));
    }
    if (E::FORMAT == FORMAT_FP4) {
        // The 16 bytes of four lanes are eight groups of row a and eight of row b.
        u32 groups = row_bytes / 16;
        if (E::WIDE) {
            copy_async4(own, scales + ((u64)(c < 2 ? from.a : from.b) * groups + (step * 8 + c % 2 * 4)));
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                u32 group = step * 8 + i % 2 * 4 + c;
                group = group < groups ? group : groups - 1;
                own[(i - (int)c) * 4 + (int)c] = (u8)load_near1(scales + ((u64)(i < 2 ? from.a : from.b) * groups + group));
            }
        }
    }
}
// A lane's scales of a step that has come: FP8: of the tile, read from a place of which the last two bits are those of
// `scale_at`; FP4: two words of row a, then of row b.
template <class E>
DEVICE void take_scales(u32 (&to)[4], const u8* slot, u32 scale_at) {
    const u32* scales = reinterpret_cast<const u32*>(slot + STEP_WEIGHTS);
    if (E::FORMAT == FORMAT_FP8) to[0] = scales[lane_id()] >> (scale_at % 4 * 8) & 0xffu;
    if (E::FORMAT == FORMAT_FP4) {
        uint4 s = *reinterpret_cast<const uint4*>(scales + lane_id() / 4 * 4);
        to[0] = s.x, to[1] = s.y, to[2] = s.z, to[3] = s.w;
    }
}
// 16 bytes of row a and of row b, of half `h` of such a step.
DEVICE void take(uint4& a, uint4& b, const u8* slot, int h) {
    const uint4* from = reinterpret_cast<const uint4*>(slot) + lane_id();
    a = from[2 * h * LANES];
    b = from[(2 * h + 1) * LANES];
}

DEVICE u32 word_of(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }
// One 16 x 16 x 8 product: pairs of columns (lo, hi) of row a and row b with those of the activations.
DEVICE void mma_pairs_bf16(float (&d)[4], u32 a_lo, u32 b_lo, u32 a_hi, u32 b_hi, u32 x_lo, u32 x_hi) {
    u32 w[4] = {a_lo, b_lo, a_hi, b_hi}, x[2] = {x_lo, x_hi};
    mma_bf16(d, w, x);
}
DEVICE void mma_pairs_half(float (&d)[4], u32 a_lo, u32 b_lo, u32 a_hi, u32 b_hi, u32 x_lo, u32 x_hi) {
    u32 w[4] = {a_lo, b_lo, a_hi, b_hi}, x[2] = {x_lo, x_hi};
    mma_half(d, w, x);
}
DEVICE const uint4& unit_at(const u8* x, int i) { return *reinterpret_cast<const uint4*>(x + i * 64); }

// Products of half `h` of a step, added to two chains of sums: `p` and `r` are 16 bytes of row a and of row b, `s` the
// step's scales, `x` the lane's own unit of the step.
DEVICE void multiply(Bf16Weights, float (&acc)[2][4], const uint4& p, const uint4& r, const u32*, const u8* x, int h) {
    uint4 b = unit_at(x, h);
    mma_pairs_bf16(acc[0], p.x, r.x, p.y, r.y, b.x, b.y);
    mma_pairs_bf16(acc[1], p.z, r.z, p.w, r.w, b.z, b.w);
}

// Without scales: those of 128 columns come afterwards.
DEVICE void multiply(Fp8Codes, float (&acc)[2][4], const uint4& p, const uint4& r, const u32*, const u8* x, int h) {
#pragma unroll
    for (int q = 0; q < 2; q++) {
        uint4 b = unit_at(x, 2 * h + q);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            u32 v = word_of(p, 2 * q + i), w = word_of(r, 2 * q + i);
            mma_pairs_half(acc[i], half2_of_e4m3x2((u16)v), half2_of_e4m3x2((u16)w), half2_of_e4m3x2((u16)(v >> 16)),
                           half2_of_e4m3x2((u16)(w >> 16)), i ? b.z : b.x, i ? b.w : b.y);
        }
    }
}

// Scales as bfloat16 leave 2^-64 in the products, so that neither the codes' own factors (2^-120, 2^-126) nor large
// scales leave its range: weights of 2^-62 to 2^62 and zero are exact. FLUSH_SCALE undoes it.
#define FLUSH_SCALE 18446744073709551616.0f
DEVICE float flush_scale(Bf16Weights) { return 1.0f; }
DEVICE float flush_scale(Fp8Codes) { return 1.0f; }
template <class E>
DEVICE float flush_scale(E) { return FLUSH_SCALE; }

DEVICE void multiply(Fp8Raw, float (&acc)[2][4], const uint4& p, const uint4& r, const u32* s, const u8* x, int h) {
    u32 scale = s[0] * 0x00800080u + 0x1c001c00u;  // exponent + 120 - 64, twice
#pragma unroll
    for (int q = 0; q < 2; q++) {
        uint4 b = unit_at(x, 2 * h + q);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            u32 v = word_of(p, 2 * q + i), w = word_of(r, 2 * q + i);
            mma_pairs_bf16(acc[i], mul_bf16x2(bf16x2_of_e4m3(v), scale), mul_bf16x2(bf16x2_of_e4m3(w), scale),
                           mul_bf16x2(bf16x2_of_e4m3(v >> 8), scale), mul_bf16x2(bf16x2_of_e4m3(w >> 8), scale),
                           i ? b.z : b.x, i ? b.w : b.y);
        }
    }
}

// Two E2M1 codes of a word as bfloat16 times 2^-126; a multiplication puts sign and magnitude in their places.
DEVICE u32 bf16x2_of_e2m1_low(u32 word) { return (word & 0x000f000fu) * 0x1040u & 0x81c081c0u; }
DEVICE u32 bf16x2_of_e2m1_high(u32 word) { return (word & 0x00f000f0u) * 0x104u & 0x81c081c0u; }

template <int COLUMNS>
DEVICE void multiply(Fp4<COLUMNS>, float (&acc)[2][4], const uint4& p, const uint4& r, const u32* s, const u8* x, int h) {
    u32 shift = lane_id() % 4 * 8;
    u32 sa = (s[h] >> shift & 0xffu) * 0x00800080u + 0x1f001f00u;  // exponent + 126 - 64, twice
    u32 sb = (s[2 + h] >> shift & 0xffu) * 0x00800080u + 0x1f001f00u;
#pragma unroll
    for (int q = 0; q < 4; q++) {
        uint4 b = unit_at(x, 4 * h + q);
        u32 v = word_of(p, q), w = word_of(r, q), v8 = v >> 8, w8 = w >> 8;
        mma_pairs_bf16(acc[0], mul_bf16x2(bf16x2_of_e2m1_low(v), sa), mul_bf16x2(bf16x2_of_e2m1_low(w), sb),
                       mul_bf16x2(bf16x2_of_e2m1_high(v), sa), mul_bf16x2(bf16x2_of_e2m1_high(w), sb), b.x, b.y);
        mma_pairs_bf16(acc[1], mul_bf16x2(bf16x2_of_e2m1_low(v8), sa), mul_bf16x2(bf16x2_of_e2m1_low(w8), sb),
                       mul_bf16x2(bf16x2_of_e2m1_high(v8), sa), mul_bf16x2(bf16x2_of_e2m1_high(w8), sb), b.z, b.w);
    }
}

// What a warp asks for next, and where in its ring: there also lies what it takes next.
struct Walk {
    u8* ring;
    Strip strip;
    u32 slot, tile, step;
};
// Every call is a group of copies, also where nothing is left.
template <class E, class Source>
DEVICE void ask(Walk& w, const Source& source, const Slice& k) {
    if (w.tile < k.tiles) {
        const u8* scales = E::FORMAT == FORMAT_BF16 ? nullptr : scales_of(source, w.strip, w.tile);
        fetch<E>(w.ring + w.slot, w.strip, scales, w.step, k.row_bytes);
        if (++w.step == k.end) {
            w.step = k.begin;
            w.tile += k.stride;
            if (w.tile < k.tiles) w.strip = strip_of(source, w.tile);
        }
    }
    copy_commit();
    w.slot = w.slot + SLOT_BYTES == DEPTH * SLOT_BYTES ? 0 : w.slot + SLOT_BYTES;
}
// Asks for the first DEPTH steps; `rings` has RING_BYTES.
template <class E, class Source>
DEVICE void begin(E, Walk& w, u8* rings, const Source& source, const Slice& k) {
    w.ring = rings + warp_id() * (DEPTH * SLOT_BYTES);
    w.slot = 0;
    w.tile = k.first;
    w.step = k.begin;
    if (w.tile < k.tiles) w.strip = strip_of(source, w.tile);
#pragma unroll 1
    for (int u = 0; u < DEPTH; u++) ask<E>(w, source, k);
}
// Multiplies everything with `columns` rows of activations. `x` holds them, `x_row_bytes` apart, `xs` [step][NROWS]
// scales; sums of column n go to what `part_of(source, tile, n)` names: 16 floats, or nothing.
template <int NROWS, class E, class Source>
DEVICE void run(E, Walk& w, const Source& source, const Slice& k, const u8* x, u32 x_row_bytes, u32 columns,
                const float* xs) {
    u32 g = lane_id() / 4, c = lane_id() % 4, n0 = 2 * c, n1 = 2 * c + 1;
    // Columns without a row repeat the first: nobody looks at their sums.
    const u8* own = x + (g < columns ? g : 0) * x_row_bytes + c * 16;
    const float *xs0 = xs + (n0 < columns ? n0 : 0), *xs1 = xs + (n1 < columns ? n1 : 0);
#pragma unroll 1
    for (u32 tile = k.first; tile < k.tiles; tile += k.stride) {
        float acc[2][4] = {};
        u32 scale_at = E::FORMAT == FORMAT_FP8 ? (u32)(u64)scales_of(source, Strip{nullptr, 0, 0}, tile) : 0;
        const u8* at = own + x_of(source, tile);
#pragma unroll 1
        for (u32 step = k.begin; step < k.end; step++) {
            copy_wait<DEPTH - 1>();
            const u8 *slot = w.ring + w.slot, *units = at + step * (E::UNITS * 128);
            u32 scales[4];
            float sum[2][4] = {};
            uint4 a, b;
            if (E::FORMAT == FORMAT_FP4) sync_warp();
            take_scales<E>(scales, slot, scale_at + step);
            take(a, b, slot, 0);
            multiply(E(), E::QUANTISED ? sum : acc, a, b, scales, units, 0);
            take(a, b, slot, 1);
            // The slot is free.
            if (E::FORMAT == FORMAT_FP4) sync_warp();
            ask<E>(w, source, k);
            multiply(E(), E::QUANTISED ? sum : acc, a, b, scales, units, 1);
            if (E::QUANTISED) {
                float scale = ue8m0_value((u8)scales[0]), s0 = xs0[step * NROWS] * scale, s1 = xs1[step * NROWS] * scale;
#pragma unroll
                for (int i = 0; i < 4; i++) acc[0][i] += (sum[0][i] + sum[1][i]) * (i % 2 ? s1 : s0);
            }
        }
        float f = flush_scale(E());
        if (n0 < columns) {
            if (float* to = part_of(source, k, tile, n0)) {
                to[g] = (acc[0][0] + acc[1][0]) * f;
                to[g + 8] = (acc[0][2] + acc[1][2]) * f;
            }
        }
        if (n1 < columns) {
            if (float* to = part_of(source, k, tile, n1)) {
                to[g] = (acc[0][1] + acc[1][1]) * f;
                to[g + 8] = (acc[0][3] + acc[1][3]) * f;
            }
        }
    }
}

// Two floats that are bfloat16 values exactly, packed.
DEVICE u32 pack_exact(float lo, float hi) { return bits_of(lo) >> 16 | (bits_of(hi) & 0xffff0000u); }
DEVICE float low_of(u32 pair) { return float_of(pair << 16); }
DEVICE float high_of(u32 pair) { return float_of(pair & 0xffff0000u); }

// Eight columns in the order of the operands. Bf16Weights takes them as they are.
DEVICE uint4 unit_of(Bf16Weights, const uint4& v, float*, u32, bool) { return v; }
// Words of four codes give columns (0, 2) and (1, 3).
DEVICE uint4 unit_of(Fp8Raw, const uint4& v, float*, u32, bool) {
    return uint4{(v.x & 0xffffu) | v.y << 16, v.x >> 16 | (v.y & 0xffff0000u), (v.z & 0xffffu) | v.w << 16,
                 v.z >> 16 | (v.w & 0xffff0000u)};
}
// Exponent of the FP8 scale of 128 columns, of which each of 16 lanes has eight. Called by whole warps.
DEVICE int group_exponent(const float (&f)[8]) {
    float amax = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) amax = fmaxf(amax, fabsf(f[i]));
#pragma unroll
    for (int m = 8; m > 0; m /= 2) amax = fmaxf(amax, shuffle_xor(amax, m));
    return scale_exponent(amax, FP8_INVERSE_MAX, FP8_AMAX_MIN);
}
DEVICE void widen8(const uint4& v, float (&f)[8]) {
#pragma unroll
    for (int i = 0; i < 4; i++) f[2 * i] = low_of(word_of(v, i)), f[2 * i + 1] = high_of(word_of(v, i));
}
DEVICE uint4 unit_of(Fp8Codes, const uint4& v, float* scale, u32 j, bool inside) {
    float f[8];
    widen8(v, f);
    int e = group_exponent(f);
    float inverse = pow2(-e);
    if (inside && j % 16 == 0) *scale = pow2(e);
    u32 h[4];
#pragma unroll
    for (int i = 0; i < 4; i++) h[i] = half2_of_e4m3x2(e4m3x2_of(f[2 * i] * inverse, f[2 * i + 1] * inverse));
    return uint4{h[0], h[1], h[2], h[3]};
}
// Words of eight codes give columns (0, 4), (1, 5), (2, 6) and (3, 7).
template <int COLUMNS>
DEVICE uint4 unit_of(Fp4<COLUMNS>, const uint4& v, float*, u32, bool) {
    float f[8];
    widen8(v, f);
    int e = group_exponent(f);
    float inverse = pow2(-e), back = pow2(e);
    u32 h[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float2 q = unpack_half2(half2_of_e4m3x2(e4m3x2_of(f[i] * inverse, f[i + 4] * inverse)));
        h[i] = pack_exact(q.x * back, q.y * back);
    }
    return uint4{h[0], h[1], h[2], h[3]};
}

// `rows` rows of activations on their way into shared memory, row r from `row_at(r)`. Scales to [step][NROWS].
// Called by whole blocks; a thread asks for AHEAD units at once, `meanwhile` runs once it has asked for the first.
template <int NROWS, int AHEAD, class E, class RowAt, class Meanwhile>
DEVICE void stage(E, u8* to, u32 x_row_bytes, float* scales, RowAt row_at, u32 rows, u32 cols, u32 steps,
                  Meanwhile meanwhile) {
    u32 units = steps * (8 * E::UNITS), all = rows * units;
    bool begun = false;
    // Whole warps stay together: groups of a scale are 16 lanes.
    u32 first = threadIdx.x / LANES * LANES;
#pragma unroll 1
    do {
        uint4 v[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            u32 item = first + i * THREADS + lane_id(), r = item / units, j = item % units;
            const act_t* x = row_at(item < all ? r : 0);
            v[i] = item < all && j * 8 < cols ? *reinterpret_cast<const uint4*>(x + j * 8) : uint4{0, 0, 0, 0};
        }
        if (!begun) meanwhile();
        begun = true;
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            u32 item = first + i * THREADS + lane_id(), r = item / units, j = item % units;
            u32 in_step = j % (8 * E::UNITS), half = in_step / (4 * E::UNITS), c = in_step / E::UNITS % 4, q = in_step % E::UNITS;
            u32 at = j / (8 * E::UNITS) * (E::UNITS * 128) + ((half * E::UNITS + q) * 4 + c) * 16;
            uint4 unit = unit_of(E(), v[i], scales + j / 16 * NROWS + r, j, item < all);
            if (item < all) *reinterpret_cast<uint4*>(to + r * x_row_bytes + at) = unit;
        }
        first += AHEAD * THREADS;
    } while (first < all);
}

#endif

// Without tensor cores, in float32: the float numerics, and float32 weights in both. A warp takes a row at a time.

// Values under 16 stored bytes, and value `i` of one of their words.
template <int FORMAT>
struct Plain;
template <>
struct Plain<FORMAT_F32> {
    enum { VALUES = 4 };
};
template <>
struct Plain<FORMAT_BF16> {
    enum { VALUES = 8 };
};
template <>
struct Plain<FORMAT_FP8> {
    enum { VALUES = 16 };
};
template <>
struct Plain<FORMAT_FP4> {
    enum { VALUES = 32 };
};
template <int FORMAT>
DEVICE float value_of(u32 word, int i) {
    if (FORMAT == FORMAT_F32) return float_of(word);
    if (FORMAT == FORMAT_BF16) return float_of(i ? word & 0xffff0000u : word << 16);
    if (FORMAT == FORMAT_FP8) return unpack_half2(half2_of_e4m3x2((u16)(word >> 8 * i & 0xffu))).x;
    return unpack_half2(half2_of_e2m1(word >> 4 * i)).x * E2M1_HALF_SCALE;
}
// x [NROWS][cols] float32 in shared memory; sums of tiles `first`.. to parts[tile][NROWS][16]; `w` is the matrix.
template <int FORMAT, int NROWS>
DEVICE void plain(const u8* w, const u8* scales, u32 first, u32 tiles, u32 rows, u32 row0, u32 cols, u32 row_bytes,
                  const float* x, float* parts) {
    constexpr int VALUES = Plain<FORMAT>::VALUES;
    for (u32 i = warp_id(); i < tiles * TILE_ROWS; i += WARPS) {
        u32 row = first * TILE_ROWS + i;
        float acc[NROWS] = {};
        if (row < rows) {
            for (u32 at = lane_id() * 16; at < row_bytes; at += LANES * 16) {
                uint4 v = load_stream(w + (u64)row * row_bytes + at);
                float scale = 1.0f;
                if (FORMAT == FORMAT_FP8) scale = ue8m0_value(scales[(u64)((row0 + row) / 128) * ((cols + 127) / 128) + at / 128]);
                if (FORMAT == FORMAT_FP4) scale = ue8m0_value(scales[(u64)row * (cols / 32) + at / 16]);
                const float* from = x + at / 16 * VALUES;
                // Not unrolled: registers.
#pragma unroll 1
                for (int p = 0; p < 4; p++, from += VALUES / 4) {
                    u32 word = p == 0 ? v.x : p == 1 ? v.y : p == 2 ? v.z : v.w;
#pragma unroll
                    for (int j = 0; j < VALUES / 4; j++) {
                        float value = value_of<FORMAT>(word, j) * scale;
#pragma unroll
                        for (int n = 0; n < NROWS; n++) acc[n] += value * from[n * cols + j];
                    }
                }
            }
        }
#pragma unroll
        for (int n = 0; n < NROWS; n++) {
            float sum = warp_sum(acc[n]);
            if (lane_id() == 0) parts[(i / TILE_ROWS * NROWS + n) * TILE_ROWS + i % TILE_ROWS] = sum;
        }
    }
}
template <int NROWS>
DEVICE void stage_plain(float* to, const act_t* x, u64 stride, u32 real, u32 cols) {
    for (u32 n = 0; n < NROWS; n++)
        for (u32 i = threadIdx.x; i < cols; i += THREADS) to[n * cols + i] = n < real ? load(x + n * stride + i) : 0.0f;
}

// The sum of a tile's parts, in warp order.
DEVICE float part_sum(const float* parts, u32 tile, u32 split, u32 rows, u32 n, u32 r) {
    float sum = 0.0f;
    for (u32 k = 0; k < split; k++) sum += parts[((u64)(tile * split + k) * rows + n) * TILE_ROWS + r];
    return sum;
}
