// moe_up:   mid[r,j,f] = swiglu(round(w1 x[r]), round(w3 x[r])) * weights[r,j] of expert chosen[r,j]; slot K is the
//           shared expert, weight 1
// moe_down: y[r,d] = sum over slots j, in order, of w2 mid[r,j]
//
// x      [rows, D] act        mid [rows, K+1, F] act        y [rows, D] f32; x and mid are rounded to FP8 per 128
// w1, w3 stacks [F, D] FP4    w2 stack [D, F] FP4, matrices `stride` bytes apart; shared: one FP8 matrix each
// grid   moe_up: blocks of UP_TILES tiles of 16 F rows: first for the shared expert (ROWS rows of x at once, it is the
//        longer work), then for every (row, slot); moe_down: blocks of DOWN_TILES tiles of 16 D rows, for every row
// smem   activations in the order of the operands, partial sums (decode.rs: up_shared, down_shared)
// cost   the chosen experts' bytes once per row; per 2 KB of a warp 4 loads, 16 mma and about 350 other instructions
// twin   reference/forward.rs::experts                   space  decode.rs::MoePoint
#include "stream.cuh"

#define ALIGNED(bytes) (((u64)(bytes) + 255) / 256 * 256)
#define UP_CODES_FP4 ALIGNED((u64)F * D / 2)
#define UP_CODES_FP8 ALIGNED((u64)F * D)
#define TILES_OF(rows) (((rows) + TILE_ROWS - 1) / TILE_ROWS)

// Tiles first.. of w1 (`tiles` of them), then the same of w3.
struct UpTiles {
    const u8 *w1, *w3;
    u32 first, tiles, format;
};
DEVICE Strip strip_of(const UpTiles& t, u32 tile) {
    const u8* w = tile < t.tiles ? t.w1 : t.w3;
    tile = t.first + (tile < t.tiles ? tile : tile - t.tiles);
    if (t.format == FORMAT_FP4) return strip_at(w, w + UP_CODES_FP4, FORMAT_FP4, tile, F, 0, D, D / 2);
    return strip_at(w, w + UP_CODES_FP8, FORMAT_FP8, tile, F, 0, D, D);
}
DEVICE u32 x_of(const UpTiles&, u32) { return 0; }

DEVICE float swiglu(float gate, float up, float limit, float weight) {
    if (limit > 0.0f) {
        gate = fminf(gate, limit);
        up = fminf(fmaxf(up, -limit), limit);
    }
    return gate / (1.0f + expf(-gate)) * up * weight;
}

// `n` rows of x from `row` on, into slot `slot` of mid.
template <int NROWS>
DEVICE void finish_up(const MoeUpArgs& a, const float* parts, const UpTiles& t, u32 split, u32 row, u32 n, u32 slot) {
    for (u32 i = threadIdx.x; i < t.tiles * (NROWS * TILE_ROWS); i += THREADS) {
        u32 r = i % TILE_ROWS, at = i / TILE_ROWS % NROWS, tile = i / (TILE_ROWS * NROWS);
        u32 f = (t.first + tile) * TILE_ROWS + r;
        if (f >= F || at >= n) continue;
        float gate = round_act(part_sum(parts, tile, split, NROWS, at, r));
        float up = round_act(part_sum(parts, t.tiles + tile, split, NROWS, at, r));
        float weight = slot < K ? a.weights[(u64)(row + at) * K + slot] : 1.0f;
        store(a.mid + ((u64)(row + at) * (K + 1) + slot) * F + f, swiglu(gate, up, a.limit, weight));
    }
}

