// Weights streamed once past a few rows of activations: what the decode kernels of dense_gemm and moe_gemm share.
//
// A tile is 16 rows of a stored matrix. A step is 128 bytes of each of them (64 BF16, 128 FP8, 256 FP4 columns): lane
// (g, c) = (lane / 4, lane % 4) loads 16 bytes at c * 16 and at 64 + c * 16 of rows g and g + 8, four loads of 16
// bytes. The tensor cores' order of columns is ours to choose, so a lane multiplies what it has loaded: weights are
// the 16-row operand, rows of activations the 8 columns. A warp walks over (tile, step) pairs with DEPTH steps asked
// for ahead, across tiles. `split` warps share a tile, each with a slice of its steps; their partial sums meet in
// shared memory and are added in warp order. The split depends on the matrix and on WARPS alone, and a column of the
// operand does not see the others: a row's bits are the same alone or among others, for every ROWS.
//
// Activations lie in shared memory in the order of the operands: units of 8 columns (16 bytes), such that the four
// lanes of a group read 64 bytes in a row, and rows 64 bytes apart modulo 128: no bank conflicts.
//
// Macros: WARPS, THREADS = 32 * WARPS, DEPTH (steps ahead; 2 KB of a warp each).
#include "base.cuh"
#include "ptx.cuh"
#include "numerics.cuh"

#define FORMAT_F32 0
#define FORMAT_BF16 1
#define FORMAT_FP8 2
#define FORMAT_FP4 3
#define TILE_ROWS 16
#define STEP_BYTES 128

// Warps that share a tile: a power of two, as many as there are and as there are steps.
DEVICE u32 split_of(u32 steps, u32 warps) {
    u32 split = 1;
    while (split * 2 <= warps && split * 2 <= steps) split *= 2;
    return split;
}
DEVICE u32 steps_of(u32 row_bytes) { return (row_bytes + STEP_BYTES - 1) / STEP_BYTES; }

// Where a warp works: tiles first, first + stride, .. below `tiles`, of each the steps begin..end.
struct Slice {
    u32 first, stride, tiles, begin, end, row_bytes, part, split;
};
// Warp `warp` of `warps` that share `tiles` tiles.
DEVICE Slice slice_of(u32 warp, u32 warps, u32 tiles, u32 row_bytes, u32 split) {
    u32 steps = steps_of(row_bytes), part = warp % split;
    return Slice{warp / split, warps / split, tiles, steps * part / split, steps * (part + 1) / split, row_bytes, part, split};
}

// A lane's view of a tile: its two rows at its first 16 bytes; for FP4 the scales of both rows, for FP8 those of the tile.
struct Strip {
    const u8 *a, *b, *sa, *sb;
};
DEVICE Strip strip_at(const u8* w, const u8* scales, u32 format, u32 tile, u32 rows, u32 row0, u32 cols, u32 row_bytes) {
    u32 a = tile * TILE_ROWS + lane_id() / 4, b = a + 8;
    // Rows past the end are read twice and thrown away.
    a = a < rows ? a : rows - 1;
    b = b < rows ? b : rows - 1;
    Strip s{w + (u64)a * row_bytes + lane_id() % 4 * 16, w + (u64)b * row_bytes + lane_id() % 4 * 16, scales, scales};
    if (format == FORMAT_FP8) s.sa += (u64)((row0 + tile * TILE_ROWS) / 128) * ((cols + 127) / 128);
    if (format == FORMAT_FP4) {
        s.sa += (u64)a * (cols / 32);
        s.sb += (u64)b * (cols / 32);
    }
    return s;
}

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
// One type for all: warps of a block that differ in E share its registers. Unused scales take none.
struct Step {
    uint4 v[4];  // row a and row b at the first 64 bytes, then at the second
    u32 s[4];    // FP8: of the tile; FP4: eight groups of row a, then of row b
};