#if PUBLISHED
template <int NROWS, class E>
DEVICE void up(E, u8* shared, const MoeUpArgs& a, const UpTiles& t, u32 row, u32 n, u32 slot) {
    constexpr u32 row_bytes = E::FORMAT == FORMAT_FP4 ? D / 2 : D;
    u32 steps = steps_of(row_bytes), x_row = X_ROW_BYTES(steps, E::UNITS);
    float* scales = reinterpret_cast<float*>(shared + NROWS * x_row);
    float* parts = scales + (E::QUANTISED ? NROWS * steps : 0);
    u32 split = split_of(steps, WARPS);
    Slice k = slice_of(warp_id(), WARPS, 2 * t.tiles, row_bytes, split);
    Walk walk;
    begin(E(), walk, t, k);
    // Which weights a routed block reads was only known after the wait; the shared expert's are always the same.
    if (slot == K) {
        wait_for_previous();
        release_next();
    }
    stage<NROWS>(E(), shared, x_row, scales, a.x + (u64)row * D, D, n, D, steps);
    sync_block();
    run<NROWS>(E(), walk, t, k, shared, x_row, scales, parts);
    sync_block();
    finish_up<NROWS>(a, parts, t, split, row, n, slot);
}
#else
template <int NROWS, int FORMAT>
DEVICE void up_plain(u8* shared, const MoeUpArgs& a, const UpTiles& t, u32 row, u32 n, u32 slot) {
    float* x = reinterpret_cast<float*>(shared);
    float* parts = x + NROWS * D;
    u32 row_bytes = FORMAT == FORMAT_FP4 ? D / 2 : D;
    u64 codes = FORMAT == FORMAT_FP4 ? UP_CODES_FP4 : UP_CODES_FP8;
    stage_plain<NROWS>(x, a.x + (u64)row * D, D, n, D);
    sync_block();
    plain<FORMAT, NROWS>(t.w1, t.w1 + codes, t.first, t.tiles, F, 0, D, row_bytes, x, parts);
    plain<FORMAT, NROWS>(t.w3, t.w3 + codes, t.first, t.tiles, F, 0, D, row_bytes, x,
                         parts + t.tiles * (NROWS * TILE_ROWS));
    sync_block();
    finish_up<NROWS>(a, parts, t, 1, row, n, slot);
}
#endif

KERNEL(moe_up, MoeUpArgs, THREADS) {
    DYNAMIC_SHARED(u8, shared);
    constexpr u32 BLOCKS = (TILES_OF(F) + UP_TILES - 1) / UP_TILES;
    u32 first = blockIdx.x % BLOCKS * UP_TILES, job = blockIdx.x / BLOCKS, groups = (a.rows + ROWS - 1) / ROWS;
    u32 tiles = TILES_OF(F) - first < UP_TILES ? TILES_OF(F) - first : UP_TILES;
    if (job < groups) {
        u32 row = job * ROWS, n = a.rows - row < ROWS ? a.rows - row : ROWS;
        UpTiles t{a.shared_w1, a.shared_w3, first, tiles, FORMAT_FP8};
#if PUBLISHED
        up<ROWS>(Fp8Codes(), shared, a, t, row, n, K);
#else
        wait_for_previous();
        release_next();
        up_plain<ROWS, FORMAT_FP8>(shared, a, t, row, n, K);
#endif
        return;
    }
    wait_for_previous();
    release_next();
    u32 pair = job - groups, row = pair / K, slot = pair % K;
    u64 at = a.chosen[pair] * a.stride;
    UpTiles t{a.w1 + at, a.w3 + at, first, tiles, FORMAT_FP4};
#if PUBLISHED
    up<1>(Fp4<D>(), shared, a, t, row, 1, slot);
#else
    up_plain<1, FORMAT_FP4>(shared, a, t, row, 1, slot);
#endif
}

#define DOWN_CODES_FP4 ALIGNED((u64)D * F / 2)
#define DOWN_CODES_FP8 ALIGNED((u64)D * F)
// A quarter of the warps reads the shared expert: it is twice the bytes of one of six.
#define SHARED_WARPS (WARPS / 4)
#define ROUTED_WARPS (WARPS - SHARED_WARPS)

// Tiles first.. (`tiles` of them) of the K experts' w2, an expert after another.
struct RoutedDown {
    const u8* w2;
    u64 stride;
    const u32* chosen;
    u32 first, tiles, x_row;
};
DEVICE Strip strip_of(const RoutedDown& t, u32 job) {
    const u8* w = t.w2 + t.chosen[job / t.tiles] * t.stride;
    return strip_at(w, w + DOWN_CODES_FP4, FORMAT_FP4, t.first + job % t.tiles, D, 0, F, F / 2);
}
DEVICE u32 x_of(const RoutedDown& t, u32 job) { return job / t.tiles * t.x_row; }

struct SharedDown {
    const u8* w2;
    u32 first;
};
DEVICE Strip strip_of(const SharedDown& t, u32 tile) {
    return strip_at(t.w2, t.w2 + DOWN_CODES_FP8, FORMAT_FP8, t.first + tile, D, 0, F, F);
}
DEVICE u32 x_of(const SharedDown&, u32) { return 0; }

// Partial sums are [slot][tile][split][16]; every slot's sum first, then the slots in order.
DEVICE void finish_down(const MoeDownArgs& a, const float* routed, const float* last, u32 first, u32 tiles, u32 split,
                        u32 row) {
    for (u32 i = threadIdx.x; i < tiles * TILE_ROWS; i += THREADS) {
        u32 r = i % TILE_ROWS, tile = i / TILE_ROWS, d = first * TILE_ROWS + i;
        if (d >= D) continue;
        float sum = 0.0f;
        for (u32 slot = 0; slot < K; slot++) sum += part_sum(routed, slot * tiles + tile, 1, 1, 0, r);
        a.y[(u64)row * D + d] = sum + part_sum(last, tile, split, 1, 0, r);
    }
}

KERNEL(moe_down, MoeDownArgs, THREADS) {
    DYNAMIC_SHARED(u8, shared);
    constexpr u32 BLOCKS = (TILES_OF(D) + DOWN_TILES - 1) / DOWN_TILES;
    u32 first = blockIdx.x % BLOCKS * DOWN_TILES, row = blockIdx.x / BLOCKS;
    u32 tiles = TILES_OF(D) - first < DOWN_TILES ? TILES_OF(D) - first : DOWN_TILES;
    const act_t* mid = a.mid + (u64)row * ((K + 1) * F);
    const u32* chosen = a.chosen + (u64)row * K;
#if PUBLISHED
    constexpr u32 FP4_STEPS = (F / 2 + STEP_BYTES - 1) / STEP_BYTES, FP8_STEPS = (F + STEP_BYTES - 1) / STEP_BYTES;
    constexpr u32 x_row = X_ROW_BYTES(FP4_STEPS, 4), last_row = X_ROW_BYTES(FP8_STEPS, 2);
    u8* last_x = shared + K * x_row;
    float* scales = reinterpret_cast<float*>(last_x + last_row);
    float* parts = scales + FP8_STEPS;
    float* last_parts = parts + K * DOWN_TILES * TILE_ROWS;
    u32 split = split_of(FP8_STEPS, SHARED_WARPS);
    // chosen was complete before the kernel ahead of this one released it: the weights need not wait for mid.
    RoutedDown t{a.w2, a.stride, chosen, first, tiles, x_row};
    Slice k = slice_of(warp_id(), ROUTED_WARPS, K * tiles, F / 2, 1);
    SharedDown last{a.shared_w2, first};
    Slice last_k = slice_of(warp_id() - ROUTED_WARPS, SHARED_WARPS, tiles, F, split);
    bool is_routed = warp_id() < ROUTED_WARPS;
    Walk walk;
    if (is_routed) begin(Fp4<F>(), walk, t, k);
    else begin(Fp8Codes(), walk, last, last_k);
    wait_for_previous();
    release_next();
    stage<K>(Fp4<F>(), shared, x_row, nullptr, mid, F, K, F, FP4_STEPS);
    stage<1>(Fp8Codes(), last_x, last_row, scales, mid + K * F, F, 1, F, FP8_STEPS);
    sync_block();
    if (is_routed) run<1>(Fp4<F>(), walk, t, k, shared, 0, nullptr, parts);
    else run<1>(Fp8Codes(), walk, last, last_k, last_x, 0, scales, last_parts);
    sync_block();
    finish_down(a, parts, last_parts, first, tiles, split, row);
#else
    wait_for_previous();
    release_next();
    float* x = reinterpret_cast<float*>(shared);
    float* parts = x + (K + 1) * F;
    float* last_parts = parts + K * DOWN_TILES * TILE_ROWS;
    stage_plain<1>(x, mid, 0, 1, (K + 1) * F);
    sync_block();
    for (u32 slot = 0; slot < K; slot++) {
        const u8* w = a.w2 + chosen[slot] * a.stride;
        plain<FORMAT_FP4, 1>(w, w + DOWN_CODES_FP4, first, tiles, D, 0, F, F / 2, x + slot * F,
                             parts + slot * tiles * TILE_ROWS);
    }
    plain<FORMAT_FP8, 1>(a.shared_w2, a.shared_w2 + DOWN_CODES_FP8, first, tiles, D, 0, F, F, x + K * F, last_parts);
    sync_block();
    finish_down(a, parts, last_parts, first, tiles, 1, row);
#endif
}