template <class E>
DEVICE void fetch(Step& to, const Strip& from, u32 step, u32 row_bytes) {
    u32 lane_at = lane_id() % 4 * 16;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        // Past the end of a row its last 16 bytes stand in: the activations there are zero.
        u32 at = step * STEP_BYTES + h * 64;
        u32 last = row_bytes - 16 - lane_at;
        if (E::FORMAT != FORMAT_FP4 || !E::WIDE) at = at + lane_at < row_bytes ? at : last;
        to.v[2 * h] = load_stream(from.a + (long long)(int)at);
        to.v[2 * h + 1] = load_stream(from.b + (long long)(int)at);
    }
    if (E::FORMAT == FORMAT_FP8) to.s[0] = load_near1(from.sa + step);
    if (E::FORMAT == FORMAT_FP4) {
        if (E::WIDE) {
            uint2 a = load_near8(from.sa + step * 8), b = load_near8(from.sb + step * 8);
            to.s[0] = a.x;
            to.s[1] = a.y;
            to.s[2] = b.x;
            to.s[3] = b.y;
        } else {
            u32 c = lane_id() % 4, groups = row_bytes / 16;
#pragma unroll
            for (int h = 0; h < 2; h++) {
                u32 group = step * 8 + h * 4 + c;
                group = group < groups ? group : groups - 1;
                to.s[h] = load_near1(from.sa + group) << (8 * c);
                to.s[2 + h] = load_near1(from.sb + group) << (8 * c);
            }
        }
    }
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

// Products of a step, added to two chains of sums. `x` is the lane's own unit of the step, `xs` the scales of the
// step's activations in the lane's two columns.
DEVICE void multiply(Bf16Weights, float (&acc)[2][4], const Step& w, const u8* x, float, float) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        uint4 b = unit_at(x, h), p = w.v[2 * h], q = w.v[2 * h + 1];
        mma_pairs_bf16(acc[0], p.x, q.x, p.y, q.y, b.x, b.y);
        mma_pairs_bf16(acc[1], p.z, q.z, p.w, q.w, b.z, b.w);
    }
}

DEVICE void multiply(Fp8Codes, float (&acc)[2][4], const Step& w, const u8* x, float xs0, float xs1) {
    float sum[2][4] = {};
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int q = 0; q < 2; q++) {
            uint4 b = unit_at(x, 2 * h + q);
            u32 p = word_of(w.v[2 * h], 2 * q), r = word_of(w.v[2 * h + 1], 2 * q);
            mma_pairs_half(sum[0], half2_of_e4m3x2((u16)p), half2_of_e4m3x2((u16)r), half2_of_e4m3x2((u16)(p >> 16)),
                           half2_of_e4m3x2((u16)(r >> 16)), b.x, b.y);
            p = word_of(w.v[2 * h], 2 * q + 1), r = word_of(w.v[2 * h + 1], 2 * q + 1);
            mma_pairs_half(sum[1], half2_of_e4m3x2((u16)p), half2_of_e4m3x2((u16)r), half2_of_e4m3x2((u16)(p >> 16)),
                           half2_of_e4m3x2((u16)(r >> 16)), b.z, b.w);
        }
    float scale = ue8m0_value((u8)w.s[0]);
    xs0 *= scale, xs1 *= scale;
#pragma unroll
    for (int i = 0; i < 4; i++) acc[0][i] += (sum[0][i] + sum[1][i]) * (i % 2 ? xs1 : xs0);
}

// Scales as bfloat16 leave 2^-64 in the products, so that neither the codes' own factors (2^-120, 2^-126) nor large
// scales leave its range: weights of 2^-62 to 2^62 and zero are exact. FLUSH_SCALE undoes it.
#define FLUSH_SCALE 18446744073709551616.0f
DEVICE float flush_scale(Bf16Weights) { return 1.0f; }
DEVICE float flush_scale(Fp8Codes) { return 1.0f; }
template <class E>
DEVICE float flush_scale(E) { return FLUSH_SCALE; }

DEVICE void multiply(Fp8Raw, float (&acc)[2][4], const Step& w, const u8* x, float, float) {
    u32 scale = w.s[0] * 0x00800080u + 0x1c001c00u;  // exponent + 120 - 64, twice
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
        for (int q = 0; q < 2; q++) {
            uint4 b = unit_at(x, 2 * h + q);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                u32 p = word_of(w.v[2 * h], 2 * q + i), r = word_of(w.v[2 * h + 1], 2 * q + i);
                mma_pairs_bf16(acc[i], mul_bf16x2(bf16x2_of_e4m3(p), scale), mul_bf16x2(bf16x2_of_e4m3(r), scale),
                               mul_bf16x2(bf16x2_of_e4m3(p >> 8), scale), mul_bf16x2(bf16x2_of_e4m3(r >> 8), scale),
                               i ? b.z : b.x, i ? b.w : b.y);
            }
        }
}

// Two E2M1 codes of a word as bfloat16 times 2^-126; a multiplication puts sign and magnitude in their places.
DEVICE u32 bf16x2_of_e2m1_low(u32 word) { return (word & 0x000f000fu) * 0x1040u & 0x81c081c0u; }
DEVICE u32 bf16x2_of_e2m1_high(u32 word) { return (word & 0x00f000f0u) * 0x104u & 0x81c081c0u; }

template <int COLUMNS>
DEVICE void multiply(Fp4<COLUMNS>, float (&acc)[2][4], const Step& w, const u8* x, float, float) {
    u32 shift = lane_id() % 4 * 8;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        u32 sa = (w.s[h] >> shift & 0xffu) * 0x00800080u + 0x1f001f00u;  // exponent + 126 - 64, twice
        u32 sb = (w.s[2 + h] >> shift & 0xffu) * 0x00800080u + 0x1f001f00u;
#pragma unroll
        for (int q = 0; q < 4; q++) {
            uint4 b = unit_at(x, 4 * h + q);
            u32 p = word_of(w.v[2 * h], q), r = word_of(w.v[2 * h + 1], q), p8 = p >> 8, r8 = r >> 8;
            mma_pairs_bf16(acc[0], mul_bf16x2(bf16x2_of_e2m1_low(p), sa), mul_bf16x2(bf16x2_of_e2m1_low(r), sb),
                           mul_bf16x2(bf16x2_of_e2m1_high(p), sa), mul_bf16x2(bf16x2_of_e2m1_high(r), sb), b.x, b.y);
            mma_pairs_bf16(acc[1], mul_bf16x2(bf16x2_of_e2m1_low(p8), sa), mul_bf16x2(bf16x2_of_e2m1_low(r8), sb),
                           mul_bf16x2(bf16x2_of_e2m1_high(p8), sa), mul_bf16x2(bf16x2_of_e2m1_high(r8), sb), b.z, b.w);
        }
    }
}

// What a warp has asked for, and what it asks for next.
struct Walk {
    Step ring[DEPTH];
    Strip strip;
    u32 tile, step, left;
};
template <class E, class Source>
DEVICE void ask(Walk& w, int at, const Source& source, const Slice& k) {
    fetch<E>(w.ring[at], w.strip, w.step, k.row_bytes);
    w.left--;
    if (++w.step == k.end) {
        w.step = k.begin;
        w.tile += k.stride;
        if (w.left) w.strip = strip_of(source, w.tile);
    }
}
// Asks for the first DEPTH steps.
template <class E, class Source>
DEVICE void begin(E, Walk& w, const Source& source, const Slice& k) {
    w.tile = k.first;
    w.step = k.begin;
    u32 tiles = k.first < k.tiles ? (k.tiles - k.first + k.stride - 1) / k.stride : 0;
    w.left = tiles * (k.end - k.begin);
    if (w.left) w.strip = strip_of(source, w.tile);
#pragma unroll
    for (int u = 0; u < DEPTH; u++)
        if (w.left) ask<E>(w, u, source, k);
}
// Multiplies everything. `x` holds NROWS rows, `row_bytes` apart, `xs` [step][NROWS] scales; sums go to
// parts[tile][split][NROWS][16].
template <int NROWS, class E, class Source>
DEVICE void run(E, Walk& w, const Source& source, const Slice& k, const u8* x, u32 x_row_bytes, const float* xs,
                float* parts) {
    float acc[2][4] = {};
    u32 g = lane_id() / 4, c = lane_id() % 4, n0 = 2 * c, n1 = 2 * c + 1;
    const u8* own = x + g % NROWS * x_row_bytes + c * 16;
    u32 tile = k.first, step = k.begin;
    bool more = tile < k.tiles && k.begin < k.end;
    while (more) {
#pragma unroll
        for (int u = 0; u < DEPTH; u++) {
            if (!more) break;
            float s0 = 0.0f, s1 = 0.0f;
            if (E::QUANTISED) {
                s0 = xs[step * NROWS + n0 % NROWS];
                s1 = xs[step * NROWS + n1 % NROWS];
            }
            multiply(E(), acc, w.ring[u], own + x_of(source, tile) + step * (E::UNITS * 128), s0, s1);
            if (w.left) ask<E>(w, u, source, k);
            if (++step == k.end) {
                float f = flush_scale(E());
                float* to = parts + (u64)(tile * k.split + k.part) * (NROWS * TILE_ROWS);
                if (n0 < NROWS) {
                    to[n0 * TILE_ROWS + g] = (acc[0][0] + acc[1][0]) * f;
                    to[n0 * TILE_ROWS + g + 8] = (acc[0][2] + acc[1][2]) * f;
                }
                if (n1 < NROWS) {
                    to[n1 * TILE_ROWS + g] = (acc[0][1] + acc[1][1]) * f;
                    to[n1 * TILE_ROWS + g + 8] = (acc[0][3] + acc[1][3]) * f;
                }
#pragma unroll
                for (int i = 0; i < 4; i++) acc[0][i] = acc[1][i] = 0.0f;
                step = k.begin;
                tile += k.stride;
                more = tile < k.tiles;
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

// Rows of activations on their way into shared memory; the rows from `real` on are zero. Scales to [step][NROWS].
// Called by whole blocks; AHEAD rows are read together.
template <int NROWS, class E>
DEVICE void stage(E, u8* to, u32 x_row_bytes, float* scales, const act_t* x, u64 stride, u32 real, u32 cols, u32 steps) {
    constexpr int AHEAD = NROWS % 2 == 0 ? 2 : NROWS % 3 == 0 ? 3 : 1;
    u32 units = steps * (8 * E::UNITS);
    // Weights on their way hold most registers: not unrolled.
#pragma unroll 1
    for (u32 first = threadIdx.x / LANES * LANES; first < units; first += THREADS) {
        u32 j = first + lane_id();
        u32 in_step = j % (8 * E::UNITS), half = in_step / (4 * E::UNITS), c = in_step / E::UNITS % 4, q = in_step % E::UNITS;
        u32 at = j / (8 * E::UNITS) * (E::UNITS * 128) + ((half * E::UNITS + q) * 4 + c) * 16;
#pragma unroll 1
        for (u32 r0 = 0; r0 < NROWS; r0 += AHEAD) {
            uint4 v[AHEAD];
#pragma unroll
            for (int r = 0; r < AHEAD; r++) {
                bool there = r0 + r < real && j * 8 < cols;
                v[r] = there ? *reinterpret_cast<const uint4*>(x + (r0 + r) * stride + j * 8) : uint4{0, 0, 0, 0};
            }
#pragma unroll
            for (int r = 0; r < AHEAD; r++) {
                uint4 unit = unit_of(E(), v[r], scales + j / 16 * NROWS + r0 + r, j, j < units);
                if (j < units) *reinterpret_cast<uint4*>(to + (r0 + r) * x_row_bytes + at) = unit;
            }
        }
    }
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
